"""The controller role: its composition, its start and its stop. Its settings are in control/settings.py.

`python -m orchard.controller` runs it; `run` does the same for an embedding program.

State and events are opened first and closed last. In between, nested nurseries determine the order of the shutdown: the
HTTP server ends first (it accepts nothing more, and requests under way get a grace period), then the scheduler and the
SSH jump host, then the tasks that write state and events. So everything that was acknowledged is on disk at the end.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TextIO

import trio

from orchard import __version__
from orchard.api import ControllerParts
from orchard.base.command_line import HomeError
from orchard.base.daemon import (
    collect_garbage_less,
    printing,
    run_main,
    run_until_signal,
)
from orchard.base.files import (
    ACCESS_KEY_FILE,
    CONTROLLER_LOCK_FILE,
    SSH_HOST_KEY_FILE,
    LockError,
    lock_directory,
)
from orchard.base.nursery import Started, unwrap_groups
from orchard.control.deadlines import Deadlines, StoredClock
from orchard.control.figures import make_figures
from orchard.control.reactions import Reactions
from orchard.control.recorder import Recorder
from orchard.control.scheduling_loop import SchedulingLoop
from orchard.control.settings import ControllerSettings, controller_parser, parse_settings
from orchard.control.side_ports import serve_health, serve_metrics
from orchard.control.stored_data import (
    DEFAULT_OFFLINE_TIMEOUT,
    CampaignPlatform,
    EtcdSettings,
    StartError,
    StoredData,
    check_kept_in_etcd,
    ensure_admin,
    ensure_identity,
    lead_in_turns,
    load_access_key,
    open_data_directory,
    renew_promises,
    utc_now,
)
from orchard.control.webhooks import Webhooks
from orchard.decisions.access_tokens import AccessTokens
from orchard.decisions.gate import Gate
from orchard.decisions.login_limit import LoginLimit
from orchard.net import tcp, tls
from orchard.net.browsers import BrowserRules
from orchard.net.connection import Limits, Service
from orchard.net.outside import connect_outside
from orchard.net.server import serve
from orchard.net.streams import TLSListener
from orchard.net.urls import bracketed, reachable_host
from orchard.operations import make_api
from orchard.schema import ServiceAccount
from orchard.sessions import AccountSessions
from orchard.ssh.connections import describe_missing_extra
from orchard.ssh.exec import Executor
from orchard.storage.errors import BrokenError, DamagedError, StorageError
from orchard.storage.etcd import EtcdAccess, EtcdRequestError
from orchard.store import Store
from orchard.tunnel import Rendezvous, VMAccess

# Grace period of the requests under way at a stop.
_GRACE_SECONDS = 10.0
_RENEW_GIVEN = "replace the files of --controller-cert and --controller-key; they are read again within a minute"
_RENEW_SELF_SIGNED = (
    "to make another one, stop the controller, remove the certificate and its key, start it again, and pass each worker"
    " and client a new bootstrap token, because they trust only the old certificate"
)
# File descriptors that are not connections: files, the log, pipes of threads, and others.
_OTHER_DESCRIPTORS = 64

__all__ = [
    "DEFAULT_OFFLINE_TIMEOUT",
    "ControllerSettings",
    "EtcdAccess",
    "EtcdSettings",
    "Listening",
    "Platform",
    "Running",
    "StartError",
    "controller_parser",
    "main",
    "run",
]

_logger = logging.getLogger("orchard.controller")


@dataclass(frozen=True, slots=True)
class Running:
    """A controller that serves. `certificate` (PEM) is set if clients have to be told to trust it."""

    url: str
    certificate: bytes | None = None
    fingerprint: str = ""
    # Uses certificate files that change; None without TLS.
    watch_certificate: Callable[[], Awaitable[None]] | None = field(default=None, repr=False)
    # 0: SSH is not served.
    ssh_port: int = 0
    # 0: metrics have no port of their own.
    metrics_port: int = 0
    # When the certificate expires; None if that is unknown, or without TLS.
    certificate_expires: Callable[[], datetime.datetime | None] = field(default=lambda: None, repr=False)
    # The account that this start created with a random token, which has to be shown.
    new_admin: ServiceAccount | None = field(default=None, repr=False)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        with lock_directory(directory, CONTROLLER_LOCK_FILE):
            yield
    except LockError as error:
        raise StartError(f"cannot use the data directory: {error}; choose another") from error


# ---- running ---------------------------------------------------------------------------------------------------------

Listening = tuple[Sequence[trio.abc.Listener[trio.abc.Stream]], Running]


async def run(
    settings: ControllerSettings,
    *,
    stop: trio.Event | None = None,
    grace: float = _GRACE_SECONDS,
    platform: Platform | None = None,
    task_status: trio.TaskStatus[Running] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a controller until it is cancelled or `stop` is set; call `task_status.started(Running)` when it serves.

    `grace` is in seconds. `platform` replaces what the controller uses of its host.

    Raises StartError, and BrokenError if a disk failure leaves unknown what the disk holds.
    """
    stop = trio.Event() if stop is None else stop
    platform = Platform() if platform is None else platform
    serving = _Serving(stop, grace, task_status.started)
    with unwrap_groups(), _locked(settings.data_dir):
        # Health checks are answered until everything else has ended.
        async with trio.open_nursery() as checked:
            if settings.health is not None:
                listeners = await _open_listeners(*settings.health)
                await serve_health(listeners, lambda: serving.store, platform.campaign.leader_url, checked)
            if settings.etcd is None:
                async with platform.open_data(settings.data_dir) as data:
                    await _serve(settings, platform, serving, data)
            else:
                check_kept_in_etcd(settings.data_dir)
                if settings.ssh is not None:
                    # At the takeover, another version of the package may be installed.
                    _import_jump()
                scheme, host = "https" if settings.tls else "http", settings.host or socket.gethostname()
                url = f"{scheme}://{bracketed(host)}:{settings.port}{settings.prefix}"
                serve_data = partial(_serve, settings, platform, serving)
                await lead_in_turns(settings.etcd, platform.campaign, url, stop, serve_data)
            checked.cancel_scope.cancel()


