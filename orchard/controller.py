"""The controller role: settings, first start, the scheduling loop, and how it all starts and stops. Law: it composes.

`python -m orchard.controller` runs it; `run` is the same for an embedding program.

State and events are opened first and closed last; in between, one nursery holds the tasks that write them. The API is
served and VMs are scheduled inside of that, so that whatever stops, what was acknowledged is on disk. At a stop no
connection is accepted any more, those at work get a time of grace, the scheduler ends, then the writers.

The scheduler runs whenever something changed that could matter, when time alone makes it due, and every TICK seconds
in case that somebody forgot to wake it. Each round plans and applies, for some VMs at a time and with a look around in
between, until a plan has nothing to do.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import ipaddress
import logging
import math
import os
import resource
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TextIO

import trio

from orchard import __version__, auth, scheduler, transitions
from orchard.api import API
from orchard.codec import APIError
from orchard.daemon import orchard_home, parse_address, parse_seconds, run_program, run_until_signal
from orchard.files import (
    ACCESS_KEY_BYTES,
    ACCESS_KEY_FILE,
    CONTROLLER_LOCK_FILE,
    EVENTS_DIRECTORY,
    SSH_HOST_KEY_FILE,
    LockError,
    lock_directory,
    write_private,
)
from orchard.fsck import exposed
from orchard.liveness import Liveness
from orchard.net import tcp, tls
from orchard.net.server import Limits, serve
from orchard.net.websocket import PING_INTERVAL
from orchard.nursery import unwrap_groups
from orchard.reach import VMAccess
from orchard.schema import NAME, VM, ServiceAccount, Worker
from orchard.ssh.exec import Executor
from orchard.storage.events import EventLog
from orchard.storage.journal import Broken, DamagedError, NotWritten
from orchard.store import Change, Store
from orchard.tunnel import Rendezvous

PORT = 6120
OFFLINE_TIMEOUT = 180.0  # seconds of silence after which a worker's VMs fail
TICK = 5.0  # seconds between two looks of the scheduler that nothing asked for
LATE = 0.1  # seconds after its time that it gets to them: this process stood still, and heard nobody
AT_ONCE = 50  # VMs that one plan is about: some milliseconds of work, while everybody else waits
RETRY_SECONDS = 1.0  # after a write that failed; a full disk is not asked more often
GRACE = 10.0  # seconds for requests at work to end at a stop
NO_SSH = "--listen-ssh needs the packages of the extra ssh: pip install 'orchard-cluster[ssh]'"
DESCRIPTORS = 64  # that are not connections: files, the log, threads' pipes
COLLECT_AT = (10_000, 20, 25)  # allocations, then rounds of the generation below, before one is looked through

_logger = logging.getLogger("orchard.controller")


class StartError(Exception):
    """The controller can't start; str() says why, and what to do."""


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """How a controller is run. Times are in seconds; `host` None is every address, port 0 any free one."""

    data_dir: Path
    host: str | None = None
    port: int = PORT
    prefix: str = ""
    certificate: Path | None = None  # PEM; with `key`. None: self-signed, kept in the data directory
    key: Path | None = None
    tls: bool = True
    auth: bool = True
    ssh: tuple[str | None, int] | None = None  # host and port of the SSH jump host; None: there is none
    ssh_host_key: Path | None = None  # None: made at the first start, kept in the data directory
    ssh_auth: bool = True
    admin_token: str = field(default="", repr=False)  # of bootstrap-admin, which is (re)created with it
    worker_offline_timeout: float = OFFLINE_TIMEOUT
    ping_interval: float = PING_INTERVAL


@dataclass(frozen=True, slots=True)
class Running:
    """A controller that serves. `certificate` (PEM) is set when clients have to be told what to trust."""

    url: str
    certificate: bytes | None = None
    fingerprint: str = ""
    ssh_port: int = 0  # 0: there is no SSH
    new_admin: ServiceAccount | None = field(default=None, repr=False)  # made at this start, for somebody to be told


