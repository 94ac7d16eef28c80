"""The client's watch of everything: what it makes of lines, and a copy of the state that stays correct."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.inprocess import InProcessCluster
from harness.processes import GENEROUS

from orchard.client import Client, ClientError, ResponseError, WatchedChange
from orchard.methods.watching import WatchReader
from orchard.schema import VM, Worker


def vm_line(change: str, name: str, uid: str = "u", **fields: Any) -> dict[str, Any]:
    item = {"name": name, "uid": uid, "image": "any", "createdAt": "2026-01-31T12:00:00Z", **fields}
    return {"type": change, "kind": "vm", "object": item}


def bookmark(revision: str) -> dict[str, Any]:
    return {"type": "BOOKMARK", "revision": revision}


def changes_of(reader: WatchReader, *lines: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return type, name and uid of the changes that lines make."""
    found: list[tuple[str, ...]] = []
    for line in lines:
        for change in reader.read(line):
            uid = (change.object.uid,) if isinstance(change.object, VM) else ()
            found.append((change.type, change.object.name if change.object else "", *uid))
    return found


def test_list_is_followed_by_synced_and_changes() -> None:
    reader = WatchReader({"kinds": "vms"})
    assert reader.begin() == {"kinds": "vms"}
    assert changes_of(reader, vm_line("ADDED", "a"), bookmark("1"), bookmark("2")) == [
        ("ADDED", "a", "u"),
        ("SYNCED", ""),
    ]
    worker = {"type": "ADDED", "kind": "worker", "object": {"name": "a"}}
    assert changes_of(reader, vm_line("MODIFIED", "a", cpu=2), worker) == [("MODIFIED", "a", "u"), ("ADDED", "a")]
    assert changes_of(reader, {**vm_line("DELETED", "a"), "revision": "3"}) == [("DELETED", "a", "u")]
    assert reader.begin() == {"kinds": "vms", "since": "3"}


def test_lines_of_a_transaction_that_come_again_change_nothing() -> None:
    reader = WatchReader({})
    reader.begin()
    changes_of(reader, vm_line("ADDED", "a"), vm_line("ADDED", "b"), bookmark("1"))
    begun = [vm_line("MODIFIED", "a", cpu=2), vm_line("DELETED", "b"), vm_line("ADDED", "c")]
    assert len(changes_of(reader, *begun)) == 3
    assert reader.begin() == {"since": "1"}
    assert changes_of(reader, *begun, {**vm_line("ADDED", "d"), "revision": "2"}) == [("ADDED", "d", "u")]


def test_new_list_after_a_revision_that_is_gone_becomes_changes() -> None:
    reader = WatchReader({})
    reader.begin()
    changes_of(reader, *[vm_line("ADDED", name) for name in ("kept", "changed", "gone", "again")], bookmark("1"))
    assert reader.refuse(ResponseError(410, "list again")) == "again"
    assert reader.begin() == {}
    listed = [vm_line("ADDED", "kept"), vm_line("ADDED", "changed", cpu=2), vm_line("ADDED", "again", uid="v")]
    found = changes_of(reader, *listed, vm_line("ADDED", "new"), bookmark("x"))
    assert found == [
        ("MODIFIED", "changed", "u"),
        ("DELETED", "again", "u"),
        ("ADDED", "again", "v"),
        ("ADDED", "new", "u"),
        ("DELETED", "gone", "u"),
    ]
    assert reader.begin() == {"since": "x"}


def test_list_that_was_cut_off_begins_anew() -> None:
    reader = WatchReader({})
    reader.begin()
    assert changes_of(reader, vm_line("ADDED", "a"), vm_line("ADDED", "b")) == [
        ("ADDED", "a", "u"),
        ("ADDED", "b", "u"),
    ]
    assert reader.begin() == {}
    assert changes_of(reader, vm_line("ADDED", "b"), bookmark("1")) == [("DELETED", "a", "u"), ("SYNCED", "")]


def test_other_refusals_are_raised_and_invalid_lines_are_client_errors() -> None:
    reader = WatchReader({})
    assert reader.refuse(ResponseError(403, "no")) == "raise"
    for line in ({"type": "ADDED"}, {"type": "ADDED", "kind": "x", "object": {}}, vm_line("ADDED", "a", cpu="x")):
        with pytest.raises(ClientError):
            list(reader.read(line))


class View:
    """A copy of the state to which changes are applied."""

    def __init__(self) -> None:
        self.vms: dict[str, VM] = {}
        self.workers: dict[str, Worker] = {}

    def apply(self, change: WatchedChange) -> None:
        match change:
            case WatchedChange("DELETED", _, VM() as vm):
                del self.vms[vm.name]
            case WatchedChange("DELETED", _, Worker() as worker):
                del self.workers[worker.name]
            case WatchedChange(_, _, VM() as vm):
                assert (change.type == "ADDED") is (vm.name not in self.vms)
                self.vms[vm.name] = vm
            case WatchedChange(_, _, Worker() as worker):
                self.workers[worker.name] = worker


async def follow_until(changes: Any, view: View, names: Iterable[str]) -> None:
    with trio.fail_after(GENEROUS):
        while sorted(view.vms) != sorted(names):
            view.apply(await anext(changes))


async def test_copy_of_the_state_is_correct_after_lost_connections_and_restarts(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    c = InProcessCluster(tmp_path, nursery)
    await c.start()
    await c.client.vms.create(name="a", image="any")
    streams: list[trio.SocketStream] = []

    async def connect(host: str, port: int) -> trio.SocketStream:
        streams.append(await trio.open_tcp_stream(host, port))
        return streams[-1]

    view = View()
    async with Client(c.client.url, connect=connect) as watcher, watcher.watch() as changes:
        await follow_until(changes, view, ["a"])
        await c.client.vms.create(name="b", image="any")
        await follow_until(changes, view, ["a", "b"])
        # The connection breaks.
        await trio.aclose_forcefully(streams[-1])
        await c.client.vms.delete("a")
        await follow_until(changes, view, ["b"])
        # The controller of the next run keeps no changes of this one.
        await c.client.vms.create(name="c", image="any")
        await c.client.vms.delete("b")
        await c.stop()
        await c.start()
        await c.client.vms.create(name="d", image="any")
        await follow_until(changes, view, ["c", "d"])
        assert len(streams) >= 3
        vms = {vm.name: vm for vm in await c.client.vms.list()}
        with trio.fail_after(GENEROUS):
            while view.vms != vms:
                view.apply(await anext(changes))
    await c.stop()


async def test_watch_shows_the_vms_of_a_filter(tmp_path: Path, nursery: trio.Nursery) -> None:
    c = InProcessCluster(tmp_path, nursery)
    await c.start()
    for name in ("a", "b"):
        await c.client.vms.create(name=name, image="any", metadata={"team": name})
    async with c.client.watch(kinds=["vms"], filter={"metadata.team": "b"}) as changes:
        view = View()
        await follow_until(changes, view, ["b"])
        await c.client.vms.patch("b", metadata={"team": "a"})
        await follow_until(changes, view, [])
    with pytest.raises(ResponseError) as refusal:
        async with c.client.watch(filter={"owner": "x"}):
            raise AssertionError("it was opened")
    assert refusal.value.status == 400
    await c.stop()
