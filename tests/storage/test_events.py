"""The events of VMs: order, paging and durability under concurrent appends, deletions, disk errors and power cuts."""

from __future__ import annotations

import errno
import json
import logging
import random
import re
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
import trio.testing
from harness.disks import CrashDisk, FailingDisk, HeldDisk, Image, UnsyncedDisk, no_space
from harness.strategies import QUICK, resources
from hypothesis import given
from hypothesis import strategies as st

import orchard.storage.event_file
import orchard.storage.event_storage
import orchard.storage.events
from orchard.base.nursery import unwrap_groups
from orchard.resources.json_text import encode
from orchard.schema import Event
from orchard.storage.errors import (
    BrokenError,
    DamagedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from orchard.storage.event_pages import EventsDeletedError, InvalidCursorError
from orchard.storage.event_storage import EventLimitError
from orchard.storage.events import EventLog, event_files
from orchard.storage.journal import Disk, Journal

A = "aaaaaaaa-0000-4000-8000-000000000000"
B = "bbbbbbbb-0000-4000-8000-000000000000"
Order = Literal["asc", "desc"]


def event(number: int, text: str = "") -> Event:
    return Event(kind="log", timestamp=number, payload=text)


def events(*numbers: int) -> list[Event]:
    return [event(number) for number in numbers]


@asynccontextmanager
async def running(directory: Path, *uids: str, disk: Disk | None = None) -> AsyncIterator[EventLog]:
    """Run the event log for the VMs with these uids. Files of other VMs are removed."""
    log = EventLog(*event_files(directory, disk or UnsyncedDisk()))
    log.open(set(uids))
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        yield log
        nursery.cancel_scope.cancel()


async def whole_page(
    log: EventLog, uid: str, limit: int | None = None, order: Order = "asc", cursor: str | None = None
) -> tuple[list[Any], str | None]:
    """Return the events of a page, and the cursor of the next page."""
    page, following = await log.page(uid, limit, order, cursor)
    if isinstance(page, bytes):
        return json.loads(page), following
    pieces: list[bytes] = []

    async def send(piece: bytes) -> None:
        await trio.lowlevel.checkpoint()
        assert len(piece) <= orchard.storage.event_file.BLOCK_BYTES + 1
        pieces.append(piece)

    await page(send)
    return json.loads(b"".join(pieces)), following


async def found(
    log: EventLog, uid: str, limit: int | None = None, order: Order = "asc", cursor: str | None = None
) -> tuple[list[int], str | None]:
    """Return the numbers of the events of a page, and the cursor of the next page."""
    page, following = await whole_page(log, uid, limit, order, cursor)
    return [one["timestamp"] for one in page], following


async def all_of(log: EventLog, uid: str) -> list[int]:
    numbers, following = await found(log, uid)
    assert following is None
    return numbers


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def kept(directory: Path, *uids: str) -> dict[str, list[int]]:
    """Return the numbers of the events of each VM that a restart finds."""

    async def main() -> dict[str, list[int]]:
        async with running(directory, *uids) as log:
            return {uid: await all_of(log, uid) for uid in uids}

    # Another thread, since trio may run in this one.
    with ThreadPoolExecutor(1) as another:
        return another.submit(trio.run, main).result()


# ---- appending and paging ------------------------------------------------------------------------------------------


@pytest.mark.slow
@QUICK
@given(st.lists(st.lists(resources(Event), max_size=4), max_size=6))
def test_appended_events_are_read_unchanged(tmp_path_factory: pytest.TempPathFactory, batches: list[Any]) -> None:
    directory = tmp_path_factory.mktemp("events")
    whole = [encode(one) for batch in batches for one in batch]

    async def main() -> None:
        async with running(directory) as log:
            for batch in batches:
                await log.append(A, batch)
            assert await whole_page(log, A) == (whole, None)
        async with running(directory, A) as log:
            assert await whole_page(log, A, order="desc") == (whole[::-1], None)

    trio.run(main)


async def test_pages_in_both_orders_with_limits_and_cursors(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        assert await found(log, A, 3) == ([], None)
        await log.append(A, events(*range(7)))
        await log.append(B, events(99))
        assert await found(log, A, 3) == ([0, 1, 2], "aaaaaaaa-3")
        assert await found(log, A, 3, "asc", "aaaaaaaa-3") == ([3, 4, 5], "aaaaaaaa-6")
        assert await found(log, A, 3, "asc", "aaaaaaaa-6") == ([6], None)
        assert await found(log, A, 3, "desc") == ([6, 5, 4], "aaaaaaaa-4")
        assert await found(log, A, 4, "desc", "aaaaaaaa-4") == ([3, 2, 1, 0], None)
        assert await found(log, A, 7) == ([*range(7)], None)
        assert await found(log, A, None, "asc", "aaaaaaaa-5") == ([5, 6], None)
        assert await found(log, A, None, "desc", "aaaaaaaa-2") == ([1, 0], None)
        assert await found(log, A, 3, "asc", "aaaaaaaa-7") == ([], None)


@pytest.mark.slow
@QUICK
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from(["asc", "desc"]), st.lists(st.integers(0, 3), max_size=12))
def test_paging_neither_skips_nor_repeats_during_appends(
    tmp_path_factory: pytest.TempPathFactory, before: int, limit: int, order: Order, meanwhile: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("events")

    async def main() -> None:
        async with running(directory) as log:
            await log.append(A, events(*range(before)))
            count, numbers, cursor = before, list[int](), None
            while True:
                page, cursor = await found(log, A, limit, order, cursor)
                assert len(page) == limit or cursor is None
                numbers += page
                if cursor is None:
                    break
                more = meanwhile.pop() if meanwhile else 0
                await log.append(A, events(*range(count, count + more)))
                count += more
            if order == "desc":
                assert numbers == list(range(before))[::-1]
            else:
                assert numbers == list(range(count))

    trio.run(main)


@pytest.mark.parametrize(
    "cursor", ["", "x", "3", "bbbbbbbb-1", "aaaaaaaa-4", "aaaaaaaa--1", "aaaaaaaa-1 ", "aaaaaaaa-1\n", "aaaaaaaa-" + "9" * 5000, "AAAAAAAA-1", "aaaaaaaa-\u0661", "aaaaaaaa"]
)  # fmt: skip
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_invalid_cursor_is_refused(tmp_path: Path, order: Order, cursor: str) -> None:
    async with running(tmp_path) as log:
        await log.append(A, events(0, 1, 2))
        with pytest.raises(InvalidCursorError, match=r"^cursor is .+, expected the X-Next-Cursor of") as refused:
            await log.page(A, 1, order, cursor)
        assert len(str(refused.value)) < 500


async def test_concurrent_appends_keep_their_order_and_share_two_syncs(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running(tmp_path, disk=disk) as log:
        await log.append(A, events(-1))
        disk.syncs = 0
        told: list[int] = []

        async def append(number: int) -> None:
            await log.append(A, events(number, number + 100))
            told.append(disk.syncs)

        async with trio.open_nursery() as writers:
            with disk.held():
                for number in range(20):
                    writers.start_soon(append, number)
                    await trio.testing.wait_all_tasks_blocked()
                assert told == []
                # Events that are being written are in no page, and no page waits for them.
                assert await all_of(log, A) == [-1]
                assert await found(log, A, 5, "desc") == ([-1], None)
        assert sorted(told) == [1] + 19 * [2]
        assert await all_of(log, A) == [-1, *(n for number in range(20) for n in (number, number + 100))]


async def test_events_of_vms_are_kept_apart(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(log.append, (A, B)[number % 2], events(number))
        assert sorted(await all_of(log, A)) == [0, 2, 4, 6, 8]
        assert sorted(await all_of(log, B)) == [1, 3, 5, 7, 9]
    assert names(tmp_path) == {f"{A}.jsonl", f"{B}.jsonl"}


async def test_empty_append_creates_no_file(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        await log.append(A, [])
    assert names(tmp_path) == set()


async def test_cancelled_append_is_stored(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running(tmp_path, disk=disk) as log, trio.open_nursery() as nursery:
        with disk.held():
            nursery.start_soon(log.append, A, events(1))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    async with running(tmp_path, A) as log:
        assert await all_of(log, A) == [1]


async def test_append_during_the_last_write_before_a_stop_is_stored(tmp_path: Path) -> None:
    disk = HeldDisk()
    log = EventLog(*event_files(tmp_path, disk))
    log.open(set())
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        await log.append(A, events(1))
        with disk.held():
            nursery.start_soon(log.append, A, events(2))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(log.append, A, events(3))
            nursery.start_soon(log.append, B, events(4))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    async with running(tmp_path, A, B) as log:
        assert await all_of(log, A) == [1, 2, 3]
        assert await all_of(log, B) == [4]


async def test_log_cancelled_right_after_an_append_still_writes_it(tmp_path: Path) -> None:
    # Repeated, because the stop and the writing task that was just woken run in random order.
    for number in range(10):
        async with running(tmp_path, A) as log:
            # The writing task begins with what a start has to drop. After this append it waits.
            await log.append(A, events(2 * number))
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                scope.cancel()
                await log.append(A, events(2 * number + 1))
    async with running(tmp_path, A) as log:
        assert await all_of(log, A) == [*range(20)]


async def test_no_file_stays_open(tmp_path: Path) -> None:
    descriptors = set()

    class Noting(FailingDisk):
        def write(self, fd: int, data: memoryview) -> int:
            descriptors.add(fd)
            return super().write(fd, data)

    disk = Noting()
    async with running(tmp_path, disk=disk) as log:
        for number in range(50):
            disk.fault = no_space if number > 25 else lambda verb, number: 0
            for uid in (f"{number % 20:08x}-", A):
                try:
                    await log.append(uid, events(number))
                except StorageFullError:
                    assert number > 25
    assert len(descriptors) < 5


# ---- what becomes of the files -------------------------------------------------------------------------------------


async def test_drop_unlinks_the_file_and_forgets_the_events(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        await log.append(A, events(1))
        await log.append(B, events(2))
        log.drop(A)
        log.drop("cccccccc-never")
        await log.append(B, events(3))
        assert names(tmp_path) == {f"{B}.jsonl"}
        assert await all_of(log, A) == []
        assert await all_of(log, B) == [2, 3]


async def test_append_waiting_for_a_dropped_vm_raises_events_deleted_error(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running(tmp_path, disk=disk) as log:
        await log.append(A, events(0))
        outcomes: list[str] = []

        async def append(number: int) -> None:
            try:
                await log.append(A, events(number))
            except EventsDeletedError:
                outcomes.append("deleted")
            else:
                outcomes.append("stored")

        async with trio.open_nursery() as nursery:
            with disk.held():
                for number in (1, 2):
                    nursery.start_soon(append, number)
                    await trio.testing.wait_all_tasks_blocked()
                log.drop(A)
                await trio.testing.wait_all_tasks_blocked()
                # The one that was not being written yet.
                assert outcomes == ["deleted"]
        assert outcomes == ["deleted", "stored"]
        await log.append(B, events(0))
        assert names(tmp_path) == {f"{B}.jsonl"}


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("block_bytes", [1, 100, 1000, 100_000])
async def test_long_page_is_read_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Order, block_bytes: int
) -> None:
    monkeypatch.setattr(orchard.storage.event_file, "BLOCK_BYTES", block_bytes)
    # For blocks of a byte each, shorter ones: each block is read in a thread.
    count, length = (40, 150) if block_bytes > 1 else (10, 20)
    written = [event(number, "\u00e9\n" * (number * 7 % length)) for number in range(count)]
    encoded = [encode(one) for one in written]
    async with running(tmp_path) as log:
        await log.append(A, written)
        assert await whole_page(log, A, order=order) == (encoded[:: 1 if order == "asc" else -1], None)
        got: list[Any] = []
        following: str | None = None
        while following or not got:
            page, following = await whole_page(log, A, 7, order, following)
            got += page
        assert got == encoded[:: 1 if order == "asc" else -1]


async def test_long_page_shows_what_was_there_at_its_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.storage.event_file, "BLOCK_BYTES", 100)
    async with running(tmp_path) as log:
        await log.append(A, events(*range(10)))
        page, _ = await log.page(A, None, "asc", None)
        assert not isinstance(page, bytes)
        pieces: list[bytes] = []

        async def append_and_take(piece: bytes) -> None:
            await log.append(A, events(99))
            pieces.append(piece)

        await page(append_and_take)
        assert [one["timestamp"] for one in json.loads(b"".join(pieces))] == [*range(10)]

        async def delete_and_take(piece: bytes) -> None:
            (tmp_path / f"{A}.jsonl").unlink()
            await trio.lowlevel.checkpoint()

        with pytest.raises(EventsDeletedError, match=A):
            await page(delete_and_take)


async def test_page_of_a_vm_deleted_meanwhile_raises_events_deleted_error(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        await log.append(A, events(1))
        (tmp_path / f"{A}.jsonl").unlink()
        with pytest.raises(EventsDeletedError, match=A):
            await log.page(A, None, "asc", None)


async def test_start_removes_files_left_by_a_crash(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        await log.append(A, events(1))
        await log.append(B, events(2))
    for name in (A, f"{A}.jsonl.new", f"{A}.jsonl~", "x.txt"):
        (tmp_path / name).write_text("left over from a crash")
    async with running(tmp_path, A) as log:
        assert names(tmp_path) == {f"{A}.jsonl"}
        assert await all_of(log, A) == [1]
        assert await all_of(log, B) == []


async def test_event_file_is_readable_json_with_mode_0600(tmp_path: Path) -> None:
    directory = tmp_path / "events"
    async with running(directory) as log:
        await log.append(A, [event(1, "caf\u00e9")])
        await log.append(A, [event(2)])
    path = directory / f"{A}.jsonl"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["format"], header["version"], header["uid"]) == ("orchard-events", 1, A)
    assert [(line["n"], line["event"]["timestamp"]) for line in lines] == [(0, 1), (1, 2)]
    assert "caf\u00e9" in path.read_text()


async def test_directory_is_synced_before_its_files(tmp_path: Path) -> None:
    synced: list[Path] = []

    class Noting(Disk):
        def sync_directory(self, directory: Path) -> None:
            synced.append(directory)
            super().sync_directory(directory)

    async with running(tmp_path / "events", disk=Noting()) as log:
        await log.append(A, events(1))
        assert synced == [tmp_path, tmp_path / "events"]


# ---- damage and crashes --------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_file_cut_at_any_byte_keeps_its_complete_events(tmp_path: Path) -> None:
    async with running(tmp_path) as log:
        for number in range(3):
            await log.append(A, events(number))
    path = tmp_path / f"{A}.jsonl"
    data = path.read_bytes()
    for cut in range(data.index(b"\n") + 1, len(data) + 1):
        path.write_bytes(data[:cut])
        complete = data[:cut].count(b"\n") - 1
        async with running(tmp_path, A) as log:
            assert await all_of(log, A) == list(range(complete))
            await log.append(A, events(7))
            assert await found(log, A, complete + 1, "desc") == ([7, *range(complete)[::-1]], None)
        async with running(tmp_path, A) as log:
            assert await all_of(log, A) == [*range(complete), 7]


def lines_of(path: Path, *lines: dict[str, Any]) -> None:
    journal = Journal(path, Disk())
    journal.create([json.dumps(line).encode() for line in lines])
    journal.close()


HEADER = {"format": "orchard-events", "version": 1, "uid": A}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([{**HEADER, "uid": B}], f"the header is not that of orchard-events version 1 for uid {A} at byte 0; "),
        ([{**HEADER, "version": 2}], "not that of orchard-events version 1"),
        ([{**HEADER, "format": "orchard-state"}], "not that of orchard-events"),
        ([{"format": "orchard-events", "version": 1}], "not that of orchard-events"),
        ([HEADER, {"n": 0, "event": {}}, {"n": 2, "event": {}}], "event 2 follows event 0 at byte"),
        ([HEADER, {"event": {}}], "event None follows event -1"),
        ([], "the file has no header"),
    ],
)
def test_event_file_with_invalid_contents_is_refused(tmp_path: Path, lines: list[dict[str, Any]], told: str) -> None:
    path = tmp_path / f"{A}.jsonl"
    lines_of(path, *lines)
    with pytest.raises(DamagedError, match=re.escape(str(path))) as damaged:
        EventLog(*event_files(tmp_path)).open({A})
    assert told in str(damaged.value)


async def test_power_cut_at_any_moment_keeps_acknowledged_events(tmp_path: Path) -> None:
    directory, after = tmp_path / "events", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    order = random.Random(0)
    told: dict[str, int] = {A: 0, B: 0}
    begun: dict[str, int] = {A: 0, B: 0}
    seen: set[int] = set()

    def lost_power(image: Image) -> None:
        for path in after.iterdir():
            path.unlink()
        for name, content in image.items():
            (after / name).write_bytes(content)
        for uid, numbers in kept(after, A, B).items():
            assert numbers == list(range(len(numbers)))
            assert told[uid] <= len(numbers) <= begun[uid]
            seen.add(len(numbers) - told[uid])

    async with running(directory, disk=CrashDisk(directory, lost_power)) as log:
        for _ in range(12):
            uid = order.choice([A, B])
            count = order.randrange(1, 4)
            begun[uid] += count
            await log.append(uid, events(*range(told[uid], begun[uid])))
            told[uid] = begun[uid]
    assert seen == {0, 1, 2, 3}


class KilledError(Exception):
    """Ends the process at this point."""


@pytest.mark.parametrize("end", [KilledError(), OSError(errno.EIO, "an error of the disk")])
@pytest.mark.parametrize(("during", "count"), [("sync", 1), ("sync_directory", 0)])
async def test_power_cut_after_a_restart_keeps_what_the_restart_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Exception, during: str, count: int
) -> None:
    """Read data that a previous process may have left in the page cache only."""
    monkeypatch.setattr(orchard.storage.events, "BROKEN_DELAY", 0.0)
    directory, after = tmp_path / "events", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    told: list[int] = []
    seen: list[list[int]] = []

    def lost_power(image: Image) -> None:
        for path in after.iterdir():
            path.unlink()
        for name, content in image.items():
            (after / name).write_bytes(content)
        seen.append(kept(after, A)[A])
        assert seen[-1][: len(told)] == told

    async def be_cut_short() -> None:
        async with running(directory, A, disk=disk) as log:
            for number in range(count):
                await log.append(A, events(number))
            disk.faults[during] = end
            with suppress(StorageError):
                await log.append(A, events(count))

    disk = CrashDisk(directory, lost_power)
    with pytest.raises(KilledError if isinstance(end, KilledError) else BrokenError), unwrap_groups():
        await be_cut_short()
    disk.faults.clear()
    async with running(directory, A, disk=disk) as log:
        told = await all_of(log, A)
        disk.cut_power()
        await log.append(A, events(8))
        told = [*told, 8]
        disk.cut_power()
    assert seen[-1] == told


# ---- disks that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
async def test_full_disk_refuses_events_until_there_is_space(
    tmp_path: Path, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FailingDisk(torn=True)
    async with running(tmp_path, disk=disk) as log:
        await log.append(A, events(*range(first)))
        disk.fault = no_space
        for _ in range(3):
            with pytest.raises(StorageFullError, match="No space left on device; the events were not stored"):
                await log.append(A, events(8, 9))
            assert await all_of(log, A) == [*range(first)]
        disk.fault = lambda verb, number: errno.EIO if verb == "write" else 0
        with pytest.raises(StorageUnavailableError):
            await log.append(A, events(8))
        disk.fault = lambda verb, number: 0
        await log.append(A, events(5))
        assert await all_of(log, A) == [*range(first), 5]
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 4
    async with running(tmp_path, A) as log:
        assert await all_of(log, A) == [*range(first), 5]


async def test_failed_sync_ends_the_log_and_acknowledges_nothing(tmp_path: Path) -> None:
    disk = FailingDisk()

    async def live() -> None:
        async with running(tmp_path, disk=disk) as log:
            await log.append(A, events(0))
            await log.append(B, events(0))
            disk.fault = lambda verb, number: errno.EIO if verb == "sync" else 0
            with (
                trio.CancelScope(shield=True),
                pytest.raises(StorageUnavailableError, match="may not have been stored"),
            ):
                await log.append(A, events(1))

    with pytest.raises(BrokenError, match="uncertain"), unwrap_groups():
        await live()
    async with running(tmp_path, A, B) as log:
        assert await all_of(log, A) in ([0], [0, 1])
        assert await all_of(log, B) == [0]


async def test_file_that_cannot_be_unlinked_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as log:
        await log.append(A, events(1))
        (tmp_path / f"{A}.jsonl").unlink()
        # Not even root can unlink a directory.
        (tmp_path / f"{A}.jsonl").mkdir()
        log.drop(A)
        await log.append(B, events(1))
        assert f"cannot unlink {tmp_path / A}.jsonl" in caplog.text


async def test_events_beyond_the_limit_of_a_vm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.storage.event_storage, "MAX_EVENT_BYTES", 2_000)
    path = tmp_path / f"{A}.jsonl"
    count = 0
    async with running(tmp_path) as log:
        await log.append(A, events(0))
        while path.stat().st_size <= 2_000:
            count += 1
            await log.append(A, events(count))
        size = path.stat().st_size
        with pytest.raises(EventLimitError, match="have reached 2000 bytes"):
            await log.append(A, events(-1))
        await log.append(B, events(0))
        assert await all_of(log, A) == [*range(count + 1)]
    async with running(tmp_path, A, B) as log:
        with pytest.raises(EventLimitError):
            await log.append(A, events(-1))
        assert path.stat().st_size == size


def test_page_read_during_an_append_excludes_it(tmp_path: Path) -> None:
    """The writing thread may be between its write and its fsync: its bytes are in the file and not yet durable."""
    reached, going_on = threading.Event(), threading.Event()

    class Between(Disk):
        def sync(self, fd: int) -> None:
            reached.set()
            going_on.wait()
            super().sync(fd)

    async def main() -> None:
        async with running(tmp_path) as log:
            await log.append(A, events(0, 1))
        going_on.set()
        async with running(tmp_path, A, disk=Between()) as log, trio.open_nursery() as nursery:
            assert await all_of(log, A) == [0, 1]
            going_on.clear()
            reached.clear()
            try:
                nursery.start_soon(log.append, A, events(2, 3))
                await trio.to_thread.run_sync(reached.wait)
                assert await found(log, A, 5) == ([0, 1], None)
                assert await found(log, A, 1, "desc") == ([1], "aaaaaaaa-1")
            finally:
                going_on.set()

    trio.run(main)
    assert list(pairwise(kept(tmp_path, A)[A])) == [(0, 1), (1, 2), (2, 3)]
