"""What may happen to a VM: created, changed, assigned, reported, failed, restarted. Law: pure, from one VM to the next.

Every change of a VM in the controller is one of these functions, so that the rule who writes which field
(schema.py) stands in one place:

    create -> pending, unassigned
    assign    pending, on a worker                     (scheduler)
    report    running or failed, and what was seen     (worker)
    change    the next generation of the specification (user)
    fail      failed, with the reason                  (scheduler)
    restart   pending and unassigned again, a new life (scheduler)

Times are arguments. A function that changes nothing returns the very object that it was given.
"""

from __future__ import annotations

import datetime

from orchard.codec import attrs_of, replace, shown
from orchard.schema import DEFAULT_CPU, DEFAULT_MEMORY, VM, Condition, Status, VMMeta, VMReport, VMSpec, VMState, Worker


class TransitionError(Exception):
    """The user asked for a change that the VM does not allow; `str(error)` names the field."""


class StaleReportError(Exception):
    """A worker's report is about another VM or an earlier run of the VM."""


# What the worker can apply by stopping (or suspending) the VM and starting it again.
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

_UNSCHEDULED = (Condition("scheduled", "false"), Condition("running", "false"))
_SCHEDULED = (Condition("scheduled", "true"), Condition("running", "false"))


def create(name: str, uid: str, spec: VMSpec, now: datetime.datetime, reason: str = "") -> VM:
    """Begin a VM: pending, on no worker for a reason that may be known, generation 1."""
    meta = VMMeta(name=name, uid=uid, created_at=now, generation=1)
    return VM(meta, spec, VMState(status_message=reason, conditions=_UNSCHEDULED))


def change(vm: VM, spec: VMSpec) -> VM:
    """Give a VM another specification: the next generation, to be applied at its next boot.

    Raises TransitionError that names the field when this one can't be changed, or not any more.
    """
    old = vm.spec
    changed = {
        field.name: field.json for field in attrs_of(VMSpec) if getattr(old, field.name) != getattr(spec, field.name)
    }
    if not changed:
        return vm
    if vm.state.status == "failed":
        raise TransitionError(f'VM "{vm.name}" has failed and cannot be changed; delete it and create it again')
    for name, json_name in changed.items():
        if name not in AT_NEXT_BOOT:
            raise TransitionError(
                f"{json_name} cannot be changed once the VM is created; delete it and create it again"
            )
    if old.suspendable and not spec.suspendable:
        raise TransitionError("suspendable cannot be turned off once it is on")
    if old.suspendable and old.net_softnet != spec.net_softnet:
        raise TransitionError("netSoftnet cannot be turned on or off for a suspendable VM")
    if spec.disk_size < old.disk_size:
        raise TransitionError(f"diskSize is {spec.disk_size}, expected at least {old.disk_size}: a disk can only grow")
    if "power_state" in changed and old.power_state != "running":
        raise TransitionError(
            f"powerState is {shown(spec.power_state)}, expected {shown(old.power_state)}: it leaves running only once",
        )
    state = vm.state
    if state.worker:
        # What is left to the worker's default was fixed when the VM got its worker.
        state = replace(
            state,
            assigned_cpu=spec.cpu or state.assigned_cpu,
            assigned_memory=spec.memory or state.assigned_memory,
        )
    return VM(replace(vm.meta, generation=vm.meta.generation + 1), spec, state)


def assign(vm: VM, worker: Worker, now: datetime.datetime) -> VM:
    """Put a pending VM on a worker, with the size that it will have there."""
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


def wait(vm: VM, reason: str) -> VM:
    """Note why a pending VM has no worker yet."""
    if vm.state.status_message == reason:
        return vm
    return replace(vm, state=replace(vm.state, status_message=reason))


def fail(vm: VM, reason: str) -> VM:
    """End this life of a VM. It stays with its worker, who is to stop it."""
    conditions = _with_running(vm.state.conditions, "false")
    return replace(vm, state=replace(vm.state, status="failed", status_message=reason, conditions=conditions))


def restart(vm: VM, now: datetime.datetime) -> VM:
    """Begin another life of a failed VM, on no worker yet."""
    state = VMState(
        restart_count=vm.state.restart_count + 1,
        restarted_at=now,
        started_at=vm.state.started_at,
        conditions=_UNSCHEDULED,
    )
    return replace(vm, state=state)


def report(vm: VM, seen: VMReport, now: datetime.datetime) -> VM:
    """Take over what a worker saw. Raises StaleReportError when it speaks of another life of the VM."""
    state = vm.state
    uid, life = seen.uid or vm.uid, seen.restart_count
    if life is None:
        life = 0 if seen.uid else state.restart_count  # who names the VM and leaves the count out means zero
    if (uid, life) != (vm.uid, state.restart_count):
        raise StaleReportError(
            f'VM "{vm.name}" has uid {vm.uid} and restart_count {state.restart_count}, not {shown(uid)} and {life}',
        )
    if state.status == "failed":
        return vm  # whatever it was that failed stays the reason
    conditions = state.conditions
    for condition in seen.conditions or ():
        if condition.type == "running" and not vm.resting:  # its resources may be another's by now
            conditions = _with_running(conditions, condition.state)
    if seen.status == "failed":
        conditions = _with_running(conditions, "false")
    status: Status = state.status
    if seen.status is not None and (status, seen.status) != ("running", "pending"):
        status = seen.status
    message = state.status_message
    if seen.status_message is not None or seen.status is not None:
        message = seen.status_message or ""  # Go clients leave an empty message out
    new = replace(
        state,
        status=status,
        status_message=message,
        image_fqn=seen.image_fqn or state.image_fqn,
        observed_generation=max(state.observed_generation, min(seen.observed_generation, vm.meta.generation)),
        conditions=conditions,
        started_at=state.started_at or (now if status == "running" else None),
    )
    return vm if new == state else replace(vm, state=new)


def _with_running(conditions: tuple[Condition, ...], state: str) -> tuple[Condition, ...]:
    others = tuple(condition for condition in conditions if condition.type != "running")
    return (*others, Condition("running", "true" if state == "true" else "false"))
