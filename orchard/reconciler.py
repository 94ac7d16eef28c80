"""The VMs on a worker's host: made what the controller wants, adopted from an earlier worker, and reported.

`Reconciler.sync` compares the VMs that the controller assigned to this worker with the instances here; SYNC_ACTIONS has
the action for each pair of states. `sync` only starts actions and does not wait for them. Instances that have to end
are told so first, and new ones start when those have ended, because the scheduler has reassigned their slots already.

While the controller's state is older than one that it has shown (worker_memory.py), nothing is adopted, started,
stopped or deleted. VMs that run keep their leases, since the controller places nothing until that state is accepted.

One VM's task is `vm.instance.Instance`. The session in which all this happens is in worker.py; the tasks of VMs are in
a nursery that outlives it.
"""

from __future__ import annotations

import datetime
import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import trio

from orchard.client import Client, ClientError, ConnectError, ResponseError
from orchard.cluster import VM_READY, VM_RESTART
from orchard.codec import encode, shown
from orchard.heartbeat import Lease, backoff_seconds
from orchard.leftovers import Leftovers, vm_name_of
from orchard.nursery import Wakeup, growing_pause
from orchard.schema import LOCAL_PREFIX, VM, Event, HostDirPolicy, Worker
from orchard.slots import Slots
from orchard.vm.driver import Driver, DriverError, LocalState, LocalVM, Trouble
from orchard.vm.images import Transfer
from orchard.vm.instance import Instance, InstanceHost
from orchard.worker_memory import ClusterMemory

# Between two syncs for which nothing asked, in case a notification was lost.
_SYNC_SECONDS = 5.0
# Between two attempts to list the local VMs: the first and the longest pause.
_LIST_AGAIN_SECONDS, _LAST_LIST_SECONDS = 1.0, 15.0
# VMs that a message names.
_MAX_NAMED = 3
VM_LOST = "lost: the worker was restarted, and the VM does not run any more"

SyncState = Literal["absent", "pending", "running", "failed"]
SyncAction = Literal["none", "create", "lost", "tell ended", "report", "follow", "stop", "fail", "remove"]

# (state here, state at the controller) -> action
SYNC_ACTIONS: Mapping[tuple[SyncState, SyncState], SyncAction] = {
    ("absent", "absent"): "none",
    ("absent", "pending"): "create",
    ("absent", "running"): "lost",
    # It failed before anything was done for it here, or it has ended here and an earlier worker did not report that.
    ("absent", "failed"): "tell ended",
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
    ("failed", "failed"): "report",
}

_logger = logging.getLogger("orchard.worker")


