"""Changes of the state, the watches of single objects, and how lines are sent to a watcher.

`Store` makes a `Change` of each object that a transaction creates, replaces or deletes. A `ChangeFeed` holds the
durable changes of one object for one watcher, who is slower than they come. The watches of all objects are in
change_log.py.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import trio

from orchard.cluster import ClusterIdentity, Promise
from orchard.nursery import Wakeup
from orchard.schema import VM, ClusterSettings, ServiceAccount, Worker

# Changes and bytes by which a slow watcher may be behind before its feed ends, and the bytes of all watchers together.
WATCH_BACKLOG = 1024
WATCH_BYTES, ALL_WATCH_BYTES = 4 * 1024 * 1024, 64 * 1024 * 1024

Kind = Literal["vm", "worker", "account", "settings", "cluster", "promise"]
StoredObject = VM | Worker | ServiceAccount | ClusterSettings | ClusterIdentity | Promise


@dataclass(slots=True)
class Change:
    """A change of one object. `old` is None when it was created, `new` when it was deleted."""

    kind: Kind
    name: str
    old: StoredObject | None
    new: StoredObject | None
    # The JSON of the new object, or of the deleted one.
    json: bytes = field(repr=False)
    old_json: bytes = field(default=b"", repr=False)
    # Where in a VM's JSON its specification begins.
    spec_at: int = 0
    # That of the state with this change: its transaction's.
    revision: int = 0
    _line: bytes = field(default=b"", repr=False)

    @property
    def line(self) -> bytes:
        """The line that watchers are sent, formatted once for all of them."""
        if not self._line:
            self._line = format_watch_line(self.type, self.json)
        return self._line

    @property
    def type(self) -> Literal["ADDED", "MODIFIED", "DELETED"]:
        if self.new is None:
            return "DELETED"
        return "ADDED" if self.old is None else "MODIFIED"

    def is_newer(self, version: int) -> bool:
        """Return whether the change came after a VM had this version. Versions never decrease, also under a reused name."""
        if self.new is None:
            return isinstance(self.old, VM) and self.old.meta.version >= version
        return isinstance(self.new, VM) and self.new.meta.version > version

    @property
    def adds(self) -> bool:
        """Whether the change adds something: not for deletions and for what only the system writes."""
        if isinstance(self.old, VM) and isinstance(self.new, VM):
            return self.old.spec is not self.new.spec and self.old.spec != self.new.spec
        return self.new is not None and self.kind not in ("cluster", "promise")


def format_watch_line(kind: str, json_text: bytes) -> bytes:
    """Return a line of a watch: the kind of change and the object."""
    return b'{"type":"%b","object":%b}\n' % (kind.encode(), json_text)


class ChangeFeed:
    """The durable changes of one object, in their order, for one watcher.

    It ends when the watcher is WATCH_BACKLOG changes or WATCH_BYTES behind, or when all watchers together are
    ALL_WATCH_BYTES behind: the watcher reads what it has, and has to begin anew.
    """

    def __init__(self, total: Counter[str]) -> None:
        self._total = total
        self._changes: deque[Change] = deque()
        self._bytes = 0
        self._has_ended = False
        self._wakeup = Wakeup()

    def put(self, change: Change) -> None:
        """Add a change, unless the feed has ended. The first change is added whatever its size."""
        if self._has_ended:
            return
        size = len(change.json)
        is_full = len(self._changes) >= WATCH_BACKLOG or self._bytes + size > WATCH_BYTES
        if self._changes and (is_full or self._total["bytes"] + size > ALL_WATCH_BYTES):
            self._has_ended = True
        else:
            self._changes.append(change)
            self._count(size)
        self._wakeup.set()

    def receive_nowait(self) -> Change:
        """Return the next change. Raises trio.WouldBlock if there is none yet, trio.EndOfChannel at the end."""
        if self._changes:
            change = self._changes.popleft()
            self._count(-len(change.json))
            return change
        if self._has_ended:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    def close(self) -> None:
        self._has_ended = True
        self._count(-self._bytes)
        self._changes.clear()
        self._wakeup.set()

    def _count(self, size: int) -> None:
        self._bytes += size
        self._total["bytes"] += size

    def __del__(self) -> None:
        self._count(-self._bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        if self._changes or self._has_ended:
            await trio.lowlevel.checkpoint()
        while not (self._changes or self._has_ended):
            await self._wakeup.wait()
        try:
            return self.receive_nowait()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


# ---- sending to watchers ---------------------------------------------------------------------------------------------

# Lines. A tuple has parts that are too large to be copied for each watcher.
Block = bytes | tuple[bytes, ...]


class SendBlock(Protocol):
    """Sends lines to one watcher."""

    async def __call__(self, block: Block, /) -> None:
        """Send a block, after the rest of what `now` has taken."""

    def now(self, block: Block, /) -> bool:
        """Send a block without waiting. Return False if a part of it is left, which the next call has to send."""


async def send_as_they_come(
    receive: Callable[[], Awaitable[Block | None]], send: SendBlock, silence: float, filler: Callable[[], Block]
) -> None:  # fmt: skip
    """Send each block that `receive` returns, until it returns None.

    After each `silence` seconds in which nothing was sent, send what `filler` returns. `receive` is cancelled for that,
    and must lose nothing.
    """
    until = trio.current_time() + silence
    while True:
        is_sent = True
        # One scope for many blocks, since a scope costs as much as two sends. So it may end too early.
        with trio.move_on_at(until):
            while is_sent:
                block = await receive()
                if block is None:
                    return
                is_sent = send.now(block)
                until = trio.current_time() + silence
        if not is_sent:
            # The client is slow. In the scope its end would cut the line off.
            await send(b"")
        elif trio.current_time() >= until:
            await send(filler())
        else:
            continue
        until = trio.current_time() + silence


async def send_changes(version: int, json: bytes, changes: ChangeFeed, silence: float, send: SendBlock) -> None:
    """Send an object, its changes since, and those of later objects with its name, as lines.

    `changes` began with that `version` of the object. After each `silence` seconds without a change an empty line is
    sent, so that proxies do not take the watch for idle.
    """

    async def receive() -> bytes | None:
        async for change in changes:
            # Changes that the first line includes may become durable after it was read.
            if change.is_newer(version):
                return change.line
        return None

    with changes:
        await send(format_watch_line("ADDED", json))
        await send_as_they_come(receive, send, silence, lambda: b"\n")
