"""The controller's lines to the workers: actions out, tunnels back, pings both ways. Law: WebSocket streams only.

A worker behind a NAT can't be called, so each keeps a WebSocket open (its watch), over which the controller tells it to
do something. `syncVMsAction` means no more than "look again": it is never queued twice, and a worker that reads it gets
the present state from the API. The newest watch of a name is the one that counts.

Other actions ask for something. Each has a `Session`, whose unguessable id the worker brings back with the answer, once,
by a request of its own: an address, or a WebSocket whose other end is a port of the VM. A question that was not answered
is asked again over the next watch, for the one before may have been dead already. `relay` joins that WebSocket to the
WebSocket of whoever asked. It sends on what has come before it takes more, so that a slow side slows the other and
nothing piles up, and it forwards what one side has sent before it tells the other that this one has closed.

Every WebSocket is pinged, so that load balancers keep it and a dead peer is found: a ping that stays unanswered for a
whole interval ends the connection, unless data is what it waits behind. Tunnels do that themselves (pipe.py).
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import trio
from trio_websocket import WebSocketConnection

from orchard.codec import APIError, dump_json, shown
from orchard.net.websocket import PING_INTERVAL, TunnelStream
from orchard.net.wsframes import ABNORMAL, GOING_AWAY, INTERNAL_ERROR, NO_STATUS, NORMAL, Close

TAKE_SECONDS = 10.0  # for a client to take the tunnel that it has asked for
MAX_SESSIONS = 4096  # that wait for an answer of their worker; each is a request with a deadline
SYNC: Mapping[str, Any] = {"syncVMsAction": {}}


# ---- actions -------------------------------------------------------------------------------------------------------


class _Watch:
    """What one worker is to be told, and who speaks for it."""

    def __init__(self, account: str) -> None:
        self.account = account
        self.scope = trio.CancelScope()
        self._actions: list[Mapping[str, Any]] = []
        self._some = trio.Event()

    def put(self, action: Mapping[str, Any]) -> None:
        if action is SYNC and SYNC in self._actions:
            return
        self._actions.append(action)
        self._some.set()

    def take_back(self, action: Mapping[str, Any]) -> None:
        """Forget an action that was not sent yet, so that there are never more than sessions."""
        with suppress(ValueError):
            self._actions.remove(action)

    async def take(self) -> list[Mapping[str, Any]]:
        await self._some.wait()
        self._some = trio.Event()
        taken, self._actions = self._actions, []
        return taken


@dataclass(slots=True)
class FarEnd:
    """A worker's end of a tunnel: its bytes, until `finished` is set."""

    stream: TunnelStream
    worker: str = ""
    taken: trio.Event = field(default_factory=trio.Event)
    finished: trio.Event = field(default_factory=trio.Event)
    close: tuple[int, str] = (NORMAL, "")  # how it is to be closed


class Session:
    """A question to one worker, and its answer."""

    def __init__(self, worker: str, account: str, kind: str, asked: Mapping[str, Any]) -> None:
        self.id = secrets.token_urlsafe(24)
        self.worker = worker
        self.account = account
        self.action: Mapping[str, Any] = {kind: {"session": self.id, **asked}}
        self._answered = trio.Event()
        self._answer: FarEnd | str = ""
        self._error = ""

    def resolve(self, answer: FarEnd | str) -> None:
        self._answer = answer
        self._answered.set()

    def fail(self, error: str) -> None:
        self._error = error
        self._answered.set()

    async def wait(self) -> FarEnd | str:
        """Give the answer. Raises APIError(503) with the worker's words."""
        await self._answered.wait()
        if self._error:
            raise APIError(503, f'worker "{self.worker}": {self._error}')
        return self._answer


