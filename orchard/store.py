"""The truth: the cluster's state in memory, its journal on disk, and those who watch it. Law: disk, and nothing else.

One file, `state.jsonl`, holds everything but events: a snapshot (a header and one line an object) and after it the
journal (one line a batch of transactions, with what they have left of each object). Compaction writes a new such file beside it and renames it into place, so there is
never more than one file that counts, and copying it at any moment gives a consistent backup.

A transaction never waits: it changes the state in memory between two checkpoints, and gets the next revision. A
single task, `Store.run`, carries what has gathered meanwhile to the disk in one append and one fsync (group commit), in
a thread. Then, and not before, watchers are told. Whoever answers anybody first waits for `wait_durable()`: everything that
the answer could be based on is durable then. When an append fails, the transactions in it and all after it are
undone in memory, and those who wait are refused; when nobody knows what the disk holds, the store has ended.

A full disk: the first append that finds no room gets it from the reserve (journal.py), and until the reserve could be
filled again, transactions that add something are refused with 507 before they happen. Those that only delete objects,
or change what the scheduler and the workers say about a VM, go on with the reserve's help: deleting is how room is
made, and a report that is lost would leave a VM in a state that it is not in. RESERVE_BYTES are enough for some 500
reports or 10,000 deletions; when they are used up, these are refused, too. Deletions give room back in the files of
events, and a snapshot that is much smaller than the file is written at once then, in the room of the reserve.

What a different engine for durability would have to offer stands in two calls: load everything, append a batch.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import trio

from orchard.codec import APIError, ValidationError, decode, dump_json, encode, format_time, replace
from orchard.files import RESERVE_FILE, STATE_FILE
from orchard.schema import VM, ClusterSettings, ServiceAccount, Worker, vm_from_json
from orchard.storage.journal import LAST_WORDS, Broken, DamagedError, Disk, Journal, NotWritten, Reserve

VERSION = 1  # of the file; a newer one is refused, an older one is upgraded in _header_of
COMPACT_BYTES = 4 * 1024 * 1024  # of journal, before a new snapshot is worth its writing
COMPACT_RATIO = 3  # and it is this many times the snapshot: the cost of compaction stays a share of the writes
RESERVE_BYTES = 1024 * 1024  # kept free for a full disk: a report takes about two thousand, a deletion a hundred
RESERVE_SHARE = 4  # the part of it, one in so many, that a batch may take which also adds something
REFILL_SECONDS = 1.0  # between two tries to fill the reserve again; so long may a disk have room and nobody uses it
WATCH_BACKLOG = 1024  # changes that a slow watcher may be behind before it is cut off, to begin anew

Kind = Literal["vm", "worker", "account", "settings"]
StoredObject = VM | Worker | ServiceAccount | ClusterSettings
ObjectT = TypeVar("ObjectT", VM, Worker, ServiceAccount, ClusterSettings)
KINDS: dict[type, Kind] = {VM: "vm", Worker: "worker", ServiceAccount: "account", ClusterSettings: "settings"}
Tables = dict[Kind, dict[str, bytes]]  # kind -> name -> JSON
InThread = Callable[..., Awaitable[Any]]  # does blocking work, as trio.to_thread.run_sync
_SPEC = b',"image":"'  # begins the specification in a VM's JSON; the quotes of a text before it would be escaped
SETTINGS = "cluster"  # the name of the one settings object

_logger = logging.getLogger("orchard.store")


@dataclass(slots=True)
class Change:
    """What became of one object: `old` None: added; `new` None: deleted."""

    kind: Kind
    name: str
    old: StoredObject | None
    new: StoredObject | None
    json: bytes  # the new object, or the last one
    _line: bytes = b""

    @property
    def line(self) -> bytes:
        """What watchers are told; made once for all of them."""
        if not self._line:
            self._line = watch_line(self.type, self.json)
        return self._line

    @property
    def type(self) -> Literal["ADDED", "MODIFIED", "DELETED"]:
        if self.new is None:
            return "DELETED"
        return "ADDED" if self.old is None else "MODIFIED"


def watch_line(kind: str, json_text: bytes) -> bytes:
    """Give a line of a watch: what happened to an object, and the object."""
    return b'{"type":"%b","object":%b}\n' % (kind.encode(), json_text)


class State:
    """The objects, each with its JSON beside it, and the indices over them. Only `apply` changes it."""

    def __init__(self) -> None:
        self.revision = 0
        self.vms: dict[str, VM] = {}
        self.workers: dict[str, Worker] = {}
        self.accounts: dict[str, ServiceAccount] = {}
        self.settings = ClusterSettings()
        self.vms_by_worker: defaultdict[str, dict[str, VM]] = defaultdict(dict)
        self.json: Tables = {kind: {} for kind in KINDS.values()}
        self.names: dict[Kind, list[str]] = {kind: [] for kind in KINDS.values()}  # in order

    def get(self, kind: Kind, name: str) -> StoredObject | None:
        if kind == "settings":
            return self.settings if SETTINGS in self.json["settings"] else None
        table = self._table(kind)
        return table.get(name)

    def tables(self) -> Tables:
        """Copy the JSON of all objects, for a thread to write while the state goes on changing."""
        return {kind: dict(table) for kind, table in self.json.items()}

    def _table(self, kind: Kind) -> dict[str, Any]:
        tables: dict[Kind, dict[str, Any]] = {"vm": self.vms, "worker": self.workers, "account": self.accounts}
        return tables[kind]

    def apply(self, kind: Kind, name: str, new: StoredObject | None, json: bytes) -> None:
        """Put (or with `new` None take away) one object."""
        if kind == "vm":
            self._index_vm(name, new if isinstance(new, VM) else None)
        names = self.names[kind]
        if new is None:
            del self.json[kind][name]
            del names[bisect.bisect_left(names, name)]
        else:
            if name not in self.json[kind]:
                bisect.insort(names, name)
            self.json[kind][name] = json
        if kind == "settings":
            self.settings = new if isinstance(new, ClusterSettings) else ClusterSettings()
        elif new is None:
            del self._table(kind)[name]
        else:
            self._table(kind)[name] = new

    def _index_vm(self, name: str, new: VM | None) -> None:
        old = self.vms.get(name)
        if old is not None and old.state.worker:
            held = self.vms_by_worker[old.state.worker]
            del held[name]
            if not held:
                del self.vms_by_worker[old.state.worker]
        if new is not None and new.state.worker:
            self.vms_by_worker[new.state.worker][name] = new


class Transaction:
    """Changes that happen together or not at all. Collects; `Store.transaction` carries it out."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.changes: dict[tuple[Kind, str], StoredObject | None] = {}

    def put(self, noun: ObjectT) -> ObjectT:
        """Create or replace an object; a VM's version becomes this transaction's revision. Returns what is stored."""
        stored = noun
        if isinstance(noun, VM):
            stored = replace(noun, meta=replace(noun.meta, version=self.revision))
        kind = KINDS[type(noun)]
        self.changes[kind, SETTINGS if isinstance(noun, ClusterSettings) else noun.name] = stored
        return stored

    def delete(self, noun: VM | Worker | ServiceAccount) -> None:
        self.changes[KINDS[type(noun)], noun.name] = None


