"""The API without sockets: `Served` passes requests to the controller's handlers, as the HTTP server does.

State and events are on the real disk, and their writers run. Only the HTTP server and its sockets are left out.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from orchard import transitions
from orchard.api import API, ControllerParts
from orchard.control.deadlines import Deadlines, StoredClock
from orchard.control.figures import make_figures
from orchard.control.reactions import Reactions
from orchard.control.recorder import Recorder
from orchard.control.scheduling_loop import SchedulingLoop
from orchard.control.stored_data import DEFAULT_OFFLINE_TIMEOUT, renew_promises
from orchard.control.webhooks import Webhooks
from orchard.decisions.access_tokens import AccessTokens
from orchard.decisions.gate import Gate
from orchard.decisions.login_limit import LoginLimit
from orchard.net.request import (
    BodyPiece,
    HTTPError,
    Request,
    Response,
    SlowAdmission,
    Stream,
    WhileConnected,
    error_response,
)
from orchard.operations import make_api
from orchard.schema import ServiceAccount, Worker
from orchard.sessions import AccountSessions
from orchard.ssh.exec import Executor
from orchard.storage.errors import StorageError
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.storage.journal import Disk
from orchard.storage.records import RunInThread
from orchard.store import Store, check
from orchard.tunnel import Rendezvous, VMAccess

BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Answered:
    """A status, the headers by lower-case name, and the body, parsed (None: empty)."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def message(self) -> str:
        return str(self.body["message"])


class HostClock:
    """The wall clock of a host, by which deadlines are stored: BEGAN now, then by trio's clock, wrong by `error`."""

    def __init__(self) -> None:
        self._began = trio.current_time()
        self.error = datetime.timedelta()

    def wall(self) -> datetime.datetime:
        return BEGAN + datetime.timedelta(seconds=trio.current_time() - self._began) + self.error


class Served:
    """A controller's API over a store in a directory of its own, called without sockets."""

    def __init__(self, api: API, loop: SchedulingLoop, deadlines: Deadlines) -> None:
        self.api = api
        self.loop = loop
        self.deadlines = deadlines
        self.store = api.store
        self.state = api.state
        self._watches: dict[str, object] = {}

    async def call(
        self,
        method: str,
        target: str,
        body: object = ...,
        *,
        raw: bytes = b"",
        account: tuple[str, str] | None = None,
        authorization: str | None = None,
        peer: str = "10.0.0.1",
        agent: str | None = None,
    ) -> Answered:
        """Send a request; `body` as JSON. The target is below /v1. Of an answer without an end, return the head."""
        answer = await self.ask(
            method, target, body, raw=raw, account=account, authorization=authorization, peer=peer, agent=agent
        )
        headers = {name.lower(): value for name, value in answer.headers}
        if isinstance(answer, Stream):
            return Answered(answer.status, headers, None)
        assert isinstance(answer, Response), f"{method} {target} gave {answer}"
        body = answer.body if isinstance(answer.body, bytes) else answer.separator.join(answer.body)
        is_json = answer.content_type == "application/json"
        return Answered(answer.status, headers, json.loads(body) if body and is_json else body or None)

    async def ask(
        self,
        method: str,
        target: str,
        body: object = ...,
        *,
        raw: bytes = b"",
        account: tuple[str, str] | None = None,
        authorization: str | None = None,
        peer: str = "10.0.0.1",
        agent: str | None = None,
    ) -> Any:
        """Do as `call`, and return the handler's own answer."""
        if account is not None:
            authorization = "Basic " + base64.b64encode(":".join(account).encode()).decode()
        given = {"authorization": authorization, "user-agent": agent}
        headers = {name: value for name, value in given.items() if value is not None}
        request = Request(
            method=method,
            target="/v1" + target,
            headers=headers,
            body=raw if body is ... else json.dumps(body).encode(),
            peer=peer,
        )
        try:
            admitted = self.api.admit(request)
            if isinstance(admitted, SlowAdmission):
                admitted = await admitted.work()
            answer = await self.api.handle(request, admitted)
            return await answer.work() if isinstance(answer, WhileConnected) else answer
        except HTTPError as error:
            return error_response(error)
        finally:
            assert check(self.state) == []

    async def ok(self, method: str, target: str, body: object = ...) -> Any:
        """Send a request that must succeed, and return its body."""
        answered = await self.call(method, target, body)
        assert answered.status == 200, answered
        return answered.body

    async def create(self, name: str, **spec: object) -> Any:
        return await self.ok("POST", "/vms", {"name": name, "image": "image", **spec})

    async def register(self, name: str, **fields: object) -> Any:
        """Register a worker that opens its watch and polls, so that its session is whole."""
        resources = {"org.cirruslabs.tart-vms": 2}
        body = {"name": name, "machine_id": "m", "resources": resources, **fields}
        worker = await self.ok("POST", "/workers", body)
        self.open_watch(name)
        await self.ok("GET", f"/vms?filter=worker={name}")
        return worker

    def open_watch(self, name: str) -> None:
        """Have the watch of a worker count as open until `close_watch`."""
        self._watches[name] = self.loop.liveness.record_watch(name, ("", "10.0.0.1"))

    def close_watch(self, name: str) -> None:
        self.loop.liveness.record_watch_end(name, self._watches.pop(name))

    def assign(self, name: str) -> None:
        """Assign a VM to the worker "w", whether or not the scheduler would."""
        with self.store.transaction() as tx:
            tx.put(transitions.assign(self.state.vms[name], Worker(name="w"), BEGAN))

    def schedule(self) -> float:
        """Schedule until nothing is left to do. Return when the scheduler is due again."""
        while (due := self.loop.schedule_some(trio.current_time(), self.api.parts.deadline_clock())) is None:
            pass
        return due

    def do_what_is_due(self) -> None:
        """Expire, end and delete what is due."""
        while self.deadlines.step():
            pass

    async def watch(self, name: str, nursery: trio.Nursery) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Watch a VM. Return a channel of the parsed lines."""
        return await self.lines(f"/vms/{name}?watch=true", nursery)

    async def lines(
        self, target: str, nursery: trio.Nursery, *, account: tuple[str, str] | None = None
    ) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Ask for lines of JSON. Return a channel of them, which ends when they end."""
        answer = await self.ask("GET", target, account=account)
        assert isinstance(answer, Stream), answer
        send, receive = trio.open_memory_channel[dict[str, Any]](100)

        async def take(piece: BodyPiece) -> None:
            for line in (piece if isinstance(piece, bytes) else b"".join(piece)).splitlines():
                await send.send(json.loads(line))

        def take_now(piece: BodyPiece) -> bool:
            lines = (piece if isinstance(piece, bytes) else b"".join(piece)).splitlines()
            if len(lines) > 100 - send.statistics().current_buffer_used:
                return False
            for line in lines:
                send.send_nowait(json.loads(line))
            return True

        async def produce() -> None:
            with send:
                await answer.produce(Sender(take, take_now))

        nursery.start_soon(produce)
        return receive


