"""The supervisor of a VM, run as a program: its files, how it starts, and what ends it and its VM.

In the place of `tart run` is any program.
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
from functools import partial
from pathlib import Path

import pytest
from harness.processes import GENEROUS, eventually, processes_in

from orchard.vm import supervised, supervisor
from orchard.vm.processes import is_locked
from orchard.vm.supervised import Record
from orchard.vm.supervisor import EXPIRED, LOG_BYTES, RECORD_BYTES

LONG = 1e6  # seconds
# Lease times that are tried in turn, in seconds: the first is long enough unless the machine is very busy.
ATTEMPTS = (0.5, 4.0, 30.0)
# Guests print "up" when they can be asked to end. POLITE ends then; STUBBORN only prints "asked", and has a child in its
# process group. Both wait for a blocked signal: with a handler, a signal just before a wait could get lost.
POLITE = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {2})
print("up", flush=True)
signal.sigwait({2})
sys.exit(7)
"""
STUBBORN = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {2})
os.fork() and print("up", flush=True)
while True:
    signal.sigwait({2})
    print("asked", flush=True)
"""
# Prints more than a log may hold at SIGUSR1, and ends at SIGINT.
TALKATIVE = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {2, 10})
print("up", flush=True)
signal.sigwait({10})
os.write(1, b"x" * SIZE)
signal.sigwait({2})
print("more", flush=True)
"""


class Supervised:
    """A supervisor and its files."""

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
        # By this variable `processes_in` finds the processes.
        return {**os.environ, "SUPERVISED": str(self.home)}

    def try_start(
        self, *command: str, patience: float = LONG, leased: bool = False, file_size: int = -1
    ) -> tuple[int, str]:
        """Start a supervisor; return the exit status and stderr. `file_size` limits the size of files, in bytes.

        Returns when no process holds the pipes any more. Signals that Python ignores are left ignored.
        """
        done = subprocess.run(
            self.words(*command, patience=patience, leased=leased),
            capture_output=True,
            text=True,
            env=self.environ,
            timeout=GENEROUS,
            check=False,
            restore_signals=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size)),
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    def start(self, *command: str, patience: float = LONG, leased: bool = False, file_size: int = -1) -> None:
        assert self.try_start(*command, patience=patience, leased=leased, file_size=file_size) == (0, "")

    async def start_guest(self, code: str, *, patience: float = LONG, leased: bool = False) -> Record:
        self.start(sys.executable, "-ISc", code, patience=patience, leased=leased)
        await eventually(lambda: "up\n" in self.log.read_text())
        return supervised.read_record(self.path)

    def lend(self, soft: float, hard: float) -> None:
        """Set the lease to end in so many seconds, and wake the supervisor."""
        supervised.write_lease(self.lease, supervisor.clock() + soft, supervisor.clock() + hard)
        if number := supervised.read_record(self.path).supervisor:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGCHLD)

    async def wait_ended(self) -> Record:
        """Wait for the end of the supervisor and its VM; return the final record."""
        await eventually(lambda: not is_locked(self.path))
        # Killed processes take a moment to end.
        await eventually(lambda: processes_in(self.home) == [])
        return supervised.read_record(self.path)

    def runs(self) -> bool:
        record = supervised.read_record(self.path)
        return is_locked(self.path) and record.status is None and Path(f"/proc/{record.child}").exists()

    async def wait_looked(self) -> None:
        """Wake the supervisor, and wait until it sleeps again. Raises OSError if it ends meanwhile."""
        number = supervised.read_record(self.path).supervisor
        # Twice, because the first signal may find it awake.
        for _ in range(2):
            before = sleeps(number)
            os.kill(number, signal.SIGCHLD)
            await eventually(partial(self._has_slept, number, before))

    @staticmethod
    def _has_slept(number: int, before: int) -> bool:
        return sleeps(number) > before


