"""The events of VMs: one append-only file of checked lines (journal.py) for each VM, beside the state.

`events/UID.jsonl` is created by a VM's first event, and unlinked some time after the VM was deleted. A start unlinks
files whose VM is gone: a crash left them. An append is durable before `append` returns. A single task, `run`, writes in
one pass what several clients append to several VMs at the same time.

In memory an event costs the eight bytes of its offset, so a page is one seek and one read wherever it begins. A cursor
holds the number of an event, which never changes: paging neither skips nor repeats events while others are appended.
"""

from __future__ import annotations

import logging
import re
from array import array
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trio

from orchard.codec import dump_json, encode, shown
from orchard.nursery import Wakeup
from orchard.schema import Event
from orchard.storage.errors import (
    BrokenError,
    DamagedError,
    NotWrittenError,
    StorageError,
    StorageUnavailableError,
)
from orchard.storage.journal import BROKEN_DELAY, Disk, Journal, line_length

# Version of the files.
_EVENTS_VERSION = 1
# Bytes of events of one VM: a script that logs without end must not fill the disk.
MAX_EVENT_BYTES = 64 * 1024 * 1024
# Bytes of events that are read at once, so that an answer which its client does not take holds no more.
BLOCK_BYTES = 64 * 1024
_EVENT = b'"event":'
# In the line of an event, what precedes it: its number, and the sum.
_HEAD_BYTES = 256
_CURSOR = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})")

# Sends a page of events, piece by piece, with the function that it is given.
SendPage = Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]]

_logger = logging.getLogger("orchard.storage.events")


class InvalidCursorError(Exception):
    """A cursor does not come from a page of this VM's events."""

    def __init__(self, cursor: str) -> None:
        super().__init__(
            f"cursor is {shown(cursor)}, expected the X-Next-Cursor of an earlier page of this VM's events"
        )


class EventLimitError(StorageError):
    """A VM's events have reached MAX_EVENT_BYTES."""


class EventsDeletedError(StorageError):
    """The VM was deleted, and its events with it."""

    def __init__(self, uid: str) -> None:
        super().__init__(f"the VM with uid {uid} was deleted")


class EventFile:
    """One VM's events on disk, and the offset of each. Its methods do disk I/O, for a thread."""

    def __init__(self, directory: Path, uid: str, disk: Disk) -> None:
        self.uid = uid
        self.journal = Journal(directory / f"{uid}.jsonl", disk)
        self.offsets = array("Q")
        # False: what was read may be in the page cache only, and must be synced before it is shown to a client.
        self.is_durable = True

    def load(self) -> None:
        """Read and check the file, and cut off what a crash left at its end. Raises DamagedError, OSError."""
        self.inspect()
        self.journal.open_for_append()
        self.journal.close()
        self.is_durable = not self.offsets

    def inspect(self) -> None:
        """Read and check the file, and change nothing. Raises DamagedError; FileNotFoundError."""
        lines = self.journal.read()
        first = next(lines, None)
        if first is None:
            raise DamagedError(self.journal.path, 0, "the file has no header")
        header = first[1]
        if any(header.get(name) != value for name, value in self._header().items()):
            what = f"the header is not that of orchard-events version {_EVENTS_VERSION} for uid {self.uid}"
            raise DamagedError(self.journal.path, 0, what)
        for offset, line in lines:
            if line.get("n") != len(self.offsets):
                what = f"event {line.get('n')} follows event {len(self.offsets) - 1}"
                raise DamagedError(self.journal.path, offset, what)
            self.offsets.append(offset)

    def _header(self) -> dict[str, Any]:
        return {"format": "orchard-events", "version": _EVENTS_VERSION, "uid": self.uid}

    def append(self, events: Sequence[Event]) -> None:
        """Append events, all or none; then all events of the file are durable. Raises NotWrittenError, BrokenError."""
        first, offset = len(self.offsets), self.journal.size
        lines = [b'{"n":%d,"event":%b}' % (first + i, dump_json(encode(event))) for i, event in enumerate(events)]
        try:
            if first == 0:
                header = dump_json(self._header())
                self.journal.create([header, *lines])
                offset = line_length(header)
            else:
                self.journal.append(lines)
            self.is_durable = True
        finally:
            # Thousands of VMs must not hold thousands of descriptors.
            self.journal.close()
        for line in lines:
            self.offsets.append(offset)
            offset += line_length(line)

    def blocks(self, start: int, stop: int) -> list[range]:
        """Return the events number `start` to `stop` - 1 in blocks of BLOCK_BYTES, or of one event that is longer."""
        blocks = []
        end = self._end(stop - 1)
        while start < stop:
            limit = self.offsets[start] + BLOCK_BYTES
            after = stop if end <= limit else bisect_right(self.offsets, limit, start, stop) - 1
            blocks.append(range(start, max(start + 1, after)))
            start = blocks[-1].stop
        return blocks

    def read(self, block: range) -> list[bytes]:
        """Return the JSON of each event of a block."""
        with self.journal.path.open("rb") as file:
            file.seek(self.offsets[block.start])
            lines = file.read(self.size_of(block)).split(b"\n")
        # They may be followed by events that are being appended and are not durable yet.
        return [line.split(_EVENT, 1)[1][:-1] for line in lines[: len(block)]]

    def read_part(self, number: int, at: int) -> bytes:
        """Return BLOCK_BYTES of one event's JSON from its byte `at`; empty at its end."""
        with self.journal.path.open("rb") as file:
            file.seek(self.offsets[number])
            begin = file.read(_HEAD_BYTES).index(_EVENT) + len(_EVENT)
            file.seek(self.offsets[number] + begin + at)
            # The line ends with a brace and its newline.
            part = file.read(BLOCK_BYTES + 2)
        end = part.find(b"\n")
        return part[: BLOCK_BYTES if end < 0 else end - 1]

    def size_of(self, block: range) -> int:
        """Return how many bytes of the file a block takes."""
        return self._end(block.stop - 1) - self.offsets[block.start]

    def _end(self, number: int) -> int:
        """Return where the line of an event ends."""
        return self.offsets[number + 1] if number + 1 < len(self.offsets) else self.journal.size


