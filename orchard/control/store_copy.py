"""Copies of a controller's stored data from a data directory or etcd to another one: migration, backup and restore.

Names, uids and the revision stay as they are. A data directory is copied while no controller uses it, and etcd at one
moment, whether a controller leads or not. The target must be empty. An interrupted copy leaves no state that a
controller would take for a complete one: a directory gets its name at the end, and in etcd `head` is written last.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from orchard.base.files import (
    ACCESS_KEY_FILE,
    CONTROLLER_LOCK_FILE,
    EVENTS_DIRECTORY,
    SSH_HOST_KEY_FILE,
    STATE_FILE,
    TLS_CERTIFICATE_FILE,
    TLS_KEY_FILE,
    LockError,
    lock_directory,
    sync_directory,
    write_private,
)
from orchard.base.nursery import unwrap_groups
from orchard.codec import decode, format_time, load_json
from orchard.control.stored_data import utc_now
from orchard.schema import Event
from orchard.storage.engine import Tables
from orchard.storage.errors import BrokenError, DamagedError, NotWrittenError, StorageError
from orchard.storage.etcd import (
    COMPACTED,
    MAX_OPERATIONS,
    MAX_TRANSACTION_BYTES,
    EtcdAccess,
    EtcdClient,
    EtcdRefusedError,
    EtcdRequestError,
    TxnOperation,
    get,
    put,
)
from orchard.storage.etcd_engine import KINDS, EtcdContents, Head, decode_head, read_objects
from orchard.storage.etcd_records import EtcdEventStorage, EtcdRecords, decode_secret, encode_secret, read_events
from orchard.storage.event_file import EventFile
from orchard.storage.history import History, history_file
from orchard.storage.journal import Disk, Journal
from orchard.storage.leadership import DEFAULT_LEADER_TTL, CampaignSettings, Leadership, boot_time
from orchard.storage.lifecycle import LifecycleLog, lifecycle_file
from orchard.storage.records import StoredRecords
from orchard.storage.state_file import read_contents, snapshot_lines
from orchard.store import State, build_state, check

# The secrets that controllers share, by the name of the key in etcd, and their files in a data directory.
SECRETS = {
    "access-key": (ACCESS_KEY_FILE,),
    "tls": (TLS_CERTIFICATE_FILE, TLS_KEY_FILE),
    "ssh-host-key": (SSH_HOST_KEY_FILE,),
}
# The keys of a controller below the prefix, and the beginnings of its other keys.
_ALONE = ("head", "leader")
_WITH_NAMES = (*KINDS, "events", "history", "lifecycle", "secret", "transaction")
# The events of one VM are not bounded when they are copied.
_NO_LIMIT_KIB = 1 << 30


class CopyError(Exception):
    """Nothing can be copied, or not everything was; str() says why."""


@dataclass(slots=True)
class Copy:
    """The stored data, except the events of VMs."""

    tables: Tables
    revision: int
    time: datetime.datetime
    lifecycle: list[bytes] = field(default_factory=list, repr=False)
    history: list[bytes] = field(default_factory=list, repr=False)
    # By the names in SECRETS: the contents of each file.
    secrets: dict[str, dict[str, bytes]] = field(default_factory=dict, repr=False)


# The uid of a VM, and some of its events in their order.
Events = AsyncGenerator[tuple[str, list[Event]], None]


# ---- from ------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def read_directory(directory: Path) -> AsyncIterator[tuple[Copy, Events]]:
    """Read a data directory that no controller uses. Raises CopyError, DamagedError, OSError."""
    if not (directory / STATE_FILE).exists():
        raise CopyError(f"{directory} is not the data directory of a controller: the file {STATE_FILE} is missing")
    try:
        with lock_directory(directory, CONTROLLER_LOCK_FILE):
            contents = read_contents(Journal(directory / STATE_FILE, Disk()))
            state = _checked(build_state(contents), str(directory))
            uids = {vm.uid for vm in state.vms.values()}
            copy = Copy(state.tables(), state.revision, contents.time or utc_now())
            copy.lifecycle, copy.history = _live_records(
                lifecycle_file(directory / EVENTS_DIRECTORY), history_file(directory), uids
            )
            for name, files in SECRETS.items():
                if all((directory / file).exists() for file in files):
                    copy.secrets[name] = {file: (directory / file).read_bytes() for file in files}
            async with contextlib.aclosing(_events_in_files(directory / EVENTS_DIRECTORY, uids)) as events:
                yield copy, events
    except LockError as error:
        raise CopyError(f"{error}; a copy locks it: stop the controller there, or make it writable") from error


async def _events_in_files(directory: Path, uids: set[str]) -> Events:
    for uid in sorted(uids):
        path = directory / f"{uid}.jsonl"
        if path.exists():
            file = EventFile(directory, uid, Disk())
            file.inspect()
            for block in file.blocks(0, file.count):
                await trio.lowlevel.checkpoint()
                yield uid, [decode(Event, load_json(text)) for text in file.read_block(block)]


@contextlib.asynccontextmanager
async def read_etcd(client: EtcdClient, prefix: str) -> AsyncIterator[tuple[Copy, Events]]:
    """Read what controllers have in etcd, as it was at one moment. Raises CopyError, DamagedError, EtcdRequestError."""
    with _compaction_named():
        async with _read_etcd(client, prefix) as found:
            yield found


@contextlib.asynccontextmanager
async def _read_etcd(client: EtcdClient, prefix: str) -> AsyncIterator[tuple[Copy, Events]]:
    result = await client.transact([], [get(f"{prefix}/head")])
    (found,), now = result["found"], result["revision"]
    if not found:
        raise CopyError(f"etcd has no state with the prefix {prefix}; check --etcd-prefix")
    head = decode_head(found[0])
    contents = EtcdContents(head.revision, prefix=prefix)
    await read_objects(client, contents, head, now)
    state = _checked(build_state(contents), f"etcd prefix {prefix}")
    copy = Copy(state.tables(), state.revision, head.written or utc_now())
    # Never campaigns: it is only an argument of the readers.
    reader = Leadership(client, prefix, _campaign())
    uids = {vm.uid for vm in state.vms.values()}
    lifecycle, ended = (EtcdRecords(client, prefix, reader, kind) for kind in ("lifecycle", "history"))
    for stored in (lifecycle, ended):
        await stored.load(now)
    copy.lifecycle, copy.history = _live_records(lifecycle, ended, uids)
    for name, files in SECRETS.items():
        if (secret := await client.get(f"{prefix}/secret/{name}")) is not None:
            copy.secrets[name] = decode_secret(secret, files)
    async with contextlib.aclosing(_events_in_etcd(client, f"{prefix}/events/", now, uids)) as events:
        yield copy, events


@contextlib.contextmanager
def _compaction_named() -> Iterator[None]:
    """Raise CopyError when etcd has forgotten the moment that is copied. Controllers keep the last 1,000 writes."""
    try:
        yield
    except EtcdRefusedError as error:
        if COMPACTED not in str(error):
            raise
        raise CopyError("etcd was compacted during the copy; repeat it, or copy while less is written") from error


async def _events_in_etcd(client: EtcdClient, prefix: str, revision: int, uids: set[str]) -> Events:
    for uid in sorted(uids):
        count = 0
        for each in await client.scan(f"{prefix}{uid}/", revision):
            events = read_events(each, count)
            count += len(events)
            yield uid, events


def _live_records(lifecycle: StoredRecords, history: StoredRecords, uids: set[str]) -> tuple[list[bytes], list[bytes]]:
    """Return the lifecycle events of the VMs with these uids, and the history. Raises DamagedError, OSError."""
    log, ended = LifecycleLog(lifecycle), History(history)
    log.inspect(uids)
    ended.inspect()
    return log.live(), ended.live()


def _checked(state: State, where: str) -> State:
    if problems := check(state, json_is_new=True):
        raise CopyError(f"{where}: the state is inconsistent: {'; '.join(problems[:5])}")
    return state


# ---- to --------------------------------------------------------------------------------------------------------------


async def write_directory(directory: Path, copy: Copy, events: Events) -> None:
    """Write a data directory, which must not exist or be empty. Raises CopyError, NotWrittenError, OSError."""
    directory = _free_place(directory)
    draft = directory.with_name(f"{directory.name}.copy")
    try:
        draft.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise CopyError(f"{draft} is left of a copy that was interrupted; remove it") from None
    with contextlib.ExitStack() as stack:
        # A copy that fails leaves nothing. One that succeeds has renamed the draft.
        stack.callback(shutil.rmtree, draft, ignore_errors=True)
        await _fill(draft, copy, events)
        draft.replace(directory)
    sync_directory(directory.parent)


async def _fill(draft: Path, copy: Copy, events: Events) -> None:
    """Write all files into a new directory, durably."""
    (draft / EVENTS_DIRECTORY).mkdir(mode=0o700)
    files: dict[str, EventFile] = {}
    async for uid, some in events:
        if uid not in files:
            files[uid] = EventFile(draft / EVENTS_DIRECTORY, uid, Disk())
        files[uid].append(some)
    await _write_records(lifecycle_file(draft / EVENTS_DIRECTORY), copy.lifecycle)
    await _write_records(history_file(draft), copy.history)
    for contents in copy.secrets.values():
        for name, content in contents.items():
            write_private(draft / name, content)
    state = Journal(draft / STATE_FILE, Disk())
    state.create(snapshot_lines(copy.tables, copy.revision, copy.time))
    state.close()
    sync_directory(draft)


def _free_place(directory: Path) -> Path:
    """Return the full path of a directory. Raises CopyError unless a rename can put another in its place."""
    # "." has no name to which another could be added, and a symbolic link cannot be replaced by a directory.
    directory = directory.resolve()
    if directory.is_mount():
        raise CopyError(f"{directory} is a mount point, which cannot be replaced; choose a new directory in it")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CopyError(f"{directory} is not empty; choose another directory")
    return directory


async def _write_records(stored: StoredRecords, records: Sequence[bytes]) -> None:
    """Write all records at once. A second append might replace those of the first, which are not in memory."""
    if records:
        await stored.append(records, len(records), list)


async def write_etcd(client: EtcdClient, prefix: str, copy: Copy, events: Events) -> None:
    """Write everything to etcd, which must have no key with the prefix. Raises CopyError, EtcdRequestError."""
    leadership = Leadership(client, prefix, _campaign())
    await _check_empty(client, prefix)
    _check_sizes(copy)
    await leadership.campaign()
    try:
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leadership.run)
                # Another program may have written since the last check.
                await _check_empty(client, prefix, but=leadership.key)
                await _write_all(client, prefix, leadership, copy, events)
                nursery.cancel_scope.cancel()
    finally:
        await leadership.resign()


async def _check_empty(client: EtcdClient, prefix: str, *, but: str = "") -> None:
    """Raise CopyError if etcd has a key with the prefix, other than `but`."""
    for found in await client.scan(f"{prefix}/", keys_only=True):
        if found.key != but:
            raise CopyError(
                f"etcd prefix {prefix} is not empty: it has the key {found.key}; choose another one, or delete the keys"
                " if they are left of a copy that was interrupted"
            )


async def _write_all(client: EtcdClient, prefix: str, leadership: Leadership, copy: Copy, events: Events) -> None:
    storage = EtcdEventStorage(client, prefix, leadership, _NO_LIMIT_KIB)
    async for uid, some in events:
        result = await storage.write({uid: some}, [])
        for error in (result.broken, *result.errors.values()):
            if error is not None:
                raise error
    for kind, records in (("lifecycle", copy.lifecycle), ("history", copy.history)):
        await _write_records(EtcdRecords(client, prefix, leadership, kind), records)
    for operations in _operations(prefix, copy):
        await leadership.write(operations)
    head = Head(copy.revision, 0, leadership.by, 0, format_time(copy.time))
    await leadership.write([put(f"{prefix}/head", head.to_json())])


def _check_sizes(copy: Copy) -> None:
    """Raise CopyError if etcd does not take an object."""
    for kind, table in copy.tables.items():
        for name, value in table.items():
            if len(value) > MAX_TRANSACTION_BYTES:
                raise CopyError(
                    f'{kind} "{name}" has {len(value):,} bytes, at most {MAX_TRANSACTION_BYTES:,} can be stored in etcd; delete it first'
                )


def _operations(prefix: str, copy: Copy) -> Iterator[list[TxnOperation]]:
    """Yield the operations of each transaction that stores objects and secrets."""
    values = [(f"{kind}/{name}", json) for kind, table in copy.tables.items() for name, json in table.items()]
    for name, contents in copy.secrets.items():
        values.append((f"secret/{name}", encode_secret(contents)))
    some: list[TxnOperation] = []
    size = 0
    for key, value in values:
        if some and (len(some) >= MAX_OPERATIONS or size + len(value) > MAX_TRANSACTION_BYTES):
            yield some
            some, size = [], 0
        some.append(put(f"{prefix}/{key}", value))
        size += len(value)
    if some:
        yield some


def _campaign() -> CampaignSettings:
    return CampaignSettings("a copy", DEFAULT_LEADER_TTL, boot_time, utc_now, lambda: uuid.uuid4().hex)


# ---- both ------------------------------------------------------------------------------------------------------------


def is_etcd(place: str) -> bool:
    """Return whether a place is URLs of etcd, and not a directory."""
    return place.startswith(("http://", "https://"))


async def copy_store(source: str, target: str, access: EtcdAccess, prefix: str) -> str:
    """Copy from a directory or the URLs of etcd to another; return a sentence for the user. Raises CopyError.

    `access` says how etcd is reached; its URLs are not used.
    """
    try:
        async with contextlib.AsyncExitStack() as stack:

            async def client_of(urls: str) -> EtcdClient:
                return await stack.enter_async_context(EtcdClient(replace(access, urls=urls)))

            reading = read_etcd(await client_of(source), prefix) if is_etcd(source) else read_directory(Path(source))
            copy, events = await stack.enter_async_context(reading)
            if is_etcd(target):
                await write_etcd(await client_of(target), prefix, copy, events)
            else:
                await write_directory(Path(target), copy, events)
    except (DamagedError, NotWrittenError, BrokenError, StorageError, EtcdRequestError, OSError, ValueError) as error:
        raise CopyError(str(error)) from error
    return f"copied {_counts(copy)}, up to revision {copy.revision}"


async def inspect_etcd(access: EtcdAccess, prefix: str) -> str:
    """Read everything in etcd and check it; return a sentence for the user. Raises CopyError, which names a problem."""
    try:
        async with EtcdClient(access) as client:
            return await inspect_keys(client, prefix)
    except (DamagedError, EtcdRequestError, ValueError) as error:
        raise CopyError(str(error)) from error


async def inspect_keys(client: EtcdClient, prefix: str) -> str:
    """Read all keys with a prefix and check them; return a sentence for the user.

    Raises CopyError, DamagedError, EtcdRequestError.
    """
    async with read_etcd(client, prefix) as (copy, events):
        count = len(copy.lifecycle)
        async for _, some in events:
            count += len(some)
    for each in await client.scan(f"{prefix}/", keys_only=True):
        kind, _, rest = each.key.removeprefix(f"{prefix}/").partition("/")
        if kind not in (_WITH_NAMES if rest else _ALONE) or (kind == "secret" and rest not in SECRETS):
            raise CopyError(f"etcd key {each.key}: it is not that of a controller; remove it")
    ended = f"{count} events, {len(copy.history)} ended VMs"
    return f"etcd prefix {prefix}: {_counts(copy)}, {ended}, up to revision {copy.revision}; no problems"


def _counts(copy: Copy) -> str:
    what = (("vm", "VMs"), ("worker", "workers"), ("account", "service accounts"))
    return ", ".join(f"{len(copy.tables[kind])} {name}" for kind, name in what)
