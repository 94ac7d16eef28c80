"""Handlers of the watches of all VMs and all workers."""

from __future__ import annotations

from functools import partial

import trio

from orchard.api import API
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted
from orchard.net.request import AnyResponse, Query, Request, Stream
from orchard.state.change_log import Selection, Snapshot, WatchedKind, follow, send_present

# The JSON of so many workers is made in one step, which takes about a millisecond.
_WORKERS_PER_STEP = 100


async def watch(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return await watch_kinds(api, request, parameters.read_kinds(request.query))


async def watch_kinds(api: API, request: Request, kinds: frozenset[WatchedKind]) -> AnyResponse:
    """Answer with the objects of some kinds and their changes, or with those after the revision `since` only."""
    selection = _read_selection(request.query, kinds)
    since = parameters.read_text(request.query, parameters.SINCE)
    silence, log = _read_silence(api, request.query), api.store.log
    if since:
        return Stream(partial(follow, log, log.position_of(since), selection, silence))
    return Stream(partial(send_present, log, await take_snapshot(api, selection), selection, silence))


def _read_selection(query: Query, kinds: frozenset[WatchedKind]) -> Selection:
    condition, images = parameters.read_filter(query), parameters.shows_images(query)
    return Selection(kinds, str(condition), condition.matches if condition else None, images=images)


def _read_silence(api: API, query: Query) -> float:
    """Return the seconds after which a silent watch sends a BOOKMARK: no more than between two pings."""
    wanted, longest = parameters.read_number(query, parameters.SILENCE), api.parts.rendezvous.ping_interval
    return longest if wanted is None else min(wanted, longest)


async def take_snapshot(api: API, selection: Selection) -> Snapshot:
    """Return the objects of the selected kinds as they are at one moment. Showing the workers takes several steps."""
    state, log, show = api.state, api.store.log, partial(api.parts.worker_states.json_parts, images=selection.images)
    shown: dict[str, list[bytes]] = {}
    with log.collect_workers() as names:
        if "worker" in selection.kinds:
            names.update(dict.fromkeys(state.workers))
        # Workers that change meanwhile are shown again.
        while names:
            for name, _ in [names.popitem() for _ in range(min(len(names), _WORKERS_PER_STEP))]:
                if name in state.workers:
                    shown[name] = show(state.workers[name], state.json["worker"][name])
            if names:
                await trio.lowlevel.checkpoint()
    # No other task has run since the last worker was shown, so all of this is of one moment.
    vm_names = state.names["vm"] if "vm" in selection.kinds else []
    return Snapshot(
        position=log.last,
        vms=list(map(state.vms.__getitem__, vm_names)),
        vm_json=list(map(state.json["vm"].__getitem__, vm_names)),
        workers=[shown[name] for name in state.names["worker"] if name in shown],
    )
