"""Watches of all VMs and workers over the API: the first list, changes, filters, resumption, bounds, and who may watch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.served import Served, served

from orchard.schema import ServiceAccount

READER = ServiceAccount(name="reader", token="r" * 32, roles=("compute:read",))
WRITER = ServiceAccount(name="writer", token="w" * 32, roles=("compute:write",))

Lines = trio.MemoryReceiveChannel[dict[str, Any]]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as api:
        yield api


async def next_line(lines: Lines) -> tuple[Any, ...]:
    """Return the type, the kind, the object's name, and whether the next line has a revision."""
    line = await lines.receive()
    found = line.get("object", {})
    return (line["type"], line.get("kind"), found.get("name"), "revision" in line)


async def settled_lines(lines: Lines) -> list[dict[str, Any]]:
    """Return all lines that have been sent when no task has anything to do."""
    await trio.testing.wait_all_tasks_blocked()
    found = []
    while True:
        try:
            found.append(lines.receive_nowait())
        except trio.WouldBlock:
            return found


async def test_watch_sends_what_is_there_then_a_bookmark_then_changes(api: Served, nursery: trio.Nursery) -> None:
    created = await api.create("b")
    await api.create("a")
    worker = await api.register("w")
    lines = await api.lines("/watch", nursery)
    first = [await lines.receive() for _ in range(4)]
    listed = await api.call("GET", "/vms")
    assert [line.get("object") for line in first] == [*listed.body, (await api.ok("GET", "/workers"))[0], None]
    assert first[1]["object"] == created
    assert first[2]["object"]["createdAt"] == worker["createdAt"]
    assert [line["type"] for line in first] == ["ADDED", "ADDED", "ADDED", "BOOKMARK"]
    assert first[3] == {"type": "BOOKMARK", "revision": listed.headers["x-revision"]}
    changed = await api.ok("PATCH", "/vms/b", {"cpu": 2})
    line = await lines.receive()
    assert line.pop("revision") not in ("", first[3]["revision"])
    assert line == {"type": "MODIFIED", "kind": "vm", "object": changed}
    await api.ok("DELETE", "/vms/b")
    line = await lines.receive()
    assert (line["type"], line["object"]) == ("DELETED", changed)
    await api.ok("DELETE", "/workers/w")
    assert await next_line(lines) == ("DELETED", "worker", "w", True)
    nursery.cancel_scope.cancel()
