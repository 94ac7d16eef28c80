"""The client for programs that do not run trio: the methods of `orchard.client.Client`, made to block.

    from orchard.blocking import open_client

    with open_client("https://controller:6120", account="ci", token="s3cret") as client:
        client.vms.create(name="build", image="ghcr.io/cirruslabs/macos-tahoe-base:latest")
        print(client.vms.wait("build").state.worker)

Each method takes the arguments of the asynchronous one and raises the same errors. Where that one returns an
asynchronous iterator or context manager, this one returns an ordinary one. The signatures are derived from those of the
asynchronous client, so that a type checker knows them.

A `Portal` is a thread that runs trio; the methods run there. Any number of threads may use one client.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from functools import partial, update_wrapper
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import trio

from orchard.client import Client
from orchard.methods.admin import ServiceAccounts, Settings
from orchard.methods.commands import RunningCommand
from orchard.methods.vms import VMs
from orchard.methods.workers import Workers
from orchard.net.websocket import TunnelStream

EnteredT = TypeVar("EnteredT")
WrappedT = TypeVar("WrappedT")
TargetT = TypeVar("TargetT")
ReturnedT = TypeVar("ReturnedT")
GivenP = ParamSpec("GivenP")


# ---- the thread ----------------------------------------------------------------------------------------------------


class Portal:
    """A thread that runs trio, where other threads can call asynchronous functions, for the time of a `with` block."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._stop: trio.Event
        self._token: trio.lowlevel.TrioToken
        # Holds the tasks that keep asynchronous context managers open.
        self._holding: trio.Nursery
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="orchard", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with trio.open_nursery() as self._holding:
            self._ready.set()
            await self._stop.wait()
            self._holding.cancel_scope.cancel()

    def call(self, function: Callable[[], Awaitable[ReturnedT]]) -> ReturnedT:
        """Call an asynchronous function in the thread, and return its result. Raises what it raises."""
        return trio.from_thread.run(function, trio_token=self._token)

    def start(self, function: Callable[..., Awaitable[None]]) -> Any:
        """Run a task in the thread until the end of the block. Return what it starts with, raise what it raises before."""
        return self.call(partial(self._holding.start, function))

    def hold(self, manager: AbstractAsyncContextManager[EnteredT]) -> HeldContext[EnteredT, EnteredT]:
        """Return an ordinary context manager that enters and leaves an asynchronous one, and has the same value."""
        return HeldContext(self, manager, lambda entered: entered)


class HeldContext(AbstractContextManager[WrappedT, bool], Generic[EnteredT, WrappedT]):
    """An ordinary context manager that enters and leaves an asynchronous one. `wrap` makes its value.

    One task does both, as trio demands it for cancel scopes and nurseries. An exception of the block passes through the
    asynchronous context manager, which may replace or suppress it.
    """

    def __init__(
        self, portal: Portal, manager: AbstractAsyncContextManager[EnteredT], wrap: Callable[[EnteredT], WrappedT]
    ) -> None:
        self._portal = portal
        self._manager = manager
        self._wrap = wrap
        self._has_entered = False
        self._leaving, self._left = trio.Event(), trio.Event()
        self._block_error: Exception | None = None
        self._error: Exception | None = None

    def __enter__(self) -> WrappedT:
        return self._wrap(self._portal.start(self._run))

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self._block_error = error if isinstance(error, Exception) else None
        self._portal.call(self._leave)
        if self._error is not None and self._error is not error:
            raise self._error
        return self._block_error is not None and self._error is None

    async def _run(self, *, task_status: trio.TaskStatus[EnteredT]) -> None:
        try:
            async with self._manager as value:
                self._has_entered = True
                task_status.started(value)
                await self._leaving.wait()
                if self._block_error is not None:
                    raise self._block_error
        # Raised again by `__exit__` in the other thread.
        except Exception as error:
            if not self._has_entered:
                raise
            self._error = error
        finally:
            self._left.set()

    async def _leave(self) -> None:
        self._leaving.set()
        await self._left.wait()


