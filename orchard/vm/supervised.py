"""The VMs of a driver that runs them under supervisors (supervisor.py): their files, their leases, and their ends.

These files in the driver's directory outlive the worker, so the next worker finds the VMs by them:

    NAME.run, NAME.log   the record and the log of NAME's supervisor
    NAME.note            the worker's note about NAME
    NAME.lease           until when NAME may run, if it is leased

A supervisor holds a lock on the record for as long as it lives.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from orchard.base.files import make_private, write_private
from orchard.base.nursery import Wakeup
from orchard.vm import supervisor
from orchard.vm.driver import LEASE_OVER, DriverError, SupervisorLost
from orchard.vm.processes import KILL_SECONDS, LOOK_SECONDS, is_locked, reporting, signal_group, wait_unlocked

# Interval of checking whether a VM still runs, which takes an open, a flock, and a read of a small file.
_WATCH_SECONDS = 0.25  # seconds
# A supervisor that shows no sign of life for so long counts as gone.
_SILENCE_SECONDS = 10.0  # seconds
_WRITABLE_BY_OTHERS = 0o022
# A fixed length: the file is overwritten in place, which needs no space on a full disk.
_LEASE_FORMAT = b"%20.6f %20.6f\n"
# The suffixes of the files about a VM.
_KINDS = ("run", "log", "note", "note.new", "lease")
# The supervisor as a program: run by the Python at hand, without the user's site-packages, also from a zip archive.
_SUPERVISOR = (
    "-ISc",
    "import sys; sys.path.insert(0, sys.argv[1]); from orchard.vm import supervisor; sys.exit(supervisor.main(sys.argv[2:]))",
    str(Path(__file__).parent.parent.parent),
)
_OVER = (-math.inf, -math.inf)


@dataclass(slots=True)
class Record:
    """The contents of a record file. `status` is None while the VM runs, and stays None if the supervisor was killed.

    `supervisor` and `child` are process numbers, 0 until they are known; `child` is `tart run`. `status` is the exit
    status of `tart run`, or minus the number of the signal that killed it.
    """

    supervisor: int = 0
    child: int = 0
    status: int | None = None
    order: Literal["", "stop", "lease"] = ""


class SupervisedVMs:
    """The supervised VMs of one directory, which is made when it is first needed. All methods raise DriverError.

    A VM that has not shut down `stop_seconds` after it was asked to is killed by its supervisor.
    """

    def __init__(self, home: Path, stop_seconds: float) -> None:
        self._home = home
        self._stop_seconds = stop_seconds
        # Set when a VM has ended by an order of this driver, so that `wait_ended` sees it at once.
        self._ended = Wakeup()
        # The two times of `lease`, for VMs that will be run.
        self._lease = _OVER

    # -- files

    def _directory(self) -> Path:
        with reporting(f"cannot make the directory {self._home}"):
            make_private(self._home)
        return self._home

    def _file(self, name: str, kind: str) -> Path:
        if re.search("[/\0]", name):
            raise DriverError(f'the VM name is "{name}", expected one without a slash')
        return self._directory() / f"{name}.{kind}"

    def is_running(self, name: str) -> bool:
        """Return whether a supervisor of the VM lives."""
        path = self._file(name, "run")
        with reporting(f"cannot read {path}"):
            return is_locked(path)

    def running(self) -> list[str]:
        """Return the names of the VMs whose supervisors live."""
        with reporting(f"cannot read {self._home}"):
            return [path.stem for path in self._home.glob("*.run") if is_locked(path)]

    def record(self, name: str) -> Record:
        path = self._file(name, "run")
        with reporting(f"cannot read {path}"):
            return read_record(path)

    def log(self, name: str) -> bytes:
        """Return what the VM's process has printed, as far as it can be read."""
        with suppress(OSError):
            return self._file(name, "log").read_bytes()
        return b""

    def note(self, name: str, text: str) -> None:
        """As Driver.note."""
        path = self._file(name, "note")
        with reporting(f"cannot write {path}"):
            write_private(path, text.encode(), durable=False)

    def noted(self, name: str) -> str:
        """As Driver.noted."""
        with suppress(OSError):
            return self._file(name, "note").read_text()
        return ""

    def start_times(self) -> list[float]:
        """Return when the VMs that run were started, in seconds since 1970."""
        with reporting(f"cannot read {self._home}"):
            # The worker writes a VM's note before it starts the VM, and seldom later.
            notes = [self._file(name, "note") for name in self.running()]
            return [path.stat().st_mtime for path in notes if path.exists()]

    def forget(self, name: str) -> None:
        """Delete the files about a VM."""
        for kind in _KINDS:
            self._delete(self._file(name, kind))

    def _delete(self, path: Path) -> None:
        with reporting(f"cannot delete {path}"):
            path.unlink(missing_ok=True)

    def list_files(self) -> list[Path]:
        directory = self._directory()
        with reporting(f"cannot read {directory}"):
            return list(directory.iterdir())

    def forget_others(self, paths: Iterable[Path], names: Collection[str]) -> None:
        """Delete those of some files that are about a VM which does not run and is none of `names`."""
        for path in paths:
            name, _, kind = path.name.removesuffix(".new").rpartition(".")
            if kind in _KINDS and name not in names and not self.is_running(name):
                self._delete(path)

    # -- leases

    def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
        """As Driver.lease."""
        self._lease = (soft, hard)
        failure: DriverError | None = None
        for name in names:
            # A VM whose lease has expired is being ended, and the controller may have started it elsewhere.
            if supervisor.clock() < self._read_lease(name)[0]:
                try:
                    self._write_lease(name)
                except DriverError as error:
                    failure = error
        if failure is not None:
            raise failure

    def _read_lease(self, name: str) -> tuple[float, float]:
        """Return the two times of a VM's lease; for a VM without a lease, times in the past."""
        with suppress(OSError, ValueError):
            return supervisor.read_lease(self._file(name, "lease"))
        return _OVER

    def _write_lease(self, name: str) -> None:
        path = self._file(name, "lease")
        with reporting(f"cannot write {path}"):
            write_lease(path, *self._lease)

    # -- start and end

    def begin(self, name: str, *, leased: bool) -> list[str]:
        """Prepare the files of a VM that is to run. Return its supervisor's command, to which the VM's own is appended."""
        lease = str(self._file(name, "lease")) if leased else ""
        if lease:
            self._write_lease(name)
        with suppress(OSError):
            os.utime(self._file(name, "note"))
        files = [str(self._file(name, "run")), str(self._file(name, "log")), lease]
        return [sys.executable, *_SUPERVISOR, *files, f"{self._stop_seconds:g}"]

    async def wait_ended(self, name: str) -> tuple[Record, DriverError]:
        """Wait until a VM's supervisor has ended. Return its last record, and the error if that has no exit status.

        A supervisor that does not answer, or does not end its VM at the end of the lease, is killed with the VM.
        Without an exit status it was killed, or its record is damaged, and the VM may run.
        """
        path = self._file(name, "run")
        silence = _Silence(path)
        is_killed = False
        error: DriverError = SupervisorLost("the supervisor of the VM was killed")
        while (record := self._final_record(name)) is None:
            with trio.move_on_after(_WATCH_SECONDS):
                await self._ended.wait()
            # The supervisor ends the VM at the end of its lease, unless it was stopped.
            if (is_over := self._is_overdue(name)) or silence.is_too_long():
                lost = SupervisorLost("the supervisor of the VM did not answer, and was killed with the VM")
                with suppress(DriverError):
                    if self._signal(name, signal.SIGKILL):
                        error = DriverError(LEASE_OVER) if is_over else lost
                        is_killed = True
        if is_killed and record.status == -signal.SIGKILL:
            # The supervisor has still seen the VM end.
            record.status = None
        if not record.supervisor:
            error = SupervisorLost(f"the supervisor of the VM has ended, and its record {path} is damaged")
        return record, error

    def _final_record(self, name: str) -> Record | None:
        """Return the record of a VM whose supervisor has ended.

        None while the supervisor lives, and when that is unknown because the worker has no file descriptor left.
        """
        with suppress(DriverError):
            if not self.is_running(name):
                return self.record(name)
        return None

    def _is_overdue(self, name: str) -> bool:
        """Return whether a VM should have ended with its lease: never for a VM without a lease."""
        hard = self._read_lease(name)[1]
        return hard != -math.inf and supervisor.clock() >= hard

    async def order_stop(self, name: str) -> bool:
        """Tell a VM's supervisor to end the VM. Return False if no supervisor lives, or its record is damaged."""
        with trio.move_on_after(KILL_SECONDS):
            while self.is_running(name):
                if self._signal(name, signal.SIGTERM):
                    return True
                # A supervisor that has just started has not written its number yet.
                await trio.sleep(LOOK_SECONDS)
        return False

    async def wait_order(self, name: str, seconds: float) -> None:
        """Wait until a VM that was told to end has ended. Kills it and raises if that takes longer than `seconds`."""
        path = self._file(name, "run")
        with reporting(f"cannot read {path}"):
            has_ended = await wait_unlocked(path, seconds)
        if not has_ended:
            is_killed = self._signal(name, signal.SIGKILL)
            outcome = "was killed" if is_killed else f"cannot be killed: {path} does not name its supervisor"
            raise DriverError(f"VM {name} did not end within {seconds:g} seconds and {outcome}")
        self._ended.set()

    def kill_unsupervised(self, name: str) -> None:
        """Kill the processes of a VM whose supervisor was killed."""
        if not self.is_running(name):
            _kill(self.record(name))

    def _signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a VM's supervisor, and SIGKILL also to the VM.

        Return False if the supervisor has ended, or its record does not name it.
        """
        record = self.record(name)
        if not record.supervisor or not self.is_running(name):
            return False
        if number == signal.SIGKILL:
            _kill(record)
        # The supervisor held its lock after the record was read, so the number is still its own.
        with suppress(ProcessLookupError):
            os.kill(record.supervisor, number)
        return True


class _Silence:
    """Notices a supervisor that has stopped showing signs of life: new modification times of its record."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._last: int | None = None
        self._looks = 0

    def is_too_long(self) -> bool:
        """Look once; to be called every _WATCH_SECONDS. Return whether the silence has lasted for too long.

        Counts looks instead of time, because a machine that was stalled stalls both processes.
        """
        with suppress(OSError):
            beat = self._record.stat().st_mtime_ns
            if beat != self._last:
                self._last, self._looks = beat, 0
        self._looks += 1
        return self._looks * _WATCH_SECONDS >= _SILENCE_SECONDS


