"""How long nothing is acknowledged at each fault of controllers and etcd, and what etcd costs.

    ./run bench failover

Three etcd nodes on loopback, which write through to disk, two controllers with a lease of five seconds, and three clients
that create VMs. For each fault: the longest time without an acknowledged creation. Then creations a second by 64 clients,
on etcd and on files in the same run.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "cluster"))

from harness.processes import LISTENING, PLAIN, started
from test_failover import ATTACKS, Attack, site

from orchard.client import Client, ClientError

CLIENTS = 64
SECONDS = 5.0


async def longest_gap(attack: Attack, home: Path) -> float:
    """Return the longest time without an acknowledged creation, from two seconds before a fault to three after its end."""
    async with (
        site(home) as s,
        Client(s.url, connect_seconds=2, answer_seconds=10) as client,
        trio.open_nursery() as nursery,
    ):
        await s.leader()
        times: list[float] = []

        async def write(writer: int) -> None:
            number = 0
            while True:
                number += 1
                try:
                    await client.vms.create(name=f"vm-{writer}-{number}", image="i")
                    times.append(trio.current_time())
                except ClientError:
                    pass
                await trio.sleep(0.01)

        for writer in range(3):
            nursery.start_soon(write, writer)
        await trio.sleep(2)
        await attack(s)
        await s.leader()
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    return max(after - before for before, after in pairwise(times))


async def creations(url: str) -> float:
    """Return the creations a second by all clients together."""
    count = 0
    async with trio.open_nursery() as nursery:

        async def create(number: int) -> None:
            nonlocal count
            async with Client(url) as client:
                for each in range(1_000_000):
                    await client.vms.create(name=f"vm-{number}-{each}", image="i")
                    count += 1

        began = time.monotonic()
        for number in range(CLIENTS):
            nursery.start_soon(create, number)
        await trio.sleep(SECONDS)
        took = time.monotonic() - began
        nursery.cancel_scope.cancel()
    return count / took


async def main() -> None:
    for attack in ATTACKS:
        with TemporaryDirectory() as home:
            print(f"{attack.__name__.replace('_', ' '):22} {await longest_gap(attack, Path(home)):6.2f} s", flush=True)
    with TemporaryDirectory() as home, ExitStack() as stack:
        role = stack.enter_context(started("controller", "--listen", "127.0.0.1:0", *PLAIN, home=Path(home)))
        on_files = await creations((await trio.to_thread.run_sync(role.wait_for, LISTENING))[1])
    with TemporaryDirectory() as home:
        async with site(Path(home), sync=True) as s:
            await s.leader()
            on_etcd = await creations(s.url)
    print(f"creations a second: {on_etcd:.0f} on etcd, {on_files:.0f} on files, {on_etcd / on_files:.2f} x")


if __name__ == "__main__":
    trio.run(main)
