"""The verbs that explain: `status` shows the fleet on one screen, `describe` why a VM waits and what would help."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchard.base.command_line import CommandLine
from orchard.cli.connection import AnswerError, ControllerConnection, path_of
from orchard.cli.options import add_context_option, add_output_option, add_resource_arguments
from orchard.cli.output import (
    format_age,
    format_clock,
    is_fancy,
    print_json,
    print_pairs,
    printable,
    repaint,
    with_message,
)
from orchard.cli.resources import RESOURCE_KINDS
from orchard.cli.session import open_connection

_TART_VMS = "org.cirruslabs.tart-vms"
# VMs of the queue, and events of a VM, that are shown.
_SHOWN = 10
_REPAINT_SECONDS = 2.0
# Part of a reason of decisions/waiting.py why a VM waits -> what would help.
_REMEDIES = {
    " has registered": "start a worker: orchard worker URL --bootstrap-token-stdin",
    " label ": "start a worker with that label, or create the VM without it",
    " arch ": "start a worker of that architecture, or create the VM with another --arch",
    " runtime ": "start a worker with that runtime, or create the VM with another --runtime",
    "support": "upgrade the workers, or create the VM without what they do not support",
    " large enough ": "start a larger worker, or ask for fewer resources",
    " lack": "wait, delete VMs that are not needed (orchard list vms), or add a worker",
    " paused": "orchard resume worker NAME",
    " being drained": "orchard drain worker NAME --cancel",
    " stopped": "start the worker again on its host",
    " offline": "see the log of the worker on its host",
    " disconnected": "see the log of the worker on its host",
    " not ready": "orchard describe worker NAME shows what fails there",
    " on which VMs fail": "orchard describe worker NAME shows what fails there",
    " free disk space": "free disk space on the workers (tart prune), or: orchard set cluster-settings --min-free-disk",
    " higher priority": "orchard update vm NAME --priority N",
}

_TITLES = {"vm": "VM", "worker": "worker"}

Object = Mapping[str, Any]


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `status`, `top` or `describe`."""
    if verb == "describe":
        add_resource_arguments(parser, "vm", "worker")
        parser.set_defaults(run=_describe)
    else:
        parser.set_defaults(run=_top if verb == "top" else _status)
    if verb != "top":
        add_output_option(parser, "text", "json")
    add_context_option(parser)


# ---- the fleet -------------------------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        fleet = _fleet(controller)
    if options.output == "json":
        print_json(fleet)
    else:
        print(*_lines(fleet), sep="\n")
    return 0


def _top(options: argparse.Namespace) -> int:
    """Show the fleet again and again: in place on a terminal, one below the other elsewhere."""
    with open_connection(options) as controller:
        while True:
            lines = _lines(_fleet(controller))
            if is_fancy(sys.stdout):
                repaint(lines)
            else:
                print(*lines, sep="\n", end="\n\n", flush=True)
            time.sleep(_REPAINT_SECONDS)


def _fleet(controller: ControllerConnection) -> Object:
    """Return workers and VMs by their states, the slots of online workers, the queue, and what needs attention."""
    workers, vms = controller.fetch_list("/workers"), controller.fetch_list("/vms")
    online = [worker for worker in workers if worker.get("state") == "online"]
    waiting = sorted(filter(_waits, vms), key=_age_order)
    fields = ("name", "createdAt", "priority", "status_message")
    return {
        "workers": Counter(str(worker.get("state") or "unknown") for worker in workers),
        "tartVMs": {key: sum(worker.get(field, {}).get(_TART_VMS, 0) for worker in online)
                    for key, field in (("used", "used"), ("offered", "resources"))},
        "vms": Counter(vm["status"] for vm in vms),
        "waiting": [{field: vm[field] for field in fields if field in vm} for vm in waiting],
        "attention": list(_attention(workers, vms)),
    }  # fmt: skip


