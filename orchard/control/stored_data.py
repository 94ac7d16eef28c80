"""The data that a controller opens before it serves: state, events and history, in a data directory or in etcd.

With etcd, the data are open only while this controller leads. When it loses the leadership, everything that serves is
cancelled, and the controller stands by again in the same process. A takeover is the same code as a start.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from orchard import auth
from orchard.base.files import (
    ACCESS_KEY_BYTES,
    ACCESS_KEY_FILE,
    EVENTS_DIRECTORY,
    RESERVE_FILE,
    STATE_FILE,
    write_private,
)
from orchard.base.nursery import unwrap_groups
from orchard.control.standby import decode_ahead
from orchard.net import tcp
from orchard.resources.cluster import ClusterIdentity
from orchard.schema import ServiceAccount
from orchard.state.fsck import describe_foreign_data, find_exposures
from orchard.storage.engine import DecodedValues
from orchard.storage.errors import (
    BrokenError,
    DamagedError,
    LeadershipLostError,
    NotWrittenError,
    StorageError,
    StorageUnavailableError,
)
from orchard.storage.etcd import EtcdAccess, EtcdClient, EtcdRequestError, EtcdUnavailableError
from orchard.storage.etcd_engine import DEFAULT_MAX_MIB, EtcdEngine, decode_head
from orchard.storage.etcd_records import DEFAULT_EVENTS_KIB, EtcdEventStorage, EtcdRecords, share_files
from orchard.storage.events import EventLog, event_files
from orchard.storage.file_engine import FileEngine
from orchard.storage.history import History, history_file
from orchard.storage.leadership import DEFAULT_LEADER_TTL, CampaignSettings, Leadership, boot_time
from orchard.store import DecodedObject, Store

# A worker without contact for this long is offline, and its VMs fail.
DEFAULT_OFFLINE_TIMEOUT = 180.0  # seconds
DEFAULT_ETCD_PREFIX = "/orchard"
# A function that makes private files the same on all controllers, from the name of the secret and its files.
ShareFiles = Callable[[str, Sequence[Path]], Awaitable[None]]

_logger = logging.getLogger("orchard.controller")

utc_now: Callable[[], datetime.datetime] = partial(datetime.datetime.now, datetime.UTC)


class StartError(Exception):
    """The controller cannot start; str() says why and how to remedy it."""


class StoredData(NamedTuple):
    """The open data. `share` is None if no other controller uses the data."""

    store: Store
    events: EventLog
    history: History
    share: ShareFiles | None = None


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How the controllers of one cluster use etcd."""

    access: EtcdAccess
    prefix: str = DEFAULT_ETCD_PREFIX
    leader_ttl: float = DEFAULT_LEADER_TTL  # seconds
    max_mib: int = DEFAULT_MAX_MIB
    # The most bytes of events of one VM, in KiB.
    events_kib: int = DEFAULT_EVENTS_KIB


@dataclass(slots=True)
class CampaignPlatform:
    """The parts of the host that a controller uses to lead or stand by. A simulation replaces them.

    `leadership` is for health checks while the controller stands by; None before the first campaign.
    """

    connect: tcp.Connect = tcp.connect
    boot_time: Callable[[], float] = boot_time
    now: Callable[[], datetime.datetime] = utc_now
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    leadership: Leadership | None = None

    def leader_url(self) -> str:
        """Return the URL of the other controller that was last seen to lead, or ""."""
        other = None if self.leadership is None else self.leadership.other
        return other.url if other is not None else ""


@contextlib.asynccontextmanager
async def open_data_directory(directory: Path) -> AsyncIterator[StoredData]:
    """Load state, events and history for the block, and close the state after it. Raises StartError, BrokenError."""
    with contextlib.ExitStack() as stack:
        try:
            if foreign := describe_foreign_data(directory):
                raise StartError(foreign)
            for problem in find_exposures(directory):
                raise StartError(problem)
            check_kept_in_files(directory)
            store = await Store.open(FileEngine(directory), utc_now())
            stack.callback(store.close)
            events = EventLog(*event_files(directory / EVENTS_DIRECTORY))
            events.open({vm.uid for vm in store.state.vms.values()})
            history = History(history_file(directory))
            history.open()
        except (DamagedError, NotWrittenError, OSError) as error:
            raise StartError(str(error)) from error
        yield StoredData(store, events, history)


