"""What the next controller has of the one before: on files after a restart, on etcd in another directory."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from harness.processes import GENEROUS

from orchard.base.files import ACCESS_KEY_FILE, SSH_HOST_KEY_FILE, TLS_KEY_FILE
from orchard.client import Client, ResponseError
from orchard.control.stored_data import CampaignPlatform
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Platform, Running, run
from orchard.schema import TART_VMS
from orchard.storage.errors import NotWrittenError
from orchard.storage.etcd_engine import DEFAULT_MAX_MIB
from orchard.storage.journal import Reserve
from orchard.store import DecodedObject, decode_object

TOKEN = "a-token-of-the-tests"
SETTINGS = {
    "hostDirPolicies": [{"pathPrefix": "/x"}],
    "webhooks": [{"url": "https://example.com", "events": ["vm.failed"], "secret": "at least 16 characters"}],
}


@asynccontextmanager
async def controller(
    directory: Path, etcd: MemoryEtcd | None, *, max_mib: int = DEFAULT_MAX_MIB, admin_token: str = TOKEN, **more: Any
) -> AsyncIterator[tuple[Running, Client]]:
    settings = ControllerSettings(
        data_dir=directory,
        host="127.0.0.1",
        port=0,
        admin_token=admin_token,
        ssh=("127.0.0.1", 0),
        etcd=None if etcd is None else EtcdSettings(EtcdAccess("http://etcd:2379"), leader_ttl=60, max_mib=max_mib),
        **more,
    )
    stop = trio.Event()
    async with running_memory_etcd(etcd or MemoryEtcd()) as listener, trio.open_nursery() as nursery:
        platform = Platform(campaign=CampaignPlatform(connect=listener.connect))

        async def serve(*, task_status: trio.TaskStatus[Running]) -> None:
            await run(settings, stop=stop, grace=0, platform=platform, task_status=task_status)

        with trio.fail_after(GENEROUS):
            running = await nursery.start(serve)
        async with Client(
            running.url, account="bootstrap-admin", token=admin_token, certificate=running.certificate
        ) as client:
            yield running, client
        stop.set()


async def shown(client: Client) -> dict[str, Any]:
    """Return what clients see, but for what counts anew."""
    paths = (
        "/vms",
        "/workers",
        "/service-accounts",
        "/cluster-settings",
        "/history",
        "/vms/a/events?kinds=lifecycle,log_line",
    )
    found = {path: (await client.request("GET", path)).json() for path in paths}
    # The worker is not connected to the next controller, so the reason why a VM waits is another one.
    for item in (*found["/workers"], *found["/vms"]):
        for name in ("since", "last_seen", "state", "version", "status_message"):
            item.pop(name, None)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("max_mib", [DEFAULT_MAX_MIB, 0])
async def test_longer_offline_timeout_is_promised_at_a_takeover_also_of_a_full_etcd(
    max_mib: int, tmp_path: Path
) -> None:
    etcd = MemoryEtcd()
    worker = {"name": "mac", "machine_id": "m", "resources": {TART_VMS: 2}}
    async with controller(tmp_path / "first", etcd, worker_offline_timeout=200) as (_, client):
        await client.workers.register(worker)
        await client.vms.create(name="a", image="i")
    async with controller(tmp_path / "second", etcd, max_mib=max_mib, worker_offline_timeout=300) as (_, client):
        assert json.loads(etcd.values[b"/orchard/worker/mac"].value)["promisedOfflineTimeoutMs"] == 300_000
        if max_mib == 0:
            with pytest.raises(ResponseError) as refused:
                await client.vms.create(name="b", image="i")
            assert refused.value.status == 507
        await client.vms.delete("a")
    # A shorter one leaves the promise as it was: the worker may not have heard of it.
    async with controller(tmp_path / "third", etcd, max_mib=max_mib, worker_offline_timeout=200):
        assert json.loads(etcd.values[b"/orchard/worker/mac"].value)["promisedOfflineTimeoutMs"] == 300_000


@pytest.mark.parametrize("engine", ["file", "etcd"])
@pytest.mark.parametrize("is_there", [True, False])
async def test_without_space_a_start_stores_its_token_and_rights_are_taken_back(
    engine: str, is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an account that was deleted: an administrator who makes space has to get in."""
    etcd = MemoryEtcd() if engine == "etcd" else None
    directories = [tmp_path / "first", tmp_path / ("second" if etcd else "first")]
    async with controller(directories[0], etcd) as (_, client):
        await client.service_accounts.create(name="leaked", token="t" * 32, roles=["compute:write"])
        if not is_there:
            await client.service_accounts.delete("bootstrap-admin")

    # The disk of the file engine is full at the start.
    def fill(reserve: Reserve) -> None:
        raise NotWrittenError.of_file(reserve.path, OSError(errno.ENOSPC, ""))

    monkeypatch.setattr(Reserve, "fill", fill)
    async with controller(directories[1], etcd, max_mib=0, admin_token="another-token-of-the-tests") as (_, client):
        await client.check()
        await client.service_accounts.replace("leaked", token="u" * 32, roles=[])
        with pytest.raises(ResponseError) as refused:
            await client.service_accounts.create(name="new")
        assert refused.value.status == 507


