"""What a VM's scripts do to it: exit codes, the condition ready, and the shutdown script before a guest is ended."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.instances import BEGAN, Host, adopted, assigned_vm, changed, left_by_a_worker, tended, until
from harness.processes import eventually, processes_in

from orchard import transitions
from orchard.codec import decode
from orchard.resources.bodies import VMReport
from orchard.schema import VM
from orchard.tart import TartDriver
from orchard.vm import supervisor
from orchard.vm.driver import DriverError, LocalVM, OnLine, Script
from orchard.vm.instance import CUT_OFF, Instance
from orchard.vm.instance_state import Note, shutdown_of

Clock = trio.testing.MockClock
STANDIN = Path(__file__).parent.parent / "standin" / "tart"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "vms")


@pytest.fixture
def clock() -> Clock:
    """A clock that runs at the speed of the real one and can be advanced."""
    return trio.testing.MockClock(rate=1)


def script(text: str, **env: str) -> dict[str, Any]:
    return {"script_content": text, "env": env}


def ready(report: dict[str, Any]) -> bool:
    return {"type": "ready", "state": "true"} in report["conditions"]


def is_ready(instance: Instance) -> bool:
    return ready(instance.report())


# ---- the startup script ----------------------------------------------------------------------------------------------


async def test_vm_is_ready_when_its_script_has_succeeded(host: Host, tmp_path: Path) -> None:
    go = tmp_path / "go"
    vm = assigned_vm(startup_script=script(f"echo begun; until [ -e {go} ]; do sleep 0.01; done"))
    async with tended(host, vm) as instance:
        await until(instance, lambda _: host.lines == ["begun"])
        report = instance.report()
        assert (report["status"], ready(report), "startupExitCode" in report) == ("running", False, False)
        go.touch()
        await until(instance, is_ready)
        report = instance.report()
        assert (report["startupExitCode"], report["startupEndedAt"]) == (0, "2023-11-14T22:13:20.500000Z")
        instance.fail("told to")
        await until(instance, lambda i: i.state.status == "failed")
        assert not is_ready(instance)


async def test_vm_without_a_script_is_ready_when_its_address_is_known(
    host: Host, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    refusals = [DriverError("no address yet"), DriverError("no address yet")]

    async def ip(name: str, *, bridged: bool = False) -> str:
        await trio.lowlevel.checkpoint()
        if refusals:
            raise refusals.pop()
        return "127.0.0.1"

    monkeypatch.setattr(host.driver, "ip", ip)
    async with tended(host, assigned_vm()) as instance:
        await until(instance, lambda i: "no address yet" in i.state.message)
        assert (instance.state.running, is_ready(instance)) == (True, False)
        await until(instance, is_ready)
        assert instance.state.message == ""
        # A stopped VM is not ready.
        instance.follow(changed(instance.vm, powerState="stopped"))
        await until(instance, lambda i: i.state.observed == 1)
        assert not is_ready(instance)


async def test_failed_script_is_reported_with_its_exit_code(host: Host) -> None:
    async with tended(host, assigned_vm(startup_script=script("exit 7"))) as instance:
        await until(instance, lambda i: i.state.status == "failed")
        report = instance.report()
        assert (report["startupExitCode"], ready(report)) == (7, False)
        assert "startupEndedAt" in report
    # Until it fails, it is not said to be kept.
    messages = {report["status_message"] for report in host.reports if report["status"] == "running"}
    assert not any("exit code" in message for message in messages), messages


def kept(instance: Instance) -> bool:
    return instance.state.startup is not None and instance.state.phase == "running"


async def test_vm_is_kept_running_and_not_ready_after_its_script_has_failed(host: Host) -> None:
    vm = assigned_vm(startup_script=script("echo no luck; exit 3"), startupOnFailure="keep")
    async with left_by_a_worker(host, vm) as instance:
        await until(instance, kept)
    message = instance.state.message
    assert "exit code 3: no luck" in message
    # In the hands of the next worker, and after a reboot.
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: i.state.phase == "running" and i.state.reached)
        instance.follow(changed(vm, headless=True))
        await until(instance, lambda i: i.state.observed == 1 and i.state.reached)
        report = instance.report()
        assert (report["status"], report["status_message"], ready(report)) == ("running", message, False)
        assert report["startupExitCode"] == 3
    assert host.lines == ["no luck"]


async def test_script_that_was_cut_off_keeps_the_vm_if_told_so(host: Host) -> None:
    vm = assigned_vm(startup_script=script("echo begun; sleep 1000"), startupOnFailure="keep")
    async with left_by_a_worker(host, vm):
        await eventually(lambda: host.lines == ["begun"])
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: kept(i) and i.state.reached)
        report = instance.report()
        assert (report["status"], ready(report), "startupExitCode" in report) == ("running", False, False)
        assert CUT_OFF in report["status_message"]
    await eventually(lambda: processes_in(host.home) == [])


async def test_script_runs_once_and_a_reboot_is_over_when_the_address_is_known(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = assigned_vm(startup_script=script("echo once"))
    booted = trio.Event()

    async def ip(name: str, *, bridged: bool = False) -> str:
        await booted.wait()
        return "127.0.0.1"

    monkeypatch.setattr(host.driver, "ip", ip)
    async with tended(host, vm) as instance:
        await until(instance, is_ready)
        instance.follow(changed(vm, headless=True))
        await until(instance, lambda i: i.state.observed == 1)
        assert not is_ready(instance)
        booted.set()
        await until(instance, is_ready)
        assert instance.report()["startupExitCode"] == 0
    assert host.lines == ["once"]


async def test_adopted_vm_stays_ready(host: Host) -> None:
    vm = assigned_vm(startup_script=script("echo once"))
    async with left_by_a_worker(host, vm) as instance:
        await until(instance, is_ready)
    host.reports.clear()
    async with adopted(host, reported(vm, instance)) as instance:
        assert is_ready(instance)
        await until(instance, lambda i: i.state.phase == "running")
        assert instance.report()["startupExitCode"] == 0
    assert all(map(ready, host.reports[:-1]))
    assert host.lines == ["once"]


def reported(vm: VM, instance: Instance) -> VM:
    """Return a VM as the controller has it after the present report."""
    return transitions.report(vm, decode(VMReport, instance.report()), BEGAN)


async def test_scripts_know_their_vm_and_the_environment_of_the_user_wins(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Script] = []

    async def run_script(name: str, script: Script, on_line: OnLine) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(script)

    monkeypatch.setattr(host.driver, "run_script", run_script)
    vm = assigned_vm(
        startup_script=script("true", TART_IMAGE="mine", OTHER="x"),
        shutdown_script=script("true"),
        startupTimeoutSeconds=60,
    )
    async with tended(host, vm) as instance:
        await until(instance, is_ready)
    own = {"ORCHARD_VM_NAME": "vm", "ORCHARD_VM_UID": vm.uid, "ORCHARD_WORKER_NAME": "w", "TART_IMAGE": "image"}
    assert [one.env for one in seen] == [{**own, "TART_IMAGE": "mine", "OTHER": "x"}, own]
    assert (seen[0].seconds, seen[0].kind, seen[1].kind) == (60, "startup", "shutdown")


# ---- the shutdown script ---------------------------------------------------------------------------------------------


def with_shutdown(tmp_path: Path, then: str = "", name: str = "vm", **spec: object) -> VM:
    """Return a VM whose shutdown script adds a line to a file in `tmp_path` before it does something else."""
    text = f"echo $ORCHARD_VM_NAME >> {tmp_path}/shut; {then}"
    return assigned_vm(name, shutdown_script=script(text), **spec)


def shut(tmp_path: Path) -> list[str]:
    """Return the names of the VMs whose shutdown scripts have begun."""
    path = tmp_path / "shut"
    return path.read_text().split() if path.exists() else []


ENDS: dict[str, tuple[dict[str, Any], Callable[[Host, Instance], Any], int]] = {
    "deletion": ({}, lambda host, i: i.remove(), 1),
    "restart or drain": ({}, lambda host, i: i.fail("restart requested", orderly=True), 1),
    "stop": ({}, lambda host, i: i.follow(changed(i.vm, powerState="stopped")), 1),
    "stop of a suspendable VM": (
        {"suspendable": True},
        lambda host, i: i.follow(changed(i.vm, powerState="stopped")),
        1,
    ),
    "suspension": ({"suspendable": True}, lambda host, i: i.follow(changed(i.vm, powerState="suspended")), 0),
    "failure": ({}, lambda host, i: i.fail("worker is offline"), 0),
    "guest that ends by itself": ({}, lambda host, i: host.driver.stop(i.name), 0),
    "end of the lease": ({"restart_policy": "OnFailure"}, lambda host, i: end_lease(host, i), 0),
    "reboot": ({}, lambda host, i: i.follow(changed(i.vm, cpu=9)), 0),
}


def end_lease(host: Host, instance: Instance) -> None:
    now = supervisor.clock()
    host.driver.lease(now, now, [instance.name])


@pytest.mark.parametrize("how", ENDS)
async def test_shutdown_script_runs_before_a_guest_is_ended_for_good(how: str, host: Host, tmp_path: Path) -> None:
    spec, end, times = ENDS[how]
    now = supervisor.clock()
    host.driver.lease(now + 1000, now + 1000, [])
    async with tended(host, with_shutdown(tmp_path, **spec)) as instance:
        await until(instance, lambda i: i.state.running)
        result = end(host, instance)
        if result is not None:
            await result
        await until(instance, lambda i: i.has_ended or i.state.observed == 1)
        assert len(shut(tmp_path)) == times
        # What happens at the end of the block is not for this test.
        instance.fail("told to")
    assert host.files() == []


async def test_failed_startup_script_is_followed_by_no_shutdown_script(host: Host, tmp_path: Path) -> None:
    async with tended(host, with_shutdown(tmp_path, startup_script=script("exit 1"))):
        await host.freed.wait()
    assert shut(tmp_path) == []


FAILING = {
    "fails": ("exit 3", "exit code 3"),
    "wants a password": ("read password </dev/tty && sudo -k -S true", "exit code"),
    "hangs": ("sleep 1000", "given up after 600 seconds"),
    "ignores signals and forks": ("trap '' TERM HUP; sleep 1000 & sleep 1000", "given up after 600 seconds"),
    "prints without end": ("yes", "given up after 600 seconds"),
    "ends the VM": ("touch ../../end; sleep 1000", "the VM has ended"),
    "is no shell script": ("#!/no/such/program", "exit code 127"),
}


@pytest.mark.parametrize("name", FAILING)
async def test_vm_ends_whatever_becomes_of_its_shutdown_script(
    name: str, host: Host, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, nursery: trio.Nursery
) -> None:
    text, outcome = FAILING[name]
    vm = with_shutdown(tmp_path, text, shutdownTimeoutSeconds=600)
    if text.startswith("#!"):
        vm = assigned_vm(shutdown_script=script(text))
    caplog.set_level(logging.INFO, "orchard.vm")

    async def interfere() -> None:
        await eventually(lambda: bool(shut(tmp_path)))
        if outcome.startswith("given up"):
            clock.jump(600)
        elif outcome == "the VM has ended":
            await eventually((host.home / "end").exists)
            await host.driver.stop(instance.name)

    async with tended(host, vm) as instance:
        await until(instance, lambda i: i.state.running)
        nursery.start_soon(interfere)
        instance.remove()
        await host.freed.wait()
    nursery.cancel_scope.cancel()
    (record,) = [one for one in caplog.records if hasattr(one, "outcome")]
    # The end of a VM also ends the script, and either may be noticed first.
    assert vars(record)["outcome"].startswith((outcome, "exit code") if outcome == "the VM has ended" else outcome)
    await eventually(lambda: processes_in(host.home) == [])


async def test_deleting_a_vm_while_it_is_shut_down_runs_the_script_once(host: Host, tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with tended(host, with_shutdown(tmp_path, f"until [ -e {go} ]; do sleep 0.01; done")) as instance:
        await until(instance, lambda i: i.state.running)
        instance.follow(changed(instance.vm, powerState="stopped"))
        await until(instance, lambda _: bool(shut(tmp_path)))
        assert (instance.state.running, instance.state.phase) == (True, "finishing")
        instance.remove()
        assert instance.ending
        go.touch()
    assert shut(tmp_path) == ["vm"]
    assert host.files() == []


async def test_vm_that_has_to_end_at_once_does_not_wait_for_its_shutdown_script(host: Host, tmp_path: Path) -> None:
    async with tended(host, with_shutdown(tmp_path, "sleep 1000", shutdownTimeoutSeconds=600)) as instance:
        await until(instance, lambda i: i.state.running)
        instance.fail("worker drained", orderly=True)
        await until(instance, lambda _: bool(shut(tmp_path)))
        assert instance.state.status == "running"
        instance.fail("worker is offline")
        await host.freed.wait()
        assert instance.state.message == "worker drained"


async def test_deletion_while_the_startup_script_runs_ends_that_script_first(host: Host, tmp_path: Path) -> None:
    vm = with_shutdown(tmp_path, startup_script=script("echo begun; trap '' TERM; sleep 1000; echo never"))
    async with tended(host, vm) as instance:
        await until(instance, lambda _: host.lines == ["begun"])
        instance.remove()
        await host.freed.wait()
    assert (shut(tmp_path), host.lines) == (["vm"], ["begun"])
    await eventually(lambda: processes_in(host.home) == [])


async def test_shutdown_that_the_worker_cuts_off_is_done_by_the_next(host: Host, tmp_path: Path) -> None:
    go = tmp_path / "go"
    vm = with_shutdown(tmp_path, f"until [ -e {go} ]; do sleep 0.01; done")
    orders: list[Callable[[Instance], None]] = [
        lambda i: i.fail("drained", orderly=True),
        lambda i: i.follow(changed(vm, powerState="stopped")),
    ]
    for order in orders:
        (tmp_path / "shut").unlink(missing_ok=True)
        go.unlink(missing_ok=True)
        async with left_by_a_worker(host, vm) as instance:
            order(instance)
            await until(instance, lambda _: bool(shut(tmp_path)))
        assert await host.driver.list_vms() == [LocalVM(vm.tart_name, "running")]
        go.touch()
        async with adopted(host, vm) as instance:
            order(instance)
            await until(instance, lambda i: i.has_ended or i.state.observed == 1)
            assert shut(tmp_path) == ["vm", "vm"]
            instance.fail("told to")
    assert host.files() == []


async def test_note_holds_what_the_shutdown_needs_without_the_controller(host: Host, tmp_path: Path) -> None:
    vm = with_shutdown(tmp_path, username="me", password="secret", shutdownTimeoutSeconds=77)
    async with tended(host, vm) as instance:
        await until(instance, lambda i: i.state.running)
        noted = Note.parse(host.driver.noted(instance.name)).shutdown
        assert noted == shutdown_of(vm, "w")
        assert noted is not None
        assert (noted.username, noted.password, noted.seconds) == ("me", "secret", 77)


# ---- on tart -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("transport", [pytest.param("ssh", marks=pytest.mark.needs("ssh")), "tart-guest-agent"])
async def test_scripts_of_a_vm_on_tart(transport: str, tmp_path: Path, sshd: int) -> None:
    """Both scripts take the same way. A VM that the guest agent reaches needs no SSH server."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    home = tmp_path / "tart"
    home.mkdir()
    driver = TartDriver(
        str(STANDIN),
        home / "driver",
        ssh_port=sshd if transport == "ssh" else 1,
        env={"TART_HOME": str(home), "PATH": path},
        own_addresses=True,
    )
    host = Host(home, driver)
    startup = {**script("echo $ORCHARD_VM_NAME"), "transport": transport}
    vm = with_shutdown(tmp_path, image="example.com/image", startup_script=startup, os="linux")
    async with left_by_a_worker(host, vm) as instance:
        await until(instance, is_ready)
    async with adopted(host, vm) as instance:
        await until(instance, lambda i: i.state.phase == "running")
    assert (host.lines, shut(tmp_path)) == (["vm"], ["vm"])
    assert await driver.list_vms() == []
    await eventually(lambda: processes_in(home) == [])
