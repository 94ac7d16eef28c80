"""Servers that answer a client with bytes from a script, over real sockets: `scripted` for requests, `upgrading` for WebSockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from orchard.client import Client
from orchard.net import wsframes

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


def answer(status: str, body: bytes) -> bytes:
    """Return a whole answer, for example of status "404 Not Found"."""
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def switched(accept: str, rest: bytes = b"") -> bytes:
    """Return the answer that opens a WebSocket, and the bytes that follow it at once."""
    return SWITCHING + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode() + rest


class Script:
    """A server that answers the N-th request on the M-th connection with bytes from a script, then closes or waits."""

    def __init__(self, *connections: list[bytes]) -> None:
        self._connections = list(connections)
        self.requests: list[bytes] = []
        self.opened = 0
        # Set when a client has closed its connection before the end of the script.
        self.left = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        answers = self._connections[self.opened]
        self.opened += 1
        for each in answers:
            request = await self._request(stream)
            if request is None:
                self.left.set()
                return
            self.requests.append(request)
            await stream.send_all(each)

    async def _request(self, stream: trio.SocketStream) -> bytes | None:
        data = b""
        while b"\r\n\r\n" not in data:
            more = await stream.receive_some(1000)
            if not more:
                return None
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += await stream.receive_some(1000)
        return head + b"\r\n\r\n" + body


@asynccontextmanager
async def scripted(*connections: list[bytes], **options: Any) -> AsyncIterator[tuple[Client, Script]]:
    """Yield a client of a `Script`, and the script. `options` are the client's."""
    script = Script(*connections)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, script.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        async with Client(f"http://localhost:{port}", **options) as client:
            yield client, script
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def upgrading(make_answer: Callable[[str], bytes], **options: Any) -> AsyncIterator[tuple[Client, list[str]]]:
    """Yield a client of a server that answers one request each, and the list of their heads.

    `make_answer` gets the correct Sec-WebSocket-Accept. After its answer the server only reads.
    """
    heads: list[str] = []

    async def serve(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(1000)
        heads.append(head.decode())
        (key,) = (line[19:] for line in head.decode().split("\r\n") if line.startswith("Sec-WebSocket-Key: "))
        await stream.send_all(make_answer(wsframes.accept_value(key)))
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some(1000):
                pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        url = f"http://localhost:{listeners[0].socket.getsockname()[1]}"
        async with Client(url, account="a", token="t", **options) as client:
            yield client, heads
        nursery.cancel_scope.cancel()
