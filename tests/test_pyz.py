"""orchard.pyz: what is in it, and that controllers, workers and supervisors run from it, also across its exchange."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harness import processes
from harness.hosts import ProcessCluster, ends_well, process_cluster
from harness.isolation import without_network

from orchard import __version__

# To make the archive takes as long as a slow test, in each process of pytest-xdist that runs one of these.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# Without the packages of this environment.
PYTHON = str(getattr(sys, "_base_executable", sys.executable))
MOST_BYTES = 2_500_000


def make(directory: Path) -> Path:
    subprocess.run([sys.executable, ROOT / "tools" / "pyz.py", directory], check=True, capture_output=True)
    return directory / "orchard.pyz"


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pyz"))


def run(pyz: Path, *words: str, home: Path, python: str = PYTHON) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    return subprocess.run([python, pyz, *words], env=env, capture_output=True, text=True, check=False)


def test_archive_is_small_and_the_same_each_time(pyz: Path, tmp_path: Path) -> None:
    again = make(tmp_path)
    assert again.read_bytes() == pyz.read_bytes()
    assert pyz.stat().st_size < MOST_BYTES
    digest = hashlib.sha256(pyz.read_bytes()).hexdigest()
    assert pyz.with_name("orchard.pyz.sha256").read_text() == f"{digest}  orchard.pyz\n"


def test_each_package_is_listed_and_has_its_licence_inside(pyz: Path) -> None:
    bill = json.loads(pyz.with_name("orchard.pyz.cdx.json").read_text())
    components = {component["name"].lower() for component in bill["components"]}
    assert {"h11", "trio", "trio-websocket", "pyjwt"} <= components
    names = zipfile.ZipFile(pyz).namelist()
    licensed = {name.split("/")[0].split("-")[0].replace("_", "-").lower() for name in names if "licen" in name.lower()}
    assert components - {"orchard-cluster"} <= licensed | {"sniffio", "outcome"}
    assert "orchard/LICENSE" in names
    # The dashboard is served from the archive, too.
    assert {f"orchard/ui/{file.name}" for file in (ROOT / "orchard" / "ui").iterdir() if file.is_file()} <= {*names}
    assert not [name for name in names if "/_tests/" in name or name.endswith(".pyc")]


def test_command_runs_in_an_empty_home_and_keeps_exit_statuses(pyz: Path, tmp_path: Path) -> None:
    done = run(pyz, "--version", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"orchard {__version__}\n")
    assert run(pyz, "nonsense", home=tmp_path).returncode == 2
    assert run(pyz, "list", "vms", home=tmp_path).returncode == 1
    (made,) = (tmp_path / ".orchard" / "pyz").iterdir()
    assert (made / "orchard" / "controller.py").exists()


def test_printed_settings_of_ssh_run_the_archive(pyz: Path, tmp_path: Path) -> None:
    [line] = [line for line in run(pyz, "ssh-config", home=tmp_path).stdout.splitlines() if "ProxyCommand" in line]
    program = shlex.split(line.partition("__tunnel")[0])[1:]
    # As ssh runs it, without what the archive sets for its own processes.
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([*program, "--version"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"orchard {__version__}\n")


def test_home_that_cannot_be_written_to_is_named(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / ".orchard").write_text("not a directory")
    done = run(pyz, "--version", home=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "ORCHARD_HOME" in done.stderr


def changed(pyz: Path, path: Path, content: str) -> Path:
    """Write another archive, with the same product in it."""
    shutil.copy(pyz, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(content, "")
    return path


def test_unpacked_archives_that_no_process_uses_are_removed_but_the_newest_other(
    pyz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = tmp_path / ".orchard" / "pyz"
    monkeypatch.setattr(processes, "command", lambda role, *words: [PYTHON, str(pyz), role, *words])
    # The controller does not unpack the archive itself.
    assert run(pyz, "--version", home=tmp_path).returncode == 0
    [used] = unpacked.iterdir()
    with processes.controller(*processes.PLAIN, home=tmp_path) as (role, _):
        # What a start that was killed has left.
        (unpacked / "tmpabcdefgh").mkdir()
        for number in range(4):
            assert run(changed(pyz, tmp_path / "new.pyz", str(number)), "--version", home=tmp_path).returncode == 0
        left = list(unpacked.iterdir())
        assert used in left
        # And the last two.
        assert len(left) == 3
        assert role.stop() == 0
    assert run(changed(pyz, tmp_path / "new.pyz", "5"), "--version", home=tmp_path).returncode == 0
    assert used not in list(unpacked.iterdir())
    assert len(list(unpacked.iterdir())) == 2


def test_many_starts_at_once_of_several_archives_all_succeed(pyz: Path, tmp_path: Path) -> None:
    archives = [changed(pyz, tmp_path / f"{number}.pyz", str(number)) for number in range(3)]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    starts = [subprocess.Popen([PYTHON, archive, "--version"], env=env) for archive in archives * 3]
    assert [start.wait(processes.GENEROUS) for start in starts] == [0] * 9
    left = list((tmp_path / ".orchard" / "pyz").iterdir())
    assert {len(path.name) for path in left} == {32}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_archive_that_root_unpacks_for_others_can_be_read_but_not_changed_by_them(
    pyz: Path, tmp_path: Path, umask: int
) -> None:
    place = tmp_path / "shared" / "pyz"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ORCHARD_PYZ_DIRECTORY": str(place)}
    subprocess.run([PYTHON, pyz, "--version"], env=env, check=True, capture_output=True, umask=umask)
    [unpacked] = place.iterdir()
    for path in (place.parent, place, unpacked, unpacked / "orchard", unpacked / "orchard" / "worker.py"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert not (tmp_path / ".orchard").exists()


def test_what_needs_an_extra_says_which_one_is_missing(pyz: Path, tmp_path: Path) -> None:
    refused = run(pyz, "controller", "--listen", "127.0.0.1:0", "--listen-ssh", "127.0.0.1:0", home=tmp_path)
    assert refused.returncode == 1
    for named in ("orchard-cluster[ssh]", "asyncssh", "wheelhouse"):
        assert named in refused.stderr


def test_older_python_says_what_is_needed(tmp_path: Path) -> None:
    """The start of the archive is also valid in older Pythons, which is as much as can be tried without one."""
    main = ROOT / "tools" / "pyz_main.py"
    ast.parse(main.read_text(), feature_version=(3, 7))
    program = f"import sys; sys.version_info = (3, 10, 13); exec(open({str(main)!r}).read())"
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "3.11" in done.stderr


@asynccontextmanager
async def isolated_cluster(home: Path) -> AsyncIterator[ProcessCluster]:
    with without_network():
        async with process_cluster(home) as c:
            yield c


@pytest.mark.needs("ip")
async def test_vms_are_adopted_across_an_exchange_of_the_archive(
    pyz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    used = tmp_path / "orchard.pyz"
    shutil.copy(pyz, used)
    monkeypatch.setattr(processes, "command", lambda role, *words: [PYTHON, str(used), role, *words])
    async with isolated_cluster(tmp_path / "site") as c:
        with c.host.worker() as worker:
            vm = await c.create_running("vm")
            worker.stop(signal.SIGKILL)
        process = c.host.record(vm).child
        changed(pyz, tmp_path / "newer.pyz", "newer").replace(used)
        with c.host.worker() as worker:
            await c.client.vms.patch("vm", headless=True)
            now = await c.wait_vm("vm", lambda vm: vm.state.observed_generation == 1)
            assert (now.uid, now.state.restart_count) == (vm.uid, 0)
            assert c.host.record(vm).child != process, "the changed VM was started again, by the new archive"
            await c.delete_all()
            assert ends_well(worker)
        assert len(list((c.host.home / ".orchard" / "pyz").iterdir())) == 2
        assert processes.processes_in(c.host.tart_home) == []