def check_kept_in_files(directory: Path) -> None:
    """Raise StartError if a directory was used by a controller with its state in etcd.

    An empty cluster in its place would let in no worker and no client.
    """
    is_new = not any((directory / name).exists() for name in (STATE_FILE, RESERVE_FILE))
    # A controller with its state in files writes the state before the key.
    if is_new and (directory / ACCESS_KEY_FILE).exists():
        raise StartError(
            f"{directory} has the key {ACCESS_KEY_FILE} and no {STATE_FILE}, so its state is in etcd or lost; start the"
            " controller with --etcd, restore the file, or choose another data directory to begin with nothing"
        )


def check_kept_in_etcd(directory: Path) -> None:
    """Raise StartError if a directory holds the state of a controller without etcd, which would be ignored."""
    if (directory / STATE_FILE).exists():
        raise StartError(
            f"{directory / STATE_FILE} is a state in files, which is not used with --etcd; copy it with:"
            " orchard store copy, unless that was done, and choose another data directory"
        )


async def lead_in_turns(
    settings: EtcdSettings,
    platform: CampaignPlatform,
    url: str,
    stop: trio.Event,
    serve: Callable[[StoredData], Awaitable[None]],
) -> None:
    """Stand by, and call `serve` whenever this controller leads, until `stop` is set. `url` is shown by standbys.

    `serve` is cancelled when this controller does not lead any more, and returns some time after `stop` was set. Raises
    StartError, and what `serve` raises except LeadershipLostError.
    """
    try:
        client = EtcdClient(settings.access, platform.connect)
    except ValueError as error:
        raise StartError(str(error)) from error
    campaign = CampaignSettings(url, settings.leader_ttl, platform.boot_time, platform.now, platform.new_id)
    platform.leadership = leadership = Leadership(client, settings.prefix, campaign)
    is_serving, is_first = False, True

    async def end_campaign(scope: trio.CancelScope) -> None:
        await stop.wait()
        if not is_serving:
            scope.cancel()

    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(end_campaign, nursery.cancel_scope)
        while not stop.is_set():
            try:
                async with _leading(settings, client, leadership, campaign, is_first=is_first) as data:
                    is_serving = True
                    await serve(data)
            except LeadershipLostError as error:
                _logger.warning("no longer leading: %s", error)
            is_serving = is_first = False
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def _leading(
    settings: EtcdSettings, client: EtcdClient, leadership: Leadership, campaign: CampaignSettings, *, is_first: bool
) -> AsyncIterator[StoredData]:
    """Wait until this controller leads, load everything for the block, and resign after it.

    Raises StartError; LeadershipLostError when it does not lead any more.
    """
    try:
        with unwrap_groups(), _consequences_dropped(leadership):
            decoded = await _campaign(settings, client, leadership, is_first=is_first)
            # Ends the block when the lease is over.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leadership.run)
                data = await _load(settings, client, leadership, campaign, decoded)
                # Outdated values among them would stay in memory.
                del decoded
                yield data
                nursery.cancel_scope.cancel()
    finally:
        await leadership.resign()


@contextlib.contextmanager
def _consequences_dropped(leadership: Leadership) -> Iterator[None]:
    """Raise LeadershipLostError alone when the leadership is lost, without the failures of start or writes that follow from it.

    Errors of other kinds leave the block with it, in a group.
    """
    try:
        yield
    except* (StartError, StorageError, BrokenError):
        if not leadership.lost:
            raise
        raise LeadershipLostError(leadership.lost) from None


