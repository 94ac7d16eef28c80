"""A network in memory. Law: trio and one random number generator; no sockets, no threads, no clock but trio's.

A `Process` runs on a host; it can be killed (its connections are reset, its listeners gone) or stand still, as one that
got SIGSTOP: the system goes on taking bytes for it, up to a bound, and it reads none. What is sent needs time to arrive.
Between two hosts the way can be severed in either direction: then bytes stay where they are and nobody is told. A
connection that was severed either goes on when the way is healed, as TCP does, or was forgotten meanwhile and is reset.
The end that has opened a connection is kept alive by its system, as `orchard.tcp.keep_alive` asks for: it breaks when
the way was severed for KEEP_ALIVE_SECONDS.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import trio

BUFFER_BYTES = 256 * 1024  # of a direction that were sent and not read; then the sender waits
BACKLOG = 128  # connections that a listener has not accepted yet
LATENCY = (0.0005, 0.02)  # seconds, from and to
RETRANSMISSION = 3.0  # seconds, at most, until what was sent while the way was severed arrives after that
KEEP_ALIVE_SECONDS = 50.0

Hosts = tuple[str, str]  # from and to


class Process:
    """Somebody who has connections, and can be killed or made to stand still."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.alive = True
        self.frozen = False
        self.ends: dict[End, None] = {}
        self.listeners: dict[Listener, None] = {}
        self.at_thaw: list[Callable[[], None]] = []  # what its system hears of it only then
        self._still = trio.lowlevel.ParkingLot()

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
        for tell in self.at_thaw:
            tell()
        self.at_thaw.clear()
        self._still.unpark_all()

    async def turn(self) -> None:
        """Return when this process does not stand still."""
        while self.frozen:
            await self._still.park()


class Network:
    """The ways between all hosts. `slowness` is up to how many seconds longer a host's bytes take."""

    def __init__(self, chance: random.Random) -> None:
        self.slowness: dict[str, float] = {}
        self._chance = chance
        self._severed: dict[Hosts, float] = {}  # -> since when
        self._healed = trio.lowlevel.ParkingLot()
        self._listeners: dict[str, Listener] = {}
        self._connections: dict[Connection, None] = {}

    def latency(self, hosts: Hosts) -> float:
        slowness = sum(self.slowness.get(host, 0.0) for host in hosts)
        return self._chance.uniform(*LATENCY) + (self._chance.uniform(0, slowness) if slowness else 0.0)

    def severed_at(self, hosts: Hosts) -> float | None:
        return self._severed.get(hosts)

    def sever(self, source: str, target: str) -> None:
        """Let nothing through any more from one host to another."""
        self._severed.setdefault((source, target), trio.current_time())
        for pipe in self._pipes((source, target)):
            pipe.tell()

    def heal(self, one: str, other: str) -> None:
        """Let everything through again, both ways."""
        now = trio.current_time()
        was = [self._severed.pop(hosts, None) is not None for hosts in ((one, other), (other, one))]
        if not any(was):
            return
        for connection in [each for each in self._connections if {one, other} == set(each.hosts)]:
            if self._chance.random() < 0.5:
                for end in connection.ends:
                    end.incoming.reset(now)
            else:
                for end in connection.ends:
                    end.incoming.delay_until(now + self._chance.uniform(0, RETRANSMISSION))
        self._healed.unpark_all()

    def _pipes(self, hosts: Hosts) -> Iterator[Pipe]:
        for connection in self._connections:
            for end in connection.ends:
                if hosts in (end.incoming.hosts, end.outgoing.hosts):
                    yield end.incoming

    def listen(self, process: Process) -> Listener:
        if process.host in self._listeners:
            raise OSError(f"{process.host} is listened on already")
        listener = self._listeners[process.host] = Listener(self, process)
        process.listeners[listener] = None
        return listener

    def forget(self, what: Listener | Connection) -> None:
        if isinstance(what, Listener):
            del self._listeners[what.process.host]
        else:
            self._connections.pop(what, None)

    async def connect(self, process: Process, host: str) -> End:
        """Connect a process to the one that listens on a host; waits for as long as there is no way to it.

        Raises OSError.
        """
        there, back = (process.host, host), (host, process.host)
        await trio.sleep(self.latency(there) + self.latency(back))
        while there in self._severed or back in self._severed or process.frozen:
            await process.turn()
            while there in self._severed or back in self._severed:
                await self._healed.park()
            await trio.sleep(self.latency(there))
        listener = self._listeners.get(host)
        if listener is None or not process.alive:
            raise ConnectionRefusedError(f"nobody listens on {host}")
        connection = Connection(self, process, listener.process)
        listener.offer(connection.ends[1])
        self._connections[connection] = None
        return connection.ends[0]