def _kill(record: Record) -> None:
    """Kill the VM of a supervisor that was killed, or is about to be.

    A process number that was given to another process is recognised: the VM is in the supervisor's session.
    """
    with suppress(ProcessLookupError):
        if record.child and os.getsid(record.child) == record.supervisor:
            signal_group(record.child)


# ---- record and lease -----------------------------------------------------------------------------------------------


def read_record(path: Path) -> Record:
    """Read a record. Return an empty one if the file is missing or incomplete. Raises OSError.

    Signals are sent to the numbers in a record. So a record that another user could have written counts as empty, and
    so does one whose numbers cannot be those of a supervisor and its child.
    """
    with suppress(FileNotFoundError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, encoding="ascii") as file:
            about = os.fstat(descriptor)
            if about.st_uid != os.geteuid() or about.st_mode & _WRITABLE_BY_OTHERS:
                return Record()
            words = file.read(2 * supervisor.RECORD_BYTES).split()
        first, second, *rest = words
        numbers = int(first), int(second)
        # 0 and negative numbers would mean whole process groups, and 1 is the system's first process.
        if min(numbers) > 1:
            match rest:
                case []:
                    return Record(*numbers)
                case [status]:
                    return Record(*numbers, int(status))
                case [status, "stop" | "lease" as order]:
                    return Record(*numbers, int(status), order)
    return Record()


def write_lease(path: Path, soft: float, hard: float) -> None:
    """Let a VM run until `soft`, when it is asked to end, and `hard`, when it is killed.

    Both are times of `supervisor.clock()`. Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, _LEASE_FORMAT % (soft, hard), 0)
    finally:
        os.close(descriptor)
