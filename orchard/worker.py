"""The worker role: what the controller wants on this host, made so. Law: it composes; life.py has one VM's life.

`python -m orchard.worker` runs it; `WorkerService.run` is the same for an embedding program.

Two things go on beside each other. A *session* is the worker's talk with the controller: registration, heartbeats, a
watch over which it is told to look again, the look itself (`sync`), and the reports. It ends at the first failure and
begins anew after a pause. The VMs' tasks (`Instance`) are in a nursery around it: they don't notice.

VMs outlive the worker, unless it is told otherwise, and the next one adopts those that it finds running (`_settle`).
They do not outlive their lease: with each heartbeat that the controller has answered, the driver is told for how long
VMs may run that the controller would start elsewhere when it hears no more of this worker. That is counted from when
the heartbeat was sent, and is shorter than the controller's patience, which begins when it was received: so the VM has
ended here before it is started there, whatever is broken in between.

A look compares what the controller has with what is here, and ACTIONS says for each pair of states what to do. It gives
orders and waits for nothing; what is to end is ordered first_exception, and what is to begin waits until that has ended, because
the scheduler has given its place away already.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import math
import os
import platform
import random
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import trio

from orchard import __version__
from orchard.auth import BootstrapToken
from orchard.client import Client, ClientError, ConnectError, ResponseError
from orchard.codec import encode
from orchard.daemon import (
    orchard_home,
    parse_count,
    parse_pairs,
    parse_resources,
    run_program,
    run_until_signal,
)
from orchard.files import WORKER_LOCK_FILE, LockError, lock_directory
from orchard.net.tcp import splice
from orchard.net.transport import in_words
from orchard.net.wsframes import INTERNAL_ERROR, NORMAL
from orchard.nursery import first_exception, unwrap_groups
from orchard.schema import (
    DEFAULT_CPU,
    DEFAULT_MEMORY,
    LOGICAL_CORES,
    MEMORY_MIB,
    NAME,
    TART_VMS,
    VM,
    Arch,
    Event,
    Runtime,
    Worker,
)
from orchard.tart import TartDriver, check_dhcp_lease, find_tart, machine_id
from orchard.vm import supervisor
from orchard.vm.driver import Driver, DriverError, LocalState, LocalVM, NoSuchVM, NotRunning
from orchard.vm.instance import Instance
from orchard.vm.synthetic import SyntheticDriver

HEARTBEAT_SECONDS = 15.0  # or less, if the controller's patience is shorter than the usual
ANSWER_SECONDS = 30.0  # with a heartbeat each 15, a controller that is gone without a word is found within a minute
HEARTBEATS_A_PING = 2  # in a tunnel: all that it does is to find a controller that is gone
OFFLINE_TIMEOUT = 180.0  # seconds of the controller's patience, if it does not say
HEARTBEATS = 8  # that may be lost before leased VMs are shut down
SOFT, HARD = 0.75, 0.95  # of that patience: then leased VMs are told to shut down, and killed
AGAIN_SECONDS = 10.0  # between two attempts to remove what an earlier worker has left
SYNC_SECONDS = 5.0  # between two looks that nobody asked for
FIRST_PAUSE, LAST_PAUSE = 0.1, 1.5  # seconds between attempts, doubling: back within two seconds of the controller
CHANCE = random.SystemRandom().random  # the common generator is for an embedding test to seed, and to find as it was
JITTER = 0.5  # share of a pause that is left to chance, so that a thousand workers don't come at once
MACOS_VMS = 2  # that Apple's licence allows to run on one host
OWN = "orchard-"  # with which the name of every local VM begins that is ours
LOST = "lost: the worker was restarted, and the VM does not run any more"
GOODBYE_SECONDS = 5.0  # to tell the controller of them
EXIT_REFUSED = 2
TICK = datetime.timedelta(microseconds=1)  # the least step of a last_seen
FORWARD = "/rpc/port-forward"
PORTS = range(1, 65536)
CONNECT_SECONDS = 10.0  # for a port of a VM to answer
MAX_TUNNELS = 4096  # at once: each has two sockets, and half a MiB for each direction in which somebody reads slowly
MAX_ERRANDS = 2 * MAX_TUNNELS  # at once: those tunnels, the refusal of others, and addresses

Local = Literal["absent", "pending", "running", "failed"]
Action = Literal["none", "create", "lost", "report", "follow", "stop", "fail", "remove"]

# (here, at the controller) -> what to do
ACTIONS: Mapping[tuple[Local, Local], Action] = {
    ("absent", "absent"): "none",
    ("absent", "pending"): "create",
    ("absent", "running"): "lost",
    ("absent", "failed"): "none",
    ("pending", "absent"): "remove",
    ("pending", "pending"): "report",
    ("pending", "running"): "fail",  # nobody but this worker could have said that it runs
    ("pending", "failed"): "stop",
    ("running", "absent"): "remove",
    ("running", "pending"): "report",
    ("running", "running"): "follow",
    ("running", "failed"): "stop",
    ("failed", "absent"): "remove",
    ("failed", "pending"): "report",
    ("failed", "running"): "report",
    ("failed", "failed"): "none",
}

_logger = logging.getLogger("orchard.worker")


class RefusedError(Exception):
    """The controller does not let this worker in, and never has: asking again would not help."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker says of itself when it registers."""

    name: str
    arch: Arch
    runtime: Runtime
    machine_id: str
    resources: Mapping[str, int]
    labels: Mapping[str, str] = field(default_factory=dict)
    default_cpu: int = DEFAULT_CPU
    default_memory: int = DEFAULT_MEMORY  # MiB


