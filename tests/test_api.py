"""The REST API's handlers: bodies, statuses, roles, defaults, and which requests change the state."""

from __future__ import annotations

import gc
import importlib
import json
import pkgutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
import trio.testing
from harness.disks import HeldDisk
from harness.every_field import EVERY_FIELD, EVERY_SETTING
from harness.go_client import GO_FIELDS, GO_SETTINGS, go_vm
from harness.served import BEGAN, Answered, Sender, Served, served
from trio.testing import assert_no_checkpoints

import orchard
from orchard import __version__, auth, transitions
from orchard.base.files import STATE_FILE
from orchard.codec import InvalidError
from orchard.control.scheduling_loop import VMS_PER_PLAN
from orchard.controller import DEFAULT_OFFLINE_TIMEOUT
from orchard.decisions.login_limit import TooManyFailuresError
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted, APIOperation
from orchard.handlers.answers import ERROR_STATUS, http_error
from orchard.handlers.vms import create_vm
from orchard.net.openapi import PROBLEMS
from orchard.net.request import Query, Request, Stream
from orchard.operations import OPERATIONS
from orchard.resources.validation import vm_from_client
from orchard.schema import TART_VMS, WORKER_NAME_LABEL, Role, ServiceAccount
from orchard.state.changes import Change
from orchard.storage.journal import Disk, Journal
from orchard.storage.state_file import snapshot_lines
from orchard.store import read_state


@pytest.fixture
async def api(tmp_path: Path) -> Any:
    async with served(tmp_path) as serving:
        yield serving


# Fields that Go clients do not know, and that no PUT changes.
NOT_BY_PUT = {"audio", "clipboard"}

# ---- VMs ------------------------------------------------------------------------------------------------------------


async def test_create_vm_answers_with_defaults(api: Served) -> None:
    vm = await api.create("hello")
    uid = vm["uid"]
    assert len(uid) == 36
    assert vm == {
        "name": "hello",
        "image": "image",
        "uid": uid,
        "createdAt": "2026-01-31T12:00:00Z",
        "version": 1,
        "generation": 0,
        "observedGeneration": 0,
        "imagePullPolicy": "IfNotPresent",
        "os": "darwin",
        "arch": "arm64",
        "runtime": "tart",
        "netSoftnet": False,
        "net-softnet": False,
        "suspendable": False,
        "headless": False,
        "nested": False,
        "username": "admin",
        "password": "admin",
        "restart_policy": "Never",
        "resources": {"org.cirruslabs.tart-vms": 1},
        "powerState": "running",
        "status": "pending",
        "cpu": 0,
        "memory": 0,
        "conditions": [{"type": "scheduled", "state": "false"}, {"type": "running", "state": "false"}],
        "localName": f"orchard-hello-{uid}-0",
        "tartName": f"orchard-hello-{uid}-0",
    }
    assert await api.ok("GET", "/vms/hello") == vm
    assert await api.ok("GET", "/vms") == [vm]


async def test_lists_are_sorted_by_name_and_never_null(api: Served) -> None:
    assert await api.ok("GET", "/vms") == []
    assert await api.ok("GET", "/workers") == []
    assert await api.ok("GET", "/service-accounts") == []
    for name in ("b", "a", "c"):
        await api.create(name)
    assert [vm["name"] for vm in await api.ok("GET", "/vms")] == ["a", "b", "c"]


async def test_put_and_patch_of_an_unchanged_vm_change_nothing(api: Served) -> None:
    vm = await api.create("vm", labels={"a": "b"}, netSoftnet=True, suspendable=True)
    revision = api.state.revision
    sent = {**vm, "status": "running", "uid": "other", "worker": "w", "generation": 9, "createdAt": BEGAN.isoformat()}
    assert await api.ok("PUT", "/vms/vm", sent) == vm
    assert await api.ok("PATCH", "/vms/vm", sent) == vm
    assert api.state.revision == revision


async def test_absent_booleans_are_false_in_put_and_unchanged_in_patch(api: Served) -> None:
    await api.create("vm", headless=True, netSoftnetAllow=["10.0.0.0/8"])
    patched = await api.ok("PATCH", "/vms/vm", {"cpu": 6})
    assert (patched["headless"], patched["cpu"], patched["generation"]) == (True, 6, 1)
    replaced = await api.ok("PUT", "/vms/vm", {"image": "image"})
    assert (replaced["headless"], replaced["cpu"], replaced["generation"]) == (False, 6, 2)
    assert "netSoftnetAllow" not in replaced


async def test_go_client_that_sends_back_what_it_reads_changes_nothing(tmp_path: Path) -> None:
    # A secret is not shown again.
    shown = [{name: value for name, value in one.items() if name != "secret"} for one in EVERY_SETTING["webhooks"]]
    settings = {**EVERY_SETTING, "webhooks": shown}
    new = EVERY_FIELD.keys() - GO_FIELDS - NOT_BY_PUT
    script = {"script_content": "echo", "transport": "tart-guest-agent"}
    fields = {**{name: EVERY_FIELD[name] for name in new}, "startup_script": script}
    async with served(tmp_path, ServiceAccount("go", token="t" * 16, roles=get_args(Role))) as api:
        call = partial(api.call, account=("go", "t" * 16))
        assert (await call("PUT", "/cluster-settings", EVERY_SETTING)).body == settings
        vm = (await call("POST", "/vms", {"name": "vm", "image": "image", **fields})).body
        assert (vm["createdBy"], "expiresAt" in vm) == ("go", True)
        sent = {name: value for name, value in settings.items() if name in GO_SETTINGS}
        assert (await call("PUT", "/cluster-settings", sent)).body == settings
        assert (await call("PUT", "/vms/vm", go_vm(vm))).body == vm
        changed = (await call("PUT", "/vms/vm", go_vm({**vm, "cpu": 3}))).body
        assert changed == {**vm, "cpu": 3, "generation": 1, "version": changed["version"]}


async def test_deleted_vm_is_gone_and_its_name_can_be_reused(api: Served) -> None:
    first = await api.create("vm")
    await api.ok("POST", "/vms/vm/events", [{"kind": "log_line", "payload": "old", "timestamp": 1}])
    assert await api.ok("DELETE", "/vms/vm") is None
    assert (await api.call("GET", "/vms/vm")).message == 'VM "vm" does not exist'
    second = await api.create("vm")
    assert second["uid"] != first["uid"]
    assert second["version"] > first["version"]
    assert await api.ok("GET", "/vms/vm/events") == []


