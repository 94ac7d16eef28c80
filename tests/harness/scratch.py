"""The directory of a run of the tests: the temporary files of all its processes, and the home that they have.

It is in /tmp, where paths are short enough for Unix sockets, and there is one of the same name in memory. A run that is
killed leaves both. The next run removes them: a run holds a lock on its directories while it lives.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_DISK, _MEMORY = Path("/tmp"), Path("/dev/shm")
_PREFIX = "orchard-tests-"
# Names the directory of the run to all its processes.
_VARIABLE = "ORCHARD_TESTS_DIRECTORY"
# A run may have made its directory, and not locked it yet.
_YOUNG_SECONDS = 60.0


def begin_run() -> Callable[[], None]:
    """Make the directories of this run the place of all temporary files. Return the function that removes them.

    Those of pytest stay where they are, since pytest keeps them for who looks for the cause of a failure.
    """
    parents = [parent for parent in (_DISK, _MEMORY) if parent.is_dir()]
    for parent in parents:
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_if_dead(left)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_DISK))
    mine = [parent / directory.name for parent in parents]
    locks = []
    for each in mine:
        each.mkdir(exist_ok=True)
        # Processes of other users write here, too.
        each.chmod(0o1777)
        locks.append(os.open(each, os.O_RDONLY))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
    os.environ["TMPDIR"] = os.environ[_VARIABLE] = str(directory)
    tempfile.tempdir = None

    def remove() -> None:
        for each, lock in zip(mine, locks, strict=True):
            shutil.rmtree(each, ignore_errors=True)
            os.close(lock)

    return remove


def memory_directory() -> Path | None:
    """Return where temporary files are in memory, or None if there is no such place."""
    directory = _MEMORY / Path(os.environ.get(_VARIABLE, "")).name
    return directory if directory.is_dir() else None


def _remove_if_dead(directory: Path) -> None:
    """Remove the directory of a run that has ended. That of another user stays."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _YOUNG_SECONDS:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)
