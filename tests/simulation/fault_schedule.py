"""Random users and faults over a simulated cluster. Everything follows from a seed.

First a fault phase: users create, change, restart and delete VMs, whose time to live and whose patience for a worker may
be short, and pause, drain and delete workers; controller and workers crash, stop and freeze; machines lose power or are
sick; connections are cut in one direction or both, or slow; clocks jump; guests shut down by themselves; drivers' calls and
scripts fail, and shutdown scripts hang. After each step, what users were told is compared with the controller's state.

Then a recovery phase: everything is healed and started again, and the cluster must settle. Each VM must be where and as
it was wanted, or have a reason why not, and no machine may hold a VM that the controller does not know.

The seed also makes trio's own choices, so a run is the same whenever it is repeated. `simulate` returns the digest of a
run's trace, or raises `ViolationError`.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import trio
from harness.network import Process
from harness.scratch import memory_directory
from simulated_cluster import CONTROLLER, NO_BUG, USER, PlantedBug, RunningProgram, SimulatedCluster, planted, size_of
from simulated_fleet import CONTROLLERS, ETCD, SimulatedFleet

# trio's switch for deterministic scheduling is not public.
from trio._core import _run
from trio.testing import MockClock

from orchard.base.nursery import first_exception
from orchard.client import Client, ClientError, ResponseError
from orchard.schema import TART_VMS, VM, PowerState
from orchard.storage.errors import DamagedError
from orchard.store import State, check
from orchard.transitions import will_restart

# Few names, so that they are used again and again.
NAMES = [f"vm-{number}" for number in range(8)]
STEPS = 40
# The average time between two steps.
STEP_SECONDS = 4.0
# How long faults last, from and to; one range is chosen for each fault.
Durations = tuple[tuple[float, float], ...]
DURATIONS: Durations = ((0.5, 10.0), (0.5, 10.0), (10.0, 90.0))
# A short time in which the controller does not run.
RESTART_SECONDS = 0.5
# Longer than the offline time-out, so that VMs are started elsewhere meanwhile.
ISOLATION: Durations = ((60.0, 120.0),)
# One seed in this many also freezes the controller.
FREEZE_CONTROLLER_EVERY = 4
# How long users wait for an answer.
ANSWER_SECONDS = 20.0
# How long a sick machine is sick: VMs that fail there meanwhile return after growing pauses.
SICKNESS = (1.0, 15.0)
# The greatest delay of a slow connection.
SLOW_SECONDS = 5.0
# After this time an unanswered request cannot arrive any more.
LATE_REQUEST_SECONDS = 40.0
# The time in which the cluster must settle.
SETTLE_SECONDS = 600.0
# The cluster has settled when this many checks in a row find nothing.
CHECKS, CHECK_SECONDS = 5, 5.0
CHECK = datetime.timedelta(seconds=CHECK_SECONDS)
TEN_YEARS = 10 * 365 * 86400.0  # seconds
# Lines of the trace that are printed with a violation.
SHOWN_LINES = 60


class ViolationError(AssertionError):
    """A run broke a guarantee. str() says which; the end of the trace was printed."""


# ---- users -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class UserView:
    """What users were told about a VM name. At most one of their requests about it is under way."""

    state: Literal["absent", "present", "unknown"] = "absent"
    uid: str = ""
    busy: bool = False
    # The time before which the VM does not expire, if restarts of the controller hasten nothing from `hastened` on.
    lives_until: float = math.inf
    hastened: float = 0.0

    def may_have_expired(self, now: float, hastened: float) -> bool:
        return now >= self.lives_until - (hastened - self.hastened)


class Users:
    """Users who send random requests and remember the answers."""

    def __init__(
        self, cluster: SimulatedCluster, client: Client, nursery: trio.Nursery, *, deadlines: bool = True
    ) -> None:
        """With `deadlines`, VMs and their shutdown have some."""
        self._deadlines = deadlines
        self.views = {name: UserView() for name in NAMES}
        self._cluster = cluster
        self._client = client
        self._nursery = nursery
        self._chance = cluster.chance

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
            text = self._chance.choice(("hello", "hello", "exit 3", "hang"))
            spec["startup_script"] = {"script_content": text}
            spec["startupTimeoutSeconds"] = 20 if text == "hang" else self._chance.choice((0, 10))
            # One that fails is kept, since it would fail for ever.
            spec["startupOnFailure"] = "fail" if text == "hello" else "keep"
        if self._chance.random() < 0.4:
            spec["shutdown_script"] = {"script_content": self._chance.choice(("bye", "exit 3", "hang"))}
            spec["shutdownTimeoutSeconds"] = self._chance.choice((5, 30, 120))
        if self._deadlines:
            spec |= self._deadlines_of_a_vm()
        self._request_about_vm("create", name, lambda: self._client.vms.create(spec), spec.get("ttlSeconds", 0))

    def _deadlines_of_a_vm(self) -> dict[str, Any]:
        chance, spec = self._chance, dict[str, Any]()
        if chance.random() < 0.3:
            spec["ttlSeconds"] = chance.randrange(20, 150)
        if chance.random() < 0.4:
            spec["pendingTimeoutSeconds"] = chance.randrange(1, 40)
        if chance.random() < 0.3:
            spec["priority"] = chance.randrange(3)
        return spec

    def _present_name(self) -> str:
        """Return the name of a VM that exists as far as users know, if there is one."""
        return self._chance.choice([name for name, view in self.views.items() if view.state == "present"] or NAMES)

    def renew(self) -> None:
        name, ttl = self._present_name(), self._chance.choice((0, self._chance.randrange(20, 150)))
        self._request_about_vm("renew", name, lambda: self._client.vms.patch(name, {"ttlSeconds": ttl}), ttl)

    def restart(self) -> None:
        name = self._present_name()
        self._request_about_vm("restart", name, lambda: self._client.vms.restart(name))

    def drain_worker(self) -> None:
        name = self._chance.choice(list(self._cluster.machines))
        body = self._chance.choice(({}, {"now": True}, {"deadline_seconds": self._chance.randrange(1, 15)}))
        self._request_about_worker(f"drain {body}", name, lambda: self._client.workers.drain(name, **body))

    def cancel_drain(self) -> None:
        name = self._chance.choice(list(self._cluster.machines))
        self._request_about_worker("cancel drain", name, lambda: self._client.workers.undrain(name))

    def delete(self) -> None:
        name = self._chance.choice(NAMES)
        self._request_about_vm("delete", name, lambda: self._client.vms.delete(name))

    def resize(self) -> None:
        name, cpu = self._chance.choice(NAMES), self._chance.randrange(1, 9)
        self._request_about_vm("change", name, lambda: self._client.vms.patch(name, cpu=cpu))

    def look(self) -> None:
        """Ask for a VM: an answer that is not of the present state is a violation."""
        name = self._chance.choice(NAMES)
        self._request_about_vm("look at", name, lambda: self._client.vms.get(name))

    def stop_or_suspend(self) -> None:
        powers: tuple[PowerState, ...] = ("stopped", "suspended")
        name, power = self._chance.choice(NAMES), self._chance.choice(powers)
        self._request_about_vm("change", name, lambda: self._client.vms.patch(name, power_state=power))

    def pause_worker(self) -> None:
        name, paused = self._chance.choice(list(self._cluster.machines)), self._chance.random() < 0.5
        self._request_about_worker(f"paused={paused}", name, lambda: self._client.workers.pause(name, paused=paused))

    def delete_worker(self) -> None:
        name = self._chance.choice(list(self._cluster.machines))
        self._request_about_worker("delete", name, lambda: self._client.workers.delete(name))

    def audit(self) -> None:
        """Compare what users were told with the controller's state."""
        if self._cluster.store is None:
            return
        state = self._cluster.store.state
        for problem in check(state):
            self._cluster.violate(problem)
        for name, view in self.views.items():
            vm = state.vms.get(name)
            if view.state == "present" and not view.busy and (vm is None or vm.uid != view.uid):
                if self._may_have_expired(view):
                    view.state = "absent"
                else:
                    self._cluster.violate(f"{name} was acknowledged, and is lost")
            elif view.state == "absent" and not view.busy and vm is not None:
                self._cluster.violate(f"{name} was deleted, and exists")

    def _may_have_expired(self, view: UserView) -> bool:
        return view.may_have_expired(trio.current_time(), self._cluster.hastened)

    def _request_about_vm(
        self, verb: str, name: str, request: Callable[[], Awaitable[Any]], ttl: int | None = None
    ) -> None:
        """Send a request, after which the VM lives for so many seconds (0: for ever; None: unchanged)."""
        view = self.views[name]
        if view.busy:
            return
        view.busy = True
        self._cluster.note(f"user: {verb} {name}")
        self._nursery.start_soon(self._await_vm_answer, verb, name, request, ttl)

    async def _await_vm_answer(
        self, verb: str, name: str, request: Callable[[], Awaitable[Any]], ttl: int | None
    ) -> None:
        view = self.views[name]
        before = view.state
        lives_until = math.inf if not ttl else trio.current_time() + ttl
        hastened = self._cluster.hastened
        try:
            answer = await request()
        except ResponseError as error:
            self._cluster.note(f"user: {verb} {name}: {error}")
            self._note_error(verb, name, before, error.status)
        except ClientError as error:
            self._cluster.note(f"user: {verb} {name}: {error}")
            if verb in ("create", "delete"):
                view.state = "unknown"
            if ttl is not None:
                view.lives_until = min(view.lives_until, lives_until)
            if verb in ("create", "delete", "renew"):
                await trio.sleep(LATE_REQUEST_SECONDS)
        else:
            self._cluster.note(f"user: {verb} {name}: done")
            if before == "absent" and verb != "create":
                self._cluster.violate(f"{verb} {name}: done, but there is no such VM")
            elif before == "present" and verb == "create" and not self._may_have_expired(view):
                self._cluster.violate(f"create {name}: done, but there was such a VM")
            if ttl is not None:
                view.lives_until, view.hastened = lives_until, hastened
            if verb == "look at" and before == "present" and answer.uid != view.uid:
                self._cluster.violate(f"look at {name}: a stale answer")
            if verb == "create":
                view.state, view.uid = "present", answer.uid
            elif verb == "delete":
                view.state = "absent"
        view.busy = False

    def _note_error(self, verb: str, name: str, before: str, status: int) -> None:
        view = self.views[name]
        if status == 404:
            if before == "present" and not self._may_have_expired(view):
                self._cluster.violate(f"{verb} {name}: 404, but it was acknowledged")
            view.state = "absent"
        elif status == 409 and before == "absent":
            self._cluster.violate(f"{verb} {name}: 409, but it was deleted")
        elif status >= 500 and verb in ("create", "delete"):
            view.state = "unknown"
        elif status >= 500 and verb == "renew":
            view.lives_until = -math.inf

    def _request_about_worker(self, verb: str, name: str, request: Callable[[], Awaitable[Any]]) -> None:
        self._cluster.note(f"user: {verb} {name}")
        self._nursery.start_soon(self._await_worker_answer, request)

    async def _await_worker_answer(self, request: Callable[[], Awaitable[Any]]) -> None:
        try:
            await request()
        except ClientError as error:
            self._cluster.note(f"user: {error}")


