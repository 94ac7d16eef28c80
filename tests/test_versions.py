"""Upgrades and rollbacks: states of earlier versions are read, and controllers and workers of two versions work together.

`recorded/` has what earlier versions wrote and sent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.inprocess import InProcessCluster
from harness.processes import eventually
from harness.served import Served, served

from orchard.base.files import STATE_FILE
from orchard.client import Client
from orchard.control.stored_data import ensure_identity
from orchard.handlers import admin
from orchard.net.transport import ClientResponse, Transport
from orchard.schema import TART_VMS, WORKER_NAME_LABEL, Condition
from orchard.storage.state_file import STATE_VERSION
from orchard.work import heartbeat

RECORDED = Path(__file__).parent / "recorded"
BEFORE: Mapping[str, Any] = json.loads((RECORDED / "state-v2-requests.json").read_text())


# ---- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
async def test_state_of_an_earlier_version_is_read_and_replaced(tmp_path: Path, version: int) -> None:
    path = tmp_path / STATE_FILE
    shutil.copy(RECORDED / f"state-v{version}.jsonl", path)
    path.chmod(0o600)
    before = path.read_bytes()
    added = {WORKER_NAME_LABEL: "mac"} if version > 2 else {}
    # A second start reads what the first one has written.
    for _ in range(2):
        async with served(tmp_path) as api:
            ensure_identity(api.store)
            settings = await api.ok("GET", "/cluster-settings")
            assert settings["hostDirPolicies"] == [{"pathPrefix": "/srv", "ro": True}]
            assert settings["schedulerProfile"] == "distribute-load"
            worker = await api.ok("GET", "/workers/mac")
            assert (worker["labels"], worker["resources"]) == ({"zone": "a", **added}, {TART_VMS: 2})
            job, other = await api.ok("GET", "/vms/job"), await api.ok("GET", "/vms/other")
            assert (job["image"], job["restart_policy"]) == ("ghcr.io/org/macos:1", "OnFailure")
            assert job["startup_script"] == {"script_content": "echo hello", "env": {"A": "1"}}
            assert (other["labels"], other["headless"], other["status"]) == ({"zone": "b"}, True, "pending")
            # Numbers of generations stay, so that no worker reboots its VMs.
            first = {1: 1}.get(version, 0)
            assert (job.get("generation", 0), other["generation"]) == (first, first + 1)
            assert not {"ttlSeconds", "expiresAt", "metadata", "priority"} & job.keys()
    assert path.read_bytes() != before
    assert json.loads(path.read_bytes().splitlines()[0])["version"] == STATE_VERSION
    assert not list(tmp_path.glob("*.new"))


# ---- a worker of the version before ---------------------------------------------------------------------------------


class Replay:
    """Sends the recorded requests of a worker of the version before."""

    def __init__(self, api: Served) -> None:
        self._api = api
        self.vms: dict[str, Any] = {}

    async def call(self, method: str, target: str, body: object = ...) -> Any:
        """Send a request, which must succeed without a warning."""
        answered = await self._api.call(method, target, body, agent=BEFORE["user_agent"])
        assert (answered.status, answered.headers.get("warning")) == (200, None)
        return answered.body

    async def poll(self) -> list[Any]:
        """Return the VMs of the worker, which refuses conditions that it does not know."""
        vms: list[Any] = await self.call("GET", "/vms?filter=worker=mac")
        for vm in vms:
            assert {condition["type"] for condition in vm["conditions"]} <= set(BEFORE["condition_types"])
            self.vms[vm["name"]] = vm
        return vms

    async def send(self, *paths: str) -> None:
        """Send the recorded requests to some paths, in order, about the VMs that were polled last."""
        for request in BEFORE["requests"]:
            if request["path"] in paths:
                await self._send_one(request)

    async def _send_one(self, request: Mapping[str, Any]) -> None:
        target, query, body = request["path"], dict(request["query"]), request["body"]
        if target.startswith("/vms/"):
            vm = self.vms[target.split("/")[2]]
            if "uid" in query:
                query["uid"] = vm["uid"]
            else:
                body = {**body, "uid": vm["uid"], "restart_count": vm.get("restart_count", 0)}
        text = "&".join(f"{name}={value}" for name, value in query.items())
        await self.call(request["method"], f"{target}?{text}" if text else target, ... if body is None else body)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as api:
        yield api


async def test_worker_of_the_version_before_runs_vms_and_reports_no_facts(api: Served) -> None:
    worker = Replay(api)
    await worker.call("GET", "/controller/info")
    await worker.poll()
    await worker.send("/workers")
    api.open_watch("mac")
    await worker.send("/workers/mac")
    shown = await worker.call("GET", "/workers/mac")
    assert shown["state"] == "online"
    assert not {"disk", "versions", "images", "pulling"} & shown.keys()
    assert shown["labels"] == {WORKER_NAME_LABEL: "mac"}
    for name in ("job", "bad"):
        await api.create(name, startup_script={"script_content": "echo hello"})
    api.schedule()
    assert {vm["name"] for vm in await worker.poll()} == {"job", "bad"}
    await worker.send("/vms/job/state", "/vms/job/events", "/vms/bad/state")
    job, bad = await api.ok("GET", "/vms/job"), await api.ok("GET", "/vms/bad")
    assert (job["status"], bad["status"]) == ("running", "failed")
    assert [event["payload"] for event in await api.ok("GET", "/vms/job/events")] == ["hello"]
    await worker.send("/rpc/goodbye")
    assert (await api.ok("GET", "/workers/mac"))["state"] == "offline"


async def test_worker_that_was_rolled_back_can_read_vms_that_were_ready(api: Served) -> None:
    """The next version has reported a condition that the version before refuses, with the whole answer."""
    await api.register("mac")
    await api.create("job")
    api.schedule()
    vm = api.state.vms["job"]
    conditions = (*vm.state.conditions, Condition("ready", "true"))
    with api.store.transaction() as tx:
        tx.put(replace(vm, state=replace(vm.state, status="running", conditions=conditions)))
    assert len(await Replay(api).poll()) == 1
    newer = await api.ok("GET", "/vms?filter=worker=mac")
    assert {"type": "ready", "state": "true"} in newer[0]["conditions"]


# ---- a controller of the version before -----------------------------------------------------------------------------

Sent = list[tuple[str, str, Mapping[str, str], Any]]


def beats_in(sent: Sent) -> Sent:
    return [one for one in sent if one[:2] == ("PUT", "/workers/mac")]


async def test_worker_sends_a_controller_of_the_version_before_nothing_that_it_does_not_know(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller is this one, but says that it can do what the version before can."""
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "_LEAST_PAUSE", 0.02)
    monkeypatch.setattr(admin, "_CAPABILITIES", tuple(BEFORE["info"]["capabilities"]))
    sent: Sent = []
    request = Transport.request

    async def record(self: Client, method: str, path: str, **options: Any) -> ClientResponse:
        sent.append((method, path, options.get("query") or {}, options.get("json")))
        return await request(self, method, path, **options)

    cluster = InProcessCluster(tmp_path, nursery)
    await cluster.start()
    await cluster.client.cluster_settings.put({"prepull": [{"image": "example.com/image:1"}]})
    monkeypatch.setattr(Transport, "request", record)
    async with cluster.working():
        for name, script in (("job", "echo hello"), ("bad", "exit 3")):
            await cluster.client.vms.create(name=name, image="any", startup_script={"script_content": script})
        await cluster.wait_vm("bad", lambda vm: vm.state.status == "failed")
        await cluster.wait_vm("job", lambda vm: vm.state.status == "running")
        beats = len(beats_in(sent))
        await eventually(lambda: len(beats_in(sent)) > beats + 3)
        await cluster.client.vms.delete("job")
    assert await cluster.driver().list_images() != []
    assert "example.com/image:1" not in {image.name for image in await cluster.driver().list_images()}
    await cluster.stop()
    for method, path, query, body in sent:
        if "mac" in path or path.endswith("/state") or (method, path) == ("POST", "/workers"):
            assert query.keys() <= set(BEFORE["queries"]), path
        if path.startswith("/workers") and method != "GET":
            assert body.keys() <= set(BEFORE["worker_fields"]), path
        if path.endswith("/state"):
            assert body.keys() <= set(BEFORE["report_fields"]), path
            assert {condition["type"] for condition in body["conditions"]} <= set(BEFORE["condition_types"])
