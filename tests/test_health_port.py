"""The port of health checks: who leads, over plain HTTP, also while the controller stands by."""

from __future__ import annotations

import json
from pathlib import Path

import trio
from harness.clients import call
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from harness.processes import eventually, free_port

from orchard.control.stored_data import CampaignPlatform
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Platform, run


async def check(port: int, method: str = "GET", path: str = "/v1/health") -> tuple[int, object]:
    return await trio.to_thread.run_sync(call, f"http://127.0.0.1:{port}", method, path)


async def test_controller_with_its_own_files_leads(tmp_path: Path, nursery: trio.Nursery) -> None:
    port = free_port()
    await nursery.start(
        run, ControllerSettings(data_dir=tmp_path, host="127.0.0.1", port=0, health=("127.0.0.1", port))
    )
    for path in ("/v1/health", "/", "/any"):
        assert await check(port, path=path) == (200, {"role": "leader", "writes": "ok"})
    assert (await check(port, "POST"))[0] == 405
    nursery.cancel_scope.cancel()


async def test_standby_names_the_leader_until_it_leads(tmp_path: Path, nursery: trio.Nursery) -> None:
    port, etcd = free_port(), MemoryEtcd()
    other = {"by": "x", "url": "https://other:6120", "since": "2026-01-31T12:00:00Z"}
    key = encoded(b"/orchard/leader")
    etcd.answer("/v3/kv/put", {"key": key, "value": encoded(json.dumps(other).encode())})
    async with running_memory_etcd(etcd) as listener:
        settings = ControllerSettings(
            data_dir=tmp_path,
            host="127.0.0.1",
            port=0,
            health=("127.0.0.1", port),
            etcd=EtcdSettings(EtcdAccess("http://etcd:2379")),
        )
        platform = Platform(campaign=CampaignPlatform(connect=listener.connect))
        scope = trio.CancelScope()

        async def serve() -> None:
            with scope:
                await run(settings, platform=platform)

        nursery.start_soon(serve)
        await eventually(lambda: platform.campaign.leader_url() != "")
        assert await check(port) == (503, {"role": "standby", "leader": "https://other:6120"})
        etcd.answer("/v3/kv/deleterange", {"key": key})

        async def leads() -> bool:
            return await check(port) == (200, {"role": "leader", "writes": "ok"})

        await eventually(leads)
        scope.cancel()
