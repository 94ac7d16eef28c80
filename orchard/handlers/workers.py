"""Handlers of workers, and of the requests that only workers send."""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import trio
from trio_websocket import WebSocketConnection

from orchard import auth, transitions
from orchard.api import API
from orchard.codec import shown
from orchard.control import deadlines
from orchard.decisions.liveness import Source
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted, liveness_source, read_body
from orchard.handlers.answers import found
from orchard.handlers.parameters import read_flag, read_text
from orchard.handlers.watch import take_snapshot, watch_kinds
from orchard.net.request import AnyResponse, HTTPError, Request, Response, TunnelUpgrade, WebSocketUpgrade
from orchard.resources import validation
from orchard.resources.cluster import CANCEL_REQUEST, WORKER_STATE
from orchard.schema import Worker
from orchard.state.change_log import Selection
from orchard.store import Transaction


def register_worker(api: API, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
    wanted = read_body(admitted, validation.worker_from_client)
    register = partial(_register, api, wanted, request, admitted)
    return _if_not_connected(api, wanted.name, register)


async def _ask_watch(api: API, name: str, answer: Callable[[], AnyResponse]) -> AnyResponse:
    if await api.parts.rendezvous.is_connected(name):
        raise HTTPError(
            409,
            f'worker "{name}" is connected already, and its watch answers; give each worker a name of its own',
        )
    return answer()


def _if_not_connected(api: API, name: str, answer: Callable[[], AnyResponse]) -> AnyResponse | Awaitable[AnyResponse]:
    """Answer a request that begins the session of a worker, unless a worker of that name has a live one."""
    return _ask_watch(api, name, answer) if api.parts.rendezvous.has_watch(name) else answer()


def _register(api: API, wanted: Worker, request: Request, admitted: Admitted) -> AnyResponse:
    old = api.state.workers.get(wanted.name)
    if old is not None and old.machine_id != wanted.machine_id:
        raise HTTPError(
            409,
            f'worker "{wanted.name}" is registered from the machine {shown(old.machine_id)};'
            " give this worker another name, or delete the other worker first",
        )
    liveness = api.parts.liveness
    # The fields that administrators or the controller have set.
    now = _registered_at(api, wanted.name)
    kept = old or replace(wanted, created_at=now, unknown={}, drain=None, offline_since=None, promised=0)
    new = replace(
        wanted,
        labels=validation.labels_of(wanted),
        last_seen=None,
        unknown=kept.unknown,
        created_at=kept.created_at,
        scheduling_paused=kept.scheduling_paused,
        drain=kept.drain,
        offline_since=kept.offline_since,
        registered_by=admitted.account,
        promised=max(kept.promised, liveness.offline_timeout_ms),
        highest_revision=0,
        settled=False,
        health=None,
        disk=None,
        versions=None,
        images=None,
        pulling=None,
    )
    with api.store.transaction() as tx:
        if old is not None and old.instance_id and old.instance_id != new.instance_id:
            new = _take_name(api, new, now, tx)
        if new != old:
            tx.put(new)
    _notice_restored(api, wanted.highest_revision)
    source = liveness_source(request, admitted)
    liveness.record_registration(new.name, source, tells_settled=WORKER_STATE in wanted.capabilities)
    liveness.facts.record_registration(new)
    if wanted.last_seen is not None:
        liveness.record_heartbeat(new.name, source, wanted.last_seen)
    return _worker(api, new.name)


def _take_name(api: API, new: Worker, now: datetime.datetime, tx: Transaction) -> Worker:
    """Return a worker as it is stored in the place of another instance on its host, whose VMs may still run.

    As after a deletion, these VMs fail, and nothing that the new worker says of them means that they have ended.
    """
    liveness = api.parts.liveness
    tx.put(deadlines.promise_of(new.name, api.state, liveness))
    liveness.record_replacement(new.name)
    if not new.instance_id:
        # A worker of an older version has no id. It may be the same one, and then it adopts the VMs.
        return new
    reason = f'worker "{new.name}" was replaced by one with another directory on the same machine'
    for vm in api.state.vms_by_worker.get(new.name, {}).values():
        if vm.state.status != "failed":
            tx.put(transitions.fail(vm, reason))
    return replace(new, created_at=now)


def _registered_at(api: API, name: str) -> datetime.datetime:
    """Return the present time as that of a registration, but later than the assignment of all VMs under that name.

    So these are known as an earlier worker's, even if the clock was set back meanwhile.
    """
    times = [vm.state.scheduled_at for vm in api.state.vms_by_worker.get(name, {}).values()]
    return max([api.parts.clock(), *(time + datetime.timedelta(microseconds=1) for time in times if time)])


def _notice_restored(api: API, revision: int) -> None:
    """Note that a worker has seen a higher revision of this state, unless the loss was accepted since."""
    cluster = api.state.cluster
    if revision > max(api.accepted_revision, cluster.restored_from):
        api.put(replace(cluster, restored_from=revision), cluster)


async def list_workers(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    if read_flag(request.query, parameters.WATCH):
        return await watch_kinds(api, request, frozenset({"worker"}))
    images = parameters.shows_images(request.query)
    snapshot = await take_snapshot(api, Selection(frozenset({"worker"}), images=images))
    return api.answer_list(map(b"".join, snapshot.workers))


def get_worker(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    name = found("worker", api.state.workers, admitted.name).name
    return _worker(api, name, images=parameters.shows_images(request.query))


def put_worker(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    """Record a heartbeat, which has a later last_seen than the one before, or else set scheduling_paused."""
    worker = found("worker", api.state.workers, admitted.name)
    wanted = read_body(admitted, validation.worker_from_client, is_named=True)
    seen, source = wanted.last_seen, liveness_source(request, admitted)
    liveness = api.parts.liveness
    if seen is not None and liveness.is_heartbeat(worker.name, seen):
        speak_for(api, worker, admitted)
        liveness.record_heartbeat(worker.name, source, seen, settled=wanted.settled, health=wanted.health)
        liveness.facts.record_heartbeat(wanted)
        # Without the images, of which a thousand workers would be sent megabytes a second.
        return replace(_worker(api, worker.name, images=False), routine=True)
    paused = wanted.scheduling_paused
    # A drain pauses the scheduling, so it ends when that is resumed.
    api.put(replace(worker, scheduling_paused=paused, drain=worker.drain if paused else None), worker)
    return _worker(api, worker.name)


def delete_worker(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    worker = found("worker", api.state.workers, admitted.name)
    with api.store.transaction() as tx:
        deadlines.remove_worker(worker, api.state, api.parts.liveness, tx)
    return Response(200)


def drain_worker(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    """Pause a worker, and set when its VMs are ended. A drain that is under way is replaced."""
    worker = found("worker", api.state.workers, admitted.name)
    drain = read_body(admitted, validation.drain_from_client)
    if drain.now or drain.deadline_seconds:
        deadline = api.parts.deadline_clock() + datetime.timedelta(seconds=drain.deadline_seconds)
        drain = replace(drain, deadline=deadline)
    api.put(replace(worker, scheduling_paused=True, drain=drain), worker)
    return _worker(api, worker.name)


def cancel_drain(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    """Cancel a worker's drain and resume its scheduling. A worker without one stays as it is."""
    worker = found("worker", api.state.workers, admitted.name)
    if worker.drain is not None:
        api.put(replace(worker, scheduling_paused=False, drain=None), worker)
    return Response(200)


def speak_for(api: API, worker: Worker, admitted: Admitted) -> None:
    """Check that a sender is the account that registered a worker. Raises ForbiddenError.

    A worker that was stored before accounts were is bound to the first account that speaks for it.
    """
    if api.parts.gate is None or worker.registered_by == admitted.account:
        return
    if worker.registered_by:
        raise auth.ForbiddenError(
            f'worker "{worker.name}" was registered by service account "{worker.registered_by}",'
            f' not by "{admitted.account}"'
        )
    api.put(replace(worker, registered_by=admitted.account), worker)


def _worker(api: API, name: str, *, images: bool = True) -> Response:
    """Return an answer with a worker, its last_seen, its state and what it reports of its host, which are not stored."""
    worker, stored = api.state.workers[name], api.state.json["worker"][name]
    return Response(200, b"".join(api.parts.worker_states.json_parts(worker, stored, images=images)))


def watch_rpc(api: API, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
    request.require_websocket()
    worker = _read_worker(api, request, admitted)
    serve = partial(_serve_watch, api, worker, liveness_source(request, admitted))
    return _if_not_connected(api, worker.name, lambda: WebSocketUpgrade(serve))


async def _serve_watch(api: API, worker: Worker, source: Source, websocket: WebSocketConnection) -> None:
    liveness, name, cancels = api.parts.liveness, worker.name, CANCEL_REQUEST in worker.capabilities
    watch = liveness.record_watch(name, source)
    try:
        alive = partial(liveness.record_pong, name)
        await api.parts.rendezvous.serve(name, source[0], alive, websocket, cancels=cancels)
    finally:
        liveness.record_watch_end(name, watch)


def say_goodbye(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    api.parts.liveness.record_goodbye(_read_worker(api, request, admitted).name)
    return Response(200)


def _read_worker(api: API, request: Request, admitted: Admitted) -> Worker:
    """Return the worker that a request is from. Raises HTTPError(400, 404), ForbiddenError."""
    worker = found("worker", api.state.workers, read_text(request.query, parameters.WORKER_NAME))
    speak_for(api, worker, admitted)
    return worker


def answer_forward(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    request.require_websocket()
    session = read_text(request.query, parameters.SESSION)
    pending = api.parts.rendezvous.answer_port(session, admitted.account)
    error = read_text(request.query, parameters.ERROR_MESSAGE)
    if error:
        pending.fail(error)
        return WebSocketUpgrade(_close_at_once)
    return TunnelUpgrade(partial(api.parts.rendezvous.lend, pending), api.parts.rendezvous.ping_interval)


def answer_ip(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    session = read_text(request.query, parameters.SESSION)
    pending = api.parts.rendezvous.answer_address(session, admitted.account)
    error = read_text(request.query, parameters.ERROR_MESSAGE)
    address = read_text(request.query, parameters.RESOLVED_ADDRESS)
    if error or not address:
        pending.fail(error or "no address was found")
    else:
        pending.resolve(address)
    return Response(200, routine=True)


async def _close_at_once(websocket: WebSocketConnection) -> None:
    """Serve a WebSocket on which nothing follows."""
    await trio.lowlevel.checkpoint()