async def test_list_vms_filtered_by_worker(api: Served) -> None:
    await api.register("w")
    for name in ("a", "b", "c"):
        await api.create(name)
    api.schedule()
    assert [vm["name"] for vm in await api.ok("GET", "/vms?filter=worker=w")] == ["a", "b"]
    assert [vm["name"] for vm in await api.ok("GET", "/vms?filter=worker=w,worker=w")] == ["a", "b"]
    assert await api.ok("GET", "/vms?filter=worker=w,worker=x") == []
    assert await api.ok("GET", "/vms?filter=worker=x") == []
    assert len(await api.ok("GET", "/vms?filter=")) == 3


async def test_scheduling_many_vms_yields_to_other_tasks(api: Served, nursery: trio.Nursery) -> None:
    count = 2 * VMS_PER_PLAN + 1
    with api.store.transaction() as tx:
        for number in range(count):
            spec = vm_from_client({"name": f"vm-{number}", "image": "image"}, [])[1]
            tx.put(transitions.create(f"vm-{number}", f"uid-{number}", spec, BEGAN))
    await api.register("w", resources={TART_VMS: count})
    turn, told, done = 0, list[tuple[int, int]](), trio.Event()

    def committed(changes: list[Change]) -> None:
        told.append((turn, len(changes)))
        if sum(size for _, size in told) == count:
            done.set()

    api.store.on_commit(committed)
    nursery.start_soon(api.loop.run)
    while not done.is_set():
        turn += 1
        await trio.lowlevel.checkpoint()
    assert [size for _, size in told] == [VMS_PER_PLAN, VMS_PER_PLAN, 1]
    assert len({at for at, _ in told}) > 1


async def test_host_dirs_need_a_policy(api: Served) -> None:
    host_dir = {"name": "src", "path": "/Users/ci/src"}
    refusal = await api.call("POST", "/vms", {"name": "vm", "image": "i", "hostDirs": [host_dir]})
    assert refusal.status == 400
    assert "hostDirs[0].path" in refusal.message
    assert "/Users/ci/src" in refusal.message
    await api.ok("PUT", "/cluster-settings", {"hostDirPolicies": [{"pathPrefix": "/Users/ci", "ro": True}]})
    assert (await api.call("POST", "/vms", {"name": "vm", "image": "i", "hostDirs": [host_dir]})).status == 400
    await api.create("vm", hostDirs=[{**host_dir, "ro": True}])
    # After the policy was removed, other fields can still be changed.
    await api.ok("PUT", "/cluster-settings", {})
    assert (await api.ok("PATCH", "/vms/vm", {"cpu": 2}))["generation"] == 1
    assert (await api.call("PATCH", "/vms/vm", {"hostDirs": [host_dir]})).status == 400


# ---- reports of a worker about its VM -------------------------------------------------------------------------------


async def test_state_report_changes_only_the_workers_fields(api: Served) -> None:
    await api.register("w")
    await api.create("vm")
    api.schedule()
    before = await api.ok("PATCH", "/vms/vm", {"cpu": 2})
    report = {
        **before,
        "image": "changed",
        "status": "running",
        "status_message": "",
        "image_fqn": "image@sha256:0",
        "observedGeneration": 1,
        "conditions": [{"type": "running", "state": "true"}, {"type": "scheduled", "state": "false"}],
    }
    answer = await api.ok("PUT", "/vms/vm/state", report)
    after = await api.ok("GET", "/vms/vm")
    assert answer == after, "existing workers decode the answer"
    assert after == {
        **before,
        "version": after["version"],
        "generation": 1,
        "status": "running",
        "image_fqn": "image@sha256:0",
        "observedGeneration": 1,
        "started_at": "2026-01-31T12:00:00Z",
        "conditions": [{"type": "scheduled", "state": "true"}, {"type": "running", "state": "true"}],
    }
    await api.ok("PUT", "/vms/vm/state", {"uid": before["uid"], "status": "failed", "status_message": "no disk"})
    await api.ok("PUT", "/vms/vm/state", {"uid": before["uid"], "status": "running"})
    failed = await api.ok("GET", "/vms/vm")
    assert (failed["status"], failed["status_message"]) == ("failed", "no disk")


async def test_state_report_about_another_run_is_not_found(api: Served) -> None:
    await api.create("vm")
    api.assign("vm")
    vm = await api.ok("GET", "/vms/vm")
    for stale in ({"uid": "other"}, {"uid": vm["uid"], "restart_count": 1}):
        refusal = await api.call("PUT", "/vms/vm/state", {**stale, "status": "running"})
        assert refusal.status == 404, stale
    assert (await api.call("PUT", "/vms/none/state", {"status": "running"})).status == 404
    assert await api.ok("GET", "/vms/vm") == vm


@pytest.mark.parametrize(("path", "agent"), [("/vms/vm/state", None), ("/vms/vm", "Orchard/0.43.2-abcdef")])
async def test_state_report_about_a_vm_without_a_worker_is_not_found(api: Served, path: str, agent: str | None) -> None:
    vm = await api.create("vm")
    for status in ("pending", "running", "failed"):
        refusal = await api.call("PUT", path, {"uid": vm["uid"], "status": status}, agent=agent)
        assert (refusal.status, '"vm"' in refusal.message) == (404, True)
    assert await api.ok("GET", "/vms/vm") == vm


@pytest.mark.parametrize(
    ("agent", "is_old"),
    [
        ("Orchard/0.43.2-abcdef", True),
        ("Orchard/0.9", True),
        ("Orchard/0.0.0-unknown", True),
        ("Orchard/0.44.0", False),
        ("Orchard/0.430.0", False),
        ("Orchard/1.2.0", False),
        ("orchard/0.1.0", False),
        ("Go-http-client/1.1 Orchard/0.43.2", False),
        (None, False),
    ],
)
async def test_put_of_a_worker_older_than_the_state_endpoint_is_a_report(
    api: Served, agent: str | None, is_old: bool
) -> None:
    await api.register("w")
    await api.create("vm")
    api.schedule()
    before = await api.ok("GET", "/vms/vm")
    seen = {"status": "running", "status_message": "booted", "image_fqn": "image@sha256:0"}
    sent = {**before, **seen, "cpu": 2, "observedGeneration": 9, "worker": "other", "conditions": None}
    after = (await api.call("PUT", "/vms/vm", sent, agent=agent)).body
    if is_old:
        started = {"started_at": "2026-01-31T12:00:00Z", "version": after["version"]}
        runs = [{"type": "scheduled", "state": "true"}, {"type": "running", "state": "true"}]
        assert after == {**before, **seen, **started, "conditions": runs}
        stale = await api.call("PUT", "/vms/vm", {**sent, "uid": "another"}, agent=agent)
        assert stale.status == 404
    else:
        assert (after["cpu"], after["status"], after["generation"]) == (2, "pending", 1)


