"""The scheduler: who goes where, who fails, who restarts, and why not. Law: pure; data in, data out.

A plan is made from a picture of the cluster and is data; the controller carries it out in one transaction and makes
the next plan from the new picture, until a plan is empty. Whatever happens at the same time, a plan is never applied
to another picture than the one that it was made from, and so never hands out what is gone.

Three steps, in this order:

1. VMs whose worker is gone or silent fail, with a reason.
2. Failed VMs that want to be restarted go back to pending, each at most once per RESTART_PAUSE. One whose worker was
   deleted may still run there, for as long as a silent worker may run it: until then it has to wait. So has one that
   had failed when the controller started, for it may have been for that reason.
3. Pending VMs, oldest first, get the fullest (or emptiest, by profile) worker that has what they ask for. One that
   fits nowhere gets a reason, and does not hold up the next.

Overtaking is therefore unbounded by design: a VM that asks for a whole worker waits as long as smaller ones keep
every worker partly filled.

The picture is a `Planner`, kept up to date change by change, so that a plan looks only at what could have changed: one
change costs the same among a hundred VMs and among ten thousand (./run bench plan). For each kind of demand that was
asked for lately it has the workers that could take one more such VM now, in order; a worker's load touches its own
entries. `plan` makes a plan of a whole `Snapshot` by writing a new planner: what a planner says after any changes is what one
that is written anew says, but that reasons may lag behind by REASON_SECONDS.
"""

from __future__ import annotations

import bisect
import datetime
import heapq
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from orchard.schema import VM, SchedulerProfile, VMSpec, Worker

