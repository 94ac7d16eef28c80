"""The API as methods. Law: asks the controller; keeps no state of VMs.

    async with Client("https://controller:6120", account="ci", token=..., certificate=pem) as client:
        vm = await client.vms.create(name="vm", image="ghcr.io/cirruslabs/macos-tahoe-base:latest")
        vm = await client.vms.wait("vm")

`vms.port_forward` gives a trio Stream to any TCP port of a VM, `vms.exec` runs a command in one.

`vms`, `workers`, `service_accounts` and `cluster_settings` group the API's methods; they take JSON as Python objects,
with the names that the fields have on the wire, and give the nouns of schema.py. How a request gets there and what
may happen on its way, and what is raised then, is told by transport.py; its errors can be imported from here.
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.codec import ValidationError, decode, parse_json
from orchard.net.transport import (
    MAX_SHOWN,
    ClientError,
    ConnectError,
    Items,
    ResponseError,
    Transport,
    excerpt,
)
from orchard.net.websocket import TunnelStream, describe_disconnect
from orchard.schema import (
    IP,
    VM,
    ClusterSettings,
    ControllerInfo,
    Event,
    ServiceAccount,
    Status,
    VMAccessToken,
    Worker,
    vm_from_json,
)

__all__ = ["Client", "ClientError", "ConnectError", "ResponseError", "RunningCommand", "VMFailed"]

MAX_LINE = 64 * 1024 * 1024  # bytes of a change in a watch of a VM
MAX_ACTION = 64 * 1024  # bytes of a message of the worker's watch
PIECE = 64 * 1024  # bytes of a command's input in a message
PAGE = 1000  # events that are fetched at once

JSON = Mapping[str, Any]
ObjectT = TypeVar("ObjectT", Worker, ServiceAccount, ClusterSettings, ControllerInfo, Event, IP, VMAccessToken)


class VMFailed(ClientError):  # noqa: N818 -- it states what is the case
    """The VM that was waited for has failed, or was deleted; str() says why. `vm` is how it was last seen."""

    def __init__(self, message: str, vm: VM) -> None:
        super().__init__(message)
        self.vm = vm


class Client(Transport):
    """A client of the controller: `Transport` with the API's methods."""

    @cached_property
    def vms(self) -> VMs:
        return VMs(self)

    @cached_property
    def workers(self) -> Workers:
        return Workers(self)

    @cached_property
    def service_accounts(self) -> ServiceAccounts:
        return ServiceAccounts(self)

    @cached_property
    def cluster_settings(self) -> Settings:
        return Settings(self)

    async def check(self) -> None:
        """Make sure that there is an Orchard, and that it lets us in."""
        await self.request("GET", "/")

    async def info(self) -> ControllerInfo:
        return _noun(ControllerInfo, (await self.request("GET", "/controller/info")).json())

    @asynccontextmanager
    async def rpc_watch(self, worker: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Follow what a worker is told to do: an iterator of actions, which raises ConnectError when it is cut off."""
        async with self.websocket(
            "/rpc/watch", {"workerName": worker}, max_message_size=MAX_ACTION
        ) as websocket:  # fmt: skip
            yield Items(partial(self._action, websocket))

    async def _action(self, websocket: WebSocketConnection) -> dict[str, Any]:
        message = await websocket.get_message()
        try:
            action = _parsed(message)
        except ValidationError:
            action = None
        if not isinstance(action, dict):
            raise ClientError(f"the controller sent no action over the watch, but {str(message)[:MAX_SHOWN]!r}")
        return action


class _Changes:
    """Reads the lines of a watch."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._lines: deque[bytes] = deque()
        self._open = b""  # a line whose end was not seen yet

    async def take(self) -> tuple[str, VM] | None:
        while not self._lines:
            piece = await anext(self._pieces, None)
            if piece is None:
                return None
            *lines, self._open = (self._open + piece).split(b"\n")
            self._lines.extend(lines)
            if len(self._open) > MAX_LINE:
                raise ClientError(f"a line of the watch is longer than {MAX_LINE} bytes")
        line = self._lines.popleft()
        try:
            change = parse_json(line)
            return str(change["type"]), _vm(change["object"])
        except (ValidationError, KeyError, TypeError):
            raise ClientError(f"a line of the watch is no change: {excerpt(line)}") from None


class VMs:
    """/vms"""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def create(self, vm: JSON | None = None, /, **fields: Any) -> VM:
        """Create a VM from an object, from fields by their names on the wire, or both."""
        return _vm((await self._client.request("POST", "/vms", json={**(vm or {}), **fields})).json())

    async def get(self, name: str) -> VM:
        return _vm((await self._client.request("GET", _path("vms", name))).json())

    async def list(self, *, worker: str | None = None) -> list[VM]:
        """List all VMs, or those on one worker."""
        query = None if worker is None else {"filter": f"worker={worker}"}
        return [_vm(raw) for raw in _list((await self._client.request("GET", "/vms", query=query)).json())]

    async def replace(self, name: str, spec: JSON) -> VM:
        """Replace a VM's specification; absent booleans are false, absent lists empty, all else is unchanged."""
        return _vm((await self._client.request("PUT", _path("vms", name), json=spec)).json())

    async def patch(self, name: str, patch: JSON | None = None, /, **fields: Any) -> VM:
        """Change what a JSON merge patch names."""
        body = {**(patch or {}), **fields}
        return _vm((await self._client.request("PATCH", _path("vms", name), json=body)).json())

    async def delete(self, name: str) -> None:
        await self._client.request("DELETE", _path("vms", name))

    @asynccontextmanager
    async def watch(self, name: str) -> AsyncIterator[AsyncIterator[tuple[str, VM]]]:
        """Follow a VM: an iterator of ("ADDED", "MODIFIED" or "DELETED", VM), which ends when the controller does."""
        async with self._client.stream(_path("vms", name), {"watch": "true"}) as pieces:
            yield Items(_Changes(pieces).take)

    async def wait(self, name: str, status: Status = "running") -> VM:
        """Wait until a VM has a status, and give it. Raises VMFailed when it fails before that, or is deleted."""
        async with self.watch(name) as changes:
            async for kind, vm in changes:
                if kind == "DELETED":
                    raise VMFailed(f'VM "{name}" was deleted', vm)
                if vm.state.status == status:
                    return vm
                if vm.state.status == "failed":
                    raise VMFailed(f'VM "{name}" failed: {vm.state.status_message}', vm)
        raise ConnectError(f"{self._client.url} ended the watch of VM {name!r}")

    def events(self, name: str, *, order: Literal["asc", "desc"] = "asc") -> AsyncIterator[Event]:
        """Give all events of a VM, fetched page by page."""
        page: deque[Event] = deque()
        cursor: str | None = ""

        async def take() -> Event | None:
            nonlocal cursor
            while not page and cursor is not None:
                events, cursor = await self.events_page(name, limit=PAGE, order=order, cursor=cursor or None)
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
        """Give events of a VM, and the cursor of the next page (None: there is none)."""
        given = {"limit": None if limit is None else str(limit), "order": order, "cursor": cursor}
        query = {name: value for name, value in given.items() if value is not None}
        answer = await self._client.request("GET", _path("vms", name, "events"), query=query)
        return [_noun(Event, raw) for raw in _list(answer.json())], answer.headers.get("x-next-cursor")

    async def append_events(self, name: str, events: Sequence[JSON], *, uid: str | None = None) -> None:
        """Append events, in order; with `uid` only to the VM that has it."""
        query = None if uid is None else {"uid": uid}
        await self._client.request("POST", _path("vms", name, "events"), query=query, json=events)

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a VM, for the time of an `async with` block, which gets a trio Stream.

        `wait` seconds are given to the VM to run, and to its worker to connect. Raises ResponseError: 404, 503.
        """
        return self._client.tunnel(_path("vms", name, "port-forward"), {"port": str(port), "wait": str(wait)})

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
        """Run a command in a VM, which ends with the block. `interactive` gives it a stdin, `tty` a terminal.

        `wait` seconds are given to the VM to run and to answer. Raises ResponseError: 400, 404, 503.
        """
        query = {"command": command, "wait": str(wait), **({"workdir": workdir} if workdir else {})}
        query |= {"interactive": "true"} if interactive else {}
        query |= {"tty": "true", "rows": str(rows), "cols": str(cols)} if tty else {}
        query |= {f"env[{key}]": value for key, value in (env or {}).items()}
        async with self._client.websocket(_path("vms", name, "exec"), query) as websocket:
            yield RunningCommand(websocket)

    async def ip(self, name: str, *, wait: int = 0) -> str:
        """Give a VM's address in the network of its worker's host. Raises ResponseError: 404, 503."""
        answer = await self._client.request("GET", _path("vms", name, "ip"), query={"wait": str(wait)})
        return _noun(IP, answer.json()).ip

    async def issue_access_token(self, name: str, *, ttl: int | None = None) -> VMAccessToken:
        """Make a token that lets its bearer into this VM for `ttl` seconds, or a day."""
        body = {} if ttl is None else {"ttlSeconds": ttl}
        answer = await self._client.request("POST", _path("vms", name, "access-tokens"), json=body)
        return _noun(VMAccessToken, answer.json())

    async def report(self, name: str, report: JSON) -> None:
        """Say what a worker sees of its VM."""
        await self._client.request("PUT", _path("vms", name, "state"), json=report)


class Workers:
    """/workers"""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def register(self, worker: JSON) -> Worker:
        return _noun(Worker, (await self._client.request("POST", "/workers", json=worker)).json())

    async def get(self, name: str) -> Worker:
        return _noun(Worker, (await self._client.request("GET", _path("workers", name))).json())

    async def list(self) -> list[Worker]:
        return [_noun(Worker, raw) for raw in _list((await self._client.request("GET", "/workers")).json())]

    async def put(self, name: str, worker: JSON) -> Worker:
        """Send a heartbeat, when last_seen is later than the one before; else set scheduling_paused."""
        return _noun(Worker, (await self._client.request("PUT", _path("workers", name), json=worker)).json())

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a worker's host; see `VMs.port_forward`."""
        return self._client.tunnel(_path("workers", name, "port-forward"), {"port": str(port), "wait": str(wait)})

    async def pause(self, name: str, *, paused: bool = True) -> Worker:
        """Let a worker get no new VMs, or let it again."""
        return await self.put(name, {"scheduling_paused": paused})

    async def delete(self, name: str) -> None:
        """Delete a worker; its VMs fail."""
        await self._client.request("DELETE", _path("workers", name))


class ServiceAccounts:
    """/service-accounts"""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def create(self, name: str, *, roles: Sequence[str] = (), token: str = "") -> ServiceAccount:
        """Create an account; without a token it gets a random one, which the answer holds."""
        body = {"name": name, "roles": list(roles), **({"token": token} if token else {})}
        return _noun(ServiceAccount, (await self._client.request("POST", "/service-accounts", json=body)).json())

    async def get(self, name: str) -> ServiceAccount:
        return _noun(ServiceAccount, (await self._client.request("GET", _path("service-accounts", name))).json())

    async def list(self) -> list[ServiceAccount]:
        answer = await self._client.request("GET", "/service-accounts")
        return [_noun(ServiceAccount, raw) for raw in _list(answer.json())]

    async def replace(self, name: str, **fields: Any) -> ServiceAccount:
        """Change an account's `roles`, `token` or both."""
        path = _path("service-accounts", name)
        return _noun(ServiceAccount, (await self._client.request("PUT", path, json=fields)).json())

    async def delete(self, name: str) -> None:
        await self._client.request("DELETE", _path("service-accounts", name))


class Settings:
    """/cluster-settings"""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def get(self) -> ClusterSettings:
        return _noun(ClusterSettings, (await self._client.request("GET", "/cluster-settings")).json())

    async def put(self, settings: JSON) -> ClusterSettings:
        """Replace the settings; what is left out gets its default."""
        return _noun(ClusterSettings, (await self._client.request("PUT", "/cluster-settings", json=settings)).json())


# ---- commands ------------------------------------------------------------------------------------------------------


class RunningCommand:
    """A command in a VM: an asynchronous iterator of ("stdout" or "stderr", bytes), and after its end `exit_code`."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket = websocket
        self.exit_code: int | None = None

    async def send(self, data: bytes) -> None:
        """Send to its stdin; it must be interactive."""
        for start in range(0, len(data), PIECE):
            await self._frame({"type": "stdin", "data": base64.b64encode(data[start : start + PIECE]).decode()})

    async def send_eof(self) -> None:
        """End its stdin."""
        await self._frame({"type": "stdin", "data": ""})

    async def resize(self, rows: int, cols: int) -> None:
        """Tell it the size of its terminal."""
        await self._frame({"type": "resize", "terminal": {"rows": rows, "cols": cols}})

    async def _frame(self, frame: JSON) -> None:
        with suppress(ConnectionClosed):  # it has ended, as whoever reads on will see
            await self._websocket.send_message(json.dumps(frame))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, bytes]:
        """Raises ClientError when the command could not be run to its end."""
        try:
            message = await self._websocket.get_message()
        except ConnectionClosed as closed:
            raise ConnectError(f"the command was cut off: {describe_disconnect(closed)}") from None
        with suppress(ValidationError, ValueError):  # what is no JSON, and what is no base64
            match _parsed(message):
                case {"type": "stdout" | "stderr" as kind, "data": str(data)}:
                    return kind, base64.b64decode(data)
                case {"type": "exit", "exit": {"code": int(code)}}:
                    self.exit_code = code
                    raise StopAsyncIteration
                case {"type": "error", "error": str(error)}:
                    raise ClientError(error)
        raise ClientError(f"a frame of the command is not understood: {str(message)[:MAX_SHOWN]!r}")


# ---- answers -------------------------------------------------------------------------------------------------------


def _parsed(message: str | bytes) -> Any:
    return parse_json(message.encode() if isinstance(message, str) else message)


def _noun(kind: type[ObjectT], raw: Any) -> ObjectT:
    try:
        return decode(kind, raw)
    except ValidationError as error:
        raise ClientError(f"the answer is no {kind.__name__}: {error}") from error


def _vm(raw: Any) -> VM:
    try:
        return vm_from_json(raw)
    except (ValidationError, TypeError, ValueError) as error:
        raise ClientError(f"the answer is no VM: {error}") from error


def _list(raw: Any) -> list[Any]:
    if not isinstance(raw, list):
        raise ClientError(f"the answer is no list, but {str(raw)[:MAX_SHOWN]}")
    return raw


def _path(*segments: str) -> str:
    return "".join("/" + quote(segment, safe="") for segment in segments)
