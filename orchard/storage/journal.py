"""Checked lines on disk. Law: files and bytes, synchronous, no nouns; store.py runs it in a thread.

A file is a sequence of JSON objects, one a line, that a person can read with `less` and a program with `jq`:

    {"sum":"6f1c...","format":"orchard-state","version":1,...}
    {"sum":"09ab...","after":5,"revision":8,"changes":[...]}

`sum` is BLAKE2b over the previous line's sum and the rest of this line, so a line that was altered, moved, repeated
or taken out is found, wherever it stands. Only the last line may be unfinished (no newline): that is what a crash in
the middle of an append leaves, nobody was told of it, and it is cut off. Everything else stops the start.

What may go wrong in an append is one of two things. The bytes did not get into the file (`NotWritten`): the file is
cut back to where it was, and the next append may succeed. Or nobody knows what the disk holds (`Broken`): after a
failed fsync the system may have dropped the pages and will say "fine" the next time, so nothing can be appended any
more, and only a restart that reads the file again tells what is there. Nor does a file that can be read lie on the disk:
what a process wrote that was killed before its fsync is synced by who reads it next (`make_durable`), and what an
fsync failed for is cut off, so that nobody takes the system's memory of it for the disk.

A full disk must not keep anybody from making room on it, and that takes a few lines. So a `Reserve` holds some room
from the beginning, as a file of its own, and gives it back bit by bit to who has to write then. Preallocating room in
the file itself would be nicer and is no portable operation.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchard.files import draft_of, sync_directory, sync_file

SUM_BYTES = 8  # of the digest: 2**-64 for a damaged line to pass
_START = re.compile(rb'\{"sum":"([0-9a-f]{%d})",' % (2 * SUM_BYTES))
_LINE = re.compile(rb'\{"sum":"([0-9a-f]{%d})",(.*\})' % (2 * SUM_BYTES), re.DOTALL)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
RESERVE_STEP = 64 * 1024  # bytes given back beyond what is asked for: file systems count in blocks, and write trees
LAST_WORDS = 0.5  # seconds from the answers to those who waited for a write that broke to the end of the process


class DamagedError(Exception):
    """A file does not hold what was written. str() names file, offset and what to do."""

    def __init__(self, path: Path, offset: int, what: str, remedy: str = "") -> None:
        self.path = path
        self.offset = offset
        self.what = what
        remedy = remedy or "restore the data directory from a backup, or cut the file there and lose what follows"
        super().__init__(f"{path}: {what} at byte {offset}; {remedy}")


class NotWritten(Exception):  # noqa: N818 -- it states what is the case; nothing is broken
    """An append did not happen, and the file is as it was. `no_room`: for want of space."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"cannot write {path}: {os.strerror(error.errno or 0)}")
        self.no_room = error.errno in _NO_ROOM


class Broken(Exception):  # noqa: N818 -- likewise
    """Nobody knows what of an append is on the disk; only reading it again at a new start tells."""

    def __init__(self, path: Path, action: str, error: OSError) -> None:
        super().__init__(f"cannot {action} {path}: {os.strerror(error.errno or 0)}; what is on the disk is uncertain")


class Disk:
    """The system calls by which anything becomes durable, in one place so that tests can make them fail."""

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        sync_file(fd)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)  # noqa: PTH105 -- beside its sisters

    def sync_directory(self, directory: Path) -> None:
        sync_directory(directory)


