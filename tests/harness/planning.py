"""Plan a whole cluster at once: build a planner from a `Snapshot` and ask it for one plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from orchard.decisions.early_failures import EarlyFailures
from orchard.decisions.planning import Plan, PlannerInputs
from orchard.decisions.worker_facts import WorkerFacts
from orchard.resources.cluster import CachedImage, WorkerDisk
from orchard.scheduler import Planner
from orchard.schema import VM, SchedulerProfile, Worker


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A cluster at one moment. Times are seconds of one monotonic clock; see PlannerInputs."""

    vms: Iterable[VM]
    workers: Mapping[str, Worker]
    last_contact: Mapping[str, float]
    restarted_at: Mapping[str, float]
    profile: SchedulerProfile
    offline_timeout: float
    last_contact_of_deleted: Mapping[str, float] = field(default_factory=dict)
    started_at: float = 0.0
    failed_before_start: frozenset[str] = frozenset()
    # Workers that are online, but get no new VMs: they have said goodbye.
    gone: Collection[str] = frozenset()
    # Worker -> names of VMs that were assigned to it since its last poll -> their uids.
    unnamed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    failures: EarlyFailures = field(default_factory=EarlyFailures)
    held: Mapping[str, float] = field(default_factory=dict)
    frozen: str = ""
    # Full disks are without a byte.
    facts: WorkerFacts = field(default_factory=WorkerFacts)

    def silent_at(self, worker: str) -> float:
        return self.last_contact.get(worker, -math.inf) + self.offline_timeout

    def ended_at_latest(self, worker: str, vm_uid: str) -> float:
        return self.silent_at(worker)

    def deleted_until(self, worker: str) -> float:
        return self.last_contact_of_deleted.get(worker, -math.inf) + self.offline_timeout

    def away_at(self, worker: str) -> float:
        return -math.inf if worker in self.gone else self.silent_at(worker)

    available_until = away_at

    def why_unavailable(self, worker: str) -> str:
        return "stopped" if worker in self.gone else "offline"

    def inputs(self) -> PlannerInputs:
        """Return what a planner needs besides VMs and workers, with the same tables."""
        return PlannerInputs(
            workers=self,
            failures=self.failures,
            restarted_at=self.restarted_at,
            offline_timeout=self.offline_timeout,
            forgotten_until=self.started_at + self.offline_timeout,
            failed_before_start=set(self.failed_before_start),
            held=self.held,
            why_frozen=lambda: self.frozen,
            facts=self.facts,
            min_free_bytes=lambda: 1,
        )

    def planner(self) -> Planner:
        """Return a new planner that knows the cluster."""
        planner = Planner(self.inputs())
        for worker in self.workers.values():
            planner.put_worker(worker)
        for vm in self.vms:
            planner.put_vm(vm)
        return planner


def report_facts(facts: WorkerFacts, worker: str, images: Iterable[str] = (), *, full: bool = False) -> None:
    """Have a worker report its images and its disk, of which nothing is free if it is full."""
    cached = tuple(CachedImage(image) for image in images)
    facts.record_heartbeat(Worker(name=worker, disk=WorkerDisk(9, 0 if full else 9), images=cached))


def plan(snapshot: Snapshot, now: float) -> Plan:
    """Return the plan of a new planner."""
    return snapshot.planner().plan(now, snapshot.profile)
