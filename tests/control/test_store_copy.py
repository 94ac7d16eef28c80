"""Copies of what a controller stores: nothing is lost between directories and etcd, and nothing is overwritten."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from harness.stores import ACCOUNT, put, running_store
from harness.strategies import BEGAN, assigned, pending, worker

from orchard.base.files import SSH_HOST_KEY_FILE, TLS_CERTIFICATE_FILE, TLS_KEY_FILE, lock_directory, write_private
from orchard.cli.main import main
from orchard.control.store_copy import (
    SECRETS,
    Copy,
    CopyError,
    inspect_keys,
    read_directory,
    read_etcd,
    write_directory,
    write_etcd,
)
from orchard.control.stored_data import load_access_key, open_data_directory
from orchard.etcd_nodes import etcd_nodes
from orchard.resources.cluster import ClusterIdentity, Promise, Webhook
from orchard.resources.json_text import dump_resource
from orchard.schema import ClusterSettings, EndedVM, Event, HostDirPolicy, Prepull
from orchard.storage.errors import DamagedError
from orchard.storage.etcd import EtcdAccess, EtcdClient
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.store import Store, read_state

PREFIX = "/orchard"


SETTINGS = ClusterSettings(
    host_dir_policies=(HostDirPolicy("/x"),),
    prepull=(Prepull("image"),),
    webhooks=(Webhook("https://example.com", ("vm.failed",), secret="at least 16 characters"),),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data directory with everything, for tests that only read it."""
    directory = tmp_path_factory.mktemp("copy") / "source"
    trio.run(prepare, directory)
    return directory


async def prepare(directory: Path) -> None:
    """Write a data directory with everything that a controller stores."""
    directory.mkdir(mode=0o700)
    events = EventLog(*event_files(directory / "events"))
    history = History(history_file(directory))
    async with running_store(await Store.open(FileEngine(directory), BEGAN)) as store, trio.open_nursery() as nursery:
        put(store, replace(ACCOUNT, authorized_keys=("ssh-ed25519 AAAA me",)), worker("w"), pending("a"), pending("b"))
        put(store, assigned(store.state.vms["a"]), SETTINGS, ClusterIdentity("id", restored_from=3), Promise("gone", 9))
        await store.wait_durable()
        uid = store.state.vms["a"].uid
        events.open({uid})
        history.open()
        await nursery.start(events.run)
        await nursery.start(history.run)
        for number in range(3):
            await events.append(uid, [Event("log_line", f"line {number}-{part}", 1) for part in range(500)])
        events.record(uid, "created", 1)
        history.add(EndedVM(name="old", uid="gone", ended_at=BEGAN))
        await events.flush()
        await history.flush()
        nursery.cancel_scope.cancel()
    load_access_key(directory)
    for name in (TLS_CERTIFICATE_FILE, TLS_KEY_FILE, SSH_HOST_KEY_FILE):
        write_private(directory / name, f"the contents of {name} \xff".encode("latin-1"))


async def read_all(copy: Copy, events: AsyncIterator[tuple[str, list[Event]]]) -> dict[str, Any]:
    found: dict[str, list[Event]] = {}
    async for uid, some in events:
        found.setdefault(uid, []).extend(some)
    fields = {name: getattr(copy, name) for name in ("tables", "revision", "time", "lifecycle", "history", "secrets")}
    return {**fields, "events": found}


async def all_of(directory: Path) -> dict[str, Any]:
    async with read_directory(directory) as (copy, events):
        return await read_all(copy, events)


@asynccontextmanager
async def memory_client(etcd: MemoryEtcd) -> AsyncIterator[EtcdClient]:
    async with running_memory_etcd(etcd) as listener, EtcdClient(EtcdAccess("http://etcd"), listener.connect) as client:
        yield client