def _lines(fleet: Object) -> Iterator[str]:
    """Yield the lines that show the fleet."""
    yield f"Workers: {_counts(fleet['workers'])}"
    if fleet["tartVMs"]["offered"]:
        yield f"Tart VMs: {fleet['tartVMs']['used']} of {fleet['tartVMs']['offered']} in use on online workers"
    yield f"VMs: {_counts(fleet['vms'])}"
    waiting, attention = fleet["waiting"], fleet["attention"]
    if waiting:
        yield ""
        yield f"Waiting: {len(waiting)}"
        for vm in waiting[:_SHOWN]:
            yield with_message(f"  {vm['name']}, {format_age(vm.get('createdAt'))}: ", vm.get("status_message", ""))
        if len(waiting) > _SHOWN:
            yield f"  and {len(waiting) - _SHOWN} more"
    if attention:
        yield ""
        yield "Needs attention:"
        for one in attention:
            yield with_message(f'  {_TITLES[one["kind"]]} "{one["name"]}" ', one["message"])


def _age_order(vm: Object) -> tuple[int, str]:
    return -vm.get("priority", 0), vm.get("createdAt", "")


def _counts(counts: Mapping[str, int]) -> str:
    named = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    return f"{sum(counts.values())} ({named})" if counts else "0"


def _attention(workers: Sequence[Object], vms: Sequence[Object]) -> Iterator[Object]:
    """Yield kind and name of what needs attention, and a message that goes on behind the name."""
    for worker in workers:
        told = []
        if worker.get("state") == "offline":
            told.append(f"is offline, last seen {format_age(worker.get('last_seen'))}")
        problems = (worker.get("health") or {}).get("problems") or ()
        told += [f"has a problem: {problem.get('what')}: {problem.get('message')}" for problem in problems]
        yield from ({"kind": "worker", "name": worker["name"], "message": message} for message in told)
    for vm in [vm for vm in vms if vm["status"] == "failed"][:_SHOWN]:
        yield {"kind": "vm", "name": vm["name"], "message": f"has failed: {vm.get('status_message', '')}"}


# ---- one of them -----------------------------------------------------------------------------------------------------


def _describe(options: argparse.Namespace) -> int:
    kind = RESOURCE_KINDS[options.kind]
    with open_connection(options) as controller:
        item = controller.fetch("GET", path_of(kind.path, options.name))
        found: Object = (
            {"vm": item, "remedies": _remedies(item), "events": _life(controller, options.name)}
            if options.kind == "vm"
            else {
                "worker": item,
                "vms": [vm for vm in controller.fetch_list("/vms") if vm.get("worker") == options.name],
            }
        )
    if options.output == "json":
        print_json(found)
        return 0
    print_pairs((title, text) for title, text in kind.describe(item) if text)
    if options.kind == "vm":
        _explain(item, found["remedies"])
        _print_life(found["events"])
    else:
        _print_vms(found["vms"])
    return 0


def remedies_for(reason: str) -> list[str]:
    """Return what would help a VM that waits for this reason."""
    return list(dict.fromkeys(remedy for part, remedy in _REMEDIES.items() if part in reason))


def _waits(vm: Object) -> bool:
    return vm["status"] == "pending" and not vm.get("worker")


def _remedies(vm: Object) -> list[str]:
    """Return what would help a VM, if it waits."""
    return remedies_for(vm.get("status_message", "")) if _waits(vm) else []


def _explain(vm: Object, remedies: Sequence[str]) -> None:
    """Print why a VM waits, and what would help."""
    if _waits(vm):
        reason = printable(vm.get("status_message", "")) or "it was created a moment ago"
        print(f"\nIt waits for a worker: {reason}")
    if remedies:
        print("What would help:", *remedies, sep="\n  ")


def _life(controller: ControllerConnection, name: str) -> list[Object]:
    """Return the last lifecycle events of a VM; none from a controller that has none."""
    query = {"kinds": "lifecycle", "order": "desc", "limit": str(_SHOWN)}
    try:
        events = controller.fetch_list(path_of("vms", name, "events"), query=query)
    except AnswerError:
        return []
    # A controller that does not know `kinds` answers with the script's output.
    return [event for event in reversed(events) if event.get("kind") == "lifecycle"]


def _print_life(events: Sequence[Object]) -> None:
    if events:
        print("\nEvents:")
        for event in events:
            print(f"  {format_clock(event.get('timestamp', 0))} {printable(event.get('payload', ''))}")


def _print_vms(vms: Sequence[Object]) -> None:
    if vms:
        print("\nIts VMs:")
        for vm in vms:
            print(f"  {vm['name']}: {vm['status']} {printable(vm.get('status_message', ''))}".rstrip())
