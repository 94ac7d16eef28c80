"""Following the events of a VM, its lifecycle events, and the history of VMs that have ended, over the API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import HeldDisk
from harness.served import BEGAN, Sender, Served, served

from orchard import transitions
from orchard.base.nursery import Wakeup
from orchard.net.request import Stream
from orchard.schema import Event, ServiceAccount
from orchard.storage.lifecycle import MAX_LIFECYCLE


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
        await answer.produce(Sender(self.take))
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


@pytest.mark.parametrize("kinds", ["", "&kinds=log_line", "&kinds=lifecycle,log_line"])
async def test_follower_at_the_end_of_a_vm_is_sent_all_of_it(
    api: Served, tmp_path: Path, nursery: trio.Nursery, kinds: str
) -> None:
    await api.create("vm")
    waits_before_the_first_event = await follow(api, nursery, f"vm/events?follow=true{kinds}")
    slow = await follow(api, nursery, f"vm/events?follow=true{kinds}")
    slow.takes = trio.Event()
    await append(api, "1")
    await append(api, "2")
    await api.ok("DELETE", "/vms/vm")
    # A VM that is created again under the name is not followed.
    await api.create("vm")
    await append(api, "of the next VM")
    slow.takes.set()
    for following in (waits_before_the_first_event, slow):
        await following.has_ended.wait()
        assert [text for text in following.payloads if len(text) == 1] == ["1", "2"]
        others = [text for text in following.payloads if len(text) > 1]
        assert len(others) == (2 if "lifecycle" in kinds else 0)
        assert [text.partition(" ")[0] for text in others] in ([], ["created", "stopping:"])
    # The file of the deleted VM goes when its last follower has ended.
    await append(api, "another")
    assert len(list(tmp_path.glob("events/*-*.jsonl"))) == 1


async def test_follower_of_a_vm_that_does_not_exist_is_not_found(api: Served) -> None:
    for target in ("/vms/none/events?follow=true", "/vms/none/events?follow=true&kinds=lifecycle&until=ready"):
        assert (await api.call("GET", target)).status == 404


async def test_follower_is_sent_an_empty_line_after_silence(
    api: Served, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    await api.create("vm")
    following = await follow(api, nursery, "vm/events?follow=true")
    await trio.sleep(3.5 * api.api.parts.rendezvous.ping_interval)
    assert (following.empty_lines, following.events) == (3, [])


REFUSED = [
    ("GET", "?follow=true&limit=1", ..., 400, "limit"),
    ("GET", "?follow=true&order=desc", ..., 400, "order"),
    ("GET", "?follow=perhaps", ..., 400, "perhaps"),
    ("GET", "?until=ready", ..., 400, "until"),
    ("GET", "?follow=true&until=never", ..., 400, "never"),
    ("GET", "?follow=true&cursor=x", ..., 400, '"x"'),
    ("GET", "?follow=true&cursor=ffffffff-0", ..., 400, "ffffffff-0"),
    ("GET", "?kinds=lifecycle,,log_line", ..., 400, "kinds"),
    ("POST", "", [line("1"), {"kind": "lifecycle", "payload": "forged"}], 412, "[1].kind"),
]


@pytest.mark.parametrize(("method", "query", "body", "status", "named"), REFUSED)
async def test_request_for_events_that_is_refused(
    api: Served, method: str, query: str, body: object, status: int, named: str
) -> None:
    await api.create("vm")
    refusal = await api.call(method, f"/vms/vm/events{query}", body)
    assert refusal.status == status
    assert named in refusal.message
    assert await api.ok("GET", "/vms/vm/events") == []


# ---- until ----------------------------------------------------------------------------------------------------------

RUNNING = {"status": "running", "conditions": [{"type": "running", "state": "true"}]}
READY = {"status": "running", "conditions": [*RUNNING["conditions"], {"type": "ready", "state": "true"}]}
FAILED = {"status": "failed", "status_message": "broken"}


async def start(api: Served, capabilities: tuple[str, ...] = ("vm-ready",), **spec: object) -> dict[str, Any]:
    """Create a VM that is assigned to a worker."""
    await api.register("w", capabilities=capabilities)
    vm: dict[str, Any] = await api.create("vm", **spec)
    api.schedule()
    await api.store.wait_durable()
    return vm


@pytest.mark.parametrize(
    ("until", "policy", "seen", "ends"),
    [
        ("ready", "Never", READY, True),
        ("ready", "Never", RUNNING, False),
        ("ready", "Never", {**RUNNING, "startupExitCode": 3, "startupEndedAt": "2026-01-31T12:00:00Z"}, True),
        ("ready", "Never", FAILED, True),
        ("ready", "OnFailure", FAILED, False),
        ("ended", "Never", READY, False),
        ("ended", "Never", FAILED, True),
        ("ended", "OnFailure", FAILED, False),
        ("deleted", "Never", FAILED, False),
    ],
)
async def test_stream_ends_when_the_vm_has_reached_what_it_is_followed_until(
    api: Served, nursery: trio.Nursery, until: str, policy: str, seen: dict[str, Any], ends: bool
) -> None:
    vm = await start(api, restart_policy=policy, startupOnFailure="keep")
    following = await follow(api, nursery, f"vm/events?follow=true&until={until}")
    await append(api, "last words")
    await report(api, vm, **seen)
    await following.wait("last words")
    # A stream that begins now ends at once, after what is there.
    later = await follow(api, nursery, f"vm/events?follow=true&until={until}")
    await later.wait("last words")
    if ends:
        await following.has_ended.wait()
        await later.has_ended.wait()
    else:
        await append(api, "more")
        await following.wait("last words", "more")
        await later.wait("last words", "more")
        assert not following.has_ended.is_set()


async def test_stream_until_ready_ends_on_a_worker_that_does_not_report_it(api: Served, nursery: trio.Nursery) -> None:
    vm = await start(api, capabilities=())
    following = await follow(api, nursery, "vm/events?follow=true&until=ready")
    await report(api, vm, **RUNNING)
    await following.has_ended.wait()


@pytest.mark.parametrize("until", ["ready", "ended"])
async def test_stream_ends_when_the_user_has_stopped_the_vm(api: Served, nursery: trio.Nursery, until: str) -> None:
    vm = await start(api)
    await report(api, vm, **RUNNING)
    following = await follow(api, nursery, f"vm/events?follow=true&until={until}")
    stopped = await api.ok("PATCH", "/vms/vm", {"powerState": "stopped"})
    down = [{"type": "running", "state": "false"}]
    await report(api, vm, status="running", conditions=down, observedGeneration=stopped["generation"])
    await following.has_ended.wait()


async def test_stream_ends_with_the_lifecycle_event_of_its_end(api: Served, nursery: trio.Nursery) -> None:
    vm = await start(api)
    following = await follow(api, nursery, "vm/events?follow=true&until=ended&kinds=lifecycle")
    await report(api, vm, **FAILED)
    await following.has_ended.wait()
    assert following.payloads[-1] == "failed: broken"


async def test_stream_does_not_end_before_the_reason_is_durable(tmp_path: Path, nursery: trio.Nursery) -> None:
    disk = HeldDisk()
    async with served(tmp_path, disk=disk) as api:
        vm = await start(api)
        following = await follow(api, nursery, "vm/events?follow=true&until=ended")
        with disk.held():
            nursery.start_soon(partial(report, api, vm, **FAILED))
            while api.state.vms["vm"].state.status != "failed":
                await trio.lowlevel.checkpoint()
            # Wakes the stream.
            await api.api.parts.events.append(vm["uid"], [Event(kind="log_line", payload="last words")])
            await trio.testing.wait_all_tasks_blocked()
            assert not following.has_ended.is_set()
        await following.has_ended.wait()
        assert following.payloads == ["last words"]


async def test_stream_ends_with_the_role_of_its_account(tmp_path: Path, nursery: trio.Nursery) -> None:
    admin = ServiceAccount(name="admin", token="t" * 16, roles=("compute:write", "admin:write"))
    reader = ServiceAccount(name="reader", token="r" * 16, roles=("compute:read",))
    async with served(tmp_path, admin, reader) as api:
        await api.call("POST", "/vms", {"name": "vm", "image": "i"}, account=("admin", "t" * 16))
        target = "/vms/vm/events?follow=true"
        assert (await api.call("GET", target, account=("admin", "t" * 16))).status == 403
        answer = await api.ask("GET", target, account=("reader", "r" * 16))
        following = Following()
        nursery.start_soon(following.read, answer)
        await api.call("PUT", "/service-accounts/reader", {"roles": []}, account=("admin", "t" * 16))
        await following.has_ended.wait()


# ---- lifecycle events -------------------------------------------------------------------------------------------------


async def test_lifecycle_of_a_vm_is_shown_only_where_it_is_asked_for(api: Served) -> None:
    vm = await start(api, restart_policy="OnFailure")
    # Reads wait until events are written.
    assert await lifecycle(api) == ["created", "assigned to w"]
    await report(api, vm, status="pending", status_message="pulling image: 20 %")
    await report(api, vm, status="pending", status_message="starting")
    await report(api, vm, **RUNNING)
    await append(api, "hello")
    await report(api, vm, **RUNNING, startupExitCode=0)
    await report(api, vm, **FAILED)
    api.schedule()
    await api.store.wait_durable()
    expected = [
        *("created", "assigned to w", "pulled in 0.0 s", "booted"),
        *("script ended with 0", "failed: broken", "restarted, restart_count 1", "assigned to w"),
    ]
    assert await lifecycle(api) == expected
    assert await api.ok("GET", "/vms/vm/events") == [line("hello")]
    assert await api.ok("GET", "/vms/vm/events?kinds=log_line") == [line("hello")]
    both = await api.ok("GET", "/vms/vm/events?kinds=lifecycle,log_line")
    assert [event["payload"] for event in both] == [*expected[:4], "hello", *expected[4:]]
    assert {(event["kind"], event["timestamp"]) for event in both if event["payload"] != "hello"} == {
        ("lifecycle", int(BEGAN.timestamp()))
    }
    newest = await api.ok("GET", "/vms/vm/events?kinds=lifecycle,log_line&order=desc")
    assert newest == both[::-1]


async def test_lifecycle_and_log_are_paged_together(api: Served) -> None:
    vm = await start(api)
    await append(api, "1", "2")
    await report(api, vm, **RUNNING)
    await append(api, "3")
    kinds = "kinds=lifecycle,log_line"
    whole = await api.ok("GET", f"/vms/vm/events?{kinds}")
    for order, expected in (("asc", whole), ("desc", whole[::-1])):
        for limit in range(1, len(whole) + 1):
            found: list[Any] = []
            cursor = ""
            while True:
                page = await api.call("GET", f"/vms/vm/events?{kinds}&order={order}&limit={limit}&cursor={cursor}")
                found += page.body
                cursor = page.headers.get("x-next-cursor", "")
                if not cursor:
                    break
                assert len(page.body) == limit
            assert found == expected


async def test_lifecycle_of_a_vm_ends_with_it(api: Served) -> None:
    await start(api)
    await api.ok("DELETE", "/vms/vm")
    await api.create("vm")
    assert await lifecycle(api) == ["created"]


async def test_lifecycle_is_kept_over_a_restart(tmp_path: Path) -> None:
    async with served(tmp_path) as api:
        vm = await start(api)
        await append(api, "1")
        await report(api, vm, **RUNNING)
        before = await api.call("GET", "/vms/vm/events?kinds=lifecycle,log_line&limit=3")
    async with served(tmp_path) as api:
        target = f"/vms/vm/events?kinds=lifecycle,log_line&cursor={before.headers['x-next-cursor']}"
        assert [event["payload"] for event in await api.ok("GET", target)] == ["booted"]
        await report(api, vm, **FAILED)
        assert await lifecycle(api) == ["created", "assigned to w", "booted", "failed: broken"]


async def test_lifecycle_of_a_vm_that_restarts_without_end_is_bounded(api: Served) -> None:
    vm = await start(api, restart_policy="OnFailure")
    for count in range(MAX_LIFECYCLE):
        if count:
            api.assign("vm")
        await report(api, vm, restart_count=count, **FAILED)
        with api.store.transaction() as tx:
            tx.put(transitions.restart(api.state.vms["vm"], BEGAN))
        await api.store.wait_durable()
    events = await lifecycle(api)
    assert len(events) == MAX_LIFECYCLE
    assert events[-1] == f"restarted, restart_count {MAX_LIFECYCLE}"


# ---- the history ------------------------------------------------------------------------------------------------------


async def test_history_has_what_became_of_a_vm(api: Served) -> None:
    vm = await start(api, metadata={"job": "7"}, restart_policy="OnFailure")
    await report(api, vm, **RUNNING)
    await report(api, vm, **FAILED)
    api.schedule()
    assert await api.ok("GET", "/history") == []
    last = await api.ok("GET", "/vms/vm")
    await api.ok("DELETE", "/vms/vm")
    assert await api.ok("GET", "/history") == [
        {
            "name": "vm",
            "uid": vm["uid"],
            "metadata": {"job": "7"},
            "worker": "w",
            "image": "image",
            "createdAt": last["createdAt"],
            "assignedAt": last["scheduled_at"],
            "startedAt": last["started_at"],
            "endedAt": "2026-01-31T12:00:00Z",
            "status": "pending",
            "restarts": 1,
        }
    ]


async def test_history_is_selected_by_time_and_number(api: Served) -> None:
    for name in "abc":
        await api.create(name)
        await api.ok("DELETE", f"/vms/{name}")

    async def names(query: str) -> str:
        return "".join(ended["name"] for ended in await api.ok("GET", f"/history{query}"))

    assert await names("") == "abc"
    # Without a time, the last ones.
    assert await names("?limit=2") == "bc"
    # From a time on, the first ones, so that a client can go on from there.
    assert await names("?since=2026-01-31T13:00:00%2B01:00&limit=2") == "ab"
    assert await names("?since=2026-01-31T12:00:00.000001Z") == ""
    for query, named in (("limit=0", "limit"), ("since=yesterday", "since"), ("limit=10001", "limit")):
        refusal = await api.call("GET", f"/history?{query}")
        assert refusal.status == 400
        assert named in refusal.message
