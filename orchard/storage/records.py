"""Small records: the history of VMs that have ended (history.py), and lifecycle events (lifecycle.py).

All records are in memory as well, so the file is read only at a start. `RecordFile` appends to it, and when most of it
is outdated, replaces it by a file with the live records. Each line holds the records of one append, so a crash keeps or
loses them together.

`BatchedRecords` writes at most once in WRITE_DELAY, unless a reader asks for it, so that records do not slow down the
changes of the state by syncs. A kill loses the records that were not written yet, and repeats none.
Records are shown only when they are durable. Those that do not fit on a full disk wait for space.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import trio

from orchard.base.nursery import Wakeup
from orchard.codec import dump_json
from orchard.storage.errors import BrokenError, DamagedError, NotWrittenError
from orchard.storage.journal import BROKEN_DELAY, Disk, Journal

# Time from the first waiting record to the write, unless a reader asks for it earlier.
WRITE_DELAY = 1.0
# Pause after a write that failed.
_RETRY_SECONDS = 10.0
# So many waiting records are written without a delay: formatting more of them would block the event loop for long.
_MANY = 1_000
# Limit of records that wait while nothing can be written. Beyond it the oldest are lost.
MAX_UNWRITTEN = 10_000
# Outdated records of a file, beside as many as are live, before it is replaced.
_SLACK = 2_500
# Records of one line of a file that is replaced.
_LINE_RECORDS = 500
_VERSION = 1

RecordT = TypeVar("RecordT")
# Runs blocking work, as trio.to_thread.run_sync does.
RunInThread = Callable[..., Awaitable[Any]]

_logger = logging.getLogger("orchard.storage")


class StoredRecords(Protocol):
    """Durable records, each a JSON object."""

    def inspect(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield each record with its place, and change nothing. Raises DamagedError, OSError."""

    def damaged(self, place: Any, what: str) -> DamagedError:
        """Return the error for a wrong record at a place."""

    def make_durable(self) -> None:
        """Make durable what `inspect` has read to its end. Raises BrokenError, OSError."""

    async def append(self, records: Sequence[bytes], live_count: int, live: Callable[[], list[bytes]]) -> None:
        """Append records, all or none. `live` returns those earlier records that must be kept, `live_count` of them.

        Raises NotWrittenError, BrokenError.
        """


