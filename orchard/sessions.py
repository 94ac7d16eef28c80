"""The open watches, tunnels and SSH connections of each account, which end with the account or its role.

`list_open` tells who is connected (`GET /controller/sessions`).

A handler whose work outlasts the check of credentials registers it here (`AccountSessions.hold`). The session is ended
when the account is deleted or loses the role that the check required. A VM access token counts as its issuing account
with the role that issuing needs.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.auth import ForbiddenError, require
from orchard.net.request import SendPiece, Stream, WebSocketUpgrade
from orchard.net.wsframes import POLICY_VIOLATION
from orchard.resources.bodies import OpenSession, SessionKind
from orchard.schema import Role, ServiceAccount

# Limit for a peer to answer the close of a WebSocket.
_CLOSE_SECONDS = 2.0

_End = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SessionSubject:
    """A session in the list: its kind, its target (such as vm/NAME; "" for all), and the client's address."""

    kind: SessionKind
    target: str
    peer: str


class AccountSessions:
    """The open sessions of all accounts. `accounts` is the store's table of accounts, by name; `clock` is in UTC."""

    def __init__(self, accounts: Mapping[str, ServiceAccount], clock: Callable[[], datetime.datetime]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._listed: dict[object, OpenSession] = {}
        # By account; the keys of the inner tables only tell one session from another.
        self._open: defaultdict[str, dict[object, tuple[Role | None, _End]]] = defaultdict(dict)

    @contextmanager
    def hold(self, account: str, role: Role | None, end: _End, subject: SessionSubject | None = None) -> Iterator[None]:
        """Call `end` with the reason if the account is deleted or loses the role during the block, or has before it.

        The account is "" where no credentials are asked for; then `end` is never called. With a subject, the session is
        listed during the block.
        """
        key = object()
        if subject is not None:
            self._listed[key] = OpenSession(subject.kind, self._clock(), account, subject.target, subject.peer)
        if account:
            self._open[account][key] = (role, end)
        try:
            self.review(account)
            yield
        finally:
            self._listed.pop(key, None)
            self._open[account].pop(key, None)
            if not self._open[account]:
                del self._open[account]

    @contextmanager
    def cancel_when_over(
        self, account: str, role: Role | None, subject: SessionSubject | None = None
    ) -> Iterator[None]:
        """Cancel the block when the account is deleted or loses the role. Raises ForbiddenError then."""
        scope, reasons = trio.CancelScope(), list[str]()

        def end(reason: str) -> None:
            reasons.append(reason)
            scope.cancel()

        with self.hold(account, role, end, subject), scope:
            yield
        if scope.cancelled_caught:
            raise ForbiddenError(reasons[0])

    def list_open(self) -> list[OpenSession]:
        """Return the sessions that have a subject, the oldest first."""
        return list(self._listed.values())

    def tie(
        self, answer: Stream | WebSocketUpgrade, account: str, role: Role | None, subject: SessionSubject
    ) -> None:  # fmt: skip
        """Have an answer's stream or WebSocket end with the account or its role."""
        held = partial(self.cancel_when_over, account, role, subject)
        if isinstance(answer, Stream):
            answer.produce = partial(self._produce, held, answer.produce)
        else:
            answer.session = partial(self._converse, held, answer.session)

    async def _produce(
        self,
        held: Callable[[], AbstractContextManager[None]],
        produce: Callable[[SendPiece], Awaitable[None]],
        send: SendPiece,
    ) -> None:
        with suppress(ForbiddenError), held():
            await produce(send)

    async def _converse(
        self,
        held: Callable[[], AbstractContextManager[None]],
        session: Callable[[WebSocketConnection], Awaitable[None]],
        websocket: WebSocketConnection,
    ) -> None:
        try:
            with held():
                await session(websocket)
        except ForbiddenError as error:
            with trio.move_on_after(_CLOSE_SECONDS), suppress(ConnectionClosed):
                await websocket.aclose(POLICY_VIOLATION, str(error))

    def review(self, name: str, *, deleted: bool = False) -> None:
        """End the sessions of an account that may have changed, unless it still has their role.

        `deleted`: the account was deleted, even if there is another one of its name by now.
        """
        account = None if deleted else self._accounts.get(name)
        for key, (role, end) in list(self._open.get(name, {}).items()):
            reason = _why_ended(name, account, role)
            if reason:
                del self._open[name][key]
                end(reason)


def _why_ended(name: str, account: ServiceAccount | None, role: Role | None) -> str:
    if account is None:
        return f'service account "{name}" was deleted'
    if role is None:
        return ""
    try:
        require(account, role)
    except ForbiddenError as error:
        return str(error)
    return ""
