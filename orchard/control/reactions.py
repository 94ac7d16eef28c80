"""The controller's reactions to durable changes.

They wake workers, end tunnels and the sessions of accounts, let the scheduling loop forget deleted objects, and log the
change. recorder.py records the lives of VMs, and logs their end.

A change that is not durable yet may be undone, so none of this happens earlier. Apart from the creation of a VM, whose
request has no name in its path, the log does not say here which account made a change: the request's own line does.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

from orchard.control.scheduling_loop import SchedulingLoop
from orchard.schema import VM
from orchard.sessions import AccountSessions
from orchard.state.changes import Change
from orchard.transitions import has_expired
from orchard.tunnel import Rendezvous

# The most new VMs that one log line names, so that a line stays below about 8 KiB.
_NAMES_PER_LINE = 64

_logger = logging.getLogger("orchard.controller")


class Reactions:
    """Reacts to durable changes. `clock` is the wall clock by which deadlines are stored."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        loop: SchedulingLoop,
        sessions: AccountSessions,
        clock: Callable[[], datetime.datetime],
    ) -> None:
        self._rendezvous = rendezvous
        self._loop = loop
        self._sessions = sessions
        self._clock = clock

    def react(self, changes: list[Change]) -> None:
        """React to what became durable together."""
        # A new VM has no worker to wake, and no tunnels.
        self._log_created([change.new for change in changes if change.old is None and isinstance(change.new, VM)])
        for change in changes:
            old, new = change.old, change.new
            if isinstance(old, VM):
                self._react_to_vm(old, new if isinstance(new, VM) else None)
            elif change.kind == "account" and old is not None:
                self._sessions.review(change.name, deleted=new is None)
            elif change.kind == "worker" and old is None:
                _logger.info("worker registered", extra={"worker": change.name})
            elif change.kind == "worker" and new is None:
                self._loop.forget_worker(change.name)
                _logger.info("worker deleted", extra={"worker": change.name})

    def _log_created(self, vms: list[VM]) -> None:
        """Log new VMs, in one line for each account of a group commit: a line for each VM is 4 % of the cost of its creation."""
        names: dict[str, list[str]] = {}
        for vm in vms:
            names.setdefault(vm.meta.created_by, []).append(vm.name)
        for account, created in names.items():
            for start in range(0, len(created), _NAMES_PER_LINE):
                fields = {"vm": ",".join(created[start : start + _NAMES_PER_LINE]), "createdBy": account or "-"}
                _logger.info("VM created", extra=fields)

    def _react_to_vm(self, old: VM, new: VM | None) -> None:
        for worker in workers_to_wake(old, new):
            self._rendezvous.sync(worker)
        if reason := tunnel_end_reason(old, new, self._clock()):
            self._rendezvous.end_tunnels(old.uid, reason)
        if new is None:
            self._loop.forget_vm(old.uid)
        else:
            self._log_change(old, new)

    def _log_change(self, old: VM, new: VM) -> None:
        before = old.state
        if new.state.restart_count != before.restart_count:
            _logger.info("VM restarted", extra={"vm": new.name, "restarts": new.state.restart_count})
        elif new.state.worker != before.worker:
            _logger.info("VM assigned", extra={"vm": new.name, "worker": new.state.worker})
        elif new.state.status != before.status:
            self._log_status(new)

    def _log_status(self, vm: VM) -> None:
        fields = {"vm": vm.name, "worker": vm.state.worker}
        if vm.state.status == "failed":
            _logger.info("VM failed", extra={**fields, "reason": vm.state.status_message})
        elif vm.state.status == "running":
            begun = vm.state.restarted_at or vm.meta.created_at
            seconds = 0.0 if begun is None else (self._clock() - begun).total_seconds()
            _logger.info("VM running", extra={**fields, "seconds": round(seconds, 1)})


def workers_to_wake(old: VM, new: VM | None) -> list[str]:
    """Return the names of the workers that have to look at their VMs because of a change.

    A worker that reported the change itself is not among them.
    """
    if new is not None and _asked_of_worker(old) == _asked_of_worker(new):
        return []
    return [vm.state.worker for vm in (old, new) if vm is not None and vm.state.worker]


def tunnel_end_reason(old: VM, new: VM | None, now: datetime.datetime) -> str:
    """Return why a change ends the tunnels to a VM, or "" if it does not."""
    if new is None:
        return f'VM "{old.name}" has expired' if has_expired(old, now) else f'VM "{old.name}" was deleted'
    if new.state.status == "failed" and old.state.status != "failed":
        return f'VM "{old.name}" has failed: {new.state.status_message}'
    return ""


def _asked_of_worker(vm: VM) -> tuple[object, ...]:
    """Return everything in a VM on which its worker acts."""
    return (vm.key, vm.state.worker, vm.meta.generation, vm.state.status == "failed")
