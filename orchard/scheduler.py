"""The scheduler: decide which VM goes to which worker, which VMs fail or restart, and why a VM has to wait.

A plan is data. The scheduling loop applies it in one transaction and makes the next plan from the new state, until a
plan is empty. A plan is applied only to the state that it was made from, so it never assigns capacity that is gone.
This file performs no I/O, and times are arguments.

A plan has four steps, in this order:

1. VMs whose worker is away, and that no answer to its polls ever named, return to the queue: they cannot run there.
   VMs whose worker is deleted or offline fail, with a reason.
2. Failed VMs with the restart policy OnFailure return to pending, each at most once per RESTART_PAUSE_SECONDS. A VM
   whose worker was deleted may still run there for as long as it could on an offline worker, so its restart waits that
   long. So does the restart of a VM that had failed before the controller started, because its worker may have been
   deleted then. A VM that its worker has to end, for a restart or a drain, returns once the worker has reported its end.
3. Pending VMs, oldest first, are assigned to the fullest (or emptiest, by profile) worker that fits. Workers on which
   VMs fail before they run come last (early_failures.py). A VM that fits nowhere does not hold up the next one.
4. VMs that stay pending get the reason.

Overtaking is therefore unbounded by design: a VM that asks for a whole worker waits as long as smaller VMs keep every
worker partly used.

The `Planner` is updated change by change, and a plan looks only at what may have changed. So one change costs the same
among a hundred VMs and among ten thousand (./run bench plan). For each recent kind of demand the planner has a heap of
the workers that could take one more such VM. A change of a worker's load moves only that worker in the heaps.
Incremental and from-scratch plans are equal, except that waiting reasons may be up to REASON_SECONDS old.
"""

from __future__ import annotations

import bisect
import datetime
import heapq
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from orchard.planning import Demand, Load, Plan, PlannerInputs, WorkerTimes, demand_of, fits
from orchard.schema import VM, SchedulerProfile, VMSpec, Worker
from orchard.transitions import will_restart

# Between two searches for a waiting reason, because each search examines all workers.
REASON_SECONDS = 1.0
# Kinds of demand whose candidates are kept although no VM of the kind waits.
_MAX_IDLE_DEMANDS = 64
# Positions in a waiting reason.
_UNAVAILABLE, _PAUSED, _FAILING = 0, 1, 2
# Of a waiting reason. Each worker may fail at something of its own.
_MAX_PARTS = 12
_LONG_AGO = datetime.datetime.min.replace(tzinfo=datetime.UTC)


def _why_not(
    demand: Demand, workers: Mapping[str, Worker], exclude: Callable[[str], tuple[int, str] | None], placed: _Placed
) -> str:
    """Return why no worker can take a VM. Each worker counts under the first thing that excludes it.

    `exclude` returns the position and the text of what excludes a worker whatever it offers.
    """
    total = len(workers)
    if not total:
        return "waiting: no worker has registered yet"
    # (position in the sentence, reason) -> number of workers
    reasons: Counter[tuple[int, str]] = Counter()
    # (resource, wanted) -> free amount on each worker
    short: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for name, worker in workers.items():
        if (excluded := exclude(name)) is not None:
            reasons[excluded] += 1
        elif worker.scheduling_paused:
            reasons[_PAUSED, "paused"] += 1
        elif worker.arch != demand.arch:
            reasons[3, f"of another arch ({demand.arch} wanted)"] += 1
        elif worker.runtime != demand.runtime:
            reasons[4, f"of another runtime ({demand.runtime} wanted)"] += 1
        elif missing := [pair for pair in demand.labels if worker.labels.get(pair[0]) != pair[1]]:
            label, value = missing[0]
            reasons[5, f"without label {label}={value}"] += 1
        else:
            used = placed.load_of(name).used
            for resource, wanted in demand.resources:
                free = max(0, worker.resources.get(resource, 0) - used.get(resource, 0))
                if free < wanted:
                    short[resource, wanted].append(free)
                    break
    parts = [f"{count} {reason}" for (_, reason), count in sorted(reasons.items())]
    for (resource, wanted), free_list in sorted(short.items()):
        verb, most = ("lacks", "") if len(free_list) == 1 else ("lack", " at most")
        parts.append(f"{len(free_list)} {verb} {resource} ({wanted} wanted, {max(free_list)} free{most})")
    if len(parts) > _MAX_PARTS:
        parts[_MAX_PARTS:] = [f"and {len(parts) - _MAX_PARTS} other reasons"]
    return f"waiting: {total} worker{'s' if total > 1 else ''}: {', '.join(parts)}"


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
        # They stay here until the plan is applied.
        for entry in ready:
            heapq.heappush(self._heap, entry)
        plan.restart = sorted({name for _, name in ready})[: plan.capacity]
        plan.capacity -= len(plan.restart)


