"""A simulated cluster: the real controller and real workers on a virtual clock.

Only the controller's files are on a real disk, without fsyncs and threads. Processes talk over the network in memory of
harness/network.py, and workers run their VMs on the machines in memory of harness/hypervisor.py. Each process can be
killed, stopped, frozen and started again.

A `SimulatedCluster` observes three things: which VMs really run where, each commit of the controller, and each log
record. These are violations: a VM that runs twice, a machine that runs more than its capacity, a worker that is assigned
more than it offers, and an exception that the program did not expect. `trace` records what led to a violation.
"""

from __future__ import annotations

import datetime
import logging
import random
import re
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio
from harness.disks import UnsyncedDisk
from harness.hypervisor import Handle, Machine, Order
from harness.network import Network, Process

from orchard import controller, transitions
from orchard.api import API
from orchard.client import Client
from orchard.control.deadlines import Deadlines
from orchard.control.scheduling_loop import RestoredState
from orchard.control.stored_data import StoredData
from orchard.decisions import planning
from orchard.decisions.agenda import MAX_COUNTED
from orchard.decisions.early_failures import EarlyFailures
from orchard.decisions.liveness import Liveness, Source
from orchard.decisions.placement import Placement
from orchard.handlers.metrics import FleetSurvey
from orchard.operations import make_api
from orchard.schema import TART_VMS, VM, Worker
from orchard.state.changes import Change
from orchard.storage.engine import Batch
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.store import Store
from orchard.tunnel import Rendezvous
from orchard.work.leftovers import Leftovers, RefusedError
from orchard.work.memory import ClusterMemory
from orchard.worker import CONTROLLER_ANSWER_SECONDS, WorkerService

BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
CONTROLLER, USER = "controller", "user"
URL = f"http://{CONTROLLER}"
# VMs that a machine may run, the limit of Apple's licence.
CAPACITY = 2
# Shorter than the default, so that more happens.
OFFLINE_TIMEOUT = 30.0  # seconds
# A controller that is started again may have a shorter one.
OFFLINE_TIMEOUTS = (OFFLINE_TIMEOUT, OFFLINE_TIMEOUT, OFFLINE_TIMEOUT / 3)
# The controller's grace period for requests when it is told to stop.
GRACE_SECONDS = 5.0
# From and to: until a write is done, and then until its caller knows.
DISK_SECONDS = (0.0002, 0.03)
# The share of writes that a forgetful disk does not do.
FORGOTTEN_SHARE = 0.05
# A planted bug deletes VMs so long before they expire.
EARLY_SECONDS = 5.0
# The share of workers that stop their VMs when they are told to stop.
STOPS_VMS_SHARE = 0.2

# The name of a VM on its machine, ending in its uid and restart count.
_LOCAL_NAME = re.compile(r"orchard-[\w-]*?-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-[0-9]+")


class ProcessKilledError(Exception):
    """The process that waits for its disk was killed."""


@dataclass(frozen=True, slots=True)
class PlantedBug:
    """A deliberate bug that the simulation has to find. The defaults are correct behaviour."""

    # Whether machines end VMs whose lease has expired.
    keeps_leases: bool = True
    # How many times longer than told machines let a lease last.
    lease_stretch: float = 1.0
    # Whether workers leave it to a VM's supervisor alone to enforce the lease.
    trusts_supervisors: bool = False
    # Whether drivers report a VM as stopped as soon as it was told to stop.
    reports_stopped_early: bool = False
    # Whether the controller's disk reports some writes as done that it did not do.
    disk_forgets: bool = False
    # The number of VMs that workers offer capacity for.
    offered: int = CAPACITY
    # Whether a controller that starts forgets what it has promised to workers.
    forgets_promises: bool = False
    # Whether assignments return to the queue although a poll has named them.
    unassigns_named: bool = False
    # Whether a second watch replaces one that is alive.
    replaces_watches: bool = False
    # Whether a worker that said goodbye goes on receiving VMs.
    forgets_goodbyes: bool = False
    # Whether VMs of a restored state are placed as soon as the state is accepted.
    forgets_restored: bool = False
    # Whether workers forget the newest state of the cluster that they were shown.
    forgets_revisions: bool = False
    # Whether workers take VMs of an earlier name of their host for leftovers.
    forgets_names: bool = False
    # Whether VMs that fail before they run go to the same worker again.
    forgets_failures: bool = False
    # Whether the controller deletes VMs a while before they expire.
    expires_early: bool = False
    # Whether a VM that its worker has to end is restarted at once.
    restarts_unended: bool = False
    # Whether VMs that find no worker in time fail without a reason.
    times_out_silently: bool = False
    # Whether the planner forgets to give back what a VM used.
    leaks_slots: bool = False
    # Whether controllers on etcd write without comparing what another one has written.
    compares_nothing: bool = False
    # Whether the schedule mostly isolates workers, because the bug is rare otherwise.
    shows_in_isolation: bool = False


