"""Data in etcd beside the state: events and records of VMs, and the secrets that controllers share.

`events/UID/FIRST-COUNT-BYTES` has the events that were appended at once, a line each: their numbers and their size are
in the key, so a start reads no events. Records (records.py) are `KIND/GENERATION-NUMBER`, each with the records of one
append. `KIND/current` names the valid generation. A new generation has the live records of the one before.

All writes compare the key `leader`, and may be repeated (Leadership.write).
"""

from __future__ import annotations

import base64
import logging
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orchard.base.files import write_private
from orchard.codec import ValidationError, decode, dump_json, load_json
from orchard.resources.json_text import dump_resource
from orchard.schema import Event
from orchard.storage import event_file
from orchard.storage.errors import BrokenError, DamagedError, NotWrittenError, StorageUnavailableError
from orchard.storage.etcd import (
    MAX_OPERATIONS,
    MAX_TRANSACTION_BYTES,
    EtcdClient,
    EtcdRequestError,
    KeyValue,
    TxnOperation,
    delete_prefix,
    delete_range,
    encoded,
    get,
    put,
    was_written_at,
)
from orchard.storage.etcd_engine import DamagedKeyError
from orchard.storage.event_pages import EventsDeletedError, StoredEvents
from orchard.storage.event_storage import NOT_STORED, EventLimitError, EventWriteResult
from orchard.storage.leadership import Leadership

DEFAULT_EVENTS_KIB = 1024
# Overhead charged per key, so that a VM with many small appends has a bounded number of keys.
_KEY_BYTES = 256
# Outdated records, beside as many as are live, before a new generation.
_SLACK = 2_500

_logger = logging.getLogger("orchard.storage")


# ---- events ----------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Events that were appended at once: the number of the first one, how many, and their bytes."""

    first: int
    length: int
    size: int

    def key(self, prefix: str) -> str:
        return f"{prefix}{self.first:010}-{self.length:06}-{self.size:08}"

    @classmethod
    def of_key(cls, found: KeyValue, count: int | None) -> _Chunk:
        """Return the chunk that a key names, whose events follow `count` others, or any. Raises DamagedKeyError."""
        try:
            chunk = cls(*map(int, found.key.rpartition("/")[2].split("-")))
        except (TypeError, ValueError):
            raise DamagedKeyError(f"etcd key {found.key}", "it is not the name of events") from None
        if count is not None and chunk.first != count:
            raise DamagedKeyError(f"etcd key {found.key}", f"event {chunk.first} follows event {count - 1}")
        return chunk


def read_events(found: KeyValue, count: int) -> list[Event]:
    """Return the events of a key, which follow `count` others of their VM. Raises DamagedKeyError."""
    chunk = _Chunk.of_key(found, count)
    texts = found.value.split(b"\n")[:-1]
    try:
        events = [decode(Event, load_json(text)) for text in texts]
    except (ValueError, TypeError, ValidationError) as error:
        raise DamagedKeyError(f"etcd key {found.key}", f"the events are not understood ({error})") from error
    if (len(texts), len(found.value)) != (chunk.length, chunk.size):
        what = f"it has {len(texts)} events of {len(found.value)} bytes, which its name contradicts"
        raise DamagedKeyError(f"etcd key {found.key}", what)
    return events


