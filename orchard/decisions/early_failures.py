"""VMs that failed before they ran: which workers each VM avoids, and which workers get no new VMs for a while.

A worker whose disk is full or whose hypervisor is broken fails every VM at once, is free again at once, and would get
the next one. So a VM that failed on a worker before it ran is placed elsewhere if another worker fits, and on the same
worker only after a pause. A worker on which SICK_VMS different VMs in a row failed so gets no VM at all for a pause,
and after it is the last choice until a VM runs there. Both pauses double from FIRST_PAUSE to LAST_PAUSE.

Only failures that workers report count. Everything is in memory and forgotten at a restart. No I/O; times are
arguments.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchard.base.nursery import growing_pause
from orchard.resources.cluster import HealthProblem
from orchard.schema import VM

FIRST_PAUSE, LAST_PAUSE = 15.0, 600.0  # seconds
# So many different VMs that fail in a row before they ran make a worker sick.
SICK_VMS = 3
# The most workers that a VM avoids: those on which it failed last.
_MAX_AVOIDED = 16


@dataclass(slots=True)
class _Streak:
    """The failures on a worker since a VM ran there."""

    uids: set[str] = field(default_factory=set)
    pauses: int = 0
    until: float = 0.0
    since: datetime.datetime | None = None
    reason: str = ""


class EarlyFailures:
    """The failures of VMs before they ran. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        # VM uid -> worker -> (failures there, end of the pause).
        self._of_vms: dict[str, dict[str, tuple[int, float]]] = {}
        self._of_workers: dict[str, _Streak] = {}

    def record_failure(self, vm: VM, now: float, wall_time: datetime.datetime) -> None:
        """Record that a worker has reported a VM as failed that had not run."""
        worker = vm.state.worker
        avoided = self._of_vms.setdefault(vm.uid, {})
        count = avoided.pop(worker, (0, 0.0))[0] + 1
        avoided[worker] = (count, now + growing_pause(count, FIRST_PAUSE, LAST_PAUSE))
        if len(avoided) > _MAX_AVOIDED:
            del avoided[next(iter(avoided))]
        streak = self._of_workers.setdefault(worker, _Streak(since=wall_time))
        streak.uids.add(vm.uid)
        streak.reason = vm.state.status_message
        # VMs that were assigned before the pause fail within it.
        if len(streak.uids) >= SICK_VMS and now >= streak.until:
            streak.pauses += 1
            streak.until = now + growing_pause(streak.pauses, FIRST_PAUSE, LAST_PAUSE)

    def record_run(self, vm: VM) -> None:
        """Record that a VM runs on its worker."""
        self._of_vms.pop(vm.uid, None)
        self._of_workers.pop(vm.state.worker, None)

    def forget_vm(self, uid: str) -> None:
        self._of_vms.pop(uid, None)

    def forget_worker(self, name: str) -> None:
        self._of_workers.pop(name, None)

    def avoided(self, uid: str) -> Mapping[str, float]:
        """Return the workers that a VM avoids, with the end of the pause for each."""
        failed = self._of_vms.get(uid)
        return {worker: until for worker, (_, until) in failed.items()} if failed else {}

    def is_sick(self, worker: str) -> bool:
        """Return whether SICK_VMS VMs in a row have failed on a worker before they ran."""
        streak = self._of_workers.get(worker)
        return streak is not None and streak.pauses > 0

    def paused_until(self, worker: str) -> float:
        """Return the time until which a sick worker gets no VMs."""
        streak = self._of_workers.get(worker)
        return streak.until if streak is not None else 0.0

    def problem(self, worker: str) -> HealthProblem | None:
        """Return what the health of a sick worker says."""
        streak = self._of_workers.get(worker)
        if streak is None or not streak.pauses:
            return None
        pause = growing_pause(streak.pauses, FIRST_PAUSE, LAST_PAUSE)
        text = (
            f"{len(streak.uids)} VMs in a row failed before they ran, new ones wait {pause:g} seconds: {streak.reason}"
        )
        return HealthProblem("placement", streak.since, text)
