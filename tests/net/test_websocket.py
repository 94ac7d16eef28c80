"""WebSockets over memory streams, on a virtual clock: backpressure, pings, closes, and trio-websocket as the peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio
from harness.peers import KEY, Peer, frame, pair
from trio.testing import wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream

from orchard.base.nursery import unwrap_groups
from orchard.net import websocket, wsframes
from orchard.net.websocket import TunnelStream
from orchard.net.wsframes import BINARY, CLOSE, PING, PONG, TEXT, Close, FrameEvent, Ping, Pong

# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [False, True])
async def test_bytes_are_carried_both_ways(autojump_clock: Any, client: bool) -> None:
    async with pair(client=client) as ends:
        await ends.peer.send(BINARY, b"hello ")
        await ends.peer.send(TEXT, "wörld".encode())
        await wait_all_tasks_blocked()
        assert await ends.end.receive_some() == "hello wörld".encode()
        size = websocket._SEND_BYTES + 1
        await ends.end.send_all(b"x" * size)
        messages = await ends.peer.events()
        assert b"".join(messages) == b"x" * size  # type: ignore[arg-type]
        assert max(map(len, messages)) <= 64 * 1024, "many clients limit the size of a message"  # type: ignore[arg-type]


async def test_bytes_received_with_the_handshake_are_delivered(autojump_clock: Any) -> None:
    data = frame(BINARY, b"early", KEY)
    for cut in range(len(data) + 1):
        async with pair(early=data[:cut]) as ends:
            await ends.memory.send_all(data[cut:] + frame(BINARY, b" bird", KEY))
            await wait_all_tasks_blocked()
            assert await ends.end.receive_some() == b"early bird"


async def test_receive_some_returns_at_most_max_bytes(autojump_clock: Any) -> None:
    async with pair() as ends:
        for part in (b"abcdef", b"gh"):
            await ends.peer.send(BINARY, part)
            await wait_all_tasks_blocked()
        assert [await ends.end.receive_some(n) for n in (1, 2, 4, None)] == [b"a", b"bc", b"defg", b"h"]
        assert ends.end._received.size == 0
        with trio.move_on_after(1) as patience:
            await ends.end.receive_some(1)
        assert patience.cancelled_caught


async def test_every_frame_of_a_client_has_a_new_masking_key(autojump_clock: Any) -> None:
    keys = set()
    async with pair(client=True) as ends:
        for _ in range(50):
            await ends.end.send_all(b"x")
            data = await ends.memory.receive_some()
            assert data[:2] == b"\x82\x81"
            keys.add(bytes(data[2:6]))
    assert len(keys) == 50


# ---- backpressure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 50_000])
async def test_a_paused_reader_makes_the_sender_wait(autojump_clock: Any, size: int) -> None:
    async with pair(narrow=True) as ends:
        sent = 0

        async def pour() -> None:
            nonlocal sent
            while True:
                await ends.peer.send(BINARY, b"x" * size)
                sent += size

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            await wait_all_tasks_blocked()
            assert 0 < sent < websocket._READ_AHEAD_BYTES + websocket._RECEIVE_BYTES
            assert len(ends.end._received.parts) <= websocket._READ_AHEAD_BYTES // websocket._PART_BYTES + 1
            before, got = sent, 0
            while got <= 2 * before:
                got += len(await ends.end.receive_some())
            nursery.cancel_scope.cancel()


async def test_pings_are_answered_while_payload_is_not_taken(autojump_clock: Any) -> None:
    async with pair() as ends:
        await ends.peer.send(BINARY, b"x" * (websocket._READ_AHEAD_BYTES // 2))
        await ends.peer.send(PING, b"are you there?")
        assert await ends.peer.events() == [Pong(b"are you there?")]
        assert len(await ends.end.receive_some()) == websocket._READ_AHEAD_BYTES // 2


async def test_a_peer_that_reads_nothing_is_read_from_and_gets_the_newest_pong_later(autojump_clock: Any) -> None:
    async with pair(narrow=True) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(ends.end.send_all, b"x" * 100_000)
        await wait_all_tasks_blocked()
        for number in range(1000):
            await ends.peer.send(PING, b"%d" % number)
            await ends.peer.send(BINARY, b"y" * 1000)
            assert len(await ends.end.receive_some()) == 1000
        size = 0
        pongs: list[FrameEvent] = []
        while pongs[-1:] != [Pong(b"999")]:
            for event in await ends.peer.events():
                if isinstance(event, Pong):
                    pongs.append(event)
                else:
                    size += len(event)  # type: ignore[arg-type]
        assert size == 100_000
        assert len(pongs) <= 2, "only the newest ping needs a pong"


# ---- pings ---------------------------------------------------------------------------------------------------------


async def test_any_frame_from_the_peer_counts_as_a_sign_of_life(autojump_clock: Any) -> None:
    async with pair(ping_interval=10) as ends:
        for opcode in (PONG, BINARY, PING):
            while not any(isinstance(event, Ping) for event in await ends.peer.events()):
                pass
            await ends.peer.send(opcode, b"x")
        assert trio.current_time() == 30
        assert ends.end.closed is None


async def test_a_silent_peer_is_dead_after_two_ping_intervals(autojump_clock: Any) -> None:
    async with pair(ping_interval=10) as ends:
        await ends.peer.send(BINARY, b"x")
        assert await ends.end.receive_some() == b"x"
        with pytest.raises(trio.BrokenResourceError, match="does not answer to pings"):
            await ends.end.receive_some()
        assert trio.current_time() == 20
        assert await ends.peer.rest() == [Ping(b""), Close(1011, "pings are not answered")]
        await ends.end._done.wait()


@pytest.mark.parametrize("pinged", [False, True])
async def test_a_slow_reader_is_not_dead(autojump_clock: Any, pinged: bool) -> None:
    async with pair(ping_interval=10, narrow=True) as ends, trio.open_nursery() as nursery:
        if pinged:
            assert await ends.peer.events() == [Ping(b"")]
        nursery.start_soon(ends.end.send_all, b"x" * 100_000)
        await trio.sleep(1000)
        assert ends.end.closed is None
        nursery.cancel_scope.cancel()


async def test_a_peer_whose_pong_waits_behind_its_data_is_not_dead(autojump_clock: Any) -> None:
    async with pair(ping_interval=10) as ends:
        await ends.peer.send(BINARY, b"x" * websocket._READ_AHEAD_BYTES)
        await ends.peer.send(PONG)
        await trio.sleep(1000)
        assert ends.end.closed is None


# ---- closes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [False, True])
@pytest.mark.parametrize(("payload", "answer"), [(b"", Close(1005)), (b"\x03\xe8bye", Close(1000, "bye"))])
async def test_a_close_is_answered_and_ends_the_stream_after_all_bytes(
    autojump_clock: Any, client: bool, payload: bytes, answer: Close
) -> None:
    async with pair(client=client) as ends:
        await ends.peer.send(BINARY, b"last words")
        await ends.peer.send(CLOSE, payload)
        assert await ends.peer.rest() == [answer]
        assert await ends.end.receive_some() == b"last words"
        assert await ends.end.receive_some() == b""
        assert ends.end.closed == answer
        with pytest.raises(trio.BrokenResourceError):
            await ends.end.send_all(b"x")
        await ends.end.aclose()
        assert trio.current_time() == 0


async def test_an_irregular_close_raises_broken_resource_error(autojump_clock: Any) -> None:
    async with pair() as ends:
        await ends.peer.send(BINARY, b"last words")
        await ends.peer.send(CLOSE, b"\x03\xe9gone")
        assert await ends.end.receive_some() == b"last words"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="closed with 1001: gone"):
                await ends.end.receive_some()


async def test_a_connection_lost_without_a_close_raises_broken_resource_error(autojump_clock: Any) -> None:
    async with pair() as ends:
        await ends.peer.send(BINARY, b"last words")
        await ends.memory.aclose()
        assert await ends.end.receive_some() == b"last words"
        with pytest.raises(trio.BrokenResourceError, match="the connection was lost"):
            await ends.end.receive_some()
        assert ends.end.closed == Close(1006)
        await ends.end.aclose()
        assert trio.current_time() == 0


async def test_aclose_waits_for_the_peers_close_up_to_a_limit(autojump_clock: Any) -> None:
    async with pair() as ends:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends.end.aclose, 4000, "é" * 100)
            assert await ends.peer.events() == [Close(4000, "é" * 61)]
            # These bytes are dropped.
            await ends.peer.send(BINARY, b"x" * 10 * websocket._READ_AHEAD_BYTES)
            await trio.sleep(1)
            await ends.peer.send(PING, b"too late")
            await wait_all_tasks_blocked()
            await ends.peer.send(CLOSE, b"\x0f\xa0")
        assert trio.current_time() == 1
        with trio.move_on_after(1) as silence:
            await ends.peer.events()
        assert silence.cancelled_caught, "no frame follows a close"
        assert ends.end.closed == Close(4000, "é" * 100)
        assert ends.end._received.parts == []
    async with pair() as ends:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends.end.aclose)
            nursery.start_soon(ends.end.aclose)
        assert trio.current_time() - began == websocket.CLOSE_SECONDS
        assert await ends.peer.events() == [Close(1000)]


async def test_a_frame_being_sent_is_completed_before_the_close(autojump_clock: Any) -> None:
    async with pair(narrow=True) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(ends.end.send_all, b"x" * 100_000)
        await wait_all_tasks_blocked()
        nursery.start_soon(ends.end.aclose, 1001, "the VM is gone")
        await wait_all_tasks_blocked()
        *parts, close = await ends.peer.rest()
        assert sum(map(len, parts)) == 100_000  # type: ignore[arg-type]
        assert close == Close(1001, "the VM is gone")
        await ends.peer.send(CLOSE)


async def test_nothing_is_sent_after_an_incomplete_frame(autojump_clock: Any) -> None:
    async with pair(narrow=True) as ends:
        with trio.move_on_after(1):
            await ends.end.send_all(b"x" * 50_000)
        with pytest.raises(trio.BrokenResourceError):
            await ends.end.send_all(b"y")
        await ends.peer.send(PING)
        await ends.end.aclose()
        await ends.memory.send_stream.aclose()
        got = b""
        with trio.move_on_after(1):
            while True:
                got += await ends.memory.receive_some()
        assert set(got[4:]) <= {ord("x")}


VIOLATIONS = {
    "not masked": (1002, b"\x82\x05hello"),
    "a reserved bit": (1002, b"\xc2\x80" + KEY),
    "a fragmented ping": (1002, b"\x09\x80" + KEY),
    "text that is not UTF-8": (1007, b"\x81\x81\x00\x00\x00\x00\xff"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_a_protocol_violation_closes_with_its_code(autojump_clock: Any, name: str) -> None:
    code, data = VIOLATIONS[name]
    async with pair() as ends:
        await ends.peer.send(BINARY, b"before")
        await ends.memory.send_all(data + frame(BINARY, b"after", KEY))
        assert await ends.end.receive_some() == b"before"
        with pytest.raises(trio.BrokenResourceError, match=f"closed with {code}"):
            await ends.end.receive_some()
        (close,) = await ends.peer.rest()
        assert isinstance(close, Close)
        assert close.code == code
        assert close.reason
        await ends.end.aclose()
        assert trio.current_time() == 0


# ---- trio-websocket as the peer ------------------------------------------------------------------------------------


@asynccontextmanager
async def other_server(stream: trio.abc.Stream) -> AsyncIterator[Callable[[], WebSocketConnection]]:
    """Serve a WebSocket with trio-websocket; the function returns the connection once the handshake is done."""
    async with trio.open_nursery() as nursery:
        ends: list[WebSocketConnection] = []

        async def accept() -> None:
            ends.append(await (await wrap_server_stream(nursery, stream)).accept())

        nursery.start_soon(accept)
        yield lambda: ends[0]
        nursery.cancel_scope.cancel()


async def test_tunnel_with_trio_websocket_as_the_client(autojump_clock: Any) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        request = b""

        async def serve() -> None:
            nonlocal request
            while not request.endswith(b"\r\n\r\n"):
                request += await ours.receive_some()
            key = next(line for line in request.decode().split("\r\n") if line.lower().startswith("sec-websocket-key"))
            answer = f"Sec-WebSocket-Accept: {wsframes.accept_value(key.partition(': ')[2])}"
            head = f"HTTP/1.1 101 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{answer}\r\n\r\n"
            await ours.send_all(head.encode())

        nursery.start_soon(serve)
        # trio-websocket declares sockets and TLS, but any stream will do.
        peer = await wrap_client_stream(nursery, theirs, "h", "/")  # type: ignore[arg-type]
        end = TunnelStream(ours, client=False, ping_interval=10)
        nursery.start_soon(end.run)
        await conversation(end, peer)
        nursery.cancel_scope.cancel()


async def test_tunnel_with_trio_websocket_as_the_server(autojump_clock: Any) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with other_server(theirs) as server, trio.open_nursery() as nursery:
        await ours.send_all(
            b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        head = await ours.receive_some()
        assert wsframes.accept_value("dGhlIHNhbXBsZSBub25jZQ==").encode() in head
        end = TunnelStream(ours, client=True, early=bytes(head).partition(b"\r\n\r\n")[2])
        nursery.start_soon(end.run)
        await wait_all_tasks_blocked()
        await conversation(end, server())
        nursery.cancel_scope.cancel()


async def conversation(end: TunnelStream, peer: WebSocketConnection) -> None:
    for size in (1, 125, 126, 65535, 65536, 100_000):
        await peer.send_message(b"x" * size)
        got = 0
        while got < size:
            got += len(await end.receive_some())
        await end.send_all(b"y" * size)
        message = b""
        while len(message) < size:
            part = await peer.get_message()
            assert isinstance(part, bytes)
            message += part
        assert message == b"y" * size
    await peer.ping()
    await trio.sleep(100)
    assert end.closed is None
    await end.aclose(4000, "enough")
    with pytest.raises(ConnectionClosed) as closed:
        await peer.get_message()
    assert closed.value.reason is not None
    assert (closed.value.reason.code, closed.value.reason.reason) == (4000, "enough")
    assert trio.current_time() == 100


# ---- messages ------------------------------------------------------------------------------------------------------


def messages_over(
    stream: trio.abc.Stream, *, client: bool = False, early: bytes = b""
) -> AbstractAsyncContextManager[WebSocketConnection]:
    return websocket.open_messages(
        stream, client=client, early=early, message_queue_size=1, max_message_size=1000, receive_buffer_size=None
    )


@pytest.mark.parametrize("client", [False, True])
async def test_frames_read_together_are_not_delivered_after_our_close(autojump_clock: Any, client: bool) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    peer = Peer(theirs, client=not client)
    key = None if client else KEY
    async with messages_over(ours, client=client):
        # The second message waits for room in the queue, where the reader learns of the close.
        await theirs.send_all(
            frame(BINARY, b"x", key) * 2 + frame(PING, b"", key) * 2 + frame(BINARY, b"x" * 2000, key)
        )
        await wait_all_tasks_blocked()
        await peer.send(CLOSE)
    assert await peer.events() == [Close(1000)]
    assert trio.current_time() == 0


@pytest.mark.parametrize("client", [False, True])
async def test_a_ping_is_ignored_while_our_close_waits_behind_a_message(autojump_clock: Any, client: bool) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    peer = Peer(theirs, client=not client)
    events: list[FrameEvent] = []

    async def answer() -> None:
        await wait_all_tasks_blocked()
        await peer.send(PING)
        events.extend(await peer.rest())
        await peer.send(CLOSE)

    async with trio.open_nursery() as nursery, messages_over(ours, client=client) as messages:
        nursery.start_soon(messages.send_message, b"x" * 100)
        await wait_all_tasks_blocked()
        nursery.start_soon(answer)
    *parts, close = events
    assert b"".join(parts) == b"x" * 100  # type: ignore[arg-type]
    assert close == Close(1000)
    assert trio.current_time() == 0


@pytest.mark.parametrize("client", [False, True])
async def test_a_violation_in_messages_is_answered_with_a_close(autojump_clock: Any, client: bool) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    peer = Peer(theirs, client=not client)
    # A client must mask its frames, and a server must not.
    await theirs.send_all(frame(BINARY, b"x", KEY if client else None))
    async with messages_over(ours, client=client) as messages:
        with pytest.raises(ConnectionClosed):
            await messages.get_message()
    assert await peer.events() == [Close(1002)]


async def test_a_task_that_sends_while_a_violation_is_answered_gets_connection_closed() -> None:
    async def use(messages: WebSocketConnection) -> None:
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(messages.ping)
                nursery.start_soon(messages.get_message)
                await messages.send_message(b"x")

    # Which task goes on first is random.
    for _ in range(200):
        ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
        # A client must mask its frames.
        async with ours, theirs, messages_over(ours, early=frame(BINARY, b"x", None)) as messages:
            with pytest.raises(ConnectionClosed):
                await use(messages)