class BlockingIterator(Iterator[ReturnedT]):
    """An ordinary iterator over an asynchronous one."""

    def __init__(self, items: AsyncIterator[ReturnedT], portal: Portal) -> None:
        self._items = items
        self._portal = portal

    def __next__(self) -> ReturnedT:
        # In a list, since StopAsyncIteration and StopIteration cannot leave a coroutine.
        async def take() -> list[ReturnedT]:
            try:
                return [await anext(self._items)]
            except StopAsyncIteration:
                return []

        for item in self._portal.call(take):
            return item
        raise StopIteration


# ---- methods that block --------------------------------------------------------------------------------------------


class Blocking(Generic[TargetT]):
    """An object whose asynchronous methods block. They run in the thread of `portal`."""

    def __init__(self, target: TargetT, portal: Portal) -> None:
        self.target = target
        self.portal = portal


class AsCall(Generic[TargetT, GivenP, ReturnedT]):
    """An asynchronous method that blocks."""

    def __init__(self, method: Callable[Concatenate[TargetT, GivenP], Awaitable[ReturnedT]]) -> None:
        self._method = method

    def __get__(self, instance: Blocking[TargetT], owner: type) -> Callable[GivenP, ReturnedT]:
        def call(*args: GivenP.args, **kwargs: GivenP.kwargs) -> ReturnedT:
            return instance.portal.call(lambda: self._method(instance.target, *args, **kwargs))

        return _described(call, self._method, instance)


class AsIterator(Generic[TargetT, GivenP, ReturnedT]):
    """A method that returns an asynchronous iterator; this one returns an ordinary iterator."""

    def __init__(self, method: Callable[Concatenate[TargetT, GivenP], AsyncIterator[ReturnedT]]) -> None:
        self._method = method

    def __get__(self, instance: Blocking[TargetT], owner: type) -> Callable[GivenP, Iterator[ReturnedT]]:
        def call(*args: GivenP.args, **kwargs: GivenP.kwargs) -> Iterator[ReturnedT]:
            return BlockingIterator(self._method(instance.target, *args, **kwargs), instance.portal)

        return _described(call, self._method, instance)


class AsContext(Generic[TargetT, GivenP, EnteredT, WrappedT]):
    """A method that returns an asynchronous context manager; this one returns an ordinary one of `wrap(value, portal)`."""

    def __init__(
        self,
        method: Callable[Concatenate[TargetT, GivenP], AbstractAsyncContextManager[EnteredT]],
        wrap: Callable[[EnteredT, Portal], WrappedT],
    ) -> None:
        self._method = method
        self._wrap = wrap

    def __get__(self, instance: Blocking[TargetT], owner: type) -> Callable[GivenP, AbstractContextManager[WrappedT]]:
        def call(*args: GivenP.args, **kwargs: GivenP.kwargs) -> AbstractContextManager[WrappedT]:
            manager = self._method(instance.target, *args, **kwargs)
            return HeldContext(instance.portal, manager, lambda entered: self._wrap(entered, instance.portal))

        return _described(call, self._method, instance)


def _described(
    call: Callable[GivenP, ReturnedT], method: Callable[..., object], instance: Blocking[TargetT]
) -> Callable[GivenP, ReturnedT]:
    """Return the function with the name, the signature and the documentation of a method of the target."""
    bound = method.__get__(instance.target, type(instance.target))
    return update_wrapper(call, bound)


# ---- the client ----------------------------------------------------------------------------------------------------


class BlockingStream(Blocking[TunnelStream]):
    """The bytes of a TCP connection into a VM. Iterating over it returns what arrives."""

    receive_some = AsCall(TunnelStream.receive_some)
    send_all = AsCall(TunnelStream.send_all)
    aclose = AsCall(TunnelStream.aclose)

    def __iter__(self) -> Iterator[bytes]:
        while data := self.receive_some():
            yield data


class BlockingCommand(Blocking[RunningCommand]):
    """A command that runs in a VM: an iterator over its output, as ("stdout" or "stderr", bytes)."""

    send = AsCall(RunningCommand.send)
    send_eof = AsCall(RunningCommand.send_eof)
    resize = AsCall(RunningCommand.resize)
    wait_result = AsCall(RunningCommand.wait_result)

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return BlockingIterator(self.target, self.portal)

    @property
    def exit_code(self) -> int | None:
        """The command's exit code, after the end of the iteration."""
        return self.target.exit_code


