"""The engines as the store uses them, each on something that can be filled up and made to fail: files, etcd in memory, etcd.

A `Site` is what outlives an engine. The file engine works on a disk of the test. The etcd engine works on the etcd in
memory, with a virtual clock, and on a real node.
"""

from __future__ import annotations

import datetime
import errno
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import trio
import trio.testing

from harness.cutting_proxy import KEEPALIVE, TRANSACTION, CuttingProxy, cutting_proxy
from harness.disks import FailingDisk
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from harness.programs import need
from orchard.base.nursery import unwrap_groups
from orchard.etcd_nodes import EtcdOptions, etcd_nodes
from orchard.net import tcp
from orchard.net.transport import ResponseError, Transport
from orchard.storage.engine import Engine
from orchard.storage.errors import BrokenError
from orchard.storage.etcd import EtcdAccess, EtcdClient
from orchard.storage.etcd_engine import EtcdEngine
from orchard.storage.etcd_records import DEFAULT_EVENTS_KIB, EtcdEventStorage, EtcdRecords
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.storage.leadership import CampaignSettings, Leadership

PREFIX = "/orchard"
# On a virtual clock, and where a busy machine may stall.
TTL, LONG_TTL = 2.0, 60.0  # seconds
_FILLER = "filler"
_FILLER_BYTES = 300_000


class Logs(NamedTuple):
    """What a controller stores beside the state."""

    events: EventLog
    history: History


class Site(Protocol):
    """Where engines keep a state. `opened` yields an engine that leads and runs.

    `opened_logs` yields what a controller stores beside the state, while VMs with some uids exist. `running` runs what
    engines need outside of them. `takes_deletions` is that of the engines.
    """

    takes_deletions: bool

    def running(self) -> AbstractAsyncContextManager[None]: ...

    def opened(self) -> AbstractAsyncContextManager[Engine]: ...

    def opened_logs(self, *uids: str) -> AbstractAsyncContextManager[Logs]: ...

    async def fill(self) -> None:
        """Leave no space for anything that is added."""

    async def free(self) -> None:
        """Make space again."""

    def lose_writes(self) -> None:
        """From now on nothing tells whether a write was done, until the engine is opened again."""


@dataclass(frozen=True)
class Sited:
    """A site, and how to run an asynchronous test on it: on a virtual clock where nothing outside takes time."""

    site: Site
    is_virtual: bool

    def run(self, work: Callable[[Site], Awaitable[None]]) -> None:
        async def main() -> None:
            async with self.site.running():
                await work(self.site)

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0) if self.is_virtual else None)


# Of a fixture: the sites of `make_sited`.
SITES = ("file", "memory etcd", pytest.param("etcd", marks=pytest.mark.slow))


def make_sited(name: str, directory: Path) -> Sited:
    """Return the site of one of SITES."""
    if name == "file":
        return Sited(FileSite(directory), True)
    if name == "memory etcd":
        return Sited(MemoryEtcdSite(), True)
    need("etcd")
    return Sited(RealEtcdSite(directory), False)


async def call_directly(work: Callable[..., Any], *arguments: Any, limiter: object = None) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*arguments)


class FileSite:
    takes_deletions = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._disk = FailingDisk()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Engine]:
        self._disk.fault = lambda verb, number: 0
        engine = FileEngine(self._directory, self._disk, call_directly)
        async with _running(engine):
            yield engine
        engine.close()

    @asynccontextmanager
    async def opened_logs(self, *uids: str) -> AsyncIterator[Logs]:
        self._disk.fault = lambda verb, number: 0
        events = EventLog(*event_files(self._directory / "events", self._disk, call_directly))
        async with _open(events, History(history_file(self._directory, self._disk, call_directly)), uids) as logs:
            yield logs

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

    # Above its quota, etcd takes no write.
    takes_deletions = False
    url = ""
    ttl = TTL

    def __init__(self) -> None:
        self.connect: tcp.Connect = tcp.connect

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Engine]:
        async with self.leading() as (client, leadership):
            engine = EtcdEngine(client, PREFIX, leadership)
            async with _running(engine, leadership):
                yield engine
            engine.close()

    @asynccontextmanager
    async def opened_logs(self, *uids: str) -> AsyncIterator[Logs]:
        async with self.leading() as (client, leadership), _running(leadership):
            stored = EtcdEventStorage(client, PREFIX, leadership, DEFAULT_EVENTS_KIB)
            lifecycle, ended = (EtcdRecords(client, PREFIX, leadership, kind) for kind in ("lifecycle", "history"))
            for each in (stored, lifecycle, ended):
                await each.load()
            async with _open(EventLog(stored, lifecycle), History(ended), uids) as logs:
                yield logs

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[tuple[EtcdClient, Leadership]]:
        self.find_writes()
        candidate = CampaignSettings("http://c", self.ttl, self.clock, _now, lambda: str(uuid.uuid4()))
        async with EtcdClient(EtcdAccess(self.url), self.connect) as client:
            leadership = Leadership(client, PREFIX, candidate)
            await leadership.campaign()
            yield client, leadership
            await leadership.resign()

    def clock(self) -> float:
        return trio.current_time()

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
            self.connect = listener.connect
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
    """A node behind a proxy. The first answer that is lost by `lose_writes` ends the lease, so no test waits for that."""

    ttl = LONG_TTL

    def __init__(self, directory: Path) -> None:
        super().__init__()
        # Answers that were lost before.
        self._lost: int | None = None
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
        self._lost = self._proxy.done

    def clock(self) -> float:
        is_over = self._lost is not None and self._proxy.done > self._lost
        return trio.current_time() + is_over * self.ttl

    def find_writes(self) -> None:
        self._proxy.cuts, self._lost = 0, None


@asynccontextmanager
async def _open(events: EventLog, history: History, uids: Sequence[str]) -> AsyncIterator[Logs]:
    events.open(uids)
    history.open()
    async with _running(events, history):
        yield Logs(events, history)


@asynccontextmanager
async def _running(*parts: Engine | Leadership | EventLog | History) -> AsyncIterator[None]:
    """Run tasks of a controller for the time of the block. That one has ended is for `append` to say."""

    async def run(part: Engine | Leadership | EventLog | History) -> None:
        with suppress(BrokenError), unwrap_groups():
            await part.run()

    async with trio.open_nursery() as nursery:
        for part in parts:
            nursery.start_soon(run, part)
        yield
        nursery.cancel_scope.cancel()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
