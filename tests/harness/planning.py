"""Plan a whole cluster at once: build a planner from a `Snapshot` and ask it for one plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from orchard.scheduler import Plan, Planner, PlannerInputs
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

    def inputs(self) -> PlannerInputs:
        """Return what a planner needs besides VMs and workers, with the same tables."""
        return PlannerInputs(
            last_contact=self.last_contact,
            last_contact_of_deleted=self.last_contact_of_deleted,
            restarted_at=self.restarted_at,
            offline_timeout=self.offline_timeout,
            started_at=self.started_at,
            failed_before_start=set(self.failed_before_start),
        )


def plan(snapshot: Snapshot, now: float) -> Plan:
    """Return the plan of a new planner."""
    planner = Planner(snapshot.inputs())
    for worker in snapshot.workers.values():
        planner.put_worker(worker)
    for vm in snapshot.vms:
        planner.put_vm(vm)
    return planner.plan(now, snapshot.profile)