# ---- faults ----------------------------------------------------------------------------------------------------------


class Faults:
    """Random faults of random `durations`. The tasks that end them run in `nursery`."""

    def __init__(self, cluster: SimulatedCluster, nursery: trio.Nursery, durations: Durations) -> None:
        self._cluster = cluster
        self._nursery = nursery
        self._chance = cluster.chance
        self._durations = durations
        # Programs that do not run, or were told to stop.
        self._down: dict[str, None] = {}

    def kill_worker(self) -> None:
        self._take_down(self._random_machine(), "is killed")

    def stop_worker(self) -> None:
        self._take_down(self._random_machine(), "is told to stop", orderly=True)

    def lose_power(self) -> None:
        name = self._random_machine()
        self._take_down(name, "loses power")
        self._cluster.machines[name].lose_power()

    def kill_controller(self) -> None:
        self._take_down(self._random_controller(), "is killed")

    def restart_controller(self) -> None:
        """Kill the controller and start it again at once: leases do not run out meanwhile."""
        self._take_down(self._random_controller(), "is killed for a moment", seconds=RESTART_SECONDS)

    def stop_controller(self) -> None:
        self._take_down(self._random_controller(), "is told to stop", orderly=True)

    def freeze_worker(self) -> None:
        self._freeze(self._random_machine())

    def freeze_controller(self) -> None:
        self._freeze(self._random_controller())

    def cut_leader_off(self) -> None:
        """Cut what the leader sends to etcd, until another controller leads: it may arrive then."""
        leaders = [name for name, each in self._cluster.controllers.items() if each is self._cluster.leader]
        for name in leaders:
            self._cluster.note(f"cut: {name} to {ETCD}")
            self._cluster.network.cut(name, ETCD)
            self._call_later(self._chance.uniform(6, 12), partial(self._cluster.network.heal, name, ETCD))

    def cut_controller_off(self) -> None:
        """Cut a controller off from etcd. What it has sent may arrive later."""
        name, seconds = self._random_controller(), self._random_duration()
        for source, target in self._chance.choice(([(name, ETCD), (ETCD, name)], [(name, ETCD)], [(ETCD, name)])):
            self._cluster.note(f"cut for {seconds:.0f} s: {source} to {target}")
            self._cluster.network.cut(source, target)
        self._call_later(seconds, lambda: self._cluster.network.heal(name, ETCD))

    def cut_connection(self) -> None:
        name, seconds = self._random_machine(), self._random_duration()
        other = self._random_controller()
        directions = self._chance.choice(([(name, other), (other, name)], [(name, other)], [(other, name)]))
        for source, target in directions:
            self._cluster.note(f"cut for {seconds:.0f} s: {source} to {target}")
            self._cluster.network.cut(source, target)
        self._call_later(seconds, lambda: self._cluster.network.heal(name, other))

    def slow_connection(self) -> None:
        name = self._chance.choice([CONTROLLER, *self._cluster.machines])
        slowness = self._cluster.network.slowness
        slowness[name] = self._chance.uniform(0, SLOW_SECONDS)
        self._cluster.note(f"connections of {name} take up to {slowness[name]:.1f} s")
        self._call_later(self._random_duration(), lambda: slowness.pop(name, None))

    def set_clock(self) -> None:
        name = self._random_machine()
        self._cluster.clock_errors[name] = self._chance.choice((0.0, 3600.0, -3600.0, TEN_YEARS, -TEN_YEARS))

    def set_controller_clock(self) -> None:
        """Set the wall clock by which the controller stores deadlines. It may crash before it notices."""
        error = self._chance.choice((0.0, 30.0, 3600.0, -3600.0, TEN_YEARS, -TEN_YEARS))
        self._cluster.note(f"controller's clock is wrong by {error:.0f} s")
        self._cluster.clock_errors[CONTROLLER] = error

    def sicken_machine(self) -> None:
        machine = self._cluster.machines[self._random_machine()]
        machine.broken = "clone"
        self._cluster.note(f"{machine.name} cannot clone")
        self._call_later(self._chance.uniform(*SICKNESS), lambda: setattr(machine, "broken", ""))

    def shut_guest_down(self) -> None:
        guests = [guest for machine in self._cluster.machines.values() for guest in machine.guests.values()]
        if guests:
            self._chance.choice(guests).end("itself")

    async def end_all(self) -> None:
        """Heal everything and start every program. The tasks in `nursery` must be cancelled already."""
        cluster = self._cluster
        cluster.note("recovery")
        cluster.network.slowness.clear()
        for name, running in cluster.controllers.items():
            running.process.thaw()
            cluster.network.heal(name, ETCD)
        for name, machine in cluster.machines.items():
            machine.troubled, machine.broken = False, ""
            for other in cluster.controllers:
                cluster.network.heal(name, other)
            cluster.workers[name].process.thaw()
        for name in list(self._down):
            await self._program(name).ended.wait()
            await self._start(name)

    def _random_duration(self) -> float:
        return self._chance.uniform(*self._chance.choice(self._durations))

    def _random_machine(self) -> str:
        return self._chance.choice(list(self._cluster.machines))

    def _random_controller(self) -> str:
        names = list(self._cluster.controllers)
        return names[0] if len(names) == 1 else self._chance.choice(names)

    def _program(self, name: str) -> RunningProgram:
        return self._cluster.controllers.get(name) or self._cluster.workers[name]

    def _call_later(self, seconds: float, call: Callable[[], object]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            call()

        self._nursery.start_soon(wait)

    def _take_down(self, name: str, what: str, *, orderly: bool = False, seconds: float | None = None) -> None:
        if name in self._down:
            return
        self._down[name] = None
        seconds = self._random_duration() if seconds is None else seconds
        self._nursery.start_soon(self._restart_later, name, seconds)
        running = self._program(name)
        self._cluster.note(f"{name} {what}")
        if not orderly:
            running.kill()
            return
        running.process.thaw()
        if name in self._cluster.controllers:
            running.stopping.set()
        else:
            running.scope.cancel()

    async def _restart_later(self, name: str, seconds: float) -> None:
        await self._program(name).ended.wait()
        await trio.sleep(seconds)
        await self._start(name)

    async def _start(self, name: str) -> None:
        self._cluster.note(f"{name} is started")
        if name in self._cluster.controllers:
            await self._cluster.start_controller(name=name)
        else:
            self._cluster.start_worker(name)
        del self._down[name]

    def _freeze(self, name: str) -> None:
        process = self._program(name).process
        if process.alive and name not in self._down:
            seconds = self._random_duration()
            self._cluster.note(f"{name} is frozen for {seconds:.0f} s")
            process.freeze()
            self._call_later(seconds, process.thaw)


# ---- recovery --------------------------------------------------------------------------------------------------------


def unsettled(cluster: SimulatedCluster, users: Users) -> list[str]:
    """Return what is not as it must be in the end, in a sentence each."""
    if cluster.store is None:
        return ["the controller does not run"]
    state = cluster.store.state
    problems = [f"{name}: a request is under way" for name, view in users.views.items() if view.busy]
    problems += [f"{name} is not registered" for name in cluster.machines if name not in state.workers]
    for vm in state.vms.values():
        problems += [f"{vm.name} {problem}" for problem in _unsettled_vm(vm, cluster, state)]
    wanted = {(vm.state.worker, vm.tart_name) for vm in state.vms.values()}
    for machine in cluster.machines.values():
        problems += [
            f"{machine.name} has the orphan {cluster.short(local)}"
            for local in machine.vms
            if (machine.name, local) not in wanted
        ]
    return problems


def _unsettled_vm(vm: VM, cluster: SimulatedCluster, state: State) -> Iterator[str]:
    where = [machine.name for machine in cluster.machines.values() if vm.tart_name in machine.guests]
    should_run = vm.state.status == "running" and vm.spec.power_state == "running"
    if where != [vm.state.worker] * should_run:
        yield f"({vm.state.status}, {vm.spec.power_state} on {vm.state.worker!r}) runs on {where}"
    if vm.state.status == "running" and vm.condition("running") != should_run:
        yield f"({vm.spec.power_state}): its condition running is wrong"
    has_failed = bool(vm.state.startup_exit_code) or vm.state.status_message
    if vm.condition("ready") != (should_run and not has_failed):
        yield f"({vm.state.status}, {vm.state.startup_exit_code}): its condition ready is wrong: {vm.state.status_message}"
    if vm.state.end_request == "restart":
        yield "has to be restarted"
    if vm.state.status == "running" and vm.state.observed_generation != vm.meta.generation:
        yield f"is of generation {vm.meta.generation}, observed {vm.state.observed_generation}"
    if vm.state.status != "running" and not vm.state.status_message:
        yield f"is {vm.state.status} without a reason"
    if will_restart(vm):
        yield f"has to be restarted ({vm.state.status_message})"
    if vm.meta.expires_at is not None and vm.meta.expires_at < cluster.clock(CONTROLLER) - CHECK:
        yield f"has expired at {vm.meta.expires_at}"
    if vm.state.status == "pending" and vm.state.worker:
        yield f"is pending on {vm.state.worker}: {vm.state.status_message}"
    if vm.state.status == "pending" and not vm.state.worker:
        for worker in state.workers.values():
            assigned = [one for one in state.vms_by_worker.get(worker.name, {}).values() if one.holds_resources]
            free = worker.resources[TART_VMS] - sum(size_of(one.name) for one in assigned)
            if free >= size_of(vm.name) and not worker.scheduling_paused:
                yield f"waits, but fits on {worker.name}: {vm.state.status_message}"


async def settle(cluster: SimulatedCluster, users: Users, client: Client) -> None:
    """Wait until the cluster has settled. It is a violation if that takes too long, or if a worker is silent then."""
    deadline = trio.current_time() + SETTLE_SECONDS
    quiet = 0
    while quiet < CHECKS:
        await trio.sleep(CHECK_SECONDS)
        users.audit()
        problems = unsettled(cluster, users)
        quiet = 0 if problems else quiet + 1
        if cluster.violations:
            return
        if trio.current_time() > deadline:
            for problem in problems:
                cluster.violate(f"not settled in {SETTLE_SECONDS:g} seconds: {problem}")
            return
    before = {worker.name: worker.last_seen for worker in await client.workers.list()}
    await trio.sleep(CHECK_SECONDS * CHECKS)
    for worker in await client.workers.list():
        if worker.last_seen == before[worker.name]:
            cluster.violate(f"{worker.name} is silent")


# ---- a run -----------------------------------------------------------------------------------------------------------


async def inject(
    cluster: SimulatedCluster,
    users: Users,
    faults: Faults,
    steps: int,
    *,
    freeze_controller: bool,
    isolate_workers: bool,
) -> None:
    """Take random steps of users and faults. With `isolate_workers`, only create VMs, kill and freeze workers."""
    actions: dict[Callable[[], None], int] = {
        users.create: 12, users.delete: 5, users.resize: 3, users.stop_or_suspend: 1, users.pause_worker: 1,
        users.delete_worker: 1, faults.kill_worker: 3, faults.stop_worker: 1, faults.lose_power: 1,
        faults.kill_controller: 2, faults.restart_controller: 1, faults.stop_controller: 1, faults.freeze_worker: 3, faults.cut_connection: 4,
        faults.slow_connection: 2, faults.set_clock: 1, faults.shut_guest_down: 2,
        users.renew: 2, users.restart: 4, users.drain_worker: 2, users.cancel_drain: 3,
        faults.set_controller_clock: 1, faults.sicken_machine: 1,
    }  # fmt: skip
    if freeze_controller:
        actions[faults.freeze_controller] = 3
    if len(cluster.controllers) > 1:
        # Stored deadlines and wall clocks are those of one controller's tests.
        del actions[users.renew], actions[faults.set_controller_clock]
        actions |= {faults.cut_controller_off: 4, faults.kill_controller: 4, users.look: 6}
    if isolate_workers:
        # With two controllers, the one that leads is isolated.
        actions = {users.create: 3, faults.kill_worker: 1, faults.freeze_worker: 1}
        if len(cluster.controllers) > 1:
            actions = {users.create: 4, users.delete: 4, users.resize: 4, faults.cut_leader_off: 1}
    for _ in range(steps):
        cluster.chance.choices(list(actions), list(actions.values()))[0]()
        await trio.sleep(cluster.chance.expovariate(1 / STEP_SECONDS))
        users.audit()
        if cluster.violations:
            return


async def run_schedule(
    seed: int, directory: Path, bug: PlantedBug, steps: int, trace: list[str], is_fleet: bool = False
) -> list[str]:
    """Run the fault phase and the recovery phase. Return the violations."""
    freeze_controller = seed % FREEZE_CONTROLLER_EVERY == FREEZE_CONTROLLER_EVERY - 1
    async with trio.open_nursery() as nursery:
        make, several = (SimulatedFleet, CONTROLLERS) if is_fleet else (SimulatedCluster, (CONTROLLER,))
        cluster = make(random.Random(seed), directory, nursery, bug, trace)
        with cluster.logged(), cluster.observed():
            for name in several:
                await cluster.start_controller(name=name)
            for name in cluster.machines:
                cluster.start_worker(name)
            async with cluster.client(Process(USER), ANSWER_SECONDS) as client:
                users = Users(cluster, client, nursery, deadlines=not (bug.shows_in_isolation or is_fleet))
                async with trio.open_nursery() as fault_nursery:
                    faults = Faults(cluster, fault_nursery, ISOLATION if bug.shows_in_isolation else DURATIONS)
                    await inject(
                        cluster,
                        users,
                        faults,
                        steps,
                        freeze_controller=freeze_controller,
                        isolate_workers=bug.shows_in_isolation,
                    )
                    fault_nursery.cancel_scope.cancel()
                if not cluster.violations:
                    await faults.end_all()
                    await settle(cluster, users, client)
            # A frozen process would never end a write that cannot be cancelled.
            for running in (*cluster.controllers.values(), *cluster.workers.values()):
                running.process.thaw()
            nursery.cancel_scope.cancel()
    return cluster.violations


@contextmanager
def deterministic_trio(seed: int) -> Iterator[None]:
    """Make trio's choices follow from a seed."""
    switch = vars(_run)
    before = switch["_ALLOW_DETERMINISTIC_SCHEDULING"], _run._r.getstate()
    switch["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    _run._r.seed(seed)
    try:
        yield
    finally:
        switch["_ALLOW_DETERMINISTIC_SCHEDULING"] = before[0]
        _run._r.setstate(before[1])


def simulate(seed: int, *, bug: PlantedBug = NO_BUG, steps: int = STEPS, is_fleet: bool = False) -> str:
    """Run a seed, with `is_fleet` of two controllers on etcd. Return the digest of its trace, or print the end of the trace and raise ViolationError."""
    trace: list[str] = []
    violations = ["an exception; see above"]
    with TemporaryDirectory(prefix="orchard-", dir=memory_directory()) as home, deterministic_trio(seed), planted(bug):
        try:
            violations = trio.run(
                run_schedule,
                seed,
                Path(home, "controller"),
                bug,
                steps,
                trace,
                is_fleet,
                clock=MockClock(autojump_threshold=0),
                strict_exception_groups=True,
            )
        except* DamagedError as group:
            violations = [str(first_exception(group))]
        finally:
            if violations:
                trace.insert(0, f"seed {seed}: {violations[0]}")
                print(*trace[:1], *trace[1:][-SHOWN_LINES:], sep="\n")
    if violations:
        raise ViolationError(trace[0])
    return hashlib.sha256("\n".join(trace).encode()).hexdigest()
