"""The worker against a real controller on a loopback port: sync, adoption, reports, heartbeats, and requests."""

from __future__ import annotations

import datetime
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
import trio.testing
from harness.admission import Sender, admit_anybody
from harness.disks import no_space
from harness.inprocess import InProcessCluster
from harness.processes import GENEROUS, eventually
from trio_websocket import WebSocketConnection

from orchard import controller
from orchard.client import Client, ResponseError
from orchard.codec import dump_json
from orchard.net.connection import Service
from orchard.net.request import AnyResponse, Request, Response, WebSocketUpgrade
from orchard.net.server import serve
from orchard.resources.cluster import MAX_PENDING_OF_VM, MAX_TUNNELS_OF_VM
from orchard.schema import RUNTIMES, TART_VMS, VM, Runtime, Status, VMSpec, Worker
from orchard.tart import TartDriver
from orchard.vm import ending, supervised, supervisor
from orchard.vm.driver import DriverError, Hardware
from orchard.vm.instance import SHUT_DOWN, STOPPED
from orchard.vm.instance_state import Note
from orchard.vm.synthetic import SyntheticDriver
from orchard.work import heartbeat
from orchard.work import requests as worker_requests
from orchard.work.failures import backoff_seconds
from orchard.work.heartbeat import LastSeenClock, Lease
from orchard.work.leftovers import RefusedError
from orchard.work.reconciler import SYNC_ACTIONS, VM_LOST
from orchard.worker import WorkerService, host_resources, worker_parser


@pytest.fixture
async def cluster(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[InProcessCluster]:
    cluster = InProcessCluster(tmp_path, nursery)
    await cluster.start()
    yield cluster
    await cluster.stop()


# ---- the table of actions -------------------------------------------------------------------------------------------


def test_sync_actions_cover_every_pair_of_states() -> None:
    states = ("absent", *get_args(Status))
    assert set(SYNC_ACTIONS) == set(itertools.product(states, states))
    # A VM that the controller does not have is removed, and a VM that has failed at the controller is stopped.
    assert {SYNC_ACTIONS[here, "absent"] for here in states} == {"none", "remove"}
    assert {SYNC_ACTIONS[here, "failed"] for here in states} == {"stop", "report", "tell ended"}


# ---- VMs ------------------------------------------------------------------------------------------------------------


async def test_status_of_a_vm_is_reported_at_once(cluster: InProcessCluster) -> None:
    async with cluster.working():
        with trio.fail_after(GENEROUS):
            await cluster.client.vms.create(name="vm", image="any")
            async with cluster.client.vms.watch("vm") as changes:
                seen = []
                async for _, vm in changes:
                    seen.append((vm.state.status, vm.state.status_message))
                    if vm.state.status == "running":
                        break
    assert ("running", "") in seen
    assert vm.state.observed_generation == 0
    assert vm.state.image_fqn.startswith("any@sha256:")
    assert vm.condition("running")


async def test_changed_spec_is_applied_and_its_generation_observed(cluster: InProcessCluster) -> None:
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any", suspendable=True)
        await cluster.client.vms.wait("vm")
        await cluster.client.vms.patch("vm", headless=True)
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.observed_generation == 1)
        assert vm.condition("running")
        await cluster.client.vms.patch("vm", power_state="suspended")
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.observed_generation == 2)
        assert (vm.state.status, vm.condition("running"), vm.resting) == ("running", False, True)
        assert [one.state for one in await cluster.driver().list_vms()] == ["suspended"]
        # A suspended VM uses no slots, and can be cloned.
        for name in ("a", "b"):
            await cluster.client.vms.create(name=name, image="any" if name == "a" else vm.tart_name)
            await cluster.client.vms.wait(name)


