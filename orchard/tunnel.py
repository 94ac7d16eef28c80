"""The controller's line to each worker: actions out, pings both ways. Law: WebSocket streams, and nothing else.

A worker behind a NAT can't be called, so each keeps a WebSocket open (its watch), over which the controller tells it to
do something. `syncVMsAction` means no more than "look again": it is never queued twice, and a worker that reads it gets
the present state from the API. The newest watch of a name is the one that counts.

Every WebSocket is pinged, so that load balancers keep it and a dead peer is found: a ping that stays unanswered for a
whole interval ends the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio
from trio_websocket import WebSocketConnection

from orchard.codec import dump_json

PING_INTERVAL = 30.0  # seconds; shorter than the idle time-out of common load balancers, 60
SYNC: Mapping[str, Any] = {"syncVMsAction": {}}


class _Watch:
    """What one worker is to be told."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self._actions: list[Mapping[str, Any]] = []
        self._some = trio.Event()

    def put(self, action: Mapping[str, Any]) -> None:
        if action is SYNC and SYNC in self._actions:
            return
        self._actions.append(action)
        self._some.set()

    async def take(self) -> list[Mapping[str, Any]]:
        await self._some.wait()
        self._some = trio.Event()
        taken, self._actions = self._actions, []
        return taken


class Switchboard:
    """The watches of all workers. `ping_interval` is in seconds."""

    def __init__(self, ping_interval: float = PING_INTERVAL) -> None:
        self._ping_interval = ping_interval
        self._watches: dict[str, _Watch] = {}

    def sync(self, worker: str) -> None:
        """Tell a worker to look at its VMs; one that has no watch open looks when it opens one."""
        if watch := self._watches.get(worker):
            watch.put(SYNC)

    async def serve(self, worker: str, websocket: WebSocketConnection, alive: Callable[[], None]) -> None:
        """Serve a worker's watch until another takes its place, or it is dead. Raises ConnectionClosed.

        `alive` is called at each sign of life.
        """
        if before := self._watches.get(worker):
            before.scope.cancel()
        watch = self._watches[worker] = _Watch()
        watch.put(SYNC)
        try:
            with watch.scope:
                async with trio.open_nursery() as nursery:  # all three end when one of them does
                    nursery.start_soon(drain, websocket)
                    nursery.start_soon(keep_alive, websocket, self._ping_interval, alive, nursery.cancel_scope)
                    while True:
                        for action in await watch.take():
                            await websocket.send_message(dump_json(action))
        finally:
            if self._watches.get(worker) is watch:
                del self._watches[worker]


async def drain(websocket: WebSocketConnection) -> None:
    """Throw away what a peer sends that has nothing to say, so that its pongs and its close are seen."""
    while True:
        await websocket.get_message()


async def keep_alive(
    websocket: WebSocketConnection, interval: float, alive: Callable[[], None], scope: trio.CancelScope
) -> None:
    """Ping every `interval` seconds, and call `alive` for each pong. Cancels `scope` when one stays away as long."""
    while True:
        with trio.move_on_after(interval) as patience:
            await websocket.ping()
        if patience.cancelled_caught:
            scope.cancel()
            return
        alive()
        await trio.sleep(interval)