@dataclass(slots=True)
class Batch:
    """Transactions on their way to the disk together: all of them get there, or none.

    Of an object that several of them have changed, only the last record is written: the scheduler answers to most
    changes with another one of the same object.
    """

    before: int  # the revision
    revision: int  # the revision after it
    changes: list[Change] = field(default_factory=list)
    old_json: list[bytes] = field(default_factory=list)  # beside `changes`, to undo them
    records: dict[tuple[Kind, str], bytes | None] = field(default_factory=dict)  # JSON, None: deleted
    added: set[tuple[Kind, str]] = field(default_factory=set)  # what was not there before
    adds: bool = False  # something that does not have to be written to a full disk
    full: str = ""  # why it found the disk full, whether or not the reserve has helped
    done: trio.Event = field(default_factory=trio.Event)
    error: APIError | None = None

    def take(self, change: Change, old_json: bytes) -> None:
        """Add a change and what undoes it."""
        self.changes.append(change)
        self.old_json.append(old_json)
        key = (change.kind, change.name)
        if change.old is None and key not in self.records:
            self.added.add(key)
        if change.new is None and key in self.added:
            self.records.pop(key, None)  # the disk will never have known it
        else:
            self.records[key] = None if change.new is None else change.json

    def line(self) -> bytes:
        """Give what the journal is to hold of it."""
        records = [_record(kind, name, json) for (kind, name), json in self.records.items()]
        return b'{"after":%d,"revision":%d,"changes":[%b]}' % (self.before, self.revision, b",".join(records))


@dataclass(eq=False, slots=True)
class Watcher:
    """Somebody who is told of every change to one object, in order, once it is durable."""

    kind: Kind
    name: str
    send: trio.MemorySendChannel[Change]
    changes: trio.MemoryReceiveChannel[Change]


