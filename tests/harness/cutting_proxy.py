"""A TCP proxy in front of an etcd node, which cuts connections where etcd has carried out a write and was about to say so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

TRANSACTION, KEEPALIVE = b"/v3/kv/txn", b"/v3/lease/keepalive"
_BYTES = 64 * 1024


class CuttingProxy:
    """A proxy for connections to a port of this host. `cuts` counts down the answers to requests for `paths` that get lost."""

    def __init__(self, upstream: str) -> None:
        self.url = ""
        self.cuts = 0
        self.paths = {TRANSACTION}
        self.done = 0
        self._port = int(upstream.rpartition(":")[2])

    async def serve(self, client: trio.SocketStream) -> None:
        """Relay one connection until a side closes it, or until an answer is cut off."""
        # The node may not run.
        with suppress(OSError):
            await self._relay(client)

    async def _relay(self, client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as server, trio.open_nursery() as nursery:
            has_asked = False

            async def ask() -> None:
                nonlocal has_asked
                with suppress(trio.BrokenResourceError):
                    while data := await client.receive_some(_BYTES):
                        has_asked = has_asked or any(path in data for path in self.paths)
                        await server.send_all(data)
                nursery.cancel_scope.cancel()

            async def answer() -> None:
                nonlocal has_asked
                with suppress(trio.BrokenResourceError):
                    while data := await server.receive_some(_BYTES):
                        if has_asked and self.cuts:
                            self.cuts -= 1
                            self.done += 1
                            break
                        has_asked = False
                        await client.send_all(data)
                nursery.cancel_scope.cancel()

            nursery.start_soon(ask)
            nursery.start_soon(answer)


@asynccontextmanager
async def cutting_proxy(upstream: str) -> AsyncIterator[CuttingProxy]:
    """Run a proxy in front of the node at the URL `upstream`, on a free port, for the time of the block."""
    proxy = CuttingProxy(upstream)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, proxy.serve, 0)
        proxy.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        yield proxy
        nursery.cancel_scope.cancel()
