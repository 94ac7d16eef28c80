"""The journal: after a crash, a disk error or an edit, a file yields a prefix of its lines, or is refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from harness.disks import CrashDisk, FailingDisk, Image, fails_at
from harness.strategies import QUICK
from hypothesis import given
from hypothesis import strategies as st

from orchard.storage.errors import BrokenError, DamagedError, NotWrittenError
from orchard.storage.journal import Disk, Journal, chain_sum

Lines = list[dict[str, Any]]
OBJECTS: Lines = [{"format": "test"}, {"n": 1, "text": "a\u00e9\u2028b"}, {"n": 2}, {"n": 3, "deep": [{"x": None}]}]


def text(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def texts(values: Lines) -> list[bytes]:
    return [text(value) for value in values]


def made(path: Path, values: Lines, disk: Disk | None = None) -> Journal:
    """Create a journal with the first line, and append the others one after another."""
    journal = Journal(path, disk or Disk())
    journal.create(texts(values[:1]))
    for value in values[1:]:
        journal.append([text(value)])
    return journal


def bare(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "sum"}


def loaded(path: Path) -> Lines:
    """Return what a restart reads, after it has cut off what a crash left."""
    journal = Journal(path, Disk())
    try:
        found = [line for _, line in journal.read()]
        journal.open_for_append()
        return found
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.jsonl"


# ---- what is written is read ---------------------------------------------------------------------------------------


def test_appended_lines_are_read_with_their_offsets(path: Path) -> None:
    made(path, OBJECTS).close()
    data = path.read_bytes()
    journal = Journal(path, Disk())
    found = list(journal.read())
    journal.open_for_append()
    journal.append([text({"n": 4}), text({"n": 5})])
    journal.close()
    assert [line for _, line in found] == OBJECTS
    lines = data.splitlines(keepends=True)
    assert [offset for offset, _ in found] == [len(b"".join(lines[:n])) for n in range(len(lines))]
    assert loaded(path) == [*OBJECTS, {"n": 4}, {"n": 5}]
    assert path.read_bytes().startswith(data)


def test_file_is_readable_json_with_mode_0600(path: Path) -> None:
    made(path, OBJECTS).close()
    assert [bare(json.loads(line)) for line in path.read_text().split("\n")[:-1]] == OBJECTS
    assert path.read_bytes().startswith(b'{"sum":"')
    assert "a\u00e9" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_checksums_are_chained_blake2b(path: Path) -> None:
    made(path, OBJECTS).close()
    last = b""
    for line in path.read_bytes().split(b"\n")[:-1]:
        before, rest = line[:26], line[26:]
        assert before == b'{"sum":"%b",' % chain_sum(last, rest)
        last = before[8:24]
    # Another program can compute it: BLAKE2b of 8 bytes.
    assert chain_sum(b"", b"") == b"e4a6a0577479b2b4"


def test_empty_append_writes_nothing(path: Path) -> None:
    journal = made(path, OBJECTS)
    size = path.stat().st_size
    journal.append([])
    journal.close()
    assert path.stat().st_size == journal.size == size


def test_append_reopens_a_closed_journal(path: Path) -> None:
    journal = made(path, OBJECTS)
    for n in range(3):
        journal.close()
        journal.append([text({"n": n})])
    journal.close()
    assert loaded(path) == [*OBJECTS, {"n": 0}, {"n": 1}, {"n": 2}]


def test_partial_writes_are_continued(path: Path) -> None:
    class Slow(Disk):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[:1])

    made(path, OBJECTS, Slow()).close()
    assert loaded(path) == OBJECTS


def test_create_replaces_the_old_file_atomically(path: Path) -> None:
    journal = made(path, OBJECTS)
    other = Journal(path, Disk())
    reading = other.read()
    next(reading)
    journal.create([text({"format": "new"})])
    journal.append([text({"n": 1})])
    journal.close()
    # A reader of the old file reads it to its end.
    assert [line for _, line in reading] == OBJECTS[1:]
    assert loaded(path) == [{"format": "new"}, {"n": 1}]
    assert list(path.parent.iterdir()) == [path]


def test_draft_left_by_a_crash_is_replaced(path: Path) -> None:
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(b"half a line")
    made(path, OBJECTS).close()
    assert loaded(path) == OBJECTS
    assert not draft.exists()


# ---- cut, altered, moved -------------------------------------------------------------------------------------------


def test_file_cut_at_any_byte_yields_its_complete_lines_and_takes_appends(path: Path) -> None:
    made(path, OBJECTS).close()
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        journal = Journal(path, Disk())
        complete = data[:cut].count(b"\n")
        assert [line for _, line in journal.read()] == OBJECTS[:complete]
        assert path.stat().st_size == cut, "read has changed the file"
        journal.open_for_append()
        assert path.read_bytes() == data[: data.rfind(b"\n", 0, cut) + 1]
        journal.append([text({"after": cut})])
        journal.close()
        assert loaded(path) == [*OBJECTS[:complete], {"after": cut}]


@pytest.mark.parametrize("tail", [b"", b'{"sum":"0123456789abcdef","n', b"\x00" * 40])
def test_each_altered_byte_is_reported_with_its_offset(path: Path, tail: bytes) -> None:
    made(path, OBJECTS).close()
    data = path.read_bytes()
    starts = [0, *(n + 1 for n, byte in enumerate(data) if byte == ord("\n"))]
    for at in range(len(data)):
        for byte in {data[at] ^ 1, data[at] ^ 0x80, ord("\n"), 0} - {data[at]}:
            path.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :] + tail)
            with pytest.raises(DamagedError) as damaged:
                loaded(path)
            # An altered newline joins two lines; the last one is not followed by another.
            where = at if at == len(data) - 1 and byte != ord("\n") else max(n for n in starts if n <= at)
            assert damaged.value.offset == where
            assert str(damaged.value).startswith(f"{path}: ")
            assert f" at byte {where}; restore the data directory from a backup, or cut the file" in str(damaged.value)


@pytest.mark.slow
def test_altered_unfinished_line_is_cut_off(path: Path) -> None:
    made(path, OBJECTS).close()
    data = path.read_bytes()
    whole = data[data.rfind(b"\n", 0, -1) + 1 : -1]
    for cut in range(len(whole)):
        for at in range(cut):
            path.write_bytes(data[: -len(whole) - 1] + whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 : cut])
            assert loaded(path) == OBJECTS[:-1]


def test_moved_removed_and_foreign_lines_are_detected(path: Path) -> None:
    made(path, OBJECTS).close()
    lines = path.read_bytes().splitlines(keepends=True)
    other = path.with_name("other.jsonl")
    made(other, [{"format": "other"}, *OBJECTS[1:]]).close()
    foreign = other.read_bytes().splitlines(keepends=True)
    orders = {
        "taken out": [lines[0], *lines[2:]],
        "the first taken out": lines[1:],
        "twice": [*lines[:2], *lines[1:]],
        "exchanged": [lines[0], lines[2], lines[1], lines[3]],
        "of another file": [*lines[:3], foreign[3]],
        "all of another file": [lines[0], *foreign[1:]],
        "an empty line": [*lines[:2], b"\n", *lines[2:]],
        "an empty line at the end": [*lines, b"\n"],
        "CR LF": [line.replace(b"\n", b"\r\n") for line in lines],
        "a line without a sum": [*lines, b'{"n":4}\n'],
    }
    for name, order in orders.items():
        path.write_bytes(b"".join(order))
        with pytest.raises(DamagedError) as damaged:
            loaded(path)
        assert damaged.value.offset <= path.stat().st_size, name


@QUICK
@given(st.lists(st.sampled_from([b"\n", b'{"sum":"', b"0123456789abcdef", b'",', b"{}", b"}"]) | st.binary(max_size=9)))
def test_arbitrary_bytes_are_refused_or_yield_nothing(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"".join(pieces))
    if b"\n" in path.read_bytes():
        with pytest.raises(DamagedError, match="at byte 0;"):
            loaded(path)
    else:
        assert loaded(path) == []


def test_missing_file_raises_file_not_found_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        loaded(path)


# ---- disks that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("torn", [False, True])
def test_each_failing_disk_call_keeps_acknowledged_lines(path: Path, code: int, torn: bool) -> None:
    number = 0
    outcomes: dict[str, set[str]] = {}
    while True:
        disk = FailingDisk(torn=torn)
        disk.fault = fails_at(number, code)
        path.unlink(missing_ok=True)
        told, uncertain, outcome = attempts(path, disk, code)
        if not disk.failed:
            break
        kept = loaded(path) if path.exists() else []
        assert kept in (told, told + uncertain), (number, disk.failed)
        outcomes.setdefault(disk.failed[0], set()).add(outcome)
        number += 1
    assert number == len(disk.calls) > 8
    # A failed sync in `create` is one of the draft.
    expected = {"write": {"not written"}, "replace": {"not written"}, "sync_directory": {"broken"}}
    assert outcomes == {**expected, "sync": {"not written", "broken"}}


def attempts(path: Path, disk: Disk, code: int) -> tuple[Lines, Lines, str]:
    """Append several times; return the acknowledged lines, those with an unknown outcome, and what failed."""
    journal, told, outcome = Journal(path, disk), list[dict[str, Any]](), ""
    for number in range(4):
        lines: Lines = [{"n": number}, {"n": number, "second": True}] if told else [{"format": "test"}]
        try:
            (journal.append if told else journal.create)(texts(lines))
        except NotWrittenError as error:
            outcome = "not written"
            problem, no_space = str(error), error.no_space
        except BrokenError as error:
            outcome = "broken"
            check_broken(journal, error)
            journal.close()
            return told, lines, outcome
        else:
            told += lines
    journal.close()
    if outcome:
        assert problem == f"cannot write {path}: {os.strerror(code)}"
        assert no_space == (code != errno.EIO)
    return told, [], outcome


def check_broken(journal: Journal, error: BrokenError) -> None:
    """Check that nothing more is appended to a file whose contents are unknown."""
    size = journal.path.stat().st_size
    with pytest.raises(BrokenError, match="uncertain") as again:
        journal.append([text({"n": 99})])
    assert again.value is error
    assert str(journal.path) in str(error)
    assert journal.path.stat().st_size == size


def test_failed_truncation_after_a_failed_write_breaks_the_journal(path: Path) -> None:
    for bad in ("truncate", "sync"):
        disk = FailingDisk(torn=True)
        journal = made(path, OBJECTS, disk)
        disk.fault = lambda verb, number, bad=bad: errno.EIO if verb in ("write", bad) else 0  # type: ignore[misc]
        with pytest.raises(BrokenError, match="take back an unfinished write"):
            journal.append([text({"n": 9})])
        disk.fault = lambda verb, number: 0
        with pytest.raises(BrokenError):
            journal.append([text({"n": 9})])
        journal.close()
        assert loaded(path) == OBJECTS


def test_failed_append_is_removed_durably(path: Path) -> None:
    """Otherwise a power cut could bring back lines that were refused."""
    disk = FailingDisk(torn=True)
    journal = made(path, OBJECTS, disk)
    disk.calls.clear()
    disk.fault = fails_at(0, errno.ENOSPC)
    with pytest.raises(NotWrittenError):
        journal.append([text({"n": 4}), text({"n": 5}), text({"n": 6})])
    assert disk.calls == ["write", "truncate", "sync"]
    journal.append([text({"n": 7})])
    journal.close()
    assert loaded(path) == [*OBJECTS, {"n": 7}]


def test_create_in_a_missing_directory_raises_not_written_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone" / "test.jsonl", Disk())
    with pytest.raises(NotWrittenError, match="No such file") as refused:
        journal.create([b"{}"])
    assert not refused.value.no_space


def test_append_before_the_file_was_read_and_opened_is_an_error(path: Path) -> None:
    made(path, OBJECTS).close()
    data = path.read_bytes()
    journal = Journal(path, Disk())
    with pytest.raises(RuntimeError, match="not open for appending"):
        journal.append([b"{}"])
    reading = journal.read()
    next(reading)
    with pytest.raises(RuntimeError, match="not read to its end"):
        journal.open_for_append()
    for _ in reading:
        pass
    with pytest.raises(RuntimeError, match="not open for appending"):
        journal.append([b"{}"])
    assert path.read_bytes() == data


# ---- power cuts ----------------------------------------------------------------------------------------------------


def test_power_cut_at_any_moment_keeps_acknowledged_lines(tmp_path: Path) -> None:
    # What was acknowledged, and what it is about to become.
    before: Lines = []
    now: Lines = []
    after = tmp_path / "after.jsonl"
    seen: list[Lines] = []

    def lost_power(image: Image) -> None:
        data = image.get("test.jsonl")
        kept = []
        if data is not None:
            after.write_bytes(data)
            kept = loaded(after)
        seen.append(kept)
        appended = [now[:n] for n in range(len(before) + 1, len(now))] if now[: len(before)] == before else []
        assert kept in [before, now, *(appended if before else [])]

    directory = tmp_path / "data"
    directory.mkdir()
    journal = Journal(directory / "test.jsonl", CrashDisk(directory, lost_power, every_byte=True))
    anew: Lines = [{"format": "anew"}, {"n": 1}]
    for lines in (OBJECTS[:2], OBJECTS[2:], anew, [{"n": 2}]):
        if "format" in lines[0]:
            now = lines
            journal.create(texts(lines))
        else:
            now = [*before, *lines]
            journal.append(texts(lines))
        before = now
    journal.close()
    # The sweep includes the middle of an append, and the moment between two files.
    assert OBJECTS[:3] in seen
    assert (OBJECTS, anew) in itertools.pairwise(seen)
