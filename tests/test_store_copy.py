"""Copies of what a controller stores: nothing is lost between directories and etcd, and nothing is overwritten."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.memory_etcd import MemoryEtcd, running_memory_etcd
from harness.stores import ACCOUNT, put, running_store
from harness.strategies import BEGAN, assigned, pending, worker

from orchard import controller
from orchard.cli.main import main
from orchard.etcd_nodes import etcd_nodes
from orchard.files import lock_directory
from orchard.schema import EndedVM, Event
from orchard.storage.etcd import EtcdAccess, EtcdClient
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.store import Store, read_state
from orchard.store_copy import Copy, CopyError, read_directory, read_etcd, write_directory, write_etcd

PREFIX = "/orchard"


async def prepare(directory: Path) -> None:
    """Write a data directory with everything that a controller stores."""
    directory.mkdir(mode=0o700)
    events = EventLog(*event_files(directory / "events"))
    history = History(history_file(directory))
    async with running_store(await Store.open(FileEngine(directory), BEGAN)) as store, trio.open_nursery() as nursery:
        put(store, ACCOUNT, worker("w"), pending("a"), pending("b"))
        put(store, assigned(store.state.vms["a"]))
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
    controller.load_access_key(directory)


async def read_all(copy: Copy, events: AsyncIterator[tuple[str, list[bytes]]]) -> dict[str, Any]:
    found: dict[str, list[bytes]] = {}
    async for uid, texts in events:
        found.setdefault(uid, []).extend(texts)
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
    assert expected["lifecycle"]
    assert expected["history"]
    assert expected["secrets"]
    async with memory_client(MemoryEtcd()) as client:
        async with read_directory(tmp_path / "source") as (copy, events):
            await write_etcd(client, PREFIX, copy, events)
        async with read_etcd(client, PREFIX) as (copy, events):
            assert await read_all(copy, events) == expected
        async with read_etcd(client, PREFIX) as (copy, events):
            await write_directory(tmp_path / "target", copy, events)
    assert await all_of(tmp_path / "target") == expected
    async with controller.open_data_directory(tmp_path / "target") as data:
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


async def test_interrupted_copy_is_no_state(tmp_path: Path) -> None:
    await prepare(tmp_path / "source")
    async with read_directory(tmp_path / "source") as (copy, _):

        async def broken() -> AsyncIterator[tuple[str, list[bytes]]]:
            yield next(iter(copy.tables["vm"])), [b'{"kind":"log_line","payload":"x","timestamp":1}']
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
    assert not (tmp_path / "target").exists()


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
        assert "2 VMs, 1 workers, 1 service accounts, 1500 events" in capsys.readouterr().out
        assert await command("store", "copy", nodes.url, str(tmp_path / "target")) == 0
    found = await all_of(tmp_path / "target")
    assert found == expected
    assert json.loads(found["history"][0])["name"] == "old"
