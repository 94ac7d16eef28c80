"""The state file: a cluster's state in one file, kept small by compaction and writable by a reserve of disk space.

This file knows kinds, names, JSON texts and revisions; store.py knows what the objects mean. Everything here is
synchronous; the file engine (file_engine.py) runs it in a thread, one call at a time.

`state.jsonl` begins with a snapshot: a header, and one line for each object. The journal follows: one line for each
batch of transactions, with the last JSON of each object that they changed. Compaction writes a new file and renames it
into place. So exactly one file is valid at any moment, and a copy made at any moment is a consistent backup.

On a full disk, the first append that finds no space gets it from the reserve (journal.py), and `full` is set until
`upkeep` has filled the reserve again. Meanwhile the store refuses transactions that add something. RESERVE_BYTES are
enough for about 500 reports or 10,000 deletions; after that, these fail as well. `upkeep` also compacts a file that is
much larger than its objects, which frees space.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchard.base.files import RESERVE_FILE, STATE_FILE
from orchard.codec import dump_json, format_time, load_json
from orchard.storage.engine import Batch, Contents, Tables
from orchard.storage.errors import DamagedError, NotWrittenError
from orchard.storage.journal import Disk, Journal, Reserve

# Version of the file. A newer version is refused. A file of an older version is read, and rewritten before anything is
# added to it, so that a program of the older version refuses it instead of misreading it.
STATE_VERSION = 4
# A new snapshot is written when the journal has so many bytes and COMPACT_RATIO times those of the snapshot, so that
# compaction stays a constant share of all writes.
COMPACT_BYTES = 4 * 1024 * 1024
COMPACT_RATIO = 3
# A report takes about two thousand bytes, a deletion a hundred.
RESERVE_BYTES = 1024 * 1024
# A batch that also adds something may take this part of the reserve: one fourth.
RESERVE_SHARE = 4

# A line of the journal that puts one object, as `_line` writes it, and what parts the objects of a line. In the object
# it may also be something else. In a text it is not, where quotation marks are escaped.
_ONE_PUT = re.compile(
    rb'\{"after":(0|[1-9][0-9]*),"revision":([1-9][0-9]*),(?:"time":"([^"\\]*)",)?"changes":\['
    rb'\{"put":"([a-z]+)","name":"([^"\\]*)","object":(\{.*\})\}\]\}',
    re.DOTALL,
)
_NEXT_RECORD = re.compile(rb'\}\s*,\s*\{\s*"(?:put|delete|name|object)"')

_logger = logging.getLogger("orchard.storage")


@dataclass(slots=True)
class FileContents(Contents):
    """The contents of a state file. The place of an object is the offset of its last line.

    Of each object only the last JSON is parsed and decoded, since most lines of a journal are outdated by later ones:
    reading takes half the time (./run bench start). The checksum shows that an outdated line is as it was written.
    """

    path: Path = field(kw_only=True)
    version: int = STATE_VERSION
    # Lines of the file, and bytes up to the end of the last one.
    lines: int = 0
    size: int = 0

    def not_understood(self, place: Any, error: Exception) -> DamagedError:
        return DamagedError(self.path, place, f"the line is not understood ({error})")

    def contradicts_itself(self, problems: Iterable[str]) -> DamagedError:
        return DamagedError(self.path, self.size, f"the state is inconsistent: {'; '.join(problems)}")


class StateFile:
    """The durable copy of a cluster's state in `directory`.

    To start: `load`, which changes nothing, and when the contents make sense, `begin`. Then `append` makes changes
    durable, `upkeep` is to be called from time to time while `full` is set, and `close` ends it.
    """

    def __init__(self, directory: Path, disk: Disk) -> None:
        # Why nothing should be added at present; empty when there is space.
        self.full = ""
        self._directory = directory
        self._disk = disk
        self._journal = Journal(directory / STATE_FILE, disk)
        self._reserve = Reserve(directory / RESERVE_FILE, RESERVE_BYTES, disk)
        # The objects on the disk, for the next snapshot, with their size and revision.
        self._tables: Tables = {}
        self._version = STATE_VERSION
        self._revision = 0
        # The wall time of the last write, as far as it is known.
        self._time: datetime.datetime | None = None
        self._object_bytes = 0
        self._compact_at = 0

    def load(self) -> FileContents:
        """Read the state, which is empty in a new directory. Changes nothing. Raises DamagedError, OSError."""
        path, reserve = self._journal.path, self._reserve.path
        if path.exists():
            contents = read_contents(self._journal)
            self._version, self._revision, self._time = contents.version, contents.revision, contents.time
            return contents
        # The reserve is created after the state.
        if reserve.exists():
            remedy = f"restore it from a backup, or remove {reserve} to begin with nothing, which loses the events, too"
            raise DamagedError(path, 0, "the file is missing in a directory that a controller has used", remedy)
        return FileContents(path=path)

    def begin(self, tables: Tables, now: datetime.datetime) -> None:
        """Make what was loaded durable and open it for appending; in a new directory, create the file.

        A file of an older version is replaced by one of this version. `tables` holds the loaded objects as `append`
        will get them; the engine keeps it. `now` is the time in the header of a new file. Raises NotWrittenError when
        the file cannot be created or replaced, BrokenError when it is not known whether the disk holds it, OSError.
        """
        if self._journal.path.exists():
            self._journal.open_for_append()
            self._journal.sync()
            if self._version < STATE_VERSION:
                lines = snapshot_lines(tables, self._revision, self._time or now)
                self._write_with_reserve(lambda: self._journal.create(lines), sum(map(len, lines)), RESERVE_BYTES)
        else:
            # The data directory may be as new as the file. Its parent cannot be synced when it cannot be read.
            with contextlib.suppress(PermissionError):
                self._disk.sync_directory(self._directory.parent)
            self._journal.create(snapshot_lines(tables, self._revision, now))
        self._keep(tables)
        # Not the size of the file: then the file would grow to a multiple of itself with each restart.
        self._compact_after(self._object_bytes)
        self._fill_reserve()

    def append(self, batch: Batch) -> None:
        """Make a batch durable, all of it or nothing. Sets `full` when the disk has no space.

        Raises NotWrittenError when nothing was written, BrokenError when it is not known what the disk holds.
        """
        if self._journal.size > self._compact_at and self._compact(batch):
            return
        line = _line(batch)
        # A large batch that also adds something does not get the reserve.
        limit = RESERVE_BYTES // RESERVE_SHARE if batch.adds else RESERVE_BYTES
        try:
            if self._write_with_reserve(lambda: self._journal.append([line]), len(line), limit):
                self.full = f"no space is left for {self._journal.path}"
        except NotWrittenError as error:
            if error.no_space:
                self.full = str(error)
            raise
        self._object_bytes += _apply(self._tables, batch)
        self._revision, self._time = batch.revision, batch.time or self._time

    def upkeep(self) -> None:
        """Fill the reserve, and clear `full` when that succeeded. Otherwise try to free space by compaction.

        Raises BrokenError.
        """
        if not self._fill_reserve() and self._journal.size > 2 * self._object_bytes:
            self._compact()

    def close(self) -> None:
        """Close the file."""
        self._journal.close()

    def _keep(self, tables: Tables) -> None:
        self._tables = tables
        self._object_bytes = sum(len(json) for table in tables.values() for json in table.values())

    def _compact_after(self, snapshot_bytes: int) -> None:
        self._compact_at = snapshot_bytes + max(COMPACT_BYTES, COMPACT_RATIO * snapshot_bytes)

    def _fill_reserve(self) -> bool:
        try:
            self._reserve.fill()
        except NotWrittenError as error:
            self.full = self.full or str(error)
            return False
        self.full = ""
        return True

    def _compact(self, batch: Batch | None = None) -> bool:
        """Write a new file that includes a batch; return False when there is no space for it. Raises BrokenError."""
        tables, revision = {kind: dict(table) for kind, table in self._tables.items()}, self._revision
        if batch is not None:
            _apply(tables, batch)
            revision = batch.revision
        time = batch.time if batch is not None else None
        lines = snapshot_lines(tables, revision, time or self._time or datetime.datetime.now(datetime.UTC))
        size = sum(map(len, lines))
        try:
            reserve_needed = self._write_with_reserve(lambda: self._journal.create(lines), size, RESERVE_BYTES // 2)
        except NotWrittenError as error:
            _logger.warning("compaction postponed: %s", error)
            self._compact_at = self._journal.size + COMPACT_BYTES
            return False
        self._keep(tables)
        self._revision, self._time = revision, time or self._time
        self._compact_after(self._journal.size)
        if reserve_needed:
            self._fill_reserve()
        return True

    def _write_with_reserve(self, write: Callable[[], None], size: int, limit: int) -> bool:
        """Call `write`, which writes `size` bytes. On a full disk, free at most `limit` bytes of the reserve for them.

        Return True when the reserve was needed.
        """
        needed = False
        while True:
            try:
                write()
            except NotWrittenError as error:
                if not error.no_space or size > limit or not self._reserve.release(size):
                    raise
                needed = True
            else:
                return needed


def _apply(tables: Tables, batch: Batch) -> int:
    """Apply a batch to tables; return by how many bytes the objects grew."""
    growth = 0
    for (kind, name), json in batch.records.items():
        table = tables.setdefault(kind, {})
        growth -= len(table.get(name, b""))
        if json is None:
            del table[name]
        else:
            table[name] = json
            growth += len(json)
    return growth


def _line(batch: Batch) -> bytes:
    """Return a batch as a line of the journal."""
    records = [_record(kind, name, json) for (kind, name), json in batch.records.items()]
    time = b"" if batch.time is None else b'"time":"%b",' % format_time(batch.time).encode()
    return b'{"after":%d,"revision":%d,%b"changes":[%b]}' % (batch.before, batch.revision, time, b",".join(records))


def _record(kind: str, name: str, json: bytes | None) -> bytes:
    if json is None:
        return dump_json({"delete": kind, "name": name})
    return b'{"put":"%b","name":%b,"object":%b}' % (kind.encode(), dump_json(name), json)


def snapshot_lines(tables: Mapping[str, Mapping[str, bytes]], revision: int, now: datetime.datetime) -> list[bytes]:
    """Return the lines with which a file begins: a header, and one line for each object."""
    objects = [_record(kind, name, json) for kind, table in tables.items() for name, json in table.items()]
    header = {
        "format": "orchard-state",
        "version": STATE_VERSION,
        # Makes the checksums of this file unlike those of any other.
        "id": secrets.token_hex(8),
        "written": format_time(now),
        "revision": revision,
        "objects": len(objects),
    }
    return [dump_json(header), *objects]


def read_contents(journal: Journal) -> FileContents:
    """Read a state file to its end, and change nothing. Raises DamagedError; FileNotFoundError."""
    contents = FileContents(path=journal.path)
    snapshot_end: int | None = None
    for offset, text in journal.read_texts():
        try:
            if snapshot_end is None:
                line = load_json(text)
                _check_header(contents.path, line)
                contents.version, contents.revision = line["version"], line["revision"]
                contents.time = _read_time(line.get("written"))
                snapshot_end = 1 + line["objects"]
            elif contents.lines < snapshot_end:
                _take_record(contents, offset, load_json(text))
            else:
                _take_batch(contents, offset, text)
        except (KeyError, TypeError, ValueError) as error:
            raise contents.not_understood(offset, error) from error
        contents.lines += 1
    contents.size = journal.size
    if snapshot_end is None or contents.lines < snapshot_end:
        raise DamagedError(journal.path, journal.size, "the file ends in the middle of its snapshot")
    _parse_objects(contents)
    return contents


def _parse_objects(contents: FileContents) -> None:
    """Parse the objects of which only the JSON text was kept so far. Raises DamagedError."""
    for key, (offset, raw) in contents.objects.items():
        if isinstance(raw, bytes):
            try:
                contents.objects[key] = (offset, load_json(raw))
            except ValueError as error:
                raise contents.not_understood(offset, error) from error


def _check_header(path: Path, line: Mapping[str, Any]) -> None:
    if line.get("format") != "orchard-state":
        raise DamagedError(path, 0, 'the format is not "orchard-state"')
    if line["version"] > STATE_VERSION:
        raise DamagedError(
            path,
            0,
            f"version {line['version']} is newer than the version {STATE_VERSION} that this program knows",
            "start the Orchard that wrote it, or a newer one",
        )


def _take_batch(contents: FileContents, offset: int, text: bytes) -> None:
    one = _ONE_PUT.fullmatch(text)
    if one is not None and not _NEXT_RECORD.search(one[6]):
        after, revision, time, kind, name, json = one.groups()
        _advance(contents, offset, int(after) + 1, int(revision), None if time is None else time.decode())
        contents.objects[kind.decode(), name.decode()] = (offset, json)
        return
    line = load_json(text)
    # A line without "after" has one transaction.
    first = line.get("after", line["revision"] - 1) + 1
    _advance(contents, offset, first, line["revision"], line.get("time"))
    for change in line["changes"]:
        _take_record(contents, offset, change)


def _advance(contents: FileContents, offset: int, first: int, revision: int, time: str | None) -> None:
    """Advance to the revision and the time of a journal line, which has revisions from `first` on. Raises DamagedError."""
    if first != contents.revision + 1 or revision < first:
        first = min(first, revision)
        raise DamagedError(contents.path, offset, f"revision {first} follows revision {contents.revision}")
    contents.revision = revision
    contents.time = _read_time(time) or contents.time


def _read_time(text: str | None) -> datetime.datetime | None:
    return None if text is None else datetime.datetime.fromisoformat(text)


def _take_record(contents: FileContents, offset: int, record: Mapping[str, Any]) -> None:
    """Apply one record. Raises KeyError when it deletes an object that does not exist."""
    if "delete" in record:
        del contents.objects[record["delete"], record["name"]]
    else:
        contents.objects[record["put"], record["name"]] = (offset, record["object"])
