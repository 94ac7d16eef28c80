"""The state of a cluster in memory: objects, transactions, and the check of their invariants.

Where the state is durable, and how it gets there, is decided by an engine (storage/engine.py).

A transaction never awaits. It changes the state in memory between two checkpoints, and gets the next revision. A single
task, `Store.run`, makes all transactions since its last write durable by one append (group commit), within the engine's
limits. Only then do watchers see them. Every answer to a client first waits for `wait_durable()`, after which
everything on which the answer could be based is durable. When an append fails, its transactions and all later ones are
undone in memory, and the tasks that wait for them get a StorageError. When the engine has ended, the store ends
(`broken`).

While the disk is full, transactions that add something are refused with StorageFullError before they happen. Those that
only delete objects, or change what the scheduler and the workers say about a VM, go on as long as the engine can write
them: deletions free space, and a lost report would leave a VM in a state that it is not in.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime
import logging
import secrets
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import trio

from orchard.base.metrics import WORK_SECONDS, Histogram
from orchard.base.nursery import Wakeup, unwrap_groups
from orchard.codec import ValidationError
from orchard.resources.cluster import ClusterIdentity, Promise
from orchard.resources.json_text import decode_stored, dump_resource, members, object_of
from orchard.schema import VM, ClusterSettings, ServiceAccount, Worker, vm_from_json
from orchard.state.change_log import ChangeLog
from orchard.state.changes import Change, ChangeFeed, Kind, StoredObject
from orchard.state.watchers import Audience
from orchard.storage.engine import Batch, Contents, Engine, Key, Tables
from orchard.storage.errors import (
    BrokenError,
    NotWrittenError,
    ObjectTooLargeError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from orchard.storage.journal import BROKEN_DELAY, Disk, Journal
from orchard.storage.state_file import read_contents

ObjectT = TypeVar("ObjectT", VM, Worker, ServiceAccount, ClusterSettings, ClusterIdentity, Promise)

# The name of the only object of kind "settings", and of the only one of kind "cluster".
SETTINGS = "cluster"
# Objects that are decoded in one step of the event loop, which takes about 50 ms.
_BUILT_AT_ONCE = 300
_CLASSES: dict[Kind, type[Worker | ServiceAccount | ClusterSettings | ClusterIdentity | Promise]] = {
    "worker": Worker,
    "account": ServiceAccount,
    "settings": ClusterSettings,
    "cluster": ClusterIdentity,
    "promise": Promise,
}
_KINDS: dict[type, Kind] = {VM: "vm", **{cls: kind for kind, cls in _CLASSES.items()}}

_logger = logging.getLogger("orchard.storage")


class State:
    """The objects, the JSON of each, and indices over them. Only `apply` changes it."""

    def __init__(self) -> None:
        self.revision = 0
        self.vms: dict[str, VM] = {}
        self.workers: dict[str, Worker] = {}
        self.accounts: dict[str, ServiceAccount] = {}
        self.settings = ClusterSettings()
        self.cluster = ClusterIdentity(id="")
        # By the names of deleted workers.
        self.promises: dict[str, Promise] = {}
        self.vms_by_worker: defaultdict[str, dict[str, VM]] = defaultdict(dict)
        self.json: Tables = {kind: {} for kind in _KINDS.values()}
        # The same objects as above, by kind and name.
        self.objects: dict[Kind, dict[str, Any]] = {
            "vm": self.vms,
            "worker": self.workers,
            "account": self.accounts,
            "settings": {},
            "cluster": {},
            "promise": self.promises,
        }
        # Sorted.
        self.names: dict[Kind, list[str]] = {kind: [] for kind in _KINDS.values()}
        # Where in the JSON of a VM its specification begins, unless an undo has removed the entry.
        self.spec_at: dict[str, int] = {}

    def tables(self) -> Tables:
        """Return a copy of the JSON of all objects."""
        return {kind: dict(table) for kind, table in self.json.items()}

    def apply(self, kind: Kind, name: str, new: StoredObject | None, json: bytes, spec_at: int = 0) -> None:
        """Create or replace one object, or delete it when `new` is None."""
        if kind == "vm":
            old = self.vms.get(name)
            if old is not None and (worker := old.state.worker):
                del self.vms_by_worker[worker][name]
                if not self.vms_by_worker[worker]:
                    del self.vms_by_worker[worker]
            if isinstance(new, VM) and new.state.worker:
                self.vms_by_worker[new.state.worker][name] = new
            if spec_at:
                self.spec_at[name] = spec_at
            else:
                self.spec_at.pop(name, None)
        elif kind == "settings":
            self.settings = new if isinstance(new, ClusterSettings) else ClusterSettings()
        elif kind == "cluster":
            self.cluster = new if isinstance(new, ClusterIdentity) else ClusterIdentity(id="")
        objects, names = self.objects[kind], self.names[kind]
        if new is None:
            del objects[name]
            del self.json[kind][name]
            del names[bisect.bisect_left(names, name)]
        else:
            if name not in objects:
                bisect.insort(names, name)
            objects[name] = new
            self.json[kind][name] = json


class Transaction:
    """Collects changes that happen together or not at all. `Store.transaction` carries them out."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.changes: dict[tuple[Kind, str], StoredObject | None] = {}

    def put(self, new: ObjectT) -> ObjectT:
        """Create or replace an object; return what is stored. A VM's version becomes this transaction's revision."""
        if isinstance(new, VM):
            stored = VM(replace(new.meta, version=self.revision), new.spec, new.state)
            self.changes["vm", new.meta.name] = stored
            return stored
        self.changes[
            _KINDS[type(new)], SETTINGS if isinstance(new, ClusterSettings | ClusterIdentity) else new.name
        ] = new
        return new

    def delete(self, old: VM | Worker | ServiceAccount | Promise) -> None:
        self.changes[_KINDS[type(old)], old.name] = None


