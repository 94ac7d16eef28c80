"""The REST API: what each request does to the cluster's state. Law: decides in `def`; waits only for the disk.

`API.admit` sees a request before its body is read: it finds the operation, asks who the client is, and whether it may.
`API.handle` lets the operation's handler decide. Handlers are plain functions over the state in memory, and what they
change, they change in one transaction, so none ever sees half of another's work. No answer leaves before everything
that it could be based on is on disk. OPERATIONS, at the end, is the table of contents.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import trio
from trio_websocket import WebSocketConnection

from orchard import __version__, auth, transitions
from orchard.codec import APIError, InvalidError, MalformedError, dump_json, encode, parse_json, replace, shown
from orchard.liveness import Liveness
from orchard.net.openapi import Operation, Parameter, SecurityScheme, array_of, document, ref
from orchard.net.request import (
    AnyResponse,
    HTTPError,
    Request,
    Response,
    Route,
    Router,
    Stream,
    TunnelUpgrade,
    WebSocketUpgrade,
    WhileConnected,
)
from orchard.schema import (
    IP,
    MAX_NAME,
    VM,
    ControllerInfo,
    Role,
    ServiceAccount,
    VMAccessToken,
    VMSpec,
    Worker,
    account_from_client,
    allows,
    check_name,
    components,
    events_from_client,
    name_of,
    new_spec,
    patched_spec,
    replaced_spec,
    report_from_worker,
    settings_from_client,
    ttl_from_client,
    worker_from_client,
)
from orchard.ssh import exec as vm_exec
from orchard.storage.events import EventLog
from orchard.store import SETTINGS, Change, Store, encoded, watch_line
from orchard.tunnel import Rendezvous, UnknownSessionError, UnreachableError, VMAccess, VMGoneError, WorkerEnd

CAPABILITIES = ("rpc-v2", "vm-state-endpoint")  # by which existing workers choose how to talk
MAX_LIMIT = 1_000_000_000  # of `limit`: more events than a VM may leave
WAIT = 10  # seconds for a port forwarding that names none
MAX_WAIT = 65_535  # seconds, as the API's description has it
REREADS = 3  # times that a read is done again because what it was based on was taken back
WARNED = 8  # unknown fields that a Warning names
_DIGITS = re.compile(r"[0-9]{1,10}")
# Who sends a request to a controller that asks for no credentials.
_ANYBODY = ServiceAccount(name="", token="", roles=auth.ROLES)

ObjectT = TypeVar("ObjectT", VM, Worker, ServiceAccount)


@dataclass(frozen=True, slots=True)
class Admitted:
    """An operation of the table that a request is for, the parameters in its path, and who sent it ("": anybody)."""

    operation: APIOperation
    params: Mapping[str, str]
    account: str


class API:
    """The handlers and what they work on. `gate` None lets everybody do everything; `offline_timeout` is in seconds.

    `waits_for` says why a new VM will wait, as far as it is known.
    """

    def __init__(
        self,
        store: Store,
        events: EventLog,
        liveness: Liveness,
        rendezvous: Rendezvous,
        vm_access: VMAccess,
        executor: vm_exec.Executor,
        gate: auth.Gate | None,
        access_key: bytes,
        *,
        prefix: str = "",
        offline_timeout: float = 0.0,
        waits_for: Callable[[VMSpec], str] = lambda spec: "",
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self.store = store
        self.state = store.state
        self.events = events
        self.liveness = liveness
        self.rendezvous = rendezvous
        self.vm_access = vm_access
        self.executor = executor
        self.gate = gate
        self.access_key = access_key
        self.offline_timeout = offline_timeout
        self.failures = auth.Failures(trio.current_time)
        self.waits_for = waits_for
        self.clock = clock
        self.prefix = f"{prefix}/v1"
        self._router = Router([Route(op.method, self.prefix + op.path, op) for op in OPERATIONS])
        self._document = dump_json(describe_api(self.prefix))

    def admit(self, request: Request) -> Admitted:
        """Find a request's operation and who sends it, before its body is read. Raises HTTPError."""
        account = ""
        try:
            route, params = self._router.match(request.method, request.path)
            operation: APIOperation = route.endpoint
            if operation.role != "public":
                who = self._identify(request, operation)
                account = who.account if isinstance(who, auth.Access) else who.name
                self._authorize(who, operation, params)
            return Admitted(operation, params, account)
        except REFUSALS as error:
            raise http_error(error, account) from error

    def _identify(self, request: Request, operation: APIOperation) -> ServiceAccount | auth.Access:
        """Return the account, or what the access token is for. Raises UnauthenticatedError, TooManyFailuresError."""
        authorization = request.headers.get("authorization")
        try:
            token = auth.bearer_of(authorization)
            if token is not None and operation.bearer is not None:
                return auth.read_access_token(self.access_key, token, self.clock())
            return _ANYBODY if self.gate is None else self.gate.identify(authorization)
        except auth.UnauthenticatedError as error:
            # A request without credentials is not a guess.
            if authorization is None:
                raise
            raise self.failures.refusal(request.peer, error) from None

    def _authorize(self, who: ServiceAccount | auth.Access, operation: APIOperation, params: Mapping[str, str]) -> None:
        """Raise ForbiddenError or HTTPError(404) unless the operation is open to the account or the access token."""
        if isinstance(who, auth.Access):
            vm = self._vm_named(params)
            if vm.uid != who.vm_uid:
                raise auth.ForbiddenError(f'the access token is for another VM than "{vm.name}" with uid {vm.uid}')
        elif operation.role is not None and operation.role != "public":
            auth.require(who, operation.role)

    async def handle(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Answer an admitted request. Raises HTTPError."""
        if admitted.operation.waits:
            return WhileConnected(partial(self._answer, request, admitted))
        return await self._answer(request, admitted)

    async def _answer(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Let the handler decide, and wait until everything that its answer is based on is durable.

        An error is based on the state, too: the VM that "already exists" may not be on disk yet.
        """
        operation = admitted.operation
        attempts = REREADS if operation.method == "GET" else 1
        while True:
            attempts -= 1
            refusal: Exception | None = None
            try:
                decided: AnyResponse | Awaitable[AnyResponse] = operation.handler(self, request, admitted)
                answer = await decided if isinstance(decided, Awaitable) else decided
            except REFUSALS as error:
                refusal = error
            try:
                await self.store.wait_durable()
            except PRODUCT_ERRORS as error:
                # The state that was read or written was taken back. A read can be done again.
                if attempts:
                    continue
                raise http_error(error) from error
            if refusal is not None:
                raise http_error(refusal) from refusal
            return answer

    # -- the controller itself

    def hello(self, request: Request, admitted: Admitted) -> AnyResponse:
        return Response(200)

    def info(self, request: Request, admitted: Admitted) -> AnyResponse:
        info = ControllerInfo(
            version=__version__,
            capabilities=CAPABILITIES,
            worker_offline_timeout=int(1000 * self.offline_timeout),  # rounded down: workers give up before we do
        )
        return _ok(dump_json(encode(info)))

    def describe(self, request: Request, admitted: Admitted) -> AnyResponse:
        return _ok(self._document)

    # -- VMs

    def create_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        raw, unknown = _body(request), list[str]()
        name = name_of(raw)
        check_name("name", name)
        spec = new_spec(raw, unknown)
        self._check_host_dirs(spec)
        with self.store.transaction() as tx:
            if name in self.state.vms:
                raise HTTPError(409, f'VM "{name}" already exists')
            tx.put(transitions.create(name, str(uuid.uuid4()), spec, self.clock(), self.waits_for(spec)))
        return self._vm(name, unknown)

    def list_vms(self, request: Request, admitted: Admitted) -> AnyResponse:
        table = self.state.json["vm"]
        worker = _worker_filter(request.query.one("filter"))
        if worker is None:
            return _array(table[name] for name in self.state.names["vm"])
        self.liveness.record_poll(worker, _source(request, admitted))
        return _array(table[name] for name in sorted(self.state.vms_by_worker.get(worker, ())))

    def get_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm_named(admitted.params)
        if not _flag(request, "watch"):
            return self._vm(vm.name)

        async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
            try:
                await self._watch(vm, send)
            except PRODUCT_ERRORS as error:
                raise http_error(error) from error

        return Stream(produce)

    async def _watch(self, known: VM, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Send what became of a VM since `known`, and becomes of it and those that get its name after it."""
        name = known.name
        with self.store.watch("vm", name) as changes:
            # What follows is based on what is in memory now, and so may be in `changes` once more when it is durable.
            now = self.state.vms.get(name)
            lines = [watch_line("ADDED", self.state.json["vm"].get(name) or encoded(known))]
            version = now.meta.version if now is not None else self.state.revision  # that of a deletion is no VM's
            await self.store.wait_durable()
            if now is None:  # it was deleted between the first look and this one
                lines.append(watch_line("DELETED", encoded(known)))
            await send(b"".join(lines))
            async for change in changes:
                if _is_news(change, version):
                    await send(change.line)

    def replace_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._change_vm(request, admitted, replaced_spec)

    def patch_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._change_vm(request, admitted, patched_spec)

    def _change_vm(
        self, request: Request, admitted: Admitted, read: Callable[[VMSpec, object, list[str]], VMSpec]
    ) -> AnyResponse:
        old = self._vm_named(admitted.params)
        unknown: list[str] = []
        spec = read(old.spec, _body(request), unknown)
        if spec.host_dirs != old.spec.host_dirs:
            self._check_host_dirs(spec)
        new = transitions.change(old, spec)
        if new is not old:
            with self.store.transaction() as tx:
                tx.put(new)
        return self._vm(old.name, unknown)

    def delete_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm_named(admitted.params)
        with self.store.transaction() as tx:
            tx.delete(vm)
        return Response(200)

    def report_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        old = self._vm_named(admitted.params)
        unknown: list[str] = []
        new = transitions.report(old, report_from_worker(_body(request), unknown), self.clock())
        if new is not old:
            with self.store.transaction() as tx:
                tx.put(new)
        return Response(200, headers=_warning(unknown))

    def _vm_named(self, params: Mapping[str, str]) -> VM:
        return _found("VM", params["name"], self.state.vms.get(params["name"]))

    def _vm(self, name: str, unknown: Sequence[str] = ()) -> Response:
        return _ok(self.state.json["vm"][name], _warning(unknown))

    def _check_host_dirs(self, spec: VMSpec) -> None:
        for index, host_dir in enumerate(spec.host_dirs):
            if not allows(self.state.settings.host_dir_policies, host_dir):
                raise HTTPError(
                    400,
                    f"hostDirs[{index}].path is {shown(host_dir.path)}{'' if host_dir.ro else ', not read only'},"
                    " which no hostDirPolicy of the cluster settings allows",
                )

    # -- into a VM

    async def forward_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        port = _required(_number(request, "port", 1, 65535), "port", "a port number from 1 to 65535")
        wait = _number(request, "wait", 0, MAX_WAIT)
        vm = self._vm_named(admitted.params)
        request.require_websocket()
        return self._relay_to(await self.vm_access.connect(vm, port, WAIT if wait is None else wait))

    async def forward_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        port = _required(_number(request, "port", 1, 65535), "port", "a port number from 1 to 65535")
        wait = _number(request, "wait", 0, MAX_WAIT)
        worker = self._worker_named(admitted.params)
        request.require_websocket()
        return self._relay_to(await self.vm_access.connect_to_host(worker.name, port, WAIT if wait is None else wait))

    def _relay_to(self, end: WorkerEnd) -> TunnelUpgrade:
        return TunnelUpgrade(end.relay, self.rendezvous.ping_interval)

    async def resolve_ip(self, request: Request, admitted: Admitted) -> AnyResponse:
        wait = _number(request, "wait", 0, MAX_WAIT)
        vm = self._vm_named(admitted.params)
        address = await self.vm_access.find_address(vm, wait or 0)
        return _ok(dump_json(encode(IP(address))))

    async def execute(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm_named(admitted.params)
        wait = _number(request, "wait", 0, MAX_WAIT)
        command = _command(request)
        request.require_websocket()
        connection = await self.executor.connect(vm, WAIT if wait is None else wait)
        serve = partial(self.executor.serve, connection, command)
        return WebSocketUpgrade(serve, ping_interval=self.rendezvous.ping_interval)

    def issue_token(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm_named(admitted.params)
        unknown: list[str] = []
        ttl = ttl_from_client(parse_json(request.body) if request.body else None, unknown)
        now = self.clock().replace(microsecond=0)
        expires = now + datetime.timedelta(seconds=ttl)
        access = auth.Access(vm.name, vm.uid, admitted.account)
        token = auth.issue_access_token(self.access_key, access, now, expires, str(uuid.uuid4()))
        issued = VMAccessToken(token, "Bearer", expires, auth.TOKEN_USER, vm.name, vm.uid)
        return _ok(dump_json(encode(issued)), _warning(unknown))

    # -- what workers answer

    def answer_forward(self, request: Request, admitted: Admitted) -> AnyResponse:
        request.require_websocket()
        pending = self.rendezvous.answer_port(request.query.one("session") or "", admitted.account)
        error = request.query.one("errorMessage")
        if error:
            pending.fail(error)
            return WebSocketUpgrade(_nothing_more)
        return TunnelUpgrade(partial(self.rendezvous.lend, pending), self.rendezvous.ping_interval)

    def answer_ip(self, request: Request, admitted: Admitted) -> AnyResponse:
        pending = self.rendezvous.answer_address(request.query.one("session") or "", admitted.account)
        error, address = request.query.one("errorMessage"), request.query.one("ip")
        if error or not address:
            pending.fail(error or "no address was found")
        else:
            pending.resolve(address)
        return Response(200)

    # -- events

    async def append_events(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm_named(admitted.params)
        uid = request.query.one("uid")
        if uid not in (None, vm.uid):
            raise HTTPError(404, f'VM "{vm.name}" has uid {vm.uid}, not {shown(uid)}')
        unknown: list[str] = []
        await self.events.append(vm.uid, events_from_client(_body(request), unknown))
        return Response(200, headers=_warning(unknown))

    async def list_events(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm_named(admitted.params)
        query = request.query
        limit = _number(request, "limit", 1, MAX_LIMIT)
        order = query.one("order") or "asc"
        if order not in ("asc", "desc"):
            raise HTTPError(400, f'order is {shown(order)}, expected "asc" or "desc"')
        direction: Literal["asc", "desc"] = "asc" if order == "asc" else "desc"
        page, following = await self.events.page(vm.uid, limit, direction, query.one("cursor"))
        return _ok(page, () if following is None else (("X-Next-Cursor", following),))

    # -- workers

    def register_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        unknown: list[str] = []
        wanted = worker_from_client(_body(request), unknown)
        old = self.state.workers.get(wanted.name)
        if old is not None and old.machine_id != wanted.machine_id:
            raise HTTPError(
                409,
                f'worker "{wanted.name}" is registered from the machine {shown(old.machine_id)};'
                " give this one another name, or delete that one first",
            )
        new = replace(
            wanted,
            last_seen=None,
            created_at=old.created_at if old is not None else self.clock(),
            scheduling_paused=old.scheduling_paused if old is not None else wanted.scheduling_paused,
        )
        if new != old:
            with self.store.transaction() as tx:
                tx.put(new)
        self.liveness.record_worker(new.name, _source(request, admitted))
        if wanted.last_seen is not None:
            self.liveness.record_heartbeat(new.name, _source(request, admitted), wanted.last_seen)
        return self._worker(new.name, unknown)

    def list_workers(self, request: Request, admitted: Admitted) -> AnyResponse:
        return _array(self._worker_json(name) for name in self.state.names["worker"])

    def get_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._worker(self._worker_named(admitted.params).name)

    def put_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Take a heartbeat, which is told by its later last_seen, or else set scheduling_paused."""
        worker = self._worker_named(admitted.params)
        unknown: list[str] = []
        wanted = worker_from_client(_named(_body(request), worker.name), unknown)
        if wanted.last_seen is not None and self.liveness.record_heartbeat(
            worker.name, _source(request, admitted), wanted.last_seen
        ):
            return self._worker(worker.name, unknown)
        if wanted.scheduling_paused != worker.scheduling_paused:
            worker = replace(worker, scheduling_paused=wanted.scheduling_paused)
            with self.store.transaction() as tx:
                tx.put(worker)
        return self._worker(worker.name, unknown)

    def delete_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        worker = self._worker_named(admitted.params)
        with self.store.transaction() as tx:
            tx.delete(worker)
        return Response(200)

    def watch_rpc(self, request: Request, admitted: Admitted) -> AnyResponse:
        request.require_websocket()
        name = request.query.one("workerName")
        if not name:
            raise HTTPError(400, "workerName is missing, expected the name of a worker")
        worker = _found("worker", name, self.state.workers.get(name)).name
        source = _source(request, admitted)
        self.liveness.record_worker(worker, source)
        record_pong = partial(self.liveness.record_pong, worker)
        return WebSocketUpgrade(partial(self.rendezvous.serve, worker, source[0], record_pong))

    def _worker_named(self, params: Mapping[str, str]) -> Worker:
        return _found("worker", params["name"], self.state.workers.get(params["name"]))

    def _worker(self, name: str, unknown: Sequence[str] = ()) -> Response:
        return _ok(self._worker_json(name), _warning(unknown))

    def _worker_json(self, name: str) -> bytes:
        """Give a worker with its last_seen, which is not part of what is stored."""
        stored, last_seen = self.state.json["worker"][name], self.liveness.last_seen_json(name)
        return stored if last_seen is None else b'%b,"last_seen":"%b"}' % (stored[:-1], last_seen)

    # -- service accounts

    def create_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        unknown: list[str] = []
        account = account_from_client(_body(request), unknown)
        account = replace(account, token=account.token or auth.random_token(), created_at=self.clock())
        with self.store.transaction() as tx:
            if account.name in self.state.accounts:
                raise HTTPError(409, f'service account "{account.name}" already exists')
            tx.put(account)
        return self._account(account.name, unknown)

    def list_accounts(self, request: Request, admitted: Admitted) -> AnyResponse:
        table = self.state.json["account"]
        return _array(table[name] for name in self.state.names["account"])

    def get_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._account(self._account_named(admitted.params).name)

    def replace_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Change an account's roles and token; what is left out stays as it is."""
        old = self._account_named(admitted.params)
        unknown: list[str] = []
        new = account_from_client(_named(_body(request), old.name), unknown, base=old)
        new = replace(new, token=new.token or old.token)
        if new != old:
            with self.store.transaction() as tx:
                tx.put(new)
        return self._account(old.name, unknown)

    def delete_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        account = self._account_named(admitted.params)
        with self.store.transaction() as tx:
            tx.delete(account)
        return Response(200)

    def _account_named(self, params: Mapping[str, str]) -> ServiceAccount:
        return _found("service account", params["name"], self.state.accounts.get(params["name"]))

    def _account(self, name: str, unknown: Sequence[str] = ()) -> Response:
        return _ok(self.state.json["account"][name], _warning(unknown))

    # -- cluster settings

    def get_settings(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._settings()

    def put_settings(self, request: Request, admitted: Admitted) -> AnyResponse:
        unknown: list[str] = []
        settings = settings_from_client(_body(request), unknown)
        if settings != self.state.settings:
            with self.store.transaction() as tx:
                tx.put(settings)
        return self._settings(unknown)

    def _settings(self, unknown: Sequence[str] = ()) -> Response:
        body = self.state.json["settings"].get(SETTINGS) or encoded(self.state.settings)
        return _ok(body, _warning(unknown))


# ---- errors --------------------------------------------------------------------------------------------------------

# The status that each error of the layers below is answered with. A class stands for its subclasses, too.
ERROR_STATUS: Mapping[type[Exception], int] = {
    MalformedError: 400,
    InvalidError: 412,
    transitions.TransitionError: 412,
    transitions.StaleReportError: 404,
    auth.UnauthenticatedError: 401,
    auth.ForbiddenError: 403,
    auth.TooManyFailuresError: 429,
    UnreachableError: 503,
    VMGoneError: 404,
    vm_exec.ExecUnavailableError: 503,
    UnknownSessionError: 404,
}
PRODUCT_ERRORS: tuple[type[Exception], ...] = (APIError, *ERROR_STATUS)
REFUSALS: tuple[type[Exception], ...] = (HTTPError, *PRODUCT_ERRORS)


def http_error(error: Exception, account: str = "") -> HTTPError:
    """Return the answer to a request of `account` that failed with one of REFUSALS."""
    if isinstance(error, HTTPError):
        return HTTPError(error.status, error.message, error.headers, account=account)
    if isinstance(error, APIError):
        return HTTPError(error.status, error.message, error.headers, account=account)
    status = next(ERROR_STATUS[kind] for kind in type(error).__mro__ if kind in ERROR_STATUS)
    return HTTPError(status, str(error), _error_headers(error), account=account)


def _error_headers(error: Exception) -> Sequence[tuple[str, str]]:
    if isinstance(error, auth.UnauthenticatedError):
        return (("WWW-Authenticate", 'Basic realm="orchard"'),)
    if isinstance(error, auth.TooManyFailuresError):
        return (("Retry-After", str(error.retry_after)),)
    return ()


# ---- requests and answers ------------------------------------------------------------------------------------------


def _ok(body: bytes, headers: Sequence[tuple[str, str]] = ()) -> Response:
    return Response(200, body, headers)


def _array(items: Iterable[bytes]) -> Response:
    """AnyResponse with a JSON array of objects, in pieces."""
    pieces = [b"["]
    for item in items:
        pieces += (item, b",")
    pieces[max(1, len(pieces) - 1) :] = [b"]"]
    return Response(200, pieces)


def _is_news(change: Change, version: int) -> bool:
    """Whether a change came after a VM had this version (versions never fall, also under a reused name)."""
    if change.new is None:
        return isinstance(change.old, VM) and change.old.meta.version >= version
    return isinstance(change.new, VM) and change.new.meta.version > version


def _body(request: Request) -> Any:
    if not request.body:
        raise HTTPError(400, "the body is empty, expected JSON")
    return parse_json(request.body)


def _named(raw: Any, name: str) -> Any:
    """Let an object that is sent to a path have the name in the path, and no other."""
    if not isinstance(raw, dict) or raw.get("name") in (None, name):
        return {**raw, "name": name} if isinstance(raw, dict) else raw
    raise HTTPError(412, f"name is {shown(raw['name'])}, expected {shown(name)} as in the path, or none")


def _found(what: str, name: str, noun: ObjectT | None) -> ObjectT:
    if noun is None:
        raise HTTPError(404, f"{what} {shown(name)} does not exist")
    return noun


def _warning(unknown: Sequence[str]) -> Sequence[tuple[str, str]]:
    """Name the fields that were passed over, in a Warning header (RFC 7234, section 5.5)."""
    if not unknown:
        return ()
    names = [json.dumps(name[:MAX_NAME])[1:-1] for name in unknown[:WARNED]]
    more = f" and {len(unknown) - WARNED} more" if len(unknown) > WARNED else ""
    text = f"unknown fields were ignored: {', '.join(names)}{more}"
    return (("Warning", f'299 orchard "{text}"'),)


def _source(request: Request, admitted: Admitted) -> tuple[str, str]:
    return (admitted.account, request.peer)


def _flag(request: Request, name: str) -> bool:
    value = request.query.one(name)
    if value in (None, "false", "0"):
        return False
    if value in ("true", "1"):
        return True
    raise HTTPError(400, f"{name} is {shown(value)}, expected true or false")


def _number(request: Request, name: str, least: int, most: int) -> int | None:
    value = request.query.one(name)
    if value is None:
        return None
    if not _DIGITS.fullmatch(value) or not least <= int(value) <= most:
        raise HTTPError(400, f"{name} is {shown(value)}, expected a whole number from {least} to {most}")
    return int(value)


def _required(value: int | None, name: str, expected: str) -> int:
    if value is None:
        raise HTTPError(400, f"{name} is missing, expected {expected}")
    return value


async def _nothing_more(websocket: WebSocketConnection) -> None:
    """A WebSocket that is closed as soon as it is open."""
    await trio.lowlevel.checkpoint()


def _command(request: Request) -> vm_exec.Command:
    """Return the command that a query describes. Raises HTTPError(400), MalformedError."""
    query = request.query
    env = {
        name.removeprefix("env[").removesuffix("]"): query.one(name) or ""
        for name in query.fields()
        if name.startswith("env[") and name.endswith("]")
    }
    command = vm_exec.Command(
        command=query.one("command") or "",
        interactive=_flag(request, "interactive"),
        tty=_flag(request, "tty"),
        rows=_number(request, "rows", 1, vm_exec.MAX_TERMINAL_SIZE) or vm_exec.DEFAULT_ROWS,
        cols=_number(request, "cols", 1, vm_exec.MAX_TERMINAL_SIZE) or vm_exec.DEFAULT_COLS,
        env=env,
        workdir=query.one("workdir") or "",
    )
    command.check()
    return command


def _worker_filter(text: str | None) -> str | None:
    """Read `worker=NAME`; several with commas between them must all hold."""
    if not text:
        return None
    names = set()
    for part in text.split(","):
        path, _, name = part.partition("=")
        if path != "worker" or not name:
            raise HTTPError(400, f"filter is {shown(text)}, expected worker=NAME")
        names.add(name)
    return names.pop() if len(names) == 1 else ""  # on two workers at once is no VM


# ---- the table of contents -----------------------------------------------------------------------------------------

_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_WATCH = Parameter("watch", "Stream the VM's changes as ADDED, MODIFIED and DELETED notifications", {"type": "boolean"})
_FILTER = Parameter("filter", "`worker=NAME`: only the VMs assigned to that worker", _TEXT)
_LIMIT = Parameter("limit", "Maximum number of events to return", {"type": "integer", "minimum": 1})
_ORDER = Parameter("order", "Sort order of events; asc (default) or desc", {"type": "string", "enum": ["asc", "desc"]})
_CURSOR = Parameter("cursor", "Opaque cursor from the X-Next-Cursor response header", _TEXT)
_WORKER_NAME = Parameter("workerName", "The worker that watches", _TEXT, required=True)
_UID = Parameter("uid", "Refuse with 404 if the VM of that name has another uid", _TEXT)
_PORT = Parameter("port", "TCP port number to connect to", {**_WHOLE, "minimum": 1, "maximum": 65535}, required=True)
_WAIT = {"type": "integer", "minimum": 0, "maximum": MAX_WAIT}
_WAIT_FORWARD = Parameter("wait", "Seconds to wait for the VM to run, and for its worker", {**_WAIT, "default": 10})
_SIZE = {"type": "integer", "minimum": 1, "maximum": vm_exec.MAX_TERMINAL_SIZE}
_EXEC = (
    Parameter("command", "What to run, by the user's shell in the VM", _TEXT, required=True),
    Parameter("interactive", "Whether it takes stdin", {"type": "boolean"}),
    Parameter("tty", "Whether it gets a terminal", {"type": "boolean"}),
    Parameter("rows", "Rows of the terminal", _SIZE),
    Parameter("cols", "Columns of the terminal", _SIZE),
    Parameter("workdir", "Directory to run it in", _TEXT),
    _WAIT_FORWARD,
)
_WAIT_IP = Parameter("wait", _WAIT_FORWARD.doc, {**_WAIT, "default": 0})
_SESSION = Parameter("session", "What the action named", _TEXT)
_ERROR = Parameter("errorMessage", "Why it could not be done; empty: it was", _TEXT)
_IP = Parameter("ip", "The VM's address", _TEXT)
_NEXT = {"X-Next-Cursor": "Opaque cursor for the next page of events, if any"}
_NEW_VM = {"allOf": [ref("VMMeta"), ref("VMSpec")]}
_ANY = {"type": "object"}
_VM_TOKEN = SecurityScheme(
    "vmAccessToken", "an access token for the VM", {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
)

APIOperation = Operation[Role | Literal["public"]]

# fmt: off
OPERATIONS: tuple[APIOperation, ...] = (
    Operation("GET", "/", API.hello, None, "Check that this is an Orchard and the credentials are valid"),
    Operation("GET", "/openapi.json", API.describe, "public", "Retrieve this description", answer=_ANY),
    Operation("GET", "/controller/info", API.info, None, "Retrieve controller's information",
              answer=ref("ControllerInfo")),
    Operation("GET", "/cluster-settings", API.get_settings, "admin:read", "Retrieve cluster settings",
              answer=ref("ClusterSettings")),
    Operation("PUT", "/cluster-settings", API.put_settings, "admin:write", "Update cluster settings",
              body=ref("ClusterSettings"), answer=ref("ClusterSettings")),
    Operation("POST", "/service-accounts", API.create_account, "admin:write", "Create a Service Account",
              body=ref("ServiceAccount"), answer=ref("ServiceAccount"), problems=(409,)),
    Operation("GET", "/service-accounts", API.list_accounts, "admin:read", "List Service Accounts",
              answer=array_of("ServiceAccount")),
    Operation("GET", "/service-accounts/{name}", API.get_account, "admin:read", "Retrieve a Service Account",
              answer=ref("ServiceAccount"), problems=(404,)),
    Operation("PUT", "/service-accounts/{name}", API.replace_account, "admin:write", "Update a Service Account",
              body=ref("ServiceAccount"), answer=ref("ServiceAccount"), problems=(404,)),
    Operation("DELETE", "/service-accounts/{name}", API.delete_account, "admin:write", "Delete a Service Account",
              problems=(404,)),
    Operation("POST", "/workers", API.register_worker, "compute:write", "Register a Worker, or renew its registration",
              body=ref("Worker"), answer=ref("Worker"), problems=(409,)),
    Operation("GET", "/workers", API.list_workers, "compute:read", "List Workers", answer=array_of("Worker")),
    Operation("GET", "/workers/{name}", API.get_worker, "compute:read", "Retrieve a Worker",
              answer=ref("Worker"), problems=(404,)),
    Operation("PUT", "/workers/{name}", API.put_worker, "compute:write",
              "Send a heartbeat (with a later last_seen), or else set scheduling_paused",
              body=ref("Worker"), answer=ref("Worker"), problems=(404,)),
    Operation("DELETE", "/workers/{name}", API.delete_worker, "compute:write", "Delete a Worker; its VMs fail",
              problems=(404,)),
    Operation("POST", "/vms", API.create_vm, "compute:write", "Create a VM",
              body=_NEW_VM, answer=ref("VM"), problems=(409,)),
    Operation("GET", "/vms", API.list_vms, "compute:read", "List VMs", answer=array_of("VM"), query=(_FILTER,)),
    Operation("GET", "/vms/{name}", API.get_vm, "compute:read", "Retrieve a VM",
              answer=ref("VM"), problems=(404,), query=(_WATCH,), ndjson=True),
    Operation("PUT", "/vms/{name}", API.replace_vm, "compute:write", "Update a VM",
              body=ref("VMSpec"), answer=ref("VM"), problems=(404,)),
    Operation("PATCH", "/vms/{name}", API.patch_vm, "compute:write",
              "Change what a JSON merge patch (RFC 7396) names",
              body=_ANY, answer=ref("VM"), problems=(404,)),
    Operation("DELETE", "/vms/{name}", API.delete_vm, "compute:write", "Delete a VM", problems=(404,)),
    Operation("PUT", "/vms/{name}/state", API.report_vm, "compute:write", "VMReport what a worker sees of its VM",
              body=ref("VMReport"), problems=(404,)),
    Operation("GET", "/vms/{name}/events", API.list_events, "compute:read", "Retrieve events for a given VM",
              answer=ref("Events"), problems=(404,), query=(_LIMIT, _ORDER, _CURSOR), answer_headers=_NEXT),
    Operation("POST", "/vms/{name}/events", API.append_events, "compute:write", "Append events to a VM's",
              body=ref("Events"), problems=(404,), query=(_UID,)),
    Operation("GET", "/vms/{name}/port-forward", API.forward_vm, "compute:connect",
              "Port-forward to a VM using WebSocket protocol: binary messages carry the bytes",
              problems=(404, 503), query=(_PORT, _WAIT_FORWARD), websocket=True, bearer=_VM_TOKEN, waits=True),
    Operation("GET", "/vms/{name}/ip", API.resolve_ip, "compute:connect", "Resolve the VM's IP address on the worker",
              answer=ref("IP"), problems=(404, 503), query=(_WAIT_IP,), bearer=_VM_TOKEN, waits=True),
    Operation("GET", "/vms/{name}/exec", API.execute, "compute:connect",
              "Run a command in a VM over SSH: JSON in text frames, data in base64. `env[NAME]=value` sets variables",
              problems=(404, 503), query=_EXEC, websocket=True, bearer=_VM_TOKEN, waits=True),
    Operation("POST", "/vms/{name}/access-tokens", API.issue_token, "compute:write",
              "Issue a temporary VM access token", body=ref("IssueVMAccessTokenRequest"), body_required=False,
              answer=ref("VMAccessToken"), problems=(404,)),
    Operation("GET", "/workers/{name}/port-forward", API.forward_worker, "admin:write",
              "Port-forward to a worker using WebSocket protocol: binary messages carry the bytes",
              problems=(404, 503), query=(_PORT, _WAIT_FORWARD), websocket=True, waits=True),
    Operation("GET", "/rpc/port-forward", API.answer_forward, "compute:write",
              "Bring the worker's end of a tunnel that a portForwardAction asked for",
              problems=(404,), query=(_SESSION, _ERROR), websocket=True),
    Operation("POST", "/rpc/resolve-ip", API.answer_ip, "compute:write", "AnyResponse a resolveIPAction",
              problems=(404,), query=(_SESSION, _IP, _ERROR)),
    Operation("GET", "/rpc/watch", API.watch_rpc, "compute:read",
              "Be told by WebSocket what a worker is to do: one JSON object per binary message",
              problems=(404,), query=(_WORKER_NAME,), websocket=True),
)
# fmt: on


def describe_api(prefix: str) -> dict[str, Any]:
    """Return the OpenAPI document of OPERATIONS, served below `prefix`, for example "/v1"."""
    info = {"title": "Orchard", "description": "Orchard orchestration API", "version": __version__}
    return document(OPERATIONS, prefix=prefix, info=info, schemas=components())
