"""The cost of idle connections over TLS and in the clear: memory for each, and the delay of other clients.

    ./run bench idle [--connections N]

Controllers over TLS and in the clear and a bare trio + h11 server are processes of their own. Each idle connection has
asked for something once; `./run bench strangers` has those that have not. Shown are the KiB of each connection and how
long a busy client waits for its answers, without and with the idle connections.
"""

from __future__ import annotations

import argparse
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from subprocess import PIPE, Popen

from load import BARE, CONTROLLER, CONTROLLER_TLS, NO_AUTH, Server, connect, request, running
from measure import Variant, compare

REQUEST = request("GET", "/v1/")
# Requests of the busy client.
ASKED = 500


class Waiting:
    """A server, and the idle connections to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        with server.connect() as connection:
            ask(connection)
        self.before = server.memory()
        # Milliseconds: the 99th percentile of each round.
        self.slowest: list[float] = []

    def work(self) -> None:
        """Be a busy client for one round."""
        with self.server.connect() as connection:
            self.slowest.append(statistics.quantiles((ask(connection) for _ in range(ASKED)), n=100)[98])


def hold(port: int, count: int, kind: str) -> None:
    """Keep connections open until stdin ends, in a process of their own, because descriptors are limited per process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    idle = []
    for _ in range(count):
        idle.append(connect(port, tls=kind == "tls"))
        ask(idle[-1])
    print("open", flush=True)
    sys.stdin.read()


def ask(connection: socket.socket) -> float:
    """Send a request, wait for its answer, and return the milliseconds of that."""
    began = time.perf_counter()
    connection.sendall(REQUEST)
    connection.recv(4096)
    return 1000 * (time.perf_counter() - began)


@contextmanager
def holding(server: Server, count: int, kind: str) -> Iterator[None]:
    """Keep connections to a server open for the time of the block. Raises SystemExit if they cannot be opened."""
    command = [sys.executable, __file__, "--hold", str(server.port), str(count), kind]
    # The process ends with its stdin.
    with Popen(command, stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{count} connections could not be opened")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench idle")
    parser.add_argument(
        "--connections", type=int, default=10_000, help="idle ones of each server; default: %(default)s"
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        servers = {
            "controller, TLS": Waiting(stack.enter_context(running(*CONTROLLER_TLS, NO_AUTH))),
            "controller, in the clear": Waiting(stack.enter_context(running(*CONTROLLER, NO_AUTH))),
            "bare trio + h11": Waiting(stack.enter_context(running(BARE))),
        }
        if options.connections:
            beside_idle(servers, options.connections)


def beside_idle(servers: Mapping[str, Waiting], count: int) -> None:
    show(servers, "alone")
    with ExitStack() as stack:
        for waiting in servers.values():
            kind = "tls" if waiting.server.tls else "plain"
            stack.enter_context(holding(waiting.server, count, kind))
        show(servers, f"beside {count:,} idle")
        for name, waiting in servers.items():
            each = (waiting.server.memory() - waiting.before) / count
            print(f"{name}: {waiting.before / 1024:.0f} MiB before, {each:.1f} KiB for each idle connection")


def show(servers: Mapping[str, Waiting], phase: str) -> None:
    compare(*(Variant(f"{name}, {phase}", one.work, ASKED, one.server.cpu) for name, one in servers.items()))
    for name, waiting in servers.items():
        # The first round only warms up.
        slowest = sorted(waiting.slowest[1:])
        between = f"({slowest[0]:.2f} to {slowest[-1]:.2f})"
        print(f"{name}, {phase}: p99 {statistics.median(slowest):.2f} ms {between}")
        waiting.slowest.clear()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hold"]:
        hold(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
