"""The part of the planner that places pending VMs: their queues, and the workers that could take one more of each.

VMs of one `VMKind` wait in one queue, oldest first. For each demand there is a heap of the workers that could take one
more such VM, and for each set of preferred labels another one, with only the workers that have some of these labels. A
change of a worker's load moves only that worker in the heaps. The order of preference among workers that fit:

1. those on which VMs do not fail before they run (early_failures.py),
2. those with more of the VM's preferred labels,
3. the fullest, or by profile the emptiest,
4. those that have the VM's image,
5. by name.

This file performs no I/O, and times are arguments.
"""

from __future__ import annotations

import bisect
import datetime
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from orchard.decisions.planning import (
    Demand,
    Labels,
    Load,
    Plan,
    PlannerInputs,
    VMKind,
    demand_of,
    fits,
    has_label,
    kind_of,
    may_compete,
    room_for,
)
from orchard.decisions.waiting import DRAINING, FAILING, LOW_DISK, PAUSED, UNAVAILABLE, Survey, WaitingReason
from orchard.schema import VM, WORKER_NAME_LABEL, SchedulerProfile, VMSpec, Worker

# The least interval of searches for a waiting reason, because each search examines all workers.
REASON_SECONDS = 1.0
# Each VM whose reason changes is stored again. So the reasons of long queues are renewed less often.
_RENEWED_PER_SECOND = 1_000
# The most workers that one plan examines for new kinds of VMs and for reasons. That takes some milliseconds, for which
# all other tasks wait.
_EXAMINED_PER_PLAN = 4_000
# Candidates and reasons that are kept although no VM of the kind waits.
_MAX_IDLE = 64
_LONG_AGO = datetime.datetime.min.replace(tzinfo=datetime.UTC)

# The lowest rank is the best: (whether VMs fail there, minus the preferred labels that it has, load count with the sign of
# the profile, worker name).
_Rank = tuple[bool, int, int, str]
# The oldest VM comes first: (time of creation, VM name).
Age = tuple[datetime.datetime, str]
# Demand and preferred labels. A wish without labels also includes the workers that have none of them.
_Wish = tuple[Demand, Labels]
# (counts the changes of workers, counts all changes that reasons depend on)
_Version = tuple[int, int]


class _Candidates:
    """The workers that could take one more VM of some demand, the best first. Stale heap entries are skipped."""

    __slots__ = ("_heap", "rank_of")

    def __init__(self, ranks: dict[str, _Rank]) -> None:
        self.rank_of = ranks
        self._heap = list(ranks.values())
        heapq.heapify(self._heap)

    def put(self, name: str, rank: _Rank | None) -> None:
        """Set the rank of a worker, or with None remove it."""
        if rank is None:
            self.rank_of.pop(name, None)
        elif self.rank_of.get(name) != rank:
            self.rank_of[name] = rank
            heapq.heappush(self._heap, rank)
            if len(self._heap) > 4 * len(self.rank_of) + 64:
                self._heap = sorted(self.rank_of.values())

    def best(self) -> _Rank | None:
        while self._heap:
            rank = self._heap[0]
            if self.rank_of.get(rank[-1]) == rank:
                return rank
            heapq.heappop(self._heap)
        return None


class _Queue:
    """The pending VMs of one kind, oldest first, and the reason why they wait."""

    def __init__(self) -> None:
        self.vms: list[Age] = []
        # VMs whose status message is not the reason yet.
        self.uninformed: dict[str, None] = {}
        self.reason = ""
        # Whether no registered worker could ever take them.
        self.waits_for_ever = False
        # The reason was found at this version of the placement, and with so many VMs of higher priority.
        self.version: tuple[_Version, int] | None = None
        self.reason_at = -math.inf

    def inform(self, vm: VM) -> None:
        """Mark a VM as uninformed, unless its status message is the reason already."""
        if not self.reason or vm.state.status_message != self.reason:
            self.uninformed[vm.meta.name] = None

    def renewable_at(self) -> float:
        """Return the earliest time of the next search for the reason."""
        return self.reason_at + max(REASON_SECONDS, len(self.vms) / _RENEWED_PER_SECOND)

    def renew(self, reason: str, first: int) -> None:
        """Set the reason of all VMs but the first ones."""
        if reason != self.reason:
            self.reason = reason
            self.uninformed = dict.fromkeys(name for _, name in self.vms[first:])


