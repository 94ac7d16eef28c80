"""Changes of a VM's state: which are allowed, and what each makes of the VM. Pure functions from one VM to the next.

Every change of a VM in the controller is one of these functions, so the rule who writes which field (schema.py) is
applied in one place:

    create           pending, unassigned                              (user)
    change           the next generation of the specification         (user)
    set_deadlines    the deadlines that follow from a specification   (user)
    request_restart  failed, and the worker has to end it             (user)
    explain          why a pending VM is still unassigned             (scheduler)
    assign           pending, on a worker                             (scheduler)
    unassign         pending, in the queue again                      (scheduler)
    report           running or failed, and what was observed         (worker)
    fail             failed, with the reason                          (scheduler)
    restart          pending and unassigned, the next run             (scheduler)
    withdraw_restart failed, and not restarted any more               (scheduler)
    end_for_drain    failed, and the worker has to end it             (controller)
    time_out         failed, since no worker was found                (controller)

The time is an argument. A function that changes nothing returns the object that it was given.
"""

from __future__ import annotations

import datetime
from dataclasses import replace

from orchard.codec import attrs_of, shown
from orchard.resources.bodies import VMReport
from orchard.resources.cluster import VM_READY, VM_RESTART
from orchard.schema import (
    DEFAULT_CPU,
    DEFAULT_MEMORY,
    VM,
    ClusterSettings,
    Condition,
    ConditionState,
    ConditionType,
    EndRequest,
    Status,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
)

# The fields that apply at once. They do not concern the worker, which for the others stops (or suspends) the VM and starts it.
_LIVE = frozenset(field.name for field in attrs_of(VMSpec) if field.change == "at once")

# The fields of a report that replace those of the VM's state, where they are reported. `report` has rules for the others.
_FACTS = frozenset(field.name for field in attrs_of(VMReport)) - {
    *("uid", "restart_count", "status", "status_message", "observed_generation", "conditions"),
}

_UNSCHEDULED = (Condition("scheduled", "false"), Condition("running", "false"))
_SCHEDULED = (Condition("scheduled", "true"), Condition("running", "false"))


class TransitionError(Exception):
    """The user asked for a change that the VM does not allow; `str(error)` names the field."""


class StaleReportError(Exception):
    """A worker's report is about another VM of that name, about an earlier run, or about a VM that has no worker."""


def create(
    name: str, uid: str, spec: VMSpec, now: datetime.datetime, reason: str = "", *, created_by: str = ""
) -> VM:  # fmt: skip
    """Return a new VM: pending, unassigned for `reason` ("": not known yet), generation 0."""
    meta = VMMeta(name=name, uid=uid, created_at=now, created_by=created_by)
    return VM(meta, spec, VMState(status_message=reason, conditions=_UNSCHEDULED))


def change(vm: VM, spec: VMSpec) -> VM:
    """Return a VM with another specification: the next generation, applied at its next boot, unless only live fields differ.

    Raises TransitionError if a field cannot be changed, or not in the VM's present state.
    """
    changed = {field.name for field in attrs_of(VMSpec) if getattr(vm.spec, field.name) != getattr(spec, field.name)}
    if not changed:
        return vm
    if changed <= _LIVE:
        return replace(vm, spec=spec)
    _check_change(vm, spec)
    state = vm.state
    if state.worker:
        # A size that was left to the worker's default was fixed when the VM was assigned.
        state = replace(
            state,
            assigned_cpu=spec.cpu or state.assigned_cpu,
            assigned_memory=spec.memory or state.assigned_memory,
        )
    return VM(replace(vm.meta, generation=vm.meta.generation + 1), spec, state)


