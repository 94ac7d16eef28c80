"""The verbs that explain: `status` shows the fleet on one screen, `describe` why a VM waits and what would help."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchard.cli.connection import AnswerError, ControllerConnection, path_of
from orchard.cli.output import format_age, format_clock, is_fancy, print_pairs, printable, repaint
from orchard.cli.resources import RESOURCE_KINDS
from orchard.cli.session import add_context_option, open_connection
from orchard.command_line import CommandLine

_TART_VMS = "org.cirruslabs.tart-vms"
# VMs of the queue, and events of a VM, that are shown.
_SHOWN = 10
_REPAINT_SECONDS = 2.0
# Part of a reason of waiting.py why a VM waits -> what would help.
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

Object = Mapping[str, Any]


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `status`, `top` or `describe`."""
    if verb == "describe":
        parser.add_argument("kind", choices=("vm", "worker"))
        parser.add_argument("name", metavar="NAME")
        parser.set_defaults(run=_describe)
    else:
        parser.set_defaults(run=_top if verb == "top" else _status)
    add_context_option(parser)


# ---- the fleet -------------------------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        print(*_fleet(controller), sep="\n")
    return 0


def _top(options: argparse.Namespace) -> int:
    """Show the fleet again and again: in place on a terminal, one below the other elsewhere."""
    with open_connection(options) as controller:
        while True:
            lines = [printable(line) for line in _fleet(controller)]
            if is_fancy(sys.stdout):
                repaint(lines)
            else:
                print(*lines, sep="\n", end="\n\n", flush=True)
            time.sleep(_REPAINT_SECONDS)


def _fleet(controller: ControllerConnection) -> Iterator[str]:
    """Yield the lines that show workers, VMs, the queue and what needs attention."""
    workers, vms = controller.call("GET", "/workers"), controller.call("GET", "/vms")
    states = Counter(str(worker.get("state") or "unknown") for worker in workers)
    yield f"Workers: {len(workers)}{_counts(states)}"
    offered = sum(
        worker.get("resources", {}).get(_TART_VMS, 0) for worker in workers if worker.get("state") == "online"
    )
    used = sum(worker.get("used", {}).get(_TART_VMS, 0) for worker in workers if worker.get("state") == "online")
    if offered:
        yield f"Tart VMs: {used} of {offered} in use on online workers"
    yield f"VMs: {len(vms)}{_counts(Counter(vm['status'] for vm in vms))}"
    waiting = sorted((vm for vm in vms if vm["status"] == "pending" and not vm.get("worker")), key=_age_order)
    if waiting:
        yield ""
        yield f"Waiting: {len(waiting)}"
        yield from (
            f"  {vm['name']}, {format_age(vm.get('createdAt'))}: {vm.get('status_message', '')}"
            for vm in waiting[:_SHOWN]
        )
        if len(waiting) > _SHOWN:
            yield f"  and {len(waiting) - _SHOWN} more"
    attention = list(_attention(workers, vms))
    if attention:
        yield ""
        yield "Needs attention:"
        yield from (f"  {line}" for line in attention)


def _age_order(vm: Object) -> tuple[int, str]:
    return -vm.get("priority", 0), vm.get("createdAt", "")


def _counts(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{number} {name}' for name, number in sorted(counts.items()))})" if counts else ""


def _attention(workers: Sequence[Object], vms: Sequence[Object]) -> Iterator[str]:
    for worker in workers:
        if worker.get("state") == "offline":
            yield f'worker "{worker["name"]}" is offline, last seen {format_age(worker.get("last_seen"))}'
        for problem in (worker.get("health") or {}).get("problems") or ():
            yield f'worker "{worker["name"]}": {problem.get("what")}: {problem.get("message")}'
    for vm in [vm for vm in vms if vm["status"] == "failed"][:_SHOWN]:
        yield f'VM "{vm["name"]}" has failed: {vm.get("status_message", "")}'


# ---- one of them -----------------------------------------------------------------------------------------------------


def _describe(options: argparse.Namespace) -> int:
    kind = RESOURCE_KINDS[options.kind]
    with open_connection(options) as controller:
        item = controller.call("GET", path_of(kind.path, options.name))
        print_pairs((title, text) for title, show in kind.pairs.items() if (text := show(item)))
        if options.kind == "vm":
            _explain(item)
            _print_life(controller, options.name)
        else:
            _print_vms(controller, options.name)
    return 0


def remedies_for(reason: str) -> list[str]:
    """Return what would help a VM that waits for this reason."""
    return list(dict.fromkeys(remedy for part, remedy in _REMEDIES.items() if part in reason))


def _explain(vm: Object) -> None:
    """Print why a VM waits, and what would help."""
    reason = vm.get("status_message", "")
    if vm["status"] != "pending" or vm.get("worker"):
        return
    print(f"\nIt waits for a worker: {printable(reason) or 'it was created a moment ago'}")
    if helps := remedies_for(reason):
        print("What would help:", *helps, sep="\n  ")


def _print_life(controller: ControllerConnection, name: str) -> None:
    query = {"kinds": "lifecycle", "order": "desc", "limit": str(_SHOWN)}
    try:
        events = controller.call("GET", path_of("vms", name, "events"), query=query)
    except AnswerError:
        return
    # A controller that does not know `kinds` answers with the script's output.
    life = [event for event in reversed(events) if event.get("kind") == "lifecycle"]
    if life:
        print("\nEvents:")
        for event in life:
            print(f"  {format_clock(event.get('timestamp', 0))} {printable(event.get('payload', ''))}")


def _print_vms(controller: ControllerConnection, worker: str) -> None:
    vms = [vm for vm in controller.call("GET", "/vms") if vm.get("worker") == worker]
    if vms:
        print("\nIts VMs:")
        for vm in vms:
            print(f"  {vm['name']}: {vm['status']} {printable(vm.get('status_message', ''))}".rstrip())
