"""The controller's counts for its metrics: how long the phases of VMs take, how VMs end, and requests.

Other figures are counted where they arise: writes by the store, rounds by the scheduling loop, bytes by the tunnels.
The rest is found when the metrics are asked for (handlers/metrics.py).
"""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from orchard.base.metrics import LIFE_SECONDS, Histogram
from orchard.control.recorder import is_pulling
from orchard.decisions.liveness import Liveness
from orchard.net.request import Request
from orchard.schema import VM
from orchard.state.changes import Change
from orchard.store import Store
from orchard.transitions import has_expired

# The values of the labels of one metric: how a VM ends, and why.
END_REASONS = (
    ("deleted", "request"),
    ("deleted", "expired"),
    ("failed", "no_worker"),
    ("failed", "worker_lost"),
    ("failed", "start"),
    ("failed", "script"),
    ("failed", "guest"),
    ("failed", "restart"),
    ("failed", "drain"),
)
_OTHER = "other"


class LifeFigures:
    """The durations of the phases of VMs, and their ends, from durable changes of a store.

    `follow` is told each group of durable changes. `is_lost` returns whether the VMs of a worker fail because it is
    silent or was deleted. `clock` is the wall clock by which the times of VMs are stored. A phase that began before the
    start of the controller is not counted, except for waiting.
    """

    def __init__(self, is_lost: Callable[[str], bool], clock: Callable[[], datetime.datetime]) -> None:
        self.queue = Histogram(LIFE_SECONDS)
        self.pull = Histogram(LIFE_SECONDS)
        self.boot = Histogram(LIFE_SECONDS)
        self.script = Histogram(LIFE_SECONDS)
        self.ended: Counter[tuple[str, str]] = Counter(dict.fromkeys(END_REASONS, 0))
        self._is_lost = is_lost
        self._clock = clock
        # When the present phase of a VM began, by uid. Phases are pulling, booting, and the script.
        self._began: dict[str, datetime.datetime] = {}

    def follow(self, changes: list[Change]) -> None:
        """Count the phases and VMs that end with durable changes."""
        now = self._clock()
        for change in changes:
            old, new = change.old, change.new
            if isinstance(old, VM):
                if isinstance(new, VM):
                    self._follow_change(old, new, now)
                else:
                    self._end(old, now)

    def _end(self, vm: VM, now: datetime.datetime) -> None:
        self._began.pop(vm.uid, None)
        # The end of a VM that has failed was counted with its failure.
        if vm.state.status != "failed":
            self.ended["deleted", "expired" if has_expired(vm, now) else "request"] += 1

    def _follow_change(self, old: VM, new: VM, now: datetime.datetime) -> None:
        before, after, uid = old.state, new.state, new.uid
        if after.startup_exit_code is not None and before.startup_ended_at != after.startup_ended_at:
            self._observe(self.script, uid, now)
        if after.status == "failed":
            self._began.pop(uid, None)
            if before.status != "failed":
                self.ended["failed", self.failure_of(old, new)] += 1
        elif not after.worker:
            self._began.pop(uid, None)
        elif after.worker != before.worker:
            waiting_since = after.restarted_at or new.meta.created_at or now
            self.queue.observe(((after.scheduled_at or now) - waiting_since).total_seconds())
            self._began[uid] = now
        else:
            self._follow_phases(old, new, now)

    def _follow_phases(self, old: VM, new: VM, now: datetime.datetime) -> None:
        before, after, uid = old.state, new.state, new.uid
        if is_pulling(new):
            if not is_pulling(old):
                self._began[uid] = now
            return
        if is_pulling(old):
            self._observe(self.pull, uid, now)
            self._began[uid] = now
        if after.status == "running" and before.status == "pending":
            self._observe(self.boot, uid, now)
            self._began[uid] = now

    def _observe(self, histogram: Histogram, uid: str, now: datetime.datetime) -> None:
        began = self._began.pop(uid, None)
        if began is not None:
            histogram.observe((now - began).total_seconds())

    def failure_of(self, old: VM, new: VM) -> str:
        """Return why a VM has failed, as END_REASONS have it."""
        state = new.state
        if state.end_request:
            return state.end_request
        if not state.worker:
            return "no_worker"
        if self._is_lost(state.worker):
            return "worker_lost"
        if state.startup_exit_code:
            return "script"
        return "guest" if old.state.status == "running" else "start"


@dataclass(slots=True)
class Figures:
    """The figures that the API shows beside those of other parts.

    `per_worker`: whether there are series for each worker. `certificate_expires` returns when the server's certificate
    expires, None without TLS. `started` is when the controller started, in seconds since 1970.
    """

    lives: LifeFigures
    per_worker: bool = False
    certificate_expires: Callable[[], datetime.datetime | None] = lambda: None
    started: float = field(default_factory=time.time)
    # (method, pattern of the path, status) -> number of requests.
    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def count_request(self, request: Request | None, status: int) -> None:
        """Count a request that has been answered. None: its head could not be read."""
        if request is not None and request.route:
            self.requests[request.method, request.route, status] += 1
        else:
            # A client can make up any number of unknown paths.
            self.requests[_OTHER, _OTHER, status] += 1


def make_figures(
    store: Store, liveness: Liveness, clock: Callable[[], datetime.datetime], *, per_worker: bool = False
) -> Figures:  # fmt: skip
    """Return figures that follow a store. `per_worker` is that of `Figures`."""

    def is_lost(worker: str) -> bool:
        return worker not in store.state.workers or liveness.silent_at(worker) <= trio.current_time()

    lives = LifeFigures(is_lost, clock)
    store.on_durable(lives.follow)
    return Figures(lives, per_worker)
