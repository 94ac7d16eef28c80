"""Clusters of a given size: objects, and data directories that a controller starts from."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path

import trio

from orchard import auth, transitions
from orchard.resources.bodies import VMReport
from orchard.resources.validation import vm_from_client
from orchard.schema import TART_VMS, VM, ServiceAccount, Worker
from orchard.storage.file_engine import FileEngine
from orchard.store import Store

NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
# VMs that a host may run, the limit of Apple's licence.
PER_WORKER = 2
TOKEN = "t" * 32
AUTHORIZATION = "Basic " + base64.b64encode(f"admin:{TOKEN}".encode()).decode()


def vm_of(number: int) -> VM:
    """Return a pending VM."""
    spec = vm_from_client({"name": f"vm-{number}", "image": "ghcr.io/cirruslabs/macos-sequoia-base:latest"}, [])[1]
    return transitions.create(f"vm-{number}", f"uid-{number}", spec, NOW + datetime.timedelta(seconds=number))


def worker_of(number: int, capacity: int = PER_WORKER) -> Worker:
    return Worker(name=f"worker-{number}", resources={TART_VMS: capacity}, created_at=NOW, registered_by="admin")


def running_vm(number: int, capacity: int = PER_WORKER) -> VM:
    """Return a running VM. It shares its worker with others, so that the worker is full."""
    assigned = transitions.assign(vm_of(number), worker_of(number // capacity), NOW)
    return transitions.report(assigned, VMReport(uid=assigned.uid, status="running"), NOW)


def fill(store: Store, vms: int, workers: int) -> None:
    """Add a cluster to a store: the account of AUTHORIZATION, workers, and VMs that run on them."""
    capacity = max(PER_WORKER, vms // max(1, workers))
    with store.transaction() as tx:
        tx.put(ServiceAccount(name="admin", token=TOKEN, roles=auth.ROLES, created_at=NOW))
        for number in range(workers):
            tx.put(worker_of(number, capacity))
        for number in range(vms):
            tx.put(running_vm(number, capacity))


def prepare(home: Path, vms: int, workers: int) -> None:
    """Write a cluster to the data directory of a controller with ORCHARD_HOME `home`."""
    directory = home / ".orchard" / "controller"
    directory.mkdir(mode=0o700, parents=True)

    async def write() -> None:
        store = await Store.open(FileEngine(directory), NOW)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            fill(store, vms, workers)
            await store.wait_durable()
            nursery.cancel_scope.cancel()
        store.close()

    trio.run(write)
