"""A network in memory, for deterministic simulation. It uses trio's clock and one random number generator.

There are no sockets and no threads. A `Process` runs on a host. A killed process loses its listeners, and its
connections are reset. A frozen process, as after SIGSTOP, reads nothing, while its system buffers bytes up to a bound.
Bytes arrive after a random latency.

The link between two hosts can be cut in either direction: then bytes stay where they are, and neither end is notified.
After the link is healed, a connection either continues, as TCP does, or is reset because one system has given it up. The
end that opened a connection has TCP keep-alive, as in `orchard.net.tcp`: it breaks when the link was cut for
KEEP_ALIVE_SECONDS.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import trio

# Unread bytes of one direction, beyond which the sender waits.
BUFFER_BYTES = 256 * 1024
# Connections that a listener has not accepted yet.
BACKLOG = 128
# From and to.
LATENCY_SECONDS = (0.0005, 0.02)
# After a link is healed, bytes that were sent meanwhile arrive within this time.
RETRANSMISSION_SECONDS = 3.0
KEEP_ALIVE_SECONDS = 50.0

# From and to.
Hosts = tuple[str, str]


class Process:
    """A process with connections. It can be killed, frozen and thawed."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.alive = True
        self.frozen = False
        self.ends: dict[End, None] = {}
        self.listeners: dict[Listener, None] = {}
        # Calls that closed a connection while the process was frozen.
        self.at_thaw: list[Callable[[], None]] = []
        self._thawed = trio.lowlevel.ParkingLot()

    def kill(self) -> None:
        self.alive = False
        for end in list(self.ends):
            end.abort()
        for listener in list(self.listeners):
            listener.close()
        self.thaw()

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False
        for call in self.at_thaw:
            call()
        self.at_thaw.clear()
        self._thawed.unpark_all()

    async def wait_thawed(self) -> None:
        """Wait while this process is frozen."""
        while self.frozen:
            await self._thawed.park()


class Network:
    """The links between all hosts. `slowness` maps a host to its greatest additional latency in seconds."""

    def __init__(self, chance: random.Random) -> None:
        self.slowness: dict[str, float] = {}
        self._chance = chance
        # Cut links -> since when.
        self._cuts: dict[Hosts, float] = {}
        self._healed = trio.lowlevel.ParkingLot()
        self._listeners: dict[str, Listener] = {}
        self._connections: dict[Connection, None] = {}

    def latency(self, hosts: Hosts) -> float:
        slowness = sum(self.slowness.get(host, 0.0) for host in hosts)
        return self._chance.uniform(*LATENCY_SECONDS) + (self._chance.uniform(0, slowness) if slowness else 0.0)

    def cut_at(self, hosts: Hosts) -> float | None:
        return self._cuts.get(hosts)

    def cut(self, source: str, target: str) -> None:
        """Cut the link from one host to another."""
        self._cuts.setdefault((source, target), trio.current_time())
        for pipe in self._pipes((source, target)):
            pipe.notify()

    def heal(self, one: str, other: str) -> None:
        """Heal the link between two hosts, in both directions."""
        now = trio.current_time()
        was = [self._cuts.pop(hosts, None) is not None for hosts in ((one, other), (other, one))]
        if not any(was):
            return
        for connection in [each for each in self._connections if {one, other} == set(each.hosts)]:
            if self._chance.random() < 0.5:
                for end in connection.ends:
                    end.incoming.reset(now)
            else:
                for end in connection.ends:
                    end.incoming.delay_until(now + self._chance.uniform(0, RETRANSMISSION_SECONDS))
        self._healed.unpark_all()

    def _pipes(self, hosts: Hosts) -> Iterator[Pipe]:
        for connection in self._connections:
            for end in connection.ends:
                if hosts in (end.incoming.hosts, end.outgoing.hosts):
                    yield end.incoming

    def listen(self, process: Process) -> Listener:
        if process.host in self._listeners:
            raise OSError(f"a process listens on {process.host} already")
        listener = self._listeners[process.host] = Listener(self, process)
        process.listeners[listener] = None
        return listener

    def remove(self, what: Listener | Connection) -> None:
        if isinstance(what, Listener):
            del self._listeners[what.process.host]
        else:
            self._connections.pop(what, None)

    async def connect(self, process: Process, host: str) -> End:
        """Connect a process to the one that listens on a host. Waits while the link is cut. Raises OSError."""
        there, back = (process.host, host), (host, process.host)
        await trio.sleep(self.latency(there) + self.latency(back))
        while there in self._cuts or back in self._cuts or process.frozen:
            await process.wait_thawed()
            while there in self._cuts or back in self._cuts:
                await self._healed.park()
            await trio.sleep(self.latency(there))
        listener = self._listeners.get(host)
        if listener is None or not process.alive:
            raise ConnectionRefusedError(f"no process listens on {host}")
        connection = Connection(self, process, listener.process)
        listener.offer(connection.ends[1])
        self._connections[connection] = None
        return connection.ends[0]


