"""The controller's requests to a worker over the watch: a tunnel to a port of a VM, or a VM's IP address.

The controller names a session with each request, and the worker answers for that session by an HTTP request of its own:
`/rpc/port-forward` becomes the worker's end of a tunnel, `/rpc/resolve-ip` carries the address. If the request cannot
be fulfilled, the answer is an error message. An answer that does not reach the controller is not repeated: the client
that waits for it has a deadline. When no client waits any more, the controller has the request cancelled.

The number of requests in progress is bounded, for each VM and in all: a controller may ask for anything, and so may the
bearer of one VM's access token. All that wait for the address of one VM share one look-up, which ends when none is
left.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from orchard.client import Client, ClientError
from orchard.net.tcp import describe_network_error, splice
from orchard.net.wsframes import INTERNAL_ERROR, NORMAL
from orchard.resources.cluster import MAX_PENDING_OF_VM, MAX_TUNNELS_OF_VM
from orchard.vm.driver import Driver, DriverError
from orchard.vm.instance import Instance
from orchard.work.heartbeat import Lease
from orchard.work.reconciler import Reconciler

_FORWARD_PATH = "/rpc/port-forward"
_PORTS = range(1, 65536)
# Pings in a tunnel only serve to notice a controller that vanished.
_HEARTBEATS_PER_PING = 2
# Limit for a port of a VM to accept a connection.
_CONNECT_SECONDS = 10.0
# Each tunnel has two sockets, and buffers half a MiB for each direction whose reader is slow.
_MAX_TUNNELS = 4 * MAX_TUNNELS_OF_VM
# The most requests in progress: as many tunnels as there may be, and as many refusals and addresses.
_MAX_REQUESTS = 2 * _MAX_TUNNELS
# The most requests for one VM, open tunnels among them, so that clients of one VM cannot keep others from theirs.
_MAX_VM_REQUESTS = MAX_TUNNELS_OF_VM + MAX_PENDING_OF_VM
# Limit for a worker that was just started to find its VMs. The controller's clients have deadlines of their own.
_ADOPTION_SECONDS = 60.0

_logger = logging.getLogger("orchard.worker")


class _LookUp:
    """A look-up of a VM's address, for all requests that wait for it."""

    def __init__(self) -> None:
        self.waiting = 0
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.address = ""
        self.error = "the look-up of the VM's address was cancelled"

    async def run(self, ask: Callable[[], Awaitable[str]]) -> None:
        try:
            with self.scope:
                self.address = await ask()
        except DriverError as error:
            self.error = str(error)
        finally:
            self.done.set()


