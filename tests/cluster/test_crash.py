"""A real controller, killed, with a disk that fails, copied while it works, in clocks that jump: nothing is lost.

What kills it is bench/crash.py; here are short rounds of it, and what a single life is enough for.
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
    PLAIN,
    Role,
    at_last,
    command,
    controller,
    environment,
    finished,
    started,
)

from orchard import fsck
from orchard.files import STATE_FILE
from orchard.storage.journal import Disk, Journal
from orchard.store import State, read_state

CRASH = Path(__file__).parent.parent.parent / "bench" / "crash.py"
LIBFAKETIME = (("/usr/lib", "*/faketime/libfaketimeMT.so.1"), ("/usr/lib", "faketime/libfaketimeMT.so.1"))


def crash(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CRASH, *arguments], capture_output=True, text=True, timeout=GENEROUS, check=False
    )


def needed(program: str, package: str) -> str:
    """Find a program; without it, the test fails and says what to do. Where there is none it is skipped."""
    if sys.platform != "linux":
        pytest.skip(f"{program} is for Linux")
    path = shutil.which(program)
    assert path is not None, f"this test needs {program}: apt-get install {package}"
    return path


# ---- killed --------------------------------------------------------------------------------------------------------


def test_what_was_acknowledged_survives_kills_at_random_moments() -> None:
    done = crash("--kills", "5")
    assert done.returncode == 0, done.stderr
    assert re.match(r"5 kills, [0-9]+ events, [0-9]+ reads, [1-9][0-9]+ writes; nothing was lost; seed", done.stdout)


def test_a_controller_that_answers_too_early_is_found_out() -> None:
    """Else the test above would prove nothing."""
    done = crash("--kills", "20", "--careless")
    assert done.returncode == 1
    assert re.search(r"and meanwhile:|were acknowledged", done.stderr), done.stderr
    shutil.rmtree(done.stderr.split()[-1])


def test_a_kill_at_each_renaming_of_a_run() -> None:
    needed("strace", "strace")
    done = crash("--sweep", "rename")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"rename: ([3-9]) kills\n\1 kills, nothing was lost\n", done.stdout), done.stdout


# ---- a disk that fails ---------------------------------------------------------------------------------------------


@contextmanager
def traced(home: Path, *options: str) -> Iterator[tuple[Role, str]]:
    """Run a controller under strace, and give its URL, too."""
    home.mkdir(exist_ok=True)
    log = home / "controller.log"
    trace = [needed("strace", "strace"), "-f", "-qq", "-o", "/dev/null", *options]
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [*trace, *command("controller", "--listen", "127.0.0.1:0", *PLAIN)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(home),
            start_new_session=True,  # strace and what it traces are killed together
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


@pytest.mark.parametrize("what", ["", "/events"])
def test_after_a_failed_fsync_nobody_is_told_that_it_went_well(tmp_path: Path, what: str) -> None:
    """Nor is it tried again: the controller says why it ends, and the next one has all that was acknowledged."""
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
    assert answers.count(503) >= 4, "those who waited were not told"
    path = r"events/\S+" if what else "state.jsonl"
    said = (
        rf"\norchard controller: cannot sync {tmp_path}/controller/{path}: Input/output error; what .* is uncertain\n"
    )
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
    """Creates VMs one after another, deletes every other one, and appends an event to each that stays."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__()
        self.name = name
        self.url = url
        self.stopped = threading.Event()
        self.told: list[tuple[str, str]] = []  # what was acknowledged, in order: (verb, VM)
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
    """Copy a directory in which files come and go, as `cp -r` does: what is gone meanwhile is passed over."""
    target.mkdir(mode=0o700)
    for entry in os.scandir(source):
        if entry.is_dir():
            copied(Path(entry), target / entry.name)
        else:
            try:
                shutil.copy(entry, target)
            except FileNotFoundError:
                continue


