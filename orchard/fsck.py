"""A data directory looked through: what is wrong in it, and what to do. Law: reads files, and changes nothing.

`inspect` may be used while a controller works in the directory. It lists the files of events before it reads the state,
so each has its VM there, unless that was deleted since.

What a crash leaves, and a copy that was made while the controller worked may hold, is no problem: a last line that is
not finished, a draft, events whose VM is gone. The next start puts it right. These are notes.

`exposed` is what a start asks: whether others than the owner of the process can read a secret in the directory, or put
another file in the place of one. Everything else is in files of mode 0600 in a directory of mode 0700.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchard.files import (
    ACCESS_KEY_BYTES,
    ACCESS_KEY_FILE,
    EVENTS_DIRECTORY,
    SECRET_FILES,
    STATE_FILE,
    TLS_CERTIFICATE_FILE,
    TLS_KEY_FILE,
)
from orchard.net import tls
from orchard.storage.events import EventFile
from orchard.storage.journal import DamagedError, Disk, Journal
from orchard.store import State, check, load_state

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(slots=True)
class FsckReport:
    """What was found, each in a sentence with file, what is wrong there, and what to do."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the next start puts right
    lines: int = 0  # of the state's file
    events: int = 0
    state: State = field(default_factory=State)

    def summary(self) -> str:
        state = self.state
        objects = ((state.vms, "VMs"), (state.workers, "workers"), (state.accounts, "service accounts"))
        counts = ", ".join(f"{len(table)} {what}" for table, what in objects)
        found = f"{len(self.problems)} problems" if self.problems else "all is well"
        return f"{counts}, {self.events} events; {self.lines} lines up to revision {state.revision}; {found}"


def exposed(directory: Path) -> list[str]:
    """Say what others than the owner may do in a data directory that they must not. Raises OSError."""
    problems = []
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & OTHERS_WRITE:
        problems.append(f"{directory} can be written by others than its owner (mode {mode:o}); chmod 700 it")
    for path in (directory / name for name in SECRET_FILES):
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            problems.append(f"{path} can be read by others than its owner (mode {mode:o}); chmod 600 it")
    return problems


def inspect(directory: Path) -> FsckReport:
    """Look through a data directory. Raises OSError when it or a file in it can't be read."""
    report = FsckReport()
    report.problems += exposed(directory)
    events = sorted((directory / EVENTS_DIRECTORY).iterdir()) if (directory / EVENTS_DIRECTORY).is_dir() else []
    readable = _inspect_state(directory, report)
    for path in events:
        _inspect_events(path, report, readable)
    _inspect_keys(directory, report)
    for draft in sorted([*directory.glob("*.new"), *directory.glob("tls-*")]):
        report.notes.append(f"{draft} is being written, or left over; it may be removed when no controller runs")
    return report


def _inspect_state(directory: Path, report: FsckReport) -> bool:
    """Take the state into the report; False when it can't be told what it is."""
    journal = Journal(directory / STATE_FILE, Disk())

    def counted() -> Iterator[tuple[int, dict[str, Any]]]:
        for line in journal.read():
            report.lines += 1
            yield line

    try:
        report.state = load_state(journal.path, counted())
    except FileNotFoundError:
        report.problems.append(
            f"{journal.path} is missing; restore it from a backup, or is this no controller's data directory?"
        )
        return False
    except DamagedError as error:
        report.problems.append(str(error))
        return False
    _note_unfinished(journal, report)
    report.problems += [f"{journal.path}: {problem}; restore it from a backup" for problem in check(report.state)]
    return True


def _inspect_events(path: Path, report: FsckReport, state_is_known: bool) -> None:
    uid = path.name.removesuffix(".jsonl")
    if uid == path.name:
        report.notes.append(f"{path} is being written, or left over; the next start removes it")
        return
    file = EventFile(path.parent, uid, Disk())
    try:
        file.inspect()
    except FileNotFoundError:
        return  # the VM was deleted meanwhile
    except DamagedError as error:
        report.problems.append(str(error))
    _note_unfinished(file.journal, report)
    report.events += len(file.offsets)
    if state_is_known and path.exists() and all(vm.uid != uid for vm in report.state.vms.values()):
        report.notes.append(f"{path} is of a VM that does not exist any more; the next start removes it")


def _note_unfinished(journal: Journal, report: FsckReport) -> None:
    if journal.unfinished:
        report.notes.append(
            f"{journal.path}: the last line is not finished at byte {journal.size}; the next start cuts it off"
        )


def _inspect_keys(directory: Path, report: FsckReport) -> None:
    key = directory / ACCESS_KEY_FILE
    if not key.exists():
        report.problems.append(
            f"{key} is missing; restore it from a backup, or have the next start make another: tokens for VMs are lost"
        )
    elif (size := key.stat().st_size) != ACCESS_KEY_BYTES:
        report.problems.append(f"{key}: it has {size} bytes, expected {ACCESS_KEY_BYTES}; restore it from a backup")
    certificate, key = directory / TLS_CERTIFICATE_FILE, directory / TLS_KEY_FILE
    if not certificate.exists():
        if key.exists():
            report.notes.append(f"{key} is without its certificate; the next start that needs them makes both anew")
    elif not key.exists():
        report.problems.append(f"{certificate} is without {key}; restore that from a backup, or remove both")
    elif not stat.S_IMODE(key.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):  # else it is told already
        try:
            tls.server_context(certificate, key)
        except tls.TLSError as error:
            report.problems.append(f"{error}; restore both from a backup, or remove both")