@dataclass(slots=True)
class _Write:
    """Transactions that are written together, and the outcome for the tasks that wait."""

    batch: Batch
    changes: list[Change] = field(default_factory=list)
    # Records of the transactions, and bytes of their JSON.
    records: int = 0
    size: int = 0
    # The last position in the log that is published once this write is durable.
    position: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    error: StorageError | None = None


class Store:
    """The state of a cluster. Made by `Store.open`; `run` must be running for anything to become durable."""

    def __init__(self, engine: Engine, state: State) -> None:
        self.state = state
        # Why nothing can be written any more; empty while the store works.
        self.broken = ""
        # The wall time of the last write before the start, and the function for that of each write, which the owner
        # sets.
        self.stored_time: datetime.datetime | None = None
        self.wall_time: Callable[[], datetime.datetime] | None = None
        # How long it takes until changes are durable: an append and a sync.
        self.write_seconds = Histogram(WORK_SECONDS)
        self._engine = engine
        # Writes that are not durable, the earliest first. New transactions join the last one, unless it is being
        # written.
        self._writes: deque[_Write] = deque()
        self._is_writing = False
        self._wakeup = Wakeup()
        # The last changes of VMs and workers, for watchers of all objects.
        self._audience = Audience()
        self.log = ChangeLog(secrets.token_hex(8), self._audience)
        # While a transaction is committed: the workers whose computed fields change with it.
        self._touched: dict[str, tuple[Worker, bytes]] | None = None
        self._watchers: defaultdict[tuple[Kind, str], list[weakref.ref[ChangeFeed]]] = defaultdict(list)
        # The bytes by which all watchers together are behind.
        self._feed_bytes: Counter[str] = Counter()
        self._committed: list[Callable[[list[Change]], None]] = []
        self._durable: list[Callable[[list[Change]], None]] = []
        self._undone: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, engine: Engine, now: datetime.datetime) -> Store:
        """Load the state that an engine has, or create it there. `now` is the time of a new one.

        Changes nothing before all that was read has been decoded and checked. Raises DamagedError when the engine does
        not hold a state, NotWrittenError when a new one cannot be written, BrokenError when it is not known whether it
        was, StorageUnavailableError, OSError.
        """
        contents = await engine.load()
        state = State()
        for _ in _build(contents, state):
            if contents.has_lease:
                await trio.lowlevel.checkpoint()
        problems = check(state, json_is_new=True)
        if problems:
            raise contents.contradicts_itself(problems[:5])
        await engine.begin(state.tables(), now)
        store = cls(engine, state)
        store.stored_time = contents.time
        return store

    @property
    def full(self) -> str:
        """Why nothing can be added at present; empty when there is space."""
        return self._engine.full

    def leads(self) -> bool:
        """Return whether answers may be based on the state: no other controller leads, and the store has not ended."""
        return not self.broken and self._engine.leads()

    def may_answer(self) -> bool:
        """Return whether the state in memory may be shown now: no other controller leads."""
        return self._engine.leads()

    def close(self) -> None:
        """Close the engine. Changes that are not durable by then are lost."""
        self._engine.close()

    # -- changing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self, *, is_needed: bool = False) -> Iterator[Transaction]:
        """Change objects together: in memory at the end of the block, on disk when `wait_durable()` returns.

        With `is_needed`, it may add something also while the disk is full.

        The block must neither await nor contain another transaction: RuntimeError. An exception in it changes nothing.
        Raises StorageUnavailableError when the store has ended, StorageFullError when the disk is full and the
        transaction adds something.
        """
        if self.broken:
            raise StorageUnavailableError(self.broken)
        tx = Transaction(self.state.revision + 1)
        yield tx
        if tx.revision != self.state.revision + 1 and tx.changes:
            raise RuntimeError(f"transaction {tx.revision} awaited, and the revision became {self.state.revision}")
        changes = [change for key, new in tx.changes.items() if (change := self._change(*key, new)) is not None]
        if changes:
            self._commit(changes, adds=not is_needed and any(change.adds for change in changes))

    def _change(self, kind: Kind, name: str, new: StoredObject | None) -> Change | None:
        """Return what a transaction does to one object; None for the deletion of an object that does not exist."""
        old = self.state.objects[kind].get(name)
        old_json = self.state.json[kind].get(name, b"")
        revision = self.state.revision + 1
        if new is None:
            return Change(kind, name, old, None, old_json, old_json, revision=revision) if old is not None else None
        spec_at = self.state.spec_at.get(name, 0) if kind == "vm" else 0
        json, spec_at = _encode_change(new, old, old_json, spec_at)
        return Change(kind, name, old, new, json, old_json, spec_at, revision)

    def _commit(self, changes: list[Change], *, adds: bool) -> None:
        if adds and self.full:
            what = "added" if self._engine.takes_deletions else "added or deleted"
            also = ", deletions are accepted" if self._engine.takes_deletions else ""
            raise StorageFullError(f"{self.full}; nothing can be {what} until there is space{also}")
        if adds:
            self._check_sizes(changes)
        write = self._gather(len(changes), sum(len(change.json) for change in changes))
        # Nothing below can fail, so the transaction is atomic.
        batch = write.batch
        for change in changes:
            self.state.apply(change.kind, change.name, change.new, change.json, change.spec_at)
            batch.record((change.kind, change.name), change.json if change.new else None, is_new=change.old is None)
        write.changes += changes
        self.state.revision = batch.revision = self.state.revision + 1
        batch.adds = batch.adds or adds
        self._touched = {}
        for tell in self._committed:
            tell(changes)
        write.position = self._record(changes, self._touched)

    def _check_sizes(self, changes: list[Change]) -> None:
        """Raise ObjectTooLargeError if one of the objects cannot be stored."""
        limit = self._engine.limits.bytes
        for change in changes:
            if change.new is not None and len(change.json) > limit:
                raise ObjectTooLargeError(
                    f'{change.kind} "{change.name}" has {len(change.json):,} bytes, at most {limit:,.0f} can be stored'
                )

    def _record(self, changes: list[Change], touched: dict[str, tuple[Worker, bytes]]) -> int:
        """Record the changes of one transaction in the log, and return its position."""
        # Showing a worker may find a change of its state. That change is recorded with this transaction.
        self._touched = {}
        position = self.log.record(changes, touched)
        self._touched = None
        return position

    def touch_worker(self, name: str) -> None:
        """Record for watchers that a worker's computed fields have changed, which are not stored."""
        if name not in self.state.workers:
            return
        touched = {name: (self.state.workers[name], self.state.json["worker"][name])}
        if self._touched is not None:
            self._touched |= touched
            return
        position = self._record([], touched)
        # The computed fields may follow from changes that are not durable yet.
        if self._writes:
            self._writes[-1].position = position
        else:
            self.log.publish(position)

    def _gather(self, records: int, size: int) -> _Write:
        """Return the write that takes a transaction of so many records with so many bytes. It wakes `run`."""
        self._wakeup.set()
        limits = self._engine.limits
        last = self._writes[-1] if len(self._writes) > self._is_writing else None
        if last is None or last.records + records > limits.records or last.size + size > limits.bytes:
            last = _Write(Batch(self.state.revision, self.state.revision))
            self._writes.append(last)
        last.records += records
        last.size += size
        return last

    def touch(self) -> None:
        """Schedule the wall time to be stored, although nothing changes. Raises StorageUnavailableError."""
        if self.broken:
            raise StorageUnavailableError(self.broken)
        batch = self._gather(0, 0).batch
        self.state.revision = batch.revision = self.state.revision + 1

    async def wait_durable(self) -> None:
        """Wait until all that the state holds now is durable.

        Raises StorageFullError or StorageUnavailableError when it could not be written and was undone.
        """
        if self._writes:
            write = self._writes[-1]
            await write.done.wait()
            if write.error is not None:
                raise write.error
        elif self.broken:
            raise StorageUnavailableError(self.broken)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make transactions durable until cancelled. Raises BrokenError when the engine has ended."""
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_until_broken, self._engine.run)
                nursery.start_soon(self._run_until_broken, self._write_all)
                nursery.start_soon(self._audience.run)
                task_status.started()

    async def _run_until_broken(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a task of the engine. Raises BrokenError, after the tasks that wait have got the error."""
        try:
            await work()
        except BrokenError as error:
            if not self.broken:
                self.broken = error.consequence
                self._undo(StorageUnavailableError(self.broken))
            # Clients get their answers before the process ends.
            with trio.CancelScope(shield=True):
                await trio.sleep(BROKEN_DELAY)
            raise

    async def _write_all(self) -> None:
        while True:
            await self._wakeup.wait()
            # The same change may have woken the scheduler. Its transaction shares this write.
            await trio.lowlevel.cancel_shielded_checkpoint()
            if self._writes:
                await self._write(self._writes[0])
            if self._writes:
                self._wakeup.set()

    async def _write(self, write: _Write) -> None:
        if self.wall_time is not None:
            write.batch.time = self.wall_time()
        self._is_writing = True
        began = time.perf_counter()
        try:
            await self._engine.append(write.batch)
        except NotWrittenError as error:
            _logger.error("write failed, its changes were undone: %s", error)
            self._undo(error.as_storage_error("nothing was changed"))
        else:
            # Otherwise `run` of the engine has found meanwhile that the engine has ended, and the write was undone.
            if not self.broken:
                self._writes.popleft()
                write.done.set()
                self._publish(write)
        finally:
            self.write_seconds.observe(time.perf_counter() - began)
            self._is_writing = False

    def _undo(self, error: StorageError) -> None:
        """Undo in memory all that is not durable, and raise the error in the tasks that wait for it."""
        for write in reversed(self._writes):
            for change in reversed(write.changes):
                self.state.apply(change.kind, change.name, change.old, change.old_json)
            self.state.revision = write.batch.before
            write.error = error
            write.done.set()
        self._writes.clear()
        workers = self.log.undo()
        for tell in self._undone:
            tell()
        for name in workers:
            self.touch_worker(name)

    # -- watching ----------------------------------------------------------------------------------------------------

    def on_commit(self, tell: Callable[[list[Change]], None]) -> None:
        """Have `tell` called with the changes of each transaction at once, before they are durable."""
        self._committed.append(tell)

    def on_undo(self, tell: Callable[[], None]) -> None:
        """Have `tell` called when changes were undone that `on_commit` has told."""
        self._undone.append(tell)

    def on_durable(self, tell: Callable[[list[Change]], None]) -> None:
        """Have `tell` called with the changes of each write when they are durable."""
        self._durable.append(tell)

    def watch(self, kind: Kind, name: str) -> ChangeFeed:
        """Follow the changes of one object that become durable from now on, until the feed is closed or dropped."""
        feed, key = ChangeFeed(self._feed_bytes, self._audience), (kind, name)

        def forget(gone: weakref.ref[ChangeFeed]) -> None:
            self._watchers[key].remove(gone)
            if not self._watchers[key]:
                del self._watchers[key]

        self._watchers[key].append(weakref.ref(feed, forget))
        return feed

    def _publish(self, written: _Write) -> None:
        # 0: only the time was written.
        if written.position:
            self.log.publish(written.position)
        for change in written.changes:
            for watcher in list(self._watchers.get((change.kind, change.name), ())):
                if (feed := watcher()) is not None:
                    feed.put(change)
        for tell in self._durable:
            tell(written.changes)


