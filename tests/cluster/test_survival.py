"""VMs outlive their worker and never run twice, when workers are stopped, killed and frozen at bad moments.

All processes are real, and the hypervisor is the stand-in for tart (see `harness.hosts`).
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from harness.hosts import (
    LONG_OFFLINE_TIMEOUT,
    SHORT_OFFLINE_TIMEOUT,
    Host,
    ProcessCluster,
    ends_well,
    freeze,
    has_failed,
    has_logged,
    has_state,
    is_restarted,
    killing_leftovers,
    process_cluster,
    process_state,
)
from harness.processes import GENEROUS, LISTENING, ORCHARD, PLAIN, eventually, free_port, processes_in, started

from orchard.client import Client, ResponseError
from orchard.schema import VM
from orchard.vm import supervised, supervisor
from orchard.vm.instance import CUT_OFF, SHUT_DOWN, STOPPED
from orchard.work.reconciler import VM_LOST

# Processes are started and time-outs of seconds waited for.
pytestmark = pytest.mark.slow

# ---- VMs outlive their worker ---------------------------------------------------------------------------------------


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def follow(client: Client, name: str, seen: list[VM], task_status: trio.TaskStatus[None]) -> None:
    """Record each state of a VM until the VM is deleted."""
    async with client.vms.watch(name) as changes:
        task_status.started()
        async for kind, vm in changes:
            if kind == "DELETED":
                return
            seen.append(vm)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_vms_outlive_a_worker_that_is_stopped_or_killed(
    tmp_path: Path, nursery: trio.Nursery, number: signal.Signals
) -> None:
    async with process_cluster(tmp_path) as c, trio.open_nursery() as following:
        with c.host.worker() as worker:
            a, b = [await c.create_running(name) for name in ("a", "b")]
            seen: list[VM] = []
            await following.start(follow, c.client, "a", seen)
            assert worker.stop(number) == (0 if number == signal.SIGTERM else -number)
        processes = [c.host.record(vm).child for vm in (a, b)]
        with c.host.worker() as worker:
            # The adopted VM can be reached, follows changes of its spec, and its end is noticed and reported.
            port = (await nursery.start(trio.serve_tcp, echo, 0))[0].socket.getsockname()[1]
            async with c.client.vms.port_forward("b", port, wait=GENEROUS) as tunnel:
                await tunnel.send_all(b"there")
                assert await tunnel.receive_some() == b"there"
            assert [c.host.record(vm).child for vm in (a, b)] == processes
            assert await c.client.vms.get("b") == b, "the VM did not change"
            await c.client.vms.patch("a", headless=True)
            now = await c.wait_vm("a", lambda vm: vm.state.observed_generation == 1)
            assert (now.uid, now.state.restart_count) == (a.uid, 0)
            assert {vm.state.status for vm in seen} == {"running"}
            os.kill(c.host.record(b).child, signal.SIGINT)
            assert (await c.wait_vm("b", has_failed)).state.status_message == SHUT_DOWN
            await c.delete_all()
            assert ends_well(worker)
        assert processes_in(c.host.tart_home) == []


async def test_worker_with_stop_vms_on_exit_stops_its_vms(tmp_path: Path) -> None:
    async with process_cluster(tmp_path) as c:
        with c.host.worker("--stop-vms-on-exit", TART_TOGETHER="3") as worker:
            for name in ("a", "b", "c"):
                await c.create_running(name)
            assert ends_well(worker)
        for vm in await c.client.vms.list():
            assert (vm.state.status, vm.state.status_message) == ("failed", STOPPED)
        assert (c.host.tart_home / "ended").read_text().split() == ["ended"] * 3, (
            "shut down side by side, and not killed"
        )
        assert c.host.states() == {}
        assert processes_in(c.host.tart_home) == []


@pytest.mark.needs("ssh")
async def test_vm_fails_if_its_worker_was_killed_while_its_script_ran(tmp_path: Path, sshd: int) -> None:
    async with process_cluster(tmp_path) as c:
        # The real ssh, with the port of the test's server.
        ssh = tmp_path / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -p {sshd} "$@"\n')
        ssh.chmod(0o755)
        c.host.environ["PATH"] = f"{ssh.parent}:{c.host.environ['PATH']}"
        with c.host.worker() as worker:
            done = await c.create_running("done", startup_script={"script_content": "echo done"})
            begun = await c.create_running("begun", startup_script={"script_content": "echo begun; sleep 1000"})
            for vm in (done, begun):
                await eventually(partial(has_printed, c.client, vm))
            await eventually(
                lambda: '"done"' in (c.host.home / ORCHARD / "tart" / f"{done.tart_name}.note").read_text()
            )
            worker.stop(signal.SIGKILL)
        with c.host.worker() as worker:
            assert (await c.wait_vm("begun", has_failed)).state.status_message == CUT_OFF
            assert c.host.states() == {done.tart_name: "running", begun.tart_name: "stopped"}
            await c.client.vms.patch("done", headless=True)
            await c.wait_vm("done", lambda vm: vm.state.observed_generation == 1)
            assert ends_well(worker)
        assert await has_printed(c.client, done), "the script did not run again"


async def has_printed(client: Client, vm: VM) -> bool:
    """Return whether a VM's script has printed the VM's name and nothing else."""
    return [event.payload async for event in client.vms.events(vm.name)] == [vm.name]


# ---- workers killed in the middle of a call of tart -----------------------------------------------------------------


class Workers:
    """One worker after the other on a host, each killed while it calls tart."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self._host = host
        self._stack = stack
        self.last = stack.enter_context(host.worker())

    async def next(self) -> None:
        """Kill the worker, start another, and wait until that one has adopted the VMs."""
        self.last.stop(signal.SIGKILL)
        self.last = self._stack.enter_context(self._host.worker())
        await eventually(lambda: has_logged(self.last, "adopted running VM"))

    async def kill_at(self, place: str, request: Callable[[], Awaitable[object]]) -> None:
        """Replace the worker when it comes to a place ("clone before") after a request of the user.

        The next worker must end the call of tart, unless the call runs a VM.
        """
        self._host.hold(place)
        await request()
        number = await self._host.wait_held()
        await self.next()
        assert place.startswith("run") or process_state(number) == "Z", f"{place} goes on"
        self._host.release()