async def test_failed_vm_with_restart_policy_is_restarted(cluster: InProcessCluster) -> None:
    async with cluster.working():
        script = {"script_content": "test -e ../../ran || { touch ../../ran; echo no; exit 1; }"}
        await cluster.client.vms.create(name="vm", image="any", restart_policy="OnFailure", startup_script=script)
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.restart_count == 1 and vm.state.status == "running")
        assert vm.tart_name.endswith("-1")
        await eventually(partial(one_left, cluster, vm.tart_name))


async def one_left(cluster: InProcessCluster, name: str) -> bool:
    return await cluster.local_vms() == [name]


async def test_deleted_vm_has_ended_before_another_starts_in_its_slot(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.working(resources={TART_VMS: 1}):
        driver = cluster.driver()
        story: list[str] = []
        run = driver.run

        async def recorded_run(name: str, *args: Any, **kwargs: Any) -> None:
            story.append(f"ran {name}")
            try:
                await run(name, *args, **kwargs)
            finally:
                story.append(f"ended {name}")

        monkeypatch.setattr(driver, "run", recorded_run)
        await cluster.client.vms.create(name="first", image="any")
        first = await cluster.client.vms.wait("first")
        await cluster.client.vms.create(name="second", image="any")
        await cluster.wait_vm("second", lambda vm: vm.state.status_message.endswith("(1 wanted, 0 free)"))
        await cluster.client.vms.delete("first")
        second = await cluster.client.vms.wait("second")
        assert story.index(f"ran {second.tart_name}") > story.index(f"ended {first.tart_name}")


@pytest.mark.slow
async def test_deleted_worker_registers_again_and_its_vm_has_failed(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.02)
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        await cluster.client.workers.delete("mac")
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.status == "failed")
        assert vm.state.status_message == 'worker "mac" was deleted'
        await eventually(partial(registered, cluster))


async def registered(cluster: InProcessCluster) -> bool:
    return [one.name for one in await cluster.client.workers.list()] == ["mac"]


async def wait_last_seen_later(cluster: InProcessCluster, milliseconds: int) -> None:
    """Wait until `last_seen` is later than now by so many milliseconds."""
    before = (await cluster.client.workers.get("mac")).last_seen
    assert before is not None

    async def later() -> bool:
        now = (await cluster.client.workers.get("mac")).last_seen
        return now is not None and now > before + datetime.timedelta(milliseconds=milliseconds)

    await eventually(later)


async def test_heartbeats_do_not_undo_a_scheduling_pause(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.02)
    async with cluster.working():
        await cluster.client.workers.pause("mac")
        await wait_last_seen_later(cluster, 40)
        assert (await cluster.client.workers.get("mac")).scheduling_paused
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.wait_vm("vm", lambda vm: vm.state.status_message == "waiting: 1 worker: 1 paused")
        await cluster.client.workers.pause("mac", paused=False)
        await cluster.client.vms.wait("vm")


