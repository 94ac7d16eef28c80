"""Watches of all VMs and workers over the API: the first list, changes, filters, resumption, bounds, and who may watch."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import FailingDisk, HeldDisk, no_space
from harness.served import Sender, Served, served

import orchard.state.change_log
from orchard.schema import ServiceAccount

READER = ServiceAccount(name="reader", token="r" * 32, roles=("compute:read",))
WRITER = ServiceAccount(name="writer", token="w" * 32, roles=("compute:write",))
# Seconds.
SILENCE = 10

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


async def test_watch_of_one_kind_shows_no_other(api: Served, nursery: trio.Nursery) -> None:
    await api.create("vm")
    await api.register("w")
    for target, kind, name in (
        ("/vms?watch=true", "vm", "vm"),
        ("/watch?kinds=vms", "vm", "vm"),
        ("/workers?watch=true", "worker", "w"),
        ("/watch?kinds=workers", "worker", "w"),
    ):
        lines = await api.lines(target, nursery)
        assert await next_line(lines) == ("ADDED", kind, name, False)
        assert (await next_line(lines))[0] == "BOOKMARK"
    nursery.cancel_scope.cancel()


async def test_list_is_followed_by_what_came_after_it(api: Served, nursery: trio.Nursery) -> None:
    await api.create("a")
    for target in ("/vms", "/workers", "/vms?filter=worker=w", "/vms?limit=1", "/vms?filter=status=pending"):
        revision = (await api.call("GET", target)).headers["x-revision"]
        lines = await api.lines(f"/watch?since={revision}", nursery)
        assert await settled_lines(lines) == []
        changed = await api.ok("PATCH", "/vms/a", {"cpu": api.state.revision})
        assert (await lines.receive())["object"] == changed
    nursery.cancel_scope.cancel()


async def test_revision_is_on_the_last_line_of_each_transaction(api: Served, nursery: trio.Nursery) -> None:
    for name in ("a", "b"):
        await api.create(name)
    await api.register("w")
    lines = await api.lines("/vms?watch=true", nursery)
    await settled_lines(lines)
    api.schedule()
    await api.store.wait_durable()
    assert [("revision" in line) for line in await settled_lines(lines)] == [False, True]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("revision", ["", "x", "0", "x.0", "RUN.", "RUN.-1", "RUN.x", "RUN.9999", "RUN." + "9" * 30])
async def test_revision_that_is_not_known_is_gone(api: Served, revision: str) -> None:
    run = (await api.call("GET", "/vms")).headers["x-revision"].partition(".")[0]
    answered = await api.call("GET", f"/watch?since={revision.replace('RUN', run)}")
    assert answered.status == (410 if revision else 200)
    if revision:
        assert revision.replace("RUN", run)[:20] in answered.message


async def test_revision_of_another_run_is_gone(tmp_path: Path) -> None:
    revisions = []
    for _ in range(2):
        async with served(tmp_path) as api:
            revisions.append((await api.call("GET", "/vms")).headers["x-revision"])
            assert (await api.call("GET", f"/watch?since={revisions[-1]}")).status == 200
            assert (await api.call("GET", f"/watch?since={revisions[0]}")).status == (
                200 if len(revisions) == 1 else 410
            )


@pytest.mark.parametrize(
    ("target", "datum"),
    [("/watch?kinds=vm", '"vm"'), ("/watch?kinds=vms,", '""'), ("/watch?filter=colour=red", "colour")],
)
async def test_wrong_parameters_are_refused(api: Served, target: str, datum: str) -> None:
    answered = await api.call("GET", target)
    assert answered.status == 400
    assert datum in answered.message


async def test_object_that_begins_or_stops_to_match_is_added_or_deleted(api: Served, nursery: trio.Nursery) -> None:
    await api.create("a", metadata={"team": "x"})
    await api.create("b")
    lines = await api.lines("/vms?watch=true&filter=metadata.team=x", nursery)
    assert await next_line(lines) == ("ADDED", "vm", "a", False)
    assert (await next_line(lines))[0] == "BOOKMARK"
    for name, team, expected in (
        ("b", "x", [("ADDED", "b")]),
        ("b", "x ", [("DELETED", "b")]),
        ("b", "y", []),
        ("a", None, [("DELETED", "a")]),
        ("a", "x", [("ADDED", "a")]),
    ):
        await api.ok("PATCH", f"/vms/{name}", {"metadata": {"team": team}})
        found = await settled_lines(lines)
        assert [(line["type"], line["object"]["name"]) for line in found] == expected
        assert all("revision" in line for line in found)
    await api.ok("PATCH", "/vms/a", {"cpu": 4})
    assert await next_line(lines) == ("MODIFIED", "vm", "a", True)
    await api.ok("DELETE", "/vms/b")
    await api.ok("DELETE", "/vms/a")
    assert await next_line(lines) == ("DELETED", "vm", "a", True)
    nursery.cancel_scope.cancel()


async def test_worker_changes_are_told_and_heartbeats_are_not(api: Served, nursery: trio.Nursery) -> None:
    lines = await api.lines("/watch?kinds=workers", nursery)
    assert (await next_line(lines))[0] == "BOOKMARK"
    await api.register("w", capabilities=["worker-state"])
    api.schedule()
    found = await settled_lines(lines)
    assert (found[0]["type"], found[0]["object"]["state"]) == ("ADDED", "offline")
    problem = {"what": "list", "message": "tart is gone"}
    for minute, beat, expected in (
        (1, {"settled": True}, [("online", 0)]),
        (2, {"settled": True}, []),
        (3, {"settled": True, "health": {"ok": False, "problems": [problem]}}, [("online", 1)]),
        (4, {"settled": True, "health": {"ok": False, "problems": [problem]}}, []),
        (5, {"settled": True, "health": {"ok": True, "problems": []}}, [("online", 0)]),
    ):
        await api.ok("PUT", "/workers/w", {"last_seen": f"2026-01-31T12:0{minute}:00Z", **beat})
        found = await settled_lines(lines)
        assert [(line["object"]["state"], len(line["object"]["health"]["problems"])) for line in found] == expected
    await api.ok("PUT", "/workers/w", {"scheduling_paused": True})
    assert [line["object"]["state"] for line in await settled_lines(lines)] == ["paused"]
    await api.ok("PUT", "/workers/w", {})
    assert [line["object"]["state"] for line in await settled_lines(lines)] == ["online"]
    await api.ok("POST", "/rpc/goodbye?workerName=w")
    assert [line["object"]["state"] for line in await settled_lines(lines)] == ["offline"]
    shown = await api.ok("GET", "/workers/w")
    assert await settled_lines(lines) == []
    await api.ok("DELETE", "/workers/w")
    (line,) = await settled_lines(lines)
    assert (line["type"], line["object"]["name"], line["object"]["machine_id"]) == ("DELETED", "w", shown["machine_id"])
    nursery.cancel_scope.cancel()


async def test_drain_is_told_from_its_beginning_to_its_end(api: Served, nursery: trio.Nursery) -> None:
    await api.register("w")
    await api.create("vm")
    api.schedule()
    await api.store.wait_durable()
    lines = await api.lines("/workers?watch=true", nursery)
    await settled_lines(lines)
    await api.ok("POST", "/workers/w/drain", {})
    assert [line["object"]["state"] for line in await settled_lines(lines)] == ["draining"]
    await api.ok("DELETE", "/vms/vm")
    assert [line["object"]["state"] for line in await settled_lines(lines)] == ["drained"]
    await api.ok("DELETE", "/workers/w/drain")
    assert [line["object"]["state"] for line in await settled_lines(lines)] == ["online"]
    nursery.cancel_scope.cancel()


async def test_worker_that_goes_offline_by_time_alone_is_told(
    api: Served, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    nursery.start_soon(api.loop.run)
    await api.register("w")
    lines = await api.lines("/workers?watch=true", nursery)
    assert (await lines.receive())["object"]["state"] == "online"
    assert (await lines.receive())["type"] == "BOOKMARK"
    api.close_watch("w")
    assert (await lines.receive())["object"]["state"] == "offline"
    nursery.cancel_scope.cancel()


async def test_bookmark_follows_silence_and_carries_the_newest_revision(
    api: Served, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    await api.create("a")
    lines = await api.lines("/vms?watch=true&filter=name=b", nursery)
    (first,) = await settled_lines(lines)
    # Changes that the watcher does not see are silence, too.
    for _ in range(2):
        mock_clock.jump(9)
        await api.ok("PATCH", "/vms/a", {"cpu": api.state.revision})
        assert await settled_lines(lines) == []
    mock_clock.jump(3)
    (second,) = await settled_lines(lines)
    assert (first["type"], second["type"]) == ("BOOKMARK", "BOOKMARK")
    assert second["revision"] != first["revision"]
    resumed = await api.lines(f"/vms?watch=true&since={second['revision']}", nursery)
    assert await settled_lines(resumed) == []
    nursery.cancel_scope.cancel()


async def test_silence_begins_again_with_each_line(
    api: Served, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    await api.create("a")
    lines = await api.lines(f"/vms?watch=true&silence={SILENCE}", nursery)
    await settled_lines(lines)
    for cpu in range(1, 4):
        mock_clock.jump(SILENCE - 1)
        await api.ok("PATCH", "/vms/a", {"cpu": cpu})
        assert [line["type"] for line in await settled_lines(lines)] == ["MODIFIED"]
    mock_clock.jump(SILENCE - 1)
    assert await settled_lines(lines) == []
    mock_clock.jump(1)
    assert [line["type"] for line in await settled_lines(lines)] == ["BOOKMARK"]
    nursery.cancel_scope.cancel()


async def test_silence_cuts_no_line_off_that_is_taken_slowly(
    api: Served, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    await api.create("a")
    taken: list[bytes] = []
    may_take = trio.Semaphore(1)

    async def take(piece: bytes) -> None:
        await may_take.acquire()
        taken.append(piece)

    answer = await api.ask("GET", f"/watch?silence={SILENCE}")
    nursery.start_soon(answer.produce, Sender(take))
    await trio.testing.wait_all_tasks_blocked()
    await api.ok("PATCH", "/vms/a", {"cpu": 2})
    mock_clock.jump(10 * SILENCE)
    await trio.testing.wait_all_tasks_blocked()
    may_take.release()
    await trio.testing.wait_all_tasks_blocked()
    assert len(taken) == 2
    assert b"MODIFIED" in taken[1]
    nursery.cancel_scope.cancel()


async def test_nothing_is_sent_before_it_is_durable_nor_what_was_undone(tmp_path: Path, nursery: trio.Nursery) -> None:
    disk = HeldDisk()
    async with served(tmp_path, disk=disk) as api:
        await api.register("w")
        lines = await api.lines("/watch", nursery)
        await settled_lines(lines)
        with disk.held():
            nursery.start_soon(api.create, "a")
            assert await settled_lines(lines) == []
            # It is not stored, but what is shown of the worker may follow from what is not durable.
            api.loop.liveness.record_goodbye("w")
            assert await settled_lines(lines) == []
        await api.store.wait_durable()
        found = await settled_lines(lines)
        assert [(line["kind"], line["object"]["name"]) for line in found] == [("vm", "a"), ("worker", "w")]
        nursery.cancel_scope.cancel()


async def test_undone_changes_are_never_seen_and_the_workers_state_is(tmp_path: Path, nursery: trio.Nursery) -> None:
    disk = FailingDisk()
    async with served(tmp_path, disk=disk) as api:
        await api.register("w")
        lines = await api.lines("/watch", nursery)
        await settled_lines(lines)
        disk.fault = no_space
        answered = await api.call("PUT", "/workers/w", {"scheduling_paused": True})
        assert answered.status == 507
        disk.fault = lambda verb, number: 0
        assert [line["object"]["state"] for line in await settled_lines(lines)] == ["online"]
        nursery.cancel_scope.cancel()


async def test_slow_watcher_ends_after_whole_transactions_and_resumes(
    api: Served, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchard.state.change_log, "WATCH_BACKLOG", 3)
    await api.create("a")
    answer = await api.ask("GET", "/watch")
    taken: list[dict[str, Any]] = []
    may_take = trio.Semaphore(1)
    ended = trio.Event()

    async def take(piece: bytes) -> None:
        await may_take.acquire()
        taken.extend(json.loads(line) for line in piece.splitlines())

    async def produce() -> None:
        await answer.produce(Sender(take))
        ended.set()

    nursery.start_soon(produce)
    await trio.testing.wait_all_tasks_blocked()
    for cpu in range(1, 7):
        await api.ok("PATCH", "/vms/a", {"cpu": cpu})
    may_take.release()
    await ended.wait()
    assert [line["object"]["cpu"] for line in taken if line["type"] == "MODIFIED"] == [1]
    lines = await api.lines(f"/watch?since={taken[-1]['revision']}", nursery)
    assert [line["object"]["cpu"] for line in await settled_lines(lines)] == [2, 3, 4, 5, 6]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("limit", ["KEPT_CHANGES", "KEPT_BYTES"])
async def test_log_is_bounded_in_changes_and_bytes(api: Served, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    await api.create("a")
    size = len(api.state.json["vm"]["a"])
    monkeypatch.setattr(orchard.state.change_log, limit, 4 if limit == "KEPT_CHANGES" else 4 * size + size // 2)
    revisions = []
    for cpu in range(8):
        revisions.append((await api.call("GET", "/vms")).headers["x-revision"])
        await api.ok("PATCH", "/vms/a", {"cpu": cpu + 1})
    known = [(await api.call("GET", f"/watch?since={revision}")).status == 200 for revision in revisions]
    assert known == [False] * 4 + [True] * 4


@pytest.mark.slow
async def test_first_list_is_sent_in_blocks_and_holds_nothing_afterwards(api: Served, nursery: trio.Nursery) -> None:
    for number in range(300):
        await api.create(f"vm-{number}")
    answer = await api.ask("GET", "/watch?filter=name=vm-29*")
    pieces: list[bytes] = []
    # Those of other tests may not be collected yet.
    snapshots = [item for item in gc.get_objects() if isinstance(item, orchard.state.change_log.Snapshot)]
    (snapshot,) = [item for item in snapshots if len(item.vms) == 300]

    async def take(piece: bytes) -> None:
        await trio.lowlevel.checkpoint()
        pieces.append(piece)

    nursery.start_soon(answer.produce, Sender(take))
    await trio.testing.wait_all_tasks_blocked()
    assert b"".join(pieces).count(b"ADDED") == 11
    assert not snapshot.vms
    whole = await api.ask("GET", "/watch")
    pieces.clear()
    nursery.start_soon(whole.produce, Sender(take))
    await trio.testing.wait_all_tasks_blocked()
    assert len(pieces) > 2
    assert max(map(len, pieces)) < 2 * orchard.state.change_log._BLOCK_BYTES
    nursery.cancel_scope.cancel()


async def test_large_object_is_not_copied_for_each_watcher(api: Served, nursery: trio.Nursery) -> None:
    await api.create("vm", startup_script={"script_content": "#" * 100_000})
    stored = api.state.json["vm"]["vm"]
    pieces: list[Any] = []

    async def take(piece: Any) -> None:
        await trio.lowlevel.checkpoint()
        pieces.append(piece)

    for _ in range(2):
        answer = await api.ask("GET", "/watch")
        nursery.start_soon(answer.produce, Sender(take))
    await trio.testing.wait_all_tasks_blocked()
    await api.ok("PATCH", "/vms/vm", {"cpu": 2})
    await trio.testing.wait_all_tasks_blocked()
    held = [part for piece in pieces for part in (piece if isinstance(piece, tuple) else (piece,))]
    large = [part for part in held if len(part) > 100_000]
    assert len(large) == 4
    assert {id(part) for part in large} == {id(stored), id(api.state.json["vm"]["vm"])}
    nursery.cancel_scope.cancel()


async def test_watch_needs_a_role_and_ends_with_it(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with served(tmp_path, READER, WRITER) as api:
        for target in ("/watch", "/vms?watch=true", "/workers?watch=true"):
            assert (await api.call("GET", target)).status == 401
            assert (await api.call("GET", target, account=(WRITER.name, WRITER.token))).status == 403
            lines = await api.lines(target, nursery, account=(READER.name, READER.token))
            await settled_lines(lines)
            with api.store.transaction() as tx:
                tx.put(replace(READER, roles=()))
            await api.store.wait_durable()
            with pytest.raises(trio.EndOfChannel):
                await lines.receive()
            with api.store.transaction() as tx:
                tx.put(READER)
            await api.store.wait_durable()


async def test_watch_of_a_workers_vms_is_no_sign_of_life(api: Served, autojump_clock: trio.testing.MockClock) -> None:
    await api.register("w")
    before = api.loop.liveness.last_contact["w"]
    await trio.sleep(1)
    await api.ask("GET", "/vms?watch=true&filter=worker=w")
    assert api.loop.liveness.last_contact["w"] == before
    await api.ok("GET", "/vms?filter=worker=w")
    assert api.loop.liveness.last_contact["w"] > before
