"""Decisions about broken and ambiguous clusters, each in a scripted run of the simulated cluster.

Each decision has a planted bug that takes it back, and the same run finds the bug.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from fault_schedule import deterministic_trio
from harness.network import Process
from simulated_cluster import CONTROLLER, NO_BUG, USER, PlantedBug, SimulatedCluster, planted, size_of
from trio.testing import MockClock

from orchard.client import Client
from orchard.schema import TART_VMS, VM, RestartPolicy

pytestmark = pytest.mark.slow

# Of a cluster with three machines.
SEED = 5
TIMEOUT, SHORT_TIMEOUT = 60.0, 8.0  # seconds
# After an older state was accepted: workers look every five seconds, and tell it in a heartbeat, at most one a second.
ONLINE_SECONDS = 6.5

Script = Callable[[SimulatedCluster, Client], Awaitable[None]]


def violations(directory: Path, script: Script, bug: PlantedBug = NO_BUG) -> list[str]:
    """Run a script in a cluster of three healthy machines; return the violations."""
    trace: list[str] = []

    async def run() -> list[str]:
        async with trio.open_nursery() as nursery:
            cluster = SimulatedCluster(random.Random(SEED), directory, nursery, bug, trace)
            assert len(cluster.machines) == 3
            for machine in cluster.machines.values():
                machine.troubled = False
            with cluster.logged():
                await cluster.start_controller(TIMEOUT, ping_interval=2.0)
                async with cluster.client(Process(USER), 20.0) as client:
                    await script(cluster, client)
            nursery.cancel_scope.cancel()
        return cluster.violations

    with deterministic_trio(SEED), planted(bug):
        return trio.run(run, clock=MockClock(autojump_threshold=0), strict_exception_groups=True)


async def start_workers(cluster: SimulatedCluster, *names: str) -> None:
    for name in names or cluster.machines:
        cluster.start_worker(name)
    await trio.sleep(5)


async def create(client: Client, name: str, policy: RestartPolicy = "OnFailure") -> None:
    await client.vms.create(name=name, image="image", restart_policy=policy, resources={TART_VMS: size_of(name)})


async def wait_vm(client: Client, name: str, condition: Callable[[VM], bool]) -> VM:
    with trio.fail_after(600):
        while not condition(vm := await client.vms.get(name)):  # noqa: ASYNC110 -- over the API
            await trio.sleep(0.25)
    return vm


def runs(vm: VM) -> bool:
    return vm.state.status == "running"


def cut_off(cluster: SimulatedCluster, name: str) -> None:
    cluster.network.cut(name, CONTROLLER)
    cluster.network.cut(CONTROLLER, name)


async def restart_with_a_shorter_timeout(cluster: SimulatedCluster, client: Client) -> None:
    await start_workers(cluster)
    await create(client, "vm-0")
    vm = await wait_vm(client, "vm-0", runs)
    cut_off(cluster, vm.state.worker)
    cluster.controller.kill()
    await cluster.controller.ended.wait()
    await cluster.start_controller(SHORT_TIMEOUT, ping_interval=2.0)
    await trio.sleep(2 * TIMEOUT)
    again = await wait_vm(client, "vm-0", runs)
    assert (again.state.restart_count, again.state.worker != vm.state.worker) == (1, True)


async def stopped_supervisor_on_a_host_that_is_cut_off(cluster: SimulatedCluster, client: Client) -> None:
    await start_workers(cluster)
    await create(client, "vm-0")
    vm = await wait_vm(client, "vm-0", runs)
    cluster.machines[vm.state.worker].guests[vm.tart_name].is_supervised = False
    cut_off(cluster, vm.state.worker)
    again = await wait_vm(client, "vm-0", lambda vm: vm.state.restart_count == 1 and runs(vm))
    assert again.state.worker != vm.state.worker


async def cut_off_worker_that_knows_of_its_vm(cluster: SimulatedCluster, client: Client) -> None:
    await start_workers(cluster)
    await create(client, "vm-0", "Never")
    vm = await wait_vm(client, "vm-0", lambda vm: bool(vm.state.worker))
    await client.vms.list(worker=vm.state.worker)
    # It has what it needs to start the VM.
    await trio.sleep(0.5)
    cut_off(cluster, vm.state.worker)
    await trio.sleep(TIMEOUT - 15)
    now = await client.vms.get("vm-0")
    if now.state.worker == vm.state.worker:
        await wait_vm(client, "vm-0", lambda vm: vm.state.status == "failed")
    await trio.sleep(TIMEOUT)


async def two_workers_with_one_name(cluster: SimulatedCluster, client: Client) -> None:
    await start_workers(cluster, "mac-1")
    await create(client, "vm-0")
    before = await wait_vm(client, "vm-0", runs)
    cluster.start_worker("mac-1", machine="mac-2")
    await trio.sleep(2 * TIMEOUT)
    now = await client.vms.get("vm-0")
    if now.uid == before.uid and now.state.restart_count != before.state.restart_count:
        cluster.violate("the VM was restarted although its worker works")


async def controller_restored_from_a_copy(cluster: SimulatedCluster, client: Client) -> None:
    """The copy has vm-0 as pending, while it runs on a worker that is cut off, and does not have vm-1."""
    await create(client, "vm-0")
    copy = cluster.directory.with_name("copy")
    shutil.copytree(cluster.directory, copy)
    await start_workers(cluster)
    old = (await wait_vm(client, "vm-0", runs)).state.worker
    await client.workers.pause(old)
    await create(client, "vm-1")
    young = await wait_vm(client, "vm-1", runs)
    cluster.controller.kill()
    await cluster.controller.ended.wait()
    cut_off(cluster, old)
    shutil.rmtree(cluster.directory)
    copy.rename(cluster.directory)
    await cluster.start_controller(TIMEOUT, ping_interval=2.0)
    await client.close_idle()
    # A worker that has seen the newer state is the first to come back; the others are of the existing Orchard.
    noticed = {"name": "noticed", "capabilities": ["worker-state"], "highestRevision": 10_000}
    await client.workers.register({**noticed, "resources": {TART_VMS: 0}})
    await trio.sleep(10)
    assert (await client.vms.get("vm-0")).state.worker == ""
    if young.tart_name not in cluster.machines[young.state.worker].guests:
        cluster.violate("a VM was ended that is younger than the copy")
    await client.accept_state()
    await wait_vm(client, "vm-0", runs)


async def workers_of_a_controller_that_was_restored(cluster: SimulatedCluster, client: Client) -> None:
    """The copy does not have vm-1, whose worker has seen a newer state. A worker that is started again remembers it."""
    await start_workers(cluster, "mac-1")
    await create(client, "vm-0")
    old = await wait_vm(client, "vm-0", runs)
    copy = cluster.directory.with_name("copy")
    shutil.copytree(cluster.directory, copy)
    await create(client, "vm-1")
    young = await wait_vm(client, "vm-1", runs)
    cluster.controller.kill()
    await cluster.controller.ended.wait()
    shutil.rmtree(cluster.directory)
    copy.rename(cluster.directory)
    await cluster.start_controller(TIMEOUT, ping_interval=2.0)
    await client.close_idle()
    guests = cluster.machines["mac-1"].guests
    for again in (False, True):
        if again:
            cluster.workers["mac-1"].kill()
            await start_workers(cluster, "mac-1")
        await trio.sleep(2 * TIMEOUT)
        if not {old.tart_name, young.tart_name} <= guests.keys():
            cluster.violate("a worker ended a VM for a state that is older than one that it has seen")
            return
        health = (await client.workers.get("mac-1")).health
        assert health is not None
        assert [young.tart_name in one.message for one in health.problems if one.what == "unknown-vms"] == [True]
    await create(client, "vm-2")
    await trio.sleep(TIMEOUT)
    assert (await client.vms.get("vm-2")).state.worker == ""
    await client.accept_state()
    with trio.fail_after(ONLINE_SECONDS):
        while (await client.workers.get("mac-1")).state != "online":  # noqa: ASYNC110 -- over the API
            await trio.sleep(0.25)
    await wait_vm(client, "vm-2", runs)
    now = await client.vms.get("vm-0")
    assert (now.uid, now.state.restart_count, runs(now)) == (old.uid, 0, True)
    assert old.tart_name in guests
    assert young.tart_name not in guests
    health = (await client.workers.get("mac-1")).health
    assert health is None or health.ok


async def worker_under_another_name(cluster: SimulatedCluster, client: Client) -> None:
    """The host gets a worker of another name before the controller counts the first as offline, and after that."""
    identity = {"machine_id": "m", "instance_id": "i"}
    cluster.start_worker("mac-1", **identity)
    await create(client, "vm-0")
    vm = await wait_vm(client, "vm-0", lambda vm: vm.condition("ready"))
    guest = cluster.machines["mac-1"].guests[vm.tart_name]
    for pause in (0.0, 5.0):
        cluster.workers["mac-1"].kill()
        await trio.sleep(pause)
        cluster.start_worker("renamed", machine="mac-1", **identity)
        renamed = cluster.workers["mac-1"]
        await trio.sleep(10)
        if guest.order:
            cluster.violate("the worker ended a VM that the controller has under another name of its host")
            return
        assert renamed.ended.is_set() is bool(pause), "it is refused once the first worker is offline"
        renamed.kill()
        cluster.start_worker("mac-1", **identity)
        await trio.sleep(TIMEOUT)
        assert await client.vms.get("vm-0") == vm


async def worker_that_says_goodbye(cluster: SimulatedCluster, client: Client) -> None:
    await start_workers(cluster)
    await create(client, "vm-0", "Never")
    stopped = (await wait_vm(client, "vm-0", runs)).state.worker
    cluster.workers[stopped].scope.cancel()
    await cluster.workers[stopped].ended.wait()
    await create(client, "vm-1", "Never")
    if (await wait_vm(client, "vm-1", lambda vm: bool(vm.state.worker))).state.worker == stopped:
        cluster.violate("a VM was assigned to a worker that has stopped")


async def restart_on_a_host_that_is_cut_off(cluster: SimulatedCluster, client: Client) -> None:
    """A VM with a lease starts elsewhere when the lease is over, and one without when its worker is back."""
    await start_workers(cluster)
    await create(client, "vm-0")
    await create(client, "vm-1", "Never")
    leased = await wait_vm(client, "vm-0", runs)
    unleased = await wait_vm(client, "vm-1", runs)
    for vm in (leased, unleased):
        cut_off(cluster, vm.state.worker)
        await client.vms.restart(vm.name)
    again = await wait_vm(client, "vm-0", lambda vm: vm.state.restart_count == 1 and runs(vm))
    assert again.state.worker != leased.state.worker
    await trio.sleep(2 * TIMEOUT)
    waiting = await client.vms.get("vm-1")
    if waiting.state.restart_count or unleased.tart_name not in cluster.machines[unleased.state.worker].guests:
        cluster.violate("a VM without lease was restarted although it may run")
        return
    cluster.network.heal(unleased.state.worker, CONTROLLER)
    await wait_vm(client, "vm-1", lambda vm: vm.state.restart_count == 1 and runs(vm))


async def restart_on_a_worker_that_is_deleted(cluster: SimulatedCluster, client: Client) -> None:
    """A VM without a lease is not restarted, and says why, until its host is back and has reported its end."""
    await start_workers(cluster)
    await create(client, "vm-0", "Never")
    vm = await wait_vm(client, "vm-0", runs)
    cut_off(cluster, vm.state.worker)
    await client.vms.restart(vm.name)
    await client.workers.delete(vm.state.worker)
    failed = await wait_vm(client, "vm-0", lambda vm: not vm.state.end_request)
    assert (failed.state.status, failed.state.restart_count) == ("failed", 0)
    assert vm.state.worker in failed.state.status_message
    cluster.network.heal(vm.state.worker, CONTROLLER)
    await wait_vm(client, "vm-0", lambda vm: vm.state.ended_at is not None)
    await client.vms.restart(vm.name)
    await wait_vm(client, "vm-0", lambda vm: vm.state.restart_count == 1 and runs(vm))


async def drain_with_shutdown_scripts(cluster: SimulatedCluster, client: Client) -> None:
    """The worker is drained only when the shutdown scripts of its VMs, some of which hang, are over."""
    await start_workers(cluster, "mac-1")
    script = {"shutdown_script": {"script_content": "sync"}, "shutdownTimeoutSeconds": 40}
    for name in ("vm-0", "vm-1"):
        await client.vms.create(
            {"name": name, "image": "image", "restart_policy": "OnFailure", "resources": {TART_VMS: 1}, **script}
        )
        await wait_vm(client, name, runs)
    await start_workers(cluster, "mac-2")
    await client.workers.drain("mac-1", deadline_seconds=30)
    await trio.sleep(25)
    assert runs(await client.vms.get("vm-0"))
    with trio.fail_after(200):
        while (await client.workers.get("mac-1")).state != "drained":  # noqa: ASYNC110 -- over the API
            await trio.sleep(1)
    if cluster.machines["mac-1"].guests:
        cluster.violate("a worker is called drained on which a VM runs")
    for name in ("vm-0", "vm-1"):
        assert (await wait_vm(client, name, runs)).state.worker == "mac-2"


async def sick_host(cluster: SimulatedCluster, client: Client) -> None:
    cluster.machines["mac-1"].broken = "clone"
    await start_workers(cluster)
    for number in range(10):
        await create(client, f"vm-{number}", "Never")
        vm = await wait_vm(client, f"vm-{number}", lambda vm: vm.state.status != "pending")
        if runs(vm):
            await client.vms.delete(vm.name)
    vms = await client.vms.list()
    if len(vms) == 10:
        cluster.violate("all jobs failed on one worker")


async def sick_host_and_a_vm_that_restarts(cluster: SimulatedCluster, client: Client) -> None:
    cluster.machines["mac-1"].broken = "clone"
    await start_workers(cluster)
    await create(client, "vm-0")
    with trio.move_on_after(2 * TIMEOUT) as scope:
        await wait_vm(client, "vm-0", runs)
    if scope.cancelled_caught:
        cluster.violate("the VM goes to the same worker again and again")


async def host_that_fails_listing(cluster: SimulatedCluster, client: Client) -> None:
    cluster.machines["mac-1"].broken = "list"
    await start_workers(cluster, "mac-1")
    await create(client, "vm-0")
    await trio.sleep(TIMEOUT)
    waiting = await client.vms.get("vm-0")
    assert (waiting.state.worker, bool(waiting.state.status_message)) == ("", True)
    assert (await client.workers.get("mac-1")).state == "offline"
    await start_workers(cluster, "mac-2")
    assert (await wait_vm(client, "vm-0", runs)).state.worker == "mac-2"
    cluster.machines["mac-1"].broken = ""
    with trio.fail_after(600):
        while (await client.workers.get("mac-1")).state != "online":  # noqa: ASYNC110 -- over the API
            await trio.sleep(1)


SCENARIOS: list[tuple[Script, PlantedBug]] = [
    (restart_with_a_shorter_timeout, PlantedBug(forgets_promises=True)),
    (stopped_supervisor_on_a_host_that_is_cut_off, PlantedBug(trusts_supervisors=True)),
    (cut_off_worker_that_knows_of_its_vm, PlantedBug(unassigns_named=True)),
    (two_workers_with_one_name, PlantedBug(replaces_watches=True)),
    (controller_restored_from_a_copy, PlantedBug(forgets_restored=True)),
    (workers_of_a_controller_that_was_restored, PlantedBug(forgets_revisions=True)),
    (worker_under_another_name, PlantedBug(forgets_names=True)),
    (worker_that_says_goodbye, PlantedBug(forgets_goodbyes=True)),
    (restart_on_a_host_that_is_cut_off, PlantedBug(restarts_unended=True)),
    (drain_with_shutdown_scripts, PlantedBug(restarts_unended=True)),
    (sick_host, PlantedBug(forgets_failures=True)),
    (sick_host_and_a_vm_that_restarts, PlantedBug(forgets_failures=True)),
]


@pytest.mark.parametrize(
    "script", [*(script for script, _ in SCENARIOS), host_that_fails_listing, restart_on_a_worker_that_is_deleted]
)
def test_decision_holds(tmp_path: Path, script: Script) -> None:
    assert violations(tmp_path / "controller", script) == []


@pytest.mark.parametrize(("script", "bug"), SCENARIOS)
def test_decision_that_is_taken_back_is_noticed(tmp_path: Path, script: Script, bug: PlantedBug) -> None:
    assert violations(tmp_path / "controller", script, bug) != []
