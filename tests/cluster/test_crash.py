"""Durability of a controller process: kills, failing disks, copies of its directory while it works, jumping clocks.

Some tests are short rounds of bench/crash.py, which kills a controller again and again.
"""

from __future__ import annotations

import datetime
import http.client
import itertools
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.clients import call
from harness.processes import (
    GENEROUS,
    LISTENING,
    ORCHARD,
    PLAIN,
    Role,
    at_last,
    command,
    controller,
    environment,
    finished,
    started,
)

from orchard.base.files import HISTORY_FILE, LIFECYCLE_FILE, STATE_FILE
from orchard.state import fsck
from orchard.storage.journal import Disk, Journal
from orchard.store import State, read_state

CRASH = Path(__file__).parent.parent.parent / "bench" / "crash.py"
LIBFAKETIME = (("/usr/lib", "*/faketime/libfaketimeMT.so.1"), ("/usr/lib", "faketime/libfaketimeMT.so.1"))


def crash(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CRASH, *arguments], capture_output=True, text=True, timeout=GENEROUS, check=False
    )


# ---- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_acknowledged_changes_survive_kills_at_random_moments() -> None:
    done = crash("--kills", "5")
    assert done.returncode == 0, done.stderr
    assert re.match(r"5 kills, [0-9]+ events, [0-9]+ reads, [1-9][0-9]+ writes; nothing was lost; seed", done.stdout)


@pytest.mark.slow
def test_controller_that_acknowledges_before_writing_is_detected() -> None:
    """Check that the test above can fail."""
    done = crash("--kills", "20", "--careless")
    assert done.returncode == 1
    assert re.search(r"and meanwhile:|were acknowledged", done.stderr), done.stderr
    shutil.rmtree(done.stderr.split()[-1])


@pytest.mark.slow
@pytest.mark.needs("strace")
def test_acknowledged_changes_survive_a_kill_at_each_rename() -> None:
    done = crash("--sweep", "rename")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"rename: ([3-9]) kills\n\1 kills, nothing was lost\n", done.stdout), done.stdout


# ---- a disk that fails ---------------------------------------------------------------------------------------------


@contextmanager
def traced(home: Path, *options: str) -> Iterator[tuple[Role, str]]:
    """Run a controller under strace; yield it and its URL."""
    home.mkdir(exist_ok=True)
    log = home / "controller.log"
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", *options]
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [*trace, *command("controller", "--listen", "127.0.0.1:0", *PLAIN)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(home),
            # strace and the controller are killed together.
            start_new_session=True,
        )
    role = Role(process, log)
    try:
        yield role, role.wait_for(LISTENING)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(GENEROUS)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.needs("strace")
