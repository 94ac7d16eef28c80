"""The verb `list`. With -w, it shows the list again after each change on a terminal, and adds each change elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchard.base.command_line import CommandLine
from orchard.cli.connection import path_of
from orchard.cli.failure import USAGE, CommandError, end_with_reader
from orchard.cli.options import add_context_option, add_filter_option, add_output_option
from orchard.cli.output import format_table, is_fancy, print_items, print_table, printable, repaint
from orchard.cli.resources import RESOURCE_KINDS, ResourceKind, find_kind
from orchard.cli.session import open_connection, require_capability

_KINDS = ("vms", "workers", "service-accounts")
# Shown as the state of an object that was deleted, or that the filter no longer selects.
_DELETED, _UNSELECTED = "deleted", "no longer matches"
_STATE_COLUMNS = ("Status", "State")


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `list`."""
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(_KINDS)}")
    parser.completions["kind"] = _KINDS
    parser.add_argument("-q", "--quiet", action="store_true", help="print the names alone")
    parser.add_argument("-w", "--watch", action="store_true",
        help="go on: show the list again after each change on a terminal, print each change elsewhere")  # fmt: skip
    add_filter_option(parser, "only the VMs that match,")
    add_output_option(parser, "table", "json", "name")
    add_context_option(parser)
    parser.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> int:
    kind = find_kind(options.kind, tuple(kind for kind in RESOURCE_KINDS.values() if kind.columns))
    if options.filter and kind.name != "vm":
        raise CommandError(f"--filter is for VMs, not for {kind.path}", USAGE)
    query = [("filter", text) for text in options.filter]
    if options.watch:
        if kind.name == "service-account" or options.quiet or options.output != "table":
            raise CommandError("-w shows vms or workers, without -q and -o; for JSON, see orchard watch --help", USAGE)
        return _watch_list(options, kind, query)
    with open_connection(options) as controller:
        if query:
            require_capability(controller, "vm-metadata", "--filter")
        items = controller.fetch_list(path_of(kind.path), query=query)
    if options.quiet or options.output != "table":
        print_items(items, "name" if options.quiet else options.output)
    else:
        rows = [[show(item) for show in kind.columns.values()] for item in items]
        print_table(list(kind.columns), rows, cut=kind.cut)
    return 0


class _List:
    """The present objects of one kind by name, and their lines."""

    def __init__(self, kind: ResourceKind, gone: str) -> None:
        self._kind = kind
        self._gone = gone
        self._items: dict[str, Mapping[str, Any]] = {}
        self._is_whole = False

    def begin(self) -> None:
        """Forget all objects. The watch begins anew with those that are there."""
        self._items.clear()
        self._is_whole = False

    def take(self, change: Mapping[str, Any]) -> None:
        """Apply a change, and show it."""
        if change["type"] == "BOOKMARK":
            if not self._is_whole:
                self._is_whole = True
                self._show_all()
            return
        item = change["object"]
        if change["type"] == "DELETED":
            self._items.pop(item["name"], None)
        else:
            self._items[item["name"]] = item
        if not self._is_whole:
            return
        # A transaction's last line has its revision: until then more follow at once.
        if not is_fancy(sys.stdout):
            print("  ".join(self._row(item, is_deleted=change["type"] == "DELETED")), flush=True)
        elif "revision" in change:
            self._show_all()

    def _show_all(self) -> None:
        rows = [self._row(item) for _, item in sorted(self._items.items())]
        lines = format_table(list(self._kind.columns), rows, cut=self._kind.cut)
        if is_fancy(sys.stdout):
            repaint(lines)
        else:
            print(*lines, sep="\n", flush=True)

    def _row(self, item: Mapping[str, Any], *, is_deleted: bool = False) -> list[str]:
        return [
            self._gone if is_deleted and name in _STATE_COLUMNS else printable(show(item))
            for name, show in self._kind.columns.items()
        ]


def _watch_list(options: argparse.Namespace, kind: ResourceKind, query: Sequence[tuple[str, str]]) -> int:
    """Show the list of a kind, and what becomes of it, until interrupted. Raises CommandError."""
    from orchard.cli.streams import changes

    shown = _List(kind, _UNSELECTED if query else _DELETED)
    with open_connection(options) as controller:
        require_capability(controller, "watch-list", "list -w")
        end_with_reader()
        for change in changes(controller, [("kinds", kind.path), *query]):
            if change is None:
                shown.begin()
            else:
                shown.take(change)
    return 0
