"""The events of VMs: an append-only file for each VM (event_file.py), and lifecycle events in one file (lifecycle.py).

`events/UID.jsonl` is created by a VM's first event, and unlinked some time after the VM was deleted. A start unlinks
files whose VM is gone: a crash left them. An append is durable before `append` returns. A single task writes in one pass
what several clients append to several VMs at the same time.

event_pages.py selects what a page shows. A follower is sent what is there and then what comes. The file of a deleted VM
stays until its followers have read it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import trio

from orchard.files import LIFECYCLE_FILE
from orchard.nursery import Wakeup
from orchard.schema import Event
from orchard.storage.errors import BrokenError, NotWrittenError, StorageError, StorageUnavailableError
from orchard.storage.event_file import EventFile
from orchard.storage.event_pages import (
    EventKinds,
    EventsDeletedError,
    EventView,
    Position,
    Send,
    SendPage,
    count_events,
    position_after,
    position_before,
    take,
)
from orchard.storage.journal import BROKEN_DELAY, Disk
from orchard.storage.lifecycle import LifecycleLog, VMLifecycle, WaitingEvent, lifecycle_json
from orchard.storage.records import RunInThread

# Bytes of events of one VM: a script that logs without end must not fill the disk.
MAX_EVENT_BYTES = 64 * 1024 * 1024
# For a follower to take what is left when its VM was deleted.
_LEFT_SECONDS = 60.0
_ALL_KINDS = EventKinds()

_logger = logging.getLogger("orchard.storage.events")


class EventLimitError(StorageError):
    """A VM's events have reached MAX_EVENT_BYTES."""


@dataclass(slots=True)
class _Append:
    """Events of one VM that are written together, and what those who wait for them are told."""

    events: list[Event] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    error: StorageError | None = None


class EventFollower:
    """Sends the events of one VM as they come. Made by `EventLog.follow`; `send_to` is called once."""

    def __init__(self, log: EventLog, view: EventView, position: Position) -> None:
        # Set when there may be something new.
        self.wakeup = Wakeup()
        # What remains when the VM was deleted.
        self.left: EventView | None = None
        self._log = log
        self._uid = view.uid
        self._kinds = view.kinds
        self._in_thread = view.in_thread
        self._position = position

    def leave(self, file: EventFile | None, lifecycle: VMLifecycle) -> None:
        """Take over the events of a VM that was deleted."""
        self.left = EventView(self._uid, file, lifecycle, self._kinds, self._in_thread)
        self.wakeup.set()

    async def send_to(self, send: Send, is_over: Callable[[], Awaitable[bool]], silence: float) -> None:
        """Send each event as a line, until the VM is deleted or `is_over()` at the latest of its changes.

        After each `silence` seconds without an event an empty line is sent. An event that was written before the end is
        sent, unless the VM was deleted and the client takes longer than _LEFT_SECONDS.
        """
        try:
            while self.left is None:
                over = await is_over()
                if self._kinds.lifecycle:
                    await self._log.flush()
                await self._send_new(send)
                if over:
                    return
                with trio.move_on_after(silence) as waiting:
                    await self.wakeup.wait()
                if waiting.cancelled_caught:
                    await send(b"\n")
            with trio.move_on_after(_LEFT_SECONDS):
                await self._send_new(send)
        except EventsDeletedError:
            # Its file is kept for followers, unless a person removes it.
            return
        finally:
            self._log.forget(self._uid, self)

    async def _send_new(self, send: Send) -> None:
        view = self.left or self._log.view(self._uid, self._kinds)
        pieces = view.select(self._position, view.end)
        await view.send_lines(self._position, view.blocks(pieces), send)
        self._position = position_after(self._position, pieces)


