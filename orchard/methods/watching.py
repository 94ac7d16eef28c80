"""The watch of all VMs and workers, which a client resumes when its connection has ended.

The controller keeps changes for a while, so that a watch resumes after the last revision that it saw. Otherwise (410)
it begins with a new list. `WatchReader` compares that with the objects that it knows, and makes changes of the
differences. A copy to which all changes are applied is correct, whatever happened to the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from orchard.methods.common import decode_answer
from orchard.methods.lines import AfterRefusal, ResumingLines
from orchard.net.transport import ClientError, Items, ResponseError, Transport, excerpt
from orchard.schema import VM, Worker

WatchKind = Literal["vms", "workers"]
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class WatchedChange:
    """One line of a watch. `kind` is "vm" or "worker", and `object` is what was added, changed or deleted.

    SYNCED comes once, without an object, when all that there was at the beginning has been ADDED.
    """

    type: Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"]
    kind: Literal["vm", "worker", ""] = ""
    object: VM | Worker | None = None


class WatchReader:
    """Makes changes of the lines of consecutive answers. Performs no I/O.

    `query` are the parameters of the first request.
    """

    def __init__(self, query: Mapping[str, str]) -> None:
        self._query = query
        self._revision = ""
        self._known: dict[_Key, VM | Worker] = {}
        # The objects in the present list so far; None after its end.
        self._listed: set[_Key] | None = None
        self._is_synced = False

    def begin(self) -> dict[str, str]:
        """Return the query parameters of the next request, which begins with a list or after the last revision."""
        if self._revision:
            return {**self._query, "since": self._revision}
        self._listed = set()
        return dict(self._query)

    def refuse(self, error: ResponseError) -> AfterRefusal:
        """Begin with a list again if the last revision is gone."""
        if error.status != 410:
            return "raise"
        self._revision = ""
        return "again"

    def read(self, line: Mapping[str, Any]) -> Iterator[WatchedChange]:
        """Yield the changes that a line makes. Raises ClientError."""
        self._revision = line.get("revision") or self._revision
        match line:
            case {"type": "BOOKMARK"}:
                yield from self._end_list()
            case {"type": "ADDED" | "MODIFIED" | "DELETED" as change, "kind": "vm", "object": item}:
                yield from self._apply(change, "vm", decode_answer(VM, item))
            case {"type": "ADDED" | "MODIFIED" | "DELETED" as change, "kind": "worker", "object": item}:
                yield from self._apply(change, "worker", decode_answer(Worker, item))
            case _:
                raise ClientError(f"a line of the watch is {excerpt(str(line))}, expected a change of a VM or a worker")

    def _end_list(self) -> Iterator[WatchedChange]:
        if self._listed is None:
            return
        for key in [key for key in self._known if key not in self._listed]:
            yield from self._apply("DELETED", key[0], self._known[key])
        self._listed = None
        if not self._is_synced:
            self._is_synced = True
            yield WatchedChange("SYNCED")

    def _apply(self, change: str, kind: Any, item: VM | Worker) -> Iterator[WatchedChange]:
        """Yield the change unless it was applied before: an answer may repeat lines of a transaction that was cut off."""
        key = (kind, item.name)
        old = self._known.get(key)
        if change == "DELETED":
            if self._known.pop(key, None) is not None:
                yield WatchedChange("DELETED", kind, item)
            return
        if self._listed is not None:
            self._listed.add(key)
        self._known[key] = item
        if isinstance(old, VM) and isinstance(item, VM) and old.uid != item.uid:
            yield WatchedChange("DELETED", kind, old)
            old = None
        if old is None:
            yield WatchedChange("ADDED", kind, item)
        elif old != item:
            yield WatchedChange("MODIFIED", kind, item)


@asynccontextmanager
async def watch_all(transport: Transport, query: Mapping[str, str]) -> AsyncIterator[AsyncIterator[WatchedChange]]:
    """Follow all changes for the time of the block. Yields an iterator of them, which does not end. Raises ResponseError."""
    reader = WatchReader(query)
    due: deque[WatchedChange] = deque()

    async def take() -> WatchedChange | None:
        while not due:
            if (line := await lines.take()) is None:
                return None
            due.extend(reader.read(line))
        return due.popleft()

    async with ResumingLines(transport, "/watch", reader.begin, reader.refuse) as lines:
        yield Items(take)