Listening = tuple[Sequence[trio.abc.Listener[trio.abc.Stream]], Running]
Listen = Callable[[ControllerSettings], Awaitable[Listening]]
OpenData = Callable[[Path], contextlib.AbstractContextManager[tuple[Store, EventLog]]]


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


# ---- scheduling ----------------------------------------------------------------------------------------------------


class Cluster:
    """The store and those who follow it: the scheduler, the workers to be told, the events of deleted VMs."""

    def __init__(
        self, settings: ControllerSettings, store: Store, events: EventLog, clock: Callable[[], datetime.datetime]
    ) -> None:
        self.store = store
        self._clock = clock
        self.events = events
        self.rendezvous = Rendezvous(settings.ping_interval)
        self._wake = trio.Event()
        self._restarted: dict[str, float] = {}  # VM uid -> its last restart, by the monotonic clock
        self._inherited = {vm.uid for vm in store.state.vms.values() if vm.state.status == "failed"}
        self._offline_timeout = settings.worker_offline_timeout
        self.liveness = Liveness(trio.current_time, self._offline_timeout, self._returned, store.state.workers)
        self._rebuild_planner()
        store.on_commit(self._committed)
        store.on_undo(self._rebuild_planner)
        store.on_durable(self._durable)

    def wake(self) -> None:
        """Have the scheduler look again."""
        self._wake.set()

    def _rebuild_planner(self) -> None:
        """Write the scheduler's planner anew."""
        state = self.store.state
        self.planner = scheduler.Planner(
            scheduler.Snapshot(
                vms=(),
                workers={},
                seen=self.liveness.seen,
                restarted=self._restarted,
                profile=state.settings.scheduler_profile,
                offline_timeout=self._offline_timeout,
                departed=self.liveness.departed,
                began=self.liveness.began,
                inherited=self._inherited,
            )
        )
        for worker in state.workers.values():
            self.planner.put_worker(worker)
        for vm in state.vms.values():
            self.planner.put_vm(vm)

    def _returned(self, worker: str) -> None:
        self.planner.heard(worker)
        self.wake()

    def _committed(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change.new, VM):
                self.planner.put_vm(change.new)
            elif isinstance(change.new, Worker):
                self.planner.put_worker(change.new)
            elif isinstance(change.old, VM) and change.new is None:
                self.planner.drop_vm(change.name)
            elif isinstance(change.old, Worker) and change.new is None:
                self.planner.drop_worker(change.name)
        self.wake()

    def _durable(self, changes: list[Change]) -> None:
        for worker in {worker for change in changes for worker in concerned(change)}:
            self.rendezvous.sync(worker)
        for change in changes:
            if isinstance(change.old, VM) and (reason := ended(change.old, change.new)):
                self.rendezvous.end_tunnels(change.old.uid, reason)
            if change.new is None and isinstance(change.old, VM):
                self.events.drop(change.old.uid)
                self._restarted.pop(change.old.uid, None)
            elif change.new is None and isinstance(change.old, Worker):
                self.liveness.forget(change.old.name)

    async def schedule(self) -> None:
        """Keep every VM where it belongs, until cancelled."""
        while True:
            self._wake = trio.Event()
            now = trio.current_time()
            try:
                while (due := self.schedule_some(now, self._clock())) is None:
                    await trio.lowlevel.checkpoint()  # for the others
                await self.store.wait_durable()
            except APIError as error:
                _logger.error("scheduling has to wait: %s", error.message)
                await trio.sleep(RETRY_SECONDS)
                continue
            due = min(due, now + TICK)
            with trio.move_on_at(due):
                await self._wake.wait()
            if (late := trio.current_time() - due) > LATE:
                _logger.warning("the scheduler comes late", extra={"seconds": round(late, 1)})
                self.liveness.deaf(late)

    def schedule_some(self, now: float, clock: datetime.datetime) -> float | None:
        """Plan for some VMs and apply that. Give when time alone makes it due again; None: at once, there may be more."""
        plan = self.planner.plan(now, self.store.state.settings.scheduler_profile, AT_ONCE)
        if self._apply(plan, now, clock) or not plan.room:
            return None
        return math.inf if plan.next_at is None else plan.next_at

    def _apply(self, plan: scheduler.Plan, now: float, clock: datetime.datetime) -> bool:
        """Carry a plan out in one transaction; False when it asks for nothing new."""
        vms, workers = self.store.state.vms, self.store.state.workers
        with self.store.transaction() as tx:
            for name, reason in plan.fail.items():
                tx.put(transitions.fail(vms[name], reason))
                _logger.warning("a VM failed", extra={"vm": name, "reason": reason})
            for name in plan.restart:
                tx.put(transitions.restart(vms[name], clock))
                self._restarted[vms[name].uid] = now
                self._inherited.discard(vms[name].uid)
                _logger.info("a VM is restarted", extra={"vm": name})
            for name, worker in plan.assign.items():
                tx.put(transitions.assign(vms[name], workers[worker], clock))
                _logger.info("a VM has a worker", extra={"vm": name, "worker": worker})
            for name, reason in plan.waiting.items():
                waiting = transitions.wait(vms[name], reason)
                if waiting is not vms[name]:
                    tx.put(waiting)
            return bool(tx.changes)


