"""The log file: it is rotated at 100 MB, can be renamed by other programs, and may be on a full disk.

Each line is one write to a file that is open for appending. Before a line that would make the file larger than the
limit, the file is renamed to FILE.1, which replaces the older one, and a new file is opened. So a line is in one file
as a whole.

A program that rotates logs renames the file and sends SIGUSR1: `reopen` opens the path anew. Lines go to the old file
until then. Or it copies the file and truncates it, which needs no signal.

What cannot be written, because the disk is full, is dropped and counted; the next line that can be written is followed
by one with the count. No error of the log ends the process.

What a line looks like is in logs.py.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

# A file of this size is rotated.
ROTATE_BYTES = 100_000_000
_MODE = 0o600

_logger = logging.getLogger("orchard.daemon")


class _RotatedFile:
    """A log file. `lost` counts the lines that could not be written. Not thread-safe. Raises OSError."""

    def __init__(self, path: Path, limit: int) -> None:
        self.lost = 0
        self._path = path
        self._step = self._limit = limit
        self._open(_MODE)

    def _open(self, mode: int) -> None:
        """Open the path, and create the file with `mode`, whatever the umask. Raises OSError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags | os.O_EXCL, mode)
            os.fchmod(descriptor, mode)
        except FileExistsError:
            descriptor = os.open(self._path, flags)
        self._file = io.FileIO(descriptor, "a")

    def write(self, line: str) -> None:
        data = line.encode()
        # Another program may have copied and truncated the file. The size of a terminal or a pipe is 0.
        size = os.fstat(self._file.fileno()).st_size
        if size and size + len(data) > self._limit:
            size = self._rotate(size)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.lost += 1
            # A part of the line may have been written.
            with suppress(OSError):
                self._file.truncate(size)

    def flush(self) -> None:
        """Do nothing: no data is kept back. logging.StreamHandler calls this after each line."""

    def close(self) -> None:
        self._file.close()

    def reopen(self, mode: int = _MODE) -> None:
        """Open the path anew. Raises OSError; the open file stays in use then."""
        before = self._file
        self._open(mode)
        before.close()

    def _rotate(self, size: int) -> int:
        """Rotate a file of that size, and return the size of the one that lines go to from now on."""
        about = os.fstat(self._file.fileno())
        try:
            # Another program may have renamed it.
            if self._path.exists() and os.path.samestat(about, self._path.stat()):
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            self.reopen(stat.S_IMODE(about.st_mode))
            return os.fstat(self._file.fileno()).st_size
        except OSError:
            # The directory may not be written to. Lines matter more than the limit; this is tried again later.
            self._limit = size + self._step
            return size


class LogFileHandler(logging.StreamHandler["_RotatedFile"]):
    """Writes records to a file. Raises OSError if it cannot be opened."""

    def __init__(self, path: Path, limit: int = ROTATE_BYTES) -> None:
        """`limit` is in bytes."""
        self._file = _RotatedFile(path, limit)
        super().__init__(self._file)

    def emit(self, record: logging.LogRecord) -> None:
        lost = self._file.lost
        super().emit(record)
        if lost and self._file.lost == lost:
            note = {
                "name": _logger.name,
                "levelname": "WARNING",
                "msg": "log lines lost, the file could not be written",
            }
            super().emit(logging.makeLogRecord({**note, "lines": lost}))
            # The note counts only while it can be written.
            self._file.lost = 0 if self._file.lost == lost else lost

    def reopen(self) -> None:
        """Open the path anew. A failure is logged to the file that is open."""
        self.acquire()
        try:
            self._file.reopen()
        except OSError as error:
            _logger.warning("cannot reopen the log file, going on with the old one: %s", error)
        finally:
            self.release()

    def close(self) -> None:
        self._file.close()
        super().close()
