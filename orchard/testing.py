"""A whole Orchard cluster inside a test: a controller on a loopback port, and workers with synthetic VMs.

With trio:

    async with cluster(workers=2) as c:
        await c.client.vms.create(name="vm", image="any")
        vm = await c.client.vms.wait("vm")

In a synchronous test, where the same methods block:

    with start_cluster(workers=2) as c:
        c.client.vms.create(name="vm", image="any")
        vm = c.client.vms.wait("vm")

With pytest, the fixture `orchard_cluster` is such a blocking cluster (see `orchard.pytest_plugin`).

A synthetic VM is a directory and the processes of its startup script, which really runs on this host. At the end of the
block the processes are ended and the temporary directory with all state is deleted. Other clients can use `c.url`: plain
HTTP, without credentials unless the cluster was started with `auth=True`.

Controller and workers are the product's own, not imitations; only the driver of the VMs is another one.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import trio

from orchard import controller
from orchard.client import Client
from orchard.nursery import unwrap_groups
from orchard.schema import TART_VMS, Worker
from orchard.vm.driver import Driver
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import WorkerService

# As on a Mac.
_VMS_PER_WORKER = 2
# For requests in progress at the end of the cluster.
_GRACE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster.

    url: the controller's URL, for any HTTP client.
    client: an asynchronous client with every role, closed at the end of the cluster.
    account, token: credentials of a service account with every role; "" if the cluster needs no credentials.
    ssh_port: port of the SSH jump host on 127.0.0.1; 0 without one.
    """

    url: str
    client: Client
    account: str = ""
    token: str = field(default="", repr=False)
    ssh_port: int = 0


@asynccontextmanager
async def cluster(
    workers: int = 1,
    *,
    vms_per_worker: int = _VMS_PER_WORKER,
    auth: bool = False,
    ssh: bool = False,
    directory: Path | None = None,
    port: int = 0,
    driver: Callable[[str], Driver] | None = None,
) -> AsyncIterator[Cluster]:
    """Run a cluster for the time of an `async with` block under trio.

    workers: number of workers, named worker-1, worker-2 and so on. They are registered when the block begins.
    vms_per_worker: how many VMs run on one worker at the same time.
    auth: require credentials; `Cluster.account` and `Cluster.token` are those of an administrator.
    ssh: serve the SSH jump host too, which needs orchard-cluster[ssh].
    directory: where state and VMs are stored, and stay after the block; by default a temporary directory.
    port: TCP port of the controller on 127.0.0.1; 0 means any free port.
    driver: returns the driver of the worker with the given name; by default one for synthetic VMs.

    Raises orchard.controller.StartError if the controller cannot start, for example because the port is in use.
    """
    with TemporaryDirectory(prefix="orchard-") as temporary, unwrap_groups():
        home = directory or Path(temporary)
        make_driver = driver or (lambda name: SyntheticDriver(home / "vms" / name))
        settings = controller.ControllerSettings(
            data_dir=home / "controller",
            host="127.0.0.1",
            port=port,
            tls=False,
            auth=auth,
            ssh=("127.0.0.1", 0) if ssh else None,
        )
        # The controller ends last, since the workers report the end of their VMs to it.
        async with _run_controller(settings) as running:
            admin = running.new_admin
            account, token = (admin.name, admin.token) if admin is not None else ("", "")
            async with Client(running.url, account=account, token=token) as client, trio.open_nursery() as working:
                async with trio.open_nursery() as starting:
                    for number in range(1, workers + 1):
                        name = f"worker-{number}"
                        description = Worker(name=name, machine_id=name, resources={TART_VMS: vms_per_worker})
                        worker = WorkerService(description, client, make_driver(name), stop_vms_on_exit=True)
                        starting.start_soon(working.start, worker.run)
                yield Cluster(running.url, client, account, token, running.ssh_port)
                working.cancel_scope.cancel()


@asynccontextmanager
async def _run_controller(settings: controller.ControllerSettings) -> AsyncIterator[controller.Running]:
    """Run a controller for the time of the block. Raises StartError, and groups of exceptions."""
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(controller.run, settings, stop=stop, grace=_GRACE_SECONDS))
        stop.set()


# ---- without trio ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockingCluster(Cluster):
    """A running cluster for a thread that does not run trio.

    `client` has the methods of `orchard.client.Client`, and they block, and so have the streams and commands that they
    return: where that one returns an asynchronous iterator or context manager, this one returns an ordinary one. The
    other attributes are those of `Cluster`.
    """

    client: Any


