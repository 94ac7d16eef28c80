"""Disks for tests of durability: one that fails, one with little space, one that can be held up, one that loses power.

Each does what `Disk` does except for its own fault. None of them waits for a real fsync, which would only take time:
what a test sees of a file is what was written, and `CrashDisk` models what was synced.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from orchard.storage.journal import Disk

# File name -> content.
Image = dict[str, bytes]


class UnsyncedDisk(Disk):
    """A disk without fsyncs."""

    def sync(self, fd: int) -> None:
        pass

    def sync_directory(self, directory: Path) -> None:
        pass


class FailingDisk(UnsyncedDisk):
    """Before each call, asks `fault(verb, number of the call)` for the errno that it is to fail with, 0 for none.

    With `torn`, a write that fails has written the first half of its data.
    """

    def __init__(self, *, torn: bool = False) -> None:
        self.calls: list[str] = []
        self.fault: Callable[[str, int], int] = lambda verb, number: 0
        # The verbs of the calls that failed.
        self.failed: list[str] = []
        self._torn = torn

    def write(self, fd: int, data: memoryview) -> int:
        if error := self._next("write"):
            if self._torn:
                super().write(fd, data[: len(data) // 2])
            raise error
        return super().write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self._check("truncate")
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self._check("sync")

    def replace(self, source: Path, target: Path) -> None:
        self._check("replace")
        super().replace(source, target)

    def sync_directory(self, directory: Path) -> None:
        self._check("sync_directory")

    def _check(self, verb: str) -> None:
        if error := self._next(verb):
            raise error

    def _next(self, verb: str) -> OSError | None:
        code = self.fault(verb, len(self.calls))
        self.calls.append(verb)
        if not code:
            return None
        self.failed.append(verb)
        return OSError(code, os.strerror(code))


def fails_at(number: int, code: int) -> Callable[[str, int], int]:
    """Return a fault of one call alone."""
    return lambda verb, at: code if at == number else 0


def no_space(verb: str, number: int) -> int:
    """Be the fault of a full disk."""
    return errno.ENOSPC if verb == "write" else 0


class SmallDisk(UnsyncedDisk):
    """A disk on which the files of `directory` may have `room` bytes together."""

    def __init__(self, directory: Path, room: int) -> None:
        self.room = room
        # Writes that found no space.
        self.refused = 0
        self._directory = directory

    def free(self) -> int:
        return self.room - sum(path.stat().st_size for path in self._directory.rglob("*") if path.is_file())

    def write(self, fd: int, data: memoryview) -> int:
        free = self.free()
        if free <= 0 < len(data):
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data[:free])


class HeldDisk(UnsyncedDisk):
    """A disk whose syncs wait while it is `held`."""

    def __init__(self) -> None:
        self.syncs = 0
        self._open = threading.Event()
        self._open.set()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def sync(self, fd: int) -> None:
        self._open.wait()
        self.syncs += 1


class CrashDisk(UnsyncedDisk):
    """Calls `lost_power`, after every call, with each content that `directory` could have after a power cut then.

    Synced data is there. Of bytes that were appended since, any prefix may be there; of renamings since the directory
    was synced, all or none; a truncation may have happened or not.

    An exception in `faults` under the name of a sync is raised by it. After an OSError, the system takes bytes for
    written that are not, as Linux does: they can be read, and no later sync writes them to the disk.
    """

    def __init__(self, directory: Path, lost_power: Callable[[Image], None], *, every_byte: bool = False) -> None:
        self._directory = directory
        self._lost_power = lost_power
        self._every_byte = every_byte
        # Inode -> content that programs see, and content that is on the disk.
        self._written: dict[int, bytes] = {}
        self._synced: dict[int, bytes] = {}
        # File name -> inode, of names that are durable, and of names that were renamed since.
        self._names: dict[str, int] = {}
        self._renamed: dict[str, int] = {}
        # Inode -> begin and end of the bytes that never got to the disk.
        self._holes: dict[int, tuple[int, int]] = {}
        self.faults: dict[str, Exception] = {}
        self.renamings = 0
        for path in directory.iterdir():
            inode = path.stat().st_ino
            self._names[path.name] = inode
            self._written[inode] = self._synced[inode] = path.read_bytes()

    def write(self, fd: int, data: memoryview) -> int:
        status = os.fstat(fd)
        # A new file may have the inode of a deleted one.
        if status.st_size == 0:
            self._written[status.st_ino] = self._synced[status.st_ino] = b""
        count = super().write(fd, data)
        self._written[status.st_ino] += data[:count]
        self.cut_power()
        return count

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        inode = os.fstat(fd).st_ino
        self._written[inode] = self._written[inode][:size]
        if inode in self._holes and size <= self._holes[inode][0]:
            del self._holes[inode]
        self.cut_power()

    def sync(self, fd: int) -> None:
        inode = os.fstat(fd).st_ino
        written = self._written[inode]
        if fault := self.faults.get("sync"):
            if isinstance(fault, OSError):
                self._holes[inode] = (len(self._synced[inode]), len(written))
            raise fault
        begin, end = self._holes.get(inode, (0, 0))
        self._synced[inode] = written[:begin] + bytes(end - begin) + written[end:]
        self.cut_power()

    def replace(self, source: Path, target: Path) -> None:
        inode = source.stat().st_ino
        super().replace(source, target)
        self._renamed[target.name] = inode
        self.renamings += 1
        self.cut_power()

    def sync_directory(self, directory: Path) -> None:
        if fault := self.faults.get("sync_directory"):
            raise fault
        if directory == self._directory:
            self._names.update(self._renamed)
            self._renamed.clear()
        self.cut_power()

    def cut_power(self) -> None:
        """Report a power cut at this moment."""
        for names in [self._names, {**self._names, **self._renamed}] if self._renamed else [self._names]:
            for contents in itertools.product(*(self._contents(inode) for inode in names.values())):
                self._lost_power(dict(zip(names, contents, strict=True)))

    def _contents(self, inode: int) -> list[bytes]:
        synced, written = self._synced[inode], self._written[inode]
        if not written.startswith(synced):
            return [synced, written]
        extra = written[len(synced) :]
        if self._every_byte:
            ends = set(range(len(extra) + 1))
        else:
            newlines = [n for n, byte in enumerate(extra) if byte == ord("\n")]
            ends = {0, len(extra) // 2, len(extra), *newlines, *(n + 1 for n in newlines)}
        return [synced + extra[:end] for end in sorted(ends)]