@asynccontextmanager
async def workers_to_kill(home: Path) -> AsyncIterator[tuple[ProcessCluster, Workers]]:
    """Run a cluster and its workers. At the end of the block, a VM that was there from the beginning must still run."""
    async with process_cluster(home) as c:
        with ExitStack() as stack:
            workers = Workers(c.host, stack)
            witness = await c.create_running("witness")
            process = c.host.record(witness).child
            yield c, workers
            await c.delete_all(but="witness")
            assert c.host.states() == {witness.tart_name: "running"}
            assert await c.client.vms.get("witness") == witness
            assert c.host.record(witness).child == process
            await c.delete_all()
            assert ends_well(workers.last)
            assert processes_in(c.host.tart_home) == []


MAKING = ["pull before", "pull after", "clone before", "clone after", "fqn before", "set before", "set after"]


async def test_steps_interrupted_by_killing_the_worker_are_ended_and_repeated(tmp_path: Path) -> None:
    async with workers_to_kill(tmp_path) as (c, workers):
        for number, place in enumerate([*MAKING, "run before"]):
            name = f"vm-{number}"
            await workers.kill_at(place, partial(c.create, name, image_pull_policy="Always"))
            vm = await c.client.vms.wait(name)
            assert vm.state.restart_count == 0
            await eventually(partial(has_state, c.host, vm, "running"))
            # Each next worker would adopt it, too.
            await c.client.vms.delete(name)
        # Files that appear one after the other while the supervisor of a VM is started.
        for kind in ("note", "run", "log"):
            vm = await c.create(kind)
            await eventually((c.host.home / ORCHARD / "tart" / f"{vm.tart_name}.{kind}").exists)
            await workers.next()
            assert (await c.client.vms.wait(kind)).state.restart_count == 0
            await eventually(partial(c.has_started, kind))
            assert c.starts(kind) == ["alone"]
        for name, place in (("note", "delete before"), ("run", "delete after")):
            await workers.kill_at(place, partial(c.client.vms.delete, name))