class Pipe:
    """One direction of a connection: pieces of bytes with their times of arrival. b"" is the end, None a reset."""

    def __init__(self, network: Network, hosts: Hosts) -> None:
        self.hosts = hosts
        # Bytes that were sent and not read.
        self.size = 0
        # The reader has closed its end.
        self.closed = False
        self._network = network
        self._pieces: deque[tuple[float, bytes | None]] = deque()
        # The last arrival. No later piece arrives before it.
        self._last = 0.0
        self._changed = trio.lowlevel.ParkingLot()

    def put(self, piece: bytes | None) -> None:
        arrival = self._last = max(self._last, trio.current_time() + self._network.latency(self.hosts))
        self._pieces.append((arrival, piece))
        self.size += len(piece or b"")
        self.notify()

    def reset(self, now: float) -> None:
        """Drop what has not been read, and break the connection for the reader."""
        self._pieces.clear()
        self._pieces.append((now, None))
        self.size = 0
        self.notify()

    def delay_until(self, time: float) -> None:
        self._pieces = deque((max(arrival, time), piece) for arrival, piece in self._pieces)
        self._last = max(self._last, time)
        self.notify()

    def notify(self) -> None:
        self._changed.unpark_all()

    @property
    def cut_at(self) -> float | None:
        return self._network.cut_at(self.hosts)

    def is_broken(self) -> bool:
        """Return whether a reset has arrived."""
        return (
            bool(self._pieces)
            and self._pieces[-1][1] is None
            and self._pieces[-1][0] <= trio.current_time()
            and self.cut_at is None
        )

    def next_at(self) -> float:
        """Return when the next piece arrives, as far as is known."""
        return self._pieces[0][0] if self._pieces and self.cut_at is None else math.inf

    def take(self, max_bytes: int | None) -> bytes | None:
        """Return what has arrived; `next_at()` must be past. An end or a reset stays."""
        _, piece = self._pieces[0]
        if not piece:
            return piece
        parts, size = [], 0
        while self._pieces and self.next_at() <= trio.current_time() and (piece := self._pieces[0][1]):
            wanted = len(piece) if max_bytes is None else max_bytes - size
            parts.append(piece[:wanted])
            size += len(parts[-1])
            if wanted < len(piece):
                self._pieces[0] = (self._pieces[0][0], piece[wanted:])
                break
            self._pieces.popleft()
        self.size -= size
        self.notify()
        return b"".join(parts)

    async def wait(self, until: float) -> None:
        with trio.move_on_at(until):
            await self._changed.park()


class Connection:
    """A connection with two ends: of the process that opened it, and of the one that listened."""

    def __init__(self, network: Network, opener: Process, listener: Process) -> None:
        self.hosts = (opener.host, listener.host)
        there, back = Pipe(network, self.hosts), Pipe(network, (listener.host, opener.host))
        self.ends = (End(self, opener, back, there, opened=True), End(self, listener, there, back, opened=False))
        self._network = network

    def closed(self) -> None:
        if all(end.closed for end in self.ends):
            self._network.remove(self)


class End(trio.abc.HalfCloseableStream):
    """One end of a connection."""

    def __init__(self, connection: Connection, process: Process, incoming: Pipe, outgoing: Pipe, *, opened: bool):
        self.incoming = incoming
        self.outgoing = outgoing
        self.closed = False
        self._connection = connection
        self._process = process
        self._opened = opened
        # Whether this end has sent its end of stream.
        self._ended = False
        process.ends[self] = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            await self._check()
            if self.incoming.next_at() <= trio.current_time():
                piece = self.incoming.take(max_bytes)
                if piece is None:
                    raise trio.BrokenResourceError("the connection was reset")
                return piece
            await self.incoming.wait(min(self.incoming.next_at(), self._dead_at()))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        while True:
            await self._check()
            if self.incoming.is_broken() or (self.outgoing.closed and self.outgoing.cut_at is None):
                raise trio.BrokenResourceError("the connection was reset")
            if self.outgoing.size < BUFFER_BYTES:
                break
            await self.outgoing.wait(self._dead_at())
        if data:
            self.outgoing.put(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._end(b"")

    async def aclose(self) -> None:
        self._close(b"")
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Reset the connection, as the system does for a killed process."""
        self._close(None)

    async def _check(self) -> None:
        """Wait while the process is frozen. Raise an error if this end cannot be used."""
        if self._process.frozen:
            await self._process.wait_thawed()
        if self._process.alive and not self.closed and trio.current_time() >= self._dead_at():
            self.abort()
            raise trio.BrokenResourceError("TCP keep-alive got no answer")
        if not self._process.alive:
            raise trio.BrokenResourceError("the process was killed")
        if self.closed:
            raise trio.ClosedResourceError

    def _dead_at(self) -> float:
        """Return when keep-alive finds that the link is cut."""
        since = [pipe.cut_at for pipe in (self.incoming, self.outgoing)] if self._opened else []
        return min((at + KEEP_ALIVE_SECONDS for at in since if at is not None), default=math.inf)

    def _close(self, last: bytes | None) -> None:
        if self.closed:
            return
        self.closed = self.incoming.closed = True
        self._end(last)
        self.incoming.notify()
        self._process.ends.pop(self, None)
        self._connection.closed()

    def _end(self, last: bytes | None) -> None:
        if not self._ended or last is None:
            self._ended = True
            if self._process.frozen and last is not None:
                self._process.at_thaw.append(partial(self.outgoing.put, last))
            else:
                self.outgoing.put(last)


class Listener(trio.abc.Listener[End]):
    """Accepts connections to a process."""

    def __init__(self, network: Network, process: Process) -> None:
        self.process = process
        self._network = network
        self._send, self._receive = trio.open_memory_channel[End](BACKLOG)
        self._closed = False

    def offer(self, end: End) -> None:
        """Queue a connection for `accept`. Raises OSError."""
        try:
            self._send.send_nowait(end)
        except trio.WouldBlock:
            raise ConnectionRefusedError(f"the backlog of {self.process.host} is full") from None

    async def accept(self) -> End:
        while True:
            await self.process.wait_thawed()
            end = await self._receive.receive()
            if not end.closed:
                return end

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.remove(self)
            self.process.listeners.pop(self, None)
            self._receive.close()
            self._send.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()
