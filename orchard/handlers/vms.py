"""Handlers of VMs: creation, lists, changes, deletion, and the reports of workers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from orchard import parameters, schema, transitions, validation
from orchard.admission import Admitted, is_old_worker, read_body
from orchard.api import API, liveness_source
from orchard.changes import send_changes
from orchard.cluster import WORKER_STATE
from orchard.codec import shown
from orchard.net.request import AnyResponse, HTTPError, Request, Stream
from orchard.parameters import read_flag
from orchard.schema import VMSpec


def create_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    name, spec = read_body(admitted, validation.vm_from_client)
    if spec.host_dirs:
        _check_host_dirs(api, spec)
    if name in api.state.vms:
        raise HTTPError(409, f'VM "{name}" already exists')
    reason = api.parts.waiting_reason(spec)
    with api.store.transaction() as tx:
        tx.put(transitions.create(name, str(uuid.uuid4()), spec, api.parts.clock(), reason))
    return api.answer_vm(name)


def list_vms(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    table = api.state.json["vm"]
    worker = parameters.read_worker_filter(request.query)
    if worker is None:
        return api.answer_list(table[name] for name in api.state.names["vm"])
    if api.state.cluster.restored_from and not _can_notice(api, worker):
        raise HTTPError(
            503,
            "the controller's state was restored from an older copy, and this worker cannot know;"
            " see POST /v1/controller/accept-state",
        )
    api.parts.liveness.record_poll(worker, liveness_source(request, admitted))
    return api.answer_list(table[name] for name in sorted(api.state.vms_by_worker.get(worker, ())))


def _can_notice(api: API, worker: str) -> bool:
    """Return whether a worker keeps its VMs by itself while the restored state is not accepted."""
    registered = api.state.workers.get(worker)
    return registered is not None and WORKER_STATE in registered.capabilities


def get_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    vm = api.find_vm(admitted)
    if read_flag(request.query, parameters.WATCH):
        # The feed begins here: a change between this answer and its first line must not be missed.
        changes, silence = api.store.watch("vm", vm.name), api.parts.rendezvous.ping_interval
        return Stream(partial(send_changes, vm.meta.version, api.state.json["vm"][vm.name], changes, silence))
    return api.answer_vm(vm.name)


def replace_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    if is_old_worker(request):
        return _report(api, request, admitted, validation.report_from_old_worker)
    return _change_vm(api, request, admitted, validation.replaced_spec)


def patch_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return _change_vm(api, request, admitted, validation.patched_spec)


def _change_vm(
    api: API, request: Request, admitted: Admitted, read: Callable[[VMSpec, object, list[str]], VMSpec]
) -> AnyResponse:
    old = api.find_vm(admitted)
    spec = read_body(admitted, partial(read, old.spec))
    if spec.host_dirs != old.spec.host_dirs:
        _check_host_dirs(api, spec)
    api.put(transitions.change(old, spec), old)
    return api.answer_vm(old.name)


def delete_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return api.delete(api.find_vm(admitted))


def report_vm(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return _report(api, request, admitted, validation.report_from_worker)


def _report(
    api: API, request: Request, admitted: Admitted, read: Callable[[object, list[str]], schema.VMReport]
) -> AnyResponse:
    """Take over a worker's report. The answer is the VM: existing workers end their session when it is not."""
    old = api.find_vm(admitted)
    report = read_body(admitted, read)
    api.put(transitions.report(old, report, api.parts.clock()), old)
    return replace(api.answer_vm(old.name), routine=True)


def _check_host_dirs(api: API, spec: VMSpec) -> None:
    for index, host_dir in enumerate(spec.host_dirs):
        if not schema.is_allowed(api.state.settings.host_dir_policies, host_dir):
            access = "read only" if host_dir.ro else "writable"
            raise HTTPError(
                400,
                f"hostDirs[{index}].path: no hostDirPolicy allows mounting {shown(host_dir.path)} {access};"
                " see the cluster settings",
            )