class Pipe:
    """One direction of a connection: pieces with their times of arrival; b"" is the end, None a reset."""

    def __init__(self, network: Network, hosts: Hosts) -> None:
        self.hosts = hosts
        self.size = 0  # bytes that are under way
        self.closed = False  # nobody will read any more
        self._network = network
        self._pieces: deque[tuple[float, bytes | None]] = deque()
        self._last = 0.0  # arrival of what was put last: nothing overtakes it
        self._news = trio.lowlevel.ParkingLot()

    def put(self, piece: bytes | None) -> None:
        arrival = self._last = max(self._last, trio.current_time() + self._network.latency(self.hosts))
        self._pieces.append((arrival, piece))
        self.size += len(piece or b"")
        self.tell()

    def reset(self, now: float) -> None:
        """Forget what is under way, and have the reader find the connection broken."""
        self._pieces.clear()
        self._pieces.append((now, None))
        self.size = 0
        self.tell()

    def delay_until(self, time: float) -> None:
        self._pieces = deque((max(arrival, time), piece) for arrival, piece in self._pieces)
        self._last = max(self._last, time)
        self.tell()

    def tell(self) -> None:
        self._news.unpark_all()

    @property
    def severed_at(self) -> float | None:
        return self._network.severed_at(self.hosts)

    def is_broken(self) -> bool:
        """Whether a reset has arrived."""
        return (
            bool(self._pieces)
            and self._pieces[-1][1] is None
            and self._pieces[-1][0] <= trio.current_time()
            and self.severed_at is None
        )

    def next_at(self) -> float:
        """When there will be something to read, as far as is known."""
        return self._pieces[0][0] if self._pieces and self.severed_at is None else math.inf

    def take(self, max_bytes: int | None) -> bytes | None:
        """Give what has arrived, of what `next_at` has told. An end or a reset stays."""
        _, piece = self._pieces[0]
        if not piece:
            return piece
        parts, size = [], 0
        while self._pieces and self.next_at() <= trio.current_time() and (piece := self._pieces[0][1]):
            room = len(piece) if max_bytes is None else max_bytes - size
            parts.append(piece[:room])
            size += len(parts[-1])
            if room < len(piece):
                self._pieces[0] = (self._pieces[0][0], piece[room:])
                break
            self._pieces.popleft()
        self.size -= size
        self.tell()
        return b"".join(parts)

    async def wait(self, until: float) -> None:
        with trio.move_on_at(until):
            await self._news.park()


class Connection:
    """Two ends: that of the process which has opened it, and that of the one which listened."""

    def __init__(self, network: Network, opener: Process, listener: Process) -> None:
        self.hosts = (opener.host, listener.host)
        there, back = Pipe(network, self.hosts), Pipe(network, (listener.host, opener.host))
        self.ends = (End(self, opener, back, there, opened=True), End(self, listener, there, back, opened=False))
        self._network = network

    def closed(self) -> None:
        if all(end.closed for end in self.ends):
            self._network.forget(self)


class End(trio.abc.HalfCloseableStream):
    """What a process has of a connection."""

    def __init__(self, connection: Connection, process: Process, incoming: Pipe, outgoing: Pipe, *, opened: bool):
        self.incoming = incoming
        self.outgoing = outgoing
        self.closed = False
        self._connection = connection
        self._process = process
        self._opened = opened
        self._ended = False  # what this end sends
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
            if self.incoming.is_broken() or (self.outgoing.closed and self.outgoing.severed_at is None):
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
        """Reset the connection, as the system does for a process that is gone."""
        self._close(None)

    async def _check(self) -> None:
        """Wait while the process stands still, and raise what keeps this end from being used."""
        if self._process.frozen:
            await self._process.turn()
        if self._process.alive and not self.closed and trio.current_time() >= self._dead_at():
            self.abort()
            raise trio.BrokenResourceError("the other end has not answered for too long")
        if not self._process.alive:
            raise trio.BrokenResourceError("the process is gone")
        if self.closed:
            raise trio.ClosedResourceError

    def _dead_at(self) -> float:
        """When the system finds that nothing comes through any more."""
        since = [pipe.severed_at for pipe in (self.incoming, self.outgoing)] if self._opened else []
        return min((at + KEEP_ALIVE_SECONDS for at in since if at is not None), default=math.inf)

    def _close(self, last: bytes | None) -> None:
        if self.closed:
            return
        self.closed = self.incoming.closed = True
        self._end(last)
        self.incoming.tell()
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
    """Accepts what connects to a process."""

    def __init__(self, network: Network, process: Process) -> None:
        self.process = process
        self._network = network
        self._send, self._receive = trio.open_memory_channel[End](BACKLOG)
        self._closed = False

    def offer(self, end: End) -> None:
        """Raises OSError."""
        try:
            self._send.send_nowait(end)
        except trio.WouldBlock:
            raise ConnectionRefusedError(f"the backlog of {self.process.host} is full") from None

    async def accept(self) -> End:
        while True:
            await self.process.turn()
            end = await self._receive.receive()
            if not end.closed:
                return end

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.forget(self)
            self.process.listeners.pop(self, None)
            self._receive.close()
            self._send.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()
