"""One VM's life on a host, on synthetic VMs: what it says of itself, how it follows its specification, how it ends."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.processes import at_last, at_rest, eventually, processes_in

from orchard import transitions
from orchard.schema import VM, Event, Worker, patched_spec, vm_from_client
from orchard.tart import TartDriver
from orchard.vm.driver import Driver, DriverError, LocalState, LocalVM, NotRunning
from orchard.vm.instance import (
    CUT_OFF,
    QUEUED_LINES,
    REMOVE_SECONDS,
    SHUT_DOWN,
    STOPPED,
    UNNOTED,
    Instance,
    InstanceHost,
    Note,
)
from orchard.vm.synthetic import SyntheticDriver

BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
WORKER = Worker(name="w", default_cpu=3, default_memory=1024)


def uid_of(name: str) -> str:
    return f"uid-{os.getpid()}-{name}"  # processes are told apart by it, of other test runs, too


def placed(name: str = "vm", **spec: object) -> VM:
    """A VM as the controller hands it to a worker."""
    wanted = vm_from_client({"name": name, "image": "image", **spec}, [])[1]
    return transitions.assign(transitions.create(name, uid_of(name), wanted, BEGAN), WORKER, BEGAN)


def changed(vm: VM, **patch: object) -> VM:
    """The next generation of a VM."""
    return transitions.change(vm, patched_spec(vm.spec, patch, []))


class Host:
    """A host with a driver, the instances on it, and what they said and sent."""

    def __init__(self, home: Path, driver: Driver | None = None, **options: float) -> None:
        self.home = home
        self.driver = driver or SyntheticDriver(home, **options)
        self.said: list[dict[str, Any]] = []
        self.sent: list[str] = []
        self.hold: trio.Event | None = None  # what deliveries wait for
        self.runs = trio.Event()  # set when an instance has said that it runs

    def instance(self, vm: VM, *, found: LocalState | None = None, outlives: bool = True) -> Instance:
        def changed() -> None:
            self.heard(instance)

        host = InstanceHost(self.driver, changed, self.send, lambda: 1_700_000_000.5, outlives)
        instance = Instance(vm, host, found=found)
        return instance

    def heard(self, instance: Instance) -> None:
        self.said.append(instance.report())
        if instance.running:
            self.runs.set()

    async def send(self, vm: VM, events: Sequence[Event]) -> None:
        if self.hold is not None:
            await self.hold.wait()
        assert {(event.kind, event.timestamp) for event in events} == {("log_line", 1_700_000_000)}
        self.sent += [event.payload for event in events]

    def story(self) -> list[tuple[str, str, bool, int]]:
        """What was said, repetitions left out."""
        told = [
            (r["status"], r["status_message"], r["conditions"][0]["state"] == "true", r["observedGeneration"])
            for r in self.said
        ]
        return [one for one, _ in itertools.groupby(told)]

    def about(self, instance: Instance) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / instance.name / "vm.json").read_text())
        return found

    def left(self) -> list[Path]:
        return list(self.home.iterdir()) if self.home.exists() else []


@asynccontextmanager
async def tended(host: Host, vm: VM, after: Sequence[trio.Event] = ()) -> AsyncIterator[Instance]:
    """Let a VM live for the time of the block, and end by being removed."""
    instance = host.instance(vm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend, after)
        yield instance
        instance.remove()


async def until(instance: Instance, holds: Callable[[Instance], bool]) -> None:
    await eventually(lambda: holds(instance))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "vms")


async def test_a_life_tells_its_story_and_leaves_nothing(host: Host) -> None:
    async with tended(host, placed(cpu=2)) as instance:
        await until(instance, lambda i: i.running)
        assert host.about(instance) == {"source": "image", "state": "stopped", "cpu": 2, "memory": 1024}
        assert await host.driver.ip(instance.name) == "127.0.0.1"
    assert host.story() == [
        ("pending", "cloning image", False, 0),
        ("pending", "starting", False, 0),
        ("running", "", True, 1),
    ]
    assert instance.report()["uid"] == uid_of("vm")
    assert instance.state.image_fqn.startswith("image@sha256:")
    assert host.left() == []


async def test_a_pull_tells_its_progress(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    host = Host(tmp_path, pull_seconds=10.0, boot_seconds=5.0)
    async with tended(host, placed(imagePullPolicy="Always")) as instance:
        await until(instance, lambda i: i.running)
    messages = [message for _, message, _, _ in host.story()]
    progress = [f"pulling image: {percent} %" for percent in range(10, 101, 10)]
    assert messages == ["pulling image", *progress, "cloning image", *progress, "starting", ""]


async def test_an_image_that_does_not_exist_fails_the_vm_with_the_drivers_words(host: Host) -> None:
    async with tended(host, placed(image="orchard-none")) as instance:
        await until(instance, lambda i: i.status == "failed")
        assert instance.state.message == 'the specified VM "orchard-none" does not exist'
        assert instance.ended.is_set()
    assert host.left() == []


async def test_a_script_that_fails_fails_the_vm_after_all_that_it_printed(host: Host) -> None:
    script = {"script_content": "seq 1000; echo last words; exit 7", "env": {}}
    async with tended(host, placed(startup_script=script)) as instance:
        await until(instance, lambda i: i.status == "failed")
        assert instance.state.message == "startup script failed with exit code 7: last words"
        assert host.sent == [*map(str, range(1, 1001)), "last words"]
        await instance.ended.wait()
        assert (await host.driver.list_vms())[0].state == "stopped"
        instance.follow(changed(instance.vm, headless=True))
        assert host.story()[-1] == ("failed", instance.state.message, False, 1)


async def test_a_script_waits_while_its_lines_cannot_be_delivered(host: Host) -> None:
    host.hold = trio.Event()
    script = {"script_content": "for i in $(seq 3000); do printf %01000d\\\\n $i; echo $i > reached; done"}
    async with tended(host, placed(startup_script=script)) as instance:
        reached = host.home / instance.name / "root" / "reached"
        await until(instance, lambda _: reached.exists() and int(reached.read_text() or 0) > QUEUED_LINES)
        await at_rest(reached.read_text)
        assert int(reached.read_text()) < 3000
        assert host.sent == []
        host.hold.set()
        await until(instance, lambda _: len(host.sent) == 3000)
    assert host.sent == [f"{number:01000}" for number in range(1, 3001)]


async def test_a_guest_that_shuts_down_by_itself_has_failed(host: Host) -> None:
    async with tended(host, placed()) as instance:
        await until(instance, lambda i: i.running)
        await host.driver.stop(instance.name)
        await until(instance, lambda i: i.status == "failed")
        assert (instance.state.message, instance.running) == (SHUT_DOWN, False)


async def test_the_next_generation_is_booted_with_what_changed(host: Host) -> None:
    vm = placed(startup_script={"script_content": "echo once"})
    async with tended(host, vm) as instance:
        await until(instance, lambda _: host.sent == ["once"])
        await until(instance, lambda i: i._note.script == "done")
        instance.follow(changed(vm, cpu=8, headless=True))
        await until(instance, lambda i: i.state.observed == 2)
        assert host.about(instance)["cpu"] == 8
        assert (instance.running, instance.status) == (True, "running")
    assert host.story()[-3:] == [("running", "", True, 1), ("running", "", False, 1), ("running", "", True, 2)]
    assert host.sent == ["once"], "the script runs once in a life"


@pytest.mark.parametrize(
    ("spec", "patch", "state"),
    [
        ({}, {"powerState": "stopped"}, "stopped"),
        ({"suspendable": True}, {"powerState": "stopped"}, "stopped"),
        ({"suspendable": True}, {"powerState": "suspended"}, "suspended"),
        ({"suspendable": True}, {"powerState": "suspended", "cpu": 9}, "stopped"),
    ],
)
async def test_a_vm_that_is_to_rest_stays_on_the_disk(
    host: Host, spec: dict[str, object], patch: dict[str, object], state: str
) -> None:
    vm = placed("vm", **spec)
    async with tended(host, vm) as instance:
        await until(instance, lambda i: i.running)
        instance.follow(changed(vm, **patch))
        await until(instance, lambda i: i.state.observed == 2)
        assert (instance.status, instance.running) == ("running", False)
        assert host.about(instance)["state"] == state
        assert not instance.ended.is_set()
    assert host.left() == []


async def test_a_clone_of_a_suspended_vm_resumes_as_it_was(host: Host) -> None:
    vm = placed(suspendable=True, cpu=5)
    async with tended(host, vm) as source:
        await until(source, lambda i: i.running)
        source.follow(changed(vm, powerState="suspended"))
        await until(source, lambda i: i.state.observed == 2)
        async with tended(host, placed("second", image=source.name, cpu=7)) as second:
            await until(second, lambda i: i.running)
            assert host.about(second)["cpu"] == 5
    assert host.left() == []


async def test_a_life_begins_when_those_that_were_told_to_end_have(host: Host) -> None:
    ended = trio.Event()
    async with tended(host, placed(), [ended]) as instance:
        await trio.testing.wait_all_tasks_blocked()
        assert host.said == []
        ended.set()
        await until(instance, lambda i: i.running)


@asynccontextmanager
async def abandoned(host: Host, vm: VM, *, outlives: bool = True) -> AsyncIterator[Instance]:
    """Let a VM live for the time of the block; then its worker ends."""
    instance = host.instance(vm, outlives=outlives)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        await until(instance, lambda i: i.running)
        yield instance
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def adopted(host: Host, vm: VM) -> AsyncIterator[Instance]:
    """Go on with a VM for the time of the block, and remove it then."""
    instance = host.instance(vm, found="running")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        yield instance
        instance.remove()


async def test_a_vm_at_rest_stays_when_its_worker_ends_and_the_next_one_can_delete_it(host: Host) -> None:
    vm = placed()
    stopped = changed(vm, powerState="stopped")
    async with abandoned(host, vm) as instance:
        instance.follow(stopped)
        await until(instance, lambda i: i.state.observed == 2)
    assert [(local.name, local.state) for local in await host.driver.list_vms()] == [(vm.tart_name, "stopped")]
    again = host.instance(stopped, found="stopped")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.tend)
        await until(again, lambda i: i.state.observed == 2)
        again.remove()
    assert host.left() == []


async def test_a_vm_that_runs_outlives_its_worker_and_is_gone_on_with(host: Host) -> None:
    vm = placed(startup_script={"script_content": "echo once"}, cpu=2)
    async with abandoned(host, vm) as instance:
        await until(instance, lambda i: i._note.script == "done")
    assert [local.state for local in await host.driver.list_vms()] == ["running"]
    host.said.clear()
    async with adopted(host, vm) as instance:
        assert (instance.status, instance.running) == ("running", True)
        await until(instance, lambda i: i.state.observed == 1)
        assert instance.state.image_fqn.startswith("image@sha256:")
        instance.follow(changed(vm, cpu=8))
        await until(instance, lambda i: i.state.observed == 2)
        assert host.about(instance)["cpu"] == 8
    assert host.sent == ["once"], "the script runs once in a life"
    assert host.story() == [("running", "", True, 1), ("running", "", False, 1), ("running", "", True, 2)]
    assert host.left() == []


@pytest.mark.parametrize(
    ("spec", "patch", "state"),
    [({"suspendable": True}, {"powerState": "suspended"}, "suspended"), ({}, {"powerState": "stopped"}, "stopped")],
)
async def test_what_was_wanted_while_there_was_no_worker_is_done(
    host: Host, spec: dict[str, object], patch: dict[str, object], state: str
) -> None:
    vm = placed("vm", **spec)
    async with abandoned(host, vm):
        pass
    async with adopted(host, changed(vm, **patch)) as instance:
        await until(instance, lambda i: i.state.observed == 2)
        assert (instance.status, instance.running) == ("running", False)
        assert host.about(instance)["state"] == state


@pytest.mark.parametrize("patch", [{}, {"cpu": 8}, {"powerState": "stopped"}])
async def test_a_vm_that_has_ended_since_it_was_seen_to_run_has_failed_but_for_a_change(
    host: Host, patch: dict[str, object]
) -> None:
    """An earlier worker may have asked it to end for that, and had no time to wait."""
    vm = placed()
    async with abandoned(host, vm) as instance:
        pass
    await host.driver.stop(instance.name)
    async with adopted(host, changed(vm, **patch) if patch else vm) as instance:
        if patch:
            await until(instance, lambda i: i.state.observed == 2)
            assert (instance.status, instance.running) == ("running", "powerState" not in patch)
        else:
            await until(instance, lambda i: i.status == "failed")


async def test_a_vm_that_has_come_to_rest_since_it_was_seen_to_run_stays_when_its_worker_ends(host: Host) -> None:
    vm = placed()
    stopped = changed(vm, powerState="stopped")
    async with abandoned(host, vm) as instance:
        pass
    await host.driver.stop(instance.name)
    instance = host.instance(stopped, found="running", outlives=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        await until(instance, lambda i: i.state.observed == 2)
        nursery.cancel_scope.cancel()
    assert await host.driver.list_vms() == [LocalVM(vm.tart_name, "stopped")]
    assert not instance.has_unreported_failure


async def test_a_vm_that_runs_and_cannot_be_gone_on_with_is_ended_before_it_has_failed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose guard was killed; though a change is wanted, for which it might have ended."""
    vm = placed()
    async with abandoned(host, vm):
        pass

    async def attach(name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        raise NotRunning("it was not started by this driver")

    monkeypatch.setattr(host.driver, "attach", attach)
    async with adopted(host, changed(vm, headless=True)) as instance:
        await until(instance, lambda i: i.status == "failed")
        assert instance.state.message == "it was not started by this driver"
        assert await host.driver.list_vms() == [LocalVM(vm.tart_name, "stopped")]


async def test_a_script_that_nobody_followed_to_its_end_fails_the_vm(host: Host) -> None:
    vm = placed(startup_script={"script_content": "echo begun; sleep 1000"})
    async with abandoned(host, vm):
        await eventually(lambda: host.sent == ["begun"])
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: i.status == "failed")
        assert instance.state.message == CUT_OFF
        assert [local.state for local in await host.driver.list_vms()] == ["stopped"]
    await eventually(lambda: processes_in(host.home) == [])


