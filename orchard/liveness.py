"""Worker liveness: when each worker was last in contact with the controller.

A worker is online while its last contact is less than the offline time-out ago. Contacts are its registration, its
heartbeats, the pongs on its watch, and its polls for its VMs. They are timed on receipt by the controller's own
monotonic clock. So neither a wrong wall clock nor a restart of the controller can make a worker look online or offline.

Any account may list the VMs of a worker, so a poll counts only if it comes from the source (service account and
address) of an earlier contact that only the worker itself makes. Time during which the controller itself was stalled
does not count as silence.

A deleted worker may still run its VMs until it learns of its deletion or its lease expires. `last_contact_of_deleted`
keeps its last contact for that long.

`last_seen`, the time in the API, comes from the worker's own clock. A later value than before marks a heartbeat.

Everything is kept in memory only, so that thousands of heartbeats cost the disk nothing. This file performs no I/O and
gets its clock as an argument.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable

from orchard.codec import format_time

# (service account, address of the host)
Source = tuple[str, str]


class Liveness:
    """The last contact of every worker. `last_contact` is a live table that the scheduler reads.

    `last_contact` and `last_contact_of_deleted` map worker names to seconds of `clock`. `on_return` is called with the
    name of a worker that makes contact and was offline or unknown before.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        offline_timeout: float,
        on_return: Callable[[str], None],
        known: Iterable[str] = (),
    ) -> None:
        """Begin with the `known` workers, from before the controller's start. Each gets the whole time-out again."""
        self._clock = clock
        self._offline_timeout = offline_timeout
        self._on_return = on_return
        self._last_seen: dict[str, tuple[datetime.datetime, bytes]] = {}
        self._sources: dict[str, Source] = {}
        self.started_at = clock()
        self.last_contact: dict[str, float] = dict.fromkeys(known, self.started_at)
        self.last_contact_of_deleted: dict[str, float] = {}

    def record_pong(self, worker: str) -> None:
        """Record a pong on a worker's watch. Ignore it for a deleted worker, which has to register again first."""
        if worker in self._sources:
            self._record(worker)

    def record_worker(self, worker: str, source: Source) -> None:
        """Record a request that only the worker itself makes, and its source."""
        self._sources[worker] = source
        self._record(worker)

    def record_heartbeat(self, worker: str, source: Source, last_seen: datetime.datetime) -> bool:
        """Record a heartbeat if `last_seen` is later than before. Return whether it is."""
        before = self._last_seen.get(worker)
        if before is not None and last_seen <= before[0]:
            return False
        self._last_seen[worker] = (last_seen, format_time(last_seen).encode())
        self.record_worker(worker, source)
        return True

    def record_poll(self, worker: str, source: Source) -> None:
        """Record a request for a worker's VMs. Ignore it if it comes from elsewhere than the worker."""
        if self._sources.get(worker) == source:
            self._record(worker)

    def record_deletion(self, worker: str) -> None:
        """Record that a worker was deleted."""
        expired = self._clock() - self._offline_timeout
        for name in [name for name, at in self.last_contact_of_deleted.items() if at <= expired]:
            del self.last_contact_of_deleted[name]
        self.last_contact_of_deleted[worker] = self.last_contact.pop(worker, self.started_at)
        self._last_seen.pop(worker, None)
        self._sources.pop(worker, None)

    def extend_for_stall(self, seconds: float) -> None:
        """Move the last contacts forward after this process was stalled for `seconds`.

        Workers that were online before the stall get twice that time, because what they sent meanwhile has still to be
        read.
        """
        now = self._clock()
        for worker, at in self.last_contact.items():
            if now - seconds < at + self._offline_timeout:
                self.last_contact[worker] = min(now, at + 2 * seconds)

    def last_seen_json(self, worker: str) -> bytes | None:
        """Return the time of a worker's last heartbeat as the text of a JSON string, without quotes; None before it."""
        heartbeat = self._last_seen.get(worker)
        return None if heartbeat is None else heartbeat[1]

    def _record(self, worker: str) -> None:
        now, before = self._clock(), self.last_contact.get(worker)
        self.last_contact[worker] = now
        if before is None or now >= before + self._offline_timeout:
            self._on_return(worker)
