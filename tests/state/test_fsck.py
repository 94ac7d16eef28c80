"""The part of the check of a data directory that each start asks for. tests/cli/test_cli.py tests `orchard check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchard.base.files import EVENTS_DIRECTORY, HISTORY_FILE, LIFECYCLE_FILE, SECRET_FILES
from orchard.state.fsck import find_exposures, inspect
from orchard.storage.journal import Disk, Journal


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a data directory whose files are private."""
    path = tmp_path / "controller"
    path.mkdir(mode=0o700)
    for name in SECRET_FILES:
        (path / name).write_bytes(b"secret")
        (path / name).chmod(0o600)
    return path


def test_private_directory_has_no_exposure(directory: Path) -> None:
    assert find_exposures(directory) == []


def test_directory_that_others_can_list_but_not_write_has_no_exposure(directory: Path) -> None:
    directory.chmod(0o755)
    assert find_exposures(directory) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
@pytest.mark.parametrize("name", SECRET_FILES)
def test_secret_open_to_others_is_reported(directory: Path, name: str, mode: int) -> None:
    (directory / name).chmod(mode)
    told = f"{directory / name} can be read by others than its owner (mode {mode:o}); chmod 600 it"
    assert find_exposures(directory) == [told]


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_directory_that_others_can_write_is_reported(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    told = f"{directory} can be written by others than its owner (mode {mode:o}); chmod 700 it"
    assert find_exposures(directory) == [told]


def test_directory_without_secrets_has_no_exposure(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert find_exposures(tmp_path) == []


def test_database_of_another_controller_is_named(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    assert any(problem.startswith(str(tmp_path / "db")) for problem in inspect(tmp_path).problems)


@pytest.mark.parametrize(
    ("name", "kind"), [(HISTORY_FILE, "history"), (f"{EVENTS_DIRECTORY}/{LIFECYCLE_FILE}", "lifecycle")]
)
def test_damaged_and_unfinished_files_of_records_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / EVENTS_DIRECTORY).mkdir()
    path = tmp_path / name
    journal = Journal(path, Disk())
    journal.create([b'{"format":"orchard-%b","version":1}' % kind.encode(), b'{"records":[]}'])
    journal.close()
    whole = path.read_bytes()

    def named() -> tuple[bool, bool]:
        report = inspect(tmp_path)
        return tuple(any(str(path) in text for text in found) for found in (report.problems, report.notes))  # type: ignore[return-value]

    assert named() == (False, False)
    path.write_bytes(whole + b'{"sum":"')
    assert named() == (False, True)
    path.write_bytes(whole.replace(b"records", b"recards"))
    assert named() == (True, False)
    path.write_bytes(whole.replace(b'"version":1', b'"version":2'))
    assert named() == (True, False)
