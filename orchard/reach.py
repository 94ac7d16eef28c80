"""The way into a VM: wait until it runs, then have its worker bring a tunnel or an address. Law: waits; decides nothing.

Whoever wants into a VM, over HTTP or SSH, comes through here, and is told in the same words why it can't be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from orchard.codec import APIError
from orchard.net.websocket import TunnelStream
from orchard.schema import VM
from orchard.store import Store
from orchard.tunnel import FarEnd, Rendezvous

LEAST_SECONDS = 10.0  # for a worker to do what a client does not wait for: to reach a VM that runs takes some time


class VMAccess:
    """The state, to know where a VM is, and the rendezvous, to have its worker do something."""

    def __init__(self, store: Store, rendezvous: Rendezvous) -> None:
        self._store = store
        self._switchboard = rendezvous

    async def port(self, vm: VM, port: int, wait: float) -> FarEnd:
        """Connect to a port of a VM; `wait` seconds are for it to run and its worker to answer.

        The far end is given back to its worker unless it is taken soon. Raises APIError: 503 when it can't be reached,
        404 when it does not exist any more.
        """
        deadline = trio.current_time() + wait
        running = await self._until_running(vm, deadline, wait)
        far = await self._ask(running.state.worker, "portForwardAction", vm.uid, port, deadline)
        assert isinstance(far, FarEnd)
        return far

    @asynccontextmanager
    async def stream(self, vm: VM, port: int, wait: float) -> AsyncIterator[TunnelStream]:
        """As `port`, and give the tunnel's bytes for the time of the block, which is cancelled when the VM ends.

        Raises APIError(503) in that case.
        """
        far = await self.port(vm, port, wait)
        async with self._switchboard.far_stream(vm.uid, far) as stream:
            yield stream

    async def host_port(self, worker: str, port: int, wait: float) -> FarEnd:
        """Connect to a port of a worker's host. Raises APIError(503)."""
        far = await self._ask(worker, "portForwardAction", "", port, trio.current_time() + wait)
        assert isinstance(far, FarEnd)
        return far

    async def address(self, vm: VM, wait: float) -> str:
        """Give a VM's address in its worker's network. Raises APIError as `port` does."""
        deadline = trio.current_time() + wait
        running = await self._until_running(vm, deadline, wait)
        address = await self._ask(running.state.worker, "resolveIPAction", vm.uid, None, deadline)
        assert isinstance(address, str)
        return address

    async def _until_running(self, vm: VM, deadline: float, wait: float) -> VM:
        with trio.move_on_at(deadline), self._store.watch("vm", vm.name) as changes:
            if self._running(vm) is None:
                async for _ in changes:
                    if self._running(vm) is not None:
                        break
        running = self._running(vm)
        if running is None:
            now = self._store.state.vms[vm.name].state
            why = f": {now.status_message}" if now.status_message else ""
            raise APIError(503, f'VM "{vm.name}" is {now.status} after {wait:g} seconds{why}')
        return running

    def _running(self, vm: VM) -> VM | None:
        """Give a VM as it is now if it runs, None if it may yet. Raises APIError when it never will."""
        now = self._store.state.vms.get(vm.name)
        if now is None or now.uid != vm.uid:
            raise APIError(404, f'VM "{vm.name}" with uid {vm.uid} does not exist any more')
        if now.state.status == "failed":
            raise APIError(503, f'VM "{vm.name}" has failed: {now.state.status_message}')
        if now.resting:
            raise APIError(503, f'VM "{vm.name}" is {now.spec.power_state}')
        return now if now.state.status == "running" else None

    async def _ask(self, worker: str, kind: str, vm_uid: str, port: int | None, deadline: float) -> FarEnd | str:
        """Have a worker do something before the deadline, or in the least time that it takes."""
        deadline = max(deadline, trio.current_time() + LEAST_SECONDS)
        with trio.move_on_at(deadline):
            await self._switchboard.connected(worker)
            with self._switchboard.ask(worker, kind, vm_uid, port) as session:
                return await session.wait()
        raise APIError(503, f'worker "{worker}" did not answer in time')