NO_BUG = PlantedBug()
# The schedule for bugs of leases, without one.
NO_BUG_IN_ISOLATION = PlantedBug(shows_in_isolation=True)
PLANTED_BUGS = {
    "no-lease": PlantedBug(keeps_leases=False, shows_in_isolation=True),
    "long-lease": PlantedBug(lease_stretch=2.0, shows_in_isolation=True),
    "stopped-early": PlantedBug(reports_stopped_early=True),
    "over-offered": PlantedBug(offered=CAPACITY + 1),
    "forgetful-disk": PlantedBug(disk_forgets=True),
    # Of two controllers.
    "no-comparison": PlantedBug(compares_nothing=True, shows_in_isolation=True),
    "early-expiry": PlantedBug(expires_early=True),
    "silent-time-out": PlantedBug(times_out_silently=True),
    "leaked-slots": PlantedBug(leaks_slots=True),
}


@contextmanager
def planted(bug: PlantedBug) -> Iterator[None]:
    """Plant a bug that is in the program's own code, for the time of the block."""
    record_poll = Liveness.record_poll

    def record_poll_only(liveness: Liveness, worker: str, source: Source) -> None:
        unnamed = liveness.unnamed.get(worker)
        record_poll(liveness, worker, source)
        if unnamed is not None:
            liveness.unnamed[worker] = unnamed

    async def never(*_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    expiry = Deadlines._expiry

    def expires_early(deadlines: Deadlines, vm: VM) -> float | None:
        at = expiry(deadlines, vm)
        return None if at is None else at - EARLY_SECONDS

    add_load = Placement.add_load

    def add_load_only(placement: Placement, vm: VM, times: int = 1) -> None:
        if times > 0:
            add_load(placement, vm, times)

    with ExitStack() as stack:
        if bug.leaks_slots:
            stack.enter_context(patch.object(Placement, "add_load", add_load_only))
        if bug.expires_early:
            stack.enter_context(patch.object(Deadlines, "_expiry", expires_early))
        if bug.restarts_unended:
            stack.enter_context(patch.object(planning, "has_ended", lambda *_: True))
        if bug.times_out_silently:
            stack.enter_context(patch.object(transitions, "time_out", lambda vm: transitions.fail(vm, "")))
        if bug.unassigns_named:
            stack.enter_context(patch.object(Liveness, "record_poll", record_poll_only))
        if bug.replaces_watches:
            stack.enter_context(patch.object(Rendezvous, "is_connected", never))
        if bug.forgets_goodbyes:
            stack.enter_context(patch.object(Liveness, "record_goodbye", lambda *_: None))
        if bug.forgets_restored:
            stack.enter_context(patch.object(RestoredState, "follow", lambda *_: None))
        if bug.forgets_revisions:
            stack.enter_context(patch.object(ClusterMemory, "observe", lambda *_: None))
        if bug.forgets_names:
            stack.enter_context(patch.object(Leftovers, "belongs_elsewhere", never))
        if bug.forgets_failures:
            stack.enter_context(patch.object(EarlyFailures, "record_failure", lambda *_: None))
        yield


@dataclass(frozen=True, slots=True)
class RunningProgram:
    """A program that runs. `stopping` tells a controller to stop; a worker is stopped by cancelling `scope`."""

    process: Process
    scope: trio.CancelScope
    stopping: trio.Event
    ended: trio.Event

    def kill(self) -> None:
        self.scope.cancel()
        self.process.kill()


class SimulatedCluster:
    """The cluster. Its tasks run in `nursery`; `directory` holds the controller's data."""

    def __init__(
        self, chance: random.Random, directory: Path, nursery: trio.Nursery, bug: PlantedBug, trace: list[str]
    ) -> None:
        self.chance = chance
        self.trace = trace
        self.violations: list[str] = []
        self.network = Network(chance)
        # The controller's store, while the controller runs, and what shows its metrics.
        self.store: Store | None = None
        self.api: API | None = None
        # By host; one of them leads.
        self.controllers: dict[str, RunningProgram] = {}
        self.controller: RunningProgram
        self.workers: dict[str, RunningProgram] = {}
        # Worker, or CONTROLLER -> the error of its clock in seconds.
        self.clock_errors: dict[str, float] = {}
        # When the wall time was written last that a start of the controller reads, and by how much starts have counted
        # more than what passed since.
        self._stored_at = 0.0
        self.hastened = 0.0
        self.directory = directory
        # Worker and machine -> what a worker keeps in its directory there.
        self._memories: dict[tuple[str, str], ClusterMemory] = {}
        self._nursery = nursery
        self._bug = bug
        # orchard-NAME-UID -> names of the machines on which that VM runs.
        self._running: dict[str, dict[str, None]] = {}
        # Numbers of VMs by order of appearance: uids are random, and the trace must depend on the seed alone.
        self._uids: dict[str, str] = {}
        self.machines = {
            name: Machine(name, chance, nursery, self, keeps_leases=bug.keeps_leases, stretch=bug.lease_stretch)
            for name in (f"mac-{number}" for number in range(1, chance.choice((2, 3, 3)) + 1))
        }

    # -- observation

    def note(self, text: str) -> None:
        self.trace.append(f"{trio.current_time():9.3f}  {text}")

    def violate(self, text: str) -> None:
        self.note(f"VIOLATION: {text}")
        self.violations.append(text)

    def short(self, local: str) -> str:
        """Return a short name of a VM on a machine for the trace."""
        vm, _, restarts = local.removeprefix("orchard-").rpartition("-")
        return f"{self._uids.setdefault(vm, f'{vm[:4]}#{len(self._uids)}')}.{restarts}"

    def began(self, machine: Machine, name: str) -> None:
        """Check the limits when a VM begins to run on a machine."""
        self.note(f"{machine.name} runs {self.short(name)}")
        where = self._running.setdefault(name.rpartition("-")[0], {})
        if where:
            self.violate(f"{self.short(name)} begins to run on {machine.name}, and runs already on {', '.join(where)}")
        where[machine.name] = None
        load = sum(size_of(guest) for guest in machine.guests)
        if load > CAPACITY:
            guests = ", ".join(map(self.short, machine.guests))
            self.violate(f"{machine.name} runs {load}, more than its capacity of {CAPACITY}: {guests}")

    def ended(self, machine: Machine, name: str, why: Order) -> None:
        """Note that a VM does not run any more."""
        self.note(f"{machine.name} has ended {self.short(name)} ({why})")
        self._running[name.rpartition("-")[0]].pop(machine.name, None)

    def committed(self, changes: list[Change]) -> None:
        """Note a commit of the controller, and check that no worker is assigned more than it offers."""
        assert self.store is not None
        for change in changes:
            if isinstance(change.new, VM):
                vm = change.new.state
                name = f"{self.short(change.new.tart_name)}, generation {change.new.meta.generation},"
                self.note(f"    {name} {vm.status} on {vm.worker or 'none'}: {vm.status_message}")
                if vm.status == "failed" and not vm.status_message:
                    self.violate(f"{name} failed without a reason")
            else:
                self.note(f"    {change.kind} {change.name} {change.type}")
        state = self.store.state
        for name, worker in state.workers.items():
            assigned = [vm for vm in state.vms_by_worker.get(name, {}).values() if vm.holds_resources]
            used = sum(vm.spec.resources[TART_VMS] for vm in assigned)
            if used > worker.resources[TART_VMS]:
                self.violate(f"the controller has {used} on {name}, which offers {worker.resources[TART_VMS]}")

    def check_slots(self, changes: list[Change]) -> None:
        """Check that the metrics account for each slot that workers offer, and for each that VMs use."""
        if self.api is None:
            return
        state, survey = self.api.state, FleetSurvey()
        for name, worker in state.workers.items():
            load = self.api.parts.scheduling.planner.placement.load_of(name)
            survey.add_resources(worker.resources, load.used, survey.free)
        offered, used, free = (part[TART_VMS] for part in (survey.offered, survey.used, survey.free))
        held = [vm for vm in state.vms.values() if vm.holds_resources and vm.state.worker in state.workers]
        if used != sum(vm.spec.resources[TART_VMS] for vm in held) or used + free != offered:
            self.violate(f"the metrics have {offered} slots, {used} of them used and {free} free, for {len(held)} VMs")

    def _make_api(self, *arguments: Any, **settings: Any) -> API:
        self.api = make_api(*arguments, **settings)
        return self.api

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Add the program's warnings to the trace. An exception in the log is a violation."""
        log = logging.getLogger("orchard")
        handler = _TraceHandler(self)
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

    @property
    def leader(self) -> RunningProgram | None:
        """The controller that leads, None while none does."""
        return self.controller if self.store is not None else None

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Follow the controller's store for the time of the block. Here, the controller's platform does that."""
        yield

    def clock(self, name: str = "") -> datetime.datetime:
        """Return the time, or the time that the clock of a worker or the controller shows."""
        return BEGAN + datetime.timedelta(seconds=trio.current_time() + self.clock_errors.get(name, 0.0))

    # -- the controller

    async def start_controller(
        self, offline_timeout: float = 0.0, ping_interval: float = 0.0, *, name: str = CONTROLLER
    ) -> None:
        """Start the controller, and return when it serves. Without an offline timeout, a random one is chosen."""
        assert name == CONTROLLER
        process, scope = Process(CONTROLLER), trio.CancelScope()
        timeouts = OFFLINE_TIMEOUTS[:1] if self._bug.shows_in_isolation else OFFLINE_TIMEOUTS
        offline_timeout = offline_timeout or self.chance.choice(timeouts)
        self.note(f"offline timeout: {offline_timeout:g} s")
        running = self.controller = self.controllers[CONTROLLER] = RunningProgram(
            process, scope, trio.Event(), trio.Event()
        )
        settings = controller.ControllerSettings(
            data_dir=self.directory,
            tls=False,
            auth=False,
            allowed_hosts=[CONTROLLER],
            worker_offline_timeout=offline_timeout,
            ping_interval=ping_interval or offline_timeout / 3,
        )

        async def listen(_: controller.ControllerSettings) -> controller.Listening:
            await trio.lowlevel.checkpoint()
            return [self.network.listen(process)], controller.Running(URL)

        platform = controller.Platform(partial(self._open_data, process), listen, partial(self.clock, CONTROLLER))

        async def run(task_status: trio.TaskStatus[controller.Running]) -> None:
            try:
                with scope, suppress(ProcessKilledError), patch.object(controller, "make_api", self._make_api):
                    await controller.run(
                        settings, stop=running.stopping, grace=GRACE_SECONDS, platform=platform, task_status=task_status
                    )
            finally:
                process.kill()
                running.ended.set()

        await self._nursery.start(run)

    @asynccontextmanager
    async def _open_data(self, process: Process, directory: Path) -> AsyncIterator[StoredData]:
        async def in_thread(work: Callable[..., Any], *arguments: Any, limiter: object = None) -> Any:
            asked_at = trio.current_time()
            await trio.sleep(self.chance.uniform(*DISK_SECONDS))
            await process.wait_thawed()
            if not process.alive:
                raise ProcessKilledError
            forgotten = self._bug.disk_forgets and self.chance.random() < FORGOTTEN_SHARE
            result = None if forgotten else work(*arguments)
            if arguments and isinstance(arguments[0], Batch) and not forgotten:
                self._stored_at = asked_at
            await trio.sleep(self.chance.uniform(*DISK_SECONDS))
            await process.wait_thawed()
            return result

        # The simulation crashes processes, never the power of the controller's host.
        disk = UnsyncedDisk()
        with ExitStack() as stack:
            store = await Store.open(FileEngine(directory, disk, in_thread), self.clock())
            stack.callback(store.close)
            if self._bug.forgets_promises:
                with store.transaction() as tx:
                    for worker in store.state.workers.values():
                        tx.put(replace(worker, promised=1))
            if store.stored_time is not None:
                counted = (self.clock(CONTROLLER) - store.stored_time).total_seconds()
                passed = trio.current_time() - self._stored_at
                self.hastened += max(0.0, min(counted, MAX_COUNTED.total_seconds()) - passed)
            store.on_commit(self.committed)
            store.on_durable(self.check_slots)
            events = EventLog(*event_files(directory / "events", disk, in_thread))
            events.open({vm.uid for vm in store.state.vms.values()})
            history = History(history_file(directory, disk, in_thread))
            history.open()
            self.store = store
            try:
                yield StoredData(store, events, history)
            finally:
                self.store = self.api = None

    # -- clients and workers

    def client(self, process: Process, answer_seconds: float) -> Client:
        async def connect(host: str, _: int) -> trio.abc.Stream:
            return await self.network.connect(process, host)

        return Client(URL, answer_seconds=answer_seconds, connect=connect)

    def start_worker(self, name: str, machine: str = "", **identity: Any) -> None:
        """Start the worker of a machine, or on another `machine` a copy of it, with its name and its machine_id.

        `identity` has other values of the fields with which it registers.
        """
        machine = machine or name
        process, scope = Process(machine), trio.CancelScope()
        running = self.workers[machine] = RunningProgram(process, scope, trio.Event(), trio.Event())
        stops_vms = self.chance.random() < STOPS_VMS_SHARE
        fields: dict[str, Any] = {"machine_id": name, **identity}
        description = Worker(name=name, resources={TART_VMS: self._bug.offered}, **fields)
        memory = self._memories.setdefault((name, machine), ClusterMemory())

        async def run() -> None:
            driver = Handle(
                self.machines[machine],
                process,
                hasty=self._bug.reports_stopped_early,
                checks_supervisors=not self._bug.trusts_supervisors,
            )
            with scope, suppress(RefusedError):
                async with self.client(process, CONTROLLER_ANSWER_SECONDS) as client:
                    worker = WorkerService(
                        description,
                        client,
                        driver,
                        memory=memory,
                        stop_vms_on_exit=stops_vms,
                        clock=lambda: self.clock(name).timestamp(),
                        lease_clock=trio.current_time,
                        chance=self.chance.random,
                    )
                    await worker.run()
            process.kill()
            running.ended.set()

        self._nursery.start_soon(run)


class _TraceHandler(logging.Handler):
    """Adds log records to the trace, and finds unexpected exceptions among them."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        super().__init__(logging.WARNING)
        self._cluster = cluster

    def emit(self, record: logging.LogRecord) -> None:
        extra = ", ".join(str(record.__dict__[key]) for key in ("worker", "vm", "reason") if key in record.__dict__)
        text = f"  log: {record.getMessage()} ({extra})"
        self._cluster.note(_LOCAL_NAME.sub(lambda found: self._cluster.short(found[0]), text))
        if record.exc_info and record.exc_info[1] is not None:
            self._cluster.violate("unexpected: " + "".join(traceback.format_exception(record.exc_info[1])))


def size_of(name: str) -> int:
    """Return the capacity that a VM takes, from its name or its name on a machine. vm-3 and vm-7 take a whole machine."""
    return 2 if int(name.removeprefix("orchard-").split("-")[1]) % 4 == 3 else 1
