"""Which events of a VM an answer shows, and how they are sent: as a JSON array, or one a line, each with its cursor.

A VM has two sorts of events: those that are appended (`StoredEvents`), and lifecycle events (lifecycle.py). `select`
puts both in one order. A `Position` among them counts both sorts. Neither count ever changes its meaning, so paging and
following neither skip nor repeat an event while others are written.

Events are read in blocks of BLOCK_BYTES. An answer to a client that reads nothing holds no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from orchard.codec import dump_json, shown
from orchard.schema import LIFECYCLE
from orchard.storage import event_file
from orchard.storage.errors import StorageError
from orchard.storage.lifecycle import LifecycleEvent, VMLifecycle

_CURSOR = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})(?:-([0-9]{1,15}))?")

Send = Callable[[bytes], Awaitable[None]]
# A function that sends a page of events piece by piece, with the function that it is given.
SendPage = Callable[[Send], Awaitable[None]]
# Numbers of consecutive events of the VM's file, or one lifecycle event.
Piece = range | LifecycleEvent


class StoredEvents(Protocol):
    """The appended events of one VM, numbered from 0."""

    @property
    def count(self) -> int: ...

    @property
    def is_durable(self) -> bool:
        """Whether they may be shown. Otherwise an append makes them durable."""

    def blocks(self, start: int, stop: int) -> list[range]:
        """Return the events number `start` to `stop` - 1 in blocks of BLOCK_BYTES, or of one event that is longer."""

    def size_of(self, block: range) -> int:
        """Return about how many bytes a block takes."""

    async def read(self, block: range) -> list[bytes]:
        """Return the JSON of each event of a block. Raises EventsDeletedError."""

    async def read_part(self, number: int, at: int) -> bytes:
        """Return BLOCK_BYTES of one event's JSON from its byte `at`; empty at its end. Raises EventsDeletedError."""


class InvalidCursorError(Exception):
    """A cursor does not come from an answer with this VM's events."""

    def __init__(self, cursor: str) -> None:
        super().__init__(
            f"cursor is {shown(cursor)}, expected the X-Next-Cursor of an earlier page of this VM's events, or the cursor"
            " of one of them"
        )


class EventsDeletedError(StorageError):
    """The VM was deleted, and its events with it."""

    def __init__(self, uid: str) -> None:
        super().__init__(f"the VM with uid {uid} was deleted")


class Position(NamedTuple):
    """A place among a VM's events: how many stored events are before it, and the number of the next lifecycle event."""

    events: int
    lifecycle: int


@dataclass(frozen=True, slots=True)
class EventKinds:
    """The kinds of events that an answer shows. `stored` has the beginnings of the stored events' JSON, None for any."""

    stored: tuple[bytes, ...] | None = None
    lifecycle: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> EventKinds:
        """Return the kinds with these names. Without a name: all but lifecycle events."""
        kinds = set(names)
        if not kinds:
            return cls()
        stored = tuple(b'{"kind":%b,' % dump_json(name) for name in sorted(kinds - {LIFECYCLE}))
        return cls(stored, LIFECYCLE in kinds)

    def select(self, texts: list[bytes]) -> list[bytes]:
        """Return the JSON of those stored events that are shown."""
        return texts if self.stored is None else [text for text in texts if text.startswith(self.stored)]


