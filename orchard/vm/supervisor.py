"""The process that watches over one VM, and outlives its worker. Law: a process; the standard library, nothing of ours.

`tart run` *is* the VM, so whoever starts it decides what else can end it. A guard starts it in a session of its own,
out of reach of the worker's terminal, its crash and its upgrade, and stays until it has ended:

    record   the guard's and its child's process numbers, and in the end how it ended; locked as long as the guard lives
    log      what `tart run` prints
    lease    until when a VM may run that could be started elsewhere; the worker renews it, for all VMs of the host

The lock on the record is how others know that the VM runs: unlike a process number it can't be anybody else's, and it
ends with the process, however that ends. (Who looks has it for an instant, too, so a guard tries again.) The record has
its room from the start, so that a disk that gets full leaves no VM without one.

SIGTERM asks the guard to end the VM: SIGINT to `tart run`, as `tart stop` sends it, and SIGKILL to its process group
when it takes too long.

A VM with a lease is ended in the same way when the lease runs out. So a VM does not run on a host that is cut off from
its controller, even when the worker has crashed there or stands still, and the controller may start it elsewhere.
Leases are in seconds of a clock that nobody sets and that goes on while the machine sleeps.

The worker starts a guard as a program (`main`) that returns when the VM's process is there, with what is wrong on stderr
if it is not. The other functions are for the worker: to read a record, and to write the lease.
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

TYPE_CHECKING = False  # to import it from typing would take as long as all else that happens here
if TYPE_CHECKING:  # a VM waits while its guard starts: what is not needed for that is not imported (./run bench life)
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Literal, NoReturn

    Order = Literal["", "stop", "lease"]

LOOK_SECONDS = 1.0  # between two looks at the lease; a renewal that comes late is seen in time all the same
LOG_BYTES = 1024 * 1024  # of output that is kept; then the log begins anew
MAX_COMPLAINT = 4096  # bytes
RECORD_BYTES = 64  # three numbers and a word
LOCK_TRIES, LOCK_PAUSE = 500, 0.01  # seconds; who only looks has the lock for microseconds
NEVER = (math.inf, math.inf)
REFUSED, DIED = 1, 2  # exit status: no VM was started; or nobody knows
EXPIRED = "this host has been cut off from its controller for too long to start a VM that could run elsewhere"
# What Python ignores, or this process does, and a program expects to find as usual.
_ORDINARY = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP)
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # on macOS, the monotonic one counts sleep, too
_UP = b"\0"  # what a guard says when the VM's process is there
_LEASE = b"%20.6f %20.6f\n"  # of one length: it is written over, which needs no room on a full disk


class Record:
    """What a guard has written down. `status` is None while the VM runs, and for ever if the guard was killed."""

    __slots__ = ("child", "guard", "order", "status")

    def __init__(self, guard: int = 0, child: int = 0, status: int | None = None, order: Order = "") -> None:
        self.guard = guard  # process number; 0: not yet
        self.child = child
        self.status = status  # exit status of `tart run`, or minus the number of the signal that killed it
        self.order = order  # what made the guard end the VM, if it was the guard

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and all(getattr(self, each) == getattr(other, each) for each in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Record({self.guard}, {self.child}, {self.status}, {self.order!r})"


def clock() -> float:
    """Give the seconds of the clock that leases are in."""
    return time.clock_gettime(_CLOCK)


# ---- for the worker ------------------------------------------------------------------------------------------------


def is_locked(path: Path) -> bool:
    """Whether a process lives that has locked a file. Raises OSError."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # who only looks is not in the way of others
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def read(path: Path) -> Record:
    """Read a record. Raises OSError."""
    with suppress(FileNotFoundError, ValueError):
        with open(path, encoding="ascii") as file:
            words = file.read().split()
        match words:
            case [guard, child]:
                return Record(int(guard), int(child))
            case [guard, child, status]:
                return Record(int(guard), int(child), int(status))
            case [guard, child, status, "stop" | "lease" as order]:
                return Record(int(guard), int(child), int(status), order)
    return Record()