def sleeps(number: int) -> int:
    """Return how often a process has gone to sleep. Raises OSError if it has ended."""
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{number}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Supervised]:
    yield Supervised(tmp_path)
    for number in processes_in(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


# ---- record and log -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -2 $$", -2)])
async def test_record_has_process_numbers_and_exit_status(vm: Supervised, last: str, status: int) -> None:
    assert supervised.read_record(vm.path) == Record()
    assert not is_locked(vm.path)
    fifo = vm.home / "fifo"
    os.mkfifo(fifo)
    go = os.open(fifo, os.O_RDWR)
    vm.start("/bin/sh", "-c", f"echo begins; read line < {fifo}; echo ends >&2; {last}")
    running = supervised.read_record(vm.path)
    assert running == Record(running.supervisor, running.child)
    assert vm.runs()
    # A session of its own, a group for the VM, and no directory that is kept in use.
    assert (
        os.getsid(running.supervisor)
        == os.getsid(running.child)
        == os.getpgid(running.supervisor)
        == running.supervisor
    )
    assert os.getpgid(running.child) == running.child
    assert Path(f"/proc/{running.supervisor}/cwd").readlink() == Path("/")
    os.write(go, b"\n")
    assert await vm.wait_ended() == Record(running.supervisor, running.child, status)
    # Only now: the line would be lost if the shell had not opened the pipe yet.
    os.close(go)
    assert vm.log.read_text() == "begins\nends\n"
    assert vm.path.stat().st_mode & 0o777 == vm.log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "12", "12 x", "12 13 x", "12 13 0 else", "1 2 3 stop 5", "\0" * 64, "é"])
def test_incomplete_record_is_read_as_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "vm.run").write_text(content)
    assert supervised.read_record(tmp_path / "vm.run") == Record()


@pytest.mark.parametrize("content", ["1 13\n", "12 1\n", "0 13\n", "-12 13\n", "12 -1\n", "1 1\n0 stop\n"])
def test_record_with_numbers_of_no_supervisor_is_read_as_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "vm.run").write_text(content)
    assert supervised.read_record(tmp_path / "vm.run") == Record()


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_record_that_others_can_write_is_read_as_empty(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "vm.run"
    path.write_text("12 13\n")
    path.chmod(mode)
    assert supervised.read_record(path) == Record()
    path.chmod(0o644)
    assert supervised.read_record(path) == Record(12, 13)


def test_record_of_another_user_is_read_as_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm.run").write_text("12 13\n")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert supervised.read_record(tmp_path / "vm.run") == Record()


# An upgraded worker adopts VMs whose supervisors are of the version before.
@pytest.mark.parametrize(
    ("content", "record"),
    [
        ("12 13\n", Record(12, 13)),
        ("12 13\n0 \n\n\n", Record(12, 13, 0)),
        ("12 13\n-9 stop\n", Record(12, 13, -9, "stop")),
        ("12 13\n7 lease\n\n", Record(12, 13, 7, "lease")),
    ],
)
def test_record_format_is_stable(tmp_path: Path, content: str, record: Record) -> None:
    (tmp_path / "vm.run").write_text(content)
    assert supervised.read_record(tmp_path / "vm.run") == record


async def test_next_run_replaces_record_and_log(vm: Supervised) -> None:
    await vm.start_guest(POLITE)
    os.kill(supervised.read_record(vm.path).supervisor, signal.SIGTERM)
    first = await vm.wait_ended()
    vm.start("/bin/true")
    second = await vm.wait_ended()
    assert (first.status, first.order) == (7, "stop")
    assert (second.status, second.order) == (0, "")
    assert first.supervisor != second.supervisor
    assert vm.log.read_bytes() == b""


async def test_log_is_truncated_when_it_is_too_long(vm: Supervised) -> None:
    record = await vm.start_guest(TALKATIVE.replace("SIZE", str(LOG_BYTES + 1)))
    os.kill(record.child, signal.SIGUSR1)
    await eventually(lambda: vm.log.stat().st_size > LOG_BYTES or vm.log.stat().st_size == 0)
    await vm.wait_looked()
    assert vm.log.stat().st_size == 0
    assert vm.runs()
    os.kill(record.child, signal.SIGINT)
    await vm.wait_ended()
    assert vm.log.read_text() == "more\n"


def test_vm_is_not_started_when_its_record_does_not_fit(vm: Supervised) -> None:
    assert vm.try_start("/bin/sleep", "1000", file_size=0) == (1, f"cannot write {vm.path}: File too large\n")
    assert processes_in(vm.home) == []


async def test_record_does_not_grow(vm: Supervised) -> None:
    vm.start("/bin/sh", "-c", "exit 3", file_size=RECORD_BYTES)
    assert (await vm.wait_ended()).status == 3
    assert vm.path.stat().st_size == RECORD_BYTES


# ---- how it starts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "reason"), [("/none/tart", "No such file or directory"), ("/etc/passwd", "Permission denied")]
)
async def test_program_that_can_not_be_run_is_named(vm: Supervised, program: str, reason: str) -> None:
    assert vm.try_start(program, "run", "vm") == (1, f"cannot run {program}: {reason}\n")
    assert await vm.wait_ended() == Record()


