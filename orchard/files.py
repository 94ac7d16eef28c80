"""One process per directory. Law: one file, and the system's lock on it.

The lock (flock) ends with the process, however that ends, so a stale one does not exist. The number of the process in
the file is for people only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class LockError(Exception):
    """The directory can't be had; str() says why."""


@contextlib.contextmanager
def lock_directory(directory: Path, file_name: str) -> Iterator[None]:
    """Keep every other process out of a directory, which is made if need be (mode 0700). Raises LockError."""
    try:
        new = not directory.is_dir()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if new:
            directory.chmod(0o700)  # whatever the umask
        descriptor = os.open(directory / file_name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise LockError(f"{directory}: {error.strerror}") from error
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = file.read().strip() or "unknown"
            raise LockError(f"{directory} is in use by another process ({owner})") from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
