"""A worker's reports about its VMs: their states, the output of their scripts, and VMs that have ended.

`VMReports.run` reports each instance as soon as it changes. The reconciler says when the controller has to be told
again, or of a VM that has no instance here.
"""

from __future__ import annotations

import datetime
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import trio

from orchard.base.nursery import Wakeup
from orchard.client import Client, ClientError, ConnectError, ResponseError
from orchard.resources.cluster import VM_READY, VM_RESTART
from orchard.resources.json_text import encode
from orchard.schema import VM, Event, Status
from orchard.vm.instance import Instance
from orchard.work.failures import backoff_seconds

_logger = logging.getLogger("orchard.worker")


class VMReports:
    """Reports the `instances` of a worker. `due` is set when one of them has changed. `chance` returns 0 to 1."""

    def __init__(self, client: Client, instances: Mapping[str, Instance], chance: Callable[[], float]) -> None:
        self.due = Wakeup()
        self._client = client
        self._instances = instances
        self._chance = chance
        # The controller's capabilities.
        self._capabilities: Collection[str] = ()
        # When the controller first saw this worker.
        self._created_at: datetime.datetime | None = None

    def begin_session(self, capabilities: Collection[str], created_at: datetime.datetime | None) -> None:
        """Note the controller's capabilities, and when it first saw this worker."""
        self._capabilities, self._created_at = capabilities, created_at

    async def run(self) -> None:
        """Report each instance to the controller as soon as it changes. Raises ClientError."""
        while True:
            for instance in list(self._instances.values()):
                report = instance.report()
                if report != instance.reported:
                    await self._send(instance, report)
            await self.due.wait()

    async def _send(self, instance: Instance, report: dict[str, Any]) -> None:
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
            # 404: the VM was deleted or is another instance now, which the next sync will find.
            if error.status != 404:
                extra = {"vm": instance.vm.name, "reason": error.message}
                _logger.error("controller rejected a VM report", extra=extra)
        instance.reported = report

    async def send_failures(self) -> None:
        """Report the VMs that ended with this worker, if the controller can be reached."""
        with suppress(ClientError):
            for instance in self._instances.values():
                if instance.has_unreported_failure:
                    await self._send(instance, instance.report())

    def review(self, instance: Instance) -> None:
        """Report an instance again unless the controller has its report, by the VM that the controller last sent."""
        if not self._is_known(instance.vm, instance.report()):
            instance.reported = None
            self.due.set()

    def _is_known(self, vm: VM, report: Mapping[str, Any]) -> bool:
        """Return whether the controller has what a report says in its state of a VM."""
        state = vm.state
        if report["status"] == state.status == "failed":
            # The first reason stays, so the messages may differ.
            return state.ended_at is not None or VM_RESTART not in self._capabilities
        known = {one["type"]: one["state"] == "true" for one in report["conditions"]}
        return (
            state.status == report["status"]
            and state.status_message == report["status_message"]
            and state.observed_generation >= report["observedGeneration"]
            and vm.condition("running") is known["running"]
            and (VM_READY not in self._capabilities or vm.condition("ready") is known["ready"])
        )

    async def send_events(self, vm: VM, events: Sequence[Event]) -> None:
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

    # -- VMs without an instance

    async def explain(self, vms: Iterable[VM], reason: str) -> None:
        """Report the reason for each VM that waits on this worker. Raises ClientError."""
        for vm in vms:
            if vm.state.status == "pending":
                await self._send_status(vm, "pending", f"waiting: its worker cannot list its VMs: {reason}")

    async def tell_ended(self, vm: VM) -> None:
        """Report that a failed VM, which the controller wants to restart, does not run here. Raises ClientError.

        Not for a VM that was assigned to an earlier worker of this name, on whose host it may run.
        """
        state, since = vm.state, self._created_at
        mine = state.scheduled_at is not None and since is not None and state.scheduled_at >= since
        if VM_RESTART in self._capabilities and state.ended_at is None and mine:
            await self._send_status(vm, "failed", state.status_message)

    async def _send_status(self, vm: VM, status: Status, message: str) -> None:
        report = {"uid": vm.uid, "restart_count": vm.state.restart_count, "status": status, "status_message": message}
        report["conditions"] = [{"type": "running", "state": "false"}]
        with suppress(ResponseError):
            await self._client.vms.report(vm.name, report)
