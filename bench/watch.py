"""The cost of a change with watchers: of one VM or of everything, few or many, in small and in large clusters.

    ./run bench watch [--watchers N] [--changes N] [--vms N] [--against DIRECTORY]

Each watcher has a connection of its own to a controller in another process, over TLS or in the clear. The time is from
the request of a change to the arrival of its line at the last watcher. The baseline for many watchers is a bare trio
server that sends the same bytes over as many connections, in the clear, each time it receives a byte. The baseline for a
large cluster is one of 100 VMs.

With --against, only many watchers are measured, beside those of the controller of another checkout, which has a `.venv`
of its own. On a machine that is not idle its ratio of CPU times is the one to look at.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import trio
from cluster import AUTHORIZATION, prepare
from load import CONTROLLER, CONTROLLER_TLS, Server, request, running
from measure import Variant, compare

RECEIVE_BYTES = 65536
SMALL_CLUSTER = 100
ONE, EVERYTHING = "/v1/vms/vm-0?watch=true", "/v1/watch"


class Watchers:
    """Connections to a server that all receive the same lines.

    They share the processors with the server, so a line is read without a copy of its own, and not parsed.
    """

    def __init__(self, server: Server, count: int, greeting: bytes) -> None:
        self._poll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        # It has space for a whole TLS record, so that one read takes all that OpenSSL has decrypted.
        self._buffer = bytearray(RECEIVE_BYTES)
        # The last bytes that a watcher has received: the beginning of a line whose end has not arrived.
        self._tails: dict[int, bytes] = {}
        for _ in range(count):
            connection = server.connect()
            connection.sendall(greeting)
            self._poll.register(connection, select.EPOLLIN)
            self._open[connection.fileno()] = connection

    def wait_all(self, line: bytes) -> None:
        """Wait until each connection has received something that contains `line`."""
        waiting, tails, buffer = set(self._open), self._tails, self._buffer
        while waiting:
            for descriptor, _ in self._poll.poll():
                size = self._open[descriptor].recv_into(buffer)
                tail = tails.pop(descriptor, b"")
                if buffer.find(line, 0, size) >= 0 or (tail and line in tail + buffer[:size]):
                    waiting.discard(descriptor)
                else:
                    tails[descriptor] = (tail + buffer[:size])[-len(line) :]


async def serve_bare(line: bytes) -> None:
    """Send a line over all connections that have sent "?" each time "!" arrives over another one."""
    streams: list[trio.SocketStream] = []

    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            if data == b"?":
                streams.append(stream)
                await stream.send_all(b"ready\n")
            else:
                for other in streams:
                    nursery.start_soon(other.send_all, line)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        print(f"listening on 127.0.0.1:{listeners[0].socket.getsockname()[1]}", flush=True)


@contextmanager
def controller_of(vms: int, *, tls: bool, python: str = sys.executable) -> Iterator[Server]:
    """Run a controller, of the checkout of a Python, with a cluster of a size."""
    arguments = (*(CONTROLLER_TLS if tls else CONTROLLER), "--worker-offline-timeout", "100000")
    with tempfile.TemporaryDirectory() as home:
        prepare(Path(home), vms, max(1, vms // 2))
        with running(*arguments, home=Path(home), python=python) as server:
            yield server


@contextmanager
def changing(controller: Server, path: str, watchers: int) -> Iterator[Callable[[], None]]:
    """Return a function that changes a VM, and waits until all of some watchers have received it."""
    numbers = itertools.count()
    with controller.connect() as user:
        watching = Watchers(controller, watchers, request("GET", path, authorization=AUTHORIZATION))
        watching.wait_all(b"ADDED" if path == ONE else b"BOOKMARK")

        def change() -> None:
            number = next(numbers)
            user.sendall(patch_request(number))
            watching.wait_all(b'"generation":%d,' % (number + 1))
            user.recv(RECEIVE_BYTES)

        yield change


def measure_many(watchers: int, changes: int, against: Path | None) -> None:
    """Compare many watchers with a bare server, and with those of another checkout."""
    for path, tls in ((ONE, False), (EVERYTHING, False), (EVERYTHING, True)):
        name = f"{'one VM' if path == ONE else 'everything'}, {watchers:,} watchers{', TLS' * tls}"
        with ExitStack() as stack:

            def measured(
                name: str, python: str, stack: ExitStack = stack, path: str = path, tls: bool = tls
            ) -> Variant:  # fmt: skip
                controller = stack.enter_context(controller_of(2, tls=tls, python=python))
                return Variant(name, stack.enter_context(changing(controller, path, watchers)), 1, controller.cpu)

            watched = measured(name, sys.executable)
            others = [] if against is None else [measured(against.name, str(against / ".venv/bin/python"))]
            server = stack.enter_context(running(__file__, "--bare"))
            trigger = stack.enter_context(server.connect())
            bare_watchers = Watchers(server, watchers, b"?")
            bare_watchers.wait_all(b"ready")

            def change_bare(trigger: socket.socket = trigger, bare_watchers: Watchers = bare_watchers) -> None:
                trigger.sendall(b"!")
                bare_watchers.wait_all(b"MODIFIED")

            compare(watched, *others, Variant("the same bytes, bare", change_bare, 1, server.cpu), count=changes)
        for variant in (watched, *others):
            seconds = sorted(variant.seconds)
            middle = 1000 * statistics.median(seconds)
            print(f"until the last watcher: p50 {middle:.1f} ms ({1000 * seconds[0]:.1f} to {1000 * seconds[-1]:.1f})")
        print()


def measure_large(vms: int, changes: int) -> None:
    """Compare a change in a large cluster with one in a small cluster, each with one watcher of everything."""
    for tls in (False, True):
        with (
            controller_of(vms, tls=tls) as large,
            controller_of(SMALL_CLUSTER, tls=tls) as small,
            changing(large, EVERYTHING, 1) as change_large,
            changing(small, EVERYTHING, 1) as change_small,
        ):
            compare(
                Variant(f"a change among {vms:,} VMs{', TLS' * tls}", change_large, 1, large.cpu),
                Variant(f"a change among {SMALL_CLUSTER:,} VMs{', TLS' * tls}", change_small, 1, small.cpu),
                count=changes,
            )
            print()


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench watch")
    parser.add_argument("--watchers", type=int, default=1_000, help="default %(default)s")
    parser.add_argument("--changes", type=int, default=30, help="default %(default)s")
    parser.add_argument("--vms", type=int, default=10_000, help="VMs of the large cluster; default %(default)s")
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="compare with the checkout in DIRECTORY")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.against is None:
        measure_large(options.vms, options.changes)
    measure_many(options.watchers, options.changes, options.against)


def patch_request(number: int) -> bytes:
    return request("PATCH", "/v1/vms/vm-0", json.dumps({"cpu": 1 + number % 8}).encode(), AUTHORIZATION)


if __name__ == "__main__":
    if sys.argv[1:] == ["--bare"]:
        from cluster import running_vm

        from orchard.store import encode_object

        trio.run(serve_bare, b'2f0\r\n{"type":"MODIFIED","object":%b}\n\r\n' % encode_object(running_vm(0)))
    else:
        main()