def test_each_copy_of_a_directory_at_work_is_a_backup(tmp_path: Path) -> None:
    launch = "import sys; from orchard.storage import engine; engine.COMPACT_BYTES, engine.COMPACT_RATIO = 20_000, 0\n"
    launch += "from orchard import controller; sys.exit(controller.main(sys.argv[1:]))"
    data = tmp_path / "controller"
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
            at_last(lambda: have_told(20 * (number + 1)))  # noqa: B023 -- it is called now
            before = [list(writer.told) for writer in writers]
            copied(data, tmp_path / f"copy{number}")
            copies.append((tmp_path / f"copy{number}", before))
            snapshots.add((data / STATE_FILE).stat().st_ino)
        for writer in writers:
            writer.stopped.set()
            writer.join(GENEROUS)
            assert not writer.failed
        assert role.stop() == 0
    assert len(snapshots) > 2, "no snapshot was written meanwhile"
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
    """Run a controller that writes snapshots all the time."""
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
    """A copy has what a writer was told before it began, and is what the writer's story was at some moment."""
    changes = [(verb, vm) for verb, vm in writer.told if verb != "append"]
    least = sum(verb != "append" for verb, _ in before)
    held = {name for name in state.vms if name.startswith(f"{writer.name}-")}
    assert held in [vms_after(changes[:count]) for count in range(least, len(changes) + 1)]
    for _, vm in (one for one in before if one[0] == "append"):
        journal = Journal(directory / "events" / f"{state.vms[vm].uid}.jsonl", Disk())
        _, (_, line) = journal.read()
        assert line["event"]["payload"] == vm


# ---- who may read it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_the_umask_is_no_matter(tmp_path: Path, umask: int) -> None:
    before = os.umask(0o022)
    (tmp_path / "home").mkdir()
    os.umask(umask)
    try:
        env = {"PYTHONDONTWRITEBYTECODE": "1"}
        with controller(*PLAIN, "--listen-ssh", "127.0.0.1:0", home=tmp_path / "home", env=env) as (role, url):
            assert call(url, "POST", "/v1/vms", {"name": "vm", "image": "any"})[0] == 200
            events = [{"kind": "log_line", "payload": "x", "timestamp": 1}]
            assert call(url, "POST", "/v1/vms/vm/events", events)[0] == 200
            assert role.stop() == 0
    finally:
        os.umask(before)
    directory = tmp_path / "home" / "controller"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.rglob("*")]}
    lock = modes.pop("controller.lock")  # in which there is no secret
    assert lock & 0o077 == 0
    assert len(modes) == 7
    assert all(mode == (0o700 if name in ("controller", "events") else 0o600) for name, mode in modes.items()), modes


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("access-token.key", 0o640, "can be read by others than its owner (mode 640); chmod 600 it"),
        ("controller.key", 0o604, "can be read by others than its owner (mode 604); chmod 600 it"),
        ("ssh_host_ed25519_key", 0o644, "can be read by others than its owner (mode 644); chmod 600 it"),
        ("state.jsonl", 0o644, "can be read by others than its owner (mode 644); chmod 600 it"),
        ("", 0o720, "can be written by others than its owner (mode 720); chmod 700 it"),
        ("", 0o1777, "can be written by others than its owner (mode 1777); chmod 700 it"),
    ],
)
def test_what_others_could_read_or_replace_is_refused(tmp_path: Path, name: str, mode: int, words: str) -> None:
    directory = tmp_path / "controller"
    directory.mkdir(mode=0o700)
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
    """Create a VM, wait until it runs, and give when the controller says that it was created."""
    created = call(url, "POST", "/v1/vms", {"name": name, "image": "any"})[1]["createdAt"]
    at_last(lambda: call(url, "GET", f"/v1/vms/{name}")[1]["status"] == "running")
    return datetime.datetime.fromisoformat(created).timestamp()


def test_a_clock_that_jumps_fails_nothing(tmp_path: Path) -> None:
    """The host's clock is set an hour forward, and two back: nobody is offline, nothing fails, and the data are good."""
    needed("faketime", "faketime")
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
    assert fsck.inspect(tmp_path / "controller").problems == []
    state = read_state(tmp_path / "controller" / STATE_FILE)
    assert set(state.vms) == {"first"}
