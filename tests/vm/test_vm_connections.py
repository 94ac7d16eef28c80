"""Connections to VMs by another process, and those that ssh fetches from the worker."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from harness.processes import no_descriptors

from orchard.vm import connector, vm_connections
from orchard.vm.driver import DriverError
from orchard.vm.vm_connections import ConnectorProcess


@pytest.mark.parametrize(
    ("host", "port", "permitted"),
    [
        ("192.168.64.7", 22, True),
        ("10.0.0.1", 65535, True),
        ("172.16.0.1", 1, True),
        ("fd00::7", 22, True),
        ("127.0.0.1", 22, False),
        ("::1", 22, False),
        ("::ffff:127.0.0.1", 22, False),
        ("::ffff:10.0.0.1", 22, True),
        ("0.0.0.0", 22, False),
        ("169.254.169.254", 80, False),
        ("fe80::1", 22, False),
        ("224.0.0.1", 22, False),
        ("255.255.255.255", 22, False),
        ("8.8.8.8", 53, False),
        ("2001:4860:4860::8888", 53, False),
        ("localhost", 22, False),
        ("192.168.64.7", 0, False),
        ("192.168.64.7", 65536, False),
    ],
)
def test_connector_connects_to_private_addresses_only(host: str, port: int, permitted: bool) -> None:
    assert connector.is_permitted(host, port) is permitted


@contextmanager
def served() -> Iterator[socket.socket]:
    """Run the connector's loop in a thread, which also connects to this host, and yield the worker's end."""
    mine, theirs = socket.socketpair()
    thread = threading.Thread(target=connector.serve_worker, args=(theirs, lambda host, port: host != "192.0.2.9"))
    thread.start()
    with mine, theirs:
        yield mine
        mine.shutdown(socket.SHUT_RDWR)
        thread.join()


def asked(control: socket.socket, request: bytes) -> tuple[bytes, list[int]]:
    mine, theirs = socket.socketpair()
    with mine:
        with theirs:
            socket.send_fds(control, [request.ljust(connector.REQUEST_BYTES)], [theirs.fileno()])
        answer, found, _, _ = socket.recv_fds(mine, 256, 1)
    return answer, found


def test_connector_answers_with_a_connection_or_the_number_of_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, served() as control:
        port = server.getsockname()[1]
        answer, (descriptor,) = asked(control, b"127.0.0.1 %d" % port)
        assert answer == b"0"
        with socket.socket(fileno=descriptor) as connection, server.accept()[0] as accepted:
            connection.setblocking(True)
            accepted.sendall(b"hello")
            assert connection.recv(10) == b"hello"
        server.close()
        refusals = {
            b"127.0.0.1 %d" % port: errno.ECONNREFUSED,
            b"192.0.2.9 22": errno.EPERM,
            b"127.0.0.1": errno.EINVAL,
        }
        for request, number in refusals.items():
            assert asked(control, request) == (b"%d" % number, [])


def test_request_without_a_free_descriptor_fails_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, served() as control:
        request = b"127.0.0.1 %d" % server.getsockname()[1]
        mine, theirs = socket.socketpair()
        with mine, no_descriptors(), theirs:
            socket.send_fds(control, [request.ljust(connector.REQUEST_BYTES)], [theirs.fileno()])
            theirs.close()
            assert mine.recv(1) == b""
        answer, (descriptor,) = asked(control, request)
        os.close(descriptor)
        assert answer == b"0"


def test_many_requests_at_a_time_get_a_connection_each() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server, served() as control:
        request = b"127.0.0.1 %d" % server.getsockname()[1]
        ends = [socket.socketpair() for _ in range(50)]
        for _, theirs in ends:
            socket.send_fds(control, [request.ljust(connector.REQUEST_BYTES)], [theirs.fileno()])
            theirs.close()
        peers = set()
        for mine, _ in ends:
            _, (descriptor,), _, _ = socket.recv_fds(mine, 256, 1)
            mine.close()
            with socket.socket(fileno=descriptor) as connection:
                peers.add(connection.getsockname())
        assert len(peers) == 50


async def test_addresses_that_the_connector_refuses_are_connected_to_directly() -> None:
    process = ConnectorProcess()
    try:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, await process.connect("127.0.0.1", listener.socket.getsockname()[1]) as stream:
            assert stream.socket.getpeername() == listener.socket.getsockname()
    finally:
        process.close()


async def test_connection_of_the_connector_is_not_passed_on_to_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_connections, "is_permitted", lambda host, port: True)
    process = ConnectorProcess()
    # In its place, a loop that connects to this host, too.
    with served() as control, process._control:
        process._control = control
        control.setblocking(False)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, await process.connect("127.0.0.1", listener.socket.getsockname()[1]) as stream:
            assert not os.get_inheritable(stream.socket.fileno())
            async with await listener.accept() as accepted:
                await accepted.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
    process._process.wait()


async def test_connector_ends_with_the_worker() -> None:
    process = ConnectorProcess()
    process.close()
    assert process._process.returncode == 0


async def test_end_of_the_connector_ends_the_worker_and_fails_connections() -> None:
    process = ConnectorProcess()
    try:
        process._process.kill()
        with pytest.raises(DriverError):
            await process.wait_ended()
        # The kernel's two words for a peer that is gone.
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            await process.connect("10.255.255.1", 22)
    finally:
        process.close()


@pytest.mark.needs("ssh")
async def test_reason_why_there_is_no_connection_reaches_ssh(tmp_path: Path) -> None:
    async def refuse(host: str, port: int) -> trio.SocketStream:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    async with vm_connections.offered(refuse, "10.0.0.1", 22, tmp_path) as options:
        command = ["ssh", "-F", "/dev/null", *options, "user@10.0.0.1"]
        done = await trio.run_process(command, capture_stderr=True, check=False)
    assert done.returncode == 255
    assert b"No route to host" in done.stderr
