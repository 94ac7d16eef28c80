"""Which workers are alive. Law: in memory only; no I/O, its clock is handed in.

Liveness is the time since a worker's last sign of life, by the controller's own monotonic clock at receipt: nobody's
wall clock, and nothing that happened while the controller was away, can make a worker look dead or alive. Signs of
life are its registration, its heartbeats, the pongs on its watch, and its polls of its VMs. A poll counts only when it
comes from where one of the others came from, because anybody may list a worker's VMs. Nobody is silent for what a
controller that stood still has not heard.

A worker that was deleted may be alive, and run its VMs until it hears of that or its lease ends: `departed` remembers
when it was last seen, for as long as that can matter.

`last_seen`, the time in the API, is what the worker's own clock said: it tells a heartbeat from other changes.
It is not stored; a thousand heartbeats cost the disk nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable

from orchard.codec import format_time

Source = tuple[str, str]  # (service account, address of the host)


class Liveness:
    """`seen` is the live table that the scheduler reads: worker name -> its last sign of life, in seconds of `clock`.

    `returned` is called with the name of a worker that gives a sign of life and had been offline.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        offline_timeout: float,
        returned: Callable[[str], None],
        known: Iterable[str] = (),
    ) -> None:
        """`known` are the workers of before the start, to whom the whole time-out is given anew."""
        self._clock = clock
        self._offline_timeout = offline_timeout
        self._returned = returned
        self._last_seen: dict[str, tuple[datetime.datetime, bytes]] = {}
        self._source: dict[str, Source] = {}
        self.began = clock()
        self.seen: dict[str, float] = dict.fromkeys(known, self.began)
        self.departed: dict[str, float] = {}

    def alive(self, worker: str) -> None:
        """Note a sign of life of a worker that has arrived; one that was forgotten has to arrive again."""
        if worker not in self._source:
            return
        now, before = self._clock(), self.seen.get(worker)
        self.seen[worker] = now
        if before is None or now >= before + self._offline_timeout:
            self._returned(worker)

    def arrived(self, worker: str, source: Source) -> None:
        """Note a sign of life that only the worker gives, and where it comes from."""
        self._source[worker] = source
        self.alive(worker)

    def heartbeat(self, worker: str, source: Source, last_seen: datetime.datetime) -> bool:
        """Note a heartbeat, if it is one: if `last_seen` is later than the one before."""
        before = self._last_seen.get(worker)
        if before is not None and last_seen <= before[0]:
            return False
        self._last_seen[worker] = (last_seen, format_time(last_seen).encode())
        self.arrived(worker, source)
        return True

    def polled(self, worker: str, source: Source) -> None:
        """Note that somebody at `source` asked for the worker's VMs."""
        if self._source.get(worker) == source:
            self.alive(worker)

    def forget(self, worker: str) -> None:
        """Note that a worker was deleted."""
        recent = self._clock() - self._offline_timeout
        for name in [name for name, seen in self.departed.items() if seen <= recent]:
            del self.departed[name]
        self.departed[worker] = self.seen.pop(worker, self.began)
        self._last_seen.pop(worker, None)
        self._source.pop(worker, None)

    def deaf(self, seconds: float) -> None:
        """Note that this process stood still, and should have looked around so many seconds ago.

        Twice as much is given to those who were not silent by then: what they have sent meanwhile is still to be read.
        """
        now = self._clock()
        for worker, seen in self.seen.items():
            if now - seconds < seen + self._offline_timeout:
                self.seen[worker] = min(now, seen + 2 * seconds)

    def last_seen(self, worker: str) -> bytes | None:
        """Give the time of a worker's last heartbeat, as it stands in JSON; None when there was none."""
        told = self._last_seen.get(worker)
        return None if told is None else told[1]
