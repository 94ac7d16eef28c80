"""The time to recover when a controller under load is killed every few seconds.

    ./run bench restart [--seconds S] [--every S] [--workers N] [--tunnels N]

Controller and synthetic workers are processes of their own. Users create VMs and keep tunnels busy all the time. After
each kill the benchmark prints when the API answered, when all workers had registered, and when all tunnels carried bytes
again, in seconds from the new start. Exits with 1 if an acknowledged VM is lost or a VM has failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from orchard.client import Client, ClientError

# VMs that are created in the course of the run.
VMS = 300
# Pause between creations, and between bytes over a tunnel.
PAUSE_SECONDS = 0.1
# Interval of checking a condition.
CHECK_SECONDS = 0.02
# The time in which everything must recover.
RECOVERY_SECONDS = 60.0


class RestartedCluster:
    """A controller that is killed and started, its workers, and its users."""

    def __init__(self, home: Path, port: int, workers: int) -> None:
        self.home = home
        self.port = port
        self.workers = [f"w-{number}" for number in range(1, workers + 1)]
        self.url = f"http://127.0.0.1:{port}"
        # Names of acknowledged VMs.
        self.created: list[str] = []
        # Numbers of the tunnels that carried bytes since the last kill.
        self.carried: set[int] = set()
        self._log = (home / "log").open("w")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "ORCHARD_HOME": str(self.home)}
        return subprocess.Popen([sys.executable, "-m", *arguments], env=env, stdout=self._log, stderr=self._log)

    def start_controller(self) -> subprocess.Popen[bytes]:
        options = ("--insecure-no-tls", "--insecure-no-auth", "--listen", f"127.0.0.1:{self.port}")
        return self.start("orchard.controller", *options)

    def start_workers(self) -> subprocess.Popen[bytes]:
        options = ("--runtime", "synthetic", "--name", "w", "--workers", str(len(self.workers)))
        return self.start("orchard.worker", self.url, *options)

    async def create(self, client: Client) -> None:
        for number in range(VMS):
            name = f"vm-{number}"
            with suppress(ClientError):
                await client.vms.create(name=name, image="any")
                self.created.append(name)
            await trio.sleep(PAUSE_SECONDS)

    async def keep_busy(self, client: Client, number: int, port: int) -> None:
        """Send bytes through a tunnel, and open another when it breaks."""
        while True:
            with suppress(ClientError, trio.BrokenResourceError, trio.ClosedResourceError):
                async with client.workers.port_forward(self.workers[number % len(self.workers)], port) as stream:
                    while True:
                        await stream.send_all(b"x")
                        if not await stream.receive_some(1):
                            break
                        self.carried.add(number)
                        await trio.sleep(PAUSE_SECONDS)
            await trio.sleep(CHECK_SECONDS)

    async def answers(self, client: Client) -> bool:
        with suppress(ClientError):
            await client.check()
            return True
        return False

    async def registered(self, client: Client) -> bool:
        """Return whether each worker has sent a heartbeat since the start."""
        found = await client.workers.list()
        return len(found) == len(self.workers) and all(worker.last_seen for worker in found)

    async def lost(self, client: Client, before: list[str]) -> list[str]:
        found = {vm.name: vm for vm in await client.vms.list()}
        failed = [
            f"{vm.name} has failed: {vm.state.status_message}" for vm in found.values() if vm.state.status == "failed"
        ]
        return [f"{name} is lost" for name in before if name not in found] + failed


async def wait_until(condition: Callable[[], object]) -> float:
    """Wait until a condition holds, and return the time."""
    with trio.fail_after(RECOVERY_SECONDS):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:  # type: ignore[misc]
                return trio.current_time()
            await trio.sleep(CHECK_SECONDS)


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


async def run_kills(cluster: RestartedCluster, options: argparse.Namespace) -> list[str]:
    """Kill and start the controller again and again. Return what was lost or failed."""
    problems: list[str] = []
    control, workers = cluster.start_controller(), cluster.start_workers()
    try:
        async with Client(cluster.url) as client, trio.open_nursery() as nursery:
            await wait_until(partial(cluster.answers, client))
            await wait_until(partial(cluster.registered, client))
            listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
            nursery.start_soon(cluster.create, client)
            for number in range(options.tunnels):
                nursery.start_soon(cluster.keep_busy, client, number, listeners[0].socket.getsockname()[1])
            end = trio.current_time() + options.seconds
            print("kill", "API", "workers", "tunnels", "VMs", sep="\t")
            kills = 0
            while trio.current_time() < end and not problems:
                await trio.sleep(options.every)
                before = list(cluster.created)
                control.send_signal(signal.SIGKILL)
                control.wait()
                cluster.carried.clear()
                kills += 1
                control, began = cluster.start_controller(), trio.current_time()
                times = [await wait_until(partial(cluster.answers, client)) - began]
                times.append(await wait_until(partial(cluster.registered, client)) - began)
                times.append(await wait_until(lambda: len(cluster.carried) == options.tunnels) - began)
                print(kills, *(f"{seconds:.2f} s" for seconds in times), len(before), sep="\t", flush=True)
                problems = await cluster.lost(client, before)
            nursery.cancel_scope.cancel()
    finally:
        for process in (workers, control):
            process.terminate()
            process.wait()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench restart")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="duration of the run; default: %(default)s")
    add("--every", type=float, default=5.0, help="seconds between recovery and the next kill; default: %(default)s")
    add("--workers", type=int, default=500, help="synthetic workers, in one process; default: %(default)s")
    add("--tunnels", type=int, default=50, help="busy tunnels; default: %(default)s")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="orchard-restart-") as home:
        problems = trio.run(run_kills, RestartedCluster(Path(home), port, options.workers), options)
    print(*problems or ["no VM was lost, and none has failed"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
