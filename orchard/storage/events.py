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
_CURSOR = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})")

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

    def read(self, start: int, stop: int, end: int) -> list[bytes]:
        """Return the JSON of the events number `start` to `stop` - 1, from the first `end` bytes of the file."""
        if start >= stop:
            return []
        first = self.offsets[start]
        last = self.offsets[stop] if stop < len(self.offsets) else end
        with self.journal.path.open("rb") as file:
            file.seek(first)
            block = file.read(last - first)
        # The block may end with events that are being appended and are not durable yet.
        return [line.split(b'"event":', 1)[1][:-1] for line in block.split(b"\n")[: stop - start]]


@dataclass(slots=True)
class _Append:
    """Events of one VM that are written together, and what those who wait for them are told."""

    events: list[Event] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    error: StorageError | None = None


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
    ) -> tuple[bytes, str | None]:
        """Return (a JSON array of events, the cursor of the next page or None after the last).

        Without a `limit` the page has all events. Raises InvalidCursorError; EventsDeletedError when the VM was deleted meanwhile;
        StorageFullError or StorageUnavailableError when it is not known whether the events are on the disk.
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
        try:
            texts = await self._in_thread(file.read, start, stop, file.journal.size)
        except FileNotFoundError:
            raise EventsDeletedError(uid) from None
        if order == "desc":
            texts.reverse()
        return b"[%b]" % b",".join(texts), None if following is None else f"{uid[:8]}-{following}"

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