# Where the worker is killed, the change of the user, and the state of the VM after it (or its failure).
CHANGES: list[tuple[str, dict[str, object], str]] = [
    ("suspend before", {"headless": True}, "running"),
    ("suspend after", {"headless": True}, VM_LOST),
    ("run before", {"headless": True}, "running"),
    ("run ending", {"cpu": 3}, "running"),
    ("set before", {"cpu": 3}, VM_LOST),
    ("set after", {"cpu": 3}, VM_LOST),
    ("suspend before", {"powerState": "suspended"}, "suspended"),
    ("suspend after", {"powerState": "suspended"}, "suspended"),
    ("run ending", {"powerState": "stopped"}, "stopped"),
]


@pytest.mark.slow
async def test_change_interrupted_by_killing_the_worker_is_made_or_the_vm_fails(tmp_path: Path) -> None:
    async with workers_to_kill(tmp_path) as (c, workers):
        for number, (place, patch, outcome) in enumerate(CHANGES):
            name = f"vm-{number}"
            before = await c.create_running(name, suspendable=True)
            await workers.kill_at(place, partial(c.client.vms.patch, name, patch))
            if outcome == VM_LOST:
                assert (await c.wait_vm(name, has_failed)).state.status_message == VM_LOST
                assert c.host.states()[before.tart_name] != "running"
            else:
                now = await c.wait_vm(name, lambda vm: vm.state.observed_generation == 1)
                assert (now.state.status, now.state.restart_count) == ("running", 0)
                assert now.condition("running") is (outcome == "running")
                await eventually(partial(has_state, c.host, now, outcome))
            # Each next worker would adopt it, too.
            await c.client.vms.delete(name)


@pytest.mark.slow
async def test_adoption_is_repeated_when_the_session_ends_before_it_is_complete(tmp_path: Path) -> None:
    # The host is not heard of while its worker is held, and must not be given up.
    timeout = ("--worker-offline-timeout", str(LONG_OFFLINE_TIMEOUT))
    listen = ("--listen", f"127.0.0.1:{(port := free_port())}", *timeout, *PLAIN)
    with killing_leftovers(tmp_path):
        async with Client(f"http://127.0.0.1:{port}") as client:
            c = ProcessCluster(tmp_path, client)
            with started("controller", *listen, home=tmp_path) as control:
                control.wait_for(LISTENING)
                with c.host.worker() as worker:
                    vm = await c.create_running("vm")
                    worker.stop(signal.SIGKILL)
                await c.host.run_without_supervisor("orchard-left")
                c.host.hold("list of VMs")
                with c.host.worker() as worker:
                    held = await c.host.wait_held()
                    control.stop(signal.SIGKILL)
                    await eventually(lambda: process_state(held) == "Z")
                    c.host.release()
                    with started("controller", *listen, home=tmp_path) as again:
                        again.wait_for(LISTENING)
                        await eventually(lambda: c.host.states() == {vm.tart_name: "running"})
                        await c.client.vms.patch("vm", headless=True)
                        now = await c.wait_vm("vm", lambda vm: vm.state.observed_generation == 1)
                        assert (now.uid, now.state.status, now.state.restart_count) == (vm.uid, "running", 0)
                        assert ends_well(worker)
                        await eventually(lambda: c.host.states() == {vm.tart_name: "running"})


# ---- two workers on one host ----------------------------------------------------------------------------------------


async def test_two_workers_on_one_host_leave_each_others_vms_and_calls_alone(tmp_path: Path) -> None:
    async with process_cluster(tmp_path) as c:
        second = ("--name", "second", "--labels", "second=1")
        with c.host.worker("--labels", "first=1") as first_worker:
            with c.host.worker(*second) as second_worker:
                a = await c.create_running("a", labels={"first": "1"})
                b = await c.create_running("b", labels={"second": "1"})
                children = [c.host.record(vm).child for vm in (a, b)]
                c.host.hold("clone before")
                made = await c.create("made", labels={"first": "1"})
                call = await c.host.wait_held()
                second_worker.stop(signal.SIGKILL)
            with c.host.worker(*second) as second_worker:
                await eventually(lambda: has_logged(second_worker, "adopted running VM"))
                await eventually(partial(is_online, c.client, "second"))
                assert process_state(call) != "Z", "the new worker has ended a call of the other one"
                c.host.release()
                await c.client.vms.wait("made")
                await c.client.vms.delete("b")
                await eventually(lambda: c.host.states() == dict.fromkeys([a.tart_name, made.tart_name], "running"))
                assert c.host.record(a).child == children[0]
                assert await c.client.vms.get("a") == a
                assert ends_well(second_worker)
            assert c.always_alone("a")
            assert c.always_alone("b")
            assert ends_well(first_worker)


