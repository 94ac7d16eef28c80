"""The computed fields of a worker, which are not stored: its state, since when, what its VMs use, and its health."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping

from orchard.codec import dump_json, format_time
from orchard.decisions.early_failures import EarlyFailures
from orchard.decisions.liveness import Liveness
from orchard.decisions.planning import Load
from orchard.resources.cluster import VM_RESTART, Health, WorkerState, merge
from orchard.resources.json_text import encode
from orchard.schema import VM, Worker


class WorkerStates:
    """The computed fields of all workers.

    `load_of` returns what the VMs on a worker use, `clock` the wall time. `vms_by_worker` is live.
    """

    def __init__(
        self,
        liveness: Liveness,
        failures: EarlyFailures,
        load_of: Callable[[str], Load],
        vms_by_worker: Mapping[str, Mapping[str, VM]],
        clock: Callable[[], datetime.datetime],
    ) -> None:
        self._liveness = liveness
        self._failures = failures
        self._load_of = load_of
        self._vms_by_worker = vms_by_worker
        self._clock = clock
        # The last result of `members`, and the values that it was made from.
        self._members: dict[str, tuple[object, bytes]] = {}
        self._since: dict[str, tuple[WorkerState, datetime.datetime]] = {}
        # State and health of each worker at the last call of `tell`.
        self._told: dict[str, object] = {}
        self._listeners: list[Callable[[str], None]] = []

    def on_change(self, tell: Callable[[str], None]) -> None:
        """Register `tell`, which is called with the name of a worker whose state or health has changed."""
        self._listeners.append(tell)

    def observe(self, worker: Worker) -> tuple[WorkerState, datetime.datetime]:
        """Return a worker's state and since when it is in it, as far as it was observed."""
        state: WorkerState = "online"
        if not self._liveness.is_available(worker.name):
            state = "offline"
        elif worker.drain is not None:
            state = "draining" if self._has_work(worker) else "drained"
        elif worker.scheduling_paused:
            state = "paused"
        seen = self._since.get(worker.name)
        if seen is None or seen[0] != state:
            seen = self._since[worker.name] = (state, self._clock())
        told = (seen, self._liveness.health(worker.name), self._failures.problem(worker.name))
        if told != self._told.get(worker.name):
            self._told[worker.name] = told
            for tell in self._listeners:
                tell(worker.name)
        return seen

    def _has_work(self, worker: Worker) -> bool:
        """Return whether something may run on a worker that is drained."""
        return any(
            vm.holds_resources or (vm.state.end_request and VM_RESTART in worker.capabilities and not vm.state.ended_at)
            for vm in self._vms_by_worker.get(worker.name, {}).values()
        )

    def forget(self, name: str) -> None:
        for table in (self._since, self._members, self._told):
            table.pop(name, None)

    def health(self, name: str) -> Health:
        """Return what a worker reports, and whether VMs fail there before they run."""
        problem = self._failures.problem(name)
        return merge(() if problem is None else (problem,), self._liveness.health(name).problems)

    def json_parts(self, worker: Worker, stored: bytes, *, images: bool = True) -> list[bytes]:
        """Return a worker's JSON in parts: its `stored` JSON, last_seen, what it reports of its host, computed fields."""
        parts = [stored[:-1]]
        if (last_seen := self._liveness.last_seen_json(worker.name)) is not None:
            parts.append(b',"last_seen":"%b"' % last_seen)
        if facts := self._liveness.facts.members(worker.name, images=images):
            parts += (b",", facts)
        return [*parts, b",", self.members(worker), b"}"]

    def members(self, worker: Worker) -> bytes:
        """Return the computed fields as the members of a JSON object, without braces."""
        name, seen = worker.name, self.observe(worker)
        load = self._load_of(name)
        key = (seen, load.count, tuple(load.used.items()), self._liveness.health(name), self._failures.problem(name))
        known = self._members.get(name)
        # Encoding takes 20 microseconds, and a list may have thousands of workers.
        if known is not None and known[0] == key:
            return known[1]
        fields = {
            "state": seen[0],
            "since": format_time(seen[1]),
            "used": {resource: amount for resource, amount in load.used.items() if amount},
            "vms": load.count,
            "health": encode(self.health(name)),
        }
        text = dump_json(fields)[1:-1]
        self._members[name] = (key, text)
        return text