class Proxy:
    """A TCP proxy in front of the controller that can go silent on its open connections without closing them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._silenced = trio.Event()
        self.connections = 0

    def silence(self) -> None:
        self._silenced.set()
        self._silenced = trio.Event()
        self.connections = 0

    async def serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        silenced = self._silenced
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server, silenced)
            nursery.start_soon(self._pump, server, client, silenced)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, silenced: trio.Event) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in source:
                if not silenced.is_set():
                    await sink.send_all(data)
            await sink.send_eof()


@pytest.mark.slow
async def test_worker_reconnects_when_the_controller_stops_answering(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.02)
    proxy = Proxy(cluster.port)
    listeners = await nursery.start(trio.serve_tcp, proxy.serve, 0)
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with Client(url, answer_seconds=0.2) as client:
        scope = trio.CancelScope()

        async def work(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await cluster.worker(client).run(task_status=task_status)

        await nursery.start(work)
        proxy.silence()
        await eventually(lambda: proxy.connections > 0)
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        scope.cancel()
    nursery.cancel_scope.cancel()


def test_last_seen_increases_when_the_clock_is_set_back() -> None:
    clock = LastSeenClock(partial(next, iter([2_000_000_000.0, 1_000_000_000.0, 1_000_000_001.0])))
    times = [clock.now() for _ in range(3)]
    assert times == sorted(set(times))
    assert times[0] == datetime.datetime.fromtimestamp(2_000_000_000, datetime.UTC)


def test_last_seen_is_later_than_what_the_controller_has() -> None:
    clock = LastSeenClock(lambda: 1_000_000_000.0)
    stored = datetime.datetime.fromtimestamp(1_000_000_007, datetime.UTC)
    clock.observe(stored)
    clock.observe(None)
    assert clock.now() > stored


async def test_last_seen_at_the_end_of_the_calendar_is_accepted(cluster: InProcessCluster) -> None:
    await cluster.client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 1}})
    await cluster.client.workers.put("mac", {"last_seen": "9999-12-31T23:59:59.999999Z"})
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")


async def test_scripts_know_the_names_of_their_vm_and_their_worker(cluster: InProcessCluster) -> None:
    async with cluster.working("studio"):
        script = {"script_content": 'echo "$ORCHARD_VM_NAME on $ORCHARD_WORKER_NAME"'}
        await cluster.client.vms.create(name="vm", image="any", startup_script=script)
        await cluster.client.vms.wait("vm", until="ready")
        assert [event.payload async for event in cluster.client.vms.events("vm")] == ["vm on studio"]


async def test_script_output_is_kept_while_the_controller_is_away(cluster: InProcessCluster) -> None:
    async with cluster.working():
        script = {"script_content": "echo before; while test ! -e ../go; do :; done; echo after"}
        await cluster.client.vms.create(name="vm", image="any", startup_script=script)
        vm = await cluster.client.vms.wait("vm")
        await eventually(partial(printed, cluster, ["before"]))
        await cluster.stop()
        (cluster.home / "vms" / "mac" / vm.tart_name / "go").touch()
        await cluster.start()
        await eventually(partial(printed, cluster, ["before", "after"]))
        assert (await cluster.client.vms.get("vm")).state.status == "running"


async def test_script_output_is_kept_while_the_disk_of_the_controller_is_full(cluster: InProcessCluster) -> None:
    cluster.events_disk.fault = no_space
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any", startup_script={"script_content": "echo said"})
        await eventually(lambda: len(cluster.events_disk.failed) > 1)
        assert await printed(cluster, [])
        cluster.events_disk.fault = lambda verb, number: 0
        await eventually(partial(printed, cluster, ["said"]))


async def printed(cluster: InProcessCluster, lines: list[str]) -> bool:
    return [event.payload async for event in cluster.client.vms.events("vm")] == lines


# ---- VMs of an earlier worker ---------------------------------------------------------------------------------------


async def test_only_unassigned_vms_with_our_prefix_are_deleted_at_the_start(cluster: InProcessCluster) -> None:
    driver = cluster.driver()
    for name in ("orchard-old-uid-0", "mine", "not-orchard-x"):
        await driver.clone("image", name, lambda _: None)
    async with cluster.working():
        await eventually(partial(left, cluster, ["mine", "not-orchard-x"]))


async def left(cluster: InProcessCluster, names: list[str]) -> bool:
    return sorted(await cluster.local_vms()) == names


async def test_removal_of_a_leftover_vm_is_retried(cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LAST_RETRY_SECONDS", 0.01)
    driver, failures = cluster.driver(), iter(range(3))
    await driver.clone("image", "orchard-old-uid-0", lambda _: None)
    delete = driver.delete

    async def failing(name: str) -> None:
        for _ in failures:
            raise DriverError("not now")
        await delete(name)

    monkeypatch.setattr(driver, "delete", failing)
    async with cluster.working():
        await eventually(partial(nothing_left, cluster))


async def test_running_leftover_vm_keeps_its_slot_until_it_has_ended(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "LAST_RETRY_SECONDS", 0.01)
    driver, old = cluster.driver(), "orchard-old-uid-0"
    await driver.clone("image", old, lambda _: None)
    await nursery.start(driver.run, old, VMSpec())
    stop, clone = driver.stop, driver.clone
    places: list[bool] = []
    assigned = False
    attempts = 0

    async def failing(name: str) -> None:
        nonlocal attempts
        attempts += assigned
        if attempts < 10:
            raise DriverError("not now")
        await stop(name)

    async def recorded_clone(source: str, name: str, on_progress: Callable[[int], None]) -> None:
        places.append(old not in await cluster.local_vms())
        await clone(source, name, on_progress)

    monkeypatch.setattr(driver, "stop", failing)
    monkeypatch.setattr(driver, "clone", recorded_clone)
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.wait_vm("vm", lambda vm: bool(vm.state.worker))
        assigned = True
        await cluster.client.vms.wait("vm")
    assert places == [True]


async def test_vms_outlive_their_worker_and_the_next_worker_adopts_them(cluster: InProcessCluster) -> None:
    async with cluster.working(stop_vms=False, resources={TART_VMS: 4}):
        for name in ("resting", "running", "gone", "unwanted"):
            await cluster.client.vms.create(name=name, image="any")
            await cluster.client.vms.wait(name)
        await cluster.client.vms.patch("resting", power_state="stopped")
        await cluster.wait_vm("resting", lambda vm: vm.resting)
        before = {vm.name: vm for vm in await cluster.client.vms.list()}
    assert len(await cluster.local_vms()) == 4
    await cluster.driver().stop(before["gone"].tart_name)
    await cluster.client.vms.delete("unwanted")
    async with cluster.working(stop_vms=False, resources={TART_VMS: 4}):
        lost = await cluster.wait_vm("gone", lambda vm: vm.state.status == "failed")
        assert lost.state.status_message == VM_LOST
        assert await cluster.client.vms.get("running") == before["running"]
        assert await cluster.client.vms.get("resting") == before["resting"]
        states = {vm.name: vm.state for vm in await cluster.driver().list_vms()}
        assert states == {
            before["running"].tart_name: "running",
            before["resting"].tart_name: "stopped",
            before["gone"].tart_name: "stopped",
        }
        # The adopted VM is supervised as before: its end is noticed and reported.
        await cluster.driver().stop(before["running"].tart_name)
        failed = await cluster.wait_vm("running", lambda vm: vm.state.status == "failed")
        assert failed.state.status_message == SHUT_DOWN
        for name in ("resting", "running", "gone"):
            await cluster.client.vms.delete(name)
        await eventually(partial(nothing_left, cluster))


async def test_vm_that_was_stopped_on_request_before_the_worker_restarted_has_not_failed(
    cluster: InProcessCluster,
) -> None:
    async with cluster.working(stop_vms=False):
        await cluster.client.vms.create(name="vm", image="any")
        vm = await cluster.client.vms.wait("vm")
    await cluster.client.vms.patch("vm", power_state="stopped")
    # A worker that is killed at this point has stopped the VM and not reported it.
    await cluster.driver().stop(vm.tart_name)
    async with cluster.working():
        await cluster.wait_vm("vm", lambda vm: vm.resting)


async def test_end_that_was_not_reported_before_the_worker_restarted_is_reported(cluster: InProcessCluster) -> None:
    """The controller waits for the end of a VM that it restarts, and the worker has ended and deleted the VM meanwhile."""
    async with cluster.working(stop_vms=False):
        await cluster.client.vms.create(name="vm", image="any")
        vm = await cluster.client.vms.wait("vm")
    await cluster.client.vms.restart("vm")
    # A worker that is killed at this point has reported nothing.
    await cluster.driver().stop(vm.tart_name)
    await cluster.driver().delete(vm.tart_name)
    async with cluster.working():
        again = await cluster.wait_vm("vm", lambda vm: vm.state.status == "running")
        assert (again.uid, again.state.restart_count) == (vm.uid, 1)


async def test_vm_that_was_started_but_not_reported_is_adopted(cluster: InProcessCluster) -> None:
    vm = await assigned_to_an_earlier_worker(cluster)
    driver = cluster.driver()
    await driver.clone("any", vm.tart_name, lambda _: None)
    driver.note(vm.tart_name, str(Note(1, Hardware(4, 8192, 0), suspendable=False)))
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, vm.tart_name, VMSpec())
        nursery.cancel_scope.cancel()
    async with cluster.working():
        await cluster.wait_vm(
            "vm", lambda vm: vm.state.status == "running" and vm.state.image_fqn.startswith("any@sha256:")
        )


async def test_vms_that_are_stopped_with_their_worker_are_reported_failed(cluster: InProcessCluster) -> None:
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
    vm = await cluster.client.vms.get("vm")
    assert (vm.state.status, vm.state.status_message) == ("failed", STOPPED)
    assert await cluster.local_vms() == []


async def test_failure_is_reported_only_after_the_guest_has_ended(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = cluster.driver()
    ended = trio.Event()
    stop = driver.stop

    async def slow(name: str) -> None:
        await ended.wait()
        await stop(name)

    monkeypatch.setattr(driver, "stop", slow)
    async with cluster.working():
        script = {"script_content": "echo begun; exit 1"}
        await cluster.client.vms.create(name="vm", image="any", startup_script=script)
        await eventually(partial(printed, cluster, ["begun"]))
        await cluster.client.vms.create(name="other", image="any")
        await cluster.client.vms.wait("other")
        assert (await cluster.client.vms.get("vm")).state.status == "running"
        ended.set()
        await cluster.wait_vm("vm", lambda vm: vm.state.status == "failed")


@pytest.mark.slow
async def test_leased_vms_end_before_the_controller_starts_them_elsewhere(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    cluster = InProcessCluster(tmp_path, nursery, worker_offline_timeout=3.0)
    await cluster.start()
    async with cluster.working(stop_vms=False):
        for policy in ("Never", "OnFailure"):
            await cluster.client.vms.create(name=policy, image="any", restart_policy=policy)
            await cluster.client.vms.wait(policy)
        names = {vm.name: vm.tart_name for vm in await cluster.client.vms.list()}
        await cluster.stop()
        await eventually(partial(runs_alone, cluster, names["Never"]))
        await cluster.start()
        again = await cluster.wait_vm(
            "OnFailure", lambda vm: vm.tart_name != names["OnFailure"] and vm.state.status == "running"
        )
        assert again.state.restart_count >= 1
        assert (await cluster.client.vms.get("Never")).state.status == "running", (
            "it has no lease, since it is never started elsewhere"
        )
    await cluster.stop()


async def test_lease_is_not_renewed_while_a_vm_runs_that_the_controller_has_given_up(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller starts such a VM elsewhere when the last lease before the deletion of the worker is over."""
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.02)
    driver, allowed = cluster.driver(), trio.Event()
    stop, lease = driver.stop, driver.lease
    renewed: list[bool] = []

    async def slow(name: str) -> None:
        await allowed.wait()
        await stop(name)

    def noted(soft: float, hard: float, names: Collection[str]) -> None:
        renewed.append(vm.tart_name in names)
        lease(soft, hard, names)

    monkeypatch.setattr(driver, "stop", slow)
    async with cluster.working(stop_vms=False):
        await cluster.client.vms.create(name="vm", image="any", restart_policy="OnFailure")
        vm = await cluster.client.vms.wait("vm")
        monkeypatch.setattr(driver, "lease", noted)
        await eventually(lambda: bool(renewed))
        assert all(renewed), "the lease of a VM that the controller wants is renewed"
        await cluster.client.workers.delete("mac")
        renewed.clear()
        await eventually(partial(registered, cluster))
        await eventually(lambda: len(renewed) > 3)
        assert not any(renewed)
        allowed.set()
        await cluster.client.vms.delete("vm")