@pytest.mark.parametrize("which", ["path", "log"])
def test_file_that_can_not_be_written_is_named(vm: Supervised, which: str) -> None:
    path: Path = getattr(vm, which)
    path.mkdir()
    assert vm.try_start("/bin/sleep", "1000") == (1, f"cannot write {path}: Is a directory\n")
    assert processes_in(vm.home) == []


async def test_second_supervisor_of_a_vm_is_refused(vm: Supervised) -> None:
    record = await vm.start_guest(POLITE)
    assert vm.try_start("/bin/true") == (1, "the VM is already running\n")
    assert supervised.read_record(vm.path) == record
    assert vm.log.read_text() == "up\n"
    assert vm.runs()


async def test_lock_check_does_not_fail_a_start(vm: Supervised) -> None:
    vm.path.touch()
    with vm.path.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        starting = subprocess.Popen(  # noqa: ASYNC220
            vm.words("/bin/sleep", "1000"), stderr=subprocess.PIPE, text=True, env=vm.environ
        )
        fds = Path(f"/proc/{starting.pid}/fd")
        await eventually(lambda: any(is_link_to(fd, vm.path) for fd in fds.iterdir()))
    _, complaint = starting.communicate(timeout=GENEROUS)
    assert (starting.returncode, complaint) == (0, "")
    assert vm.runs()


def is_link_to(link: Path, target: Path) -> bool:
    # It may be closed meanwhile.
    with suppress(OSError):
        return link.readlink() == target
    return False


async def test_supervisor_does_not_inherit_the_lock_of_its_start(vm: Supervised) -> None:
    starting = vm.home / "starting"
    with starting.open("xb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = ["/bin/sh", "-c", 'exec "$@" 3<&0 </dev/null', "sh", *vm.words("/bin/sleep", "1000")]
        subprocess.run(words, stdin=lock, env=vm.environ, check=True)  # noqa: ASYNC221
    assert vm.runs()
    await eventually(lambda: not is_locked(starting))


async def test_vm_has_default_signals_and_no_inherited_descriptors(vm: Supervised) -> None:
    vm.start("/bin/sh", "-c", "ls -l /proc/self/fd; exec cat /proc/self/status")
    await vm.wait_ended()
    said = vm.log.read_text()
    masks = {name: int(mask, 16) for name, mask in re.findall(r"^Sig(Ign|Blk):\s*(\w+)", said, re.MULTILINE)}
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
        assert not (masks["Ign"] | masks["Blk"]) & 1 << number - 1, number
    opened = dict(re.findall(r"(\d+) -> (.*)", said))
    assert opened.pop("0") == os.devnull
    assert opened.pop("1") == opened.pop("2") == str(vm.log)
    assert len(opened) <= 1, "only the one with which ls reads the directory"


# ---- what ends a VM, and what does not -----------------------------------------------------------------------------


async def test_sigterm_interrupts_the_vm_and_waits(vm: Supervised) -> None:
    record = await vm.start_guest(POLITE)
    os.kill(record.supervisor, signal.SIGTERM)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, 7, "stop")


async def test_vm_that_ignores_the_interrupt_is_killed_with_its_group(vm: Supervised) -> None:
    record = await vm.start_guest(STUBBORN, patience=0.3)
    assert len(processes_in(vm.home)) == 3
    os.kill(record.supervisor, signal.SIGTERM)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, -9, "stop")


async def test_vm_is_interrupted_once_and_not_killed_before_the_patience_ends(vm: Supervised) -> None:
    record = await vm.start_guest(STUBBORN)
    os.kill(record.supervisor, signal.SIGTERM)
    await eventually(lambda: "asked" in vm.log.read_text())
    os.kill(record.supervisor, signal.SIGTERM)
    await vm.wait_looked()
    assert vm.runs()
    assert vm.log.read_text() == "up\nasked\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGCHLD])
async def test_other_signals_do_not_end_a_supervisor(vm: Supervised, number: signal.Signals) -> None:
    record = await vm.start_guest(POLITE)
    os.kill(record.supervisor, number)
    await vm.wait_looked()
    assert vm.runs()


async def test_killed_supervisor_releases_its_lock_and_leaves_the_vm(vm: Supervised) -> None:
    record = await vm.start_guest(POLITE)
    os.kill(record.supervisor, signal.SIGKILL)
    await eventually(lambda: not is_locked(vm.path))
    assert supervised.read_record(vm.path) == record
    assert processes_in(vm.home) == [record.child]