@dataclass(slots=True)
class _Serving:
    """When a controller stops serving, and the callback for when it begins. `started` is called once.

    `store` is the one that is served from, None while the controller stands by. `new_admin` is that of `Running`.
    """

    stop: trio.Event
    grace: float
    started: Callable[[Running], None]
    is_started: bool = False
    store: Store | None = None
    new_admin: ServiceAccount | None = None

    def announce(self, running: Running, store: Store) -> None:
        self.store = store
        if not self.is_started:
            self.is_started = True
            self.started(replace(running, new_admin=self.new_admin))


async def _serve(settings: ControllerSettings, platform: Platform, serving: _Serving, data: StoredData) -> None:
    """Serve from data that are open, until `stop` is set. Raises StartError, BrokenError."""
    serving.store = None
    await _share_secrets(settings, data)
    with unwrap_groups():
        # Ends last, because it stores what the tasks below change.
        async with trio.open_nursery() as writers:
            loop, deadlines, parts = _compose(settings, data, platform.clock)
            await writers.start(data.store.run)
            await writers.start(data.events.run)
            await writers.start(data.history.run)
            serving.new_admin = await _store_first_objects(settings, data.store, platform.clock())
            # Ends when the last answer was sent.
            async with trio.open_nursery() as background:
                for task in (loop.run, deadlines.run, parts.executor.run, parts.webhooks.run):
                    background.start_soon(task)
                await _answer_requests(settings, platform, serving, parts, background)
                background.cancel_scope.cancel()
            await _store_last_changes(data)
            writers.cancel_scope.cancel()


