"""The controller's ways into a VM: it asks the VM's worker to forward a port or to find the VM's address.

The API and SSH use `VMAccess`. It waits until the VM runs and then asks through the `Rendezvous`, which keeps the
workers' watches and joins each request to its answer. The worker's side of the protocol is in work/requests.py, and
the stream of bytes over a WebSocket is in net/websocket.py.

A worker may be behind a NAT, so the controller cannot connect to it. Each worker keeps a WebSocket open to the
controller (its *watch*), over which the controller sends actions. `syncVMsAction` means "look again": it is queued at
most once, and the worker then reads the present state from the API. A worker's new watch replaces its older one, unless
that one is alive: then two workers have one name, and the second one is refused.

A port forward takes these steps:
1. `VMAccess.connect` waits until the VM runs. `Rendezvous.ask_port` makes a `PendingRequest` with an unguessable id and
   sends the worker a `portForwardAction` with that id. (`resolveIPAction` for an address.) If the watch breaks before
   the worker has answered, the action is sent again over the next watch.
2. The worker connects to the port and opens a WebSocket to the controller with the id, which is valid once.
   `Rendezvous.lend` makes this WebSocket a `WorkerEnd`, which is the answer: it is lent to the task that asked.
3. That task relays the bytes to its client's WebSocket (`WorkerEnd.relay`), or uses them itself (`WorkerEnd.borrow`).

When no client waits for a request any more, the worker is told by a `cancelRequestAction`, if it has that capability.

A relay sends on each piece before it takes the next one, so a slow side slows the other one and nothing accumulates.
When one side closes, the relay sends on everything that this side has sent, and then closes the other side.

Every WebSocket is pinged, so that load balancers keep it open and a dead peer is found. A ping that stays unanswered
for a whole interval ends the connection, unless the pong may be waiting behind data. This file pings the watches, and
`TunnelStream` pings the tunnels.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.base.nursery import Wakeup
from orchard.codec import dump_json, shown
from orchard.net.websocket import PING_INTERVAL, TunnelStream
from orchard.net.wsframes import ABNORMAL, GOING_AWAY, INTERNAL_ERROR, NO_STATUS, NORMAL, Close
from orchard.resources.cluster import MAX_PENDING_OF_VM, MAX_TUNNELS_OF_VM
from orchard.schema import VM
from orchard.store import Store

# The worker has at least this time to answer, even if the client does not wait: connecting to a VM takes a moment.
LEAST_SECONDS = 10.0  # seconds
# A worker's end is closed if the client's task does not begin to use it within this time.
CLAIM_SECONDS = 10.0  # seconds
# Requests that wait for their workers, in all and of one sender; MAX_PENDING_OF_VM is for one VM or host of a worker. Each
# belongs to an HTTP request or SSH channel with a deadline. So neither one sender nor the holders of one VM's access tokens
# can keep others from asking.
MAX_PENDING, MAX_PENDING_OF_SENDER = 4096, 1024
# Of those, requests for one VM or host that its worker works on. Each may start a process on its host.
MAX_ASKED_OF_VM = 32
# Limit for a worker's watch to answer a ping when another watch is to replace it.
PONG_SECONDS = 2.0
_SYNC: Mapping[str, Any] = {"syncVMsAction": {}}

AnswerT = TypeVar("AnswerT")


class UnreachableError(Exception):
    """The VM or its worker cannot be reached; `str(error)` says why."""


class VMGoneError(Exception):
    """The VM was deleted while a client waited for it."""


class UnknownSessionError(Exception):
    """A worker answered a request that does not exist, was answered before, or was sent to another account."""


# ---- access to VMs -------------------------------------------------------------------------------------------------


class VMAccess:
    """Connects to ports of VMs and of workers' hosts, and finds addresses of VMs.

    All methods wait up to `wait` seconds until the VM runs and its worker has answered. The answer has at least
    LEAST_SECONDS. `sender` is the account that asks, whose requests are bounded. They raise UnreachableError, and
    VMGoneError when the VM is deleted.
    """

    def __init__(self, store: Store, rendezvous: Rendezvous) -> None:
        self._store = store
        self._rendezvous = rendezvous

    async def connect(self, vm: VM, port: int, wait: float, *, sender: str = "") -> WorkerEnd:
        """Connect to a port of a VM. The worker's end is closed if it is not used within CLAIM_SECONDS."""
        deadline = trio.current_time() + wait
        running = await self.wait_running(vm, wait)
        return await self._rendezvous.ask_port(running.state.worker, vm.uid, port, deadline, sender=sender)

    @asynccontextmanager
    async def open_stream(self, vm: VM, port: int, wait: float, *, sender: str = "") -> AsyncIterator[TunnelStream]:
        """Connect to a port of a VM and yield the stream of bytes, which is closed after the block.

        The block is cancelled when the VM ends; UnreachableError is raised then.
        """
        end = await self.connect(vm, port, wait, sender=sender)
        with end.borrow() as stream:
            yield stream

    async def connect_to_host(self, worker: str, port: int, wait: float, *, sender: str = "") -> WorkerEnd:
        """Connect to a port of a worker's host."""
        return await self._rendezvous.ask_port(worker, "", port, trio.current_time() + wait, sender=sender)

    async def find_address(self, vm: VM, wait: float, *, sender: str = "") -> str:
        """Return a VM's address in its worker's network."""
        deadline = trio.current_time() + wait
        running = await self.wait_running(vm, wait)
        return await self._rendezvous.ask_address(running.state.worker, vm.uid, deadline, sender=sender)

    async def wait_running(self, vm: VM, wait: float) -> VM:
        """Wait until a VM runs, and return it as it is then."""
        if running := self._if_running(vm):
            return running
        with trio.move_on_after(wait), self._store.watch("vm", vm.name) as changes:
            async for _ in changes:
                if running := self._if_running(vm):
                    return running
        if running := self._if_running(vm):
            return running
        state = self._store.state.vms[vm.name].state
        reason = f": {state.status_message}" if state.status_message else ""
        raise UnreachableError(f'VM "{vm.name}" is {state.status} after {wait:g} seconds{reason}')

    def _if_running(self, vm: VM) -> VM | None:
        """Return the VM as it is if it runs, None if it may run later. Raises an error if it never will."""
        now = self._store.state.vms.get(vm.meta.name)
        if now is None or now.meta.uid != vm.meta.uid:
            raise VMGoneError(f'VM "{vm.name}" with uid {vm.uid} does not exist any more')
        if now.state.status == "failed":
            raise UnreachableError(f'VM "{vm.name}" has failed: {now.state.status_message}')
        if now.resting:
            raise UnreachableError(f'VM "{vm.name}" is {now.spec.power_state}')
        return now if now.state.status == "running" else None


