"""The REST API: admission of requests, and the common part of their answers.

`API.admit` sees a request before its body is read. It finds the operation, a row of the table in operations.py, and
checks the credentials. `API.handle` then lets the operation's handler answer.

The handlers are in handlers/, by resource. A handler is a plain function over the state in memory, and changes it in
one transaction. So no handler sees half of another's change. `handle` sends no answer before everything that the answer
is based on is durable. Handlers that read events or connect to a VM are `async`.

handlers/answers.py maps the errors of the layers below to HTTP, and makes the Warning header. Query parameters are read in
handlers/parameters.py.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import trio

from orchard import auth
from orchard.base.nursery import sleep_pauses
from orchard.codec import parse_client_json
from orchard.control.figures import Figures
from orchard.control.scheduling_loop import SchedulingLoop
from orchard.control.webhooks import Webhooks
from orchard.control.worker_states import WorkerStates
from orchard.decisions.access_tokens import Access, AccessTokens
from orchard.decisions.gate import Gate, named_account
from orchard.decisions.liveness import Liveness
from orchard.handlers import parameters
from orchard.handlers.admission import Admitted, APIOperation, refuse_unknown, subject_of
from orchard.handlers.answers import PRODUCT_ERRORS, HeaderPairs, found, http_error, not_leading, vm_is_gone
from orchard.handlers.parameters import read_choice
from orchard.net.browsers import BrowserRules, without_challenge
from orchard.net.request import (
    AnyResponse,
    HTTPError,
    Request,
    Response,
    Router,
    SlowAdmission,
    Stream,
    WebSocketUpgrade,
    WhileConnected,
)
from orchard.resources.cluster import ClusterIdentity
from orchard.schema import (
    VM,
    ClusterSettings,
    Role,
    ServiceAccount,
    Worker,
)
from orchard.sessions import AccountSessions
from orchard.ssh import exec as vm_exec
from orchard.storage.events import EventLog
from orchard.storage.history import History
from orchard.store import Store
from orchard.tunnel import Rendezvous, VMAccess

# How often a read is tried when the state that it is based on could not be made durable.
_READ_ATTEMPTS = 3
# Bytes of JSON whose reading takes some milliseconds. Larger bodies are read in a thread.
_LARGE = 16 * 1024

StoredT = TypeVar("StoredT", VM, Worker, ServiceAccount, ClusterSettings, ClusterIdentity)
ReadT = TypeVar("ReadT")


@dataclass(frozen=True, slots=True)
class ControllerParts:
    """The parts of a controller that handlers work on.

    `browsers` says which requests of browsers are refused. `gate` None admits every request to everything. `tokens`
    issues access tokens. `prefix` is the path before /v1, and `offline_timeout` is in seconds. Stored deadlines are
    made from `deadline_clock`.
    """

    store: Store
    events: EventLog
    history: History
    liveness: Liveness
    rendezvous: Rendezvous
    vm_access: VMAccess
    executor: vm_exec.Executor
    sessions: AccountSessions
    worker_states: WorkerStates
    gate: Gate | None
    tokens: AccessTokens
    scheduling: SchedulingLoop
    clock: Callable[[], datetime.datetime]
    deadline_clock: Callable[[], datetime.datetime]
    figures: Figures
    webhooks: Webhooks
    browsers: BrowserRules = field(default_factory=BrowserRules)
    prefix: str = ""
    offline_timeout: float = 0.0


class API:
    """The common part of all handlers: admission, reading of bodies, durable answers."""

    def __init__(
        self,
        parts: ControllerParts,
        operations: Sequence[APIOperation],
        document: bytes,
        pages: Sequence[APIOperation] = (),
    ) -> None:
        """`operations` are those of operations.py, and `document` describes them in OpenAPI.

        The paths of `pages` are not below /v1.
        """
        self.parts = parts
        self.store = parts.store
        self.state = parts.store.state
        # One thread: only one thread runs Python at a time, so several would delay all other requests for longer.
        self._parsing = trio.CapacityLimiter(1)
        # The highest revision whose loss was accepted since the start.
        self.accepted_revision = 0
        self.has_pages = bool(pages)
        routes = [(op.method, f"{parts.prefix}/v1{op.path}", op) for op in operations]
        self._router = Router([*routes, *((op.method, f"{parts.prefix}{op.path}", op) for op in pages)])
        self.document = document

    # -- admission and answer

    def admit(self, request: Request) -> Admitted | SlowAdmission[Admitted]:
        """Find a request's operation and its sender, before its body is read. Raises HTTPError."""
        self.parts.browsers.check(request)
        try:
            operation, name = self._router.match(request.method, request.path)
            request.route = operation.path
            gate = self.parts.gate
            if operation.role == "public" or gate is None:
                return Admitted(operation, name, "")
            authorization, bearer = request.headers.get("authorization"), operation.bearer is not None
            # A request without credentials is not a guess.
            if authorization is None:
                return self._admit_sender(request, operation, name, gate.identify(None))
            sender = gate.recall(authorization, bearer=bearer)
            if sender is None:
                account = named_account(authorization)
                check = partial(gate.identify, authorization, bearer=bearer)
                if gate.limit.is_limited(request.peer, account):
                    pauses = gate.limit.check(request.peer, account, check)
                    return SlowAdmission(partial(self._admit_later, request, operation, name, pauses))
                sender = gate.limit.check_now(request.peer, account, check)
            return self._admit_sender(request, operation, name, sender)
        except PRODUCT_ERRORS as error:
            raise without_challenge(request, http_error(error)) from error

    def _admit_sender(
        self, request: Request, operation: APIOperation, name: str, sender: ServiceAccount | Access
    ) -> Admitted:
        """Return the admission of a sender to an operation. Raises HTTPError(404), ForbiddenError."""
        account = request.account = sender.account if isinstance(sender, Access) else sender.name
        if isinstance(sender, Access):
            vm = found("VM", self.state.vms, name)
            if vm.uid != sender.vm_uid:
                raise auth.ForbiddenError(f'the access token is for another VM than "{name}" with uid {vm.uid}')
            return Admitted(operation, name, account, auth.ISSUER_ROLE, f"{account} {sender.token_id}")
        role = None if operation.role == "public" else operation.role
        if role is not None:
            auth.require(sender, role)
        return Admitted(operation, name, account, role, account)

    async def _admit_later(
        self,
        request: Request,
        operation: APIOperation,
        name: str,
        pauses: Generator[float, None, ServiceAccount | Access],
    ) -> Admitted:
        """Admit a sender whose credentials are checked after pauses. Raises HTTPError, but not 401."""
        try:
            return self._admit_sender(request, operation, name, await sleep_pauses(pauses))
        except PRODUCT_ERRORS as error:
            raise http_error(error) from error

    def refuse_all(self) -> HTTPError | None:
        """Return the error that replaces every answer while another controller may lead; None while this one leads."""
        return None if self.store.may_answer() else not_leading()

    async def handle(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Answer an admitted request. Raises HTTPError."""
        waits, waits_with = admitted.operation.waits, admitted.operation.waits_with
        if waits or (waits_with is not None and request.query.one(waits_with.name)):
            return WhileConnected(partial(self._answer_later, request, admitted), endless=not waits)
        return await self._answer(request, admitted)

    async def _answer_later(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Answer a request that waits, unless its sender is deleted or loses its role meanwhile. Raises HTTPError."""
        try:
            with self.parts.sessions.cancel_when_over(admitted.account, admitted.role):
                return await self._answer(request, admitted)
        except auth.ForbiddenError as error:
            raise http_error(error) from error

    async def _answer(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Let the handler answer, and wait until everything that its answer is based on is durable.

        An error is based on the state, too: the VM that "already exists" may not be durable yet.
        """
        operation, remarks = admitted.operation, admitted.remarks
        attempts = _READ_ATTEMPTS if operation.method == "GET" else 1
        try:
            await self._read(request, admitted)
        except PRODUCT_ERRORS as error:
            raise http_error(error) from error
        while True:
            attempts -= 1
            refusal: HTTPError | None = None
            try:
                decided: AnyResponse | Awaitable[AnyResponse] = operation.handler(self, request, admitted)
                answer = await decided if isinstance(decided, Awaitable) else decided
            except HTTPError as error:
                refusal = error
            except PRODUCT_ERRORS as error:
                refusal = http_error(error)
            try:
                await self.store.wait_durable()
            except PRODUCT_ERRORS as error:
                # The changes on which the answer is based were undone. A read can be repeated.
                if attempts:
                    continue
                raise http_error(error) from error
            if refusal is not None:
                refusal.headers = (*refusal.headers, *remarks.headers())
                raise refusal
            if isinstance(answer, Response) and isinstance(answer.body, bytes) and answer.body:
                # So that a terminal shows its prompt on a line of its own.
                answer.body += b"\n"
            if remarks and isinstance(answer, Response | Stream):
                answer.headers = (*answer.headers, *remarks.headers())
            if isinstance(answer, Stream | WebSocketUpgrade):
                subject = subject_of(request, admitted)
                self.parts.sessions.tie(answer, admitted.account, admitted.role, subject)
            return answer

    async def _read(self, request: Request, admitted: Admitted) -> None:
        """Parse the body, and look for unknown query parameters. Raises HTTPError, ValidationError."""
        operation, query = admitted.operation, request.query
        admitted.remarks.add_unknown("query parameter", parameters.unknown_parameters(query, operation.query))
        admitted.strict = read_choice(query, parameters.FIELD_VALIDATION) == "strict"
        refuse_unknown(admitted)
        if operation.body is not None and (request.body or operation.body_required):
            if not request.body:
                raise HTTPError(400, "the body is empty, expected JSON")
            parse = partial(parse_client_json, request.body)
            admitted.body = await self.in_thread(len(request.body) > _LARGE, parse)

    async def in_thread(self, is_long: bool, work: Callable[[], ReadT]) -> ReadT:
        """Return the result of pure work, from a thread if it takes long."""
        if not is_long:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._parsing)

    def put(self, new: StoredT, old: StoredT | None = None) -> None:
        """Store a resource in a transaction of its own, unless it is equal to the `old` one."""
        if new != old:
            with self.store.transaction() as tx:
                tx.put(new)

    def find_vm(self, admitted: Admitted, uid: str | None = None) -> VM:
        """Return the VM that the path names. Raises HTTPError(404), also if it has another uid than a given one."""
        vm = found("VM", self.state.vms, admitted.name)
        if uid and uid != vm.uid:
            raise vm_is_gone(vm.name, uid)
        return vm

    def answer_vm(self, name: str) -> Response:
        """Return an answer with a VM as it is stored."""
        return Response(200, self.state.json["vm"][name])

    def answer_list(self, items: Iterable[bytes], headers: HeaderPairs | None = None) -> Response:
        """Return an answer with a JSON array of objects, in pieces.

        `headers` are those of the state that the objects are from; None: of the present one.
        """
        pieces = list(items) or [b""]
        pieces[0] = b"[" + pieces[0]
        pieces[-1] += b"]\n"
        return Response(200, pieces, self.revision_headers() if headers is None else headers, separator=b",")

    def revision_headers(self) -> HeaderPairs:
        """Return the headers with the revisions of a list's state."""
        log = self.store.log
        return (("X-Stored-Revision", str(self.state.revision)), ("X-Revision", log.revision(log.last)))

    def delete(self, resource: VM | Worker | ServiceAccount) -> AnyResponse:
        with self.store.transaction() as tx:
            tx.delete(resource)
        return Response(200)

    def roles(self, admitted: Admitted) -> tuple[Role, ...]:
        """Return the roles of a request's sender: all roles where no credentials are asked for."""
        if self.parts.gate is None:
            return auth.ROLES
        account = self.state.accounts.get(admitted.account)
        return account.roles if account is not None else ()

    def may(self, admitted: Admitted, role: Role) -> bool:
        return role in self.roles(admitted)