# ---- events ---------------------------------------------------------------------------------------------------------


def line(number: int) -> dict[str, object]:
    return {"kind": "log_line", "payload": f"line {number}", "timestamp": number}


async def test_events_are_paged_and_the_last_page_has_no_cursor(api: Served) -> None:
    await api.create("vm")
    await api.ok("POST", "/vms/vm/events", [line(n) for n in range(5)])
    await api.ok("POST", "/vms/vm/events", None)
    await api.ok("POST", "/vms/vm/events", [])
    assert await api.ok("GET", "/vms/vm/events") == [line(n) for n in range(5)]
    first = await api.call("GET", "/vms/vm/events?limit=2&order=desc")
    assert first.body == [line(4), line(3)]
    await api.ok("POST", "/vms/vm/events", [line(5)])
    second = await api.call("GET", f"/vms/vm/events?limit=3&order=desc&cursor={first.headers['x-next-cursor']}")
    assert second.body == [line(2), line(1), line(0)]
    assert "x-next-cursor" not in second.headers


async def test_events_with_the_uid_of_an_earlier_vm_are_not_found(api: Served) -> None:
    vm = await api.create("vm")
    await api.ok("POST", f"/vms/vm/events?uid={vm['uid']}", [line(1)])
    refusal = await api.call("POST", "/vms/vm/events?uid=other", [line(2)])
    assert refusal.status == 404
    assert await api.ok("GET", "/vms/vm/events") == [line(1)]


# ---- watching -------------------------------------------------------------------------------------------------------


async def test_watch_follows_a_vm_and_the_next_vm_of_its_name(
    api: Served, nursery: trio.Nursery
) -> None:  # fmt: skip
    created = await api.create("vm")
    lines = await api.watch("vm", nursery)
    assert await lines.receive() == {"type": "ADDED", "object": created}
    changed = await api.ok("PATCH", "/vms/vm", {"cpu": 2})
    assert await lines.receive() == {"type": "MODIFIED", "object": changed}
    await api.ok("DELETE", "/vms/vm")
    assert await lines.receive() == {"type": "DELETED", "object": changed}
    again = await api.create("vm")
    assert await lines.receive() == {"type": "ADDED", "object": again}
    nursery.cancel_scope.cancel()


async def test_watch_begun_before_a_change_is_durable_sends_it_once(api: Served, nursery: trio.Nursery) -> None:
    await api.create("vm")
    answer = await api.ask("GET", "/vms/vm?watch=1")
    # This change of the waiting reason is in memory, and not durable yet.
    api.schedule()
    send, receive = trio.open_memory_channel[bytes](100)
    nursery.start_soon(answer.produce, Sender(send.send))
    lines = [json.loads(await receive.receive()) for _ in range(2)]
    assert [line["type"] for line in lines] == ["ADDED", "MODIFIED"]
    assert lines[1]["object"]["status_message"] == "waiting: no worker has registered yet"
    await api.ok("DELETE", "/vms/vm")
    assert json.loads(await receive.receive())["type"] == "DELETED"
    nursery.cancel_scope.cancel()


async def test_watch_of_a_vm_changed_and_deleted_meanwhile_ends_with_the_last_object(
    api: Served, nursery: trio.Nursery
) -> None:
    vm = await api.create("vm")
    answer = await api.ask("GET", "/vms/vm?watch=true")
    last = await api.ok("PATCH", "/vms/vm", {"cpu": 2})
    await api.ok("DELETE", "/vms/vm")
    send, receive = trio.open_memory_channel[bytes](100)
    nursery.start_soon(answer.produce, Sender(send.send))
    lines = [json.loads(await receive.receive()) for _ in range(3)]
    assert [(line["type"], line["object"]["version"]) for line in lines] == [
        ("ADDED", vm["version"]),
        ("MODIFIED", last["version"]),
        ("DELETED", last["version"]),
    ]
    assert lines[2]["object"] == last
    nursery.cancel_scope.cancel()


