"""Virtual machines in memory, for deterministic simulation. They use trio's clock and one random number generator.

A `Machine` is a host and outlives the workers on it. It boots and ends guests, enforces their lease, and notifies a
`Witness` whenever a guest begins or ends to run. So the witness knows what really runs where.

A `Handle` is the driver of one worker process. The machine carries out its calls after a random time. A worker that stops
in order cancels its calls. Calls of a killed worker continue until the next worker calls `recover`, and the killed
worker's handle raises errors. While a machine is `troubled`, calls fail now and then, before or after they have done
their work, and scripts fail.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from typing import Any, Literal, Protocol

import trio

from harness.network import Process
from orchard.resources.cluster import CachedImage, WorkerDisk
from orchard.schema import VMSpec
from orchard.vm.driver import (
    LEASE_OVER,
    Driver,
    DriverError,
    Hardware,
    LocalState,
    LocalVM,
    NoSuchVM,
    NotRunning,
    OnLine,
    Progress,
    Script,
    ScriptFailed,
)
from orchard.vm.supervisor import EXPIRED, NEVER

# A guest that does not shut down in this time is killed.
SHUT_DOWN_LIMIT = 30.0  # seconds
# The share of calls that fail while a machine is troubled.
TROUBLE_SHARE = 0.05
# How long the calls take in seconds, from and to.
LIST, PULL, SET, BOOT, DELETE, SCRIPT = (0.02, 0.3), (0.2, 8.0), (0.05, 0.5), (0.02, 0.3), (0.05, 2.0), (0.5, 15.0)
# STOP is the time until a stop or suspension begins.
STOP, SUSPEND = (0.02, 0.2), (0.1, 5.0)
# Some guests take longer than SHUT_DOWN_LIMIT.
SHUT_DOWN = (0.1, 40.0)

# Why a guest ends.
Order = Literal["", "stop", "suspend", "lease", "power", "itself"]


class Witness(Protocol):
    def began(self, machine: Machine, name: str) -> None: ...

    def ended(self, machine: Machine, name: str, why: Order) -> None: ...


class Guest:
    """A running VM."""

    def __init__(self, name: str, lease: tuple[float, float]) -> None:
        self.name = name
        # When it is shut down, and killed.
        self.lease = lease
        # Whether its supervisor works, and enforces the lease.
        self.is_supervised = True
        self.order: Order = ""
        self.ended = trio.Event()
        self.changed = trio.lowlevel.ParkingLot()

    def end(self, order: Order) -> None:
        self.order = self.order or order
        self.changed.unpark_all()


class Call:
    """A driver call that a machine carries out."""

    def __init__(self, *, lasts: bool) -> None:
        # It continues when its caller is cancelled.
        self.lasts = lasts
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.result: Any = None
        self.error: DriverError | None = None


class Machine:
    """A host. Its tasks run in `nursery`.

    Planted bugs: with `keeps_leases` False no lease is enforced, and leases last `stretch` times as long as told.
    """

    def __init__(
        self,
        name: str,
        chance: random.Random,
        nursery: trio.Nursery,
        witness: Witness,
        *,
        keeps_leases: bool = True,
        stretch: float = 1.0,
    ) -> None:
        self.name = name
        self.chance = chance
        self.troubled = True
        # The driver's method that always fails, or "".
        self.broken = ""
        # VMs on its disk, with their state while they do not run.
        self.vms: dict[str, LocalState] = {}
        self.notes: dict[str, str] = {}
        self.guests: dict[str, Guest] = {}
        self.calls: dict[Call, None] = {}
        self._nursery = nursery
        self._witness = witness
        self._keeps_leases = keeps_leases
        self._stretch = stretch
        # The lease of leased VMs that will be run.
        self._lease = (-math.inf, -math.inf)

    def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
        now = trio.current_time()
        self._lease = (now + (soft - now) * self._stretch, now + (hard - now) * self._stretch)
        for name, guest in self.guests.items():
            if name in names and now < guest.lease[0] < math.inf:
                guest.lease = self._lease
                guest.changed.unpark_all()

    def begin(self, seconds: tuple[float, float], work: Callable[[], Any], *, lasts: bool = False) -> Call:
        """Carry out a call after a random time."""
        call = Call(lasts=lasts)
        self.calls[call] = None
        self._nursery.start_soon(self._carry_out, call, self.chance.uniform(*seconds), work)
        return call

    async def _carry_out(self, call: Call, seconds: float, work: Callable[[], Any]) -> None:
        trouble = self.chance.random() if self.troubled else 1.0
        with call.scope:
            await trio.sleep(seconds)
            try:
                if trouble < TROUBLE_SHARE / 2:
                    raise DriverError("injected failure before the call")
                call.result = work()
                # A failed `run` leaves no guest running.
                if trouble < TROUBLE_SHARE and not call.lasts:
                    raise DriverError("injected failure after the call")
            except DriverError as error:
                call.error = error
        self.calls.pop(call, None)
        call.done.set()

    def boot(self, name: str, *, leased: bool) -> Guest:
        if name in self.guests:
            raise DriverError(f'VM "{name}" is already running')
        if name not in self.vms:
            raise NoSuchVM(f'the specified VM "{name}" does not exist')
        if leased and self._keeps_leases and trio.current_time() >= self._lease[0]:
            raise DriverError(EXPIRED)
        guest = self.guests[name] = Guest(name, self._lease if leased and self._keeps_leases else NEVER)
        self._witness.began(self, name)
        self._nursery.start_soon(self._supervise, guest)
        return guest

    async def _supervise(self, guest: Guest) -> None:
        """Wait until a guest is ordered to end or its lease expires, and end it."""
        while not guest.order:
            soft = guest.lease[0] if guest.is_supervised else math.inf
            if trio.current_time() >= soft:
                guest.end("lease")
            else:
                with trio.move_on_at(soft):
                    await guest.changed.park()
        begun = trio.current_time()
        seconds = self.chance.uniform(*(SUSPEND if guest.order == "suspend" else SHUT_DOWN))
        over = begun + min(seconds, SHUT_DOWN_LIMIT)
        while not guest.ended.is_set():
            end = min(over, guest.lease[1])
            if trio.current_time() >= end:
                self._end(guest)
            else:
                with trio.move_on_at(end):
                    await guest.changed.park()

    def kill(self, guest: Guest) -> None:
        """End a guest at once, in the place of its supervisor."""
        if not guest.ended.is_set():
            guest.order = "lease"
            self._end(guest)

    def _end(self, guest: Guest) -> None:
        del self.guests[guest.name]
        self.vms[guest.name] = "suspended" if guest.order == "suspend" else "stopped"
        guest.ended.set()
        guest.changed.unpark_all()
        self._witness.ended(self, guest.name, guest.order)

    def lose_power(self) -> None:
        """End all guests and calls at once. Disks stay."""
        for call in self.calls:
            call.scope.cancel()
        for guest in list(self.guests.values()):
            guest.order = "power"
            self._end(guest)


class Handle(Driver):
    """The driver of one process. It kills guests that their supervisors let run beyond their lease.

    Planted bugs: with `hasty`, `stop` returns before the guest has ended; without `checks_supervisors`, it kills none.
    """

    def __init__(
        self, machine: Machine, process: Process, *, hasty: bool = False, checks_supervisors: bool = True
    ) -> None:
        self._checks_supervisors = checks_supervisors
        self._machine = machine
        self._process = process
        self._hasty = hasty

    async def _ask(self, seconds: tuple[float, float], work: Callable[[], Any], *, lasts: bool = False) -> Any:
        await self._check_process()
        call = self._machine.begin(seconds, work, lasts=lasts)
        try:
            await call.done.wait()
        finally:
            if self._process.alive:
                call.scope.cancel()
        await self._check_process()
        if call.error is not None:
            raise call.error
        return call.result

    async def _check_process(self) -> None:
        await trio.lowlevel.checkpoint()
        await self._process.wait_thawed()
        if not self._process.alive:
            raise DriverError("the process was killed")

    def _check_works(self, verb: str) -> None:
        if self._machine.broken == verb:
            raise DriverError(f"cannot {verb}: the disk is broken")

    def _check_exists(self, name: str) -> None:
        if name not in self._machine.vms:
            raise NoSuchVM(f'the specified VM "{name}" does not exist')

    def _guest(self, name: str) -> Guest:
        self._check_exists(name)
        guest = self._machine.guests.get(name)
        if guest is None:
            raise NotRunning(f'VM "{name}" is not running')
        return guest

    async def list_vms(self) -> list[LocalVM]:
        self._check_works("list")
        vms, guests = self._machine.vms, self._machine.guests
        listed: list[LocalVM] = await self._ask(
            LIST, lambda: [LocalVM(name, "running" if name in guests else state) for name, state in vms.items()]
        )
        return listed

    async def list_images(self) -> list[CachedImage]:
        await self._check_process()
        return []

    async def disk(self) -> WorkerDisk | None:
        await self._check_process()
        return None

    async def version(self) -> str:
        await self._check_process()
        return "1"

    async def pull(self, image: str, on_progress: Progress) -> None:
        await self._ask(PULL, lambda: None)
        on_progress(100)

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        self._check_works("clone")

        def cloned() -> None:
            if name in self._machine.vms:
                raise DriverError(f'VM "{name}" already exists')
            self._machine.vms[name] = "stopped"

        await self._ask(PULL, cloned)

    async def fqn(self, image: str) -> str:
        await self._check_process()
        return f"{image}@sha256:0"

    async def configure(
        self, name: str, hardware: Hardware, *, random_mac: bool = False, random_serial: bool = False
    ) -> None:
        def configured() -> None:
            self._check_exists(name)
            if name in self._machine.guests:
                raise DriverError(f'VM "{name}" is running')

        await self._ask(SET, configured)

    async def run(
        self, name: str, spec: VMSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        guest = await self._ask(BOOT, lambda: self._machine.boot(name, leased=spec.leased), lasts=True)
        task_status.started()
        await self._wait_ended(guest)

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._check_process()
        guest = self._guest(name)
        task_status.started()
        await self._wait_ended(guest)

    async def _wait_ended(self, guest: Guest) -> None:
        while not guest.ended.is_set():
            end = guest.lease[1] if self._checks_supervisors else math.inf
            with trio.move_on_at(end):
                await guest.changed.park()
            await self._check_process()
            if self._checks_supervisors and trio.current_time() >= guest.lease[1]:
                self._machine.kill(guest)
        await self._check_process()
        if guest.order == "lease":
            raise DriverError(LEASE_OVER)

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        await self._check_process()
        self._guest(name)
        return "127.0.0.1"

    async def connect(self, address: str, port: int) -> trio.SocketStream:
        return await trio.open_tcp_stream(address, port)

    async def find_port(self, name: str, port: int) -> int:
        await self._check_process()
        return port

    async def stop(self, name: str) -> None:
        def stopped() -> Guest | None:
            self._check_exists(name)
            if name not in self._machine.guests and self._machine.vms[name] == "suspended":
                self._machine.vms[name] = "stopped"
                return None
            guest = self._guest(name)
            guest.end("stop")
            return guest

        guest = await self._ask(STOP, stopped)
        if guest is not None and not self._hasty:
            await guest.ended.wait()
            await self._check_process()

    async def suspend(self, name: str) -> None:
        def suspended() -> Guest:
            guest = self._guest(name)
            guest.end("suspend")
            return guest

        guest = await self._ask(STOP, suspended)
        await guest.ended.wait()
        await self._check_process()

    async def delete(self, name: str) -> None:
        def deleted() -> None:
            self._check_exists(name)
            if name in self._machine.guests:
                raise DriverError(f'VM "{name}" is running')
            del self._machine.vms[name]
            self._machine.notes.pop(name, None)

        await self._ask(DELETE, deleted)

    async def run_script(self, name: str, script: Script, on_line: OnLine) -> None:
        """Play a script: its text is what it prints, `exit N` for another exit code, or `hang`."""
        await self._check_process()
        guest, machine = self._guest(name), self._machine
        await on_line(script.text)
        seconds = math.inf if script.text == "hang" else machine.chance.uniform(*SCRIPT)
        with trio.move_on_after(min(seconds, script.seconds)):
            await guest.ended.wait()
        await self._check_process()
        if guest.ended.is_set():
            raise DriverError("the VM ended while its script ran")
        if seconds > script.seconds:
            raise ScriptFailed(124, script.text, kind=script.kind, limit=script.seconds)
        await on_line("good-bye")
        if machine.troubled and machine.chance.random() < 2 * TROUBLE_SHARE:
            raise ScriptFailed(1, "good-bye", kind=script.kind)
        if script.text.startswith("exit "):
            raise ScriptFailed(int(script.text.removeprefix("exit ")), "good-bye", kind=script.kind)

    async def recover(self) -> None:
        await self._check_process()
        for call in self._machine.calls:
            if not call.lasts:
                call.scope.cancel()
        await self._check_process()

    def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
        if self._process.alive:
            self._machine.lease(soft, hard, names)

    def note(self, name: str, text: str) -> None:
        if self._process.alive:
            self._machine.notes[name] = text

    def noted(self, name: str) -> str:
        return self._machine.notes.get(name, "")
