"""The health check of the controller."""

from __future__ import annotations

import errno
from pathlib import Path

from harness.disks import SmallDisk
from harness.served import served

from orchard.client import Client
from orchard.handlers.admin import health_answer
from orchard.schema import ServiceAccount
from orchard.storage.state_file import RESERVE_BYTES
from orchard.testing import cluster

ADMIN = ServiceAccount(name="a", token="t", roles=("admin:write",))


async def test_health_needs_no_credentials_and_tells_who_leads(tmp_path: Path) -> None:
    async with served(tmp_path, ADMIN) as api:
        answered = await api.call("GET", "/health")
        assert (answered.status, answered.body) == (200, {"role": "leader", "writes": "ok"})
        assert (await api.call("GET", "/health", authorization="Basic !")).status == 200


async def test_controller_with_a_full_disk_is_healthy_and_says_that_writes_are_refused(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, 2 * RESERVE_BYTES)
    async with served(tmp_path, disk=disk) as api:
        assert (await api.call("GET", "/health")).body["writes"] == "ok"
        disk.room = 0
        answered = await api.call("POST", "/vms", {"name": "vm", "image": "image"})
        while not api.store.full:
            answered = await api.call("POST", "/vms", {"name": f"vm{api.state.revision}", "image": "image"})
        assert answered.status in (200, 507)
        health = await api.call("GET", "/health")
        assert (health.status, health.body) == (200, {"role": "leader", "writes": "refused"})


async def test_controller_that_cannot_store_anything_any_more_is_unhealthy(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        api.store.broken = f"no sync: {errno.EIO}"
        assert (await api.call("GET", "/health")).status == 503
        assert health_answer(api.store).status == 503
        api.store.broken = ""


async def test_client_reads_the_health_without_credentials() -> None:
    async with cluster(workers=0) as c, Client(c.url) as client:
        assert (await client.health()).writes == "ok"
