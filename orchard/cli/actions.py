"""The verbs that act on one resource or ask for one fact: restart, stop, suspend, start, wait, ip, drain, capacity, ..."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping

from orchard.base.command_line import CommandLine, parse_count, parse_duration, parse_pairs, parse_resources, parse_span
from orchard.cli.connection import ANSWER_SECONDS, AnswerError, Outage, path_of
from orchard.cli.failure import OVERDUE, CommandError, NetworkError
from orchard.cli.options import add_context_option, add_output_option, add_resource_arguments, add_wait_option
from orchard.cli.output import format_age, format_json_value, print_items, print_json, print_pairs, print_table
from orchard.cli.session import open_connection, require_capability

_POWER_STATES = {"stop": "stopped", "suspend": "suspended", "start": "running"}
_WAITING = ("running", "ready", "failed", "stopped", "deleted")
# The longest wait that one request may ask for, so that a restart of the controller is noticed.
_MAX_WAIT = 60
# Between two looks at a worker that is being drained.
_POLL_SECONDS = 1.0


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of one of these verbs."""
    _DECLARATIONS[verb](parser)
    add_context_option(parser)
    parser.set_defaults(verb=verb)


def _declare_power(parser: CommandLine) -> None:
    add_resource_arguments(parser, "vm")
    parser.set_defaults(run=_set_power)


