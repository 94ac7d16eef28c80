"""What plans are made from and what they are made of: the planner's inputs, a VM's demand, a worker's load, a plan.

scheduler.py decides with these. This file performs no I/O, and times are arguments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from orchard.early_failures import EarlyFailures
from orchard.schema import VM, VMSpec, Worker
from orchard.transitions import has_ended
from orchard.worker_facts import WorkerFacts

# Between two restarts of a VM, so that one that fails at once does not keep its worker busy.
RESTART_PAUSE_SECONDS = 15.0


class WorkerTimes(Protocol):
    """What is known of the workers' presence; see `liveness.Liveness`. The answers may change at any time."""

    @property
    def unnamed(self) -> Mapping[str, Mapping[str, str]]:
        """Worker -> names of VMs that were assigned to it since its last poll -> their uids."""

    def silent_at(self, worker: str) -> float: ...

    def ended_at_latest(self, worker: str, vm_uid: str) -> float: ...

    def deleted_until(self, worker: str) -> float: ...

    def away_at(self, worker: str) -> float: ...

    def available_until(self, worker: str) -> float: ...

    def why_unavailable(self, worker: str) -> str: ...


@dataclass(frozen=True, slots=True)
class PlannerInputs:
    """What plans depend on besides VMs, workers and the profile. Times are seconds of one monotonic clock.

    The planner reads the tables live: their owner changes them in place.
    """

    workers: WorkerTimes
    failures: EarlyFailures
    # VM uid -> its last restart.
    restarted_at: Mapping[str, float]
    # A worker without contact for this long is offline.
    offline_timeout: float  # seconds
    # When the longest promise from before the start is over. Deletions of workers before the start are forgotten.
    forgotten_until: float
    # Uids of VMs that had failed before the start, for a reason that is forgotten. They may still run.
    failed_before_start: set[str]
    # Uid of a VM that may run where the state does not show it -> when it cannot any more.
    held: Mapping[str, float] = field(default_factory=dict)
    # Free disk space and cached images of the workers.
    facts: WorkerFacts = field(default_factory=WorkerFacts)
    # Why nothing is placed at all, or "".
    why_frozen: Callable[[], str] = str

    def restart_at(self, vm: VM, worker: Worker | None) -> float:
        """Return the earliest time at which a failed VM can neither run any more nor restart too often.

        `worker` is the VM's; None: it is not registered.
        """
        name, request = vm.state.worker, vm.state.end_request
        if request and has_ended(vm, worker):
            return -math.inf
        # The last time at which a worker that may still run the VM holds a lease.
        over_at = self.workers.deleted_until(name)
        if worker is None:
            over_at = max(over_at, self.workers.silent_at(name))
        if vm.uid in self.failed_before_start:
            over_at = max(over_at, self.forgotten_until)
        if not request:
            return max(over_at, self.restarted_at.get(vm.uid, -math.inf) + RESTART_PAUSE_SECONDS)
        # Such a VM runs without a lease, so only its worker knows when it has ended.
        if vm.spec.restart_policy == "Never":
            return math.inf
        return max(over_at, self.workers.ended_at_latest(name, vm.uid))

    def demand_of_vm(self, vm: VM) -> Demand:
        """Return what a VM asks of its worker, with what its own history excludes."""
        demand, avoided = demand_of(vm.spec), self.failures.avoided(vm.uid)
        if not avoided and vm.uid not in self.held:
            return demand
        return demand._replace(held_until=self.held.get(vm.uid, -math.inf), avoids=tuple(sorted(avoided.items())))


@dataclass(slots=True)
class Plan:
    """The next changes. Each VM is in at most one of the first five."""

    # VM name -> reason why it returns to the queue.
    unassign: dict[str, str] = field(default_factory=dict)
    # VM name -> reason.
    fail: dict[str, str] = field(default_factory=dict)
    restart: list[str] = field(default_factory=list)
    # VM name -> worker name.
    assign: dict[str, str] = field(default_factory=dict)
    # VM name -> new reason why it waits.
    waiting: dict[str, str] = field(default_factory=dict)
    # When time alone makes another plan due.
    next_at: float = math.inf
    # How many more VMs the plan could take. If 0, there may be more to do.
    capacity: int = field(default=sys.maxsize, compare=False)
    # Workers that became unavailable since the plan before.
    offline: list[str] = field(default_factory=list, compare=False)

    @property
    def has_changes(self) -> bool:
        return bool(self.unassign or self.fail or self.restart or self.assign or self.waiting)

    def set_due(self, at: float) -> None:
        """Make another plan due at `at`, or earlier."""
        self.next_at = min(self.next_at, at)


# ---- demand and load -------------------------------------------------------------------------------------------------


class Load:
    """What the VMs on one worker use: their number, and the amount of each resource."""

    __slots__ = ("count", "used")

    def __init__(self) -> None:
        self.count = 0
        self.used: dict[str, int] = {}

    def add(self, vm: VM, times: int = 1) -> None:
        """Add a VM, or with -1 subtract it."""
        self.count += times
        for name, amount in vm.spec.resources.items():
            self.used[name] = self.used.get(name, 0) + times * amount

    def copy(self) -> Load:
        load = Load()
        load.count, load.used = self.count, self.used.copy()
        return load


class Demand(NamedTuple):
    """What a VM asks of its worker. VMs of equal demand fit on the same workers."""

    arch: str
    runtime: str
    labels: tuple[tuple[str, str], ...]
    resources: tuple[tuple[str, int], ...]
    # A time before which the VM must not be placed, since it may run unseen.
    held_until: float = -math.inf
    # Workers that the VM avoids, with the end of the pause on each.
    avoids: tuple[tuple[str, float], ...] = ()


def demand_of(spec: VMSpec) -> Demand:
    return Demand(spec.arch, spec.runtime, tuple(sorted(spec.labels.items())), tuple(sorted(spec.resources.items())))


def fits(demand: Demand, worker: Worker, load: Load) -> bool:
    """Return whether a worker with this load could take a VM, if it is online."""
    if worker.scheduling_paused or (worker.arch, worker.runtime) != (demand.arch, demand.runtime):
        return False
    for label, value in demand.labels:
        if worker.labels.get(label) != value:
            return False
    for name, amount in demand.resources:
        if amount and worker.resources.get(name, 0) - load.used.get(name, 0) < amount:
            return False
    return True
