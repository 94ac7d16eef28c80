"""One end of a WebSocket on a memory stream, and a scripted peer at its other end.

`pair` runs a `TunnelStream`, the product's end, and yields it with a `Peer`, which sends and reads single frames as the
test tells it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
import trio.testing
from trio.testing import MemoryReceiveStream, MemorySendStream

from orchard.net import websocket, wsframes
from orchard.net.websocket import TunnelStream
from orchard.net.wsframes import Close, FrameEvent, FrameReader

KEY = b"\x01\x02\x03\x04"
Memory = trio.StapledStream[MemorySendStream, MemoryReceiveStream]


def frame(opcode: int, payload: bytes, key: bytes | None) -> bytes:
    return b"".join(wsframes.build_frame(opcode, payload, key))


class Peer:
    """An end of a WebSocket that does what the test says, and nothing by itself."""

    def __init__(self, stream: trio.abc.Stream, *, client: bool = True) -> None:
        self.stream = stream
        self._key = KEY if client else None
        self._frames = FrameReader(masked=not client)

    async def send(self, opcode: int, payload: bytes = b"") -> None:
        await self.stream.send_all(frame(opcode, payload, self._key))

    async def events(self) -> list[FrameEvent]:
        """Return the events of the next read; none at the end of the stream."""
        return self._frames.feed(await self.stream.receive_some())

    async def rest(self) -> list[FrameEvent]:
        """Return all events until a close, the end of the stream, or a time without any."""
        found: list[FrameEvent] = []
        with trio.move_on_after(websocket.CLOSE_SECONDS * 2):
            while True:
                data = await self.stream.receive_some()
                found += self._frames.feed(data)
                if not data or (found and isinstance(found[-1], Close)):
                    break
        return found


@dataclass
class Ends:
    end: TunnelStream
    peer: Peer
    # The peer's side of the memory stream.
    memory: Memory


@asynccontextmanager
async def pair(
    *, client: bool = False, early: bytes = b"", ping_interval: float = math.inf, narrow: bool = False
) -> AsyncIterator[Ends]:
    """Yield a running end and its peer. `narrow`: the stream buffers nothing, so a sender waits for its receiver."""
    make = trio.testing.lockstep_stream_pair if narrow else trio.testing.memory_stream_pair
    ours, theirs = make()
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            end = TunnelStream(ours, client=client, early=early, ping_interval=ping_interval)
            nursery.start_soon(end.run)
            # The two sorts of streams differ in their types, not in their methods.
            yield Ends(end, Peer(theirs, client=not client), theirs)  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()
