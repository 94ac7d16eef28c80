"""Two controllers on an etcd in memory, on the virtual clock of the simulation: one leads, the other stands by.

Beside the faults of `SimulatedCluster`, each controller crashes, stops and freezes by itself, and is cut off from etcd. What
it has sent to etcd before may arrive after the other one leads. Clients and workers know both URLs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio
from harness.memory_etcd import MemoryEtcd, encoded
from harness.network import Process
from simulated_cluster import (
    GRACE_SECONDS,
    OFFLINE_TIMEOUT,
    PlantedBug,
    ProcessKilledError,
    RunningProgram,
    SimulatedCluster,
)

from orchard import controller
from orchard.client import Client
from orchard.control.stored_data import CampaignPlatform
from orchard.storage import etcd_engine, leadership
from orchard.storage.errors import BrokenError
from orchard.store import Store

ETCD = "etcd"
CONTROLLERS = ("controller", "controller-2")
URLS = ",".join(f"http://{name}" for name in CONTROLLERS)
# Short, so that leaders change often.
LEADER_TTL = 5.0  # seconds
LOOK_SECONDS = 1.0
HEAD_KEY = b"/orchard/head"
# The share of transactions whose answer is lost after etcd has carried them out.
LOST_SHARE = 0.02

# The controller whose task runs.
_present: ContextVar[RunningProgram] = ContextVar("_present")


def holds_always(key: str, revision: int) -> dict[str, str]:
    """Return a comparison that holds whatever was written: a planted bug of `etcd_engine.was_written_at`."""
    return {"key": encoded(key.encode()), "target": "VERSION", "result": "GREATER", "version": "-1"}


class SimulatedFleet(SimulatedCluster):
    """The cluster with two controllers. `store` is that of the controller that leads, None while none does."""

    def __init__(
        self, chance: random.Random, directory: Path, nursery: trio.Nursery, bug: PlantedBug, trace: list[str]
    ) -> None:
        self._opened: list[tuple[RunningProgram, Store]] = []
        super().__init__(chance, directory, nursery, bug, trace)
        self.etcd = MemoryEtcd()
        self.etcd.after = self._check_transaction
        # The epoch and the revision of the last write.
        self._head = (0, 0)
        nursery.start_soon(self.etcd.serve, [self.network.listen(Process(ETCD))])

    async def _check_transaction(self, path: str) -> None:
        """Check that only the last leader writes, and lose an answer now and then."""
        await trio.lowlevel.checkpoint()
        if (stored := self.etcd.values.get(HEAD_KEY)) is not None:
            head = json.loads(stored.value)
            now = (head["epoch"], head["revision"])
            if now < self._head:
                self.violate(f"a former leader has written: epoch and revision {now} after {self._head}")
            self._head = now
        if path == "/v3/kv/txn" and self.chance.random() < LOST_SHARE:
            self.note("etcd's answer to a transaction is lost")
            raise trio.BrokenResourceError

    def _leading(self) -> Iterator[tuple[RunningProgram, Store]]:
        for running, store in reversed(self._opened):
            if running.process.alive and not running.ended.is_set() and store.may_answer():
                yield running, store

    @property
    def leader(self) -> RunningProgram | None:
        return next((running for running, _ in self._leading()), None)

    @property
    def store(self) -> Store | None:
        return next((store for _, store in self._leading()), None)

    @store.setter
    def store(self, value: Store | None) -> None:
        assert value is None

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Follow the stores that controllers open, for the time of the block."""
        opened = Store.open.__func__  # type: ignore[attr-defined]

        async def follow(cls: type[Store], *arguments: Any) -> Store:
            store: Store = await opened(cls, *arguments)
            running = _present.get()
            self.note(f"{running.process.host} leads")
            self._opened.append((running, store))
            store.on_commit(partial(self._committed, store))
            return store

        with ExitStack() as stack:
            stack.enter_context(patch.object(Store, "open", classmethod(follow)))
            # A standby that looks more often makes the simulation slow, and nothing else.
            stack.enter_context(patch.object(leadership, "_LOOK_SECONDS", LOOK_SECONDS))
            if self._bug.compares_nothing:
                stack.enter_context(patch.object(etcd_engine, "was_written_at", holds_always))
            yield

    def _committed(self, store: Store, changes: list[Any]) -> None:
        # What a former leader decides is neither stored nor sent to any client.
        if store is self.store:
            self.committed(changes)

    async def start_controller(
        self, offline_timeout: float = 0.0, ping_interval: float = 0.0, *, name: str = CONTROLLERS[0]
    ) -> None:
        process, scope = Process(name), trio.CancelScope()
        running = self.controllers[name] = RunningProgram(process, scope, trio.Event(), trio.Event())
        timeout = offline_timeout or OFFLINE_TIMEOUT
        settings = controller.ControllerSettings(
            data_dir=self.directory / name,
            tls=False,
            auth=False,
            allowed_hosts=CONTROLLERS,
            worker_offline_timeout=timeout,
            ping_interval=ping_interval or timeout / 3,
            etcd=controller.EtcdSettings(controller.EtcdAccess(f"http://{ETCD}:2379"), leader_ttl=LEADER_TTL),
        )

        async def listen(_: controller.ControllerSettings) -> controller.Listening:
            await trio.lowlevel.checkpoint()
            return [self.network.listen(process)], controller.Running(f"http://{name}")

        async def connect(host: str, _: int) -> trio.abc.Stream:
            return await self.network.connect(process, host)

        clock = partial(self.clock, name)
        ids = (f"{name}-{self.chance.getrandbits(64):x}" for _ in iter(int, 1))
        campaign = CampaignPlatform(connect, trio.current_time, clock, partial(next, ids))
        platform = controller.Platform(listen=listen, clock=clock, campaign=campaign)

        async def run() -> None:
            _present.set(running)
            try:
                with scope, suppress(ProcessKilledError):
                    while not running.stopping.is_set():
                        # Started again by systemd or launchd.
                        with suppress(controller.StartError, BrokenError):
                            await controller.run(
                                settings, stop=running.stopping, grace=GRACE_SECONDS, platform=platform
                            )
                        await trio.sleep(1)
            finally:
                process.kill()
                running.ended.set()

        self._nursery.start_soon(run)
        await trio.lowlevel.checkpoint()

    def client(self, process: Process, answer_seconds: float) -> Client:
        async def connect(host: str, _: int) -> trio.abc.Stream:
            return await self.network.connect(process, host)

        return Client(URLS, answer_seconds=answer_seconds, connect=connect)
