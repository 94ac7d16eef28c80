"""Clusters of a given size: objects, and data directories that a controller starts from."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path

import trio

from orchard import auth, transitions
from orchard.schema import TART_VMS, VM, ServiceAccount, VMReport, Worker, vm_from_client
from orchard.store import Store

NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
PER_WORKER = 2  # VMs that a host may run, as Apple's licence has it
TOKEN = "t" * 32
AUTHORIZATION = "Basic " + base64.b64encode(f"admin:{TOKEN}".encode()).decode()


def vm_of(number: int) -> VM:
    """Give a VM that waits."""
    spec = vm_from_client({"name": f"vm-{number}", "image": "ghcr.io/cirruslabs/macos-sequoia-base:latest"}, [])[1]
    return transitions.create(f"vm-{number}", f"uid-{number}", spec, NOW + datetime.timedelta(seconds=number))


def worker_of(number: int, room: int = PER_WORKER) -> Worker:
    return Worker(name=f"worker-{number}", resources={TART_VMS: room}, created_at=NOW)


def running_vm(number: int, room: int = PER_WORKER) -> VM:
    """Give a VM that runs, beside others on a worker that is full."""
    assigned = transitions.assign(vm_of(number), worker_of(number // room), NOW)
    return transitions.report(assigned, VMReport(uid=assigned.uid, status="running"), NOW)


def fill(store: Store, vms: int, workers: int) -> None:
    """Put a cluster into a store: the account of AUTHORIZATION, so many workers, and VMs that run on them."""
    room = max(PER_WORKER, vms // max(1, workers))
    with store.transaction() as tx:
        tx.put(ServiceAccount(name="admin", token=TOKEN, roles=auth.ROLES, created_at=NOW))
        for number in range(workers):
            tx.put(worker_of(number, room))
        for number in range(vms):
            tx.put(running_vm(number, room))


def prepare(home: Path, vms: int, workers: int) -> None:
    """Write a cluster into the place where a controller with that ORCHARD_HOME looks for it."""
    directory = home / "controller"
    directory.mkdir(mode=0o700)

    async def write() -> None:
        store = Store.open(directory, NOW)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            fill(store, vms, workers)
            await store.wait_durable()
            nursery.cancel_scope.cancel()
        store.close()

    trio.run(write)
