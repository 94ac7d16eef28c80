"""Deadlines: their stored wall times, under a wall clock that may be wrong, and which are due next. Pure.

Deadlines are stored as wall times (`expiresAt` of a VM, the deadline of a drain), since the monotonic clock begins anew
with each start of the host. Within a run they follow the monotonic clock alone. `Timeline` maps one to the other.

A start counts at most MAX_COUNTED of the time since the last stored moment, so a clock that is years ahead makes
nothing due. When the wall clock was set, or the stop was longer than MAX_COUNTED, all stored wall times have to be
shifted by the difference; then they are right again.

`Agenda` finds the next items that are due. Times are arguments.
"""

from __future__ import annotations

import datetime
import heapq
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

# The most that a start counts of the time during which the controller did not run.
MAX_COUNTED = datetime.timedelta(hours=1)
# A wall clock that differs by so little was not set. It runs faster or slower, and stored wall times follow it.
TOLERANCE = datetime.timedelta(seconds=1)

_NOTHING = datetime.timedelta()
DueT = TypeVar("DueT", bound=Hashable)


class Timeline:
    """The wall time of one moment of the monotonic clock, and so of all moments of a run."""

    def __init__(self, wall: datetime.datetime, monotonic: float) -> None:
        self._wall = wall
        self._monotonic = monotonic

    @classmethod
    def resume(cls, stored: datetime.datetime, wall: datetime.datetime, monotonic: float) -> Timeline:
        """Return the timeline of a run that begins now. `stored` is the last moment that the run before has stored."""
        counted = min(max(wall - stored, _NOTHING), MAX_COUNTED)
        return cls(stored + counted, monotonic)

    def at(self, monotonic: float) -> datetime.datetime:
        """Return the wall time of a moment."""
        return self._wall + datetime.timedelta(seconds=monotonic - self._monotonic)

    def moment(self, wall: datetime.datetime) -> float:
        """Return the moment of a wall time on the monotonic clock."""
        return self._monotonic + (wall - self._wall).total_seconds()

    def error(self, wall: datetime.datetime, monotonic: float) -> datetime.timedelta:
        """Return by how much all stored wall times have to be shifted, now that the wall clock shows `wall`."""
        error = wall - self.at(monotonic)
        return error if abs(error) > TOLERANCE else _NOTHING


class Agenda(Generic[DueT]):
    """Items by the times at which they are due. A time that is moved or dropped leaves an entry that is skipped."""

    def __init__(self) -> None:
        self._times: dict[DueT, float] = {}
        # (time, number, item): items need not be comparable.
        self._heap: list[tuple[float, int, DueT]] = []
        self._number = 0

    def put(self, item: DueT, at: float | None) -> None:
        """Set when an item is due; None: never."""
        if at is None:
            self._times.pop(item, None)
        elif self._times.get(item) != at:
            self._times[item] = at
            self._number += 1
            heapq.heappush(self._heap, (at, self._number, item))
            if len(self._heap) > 4 * len(self._times) + 64:
                self._heap = [entry for entry in self._heap if self._times.get(entry[2]) == entry[0]]
                heapq.heapify(self._heap)

    def due(self, now: float, limit: int) -> list[DueT]:
        """Return at most `limit` items that are due, the earliest first. They stay until they are `put` again."""
        found: dict[DueT, float] = {}
        while self._heap and self._heap[0][0] <= now and len(found) < limit:
            at, _, item = heapq.heappop(self._heap)
            if self._times.get(item) == at:
                found[item] = at
        for item, at in found.items():
            self._number += 1
            heapq.heappush(self._heap, (at, self._number, item))
        return list(found)

    def next(self) -> float:
        """Return when the next item is due."""
        while self._heap and self._times.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def __len__(self) -> int:
        return len(self._times)