async def test_silent_watch_sends_an_empty_line_each_ping_interval(
    api: Served, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    await api.create("vm")
    answer = await api.ask("GET", "/vms/vm?watch=true")
    send, receive = trio.open_memory_channel[bytes](0)
    nursery.start_soon(answer.produce, Sender(send.send))
    assert json.loads(await receive.receive())["type"] == "ADDED"
    for _ in range(2):
        before = trio.current_time()
        assert await receive.receive() == b"\n"
        assert trio.current_time() - before == pytest.approx(20)
    nursery.cancel_scope.cancel()


async def test_watch_that_is_never_begun_leaves_nothing_behind(api: Served) -> None:
    await api.create("vm")
    await api.ask("GET", "/vms/vm?watch=true")
    assert api.store._watchers == {}


async def test_watch_begun_before_a_deletion_is_durable_sends_it_once(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with served(tmp_path, disk=disk) as api, trio.open_nursery() as nursery:
        vm = await api.create("vm")
        answer = await api.ask("GET", "/vms/vm?watch=true")
        lines: list[dict[str, Any]] = []

        async def take(piece: bytes) -> None:
            await trio.lowlevel.checkpoint()
            lines.extend(json.loads(line) for line in piece.splitlines())

        with disk.held():
            nursery.start_soon(api.ok, "DELETE", "/vms/vm")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(answer.produce, Sender(take))
            await trio.testing.wait_all_tasks_blocked()
            assert [line["type"] for line in lines] == ["ADDED"]
        again = await api.create("vm")
        await trio.testing.wait_all_tasks_blocked()
        assert [(line["type"], line["object"]["uid"]) for line in lines] == [
            ("ADDED", vm["uid"]),
            ("DELETED", vm["uid"]),
            ("ADDED", again["uid"]),
        ]
        nursery.cancel_scope.cancel()


# ---- workers --------------------------------------------------------------------------------------------------------

SEEN = "2026-01-31T12:00:15Z"


async def test_registering_again_updates_a_worker_and_keeps_it_paused(api: Served) -> None:
    worker = await api.register("w", labels={"a": "1"})
    assert worker["createdAt"] == "2026-01-31T12:00:00Z"
    assert (worker["arch"], worker["runtime"]) == ("arm64", "tart")
    await api.ok("PUT", "/workers/w", {"scheduling_paused": True})
    renewed = await api.register("w", labels={"a": "2"})
    assert (renewed["labels"], renewed["scheduling_paused"]) == ({"a": "2", WORKER_NAME_LABEL: "w"}, True)
    refusal = await api.call("POST", "/workers", {"name": "w", "machine_id": "another"})
    assert refusal.status == 409
    assert '"m"' in refusal.message


async def test_put_worker_with_a_later_last_seen_is_only_a_heartbeat(api: Served) -> None:
    await api.register("w")
    await api.ok("PUT", "/workers/w", {"scheduling_paused": True})
    revision = api.state.revision
    beat = await api.ok("PUT", "/workers/w", {"name": "w", "last_seen": SEEN})
    assert (beat["last_seen"], beat["scheduling_paused"]) == (SEEN, True)
    assert api.state.revision == revision, "a heartbeat is not stored"
    # The same time again is not a heartbeat. Go clients resume a worker in this way, because they leave false out.
    resumed = await api.ok("PUT", "/workers/w", {"name": "w", "last_seen": SEEN})
    assert "scheduling_paused" not in resumed
    assert (await api.ok("GET", "/workers/w"))["last_seen"] == SEEN


async def test_only_a_poll_from_the_workers_own_host_counts_for_liveness(
    api: Served, autojump_clock: trio.testing.MockClock
) -> None:
    await api.register("w")
    seen = api.loop.liveness.last_contact
    began = seen["w"]
    await trio.sleep(10)
    await api.call("GET", "/vms?filter=worker=w", peer="10.0.0.2")
    assert seen["w"] == began
    await api.call("GET", "/vms?filter=worker=w", peer="10.0.0.1")
    assert seen["w"] == began + 10


async def test_stalled_controller_does_not_fail_vms_of_live_workers(
    api: Served, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    await api.register("w")
    await api.create("vm")
    nursery.start_soon(api.loop.run)
    while not (await api.ok("GET", "/vms/vm")).get("worker"):
        await trio.lowlevel.checkpoint()
    await api.ok("GET", "/vms?filter=worker=w")
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(2 * DEFAULT_OFFLINE_TIMEOUT)
    await trio.testing.wait_all_tasks_blocked()
    assert (await api.ok("GET", "/vms/vm"))["status"] == "pending"
    mock_clock.autojump_threshold = 0.0
    await trio.sleep(2 * DEFAULT_OFFLINE_TIMEOUT)
    vm = await api.ok("GET", "/vms/vm")
    assert vm["status_message"] == 'worker "w" is offline: no contact for 180 seconds'
    nursery.cancel_scope.cancel()


async def test_vms_of_a_deleted_worker_fail_with_that_reason(api: Served) -> None:
    await api.register("w")
    await api.create("vm")
    api.schedule()
    await api.ok("DELETE", "/workers/w")
    api.schedule()
    vm = await api.ok("GET", "/vms/vm")
    assert (vm["status"], vm["status_message"]) == ("failed", 'worker "w" was deleted')
    assert (await api.call("GET", "/workers/w")).status == 404
    assert (await api.call("DELETE", "/workers/w")).status == 404


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKf4KBPutqudG6TVh2xybn7EUscXTQFDP27xh3GM9u9b ci"

# ---- accounts and settings ------------------------------------------------------------------------------------------


async def test_account_without_a_token_gets_a_random_one(api: Served) -> None:
    created = await api.ok("POST", "/service-accounts", {"name": "ci", "roles": ["compute:read"]})
    assert len(created["token"]) == 32
    changed = await api.ok("PUT", "/service-accounts/ci", {"roles": ["compute:write", "compute:write"]})
    assert changed == {**created, "roles": ["compute:write"]}
    assert await api.ok("GET", "/service-accounts/ci") == changed
    assert (await api.ok("PUT", "/service-accounts/ci", {"token": "my secret"}))["token"] == "my secret"
    await api.ok("DELETE", "/service-accounts/ci")
    assert (await api.call("GET", "/service-accounts/ci")).status == 404


async def test_account_without_roles_and_short_token_are_warned_of(api: Served) -> None:
    answered = await api.call("POST", "/service-accounts", {"name": "a", "token": "12345678"})
    assert "no roles" in answered.headers["warning"]
    assert "token has fewer than 16" in answered.headers["warning"]
    assert "12345678" not in answered.headers["warning"]
    good = {"name": "b", "token": "0123456789abcdef", "roles": ["compute:read"]}
    assert "warning" not in (await api.call("POST", "/service-accounts", good)).headers
    refused = await api.call("PUT", "/service-accounts/b", {"token": "1234567"})
    assert (refused.status, "1234567" in refused.message) == (412, False)
    assert (await api.ok("GET", "/service-accounts/b"))["token"] == "0123456789abcdef"


async def test_patch_of_an_account_changes_what_it_names(api: Served) -> None:
    made = await api.ok("POST", "/service-accounts", {"name": "a", "roles": ["compute:read"]})
    changed = await api.ok("PATCH", "/service-accounts/a", {"authorizedKeys": [KEY]})
    assert changed == {**made, "authorizedKeys": [KEY]}
    assert await api.ok("PUT", "/service-accounts/a", {"roles": ["compute:write"]}) == {
        **changed,
        "roles": ["compute:write"],
    }
    cleared = await api.ok("PATCH", "/service-accounts/a", {"authorizedKeys": None, "roles": None})
    assert cleared == {name: value for name, value in made.items() if name != "roles"}
    assert (await api.call("PATCH", "/service-accounts/none", {})).status == 404


async def test_tokens_are_shown_only_to_accounts_that_may_change_them(tmp_path: Path) -> None:
    reader = ServiceAccount("reader", "r" * 16, ("admin:read",))
    admin = ServiceAccount("admin", "a" * 16, ("admin:read", "admin:write"))
    writer = ServiceAccount("writer", "w" * 16, ("admin:write",))
    async with served(tmp_path, reader, admin, writer) as api:
        for account, shown in ((reader, False), (admin, True)):
            credentials = (account.name, account.token)
            listed = await api.call("GET", "/service-accounts", account=credentials)
            one = await api.call("GET", "/service-accounts/writer", account=credentials)
            assert one.body in listed.body
            tokens = ["a" * 16, "r" * 16, "w" * 16] if shown else [None] * 3
            assert [item.get("token") for item in listed.body] == tokens
        made = await api.call("POST", "/service-accounts", {"name": "new"}, account=("writer", "w" * 16))
        assert len(made.body["token"]) == 32


async def test_put_settings_replaces_all_and_absent_ones_have_defaults(api: Served) -> None:
    defaults = {"hostDirPolicies": [], "schedulerProfile": "optimize-utilization"}
    assert await api.ok("GET", "/cluster-settings") == defaults
    wanted = {"hostDirPolicies": [{"pathPrefix": "/a"}], "schedulerProfile": "distribute-load"}
    assert await api.ok("PUT", "/cluster-settings", wanted) == wanted
    assert await api.ok("GET", "/cluster-settings") == wanted
    assert await api.ok("PUT", "/cluster-settings", {}) == defaults


async def test_fields_that_only_a_newer_version_knows_stay_stored(tmp_path: Path) -> None:
    new = {"newField": {"deep": [1, None]}}
    with trio.fail_after(60):
        async with served(tmp_path) as api:
            vm = await api.create("vm")
            await api.register("w")
            await api.ok("POST", "/service-accounts", {"name": "a", "roles": ["compute:read"]})
            await api.ok("PUT", "/cluster-settings", {"schedulerProfile": "distribute-load"})
            await api.ok("POST", "/controller/accept-state")
            tables, revision = api.state.tables(), api.state.revision
        with_new = {
            kind: {name: json.dumps({**json.loads(text), **new}).encode() for name, text in table.items()}
            for kind, table in tables.items()
        }
        journal = Journal(tmp_path / STATE_FILE, Disk())
        journal.create(snapshot_lines(with_new, revision, BEGAN))
        journal.close()
        async with served(tmp_path) as api:
            api.assign("vm")
            await api.ok("PUT", "/vms/vm/state", {"uid": vm["uid"], "status": "running"})
            await api.ok("PUT", "/vms/vm", {"headless": True})
            await api.ok("PATCH", "/vms/vm", {"cpu": 3, "newField": "of a client"})
            await api.ok("PUT", "/workers/w", {"scheduling_paused": True})
            await api.register("w", labels={"a": "b"})
            await api.ok("PUT", "/service-accounts/a", {"roles": ["compute:write"]})
            await api.ok("PUT", "/cluster-settings", {})
            await api.ok("POST", "/controller/accept-state")
    state = read_state(tmp_path / STATE_FILE)
    assert (state.vms["vm"].spec.cpu, state.vms["vm"].meta.generation) == (3, 2)
    for kind, table in state.json.items():
        for text in table.values():
            assert json.loads(text)["newField"] == new["newField"], kind


# ---- refused requests -----------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, object, int, list[str]]] = [
    ("GET", "/nothing", ..., 404, ["/v1/nothing"]),
    ("POST", "/vms/vm", {}, 405, ["POST", "DELETE, GET, HEAD, PATCH, PUT"]),
    ("POST", "/vms", ..., 400, ["body is empty", "JSON"]),
    ("POST", "/vms", [], 400, ["[]", "object"]),
    ("POST", "/vms", {"image": "i"}, 412, ["name", '""']),
    ("POST", "/vms", {"name": "a/b", "image": "i"}, 412, ["name", "a/b", "A-Z"]),
    ("POST", "/vms", {"name": "..", "image": "i"}, 412, ["name", '".."']),
    ("POST", "/vms", {"name": "new"}, 412, ["image"]),
    ("POST", "/vms", {"name": "new", "image": "--option"}, 412, ["image", "--option"]),
    ("POST", "/vms", {"name": "new", "image": "i", "cpu": "4"}, 400, ["cpu", '"4"', "number"]),
    ("POST", "/vms", {"name": "new", "image": "i", "cpu": -1}, 400, ["cpu", "-1", "0"]),
    ("POST", "/vms", {"name": "new", "image": "i", "memory": 1.5}, 400, ["memory", "1.5"]),
    ("POST", "/vms", {"name": "new", "image": "i", "headless": "yes"}, 400, ["headless", '"yes"', "true or false"]),
    ("POST", "/vms", {"name": "new", "image": "i", "os": "windows"}, 412, ["os", "windows", "darwin"]),
    ("POST", "/vms", {"name": "new", "image": "i", "restart_policy": "Always"}, 412, ["restart_policy", "OnFailure"]),
    ("POST", "/vms", {"name": "new", "image": "i", "powerState": "suspended"}, 412, ["powerState", "suspendable"]),
    ("POST", "/vms", {"name": "vm", "image": "i"}, 409, ["vm", "already exists"]),
    ("GET", "/vms?filter=cpu=4", ..., 400, ["filter", "cpu=4", "PATH=VALUE", "createdBy"]),
    ("GET", "/vms?filter=worker=", ..., 400, ["filter", "worker"]),
    ("GET", "/vms?filter=worker=w&filter=a", ..., 400, ["filter", '"a"']),
    ("GET", "/vms?limit=0", ..., 400, ["limit", '"0"', "from 1"]),
    ("GET", "/vms?continue=%25", ..., 400, ["continue", '"%"', "X-Continue"]),
    ("GET", "/vms?limit=1&limit=2", ..., 400, ["limit", "2 times"]),
    ("DELETE", "/vms", ..., 400, ["filter"]),
    ("GET", "/vms/vm?watch=maybe", ..., 400, ["watch", "maybe", "true or false"]),
    ("GET", "/vms/none?watch=true", ..., 404, ["none"]),
    ("PUT", "/vms/none", {}, 404, ["none"]),
    ("PUT", "/vms/vm", {"image": "another"}, 412, ["image", "cannot be changed"]),
    ("PATCH", "/vms/vm", {"powerState": "suspended"}, 412, ["powerState", "suspendable"]),
    ("PATCH", "/vms/vm", {"image": None}, 412, ["image"]),
    ("PATCH", "/vms/vm", [1], 400, ["[1]", "object"]),
    ("DELETE", "/vms/none", ..., 404, ["none"]),
    ("PUT", "/vms/vm/state", {"status": "gone"}, 412, ["status", "gone", "pending"]),
    ("POST", "/vms/vm/events", {"kind": "log_line"}, 400, ["array"]),
    ("POST", "/vms/vm/events", [{"kind": 1}], 400, ["[0].kind", "1"]),
    ("GET", "/vms/none/events", ..., 404, ["none"]),
    ("GET", "/vms/vm/events?limit=0", ..., 400, ["limit", '"0"', "from 1"]),
    ("GET", "/vms/vm/events?limit=x", ..., 400, ["limit", '"x"']),
    ("GET", "/vms/vm/events?order=up", ..., 400, ["order", '"up"', "desc"]),
    ("GET", "/vms/vm/events?cursor=x", ..., 400, ["cursor", '"x"', "X-Next-Cursor"]),
    ("POST", "/workers", {}, 412, ["name"]),
    ("POST", "/workers", {"name": "w", "resources": {"a": -1}}, 400, ["resources", "-1"]),
    ("POST", "/workers", {"name": "w", "machine_id": "other"}, 409, ["w"]),
    ("PUT", "/workers/w", {"name": "x"}, 412, ["name", '"x"', '"w"']),
    ("PUT", "/workers/w", {"Name": "x"}, 412, ["name", '"x"', '"w"']),
    ("PUT", "/workers/w", {"last_seen": "yesterday"}, 400, ["last_seen", "yesterday"]),
    ("PUT", "/workers/none", {}, 404, ["none"]),
    ("POST", "/service-accounts", {"name": "a", "roles": ["root"]}, 412, ["roles", "root", "compute:read"]),
    ("POST", "/service-accounts", {"name": "a", "roles": "root"}, 400, ["roles", "root"]),
    ("POST", "/service-accounts", {"name": "a", "token": "x\ny"}, 412, ["token"]),
    ("PUT", "/service-accounts/none", {}, 404, ["none"]),
    ("PUT", "/cluster-settings", {"schedulerProfile": "best"}, 400, ["schedulerProfile", "best", "distribute-load"]),
    ("PUT", "/cluster-settings", {"hostDirPolicies": [{"pathPrefix": "a"}]}, 400, ["hostDirPolicies[0].pathPrefix"]),
    ("GET", "/rpc/watch?workerName=w", ..., 426, ["WebSocket"]),
]


@pytest.mark.parametrize(("method", "target", "body", "status", "words"), REFUSED)
async def test_refused_request_names_field_and_value_and_changes_nothing(
    api: Served, method: str, target: str, body: object, status: int, words: list[str]
) -> None:
    await api.register("w")
    await api.create("vm")
    tables, revision = api.state.tables(), api.state.revision
    refusal = await api.call(method, target, body)
    assert refusal.status == status, refusal
    for word in words:
        assert word in refusal.message
    assert (api.state.tables(), api.state.revision) == (tables, revision)


@pytest.mark.parametrize(
    "raw",
    [b"{", b'{"name": NaN}', b'{"name":"a","name":"b"}', b'"\\ud800"', b"[" * 40, b'{"cpu": 1e999}', b"\xff", b"{} {}"],
)
async def test_malformed_json_is_refused_and_changes_nothing(api: Served, raw: bytes) -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            await api.register("w")
            vm = await api.call("POST", "/vms", {"name": "w", "image": "i"})
            revision = api.state.revision
            target = operation.path.replace("{name}", "w")
            if operation.path.startswith("/service-accounts/"):
                await api.call("POST", "/service-accounts", {"name": "w"})
                revision = api.state.revision
            refusal = await api.call(operation.method, target, raw=raw)
            assert refusal.status == 400, (operation, vm)
            assert api.state.revision == revision


def names_warned_of(answered: Answered) -> list[str]:
    """Return the unknown names of a Warning header, each after what it names."""
    warning = answered.headers["warning"]
    assert warning.startswith('299 orchard "')
    assert warning.endswith('"')
    assert warning.isascii()
    assert warning.isprintable()
    assert len(warning) < 4096
    parts = warning[13:-1].split("; ")
    return [part.removeprefix("unknown ") for part in parts if part.startswith("unknown ")]


async def test_unknown_names_of_body_and_query_are_in_a_warning_header(api: Served) -> None:
    body = {"name": "vm", "image": "i", "colour": "s3cret", "startupScript": "s3cret", 'a"\n\\é': "s3cret"}
    answered = await api.call("POST", "/vms?dryRun=s3cret&fieldvalidation=s3cret", body)
    assert answered.status == 200
    assert names_warned_of(answered) == [
        "query parameter dryRun",
        "query parameter fieldvalidation, did you mean fieldValidation?",
        "field colour",
        "field startupScript, did you mean startup_script?",
        'field a\\"\\n\\\\\\u00e9',
    ]
    assert "s3cret" not in answered.headers["warning"]
    whole = await api.call("GET", "/vms/vm?watch=")
    assert "warning" not in whole.headers
    for method in ("PUT", "PATCH"):
        assert "warning" not in (await api.call(method, "/vms/vm", whole.body)).headers, (
            "a client may send all of it back"
        )


async def test_refusal_and_stream_have_the_warning_too(api: Served) -> None:
    refused = await api.call("POST", "/vms", {"name": "vm", "imge": "i"})
    assert (refused.status, names_warned_of(refused)) == (412, ["field imge, did you mean image?"])
    await api.create("vm")
    stream = await api.ask("GET", "/vms/vm?watch=true&since=1")
    assert [name for name, _ in stream.headers] == ["Warning"]


async def test_at_most_eight_unknown_names_are_in_a_warning(api: Served) -> None:
    many = {f"{'x' * 1000}{number}\n": 1 for number in range(500)}
    answered = await api.call("POST", "/vms", {"name": "vm", "image": "i", **many})
    assert len(names_warned_of(answered)) == 8
    assert "; and 492 more" in answered.headers["warning"]


STRICT = [
    ("POST", "/vms?fieldValidation=strict", {"name": "new", "image": "i", "colour": 1}, "field colour"),
    ("POST", "/vms?fieldValidation=strict&colour=1", {"name": "new", "image": "i"}, "query parameter colour"),
    ("PATCH", "/vms/vm?fieldValidation=strict", {"cpu": 3, "colour": 1}, "field colour"),
    ("DELETE", "/vms/vm?fieldValidation=strict&colour=1", ..., "query parameter colour"),
    ("PUT", "/workers/w?fieldValidation=strict", {"scheduling_paused": True, "colour": 1}, "field colour"),
    ("POST", "/service-accounts?fieldValidation=strict", {"name": "a", "colour": 1}, "field colour"),
    ("PUT", "/cluster-settings?fieldValidation=strict", {"colour": 1}, "field colour"),
    ("POST", "/vms/vm/events?fieldValidation=strict", [{"kind": "log_line", "colour": 1}], "field [0].colour"),
]


@pytest.mark.parametrize(("method", "target", "body", "named"), STRICT)
async def test_strict_validation_refuses_unknown_names_and_changes_nothing(
    api: Served, method: str, target: str, body: object, named: str
) -> None:
    await api.register("w")
    await api.create("vm")
    tables, revision = api.state.tables(), api.state.revision
    refused = await api.call(method, target, body)
    assert refused.status == 400
    assert named in refused.message
    assert (api.state.tables(), api.state.revision) == (tables, revision)
    assert await api.ok("GET", "/vms/vm/events") == []


async def test_strict_validation_accepts_what_is_known(api: Served) -> None:
    answered = await api.call("POST", "/vms?fieldValidation=strict", {"name": "vm", "Image": "i"})
    assert (answered.status, answered.body["image"]) == (200, "i")
    assert (await api.call("GET", "/vms?fieldValidation=lax")).status == 400


EMPTY = [
    ("GET", "/vms?filter=&limit="),
    ("GET", "/vms/vm?watch="),
    ("GET", "/vms/vm/events?limit=&order=&cursor="),
    ("GET", "/vms/vm/ip?wait="),
]


@pytest.mark.parametrize(("method", "target"), EMPTY)
async def test_empty_parameter_is_as_good_as_none(
    api: Served, method: str, target: str, autojump_clock: trio.testing.MockClock
) -> None:
    await api.create("vm")
    with_empty = await api.call(method, target)
    without = await api.call(method, target.partition("?")[0])
    assert (with_empty.status, with_empty.body) == (without.status, without.body)
    assert with_empty.status in (200, 503)


def test_long_text_of_a_worker_in_a_parameter_is_cut() -> None:
    text = parameters.read_text(Query(f"errorMessage={'x' * 9000}"), parameters.ERROR_MESSAGE)
    assert (len(text), text[-4:]) == (4096, "x...")


async def test_required_parameter_must_not_be_empty(api: Served) -> None:
    await api.create("vm")
    assert (await api.call("GET", "/vms/vm/port-forward?port=")).status == 400


@pytest.mark.parametrize("value", ["1", "t", "T", "true", "True", "TRUE"])
async def test_flag_is_read_as_go_reads_it(api: Served, value: str) -> None:
    await api.create("vm")
    assert isinstance(await api.ask("GET", f"/vms/vm?watch={value}"), Stream)
    assert (await api.call("GET", "/vms/vm?watch=False")).body["name"] == "vm"
    assert (await api.call("GET", "/vms/vm?watch=tRUE")).status == 400


async def test_without_authentication_every_authorization_header_is_ignored(
    api: Served, autojump_clock: trio.testing.MockClock
) -> None:
    await api.create("vm")
    for credentials in ("Basic bm9uZTp3cm9uZw==", "Bearer t", "Basic !", "x"):
        for operation in OPERATIONS:
            target = operation.path.replace("{name}", "nobody") + ("?port=1" if "port" in operation.path else "")
            answered = await api.call(operation.method, target, authorization=credentials)
            assert answered.status not in (401, 403, 429), (operation.path, credentials)


@pytest.mark.parametrize("guest_os", ["darwin", "linux"])
async def test_resource_that_is_added_to_a_macos_vm_does_not_count_against_the_most(api: Served, guest_os: str) -> None:
    most = {f"r{number}": 1 for number in range(256)}
    vm = await api.create("vm", os=guest_os, resources=most)
    assert vm["resources"].items() - {("org.cirruslabs.tart-vms", 1)} == most.items()
    assert await api.ok("PUT", "/vms/vm", vm) == vm
    too_many = {"name": "new", "image": "i", "os": guest_os, "resources": {**most, "x": 1, "y": 1}}
    refused = await api.call("POST", "/vms", too_many)
    assert (refused.status, "258" in refused.message) == (412, True)


class Steps(trio.abc.Instrument):
    """Measures the longest step of the event loop, in seconds of this thread's CPU: other programs do not count."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._began = time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.thread_time() - self._began)


# Method, path, body (made when its test runs: all of them are megabytes) and status.
LONG: dict[str, tuple[str, str, Callable[[], object], int]] = {
    "290,000 labels": ("POST", "/vms", lambda: {"name": "new", "image": "i", "labels": {str(n): "" for n in range(290_000)}}, 400),
    "300 labels": ("POST", "/vms", lambda: {"name": "new", "image": "i", "labels": {str(n): "" for n in range(300)}}, 412),
    "env": ("POST", "/vms", lambda: {"name": "new", "image": "i", "startup_script": {"env": {f"E{n}": "" for n in range(257)}}}, 412),
    "hostDirs": ("POST", "/vms", lambda: {"name": "new", "image": "i", "hostDirs": [{"name": "a", "path": "/a"}] * 65}, 412),
    "numbers": ("PATCH", "/vms/vm", lambda: {"labels": [1] * 1_300_000}, 400),
    "objects in a patch": ("PATCH", "/vms/vm", lambda: {"labels": {str(n): {str(m): 1 for m in range(300)} for n in range(300)}}, 412),
    "a script": ("POST", "/vms", lambda: {"name": "new", "image": "i", "startup_script": {"script_content": "echo a,b\n" * 400_000}}, 200),
    "events": ("POST", "/vms/vm/events", lambda: [{"kind": "log_line", "payload": "x, y " * 70, "timestamp": 1}] * 10_000, 200),
    "too many events": ("POST", "/vms/vm/events", lambda: [{"kind": "log_line"}] * 10_001, 412),
}  # fmt: skip


# Slow, because fast tests may run with coverage, which multiplies the CPU that is measured.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "target", "body", "status"), LONG.values(), ids=LONG)
async def test_no_body_holds_the_event_loop(
    api: Served, method: str, target: str, body: Callable[[], object], status: int
) -> None:
    await api.create("vm")
    raw = json.dumps(body(), separators=(",", ":")).encode()
    assert len(raw) <= 4 * 1024 * 1024
    steps = Steps()
    # A collection would take as long as all objects of this test run are many.
    gc.disable()
    trio.lowlevel.add_instrument(steps)
    try:
        answer = await api.ask(method, target, raw=raw)
        # The step that is under way is over.
        await trio.lowlevel.checkpoint()
    finally:
        trio.lowlevel.remove_instrument(steps)
        gc.enable()
    assert answer.status == status, answer
    # On the event loop alone, the script would take 0.09 and the events 0.15.
    assert steps.longest < 0.05


async def test_create_vm_and_scheduling_do_not_await(api: Served) -> None:
    request = Request(
        method="POST", target="/v1/vms", headers={}
    )  # fmt: skip
    admitted = api.api.admit(request)
    assert isinstance(admitted, Admitted)
    admitted = replace(admitted, body={"name": "vm", "image": "i"})
    with assert_no_checkpoints():
        create_vm(api.api, request, admitted)
        api.schedule()


# ---- roles ----------------------------------------------------------------------------------------------------------

ROLES_ONLY = [ServiceAccount(name=role.replace(":", "."), token="t", roles=(role,)) for role in auth.ROLES]
NO_ROLES = ServiceAccount(name="none", token="t")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: f"{op.method} {op.path}")
async def test_every_operation_requires_exactly_its_role(tmp_path: Path, operation: APIOperation) -> None:
    target = operation.path.replace("{name}", "nobody")
    async with served(tmp_path, NO_ROLES, *ROLES_ONLY) as api:
        for credentials in (None, "Basic bm9uZTp3cm9uZw==", "Basic bm9ib2R5OnQ=", "Bearer t", "Basic !", "x"):
            answered = await api.call(operation.method, target, raw=b"{", authorization=credentials)
            if operation.role == "public":
                assert answered.status == 200
            else:
                assert answered.status == 401, credentials
                assert answered.headers["www-authenticate"] == 'Basic realm="orchard"'
        for account in (NO_ROLES, *ROLES_ONLY):
            answered = await api.call(operation.method, target, raw=b"{", account=(account.name, "t"))
            implied = operation.role == "compute:connect" and account.roles == ("compute:write",)
            may = operation.role in (None, "public", *account.roles) or implied
            assert (answered.status == 403) is not may, account
            if not may:
                assert f'"{operation.role}"' in answered.message


def test_roles_of_all_operations() -> None:
    operations: dict[str | None, set[str]] = {
        "public": {"GET /openapi.json", "GET /health"},
        None: {"GET /", "GET /controller/info"},
        "compute:read": {
            *("GET /workers", "GET /workers/{name}", "GET /vms", "GET /vms/{name}", "GET /vms/{name}/events"),
            *("GET /watch", "GET /history", "GET /capacity", "GET /metrics"),
        },
        "compute:write": {
            *("POST /vms", "DELETE /vms", "POST /vms/{name}/restart"),
            *("POST /workers/{name}/drain", "DELETE /workers/{name}/drain"),
            *("PUT /vms/{name}", "PATCH /vms/{name}", "DELETE /vms/{name}", "PUT /vms/{name}/state"),
            *("POST /vms/{name}/events", "POST /workers", "PUT /workers/{name}", "DELETE /workers/{name}"),
            *("POST /vms/{name}/access-tokens", "GET /rpc/port-forward", "POST /rpc/resolve-ip"),
            *("GET /rpc/watch", "POST /rpc/goodbye"),
        },
        "compute:connect": {"GET /vms/{name}/port-forward", "GET /vms/{name}/ip", "GET /vms/{name}/exec"},
        "admin:read": {
            "GET /controller/sessions",
            "GET /service-accounts",
            "GET /service-accounts/{name}",
            "GET /cluster-settings",
        },
        "admin:write": {
            *("POST /service-accounts", "PUT /service-accounts/{name}", "PATCH /service-accounts/{name}"),
            "DELETE /service-accounts/{name}",
            *("PUT /cluster-settings", "GET /workers/{name}/port-forward", "POST /controller/accept-state"),
        },
    }
    expected = {operation: role for role, listed in operations.items() for operation in listed}
    assert {f"{op.method} {op.path}": op.role for op in OPERATIONS} == expected


def test_compute_write_allows_connecting_to_vms() -> None:
    auth.require(ServiceAccount(name="a", roles=("compute:write",)), "compute:connect")


# ---- the OpenAPI document -------------------------------------------------------------------------------------------


async def test_controller_info_has_version_and_capabilities(api: Served) -> None:
    info = await api.ok("GET", "/controller/info")
    assert {"rpc-v2", "vm-state-endpoint", "worker-state", "field-validation"} <= set(info.pop("capabilities"))
    assert info == {"version": __version__, "commit": "", "roles": [*auth.ROLES]}
    assert await api.ok("GET", "/") is None


@pytest.mark.slow
async def test_openapi_document_is_valid_and_complete(api: Served) -> None:
    from openapi_spec_validator import validate

    document = await api.ok("GET", "/openapi.json")
    validate(document)
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item} - {
        ("PARAMETERS", path) for path in document["paths"]
    }
    assert described == {(op.method, op.path) for op in OPERATIONS}


# ---- errors of the layers below -------------------------------------------------------------------------------------

# Modules whose errors end a start, a worker, a client or a connection, and errors that the store maps to its own.
OTHER_MODULES = (
    "base.",
    "cli.",
    "client",
    "control.settings",
    "control.store_copy",
    "control.stored_data",
    "controller",
    "etcd_nodes",
    "methods.",
    "net.",
    "ssh.jump",
    "tart",
    "vm.",
    "work.",
    "worker",
)
OTHER_ERRORS = {"DamagedError", "NotWrittenError", "BrokenError", "BrokenFileError"}
OTHER_ERRORS |= {
    "DamagedKeyError",
    "LeadershipLostError",
    "EtcdUnavailableError",
    "EtcdRefusedError",
    "EtcdAnswerTooLargeError",
}


def error_classes() -> list[type[Exception]]:
    """Return the exception classes that the package defines below the API, without their common bases."""
    values = []
    for info in pkgutil.walk_packages(orchard.__path__, "orchard."):
        name = info.name.removeprefix("orchard.")
        if not name.startswith(OTHER_MODULES) and name != "__main__":
            values += [(value, info.name) for value in vars(importlib.import_module(info.name)).values()]
    found = [
        value
        for value, module in values
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module
    ]
    return [error for error in found if not error.__subclasses__() and error.__name__ not in OTHER_ERRORS]


def test_every_error_of_the_layers_below_has_a_status() -> None:
    errors = error_classes()
    assert len(errors) > 10
    assert [error for error in errors if not issubclass(error, tuple(ERROR_STATUS))] == []
    assert set(ERROR_STATUS.values()) <= PROBLEMS.keys(), "the OpenAPI document describes each status"


def test_errors_become_answers_with_their_status_message_and_headers() -> None:
    unauthenticated = http_error(auth.UnauthenticatedError("who?"))
    assert (unauthenticated.status, unauthenticated.message) == (401, "who?")
    assert unauthenticated.headers == (("WWW-Authenticate", 'Basic realm="orchard"'),)
    assert http_error(TooManyFailuresError("wait", retry_after=7)).headers == (("Retry-After", "7"),)
    assert http_error(InvalidError("no")).headers == ()


# ---- durability of what an answer is based on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (("DELETE", "/vms/there"), ("DELETE", "/vms/there"), 404),
        (("DELETE", "/vms/there"), ("GET", "/vms/there"), 404),
        (("POST", "/vms", {"name": "new", "image": "i"}), ("POST", "/vms", {"name": "new", "image": "i"}), 409),
    ],
)
async def test_refusal_waits_until_its_reason_is_durable(
    tmp_path: Path, first: tuple[Any, ...], second: tuple[Any, ...], status: int
) -> None:
    disk = HeldDisk()
    async with served(tmp_path, disk=disk) as api:
        await api.create("there")
        answers: list[int] = []

        async def call(*request: Any) -> None:
            answers.append((await api.call(*request)).status)

        async with trio.open_nursery() as nursery:
            with disk.held():
                nursery.start_soon(lambda: call(*first))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(lambda: call(*second))
                await trio.testing.wait_all_tasks_blocked()
                assert answers == [], "a crash now would take back what was refused for it"
        assert sorted(answers) == [200, status]