class EventLog:
    """The events of all VMs, in `directory`. `run` must be running for `append` to return.

    Disk I/O is done by `in_thread`, except that of `open`.
    """

    def __init__(
        self, directory: Path, disk: Disk | None = None, in_thread: RunInThread = trio.to_thread.run_sync
    ) -> None:
        self._directory = directory
        self._disk = disk or Disk()
        self._in_thread = in_thread
        self._files: dict[str, EventFile] = {}
        self._lifecycle = LifecycleLog(directory / LIFECYCLE_FILE, self._disk, in_thread, self.wake)
        self._appends: dict[str, _Append] = {}
        self._dropped: list[str] = []
        self._wakeup = Wakeup()
        # By uid: the followers, and what remains of the lifecycle events of a VM that was deleted.
        self._followers: dict[str, list[weakref.ref[EventFollower]]] = {}
        self._left: dict[str, VMLifecycle] = {}
        # Why nothing can be appended any more; empty while the log works.
        self._broken = ""

    def open(self, uids: Container[str]) -> None:
        """Load the events of the VMs with these uids, and unlink those of others. Does disk I/O.

        Raises DamagedError, OSError; BrokenError when it is not known whether the disk holds the lifecycle events.
        """
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700)
            # The umask may have taken bits from the mode.
            self._directory.chmod(0o700)
            self._disk.sync_directory(self._directory.parent)
        else:
            # The last process may have been killed before it did.
            self._disk.sync_directory(self._directory)
        self._lifecycle.open(uids)
        for path in sorted(self._directory.iterdir()):
            uid = path.name.removesuffix(".jsonl")
            if path.name == LIFECYCLE_FILE:
                continue
            if uid == path.name or uid not in uids:
                # Loading a file has removed its draft already.
                path.unlink(missing_ok=True)
                continue
            file = EventFile(self._directory, uid, self._disk)
            file.load()
            self._files[uid] = file

    # -- writing

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

    def record(self, uid: str, payload: str, timestamp: int) -> None:
        """Have a lifecycle event of a VM written some time later. `flush` waits for it."""
        self._lifecycle.add(WaitingEvent(uid, self._count(uid), lifecycle_json(payload, timestamp)))

    async def flush(self) -> None:
        """Wait until the lifecycle events that were recorded before are written, or an attempt to do so has failed."""
        await self._lifecycle.flush()

    def drop(self, uid: str) -> None:
        """Forget a VM's events, and have its file unlinked. Its followers are sent what they lack."""
        append = self._appends.pop(uid, None)
        if append is not None:
            append.error = EventsDeletedError(uid)
            append.done.set()
        waiting = self._lifecycle.waiting(uid) if uid in self._followers else []
        left = self._lifecycle.drop(uid)
        if uid in self._followers:
            for event in waiting:
                left.add(event.after, event.text)
            self._left[uid] = left
        self._dropped.append(uid)
        self._wakeup.set()

    # -- reading

    def view(self, uid: str, kinds: EventKinds) -> EventView:
        """Return a VM's events as they are now."""
        return EventView(uid, self._files.get(uid), self._lifecycle.of(uid), kinds, self._in_thread)

    async def page(
        self,
        uid: str,
        limit: int | None,
        order: Literal["asc", "desc"],
        cursor: str | None,
        kinds: EventKinds = _ALL_KINDS,
    ) -> tuple[bytes | SendPage, str | None]:
        """Return (a JSON array of events, the cursor of the next page or None after the last).

        Without a `limit` the page has all events. It has fewer than the limit if the VM has events of kinds that are not
        shown. A page that is longer than BLOCK_BYTES is returned as a function that reads it block by block, and sends
        each with the function that it is given. Raises InvalidCursorError; EventsDeletedError when the VM was deleted
        meanwhile, and so does that function; StorageFullError or StorageUnavailableError when it is not known whether the
        events are on the disk.
        """
        view = await self._durable_view(uid, kinds)
        newest_first = order == "desc"
        begin, end = view.begin, view.end
        if cursor is not None:
            begin, end = (begin, view.position(cursor)) if newest_first else (view.position(cursor), end)
        pieces = view.select(begin, end)
        following = None
        if limit is not None and count_events(pieces) > limit:
            pieces = take(pieces, limit, newest_first)
            following = view.cursor(position_before(end, pieces) if newest_first else position_after(begin, pieces))
        blocks = view.blocks(pieces)
        if view.is_small(blocks):
            return await view.read_array(blocks, newest_first), following
        return partial(view.send_array, blocks, newest_first), following

    async def follow(self, uid: str, cursor: str | None, kinds: EventKinds) -> EventFollower:
        """Return a follower of the events after a cursor, or of all. It misses nothing from now on.

        Raises InvalidCursorError, StorageFullError, StorageUnavailableError, as `page`.
        """
        view = await self._durable_view(uid, kinds)
        follower = EventFollower(self, view, view.begin if cursor is None else view.position(cursor))
        # A follower that is never started is forgotten when it is collected.
        gone = weakref.ref(follower, partial(self._forget, uid))
        self._followers.setdefault(uid, []).append(gone)
        return follower

    async def _durable_view(self, uid: str, kinds: EventKinds) -> EventView:
        file = self._files.get(uid)
        # Of thousands of files, only those that are read are synced after a start.
        if file is not None and not file.is_durable:
            await self._write_durably(uid, ())
        if kinds.lifecycle:
            await self.flush()
        return self.view(uid, kinds)

    def forget(self, uid: str, follower: EventFollower) -> None:
        """Forget a follower that has ended."""
        for reference in self._followers.get(uid, ()):
            if reference() is follower:
                self._forget(uid, reference)
                return

    def _forget(self, uid: str, reference: weakref.ref[EventFollower]) -> None:
        references = self._followers.get(uid, [])
        if reference in references:
            references.remove(reference)
        if not references and self._followers.pop(uid, None) is not None and self._left.pop(uid, None) is not None:
            self._dropped.append(uid)
            self._wakeup.set()

    def _count(self, uid: str) -> int:
        file = self._files.get(uid)
        return len(file.offsets) if file is not None else 0

    def has_followers(self, uid: str) -> bool:
        return uid in self._followers

    def wake(self, uid: str) -> None:
        """Have the followers of a VM look again: there may be something new, or their end."""
        for reference in self._followers.get(uid, ()):
            if (follower := reference()) is not None:
                follower.wakeup.set()

    # -- the tasks

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is appended until cancelled. Raises BrokenError when it is not known what the disk holds."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lifecycle.run)
            nursery.start_soon(self._run)
            task_status.started()

    async def _run(self) -> None:
        while True:
            await self._wakeup.wait()
            appends, self._appends = self._appends, {}
            dropped, self._dropped = self._dropped, []
            for uid in appends:
                if uid not in self._files:
                    self._files[uid] = EventFile(self._directory, uid, self._disk)
            # The followers of a VM still read its file.
            unlinked = [uid for uid in dropped if uid not in self._followers]
            # Shielded: the write goes on in its thread, and those who wait for it must be told.
            with trio.CancelScope(shield=True):
                broken = await self._in_thread(self._write, appends, unlinked)
            for uid in dropped:
                self._leave(uid, self._files.pop(uid, None))
            for uid, append in appends.items():
                append.done.set()
                self.wake(uid)
            if broken is not None:
                self._broken = f"no events can be stored any more: {broken}; restart the controller"
                # The answers that say so leave before the process ends.
                with trio.CancelScope(shield=True):
                    await trio.sleep(BROKEN_DELAY)
                raise broken

    def _leave(self, uid: str, file: EventFile | None) -> None:
        """Leave the events of a VM that was deleted to its followers."""
        for reference in self._followers.get(uid, ()):
            if (follower := reference()) is not None:
                follower.leave(file, self._left.get(uid, VMLifecycle()))

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