# The lowest rank is the best: (whether VMs fail there, load count with the sign of the profile, worker name).
_Rank = tuple[bool, int, str]
# The oldest VM comes first: (time of creation, VM name).
_Age = tuple[datetime.datetime, str]


class _Candidates:
    """The workers that could take one more VM of some demand, the best first. Stale heap entries are skipped."""

    __slots__ = ("_heap", "_rank")

    def __init__(self, ranks: dict[str, _Rank]) -> None:
        self._rank = ranks
        self._heap = list(ranks.values())
        heapq.heapify(self._heap)

    def put(self, name: str, rank: _Rank | None) -> None:
        """Set the rank of a worker, or with None remove it."""
        if rank is None:
            self._rank.pop(name, None)
        elif self._rank.get(name) != rank:
            self._rank[name] = rank
            heapq.heappush(self._heap, rank)
            if len(self._heap) > 4 * len(self._rank) + 64:
                self._heap = sorted(self._rank.values())

    def best(self) -> str | None:
        while self._heap:
            rank = self._heap[0]
            if self._rank.get(rank[-1]) == rank:
                return rank[-1]
            heapq.heappop(self._heap)
        return None


class _Queue:
    """The pending VMs of one demand, oldest first, and the reason why they wait."""

    def __init__(self) -> None:
        self.vms: list[_Age] = []
        # VMs whose status message is not the reason yet.
        self.uninformed: dict[str, None] = {}
        self.reason = ""
        # The placement's version when the reason was found.
        self.version = -1
        self.reason_at = -math.inf

    def inform(self, vm: VM) -> None:
        """Mark a VM as uninformed, unless its status message is the reason already."""
        if not self.reason or vm.state.status_message != self.reason:
            self.uninformed[vm.meta.name] = None


class _Placed:
    """What a plan assigns: the number of VMs of each demand (its oldest), and the loads with them."""

    def __init__(self, loads: defaultdict[str, Load]) -> None:
        self.counts: Counter[Demand] = Counter()
        self.changed: dict[str, Load] = {}
        self._loads = loads

    def load_of(self, worker: str) -> Load:
        return self.changed.get(worker) or self._loads[worker]

    def add(self, worker: str, demand: Demand, vm: VM) -> Load:
        self.counts[demand] += 1
        load = self.changed[worker] = self.changed.get(worker) or self._loads[worker].copy()
        load.add(vm)
        return load


