"""The methods of /workers."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from orchard.methods.common import JSON, ResourceMethods, url_path
from orchard.net.websocket import TunnelStream
from orchard.schema import Worker


class Workers(ResourceMethods):
    """The methods of /workers."""

    async def register(self, worker: JSON) -> Worker:
        """Register a worker, or renew its registration, and return it as it was stored. Used by workers."""
        return await self._fetch(Worker, "POST", "/workers", json=worker)

    async def get(self, name: str, *, images: bool = True) -> Worker:
        """Return a worker, also without its images, of which it may have 200. Raises ResponseError: 404."""
        query = {} if images else {"images": "false"}
        return await self._fetch(Worker, "GET", url_path("workers", name), query=query)

    async def list(self, *, images: bool = True) -> list[Worker]:
        """Return all workers, also without their images, of which each may have 200."""
        return await self._fetch_list(Worker, "/workers", {} if images else {"images": "false"})

    async def put(self, name: str, worker: JSON) -> Worker:
        """Update a worker, and return it. Raises ResponseError: 404.

        A `last_seen` later than the stored one is a heartbeat; otherwise only `scheduling_paused` is set.
        """
        return await self._fetch(Worker, "PUT", url_path("workers", name), json={"name": name, **worker})

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a worker's host, as `VMs.port_forward` does to one of a VM."""
        return self._transport.tunnel(url_path("workers", name, "port-forward"), {"port": str(port), "wait": str(wait)})

    async def goodbye(self, name: str) -> None:
        """Tell the controller that a worker stops: it gets no new VMs from now on. Used by workers.

        Raises ResponseError: 403 for another account than the one that registered it, 404.
        """
        await self._transport.request("POST", "/rpc/goodbye", query={"workerName": name})

    async def pause(self, name: str, *, paused: bool = True) -> Worker:
        """Pause the scheduling of a worker, which gets no new VMs then, or with `paused=False` resume it.

        Raises ResponseError: 404.
        """
        return await self.put(name, {"scheduling_paused": paused})

    async def drain(self, name: str, *, deadline_seconds: int = 0, now: bool = False) -> Worker:
        """Pause the scheduling of a worker, and end its VMs at a deadline. Return the worker.

        `deadline_seconds` counts from now (0: there is no deadline), and `now` ends the VMs at once. A VM with the
        restart policy OnFailure is started elsewhere. Raises ResponseError: 404, 412.
        """
        body = {"now": True} if now else {"deadlineSeconds": deadline_seconds}
        return await self._fetch(Worker, "POST", url_path("workers", name, "drain"), json=body)

    async def undrain(self, name: str) -> None:
        """Cancel a drain, and resume the scheduling of the worker. Raises ResponseError: 404."""
        await self._transport.request("DELETE", url_path("workers", name, "drain"))

    async def delete(self, name: str) -> None:
        """Delete a worker. Its VMs fail. Raises ResponseError: 404."""
        await self._transport.request("DELETE", url_path("workers", name))