# ---- the two halves of a request -----------------------------------------------------------------------------------


class PendingRequest(Generic[AnswerT]):
    """A request to a worker that waits for its answer. `action` is what the worker is sent."""

    def __init__(self, worker: str, kind: str, vm_uid: str, **details: Any) -> None:
        self.id = secrets.token_urlsafe(24)
        self.worker = worker
        # "" for the host of the worker.
        self.vm_uid = vm_uid
        self.target = worker, vm_uid
        # The account of the watch over which the action was sent last. Only this account may answer.
        self.account: str | None = None
        self.action: Mapping[str, Any] = {kind: {"session": self.id, "vmUID": vm_uid, **details}}
        # The tasks that wait for the answer.
        self.askers = 0
        # Whether all of them have gone without the answer.
        self.is_abandoned = False
        self._release: Callable[[], None] = lambda: None
        self._answered = trio.Event()
        self._answer: AnswerT | UnreachableError

    def resolve(self, answer: AnswerT, release: Callable[[], None] = lambda: None) -> None:
        """Make `wait_answered` return the answer. `release` is called if no task takes it."""
        self._answer = answer
        self._release = release
        self._answered.set()

    def fail(self, reason: str) -> None:
        """Make `wait_answered` raise UnreachableError with the worker's reason."""
        self._answer = UnreachableError(f'worker "{self.worker}": {reason}')
        self._answered.set()

    async def wait_answered(self) -> AnswerT:
        self.askers += 1
        try:
            await self._answered.wait()
        except trio.Cancelled:
            if self.askers == 1:
                self.is_abandoned = True
                self._release()
            raise
        finally:
            self.askers -= 1
        if isinstance(self._answer, UnreachableError):
            raise self._answer
        return self._answer


