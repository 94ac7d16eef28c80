"""Which proxy of the environment leads to a server, and connections through a real proxy on a socket."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from harness.processes import free_port

from orchard.client import Client, ConnectError
from orchard.net import tcp
from orchard.net.proxies import connector
from orchard.net.urls import Proxy
from orchard.testing import cluster

PROXY = {"HTTPS_PROXY": "http://proxy:3128"}


@pytest.mark.parametrize(
    ("is_tls", "host", "environ", "expected"),
    [
        (True, "c.example.com", {}, None),
        (True, "c.example.com", PROXY, Proxy("proxy", 3128)),
        (True, "c.example.com", {"https_proxy": "other:1", **PROXY}, Proxy("other", 1)),
        (True, "c.example.com", {"HTTPS_PROXY": "http://[::1]"}, Proxy("::1", 80)),
        (True, "c.example.com", {"HTTPS_PROXY": " "}, None),
        (True, "c.example.com", {"HTTPS": "http://proxy:3128"}, None),
        (True, "c.example.com", {"HTTP_PROXY": "http://proxy:3128"}, None),
        (False, "c.example.com", {"HTTP_PROXY": "http://proxy:3128"}, Proxy("proxy", 3128)),
        (False, "c.example.com", PROXY, None),
        # Loopback addresses, with any NO_PROXY.
        (True, "localhost", PROXY, None),
        (True, "127.0.0.9", PROXY, None),
        (True, "::1", PROXY, None),
        (True, "c.example.com", {**PROXY, "NO_PROXY": "example.com"}, None),
        (True, "c.example.com", {**PROXY, "no_proxy": "a, .example.com"}, None),
        (True, "c.example.com", {**PROXY, "NO_PROXY": "*"}, None),
        (True, "notexample.com", {**PROXY, "NO_PROXY": "example.com"}, Proxy("proxy", 3128)),
        (True, "10.1.2.3", {**PROXY, "NO_PROXY": "example.com,10.0.0.0/8"}, None),
        (True, "11.1.2.3", {**PROXY, "NO_PROXY": "10.0.0.0/8"}, Proxy("proxy", 3128)),
        (True, "fd00::1", {**PROXY, "NO_PROXY": "fd00::/8"}, None),
    ],
)
def test_proxy_of_the_environment(is_tls: bool, host: str, environ: dict[str, str], expected: Proxy | None) -> None:
    connect = connector(is_tls, host, environ)
    if expected is None:
        assert connect is tcp.connect
    else:
        assert connect.args == (expected,)  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["socks5://proxy:1080", "http://proxy:x", "http://:3128", "https://proxy"])
def test_proxy_that_cannot_be_used_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    with pytest.raises(ValueError, match="HTTPS_PROXY"):
        Client("https://c.example.com")
    Client("https://localhost")


def test_credentials_of_a_proxy_are_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:s3cret@proxy:x")
    with pytest.raises(ValueError, match="HTTPS_PROXY") as refusal:
        Client("https://c.example.com")
    assert "s3cret" not in str(refusal.value)
    assert "Basic" not in repr(Proxy("proxy", 1, "Basic czNjcmV0"))


class ConnectProxy:
    """A proxy on a real socket that leads every CONNECT to one port of this host, or answers with `refusal`."""

    def __init__(self, port: int = 0, refusal: bytes = b"") -> None:
        self._port = port
        self._refusal = refusal
        self.heads: list[bytes] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(1000)
        self.heads.append(head)
        if self._refusal:
            await stream.send_all(self._refusal)
            return
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as server:
            await stream.send_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, stream, server)
                await copy(server, stream)
                nursery.cancel_scope.cancel()


async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
    try:
        async for data in source:
            await target.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


@asynccontextmanager
async def running(proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Run a proxy for the time of the block, and name it in the environment."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, proxy.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        for variable in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, f"http://user:p%40ss@127.0.0.1:{port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        yield
        nursery.cancel_scope.cancel()


async def test_requests_and_websockets_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(workers=1, auth=True) as c:
        await c.client.vms.create(name="vm", image="any", startup_script={"script_content": "echo hi"})
        await c.client.vms.wait("vm")
        proxy = ConnectProxy(int(c.url.rpartition(":")[2]))
        async with (
            running(proxy, monkeypatch),
            Client("http://controller.example:6120", account=c.account, token=c.token) as client,
        ):
            assert [vm.name for vm in await client.vms.list()] == ["vm"]
            await client.workers.register({"name": "worker-2"})
            async with client.rpc_watch("worker-2"):
                pass
            async with client.vms.watch("vm") as changes:
                assert (await anext(changes))[0] == "ADDED"
    pair = base64.b64encode(b"user:p@ss")
    for head in proxy.heads:
        assert head.startswith(b"CONNECT controller.example:6120 HTTP/1.1\r\n")
        assert b"Basic " + pair in head
        assert c.token.encode() not in head
    assert len(proxy.heads) >= 2


@pytest.mark.parametrize(
    ("refusal", "named"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "407"),
        (b"SSH-2.0-x\r\n\r\n", "CONNECT"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "HTTP proxy"),
    ],
)
async def test_refusal_names_the_proxy(refusal: bytes, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(ConnectProxy(refusal=refusal), monkeypatch), Client("https://controller.example") as client:
        with pytest.raises(ConnectError, match=named) as failure:
            await client.vms.list()
    assert "the proxy 127.0.0.1:" in str(failure.value)
    assert "p@ss" not in str(failure.value)


async def test_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
    async with Client("https://controller.example") as client:
        with pytest.raises(ConnectError, match=f"the proxy 127.0.0.1:{port}"):
            await client.vms.list()
