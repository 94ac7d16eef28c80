"""Changes of a VM's state: which are allowed, and what each makes of the VM. Pure functions from one VM to the next.

Every change of a VM in the controller is one of these functions, so the rule who writes which field (schema.py) is
applied in one place:

    create    pending, unassigned                       (user)
    change    the next generation of the specification  (user)
    explain   why a pending VM is still unassigned      (scheduler)
    assign    pending, on a worker                      (scheduler)
    unassign  pending, in the queue again               (scheduler)
    report    running or failed, and what was observed  (worker)
    fail      failed, with the reason                   (scheduler)
    restart   pending and unassigned, the next run      (scheduler)

The time is an argument. A function that changes nothing returns the object that it was given.
"""

from __future__ import annotations

import datetime
from dataclasses import replace

from orchard.codec import attrs_of, shown
from orchard.schema import DEFAULT_CPU, DEFAULT_MEMORY, VM, Condition, Status, VMMeta, VMReport, VMSpec, VMState, Worker

# Each field of a specification is in one of three sets. Those of FIXED never change after the VM was created.
FIXED = frozenset(
    {
        "image",
        "image_pull_policy",
        "os",
        "arch",
        "runtime",
        "username",
        "password",
        "startup_script",
        "startup_timeout_seconds",
        "startup_on_failure",
        "shutdown_script",
        "restart_policy",
        "resources",
        "labels",
        "random_serial",
        "audio",
        "clipboard",
    }
)
# A worker changes these by stopping (or suspending) the VM and starting it again.
AT_NEXT_BOOT = frozenset(
    {
        "net_softnet",
        "net_softnet_allow",
        "net_softnet_block",
        "net_bridged",
        "headless",
        "nested",
        "suspendable",
        "host_dirs",
        "cpu",
        "memory",
        "disk_size",
        "power_state",
    }
)
# These apply at once and do not concern the worker.
LIVE = frozenset(
    {
        "ttl_seconds",
        "pending_timeout_seconds",
        "shutdown_timeout_seconds",
        "metadata",
        "priority",
        "preferred_labels",
    }
)

_UNSCHEDULED = (Condition("scheduled", "false"), Condition("running", "false"))
_SCHEDULED = (Condition("scheduled", "true"), Condition("running", "false"))


class TransitionError(Exception):
    """The user asked for a change that the VM does not allow; `str(error)` names the field."""


class StaleReportError(Exception):
    """A worker's report is about another VM of that name, or about an earlier run."""


def create(name: str, uid: str, spec: VMSpec, now: datetime.datetime, reason: str = "") -> VM:
    """Return a new VM: pending, unassigned for `reason` ("": not known yet), generation 0."""
    meta = VMMeta(name=name, uid=uid, created_at=now)
    return VM(meta, spec, VMState(status_message=reason, conditions=_UNSCHEDULED))


def change(vm: VM, spec: VMSpec) -> VM:
    """Return a VM with another specification: the next generation, applied at its next boot, unless only LIVE fields differ.

    Raises TransitionError if a field cannot be changed, or not in the VM's present state.
    """
    changed = {field.name for field in attrs_of(VMSpec) if getattr(vm.spec, field.name) != getattr(spec, field.name)}
    if not changed:
        return vm
    if changed <= LIVE:
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
        if field.name in FIXED and getattr(old, field.name) != getattr(spec, field.name):
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
        status_message="",
        conditions=_SCHEDULED,
    )
    return replace(vm, state=state)


def unassign(vm: VM, reason: str) -> VM:
    """Return a VM that was assigned to a worker which never knew of it: pending, unassigned, the same run."""
    state = replace(
        vm.state,
        worker="",
        assigned_cpu=0,
        assigned_memory=0,
        scheduled_at=None,
        status_message=reason,
        conditions=_UNSCHEDULED,
    )
    return replace(vm, state=state)


def report(vm: VM, seen: VMReport, now: datetime.datetime) -> VM:
    """Return a VM with what its worker observed. Raises StaleReportError for a report about another run of the VM."""
    state = vm.state
    _check_run(vm, seen)
    # The first failure stays the reason.
    if state.status == "failed":
        return vm
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
        image_fqn=seen.image_fqn or state.image_fqn,
        observed_generation=max(state.observed_generation, min(seen.observed_generation, vm.meta.generation)),
        conditions=_reported_conditions(vm, seen),
        started_at=state.started_at or (now if status == "running" else None),
    )
    return vm if new == state else replace(vm, state=new)


def _check_run(vm: VM, seen: VMReport) -> None:
    uid, run = seen.uid or vm.uid, seen.restart_count
    if run is None:
        # A Go client that names the uid leaves a count of zero out.
        run = 0 if seen.uid else vm.state.restart_count
    if (uid, run) != (vm.uid, vm.state.restart_count):
        raise StaleReportError(
            f"the report is about uid {shown(uid)} and restart_count {run},"
            f' VM "{vm.name}" has uid {vm.uid} and restart_count {vm.state.restart_count}'
        )


def _reported_conditions(vm: VM, seen: VMReport) -> tuple[Condition, ...]:
    conditions = vm.state.conditions
    for condition in seen.conditions or ():
        # The scheduler may already have reassigned the resources of a resting VM, so it does not run again.
        if condition.type == "running" and not vm.resting:
            conditions = _with_running(conditions, condition.state)
    return _with_running(conditions, "false") if seen.status == "failed" else conditions


def fail(vm: VM, reason: str) -> VM:
    """Return a failed VM. It stays assigned to its worker, which has to stop it."""
    conditions = _with_running(vm.state.conditions, "false")
    return replace(vm, state=replace(vm.state, status="failed", status_message=reason, conditions=conditions))


def restart(vm: VM, now: datetime.datetime) -> VM:
    """Return a failed VM at the beginning of its next run: pending and unassigned."""
    state = VMState(
        restart_count=vm.state.restart_count + 1,
        restarted_at=now,
        started_at=vm.state.started_at,
        conditions=_UNSCHEDULED,
    )
    return replace(vm, state=state)


def _with_running(conditions: tuple[Condition, ...], state: str) -> tuple[Condition, ...]:
    others = tuple(condition for condition in conditions if condition.type != "running")
    return (*others, Condition("running", "true" if state == "true" else "false"))
