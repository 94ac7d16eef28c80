"""The controller's cost of an idle worker's requests, with the facts of its host and 200 images, and the sum for 1,000.

    ./run bench heartbeats [--workers N] [--against PYTHON]

One client sends what idle workers send, as fast as the controller answers. So the figures do not depend on how many workers
this machine can run, as those of `./run bench workers` do. `--against` is the Python of another checkout's virtual
environment: its controller gets the same requests in turns, without facts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import socket
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack

from load import CONTROLLER, NO_AUTH, RECEIVE_BYTES, Server, answer_length, request, running

BEGAN = datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)
GB = 10**9
IMAGES = [
    {
        "name": f"ghcr.io/org/image-{n}:latest",
        "digest": f"sha256:{n:064x}",
        "sizeBytes": 40 * GB,
        "lastUsed": BEGAN.isoformat(),
    }
    for n in range(200)
]
ROUNDS = 7
# The interval at which an idle worker sends each request, in seconds. For images it is the shortest one.
SECONDS = {"poll": 5.0, "worker": 15.0, "heartbeat": 15.0, "info": 60.0, "images": 600.0}


class Fleet:
    """A controller, and a client that sends it the requests of `count` workers."""

    def __init__(self, name: str, server: Server, count: int, *, facts: bool) -> None:
        self.name = name
        self._server = server
        self._count = count
        self._facts = facts
        self._connection: socket.socket = server.connect()
        self._sent = 0
        # Microseconds of CPU for each request, by round.
        self._costs: dict[str, list[float]] = defaultdict(list)
        for number in range(count):
            capabilities = ["worker-state", *["image-inventory"] * facts]
            body = {"name": f"w-{number}", "machine_id": "m", "capabilities": capabilities}
            self._ask(request("POST", "/v1/workers", json.dumps(body).encode()))

    def measure(self) -> None:
        """Send one of each request for each worker."""
        query = "?images=false" if self._facts else ""
        self._round("poll", lambda n: request("GET", f"/v1/vms?filter=worker=w-{n}"))
        self._round("worker", lambda n: request("GET", f"/v1/workers/w-{n}{query}"))
        self._round("heartbeat", lambda n: self._heartbeat(n))
        if self._facts:
            self._round("info", lambda _: request("GET", "/v1/controller/info"))
            self._round("images", lambda n: self._heartbeat(n, images=IMAGES))

    def show(self) -> None:
        medians = {name: statistics.median(costs) for name, costs in self._costs.items()}
        share = sum(1000 * cost / SECONDS[name] for name, cost in medians.items()) / 1e6
        each = ", ".join(f"{name} {cost:.0f}" for name, cost in medians.items())
        print(f"{self.name}: 1,000 idle workers take {100 * share:.1f} % of a core; us of CPU for each: {each}")

    def _round(self, name: str, make: Callable[[int], bytes]) -> None:
        requests = [make(number) for number in range(self._count)]
        before = self._server.cpu()
        for data in requests:
            self._ask(data)
        self._costs[name].append(1e6 * (self._server.cpu() - before) / self._count)

    def _heartbeat(self, number: int, **fields: object) -> bytes:
        self._sent += 1
        seen = (BEGAN + datetime.timedelta(seconds=self._sent)).isoformat()
        body = {"name": f"w-{number}", "machine_id": "m", "last_seen": seen, "settled": True, "health": {"ok": True}}
        if self._facts:
            # The free space of a Mac changes all the time.
            body |= {"disk": {"totalBytes": 500 * GB, "freeBytes": 100 * GB + self._sent * 10**6}, **fields}
        return request("PUT", f"/v1/workers/w-{number}", json.dumps(body).encode())

    def _ask(self, data: bytes) -> None:
        # A controller without authentication answers only to names of its own.
        self._connection.sendall(data.replace(b"Host: controller", b"Host: 127.0.0.1", 1))
        answer = bytearray()
        while not (length := answer_length(answer)) or len(answer) < length:
            answer += self._connection.recv(RECEIVE_BYTES)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the controller answered {bytes(answer[:200])!r}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench heartbeats")
    parser.add_argument("--workers", type=int, default=300, help="default %(default)s")
    parser.add_argument("--against", metavar="PYTHON", help="of the virtual environment of another checkout")
    options = parser.parse_args()
    pythons = {"this checkout": sys.executable, **({"the other": options.against} if options.against else {})}
    with ExitStack() as stack:
        fleets = []
        for name, python in pythons.items():
            server = stack.enter_context(running(*CONTROLLER, NO_AUTH, python=python))
            fleets.append(Fleet(name, server, options.workers, facts=name == "this checkout"))
        for _ in range(ROUNDS):
            for fleet in fleets:
                fleet.measure()
        for fleet in fleets:
            fleet.show()


if __name__ == "__main__":
    main()