# A controller stands by, and takes over when the key of the leader is deleted. Prints the modules that were imported then.
STANDBY = """
import sys, trio
from pathlib import Path
from functools import partial
sys.path.insert(0, sys.argv[1])
from harness.memory_etcd import MemoryEtcd, running_memory_etcd
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Platform, run
from orchard.storage.etcd import EtcdClient, delete, put
from orchard.control.stored_data import CampaignPlatform

async def main():
    access, local, stop = EtcdAccess("http://etcd:2379"), ("127.0.0.1", 0), trio.Event()
    settings = ControllerSettings(Path(sys.argv[2]), *local, ssh=local, metrics=local, health=local, etcd=EtcdSettings(access))
    async with running_memory_etcd(MemoryEtcd()) as listener, EtcdClient(access, listener.connect) as client:
        await client.transact([], [put("/orchard/leader", b'{"by": "another", "url": "http://another"}')])
        campaign = CampaignPlatform(connect=listener.connect)
        async def take_over():
            while not campaign.leader_url():
                await trio.sleep(0.01)
            before.update(sys.modules)
            await client.transact([], [delete("/orchard/leader")])
        before = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_over)
            await nursery.start(partial(run, settings, stop=stop, grace=0, platform=Platform(campaign=campaign)))
            print(*sys.modules.keys() - before.keys())
            stop.set()

trio.run(main)
"""


@pytest.mark.slow
def test_standby_has_imported_all_that_a_takeover_needs(tmp_path: Path) -> None:
    """So a package may be replaced under a controller that stands by."""
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", STANDBY, tests, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=GENEROUS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    new = {name.partition(".")[0] for name in done.stdout.split()}
    # Python itself is not replaced under a process.
    assert new - sys.stdlib_module_names == set()


async def test_standby_takes_over_with_what_it_has_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etcd = MemoryEtcd()
    async with controller(tmp_path / "first", etcd) as (_, client):
        await client.vms.create(name="a", image="i")
    leader = {"key": encoded(b"/orchard/leader")}
    etcd.answer("/v3/kv/put", {**leader, "value": encoded(b'{"by": "another", "url": "http://another"}')})
    decoded_late = []

    def decode_ahead(kind: str, raw: dict[str, Any]) -> DecodedObject:
        # Now the other controller ends.
        etcd.answer("/v3/kv/deleterange", leader)
        return decode_object(kind, raw)

    def decode_late(kind: str, raw: dict[str, Any]) -> DecodedObject:
        decoded_late.append(kind)
        return decode_object(kind, raw)

    monkeypatch.setattr("orchard.control.standby._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("orchard.control.standby.decode_object", decode_ahead)
    monkeypatch.setattr("orchard.store.decode_object", decode_late)
    async with controller(tmp_path / "second", etcd) as (_, client):
        assert (await client.vms.get("a")).spec.image == "i"
    assert decoded_late
    assert "vm" not in decoded_late


@pytest.mark.parametrize("engine", ["file", "etcd"])
async def test_next_controller_answers_as_the_one_before_to_all_that_clients_and_workers_hold(
    engine: str, tmp_path: Path
) -> None:
    etcd = MemoryEtcd() if engine == "etcd" else None
    directories = [tmp_path / "first", tmp_path / ("second" if etcd else "first")]
    async with controller(directories[0], etcd) as (before, client):
        await client.request("PUT", "/cluster-settings", json=SETTINGS)
        await client.request(
            "POST", "/service-accounts", json={"name": "ci", "token": "t" * 20, "roles": ["compute:read"]}
        )
        await client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 2}})
        for name in "ab":
            await client.vms.create(name=name, image="i", labels={"no": "worker"}, metadata={"k": "ü"})
        await client.vms.append_events("a", [{"kind": "log_line", "payload": "said", "timestamp": 1}])
        await client.vms.delete("b")
        token = (await client.request("POST", "/vms/a/access-tokens")).json()["token"]
        expected = await shown(client)
        cursor = (await client.request("GET", "/vms/a/events?limit=1&kinds=lifecycle,log_line")).headers[
            "x-next-cursor"
        ]
    async with controller(directories[1], etcd) as (after, client):
        assert after.certificate == before.certificate
        assert await shown(client) == expected
        rest = (await client.request("GET", f"/vms/a/events?kinds=lifecycle,log_line&cursor={cursor}")).json()
        assert rest == expected["/vms/a/events?kinds=lifecycle,log_line"][1:]
        secrets = [
            [(each / name).read_bytes() for name in (ACCESS_KEY_FILE, TLS_KEY_FILE, SSH_HOST_KEY_FILE)]
            for each in directories
        ]
        assert secrets[0] == secrets[1]
        async with Client(after.url, access_token=token, certificate=after.certificate) as guest:
            # Let in, and the VM does not run.
            with pytest.raises(ResponseError) as refused:
                await guest.request("GET", "/vms/a/ip?wait=0")
            assert refused.value.status == 503
