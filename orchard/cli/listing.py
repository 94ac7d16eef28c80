"""`list -w`: a list that is shown again after each change on a terminal, and to which each change is added elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from orchard.cli.output import format_table, is_fancy, printable, repaint
from orchard.cli.resources import ResourceKind
from orchard.cli.session import open_connection, require_capability
from orchard.cli.streams import changes

# What a row of something that is deleted shows in the column of its state.
_DELETED = "deleted"
_STATE_COLUMNS = ("Status", "State")


class _List:
    """The present objects of one kind by name, and their lines."""

    def __init__(self, kind: ResourceKind) -> None:
        self._kind = kind
        self._items: dict[str, Mapping[str, Any]] = {}
        self._is_whole = False

    def begin(self) -> None:
        """Forget all: the present objects come again."""
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
            _DELETED if is_deleted and name in _STATE_COLUMNS else printable(show(item))
            for name, show in self._kind.columns.items()
        ]


def watch_list(options: argparse.Namespace, kind: ResourceKind) -> int:
    """Show the list of a kind, and what becomes of it, until interrupted. Raises CommandError."""
    shown = _List(kind)
    with open_connection(options) as controller:
        require_capability(controller, "watch-list", "list -w")
        for change in changes(controller, [("kinds", kind.path)]):
            if change is None:
                shown.begin()
            else:
                shown.take(change)
    return 0
