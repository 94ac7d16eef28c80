"""Following the events of a VM, its lifecycle events, and the history of VMs that have ended, over the API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.served import Served, served

from orchard.net.request import Stream
from orchard.nursery import Wakeup


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as api:
        yield api


class Following:
    """A stream of events that is read: its lines, and whether it has ended."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.empty_lines = 0
        self.has_ended = trio.Event()
        # Set while the client takes what is sent.
        self.takes = trio.Event()
        self.takes.set()
        self._news = Wakeup()

    @property
    def payloads(self) -> list[str]:
        return [event["payload"] for event in self.events]

    async def wait(self, *payloads: str) -> None:
        """Wait until these are all the payloads that have come."""
        while len(self.events) < len(payloads):
            await self._news.wait()
        assert self.payloads == list(payloads)

    async def read(self, answer: Stream) -> None:
        await answer.produce(self.take)
        self.has_ended.set()

    async def take(self, piece: bytes | tuple[bytes, ...]) -> None:
        assert isinstance(piece, bytes)
        await self.takes.wait()
        assert piece.endswith(b"\n")
        lines = piece.splitlines()
        self.events += [json.loads(line) for line in lines if line]
        self.empty_lines += lines.count(b"")
        self._news.set()


async def follow(api: Served, nursery: trio.Nursery, target: str) -> Following:
    """Follow the events of a VM; the target is below /vms/."""
    answer = await api.ask("GET", f"/vms/{target}")
    assert isinstance(answer, Stream), answer
    following = Following()
    nursery.start_soon(following.read, answer)
    return following


def line(text: str) -> dict[str, Any]:
    return {"kind": "log_line", "payload": text, "timestamp": 1}


async def append(api: Served, *texts: str) -> None:
    await api.ok("POST", "/vms/vm/events", [line(text) for text in texts])


async def lifecycle(api: Served) -> list[str]:
    return [event["payload"] for event in await api.ok("GET", "/vms/vm/events?kinds=lifecycle")]


async def report(api: Served, vm: dict[str, Any], **seen: object) -> None:
    await api.ok("PUT", "/vms/vm/state", {"uid": vm["uid"], **seen})


async def test_follower_is_sent_what_is_there_and_then_what_comes(api: Served, nursery: trio.Nursery) -> None:
    await api.create("vm")
    await append(api, "1", "2")
    following = await follow(api, nursery, "vm/events?follow=true")
    await following.wait("1", "2")
    await append(api, "3")
    await following.wait("1", "2", "3")
    assert {key: following.events[0][key] for key in ("kind", "payload", "timestamp")} == line("1")
    # The cursor of any line resumes after it.
    await append(api, "last")
    for number, event in enumerate(following.events, 1):
        resumed = await follow(api, nursery, f"vm/events?follow=true&cursor={event['cursor']}")
        await resumed.wait(*["1", "2", "3", "last"][number:])
        page = await api.ok("GET", f"/vms/vm/events?cursor={event['cursor']}")
        assert [one["payload"] for one in page] == resumed.payloads