def write_lease(path: Path, soft: float, hard: float) -> None:
    """Let the VMs of a host run until `soft`, when they are asked to end, and `hard`, when they are killed.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, _LEASE % (soft, hard), 0)
    finally:
        os.close(descriptor)


def read_lease(path: Path | str) -> tuple[float, float]:
    """Give both times of a lease. Raises OSError, ValueError."""
    with open(path, "rb") as file:
        soft, hard = file.read().split()
    return float(soft), float(hard)


# ---- the process ---------------------------------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """Start a guard for `RECORD LOG LEASE PATIENCE COMMAND...`, where LEASE may be empty. Give the exit status."""
    record_path, log_path, lease_path, patience, *command = words
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        record = os.open(record_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _lock(record):
            return _complain("the VM is already running")
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.ftruncate(record, 0)
        os.pwrite(record, b"\n" * RECORD_BYTES, 0)
    except OSError as error:
        return _complain(f"cannot write {error.filename or record_path}: {error.strerror}")
    lease = _Lease(lease_path)
    if clock() >= lease.look()[0]:
        return _complain(EXPIRED)
    heard, told = os.pipe()
    if not os.fork():
        _guard(record, log, lease, float(patience), command, told)
    os.close(told)
    answer = os.read(heard, MAX_COMPLAINT)
    if not answer:
        return _complain("the guard of the VM has died", DIED)
    return 0 if answer == _UP else _complain(answer.decode("utf-8", "replace"))


def _complain(text: str, status: int = REFUSED) -> int:
    print(text, file=sys.stderr)
    return status


def _lock(record: int) -> bool:
    """Lock a record, unless another guard has it. Raises OSError."""
    for _ in range(LOCK_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        try:
            fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as who only looks can, too, but not beside a guard
        except BlockingIOError:
            return False
        fcntl.flock(record, fcntl.LOCK_UN)
        time.sleep(LOCK_PAUSE)
    return False


def _guard(record: int, log: int, lease: _Lease, patience: float, command: Sequence[str], told: int) -> NoReturn:
    """Be the guard; `told` is the pipe to whoever waits to hear that the VM's process is there."""
    os.setsid()
    os.chdir("/")
    os.closerange(3, record)  # what was there before: the lock by which the worker knows that the start is under way
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    wake = _heed_signals()
    try:
        child = os.posix_spawn(command[0], list(command), os.environ, setpgroup=0, setsigdef=_ORDINARY)
    except OSError as error:
        os.write(told, f"cannot run {command[0]}: {error.strerror}".encode())
        os._exit(1)
    try:
        os.write(record, b"%d %d\n" % (os.getpid(), child))
    except OSError as error:
        os.killpg(child, signal.SIGKILL)  # nobody else could end it
        os.write(told, f"cannot write the record of the VM: {error.strerror}".encode())
        os._exit(1)
    os.write(told, _UP)
    os.close(told)
    status, order = _watch(child, lease, patience, wake)
    os.write(record, f"{status} {order}\n".encode())
    os._exit(0)


_ordered = False  # by SIGTERM


def _heed_signals() -> int:
    """Take note of orders and of the child's end; give the descriptor that can be read when there is news."""

    def order(number: int, frame: object) -> None:
        global _ordered
        _ordered = True

    wake, news = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(news, False)
    signal.set_wakeup_fd(news, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, order)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return wake


def _watch(child: int, lease: _Lease, patience: float, wake: int) -> tuple[int, Order]:
    """Wait for the child's end, and end it when that is due. Give its status, and what it was ended for."""
    order: Order = ""
    kill_at = math.inf
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), order
        now = clock()
        soft, hard = lease.look()
        if not order and (_ordered or now >= soft):
            order = "stop" if _ordered else "lease"
            kill_at = now + patience
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGINT)
        if now >= min(kill_at, hard):
            order = order or "lease"
            with suppress(ProcessLookupError, PermissionError):  # only the dead are left in it (macOS: not permitted)
                os.killpg(child, signal.SIGKILL)
        if os.fstat(1).st_size > LOG_BYTES:
            os.ftruncate(1, 0)
        next_at = min(at for at in (now + LOOK_SECONDS, soft, hard, kill_at) if at > now)
        select.select([wake], [], [], next_at - now)
        with suppress(BlockingIOError):
            os.read(wake, 1024)


class _Lease:
    """What is known of the lease in a file ("": it never ends). One that was never read is over."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._until = (-math.inf, -math.inf) if path else NEVER

    def look(self) -> tuple[float, float]:
        if self._path:
            with suppress(OSError, ValueError):
                self._until = read_lease(self._path)
        return self._until


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
