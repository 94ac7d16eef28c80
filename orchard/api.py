"""The handlers of the REST API: what each request does to the cluster's state.

`API.admit` sees a request before its body is read. It finds the operation, a row of the table in operations.py, and
checks the credentials. `API.handle` then lets the operation's handler answer.

A handler is a plain function over the state in memory, and changes it in one transaction. So no handler sees half of
another's change. `handle` sends no answer before everything that the answer is based on is durable. Handlers that read
events or connect to a VM are `async`.

answers.py maps the errors of the layers below to HTTP, and makes the Warning header. Query parameters are read in
parameters.py.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import trio
from trio_websocket import WebSocketConnection

from orchard import __version__, auth, parameters, schema, transitions, validation
from orchard.admission import Admitted, APIOperation, is_old_worker, named, read_body, refuse_unknown
from orchard.answers import PRODUCT_ERRORS, REFUSALS, found, http_error, send_page
from orchard.cluster import WORKER_STATE, ClusterIdentity, Promise
from orchard.codec import dump_json, encode, parse_client_json, shown
from orchard.gate import Gate, named_account
from orchard.liveness import Liveness, Source
from orchard.net.request import (
    AnyResponse,
    HTTPError,
    Request,
    Response,
    Route,
    Router,
    SlowAdmission,
    Stream,
    TunnelUpgrade,
    WebSocketUpgrade,
    WhileConnected,
)
from orchard.net.websocket import TunnelStream
from orchard.net.wsframes import POLICY_VIOLATION
from orchard.parameters import read_choice, read_count, read_flag, read_number, read_text
from orchard.schema import (
    IP,
    VM,
    ClusterSettings,
    ControllerInfo,
    Role,
    ServiceAccount,
    VMAccessToken,
    VMSpec,
    Worker,
)
from orchard.sessions import AccountSessions
from orchard.ssh import exec as vm_exec
from orchard.storage.events import EventLog
from orchard.store import SETTINGS, Store, encode_object, send_changes
from orchard.tunnel import Rendezvous, VMAccess, WorkerEnd
from orchard.worker_states import WorkerStates

# Existing workers choose their protocol by these.
_CAPABILITIES = ("rpc-v2", "vm-state-endpoint", WORKER_STATE, "field-validation")
# How often a read is tried when the state that it is based on could not be made durable.
_READ_ATTEMPTS = 3
# Bytes of JSON, and events, whose reading takes some milliseconds. It goes on in a thread if there are more.
_LARGE, _MANY_EVENTS = 16 * 1024, 500

StoredT = TypeVar("StoredT", VM, Worker, ServiceAccount, ClusterSettings, ClusterIdentity)
ReadT = TypeVar("ReadT")


# ---- the API --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ControllerParts:
    """The parts of a controller that handlers work on.

    `gate` None admits every request to everything. `tokens` issues access tokens. `prefix` is the path before /v1,
    and `offline_timeout` is in seconds. `waiting_reason` returns why a new VM stays pending, as far as it is known.
    """

    store: Store
    events: EventLog
    liveness: Liveness
    rendezvous: Rendezvous
    vm_access: VMAccess
    executor: vm_exec.Executor
    sessions: AccountSessions
    worker_states: WorkerStates
    gate: Gate | None
    tokens: auth.AccessTokens
    waiting_reason: Callable[[VMSpec], str]
    clock: Callable[[], datetime.datetime]
    prefix: str = ""
    offline_timeout: float = 0.0


class API:
    """The handlers, one for each operation, and what they have in common."""

    def __init__(self, parts: ControllerParts, operations: Sequence[APIOperation], document: bytes) -> None:
        """`operations` are those of operations.py, and `document` describes them in OpenAPI."""
        self.parts = parts
        self.store = parts.store
        self.state = parts.store.state
        # Several threads would delay all other requests together, since only one of them runs Python at a time.
        self._parsing = trio.CapacityLimiter(1)
        # The highest revision whose loss was accepted since the start.
        self._accepted_revision = 0
        self._router = Router([Route(op.method, f"{parts.prefix}/v1{op.path}", op) for op in operations])
        self._document = document

    # -- admission and answer

    def admit(self, request: Request) -> Admitted | SlowAdmission[Admitted]:
        """Find a request's operation and its sender, before its body is read. Raises HTTPError."""
        try:
            route, params = self._router.match(request.method, request.path)
            operation: APIOperation = route.endpoint
            name = params.get("name", "")
            gate = self.parts.gate
            if operation.role == "public" or gate is None:
                return Admitted(operation, name, "")
            authorization, bearer = request.headers.get("authorization"), operation.bearer is not None
            # A request without credentials is not a guess.
            if authorization is None:
                return self._admit_sender(operation, name, gate.identify(None))
            sender = gate.recall(authorization, bearer=bearer)
            if sender is None:
                account = named_account(authorization)
                check = partial(gate.identify, authorization, bearer=bearer)
                if gate.limit.is_limited(request.peer, account):
                    wait = partial(gate.limit.check, request.peer, account, check, trio.sleep)
                    return SlowAdmission(partial(self._admit_later, operation, name, wait))
                sender = gate.limit.check_now(request.peer, account, check)
            return self._admit_sender(operation, name, sender)
        except REFUSALS as error:
            raise http_error(error) from error

    def _admit_sender(self, operation: APIOperation, name: str, sender: ServiceAccount | auth.Access) -> Admitted:
        """Return what a sender is admitted to. Raises HTTPError."""
        account = sender.account if isinstance(sender, auth.Access) else sender.name
        try:
            if isinstance(sender, auth.Access):
                vm = found("VM", self.state.vms, name)
                if vm.uid != sender.vm_uid:
                    raise auth.ForbiddenError(f'the access token is for another VM than "{name}" with uid {vm.uid}')
                return Admitted(operation, name, account, auth.ISSUER_ROLE, f"{account} {sender.token_id}")
            role = None if operation.role == "public" else operation.role
            if role is not None:
                auth.require(sender, role)
            return Admitted(operation, name, account, role, account)
        except REFUSALS as error:
            raise http_error(error, account) from error

    async def _admit_later(
        self, operation: APIOperation, name: str, identify: Callable[[], Awaitable[ServiceAccount | auth.Access]]
    ) -> Admitted:
        """Admit a sender who has to wait for the check of the credentials. Raises HTTPError."""
        try:
            return self._admit_sender(operation, name, await identify())
        except REFUSALS as error:
            raise http_error(error) from error

    async def handle(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Answer an admitted request. Raises HTTPError."""
        if admitted.operation.waits:
            return WhileConnected(partial(self._answer_later, request, admitted))
        answer = await self._answer(request, admitted)
        return self.parts.sessions.tie(answer, admitted.account, admitted.role)

    async def _answer_later(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Answer a request that waits, unless its sender is deleted or loses its role meanwhile. Raises HTTPError."""
        sessions, sender = self.parts.sessions, (admitted.account, admitted.role)
        try:
            with sessions.cancel_when_over(*sender):
                return sessions.tie(await self._answer(request, admitted), *sender)
        except auth.ForbiddenError as error:
            raise http_error(error, admitted.account) from error

    async def _answer(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Let the handler answer, and wait until everything that its answer is based on is durable.

        An error is based on the state, too: the VM that "already exists" may not be durable yet.
        """
        operation, remarks = admitted.operation, admitted.remarks
        attempts = _READ_ATTEMPTS if operation.method == "GET" else 1
        try:
            await self._read(request, admitted)
        except REFUSALS as error:
            raise http_error(error) from error
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
                # The changes that the answer is based on were undone. A read can be done again.
                if attempts:
                    continue
                raise http_error(error) from error
            if refusal is not None:
                refused = http_error(refusal)
                raise HTTPError(refused.status, refused.message, (*refused.headers, *remarks.headers())) from refusal
            if isinstance(answer, Response) and isinstance(answer.body, bytes) and answer.body:
                # A terminal shows its prompt on a line of its own.
                answer.body += b"\n"
            if remarks and isinstance(answer, Response | Stream):
                answer.headers = (*answer.headers, *remarks.headers())
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
            admitted.body = await self._in_thread(len(request.body) > _LARGE, parse)

    async def _in_thread(self, is_long: bool, work: Callable[[], ReadT]) -> ReadT:
        """Return the result of pure work, from a thread if it takes long."""
        if not is_long:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._parsing)

    def _put(self, new: StoredT, old: StoredT | None = None) -> None:
        """Store a resource in a transaction of its own, unless it is equal to the `old` one."""
        if new != old:
            with self.store.transaction() as tx:
                tx.put(new)

    def _vm(self, admitted: Admitted) -> VM:
        """Return the VM that the path names. Raises HTTPError(404)."""
        return found("VM", self.state.vms, admitted.name)

    def _stored_vm(self, name: str) -> Response:
        """Return an answer with a VM as it is stored."""
        return Response(200, self.state.json["vm"][name])

    def _list(self, items: Iterable[bytes]) -> Response:
        """Return an answer with a JSON array of objects, in pieces, and the revision of the state that they are from."""
        pieces = list(items) or [b""]
        pieces[0] = b"[" + pieces[0]
        pieces[-1] += b"]\n"
        revision = (("X-Stored-Revision", str(self.state.revision)),)
        return Response(200, pieces, revision, separator=b",")

    def _delete(self, resource: VM | Worker | ServiceAccount) -> AnyResponse:
        with self.store.transaction() as tx:
            tx.delete(resource)
        return Response(200)

    # -- the controller itself

    def hello(self, request: Request, admitted: Admitted) -> AnyResponse:
        return Response(200)

    def info(self, request: Request, admitted: Admitted) -> AnyResponse:
        # Rounded down: a worker must give up its VMs before the controller does.
        timeout = int(1000 * self.parts.offline_timeout)
        info = ControllerInfo(
            version=__version__,
            capabilities=_CAPABILITIES,
            worker_offline_timeout=timeout,
            cluster_id=self.state.cluster.id,
            host_dir_policies=self.state.settings.host_dir_policies if self._may(admitted, "compute:write") else (),
        )
        return Response(200, dump_json(encode(info)))

    def accept_state(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Accept a state that was restored from an older copy, which workers have noticed."""
        old = self.state.cluster
        # A registration that was sent before may still arrive.
        self._accepted_revision = max(old.restored_from, self._accepted_revision)
        holds_back = bool(old.restored_from) or old.holds_back
        self._put(replace(old, id=uuid.uuid4().hex, restored_from=0, holds_back=holds_back), old)
        return self.info(request, admitted)

    def describe(self, request: Request, admitted: Admitted) -> AnyResponse:
        return Response(200, self._document)

    # -- VMs

    def create_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        name, spec = read_body(admitted, validation.vm_from_client)
        if spec.host_dirs:
            self._check_host_dirs(spec)
        if name in self.state.vms:
            raise HTTPError(409, f'VM "{name}" already exists')
        reason = self.parts.waiting_reason(spec)
        with self.store.transaction() as tx:
            tx.put(transitions.create(name, str(uuid.uuid4()), spec, self.parts.clock(), reason))
        return self._stored_vm(name)

    def list_vms(self, request: Request, admitted: Admitted) -> AnyResponse:
        table = self.state.json["vm"]
        worker = parameters.read_worker_filter(request.query)
        if worker is None:
            return self._list(table[name] for name in self.state.names["vm"])
        if self.state.cluster.restored_from and not self._can_notice(worker):
            raise HTTPError(
                503,
                "the controller's state was restored from an older copy, and this worker cannot know;"
                " see POST /v1/controller/accept-state",
            )
        self.parts.liveness.record_poll(worker, _source(request, admitted))
        return self._list(table[name] for name in sorted(self.state.vms_by_worker.get(worker, ())))

    def _can_notice(self, worker: str) -> bool:
        """Return whether a worker keeps its VMs by itself while the restored state is not accepted."""
        registered = self.state.workers.get(worker)
        return registered is not None and WORKER_STATE in registered.capabilities

    def get_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm(admitted)
        if read_flag(request.query, parameters.WATCH):
            # The feed begins here: a change between this answer and its first line must not be missed.
            changes, silence = self.store.watch("vm", vm.name), self.parts.rendezvous.ping_interval
            return Stream(partial(send_changes, vm.meta.version, self.state.json["vm"][vm.name], changes, silence))
        return self._stored_vm(vm.name)

    def replace_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        if is_old_worker(request):
            return self._report(request, admitted, validation.report_from_old_worker)
        return self._change_vm(request, admitted, validation.replaced_spec)

    def patch_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._change_vm(request, admitted, validation.patched_spec)

    def _change_vm(
        self, request: Request, admitted: Admitted, read: Callable[[VMSpec, object, list[str]], VMSpec]
    ) -> AnyResponse:
        old = self._vm(admitted)
        spec = read_body(admitted, partial(read, old.spec))
        if spec.host_dirs != old.spec.host_dirs:
            self._check_host_dirs(spec)
        self._put(transitions.change(old, spec), old)
        return self._stored_vm(old.name)

    def delete_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._delete(self._vm(admitted))

    def report_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._report(request, admitted, validation.report_from_worker)

    def _report(
        self, request: Request, admitted: Admitted, read: Callable[[object, list[str]], schema.VMReport]
    ) -> AnyResponse:
        """Take over a worker's report. The answer is the VM: existing workers end their session when it is not."""
        old = self._vm(admitted)
        report = read_body(admitted, read)
        self._put(transitions.report(old, report, self.parts.clock()), old)
        return replace(self._stored_vm(old.name), routine=True)

    def _check_host_dirs(self, spec: VMSpec) -> None:
        for index, host_dir in enumerate(spec.host_dirs):
            if not schema.is_allowed(self.state.settings.host_dir_policies, host_dir):
                access = "read only" if host_dir.ro else "writable"
                raise HTTPError(
                    400,
                    f"hostDirs[{index}].path: no hostDirPolicy allows mounting {shown(host_dir.path)} {access};"
                    " see the cluster settings",
                )

    # -- events of a VM

    async def append_events(self, request: Request, admitted: Admitted) -> AnyResponse:
        is_long = isinstance(admitted.body, list) and len(admitted.body) > _MANY_EVENTS
        events = await self._in_thread(is_long, partial(read_body, admitted, validation.events_from_client))
        vm = self._vm(admitted)
        uid = request.query.one(parameters.UID.name)
        if uid and uid != vm.uid:
            raise HTTPError(404, f'VM "{vm.name}" has uid {vm.uid}, not {shown(uid)}')
        await self.parts.events.append(vm.uid, events)
        return Response(200, routine=True)

    async def list_events(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm(admitted)
        limit = read_number(request.query, parameters.LIMIT)
        order: Literal["asc", "desc"] = "asc" if read_choice(request.query, parameters.ORDER) == "asc" else "desc"
        cursor = request.query.one(parameters.CURSOR.name) or None
        page, following = await self.parts.events.page(vm.uid, limit, order, cursor)
        headers = () if following is None else (("X-Next-Cursor", following),)
        if isinstance(page, bytes):
            return Response(200, page, headers)
        return Stream(partial(send_page, page), "application/json", headers=headers, endless=False)

    # -- connections to a VM or to a worker's host

    async def forward_vm(self, request: Request, admitted: Admitted) -> AnyResponse:
        port = read_count(request.query, parameters.PORT_NUMBER)
        wait = read_count(request.query, parameters.WAIT_FORWARD)
        vm = self._vm(admitted)
        request.require_websocket()
        return self._relay_to(
            await self.parts.vm_access.connect(vm, port, wait, sender=admitted.sender), request, admitted
        )

    async def forward_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        port = read_count(request.query, parameters.PORT_NUMBER)
        wait = read_count(request.query, parameters.WAIT_FORWARD)
        worker = found("worker", self.state.workers, admitted.name)
        request.require_websocket()
        end = await self.parts.vm_access.connect_to_host(worker.name, port, wait, sender=admitted.sender)
        return self._relay_to(end, request, admitted)

    def _relay_to(self, end: WorkerEnd, request: Request, admitted: Admitted) -> TunnelUpgrade:
        # Existing controllers do so, and clients without the header expect it. Like them, this one sends bytes that are not
        # UTF-8, too. The product's own clients always send a User-Agent.
        text = request.headers.get("user-agent") is None
        return TunnelUpgrade(partial(self._relay, end, admitted), self.parts.rendezvous.ping_interval, text)

    async def _relay(self, end: WorkerEnd, admitted: Admitted, client: TunnelStream) -> None:
        with self.parts.sessions.hold(admitted.account, admitted.role, partial(end.end, POLICY_VIOLATION)):
            await end.relay(client)

    async def resolve_ip(self, request: Request, admitted: Admitted) -> AnyResponse:
        wait = read_count(request.query, parameters.WAIT_ADDRESS)
        vm = self._vm(admitted)
        address = await self.parts.vm_access.find_address(vm, wait, sender=admitted.sender)
        return Response(200, dump_json(encode(IP(address))))

    async def execute(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm(admitted)
        wait = read_count(request.query, parameters.WAIT_FORWARD)
        command = parameters.read_command(request.query)
        request.require_websocket()
        await self.parts.executor.connect(vm, admitted.sender, wait)
        serve = partial(self.parts.executor.serve, vm, command, admitted.sender, wait)
        return WebSocketUpgrade(serve, ping_interval=self.parts.rendezvous.ping_interval)

    def issue_token(self, request: Request, admitted: Admitted) -> AnyResponse:
        vm = self._vm(admitted)
        ttl = read_body(admitted, validation.ttl_from_client)
        now = self.parts.clock().replace(microsecond=0)
        expires = now + datetime.timedelta(seconds=ttl)
        times = int(now.timestamp()), int(expires.timestamp())
        token = self.parts.tokens.issue(auth.Access(vm.name, vm.uid, admitted.account, *times, str(uuid.uuid4())))
        issued = VMAccessToken(token, "Bearer", expires, auth.TOKEN_USER, vm.name, vm.uid)
        return Response(200, dump_json(encode(issued)))

    # -- workers

    def register_worker(self, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
        wanted = read_body(admitted, validation.worker_from_client)
        register = partial(self._register, wanted, request, admitted)
        return self._if_not_connected(wanted.name, register)

    async def _ask_watch(self, name: str, answer: Callable[[], AnyResponse]) -> AnyResponse:
        if await self.parts.rendezvous.is_connected(name):
            raise HTTPError(
                409,
                f'worker "{name}" is connected already, and its watch answers; give each worker a name of its own',
            )
        return answer()

    def _if_not_connected(self, name: str, answer: Callable[[], AnyResponse]) -> AnyResponse | Awaitable[AnyResponse]:
        """Answer a request that begins the session of a worker, unless a worker of that name has a live one."""
        return self._ask_watch(name, answer) if self.parts.rendezvous.has_watch(name) else answer()

    def _register(self, wanted: Worker, request: Request, admitted: Admitted) -> AnyResponse:
        old = self.state.workers.get(wanted.name)
        if old is not None and old.machine_id != wanted.machine_id:
            raise HTTPError(
                409,
                f'worker "{wanted.name}" is registered from the machine {shown(old.machine_id)};'
                " give this worker another name, or delete the other worker first",
            )
        liveness = self.parts.liveness
        new = replace(
            wanted,
            last_seen=None,
            unknown=old.unknown if old is not None else {},
            created_at=old.created_at if old is not None else self.parts.clock(),
            scheduling_paused=old.scheduling_paused if old is not None else wanted.scheduling_paused,
            registered_by=admitted.account,
            promised=max(old.promised if old is not None else 0, liveness.offline_timeout_ms),
            highest_revision=0,
            settled=False,
            health=None,
        )
        with self.store.transaction() as tx:
            if old is not None and old.instance_id and old.instance_id != new.instance_id:
                tx.put(self._promise_of(new.name))
                liveness.record_replacement(new.name)
            if new != old:
                tx.put(new)
        self._notice_restored(wanted.highest_revision)
        source = _source(request, admitted)
        liveness.record_registration(new.name, source, tells_settled=WORKER_STATE in wanted.capabilities)
        if wanted.last_seen is not None:
            liveness.record_heartbeat(new.name, source, wanted.last_seen)
        return self._worker(new.name)

    def _notice_restored(self, revision: int) -> None:
        """Note that a worker has seen a higher revision of this state, unless the loss was accepted since."""
        cluster = self.state.cluster
        if revision > max(self._accepted_revision, cluster.restored_from):
            self._put(replace(cluster, restored_from=revision), cluster)

    def list_workers(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._list(self._worker_json(name) for name in self.state.names["worker"])

    def get_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._worker(found("worker", self.state.workers, admitted.name).name)

    def put_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        """Record a heartbeat, which has a later last_seen than the one before, or else set scheduling_paused."""
        worker = found("worker", self.state.workers, admitted.name)
        wanted = read_body(admitted, named(worker.name, validation.worker_from_client))
        seen, source = wanted.last_seen, _source(request, admitted)
        liveness = self.parts.liveness
        if seen is not None and liveness.is_heartbeat(worker.name, seen):
            self._speak_for(worker, admitted)
            liveness.record_heartbeat(worker.name, source, seen, settled=wanted.settled, health=wanted.health)
            return replace(self._worker(worker.name), routine=True)
        self._put(replace(worker, scheduling_paused=wanted.scheduling_paused), worker)
        return self._worker(worker.name)

    def delete_worker(self, request: Request, admitted: Admitted) -> AnyResponse:
        worker = found("worker", self.state.workers, admitted.name)
        with self.store.transaction() as tx:
            tx.delete(worker)
            tx.put(self._promise_of(worker.name))
        return Response(200)

    def _promise_of(self, worker: str) -> Promise:
        """Return what is stored of a worker that will not be heard of again: how long its VMs may run."""
        old = self.state.promises.get(worker)
        return Promise(worker, max(self.parts.liveness.promise_ms(worker), old.milliseconds if old is not None else 0))

    def _speak_for(self, worker: Worker, admitted: Admitted) -> None:
        """Check that a sender is the account that registered a worker. Raises ForbiddenError.

        A worker that was stored before accounts were is bound to the first account that speaks for it.
        """
        if self.parts.gate is None or worker.registered_by == admitted.account:
            return
        if worker.registered_by:
            raise auth.ForbiddenError(
                f'worker "{worker.name}" was registered by service account "{worker.registered_by}",'
                f' not by "{admitted.account}"'
            )
        self._put(replace(worker, registered_by=admitted.account), worker)

    def _worker(self, name: str) -> Response:
        return Response(200, self._worker_json(name))

    def _worker_json(self, name: str) -> bytes:
        """Return a worker's JSON with its last_seen and its state, which are not stored."""
        stored, last_seen = self.state.json["worker"][name], self.parts.liveness.last_seen_json(name)
        seen = b"" if last_seen is None else b'"last_seen":"%b",' % last_seen
        return b"%b,%b%b}" % (stored[:-1], seen, self.parts.worker_states.members(self.state.workers[name]))

    # -- requests of workers

    def watch_rpc(self, request: Request, admitted: Admitted) -> AnyResponse | Awaitable[AnyResponse]:
        request.require_websocket()
        worker = self._read_worker(request, admitted)
        serve = partial(self._serve_watch, worker.name, _source(request, admitted))
        return self._if_not_connected(worker.name, lambda: WebSocketUpgrade(serve))

    async def _serve_watch(self, worker: str, source: Source, websocket: WebSocketConnection) -> None:
        liveness = self.parts.liveness
        watch = liveness.record_watch(worker, source)
        try:
            await self.parts.rendezvous.serve(worker, source[0], partial(liveness.record_pong, worker), websocket)
        finally:
            liveness.record_watch_end(worker, watch)

    def say_goodbye(self, request: Request, admitted: Admitted) -> AnyResponse:
        self.parts.liveness.record_goodbye(self._read_worker(request, admitted).name)
        return Response(200)

    def _read_worker(self, request: Request, admitted: Admitted) -> Worker:
        """Return the worker that a request is from. Raises HTTPError(400, 404), ForbiddenError."""
        worker = found("worker", self.state.workers, read_text(request.query, parameters.WORKER_NAME))
        self._speak_for(worker, admitted)
        return worker

    def answer_forward(self, request: Request, admitted: Admitted) -> AnyResponse:
        request.require_websocket()
        session = read_text(request.query, parameters.SESSION)
        pending = self.parts.rendezvous.answer_port(session, admitted.account)
        error = read_text(request.query, parameters.ERROR_MESSAGE)
        if error:
            pending.fail(error)
            return WebSocketUpgrade(_close_at_once)
        return TunnelUpgrade(partial(self.parts.rendezvous.lend, pending), self.parts.rendezvous.ping_interval)

    def answer_ip(self, request: Request, admitted: Admitted) -> AnyResponse:
        session = read_text(request.query, parameters.SESSION)
        pending = self.parts.rendezvous.answer_address(session, admitted.account)
        error = read_text(request.query, parameters.ERROR_MESSAGE)
        address = read_text(request.query, parameters.RESOLVED_ADDRESS)
        if error or not address:
            pending.fail(error or "no address was found")
        else:
            pending.resolve(address)
        return Response(200, routine=True)

    # -- service accounts

    def create_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        wanted = read_body(admitted, validation.account_from_client)
        if wanted.name in self.state.accounts:
            raise HTTPError(409, f'service account "{wanted.name}" already exists')
        new = replace(wanted, token=wanted.token or auth.random_token(), created_at=self.parts.clock())
        self._put(new)
        if not new.roles:
            admitted.remarks.notes.append("the account has no roles, so it can do nothing but check its credentials")
        return self._changed_account(admitted, new)

    def _changed_account(self, admitted: Admitted, new: ServiceAccount, old: ServiceAccount | None = None) -> Response:
        if (old is None or new.token != old.token) and len(new.token) < validation.LONG_TOKEN:
            note = f"the token has fewer than {validation.LONG_TOKEN} characters and may be guessed"
            admitted.remarks.notes.append(note)
        return Response(200, self._account_json(admitted, new.name))

    def _account_json(self, admitted: Admitted, name: str) -> bytes:
        """Return an account's JSON, with its token only for an account that could change it."""
        if self._may(admitted, "admin:write"):
            return self.state.json["account"][name]
        return dump_json(encode(replace(self.state.accounts[name], token="")))

    def _may(self, admitted: Admitted, role: Role) -> bool:
        return self.parts.gate is None or role in self.state.accounts[admitted.account].roles

    def list_accounts(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._list(self._account_json(admitted, name) for name in self.state.names["account"])

    def get_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        name = found("service account", self.state.accounts, admitted.name).name
        return Response(200, self._account_json(admitted, name))

    def replace_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._change_account(admitted, validation.account_from_client)

    def patch_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._change_account(admitted, validation.patched_account)

    def _change_account(self, admitted: Admitted, read: Callable[..., ServiceAccount]) -> AnyResponse:
        """Change an account's roles, token and keys; absent fields stay as they are."""
        old = found("service account", self.state.accounts, admitted.name)
        new = read_body(admitted, named(old.name, partial(read, base=old)))
        new = replace(new, token=new.token or old.token)
        self._put(new, old)
        return self._changed_account(admitted, new, old)

    def delete_account(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._delete(found("service account", self.state.accounts, admitted.name))

    # -- cluster settings

    def get_settings(self, request: Request, admitted: Admitted) -> AnyResponse:
        return self._settings()

    def put_settings(self, request: Request, admitted: Admitted) -> AnyResponse:
        settings = read_body(admitted, validation.settings_from_client)
        self._put(replace(settings, unknown=self.state.settings.unknown), self.state.settings)
        return self._settings()

    def _settings(self) -> Response:
        body = self.state.json["settings"].get(SETTINGS) or encode_object(self.state.settings)
        return Response(200, body)


# ---- requests and answers -------------------------------------------------------------------------------------------


def _source(request: Request, admitted: Admitted) -> Source:
    return (admitted.account, request.peer)


async def _close_at_once(websocket: WebSocketConnection) -> None:
    """Serve a WebSocket on which nothing follows."""
    await trio.lowlevel.checkpoint()
