"""A controller whose leadership is lost at any step of its start, or under load, stands by and leads again.

The controller runs on a virtual clock and an etcd in memory. From its N-th request on, etcd carries out nothing, or is
silent, or has given the leadership to another controller, until the lease is over.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.memory_etcd import MemoryEtcd, MemoryListener, encoded, running_memory_etcd
from harness.strategies import BEGAN

from orchard.client import Client, ClientError
from orchard.control.stored_data import CampaignPlatform, EtcdSettings
from orchard.controller import ControllerSettings, Listening, Platform, Running, run
from orchard.storage.etcd import EtcdAccess

TTL = 5.0  # seconds
# Longer than the lease.
FAULT_SECONDS = TTL + 1
EVENTS = [{"kind": "log_line", "timestamp": 1, "payload": "x"}]
LEADER = {"key": encoded(b"/orchard/leader")}
# Of a start and what is written after it.
FEWEST_REQUESTS, MOST_REQUESTS = 25, 50

Fault = Callable[["Site"], Awaitable[None]]


class Site:
    """A controller in this task and its etcd. `fault` is called before each request of the controller from `faulty_from` on."""

    def __init__(self, directory: Path) -> None:
        self.etcd = MemoryEtcd()
        self.etcd.before = self._before
        self.requests = 0
        self.faulty_from = 0
        self.healed = trio.Event()
        self.fault: Fault = cut_off
        # The controller's own, a new one each time that it leads.
        self.listener: MemoryListener | None = None
        self._directory = directory

    async def _before(self, path: str) -> None:
        self.requests += 1
        if self.requests >= self.faulty_from and not self.healed.is_set():
            await self.fault(self)
        else:
            await trio.lowlevel.checkpoint()

    async def _listen(self, _: ControllerSettings) -> Listening:
        await trio.lowlevel.checkpoint()
        self.listener = MemoryListener()
        return [self.listener], Running("http://controller")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Client]:
        """Run the controller for the time of the block, and yield a client of it."""
        ids = map(str, itertools.count())
        settings = ControllerSettings(
            data_dir=self._directory, tls=False, auth=False, allowed_hosts=["controller"],
            etcd=EtcdSettings(EtcdAccess("http://etcd:2379"), leader_ttl=TTL),
        )  # fmt: skip
        async with running_memory_etcd(self.etcd) as etcd, trio.open_nursery() as nursery:
            campaign = CampaignPlatform(etcd.connect, trio.current_time, lambda: BEGAN, lambda: next(ids))
            platform = Platform(listen=self._listen, clock=lambda: BEGAN, campaign=campaign)
            nursery.start_soon(lambda: run(settings, platform=platform))

            async def connect(host: str, port: int) -> trio.abc.Stream:
                if self.listener is None:
                    raise ConnectionRefusedError
                return await self.listener.connect(host, port)

            async with Client("http://controller", answer_seconds=TTL, connect=connect) as client:
                yield client
            nursery.cancel_scope.cancel()


async def cut_off(site: Site) -> None:
    await trio.lowlevel.checkpoint()
    raise trio.BrokenResourceError


async def stay_silent(site: Site) -> None:
    await site.healed.wait()
    raise trio.BrokenResourceError


async def let_another_one_lead(site: Site) -> None:
    """Once: the lease ends, and another controller writes `leader`. It is gone when the fault ends."""
    await trio.lowlevel.checkpoint()
    if not site.etcd.leases:
        return
    for lease in list(site.etcd.leases):
        site.etcd.answer("/v3/lease/revoke", {"ID": str(lease)})
    site.etcd.answer("/v3/kv/put", {**LEADER, "value": encoded(b'{"by": "other", "url": "http://other"}')})


# Each with the step from one request to the next: with the first one, the leadership is lost by an error of each kind.
FAULTS: dict[Fault, int] = {cut_off: 1, stay_silent: 3, let_another_one_lead: 3}


async def works(client: Client, name: str) -> None:
    """Wait until VMs can be created and deleted, and events stored: state, events and history are written at the same time."""
    done: set[str] = set()

    async def do(what: str, work: Callable[[], Awaitable[object]]) -> None:
        with suppress(ClientError):
            await work()
            done.add(what)

    while len(done) < 4:
        async with trio.open_nursery() as nursery:
            for each in (name, f"{name}-gone"):
                nursery.start_soon(do, each, partial(client.vms.create, name=each, image="i"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(do, "events", partial(client.vms.append_events, name, EVENTS))
            nursery.start_soon(do, "deletion", partial(client.vms.delete, f"{name}-gone"))
        await trio.sleep(1)


async def lose_once(fault: Fault, first: int, directory: Path) -> bool:
    """Lose the leadership at a request of the controller, until it leads again. Return whether there were so many requests."""
    site = Site(directory)
    site.fault, site.faulty_from = fault, first
    async with site.running() as client:
        with trio.move_on_after(FAULT_SECONDS):
            await works(client, "vm")
            # For what is written later.
            await trio.sleep_forever()
        is_lost = site.requests >= first
        site.healed.set()
        if fault is let_another_one_lead:
            site.etcd.answer("/v3/kv/deleterange", LEADER)
        await works(client, "another")
    return is_lost


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_leadership_lost_at_any_request_ends_in_a_new_start(fault: Fault, tmp_path: Path) -> None:
    # The first request of a process may fail: then it does not start.
    for first in range(2, MOST_REQUESTS, FAULTS[fault]):
        clock = trio.testing.MockClock(autojump_threshold=0)
        if not trio.run(lose_once, fault, first, tmp_path / str(first), clock=clock):
            assert first >= FEWEST_REQUESTS
            return
    pytest.fail("there were more requests than expected")
