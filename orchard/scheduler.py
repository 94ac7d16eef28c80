"""The scheduler: decide which VM goes to which worker, which VMs fail or restart, and why a VM has to wait.

A plan is data. The scheduling loop applies it in one transaction and makes the next plan from the new state, until a
plan is empty. A plan is applied only to the state that it was made from, so it never assigns capacity that is gone.
This file performs no I/O, and times are arguments.

A plan has four steps, in this order:

1. VMs whose worker is away, and that were in no answer to its polls, return to the queue: they cannot run there.
VMs whose worker is deleted or offline fail, with a reason.
2. Failed VMs with the restart policy OnFailure return to pending, each at most once per RESTART_PAUSE_SECONDS. A VM
   whose worker was deleted may still run there for as long as it could on an offline worker, so its restart waits that
   long. So does the restart of a VM that had failed before the controller started, because its worker may have been
   deleted then. A VM that its worker has to end, for a restart or a drain, returns once the worker has reported its end.
3. Pending VMs, by priority and then by age, are assigned to the best worker that fits (decisions/placement.py). A VM that fits
   nowhere does not hold up the next one. No VM that runs makes room for another one.
4. VMs that stay pending get the reason (decisions/waiting.py).

Overtaking is therefore unbounded by design: a VM that asks for a whole worker waits as long as smaller VMs keep every
worker partly used, and one of low priority as long as others of higher priority come.

The `Planner` is updated change by change, and a plan looks only at what may have changed. So one change costs the same
among a hundred VMs and among ten thousand (./run bench plan). Incremental and from-scratch plans are equal, except that
waiting reasons may be some seconds old.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal

from orchard.decisions.placement import Placement, age_of
from orchard.decisions.planning import Plan, PlannerInputs, WorkerTimes
from orchard.schema import VM, SchedulerProfile, VMSpec, Worker
from orchard.transitions import will_restart

# ---- parts of the planner --------------------------------------------------------------------------------------------


class _Timeouts:
    """Workers by a time that their contacts move on. An entry is renewed when it is due, so it may be too early."""

    def __init__(self, time_of: Callable[[str], float], relevant: Mapping[str, object]) -> None:
        self._time_of = time_of
        # Workers that are not in this table are dropped when they are due.
        self._relevant = relevant
        self._heap: list[tuple[float, str]] = []

    def put(self, worker: str) -> None:
        """Add a worker, or note that its time may have become earlier."""
        heapq.heappush(self._heap, (self._time_of(worker), worker))

    def pop_due(self, now: float) -> list[str]:
        """Remove and return the workers whose time has come."""
        due: dict[str, None] = {}
        while self._heap and (self._heap[0][0] <= now or self._heap[0][1] not in self._relevant):
            _, worker = heapq.heappop(self._heap)
            if worker not in self._relevant:
                continue
            if (at := self._time_of(worker)) > now:
                heapq.heappush(self._heap, (at, worker))
            else:
                due[worker] = None
        return list(due)

    def next(self) -> float:
        return self._heap[0][0] if self._heap else math.inf


class _OnlineWorkers:
    """Which workers are available for new VMs, and when the next one may become unavailable."""

    def __init__(self, times: WorkerTimes) -> None:
        self.names: dict[str, None] = {}
        self._times = times
        # Workers that may have become available or unavailable since the last update.
        self.unchecked: dict[str, None] = {}
        self.timeouts = _Timeouts(times.available_until, self.names)

    def check(self, worker: str) -> None:
        """Let the next update check a worker."""
        self.unchecked[worker] = None

    def discard(self, worker: str) -> None:
        self.names.pop(worker, None)

    def update(self, now: float, registered: Mapping[str, Worker]) -> tuple[list[str], list[str]]:
        """Return the workers that became available, and those that became unavailable."""
        came = []
        for worker in self.unchecked:
            if worker in registered and worker not in self.names and self._times.available_until(worker) > now:
                self.names[worker] = None
                came.append(worker)
            if worker in self.names:
                self.timeouts.put(worker)
        self.unchecked.clear()
        went = self.timeouts.pop_due(now)
        for worker in went:
            self.discard(worker)
        return came, went


class _Restarts:
    """The failed VMs that are to be restarted, with the earliest time for each."""

    def __init__(self, inputs: PlannerInputs, workers: Mapping[str, Worker]) -> None:
        self._inputs = inputs
        self._workers = workers
        self._vms: dict[str, VM] = {}
        # (not before this time, VM name). The time may be too early.
        self._heap: list[tuple[float, str]] = []

    def put(self, vm: VM) -> None:
        """Add a failed VM if it is to be restarted."""
        if will_restart(vm):
            self._vms[vm.name] = vm
            heapq.heappush(self._heap, (-math.inf, vm.name))

    def update(self, vm: VM) -> None:
        if vm.name in self._vms:
            self._vms[vm.name] = vm

    def drop(self, name: str) -> None:
        self._vms.pop(name, None)

    def review(self, worker: str) -> None:
        """Look again at the VMs of a worker that was deleted or replaced."""
        for vm in self._vms.values():
            if vm.state.worker == worker:
                heapq.heappush(self._heap, (-math.inf, vm.name))

    def plan(self, now: float, plan: Plan) -> None:
        """Add the VMs whose time has come to the plan."""
        ready = []
        while self._heap and self._heap[0][0] <= now:
            _, name = heapq.heappop(self._heap)
            vm = self._vms.get(name)
            if vm is None:
                continue
            at = self._inputs.restart_at(vm, self._workers.get(vm.state.worker))
            if at > now:
                heapq.heappush(self._heap, (at, name))
            else:
                ready.append((at, name))
        if self._heap:
            plan.set_due(self._heap[0][0])
        # These entries stay here until the plan is applied.
        for entry in ready:
            heapq.heappush(self._heap, entry)
        names = sorted({name for _, name in ready})[: plan.capacity]
        plan.capacity -= len(names)
        for name in names:
            vm = self._vms[name]
            is_withdrawn = self._inputs.is_withdrawn(vm, self._workers.get(vm.state.worker))
            (plan.withdraw if is_withdrawn else plan.restart).append(name)


# ---- the planner -----------------------------------------------------------------------------------------------------


class Planner:
    """The VMs and workers of a cluster, arranged for planning.

    Its owner reports each change: `put_worker`, `drop_worker`, `put_vm`, `drop_vm`, and `worker_returned` for a
    worker's first contact, also after it was offline.
    """

    def __init__(self, inputs: PlannerInputs) -> None:
        self._inputs = inputs
        self._workers: dict[str, Worker] = {}
        self._vms: dict[str, VM] = {}
        # Worker name -> its VMs that have not failed.
        self._active_vms: defaultdict[str, dict[str, None]] = defaultdict(dict)
        # Workers that have active VMs and are deleted or offline.
        self._lost: dict[str, None] = {}
        self._online = _OnlineWorkers(inputs.workers)
        # Workers with active VMs, by the time at which these fail, and at which VMs that no poll has shown return to
        # the queue.
        self._silence = _Timeouts(inputs.workers.silent_at, self._active_vms)
        self._absence = _Timeouts(inputs.workers.away_at, inputs.workers.unnamed)
        self._restarts = _Restarts(inputs, self._workers)
        self.placement = Placement(inputs, self._vms, self._workers, self._online.names)

    def put_worker(self, worker: Worker) -> None:
        """Add or replace a worker."""
        old = self._workers.get(worker.name)
        self._workers[worker.name] = worker
        if old is not None and old.created_at != worker.created_at:
            self._restarts.review(worker.name)
        self._online.check(worker.name)
        self.placement.put_worker(worker)

    def drop_worker(self, name: str) -> None:
        """Remove a worker."""
        del self._workers[name]
        self._online.discard(name)
        self._restarts.review(name)
        self.placement.drop_worker(name)
        if self._active_vms.get(name):
            self._lost[name] = None

    def check_worker(self, name: str) -> None:
        """Record that a worker's times or its early failures may have changed, except by a contact in time."""
        self._online.check(name)
        self.placement.touch(name)
        if name in self._inputs.workers.unnamed:
            self._absence.put(name)
        if self._active_vms.get(name):
            self._silence.put(name)

    def put_vm(self, vm: VM) -> None:
        """Add or replace a VM."""
        name = vm.meta.name
        old = self._vms.get(name)
        if old is not None and self._relevant(old) == self._relevant(vm):
            self._vms[name] = vm
            match _role(vm):
                case "failed":
                    self._restarts.update(vm)
                case "pending":
                    self.placement.update(vm)
            return
        if old is not None:
            self.drop_vm(name)
        self._vms[name] = vm
        match _role(vm):
            case "failed":
                self._restarts.put(vm)
            case "active":
                worker = vm.state.worker
                is_first = not self._active_vms[worker]
                self._active_vms[worker][name] = None
                if worker not in self._workers:
                    self._lost[worker] = None
                elif is_first:
                    self._silence.put(worker)
                if name in self._inputs.workers.unnamed.get(worker, ()):
                    self._absence.put(worker)
                self.placement.add_load(vm)
            case "pending":
                self.placement.put(vm)

    def drop_vm(self, name: str) -> None:
        """Remove a VM."""
        vm = self._vms.pop(name)
        match _role(vm):
            case "failed":
                self._restarts.drop(name)
            case "active":
                vms = self._active_vms[vm.state.worker]
                del vms[name]
                if not vms:
                    del self._active_vms[vm.state.worker]
                self.placement.add_load(vm, -1)
            case "pending":
                self.placement.drop(vm)

    @property
    def is_settled(self) -> bool:
        """Whether the last plan has found no worker for any VM that waits, and nothing has changed since."""
        return self.placement.is_settled and not self._online.unchecked

    def waiting_reason(self, spec: VMSpec) -> str:
        """Return why a new VM will wait, if VMs of the same kind wait and nothing has changed since; else ""."""
        return self.placement.current_reason(spec) if not self._online.unchecked else ""

    def plan(self, now: float, profile: SchedulerProfile, limit: int = sys.maxsize) -> Plan:
        """Decide the next changes, for at most `limit` VMs."""
        plan = Plan(capacity=limit)
        came, plan.offline = self._online.update(now, self._workers)
        for worker in (*came, *plan.offline):
            self.placement.touch(worker)
        for worker in self._absence.pop_due(now):
            self._unassign_vms_of(worker, plan)
        for worker in self._silence.pop_due(now):
            self._lost[worker] = None
        for worker in sorted(self._lost):
            self._fail_vms_of(worker, now, plan)
        self._restarts.plan(now, plan)
        some_wait = self.placement.plan(now, profile, plan)
        plan.set_due(min(self._silence.next(), self._absence.next()))
        # A worker that becomes unavailable matters for reasons only.
        if some_wait:
            plan.set_due(self._online.timeouts.next())
        return plan

    def _unassign_vms_of(self, worker: str, plan: Plan) -> None:
        """Return the VMs to the queue that were assigned to a worker which is away and does not know them."""
        reason = f'waiting: worker "{worker}" went away before it knew of the VM'
        for name, uid in self._inputs.workers.unnamed.get(worker, {}).items():
            vm = self._vms.get(name)
            if vm is None or vm.uid != uid or vm.state.worker != worker or vm.state.status != "pending":
                continue
            if not plan.capacity:
                self._absence.put(worker)
                return
            plan.unassign[name] = reason
            plan.capacity -= 1
        if plan.unassign:
            # The worker is checked again, whether or not the plan is applied.
            self._absence.put(worker)

    def _relevant(self, vm: VM) -> tuple[object, ...]:
        """Return all that plans depend on. A VM that keeps it has not changed for the planner."""
        ending = (vm.state.end_request, vm.state.ended_at)
        return _role(vm), vm.state.worker, ending, vm.holds_resources, self._inputs.kind_of_vm(vm), age_of(vm)

    def _fail_vms_of(self, worker: str, now: float, plan: Plan) -> None:
        if worker in self._workers and self._inputs.workers.silent_at(worker) > now:
            # The worker has made contact since.
            del self._lost[worker]
            self._silence.put(worker)
            return
        if worker not in self._active_vms:
            del self._lost[worker]
            return
        if worker in self._workers:
            limit = f"{self._inputs.offline_timeout:g}"
            reason = f'worker "{worker}" is offline: no contact for {limit} seconds'
        else:
            reason = f'worker "{worker}" was deleted'
        names = [name for name in self._active_vms[worker] if name not in plan.unassign][: plan.capacity]
        plan.fail.update(dict.fromkeys(names, reason))
        plan.capacity -= len(names)


def _role(vm: VM) -> Literal["failed", "active", "pending", "none"]:
    if vm.state.status == "failed":
        return "failed"
    if vm.state.worker:
        return "active"
    return "pending" if vm.state.status == "pending" else "none"
