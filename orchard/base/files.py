"""Files of the data directories: their names, durable private writes, and the lock that keeps a second process out.

The contents of the files are written elsewhere: the state and events by `storage/`, the keys by the modules that use
them.

`write_private` writes a draft beside the file, syncs it and renames it, so that a crash leaves the old file or the new
one. On macOS, fsync leaves data in the drive's cache; `sync_file` uses F_FULLFSYNC where the platform has it.

The lock is flock(2), which ends with the process that holds it. A process that this one has forked holds it, too, until
it executes another program. The lock file has the number of the first process.

This module imports little, because the supervisor of a VM must start fast.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# In the controller's data directory.
STATE_FILE = "state.jsonl"
RESERVE_FILE = "reserve"
EVENTS_DIRECTORY = "events"
# Beside the files of single VMs in that directory.
LIFECYCLE_FILE = "lifecycle.jsonl"
HISTORY_FILE = "history.jsonl"
ACCESS_KEY_FILE = "access-token.key"
TLS_CERTIFICATE_FILE = "controller.crt"
TLS_KEY_FILE = "controller.key"
SSH_HOST_KEY_FILE = "ssh_host_ed25519_key"
CONTROLLER_LOCK_FILE = "controller.lock"
# In a worker's directory, which workers of different names may share.
WORKERS_LOCK_FILE = "worker.lock"
WORKER_LOCK_FILE = "worker-{name}.lock"
WORKER_MEMORY_FILE = "worker-{name}.cluster"
INSTANCE_ID_FILE = "instance-id"

# The state holds the service accounts with their tokens.
SECRET_FILES = (STATE_FILE, ACCESS_KEY_FILE, TLS_KEY_FILE, SSH_HOST_KEY_FILE)

# A killed process may hold a lock for so long by what it has forked. The lock is tried at this interval meanwhile.
_RELEASE_SECONDS, _RETRY_SECONDS = 5.0, 0.02

ACCESS_KEY_BYTES = 32


class LockError(Exception):
    """The directory cannot be locked; str() says why."""


def sync_file(fd: int) -> None:
    """Wait until the contents of an open file or directory are on the drive. Raises OSError."""
    if sys.platform == "darwin":
        import fcntl

        # fsync alone leaves the data in the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_directory(directory: Path) -> None:
    """Wait until the names of the files in a directory are on the drive, where a system can. Raises OSError."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_file(fd)
    finally:
        os.close(fd)


def draft_of(path: Path) -> Path:
    """Return the path of the draft that is written before it replaces `path`."""
    return path.with_name(path.name + ".new")


def make_private(directory: Path) -> None:
    """Create a directory and its missing parents with mode 0700, whatever the umask. Raises OSError."""
    if directory.is_dir():
        return
    make_private(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
        # The umask may have taken bits from the mode.
        directory.chmod(0o700)


def write_private(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Create or replace a file of mode 0600, whatever the umask. Raises OSError.

    With `durable` it is on the drive when this returns, and a crash of the machine leaves the old file or the new one.
    A crash may also leave a draft, which the next call replaces.
    """
    draft = draft_of(path)
    draft.unlink(missing_ok=True)
    try:
        with open(draft, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            draft.chmod(0o600)
            file.write(data)
            file.flush()
            if durable:
                sync_file(file.fileno())
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


@contextlib.contextmanager
def lock_directory(directory: Path, file_name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a directory, which is created with mode 0700 if it does not exist. Raises LockError.

    Any number of processes can hold a `shared` lock at the same time.
    """
    import fcntl

    try:
        make_private(directory)
        descriptor = os.open(directory / file_name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise LockError(f"{directory}: {error.strerror}") from error
    with os.fdopen(descriptor, "r+") as file:
        until = time.monotonic() + _RELEASE_SECONDS
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                if not _has_ended(owner) or time.monotonic() > until:
                    raise LockError(f"{directory} is in use by another process ({owner})") from None
            time.sleep(_RETRY_SECONDS)
        if not shared:
            file.seek(0)
            file.truncate()
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def _has_ended(owner: str) -> bool:
    """Return whether no process has the number that a lock file holds."""
    with contextlib.suppress(ValueError, OverflowError, PermissionError):
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            return True
    return False