def _set_power(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        path = path_of("vms", options.name)
        controller.call("PATCH", path, body={"powerState": _POWER_STATES[options.verb]})
    return 0


def _declare_restart(parser: CommandLine) -> None:
    add_resource_arguments(parser, "vm")
    parser.set_defaults(run=_restart)


def _restart(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        require_capability(controller, "vm-restart", "restart")
        controller.call("POST", path_of("vms", options.name, "restart"))
    return 0


def _declare_wait(parser: CommandLine) -> None:
    add_resource_arguments(parser, "vm")
    parser.add_argument("--for", dest="state", choices=_WAITING, default="ready", help="default: %(default)s")
    parser.add_argument("--timeout", metavar="D", type=parse_duration, help="give up, with exit status 124")
    parser.set_defaults(run=_wait)


def _wait(options: argparse.Namespace) -> int:
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    outage = Outage()
    with open_connection(options, seconds=_MAX_WAIT + ANSWER_SECONDS) as controller:
        require_capability(controller, "wait-for", "wait")
        query = {"waitFor": options.state, "uid": controller.fetch("GET", path_of("vms", options.name))["uid"]}
        while True:
            left = _MAX_WAIT if deadline is None else max(0, min(_MAX_WAIT, math.ceil(deadline - time.monotonic())))
            asked_at = time.monotonic()
            try:
                controller.call("GET", path_of("vms", options.name), query={**query, "wait": str(left)})
                return 0
            except (AnswerError, NetworkError) as error:
                # A controller says by Retry-After that it may still come true.
                if isinstance(error, AnswerError) and error.status_code == 503 and not error.may_retry:
                    raise
                if deadline is not None and time.monotonic() >= deadline:
                    raise CommandError(str(error), OVERDUE) from None
                if isinstance(error, AnswerError) and time.monotonic() - asked_at >= left:
                    outage.end()
                else:
                    outage.bear(error)


def _declare_ip(parser: CommandLine) -> None:
    add_resource_arguments(parser, "vm")
    add_wait_option(parser, "-t")
    parser.set_defaults(run=_print_ip)


def _print_ip(options: argparse.Namespace) -> int:
    with open_connection(options, seconds=options.wait + 30) as controller:
        print(controller.fetch("GET", path_of("vms", options.name, "ip"), query={"wait": str(options.wait)})["ip"])
    return 0


def _declare_drain(parser: CommandLine) -> None:
    add_resource_arguments(parser, "worker")
    parser.add_argument(
        "--deadline", metavar="D", type=parse_span, default=0, help="after this time its VMs are ended; default: never"
    )
    parser.add_argument("--now", action="store_true", help="end its VMs at once")
    parser.add_argument("--cancel", action="store_true", help="let it have new VMs again")
    parser.add_argument("--wait", action="store_true", help="wait until no VM is left on it")
    parser.add_argument("--timeout", metavar="D", type=parse_duration, help="give up waiting, with exit status 124")
    parser.set_defaults(run=_drain)


def _drain(options: argparse.Namespace) -> int:
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    with open_connection(options) as controller:
        require_capability(controller, "drain", "drain")
        path = path_of("workers", options.name, "drain")
        if options.cancel:
            controller.call("DELETE", path)
            return 0
        controller.call("POST", path, body={"now": True} if options.now else {"deadlineSeconds": options.deadline})
        while options.wait and controller.fetch("GET", path_of("workers", options.name)).get("state") != "drained":
            if deadline is not None and time.monotonic() >= deadline:
                raise CommandError(f'worker "{options.name}" still has VMs after {options.timeout} seconds', OVERDUE)
            time.sleep(_POLL_SECONDS)
    return 0


def _declare_capacity(parser: CommandLine) -> None:
    parser.add_argument("--resources", metavar="K=N,..", type=parse_resources, default={})
    parser.add_argument("--labels", metavar="K=V,..", type=parse_pairs, default={})
    for name in ("arch", "runtime", "os"):
        parser.add_argument(f"--{name}", default="")
    add_output_option(parser, "table", "json")
    parser.set_defaults(run=_show_capacity)


def _show_capacity(options: argparse.Namespace) -> int:
    query = {name: getattr(options, name) for name in ("arch", "runtime", "os") if getattr(options, name)}
    for name in ("resources", "labels"):
        if pairs := getattr(options, name):
            query[name] = ",".join(f"{key}={value}" for key, value in pairs.items())
    with open_connection(options) as controller:
        require_capability(controller, "capacity", "capacity")
        found = controller.fetch("GET", "/capacity", query=query)
    if options.output == "json":
        print_json(found)
    else:
        print_pairs((name, format_json_value(value)) for name, value in found.items())
    return 0


def _declare_history(parser: CommandLine) -> None:
    parser.add_argument("--limit", metavar="N", type=parse_count, default=50,
                        help="at most so many, the last ones, or the first ones since TIME; default: %(default)s")  # fmt: skip
    parser.add_argument("--since", metavar="TIME", default="", help="RFC 3339")
    add_output_option(parser, "table", "json", "name")
    parser.set_defaults(run=_show_history)


def _show_history(options: argparse.Namespace) -> int:
    query = {"limit": str(options.limit), **({"since": options.since} if options.since else {})}
    with open_connection(options) as controller:
        require_capability(controller, "history", "history")
        ended = controller.fetch_list("/history", query=query)
    if options.output != "table":
        print_items(ended, options.output)
        return 0
    rows = [
        (
            str(one.get("name", "")),
            format_age(one.get("endedAt")),
            str(one.get("status", "")),
            str(one.get("worker", "")),
            str(one.get("createdBy", "")),
            str(one.get("message", "")),
        )
        for one in ended
    ]
    print_table(("Name", "Ended", "Status", "Worker", "Created by", "Message"), rows, cut="Message")
    return 0


def _declare_accept_state(parser: CommandLine) -> None:
    parser.set_defaults(run=_accept_state)


def _accept_state(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        require_capability(controller, "worker-state", "accept-state")
        controller.call("POST", "/controller/accept-state")
    return 0


def _declare_sessions(parser: CommandLine) -> None:
    add_output_option(parser, "table", "json")
    parser.set_defaults(run=_show_sessions)


def _show_sessions(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        require_capability(controller, "sessions", "sessions")
        found = controller.fetch_list("/controller/sessions")
    if options.output == "json":
        print_json(found)
        return 0
    fields = ("account", "kind", "target", "peer")
    rows = [[*(str(one.get(field, "")) for field in fields), format_age(one.get("since"))] for one in found]
    print_table(("Account", "Kind", "Target", "From", "Since"), rows)
    return 0


_DECLARATIONS: Mapping[str, Callable[[CommandLine], None]] = {
    **dict.fromkeys(_POWER_STATES, _declare_power),
    "restart": _declare_restart,
    "wait": _declare_wait,
    "ip": _declare_ip,
    "drain": _declare_drain,
    "capacity": _declare_capacity,
    "history": _declare_history,
    "sessions": _declare_sessions,
    "accept-state": _declare_accept_state,
}
