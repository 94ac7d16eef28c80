"""The scheduling loop: keep a planner up to date, apply its plans, and find workers that went offline.

Which VM goes where is decided in scheduler.py. What follows from a change once it is durable is in reactions.py.

The loop runs when the state changes, when an offline worker returns, when time alone makes a plan due, and at the
latest every TICK_SECONDS. Each round plans and applies changes for at most VMS_PER_PLAN VMs, so that other tasks run in
between, until a plan is empty.
"""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from orchard import transitions
from orchard.base.metrics import WORK_SECONDS, Histogram
from orchard.base.nursery import Wakeup
from orchard.control.worker_states import WorkerStates
from orchard.decisions.early_failures import EarlyFailures
from orchard.decisions.liveness import Liveness
from orchard.decisions.planning import Plan, PlannerInputs
from orchard.resources.cluster import ClusterIdentity
from orchard.scheduler import Planner
from orchard.schema import VM, ClusterSettings, Worker
from orchard.state.changes import Change
from orchard.storage.errors import StorageError
from orchard.store import Store, Transaction

# A plan of this many VMs takes some milliseconds, for which all other tasks wait.
VMS_PER_PLAN = 50
# The longest time between two rounds.
TICK_SECONDS = 5.0
# If the loop wakes this late, the process was stalled and could not read requests of workers: extend their time.
STALL_SECONDS = 0.1
# The most plans for which one request waits. Only a flood of new VMs makes it wait so long.
_MAX_PLANS = 1_000
_BYTES_PER_GB = 10**9
# The least pause before a failed write is repeated, so that a full disk is not busy with refusals.
WRITE_RETRY_SECONDS = 1.0

_logger = logging.getLogger("orchard.controller")


@dataclass(slots=True)
class SchedulingFigures:
    """The loop's figures: the durations of its steps, the seconds for which it was late, and its last round.

    `looked_at` is when all that was due had been done, by trio's clock.
    """

    looked_at: float
    steps: Histogram = field(default_factory=lambda: Histogram(WORK_SECONDS))
    stalled: float = 0.0