class WorkerService:
    """One worker. It closes neither `client` nor anything of `driver`'s."""

    def __init__(
        self,
        identity: Identity,
        client: Client,
        driver: Driver,
        *,
        stop_vms_on_exit: bool = False,
        clock: Callable[[], float] = time.time,
        lease_clock: Callable[[], float] = supervisor.clock,
        chance: Callable[[], float] = CHANCE,
    ) -> None:
        """`clock` gives seconds since 1970, `lease_clock` seconds that nobody sets, `chance` numbers from 0 to 1."""
        self.identity = identity
        self.name = identity.name
        self.instances: dict[str, Instance] = {}  # by the VM's name on this host
        self._client = client
        self._driver = driver
        self._stop_vms_on_exit = stop_vms_on_exit
        self._stopped: list[Instance] = []  # that ended with this worker
        self._clock = clock
        self._lease_clock = lease_clock
        self._offline_timeout = OFFLINE_TIMEOUT
        self._chance = chance
        self._last_seen = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        self._look = trio.Event()
        self._dirty = trio.Event()
        self._tunnels = 0  # that are open, or are being opened
        self._errands = 0  # of the controller's that are being done
        self._arrivals = 0  # how often the controller has let us in
        self._settled = False  # whether what an earlier worker left here is dealt with
        self._ending: list[trio.Event] | None = None  # what the controller has given up; None: nobody knows yet
        self._answered = -math.inf  # when the last sign of life was sent that was answered, by the lease's clock
        self._strangers: list[trio.Event] = []  # VMs that run here and could not be ended yet; set when they are

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; `started()` once registered. Raises RefusedError."""
        with unwrap_groups():
            try:
                async with trio.open_nursery() as vms:  # they outlive every session
                    await self._sessions(vms, task_status)
            finally:
                with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                    await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        """Tell the controller of the VMs that ended with this worker, if it can be reached."""
        with suppress(ClientError):
            for instance in self._stopped:
                await self._report_one(instance, instance.report())

    async def _sessions(self, vms: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        waiting = 0
        while True:
            arrivals = self._arrivals
            refusal: BaseException | None = None
            try:
                await self._session(vms, task_status)
            except* RefusedError as group:
                refusal = first_exception(group)
            except* ClientError as group:
                reason = str(first_exception(group))
                _logger.warning("no session with the controller", extra={"worker": self.name, "reason": reason})
            except* Exception as group:
                _logger.exception("a session failed", extra={"worker": self.name}, exc_info=group)
            if refusal is not None:
                raise refusal
            await self._client.start_afresh()
            waiting = 0 if self._arrivals > arrivals else waiting + 1
            await trio.sleep(pause_after(waiting, self._chance()))

    # -- the session

    async def _session(self, vms: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        sent = await self._register()
        async with trio.open_nursery() as session:  # the first of them to fail ends the others
            session.start_soon(self._heartbeat)
            if not self._settled:
                await self._settle(vms)
                self._settled = True
                task_status.started()
            _logger.info("registered with the controller", extra={"worker": self.name})
            self._changed()
            session.start_soon(self._listen, vms)
            session.start_soon(self._report)
            await self.sync(vms)
            self._renew(sent)
            while True:
                with trio.move_on_after(SYNC_SECONDS):
                    await self._look.wait()
                self._look = trio.Event()
                await self.sync(vms)

    async def _register(self) -> float:
        """Register, and give when that was sent, for the lease."""
        self._ending = None
        sent = self._lease_clock()
        try:
            stored = await self._client.workers.register(self._description())
        except ResponseError as error:
            if error.status in (401, 403) and not self._arrivals:
                raise RefusedError(f"the controller refuses this worker: {error.message}") from error
            raise
        self._arrivals += 1
        self._offline_timeout = (await self._client.info()).worker_offline_timeout / 1000 or OFFLINE_TIMEOUT
        self._last_seen = max(self._last_seen, stored.last_seen or self._last_seen)
        return sent

    def _description(self) -> dict[str, Any]:
        """Give the worker as the API takes it."""
        who = self.identity
        return encode(
            Worker(
                name=who.name,
                arch=who.arch,
                runtime=who.runtime,
                resources=who.resources,
                labels=who.labels,
                default_cpu=who.default_cpu,
                default_memory=who.default_memory,
                machine_id=who.machine_id,
                last_seen=self._now(),
            )
        )

    def _now(self) -> datetime.datetime:
        """Give the time, or when the clock was set back, one that is at least later than every one before."""
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        last = min(
            self._last_seen, datetime.datetime.max.replace(tzinfo=datetime.UTC) - TICK
        )  # anybody may have put it
        self._last_seen = max(now, last + TICK)
        return self._last_seen

    @property
    def _heartbeat_seconds(self) -> float:
        return min(HEARTBEAT_SECONDS, SOFT * self._offline_timeout / HEARTBEATS)

    async def _heartbeat(self) -> None:
        while True:
            await trio.sleep(self._heartbeat_seconds)
            # With what the controller has, and only a later last_seen: should this request arrive twice, the second
            # one is no heartbeat any more, and must not take a pause back.
            stored = await self._client.workers.get(self.name)
            self._last_seen = max(self._last_seen, stored.last_seen or self._last_seen)
            seen = self._now()
            sent = self._lease_clock()
            answer = await self._client.workers.put(self.name, encode(replace(stored, last_seen=seen)))
            if answer.last_seen == seen:  # else somebody else's was later, and this one did not count
                self._renew(sent)

    def _renew(self, sent: float) -> None:
        """Let leased VMs run on, by a heartbeat that was sent at `sent` and answered now.

        Not while one runs here that the controller has given up: it starts that elsewhere when the lease must be over.
        """
        self._answered = max(sent, self._answered)
        if self._ending is None or not all(ended.is_set() for ended in self._ending):
            return
        soft, hard = (self._answered + share * self._offline_timeout for share in (SOFT, HARD))
        try:
            self._driver.lease(soft, hard)
        except DriverError as error:
            _logger.error("the lease of VMs cannot be renewed", extra={"worker": self.name, "reason": str(error)})

    async def _listen(self, lasting: trio.Nursery) -> None:
        """Follow the watch, and do what it says; what takes long, in a nursery that outlives the session."""
        async with self._client.rpc_watch(self.name) as actions:
            async for action in actions:
                match action:
                    case {"syncVMsAction": _}:
                        self._look.set()
                    case {"portForwardAction": {"session": str(session), "port": int(port), **rest}} if port in PORTS:
                        self._run(lasting, partial(self._forward, session, str(rest.get("vmUID") or ""), port))
                    case {"resolveIPAction": {"session": str(session), **rest}}:
                        self._run(lasting, partial(self._resolve, session, str(rest.get("vmUID") or "")))
                    case _:
                        _logger.warning("an unknown action was passed over", extra={"action": sorted(action)})

    # -- into VMs

    def _run(self, lasting: trio.Nursery, errand: Callable[[], Awaitable[None]]) -> None:
        """Run an errand of the controller's, if there are not too many; who asked for it does not wait for ever."""
        if self._errands >= MAX_ERRANDS:
            _logger.warning("an action was passed over", extra={"worker": self.name, "at_work": self._errands})
            return

        async def run() -> None:
            try:
                await errand()
            finally:
                self._errands -= 1

        self._errands += 1
        lasting.start_soon(run)

    async def _forward(self, session: str, vm_uid: str, port: int) -> None:
        """Bring the controller a tunnel to a port of a VM (of this host for no VM), or say why there is none."""
        query = {"session": session, "errorMessage": ""}
        refusal = ""
        self._tunnels += 1
        try:
            async with (
                await self._connect(vm_uid, port) as stream,
                self._client.tunnel(FORWARD, query, HEARTBEATS_A_PING * self._heartbeat_seconds) as tunnel,
            ):
                broken = await splice(stream, tunnel)
                await tunnel.aclose(INTERNAL_ERROR if broken else NORMAL, broken)
        except DriverError as error:
            refusal = str(error)
        except ClientError as error:
            _logger.info("a tunnel ended", extra={"worker": self.name, "reason": str(error)})
        finally:
            self._tunnels -= 1
        if refusal:
            await self._answer_refusal(session, refusal)

    async def _answer_refusal(self, session: str, reason: str) -> None:
        with suppress(ClientError):  # whoever asked does not wait for ever
            async with self._client.websocket(FORWARD, {"session": session, "errorMessage": reason}):
                pass

    async def _connect(self, vm_uid: str, port: int) -> trio.SocketStream:
        """Connect to a port of a VM. Raises DriverError that says why that can't be."""
        if self._tunnels > MAX_TUNNELS:  # with this one
            raise DriverError(f"{MAX_TUNNELS} tunnels are open already, expected less")
        host = await self._address(vm_uid)
        where = f"cannot connect to port {port} of {'the VM' if vm_uid else 'the host'}"
        try:
            with trio.fail_after(CONNECT_SECONDS):
                return await trio.open_tcp_stream(host, port)
        except trio.TooSlowError:
            raise DriverError(f"{where}: no answer within {CONNECT_SECONDS:g} seconds") from None
        except OSError as error:
            raise DriverError(f"{where}: {in_words(error)}") from error

    async def _address(self, vm_uid: str) -> str:
        """Give the address of a VM, or of this host for no VM. Raises DriverError."""
        if not vm_uid:
            return "localhost"
        for instance in self.instances.values():
            if instance.vm.uid == vm_uid and instance.running:
                return await self._driver.ip(instance.name, bridged=bool(instance.vm.spec.net_bridged))
        raise DriverError(f"no VM with uid {vm_uid} runs here")

    async def _resolve(self, session: str, vm_uid: str) -> None:
        """ClientResponse what the address of a VM is."""
        query = {"session": session, "ip": "", "errorMessage": ""}
        try:
            query["ip"] = await self._address(vm_uid)
        except DriverError as error:
            query["errorMessage"] = str(error)
        with suppress(ClientError):  # likewise
            await self._client.request("POST", "/rpc/resolve-ip", query=query)

    def _changed(self) -> None:
        self._dirty.set()

    async def _report(self) -> None:
        """Tell the controller what the instances have to say, each as soon as it changes."""
        while True:
            await self._dirty.wait()
            self._dirty = trio.Event()
            for instance in list(self.instances.values()):
                report = instance.report()
                if report != instance.reported:
                    await self._report_one(instance, report)

    async def _report_one(self, instance: Instance, report: dict[str, Any]) -> None:
        try:
            await self._client.vms.report(instance.vm.name, report)
        except ResponseError as error:
            if error.status >= 500:
                raise
            if error.status != 404:  # else it is gone or has another life, as the next look will show
                _logger.error("a report was refused", extra={"vm": instance.vm.name, "reason": error.message})
        instance.reported = report

    async def _send_events(self, vm: VM, events: Sequence[Event]) -> None:
        """Deliver a script's output, however long the controller is away or its disk full.

        It may come twice, but never not at all, as long as the VM is there and has room for it.
        """
        for failures in itertools.count(1):
            pause = pause_after(failures, self._chance())
            try:
                await self._client.vms.append_events(vm.name, [encode(event) for event in events], uid=vm.uid)
            except ConnectError:
                await trio.sleep(pause)
            except ResponseError as error:
                if error.status >= 500:
                    await trio.sleep(pause)
                    continue
                if error.status != 404:
                    _logger.error("output was not taken", extra={"vm": vm.name, "reason": error.message})
                return
            else:
                return

    # -- the look

    async def _settle(self, vms: trio.Nursery) -> None:
        """Deal with what an earlier worker left on this host: adopt what runs, keep what is at rest, delete all else.

        Nothing that is not ours is touched.
        """
        try:
            await self._driver.recover()
            found = [local for local in await self._driver.list_vms() if local.name.startswith(OWN)]
        except DriverError as error:
            raise ClientError(f"cannot tell which VMs are on this host: {error}") from error
        wanted = {vm.tart_name: vm for vm in await self._client.vms.list(worker=self.name)}
        ours: list[tuple[LocalVM, VM]] = []
        async with trio.open_nursery() as ending:
            for local in found:
                vm = wanted.get(local.name)
                if vm is None or (vm.state.status == "pending" and local.state != "running"):
                    ending.start_soon(self._remove_stranger, local, vms)  # it was to go, or is half-made
                else:
                    ours.append((local, vm))
        for local, vm in ours:  # without a checkpoint: a session that ends before this has settled nothing
            runs = local.state == "running"
            instance = self._instance(vm, runs=runs)
            if vm.state.status == "failed":
                instance.fail(vm.state.status_message)
            elif not runs and not rests(vm, local.state):
                instance.fail(LOST)
            _logger.info("found a VM", extra={"vm": vm.name, "state": local.state})
            vms.start_soon(self._tend, instance, instance.adopt if runs else instance.keep)

    async def _remove_stranger(self, local: LocalVM, vms: trio.Nursery) -> None:
        """Remove a VM that nobody wants; if that fails, go on trying in another nursery."""
        if not await self._removed(local.name):
            gone = trio.Event()
            if local.state == "running":
                self._strangers.append(gone)
            vms.start_soon(self._go_on_removing, local.name, gone)

    async def _go_on_removing(self, name: str, gone: trio.Event) -> None:
        while True:
            await trio.sleep(AGAIN_SECONDS)
            # It may be wanted by now under this name: then it goes with that one.
            if name not in self.instances and await self._removed(name):
                gone.set()
                return

    async def _removed(self, name: str) -> bool:
        try:
            with suppress(NotRunning):
                await self._driver.stop(name)
            await self._driver.delete(name)
        except NoSuchVM:
            return True
        except DriverError as error:
            _logger.error("cannot remove a VM that was left here", extra={"vm": name, "reason": str(error)})
            return False
        _logger.info("removed a VM that was left here", extra={"vm": name})
        return True

    async def sync(self, vms: trio.Nursery) -> None:
        """Look at what the controller has for this worker, and give orders. Raises ClientError."""
        wanted = {vm.tart_name: vm for vm in await self._client.vms.list(worker=self.name)}
        actions = {
            name: ACTIONS[_status(self.instances.get(name)), _status(wanted.get(name))]
            for name in [*self.instances, *(name for name in wanted if name not in self.instances)]
        }
        for name, action in actions.items():
            if name in self.instances:
                self._order(self.instances[name], wanted.get(name), action)
        # The places of these are given away already; one that fails by itself keeps its own until that is told.
        ending = [
            instance.ended
            for name, instance in self.instances.items()
            if instance.ending and _status(wanted.get(name)) in ("absent", "failed")
        ]
        self._strangers = [gone for gone in self._strangers if not gone.is_set()]
        ending += self._strangers
        self._ending = ending
        free = trio.Event()
        if ending and "create" in actions.values():
            vms.start_soon(self._make_room, ending, free)
        for name, action in actions.items():
            if action == "create":
                instance = self._instance(wanted[name])
                vms.start_soon(self._tend, instance, partial(instance.tend, [free] if ending else []))
            elif action == "lost":
                instance = self._instance(wanted[name])
                instance.fail(LOST)
                vms.start_soon(self._tend, instance, instance.keep)

    async def _make_room(self, ending: Sequence[trio.Event], free: trio.Event) -> None:
        """Wait until what the controller has given up has ended; only then others may have its place, and a lease."""
        for ended in ending:
            await ended.wait()
        self._renew(self._answered)
        free.set()

    def _order(self, instance: Instance, vm: VM | None, action: Action) -> None:
        if vm is None:
            instance.remove()
            return
        if action == "fail":
            instance.fail("the controller believes that the VM runs, and it does not yet")
        elif action == "stop":
            instance.fail(vm.state.status_message)
        elif action in ("follow", "report"):
            instance.follow(vm)
            if not _knows(vm, instance.report()):
                instance.reported = None
                self._changed()

    def _instance(self, vm: VM, *, runs: bool = False) -> Instance:
        instance = Instance(
            vm,
            self._driver,
            changed=self._changed,
            send_events=self._send_events,
            clock=self._clock,
            runs=runs,
            outlives=not self._stop_vms_on_exit,
        )
        self.instances[instance.name] = instance
        return instance

    async def _tend(self, instance: Instance, task: Callable[[], Any]) -> None:
        try:
            await task()
        finally:
            del self.instances[instance.name]
            if instance.stopped:
                self._stopped.append(instance)