class _VMEvents:
    """The events of one VM (see StoredEvents). `prefix` is that of its keys."""

    is_durable = True

    def __init__(self, client: EtcdClient, uid: str, prefix: str) -> None:
        self.prefix = prefix
        self._client = client
        self._uid = uid
        self._chunks: list[_Chunk] = []
        self._firsts: list[int] = []
        # Bytes of the events and their keys, for the limit of a VM.
        self.cost = 0

    @property
    def count(self) -> int:
        return self._chunks[-1].first + self._chunks[-1].length if self._chunks else 0

    def add(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        self._firsts.append(chunk.first)
        self.cost += chunk.size + _KEY_BYTES

    def blocks(self, start: int, stop: int) -> list[range]:
        blocks: list[range] = []
        size = 0
        for chunk in self._between(start, stop):
            part = range(max(start, chunk.first), min(stop, chunk.first + chunk.length))
            if blocks and size + chunk.size <= event_file.BLOCK_BYTES:
                blocks[-1] = range(blocks[-1].start, part.stop)
                size += chunk.size
            else:
                blocks.append(part)
                size = chunk.size
        return blocks

    def size_of(self, block: range) -> int:
        return sum(chunk.size for chunk in self._between(block.start, block.stop))

    def _between(self, start: int, stop: int) -> list[_Chunk]:
        """Return the chunks with the events number `start` to `stop` - 1."""
        return self._chunks[max(0, bisect_right(self._firsts, start) - 1) : bisect_right(self._firsts, stop - 1)]

    async def read(self, block: range) -> list[bytes]:
        chunks = self._between(block.start, block.stop)
        begin, end = chunks[0].key(self.prefix).encode(), chunks[-1].key(self.prefix).encode() + b"\0"
        try:
            found = await self._client.read_range(begin, end)
        except EtcdRequestError as error:
            raise StorageUnavailableError(str(error)) from error
        if len(found) < len(chunks):
            raise EventsDeletedError(self._uid)
        texts = b"".join(each.value for each in found).split(b"\n")[:-1]
        first = block.start - chunks[0].first
        return texts[first : first + len(block)]

    async def read_part(self, number: int, at: int) -> bytes:
        text = (await self.read(range(number, number + 1)))[0]
        return text[at : at + event_file.BLOCK_BYTES]


class EtcdEventStorage:
    """The events of VMs in etcd (see EventStorage). `load` comes before `open`."""

    def __init__(self, client: EtcdClient, prefix: str, leadership: Leadership, max_kib: int) -> None:
        self._client = client
        self._prefix = f"{prefix}/events/"
        self._leadership = leadership
        self._limit = 1024 * max_kib
        self._vms: dict[str, _VMEvents] = {}
        # The keys of all events, until `open`.
        self._keys: list[KeyValue] = []
        # VMs that were deleted, and whose events are still stored.
        self._left: list[str] = []

    async def load(self) -> None:
        """Read the keys of all events. Raises EtcdRequestError."""
        self._keys = await self._client.scan(self._prefix, keys_only=True)

    def _of(self, uid: str) -> _VMEvents:
        if uid not in self._vms:
            self._vms[uid] = _VMEvents(self._client, uid, f"{self._prefix}{uid}/")
        return self._vms[uid]

    def open(self, uids: Container[str]) -> None:
        left: dict[str, None] = {}
        for each in self._keys:
            uid = each.key.removeprefix(self._prefix).partition("/")[0]
            if uid in uids:
                events = self._of(uid)
                events.add(_Chunk.of_key(each, events.count))
            else:
                # An append that was sent twice may arrive once more after the events before it were dropped.
                _Chunk.of_key(each, None)
                left[uid] = None
        self._keys, self._left = [], list(left)

    def get(self, uid: str) -> StoredEvents | None:
        return self._vms.get(uid)

    def forget(self, uid: str) -> StoredEvents | None:
        return self._vms.pop(uid, None)

    async def write(self, appends: Mapping[str, Sequence[Event]], dropped: Sequence[str]) -> EventWriteResult:
        result = EventWriteResult()
        try:
            for uid, events in appends.items():
                await self._append(uid, events, result)
            self._left += dropped
            await self._drop()
        except BrokenError as error:
            result.broken = error
            for uid in appends:
                result.errors.setdefault(uid, StorageUnavailableError(error.consequence))
        return result

    async def _append(self, uid: str, events: Sequence[Event], result: EventWriteResult) -> None:
        """Append events of one VM, in one transaction. Raises BrokenError."""
        stored = self._of(uid)
        chunks, operations = [], []
        for first, texts in _chunked([dump_resource(event) for event in events], stored.count):
            value = b"".join(text + b"\n" for text in texts)
            chunk = _Chunk(first, len(texts), len(value))
            chunks.append(chunk)
            operations.append(put(chunk.key(stored.prefix), value))
        if stored.cost + sum(chunk.size + _KEY_BYTES for chunk in chunks) > self._limit:
            result.errors[uid] = EventLimitError(self._limit)
            return
        try:
            # All chunks at once: they have the limit of a VM together, and two in a row more than BLOCK_BYTES.
            await self._leadership.write(operations)
        except NotWrittenError as error:
            _logger.error("events were not stored: %s", error)
            result.errors[uid] = error.as_storage_error(NOT_STORED)
        else:
            for chunk in chunks:
                stored.add(chunk)

    async def _drop(self) -> None:
        while self._left:
            some = self._left[:MAX_OPERATIONS]
            try:
                await self._leadership.write([delete_prefix(f"{self._prefix}{uid}/") for uid in some])
            except NotWrittenError as error:
                _logger.warning("cannot drop events: %s; the next write will", error)
                return
            del self._left[:MAX_OPERATIONS]


def _chunked(texts: Sequence[bytes], first: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield chunks of events, each with the number of its first: up to 64 KiB, or one event that is longer."""
    chunk: list[bytes] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) + 1 > event_file.BLOCK_BYTES:
            yield first, chunk
            first += len(chunk)
            chunk, size = [], 0
        chunk.append(text)
        size += len(text) + 1
    if chunk:
        yield first, chunk


# ---- records ---------------------------------------------------------------------------------------------------------


class EtcdRecords:
    """Records of one kind in etcd (see StoredRecords). `load` comes before `inspect`."""

    def __init__(self, client: EtcdClient, prefix: str, leadership: Leadership, kind: str) -> None:
        self._client = client
        self._prefix = f"{prefix}/{kind}/"
        self._leadership = leadership
        # Records that are stored, outdated ones included.
        self.count = 0
        # The valid generation, etcd's revision of the key that names it, and the last generation that was begun.
        self._generation = 0
        self._current_at = 0
        self._begun = 0
        # The number of the next key.
        self._next = 0
        self._loaded: list[tuple[str, list[dict[str, Any]]]] = []

    async def load(self, revision: int = 0) -> None:
        """Read all records, at a revision of etcd or at the present one. Raises EtcdRequestError, DamagedKeyError."""
        current = f"{self._prefix}current"
        for each in await self._client.scan(self._prefix, revision):
            try:
                if each.key == current:
                    self._generation, self._current_at = int(each.value), each.mod_revision
                    continue
                generation, number = map(int, each.key.removeprefix(self._prefix).split("-"))
                records = [dict(record) for record in load_json(each.value)]
            except (TypeError, ValueError) as error:
                raise DamagedKeyError(f"etcd key {each.key}", f"the records are not understood ({error})") from error
            self._loaded.append((each.key, records))
            self._begun, self._next = max(self._begun, generation), max(self._next, number + 1)
        self._begun = max(self._begun, self._generation)
        begin = self._key_of_generation(self._generation)
        # Records of another generation are outdated, or were not completed.
        self._loaded = [(key, records) for key, records in self._loaded if key.startswith(begin)]

    def _key_of_generation(self, generation: int) -> str:
        return f"{self._prefix}{generation:08}-"

    def inspect(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.count = 0
        for key, records in self._loaded:
            for record in records:
                self.count += 1
                yield key, record

    def damaged(self, place: str, what: str) -> DamagedError:
        return DamagedKeyError(f"etcd key {place}", what)

    def make_durable(self) -> None:
        """Release what was loaded. It is durable, because etcd's majority has it."""
        self._loaded = []

    async def append(self, records: Sequence[bytes], live_count: int, live: Callable[[], list[bytes]]) -> None:
        is_outdated = self.count + len(records) > 2 * live_count + _SLACK
        # Several keys are not written at once. As a new generation, they become valid together.
        if is_outdated or sum(map(len, records)) > MAX_TRANSACTION_BYTES:
            await self._replace([*live(), *records])
        else:
            await self._leadership.write([self._put(self._generation, records)])
            self.count += len(records)

    async def _replace(self, records: Sequence[bytes]) -> None:
        """Write a new generation, and delete those before when it is complete."""
        # Never reuse a generation that was begun: a write whose outcome was unknown may be carried out much later.
        self._begun += 1
        some: list[bytes] = []
        size = 0
        for record in records:
            if some and size + len(record) > MAX_TRANSACTION_BYTES // 2:
                await self._leadership.write([self._put(self._begun, some)])
                some, size = [], 0
            some.append(record)
            size += len(record) + 1
        await self._leadership.write([self._put(self._begun, some)])
        current = f"{self._prefix}current"
        outdated = delete_range(self._key_of_generation(0), self._key_of_generation(self._begun))
        self._current_at = await self._leadership.write_once(
            current, self._current_at, [put(current, b"%d" % self._begun), outdated]
        )
        self._generation, self.count = self._begun, len(records)

    def _put(self, generation: int, records: Sequence[bytes]) -> TxnOperation:
        key = f"{self._key_of_generation(generation)}{self._next:012}"
        self._next += 1
        return put(key, b"[%b]" % b",".join(records))


# ---- secrets ---------------------------------------------------------------------------------------------------------


async def share_files(client: EtcdClient, prefix: str, name: str, files: Sequence[Path]) -> None:
    """Make private files the same on all controllers: the first one's are stored, and the others take these over.

    The files exist. Raises EtcdRequestError, DamagedKeyError, OSError.
    """
    key = f"{prefix}/secret/{name}"
    mine = encode_secret({file.name: file.read_bytes() for file in files})
    result = await client.transact([was_written_at(key, 0)], [put(key, mine)], [get(key)])
    if result["succeeded"]:
        return
    shared = decode_secret(result["found"][0][0], [file.name for file in files])
    for file in files:
        if file.read_bytes() != shared[file.name]:
            write_private(file, shared[file.name])
            _logger.info("took over %s from the other controllers", file)


def encode_secret(files: Mapping[str, bytes]) -> bytes:
    """Return the value of the key of a secret; `files` are contents by name."""
    return dump_json({name: encoded(content) for name, content in files.items()})


def decode_secret(found: KeyValue, names: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of the files of a secret, by name. Raises DamagedKeyError."""
    try:
        values = load_json(found.value)
        return {name: base64.b64decode(values[name], validate=True) for name in names}
    except (ValueError, KeyError, TypeError) as error:
        what = f"it does not hold the files of the secret ({error!r})"
        raise DamagedKeyError(f"etcd key {found.key}", what) from error
