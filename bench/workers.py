"""The controller's CPU and memory with many idle workers, which send heartbeats, poll, and hold a watch each.

    ./run bench workers [--workers N] [--images N] [--seconds S] [--against PYTHON]

The workers are the product's own with synthetic VMs, all in one process beside the controller's. Each has `--images`
images in its cache. Printed are the controller's share of one core and its memory with and without workers, and how many
bytes it wrote to its state (none: heartbeats are not stored).

`--against` is the Python of another checkout's virtual environment. That checkout's controller and workers run at the same
time, without images, and are measured in turns with these. The ratio is that of the shares in the same turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio
from cluster import prepare
from life import working
from load import BARE, CONTROLLER, NO_AUTH, Server, running

from orchard.client import Client, ResponseError

# Parts of the time that are measured separately, for the range.
SPLIT = 5
# Time in which each worker sends its images, which takes up to a minute, and some heartbeats.
SETTLING_SECONDS = 75
# VMs of the big cluster whose memory is measured.
VMS = 10_000


@dataclass
class Fleet:
    """A controller with its workers."""

    name: str
    server: Server
    state: Path
    alone: float
    shares: list[float] = field(default_factory=list)
    written: int = 0

    def measure(self, seconds: float) -> None:
        size = self.state.stat().st_size
        self.shares.append(share(self.server, seconds))
        self.written += self.state.stat().st_size - size

    def show(self, count: int) -> None:
        print(
            f"{self.name}: {count:,} workers, idle: {100 * statistics.median(self.shares):.1f} % of a core"
            f" ({100 * min(self.shares):.1f} to {100 * max(self.shares):.1f}; {100 * self.alone:.1f} without any),"
            f" {self.written} bytes written to the state, {self.server.memory() / 1024:.0f} MiB"
        )


def share(server: Server, seconds: float) -> float:
    """Return the share of one core that a process uses during some seconds."""
    before, began = server.cpu(), time.perf_counter()
    time.sleep(seconds)
    return (server.cpu() - before) / (time.perf_counter() - began)


async def until_registered(url: str, count: int) -> float:
    began = trio.current_time()
    async with Client(url) as client:
        # A list would hold all their images.
        for number in range(count, 0, -1):
            while True:
                with suppress(ResponseError):
                    await client.workers.get(f"w-{number}")
                    break
                await trio.sleep(0.05)
    return trio.current_time() - began


@contextmanager
def fleet(home: Path, name: str, python: str, count: int, *arguments: str) -> Iterator[Fleet]:
    """Run a controller with its workers for the time of the block."""
    (home / "controller-home").mkdir(parents=True)
    with running(*CONTROLLER, NO_AUTH, home=home / "controller-home", python=python) as server:
        (state,) = (home / "controller-home").rglob("state.jsonl")
        alone = share(server, 3)
        url = f"http://127.0.0.1:{server.port}"
        workers = ("--name", "w", "--runtime", "synthetic", "--workers", str(count), *arguments)
        with working(url, home / "workers", *workers, python=python):
            took = trio.run(until_registered, url, count)
            print(f"{name}: {count:,} workers registered in {took:.1f} s")
            yield Fleet(name, server, state, alone)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench workers")
    parser.add_argument("--workers", type=int, default=1_000, help="default %(default)s")
    parser.add_argument("--images", type=int, default=200, help="of each worker; default %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="default %(default)s")
    parser.add_argument("--against", metavar="PYTHON", help="of the virtual environment of another checkout")
    options = parser.parse_args()
    with running(*CONTROLLER, NO_AUTH) as server, running(BARE) as bare:
        print(f"memory: {server.memory() / 1024:.0f} MiB idle; a bare trio + h11 server {bare.memory() / 1024:.0f} MiB")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        home, count = Path(directory), options.workers
        images = ("--synthetic-images", str(options.images)) if options.images else ()
        fleets = [stack.enter_context(fleet(home / "this", "this checkout", sys.executable, count, *images))]
        if options.against:
            fleets.append(stack.enter_context(fleet(home / "other", "the other", options.against, count)))
        time.sleep(SETTLING_SECONDS)
        for _ in range(SPLIT):
            for each in fleets:
                each.measure(options.seconds / SPLIT)
        for each in fleets:
            each.show(count)
        if options.against:
            ratios = sorted(own / theirs for own, theirs in zip(*(each.shares for each in fleets), strict=True))
            print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), VMS, options.workers)
        with running(*CONTROLLER, NO_AUTH, home=Path(directory)) as server:
            print(f"memory: {server.memory() / 1024:.0f} MiB with {VMS:,} VMs and {options.workers:,} workers")


if __name__ == "__main__":
    main()
