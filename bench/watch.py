"""Measure how long it takes until many watchers of a VM have received one change.

    ./run bench watch [--watchers N] [--changes N]

Each watcher has a connection of its own to a controller in another process. The time is from the request of a change to
the arrival of its line at the last watcher. The baseline is a bare trio server that sends the same bytes over as many
connections each time it receives a byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import select
import socket
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio
from cluster import AUTHORIZATION, prepare
from load import CONTROLLER, Server, request, running
from measure import Variant, compare

RECEIVE_BYTES = 65536


class Watchers:
    """Connections to a server that all receive the same lines."""

    def __init__(self, server: Server, count: int, greeting: bytes) -> None:
        self._poll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        for _ in range(count):
            connection = server.connect()
            connection.sendall(greeting)
            self._poll.register(connection, select.EPOLLIN)
            self._open[connection.fileno()] = connection

    def wait_all(self, line: bytes) -> None:
        """Wait until each connection has received something that contains `line`."""
        waiting = set(self._open)
        while waiting:
            for descriptor, _ in self._poll.poll():
                if line in self._open[descriptor].recv(RECEIVE_BYTES):
                    waiting.discard(descriptor)


async def serve_bare(line: bytes) -> None:
    """Send a line over all connections each time "!" arrives over one of them."""
    streams: list[trio.SocketStream] = []

    async def serve(stream: trio.SocketStream) -> None:
        streams.append(stream)
        async for data in stream:
            if data == b"!":
                for other in streams:
                    nursery.start_soon(other.send_all, line)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        print(f"listening on 127.0.0.1:{listeners[0].socket.getsockname()[1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench watch")
    parser.add_argument("--watchers", type=int, default=1_000, help="default %(default)s")
    parser.add_argument("--changes", type=int, default=30, help="default %(default)s")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home), 2, 1)
        with (
            running(*CONTROLLER, "--worker-offline-timeout", "100000", home=Path(home)) as controller,
            running(__file__, "--bare") as server,
            controller.connect() as user,
            server.connect() as trigger,
        ):
            watchers = Watchers(controller, options.watchers, watch_request())
            watchers.wait_all(b"ADDED")
            bare_watchers = Watchers(server, options.watchers, b"?")

            numbers = itertools.count()

            def change() -> None:
                number = next(numbers)
                user.sendall(patch_request(number))
                watchers.wait_all(b'"generation":%d,' % (number + 1))
                user.recv(RECEIVE_BYTES)

            def change_bare() -> None:
                trigger.sendall(b"!")
                bare_watchers.wait_all(b"MODIFIED")

            watched = Variant(f"a change to {options.watchers:,} watchers", change, 1, controller.cpu)
            compare(watched, Variant("the same bytes, bare", change_bare, 1, server.cpu), count=options.changes)
    seconds = sorted(watched.seconds)
    middle = 1000 * statistics.median(seconds)
    print(f"until the last watcher: p50 {middle:.1f} ms ({1000 * seconds[0]:.1f} to {1000 * seconds[-1]:.1f})")


def watch_request() -> bytes:
    return request("GET", "/v1/vms/vm-0?watch=true", authorization=AUTHORIZATION)


def patch_request(number: int) -> bytes:
    return request("PATCH", "/v1/vms/vm-0", json.dumps({"cpu": 1 + number % 8}).encode(), AUTHORIZATION)


if __name__ == "__main__":
    if sys.argv[1:] == ["--bare"]:
        from cluster import running_vm

        from orchard.store import encode_object

        trio.run(serve_bare, b'2f0\r\n{"type":"MODIFIED","object":%b}\n\r\n' % encode_object(running_vm(0)))
    else:
        main()
