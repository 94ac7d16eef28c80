"""A full disk: nothing is added, nothing is lost, what makes room goes on, and when there is room all is well again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from harness.clients import call
from harness.disks import SmallDisk
from harness.processes import PLAIN, at_last, controller
from harness.strategies import assigned, pending, running, worker
from test_store import ACCOUNT, SETTINGS, delete, has_room, opened, put, read, refusal, writing
from trio.testing import MockClock

from orchard.codec import APIError
from orchard.schema import VM
from orchard.storage.journal import RESERVE_STEP
from orchard.store import RESERVE_BYTES, RESERVE_SHARE, State, Store

ROOM = 2 * RESERVE_BYTES
LARGE = 10_000 * "x"  # an image whose VM takes that many bytes


def found(directory: Path) -> State:
    """What a new start finds, in a copy: a start takes room itself."""
    copy = directory.with_name("copy")
    copy.mkdir(exist_ok=True)
    shutil.copy(directory / "state.jsonl", copy)
    return read(copy)


async def add_until_full(store: Store) -> list[str]:
    """Add VMs until one is refused; give the names of those that were not."""
    added: list[str] = []
    refused = None
    while refused is None:
        name = f"vm{len(added)}"
        try:
            put(store, pending(name, image=LARGE))
            await store.wait_durable()
        except APIError as error:
            refused = error
        else:
            added.append(name)
    assert refused.status == 507
    return added


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return directory


# ---- the store on a disk that has so many bytes --------------------------------------------------------------------


async def test_deletions_and_reports_go_on_and_nothing_else_does(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with writing(opened(data, disk)) as store:
        names = await add_until_full(store)
        assert len(names) > 90
        assert disk.free() < 20_000 + RESERVE_STEP
        for name in names[:20]:
            vm = store.state.vms[name]
            for noun in (pending("new"), ACCOUNT, SETTINGS, worker("new"), change_of_user(vm)):
                with pytest.raises(APIError, match="deleting goes on") as refused:
                    put(store, noun)
                assert refused.value.status == 507
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


async def test_deletions_make_room(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with writing(opened(data, disk)) as store:
        names = await add_until_full(store)
        for name in names:
            delete(store, store.state.vms[name])
            await store.wait_durable()
        await has_room(store)
        assert found(data).json == store.state.json
        assert len(await add_until_full(store)) >= len(names) - 10
        assert found(data).json == store.state.json


async def test_a_reserve_that_is_used_up_refuses_without_a_loss(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with writing(opened(data, disk)) as store:
        names = await add_until_full(store)
        told, refused = 0, None
        while refused is None:
            try:
                put(store, assigned(store.state.vms[names[0]], f"w{told + 1}"))
                await store.wait_durable()
            except APIError as error:
                refused = error
            else:
                told += 1
        assert refused.status == 507
        assert told > 50
        assert store.state.vms[names[0]].state.worker == f"w{told}"
        assert found(data).json == store.state.json
        disk.room += 2 * ROOM
        await has_room(store)
        put(store, running(store.state.vms[names[0]], "w"), pending("new"))
        await store.wait_durable()
        assert found(data).json == store.state.json


async def test_room_that_somebody_else_made_is_found(data: Path, autojump_clock: MockClock) -> None:
    disk = SmallDisk(data, ROOM)
    async with writing(opened(data, disk)) as store:
        names = await add_until_full(store)
        disk.room += 2 * ROOM
        await has_room(store)
        assert (data / "reserve").stat().st_size == RESERVE_BYTES
        assert len(await add_until_full(store)) > len(names)
        assert found(data).json == store.state.json


async def test_who_is_written_with_somebody_who_adds_is_not_refused_for_it(
    data: Path, autojump_clock: MockClock
) -> None:
    disk = SmallDisk(data, ROOM)
    async with writing(opened(data, disk)) as store:
        put(store, pending("a"), pending("b"))
        await store.wait_durable()
        disk.room -= disk.free()
        put(store, pending("c"))
        delete(store, store.state.vms["a"])
        await store.wait_durable()
        assert set(found(data).vms) == {"b", "c"}
        disk.room += ROOM
        await has_room(store)
        disk.room -= disk.free()
        put(store, pending("d", image=RESERVE_BYTES // RESERVE_SHARE * "x"))
        assert (await refusal(store)).status == 507, "the reserve is not for one that adds much"
        assert (data / "reserve").stat().st_size == RESERVE_BYTES


async def test_a_start_without_room_for_the_reserve_adds_nothing_until_there_is(
    data: Path, autojump_clock: MockClock
) -> None:
    disk = SmallDisk(data, 10_000)
    async with writing(opened(data, disk)) as store:
        with pytest.raises(APIError, match=r"reserve: No space left on device; nothing can be added"):
            put(store, pending("a"))
        disk.room = ROOM
        await has_room(store)
        put(store, pending("a"))
        await store.wait_durable()
    assert set(found(data).vms) == {"a"}
    assert (data / "reserve").stat().st_mode & 0o777 == 0o600


# ---- a controller on a small file system ---------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system; the tests above do without")
    point, image = tmp_path / "mounted", tmp_path / "image"
    point.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "orchard", str(point)]
    else:
        with image.open("wb") as file:
            file.truncate(8 * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        mount = ["mount", "-o", "loop", str(image), str(point)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this root cannot mount: {done.stderr.strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def fill(path: Path) -> None:
    """Write a file until there is no room for a byte more."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def answered(url: str, method: str, path: str, body: object = None) -> int:
    return call(url, method, "/v1" + path, body)[0]


def answered_at_last(url: str, path: str, body: object) -> None:
    """Ask until it is granted; each time before it is refused for want of room."""

    def granted() -> bool:
        status = answered(url, "POST", path, body)
        assert status in (200, 507)
        return status == 200

    at_last(granted)


def event(number: int, size: int = 1) -> list[dict[str, object]]:
    return [{"kind": "log_line", "payload": f"{number}".rjust(size), "timestamp": number}]


def test_a_controller_lives_through_a_full_file_system(mounted: Path, tmp_path: Path) -> None:
    arguments = (*PLAIN, "--data-dir", str(mounted / "data"))
    vm = {"image": "any", "startup_script": {"script_content": 20_000 * "x"}}
    with controller(*arguments, home=tmp_path) as (role, url):
        assert answered(url, "POST", "/vms", {"name": "first", **vm}) == 200
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