def test_lease_is_not_longer_when_the_worker_is_stalled_while_renewing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker is stalled for 100 s between any two readings of the clock.
    monkeypatch.setattr(supervisor, "clock", partial(next, itertools.count(1000.0, 100.0)))
    lease = Lease(TartDriver("/none", tmp_path), supervisor.clock)
    supervised.write_lease(tmp_path / "vm.lease", *supervisor.NEVER)
    lease.begin_session(180.0, lease.now())
    lease.set_wanted({"vm"})
    assert list(supervisor.read_lease(tmp_path / "vm.lease")) == pytest.approx([1000.0 + 135.0, 1000.0 + 171.0])


def test_leases_are_renewed_of_wanted_vms_once_it_is_known_which_these_are() -> None:
    leases: list[tuple[float, float, Collection[str]]] = []

    class Recorder(SyntheticDriver):
        def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
            leases.append((soft, hard, names))

    lease = Lease(Recorder(Path("/none")), lambda: 0.0)
    lease.renew(10.0)
    assert leases == []
    lease.set_wanted({"a", "b"})
    assert leases == [(10.0 + 135.0, 10.0 + 171.0, {"a", "b"})], (
        "counted from the last answered heartbeat, 180 s by default"
    )
    lease.set_wanted({"b"})
    lease.renew(20.0)
    lease.renew(15.0)
    assert leases[1:] == [(20.0 + 135.0, 20.0 + 171.0, {"b"})] * 2
    lease.begin_session(40.0, 30.0)
    lease.renew(31.0)
    assert len(leases) == 3, "a new session does not know yet what the controller has given up"
    lease.set_wanted({"b"})
    assert leases[3:] == [(31.0 + 30.0, 31.0 + 38.0, {"b"})]


