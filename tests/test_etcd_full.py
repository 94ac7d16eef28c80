"""A controller on a real etcd that has a quota of 20 MB, filled up over the API; and objects that are too large for etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from orchard.client import Client, ResponseError
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Running, run
from orchard.etcd_nodes import EtcdNodes, EtcdOptions, etcd_nodes
from orchard.net.transport import Transport
from orchard.storage import etcd_engine

pytestmark = [pytest.mark.needs("etcd"), pytest.mark.slow]

QUOTA_MB = 20
TTL = 5.0  # seconds


@asynccontextmanager
async def controller(directory: Path, etcd: EtcdNodes, max_mib: int) -> AsyncIterator[Client]:
    settings = EtcdSettings(EtcdAccess(etcd.url), max_mib=max_mib, leader_ttl=TTL)
    async with trio.open_nursery() as nursery:
        running: Running = await nursery.start(
            partial(run, ControllerSettings(directory, "127.0.0.1", 0, tls=False, auth=False, etcd=settings))
        )
        async with Client(running.url) as client:
            yield client
        nursery.cancel_scope.cancel()


async def create(client: Client, name: str, size: int = 700_000) -> None:
    await client.vms.create(name=name, image="i", startup_script={"script_content": "x" * size})


async def fill(client: Client) -> list[str]:
    """Create VMs until that is refused with 507. Return their names."""
    names: list[str] = []
    while True:
        try:
            await create(client, f"vm-{len(names)}")
        except ResponseError as error:
            if error.status != 507:
                raise
            return names
        names.append(f"vm-{len(names)}")
        assert len(names) < QUOTA_MB * 2


async def make_space(etcd: EtcdNodes) -> None:
    """Do what docs/etcd.md says of a full etcd."""
    async with Transport(etcd.url, connect_seconds=10, answer_seconds=60) as gateway:

        async def ask(path: str, **body: object) -> dict[str, object]:
            answer: dict[str, object] = (await gateway.request("POST", f"/v3/{path}", json=body)).json()
            return answer

        header = (await ask("maintenance/status"))["header"]
        assert isinstance(header, dict)
        await ask("kv/compaction", revision=header["revision"], physical=True)
        await ask("maintenance/defragment")
        alarms = (await ask("maintenance/alarm", action="GET")).get("alarms", [])
        assert isinstance(alarms, list)
        for alarm in alarms:
            await ask("maintenance/alarm", **{**alarm, "action": "DEACTIVATE"})


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_engine, "_LOOK_FULL_SECONDS", 0.1)


async def wait_space(client: Client) -> None:
    """Wait until a VM can be created."""
    with trio.fail_after(60):
        while True:
            try:
                await create(client, "after", 1)
                return
            except ResponseError as error:
                if error.status != 507:
                    raise
            await trio.sleep(0.1)


async def names_of(client: Client) -> list[str]:
    return sorted(vm.name for vm in await client.vms.list())


async def test_most_that_etcd_may_hold_is_reached_before_its_quota(tmp_path: Path) -> None:
    """Additions are refused. Deletions and a fail-over go on, and make space in the end."""
    async with etcd_nodes(tmp_path, options=EtcdOptions(quota_bytes=QUOTA_MB * 1_000_000)) as etcd:
        async with controller(tmp_path / "a", etcd, 8) as client:
            names = await fill(client)
            await client.vms.delete(names.pop())
            with pytest.raises(ResponseError, match=r"--etcd-max-mib.*deletions are accepted"):
                await create(client, "small", 1)
        async with controller(tmp_path / "b", etcd, 8) as client:
            assert await names_of(client) == sorted(names)
            for name in names[1:]:
                await client.vms.delete(name)
            await make_space(etcd)
            await wait_space(client)
            assert await names_of(client) == ["after", names[0]]


async def test_quota_that_is_used_up_loses_nothing_and_ends_as_documented(tmp_path: Path) -> None:
    """etcd then refuses deletions and fail-overs, too. What was acknowledged is there, and the controller leads on."""
    async with etcd_nodes(tmp_path, options=EtcdOptions(quota_bytes=QUOTA_MB * 1_000_000)) as etcd:
        async with controller(tmp_path / "a", etcd, 1024) as client:
            names = await fill(client)
            with pytest.raises(ResponseError, match="defragment") as refused:
                await client.vms.delete(names[0])
            assert refused.value.status == 507
            with pytest.raises(ResponseError, match=f"{etcd.url}.*defragment") as refused:
                await create(client, "small", 1)
            assert refused.value.status == 507
            assert "deletions are accepted" not in refused.value.message
            assert await names_of(client) == sorted(names)
            await make_space(etcd)
            await wait_space(client)
            await client.vms.delete(names.pop())
        async with controller(tmp_path / "b", etcd, 1024) as client:
            assert await names_of(client) == sorted([*names, "after"])


async def test_object_that_is_too_large_for_etcd_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async with etcd_nodes(tmp_path) as etcd, controller(tmp_path / "a", etcd, 1024) as client:
        await create(client, "vm", 900_000)
        for size, status in ((1_100_000, 412), (2_500_000, 412), (5_000_000, 413)):
            with pytest.raises(ResponseError) as refused:
                await create(client, "larger", size)
            assert refused.value.status == status
        # JSON escapes each of these characters: the limit is on what is stored.
        with pytest.raises(ResponseError) as refused:
            await client.vms.create(name="larger", image="i", startup_script={"script_content": "\x01" * 300_000})
        assert refused.value.status == 412
        assert [
            len(vm.spec.startup_script.script_content) for vm in await client.vms.list() if vm.spec.startup_script
        ] == [900_000]
        await create(client, "next", 900_000)
