"""Append-only files of checked lines, and the reserve of disk space that keeps them writable on a full disk.

What the lines mean is decided elsewhere: state_file.py writes the state, event_file.py the events of VMs. Everything
here is synchronous, for a thread.

A file is a sequence of JSON objects, one a line, for `less` and `jq`:

    {"sum":"6f1c...","format":"orchard-state","version":1,...}
    {"sum":"09ab...","after":5,"revision":8,"changes":[...]}

`sum` is BLAKE2b over the sum of the previous line and the rest of this line. So an altered, moved, repeated or removed
line is found anywhere in the file. Only the last line may be unfinished (without a newline): a crash during an append
leaves it, its append was not acknowledged, and the next start cuts it off. Any other damage stops the start.

An append fails in one of two ways. With `NotWrittenError` the bytes did not get into the file; the file is truncated to
its previous size, and the next append may succeed. With `BrokenError` it is not known what the disk holds: after a
failed fsync the system may drop the written pages and report success the next time. So nothing more is appended, and
only a restart, which reads the file again, shows what is there.

Readable data may still be only in the page cache. So a start syncs what it read (`sync`), and data whose fsync failed
is truncated.

A full disk must not prevent deletions, which free space, and they need a few lines of journal. So `Reserve` is a file
that holds some space and gives it back in parts. Preallocating the space in the journal itself is not portable.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from orchard.base.files import draft_of, sync_directory, sync_file
from orchard.codec import load_json
from orchard.storage.errors import BrokenError, BrokenFileError, DamagedError, NotWrittenError

# Bytes of the digest. A damaged line passes with a probability of 2**-64.
_SUM_BYTES = 8
_START = re.compile(rb'\{"sum":"([0-9a-f]{%d})",' % (2 * _SUM_BYTES))
_LINE = re.compile(rb'\{"sum":"([0-9a-f]{%d})",(.*\})' % (2 * _SUM_BYTES), re.DOTALL)
# Bytes that the reserve gives back beyond what is asked for: file systems allocate blocks and write metadata.
RESERVE_STEP = 64 * 1024
# Seconds between the answers to the callers of a write that broke a file, and the end of the process.
BROKEN_DELAY = 0.5

# A line that was read: its byte offset and its JSON object without the sum.
Line = tuple[int, dict[str, Any]]


class Disk:
    """The system calls that make data durable. Tests replace them to make them fail."""

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        sync_file(fd)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)

    def sync_directory(self, directory: Path) -> None:
        sync_directory(directory)


class Journal:
    """A file of checked lines. Not thread-safe; the user closes it.

    An existing file is taken over in two steps: `read` to its end, which changes nothing, and `open_for_append`. A new
    file, or one that replaces the old, is written by `create`. Before either, `append` raises RuntimeError.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self.path = path
        # Bytes of complete lines, and bytes of an unfinished line that was read after them.
        self.size = 0
        self.unfinished = 0
        self._disk = disk
        self._last_sum = b""
        self._fd = -1
        self._phase: Literal["unread", "read", "open"] = "unread"
        self._broken: BrokenError | None = None

    def read(self) -> Iterator[Line]:
        """As `read_texts`, with each object parsed."""
        for offset, text in self.read_texts():
            yield offset, load_json(text)

    def read_after(self, header: Mapping[str, Any]) -> Iterator[Line]:
        """As `read`, without the first line, which must have the values of `header`: format, version, and maybe a uid.

        Raises DamagedError; FileNotFoundError.
        """
        lines = self.read()
        _, found = next(lines, (0, None))
        if found is None:
            raise DamagedError(self.path, 0, "the file has no header")
        if any(found.get(name) != value for name, value in header.items()):
            owner = f" for uid {header['uid']}" if "uid" in header else ""
            what = f"the header is not that of {header['format']} version {header['version']}{owner}"
            raise DamagedError(self.path, 0, what)
        yield from lines

    def read_texts(self) -> Iterator[tuple[int, bytes]]:
        """Read and check the file without changing it; yield the byte offset and the JSON of each complete line.

        Raises DamagedError; FileNotFoundError.
        """
        self.size, self.unfinished, self._last_sum, self._phase = 0, 0, b"", "unread"
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    self._check_unfinished(line)
                    self.unfinished = len(line)
                    break
                yield self.size, self._check(line[:-1])
                self.size += len(line)
        self._phase = "read"

    def open_for_append(self) -> None:
        """Cut off the unfinished line that `read` found, and open the file for appending.

        Call `sync` before anything that was read is shown to a user. Raises OSError; RuntimeError when the file was not
        read to its end.
        """
        if self._phase == "unread":
            raise RuntimeError(f"{self.path} was not read to its end, so its last checksum is unknown")
        draft_of(self.path).unlink(missing_ok=True)
        self._open()
        if os.fstat(self._fd).st_size > self.size:
            self._disk.truncate(self._fd, self.size)
        self._phase = "open"

    def sync(self) -> None:
        """Make what was read durable: a killed process may have left it in the page cache only. Raises BrokenError."""
        try:
            self._disk.sync(self._fd)
            self._disk.sync_directory(self.path.parent)
        except OSError as error:
            raise self._break("sync", error) from error

    def create(self, objects: Iterable[bytes]) -> None:
        """Write a new file that replaces the old one, if any, and is durable when this returns.

        Each of `objects` is a JSON object on one line. Raises NotWrittenError when the old file is unchanged, otherwise
        BrokenError.
        """
        draft = draft_of(self.path)
        fresh = Journal(draft, self._disk)
        try:
            draft.unlink(missing_ok=True)
            fresh._fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            # The umask may have taken bits from the mode.
            os.fchmod(fresh._fd, 0o600)
            fresh._write(objects)
            self._disk.sync(fresh._fd)
            self._disk.replace(draft, self.path)
        except OSError as error:
            fresh.close()
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise NotWrittenError.of_file(self.path, error) from error
        self.close()
        self._fd, self.size, self._last_sum, self._phase = fresh._fd, fresh.size, fresh._last_sum, "open"
        try:
            self._disk.sync_directory(self.path.parent)
        except OSError as error:
            raise self._break("make durable the renaming of", error) from error

    def append(self, objects: Iterable[bytes]) -> None:
        """Append JSON objects, which are durable when this returns. Raises NotWrittenError or BrokenError."""
        if self._broken is not None:
            raise self._broken
        if self._phase != "open":
            raise RuntimeError(f"{self.path} is not open for appending")
        before = self.size
        try:
            if self._fd < 0:
                self._open()
            self._write(objects)
        except OSError as error:
            self._cut_back()
            raise NotWrittenError.of_file(self.path, error) from error
        try:
            self._disk.sync(self._fd)
        except OSError as error:
            # The page cache may still have data that never reached the disk. The next start must not read it.
            with contextlib.suppress(OSError):
                self._disk.truncate(self._fd, before)
            raise self._break("sync", error) from error

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check(self, line: bytes) -> bytes:
        """Return the JSON object of a line without its sum. Raises DamagedError."""
        match = _LINE.fullmatch(line)
        if match is None:
            raise DamagedError(self.path, self.size, "the line has no checksum")
        found, rest = match.groups()
        if found != chain_sum(self._last_sum, rest):
            raise DamagedError(self.path, self.size, "the checksum does not fit the line and the one before it")
        self._last_sum = found
        return b"{" + rest

    def _check_unfinished(self, tail: bytes) -> None:
        """Raise DamagedError if the tail comes from damage, not from an unfinished append.

        It is damage if it begins with a complete line, whose newline was altered after the append. Each "}" may end
        that line, so the checksum is compared there.
        """
        match = _START.match(tail)
        if match is None:
            return
        digest = hashlib.blake2b(self._last_sum, digest_size=_SUM_BYTES)
        at = match.end()
        while end := tail.find(b"}", at, -1) + 1:
            digest.update(tail[at:end])
            if digest.hexdigest().encode() == match[1]:
                raise DamagedError(self.path, self.size + end, "a newline was expected")
            at = end

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _write(self, objects: Iterable[bytes]) -> None:
        lines = []
        last = self._last_sum
        for text in objects:
            rest = text[1:]
            last = chain_sum(last, rest)
            lines.append(b'{"sum":"%b",%b\n' % (last, rest))
        data = memoryview(b"".join(lines))
        size = self.size + len(data)
        while data:
            data = data[self._disk.write(self._fd, data) :]
        self.size, self._last_sum = size, last

    def _cut_back(self) -> None:
        """Remove what a failed write left, durably: a power cut must not bring back lines that were refused."""
        if self._fd < 0:
            return
        try:
            self._disk.truncate(self._fd, self.size)
            self._disk.sync(self._fd)
        except OSError as error:
            raise self._break("take back an unfinished write to", error) from error

    def _break(self, action: str, error: OSError) -> BrokenError:
        self._broken = BrokenFileError(self.path, action, error)
        return self._broken


