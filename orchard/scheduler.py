"""The scheduler: `plan(snapshot, now) -> Plan`: who goes where, who fails, who restarts, and why not. Law: pure.

A plan is made from a picture of the cluster and is data; the controller carries it out in one transaction and makes
the next plan from the new picture, until a plan is empty. Whatever happens at the same time, a plan is never applied
to another picture than the one that it was made from, and so never hands out what is gone.

Three steps, in this order:

1. VMs whose worker is gone or silent fail, with a reason.
2. Failed VMs that want to be restarted go back to pending, each at most once per RESTART_PAUSE. One whose worker was
   deleted may still run there, for as long as a silent worker may run it: until then it has to wait.
3. Pending VMs, oldest first, get the fullest (or emptiest, by profile) worker that has what they ask for. One that
   fits nowhere gets a reason, and does not hold up the next.

Overtaking is therefore unbounded by design: a VM that asks for a whole worker waits as long as smaller ones keep
every worker partly filled.
"""

from __future__ import annotations

import bisect
import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from orchard.schema import VM, SchedulerProfile, Worker

NEVER = datetime.datetime.min.replace(tzinfo=datetime.UTC)
RESTART_PAUSE = 15.0  # seconds between two restarts of a VM: what fails at once must not busy its worker for ever


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

    def due(self, at: float) -> None:
        self.next_at = at if self.next_at is None else min(self.next_at, at)


def plan(snapshot: Snapshot, now: float) -> Plan:
    """Decide what the cluster should do next. Deterministic: it depends on nothing but its arguments."""
    result = Plan()
    pending: list[VM] = []
    load: defaultdict[str, Load] = defaultdict(Load)
    needed: set[str] = set()  # those whose falling silent would change something
    for vm in snapshot.vms:
        state = vm.state
        if state.status == "failed":
            _plan_restart(vm, snapshot, now, result)
        elif not state.worker:
            if state.status == "pending":
                pending.append(vm)
        elif state.worker not in snapshot.workers:
            result.fail[vm.name] = f'worker "{state.worker}" was deleted'
        elif not snapshot.online(state.worker, now):
            limit = f"{snapshot.offline_timeout:g}"
            result.fail[vm.name] = f'worker "{state.worker}" is offline: no sign of life for {limit} seconds'
        else:
            needed.add(state.worker)
            if vm.holds_resources:
                load[state.worker].add(vm)
    result.restart.sort()
    if pending:
        _place(pending, load, snapshot, now, result)
    for name in snapshot.workers if result.waiting else needed:
        if snapshot.online(name, now):
            result.due(snapshot.seen[name] + snapshot.offline_timeout)
    return result


def _plan_restart(vm: VM, snapshot: Snapshot, now: float, result: Plan) -> None:
    # A VM that was to rest has nothing to run again for, and its disk is on the worker that it failed on.
    if vm.spec.restart_policy != "OnFailure" or vm.spec.power_state != "running":
        return
    worker = vm.state.worker
    seen = snapshot.departed.get(worker, -math.inf)
    if worker not in snapshot.workers:
        seen = max(seen, snapshot.seen.get(worker, snapshot.began))
    last = snapshot.restarted.get(vm.uid, -math.inf)
    at = max(seen + snapshot.offline_timeout, last + RESTART_PAUSE)
    if now >= at:
        result.restart.append(vm.name)
    else:
        result.due(at)


# ---- placing -------------------------------------------------------------------------------------------------------


class Load:
    """What the VMs on one worker use: how many they are, and how much of each resource."""

    __slots__ = ("count", "used")

    def __init__(self) -> None:
        self.count = 0
        self.used: dict[str, int] = {}

    def add(self, vm: VM) -> None:
        self.count += 1
        for name, amount in vm.spec.resources.items():
            self.used[name] = self.used.get(name, 0) + amount


