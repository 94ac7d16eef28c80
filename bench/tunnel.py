"""What a tunnel costs: throughput against a bare TCP relay of two hops, set-up latency, tunnels per second.

    ./run bench tunnel [--megabytes N] [--rounds N]

Controller and worker are processes of their own, as they are deployed; the bare relay is two trio processes in a row.
Both carry the same bytes from the same server in this process, in turns. Prints medians, ranges, and the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial

import trio

from orchard.client import Client

PIECE = 64 * 1024
RELAY = """
import sys, trio
async def pump(source, sink):
    async for data in source: await sink.send_all(data)
    await sink.send_eof()
async def relay(near):
    try:
        async with await trio.open_tcp_stream("127.0.0.1", int(sys.argv[1])) as far, trio.open_nursery() as nursery:
            nursery.start_soon(pump, near, far)
            nursery.start_soon(pump, far, near)
    except* (OSError, trio.BrokenResourceError):
        pass
async def main():
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, relay, 0)
        print(listeners[0].socket.getsockname()[1], flush=True)
trio.run(main)
"""


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
    raise SystemExit("a process did not start")


async def served(stream: trio.SocketStream, size: int) -> None:
    """Send as much as is asked for, after the first byte."""
    await stream.receive_some(1)
    data = b"x" * PIECE
    with contextlib.suppress(trio.BrokenResourceError):
        for _ in range(size // PIECE):
            await stream.send_all(data)


async def timed(connect: Callable[[], contextlib.AbstractAsyncContextManager[trio.abc.Stream]], size: int) -> float:
    """Give MB/s of one transfer, without its set-up."""
    async with connect() as stream:
        left = size
        began = trio.current_time()
        await stream.send_all(b"x")
        while left > 0:
            left -= len(await stream.receive_some(PIECE))
        return size / 1e6 / (trio.current_time() - began)


@contextlib.asynccontextmanager
async def plain(port: int) -> AsyncIterator[trio.abc.Stream]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield stream


async def latency(connect: Callable[[], contextlib.AbstractAsyncContextManager[trio.abc.Stream]]) -> float:
    began = trio.current_time()
    async with connect():
        return (trio.current_time() - began) * 1000


async def at_once(connect: Callable[[], contextlib.AbstractAsyncContextManager[trio.abc.Stream]], count: int) -> float:
    """Give how many tunnels are opened and closed in a second, 20 at a time."""
    limit = trio.CapacityLimiter(20)

    async def one() -> None:
        async with limit, connect():
            pass

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return count / (trio.current_time() - began)


async def held(
    connect: Callable[[], contextlib.AbstractAsyncContextManager[trio.abc.Stream]],
    count: int,
    then: Callable[[], Awaitable[float]],
) -> tuple[float, float]:
    """Open so many tunnels and keep them; give the seconds until each has echoed a byte, and what `then` gives."""
    limit, missing, everybody = trio.CapacityLimiter(20), count, trio.Event()

    async def one() -> None:
        nonlocal missing
        async with contextlib.AsyncExitStack() as stack:
            async with limit:
                stream = await stack.enter_async_context(connect())
                await stream.send_all(b"?")
                assert await stream.receive_some(1) == b"?"
            missing -= 1
            if not missing:
                everybody.set()
            await trio.sleep_forever()

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await everybody.wait()
        took = trio.current_time() - began
        result = await then()
        nursery.cancel_scope.cancel()
    return took, result


async def echo(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


def told(name: str, values: list[float], unit: str) -> None:
    print(f"{name:34} {statistics.median(values):10.2f} {unit}   ({min(values):.2f} to {max(values):.2f})")


async def main(options: argparse.Namespace) -> None:
    size = options.megabytes * 1_000_000 // PIECE * PIECE
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        env = {**os.environ, "ORCHARD_HOME": home}
        arguments = ("--listen", "127.0.0.1:0", "--insecure-no-tls", "--insecure-no-auth")
        controller = stack.enter_context(process("-m", "orchard.controller", *arguments, env=env))
        url = line_of(controller, r"listening on (\S+)")
        stack.enter_context(process("-m", "orchard.worker", url, "--runtime", "synthetic", env=env))
        async with Client(url) as client, trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, partial(served, size=size), 0)
            port = listeners[0].socket.getsockname()[1]
            last = stack.enter_context(process("-c", RELAY, str(port)))
            first = stack.enter_context(process("-c", RELAY, line_of(last, "([0-9]+)")))
            relay = partial(plain, int(line_of(first, "([0-9]+)")))
            await client.vms.create(name="vm", image="any")
            await client.vms.wait("vm")
            tunnel = partial(client.vms.port_forward, "vm", port)
            runs: dict[str, list[float]] = {"bare": [], "tunnel": []}
            for _ in range(options.rounds):
                runs["bare"].append(await timed(relay, size))
                runs["tunnel"].append(await timed(tunnel, size))
            told("bare relay of two hops", runs["bare"], "MB/s")
            told("tunnel", runs["tunnel"], "MB/s")
            told("tunnel / bare relay", [a / b for a, b in zip(runs["tunnel"], runs["bare"], strict=True)], "x")
            told("set-up of a connection, bare", [await latency(relay) for _ in range(50)], "ms")
            told("set-up of a tunnel", [await latency(tunnel) for _ in range(50)], "ms")
            rates = [await at_once(tunnel, 100) for _ in range(options.rounds)]
            told("tunnels opened and closed, 20 at once", rates, "/s")
            echoing = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
            one_of = partial(client.vms.port_forward, "vm", echoing[0].socket.getsockname()[1])
            took, beside = await held(one_of, options.tunnels - 1, lambda: timed(tunnel, size))
            print(
                f"{options.tunnels:,} tunnels at once, open after {took:.1f} s; one of them carries {beside:.0f} MB/s"
            )
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench/tunnel.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=50, help="of one transfer; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--tunnels", type=int, default=1_000, help="open at once; default %(default)s")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    trio.run(main, parser.parse_args())
