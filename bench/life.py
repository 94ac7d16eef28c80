"""How long it takes from the request for a VM until it runs.

    ./run bench life [--rate N] [--seconds S] [--lives N]

First on synthetic workers, where nothing but Orchard takes time: VMs are created at a steady rate, whatever became of
those before, and deleted when they run. Then one at a time on the stand-in for tart that the tests use, against the same
calls of it one after the other. Controller and worker are processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
from load import CONTROLLER, NO_AUTH, Server, running

from orchard.client import Client
from orchard.schema import TART_VMS
from orchard.worker import host_architecture

WORKERS, ROOM = 20, 50  # and VMs on each: more than are ever there at once
STANDIN = Path(__file__).parent.parent / "tests" / "standin" / "tart"
IMAGE = "ghcr.io/cirruslabs/macos-sequoia-base:latest"
DIRECT = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the stand-in is called often: by the Python at hand


@contextmanager
def working(url: str, home: Path, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "orchard.worker", url, *arguments],
        env={**os.environ, "ORCHARD_HOME": str(home), **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait()


async def registered(client: Client, count: int) -> None:
    while len(await client.workers.list()) < count:  # noqa: ASYNC110 -- the API has no watch of them
        await trio.sleep(0.05)


async def lives(client: Client, rate: float, seconds: float) -> list[float]:
    """Create VMs, and give the seconds from each one's request until a watcher knew that it runs."""
    waits: list[float] = []

    async def live(name: str) -> None:
        began = trio.current_time()
        await client.vms.create(name=name, image=IMAGE, arch="arm64")
        await client.vms.wait(name)
        waits.append(trio.current_time() - began)
        await client.vms.delete(name)

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for number in range(int(rate * seconds)):
            await trio.sleep_until(began + number / rate)
            nursery.start_soon(live, f"vm-{number}")
    return waits


async def synthetic(server: Server, rate: float, seconds: float) -> None:
    async with Client(f"http://127.0.0.1:{server.port}") as client:
        await registered(client, WORKERS)
        await lives(client, rate, 1)  # to warm up
        cpu = server.cpu()
        waits = await lives(client, rate, seconds)
        used = 1000 * (server.cpu() - cpu) / len(waits)
    p50, p99 = statistics.median(waits), statistics.quantiles(waits, n=100)[98]
    print(
        f"create to running, synthetic, {rate:g} a second: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms"
        f" ({len(waits):,} VMs, the controller's processor {used:.2f} s for 1,000)"
    )


async def on_standin(url: str, count: int, home: Path) -> None:
    calls_file = home / "tart-home" / "calls.jsonl"
    lived, called = list[float](), list[float]()
    async with Client(url) as client:
        await registered(client, 1)
        for number in range(count + 1):
            await trio.sleep(0.5)  # until the worker has looked at what the one before has left
            calls_file.write_text("")
            began = time.perf_counter()
            await client.vms.create(name=f"vm-{number}", image=IMAGE, arch=host_architecture())
            await client.vms.wait(f"vm-{number}")
            lived.append(time.perf_counter() - began)
            calls = [json.loads(line) for line in calls_file.read_text().splitlines()]
            await client.vms.delete(f"vm-{number}")
            called.append(again(calls, number, home))
    over = sorted(1000 * (life - calls) for life, calls in zip(lived[1:], called[1:], strict=True))
    print(
        f"create to running, on the stand-in: p50 {1000 * statistics.median(lived):.0f} ms,"
        f" {statistics.median(over):.0f} ms ({over[0]:.0f} to {over[-1]:.0f}) over the sum of its calls"
    )


def again(calls: list[list[str]], number: int, home: Path) -> float:
    """Make the calls that a life has made once more, for another VM, and give the seconds that they took."""
    environ = {**os.environ, "TART_HOME": str(home / "again"), "PATH": DIRECT}
    name, took = f"again-{number}", 0.0
    for words in calls:
        own = [name if word.startswith("orchard-") else word for word in words]
        if own[0] == "run":  # it goes on for as long as the VM does, and counts as its beginning: how long `list` takes
            own = ["list"]
        began = time.perf_counter()
        subprocess.run([STANDIN, *own], env=environ, capture_output=True, check=False)
        took += time.perf_counter() - began
    return took


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench life")
    parser.add_argument("--rate", type=float, default=100, help="VMs a second; default %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="of them; default %(default)s")
    parser.add_argument("--lives", type=int, default=10, help="on the stand-in; default %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with running(*CONTROLLER, NO_AUTH) as server:
            url = f"http://127.0.0.1:{server.port}"
            wanted = ("--runtime", "synthetic", "--workers", str(WORKERS), "--resources", f"{TART_VMS}={ROOM}")
            with working(url, home / "synthetic", "--name", "w", *wanted):
                trio.run(synthetic, server, options.rate, options.seconds)
        with running(*CONTROLLER, NO_AUTH) as server:
            url = f"http://127.0.0.1:{server.port}"
            (home / "tart-home").mkdir()
            (home / "again").mkdir()
            environ = {"TART_HOME": str(home / "tart-home"), "PATH": DIRECT}
            with working(url, home / "host", "--tart", str(STANDIN), "--stop-vms-on-exit", "--name", "mac", **environ):
                trio.run(on_standin, url, options.lives, home)


if __name__ == "__main__":
    main()
