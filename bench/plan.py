"""The cost of scheduling: assignments per second, and one change in a small and in a large cluster.

    ./run bench plan

Planning alone: 10,000 pending VMs on 5,000 workers with capacity for two, compared with sorting all workers for each VM.
Durable: the same with a real store on disk, and the longest time for which other tasks had to wait.
One change: a VM's report in clusters of 100 and of 10,000 VMs, from the transaction to the next plan.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import trio
from cluster import NOW, PER_WORKER, vm_of, worker_of
from measure import ROUNDS, Turns, Variant, compare, turns

from orchard import scheduler, transitions
from orchard.base.daemon import collect_garbage_less
from orchard.control.scheduling_loop import SchedulingLoop
from orchard.controller import DEFAULT_OFFLINE_TIMEOUT
from orchard.decisions import planning
from orchard.decisions.early_failures import EarlyFailures
from orchard.decisions.liveness import Liveness
from orchard.resources.bodies import VMReport
from orchard.schema import VM, Worker
from orchard.storage.file_engine import FileEngine
from orchard.store import Store

VMS, WORKERS = 10_000, 5_000
# Sorting all workers for each of VMS would take minutes.
SORTED_VMS = 100
CHANGES = 200


def connect(liveness: Liveness, worker: str) -> None:
    """Begin a session of a worker, which is whole at once."""
    source = ("", "")
    liveness.record_registration(worker, source)
    liveness.record_watch(worker, source)
    liveness.record_poll(worker, source)


def connected(workers: dict[str, Worker]) -> Liveness:
    """Return the liveness of workers that are all online."""
    liveness = Liveness(lambda: 0.0, DEFAULT_OFFLINE_TIMEOUT, lambda _: None, dict.fromkeys(workers, 0.0), {})
    for name in workers:
        connect(liveness, name)
    return liveness


def planned(vms: list[VM], workers: dict[str, Worker], liveness: Liveness) -> None:
    """Plan for VMs that all fit, with a new planner."""
    inputs = planning.PlannerInputs(
        workers=liveness,
        failures=EarlyFailures(),
        restarted_at={},
        offline_timeout=DEFAULT_OFFLINE_TIMEOUT,
        forgotten_until=0.0,
        failed_before_start=set(),
    )
    planner = scheduler.Planner(inputs)
    for worker in workers.values():
        planner.put_worker(worker)
    for vm in vms:
        planner.put_vm(vm)
    assert len(planner.plan(0.0, "optimize-utilization").assign) == len(vms)


def sorted_each_time(vms: list[VM], workers: dict[str, Worker]) -> None:
    """Assign VMs in the simplest way: sort all workers for each."""
    loads = {name: planning.Load() for name in workers}
    for vm in vms:
        for name in sorted(workers, key=lambda name: (-loads[name].count, name)):
            if planning.fits(planning.demand_of(vm.spec), workers[name], loads[name]):
                loads[name].add(vm)
                break


class BusyCluster:
    """A cluster with `count` running VMs in a store."""

    def __init__(self, store: Store, count: int) -> None:
        self.store = store
        self.loop = SchedulingLoop(self.store, DEFAULT_OFFLINE_TIMEOUT, lambda: NOW)
        self.names = [f"vm-{number}" for number in range(count)]
        with self.store.transaction() as tx:
            for number in range(-(-count // PER_WORKER)):
                tx.put(worker_of(number))
                connect(self.loop.liveness, f"worker-{number}")
            for number in range(count):
                tx.put(vm_of(number))
        self.schedule()
        self.changes = 0

    def schedule(self) -> None:
        while self.loop.schedule_some(trio.current_time(), NOW) is None:
            pass

    async def change(self) -> None:
        """Apply CHANGES reports, each followed by planning."""
        for _ in range(CHANGES):
            self.changes += 1
            old = self.store.state.vms[self.names[self.changes % len(self.names)]]
            seen = VMReport(uid=old.uid, status="running", status_message=f"change {self.changes}")
            with self.store.transaction() as tx:
                tx.put(transitions.report(old, seen, NOW))
            self.schedule()
        await trio.lowlevel.checkpoint()


async def measure_changes() -> None:
    with tempfile.TemporaryDirectory() as small_home, tempfile.TemporaryDirectory() as big_home:
        small = BusyCluster(await Store.open(FileEngine(Path(small_home)), NOW), 100)
        big = BusyCluster(await Store.open(FileEngine(Path(big_home)), NOW), VMS)
        async with trio.open_nursery() as nursery:
            for busy in (small, big):
                nursery.start_soon(busy.store.run)
                await busy.store.wait_durable()
            await turns(
                Variant(f"one change among {VMS:,} VMs", big.change, CHANGES),
                Variant("one change among 100 VMs", small.change, CHANGES),
            )
            nursery.cancel_scope.cancel()


async def assign_durably() -> tuple[float, float]:
    """Assign VMS VMs to WORKERS workers, on disk. Return the seconds, and those of the longest task step."""
    watched = Turns()
    with tempfile.TemporaryDirectory() as home:
        store = await Store.open(FileEngine(Path(home)), NOW)
        loop = SchedulingLoop(store, DEFAULT_OFFLINE_TIMEOUT, lambda: NOW)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            with store.transaction() as tx:
                for number in range(VMS):
                    tx.put(vm_of(number))
                for number in range(WORKERS):
                    tx.put(worker_of(number))
                    connect(loop.liveness, f"worker-{number}")
            await store.wait_durable()
            trio.lowlevel.add_instrument(watched)
            began = trio.current_time()
            nursery.start_soon(loop.run)
            while sum(map(len, store.state.vms_by_worker.values())) < VMS:  # noqa: ASYNC110 -- nothing signals it
                await trio.sleep(0.01)
            await store.wait_durable()
            took = trio.current_time() - began
            trio.lowlevel.remove_instrument(watched)
            nursery.cancel_scope.cancel()
        store.close()
    return took, watched.longest


def main() -> None:
    vms, workers = [vm_of(number) for number in range(VMS)], {w.name: w for w in map(worker_of, range(WORKERS))}
    liveness = connected(workers)
    compare(
        Variant(f"plan: {VMS:,} VMs on {WORKERS:,} workers", lambda: planned(vms, workers, liveness), VMS),
        Variant("all workers sorted for each VM", lambda: sorted_each_time(vms[:SORTED_VMS], workers), SORTED_VMS),
    )
    # As the controller's process does.
    collect_garbage_less()
    measured = [trio.run(assign_durably) for _ in range(ROUNDS)]
    rates = sorted(VMS / took for took, _ in measured)
    longest = sorted(1000 * turn for _, turn in measured)
    print(
        f"assigned durably: {statistics.median(rates):,.0f} a second ({rates[0]:,.0f} to {rates[-1]:,.0f});"
        f" longest task step {statistics.median(longest):.1f} ms ({longest[0]:.1f} to {longest[-1]:.1f})"
    )
    trio.run(measure_changes)


if __name__ == "__main__":
    main()