class _Placement:
    """The pending VMs, and the candidates among the online workers for each kind of demand."""

    def __init__(
        self, inputs: PlannerInputs, vms: Mapping[str, VM], workers: Mapping[str, Worker], online: Mapping[str, None]
    ) -> None:
        self._inputs = inputs
        self._vms = vms
        self._workers = workers
        self._online = online
        self._now = -math.inf
        # Workers that take no VM, or not one of a demand, for a pause -> its end.
        self._pauses: dict[str, float] = {}
        self._loads: defaultdict[str, Load] = defaultdict(Load)
        self._queues: dict[Demand, _Queue] = {}
        self._candidates: dict[Demand, _Candidates] = {}
        # Workers whose ranks may have changed.
        self._changed_workers: dict[str, None] = {}
        self._profile: SchedulerProfile = "optimize-utilization"
        # Changes with everything that reasons depend on.
        self._version = 0

    def touch(self, worker: str) -> None:
        """Record that a worker, its load or its liveness changed."""
        self._changed_workers[worker] = None
        self._version += 1

    def add_load(self, vm: VM, times: int = 1) -> None:
        """Add the load of an active VM to its worker, or with -1 subtract it."""
        if vm.holds_resources:
            self._loads[vm.state.worker].add(vm, times)
            self.touch(vm.state.worker)

    def load_of(self, worker: str) -> Load:
        return self._loads.get(worker) or Load()

    def put(self, vm: VM) -> None:
        """Add a pending VM."""
        queue = self._queues.setdefault(self._inputs.demand_of_vm(vm), _Queue())
        bisect.insort(queue.vms, _age(vm))
        queue.inform(vm)

    def update(self, vm: VM) -> None:
        """Replace a pending VM by one of the same demand and age."""
        self._queues[self._inputs.demand_of_vm(vm)].inform(vm)

    def drop(self, vm: VM) -> None:
        """Remove a pending VM."""
        demand = self._inputs.demand_of_vm(vm)
        queue = self._queues[demand]
        del queue.vms[bisect.bisect_left(queue.vms, _age(vm))]
        queue.uninformed.pop(vm.name, None)
        if not queue.vms:
            del self._queues[demand]

    def current_reason(self, spec: VMSpec) -> str:
        """Return why VMs of the same demand wait, or "" if that is unknown or may have changed."""
        queue = self._queues.get(demand_of(spec))
        return "" if queue is None or queue.version != self._version else queue.reason

    def plan(self, now: float, profile: SchedulerProfile, plan: Plan) -> bool:
        """Add assignments and waiting reasons to a plan. Return whether VMs stay pending."""
        if profile != self._profile:
            self._profile = profile
            self._candidates.clear()
        self._now = now
        for name in [name for name, until in self._pauses.items() if until <= now]:
            del self._pauses[name]
            self.touch(name)
        for name in self._changed_workers:
            for demand, candidates in self._candidates.items():
                candidates.put(name, self._rank(demand, name, self._loads[name]))
        self._changed_workers.clear()
        placed = self._assign(plan)
        self._explain(now, placed, plan)
        some_wait = sum(len(queue.vms) for queue in self._queues.values()) > len(plan.assign)
        if some_wait and not self._inputs.why_frozen():
            for at in (*self._pauses.values(), *(demand.held_until for demand in self._queues)):
                if at > now:
                    plan.set_due(at)
        return some_wait

    def _assign(self, plan: Plan) -> _Placed:
        placed = _Placed(self._loads)
        if self._inputs.why_frozen():
            return placed
        demands = [demand for demand in self._queues if demand.held_until <= self._now]
        candidates = {demand: self._candidates_for(demand) for demand in demands}
        # The oldest VM of each demand: (its age, its position in its queue, the position of its demand).
        heads = [(self._queues[demand].vms[0], 0, index) for index, demand in enumerate(demands)]
        heapq.heapify(heads)
        while heads and plan.capacity:
            (_, name), position, index = heads[0]
            demand = demands[index]
            worker = candidates[demand].best()
            if worker is None:
                # A plan only takes capacity, so the other VMs of this demand do not fit either.
                heapq.heappop(heads)
                continue
            plan.assign[name] = worker
            plan.capacity -= 1
            load = placed.add(worker, demand, self._vms[name])
            for other, others in candidates.items():
                others.put(worker, self._rank(other, worker, load))
            queue = self._queues[demand].vms
            if position + 1 < len(queue):
                heapq.heapreplace(heads, (queue[position + 1], position + 1, index))
            else:
                heapq.heappop(heads)
        # The ranks are those after the plan, which may not be applied.
        for name in placed.changed:
            self.touch(name)
        return placed

    def _explain(self, now: float, placed: _Placed, plan: Plan) -> None:
        """Add waiting reasons to a plan, for VMs that do not have theirs yet. No other VM is looked at."""
        for demand, queue in self._queues.items():
            if not plan.capacity:
                # The next plan may assign the rest.
                return
            first = placed.counts[demand]
            if first == len(queue.vms):
                continue
            if queue.version != self._version and now >= queue.reason_at + REASON_SECONDS:
                reason = self._why_waiting(demand, placed)
                queue.version, queue.reason_at = self._version, now
                if reason != queue.reason:
                    queue.reason = reason
                    queue.uninformed = dict.fromkeys(name for _, name in queue.vms[first:])
            elif queue.version != self._version:
                plan.set_due(queue.reason_at + REASON_SECONDS)
            waiting = (name for name in queue.uninformed if name not in plan.assign)
            informed = list(itertools.islice(waiting, plan.capacity))
            plan.waiting.update(dict.fromkeys(informed, queue.reason))
            plan.capacity -= len(informed)
            for name in informed:
                del queue.uninformed[name]

    def _why_waiting(self, demand: Demand, placed: _Placed) -> str:
        if frozen := self._inputs.why_frozen():
            return f"waiting: {frozen}"
        if demand.held_until > self._now:
            return (
                "waiting: the state was restored from an older copy, and the VM may run unseen"
                f" for {math.ceil(demand.held_until - self._now)} more seconds"
            )
        return _why_not(demand, self._workers, partial(self._exclusion, demand), placed)

    def _exclusion(self, demand: Demand, name: str) -> tuple[int, str] | None:
        """Return what excludes a worker whatever it offers: its position in the reason, and its text."""
        if name not in self._online:
            return _UNAVAILABLE, self._inputs.workers.why_unavailable(name)
        if self._paused_until(demand, name) > self._now:
            return _FAILING, "on which VMs fail before they run"
        return None

    def _paused_until(self, demand: Demand, name: str) -> float:
        """Return the time until which a worker takes no VM of this demand because VMs failed there before they ran."""
        until = self._inputs.failures.paused_until(name)
        return max((until, *(until for avoided, until in demand.avoids if avoided == name)))

    def _rank(self, demand: Demand, name: str, load: Load) -> _Rank | None:
        worker = self._workers.get(name)
        if worker is None or name not in self._online or not fits(demand, worker, load):
            return None
        fails = self._inputs.failures.is_sick(name) or any(avoided == name for avoided, _ in demand.avoids)
        if fails and (until := self._paused_until(demand, name)) > self._now:
            self._pauses[name] = min(until, self._pauses.get(name, until))
            return None
        return (fails, -load.count if self._profile == "optimize-utilization" else load.count, name)

    def _candidates_for(self, demand: Demand) -> _Candidates:
        found = self._candidates.get(demand)
        if found is None:
            ranks = ((name, self._rank(demand, name, self._loads[name])) for name in self._online)
            found = self._candidates[demand] = _Candidates({name: rank for name, rank in ranks if rank is not None})
            idle = [one for one in self._candidates if one not in self._queues]
            for old in idle[: max(0, len(self._candidates) - _MAX_IDLE_DEMANDS)]:
                del self._candidates[old]
        return found


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
        # Of workers with active VMs: when these fail, and when those of them that no poll has named return to the queue.
        self._silence = _Timeouts(inputs.workers.silent_at, self._active_vms)
        self._absence = _Timeouts(inputs.workers.away_at, inputs.workers.unnamed)
        self._restarts = _Restarts(inputs, self._workers)
        self._placement = _Placement(inputs, self._vms, self._workers, self._online.names)

    def put_worker(self, worker: Worker) -> None:
        """Add or replace a worker."""
        self._workers[worker.name] = worker
        self._online.check(worker.name)
        self._placement.touch(worker.name)

    def drop_worker(self, name: str) -> None:
        """Remove a worker."""
        del self._workers[name]
        self._online.discard(name)
        self._placement.touch(name)
        if self._active_vms.get(name):
            self._lost[name] = None

    def check_worker(self, name: str) -> None:
        """Record that a worker's times or its early failures may have changed, except by a contact in time."""
        self._online.check(name)
        self._placement.touch(name)
        if name in self._inputs.workers.unnamed:
            self._absence.put(name)
        if self._active_vms.get(name):
            self._silence.put(name)

    def load_of(self, worker: str) -> Load:
        """Return what the VMs on a worker use; it changes with the next update."""
        return self._placement.load_of(worker)

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
                    self._placement.update(vm)
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
                self._placement.add_load(vm)
            case "pending":
                self._placement.put(vm)

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
                self._placement.add_load(vm, -1)
            case "pending":
                self._placement.drop(vm)

    def waiting_reason(self, spec: VMSpec) -> str:
        """Return why a new VM will wait, if VMs of the same demand wait and nothing has changed since; else ""."""
        return self._placement.current_reason(spec) if not self._online.unchecked else ""

    def plan(self, now: float, profile: SchedulerProfile, limit: int = sys.maxsize) -> Plan:
        """Decide the next changes, for at most `limit` VMs."""
        plan = Plan(capacity=limit)
        came, plan.offline = self._online.update(now, self._workers)
        for worker in (*came, *plan.offline):
            self._placement.touch(worker)
        for worker in self._absence.pop_due(now):
            self._unassign_vms_of(worker, plan)
        for worker in self._silence.pop_due(now):
            self._lost[worker] = None
        for worker in sorted(self._lost):
            self._fail_vms_of(worker, now, plan)
        self._restarts.plan(now, plan)
        some_wait = self._placement.plan(now, profile, plan)
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
            # Looked at again when the plan is applied, or if it is not.
            self._absence.put(worker)

    def _relevant(self, vm: VM) -> tuple[object, ...]:
        """Return all that plans depend on. A VM that keeps it has not changed for the planner."""
        ending = (vm.state.end_request, vm.state.ended_at)
        return _role(vm), vm.state.worker, ending, vm.holds_resources, self._inputs.demand_of_vm(vm), _age(vm)

    def _fail_vms_of(self, worker: str, now: float, plan: Plan) -> None:
        if worker in self._workers and self._inputs.workers.silent_at(worker) > now:
            # It has made contact since.
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


def _age(vm: VM) -> _Age:
    return (vm.meta.created_at or _LONG_AGO, vm.meta.name)


def _role(vm: VM) -> Literal["failed", "active", "pending", "none"]:
    if vm.state.status == "failed":
        return "failed"
    if vm.state.worker:
        return "active"
    return "pending" if vm.state.status == "pending" else "none"
