"""Worker liveness: when each worker was last in contact with the controller, and whether its session is whole.

Two questions are answered for each worker. `silent_at`: when do its VMs fail, if it stays silent? After the offline
timeout since its last contact. `available_until`: until when does it get new VMs? Only while its session is whole:
registered, its local VMs settled, its watch open or closed for less than AWAY_SECONDS, and no goodbye said. A worker
with the capability `worker-state` says in its heartbeats that it has settled. Another one counts as settled at its
first poll after its watch was opened.

Contacts are a worker's registration, its heartbeats, the pongs on its watch, and its polls for its VMs. They are timed
on receipt by the controller's own monotonic clock. So neither a wrong wall clock nor a restart of the controller can
make a worker look online or offline. Any account may list the VMs of a worker, so a poll counts only if it comes from
the source (service account and address) of an earlier contact that only the worker itself makes. Time during which the
controller itself was stalled does not count as silence.

A worker keeps its VMs running for as long as it was promised, which is the offline timeout that it was told at its
registration. After a restart with a shorter timeout the longer promise counts until it is over, and the VMs of a
deleted worker count as running until its promise is over.

A VM whose assignment no poll has shown to its worker cannot run there. `unnamed` has these VMs, since the start.

The worker of a VM that has to end renews the VM's lease until it knows of the order. At its second poll after the order
it has seen the answer to the first, so from then on the lease is not renewed.

Other reports of workers about their hosts are in `facts` (worker_facts.py).

`last_seen`, the time in the API, comes from the worker's own clock. A later value than before marks a heartbeat.

Everything here is in memory only, so that thousands of heartbeats cost the disk nothing. The owner stores the promises.
This file performs no I/O and gets its clock as an argument.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchard.codec import format_time
from orchard.decisions.worker_facts import WorkerFacts
from orchard.resources.cluster import Health

# A worker whose watch is closed for so long gets no new VMs.
AWAY_SECONDS = 2.0
# The most characters of a problem in the reason why a worker is unavailable.
_SHOWN_PROBLEM = 100

# The sender of a contact: (service account, address of the host).
Source = tuple[str, str]


@dataclass(slots=True)
class _Session:
    """A worker's session since its last registration."""

    # Whether the worker says by itself that it has settled.
    tells_settled: bool = False
    has_settled: bool = False
    # The open watches: a new one may begin before the end of the old one is noticed.
    watches: set[object] = field(default_factory=set)
    # When the last watch was closed; at first, when the worker registered.
    watched_until: float = -math.inf
    has_left: bool = False
    health: Health = Health()