class Reconciler:
    """The VMs on this host: it makes them what the controller wants, and reports them.

    `worker` is the worker's name. `instances` are keyed by local names. Set `sync_due` to ask for a `sync`.
    """

    def __init__(
        self,
        worker: Worker,
        client: Client,
        driver: Driver,
        lease: Lease,
        *,
        memory: ClusterMemory,
        note_trouble: Callable[[Trouble, str, str], None],
        transfer: Transfer,
        stop_vms_on_exit: bool,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        """`worker` is what this worker registers with; for the other arguments see `WorkerService`."""
        self.instances: dict[str, Instance] = {}
        self.sync_due = Wakeup()
        # Set when the VMs of an earlier worker are dealt with.
        self.adopted = trio.Event()
        self.worker = worker.name
        self._client = client
        self._driver = driver
        self._lease = lease
        self._memory = memory
        self._chance = chance
        # Of the controller.
        self._capabilities: Collection[str] = ()
        # When the controller first saw this worker.
        self._created_at: datetime.datetime | None = None
        self._report_due = Wakeup()
        self._instance_host = InstanceHost(
            worker=worker.name,
            driver=driver,
            changed=self._report_due.set,
            ended=self._forget,
            send_events=self._send_events,
            note_trouble=note_trouble,
            fetch_policies=self._fetch_policies,
            clock=clock,
            outlives=not stop_vms_on_exit,
            transfer=transfer,
        )
        self._slots = Slots(worker.resources)
        # Local names of VMs that new ones may wait for.
        self._watched: set[str] = set()
        self._leftovers = Leftovers(worker, client, driver, note_trouble, self.sync_due.set)

    def leave_vms(self) -> None:
        """Let running VMs run on when this worker ends."""
        self._instance_host.outlives = True

    def begin_session(self, capabilities: Collection[str], created_at: datetime.datetime | None) -> None:
        """Note what the controller can do, and when it first saw this worker."""
        self._capabilities, self._created_at = capabilities, created_at

    async def _fetch_policies(self) -> Sequence[HostDirPolicy] | None:
        """Return the cluster's hostDirPolicies, once the controller answers. None: it does not tell them."""
        while True:
            with suppress(ClientError):
                info = await self._client.info()
                # Controllers that have no clusterId do not tell their policies either.
                return info.host_dir_policies if info.cluster_id else None
            await trio.sleep(_SYNC_SECONDS)

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
        sent = report
        if VM_READY not in self._capabilities:
            # An older controller warns of conditions and fields that it does not know.
            sent = {name: value for name, value in report.items() if not name.startswith("startup")}
            sent["conditions"] = [one for one in report["conditions"] if one["type"] != "ready"]
        try:
            await self._client.vms.report(instance.vm.name, sent)
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

    async def settle(self, nursery: trio.Nursery) -> None:
        """Deal with the VMs that an earlier worker left, and sync. Raises RefusedError, ClientError.

        While the local VMs cannot be listed, it tries again, and says so in the messages of VMs that wait here.
        """
        while self._memory.is_restored:
            await self._hold_back()
            await trio.sleep(_SYNC_SECONDS)
        for failures in itertools.count(1):
            if self.adopted.is_set():
                break
            try:
                await self._adopt(nursery)
            except DriverError as error:
                _logger.error("cannot list the VMs on this host, retrying", extra={"reason": str(error)})
                self._note_trouble("list", "", str(error))
                await self._explain(str(error))
                await trio.sleep(growing_pause(failures, _LIST_AGAIN_SECONDS, _LAST_LIST_SECONDS))
        self._note_trouble("list", "", "")
        await self.sync(nursery)

    def _note_trouble(self, kind: Trouble, vm: str, message: str) -> None:
        self._instance_host.note_trouble(kind, vm, message)

    async def _explain(self, reason: str) -> None:
        """Report to each VM that waits on this worker why it does. Raises ClientError."""
        for vm in (await self._fetch_wanted()).values():
            if vm.state.status == "pending":
                message = f"waiting: its worker cannot list its VMs: {reason}"
                report = {"uid": vm.uid, "restart_count": vm.state.restart_count, "status": "pending"}
                report |= {"status_message": message, "conditions": [{"type": "running", "state": "false"}]}
                with suppress(ResponseError):
                    await self._client.vms.report(vm.name, report)

    async def _hold_back(self) -> None:
        """Change no VM, and check whether an operator has accepted the controller's state. Raises ClientError."""
        local_vms: list[LocalVM] = []
        try:
            local_vms = await self._list_own()
        except DriverError as error:
            self._note_trouble("list", "", str(error))
        wanted = await self._fetch_wanted()
        unknown = sorted(local.name for local in local_vms if local.name not in wanted)
        message = f"not known to the controller's restored state: {', '.join(unknown)}" if unknown else ""
        self._note_trouble("unknown-vms", "", message)
        self._lease.set_wanted({local.name for local in local_vms} | self.instances.keys())
        info = await self._client.info()
        if info.cluster_id != self._memory.cluster_id:
            _, revision = await self._client.vms.list_with_revision(worker=self.worker)
            self._memory.observe(info.cluster_id, revision)
            self._note_trouble("unknown-vms", "", "")

    async def _list_own(self) -> list[LocalVM]:
        """Return the local VMs that Orchard manages. Raises DriverError."""
        return [local for local in await self._driver.list_vms() if local.name.startswith(LOCAL_PREFIX)]

    async def _adopt(self, nursery: trio.Nursery) -> None:
        """Deal with the VMs that an earlier worker left: adopt running ones, keep those at rest, remove all others.

        Raises RefusedError, DriverError, ClientError.
        """
        # First, since leases do not depend on what is listed.
        wanted = await self._fetch_wanted()
        self._lease.set_wanted(_leasable(wanted))
        await self._driver.recover()
        local_vms = await self._list_own()
        wanted = await self._fetch_wanted()
        kept: list[tuple[LocalVM, VM]] = []
        unwanted: list[LocalVM] = []
        for local in local_vms:
            vm = wanted.get(local.name)
            # A pending VM that does not run is incomplete, and will be made again.
            if vm is not None and (vm.state.status != "pending" or local.state == "running"):
                kept.append((local, vm))
            elif vm is not None or not await self._leftovers.belongs_elsewhere(local):
                unwanted.append(local)
        # No checkpoint from here on: if the session ends before, the next one begins with `_adopt` again.
        for local in unwanted:
            self._leftovers.remove(local, nursery)
        for local, vm in kept:
            self._adopt_one(local, vm, nursery)
        self.adopted.set()

    def _adopt_one(self, local: LocalVM, vm: VM, nursery: trio.Nursery) -> None:
        runs = local.state == "running"
        instance = self._new_instance(vm, local.state)
        if vm.state.status == "failed":
            instance.fail(vm.state.status_message, orderly=bool(vm.state.end_request))
        elif not runs and not is_at_rest(vm, local.state):
            instance.fail(VM_LOST)
        message = "adopted running VM" if runs else "found VM at rest"
        _logger.info(message, extra={"vm": vm.name, "state": local.state})
        nursery.start_soon(instance.tend)

    def abandon_incomplete(self) -> None:
        """Remove VMs that have not run yet: another worker has this one's name, and may create them, too."""
        for instance in self.instances.values():
            if not instance.state.has_guest and instance.state.observed is None:
                instance.remove()

    # -- sync

    async def keep_in_sync(self, nursery: trio.Nursery) -> None:
        """Sync whenever `sync_due` is set, and now and then. Tasks of VMs are started in the nursery.

        Raises ClientError.
        """
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
        self._lease.set_wanted(_leasable(wanted) | await self._deleted_and_shut_down())
        for name, ended in given_up.items():
            if name not in self._watched:
                self._watched.add(name)
                nursery.start_soon(self._wait_end, name, ended)
        names = sorted(vm_name_of(name) for name in given_up)[:_MAX_NAMED]
        waiting_for = f"waiting for {', '.join(map(shown, names))} to end"
        for name, action in actions.items():
            # A VM that is half-made from before is removed first.
            if action == "create" and name not in self._leftovers:
                instance = self._new_instance(wanted[name])
                nursery.start_soon(instance.tend, self._slots.add(name, instance.vm.spec.resources), waiting_for)
            elif action == "lost":
                instance = self._new_instance(wanted[name])
                instance.fail(VM_LOST)
                nursery.start_soon(instance.tend)
        self._grant()
        for name, action in actions.items():
            if action == "tell ended" and name not in self._leftovers:
                await self._tell_ended(wanted[name])

    async def _deleted_and_shut_down(self) -> set[str]:
        """Return the local names of VMs whose shutdown scripts run and that the controller has deleted. Raises ClientError.

        Such a VM is started nowhere else, so its script need not end with its lease. That a VM is not assigned to this
        worker any more does not mean that it was deleted.
        """
        found: set[str] = set()
        for name, instance in list(self.instances.items()):
            if instance.state.phase == "finishing" and instance.ending:
                try:
                    if (await self._client.vms.get(instance.vm.name)).uid != instance.vm.uid:
                        found.add(name)
                except ResponseError as error:
                    if error.status != 404:
                        raise
                    found.add(name)
        return found

    async def _wait_end(self, name: str, ended: trio.Event) -> None:
        await ended.wait()
        self._watched.discard(name)
        self._grant()

    def _grant(self) -> None:
        """Let new VMs begin whose resources are free on this host."""
        for name, instance in self.instances.items():
            if instance.ending:
                self._slots.remove(name)
        held = [
            instance.vm.spec.resources
            for name, instance in self.instances.items()
            if instance.holds_resources and name not in self._slots
        ]
        self._slots.grant([*held, *self._leftovers.held()])

    async def _tell_ended(self, vm: VM) -> None:
        """Report that a failed VM, which the controller wants to restart, does not run here. Raises ClientError.

        Not for a VM that was assigned to an earlier worker of this name, on whose host it may run.
        """
        state = vm.state
        mine = (
            state.scheduled_at is not None and self._created_at is not None and state.scheduled_at >= self._created_at
        )
        if VM_RESTART in self._capabilities and state.ended_at is None and mine:
            report = {"uid": vm.uid, "restart_count": state.restart_count, "status": "failed"}
            report |= {"status_message": state.status_message, "conditions": [{"type": "running", "state": "false"}]}
            with suppress(ResponseError):
                await self._client.vms.report(vm.name, report)

    async def _fetch_wanted(self) -> dict[str, VM]:
        """Return the VMs that are assigned to this worker, by their local names.

        Raises ClientError, also when the controller was restored from an older state since the last time.
        """
        was_restored = self._memory.is_restored
        vms, revision = await self._client.vms.list_with_revision(worker=self.worker)
        self._memory.observe(self._memory.cluster_id, revision)
        if self._memory.is_restored and not was_restored:
            raise ClientError("the controller's state is older than one that it has shown")
        return {vm.tart_name: vm for vm in vms}

    def _given_up(self, wanted: Mapping[str, VM]) -> dict[str, trio.Event]:
        """Return the VMs that still run here and that the controller has given up, each with the event of its end.

        The scheduler has already reassigned these VMs' slots. A VM that failed on its own keeps its slot until the
        failure is reported, so it is not among them.
        """
        ending = {
            name: instance.ended
            for name, instance in self.instances.items()
            if instance.ending and _sync_state(wanted.get(name)) in ("absent", "failed")
        }
        return {**ending, **self._leftovers.running}

    def _instruct(self, instance: Instance, vm: VM | None, action: SyncAction) -> None:
        if vm is None:
            instance.remove()
        elif action == "fail":
            instance.fail("the controller has the VM as running, but it has not started on this worker")
        elif action == "stop":
            instance.fail(vm.state.status_message, orderly=bool(vm.state.end_request))
        elif action in ("follow", "report"):
            instance.follow(vm)
            if not _has_report(vm, instance.report(), self._capabilities):
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


def _leasable(wanted: Mapping[str, VM]) -> set[str]:
    """Return the local names of the VMs that the controller has not given up."""
    return {name for name, vm in wanted.items() if vm.state.status != "failed"}


def is_at_rest(vm: VM, state: LocalState) -> bool:
    """Return whether a VM that does not run has the state that its user wanted."""
    return vm.resting or (vm.state.status == "running" and vm.spec.power_state == state)


def _sync_state(vm: Instance | VM | None) -> SyncState:
    return "absent" if vm is None else vm.state.status


def _has_report(vm: VM, report: Mapping[str, Any], capabilities: Collection[str]) -> bool:
    """Return whether a controller with these capabilities has what a report says in its state of a VM."""
    state = vm.state
    if report["status"] == state.status == "failed":
        # The first reason stays, so the messages may differ.
        return state.ended_at is not None or VM_RESTART not in capabilities
    known = {one["type"]: one["state"] == "true" for one in report["conditions"]}
    return (
        state.status == report["status"]
        and state.status_message == report["status_message"]
        and state.observed_generation >= report["observedGeneration"]
        and vm.condition("running") is known["running"]
        and (VM_READY not in capabilities or vm.condition("ready") is known["ready"])
    )