class _Queues:
    """The pending VMs, by kind."""

    def __init__(self) -> None:
        self.by_kind: dict[VMKind, _Queue] = {}
        # Priority -> number of VMs.
        self.numbers: Counter[int] = Counter()

    def put(self, kind: VMKind, vm: VM) -> None:
        queue = self.by_kind.get(kind)
        if queue is None:
            queue = self.by_kind[kind] = _Queue()
        bisect.insort(queue.vms, age_of(vm))
        queue.inform(vm)
        self.numbers[kind.priority] += 1

    def drop(self, kind: VMKind, vm: VM) -> None:
        queue = self.by_kind[kind]
        del queue.vms[bisect.bisect_left(queue.vms, age_of(vm))]
        queue.uninformed.pop(vm.name, None)
        if not queue.vms:
            del self.by_kind[kind]
        self.numbers[kind.priority] -= 1
        if not self.numbers[kind.priority]:
            del self.numbers[kind.priority]

    def ahead_of(self, priority: int, placed: Mapping[VMKind, int]) -> int:
        """Return how many VMs of higher priority wait, without those that a plan places."""
        waiting = sum(number for other, number in self.numbers.items() if other > priority)
        return waiting - sum(number for kind, number in placed.items() if kind.priority > priority) if waiting else 0


class _Placed:
    """The assignments of a plan: the number of VMs of each kind, the oldest ones, and the loads with them."""

    def __init__(self, loads: defaultdict[str, Load]) -> None:
        self.numbers: dict[VMKind, int] = {}
        self.changed: dict[str, Load] = {}
        # Workers that were ranked for a demand without candidates.
        self.examined = 0
        self._loads = loads

    def load_of(self, worker: str) -> Load:
        return self.changed.get(worker) or self._loads[worker]

    def add(self, worker: str, vm: VM) -> Load:
        load = self.changed[worker] = self.changed.get(worker) or self._loads[worker].copy()
        load.add(vm)
        return load


class _LabelIndex:
    """The workers by label, without the labels that say the worker's own name."""

    def __init__(self) -> None:
        self._workers: defaultdict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._pairs: dict[str, Labels] = {}

    def put(self, worker: Worker) -> None:
        own = (WORKER_NAME_LABEL, worker.name)
        pairs = tuple([pair for pair in worker.labels.items() if pair != own])
        if self._pairs.get(worker.name, ()) != pairs:
            self.drop(worker.name)
            self._pairs[worker.name] = pairs
            for pair in pairs:
                self._workers[pair][worker.name] = None

    def drop(self, name: str) -> None:
        for pair in self._pairs.pop(name, ()):
            del self._workers[pair][name]
            if not self._workers[pair]:
                del self._workers[pair]

    def may_have(self, pair: tuple[str, str]) -> Collection[str]:
        """Return the names of the workers that may have a label. `has_label` decides."""
        names = self._workers.get(pair, ())
        return names if pair[0] != WORKER_NAME_LABEL else (*names, pair[1])


class _Pauses:
    """Workers that take no VM, or not one of a demand, for a pause."""

    def __init__(self) -> None:
        # Worker -> the end of its pause.
        self.until: dict[str, float] = {}

    def put(self, worker: str, until: float) -> None:
        self.until[worker] = min(until, self.until.get(worker, until))

    def end(self, now: float) -> list[str]:
        """Remove and return the workers whose pause is over."""
        over = [name for name, until in self.until.items() if until <= now]
        for name in over:
            del self.until[name]
        return over