async def test_nothing_is_lost_from_a_directory_to_etcd_and_back(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    expected = await all_of(tmp_path / "source")
    assert len(next(iter(expected["events"].values()))) == 1500
    assert all(expected["tables"].values()), "a kind of objects is missing"
    assert expected["secrets"].keys() == SECRETS.keys()
    assert expected["lifecycle"]
    assert expected["history"]
    async with memory_client(MemoryEtcd()) as client:
        async with read_directory(tmp_path / "source") as (copy, events):
            await write_etcd(client, PREFIX, copy, events)
        async with read_etcd(client, PREFIX) as (copy, events):
            assert await read_all(copy, events) == expected
        async with read_etcd(client, PREFIX) as (copy, events):
            await write_directory(tmp_path / "target", copy, events)
    assert await all_of(tmp_path / "target") == expected
    async with open_data_directory(tmp_path / "target") as data:
        assert data.store.state.json == read_state(tmp_path / "source" / "state.jsonl").json


async def test_target_that_is_not_empty_is_refused_and_unchanged(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("precious")
    etcd = MemoryEtcd()
    async with memory_client(etcd) as client, read_directory(tmp_path / "source") as (copy, events):
        with pytest.raises(CopyError, match="not empty"):
            await write_directory(tmp_path / "target", copy, events)
        await client.call("/v3/kv/put", {"key": "L29yY2hhcmQveA==", "value": ""})
        with pytest.raises(CopyError, match="/orchard/x"):
            await write_etcd(client, PREFIX, copy, events)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]
    assert list(etcd.values) == [b"/orchard/x"]


async def test_history_that_is_larger_than_one_transaction_is_copied_whole(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    ended = [EndedVM(name=f"vm-{n}", uid=f"uid-{n}", ended_at=BEGAN, metadata={"x": 1_000 * "x"}) for n in range(2_100)]
    expected = list(map(dump_resource, ended))
    async with memory_client(MemoryEtcd()) as client:
        async with read_directory(tmp_path / "source") as (copy, events):
            copy.history = expected
            await write_etcd(client, PREFIX, copy, events)
        async with read_etcd(client, PREFIX) as (copy, events):
            assert copy.history == expected
            await write_directory(tmp_path / "target", copy, events)
    async with read_directory(tmp_path / "target") as (copy, _):
        assert copy.history == expected


async def test_prefix_that_another_program_uses_during_the_campaign_is_refused_and_unchanged(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    etcd = MemoryEtcd()

    async def write(path: str) -> None:
        await trio.lowlevel.checkpoint()
        if path == "/v3/lease/grant":
            etcd.answer("/v3/kv/put", {"key": encoded(b"/orchard/vm/x"), "value": encoded(b"precious")})

    etcd.before = write
    async with memory_client(etcd) as client, read_directory(tmp_path / "source") as (copy, events):
        with pytest.raises(CopyError, match="/orchard/vm/x"):
            await write_etcd(client, PREFIX, copy, events)
    assert list(etcd.values) == [b"/orchard/vm/x"]


@pytest.mark.parametrize("name", [".", "link"])
async def test_empty_directory_is_a_target_by_any_name(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path / ("target" if name == "." else "empty"))
    async with read_directory(source) as (copy, events):
        await write_directory(Path(name), copy, events)
    assert await all_of(tmp_path / "target") == await all_of(source)


async def test_mount_point_is_refused_before_anything_is_written(source: Path) -> None:
    async with read_directory(source) as (copy, events):
        with pytest.raises(CopyError, match="/ is a mount point"):
            await write_directory(Path("/"), copy, events)


@pytest.mark.parametrize("ranges", [1, 13])
async def test_copy_during_which_etcd_is_compacted_fails_and_can_be_repeated(ranges: int, tmp_path: Path) -> None:
    """The first request that reads is refused, or a later one, for events."""
    await prepare(tmp_path / "source")
    etcd, count = MemoryEtcd(), itertools.count(1)

    async def compact(path: str) -> None:
        await trio.lowlevel.checkpoint()
        if path == "/v3/kv/range" and next(count) == ranges:
            etcd.compacted = etcd.revision + 1

    async with memory_client(etcd) as client:
        async with read_directory(tmp_path / "source") as (copy, events):
            await write_etcd(client, PREFIX, copy, events)
        etcd.before = compact
        with pytest.raises(CopyError, match="repeat"):
            async with read_etcd(client, PREFIX) as (copy, events):
                await write_directory(tmp_path / "target", copy, events)
        etcd.before, etcd.compacted = None, 0
        assert not (tmp_path / "target").exists()
        async with read_etcd(client, PREFIX) as (copy, events):
            await write_directory(tmp_path / "target", copy, events)
    assert await all_of(tmp_path / "target") == await all_of(tmp_path / "source")


async def test_interrupted_copy_is_no_state(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    async with read_directory(tmp_path / "source") as (copy, _):

        async def broken() -> AsyncIterator[tuple[str, list[Event]]]:
            yield next(iter(copy.tables["vm"])), [Event("log_line", "x", 1)]
            raise OSError("the source is gone")

        etcd = MemoryEtcd()
        async with memory_client(etcd) as client:
            with pytest.raises(OSError, match="gone"):
                await write_etcd(client, PREFIX, copy, broken())  # type: ignore[arg-type]
            with pytest.raises(OSError, match="gone"):
                await write_directory(tmp_path / "target", copy, broken())  # type: ignore[arg-type]
            with pytest.raises(CopyError, match="no state"):
                async with read_etcd(client, PREFIX):
                    raise AssertionError("there is a state")
    assert b"/orchard/head" not in etcd.values
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


async def test_object_that_etcd_does_not_take_is_named_before_anything_is_written(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    etcd = MemoryEtcd()
    async with memory_client(etcd) as client, read_directory(tmp_path / "source") as (copy, events):
        copy.tables["vm"]["b"] = b"x" * 1_000_001
        with pytest.raises(CopyError, match='vm "b"'):
            await write_etcd(client, PREFIX, copy, events)
    assert etcd.values == {}


def keys_of(kind: str) -> Callable[[MemoryEtcd], list[bytes]]:
    return lambda etcd: sorted(key for key in etcd.values if f"/{kind}/".encode() in key)


Damage = Callable[[MemoryEtcd], bytes]


def changed(kind: str, value: bytes, number: int = 0) -> Damage:
    """Replace the value of a key of a kind."""

    def damage(etcd: MemoryEtcd) -> bytes:
        key = keys_of(kind)(etcd)[number]
        etcd.answer("/v3/kv/put", {"key": encoded(key), "value": encoded(value)})
        return key

    return damage


def removed(kind: str, number: int = 0) -> Damage:
    def damage(etcd: MemoryEtcd) -> bytes:
        key, *following = keys_of(kind)(etcd)[number:]
        etcd.answer("/v3/kv/deleterange", {"key": encoded(key)})
        return following[0]

    return damage


def added(key: bytes, value: bytes = b"x") -> Damage:
    def damage(etcd: MemoryEtcd) -> bytes:
        etcd.answer("/v3/kv/put", {"key": encoded(key), "value": encoded(value)})
        return key

    return damage


def cut_events(etcd: MemoryEtcd) -> bytes:
    """Remove the last event of a key whose name counts it."""
    key = keys_of("events")(etcd)[0]
    lines = etcd.values[key].value.splitlines(keepends=True)
    etcd.answer("/v3/kv/put", {"key": encoded(key), "value": encoded(b"".join(lines[:-1]))})
    return key


DEEP = 100_000 * b"["

DAMAGES: dict[str, Damage] = {
    "VM that is nested too deep": changed("vm", DEEP),
    "events that are nested too deep": changed("events", DEEP + b"\n"),
    "history that is nested too deep": changed("history", DEEP),
    "secret that is nested too deep": changed("secret", DEEP),
    "head that is nested too deep": added(b"/orchard/head", DEEP),
    "VM that is no JSON": changed("vm", b"{"),
    "VM that cannot be decoded": changed("vm", b'{"cpu": "x"}'),
    "worker that cannot be decoded": changed("worker", b"[]"),
    "account that cannot be decoded": changed("account", b'{"roles": 5}'),
    "settings that cannot be decoded": changed("settings", b'{"webhooks": 5}'),
    "promise that cannot be decoded": changed("promise", b"5"),
    "identity that cannot be decoded": changed("cluster", b"5"),
    "events with another name": added(b"/orchard/events/uid-a/first"),
    "events that are missing": removed("events", 1),
    "events that are no JSON": changed("events", b"{\n"),
    "events that are cut": cut_events,
    "lifecycle event that is no JSON": changed("lifecycle", b"["),
    "lifecycle event without a uid": changed("lifecycle", b'[{"n": 0}]'),
    "lifecycle event out of order": added(
        b"/orchard/lifecycle/00000000-000000000009", b'[{"uid": "uid-a", "n": 7, "after": 0, "event": {}}]'
    ),
    "history that is no JSON": changed("history", b"[5]"),
    "history without an end": changed("history", b"[{}]"),
    "secret that is not base64": changed("secret", b'{"access-token.key": "?"}'),
    "secret without a file": changed("secret", b"{}", 2),
    "head that is no JSON": added(b"/orchard/head"),
    "head of a newer version": added(b"/orchard/head", b'{"format": "orchard-state", "version": 99}'),
    "key of another program": added(b"/orchard/other"),
    "kind of another program": added(b"/orchard/other/x"),
    "bytes of another program": added(b"/orchard/vm/\xff"),
}


@pytest.fixture(scope="module")
def undamaged(source: Path) -> MemoryEtcd:
    """Return an etcd with everything, to be copied."""

    async def fill() -> MemoryEtcd:
        etcd = MemoryEtcd()
        async with memory_client(etcd) as client, read_directory(source) as (copy, events):
            await write_etcd(client, PREFIX, copy, events)
            assert "no problems" in await inspect_keys(client, PREFIX)
        return etcd

    return trio.run(fill)


@pytest.mark.parametrize("name", DAMAGES)
async def test_check_names_the_key_of_each_kind_of_damage(name: str, undamaged: MemoryEtcd) -> None:
    etcd = MemoryEtcd()
    etcd.values, etcd.revision = deepcopy(undamaged.values), undamaged.revision
    async with memory_client(etcd) as client:
        key = DAMAGES[name](etcd)
        with pytest.raises((CopyError, DamagedError)) as found:
            await inspect_keys(client, PREFIX)
        assert key.decode(errors="backslashreplace") in str(found.value)


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [("vm", b'{"name": "other"}', 'VM "a"'), ("account", b'{"name": "a"}', '"a" has no token')],
)
async def test_check_names_objects_that_contradict_each_other(
    kind: str, value: bytes, named: str, source: Path
) -> None:
    etcd = MemoryEtcd()
    async with memory_client(etcd) as client, read_directory(source) as (copy, events):
        await write_etcd(client, PREFIX, copy, events)
        changed(kind, value)(etcd)
        with pytest.raises(CopyError, match=named):
            await inspect_keys(client, PREFIX)


async def test_directory_in_use_or_without_a_state_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(CopyError, match=r"state\.jsonl"):
        await all_of(tmp_path)
    await prepare(tmp_path / "source")
    with lock_directory(tmp_path / "source", "controller.lock"), pytest.raises(CopyError, match="stop the controller"):
        await all_of(tmp_path / "source")


@pytest.mark.slow
@pytest.mark.needs("etcd")
async def test_command_copies_to_a_real_etcd_and_checks_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await prepare(tmp_path / "source")
    expected = await all_of(tmp_path / "source")

    async def command(*words: str) -> int:
        return await trio.to_thread.run_sync(main, words)

    async with etcd_nodes(tmp_path / "etcd") as nodes:
        assert await command("check", "--etcd", nodes.url) == 1
        assert await command("store", "copy", str(tmp_path / "source"), nodes.url) == 0
        assert await command("store", "copy", str(tmp_path / "source"), nodes.url) == 1
        assert await command("check", "--etcd", nodes.url) == 0
        assert "2 VMs, 1 workers, 1 service accounts, 1501 events" in capsys.readouterr().out
        assert await command("store", "copy", nodes.url, str(tmp_path / "target")) == 0
    found = await all_of(tmp_path / "target")
    assert found == expected
    assert json.loads(found["history"][0])["name"] == "old"
