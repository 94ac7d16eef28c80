"""Nothing leaves a controller that may not lead any more: it stops between reading the state and answering.

The lease of the engine is a time of a virtual clock. The test lets the clock pass it where the process could be stopped.
Each test also runs without the check (`checked` false), to show that the attack then succeeds.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio
from harness.clients import connect_http
from trio_websocket import ConnectionClosed

from orchard.api import API
from orchard.auth import UnauthenticatedError
from orchard.client import Client, ClientError
from orchard.controller import ControllerSettings, Running, run
from orchard.decisions.gate import Gate
from orchard.net.urls import NOT_SERVING, basic_header
from orchard.net.websocket import TunnelStream
from orchard.schema import TART_VMS
from orchard.storage.file_engine import FileEngine
from orchard.store import Store
from orchard.tunnel import PendingRequest, Rendezvous, WorkerEnd

TOKEN = "a-token-of-the-tests"
LEASE_SECONDS = 9
Clock = trio.testing.MockClock


@dataclass
class Lease:
    """The lease of a controller. `stops_next`: the process stops for longer than it at the next place."""

    clock: Clock
    stops_next: bool = False

    def leads(self) -> bool:
        return self.clock.current_time() < LEASE_SECONDS

    def pass_place(self) -> None:
        if self.stops_next:
            self.stops_next = False
            self.clock.jump(LEASE_SECONDS)


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the controller checks that it leads. Without the check, each attack has to succeed."""
    if not request.param:
        monkeypatch.setattr(API, "refuse_all", lambda _: None)
        monkeypatch.setattr(Store, "may_answer", lambda _: True)
    return bool(request.param)


@pytest.fixture
def lease(mock_clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Lease:
    lease = Lease(mock_clock)
    wait_durable, identify = Store.wait_durable, Gate.identify

    async def stop_before(store: Store) -> None:
        lease.pass_place()
        await wait_durable(store)

    def stop_after(gate: Gate, authorization: str | None, *, bearer: bool = False) -> object:
        try:
            return identify(gate, authorization, bearer=bearer)
        except UnauthenticatedError:
            lease.pass_place()
            raise

    monkeypatch.setattr(FileEngine, "leads", lambda _: lease.leads())
    monkeypatch.setattr(Store, "wait_durable", stop_before)
    monkeypatch.setattr(Gate, "identify", stop_after)
    return lease


@asynccontextmanager
async def controller(directory: Path) -> AsyncIterator[tuple[Running, Client]]:
    """Run a controller that has a VM and a worker, and yield a client of it."""
    settings = ControllerSettings(data_dir=directory, host="127.0.0.1", port=0, tls=False, admin_token=TOKEN)
    async with trio.open_nursery() as nursery:
        running = await nursery.start(run, settings)
        async with Client(running.url, account="bootstrap-admin", token=TOKEN) as client:
            await client.vms.create(name="vm", image="i")
            await client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 2}})
            yield running, client
        nursery.cancel_scope.cancel()


