"""Errors of the storage layer.

`DamagedError`, `NotWrittenError` and `BrokenError` say what happened to a file. `StorageError` and its subclasses tell
a caller that a change was refused or undone. None has an HTTP status: api.py maps them.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DamagedError(Exception):
    """A file does not hold what was written to it. str() names the file, the offset and the remedy."""

    def __init__(self, path: Path, offset: int, what: str, remedy: str = "") -> None:
        self.path = path
        self.offset = offset
        self.what = what
        remedy = remedy or "restore the data directory from a backup, or cut the file there and lose what follows"
        super().__init__(f"{path}: {what} at byte {offset}; {remedy}")


class StorageError(Exception):
    """A change was refused, or undone because it could not be written; str() says why."""


class StorageFullError(StorageError):
    """There is no space left for the change."""


class ObjectTooLargeError(StorageError):
    """An object has more bytes than the engine stores of one."""


class StorageUnavailableError(StorageError):
    """A write failed for another reason than a full disk."""


class NotWrittenError(Exception):
    """A write failed, and what is stored is as it was before. `no_space`: the disk or the quota is full."""

    def __init__(self, message: str, *, no_space: bool) -> None:
        super().__init__(message)
        self.no_space = no_space

    @classmethod
    def of_file(cls, path: Path, error: OSError) -> NotWrittenError:
        return cls(f"cannot write {path}: {os.strerror(error.errno or 0)}", no_space=error.errno in _NO_SPACE)

    def as_storage_error(self, consequence: str) -> StorageError:
        """Return the error for the callers whose changes were in the write."""
        kind = StorageFullError if self.no_space else StorageUnavailableError
        return kind(f"{self}; {consequence}")


class BrokenError(Exception):
    """An engine has ended: only a restart, which reads everything again, can tell what is stored."""

    @property
    def consequence(self) -> str:
        """Return the message for the callers whose changes are not stored."""
        return f"the controller cannot store anything any more: {self}; restart it"


class LeadershipLostError(BrokenError):
    """Another controller may lead, so no answer may be based on the state in memory any more."""

    @property
    def consequence(self) -> str:
        return "this controller does not lead any more"


class BrokenFileError(BrokenError):
    """It is not known what the disk holds after a failed write."""

    def __init__(self, path: Path, action: str, error: OSError) -> None:
        super().__init__(f"cannot {action} {path}: {os.strerror(error.errno or 0)}; what is on the disk is uncertain")
