"""The controller's REST API as methods of an asynchronous client, on trio.

    from pathlib import Path

    import trio
    from orchard.client import Client, VMFailed

    async def main():
        pem = Path("controller.crt").read_bytes()
        async with Client("https://controller:6120", account="ci", token="s3cret", certificate=pem) as client:
            await client.vms.create(name="build", image="ghcr.io/cirruslabs/macos-tahoe-base:latest")
            try:
                vm = await client.vms.wait("build")
                print(vm.name, "runs on", vm.state.worker)
                async with client.vms.exec("build", "sw_vers") as command:
                    async for stream, data in command:
                        print(stream, data.decode())
                print("exit code", command.exit_code)
            except VMFailed as failure:
                print(failure)
            finally:
                await client.vms.delete("build")

    trio.run(main)

`Client.vms`, `.workers`, `.service_accounts` and `.cluster_settings` have one method for each operation of the API.
Methods take JSON as Python objects, with field names as on the wire, and return the dataclasses of schema.py. The client
keeps no state of VMs. A replaced object is sent with its name, which the Go controller takes from the body.

Every method raises a ClientError: ConnectError if the controller cannot be reached or the connection was lost, and
ResponseError if the controller refused (`status` is the HTTP status, `message` says why). The docstring of a method names
the statuses to expect, and other errors. net/transport.py opens the connections, keeps them and repeats requests.
"""

from __future__ import annotations

