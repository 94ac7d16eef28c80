"""The verbs that print what comes: logs, events, watch."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchard.base.command_line import CommandLine, parse_count, parse_duration
from orchard.cli.connection import AnswerError, ControllerConnection, path_of
from orchard.cli.failure import end_with_reader
from orchard.cli.options import add_context_option, add_filter_option, add_output_option, add_resource_arguments
from orchard.cli.output import format_clock, print_compact_json, print_line, printable
from orchard.cli.session import open_connection, require_capability

# Events of one answer.
_PAGE = 1000
_NOT_FOUND, _GONE = 404, 410


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `logs`, `events` or `watch`."""
    if verb == "watch":
        parser.add_argument("kinds", metavar="KIND", nargs="*", help="vms or workers; default: both")
        parser.completions["kinds"] = ("vms", "workers")
        add_filter_option(parser, "only what matches,")
        add_output_option(parser, "table", "json")
        parser.set_defaults(run=_watch)
    else:
        add_resource_arguments(parser, "vm")
        parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
        parser.add_argument(
            "--since", metavar="D", type=parse_duration, help="only what is not older than this, for example 5m"
        )
        if verb == "logs":
            parser.add_argument("--tail", metavar="N", type=parse_count, help="only the last N lines, the newest first")
            parser.set_defaults(run=_print_log)
        else:
            add_output_option(parser, "table", "json")
            parser.set_defaults(run=_print_events)
    add_context_option(parser)


def _print_log(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        if options.tail is not None and not options.follow:
            query = {"limit": str(options.tail), "order": "desc"}
            for event in controller.fetch_list(path_of("vms", options.name, "events"), query=query):
                print_line(event.get("payload", ""))
            return 0
        for line in _events(controller, options, "log_line"):
            print_line(line.get("payload", ""))
    return 0


def _print_events(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        for event in _events(controller, options, "log_line,lifecycle"):
            if options.output == "json":
                print_compact_json(event)
            else:
                mark = "-" if event.get("kind") == "lifecycle" else "|"
                print_line(f"{format_clock(event.get('timestamp', 0))} {mark} {event.get('payload', '')}")
    return 0


def _events(controller: ControllerConnection, options: argparse.Namespace, kinds: str) -> Iterator[Mapping[str, Any]]:
    """Yield the events of a VM that the options ask for, in order."""
    path = path_of("vms", options.name, "events")
    query = {} if kinds == "log_line" else {"kinds": kinds}
    if query or options.follow:
        require_capability(controller, "events-follow", "this")
    if options.follow:
        end_with_reader()
    since = 0.0 if options.since is None else time.time() - options.since
    found = _followed(controller, path, query) if options.follow else _paged(controller, path, query)
    return (event for event in found if event.get("timestamp", 0) >= since)


def _paged(controller: ControllerConnection, path: str, query: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    cursor = ""
    while True:
        asked = {**query, "limit": str(_PAGE), "order": "asc", **({"cursor": cursor} if cursor else {})}
        yield from controller.fetch_list(path, query=asked)
        cursor = controller.headers.get("X-Next-Cursor", "")
        if not cursor:
            return


def _followed(controller: ControllerConnection, path: str, query: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """Yield events until the VM ends, over restarts of the controller."""
    asked = {**query, "follow": "true"}
    begun = False
    try:
        for event in controller.resumed_lines(path, lambda: asked, may_end=True):
            begun = True
            asked["cursor"] = event.get("cursor", "")
            yield event
    except AnswerError as error:
        # The VM was deleted while the connection was lost.
        if not begun or error.status_code != _NOT_FOUND:
            raise


def _watch(options: argparse.Namespace) -> int:
    query = [("kinds", ",".join(options.kinds) or "vms,workers"), *(("filter", text) for text in options.filter)]
    with open_connection(options) as controller:
        require_capability(controller, "watch-list", "watch")
        end_with_reader()
        for change in changes(controller, query):
            if change is not None:
                _print_change(change, options.output)
    return 0


def changes(controller: ControllerConnection, query: Sequence[tuple[str, str]]) -> Iterator[Mapping[str, Any] | None]:
    """Yield each change of a watch, over restarts of the controller; None where it begins anew with all objects."""
    since = ""
    # How often the watch began with all objects, and of how many of these beginnings the caller knows.
    begins, known = 0, 1

    def make_query() -> list[tuple[str, str]]:
        nonlocal begins
        begins += not since
        return [*query, *([("since", since)] if since else [])]

    while True:
        try:
            for change in controller.resumed_lines("/watch", make_query):
                if begins > known:
                    known = begins
                    yield None
                since = change.get("revision", since)
                yield change
        except AnswerError as error:
            if error.status_code != _GONE:
                raise
            since = ""


def _print_change(change: Mapping[str, Any], output: str) -> None:
    if output == "json":
        print_compact_json(change)
        return
    if change["type"] == "BOOKMARK":
        return
    item = change["object"]
    state = item.get("status") or item.get("state") or ""
    words = [
        change["kind"].removesuffix("s"),
        item["name"],
        state,
        item.get("worker", ""),
        item.get("status_message", ""),
    ]
    clock = format_clock(datetime.datetime.now(datetime.UTC).timestamp())
    print_line(printable(" ".join([clock, change["type"].lower(), *(word for word in words if word)])))