async def runs_alone(cluster: InProcessCluster, name: str) -> bool:
    return [vm.name for vm in await cluster.driver().list_vms() if vm.state == "running"] == [name]


async def nothing_left(cluster: InProcessCluster) -> bool:
    return await cluster.local_vms() == []


async def assigned_to_an_earlier_worker(cluster: InProcessCluster) -> VM:
    """Create a VM, and let a worker of the name "mac" learn of it and end."""
    await cluster.client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 2}})
    async with cluster.client.rpc_watch("mac"):
        await cluster.client.vms.list(worker="mac")
        await cluster.client.vms.create(name="vm", image="any")
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.worker == "mac")
        # The earlier worker learns of the VM here.
        await cluster.client.vms.list(worker="mac")
    return vm


async def test_incomplete_vm_is_created_again(cluster: InProcessCluster) -> None:
    vm = await assigned_to_an_earlier_worker(cluster)
    await cluster.driver().clone("half", vm.tart_name, lambda _: None)
    async with cluster.working():
        assert (await cluster.client.vms.wait("vm")).state.restart_count == 0
        assert await cluster.local_vms() == [vm.tart_name]


# ---- reconnecting ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_each_broken_session_is_followed_by_a_random_pause(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []

    def noted(count: int, chance: float, *, permanent: bool) -> float:
        failures.append(count)
        return backoff_seconds(count, chance, permanent=permanent)

    monkeypatch.setattr("orchard.worker.backoff_seconds", noted)
    async with cluster.working() as mac:
        for arrivals in (1, 2, 3):
            await eventually(partial(has_registered, mac, arrivals))
            failures.clear()
            await cluster.stop()
            await eventually(lambda: len(failures) >= 2)
            assert failures[:2] == [0, 1]
            await cluster.start()
        await eventually(partial(has_registered, mac, 4))


