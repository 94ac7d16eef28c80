"""Changes of the state, and the watches of single objects.

`Store` makes a `Change` of each object that a transaction creates, replaces or deletes. A `ChangeFeed` holds the
durable changes of one object until a slower watcher has read them. The watches of all objects are in
change_log.py. How lines are sent to a watcher is in watchers.py.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import trio

from orchard.base.nursery import Wakeup
from orchard.resources.cluster import ClusterIdentity, Promise
from orchard.schema import VM, ClusterSettings, ServiceAccount, Worker
from orchard.state.watchers import Audience, SendBlock, Watcher

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
    # The revision of the state after this change's transaction.
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
        if isinstance(self.old, ServiceAccount) and isinstance(self.new, ServiceAccount):
            # An account's rights can be revoked also while nothing may be added.
            return replace(self.old, token=self.new.token, roles=self.new.roles) != self.new
        return self.new is not None and self.kind not in ("cluster", "promise")


def format_watch_line(kind: str, json_text: bytes) -> bytes:
    """Return a line of a watch: the kind of change and the object."""
    return b'{"type":"%b","object":%b}\n' % (kind.encode(), json_text)


class ChangeFeed:
    """The durable changes of one object, in their order, for one watcher.

    It ends when the watcher is WATCH_BACKLOG changes or WATCH_BYTES behind, or when all watchers together are
    ALL_WATCH_BYTES behind. Then the watcher reads the rest of the feed, and has to start a new watch.
    """

    def __init__(self, total: Counter[str], audience: Audience) -> None:
        # The watcher to whom the audience sends the changes as lines.
        self.watcher: Watcher | None = None
        self._total = total
        self._audience = audience
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
        if self.watcher is None:
            self._wakeup.set()
        else:
            self._audience.call((self.watcher,))

    @property
    def is_waiting(self) -> bool:
        """Whether the watcher has all changes so far, and the feed has not ended."""
        return not (self._changes or self._has_ended)

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
        self.watcher = None
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
        if not self.is_waiting:
            await trio.lowlevel.checkpoint()
        while self.is_waiting:
            await self._wakeup.wait()
        try:
            return self.receive_nowait()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


# ---- sending to watchers ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _LinesOfOne:
    """The lines of one object's changes, for a watcher that has seen a `version` of it."""

    version: int
    changes: ChangeFeed

    def take(self) -> bytes | None:
        try:
            change = self.changes.receive_nowait()
        except trio.WouldBlock:
            return b""
        except trio.EndOfChannel:
            return None
        # Changes that the first line includes may become durable after it was read.
        return change.line if change.is_newer(self.version) else b""

    def has_more(self) -> bool:
        return not self.changes.is_waiting

    def filler(self) -> bytes:
        return b"\n"


async def send_changes(version: int, json: bytes, changes: ChangeFeed, silence: float, send: SendBlock) -> None:
    """Send an object, its changes since, and those of later objects with its name, as lines.

    `changes` began with that `version` of the object. After each `silence` seconds without a change an empty line is
    sent, so that proxies do not take the watch for idle.
    """
    with changes:
        await send(format_watch_line("ADDED", json))
        changes.watcher = Watcher(_LinesOfOne(version, changes), send, silence)
        await changes.watcher.run()