@dataclass(frozen=True, slots=True)
class TunnelTotals:
    """The tunnels that were opened so far, and the bytes that they carried from VMs and to VMs."""

    opened: int = 0
    from_vms: int = 0
    to_vms: int = 0

    def after(self, ends: Iterable[WorkerEnd]) -> TunnelTotals:
        """Return the totals with what the worker's ends of some tunnels have carried."""
        received = sent = 0
        for end in ends:
            received, sent = received + end.stream.received_bytes, sent + end.stream.sent_bytes
        return TunnelTotals(self.opened, self.from_vms + received, self.to_vms + sent)


class WorkerEnd:
    """The worker's end of a tunnel: a WebSocket that the task of its HTTP connection lends to the task of a client.

    Each task has a cancel scope. The worker's task waits in the scope `loan` and keeps the WebSocket open. `release`
    cancels it when the client's task has finished, or will not begin; so does CLAIM_SECONDS without one. The client's
    task works in the scope `_use`. `end` cancels `_use`, and the client's task then closes the tunnel.
    """

    def __init__(self, worker: str, stream: TunnelStream) -> None:
        self.worker = worker
        self.stream = stream
        self.loan = trio.CancelScope(deadline=trio.current_time() + CLAIM_SECONDS)
        self._use = trio.CancelScope()
        # The code and the reason with which the tunnel is closed.
        self._close = (NORMAL, "")

    async def relay(self, client: TunnelStream) -> None:
        """Relay bytes between a client and the VM until a side closes or `end` is called; then close both."""
        self.loan.deadline = math.inf
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, client, self.stream, "the client")
                nursery.start_soon(self._forward, self.stream, client, "the worker")
                with self._use:
                    await trio.sleep_forever()
                # The forwarding goes on: a frame that is half sent must be completed before the close can be sent.
                async with trio.open_nursery() as closing:
                    closing.start_soon(client.aclose, *self._close)
                    closing.start_soon(self.stream.aclose, *self._close)
                nursery.cancel_scope.cancel()
        finally:
            self.release()

    @contextmanager
    def borrow(self) -> Iterator[TunnelStream]:
        """Yield the stream for the block. If `end` is called, the block is cancelled and UnreachableError is raised."""
        self.loan.deadline = math.inf
        try:
            with self._use:
                yield self.stream
        finally:
            self.release()
        if self._use.cancel_called:
            raise UnreachableError(self._close[1])

    def end(self, code: int, reason: str) -> None:
        """Make the client's task close the tunnel with this code and reason. Only the first call has an effect."""
        if not self._use.cancel_called:
            self._close = (code, reason)
            self._use.cancel()

    def release(self) -> None:
        """Make the worker's task close the WebSocket."""
        self.loan.cancel()

    async def _forward(self, source: TunnelStream, sink: TunnelStream, name: str) -> None:
        """Forward bytes from one side until it closes, then end the tunnel. `name` names that side in the close of `sink`."""
        await source.forward_to(sink)
        self.end(*close_to_relay(source.closed, name))


