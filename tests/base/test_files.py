"""Files of a data directory: private durable writes, what a crash or a failure leaves, and the lock."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from orchard.base import files


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the system calls that make a file durable, in their order."""
    made: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def recorded(*args: object, name: str = name, real: object = real) -> object:
            made.append(name)
            return real(*args)  # type: ignore[operator]

        monkeypatch.setattr(os, name, recorded)
    return made


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_private_file_has_mode_0600_without_a_umask(tmp_path: Path) -> None:
    files.write_private(tmp_path / "key", b"secret")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_private_file_has_mode_0600_under_a_strict_umask(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        files.write_private(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_private_file_replaces_an_older_one_and_a_draft_left_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")
    draft = files.draft_of(path)
    draft.write_bytes(b"half of a longer secret")
    draft.chmod(0o644)
    files.write_private(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_private_file_is_synced_before_the_rename_and_its_directory_after(tmp_path: Path, calls: list[str]) -> None:
    files.write_private(tmp_path / "key", b"secret")
    assert calls == ["fsync", "replace", "fsync"]


def test_sync_uses_f_fullfsync_where_the_platform_has_it(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: synced.append((os.fstat(fd).st_ino, command)))
    files.write_private(tmp_path / "key", b"secret")
    assert synced == [((tmp_path / "key").stat().st_ino, 51), (tmp_path.stat().st_ino, 51)]
    assert "fsync" not in calls


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_leaves_no_draft(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_private(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])


# ---- the lock ------------------------------------------------------------------------------------------------------


def test_locked_directory_is_refused_to_a_second_process(tmp_path: Path) -> None:
    with (
        files.lock_directory(tmp_path, "lock"),
        pytest.raises(files.LockError, match=r"in use by another process \(\d+\)"),
        files.lock_directory(tmp_path, "lock"),
    ):
        raise AssertionError("the directory was locked twice")


# Locks a directory, forks a process that waits, prints its number, and ends as if it was killed.
LEAVING = """
import os, pathlib, sys, time
from orchard.base import files
with files.lock_directory(pathlib.Path(sys.argv[1]), "lock"):
    if child := os.fork():
        print(child, flush=True)
        os._exit(0)
    time.sleep(1000)
"""


def test_lock_is_waited_for_while_only_a_fork_of_a_process_that_has_ended_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", LEAVING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None
        fork = int(left.stdout.readline())

    def end_fork(_: float = 0) -> None:
        with suppress(ProcessLookupError):
            os.kill(fork, signal.SIGKILL)

    # As when the fork begins to execute a program, while this process waits.
    monkeypatch.setattr(time, "sleep", end_fork)
    try:
        with files.lock_directory(tmp_path, "lock"):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    finally:
        end_fork()


@pytest.mark.usefixtures("no_umask")
def test_lock_creates_the_directory_with_mode_0700(tmp_path: Path) -> None:
    directory = tmp_path / "data" / "controller"
    with files.lock_directory(directory, "lock"):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert (directory / "lock").stat().st_mode & 0o777 == 0o600
    with files.lock_directory(directory, "lock"):
        pass
