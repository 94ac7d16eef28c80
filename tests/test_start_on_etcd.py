"""The start of a controller on etcd: what stops it, and that nothing is changed then."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from harness.processes import GENEROUS, finished, free_port
from harness.programs import need
from harness.strategies import pending

from orchard.client import Client
from orchard.control.stored_data import CampaignPlatform
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Platform, Running, StartError, run
from orchard.etcd_nodes import etcd_nodes
from orchard.net.transport import Transport
from orchard.storage.state_file import STATE_VERSION
from orchard.store import encode_object

HEAD = {"format": "orchard-state", "version": STATE_VERSION, "revision": 1, "epoch": 3, "by": "x", "write": 9, "time": "", "parts": 0}  # fmt: skip
LEADER = {"by": "x", "url": "https://other:6120", "since": "2026-01-31T12:00:00Z"}
ANYONE = EtcdAccess("http://etcd:2379")


def store(etcd: MemoryEtcd, key: str, value: object) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    etcd.answer("/v3/kv/put", {"key": encoded(f"/orchard/{key}".encode()), "value": encoded(raw)})


def settings(directory: Path, access: EtcdAccess) -> ControllerSettings:
    return ControllerSettings(
        data_dir=directory,
        host="127.0.0.1",
        port=0,
        tls=False,
        auth=False,
        etcd=EtcdSettings(access, leader_ttl=60),
    )


@asynccontextmanager
async def controller(directory: Path, etcd: MemoryEtcd, access: EtcdAccess = ANYONE) -> AsyncIterator[Running]:
    async with running_memory_etcd(etcd) as listener, trio.open_nursery() as nursery:
        platform = Platform(campaign=CampaignPlatform(connect=listener.connect))

        async def serve(*, task_status: trio.TaskStatus[Running]) -> None:
            await run(settings(directory, access), platform=platform, task_status=task_status)

        with trio.fail_after(GENEROUS):
            running = await nursery.start(serve)
        yield running
        nursery.cancel_scope.cancel()


async def refusal(directory: Path, etcd: MemoryEtcd, access: EtcdAccess = ANYONE) -> str:
    """Return why a controller does not start."""
    with pytest.RaisesGroup(pytest.RaisesExc(StartError), flatten_subgroups=True, allow_unwrapped=True) as refused:
        async with controller(directory, etcd, access):
            raise AssertionError("the controller has started")
    error: BaseException = refused.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return str(error)


Prepare = Callable[[MemoryEtcd], None]
_VM = pending("a")
VM = encode_object(replace(_VM, meta=replace(_VM.meta, version=1)))


def keys(*pairs: tuple[str, object]) -> Prepare:
    def prepare(etcd: MemoryEtcd) -> None:
        for key, value in pairs:
            store(etcd, key, value)

    return prepare


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (keys(("x", "y")), "/orchard/x"),
        (keys(("vm/a", VM)), "/orchard/vm/a"),
        (keys(("head", 5)), "/orchard/head"),
        (keys(("head", b"\xff")), "/orchard/head"),
        (keys(("head", {**HEAD, "format": "orchard-events"})), "/orchard/head"),
        (keys(("head", {**HEAD, "revision": "many"})), "/orchard/head"),
        (keys(("head", {**HEAD, "time": "noon"})), "/orchard/head"),
        (keys(("head", {**HEAD, "version": STATE_VERSION + 1, "new": 1})), f"version {STATE_VERSION + 1}"),
        (keys(("head", {**HEAD, "version": STATE_VERSION + 1}), ("leader", LEADER)), f"version {STATE_VERSION + 1}"),
        (keys(("head", HEAD), ("vm/a", b"{")), "/orchard/vm/a"),
        (keys(("head", HEAD), ("vm/a", {"cpu": "x"})), "/orchard/vm/a"),
        (keys(("head", HEAD), ("vm/b", VM)), 'VM "b" has the name "a"'),
        (keys(("head", HEAD), ("events/uid/1-2", b"")), "/orchard/events/uid/1-2"),
        (keys(("head", HEAD), ("history/00000000-000000000000", b"[")), "/orchard/history/"),
        (keys(("head", HEAD), ("secret/access-key", 7)), "/orchard/secret/access-key"),
        (keys(("head", {**HEAD, "parts": 2})), "/orchard/transaction/000000"),
    ],
)  # fmt: skip
async def test_keys_that_no_controller_has_written_stop_the_start(prepare: Prepare, named: str, tmp_path: Path) -> None:
    """They are named, and stay as they are, for the program that they are of."""
    etcd = MemoryEtcd()
    prepare(etcd)
    before = {key: value.value for key, value in etcd.values.items()}
    assert named in await refusal(tmp_path, etcd)
    after = {key: value.value for key, value in etcd.values.items()}
    # Of a state of this version, only the epoch is counted on.
    head = b"/orchard/head"
    if before.get(head, b"").startswith(b'{"format": "orchard-state"') and before[head] != after[head]:
        before[head] = after[head]
        assert json.loads(after[head])["version"] == STATE_VERSION
    assert after == before


async def test_state_of_an_older_version_is_taken_over_with_the_first_write(tmp_path: Path) -> None:
    etcd = MemoryEtcd()
    for key, value in (("head", {**HEAD, "version": STATE_VERSION - 1}), ("vm/a", VM)):
        store(etcd, key, value)

    def version() -> Any:
        return json.loads(etcd.values[b"/orchard/head"].value)["version"]

    store(etcd, "vm/b", VM)
    assert 'VM "b"' in await refusal(tmp_path, etcd)
    assert version() == STATE_VERSION - 1, "an older program cannot start any more, although nothing was taken over"
    etcd.answer("/v3/kv/deleterange", {"key": encoded(b"/orchard/vm/b")})
    async with controller(tmp_path, etcd) as running, Client(running.url) as client:
        assert [vm.name for vm in await client.vms.list()] == ["a"]
        assert version() == STATE_VERSION


async def test_wrong_password_is_told_with_the_user(tmp_path: Path) -> None:
    etcd = MemoryEtcd()
    etcd.users.passwords = {"controllers": "secret"}
    access = EtcdAccess(ANYONE.urls, user="controllers", password="secret")
    told = await refusal(tmp_path, etcd, replace(access, password="wrong-one"))
    assert "controllers" in told
    assert "ORCHARD_ETCD_PASSWORD" in told
    assert "wrong-one" not in told
    async with controller(tmp_path, etcd, access):
        pass


async def test_directory_with_a_state_in_files_is_not_used_with_etcd_and_stays(tmp_path: Path) -> None:
    """Otherwise an empty cluster would take its place, and its keys would be replaced by those in etcd."""
    (tmp_path / "state.jsonl").write_text("any")
    assert str(tmp_path / "state.jsonl") in await refusal(tmp_path, MemoryEtcd())
    assert (tmp_path / "state.jsonl").read_text() == "any"


async def test_directory_of_a_controller_on_etcd_is_not_used_without_it(tmp_path: Path) -> None:
    """Otherwise an empty cluster with the same certificate would take the place of the one in etcd."""
    async with controller(tmp_path, MemoryEtcd()):
        pass
    with trio.fail_after(GENEROUS), pytest.raises(StartError, match="--etcd"):
        await run(ControllerSettings(data_dir=tmp_path, host="127.0.0.1", port=0, tls=False, auth=False))
    assert not (tmp_path / "state.jsonl").exists()


@pytest.mark.slow
def test_process_without_an_etcd_ends_with_a_sentence(tmp_path: Path) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    refused = finished("controller", "--listen", "127.0.0.1:0", "--etcd", ",".join(urls), home=tmp_path)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert all(url in line for url in urls)


@pytest.mark.slow
@pytest.mark.needs("etcd")
async def test_real_etcd_does_not_let_in_a_user_without_rights(tmp_path: Path) -> None:
    """The etcd in memory has neither permissions nor authentication that is turned on and off."""
    need("etcd")
    async with (
        etcd_nodes(tmp_path / "etcd") as nodes,
        Transport(nodes.url, connect_seconds=10, answer_seconds=60) as etcd,
    ):

        async def ask(path: str, **body: object) -> None:
            await etcd.request("POST", f"/v3/auth/{path}", json=body)

        async def told(access: EtcdAccess) -> str:
            with pytest.raises(StartError) as refused:
                await run(settings(tmp_path / "data", access))
            return str(refused.value)

        user = EtcdAccess(nodes.url, user="u", password="secret")
        assert "--etcd-user" in await told(user)
        for name in ("root", "u"):
            await ask("user/add", name=name, password="secret")
            await ask("role/add", name=name)
            await ask("user/grant", user=name, role=name)
        await ask(
            "role/grant", name="u", perm={"permType": "READWRITE", "key": encoded(b"/u/"), "range_end": encoded(b"/u0")}
        )
        await ask("enable")
        assert "--etcd-user" in await told(EtcdAccess(nodes.url))
        assert "--etcd-prefix" in await told(user)