class SchedulingLoop:
    """The scheduler's loop over a store, with the liveness of its workers. `clock` is the wall clock."""

    def __init__(self, store: Store, offline_timeout: float, clock: Callable[[], datetime.datetime]) -> None:
        self._store = store
        self._clock = clock
        self._wakeup = Wakeup()
        self.figures = SchedulingFigures(trio.current_time())
        # VM uid -> its last restart, by the monotonic clock.
        self._restarted_at: dict[str, float] = {}
        self._offline: set[str] = set()
        # Workers whose pending VMs need a new status message.
        self._changed: dict[str, None] = {}
        self._is_applying = False
        state = store.state
        self.liveness = Liveness(
            trio.current_time,
            offline_timeout,
            self._worker_changed,
            {name: worker.promised / 1000 for name, worker in state.workers.items()},
            {name: promise.milliseconds / 1000 for name, promise in state.promises.items()},
        )
        self._failures = EarlyFailures()
        self._restored = RestoredState(store, self.liveness)
        self._inputs = PlannerInputs(
            workers=self.liveness,
            failures=self._failures,
            facts=self.liveness.facts,
            restarted_at=self._restarted_at,
            offline_timeout=offline_timeout,
            forgotten_until=self.liveness.started_at + self.liveness.longest_promise(),
            failed_before_start={vm.uid for vm in state.vms.values() if vm.state.status == "failed"},
            held=self._restored.held,
            min_free_bytes=lambda: _BYTES_PER_GB * state.settings.min_free_disk_gb,
            why_frozen=self._restored.why_frozen,
        )
        self.planner: Planner
        self._rebuild_planner()
        self.states = WorkerStates(
            self.liveness,
            self._failures,
            lambda worker: self.planner.placement.load_of(worker),
            state.vms_by_worker,
            clock,
        )
        for worker in state.workers.values():
            self.states.observe(worker)
        self.states.on_change(store.touch_worker)
        store.log.show_worker = lambda worker, json: b"".join(self.states.json_parts(worker, json, images=False))
        store.log.show_images = self.liveness.facts.images
        store.on_commit(self._update_planner)
        store.on_undo(self._rebuild_planner)

    async def settle(self) -> bool:
        """Place all VMs that can be placed. Return whether none is left. Raises StorageError."""
        for _ in range(_MAX_PLANS):
            self.schedule_some(trio.current_time(), self._clock())
            if self.planner.is_settled:
                return True
            await trio.lowlevel.checkpoint()
        return False

    def assign(self, name: str, worker: str) -> None:
        """Assign a VM that was just created to the worker that the planner has found for it."""
        with self._store.transaction() as tx:
            self._put_assignment(tx, name, worker, self._clock())

    def forget_vm(self, uid: str) -> None:
        """Forget a VM whose deletion is durable."""
        self._restarted_at.pop(uid, None)
        self._failures.forget_vm(uid)

    def forget_worker(self, name: str) -> None:
        """Forget a worker whose deletion is durable."""
        self._failures.forget_worker(name)
        if name in self._store.state.workers:
            # It has registered again before the deletion was durable. The session that began then goes on.
            self.liveness.record_replacement(name)
            return
        self.liveness.record_deletion(name)
        self.states.forget(name)
        self._offline.discard(name)

    async def run(self) -> None:
        """Schedule until cancelled."""
        while True:
            now = trio.current_time()
            try:
                while (due := self.schedule_some(now, self._clock())) is None:
                    await trio.lowlevel.checkpoint()
                await self.end_promises()
                self.figures.looked_at = trio.current_time()
            except StorageError as error:
                _logger.error("scheduling paused, cannot write: %s", error)
                await trio.sleep(WRITE_RETRY_SECONDS)
                continue
            due = min(due, now + TICK_SECONDS)
            with trio.move_on_at(due):
                await self._wakeup.wait()
            if (late := trio.current_time() - due) > STALL_SECONDS:
                _logger.warning("scheduler stalled", extra={"seconds": round(late, 1)})
                self.figures.stalled += late
                self.liveness.extend_for_stall(late)

    def schedule_some(self, now: float, wall_time: datetime.datetime) -> float | None:
        """Plan for some VMs and apply the plan.

        Return when time alone makes another plan due (by the monotonic clock), or None if there may be more to do now.
        """
        began = time.perf_counter()
        try:
            self._inform_vms()
            plan = self.planner.plan(now, self._store.state.settings.scheduler_profile, VMS_PER_PLAN)
            for worker in plan.offline:
                self._note_offline(worker)
            if self._apply(plan, now, wall_time):
                return None
            # A full plan that changed nothing may be followed by a plan that does.
            return plan.next_at if plan.capacity else None
        finally:
            self.figures.steps.observe(time.perf_counter() - began)

    def _note_offline(self, worker: str) -> None:
        self._offline.add(worker)
        self._observe(worker)
        reason = self.liveness.why_unavailable(worker)
        # A worker that said goodbye was stopped on purpose.
        level = logging.INFO if reason == "stopped" else logging.WARNING
        _logger.log(level, "worker offline", extra={"worker": worker, "reason": reason})

    def _apply(self, plan: Plan, now: float, wall_time: datetime.datetime) -> bool:
        """Apply a plan in one transaction. Return whether it changed anything."""
        vms = self._store.state.vms
        # Changes of a plan are not reports of a worker.
        self._is_applying = True
        try:
            with self._store.transaction() as tx:
                for name, reason in plan.unassign.items():
                    tx.put(transitions.unassign(vms[name], reason, wall_time))
                for name, reason in plan.fail.items():
                    tx.put(transitions.fail(vms[name], reason))
                for name in plan.restart:
                    tx.put(transitions.restart(vms[name], wall_time))
                    self._restarted_at[vms[name].uid] = now
                    self._inputs.failed_before_start.discard(vms[name].uid)
                for name in plan.withdraw:
                    tx.put(transitions.withdraw_restart(vms[name]))
                for name, worker in plan.assign.items():
                    self._put_assignment(tx, name, worker, wall_time)
                for name, reason in plan.waiting.items():
                    waiting = transitions.explain(vms[name], reason)
                    if waiting is not vms[name]:
                        tx.put(waiting)
                return bool(tx.changes)
        finally:
            self._is_applying = False

    def _put_assignment(self, tx: Transaction, name: str, worker: str, wall_time: datetime.datetime) -> None:
        state = self._store.state
        tx.put(transitions.assign(state.vms[name], state.workers[worker], wall_time))
        self.liveness.record_assignment(worker, name, state.vms[name].uid)

    def _rebuild_planner(self) -> None:
        state = self._store.state
        self.planner = Planner(self._inputs)
        for worker in state.workers.values():
            self.planner.put_worker(worker)
        for vm in state.vms.values():
            self.planner.put_vm(vm)

    def _update_planner(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change.old, VM):
                self._follow_end_request(change.old, change.new if isinstance(change.new, VM) else None)
            if isinstance(change.new, VM):
                self.planner.put_vm(change.new)
                if not self._is_applying and isinstance(change.old, VM):
                    self._follow_report(change.old, change.new)
            elif isinstance(change.new, Worker):
                self.planner.put_worker(change.new)
                self.states.observe(change.new)
            elif isinstance(change.new, ClusterSettings):
                for name in self._store.state.workers:
                    self.planner.check_worker(name)
            # The first identity, of a new state, changes nothing for a VM.
            elif isinstance(change.new, ClusterIdentity) and change.old is not None:
                self._restored.follow(change.new)
                self._rebuild_planner()
            elif isinstance(change.old, VM) and change.new is None:
                self.planner.drop_vm(change.name)
            elif isinstance(change.old, Worker) and change.new is None:
                self.planner.drop_worker(change.name)
        self._wakeup.set()

    def _follow_end_request(self, old: VM, new: VM | None) -> None:
        """Tell the liveness which VMs their workers have to end."""
        before, now = old.state.end_request, "" if new is None else new.state.end_request
        if before and not now:
            self.liveness.forget_end_request(old.state.worker, old.uid)
        elif now and not before:
            self.liveness.record_end_request(old.state.worker, old.uid)

    def _follow_report(self, old: VM, new: VM) -> None:
        """Record whether a worker has reported a VM as running, or as failed before it ran."""
        worker, before, now = new.state.worker, old.state.status, new.state.status
        if not worker or before == now or (before, now) == ("running", "failed") or new.state.end_request:
            return
        if now == "failed":
            self._failures.record_failure(new, trio.current_time(), self._clock())
        elif now == "running":
            self._failures.record_run(new)
        self.planner.check_worker(worker)
        self._observe(worker)

    def _worker_changed(self, worker: str) -> None:
        if worker in self._offline and self.liveness.available_until(worker) > trio.current_time():
            self._offline.discard(worker)
            _logger.info("worker returned", extra={"worker": worker})
        self._observe(worker)
        self._changed[worker] = None
        self.planner.check_worker(worker)
        self._wakeup.set()

    def _observe(self, worker: str) -> None:
        if (stored := self._store.state.workers.get(worker)) is not None:
            self.states.observe(stored)

    def _inform_vms(self) -> None:
        """Set the status message of pending VMs on a worker that is not ready to the worker's problem."""
        while self._changed:
            worker, _ = self._changed.popitem()
            problems = self.liveness.health(worker).problems
            if not problems or self.liveness.available_until(worker) > trio.current_time():
                continue
            message = f'worker "{worker}" is not ready: {problems[0].what}: {problems[0].message}'
            with self._store.transaction() as tx:
                for vm in self._store.state.vms_by_worker.get(worker, {}).values():
                    if vm.state.status == "pending" and (told := transitions.explain(vm, message)) is not vm:
                        tx.put(told)

    async def end_promises(self) -> None:
        """Store that longer promises are over, and that a restored state no longer holds VMs back.

        A failed write is repeated in the next round. Raises StorageError.
        """
        state = self._store.state
        # On a full disk the transaction would be refused.
        live, deleted = ({}, {}) if self._store.full else self.liveness.promises_over()
        if live or deleted or self._restored.is_over():
            with self._store.transaction() as tx:
                for worker in (state.workers[name] for name in live if name in state.workers):
                    tx.put(replace(worker, promised=self.liveness.offline_timeout_ms))
                for promise in (state.promises[name] for name in deleted if name in state.promises):
                    tx.delete(promise)
                if self._restored.is_over():
                    tx.put(replace(state.cluster, holds_back=False))
        await self._store.wait_durable()
        self.liveness.forget_promises(live, deleted)


