"""The file engine: the state file (state_file.py) of a single controller, in threads, and its upkeep on a full disk."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from orchard.base.nursery import Wakeup
from orchard.storage.engine import Batch, BatchLimits, Tables
from orchard.storage.journal import Disk
from orchard.storage.records import RunInThread
from orchard.storage.state_file import FileContents, StateFile

# Interval of attempts at upkeep while the disk is full. For so long, freed disk space may go unnoticed.
UPKEEP_SECONDS = 1.0

_logger = logging.getLogger("orchard.storage")


class FileEngine:
    """The durable copy of a cluster's state in `directory` (see Engine). Disk I/O is done by `in_thread`, except at the start.

    The directory belongs to this controller alone, so the engine always leads.
    """

    limits = BatchLimits(math.inf, math.inf)
    takes_deletions = True

    def __init__(
        self, directory: Path, disk: Disk | None = None, in_thread: RunInThread = trio.to_thread.run_sync
    ) -> None:
        self._file = StateFile(directory, disk or Disk())
        self._in_thread = in_thread
        # The state file is not thread-safe. A lock would cost each write another turn of the event loop.
        self._one_thread = trio.CapacityLimiter(1)
        # Why nothing should be added at present; empty when there is space.
        self.full = ""
        self._became_full = Wakeup()

    async def load(self) -> FileContents:
        return self._file.load()

    async def begin(self, tables: Tables, now: datetime.datetime) -> None:
        self._file.begin(tables, now)
        self._follow_full()

    async def append(self, batch: Batch) -> None:
        await self._call(self._file.append, batch)

    def leads(self) -> bool:
        return True

    async def run(self) -> None:
        while True:
            if self.full:
                await self._call(self._file.upkeep)
            else:
                await self._became_full.wait()
            await trio.sleep(UPKEEP_SECONDS)

    def close(self) -> None:
        self._file.close()

    async def _call(self, work: Callable[..., None], *arguments: Any) -> None:
        # Shielded: the write goes on in its thread, and must not be reported as undone.
        with trio.CancelScope(shield=True):
            try:
                await self._in_thread(work, *arguments, limiter=self._one_thread)
            finally:
                self._follow_full()

    def _follow_full(self) -> None:
        """Log when the disk has become full or has space again."""
        before, self.full = self.full, self._file.full
        if self.full and not before:
            _logger.error("disk full, refusing additions: %s", self.full)
            self._became_full.set()
        elif before and not self.full:
            _logger.info("disk has space again")
