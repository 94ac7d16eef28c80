"""Handlers that lead into a VM or to a worker's host: port forwards, addresses, commands, access tokens."""

from __future__ import annotations

import datetime
import uuid
from functools import partial

from orchard import auth
from orchard.api import API
from orchard.decisions.access_tokens import Access
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted, read_body, subject_of
from orchard.handlers.answers import found
from orchard.handlers.parameters import read_count
from orchard.net.request import AnyResponse, Request, Response, TunnelUpgrade, WebSocketUpgrade
from orchard.net.websocket import TunnelStream
from orchard.net.wsframes import POLICY_VIOLATION
from orchard.resources import validation
from orchard.resources.bodies import IP, VMAccessToken
from orchard.resources.json_text import dump_resource
from orchard.sessions import SessionSubject
from orchard.tunnel import WorkerEnd


async def forward_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    port = read_count(request.query, parameters.PORT_NUMBER)
    wait = read_count(request.query, parameters.WAIT_FORWARD)
    vm = api.find_vm(admitted)
    request.require_websocket()
    return _relay_to(api, await api.parts.vm_access.connect(vm, port, wait, sender=admitted.sender), request, admitted)


async def forward_worker(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    port = read_count(request.query, parameters.PORT_NUMBER)
    wait = read_count(request.query, parameters.WAIT_FORWARD)
    worker = found("worker", api.state.workers, admitted.name)
    request.require_websocket()
    end = await api.parts.vm_access.connect_to_host(worker.name, port, wait, sender=admitted.sender)
    return _relay_to(api, end, request, admitted)


def _relay_to(api: API, end: WorkerEnd, request: Request, admitted: Admitted) -> TunnelUpgrade:
    # Existing controllers do so, and clients without the header expect it. Like them, this one sends bytes that are not
    # UTF-8, too. The product's own clients always send a User-Agent.
    text = request.headers.get("user-agent") is None
    relay = partial(_relay, api, end, admitted, subject_of(request, admitted))
    return TunnelUpgrade(relay, api.parts.rendezvous.ping_interval, text, end.release)


async def _relay(api: API, end: WorkerEnd, admitted: Admitted, subject: SessionSubject, client: TunnelStream) -> None:
    with api.parts.sessions.hold(admitted.account, admitted.role, partial(end.end, POLICY_VIOLATION), subject):
        await end.relay(client)


async def resolve_ip(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    wait = read_count(request.query, parameters.WAIT_ADDRESS)
    vm = api.find_vm(admitted)
    address = await api.parts.vm_access.find_address(vm, wait, sender=admitted.sender)
    return Response(200, dump_resource(IP(address)))


async def execute(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    vm = api.find_vm(admitted)
    wait = read_count(request.query, parameters.WAIT_FORWARD)
    command = parameters.read_command(request.query)
    request.require_websocket()
    await api.parts.executor.connect(vm, admitted.sender, wait)
    serve = partial(api.parts.executor.serve, vm, command, admitted.sender, wait)
    return WebSocketUpgrade(serve, ping_interval=api.parts.rendezvous.ping_interval)


def issue_token(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    vm = api.find_vm(admitted)
    ttl = read_body(admitted, validation.ttl_from_client)
    now = api.parts.clock().replace(microsecond=0)
    expires = now + datetime.timedelta(seconds=ttl)
    times = int(now.timestamp()), int(expires.timestamp())
    token = api.parts.tokens.issue(Access(vm.name, vm.uid, admitted.account, *times, str(uuid.uuid4())))
    issued = VMAccessToken(token, "Bearer", expires, auth.TOKEN_USER, vm.name, vm.uid)
    return Response(200, dump_resource(issued))