import base64
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.codec import ValidationError, decode, parse_json
from orchard.net.tcp import Connect
from orchard.net.transport import (
    ClientError,
    ClientResponse,
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

# For opening a connection, TCP and TLS together.
_CONNECT_SECONDS = 10.0
# For the whole answer to a request.
_ANSWER_SECONDS = 60.0
# The longest line of a VM's watch, which holds the whole VM.
_MAX_LINE_BYTES = 64 * 1024 * 1024
# The longest message of a worker's watch, which holds one action.
_MAX_ACTION_BYTES = 64 * 1024
# A command's input is sent in messages of this size.
_STDIN_BYTES = 64 * 1024
# Events that one request fetches.
_PAGE_EVENTS = 1000

# Different warnings that are logged. A worker repeats its requests for ever, and with them their warnings.
_MAX_WARNINGS = 256

_logger = logging.getLogger("orchard.client")

JSON = Mapping[str, Any]
_ObjectT = TypeVar("_ObjectT", VM, Worker, ServiceAccount, ClusterSettings, ControllerInfo, Event, IP, VMAccessToken)


class VMFailed(ClientError):  # noqa: N818 -- the name says what has happened to the VM
    """The VM that was waited for has failed, or was deleted. str() says why, `vm` is its last known state."""

    def __init__(self, message: str, vm: VM) -> None:
        super().__init__(message)
        self.vm = vm


class Client(Transport):
    """A client of the controller at `url`, for example "https://controller:6120" or "http://127.0.0.1:6120/prefix".

    `account` and `token` are the name and the token of a service account. `access_token` (see
    `VMs.issue_access_token`) is used in their place, and admits to one VM only. `certificate` is the controller's own
    certificate in PEM, which is then the only one that is trusted; by default the host's CAs decide.

    `connect_seconds` bounds the opening of a connection. `answer_seconds` bounds a whole answer; watches, tunnels and
    commands have no limit once they are open. `connect` opens a connection to a host and port in place of TCP, and
    raises OSError.

    `vms`, `workers`, `service_accounts` and `cluster_settings` hold the methods of these resources.

    Use the client as an asynchronous context manager, or call `aclose`. Any number of tasks may share it. Raises
    ValueError for an invalid URL or certificate.
    """

    def __init__(
        self,
        url: str,
        *,
        account: str = "",
        token: str = "",
        access_token: str = "",
        certificate: bytes | None = None,
        connect_seconds: float = _CONNECT_SECONDS,
        answer_seconds: float = _ANSWER_SECONDS,
        connect: Connect | None = None,
    ) -> None:
        super().__init__(
            url,
            base_path="/v1",
            authorization=_authorization(account, token, access_token),
            certificate=certificate,
            connect_seconds=connect_seconds,
            answer_seconds=answer_seconds,
            connect=connect,
        )
        # What was logged already.
        self._warnings: set[str] = set()
        self.vms = VMs(self)
        self.workers = Workers(self)
        self.service_accounts = ServiceAccounts(self)
        self.cluster_settings = Settings(self)

    async def request(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, json: object = ...
    ) -> ClientResponse:
        """Do as `Transport.request`, and log what the controller warns of, once for each text."""
        answer = await super().request(method, path, query=query, json=json)
        warning = answer.headers.get("warning")
        if warning and warning not in self._warnings and len(self._warnings) < _MAX_WARNINGS:
            self._warnings.add(warning)
            _logger.warning("the controller warns", extra={"request": f"{method} {path}", "warning": warning})
        return answer

    async def check(self) -> None:
        """Raise a ClientError unless the URL is a controller's and the credentials are valid."""
        await self.request("GET", "/")

    async def info(self) -> ControllerInfo:
        """Return the controller's version and capabilities."""
        return _decode(ControllerInfo, (await self.request("GET", "/controller/info")).json())

    async def accept_state(self) -> ControllerInfo:
        """Accept a state that was restored from an older copy as it is, and return the new clusterId. Needs admin:write."""
        return _decode(ControllerInfo, (await self.request("POST", "/controller/accept-state")).json())

    @asynccontextmanager
    async def rpc_watch(self, worker: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Follow the actions that the controller sends to a worker, for the time of the block. Used by workers.

        Yields an iterator of actions such as `{"syncVMsAction": {}}`. It raises `trio_websocket.ConnectionClosed` when
        the watch ends, which becomes ConnectError outside of the block, and ClientError for anything but an action.
        """
        query = {"workerName": worker}
        async with self.websocket("/rpc/watch", query, max_message_size=_MAX_ACTION_BYTES) as websocket:
            yield Items(partial(_receive_action, websocket))


async def _receive_action(websocket: WebSocketConnection) -> dict[str, Any]:
    message = await websocket.get_message()
    try:
        action = _parse_message(message)
    except ValidationError:
        action = None
    if not isinstance(action, dict):
        raise ClientError(f"the controller sent {excerpt(message)} over the watch, expected an action")
    return action


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
            return str(change["type"]), _decode(VM, change["object"])
        except (ValidationError, KeyError, TypeError):
            raise ClientError(f"a line of the watch is {excerpt(line)}, expected a change of a VM") from None


class _Resource:
    """The methods of one resource of the API."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def _fetch(
        self,
        kind: type[_ObjectT],
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        json: object = ...,
    ) -> _ObjectT:
        """Send a request and return the object of its answer. Raises ClientError."""
        return _decode(kind, (await self._client.request(method, path, query=query, json=json)).json())

    async def _fetch_list(
        self, kind: type[_ObjectT], path: str, query: Mapping[str, str] | None = None
    ) -> list[_ObjectT]:
        """Return the objects of a list. Raises ClientError."""
        return _decode_list(kind, (await self._client.request("GET", path, query=query)).json())


class VMs(_Resource):
    """The methods of /vms. VMs are named by their `name`; a name can be used again after its VM was deleted."""

    async def create(self, vm: JSON | None = None, /, **fields: Any) -> VM:
        """Create a VM from an object, from fields (`name`, `image`, `cpu`, ...), or both. Return it as it was stored.

        It begins as "pending"; see `wait`. Raises ResponseError: 409 if the name is taken, 412 for an invalid field.
        """
        return await self._fetch(VM, "POST", "/vms", json={**(vm or {}), **fields})

    async def get(self, name: str) -> VM:
        """Return a VM. Raises ResponseError: 404."""
        return await self._fetch(VM, "GET", _path("vms", name))

    async def list_with_revision(self, *, worker: str | None = None) -> tuple[list[VM], int]:
        """Return as `list` does, and the revision of the stored state (0: the controller does not tell it)."""
        query = None if worker is None else {"filter": f"worker={worker}"}
        answer = await self._client.request("GET", "/vms", query=query)
        revision = answer.headers.get("x-stored-revision") or "0"
        return _decode_list(VM, answer.json()), int(revision) if revision.isdecimal() else 0

    async def list(self, *, worker: str | None = None) -> list[VM]:
        """Return all VMs, or those that are assigned to one worker."""
        return (await self.list_with_revision(worker=worker))[0]

    async def replace(self, name: str, spec: JSON) -> VM:
        """Replace a VM's specification, and return the VM.

        A boolean that `spec` omits becomes false and a list becomes empty; other omitted fields keep their values. Raises
        ResponseError: 404, 412.
        """
        return await self._fetch(VM, "PUT", _path("vms", name), json={"name": name, **spec})

    async def patch(self, name: str, patch: JSON | None = None, /, **fields: Any) -> VM:
        """Change the fields of a VM's specification that a JSON merge patch (RFC 7396) names, and return the VM.

        Raises ResponseError: 404, 412.
        """
        return await self._fetch(VM, "PATCH", _path("vms", name), json={**(patch or {}), **fields})

    async def delete(self, name: str) -> None:
        """Delete a VM. Its worker stops and removes it a moment later. Raises ResponseError: 404."""
        await self._client.request("DELETE", _path("vms", name))

    @asynccontextmanager
    async def watch(self, name: str) -> AsyncIterator[AsyncIterator[tuple[str, VM]]]:
        """Follow a VM for the time of the block.

        Yields an iterator of (kind, VM), where kind is "ADDED" for its state at the beginning, "MODIFIED" or "DELETED".
        The iterator ends when the controller stops, and raises ConnectError when the connection is lost. Raises
        ResponseError: 404.
        """
        async with self._client.stream(_path("vms", name), {"watch": "true"}) as pieces:
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
        raise ConnectError(f'{self._client.url} ended the watch of VM "{name}"')

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
        answer = await self._client.request("GET", _path("vms", name, "events"), query=query)
        return _decode_list(Event, answer.json()), answer.headers.get("x-next-cursor")

    async def append_events(self, name: str, events: Sequence[JSON], *, uid: str | None = None) -> None:
        """Append events to those of a VM, in order. With `uid`, only if the VM has that uid. Used by workers.

        Raises ResponseError: 404.
        """
        query = None if uid is None else {"uid": uid}
        await self._client.request("POST", _path("vms", name, "events"), query=query, json=events)

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a VM, for the time of an `async with` block.

        The block gets a `trio.abc.Stream` that has no half-close, and it is closed at the end of the block. The
        controller waits up to `wait` seconds for the VM to run and for its worker to connect. Raises ResponseError: 404,
        and 503 if there is no connection. A BrokenResourceError of the block becomes ConnectError.
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
        """Run a command by the user's shell in a VM, for the time of the block. The end of the block ends the command.

        `interactive` gives it a stdin, `tty` a terminal of `rows` by `cols`. `env` are environment variables for it, and
        `workdir` is its directory. The controller waits up to `wait` seconds for the VM to run and to answer. Raises
        ResponseError: 400 for invalid arguments, 404, and 503 if the VM cannot be reached.
        """
        query = {"command": command, "wait": str(wait), **({"workdir": workdir} if workdir else {})}
        query |= {"interactive": "true"} if interactive else {}
        query |= {"tty": "true", "rows": str(rows), "cols": str(cols)} if tty else {}
        query |= {f"env[{key}]": value for key, value in (env or {}).items()}
        async with self._client.websocket(_path("vms", name, "exec"), query) as websocket:
            yield RunningCommand(websocket)

    async def ip(self, name: str, *, wait: int = 0) -> str:
        """Return a VM's IP address in the network of its worker's host.

        The controller waits up to `wait` seconds for the VM to run. Raises ResponseError: 404, and 503 if the address
        cannot be found.
        """
        return (await self._fetch(IP, "GET", _path("vms", name, "ip"), query={"wait": str(wait)})).ip

    async def issue_access_token(self, name: str, *, ttl: int | None = None) -> VMAccessToken:
        """Issue a token that admits its bearer to this VM (port_forward, exec, ip) for `ttl` seconds, by default a day.

        Raises ResponseError: 404, and 412 for an invalid `ttl`.
        """
        body = {} if ttl is None else {"ttlSeconds": ttl}
        return await self._fetch(VMAccessToken, "POST", _path("vms", name, "access-tokens"), json=body)

    async def report(self, name: str, report: JSON) -> None:
        """Report what a worker observes of its VM. Used by workers. Raises ResponseError: 404, 412."""
        await self._client.request("PUT", _path("vms", name, "state"), json=report)


class Workers(_Resource):
    """The methods of /workers."""

    async def register(self, worker: JSON) -> Worker:
        """Register a worker, or renew its registration, and return it as it was stored. Used by workers."""
        return await self._fetch(Worker, "POST", "/workers", json=worker)

    async def get(self, name: str) -> Worker:
        """Return a worker. Raises ResponseError: 404."""
        return await self._fetch(Worker, "GET", _path("workers", name))

    async def list(self) -> list[Worker]:
        """Return all workers."""
        return await self._fetch_list(Worker, "/workers")

    async def put(self, name: str, worker: JSON) -> Worker:
        """Update a worker, and return it. Raises ResponseError: 404.

        A `last_seen` later than the stored one is a heartbeat; otherwise only `scheduling_paused` is set.
        """
        return await self._fetch(Worker, "PUT", _path("workers", name), json={"name": name, **worker})

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a worker's host, as `VMs.port_forward` does to one of a VM."""
        return self._client.tunnel(_path("workers", name, "port-forward"), {"port": str(port), "wait": str(wait)})

    async def goodbye(self, name: str) -> None:
        """Tell the controller that a worker stops: it gets no new VMs from now on. Used by workers.

        Raises ResponseError: 403 for another account than the one that registered it, 404.
        """
        await self._client.request("POST", "/rpc/goodbye", query={"workerName": name})

    async def pause(self, name: str, *, paused: bool = True) -> Worker:
        """Have the scheduler assign no more VMs to a worker, or with `paused=False` assign some again.

        Raises ResponseError: 404.
        """
        return await self.put(name, {"scheduling_paused": paused})

    async def delete(self, name: str) -> None:
        """Delete a worker. Its VMs fail. Raises ResponseError: 404."""
        await self._client.request("DELETE", _path("workers", name))


class ServiceAccounts(_Resource):
    """The methods of /service-accounts."""

    async def create(
        self, name: str, *, roles: Sequence[str] = (), token: str = "", authorized_keys: Sequence[str] = ()
    ) -> ServiceAccount:
        """Create an account, and return it with its token. Without a `token` the controller makes a random one.

        Raises ResponseError: 409 if the name is taken, 412 for an invalid field.
        """
        optional = {"token": token, "authorizedKeys": list(authorized_keys)}
        body = {"name": name, "roles": list(roles), **{key: value for key, value in optional.items() if value}}
        return await self._fetch(ServiceAccount, "POST", "/service-accounts", json=body)

    async def get(self, name: str) -> ServiceAccount:
        """Return an account. Raises ResponseError: 404."""
        return await self._fetch(ServiceAccount, "GET", _path("service-accounts", name))

    async def list(self) -> list[ServiceAccount]:
        """Return all accounts."""
        return await self._fetch_list(ServiceAccount, "/service-accounts")

    async def replace(self, name: str, **fields: Any) -> ServiceAccount:
        """Change an account's `roles`, `token` or both, and return it. Raises ResponseError: 404, 412."""
        return await self._fetch(ServiceAccount, "PUT", _path("service-accounts", name), json={"name": name, **fields})

    async def delete(self, name: str) -> None:
        """Delete an account. Raises ResponseError: 404."""
        await self._client.request("DELETE", _path("service-accounts", name))


class Settings(_Resource):
    """The methods of /cluster-settings."""

    async def get(self) -> ClusterSettings:
        """Return the settings."""
        return await self._fetch(ClusterSettings, "GET", "/cluster-settings")

    async def put(self, settings: JSON) -> ClusterSettings:
        """Replace the settings, and return them. Omitted fields get their defaults. Raises ResponseError: 412."""
        return await self._fetch(ClusterSettings, "PUT", "/cluster-settings", json=settings)


# ---- commands ------------------------------------------------------------------------------------------------------


class RunningCommand:
    """A command that runs in a VM: an asynchronous iterator over its output, as ("stdout" or "stderr", bytes).

    After the end of the iteration `exit_code` is set. The iterator raises ClientError if the command could not be run,
    and ConnectError if the connection was lost.
    """

    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket = websocket
        self.exit_code: int | None = None

    async def send(self, data: bytes) -> None:
        """Send bytes to the stdin of an `interactive` command. Bytes sent after the command's end are dropped."""
        for start in range(0, len(data), _STDIN_BYTES):
            await self._send_frame(
                {"type": "stdin", "data": base64.b64encode(data[start : start + _STDIN_BYTES]).decode()}
            )

    async def send_eof(self) -> None:
        """Close the command's stdin."""
        await self._send_frame({"type": "stdin", "data": ""})

    async def resize(self, rows: int, cols: int) -> None:
        """Set the size of the command's terminal."""
        await self._send_frame({"type": "resize", "terminal": {"rows": rows, "cols": cols}})

    async def _send_frame(self, frame: JSON) -> None:
        # The iterator reports why the connection has ended.
        with suppress(ConnectionClosed):
            await self._websocket.send_message(json.dumps(frame))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, bytes]:
        try:
            message = await self._websocket.get_message()
        except ConnectionClosed as closed:
            raise ConnectError(f"the command was cut off: {describe_disconnect(closed)}") from None
        # ValueError is raised for invalid base64.
        with suppress(ValidationError, ValueError):
            match _parse_message(message):
                case {"type": "stdout" | "stderr" as kind, "data": str(data)}:
                    return kind, base64.b64decode(data)
                case {"type": "exit", "exit": {"code": int(code)}}:
                    self.exit_code = code
                    raise StopAsyncIteration
                case {"type": "error", "error": str(error)}:
                    raise ClientError(error)
        raise ClientError(f"the controller sent {excerpt(message)} of a command, expected output, an exit or an error")


# ---- credentials and answers ---------------------------------------------------------------------------------------


def _authorization(account: str, token: str, access_token: str) -> str:
    """Return the value of the header Authorization, "" for none."""
    if account:
        return "Basic " + base64.b64encode(f"{account}:{token}".encode()).decode()
    return f"Bearer {access_token}" if access_token else ""


def _parse_message(message: str | bytes) -> Any:
    return parse_json(message.encode() if isinstance(message, str) else message)


def _decode(kind: type[_ObjectT], raw: Any) -> _ObjectT:
    try:
        return vm_from_json(raw) if kind is VM else decode(kind, raw)
    except (ValidationError, TypeError, ValueError) as error:
        raise ClientError(f"the answer is not a valid {kind.__name__}: {error}") from error


def _decode_list(kind: type[_ObjectT], raw: Any) -> list[_ObjectT]:
    if not isinstance(raw, list):
        raise ClientError(f"the answer is {excerpt(str(raw))}, expected a list")
    return [_decode(kind, item) for item in raw]


def _path(*segments: str) -> str:
    return "".join("/" + quote(segment, safe="") for segment in segments)