def pause_after(failures: int, chance: float) -> float:
    """Give the seconds before the next attempt, after so many in a row that came to nothing; `chance` is from 0 to 1.

    0: a session has broken, as those of a thousand other workers may have at the same moment.
    """
    if failures == 0:
        return LAST_PAUSE * chance
    return float(min(LAST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10)) * (1 - JITTER * chance))


def rests(vm: VM, state: LocalState) -> bool:
    """Whether a VM that does not run is where it was to come to rest."""
    return vm.resting or (vm.state.status == "running" and vm.spec.power_state == state)


def _status(one: Instance | VM | None) -> Local:
    if one is None:
        return "absent"
    return one.status if isinstance(one, Instance) else one.state.status


def _knows(vm: VM, report: Mapping[str, Any]) -> bool:
    """Whether the controller has what a report says."""
    state = vm.state
    return (
        state.status == report["status"]
        and state.status_message == report["status_message"]
        and state.observed_generation >= report["observedGeneration"]
        and vm.condition("running") is (report["conditions"][0]["state"] == "true")
    )


# ---- the command line ----------------------------------------------------------------------------------------------


def host_architecture() -> Arch:
    return "arm64" if platform.machine().lower() in ("arm64", "aarch64") else "amd64"


def host_resources(runtime: str) -> dict[str, int]:
    """What this host offers to VMs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2
    offered = {LOGICAL_CORES: os.cpu_count() or 1, MEMORY_MIB: memory}
    return offered if runtime == "vetu" else {TART_VMS: MACOS_VMS, **offered}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchard.worker", description="Run VMs on this host for an Orchard controller."
    )
    add = parser.add_argument
    add("url", metavar="CONTROLLER_URL", help="e.g. https://controller.example.com:6120")
    token = parser.add_mutually_exclusive_group()
    token.add_argument(
        "--bootstrap-token", metavar="T", help="what lets this worker in (visible to others on the host)"
    )
    token.add_argument("--bootstrap-token-stdin", action="store_true", help="read it from standard input")
    add("--name", metavar="N", help="name of this worker; default: the host's")
    add("--runtime", choices=("tart", "vetu", "synthetic"), default="tart",
        help="what runs VMs; synthetic ones are directories, for trying things out")  # fmt: skip
    add("--tart", metavar="PATH", help="the tart (or vetu) program; default: the one on PATH")
    add(
        "--resources",
        metavar="K=V,..",
        type=parse_resources,
        default={},
        help="resources to offer, instead of what is found",
    )
    add("--labels", metavar="K=V,..", type=parse_pairs, default={}, help="labels that VMs can ask for")
    add("--default-cpu", metavar="N", type=parse_count, default=DEFAULT_CPU, help="CPUs of a VM that names none")
    add(
        "--default-memory",
        metavar="MIB",
        type=parse_count,
        default=DEFAULT_MEMORY,
        help="memory of a VM that names none",
    )
    add("--no-pki", action="store_true", help="trust no host's CAs: a certificate must be in the bootstrap token")
    add("--stop-vms-on-exit", action="store_true",
        help="end the VMs when this worker is told to end; default: they run on, for the next one")  # fmt: skip
    add("--workers", metavar="N", type=parse_count, default=1, help="run N synthetic workers, NAME-1 to NAME-N")
    add("--debug", action="store_true", help="log more")
    add("--version", action="version", version=f"orchard {__version__}")
    return parser


def worker_name(options: argparse.Namespace) -> str:
    """The worker's name: as given, or the host's with what a name can't hold replaced."""
    return options.name or re.sub(r"[^A-Za-z0-9:_.-]", "-", socket.gethostname()) or "worker"