# ---- objects and their JSON ----------------------------------------------------------------------------------------


def encode_object(item: StoredObject) -> bytes:
    """Return an object's JSON as the API shows it and as it is stored."""
    return _encode_change(item, None, b"", 0)[0]


def _encode_change(new: StoredObject, old: StoredObject | None, old_json: bytes, spec_at: int) -> tuple[bytes, int]:
    """Return an object's JSON, and where in a VM's JSON its specification begins (otherwise 0).

    Most changes of a VM leave its specification, half of its JSON, as it was. Then these bytes are copied from
    `old_json`, where they begin at `spec_at` (0: unknown).
    """
    if not isinstance(new, VM):
        return dump_resource(new), 0
    head = object_of(new.state_members()).encode()
    if spec_at and isinstance(old, VM) and old.spec is new.spec:
        spec = old_json[spec_at:]
    else:
        # Never empty, since some fields are written even with their default values.
        spec = object_of(members(new.spec)).encode()[1:]
    return b"%b,%b" % (head[:-1], spec), len(head)


class DecodedObject(NamedTuple):
    """An object, its JSON, and where in a VM's JSON its specification begins (otherwise 0)."""

    item: StoredObject
    json: bytes
    spec_at: int


def decode_object(kind: str, raw: Any) -> DecodedObject:
    """Decode an object. Raises KeyError, TypeError, ValidationError."""
    item = vm_from_json(raw) if kind == "vm" else decode_stored(_CLASSES[cast("Kind", kind)], raw)
    return DecodedObject(item, *_encode_change(item, None, b"", 0))


