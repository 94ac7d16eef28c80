"""What answers show of a worker beyond what is stored: its state, since when, what its VMs use, and its health."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from orchard.cluster import Health, WorkerState, merge
from orchard.codec import dump_json, encode, format_time
from orchard.early_failures import EarlyFailures
from orchard.liveness import Liveness
from orchard.planning import Load
from orchard.schema import Worker


class WorkerStates:
    """The computed fields of all workers. `load_of` returns what the VMs on a worker use, `clock` the wall time."""

    def __init__(
        self,
        liveness: Liveness,
        failures: EarlyFailures,
        load_of: Callable[[str], Load],
        clock: Callable[[], datetime.datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._liveness = liveness
        self._failures = failures
        self._load_of = load_of
        self._clock = clock
        self._monotonic = monotonic
        self._since: dict[str, tuple[WorkerState, datetime.datetime]] = {}

    def observe(self, worker: Worker) -> tuple[WorkerState, datetime.datetime]:
        """Return a worker's state and since when it is in it, as far as it was observed."""
        state: WorkerState = "online"
        if self._liveness.available_until(worker.name) <= self._monotonic():
            state = "offline"
        elif worker.scheduling_paused:
            state = "paused"
        seen = self._since.get(worker.name)
        if seen is None or seen[0] != state:
            seen = self._since[worker.name] = (state, self._clock())
        return seen

    def forget(self, name: str) -> None:
        self._since.pop(name, None)

    def health(self, name: str) -> Health:
        """Return what a worker reports, and whether VMs fail there before they run."""
        problem = self._failures.problem(name)
        return merge(() if problem is None else (problem,), self._liveness.health(name).problems)

    def members(self, worker: Worker) -> bytes:
        """Return the computed fields as the members of a JSON object, without braces."""
        state, since = self.observe(worker)
        load = self._load_of(worker.name)
        used = {name: amount for name, amount in load.used.items() if amount}
        fields = {
            "state": state,
            "since": format_time(since),
            "used": used,
            "vms": load.count,
            "health": encode(self.health(worker.name)),
        }
        return dump_json(fields)[1:-1]