class Sender:
    """Passes the pieces of a stream to `take`, which may block, unless `take_now` returns that it has taken them."""

    def __init__(
        self, take: Callable[[Any], Awaitable[None]], take_now: Callable[[BodyPiece], bool] = lambda _: False
    ) -> None:  # fmt: skip
        self._take = take
        self._take_now = take_now
        self._rest: BodyPiece = b""

    async def __call__(self, piece: BodyPiece) -> None:
        rest, self._rest = self._rest, b""
        for one in (rest, piece):
            if one:
                await self._take(one)

    def now(self, piece: BodyPiece) -> bool:
        assert not self._rest
        if self._take_now(piece):
            return True
        self._rest = piece
        return False


async def at_once(work: Callable[..., Any], *arguments: Any, limiter: object = None) -> Any:
    """Do blocking work where it is asked for: the clock of a test would jump while a thread does it."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


@asynccontextmanager
async def served(
    directory: Path,
    *accounts: ServiceAccount,
    disk: Disk | None = None,
    offline_timeout: float = DEFAULT_OFFLINE_TIMEOUT,
    host_clock: HostClock | None = None,
    in_thread: RunInThread = trio.to_thread.run_sync,
) -> AsyncIterator[Served]:
    """Serve the API from `directory`; it asks for credentials if accounts are given.

    The time is always BEGAN, except for deadlines.
    """
    store = await Store.open(FileEngine(directory, disk, in_thread), BEGAN)
    try:
        renew_promises(store, offline_timeout)
        events = EventLog(*event_files(directory / "events", in_thread=in_thread))
        events.open({vm.uid for vm in store.state.vms.values()})
        history = History(history_file(directory, in_thread=in_thread))
        history.open()
        rendezvous = Rendezvous()
        clock = StoredClock(store, (host_clock or HostClock()).wall, trio.current_time)
        loop = SchedulingLoop(store, offline_timeout, lambda: BEGAN)
        deadlines = Deadlines(store, clock, loop.liveness, loop.states)
        sessions = AccountSessions(store.state.accounts, lambda: BEGAN)
        store.on_durable(Recorder(events, history, lambda: BEGAN).record)
        store.on_durable(Reactions(rendezvous, loop, sessions, clock.now).react)
        figures = make_figures(store, loop.liveness, clock.now)
        webhooks = Webhooks(store, loop, figures.lives.failure_of, clock.now)
        vm_access = VMAccess(store, rendezvous)
        tokens = AccessTokens(b"k" * 32, store.state.accounts, lambda: BEGAN)
        gate = Gate(store.state.accounts, tokens, LoginLimit(trio.current_time)) if accounts else None
        parts = ControllerParts(
            store,
            events,
            history,
            loop.liveness,
            rendezvous,
            vm_access,
            Executor(vm_access),
            sessions,
            loop.states,
            gate,
            tokens,
            scheduling=loop,
            clock=lambda: BEGAN,
            deadline_clock=clock.now,
            figures=figures,
            webhooks=webhooks,
        )
        api = make_api(parts)
        async with trio.open_nursery() as writers:
            await writers.start(store.run)
            await writers.start(events.run)
            await writers.start(history.run)
            with store.transaction() as tx:
                for account in accounts:
                    tx.put(account)
            yield Served(api, loop, deadlines)
            with suppress(StorageError):
                await store.wait_durable()
            writers.cancel_scope.cancel()
    finally:
        store.close()
