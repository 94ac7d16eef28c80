"""How long another controller takes to answer, by a virtual clock: what etcd and the controllers wait for, without work.

What the work takes is measured by `./run bench failover`.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.memory_etcd import MemoryEtcd, MemoryListener, running_memory_etcd
from harness.strategies import BEGAN

from orchard.client import Client
from orchard.control.stored_data import CampaignPlatform, EtcdSettings
from orchard.controller import ControllerSettings, Listening, Platform, Running, run
from orchard.storage import leadership
from orchard.storage.etcd import EtcdAccess

TTL = 10.0  # seconds
# The longest that users are promised.
STOP_SECONDS, KILL_SECONDS, ELECTION_SECONDS = 0.5, TTL + 1, 2.5


class Site:
    """An etcd in memory with controllers. Set `loses_revocation` to have the lease of a controller outlast it."""

    def __init__(self, directory: Path) -> None:
        self.etcd = MemoryEtcd()
        self.etcd.before = self._before
        self.loses_revocation = False
        self._directory = directory
        self._ids = map(str, itertools.count())

    async def _before(self, path: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.loses_revocation and path == "/v3/lease/revoke":
            raise trio.BrokenResourceError

    @asynccontextmanager
    async def running(self, name: str, stop: trio.Event) -> AsyncIterator[tuple[trio.Event, MemoryListener]]:
        """Run a controller for the time of the block. Yield an event that is set when it answers, and its listener."""
        listener, answers = MemoryListener(), trio.Event()
        settings = ControllerSettings(
            self._directory / name, tls=False, auth=False, allowed_hosts=["controller"],
            etcd=EtcdSettings(EtcdAccess("http://etcd:2379"), leader_ttl=TTL),
        )  # fmt: skip

        async def listen(_: ControllerSettings) -> Listening:
            await trio.lowlevel.checkpoint()
            return [listener], Running("http://controller")

        async with running_memory_etcd(self.etcd) as etcd, trio.open_nursery() as nursery:
            campaign = CampaignPlatform(etcd.connect, trio.current_time, lambda: BEGAN, lambda: next(self._ids))
            platform = Platform(listen=listen, clock=lambda: BEGAN, campaign=campaign)

            async def serve() -> None:
                async with trio.open_nursery() as inner:
                    await inner.start(
                        lambda task_status: run(
                            settings, stop=stop, grace=0, platform=platform, task_status=task_status
                        )
                    )
                    answers.set()

            nursery.start_soon(serve)
            yield answers, listener
            nursery.cancel_scope.cancel()


async def seconds_of_takeover(site: Site, *, is_killed: bool) -> float:
    """End the controller that leads, and return after how many seconds another one answers."""
    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        first = await nursery.start(_hold, site, stop)
        async with site.running("second", trio.Event()) as (answers, _):
            # The lease was renewed meanwhile, and the second one stands by.
            await trio.sleep(1.03 * TTL)
            began = trio.current_time()
            if is_killed:
                first.cancel()
            else:
                stop.set()
            await answers.wait()
            seconds = trio.current_time() - began
        nursery.cancel_scope.cancel()
    return seconds


async def _hold(site: Site, stop: trio.Event, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    """Run a controller until it is stopped or cancelled."""
    with trio.CancelScope() as scope:
        async with site.running("first", stop) as (answers, _):
            await answers.wait()
            task_status.started(scope)
            await trio.sleep_forever()


@pytest.mark.parametrize("revokes", [True, False])
async def test_another_controller_answers_soon_after_the_leader_was_stopped(
    revokes: bool, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """Not if the lease had to run out."""
    site = Site(tmp_path)
    site.loses_revocation = not revokes
    assert (await seconds_of_takeover(site, is_killed=False) <= STOP_SECONDS) is revokes


@pytest.mark.parametrize("looks_often", [True, False])
async def test_another_controller_answers_soon_after_the_lease_of_one_that_was_killed(
    looks_often: bool, autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path)
    site.loses_revocation = True
    if not looks_often:
        monkeypatch.setattr(leadership, "_LOOK_SECONDS", 3 * TTL)
    assert (await seconds_of_takeover(site, is_killed=True) <= KILL_SECONDS) is looks_often


@pytest.mark.parametrize("repeats_often", [True, False])
async def test_write_is_acknowledged_soon_after_an_election_of_etcd(
    repeats_often: bool, autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd is without a leader for two seconds. The controller goes on."""
    if not repeats_often:
        monkeypatch.setattr(leadership, "_TRANSACTION_RETRY_SECONDS", 1.5)
    site = Site(tmp_path)
    async with (
        site.running("first", trio.Event()) as (answers, listener),
        Client("http://controller", answer_seconds=TTL, connect=listener.connect) as client,
        trio.open_nursery() as nursery,
    ):
        await answers.wait()

        async def elect() -> None:
            await trio.sleep(2)
            site.etcd.has_no_leader = False

        site.etcd.has_no_leader = True
        began = trio.current_time()
        nursery.start_soon(elect)
        await client.vms.create(name="a", image="i")
        assert (trio.current_time() - began <= ELECTION_SECONDS) is repeats_often
