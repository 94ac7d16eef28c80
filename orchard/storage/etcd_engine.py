"""The etcd engine: the state of a cluster with several controllers, of which one leads.

Under the prefix, each object is a key KIND/NAME with the JSON that the state file has, too. `head` has the revision,
the wall time of the last write, and who wrote it. Every transaction compares etcd's revision of `head` with the last
one that this controller knows, and writes `head`. So once another controller has written `head`, no write of an earlier
one succeeds, however late it arrives: safety does not depend on the lease (leadership.py).

A transaction whose answer was lost is sent again until it is answered or the lease is over. Each transaction writes a
`head` that no other one writes. So if the comparison fails and `head` has that value, an earlier try has succeeded;
with any other value, leadership is lost and the engine has ended.

A batch that is too large for one transaction of etcd is first written in parts to `transaction/NUMBER`. A `head` with
the number of parts commits the batch: from then on every reader of the state reads the parts, too. Then the objects are
written, and at last the parts deleted. A controller that takes over completes a committed batch.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import trio

from orchard.base.nursery import Wakeup
from orchard.codec import dump_json, format_time, load_json
from orchard.storage.engine import Batch, BatchLimits, Contents, DecodedValues, Key, Tables
from orchard.storage.errors import DamagedError, NotWrittenError, StorageUnavailableError
from orchard.storage.etcd import (
    MAX_OPERATIONS,
    MAX_TRANSACTION_BYTES,
    QUOTA_REMEDY,
    EtcdClient,
    EtcdRefusedError,
    EtcdRequestError,
    KeyValue,
    TxnOperation,
    delete,
    delete_prefix,
    get,
    put,
    was_written_at,
)
from orchard.storage.leadership import Leadership
from orchard.storage.state_file import STATE_VERSION

DEFAULT_MAX_MIB = 1024
# A record is one operation.
_LIMITS = BatchLimits(MAX_OPERATIONS, MAX_TRANSACTION_BYTES)
_FORMAT = "orchard-state"
# The kinds of objects, which are keys by name.
KINDS = ("account", "cluster", "promise", "settings", "vm", "worker")
# Pause after upkeep that failed.
_RETRY_SECONDS = 0.1
# Intervals of compaction, which etcd does not do by itself, and of checking its size.
_COMPACT_SECONDS, _LOOK_SECONDS = 300.0, 60.0
# Interval of checking the size while nothing may be added, so that this ends soon after there is space again.
_LOOK_FULL_SECONDS = 5.0
# Revisions that a compaction keeps.
_KEPT_REVISIONS = 1_000
# Shares of the most that etcd may hold: after so many written bytes its size is checked, and it is compacted, earlier.
_LOOK_SHARE, _COMPACT_SHARE = 1 / 32, 1 / 8

# The alarm in the status of an etcd whose quota is used up.
_ALARM = "NOSPACE"

_logger = logging.getLogger("orchard.storage")


class DamagedKeyError(DamagedError):
    """A key of etcd does not hold what a controller has written."""

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        Exception.__init__(self, f"{where}: {what}; {remedy or 'restore the keys from a backup'}")


@dataclass(slots=True)
class EtcdContents(Contents):
    """The contents of etcd. The place of an object is its key."""

    has_lease: bool = True
    prefix: str = ""
    # Values that were decoded before the start, by etcd's key.
    ahead: DecodedValues = field(default_factory=dict, repr=False)

    def read(self, kind: str, name: str, value: bytes) -> None:
        """Add an object. Raises DamagedKeyError."""
        key = f"{self.prefix}/{kind}/{name}"
        before, made = self.ahead.get(key, (None, None))
        if before == value:
            self.decoded[kind, name] = made
            return
        try:
            self.objects[kind, name] = (key, load_json(value))
        except ValueError as error:
            raise self.not_understood(key, error) from error

    def drop(self, key: Key) -> None:
        """Forget an object that was read, if there is one."""
        self.objects.pop(key, None)
        self.decoded.pop(key, None)

    def not_understood(self, place: Any, error: Exception) -> DamagedError:
        return DamagedKeyError(f"etcd key {place}", f"the value is not understood ({error})")

    def contradicts_itself(self, problems: Iterable[str]) -> DamagedError:
        return DamagedKeyError(f"etcd prefix {self.prefix}", f"the state is inconsistent: {'; '.join(problems)}")


@dataclass(frozen=True, slots=True)
class Head:
    """The value of `head`. `write` counts the writes of one controller, so that no two of them are equal.

    `parts` is the number of parts of a committed batch whose objects may not all be written; else 0.
    """

    revision: int = 0
    epoch: int = 0
    by: str = ""
    write: int = 0
    time: str = ""
    parts: int = 0
    # Version of the program that has written the state.
    version: int = STATE_VERSION

    @property
    def written(self) -> datetime.datetime | None:
        """The wall time of the last write, if there was one. Raises ValueError."""
        return datetime.datetime.fromisoformat(self.time) if self.time else None

    def to_json(self) -> bytes:
        return dump_json({"format": _FORMAT, **asdict(self)})


def decode_head(found: KeyValue) -> Head:
    """Return a `head` that was read. Raises DamagedKeyError."""
    key = f"etcd key {found.key}"
    try:
        read = load_json(found.value)
        if read["format"] != _FORMAT:
            raise ValueError(f"the format is {read['format']}")
        version = int(read["version"])
        if version > STATE_VERSION:
            what = f"version {version} is newer than the version {STATE_VERSION} that this program knows"
            raise DamagedKeyError(key, what, "start the Orchard that wrote it, or a newer one")
        numbers = {name: int(read[name]) for name in ("revision", "epoch", "write", "parts")}
        head = Head(**numbers, by=str(read["by"]), time=str(read["time"]), version=version)
        _ = head.written
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedKeyError(key, "it is not that of a controller", "choose another --etcd-prefix") from error
    return head


_Record = tuple[Key, bytes | None]


async def read_objects(client: EtcdClient, contents: EtcdContents, head: Head, at: int) -> list[list[_Record]]:
    """Read all objects as they were at revision `at` of etcd, when `head` was as given.

    Return the parts of a batch that is not known to be complete. Raises DamagedKeyError, EtcdRequestError.
    """
    begins = [f"{contents.prefix}/{kind}/" for kind in KINDS]
    *found, stored = await client.scan_each([*begins, _part_key(contents.prefix)], at)
    for kind, begin, values in zip(KINDS, begins, found, strict=True):
        for each in values:
            contents.read(kind, each.key.removeprefix(begin), each.value)
    if len(stored) < head.parts:
        raise DamagedKeyError(
            f"etcd key {_part_key(contents.prefix, len(stored))}", "it is missing, although `head` says that it counts"
        )
    parts = [_decode_part(each) for each in stored[: head.parts]]
    for (kind, name), value in (record for part in parts for record in part):
        contents.drop((kind, name))
        if value is not None:
            contents.read(kind, name, value)
    return parts


def _part_key(prefix: str, number: int | None = None) -> str:
    """Return the key of a part of a batch, or what the keys of all parts begin with."""
    return f"{prefix}/transaction/" + ("" if number is None else f"{number:06}")


def _encode_part(records: Sequence[_Record]) -> bytes:
    return b"[%b]" % b",".join(b"[%b,%b]" % (dump_json(key), json or b"null") for key, json in records)


def _decode_part(found: KeyValue) -> list[_Record]:
    try:
        return [((kind, name), None if new is None else dump_json(new)) for (kind, name), new in load_json(found.value)]
    except (ValueError, TypeError) as error:
        raise DamagedKeyError(f"etcd key {found.key}", f"the value is not understood ({error})") from error


@dataclass(slots=True)
class _Usage:
    """The most that etcd may hold, in bytes, and the bytes written since the last size check and the last compaction."""

    most: int
    unseen: int = 0
    uncompacted: int = 0
    looked_at: float = field(default_factory=trio.current_time)
    compacted_at: float = field(default_factory=trio.current_time)

    def add(self, size: int) -> None:
        self.unseen += size
        self.uncompacted += size

    def look_is_due(self, now: float, pause: float) -> bool:
        return now >= self.looked_at + pause or self.unseen > _LOOK_SHARE * self.most

    def compaction_is_due(self, now: float) -> bool:
        return now >= self.compacted_at + _COMPACT_SECONDS or self.uncompacted > _COMPACT_SHARE * self.most


def _cut(batch: Batch) -> list[list[_Record]]:
    """Return the records of a batch in parts that etcd takes at once: one, unless a single transaction is larger."""
    parts: list[list[_Record]] = [[]]
    size = 0
    for record in batch.records.items():
        size += len(record[1] or b"")
        if parts[-1] and (len(parts[-1]) >= _LIMITS.records or size > _LIMITS.bytes):
            parts.append([])
            size = len(record[1] or b"")
        parts[-1].append(record)
    return parts


class EtcdEngine:
    """The durable copy of a cluster's state in etcd (see Engine). `leadership` must have won its campaign."""

    limits = _LIMITS

    def __init__(
        self,
        client: EtcdClient,
        prefix: str,
        leadership: Leadership,
        max_mib: int = DEFAULT_MAX_MIB,
        ahead: DecodedValues = MappingProxyType({}),
    ) -> None:
        # Why nothing should be added at present; empty when there is space.
        self.full = ""
        # When etcd is above its own quota, it takes no write at all.
        self.takes_deletions = True
        self._client = client
        self._prefix = prefix
        self._head_key = f"{prefix}/head"
        self._leadership = leadership
        # The last `head` of this controller, and etcd's revision of it.
        self.head = Head()
        self._head_at = 0
        # The parts of a batch that another controller has begun to write or committed, and not completed.
        self._found_parts: list[list[_Record]] = []
        self._usage = _Usage(max_mib * 1024 * 1024)
        # Values that were decoded before the start; empty after `load`.
        self._ahead = ahead
        self._look = Wakeup()

    def leads(self) -> bool:
        # The same controller may lead again later, with another engine.
        return self._leadership.leads() and self._leadership.by == self.head.by

    # -- takeover

    async def load(self) -> EtcdContents:
        """Take over: write `head`, so that no other controller can write, and read everything as it was then."""
        try:
            return await self._load()
        except EtcdRequestError as error:
            raise StorageUnavailableError(str(error)) from error

    async def _load(self) -> EtcdContents:
        found = await self._client.get(self._head_key)
        old = Head() if found is None else decode_head(found)
        if found is None:
            await self._check_unused()
        # The version stays that of the stored state until the state was understood.
        self.head = replace(old, epoch=old.epoch + 1, by=self._leadership.by, write=0)
        self._head_at = found.mod_revision if found is not None else 0
        await self._write_head([was_written_at(self._leadership.key, self._leadership.revision)], [])
        contents = EtcdContents(old.revision, old.written, prefix=self._prefix, ahead=self._ahead)
        self._ahead = {}
        self._found_parts = await read_objects(self._client, contents, self.head, self._head_at)
        return contents

    async def _check_unused(self) -> None:
        """Raise DamagedKeyError if there are keys without a `head`."""
        for each in await self._client.scan(f"{self._prefix}/", keys_only=True):
            if each.key != self._leadership.key:
                where, what = f"etcd prefix {self._prefix}", f"it holds the key {each.key} and no head of a state"
                raise DamagedKeyError(where, what, "choose another --etcd-prefix, or restore all keys from a backup")

    async def begin(self, tables: Tables, now: datetime.datetime) -> None:
        if self._found_parts:
            await self._carry_out(self._found_parts)
            self._found_parts = []
        await self._look_at_size()

    # -- writing

    async def append(self, batch: Batch) -> None:
        before, parts = self.head, _cut(batch)
        time = before.time if batch.time is None else format_time(batch.time)
        decided = replace(before, revision=batch.revision, time=time, version=STATE_VERSION)
        try:
            if len(parts) == 1:
                await self._write(decided, self._operations(parts[0]))
            else:
                for number, records in enumerate(parts):
                    await self._write(before, [put(_part_key(self._prefix, number), _encode_part(records))])
                await self._write(replace(decided, parts=len(parts)), [])
        except NotWrittenError:
            self.head = replace(before, write=self.head.write)
            raise
        if self.head.parts:
            await self._carry_out(parts)
        self._usage.add(sum(len(json or b"") for json in batch.records.values()))
        if self._usage.look_is_due(trio.current_time(), _LOOK_SECONDS):
            self._look.set()

    async def _carry_out(self, parts: list[list[_Record]]) -> None:
        """Write the objects of a committed batch, and delete its parts. Raises LeadershipLostError."""
        try:
            for records in parts:
                await self._write(self.head, self._operations(records))
            await self._write(replace(self.head, parts=0), [delete_prefix(_part_key(self._prefix))])
        except NotWrittenError as error:
            raise self._leadership.lose(f"a part of a transaction was not written: {error}") from error

    def _operations(self, records: Sequence[_Record]) -> list[TxnOperation]:
        keys = ((f"{self._prefix}/{kind}/{name}", json) for (kind, name), json in records)
        return [delete(key) if json is None else put(key, json) for key, json in keys]

    async def _write(self, head: Head, operations: list[TxnOperation]) -> None:
        """Write `head` with operations, all or nothing. Raises NotWrittenError; LeadershipLostError."""
        self.head = replace(head, write=self.head.write + 1)
        await self._write_head([], operations)

    async def _write_head(self, comparisons: list[dict[str, Any]], operations: list[TxnOperation]) -> None:
        """Write `self.head` with operations, all or nothing, unless another controller has written it since.

        Raises NotWrittenError; LeadershipLostError.
        """
        value = self.head.to_json()
        comparisons = [was_written_at(self._head_key, self._head_at), *comparisons]
        try:
            done = await self._leadership.transact(
                comparisons, [put(self._head_key, value), *operations], [get(self._head_key)]
            )
        except NotWrittenError as error:
            if error.no_space:
                self._follow_size(str(error), is_blocked=True)
                # While etcd is full, its size is checked more often.
                self._look.set()
            raise
        found = done["found"][0] if done["found"] else []
        if done["succeeded"]:
            self._head_at = done["revision"]
        elif found and found[0].value == value:
            # An earlier try has succeeded, although its answer was lost.
            self._head_at = found[0].mod_revision
        else:
            raise self._leadership.lose("another controller leads")

    # -- upkeep

    async def run(self) -> None:
        while True:
            pause = _LOOK_FULL_SECONDS if self.full else _LOOK_SECONDS
            with trio.move_on_after(pause):
                await self._look.wait()
            try:
                if self._usage.compaction_is_due(trio.current_time()):
                    await self._compact()
                if self._usage.look_is_due(trio.current_time(), pause):
                    await self._look_at_size()
            except EtcdRequestError as error:
                _logger.warning("upkeep of etcd postponed: %s", error)
                await trio.sleep(_RETRY_SECONDS)

    async def _compact(self) -> None:
        self._usage.compacted_at, self._usage.uncompacted = trio.current_time(), 0
        revision = self._head_at - _KEPT_REVISIONS
        if revision > 0:
            try:
                await self._client.call("/v3/kv/compaction", {"revision": str(revision)})
            except EtcdRefusedError as error:
                # Another program has compacted more, or the user may not compact.
                _logger.info("etcd was not compacted: %s", error)

    async def _look_at_size(self) -> None:
        self._usage.looked_at, self._usage.unseen = trio.current_time(), 0
        status = await self._client.call("/v3/maintenance/status", {})
        size = int(status.get("dbSize", 0))
        if any(_ALARM in error for error in status.get("errors", ())):
            self._follow_size(f"{self._client.url} has the alarm {_ALARM}; {QUOTA_REMEDY}", is_blocked=True)
            return
        why = f"etcd holds {size // 2**20} MiB, at most {self._usage.most // 2**20} are allowed by --etcd-max-mib"
        self._follow_size(f"{why}; delete VMs, then compact and defragment etcd" if size > self._usage.most else "")

    def _follow_size(self, why: str, *, is_blocked: bool = False) -> None:
        self.takes_deletions = not is_blocked
        if why and not self.full:
            _logger.error("etcd full, refusing additions: %s", why)
        elif self.full and not why:
            _logger.info("etcd has space again")
        self.full = why

    def close(self) -> None:
        """Do nothing: the client is closed by its owner."""
