"""The VMs on a worker's host: made what the controller wants, adopted from an earlier worker, and reported.

`Reconciler.sync` compares the VMs that the controller assigned to this worker with the instances here; SYNC_ACTIONS has
the action for each pair of states. `sync` only starts actions and does not wait for them. Instances that have to end are
told so first, and new ones start when those have ended, because the scheduler has reassigned their slots already.

One VM's task is `vm.instance.Instance`. The session in which all this happens is in worker.py; the tasks of VMs are in a
nursery that outlives it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import trio

from orchard.client import Client, ClientError, ConnectError, ResponseError
from orchard.codec import encode
from orchard.heartbeat import Lease, backoff_seconds
from orchard.nursery import Wakeup
from orchard.schema import LOCAL_PREFIX, VM, Event
from orchard.vm.driver import Driver, DriverError, LocalState, LocalVM, NoSuchVM, NotRunning
from orchard.vm.instance import Instance, InstanceHost

# Between two attempts to remove a leftover VM.
_REMOVE_AGAIN_SECONDS = 10.0
# Between two syncs for which nothing asked, in case a notification was lost.
_SYNC_SECONDS = 5.0
VM_LOST = "lost: the worker was restarted, and the VM does not run any more"

SyncState = Literal["absent", "pending", "running", "failed"]
SyncAction = Literal["none", "create", "lost", "report", "follow", "stop", "fail", "remove"]

# (state here, state at the controller) -> action
SYNC_ACTIONS: Mapping[tuple[SyncState, SyncState], SyncAction] = {
    ("absent", "absent"): "none",
    ("absent", "pending"): "create",
    ("absent", "running"): "lost",
    ("absent", "failed"): "none",
    ("pending", "absent"): "remove",
    ("pending", "pending"): "report",
    # Only this worker reports that its VM runs, and it has not: its records and the controller's contradict each other.
    ("pending", "running"): "fail",
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


class Reconciler:
    """The VMs on this host: it makes them what the controller wants, and reports them.

    `instances` are keyed by local names. Set `sync_due` to ask for a `sync`.
    """

    def __init__(
        self,
        worker: str,
        client: Client,
        driver: Driver,
        lease: Lease,
        *,
        stop_vms_on_exit: bool,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        """`worker` is the worker's name; for `clock` and `chance` see `WorkerService`."""
        self.instances: dict[str, Instance] = {}
        self.sync_due = Wakeup()
        # Whether the VMs of an earlier worker are dealt with.
        self.has_adopted = False
        self._worker = worker
        self._client = client
        self._driver = driver
        self._lease = lease
        self._chance = chance
        self._report_due = Wakeup()
        self._instance_host = InstanceHost(
            driver, self._report_due.set, self._forget, self._send_events, clock, outlives=not stop_vms_on_exit
        )
        # One event for each leftover VM that runs and could not be ended yet.
        self._leftovers: list[trio.Event] = []

    # -- reports

    async def send_reports(self) -> None:
        """Report each instance to the controller as soon as it changes. Raises ClientError."""
        while True:
            for instance in list(self.instances.values()):
                report = instance.report()
                if report != instance.reported:
                    await self._send_report(instance, report)
            await self._report_due.wait()

    async def _send_report(self, instance: Instance, report: dict[str, Any]) -> None:
        try:
            await self._client.vms.report(instance.vm.name, report)
        except ResponseError as error:
            if error.status >= 500:
                raise
            # With 404 the VM was deleted or is another instance now, as the next sync will find.
            if error.status != 404:
                extra = {"vm": instance.vm.name, "reason": error.message}
                _logger.error("controller rejected a VM report", extra=extra)
        instance.reported = report

    async def report_stopped(self) -> None:
        """Report the VMs that ended with this worker, if the controller can be reached."""
        with suppress(ClientError):
            for instance in self.instances.values():
                if instance.has_unreported_failure:
                    await self._send_report(instance, instance.report())

    async def _send_events(self, vm: VM, events: Sequence[Event]) -> None:
        """Send a script's output, and retry while the controller is away or its disk is full.

        The controller may store the output twice after a lost answer, but it gets all output unless the VM is deleted
        or the controller rejects the output.
        """
        for failures in itertools.count(1):
            try:
                await self._client.vms.append_events(vm.name, [encode(event) for event in events], uid=vm.uid)
                return
            except ConnectError:
                pass
            except ResponseError as error:
                if error.status < 500:
                    if error.status != 404:
                        extra = {"vm": vm.name, "reason": error.message}
                        _logger.error("controller rejected script output", extra=extra)
                    return
            await trio.sleep(backoff_seconds(failures, self._chance()))

    # -- VMs of an earlier worker

    async def adopt(self, nursery: trio.Nursery) -> None:
        """Deal with the VMs that an earlier worker left: adopt running ones, keep those at rest, delete all others.

        Only VMs with Orchard's prefix are touched. Raises DriverError, ClientError.
        """
        try:
            await self._driver.recover()
            local_vms = [local for local in await self._driver.list_vms() if local.name.startswith(LOCAL_PREFIX)]
        except DriverError as error:
            raise DriverError(f"cannot list the VMs on this host: {error}") from error
        wanted = await self._fetch_wanted()
        kept: list[tuple[LocalVM, VM]] = []
        async with trio.open_nursery() as removing:
            for local in local_vms:
                vm = wanted.get(local.name)
                # A pending VM that does not run is incomplete, and will be made again.
                if vm is None or (vm.state.status == "pending" and local.state != "running"):
                    removing.start_soon(self._remove_leftover, local, nursery)
                else:
                    kept.append((local, vm))
        # No checkpoint from here on: if the session ends before, the next one begins with `adopt` again.
        for local, vm in kept:
            self._adopt_one(local, vm, nursery)
        self.has_adopted = True

    def _adopt_one(self, local: LocalVM, vm: VM, nursery: trio.Nursery) -> None:
        runs = local.state == "running"
        instance = self._new_instance(vm, local.state)
        if vm.state.status == "failed":
            instance.fail(vm.state.status_message)
        elif not runs and not is_at_rest(vm, local.state):
            instance.fail(VM_LOST)
        message = "adopted running VM" if runs else "found VM at rest"
        _logger.info(message, extra={"vm": vm.name, "state": local.state})
        nursery.start_soon(instance.tend)

    async def _remove_leftover(self, local: LocalVM, nursery: trio.Nursery) -> None:
        """Remove a VM that the controller does not know; if that fails, go on trying in a task of the nursery."""
        if not await self._try_remove(local.name):
            gone = trio.Event()
            if local.state == "running":
                self._leftovers.append(gone)
            nursery.start_soon(self._keep_removing, local.name, gone)

    async def _keep_removing(self, name: str, gone: trio.Event) -> None:
        while True:
            await trio.sleep(_REMOVE_AGAIN_SECONDS)
            # If the controller wants a VM of this name by now, that VM's instance takes care of it.
            if name not in self.instances and await self._try_remove(name):
                gone.set()
                return

    async def _try_remove(self, name: str) -> bool:
        try:
            with suppress(NotRunning):
                await self._driver.stop(name)
            await self._driver.delete(name)
        except NoSuchVM:
            return True
        except DriverError as error:
            _logger.error("cannot remove leftover VM", extra={"vm": name, "reason": str(error)})
            return False
        _logger.info("removed leftover VM", extra={"vm": name})
        return True

    # -- sync

    async def keep_in_sync(self, nursery: trio.Nursery) -> None:
        """Sync now, whenever `sync_due` is set, and now and then. Tasks of VMs are started in the nursery.

        Raises ClientError.
        """
        await self.sync(nursery)
        # Until this sync it was unknown which VMs the controller had given up.
        self._lease.renew()
        while True:
            with trio.move_on_after(_SYNC_SECONDS):
                await self.sync_due.wait()
            await self.sync(nursery)

    async def sync(self, nursery: trio.Nursery) -> None:
        """Compare the controller's VMs with the instances, and start what SYNC_ACTIONS says. Raises ClientError."""
        wanted = await self._fetch_wanted()
        actions = {
            name: SYNC_ACTIONS[_sync_state(self.instances.get(name)), _sync_state(wanted.get(name))]
            for name in {**self.instances, **wanted}
        }
        for name, action in actions.items():
            if name in self.instances:
                self._instruct(self.instances[name], wanted.get(name), action)
        given_up = self._given_up(wanted)
        self._lease.set_given_up(given_up)
        slots_free = trio.Event()
        if not given_up:
            slots_free.set()
        elif "create" in actions.values():
            nursery.start_soon(self._free_slots, given_up, slots_free)
        for name, action in actions.items():
            if action == "create":
                instance = self._new_instance(wanted[name])
                nursery.start_soon(instance.tend, slots_free)
            elif action == "lost":
                instance = self._new_instance(wanted[name])
                instance.fail(VM_LOST)
                nursery.start_soon(instance.tend)

    async def _fetch_wanted(self) -> dict[str, VM]:
        """Return the VMs that are assigned to this worker, by their local names. Raises ClientError."""
        return {vm.tart_name: vm for vm in await self._client.vms.list(worker=self._worker)}

    def _given_up(self, wanted: Mapping[str, VM]) -> list[trio.Event]:
        """Return an event for each VM that still uses this host and that the controller has given up.

        The scheduler has already reassigned these VMs' slots. A VM that failed on its own keeps its slot until the
        failure is reported, so it is not among them.
        """
        self._leftovers = [gone for gone in self._leftovers if not gone.is_set()]
        ending = [
            instance.ended
            for name, instance in self.instances.items()
            if instance.ending and _sync_state(wanted.get(name)) in ("absent", "failed")
        ]
        return ending + self._leftovers

    async def _free_slots(self, given_up: Sequence[trio.Event], slots_free: trio.Event) -> None:
        """Wait for the end of VMs that the controller has given up. Then renew the lease, and let new VMs start."""
        for ended in given_up:
            await ended.wait()
        self._lease.renew()
        slots_free.set()

    def _instruct(self, instance: Instance, vm: VM | None, action: SyncAction) -> None:
        if vm is None:
            instance.remove()
        elif action == "fail":
            instance.fail("the controller has the VM as running, but it has not started on this worker")
        elif action == "stop":
            instance.fail(vm.state.status_message)
        elif action in ("follow", "report"):
            instance.follow(vm)
            if not _has_report(vm, instance.report()):
                instance.reported = None
                self._report_due.set()

    def _new_instance(self, vm: VM, found: LocalState | None = None) -> Instance:
        instance = Instance(vm, self._instance_host, found=found)
        self.instances[instance.name] = instance
        return instance

    def _forget(self, instance: Instance) -> None:
        """Drop an instance whose task has ended, unless `report_stopped` has to report that it ended with the worker."""
        if not instance.has_unreported_failure:
            del self.instances[instance.name]


def is_at_rest(vm: VM, state: LocalState) -> bool:
    """Return whether a VM that does not run has the state that its user wanted."""
    return vm.resting or (vm.state.status == "running" and vm.spec.power_state == state)


def _sync_state(vm: Instance | VM | None) -> SyncState:
    return "absent" if vm is None else vm.state.status


def _has_report(vm: VM, report: Mapping[str, Any]) -> bool:
    """Return whether the controller's state of a VM contains what a report says."""
    state = vm.state
    return (
        state.status == report["status"]
        and state.status_message == report["status_message"]
        and state.observed_generation >= report["observedGeneration"]
        and vm.condition("running") is (report["conditions"][0]["state"] == "true")
    )
