"""The events of VMs: those that are appended to each VM (event_storage.py), and lifecycle events (lifecycle.py).

An append is durable before `append` returns. A single task writes in one pass what several clients append to several
VMs at the same time. The events of a VM are dropped some time after the VM was deleted. A start drops those whose VM is
gone: a crash left them.

event_pages.py selects what a page shows. A follower is sent what is there and then what comes. The events of a deleted
VM stay until its followers have read them.
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

from orchard.base.nursery import Wakeup
from orchard.schema import Event
from orchard.storage.errors import StorageError, StorageUnavailableError
from orchard.storage.event_pages import (
    EventKinds,
    EventsDeletedError,
    EventView,
    Position,
    Send,
    SendPage,
    StoredEvents,
    count_events,
    position_after,
    position_before,
    take,
)
from orchard.storage.event_storage import EventStorage, FileEventStorage
from orchard.storage.journal import BROKEN_DELAY, Disk
from orchard.storage.lifecycle import LifecycleLog, VMLifecycle, WaitingEvent, lifecycle_file, lifecycle_json
from orchard.storage.records import RunInThread, StoredRecords

# Time in which a follower has to read the remaining events of a deleted VM.
_LEFT_SECONDS = 60.0
_ALL_KINDS = EventKinds()

_logger = logging.getLogger("orchard.storage")


@dataclass(slots=True)
class _Append:
    """Events of one VM that are written together, and the outcome for the callers that wait."""

    events: list[Event] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    error: StorageError | None = None


class EventFollower:
    """Sends the events of one VM as they come. Made by `EventLog.follow`; `send_to` is called once."""

    def __init__(self, log: EventLog, view: EventView, position: Position) -> None:
        # Set when there may be something new.
        self.wakeup = Wakeup()
        # The remaining events after the VM was deleted.
        self.left: EventView | None = None
        self._log = log
        self._uid = view.uid
        self._kinds = view.kinds
        self._position = position

    def leave(self, stored: StoredEvents | None, lifecycle: VMLifecycle) -> None:
        """Take over the events of a VM that was deleted."""
        self.left = EventView(self._uid, stored, lifecycle, self._kinds)
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
            # Files are kept for followers, but a person may have removed one.
            return
        finally:
            self._log.forget(self._uid, self)

    async def _send_new(self, send: Send) -> None:
        view = self.left or self._log.view(self._uid, self._kinds)
        pieces = view.select(self._position, view.end)
        await view.send_lines(self._position, view.blocks(pieces), send)
        self._position = position_after(self._position, pieces)


def event_files(
    directory: Path, disk: Disk | None = None, in_thread: RunInThread = trio.to_thread.run_sync
) -> tuple[EventStorage, StoredRecords]:
    """Return the files in a directory of events, and the one of lifecycle events, for an EventLog.

    Disk I/O is done by `in_thread`, except that of a start.
    """
    return FileEventStorage(directory, disk or Disk(), in_thread), lifecycle_file(directory, disk, in_thread)


class EventLog:
    """The events of all VMs, in a storage, and lifecycle events. `run` must be running for `append` to return."""

    def __init__(self, storage: EventStorage, lifecycle: StoredRecords) -> None:
        self._storage = storage
        self._lifecycle = LifecycleLog(lifecycle, self.wake)
        self._appends: dict[str, _Append] = {}
        self._dropped: list[str] = []
        self._wakeup = Wakeup()
        # By uid: the followers, and the remaining lifecycle events of a deleted VM.
        self._followers: dict[str, list[weakref.ref[EventFollower]]] = {}
        self._left: dict[str, VMLifecycle] = {}
        # Why nothing can be appended any more; empty while the log works.
        self._broken = ""

    def open(self, uids: Container[str]) -> None:
        """Load the events of the VMs with these uids, and drop those of others.

        Raises DamagedError, OSError; BrokenError when it is not known whether the lifecycle events are stored.
        """
        self._storage.open(uids)
        self._lifecycle.open(uids)
        # `run` begins by dropping what `open` could not drop.
        self._wakeup.set()

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
        """Schedule a lifecycle event of a VM to be written. `timestamp` is in seconds since 1970. `flush` waits for it."""
        stored = self._storage.get(uid)
        after = stored.count if stored is not None else 0
        self._lifecycle.add(WaitingEvent(uid, after, lifecycle_json(payload, timestamp)))

    async def flush(self) -> None:
        """Wait until the lifecycle events that were recorded before are written, or an attempt to do so has failed."""
        await self._lifecycle.flush()

    def drop(self, uid: str) -> None:
        """Forget a VM's events, and schedule their removal. Its followers are sent the rest first."""
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
        return EventView(uid, self._storage.get(uid), self._lifecycle.of(uid), kinds)

    async def page(
        self,
        uid: str,
        limit: int | None,
        order: Literal["asc", "desc"],
        cursor: str | None,
        kinds: EventKinds = _ALL_KINDS,
    ) -> tuple[bytes | SendPage, str | None]:
        """Return (a JSON array of events, the cursor of the next page or None after the last).

        Without a `limit` the page has all events. It has fewer than the limit if the VM has events of kinds that are
        not shown. A page that is longer than BLOCK_BYTES is returned as a function that reads it block by block, and
        sends each with the function that it is given. Raises InvalidCursorError; EventsDeletedError when the VM was
        deleted meanwhile, and so does that function; StorageFullError or StorageUnavailableError when it is not known
        whether the events are on the disk.
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
        stored = self._storage.get(uid)
        # Of thousands of files, only those that are read are synced after a start.
        if stored is not None and not stored.is_durable:
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

    def has_followers(self, uid: str) -> bool:
        return uid in self._followers

    def wake(self, uid: str) -> None:
        """Wake the followers of a VM: there may be new events, or their end condition may hold."""
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
        try:
            while True:
                await self._wakeup.wait()
                await self._write()
        except trio.Cancelled:
            # These appends came before the stop, while an earlier write was under way.
            if self._appends:
                await self._write()
            raise

    async def _write(self) -> None:
        """Write what was appended, and drop what was dropped, until now. Raises BrokenError."""
        appends, self._appends = self._appends, {}
        dropped, self._dropped = self._dropped, []
        # Followers still read these VMs' events.
        unread = [uid for uid in dropped if uid in self._followers]
        events = {uid: append.events for uid, append in appends.items()}
        # Shielded: an append under way must not be reported as refused, and its callers must get the outcome.
        with trio.CancelScope(shield=True):
            result = await self._storage.write(events, [uid for uid in dropped if uid not in unread])
        for uid in dropped:
            self._leave(uid, self._storage.forget(uid))
        for uid, append in appends.items():
            append.error = result.errors.get(uid)
            append.done.set()
            self.wake(uid)
        if result.broken is not None:
            self._broken = f"no events can be stored any more: {result.broken}; restart the controller"
            # The answers that say so leave before the process ends.
            with trio.CancelScope(shield=True):
                await trio.sleep(BROKEN_DELAY)
            raise result.broken

    def _leave(self, uid: str, stored: StoredEvents | None) -> None:
        """Leave the events of a VM that was deleted to its followers."""
        for reference in self._followers.get(uid, ()):
            if (follower := reference()) is not None:
                follower.leave(stored, self._left.get(uid, VMLifecycle()))
