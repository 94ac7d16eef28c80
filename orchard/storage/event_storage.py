"""The interface to the durable events of VMs, and its implementation by an append-only file for each VM (event_file.py).

`events/UID.jsonl` is created by a VM's first event, and unlinked some time after the VM was deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchard.base.files import LIFECYCLE_FILE
from orchard.schema import Event
from orchard.storage.errors import BrokenError, NotWrittenError, StorageError, StorageUnavailableError
from orchard.storage.event_file import EventFile
from orchard.storage.event_pages import EventsDeletedError, StoredEvents
from orchard.storage.journal import Disk
from orchard.storage.records import RunInThread

# Bytes of events of one VM: a script that logs without end must not fill the disk.
MAX_EVENT_BYTES = 64 * 1024 * 1024
NOT_STORED = "the events were not stored"

_logger = logging.getLogger("orchard.storage")


class EventLimitError(StorageError):
    """A VM has as many bytes of events as may be stored."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the VM's events have reached {limit} bytes; no more are stored")


@dataclass(slots=True)
class EventWriteResult:
    """Which appends of one write failed, by uid, and why nothing can be written any more."""

    errors: dict[str, StorageError] = field(default_factory=dict)
    broken: BrokenError | None = None


class EventStorage(Protocol):
    """The durable events of VMs, by uid. `open` comes first; `write` is called once at a time."""

    def open(self, uids: Container[str]) -> None:
        """Load the events of the VMs with these uids, and drop those of others. Raises DamagedError, OSError."""

    def get(self, uid: str) -> StoredEvents | None:
        """Return a VM's events, if there are any."""

    def forget(self, uid: str) -> StoredEvents | None:
        """Forget a VM's events in memory, and return them."""

    async def write(self, appends: Mapping[str, Sequence[Event]], dropped: Sequence[str]) -> EventWriteResult:
        """Append events to those of each VM, all of a VM or none, and drop those of other VMs.

        An append of no events makes durable what the VM has.
        """


class _EventsInFile(EventFile):
    """The events in one file, read in threads (see StoredEvents)."""

    def __init__(self, directory: Path, uid: str, disk: Disk, in_thread: RunInThread) -> None:
        super().__init__(directory, uid, disk)
        self._in_thread = in_thread

    async def read(self, block: range) -> list[bytes]:
        texts: list[bytes] = await self._call(self.read_block, block)
        return texts

    async def read_part(self, number: int, at: int) -> bytes:
        part: bytes = await self._call(self.read_part_of, number, at)
        return part

    async def _call(self, read: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await self._in_thread(read, *arguments)
        except FileNotFoundError:
            raise EventsDeletedError(self.uid) from None


class FileEventStorage:
    """The events in files of a directory (see EventStorage). Disk I/O is done by `in_thread`, except that of `open`."""

    def __init__(self, directory: Path, disk: Disk, in_thread: RunInThread) -> None:
        self._directory = directory
        self._disk = disk
        self._in_thread = in_thread
        self._vms: dict[str, _EventsInFile] = {}

    def open(self, uids: Container[str]) -> None:
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700)
            # The umask may have taken bits from the mode.
            self._directory.chmod(0o700)
            self._disk.sync_directory(self._directory.parent)
        else:
            # The last process may have been killed before it synced the directory.
            self._disk.sync_directory(self._directory)
        for path in sorted(self._directory.iterdir()):
            uid = path.name.removesuffix(".jsonl")
            if path.name == LIFECYCLE_FILE:
                continue
            if uid == path.name or uid not in uids:
                # Loading a file has removed its draft already.
                path.unlink(missing_ok=True)
                continue
            self._vms[uid] = self._file(uid)
            self._vms[uid].load()

    def _file(self, uid: str) -> _EventsInFile:
        return _EventsInFile(self._directory, uid, self._disk, self._in_thread)

    def get(self, uid: str) -> StoredEvents | None:
        return self._vms.get(uid)

    def forget(self, uid: str) -> StoredEvents | None:
        return self._vms.pop(uid, None)

    async def write(self, appends: Mapping[str, Sequence[Event]], dropped: Sequence[str]) -> EventWriteResult:
        for uid in appends.keys() - self._vms.keys():
            self._vms[uid] = self._file(uid)
        result: EventWriteResult = await self._in_thread(self._write, appends, dropped)
        return result

    def _write(self, appends: Mapping[str, Sequence[Event]], dropped: Sequence[str]) -> EventWriteResult:
        result = EventWriteResult()
        for uid, events in appends.items():
            file = self._vms[uid]
            try:
                if events and file.journal.size > MAX_EVENT_BYTES:
                    result.errors[uid] = EventLimitError(MAX_EVENT_BYTES)
                else:
                    file.append(events)
            except NotWrittenError as error:
                _logger.error("events were not stored: %s", error)
                result.errors[uid] = error.as_storage_error(NOT_STORED)
            except BrokenError as error:
                result.broken = error
                result.errors[uid] = StorageUnavailableError(f"the events may not have been stored: {error}")
        for uid in dropped:
            path = self._directory / f"{uid}.jsonl"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("cannot unlink %s: %s; the next start will", path, error)
        return result
