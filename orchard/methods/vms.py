"""The methods of /vms."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal

from orchard.codec import ValidationError, parse_json
from orchard.methods.commands import RunningCommand
from orchard.methods.common import JSON, ResourceMethods, decode_answer, decode_answers, url_path
from orchard.net.transport import ClientError, ConnectError, Items, excerpt
from orchard.net.websocket import TunnelStream
from orchard.schema import IP, VM, Event, Status, VMAccessToken

# The longest line of a VM's watch, which holds the whole VM.
_MAX_LINE_BYTES = 64 * 1024 * 1024
# Events that one request fetches.
_PAGE_EVENTS = 1000


class VMFailed(ClientError):  # noqa: N818 -- the name says what has happened to the VM
    """The VM that was waited for has failed, or was deleted. str() says why, `vm` is its last known state."""

    def __init__(self, message: str, vm: VM) -> None:
        super().__init__(message)
        self.vm = vm


class _Changes:
    """Reads the lines of a VM's watch out of the pieces of its body."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._lines: deque[bytes] = deque()
        # The beginning of a line whose end has not arrived.
        self._incomplete = b""

    async def take(self) -> tuple[str, VM] | None:
        """Return the next change, None at the end of the body. Raises ClientError."""
        while not self._lines:
            piece = await anext(self._pieces, None)
            if piece is None:
                return None
            *lines, self._incomplete = (self._incomplete + piece).split(b"\n")
            # An empty line only keeps the connection open through proxies.
            self._lines.extend(filter(None, lines))
            if len(self._incomplete) > _MAX_LINE_BYTES:
                raise ClientError(f"a line of the watch is longer than {_MAX_LINE_BYTES} bytes")
        line = self._lines.popleft()
        try:
            change = parse_json(line)
            return str(change["type"]), decode_answer(VM, change["object"])
        except (ValidationError, KeyError, TypeError):
            raise ClientError(f"a line of the watch is {excerpt(line)}, expected a change of a VM") from None