async def _answer_requests(
    settings: ControllerSettings,
    platform: Platform,
    serving: _Serving,
    parts: ControllerParts,
    background: trio.Nursery,
) -> None:
    """Listen on all ports, and answer until `stop` is set and the last answer was sent. Raises StartError."""
    api = make_api(parts, ui=settings.ui)
    listeners, running = await platform.listen(settings)
    if running.watch_certificate is not None:
        background.start_soon(running.watch_certificate)
    parts.figures.certificate_expires = running.certificate_expires
    service = Service(api.handle, api.admit, api.refuse_all, parts.figures.count_request)
    answer = partial(serve, service, listeners, limits=_limits(settings), stop=serving.stop, grace=serving.grace)
    # Ends with `stop`.
    async with trio.open_nursery() as servers:
        await servers.start(answer)
        ssh_port = await _serve_ssh(settings, parts, background)
        metrics_port = 0
        if settings.metrics is not None:
            opened = await _open_listeners(*settings.metrics)
            metrics_port = await serve_metrics(opened, api, settings.allowed_origins, background)
        serving.announce(replace(running, ssh_port=ssh_port, metrics_port=metrics_port), parts.store)


def _compose(
    settings: ControllerSettings, data: StoredData, clock: Callable[[], datetime.datetime]
) -> tuple[SchedulingLoop, Deadlines, ControllerParts]:
    """Connect the parts of a controller. No task runs yet. Raises StartError."""
    store, rendezvous = data.store, Rendezvous(settings.ping_interval, data.store.may_answer)
    try:
        renew_promises(store, settings.worker_offline_timeout)
    except StorageError as error:
        raise StartError(f"cannot store the offline timeout for the workers: {error}") from error
    stored_clock = StoredClock(store, clock, trio.current_time)
    loop = SchedulingLoop(store, settings.worker_offline_timeout, stored_clock.now)
    deadlines = Deadlines(store, stored_clock, loop.liveness, loop.states)
    sessions = AccountSessions(store.state.accounts, clock)
    store.on_durable(Recorder(data.events, data.history, stored_clock.now).record)
    store.on_durable(Reactions(rendezvous, loop, sessions, stored_clock.now).react)
    figures = make_figures(store, loop.liveness, stored_clock.now, per_worker=settings.metrics_per_worker)
    connect = tcp.connect if settings.allow_local_webhooks else connect_outside
    webhooks = Webhooks(store, loop, figures.lives.failure_of, stored_clock.now, connect)
    vm_access = VMAccess(store, rendezvous)
    tokens = AccessTokens(load_access_key(settings.data_dir), store.state.accounts, clock)
    hosts = None if settings.auth else settings.allowed_hosts
    parts = ControllerParts(
        store=store,
        events=data.events,
        history=data.history,
        liveness=loop.liveness,
        rendezvous=rendezvous,
        vm_access=vm_access,
        executor=Executor(vm_access),
        sessions=sessions,
        worker_states=loop.states,
        gate=Gate(store.state.accounts, tokens, LoginLimit(trio.current_time)) if settings.auth else None,
        tokens=tokens,
        scheduling=loop,
        clock=clock,
        deadline_clock=stored_clock.now,
        figures=figures,
        webhooks=webhooks,
        browsers=BrowserRules(settings.allowed_origins, hosts, [f"{settings.prefix}/ui{end}" for end in ("", "/")]),
        prefix=settings.prefix,
        offline_timeout=settings.worker_offline_timeout,
    )
    return loop, deadlines, parts


async def _share_secrets(settings: ControllerSettings, data: StoredData) -> None:
    """Make the files with secrets, and make them the same on all controllers. Raises StartError."""
    if data.share is None:
        return
    directory = settings.data_dir
    load_access_key(directory)
    try:
        await data.share("access-key", [directory / ACCESS_KEY_FILE])
        if settings.tls and settings.certificate is None:
            await data.share("tls", await _self_signed(settings))
        if settings.ssh is not None and not settings.ssh_host_keys:
            _import_jump().host_keys([directory / SSH_HOST_KEY_FILE])
            await data.share("ssh-host-key", [directory / SSH_HOST_KEY_FILE])
    except (tls.TLSError, EtcdRequestError, DamagedError, ValueError, OSError) as error:
        raise StartError(f"cannot share the secrets of the cluster: {error}") from error


