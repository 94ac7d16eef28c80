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
Methods return the dataclasses of schema.py and resources/bodies.py. A keyword argument has the name of the attribute
and the value that it holds: `ttlSeconds` is `ttl_seconds`. In place of keywords, a JSON object has field names as on
the wire. The client keeps no state of VMs. A replaced object is sent with its name, which the Go controller takes from
the body.

Every method raises a ClientError: ConnectError if the controller cannot be reached or the connection was lost, and
ResponseError if the controller refused (`status` is the HTTP status, `message` says why). The docstring of a method
names the statuses to expect, and other errors. net/transport.py opens the connections, keeps them and repeats requests.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

from trio_websocket import WebSocketConnection

from orchard.codec import format_time
from orchard.methods.admin import ServiceAccounts, Settings
from orchard.methods.commands import CommandResult, RunningCommand
from orchard.methods.common import Conditions, decode_answer, decode_answers, filter_query, parse_object
from orchard.methods.vms import VMFailed, VMs
from orchard.methods.watching import WatchedChange, WatchKind, watch_all
from orchard.methods.workers import Workers
from orchard.net.tcp import Connect
from orchard.net.transport import (
    ClientError,
    ClientResponse,
    ConnectError,
    Items,
    ResponseError,
    Transport,
)
from orchard.net.urls import basic_header
from orchard.resources.bodies import ControllerInfo, OpenSession
from orchard.resources.cluster import Capacity, ControllerHealth
from orchard.schema import OS, Arch, EndedVM, Runtime

__all__ = [
    "Client",
    "ClientError",
    "CommandResult",
    "ConnectError",
    "ResponseError",
    "RunningCommand",
    "VMFailed",
    "WatchedChange",
]

# Limit for opening a connection, TCP and TLS together.
_CONNECT_SECONDS = 10.0
# Limit for the whole answer to a request.
_ANSWER_SECONDS = 60.0
# The longest message of a worker's watch, which holds one action.
_MAX_ACTION_BYTES = 64 * 1024

# The most different warnings that are logged, each once: a worker repeats its requests, and so their warnings, for ever.
_MAX_WARNINGS = 256

_logger = logging.getLogger("orchard.client")


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
        # Warnings that were logged already.
        self._warnings: set[str] = set()
        self.vms = VMs(self)
        self.workers = Workers(self)
        self.service_accounts = ServiceAccounts(self)
        self.cluster_settings = Settings(self)

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        json: object = ...,
        headers: Sequence[tuple[str, str]] = (),
    ) -> ClientResponse:
        """Do as `Transport.request`, and log what the controller warns of, once for each text."""
        answer = await super().request(method, path, query=query, json=json, headers=headers)
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
        return decode_answer(ControllerInfo, (await self.request("GET", "/controller/info")).json())

    async def health(self) -> ControllerHealth:
        """Return whether the controller takes changes. Needs no account. Raises ResponseError: 503 if it does not lead."""
        return decode_answer(ControllerHealth, (await self.request("GET", "/health")).json())

    async def accept_state(self) -> ControllerInfo:
        """Accept a state that was restored from an older copy as it is, and return the new clusterId. Needs admin:write."""
        return decode_answer(ControllerInfo, (await self.request("POST", "/controller/accept-state")).json())

    async def capacity(
        self,
        *,
        resources: Mapping[str, int] | None = None,
        labels: Mapping[str, str] | None = None,
        arch: Arch | None = None,
        runtime: Runtime | None = None,
        os: OS | None = None,
    ) -> Capacity:
        """Return how many VMs of a shape could start now (`fits`), how many wait, and what the matching workers offer.

        The defaults are those of a new VM. Raises ResponseError: 400.
        """
        given = {
            "resources": _pairs_text(resources or {}),
            "labels": _pairs_text(labels or {}),
            "arch": arch,
            "runtime": runtime,
            "os": os,
        }
        query = {name: value for name, value in given.items() if value}
        return decode_answer(Capacity, (await self.request("GET", "/capacity", query=query)).json())

    async def history(self, *, since: datetime.datetime | None = None, limit: int | None = None) -> Sequence[EndedVM]:
        """Return the history of deleted VMs, the earliest first: the last `limit` VMs, or the first ones from `since` on.

        `since` is a time with a time zone. The controller keeps 10,000 VMs.
        """
        given = {"since": format_time(since) if since else None, "limit": None if limit is None else str(limit)}
        query = {name: value for name, value in given.items() if value is not None}
        return decode_answers(EndedVM, (await self.request("GET", "/history", query=query)).json())

    async def sessions(self) -> Sequence[OpenSession]:
        """Return who is connected: watches, tunnels, commands and workers, the oldest first."""
        return decode_answers(OpenSession, (await self.request("GET", "/controller/sessions")).json())

    def watch(
        self, *, kinds: Sequence[WatchKind] = ("vms", "workers"), filter: Conditions | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchedChange]]:
        """Follow all VMs and workers for the time of an `async with` block.

        The block gets an iterator of `WatchedChange`: ADDED for each object that there is, SYNCED, and then each
        change. It does not end. After a lost connection it resumes; if the controller no longer has the changes of that
        time, it yields the differences as changes. It raises ConnectError after ten minutes without a connection.
        Only VMs that match the filter are shown (see `VMs.list`). Raises ResponseError: 400.
        """
        return watch_all(self, {"kinds": ",".join(kinds), **filter_query(filter)})

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
    return parse_object(await websocket.get_message(), "an action that the controller sent")


def _pairs_text(pairs: Mapping[str, object]) -> str:
    """Return names and values as the query parameters `resources` and `labels` have them."""
    return ",".join(f"{quote(name, safe='')}={quote(str(value), safe='')}" for name, value in pairs.items())


def _authorization(account: str, token: str, access_token: str) -> str:
    """Return the value of the header Authorization, "" for none."""
    if account:
        return basic_header(account, token)
    return f"Bearer {access_token}" if access_token else ""