def build_state(contents: Contents) -> State:
    """Decode what an engine has loaded. Raises DamagedError naming the line that cannot be decoded."""
    state = State()
    for _ in _build(contents, state):
        pass
    return state


def _build(contents: Contents, state: State) -> Iterator[None]:
    """Do what `build_state` does, in steps: yield after some objects."""
    state.revision = contents.revision
    for count, ((kind, name), decoded) in enumerate(_decode(contents), 1):
        state.apply(cast("Kind", kind), name, *decoded)
        if count % _BUILT_AT_ONCE == 0:
            yield


def _decode(contents: Contents) -> Iterator[tuple[Key, DecodedObject]]:
    yield from contents.decoded.items()
    for key, (place, raw) in contents.objects.items():
        try:
            decoded = decode_object(key[0], raw)
        except (KeyError, TypeError, ValidationError) as error:
            raise contents.not_understood(place, error) from error
        yield key, decoded


def read_state(path: Path) -> State:
    """Read a state file, also one in use, and change nothing. Raises DamagedError, OSError."""
    return build_state(read_contents(Journal(path, Disk())))


# ---- the invariants ------------------------------------------------------------------------------------------------


def check(state: State, *, json_is_new: bool = False) -> list[str]:
    """Return a sentence for each invariant of the state that is broken.

    With `json_is_new`, the JSON of the objects was made from them a moment ago and is not compared.
    """
    problems = [*_check_vms(state), *_check_assignments(state)]
    for name, worker in state.workers.items():
        if worker.name != name:
            problems.append(f'worker "{name}" has the name "{worker.name}"')
    for name, account in state.accounts.items():
        if account.name != name:
            problems.append(f'service account "{name}" has the name "{account.name}"')
        if not account.token:
            problems.append(f'service account "{name}" has no token')
    for kind, names in state.names.items():
        if names != sorted(state.json[kind]):
            problems.append(f"the names of kind {kind} are not in order")
        for name, json in state.json[kind].items():
            item = state.objects[kind].get(name)
            if item is None or not (json_is_new or json == encode_object(item)):
                problems.append(f'the JSON of {kind} "{name}" is not that of the object')
    return problems


