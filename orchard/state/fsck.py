"""The check of a data directory, for `orchard check` and for the start of a controller.

`inspect` reads all files, says what is wrong in each and what to do, and changes nothing. It may be used while a
controller works in the directory: it lists the files of events before it reads the state, so the VM of each file is in
the state unless it was deleted since.

What a crash leaves, or a copy made from a running controller may contain, is noted and no problem: an unfinished last
line, a draft, events of a deleted VM. The next start repairs it.

`find_exposures` is the part that each start asks for: whether users other than the owner can read a secret, or replace
a file. All other files have mode 0600 in a directory of mode 0700.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path

from orchard.base.files import (
    ACCESS_KEY_BYTES,
    ACCESS_KEY_FILE,
    EVENTS_DIRECTORY,
    LIFECYCLE_FILE,
    SECRET_FILES,
    STATE_FILE,
    TLS_CERTIFICATE_FILE,
    TLS_KEY_FILE,
)
from orchard.net import tls
from orchard.storage.errors import DamagedError
from orchard.storage.event_file import EventFile
from orchard.storage.history import History, history_file
from orchard.storage.journal import Disk, Journal
from orchard.storage.lifecycle import LifecycleLog, lifecycle_file
from orchard.storage.state_file import read_contents
from orchard.store import State, build_state, check

# The directory in which Cirrus Labs' controller keeps its state.
_FOREIGN_DATA = "db"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(slots=True)
class FsckReport:
    """The findings in a data directory. Each problem and note names the file, what is wrong, and the remedy."""

    problems: list[str] = field(default_factory=list)
    # Findings that the next start repairs.
    notes: list[str] = field(default_factory=list)
    # Lines of the state file.
    lines: int = 0
    events: int = 0
    # VMs in the history.
    ended: int = 0
    state: State = field(default_factory=State)

    def summary(self) -> str:
        state = self.state
        objects = ((state.vms, "VMs"), (state.workers, "workers"), (state.accounts, "service accounts"))
        counts = ", ".join(f"{len(table)} {what}" for table, what in objects)
        found = f"{len(self.problems)} problems" if self.problems else "no problems"
        return f"{counts}, {self.events} events, {self.ended} ended VMs; {self.lines} lines up to revision {state.revision}; {found}"


def find_exposures(directory: Path) -> list[str]:
    """Return a sentence for each file of a data directory that other users can read or replace. Raises OSError."""
    problems = []
    mode = _mode_of(directory)
    if mode & _OTHERS_WRITE:
        problems.append(f"{directory} can be written by others than its owner (mode {mode:o}); chmod 700 it")
    for path in (directory / name for name in SECRET_FILES):
        mode = _mode_of(path) if path.exists() else 0
        if mode & _OTHERS:
            problems.append(f"{path} can be read by others than its owner (mode {mode:o}); chmod 600 it")
    return problems


def describe_foreign_data(directory: Path) -> str:
    """Return a sentence if a directory without a state holds the database of Cirrus Labs' controller, else "".

    With an empty state beside that database, no worker and no client would be let in.
    """
    if not (directory / _FOREIGN_DATA).is_dir() or (directory / STATE_FILE).exists():
        return ""
    return (
        f"{directory / _FOREIGN_DATA} is the database of Cirrus Labs' Orchard controller, which this one cannot read;"
        " choose an empty data directory, create the service accounts of workers and clients there again, and use"
        " the certificate and key of the old one with --controller-cert and --controller-key"
    )


def _mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def inspect(directory: Path) -> FsckReport:
    """Check a data directory. Raises OSError when it or a file in it cannot be read."""
    report = FsckReport()
    report.problems += find_exposures(directory)
    events = directory / EVENTS_DIRECTORY
    event_files = sorted(events.iterdir()) if events.is_dir() else []
    state_is_known = _inspect_state(directory, report)
    uids = {vm.uid for vm in report.state.vms.values()}
    for path in event_files:
        if path.name == LIFECYCLE_FILE:
            _inspect_lifecycle(path, report, uids)
        else:
            _inspect_events(path, report, uids if state_is_known else None)
    _inspect_history(directory, report)
    # A directory without a state is another one, or was never used.
    if (directory / STATE_FILE).exists():
        _inspect_access_key(directory, report)
    _inspect_certificate(directory, report)
    for draft in sorted([*directory.glob("*.new"), *directory.glob("tls-*")]):
        report.notes.append(f"{draft} is being written or left over; it may be removed when no controller runs")
    return report


def _inspect_state(directory: Path, report: FsckReport) -> bool:
    """Check the state and add it to the report; return False when it cannot be read."""
    journal = Journal(directory / STATE_FILE, Disk())
    try:
        contents = read_contents(journal)
        report.lines = contents.lines
        report.state = build_state(contents)
    except FileNotFoundError:
        report.problems.append(
            describe_foreign_data(directory)
            or f"{journal.path} is missing; restore it from a backup, or give the data directory of a controller"
        )
        return False
    except DamagedError as error:
        report.problems.append(str(error))
        return False
    _note_unfinished(journal, report)
    report.problems += [f"{journal.path}: {problem}; restore it from a backup" for problem in check(report.state)]
    return True


def _inspect_events(path: Path, report: FsckReport, uids: set[str] | None) -> None:
    """Check the events of one VM. `uids` are those of all VMs, None if the state cannot be read."""
    uid = path.name.removesuffix(".jsonl")
    if uid == path.name:
        report.notes.append(f"{path} is being written or left over; the next start removes it")
        return
    file = EventFile(path.parent, uid, Disk())
    try:
        file.inspect()
    except FileNotFoundError:
        # The VM was deleted meanwhile.
        return
    except DamagedError as error:
        report.problems.append(str(error))
    _note_unfinished(file.journal, report)
    report.events += file.count
    if uids is not None and uid not in uids and path.exists():
        report.notes.append(f"{path} belongs to a VM that does not exist any more; the next start removes it")


def _inspect_lifecycle(path: Path, report: FsckReport, uids: set[str]) -> None:
    file = lifecycle_file(path.parent)
    log = LifecycleLog(file)
    try:
        report.events += log.inspect(uids)
    except DamagedError as error:
        report.problems.append(str(error))
    _note_unfinished(file.journal, report)


def _inspect_history(directory: Path, report: FsckReport) -> None:
    file = history_file(directory)
    history = History(file)
    try:
        report.ended = history.inspect()
    except DamagedError as error:
        report.problems.append(str(error))
    _note_unfinished(file.journal, report)


def _note_unfinished(journal: Journal, report: FsckReport) -> None:
    if journal.unfinished:
        report.notes.append(
            f"{journal.path}: the last line is not finished at byte {journal.size}; the next start cuts it off"
        )


def _inspect_access_key(directory: Path, report: FsckReport) -> None:
    key = directory / ACCESS_KEY_FILE
    if not key.exists():
        report.problems.append(
            f"{key} is missing; restore it from a backup, or let the next start create another: existing access tokens"
            " become invalid"
        )
    elif (size := key.stat().st_size) != ACCESS_KEY_BYTES:
        report.problems.append(f"{key} has {size} bytes, expected {ACCESS_KEY_BYTES}; restore it from a backup")


def _inspect_certificate(directory: Path, report: FsckReport) -> None:
    certificate, key = directory / TLS_CERTIFICATE_FILE, directory / TLS_KEY_FILE
    if not certificate.exists():
        if key.exists():
            report.notes.append(f"{key} has no certificate; the next start that needs them creates both anew")
    elif not key.exists():
        report.problems.append(f"{certificate} has no key {key}; restore the key from a backup, or remove both")
    elif not _mode_of(key) & _OTHERS:
        # A key that others can read is reported by find_exposures.
        try:
            tls.server_context(certificate, key)
        except tls.TLSError as error:
            report.problems.append(f"{error}; restore both from a backup, or remove both")
