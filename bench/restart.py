"""A controller under load is killed every few seconds: how long until it is back, and is anything lost or failed?

    ./run bench restart [--seconds S] [--every S] [--workers N] [--tunnels N]

Controller and synthetic workers are processes of their own. Users go on creating VMs and keep tunnels busy meanwhile. After
each kill it prints when the API answered, and when all workers had registered and all tunnels carried bytes again, in
seconds from the new start. Ends with 1 when a VM that was acknowledged is not there, or one has failed.
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

VMS = 300  # that are created in the course of time
CREATE_SECONDS = 0.1  # between two of them
LOOK_SECONDS = 0.02  # between two looks whether something is back
PATIENCE = 60.0  # seconds for anything to come back


class Site:
    """A controller that comes and goes, and those who use it."""

    def __init__(self, home: Path, port: int, workers: int) -> None:
        self.home = home
        self.port = port
        self.workers = [f"w-{number}" for number in range(1, workers + 1)]
        self.url = f"http://127.0.0.1:{port}"
        self.created: list[str] = []  # and acknowledged
        self.carried: set[int] = set()  # tunnels that have carried bytes lately
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
            await trio.sleep(CREATE_SECONDS)

    async def keep_busy(self, client: Client, number: int, port: int) -> None:
        """Send bytes through a tunnel all the time, and open another when it breaks."""
        while True:
            with suppress(ClientError, trio.BrokenResourceError, trio.ClosedResourceError):
                async with client.workers.port_forward(self.workers[number % len(self.workers)], port) as stream:
                    while True:
                        await stream.send_all(b"x")
                        if not await stream.receive_some(1):
                            break
                        self.carried.add(number)
                        await trio.sleep(CREATE_SECONDS)
            await trio.sleep(LOOK_SECONDS)

    async def answers(self, client: Client) -> bool:
        with suppress(ClientError):
            await client.check()
            return True
        return False

    async def registered(self, client: Client) -> bool:
        """Whether each worker has been heard since the start."""
        found = await client.workers.list()
        return len(found) == len(self.workers) and all(worker.last_seen for worker in found)

    async def lost(self, client: Client, before: list[str]) -> list[str]:
        found = {vm.name: vm for vm in await client.vms.list()}
        failed = [
            f"{vm.name} has failed: {vm.state.status_message}" for vm in found.values() if vm.state.status == "failed"
        ]
        return [f"{name} is lost" for name in before if name not in found] + failed


async def until(holds: Callable[[], object]) -> float:
    """Wait until something holds, and give when it did."""
    with trio.fail_after(PATIENCE):
        while True:
            held = holds()
            if held if isinstance(held, bool) else await held:  # type: ignore[misc]
                return trio.current_time()
            await trio.sleep(LOOK_SECONDS)


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


async def play(site: Site, options: argparse.Namespace) -> list[str]:
    """Kill and start again; give what went wrong."""
    problems: list[str] = []
    control, workers = site.start_controller(), site.start_workers()
    try:
        async with Client(site.url) as client, trio.open_nursery() as nursery:
            await until(partial(site.answers, client))
            await until(partial(site.registered, client))
            listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
            nursery.start_soon(site.create, client)
            for number in range(options.tunnels):
                nursery.start_soon(site.keep_busy, client, number, listeners[0].socket.getsockname()[1])
            end = trio.current_time() + options.seconds
            print("kill", "API", "workers", "tunnels", "VMs", sep="\t")
            kills = 0
            while trio.current_time() < end and not problems:
                await trio.sleep(options.every)
                before = list(site.created)
                control.send_signal(signal.SIGKILL)
                control.wait()
                site.carried.clear()
                kills += 1
                control, began = site.start_controller(), trio.current_time()
                times = [await until(partial(site.answers, client)) - began]
                times.append(await until(partial(site.registered, client)) - began)
                times.append(await until(lambda: len(site.carried) == options.tunnels) - began)
                print(kills, *(f"{seconds:.2f} s" for seconds in times), len(before), sep="\t", flush=True)
                problems = await site.lost(client, before)
            nursery.cancel_scope.cancel()
    finally:
        for process in (workers, control):
            process.terminate()
            process.wait()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench restart")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="to go on for; default: %(default)s")
    add("--every", type=float, default=5.0, help="seconds between a return and the next kill; default: %(default)s")
    add("--workers", type=int, default=500, help="synthetic ones, in one process; default: %(default)s")
    add("--tunnels", type=int, default=50, help="that are busy; default: %(default)s")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="orchard-restart-") as home:
        problems = trio.run(play, Site(Path(home), port, options.workers), options)
    print(*problems or ["nothing was lost, and nothing has failed"], sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
