"""Handlers of the events of a VM."""

from __future__ import annotations

from functools import partial
from typing import Literal

from orchard import parameters, validation
from orchard.admission import Admitted, read_body
from orchard.answers import send_page
from orchard.api import API
from orchard.codec import shown
from orchard.net.request import AnyResponse, HTTPError, Request, Response, Stream
from orchard.parameters import read_choice, read_number

# Reading so many events takes some milliseconds. It goes on in a thread if there are more.
_MANY_EVENTS = 500


async def append_events(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    is_long = isinstance(admitted.body, list) and len(admitted.body) > _MANY_EVENTS
    events = await api.in_thread(is_long, partial(read_body, admitted, validation.events_from_client))
    vm = api.find_vm(admitted)
    uid = request.query.one(parameters.UID.name)
    if uid and uid != vm.uid:
        raise HTTPError(404, f'VM "{vm.name}" has uid {vm.uid}, not {shown(uid)}')
    await api.parts.events.append(vm.uid, events)
    return Response(200, routine=True)


async def list_events(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    vm = api.find_vm(admitted)
    limit = read_number(request.query, parameters.LIMIT)
    order: Literal["asc", "desc"] = "asc" if read_choice(request.query, parameters.ORDER) == "asc" else "desc"
    cursor = request.query.one(parameters.CURSOR.name) or None
    page, following = await api.parts.events.page(vm.uid, limit, order, cursor)
    headers = () if following is None else (("X-Next-Cursor", following),)
    if isinstance(page, bytes):
        return Response(200, page, headers)
    return Stream(partial(send_page, page), "application/json", headers=headers, endless=False)