def has_registered(mac: WorkerService, times: int) -> bool:
    return mac._sessions == times


def test_thousand_workers_reconnect_within_two_seconds_and_spread_out() -> None:
    order = random.Random(1)
    # Seconds from the end of all sessions to the return of the controller.
    for away in (0.0, 0.5, 3.0, 60.0):
        returns = []
        for _ in range(1000):
            at = 0.0
            for failures in itertools.count():
                at += backoff_seconds(failures, order.random())
                if at >= away:
                    break
            returns.append(at - away)
        assert max(returns) < 2.0
        crowds = Counter(int(at * 10) for at in returns)
        assert max(crowds.values()) < 250, f"of 1,000 in a tenth of a second, after {away} seconds: {crowds}"


# ---- registration ---------------------------------------------------------------------------------------------------


async def test_name_of_another_machine_is_refused_until_it_is_free(cluster: InProcessCluster) -> None:
    await cluster.client.workers.register({"name": "mac", "machine_id": "another"})
    async with Client(cluster.client.url) as client, trio.open_nursery() as nursery:
        mac = cluster.worker(client)
        with pytest.raises(ResponseError) as refused:
            await mac._register()
        assert refused.value.status == 409
        nursery.start_soon(mac.run)
        await cluster.client.workers.delete("mac")
        await eventually(mac._vms.adopted.is_set)
        nursery.cancel_scope.cancel()