class Shelf:
    """The workers of one arch and runtime, in buckets by how many VMs they have: moving one up needs no sorting."""

    def __init__(self) -> None:
        self._buckets: defaultdict[int, list[str]] = defaultdict(list)

    def put(self, count: int, name: str) -> None:
        bisect.insort(self._buckets[count], name)

    def move_up(self, count: int, name: str) -> None:
        self._buckets[count].remove(name)
        self.put(count + 1, name)

    def names(self, *, fullest_first: bool) -> Iterator[str]:
        for count in sorted(self._buckets, reverse=fullest_first):
            yield from self._buckets[count]


def _place(pending: list[VM], load: Mapping[str, Load], snapshot: Snapshot, now: float, result: Plan) -> None:
    shelves: defaultdict[tuple[str, str], Shelf] = defaultdict(Shelf)
    loads: dict[str, Load] = {}
    for name, worker in snapshot.workers.items():
        loads[name] = load.get(name) or Load()
        if snapshot.online(name, now) and not worker.scheduling_paused:
            shelves[worker.arch, worker.runtime].put(loads[name].count, name)
    fullest_first = snapshot.profile == "optimize-utilization"
    hopeless: dict[Demand, list[str]] = {}  # nothing is freed within a plan: what does not fit once never will
    for vm in sorted(pending, key=_age):
        demand = demand_of(vm)
        if demand in hopeless:
            hopeless[demand].append(vm.name)
            continue
        shelf = shelves[vm.spec.arch, vm.spec.runtime]
        for name in shelf.names(fullest_first=fullest_first):
            if fits(vm, snapshot.workers[name], loads[name]):
                result.assign[vm.name] = name
                shelf.move_up(loads[name].count, name)
                loads[name].add(vm)
                break
        else:
            hopeless[demand] = [vm.name]
    for demand, names in hopeless.items():
        reason = why_not(demand, snapshot, loads, now)
        result.waiting.update(dict.fromkeys(names, reason))


def _age(vm: VM) -> tuple[datetime.datetime, str]:
    return (vm.meta.created_at or NEVER, vm.name)


def fits(vm: VM, worker: Worker, load: Load) -> bool:
    """Say whether a worker of the right arch and runtime has the VM's labels and enough of each resource left."""
    spec = vm.spec
    for label, value in spec.labels.items():
        if worker.labels.get(label) != value:
            return False
    for name, amount in spec.resources.items():
        if amount and worker.resources.get(name, 0) - load.used.get(name, 0) < amount:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Demand:
    """What a VM asks of its worker; VMs of equal demand fit equally."""

    arch: str
    runtime: str
    labels: tuple[tuple[str, str], ...]
    resources: tuple[tuple[str, int], ...]


def demand_of(vm: VM) -> Demand:
    spec = vm.spec
    return Demand(spec.arch, spec.runtime, tuple(sorted(spec.labels.items())), tuple(sorted(spec.resources.items())))


def why_not(demand: Demand, snapshot: Snapshot, loads: Mapping[str, Load], now: float) -> str:
    """Say in a sentence why no worker takes a VM: each worker counts under the first thing that excludes it."""
    total = len(snapshot.workers)
    if not total:
        return "waiting: no worker has registered yet"
    reasons: Counter[tuple[int, str]] = Counter()  # (place in the sentence, reason) -> workers
    short: defaultdict[tuple[str, int], list[int]] = defaultdict(list)  # (resource, wanted) -> free on each worker
    for name, worker in snapshot.workers.items():
        if not snapshot.online(name, now):
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
            for resource, wanted in demand.resources:
                free = max(0, worker.resources.get(resource, 0) - loads[name].used.get(resource, 0))
                if free < wanted:
                    short[resource, wanted].append(free)
                    break
    parts = [f"{count} {reason}" for (_, reason), count in sorted(reasons.items())]
    for (resource, wanted), free_list in sorted(short.items()):
        verb, most = ("lacks", "") if len(free_list) == 1 else ("lack", " at most")
        parts.append(f"{len(free_list)} {verb} {resource} ({wanted} wanted, {max(free_list)} free{most})")
    return f"waiting: {total} worker{'s' if total > 1 else ''}: {', '.join(parts)}"