@pytest.mark.parametrize("what", ["", "/events"])
def test_failed_fsync_is_not_acknowledged_and_ends_the_controller(tmp_path: Path, what: str) -> None:
    """It is not retried either. The controller logs why it ends, and the next one has all acknowledged changes."""
    with controller(*PLAIN, home=tmp_path) as (role, url):
        assert call(url, "POST", "/v1/vms", {"name": "vm", "image": "any"})[0] == 200
        assert role.stop() == 0
    acknowledged: list[tuple[int, int]] = []
    answers: list[int] = []

    def write(url: str, client: int) -> None:
        for number in itertools.count():
            body = (
                [{"kind": "log_line", "payload": f"{client}", "timestamp": number}]
                if what
                else {"name": f"vm-{client}-{number}", "image": "any"}
            )
            try:
                answers.append(call(url, "POST", "/v1/vms" + ("/vm/events" if what else ""), body)[0])
            except (OSError, http.client.HTTPException):
                return
            if answers[-1] == 200:
                acknowledged.append((client, number))

    with traced(tmp_path, "-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=12+") as (role, url):
        clients = [threading.Thread(target=write, args=(url, client)) for client in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(GENEROUS)
        assert role.process.wait(GENEROUS) == 1
    assert set(answers) == {200, 503}
    assert answers.count(503) >= 4, "waiting clients got no answer"
    # Lifecycle events are written beside the state.
    path = r"events/\S+" if what else "(state|events/lifecycle).jsonl"
    said = rf"\norchard controller: cannot sync {tmp_path}/{ORCHARD}/controller/{path}: Input/output error; what .* is uncertain\n"
    assert re.search(said, role.log.read_text()), role.log.read_text()
    with controller(*PLAIN, home=tmp_path) as (role, url):
        if what:
            found = {(int(one["payload"]), one["timestamp"]) for one in call(url, "GET", "/v1/vms/vm/events")[1]}
        else:
            names = {one["name"] for one in call(url, "GET", "/v1/vms")[1]} - {"vm"}
            found = {(int(client), int(number)) for _, client, number in (name.split("-") for name in names)}
        assert acknowledged
        assert found >= set(acknowledged)


# ---- copied while it works -----------------------------------------------------------------------------------------


class Writer(threading.Thread):
    """Creates VMs one after another, deletes every second one, and appends an event to each of the others."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__()
        self.name = name
        self.url = url
        self.stopped = threading.Event()
        # What was acknowledged, in order: (verb, VM).
        self.told: list[tuple[str, str]] = []
        self.failed = ""

    def run(self) -> None:
        for number in itertools.count():
            if self.stopped.is_set():
                return
            vm = f"{self.name}-{number}"
            self.do("create", vm, "POST", "/v1/vms", {"name": vm, "image": "any"})
            if number % 2:
                self.do("delete", vm, "DELETE", f"/v1/vms/{vm}")
            else:
                events = [{"kind": "log_line", "payload": vm, "timestamp": number}]
                self.do("append", vm, "POST", f"/v1/vms/{vm}/events", events)

    def do(self, verb: str, vm: str, method: str, path: str, body: object = None) -> None:
        status, said = call(self.url, method, path, body)
        if status != 200:
            self.failed = f"{method} {path}: {status} {said}"
            self.stopped.set()
        self.told.append((verb, vm))


def vms_after(told: list[tuple[str, str]]) -> set[str]:
    return {vm for verb, vm in told if verb == "create"} - {vm for verb, vm in told if verb == "delete"}


def copied(source: Path, target: Path) -> None:
    """Copy a directory as `cp -r` does: files that were deleted meanwhile are skipped."""
    target.mkdir(mode=0o700)
    for entry in os.scandir(source):
        if entry.is_dir():
            copied(Path(entry), target / entry.name)
        else:
            try:
                shutil.copy(entry, target)
            except FileNotFoundError:
                continue


@pytest.mark.slow
def test_each_copy_of_a_data_directory_in_use_is_a_backup(tmp_path: Path) -> None:
    launch = "import sys; from orchard.storage import state_file as file; file.COMPACT_BYTES, file.COMPACT_RATIO = 20_000, 0\n"
    launch += "from orchard import controller; sys.exit(controller.main(sys.argv[1:]))"
    data = tmp_path / ORCHARD / "controller"
    snapshots = set()
    with compacting(tmp_path, launch) as (role, url):
        writers = [Writer(url, name) for name in ("a", "b")]
        for writer in writers:
            writer.start()

        def have_told(count: int) -> bool:
            assert not any(writer.failed for writer in writers)
            return all(len(writer.told) >= count for writer in writers)

        copies = []
        for number in range(12):
            at_last(lambda: have_told(20 * (number + 1)))  # noqa: B023 -- at_last calls it at once
            before = [list(writer.told) for writer in writers]
            copied(data, tmp_path / f"copy{number}")
            copies.append((tmp_path / f"copy{number}", before))
            snapshots.add((data / STATE_FILE).stat().st_ino)
        for writer in writers:
            writer.stopped.set()
            writer.join(GENEROUS)
            assert not writer.failed
        assert role.stop() == 0
    assert len(snapshots) > 2, "the state file was not compacted meanwhile"
    for directory, before in copies:
        report = fsck.inspect(directory)
        assert report.problems == []
        for writer, told in zip(writers, before, strict=True):
            check_copy(directory, report.state, writer, told)
    directory, _ = copies[-1]
    checked = finished("", "check", str(directory), home=tmp_path)
    assert checked.returncode == 0, checked.stdout
    with controller(*PLAIN, "--data-dir", str(directory), home=tmp_path) as (role, url):
        assert {vm["name"] for vm in call(url, "GET", "/v1/vms")[1]} == set(report.state.vms)
        assert role.stop() == 0


@contextmanager
def compacting(home: Path, program: str) -> Iterator[tuple[Role, str]]:
    """Run a controller that compacts its state file again and again."""
    with (home / "compacting.log").open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "--listen", "127.0.0.1:0", *PLAIN],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(home),
        )
    role = Role(process, home / "compacting.log")
    try:
        yield role, role.wait_for(LISTENING)[1]
    finally:
        process.kill()
        process.wait(GENEROUS)
        assert process.stdout is not None
        process.stdout.close()


def check_copy(directory: Path, state: State, writer: Writer, before: list[tuple[str, str]]) -> None:
    """Check that a copy has what a writer was told before, and all changes of the writer up to some moment."""
    changes = [(verb, vm) for verb, vm in writer.told if verb != "append"]
    least = sum(verb != "append" for verb, _ in before)
    held = {name for name in state.vms if name.startswith(f"{writer.name}-")}
    assert held in [vms_after(changes[:count]) for count in range(least, len(changes) + 1)]
    for _, vm in (one for one in before if one[0] == "append"):
        journal = Journal(directory / "events" / f"{state.vms[vm].uid}.jsonl", Disk())
        _, (_, line) = journal.read()
        assert line["event"]["payload"] == vm


# ---- who may read it -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_files_of_a_data_directory_are_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(0o022)
    (tmp_path / "home").mkdir()
    os.umask(umask)
    try:
        env = {"PYTHONDONTWRITEBYTECODE": "1"}
        with controller(*PLAIN, "--listen-ssh", "127.0.0.1:0", home=tmp_path / "home", env=env) as (role, url):
            assert call(url, "POST", "/v1/vms", {"name": "vm", "image": "any"})[0] == 200
            events = [{"kind": "log_line", "payload": "x", "timestamp": 1}]
            assert call(url, "POST", "/v1/vms/vm/events", events)[0] == 200
            assert call(url, "POST", "/v1/vms", {"name": "ended", "image": "any"})[0] == 200
            assert call(url, "DELETE", "/v1/vms/ended")[0] == 200
            assert role.stop() == 0
    finally:
        os.umask(before)
    directory = tmp_path / "home" / ORCHARD / "controller"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.rglob("*")]}
    assert modes.pop("controller.lock") & 0o077 == 0
    # Among them the lifecycle events and the history, which a stop writes.
    assert len(modes) == 9
    assert {LIFECYCLE_FILE, HISTORY_FILE} <= set(modes)
    assert all(mode == (0o700 if name in ("controller", "events") else 0o600) for name, mode in modes.items()), modes


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("state.jsonl", 0o644, "can be read by others than its owner (mode 644); chmod 600 it"),
        ("", 0o720, "can be written by others than its owner (mode 720); chmod 700 it"),
    ],
)
def test_start_is_refused_when_others_can_read_or_replace_a_secret(
    tmp_path: Path, name: str, mode: int, words: str
) -> None:
    """Each file and mode is tested in tests/state/test_fsck.py."""
    directory = tmp_path / ORCHARD / "controller"
    directory.mkdir(mode=0o700, parents=True)
    path = directory / name if name else directory
    if name:
        path.write_bytes(b"secret")
    path.chmod(mode)
    refused = finished("controller", "--listen", "127.0.0.1:0", *PLAIN, home=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"orchard controller: {path} {words}\n"
    assert {one.name for one in directory.iterdir()} <= {name, "controller.lock"}


# ---- clocks that jump ----------------------------------------------------------------------------------------------


def made(url: str, name: str) -> float:
    """Create a VM, wait until it runs, and return its createdAt as a Unix time."""
    created = call(url, "POST", "/v1/vms", {"name": name, "image": "any"})[1]["createdAt"]
    at_last(lambda: call(url, "GET", f"/v1/vms/{name}")[1]["status"] == "running")
    return datetime.datetime.fromisoformat(created).timestamp()


@pytest.mark.slow
@pytest.mark.needs("faketime")
def test_jumping_clock_neither_fails_vms_nor_damages_data(tmp_path: Path) -> None:
    """Set the host's clock an hour forward, two back, and ten years forward."""
    library = next(path for root, pattern in LIBFAKETIME for path in Path(root).glob(pattern))
    offset = tmp_path / "offset"
    offset.write_text("+0")
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with (
        controller(*PLAIN, home=tmp_path, env=env) as (role, url),
        started("worker", url, "--runtime", "synthetic", "--name", "mac", home=tmp_path) as worker,
    ):
        created = [made(url, "first")]
        for number, step in enumerate(("+3600", "-3600", "+315360000", "+0")):
            offset.write_text(step)
            created.append(made(url, f"vm{number}"))
            (online,) = call(url, "GET", "/v1/workers")[1]
            assert online["name"] == "mac"
            for vm in call(url, "GET", "/v1/vms")[1]:
                assert (vm["status"], vm.get("restart_count", 0)) == ("running", 0), vm
            call(url, "DELETE", f"/v1/vms/vm{number}")
        assert created[1] > created[0] + 3000, "the clock did not jump"
        assert created[2] < created[0] - 3000
        assert role.stop() == 0
        worker.stop()
    assert "failed" not in role.log.read_text()
    assert fsck.inspect(tmp_path / ORCHARD / "controller").problems == []
    state = read_state(tmp_path / ORCHARD / "controller" / STATE_FILE)
    assert set(state.vms) == {"first"}