async def test_a_vm_of_which_nothing_is_noted_is_ended(host: Host) -> None:
    vm = placed()
    async with abandoned(host, vm) as instance:
        pass
    host.driver.note(instance.name, "[]")
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: i.status == "failed")
        assert instance.state.message == UNNOTED
        assert [local.state for local in await host.driver.list_vms()] == ["stopped"]


async def test_a_vm_that_is_not_to_outlive_its_worker_ends_with_it(host: Host) -> None:
    async with abandoned(host, placed(), outlives=False) as instance:
        pass
    assert host.left() == []
    assert instance.has_unreported_failure
    assert host.story()[-1] == ("failed", STOPPED, False, 1)


async def test_a_vm_that_does_not_end_with_its_worker_is_not_called_failed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be started elsewhere then; and nobody waits for it for ever."""
    host = Host(tmp_path)

    async def stubborn(name: str) -> None:
        await trio.sleep(1)
        raise DriverError("it hangs")

    monkeypatch.setattr(host.driver, "stop", stubborn)
    async with abandoned(host, placed(), outlives=False) as instance:
        before = trio.current_time()
    assert trio.current_time() - before == pytest.approx(REMOVE_SECONDS)
    assert not instance.has_unreported_failure
    assert host.story()[-1] == ("running", "", True, 1)


async def test_a_vm_has_not_failed_before_its_guest_has_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = trio.Event()
    stop = host.driver.stop

    async def stubborn(name: str) -> None:
        if not refused.is_set():
            refused.set()
            raise DriverError("it hangs")
        await stop(name)

    monkeypatch.setattr(host.driver, "stop", stubborn)
    monkeypatch.setattr("orchard.vm.instance.RETRY_SECONDS", 0.0)
    async with tended(host, placed()) as instance:
        await until(instance, lambda i: i.running)
        states: list[str] = []
        guests = vars(host.driver)["_guests"]
        monkeypatch.setattr(host, "heard", lambda i: states.append(f"{i.status} {i.name in guests}"))
        instance.fail("told to")
        await instance.ended.wait()
        assert refused.is_set()
        assert states == ["failed False"]


def test_a_note_is_read_as_it_was_written() -> None:
    for script in ("", "begun", "done"):
        note = Note(3, (4, 8192, 50), suspendable=True, script=script)
        assert Note.parse(str(note)) == note
    for text in ("", "{}", "[]", '[1, [1, 2], true, ""]', '[1, [1, 2, 3], 1, ""]', '[1, [1, 2, 3], true, "x"]'):
        with pytest.raises(ValueError, match="note about a VM is"):
            Note.parse(text)


async def test_a_vm_that_cannot_be_deleted_is_tried_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([DriverError("busy"), DriverError("still busy")])
    delete = host.driver.delete

    async def stubborn(name: str) -> None:
        for refusal in refusals:
            raise refusal
        await delete(name)

    monkeypatch.setattr(host.driver, "delete", stubborn)
    monkeypatch.setattr("orchard.vm.instance.RETRY_SECONDS", 0.0)
    instance = host.instance(placed())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        await until(instance, lambda i: i.running)
        instance.remove()
        await instance.ended.wait()
        assert host.left() != []

        def is_gone() -> bool:
            instance.remove()
            return not nursery.child_tasks

        await eventually(is_gone)
    assert host.left() == []


# ---- cancelled at every checkpoint ---------------------------------------------------------------------------------


class AtStep(trio.abc.Instrument):
    """Does something before the N-th step of any task."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self.left = number
        self._action = action

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self._action()