class RecordFile:
    """Records in a file of checked lines. Disk I/O of `append` is done by `in_thread`."""

    def __init__(self, path: Path, kind: str, disk: Disk, in_thread: RunInThread = trio.to_thread.run_sync) -> None:
        self.journal = Journal(path, disk)
        self._in_thread = in_thread
        # Records in the file, outdated ones included.
        self.count = 0
        self._kind = kind
        self._replace_at = 0

    def inspect(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read and check the file, and change nothing; yield each record with the offset of its line.

        A file that does not exist has no records. Raises DamagedError, OSError.
        """
        self.count = 0
        if not self.journal.path.exists():
            return
        for offset, line in self.journal.read_after(self._header()):
            records = line.get("records")
            if not isinstance(records, list):
                raise DamagedError(self.journal.path, offset, "the line has no records")
            for record in records:
                self.count += 1
                yield offset, record

    def make_durable(self) -> None:
        """Cut off what a crash left at the end of the file, and sync what `inspect` has read to its end.

        Raises BrokenError, OSError.
        """
        if self.count or self.journal.path.exists():
            self.journal.open_for_append()
            self.journal.sync()
            self.journal.close()

    def damaged(self, place: int, what: str) -> DamagedError:
        return DamagedError(self.journal.path, place, what)

    async def append(self, records: Sequence[bytes], live_count: int, live: Callable[[], list[bytes]]) -> None:
        # Shielded: a cancelled call would leave its thread writing.
        with trio.CancelScope(shield=True):
            await self._in_thread(self._write, records, live_count, live)

    def _write(self, records: Sequence[bytes], live_count: int, live: Callable[[], list[bytes]]) -> None:
        try:
            if not self.journal.size:
                self._replace(records)
            elif self.count + len(records) > max(self._replace_at, 2 * live_count + _SLACK):
                self._replace_or_append(records, live)
            else:
                self._append(records)
        finally:
            self.journal.close()

    def _replace_or_append(self, records: Sequence[bytes], live: Callable[[], list[bytes]]) -> None:
        try:
            self._replace([*live(), *records])
        except NotWrittenError as error:
            # There is no space for both files.
            _logger.warning("file of records not replaced: %s", error)
            self._replace_at = self.count + _SLACK
            self._append(records)

    def _append(self, records: Sequence[bytes]) -> None:
        self.journal.append([_line(records)])
        self.count += len(records)

    def _replace(self, records: Sequence[bytes]) -> None:
        starts = range(0, len(records), _LINE_RECORDS)
        lines = [_line(records[start : start + _LINE_RECORDS]) for start in starts]
        self.journal.create([dump_json(self._header()), *lines])
        self.count = len(records)

    def _header(self) -> dict[str, Any]:
        return {"format": f"orchard-{self._kind}", "version": _VERSION}


def _line(records: Sequence[bytes]) -> bytes:
    return b'{"records":[%b]}' % b",".join(records)


@dataclass(slots=True)
class _Batch(Generic[RecordT]):
    """Records that are written together, and an event that is set after the attempt."""

    records: deque[RecordT] = field(default_factory=lambda: deque(maxlen=MAX_UNWRITTEN))
    done: trio.Event = field(default_factory=trio.Event)


class BatchedRecords(Generic[RecordT]):
    """Records in memory and stored, written in batches. `run` must be running for `flush` to return.

    A subclass keeps the records in memory, and says how they are stored.
    """

    def __init__(self, stored: StoredRecords) -> None:
        self.stored = stored
        self._gathering: _Batch[RecordT] = _Batch()
        self._writing: _Batch[RecordT] | None = None
        self._wakeup = Wakeup()
        # Set when a reader waits.
        self._urgent = trio.Event()
        # Whether the last write failed.
        self._is_failing = False

    def add(self, record: RecordT) -> None:
        """Schedule a record to be written."""
        records = self._gathering.records
        records.append(record)
        if len(records) == _MANY:
            self._urgent.set()
        self._wakeup.set()

    async def flush(self) -> None:
        """Wait until the records added before are written. Return at once while nothing can be written."""
        batch = self._gathering if self._gathering.records else self._writing
        if batch is None or self._is_failing:
            await trio.lowlevel.checkpoint()
            return
        if batch is self._gathering:
            self._urgent.set()
        await batch.done.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is added until cancelled. Raises BrokenError when it is not known what the disk holds."""
        task_status.started()
        while True:
            if not self._gathering.records:
                await self._wakeup.wait()
            with trio.move_on_after(_RETRY_SECONDS if self._is_failing else WRITE_DELAY):
                await self._urgent.wait()
            self._urgent = trio.Event()
            await self._write()

    async def _write(self) -> None:
        """Write the waiting records, and keep those that cannot be written. Raises BrokenError."""
        batch = self._writing = self._gathering
        self._gathering = _Batch()
        records = self._wanted(batch.records)
        texts = self._prepare(records)
        try:
            if texts:
                await self.stored.append(texts, self._live_count(), self.live)
        except NotWrittenError as error:
            _logger.warning("records were not stored, retrying: %s", error)
            self._gathering.records = deque([*records, *self._gathering.records], MAX_UNWRITTEN)
            self._is_failing = True
        except BrokenError:
            self._is_failing = True
            batch.done.set()
            # Callers that waited get their answers before the process ends.
            with trio.CancelScope(shield=True):
                await trio.sleep(BROKEN_DELAY)
            raise
        else:
            self._is_failing = False
            self._keep(records)
        finally:
            self._writing = None
            batch.done.set()

    def _wanted(self, records: Iterable[RecordT]) -> list[RecordT]:
        """Return the records that are still to be stored."""
        return list(records)

    def _prepare(self, records: Sequence[RecordT]) -> list[bytes]:
        """Return the JSON of new records as it is stored."""
        raise NotImplementedError

    def _keep(self, records: Sequence[RecordT]) -> None:
        """Keep in memory the records that `_prepare` was last called with: they are durable now."""
        raise NotImplementedError

    def _live_count(self) -> int:
        """Return the number of records in memory."""
        raise NotImplementedError

    def live(self) -> list[bytes]:
        """Return the JSON of all records in memory as it is stored. Called in the thread."""
        raise NotImplementedError