class Rendezvous:
    """The watches of all workers, the requests sent over them, and the tunnels that they opened.

    `ping_interval`, in seconds, is the interval of the pings on the watches. `may_answer` returns whether workers and
    clients may be told now what the state says. Otherwise no action is sent and no tunnel is joined: another controller
    may lead.
    """

    def __init__(self, ping_interval: float = PING_INTERVAL, may_answer: Callable[[], bool] = lambda: True) -> None:
        self.ping_interval = ping_interval
        self._may_answer = may_answer
        self._watches: dict[str, _Watch] = {}
        self._watch_opened = Wakeup()
        # Pending requests by their ids.
        self._ports: dict[str, PendingRequest[WorkerEnd]] = {}
        self._addresses: dict[str, PendingRequest[str]] = {}
        # How many wait: in all (), of (sender,), and for each target.
        self._waiting: Counter[tuple[str, ...]] = Counter()
        # Target -> the turns of the requests that its worker works on.
        self._turns: dict[tuple[str, str], trio.Semaphore] = {}
        # Open tunnels by the uids of their VMs; "" for those to workers' hosts.
        self._ends: defaultdict[str, set[WorkerEnd]] = defaultdict(set)
        # The totals of closed tunnels.
        self._totals = TunnelTotals()

    # -- requests

    async def ask_port(self, worker: str, vm_uid: str, port: int, deadline: float, *, sender: str = "") -> WorkerEnd:
        """Ask a worker to connect to a port of a VM, or of its host for the uid "". Raises UnreachableError."""
        if vm_uid and len(self._ends.get(vm_uid, ())) >= MAX_TUNNELS_OF_VM:
            raise UnreachableError(f"the VM has {MAX_TUNNELS_OF_VM} tunnels, which is the limit; close some")
        request = PendingRequest[WorkerEnd](worker, "portForwardAction", vm_uid, port=port)
        with self._counted(sender, request):
            return await self._ask(request, self._ports, deadline)

    async def ask_address(self, worker: str, vm_uid: str, deadline: float, *, sender: str = "") -> str:
        """Ask a worker for the address of a VM. Concurrent callers share one request. Raises UnreachableError."""
        pending = (one for one in self._addresses.values() if one.target == (worker, vm_uid))
        request = next(pending, None) or PendingRequest[str](worker, "resolveIPAction", vm_uid)
        with self._counted(sender, request):
            return await self._ask(request, self._addresses, deadline)

    @contextmanager
    def _counted(self, sender: str, request: PendingRequest[Any]) -> Iterator[None]:
        """Count a request that waits. Raises UnreachableError if too many do."""
        target = f"for {'this VM' if request.vm_uid else 'the host of this worker'}"
        bounds: dict[tuple[str, ...], tuple[int, str]] = {
            (): (MAX_PENDING, "in all"),
            request.target: (MAX_PENDING_OF_VM, target),
        }
        if sender:
            bounds[sender,] = MAX_PENDING_OF_SENDER, f'of service account "{sender}"'
        for key, (most, whose) in bounds.items():
            if self._waiting[key] >= most:
                raise UnreachableError(f"{most} requests {whose} are waiting for workers, try again later")
        self._waiting.update(bounds.keys())
        try:
            yield
        finally:
            self._waiting.subtract(bounds.keys())
            for key in bounds:
                if not self._waiting[key]:
                    del self._waiting[key]
            if request.target not in self._waiting:
                self._turns.pop(request.target, None)

    async def _ask(
        self, request: PendingRequest[AnswerT], pending: dict[str, PendingRequest[AnswerT]], deadline: float
    ) -> AnswerT:
        """Send a request as soon as its worker is connected, keep it in `pending` meanwhile, and return the answer."""
        worker = request.worker
        seconds = max(LEAST_SECONDS, deadline - trio.current_time())
        with trio.move_on_after(seconds):
            while (watch := self._watches.get(worker)) is None:
                await self._watch_opened.wait()
            if request.id in pending:
                return await self._wait_answered(request, pending)
            async with self._turns.setdefault(request.target, trio.Semaphore(MAX_ASKED_OF_VM)):
                # The worker may have opened another watch meanwhile.
                watch = self._watches.get(worker, watch)
                pending[request.id] = request
                watch.send(request)
                return await self._wait_answered(request, pending)
        problem = "did not answer" if worker in self._watches else "did not connect"
        raise UnreachableError(f'worker "{worker}" {problem} within {seconds:.0f} seconds')

    async def _wait_answered(
        self, request: PendingRequest[AnswerT], pending: dict[str, PendingRequest[AnswerT]]
    ) -> AnswerT:
        try:
            return await request.wait_answered()
        finally:
            # The action of an answered request was sent. That of another one may still be queued.
            if not request.askers and request.id in pending:
                del pending[request.id]
                if now := self._watches.get(request.worker):
                    now.take_back(request)

    def answer_port(self, session: str, account: str) -> PendingRequest[WorkerEnd]:
        """Return the request for a port that a worker answers, for the only time. Raises UnknownSessionError."""
        return _take_pending(self._ports, session, account)

    def answer_address(self, session: str, account: str) -> PendingRequest[str]:
        """Return the request for an address that a worker answers, for the only time. Raises UnknownSessionError."""
        return _take_pending(self._addresses, session, account)

    async def lend(self, request: PendingRequest[WorkerEnd], stream: TunnelStream) -> None:
        """Lend the worker's WebSocket to a request. Return when the request needs it no longer."""
        if request.is_abandoned or not self._may_answer():
            return
        end = WorkerEnd(request.worker, stream)
        ends = self._ends[request.vm_uid]
        ends.add(end)
        self._totals = replace(self._totals, opened=self._totals.opened + 1)
        try:
            request.resolve(end, end.release)
            with end.loan:
                await trio.sleep_forever()
        finally:
            ends.discard(end)
            self._totals = self._totals.after([end])
            if not ends:
                self._ends.pop(request.vm_uid, None)

    def totals(self) -> tuple[int, TunnelTotals]:
        """Return how many tunnels are open, and what all tunnels have carried so far."""
        ends = [end for ends in self._ends.values() for end in ends]
        return len(ends), self._totals.after(ends)

    def end_tunnels(self, vm_uid: str, reason: str) -> None:
        """Close all tunnels into a VM that has ended."""
        for end in self._ends.get(vm_uid, ()):
            end.end(GOING_AWAY, reason)

    # -- watches

    def sync(self, worker: str) -> None:
        """Tell a worker to look at its VMs. A worker without a watch looks as soon as it opens one."""
        if watch := self._watches.get(worker):
            watch.put(_SYNC)

    async def is_connected(self, worker: str) -> bool:
        """Return whether a worker has a watch that answers a ping within PONG_SECONDS; end a watch that does not."""
        watch = self._watches.get(worker)
        if watch is None:
            return False
        with trio.move_on_after(PONG_SECONDS), suppress(ConnectionClosed):
            await watch.websocket.ping(secrets.token_bytes(4))
            return True
        watch.scope.cancel()
        return False

    def has_watch(self, worker: str) -> bool:
        """Return whether a worker has a watch, which may be dead."""
        return worker in self._watches

    async def serve(
        self,
        worker: str,
        account: str,
        alive: Callable[[], None],
        websocket: WebSocketConnection,
        *,
        cancels: bool = False,
    ) -> None:
        """Serve a worker's watch until a newer one replaces it or it is dead; call `alive` at each pong.

        `cancels`: whether the worker has the capability CANCEL_REQUEST. Raises ConnectionClosed.
        """
        watch = self._open_watch(worker, _Watch(account, websocket, cancels))
        try:
            with watch.scope:
                # The three tasks end together.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_discard_messages, websocket)
                    nursery.start_soon(_ping_watch, websocket, self.ping_interval, alive, nursery.cancel_scope)
                    while True:
                        await watch.changed.wait()
                        actions, watch.actions = watch.actions, []
                        for action in actions:
                            if not self._may_answer():
                                nursery.cancel_scope.cancel()
                                return
                            await websocket.send_message(dump_json(action))
        finally:
            if self._watches.get(worker) is watch:
                del self._watches[worker]

    def _open_watch(self, worker: str, watch: _Watch) -> _Watch:
        """Replace a worker's watch by a new one, which sends again what was not answered."""
        if replaced := self._watches.get(worker):
            replaced.scope.cancel()
        # Connections that the worker had open before may be half-open.
        for end in [end for ends in self._ends.values() for end in ends if end.worker == worker]:
            end.end(GOING_AWAY, f'worker "{worker}" has reconnected')
        self._watches[worker] = watch
        watch.put(_SYNC)
        pending: list[PendingRequest[Any]] = [*self._ports.values(), *self._addresses.values()]
        for request in pending:
            if request.worker == worker:
                watch.send(request)
        self._watch_opened.set()
        return watch


