"""Clients that are independent of the product, helpers for them, and the servers in VMs that they talk to.

HTTP is spoken by the standard library (`connect_http`, `call`), WebSockets by `websockets` (`connect_websocket`, for a
thread). Neither shares code with the product, so a mistake of the product's client and server cannot hide itself.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
import trio
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus

from harness.processes import GENEROUS, ORCHARD, at_last, eventually, finished
from orchard.auth import BootstrapToken
from orchard.client import Client
from orchard.schema import TART_VMS, VM
from orchard.testing import Cluster, cluster

SocketHandler = Callable[[trio.SocketStream], Any]

# The environment of a controller whose account bootstrap-admin has a known token; `admin_client` uses it.
ADMIN_ENV = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "admin-token"}

# ---- HTTP ----------------------------------------------------------------------------------------------------------


def connect_http(url: str, context: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
    """Open a connection that can send several requests; the caller closes it."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = (
        http.client.HTTPConnection(parts.hostname, parts.port, timeout=GENEROUS)
        if context is None
        else http.client.HTTPSConnection(parts.hostname, parts.port, timeout=GENEROUS, context=context)
    )
    connection.connect()
    return connection


def call(
    url: str, method: str, path: str, body: object = None, *, token: str = "", context: ssl.SSLContext | None = None
) -> tuple[int, Any]:
    """Send one request, as bootstrap-admin if `token` is given; return the status and the parsed body."""
    headers = {}
    if token:
        headers["Authorization"] = "Basic " + base64.b64encode(f"bootstrap-admin:{token}".encode()).decode()
    connection = connect_http(url, context)
    try:
        target = urlsplit(url).path + path
        connection.request(method, target, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(text) if text else None


@contextmanager
def connected_worker(url: str, name: str, **fields: object) -> Iterator[None]:
    """Register a worker that does nothing, and keep its watch open for the time of the block, so that it gets VMs."""
    body = {"name": name, "machine_id": "m", "resources": {TART_VMS: 2}, **fields}
    assert call(url, "POST", "/v1/workers", body)[0] == 200
    with websockets.sync.client.connect(f"{url.replace('http', 'ws', 1)}/v1/rpc/watch?workerName={name}"):
        at_last(lambda: _is_online(url, name))
        yield


def _is_online(url: str, name: str) -> bool:
    """Poll as a worker, and return whether it counts as online: its open watch may be noticed after its first poll."""
    call(url, "GET", f"/v1/vms?filter=worker={name}")
    return bool(call(url, "GET", f"/v1/workers/{name}")[1]["state"] == "online")


# ---- WebSockets ----------------------------------------------------------------------------------------------------


def websocket_url(c: Cluster, path: str, **query: object) -> str:
    return f"{c.url.replace('http', 'ws', 1)}/v1{path}?{urlencode(query)}"


def connect_websocket(url: str) -> websockets.sync.client.ClientConnection:
    """Open a WebSocket, for a thread. Messages that arrive while it sends are kept."""
    return websockets.sync.client.connect(url, max_size=None, max_queue=None, compression=None)


def read_until_closed(client: websockets.sync.client.ClientConnection) -> tuple[int, int, str]:
    """Read to the end; return the number of bytes, the close code (0: none) and the reason."""
    size = 0
    try:
        while True:
            size += len(client.recv())
    except ConnectionClosed as closed:
        return (size, closed.rcvd.code, closed.rcvd.reason) if closed.rcvd is not None else (size, 0, "")


async def refusal(c: Cluster, path: str, **query: object) -> tuple[int, str]:
    """Return the status and the message of a WebSocket that is refused."""

    def attempt() -> tuple[int, str]:
        with pytest.raises(InvalidStatus) as refused:
            connect_websocket(websocket_url(c, path, **query))
        response = refused.value.response
        assert response.body is not None
        return response.status_code, json.loads(response.body)["message"]

    return await trio.to_thread.run_sync(attempt)


# ---- the product's client, over TLS --------------------------------------------------------------------------------


@asynccontextmanager
async def admin_client(url: str, home: Path) -> AsyncIterator[Client]:
    """Yield a client of a controller that was started with ADMIN_ENV and keeps its data below `home`."""
    certificate = (home / ORCHARD / "controller" / "controller.crt").read_bytes()
    async with Client(url, account="bootstrap-admin", token="admin-token", certificate=certificate) as client:
        yield client


async def make_bootstrap_token(client: Client, home: Path) -> str:
    """Create an account for workers; return a bootstrap token for it, made by the command for that."""
    await client.service_accounts.create("workers", roles=["compute:read", "compute:write"])
    made = finished("", "bootstrap-token", "workers", home=home)
    assert made.returncode == 0, made.stderr
    token = BootstrapToken.parse(made.stdout)
    assert token.certificate is not None
    return made.stdout.strip()


async def wait_workers(client: Client, count: int) -> None:
    """Wait until exactly `count` workers are registered."""

    async def there() -> bool:
        return len(await client.workers.list()) == count

    await eventually(there)


# ---- servers in VMs ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(handler: SocketHandler) -> AsyncIterator[int]:
    """Serve TCP on 127.0.0.1, the address of every synthetic VM; yield the port."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


@asynccontextmanager
async def running_vm(**options: Any) -> AsyncIterator[Cluster]:
    """Yield a cluster with a running VM "vm"; `options` are those of `cluster`."""
    async with cluster(**options) as c:
        await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")
        yield c


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"the stream ended after {len(data)} of {size} bytes"
        data += more
    return bytes(data)


async def wait_vm(client: Client, name: str, holds: Callable[[VM], bool]) -> VM:
    """Follow a VM until a condition holds, and return it."""
    with trio.fail_after(GENEROUS):
        async with client.vms.watch(name) as changes:
            async for _, vm in changes:
                if holds(vm):
                    return vm
    raise AssertionError("the watch ended")
