"""The guard of a VM, as the program that it is: what it writes down, what ends it and its VM, and what does not.

The VM is any program that the test has it run.
"""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness.processes import GENEROUS, eventually, processes_in

from orchard.vm import supervisor
from orchard.vm.processes import is_locked
from orchard.vm.supervisor import EXPIRED, LOG_BYTES, RECORD_BYTES, Record

LONG = 1e6  # seconds
# Guests: all say when they are up; one ends when it is asked to, one says so only, and leaves a child in its group.
POLITE = "import signal, sys; signal.signal(2, lambda *_: sys.exit(7)); print('up', flush=True); signal.pause()"
STUBBORN = """
import os, signal
signal.signal(2, lambda *_: print("asked", flush=True))
os.fork() and print("up", flush=True)
while True:
    signal.pause()
"""


class Guarded:
    """A guard and its files."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path, self.log, self.lease = home / "vm.run", home / "vm.log", home / "lease"

    def words(self, *command: str, patience: float = LONG, leased: bool = False) -> list[str]:
        lease = str(self.lease) if leased else ""
        return [
            sys.executable,
            "-IS",
            supervisor.__file__,
            str(self.path),
            str(self.log),
            lease,
            str(patience),
            *command,
        ]

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "GUARDED": str(self.home)}  # by which its processes are found

    def tried(self, *command: str, patience: float = LONG, leased: bool = False, room: int = -1) -> tuple[int, str]:
        """Start a guard, and give the exit status and what it complains of. `room`: how long a file may get.

        Returns only when nobody holds the pipes any more. What Python ignores is left to be ignored.
        """
        done = subprocess.run(
            self.words(*command, patience=patience, leased=leased),
            capture_output=True,
            text=True,
            env=self.environ,
            timeout=GENEROUS,
            check=False,
            restore_signals=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    def start(self, *command: str, patience: float = LONG, leased: bool = False, room: int = -1) -> None:
        assert self.tried(*command, patience=patience, leased=leased, room=room) == (0, "")

    async def start_guest(self, code: str, *, patience: float = LONG, leased: bool = False) -> Record:
        self.start(sys.executable, "-ISc", code, patience=patience, leased=leased)
        await eventually(lambda: "up\n" in self.log.read_text())
        return supervisor.read_record(self.path)

    def lend(self, soft: float, hard: float) -> None:
        """Write a lease that ends in so many seconds, and have the guard look at it."""
        supervisor.write_lease(self.lease, supervisor.clock() + soft, supervisor.clock() + hard)
        if number := supervisor.read_record(self.path).supervisor:
            os.kill(number, signal.SIGCHLD)

    async def ended(self) -> Record:
        """Wait for the end of the guard; its VM has ended then."""
        await eventually(lambda: not is_locked(self.path))
        await eventually(lambda: processes_in(self.home) == [])  # those that were killed with it are going
        return supervisor.read_record(self.path)

    def runs(self) -> bool:
        record = supervisor.read_record(self.path)
        return is_locked(self.path) and record.status is None and Path(f"/proc/{record.child}").exists()

    async def has_looked(self) -> None:
        """Wake the guard, and wait until it sleeps again."""
        number = supervisor.read_record(self.path).supervisor
        for _ in range(2):  # the first one may find it awake
            before = sleeps(number)
            os.kill(number, signal.SIGCHLD)
            await eventually(lambda: sleeps(number) > before)  # noqa: B023 -- called in this round


def sleeps(number: int) -> int:
    """How often a process has gone to sleep."""
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{number}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    yield Guarded(tmp_path)
    for number in processes_in(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


# ---- what it writes down -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -2 $$", -2)])
async def test_a_record_says_who_runs_and_how_it_ended(guarded: Guarded, last: str, status: int) -> None:
    assert supervisor.read_record(guarded.path) == Record()
    assert not is_locked(guarded.path)
    fifo = guarded.home / "fifo"
    os.mkfifo(fifo)
    go = os.open(fifo, os.O_RDWR)
    guarded.start("/bin/sh", "-c", f"echo begins; read line < {fifo}; echo ends >&2; {last}")
    running = supervisor.read_record(guarded.path)
    assert running == Record(running.supervisor, running.child)
    assert guarded.runs()
    # Out of reach of whoever started it: a session of its own, a group for the VM, and no directory kept busy.
    assert (
        os.getsid(running.supervisor)
        == os.getsid(running.child)
        == os.getpgid(running.supervisor)
        == running.supervisor
    )
    assert os.getpgid(running.child) == running.child
    assert Path(f"/proc/{running.supervisor}/cwd").readlink() == Path("/")
    os.write(go, b"\n")
    os.close(go)
    assert await guarded.ended() == Record(running.supervisor, running.child, status)
    assert guarded.log.read_text() == "begins\nends\n"
    assert guarded.path.stat().st_mode & 0o777 == guarded.log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "12", "12 x", "12 13 x", "12 13 0 else", "1 2 3 stop 5", "\0" * 64, "é"])
def test_what_is_no_record_is_none_yet(tmp_path: Path, content: str) -> None:
    (tmp_path / "vm.run").write_text(content)
    assert supervisor.read_record(tmp_path / "vm.run") == Record()


async def test_the_next_run_begins_with_nothing_of_the_last(guarded: Guarded) -> None:
    await guarded.start_guest(POLITE)
    os.kill(supervisor.read_record(guarded.path).supervisor, signal.SIGTERM)
    first = await guarded.ended()
    guarded.start("/bin/true")
    second = await guarded.ended()
    assert (first.status, first.order) == (7, "stop")
    assert (second.status, second.order) == (0, "")
    assert first.supervisor != second.supervisor
    assert guarded.log.read_bytes() == b""


async def test_a_log_begins_anew_when_it_is_too_long(guarded: Guarded) -> None:
    much = f"import os, signal; signal.signal(10, lambda *_: os.write(1, b'x' * {LOG_BYTES + 1})); "
    record = await guarded.start_guest(much + POLITE.replace("sys.exit(7)", "print('more')") + "; signal.pause()")
    os.kill(record.child, signal.SIGUSR1)
    await eventually(lambda: guarded.log.stat().st_size == 0)
    await guarded.has_looked()
    assert guarded.runs()
    os.kill(record.child, signal.SIGINT)
    await guarded.ended()
    assert guarded.log.read_text() == "more\n"


def test_no_vm_runs_without_room_for_its_record(guarded: Guarded) -> None:
    assert guarded.tried("/bin/sleep", "1000", room=0) == (1, f"cannot write {guarded.path}: File too large\n")
    assert processes_in(guarded.home) == []


async def test_a_record_needs_no_more_room_than_it_has_from_the_start(guarded: Guarded) -> None:
    guarded.start("/bin/sh", "-c", "exit 3", room=RECORD_BYTES)
    assert (await guarded.ended()).status == 3
    assert guarded.path.stat().st_size == RECORD_BYTES


# ---- how it starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "reason"), [("/none/tart", "No such file or directory"), ("/etc/passwd", "Permission denied")]
)
async def test_a_program_that_cannot_be_run_is_named(guarded: Guarded, program: str, reason: str) -> None:
    assert guarded.tried(program, "run", "vm") == (1, f"cannot run {program}: {reason}\n")
    assert await guarded.ended() == Record()


@pytest.mark.parametrize("which", ["path", "log"])
def test_a_file_that_cannot_be_written_is_named(guarded: Guarded, which: str) -> None:
    path: Path = getattr(guarded, which)
    path.mkdir()
    assert guarded.tried("/bin/sleep", "1000") == (1, f"cannot write {path}: Is a directory\n")
    assert processes_in(guarded.home) == []


async def test_one_vm_has_one_guard(guarded: Guarded) -> None:
    record = await guarded.start_guest(POLITE)
    assert guarded.tried("/bin/true") == (1, "the VM is already running\n")
    assert supervisor.read_record(guarded.path) == record
    assert guarded.log.read_text() == "up\n"
    assert guarded.runs()


async def test_who_only_looks_is_in_nobodys_way(guarded: Guarded) -> None:
    guarded.path.touch()
    with guarded.path.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        starting = subprocess.Popen(  # noqa: ASYNC220 -- it only has to be started
            guarded.words("/bin/sleep", "1000"), stderr=subprocess.PIPE, text=True, env=guarded.environ
        )
        fds = Path(f"/proc/{starting.pid}/fd")
        await eventually(lambda: any(is_link_to(fd, guarded.path) for fd in fds.iterdir()))
    _, complaint = starting.communicate(timeout=GENEROUS)
    assert (starting.returncode, complaint) == (0, "")
    assert guarded.runs()


def is_link_to(link: Path, target: Path) -> bool:
    with suppress(OSError):  # closed meanwhile
        return link.readlink() == target
    return False


async def test_the_lock_of_whoever_starts_it_ends_with_the_start(guarded: Guarded) -> None:
    starting = guarded.home / "starting"
    with starting.open("xb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["/bin/sh", "-c", 'exec "$@" 3<&0 </dev/null', "sh", *guarded.words("/bin/sleep", "1000")]
        subprocess.run(words, stdin=lock, env=guarded.environ, check=True)  # noqa: ASYNC221 -- it ends soon
    assert guarded.runs()
    await eventually(lambda: not is_locked(starting))


async def test_a_vm_finds_signals_and_descriptors_as_usual(guarded: Guarded) -> None:
    guarded.start("/bin/sh", "-c", "ls -l /proc/self/fd; exec cat /proc/self/status")
    await guarded.ended()
    said = guarded.log.read_text()
    masks = {name: int(mask, 16) for name, mask in re.findall(r"^Sig(Ign|Blk):\s*(\w+)", said, re.MULTILINE)}
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        assert not (masks["Ign"] | masks["Blk"]) & 1 << number - 1, number
    opened = dict(re.findall(r"(\d+) -> (.*)", said))
    assert opened.pop("0") == os.devnull
    assert opened.pop("1") == opened.pop("2") == str(guarded.log)
    assert len(opened) <= 1, "of ls itself"


# ---- what ends a VM, and what does not -----------------------------------------------------------------------------


async def test_an_order_asks_the_vm_and_waits(guarded: Guarded) -> None:
    record = await guarded.start_guest(POLITE)
    os.kill(record.supervisor, signal.SIGTERM)
    assert await guarded.ended() == Record(record.supervisor, record.child, 7, "stop")


async def test_a_vm_that_does_not_heed_an_order_is_killed_with_all_that_is_its_own(guarded: Guarded) -> None:
    record = await guarded.start_guest(STUBBORN, patience=0.3)
    assert len(processes_in(guarded.home)) == 3
    os.kill(record.supervisor, signal.SIGTERM)
    assert await guarded.ended() == Record(record.supervisor, record.child, -9, "stop")
    assert guarded.log.read_text() == "up\nasked\n"


async def test_patience_is_patience(guarded: Guarded) -> None:
    record = await guarded.start_guest(STUBBORN)
    os.kill(record.supervisor, signal.SIGTERM)
    await eventually(lambda: "asked" in guarded.log.read_text())
    os.kill(record.supervisor, signal.SIGTERM)
    await guarded.has_looked()
    assert guarded.runs()
    assert guarded.log.read_text() == "up\nasked\n", "it is asked once"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGCHLD])
async def test_no_other_signal_ends_a_guard(guarded: Guarded, number: signal.Signals) -> None:
    record = await guarded.start_guest(POLITE)
    os.kill(record.supervisor, number)
    await guarded.has_looked()
    assert guarded.runs()


async def test_a_guard_that_is_killed_leaves_the_lock_and_the_vm(guarded: Guarded) -> None:
    record = await guarded.start_guest(POLITE)
    os.kill(record.supervisor, signal.SIGKILL)
    await eventually(lambda: not is_locked(guarded.path))
    assert supervisor.read_record(guarded.path) == record
    assert processes_in(guarded.home) == [record.child]


# ---- leases --------------------------------------------------------------------------------------------------------


async def test_a_lease_that_runs_out_asks_the_vm_and_waits(guarded: Guarded) -> None:
    guarded.lend(LONG, LONG)
    record = await guarded.start_guest(POLITE, leased=True)
    guarded.lend(0.1, LONG)
    assert await guarded.ended() == Record(record.supervisor, record.child, 7, "lease")


async def test_a_vm_that_does_not_heed_its_lease_is_killed_whatever_the_patience(guarded: Guarded) -> None:
    guarded.lend(LONG, LONG)
    record = await guarded.start_guest(STUBBORN, leased=True)
    guarded.lend(0.0, LONG)
    await eventually(lambda: "asked" in guarded.log.read_text())
    assert guarded.runs()
    guarded.lend(-1.0, 0.0)
    assert await guarded.ended() == Record(record.supervisor, record.child, -9, "lease")
    assert guarded.log.read_text() == "up\nasked\n"


async def test_a_vm_that_is_asked_by_its_lease_has_no_more_than_the_patience(guarded: Guarded) -> None:
    guarded.lend(LONG, LONG)
    record = await guarded.start_guest(STUBBORN, leased=True, patience=0.3)
    guarded.lend(0.0, LONG)
    assert await guarded.ended() == Record(record.supervisor, record.child, -9, "lease")


async def test_an_order_stays_one_when_the_lease_ends_too(guarded: Guarded) -> None:
    guarded.lend(LONG, LONG)
    record = await guarded.start_guest(STUBBORN, leased=True)
    os.kill(record.supervisor, signal.SIGTERM)
    await eventually(lambda: "asked" in guarded.log.read_text())
    guarded.lend(0.0, 0.0)
    assert await guarded.ended() == Record(record.supervisor, record.child, -9, "stop")
    assert guarded.log.read_text() == "up\nasked\n"


async def test_a_lease_that_cannot_be_read_stays_as_it_was_known(guarded: Guarded) -> None:
    guarded.lend(LONG, LONG)
    record = await guarded.start_guest(POLITE, leased=True)
    for content in (b"", b"12.5", b"x y", b"1 2 3", b"\xff\xfe", b"\0" * 42):
        guarded.lease.write_bytes(content)
        await guarded.has_looked()
        assert guarded.runs(), content
    guarded.lease.unlink()
    await guarded.has_looked()
    assert guarded.runs()
    guarded.lease.mkdir()
    await guarded.has_looked()
    assert guarded.runs()
    guarded.lease.rmdir()
    guarded.lend(0.0, LONG)
    assert await guarded.ended() == Record(record.supervisor, record.child, 7, "lease")


async def test_a_lease_that_cannot_be_read_any_more_ends_when_it_was_to(guarded: Guarded) -> None:
    guarded.lend(LONG, LONG)
    await guarded.start_guest(POLITE, leased=True)
    guarded.lend(0.5, LONG)
    await guarded.has_looked()
    guarded.lease.unlink()
    assert (await guarded.ended()).order == "lease"


@pytest.mark.parametrize("content", [None, b"", b"torn", b"0.0 9e9"])
def test_no_vm_starts_without_a_lease_that_lasts(guarded: Guarded, content: bytes | None) -> None:
    if content is not None:
        guarded.lease.write_bytes(content)
    assert guarded.tried("/bin/sleep", "1000", leased=True) == (1, EXPIRED + "\n")
    assert processes_in(guarded.home) == []
    assert not is_locked(guarded.path)


def test_a_lease_is_read_as_it_was_written(tmp_path: Path) -> None:
    for times in ((1.5, 2.25), (-3.0, 123456789.5), supervisor.NEVER, (0.0, 0.0)):
        supervisor.write_lease(tmp_path / "lease", *times)
        assert supervisor.read_lease(tmp_path / "lease") == times
    assert (tmp_path / "lease").stat().st_mode & 0o777 == 0o600


def test_the_clock_counts_from_the_boot_with_sleep() -> None:
    def uptime() -> float:
        return float(Path("/proc/uptime").read_text().split()[0])  # cut to hundredths

    before = uptime()
    assert before <= supervisor.clock() <= uptime() + 0.01
