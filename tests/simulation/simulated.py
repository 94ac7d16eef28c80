"""A simulated cluster: the real controller and workers on a virtual clock. Law: nothing but the disk of the controller is
real, and that has no syncs and no threads.

The processes talk over the network of network.py, and the workers run their VMs on the machines of hypervisor.py. Each
process can be killed, told to stop, frozen, and started again. A `Site` sees three things: what really runs where, each
commit of the controller, and each record of the log. No VM may ever run twice, no machine may run more than it has room
for, the controller's books must balance, and no exception may come up that the program did not expect; whatever
contradicts is a violation, and `trace` tells what led to it.
"""

from __future__ import annotations

import datetime
import logging
import random
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio
from harness.hypervisor import Handle, Machine, Order
from harness.network import Network, Process

from orchard import controller
from orchard.client import Client
from orchard.schema import TART_VMS, VM
from orchard.storage.events import EventLog
from orchard.storage.journal import Disk
from orchard.store import Change, Store
from orchard.worker import ANSWER_SECONDS, Identity, WorkerService

BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
CONTROLLER, USER = "controller", "user"
URL = f"http://{CONTROLLER}"
ROOM = 2  # VMs that a machine may run, as Apple has it
TIMEOUT = 30.0  # seconds of silence after which a worker's VMs fail: shorter than usual, so that more happens
ANSWER = 20.0  # seconds that users wait
GRACE = 5.0  # seconds for requests at work when the controller is told to stop
DISK = (0.0002, 0.03)  # seconds until a write has been done, and until that is known
FORGOTTEN = 0.05  # of the writes are not done on a forgetful disk
STOPS_VMS = 0.2  # of the workers take their VMs away when they are told to end


_LOCAL = re.compile(r"orchard-[\w-]*?-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-[0-9]+")  # a VM on its host


class Killed(Exception):  # noqa: N818 -- it states what is the case
    """The process that has waited for its disk is gone."""


@dataclass(frozen=True, slots=True)
class Broken:
    """What is broken on purpose, to see that it is found."""

    guarded: bool = True  # machines keep leases
    stretch: float = 1.0  # how much longer they keep them than they are told
    hasty: bool = False  # drivers say that a guest has stopped when it was told to
    recovers: bool = True  # drivers end what a killed worker has left under way
    forgetful: bool = False  # the controller's disk says that it has written what it has not
    room: int = ROOM  # VMs for which workers say that there is room


@dataclass(frozen=True, slots=True)
class Running:
    """A program that runs, and how it ends: killed by `kill`, told to by `stop`."""

    process: Process
    scope: trio.CancelScope
    stopping: trio.Event
    ended: trio.Event

    def kill(self) -> None:
        self.scope.cancel()
        self.process.kill()


class SyncedDisk(Disk):
    """A disk that loses nothing that was written: crashes are of processes here, not of power."""

    def sync(self, fd: int) -> None:
        pass

    def sync_directory(self, directory: Path) -> None:
        pass


