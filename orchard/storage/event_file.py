"""The file with the events of one VM: checked lines (journal.py), each with an event and its number.

In memory an event costs the eight bytes of its offset, so a page is one seek and one read wherever it begins.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchard.codec import dump_json
from orchard.resources.json_text import dump_resource
from orchard.schema import Event
from orchard.storage.errors import DamagedError
from orchard.storage.journal import Disk, Journal, line_length

# Version of the files.
_EVENTS_VERSION = 1
# Bytes of events that are read at once. An answer to a client that reads nothing holds no more than this.
BLOCK_BYTES = 64 * 1024
_EVENT = b'"event":'
# The most that precedes an event in its line: its number, and the sum.
_HEAD_BYTES = 256


class EventFile:
    """One VM's events on disk, and the offset of each. Its methods do disk I/O, for a thread."""

    def __init__(self, directory: Path, uid: str, disk: Disk) -> None:
        self.uid = uid
        self.journal = Journal(directory / f"{uid}.jsonl", disk)
        self.offsets = array("Q")
        # While False, data that was read may be in the page cache only, and must be synced before a client sees it.
        self.is_durable = True

    @property
    def count(self) -> int:
        return len(self.offsets)

    def load(self) -> None:
        """Read and check the file, and cut off what a crash left at its end. Raises DamagedError, OSError."""
        self.inspect()
        self.journal.open_for_append()
        self.journal.close()
        self.is_durable = not self.offsets

    def inspect(self) -> None:
        """Read and check the file, and change nothing. Raises DamagedError; FileNotFoundError."""
        for offset, line in self.journal.read_after(self._header()):
            if line.get("n") != len(self.offsets):
                what = f"event {line.get('n')} follows event {len(self.offsets) - 1}"
                raise DamagedError(self.journal.path, offset, what)
            self.offsets.append(offset)

    def _header(self) -> dict[str, Any]:
        return {"format": "orchard-events", "version": _EVENTS_VERSION, "uid": self.uid}

    def append(self, events: Sequence[Event]) -> None:
        """Append events, all or none; then all events of the file are durable. Raises NotWrittenError, BrokenError."""
        first, offset = len(self.offsets), self.journal.size
        lines = [b'{"n":%d,"event":%b}' % (first + i, dump_resource(event)) for i, event in enumerate(events)]
        try:
            if first == 0:
                header = dump_json(self._header())
                self.journal.create([header, *lines])
                offset = line_length(header)
            else:
                self.journal.append(lines)
            self.is_durable = True
        finally:
            # Thousands of VMs must not hold thousands of descriptors.
            self.journal.close()
        for line in lines:
            self.offsets.append(offset)
            offset += line_length(line)

    def blocks(self, start: int, stop: int) -> list[range]:
        """Return the events number `start` to `stop` - 1 in blocks of BLOCK_BYTES, or of one event that is longer."""
        blocks = []
        end = self._end(stop - 1)
        while start < stop:
            limit = self.offsets[start] + BLOCK_BYTES
            after = stop if end <= limit else bisect_right(self.offsets, limit, start, stop) - 1
            blocks.append(range(start, max(start + 1, after)))
            start = blocks[-1].stop
        return blocks

    def read_block(self, block: range) -> list[bytes]:
        """Return the JSON of each event of a block."""
        with self.journal.path.open("rb") as file:
            file.seek(self.offsets[block.start])
            lines = file.read(self.size_of(block)).split(b"\n")
        # Events that follow the block may be in the middle of an append, and not durable yet.
        return [line.split(_EVENT, 1)[1][:-1] for line in lines[: len(block)]]

    def read_part_of(self, number: int, at: int) -> bytes:
        """Return BLOCK_BYTES of one event's JSON from its byte `at`; empty at its end."""
        with self.journal.path.open("rb") as file:
            file.seek(self.offsets[number])
            begin = file.read(_HEAD_BYTES).index(_EVENT) + len(_EVENT)
            file.seek(self.offsets[number] + begin + at)
            # The line ends with a brace and its newline.
            part = file.read(BLOCK_BYTES + 2)
        end = part.find(b"\n")
        return part[: BLOCK_BYTES if end < 0 else end - 1]

    def size_of(self, block: range) -> int:
        """Return how many bytes of the file a block takes."""
        return self._end(block.stop - 1) - self.offsets[block.start]

    def _end(self, number: int) -> int:
        """Return where the line of an event ends."""
        return self.offsets[number + 1] if number + 1 < len(self.offsets) else self.journal.size
