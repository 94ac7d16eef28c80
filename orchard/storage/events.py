"""The events of each VM: an append-only file of checked lines beside the state. Law: disk; no other noun than Event.

`events/UID.jsonl` is made by a VM's first event and unlinked some time after the VM was deleted; a file whose VM is gone
at start-up is left over from a crash in between, and unlinked then. Appends are durable before `append` returns; what
several clients append to several VMs at the same time is written by one pass of the single writing task, `run`.

In memory each event costs the eight bytes of its offset, so that a page is one seek and one read wherever it begins.
A cursor names an event by its number, which never changes: paging neither skips nor repeats, whatever is appended
meanwhile.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trio

from orchard.codec import APIError, dump_json, encode, shown
from orchard.schema import Event
from orchard.storage.journal import LAST_WORDS, Broken, DamagedError, Disk, Journal, NotWritten

VERSION = 1  # of the files
MAX_BYTES = 64 * 1024 * 1024  # of events that one VM may leave: a script that logs without end must not fill the disk
_CURSOR = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})")

_logger = logging.getLogger("orchard.storage.events")


class EventFile:
    """One VM's events on disk, and where each begins. Its methods do disk I/O, for a thread."""

    def __init__(self, directory: Path, uid: str, disk: Disk) -> None:
        self.uid = uid
        self.journal = Journal(directory / f"{uid}.jsonl", disk)
        self.offsets = array("Q")
        self.durable = True  # False: what was read may be in the system's memory alone, and nobody may be told of it

    def load(self) -> None:
        """Read and check the file, and remove what a crash left at its end. Raises DamagedError."""
        self._take(self.journal.load())
        self.journal.close()
        self.durable = not self.offsets

    def inspect(self) -> None:
        """Do what `load` does, and change nothing. Raises DamagedError; FileNotFoundError."""
        self._take(self.journal.read())

    def _take(self, lines: Iterator[tuple[int, dict[str, Any]]]) -> None:
        header = True
        for offset, line in lines:
            if header:
                if (
                    line.get("format") != "orchard-events"
                    or line.get("version") != VERSION
                    or line.get("uid") != self.uid
                ):
                    what = f"this is no orchard-events file of version {VERSION} for uid {self.uid}"
                    raise DamagedError(self.journal.path, 0, what)
                header = False
            elif line.get("n") != len(self.offsets):
                what = f"event {line.get('n')} follows event {len(self.offsets) - 1}"
                raise DamagedError(self.journal.path, offset, what)
            else:
                self.offsets.append(offset)
        if header:
            raise DamagedError(self.journal.path, 0, "the file has no header")

    def append(self, events: Sequence[Event]) -> None:
        """Append events durably, or none of them; after that all is durable. Raises NotWritten, Broken."""
        try:
            self._append(events)
            self.durable = True
        finally:
            self.journal.close()  # thousands of VMs must not hold thousands of descriptors

    def _append(self, events: Sequence[Event]) -> None:
        first = len(self.offsets)
        lines = [b'{"n":%d,"event":%b}' % (first + i, dump_json(encode(event))) for i, event in enumerate(events)]
        if first == 0:
            header = dump_json({"format": "orchard-events", "version": VERSION, "uid": self.uid})
            self.journal.create([header, *lines])
            offset = line_length(header)
        else:
            offset = self.journal.size
            self.journal.append(lines)
        for line in lines:
            self.offsets.append(offset)
            offset += line_length(line)

    def read(self, start: int, stop: int, end: int) -> list[bytes]:
        """Give the JSON of events number `start` to `stop` - 1, of a file that is at least `end` bytes long."""
        if start >= stop:
            return []
        first = self.offsets[start]
        last = self.offsets[stop] if stop < len(self.offsets) else end
        with self.journal.path.open("rb") as file:
            file.seek(first)
            block = file.read(last - first)
        # The block may go on with what is being appended and not durable yet.
        return [line.split(b'"event":', 1)[1][:-1] for line in block.split(b"\n")[: stop - start]]


def line_length(text: bytes) -> int:
    """How many bytes of a journal the JSON object `text` takes, with its sum and its newline."""
    return len(text) + len('"sum":"0123456789abcdef",\n')


@dataclass(slots=True)
class Waiting:
    """Events of one VM that wait to be written together."""

    events: list[Event] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)
    error: APIError | None = None