class _Changes:
    """What has changed since the last plan."""

    def __init__(self) -> None:
        # Workers whose ranks may have changed.
        self._workers: dict[str, None] = {}
        # Increases with every change on which reasons depend.
        self.version: _Version = (0, 0)
        self.is_settled = True

    def touch(self, worker: str, *, registered: bool = False) -> None:
        self._workers[worker] = None
        self.version = (self.version[0] + registered, self.version[1] + 1)
        self.is_settled = False

    def take(self) -> list[str]:
        """Return the workers that have changed, and forget them."""
        names = [*self._workers]
        self._workers.clear()
        return names


class _Reasons:
    """Why the VMs of a demand wait, and what excludes a worker."""

    def __init__(self, inputs: PlannerInputs, workers: Mapping[str, Worker], online: Mapping[str, None]) -> None:
        self._inputs = inputs
        self._workers = workers
        self._online = online
        # Bytes that a worker's disk must have free to take new VMs; 0: none.
        self.least_free = 0
        # Demand -> (reason, version that it was found for, the time), the least recently used first.
        self._known: dict[Demand, tuple[WaitingReason, _Version, float]] = {}

    def find(
        self, demand: Demand, load_of: Callable[[str], Load], version: _Version, now: float, age: float = 0.0
    ) -> WaitingReason:
        """Return why VMs of a demand wait. With the same workers, the reason may be `age` seconds old."""
        known = self._known.pop(demand, None)
        if known is None or (known[1] != version and (known[1][0] != version[0] or now >= known[2] + age)):
            known = (self._search(demand, load_of, now), version, now)
        self._known[demand] = known
        if len(self._known) > _MAX_IDLE:
            del self._known[next(iter(self._known))]
        return known[0]

    def _search(self, demand: Demand, load_of: Callable[[str], Load], now: float) -> WaitingReason:
        if frozen := self._inputs.why_frozen():
            return WaitingReason(frozen)
        if demand.held_until > now:
            return WaitingReason(
                "the state was restored from an older copy, and the VM may run unseen"
                f" for {math.ceil(demand.held_until - now)} more seconds"
            )
        survey = Survey(demand)
        for worker in self._workers.values():
            survey.look_for_possible(worker)
            if survey.is_possible:
                break
        if survey.is_possible:
            for name, worker in self._workers.items():
                survey.add(worker, load_of(name), self.exclusion(demand, name, now))
        return survey.reason()

    def exclusion(self, demand: Demand, name: str, now: float) -> tuple[int, str] | None:
        """Return what excludes a worker whatever it offers: its position in a reason, and its text."""
        if name not in self._online:
            return UNAVAILABLE, self._inputs.workers.why_unavailable(name)
        worker = self._workers[name]
        if worker.scheduling_paused:
            return (PAUSED, "paused") if worker.drain is None else (DRAINING, "being drained")
        if self.paused_until(demand, name) > now:
            return FAILING, "on which VMs fail before they run"
        if self.least_free and self.lacks_disk(name):
            return LOW_DISK, "with too little free disk space"
        return None

    def lacks_disk(self, name: str) -> bool:
        """Return whether a worker reports too little free disk space."""
        free = self._inputs.facts.free_bytes(name)
        return free is not None and free < self.least_free

    def paused_until(self, demand: Demand, name: str) -> float:
        """Return the time until which a worker takes no VM of this demand because VMs failed there before they ran."""
        until = self._inputs.failures.paused_until(name)
        if demand.avoids:
            until = max((until, *(until for avoided, until in demand.avoids if avoided == name)))
        return until


