"""What idle connections cost: memory for each, and whether anybody else notices.

    ./run bench idle [--connections N]

A controller and a bare trio + h11 server are processes of their own. Half of the connections have asked for something
once, the other half never said a word. Prints KiB for each connection, and how long a client that is at work waits for
its answers, without and with the idle ones.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

REQUEST = b"GET /v1/ HTTP/1.1\r\nHost: controller\r\n\r\n"
ASKED = 500  # times by the client that is at work
ROUNDS = 5
BARE = """
import h11, trio
async def serve(stream):
    connection = h11.Connection(h11.SERVER)
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(16384))
        elif type(event) is h11.EndOfMessage:
            parts = [h11.Response(status_code=200, headers=[("Content-Length", "0")]), h11.EndOfMessage()]
            await stream.send_all(b"".join(map(connection.send, parts)))
            connection.start_next_cycle()
        elif type(event) is h11.ConnectionClosed:
            return
async def main():
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        print(f"listening on 127.0.0.1:{listeners[0].socket.getsockname()[1]}", flush=True)
trio.run(main)
"""
CONTROLLER = ("-m", "orchard.controller", "--listen", "127.0.0.1:0", "--insecure-no-tls", "--insecure-no-auth")


class Server:
    """A process that listens on a loopback port."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.port = int(next(found[1] for line in process.stdout if (found := re.search(r":(\d+)$", line))))
        self.before = self.memory()
        self.idle: list[socket.socket] = []

    def memory(self) -> int:
        """Give the resident memory in KiB."""
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self._process.pid)]))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def fill(self, count: int) -> None:
        for number in range(count):
            connection = self.connect()
            if number % 2:
                ask(connection)
            self.idle.append(connection)

    def waits(self) -> list[float]:
        """Give the milliseconds of each answer to a client that is at work."""
        with self.connect() as connection:
            return sorted(ask(connection) for _ in range(ASKED))


def ask(connection: socket.socket) -> float:
    began = time.perf_counter()
    connection.sendall(REQUEST)
    connection.recv(4096)
    return 1000 * (time.perf_counter() - began)


@contextmanager
def running(*arguments: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "ORCHARD_HOME": home},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield Server(process)
        finally:
            process.terminate()
            process.wait()


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
    with running(*CONTROLLER) as controller, running("-c", BARE) as bare:
        servers = {"controller": controller, "bare trio + h11": bare}
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
            each = (server.memory() - server.before) / count
            print(f"{name}: {server.before / 1024:.0f} MiB before, {each:.1f} KiB for each idle connection")


if __name__ == "__main__":
    main()
