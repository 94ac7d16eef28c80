"""The time without acknowledgements at each fault of controllers and etcd, and the cost of etcd.

    ./run bench failover [--only faults|costs|takeover] [--vms N] [--rounds N]

Three etcd nodes on loopback, two controllers with a lease of five seconds, and three clients that create VMs. For each
fault: the longest time without an acknowledged creation. Then, with nodes that write through to disk: the cost of
creations by 64 clients, of requests for one VM and of polls of a worker without VMs, on etcd and on files in turns. At
last, on an etcd of its own with exactly N VMs that run on half as many workers: the time until another controller
answers, and its CPU time, when the leader is stopped and when it is killed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import trio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "cluster"))

from cluster import PER_WORKER, fill
from harness.processes import LISTENING, PLAIN, started
from test_failover import ATTACKS, TTL, Attack, site

from orchard.client import Client, ClientError
from orchard.control.recorder import Recorder
from orchard.control.stored_data import CampaignPlatform, EtcdSettings, StoredData, lead_in_turns, utc_now
from orchard.storage.etcd import EtcdAccess

CLIENTS = 64
SECONDS, ROUNDS = 3.0, 5
# The VM that is asked for, and how many there are at a takeover.
NAME, MANY = "vm", 10_000
# Time in which a controller begins to stand by and decodes what the leader has stored.
START_SECONDS = 10.0
# At a takeover, no worker is connected.
FOREVER = ("--worker-offline-timeout", "1000000")
# Limits of a takeover, in addition to the share of each 1,000 VMs.
LIMITS = {signal.SIGTERM: 0.5, signal.SIGKILL: TTL + 1.0}
SECONDS_OF_1000 = 0.1


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


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    """A controller that is measured: its name, its URL, its process, and the cost of each kind of request in each round."""

    name: str
    url: str
    pid: int
    rates: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    async def measure(self, kind: str, clients: int, ask: Callable[[Client, str], Awaitable[object]]) -> None:
        """Let clients ask for some seconds. Note the rate, and the controller's processor time for each request."""
        count = 0

        async def press(number: int) -> None:
            nonlocal count
            async with Client(self.url) as client:
                for each in itertools.count():
                    await ask(client, f"vm-{len(self.rates.get(kind, ()))}-{number}-{each}")
                    count += 1

        began, used = time.monotonic(), cpu_seconds(self.pid)
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(press, number)
            await trio.sleep(SECONDS)
            took = time.monotonic() - began
            nursery.cancel_scope.cancel()
        self.rates.setdefault(kind, []).append(count / took)
        self.cpu.setdefault(kind, []).append((cpu_seconds(self.pid) - used) / count * 1e6)


async def create(client: Client, name: str) -> None:
    await client.vms.create(name=name, image="i")


async def look(client: Client, _: str) -> None:
    await client.vms.get(NAME)


async def poll(client: Client, _: str) -> None:
    await client.vms.list(worker="mac")


KINDS = {"creation": (CLIENTS, create), "GET": (8, look), "poll of an idle worker": (8, poll)}


async def compare(on_etcd: Measured, on_files: Measured) -> None:
    """Print rates and processor times on etcd against those on files, measured in turns."""
    for each in (on_etcd, on_files):
        async with Client(each.url) as client:
            await create(client, NAME)
    for _ in range(ROUNDS):
        for kind, (clients, ask) in KINDS.items():
            for each in (on_etcd, on_files):
                await each.measure(kind, clients, ask)
    for kind in KINDS:
        for what, pairs in (
            ("a second", list(zip(on_etcd.rates[kind], on_files.rates[kind], strict=True))),
            ("us of CPU", list(zip(on_etcd.cpu[kind], on_files.cpu[kind], strict=True))),
        ):
            ratios = sorted(etcd / files for etcd, files in pairs)
            etcd, files = (median(values) for values in zip(*pairs, strict=True))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(
                f"{kind:24} {what:10} {etcd:8.0f} on etcd {files:8.0f} on files {median(ratios):6.2f} x ({spread})",
                flush=True,
            )


async def fill_etcd(vms: int, url: str) -> Sequence[str]:
    """Store VMs that run, their workers, and the records of both, as a controller does. Return options for controllers."""
    stop = trio.Event()

    async def serve(data: StoredData) -> None:
        async with trio.open_nursery() as writers:
            for writer in (data.store.run, data.events.run, data.history.run):
                await writers.start(writer)
            data.store.on_durable(Recorder(data.events, data.history, utc_now).record)
            fill(data.store, vms, vms // PER_WORKER)
            await data.store.wait_durable()
            await data.events.flush()
            writers.cancel_scope.cancel()
        stop.set()

    # The transaction takes longer than the usual lease.
    settings = EtcdSettings(EtcdAccess(url), leader_ttl=60.0)
    await lead_in_turns(settings, CampaignPlatform(), "http://127.0.0.1", stop, serve)
    # Directly, since the proxies of a site take time of the processor.
    return ("--etcd", url, *FOREVER)


async def take_over(home: Path, vms: int, rounds: int) -> None:
    """Print how long another controller takes to answer when the leader is stopped, and when it is killed."""
    async with site(home, sync=True, prepare=partial(fill_etcd, vms)) as s:
        await trio.sleep(START_SECONDS)
        for number_of in (signal.SIGTERM, signal.SIGKILL) * rounds:
            number = await s.leader()
            other = s.roles[1 - number].process
            used, began = cpu_seconds(other.pid), time.monotonic()
            s.roles[number].process.send_signal(number_of)
            while await s.leader() == number:
                pass
            took, used = time.monotonic() - began, cpu_seconds(other.pid) - used
            limit = LIMITS[number_of] + SECONDS_OF_1000 * vms / 1000
            print(
                f"{number_of.name} with {vms:,} VMs: {took:.2f} s (limit {limit:.1f}), {used / vms * 1e6:.0f} us of CPU a VM",
                flush=True,
            )
            await trio.to_thread.run_sync(s.roles[number].process.wait)
            s.start_again(number)
            await trio.sleep(START_SECONDS)
        for line in (line for role in s.roles for line in role.log_lines() if "VMs loaded" in line):
            print(line.partition("msg=")[2], flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench failover")
    parser.add_argument("--only", choices=("faults", "costs", "takeover"), help="default: all")
    parser.add_argument("--vms", type=int, default=MANY, help="at a takeover; default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="of takeovers; default %(default)s")
    options = parser.parse_args()
    for attack in ATTACKS if options.only in (None, "faults") else ():
        with TemporaryDirectory() as home:
            print(f"{attack.__name__.replace('_', ' '):22} {await longest_gap(attack, Path(home)):6.2f} s", flush=True)
    if options.only in (None, "costs"):
        with TemporaryDirectory() as home:
            await measure_costs(Path(home))
    if options.only in (None, "takeover"):
        with TemporaryDirectory() as home:
            await take_over(Path(home), options.vms, options.rounds)


async def measure_costs(home: Path) -> None:
    with started("controller", "--listen", "127.0.0.1:0", *PLAIN, home=home / "files") as role:
        url = (await trio.to_thread.run_sync(role.wait_for, LISTENING))[1]
        async with site(home, sync=True) as s:
            leader = s.roles[await s.leader()]
            await compare(Measured("etcd", s.url, leader.process.pid), Measured("files", url, role.process.pid))


if __name__ == "__main__":
    trio.run(main)
