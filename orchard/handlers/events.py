"""Handlers of the events of a VM, and of the history of VMs that have ended."""

from __future__ import annotations

from functools import partial
from typing import Literal

from orchard.api import API
from orchard.decisions.goals import is_reached, why_never
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted, read_body
from orchard.handlers.answers import http_error
from orchard.handlers.parameters import read_choice, read_flag, read_number, read_time
from orchard.net.request import AnyResponse, HTTPError, Request, Response, SendPiece, Stream
from orchard.resources import validation
from orchard.schema import VM
from orchard.storage.errors import StorageError
from orchard.storage.event_pages import EventKinds, EventsDeletedError, SendPage
from orchard.transitions import will_restart

# Reading so many events takes some milliseconds. It goes on in a thread if there are more.
_MANY_EVENTS = 500


async def append_events(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    is_long = isinstance(admitted.body, list) and len(admitted.body) > _MANY_EVENTS
    events = await api.in_thread(is_long, partial(read_body, admitted, validation.events_from_client))
    vm = api.find_vm(admitted, request.query.one(parameters.UID.name))
    await api.parts.events.append(vm.uid, events)
    return Response(200, routine=True)


async def list_events(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    vm = api.find_vm(admitted)
    query, events = request.query, api.parts.events
    kinds = EventKinds.of(parameters.read_names(query, parameters.EVENT_KINDS))
    limit = read_number(query, parameters.LIMIT)
    order: Literal["asc", "desc"] = "asc" if read_choice(query, parameters.ORDER) == "asc" else "desc"
    cursor = query.one(parameters.CURSOR.name) or None
    until = read_choice(query, parameters.UNTIL)
    if read_flag(query, parameters.FOLLOW):
        if limit is not None or order == "desc":
            raise HTTPError(
                400, "follow was given with limit or order=desc, expected neither: all events are sent as they come"
            )
        follower = await events.follow(vm.uid, cursor, kinds)
        silence = api.parts.rendezvous.ping_interval
        return Stream(partial(follower.send_to, is_over=partial(_is_over, api, vm, until), silence=silence))
    if until != "deleted":
        raise HTTPError(400, f"until is {until}, expected follow=true with it")
    page, following = await events.page(vm.uid, limit, order, cursor, kinds)
    headers = () if following is None else (("X-Next-Cursor", following),)
    if isinstance(page, bytes):
        return Response(200, page, headers)
    return Stream(partial(_send_page, page), "application/json", headers=headers, endless=False)


async def _send_page(page: SendPage, send: SendPiece) -> None:
    """Send a page of events. Raises HTTPError."""
    try:
        await page(send)
        await send(b"\n")
    except EventsDeletedError as error:
        raise http_error(error) from error


async def _is_over(api: API, followed: VM, until: str) -> bool:
    """Return whether the end condition of a follower is durably reached. The deletion of the VM ends it anyway."""
    vm = api.state.vms.get(followed.name)
    if vm is None or vm.uid != followed.uid or not _has_reached(api, vm, until):
        return False
    try:
        await api.store.wait_durable()
    except StorageError:
        # The change was undone.
        return False
    return True


def _has_reached(api: API, vm: VM, until: str) -> bool:
    if until == "ready":
        return is_reached(vm, "ready") or why_never(vm, "ready", api.state.workers.get(vm.state.worker)) != ""
    return until == "ended" and (vm.resting or (vm.state.status == "failed" and not will_restart(vm)))


async def list_history(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    since = read_time(request.query, parameters.SINCE_TIME)
    limit = read_number(request.query, parameters.LIMIT_HISTORY)
    # VMs that ended before this request must be shown.
    await api.parts.history.flush()
    return api.answer_list(api.parts.history.select(since, limit), headers=())
