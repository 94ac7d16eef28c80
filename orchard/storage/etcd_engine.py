"""The etcd engine: the state of a cluster whose controllers stand by for each other.

Under the prefix, each object is a key KIND/NAME with the JSON that the state file has, too. `head` has the revision, the
wall time of the last write, and who wrote it. Every transaction compares etcd's revision of `head` with the last one that
this controller knows, and writes `head`. So once another controller has written `head`, nothing of an earlier one
succeeds any more, however late it comes: safety does not come from the lease (leadership.py).

A transaction whose answer was lost is sent again until it is answered or the lease is over. Each writes a `head` that no
other one writes, so if the comparison fails and `head` is what the transaction would have written, an earlier try has
succeeded. Anything else means that leadership is lost, and the engine has ended.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from orchard.codec import dump_json, format_time
from orchard.nursery import Wakeup
from orchard.storage.engine import Batch, BatchLimits, Contents, Key, Tables
from orchard.storage.errors import DamagedError, NotWrittenError, StorageUnavailableError
from orchard.storage.etcd import (
    EtcdClient,
    EtcdRefusedError,
    EtcdRequestError,
    EtcdUnavailableError,
    KeyValue,
    TxnOperation,
    delete,
    get,
    put,
    was_written_at,
)
from orchard.storage.leadership import Leadership
from orchard.storage.state_file import STATE_VERSION

DEFAULT_MAX_MIB = 1024
# etcd takes at most 128 operations and 1.5 MiB in a transaction. A record is one operation, and base64 adds a third.
_LIMITS = BatchLimits(100, 1_000_000)
_KINDS = ("account", "cluster", "promise", "settings", "vm", "worker")
# After a transaction whose outcome is unknown.
_RETRY_SECONDS = 0.1
# Between two compactions, which etcd does not do by itself, and between two looks at its size.
_COMPACT_SECONDS, _LOOK_SECONDS = 300.0, 60.0
# Revisions that a compaction keeps.
_KEPT_REVISIONS = 1_000
# A part of the most that etcd may hold: after so many written bytes it is looked at earlier, and compacted earlier.
_LOOK_SHARE, _COMPACT_SHARE = 1 / 32, 1 / 8

_logger = logging.getLogger("orchard.storage.engine")


class DamagedKeyError(DamagedError):
    """A key of etcd does not hold what a controller has written."""

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        Exception.__init__(self, f"{where}: {what}; {remedy or 'restore the keys from a backup'}")


@dataclass(slots=True)
class EtcdContents(Contents):
    """The contents of etcd. The place of an object is its key."""

    prefix: str = ""

    def not_understood(self, place: Any, error: Exception) -> DamagedError:
        return DamagedKeyError(f"etcd key {place}", f"the value is not understood ({error})")

    def contradicts_itself(self, problems: Iterable[str]) -> DamagedError:
        return DamagedKeyError(f"etcd prefix {self.prefix}", f"the state contradicts itself: {'; '.join(problems)}")


async def read_objects(client: EtcdClient, contents: EtcdContents, revision: int) -> None:
    """Read all objects as they were at a revision of etcd. Raises DamagedKeyError, EtcdRequestError."""
    for kind in _KINDS:
        begin = f"{contents.prefix}/{kind}/"
        for each in await client.scan(begin, revision):
            try:
                contents.objects[kind, each.key.removeprefix(begin)] = (each.key, json.loads(each.value))
            except ValueError as error:
                raise contents.not_understood(each.key, error) from error


@dataclass(frozen=True, slots=True)
class Head:
    """The value of `head`. `write` counts the writes of one controller, so that no two of them are equal."""

    revision: int = 0
    epoch: int = 0
    by: str = ""
    write: int = 0
    time: str = ""

    def to_json(self) -> bytes:
        fields = {"revision": self.revision, "epoch": self.epoch, "by": self.by, "write": self.write, "time": self.time}
        return dump_json({"format": "orchard-state", "version": STATE_VERSION, **fields})


def decode_head(found: KeyValue) -> Head:
    """Return a `head` that was read. Raises DamagedKeyError."""
    try:
        read = json.loads(found.value)
        form, version = read["format"], int(read["version"])
        head = Head(int(read["revision"]), int(read["epoch"]), read["by"], int(read["write"]), read["time"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedKeyError(
            f"etcd key {found.key}", f"it is not that of a controller ({error!r})", "choose another --etcd-prefix"
        ) from error
    if form != "orchard-state" or version > STATE_VERSION:
        what = f"version {version} is newer than the version {STATE_VERSION} that this program knows"
        raise DamagedKeyError(f"etcd key {found.key}", what, "start the Orchard that wrote it, or a newer one")
    return head


@dataclass(slots=True)
class _Usage:
    """How much etcd holds at most, in bytes, and what was written since it was looked at and since it was compacted."""

    most: int
    unseen: int = 0
    uncompacted: int = 0
    looked_at: float = field(default_factory=trio.current_time)
    compacted_at: float = field(default_factory=trio.current_time)

    def add(self, size: int) -> None:
        self.unseen += size
        self.uncompacted += size

    def look_is_due(self, now: float) -> bool:
        return now >= self.looked_at + _LOOK_SECONDS or self.unseen > _LOOK_SHARE * self.most

    def compaction_is_due(self, now: float) -> bool:
        return now >= self.compacted_at + _COMPACT_SECONDS or self.uncompacted > _COMPACT_SHARE * self.most


_Record = tuple[Key, bytes | None]


def _cut(batch: Batch) -> list[list[_Record]]:
    """Return the records of a batch in parts that etcd takes at once: one, unless a single transaction is larger.

    Such a transaction changes many objects that do not depend on each other, for example when the clock was set. A
    controller that is killed between two parts leaves the rest undone.
    """
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

    def __init__(self, client: EtcdClient, prefix: str, leadership: Leadership, max_mib: int = DEFAULT_MAX_MIB) -> None:
        # Why nothing should be added at present; empty when there is space.
        self.full = ""
        self._client = client
        self._prefix = prefix
        self._leadership = leadership
        # The last `head` of this controller, and etcd's revision of it.
        self.head = Head()
        self._head_at = 0
        self._usage = _Usage(max_mib * 1024 * 1024)
        self._look = Wakeup()

    @property
    def _head_key(self) -> str:
        return f"{self._prefix}/head"

    def leads(self) -> bool:
        return self._leadership.leads()

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
        self.head = Head(old.revision, old.epoch + 1, self._leadership.by, 0, old.time)
        self._head_at = found.mod_revision if found is not None else 0
        await self._write_head([was_written_at(self._leadership.key, self._leadership.revision)], [])
        contents = EtcdContents(old.revision, _read_time(old.time), prefix=self._prefix)
        await read_objects(self._client, contents, self._head_at)
        return contents

    async def _check_unused(self) -> None:
        """Raise DamagedKeyError if there are keys without a `head`."""
        for each in await self._client.scan(f"{self._prefix}/", keys_only=True):
            if each.key != self._leadership.key:
                where, what = f"etcd prefix {self._prefix}", f"it holds the key {each.key} and no head of a state"
                raise DamagedKeyError(where, what, "choose another --etcd-prefix, or restore all keys from a backup")

    async def begin(self, tables: Tables, now: datetime.datetime) -> None:
        await self._look_at_size()

    # -- writing

    async def append(self, batch: Batch) -> None:
        before, is_partly_written = self.head, False
        time = before.time if batch.time is None else format_time(batch.time)
        for records in _cut(batch):
            self.head = replace(self.head, revision=batch.revision, write=self.head.write + 1, time=time)
            operations = [self._operation(kind, name, json) for (kind, name), json in records]
            try:
                await self._write_head([], operations)
            except NotWrittenError as error:
                if is_partly_written:
                    raise self._leadership.lose(f"a part of a transaction was written: {error}") from error
                self.head = replace(self.head, revision=before.revision, time=before.time)
                raise
            is_partly_written = True
            self._usage.add(sum(len(json or b"") for _, json in records))
        if self._usage.look_is_due(trio.current_time()):
            self._look.set()

    def _operation(self, kind: str, name: str, json: bytes | None) -> TxnOperation:
        key = f"{self._prefix}/{kind}/{name}"
        return delete(key) if json is None else put(key, json)

    async def _write_head(self, comparisons: list[dict[str, Any]], operations: list[TxnOperation]) -> None:
        """Write `self.head` with operations, all or nothing, unless another one has written it since.

        Raises NotWrittenError; LeadershipLostError.
        """
        value = self.head.to_json()
        comparisons = [was_written_at(self._head_key, self._head_at), *comparisons]
        problem = ""
        while self._leadership.leads():
            # Shielded: what was written must not be taken for undone.
            with trio.move_on_after(self._leadership.patience(), shield=True):
                try:
                    done = await self._client.transact(
                        comparisons, [put(self._head_key, value), *operations], [get(self._head_key)]
                    )
                except EtcdUnavailableError as error:
                    problem = str(error)
                    await trio.sleep(_RETRY_SECONDS)
                except EtcdRefusedError as error:
                    self._refuse(error, is_certain=not problem)
                else:
                    found = done["found"][0] if done["found"] else []
                    if done["succeeded"]:
                        self._head_at = done["revision"]
                    elif found and found[0].value == value:
                        self._head_at = found[0].mod_revision
                    else:
                        raise self._leadership.lose("another controller leads")
                    return
        raise self._leadership.lose(f"the lease is over; {problem or 'etcd did not answer in time'}")

    def _refuse(self, error: EtcdRefusedError, *, is_certain: bool) -> None:
        """Raise what follows from a refusal. It is not certain after an earlier try with an unknown outcome."""
        if not is_certain:
            raise self._leadership.lose(f"it is not known what etcd holds: {error}") from error
        if error.no_space:
            self._follow_size(str(error))
        raise NotWrittenError(str(error), no_space=error.no_space) from error

    # -- upkeep

    async def run(self) -> None:
        while True:
            with trio.move_on_after(_LOOK_SECONDS):
                await self._look.wait()
            try:
                if self._usage.compaction_is_due(trio.current_time()):
                    await self._compact()
                if self._usage.look_is_due(trio.current_time()):
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
        why = f"etcd holds {size // 2**20} MiB, at most {self._usage.most // 2**20} are allowed by --etcd-max-mib"
        self._follow_size(f"{why}; delete VMs, then compact and defragment etcd" if size > self._usage.most else "")

    def _follow_size(self, why: str) -> None:
        if why and not self.full:
            _logger.error("etcd full, refusing what adds something: %s", why)
        elif self.full and not why:
            _logger.info("etcd has space again")
        self.full = why

    def close(self) -> None:
        """Do nothing: the client is closed by its owner."""


def _read_time(text: str) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None
