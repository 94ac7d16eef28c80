"""TCP connections over real sockets: keep-alive, unacknowledged data, and splicing two streams.

Connections whose peer is cut off are tested in tests/cluster/test_partition.py.
"""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.processes import GENEROUS

from orchard import controller
from orchard.net import tcp
from orchard.net.tcp import Unacknowledged


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await tcp.connect(*listener.socket.getsockname()) as ours, await listener.accept() as theirs:
        yield ours, theirs


# ---- unacknowledged data -------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has tcp_info")
async def test_data_that_a_live_peer_does_not_read_is_pending_but_not_silent() -> None:
    # More than the buffers of both kernels hold.
    size = 20_000_000
    async with connected() as (ours, theirs):
        with trio.fail_after(GENEROUS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.send_all, bytes(size))
                await trio.testing.wait_all_tasks_blocked()
                assert tcp.unacknowledged(ours) == Unacknowledged(pending=True, silent_seconds=0.0)
                while size:
                    size -= len(await theirs.receive_some())
            # The last acknowledgement is still under way.
            while tcp.unacknowledged(ours).pending:
                await trio.lowlevel.checkpoint()
            assert tcp.unacknowledged(ours) == Unacknowledged()


async def test_unacknowledged_is_empty_for_anything_but_an_open_tcp_connection() -> None:
    memory, _ = trio.testing.memory_stream_pair()
    assert tcp.unacknowledged(memory) == Unacknowledged()
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    async with one, other:
        assert tcp.unacknowledged(one) == Unacknowledged()
    async with connected() as (ours, _):
        await ours.aclose()
        assert tcp.unacknowledged(ours) == Unacknowledged()


# ---- keep-alive ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")
@pytest.mark.parametrize("encrypted", [False, True])
async def test_user_timeout_of_a_connection_can_be_disabled(encrypted: bool) -> None:
    async with connected() as (ours, _):
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 50_000
        stream = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="x") if encrypted else ours
        tcp.disable_user_timeout(stream)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


async def test_accepted_connections_have_keep_alive_and_no_user_timeout(tmp_path: Path) -> None:
    settings = controller.ControllerSettings(data_dir=tmp_path, host="127.0.0.1", port=0, tls=False)
    (listener,), _ = await controller._listen(settings)
    assert isinstance(listener, trio.SocketListener)
    async with listener, await tcp.connect(*listener.socket.getsockname()), await listener.accept() as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, interval, count = (accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)
        assert idle + interval * count <= 60
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


# ---- splice --------------------------------------------------------------------------------------------------------


async def test_splice_copies_both_ways_and_all_that_came_before_the_end() -> None:
    one, first = trio.testing.memory_stream_pair()
    other, second = trio.testing.memory_stream_pair()
    ended: list[str] = []

    async def run() -> None:
        ended.append(await tcp.splice(one, other))

    with trio.fail_after(GENEROUS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await first.send_all(b"ping")
            assert await second.receive_some() == b"ping"
            await second.send_all(b"pong")
            assert await first.receive_some() == b"pong"
            await first.send_all(b"last")
            await first.send_eof()
    assert await second.receive_some() == b"last"
    assert ended == [""]


async def test_splice_says_why_a_stream_broke_and_ignores_a_broken_sink() -> None:
    one, first = trio.testing.memory_stream_pair()
    other, second = trio.testing.memory_stream_pair()
    await second.receive_stream.aclose()
    await first.send_all(b"lost")

    async def fail() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await other.receive_stream.aclose()

    with trio.fail_after(GENEROUS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            assert (await tcp.splice(one, other)).startswith("the connection broke")
