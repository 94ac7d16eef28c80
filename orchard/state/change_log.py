"""The log of the last changes of VMs and workers, and the watches that follow it.

The log numbers the transactions that change VMs or workers: each has a position. A watcher has the position of the
transaction that it saw last, and reads on from there. So a slow watcher holds no changes of its own, and one that lost
its connection resumes. A revision, as clients see it, is a position with the name of the log, which is a new name
after each start of the controller.

A transaction is recorded when it happens, and published when it is durable. A worker's JSON also shows computed fields
(its state, its health). They change without a transaction of the store, and are recorded as one. It is published after
all transactions before it, because the JSON may show what these have changed.

KEPT_CHANGES and KEPT_BYTES bound the log. A watcher ends when it is WATCH_BACKLOG changes behind after it has been
up to date once, or when the log no longer keeps what it would read next.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import trio

from orchard.codec import shown
from orchard.schema import VM, Worker
from orchard.state.changes import WATCH_BACKLOG, Change, StoredObject
from orchard.state.watchers import Audience, Block, SendBlock, Watcher

# Changes, and bytes of their JSON, that are kept. The newest transaction is kept whatever its size.
KEPT_CHANGES = 10_000
KEPT_BYTES = 16 * 1024 * 1024
# Lines are sent together until they have this many bytes, or this many objects were looked at. That takes below 1 ms.
_BLOCK_BYTES, _BLOCK_OBJECTS = 64 * 1024, 256
# Blocks that are remembered for the other watchers at the same position.
_SHARED_BLOCKS = 16

WatchedKind = Literal["vm", "worker"]
ChangeType = Literal["ADDED", "MODIFIED", "DELETED"]


class RevisionGoneError(Exception):
    """The log no longer keeps the changes after a revision."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The objects that a watcher wants: of some kinds, and of the VMs only those that match. `text` names the condition.

    `images`: whether workers are shown with their images.
    """

    kinds: frozenset[WatchedKind]
    text: str = ""
    matches: Callable[[VM], bool] | None = field(default=None, compare=False)
    images: bool = True

    def includes(self, item: StoredObject) -> bool:
        """Return whether an object of one of the kinds is selected."""
        return self.matches is None or not isinstance(item, VM) or self.matches(item)


@dataclass(slots=True)
class _LoggedChange:
    kind: WatchedKind
    old: StoredObject | None
    new: StoredObject | None
    # The new object, or the deleted one, as the API shows it. A worker's images are apart, since few watchers want
    # them.
    json: bytes = field(repr=False)
    images: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> int:
        return len(self.json) + len(self.images)

    def json_for(self, selection: Selection) -> tuple[bytes, ...]:
        """Return the JSON of the object in parts."""
        return (self.json[:-1], b",", self.images, b"}") if self.images and selection.images else (self.json,)

    def type_for(self, selection: Selection) -> ChangeType | None:
        """Return the type that a watcher sees: an object that begins to match is added, one that stops matching is deleted."""
        if self.kind not in selection.kinds:
            return None
        was = self.old is not None and selection.includes(self.old)
        if self.new is not None and selection.includes(self.new):
            return "MODIFIED" if was else "ADDED"
        return "DELETED" if was else None


@dataclass(slots=True)
class _LoggedTransaction:
    changes: list[_LoggedChange]
    # The number of changes published up to its end.
    end: int = 0

    @property
    def size(self) -> int:
        return sum(change.size for change in self.changes)


class ChangeLog:
    """The last changes of VMs and workers. `run` names the log, and has no full stop in it."""

    def __init__(self, run: str, audience: Audience) -> None:
        # The watchers that follow the log, and the audience that sends them what is published.
        self.watchers: dict[Watcher, None] = {}
        self._audience = audience
        # Returns a worker's JSON as the API shows it, without its images, from the worker and its stored JSON.
        self.show_worker: Callable[[Worker, bytes], bytes] = lambda _, stored: stored
        # Returns a worker's images as a member of a JSON object, or nothing.
        self.show_images: Callable[[str], bytes] = lambda _: b""
        self._run = run
        # Published transactions, the last one at position `_published`, and those after them.
        self._kept: deque[_LoggedTransaction] = deque()
        self._pending: deque[_LoggedTransaction] = deque()
        self._published = 0
        # The number of changes ever published, and that before the last publication.
        self._count = self._count_before = 0
        # Bytes of the JSON in `_kept`.
        self._bytes = 0
        # Blocks, and the position at their end, by the position before them. Cleared at each publication.
        self._blocks: dict[tuple[int, Selection], tuple[Block, int]] = {}
        self._collecting: list[dict[str, None]] = []

    # -- recording

    @property
    def last(self) -> int:
        """The position of the last transaction, which may not be published yet."""
        return self._published + len(self._pending)

    def record(self, changes: Iterable[Change], touched: Mapping[str, tuple[Worker, bytes]]) -> int:
        """Record what happened together, and return the last position.

        `touched` are workers, with their stored JSON, whose computed fields have changed.
        """
        logged: list[_LoggedChange] = []
        known: dict[str, None] = {}
        for change in changes:
            old, new, json = change.old, change.new, change.json
            if change.kind == "vm":
                logged.append(_LoggedChange("vm", old, new, json))
            elif isinstance(item := new or old, Worker):
                known[change.name] = None
                logged.append(self._worker_change(item, old, new, json))
        for name, (worker, json) in touched.items():
            if name not in known:
                logged.append(self._worker_change(worker, worker, worker, json))
        for names in self._collecting:
            names.update(dict.fromkeys((*known, *touched)))
        if logged:
            self._pending.append(_LoggedTransaction(logged))
        return self.last

    def _worker_change(
        self, worker: Worker, old: StoredObject | None, new: StoredObject | None, stored: bytes
    ) -> _LoggedChange:  # fmt: skip
        return _LoggedChange("worker", old, new, self.show_worker(worker, stored), self.show_images(worker.name))

    def publish(self, position: int) -> None:
        """Show watchers what was recorded up to a position."""
        if position == self._published:
            return
        self._count_before = self._count
        while self._published < position:
            transaction = self._pending.popleft()
            self._kept.append(transaction)
            self._published += 1
            self._bytes += transaction.size
            self._count += len(transaction.changes)
            transaction.end = self._count
        while len(self._kept) > 1 and (self._bytes > KEPT_BYTES or self._count - self._start > KEPT_CHANGES):
            self._bytes -= self._kept.popleft().size
        self._blocks.clear()
        if self.watchers:
            self._audience.call(self.watchers)

    @property
    def _start(self) -> int:
        """The number of changes before the first transaction that is kept."""
        return self._kept[0].end - len(self._kept[0].changes) if self._kept else self._count

    def undo(self) -> list[str]:
        """Forget all that is not published, and return the names of the workers in it.

        Its positions are published without changes: answers that will not be sent may name them.
        """
        changed = [change.new or change.old for transaction in self._pending for change in transaction.changes]
        for transaction in self._pending:
            transaction.changes.clear()
        self.publish(self.last)
        return [item.name for item in changed if isinstance(item, Worker)]

    # -- reading

    def revision(self, position: int) -> str:
        """Return a position as clients see it."""
        return f"{self._run}.{position}"

    def bookmark(self, position: int) -> bytes:
        return b'{"type":"BOOKMARK","revision":"%b"}\n' % self.revision(position).encode()

    def position_of(self, revision: str) -> int:
        """Return the position of a revision. Raises RevisionGoneError if what came after it is not kept."""
        run, _, digits = revision.partition(".")
        if run == self._run and re.fullmatch(r"[0-9]{1,18}", digits) and self.keeps(position := int(digits)):
            return position
        raise RevisionGoneError(
            f"revision {shown(revision)} is too old, or of another run of the controller; list again"
        )

    def keeps(self, position: int) -> bool:
        """Return whether all that came after a published position is kept."""
        return self._published - len(self._kept) <= position <= self._published

    @contextmanager
    def collect_workers(self) -> Iterator[dict[str, None]]:
        """Collect, during the block, the names of the workers whose changes are recorded."""
        names: dict[str, None] = {}
        self._collecting.append(names)
        try:
            yield names
        finally:
            self._collecting.remove(names)

    def read(self, position: int, selection: Selection) -> tuple[Block, int]:
        """Return the lines that come after a position that is kept, and the position at their end.

        A block is bounded, so more lines may follow it. It is empty if none of its changes is selected.
        """
        key = (position, selection)
        if (found := self._blocks.get(key)) is not None:
            return found
        parts: list[bytes] = []
        size = looked = 0
        while position < self._published and size < _BLOCK_BYTES and looked < _BLOCK_OBJECTS:
            # The last transaction in `_kept` is at position `_published`.
            transaction = self._kept[position - self._published]
            position += 1
            looked += len(transaction.changes) + 1
            before = len(parts)
            for change in transaction.changes:
                if (kind := change.type_for(selection)) is not None:
                    parts += (_beginning(kind, change.kind), *change.json_for(selection), b"}\n")
                    size += change.size
            if len(parts) > before:
                parts[-1] = b',"revision":"%b"}\n' % self.revision(position).encode()
        found = (joined(parts), position)
        if len(self._blocks) < _SHARED_BLOCKS:
            self._blocks[key] = found
        return found

    def has_after(self, position: int) -> bool:
        """Return whether something was published after a position."""
        return position != self._published

    def count_at(self, position: int) -> int:
        """Return how many changes were published up to a position that is kept."""
        return (
            self._start
            if position == self._published - len(self._kept)
            else self._kept[position - self._published - 1].end
        )

    def is_slow(self, count: int) -> bool:
        """Return whether a watcher that has seen so many changes has not taken WATCH_BACKLOG that it could have."""
        return self._count_before - count > WATCH_BACKLOG


# ---- lines -----------------------------------------------------------------------------------------------------------


def _beginning(change: ChangeType, kind: WatchedKind) -> bytes:
    """Return the part of a line that precedes the object."""
    return b'{"type":"%b","kind":"%b","object":' % (change.encode(), kind.encode())


def joined(parts: Iterable[bytes]) -> Block:
    """Join parts, except those that are too large to be copied."""
    found: list[bytes] = []
    small: list[bytes] = []
    for part in parts:
        if len(part) <= _BLOCK_BYTES:
            small.append(part)
        else:
            found += (b"".join(small), part)
            small.clear()
    return (*found, b"".join(small)) if found else b"".join(small)


# ---- watches ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Snapshot:
    """The objects at a position: VMs, the JSON of each, and the JSON of workers in parts."""

    position: int
    # Two lists, since ten thousand pairs would take some milliseconds more.
    vms: list[VM] = field(repr=False)
    vm_json: list[bytes] = field(repr=False)
    workers: list[list[bytes]] = field(repr=False)


async def send_present(
    log: ChangeLog, snapshot: Snapshot, selection: Selection, silence: float, send: SendBlock
) -> None:  # fmt: skip
    """Send each selected object of a snapshot as ADDED, then a BOOKMARK, and go on as `follow` does."""
    await _send_list(log, snapshot, selection, send)
    # Free the list, since the watch may go on for days.
    snapshot.vms.clear()
    snapshot.vm_json.clear()
    snapshot.workers.clear()
    await follow(log, snapshot.position, selection, silence, send)


async def _send_list(log: ChangeLog, snapshot: Snapshot, selection: Selection, send: SendBlock) -> None:
    parts: list[bytes] = []
    looked = size = 0
    for line in _present_lines(snapshot, selection):
        parts += line
        looked += 1
        size += sum(map(len, line))
        if size >= _BLOCK_BYTES or looked >= _BLOCK_OBJECTS:
            if parts:
                await send(joined(parts))
            else:
                await trio.lowlevel.checkpoint()
            # A slow watcher must not hold the snapshot longer than the log keeps the changes that follow it.
            if not log.keeps(snapshot.position):
                return
            parts.clear()
            looked = size = 0
    await send(joined([*parts, log.bookmark(snapshot.position)]))


def _present_lines(snapshot: Snapshot, selection: Selection) -> Iterator[tuple[bytes, ...]]:
    """Yield a line for each object of a snapshot, in parts; () for those that are not selected."""
    beginning = _beginning("ADDED", "vm")
    for vm, json in zip(snapshot.vms, snapshot.vm_json, strict=True):
        yield (beginning, json, b"}\n") if selection.includes(vm) else ()
    beginning = _beginning("ADDED", "worker")
    for json_parts in snapshot.workers:
        yield (beginning, *json_parts, b"}\n")


class _LinesOfAll:
    """The selected lines of a log after a position, for one watcher, until the watcher is too slow."""

    __slots__ = ("_count", "_log", "_position", "_selection")

    def __init__(self, log: ChangeLog, position: int, selection: Selection) -> None:
        self._log = log
        self._position = position
        self._selection = selection
        # The number of changes published up to the position; None before the watcher was up to date once.
        self._count: int | None = None

    def take(self) -> Block | None:
        log = self._log
        if not log.keeps(self._position) or (self._count is not None and log.is_slow(self._count)):
            return None
        block, self._position = log.read(self._position, self._selection)
        if self._count is not None or not log.has_after(self._position):
            self._count = log.count_at(self._position)
        return block

    def has_more(self) -> bool:
        return self._log.has_after(self._position)

    def filler(self) -> bytes:
        return self._log.bookmark(self._position)


async def follow(log: ChangeLog, position: int, selection: Selection, silence: float, send: SendBlock) -> None:
    """Send what comes after a position, until the watcher is too slow.

    The last line of each transaction has its revision. After each `silence` seconds in which nothing was sent, a
    BOOKMARK has the revision up to which all was sent.
    """
    watcher = Watcher(_LinesOfAll(log, position, selection), send, silence)
    log.watchers[watcher] = None
    try:
        await watcher.run()
    finally:
        del log.watchers[watcher]