@contextmanager
def start_cluster(workers: int = 1, **options: Any) -> Iterator[BlockingCluster]:
    """Run a cluster in a thread of its own for the time of a `with` block.

    The arguments are those of `cluster`, and so are the errors.
    """
    portal = _Portal(partial(cluster, workers, **options))
    inside = portal.start()
    try:
        client = _Blocking(inside.client, portal)
        yield BlockingCluster(inside.url, client, inside.account, inside.token, inside.ssh_port)
    finally:
        portal.stop()


class _Portal:
    """A thread that runs a cluster under trio, and in which other threads can call asynchronous functions."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[Cluster]]) -> None:
        self._make = make
        self._ready = threading.Event()
        self._stop: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._cluster: Cluster | None = None
        self._error: BaseException | None = None
        # For the tasks that hold asynchronous context managers open.
        self.holding: trio.Nursery
        self._thread = threading.Thread(target=self._run, name="orchard cluster", daemon=True)

    def start(self) -> Cluster:
        """Start the cluster, and return it when it runs. Raises what `cluster` raises."""
        self._thread.start()
        self._ready.wait()
        if self._cluster is None:
            self._thread.join()
            assert self._error is not None
            raise self._error
        return self._cluster

    def stop(self) -> None:
        """End the cluster, and wait until it has ended. Raises the error with which the cluster failed, if any."""
        if self._token is not None and self._stop is not None and self._thread.is_alive():
            self._token.run_sync_soon(self._stop.set)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        return trio.from_thread.run(function, trio_token=self._token)

    def _run(self) -> None:
        try:
            with unwrap_groups():
                trio.run(self._main, strict_exception_groups=True)
        # Raised again by `start` or `stop` in the other thread.
        except BaseException as error:  # noqa: BLE001
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with self._make() as inside, trio.open_nursery() as self.holding:
            self._cluster = inside
            self._ready.set()
            await self._stop.wait()
            self.holding.cancel_scope.cancel()


class _Blocking:
    """A client, a part of one such as `client.vms`, or what one of its methods returned, with methods that block.

    It is an iterator if the object is an asynchronous one.
    """

    def __init__(self, target: Any, portal: _Portal) -> None:
        self._target = target
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if callable(value):
            return partial(self._call, value)
        is_part = type(value).__module__.startswith("orchard.methods.")
        return _Blocking(value, self._portal) if is_part else value

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        nothing = object()

        async def following() -> Any:
            return await anext(self._target, nothing)

        if (item := self._portal.call(following)) is nothing:
            raise StopIteration
        return item

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        if isinstance(result, AbstractAsyncContextManager):
            return _BlockingContext(result, self._portal)
        if isinstance(result, AsyncIterator):
            return _Blocking(result, self._portal)
        return self._portal.call(lambda: result) if isinstance(result, Awaitable) else result


class _BlockingContext:
    """An ordinary context manager that enters and leaves an asynchronous one.

    One task does both, as trio demands it for cancel scopes and nurseries. An exception of the block passes through the
    asynchronous context manager, which may replace or suppress it.
    """

    def __init__(self, manager: AbstractAsyncContextManager[Any], portal: _Portal) -> None:
        self._manager = manager
        self._portal = portal
        self._entered = False
        self._leaving, self._left = trio.Event(), trio.Event()
        self._block_error: Exception | None = None
        self._error: Exception | None = None

    def __enter__(self) -> _Blocking:
        value = self._portal.call(partial(self._portal.holding.start, self._hold))
        return _Blocking(value, self._portal)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self._block_error = error if isinstance(error, Exception) else None
        self._portal.call(self._leave)
        if self._error is not None and self._error is not error:
            raise self._error
        return self._block_error is not None and self._error is None

    async def _hold(self, task_status: trio.TaskStatus[Any]) -> None:
        try:
            async with self._manager as value:
                self._entered = True
                task_status.started(value)
                await self._leaving.wait()
                if self._block_error is not None:
                    raise self._block_error
        # Raised again by `__exit__` in the other thread.
        except Exception as error:
            if not self._entered:
                raise
            self._error = error
        finally:
            self._left.set()

    async def _leave(self) -> None:
        self._leaving.set()
        await self._left.wait()