async def test_vm_of_a_worker_in_another_directory_is_not_started_a_second_time(tmp_path: Path) -> None:
    """A worker takes the name of one on the same machine, and has its own directory and another TART_HOME."""
    async with process_cluster(tmp_path) as c:
        second = c.add_host("second/mac")
        with c.host.worker() as worker:
            vm = await c.create_running("vm")
            worker.stop(signal.SIGKILL)
        with second.worker() as worker:
            await c.wait_vm("vm", has_failed)
            await eventually(partial(is_online, c.client, "mac"))
            with pytest.raises(ResponseError) as refusal:
                await c.client.vms.restart("vm")
            assert refusal.value.status == 412
            assert has_state(c.host, vm, "running")
            assert ends_well(worker)
        with c.host.worker() as worker:
            await c.wait_vm("vm", lambda vm: vm.state.ended_at is not None)
            assert has_state(c.host, vm, "stopped")
            await c.client.vms.restart("vm")
            await c.wait_vm("vm", is_restarted)
            assert c.always_alone("vm")
            assert ends_well(worker)


async def test_vm_of_another_tart_home_is_adopted_and_ended(tmp_path: Path) -> None:
    async with process_cluster(tmp_path) as c:
        with c.host.worker() as worker:
            vm = await c.create_running("vm")
            worker.stop(signal.SIGKILL)
        with c.host.worker(TART_HOME=str(tmp_path / "other")) as worker:
            await eventually(lambda: has_logged(worker, "adopted running VM"))
            assert await c.client.vms.get("vm") == vm
            await c.client.vms.delete("vm")
            await eventually(lambda: has_state(c.host, vm, "stopped"))
            assert ends_well(worker)


async def is_online(client: Client, name: str) -> bool:
    return (await client.workers.get(name)).state == "online"


# ---- leases ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow(5)
async def test_vm_ends_before_it_is_started_elsewhere_when_its_worker_is_frozen_or_killed(tmp_path: Path) -> None:
    """A VM whose lease is made endless runs twice, which shows that the test notices it."""
    async with process_cluster(tmp_path, SHORT_OFFLINE_TIMEOUT) as c:
        names = ("frozen", "killed", "unleashed")
        hosts = {name: c.add_host(name) for name in names}
        with (
            hosts["frozen"].worker("--labels", "frozen=1") as frozen_worker,
            hosts["killed"].worker("--labels", "killed=1", TART_STUBBORN="1") as killed_worker,
            hosts["unleashed"].worker("--labels", "unleashed=1") as unleashed_worker,
        ):
            never = await c.create_running("never", labels={"frozen": "1"})
            for name in names:
                await c.create_running(name, labels={name: "1"}, restart_policy="OnFailure")
            await freeze(unleashed_worker)
            vm = await c.client.vms.get("unleashed")
            supervised.write_lease(
                hosts["unleashed"].home / ORCHARD / "tart" / f"{vm.tart_name}.lease", *supervisor.NEVER
            )
            killed_worker.stop(signal.SIGKILL)
            await freeze(frozen_worker)
            with c.host.worker("--labels", "frozen=1,killed=1,unleashed=1"):
                for name in names:
                    await c.wait_vm(name, is_restarted)
                now = {name: await c.client.vms.wait(name, until="ready") for name in names}
                assert {vm.state.worker for vm in now.values()} == {"mac"}
                for name in names:
                    await eventually(partial(c.has_started, name, 2))
                assert [c.always_alone(name) for name in names] == [True, True, False], "the endless lease is noticed"
                await c.wait_vm("never", has_failed)
                assert hosts["frozen"].states()[never.tart_name] == "running", (
                    "it has no lease, since it is never started elsewhere"
                )
                frozen_worker.process.send_signal(signal.SIGCONT)
                # When it goes on, the worker removes the VM that was started elsewhere, and stops the one that has failed.
                await eventually(lambda: hosts["frozen"].states() == {never.tart_name: "stopped"})
                assert await c.client.vms.get("frozen") == now["frozen"]
                assert ends_well(frozen_worker)