class _Watch:
    """The actions that are to be sent to one worker, which has the capability CANCEL_REQUEST if it
    `cancels`.

    Cancelling `scope` ends the task that sends them.
    """

    def __init__(self, account: str, websocket: WebSocketConnection, cancels: bool) -> None:
        self.account = account
        self.websocket = websocket
        self.cancels = cancels
        self.scope = trio.CancelScope()
        self.actions: list[Mapping[str, Any]] = []
        self.changed = Wakeup()

    def put(self, action: Mapping[str, Any]) -> None:
        if action is not _SYNC or _SYNC not in self.actions:
            self.actions.append(action)
            self.changed.set()

    def send(self, request: PendingRequest[Any]) -> None:
        """Queue a request's action. From now on the account of this watch may answer it, and no other."""
        request.account = self.account
        self.put(request.action)

    def take_back(self, request: PendingRequest[Any]) -> None:
        """Drop a request's action, or if it was sent, ask the worker to cancel the request.

        So there are never more actions than requests that are pending or being sent.
        """
        if request.action in self.actions:
            self.actions.remove(request.action)
        elif self.cancels:
            self.put({"cancelRequestAction": {"session": request.id}})


def _take_pending(requests: dict[str, PendingRequest[AnswerT]], session: str, account: str) -> PendingRequest[AnswerT]:
    request = requests.get(session)
    if request is None or request.account != account:
        raise UnknownSessionError(
            f"session {shown(session)} is unknown, was answered before, or belongs to another account"
        )
    return requests.pop(session)