class RestoredState:
    """The consequences of a state that was restored from an older copy.

    Until it is accepted, nothing is placed. After that, the VMs that were in it when this process started are placed
    only when all leases are over that their workers may have: they may run where the state does not show them.
    """

    def __init__(self, store: Store, liveness: Liveness) -> None:
        self._store = store
        self._liveness = liveness
        self._loaded = [vm.uid for vm in store.state.vms.values()]
        self._over_at = math.inf
        # VM uid -> when it may be placed.
        self.held: dict[str, float] = {}
        self.follow(store.state.cluster)

    def follow(self, cluster: ClusterIdentity) -> None:
        """Follow a change of the cluster's identity."""
        self.held.clear()
        if cluster.holds_back and not cluster.restored_from:
            self._over_at = trio.current_time() + self._liveness.longest_promise()
            self.held.update(dict.fromkeys(self._loaded, self._over_at))

    def is_over(self) -> bool:
        """Return whether VMs have been held back for long enough."""
        cluster = self._store.state.cluster
        return cluster.holds_back and not cluster.restored_from and trio.current_time() >= self._over_at

    def why_frozen(self) -> str:
        """Return why nothing may be placed, or ""."""
        if not self._store.state.cluster.restored_from:
            return ""
        return (
            "the controller's state was restored from an older copy, and workers have seen a newer one;"
            " accept it with: orchard accept-state"
        )
