"""Files of small records, by the history and the lifecycle events: bounds, torn writes, power cuts, disks that fail."""

from __future__ import annotations

import datetime
import errno
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import CrashDisk, FailingDisk, HeldDisk, Image, SmallDisk, UnsyncedDisk, fails_at, no_space
from harness.strategies import BEGAN

import orchard.storage.history
import orchard.storage.records
from orchard.base.files import HISTORY_FILE
from orchard.base.nursery import unwrap_groups
from orchard.schema import EndedVM
from orchard.storage.errors import BrokenError, DamagedError
from orchard.storage.history import History, history_file
from orchard.storage.journal import Disk, Journal
from orchard.storage.lifecycle import LifecycleLog, WaitingEvent, lifecycle_file, lifecycle_json
from orchard.storage.records import BatchedRecords, RecordFile

A = "aaaaaaaa-0000-4000-8000-000000000000"


def ended(number: int) -> EndedVM:
    return EndedVM(name=f"vm-{number}", uid=str(number), ended_at=BEGAN + datetime.timedelta(seconds=number))


async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do the work of a thread at once, so that a test knows when it is done."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


def stored_count(records: BatchedRecords[Any]) -> int:
    """Return the number of records in a file, outdated ones included."""
    assert isinstance(records.stored, RecordFile)
    return records.stored.count


@asynccontextmanager
async def running(directory: Path, disk: Disk | None = None) -> AsyncIterator[History]:
    history = History(history_file(directory, disk or UnsyncedDisk(), inline))
    history.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(history.run)
        yield history
        nursery.cancel_scope.cancel()


def shown(history: History) -> list[int]:
    return [int(json.loads(text)["uid"]) for text in history.select(None, None)]


def kept(directory: Path) -> list[int]:
    """Return what a restart finds."""
    history = History(history_file(directory, UnsyncedDisk(), inline))
    history.open()
    return shown(history)


async def test_records_are_written_together_some_time_later(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    disk = FailingDisk()
    async with running(tmp_path, disk) as history:
        history.add(ended(0))
        history.add(ended(1))
        await trio.testing.wait_all_tasks_blocked()
        assert (shown(history), disk.calls) == ([], [])
        await trio.sleep(1.5 * orchard.storage.records.WRITE_DELAY)
        assert shown(history) == kept(tmp_path) == [0, 1]
        assert disk.calls.count("sync") == 1


async def test_flush_writes_at_once_and_a_restart_finds_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    for number in range(5):
        async with running(tmp_path) as history:
            history.add(ended(number))
            await history.flush()
            assert shown(history) == [*range(number + 1)]
    assert trio.current_time() == began
    assert (tmp_path / HISTORY_FILE).stat().st_mode & 0o777 == 0o600


async def test_history_is_bounded_in_memory_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.storage.history, "MAX_ENDED", 20)
    monkeypatch.setattr(orchard.storage.records, "_SLACK", 10)
    largest = 0
    async with running(tmp_path) as history:
        for number in range(300):
            history.add(ended(number))
            await history.flush()
            largest = max(largest, stored_count(history))
        assert shown(history) == [*range(280, 300)]
    assert kept(tmp_path) == [*range(280, 300)]
    assert 20 < largest <= 2 * 20 + 10


async def test_history_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.storage.history, "MAX_BYTES", 1_000)
    async with running(tmp_path) as history:
        for number in range(50):
            history.add(ended(number))
        await history.flush()
        texts = history.select(None, None)
        assert 900 < sum(map(len, texts)) <= 1_000
        assert shown(history)[-1] == 49


@pytest.mark.slow
async def test_file_cut_at_any_byte_keeps_its_complete_batches(tmp_path: Path) -> None:
    async with running(tmp_path) as history:
        for batch in ([0], [1, 2], [3, 4, 5]):
            for number in batch:
                history.add(ended(number))
            await history.flush()
    path = tmp_path / HISTORY_FILE
    data = path.read_bytes()
    complete = [[], [0], [0, 1, 2], [0, 1, 2, 3, 4, 5]]
    for cut in range(data.index(b"\n") + 1, len(data) + 1):
        path.write_bytes(data[:cut])
        expected = complete[data[:cut].count(b"\n") - 1]
        async with running(tmp_path) as history:
            assert shown(history) == expected
            history.add(ended(7))
            await history.flush()
        assert kept(tmp_path) == [*expected, 7]


async def test_power_cut_at_any_moment_loses_at_most_what_was_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the file is replaced now and then.
    monkeypatch.setattr(orchard.storage.history, "MAX_ENDED", 6)
    monkeypatch.setattr(orchard.storage.records, "_SLACK", 2)
    directory, after = tmp_path / "data", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    told: list[int] = []
    begun: list[int] = []
    seen: set[int] = set()

    def lost_power(image: Image) -> None:
        for path in after.iterdir():
            path.unlink()
        for name, content in image.items():
            (after / name).write_bytes(content)
        numbers = kept(after)
        assert numbers in (told[-6:], begun[-6:])
        seen.add(len(begun) - len(told))

    disk = CrashDisk(directory, lost_power)
    async with running(directory, disk) as history:
        for count in (1, 2, 3, 1, 2, 3, 1, 2, 3):
            batch = [*range(len(begun), len(begun) + count)]
            begun += batch
            for number in batch:
                history.add(ended(number))
            await history.flush()
            told = [*begun]
            assert shown(history) == told[-6:]
    assert disk.renamings > 1
    assert seen == {1, 2, 3}