class Placement:
    """The pending VMs, and the candidates among the online workers for each kind of demand."""

    def __init__(
        self, inputs: PlannerInputs, vms: Mapping[str, VM], workers: Mapping[str, Worker], online: Mapping[str, None]
    ) -> None:
        self._inputs = inputs
        self._vms = vms
        self._workers = workers
        self._online = online
        self._now = -math.inf
        self._loads: defaultdict[str, Load] = defaultdict(Load)
        self._labels = _LabelIndex()
        self._queues = _Queues()
        self._candidates: dict[_Wish, _Candidates] = {}
        self._changes = _Changes()
        self._pauses = _Pauses()
        self._profile: SchedulerProfile = "optimize-utilization"
        self._reasons = _Reasons(inputs, workers, online)

    def touch(self, worker: str) -> None:
        """Record that a worker, its load or its liveness changed."""
        self._changes.touch(worker)

    def put_worker(self, worker: Worker) -> None:
        self._labels.put(worker)
        self._changes.touch(worker.name, registered=True)

    def drop_worker(self, name: str) -> None:
        self._labels.drop(name)
        self._changes.touch(name, registered=True)

    def add_load(self, vm: VM, times: int = 1) -> None:
        """Add the load of an active VM to its worker, or with -1 subtract it."""
        if vm.holds_resources:
            self._loads[vm.state.worker].add(vm, times)
            self.touch(vm.state.worker)

    def load_of(self, worker: str) -> Load:
        return self._loads.get(worker) or Load()

    def put(self, vm: VM) -> None:
        """Add a pending VM."""
        self._queues.put(self._inputs.kind_of_vm(vm), vm)
        self._changes.is_settled = False

    def update(self, vm: VM) -> None:
        """Replace a pending VM by one of the same kind and age."""
        self._queues.by_kind[self._inputs.kind_of_vm(vm)].inform(vm)

    def drop(self, vm: VM) -> None:
        """Remove a pending VM."""
        self._queues.drop(self._inputs.kind_of_vm(vm), vm)

    # -- what is known between two plans

    @property
    def is_settled(self) -> bool:
        """Whether the last plan has found no worker for any VM that waits, and nothing has changed since."""
        return self._changes.is_settled

    def current_reason(self, spec: VMSpec) -> str:
        """Return why VMs of the same kind wait, or "" if that is unknown or may have changed."""
        kind = kind_of(spec)
        queue = self._queues.by_kind.get(kind)
        version = (self._changes.version, self._queues.ahead_of(kind.priority, {}))
        return "" if queue is None or queue.version != version else queue.reason

    def reason_for(self, spec: VMSpec, now: float) -> WaitingReason:
        """Return why no worker can take a new VM. The loads of workers may be up to REASON_SECONDS old."""
        return self._reasons.find(demand_of(spec), self.load_of, self._changes.version, now, REASON_SECONDS)

    def examine(self, survey: Survey, demand: Demand, worker: Worker) -> None:
        """Add a worker as it is now to a survey."""
        survey.add(worker, self.load_of(worker.name), self._reasons.exclusion(demand, worker.name, self._now))

    def why_not(self, survey: Survey) -> WaitingReason:
        """Return why no worker can take a new VM, by a survey of all workers."""
        frozen = self._inputs.why_frozen()
        return WaitingReason(frozen) if frozen else survey.reason()

    def find_worker(self, spec: VMSpec) -> str | None:
        """Return the worker that a new VM would be assigned to; None if it would wait. Call it when this is settled."""
        kind = kind_of(spec)
        if self._inputs.why_frozen() or any(other.demand == kind.demand for other in self._queues.by_kind):
            return None
        return self._best([self._candidates_for(wish) for wish in _wishes(kind)], spec.image)

    def room_on(self, demand: Demand, worker: str) -> int:
        """Return how many VMs of a demand could start on a worker now."""
        load = self.load_of(worker)
        if self._inputs.why_frozen() or self._rank((demand, ()), worker, load) is None:
            return 0
        return room_for(demand, self._workers[worker], load)

    def queued(self, demand: Demand | None = None) -> int:
        """Return how many VMs wait, or how many of them may want the same workers as a VM of that demand."""
        if demand is None:
            return self._queues.numbers.total()
        return sum(len(queue.vms) for kind, queue in self._queues.by_kind.items() if may_compete(kind.demand, demand))

    def waiting_for_ever(self) -> int:
        """Return how many VMs wait for which no registered worker is good enough, as far as their reasons are known."""
        return sum(len(queue.vms) for queue in self._queues.by_kind.values() if queue.waits_for_ever)

    def waits_for_ever(self, vm: VM) -> bool:
        """Return whether a pending VM is one of those."""
        queue = self._queues.by_kind.get(self._inputs.kind_of_vm(vm))
        return queue is not None and queue.waits_for_ever

    # -- planning

    def plan(self, now: float, profile: SchedulerProfile, plan: Plan) -> bool:
        """Add assignments and waiting reasons to a plan. Return whether VMs stay pending."""
        if profile != self._profile:
            self._profile = profile
            self._candidates.clear()
        self._now = now
        self._reasons.least_free = self._inputs.min_free_bytes()
        for name in self._pauses.end(now):
            self.touch(name)
        for name in self._changes.take():
            for wish, candidates in self._candidates.items():
                candidates.put(name, self._rank(wish, name, self._loads[name]))
        placed = self._assign(plan)
        self._explain(now, placed, plan)
        self._forget_idle()
        some_wait = self._queues.numbers.total() > len(plan.assign)
        if some_wait and not self._inputs.why_frozen():
            for at in (*self._pauses.until.values(), *(kind.demand.held_until for kind in self._queues.by_kind)):
                if at > now:
                    plan.set_due(at)
        return some_wait

    def _assign(self, plan: Plan) -> _Placed:
        placed = _Placed(self._loads)
        kinds = [] if self._inputs.why_frozen() else [*self._queues.by_kind]
        kinds = [kind for kind in kinds if kind.demand.held_until <= self._now]
        queues = [self._queues.by_kind[kind].vms for kind in kinds]
        wishes = {wish for kind in kinds for wish in _wishes(kind)}
        placed.examined = sum(len(self._possible(wish)) for wish in wishes if wish not in self._candidates)
        tables = [[self._candidates_for(wish) for wish in _wishes(kind)] for kind in kinds]
        # The candidates that have to be kept up to date in this plan.
        used = {wish: self._candidates[wish] for wish in wishes}
        # How many VMs of each kind are placed, and the next one: (minus its priority, its age, the position of its kind).
        numbers = [0] * len(kinds)
        heads = [(-kind.priority, queues[at][0], at) for at, kind in enumerate(kinds)]
        heapq.heapify(heads)
        while heads and plan.capacity:
            priority, (_, name), at = heads[0]
            vm = self._vms[name]
            worker = self._best(tables[at], vm.spec.image)
            if worker is None:
                # A plan only takes capacity, so the other VMs of this kind do not fit either.
                heapq.heappop(heads)
                continue
            plan.assign[name] = worker
            plan.capacity -= 1
            load = placed.add(worker, vm)
            for wish, candidates in used.items():
                candidates.put(worker, self._rank(wish, worker, load))
            numbers[at] += 1
            if numbers[at] < len(queues[at]):
                heapq.heapreplace(heads, (priority, queues[at][numbers[at]], at))
            else:
                heapq.heappop(heads)
        placed.numbers = dict(zip(kinds, numbers, strict=True))
        # The ranks are those after the plan, which may not be applied.
        for name in placed.changed:
            self.touch(name)
        self._changes.is_settled = not placed.changed and not heads
        return placed

    def _explain(self, now: float, placed: _Placed, plan: Plan) -> None:
        """Add waiting reasons to a plan, for VMs that do not have theirs yet. No other VM is looked at."""
        examined = placed.examined
        for kind, queue in self._queues.by_kind.items():
            if not plan.capacity:
                # The next plan may assign the rest.
                return
            first = placed.numbers.get(kind, 0)
            if first == len(queue.vms):
                continue
            ahead = self._queues.ahead_of(kind.priority, placed.numbers)
            version = self._changes.version, ahead
            if queue.version != version and now >= queue.renewable_at():
                if examined >= _EXAMINED_PER_PLAN:
                    # The next plan finds the other reasons.
                    plan.capacity = 0
                    return
                examined += len(self._workers)
                reason = self._reasons.find(kind.demand, placed.load_of, version[0], now)
                queue.version, queue.reason_at = version, now
                queue.waits_for_ever = reason.is_never
                queue.renew(str(reason.after(ahead)), first)
            elif queue.version != version:
                plan.set_due(queue.renewable_at())
            waiting = (name for name in queue.uninformed if name not in plan.assign)
            informed = list(itertools.islice(waiting, plan.capacity))
            plan.waiting.update(dict.fromkeys(informed, queue.reason))
            plan.capacity -= len(informed)
            for name in informed:
                del queue.uninformed[name]

    # -- candidates

    def _best(self, tables: Sequence[_Candidates], image: str) -> str | None:
        """Return the worker that comes first for a VM, by the candidates for each of `_wishes`."""
        candidates = tables[0]
        rank = candidates.best()
        if rank is None:
            return None
        if len(tables) > 1 and (preferred := tables[1].best()) is not None and preferred < rank:
            candidates, rank = tables[1], preferred
        holders = self._inputs.facts.holders(image)
        if not holders or rank[-1] in holders:
            return rank[-1]
        # The image decides only among workers that are equal except for their names.
        ranks = candidates.rank_of
        return min((name for name in holders if name in ranks and ranks[name][:-1] == rank[:-1]), default=rank[-1])

    def _rank(self, wish: _Wish, name: str, load: Load) -> _Rank | None:
        demand, preferred = wish
        worker = self._workers.get(name)
        if worker is None or name not in self._online or not fits(demand, worker, load):
            return None
        if self._reasons.least_free and self._reasons.lacks_disk(name):
            return None
        matches = 0
        if preferred and not (matches := sum(has_label(worker, label, value) for label, value in preferred)):
            return None
        fails = self._inputs.failures.is_sick(name)
        if demand.avoids:
            fails = fails or any(avoided == name for avoided, _ in demand.avoids)
        if fails and (until := self._reasons.paused_until(demand, name)) > self._now:
            self._pauses.put(name, until)
            return None
        return (fails, -matches, -load.count if self._profile == "optimize-utilization" else load.count, name)

    def _candidates_for(self, wish: _Wish) -> _Candidates:
        found = self._candidates.get(wish)
        if found is None:
            ranks = ((name, self._rank(wish, name, self._loads[name])) for name in self._possible(wish))
            found = self._candidates[wish] = _Candidates({name: rank for name, rank in ranks if rank is not None})
        return found

    def _possible(self, wish: _Wish) -> Collection[str]:
        """Return the workers among which all candidates are."""
        demand, preferred = wish
        if preferred:
            return dict.fromkeys(itertools.chain.from_iterable(map(self._labels.may_have, preferred)))
        possible: Collection[str] = self._online
        for pair in demand.labels:
            possible = min(possible, self._labels.may_have(pair), key=len)
        return possible

    def _forget_idle(self) -> None:
        """Forget the oldest candidates of which no VM waits, if there are many."""
        if len(self._candidates) > 2 * len(self._queues.by_kind) + _MAX_IDLE:
            wanted = {wish for kind in self._queues.by_kind for wish in _wishes(kind)}
            idle = [wish for wish in self._candidates if wish not in wanted]
            for wish in idle[: len(idle) - _MAX_IDLE]:
                del self._candidates[wish]


def _wishes(kind: VMKind) -> tuple[_Wish, ...]:
    """Return the keys of the candidates for a kind."""
    base = (kind.demand, ())
    return (base, (kind.demand, kind.preferred)) if kind.preferred else (base,)


def age_of(vm: VM) -> Age:
    return (vm.meta.created_at or _LONG_AGO, vm.meta.name)
