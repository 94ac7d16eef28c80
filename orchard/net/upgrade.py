"""The server's end of WebSockets and tunnels: the answer 101, the session, and the close at its end or the server's stop.

Messages are exchanged by trio-websocket, the bytes of tunnels by `TunnelStream` (websocket.py). The request was checked
before (`Request.require_websocket`).
"""

from __future__ import annotations

import secrets
from contextlib import suppress

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.net import wsframes
from orchard.net.connection import Connection
from orchard.net.request import Request, TunnelUpgrade, WebSocketUpgrade
from orchard.net.websocket import CLOSE_SECONDS, TunnelStream, open_messages

SWITCHING_PROTOCOLS = 101
_ANSWER = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


async def switch_protocols(connection: Connection, request: Request) -> bytes:
    """Answer that the connection becomes a WebSocket. Return what the client has sent beyond its request.

    Raises Disconnected.
    """
    accept = wsframes.accept_value(request.headers.get("sec-websocket-key") or "")
    await connection.send(f"{_ANSWER}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())
    return connection.take_all()


async def run_websocket(connection: Connection, answer: WebSocketUpgrade, early: bytes) -> None:
    """Run a session over WebSocket messages, then close the WebSocket."""
    async with (
        open_messages(
            connection.stream.as_stream(),
            client=False,
            early=early,
            message_queue_size=answer.message_queue_size,
            max_message_size=answer.max_message_size,
            receive_buffer_size=answer.receive_buffer_size,
        ) as websocket,
        # The pings and _close_at_stop end with the session.
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_close_at_stop, connection.server.stop, websocket, nursery.cancel_scope)
        nursery.start_soon(_ping, websocket, answer.ping_interval)
        try:
            await answer.session(websocket)
        except* ConnectionClosed:
            pass
        with trio.move_on_after(CLOSE_SECONDS):
            await websocket.aclose()
        nursery.cancel_scope.cancel()


async def run_tunnel(connection: Connection, answer: TunnelUpgrade, early: bytes) -> None:
    """Run a session over the bytes of WebSocket messages, then close the WebSocket."""
    stream = TunnelStream(
        connection.stream.as_stream(), client=False, early=early, ping_interval=answer.ping_interval
    )  # fmt: skip
    # The stream's own tasks and _close_at_stop end with the session.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        nursery.start_soon(_close_at_stop, connection.server.stop, stream, nursery.cancel_scope)
        with suppress(trio.BrokenResourceError):
            await answer.session(stream)
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def _ping(websocket: WebSocketConnection, interval: float) -> None:
    """Ping, so that load balancers keep the connection.

    A pong may come late, behind data, and only the next ping waits for it.
    """
    with suppress(ConnectionClosed):
        while True:
            await trio.sleep(interval)
            # Without a payload of ours trio-websocket would draw one from `random`, which an embedding program may seed.
            await websocket.ping(secrets.token_bytes(4))


async def _close_at_stop(
    stop: trio.Event, websocket: WebSocketConnection | TunnelStream, scope: trio.CancelScope
) -> None:
    await stop.wait()
    with trio.move_on_after(CLOSE_SECONDS):
        await websocket.aclose(1001, "controller is stopping")
    scope.cancel()
