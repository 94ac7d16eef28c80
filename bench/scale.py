"""How the cost of everything grows with the cluster: up to 5,000 workers and 50,000 VMs.

    ./run bench scale [--most VMS] [--operations N]

For each size a controller process starts from a prepared state, and gets the requests that the life of such a cluster
consists of: heartbeats, polls, reports, creations and deletions, over real sockets, from clients that cost as little as
they can. Prints what each operation costs of the controller's processor at each size, and how that grows: 0.0 is not at
all, 1.0 as fast as the cluster. The last table says how large a share of one core an hour of that life takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import AUTHORIZATION
from load import CONTROLLER, press, request, running

CLIENTS = 32
ROOM = 10  # VMs on a worker
STEPS = 4  # sizes, each about twice the one before
FOREVER = ("--worker-offline-timeout", "1000000")
# What a worker asks in an hour: heartbeats of a GET and a PUT each 15 s, a poll each 5 s; and what becomes of its VMs
# when each lives for ten minutes: made, told to run in some steps, deleted.
HOURLY = {
    "heartbeat": 240,
    "poll": 720,
    "report": 4 * 6 * ROOM,
    "create": 6 * ROOM,
    "delete": 6 * ROOM,
}
ALLOWED = 0.15  # of growth, which is what measuring has


def operations(vms: int, count: int) -> dict[str, Iterator[bytes]]:
    """Give the requests of each kind."""
    chance = random.Random(1)
    seconds = itertools.count()

    def heartbeat() -> bytes:
        name = f"worker-{chance.randrange(vms // ROOM)}"
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_900_000_000 + next(seconds)))
        return send("PUT", f"/v1/workers/{name}", {"name": name, "last_seen": moment})

    def poll() -> bytes:
        return send("GET", f"/v1/vms?filter=worker=worker-{chance.randrange(vms // ROOM)}")

    def report() -> bytes:
        number = chance.randrange(vms)
        body = {
            "uid": f"uid-{number}",
            "status": "running",
            "status_message": f"{next(seconds)}",
            "observedGeneration": 1,
        }
        return send("PUT", f"/v1/vms/vm-{number}/state", body)

    def create(number: int) -> bytes:
        return send("POST", "/v1/vms", {"name": f"new-{number}", "image": "image"})

    def delete(number: int) -> bytes:
        return send("DELETE", f"/v1/vms/new-{number}")

    return {
        "heartbeat": (heartbeat() for _ in range(count)),
        "poll": (poll() for _ in range(count)),
        "report": (report() for _ in range(count)),
        "create": (create(number) for number in range(count)),
        "delete": (delete(number) for number in range(count)),
    }


def send(method: str, path: str, body: object = None) -> bytes:
    return request(method, path, b"" if body is None else json.dumps(body).encode(), AUTHORIZATION)


def measured(vms: int, count: int) -> tuple[dict[str, float], str]:
    """Give the CPU milliseconds of each operation, and what else there is to say."""
    with tempfile.TemporaryDirectory() as directory:
        program = "import sys, pathlib, cluster; cluster.prepare(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        words = [directory, str(vms), str(vms // ROOM)]
        subprocess.run([sys.executable, "-c", program, *words], check=True, cwd=Path(__file__).parent)
        began = time.perf_counter()
        with running(*CONTROLLER, *FOREVER, home=Path(directory)) as server:
            started, costs = time.perf_counter() - began, dict[str, float]()
            memory = server.memory() / 1024
            for name, requests in operations(vms, count).items():
                cpu = server.cpu()
                press(server.port, CLIENTS, requests)
                costs[name] = 1000 * (server.cpu() - cpu) / count
            return costs, f"{vms:7,} VMs: {memory:4.0f} MiB, started in {started:.1f} s"


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Fit cost = a * size ** exponent."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench scale")
    parser.add_argument("--most", type=int, default=50_000, help="VMs; default %(default)s")
    parser.add_argument("--operations", type=int, default=4_000, help="of each kind and size; default %(default)s")
    options = parser.parse_args()
    sizes = [round(options.most / 10 ** (step / (STEPS - 1))) // 2 * 2 for step in reversed(range(STEPS))]
    found = []
    for size in sizes:
        costs, said = measured(size, options.operations)
        found.append(costs)
        print(said, flush=True)
    print(f"{'CPU ms each':12}" + "".join(f"{size:>10,}" for size in sizes) + f"{'growth':>10}")
    grown = []
    for name in found[0]:
        series = [costs[name] for costs in found]
        growth = exponent(sizes, series)
        print(f"{name:12}" + "".join(f"{cost:10.3f}" for cost in series) + f"{growth:10.2f}")
        grown += [name] if growth > ALLOWED else []
    for size, costs in zip(sizes, found, strict=True):
        workers = size // ROOM
        seconds = sum(HOURLY[name] * cost for name, cost in costs.items()) * workers / 1000
        print(f"{workers:6,} workers with {size:,} VMs take {100 * seconds / 3600:.0f} % of one core")
    if grown:
        print(f"grows with the cluster: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