class VMs(ResourceMethods):
    """The methods of /vms. VMs are named by their `name`; a name can be used again after its VM was deleted."""

    async def create(self, vm: JSON | None = None, /, **fields: Any) -> VM:
        """Create a VM from an object, from fields (`name`, `image`, `cpu`, ...), or both. Return it as it was stored.

        It begins as "pending"; see `wait`. Raises ResponseError: 409 if the name is taken, 412 for an invalid field.
        """
        return await self._fetch(VM, "POST", "/vms", json={**(vm or {}), **fields})

    async def get(self, name: str) -> VM:
        """Return a VM. Raises ResponseError: 404."""
        return await self._fetch(VM, "GET", url_path("vms", name))

    async def list_with_revision(self, *, worker: str | None = None) -> tuple[list[VM], int]:
        """Return as `list` does, and the revision of the stored state (0: the controller does not tell it)."""
        query = None if worker is None else {"filter": f"worker={worker}"}
        answer = await self._transport.request("GET", "/vms", query=query)
        revision = answer.headers.get("x-stored-revision") or "0"
        return decode_answers(VM, answer.json()), int(revision) if revision.isdecimal() else 0

    async def list(self, *, worker: str | None = None) -> list[VM]:
        """Return all VMs, or those that are assigned to one worker."""
        return (await self.list_with_revision(worker=worker))[0]

    async def replace(self, name: str, spec: JSON) -> VM:
        """Replace a VM's specification, and return the VM.

        A boolean that `spec` omits becomes false and a list becomes empty; other omitted fields keep their values. Raises
        ResponseError: 404, 412.
        """
        return await self._fetch(VM, "PUT", url_path("vms", name), json={"name": name, **spec})

    async def patch(self, name: str, patch: JSON | None = None, /, **fields: Any) -> VM:
        """Change the fields of a VM's specification that a JSON merge patch (RFC 7396) names, and return the VM.

        Raises ResponseError: 404, 412.
        """
        return await self._fetch(VM, "PATCH", url_path("vms", name), json={**(patch or {}), **fields})

    async def delete(self, name: str) -> None:
        """Delete a VM. Its worker stops and removes it a moment later. Raises ResponseError: 404."""
        await self._transport.request("DELETE", url_path("vms", name))

    @asynccontextmanager
    async def watch(self, name: str) -> AsyncIterator[AsyncIterator[tuple[str, VM]]]:
        """Follow a VM for the time of the block.

        Yields an iterator of (kind, VM), where kind is "ADDED" for its state at the beginning, "MODIFIED" or "DELETED".
        The iterator ends when the controller stops, and raises ConnectError when the connection is lost. Raises
        ResponseError: 404.
        """
        async with self._transport.stream(url_path("vms", name), {"watch": "true"}) as pieces:
            yield Items(_Changes(pieces).take)

    async def wait(self, name: str, status: Status = "running") -> VM:
        """Wait until a VM has a status, for any time, and return it.

        Raises VMFailed if it fails before that or is deleted, and ResponseError: 404.
        """
        async with self.watch(name) as changes:
            async for kind, vm in changes:
                if kind == "DELETED":
                    raise VMFailed(f'VM "{name}" was deleted', vm)
                if vm.state.status == status:
                    return vm
                if vm.state.status == "failed":
                    raise VMFailed(f'VM "{name}" failed: {vm.state.status_message}', vm)
        raise ConnectError(f'{self._transport.url} ended the watch of VM "{name}"')

    def events(self, name: str, *, order: Literal["asc", "desc"] = "asc") -> AsyncIterator[Event]:
        """Return an iterator over all events of a VM, among them the lines that its script has printed.

        The iterator fetches 1,000 events at a time, and raises ResponseError: 404.
        """
        page: deque[Event] = deque()
        cursor: str | None = ""

        async def take() -> Event | None:
            nonlocal cursor
            while not page and cursor is not None:
                events, cursor = await self.events_page(name, limit=_PAGE_EVENTS, order=order, cursor=cursor or None)
                page.extend(events)
            return page.popleft() if page else None

        return Items(take)

    async def events_page(
        self,
        name: str,
        *,
        limit: int | None = None,
        order: Literal["asc", "desc"] = "asc",
        cursor: str | None = None,
    ) -> tuple[Sequence[Event], str | None]:
        """Return up to `limit` events of a VM, and the cursor of the next page (None after the last page).

        Raises ResponseError: 404, and 400 for a cursor that no page had.
        """
        given = {"limit": None if limit is None else str(limit), "order": order, "cursor": cursor}
        query = {name: value for name, value in given.items() if value is not None}
        answer = await self._transport.request("GET", url_path("vms", name, "events"), query=query)
        return decode_answers(Event, answer.json()), answer.headers.get("x-next-cursor")

    async def append_events(self, name: str, events: Sequence[JSON], *, uid: str | None = None) -> None:
        """Append events to those of a VM, in order. With `uid`, only if the VM has that uid. Used by workers.

        Raises ResponseError: 404.
        """
        query = None if uid is None else {"uid": uid}
        await self._transport.request("POST", url_path("vms", name, "events"), query=query, json=events)

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a VM, for the time of an `async with` block.

        The block gets a `trio.abc.Stream` that has no half-close, and it is closed at the end of the block. The
        controller waits up to `wait` seconds for the VM to run and for its worker to connect. Raises ResponseError: 404,
        and 503 if there is no connection. A BrokenResourceError of the block becomes ConnectError.
        """
        return self._transport.tunnel(url_path("vms", name, "port-forward"), {"port": str(port), "wait": str(wait)})

    @asynccontextmanager
    async def exec(
        self,
        name: str,
        command: str,
        *,
        interactive: bool = False,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        env: Mapping[str, str] | None = None,
        workdir: str = "",
        wait: int = 10,
    ) -> AsyncIterator[RunningCommand]:
        """Run a command by the user's shell in a VM, for the time of the block. The end of the block ends the command.

        `interactive` gives it a stdin, `tty` a terminal of `rows` by `cols`. `env` are environment variables for it, and
        `workdir` is its directory. The controller waits up to `wait` seconds for the VM to run and to answer. Raises
        ResponseError: 400 for invalid arguments, 404, and 503 if the VM cannot be reached.
        """
        query = {"command": command, "wait": str(wait), **({"workdir": workdir} if workdir else {})}
        query |= {"interactive": "true"} if interactive else {}
        query |= {"tty": "true", "rows": str(rows), "cols": str(cols)} if tty else {}
        query |= {f"env[{key}]": value for key, value in (env or {}).items()}
        async with self._transport.websocket(url_path("vms", name, "exec"), query) as websocket:
            yield RunningCommand(websocket)

    async def ip(self, name: str, *, wait: int = 0) -> str:
        """Return a VM's IP address in the network of its worker's host.

        The controller waits up to `wait` seconds for the VM to run. Raises ResponseError: 404, and 503 if the address
        cannot be found.
        """
        return (await self._fetch(IP, "GET", url_path("vms", name, "ip"), query={"wait": str(wait)})).ip

    async def issue_access_token(self, name: str, *, ttl: int | None = None) -> VMAccessToken:
        """Issue a token that admits its bearer to this VM (port_forward, exec, ip) for `ttl` seconds, by default a day.

        Raises ResponseError: 404, and 412 for an invalid `ttl`.
        """
        body = {} if ttl is None else {"ttlSeconds": ttl}
        return await self._fetch(VMAccessToken, "POST", url_path("vms", name, "access-tokens"), json=body)

    async def report(self, name: str, report: JSON) -> None:
        """Report what a worker observes of its VM. Used by workers. Raises ResponseError: 404, 412."""
        await self._transport.request("PUT", url_path("vms", name, "state"), json=report)
