"""Check that no acknowledged change is lost in many faults of controllers and etcd, one after the other on one cluster.

    ./run bench faults [--faults N] [--seed N]

Three etcd nodes on loopback, two controllers with a lease of five seconds, a worker with eight VMs that may be started
elsewhere, and three clients that create and delete VMs. The faults are those of tests/cluster/test_failover.py, by chance,
short ones more often. After each, what is there is compared with what was acknowledged, and none of the eight VMs may have
been touched.
Exits with 1 if anything was lost, applied twice, answered by a former leader, or touched.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "cluster"))

from harness.processes import eventually, started
from test_failover import (
    SYNTHETIC,
    Attack,
    Site,
    freeze_leader,
    kill_both,
    kill_leader,
    kill_leader_of_etcd,
    lose_answers,
    lose_quorum,
    site,
    stop_leader,
)

from orchard.client import Client, ClientError, ResponseError

# Acknowledged changes after each fault.
WRITES = 30
VMS = 8
# Time in which a controller that cannot start has ended.
START_SECONDS = 3.0
# VMs that one client keeps.
KEPT = 30


async def lose_some_answers(s: Site) -> None:
    """Lose the answers to the next writes, and go on at once."""
    for proxy in s.proxies:
        proxy.cuts = 2
    await trio.sleep(0.2)


FAULTS: dict[Attack, int] = {
    lose_some_answers: 8, stop_leader: 8, kill_leader: 4, kill_leader_of_etcd: 4, freeze_leader: 1, kill_both: 1,
    lose_quorum: 1, lose_answers: 1,
}  # fmt: skip


class Writer:
    """A client that creates VMs and deletes the oldest ones. `known` has those that are there for certain, by name."""

    def __init__(self, number: int, client: Client) -> None:
        self.known: dict[str, str] = {}
        # Names whose last request has an unknown outcome.
        self.unknown: set[str] = set()
        self.gone: set[str] = set()
        self.acknowledged = 0
        self._number = number
        self._client = client
        self._count = 0

    async def write(self, is_over: trio.Event) -> None:
        while not is_over.is_set():
            if len(self.known) >= KEPT:
                await self._delete(next(iter(self.known)))
            else:
                await self._create()
            await trio.sleep(0.01)

    async def _create(self) -> None:
        name, self._count = f"vm-{self._number}-{self._count}", self._count + 1
        self.unknown.add(name)
        try:
            uid = (await self._client.vms.create(name=name, image="i", labels={"none": "here"})).uid
        except ClientError:
            return
        self.unknown.discard(name)
        self.known[name] = uid
        self.acknowledged += 1

    async def _delete(self, name: str) -> None:
        del self.known[name]
        self.unknown.add(name)
        try:
            await self._client.vms.delete(name)
        except ResponseError as error:
            # The VM must exist unless an earlier try was carried out, and an error without an answer would show that.
            if error.status == 404:
                self.gone.add(name)
            return
        except ClientError:
            return
        self.unknown.discard(name)
        self.gone.add(name)
        self.acknowledged += 1


async def keep_running(s: Site) -> None:
    """Start controllers again that have ended by themselves, as systemd does: a start fails while etcd does not answer."""
    while ended := [number for number, role in enumerate(s.roles) if role.process.poll() is not None]:
        for number in ended:
            s.start_again(number)
        await trio.sleep(START_SECONDS)


async def wait_acknowledged(writers: list[Writer], count: int) -> None:
    """Wait until so many more changes are acknowledged."""
    goal = sum(writer.acknowledged for writer in writers) + count
    await eventually(lambda: sum(writer.acknowledged for writer in writers) >= goal)


async def problems_of(client: Client, writers: list[Writer], lives: set[tuple[str, int]]) -> list[str]:
    """Compare what is there with what was acknowledged, while no client writes."""
    vms = await client.vms.list()
    found = {vm.name: vm.uid for vm in vms}
    problems = []
    for writer in writers:
        problems += [f"{name} is lost" for name, uid in writer.known.items() if found.get(name) != uid]
        problems += [f"{name} is there again" for name in writer.gone if name in found]
        writer.gone.clear()
    touched = lives - {(vm.uid, vm.state.restart_count) for vm in vms if vm.state.status == "running"}
    return problems + [f"VM {uid} was touched" for uid, _ in touched]


async def run_faults(home: Path, count: int, chance: random.Random) -> list[str]:
    done: Counter[str] = Counter()
    async with site(home) as s, Client(s.url, connect_seconds=2, answer_seconds=10) as client:
        await s.leader()
        with started("worker", s.url, "--name", "mac", *SYNTHETIC, home=home / "worker"):
            for number in range(VMS):
                await client.vms.create(name=f"lives-{number}", image="i", restart_policy="OnFailure")
            lives = {(vm.uid, 0) for vm in [await client.vms.wait(f"lives-{number}") for number in range(VMS)]}
            writers = [Writer(number, client) for number in range(3)]
            for number in range(1, count + 1):
                await keep_running(s)
                attack = chance.choices(list(FAULTS), list(FAULTS.values()))[0]
                is_over = trio.Event()
                async with trio.open_nursery() as nursery:
                    for writer in writers:
                        nursery.start_soon(writer.write, is_over)
                    await attack(s)
                    await wait_acknowledged(writers, WRITES)
                    is_over.set()
                done[attack.__name__] += 1
                await s.etcd.wait_ready()
                await s.leader()
                problems = await problems_of(client, writers, lives)
                if problems or number % 20 == 0 or number == count:
                    acknowledged = sum(writer.acknowledged for writer in writers)
                    print(f"{number} faults {dict(done)}, {acknowledged:,} acknowledged, {problems}", flush=True)
                if problems:
                    return problems
    return []


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run bench faults")
    parser.add_argument("--faults", type=int, default=100, help="number of faults; default %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of their order; default %(default)s")
    options = parser.parse_args(None if argv is None else list(argv))
    with TemporaryDirectory() as home:
        return 1 if trio.run(run_faults, Path(home), options.faults, random.Random(options.seed)) else 0


if __name__ == "__main__":
    sys.exit(main())
