"""The states of a VM for which clients wait: whether one is reached, and whether it still can be. Pure.

running   the VM runs
ready     it runs, and its startup script has succeeded
failed    it has failed, even if it will be restarted
stopped   the user has stopped or suspended it, and it does not run any more
deleted   it does not exist any more
"""

from __future__ import annotations

from typing import Literal

from orchard.resources.cluster import VM_READY
from orchard.schema import VM, Worker
from orchard.transitions import will_restart

Goal = Literal["running", "ready", "failed", "stopped", "deleted"]


def is_reached(vm: VM, goal: Goal) -> bool:
    """Return whether a VM that exists is what a client waits for."""
    state = vm.state
    if goal == "running":
        # Some workers report the status alone. While a VM is rebooted for its next generation, it does not run.
        runs = vm.condition("running") or state.observed_generation == vm.meta.generation
        return state.status == "running" and not vm.resting and runs
    if goal == "ready":
        return state.status == "running" and vm.condition("ready")
    if goal == "failed":
        return state.status == "failed"
    return goal == "stopped" and vm.resting


def why_never(vm: VM, goal: Goal, worker: Worker | None) -> str:
    """Return why a VM will not become what a client waits for; "" if it still can. `worker` is the VM's, if it is known."""
    state = vm.state
    if goal in ("failed", "deleted"):
        return ""
    if state.status == "failed" and not will_restart(vm):
        return describe_status(vm, goal)
    if goal == "stopped":
        return ""
    if vm.spec.power_state != "running" and not vm.condition("running"):
        return f'VM "{vm.name}" is {vm.spec.power_state}'
    if goal == "ready":
        if worker is not None and VM_READY not in worker.capabilities:
            return f'worker "{worker.name}" does not report whether VMs are ready (capability {VM_READY})'
        # The script has no exit code if it could not begin, or if the worker was restarted meanwhile. A VM that is not
        # kept fails next.
        has_failed = state.startup_ended_at is not None and state.startup_exit_code != 0
        if state.status == "running" and has_failed and vm.spec.startup_on_failure == "keep":
            return describe_status(vm, goal)
    return ""


def describe_status(vm: VM, goal: Goal) -> str:
    """Return a sentence with a VM's status, which is not the one that a client waits for."""
    state = vm.state
    status = {"failed": "has failed", "running": f"is running and not {goal}"}.get(state.status, f"is {state.status}")
    return f'VM "{vm.name}" {status}' + (f": {state.status_message}" if state.status_message else "")
