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
import time

from load import BARE, CONTROLLER, NO_AUTH, Server, request, running

REQUEST = request("GET", "/v1/")
ASKED = 500  # times by the client that is at work
ROUNDS = 5


class Waiting:
    """A server, and the idle connections to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.before = server.memory()
        self._idle: list[socket.socket] = []

    def fill(self, count: int) -> None:
        for number in range(count):
            connection = self.server.connect()
            if number % 2:
                ask(connection)
            self._idle.append(connection)

    def waits(self) -> list[float]:
        """Give the milliseconds of each answer to a client that is at work."""
        with self.server.connect() as connection:
            return sorted(ask(connection) for _ in range(ASKED))


def ask(connection: socket.socket) -> float:
    began = time.perf_counter()
    connection.sendall(REQUEST)
    connection.recv(4096)
    return 1000 * (time.perf_counter() - began)


def show(what: str, rounds: list[list[float]]) -> None:
    medians, worst = (sorted(waits[at] for waits in rounds) for at in (ASKED // 2, ASKED * 99 // 100))
    middle = len(rounds) // 2
    print(
        f"{what:32} p50 {medians[middle]:6.2f} ms ({medians[0]:.2f} to {medians[-1]:.2f})"
        f"   p99 {worst[middle]:6.2f} ms ({worst[0]:.2f} to {worst[-1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench idle")
    parser.add_argument("--connections", type=int, default=9_000, help="idle ones of each; default: %(default)s")
    count = parser.parse_args().connections
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with running(*CONTROLLER, NO_AUTH) as controller, running(BARE) as bare:
        servers = {"controller": Waiting(controller), "bare trio + h11": Waiting(bare)}
        for phase in ("alone", f"beside {count:,} idle"):
            rounds: dict[str, list[list[float]]] = {name: [] for name in servers}
            for _ in range(ROUNDS):
                for name, server in servers.items():
                    rounds[name].append(server.waits())
            for name in servers:
                show(f"{name}, {phase}", rounds[name])
            if phase == "alone":
                for server in servers.values():
                    server.fill(count)
        for name, server in servers.items():
            each = (server.server.memory() - server.before) / count
            print(f"{name}: {server.before / 1024:.0f} MiB before, {each:.1f} KiB for each idle connection")


if __name__ == "__main__":
    main()
