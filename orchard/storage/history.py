"""The history: how each deleted VM ended, in a bounded file that survives restarts (records.py).

The last MAX_ENDED VMs are kept, or fewer if these have more than MAX_BYTES together.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import trio

from orchard.base.files import HISTORY_FILE
from orchard.codec import MalformedError, dump_json, parse_time
from orchard.resources.json_text import dump_resource
from orchard.schema import EndedVM
from orchard.storage.journal import Disk
from orchard.storage.records import BatchedRecords, RecordFile, RunInThread, StoredRecords

MAX_ENDED = 10_000
# An entry has some 500 bytes. Metadata makes it longer, by 16 KiB at most.
MAX_BYTES = 32 * 1024 * 1024


def history_file(
    directory: Path, disk: Disk | None = None, in_thread: RunInThread = trio.to_thread.run_sync
) -> RecordFile:  # fmt: skip
    """Return the file of the history in a data directory."""
    return RecordFile(directory / HISTORY_FILE, "history", disk or Disk(), in_thread)


class History(BatchedRecords[EndedVM]):
    """The VMs that have ended, the earliest first."""

    def __init__(self, stored: StoredRecords) -> None:
        super().__init__(stored)
        # The time at which each VM ended, and its JSON.
        self._ended: deque[tuple[datetime.datetime, bytes]] = deque()
        self._bytes = 0
        self._prepared: list[bytes] = []

    def open(self) -> None:
        """Load the history. Raises DamagedError, OSError; BrokenError when it cannot be synced."""
        self.inspect()
        self.stored.make_durable()

    def inspect(self) -> int:
        """Read and check what is stored, and change nothing. Return how many VMs are in it. Raises DamagedError, OSError."""
        for place, record in self.stored.inspect():
            try:
                ended = parse_time(record["endedAt"], "endedAt")
            except (KeyError, TypeError, MalformedError):
                ended = None
            if ended is None:
                raise self.stored.damaged(place, "an entry has no endedAt")
            self._add(ended, dump_json(record))
        return len(self._ended)

    def select(self, since: datetime.datetime | None, limit: int | None) -> list[bytes]:
        """Return the JSON of the VMs that ended at or after `since`, the earliest first, and of these the first `limit`.

        Without `since`, return the last `limit`.
        """
        if since is None:
            kept = [text for _, text in self._ended]
            return kept if limit is None else kept[-limit:]
        return [text for ended, text in self._ended if ended >= since][:limit]

    def _add(self, ended: datetime.datetime, text: bytes) -> None:
        self._ended.append((ended, text))
        self._bytes += len(text)
        while len(self._ended) > MAX_ENDED or self._bytes > MAX_BYTES:
            self._bytes -= len(self._ended.popleft()[1])

    def _prepare(self, records: Sequence[EndedVM]) -> list[bytes]:
        self._prepared = [dump_resource(record) for record in records]
        return self._prepared

    def _keep(self, records: Sequence[EndedVM]) -> None:
        for record, text in zip(records, self._prepared, strict=True):
            self._add(record.ended_at, text)

    def _live_count(self) -> int:
        return len(self._ended)

    def live(self) -> list[bytes]:
        return [text for _, text in list(self._ended)]
