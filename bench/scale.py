"""How costs grow with the size of the cluster, up to 5,000 workers and 50,000 VMs.

    ./run bench scale [--most VMS] [--operations N] [--minutes M]

For each size a controller process starts from a prepared state. Its clients use plain sockets, so that they cost little.
There are two measurements:

* each operation alone: its processor time in the controller;
* the traffic of such a cluster: all workers watch, send heartbeats, poll, get VMs and report on them, while users create
  and delete VMs. It is replayed as fast as the controller answers. The result is the share of a core that it takes.

Prints how the costs grow: 0.0 is constant, 1.0 is linear. One hour of traffic (`--minutes 60`) is nearly nine million
requests at the largest size.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cluster import AUTHORIZATION
from load import CONTROLLER, RECEIVE_BYTES, Server, answer_length, body_of, press, request, running

from orchard.net import wsframes

# Requests under way at once.
CLIENTS = 32
# Connections over which VMs are created and deleted.
USERS = 8
VMS_PER_WORKER = 10
# Number of sizes, each about twice the one before.
STEPS = 4
FOREVER = ("--worker-offline-timeout", "1000000")
# Intervals of heartbeats and of polls of a worker.
HEARTBEAT_SECONDS, POLL_SECONDS = 15.0, 5.0
# The average time for which a VM runs.
RUN_SECONDS = 600.0
# Interval of the reports before a VM runs.
REPORT_SECONDS = 10.0
REPORTS = (
    ("pending", "pulling image: 25 %"),
    ("pending", "pulling image: 75 %"),
    ("pending", "starting"),
    ("running", ""),
)
# Growth within the error of the measurement.
ALLOWED_GROWTH = 0.15

Answered = Callable[[bytes], None]


# ---- single operations -----------------------------------------------------------------------------------------------


def operations(vms: int, count: int) -> dict[str, Iterator[bytes]]:
    """Return the requests of each kind."""
    chance = random.Random(1)
    seconds = itertools.count()

    def worker() -> str:
        return f"worker-{chance.randrange(vms // VMS_PER_WORKER)}"

    return {
        "heartbeat": (heartbeat(worker(), next(seconds)) for _ in range(count)),
        "poll": (poll(worker()) for _ in range(count)),
        "report": (report(f"vm-{(n := chance.randrange(vms))}", f"uid-{n}", "running", f"{i}") for i in range(count)),
        "create": (create(f"new-{number}") for number in range(count)),
        "delete": (delete(f"new-{number}") for number in range(count)),
    }


def heartbeat(worker: str, seconds: float) -> bytes:
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_900_000_000 + seconds))
    return send("PUT", f"/v1/workers/{worker}", {"name": worker, "last_seen": moment})


def poll(worker: str) -> bytes:
    return send("GET", f"/v1/vms?filter=worker={worker}")


def report(vm: str, uid: str, status: str, message: str) -> bytes:
    running = {"type": "running", "state": "true" if status == "running" else "false"}
    seen = {"uid": uid, "status": status, "status_message": message, "observedGeneration": 1, "conditions": [running]}
    return send("PUT", f"/v1/vms/{vm}/state", seen)


def create(vm: str) -> bytes:
    return send("POST", "/v1/vms", {"name": vm, "image": "ghcr.io/cirruslabs/macos-sequoia-base:latest"})


def delete(vm: str) -> bytes:
    return send("DELETE", f"/v1/vms/{vm}")


def send(method: str, path: str, body: object = None) -> bytes:
    return request(method, path, b"" if body is None else json.dumps(body).encode(), AUTHORIZATION)


def measure_operations(server: Server, vms: int, count: int) -> dict[str, float]:
    """Return the processor time of each operation in milliseconds."""
    costs = {}
    for name, requests in operations(vms, count).items():
        cpu = server.cpu()
        press(server.port, CLIENTS, requests)
        costs[name] = 1000 * (server.cpu() - cpu) / count
    return costs


# ---- traffic ---------------------------------------------------------------------------------------------------------


class Connection:
    """A connection that stays open. The next request is sent when the last was answered."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._socket = traffic.open(self.read)
        self._answer = bytearray()
        # The requests of this connection. The first one is under way.
        self._waiting: deque[tuple[bytes, Answered]] = deque()

    def ask(self, request: bytes, answered: Answered) -> None:
        self._traffic.under_way += 1
        self._waiting.append((request, answered))
        if len(self._waiting) == 1:
            self._socket.sendall(request)

    def read(self, data: bytes) -> None:
        self._answer += data
        length = answer_length(self._answer)
        if not length or len(self._answer) < length:
            return
        answer = bytes(self._answer)
        self._answer.clear()
        asked, answered = self._waiting.popleft()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{asked!r} got the answer {answer[:1000]!r}")
        self._traffic.under_way -= 1
        self._traffic.requests += 1
        if self._waiting:
            self._socket.sendall(self._waiting[0][0])
        answered(answer[-(length - answer.index(b"\r\n\r\n") - 4) :])