class Site:
    """The cluster. Its tasks run in `nursery`; `directory` holds the controller's data."""

    def __init__(
        self, chance: random.Random, directory: Path, nursery: trio.Nursery, broken: Broken, trace: list[str]
    ) -> None:
        self.chance = chance
        self.trace = trace
        self.violations: list[str] = []
        self.network = Network(chance)
        self.store: Store | None = None  # of the controller, while it runs
        self.controller: Running
        self.workers: dict[str, Running] = {}
        self.clocks: dict[str, float] = {}  # worker -> seconds by which its clock is wrong
        self._directory = directory
        self._nursery = nursery
        self._broken = broken
        self._running: dict[str, dict[str, None]] = {}  # orchard-NAME-UID -> where: MACHINE/LIFE
        self._uids: dict[str, str] = {}  # by order of appearance: the trace must not depend on chance elsewhere
        self.machines = {
            name: Machine(name, chance, nursery, self, guarded=broken.guarded, stretch=broken.stretch)
            for name in (f"mac-{number}" for number in range(1, chance.choice((2, 3, 3)) + 1))
        }

    # -- what is seen

    def note(self, text: str) -> None:
        self.trace.append(f"{trio.current_time():9.3f}  {text}")

    def violate(self, text: str) -> None:
        self.note(f"VIOLATION: {text}")
        self.violations.append(text)

    def short(self, local: str) -> str:
        """Name a life of a VM for the trace."""
        vm, _, life = local.removeprefix("orchard-").rpartition("-")
        return f"{self._uids.setdefault(vm, f'{vm[:4]}#{len(self._uids)}')}.{life}"

    def began(self, machine: Machine, name: str) -> None:
        self.note(f"{machine.name} runs {self.short(name)}")
        where = self._running.setdefault(name.rpartition("-")[0], {})
        if where:
            self.violate(f"{self.short(name)} begins to run on {machine.name}, and runs already on {', '.join(where)}")
        where[machine.name] = None
        load = sum(size_of(guest) for guest in machine.guests)
        if load > ROOM:
            guests = ", ".join(map(self.short, machine.guests))
            self.violate(f"{machine.name} has room for {ROOM}, and runs {load}: {guests}")

    def ended(self, machine: Machine, name: str, why: Order) -> None:
        self.note(f"{machine.name} has ended {self.short(name)} ({why})")
        self._running[name.rpartition("-")[0]].pop(machine.name, None)

    def committed(self, changes: list[Change]) -> None:
        assert self.store is not None
        for change in changes:
            if isinstance(change.new, VM):
                vm = change.new.state
                life = f"{self.short(change.new.tart_name)}, generation {change.new.meta.generation},"
                self.note(f"    {life} {vm.status} on {vm.worker or 'none'}: {vm.status_message}")
            else:
                self.note(f"    {change.kind} {change.name} {change.type}")
        state = self.store.state
        for name, worker in state.workers.items():
            held = [vm for vm in state.vms_by_worker.get(name, {}).values() if vm.holds_resources]
            used = sum(vm.spec.resources[TART_VMS] for vm in held)
            if used > worker.resources[TART_VMS]:
                self.violate(f"the controller has {used} on {name}, which offers {worker.resources[TART_VMS]}")

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Take what the program logs into the trace; an exception in the log is a violation."""
        log = logging.getLogger("orchard")
        handler = _Log(self)
        before = log.level, log.propagate
        log.addHandler(handler)
        log.setLevel(logging.WARNING)
        log.propagate = False
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(before[0])
            log.propagate = before[1]

    def clock(self) -> datetime.datetime:
        return BEGAN + datetime.timedelta(seconds=trio.current_time())

    # -- the controller

    async def start_controller(self) -> None:
        """Start the controller, and return when it serves."""
        process, scope = Process(CONTROLLER), trio.CancelScope()
        running = self.controller = Running(process, scope, trio.Event(), trio.Event())
        settings = controller.ControllerSettings(
            data_dir=self._directory,
            tls=False,
            auth=False,
            worker_offline_timeout=TIMEOUT,
            ping_interval=TIMEOUT / 3,
        )

        async def listen(_: controller.ControllerSettings) -> controller.Listening:
            await trio.lowlevel.checkpoint()
            return [self.network.listen(process)], controller.Running(URL)

        async def run(task_status: trio.TaskStatus[controller.Running]) -> None:
            try:
                with scope, suppress(Killed):
                    await controller.run(
                        settings,
                        stop=running.stopping,
                        grace=GRACE,
                        platform=controller.Platform(partial(self._opened, process), listen, self.clock),
                        task_status=task_status,
                    )
            finally:
                process.kill()
                running.ended.set()

        await self._nursery.start(run)

    @contextmanager
    def _opened(self, process: Process, directory: Path) -> Iterator[tuple[Store, EventLog]]:
        async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
            await trio.sleep(self.chance.uniform(*DISK))
            await process.turn()
            if not process.alive:
                raise Killed
            forgotten = self._broken.forgetful and self.chance.random() < FORGOTTEN
            result = None if forgotten else work(*arguments)
            await trio.sleep(self.chance.uniform(*DISK))
            await process.turn()
            return result

        disk = SyncedDisk()
        with ExitStack() as stack:
            store = Store.open(directory, self.clock(), disk, in_thread)
            stack.callback(store.close)
            store.on_commit(self.committed)
            events = EventLog(directory / "events", disk, in_thread)
            events.open({vm.uid for vm in store.state.vms.values()})
            self.store = store
            try:
                yield store, events
            finally:
                self.store = None

    # -- the others

    def client(self, process: Process, answer_seconds: float) -> Client:
        async def connect(host: str, _: int) -> trio.abc.Stream:
            return await self.network.connect(process, host)

        return Client(URL, answer_seconds=answer_seconds, connect=connect)

    def start_worker(self, name: str) -> None:
        process, scope = Process(name), trio.CancelScope()
        running = self.workers[name] = Running(process, scope, trio.Event(), trio.Event())
        stops_vms = self.chance.random() < STOPS_VMS
        identity = Identity(
            name=name, arch="arm64", runtime="tart", machine_id=name, resources={TART_VMS: self._broken.room}
        )

        async def run() -> None:
            handle = Handle(self.machines[name], process, hasty=self._broken.hasty, recovers=self._broken.recovers)
            with scope:
                async with self.client(process, ANSWER_SECONDS) as client:
                    worker = WorkerService(
                        identity,
                        client,
                        handle,
                        stop_vms_on_exit=stops_vms,
                        clock=lambda: self.clock().timestamp() + self.clocks.get(name, 0.0),
                        lease_clock=trio.current_time,
                        chance=self.chance.random,
                    )
                    await worker.run()
            process.kill()
            running.ended.set()

        self._nursery.start_soon(run)


class _Log(logging.Handler):
    """Looks for what should not be in a log."""

    def __init__(self, site: Site) -> None:
        super().__init__(logging.WARNING)
        self._site = site

    def emit(self, record: logging.LogRecord) -> None:
        extra = ", ".join(str(record.__dict__[key]) for key in ("worker", "vm", "reason") if key in record.__dict__)
        self._site.note(_LOCAL.sub(lambda found: self._site.short(found[0]), f"  log: {record.getMessage()} ({extra})"))
        if record.exc_info and record.exc_info[1] is not None:
            self._site.violate("unexpected: " + "".join(traceback.format_exception(record.exc_info[1])))


def size_of(name: str) -> int:
    """How much room a VM takes: vm-3 and vm-7 need all of a machine. `name` may be that of a life on a machine."""
    return 2 if int(name.removeprefix("orchard-").split("-")[1]) % 4 == 3 else 1
