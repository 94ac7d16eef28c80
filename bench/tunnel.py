"""The costs of tunnels: throughput beside a bare TCP relay of two hops, latency of the set-up, a thousand at a time.

    ./run bench tunnel [--megabytes N] [--rounds N] [--tunnels N]

Controller and worker are processes of their own, as in a deployment, once without the extra fast and once with it. The
bare relay is a chain of two trio processes. All of them carry the same bytes from and to the same server in this process,
in turns: from the VM (down) and to the VM (up). An operation is a megabyte; the processor time is that of the two
processes between the ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from measure import Variant, turns

from orchard.client import Client
from orchard.net import wsframes

FAST = importlib.util.find_spec("websockets") is not None
PIECE = 64 * 1024
DOWN, UP = b"d", b"u"
RELAY = """
import contextlib, sys, trio
async def pump(source, sink):
    with contextlib.suppress(trio.BrokenResourceError):
        async for data in source: await sink.send_all(data)
        await sink.send_eof()
async def relay(near):
    async with await trio.open_tcp_stream("127.0.0.1", int(sys.argv[1])) as far, trio.open_nursery() as nursery:
        nursery.start_soon(pump, near, far)
        nursery.start_soon(pump, far, near)
async def main():
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, relay, 0)
        print(listeners[0].socket.getsockname()[1], flush=True)