def concerned(change: Change) -> set[str]:
    """Name the workers that have something to do because of a change.

    A worker that reports what it sees need not be told of it.
    """
    old = change.old if isinstance(change.old, VM) else None
    new = change.new if isinstance(change.new, VM) else None
    workers = {vm.state.worker for vm in (old, new) if vm is not None} - {""}
    if old is not None and new is not None and _task(old) == _task(new):
        return set()
    return workers


def ended(old: VM, new: object) -> str:
    """Say why a VM that ran is not there any more for those who are connected to it ("": it is)."""
    if not isinstance(new, VM):
        return f'VM "{old.name}" was deleted'
    if new.state.status == "failed" and old.state.status != "failed":
        return f'VM "{old.name}" has failed: {new.state.status_message}'
    return ""


def _task(vm: VM) -> tuple[object, ...]:
    """What a VM asks of its worker."""
    return (vm.key, vm.state.worker, vm.meta.generation, vm.state.status == "failed")


# ---- the data directory --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        with lock_directory(directory, CONTROLLER_LOCK_FILE):
            yield
    except LockError as error:
        raise StartError(f"cannot use the data directory: {error}; another can be given with --data-dir") from error


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[tuple[Store, EventLog]]:
    """Load state and events, and close the state in the end. Raises StartError."""
    with contextlib.ExitStack() as stack:
        try:
            for problem in exposed(directory):
                raise StartError(problem)
            store = Store.open(directory, utc_now())
            stack.callback(store.close)
            events = EventLog(directory / EVENTS_DIRECTORY)
            events.open({vm.uid for vm in store.state.vms.values()})
        except (DamagedError, NotWritten, OSError) as error:
            raise StartError(str(error)) from error
        yield store, events


