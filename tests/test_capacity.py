"""`GET /capacity` and `POST /vms?queue=never`: what they say about a cluster is what the scheduler then does."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
from harness.served import Answered, Served, served
from harness.strategies import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.control.scheduling_loop import VMS_PER_PLAN
from orchard.schema import TART_VMS, Drain


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as api:
        yield api


async def create_now(api: Served, name: str, **spec: object) -> Answered:
    """Create a VM that must not wait."""
    return await api.call("POST", "/vms?queue=never", {"name": name, "image": "base", **spec})


async def test_capacity_counts_workers_resources_and_places(api: Served) -> None:
    await api.register("a", resources={TART_VMS: 2, "gpu": 3})
    await api.register("b", resources={TART_VMS: 3}, labels={"xcode": "27"})
    await api.register("c", resources={TART_VMS: 5})
    await api.ok("PUT", "/workers/c", {"name": "c", "scheduling_paused": True})
    await api.register("d", arch="amd64")
    await api.ok("POST", "/workers", {"name": "e", "machine_id": "m", "resources": {TART_VMS: 9}})
    await api.create("r", labels={"xcode": "27"})
    await api.create("waits", resources={TART_VMS: 4})
    got = await api.ok("GET", "/capacity")
    assert got == {
        "workers": {"registered": 5, "online": 3, "paused": 1, "draining": 0},
        "total": {TART_VMS: 5, "gpu": 3},
        "used": {TART_VMS: 1, "gpu": 0},
        "free": {TART_VMS: 4, "gpu": 3},
        "fits": 4,
        "queued": 1,
        "queuedAhead": 1,
        "reason": "",
    }
    with_label = await api.ok("GET", "/capacity?labels=xcode=27")
    assert (with_label["fits"], with_label["free"], with_label["total"]) == (2, {TART_VMS: 2}, {TART_VMS: 3})
    assert (await api.ok("GET", "/capacity?resources=gpu=1"))["fits"] == 2
    assert (await api.ok("GET", f"/capacity?resources={TART_VMS}=2,gpu=1"))["fits"] == 1
    assert (await api.ok("GET", "/capacity?arch=amd64"))["fits"] == 2
    linux = await api.ok("GET", "/capacity?os=linux")
    assert linux["fits"] == 2_000_000, "a VM that asks for nothing fits in any number"


async def test_capacity_says_why_nothing_fits(api: Served) -> None:
    nothing = await api.ok("GET", "/capacity")
    assert (nothing["fits"], nothing["workers"]["registered"], bool(nothing["reason"])) == (0, 0, True)
    await api.register("a")
    never = await api.ok("GET", "/capacity?labels=xcode=27")
    assert (never["fits"], never["reason"]) == (0, "no worker has label xcode=27")
    for name in ("r", "s"):
        await api.create(name)
    full = await api.ok("GET", "/capacity")
    assert (full["fits"], full["free"], "lacks" in full["reason"]) == (0, {TART_VMS: 0}, True)


@pytest.mark.parametrize(
    "query",
    [
        "resources=gpu",
        "resources=gpu=x",
        "resources=gpu=-1",
        "resources=gpu=1,gpu=2",
        "resources==1",
        "resources=gpu=99999999999999999999",
        f"resources=gpu={'9' * 5000}",
        "labels=xcode",
        "labels=a=b,a=c",
        "labels=a=%250A",
        "arch=riscv",
        "runtime=docker",
        "os=plan9",
        "arch=arm64&arch=amd64",
    ],
)
async def test_bad_parameters_of_a_shape_are_refused(api: Served, query: str) -> None:
    answered = await api.call("GET", f"/capacity?{query}")
    assert answered.status == 400
    assert query.partition("=")[0] in answered.message


async def test_names_and_values_with_commas_are_percent_encoded(api: Served) -> None:
    await api.register("a", labels={"a,b": "c,d=e"})
    assert (await api.ok("GET", "/capacity?labels=a%252Cb=c%252Cd=e"))["fits"] == 2


async def test_vm_that_must_not_wait_starts_or_is_refused(api: Served) -> None:
    refused = await create_now(api, "early")
    assert (refused.status, refused.headers["retry-after"].isdigit()) == (503, True)
    await api.register("a")
    started = await create_now(api, "one")
    assert (started.status, started.body["worker"]) == (200, "a")
    assert (await create_now(api, "one")).status == 409
    assert (await create_now(api, "two", priority=5)).status == 200
    later, never = await create_now(api, "three"), await create_now(api, "four", labels={"xcode": "27"})
    assert (later.status, never.status, "retry-after" in never.headers) == (503, 412, False)
    assert "xcode=27" in never.message
    too_large = await create_now(api, "five", resources={TART_VMS: 3})
    assert (too_large.status, TART_VMS in too_large.message) == (412, True)
    assert sorted(api.state.vms) == ["one", "two"]
    api.schedule()
    assert {vm.state.worker for vm in api.state.vms.values()} == {"a"}
    assert (await api.call("POST", "/vms?queue=always", {"name": "x", "image": "base"})).status == 400


async def test_vm_that_must_not_wait_takes_no_place_from_those_that_wait(api: Served) -> None:
    await api.register("a")
    await api.create("low")
    await api.create("high", priority=9)
    # The scheduler has not looked at the queue yet.
    assert (await create_now(api, "new", priority=10)).status == 503
    assert sorted(api.state.vms) == ["high", "low"]
    assert {vm.state.worker for vm in api.state.vms.values()} == {"a"}


async def test_places_that_a_long_queue_takes_are_not_counted(api: Served) -> None:
    await api.register("a", resources={TART_VMS: 100})
    for number in range(VMS_PER_PLAN + 10):
        await api.create(f"vm-{number}")
    got = await api.ok("GET", "/capacity")
    assert (got["fits"], got["queued"]) == (100 - VMS_PER_PLAN - 10, 0)


async def test_vms_that_must_not_wait_get_each_place_once(api: Served) -> None:
    for name in ("a", "b", "c"):
        await api.register(name)
    statuses = []

    async def create(number: int) -> None:
        if number % 3:
            statuses.append((await create_now(api, f"vm-{number}")).status)
        else:
            await api.create(f"waiting-{number}")

    async with trio.open_nursery() as nursery:
        for number in range(24):
            nursery.start_soon(create, number)
    api.schedule()
    vms = api.state.vms.values()
    assert all(vm.state.worker for vm in vms if vm.name.startswith("vm-")), "none of them waits"
    assert sum(bool(vm.state.worker) for vm in vms) == 6
    assert statuses.count(200) == sum(vm.name.startswith("vm-") for vm in vms)
    assert set(statuses) <= {200, 503}


async def test_refusal_says_that_a_restored_state_places_nothing(api: Served) -> None:
    await api.register("a")
    await api.ok("POST", "/workers", {"name": "b", "machine_id": "m", "highestRevision": 10**6})
    assert (await create_now(api, "vm")).status == 503
    got = await api.ok("GET", "/capacity")
    assert (got["fits"], "accept-state" in got["reason"]) == (0, True)


async def test_disk_setting_keeps_vms_away_as_soon_as_it_changes(api: Served) -> None:
    await api.register("a", resources={TART_VMS: 4})
    await api.create("first")
    api.schedule()
    seen = {"name": "a", "last_seen": "2026-01-31T12:00:01Z", "disk": {"totalBytes": 10**12, "freeBytes": 30 * 10**9}}
    await api.ok("PUT", "/workers/a", seen)
    assert (await api.ok("GET", "/capacity"))["fits"] == 3
    await api.ok("PUT", "/cluster-settings", {"minFreeDiskGB": 31})
    await api.create("second")
    api.schedule()
    assert api.state.vms["second"].state.worker == ""
    full = await api.ok("GET", "/capacity")
    assert (full["fits"], "disk" in full["reason"]) == (0, True)
    assert (await create_now(api, "vm")).status == 503
    await api.register("b")
    assert (await api.ok("GET", "/capacity"))["fits"] == 1, "a worker that reports no disk has enough"
    await api.ok("PUT", "/cluster-settings", {"minFreeDiskGB": 30})
    assert (await api.ok("GET", "/capacity"))["fits"] == 4


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"resources": {TART_VMS: 2}}, f"resources={TART_VMS}=2"),
    ({"resources": {"gpu": 1}}, "resources=gpu=1"),
    ({"os": "linux", "resources": {"gpu": 1}}, "os=linux&resources=gpu=1"),
    ({"labels": {"zone": "a"}}, "labels=zone=a"),
    ({"labels": {"org.cirruslabs.orchard.worker-name": "w1"}}, "labels=org.cirruslabs.orchard.worker-name=w1"),
    ({"arch": "amd64"}, "arch=amd64"),
]


async def fill_at_random(api: Served, order: random.Random) -> None:
    """Make a cluster of workers in any state, with VMs that run, wait or make their worker sick."""
    await api.ok("PUT", "/cluster-settings", {"minFreeDiskGB": order.choice([0, 5])})
    for number in range(order.randint(1, 5)):
        name = f"w{number}"
        labels = {"zone": order.choice("ab")}
        resources = {TART_VMS: order.randint(0, 4), "gpu": order.randint(0, 2)}
        arch = order.choice(["arm64", "arm64", "amd64"])
        await api.register(name, labels=labels, resources=resources, arch=arch)
        free = order.choice([4, 6]) * 10**9
        seen = {"name": name, "last_seen": "2026-01-31T12:00:01Z", "disk": {"totalBytes": 10**12, "freeBytes": free}}
        await api.ok("PUT", f"/workers/{name}", seen)
        match order.choice(["online", "online", "paused", "gone", "drain", "sick"]):
            case "paused":
                await api.ok("PUT", f"/workers/{name}", {"name": name, "scheduling_paused": True})
            case "gone":
                await api.ok("POST", f"/rpc/goodbye?workerName={name}")
            case "drain":
                with api.store.transaction() as tx:
                    tx.put(replace(api.state.workers[name], scheduling_paused=True, drain=Drain()))
            case "sick":
                await make_sick(api, name, arch)
    for number in range(order.randint(0, 8)):
        await api.create(f"vm{number}", priority=order.choice([0, 0, 3]), **order.choice(SHAPES)[0])


async def make_sick(api: Served, worker: str, arch: str) -> None:
    """Have three VMs fail on a worker before they run, if it takes VMs."""
    for number in range(3):
        only = {"org.cirruslabs.orchard.worker-name": worker}
        name = f"sick-{worker}-{number}"
        created = await api.call("POST", "/vms?queue=never", {"name": name, "image": "i", "labels": only, "arch": arch})
        if created.status == 200:
            failed = {"uid": created.body["uid"], "status": "failed", "status_message": "no disk"}
            await api.ok("PUT", f"/vms/{name}/state", failed)


@settings(QUICK, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.booleans(), st.booleans())
@pytest.mark.slow
def test_as_many_vms_start_as_fit(seed: int, shape: tuple[dict[str, Any], str], is_planned: bool, waits: bool) -> None:
    spec, query = shape

    async def compare() -> None:
        with TemporaryDirectory() as directory:
            async with served(Path(directory)) as api:
                await fill_at_random(api, random.Random(seed))
                if is_planned:
                    api.schedule()
                fits = (await api.ok("GET", f"/capacity?{query}"))["fits"]
                statuses = []
                for number in range(fits + 2):
                    body = {"name": f"new-{number}", "image": "base", "priority": number % 2, **spec}
                    created = await api.call("POST", "/vms" if waits else "/vms?queue=never", body)
                    statuses.append(created.status == 200)
                assert waits or statuses == [True] * fits + [False] * 2
                api.schedule()
                started = [vm for vm in api.state.vms.values() if vm.name.startswith("new-") and vm.state.worker]
                assert len(started) == fits

    trio.run(compare)