def _check_vms(state: State) -> Iterator[str]:
    uids: dict[str, str] = {}
    for name, vm in state.vms.items():
        who = f'VM "{name}"'
        if vm.name != name:
            yield f'{who} has the name "{vm.name}"'
        if vm.uid in uids or not vm.uid:
            yield f'{who} has the uid "{vm.uid}" of VM "{uids.get(vm.uid, "")}"'
        uids[vm.uid] = name
        if not 0 < vm.meta.version <= state.revision:
            yield f"{who} has version {vm.meta.version} in a state of revision {state.revision}"
        if vm.state.observed_generation > vm.meta.generation:
            yield f"{who} has generation {vm.meta.generation}, but observedGeneration {vm.state.observed_generation}"


def _check_assignments(state: State) -> Iterator[str]:
    for name, vm in state.vms.items():
        worker = vm.state.worker
        if bool(worker) != vm.condition("scheduled"):
            yield f'VM "{name}" has worker "{worker}", which contradicts its condition scheduled'
        if worker and state.vms_by_worker.get(worker, {}).get(name) is not vm:
            yield f'VM "{name}" is missing in the index of worker "{worker}"'
    indexed = sum(len(assigned) for assigned in state.vms_by_worker.values())
    assigned = sum(1 for vm in state.vms.values() if vm.state.worker)
    if indexed != assigned:
        yield f"{indexed} VMs are indexed by worker, but {assigned} are assigned"
