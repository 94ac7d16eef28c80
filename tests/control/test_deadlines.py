"""Deadlines: VMs expire, time out and are drained, and workers are pruned, when it is time and not before.

Through the API and a store on the disk, over restarts and wrong clocks.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from harness.disks import FailingDisk, UnsyncedDisk, no_space
from harness.scratch import memory_directory
from harness.served import BEGAN, HostClock, Served, at_once, served
from harness.strategies import QUICK
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from orchard.control.deadlines import ITEMS_PER_TRANSACTION, TOUCH_SECONDS
from orchard.control.reactions import tunnel_end_reason
from orchard.decisions.planning import RESTART_PAUSE_SECONDS
from orchard.resources.cluster import VM_RESTART
from orchard.schema import TART_VMS
from orchard.storage.errors import StorageError
from orchard.storage.file_engine import UPKEEP_SECONDS
from orchard.store import Store
from orchard.testing import cluster

SECOND = datetime.timedelta(seconds=1)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, in_thread=at_once) as api:
        yield api


async def after(api: Served, seconds: float) -> None:
    """Let time pass, and do what is due then."""
    await trio.sleep(seconds)
    api.do_what_is_due()
    await api.store.wait_durable()


async def names(api: Served) -> list[str]:
    return [vm["name"] for vm in await api.ok("GET", "/vms")]


def expiry(vm: Any) -> datetime.timedelta:
    """Return when a VM expires, from BEGAN on."""
    return datetime.datetime.fromisoformat(vm["expiresAt"]) - BEGAN


async def run_on(api: Served, worker: str, name: str, **spec: object) -> Any:
    """Create a VM that runs on a worker."""
    await api.create(name, **spec)
    api.schedule()
    vm = await api.ok("GET", f"/vms/{name}")
    assert vm["worker"] == worker
    await report(api, vm, "running", "true")
    return await api.ok("GET", f"/vms/{name}")


async def report(api: Served, vm: Any, status: str, running: str) -> None:
    body = {"uid": vm["uid"], "restart_count": vm.get("restart_count", 0), "status": status}
    await api.ok("PUT", f"/vms/{vm['name']}/state", {**body, "conditions": [{"type": "running", "state": running}]})


async def able(api: Served, name: str, **fields: object) -> None:
    """Register a worker that reports the end of its VMs."""
    await api.register(name, capabilities=[VM_RESTART], **fields)


# ---- time to live ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["pending", "assigned", "running", "failed", "resting"])
async def test_vm_is_deleted_at_the_end_of_its_time_to_live_and_not_earlier(
    api: Served, autojump_clock: object, state: str
) -> None:
    vm = await api.create("vm", ttlSeconds=60, restart_policy="OnFailure")
    if state != "pending":
        await api.register("w")
        api.schedule()
    if state in ("running", "failed", "resting"):
        await report(api, vm, state if state == "failed" else "running", "true")
    if state == "resting":
        await api.ok("PATCH", "/vms/vm", {"powerState": "stopped"})
        await report(api, vm, "running", "false")
    assert expiry(vm) == 60 * SECOND
    await after(api, 59.9)
    assert await names(api) == ["vm"]
    await after(api, 0.2)
    assert await names(api) == []
    assert api.store.state.vms_by_worker == {}


async def test_tunnels_of_an_expired_vm_end_with_that_reason(api: Served, autojump_clock: object) -> None:
    await api.create("vm", ttlSeconds=60)
    vm = api.state.vms["vm"]
    assert "deleted" in tunnel_end_reason(vm, None, BEGAN + 59 * SECOND)
    assert "expired" in tunnel_end_reason(vm, None, BEGAN + 60 * SECOND)


async def test_many_vms_that_expire_together_are_deleted_in_several_transactions(
    api: Served, autojump_clock: object
) -> None:
    for number in range(2 * ITEMS_PER_TRANSACTION + 1):
        await api.create(f"vm-{number}", ttlSeconds=1)
    await trio.sleep(1)
    assert [api.deadlines.step() for _ in range(4)] == [True, True, True, False]
    assert await names(api) == []


async def test_vm_that_expires_and_times_out_at_once_is_deleted_at_once(api: Served, autojump_clock: object) -> None:
    await api.create("vm", ttlSeconds=30, pendingTimeoutSeconds=60)
    await trio.sleep(100)
    api.deadlines.step()
    assert "vm" not in api.state.vms


async def test_patch_renews_the_time_to_live_and_put_only_another_one(api: Served, autojump_clock: object) -> None:
    vm = await api.create("vm", ttlSeconds=60)
    await trio.sleep(30)
    assert expiry(await api.ok("PUT", "/vms/vm", vm)) == 60 * SECOND
    assert expiry(await api.ok("PUT", "/vms/vm", {"image": "image"})) == 60 * SECOND
    assert expiry(await api.ok("PATCH", "/vms/vm", {"priority": 3})) == 60 * SECOND
    renewed = await api.ok("PATCH", "/vms/vm", {"TTLSeconds": 60})
    assert expiry(renewed) == 90 * SECOND
    assert (renewed["generation"], renewed["version"] > vm["version"]) == (0, True)
    assert expiry(await api.ok("PUT", "/vms/vm", {**vm, "ttlSeconds": 50})) == 80 * SECOND
    for nothing in (0, None):
        await api.ok("PATCH", "/vms/vm", {"ttlSeconds": 5})
        assert "expiresAt" not in await api.ok("PATCH", "/vms/vm", {"ttlSeconds": nothing})
    await after(api, 1000)
    assert await names(api) == ["vm"]


async def test_time_to_live_is_renewed_on_a_failed_vm(api: Served, autojump_clock: object) -> None:
    vm = await api.create("vm", ttlSeconds=60)
    api.assign("vm")
    await report(api, vm, "failed", "false")
    await trio.sleep(30)
    assert expiry(await api.ok("PATCH", "/vms/vm", {"ttlSeconds": 40})) == 70 * SECOND


async def test_settings_limit_the_time_to_live(api: Served, autojump_clock: object) -> None:
    await api.ok("PUT", "/cluster-settings", {"defaultTTLSeconds": 60, "maxTTLSeconds": 90})
    assert expiry(await api.create("default")) == 60 * SECOND
    refused = await api.call("POST", "/vms", {"name": "vm", "image": "image", "ttlSeconds": 91})
    assert (refused.status, "91" in refused.message, "90" in refused.message) == (412, True, True)
    assert "vm" not in await names(api)
    for body in ({"ttlSeconds": None}, {"ttlSeconds": 0}, {"ttlSeconds": 91}):
        assert (await api.call("PATCH", "/vms/default", body)).status == 412
    await api.ok("PUT", "/cluster-settings", {"defaultTTLSeconds": 0, "maxTTLSeconds": 50})
    assert expiry(await api.ok("PATCH", "/vms/default", {"metadata": {"a": "b"}})) == 60 * SECOND
    assert (await api.call("PATCH", "/vms/default", {"ttlSeconds": 60})).status == 412
    assert expiry(await api.create("most")) == 50 * SECOND


@pytest.mark.parametrize("ttl", [-1, 31_536_001, "1", 1.5])
async def test_time_to_live_outside_its_bounds_is_refused(api: Served, autojump_clock: object, ttl: object) -> None:
    answered = await api.call("POST", "/vms", {"name": "vm", "image": "image", "ttlSeconds": ttl})
    assert (answered.status in (400, 412), "ttlSeconds" in answered.message) == (True, True)


# ---- clocks and restarts --------------------------------------------------------------------------------------------

# What happens to a controller: it runs for so many seconds, its clock is set by so many, it is stopped for so many
# seconds, in which its clock is set by so many. Or the time to live is renewed.
JUMPS = (5, 3600, -3600, 10**8, -(10**8))
STEPS = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 400)),
    st.tuples(st.just("set"), st.sampled_from(JUMPS)),
    st.tuples(st.just("stop"), st.integers(0, 8_000), st.sampled_from((0, 0, 0, *JUMPS))),
    st.tuples(st.just("renew"), st.integers(1, 6_000)),
)


@dataclass
class Life:
    """How long a VM has lived since its last renewal: what counts in any case, and what may count."""

    ttl: int
    least: float = 0.0
    most: float = 0.0


async def live(directory: Path, ttl: int, steps: list[tuple[Any, ...]]) -> None:
    """Take the steps with a VM, and check that it is there for as long as it has to be, and not longer."""
    host, life = HostClock(), Life(ttl)
    left = iter(steps)
    while True:
        async with served(directory, disk=UnsyncedDisk(), host_clock=host, in_thread=at_once) as api:
            if not life.most:
                await api.create("vm", ttlSeconds=ttl)
            api.do_what_is_due()
            stop = await live_until_a_stop(api, host, life, left)
        if stop is None:
            return
        seconds, jump = stop
        await trio.sleep(seconds)
        host.error += jump * SECOND
        counted = min(max(0, seconds + jump), 3600)
        # The wall time was stored up to TOUCH_SECONDS before.
        life.least += counted - TOUCH_SECONDS
        life.most += min(3600.0, counted + TOUCH_SECONDS)


async def live_until_a_stop(
    api: Served, host: HostClock, life: Life, left: Iterator[tuple[Any, ...]]
) -> tuple[int, int] | None:
    """Take the steps up to the next stop, and return its values; None when the VM is gone."""
    # Something that was due at the start is done in the first second.
    for kind, *values in itertools.chain([("run", 1)], left):
        if kind == "stop":
            return values[0], values[1]
        if kind == "set":
            host.error += values[0] * SECOND
            api.do_what_is_due()
        elif kind == "renew":
            life.ttl, life.least, life.most = values[0], 0.0, 0.0
            await api.ok("PATCH", "/vms/vm", {"ttlSeconds": life.ttl})
        else:
            await run_for(api, life, values[0])
        if "vm" not in api.state.vms:
            assert life.most >= life.ttl, "deleted before its time"
            return None
        assert life.least < life.ttl, "not deleted when it was time"
        expires_at = datetime.datetime.fromisoformat((await api.ok("GET", "/vms/vm"))["expiresAt"])
        shown = (expires_at - host.wall()).total_seconds()
        assert life.ttl - life.most - 1 <= shown <= life.ttl - life.least + 1
    await after(api, max(0, life.ttl - life.most - 1))
    assert "vm" in api.state.vms, "deleted before its time"
    await after(api, life.most - life.least + 2)
    assert "vm" not in api.state.vms, "not deleted when it was time"
    return None


async def run_for(api: Served, life: Life, seconds: float) -> None:
    """Let the controller run until the VM is gone, for so many seconds at most."""
    while seconds > 0 and "vm" in api.state.vms:
        step = min(seconds, TOUCH_SECONDS)
        await after(api, step)
        life.least += step
        life.most += step
        seconds -= step


@pytest.mark.slow
@settings(QUICK, max_examples=30)
@given(st.integers(1, 6_000), st.lists(STEPS, max_size=6))
@example(6_000, [("stop", 0, 10**8)])
@example(6_000, [("stop", 8_000, 0), ("run", 10)])
@example(6_000, [("run", 400), ("stop", 0, -3600)])
def test_time_to_live_holds_across_restarts_and_clock_jumps(ttl: int, steps: list[tuple[Any, ...]]) -> None:
    with TemporaryDirectory(dir=memory_directory()) as directory:
        trio.run(live, Path(directory), ttl, steps, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("jump", [10**8, -(10**8)])
async def test_vm_that_is_created_while_the_clock_is_wrong_lives_as_long(
    tmp_path: Path, autojump_clock: object, jump: int
) -> None:
    host = HostClock()
    async with served(tmp_path, host_clock=host, in_thread=at_once) as api:
        host.error = jump * SECOND
        await api.create("vm", ttlSeconds=60, pendingTimeoutSeconds=30)
        await after(api, 29)
        host.error = 0 * SECOND
        assert (await api.ok("GET", "/vms/vm"))["status"] == "pending"
        await after(api, 2)
        assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
        await after(api, 28)
        assert await names(api) == ["vm"]
        await after(api, 2)
        assert await names(api) == []


async def test_shift_that_was_not_written_is_undone_with_the_clock(tmp_path: Path, autojump_clock: object) -> None:
    host, disk = HostClock(), FailingDisk()
    async with served(tmp_path, disk=disk, host_clock=host, in_thread=at_once) as api:
        await api.create("vm", ttlSeconds=60)
        await trio.sleep(30)
        host.error = 10**8 * SECOND
        disk.fault = no_space
        api.deadlines.step()
        assert api.state.vms["vm"].meta.expires_at == BEGAN + 60 * SECOND + 10**8 * SECOND
        with pytest.raises(StorageError):
            await api.store.wait_durable()
        assert api.state.vms["vm"].meta.expires_at == BEGAN + 60 * SECOND
        disk.fault = lambda verb, number: 0
        await trio.sleep(UPKEEP_SECONDS + 1)
        await after(api, 27)
        assert await names(api) == ["vm"]
        await after(api, 2)
        assert await names(api) == []


# ---- bounded pending ------------------------------------------------------------------------------------------------


async def test_vm_without_a_worker_fails_after_its_time_with_the_reason_and_stays_failed(
    api: Served, autojump_clock: object
) -> None:
    await api.create("vm", pendingTimeoutSeconds=30, restart_policy="OnFailure")
    api.schedule()
    waiting = (await api.ok("GET", "/vms/vm"))["status_message"]
    await after(api, 29)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "pending"
    await after(api, 2)
    vm = await api.ok("GET", "/vms/vm")
    assert (vm["status"], vm["status_message"]) == ("failed", f"no worker within 30 seconds; {waiting}")
    await api.register("w")
    await after(api, 2 * RESTART_PAUSE_SECONDS)
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
    await api.ok("POST", "/vms/vm/restart")
    api.schedule()
    vm = await api.ok("GET", "/vms/vm")
    assert (vm["worker"], vm["restart_count"], "waitingSince" in vm) == ("w", 1, False)


async def test_pending_time_begins_anew_when_the_vm_loses_its_worker(api: Served, autojump_clock: object) -> None:
    await able(api, "w")
    vm = await run_on(api, "w", "vm", pendingTimeoutSeconds=30, restart_policy="OnFailure")
    await after(api, 1000)
    await api.ok("PUT", "/workers/w", {"name": "w", "scheduling_paused": True})
    await report(api, vm, "failed", "false")
    api.schedule()
    await after(api, 29)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "pending"
    await after(api, 2)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"


async def test_vm_that_has_failed_does_not_time_out(api: Served, autojump_clock: object) -> None:
    vm = await api.create("vm", pendingTimeoutSeconds=30)
    api.assign("vm")
    body = {"uid": vm["uid"], "restart_count": 0, "status": "failed", "status_message": "broken"}
    await api.ok("PUT", "/vms/vm/state", body)
    await trio.sleep(60)
    assert not api.deadlines.step()
    assert (await api.ok("GET", "/vms/vm"))["status_message"] == "broken"


async def test_pending_time_can_be_changed_while_the_vm_waits(api: Served, autojump_clock: object) -> None:
    await api.create("vm", pendingTimeoutSeconds=30)
    await after(api, 20)
    changed = await api.ok("PATCH", "/vms/vm", {"pendingTimeoutSeconds": 60})
    assert changed["generation"] == 0
    await after(api, 39)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "pending"
    await api.ok("PATCH", "/vms/vm", {"pendingTimeoutSeconds": 10})
    await after(api, 0)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"


# ---- restart --------------------------------------------------------------------------------------------------------


async def test_restarted_vm_waits_for_its_end_and_keeps_its_identity(api: Served, autojump_clock: object) -> None:
    await able(api, "w")
    vm = await run_on(api, "w", "vm")
    stopping = await api.ok("POST", "/vms/vm/restart")
    assert (stopping["status"], stopping["worker"]) == ("failed", "w")
    await after(api, 60)
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
    await report(api, vm, "failed", "false")
    api.schedule()
    again = await api.ok("GET", "/vms/vm")
    assert (again["uid"], again["restart_count"], again["status"]) == (vm["uid"], 1, "pending")


async def test_restart_without_the_means_is_refused_and_changes_nothing(api: Served, autojump_clock: object) -> None:
    assert (await api.call("POST", "/vms/vm/restart")).status == 404
    await api.create("vm")
    assert (await api.call("POST", "/vms/vm/restart")).status == 412
    await api.register("w")
    api.schedule()
    vm = await api.ok("GET", "/vms/vm")
    await report(api, vm, "running", "true")
    refused = await api.call("POST", "/vms/vm/restart")
    assert (refused.status, VM_RESTART in refused.message) == (412, True)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "running"


# ---- drain ----------------------------------------------------------------------------------------------------------


async def state_of(api: Served, worker: str) -> str:
    return str((await api.ok("GET", f"/workers/{worker}"))["state"])


@pytest.mark.parametrize("body", [{"now": True}, {"deadlineSeconds": 60}])
async def test_vms_of_a_drained_worker_end_at_the_deadline_and_run_elsewhere(
    api: Served, autojump_clock: object, body: dict[str, object]
) -> None:
    await able(api, "w")
    once = await run_on(api, "w", "once")
    again = await run_on(api, "w", "again", restart_policy="OnFailure")
    await api.register("x")
    await api.ok("POST", "/workers/w/drain", body)
    assert await state_of(api, "w") == "draining"
    if "now" not in body:
        await after(api, 59)
        assert (await api.ok("GET", "/vms/once"))["status"] == "running"
    await after(api, 1)
    for name in ("once", "again"):
        vm = await api.ok("GET", f"/vms/{name}")
        assert (vm["status"], vm["status_message"]) == ("failed", 'worker "w" was drained')
    api.schedule()
    assert (await api.ok("GET", "/vms/again"))["status"] == "failed"
    assert await state_of(api, "w") == "draining", "its VMs may still run"
    for vm in (once, again):
        await report(api, vm, "failed", "false")
    api.schedule()
    assert await state_of(api, "w") == "drained"
    moved = await api.ok("GET", "/vms/again")
    assert (moved["worker"], moved["restart_count"]) == ("x", 1)
    await after(api, 1000)
    assert (await api.ok("GET", "/vms/once"))["status"] == "failed"
    assert await state_of(api, "w") == "offline"


async def test_drained_worker_without_a_deadline_keeps_its_vms_and_gets_none(
    api: Served, autojump_clock: object
) -> None:
    await api.register("w")
    await run_on(api, "w", "vm")
    worker = await api.ok("POST", "/workers/w/drain")
    assert (worker["scheduling_paused"], worker["state"]) == (True, "draining")
    await api.create("other")
    await after(api, 100)
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["status"] == "running"
    assert "worker" not in await api.ok("GET", "/vms/other")
    await api.ok("DELETE", "/vms/vm")
    assert await state_of(api, "w") == "drained"


@pytest.mark.parametrize("how", ["DELETE", "PUT"])
async def test_drain_is_cancelled_and_scheduling_resumes(api: Served, autojump_clock: object, how: str) -> None:
    await api.register("w")
    await run_on(api, "w", "vm")
    await api.ok("POST", "/workers/w/drain", {"deadlineSeconds": 60})
    shown = await api.ok("GET", "/workers/w")
    if how == "PUT":
        # As a Go client does it: what it does not know is left out, and so is false.
        await api.ok("PUT", "/workers/w", {"name": "w", "scheduling_paused": True})
        assert await state_of(api, "w") == "draining"
        await api.ok("PUT", "/workers/w", {name: value for name, value in shown.items() if name != "scheduling_paused"})
    else:
        await api.ok("DELETE", "/workers/w/drain")
    await after(api, 100)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "running"
    assert await state_of(api, "w") == "online"


async def test_cancelling_no_drain_leaves_a_paused_worker_paused(api: Served, autojump_clock: object) -> None:
    await api.register("w")
    await api.ok("PUT", "/workers/w", {"name": "w", "scheduling_paused": True})
    await api.ok("DELETE", "/workers/w/drain")
    assert await state_of(api, "w") == "paused"


async def test_drain_survives_a_registration(api: Served, autojump_clock: object) -> None:
    await api.register("w")
    await run_on(api, "w", "vm")
    await api.ok("POST", "/workers/w/drain", {"deadlineSeconds": 60})
    await api.register("w", drain=None)
    await after(api, 61)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"


async def test_vm_at_rest_stays_on_a_drained_worker(api: Served, autojump_clock: object) -> None:
    await api.register("w")
    vm = await run_on(api, "w", "vm")
    await api.ok("PATCH", "/vms/vm", {"powerState": "stopped"})
    await report(api, vm, "running", "false")
    await api.ok("POST", "/workers/w/drain", {"now": True})
    await after(api, 1)
    assert (await api.ok("GET", "/vms/vm"))["status"] == "running"
    assert await state_of(api, "w") == "drained"


@pytest.mark.parametrize(
    ("body", "status"),
    [({"deadlineSeconds": -1}, 412), ({"deadlineSeconds": 1, "now": True}, 412), ({"now": "yes"}, 400), ([], 400)],
)
async def test_drain_outside_its_bounds_is_refused(
    api: Served, autojump_clock: object, body: object, status: int
) -> None:
    await api.register("w")
    assert (await api.call("POST", "/workers/w/drain", body)).status in (status, 400)
    assert await state_of(api, "w") == "online"
    assert (await api.call("POST", "/workers/none/drain")).status == 404


async def test_drain_of_a_vm_that_has_not_run_is_no_failure_of_its_worker(api: Served, autojump_clock: object) -> None:
    await able(api, "w", resources={TART_VMS: 3})
    for number in range(3):
        await api.create(f"vm-{number}")
    api.schedule()
    await api.ok("POST", "/workers/w/drain", {"now": True})
    await after(api, 1)
    assert {vm["status"] for vm in await api.ok("GET", "/vms")} == {"failed"}
    assert (await api.ok("GET", "/workers/w"))["health"]["ok"]


async def test_deadline_of_a_drain_holds_over_a_restart(tmp_path: Path, autojump_clock: object) -> None:
    host = HostClock()
    async with served(tmp_path, host_clock=host, in_thread=at_once) as api:
        await api.register("w")
        await run_on(api, "w", "vm")
        await api.ok("POST", "/workers/w/drain", {"deadlineSeconds": 60})
        await after(api, 30)
    async with served(tmp_path, host_clock=host, in_thread=at_once) as api:
        await after(api, 29)
        assert (await api.ok("GET", "/vms/vm"))["status"] == "running"
        await after(api, 2)
        assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"


# ---- pruning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_restart", [False, True])
async def test_worker_that_is_offline_for_long_and_holds_nothing_is_deleted(
    tmp_path: Path, autojump_clock: object, with_restart: bool
) -> None:
    host = HostClock()
    async with served(tmp_path, host_clock=host, in_thread=at_once) as api:
        await api.ok("PUT", "/cluster-settings", {"workerPruneSeconds": 1000})
        await api.register("w")
        await api.ok("POST", "/rpc/goodbye?workerName=w")
        api.close_watch("w")
        for _ in range(9):
            await after(api, 90)
        if not with_restart:
            assert "w" in api.state.workers
            await after(api, 200)
            assert api.state.workers == {}
            assert "w" in api.state.promises
            return
    async with served(tmp_path, host_clock=host, in_thread=at_once) as api:
        await after(api, 170)
        assert "w" in api.state.workers
        await after(api, 30)
        assert api.state.workers == {}


async def test_worker_that_returns_or_holds_a_vm_is_not_deleted(api: Served, autojump_clock: object) -> None:
    await api.register("w")
    await api.register("x")
    await run_on(api, "w", "vm")
    await api.ok("PUT", "/cluster-settings", {"workerPruneSeconds": 300})
    for name in "wx":
        api.close_watch(name)
    await trio.sleep(3)
    api.schedule()
    await after(api, 250)
    api.schedule()
    await api.register("x")
    await after(api, 100)
    assert set(api.state.workers) == {"w", "x"}
    assert api.state.workers["x"].offline_since is None
    await api.ok("DELETE", "/vms/vm")
    await after(api, 100)
    assert set(api.state.workers) == {"x"}


async def test_worker_whose_deletion_was_not_written_is_deleted_later(tmp_path: Path, autojump_clock: object) -> None:
    disk = FailingDisk()
    async with served(tmp_path, disk=disk, in_thread=at_once) as api:
        await api.ok("PUT", "/cluster-settings", {"workerPruneSeconds": 200})
        await api.register("w")
        await api.ok("POST", "/rpc/goodbye?workerName=w")
        api.close_watch("w")
        await after(api, 100)
        await trio.sleep(200)
        disk.fault = no_space
        api.deadlines.step()
        assert api.state.workers == {}
        with pytest.raises(StorageError):
            await api.store.wait_durable()
        assert "w" in api.state.workers
        disk.fault = lambda verb, number: 0
        await after(api, TOUCH_SECONDS + 1)
        assert api.state.workers == {}


async def read_all(stream: trio.abc.ReceiveStream) -> None:
    while await stream.receive_some():
        pass


@pytest.mark.slow
async def test_tunnel_of_an_expired_vm_is_closed_with_that_reason() -> None:
    async with cluster() as c:
        await c.client.vms.create(name="vm", image="image", ttl_seconds=60)
        await c.client.vms.wait("vm", until="running")
        async with c.client.vms.port_forward("vm", 22) as stream:
            await c.client.vms.patch("vm", ttl_seconds=1)
            with pytest.raises(trio.BrokenResourceError, match="has expired"):
                await read_all(stream)
        assert await c.client.vms.list() == []


@pytest.mark.slow
async def test_vms_expire_on_a_full_disk_although_the_clock_was_set(tmp_path: Path, autojump_clock: object) -> None:
    host, disk = HostClock(), FailingDisk()
    async with served(tmp_path, disk=disk, host_clock=host, in_thread=at_once) as api:
        await api.ok("PUT", "/cluster-settings", {"workerPruneSeconds": 10})
        await api.register("w", resources={})
        await api.ok("POST", "/workers/w/drain", {"deadlineSeconds": 1000})
        await api.create("vm", ttlSeconds=60)
        api.close_watch("w")
        await trio.sleep(3)
        api.schedule()
        disk.fault = no_space
        assert (await api.call("POST", "/vms", {"name": "other", "image": "image"})).status == 507
        host.error = 10**8 * SECOND
        await trio.sleep(300)
        api.deadlines.step()
        assert "vm" not in api.state.vms
        disk.fault = lambda verb, number: 0
        with suppress(StorageError):
            await api.store.wait_durable()


async def test_vm_does_not_expire_early_when_the_clock_is_set_on_a_full_disk(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = HostClock()
    async with served(tmp_path, host_clock=host, in_thread=at_once) as api:
        await api.register("w")
        vm = await run_on(api, "w", "vm", ttlSeconds=1000)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "full", "the disk is full")
            host.error = 10**8 * SECOND
            await after(api, TOUCH_SECONDS + 1)
            await report(api, vm, "failed", "false")
            await after(api, 1)
            assert await names(api) == ["vm"]
        await after(api, 900)
        assert await names(api) == ["vm"]
        await after(api, 100)
        assert await names(api) == []