@dataclass(frozen=True, slots=True)
class EventView:
    """A VM's events as they are now. `stored` is None if it has none but lifecycle events."""

    uid: str
    stored: StoredEvents | None
    lifecycle: VMLifecycle
    kinds: EventKinds

    @property
    def begin(self) -> Position:
        return Position(0, self.lifecycle.begin)

    @property
    def end(self) -> Position:
        return Position(self.stored.count if self.stored is not None else 0, self.lifecycle.end)

    # -- cursors

    def cursor(self, position: Position) -> str:
        text = f"{self.uid[:8]}-{position.events}"
        return f"{text}-{position.lifecycle}" if self.kinds.lifecycle else text

    def position(self, cursor: str) -> Position:
        """Return the position of a cursor. Raises InvalidCursorError."""
        match = _CURSOR.fullmatch(cursor)
        if match is None or match[1] != self.uid[:8] or int(match[2]) > self.end.events:
            raise InvalidCursorError(cursor)
        events = int(match[2])
        lifecycle = int(match[3]) if match[3] else self.lifecycle.number_at(events)
        if lifecycle > self.end.lifecycle:
            raise InvalidCursorError(cursor)
        return Position(events, lifecycle)

    # -- selection

    def select(self, begin: Position, end: Position) -> list[Piece]:
        """Return the events between two positions in their order."""
        at = begin.events
        stop = at if self.kinds.stored == () else end.events
        pieces: list[Piece] = []
        if self.kinds.lifecycle:
            for event in self.lifecycle.between(begin.lifecycle, end.lifecycle):
                if at < (after := min(event.after, stop)):
                    pieces.append(range(at, after))
                    at = after
                pieces.append(event)
        if at < stop:
            pieces.append(range(at, stop))
        return pieces

    # -- sending

    def blocks(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces cut into blocks, each of which is read at once."""
        blocks: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, range) and self.stored is not None:
                blocks += self.stored.blocks(piece.start, piece.stop)
            else:
                blocks.append(piece)
        return blocks

    def is_small(self, blocks: Sequence[Piece]) -> bool:
        """Return whether blocks may be read into one answer."""
        ranges = [block for block in blocks if isinstance(block, range)]
        return self.stored is None or sum(map(self.stored.size_of, ranges)) <= event_file.BLOCK_BYTES

    async def read_array(self, blocks: Sequence[Piece], newest_first: bool) -> bytes:
        """Return a JSON array of events. Raises EventsDeletedError."""
        texts: list[bytes] = []
        for block in blocks:
            texts += await self._read(block)
        return b"[%b]" % b",".join(reversed(texts) if newest_first else texts)

    async def send_array(self, blocks: Sequence[Piece], newest_first: bool, send: Send) -> None:
        """Send a JSON array of events. Raises EventsDeletedError."""
        before = b"["
        for block in reversed(blocks) if newest_first else blocks:
            if self._is_long(block):
                if await self._send_long(block, before, b"}", send):
                    before = b","
            elif texts := await self._read(block):
                await send(before + b",".join(reversed(texts) if newest_first else texts))
                before = b","
        await send(b"[]" if before == b"[" else b"]")

    async def send_lines(self, begin: Position, blocks: Sequence[Piece], send: Send) -> None:
        """Send events as lines, each with its cursor. `begin` is the position before the first one.

        Raises EventsDeletedError.
        """
        at = begin
        for block in blocks:
            if isinstance(block, LifecycleEvent):
                at = at._replace(lifecycle=block.number + 1)
                await send(self._line(block.text, at))
            elif self._is_long(block):
                at = at._replace(events=block.stop)
                await self._send_long(block, b"", self._line(b"}", at), send)
            else:
                # Events are numbered before those that are not shown are left out.
                texts = enumerate(await self._stored.read(block), block.start + 1)
                lines = [self._line(text, at._replace(events=n)) for n, text in texts if self.kinds.select([text])]
                at = at._replace(events=block.stop)
                if lines:
                    await send(b"".join(lines))

    def _line(self, text: bytes, after: Position) -> bytes:
        return b'%b,"cursor":"%b"}\n' % (text[:-1], self.cursor(after).encode())

    @property
    def _stored(self) -> StoredEvents:
        assert self.stored is not None
        return self.stored

    def _is_long(self, block: Piece) -> bool:
        """Return whether a block is one event that is read in parts."""
        return isinstance(block, range) and len(block) == 1 and self._stored.size_of(block) > event_file.BLOCK_BYTES

    async def _read(self, block: Piece) -> list[bytes]:
        if isinstance(block, LifecycleEvent):
            return [block.text]
        return self.kinds.select(await self._stored.read(block))

    async def _send_long(self, block: Piece, before: bytes, after: bytes, send: Send) -> bool:
        """Send one long event between `before` and `after`, which takes the place of its last brace.

        Return False if its kind is not shown.
        """
        assert isinstance(block, range)
        part = await self._stored.read_part(block.start, 0)
        if not self.kinds.select([part]):
            return False
        if before:
            await send(before)
        at = 0
        while part:
            at += len(part)
            following = await self._stored.read_part(block.start, at)
            await send(part if following else part[:-1] + after)
            part = following
        return True


def take(pieces: Sequence[Piece], limit: int, newest_first: bool) -> list[Piece]:
    """Return the first `limit` events of pieces, or the last, in their order."""
    kept: list[Piece] = []
    for piece in reversed(pieces) if newest_first else pieces:
        if limit <= 0:
            break
        if isinstance(piece, range):
            piece = piece[-limit:] if newest_first else piece[:limit]
        kept.append(piece)
        limit -= count_events([piece])
    return kept[::-1] if newest_first else kept


def count_events(pieces: Iterable[Piece]) -> int:
    return sum(len(piece) if isinstance(piece, range) else 1 for piece in pieces)


def position_after(begin: Position, pieces: Iterable[Piece]) -> Position:
    """Return the position after pieces that begin at a position."""
    events, lifecycle = begin
    for piece in pieces:
        if isinstance(piece, LifecycleEvent):
            lifecycle = piece.number + 1
        else:
            events = piece.stop
    return Position(events, lifecycle)


def position_before(end: Position, pieces: Sequence[Piece]) -> Position:
    """Return the position before pieces that end at a position."""
    events, lifecycle = end
    for piece in reversed(pieces):
        if isinstance(piece, LifecycleEvent):
            lifecycle = piece.number
        else:
            events = piece.start
    return Position(events, lifecycle)