async def _store_last_changes(data: StoredData) -> None:
    try:
        await data.store.wait_durable()
    except StorageError as error:
        _logger.error("last changes were not stored (and not acknowledged): %s", error)
    await data.events.flush()
    await data.history.flush()


def _import_jump() -> ModuleType:
    """Return the module of the SSH jump host. Raises StartError."""
    try:
        # Its packages may not be installed, and importing them takes a third of a second.
        from orchard.ssh import jump
    except ImportError as error:
        raise StartError(describe_missing_extra("--listen-ssh", error)) from None
    return jump


async def _serve_ssh(settings: ControllerSettings, parts: ControllerParts, nursery: trio.Nursery) -> int:
    """Start the SSH jump host if the settings ask for it. Return its port, or 0. Raises StartError."""
    if settings.ssh is None:
        return 0
    jump = _import_jump()
    host, port = settings.ssh
    try:
        gate = parts.gate if settings.ssh_auth else None
        keys = jump.host_keys(settings.ssh_host_keys or [settings.data_dir / SSH_HOST_KEY_FILE])
        server = jump.JumpHost(parts.store.state, parts.vm_access, gate, parts.sessions)
        started: int = await nursery.start(server.serve, host, port, keys, settings.ping_interval)
    except ValueError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(
            f"cannot serve SSH on {host or ''}:{port}: {error.strerror or error}; choose another address or port"
        ) from error
    return started


async def _store_first_objects(
    settings: ControllerSettings, store: Store, now: datetime.datetime
) -> ServiceAccount | None:
    try:
        ensure_identity(store)
        admin = ensure_admin(store, settings.admin_token, now) if settings.auth else None
        await store.wait_durable()
    except StorageError as error:
        if store.broken:
            # `Store.run` raises the reason in a moment, which ends this task.
            await trio.sleep_forever()
        raise StartError(f"cannot store the first objects of the state: {error}") from error
    return admin


async def _listen(settings: ControllerSettings) -> Listening:
    """Open the listening sockets, with TLS unless the settings turn it off. Raises StartError."""
    pair = await _load_tls(settings) if settings.tls else None
    listeners = await _open_listeners(settings.host, settings.port)
    host, port = listeners[0].socket.getsockname()[:2]
    address = f"{reachable_host(host)}:{port}{settings.prefix}"
    if pair is None:
        return listeners, Running(f"http://{address}")
    secured = [TLSListener(listener, pair.context) for listener in listeners]

    def use(context: ssl.SSLContext) -> None:
        for listener in secured:
            listener.context = context

    self_signed = pair.pem if settings.certificate is None else None
    return secured, Running(
        f"https://{address}",
        self_signed,
        pair.fingerprint,
        partial(pair.watch, use),
        certificate_expires=lambda: pair.expires,
    )


async def _open_listeners(host: str | None, port: int) -> list[trio.SocketListener]:
    """Open listening sockets at an address. Raises StartError."""
    try:
        return await tcp.open_listeners(host, port)
    except OSError as error:
        raise StartError(
            f"cannot listen on {host or ''}:{port}: {error.strerror or error}; choose another address or port"
        ) from error


async def _load_tls(settings: ControllerSettings) -> tls.ServerPair:
    """Return the certificate and the key, which the first start creates. Raises StartError."""
    try:
        if settings.certificate is not None and settings.key is not None:
            files, remedy = (settings.certificate, settings.key), _RENEW_GIVEN
        else:
            files, remedy = await _self_signed(settings), _RENEW_SELF_SIGNED
        return tls.ServerPair(files, settings.tls_names, remedy, utc_now)
    except (tls.TLSError, OSError) as error:
        raise StartError(str(error)) from error