class Host:
    """A worker as the controller sees it: it watches, sends heartbeats, polls, and reports on its VMs."""

    def __init__(self, traffic: Traffic, number: int) -> None:
        self.watching = False
        self._traffic = traffic
        self._name = f"worker-{number}"
        self._requests = Connection(traffic)
        # VM uid -> name.
        self._known: dict[str, str] = {}
        self._seen = b"[]"
        self._frames = wsframes.FrameReader(masked=False)
        self._watch = traffic.open(self._read)
        self._watch.sendall(
            f"GET /v1/rpc/watch?workerName={self._name} HTTP/1.1\r\nHost: c\r\nAuthorization: {AUTHORIZATION}\r\n"
            f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {'A' * 22}==\r\n\r\n".encode()
        )

    def begin(self, chance: random.Random) -> None:
        self._traffic.at(chance.uniform(0, HEARTBEAT_SECONDS), self._beat)
        self._traffic.at(chance.uniform(0, POLL_SECONDS), self._poll_again)

    def _read(self, data: bytes) -> None:
        if not self.watching:
            head, _, data = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 101"):
                raise RuntimeError(f"a watch got the answer {head!r}")
            self.watching = True
        for event in self._frames.feed(data):
            match event:
                case wsframes.Ping(payload):
                    self._watch.sendall(b"".join(wsframes.build_frame(wsframes.PONG, payload, b"mask")))
                case wsframes.Close():
                    raise RuntimeError(f"a watch was closed: {event}")
                case wsframes.Pong():
                    pass
                case _:
                    # The only message is that the worker has to look at its VMs.
                    self._requests.ask(poll(self._name), self._look)

    def _beat(self) -> None:
        self._requests.ask(send("GET", f"/v1/workers/{self._name}"), lambda _: None)
        self._requests.ask(heartbeat(self._name, self._traffic.now), lambda _: None)
        self._traffic.at(HEARTBEAT_SECONDS, self._beat)

    def _poll_again(self) -> None:
        self._requests.ask(poll(self._name), self._look)
        self._traffic.at(POLL_SECONDS, self._poll_again)

    def _look(self, body: bytes) -> None:
        if body == self._seen:
            return
        self._seen = body
        vms = {vm["uid"]: vm for vm in json.loads(body)}
        if len(vms) > VMS_PER_WORKER:
            raise RuntimeError(f"{self._name} has {len(vms)} VMs, expected at most {VMS_PER_WORKER}")
        for uid, vm in vms.items():
            if uid not in self._known and vm["status"] == "pending":
                self._report(vm["name"], uid, 0)
        self._known = {uid: vm["name"] for uid, vm in vms.items()}

    def _report(self, vm: str, uid: str, step: int) -> None:
        def answered(_: bytes) -> None:
            if step + 1 < len(REPORTS):
                self._traffic.at(REPORT_SECONDS, partial(self._report, vm, uid, step + 1))
            else:
                self._traffic.runs(vm)

        self._requests.ask(report(vm, uid, *REPORTS[step]), answered)