async def _campaign(
    settings: EtcdSettings, client: EtcdClient, leadership: Leadership, *, is_first: bool
) -> DecodedValues:  # fmt: skip
    """Wait until this controller leads. Return what it has decoded meanwhile. Raises StartError."""
    decoded: dict[str, tuple[bytes, DecodedObject]] = {}
    try:
        # A controller that could not take over does not start. Later, it waits until etcd answers.
        if is_first and (head := await client.get(f"{settings.prefix}/head")) is not None:
            decode_head(head)
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(decode_ahead, client, settings.prefix, decoded)
                await leadership.campaign(is_patient=True)
                nursery.cancel_scope.cancel()
    except EtcdUnavailableError as error:
        raise StartError(f"cannot use etcd: {error}; check --etcd and --etcd-ca, and that etcd runs") from error
    except (EtcdRequestError, DamagedError) as error:
        raise StartError(f"cannot use etcd: {error}") from error
    return decoded


async def _load(
    settings: EtcdSettings,
    client: EtcdClient,
    leadership: Leadership,
    campaign: CampaignSettings,
    decoded: DecodedValues,
) -> StoredData:
    began = trio.current_time()
    engine = EtcdEngine(client, settings.prefix, leadership, settings.max_mib, decoded)
    stored_events = EtcdEventStorage(client, settings.prefix, leadership, settings.events_kib)
    lifecycle, ended = (EtcdRecords(client, settings.prefix, leadership, kind) for kind in ("lifecycle", "history"))
    try:
        store = await Store.open(engine, campaign.now())
        for stored in (stored_events, lifecycle, ended):
            await stored.load()
        events = EventLog(stored_events, lifecycle)
        events.open({vm.uid for vm in store.state.vms.values()})
        history = History(ended)
        history.open()
    except (DamagedError, NotWrittenError) as error:
        raise StartError(str(error)) from error
    except (StorageUnavailableError, EtcdRequestError) as error:
        raise leadership.lose(f"cannot load the state: {error}") from error
    took = trio.current_time() - began
    _logger.info("leading, epoch %d, %s VMs loaded in %.1f s", engine.head.epoch, f"{len(store.state.vms):,}", took)

    async def share(name: str, files: Sequence[Path]) -> None:
        try:
            await share_files(client, settings.prefix, name, files)
        except EtcdUnavailableError as error:
            raise leadership.lose(f"cannot share the secrets of the cluster: {error}") from error

    return StoredData(store, events, history, share)


def load_access_key(directory: Path) -> bytes:
    """Return the key that signs access tokens. The first start creates it; later starts load it. Raises StartError."""
    path = directory / ACCESS_KEY_FILE
    try:
        if not path.exists():
            write_private(path, secrets.token_bytes(ACCESS_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise StartError(f"cannot use the key {path}: {error.strerror}") from error
    if len(key) != ACCESS_KEY_BYTES:
        raise StartError(
            f"{path} has {len(key)} bytes, expected {ACCESS_KEY_BYTES}; restore it from a backup, or remove it: existing"
            " access tokens become invalid"
        )
    return key


# ---- the first objects ---------------------------------------------------------------------------------------------


def ensure_identity(store: Store) -> None:
    """Store a clusterId, unless the state has one."""
    if not store.state.cluster.id:
        with store.transaction() as tx:
            tx.put(ClusterIdentity(secrets.token_hex(16)))


def renew_promises(store: Store, offline_timeout: float) -> None:
    """Store for each worker that it was promised this offline timeout in seconds, or a longer one as before.

    It is unknown what workers of an earlier version were promised: at least the default counts.
    """
    # A start must store the lease that it promises to workers, also on a full disk.
    with store.transaction(is_needed=True) as tx:
        for worker in store.state.workers.values():
            promised = max(math.ceil(1000 * offline_timeout), worker.promised or round(1000 * DEFAULT_OFFLINE_TIMEOUT))
            if promised != worker.promised:
                tx.put(replace(worker, promised=promised))


def ensure_admin(store: Store, token: str, now: datetime.datetime) -> ServiceAccount | None:
    """Create or update bootstrap-admin with `token`. Without a token, create it only if there is no account at all.

    Return the account if its token is random, because it has to be shown.
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
        # Needed also on a full disk, because an administrator has to log in to free space.
        with store.transaction(is_needed=True) as tx:
            tx.put(admin)
    return None if token else admin