class Liveness:
    """The last contact and the session of every worker.

    `on_change` is called with the name of a worker that may have become available for new VMs, or unavailable, or whose
    health changed. `offline_timeout` is in seconds. `promises` maps the workers that are known from before the start to
    their promises, and `promises_of_deleted` those that were deleted: each counts anew from the start.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        offline_timeout: float,
        on_change: Callable[[str], None],
        promises: Mapping[str, float],
        promises_of_deleted: Mapping[str, float],
    ) -> None:
        self._clock = clock
        self._offline_timeout = offline_timeout
        # Rounded up. The value that workers are told is rounded down, so they give up their VMs first.
        self.offline_timeout_ms = math.ceil(1000 * offline_timeout)
        self._on_change = on_change
        self.facts = WorkerFacts()
        self.facts.on_change(on_change)
        self._last_seen: dict[str, tuple[datetime.datetime, bytes]] = {}
        self._sources: dict[str, Source] = {}
        self._sessions: dict[str, _Session] = {}
        self.started_at = clock()
        self.last_contact: dict[str, float] = dict.fromkeys(promises, self.started_at)
        # Worker -> its promise in seconds, if that is longer than the offline timeout.
        self._promises = {name: seconds for name, seconds in promises.items() if seconds > offline_timeout}
        # Worker -> the end of a promise that was replaced by a shorter one.
        self.promise_over_at: dict[str, float] = {}
        # Name of a deleted worker -> the end of its promise.
        self.deleted_over_at: dict[str, float] = {
            name: self.started_at + seconds for name, seconds in promises_of_deleted.items()
        }
        # Worker -> names of VMs that were assigned to it since its last poll -> their uids.
        self.unnamed: dict[str, dict[str, str]] = {}
        # Worker -> uids of VMs that it has to end -> its polls since.
        self._untold: dict[str, dict[str, int]] = {}
        # Uid of a VM that its worker has to end -> when the worker was known to know.
        self._told_at: dict[str, float] = {}

    # -- what workers do

    def record_registration(self, worker: str, source: Source, *, tells_settled: bool = False) -> None:
        """Record that a worker registers: a session begins, which is not whole yet."""
        # Any client may have written a time so late that no heartbeat could be later.
        self._last_seen.pop(worker, None)
        now, before = self._clock(), self._sessions.get(worker)
        session = _Session(tells_settled, watched_until=now)
        if before is not None:
            session.watches, session.health = before.watches, before.health
            if not before.has_left:
                session.watched_until = before.watched_until
        self._sessions[worker] = session
        if (promise := self._promises.pop(worker, 0.0)) > 0.0:
            # Until now the worker may have renewed its lease by the longer promise.
            self.promise_over_at[worker] = max(self.promise_over_at.get(worker, now), now + promise)
        self.record_worker(worker, source)
        self._on_change(worker)

    def record_watch(self, worker: str, source: Source) -> object:
        """Record that a worker's watch was opened. Return the argument for `record_watch_end`."""
        watch = object()
        self._session(worker).watches.add(watch)
        self.record_worker(worker, source)
        self._on_change(worker)
        return watch

    def record_watch_end(self, worker: str, watch: object) -> None:
        """Record that a worker's watch was closed."""
        # The watch may be of a session before the worker was deleted and registered again.
        session = self._sessions.get(worker)
        if session is not None and watch in session.watches:
            session.watches.discard(watch)
            session.watched_until = self._clock()
            self._on_change(worker)

    def record_goodbye(self, worker: str) -> None:
        """Record that a worker stops. It gets no new VMs until it registers again."""
        self._session(worker).has_left = True
        self._on_change(worker)

    def record_pong(self, worker: str) -> None:
        """Record a pong on a worker's watch. Ignore it for a deleted worker, which has to register again first."""
        if worker in self._sources:
            self._record(worker)

    def record_worker(self, worker: str, source: Source) -> None:
        """Record a request that only the worker itself makes, and its source."""
        self._sources[worker] = source
        self._record(worker)

    def record_heartbeat(
        self,
        worker: str,
        source: Source,
        last_seen: datetime.datetime,
        *,
        settled: bool = False,
        health: Health | None = None,
    ) -> bool:
        """Record a heartbeat if `last_seen` is later than before. Return whether it is."""
        if not self.is_heartbeat(worker, last_seen):
            return False
        self._last_seen[worker] = (last_seen, format_time(last_seen).encode())
        self.record_worker(worker, source)
        session = self._session(worker)
        if settled != session.has_settled and session.tells_settled:
            session.has_settled = settled
            self._on_change(worker)
        if health is not None and health != session.health:
            session.health = health
            self._on_change(worker)
        return True

    def is_heartbeat(self, worker: str, last_seen: datetime.datetime) -> bool:
        """Return whether a `last_seen` is later than the worker's last one."""
        before = self._last_seen.get(worker)
        return before is None or last_seen > before[0]

    def record_poll(self, worker: str, source: Source) -> None:
        """Record a request for a worker's VMs. As a contact it counts only if it comes from the worker itself."""
        self.unnamed.pop(worker, None)
        if self._sources.get(worker) != source:
            return
        self._record(worker)
        if worker in self._untold:
            self._count_poll(worker)
        session = self._sessions.get(worker)
        if session is not None and session.watches and not session.tells_settled and not session.has_settled:
            session.has_settled = True
            self._on_change(worker)

    def _count_poll(self, worker: str) -> None:
        untold = self._untold.pop(worker)
        for uid, polls in untold.items():
            if polls:
                self._told_at[uid] = self._clock()
            else:
                self._untold.setdefault(worker, {})[uid] = 1

    def record_replacement(self, worker: str) -> None:
        """Record that another instance takes a worker's name: the earlier one may run its VMs as long as promised."""
        self.deleted_over_at[worker] = max(self.deleted_over_at.get(worker, -math.inf), self.silent_at(worker))

    def record_deletion(self, worker: str) -> None:
        """Record that a worker was deleted."""
        self.record_replacement(worker)
        for table in (self.last_contact, self._promises, self.promise_over_at, self._last_seen, self._sources):
            table.pop(worker, None)
        self._sessions.pop(worker, None)
        self.unnamed.pop(worker, None)
        self._untold.pop(worker, None)
        self.facts.forget(worker)

    # -- what the controller does

    def record_assignment(self, worker: str, vm_name: str, vm_uid: str) -> None:
        """Record that a VM was assigned to a worker, which does not know it yet."""
        self.unnamed.setdefault(worker, {})[vm_name] = vm_uid

    def record_end_request(self, worker: str, vm_uid: str) -> None:
        """Record that a worker has to end a VM."""
        self._untold.setdefault(worker, {})[vm_uid] = 0

    def forget_end_request(self, worker: str, vm_uid: str) -> None:
        """Forget a VM that its worker had to end, and that was restarted or deleted."""
        self._told_at.pop(vm_uid, None)
        if (untold := self._untold.get(worker)) is not None and untold.pop(vm_uid, None) is not None and not untold:
            del self._untold[worker]

    def extend_for_stall(self, seconds: float) -> None:
        """Move the last contacts forward after this process was stalled for `seconds`.

        Workers that were online before the stall get twice that time, because what they sent meanwhile has still to be
        read.
        """
        now = self._clock()
        for worker, at in self.last_contact.items():
            if now - seconds < self.silent_at(worker):
                self.last_contact[worker] = min(now, at + 2 * seconds)

    def promises_over(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the longer promises that are over, with their ends: by worker, and by name of a deleted worker."""
        now = self._clock()
        live, deleted = (
            {name: at for name, at in table.items() if at <= now}
            for table in (self.promise_over_at, self.deleted_over_at)
        )
        return live, deleted

    def forget_promises(self, live: Mapping[str, float], deleted: Mapping[str, float]) -> None:
        """Forget promises that `promises_over` has returned, once their end is durable."""
        for table, over in ((self.promise_over_at, live), (self.deleted_over_at, deleted)):
            for name, at in over.items():
                # A later session may have moved the end.
                if table.get(name) == at:
                    del table[name]

    # -- answers

    def silent_at(self, worker: str) -> float:
        """Return the time at which the VMs of a worker fail if it makes no further contact."""
        seconds = self._promises.get(worker, self._offline_timeout)
        at = self.last_contact.get(worker, self.started_at) + seconds
        return max(at, self.promise_over_at.get(worker, at))

    def ended_at_latest(self, worker: str, vm_uid: str) -> float:
        """Return the time from which a VM that its worker has to end cannot run any more, if nothing further happens."""
        told_at = self._told_at.get(vm_uid)
        if told_at is None:
            return self.silent_at(worker)
        at = told_at + self._promises.get(worker, self._offline_timeout)
        return max(at, self.promise_over_at.get(worker, at))

    def deleted_until(self, worker: str) -> float:
        """Return the time at which no VM can run any more on a deleted worker of that name."""
        return self.deleted_over_at.get(worker, -math.inf)

    def away_at(self, worker: str) -> float:
        """Return the time at which a worker counts as away if nothing further happens: gone, or cut off."""
        session = self._sessions.get(worker)
        if session is None or session.has_left:
            return -math.inf
        silent_at = self.silent_at(worker)
        return silent_at if session.watches else min(silent_at, session.watched_until + AWAY_SECONDS)

    def available_until(self, worker: str) -> float:
        """Return the time until which a worker gets new VMs if nothing further happens."""
        session = self._sessions.get(worker)
        return self.away_at(worker) if session is not None and session.has_settled else -math.inf

    def is_available(self, worker: str) -> bool:
        """Return whether a worker gets new VMs now."""
        return self.available_until(worker) > self._clock()

    def promise_ms(self, worker: str) -> int:
        """Return for how many milliseconds a worker without contact may run its VMs from now on."""
        over = self.promise_over_at.get(worker, -math.inf) - self._clock()
        return math.ceil(1000 * max(self._promises.get(worker, self._offline_timeout), over))

    def longest_promise(self) -> float:
        """Return the longest time in seconds for which a worker without contact may run VMs from now on."""
        now = self._clock()
        over = [at - now for table in (self.promise_over_at, self.deleted_over_at) for at in table.values()]
        return max([self._offline_timeout, *self._promises.values(), *over])

    def why_unavailable(self, worker: str) -> str:
        """Return in a few words why a worker gets no new VMs."""
        now, session = self._clock(), self._sessions.get(worker)
        if session is not None and session.has_left:
            return "stopped"
        if now >= self.silent_at(worker):
            return "offline"
        away = "disconnected" if now >= self.away_at(worker) else "not ready"
        problem = next(iter(self.health(worker).problems), None)
        return away if problem is None else f"{away} ({problem.what}: {problem.message[:_SHOWN_PROBLEM]})"

    def health(self, worker: str) -> Health:
        """Return what a worker has reported last."""
        session = self._sessions.get(worker)
        return Health() if session is None else session.health

    def last_seen_json(self, worker: str) -> bytes | None:
        """Return the time of a worker's last heartbeat as the text of a JSON string, without quotes; None before it."""
        heartbeat = self._last_seen.get(worker)
        return None if heartbeat is None else heartbeat[1]

    def _session(self, worker: str) -> _Session:
        return self._sessions.setdefault(worker, _Session())

    def _record(self, worker: str) -> None:
        was_silent = worker not in self.last_contact or self._clock() >= self.silent_at(worker)
        self.last_contact[worker] = self._clock()
        if was_silent:
            self._on_change(worker)
