"""Receivers of webhooks: real ones over TCP or TLS, in memory, and hostile ones."""

from __future__ import annotations

import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h11
import trio
import trio.testing

from harness.processes import GENEROUS

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Received:
    """A request as it arrived."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> str:
        return str(self.json["event"])

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """Takes requests, and answers each with `answer`: bytes, or a function that does what it likes with the stream."""

    answer: bytes | Callable[[trio.abc.Stream], Awaitable[None]] = OK
    received: list[Received] = field(default_factory=list)
    # The most requests that were there at once.
    most: int = 0
    _present: int = 0
    _arrived: trio.Condition = field(default_factory=trio.Condition)

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Take one request of a connection, and close it."""
        self._present += 1
        self.most = max(self.most, self._present)
        try:
            async with stream:
                request = await self._read(stream)
                if request is None:
                    return
                async with self._arrived:
                    self.received.append(request)
                    self._arrived.notify_all()
                if callable(self.answer):
                    await self.answer(stream)
                else:
                    await stream.send_all(self.answer)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            # The sender has had enough.
            pass
        finally:
            self._present -= 1

    async def _read(self, stream: trio.abc.Stream) -> Received | None:
        http = h11.Connection(h11.SERVER)
        head: h11.Request | None = None
        body = b""
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                return None
        assert head is not None
        headers = {name.decode(): value.decode() for name, value in head.headers}
        return Received(head.target.decode(), headers, body)

    async def wait(self, count: int) -> list[Received]:
        """Wait until so many requests have arrived, and return them."""
        with trio.fail_after(GENEROUS):
            async with self._arrived:
                while len(self.received) < count:
                    await self._arrived.wait()
        return self.received

    async def listen(self, nursery: trio.Nursery, context: ssl.SSLContext | None = None) -> int:
        """Serve on a port of this host, which is returned."""
        serve: Any
        if context is None:
            serve = partial(trio.serve_tcp, self.serve, 0, host="127.0.0.1")
        else:
            serve = partial(trio.serve_ssl_over_tcp, self.serve, 0, context, host="127.0.0.1", https_compatible=True)
        listeners: list[Any] = await nursery.start(serve)
        below = getattr(listeners[0], "transport_listener", listeners[0])
        port: int = below.socket.getsockname()[1]
        return port

    def connector(self, nursery: trio.Nursery) -> Callable[[str, int], Awaitable[trio.abc.Stream]]:
        """Return what connects to this receiver in memory, whatever the host."""

        async def connect(host: str, port: int) -> trio.abc.Stream:
            await trio.lowlevel.checkpoint()
            one, other = trio.testing.memory_stream_pair()
            nursery.start_soon(self.serve, other)
            return one

        return connect


async def close_at_once(stream: trio.abc.Stream) -> None:
    """Close the connection without an answer."""
    await trio.lowlevel.checkpoint()


async def say_nothing(stream: trio.abc.Stream) -> None:
    """Never answer."""
    await trio.sleep_forever()


async def answer_without_end(stream: trio.abc.Stream) -> None:
    """Answer with success, and a body that does not end."""
    await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"10000\r\n" + b"x" * 65536 + b"\r\n")


async def send_heads_without_end(stream: trio.abc.Stream) -> None:
    """Send a head that does not end."""
    await stream.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send_all(b"X-More: x\r\n" * 1000)
