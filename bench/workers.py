"""The controller's CPU and memory with many idle workers, which send heartbeats, poll, and hold a watch each.

    ./run bench workers [--workers N] [--seconds S]

The workers are the product's own with synthetic VMs, all in one process beside the controller's. Printed are the
controller's share of one core and its memory with and without workers, and how many bytes it wrote to its state (none:
heartbeats are not stored).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import trio
from cluster import prepare
from life import wait_registered, working
from load import BARE, CONTROLLER, NO_AUTH, Server, running

from orchard.client import Client

# Parts of the time that are measured separately, for the range.
SPLIT = 5
# To measure the memory of a big cluster.
VMS = 10_000


def share(server: Server, seconds: float) -> float:
    """Return the share of one core that a process uses during some seconds."""
    before, began = server.cpu(), time.perf_counter()
    time.sleep(seconds)
    return (server.cpu() - before) / (time.perf_counter() - began)


async def until_registered(url: str, count: int) -> float:
    began = trio.current_time()
    async with Client(url) as client:
        await wait_registered(client, count)
    return trio.current_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench workers")
    parser.add_argument("--workers", type=int, default=1_000, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="default %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with running(*CONTROLLER, NO_AUTH, home=home) as server, running(BARE) as bare:
            state = home / "controller" / "state.jsonl"
            idle, empty = server.memory(), bare.memory()
            print(f"memory: {idle / 1024:.0f} MiB idle; a bare trio + h11 server {empty / 1024:.0f} MiB")
            alone = share(server, 3)
            url = f"http://127.0.0.1:{server.port}"
            workers = ("--runtime", "synthetic", "--workers", str(options.workers))
            with working(url, home / "workers", "--name", "w", *workers):
                took = trio.run(until_registered, url, options.workers)
                print(f"{options.workers:,} workers registered in {took:.1f} s")
                # Until each worker has sent a heartbeat.
                time.sleep(20)
                size = state.stat().st_size
                shares = [share(server, options.seconds / SPLIT) for _ in range(SPLIT)]
                print(
                    f"{options.workers:,} workers, idle: {100 * statistics.median(shares):.1f} % of a core"
                    f" ({100 * min(shares):.1f} to {100 * max(shares):.1f}; {100 * alone:.1f} without any),"
                    f" {state.stat().st_size - size} bytes written to the state, {server.memory() / 1024:.0f} MiB"
                )
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), VMS, options.workers)
        with running(*CONTROLLER, NO_AUTH, home=Path(directory)) as server:
            print(f"memory: {server.memory() / 1024:.0f} MiB with {VMS:,} VMs and {options.workers:,} workers")


if __name__ == "__main__":
    main()
