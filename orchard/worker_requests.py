"""The controller's requests to a worker over the watch: a tunnel to a port of a VM, or a VM's IP address.

The controller names a session with each request, and the worker answers for that session by an HTTP request of its own:
`/rpc/port-forward` becomes the worker's end of a tunnel, `/rpc/resolve-ip` carries the address. If the request cannot
be fulfilled, the answer is an error message. An answer that does not reach the controller is not repeated: the client
that waits for it has a deadline.

The number of requests in progress is bounded, since a controller may ask for anything.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import trio

from orchard.client import Client, ClientError
from orchard.heartbeat import Lease
from orchard.net.tcp import splice
from orchard.net.transport import describe_network_error
from orchard.net.wsframes import INTERNAL_ERROR, NORMAL
from orchard.vm.driver import Driver, DriverError
from orchard.vm.instance import Instance

_FORWARD_PATH = "/rpc/port-forward"
_PORTS = range(1, 65536)
# Pings in a tunnel only serve to notice a controller that vanished.
_HEARTBEATS_PER_PING = 2
# For a port of a VM to accept a connection.
_CONNECT_SECONDS = 10.0
# Each tunnel has two sockets, and buffers half a MiB for each direction whose reader is slow.
_MAX_TUNNELS = 4096
# In progress at once: as many tunnels as there may be, and as many refusals and addresses.
_MAX_REQUESTS = 2 * _MAX_TUNNELS

_logger = logging.getLogger("orchard.worker")


class RequestHandler:
    """Fulfils the controller's requests to one worker.

    `instances` are the worker's, by their local names; the mapping may change at any time. The pings in a tunnel follow
    the heartbeats of `lease`. The handler closes neither `client` nor `driver`.
    """

    def __init__(
        self,
        worker: str,
        client: Client,
        driver: Driver,
        instances: Mapping[str, Instance],
        lease: Lease,
    ) -> None:
        self._worker = worker
        self._client = client
        self._driver = driver
        self._instances = instances
        self._lease = lease
        # Open, or being opened.
        self._tunnels = 0
        self._requests = 0

    def start(self, action: Mapping[str, Any], nursery: trio.Nursery) -> None:
        """Fulfil a request in a nursery, whose tasks may outlast the watch that brought the request.

        An unknown request, and one over the bound, is logged and ignored.
        """
        match action:
            case {"portForwardAction": {"session": str(session), "port": int(port), **rest}} if port in _PORTS:
                request = partial(self._forward_port, session, str(rest.get("vmUID") or ""), port)
            case {"resolveIPAction": {"session": str(session), **rest}}:
                request = partial(self._resolve_ip, session, str(rest.get("vmUID") or ""))
            case _:
                _logger.warning("unknown action ignored", extra={"worker": self._worker, "action": sorted(action)})
                return
        if self._requests >= _MAX_REQUESTS:
            extra = {"worker": self._worker, "running": self._requests}
            _logger.warning("action ignored, too many running", extra=extra)
            return
        self._requests += 1
        nursery.start_soon(self._count, request)

    async def _count(self, request: Callable[[], Awaitable[None]]) -> None:
        try:
            await request()
        finally:
            self._requests -= 1

    async def _forward_port(self, session: str, vm_uid: str, port: int) -> None:
        """Connect a port of a VM to the controller until one side closes; without a VM, a port of this host."""
        query = {"session": session, "errorMessage": ""}
        ping_seconds = _HEARTBEATS_PER_PING * self._lease.heartbeat_seconds
        refusal = ""
        self._tunnels += 1
        try:
            async with (
                await self._connect(vm_uid, port) as stream,
                self._client.tunnel(_FORWARD_PATH, query, ping_seconds) as tunnel,
            ):
                broken = await splice(stream, tunnel)
                await tunnel.aclose(INTERNAL_ERROR if broken else NORMAL, broken)
        except DriverError as error:
            refusal = str(error)
        except ClientError as error:
            _logger.info("tunnel ended", extra={"worker": self._worker, "reason": str(error)})
        finally:
            self._tunnels -= 1
        # Sent only here, because sending may take long and must not count as an open tunnel.
        if refusal:
            with suppress(ClientError):
                async with self._client.websocket(_FORWARD_PATH, {"session": session, "errorMessage": refusal}):
                    pass

    async def _connect(self, vm_uid: str, port: int) -> trio.SocketStream:
        """Connect to a port of a VM, or of this host. Raises DriverError."""
        if self._tunnels > _MAX_TUNNELS:
            raise DriverError(f"the worker has {_MAX_TUNNELS} tunnels open, which is its limit; close some")
        host = await self._address(vm_uid)
        failure = f"cannot connect to port {port} of {'the VM' if vm_uid else 'the host'}"
        try:
            with trio.fail_after(_CONNECT_SECONDS):
                if vm_uid:
                    port = await self._driver.find_port(self._running(vm_uid).name, port)
                return await trio.open_tcp_stream(host, port)
        except trio.TooSlowError:
            raise DriverError(f"{failure}: no answer within {_CONNECT_SECONDS:g} seconds") from None
        except OSError as error:
            raise DriverError(f"{failure}: {describe_network_error(error)}") from error

    async def _resolve_ip(self, session: str, vm_uid: str) -> None:
        """Send the controller the IP address of a VM."""
        query = {"session": session, "ip": "", "errorMessage": ""}
        try:
            query["ip"] = await self._address(vm_uid)
        except DriverError as error:
            query["errorMessage"] = str(error)
        with suppress(ClientError):
            await self._client.request("POST", "/rpc/resolve-ip", query=query)

    async def _address(self, vm_uid: str) -> str:
        """Return the address of a VM, or of this host if there is no uid. Raises DriverError."""
        if not vm_uid:
            return "localhost"
        instance = self._running(vm_uid)
        return await self._driver.ip(instance.name, bridged=bool(instance.vm.spec.net_bridged))

    def _running(self, vm_uid: str) -> Instance:
        """Return the instance of a VM that runs here. Raises DriverError."""
        for instance in self._instances.values():
            if instance.vm.uid == vm_uid and instance.state.running:
                return instance
        raise DriverError(f"no VM with uid {vm_uid} runs on this worker")
