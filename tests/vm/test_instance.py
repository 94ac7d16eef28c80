"""The task of one VM on a host: its phases, its reports, how it follows the specification, and how it ends.

Most tests run it with the synthetic driver; the last one with the stand-in for tart.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import trio
from harness.instances import (
    Host,
    adopted,
    assigned_vm,
    changed,
    left_by_a_worker,
    tended,
    uid_of,
    until,
)
from harness.processes import at_last, at_rest, eventually, processes_in
from harness.sweeps import AtStep, growing_steps

from orchard.codec import json_names
from orchard.resources.bodies import VMReport
from orchard.schema import VM, VMSpec
from orchard.tart import TartDriver
from orchard.vm.driver import DriverError, Hardware, LocalVM, NotRunning, Script
from orchard.vm.instance import (
    CUT_OFF,
    QUEUED_LINES,
    REMOVE_SECONDS,
    SHUT_DOWN,
    STOPPED,
    UNNOTED,
)
from orchard.vm.instance_state import InstanceState, Note, Phase, Startup, Step


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "vms")


# ---- the table of phases ---------------------------------------------------------------------------------------------

# What can happen, written down once more: phase, step, next phase.
EXPECTED = {
    ("waiting", "create", "creating"),
    ("creating", "created", "stopped"),
    ("adopting", "up", "running"),
    ("adopting", "down", "stopped"),
    ("stopped", "start", "starting"),
    ("stopped", "rest", "resting"),
    ("starting", "up", "running"),
    ("starting", "down", "stopped"),
    ("running", "finish", "finishing"),
    ("running", "change", "stopping"),
    ("finishing", "change", "stopping"),
    ("finishing", "down", "stopped"),
    ("running", "down", "stopped"),
    ("stopping", "down", "stopped"),
    ("resting", "start", "starting"),
    ("resting", "rest", "resting"),
    *((phase, "over", "ended") for phase in get_args(Phase) if phase != "removed"),
    *((phase, "deleted", "removed") for phase in get_args(Phase) if phase != "removed"),
}


@pytest.mark.parametrize("step", get_args(Step))
@pytest.mark.parametrize("phase", get_args(Phase))
def test_each_step_in_each_phase_has_one_outcome(phase: Phase, step: Step) -> None:
    state = InstanceState(phase, observed=3, progress="starting", image_fqn="image@sha256:0", reason="told to")
    expected = {after for before, happened, after in EXPECTED if (before, happened) == (phase, step)}
    if not expected:
        with pytest.raises(ValueError, match=phase):
            state.after(step)
        return
    after = state.after(step)
    assert {after.phase} == expected
    assert replace(after, phase=phase) == state
    # A guest is only believed gone when the driver or the end of the VM has said so.
    assert after.has_guest or not state.has_guest or step in ("down", "over", "deleted")


@pytest.mark.parametrize("phase", get_args(Phase))
def test_status_and_condition_follow_from_the_phase(phase: Phase) -> None:
    new, seen = InstanceState(phase), InstanceState(phase, observed=1)
    failing = replace(seen, reason="no luck")
    assert (new.status, seen.status) == ("pending", "running")
    ended = phase in ("ended", "removed")
    assert (failing.status, failing.message) == (("failed", "no luck") if ended else ("running", ""))
    assert seen.running == (phase in ("adopting", "running", "finishing", "stopping"))
    assert seen.has_guest == (seen.running or phase == "starting")


def test_report_has_each_field_that_the_controller_takes() -> None:
    # With a value for each field that is reported only once it is known. `uid` and `restart_count` are those of the VM.
    report = InstanceState("running", observed=1, startup=Startup(0, 12.5)).report()
    assert report.keys() == json_names(VMReport) - {"uid", "restart_count"}


# ---- reports and changes ---------------------------------------------------------------------------------------------


async def test_vm_reports_each_phase_and_leaves_nothing_when_removed(host: Host) -> None:
    async with tended(host, assigned_vm(cpu=2)) as instance:
        await until(instance, lambda i: i.state.running)
        assert host.vm_json(instance) == {"source": "image", "state": "stopped", "cpu": 2, "memory": 1024}
        assert await host.driver.ip(instance.name) == "127.0.0.1"
    assert host.history() == [
        ("pending", "cloning image", False, 0),
        ("pending", "starting", False, 0),
        ("running", "", True, 0),
    ]
    assert instance.report()["uid"] == uid_of("vm")
    assert instance.state.image_fqn.startswith("image@sha256:")
    assert host.files() == []


async def test_pull_progress_is_reported(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    host = Host(tmp_path, pull_seconds=10.0, boot_seconds=5.0)
    async with tended(host, assigned_vm(imagePullPolicy="Always")) as instance:
        await until(instance, lambda i: i.state.running)
    messages = [message for _, message, _, _ in host.history()]
    progress = [f"pulling image: {percent} %" for percent in range(10, 101, 10)]
    assert messages == ["pulling image", *progress, "cloning image", "starting", ""]


async def test_missing_image_fails_the_vm_with_the_drivers_message(host: Host) -> None:
    async with tended(host, assigned_vm(image="orchard-none")) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        assert instance.state.message == 'the specified VM "orchard-none" does not exist'
        assert instance.has_ended
    assert host.files() == []


async def test_failed_script_fails_the_vm_after_its_output_is_delivered(host: Host) -> None:
    script = {"script_content": "seq 1000; echo last words; exit 7", "env": {}}
    async with tended(host, assigned_vm(startup_script=script)) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        assert instance.state.message == "startup script failed with exit code 7: last words"
        assert host.lines == [*map(str, range(1, 1001)), "last words"]
        await until(instance, lambda i: i.has_ended)
        assert (await host.driver.list_vms())[0].state == "stopped"
        instance.follow(changed(instance.vm, headless=True))
        assert host.history()[-1] == ("failed", instance.state.message, False, 0)
        # Only one that is kept has the failure in its message while it runs.
        assert {message for status, message, _, _ in host.history() if status == "running"} == {""}


@pytest.mark.slow
async def test_script_waits_while_its_output_can_not_be_delivered(host: Host) -> None:
    host.hold_delivery = trio.Event()
    # More lines than the queue holds, and more bytes than the pipe.
    script = {"script_content": "for i in $(seq 600); do printf %05000d\\\\n $i; echo $i > reached; done"}
    async with tended(host, assigned_vm(startup_script=script)) as instance:
        reached = host.home / instance.name / "root" / "reached"
        await until(instance, lambda _: reached.exists() and int(reached.read_text() or 0) > QUEUED_LINES)
        await at_rest(reached.read_text)
        assert int(reached.read_text() or 0) < 600
        assert host.lines == []
        host.hold_delivery.set()
        await until(instance, lambda _: len(host.lines) == 600)
    assert host.lines == [f"{number:05000}" for number in range(1, 601)]


async def test_guest_that_shuts_down_by_itself_fails_the_vm(host: Host) -> None:
    async with tended(host, assigned_vm()) as instance:
        await until(instance, lambda i: i.state.running)
        await host.driver.stop(instance.name)
        await until(instance, lambda i: i.state.status == "failed")
        assert (instance.state.message, instance.state.running) == (SHUT_DOWN, False)


async def test_guest_that_ends_at_once_fails_the_vm(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(name: str, spec: VMSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()

    monkeypatch.setattr(host.driver, "run", run)
    async with tended(host, assigned_vm()) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        assert instance.state.message == SHUT_DOWN


async def test_next_generation_is_booted_with_the_new_hardware(host: Host) -> None:
    vm = assigned_vm(startup_script={"script_content": "echo once"})
    async with tended(host, vm) as instance:
        await until(instance, lambda _: host.lines == ["once"])
        await until(instance, lambda i: i._note.script == "done")
        instance.follow(changed(vm, cpu=8, headless=True))
        await until(instance, lambda i: i.state.observed == 1)
        assert host.vm_json(instance)["cpu"] == 8
        assert (instance.state.running, instance.state.status) == (True, "running")
    assert host.history()[-3:] == [("running", "", True, 0), ("running", "", False, 0), ("running", "", True, 1)]
    assert host.lines == ["once"]


@pytest.mark.parametrize(
    ("spec", "patch", "state"),
    [
        ({}, {"powerState": "stopped"}, "stopped"),
        ({"suspendable": True}, {"powerState": "stopped"}, "stopped"),
        ({"suspendable": True}, {"powerState": "suspended"}, "suspended"),
        ({"suspendable": True}, {"powerState": "suspended", "cpu": 9}, "stopped"),
    ],
)
async def test_stopped_or_suspended_vm_stays_on_the_disk(
    host: Host, spec: dict[str, object], patch: dict[str, object], state: str
) -> None:
    vm = assigned_vm("vm", **spec)
    async with tended(host, vm) as instance:
        await until(instance, lambda i: i.state.running)
        instance.follow(changed(vm, **patch))
        await until(instance, lambda i: i.state.observed == 1)
        assert (instance.state.status, instance.state.running) == ("running", False)
        assert host.vm_json(instance)["state"] == state
        assert not instance.has_ended
    assert host.files() == []


async def test_clone_of_a_suspended_vm_keeps_its_hardware(host: Host) -> None:
    vm = assigned_vm(suspendable=True, cpu=5)
    async with tended(host, vm) as source:
        await until(source, lambda i: i.state.running)
        source.follow(changed(vm, powerState="suspended"))
        await until(source, lambda i: i.state.observed == 1)
        async with tended(host, assigned_vm("second", image=source.name, cpu=7)) as second:
            await until(second, lambda i: i.state.running)
            assert host.vm_json(second)["cpu"] == 5
    assert host.files() == []


async def test_creation_waits_for_the_end_of_other_vms(host: Host) -> None:
    ended = trio.Event()
    async with tended(host, assigned_vm(), ended) as instance:
        await trio.testing.wait_all_tasks_blocked()
        assert host.history() == [("pending", "waiting for orchard-old to end", False, 0)]
        assert host.files() == []
        ended.set()
        await until(instance, lambda i: i.state.running)


async def test_vm_at_rest_outlives_its_worker_and_the_next_can_delete_it(host: Host) -> None:
    vm = assigned_vm()
    stopped = changed(vm, powerState="stopped")
    async with left_by_a_worker(host, vm) as instance:
        instance.follow(stopped)
        await until(instance, lambda i: i.state.observed == 1)
    assert [(local.name, local.state) for local in await host.driver.list_vms()] == [(vm.tart_name, "stopped")]
    again = host.instance(stopped, found="stopped")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.tend)
        await until(again, lambda i: i.state.observed == 1)
        again.remove()
    assert host.files() == []


async def test_running_vm_outlives_its_worker_and_is_adopted(host: Host) -> None:
    vm = assigned_vm(startup_script={"script_content": "echo once"}, cpu=2)
    async with left_by_a_worker(host, vm) as instance:
        await until(instance, lambda i: i._note.script == "done")
    assert [local.state for local in await host.driver.list_vms()] == ["running"]
    host.reports.clear()
    async with adopted(host, vm) as instance:
        assert (instance.state.status, instance.state.running) == ("running", True)
        await until(instance, lambda i: i.state.phase == "running")
        assert instance.state.image_fqn.startswith("image@sha256:")
        instance.follow(changed(vm, cpu=8))
        await until(instance, lambda i: i.state.observed == 1)
        assert host.vm_json(instance)["cpu"] == 8
    assert host.lines == ["once"]
    assert host.history() == [("running", "", True, 0), ("running", "", False, 0), ("running", "", True, 1)]
    assert host.files() == []


@pytest.mark.parametrize(
    ("spec", "patch", "state"),
    [({"suspendable": True}, {"powerState": "suspended"}, "suspended"), ({}, {"powerState": "stopped"}, "stopped")],
)
async def test_change_made_without_a_worker_is_applied_after_adoption(
    host: Host, spec: dict[str, object], patch: dict[str, object], state: str
) -> None:
    vm = assigned_vm("vm", **spec)
    async with left_by_a_worker(host, vm):
        pass
    async with adopted(host, changed(vm, **patch)) as instance:
        await until(instance, lambda i: i.state.observed == 1)
        assert (instance.state.status, instance.state.running) == ("running", False)
        assert host.vm_json(instance)["state"] == state


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("patch", [{}, {"cpu": 8}, {"powerState": "stopped"}])
async def test_vm_that_ends_before_or_during_its_adoption_fails_unless_there_is_a_newer_generation(
    host: Host, monkeypatch: pytest.MonkeyPatch, patch: dict[str, object], *, during: bool
) -> None:
    """An earlier worker may have stopped it for that generation, and ended before the guest did."""
    vm = assigned_vm()
    async with left_by_a_worker(host, vm) as instance:
        pass

    async def attach(name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await host.driver.stop(name)

    if during:
        monkeypatch.setattr(host.driver, "attach", attach)
    else:
        await host.driver.stop(instance.name)
    async with adopted(host, changed(vm, **patch) if patch else vm) as instance:
        if patch:
            await until(instance, lambda i: i.state.observed == 1)
            assert (instance.state.status, instance.state.running) == ("running", "powerState" not in patch)
        else:
            await until(instance, lambda i: i.state.status == "failed")


async def test_vm_that_came_to_rest_before_its_adoption_outlives_the_worker(host: Host) -> None:
    vm = assigned_vm()
    stopped = changed(vm, powerState="stopped")
    async with left_by_a_worker(host, vm) as instance:
        pass
    await host.driver.stop(instance.name)
    instance = host.instance(stopped, found="running", outlives=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        await until(instance, lambda i: i.state.observed == 1)
        nursery.cancel_scope.cancel()
    assert await host.driver.list_vms() == [LocalVM(vm.tart_name, "stopped")]
    assert not instance.has_unreported_failure


async def test_running_vm_that_can_not_be_adopted_is_stopped_before_it_fails(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example one whose supervisor was killed. It fails although there is a newer generation."""
    vm = assigned_vm()
    async with left_by_a_worker(host, vm):
        pass

    async def attach(name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        raise NotRunning("it was not started by this driver")

    monkeypatch.setattr(host.driver, "attach", attach)
    async with adopted(host, changed(vm, headless=True)) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        assert instance.state.message == "it was not started by this driver"
        assert await host.driver.list_vms() == [LocalVM(vm.tart_name, "stopped")]


async def test_script_that_outlived_its_worker_fails_the_vm(host: Host) -> None:
    vm = assigned_vm(startup_script={"script_content": "echo begun; sleep 1000"})
    async with left_by_a_worker(host, vm):
        await eventually(lambda: host.lines == ["begun"])
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        assert instance.state.message == CUT_OFF
        assert [local.state for local in await host.driver.list_vms()] == ["stopped"]
    await eventually(lambda: processes_in(host.home) == [])


async def test_running_vm_without_a_note_is_stopped_and_fails(host: Host) -> None:
    vm = assigned_vm()
    async with left_by_a_worker(host, vm) as instance:
        pass
    host.driver.note(instance.name, "[]")
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        assert instance.state.message == UNNOTED
        assert [local.state for local in await host.driver.list_vms()] == ["stopped"]


async def test_vm_ends_with_its_worker_when_told_so(host: Host) -> None:
    async with left_by_a_worker(host, assigned_vm(), outlives=False) as instance:
        pass
    assert host.files() == []
    assert instance.has_unreported_failure
    assert host.history()[-1] == ("failed", STOPPED, False, 0)


async def test_vm_that_can_not_be_stopped_with_its_worker_does_not_fail(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed VM may be started elsewhere. The worker ends in bounded time."""
    host = Host(tmp_path)

    async def stubborn(name: str) -> None:
        await trio.sleep(1)
        raise DriverError("it hangs")

    monkeypatch.setattr(host.driver, "stop", stubborn)
    async with left_by_a_worker(host, assigned_vm(), outlives=False) as instance:
        before = trio.current_time()
    assert trio.current_time() - before == pytest.approx(REMOVE_SECONDS)
    assert not instance.has_unreported_failure
    assert host.history()[-1] == ("running", "", True, 0)


async def test_vm_has_not_failed_before_its_guest_has_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = trio.Event()
    stop = host.driver.stop

    async def stubborn(name: str) -> None:
        if not refused.is_set():
            refused.set()
            raise DriverError("it hangs")
        await stop(name)

    monkeypatch.setattr(host.driver, "stop", stubborn)
    monkeypatch.setattr("orchard.vm.ending.RETRY_SECONDS", 0.0)
    async with tended(host, assigned_vm()) as instance:
        await until(instance, lambda i: i.state.running)
        states: list[str] = []
        guests = vars(host.driver)["_guests"]
        monkeypatch.setattr(host, "record_report", lambda i: states.append(f"{i.state.status} {i.name in guests}"))
        instance.fail("told to")
        await until(instance, lambda i: i.has_ended)
        assert refused.is_set()
        assert states == ["failed False"]


def test_note_is_parsed_as_written_and_anything_else_is_refused() -> None:
    shutdown = Script("echo bye", {"A": "b"}, "me", "secret", seconds=30, kind="shutdown", agent=True)
    begun = Note(3, Hardware(4, 8192, 50), suspendable=True, script="begun", shutdown=shutdown)
    failed, cut_off = Startup(3, 12.5, "failed"), Startup(None, 12.5, "cut off")
    for note in (begun, *(replace(begun, script="done", startup=startup) for startup in (failed, cut_off))):
        assert Note.parse(str(note)) == note
    # As earlier versions write them. Such workers can also read the note of a VM that has no shutdown script.
    old = '[3, [4, 8192, 50], true, "done"]'
    assert Note.parse(old).startup == Startup(0, None)
    plain = Note(3, Hardware(4, 8192, 50), suspendable=True, script="begun")
    assert (str(plain), Note.parse(str(plain))) == (old.replace("done", "begun"), plain)
    assert str(replace(plain, script="done", startup=Startup(0, 12.5))) == old
    more = json.loads(str(note))[4]
    for broken in ({}, {**more, "startup": [1]}, {**more, "shutdown": {"x": 1}}, {**more, "shutdown": {"text": None}}):
        with pytest.raises(ValueError, match="note about a VM has"):
            Note.parse(json.dumps([*json.loads(old), broken]))
    texts = (
        "",
        "{}",
        "[]",
        '[1, [1, 2], true, ""]',
        '[1, [1, 2, 3], 1, ""]',
        '[1, [1, 2, 3], true, "x"]',
        "[" * 100_000,
    )
    for text in texts:
        with pytest.raises(ValueError, match="note about a VM has"):
            Note.parse(text)


@pytest.mark.parametrize("ends", ["VM", "worker"])
async def test_failed_deletion_is_retried(host: Host, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    refusals = [DriverError("busy"), DriverError("still busy"), DriverError("busy again")]
    delete = host.driver.delete

    async def stubborn(name: str) -> None:
        assert instance.has_ended
        if refusals:
            raise refusals.pop()
        await delete(name)

    monkeypatch.setattr(host.driver, "delete", stubborn)
    monkeypatch.setattr("orchard.vm.ending.RETRY_SECONDS", 0.0)
    instance = host.instance(assigned_vm(), outlives=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        await until(instance, lambda i: i.state.running)
        (instance.remove if ends == "VM" else nursery.cancel_scope.cancel)()
    assert refusals == []
    assert host.files() == []


# ---- ended or cancelled at any step ---------------------------------------------------------------------------------


async def run_one_vm(home: Path, step: int, order: str, shutdown: str = "") -> bool:
    """Run a VM with scripts that is told to end, or whose task is cancelled, at a step. Return whether it came to that.

    The shutdown script, if there is one, makes the file HOME.shut.
    """
    host = Host(home)
    vm = assigned_vm(
        startup_script={"script_content": "echo hello; sleep 1000 >/dev/null 2>&1 & echo over"},
        shutdown_script={"script_content": shutdown},
    )
    instance = host.instance(vm, outlives=order != "stop")
    ran_before = False

    def remove() -> None:
        nonlocal ran_before
        ran_before = host.runs.is_set()
        instance.remove()

    async with trio.open_nursery() as nursery:
        orders: dict[str, Callable[[], None]] = {
            "remove": remove,
            "fail": partial(instance.fail, "told"),
            "stop": nursery.cancel_scope.cancel,
            "leave": nursery.cancel_scope.cancel,
            "cancel the removal": nursery.cancel_scope.cancel,
        }
        instrument = AtStep(step, orders[order])
        nursery.start_soon(instance.tend)
        if order != "cancel the removal":
            trio.lowlevel.add_instrument(instrument)
        await eventually(lambda: instance._note.script == "done" or instrument.left <= 0)
        if order == "cancel the removal":
            trio.lowlevel.add_instrument(instrument)
        if order == "fail" and instrument.left <= 0:
            await until(instance, lambda i: i.has_ended)
        instance.remove()
    trio.lowlevel.remove_instrument(instrument)
    runs_on = order in ("leave", "cancel the removal") and await adopted_or_deleted(host, vm)
    # Also by the worker that comes after this one.
    assert not shutdown or Path(f"{home}.shut").exists() or not (ran_before or runs_on)
    assert await host.driver.list_vms() == []
    assert host.files() == []
    await eventually(lambda: processes_in(home) == [])
    return instrument.left <= 0


async def adopted_or_deleted(host: Host, vm: VM) -> bool:
    """Adopt or delete what is left of a VM, as the next worker does, and remove the VM. Return whether it ran on."""
    runs_on = False
    for local in await host.driver.list_vms():
        # It has never run, and the controller knows no better.
        if local.state == "stopped":
            assert not any(report["status"] == "running" for report in host.reports)
            await host.driver.delete(local.name)
            continue
        async with adopted(host, vm) as instance:
            await until(instance, lambda i: i.state.phase == "running" or i.state.status == "failed")
            assert instance.state.message in ("", CUT_OFF)
            runs_on = instance.state.phase == "running"
    return runs_on


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "steps"), [("remove", 20), ("fail", 20), ("stop", 20), ("leave", 20), ("cancel the removal", 5)]
)
def test_vm_that_ends_at_any_step_leaves_nothing(tmp_path: Path, order: str, steps: int) -> None:
    for step in itertools.count(1):
        if not trio.run(run_one_vm, tmp_path / str(step), step, order, strict_exception_groups=True):
            break
    assert step > steps


@pytest.mark.slow
@pytest.mark.parametrize("order", ["remove", "leave", "cancel the removal"])
def test_shutdown_script_has_run_whenever_a_running_vm_is_removed_or_its_worker_ends(
    tmp_path: Path, order: str
) -> None:
    for step in growing_steps(1.2):
        home = tmp_path / str(step)
        if not trio.run(run_one_vm, home, step, order, f"echo >> {home}.shut", strict_exception_groups=True):
            break
    assert step > 20


STANDIN = Path(__file__).parent.parent / "standin" / "tart"


async def run_one_vm_on_tart(home: Path, step: int) -> bool:
    """Run a VM without a script on the stand-in for tart; its task is cancelled at a step. Return whether it came to that."""
    # The stand-in is started often: by the Python at hand.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    driver = TartDriver(str(STANDIN), home / "driver", env={"TART_HOME": str(home), "PATH": path}, own_addresses=True)
    host = Host(home, driver)
    vm = assigned_vm(image="example.com/image", imagePullPolicy="Always")
    instance = host.instance(vm)
    async with trio.open_nursery() as nursery:
        instrument = AtStep(step, nursery.cancel_scope.cancel)
        trio.lowlevel.add_instrument(instrument)
        nursery.start_soon(instance.tend)
        with trio.move_on_after(60):
            async with trio.open_nursery() as waiting:
                for event in (host.runs, host.freed):
                    waiting.start_soon(cancel_at, event, waiting.cancel_scope)
        instance.remove()
    trio.lowlevel.remove_instrument(instrument)
    await adopted_or_deleted(host, vm)
    assert await driver.list_vms() == []
    return instrument.left <= 0


async def cancel_at(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


@pytest.mark.slow
def test_vm_on_tart_that_is_cancelled_at_any_step_leaves_nothing(tmp_path: Path) -> None:
    # Each try starts the stand-in some ten times, so not all of some 150 steps are tried.
    for step in growing_steps(1.7):
        home = tmp_path / str(step)
        if not trio.run(run_one_vm_on_tart, home, step, strict_exception_groups=True):
            break
        at_last(partial(has_no_process, home))
    assert step > 40


def has_no_process(home: Path) -> bool:
    return processes_in(home) == []
