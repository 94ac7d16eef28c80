"""The supervisor: the process that runs one VM and outlives the worker.

`tart run` *is* the VM, so its parent decides what else can end it. A supervisor starts `tart run` in a session of its
own, where the worker's terminal, crash and upgrade do not reach it, and lives until the VM has ended. It uses three
files:

    record   the process numbers of supervisor and VM, and at the end the exit status; locked while the supervisor lives
    log      the output of `tart run`
    lease    until when a leased VM may run; each VM has its own, which the worker renews

The lock on the record tells others that the VM runs. Unlike a process number, it cannot belong to another process, and
it ends with the process in every case. (A checker takes the same lock for a moment, so the supervisor retries.) The
record has its full size from the start, so that a full disk cannot keep the exit status out of it.

SIGTERM asks the supervisor to end the VM: it sends SIGINT to `tart run`, as `tart stop` does, and later SIGKILL to the
VM's process group.

The supervisor sets the modification time of the record every BEAT_SECONDS, so that the worker can tell a supervisor
that was stopped (SIGSTOP) from one that works.

The supervisor ends a leased VM in the same way when the lease expires. So no leased VM runs on a host that is cut off
from its controller, even if the worker there has crashed or hangs, and the controller can start the VM elsewhere. Lease
times are in seconds of a clock that cannot be set and that goes on while the machine sleeps.

The worker starts a supervisor as a program (`main`). The program returns when the VM's process exists, or says on
stderr why it does not. The worker's side of the three files is in supervised.py.

A VM waits while its supervisor starts, so this module imports only what that needs (`./run bench life` measures it).
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import signal
import sys
import time
from contextlib import suppress

# Importing `typing` would take as long as everything else that happens here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Literal, NoReturn

    # What made the supervisor end the VM, or "": the last word of the record.
    Order = Literal["", "stop", "lease"]

# Interval of signs of life and of reading the lease. At expiry the lease is read once more, so a late renewal counts.
BEAT_SECONDS = 1.0  # seconds
# A longer log is truncated to nothing.
LOG_BYTES = 1024 * 1024  # bytes
# The longest message of a failed start.
_MESSAGE_BYTES = 4096  # bytes
# Enough for three numbers and a word.
RECORD_BYTES = 64  # bytes
# A checker holds the lock for microseconds.
_LOCK_TRIES = 500
_LOCK_PAUSE = 0.01  # seconds
# Exit statuses: no VM was started; it is unknown whether one was.
REFUSED, DIED = 1, 2
EXPIRED = "this host has been cut off from its controller for too long to start a VM that could run elsewhere"
NEVER = (math.inf, math.inf)
# Signals that Python or this process ignores and that a program expects in their default state.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP)
# On macOS the monotonic clock counts sleep, too.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# The supervisor's answer to the starting program when the VM's process exists.
_UP = b"\0"


def clock() -> float:
    """Return the time of the clock that leases use, in seconds."""
    return time.clock_gettime(_CLOCK)


def read_lease(path: Path | str) -> tuple[float, float]:
    """Return the two times of a lease. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        soft, hard = file.read().split()
    return float(soft), float(hard)