def access_key(directory: Path) -> bytes:
    """Give the key that signs access tokens, made at the first start: it outlives restarts. Raises StartError."""
    path = directory / ACCESS_KEY_FILE
    try:
        if not path.exists():
            write_private(path, secrets.token_bytes(ACCESS_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise StartError(f"cannot use the key {path}: {error.strerror}") from error
    if len(key) != ACCESS_KEY_BYTES:
        raise StartError(f"{path} holds {len(key)} bytes, expected {ACCESS_KEY_BYTES}; without it, tokens are lost")
    return key


def ensure_admin(store: Store, token: str, now: datetime.datetime) -> ServiceAccount | None:
    """Let somebody in: with a token given, bootstrap-admin by that token; else, with no accounts, by a random one.

    Give the account when its token has to be told to somebody.
    """
    accounts = store.state.accounts
    if not token and accounts:
        return None
    old = accounts.get(auth.BOOTSTRAP_ADMIN)
    admin = ServiceAccount(
        name=auth.BOOTSTRAP_ADMIN,
        token=token or auth.random_token(),
        roles=auth.ROLES,
        created_at=old.created_at if old is not None else now,
    )
    if admin != old:
        with store.transaction() as tx:
            tx.put(admin)
    return None if token else admin


# ---- running -------------------------------------------------------------------------------------------------------


async def run(
    settings: ControllerSettings,
    *,
    stop: trio.Event | None = None,
    grace: float = GRACE,
    open_data: OpenData = opened,
    listen: Listen | None = None,
    clock: Callable[[], datetime.datetime] = utc_now,
    task_status: trio.TaskStatus[Running] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a controller until cancelled or until `stop` is set; `started(Running)` when it serves.

    `open_data` opens the data directory, `listen` gives other listeners than the settings ask for, and under which URL
    they are reached, and `clock` gives the time: with these three a controller runs in a simulation as it does here.

    Raises StartError, and Broken when the disk fails in a way that leaves nobody sure of what it holds.
    """
    stop = stop if stop is not None else trio.Event()
    with unwrap_groups(), _locked(settings.data_dir), open_data(settings.data_dir) as (store, events):
        cluster = Cluster(settings, store, events, clock)
        gate = auth.Gate(store.state.accounts) if settings.auth else None
        key = access_key(settings.data_dir)
        vm_access = VMAccess(store, cluster.rendezvous)
        executor = Executor(vm_access)
        api = API(
            store,
            events,
            cluster.liveness,
            cluster.rendezvous,
            vm_access,
            executor,
            gate,
            key,
            prefix=settings.prefix,
            offline_timeout=settings.worker_offline_timeout,
            waits_for=lambda spec: cluster.planner.waits_for(spec),  # there is a new planner at times
            clock=clock,
        )
        async with trio.open_nursery() as writers:  # end last: what the tasks below change is still to be stored
            await writers.start(store.run)
            await writers.start(events.run)
            new_admin = await _admit_somebody(settings, store, clock())
            async with trio.open_nursery() as planners:  # end when the last answer is out
                planners.start_soon(cluster.schedule)
                await planners.start(executor.run)
                listeners, running = await (listen or _listen)(settings)
                answer = partial(serve, api.handle, admit=api.admit, limits=_limits(), stop=stop, grace=grace)
                async with trio.open_nursery() as serving:  # ends with `stop`
                    await serving.start(answer, listeners)
                    ssh_port = await _serve_ssh(settings, store, vm_access, gate, key, planners)
                    task_status.started(replace(running, new_admin=new_admin, ssh_port=ssh_port))
                planners.cancel_scope.cancel()
            try:
                await store.wait_durable()
            except APIError as error:
                _logger.error("what was changed last could not be stored, and nobody was told of it: %s", error.message)
            writers.cancel_scope.cancel()


async def _serve_ssh(
    settings: ControllerSettings,
    store: Store,
    vm_access: VMAccess,
    gate: auth.Gate | None,
    key: bytes,
    nursery: trio.Nursery,
) -> int:
    """Start the SSH jump host, if it is wanted, and give its port. Raises StartError."""
    if settings.ssh is None:
        return 0
    try:
        from orchard.ssh import jump  # what it needs may not be installed, and takes a third of a second to import
    except ImportError:
        raise StartError(NO_SSH) from None
    host, port = settings.ssh
    try:
        host_key = jump.host_key(settings.ssh_host_key or settings.data_dir / SSH_HOST_KEY_FILE)
        server = jump.JumpHost(store.state, vm_access, gate if settings.ssh_auth else None, key, utc_now)
        started: int = await nursery.start(server.serve, host, port, host_key, settings.ping_interval)
    except ValueError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(
            f"cannot serve SSH on {host or ''}:{port}: {error.strerror or error}; see --listen-ssh"
        ) from error
    return started


async def _admit_somebody(settings: ControllerSettings, store: Store, now: datetime.datetime) -> ServiceAccount | None:
    if not settings.auth:
        return None
    try:
        admin = ensure_admin(store, settings.admin_token, now)
        await store.wait_durable()
    except APIError as error:
        raise StartError(f"cannot store the first service account: {error.message}") from error
    return admin


async def _listen(settings: ControllerSettings) -> Listening:
    """Open the sockets, with TLS if it is wanted. Raises StartError."""
    context, certificate, fingerprint = None, None, ""
    try:
        if settings.tls:
            if settings.certificate is not None and settings.key is not None:
                cert_file, key_file = settings.certificate, settings.key
            else:
                cert_file, key_file = await tls.self_signed(settings.data_dir)
                certificate = await trio.Path(cert_file).read_bytes()
            context = tls.server_context(cert_file, key_file)
            fingerprint = tls.fingerprint(await trio.Path(cert_file).read_bytes())
    except tls.TLSError as error:
        raise StartError(str(error)) from error
    where = f"{settings.host or ''}:{settings.port}"
    try:
        listeners = await trio.open_tcp_listeners(settings.port, host=settings.host)
    except OSError as error:
        raise StartError(f"cannot listen on {where}: {error.strerror or error}; see --listen") from error
    for listener in listeners:
        tcp.keep_accepted_alive(listener)
    if settings.port == 0:  # each address got another port: one is enough
        for listener in listeners[1:]:
            await listener.aclose()
        del listeners[1:]
    host, port = listeners[0].socket.getsockname()[:2]
    url = f"{'https' if settings.tls else 'http'}://{reachable(host)}:{port}{settings.prefix}"
    running = Running(url, certificate, fingerprint)
    if context is None:
        return listeners, running
    return [trio.SSLListener(listener, context) for listener in listeners], running


def reachable(host: str) -> str:
    """Give the address by which this host reaches a socket that listens on `host`, as it stands in a URL."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return "[::1]" if address.version == 6 else "127.0.0.1"
    return f"[{address}]" if address.version == 6 else str(address)


def _limits() -> Limits:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Limits()
    return Limits(connections=max(1, min(Limits().connections, soft - DESCRIPTORS)))


# ---- the command line ----------------------------------------------------------------------------------------------


def api_prefix(text: str) -> str:
    """Read what is put before /v1, without a slash at its end; "/" is nothing."""
    prefix = text.rstrip("/")
    if prefix and (prefix[0] != "/" or not all(map(NAME.fullmatch, prefix[1:].split("/")))):
        raise argparse.ArgumentTypeError(f'"{text}" is no path, expected one such as /orchard')
    return prefix


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchard.controller",
        description="Run an Orchard controller: the REST API, the scheduler and the state of a cluster of Tart VMs.",
        epilog="ORCHARD_BOOTSTRAP_ADMIN_TOKEN sets the token of the service account bootstrap-admin, which otherwise"
        " is made at the first start, with a random token that is shown once.",
    )
    add = parser.add_argument
    port = os.environ.get("PORT") or str(PORT)
    add("--listen", metavar="HOST:PORT", type=parse_address, default=f":{port}",
        help=f"address to serve on; default :{PORT} on all addresses, the port from $PORT")  # fmt: skip
    add("--data-dir", metavar="DIR", type=Path, help="directory of the state; default $ORCHARD_HOME/controller")
    add("--api-prefix", metavar="P", type=api_prefix, default="", help="path that is put before /v1")
    add("--controller-cert", metavar="FILE", type=Path, help="TLS certificate (chain) in PEM; default: self-signed")
    add("--controller-key", metavar="FILE", type=Path, help="its private key in PEM")
    add("--listen-ssh", metavar="HOST:PORT", type=parse_address, help="address to serve SSH into VMs on; default: none")
    add("--ssh-host-key", metavar="FILE", type=Path, help="its private key; default: made at the first start")
    add("--insecure-ssh-no-client-auth", action="store_true", help="let everybody into every VM's SSH port")
    add("--insecure-no-tls", action="store_true", help="serve plain HTTP")
    add("--insecure-no-auth", action="store_true", help="let everybody do everything")
    add("--worker-offline-timeout", metavar="S", type=parse_seconds, default=OFFLINE_TIMEOUT,
        help="seconds of silence after which a worker's VMs fail; default %(default)g")  # fmt: skip
    add("--ping-interval", metavar="S", type=parse_seconds, default=PING_INTERVAL,
        help="seconds between two pings on each WebSocket; default %(default)g")  # fmt: skip
    add("--debug", action="store_true", help="log more")
    add("--version", action="version", version=f"orchard {__version__}")
    return parser


def settings_of(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[ControllerSettings, bool]:
    """Read the command line and the environment; give whether to log more, too. Exits with 2 on a wrong one."""
    options = parser.parse_args(argv)
    if (options.controller_cert is None) != (options.controller_key is None):
        parser.error("--controller-cert and --controller-key go together")
    if options.insecure_no_tls and options.controller_cert is not None:
        parser.error("--insecure-no-tls and --controller-cert contradict each other")
    host, port = options.listen
    settings = ControllerSettings(
        data_dir=options.data_dir or orchard_home() / "controller",
        host=host,
        port=port,
        prefix=options.api_prefix,
        certificate=options.controller_cert,
        key=options.controller_key,
        tls=not options.insecure_no_tls,
        auth=not options.insecure_no_auth,
        ssh=options.listen_ssh,
        ssh_host_key=options.ssh_host_key,
        ssh_auth=not options.insecure_ssh_no_client_auth,
        admin_token=os.environ.get("ORCHARD_BOOTSTRAP_ADMIN_TOKEN", ""),
        worker_offline_timeout=options.worker_offline_timeout,
        ping_interval=options.ping_interval,
    )
    return settings, options.debug


def announce(running: Running, out: TextIO) -> None:
    """Say where the controller listens, and, once, how to get in."""
    if running.new_admin is not None:
        print("A service account with every role was created. Its token is shown only now:", file=out)
        print(f"  name:  {running.new_admin.name}", file=out)
        print(f"  token: {running.new_admin.token}", file=out)
        if running.fingerprint:
            print(f"  certificate SHA-256: {running.fingerprint}", file=out)
    if running.ssh_port:
        print(f"SSH into VMs: ssh -J ACCOUNT@HOST:{running.ssh_port} USER@VM", file=out)
    print(f"orchard controller {__version__} is listening on {running.url}", file=out, flush=True)


async def run_and_announce(settings: ControllerSettings) -> None:
    """Run a controller until SIGTERM or SIGINT; a second signal ends it without waiting for requests in progress."""
    stop = trio.Event()

    async def control() -> None:
        async with trio.open_nursery() as nursery:
            announce(await nursery.start(partial(run, settings, stop=stop)), sys.stdout)

    await run_until_signal(control, stop=stop)


def collect_garbage_less() -> None:
    """Have Python look for cycles less often: it stops everything for that, and nearly all that there is lives long.

    A look at everything takes tens of milliseconds with ten thousand VMs, and a fifth of the time when a thousand
    watchers are told of a change (./run bench watch). A process of its own may do so; an embedding one decides itself.
    """
    gc.freeze()  # modules, classes, code: they stay
    gc.set_threshold(*COLLECT_AT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    settings, debug = settings_of(arguments(), argv)
    collect_garbage_less()
    return run_program(
        "orchard controller", partial(run_and_announce, settings), {StartError: 1, Broken: 1}, debug=debug
    )


if __name__ == "__main__":
    sys.exit(main())
