"""What the system knows of a connection, by real ones. (Those that are cut off: test_partition.)"""

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

from orchard import controller
from orchard.net import tcp
from orchard.net.tcp import Outgoing


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await tcp.connect(*listener.socket.getsockname()) as ours, await listener.accept() as theirs:
        yield ours, theirs


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
async def test_what_is_not_taken_is_pending_and_answered_for() -> None:
    size = 20_000_000  # more than the system keeps
    async with connected() as (ours, theirs):
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.send_all, bytes(size))
                await trio.testing.wait_all_tasks_blocked()
                assert tcp.outgoing(ours) == Outgoing(pending=True, unanswered=0.0)
                while size:
                    size -= len(await theirs.receive_some())
            while tcp.outgoing(ours).pending:  # the last acknowledgement is on its way
                await trio.lowlevel.checkpoint()
            assert tcp.outgoing(ours) == Outgoing()


async def test_of_what_is_no_connection_nothing_is_known() -> None:
    memory, _ = trio.testing.memory_stream_pair()
    assert tcp.outgoing(memory) == Outgoing()
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    async with one, other:
        assert tcp.outgoing(one) == Outgoing()
    async with connected() as (ours, _):
        await ours.aclose()
        assert tcp.outgoing(ours) == Outgoing()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT")
@pytest.mark.parametrize("encrypted", [False, True])
async def test_data_under_way_may_wait_where_that_is_wanted(encrypted: bool) -> None:
    async with connected() as (ours, _):
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 50_000
        tcp.be_patient(trio.SSLStream(ours, ssl.create_default_context(), server_hostname="x") if encrypted else ours)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


async def test_clients_that_only_wait_are_looked_after_and_may_take_their_time(tmp_path: Path) -> None:
    settings = controller.ControllerSettings(data_dir=tmp_path, host="127.0.0.1", port=0, tls=False)
    (listener,), _ = await controller._listen(settings)
    assert isinstance(listener, trio.SocketListener)
    async with listener, await tcp.connect(*listener.socket.getsockname()), await listener.accept() as accepted:
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, each, count = (accepted.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)
        assert idle + each * count <= 60
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