async def test_records_wait_while_the_disk_is_full(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FailingDisk(torn=True)
    async with running(tmp_path, disk) as history:
        history.add(ended(0))
        await history.flush()
        disk.fault = no_space
        history.add(ended(1))
        await history.flush()
        history.add(ended(2))
        await history.flush()
        assert shown(history) == [0]
        disk.fault = lambda verb, number: 0
        await trio.sleep(20)
        assert shown(history) == kept(tmp_path) == [0, 1, 2]
    assert len(caplog.records) == 1


async def test_oldest_records_are_lost_when_the_disk_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(orchard.storage.records, "MAX_UNWRITTEN", 3)
    disk = FailingDisk()
    disk.fault = no_space
    async with running(tmp_path, disk) as history:
        for number in range(10):
            history.add(ended(number))
            await trio.sleep(20)
        disk.fault = lambda verb, number: 0
        await trio.sleep(20)
        assert shown(history) == [7, 8, 9]


async def test_file_that_finds_no_space_for_its_replacement_is_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchard.storage.history, "MAX_ENDED", 20)
    monkeypatch.setattr(orchard.storage.records, "_SLACK", 10)
    disk = SmallDisk(tmp_path, 8_000)
    async with running(tmp_path, disk) as history:
        for number in range(60):
            history.add(ended(number))
            await history.flush()
        assert disk.refused
        assert shown(history) == [*range(40, 60)]
    assert kept(tmp_path) == [*range(40, 60)]


@pytest.mark.parametrize("call", range(8))
async def test_each_failing_disk_call_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, call: int
) -> None:
    monkeypatch.setattr(orchard.storage.records, "BROKEN_DELAY", 0.0)
    disk = FailingDisk(torn=True)
    disk.fault = fails_at(call, errno.EIO)

    async def write() -> None:
        async with running(tmp_path, disk) as history:
            for number in range(3):
                history.add(ended(number))
                await history.flush()
            await trio.sleep(20)

    try:
        with unwrap_groups():
            await write()
    except BrokenError:
        numbers = kept(tmp_path)
        assert numbers == [*range(len(numbers))]
    else:
        assert kept(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"format": "orchard-lifecycle", "version": 1}],
        [{"format": "orchard-history", "version": 2}],
        [{"format": "orchard-history", "version": 1}, {"records": [{"name": "x"}]}],
        [{"format": "orchard-history", "version": 1}, {"records": ["x"]}],
        [{"format": "orchard-history", "version": 1}, {"record": {}}],
    ],
)
def test_history_with_invalid_contents_is_refused(tmp_path: Path, lines: list[Any]) -> None:
    path = tmp_path / HISTORY_FILE
    journal = Journal(path, Disk())
    journal.create([json.dumps(line).encode() for line in lines])
    journal.close()
    before = path.read_bytes()
    with pytest.raises(DamagedError, match=HISTORY_FILE):
        History(history_file(tmp_path)).open()
    assert path.read_bytes() == before


@pytest.mark.parametrize("numbers", [[0, 2], [0, 0], [1, 0]])
def test_lifecycle_events_that_do_not_follow_each_other_are_refused(tmp_path: Path, numbers: list[int]) -> None:
    path = tmp_path / "lifecycle.jsonl"
    journal = Journal(path, Disk())
    records = [{"uid": A, "n": number, "after": 0, "event": {}} for number in numbers]
    lines = [{"format": "orchard-lifecycle", "version": 1}, {"records": records}]
    journal.create([json.dumps(line).encode() for line in lines])
    journal.close()
    with pytest.raises(DamagedError, match=A):
        LifecycleLog(lifecycle_file(path.parent)).open({A})


async def test_file_of_lifecycle_events_is_bounded_while_vms_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchard.storage.records, "_SLACK", 10)
    path = tmp_path / "lifecycle.jsonl"
    log = LifecycleLog(lifecycle_file(path.parent, UnsyncedDisk(), inline))
    log.open(())
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        for number in range(200):
            log.add(WaitingEvent(f"vm-{number}", 0, lifecycle_json("created", 1)))
            log.add(WaitingEvent(A, number, lifecycle_json("restarted", number)))
            await log.flush()
            log.drop(f"vm-{number}")
            assert stored_count(log) <= 2 * 65 + 10 + 2
        nursery.cancel_scope.cancel()
    restarted = LifecycleLog(lifecycle_file(path.parent, UnsyncedDisk(), inline))
    restarted.open({A})
    assert [(event.number, event.after) for event in restarted.of(A).events] == [(n, n) for n in range(136, 200)]


async def test_lifecycle_events_of_a_vm_dropped_during_their_write_are_forgotten(tmp_path: Path) -> None:
    disk = HeldDisk()
    log = LifecycleLog(lifecycle_file(tmp_path, disk))
    log.open(())
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        with disk.held():
            for uid in (A, "other"):
                log.add(WaitingEvent(uid, 0, lifecycle_json("created", 1)))
            nursery.start_soon(log.flush)
            await trio.testing.wait_all_tasks_blocked()
            assert [event.uid for event in log.waiting(A)] == [A]
            log.drop(A)
        await log.flush()
        assert (len(log.of(A).events), len(log.of("other").events)) == (0, 1)
        nursery.cancel_scope.cancel()