def bootstrap_token(parser: argparse.ArgumentParser, options: argparse.Namespace) -> BootstrapToken | None:
    """Read the bootstrap token, if there is one. Exits with 2 when it is none."""
    text = sys.stdin.readline() if options.bootstrap_token_stdin else options.bootstrap_token
    if text is None:
        return None
    try:
        return BootstrapToken.parse(text)
    except ValueError as error:
        parser.error(str(error))


def connect(parser: argparse.ArgumentParser, options: argparse.Namespace, token: BootstrapToken | None) -> Client:
    """Make the client that the command line describes, without connecting. Exits with 2 when it can't be."""
    certificate = token.certificate if token is not None else None
    if options.no_pki and certificate is None and options.url.lower().startswith("https:"):
        parser.error("--no-pki needs a bootstrap token with the controller's certificate in it")
    try:
        if token is None:
            return Client(options.url, answer_seconds=ANSWER_SECONDS)
        return Client(
            options.url,
            account=token.account,
            token=token.token,
            certificate=certificate,
            answer_seconds=ANSWER_SECONDS,
        )
    except ValueError as error:
        parser.error(str(error))


async def work(options: argparse.Namespace, client: Client) -> None:
    """Run the workers of a command line until cancelled. Raises RefusedError, DriverError."""
    name, host = worker_name(options), await machine_id()
    synthetic = options.runtime == "synthetic"
    runtime: Runtime = "vetu" if options.runtime == "vetu" else "tart"
    names = [name] if options.workers == 1 else [f"{name}-{number}" for number in range(1, options.workers + 1)]
    if not synthetic and platform.system() == "Darwin" and (warning := check_dhcp_lease()):
        _logger.warning(warning)
    async with client, trio.open_nursery() as nursery:
        for each in names:
            driver: Driver = (
                SyntheticDriver(orchard_home() / "synthetic" / name / each)
                if synthetic
                else TartDriver(find_tart(options.tart, runtime), orchard_home() / runtime, vetu=runtime == "vetu")
            )
            identity = Identity(
                name=each,
                arch="arm64" if synthetic else host_architecture(),
                runtime=runtime,
                machine_id=host,
                resources={**host_resources(runtime), **options.resources},
                labels=options.labels,
                default_cpu=options.default_cpu,
                default_memory=options.default_memory,
            )
            # A synthetic VM is known to its driver alone, and so to this process.
            stop_vms = synthetic or options.stop_vms_on_exit
            nursery.start_soon(WorkerService(identity, client, driver, stop_vms_on_exit=stop_vms).run)


async def hold_host_and_work(options: argparse.Namespace, client: Client) -> None:
    """Work until SIGTERM or SIGINT. Raises LockError, RefusedError, DriverError."""
    synthetic = options.runtime == "synthetic"
    if not synthetic:
        find_tart(options.tart, options.runtime)
    # Two workers with the same VMs in front of them would delete each other's.
    place = orchard_home() / "synthetic" / worker_name(options) if synthetic else orchard_home()
    with lock_directory(place, WORKER_LOCK_FILE):
        await run_until_signal(partial(work, options, client))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    parser = arguments()
    options = parser.parse_args(argv)
    if options.workers > 1 and options.runtime != "synthetic":
        parser.error("--workers is for --runtime synthetic: one host's VMs belong to one worker")
    if not NAME.fullmatch(worker_name(options)):
        parser.error(f'--name "{options.name}": expected letters, digits and : _ . -')
    client = connect(parser, options, bootstrap_token(parser, options))
    failures = {RefusedError: EXIT_REFUSED, LockError: 1, DriverError: 1}
    return run_program("orchard worker", partial(hold_host_and_work, options, client), failures, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
