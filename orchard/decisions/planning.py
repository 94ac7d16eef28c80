"""The data of planning: the planner's inputs, a VM's demand, a worker's load, a plan.

scheduler.py makes the plans. This file performs no I/O, and times are arguments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from orchard.decisions.early_failures import EarlyFailures
from orchard.decisions.worker_facts import WorkerFacts
from orchard.resources.cluster import GUEST_AGENT, SHUTDOWN_SCRIPT
from orchard.schema import VM, WORKER_NAME_LABEL, VMSpec, Worker
from orchard.transitions import has_ended, has_lost_worker

# A VM that asks for no resource fits in any number.
MAX_ROOM = 1_000_000
# The least time between two restarts of a VM, so that a VM that fails at once does not keep its worker busy.
RESTART_PAUSE_SECONDS = 15.0

Labels = tuple[tuple[str, str], ...]


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
    # The end of the longest promise from before the start: until then VMs may run whose failure is forgotten (see
    # below).
    forgotten_until: float
    # Uids of VMs that had failed before the start, for a reason that is forgotten. They may still run.
    failed_before_start: set[str]
    # Uid of a VM that may run on a worker that the state does not name -> the time from which it cannot.
    held: Mapping[str, float] = field(default_factory=dict)
    # Free disk space and cached images of the workers.
    facts: WorkerFacts = field(default_factory=WorkerFacts)
    # Why nothing is placed at all, or "".
    why_frozen: Callable[[], str] = str
    # Bytes that a worker's disk must have free to take new VMs.
    min_free_bytes: Callable[[], int] = int

    def restart_at(self, vm: VM, worker: Worker | None) -> float:
        """Return the earliest time at which a failed VM can neither run any more nor restart too often.

        `worker` is the VM's; None: it is not registered. For a restart that is withdrawn (see `is_withdrawn`), this is
        the time of the withdrawal.
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
            return over_at if self.is_withdrawn(vm, worker) else math.inf
        return max(over_at, self.workers.ended_at_latest(name, vm.uid))

    def is_withdrawn(self, vm: VM, worker: Worker | None) -> bool:
        """Return whether a restart is withdrawn when its time comes: the VM may run, and no worker will report its end."""
        return vm.spec.restart_policy == "Never" and has_lost_worker(vm, worker)

    def kind_of_vm(self, vm: VM) -> VMKind:
        """Return the kind of a VM, with what its own history excludes."""
        kind, avoided = kind_of(vm.spec), self.failures.avoided(vm.uid)
        if not avoided and vm.uid not in self.held:
            return kind
        until = self.held.get(vm.uid, -math.inf)
        return kind._replace(demand=kind.demand._replace(held_until=until, avoids=tuple(sorted(avoided.items()))))


@dataclass(slots=True)
class Plan:
    """The next changes. Each VM is in at most one of the first six."""

    # VM name -> reason why it returns to the queue.
    unassign: dict[str, str] = field(default_factory=dict)
    # VM name -> reason.
    fail: dict[str, str] = field(default_factory=dict)
    restart: list[str] = field(default_factory=list)
    # VMs whose requested restart is not carried out.
    withdraw: list[str] = field(default_factory=list)
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
    labels: Labels
    resources: tuple[tuple[str, int], ...]
    # The VM must not be placed before this time, because it may still run on a worker that the state does not name.
    held_until: float = -math.inf
    # Workers that the VM avoids, with the end of the pause on each.
    avoids: tuple[tuple[str, float], ...] = ()
    # Capabilities that the worker must have.
    capabilities: tuple[str, ...] = ()


class VMKind(NamedTuple):
    """The properties that all VMs of one queue share. They are placed in the order of their age."""

    demand: Demand
    preferred: Labels
    priority: int


def demand_of(spec: VMSpec) -> Demand:
    labels = tuple(sorted(spec.labels.items())) if spec.labels else ()
    resources = tuple(sorted(spec.resources.items()))
    script = spec.startup_script
    capabilities = (GUEST_AGENT,) if script is not None and script.transport == "tart-guest-agent" else ()
    if spec.shutdown_script is not None:
        capabilities = (*capabilities, SHUTDOWN_SCRIPT)
    return Demand(spec.arch, spec.runtime, labels, resources, capabilities=capabilities)


def kind_of(spec: VMSpec) -> VMKind:
    """Return the kind of a new VM."""
    preferred = tuple(sorted(spec.preferred_labels.items())) if spec.preferred_labels else ()
    return VMKind(demand_of(spec), preferred, spec.priority)


def has_label(worker: Worker, label: str, value: str) -> bool:
    """Return whether a worker has a label with that value. Its name is one of its labels."""
    default = worker.name if label == WORKER_NAME_LABEL else None
    return worker.labels.get(label, default) == value


def matches(demand: Demand, worker: Worker) -> bool:
    """Return whether a worker is of the kind that a VM asks for, whatever it offers."""
    if (worker.arch, worker.runtime) != (demand.arch, demand.runtime):
        return False
    for label, value in demand.labels:
        if not has_label(worker, label, value):
            return False
    return not demand.capabilities or set(demand.capabilities) <= set(worker.capabilities)


def fits(demand: Demand, worker: Worker, load: Load) -> bool:
    """Return whether a worker with this load could take a VM, if it is online."""
    if worker.scheduling_paused or not matches(demand, worker):
        return False
    for name, amount in demand.resources:
        if amount and worker.resources.get(name, 0) - load.used.get(name, 0) < amount:
            return False
    return True


def may_compete(one: Demand, other: Demand) -> bool:
    """Return whether VMs of two demands may want the same worker: no label contradicts."""
    if (one.arch, one.runtime) != (other.arch, other.runtime):
        return False
    labels = dict(one.labels)
    return all(labels.get(label, value) == value for label, value in other.labels)


def room_for(demand: Demand, worker: Worker, load: Load) -> int:
    """Return how many VMs a worker on which one fits could take at the same time, at most MAX_ROOM."""
    numbers = [
        (worker.resources.get(name, 0) - load.used.get(name, 0)) // amount
        for name, amount in demand.resources
        if amount
    ]
    return min([*numbers, MAX_ROOM])
