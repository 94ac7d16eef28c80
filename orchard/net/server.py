"""The HTTP/1.1 server: accepts connections, runs one task for each, and stops. It knows no resource of the product.

A connection (connection.py) is one task, and a plain request is answered in it without another one. Only a `Stream`, a
WebSocket and `WhileConnected` have a second task, which notices when the client has gone. Each request and its answer
are an exchange (exchange.py).

An `HTTPError` from the handler or from the parser becomes an answer. A client that goes away, or takes or sends nothing
for too long, ends its connection silently. Any other exception is logged and answered with 500. `serve` says how
everything ends when the server stops.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import trio

from orchard.net.connection import Connection, Disconnected, Limits, ServerState, Service
from orchard.net.exchange import Exchange
from orchard.net.request import AdmittedT, HTTPError

_logger = logging.getLogger("orchard.net")


async def serve(
    service: Service[AdmittedT],
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    *,
    limits: Limits | None = None,
    stop: trio.Event | None = None,
    grace: float = 10.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the requests that arrive through `listeners`, until cancelled or until `stop` is set.

    A listener is trio's for sockets, or a `TLSListener`. `started()` is called when connections are accepted; the
    listeners are closed in any case.

    At `stop`: no more connections are accepted, those without a request are closed at once, endless streams end, and
    WebSockets are closed with 1001. What is running has `grace` seconds to end, and is cancelled then.
    """
    stop = stop if stop is not None else trio.Event()
    server = ServerState(service, limits or Limits(), stop)
    # Ends last.
    async with trio.open_nursery() as watching:
        watching.start_soon(server.sends.close_slow_readers)
        # One task for each connection. Ends when all connections have ended, or after the grace period.
        async with trio.open_nursery() as connections:
            # Ends first.
            async with trio.open_nursery() as accepting:
                accept = partial(
                    trio.serve_listeners,
                    partial(_serve_connection, server),
                    list(listeners),
                    handler_nursery=connections,
                )
                await accepting.start(accept)
                task_status.started()
                await stop.wait()
                accepting.cancel_scope.cancel()
            for scope in server.waiting:
                scope.cancel()
            connections.cancel_scope.deadline = trio.current_time() + grace
        watching.cancel_scope.cancel()


async def _serve_connection(server: ServerState, stream: trio.abc.Stream) -> None:
    """Answer the requests of a connection; trio.serve_listeners closes the stream afterwards in any case."""
    if not server.make_room():
        _logger.warning("connection refused: %d are open, and none of them is idle", server.open)
        return
    connection = Connection(server, stream)
    exchange: Exchange | None = None
    try:
        try:
            more = await connection.shake_hands()
        except HTTPError as refused:
            exchange, more = Exchange(connection), False
            await exchange.fail(refused)
        while more and await connection.wait_request():
            exchange = Exchange(connection)
            more = await exchange.run()
        await connection.aclose()
    except (Disconnected, trio.BrokenResourceError, trio.ClosedResourceError) as gone:
        _logger.debug("%s: the connection ended: %r", connection.peer, gone.__cause__ or gone)
    except Exception:
        _logger.exception("a request failed")
        if exchange is not None:
            with suppress(Disconnected):
                await exchange.fail(HTTPError(500, "internal error"))
    finally:
        if exchange is not None:
            exchange.end()
        connection.end()
