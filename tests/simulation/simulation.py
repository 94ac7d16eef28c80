"""Random schedules over a simulated cluster: a storm, and the calm after it. Law: everything follows from the seed.

In the storm users create, change and delete VMs, pause and delete workers; controller and workers crash, stop and
stand still; machines lose power; ways are severed, in one direction or both, or slow; clocks jump, guests shut down by
themselves, verbs and scripts fail. After each step what users were told is compared with what the controller has. In
the calm everything is healed and started again, and must come to rest: every VM where and as it was wanted, or with a
reason why not, and nothing on any machine that nobody wants.

trio's own choices are made by the seed, too, so a run is the same whenever it is repeated. `simulate` gives the digest
of all that happened, or raises `Violation`, which says what did.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import trio
from harness.network import Process
from simulated import ANSWER, CONTROLLER, USER, Broken, Site, size_of
from trio._core import _run  # its switch for deterministic scheduling is not public
from trio.testing import MockClock

from orchard.client import Client, ClientError, ResponseError
from orchard.nursery import first_exception
from orchard.schema import TART_VMS, VM
from orchard.storage.journal import DamagedError
from orchard.store import State, check

SOUND = Broken()
NAMES = [f"vm-{number}" for number in range(8)]  # used again and again
STEPS = 40  # of a storm
PAUSE = 4.0  # seconds between two of them, on the average
MOMENT, WHILE = (0.5, 10.0), (10.0, 90.0)  # seconds that a fault lasts
DEAF = 4  # days: on the last of them the controller stands still at times, on the others they are as they once were
SLOW = 5.0  # seconds that a slow way takes, at most
BUSY = 40.0  # seconds after which a request that was never answered can't arrive any more
CALM = 600.0  # seconds in which everything must come to rest
LOOK, LOOKS = 5.0, 5  # seconds between two looks whether it has, and how often they must find so
YEARS = 10 * 365 * 86400.0  # seconds
SHOWN = 60  # lines of the trace that a violation shows
MEMORY = Path("/dev/shm")  # where temporary files cost nothing, on Linux


class Violation(AssertionError):  # noqa: N818 -- it states what is the case
    """What must never be was. str() says what; what led to it was printed."""


# ---- users ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Known:
    """What users know of a name; they do one thing at a time with it."""

    state: Literal["absent", "present", "unknown"] = "absent"
    uid: str = ""
    busy: bool = False


class Users:
    """What users do, and were told."""

    def __init__(self, site: Site, client: Client, nursery: trio.Nursery) -> None:
        self.known = {name: Known() for name in NAMES}
        self._site = site
        self._client = client
        self._nursery = nursery
        self._chance = site.chance

    def _ask(self, what: str, name: str, request: Callable[[], Awaitable[Any]]) -> None:
        """Send a request about a VM."""
        known = self.known[name]
        if known.busy:
            return
        known.busy = True
        self._site.note(f"user: {what} {name}")
        self._nursery.start_soon(self._asked, what, name, request)

    async def _asked(self, what: str, name: str, request: Callable[[], Awaitable[Any]]) -> None:
        known = self.known[name]
        before = known.state
        try:
            answer = await request()
        except ResponseError as error:
            self._site.note(f"user: {what} {name}: {error}")
            self._refused(what, name, before, error.status)
        except ClientError as error:
            self._site.note(f"user: {what} {name}: {error}")
            if what in ("create", "delete"):
                known.state = "unknown"
                await trio.sleep(BUSY)
        else:
            self._site.note(f"user: {what} {name}: done")
            if before == "absent" and what != "create":
                self._site.violate(f"{what} {name}: done, and there is no such VM")
            elif before == "present" and what == "create":
                self._site.violate(f"create {name}: done, and there was such a VM")
            if what == "create":
                known.state, known.uid = "present", answer.uid
            elif what == "delete":
                known.state = "absent"
        known.busy = False

    def _refused(self, what: str, name: str, before: str, status: int) -> None:
        known = self.known[name]
        if status == 404:
            if before == "present":
                self._site.violate(f"{what} {name}: 404, and it was acknowledged")
            known.state = "absent"
        elif status == 409 and before == "absent":
            self._site.violate(f"{what} {name}: 409, and it was deleted")
        elif status >= 500 and what in ("create", "delete"):
            known.state = "unknown"

    def create(self) -> None:
        name = self._chance.choice(NAMES)
        spec: dict[str, Any] = {
            "name": name,
            "image": "ghcr.io/example/image:latest",
            "restart_policy": self._chance.choice(("Never", "OnFailure", "OnFailure")),
            "suspendable": self._chance.random() < 0.3,
            "resources": {TART_VMS: size_of(name)},
        }
        if self._chance.random() < 0.4:
            spec["startup_script"] = {"script_content": "echo hello"}
        self._ask("create", name, lambda: self._client.vms.create(spec))

    def delete(self) -> None:
        name = self._chance.choice(NAMES)
        self._ask("delete", name, lambda: self._client.vms.delete(name))

    def resize(self) -> None:
        name, cpu = self._chance.choice(NAMES), self._chance.randrange(1, 9)
        self._ask("change", name, lambda: self._client.vms.patch(name, cpu=cpu))

    def rest(self) -> None:
        name, power = self._chance.choice(NAMES), self._chance.choice(("stopped", "suspended"))
        self._ask("change", name, lambda: self._client.vms.patch(name, powerState=power))

    def pause_worker(self) -> None:
        name, paused = self._chance.choice(list(self._site.machines)), self._chance.random() < 0.5
        self._about_worker(f"paused={paused}", name, lambda: self._client.workers.pause(name, paused=paused))

    def delete_worker(self) -> None:
        name = self._chance.choice(list(self._site.machines))
        self._about_worker("delete", name, lambda: self._client.workers.delete(name))

    def _about_worker(self, what: str, name: str, request: Callable[[], Awaitable[Any]]) -> None:
        self._site.note(f"user: {what} {name}")
        self._nursery.start_soon(self._told, request)

    async def _told(self, request: Callable[[], Awaitable[Any]]) -> None:
        try:
            await request()
        except ClientError as error:
            self._site.note(f"user: {error}")

    def audit(self) -> None:
        """Compare what users were told with what the controller has."""
        if self._site.store is None:
            return
        state = self._site.store.state
        for problem in check(state):
            self._site.violate(problem)
        for name, known in self.known.items():
            vm = state.vms.get(name)
            if known.state == "present" and not known.busy and (vm is None or vm.uid != known.uid):
                self._site.violate(f"{name} was acknowledged, and is lost")
            elif known.state == "absent" and not known.busy and vm is not None:
                self._site.violate(f"{name} was deleted, and is there")


# ---- faults --------------------------------------------------------------------------------------------------------


class Storm:
    """What goes wrong. `nursery` has those that will set it right again."""

    def __init__(self, site: Site, nursery: trio.Nursery) -> None:
        self._site = site
        self._nursery = nursery
        self._chance = site.chance
        self._down: dict[str, None] = {}  # programs that do not run, or are told to end

    def _duration(self) -> float:
        return self._chance.uniform(*self._chance.choice((MOMENT, MOMENT, WHILE)))

    def _machine(self) -> str:
        return self._chance.choice(list(self._site.machines))

    def _later(self, seconds: float, task: Callable[[], object]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            task()

        self._nursery.start_soon(wait)

    def kill_worker(self) -> None:
        self._take_down(self._machine(), "is killed")

    def stop_worker(self) -> None:
        self._take_down(self._machine(), "is told to end", orderly=True)

    def lose_power(self) -> None:
        name = self._machine()
        self._take_down(name, "loses power")
        self._site.machines[name].lose_power()

    def kill_controller(self) -> None:
        self._take_down(CONTROLLER, "is killed")

    def stop_controller(self) -> None:
        self._take_down(CONTROLLER, "is told to end", orderly=True)

    def _take_down(self, name: str, what: str, *, orderly: bool = False) -> None:
        if name in self._down:
            return
        self._down[name] = None
        self._nursery.start_soon(self._be_down, name, self._duration())
        running = self._site.controller if name == CONTROLLER else self._site.workers[name]
        self._site.note(f"{name} {what}")
        if not orderly:
            running.kill()
            return
        running.process.thaw()
        if name == CONTROLLER:
            running.stopping.set()
        else:
            running.scope.cancel()

    async def _be_down(self, name: str, seconds: float) -> None:
        running = self._site.controller if name == CONTROLLER else self._site.workers[name]
        await running.ended.wait()
        await trio.sleep(seconds)
        await self._start(name)

    async def _start(self, name: str) -> None:
        self._site.note(f"{name} is started")
        if name == CONTROLLER:
            await self._site.start_controller()
        else:
            self._site.start_worker(name)
        del self._down[name]

    def freeze(self) -> None:
        name = self._machine()
        self._freeze(name, self._site.workers[name].process)

    def freeze_controller(self) -> None:
        self._freeze(CONTROLLER, self._site.controller.process)

    def _freeze(self, name: str, process: Process) -> None:
        if process.alive and name not in self._down:
            seconds = self._duration()
            self._site.note(f"{name} stands still for {seconds:.0f} s")
            process.freeze()
            self._later(seconds, process.thaw)

    def sever(self) -> None:
        name, seconds = self._machine(), self._duration()
        ways = self._chance.choice(
            ([(name, CONTROLLER), (CONTROLLER, name)], [(name, CONTROLLER)], [(CONTROLLER, name)])
        )
        for source, target in ways:
            self._site.note(f"severed for {seconds:.0f} s: {source} to {target}")
            self._site.network.sever(source, target)
        self._later(seconds, lambda: self._site.network.heal(name, CONTROLLER))

    def slow_down(self) -> None:
        name = self._chance.choice([CONTROLLER, *self._site.machines])
        slowness = self._site.network.slowness
        slowness[name] = self._chance.uniform(0, SLOW)
        self._site.note(f"the way to {name} takes up to {slowness[name]:.1f} s")
        self._later(self._duration(), lambda: slowness.pop(name, None))

    def set_clock(self) -> None:
        name = self._machine()
        self._site.clocks[name] = self._chance.choice((0.0, 3600.0, -3600.0, YEARS, -YEARS))

    def shut_down(self) -> None:
        guests = [guest for machine in self._site.machines.values() for guest in machine.guests.values()]
        if guests:
            self._chance.choice(guests).end("itself")

    async def pass_over(self) -> None:
        """Heal everything, and start what does not run. Nobody else does any more."""
        site = self._site
        site.note("calm")
        site.network.slowness.clear()
        site.controller.process.thaw()
        for name, machine in site.machines.items():
            machine.troubled = False
            site.network.heal(name, CONTROLLER)
            site.workers[name].process.thaw()
        for name in list(self._down):
            running = site.controller if name == CONTROLLER else site.workers[name]
            await running.ended.wait()
            await self._start(name)


# ---- the calm ------------------------------------------------------------------------------------------------------


def unrest(site: Site, users: Users) -> list[str]:
    """Say what is not as it should be in the end."""
    if site.store is None:
        return ["the controller does not run"]
    state = site.store.state
    problems = [f"{name}: a request is under way" for name, known in users.known.items() if known.busy]
    problems += [f"{name} is not registered" for name in site.machines if name not in state.workers]
    for vm in state.vms.values():
        problems += [f"{vm.name} {problem}" for problem in _unrest_of(vm, site, state)]
    wanted = {(vm.state.worker, vm.tart_name) for vm in state.vms.values()}
    for machine in site.machines.values():
        problems += [
            f"{machine.name} has {site.short(local)}, which is nobody's"
            for local in machine.vms
            if (machine.name, local) not in wanted
        ]
    return problems


def _unrest_of(vm: VM, site: Site, state: State) -> Iterator[str]:
    where = [machine.name for machine in site.machines.values() if vm.tart_name in machine.guests]
    should_run = vm.state.status == "running" and vm.spec.power_state == "running"
    if where != [vm.state.worker] * should_run:
        yield f"({vm.state.status}, {vm.spec.power_state} on {vm.state.worker!r}) runs on {where}"
    if vm.state.status == "running" and vm.condition("running") != should_run:
        yield f"({vm.spec.power_state}): its condition running is wrong"
    if vm.state.status == "running" and vm.state.observed_generation != vm.meta.generation:
        yield f"is of generation {vm.meta.generation}, observed {vm.state.observed_generation}"
    if vm.state.status != "running" and not vm.state.status_message:
        yield f"is {vm.state.status} for no reason"
    if vm.state.status == "failed" and vm.spec.restart_policy == "OnFailure" and vm.spec.power_state == "running":
        yield f"is to be restarted ({vm.state.status_message})"
    if vm.state.status == "pending" and vm.state.worker:
        yield f"is pending on {vm.state.worker}: {vm.state.status_message}"
    if vm.state.status == "pending" and not vm.state.worker:
        for worker in state.workers.values():
            held = [one for one in state.vms_by_worker.get(worker.name, {}).values() if one.holds_resources]
            free = worker.resources[TART_VMS] - sum(size_of(one.name) for one in held)
            if free >= size_of(vm.name) and not worker.scheduling_paused:
                yield f"waits, and {worker.name} has room for it: {vm.state.status_message}"


async def come_to_rest(site: Site, users: Users, client: Client) -> None:
    """Wait until nothing is left to be done; a violation if that takes too long, or a worker is silent then."""
    deadline = trio.current_time() + CALM
    quiet = 0
    while quiet < LOOKS:
        await trio.sleep(LOOK)
        users.audit()
        problems = unrest(site, users)
        quiet = 0 if problems else quiet + 1
        if site.violations:
            return
        if trio.current_time() > deadline:
            for problem in problems:
                site.violate(f"no rest in {CALM:g} seconds: {problem}")
            return
    before = {worker.name: worker.last_seen for worker in await client.workers.list()}
    await trio.sleep(LOOK * LOOKS)
    for worker in await client.workers.list():
        if worker.last_seen == before[worker.name]:
            site.violate(f"{worker.name} is silent")


# ---- a run ---------------------------------------------------------------------------------------------------------


async def play(seed: int, directory: Path, broken: Broken, steps: int, trace: list[str]) -> list[str]:
    """Let a storm come and pass over; give the violations."""
    async with trio.open_nursery() as nursery:
        site = Site(random.Random(seed), directory, nursery, broken, trace)
        with site.logged():
            await site.start_controller()
            for name in site.machines:
                site.start_worker(name)
            async with site.client(Process(USER), ANSWER) as client:
                users = Users(site, client, nursery)
                async with trio.open_nursery() as storming:
                    storm = Storm(site, storming)
                    await rage(site, users, storm, steps, deaf=seed % DEAF == DEAF - 1)
                    storming.cancel_scope.cancel()
                if not site.violations:
                    await storm.pass_over()
                    await come_to_rest(site, users, client)
            nursery.cancel_scope.cancel()
    return site.violations


async def rage(site: Site, users: Users, storm: Storm, steps: int, *, deaf: bool) -> None:
    actions: dict[Callable[[], None], int] = {
        users.create: 12, users.delete: 5, users.resize: 3, users.rest: 1, users.pause_worker: 1,
        users.delete_worker: 1, storm.kill_worker: 3, storm.stop_worker: 1, storm.lose_power: 1,
        storm.kill_controller: 2, storm.stop_controller: 1, storm.freeze: 3, storm.sever: 4, storm.slow_down: 2,
        storm.set_clock: 1, storm.shut_down: 2,
    }  # fmt: skip
    if deaf:
        actions[storm.freeze_controller] = 3
    for _ in range(steps):
        site.chance.choices(list(actions), list(actions.values()))[0]()
        await trio.sleep(site.chance.expovariate(1 / PAUSE))
        users.audit()
        if site.violations:
            return


@contextmanager
def scheduled_by(seed: int) -> Iterator[None]:
    """Have trio make its choices by a seed."""
    switch = vars(_run)
    before = switch["_ALLOW_DETERMINISTIC_SCHEDULING"], _run._r.getstate()
    switch["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    _run._r.seed(seed)
    try:
        yield
    finally:
        switch["_ALLOW_DETERMINISTIC_SCHEDULING"] = before[0]
        _run._r.setstate(before[1])


def simulate(seed: int, *, broken: Broken = SOUND, steps: int = STEPS) -> str:
    """Run a seed, and give the digest of its trace. Raises Violation."""
    trace: list[str] = []
    violations = ["an exception; see above"]
    with TemporaryDirectory(prefix="orchard-", dir=MEMORY if MEMORY.is_dir() else None) as home, scheduled_by(seed):
        try:
            violations = trio.run(
                play,
                seed,
                Path(home, "controller"),
                broken,
                steps,
                trace,
                clock=MockClock(autojump_threshold=0),
                strict_exception_groups=True,
            )
        except* DamagedError as group:
            violations = [str(first_exception(group))]
        finally:
            if violations:
                trace.insert(0, f"seed {seed}: {violations[0]}")
                print(*trace[:1], *trace[1:][-SHOWN:], sep="\n")
    if violations:
        raise Violation(trace[0])
    return hashlib.sha256("\n".join(trace).encode()).hexdigest()