# ---- leases --------------------------------------------------------------------------------------------------------


async def test_expired_lease_interrupts_the_vm_and_waits(vm: Supervised) -> None:
    vm.lend(LONG, LONG)
    record = await vm.start_guest(POLITE, leased=True)
    vm.lend(0.1, LONG)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, 7, "lease")


async def test_vm_is_killed_at_the_hard_end_of_its_lease_before_the_patience_ends(vm: Supervised) -> None:
    vm.lend(LONG, LONG)
    record = await vm.start_guest(STUBBORN, leased=True)
    vm.lend(0.0, LONG)
    await eventually(lambda: "asked" in vm.log.read_text())
    assert vm.runs()
    vm.lend(-1.0, 0.0)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, -9, "lease")
    assert vm.log.read_text() == "up\nasked\n"


async def test_vm_is_killed_after_the_patience_before_the_hard_end_of_its_lease(vm: Supervised) -> None:
    vm.lend(LONG, LONG)
    record = await vm.start_guest(STUBBORN, leased=True, patience=0.3)
    vm.lend(0.0, LONG)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, -9, "lease")


async def test_stop_before_the_end_of_the_lease_is_recorded_as_stop(vm: Supervised) -> None:
    vm.lend(LONG, LONG)
    record = await vm.start_guest(STUBBORN, leased=True)
    os.kill(record.supervisor, signal.SIGTERM)
    await eventually(lambda: "asked" in vm.log.read_text())
    vm.lend(0.0, 0.0)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, -9, "stop")
    assert vm.log.read_text() == "up\nasked\n"


async def test_unreadable_lease_file_does_not_change_the_lease(vm: Supervised) -> None:
    vm.lend(LONG, LONG)
    record = await vm.start_guest(POLITE, leased=True)
    for content in (b"", b"12.5", b"x y", b"1 2 3", b"\xff\xfe", b"\0" * 42):
        vm.lease.write_bytes(content)
        await vm.wait_looked()
        assert vm.runs(), content
    vm.lease.unlink()
    await vm.wait_looked()
    assert vm.runs()
    vm.lease.mkdir()
    await vm.wait_looked()
    assert vm.runs()
    vm.lease.rmdir()
    vm.lend(0.0, LONG)
    assert await vm.wait_ended() == Record(record.supervisor, record.child, 7, "lease")


async def test_deleted_lease_file_expires_at_the_time_last_read(vm: Supervised) -> None:
    async def deleted_in_time(seconds: float) -> bool:
        vm.lend(LONG, LONG)
        await vm.start_guest(POLITE, leased=True)
        until = supervisor.clock() + seconds
        vm.lend(seconds, LONG)
        await vm.wait_looked()
        vm.lease.unlink()
        return supervisor.clock() < until

    for seconds in ATTEMPTS:
        in_time = False
        # On a busy machine the lease may expire before its file is deleted.
        with suppress(OSError):
            in_time = await deleted_in_time(seconds)
        assert (await vm.wait_ended()).order == "lease"
        if in_time:
            return
    raise AssertionError(f"deleting the lease took longer than {ATTEMPTS[-1]:g} seconds")


@pytest.mark.parametrize("content", [None, b"", b"torn", b"0.0 9e9"])
def test_leased_vm_is_not_started_without_a_valid_lease(vm: Supervised, content: bytes | None) -> None:
    if content is not None:
        vm.lease.write_bytes(content)
    assert vm.try_start("/bin/sleep", "1000", leased=True) == (1, EXPIRED + "\n")
    assert processes_in(vm.home) == []
    assert not is_locked(vm.path)


def test_written_lease_is_read_back(tmp_path: Path) -> None:
    for times in ((1.5, 2.25), (-3.0, 123456789.5), supervisor.NEVER, (0.0, 0.0)):
        supervised.write_lease(tmp_path / "lease", *times)
        assert supervisor.read_lease(tmp_path / "lease") == times
    assert (tmp_path / "lease").stat().st_mode & 0o777 == 0o600


def test_clock_counts_seconds_since_boot() -> None:
    def uptime() -> float:
        # In hundredths of a second, rounded down.
        return float(Path("/proc/uptime").read_text().split()[0])

    before = uptime()
    assert before <= supervisor.clock() <= uptime() + 0.01
