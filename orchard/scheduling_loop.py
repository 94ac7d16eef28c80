"""The scheduling loop: keep a planner up to date, apply its plans, and find workers that went offline.

Which VM goes where is decided in scheduler.py. What follows from a change once it is durable is in reactions.py.

The loop runs when the state changes, when an offline worker returns, when time alone makes a plan due, and at the
latest every TICK_SECONDS. Each round plans and applies changes for at most VMS_PER_PLAN VMs, so that other tasks run in
between, until a plan is empty.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

import trio

from orchard import transitions
from orchard.liveness import Liveness
from orchard.nursery import Wakeup
from orchard.scheduler import Plan, Planner, PlannerInputs
from orchard.schema import VM, VMSpec, Worker
from orchard.storage.errors import StorageError
from orchard.store import Change, Store

# A plan of this many VMs takes some milliseconds, for which all other tasks wait.
VMS_PER_PLAN = 50
# The longest time between two rounds.
TICK_SECONDS = 5.0
# If the loop wakes this late, the process was stalled and could not read what workers sent: extend their time.
STALL_SECONDS = 0.1
# A failed write is not repeated more often, so that a full disk is not busy with refusals.
WRITE_RETRY_SECONDS = 1.0

_logger = logging.getLogger("orchard.controller")


class SchedulingLoop:
    """The scheduler's loop over a store, with the liveness of its workers. `clock` is the wall clock."""

    def __init__(self, store: Store, offline_timeout: float, clock: Callable[[], datetime.datetime]) -> None:
        self._store = store
        self._clock = clock
        self._wakeup = Wakeup()
        # VM uid -> its last restart, by the monotonic clock.
        self._restarted_at: dict[str, float] = {}
        self._offline: set[str] = set()
        self.liveness = Liveness(trio.current_time, offline_timeout, self._worker_returned, store.state.workers)
        self._inputs = PlannerInputs(
            last_contact=self.liveness.last_contact,
            last_contact_of_deleted=self.liveness.last_contact_of_deleted,
            restarted_at=self._restarted_at,
            offline_timeout=offline_timeout,
            started_at=self.liveness.started_at,
            failed_before_start={vm.uid for vm in store.state.vms.values() if vm.state.status == "failed"},
        )
        self.planner: Planner
        self._rebuild_planner()
        store.on_commit(self._update_planner)
        store.on_undo(self._rebuild_planner)

    def waiting_reason(self, spec: VMSpec) -> str:
        """Return why a new VM will wait, as far as that is known; else ""."""
        return self.planner.waiting_reason(spec)

    def forget_vm(self, uid: str) -> None:
        """Forget a VM whose deletion is durable."""
        self._restarted_at.pop(uid, None)

    def forget_worker(self, name: str) -> None:
        """Forget a worker whose deletion is durable."""
        self.liveness.record_deletion(name)
        self._offline.discard(name)

    async def run(self) -> None:
        """Schedule until cancelled."""
        while True:
            now = trio.current_time()
            try:
                while (due := self.schedule_some(now, self._clock())) is None:
                    await trio.lowlevel.checkpoint()
                await self._store.wait_durable()
            except StorageError as error:
                _logger.error("scheduling paused, cannot write: %s", error)
                await trio.sleep(WRITE_RETRY_SECONDS)
                continue
            due = min(due, now + TICK_SECONDS)
            with trio.move_on_at(due):
                await self._wakeup.wait()
            if (late := trio.current_time() - due) > STALL_SECONDS:
                _logger.warning("scheduler stalled", extra={"seconds": round(late, 1)})
                self.liveness.extend_for_stall(late)

    def schedule_some(self, now: float, wall_time: datetime.datetime) -> float | None:
        """Plan for some VMs and apply the plan.

        Return when time alone makes another plan due (by the monotonic clock), or None if there may be more to do now.
        """
        plan = self.planner.plan(now, self._store.state.settings.scheduler_profile, VMS_PER_PLAN)
        for worker in plan.offline:
            self._offline.add(worker)
            _logger.warning("worker offline", extra={"worker": worker})
        if plan.has_changes and self._apply(plan, now, wall_time):
            return None
        # A plan that is full, but changed nothing, may be followed by one that does.
        return plan.next_at if plan.capacity else None

    def _apply(self, plan: Plan, now: float, wall_time: datetime.datetime) -> bool:
        """Apply a plan in one transaction. Return whether it changed anything."""
        vms, workers = self._store.state.vms, self._store.state.workers
        with self._store.transaction() as tx:
            for name, reason in plan.fail.items():
                tx.put(transitions.fail(vms[name], reason))
            for name in plan.restart:
                tx.put(transitions.restart(vms[name], wall_time))
                self._restarted_at[vms[name].uid] = now
                self._inputs.failed_before_start.discard(vms[name].uid)
            for name, worker in plan.assign.items():
                tx.put(transitions.assign(vms[name], workers[worker], wall_time))
            for name, reason in plan.waiting.items():
                waiting = transitions.explain(vms[name], reason)
                if waiting is not vms[name]:
                    tx.put(waiting)
            return bool(tx.changes)

    def _rebuild_planner(self) -> None:
        state = self._store.state
        self.planner = Planner(self._inputs)
        for worker in state.workers.values():
            self.planner.put_worker(worker)
        for vm in state.vms.values():
            self.planner.put_vm(vm)

    def _update_planner(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change.new, VM):
                self.planner.put_vm(change.new)
            elif isinstance(change.new, Worker):
                self.planner.put_worker(change.new)
            elif isinstance(change.old, VM) and change.new is None:
                self.planner.drop_vm(change.name)
            elif isinstance(change.old, Worker) and change.new is None:
                self.planner.drop_worker(change.name)
        self._wakeup.set()

    def _worker_returned(self, worker: str) -> None:
        if worker in self._offline:
            self._offline.discard(worker)
            _logger.info("worker returned", extra={"worker": worker})
        self.planner.worker_returned(worker)
        self._wakeup.set()
