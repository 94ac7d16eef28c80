"""Log lines and lifecycle events together: paging and following them, while others are written and through restarts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import UnsyncedDisk
from harness.strategies import QUICK
from hypothesis import given
from hypothesis import strategies as st

import orchard.storage.event_file
import orchard.storage.events
from orchard.schema import Event
from orchard.storage.event_pages import EventKinds, InvalidCursorError
from orchard.storage.events import EventLog, event_files

A = "aaaaaaaa-0000-4000-8000-000000000000"
BOTH = EventKinds.of(["lifecycle", "log_line"])
KINDS = {
    "": EventKinds(),
    "log_line": EventKinds.of(["log_line"]),
    "lifecycle": EventKinds.of(["lifecycle"]),
    "both": BOTH,
}
SHOWN = {
    "": {"log_line", "other"},
    "log_line": {"log_line"},
    "lifecycle": {"lifecycle"},
    "both": {"log_line", "lifecycle"},
}


async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
    """Do the work of a thread at once, so that a test knows when it is done."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


async def never() -> bool:
    await trio.lowlevel.checkpoint()
    return False


@dataclass
class Reader:
    """A client that follows the events of a VM, and goes on after its last line when the log was restarted."""

    kinds: str
    events: list[dict[str, Any]] = field(default_factory=list)
    # Of a line that has not come whole. A long event comes in parts.
    part: bytes = b""

    async def read(self, log: EventLog) -> None:
        self.part = b""
        cursor = self.events[-1]["cursor"] if self.events else None
        follower = await log.follow(A, cursor, KINDS[self.kinds])
        await follower.send_to(self.take, never, 1e9)

    async def take(self, piece: bytes) -> None:
        await trio.lowlevel.checkpoint()
        *lines, self.part = (self.part + piece).split(b"\n")
        self.events += map(json.loads, lines)

    def of(self, kind: str) -> list[int]:
        return [event["timestamp"] for event in self.events if event["kind"] == kind]