class Reserve:
    """Disk space that a file of `size` bytes at `path` holds. No file stays open. Not thread-safe."""

    def __init__(self, path: Path, size: int, disk: Disk) -> None:
        self.path = path
        self.size = size
        self._disk = disk

    def fill(self) -> None:
        """Allocate the missing part of the space. Raises NotWrittenError if not all could be allocated."""
        try:
            with self._opened(os.O_CREAT) as fd:
                os.fchmod(fd, 0o600)
                missing = self.size - os.fstat(fd).st_size
                # A file system must not be able to compress it.
                data = memoryview(os.urandom(max(0, missing)))
                while data:
                    data = data[self._disk.write(fd, data) :]
        except OSError as error:
            raise NotWrittenError.of_file(self.path, error) from error

    def release(self, size: int) -> bool:
        """Free space for `size` bytes, or as much as is held. Return False when none is held."""
        try:
            with self._opened() as fd:
                held = os.fstat(fd).st_size
                self._disk.truncate(fd, max(0, held - size - RESERVE_STEP))
                # Some file systems reuse the blocks only after a sync.
                self._disk.sync(fd)
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


def chain_sum(last: bytes, rest: bytes) -> bytes:
    """Return the sum of a line, from the sum of the line before (empty for the first) and the rest of the line."""
    return hashlib.blake2b(last + rest, digest_size=_SUM_BYTES).hexdigest().encode()


def line_length(text: bytes) -> int:
    """Return how many bytes of a file the JSON object `text` takes, with its sum and newline."""
    return len(text) + len('"sum":"",\n') + 2 * _SUM_BYTES