def _check_change(vm: VM, spec: VMSpec) -> None:
    old = vm.spec
    if vm.state.status == "failed":
        raise TransitionError(f'VM "{vm.name}" has failed and cannot be changed; delete it and create it again')
    for field in attrs_of(VMSpec):
        if field.change == "refused" and getattr(old, field.name) != getattr(spec, field.name):
            raise TransitionError(
                f"{field.json} cannot be changed after the VM was created; delete the VM and create it again"
            )
    if old.suspendable and not spec.suspendable:
        raise TransitionError("suspendable is false, expected true: it cannot be turned off")
    if old.suspendable and old.net_softnet != spec.net_softnet:
        raise TransitionError("netSoftnet cannot be turned on or off for a suspendable VM")
    if spec.disk_size < old.disk_size:
        raise TransitionError(f"diskSize is {spec.disk_size}, expected at least {old.disk_size}: a disk can only grow")
    if spec.power_state != old.power_state != "running":
        raise TransitionError(
            f"powerState is {shown(spec.power_state)}, expected {shown(old.power_state)}:"
            " a VM that was stopped or suspended stays so"
        )


def set_deadlines(
    old: VM | None, new: VM, settings: ClusterSettings, now: datetime.datetime, *, renews_ttl: bool = False
) -> VM:
    """Return a VM that was created (`old` is None) or changed with the deadlines that follow from its specification.

    `renews_ttl`: the time to live counts from now although its length is unchanged. Raises TransitionError for a time
    to live that the cluster settings do not allow.
    """
    ttl, meta, spec, state = new.spec.ttl_seconds, new.meta, new.spec, new.state
    if old is None:
        ttl = ttl or settings.default_ttl_seconds or settings.max_ttl_seconds
        spec = spec if ttl == spec.ttl_seconds else replace(spec, ttl_seconds=ttl)
    if old is None or renews_ttl or ttl != old.spec.ttl_seconds:
        most = settings.max_ttl_seconds
        if most and not 1 <= ttl <= most:
            raise TransitionError(
                f"ttlSeconds is {ttl}, expected 1 to {most}, the maxTTLSeconds of the cluster settings"
            )
        meta = replace(meta, expires_at=now + datetime.timedelta(seconds=ttl) if ttl else None)
    if (
        not state.worker
        and state.status == "pending"
        and bool(spec.pending_timeout_seconds) is not bool(state.waiting_since)
    ):
        state = replace(state, waiting_since=_waiting_since(spec, now))
    return VM(meta, spec, state)


def _waiting_since(spec: VMSpec, now: datetime.datetime) -> datetime.datetime | None:
    return now if spec.pending_timeout_seconds else None


def request_restart(vm: VM, worker: Worker | None) -> VM:
    """Return a VM that its worker has to end, and that is restarted then, whatever its policy. `worker` is the VM's.

    Raises TransitionError if the VM cannot be restarted now.
    """
    state = vm.state
    if state.end_request == "restart":
        return vm
    if state.status == "pending":
        raise TransitionError(f'VM "{vm.name}" is pending, expected running or failed')
    if vm.spec.power_state != "running":
        raise TransitionError(f'powerState of VM "{vm.name}" is {vm.spec.power_state}, expected running')
    if state.worker and (worker is None or VM_RESTART not in worker.capabilities):
        raise TransitionError(
            f'worker "{state.worker}" does not support restarts (capability {VM_RESTART}), so it is unknown when the VM'
            " has ended there; delete the VM and create it again"
        )
    if worker is not None and has_lost_worker(vm, worker):
        raise TransitionError(
            f'worker "{worker.name}" was registered after the VM was assigned to an earlier one of this name, so it is'
            " unknown when the VM has ended there; delete the VM and create it again"
        )
    return _end(vm, "restart", "restart requested")


def has_lost_worker(vm: VM, worker: Worker | None) -> bool:
    """Return whether a VM's worker was deleted or replaced before it reported the VM's end.

    `worker` has that worker's name now. If it was registered after the VM was assigned, it does not report that end.
    """
    if not vm.state.worker or vm.state.ended_at:
        return False
    if worker is None:
        return True
    registered, assigned = worker.created_at, vm.state.scheduled_at
    return registered is not None and assigned is not None and registered > assigned


