"""The lifecycle events of VMs: what the controller did with each VM, in one bounded file for all (records.py).

A VM's last MAX_LIFECYCLE events are kept, so that a VM which restarts without end fills neither disk nor memory. They
have numbers of their own, which never change. Each also holds how many events the VM's own file (event_file.py) had
when it happened, so both kinds are shown in one order. The events of a VM are forgotten with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import trio

from orchard.base.files import LIFECYCLE_FILE
from orchard.codec import dump_json
from orchard.schema import LIFECYCLE
from orchard.storage.journal import Disk
from orchard.storage.records import BatchedRecords, RecordFile, RunInThread, StoredRecords

# Enough for about ten runs of a VM.
MAX_LIFECYCLE = 64


class LifecycleEvent(NamedTuple):
    """An event's number, how many events the VM's own file had before it, and its JSON."""

    number: int
    after: int
    text: bytes


@dataclass(slots=True)
class VMLifecycle:
    """The lifecycle events of one VM, the earliest first."""

    events: deque[LifecycleEvent] = field(default_factory=lambda: deque(maxlen=MAX_LIFECYCLE))

    @property
    def begin(self) -> int:
        """The number of the first event that is kept."""
        return self.events[0].number if self.events else 0

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self.events[-1].number + 1 if self.events else 0

    def add(self, after: int, text: bytes) -> None:
        """Add the next event."""
        self.events.append(LifecycleEvent(self.end, after, text))

    def between(self, begin: int, end: int) -> list[LifecycleEvent]:
        """Return the kept events with numbers from `begin` to `end` - 1."""
        return list(islice(self.events, max(0, begin - self.begin), max(0, end - self.begin)))

    def number_at(self, after: int) -> int:
        """Return the number of the first lifecycle event that follows `after` or more events of the VM's file."""
        return next((event.number for event in self.events if event.after >= after), self.end)


class WaitingEvent(NamedTuple):
    """A VM's uid, and the parts of an event that has no number yet."""

    uid: str
    after: int
    text: bytes


def lifecycle_file(
    directory: Path, disk: Disk | None = None, in_thread: RunInThread = trio.to_thread.run_sync
) -> RecordFile:  # fmt: skip
    """Return the file of lifecycle events in the directory of events."""
    return RecordFile(directory / LIFECYCLE_FILE, "lifecycle", disk or Disk(), in_thread)


class LifecycleLog(BatchedRecords[WaitingEvent]):
    """The lifecycle events of all VMs, by uid. `tell` is called with the uid for each event that was written."""

    def __init__(self, stored: StoredRecords, tell: Callable[[str], None] = lambda uid: None) -> None:
        super().__init__(stored)
        self._tell = tell
        self._vms: dict[str, VMLifecycle] = {}
        self._count = 0
        # The numbers of the events that are being written, in their order.
        self._numbers: list[int] = []
        # VMs that were dropped since the last write began.
        self._dropped: set[str] = set()

    def open(self, uids: Container[str]) -> None:
        """Load the events of the VMs with these uids.

        Raises DamagedError, OSError; BrokenError when it cannot be synced.
        """
        self.inspect(uids)
        self.stored.make_durable()

    def inspect(self, uids: Container[str]) -> int:
        """Read and check what is stored, and change nothing. Return how many events these VMs have.

        Raises DamagedError, OSError.
        """
        for place, record in self.stored.inspect():
            match record:
                case {"uid": str(uid), "n": int(number), "after": int(after), "event": dict(event)}:
                    if uid in uids:
                        known = self._vms.get(uid)
                        if known is not None and number != known.end:
                            what = f"lifecycle event {number} of the VM with uid {uid} follows {known.end - 1}"
                            raise self.stored.damaged(place, what)
                        self._add(uid, LifecycleEvent(number, after, dump_json(event)))
                case _:
                    raise self.stored.damaged(place, "a lifecycle event is not understood")
        return self._count

    def of(self, uid: str) -> VMLifecycle:
        """Return a VM's events."""
        return self._vms.get(uid) or VMLifecycle()

    def drop(self, uid: str) -> VMLifecycle:
        """Forget a VM's events, and return those that were written."""
        dropped = self._vms.pop(uid, VMLifecycle())
        self._count -= len(dropped.events)
        self._dropped.add(uid)
        return dropped

    def waiting(self, uid: str) -> list[WaitingEvent]:
        """Return the events of a VM that are not written yet."""
        writing = self._writing.records if self._writing is not None else ()
        return [event for event in (*writing, *self._gathering.records) if event.uid == uid]

    def _add(self, uid: str, event: LifecycleEvent) -> None:
        events = self._vms.setdefault(uid, VMLifecycle()).events
        self._count += len(events) < MAX_LIFECYCLE
        events.append(event)

    def _wanted(self, records: Iterable[WaitingEvent]) -> list[WaitingEvent]:
        dropped, self._dropped = self._dropped, set()
        return [record for record in records if record.uid not in dropped]

    def _prepare(self, records: Sequence[WaitingEvent]) -> list[bytes]:
        ends: dict[str, int] = {}
        self._numbers = []
        for uid, _, _ in records:
            number = ends[uid] if uid in ends else self.of(uid).end
            ends[uid] = number + 1
            self._numbers.append(number)
        return [_stored(uid, n, after, text) for n, (uid, after, text) in zip(self._numbers, records, strict=True)]

    def _keep(self, records: Sequence[WaitingEvent]) -> None:
        for number, (uid, after, text) in zip(self._numbers, records, strict=True):
            if uid not in self._dropped:
                self._add(uid, LifecycleEvent(number, after, text))
                self._tell(uid)

    def _live_count(self) -> int:
        return self._count

    def live(self) -> list[bytes]:
        # list() is one step of the interpreter, so no other thread can change the originals meanwhile.
        return [_stored(uid, *event) for uid, lifecycle in list(self._vms.items()) for event in list(lifecycle.events)]


def lifecycle_json(payload: str, timestamp: int) -> bytes:
    """Return the JSON of a lifecycle event, as dump_json and encode would: each change of a VM may cost one."""
    return b'{"kind":"%b","payload":%b,"timestamp":%d}' % (LIFECYCLE.encode(), dump_json(payload), timestamp)


def _stored(uid: str, number: int, after: int, text: bytes) -> bytes:
    return b'{"uid":"%b","n":%d,"after":%d,"event":%b}' % (uid.encode(), number, after, text)
