"""The methods of /vms."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Unpack

import trio

from orchard.codec import attr
from orchard.methods.commands import CommandResult, RunningCommand
from orchard.methods.common import (
    JSON,
    Conditions,
    ResourceMethods,
    decode_answer,
    decode_answers,
    filter_query,
    url_path,
)
from orchard.methods.fields import NewVMFields, VMFields, fields_to_json
from orchard.methods.lines import Absence, AfterRefusal, JSONLines, ResumingLines
from orchard.net.transport import ClientError, ConnectError, Items, ResponseError, excerpt
from orchard.net.urls import SERVER_ERRORS
from orchard.net.websocket import TunnelStream
from orchard.resources.bodies import IP, BulkDeletion, VMAccessToken
from orchard.schema import VM, Event, VMSpec

# Events that one request fetches.
_PAGE_EVENTS = 1000
# How long one request waits for a VM. Proxies cut off answers that take half a minute.
_WAIT_SECONDS = 20
# The most output of a script that `run` runs.
_MAX_OUTPUT_BYTES = 16 * 1024 * 1024

WaitCondition = Literal["running", "ready", "failed", "stopped", "deleted"]


class VMFailed(ClientError):  # noqa: N818 -- the name says what has happened to the VM
    """The VM that was waited for has failed, or was deleted. str() says why, `vm` is its last known state."""

    def __init__(self, message: str, vm: VM) -> None:
        super().__init__(message)
        self.vm = vm


@dataclass(frozen=True, slots=True)
class FollowedEvent(Event):
    """An event, and the cursor with which `VMs.follow` goes on after it."""

    cursor: str = attr("cursor", "What the next request goes on after", zero="")


class VMs(ResourceMethods):
    """The methods of /vms. VMs are named by their `name`; a name can be used again after its VM was deleted."""

    async def create(
        self,
        vm: JSON | None = None,
        /,
        *,
        queue: Literal["never"] | None = None,
        strict: bool = False,
        **fields: Unpack[NewVMFields],
    ) -> VM:
        """Create a VM from a JSON object, from fields (`name`, `image`, `cpu`, ...), or both. Return it as it was stored.

        It begins as "pending"; see `wait`. With `queue="never"` it is created only if a worker can take it now. With
        `strict`, unknown fields of the JSON object are refused. Raises ResponseError: 409 if the name is taken, 412 for
        an invalid field; with `queue="never"` 503 for a VM that a worker may take later, and 412 for one that none ever
        can.
        """
        query = {"queue": queue} if queue is not None else {}
        body = {**(vm or {}), **_spec_to_json(fields)}
        return await self._fetch(VM, "POST", "/vms", query={**query, **_strictly(strict)}, json=body)

    async def get(self, name: str) -> VM:
        """Return a VM. Raises ResponseError: 404."""
        return await self._fetch(VM, "GET", url_path("vms", name))

    async def list_with_revision(
        self, *, worker: str | None = None, filter: Conditions | None = None
    ) -> tuple[list[VM], int]:
        """Return as `list` does, and the revision of the stored state (0: the controller does not tell it)."""
        answer = await self._transport.request("GET", "/vms", query=filter_query(filter, worker))
        revision = answer.headers.get("x-stored-revision") or "0"
        return decode_answers(VM, answer.json()), int(revision) if revision.isdecimal() else 0

    async def list(self, *, worker: str | None = None, filter: Conditions | None = None) -> list[VM]:
        """Return all VMs in the order of their names, or those that are assigned to one worker, or that match a filter.

        A filter maps `worker`, `status`, `image`, `name`, `createdBy`, `metadata.KEY` or `label.KEY` to a value; all
        must hold. A path with "!" at its end negates: `{"metadata.pipeline": "17", "status!": "failed"}`. The value of
        `name` may end in "*". Raises ResponseError: 400 for another path.
        """
        return (await self.list_with_revision(worker=worker, filter=filter))[0]

    async def list_page(
        self, limit: int, *, filter: Conditions | None = None, after: str | None = None
    ) -> tuple[Sequence[VM], str | None]:
        """Return up to `limit` VMs in the order of their names, and what the next page begins `after` (None: the end).

        Raises ResponseError: 400.
        """
        query = {**filter_query(filter), "limit": str(limit), **({"continue": after} if after else {})}
        answer = await self._transport.request("GET", "/vms", query=query)
        return decode_answers(VM, answer.json()), answer.headers.get("x-continue")

    async def replace(self, name: str, spec: JSON, *, strict: bool = False) -> VM:
        """Replace a VM's specification, and return the VM.

        A boolean that `spec` omits becomes false and a list becomes empty; other omitted fields keep their values.
        Raises ResponseError: 404, 412.
        """
        body = {"name": name, **spec}
        return await self._fetch(VM, "PUT", url_path("vms", name), query=_strictly(strict), json=body)

    async def patch(
        self, name: str, patch: JSON | None = None, /, *, strict: bool = False, **fields: Unpack[VMFields]
    ) -> VM:
        """Change the named fields of a VM's specification, and return the VM.

        `patch` is a JSON merge patch (RFC 7396), in which null resets a field. Raises ResponseError: 404, 412.
        """
        body = {**(patch or {}), **_spec_to_json(fields)}
        return await self._fetch(VM, "PATCH", url_path("vms", name), query=_strictly(strict), json=body)

    async def delete(self, name: str) -> None:
        """Delete a VM. Its worker stops and removes it a moment later. Raises ResponseError: 404."""
        await self._transport.request("DELETE", url_path("vms", name))

    async def delete_matching(self, filter: Conditions, *, dry_run: bool = False) -> Sequence[str]:
        """Delete the VMs that match a filter (see `list`), and return their names. With `dry_run` nothing is deleted.

        Raises ResponseError: 400 for a filter that every VM may match.
        """
        query = {**filter_query(filter), **({"dryRun": "true"} if dry_run else {})}
        return list((await self._fetch(BulkDeletion, "DELETE", "/vms", query=query)).deleted)

    async def restart(self, name: str) -> VM:
        """Request that a VM is ended and started anew from its image, whatever its restart policy. Return the VM.

        Raises ResponseError: 404, and 412 for a pending VM or a worker that cannot do it.
        """
        return await self._fetch(VM, "POST", url_path("vms", name, "restart"))

    @asynccontextmanager
    async def watch(self, name: str) -> AsyncIterator[AsyncIterator[tuple[str, VM]]]:
        """Follow a VM for the time of the block.

        Yields an iterator of (kind, VM), where kind is "ADDED" for its state at the beginning, "MODIFIED" or "DELETED".
        The iterator ends when the controller stops, and raises ConnectError when the connection is lost. Raises
        ResponseError: 404.
        """
        async with self._transport.stream(url_path("vms", name), {"watch": "true"}) as pieces:
            yield Items(partial(_take_change, JSONLines(pieces)))

    async def wait(
        self, name: str, until: WaitCondition = "running", *, seconds: float | None = None, uid: str | None = None
    ) -> VM:
        """Wait until a VM is running, ready, failed, stopped or deleted, and return it. `seconds` None: for any time.

        "ready": it runs, and its startup script has ended with exit code 0. With `uid`, only the VM of this uid is
        meant. When the controller is away, as `follow` it goes on for ten minutes. Raises VMFailed if the VM fails or is
        deleted before that, and ResponseError: 404, 503 if it cannot come true or the time is over; ConnectError if the
        controller is away then.
        """
        vm, absence = await self.get(name), Absence()
        deadline = trio.current_time() + (math.inf if seconds is None else seconds)
        while True:
            asked = trio.current_time()
            wait = max(0, math.ceil(min(_WAIT_SECONDS, deadline - asked)))
            query = {"waitFor": until, "wait": str(wait), "uid": uid or vm.uid}
            try:
                found = await self._fetch(VM, "GET", url_path("vms", name), query=query)
            except ResponseError as error:
                if error.status == 404 and uid in (None, vm.uid):
                    raise VMFailed(f'VM "{name}" was deleted', vm) from None
                if error.status < SERVER_ERRORS:
                    raise
                if trio.current_time() >= deadline or (error.status == 503 and error.retry_after is None):
                    await self._raise_failure(name)
                    raise
                if trio.current_time() - asked >= max(wait, error.retry_after or 0):
                    # The controller has answered after it has waited, so it is not absent.
                    absence = Absence()
                    continue
                absence.bear(error)
            except ConnectError as error:
                if trio.current_time() >= deadline:
                    raise
                absence.bear(error)
            else:
                if not _holds(found, until):
                    raise ClientError(f"{self._transport.url} cannot wait for VMs; upgrade the controller")
                return found
            await absence.pause(max(0, deadline - trio.current_time()))

    async def _raise_failure(self, name: str) -> None:
        """Raise VMFailed if a VM has failed."""
        vm = await self.get(name)
        if vm.state.status == "failed":
            raise VMFailed(f'VM "{name}" failed: {vm.state.status_message}', vm) from None

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

    @asynccontextmanager
    async def follow(
        self,
        name: str,
        *,
        kinds: Sequence[str] = (),
        until: Literal["ready", "ended"] | None = None,
        cursor: str | None = None,
    ) -> AsyncIterator[AsyncIterator[FollowedEvent]]:
        """Follow the events of a VM for the time of the block: those that are there, and those that come.

        Yields an iterator of events, which ends with the VM, or when it is `until`. `kinds` are "log_line" and
        "lifecycle"; without any, lifecycle events are left out. With `cursor` the events after that one are followed. A
        lost connection is opened again, and nothing is missed. Raises ResponseError: 404, and 400 for an invalid
        cursor.
        """
        after = cursor

        def query() -> dict[str, str]:
            given = {"follow": "true", "kinds": ",".join(kinds), "until": until, "cursor": after}
            return {key: value for key, value in given.items() if value}

        def refuse(error: ResponseError) -> AfterRefusal:
            # The VM was deleted, or its name belongs to another VM, which does not have the cursor.
            is_over = error.status == 404 or (error.status == 400 and after != cursor)
            return "end" if is_over else "raise"

        async def take() -> FollowedEvent | None:
            nonlocal after
            if (line := await lines.take()) is None:
                return None
            event = decode_answer(FollowedEvent, line)
            after = event.cursor
            return event

        path = url_path("vms", name, "events")
        async with ResumingLines(self._transport, path, query, refuse, may_end=until is not None) as lines:
            yield Items(take)

    async def append_events(self, name: str, events: Sequence[JSON], *, uid: str | None = None) -> None:
        """Append events to those of a VM, in order. With `uid`, only if the VM has that uid. Used by workers.

        Raises ResponseError: 404.
        """
        query = None if uid is None else {"uid": uid}
        await self._transport.request("POST", url_path("vms", name, "events"), query=query, json=events)

    def port_forward(self, name: str, port: int, *, wait: int = 10) -> AbstractAsyncContextManager[TunnelStream]:
        """Connect to a TCP port of a VM, for the time of an `async with` block.

        The block gets a `trio.abc.Stream` that has no half-close, and it is closed at the end of the block. The
        controller waits up to `wait` seconds for the VM to run and for its worker to connect. Raises ResponseError:
        404, and 503 if there is no connection. A BrokenResourceError of the block becomes ConnectError.
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

        `interactive` gives it a stdin, `tty` a terminal of `rows` by `cols`. `env` are environment variables for it,
        and `workdir` is its directory. The controller waits up to `wait` seconds for the VM to run and to answer.
        Raises ResponseError: 400 for invalid arguments, 404, and 503 if the VM cannot be reached.
        """
        query = {"command": command, "wait": str(wait), **({"workdir": workdir} if workdir else {})}
        query |= {"interactive": "true"} if interactive else {}
        query |= {"tty": "true", "rows": str(rows), "cols": str(cols)} if tty else {}
        query |= {f"env[{key}]": value for key, value in (env or {}).items()}
        async with self._transport.websocket(url_path("vms", name, "exec"), query) as websocket:
            yield RunningCommand(websocket)

    async def run(
        self, name: str, script: str, *, env: Mapping[str, str] | None = None, workdir: str = "", wait: int = 60
    ) -> CommandResult:
        """Run a script by the user's shell in a VM. Return its exit code and its output, of 16 MiB at most.

        For `env`, `workdir` and `wait` see `exec`. The script's stdin is at its end. Raises ResponseError: 404, and 503
        if the VM cannot be reached.
        """
        # A script may be too long for the query.
        reading = 'eval "$(cat)"'
        async with self.exec(name, reading, interactive=True, env=env, workdir=workdir, wait=wait) as command:
            await command.send(script.encode())
            await command.send_eof()
            return await command.wait_result(_MAX_OUTPUT_BYTES)

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


async def _take_change(lines: JSONLines) -> tuple[str, VM] | None:
    """Return the next change of a VM, None at the end. Raises ClientError."""
    change = await lines.take()
    if change is None:
        return None
    if "type" not in change or "object" not in change:
        raise ClientError(f"a line of the watch is {excerpt(str(change))}, expected a change of a VM")
    return str(change["type"]), decode_answer(VM, change["object"])


def _spec_to_json(fields: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments of a method as JSON: the name of a VM, and fields of its specification."""
    name = {"name": fields["name"]} if "name" in fields else {}
    return {**name, **fields_to_json(VMSpec, {key: value for key, value in fields.items() if key != "name"})}


def _strictly(strict: bool) -> dict[str, str]:
    return {"fieldValidation": "strict"} if strict else {}


def _holds(vm: VM, until: WaitCondition) -> bool:
    """Return whether a condition may hold for a VM. A controller that knows no `waitFor` returns any VM."""
    if until in ("running", "failed"):
        return vm.state.status == until
    return until != "ready" or vm.condition("ready")