class Rendezvous:
    """The watches of all workers, and what was asked over them. `ping_interval` is in seconds."""

    def __init__(self, ping_interval: float = PING_INTERVAL) -> None:
        self.ping_interval = ping_interval
        self._watches: dict[str, _Watch] = {}
        self._connected = trio.Event()  # that another worker has come
        self._sessions: dict[str, Session] = {}
        self._tunnels: defaultdict[str, set[_Tunnel | _Use]] = defaultdict(set)  # by the uid of their VM

    def sync(self, worker: str) -> None:
        """Tell a worker to look at its VMs; one that has no watch open looks when it opens one."""
        if watch := self._watches.get(worker):
            watch.put(SYNC)

    async def serve(self, worker: str, account: str, websocket: WebSocketConnection, alive: Callable[[], None]) -> None:
        """Serve a worker's watch until another takes its place, or it is dead. Raises ConnectionClosed.

        `alive` is called at each sign of life.
        """
        if before := self._watches.get(worker):
            before.scope.cancel()
        for tunnel in self._tunnels_through(worker):
            tunnel.end(GOING_AWAY, f'worker "{worker}" has reconnected')  # what it had open before may be half-open
        watch = self._watches[worker] = _Watch(account)
        watch.put(SYNC)
        for session in self._sessions.values():
            if session.worker == worker:
                session.account = account
                watch.put(session.action)
        self._connected.set()
        self._connected = trio.Event()
        try:
            with watch.scope:
                async with trio.open_nursery() as nursery:  # all three end when one of them does
                    nursery.start_soon(drain, websocket)
                    nursery.start_soon(keep_alive, websocket, self.ping_interval, alive, nursery.cancel_scope)
                    while True:
                        for action in await watch.take():
                            await websocket.send_message(dump_json(action))
        finally:
            if self._watches.get(worker) is watch:
                del self._watches[worker]

    async def connected(self, worker: str) -> None:
        """Wait until a worker has a watch open."""
        while worker not in self._watches:
            await self._connected.wait()

    @contextmanager
    def ask(self, worker: str, kind: str, vm_uid: str, port: int | None = None) -> Iterator[Session]:
        """Ask a worker that has a watch open; forget the question at the end of the block. Raises APIError(503)."""
        watch = self._watches.get(worker)
        if watch is None:
            raise APIError(503, f'worker "{worker}" is not connected')
        if len(self._sessions) >= MAX_SESSIONS:
            raise APIError(503, f"{MAX_SESSIONS} requests wait for their workers already")
        session = Session(worker, watch.account, kind, {"vmUID": vm_uid, **({} if port is None else {"port": port})})
        self._sessions[session.id] = session
        watch.put(session.action)
        try:
            yield session
        finally:
            self._sessions.pop(session.id, None)
            if now := self._watches.get(worker):
                now.take_back(session.action)

    def answered(self, session: str, account: str) -> Session:
        """Find the question that a worker answers, for the only time. Raises APIError(404)."""
        found = self._sessions.get(session)
        if found is None or found.account != account:
            raise APIError(404, f"session {shown(session)} does not exist, or was answered already, or is another's")
        return self._sessions.pop(session)

    # -- tunnels

    async def serve_far_end(self, session: Session, stream: TunnelStream) -> None:
        """Let a worker's WebSocket answer a session, and keep it open as long as the tunnel is."""
        far = FarEnd(stream, session.worker)
        session.resolve(far)
        with trio.move_on_after(TAKE_SECONDS):
            async with trio.open_nursery() as nursery:  # one of both is enough

                async def end_with(wait: Callable[[], Awaitable[None]]) -> None:
                    await wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(end_with, far.taken.wait)
                nursery.start_soon(end_with, stream.wait_exhausted)
        if far.taken.is_set():
            await far.finished.wait()
            await stream.aclose(*far.close)

    async def serve_near_end(self, vm_uid: str, far: FarEnd, near: TunnelStream) -> None:
        """Relay between a client and a worker until one of them closes, or `end_tunnels` does."""
        tunnel = _Tunnel(near, far)
        with self._listed(vm_uid, tunnel):
            await tunnel.relay()

    @asynccontextmanager
    async def far_stream(self, vm_uid: str, far: FarEnd) -> AsyncIterator[TunnelStream]:
        """Give the bytes of a far end for the time of the block. Raises APIError(503) when `end_tunnels` ends it."""
        use = _Use(far.worker)
        far.taken.set()
        try:
            with self._listed(vm_uid, use), use.scope:
                yield far.stream
        finally:
            far.finished.set()
        if use.reason:
            raise APIError(503, use.reason)

    @contextmanager
    def _listed(self, vm_uid: str, tunnel: _Tunnel | _Use) -> Iterator[None]:
        self._tunnels[vm_uid].add(tunnel)
        try:
            yield
        finally:
            self._tunnels[vm_uid].discard(tunnel)
            if not self._tunnels[vm_uid]:
                del self._tunnels[vm_uid]

    def _tunnels_through(self, worker: str) -> list[_Tunnel | _Use]:
        return [tunnel for tunnels in self._tunnels.values() for tunnel in tunnels if tunnel.worker == worker]

    def end_tunnels(self, vm_uid: str, reason: str) -> None:
        """Close all tunnels into a VM that is no more."""
        for tunnel in self._tunnels.get(vm_uid, ()):
            tunnel.end(GOING_AWAY, reason)