class Traffic:
    """The traffic of a cluster in the order of a virtual time, which advances as fast as requests are answered."""

    def __init__(self, port: int, vms: int) -> None:
        # Virtual time.
        self.now = 0.0  # seconds
        # Requests that were sent, and that were answered.
        self.under_way = 0
        self.requests = 0
        self._port = port
        self._chance = random.Random(1)
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, Callable[[bytes], None]]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._hosts: list[Host] = []
        for number in range(vms // VMS_PER_WORKER):
            self._hosts.append(Host(self, number))
            while not self._hosts[-1].watching:
                self._hear()
        self._users = itertools.cycle([Connection(self) for _ in range(USERS)])
        for number in range(vms):
            self.at(self._chance.uniform(0, RUN_SECONDS), partial(self._end, f"vm-{number}"))
        for host in self._hosts:
            host.begin(self._chance)

    def open(self, read: Callable[[bytes], None]) -> socket.socket:
        """Connect to the controller, and call `read` with what is received."""
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll.register(connection, select.EPOLLIN)
        self._open[connection.fileno()] = (connection, read)
        return connection

    def close(self) -> None:
        for connection, _ in self._open.values():
            connection.close()
        self._poll.close()

    def at(self, seconds: float, do: Callable[[], None]) -> None:
        """Call `do` in a number of seconds of virtual time."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), do))

    def runs(self, vm: str) -> None:
        self.at(self._chance.expovariate(1 / RUN_SECONDS), partial(self._end, vm))

    def play(self, seconds: float) -> None:
        while True:
            while self.under_way < CLIENTS and self._events[0][0] <= seconds:
                self.now, _, do = heapq.heappop(self._events)
                do()
            if not self.under_way:
                return
            self._hear()

    def _end(self, vm: str) -> None:
        """Delete a VM, then create another."""
        user = next(self._users)
        user.ask(delete(vm), lambda _: user.ask(create(f"later-{next(self._numbers)}"), lambda _: None))

    def _hear(self) -> None:
        for descriptor, _ in self._poll.poll():
            connection, read = self._open[descriptor]
            data = connection.recv(RECEIVE_BYTES)
            if not data:
                raise RuntimeError("the controller closed a connection")
            read(data)


def replay_traffic(server: Server, vms: int, minutes: float) -> float:
    """Replay a cluster's traffic. Return the share of a core that it takes. Raises RuntimeError."""
    traffic = Traffic(server.port, vms)
    try:
        cpu, memory, began = server.cpu(), server.memory(), time.perf_counter()
        traffic.play(60 * minutes)
        share, took = (server.cpu() - cpu) / (60 * minutes), time.perf_counter() - began
        print(
            f"{vms // VMS_PER_WORKER:6,} workers with {vms:,} VMs: {minutes:g} minutes in {took / 60:.1f}, {traffic.requests:,} requests;"
            f" {100 * share:.0f} % of a core, {memory / 1024:.0f} MiB and {server.memory() / 1024:.0f} after it",
            flush=True,
        )
        check(server, vms)
    finally:
        traffic.close()
    return share


def check(server: Server, vms: int) -> None:
    """Check that all VMs exist and none has failed. Raises RuntimeError."""
    found = json.loads(body_of(server, send("GET", "/v1/vms")))
    failed = [vm for vm in found if vm["status"] == "failed"]
    if len(found) != vms or failed:
        raise RuntimeError(f"there are {len(found)} VMs, expected {vms}; {len(failed)} have failed: {failed[:1]}")


# ---- sizes -----------------------------------------------------------------------------------------------------------


def measured(vms: int, count: int, minutes: float) -> tuple[dict[str, float], float]:
    """Return the milliseconds of each operation, and the share of a core that the traffic takes."""
    with tempfile.TemporaryDirectory() as directory:
        program = "import sys, pathlib, cluster; cluster.prepare(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        words = [directory, str(vms), str(vms // VMS_PER_WORKER)]
        subprocess.run([sys.executable, "-c", program, *words], check=True, cwd=Path(__file__).parent)
        began = time.perf_counter()
        with running(*CONTROLLER, *FOREVER, home=Path(directory)) as server:
            print(
                f"{vms // VMS_PER_WORKER:6,} workers with {vms:,} VMs: started in {time.perf_counter() - began:.1f} s",
                flush=True,
            )
            costs = measure_operations(server, vms, count)
        with running(*CONTROLLER, *FOREVER, home=Path(directory)) as server:
            return costs, replay_traffic(server, vms, minutes)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Fit cost = a * size ** exponent."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench scale")
    parser.add_argument("--most", type=int, default=50_000, help="VMs of the largest size; default %(default)s")
    parser.add_argument(
        "--operations", type=int, default=4_000, help="operations of each kind and size; default %(default)s"
    )
    parser.add_argument("--minutes", type=float, default=6, help="minutes of traffic at each size; default %(default)s")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sizes = [
        round(options.most / 10 ** (step / (STEPS - 1))) // VMS_PER_WORKER * VMS_PER_WORKER
        for step in reversed(range(STEPS))
    ]
    found = [measured(size, options.operations, options.minutes) for size in sizes]
    rows = {name: [costs[name] for costs, _ in found] for name in found[0][0]}
    rows["traffic, % of a core for 1,000 workers"] = [
        100 * share * 1000 * VMS_PER_WORKER / size for (_, share), size in zip(found, sizes, strict=True)
    ]
    print(f"{'CPU ms each':38}" + "".join(f"{size:>10,}" for size in sizes) + f"{'growth':>10}")
    grown = []
    for name, series in rows.items():
        growth = exponent(sizes, series)
        print(f"{name:38}" + "".join(f"{cost:10.3f}" for cost in series) + f"{growth:10.2f}")
        grown += [name] if growth > ALLOWED_GROWTH else []
    if grown:
        print(f"grows with the cluster: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
