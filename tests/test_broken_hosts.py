"""Workers on hosts on which something fails: they keep their sessions, say what fails, and harm no healthy VM."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from harness.inprocess import InProcessCluster
from harness.processes import GENEROUS, eventually

from orchard.client import Client, ConnectError, ResponseError
from orchard.schema import TART_VMS, VMSpec
from orchard.vm import ending
from orchard.vm.driver import DriverError, LocalVM
from orchard.work import reconciler
from orchard.work.failures import FailureLog
from orchard.work.heartbeat import HealthLog
from orchard.work.leftovers import RefusedError
from orchard.work.memory import ClusterMemory, read_instance_id


@pytest.fixture
async def cluster(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[InProcessCluster]:
    cluster = InProcessCluster(tmp_path, nursery)
    await cluster.start()
    yield cluster
    await cluster.stop()


async def has_problem(cluster: InProcessCluster, what: str) -> bool:
    with suppress(ResponseError):
        health = (await cluster.client.workers.get("mac")).health
        return health is not None and what in [problem.what for problem in health.problems]
    return False


async def has_state(cluster: InProcessCluster, state: str) -> bool:
    return (await cluster.client.workers.get("mac")).state == state


@pytest.mark.slow
async def test_failing_list_keeps_the_session_and_is_shown(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "_LAST_LIST_SECONDS", 0.01)
    driver, fails = cluster.driver(), True
    list_vms = driver.list_vms

    async def failing() -> list[LocalVM]:
        if fails:
            raise DriverError("noise beside the JSON")
        return await list_vms()

    monkeypatch.setattr(driver, "list_vms", failing)
    async with Client(cluster.client.url) as client, trio.open_nursery() as nursery:
        mac = cluster.worker(client)
        nursery.start_soon(mac.run)
        await eventually(partial(has_problem, cluster, "list"))
        assert await has_state(cluster, "offline")
        assert mac._sessions == 1
        await cluster.client.vms.create(name="vm", image="any")
        fails = False
        await cluster.client.vms.wait("vm")
        assert mac._sessions == 1
        assert not await has_problem(cluster, "list")
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_ended_leftover_that_cannot_be_deleted_holds_up_no_vm(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "LAST_RETRY_SECONDS", 0.01)
    driver, old = cluster.driver(), "orchard-old-uid-0"
    await driver.clone("image", old, lambda _: None)
    await nursery.start(driver.run, old, VMSpec())
    delete, refuses = driver.delete, True

    async def failing(name: str) -> None:
        if refuses and name == old:
            raise DriverError("busy")
        await delete(name)

    monkeypatch.setattr(driver, "delete", failing)
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        await eventually(partial(has_problem, cluster, "delete"))
        refuses = False
        await eventually(partial(is_gone, cluster, old))


async def is_gone(cluster: InProcessCluster, name: str) -> bool:
    return name not in await cluster.local_vms() and not await has_problem(cluster, "delete")


async def test_vm_that_waits_for_a_slot_says_for_whose(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, allowed = cluster.driver(), trio.Event()
    stop = driver.stop

    async def slow(name: str) -> None:
        await allowed.wait()
        await stop(name)

    monkeypatch.setattr(driver, "stop", slow)
    async with cluster.working(resources={TART_VMS: 1}):
        await cluster.client.vms.create(name="old", image="any")
        await cluster.client.vms.wait("old")
        await cluster.client.vms.delete("old")
        await cluster.client.vms.create(name="new", image="any")
        await cluster.wait_vm("new", lambda vm: '"old"' in vm.state.status_message)
        allowed.set()
        await cluster.client.vms.wait("new")


async def test_vm_that_a_restarted_worker_cannot_hold_fails_or_says_what_it_waits_for(
    cluster: InProcessCluster,
) -> None:
    create, wait_vm = cluster.client.vms.create, cluster.wait_vm
    async with cluster.working(resources={TART_VMS: 7}, stop_vms=False):
        await create(name="runs", image="any", resources={TART_VMS: 1})
        await cluster.client.vms.wait("runs")
        for name, needed in (("fits", 1), ("large", 3), ("next", 2)):
            await create(name=name, image="example.com/pull-60s", resources={TART_VMS: needed})
            await wait_vm(name, lambda vm: "image" in vm.state.status_message)
    async with cluster.working(resources={TART_VMS: 2}):
        large = await wait_vm("large", lambda vm: vm.state.status == "failed")
        assert f"3 {TART_VMS}, and it offers 2" in large.state.status_message
        await wait_vm("next", lambda vm: '"fits", "runs"' in vm.state.status_message)
        for name in ("runs", "fits"):
            await cluster.client.vms.delete(name)
        await wait_vm("next", lambda vm: "waiting" not in vm.state.status_message)


async def test_stopped_worker_says_goodbye(cluster: InProcessCluster) -> None:
    async with cluster.working():
        await eventually(partial(has_state, cluster, "online"))
    assert await has_state(cluster, "offline")


@pytest.mark.slow
async def test_failing_clone_is_shown_until_one_succeeds(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="orchard-none")
        await cluster.wait_vm("vm", lambda vm: vm.state.status == "failed")
        await eventually(partial(has_problem, cluster, "clone"))
        await cluster.client.vms.create(name="other", image="any")
        await cluster.client.vms.wait("other")
        await eventually(partial(has_no_problem, cluster))


async def has_no_problem(cluster: InProcessCluster) -> bool:
    health = (await cluster.client.workers.get("mac")).health
    return health is None or health.ok


# ---- identity -------------------------------------------------------------------------------------------------------


async def test_vm_of_another_worker_on_the_host_is_left_alone_and_an_earlier_run_is_not(
    cluster: InProcessCluster,
) -> None:
    async with cluster.working("other", stop_vms=False, machine_id="m"):
        await cluster.client.vms.create(name="vm", image="any")
        vm = await cluster.client.vms.wait("vm")
        host = cluster.driver()
        for name in (vm.tart_name, f"orchard-vm-{uuid.uuid4()}-0"):
            await host.clone("any", name, lambda _: None)
        async with cluster.working():
            await eventually(partial(only_left, cluster, vm.tart_name))


async def only_left(cluster: InProcessCluster, name: str) -> bool:
    return await cluster.local_vms() == [name]


async def test_worker_under_another_name_is_refused_while_its_vms_are_known_under_the_first(
    cluster: InProcessCluster,
) -> None:
    async with cluster.working(stop_vms=False, instance_id="i"):
        await cluster.client.vms.create(name="vm", image="any")
        vm = await cluster.client.vms.wait("vm")
    async with Client(cluster.client.url) as client:
        renamed = cluster.worker(client, "renamed", instance_id="i")
        # The same host under another name.
        renamed._vms._driver = renamed._vms._leftovers._driver = cluster.driver()
        with pytest.raises(RefusedError, match="mac"), trio.fail_after(GENEROUS):
            await renamed.run()
    assert [local.state for local in await cluster.driver().list_vms()] == ["running"]
    assert (await cluster.client.vms.get("vm")).state == vm.state


def test_instance_id_is_made_once(tmp_path: Path) -> None:
    first = read_instance_id(tmp_path / "new")
    assert read_instance_id(tmp_path / "new") == first
    assert read_instance_id(tmp_path / "other") != first
    assert (tmp_path / "new" / "instance-id").stat().st_mode & 0o777 == 0o600


def test_workers_that_start_at_the_same_time_make_one_identity(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def read(number: int) -> str:
        together.wait(GENEROUS)
        return read_instance_id(tmp_path / str(number))

    with ThreadPoolExecutor(4) as pool:
        for number in range(50):
            assert len(set(pool.map(read, [number] * 4))) == 1


def test_older_state_of_the_same_cluster_is_noticed_until_it_gets_another_id(tmp_path: Path) -> None:
    path = tmp_path / "cluster"
    ClusterMemory(path).observe("a", 7)
    memory = ClusterMemory(path)
    memory.observe("a", 6)
    assert (memory.is_restored, memory.highest) == (True, 7)
    memory.observe("a", 8)
    assert memory.is_restored, "the restored controller goes on counting"
    memory.observe("b", 2)
    assert (memory.is_restored, memory.highest) == (False, 2)
    memory.observe("", 0)
    assert not memory.is_restored, "an existing controller tells no revision"


@pytest.mark.parametrize("damaged", [b"", b"\xff\x00", b"{}", b"[" * 100_000])
def test_damaged_memory_of_the_cluster_counts_as_none(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "cluster"
    path.write_bytes(damaged)
    memory = ClusterMemory(path)
    assert (memory.cluster_id, memory.highest) == ("", 0)


# ---- health and log -------------------------------------------------------------------------------------------------


def test_health_tells_of_changes_and_forgets_what_may_not_be_tried_again() -> None:
    now, changes = 0.0, 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    log = HealthLog(lambda: now, changed)
    log.note("delete", "vm", "busy")
    log.note("delete", "vm", "still busy")
    log.note("clone", "", "no such image")
    assert changes == 2
    assert [(one.what, one.message) for one in log.current().problems] == [
        ("delete", "vm: still busy"),
        ("clone", "no such image"),
    ]
    now = 601.0
    assert [one.what for one in log.current().problems] == ["delete"]
    log.note("delete", "vm")
    assert (log.current().ok, changes) == (True, 3)


def test_lost_controller_is_logged_at_first_on_each_new_reason_and_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    log = FailureLog("w", lambda: now)
    with caplog.at_level(logging.WARNING):
        for seconds in range(125):
            now = float(seconds)
            log.note(ConnectError("refused"))
        assert len(caplog.records) == 3
        log.note(ConnectError("unreachable"))
        assert len(caplog.records) == 4
        for seconds in range(200, 400):
            now = float(seconds)
            log.note(ResponseError(409, "another machine has this name"))
        assert len(caplog.records) == 5, "what can never succeed is logged once"
        log.note(ResponseError(401, "wrong token"))
    assert [hasattr(record, "remedy") for record in caplog.records] == [False] * 5 + [True]