class EventLog:
    """The events of all VMs, in `directory`. `run` must be running for `append` to return."""

    def __init__(
        self,
        directory: Path,
        disk: Disk | None = None,
        in_thread: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        """Does its disk I/O by `in_thread`, but for that of `open`."""
        self._directory = directory
        self._disk = disk or Disk()
        self._in_thread = in_thread
        self._files: dict[str, EventFile] = {}
        self._waiting: dict[str, Waiting] = {}
        self._dropped: list[str] = []
        self._wake = trio.Event()
        self._broken = ""  # why nothing can be appended any more

    def open(self, uids: Container[str]) -> None:
        """Load the events of the VMs with these uids, and unlink those of others. Does disk I/O; raises DamagedError."""
        if not self._directory.exists():
            self._directory.mkdir(mode=0o700)
            self._directory.chmod(0o700)  # whatever the umask
            self._disk.sync_directory(self._directory.parent)
        else:
            self._disk.sync_directory(self._directory)  # a killed process may not have come to that
        for path in sorted(self._directory.iterdir()):
            uid = path.name.removesuffix(".jsonl")
            if uid == path.name or uid not in uids:
                path.unlink(missing_ok=True)  # a draft is gone with its file's loading
                continue
            file = EventFile(self._directory, uid, self._disk)
            file.load()
            self._files[uid] = file

    async def append(self, uid: str, events: Sequence[Event]) -> None:
        """Append events to a VM's, in order, and return when they are durable. Raises APIError 404, 412, 503 or 507."""
        if events:
            await self._written(uid, events)

    async def _written(self, uid: str, events: Sequence[Event]) -> None:
        if self._broken:
            raise APIError(503, self._broken)
        waiting = self._waiting.setdefault(uid, Waiting())
        waiting.events.extend(events)
        self._wake.set()
        await waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error

    def drop(self, uid: str) -> None:
        """Forget a VM's events, and have their file unlinked."""
        waiting = self._waiting.pop(uid, None)
        if waiting is not None:
            waiting.error = _deleted(uid)
            waiting.done.set()
        self._dropped.append(uid)
        self._wake.set()

    async def page(
        self, uid: str, limit: int | None, order: Literal["asc", "desc"], cursor: str | None
    ) -> tuple[bytes, str | None]:
        """Give (a JSON array of events, the cursor of the next page or None when this is the last).

        `limit` None is no limit. Raises APIError(400) for a cursor that is not from this VM's events, 404 when the
        VM was deleted meanwhile, 503 when nobody knows whether they are on the disk.
        """
        file = self._files.get(uid)
        if file is not None and not file.durable:  # of thousands of files, only those that are read are synced again
            await self._written(uid, ())
        count = len(file.offsets) if file is not None else 0
        at = _position(uid, cursor, count, order)
        if order == "asc":
            start, stop = at, count if limit is None else min(count, at + limit)
            following = stop if stop < count else None
        else:
            start, stop = 0 if limit is None else max(0, at - limit), at
            following = start if start > 0 else None
        if file is None or start >= stop:
            return b"[]", None
        try:
            texts = await self._in_thread(file.read, start, stop, file.journal.size)
        except FileNotFoundError:
            raise _deleted(uid) from None
        if order == "desc":
            texts.reverse()
        return b"[%b]" % b",".join(texts), None if following is None else f"{uid[:8]}-{following}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what waits, until cancelled. Raises Broken when nobody knows any more what the disk holds."""
        task_status.started()
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            waiting, self._waiting = self._waiting, {}
            dropped, self._dropped = self._dropped, []
            for uid in waiting:
                if uid not in self._files:
                    self._files[uid] = EventFile(self._directory, uid, self._disk)
            with trio.CancelScope(shield=True):
                broken = await self._in_thread(self._write, waiting, dropped)
            for uid in dropped:
                self._files.pop(uid, None)
            for batch in waiting.values():
                batch.done.set()
            if broken is not None:
                self._broken = f"no events can be stored any more: {broken}; restart the controller"
                with trio.CancelScope(shield=True):  # whatever ends meanwhile, this is why
                    await trio.sleep(LAST_WORDS)
                raise broken

    def _write(self, waiting: dict[str, Waiting], dropped: list[str]) -> Broken | None:
        broken = None
        for uid, batch in waiting.items():
            file = self._files[uid]
            try:
                if batch.events and file.journal.size > MAX_BYTES:
                    batch.error = APIError(412, f"the VM's events have reached {MAX_BYTES} bytes; no more are kept")
                else:
                    file.append(batch.events)
            except NotWritten as error:
                _logger.error("events were not stored: %s", error)
                batch.error = APIError(507 if error.no_room else 503, f"{error}; the events were not stored")
            except Broken as error:
                broken = error
                batch.error = APIError(503, f"the events may not have been stored: {error}")
        for uid in dropped:
            path = self._directory / f"{uid}.jsonl"
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("cannot unlink %s: %s; the next start will", path, error)
        return broken


def _deleted(uid: str) -> APIError:
    return APIError(404, f"the VM with uid {uid} was deleted")


def _position(uid: str, cursor: str | None, count: int, order: Literal["asc", "desc"]) -> int:
    if cursor is None:
        return 0 if order == "asc" else count
    match = _CURSOR.fullmatch(cursor)
    if match is None or match[1] != uid[:8] or int(match[2]) > count:
        raise APIError(
            400, f"cursor is {shown(cursor)}, expected the X-Next-Cursor of an earlier page of this VM's events"
        )
    return int(match[2])