async def one_life(home: Path, step: int, order: str) -> bool:
    """Live, with a script; at some step the VM is told to end, or its task is cancelled. Give whether it came to it."""
    host = Host(home)
    vm = placed(startup_script={"script_content": "echo hello; sleep 1000 & echo over"})
    instance = host.instance(vm, outlives=order != "stop")
    async with trio.open_nursery() as nursery:
        orders: dict[str, Callable[[], None]] = {
            "remove": instance.remove,
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
            await instance.ended.wait()
        instance.remove()
    trio.lowlevel.remove_instrument(instrument)
    assert instance.ended.is_set()
    if order in ("leave", "cancel the removal"):
        await taken_over(host, vm)
    assert await host.driver.list_vms() == []
    assert host.left() == []
    await eventually(lambda: processes_in(home) == [])  # who is killed takes a moment to be gone
    return instrument.left <= 0


async def taken_over(host: Host, vm: VM) -> None:
    """Do with what was left of a VM as the next worker does, and remove it."""
    for local in await host.driver.list_vms():
        if local.state == "stopped":  # it had not begun to run, as the controller knows
            assert not any(report["status"] == "running" for report in host.said)
            await host.driver.delete(local.name)
            continue
        async with adopted(host, vm) as instance:
            await until(instance, lambda i: i.state.observed == 1 or i.status == "failed")
            assert instance.state.message in ("", CUT_OFF)


@pytest.mark.parametrize(
    ("order", "steps"), [("remove", 20), ("fail", 20), ("stop", 20), ("leave", 20), ("cancel the removal", 5)]
)
def test_a_life_that_ends_at_any_checkpoint_leaves_nothing(tmp_path: Path, order: str, steps: int) -> None:
    for step in itertools.count(1):
        if not trio.run(one_life, tmp_path / str(step), step, order, strict_exception_groups=True):
            break
    assert step > steps


TART = Path(__file__).parent.parent / "standin" / "tart"


async def one_life_on_tart(home: Path, step: int) -> bool:
    """As `one_life`, on the stand-in for tart, without a script; the task is cancelled."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # another python3 may take long to start
    driver = TartDriver(str(TART), home / "driver", env={"TART_HOME": str(home), "PATH": path})
    host = Host(home, driver)
    vm = placed(image="example.com/image", imagePullPolicy="Always")
    instance = host.instance(vm)
    async with trio.open_nursery() as nursery:
        instrument = AtStep(step, nursery.cancel_scope.cancel)
        trio.lowlevel.add_instrument(instrument)
        nursery.start_soon(instance.tend)
        with trio.move_on_after(60):
            async with trio.open_nursery() as waiting:
                for event in (host.runs, instance.ended):
                    waiting.start_soon(cancel_at, event, waiting.cancel_scope)
        instance.remove()
    trio.lowlevel.remove_instrument(instrument)
    await taken_over(host, vm)
    assert await driver.list_vms() == []
    return instrument.left <= 0


async def cancel_at(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def test_a_life_on_tart_that_is_cancelled_at_any_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    for step in itertools.count(1):
        home = tmp_path / str(step)
        if not trio.run(one_life_on_tart, home, step, strict_exception_groups=True):
            break
        at_last(lambda: processes_in(home) == [])  # noqa: B023 -- it is called now
    assert step > 40
