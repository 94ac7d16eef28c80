"""How long it takes from the request for a VM until the VM runs.

    ./run bench life [--rate N] [--seconds S] [--vms N]

First on synthetic workers, where only Orchard takes time: VMs are created at a constant rate, independently of the
progress of earlier ones, and deleted when they run. Then one VM at a time on the stand-in for tart, compared with the
same calls of the stand-in made one after the other. Controller and worker are separate processes.
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

# More slots than there are VMs at any time.
WORKERS, SLOTS = 20, 50
STANDIN = Path(__file__).parent.parent / "tests" / "standin" / "tart"
IMAGE = "ghcr.io/cirruslabs/macos-sequoia-base:latest"
# The stand-in is started often: by the Python at hand.
STANDIN_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@contextmanager
def working(
    url: str, home: Path, *arguments: str, python: str = sys.executable, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker process during the block, with `home` as its working directory."""
    home.mkdir(parents=True, exist_ok=True)
    worker = subprocess.Popen(
        [python, "-m", "orchard.worker", url, *arguments],
        # Python looks for modules in the current directory first, which may be another checkout.
        cwd=home,
        env={**os.environ, "ORCHARD_HOME": str(home), **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait()


async def wait_registered(client: Client, count: int) -> None:
    while len(await client.workers.list()) < count:  # noqa: ASYNC110
        await trio.sleep(0.05)


async def create_and_delete(client: Client, rate: float, seconds: float) -> list[float]:
    """Create and delete VMs; return for each the seconds from its request until a watcher knew that it runs."""
    waits: list[float] = []

    async def create_one(name: str) -> None:
        began = trio.current_time()
        await client.vms.create(name=name, image=IMAGE, arch="arm64")
        await client.vms.wait(name)
        waits.append(trio.current_time() - began)
        await client.vms.delete(name)

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for number in range(int(rate * seconds)):
            await trio.sleep_until(began + number / rate)
            nursery.start_soon(create_one, f"vm-{number}")
    return waits


async def synthetic(server: Server, rate: float, seconds: float) -> None:
    async with Client(f"http://127.0.0.1:{server.port}") as client:
        await wait_registered(client, WORKERS)
        # A first second to warm up.
        await create_and_delete(client, rate, 1)
        cpu = server.cpu()
        waits = await create_and_delete(client, rate, seconds)
        used = 1000 * (server.cpu() - cpu) / len(waits)
    p50, p99 = statistics.median(waits), statistics.quantiles(waits, n=100)[98]
    print(
        f"create to running, synthetic, {rate:g} a second: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms"
        f" ({len(waits):,} VMs, controller CPU {used:.2f} s per 1,000)"
    )


async def on_standin(url: str, count: int, home: Path) -> None:
    calls_file = home / "tart-home" / "calls.jsonl"
    totals, call_times = list[float](), list[float]()
    async with Client(url) as client:
        await wait_registered(client, 1)
        for number in range(count + 1):
            # The worker deletes the VM before.
            await trio.sleep(0.5)
            calls_file.write_text("")
            began = time.perf_counter()
            await client.vms.create(name=f"vm-{number}", image=IMAGE, arch=host_architecture())
            await client.vms.wait(f"vm-{number}")
            totals.append(time.perf_counter() - began)
            calls = [json.loads(line) for line in calls_file.read_text().splitlines()]
            await client.vms.delete(f"vm-{number}")
            call_times.append(repeat_calls(calls, number, home))
    over = sorted(1000 * (total - calls) for total, calls in zip(totals[1:], call_times[1:], strict=True))
    print(
        f"create to running, on the stand-in: p50 {1000 * statistics.median(totals):.0f} ms,"
        f" {statistics.median(over):.0f} ms ({over[0]:.0f} to {over[-1]:.0f}) over the sum of its calls"
    )


def repeat_calls(calls: list[list[str]], number: int, home: Path) -> float:
    """Repeat the calls that were made for a VM, for another VM, and return the seconds that they took."""
    environ = {**os.environ, "TART_HOME": str(home / "again"), "PATH": STANDIN_PATH}
    name, took = f"again-{number}", 0.0
    for words in calls:
        own = [name if word.startswith("orchard-") else word for word in words]
        # `run` lasts as long as its VM. Only its start counts, and that takes as long as `list`.
        if own[0] == "run":
            own = ["list"]
        began = time.perf_counter()
        subprocess.run([STANDIN, *own], env=environ, capture_output=True, check=False)
        took += time.perf_counter() - began
    return took


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench life")
    parser.add_argument("--rate", type=float, default=100, help="VMs created per second; default %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="duration; default %(default)s")
    parser.add_argument("--vms", type=int, default=10, help="number of VMs on the stand-in; default %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with running(*CONTROLLER, NO_AUTH) as server:
            url = f"http://127.0.0.1:{server.port}"
            wanted = ("--runtime", "synthetic", "--workers", str(WORKERS), "--resources", f"{TART_VMS}={SLOTS}")
            with working(url, home / "synthetic", "--name", "w", *wanted):
                trio.run(synthetic, server, options.rate, options.seconds)
        with running(*CONTROLLER, NO_AUTH) as server:
            url = f"http://127.0.0.1:{server.port}"
            (home / "tart-home").mkdir()
            (home / "again").mkdir()
            environ = {"TART_HOME": str(home / "tart-home"), "PATH": STANDIN_PATH}
            with working(url, home / "host", "--tart", str(STANDIN), "--stop-vms-on-exit", "--name", "mac", **environ):
                trio.run(on_standin, url, options.vms, home)


if __name__ == "__main__":
    main()
