"""The `orchard` command: demo and dev as processes, the other verbs mostly by calling `main`."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.processes import GENEROUS, ORCHARD, REALLY, at_last, call_main, controller, environment, finished, started
from harness.programs import need

from orchard import __version__
from orchard.auth import BootstrapToken
from orchard.cli.main import main

STEP = re.compile(r" +[0-9]+\.[0-9]{3} s  (.*)\n")


@pytest.mark.slow
def test_demo_prints_each_step_and_leaves_nothing(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = finished("", "demo", "--synthetic", home=tmp_path, env={"TMPDIR": str(temporary)}, before=REALLY)
    assert (done.returncode, done.stderr) == (0, "")
    steps = STEP.findall(done.stdout)
    for begins in (
        "a controller listens on http://127.0.0.1:",
        "POST /v1/vms: the VM",
        'the VM is running on "worker-1"',
        "its script printed: Hello from ",
        "its script printed: Variables arrive unchanged: \"$HOME\" `uname` 'and quotes'.",
        "DELETE /v1/vms/demo",
        "worker and controller have ended",
    ):
        assert any(step.startswith(begins) for step in steps), (begins, steps)
    assert list(temporary.iterdir()) == []


def curl(line: str) -> str:
    """Run a printed curl command, and return what it prints.

    With -N the answer has no end, and only its first line is returned.
    """
    words = shlex.split(line, comments=True)
    with subprocess.Popen([*words, "-sS", "--fail-with-body"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if "-N" in words:
            first = process.stdout.readline()
            process.kill()
            return first
        said = process.stdout.read()
        assert process.wait(GENEROUS) == 0, (line, said)
        return said


@pytest.mark.needs("curl")
def test_curl_commands_that_demo_keep_prints_work(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with started("", "demo", "--synthetic", "--keep", home=tmp_path, env={"TMPDIR": str(temporary)}) as role:
        role.wait_for(re.compile("It runs until"))
        role.wait_for(re.compile(".*-X DELETE"))
        lines = [line for line in role.said if line.startswith("  curl ")]
        listed, created, events, watched, deleted = map(curl, lines)
        assert [vm["name"] for vm in json.loads(listed)] == ["demo"]
        assert json.loads(created)["name"] == "second"
        assert isinstance(json.loads(events), list)
        change = json.loads(watched)
        assert (change["type"], change["object"]["name"]) == ("ADDED", "second")
        assert deleted == ""
        assert [vm["name"] for vm in json.loads(curl(lines[0]))] == ["demo"]
        assert list(temporary.iterdir()) != []
        assert role.stop(signal.SIGINT) == 0
    assert list(temporary.iterdir()) == []
    assert role.log.read_text() == ""


def test_demo_ends_quietly_when_its_output_is_closed(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with started("", "demo", "--synthetic", home=tmp_path, env={"TMPDIR": str(temporary)}) as role:
        assert role.process.stdout is not None
        role.process.stdout.close()
        assert role.process.wait(GENEROUS) == 1
    assert (role.log.read_text(), list(temporary.iterdir())) == ("", [])


@pytest.mark.needs("curl")
@pytest.mark.slow
def test_dev_keeps_its_state(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    arguments = ("dev", "--synthetic", "--port", "0", "--directory", str(tmp_path / "dev"), "--workers", "2",
        "--ready-file", str(ready))  # fmt: skip
    listening = re.compile(r"orchard .* for development: (\S+),")
    with started("", *arguments, home=tmp_path) as role:
        url = role.wait_for(listening)[1]
        at_last(ready.exists)
        assert json.loads(ready.read_text()) == {"url": url}
        body = json.dumps({"name": "vm", "image": "any", "labels": {"no": "worker"}})
        created = json.loads(curl(f"curl {url}/v1/vms -d '{body}'"))
        workers = json.loads(curl(f"curl {url}/v1/workers"))
        assert [worker["name"] for worker in workers] == ["worker-1", "worker-2"]
        assert role.stop(signal.SIGINT) == 0
        assert not ready.exists()
    with started("", *arguments, home=tmp_path) as role:
        url = role.wait_for(listening)[1]
        (kept,) = json.loads(curl(f"curl {url}/v1/vms"))
        assert (kept["name"], kept["uid"]) == ("vm", created["uid"])
        assert role.stop() == 0


@pytest.mark.needs("openssl")
def test_bootstrap_token_is_read_from_the_data_of_a_running_controller(tmp_path: Path) -> None:
    env = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "t"}
    with controller(home=tmp_path, env=env):
        made = finished("", "bootstrap-token", "bootstrap-admin", home=tmp_path)
        certificate = (tmp_path / ORCHARD / "controller" / "controller.crt").read_bytes()
        assert BootstrapToken.parse(made.stdout) == BootstrapToken("bootstrap-admin", "t", certificate)
        status, out, _ = call_main(main, "bootstrap-token", "bootstrap-admin", "--no-certificate", home=tmp_path)
        assert status == 0
        assert BootstrapToken.parse(out) == BootstrapToken("bootstrap-admin", "t")
        written = tmp_path / "workers.token"
        written.touch(0o644)
        options = ("--no-certificate", "--output", str(written))
        assert call_main(main, "bootstrap-token", "bootstrap-admin", *options, home=tmp_path) == (0, "", "")
        assert (written.read_text(), stat.S_IMODE(written.stat().st_mode)) == (out, 0o600)
        nowhere = str(tmp_path / "none" / "token")
        status, out, err = call_main(main, "bootstrap-token", "bootstrap-admin", "--output", nowhere, home=tmp_path)
        assert (status, out) == (1, "")
        assert nowhere in err
        status, out, err = call_main(main, "bootstrap-token", "unknown", home=tmp_path)
        assert (status, out) == (1, "")
        assert '"unknown"' in err
        assert "bootstrap-admin" in err
    state = tmp_path / ORCHARD / "controller" / "state.jsonl"
    state.write_bytes(state.read_bytes().replace(b"bootstrap", b"bootstrab", 1))
    for home, words in ((tmp_path, "checksum"), (tmp_path / "none", "--data-dir")):
        arguments = ("bootstrap-token", "bootstrap-admin", "--data-dir", str(home / ORCHARD / "controller"))
        status, out, err = call_main(main, *arguments, home=tmp_path)
        assert (status, out) == (1, "")
        assert words in err
        assert "Traceback" not in err


def test_invalid_command_lines_are_refused_without_a_traceback(tmp_path: Path) -> None:
    assert call_main(main, "--version", home=tmp_path) == (0, f"orchard {__version__}\n", "")
    status, out, err = call_main(main, home=tmp_path)
    assert (status, out) == (2, "")
    assert "usage: orchard" in err
    assert "VERB" in err
    status, _, err = call_main(main, "dmeo", home=tmp_path)
    assert status == 2
    assert "demo?" in err
    status, _, err = call_main(main, "dev", "--prot", "1", home=tmp_path)
    assert status == 2
    assert "--port?" in err
    status, _, err = call_main(main, "dev", "--port", "65536", home=tmp_path)
    assert status == 2
    assert "65536" in err
    for role in ("controller", "worker"):
        status, out, _ = call_main(main, role, "--help", home=tmp_path)
        assert status == 0
        assert "usage:" in out


# Of the command as it is installed: Ctrl-C when its work is done.
AT_THE_END = """
import signal, sys
from orchard.__main__ import main
sys.argv = ["orchard", "check", "/none"]
main()
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(
    "words",
    [["-m", "orchard", "demo"], ["-m", "orchard.controller"], ["-m", "orchard.worker", "http://127.0.0.1:1"], ["-c", AT_THE_END]],
    ids=["command", "controller", "worker", "at the end"],
)  # fmt: skip
def test_interrupt_while_the_program_starts_or_exits_shows_no_traceback(tmp_path: Path, words: list[str]) -> None:
    if words[0] == "-m":
        (tmp_path / "trio.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    env = environment(tmp_path, {"PYTHONPATH": str(tmp_path)})
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -signal.SIGINT
    assert "Traceback" not in done.stderr


def test_dev_in_a_file_fails_without_a_traceback(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile() as file:
        refused = finished("", "dev", "--synthetic", "--port", "0", "--directory", file.name, home=tmp_path)
    assert refused.returncode == 1
    assert file.name in refused.stderr
    assert "Traceback" not in refused.stderr


def test_two_workers_cannot_share_a_host_with_tart(tmp_path: Path) -> None:
    (tmp_path / "tart").touch(mode=0o755)
    env = {"PATH": str(tmp_path)}
    refused = finished("", "dev", "--port", "0", "--workers", "2", home=tmp_path, env=env)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--workers is 2" in refused.stderr


# ---- orchard check -------------------------------------------------------------------------------------------------

EVENT = [{"kind": "log_line", "payload": "x", "timestamp": 1}]
HEALTHY = re.compile(
    r"(/.*): 2 VMs, 0 workers, 0 service accounts, [2-9] events, 0 ended VMs; [3-9] lines up to revision ([0-9]+); no problems\n"
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home of a controller that has ended, with two VMs, each with an event."""
    need("curl", "openssl")
    home = tmp_path_factory.mktemp("kept")
    with controller("--insecure-no-auth", home=home) as (role, url):
        for name in ("a", "b"):
            for path, body in (("", {"name": name, "image": "any"}), (f"/{name}/events", EVENT)):
                subprocess.run(
                    ["curl", "-sSk", "--fail-with-body", f"{url}/v1/vms{path}", "-d", json.dumps(body)],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
        assert role.stop() == 0
    return home


def images(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted([directory, *directory.rglob("*")])
    }


def checked(directory: Path) -> tuple[int, str]:
    """Run `orchard check`, and return its status and output. It must change nothing."""
    before = images(directory)
    status, out, err = call_main(main, "check", str(directory), home=directory.parent)
    assert images(directory) == before
    assert err == ""
    return status, out


def events_file(directory: Path) -> Path:
    return min((directory / "events").iterdir())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def another_key(path: Path) -> None:
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    path.chmod(0o600)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def second_line(path: Path) -> int:
    return path.read_bytes().index(b"\n") + 1


def test_check_of_a_healthy_directory_reports_no_problem(kept: Path) -> None:
    status, said = checked(kept / ORCHARD / "controller")
    assert status == 0
    assert HEALTHY.fullmatch(said), said
    default = finished("", "check", home=kept)
    assert (default.returncode, default.stdout) == (0, said)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda d: flip(d / "state.jsonl", second_line(d / "state.jsonl") + 40), r"{d}/state.jsonl: the checksum does not fit .* at byte {line}; restore the data directory from a backup, .*"),
        (lambda d: (d / "state.jsonl").unlink(), r"{d}/state.jsonl is missing; restore it from a backup, or give .*"),
        (lambda d: flip(events_file(d), second_line(events_file(d)) + 40), r"{d}/events/.*\.jsonl: the checksum does not fit .* at byte [0-9]+; restore .*"),
        (lambda d: (d / "access-token.key").write_bytes(b"short"), r"{d}/access-token.key has 5 bytes, expected 32; restore .*"),
        (lambda d: (d / "access-token.key").unlink(), r"{d}/access-token.key is missing; restore .*"),
        (lambda d: (d / "access-token.key").chmod(0o640), r"{d}/access-token.key can be read by others than its owner \(mode 640\); chmod 600 it"),
        (lambda d: (d / "controller.key").chmod(0o604), r"{d}/controller.key can be read by others .* \(mode 604\); chmod 600 it"),
        (lambda d: (d / "state.jsonl").chmod(0o644), r"{d}/state.jsonl can be read by others .*; chmod 600 it"),
        (lambda d: d.chmod(0o770), r"{d} can be written by others than its owner \(mode 770\); chmod 700 it"),
        (lambda d: (d / "controller.key").unlink(), r"{d}/controller.crt has no key {d}/controller.key; restore .*"),
        (lambda d: another_key(d / "controller.key"), r"{d}/controller.crt and {d}/controller.key are not a certificate and its key .*; restore .*"),
    ],
)  # fmt: skip
def test_check_reports_each_problem_with_its_place_and_remedy(
    kept: Path, tmp_path: Path, spoil: Callable[[Path], object], problem: str
) -> None:
    directory = tmp_path / "data"
    shutil.copytree(kept / ORCHARD / "controller", directory)
    line = second_line(directory / "state.jsonl")
    spoil(directory)
    status, said = checked(directory)
    first, last = said.splitlines()
    assert status == 1
    assert re.fullmatch(problem.format(d=re.escape(str(directory)), line=line), first), first
    assert last.endswith("; 1 problems")


def test_check_notes_what_the_next_start_repairs(kept: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    shutil.copytree(kept / ORCHARD / "controller", directory)
    sizes = {path: path.stat().st_size for path in (directory / "state.jsonl", events_file(directory))}
    for path in sizes:
        append(path, b'{"sum":"')
    (directory / "state.jsonl.new").write_bytes(b"half")
    (directory / "events" / "x.jsonl.new").write_bytes(b"half")
    gone = directory / "events" / "gone.jsonl"
    gone.write_bytes(events_file(directory).read_bytes())
    status, said = checked(directory)
    assert status == 1
    assert f"{gone}: the header is not that of orchard-events version 1 for uid gone at byte 0" in said
    gone.unlink()
    status, said = checked(directory)
    *notes, last = said.splitlines()
    assert (status, len(notes)) == (0, 4)
    assert HEALTHY.fullmatch(last + "\n")
    for path, size in sizes.items():
        assert f"note: {path}: the last line is not finished at byte {size}; the next start cuts it off" in notes
    with controller("--insecure-no-auth", "--data-dir", str(directory), home=tmp_path) as (role, _):
        assert checked(directory) == (0, last + "\n"), "a running controller has repaired it"
        assert role.stop() == 0


def test_check_notes_events_of_deleted_vms(kept: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    shutil.copytree(kept / ORCHARD / "controller", directory)
    with controller("--insecure-no-auth", "--data-dir", str(directory), home=tmp_path) as (_, url):
        subprocess.run(["curl", "-sSk", "--fail-with-body", "-X", "DELETE", f"{url}/v1/vms/a"], check=True)
    shutil.copytree(kept / ORCHARD / "controller" / "events", directory / "events", dirs_exist_ok=True)
    status, said = checked(directory)
    note, last = said.splitlines()
    assert (status, note.startswith(f"note: {directory}/events/")) == (0, True)
    assert note.endswith("belongs to a VM that does not exist any more; the next start removes it")
    assert last.startswith(f"{directory}: 1 VMs")


def test_check_of_a_missing_directory_fails(tmp_path: Path) -> None:
    status, _, err = call_main(main, "check", str(tmp_path / "none"), home=tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert f"cannot read {tmp_path}/none: No such file or directory" in err


def test_check_of_a_directory_that_no_controller_has_used_reports_the_state_alone(tmp_path: Path) -> None:
    for name in ("empty", "foreign/db"):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        status, out, _ = call_main(main, "check", str(directory.parent if "db" in name else directory), home=tmp_path)
        problem, summary = out.splitlines()
        assert status == 1
        assert problem.startswith(f"{directory}")
        assert summary.endswith("1 problems")


def test_check_takes_one_directory(tmp_path: Path) -> None:
    assert call_main(main, "check", "a", "b", home=tmp_path)[0] == 2


@pytest.mark.slow
@pytest.mark.needs("etcd")
def test_demo_of_several_controllers_survives_the_kill_of_the_leader(tmp_path: Path) -> None:
    done = finished("", "demo", "--synthetic", "--controllers", "2", home=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("controller-1 is killed", "controller-2 leads", "the VM runs on", '"second", was created and runs'):
        assert said in done.stdout


def test_option_before_the_verb_is_said_to_follow_it(tmp_path: Path) -> None:
    status, out, said = call_main(main, "--context", "c", "list", "vms", home=tmp_path)
    assert (status, out, len(said.splitlines())) == (2, "", 1)
    assert "orchard VERB ... --context" in said


def test_help_of_a_verb_is_shown_for_either_order(tmp_path: Path) -> None:
    shown = [finished("", *words, home=tmp_path).stdout for words in (("help", "wait"), ("wait", "--help"))]
    assert shown[0] == shown[1] != finished("", "help", home=tmp_path).stdout