# ---- relaying ------------------------------------------------------------------------------------------------------


class _Tunnel:
    """Two WebSockets that are joined."""

    def __init__(self, near: TunnelStream, far: FarEnd) -> None:
        self.worker = far.worker
        self._near = near
        self._far = far
        self._ended = trio.Event()

    def end(self, code: int, reason: str) -> None:
        """Close both ends, if nobody has said before why."""
        if not self._ended.is_set():
            self._far.close = (code, reason)
            self._ended.set()

    async def relay(self) -> None:
        near, far = self._near, self._far.stream
        self._far.taken.set()
        try:
            async with trio.open_nursery() as nursery:  # a frame on its way may come to its end before the close
                nursery.start_soon(self._pump, near, far, "the client")
                nursery.start_soon(self._pump, far, near, "the worker")
                await self._ended.wait()
                async with trio.open_nursery() as closing:
                    closing.start_soon(near.aclose, *self._far.close)
                    closing.start_soon(far.aclose, *self._far.close)
                nursery.cancel_scope.cancel()
        finally:
            self._far.finished.set()

    async def _pump(self, source: TunnelStream, sink: TunnelStream, who: str) -> None:
        """Send on what comes, until the source closes; what the sink can't take any more is dropped."""
        while data := await source.take():
            with suppress(trio.BrokenResourceError):
                await sink.send_all(data)  # if it has closed, its own pump still sends on what came before that
        self.end(*ending(source.closed, who))


class _Use:
    """A far end whose bytes somebody in this process uses."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.scope = trio.CancelScope()
        self.reason = ""

    def end(self, _: int, reason: str) -> None:
        self.reason = reason
        self.scope.cancel()


def ending(closed: Close | None, who: str) -> tuple[int, str]:
    """With what code and reason one side learns that the other has closed."""
    if closed is None or closed.code == ABNORMAL:
        return (
            INTERNAL_ERROR,
            f"{who} {closed.reason}" if closed and closed.reason else f"the connection to {who} was lost",
        )
    if closed.is_violation:
        return INTERNAL_ERROR, f"{who} broke the protocol: {closed.reason}"
    if closed.code in (NORMAL, NO_STATUS):
        return NORMAL, ""
    return closed.code, f"{who} closed it: {closed.reason}" if closed.reason else f"{who} closed it"


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
            await websocket.ping(secrets.token_bytes(4))  # by itself it would use up numbers that a test has seeded
        if patience.cancelled_caught:
            scope.cancel()
            return
        alive()
        await trio.sleep(interval)