def close_to_relay(closed: Close | None, name: str) -> tuple[int, str]:
    """Return the code and the reason for closing one side of a tunnel after the other side has closed.

    `name` names the other side in the reason.
    """
    if closed is None or (closed.code == ABNORMAL and not closed.reason):
        return INTERNAL_ERROR, f"the connection to {name} was lost"
    if closed.code == ABNORMAL:
        return INTERNAL_ERROR, f"{name} {closed.reason}"
    if closed.is_violation:
        return INTERNAL_ERROR, f"{name} broke the protocol: {closed.reason}"
    if closed.code in (NORMAL, NO_STATUS):
        return NORMAL, ""
    return closed.code, f"{name} closed it: {closed.reason}" if closed.reason else f"{name} closed it"


async def _discard_messages(websocket: WebSocketConnection) -> None:
    """Read messages that have no meaning, so that trio-websocket handles pongs and the close among them."""
    while True:
        await websocket.get_message()


async def _ping_watch(
    websocket: WebSocketConnection, interval: float, alive: Callable[[], None], scope: trio.CancelScope
) -> None:
    """Ping every `interval` seconds and call `alive` for each pong. Cancel `scope` when a pong takes that long."""
    while True:
        with trio.move_on_after(interval) as patience:
            # Without a payload of ours, trio-websocket would use up random numbers that an embedding test has seeded.
            await websocket.ping(secrets.token_bytes(4))
        if patience.cancelled_caught:
            scope.cancel()
            return
        alive()
        await trio.sleep(interval)