@pytest.mark.slow(10)
async def test_vm_with_a_stopped_supervisor_ends_before_it_is_started_elsewhere(tmp_path: Path) -> None:
    """The worker ends the VMs in the place of a supervisor that does not answer."""
    async with process_cluster(tmp_path, SHORT_OFFLINE_TIMEOUT) as c:
        with c.host.worker():
            # Before there is another host that could get them.
            vm = await c.create_running("vm", restart_policy="OnFailure")
            never = await c.create_running("never")
            with c.add_host("other").worker("--labels", "other=1"):
                for one in (vm, never):
                    os.kill(c.host.record(one).supervisor, signal.SIGSTOP)
                again = await c.wait_vm("vm", is_restarted)
                assert again.uid == vm.uid
                await eventually(partial(c.has_started, "vm", 2))
                assert c.always_alone("vm")
                await c.wait_vm("never", has_failed)
                await eventually(lambda: process_state(c.host.record(never).supervisor) == "Z")


async def test_only_leased_vms_end_while_the_controller_is_away(tmp_path: Path) -> None:
    listen = ("--listen", f"127.0.0.1:{(port := free_port())}", *PLAIN, "--worker-offline-timeout")
    with killing_leftovers(tmp_path):
        async with Client(f"http://127.0.0.1:{port}") as client:
            c = ProcessCluster(tmp_path, client)
            first = started("controller", *listen, str(SHORT_OFFLINE_TIMEOUT), home=tmp_path)
            with first as control, c.host.worker() as worker:
                control.wait_for(LISTENING)
                never, again = (
                    await c.create_running("never"),
                    await c.create_running("again", restart_policy="OnFailure"),
                )
                control.stop(signal.SIGKILL)
                await eventually(
                    lambda: c.host.states() == {never.tart_name: "running", again.tart_name: "stopped"}
                )  # fmt: skip
                # Otherwise it would give the worker up if that took longer than this to come back.
                with started("controller", *listen, str(LONG_OFFLINE_TIMEOUT), home=tmp_path) as control:
                    control.wait_for(LISTENING)
                    await c.wait_vm("again", is_restarted)
                    await eventually(partial(c.has_started, "again", 2))
                    assert c.always_alone("again")
                    now = await c.client.vms.get("never")
                    assert (now.uid, now.state.status, now.state.restart_count) == (never.uid, "running", 0)
                    assert c.starts("never") == ["alone"]
                    assert ends_well(worker)


# ---- VMs without a supervisor ---------------------------------------------------------------------------------------


async def test_vm_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    async with process_cluster(tmp_path) as c:
        with c.host.worker() as worker:
            vm = await c.create_running("vm")
            os.kill(c.host.record(vm).supervisor, signal.SIGKILL)
            failed = await c.wait_vm("vm", has_failed)
            assert "supervisor of the VM was killed" in failed.state.status_message
            assert c.host.states() == {vm.tart_name: "stopped"}
            assert ends_well(worker)


async def test_vm_without_a_supervisor_is_not_adopted(tmp_path: Path) -> None:
    async with process_cluster(tmp_path) as c:
        with c.host.worker() as worker:
            vm = await c.create_running("vm")
            worker.stop(signal.SIGKILL)
        os.kill(c.host.record(vm).supervisor, signal.SIGKILL)
        await c.host.run_without_supervisor("orchard-left")
        await c.host.run_without_supervisor("somebody-elses")
        assert c.host.states() == dict.fromkeys([vm.tart_name, "orchard-left", "somebody-elses"], "running")
        with c.host.worker() as worker:
            failed = await c.wait_vm("vm", has_failed)
            assert "was not started by a worker with this directory" in failed.state.status_message
            await eventually(lambda: c.host.states() == {vm.tart_name: "stopped", "somebody-elses": "running"})
            await c.client.vms.delete("vm")
            await eventually(lambda: c.host.states() == {"somebody-elses": "running"})
            assert ends_well(worker)