class Journal:
    """A file of checked lines, open for appending after `load` or `create`. Not thread-safe; `close` it."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        self.size = 0  # bytes of it that hold complete lines
        self.unfinished = 0  # bytes behind them, as they were read: what a crash has left
        self._disk = disk
        self._sum = b""  # of the last line
        self._fd = -1
        self._broken: Broken | None = None

    def load(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read and check the file; give (byte offset, object) for each complete line, and remove what a crash left.

        To be read to the end before anything is appended, and to be made durable before anybody is told of it. Raises
        DamagedError; FileNotFoundError.
        """
        yield from self.read()
        draft_of(self.path).unlink(missing_ok=True)
        self._open()
        if os.fstat(self._fd).st_size > self.size:
            self._disk.truncate(self._fd, self.size)

    def make_durable(self) -> None:
        """Have on the disk what was loaded: of what a killed process wrote it may be in the system's memory alone.

        Raises Broken.
        """
        try:
            self._disk.sync(self._fd)
            self._disk.sync_directory(self.path.parent)
        except OSError as error:
            self._broken = Broken(self.path, "sync", error)
            raise self._broken from error

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Give what `load` gives, and change nothing on the disk."""
        self.size, self.unfinished, self._sum = 0, 0, b""
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._check_unfinished(line)
                    self.unfinished = len(line)
                    return
                yield self.size, self._check(line[:-1])
                self.size += len(line)

    def _check(self, line: bytes) -> dict[str, Any]:
        match = _LINE.fullmatch(line)
        if match is None:
            raise DamagedError(self.path, self.size, "this is no line with a checksum")
        found, rest = match.groups()
        if found != chain(self._sum, rest):
            raise DamagedError(self.path, self.size, "the checksum does not fit the line and the one before it")
        self._sum = found
        value: dict[str, Any] = json.loads("{" + rest.decode())  # of bytes it would find out the encoding each time
        return value

    def _check_unfinished(self, tail: bytes) -> None:
        # A whole line whose newline has become another byte was acknowledged: damage, not a crash in an append.
        match = _START.match(tail)
        if match is None:
            return
        digest = hashlib.blake2b(self._sum, digest_size=SUM_BYTES)
        at = match.end()
        while end := tail.find(b"}", at, -1) + 1:
            digest.update(tail[at:end])
            if digest.hexdigest().encode() == match[1]:
                raise DamagedError(self.path, self.size + end, "a newline was expected")
            at = end

    def create(self, objects: Iterable[bytes]) -> None:
        """Write a new file in place of the old one, if any: complete and durable, or not there at all.

        Each of `objects` is a JSON object on one line. Raises NotWritten when the old file is untouched, else Broken.
        """
        draft = draft_of(self.path)
        fresh = Journal(draft, self._disk)
        try:
            draft.unlink(missing_ok=True)
            fresh._fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.fchmod(fresh._fd, 0o600)  # whatever the umask
            fresh._write(objects)
            self._disk.sync(fresh._fd)
            self._disk.replace(draft, self.path)
        except OSError as error:
            fresh.close()
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise NotWritten(self.path, error) from error
        self.close()
        self._fd, self.size, self._sum = fresh._fd, fresh.size, fresh._sum
        try:
            self._disk.sync_directory(self.path.parent)
        except OSError as error:
            self._broken = Broken(self.path, "make durable the renaming of", error)
            raise self._broken from error

    def append(self, objects: Iterable[bytes]) -> None:
        """Append JSON objects, and return when they are durable. Raises NotWritten or Broken."""
        if self._broken is not None:
            raise self._broken
        before = self.size
        try:
            if self._fd < 0:
                self._open()
            self._write(objects)
        except OSError as error:
            self._cut_back()
            raise NotWritten(self.path, error) from error
        try:
            self._disk.sync(self._fd)
        except OSError as error:
            # The system may keep in memory, as if it were written, what never got to the disk. The next start must not
            # find it there.
            with contextlib.suppress(OSError):
                self._disk.truncate(self._fd, before)
            self._broken = Broken(self.path, "sync", error)
            raise self._broken from error

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _write(self, objects: Iterable[bytes]) -> None:
        lines = []
        last = self._sum
        for text in objects:
            rest = text[1:]
            last = chain(last, rest)
            lines.append(b'{"sum":"%b",%b\n' % (last, rest))
        data = memoryview(b"".join(lines))
        size = self.size + len(data)
        while data:
            data = data[self._disk.write(self._fd, data) :]
        self.size, self._sum = size, last

    def _cut_back(self) -> None:
        if self._fd < 0:
            return
        # Synced, because a crash could bring back lines that somebody was told are not there.
        try:
            self._disk.truncate(self._fd, self.size)
            self._disk.sync(self._fd)
        except OSError as error:
            self._broken = Broken(self.path, "take back an unfinished write to", error)
            raise self._broken from error

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Reserve:
    """Room on a disk, held by a file of `size` bytes at `path`. No file stays open. Not thread-safe."""

    def __init__(self, path: Path, size: int, disk: Disk) -> None:
        self.path = path
        self.size = size
        self._disk = disk

    def fill(self) -> None:
        """Take what is missing of the room. Raises NotWritten when there is less; what there is, is held."""
        try:
            with self._opened(os.O_CREAT) as fd:
                os.fchmod(fd, 0o600)
                missing = self.size - os.fstat(fd).st_size
                data = memoryview(os.urandom(max(0, missing)))  # nothing that a file system could compress
                while data:
                    data = data[self._disk.write(fd, data) :]
        except OSError as error:
            raise NotWritten(self.path, error) from error

    def give(self, size: int) -> bool:
        """Give back room for `size` bytes, or what there is; False when there is none left."""
        try:
            with self._opened() as fd:
                held = os.fstat(fd).st_size
                self._disk.truncate(fd, max(0, held - size - RESERVE_STEP))
                self._disk.sync(fd)  # some file systems use blocks again only after that
        except OSError:
            return False
        return held > 0

    @contextlib.contextmanager
    def _opened(self, flags: int = 0) -> Iterator[int]:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)


def chain(last: bytes, rest: bytes) -> bytes:
    """Give the sum of a line: over the sum of the line before it (empty for the first) and the rest of this one."""
    return hashlib.blake2b(last + rest, digest_size=SUM_BYTES).hexdigest().encode()
