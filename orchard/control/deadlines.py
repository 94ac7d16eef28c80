"""Actions at deadlines: VMs expire, wait too long or are drained, and workers are pruned.

Deadlines are stored with the objects: `expiresAt` and `waitingSince` of a VM, the deadline of a worker's drain, and
`offlineSince` of a worker. decisions/agenda.py says when they are due, transitions.py how a VM changes. `Deadlines`
follows the changes of the store, and its only task acts on due items, in transactions of at most ITEMS_PER_TRANSACTION.

`StoredClock` is the wall time by which deadlines are stored. The store writes it with each change, and this task every
TOUCH_SECONDS while there are deadlines. So a start knows how much time it may count.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import trio

from orchard import transitions
from orchard.base.nursery import Wakeup
from orchard.control.worker_states import WorkerStates
from orchard.decisions.agenda import Agenda, Timeline
from orchard.decisions.liveness import Liveness
from orchard.resources.cluster import Promise
from orchard.schema import VM, Worker
from orchard.state.changes import Change
from orchard.storage.errors import StorageError
from orchard.store import State, Store, Transaction

# Interval of writing the wall time while there are deadlines, and of checking a worker that may be pruned.
TOUCH_SECONDS = 60.0
# A transaction of this many VMs takes some milliseconds, for which all other tasks wait.
ITEMS_PER_TRANSACTION = 24
# The least pause before a failed write is repeated.
_RETRY_SECONDS = 1.0

# The action that is due, and the name of the VM or worker.
_Item = tuple[Literal["expire", "time out", "drain", "prune"], str]

_logger = logging.getLogger("orchard.controller")


class StoredClock:
    """The wall time by which deadlines are stored. `wall` is the wall clock, which may be set at any time.

    Deadlines computed from `now()` are right even if the wall clock was set since the last `adjust`.
    """

    def __init__(self, store: Store, wall: Callable[[], datetime.datetime], monotonic: Callable[[], float]) -> None:
        self._wall = wall
        self.monotonic = monotonic
        now = wall()
        self._timeline = Timeline.resume(store.stored_time or now, now, monotonic())
        # The timeline of the wall times on the disk.
        self._durable = self._timeline
        store.wall_time = self.now

    def now(self) -> datetime.datetime:
        return self._timeline.at(self.monotonic())

    def moment(self, wall: datetime.datetime) -> float:
        """Return the moment of a stored wall time on the monotonic clock."""
        return self._timeline.moment(wall)

    def error(self) -> datetime.timedelta:
        """Return by how much all stored wall times have to be shifted; zero if the wall clock was not set."""
        return self._timeline.error(self._wall(), self.monotonic())

    def adjust(self) -> None:
        """Follow the wall clock from now on. Stored wall times are shifted in the transaction in which this is called."""
        self._timeline = Timeline(self._wall(), self.monotonic())

    def confirm(self) -> None:
        """Note that everything stored so far is durable."""
        self._durable = self._timeline

    def undo(self) -> None:
        """Return to the wall time before the changes that were not made durable."""
        self._timeline = self._durable


class Deadlines:
    """Does what is due. `run` must be running."""

    def __init__(self, store: Store, clock: StoredClock, liveness: Liveness, states: WorkerStates) -> None:
        self._store = store
        self._clock = clock
        self._liveness = liveness
        self._states = states
        self._agenda: Agenda[_Item] = Agenda()
        self._wakeup = Wakeup()
        self._sleeps_until = -math.inf
        self._touch_at = clock.monotonic()
        # Workers that are offline -> since when.
        self._offline: dict[str, float] = {}
        self._rebuild()
        store.on_commit(self._follow)
        store.on_undo(self._undo)
        states.on_change(self._follow_state)

    async def run(self) -> None:
        """Do what is due until cancelled."""
        while True:
            try:
                while self.step():
                    await trio.lowlevel.checkpoint()
                await self._store.wait_durable()
            except StorageError as error:
                _logger.error("deadlines postponed, cannot write: %s", error)
                await trio.sleep(_RETRY_SECONDS)
                continue
            self._clock.confirm()
            self._sleeps_until = min(self._agenda.next(), self._touch_at)
            with trio.move_on_at(self._sleeps_until):
                await self._wakeup.wait()
            self._sleeps_until = -math.inf

    def step(self) -> bool:
        """Act on a part of what is due, in one transaction. Return whether more may be due. Raises StorageError."""
        now = self._clock.monotonic()
        # On a full disk, actions that are due come first. Without the shift, the deadlines are still right in this run.
        if (error := self._clock.error()) and not self._store.full:
            self._shift(error)
        if now >= self._touch_at:
            self._touch(now)
        due = self._agenda.due(now, ITEMS_PER_TRANSACTION)
        with self._store.transaction() as tx:
            # Deletions come last: no other action puts an expired VM again.
            for item in sorted(due, key=lambda item: item[0] == "expire"):
                self._act(item, tx)
        for kind, name in due:
            plan = self._plan_vm if kind in ("expire", "time out") else self._plan_worker
            plan(name)
        return bool(due)

    # -- what is due

    def _act(self, item: _Item, tx: Transaction) -> None:
        kind, name = item
        state = self._store.state
        if kind == "drain":
            for vm in _to_end(state, name)[:ITEMS_PER_TRANSACTION]:
                tx.put(transitions.end_for_drain(vm))
        elif kind == "prune":
            self._prune(state.workers[name], tx)
        elif kind == "time out":
            tx.put(transitions.time_out(state.vms[name]))
        else:
            tx.delete(state.vms[name])

    def _prune(self, worker: Worker, tx: Transaction) -> None:
        """Delete a worker that was offline for long enough and holds nothing, or store since when it is offline."""
        if self._store.full:
            return
        now, since = self._clock.monotonic(), self._offline_since(worker)
        if since is None:
            tx.put(replace(worker, offline_since=None))
        elif now < self._prune_at(worker, since):
            tx.put(replace(worker, offline_since=self._clock.now() - datetime.timedelta(seconds=now - since)))
        elif not self._store.state.vms_by_worker.get(worker.name):
            _logger.info("worker pruned", extra={"worker": worker.name})
            remove_worker(worker, self._store.state, self._liveness, tx)

    def _offline_since(self, worker: Worker) -> float | None:
        since = self._offline.get(worker.name)
        if since is None or worker.offline_since is None:
            return since
        return min(since, self._clock.moment(worker.offline_since))

    def _prune_at(self, worker: Worker, since: float) -> float:
        # A worker that may still have a lease is not deleted, however short the time is.
        return max(since + self._store.state.settings.worker_prune_seconds, self._liveness.silent_at(worker.name))

    # -- the clock

    def _touch(self, now: float) -> None:
        """Store the wall time if there are deadlines, and follow a wall clock that is a little wrong."""
        self._touch_at = now + TOUCH_SECONDS
        # A wall clock that was set is followed when the deadlines are shifted, which needs space.
        if not self._clock.error():
            self._clock.adjust()
        if len(self._agenda) and not self._store.full:
            self._store.touch()

    def _shift(self, error: datetime.timedelta) -> None:
        """Shift all stored wall times, since the wall clock was set or the controller was stopped for long."""
        state = self._store.state
        _logger.warning(
            "clock was set, or the stop was long: deadlines moved", extra={"seconds": error.total_seconds()}
        )
        try:
            with self._store.transaction() as tx:
                for vm in state.vms.values():
                    if vm.meta.expires_at is not None or vm.state.waiting_since is not None:
                        tx.put(_shifted_vm(vm, error))
                for worker in state.workers.values():
                    if worker.drain is not None or worker.offline_since is not None:
                        tx.put(_shifted_worker(worker, error))
                self._clock.adjust()
        except StorageError:
            self._clock.undo()
            raise

    # -- following the store

    def _follow(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.kind == "vm":
                self._follow_vm(change)
            elif change.kind == "worker":
                self._follow_worker(change)
            elif change.kind == "settings":
                for name in self._store.state.workers:
                    self._plan_worker(name)
        self._wake()

    def _follow_vm(self, change: Change) -> None:
        self._plan_vm(change.name)
        drained = self._store.state.workers
        for vm in (change.old, change.new):
            if isinstance(vm, VM) and (worker := drained.get(vm.state.worker)) is not None and worker.drain is not None:
                self._plan_worker(worker.name)
                self._states.observe(worker)

    def _follow_worker(self, change: Change) -> None:
        if change.old is None:
            self._offline[change.name] = self._clock.monotonic()
        elif change.new is None:
            self._offline.pop(change.name, None)
        self._plan_worker(change.name)

    def _follow_state(self, worker: str) -> None:
        """Note that a worker may have become available or unavailable."""
        if self._liveness.is_available(worker):
            self._offline.pop(worker, None)
        elif worker in self._store.state.workers:
            self._offline.setdefault(worker, self._clock.monotonic())
        self._plan_worker(worker)
        self._wake()

    def _wake(self) -> None:
        if self._agenda.next() < self._sleeps_until:
            self._wakeup.set()

    def _undo(self) -> None:
        self._clock.undo()
        self._rebuild()
        self._wakeup.set()

    def _rebuild(self) -> None:
        self._agenda = Agenda()
        for name in self._store.state.vms:
            self._plan_vm(name)
        for name in self._store.state.workers:
            # Each worker is offline at a start. One whose deletion was undone was forgotten.
            if not self._liveness.is_available(name):
                self._offline.setdefault(name, self._clock.monotonic())
            self._plan_worker(name)

    def _plan_vm(self, name: str) -> None:
        """Note when the actions on a VM are due: never, if it does not exist any more."""
        vm = self._store.state.vms.get(name)
        self._agenda.put(("expire", name), None if vm is None else self._expiry(vm))
        self._agenda.put(("time out", name), None if vm is None else self._end_of_pending(vm))

    def _plan_worker(self, name: str) -> None:
        """Note when the actions on a worker are due: never, if it does not exist any more."""
        worker = self._store.state.workers.get(name)
        self._agenda.put(("drain", name), None if worker is None else self._drain_at(worker))
        self._agenda.put(("prune", name), None if worker is None else self._look_at(worker))

    def _expiry(self, vm: VM) -> float | None:
        return None if vm.meta.expires_at is None else self._clock.moment(vm.meta.expires_at)

    def _end_of_pending(self, vm: VM) -> float | None:
        since = vm.state.waiting_since
        if since is None or vm.state.status != "pending":
            return None
        return self._clock.moment(since) + vm.spec.pending_timeout_seconds

    def _drain_at(self, worker: Worker) -> float | None:
        if worker.drain is None or worker.drain.deadline is None or not _to_end(self._store.state, worker.name):
            return None
        return self._clock.moment(worker.drain.deadline)

    def _look_at(self, worker: Worker) -> float | None:
        """Return when `_prune` has something to do for a worker."""
        if not self._store.state.settings.worker_prune_seconds:
            return None
        now, since = self._clock.monotonic(), self._offline_since(worker)
        if self._store.full:
            return now + TOUCH_SECONDS
        if since is None:
            return now if worker.offline_since is not None else None
        at = self._prune_at(worker, since)
        if at <= now and self._store.state.vms_by_worker.get(worker.name):
            at = now + TOUCH_SECONDS
        # It is stored after a while, since most workers return soon.
        return at if worker.offline_since is not None else min(at, max(now, since + TOUCH_SECONDS))


def _to_end(state: State, worker: str) -> list[VM]:
    """Return the VMs on a worker that its drain ends. Those at rest stay on its disk as they are."""
    return [vm for vm in state.vms_by_worker.get(worker, {}).values() if vm.holds_resources]


def _shifted(time: datetime.datetime | None, error: datetime.timedelta) -> datetime.datetime | None:
    return None if time is None else time + error


def _shifted_vm(vm: VM, error: datetime.timedelta) -> VM:
    meta = replace(vm.meta, expires_at=_shifted(vm.meta.expires_at, error))
    return VM(meta, vm.spec, replace(vm.state, waiting_since=_shifted(vm.state.waiting_since, error)))


def _shifted_worker(worker: Worker, error: datetime.timedelta) -> Worker:
    drain = worker.drain
    if drain is not None:
        drain = replace(drain, deadline=_shifted(drain.deadline, error))
    return replace(worker, drain=drain, offline_since=_shifted(worker.offline_since, error))


def promise_of(worker: str, state: State, liveness: Liveness) -> Promise:
    """Return the promise to store for a worker that is deleted: how long its VMs may run."""
    old = state.promises.get(worker)
    return Promise(worker, max(liveness.promise_ms(worker), old.milliseconds if old is not None else 0))


def remove_worker(worker: Worker, state: State, liveness: Liveness, tx: Transaction) -> None:
    """Delete a worker in a transaction."""
    tx.delete(worker)
    tx.put(promise_of(worker.name, state, liveness))
