"""The handler of `GET /capacity`: how many VMs of one shape could start now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from orchard.api import API
from orchard.base.nursery import visit_in_steps
from orchard.codec import MAX_UINT, ValidationError, shown
from orchard.decisions.planning import Demand, demand_of, matches
from orchard.decisions.waiting import Survey
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted
from orchard.handlers.parameters import read_choice, read_pairs
from orchard.net.request import AnyResponse, HTTPError, Query, Request, Response
from orchard.resources import validation
from orchard.resources.cluster import Capacity, WorkerCounts, WorkerState
from orchard.resources.json_text import dump_resource
from orchard.schema import VMSpec, Worker
from orchard.storage.errors import StorageError

# Workers that are examined in one step of the event loop: some milliseconds.
_WORKERS_PER_STEP = 250


async def get_capacity(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    demand = demand_of(_read_shape(request.query))
    scheduling, states = api.parts.scheduling, api.parts.worker_states
    # A VM that cannot be stored cannot be placed either.
    with suppress(StorageError):
        await scheduling.settle()
    placement = scheduling.planner.placement
    count = _Count(demand)

    def add(worker: Worker) -> None:
        count.add(worker, states.observe(worker)[0], placement.load_of(worker.name).used)
        count.fits += placement.room_on(demand, worker.name)

    await visit_in_steps(api.state.workers, _WORKERS_PER_STEP, add)
    survey = Survey(demand)
    if not count.fits:
        await visit_in_steps(api.state.workers, _WORKERS_PER_STEP, survey.look_for_possible)
    if survey.is_possible:
        await visit_in_steps(
            api.state.workers, _WORKERS_PER_STEP, lambda worker: placement.examine(survey, demand, worker)
        )
    reason = "" if count.fits else placement.why_not(survey).text
    return Response(200, dump_resource(count.capacity(placement.queued(), placement.queued(demand), reason)))


def _read_shape(query: Query) -> VMSpec:
    """Return the specification of a VM as `POST /vms` makes it. Raises HTTPError(400)."""
    resources = read_pairs(query, parameters.RESOURCES)
    for name, amount in resources.items():
        # Python refuses to read thousands of digits.
        if not (amount.isascii() and amount.isdigit() and len(amount) <= len(str(MAX_UINT))):
            raise HTTPError(
                400, f"resources[{shown(name)}] is {shown(amount)}, expected a whole number from 0 to {MAX_UINT}"
            )
    raw = {
        "name": "shape",
        "image": "shape",
        "resources": {name: int(amount) for name, amount in resources.items()},
        "labels": read_pairs(query, parameters.LABELS),
        **{one.name: read_choice(query, one) for one in (parameters.ARCH, parameters.RUNTIME, parameters.GUEST_OS)},
    }
    try:
        return validation.vm_from_client(raw, [])[1]
    except ValidationError as error:
        raise HTTPError(400, str(error)) from error


class _Count:
    """The workers by state, and the resources of those that match a demand and are online."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._states: Counter[WorkerState] = Counter()
        self._total: Counter[str] = Counter()
        self._used: Counter[str] = Counter()
        self._free: Counter[str] = Counter()
        self.fits = 0

    def add(self, worker: Worker, state: WorkerState, used: Mapping[str, int]) -> None:
        self._states[state] += 1
        if state == "online" and matches(self._demand, worker):
            for name, offered in worker.resources.items():
                in_use = used.get(name, 0)
                self._total[name] += offered
                self._used[name] += in_use
                # A worker may offer less than is used there.
                self._free[name] += max(0, offered - in_use)

    def capacity(self, queued: int, ahead: int, reason: str) -> Capacity:
        states = self._states
        counts = WorkerCounts(
            states.total(), states["online"], states["paused"], states["draining"] + states["drained"]
        )
        sums = (dict(self._total), dict(self._used), dict(self._free))
        return Capacity(counts, *sums, self.fits, queued, ahead, reason)
