"""The cost of a scrape of the metrics: 1,000 workers and 10,000 VMs, over plain HTTP.

    ./run bench scrape [--workers N] [--vms N] [--rounds N]

Shown are the processor time of a whole scrape, client included, with and without series of each worker, and of the
longest step of the event loop, for which all other tasks wait.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import trio
from cluster import TOKEN, prepare

from orchard import controller
from orchard.base.daemon import collect_garbage_less
from orchard.client import Client

ROUNDS = 30


async def longest_step(task_status: trio.TaskStatus[list[float]] = trio.TASK_STATUS_IGNORED) -> None:
    """Take every turn, and keep the longest time between two of them in a list."""
    longest = [0.0]
    task_status.started(longest)
    before = time.thread_time()
    while True:
        await trio.lowlevel.checkpoint()
        now = time.thread_time()
        longest[0] = max(longest[0], now - before)
        before = now


async def measure(home: Path, rounds: int, *, per_worker: bool) -> None:
    settings = controller.ControllerSettings(
        home / ".orchard" / "controller",
        host="127.0.0.1",
        port=0,
        tls=False,
        worker_offline_timeout=1_000_000,
        metrics_per_worker=per_worker,
    )
    collect_garbage_less()
    async with trio.open_nursery() as nursery:
        running: controller.Running = await nursery.start(controller.run, settings)
        async with Client(running.url, account="admin", token=TOKEN) as client:
            size = len((await client.request("GET", "/metrics")).body)
            whole, steps = [], []
            for _ in range(rounds):
                began = time.thread_time()
                await client.request("GET", "/metrics")
                whole.append(1000 * (time.thread_time() - began))
            for _ in range(rounds):
                async with trio.open_nursery() as beside:
                    longest: list[float] = await beside.start(longest_step)
                    await client.request("GET", "/metrics")
                    beside.cancel_scope.cancel()
                steps.append(1000 * longest[0])
        nursery.cancel_scope.cancel()
    name = "with series of each worker" if per_worker else "of the cluster"
    print(f"{name:28}{statistics.median(whole):7.1f} ms, longest {max(whole):.1f} ms; {size:,} bytes")
    print(f"{'longest step':28}{statistics.median(steps):7.1f} ms, longest {max(steps):.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--vms", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), options.vms, options.workers)
        for per_worker in (False, True):
            trio.run(partial(measure, Path(directory), options.rounds, per_worker=per_worker))


if __name__ == "__main__":
    main()
