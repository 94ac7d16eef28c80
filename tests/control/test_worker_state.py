"""A worker's state decides whether it gets new VMs: its session, its goodbye, what fails there, and a restored controller."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.disks import FailingDisk, no_space
from harness.served import BEGAN, Answered, Served, at_once, served

from orchard.base.nursery import growing_pause
from orchard.control.stored_data import DEFAULT_OFFLINE_TIMEOUT, ensure_identity
from orchard.decisions.early_failures import FIRST_PAUSE, LAST_PAUSE, SICK_VMS, EarlyFailures
from orchard.decisions.liveness import AWAY_SECONDS
from orchard.decisions.planning import RESTART_PAUSE_SECONDS
from orchard.resources.cluster import MAX_PROBLEM_TEXT, MAX_PROBLEMS, VM_RESTART, WORKER_STATE
from orchard.schema import TART_VMS, ServiceAccount, Worker
from orchard.storage.errors import StorageError
from orchard.storage.file_engine import UPKEEP_SECONDS

SECOND = datetime.timedelta(seconds=1)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, in_thread=at_once) as api:
        yield api


async def state_of(api: Served, worker: str) -> str:
    return str((await api.ok("GET", f"/workers/{worker}"))["state"])


async def place(api: Served, name: str, **spec: object) -> Any:
    """Create a VM, schedule, and return the VM."""
    await api.create(name, **spec)
    api.schedule()
    return await api.ok("GET", f"/vms/{name}")


async def beat(api: Served, worker: str, second: int, **fields: object) -> Any:
    seen = (BEGAN + second * SECOND).isoformat()
    return await api.ok("PUT", f"/workers/{worker}", {"name": worker, "last_seen": seen, **fields})


async def report(api: Served, vm: Any, status: str, message: str = "") -> None:
    body = {"uid": vm["uid"], "restart_count": vm.get("restart_count", 0), "status": status, "status_message": message}
    await api.ok("PUT", f"/vms/{vm['name']}/state", body)


async def register_only(api: Served, name: str, **fields: object) -> Any:
    """Register a worker that does nothing else."""
    body = {"name": name, "machine_id": "m", "resources": {TART_VMS: 2}, **fields}
    return await api.ok("POST", "/workers", body)


# ---- the session ----------------------------------------------------------------------------------------------------


async def test_worker_without_the_capability_is_online_at_its_first_poll_after_its_watch_is_open(
    api: Served, autojump_clock: object
) -> None:
    await register_only(api, "w")
    await api.ok("GET", "/vms?filter=worker=w")
    assert await state_of(api, "w") == "offline", "its watch is not open"
    api.open_watch("w")
    assert await state_of(api, "w") == "offline"
    vm = await place(api, "vm")
    assert "worker" not in vm
    assert vm["status_message"] == "waiting: 1 worker: 1 not ready"
    await api.ok("GET", "/vms?filter=worker=w")
    assert await state_of(api, "w") == "online"
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["worker"] == "w"
    await register_only(api, "w")
    assert await state_of(api, "w") == "offline", "another session begins"


async def test_worker_with_the_capability_is_online_when_it_says_that_it_has_settled(
    api: Served, autojump_clock: object
) -> None:
    await register_only(api, "w", capabilities=[WORKER_STATE])
    api.open_watch("w")
    await api.ok("GET", "/vms?filter=worker=w")
    await beat(api, "w", 1)
    assert await state_of(api, "w") == "offline"
    await beat(api, "w", 2, settled=True)
    assert await state_of(api, "w") == "online"
    await beat(api, "w", 3, settled=False)
    assert await state_of(api, "w") == "offline"


async def test_answers_show_state_and_use_of_each_worker(api: Served, autojump_clock: object) -> None:
    await api.register("w")
    await place(api, "vm")
    await beat(api, "w", 1)
    for shown in (await api.ok("GET", "/workers/w"), (await api.ok("GET", "/workers"))[0]):
        expected = {"state": "online", "used": {TART_VMS: 1}, "vms": 1, "health": {"ok": True, "problems": []}}
        assert shown.items() >= expected.items()
        assert datetime.datetime.fromisoformat(shown["since"]) == BEGAN
    paused = await api.ok("PUT", "/workers/w", {"name": "w", "scheduling_paused": True})
    assert paused["state"] == "paused"


async def test_stopped_worker_gets_no_new_vms_and_its_vms_keep_the_whole_timeout(
    api: Served, autojump_clock: object
) -> None:
    await api.register("w")
    running = await place(api, "running")
    await api.ok("GET", "/vms?filter=worker=w")
    await report(api, running, "running")
    assert (await api.call("POST", "/rpc/goodbye?workerName=w")).body is None
    assert await state_of(api, "w") == "offline"
    # Its watch may still be open, and its last requests may arrive late.
    await api.ok("GET", "/vms?filter=worker=w")
    await beat(api, "w", 1, settled=True)
    vm = await place(api, "vm")
    assert vm["status_message"] == "waiting: 1 worker: 1 stopped"
    await trio.sleep(DEFAULT_OFFLINE_TIMEOUT - 1)
    api.schedule()
    assert (await api.ok("GET", "/vms/running"))["status"] == "running"
    await trio.sleep(1)
    api.schedule()
    assert (await api.ok("GET", "/vms/running"))["status"] == "failed"
    await api.register("w")
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["worker"] == "w"


async def test_worker_whose_watch_is_closed_gets_no_new_vms_after_two_seconds(
    api: Served, autojump_clock: object
) -> None:
    await api.register("w")
    api.close_watch("w")
    await trio.sleep(AWAY_SECONDS - 0.1)
    assert await state_of(api, "w") == "online"
    assert (await place(api, "in-time"))["worker"] == "w"
    await trio.sleep(0.1)
    assert await state_of(api, "w") == "offline"
    assert (await place(api, "late"))["status_message"] == "waiting: 1 worker: 1 disconnected"
    api.open_watch("w")
    api.schedule()
    assert (await api.ok("GET", "/vms/late"))["worker"] == "w"


async def test_worker_that_registers_before_its_deletion_is_durable_keeps_its_session(
    api: Served, autojump_clock: object
) -> None:
    await api.register("w")
    await trio.sleep(1000)
    with api.store.transaction() as tx:
        tx.delete(api.state.workers["w"])
    await api.ok("POST", "/workers", {"name": "w", "capabilities": [WORKER_STATE]})
    liveness = api.loop.liveness
    assert liveness.silent_at("w") > trio.current_time()
    # The deleted one may still run its VMs.
    assert liveness.deleted_until("w") > trio.current_time()
    api.open_watch("w")
    await api.ok("GET", "/vms?filter=worker=w")
    assert not liveness.is_available("w"), "it has not said that it has settled"


@pytest.mark.parametrize("named", [False, True])
async def test_assignment_returns_to_the_queue_early_only_if_no_poll_has_named_it(
    api: Served, autojump_clock: object, named: bool
) -> None:
    await api.register("a")
    vm = await place(api, "vm")
    if named:
        # Another source than the worker: it is enough that an answer has named the VM.
        await api.call("GET", "/vms?filter=worker=a", peer="10.0.0.9")
    await api.register("b")
    api.close_watch("a")
    await trio.sleep(AWAY_SECONDS)
    api.schedule()
    now = await api.ok("GET", "/vms/vm")
    assert (now["worker"], now.get("restart_count", 0)) == ("a" if named else "b", 0)
    assert now["uid"] == vm["uid"]


async def test_assignment_from_before_a_restart_counts_as_named(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        await api.register("a")
        await place(api, "vm")
    async with served(tmp_path, in_thread=at_once) as api:
        await api.register("b")
        await trio.sleep(AWAY_SECONDS)
        api.schedule()
        assert (await api.ok("GET", "/vms/vm"))["worker"] == "a"


# ---- what fails on workers ------------------------------------------------------------------------------------------


async def test_health_is_shown_and_told_to_the_vms_that_wait_there(api: Served, autojump_clock: object) -> None:
    await register_only(api, "w", capabilities=[WORKER_STATE])
    api.open_watch("w")
    await beat(api, "w", 1, settled=True)
    await place(api, "vm")
    await api.ok("GET", "/vms?filter=worker=w")
    problem = {"what": "list", "since": BEGAN.isoformat(), "message": "tart list:\n\x1b[31mno " + "x" * 1000}
    await beat(api, "w", 2, settled=False, health={"ok": False, "problems": [problem] * 50})
    shown = (await api.ok("GET", "/workers/w"))["health"]
    assert (shown["ok"], len(shown["problems"])) == (False, MAX_PROBLEMS)
    message = shown["problems"][0]["message"]
    assert len(message) == MAX_PROBLEM_TEXT
    assert message.isprintable()
    api.schedule()
    assert message in (await api.ok("GET", "/vms/vm"))["status_message"]
    assert "(list: tart list:" in (await place(api, "unassigned"))["status_message"]
    await beat(api, "w", 3, settled=True, health={"ok": True, "problems": []})
    assert (await api.ok("GET", "/workers/w"))["health"] == {"ok": True, "problems": []}


async def test_not_all_jobs_fail_on_one_sick_worker_while_others_are_idle(api: Served, autojump_clock: object) -> None:
    for name in ("a-sick", "b", "c"):
        await api.register(name)
    failed, done = 0, 0
    for number in range(10):
        vm = await place(api, f"job-{number}")
        await api.ok("GET", f"/vms?filter=worker={vm['worker']}")
        if vm["worker"] == "a-sick":
            failed += 1
            await report(api, vm, "failed", "cannot clone: no space left on device")
        else:
            done += 1
            await report(api, vm, "running")
            await api.ok("DELETE", f"/vms/{vm['name']}")
    assert (failed, done) == (SICK_VMS, 10 - SICK_VMS)
    health = (await api.ok("GET", "/workers/a-sick"))["health"]
    assert "no space left on device" in health["problems"][0]["message"]
    for name in ("b", "c"):
        await api.ok("DELETE", f"/workers/{name}")
    waits = await place(api, "waits")
    assert waits["status_message"] == "waiting: 1 worker: 1 on which VMs fail before they run"
    await trio.sleep(FIRST_PAUSE)
    api.schedule()
    tried = await api.ok("GET", "/vms/waits")
    assert tried["worker"] == "a-sick"
    await report(api, tried, "running")
    assert (await api.ok("GET", "/workers/a-sick"))["health"]["ok"]


async def test_vm_that_failed_before_it_ran_goes_elsewhere(api: Served, autojump_clock: object) -> None:
    await api.register("a")
    vm = await place(api, "vm", restart_policy="OnFailure")
    assert vm["worker"] == "a"
    await api.register("b")
    await report(api, vm, "failed", "cannot clone")
    await trio.sleep(RESTART_PAUSE_SECONDS)
    api.schedule()
    vm = await api.ok("GET", "/vms/vm")
    assert (vm["worker"], vm["restart_count"]) == ("b", 1)


async def test_vm_returns_to_the_only_worker_after_growing_pauses(api: Served, autojump_clock: object) -> None:
    await api.register("a")
    vm = await place(api, "vm", restart_policy="OnFailure")
    for pause in (15, 30, 60, 120, 240, 480, LAST_PAUSE, LAST_PAUSE):
        await report(api, vm, "failed", "cannot clone")
        await beat(api, "a", int(trio.current_time()) + 1)
        await trio.sleep(pause - 1)
        await beat(api, "a", int(trio.current_time()) + 1)
        api.schedule()
        assert "worker" not in await api.ok("GET", "/vms/vm") or pause == FIRST_PAUSE
        await trio.sleep(1)
        await beat(api, "a", int(trio.current_time()) + 1)
        api.schedule()
        vm = await api.ok("GET", "/vms/vm")
        assert vm["worker"] == "a"


def test_pauses_double_up_to_ten_minutes() -> None:
    pauses = [growing_pause(count, FIRST_PAUSE, LAST_PAUSE) for count in (1, 2, 3, 6, 7, 1000)]
    assert pauses == [15, 30, 60, 480, 600, 600]


def test_failures_on_a_worker_are_forgotten_when_a_vm_runs() -> None:
    failures = EarlyFailures()
    assert failures.problem("w") is None
    assert not failures.is_sick("w")
    assert failures.paused_until("w") == 0.0


# ---- two workers with one name --------------------------------------------------------------------------------------

OWNER = ServiceAccount(name="owner", token="secret-of-owner", roles=("compute:read", "compute:write"))
OTHER = ServiceAccount(name="other", token="secret-of-other", roles=("compute:read", "compute:write"))
ADMIN = ServiceAccount(name="admin", token="secret-of-admin", roles=("admin:read", "admin:write"))


def sent_by(api: Served, account: ServiceAccount) -> Callable[..., Awaitable[Answered]]:
    async def call(method: str, target: str, body: object = ...) -> Answered:
        return await api.call(method, target, body, account=(account.name, account.token))

    return call


async def test_only_the_account_that_registered_a_worker_speaks_for_it(tmp_path: Path) -> None:
    async with served(tmp_path, OWNER, OTHER, ADMIN) as api:
        owner, other = sent_by(api, OWNER), sent_by(api, OTHER)
        body = {"name": "w", "machine_id": "m", "last_seen": BEGAN.isoformat()}
        assert (await owner("POST", "/workers", body)).body["registeredBy"] == "owner"
        later = {"name": "w", "last_seen": (BEGAN + SECOND).isoformat()}
        await owner("POST", "/vms", {"name": "vm", "image": "i"})
        api.assign("vm")
        for method, target, sent in (
            ("PUT", "/workers/w", later),
            ("POST", "/rpc/goodbye?workerName=w", ...),
            ("PUT", "/vms/vm/state", {"status": "failed"}),
        ):
            refused = await other(method, target, sent)
            assert (refused.status, "owner" in refused.message) == (403, True)
        assert (await other("PUT", "/workers/w", {"name": "w", "scheduling_paused": True})).status == 200
        assert (await owner("PUT", "/workers/w", later)).status == 200
        earlier = {"uid": "earlier", "status": "failed"}
        assert (await other("PUT", "/vms/vm/state", earlier)).status == 404, "existing workers go on only after a 404"
        assert (await owner("PUT", "/vms/vm/state", {"status": "failed"})).status == 200
        assert (await owner("POST", "/rpc/goodbye?workerName=w")).status == 200
        before = api.loop.liveness.last_contact["w"]
        await other("GET", "/vms?filter=worker=w")
        assert api.loop.liveness.last_contact["w"] == before


async def test_worker_without_an_account_is_bound_to_the_first_that_speaks_for_it(tmp_path: Path) -> None:
    async with served(tmp_path, OWNER, OTHER) as api:
        with api.store.transaction() as tx:
            tx.put(Worker(name="w", machine_id="m"))
        later = {"name": "w", "last_seen": (BEGAN + SECOND).isoformat()}
        assert (await sent_by(api, OWNER)("PUT", "/workers/w", later)).body["registeredBy"] == "owner"
        assert (await sent_by(api, OTHER)("POST", "/rpc/goodbye?workerName=w")).status == 403


# ---- promises -------------------------------------------------------------------------------------------------------


async def test_longer_promise_counts_after_a_restart_with_a_shorter_timeout(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(tmp_path, offline_timeout=60, in_thread=at_once) as api:
        await api.register("w")
        vm = await place(api, "vm")
        await api.ok("GET", "/vms?filter=worker=w")
        await report(api, vm, "running")
    async with served(tmp_path, offline_timeout=8, in_thread=at_once) as api:
        await trio.sleep(59)
        api.schedule()
        assert (await api.ok("GET", "/vms/vm"))["status"] == "running"
        # The worker may have renewed its lease by the long promise up to here.
        await api.register("w")
        await trio.sleep(59)
        api.schedule()
        assert (await api.ok("GET", "/vms/vm"))["status"] == "running"
        await trio.sleep(1)
        api.schedule()
        assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
        await api.loop.end_promises()
        assert (await api.ok("GET", "/workers/w"))["promisedOfflineTimeoutMs"] == 8000
    async with served(tmp_path, offline_timeout=120, in_thread=at_once) as api:
        assert (await api.ok("GET", "/workers/w"))["promisedOfflineTimeoutMs"] == 120_000, "at the start already"


async def test_promise_of_a_deleted_worker_is_kept_over_a_restart(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(tmp_path, offline_timeout=60, in_thread=at_once) as api:
        await api.register("w")
        vm = await place(api, "vm", restart_policy="OnFailure")
        await api.ok("GET", "/vms?filter=worker=w")
        await report(api, vm, "running")
        await api.ok("DELETE", "/workers/w")
    async with served(tmp_path, offline_timeout=8, in_thread=at_once) as api:
        api.schedule()
        assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
        await trio.sleep(59)
        api.schedule()
        await api.loop.end_promises()
        assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
        await trio.sleep(1)
        api.schedule()
        assert (await api.ok("GET", "/vms/vm"))["status"] == "pending"
        await api.loop.end_promises()
        assert api.state.promises == {}


async def test_end_of_a_promise_that_a_full_disk_refused_is_stored_once_there_is_space(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(tmp_path, offline_timeout=60, in_thread=at_once) as api:
        for name in ("kept", "deleted"):
            await api.register(name)
        await api.ok("DELETE", "/workers/deleted")
    disk = FailingDisk()
    async with served(tmp_path, disk=disk, offline_timeout=8, in_thread=at_once) as api:
        await api.register("kept")
        await trio.sleep(60)
        disk.fault = no_space
        with pytest.raises(StorageError):
            await api.loop.end_promises()
        assert api.store.full
        await api.loop.end_promises()
        assert (api.state.workers["kept"].promised, [*api.state.promises]) == (60_000, ["deleted"])
        disk.fault = lambda verb, number: 0
        await trio.sleep(2 * UPKEEP_SECONDS)
        await api.loop.end_promises()
        assert (api.state.workers["kept"].promised, [*api.state.promises]) == (8000, [])
        assert api.loop.liveness.promises_over() == ({}, {})


async def test_vms_of_another_instance_restart_only_when_its_promise_is_over(
    api: Served, autojump_clock: object
) -> None:
    await api.register("w", instance_id="first")
    vm = await place(api, "vm", restart_policy="OnFailure")
    await api.ok("GET", "/vms?filter=worker=w")
    await report(api, vm, "running")
    api.close_watch("w")
    await trio.sleep(10)
    # A second login or a copied disk: the same machine_id, and none of the VMs.
    await api.register("w", instance_id="second")
    await report(api, vm, "failed", "lost")
    await trio.sleep(DEFAULT_OFFLINE_TIMEOUT - 11)
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
    await trio.sleep(1)
    api.schedule()
    assert (await api.ok("GET", "/vms/vm"))["restart_count"] == 1


@pytest.mark.parametrize("is_asked_before", [False, True])
async def test_vm_without_lease_of_another_instance_is_not_restarted(
    api: Served, autojump_clock: object, *, is_asked_before: bool
) -> None:
    await api.register("w", instance_id="first", capabilities=[VM_RESTART])
    vm = await place(api, "vm")
    await api.ok("GET", "/vms?filter=worker=w")
    await report(api, vm, "running")
    if is_asked_before:
        await api.ok("POST", "/vms/vm/restart")
    api.close_watch("w")
    await trio.sleep(10)
    await api.register("w", instance_id="second", capabilities=[VM_RESTART])
    assert (await api.ok("GET", "/vms/vm"))["status"] == "failed"
    await trio.sleep(DEFAULT_OFFLINE_TIMEOUT)
    api.schedule()
    assert (await api.call("POST", "/vms/vm/restart")).status == 412
    await trio.sleep(DEFAULT_OFFLINE_TIMEOUT)
    api.schedule()
    assert "restart_count" not in await api.ok("GET", "/vms/vm")


# ---- a controller that was restored from an older state -------------------------------------------------------------


async def test_restored_controller_places_nothing_until_its_state_is_accepted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        await api.create("old")
    async with served(tmp_path, in_thread=at_once) as api:
        ensure_identity(api.store)
        first = (await api.ok("GET", "/controller/info"))["clusterId"]
        await api.register("go")
        body = {"capabilities": [WORKER_STATE], "highestRevision": 5000, "resources": {TART_VMS: 4}}
        await register_only(api, "w", **body)
        api.open_watch("w")
        await beat(api, "w", 1, settled=True)
        vm = await place(api, "new")
        assert "accept-state" in vm["status_message"]
        assert "worker" not in vm
        assert await api.ok("GET", "/vms?filter=worker=w") == []
        for worker in ("go", "unknown"):
            assert (await api.call("GET", f"/vms?filter=worker={worker}")).status == 503
    async with served(tmp_path, in_thread=at_once) as api:
        assert (await api.call("GET", "/vms?filter=worker=go")).status == 503, "after a restart, too"
        await api.create("newest")
        second = (await api.ok("POST", "/controller/accept-state"))["clusterId"]
        assert second != first
        await register_only(api, "w", **body)
        assert await api.ok("GET", "/vms?filter=worker=go") == [], "a registration from before came late"
        api.open_watch("w")
        await beat(api, "w", 1, settled=True)
        api.schedule()
        assert (await api.ok("GET", "/vms/newest"))["worker"] == "w"
        assert "unseen" in (await api.ok("GET", "/vms/old"))["status_message"]
        await trio.sleep(DEFAULT_OFFLINE_TIMEOUT)
        await beat(api, "w", 2, settled=True)
        await api.loop.end_promises()
        api.schedule()
        assert (await api.ok("GET", "/vms/old"))["worker"] == "w"


async def test_lists_carry_a_revision_that_rises(api: Served, autojump_clock: object) -> None:
    seen = []
    for name in ("a", "b"):
        await api.create(name)
        answers = [await api.call("GET", path) for path in ("/vms", "/workers", "/service-accounts")]
        seen += [int(answer.headers["x-stored-revision"]) for answer in answers]
    assert seen[0] == seen[1] == seen[2] < seen[3] == seen[4] == seen[5]


def test_a_state_keeps_its_cluster_id(tmp_path: Path) -> None:
    async def identity() -> str:
        async with served(tmp_path, in_thread=at_once) as api:
            ensure_identity(api.store)
            await api.store.wait_durable()
            return api.state.cluster.id

    first = trio.run(identity)
    assert first == trio.run(identity)
