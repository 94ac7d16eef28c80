"""Handlers of VMs: creation, lists, changes, deletion, and the reports of workers."""

from __future__ import annotations

import bisect
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import trio

from orchard import transitions
from orchard.api import API
from orchard.auth import ForbiddenError
from orchard.codec import shown
from orchard.decisions.goals import Goal, describe_status, is_reached, why_never
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted, is_old_worker, liveness_source, read_body, refuses_new_values
from orchard.handlers.answers import http_error, vm_is_gone
from orchard.handlers.parameters import read_choice, read_count, read_flag, read_number
from orchard.handlers.watch import watch_kinds
from orchard.handlers.workers import speak_for
from orchard.net.request import AnyResponse, HTTPError, Request, Response, Stream
from orchard.resources import validation
from orchard.resources.bodies import BulkDeletion, VMReport
from orchard.resources.cluster import WORKER_STATE
from orchard.resources.filters import VMFilter
from orchard.resources.json_text import dump_resource
from orchard.schema import VM, VMSpec, is_allowed
from orchard.state.changes import Change, send_changes
from orchard.storage.errors import StorageError
from orchard.store import encode_object

# Conditions that are tested in one step of the event loop: one to two milliseconds.
_TESTS_PER_STEP = 5_000
# Retry-After of a refusal because no worker has room.
_RETRY_SECONDS = 5
# VMs that are deleted in one transaction.
_DELETED_TOGETHER = 24

_logger = logging.getLogger("orchard.controller")


def create_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
    name, spec = read_body(admitted, validation.vm_from_client)
    if spec.host_dirs:
        _check_host_dirs(api, spec)
    if read_choice(request.query, parameters.QUEUE) == "never":
        return _create_at_once(api, admitted, name, spec)
    return _create(api, admitted, name, spec)


async def _create_at_once(api: API, admitted: Admitted, name: str, spec: VMSpec) -> AnyResponse:
    """Create a VM on a worker, or nothing if it would have to wait for one."""
    scheduling = api.parts.scheduling
    is_settled = await scheduling.settle()
    # No checkpoint comes before the creation, so the worker stays free.
    _check_new(api, name)
    placement = scheduling.planner.placement
    worker = placement.find_worker(spec) if is_settled else None
    if worker is None:
        reason = placement.reason_for(spec, trio.current_time())
        refusal = f'VM "{name}" was not created, because it would wait: {reason.text}'
        if reason.is_never:
            raise HTTPError(412, refusal)
        raise HTTPError(503, refusal, (("Retry-After", str(_RETRY_SECONDS)),))
    _create(api, admitted, name, spec)
    scheduling.assign(name, worker)
    return api.answer_vm(name)


def _check_new(api: API, name: str) -> None:
    if name in api.state.vms:
        raise HTTPError(409, f'VM "{name}" already exists')


def _create(api: API, admitted: Admitted, name: str, spec: VMSpec) -> Response:
    _check_new(api, name)
    reason = api.parts.scheduling.planner.waiting_reason(spec)
    now, account = api.parts.clock(), admitted.account
    vm = transitions.create(name, str(uuid.uuid4()), spec, now, reason, created_by=account)
    api.put(transitions.set_deadlines(None, vm, api.state.settings, api.parts.deadline_clock()))
    return api.answer_vm(name)