class RequestHandler:
    """Fulfils the controller's requests to one worker.

    `vms` has the worker's name and instances. The pings in a tunnel follow the heartbeats of `lease`. The handler
    closes neither `client` nor `driver`.
    """

    def __init__(self, client: Client, driver: Driver, vms: Reconciler, lease: Lease) -> None:
        self._client = client
        self._driver = driver
        self._vms = vms
        self._lease = lease
        # The number of tunnels that are open or being opened.
        self._tunnels = 0
        # The requests in progress by the uid of the VM; "" is this host.
        self._requests: Counter[str] = Counter()
        # The scopes of requests that are not fulfilled yet, by their sessions.
        self._scopes: dict[str, trio.CancelScope] = {}
        # By the VMs' local names.
        self._look_ups: dict[str, _LookUp] = {}

    def start(self, action: Mapping[str, Any], nursery: trio.Nursery) -> None:
        """Fulfil a request in a nursery, whose tasks may outlast the watch that brought the request.

        An unknown request, and one over the bounds, is logged and ignored.
        """
        match action:
            case {"portForwardAction": {"session": str(session), "port": int(port), **rest}} if port in _PORTS:
                uid = str(rest.get("vmUID") or "")
                request = partial(self._forward_port, session, uid, port, nursery)
            case {"resolveIPAction": {"session": str(session), **rest}}:
                uid = str(rest.get("vmUID") or "")
                request = partial(self._resolve_ip, session, uid, nursery)
            case {"cancelRequestAction": {"session": str(session)}}:
                if scope := self._scopes.get(session):
                    scope.cancel()
                return
            case _:
                _logger.warning("unknown action ignored", extra={"worker": self._vms.worker, "action": sorted(action)})
                return
        if self._requests.total() >= _MAX_REQUESTS or self._requests[uid] >= _MAX_VM_REQUESTS:
            extra = {"worker": self._vms.worker, "vm": uid, "running": self._requests[uid]}
            _logger.warning("action ignored, too many running", extra=extra)
            return
        self._requests[uid] += 1
        nursery.start_soon(self._run, session, uid, request)

    async def _run(self, session: str, uid: str, request: Callable[[], Awaitable[None]]) -> None:
        try:
            with trio.CancelScope() as self._scopes[session]:
                await request()
        finally:
            self._scopes.pop(session, None)
            self._requests[uid] -= 1
            if not self._requests[uid]:
                del self._requests[uid]

    async def _forward_port(self, session: str, uid: str, port: int, nursery: trio.Nursery) -> None:
        """Connect a port of a VM to the controller until one side closes; without a VM, a port of this host."""
        query = {"session": session, "errorMessage": ""}
        ping_seconds = _HEARTBEATS_PER_PING * self._lease.heartbeat_seconds
        refusal = ""
        self._tunnels += 1
        try:
            async with (
                await self._connect(uid, port, nursery) as stream,
                self._client.tunnel(_FORWARD_PATH, query, ping_seconds) as tunnel,
            ):
                broken = await splice(stream, tunnel)
                await tunnel.aclose(INTERNAL_ERROR if broken else NORMAL, broken)
        except DriverError as error:
            refusal = str(error)
        except ClientError as error:
            _logger.info("tunnel ended", extra={"worker": self._vms.worker, "reason": str(error)})
        finally:
            self._tunnels -= 1
        # Sent only here, because sending may take long and must not count as an open tunnel.
        if refusal:
            with suppress(ClientError):
                async with self._client.websocket(_FORWARD_PATH, {"session": session, "errorMessage": refusal}):
                    pass

    async def _connect(self, uid: str, port: int, nursery: trio.Nursery) -> trio.SocketStream:
        """Connect to a port of a VM, or of this host. Raises DriverError."""
        if self._tunnels > _MAX_TUNNELS:
            raise DriverError(f"the worker has {_MAX_TUNNELS} tunnels open, which is its limit; close some")
        host = await self._address(uid, nursery)
        failure = f"cannot connect to port {port} of {'the VM' if uid else 'the host'}"
        try:
            with trio.fail_after(_CONNECT_SECONDS):
                if uid:
                    port = await self._driver.find_port(self._running(uid).name, port)
                    return await self._driver.connect(host, port)
                return await trio.open_tcp_stream(host, port)
        except trio.TooSlowError:
            raise DriverError(f"{failure}: no answer within {_CONNECT_SECONDS:g} seconds") from None
        except OSError as error:
            raise DriverError(f"{failure}: {describe_network_error(error)}") from error

    async def _resolve_ip(self, session: str, uid: str, nursery: trio.Nursery) -> None:
        """Send the controller the IP address of a VM."""
        query = {"session": session, "ip": "", "errorMessage": ""}
        try:
            query["ip"] = await self._address(uid, nursery)
        except DriverError as error:
            query["errorMessage"] = str(error)
        with suppress(ClientError):
            await self._client.request("POST", "/rpc/resolve-ip", query=query)

    async def _address(self, uid: str, nursery: trio.Nursery) -> str:
        """Return the address of a VM, or of this host if there is no uid. Raises DriverError."""
        if not uid:
            return "localhost"
        # At a worker's start its VMs are not known yet.
        with trio.move_on_after(_ADOPTION_SECONDS):
            await self._vms.adopted.wait()
        return await self._share_look_up(self._running(uid), nursery)

    def _running(self, uid: str) -> Instance:
        """Return the instance of a VM that runs here. Raises DriverError."""
        for instance in self._vms.instances.values():
            if instance.vm.uid == uid and instance.state.running:
                return instance
        raise DriverError(f"no VM with uid {uid} runs on this worker")

    async def _share_look_up(self, instance: Instance, nursery: trio.Nursery) -> str:
        """Return the address of a VM by a look-up that all who wait for it share. Raises DriverError."""
        look_up = self._look_ups.get(instance.name)
        if look_up is None:
            look_up = self._look_ups[instance.name] = _LookUp()
            bridged = bool(instance.vm.spec.net_bridged)
            nursery.start_soon(look_up.run, partial(self._driver.ip, instance.name, bridged=bridged))
        look_up.waiting += 1
        try:
            await look_up.done.wait()
        finally:
            look_up.waiting -= 1
            if not look_up.waiting:
                look_up.scope.cancel()
                self._look_ups.pop(instance.name, None)
        if not look_up.address:
            raise DriverError(look_up.error)
        return look_up.address