# ---- the process ---------------------------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """Start a supervisor for `RECORD LOG LEASE PATIENCE COMMAND...`, and return the exit status of this program.

    LEASE is the path of the lease file, or empty for a VM without a lease. PATIENCE is in seconds, from the request to
    end the VM until it is killed.
    """
    record_path, log_path, lease_path, patience, *command = words
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        record = os.open(record_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _lock(record):
            return _fail("the VM is already running")
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.ftruncate(record, 0)
        os.pwrite(record, b"\n" * RECORD_BYTES, 0)
    except OSError as error:
        return _fail(f"cannot write {error.filename or record_path}: {error.strerror}")
    lease = _Lease(lease_path)
    if clock() >= lease.read()[0]:
        return _fail(EXPIRED)
    answer_end, supervisor_end = os.pipe()
    if not os.fork():
        _supervise(record, log, lease, float(patience), command, supervisor_end)
    os.close(supervisor_end)
    answer = os.read(answer_end, _MESSAGE_BYTES)
    if not answer:
        return _fail("the supervisor of the VM has died", DIED)
    return 0 if answer == _UP else _fail(answer.decode("utf-8", "replace"))


def _fail(text: str, status: int = REFUSED) -> int:
    print(text, file=sys.stderr)
    return status


def _lock(record: int) -> bool:
    """Lock a record; return False if another supervisor holds it. Raises OSError."""
    for _ in range(_LOCK_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        # A shared lock is refused only while a supervisor has the exclusive one; a checker has a shared one itself.
        try:
            fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(record, fcntl.LOCK_UN)
        time.sleep(_LOCK_PAUSE)
    return False


def _supervise(record: int, log: int, lease: _Lease, patience: float, command: Sequence[str], answer: int) -> NoReturn:
    """Be the supervisor. Write to the pipe `answer` that the VM's process exists, or why it does not."""
    os.setsid()
    os.chdir("/")
    # Close what was inherited. That includes the lock which tells the next worker that the start is under way.
    os.closerange(3, record)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    wake = _handle_signals()
    try:
        child = os.posix_spawn(command[0], list(command), os.environ, setpgroup=0, setsigdef=_DEFAULT_SIGNALS)
    except OSError as error:
        os.write(answer, f"cannot run {command[0]}: {error.strerror}".encode())
        os._exit(1)
    numbers = b"%d %d\n" % (os.getpid(), child)
    try:
        os.pwrite(record, numbers, 0)
    except OSError as error:
        # Without a record no other process could end the VM.
        os.killpg(child, signal.SIGKILL)
        os.write(answer, f"cannot write the record of the VM: {error.strerror}".encode())
        os._exit(1)
    os.write(answer, _UP)
    os.close(answer)
    status, order = _watch(child, lease, patience, wake, record)
    # As a whole: another program may have damaged it.
    os.pwrite(record, (numbers + f"{status} {order}\n".encode()).ljust(RECORD_BYTES, b"\n"), 0)
    os.ftruncate(record, RECORD_BYTES)
    os._exit(0)


# Whether SIGTERM has come.
_stop_requested = False


def _handle_signals() -> int:
    """Handle SIGTERM and the child's end, ignore the rest; return a descriptor that is readable after each signal."""

    def request_stop(number: int, frame: object) -> None:
        global _stop_requested
        _stop_requested = True

    wake, signalled = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return wake


def _watch(child: int, lease: _Lease, patience: float, wake: int, record: int) -> tuple[int, Order]:
    """Wait until the child has ended, and end it when that is due. Return its status, and why it was ended."""
    order: Order = ""
    kill_at = math.inf
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), order
        now = clock()
        soft, hard = lease.read()
        if not order and (_stop_requested or now >= soft):
            order = "stop" if _stop_requested else "lease"
            kill_at = now + patience
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGINT)
        if now >= min(kill_at, hard):
            order = order or "lease"
            # macOS says "not permitted" when only zombies are left in the group.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
        with suppress(OSError):
            os.utime(record)
        if os.fstat(1).st_size > LOG_BYTES:
            os.ftruncate(1, 0)
        next_at = min(at for at in (now + BEAT_SECONDS, soft, hard, kill_at) if at > now)
        select.select([wake], [], [], next_at - now)
        with suppress(BlockingIOError):
            os.read(wake, 1024)


class _Lease:
    """The times in a lease file, as last read. An empty path is a lease that never ends; an unread one has expired."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._times = (-math.inf, -math.inf) if path else NEVER

    def read(self) -> tuple[float, float]:
        if self._path:
            with suppress(OSError, ValueError):
                self._times = read_lease(self._path)
        return self._times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
