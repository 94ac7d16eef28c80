"""A controller in the test's own process, which can be stopped and started again, and hosts with synthetic VMs.

Controller and workers are the product's own, on a loopback port. For tests that look into a worker, replace verbs of
its driver, or restart the controller. Who needs only a cluster takes `orchard.testing.cluster`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from harness.clients import wait_vm
from harness.disks import FailingDisk
from harness.processes import free_port
from orchard import controller
from orchard.client import Client
from orchard.control.stored_data import StoredData, open_data_directory
from orchard.schema import TART_VMS, VM, Worker
from orchard.storage.events import EventLog, event_files
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import WorkerService


class InProcessCluster:
    """A controller that keeps its port over restarts, and the drivers of its workers' hosts, all in one directory.

    `client` is a client of the running controller. The disk of the events is `events_disk`, which can be made to fail.
    """

    def __init__(self, home: Path, nursery: trio.Nursery, **settings: Any) -> None:
        self.home = home
        self.port = free_port()
        self.events_disk = FailingDisk()
        self.client: Client
        self._nursery = nursery
        self._settings = settings
        # Drivers, and with them VMs, stay when a worker ends.
        self._drivers: dict[str, SyntheticDriver] = {}
        self._stop: trio.Event
        self._stopped: trio.Event

    async def start(self) -> None:
        """Start the controller, and wait until it listens."""
        self._stop, self._stopped = trio.Event(), trio.Event()
        settings = controller.ControllerSettings(
            data_dir=self.home / "controller", host="127.0.0.1", port=self.port, tls=False, auth=False, **self._settings
        )

        @asynccontextmanager
        async def opened(directory: Path) -> AsyncIterator[StoredData]:
            async with open_data_directory(directory) as data:
                events = EventLog(*event_files(directory / "events", self.events_disk))
                events.open({vm.uid for vm in data.store.state.vms.values()})
                yield data._replace(events=events)

        async def run(task_status: trio.TaskStatus[controller.Running]) -> None:
            platform = controller.Platform(open_data=opened)
            await controller.run(settings, stop=self._stop, grace=0.1, platform=platform, task_status=task_status)
            self._stopped.set()

        running: controller.Running = await self._nursery.start(run)
        self.client = Client(running.url)

    async def stop(self) -> None:
        """Stop the controller, and wait until it has ended."""
        await self.client.aclose()
        self._stop.set()
        await self._stopped.wait()

    def driver(self, name: str = "mac") -> SyntheticDriver:
        """Return the driver of a host."""
        return self._drivers.setdefault(name, SyntheticDriver(self.home / "vms" / name))

    def worker(self, client: Client, name: str = "mac", stop_vms: bool = True, **fields: Any) -> WorkerService:
        """Make the worker of a host, without running it."""
        description = Worker(name=name, **{"machine_id": "m", "resources": {TART_VMS: 2}, **fields})
        return WorkerService(description, client, self.driver(name), stop_vms_on_exit=stop_vms)

    @asynccontextmanager
    async def working(self, name: str = "mac", *, stop_vms: bool = True, **fields: Any) -> AsyncIterator[WorkerService]:
        """Run a worker for the time of the block, with a client of its own."""
        async with Client(self.client.url) as client, trio.open_nursery() as nursery:
            running = self.worker(client, name, stop_vms, **fields)
            await nursery.start(running.run)
            yield running
            nursery.cancel_scope.cancel()

    async def wait_vm(self, name: str, holds: Callable[[VM], bool]) -> VM:
        """Follow a VM until a condition holds, and return it."""
        return await wait_vm(self.client, name, holds)

    async def local_vms(self, name: str = "mac") -> list[str]:
        """Return the names of the VMs on a host."""
        return [vm.name for vm in await self.driver(name).list_vms()]
