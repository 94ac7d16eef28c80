"""What a controller opens before it serves, when that fails at its beginning: it ends with one error, or stands by again."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from harness.disks import FailingDisk, no_space
from harness.memory_etcd import MemoryEtcd, running_memory_etcd

from orchard.control.stored_data import CampaignPlatform, StoredData, utc_now
from orchard.controller import ControllerSettings, EtcdAccess, EtcdSettings, Platform, Running, StartError, run
from orchard.schema import Worker
from orchard.storage.errors import BrokenError
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.store import Store


def platform_on(disk: FailingDisk) -> Platform:
    @asynccontextmanager
    async def opened(directory: Path) -> AsyncIterator[StoredData]:
        store = await Store.open(FileEngine(directory, disk), utc_now())
        events = EventLog(*event_files(directory / "events"))
        events.open(set())
        disk.fault = lambda verb, number: errno.EIO if verb == "sync" else 0
        yield StoredData(store, events, History(history_file(directory)))
        store.close()

    return Platform(open_data=opened)


async def test_disk_that_fails_with_the_first_objects_is_one_error(tmp_path: Path) -> None:
    settings = ControllerSettings(data_dir=tmp_path, host="127.0.0.1", port=0, tls=False)
    with pytest.raises(BrokenError):
        await run(settings, platform=platform_on(FailingDisk()))


async def test_longer_offline_timeout_that_cannot_be_stored_stops_the_start(tmp_path: Path) -> None:
    disk = FailingDisk()

    @asynccontextmanager
    async def opened(directory: Path) -> AsyncIterator[StoredData]:
        async with platform_on(disk).open_data(directory) as data:
            with data.store.transaction() as tx:
                tx.put(Worker(name="w"))
            disk.fault = no_space
            yield data

    with pytest.raises(StartError):
        await run(ControllerSettings(data_dir=tmp_path), platform=Platform(open_data=opened))


async def test_controller_that_cannot_share_secrets_stands_by_again(tmp_path: Path, nursery: trio.Nursery) -> None:
    etcd, transactions = MemoryEtcd(), 0

    async def cut_the_third(path: str) -> None:
        """The first two make the controller the leader. The third one stores a secret."""
        nonlocal transactions
        await trio.lowlevel.checkpoint()
        transactions += path == "/v3/kv/txn"
        if transactions == 3 and path == "/v3/kv/txn":
            raise trio.BrokenResourceError

    etcd.before = cut_the_third
    async with running_memory_etcd(etcd) as listener:
        settings = ControllerSettings(
            data_dir=tmp_path, host="127.0.0.1", port=0, tls=False, etcd=EtcdSettings(EtcdAccess("http://etcd:2379"))
        )
        platform = Platform(campaign=CampaignPlatform(connect=listener.connect))
        running: Running = await nursery.start(
            lambda task_status: run(settings, platform=platform, task_status=task_status)
        )
        assert running.url
        assert transactions > 3
        nursery.cancel_scope.cancel()
