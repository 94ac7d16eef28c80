"""Local VMs that the controller does not want on this worker: to which worker they belong, and their removal.

A worker ignores VMs without Orchard's prefix. A local VM that the controller has under the name of another worker is
left alone: two workers may share a host, and a worker may have been given another name. Every other unwanted VM is
stopped and deleted in a task of its own, however long that takes, so that a VM which cannot be removed delays no other
one. A guest that has ended occupies no slot, even if its VM cannot be deleted. A running guest first runs the shutdown
script that an earlier worker has noted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio

from orchard.client import Client, ResponseError
from orchard.schema import LOCAL_PREFIX, Worker
from orchard.vm.driver import Driver, LocalVM, NoteTrouble
from orchard.vm.ending import delete_with_retries, shut_down, stop_with_retries
from orchard.vm.instance_state import Note

_LOCAL_NAME = re.compile(LOCAL_PREFIX + r"(.+)-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-([0-9]{1,9})")

_logger = logging.getLogger("orchard.worker")


class RefusedError(Exception):
    """The controller refused this worker, or its host is not the one to work on. Trying again would not help."""


def vm_name_of(local_name: str) -> str:
    """Return the name of the VM that has a local name, or the local name itself if Orchard did not make it."""
    match = _LOCAL_NAME.fullmatch(local_name)
    return local_name if match is None else match[1]


class Leftovers:
    """The local VMs that are being removed. `removed` is called after each removal.

    `description` is what the worker registers with. `note_trouble` and `freed` are those of `InstanceHost`.
    """

    def __init__(
        self,
        description: Worker,
        client: Client,
        driver: Driver,
        note_trouble: NoteTrouble,
        freed: Callable[[str], None],
        removed: Callable[[], None],
    ) -> None:
        self._description = description
        self._client = client
        self._driver = driver
        self._note_trouble = note_trouble
        self._freed = freed
        self._removed = removed
        # Local name -> whether the guest of that VM may run.
        self._runs: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._runs

    @property
    def running(self) -> list[str]:
        """The VMs whose guests may run."""
        return [name for name, runs in self._runs.items() if runs]

    async def belongs_elsewhere(self, local: LocalVM) -> bool:
        """Return whether the controller has exactly this VM under the name of another worker.

        Raises RefusedError if that other worker is this one under an earlier name, and ClientError.
        """
        match = _LOCAL_NAME.fullmatch(local.name)
        if match is None:
            return False
        name, uid, restart_count = match.groups()
        try:
            vm = await self._client.vms.get(name)
        except ResponseError as error:
            if error.status != 404:
                raise
            return False
        other = vm.state.worker
        if vm.uid != uid or vm.state.restart_count != int(restart_count) or other in ("", self._description.name):
            return False
        await self._check_earlier_name(other)
        _logger.info("left a VM of another worker alone", extra={"vm": name, "worker": other})
        return True

    async def _check_earlier_name(self, name: str) -> None:
        """Raise RefusedError if the worker `name` is offline and was one in this directory of this host."""
        try:
            other = await self._client.workers.get(name)
        except ResponseError as error:
            if error.status != 404:
                raise
            return
        mine = (self._description.machine_id, self._description.instance_id)
        if self._description.instance_id and (other.machine_id, other.instance_id) == mine and other.state == "offline":
            raise RefusedError(
                f'worker "{self._description.name}" has the VMs of worker "{name}", which ran in this directory and is'
                f' offline; start it as "{name}" again, or delete worker "{name}" to give up its VMs'
            )

    def held(self) -> list[Mapping[str, int] | None]:
        """Return the resources that each running guest holds; None: they are unknown."""
        return [note.resources if (note := self._noted(name)) is not None else None for name in self.running]

    def _noted(self, name: str) -> Note | None:
        """Return an earlier worker's note about a VM; None if there is none, or one of another version."""
        with suppress(ValueError):
            return Note.parse(self._driver.noted(name))
        return None

    def remove(self, local: LocalVM, nursery: trio.Nursery) -> None:
        """Stop and delete a VM in a task of the nursery."""
        self._runs[local.name] = local.state == "running"
        nursery.start_soon(self._remove, local.name)

    async def _remove(self, name: str) -> None:
        if self._runs[name]:
            note = self._noted(name)
            if note is not None and note.shutdown is not None:
                await shut_down(self._driver, name, note.shutdown)
        failure = "cannot remove leftover VM, retrying"
        await stop_with_retries(self._driver, name, self._note_trouble, failure)
        self._runs[name] = False
        self._freed(name)
        await delete_with_retries(self._driver, name, self._note_trouble, failure)
        del self._runs[name]
        _logger.info("removed leftover VM", extra={"vm": name})
        self._removed()
