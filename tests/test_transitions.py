"""Transitions of a VM: which are allowed in each state, and which fields each of them changes."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from harness.every_field import EVERY_FIELD
from harness.go_client import GO_FIELDS
from harness.strategies import (
    BEGAN,
    QUICK,
    any_vm,
    assigned,
    failed,
    pending,
    resources,
    resting,
    running,
    spec,
    vm_json,
    worker,
)
from hypothesis import given

from orchard.codec import attrs_of
from orchard.resources.bodies import VMReport
from orchard.resources.cluster import VM_READY, VM_RESTART
from orchard.resources.validation import vm_from_client
from orchard.schema import (
    VM,
    ClusterSettings,
    Condition,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
)
from orchard.transitions import (
    StaleReportError,
    TransitionError,
    assign,
    change,
    create,
    end_for_drain,
    explain,
    fail,
    has_ended,
    report,
    request_restart,
    restart,
    set_deadlines,
    time_out,
    unassign,
    will_restart,
    withdraw_restart,
)

LATER = BEGAN + datetime.timedelta(minutes=5)
RUNS, RUNS_NOT = Condition("running", "true"), Condition("running", "false")
ON, OFF = Condition("scheduled", "true"), Condition("scheduled", "false")
READY, UNREADY = Condition("ready", "true"), Condition("ready", "false")
ENDED = VMReport(status="failed", status_message="broke", conditions=(RUNS_NOT,))
ABLE = worker(capabilities=(VM_RESTART, VM_READY))


def refusal_of(call: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises((TransitionError, StaleReportError)) as refusal:
        call()
    return type(refusal.value), str(refusal.value)


def changed_fields(old: VM, new: VM) -> set[str]:
    """Return the Python names of the fields in which two VMs differ."""
    return {
        field.name
        for part in ("meta", "spec", "state")
        for field in attrs_of(type(getattr(old, part)))
        if getattr(getattr(old, part), field.name) != getattr(getattr(new, part), field.name)
    }


def set_to(vm: VM, **fields: Any) -> VM:
    """Return the VM with a changed specification."""
    return change(vm, replace(vm.spec, **fields))


# ---- the table of transitions ---------------------------------------------------------------------------------------

STATES: dict[str, VM] = {
    "pending": pending(),
    "assigned": assigned(pending()),
    "running": running(pending()),
    "resting": resting(pending()),
    "failed": failed(pending()),
}
ACTIONS: dict[str, Callable[[VM], VM]] = {
    "change": lambda vm: set_to(vm, headless=True),
    "assign": lambda vm: assign(vm, worker(), LATER),
    "explain": lambda vm: explain(vm, "waiting"),
    "fail": lambda vm: fail(vm, "why"),
    "restart": lambda vm: restart(vm, LATER),
    "request restart": lambda vm: request_restart(vm, ABLE),
    "end for drain": end_for_drain,
    "time out": time_out,
    "report nothing": lambda vm: report(vm, VMReport(), LATER),
    "report pending": lambda vm: report(vm, VMReport(status="pending", status_message="pulling"), LATER),
    "report running": lambda vm: report(vm, VMReport(status="running", conditions=(RUNS,)), LATER),
    "report failed": lambda vm: report(vm, VMReport(status="failed", status_message="broke"), LATER),
    "report end": lambda vm: report(vm, ENDED, LATER),
}
# (state, action) -> status, message, worker, and whether the VM holds resources of its worker. A class: the action
# raises that error. "same": the action returns the same object. The
# scheduler's own actions are listed for the states in which it takes them.
TRANSITIONS: dict[tuple[str, str], tuple[str, str, str, bool] | type[Exception] | str] = {
    ("pending", "change"): ("pending", "", "", False),
    ("pending", "assign"): ("pending", "", "w", True),
    ("pending", "explain"): ("pending", "waiting", "", False),
    ("pending", "fail"): ("failed", "why", "", False),
    ("pending", "report nothing"): StaleReportError,
    ("pending", "report pending"): StaleReportError,
    ("pending", "report running"): StaleReportError,
    ("pending", "report failed"): StaleReportError,
    ("pending", "request restart"): TransitionError,
    ("pending", "time out"): ("failed", "no worker within 0 seconds; waiting: no worker was looked for yet", "", False),
    ("pending", "report end"): StaleReportError,
    ("assigned", "request restart"): TransitionError,
    ("assigned", "end for drain"): ("failed", 'worker "w" was drained', "w", False),
    ("assigned", "report end"): ("failed", "broke", "w", False),
    ("running", "request restart"): ("failed", "restart requested", "w", False),
    ("running", "end for drain"): ("failed", 'worker "w" was drained', "w", False),
    ("running", "report end"): ("failed", "broke", "w", False),
    ("resting", "request restart"): TransitionError,
    ("resting", "report end"): ("failed", "broke", "w", False),
    ("failed", "request restart"): ("failed", "restart requested", "w", False),
    ("failed", "report end"): ("failed", "the VM broke", "w", False),
    ("assigned", "change"): ("pending", "", "w", True),
    ("assigned", "fail"): ("failed", "why", "w", False),
    ("assigned", "report nothing"): "same",
    ("assigned", "report pending"): ("pending", "pulling", "w", True),
    ("assigned", "report running"): ("running", "", "w", True),
    ("assigned", "report failed"): ("failed", "broke", "w", False),
    ("running", "change"): ("running", "", "w", True),
    ("running", "fail"): ("failed", "why", "w", False),
    ("running", "report nothing"): "same",
    ("running", "report pending"): ("running", "pulling", "w", True),
    ("running", "report running"): "same",
    ("running", "report failed"): ("failed", "broke", "w", False),
    ("resting", "change"): ("running", "", "w", False),
    ("resting", "fail"): ("failed", "why", "w", False),
    ("resting", "report nothing"): "same",
    ("resting", "report pending"): ("running", "pulling", "w", False),
    ("resting", "report running"): "same",
    ("resting", "report failed"): ("failed", "broke", "w", False),
    ("failed", "change"): TransitionError,
    ("failed", "fail"): ("failed", "why", "w", False),
    ("failed", "restart"): ("pending", "", "", False),
    ("failed", "report nothing"): "same",
    ("failed", "report pending"): "same",
    ("failed", "report running"): "same",
    ("failed", "report failed"): "same",
}
# The controller's own actions are listed for the states in which it takes them.
SCHEDULER_ONLY = {
    *((state, action) for state in STATES for action in ("assign", "explain", "restart")),
    *((state, "time out") for state in STATES if state != "pending"),
    *((state, "end for drain") for state in ("pending", "resting", "failed")),
}


def test_table_covers_every_state_and_action() -> None:
    everything = {(state, action) for state in STATES for action in ACTIONS}
    assert everything == TRANSITIONS.keys() | SCHEDULER_ONLY


@pytest.mark.parametrize(("state", "action"), TRANSITIONS, ids=[" x ".join(row) for row in TRANSITIONS])
def test_transition_gives_the_state_in_the_table(state: str, action: str) -> None:
    vm, expected = STATES[state], TRANSITIONS[state, action]
    if isinstance(expected, type):
        assert refusal_of(lambda: ACTIONS[action](vm))[0] is expected
        return
    new = ACTIONS[action](vm)
    if expected == "same":
        assert new is vm
        return
    assert (new.state.status, new.state.status_message, new.state.worker, new.holds_resources) == expected
    assert new.condition("scheduled") is bool(new.state.worker)
    # A VM that its worker has to end runs until the worker reports its end.
    assert not (new.condition("running") and new.state.status != "running" and not new.state.end_request)


# ---- one writer per field -------------------------------------------------------------------------------------------

EVERYTHING = VMReport(
    uid="uid-vm",
    restart_count=0,
    status="running",
    status_message="booting",
    image_fqn="base@sha256:1",
    observed_generation=1,
    conditions=(RUNS, READY),
    startup_exit_code=0,
    startup_ended_at=BEGAN,
)
USED = replace(
    failed(pending()),
    meta=replace(pending().meta, generation=1),
    state=replace(
        request_restart(failed(pending()), ABLE).state,
        image_fqn="base@sha256:1",
        observed_generation=1,
        restart_count=2,
        started_at=BEGAN,
        startup_exit_code=0,
        startup_ended_at=BEGAN,
        ended_at=BEGAN,
    ),
)
# The fields of a specification, and for each another value than in the VMs of these tests.
JSON_NAMES = {field.name: field.json for field in attrs_of(VMSpec)}
_, SPEC = vm_from_client({**EVERY_FIELD, "name": "vm"}, [])
OTHER: dict[str, Any] = {name: getattr(SPEC, name) for name in JSON_NAMES}
AT_NEXT_BOOT = {field.name for field in attrs_of(VMSpec) if field.change == "boot"}
LIVE = {field.name for field in attrs_of(VMSpec) if field.change == "at once"}
SHARED = {"status", "status_message", "conditions"}
# The condition running stays until the worker reports the end.
ENDING = {"status", "status_message"}
# action -> the VM, the action, its writer, the writer's fields that it changes, and the fields of other writers
WRITES: dict[str, tuple[VM, Callable[[VM], VM], str, set[str], set[str]]] = {
    "change": (
        assigned(pending()),
        lambda vm: set_to(vm, **{name: OTHER[name] for name in AT_NEXT_BOOT}),
        "user",
        AT_NEXT_BOOT,
        # The assigned size follows the specification.
        {"generation", "assigned_cpu", "assigned_memory"},
    ),
    "assign": (
        explain(pending(), "waiting"),
        lambda vm: assign(vm, worker(), LATER),
        "scheduler",
        {"worker", "assigned_cpu", "assigned_memory", "scheduled_at", "status_message", "conditions"},
        set(),
    ),
    "explain": (pending(), lambda vm: explain(vm, "waiting"), "scheduler", {"status_message"}, set()),
    "fail": (running(pending()), lambda vm: fail(vm, "why"), "scheduler", SHARED, set()),
    "restart": (
        USED,
        lambda vm: restart(vm, LATER),
        "scheduler",
        {"worker", "assigned_cpu", "assigned_memory", "scheduled_at", "restarted_at", "restart_count", *SHARED},
        # Observations of the last run, and the request that is fulfilled.
        {"image_fqn", "observed_generation", "startup_exit_code", "startup_ended_at", "ended_at", "end_request"},
    ),
    "unassign": (
        assigned(pending(pending_timeout_seconds=5)),
        lambda vm: unassign(vm, "waiting: w went away", LATER),
        "scheduler",
        {"worker", "assigned_cpu", "assigned_memory", "scheduled_at", "waiting_since", "status_message", "conditions"},
        set(),
    ),
    "request_restart": (
        running(pending()),
        lambda vm: request_restart(vm, ABLE),
        "controller",
        {"end_request", *ENDING},
        set(),
    ),
    "withdraw_restart": (
        request_restart(running(pending()), ABLE),
        withdraw_restart,
        "scheduler",
        {"status_message"},
        # The request that is not fulfilled.
        {"end_request"},
    ),
    "end_for_drain": (assigned(pending()), end_for_drain, "controller", {"end_request", *SHARED}, set()),
    "time_out": (pending(), time_out, "scheduler", {"status", "status_message"}, set()),
    "report_end": (
        end_for_drain(running(pending())),
        lambda vm: report(vm, ENDED, LATER),
        "worker",
        {"ended_at", "conditions"},
        set(),
    ),
    "report": (
        replace(assigned(pending()), meta=replace(pending().meta, generation=1)),
        lambda vm: report(vm, EVERYTHING, LATER),
        "worker",
        {"image_fqn", "observed_generation", "startup_exit_code", "startup_ended_at", *SHARED},
        # By the controller's clock.
        {"started_at"},
    ),
}


@pytest.mark.parametrize(("vm", "action", "writer", "own", "others"), WRITES.values(), ids=WRITES)
def test_transition_writes_only_the_fields_of_its_writer(
    vm: VM, action: Callable[[VM], VM], writer: str, own: set[str], others: set[str]
) -> None:
    declared = {field.name: field.writer for part in (VMMeta, VMSpec, VMState) for field in attrs_of(part)}
    assert changed_fields(vm, action(vm)) == own | others
    assert {name for name in own - SHARED if declared[name] != writer} == set()
    assert {name for name in others if declared[name] == writer} == set()


def test_transitions_leave_metadata_unchanged() -> None:
    for (state, action), expected in TRANSITIONS.items():
        if not isinstance(expected, type):
            assert replace(ACTIONS[action](STATES[state]).meta, generation=0) == STATES[state].meta


def test_each_field_that_a_worker_sets_is_in_its_reports() -> None:
    reported = {field.json for field in attrs_of(VMReport)} - {"uid", "restart_count"}
    # The controller sets endedAt when a report says that the VM has ended.
    assert {field.json for field in attrs_of(VMState) if field.writer == "worker"} == reported | {"endedAt"}


@pytest.mark.slow
@QUICK
@given(any_vm().filter(lambda vm: vm.state.worker != ""), resources(VMReport))
def test_any_report_changes_only_the_workers_fields(vm: VM, seen: VMReport) -> None:
    mine = replace(seen, uid=vm.uid, restart_count=vm.state.restart_count)
    new = report(vm, mine, LATER)
    observed = {"image_fqn", "observed_generation", "startup_exit_code", "startup_ended_at", "ended_at"}
    assert changed_fields(vm, new) <= {"started_at", *observed, *SHARED}
    assert report(new, mine, LATER + datetime.timedelta(1)) is new
    assert new.state.observed_generation <= max(vm.meta.generation, vm.state.observed_generation)
    assert new.condition("scheduled") is vm.condition("scheduled")
    if vm.state.status == "failed":
        assert changed_fields(vm, new) <= {"ended_at", "conditions"}
    if not vm.holds_resources:
        assert not new.holds_resources, "the scheduler may have reassigned its resources"


# ---- create and assign ----------------------------------------------------------------------------------------------


def test_new_vm_is_pending_and_unassigned() -> None:
    vm = create("a", "u", spec(), BEGAN)
    assert vm.meta == VMMeta(name="a", uid="u", created_at=BEGAN)
    assert vm.state == VMState(conditions=(OFF, RUNS_NOT))
    assert vm.key == ("a", "u", 0)
    assert vm.tart_name == "orchard-a-u-0"


@pytest.mark.parametrize(
    ("wanted", "default", "given"),
    [((0, 0), (0, 0), (4, 8192)), ((0, 0), (6, 1024), (6, 1024)), ((2, 512), (6, 1024), (2, 512))],
)
def test_assignment_fixes_cpu_and_memory(
    wanted: tuple[int, int], default: tuple[int, int], given: tuple[int, int]
) -> None:
    on = worker(default_cpu=default[0], default_memory=default[1])
    vm = assign(pending(cpu=wanted[0], memory=wanted[1]), on, LATER)
    assert (vm.state.assigned_cpu, vm.state.assigned_memory) == given
    assert (vm.spec.cpu, vm.spec.memory) == wanted
    assert vm.state.scheduled_at == LATER
    assert vm.state.conditions == (ON, RUNS_NOT)


def test_assignment_clears_the_waiting_reason() -> None:
    vm = explain(pending(), "waiting: no worker has registered yet")
    assert explain(vm, "waiting: no worker has registered yet") is vm
    assert assign(vm, worker(), LATER).state.status_message == ""


# ---- change ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", JSON_NAMES)
@pytest.mark.parametrize("state", ["pending", "assigned", "running"])
def test_field_changes_at_once_or_at_the_next_boot_or_is_refused(state: str, field: str) -> None:
    vm = STATES[state]
    if field in AT_NEXT_BOOT:
        new = set_to(vm, **{field: OTHER[field]})
        assert new.meta.generation == 1
        assert changed_fields(vm, new) - {"assigned_cpu", "assigned_memory"} == {field, "generation"}
        return
    if field in LIVE:
        assert changed_fields(vm, set_to(vm, **{field: OTHER[field]})) == {field}
        return
    kind, message = refusal_of(lambda: set_to(vm, **{field: OTHER[field]}))
    assert kind is TransitionError
    assert message.startswith(f"{JSON_NAMES[field]} cannot be changed")
    assert OTHER["password"] not in message


def test_changeable_fields_are_those_of_the_contract() -> None:
    assert {JSON_NAMES[name] for name in AT_NEXT_BOOT} & GO_FIELDS == {
        "netSoftnet",
        "netSoftnetAllow",
        "netSoftnetBlock",
        "net-bridged",
        "headless",
        "nested",
        "suspendable",
        "hostDirs",
        "cpu",
        "memory",
        "diskSize",
        "powerState",
    }


def test_new_fields_are_no_booleans_and_no_lists() -> None:
    """Go clients send whole objects back without the fields that they do not know. An absent boolean means false and an
    absent list means empty in a PUT, so a new one would be reset by each of them.
    """
    reset = {field.json for field in attrs_of(VMSpec) if field.type is bool or field.is_list()}
    assert reset == {
        *("netSoftnet", "netSoftnetAllow", "netSoftnetBlock", "suspendable", "headless", "nested", "hostDirs"),
        # validation.replaced_spec never takes these from a PUT.
        *("randomSerial", "audio", "clipboard"),
    }


@pytest.mark.parametrize("field", sorted(LIVE))
def test_live_fields_of_a_failed_vm_can_be_changed(field: str) -> None:
    vm = failed(pending())
    assert changed_fields(vm, set_to(vm, **{field: OTHER[field]})) == {field}


@pytest.mark.parametrize("state", STATES)
def test_equal_specification_keeps_the_generation(state: str) -> None:
    assert change(STATES[state], replace(STATES[state].spec)) is STATES[state]


def test_one_unchangeable_field_refuses_the_whole_change() -> None:
    assert refusal_of(lambda: set_to(running(pending()), headless=True, image="other"))[1].startswith("image cannot")


def test_each_change_increments_the_generation() -> None:
    vm = set_to(set_to(running(pending()), headless=True), headless=False, nested=True)
    assert vm.meta.generation == 2
    assert vm.state.observed_generation == 0


def test_a_failed_vm_cannot_be_changed() -> None:
    kind, message = refusal_of(lambda: set_to(failed(pending()), headless=True))
    assert kind is TransitionError
    assert message == 'VM "vm" has failed and cannot be changed; delete it and create it again'


def test_changed_cpu_and_memory_are_assigned() -> None:
    vm = set_to(running(pending()), cpu=8, memory=1024)
    assert (vm.state.assigned_cpu, vm.state.assigned_memory) == (8, 1024)
    vm = set_to(vm, cpu=0, memory=0)
    assert (vm.state.assigned_cpu, vm.state.assigned_memory) == (8, 1024)
    assert set_to(pending(), cpu=8).state.assigned_cpu == 0, "it is unassigned"


def test_suspendable_cannot_be_turned_off_and_fixes_softnet() -> None:
    vm = set_to(running(pending()), suspendable=True, net_softnet=True)
    for field, changed in (("suspendable", {"suspendable": False}), ("netSoftnet", {"net_softnet": False})):
        kind, message = refusal_of(lambda changed=changed: set_to(vm, **changed))  # type: ignore[misc]
        assert kind is TransitionError
        assert message.startswith(field)
    assert set_to(vm, net_softnet_allow=("10.0.0.0/8",)).meta.generation == 2


@pytest.mark.parametrize(("old", "new", "fits"), [(0, 50, True), (50, 51, True), (50, 49, False), (50, 0, False)])
def test_disk_size_can_only_grow(old: int, new: int, fits: bool) -> None:
    vm = running(pending(disk_size=old))
    if fits:
        assert set_to(vm, disk_size=new).spec.disk_size == new
    else:
        kind, message = refusal_of(lambda: set_to(vm, disk_size=new))
        assert kind is TransitionError
        assert message.startswith(f"diskSize is {new}, expected at least 50")


@pytest.mark.parametrize("new", ["running", "stopped", "suspended"])
@pytest.mark.parametrize("old", ["running", "stopped", "suspended"])
def test_power_state_leaves_running_only_once(old: Any, new: Any) -> None:
    vm = running(pending(suspendable=True, power_state=old))
    if new == old:
        assert set_to(vm, power_state=new) is vm
    elif old == "running":
        assert set_to(vm, power_state=new).spec.power_state == new
    else:
        kind, message = refusal_of(lambda: set_to(vm, power_state=new))
        assert kind is TransitionError
        assert message.startswith(f'powerState is "{new}", expected "{old}"')


def test_stopped_vm_frees_resources_after_the_report_for_good() -> None:
    vm = set_to(running(pending()), power_state="stopped")
    assert not vm.resting
    assert vm.holds_resources
    vm = report(vm, VMReport(conditions=(RUNS_NOT,), observed_generation=1), LATER)
    assert vm.resting
    assert not vm.holds_resources
    # A late report, or one of a worker that has not read the change yet: the resources may already be reassigned.
    assert report(vm, VMReport(status="running", conditions=(RUNS,)), LATER) is vm
    vm = set_to(vm, headless=True)
    assert vm.meta.generation == 2
    assert vm.resting


def test_vm_created_stopped_holds_resources_until_it_was_cloned() -> None:
    vm = assigned(pending(power_state="stopped"))
    assert vm.holds_resources
    vm = report(vm, VMReport(status="pending", conditions=(RUNS_NOT,)), LATER)
    assert vm.holds_resources
    assert report(vm, VMReport(status="running", conditions=(RUNS_NOT,)), LATER).resting


# ---- fail and restart -----------------------------------------------------------------------------------------------


def test_failed_vm_stays_assigned() -> None:
    vm = fail(running(pending()), "why")
    assert (vm.state.worker, vm.state.conditions) == ("w", (ON, RUNS_NOT))
    assert vm.state.started_at == BEGAN


def test_restart_resets_the_state_and_increments_restart_count() -> None:
    vm = report(running(pending()), replace(EVERYTHING, status="failed", status_message="exit 1"), LATER)
    again = restart(vm, LATER)
    assert again.state == VMState(
        restart_count=1, restarted_at=LATER, started_at=BEGAN, conditions=(OFF, RUNS_NOT, UNREADY), status="pending"
    )
    assert (again.meta, again.spec) == (vm.meta, vm.spec)
    assert again.tart_name == "orchard-vm-uid-vm-1"
    assert restart(fail(assigned(again), "why"), LATER).state.restart_count == 2


# ---- report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "count", "fresh"),
    [
        ("uid-vm", 2, True),
        ("", 2, True),
        ("", None, True),
        ("uid-vm", 1, False),
        ("uid-vm", 3, False),
        # A Go client leaves a count of zero out.
        ("uid-vm", None, False),
        ("", 1, False),
        ("another", 2, False),
        ("another", None, False),
    ],
)
def test_report_about_another_run_is_stale(uid: str, count: int | None, fresh: bool) -> None:
    vm = running(pending())
    vm = replace(vm, state=replace(vm.state, restart_count=2))
    seen = VMReport(uid=uid, restart_count=count, status="failed", status_message="broke")
    if fresh:
        assert report(vm, seen, LATER).state.status == "failed"
        return
    kind, message = refusal_of(lambda: report(vm, seen, LATER))
    assert kind is StaleReportError
    assert 'VM "vm" has uid uid-vm and restart_count 2' in message


def test_report_with_uid_and_without_restart_count_means_zero() -> None:
    assert report(assigned(pending()), VMReport(uid="uid-vm", status="running"), LATER).state.status == "running"


def test_started_at_is_the_time_of_the_first_running_report() -> None:
    vm = report(assigned(pending()), VMReport(status="pending"), BEGAN)
    assert vm.state.started_at is None
    vm = report(vm, VMReport(status="running"), LATER)
    assert vm.state.started_at == LATER
    again = report(vm, VMReport(status="running", image_fqn="x"), LATER + datetime.timedelta(1))
    assert again.state.started_at == LATER
    second = running(restart(fail(again, "why"), LATER))
    assert second.state.started_at == LATER


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (VMReport(), "before"),
        (VMReport(image_fqn="x"), "before"),
        (VMReport(status_message=""), ""),
        (VMReport(status_message="now"), "now"),
        # A Go client leaves an empty message out.
        (VMReport(status="running"), ""),
        (VMReport(status="running", status_message="now"), "now"),
    ],
)
def test_status_message_is_kept_until_the_next_status_or_message(seen: VMReport, message: str) -> None:
    vm = running(pending())
    vm = replace(vm, state=replace(vm.state, status_message="before"))
    assert report(vm, seen, LATER).state.status_message == message


def test_report_sets_the_running_condition_only() -> None:
    vm = report(assigned(pending()), VMReport(conditions=(OFF, RUNS)), LATER)
    assert vm.state.conditions == (ON, RUNS)
    assert report(vm, VMReport(conditions=()), LATER) is vm
    assert report(vm, VMReport(status="failed"), LATER).state.conditions == (ON, RUNS_NOT)
    assert report(vm, VMReport(status="failed", conditions=(RUNS,)), LATER).state.conditions == (ON, RUNS_NOT)


def test_observed_generation_increases_up_to_the_generation() -> None:
    vm = set_to(set_to(running(pending()), headless=True), nested=True)
    for seen, observed in ((1, 1), (0, 1), (2, 2), (9, 2), (1, 2)):
        vm = report(vm, VMReport(observed_generation=seen), LATER)
        assert vm.state.observed_generation == observed


# ---- ready and the exit code ----------------------------------------------------------------------------------------


def ready() -> VM:
    seen = VMReport(status="running", conditions=(RUNS, READY), startup_exit_code=0, startup_ended_at=BEGAN)
    return report(assign(pending(), ABLE, BEGAN), seen, BEGAN)


@pytest.mark.parametrize(
    "action",
    [
        lambda vm: fail(vm, "why"),
        lambda vm: request_restart(vm, ABLE),
        end_for_drain,
        lambda vm: report(vm, ENDED, LATER),
        lambda vm: report(vm, VMReport(conditions=(RUNS_NOT,)), LATER),
        # A report that contradicts itself.
        lambda vm: report(vm, VMReport(conditions=(RUNS_NOT, READY)), LATER),
        lambda vm: restart(fail(vm, "why"), LATER),
        lambda vm: unassign(restart(fail(vm, "why"), LATER), "waiting", LATER),
        lambda vm: assign(restart(fail(vm, "why"), LATER), ABLE, LATER),
    ],
)
def test_vm_is_not_ready_after_a_stop_a_failure_or_a_restart(action: Callable[[VM], VM]) -> None:
    assert ready().condition("ready")
    assert UNREADY in action(ready()).state.conditions


def test_ready_is_absent_until_a_worker_has_reported_it_and_where_none_does() -> None:
    assert {one.type for one in running(pending()).state.conditions} == {"scheduled", "running"}
    moved = assign(restart(fail(ready(), "why"), LATER), worker(), LATER)
    assert {one.type for one in moved.state.conditions} == {"scheduled", "running"}


def test_exit_code_is_kept_until_the_next_run() -> None:
    vm = report(ready(), VMReport(conditions=(RUNS,)), LATER)
    assert (vm.state.startup_exit_code, vm.state.startup_ended_at) == (0, BEGAN)
    assert vm_json(vm)["startupExitCode"] == 0
    assert "startupExitCode" not in vm_json(restart(fail(vm, "why"), LATER))


# ---- restart and drain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [worker(), None])
def test_restart_is_refused_by_a_worker_that_does_not_report_the_end(on: Worker | None) -> None:
    assert '"w"' in refusal_of(lambda: request_restart(running(pending()), on))[1]
    alone = time_out(pending())
    assert will_restart(request_restart(alone, None))


def test_restart_is_refused_by_a_worker_that_was_registered_after_the_assignment() -> None:
    """It does not report the end of the VM, which the host of an earlier worker may run, so the VM would wait for ever."""
    vm = fail(assign(pending(), ABLE, LATER), 'worker "w" was deleted')
    assert will_restart(request_restart(vm, replace(ABLE, created_at=LATER)))
    newer = replace(ABLE, created_at=LATER + datetime.timedelta(seconds=1))
    assert '"w"' in refusal_of(lambda: request_restart(vm, newer))[1]
    ended = replace(vm, state=replace(vm.state, ended_at=LATER))
    assert will_restart(request_restart(ended, newer))


def test_requested_restart_is_remembered_once() -> None:
    vm = request_restart(running(pending()), ABLE)
    assert request_restart(vm, ABLE) is vm


@pytest.mark.parametrize("policy", ["Never", "OnFailure"])
def test_what_is_restarted_after_a_failure(policy: str) -> None:
    vm = running(pending(restart_policy=policy))
    assert will_restart(request_restart(vm, ABLE))
    assert will_restart(end_for_drain(vm)) is (policy == "OnFailure")
    assert will_restart(fail(vm, "why")) is (policy == "OnFailure")
    assert not will_restart(vm)
    assert not will_restart(time_out(pending(restart_policy=policy))), "there is no worker for it"
    assert not will_restart(fail(set_to(vm, power_state="stopped"), "why"))


@pytest.mark.parametrize("state", ["assigned", "running"])
def test_vm_has_ended_once_its_worker_has_reported_that(state: str) -> None:
    ending = end_for_drain(STATES[state])
    assert not has_ended(ending, ABLE)
    # Sent before the worker knew.
    for stale in (VMReport(status="pending", conditions=(RUNS_NOT,)), VMReport(status="running", conditions=(RUNS,))):
        assert report(ending, stale, LATER) is ending
    ended = report(ending, ENDED, LATER)
    assert has_ended(ended, ABLE)
    assert (ended.state.ended_at, RUNS_NOT in ended.state.conditions) == (LATER, True)
    assert ended.state.status_message == ending.state.status_message
    assert not has_ended(ended, worker()), "such a worker may report the end too early"


# ---- deadlines ------------------------------------------------------------------------------------------------------


def limited(default: int = 0, most: int = 0) -> ClusterSettings:
    return ClusterSettings(default_ttl_seconds=default, max_ttl_seconds=most)


def seconds_left(vm: VM) -> float | None:
    return None if vm.meta.expires_at is None else (vm.meta.expires_at - LATER).total_seconds()


@pytest.mark.parametrize(
    ("asked", "default", "most", "given"),
    [(0, 0, 0, 0), (0, 60, 0, 60), (0, 0, 90, 90), (0, 60, 90, 60), (5, 60, 90, 5), (90, 60, 90, 90), (99, 60, 0, 99)],
)
def test_new_vm_takes_its_time_to_live_or_the_default_or_the_maximum(
    asked: int, default: int, most: int, given: int
) -> None:
    vm = set_deadlines(None, pending(ttl_seconds=asked), limited(default, most), LATER)
    assert (vm.spec.ttl_seconds, seconds_left(vm)) == (given, given or None)


def test_time_to_live_above_the_maximum_is_refused_with_both() -> None:
    kind, message = refusal_of(lambda: set_deadlines(None, pending(ttl_seconds=91), limited(0, 90), LATER))
    assert kind is TransitionError
    assert "ttlSeconds is 91" in message
    assert "90" in message.partition("91")[2]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("renews", [False, True])
@pytest.mark.parametrize("ttl", [60, 30, 0])
def test_time_to_live_counts_from_a_change_and_from_a_renewal(state: str, ttl: int, renews: bool) -> None:
    old = set_deadlines(
        None, replace(STATES[state], spec=replace(STATES[state].spec, ttl_seconds=60)), limited(), BEGAN
    )
    new = set_deadlines(old, set_to(old, ttl_seconds=ttl), limited(), LATER, renews_ttl=renews)
    expected = 60 - 300 if ttl == 60 and not renews else ttl or None
    assert seconds_left(new) == expected
    assert new.meta.generation == old.meta.generation


@pytest.mark.parametrize(("ttl", "renews"), [(60, True), (0, False), (31, False)])
def test_new_maximum_binds_renewals_and_no_other_change(ttl: int, renews: bool) -> None:
    old = set_deadlines(None, pending(ttl_seconds=60), limited(), BEGAN)
    assert set_deadlines(old, set_to(old, priority=3), limited(0, 30), LATER).meta.expires_at == old.meta.expires_at
    changed = set_to(old, ttl_seconds=ttl)
    assert refusal_of(lambda: set_deadlines(old, changed, limited(0, 30), LATER, renews_ttl=renews))


def test_pending_time_counts_anew_whenever_the_vm_has_no_worker() -> None:
    vm = set_deadlines(None, pending(pending_timeout_seconds=5), limited(), BEGAN)
    assert vm.state.waiting_since == BEGAN
    placed = assign(vm, worker(), BEGAN)
    assert placed.state.waiting_since is None
    assert unassign(placed, "waiting", LATER).state.waiting_since == LATER
    assert restart(fail(placed, "why"), LATER).state.waiting_since == LATER
    assert time_out(vm).state.waiting_since is None


def test_pending_time_that_is_set_later_counts_from_then_and_can_be_removed() -> None:
    vm = pending()
    late = set_deadlines(vm, set_to(vm, pending_timeout_seconds=5), limited(), LATER)
    assert late.state.waiting_since == LATER
    longer = set_deadlines(late, set_to(late, pending_timeout_seconds=9), limited(), LATER + datetime.timedelta(1))
    assert longer.state.waiting_since == LATER
    assert (
        set_deadlines(longer, set_to(longer, pending_timeout_seconds=0), limited(), LATER).state.waiting_since is None
    )
    placed = assigned(vm)
    assert (
        set_deadlines(placed, set_to(placed, pending_timeout_seconds=5), limited(), LATER).state.waiting_since is None
    )