def withdraw_restart(vm: VM) -> VM:
    """Return a VM that is not restarted, because its worker went before it reported the VM's end."""
    reason = f'not restarted: worker "{vm.state.worker}" was deleted or replaced before it reported the end of the VM'
    return replace(
        vm, state=replace(vm.state, end_request="", status_message=f"{reason}; delete the VM and create it again")
    )


def end_for_drain(vm: VM) -> VM:
    """Return a VM that its worker has to end because the worker is drained."""
    return _end(vm, "drain", f'worker "{vm.state.worker}" was drained')


def _end(vm: VM, request: EndRequest, reason: str) -> VM:
    """Return a failed VM that its worker has to end. Its condition `running` stays as last reported."""
    conditions = vm.state.conditions
    if vm.state.status == "pending":
        conditions = tuple(condition for condition in conditions if condition.type != "running")
    state = replace(vm.state, status="failed", status_message=reason, end_request=request, conditions=conditions)
    return replace(vm, state=replace(state, conditions=_not_ready(conditions)))


def will_restart(vm: VM) -> bool:
    """Return whether a VM has failed and becomes pending again, now or later."""
    state = vm.state
    # A VM that was to be stopped or suspended has no work left, and its disk is on the worker where it failed.
    if state.status != "failed" or vm.spec.power_state != "running":
        return False
    # Without a worker the VM has timed out in the queue, and would find no worker now either.
    return state.end_request == "restart" or (vm.spec.restart_policy == "OnFailure" and bool(state.worker))


def has_ended(vm: VM, worker: Worker | None) -> bool:
    """Return whether it is known that a failed VM which a worker had to end does not run any more.

    `worker` is the VM's. A worker without the capability may report a failure before the VM has ended.
    """
    if not vm.state.worker:
        return True
    is_known = vm.state.end_request == "restart" or (worker is not None and VM_RESTART in worker.capabilities)
    return is_known and vm.state.ended_at is not None


def has_expired(vm: VM, now: datetime.datetime) -> bool:
    """Return whether a VM that was deleted had reached the end of its time to live."""
    return vm.meta.expires_at is not None and vm.meta.expires_at <= now


def time_out(vm: VM) -> VM:
    """Return a pending VM that has failed because it was without a worker for too long."""
    why = vm.state.status_message or "waiting: no worker was looked for yet"
    state = replace(vm.state, waiting_since=None)
    return fail(replace(vm, state=state), f"no worker within {vm.spec.pending_timeout_seconds} seconds; {why}")


def explain(vm: VM, reason: str) -> VM:
    """Return a pending VM with the reason why it is unassigned."""
    if vm.state.status_message == reason:
        return vm
    return replace(vm, state=replace(vm.state, status_message=reason))


def assign(vm: VM, worker: Worker, now: datetime.datetime) -> VM:
    """Return a pending VM on a worker, with the CPUs and the memory that it gets there."""
    state = replace(
        vm.state,
        worker=worker.name,
        assigned_cpu=vm.spec.cpu or worker.default_cpu or DEFAULT_CPU,
        assigned_memory=vm.spec.memory or worker.default_memory or DEFAULT_MEMORY,
        scheduled_at=now,
        waiting_since=None,
        status_message="",
        conditions=_kept_ready(vm, _SCHEDULED) if VM_READY in worker.capabilities else _SCHEDULED,
    )
    return replace(vm, state=state)


def unassign(vm: VM, reason: str, now: datetime.datetime) -> VM:
    """Return a VM that was assigned to a worker which never knew of it: pending, unassigned, the same run."""
    state = replace(
        vm.state,
        worker="",
        assigned_cpu=0,
        assigned_memory=0,
        scheduled_at=None,
        waiting_since=_waiting_since(vm.spec, now),
        status_message=reason,
        conditions=_kept_ready(vm, _UNSCHEDULED),
    )
    return replace(vm, state=state)


