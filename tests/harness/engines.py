"""The engines as the store uses them, each on something that can be filled up and made to fail: files, etcd in memory, etcd.

A `Site` is what outlives an engine. The file engine works on a disk of the test. The etcd engine works on the etcd in
memory, with a virtual clock, and on a real node.
"""

from __future__ import annotations

import datetime
import errno
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import trio

from harness.cutting_proxy import KEEPALIVE, TRANSACTION, CuttingProxy, cutting_proxy
from harness.disks import FailingDisk
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from orchard.etcd_nodes import EtcdOptions, etcd_nodes
from orchard.net import tcp
from orchard.net.transport import ResponseError, Transport
from orchard.storage.engine import Engine
from orchard.storage.errors import BrokenError
from orchard.storage.etcd import EtcdAccess, EtcdClient
from orchard.storage.etcd_engine import EtcdEngine
from orchard.storage.file_engine import FileEngine
from orchard.storage.leadership import CampaignSettings, Leadership

PREFIX = "/orchard"
# The shortest that etcd grants with its default time for an election.
TTL = 2.0  # seconds
_FILLER = "filler"
_FILLER_BYTES = 300_000


class Site(Protocol):
    """Where engines keep a state. `opened` yields an engine that leads and runs."""

    def opened(self) -> AbstractAsyncContextManager[Engine]: ...

    async def fill(self) -> None:
        """Leave no space for anything that is added."""

    async def free(self) -> None:
        """Make space again."""

    def lose_writes(self) -> None:
        """From now on nothing tells whether a write was done, until the engine is opened again."""


async def call_directly(work: Callable[..., Any], *arguments: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*arguments)


class FileSite:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._disk = FailingDisk()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Engine]:
        self._disk.fault = lambda verb, number: 0
        engine = FileEngine(self._directory, self._disk, call_directly)
        async with _running(engine):
            yield engine
        engine.close()

    async def fill(self) -> None:
        await trio.lowlevel.checkpoint()
        self._disk.fault = lambda verb, number: errno.ENOSPC if verb == "write" else 0

    async def free(self) -> None:
        await trio.lowlevel.checkpoint()
        self._disk.fault = lambda verb, number: 0

    def lose_writes(self) -> None:
        self._disk.fault = lambda verb, number: errno.EIO if verb == "sync" else 0


class _EtcdSite:
    """What both sites of the etcd engine have in common."""

    url = ""

    def __init__(self) -> None:
        self._connect: tcp.Connect = tcp.connect

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Engine]:
        self.find_writes()
        access = EtcdAccess(self.url)
        candidate = CampaignSettings("http://c", TTL, trio.current_time, _now, lambda: str(uuid.uuid4()))
        async with EtcdClient(access, self._connect) as client:
            leadership = Leadership(client, PREFIX, candidate)
            await leadership.campaign()
            engine = EtcdEngine(client, PREFIX, leadership)
            async with _running(engine, leadership):
                yield engine
            engine.close()
            await leadership.resign()

    def find_writes(self) -> None:
        """End the effect of `lose_writes`."""


class MemoryEtcdSite(_EtcdSite):
    url = "http://etcd:2379"

    def __init__(self) -> None:
        super().__init__()
        self.etcd = MemoryEtcd()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with running_memory_etcd(self.etcd) as listener:
            self._connect = listener.connect
            yield

    async def fill(self) -> None:
        await trio.lowlevel.checkpoint()
        self.etcd.is_full = True

    async def free(self) -> None:
        await trio.lowlevel.checkpoint()
        self.etcd.is_full = False

    def lose_writes(self) -> None:
        async def lose(path: str) -> None:
            if path in ("/v3/kv/txn", "/v3/lease/keepalive"):
                await trio.sleep_forever()

        self.etcd.after = lose

    def find_writes(self) -> None:
        self.etcd.after = None


class RealEtcdSite(_EtcdSite):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._proxy: CuttingProxy
        self._real = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        options = EtcdOptions(quota_bytes=4_000_000)
        async with etcd_nodes(self._directory, options=options) as nodes, cutting_proxy(nodes.url) as self._proxy:
            self.url, self._real = self._proxy.url, nodes.url
            yield

    async def fill(self) -> None:
        with suppress(ResponseError):
            while True:
                body = {"key": encoded(_FILLER.encode()), "value": encoded(b"x" * _FILLER_BYTES)}
                header = (await self._ask("/v3/kv/put", body))["header"]
                self._revision = header["revision"]

    async def free(self) -> None:
        await self._ask("/v3/kv/deleterange", {"key": encoded(_FILLER.encode())})
        await self._ask("/v3/kv/compaction", {"revision": self._revision, "physical": True})
        await self._ask("/v3/maintenance/defragment", {})
        for alarm in (await self._ask("/v3/maintenance/alarm", {"action": "GET"})).get("alarms", ()):
            await self._ask("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        async with Transport(self._real, connect_seconds=10, answer_seconds=60) as gateway:
            return (await gateway.request("POST", path, json=body)).json()

    def lose_answers(self, count: int) -> None:
        """Lose the answers to the next transactions, which are carried out."""
        self._proxy.cuts = count

    def lose_writes(self) -> None:
        self._proxy.cuts, self._proxy.paths = 1_000_000, {TRANSACTION, KEEPALIVE}

    def find_writes(self) -> None:
        self._proxy.cuts = 0


@asynccontextmanager
async def _running(*parts: Engine | Leadership) -> AsyncIterator[None]:
    """Run the tasks of an engine and its leadership for the time of the block. That it has ended is for `append` to say."""

    async def run(part: Engine | Leadership) -> None:
        with suppress(BrokenError):
            await part.run()

    async with trio.open_nursery() as nursery:
        for part in parts:
            nursery.start_soon(run, part)
        yield
        nursery.cancel_scope.cancel()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