NEVER = datetime.datetime.min.replace(tzinfo=datetime.UTC)
RESTART_PAUSE = 15.0  # seconds between two restarts of a VM: what fails at once must not busy its worker for ever
REASON_SECONDS = 1.0  # between two times that all workers are asked why they can't take those that wait
MAX_CLASSES = 64  # kinds of demand whose candidates are kept when none of them waits


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The picture that a plan is made from. Times are seconds of one monotonic clock."""

    vms: Iterable[VM]
    workers: Mapping[str, Worker]
    seen: Mapping[str, float]  # worker name -> its last sign of life
    restarted: Mapping[str, float]  # VM uid -> its last restart
    profile: SchedulerProfile
    offline_timeout: float  # seconds of silence after which a worker counts as offline
    departed: Mapping[str, float] = field(default_factory=dict)  # deleted worker -> its last sign of life before that
    began: float = 0.0  # when the controller started: what it knew of deleted workers before, it has forgotten
    inherited: Container[str] = ()  # uids of VMs that had failed by then, nobody knows why: they may still run

    def online(self, worker: str, now: float) -> bool:
        return worker in self.seen and now < self.seen[worker] + self.offline_timeout


@dataclass(slots=True)
class Plan:
    """What is to be done. Each VM stands in at most one of the four."""

    fail: dict[str, str] = field(default_factory=dict)  # VM name -> reason
    restart: list[str] = field(default_factory=list)
    assign: dict[str, str] = field(default_factory=dict)  # VM name -> worker name
    waiting: dict[str, str] = field(default_factory=dict)  # VM name -> reason, for every VM that stays pending
    next_at: float | None = None  # when time alone makes another plan due
    room: int = field(default=sys.maxsize, compare=False)  # for more VMs; with none left, there may be more to do

    def due(self, at: float) -> None:
        self.next_at = at if self.next_at is None else min(self.next_at, at)


def plan(snapshot: Snapshot, now: float) -> Plan:
    """Decide what the cluster should do next. Deterministic: it depends on nothing but its arguments."""
    planner = Planner(snapshot)
    for worker in snapshot.workers.values():
        planner.put_worker(worker)
    for vm in snapshot.vms:
        planner.put_vm(vm)
    return planner.plan(now, snapshot.profile)


# ---- what a worker has, and a VM wants -----------------------------------------------------------------------------


class Load:
    """What the VMs on one worker use: how many they are, and how much of each resource."""

    __slots__ = ("count", "used")

    def __init__(self) -> None:
        self.count = 0
        self.used: dict[str, int] = {}

    def add(self, vm: VM, times: int = 1) -> None:
        """Count a VM in, or with -1 out."""
        self.count += times
        for name, amount in vm.spec.resources.items():
            self.used[name] = self.used.get(name, 0) + times * amount

    def copy(self) -> Load:
        load = Load()
        load.count, load.used = self.count, self.used.copy()
        return load


@dataclass(frozen=True, slots=True)
class Demand:
    """What a VM asks of its worker; VMs of equal demand fit equally."""

    arch: str
    runtime: str
    labels: tuple[tuple[str, str], ...]
    resources: tuple[tuple[str, int], ...]


def demand_of(spec: VMSpec) -> Demand:
    return Demand(spec.arch, spec.runtime, tuple(sorted(spec.labels.items())), tuple(sorted(spec.resources.items())))


def fits(demand: Demand, worker: Worker, load: Load) -> bool:
    """Say whether a worker could take a VM, were it online."""
    if worker.scheduling_paused or (worker.arch, worker.runtime) != (demand.arch, demand.runtime):
        return False
    for label, value in demand.labels:
        if worker.labels.get(label) != value:
            return False
    for name, amount in demand.resources:
        if amount and worker.resources.get(name, 0) - load.used.get(name, 0) < amount:
            return False
    return True


Rank = tuple[int, str]  # the least is the best


class Candidates:
    """The workers that could take one more VM of a kind, the best first. Old entries of the heap are passed over."""

    __slots__ = ("_heap", "_rank")

    def __init__(self, ranks: dict[str, Rank]) -> None:
        self._rank = ranks
        self._heap = list(ranks.values())
        heapq.heapify(self._heap)

    def put(self, name: str, rank: Rank | None) -> None:
        """Give a worker its place, or None for none."""
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
            if self._rank.get(rank[1]) == rank:
                return rank[1]
            heapq.heappop(self._heap)
        return None


Age = tuple[datetime.datetime, str]


class Queue:
    """The pending VMs of one demand, oldest first, and what they were told why they wait."""

    def __init__(self) -> None:
        self.vms: list[Age] = []
        self.untold: dict[str, None] = {}
        self.reason = ""
        self.version = -1  # of the planner, when the reason was found
        self.asked_at = -math.inf

    def ask(self, vm: VM) -> None:
        """Have a VM told why it waits, if it does not say so already."""
        if not self.reason or vm.state.status_message != self.reason:
            self.untold[vm.name] = None


def _age(vm: VM) -> Age:
    return (vm.meta.created_at or NEVER, vm.name)


# ---- the planner ------------------------------------------------------------------------------------------------------


class Planner:
    """The picture of a cluster that plans are made from. What `about` holds but VMs and workers is looked at live.

    Whoever keeps it tells it of each change by `put_worker`, `drop_worker`, `put_vm`, `drop_vm`, and of a worker's first
    sign of life, also after a silence, by `heard`.
    """

    def __init__(self, about: Snapshot) -> None:
        self._about = about
        self._workers: dict[str, Worker] = {}
        self._vms: dict[str, VM] = {}
        self._loads: defaultdict[str, Load] = defaultdict(Load)
        self._held: defaultdict[str, dict[str, None]] = defaultdict(dict)  # worker -> its VMs that have not failed
        self._queues: dict[Demand, Queue] = {}
        self._failed: dict[str, VM] = {}  # that want to be restarted
        self._restarts: list[tuple[float, str]] = []  # heap: not before this time, VM
        self._online: dict[str, None] = {}
        self._silence: list[tuple[float, str]] = []  # heap: an online worker is not silent before this time
        self._holding: list[tuple[float, str]] = []  # the same, of those that have VMs
        self._doomed: dict[str, None] = {}  # workers that have VMs, and are gone or silent
        self._heard: dict[str, None] = {}  # workers that may be online now
        self._touched: dict[str, None] = {}  # workers whose candidacies may have changed
        self._classes: dict[Demand, Candidates] = {}
        self._profile: SchedulerProfile = about.profile
        self._version = 0  # of all that reasons depend on

    # -- what happens

    def put_worker(self, worker: Worker) -> None:
        self._workers[worker.name] = worker
        self._heard[worker.name] = None
        self._touch(worker.name)

    def drop_worker(self, name: str) -> None:
        del self._workers[name]
        self._fall_silent(name)

    def heard(self, name: str) -> None:
        """Note that a worker gave a sign of life, after a silence or for the first time."""
        self._heard[name] = None

    def put_vm(self, vm: VM) -> None:
        old = self._vms.get(vm.name)
        if old is not None:
            if _role(old) == _role(vm):
                self._vms[vm.name] = vm
                if vm.name in self._failed:
                    self._failed[vm.name] = vm
                elif vm.state.status == "pending" and not vm.state.worker:
                    self._queues[demand_of(vm.spec)].ask(vm)
                return
            self.drop_vm(vm.name)
        self._vms[vm.name] = vm
        worker = vm.state.worker
        if vm.state.status == "failed":
            # A VM that was to rest has nothing to run again for, and its disk is on the worker that it failed on.
            if vm.spec.restart_policy == "OnFailure" and vm.spec.power_state == "running":
                self._failed[vm.name] = vm
                heapq.heappush(self._restarts, (-math.inf, vm.name))
        elif worker:
            if not self._held[worker] and worker in self._online:
                heapq.heappush(self._holding, (self._silent_at(worker), worker))
            self._held[worker][vm.name] = None
            if worker not in self._online:
                self._doomed[worker] = None
                self._heard[worker] = None
            if vm.holds_resources:
                self._loads[worker].add(vm)
                self._touch(worker)
        elif vm.state.status == "pending":
            queue = self._queues.setdefault(demand_of(vm.spec), Queue())
            bisect.insort(queue.vms, _age(vm))
            queue.ask(vm)

    def drop_vm(self, name: str) -> None:
        vm = self._vms.pop(name)
        worker = vm.state.worker
        if vm.state.status == "failed":
            self._failed.pop(name, None)
        elif worker:
            del self._held[worker][name]
            if not self._held[worker]:
                del self._held[worker]
            if vm.holds_resources:
                self._loads[worker].add(vm, -1)
                self._touch(worker)
        elif vm.state.status == "pending":
            demand = demand_of(vm.spec)
            queue = self._queues[demand]
            del queue.vms[bisect.bisect_left(queue.vms, _age(vm))]
            queue.untold.pop(name, None)
            if not queue.vms:
                del self._queues[demand]

    def waits_for(self, spec: VMSpec) -> str:
        """Say why a new VM will wait, if others like it were told so and nothing has changed since; else "": it may not."""
        queue = self._queues.get(demand_of(spec))
        if queue is None or queue.version != self._version or self._heard:
            return ""
        return queue.reason

    # -- plans

    def plan(self, now: float, profile: SchedulerProfile, most: int = sys.maxsize) -> Plan:
        """Decide what is to be done next, about so many VMs at most."""
        result = Plan(room=most)
        self._find_silent(now)
        for worker in sorted(self._doomed):
            self._fail_all(worker, result)
        self._restart(now, result)
        if profile != self._profile:
            self._profile = profile
            self._classes.clear()
        placed, loads = self._place(result)
        self._explain(now, placed, loads, result)
        silence = self._silence if self._waits(result) else self._holding
        if silence:
            result.due(silence[0][0])
        return result

    def _silent_at(self, worker: str) -> float:
        return self._about.seen.get(worker, -math.inf) + self._about.offline_timeout

    def _touch(self, worker: str) -> None:
        self._touched[worker] = None
        self._version += 1

    def _fall_silent(self, worker: str) -> None:
        self._online.pop(worker, None)
        self._touch(worker)
        if self._held.get(worker):
            self._doomed[worker] = None

    def _find_silent(self, now: float) -> None:
        for worker in self._heard:
            if worker in self._workers and worker not in self._online and self._silent_at(worker) > now:
                self._online[worker] = None
                self._doomed.pop(worker, None)
                self._touch(worker)
                heapq.heappush(self._silence, (self._silent_at(worker), worker))
                if self._held.get(worker):
                    heapq.heappush(self._holding, (self._silent_at(worker), worker))
        self._heard.clear()
        for heap, matters in ((self._silence, self._online), (self._holding, self._held)):
            while heap and (heap[0][0] <= now or heap[0][1] not in matters or heap[0][1] not in self._online):
                _, worker = heapq.heappop(heap)
                if worker not in self._online or worker not in matters:
                    continue
                if self._silent_at(worker) > now:
                    heapq.heappush(heap, (self._silent_at(worker), worker))
                else:
                    self._fall_silent(worker)

    def _fail_all(self, worker: str, result: Plan) -> None:
        if worker not in self._held:
            del self._doomed[worker]
            return
        if worker in self._workers:
            limit = f"{self._about.offline_timeout:g}"
            reason = f'worker "{worker}" is offline: no sign of life for {limit} seconds'
        else:
            reason = f'worker "{worker}" was deleted'
        held = list(itertools.islice(self._held[worker], result.room))
        result.fail.update(dict.fromkeys(held, reason))
        result.room -= len(held)

    def _restart(self, now: float, result: Plan) -> None:
        ready = []
        while self._restarts and self._restarts[0][0] <= now:
            _, name = heapq.heappop(self._restarts)
            if name not in self._failed:
                continue
            at = self._restart_at(self._failed[name])
            if at > now:
                heapq.heappush(self._restarts, (at, name))
            else:
                ready.append((at, name))
        if self._restarts:
            result.due(self._restarts[0][0])
        for entry in ready:  # until that is done
            heapq.heappush(self._restarts, entry)
        result.restart = sorted({name for _, name in ready})[: result.room]
        result.room -= len(result.restart)

    def _restart_at(self, vm: VM) -> float:
        about, worker = self._about, vm.state.worker
        seen = about.departed.get(worker, -math.inf)
        if worker not in self._workers:
            seen = max(seen, about.seen.get(worker, about.began))
        if vm.uid in about.inherited:
            seen = max(seen, about.began)
        return max(seen + about.offline_timeout, about.restarted.get(vm.uid, -math.inf) + RESTART_PAUSE)

    # -- placing

    def _rank(self, demand: Demand, name: str, load: Load) -> Rank | None:
        worker = self._workers.get(name)
        if worker is None or name not in self._online or not fits(demand, worker, load):
            return None
        return (-load.count if self._profile == "optimize-utilization" else load.count, name)

    def _class(self, demand: Demand) -> Candidates:
        found = self._classes.get(demand)
        if found is None:
            ranks = ((name, self._rank(demand, name, self._loads[name])) for name in self._online)
            found = self._classes[demand] = Candidates({name: rank for name, rank in ranks if rank is not None})
            idle = [one for one in self._classes if one not in self._queues]
            for old in idle[: max(0, len(self._classes) - MAX_CLASSES)]:
                del self._classes[old]
        return found

    def _place(self, result: Plan) -> tuple[Counter[Demand], dict[str, Load]]:
        """Give VMs to workers. Say how many of each demand (the oldest), and what is changed: loads as they will be."""
        for name in self._touched:
            for demand, candidates in self._classes.items():
                candidates.put(name, self._rank(demand, name, self._loads[name]))
        self._touched.clear()
        placed: Counter[Demand] = Counter()
        loads: dict[str, Load] = {}
        classes = {demand: self._class(demand) for demand in self._queues}
        demands = list(self._queues)
        heads = [(queue.vms[0], 0, index) for index, queue in enumerate(self._queues.values())]
        heapq.heapify(heads)  # the oldest of each demand: (its age, its place in its queue, its demand)
        while heads and result.room:
            (_, name), at, index = heads[0]
            demand = demands[index]
            worker = classes[demand].best()
            if worker is None:  # nothing is freed within a plan: what does not fit now never will
                heapq.heappop(heads)
                continue
            result.assign[name] = worker
            result.room -= 1
            placed[demand] += 1
            load = loads[worker] = loads.get(worker) or self._loads[worker].copy()
            load.add(self._vms[name])
            for other, candidates in classes.items():
                candidates.put(worker, self._rank(other, worker, load))
            queue = self._queues[demand].vms
            if at + 1 < len(queue):
                heapq.heapreplace(heads, (queue[at + 1], at + 1, index))
            else:
                heapq.heappop(heads)
        for name in loads:  # as they are until the plan is carried out
            self._touch(name)
        return placed, loads

    def _waits(self, result: Plan) -> bool:
        return sum(len(queue.vms) for queue in self._queues.values()) > len(result.assign)

    def _explain(self, now: float, placed: Mapping[Demand, int], loads: Mapping[str, Load], result: Plan) -> None:
        """Tell those that wait why, if they have not heard it yet. Looks at none that has."""
        for demand, queue in self._queues.items():
            if not result.room:  # who has no place yet may have one in the next plan
                return
            first = placed.get(demand, 0)  # of those that wait
            if first == len(queue.vms):
                continue
            if queue.version != self._version and now >= queue.asked_at + REASON_SECONDS:
                reason = self._why_not(demand, loads)
                queue.version, queue.asked_at = self._version, now
                if reason != queue.reason:
                    queue.reason = reason
                    queue.untold = dict.fromkeys(name for _, name in queue.vms[first:])
            elif queue.version != self._version:
                result.due(queue.asked_at + REASON_SECONDS)
            told = list(itertools.islice((name for name in queue.untold if name not in result.assign), result.room))
            result.waiting.update(dict.fromkeys(told, queue.reason))
            result.room -= len(told)
            for name in told:
                del queue.untold[name]

    def _why_not(self, demand: Demand, loads: Mapping[str, Load]) -> str:
        """Say in a sentence why no worker takes a VM: each worker counts under the first thing that excludes it."""
        total = len(self._workers)
        if not total:
            return "waiting: no worker has registered yet"
        reasons: Counter[tuple[int, str]] = Counter()  # (place in the sentence, reason) -> workers
        short: defaultdict[tuple[str, int], list[int]] = defaultdict(list)  # (resource, wanted) -> free on each worker
        for name, worker in self._workers.items():
            if name not in self._online:
                reasons[0, "offline"] += 1
            elif worker.scheduling_paused:
                reasons[1, "paused"] += 1
            elif worker.arch != demand.arch:
                reasons[2, f"of another arch ({demand.arch} wanted)"] += 1
            elif worker.runtime != demand.runtime:
                reasons[3, f"of another runtime ({demand.runtime} wanted)"] += 1
            elif missing := [pair for pair in demand.labels if worker.labels.get(pair[0]) != pair[1]]:
                label, value = missing[0]
                reasons[4, f"without label {label}={value}"] += 1
            else:
                used = (loads.get(name) or self._loads[name]).used
                for resource, wanted in demand.resources:
                    free = max(0, worker.resources.get(resource, 0) - used.get(resource, 0))
                    if free < wanted:
                        short[resource, wanted].append(free)
                        break
        parts = [f"{count} {reason}" for (_, reason), count in sorted(reasons.items())]
        for (resource, wanted), free_list in sorted(short.items()):
            verb, most = ("lacks", "") if len(free_list) == 1 else ("lack", " at most")
            parts.append(f"{len(free_list)} {verb} {resource} ({wanted} wanted, {max(free_list)} free{most})")
        return f"waiting: {total} worker{'s' if total > 1 else ''}: {', '.join(parts)}"


def _role(vm: VM) -> tuple[object, ...]:
    """All that a plan looks at of a VM; one that keeps it has not changed for the planner."""
    status = vm.state.status
    return status == "failed", status == "pending", vm.state.worker, vm.holds_resources, demand_of(vm.spec), _age(vm)
