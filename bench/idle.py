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
import time

from load import BARE, CONTROLLER, NO_AUTH, Server, request, running
from measure import Variant, compare

REQUEST = request("GET", "/v1/")
ASKED = 500  # times by the client that is at work


class Waiting:
    """A server, and the idle connections to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.before = server.memory()
        self.slowest: list[float] = []
        self._idle: list[socket.socket] = []

    def fill(self, count: int) -> None:
        for number in range(count):
            connection = self.server.connect()
            if number % 2:
                ask(connection)
            self._idle.append(connection)

    def work(self) -> None:
        """Be a client that is at work, and note the milliseconds of the slowest answers but one in a hundred."""
        with self.server.connect() as connection:
            self.slowest.append(statistics.quantiles((ask(connection) for _ in range(ASKED)), n=100)[98])


def ask(connection: socket.socket) -> float:
    began = time.perf_counter()
    connection.sendall(REQUEST)
    connection.recv(4096)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench idle")
    parser.add_argument("--connections", type=int, default=9_000, help="idle ones of each; default: %(default)s")
    count = parser.parse_args().connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running(*CONTROLLER, NO_AUTH) as controller, running(BARE) as bare:
        servers = {"controller": Waiting(controller), "bare trio + h11": Waiting(bare)}
        for phase in ("alone", f"beside {count:,} idle"):
            compare(
                *(
                    Variant(f"{name}, {phase}", server.work, ASKED, server.server.cpu)
                    for name, server in servers.items()
                )
            )
            for name, server in servers.items():
                slowest = sorted(server.slowest[1:])
                between = f"({slowest[0]:.2f} to {slowest[-1]:.2f})"
                print(f"{name}, {phase}: p99 {statistics.median(slowest):.2f} ms {between}")
                server.slowest.clear()
                if phase == "alone":
                    server.fill(count)
        for name, server in servers.items():
            each = (server.server.memory() - server.before) / count
            print(f"{name}: {server.before / 1024:.0f} MiB before, {each:.1f} KiB for each idle connection")


if __name__ == "__main__":
    main()