async def test_worker_gives_up_when_its_first_registration_is_refused(tmp_path: Path, nursery: trio.Nursery) -> None:
    settings = controller.ControllerSettings(data_dir=tmp_path / "c", host="127.0.0.1", port=0, tls=False)
    running: controller.Running = await nursery.start(partial(controller.run, settings))
    async with Client(running.url, account="nobody", token="t") as client:
        description = Worker(name="w", machine_id="m", resources={})
        with pytest.raises(RefusedError, match="unknown service account"):
            await WorkerService(description, client, SyntheticDriver(tmp_path / "vms")).run()
    nursery.cancel_scope.cancel()


# ---- addresses ------------------------------------------------------------------------------------------------------


async def test_one_look_up_of_an_address_serves_all_that_wait_for_it(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.working() as mac:
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        driver, found, begun, ended = cluster.driver(), trio.Event(), 0, 0
        ip = driver.ip

        async def slow(name: str, *, bridged: bool = False) -> str:
            nonlocal begun, ended
            begun += 1
            try:
                await found.wait()
                return await ip(name, bridged=bridged)
            finally:
                ended += 1

        monkeypatch.setattr(driver, "ip", slow)
        (instance,) = mac._vms.instances.values()
        addresses: list[str] = []

        async def ask(scope: trio.CancelScope) -> None:
            with scope:
                addresses.append(await mac._requests._address(instance.vm.uid, nursery))

        scopes = [trio.CancelScope() for _ in range(3)]
        for scope in scopes:
            nursery.start_soon(ask, scope)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for scope in scopes[:2]:
            scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (begun, ended) == (1, 0), "one still waits"
        scopes[2].cancel()
        await eventually(lambda: ended == 1)
        for _ in scopes:
            nursery.start_soon(ask, trio.CancelScope())
        await eventually(lambda: begun == 2)
        found.set()
        await eventually(lambda: addresses == ["127.0.0.1"] * 3)
        assert (begun, ended) == (2, 2)


async def test_look_up_of_an_address_ends_when_the_client_that_asked_leaves(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        begun, ended = trio.Event(), trio.Event()

        async def hang(name: str, *, bridged: bool = False) -> str:
            begun.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        monkeypatch.setattr(cluster.driver(), "ip", hang)
        async with trio.open_nursery() as client:
            client.start_soon(cluster.client.vms.ip, "vm")
            await begun.wait()
            client.cancel_scope.cancel()
        await ended.wait()


# ---- a malicious controller -----------------------------------------------------------------------------------------


class Impostor:
    """A controller that accepts a worker, sends it the given actions, and never answers what the worker sends for them."""

    def __init__(self, *actions: object) -> None:
        self._actions = actions
        # Paths and error messages of the worker's requests.
        self.received: list[tuple[str, str | None]] = []

    async def handle(self, request: Request, _: Sender) -> AnyResponse:
        mac = {"name": "mac"}
        answers: dict[str, object] = {
            "/v1/workers": mac,
            "/v1/workers/mac": mac,
            "/v1/controller/info": {},
            "/v1/vms": [],
        }
        if request.path in answers:
            return Response(200, dump_json(answers[request.path]))
        if request.path == "/v1/rpc/watch":
            return WebSocketUpgrade(self._watch)
        self.received.append((request.path.removeprefix("/v1/rpc/"), request.query.one("errorMessage")))
        await trio.sleep_forever()
        raise AssertionError

    async def _watch(self, websocket: WebSocketConnection) -> None:
        for action in self._actions:
            await websocket.send_message(dump_json(action))
        await trio.sleep_forever()

    @asynccontextmanager
    async def working(self, cluster: InProcessCluster) -> AsyncIterator[None]:
        """Run a worker that is connected to this controller for the time of the block."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, Service(self.handle, admit_anybody), listeners))
            async with Client(url) as client:
                await nursery.start(cluster.worker(client).run)
                yield
                nursery.cancel_scope.cancel()


def forward_action(port: object, session: object = "s") -> object:
    return {"portForwardAction": {"session": session, "vmUID": "", "port": port}}


async def test_invalid_actions_are_ignored(cluster: InProcessCluster, caplog: pytest.LogCaptureFixture) -> None:
    invalid = [forward_action(port) for port in (0, -1, 65536, 10**19, "22", None)]
    invalid += [forward_action(22, 7), {"portForwardAction": {}}, {"resolveIPAction": []}, {"a\nb": 1}, {}]
    impostor = Impostor(*invalid, {"resolveIPAction": {"session": "s", "vmUID": "none"}})
    async with impostor.working(cluster):
        await eventually(lambda: impostor.received == [("resolve-ip", "no VM with uid none runs on this worker")])
    ignored = [record for record in caplog.records if record.getMessage() == "unknown action ignored"]
    assert len(ignored) == len(invalid)


async def test_number_of_requests_in_progress_is_bounded(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_requests, "_MAX_TUNNELS", 2)
    monkeypatch.setattr(worker_requests, "_MAX_REQUESTS", 3)
    async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listener:
        port = listener.socket.getsockname()[1]
        impostor = Impostor(*[forward_action(port)] * 5)
        async with impostor.working(cluster):
            await eventually(lambda: len(impostor.received) == 3)
            await eventually(lambda: caplog.text.count("action ignored, too many running") == 2)
    assert sorted(impostor.received) == [
        ("port-forward", ""),
        ("port-forward", ""),
        ("port-forward", "the worker has 2 tunnels open, which is its limit; close some"),
    ]


async def test_all_requests_that_a_controller_may_have_for_one_vm_are_taken(
    cluster: InProcessCluster, caplog: pytest.LogCaptureFixture
) -> None:
    action = {"resolveIPAction": {"session": "s", "vmUID": "none"}}
    impostor = Impostor(*[action] * (MAX_TUNNELS_OF_VM + MAX_PENDING_OF_VM), {})
    async with impostor.working(cluster):
        await eventually(lambda: "unknown action ignored" in caplog.text)
    assert "too many running" not in caplog.text


def test_each_runtime_has_traits_and_a_driver() -> None:
    assert RUNTIMES.keys() == set(get_args(Runtime))
    for runtime, traits in RUNTIMES.items():
        assert worker_parser().parse_args(["http://c", "--runtime", runtime]).runtime == runtime
        assert (TART_VMS in host_resources(runtime)) is traits.runs_macos