# Method, path, body, the token, and the status while the controller leads.
REQUESTS = {
    "list": ("GET", "/vms", None, TOKEN, 200),
    "missing": ("GET", "/vms/none", None, TOKEN, 404),
    "creation": ("POST", "/vms", {"name": "new", "image": "i"}, TOKEN, 200),
    "conflict": ("POST", "/vms", {"name": "vm", "image": "i"}, TOKEN, 409),
    "heartbeat": ("PUT", "/workers/mac", {"name": "mac", "last_seen": "2026-01-31T12:00:00Z"}, TOKEN, 200),
    "wrong credentials": ("GET", "/vms", None, "wrong", 401),
    "events": ("GET", "/vms/vm/events", None, TOKEN, 200),
    "watch": ("GET", "/watch", None, TOKEN, 200),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_no_answer_leaves_after_the_lease(name: str, checked: bool, lease: Lease, tmp_path: Path) -> None:
    method, path, body, token, status = REQUESTS[name]
    raw = None if body is None else json.dumps(body)
    headers = {"Authorization": basic_header("bootstrap-admin", token)}

    def ask(url: str) -> tuple[int, dict[str, str], bool]:
        connection = connect_http(url)
        connection.request(method, f"/v1{path}", raw, headers)
        answer = connection.getresponse()
        if answer.status == 503:
            assert json.loads(answer.read())["role"] == "standby"
        found = answer.status, dict(answer.headers), answer.will_close
        connection.close()
        return found

    async with controller(tmp_path) as (running, _):
        lease.stops_next = True
        got, headers_got, will_close = await trio.to_thread.run_sync(ask, running.url)
    assert not lease.leads()
    if not checked:
        assert got == status
        return
    assert (got, headers_got["Retry-After"], headers_got[NOT_SERVING[0]], will_close) == (503, "1", "standby", True)


@pytest.mark.parametrize("name", ["list", "creation", "heartbeat"])
async def test_request_that_waited_in_a_socket_is_not_answered_after_the_lease(
    name: str, checked: bool, lease: Lease, tmp_path: Path
) -> None:
    """The process is stopped for longer than its lease while a request is in the socket of a connection in use."""
    method, path, body, token, status = REQUESTS[name]
    wanted = status if not checked else 503
    async with controller(tmp_path) as (running, _):
        address = urlsplit(running.url)
        stream = await trio.open_tcp_stream(str(address.hostname), int(str(address.port)))
        await stream.send_all(raw_request("GET", "/controller/info", None, token))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        # The controller's task does not run in between.
        os.write(stream.socket.fileno(), raw_request(method, path, body, token))
        lease.clock.jump(LEASE_SECONDS)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 %d " % wanted)
        await stream.aclose()


def raw_request(method: str, path: str, body: object, token: str) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    credentials = basic_header("bootstrap-admin", token)
    head = (
        f"{method} /v1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {credentials}\r\nContent-Length: {len(text)}"
    )
    return head.encode() + b"\r\n\r\n" + text


async def test_no_line_of_a_watch_leaves_after_the_lease(checked: bool, lease: Lease, tmp_path: Path) -> None:
    async with controller(tmp_path) as (_, client), client.stream("/watch", {"kinds": "vms"}) as pieces:
        while b"BOOKMARK" not in await anext(pieces):
            pass
        lease.stops_next = True
        if checked:
            with pytest.raises(ClientError):
                await client.vms.create(name="later", image="i")
            with pytest.raises(ClientError):
                await anext(pieces)
        else:
            await client.vms.create(name="later", image="i")
            assert b"later" in await anext(pieces)


async def test_no_message_to_a_worker_leaves_after_the_lease(checked: bool, lease: Lease, tmp_path: Path) -> None:
    async with controller(tmp_path) as (_, client), trio.open_nursery() as nursery:
        async with client.rpc_watch("mac") as actions:
            assert "syncVMsAction" in await anext(actions)
            lease.clock.jump(LEASE_SECONDS)
            nursery.start_soon(reach, client)
            if checked:
                with pytest.raises(ConnectionClosed):
                    await anext(actions)
            else:
                assert "portForwardAction" in await anext(actions)
        nursery.cancel_scope.cancel()


async def test_no_tunnel_is_joined_after_the_lease(checked: bool, lease: Lease) -> None:
    """The worker has been answered, and the process stops before its WebSocket is lent to the client's task."""
    rendezvous = Rendezvous(may_answer=lease.leads if checked else lambda: True)
    request = PendingRequest[WorkerEnd]("mac", "portForwardAction", "uid", port=22)
    lease.clock.jump(LEASE_SECONDS)
    stream = TunnelStream(trio.testing.memory_stream_pair()[0], client=False, early=b"", ping_interval=60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rendezvous.lend, request, stream)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.CancelScope() as asking:
        asking.cancel()
        await request.wait_answered()
    assert asking.cancelled_caught or not checked


async def reach(client: Client) -> None:
    with suppress(ClientError):
        async with client.workers.port_forward("mac", 22):
            pass