async def _self_signed(settings: ControllerSettings) -> tuple[Path, Path]:
    """Return the certificate and the key in the data directory, which the first start creates. Raises TLSError."""
    return await tls.self_signed(settings.data_dir, [*settings.tls_names, *_listen_name(settings.host)])


def _listen_name(host: str | None) -> list[str]:
    """Return the host of --listen, if a certificate can be for it."""
    with contextlib.suppress(ValueError):
        if host and host not in ("0.0.0.0", "::"):  # noqa: S104 -- not bound here
            return [tls.check_name(host)]
    return []


@dataclass(frozen=True, slots=True)
class Platform:
    """The parts of the host that a controller uses. A simulation replaces them, and otherwise runs the controller as it is.

    `open_data` opens the data directory, `listen` returns the listeners and the URL by which they are reached, and
    `clock` returns the time in UTC. `campaign` is what is used of the host to lead or stand by.
    """

    open_data: Callable[[Path], contextlib.AbstractAsyncContextManager[StoredData]] = open_data_directory
    listen: Callable[[ControllerSettings], Awaitable[Listening]] = _listen
    clock: Callable[[], datetime.datetime] = utc_now
    campaign: CampaignPlatform = field(default_factory=CampaignPlatform)


def _limits(settings: ControllerSettings) -> Limits:
    limits = Limits(first_byte_seconds=settings.idle_timeout)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, connections=max(1, min(limits.connections, soft - _OTHER_DESCRIPTORS)))


# ---- the command line ------------------------------------------------------------------------------------------------


def announce(running: Running, out: TextIO) -> None:
    """Print where the controller listens, and after the first start how to log in."""
    if running.new_admin is not None:
        print("Created a service account with all roles. Its token is shown only this once:", file=out)
        print(f"  name:  {running.new_admin.name}", file=out)
        print(f"  token: {running.new_admin.token}", file=out)
        if running.fingerprint:
            print(f"  certificate SHA-256: {running.fingerprint}", file=out)
    if running.ssh_port:
        print(f"SSH into VMs: ssh -J ACCOUNT@HOST:{running.ssh_port} USER@VM", file=out)
    if running.metrics_port:
        print(f"metrics are served on port {running.metrics_port}", file=out)
    print(f"orchard controller {__version__} is listening on {running.url}", file=out, flush=True)


OnStart = Callable[[ControllerSettings, Running], None]


async def run_and_announce(settings: ControllerSettings, on_start: OnStart | None = None) -> None:
    """Run a controller until a signal to stop; a second one ends it without waiting for requests in progress.

    `on_start` is called in a thread when the controller serves, before it says so.
    """
    stop, started = trio.Event(), Started[Running]()

    async def announce_start() -> None:
        await started.is_set.wait()
        # The loaded state lives long, too.
        collect_garbage_less()
        with printing():
            if on_start is not None:
                await trio.to_thread.run_sync(on_start, settings, started.value)
            announce(started.value, sys.stdout)

    async def control() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce_start)
            await run(settings, stop=stop, task_status=started)
            # A controller that stood by may end before it serves.
            if not started.is_set.is_set():
                nursery.cancel_scope.cancel()

    await run_until_signal(control, stop=stop)


def main(argv: Sequence[str] | None = None, on_start: OnStart | None = None) -> int:
    """Run the command line. Return the exit status. `on_start` is called in a thread when the controller serves."""
    try:
        settings, log = parse_settings(argv)
    except HomeError as error:
        print(f"orchard controller: {error}", file=sys.stderr)
        return 1
    collect_garbage_less()
    work = partial(run_and_announce, settings, on_start)
    return run_main("orchard controller", work, {StartError: 1, BrokenError: 1}, log)


if __name__ == "__main__":
    sys.exit(main())
