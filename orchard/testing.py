"""A whole cluster inside somebody's test: a controller on a loopback port, and workers whose VMs are directories.

In trio:

    async with cluster(workers=2) as c:
        vm = await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")

From any synchronous test, where the same methods block:

    with start_cluster(workers=2) as c:
        c.client.vms.create(name="vm", image="any")
        c.client.vms.wait("vm")

or as the pytest fixture `orchard_cluster`. `c.url` is for any other client: it is plain HTTP, and asks nobody who they
are unless the cluster was made with `auth=True`. The VMs really run their startup scripts, as processes of this host.
When the block ends, so do they, and the directory in which everything was is gone.

Law: it composes the roles as they are; nothing here is a simpler copy of them.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from orchard import controller
from orchard.client import Client, ClientError
from orchard.nursery import unwrap_groups
from orchard.schema import TART_VMS
from orchard.vm.driver import Driver
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import Identity, WorkerService

VMS_PER_WORKER = 2  # as on a Mac
GRACE = 1.0  # seconds for requests at work when the cluster ends


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster. `client` is closed with it."""

    url: str
    client: Client
    account: str = ""  # with every role; empty when nobody is asked
    token: str = field(default="", repr=False)
    ssh_port: int = 0  # of the jump host, on 127.0.0.1; 0: there is none


@asynccontextmanager
async def cluster(
    workers: int = 1,
    *,
    vms_per_worker: int = VMS_PER_WORKER,
    auth: bool = False,
    ssh: bool = False,
    directory: Path | None = None,
    port: int = 0,
    driver: Callable[[str], Driver] | None = None,
) -> AsyncIterator[Cluster]:
    """Run a cluster for the time of the block: `worker-1`, `worker-2` and so on, each with room for `vms_per_worker`.

    `ssh` serves the SSH jump host, too, which needs orchard-cluster[ssh]. `directory` keeps state and VMs, else a temporary one does. `driver` makes the driver of a worker from its name,
    else they are synthetic. Raises orchard.controller.StartError.
    """
    with TemporaryDirectory(prefix="orchard-") as temporary:
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
        with unwrap_groups():
            async with trio.open_nursery() as controlling:  # ends last: the workers have VMs to take away
                stop = trio.Event()
                run = partial(controller.run, settings, stop=stop, grace=GRACE)
                running: controller.Running = await controlling.start(run)
                admin = running.new_admin
                account, token = (admin.name, admin.token) if admin is not None else ("", "")
                async with (
                    Client(running.url, account=account, token=token) as client,
                    trio.open_nursery() as working,
                ):
                    async with trio.open_nursery() as starting:
                        for number in range(1, workers + 1):
                            identity = _identity(f"worker-{number}", vms_per_worker)
                            worker = WorkerService(identity, client, make_driver(identity.name), stop_vms_on_exit=True)
                            starting.start_soon(working.start, worker.run)
                    yield Cluster(running.url, client, account, token, running.ssh_port)
                    working.cancel_scope.cancel()
                stop.set()


def _identity(name: str, vms: int) -> Identity:
    return Identity(name=name, arch="arm64", runtime="tart", machine_id=name, resources={TART_VMS: vms})


# ---- for those without trio ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockingCluster:
    """A running cluster, for a thread that is not trio's. `client` is a Client whose methods block.

    What the Client gives as an asynchronous iterator or context manager is an ordinary one here.
    """

    url: str
    client: Any
    account: str = ""
    token: str = field(default="", repr=False)
    ssh_port: int = 0


@contextmanager
def start_cluster(workers: int = 1, **options: Any) -> Iterator[BlockingCluster]:
    """Run a cluster in a thread of its own for the time of the block; `options` are those of `cluster`."""
    portal = _Portal(partial(cluster, workers, **options))
    inside = portal.start()
    try:
        client = _Blocking(inside.client, portal)
        yield BlockingCluster(inside.url, client, inside.account, inside.token, inside.ssh_port)
    finally:
        portal.stop()


class _Portal:
    """A thread that runs a cluster under trio, and lets others call into it."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[Cluster]]) -> None:
        self._make = make
        self._ready = threading.Event()
        self._stop: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._cluster: Cluster | None = None
        self._error: BaseException | None = None
        self.holding: trio.Nursery  # of the tasks in which context managers are entered
        self._thread = threading.Thread(target=self._run, name="orchard cluster", daemon=True)

    def start(self) -> Cluster:
        """Give the cluster once it is up. Raises what it raises."""
        self._thread.start()
        self._ready.wait()
        if self._cluster is None:
            self._thread.join()
            assert self._error is not None
            raise self._error
        return self._cluster

    def stop(self) -> None:
        """End the cluster, and wait for it. Raises what it raised."""
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
        except BaseException as error:  # noqa: BLE001 -- it is raised again in the thread that waits
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
    """An object of the client, seen from another thread."""

    def __init__(self, target: object, portal: _Portal) -> None:
        self._target = target
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if callable(value):
            return partial(self._call, value)
        return _Blocking(value, self._portal) if type(value).__module__ == Client.__module__ else value

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        if isinstance(result, AbstractAsyncContextManager):
            return self._managed(result)
        return self._plain(result)

    def _plain(self, result: Any) -> Any:
        if isinstance(result, Awaitable):
            return self._portal.call(lambda: result)
        if isinstance(result, AsyncIterator):
            return self._iterated(result)
        return result

    @contextmanager
    def _managed(self, manager: AbstractAsyncContextManager[Any]) -> Iterator[Any]:
        release, released = trio.Event(), trio.Event()
        failures: list[ClientError] = []

        # One task enters and leaves: scopes and nurseries of trio belong to the task that opened them.
        async def hold(task_status: trio.TaskStatus[Any]) -> None:
            try:
                async with manager as value:
                    task_status.started(value)
                    await release.wait()
            except ClientError as error:
                failures.append(error)
            finally:
                released.set()

        async def leave() -> None:
            release.set()
            await released.wait()

        value = self._portal.call(partial(self._portal.holding.start, hold))
        try:
            yield self._plain(value)
        finally:
            self._portal.call(leave)
        if failures:
            raise failures[0]

    def _iterated(self, iterator: AsyncIterator[Any]) -> Iterator[Any]:
        nothing = object()

        async def following() -> Any:
            return await anext(iterator, nothing)

        while (item := self._portal.call(following)) is not nothing:
            yield item
