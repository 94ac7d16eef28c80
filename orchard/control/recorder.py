"""The records of each VM's life, made from the durable changes of the state: lifecycle events, and the history.

The recorder adds lifecycle events (storage/events.py), and wakes the followers of a VM's events at each of its changes.
At a VM's end it logs one line and adds the VM to the history (storage/history.py). `describe_change` and `ended_vm` are
the decisions, without I/O.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

from orchard.codec import dump_json, format_time, shortened
from orchard.schema import PULLING, VM, EndedVM
from orchard.state.changes import Change
from orchard.storage.events import EventLog
from orchard.storage.history import History
from orchard.transitions import has_expired

# Characters of a failure's reason in an event and in the history, and of the metadata in the log.
_MAX_REASON, _MAX_LOGGED = 512, 1024

_logger = logging.getLogger("orchard.controller")


class Recorder:
    """Records the durable changes of VMs. `clock` is the wall clock."""

    def __init__(self, events: EventLog, history: History, clock: Callable[[], datetime.datetime]) -> None:
        self._events = events
        self._history = history
        self._clock = clock
        # When the pull of a VM's image began, by uid.
        self._pulls: dict[str, datetime.datetime] = {}

    def record(self, changes: list[Change]) -> None:
        """Record what became durable together."""
        now = self._clock()
        for change in changes:
            old, new = change.old if isinstance(change.old, VM) else None, change.new
            if isinstance(new, VM):
                for text in describe_change(old, new, self._pull_seconds(old, new, now)):
                    self._events.record(new.uid, text, int(now.timestamp()))
                self._events.wake(new.uid)
            elif old is not None:
                self._record_end(old, now)

    def _pull_seconds(self, old: VM | None, new: VM, now: datetime.datetime) -> float | None:
        """Return how long the pull took that has ended with a change, None if none has."""
        if is_pulling(new):
            # After a restart of the controller, the pull may have begun long ago.
            began = new.state.scheduled_at if old is not None and is_pulling(old) else None
            self._pulls.setdefault(new.uid, began or now)
            return None
        began = self._pulls.pop(new.uid, None)
        return (now - began).total_seconds() if began is not None and new.state.worker else None

    def _record_end(self, vm: VM, now: datetime.datetime) -> None:
        self._pulls.pop(vm.uid, None)
        # The VM's events are forgotten, so only followers can see this one.
        if self._events.has_followers(vm.uid):
            how = "has expired" if has_expired(vm, now) else "was deleted"
            self._events.record(vm.uid, f"stopping: the VM {how}", int(now.timestamp()))
        self._events.drop(vm.uid)
        ended = ended_vm(vm, now)
        self._history.add(ended)
        _logger.info("VM ended", extra=_log_fields(ended))


def is_pulling(vm: VM) -> bool:
    """Return whether the worker of a VM pulls its image."""
    return vm.state.status == "pending" and bool(vm.state.worker) and vm.state.status_message.startswith(PULLING)


def describe_change(old: VM | None, new: VM, pull_seconds: float | None) -> list[str]:
    """Return the payloads of the lifecycle events of one change. `old` is None for a new VM.

    `pull_seconds` is how long the pull took that has ended with the change, None if none has.
    """
    if old is None:
        return [f"created by {new.meta.created_by}" if new.meta.created_by else "created"]
    before, after = old.state, new.state
    if after.restart_count != before.restart_count:
        return [f"restarted, restart_count {after.restart_count}"]
    if after.worker != before.worker:
        reason = f": {after.status_message}" if after.status_message else ""
        return [f"assigned to {after.worker}" if after.worker else f"unassigned from {before.worker}{reason}"]
    found = []
    has_failed = after.status == "failed" != before.status
    if pull_seconds is not None and not has_failed:
        found.append(f"pulled in {pull_seconds:.1f} s")
    if _has_booted(old, new):
        found.append("booted")
    script = (after.startup_exit_code, after.startup_ended_at)
    if after.startup_exit_code is not None and script != (before.startup_exit_code, before.startup_ended_at):
        found.append(f"script ended with {after.startup_exit_code}")
    if has_failed:
        found.append(f"failed: {shortened(after.status_message, _MAX_REASON)}")
    if new.spec.power_state != old.spec.power_state and after.worker:
        found.append(f"stopping: powerState is {new.spec.power_state}")
    return found


def _has_booted(old: VM, new: VM) -> bool:
    """Return whether a change is the first report of a guest that was started, at first or for a newer generation."""
    before, after = old.state, new.state
    if after.status != "running" or new.spec.power_state != "running":
        return False
    is_newer = after.observed_generation > before.observed_generation and new.condition("running")
    return before.status != "running" or is_newer


def ended_vm(vm: VM, now: datetime.datetime) -> EndedVM:
    """Return the entry in the history of a VM that was deleted now."""
    return EndedVM(
        name=vm.name,
        uid=vm.uid,
        created_by=vm.meta.created_by,
        metadata=vm.spec.metadata,
        worker=vm.state.worker,
        image=vm.spec.image,
        created_at=vm.meta.created_at,
        assigned_at=vm.state.scheduled_at,
        started_at=vm.state.started_at,
        ended_at=now,
        status=vm.state.status,
        message=shortened(vm.state.status_message, _MAX_REASON),
        restarts=vm.state.restart_count,
    )


def _log_fields(ended: EndedVM) -> dict[str, object]:
    times = {
        "created": ended.created_at,
        "assigned": ended.assigned_at,
        "started": ended.started_at,
        "ended": ended.ended_at,
    }
    fields = {
        "vm": ended.name,
        "uid": ended.uid,
        "createdBy": ended.created_by,
        "metadata": shortened(dump_json(ended.metadata).decode(), _MAX_LOGGED) if ended.metadata else "",
        "worker": ended.worker,
        "image": ended.image,
        **{f"{name}At": format_time(when) for name, when in times.items() if when is not None},
        "status": ended.status,
        "reason": ended.message,
        "restarts": ended.restarts,
    }
    return {name: value for name, value in fields.items() if value != ""}