trio.run(main)
"""
PURE = "import runpy, sys; sys.modules['websockets'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
Connect = Callable[[], contextlib.AbstractAsyncContextManager[trio.abc.Stream]]


@dataclass
class Route:
    """A route for the bytes: how to connect, the processes on it, and how its client masks."""

    name: str
    connect: Connect
    processes: list[subprocess.Popen[str]]
    masked: Callable[[wsframes.Bytes, bytes], wsframes.Bytes] = wsframes.mask

    def cpu(self) -> float:
        """Return the processor time of the processes so far, in seconds."""
        return sum(processor_seconds(child.pid) for child in self.processes)

    def memory(self) -> float:
        """Return the memory of the processes, in KiB."""
        listed = subprocess.run(
            ["ps", "-o", "rss=", "-p", ",".join(str(child.pid) for child in self.processes)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return sum(map(float, listed.stdout.split()))


def processor_seconds(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        fields = stat.read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    listed = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True)
    minutes, _, seconds = listed.stdout.strip().rpartition(":")
    return 60 * float(minutes) + float(seconds)


@contextlib.contextmanager
def process(*command: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    try:
        yield child
    finally:
        child.terminate()
        child.wait()


def line_of(child: subprocess.Popen[str], pattern: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if match := re.search(pattern, line):
            return match[1]
    raise SystemExit(f"a process ended before it printed a line that matches {pattern}")


async def serve_transfer(stream: trio.SocketStream, size: int) -> None:
    """Serve one transfer in the VM. Its first byte is the direction: DOWN sends `size` bytes, UP receives them."""
    with contextlib.suppress(trio.BrokenResourceError):
        wanted = await stream.receive_some(1)
        if wanted == DOWN:
            data = b"x" * PIECE
            for _ in range(size // PIECE):
                await stream.send_all(data)
        elif wanted == UP:
            await receive_all(stream, size)
            await stream.send_all(b"all")


async def receive_all(stream: trio.abc.Stream, size: int) -> None:
    while size > 0:
        data = await stream.receive_some(PIECE)
        if not data:
            raise SystemExit(f"the transfer ended {size} bytes before its end")
        size -= len(data)


async def transfer(route: Route, direction: bytes, size: int) -> None:
    wsframes.mask = route.masked
    async with route.connect() as stream:
        await stream.send_all(direction)
        if direction == DOWN:
            await receive_all(stream, size)
        else:
            data = b"x" * PIECE
            for _ in range(size // PIECE):
                await stream.send_all(data)
            await receive_all(stream, 3)


@contextlib.asynccontextmanager
async def plain(port: int) -> AsyncIterator[trio.abc.Stream]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield stream


async def measure_latency(connect: Connect) -> float:
    began = time.perf_counter()
    async with connect():
        return (time.perf_counter() - began) * 1000


async def measure_open_and_close(connect: Connect, count: int) -> float:
    """Return how many tunnels are opened and closed in a second, 20 at a time."""
    limit = trio.CapacityLimiter(20)

    async def one() -> None:
        async with limit, connect():
            pass

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return count / (time.perf_counter() - began)


@contextlib.asynccontextmanager
async def held(connect: Connect, count: int) -> AsyncIterator[None]:
    """Keep `count` connections open during the block."""
    limit = trio.CapacityLimiter(20)

    async def one(task_status: trio.TaskStatus[None]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with limit:
                await stack.enter_async_context(connect())
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as opening:
            for _ in range(count):
                opening.start_soon(partial(nursery.start, one))
        yield
        nursery.cancel_scope.cancel()


def show_median(name: str, values: list[float], unit: str) -> None:
    print(f"{name:44} {statistics.median(values):10.2f} {unit}   ({min(values):.2f} to {max(values):.2f})")


@contextlib.asynccontextmanager
async def deployed(name: str, port: int, *, fast: bool) -> AsyncIterator[Route]:
    """Run a controller and a worker with a VM, and yield the route to the port in it."""
    prefix = ("-m",) if fast else ("-c", PURE)
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        env = {**os.environ, "ORCHARD_HOME": home}
        arguments = ("--listen", "127.0.0.1:0", "--insecure-no-tls", "--insecure-no-auth")
        controller = stack.enter_context(process(*prefix, "orchard.controller", *arguments, env=env))
        url = line_of(controller, r"listening on (\S+)")
        worker = stack.enter_context(process(*prefix, "orchard.worker", url, "--runtime", "synthetic", env=env))
        async with Client(url) as client:
            await client.vms.create(name="vm", image="any")
            await client.vms.wait("vm")
            masked = wsframes.mask if fast else wsframes.mask_in_python
            yield Route(name, partial(client.vms.port_forward, "vm", port), [controller, worker], masked)


@contextlib.contextmanager
def relayed(name: str, port: int) -> Iterator[Route]:
    with process("-c", RELAY, str(port)) as last, process("-c", RELAY, line_of(last, "([0-9]+)")) as first:
        yield Route(name, partial(plain, int(line_of(first, "([0-9]+)"))), [first, last])


async def throughput(routes: list[Route], rounds: int, size: int, suffix: str = "") -> None:
    for word, direction in (("down", DOWN), ("up", UP)):
        variants = [
            Variant(
                f"{route.name}, {word}{suffix}", partial(transfer, route, direction, size), size // 1_000_000, route.cpu
            )
            for route in routes
        ]
        await turns(*variants, count=rounds)


async def main(options: argparse.Namespace) -> None:
    size = options.megabytes * 1_000_000 // PIECE * PIECE
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        listeners = await nursery.start(trio.serve_tcp, partial(serve_transfer, size=size), 0)
        port = listeners[0].socket.getsockname()[1]
        routes = [await stack.enter_async_context(deployed("tunnel", port, fast=False))]
        if FAST:
            routes.append(await stack.enter_async_context(deployed("tunnel with the extra fast", port, fast=True)))
        else:
            print("the extra fast is not installed and not measured; to install it: .venv/bin/pip install -e '.[fast]'")
        bare = stack.enter_context(relayed("bare relay", port))
        await throughput([*routes, bare], options.rounds, size)
        for route in (routes[-1], bare):
            show_median(f"set-up, {route.name}", [await measure_latency(route.connect) for _ in range(100)], "ms")
        tunnel = routes[-1]
        rates = [await measure_open_and_close(tunnel.connect, 100) for _ in range(options.rounds)]
        show_median("opened and closed, 20 at once", rates, "/s")
        before, began = tunnel.memory(), time.perf_counter()
        async with held(tunnel.connect, options.tunnels):
            seconds = time.perf_counter() - began
            each = (tunnel.memory() - before) / options.tunnels
            print(
                f"{options.tunnels} tunnels are open: {seconds:.1f} s, {each:.0f} KiB each, controller and worker together"
            )
            cpu = tunnel.cpu()
            await trio.sleep(5)
            print(f"while idle they take {(tunnel.cpu() - cpu) / 5:.1%} of a processor")
            await throughput([tunnel, bare], options.rounds, size, f", {options.tunnels} open")
            show_median("set-up of another one", [await measure_latency(tunnel.connect) for _ in range(100)], "ms")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench/tunnel.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=100, help="size of one transfer; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--tunnels",
        type=int,
        default=1000,
        help="number of tunnels that are open at the same time; default %(default)s",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, hard), hard))
    trio.run(main, parser.parse_args())