@dataclass(slots=True)
class _Append:
    """Events of one VM that are written together, and what those who wait for them are told."""

    events: list[Event] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    error: StorageError | None = None


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of one VM's events, the earliest first, whose end is on the disk."""

    file: EventFile
    blocks: Sequence[range]
    descending: bool
    in_thread: Callable[..., Awaitable[Any]]

    async def send(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send a JSON array of the events. Raises EventsDeletedError."""
        before = b"["
        for block in reversed(self.blocks) if self.descending else self.blocks:
            if self.is_long(block):
                await send(before)
                at = 0
                while part := await self._call(self.file.read_part, block.start, at):
                    await send(part)
                    at += len(part)
            else:
                await send(before + await self.read(block))
            before = b","
        await send(b"]")

    async def read(self, block: range) -> bytes:
        """Return the JSON of a block's events in their order, separated by commas. Raises EventsDeletedError."""
        texts: list[bytes] = await self._call(self.file.read, block)
        if self.descending:
            texts.reverse()
        return b",".join(texts)

    def is_long(self, block: range) -> bool:
        """Return whether a block is one event that is read in parts."""
        return len(block) == 1 and self.file.size_of(block) > BLOCK_BYTES

    async def _call(self, read: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await self.in_thread(read, *arguments)
        except FileNotFoundError:
            raise EventsDeletedError(self.file.uid) from None


class EventLog:
    """The events of all VMs, in `directory`. `run` must be running for `append` to return.

    Disk I/O is done by `in_thread`, except that of `open`.
    """

    def __init__(
        self,
        directory: Path,
        disk: Disk | None = None,
        in_thread: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self._directory = directory
        self._disk = disk or Disk()
        self._in_thread = in_thread
        self._files: dict[str, EventFile] = {}
        self._appends: dict[str, _Append] = {}
        self._dropped: list[str] = []
        self._wakeup = Wakeup()
        # Why nothing can be appended any more; empty while the log works.
        self._broken = ""

    def open(self, uids: Container[str]) -> None:
        """Load the events of the VMs with these uids, and unlink those of others. Does disk I/O.

        Raises DamagedError, OSError.
        """
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700)
            # The umask may have taken bits from the mode.
            self._directory.chmod(0o700)
            self._disk.sync_directory(self._directory.parent)
        else:
            # The last process may have been killed before it did.
            self._disk.sync_directory(self._directory)
        for path in sorted(self._directory.iterdir()):
            uid = path.name.removesuffix(".jsonl")
            if uid == path.name or uid not in uids:
                # Loading a file has removed its draft already.
                path.unlink(missing_ok=True)
                continue
            file = EventFile(self._directory, uid, self._disk)
            file.load()
            self._files[uid] = file

    async def append(self, uid: str, events: Sequence[Event]) -> None:
        """Append events to a VM's, in their order; they are durable when this returns.

        Raises StorageFullError, StorageUnavailableError, EventLimitError; EventsDeletedError when the VM was deleted
        meanwhile.
        """
        if events:
            await self._write_durably(uid, events)

    async def _write_durably(self, uid: str, events: Sequence[Event]) -> None:
        if self._broken:
            raise StorageUnavailableError(self._broken)
        append = self._appends.setdefault(uid, _Append())
        append.events.extend(events)
        self._wakeup.set()
        await append.done.wait()
        if append.error is not None:
            raise append.error

    def drop(self, uid: str) -> None:
        """Forget a VM's events, and have their file unlinked."""
        append = self._appends.pop(uid, None)
        if append is not None:
            append.error = EventsDeletedError(uid)
            append.done.set()
        self._dropped.append(uid)
        self._wakeup.set()

    async def page(
        self, uid: str, limit: int | None, order: Literal["asc", "desc"], cursor: str | None
    ) -> tuple[bytes | SendPage, str | None]:
        """Return (a JSON array of events, the cursor of the next page or None after the last).

        Without a `limit` the page has all events. A page that is longer than BLOCK_BYTES is returned as a function that
        reads it block by block, and sends each with the function that it is given. Raises InvalidCursorError;
        EventsDeletedError when the VM was deleted meanwhile, and so does that function; StorageFullError or
        StorageUnavailableError when it is not known whether the events are on the disk.
        """
        file = self._files.get(uid)
        # Of thousands of files, only those that are read are synced after a start.
        if file is not None and not file.is_durable:
            await self._write_durably(uid, ())
        count = len(file.offsets) if file is not None else 0
        at = _position(uid, cursor, count, order)
        if order == "asc":
            start, stop = at, count if limit is None else min(count, at + limit)
            following = stop if stop < count else None
        else:
            start, stop = 0 if limit is None else max(0, at - limit), at
            following = start if start > 0 else None
        if file is None or start >= stop:
            return b"[]", None
        next_cursor = None if following is None else f"{uid[:8]}-{following}"
        pages = _Blocks(file, file.blocks(start, stop), order == "desc", self._in_thread)
        if len(pages.blocks) > 1 or pages.is_long(pages.blocks[0]):
            return pages.send, next_cursor
        return b"[%b]" % await pages.read(pages.blocks[0]), next_cursor

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is appended until cancelled. Raises BrokenError when it is not known what the disk holds."""
        task_status.started()
        while True:
            await self._wakeup.wait()
            appends, self._appends = self._appends, {}
            dropped, self._dropped = self._dropped, []
            for uid in appends:
                if uid not in self._files:
                    self._files[uid] = EventFile(self._directory, uid, self._disk)
            # Shielded: the write goes on in its thread, and those who wait for it must be told.
            with trio.CancelScope(shield=True):
                broken = await self._in_thread(self._write, appends, dropped)
            for uid in dropped:
                self._files.pop(uid, None)
            for append in appends.values():
                append.done.set()
            if broken is not None:
                self._broken = f"no events can be stored any more: {broken}; restart the controller"
                # The answers that say so leave before the process ends.
                with trio.CancelScope(shield=True):
                    await trio.sleep(BROKEN_DELAY)
                raise broken

    def _write(self, appends: dict[str, _Append], dropped: list[str]) -> BrokenError | None:
        broken = None
        for uid, append in appends.items():
            file = self._files[uid]
            try:
                if append.events and file.journal.size > MAX_EVENT_BYTES:
                    what = f"the VM's events have reached {MAX_EVENT_BYTES} bytes; no more are stored"
                    append.error = EventLimitError(what)
                else:
                    file.append(append.events)
            except NotWrittenError as error:
                _logger.error("events were not stored: %s", error)
                append.error = error.as_storage_error("the events were not stored")
            except BrokenError as error:
                broken = error
                append.error = StorageUnavailableError(f"the events may not have been stored: {error}")
        for uid in dropped:
            path = self._directory / f"{uid}.jsonl"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("cannot unlink %s: %s; the next start will", path, error)
        return broken


def _position(uid: str, cursor: str | None, count: int, order: Literal["asc", "desc"]) -> int:
    if cursor is None:
        return 0 if order == "asc" else count
    match = _CURSOR.fullmatch(cursor)
    if match is None or match[1] != uid[:8] or int(match[2]) > count:
        raise InvalidCursorError(cursor)
    return int(match[2])
