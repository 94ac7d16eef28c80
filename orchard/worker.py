"""The worker role: it makes the VMs on this host what the controller wants, and reports what they do.

`python -m orchard.worker` runs it; `WorkerService.run` does the same inside another program. Here are the sessions with
the controller and the command line. work/reconciler.py reconciles the VMs, and work/requests.py answers the controller's
other requests (port forwards, IP addresses).

A *session* is the conversation with the controller: registration, heartbeats, the watch over which the controller says
that something changed, `sync`, and reports. The session ends at the first failure of a request, and the next one begins
after a pause. The VMs' tasks (`Instance`) run in a nursery around all sessions, so that a failed session does not touch
them. A failure on the host ends no session: heartbeats report it to the controller.

The session is whole once the watch is open and leftover VMs are adopted or removed. The controller assigns VMs only
then. A worker that ends in order says goodbye, so that it gets no more.

VMs outlive the worker unless it runs with `--stop-vms-on-exit`, and the next worker adopts them. A leased VM does not
outlive its lease, which heartbeats renew (work/heartbeat.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from orchard import __version__
from orchard.auth import BootstrapToken
from orchard.base.command_line import (
    CommandLine,
    HomeError,
    orchard_home,
    parse_count,
    parse_number,
    parse_pairs,
    parse_resources,
)
from orchard.base.daemon import add_log_options, log_settings, run_main, run_until_signal
from orchard.base.files import WORKER_LOCK_FILE, WORKER_MEMORY_FILE, WORKERS_LOCK_FILE, LockError, lock_directory
from orchard.base.nursery import first_exception, unwrap_groups
from orchard.base.privileges import PrivilegeError, become_user, is_other_user
from orchard.client import Client, ClientError, ResponseError
from orchard.resources.bodies import ControllerInfo
from orchard.resources.cluster import (
    CANCEL_REQUEST,
    GUEST_AGENT,
    IMAGE_INVENTORY,
    SHUTDOWN_SCRIPT,
    VM_READY,
    VM_RESTART,
    WORKER_STATE,
)
from orchard.resources.json_text import encode
from orchard.schema import (
    DEFAULT_CPU,
    DEFAULT_MEMORY,
    LOGICAL_CORES,
    MEMORY_MIB,
    NAME,
    RUNTIMES,
    TART_VMS,
    WORKER_NAME_LABEL,
    Arch,
    Runtime,
    Worker,
)
from orchard.ssh.synthetic_server import SyntheticSSH
from orchard.tart import TartDriver, find_tart
from orchard.vm import supervisor
from orchard.vm.driver import Driver, DriverError
from orchard.vm.host import check_dhcp_lease, machine_id
from orchard.vm.synthetic import IMAGE_HELP, SyntheticDriver
from orchard.vm.vm_connections import ConnectorProcess, Dial
from orchard.work.failures import LOGIN_REMEDY, FailureLog, backoff_seconds, is_permanent
from orchard.work.heartbeat import Heartbeats, Lease
from orchard.work.leftovers import RefusedError
from orchard.work.memory import ClusterMemory, read_instance_id
from orchard.work.reconciler import Reconciler
from orchard.work.requests import RequestHandler

# Limit for an answer of the controller. With a heartbeat every 15 s, a vanished controller is noticed within a minute.
CONTROLLER_ANSWER_SECONDS = 30.0
# Not the generator of the module `random`: an embedding test seeds that one, and expects its own sequence.
_random_share = random.SystemRandom().random
# Apple's licence allows two macOS VMs to run on one host.
_MACOS_VMS = 2
# The first version of macOS that lets a normal user's process connect to VMs only with a permission.
_PERMISSION_SINCE = 15
# The average interval of reading which images the cluster wants pulled.
_PREPULL_SECONDS = 60.0
# The capabilities that this worker registers with; the last one only if its runtime has guest agents.
CAPABILITIES = (WORKER_STATE, CANCEL_REQUEST, IMAGE_INVENTORY, VM_READY, VM_RESTART, SHUTDOWN_SCRIPT, GUEST_AGENT)
# Limit for reporting, at the end of the worker, the VMs that ended with it.
_GOODBYE_SECONDS = 5.0
_EXIT_REFUSED = 2

_logger = logging.getLogger("orchard.worker")


class WorkerService:
    """One worker: its sessions with the controller. It closes neither `client` nor `driver`.

    `description` is what the worker registers with; the service adds `last_seen`, `capabilities` and the label with its
    name. `memory` is what an earlier worker in the same directory has kept.
    """

    def __init__(
        self,
        description: Worker,
        client: Client,
        driver: Driver,
        *,
        memory: ClusterMemory | None = None,
        stop_vms_on_exit: bool = False,
        clock: Callable[[], float] = time.time,
        lease_clock: Callable[[], float] = supervisor.clock,
        chance: Callable[[], float] = _random_share,
    ) -> None:
        """`clock` returns seconds since 1970, `lease_clock` seconds of a clock that is never set, `chance` 0 to 1."""
        labels = {WORKER_NAME_LABEL: description.name, **description.labels}
        has_agent = RUNTIMES[description.runtime].has_guest_agent
        able = tuple(one for one in CAPABILITIES if one != GUEST_AGENT or has_agent)
        self.description = replace(description, labels=labels, capabilities=able)
        self._client = client
        self._chance = chance
        self._memory = memory or ClusterMemory()
        self._lease = Lease(driver, lease_clock)
        self._heartbeats = Heartbeats(description.name, client, driver, self._lease, clock)
        self._vms = Reconciler(
            description,
            client,
            driver,
            self._lease,
            memory=self._memory,
            heartbeats=self._heartbeats,
            stop_vms_on_exit=stop_vms_on_exit,
            clock=clock,
            chance=chance,
        )
        self._requests = RequestHandler(client, driver, self._vms, self._lease)
        self._ssh = SyntheticSSH(driver, self._credentials) if isinstance(driver, SyntheticDriver) else None
        self._failures = FailureLog(description.name, lease_clock)
        # How often this worker has opened its watch, and whether the name has been its own since then.
        self._sessions = 0
        self._has_name = False
        self._has_started = False
        # Set when a session is whole.
        self._has_session = trio.Event()

    def leave_vms(self) -> None:
        """Let running VMs run on when this worker ends, whatever `stop_vms_on_exit` was."""
        self._vms.leave_vms()

    def expect_session(self) -> trio.Event:
        """Return an event that is set when the next session with the controller is whole."""
        self._has_session = trio.Event()
        return self._has_session

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled.

        `started()` is called when the worker is registered and has adopted the VMs on its host. Raises RefusedError.
        """
        with unwrap_groups():
            try:
                # Tasks of VMs and tunnels outlive each session, and end with the worker.
                async with trio.open_nursery() as nursery:
                    if self._ssh is not None:
                        nursery.start_soon(self._ssh.run)
                    nursery.start_soon(self._heartbeats.host.run)
                    await self._run_sessions(nursery, task_status)
            finally:
                with trio.move_on_after(_GOODBYE_SECONDS, shield=True):
                    await self._vms.reports.send_failures()
                    if self._has_name:
                        with suppress(ClientError):
                            await self._client.workers.goodbye(self.description.name)

    def _credentials(self, name: str) -> tuple[str, str] | None:
        """Return the user name and the password of a local VM."""
        instance = self._vms.instances.get(name)
        return (instance.vm.spec.username, instance.vm.spec.password) if instance is not None else None

    async def _run_sessions(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        failures = 0
        extra = {"worker": self.description.name}
        while True:
            sessions = self._sessions
            refusal: BaseException | None = None
            permanent = False
            try:
                await self._run_session(nursery, task_status)
            except* RefusedError as group:
                # Raised after the handlers, since what `except*` raises is a group again.
                refusal = first_exception(group)
            except* ClientError as group:
                permanent = self._note_failure(first_exception(group))
            except* Exception as group:
                _logger.exception("the session failed unexpectedly, retrying", extra=extra, exc_info=group)
            if refusal is not None:
                raise refusal
            await self._client.close_idle()
            failures = 0 if self._sessions > sessions else failures + 1
            await trio.sleep(backoff_seconds(failures, self._chance(), permanent=permanent))

    def _note_failure(self, error: BaseException) -> bool:
        """Log why a session has failed. Return whether only an operator can mend that."""
        assert isinstance(error, ClientError)
        self._failures.note(error)
        if isinstance(error, ResponseError) and error.status == 409:
            # Another worker has this name, and is assigned the same VMs.
            self._has_name = False
            self._vms.abandon_incomplete()
        return is_permanent(error)

    async def _run_session(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        info = await self._register()
        # All tasks of the session end with the first that fails.
        async with trio.open_nursery() as session:
            # The open watch is what gives this worker its name: of two workers with one name, the second is refused.
            await session.start(self._follow_watch, nursery)
            self._sessions += 1
            self._has_name = True
            _logger.info("registered with the controller", extra={"worker": self.description.name})
            session.start_soon(self._heartbeats.run)
            session.start_soon(self._follow_prepull, info)
            await self._vms.settle(nursery)
            self._heartbeats.settle()
            self._failures.clear()
            self._has_session.set()
            if not self._has_started:
                self._has_started = True
                task_status.started()
            session.start_soon(self._vms.reports.run)
            session.start_soon(self._vms.keep_in_sync, nursery)

    async def _register(self) -> ControllerInfo:
        """Register. Raises RefusedError if the first registration is refused, and ClientError."""
        name = self.description.name
        try:
            info = await self._client.info()
            # Before anything is reported: the controller may have been restored from an older state.
            _, revision = await self._client.vms.list_with_revision(worker=name)
            self._memory.observe(info.cluster_id, revision)
            highest = self._memory.highest if self._memory.is_restored else 0
            description = replace(
                self.description, last_seen=self._heartbeats.last_seen.now(), highest_revision=highest
            )
            sent = self._lease.now()
            stored = await self._client.workers.register(encode(description))
        except ResponseError as error:
            if error.status in (401, 403) and not self._sessions:
                remedy = f"; {LOGIN_REMEDY}" if error.status == 401 else ""
                raise RefusedError(f"the controller refuses this worker: {error.message}{remedy}") from error
            raise
        self._heartbeats.begin_session(stored.last_seen, info.capabilities)
        self._lease.begin_session(info.worker_offline_timeout / 1000, sent)
        self._vms.reports.begin_session(info.capabilities, stored.created_at)
        return info

    async def _follow_prepull(self, info: ControllerInfo) -> None:
        """Pull the images that the cluster wants on this host. `info` is the controller's present answer.

        Raises ClientError.
        """
        while IMAGE_INVENTORY in info.capabilities:
            mine = self.description.labels.items()
            self._heartbeats.images.want(entry.image for entry in info.prepull if entry.labels.items() <= mine)
            # Random, so that not all workers ask at once.
            await trio.sleep(_PREPULL_SECONDS * (0.5 + self._chance()))
            info = await self._client.info()

    async def _follow_watch(self, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
        """Follow the watch. Requests run in the nursery, since they may outlast the session."""
        async with self._client.rpc_watch(self.description.name) as actions:
            task_status.started()
            async for action in actions:
                if "syncVMsAction" in action:
                    self._vms.sync_due.set()
                else:
                    self._requests.start(action, nursery)


# ---- the command line ----------------------------------------------------------------------------------------------


def host_architecture() -> Arch:
    return "arm64" if platform.machine().lower() in ("arm64", "aarch64") else "amd64"


def host_resources(runtime: Runtime) -> dict[str, int]:
    """Return the resources that this host offers to VMs by default."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2
    offered = {LOGICAL_CORES: os.cpu_count() or 1, MEMORY_MIB: memory}
    return {TART_VMS: _MACOS_VMS, **offered} if RUNTIMES[runtime].runs_macos else offered


def worker_parser() -> CommandLine:
    """Return the parser of a worker's command line."""
    parser = CommandLine(
        prog="orchard worker run",
        description="Run VMs on this host for an Orchard controller.",
        epilog=IMAGE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("url", metavar="CONTROLLER_URL",
        help="URL of the controller, for example https://controller.example.com:6120, or those of several, with commas")  # fmt: skip
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--bootstrap-token", metavar="T",
        help="bootstrap token; visible to anyone on this host in the process list")  # fmt: skip
    token.add_argument("--bootstrap-token-stdin", action="store_true",
        help="read the bootstrap token from standard input")  # fmt: skip
    add("--name", metavar="N", help="name of this worker; default: the host name")
    add("--runtime", choices=tuple(_DRIVERS), default="tart",
        help="hypervisor; synthetic VMs are directories and processes, to try things out")  # fmt: skip
    add("--tart", metavar="PATH", help="path of the tart (or vetu) program; default: found on PATH")
    add("--user", metavar="NAME",
        help="become this user after a start as root; on macOS 15 and newer a process stays root to connect to VMs, for"
        " which other users need the permission Local Network")  # fmt: skip
    # For tests with a stand-in for tart.
    add("--connect-as-root", action="store_true", help=argparse.SUPPRESS)
    add("--allow-own-addresses", action="store_true", help=argparse.SUPPRESS)
    add("--resources", metavar="K=V,..", type=parse_resources, default={},
        help="resources to offer, in place of those of the host")  # fmt: skip
    add("--labels", metavar="K=V,..", type=parse_pairs, default={}, help="labels that VMs can ask for")
    add("--default-cpu", metavar="N", type=parse_number, default=DEFAULT_CPU,
        help="CPUs of a VM that does not set them; default: %(default)s")  # fmt: skip
    add("--default-memory", metavar="MIB", type=parse_number, default=DEFAULT_MEMORY,
        help="memory in MiB of a VM that does not set it; default: %(default)s")  # fmt: skip
    add("--no-pki", action="store_true",
        help="do not trust this host's CAs: the bootstrap token must contain the certificate")  # fmt: skip
    add("--stop-vms-on-exit", action="store_true",
        help="stop the VMs when this worker exits; default: they run on, and the next worker adopts them")  # fmt: skip
    add("--workers", metavar="N", type=parse_count, default=1,
        help="run N synthetic workers, NAME-1 to NAME-N; default: %(default)s")  # fmt: skip
    add("--synthetic-images", metavar="N", type=parse_number, default=0,
        help="begin with N images in the cache of each synthetic worker; default: %(default)s")  # fmt: skip
    add_log_options(parser)
    add("--version", action="version", version=f"orchard {__version__}")
    return parser


def _default_name() -> str:
    """Return the host name with each character that a worker's name cannot have replaced by "-"."""
    return re.sub(r"[^A-Za-z0-9:_.-]", "-", socket.gethostname()) or "worker"


def _read_bootstrap_token(parser: argparse.ArgumentParser, options: argparse.Namespace) -> BootstrapToken | None:
    """Return the bootstrap token from the command line or standard input. Exit with status 2 if it is invalid."""
    text = sys.stdin.readline() if options.bootstrap_token_stdin else options.bootstrap_token
    if text is None:
        return None
    if not text.strip():
        parser.error("the bootstrap token is empty")
    try:
        return BootstrapToken.parse(text)
    except ValueError as error:
        parser.error(str(error))


def _make_client(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Client:
    """Return a client of the controller, without connecting. Exit with status 2 if URL or bootstrap token is invalid."""
    token = _read_bootstrap_token(parser, options)
    certificate = token.certificate if token is not None else None
    if options.no_pki and certificate is None and options.url.lower().startswith("https:"):
        parser.error("--no-pki needs a bootstrap token that contains the controller's certificate")
    try:
        return Client(
            options.url,
            account=token.account if token is not None else "",
            token=token.token if token is not None else "",
            certificate=certificate,
            answer_seconds=CONTROLLER_ANSWER_SECONDS,
        )
    except ValueError as error:
        parser.error(str(error))


def _make_synthetic_driver(options: argparse.Namespace, worker: str, dial: Dial | None) -> Driver:
    images = [f"example.com/image-{number}:latest" for number in range(1, options.synthetic_images + 1)]
    return SyntheticDriver(orchard_home("worker") / "synthetic" / options.name / worker, images=images)


def _make_tart_driver(options: argparse.Namespace, worker: str, dial: Dial | None) -> Driver:
    """Return the driver of tart or vetu. Raises DriverError if that program is not found."""
    program = find_tart(options.tart, options.runtime)
    home, vetu = orchard_home("worker") / options.runtime, options.runtime == "vetu"
    return TartDriver(program, home, worker=worker, vetu=vetu, own_addresses=options.allow_own_addresses, dial=dial)


# The functions that make the driver of a worker, by --runtime: options, name of the worker, connector of --user.
_DRIVERS: Mapping[str, Callable[[argparse.Namespace, str, Dial | None], Driver]] = {
    "tart": _make_tart_driver,
    "vetu": _make_tart_driver,
    "synthetic": _make_synthetic_driver,
}


def _describe_worker(options: argparse.Namespace, name: str, machine: str, instance: str) -> Worker:
    # Clients ask for synthetic VMs as for those of tart.
    runtime: Runtime = "tart" if options.runtime == "synthetic" else options.runtime
    return Worker(
        name=name,
        arch="arm64" if options.runtime == "synthetic" else host_architecture(),
        runtime=runtime,
        machine_id=machine,
        instance_id=instance,
        resources={**host_resources(runtime), **options.resources},
        labels=options.labels,
        default_cpu=options.default_cpu,
        default_memory=options.default_memory,
    )


def _become_user(options: argparse.Namespace) -> ConnectorProcess | None:
    """Become the user of --user, before anything that is theirs is touched. Return the process that stays root.

    Raises PrivilegeError, OSError.
    """
    if not options.user or not is_other_user(options.user):
        return None
    version = platform.mac_ver()[0].partition(".")[0]
    needs_permission = version.isdigit() and int(version) >= _PERMISSION_SINCE
    connector = ConnectorProcess() if needs_permission or options.connect_as_root else None
    become_user(options.user)
    return connector


async def _work(options: argparse.Namespace, client: Client, connector: ConnectorProcess | None) -> None:
    """Run the workers of a command line until a signal to stop.

    Raises HomeError, LockError, RefusedError, DriverError, OSError.
    """
    name, synthetic = options.name, options.runtime == "synthetic"
    names = [name] if options.workers == 1 else [f"{name}-{number}" for number in range(1, options.workers + 1)]
    dial = connector.connect if connector is not None else None
    drivers = {each: _DRIVERS[options.runtime](options, each, dial) for each in names}
    # The VMs of a synthetic driver are known to this process alone.
    stop_vms = synthetic or options.stop_vms_on_exit
    directory = orchard_home("worker") / "synthetic" / name if synthetic else orchard_home("worker")

    async def run_all() -> None:
        machine, instance = await machine_id(), read_instance_id(directory)
        if not synthetic and platform.system() == "Darwin" and (warning := check_dhcp_lease()):
            _logger.warning(warning)
        # The VMs of a synthetic worker end with it, so the next one need not know what it was shown.
        kept = None if synthetic else directory / WORKER_MEMORY_FILE.format(name=name)
        async with client, trio.open_nursery() as nursery:
            if connector is not None:
                nursery.start_soon(connector.wait_ended)
            for each, driver in drivers.items():
                description = _describe_worker(options, each, machine, instance)
                memory = ClusterMemory(kept)
                service = WorkerService(description, client, driver, memory=memory, stop_vms_on_exit=stop_vms)
                nursery.start_soon(service.run)

    with _locked(directory, name):
        await run_until_signal(run_all)


@contextmanager
def _locked(directory: Path, name: str) -> Iterator[None]:
    """Lock a worker's directory, which workers of several names may share. `orchard demo` has it for itself."""
    try:
        with (
            lock_directory(directory, WORKERS_LOCK_FILE, shared=True),
            lock_directory(directory, WORKER_LOCK_FILE.format(name=name)),
        ):
            yield
    except LockError as error:
        raise LockError(f"cannot use the worker's directory: {error}; set ORCHARD_HOME to another") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status: 2 also if the controller refuses the worker."""
    parser = worker_parser()
    options = parser.parse_args(argv)
    if options.workers > 1 and options.runtime != "synthetic":
        parser.error(f"--workers is {options.workers}, expected 1: only --runtime synthetic can run more on one host")
    options.name = options.name or _default_name()
    if not NAME.fullmatch(options.name):
        parser.error(f'--name is "{options.name}", expected letters, digits and : _ . -')
    try:
        connector = _become_user(options)
    except (PrivilegeError, OSError) as error:
        print(f"orchard worker: {error}", file=sys.stderr)
        return 1
    work = partial(_work, options, _make_client(parser, options), connector)
    failures: dict[type[Exception], int] = dict.fromkeys((HomeError, LockError, DriverError, OSError), 1)
    failures[RefusedError] = _EXIT_REFUSED
    try:
        return run_main("orchard worker", work, failures, log_settings(options))
    finally:
        if connector is not None:
            connector.close()


if __name__ == "__main__":
    sys.exit(main())