class BlockingVMs(Blocking[VMs]):
    """The methods of /vms; see `orchard.client.Client.vms`."""

    create = AsCall(VMs.create)
    get = AsCall(VMs.get)
    list_with_revision = AsCall(VMs.list_with_revision)
    list = AsCall(VMs.list)
    replace = AsCall(VMs.replace)
    patch = AsCall(VMs.patch)
    list_page = AsCall(VMs.list_page)
    delete = AsCall(VMs.delete)
    delete_matching = AsCall(VMs.delete_matching)
    restart = AsCall(VMs.restart)
    run = AsCall(VMs.run)
    watch = AsContext(VMs.watch, BlockingIterator)
    wait = AsCall(VMs.wait)
    events = AsIterator(VMs.events)
    events_page = AsCall(VMs.events_page)
    follow = AsContext(VMs.follow, BlockingIterator)
    append_events = AsCall(VMs.append_events)
    port_forward = AsContext(VMs.port_forward, BlockingStream)
    exec = AsContext(VMs.exec, BlockingCommand)
    ip = AsCall(VMs.ip)
    issue_access_token = AsCall(VMs.issue_access_token)
    report = AsCall(VMs.report)


class BlockingWorkers(Blocking[Workers]):
    """The methods of /workers; see `orchard.client.Client.workers`."""

    register = AsCall(Workers.register)
    get = AsCall(Workers.get)
    list = AsCall(Workers.list)
    put = AsCall(Workers.put)
    port_forward = AsContext(Workers.port_forward, BlockingStream)
    goodbye = AsCall(Workers.goodbye)
    pause = AsCall(Workers.pause)
    drain = AsCall(Workers.drain)
    undrain = AsCall(Workers.undrain)
    delete = AsCall(Workers.delete)


class BlockingServiceAccounts(Blocking[ServiceAccounts]):
    """The methods of /service-accounts; see `orchard.client.Client.service_accounts`."""

    create = AsCall(ServiceAccounts.create)
    get = AsCall(ServiceAccounts.get)
    list = AsCall(ServiceAccounts.list)
    replace = AsCall(ServiceAccounts.replace)
    delete = AsCall(ServiceAccounts.delete)


class BlockingSettings(Blocking[Settings]):
    """The methods of /cluster-settings; see `orchard.client.Client.cluster_settings`."""

    get = AsCall(Settings.get)
    put = AsCall(Settings.put)


class BlockingClient(Blocking[Client]):
    """The methods of `orchard.client.Client`, which block. `url` is the controller's."""

    def __init__(self, target: Client, portal: Portal) -> None:
        super().__init__(target, portal)
        self.url = target.url
        self.vms = BlockingVMs(target.vms, portal)
        self.workers = BlockingWorkers(target.workers, portal)
        self.service_accounts = BlockingServiceAccounts(target.service_accounts, portal)
        self.cluster_settings = BlockingSettings(target.cluster_settings, portal)

    request = AsCall(Client.request)
    check = AsCall(Client.check)
    info = AsCall(Client.info)
    health = AsCall(Client.health)
    accept_state = AsCall(Client.accept_state)
    capacity = AsCall(Client.capacity)
    history = AsCall(Client.history)
    sessions = AsCall(Client.sessions)
    watch = AsContext(Client.watch, BlockingIterator)
    rpc_watch = AsContext(Client.rpc_watch, BlockingIterator)


@contextmanager
def open_client(
    url: str, *, account: str = "", token: str = "", access_token: str = "", certificate: bytes | None = None
) -> Iterator[BlockingClient]:
    """Open a client for the time of a `with` block. The arguments are those of `orchard.client.Client`.

    Raises ValueError for an invalid URL or certificate.
    """
    client = Client(url, account=account, token=token, access_token=access_token, certificate=certificate)
    with Portal() as portal, portal.hold(client) as entered:
        yield BlockingClient(entered, portal)
