"""The engine of a cluster's state: the interface between the store and the storage below it.

An engine knows kinds, names, JSON texts and revisions. What the objects mean is store.py's business. The file engine
(file_engine.py) keeps the state of one controller in a directory.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from orchard.storage.errors import DamagedError

# Kind and name of an object.
Key = tuple[str, str]
# Values decoded before the start, by their place: the bytes and the decoded value, which is valid for these bytes only.
DecodedValues = Mapping[Any, tuple[bytes, Any]]
# Kind -> name -> JSON.
Tables = dict[str, dict[str, bytes]]


class BatchLimits(NamedTuple):
    """How much an engine writes at once: records, and bytes of their JSON. Batches are cut between transactions."""

    records: float
    bytes: float


@dataclass(slots=True)
class Batch:
    """Changes that become durable together: the transactions after revision `before`, up to `revision`.

    Only the last JSON of each object is written, since the scheduler answers most changes with another change of the
    same object.
    """

    before: int
    revision: int
    # The JSON of each changed object; None: deleted.
    records: dict[Key, bytes | None] = field(default_factory=dict, repr=False)
    # Whether the batch has a change that the store refuses while the disk is full.
    adds: bool = False
    # The wall time of the write.
    time: datetime.datetime | None = None
    _created: set[Key] = field(default_factory=set)

    def record(self, key: Key, json: bytes | None, *, is_new: bool = False) -> None:
        """Record an object that was created (`is_new`), changed, or with None deleted.

        An object that is created and deleted in the same batch leaves no record.
        """
        if is_new and key not in self.records:
            self._created.add(key)
        if json is None and key in self._created:
            self.records.pop(key, None)
        else:
            self.records[key] = json


@dataclass(slots=True)
class Contents:
    """What an engine has loaded: the revision, and the parsed JSON of each object with the place where it was found."""

    revision: int = 0
    # The wall time of the last write, as far as it is stored.
    time: datetime.datetime | None = None
    objects: dict[Key, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    # Objects whose JSON was decoded before the start (see DecodedValues).
    decoded: dict[Key, Any] = field(default_factory=dict, repr=False)
    # Whether a lease has to be renewed while the objects are decoded.
    has_lease: bool = False

    def not_understood(self, place: Any, error: Exception) -> DamagedError:
        """Return the error for an object at a place that cannot be decoded."""
        raise NotImplementedError

    def contradicts_itself(self, problems: Iterable[str]) -> DamagedError:
        """Return the error for a state whose invariants are broken."""
        raise NotImplementedError


class Engine(Protocol):
    """The durable copy of a cluster's state.

    To start, call `load`, which changes nothing, and if the contents are valid, `begin`. Then `run` must be running.
    The store never calls `append` twice at a time. Once `append` or `run` has raised BrokenError, the engine has ended.
    """

    limits: BatchLimits
    # Why nothing should be added at present; empty when there is space.
    full: str
    # Whether deletions and reports are written while `full` is set, as long as there is any space.
    takes_deletions: bool

    async def load(self) -> Contents:
        """Read the state, which may be empty. Raises DamagedError, OSError, StorageUnavailableError."""

    async def begin(self, tables: Tables, now: datetime.datetime) -> None:
        """Make what was loaded durable and prepare for `append`; `tables` has the objects as `append` will get them.

        The engine keeps `tables`. `now` is the time of a state that is created. Raises NotWrittenError when that is not
        possible, BrokenError when it is not known what is stored, OSError.
        """

    async def append(self, batch: Batch) -> None:
        """Make a batch durable, all of it or nothing. A cancellation waits for it.

        Raises NotWrittenError when nothing was written, BrokenError when the engine has ended.
        """

    def leads(self) -> bool:
        """Return whether an answer that is based on the state in memory may leave now."""

    async def run(self) -> None:
        """Keep what is stored small and writable until cancelled. Raises BrokenError when the engine has ended."""

    def close(self) -> None:
        """Close files and connections that the engine has opened."""
