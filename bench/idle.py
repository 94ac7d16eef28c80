"""What idle connections cost: memory for each, and whether anybody else notices.

    ./run bench idle [--connections N]

A controller and a bare trio + h11 server are processes of their own. Half of the connections have asked for something
once, the other half never said a word. Prints KiB for each connection, and how long a client that is at work waits for
its answers, without and with the idle ones.
"""

from __future__ import annotations

import argparse
import resource
import socket
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from subprocess import PIPE, Popen

from load import BARE, CONTROLLER, NO_AUTH, Server, connect, request, running
from measure import Variant, compare

REQUEST = request("GET", "/v1/")
ASKED = 500  # times by the client that is at work


class Waiting:
    """A server, and the idle connections to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.before = server.memory()
        self.slowest: list[float] = []

    def work(self) -> None:
        """Be a client that is at work, and note the milliseconds of the slowest answers but one in a hundred."""
        with self.server.connect() as connection:
            self.slowest.append(statistics.quantiles((ask(connection) for _ in range(ASKED)), n=100)[98])


def hold(port: int, count: int) -> None:
    """Keep idle connections open: in a process of their own, for one has no descriptors for those of two servers."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    idle = [connect(port) for _ in range(count)]
    for connection in idle[::2]:
        ask(connection)
    print("open", flush=True)
    sys.stdin.read()


def ask(connection: socket.socket) -> float:
    began = time.perf_counter()
    connection.sendall(REQUEST)
    connection.recv(4096)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench idle")
    parser.add_argument("--connections", type=int, default=10_000, help="idle ones of each; default: %(default)s")
    count = parser.parse_args().connections
    with ExitStack() as stack:
        servers = {
            "controller": Waiting(stack.enter_context(running(*CONTROLLER, NO_AUTH))),
            "bare trio + h11": Waiting(stack.enter_context(running(BARE))),
        }
        show(servers, "alone")
        for server in servers.values():
            command = [sys.executable, __file__, "--hold", str(server.server.port), str(count)]
            holding = stack.enter_context(Popen(command, stdin=PIPE, stdout=PIPE))  # it ends with its stdin
            assert holding.stdout is not None
            if not holding.stdout.readline():
                raise SystemExit(f"{count} connections could not be opened")
        show(servers, f"beside {count:,} idle")
        for name, server in servers.items():
            each = (server.server.memory() - server.before) / count
            print(f"{name}: {server.before / 1024:.0f} MiB before, {each:.1f} KiB for each idle connection")


def show(servers: Mapping[str, Waiting], phase: str) -> None:
    compare(*(Variant(f"{name}, {phase}", server.work, ASKED, server.server.cpu) for name, server in servers.items()))
    for name, server in servers.items():
        slowest = sorted(server.slowest[1:])
        between = f"({slowest[0]:.2f} to {slowest[-1]:.2f})"
        print(f"{name}, {phase}: p99 {statistics.median(slowest):.2f} ms {between}")
        server.slowest.clear()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hold"]:
        hold(*map(int, sys.argv[2:]))
    else:
        main()
