"""The reconciler: makes the VMs on a host what the controller wants, and adopts those of an earlier worker.

`Reconciler.sync` compares the VMs that the controller assigned to this worker with the instances here; SYNC_ACTIONS has
the action for each pair of states. `sync` only starts actions and does not wait for them. Instances that have to end
are told so first, and new ones start when those have ended, because the scheduler has reassigned their slots already.

While the controller's state is older than one that it has shown (memory.py), nothing is adopted, started,
stopped or deleted. VMs that run keep their leases, since the controller places nothing until that state is accepted.

One VM's task is `vm.instance.Instance`, and reports.py tells the controller of it. The session in which all
this happens is in worker.py; the tasks of VMs are in a nursery that outlives it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

import trio

from orchard.base.nursery import Wakeup, growing_pause
from orchard.client import Client, ClientError, ResponseError
from orchard.codec import shown
from orchard.schema import LOCAL_PREFIX, VM, HostDirPolicy, Worker
from orchard.vm.driver import Driver, DriverError, LocalState, LocalVM
from orchard.vm.instance import Instance, InstanceHost
from orchard.work.heartbeat import Heartbeats, Lease
from orchard.work.leftovers import Leftovers, vm_name_of
from orchard.work.memory import ClusterMemory
from orchard.work.reports import VMReports
from orchard.work.slots import Slots

# Interval of syncs without a notification, which may have been lost.
_SYNC_SECONDS = 5.0
# The first and the longest pause between attempts to list the local VMs.
_LIST_AGAIN_SECONDS, _LAST_LIST_SECONDS = 1.0, 15.0
# The most VMs that a message names.
_MAX_NAMED = 3
VM_LOST = "lost: the worker was restarted, and the VM does not run any more"

SyncState = Literal["absent", "pending", "running", "failed"]
SyncAction = Literal["none", "create", "lost", "tell ended", "report", "follow", "stop", "fail", "remove"]

# (state here, state at the controller) -> action
SYNC_ACTIONS: Mapping[tuple[SyncState, SyncState], SyncAction] = {
    ("absent", "absent"): "none",
    ("absent", "pending"): "create",
    ("absent", "running"): "lost",
    # The VM failed before it existed here, or it has ended here and an earlier worker did not report that.
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
    """The VMs on this host: it makes them what the controller wants.

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
        heartbeats: Heartbeats,
        stop_vms_on_exit: bool,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        """`worker` is what this worker registers with; for the other arguments see `WorkerService`."""
        self.instances: dict[str, Instance] = {}
        self.reports = VMReports(client, self.instances, chance)
        self.sync_due = Wakeup()
        # Set when the VMs of an earlier worker are adopted or being removed.
        self.adopted = trio.Event()
        self.worker = worker.name
        self._client = client
        self._driver = driver
        self._lease = lease
        self._memory = memory
        self._health = heartbeats.health
        self._instance_host = InstanceHost(
            worker=worker.name,
            driver=driver,
            changed=self.reports.due.set,
            freed=self._free,
            task_ended=self._forget,
            send_events=self.reports.send_events,
            note_trouble=heartbeats.health.note,
            fetch_policies=self._fetch_policies,
            clock=clock,
            images=heartbeats.images,
            outlives=not stop_vms_on_exit,
        )
        self._slots = Slots(worker.resources)
        self._leftovers = Leftovers(worker, client, driver, heartbeats.health.note, self._free, self.sync_due.set)

    def leave_vms(self) -> None:
        """Let running VMs run on when this worker ends."""
        self._instance_host.outlives = True

    async def _fetch_policies(self) -> Sequence[HostDirPolicy] | None:
        """Return the cluster's hostDirPolicies, once the controller answers. None: it does not tell them."""
        while True:
            with suppress(ClientError):
                info = await self._client.info()
                # Controllers that have no clusterId do not tell their policies either.
                return info.host_dir_policies if info.cluster_id else None
            await trio.sleep(_SYNC_SECONDS)

    # -- VMs of an earlier worker

    async def settle(self, nursery: trio.Nursery) -> None:
        """Adopt or remove the VMs that an earlier worker left, and sync. Raises RefusedError, ClientError.

        While the local VMs cannot be listed, it retries, and gives that as the reason in the messages of VMs that wait
        here.
        """
        while self._memory.is_restored and not await self._hold_back():
            with trio.move_on_after(_SYNC_SECONDS):
                await self.sync_due.wait()
        for failures in itertools.count(1):
            if self.adopted.is_set():
                break
            try:
                await self._adopt(nursery)
            except DriverError as error:
                _logger.error("cannot list the VMs on this host, retrying", extra={"reason": str(error)})
                self._health.note("list", message=str(error))
                await self.reports.explain((await self._fetch_wanted()).values(), str(error))
                await trio.sleep(growing_pause(failures, _LIST_AGAIN_SECONDS, _LAST_LIST_SECONDS))
        self._health.note("list")
        await self.sync(nursery)

    async def _hold_back(self) -> bool:
        """Change no VM. Return whether an operator has accepted the controller's state. Raises ClientError."""
        local_vms: list[LocalVM] = []
        try:
            local_vms = await self._list_own()
        except DriverError as error:
            self._health.note("list", message=str(error))
        wanted = await self._fetch_wanted()
        unknown = sorted(local.name for local in local_vms if local.name not in wanted)
        message = f"not known to the controller's restored state: {', '.join(unknown)}" if unknown else ""
        self._health.note("unknown-vms", message=message)
        self._lease.set_wanted({local.name for local in local_vms} | self.instances.keys())
        info = await self._client.info()
        if info.cluster_id == self._memory.cluster_id:
            return False
        _, revision = await self._client.vms.list_with_revision(worker=self.worker)
        self._memory.observe(info.cluster_id, revision)
        self._health.note("unknown-vms")
        return True

    async def _list_own(self) -> list[LocalVM]:
        """Return the local VMs that Orchard manages. Raises DriverError."""
        return [local for local in await self._driver.list_vms() if local.name.startswith(LOCAL_PREFIX)]

    async def _adopt(self, nursery: trio.Nursery) -> None:
        """Adopt the running VMs that an earlier worker left, keep those at rest, and remove all others.

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
        self._lease.set_wanted(_leasable(wanted) | await self._deleted_and_shut_down())
        waiting: dict[Instance, trio.Event] = {}
        for name, action in actions.items():
            # A VM that is half-made from before is removed first.
            if action == "lost" or (action == "create" and name not in self._leftovers):
                instance, needed = self._new_instance(wanted[name]), wanted[name].spec.resources
                if why := VM_LOST if action == "lost" else self._slots.why_never(needed):
                    instance.fail(why)
                    nursery.start_soon(instance.tend)
                else:
                    waiting[instance] = self._slots.add(name, needed)
        self._grant()
        for instance, slots_free in waiting.items():
            nursery.start_soon(instance.tend, slots_free, "" if slots_free.is_set() else self._describe_wait(wanted))
        for name, action in actions.items():
            if action == "tell ended" and name not in self._leftovers:
                await self.reports.tell_ended(wanted[name])

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

    def _free(self, name: str) -> None:
        """Let new VMs begin in the place of one that has ended or, if it was new itself, will not begin."""
        self._slots.remove(name)
        self._grant()

    def _grant(self) -> None:
        """Let new VMs begin whose resources are free on this host."""
        held = [self.instances[name].vm.spec.resources for name in self._holding()]
        self._slots.grant([*held, *self._leftovers.held()])

    def _holding(self) -> list[str]:
        """Return the local names of the VMs that hold resources of this host."""
        return [
            name for name, instance in self.instances.items() if instance.holds_resources and name not in self._slots
        ]

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

    def _describe_wait(self, wanted: Mapping[str, VM]) -> str:
        """Return what a new VM waits for: VMs that still run here and that the controller has given up.

        The scheduler has already reassigned their slots. A VM that failed on its own keeps its slot until the failure
        is reported, so it is not among them.
        """
        ending = [
            name
            for name, instance in self.instances.items()
            if instance.ending and _sync_state(wanted.get(name)) in ("absent", "failed")
        ]
        # A worker that was restarted may offer less than the scheduler counted on, so that others hold what is needed.
        holding = [*ending, *self._leftovers.running] or self._holding()
        names = sorted(map(vm_name_of, holding))[:_MAX_NAMED]
        return f"waiting for {', '.join(map(shown, names))} to end"

    def _instruct(self, instance: Instance, vm: VM | None, action: SyncAction) -> None:
        if vm is None:
            instance.remove()
        elif action == "fail":
            instance.fail("the controller has the VM as running, but it has not started on this worker")
        elif action == "stop":
            instance.fail(vm.state.status_message, orderly=bool(vm.state.end_request))
        elif action in ("follow", "report"):
            instance.follow(vm)
            self.reports.review(instance)

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