class Model:
    """A log of one VM's events that is followed and restarted, and what must be in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.numbers = 0
        self.written: dict[str, list[int]] = {"log_line": [], "other": [], "lifecycle": []}
        self.readers: list[Reader] = []
        self.log = EventLog(*event_files(directory, UnsyncedDisk(), inline))

    def run(self, steps: list[Any]) -> None:
        """Carry out steps, with a restart or a kill between two lists of them."""
        remaining = [*steps]
        while remaining or not self.numbers:
            trio.run(self._live, remaining)
        trio.run(self._finish)

    async def _live(self, steps: list[Any]) -> None:
        self.log = EventLog(*event_files(self.directory, UnsyncedDisk(), inline))
        self.log.open({A})
        async with trio.open_nursery() as nursery:
            await nursery.start(self.log.run)
            # A kill loses lifecycle events that were not written, none that was shown.
            found = [event["timestamp"] for event in await self._page(KINDS["lifecycle"])]
            assert found == self.written["lifecycle"][: len(found)]
            self.written["lifecycle"] = found
            for reader in self.readers:
                nursery.start_soon(reader.read, self.log)
            while steps:
                match steps.pop(0):
                    case "kill":
                        break
                    case "restart":
                        await self.log.flush()
                        break
                    case ("follow", str(kinds)):
                        self.readers.append(Reader(kinds))
                        nursery.start_soon(self.readers[-1].read, self.log)
                    case (str(kind), int(count)):
                        await self._write(kind, count)
                    case "settle":
                        await trio.testing.wait_all_tasks_blocked()
            self.numbers += not self.numbers
            nursery.cancel_scope.cancel()

    async def _write(self, kind: str, count: int) -> None:
        numbers = [*range(self.numbers, self.numbers + count)]
        self.numbers += count
        self.written[kind] += numbers
        if kind == "lifecycle":
            for number in numbers:
                self.log.record(A, "x", number)
            self.log.wake(A)
        else:
            await self.log.append(
                A, [Event(kind=kind, timestamp=number, payload="y" * (number % 70)) for number in numbers]
            )

    async def _page(self, kinds: EventKinds, **page: Any) -> list[dict[str, Any]]:
        given = {"limit": None, "order": "asc", "cursor": None, **page}
        answer, _ = await self.log.page(A, given["limit"], given["order"], given["cursor"], kinds)
        if isinstance(answer, bytes):
            return list(json.loads(answer))
        pieces: list[bytes] = []

        async def take(piece: bytes) -> None:
            await trio.lowlevel.checkpoint()
            pieces.append(piece)

        await answer(take)
        return list(json.loads(b"".join(pieces)))

    async def _finish(self) -> None:
        """Let the readers read all, delete the VM, and compare."""
        self.log = EventLog(*event_files(self.directory, UnsyncedDisk(), inline))
        self.log.open({A})
        async with trio.open_nursery() as nursery:
            await nursery.start(self.log.run)
            self.written["lifecycle"] = [e["timestamp"] for e in await self._page(KINDS["lifecycle"])]
            whole = await self._page(BOTH)
            assert await self._page(BOTH, order="desc") == whole[::-1]
            for kinds, shown in SHOWN.items():
                page = await self._page(KINDS[kinds])
                assert {event["kind"] for event in page} <= shown
                for kind in shown:
                    assert [e["timestamp"] for e in page if e["kind"] == kind] == self.written[kind]
            async with trio.open_nursery() as readers:
                for reader in self.readers:
                    readers.start_soon(reader.read, self.log)
                await trio.testing.wait_all_tasks_blocked()
                await self._write("log_line", 1)
                self.log.record(A, "x", self.numbers)
                self.written["lifecycle"].append(self.numbers)
                self.log.drop(A)
            for reader in self.readers:
                for kind, numbers in self.written.items():
                    assert reader.of(kind) == (numbers if kind in SHOWN[reader.kinds] else [])
            await trio.testing.wait_all_tasks_blocked()
            assert not list(self.directory.glob("*-*.jsonl"))
            nursery.cancel_scope.cancel()


STEPS = st.one_of(
    st.tuples(st.sampled_from(["log_line", "other", "lifecycle"]), st.integers(1, 3)),
    st.tuples(st.just("follow"), st.sampled_from([*KINDS])),
    st.sampled_from(["settle", "restart", "kill"]),
)


@pytest.mark.slow
@QUICK
@given(st.lists(STEPS, max_size=14), st.sampled_from([50, 300, 64 * 1024]))
def test_followers_are_sent_each_event_once_through_restarts_and_kills(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], block_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orchard.storage.event_file, "BLOCK_BYTES", block_bytes)
        Model(tmp_path_factory.mktemp("events")).run(steps)


@pytest.mark.slow
@QUICK
@given(
    st.lists(st.tuples(st.sampled_from(["log_line", "lifecycle"]), st.integers(1, 3)), max_size=6),
    st.integers(1, 4),
    st.sampled_from(["asc", "desc"]),
    st.lists(st.tuples(st.sampled_from(["log_line", "lifecycle"]), st.integers(1, 3)), max_size=6),
)
def test_paging_both_sorts_neither_skips_nor_repeats_while_others_are_written(
    tmp_path_factory: pytest.TempPathFactory, before: list[Any], limit: int, order: Any, meanwhile: list[Any]
) -> None:
    async def main() -> None:
        model = Model(tmp_path_factory.mktemp("events"))
        model.log.open({A})
        async with trio.open_nursery() as nursery:
            await nursery.start(model.log.run)
            for kind, count in before:
                await model._write(kind, count)
            expected = {kind: [*numbers] for kind, numbers in model.written.items()}
            found: list[dict[str, Any]] = []
            cursor = None
            while True:
                page, cursor = await model.log.page(A, limit, order, cursor, BOTH)
                assert isinstance(page, bytes)
                found += json.loads(page)
                if cursor is None:
                    break
                if meanwhile:
                    await model._write(*meanwhile.pop())
            for kind in ("log_line", "lifecycle"):
                numbers = [event["timestamp"] for event in found if event["kind"] == kind]
                assert numbers == (expected[kind][::-1] if order == "desc" else model.written[kind][: len(numbers)])
                assert len(numbers) >= len(expected[kind])
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("cursor", ["aaaaaaaa-1-2", "aaaaaaaa-2-0", "aaaaaaaa-0-0-0", "aaaaaaaa-0-", "aaaaaaaa-0-x"])
async def test_cursor_beyond_the_events_of_either_sort_is_refused(tmp_path: Path, cursor: str) -> None:
    log = EventLog(*event_files(tmp_path, UnsyncedDisk(), inline))
    log.open({A})
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        log.record(A, "created", 1)
        await log.append(A, [Event(kind="log_line", timestamp=1)])
        with pytest.raises(InvalidCursorError):
            await log.follow(A, cursor, BOTH)
        nursery.cancel_scope.cancel()


async def test_slow_follower_holds_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.storage.event_file, "BLOCK_BYTES", 1_000)
    log = EventLog(*event_files(tmp_path, UnsyncedDisk(), inline))
    log.open({A})
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        read: list[int] = []
        original = orchard.storage.event_file.EventFile.read_block

        def counted(file: Any, block: range) -> list[bytes]:
            read.append(len(block))
            return original(file, block)

        monkeypatch.setattr(orchard.storage.event_file.EventFile, "read_block", counted)
        await log.append(A, [Event(kind="log_line", timestamp=n, payload="x" * 90) for n in range(500)])
        taken = trio.Event()

        async def take_nothing(piece: bytes) -> None:
            await taken.wait()

        follower = await log.follow(A, None, BOTH)
        nursery.start_soon(follower.send_to, take_nothing, never, 1e9)
        for number in range(20):
            await log.append(A, [Event(kind="log_line", timestamp=number)])
            await trio.testing.wait_all_tasks_blocked()
        assert 0 < sum(read) < 20
        nursery.cancel_scope.cancel()


async def test_follower_that_never_starts_keeps_no_file(tmp_path: Path) -> None:
    log = EventLog(*event_files(tmp_path, UnsyncedDisk(), inline))
    log.open({A})
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run)
        await log.append(A, [Event(kind="log_line", timestamp=1)])
        follower = await log.follow(A, None, BOTH)
        log.drop(A)
        await trio.testing.wait_all_tasks_blocked()
        assert list(tmp_path.glob("*-*.jsonl"))
        del follower
        await trio.testing.wait_all_tasks_blocked()
        assert not list(tmp_path.glob("*-*.jsonl"))
        nursery.cancel_scope.cancel()
