"""VMs whose guests end slowly: deletions, restarts, drains and slots, with a real controller and synthetic VMs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.inprocess import InProcessCluster
from harness.processes import eventually

from orchard.schema import TART_VMS, VM
from orchard.work import heartbeat, reconciler
from orchard.work.slots import Slots


@pytest.fixture
async def cluster(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[InProcessCluster]:
    cluster = InProcessCluster(tmp_path, nursery)
    await cluster.start()
    yield cluster
    await cluster.stop()


class Shutdown:
    """A shutdown script that says when it has begun, and waits until `go` is called."""

    def __init__(self, directory: Path) -> None:
        self._begun, self._go = directory / "begun", directory / "go"

    @property
    def fields(self) -> dict[str, Any]:
        text = f"echo $ORCHARD_VM_NAME >> {self._begun}; until [ -e {self._go} ]; do sleep 0.01; done"
        return {"shutdown_script": {"script_content": text}, "shutdown_timeout_seconds": 600}

    def begun(self) -> list[str]:
        return self._begun.read_text().split() if self._begun.exists() else []

    def go(self) -> None:
        self._go.touch()


@pytest.fixture
def shutdown(tmp_path: Path) -> Shutdown:
    return Shutdown(tmp_path)


async def gone(cluster: InProcessCluster, vm: VM) -> bool:
    return vm.tart_name not in await cluster.local_vms()


async def test_deleted_vm_frees_its_name_at_once_and_its_slot_when_it_is_shut_down(
    cluster: InProcessCluster, shutdown: Shutdown
) -> None:
    async with cluster.working(resources={TART_VMS: 2}):
        await cluster.client.vms.create(name="old", image="any", **shutdown.fields)
        await cluster.client.vms.create(name="other", image="any")
        old = await cluster.client.vms.wait("old")
        await cluster.client.vms.wait("other")
        await cluster.client.vms.delete("old")
        await eventually(lambda: shutdown.begun() == ["old"])
        # The same name, on the same slot.
        await cluster.client.vms.create(name="old", image="any")
        await cluster.wait_vm("old", lambda vm: vm.state.status_message == 'waiting for "old" to end')
        assert old.tart_name in await cluster.local_vms()
        # Another slot is not affected.
        await cluster.client.vms.delete("other")
        await eventually(partial(runs, cluster, "old"))
        assert not await gone(cluster, old)
        shutdown.go()
        await eventually(partial(gone, cluster, old))


async def test_vm_that_is_deleted_while_it_waits_for_resources_keeps_them_from_no_other(
    cluster: InProcessCluster, shutdown: Shutdown
) -> None:
    async with cluster.working(resources={TART_VMS: 3, "gpu": 2}):
        await cluster.client.vms.create(name="old", image="any", resources={"gpu": 1}, **shutdown.fields)
        await cluster.client.vms.wait("old")
        await cluster.client.vms.delete("old")
        await eventually(lambda: shutdown.begun() == ["old"])
        await cluster.client.vms.create(name="big", image="any", resources={"gpu": 2})
        await cluster.wait_vm("big", lambda vm: vm.state.status_message == 'waiting for "old" to end')
        await cluster.client.vms.delete("big")
        await cluster.client.vms.create(name="small", image="any", resources={"gpu": 1})
        await eventually(partial(runs, cluster, "small"))
        shutdown.go()


async def runs(cluster: InProcessCluster, name: str) -> bool:
    return (await cluster.client.vms.get(name)).state.status == "running"


@pytest.mark.parametrize("ends", ["deleted", "restarted"])
async def test_lease_of_a_vm_that_is_shut_down_is_renewed_only_if_it_was_deleted(
    cluster: InProcessCluster, shutdown: Shutdown, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A VM that is restarted may run elsewhere when its lease is over. Its neighbour keeps its lease in any case."""
    monkeypatch.setattr(reconciler, "_SYNC_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.01)
    async with cluster.working(resources={TART_VMS: 2}):
        local = []
        for name, fields in (("old", shutdown.fields), ("neighbour", {})):
            await cluster.client.vms.create(name=name, image="any", restart_policy="OnFailure", **fields)
            local.append((await cluster.client.vms.wait(name)).tart_name)
        await (cluster.client.vms.delete("old") if ends == "deleted" else cluster.client.vms.restart("old"))
        await eventually(lambda: shutdown.begun() == ["old"])
        renewed: list[set[str]] = []
        lease = cluster.driver().lease

        def noted(soft: float, hard: float, names: Collection[str]) -> None:
            renewed.append(set(names))
            lease(soft, hard, names)

        monkeypatch.setattr(cluster.driver(), "lease", noted)
        await eventually(lambda: len(renewed) > 5)
        assert renewed[-1] == (set(local) if ends == "deleted" else {local[1]})
        shutdown.go()


async def test_vm_deleted_while_its_worker_is_away_is_shut_down_by_the_next(
    cluster: InProcessCluster, shutdown: Shutdown
) -> None:
    async with cluster.working(stop_vms=False, resources={TART_VMS: 2}):
        await cluster.client.vms.create(name="old", image="any", **shutdown.fields)
        old = await cluster.client.vms.wait("old")
    await cluster.client.vms.delete("old")
    for times in (1, 2):
        # The first one ends while the script runs.
        async with cluster.working(stop_vms=False, resources={TART_VMS: 2}):
            await eventually(partial(has_begun, shutdown, times))
            if times == 2:
                # The leftover holds its own slot only.
                await cluster.client.vms.create(name="new", image="any")
                await cluster.client.vms.wait("new")
                shutdown.go()
                await eventually(partial(gone, cluster, old))


def has_begun(shutdown: Shutdown, times: int) -> bool:
    return len(shutdown.begun()) == times


async def test_restart_begins_anew_when_the_guest_has_been_shut_down(
    cluster: InProcessCluster, shutdown: Shutdown
) -> None:
    async with cluster.working(resources={TART_VMS: 1}):
        await cluster.client.vms.create(name="vm", image="any", **shutdown.fields)
        vm = await cluster.client.vms.wait("vm", until="ready")
        await cluster.client.vms.restart("vm")
        await eventually(lambda: shutdown.begun() == ["vm"])
        assert (await cluster.client.vms.get("vm")).state.status == "failed"
        assert not await gone(cluster, vm)
        shutdown.go()
        again = await cluster.wait_vm("vm", lambda vm: vm.state.restart_count == 1 and vm.condition("ready"))
        assert again.uid == vm.uid
        await eventually(partial(gone, cluster, vm))
        # One that has failed by itself has ended already.
        await cluster.driver().stop(again.tart_name)
        await cluster.wait_vm("vm", lambda vm: vm.state.status == "failed")
        await cluster.client.vms.restart("vm")
        await cluster.wait_vm("vm", lambda vm: vm.state.restart_count == 2 and vm.condition("running"))


async def test_vm_that_ended_with_its_worker_is_restarted_by_the_next(
    cluster: InProcessCluster, shutdown: Shutdown
) -> None:
    async with cluster.working(stop_vms=False):
        await cluster.client.vms.create(name="vm", image="any", **shutdown.fields)
        vm = await cluster.client.vms.wait("vm")
    await cluster.client.vms.restart("vm")
    await cluster.driver().stop(vm.tart_name)
    async with cluster.working():
        await cluster.wait_vm("vm", lambda vm: vm.state.restart_count == 1 and vm.condition("running"))
    assert shutdown.begun() == []


async def test_drained_vms_are_shut_down_and_reported(cluster: InProcessCluster, shutdown: Shutdown) -> None:
    async with cluster.working(resources={TART_VMS: 2}):
        await cluster.client.vms.create(name="never", image="any", **shutdown.fields)
        await cluster.client.vms.create(name="again", image="any", restart_policy="OnFailure", **shutdown.fields)
        for name in ("never", "again"):
            await cluster.client.vms.wait(name)
        await cluster.client.workers.drain("mac", now=True)
        await eventually(lambda: sorted(shutdown.begun()) == ["again", "never"])
        shutdown.go()
        await cluster.wait_vm("again", lambda vm: vm.state.status == "pending" and vm.state.restart_count == 1)
        await cluster.wait_vm("never", lambda vm: vm.state.ended_at is not None)


async def test_vm_that_is_drained_before_it_began_is_reported_as_ended(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.working() as worker:
        polled, allowed = trio.Event(), trio.Event()
        fetch = worker._vms._fetch_wanted

        async def held() -> dict[str, VM]:
            polled.set()
            await allowed.wait()
            return await fetch()

        monkeypatch.setattr(worker._vms, "_fetch_wanted", held)
        await cluster.client.vms.create(name="vm", image="any", restart_policy="OnFailure")
        await cluster.wait_vm("vm", lambda vm: bool(vm.state.worker))
        await polled.wait()
        await cluster.client.workers.drain("mac", now=True)
        allowed.set()
        await cluster.wait_vm("vm", lambda vm: vm.state.status == "pending" and vm.state.restart_count == 1)
        assert await cluster.local_vms() == []


def test_slots_are_granted_in_turn_as_resources_become_free() -> None:
    slots = Slots({"gpu": 2, "cores": 8})
    big, small, other = slots.add("big", {"gpu": 2}), slots.add("small", {"gpu": 1}), slots.add("other", {"cores": 1})
    slots.grant([{"gpu": 1}, None])
    assert [event.is_set() for event in (big, small, other)] == [False, False, False]
    slots.grant([{"gpu": 1}])
    # What "big" waits for is kept for it.
    assert [event.is_set() for event in (big, small, other)] == [False, False, True]
    slots.remove("big")
    slots.grant([{"gpu": 1}, {"cores": 1}])
    assert (small.is_set(), "small" in slots) == (True, False)
    # A VM that needs nothing does not wait.
    nothing = slots.add("nothing", {})
    slots.grant([{"gpu": 2}])
    assert nothing.is_set()