class Store:
    """The state of a cluster in `directory`. Made by `Store.open`; `run` must be running for anything to be durable."""

    def __init__(self, journal: Journal, state: State, reserve: Reserve, in_thread: InThread) -> None:
        self.state = state
        self.broken = ""  # why nothing can be written any more
        self.full = ""  # why nothing can be added now
        self._journal = journal
        self._reserve = reserve
        self._in_thread = in_thread
        self._refill_at = math.inf  # by trio's clock
        # By what the objects take, not by the file: else each restart would let the file grow to a multiple of itself.
        self._compact_at = _compact_at(_bytes_of(state.json))
        self._batch: Batch | None = None  # gathers
        self._flushing: Batch | None = None  # is being written
        self._wake = trio.Event()
        self._watchers: defaultdict[tuple[Kind, str], list[Watcher]] = defaultdict(list)
        self._committed: list[Callable[[list[Change]], None]] = []
        self._durable: list[Callable[[list[Change]], None]] = []
        self._undone: list[Callable[[], None]] = []

    @classmethod
    def open(
        cls,
        directory: Path,
        now: datetime.datetime,
        disk: Disk | None = None,
        in_thread: InThread = trio.to_thread.run_sync,
    ) -> Store:
        """Load the state in `directory`, or begin one there. Does disk I/O; what `run` does of it, `in_thread`.

        Raises DamagedError when the file is not what was written, NotWritten when a new one can't be, Broken when nobody
        knows whether the disk holds it.
        """
        path = directory / STATE_FILE
        disk = disk or Disk()
        journal = Journal(path, disk)
        if path.exists():
            state = load_state(path, journal.load())
            problems = check(state, json_is_new=True)
            if problems:
                journal.close()
                raise DamagedError(path, journal.size, "the state contradicts itself: " + "; ".join(problems[:5]))
            journal.make_durable()
        elif (reserve := directory / RESERVE_FILE).exists():  # which is made after the state
            remedy = f"restore it from a backup, or remove {reserve} to begin with nothing, which loses the events, too"
            raise DamagedError(path, 0, "it is missing in a directory that a controller has used", remedy)
        else:
            state = State()
            with contextlib.suppress(PermissionError):  # a parent that can't be read can't be synced
                disk.sync_directory(directory.parent)  # the directory may be as new as the file
            journal.create(snapshot(state.tables(), state.revision, now))
        store = cls(journal, state, Reserve(directory / RESERVE_FILE, RESERVE_BYTES, disk), in_thread)
        try:
            store._reserve.fill()
        except NotWritten as error:
            store._found_full(str(error), 0.0)
        return store

    def close(self) -> None:
        """Close the file. What is not durable by now is lost."""
        self._journal.close()

    # -- changing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change objects together: at the end of the block, in memory; on disk when `wait_durable()` returns.

        The block must not await, nor hold another transaction: RuntimeError. An exception out of it changes nothing.
        Raises APIError: 503 when the store has ended, 507 when it adds something and the disk is full.
        """
        if self.broken:
            raise APIError(503, self.broken)
        tx = Transaction(self.state.revision + 1)
        yield tx
        if tx.changes:
            self._commit(tx)

    def _commit(self, tx: Transaction) -> None:
        if tx.revision != self.state.revision + 1:
            raise RuntimeError(f"transaction {tx.revision} waited, and others came to {self.state.revision} meanwhile")
        changes: list[Change] = []
        old_json: list[bytes] = []
        for (kind, name), new in tx.changes.items():
            old = self.state.get(kind, name)
            if new is None and old is None:
                continue
            before = self.state.json[kind].get(name, b"")
            json = before if new is None else encoded(new, old, before)
            changes.append(Change(kind, name, old, new, json))
            old_json.append(before)
        if not changes:
            return
        adds = any(_adds(change) for change in changes)
        if adds and self.full:
            raise APIError(507, f"{self.full}; nothing can be added until there is room, deleting goes on")
        # From here on nothing can fail: all of the transaction happens.
        batch = self._gathering()
        for change, before in zip(changes, old_json, strict=True):
            self.state.apply(change.kind, change.name, change.new, change.json)
            batch.take(change, before)
        self.state.revision = batch.revision = tx.revision
        batch.adds = batch.adds or adds
        self._wake.set()
        for tell in self._committed:
            tell(changes)

    def _gathering(self) -> Batch:
        if self._batch is None:
            self._batch = Batch(before=self.state.revision, revision=self.state.revision)
        return self._batch

    async def wait_durable(self) -> None:
        """Wait until everything that the state holds now is on disk.

        Raises APIError: 507 or 503 when it could not be written, and was undone.
        """
        batch = self._batch or self._flushing
        if batch is not None:
            await batch.done.wait()
            if batch.error is not None:
                raise batch.error
        elif self.broken:
            raise APIError(503, self.broken)

    # -- writing -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry transactions to the disk until cancelled. Raises Broken when nobody knows any more what it holds."""
        task_status.started()
        while True:
            with trio.move_on_at(self._refill_at):
                await self._wake.wait()
            # The scheduler, which the same change has woken, comes in before the door closes: one sync for both.
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._wake = trio.Event()
            if trio.current_time() >= self._refill_at:
                await self._refill()
            if self._batch is not None:
                await self._flush()

    async def _refill(self) -> None:
        try:
            await self._in_thread(self._reserve.fill)
        except NotWritten:
            self._refill_at = trio.current_time() + REFILL_SECONDS
            if self._journal.size > 2 * _bytes_of(self.state.json):
                self._compact_at = 0
                self._gathering()
        else:
            _logger.info("there is room on the disk again")
            self.full, self._refill_at = "", math.inf

    def _found_full(self, why: str, refill_at: float) -> None:
        if not self.full:
            _logger.error("the disk is full, nothing is added to the state any more: %s", why)
            self._refill_at = refill_at
        self.full = why

    async def _flush(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        self._flushing = batch
        # The state in memory holds this batch already: a snapshot of it makes the batch durable, too.
        tables = self.state.tables() if self._journal.size > self._compact_at else None
        try:
            # Shielded: it takes as long as the disk takes, and nobody may believe that it did not happen.
            with trio.CancelScope(shield=True):
                await self._in_thread(self._write, batch, tables)
        except NotWritten as error:
            _logger.error("a write failed and was taken back: %s", error)
            self._undo(batch, APIError(507 if error.no_room else 503, f"{error}; nothing was changed"))
            return
        except Broken as error:
            self.broken = f"the controller cannot store anything any more: {error}; restart it"
            self._undo(batch, APIError(503, self.broken))
            with trio.CancelScope(shield=True):  # whatever ends meanwhile, this is why
                await trio.sleep(LAST_WORDS)
            raise
        finally:
            if batch.full:
                self._found_full(batch.full, trio.current_time() + REFILL_SECONDS)
        self._flushing = None
        batch.done.set()
        self._publish(batch.changes)

    def _write(self, batch: Batch, tables: Tables | None) -> None:
        """Make a batch durable, with a new snapshot when `tables` is given. Runs in a thread."""
        if tables is not None:
            lines = snapshot(tables, batch.revision, datetime.datetime.now(datetime.UTC))
            size = sum(map(len, lines))
            try:
                self._write_in_reserve(lambda: self._journal.create(lines), size, RESERVE_BYTES // 2)
            except NotWritten as error:
                _logger.warning("compaction was put off: %s", error)
            else:
                self._compact_at = _compact_at(self._journal.size)
                return
            self._compact_at = self._journal.size + COMPACT_BYTES  # then it is tried again
        if batch.revision == batch.before:  # there was nothing but the snapshot to write
            return
        line = batch.line()
        # A batch that also adds something is not refused for the sake of the others in it, unless it is large.
        most = RESERVE_BYTES // RESERVE_SHARE if batch.adds else RESERVE_BYTES
        try:
            if self._write_in_reserve(lambda: self._journal.append([line]), len(line), most):
                batch.full = f"there is no room for {self._journal.path}"
        except NotWritten as error:
            batch.full = str(error) if error.no_room else ""
            raise

    def _write_in_reserve(self, write: Callable[[], None], size: int, most: int) -> bool:
        """Write `size` bytes, if need be and they are not more than `most`, in place of the reserve: True then."""
        helped = False
        while True:
            try:
                write()
            except NotWritten as error:
                if not error.no_room or size > most or not self._reserve.give(size):
                    raise
                helped = True
            else:
                return helped

    def _undo(self, batch: Batch, error: APIError) -> None:
        """Take back a batch that is not on the disk, and all that was built on it since."""
        self._flushing = None
        later, self._batch = self._batch, None
        for lost in (later, batch):
            if lost is None:
                continue
            for change, old_json in zip(reversed(lost.changes), reversed(lost.old_json), strict=True):
                self.state.apply(change.kind, change.name, change.old, old_json)
            self.state.revision = lost.before
            lost.error = error
            lost.done.set()
        for tell in self._undone:
            tell()

    # -- watching ----------------------------------------------------------------------------------------------------

    def on_commit(self, tell: Callable[[list[Change]], None]) -> None:
        """Have `tell` called with the changes of each transaction, at once, before they are durable."""
        self._committed.append(tell)

    def on_undo(self, tell: Callable[[], None]) -> None:
        """Have `tell` called when changes that were told at their commit were taken back."""
        self._undone.append(tell)

    def on_durable(self, tell: Callable[[list[Change]], None]) -> None:
        """Have `tell` called with the changes of each batch when they are durable."""
        self._durable.append(tell)

    @contextlib.contextmanager
    def watch(self, kind: Kind, name: str) -> Iterator[trio.MemoryReceiveChannel[Change]]:
        """Follow the changes of one object that become durable from now on.

        The channel ends when the watcher was WATCH_BACKLOG changes behind: it has to begin anew.
        """
        send, receive = trio.open_memory_channel[Change](WATCH_BACKLOG)
        watcher = Watcher(kind, name, send, receive)
        self._watchers[kind, name].append(watcher)
        try:
            yield receive
        finally:
            send.close()
            receive.close()
            watching = self._watchers[kind, name]
            watching.remove(watcher)
            if not watching:
                del self._watchers[kind, name]

    def _publish(self, changes: list[Change]) -> None:
        for change in changes:
            for watcher in self._watchers.get((change.kind, change.name), ()):
                try:
                    watcher.send.send_nowait(change)
                except trio.WouldBlock:
                    watcher.send.close()  # it reads what it has and then sees the end
                except (trio.ClosedResourceError, trio.BrokenResourceError):
                    pass
        for tell in self._durable:
            tell(changes)


# ---- the file ------------------------------------------------------------------------------------------------------


def _adds(change: Change) -> bool:
    """Whether a change is more than a deletion, or than what the scheduler and the workers say about a VM."""
    if isinstance(change.old, VM) and isinstance(change.new, VM):
        return change.old.spec != change.new.spec
    return change.new is not None


def _bytes_of(tables: Tables) -> int:
    return sum(len(json) for table in tables.values() for json in table.values())


def _compact_at(snapshot: int) -> int:
    """How many bytes a file whose snapshot takes `snapshot` bytes may have, before a new one is worth its writing."""
    return snapshot + max(COMPACT_BYTES, COMPACT_RATIO * snapshot)


def encoded(noun: StoredObject, old: StoredObject | None = None, old_json: bytes = b"") -> bytes:
    """Give an object as the API shows it and as it is stored.

    Most changes of a VM leave its specification, half of its JSON, as it was: that is taken over from `old_json`, which
    is what this gave of `old`.
    """
    if not isinstance(noun, VM):
        return dump_json(encode(noun))
    if isinstance(old, VM) and old.spec is noun.spec and noun.spec.image:
        return dump_json(noun.fate())[:-1] + old_json[old_json.index(_SPEC) :]
    return dump_json(noun.to_json())


def _record(kind: Kind, name: str, json: bytes | None) -> bytes:
    if json is None:
        return dump_json({"delete": kind, "name": name})
    return b'{"put":"%b","name":%b,"object":%b}' % (kind.encode(), dump_json(name), json)


def snapshot(tables: Tables, revision: int, now: datetime.datetime) -> list[bytes]:
    """Give the lines with which a file begins: a header, and one line an object."""
    objects = [_record(kind, name, json) for kind, table in tables.items() for name, json in table.items()]
    header = {
        "format": "orchard-state",
        "version": VERSION,
        "id": secrets.token_hex(8),  # no line of another file fits behind this one
        "written": format_time(now),
        "revision": revision,
        "objects": len(objects),
    }
    return [dump_json(header), *objects]


def load_state(path: Path, lines: Iterator[tuple[int, dict[str, Any]]]) -> State:
    """Build the state from the lines of its file. Raises DamagedError naming the line that does not fit.

    Only what an object is in the end is made one: most lines of a journal say what it was before (./run bench start).
    """
    header: dict[str, Any] | None = None
    revision = objects = 0
    found: dict[tuple[Kind, str], tuple[int, Any]] = {}  # object -> offset of its last line, and what stands there
    for offset, line in lines:
        try:
            if header is None:
                header = _header_of(path, line)
                revision = header["revision"]
            elif objects < header["objects"]:
                objects += 1
                _note(found, offset, line)
            else:
                begins = line.get("after", line["revision"] - 1) + 1  # a line without it is of one transaction
                if begins != revision + 1 or line["revision"] < begins:
                    begins = min(begins, line["revision"])
                    raise DamagedError(path, offset, f"revision {begins} follows revision {revision}")
                for change in line["changes"]:
                    _note(found, offset, change)
                revision = line["revision"]
        except (KeyError, TypeError) as error:
            raise DamagedError(path, offset, f"this line is not understood ({error})") from error
    if header is None or objects < header["objects"]:
        raise DamagedError(path, path.stat().st_size, "the file ends in the middle of its snapshot")
    state = State()
    state.revision = revision
    for (kind, name), (offset, raw) in found.items():
        try:
            noun = _noun_of(kind, raw)
        except (KeyError, TypeError, ValidationError) as error:
            raise DamagedError(path, offset, f"this line is not understood ({error})") from error
        state.apply(kind, name, noun, encoded(noun))
    return state


def _header_of(path: Path, line: dict[str, Any]) -> dict[str, Any]:
    if line.get("format") != "orchard-state":
        raise DamagedError(path, 0, "this is no orchard-state file")
    if line["version"] > VERSION:
        raise DamagedError(
            path,
            0,
            f"version {line['version']} is newer than the version {VERSION} that this program knows",
            "start the Orchard that wrote it, or a newer one",
        )
    return line


def _note(found: dict[tuple[Kind, str], tuple[int, Any]], offset: int, record: dict[str, Any]) -> None:
    """Take one record into account. Raises KeyError for one that does not fit to those before."""
    if "delete" in record:
        del found[record["delete"], record["name"]]
    else:
        found[record["put"], record["name"]] = (offset, record["object"])


def _noun_of(kind: Kind, raw: Any) -> StoredObject:
    """Read an object. Raises KeyError, TypeError, ValidationError."""
    if kind == "vm":
        return vm_from_json(raw)
    nouns: dict[Kind, type[Worker | ServiceAccount | ClusterSettings]] = {
        "worker": Worker,
        "account": ServiceAccount,
        "settings": ClusterSettings,
    }
    return decode(nouns[kind], raw)


def check(state: State, *, json_is_new: bool = False) -> list[str]:
    """Say in a sentence each what in the state contradicts something else in it; empty when nothing does.

    `json_is_new`: the JSON beside the objects was made a moment ago, and need not be compared with them.
    """
    problems = []
    uids: dict[str, str] = {}
    for name, vm in state.vms.items():
        who = f'VM "{name}"'
        if vm.name != name:
            problems.append(f'{who} says that its name is "{vm.name}"')
        if vm.uid in uids or not vm.uid:
            problems.append(f'{who} has the uid "{vm.uid}" of VM "{uids.get(vm.uid, "")}"')
        uids[vm.uid] = name
        if not 0 < vm.meta.version <= state.revision:
            problems.append(f"{who} has version {vm.meta.version} in a state of revision {state.revision}")
        if not vm.state.observed_generation <= vm.meta.generation:
            problems.append(f"{who} is of generation {vm.meta.generation}, observed {vm.state.observed_generation}")
        if bool(vm.state.worker) != vm.condition("scheduled"):
            problems.append(f'{who} is on worker "{vm.state.worker}" against its condition scheduled')
        if vm.state.worker and state.vms_by_worker.get(vm.state.worker, {}).get(name) is not vm:
            problems.append(f'{who} is missing in the index of worker "{vm.state.worker}"')
    indexed = sum(len(held) for held in state.vms_by_worker.values())
    assigned = sum(1 for vm in state.vms.values() if vm.state.worker)
    if indexed != assigned:
        problems.append(f"{indexed} VMs are indexed by worker, and {assigned} have one")
    for name, worker in state.workers.items():
        if worker.name != name:
            problems.append(f'worker "{name}" says that its name is "{worker.name}"')
    for name, account in state.accounts.items():
        if account.name != name or not account.token:
            problems.append(f'service account "{name}" says that its name is "{account.name}", or has no token')
    for kind, table in state.json.items():
        if state.names[kind] != sorted(table):
            problems.append(f"the names of kind {kind} are not in order")
        for name, json in table.items():
            noun = state.get(kind, name)
            if noun is None or not (json_is_new or json == encoded(noun)):
                problems.append(f'the JSON kept of {kind} "{name}" is not that of the object')
    return problems
