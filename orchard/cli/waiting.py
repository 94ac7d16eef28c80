"""Waiting for a VM: its phases on a terminal, its script's output, and the exit status that follows from both."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchard.cli.connection import AnswerError, ControllerConnection, path_of
from orchard.cli.failure import FAILED, OVERDUE, CommandError
from orchard.cli.output import format_progress, is_fancy, print_line, printable, terminal_size

_CLEAR = "\r\x1b[K"


class Waiting:
    """Waits for one VM, which is held by its uid, for at most `seconds` (None: without a limit)."""

    def __init__(self, controller: ControllerConnection, vm: Mapping[str, Any], seconds: float | None) -> None:
        self._controller = controller
        self._name, self._uid = str(vm["name"]), vm["uid"]
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._shown = ""

    def until_ready(self, *, follow: bool = False) -> int:
        """Wait until the VM is ready, and print its script's output if `follow`. Return its script's exit status.

        A VM whose worker does not report `ready` counts as ready when it runs, and one that failed is waited for while
        it is to be restarted. Raises CommandError if it is gone.
        """
        try:
            vm = self._until(lambda vm: vm["status"] == "running" or _has_failed(vm))
            if follow and vm["status"] == "running":
                self._follow()
            vm = self._until(lambda vm: _has_ended(vm) or _has_failed(vm))
        finally:
            self._show("")
        code = vm.get("startupExitCode")
        if vm["status"] == "failed":
            print(printable(f'orchard: VM "{self._name}" has failed: {vm.get("status_message", "")}'), file=sys.stderr)
            return int(code or FAILED)
        # A script that could not begin has no exit code.
        return int(code if code is not None else FAILED if "startupEndedAt" in vm else 0)

    def _until(self, holds: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Return the VM as soon as a condition holds for it. Raises CommandError."""
        for vm in self._changes():
            if holds(vm):
                return vm
            self._show(": ".join(part for part in (vm["status"], vm.get("status_message", "")) if part))
        raise AssertionError("unreachable")

    def _changes(self) -> Iterator[Mapping[str, Any]]:
        """Yield the VM as it is, and after each change. Raises CommandError when it is deleted, or when the time is over."""
        try:
            for change in self._lines(path_of("vms", self._name), {"watch": "true"}):
                vm = change["object"]
                if change["type"] == "DELETED" or vm["uid"] != self._uid:
                    raise CommandError(f'VM "{self._name}" was deleted')
                yield vm
        except AnswerError as error:
            if error.status_code == 404:
                raise CommandError(f'VM "{self._name}" was deleted') from None
            raise

    def _follow(self) -> None:
        """Print the lines of the startup script until it has ended."""
        query = {"follow": "true", "until": "ready"}
        for event in self._lines(path_of("vms", self._name, "events"), query, may_end=True):
            # A stream that begins anew goes on behind this event.
            query["cursor"] = event.get("cursor", "")
            if event.get("kind") == "log_line":
                self._show("")
                print_line(event.get("payload", ""))

    def _lines(self, path: str, query: Mapping[str, str], *, may_end: bool = False) -> Iterator[Any]:
        """Yield the lines of a stream, over restarts of the controller. Raises CommandError when the time is over."""
        yield from self._controller.resumed_lines(path, lambda: query, deadline=self._deadline, may_end=may_end)
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise CommandError(f'VM "{self._name}" is not ready after {self._seconds:g} seconds', OVERDUE)

    def _show(self, text: str) -> None:
        """Show the present phase on the last line of a terminal, or on a line of its own elsewhere; "" removes it."""
        if text == self._shown:
            return
        if is_fancy(sys.stderr):
            columns = terminal_size().columns
            print(f"{_CLEAR}{format_progress(printable(text), columns)}", end="", file=sys.stderr, flush=True)
        elif text:
            print(printable(text), file=sys.stderr, flush=True)
        self._shown = text


def _has_failed(vm: Mapping[str, Any]) -> bool:
    """Return whether a VM has failed and stays so: without a worker, none is restarted."""
    return vm["status"] == "failed" and not (vm["restart_policy"] == "OnFailure" and vm.get("worker"))


def _has_ended(vm: Mapping[str, Any]) -> bool:
    """Return whether a running VM's script has ended, or is not reported about."""
    if vm["status"] != "running":
        return False
    conditions = {one["type"]: one["state"] for one in vm.get("conditions") or ()}
    # A VM whose script has failed fails next, unless it is kept.
    is_kept = vm.get("startupOnFailure") == "keep" and "startupEndedAt" in vm
    return "ready" not in conditions or conditions["ready"] == "true" or is_kept
