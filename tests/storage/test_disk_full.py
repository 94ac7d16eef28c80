"""A full disk: additions are refused, nothing is lost, deletions and reports go on, and space is noticed when it is back."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from harness.clients import call, connected_worker
from harness.disks import SmallDisk
from harness.processes import PLAIN, at_last, controller
from harness.programs import ROOT_REASON, need
from harness.served import at_once
from harness.stores import (
    ACCOUNT,
    SETTINGS,
    delete,
    open_store,
    problems_of,
    put,
    refused_write,
    running_store,
    wait_not_full,
)
from harness.strategies import assigned, pending, running, worker
from trio.testing import MockClock

from orchard.base.files import STATE_FILE
from orchard.schema import VM
from orchard.storage.errors import StorageFullError
from orchard.storage.journal import RESERVE_STEP
from orchard.storage.state_file import RESERVE_BYTES, RESERVE_SHARE
from orchard.store import State, Store, read_state

# Bytes of the small disk.
ROOM = 2 * RESERVE_BYTES
# An image that makes the record of its VM so large.
LARGE = 10_000 * "x"


def found(directory: Path) -> State:
    """Return the state on the disk, after checking it. A restart would take space itself."""
    state = read_state(directory / STATE_FILE)
    assert problems_of(state) == []
    return state


async def add_until_full(store: Store) -> list[str]:
    """Add VMs until one is refused; return the names of the others."""
    added: list[str] = []
    while True:
        name = f"vm{len(added)}"
        try:
            put(store, pending(name, image=LARGE))
            await store.wait_durable()
        except StorageFullError:
            return added
        added.append(name)


async def assign_until_full(store: Store, name: str) -> int:
    """Assign a VM to w1, w2, ... until that is refused; return the number of the last worker."""
    number = 0
    while True:
        try:
            put(store, assigned(store.state.vms[name], f"w{number + 1}"))
            await store.wait_durable()
        except StorageFullError:
            return number
        number += 1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return directory


# ---- the store on a disk that has so many bytes --------------------------------------------------------------------


@pytest.mark.slow
async def test_full_disk_accepts_deletions_and_reports_only(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with running_store(open_store(data, disk, at_once)) as store:
        names = await add_until_full(store)
        assert len(names) > 90
        assert disk.free() < 20_000 + RESERVE_STEP
        for name in names[:20]:
            vm = store.state.vms[name]
            for item in (pending("new"), ACCOUNT, SETTINGS, worker("new"), change_of_user(vm)):
                with pytest.raises(StorageFullError, match="deletions are accepted"):
                    put(store, item)
            put(store, running(vm))
            await store.wait_durable()
            assert found(data).vms[name] == store.state.vms[name]
        assert disk.refused > 2
        for name in names[:90]:
            delete(store, store.state.vms[name])
            await store.wait_durable()
        assert found(data).json == store.state.json
        assert set(store.state.vms) == set(names[90:])


def change_of_user(vm: VM) -> VM:
    return replace(vm, spec=replace(vm.spec, cpu=vm.spec.cpu + 1))


async def test_deletions_free_space_for_additions(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with running_store(open_store(data, disk, at_once)) as store:
        names = await add_until_full(store)
        for name in names:
            delete(store, store.state.vms[name])
            await store.wait_durable()
        await wait_not_full(store)
        assert found(data).json == store.state.json
        assert len(await add_until_full(store)) >= len(names) - 10
        assert found(data).json == store.state.json


async def test_used_up_reserve_refuses_reports_without_loss(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with running_store(open_store(data, disk, at_once)) as store:
        names = await add_until_full(store)
        told = await assign_until_full(store, names[0])
        assert told > 50
        assert store.state.vms[names[0]].state.worker == f"w{told}"
        assert found(data).json == store.state.json
        disk.room += 2 * ROOM
        await wait_not_full(store)
        put(store, running(store.state.vms[names[0]], "w"), pending("new"))
        await store.wait_durable()
        assert found(data).json == store.state.json


@pytest.mark.slow
async def test_space_freed_by_another_program_is_noticed(
    data: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    disk = SmallDisk(data, ROOM)
    async with running_store(open_store(data, disk, at_once)) as store:
        names = await add_until_full(store)
        disk.room += 2 * ROOM
        await wait_not_full(store)
        logged = [record.getMessage() for record in caplog.records]
        assert [line.partition(",")[0] for line in logged] == ["disk full", "disk has space again"]
        assert (data / "reserve").stat().st_size == RESERVE_BYTES
        assert len(await add_until_full(store)) > len(names)
        assert found(data).json == store.state.json


async def test_deletion_in_one_batch_with_a_small_addition_gets_the_reserve(
    data: Path, autojump_clock: MockClock
) -> None:
    disk = SmallDisk(data, ROOM)
    async with running_store(open_store(data, disk, at_once)) as store:
        put(store, pending("a"), pending("b"))
        await store.wait_durable()
        disk.room -= disk.free()
        put(store, pending("c"))
        delete(store, store.state.vms["a"])
        await store.wait_durable()
        assert set(found(data).vms) == {"b", "c"}
        disk.room += ROOM
        await wait_not_full(store)
        disk.room -= disk.free()
        put(store, pending("d", image=RESERVE_BYTES // RESERVE_SHARE * "x"))
        # A large batch that adds something does not get the reserve.
        await refused_write(store, StorageFullError)
        assert (data / "reserve").stat().st_size == RESERVE_BYTES


async def test_start_without_space_for_the_reserve_refuses_additions_until_there_is_space(
    data: Path, autojump_clock: MockClock
) -> None:
    disk = SmallDisk(data, 10_000)
    async with running_store(open_store(data, disk, at_once)) as store:
        with pytest.raises(StorageFullError, match=r"reserve: No space left on device; nothing can be added"):
            put(store, pending("a"))
        disk.room = ROOM
        await wait_not_full(store)
        put(store, pending("a"))
        await store.wait_durable()
    assert set(found(data).vms) == {"a"}
    assert (data / "reserve").stat().st_mode & 0o777 == 0o600


# ---- a controller on a small file system ---------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB."""
    need("mount")
    point, image = tmp_path / "mounted", tmp_path / "image"
    point.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "orchard", str(point)]
    else:
        need("mkfs.ext4")
        with image.open("wb") as file:
            file.truncate(8 * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        mount = ["mount", "-o", "loop", str(image), str(point)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{ROOT_REASON}: cannot mount: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def fill(path: Path) -> None:
    """Write a file until not one byte more fits."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def answered(url: str, method: str, path: str, body: object = None) -> int:
    return call(url, method, "/v1" + path, body)[0]


def answered_at_last(url: str, path: str, body: object) -> None:
    """Send a POST until it is answered with 200; before, it is answered with 507."""

    def granted() -> bool:
        status = answered(url, "POST", path, body)
        assert status in (200, 507)
        return status == 200

    at_last(granted)


def event(number: int, size: int = 1) -> list[dict[str, object]]:
    return [{"kind": "log_line", "payload": f"{number}".rjust(size), "timestamp": number}]


@pytest.mark.slow
def test_controller_survives_a_full_file_system(mounted: Path, tmp_path: Path) -> None:
    arguments = (*PLAIN, "--data-dir", str(mounted / "data"))
    vm = {"image": "any", "startup_script": {"script_content": 20_000 * "x"}}
    with controller(*arguments, home=tmp_path) as (role, url):
        with connected_worker(url, "w"):
            assert answered(url, "POST", "/vms", {"name": "first", **vm}) == 200
            at_last(lambda: call(url, "GET", "/v1/vms/first")[1].get("worker") == "w")
        assert answered(url, "POST", "/vms/first/events", event(0)) == 200
        fill(mounted / "filler")
        there = ["first"]
        while (status := answered(url, "POST", "/vms", {"name": f"vm{len(there)}", **vm})) == 200:
            there.append(f"vm{len(there)}")
        assert status == 507
        fill(mounted / "filler")
        there += ["second"] if answered(url, "POST", "/vms", {"name": "second", "image": "any"}) == 200 else []
        assert answered(url, "POST", "/vms/first/events", event(1, 300_000)) == 507
        assert answered(url, "POST", "/service-accounts", {"name": "a", "roles": []}) == 507
        assert answered(url, "PATCH", "/vms/first", {"headless": True}) == 507
        for number in range(10):
            assert answered(url, "PUT", "/vms/first/state", {"status": "pending", "image_fqn": f"{number}"}) == 200
            assert call(url, "GET", "/v1/vms/first")[1]["image_fqn"] == f"{number}"
        for name in there[1:]:
            assert answered(url, "DELETE", f"/vms/{name}") == 200
        assert [one["name"] for one in call(url, "GET", "/v1/vms")[1]] == ["first"]
        assert role.stop(signal.SIGKILL) != 0
    with controller(*arguments, home=tmp_path) as (role, url):
        (kept,) = call(url, "GET", "/v1/vms")[1]
        assert (kept["name"], len(kept["startup_script"]["script_content"])) == ("first", 20_000)
        assert kept.get("headless", False) is False
        fill(mounted / "filler")
        (mounted / "filler").unlink()
        answered_at_last(url, "/vms", {"name": "third", **vm})
        answered_at_last(url, "/vms/first/events", event(2, 300_000))
        role.stop(signal.SIGKILL)
    with controller(*arguments, home=tmp_path) as (role, url):
        assert {one["name"] for one in call(url, "GET", "/v1/vms")[1]} == {"first", "third"}
        assert [one["timestamp"] for one in call(url, "GET", "/v1/vms/first/events")[1]] == [0, 2]
        assert role.stop() == 0