def report(vm: VM, seen: VMReport, now: datetime.datetime) -> VM:
    """Return a VM with what its worker observed. Raises StaleReportError for a report about another run of the VM."""
    state = vm.state
    _check_run(vm, seen)
    ended_at = state.ended_at or (now if _says_ended(seen) else None)
    # The first failure stays the reason.
    if state.status == "failed":
        if ended_at == state.ended_at:
            return vm
        conditions = _with(state.conditions, "running", "false")
        return replace(vm, state=replace(state, ended_at=ended_at, conditions=conditions))
    status: Status = state.status
    # A report never makes a running VM pending again.
    if seen.status is not None and (status, seen.status) != ("running", "pending"):
        status = seen.status
    message = state.status_message
    # Go clients leave an empty message out.
    if seen.status_message is not None or seen.status is not None:
        message = seen.status_message or ""
    new = replace(
        state,
        status=status,
        status_message=message,
        observed_generation=max(state.observed_generation, min(seen.observed_generation, vm.meta.generation)),
        conditions=_reported_conditions(vm, seen, status),
        started_at=state.started_at or (now if status == "running" else None),
        ended_at=ended_at,
        **{name: value for name in _FACTS if (value := getattr(seen, name)) not in (None, "")},
    )
    return vm if new == state else replace(vm, state=new)


def _check_run(vm: VM, seen: VMReport) -> None:
    if not vm.state.worker:
        raise StaleReportError(f'VM "{vm.name}" has no worker, expected a report of its worker')
    uid, run = seen.uid or vm.uid, seen.restart_count
    if run is None:
        # A Go client that names the uid leaves a count of zero out.
        run = 0 if seen.uid else vm.state.restart_count
    if (uid, run) != (vm.uid, vm.state.restart_count):
        raise StaleReportError(
            f"the report is about uid {shown(uid)} and restart_count {run},"
            f' VM "{vm.name}" has uid {vm.uid} and restart_count {vm.state.restart_count}'
        )


def _says_ended(seen: VMReport) -> bool:
    """Return whether a report says that the VM has failed and does not run any more."""
    return seen.status == "failed" and Condition("running", "false") in (seen.conditions or ())


def _reported_conditions(vm: VM, seen: VMReport, status: Status) -> tuple[Condition, ...]:
    conditions = vm.state.conditions
    for condition in seen.conditions or ():
        # The scheduler may already have reassigned the resources of a resting VM, so it does not run again.
        if condition.type == "ready" or (condition.type == "running" and not vm.resting):
            conditions = _with(conditions, condition.type, condition.state)
    if seen.status == "failed":
        conditions = _with(conditions, "running", "false")
    return conditions if status == "running" and Condition("running", "true") in conditions else _not_ready(conditions)


def fail(vm: VM, reason: str) -> VM:
    """Return a failed VM. It stays assigned to its worker, which has to stop it."""
    conditions = _not_ready(_with(vm.state.conditions, "running", "false"))
    return replace(vm, state=replace(vm.state, status="failed", status_message=reason, conditions=conditions))


def restart(vm: VM, now: datetime.datetime) -> VM:
    """Return a failed VM at the beginning of its next run: pending and unassigned."""
    state = VMState(
        restart_count=vm.state.restart_count + 1,
        restarted_at=now,
        started_at=vm.state.started_at,
        waiting_since=_waiting_since(vm.spec, now),
        conditions=_kept_ready(vm, _UNSCHEDULED),
    )
    return replace(vm, state=state)


def _with(conditions: tuple[Condition, ...], kind: ConditionType, state: ConditionState) -> tuple[Condition, ...]:
    """Return conditions with one that is set, in its place or at the end."""
    new = Condition(kind, "true" if state == "true" else "false")
    if any(condition.type == kind for condition in conditions):
        return tuple(new if condition.type == kind else condition for condition in conditions)
    return (*conditions, new)


def _not_ready(conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """Return conditions in which `ready` is false, if it is there."""
    return _with(conditions, "ready", "false") if Condition("ready", "true") in conditions else conditions


def _kept_ready(vm: VM, conditions: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """Return new conditions of a VM, with `ready` false if the VM had that condition."""
    has_ready = any(condition.type == "ready" for condition in vm.state.conditions)
    return (*conditions, Condition("ready", "false")) if has_ready else conditions