def list_vms(api: API, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
    if read_flag(request.query, parameters.WATCH):
        return watch_kinds(api, request, frozenset({"vm"}))
    wanted, limit = parameters.read_filter(request.query), read_number(request.query, parameters.VM_LIMIT)
    after = parameters.read_continue(request.query)
    is_page = limit is not None or bool(after)
    if wanted.only_worker is not None and not is_page:
        return _answer_poll(api, request, admitted, wanted.only_worker)
    if wanted or is_page:
        return _list_some(api, wanted, after, limit)
    table = api.state.json["vm"]
    return api.answer_list(table[name] for name in api.state.names["vm"])


def _answer_poll(api: API, request: Request, admitted: Admitted, worker: str) -> Response:
    """Return the VMs of a worker, which asks for them."""
    if api.state.cluster.restored_from and not _can_notice(api, worker):
        raise HTTPError(
            503,
            "the controller's state was restored from an older copy, and this worker cannot know;"
            " see: orchard accept-state",
        )
    api.parts.liveness.record_poll(worker, liveness_source(request, admitted))
    table, vms = api.state.json["vm"], api.state.vms_by_worker.get(worker, {})
    if refuses_new_values(request):
        # An older worker may have taken the name of a newer one, and would refuse VMs with the condition `ready`.
        return api.answer_list(encode_object(_without_ready(vms[name])) for name in sorted(vms))
    return api.answer_list(table[name] for name in sorted(vms))


def _without_ready(vm: VM) -> VM:
    conditions = tuple(condition for condition in vm.state.conditions if condition.type != "ready")
    return replace(vm, state=replace(vm.state, conditions=conditions))


async def _list_some(api: API, wanted: VMFilter, after: str, limit: int | None) -> Response:
    # The whole answer is from the state at this moment.
    headers, table = api.revision_headers(), dict(api.state.json["vm"])
    found = await _select(api, wanted, after, None if limit is None else limit + 1)
    if limit is not None and len(found) > limit:
        found = found[:limit]
        headers = (*headers, ("X-Continue", parameters.continue_token(found[-1].name)))
    pieces: list[bytes] = []
    for start in range(0, len(found), _TESTS_PER_STEP):
        pieces += [table[vm.meta.name] for vm in found[start : start + _TESTS_PER_STEP]]
        await trio.lowlevel.checkpoint()
    return api.answer_list(pieces, headers)


async def _select(api: API, wanted: VMFilter, after: str = "", most: int | None = None) -> list[VM]:
    """Return the VMs that match at this moment, in the order of their names, from the first name after `after`.

    The test of all VMs is divided into steps of the event loop. Raises StorageError if the state was undone meanwhile.
    """
    names, table = api.state.names["vm"], dict(api.state.vms)
    names = names[bisect.bisect_right(names, after) :]
    await api.store.wait_durable()
    size = max(1, _TESTS_PER_STEP // max(1, len(wanted.conditions)))
    found: list[VM] = []
    for start in range(0, len(names), size):
        found += wanted.select([table[name] for name in names[start : start + size]])
        if most is not None and len(found) >= most:
            break
        await trio.lowlevel.checkpoint()
    return found[:most]


async def delete_vms(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    """Delete the VMs that match when the request is decided, even if they change meanwhile."""
    if admitted.remarks.unknown:
        raise HTTPError(400, f"{admitted.remarks}; nothing was deleted")
    wanted = parameters.read_bulk_filter(request.query)
    if request.query.one(parameters.DRY_RUN.name) == "":
        raise HTTPError(400, 'dryRun is "", expected true or false')
    is_dry = read_flag(request.query, parameters.DRY_RUN)
    found = await _select(api, wanted)
    deleted = [vm.name for vm in found] if is_dry else await _delete_all(api, admitted, found)
    return Response(200, dump_resource(BulkDeletion(tuple(deleted))))


async def _delete_all(api: API, admitted: Admitted, vms: Sequence[VM]) -> list[str]:
    """Delete VMs by their uids. Return the names of those that still existed. Raises HTTPError, which has them, too."""
    deleted: list[str] = []
    reasons: list[str] = []
    try:
        with api.parts.sessions.hold(admitted.account, admitted.role, reasons.append):
            for start in range(0, len(vms), _DELETED_TOGETHER):
                if reasons:
                    raise ForbiddenError(reasons[0])
                batch, table = vms[start : start + _DELETED_TOGETHER], api.state.vms
                present = [now for vm in batch if (now := table.get(vm.name)) is not None and now.uid == vm.uid]
                with api.store.transaction() as tx:
                    for vm in present:
                        tx.delete(vm)
                await api.store.wait_durable()
                names = [vm.name for vm in present]
                # The line of the request itself has no names.
                if names:
                    _logger.info("VMs deleted", extra={"vm": ",".join(names), "account": admitted.account or "-"})
                deleted += names
    except (ForbiddenError, StorageError) as error:
        refused = http_error(error)
        message = f"{len(deleted)} of {len(vms)} VMs were deleted, and then: {refused.message}"
        raise HTTPError(refused.status, message, refused.headers, details={"deleted": deleted}) from error
    return deleted


def _can_notice(api: API, worker: str) -> bool:
    """Return whether a worker itself keeps its VMs while a restored state is not accepted."""
    registered = api.state.workers.get(worker)
    return registered is not None and WORKER_STATE in registered.capabilities


def get_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
    vm = api.find_vm(admitted, request.query.one(parameters.UID.name))
    goal = parameters.read_goal(request.query)
    if goal is not None:
        return _wait_for(api, vm, goal, read_count(request.query, parameters.WAIT_VM))
    if read_flag(request.query, parameters.WATCH):
        # The feed begins here: a change between this answer and its first line must not be missed.
        changes, silence = api.store.watch("vm", vm.name), api.parts.rendezvous.ping_interval
        return Stream(partial(send_changes, vm.meta.version, api.state.json["vm"][vm.name], changes, silence))
    return api.answer_vm(vm.name)


async def _wait_for(api: API, vm: VM, goal: Goal, wait: float) -> Response:
    """Return the VM once it is what the client waits for. Raises HTTPError if it can not be, or is not in time."""
    with trio.move_on_after(wait):
        while True:
            with api.store.watch("vm", vm.name) as changes:
                now = api.state.vms.get(vm.name)
                if now is None or now.uid != vm.uid:
                    raise vm_is_gone(vm.name, vm.uid)
                if _is_over(api, now, goal):
                    return api.answer_vm(vm.name)
                # The feed ends if it is too far behind.
                async for change in changes:
                    if (answer := _answer_change(api, change, vm.uid, goal)) is not None:
                        return answer
    now = api.state.vms.get(vm.name)
    if now is None or now.uid != vm.uid:
        raise vm_is_gone(vm.name, vm.uid)
    raise HTTPError(503, describe_status(now, goal), (("Retry-After", "1"),))


def _answer_change(api: API, change: Change, uid: str, goal: Goal) -> Response | None:
    """Return the answer to a wait after a change, None if the wait goes on. Raises HTTPError."""
    new, old = change.new, change.old
    if isinstance(new, VM) and new.uid == uid and _is_over(api, new, goal):
        return Response(200, change.json)
    if new is None and isinstance(old, VM) and old.uid == uid:
        if goal == "deleted":
            return Response(200, change.json)
        raise vm_is_gone(old.name, uid)
    return None


def _is_over(api: API, vm: VM, goal: Goal) -> bool:
    """Return whether a wait has succeeded. Raises HTTPError if it never will."""
    if is_reached(vm, goal):
        return True
    if why := why_never(vm, goal, api.state.workers.get(vm.state.worker)):
        raise HTTPError(503, why)
    return False


def replace_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    if is_old_worker(request):
        return _report(api, request, admitted, validation.report_from_old_worker)
    return _change_vm(api, admitted, validation.replaced_spec)


def patch_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    body = admitted.body
    renews_ttl = isinstance(body, dict) and any(name.lower() == "ttlseconds" for name in body)
    return _change_vm(api, admitted, validation.patched_spec, renews_ttl=renews_ttl)


def _change_vm(
    api: API,
    admitted: Admitted,
    read: Callable[[VMSpec, object, list[str]], VMSpec],
    *,
    renews_ttl: bool = False,
) -> AnyResponse:
    old = api.find_vm(admitted)
    spec = read_body(admitted, partial(read, old.spec))
    if spec.host_dirs != old.spec.host_dirs:
        _check_host_dirs(api, spec)
    changed, now = transitions.change(old, spec), api.parts.deadline_clock()
    api.put(transitions.set_deadlines(old, changed, api.state.settings, now, renews_ttl=renews_ttl), old)
    return api.answer_vm(old.name)


def restart_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    """Have a VM's worker end it, after which it is restarted."""
    old = api.find_vm(admitted)
    api.put(transitions.request_restart(old, api.state.workers.get(old.state.worker)), old)
    return api.answer_vm(old.name)


def delete_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return api.delete(api.find_vm(admitted))


def report_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return _report(api, request, admitted, validation.report_from_worker)


def _report(
    api: API, request: Request, admitted: Admitted, read: Callable[[object, list[str]], VMReport]
) -> AnyResponse:
    """Apply a worker's report. The answer is the VM: existing workers end their session on any other answer."""
    old = api.find_vm(admitted)
    new = transitions.report(old, read_body(admitted, read), api.parts.clock())
    # After that, since existing workers take no other refusal than 404, and an earlier VM may be another account's.
    if (worker := api.state.workers.get(old.state.worker)) is not None:
        speak_for(api, worker, admitted)
    api.put(new, old)
    return replace(api.answer_vm(old.name), routine=True)


def _check_host_dirs(api: API, spec: VMSpec) -> None:
    for index, host_dir in enumerate(spec.host_dirs):
        if not is_allowed(api.state.settings.host_dir_policies, host_dir):
            access = "read only" if host_dir.ro else "writable"
            raise HTTPError(
                400,
                f"hostDirs[{index}].path: no hostDirPolicy allows mounting {shown(host_dir.path)} {access};"
                " see the cluster settings",
            )
