"""What fits a terminal: tables, messages behind names, and lists that are painted again; and the formats of `-o`."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.processes import call_main

from orchard.cli.connection import ControllerConnection
from orchard.cli.main import VERBS, main, make_parser
from orchard.cli.output import format_table, repaint, with_message

HEADER = ["Name", "Created", "Image", "Status", "Worker"]
NAMES = ["v", "runner-" + "7" * 40, "虚拟机" * 4]
IMAGES = ["i", "ghcr.io/org/" + "image" * 20]
WORKERS = ["", "mac-mini-of-a-long-name-12.example.com"]
ROWS = [[name, "12 seconds ago", image, "running", worker] for name in NAMES for image in IMAGES for worker in WORKERS]


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], _Screen]:
    """Return a terminal of so many columns and lines, as standard output."""

    def make(columns: int, lines: int = 24) -> _Screen:
        shown = _Screen()
        monkeypatch.setattr("sys.stdout", shown)
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, lines)))
        return shown

    return make


def cells(text: str) -> int:
    return sum(2 if char > "\u3000" else 1 for char in text)


@pytest.mark.parametrize("columns", range(4, 200, 7))
def test_table_fits_any_terminal_and_names_are_whole(screen: Callable[..., _Screen], columns: int) -> None:
    screen(columns)
    for row in ROWS:
        lines = list(format_table(HEADER, [row], cut="Image"))
        # A cell that is wider than the terminal, which wraps it, is alone on its line.
        widest = max(cells(text) for text in [*HEADER, *row[:2], *row[3:]]) + 4
        assert all(cells(line) <= max(columns, widest) for line in lines)
        whole = "\n".join(lines)
        assert all(cell in whole for cell in (row[0], row[1], row[3], row[4]))
        assert lines[0].startswith("Name")


def test_only_what_does_not_fit_is_on_a_further_line_or_cut(screen: Callable[..., _Screen]) -> None:
    screen(40)
    row = ["name", "now", "0123456789" * 3, "running", "mac"]
    assert list(format_table(HEADER, [row], cut="Image")) == [
        "Name  Created  Image             Status",
        "    Worker",
        "name  now      012345678901234…  running",
        "    mac",
    ]
    screen(200)
    assert len(list(format_table(HEADER, [row], cut="Image"))) == 2


def test_table_in_a_pipe_has_a_line_for_each_row() -> None:
    lines = list(format_table(HEADER, ROWS, cut="Image"))
    assert len(lines) == 1 + len(ROWS)
    assert all(IMAGES[1] in line or row[2] == "i" for row, line in zip(ROWS, lines[1:], strict=True))


@pytest.mark.parametrize("columns", [5, 30, 80])
def test_message_is_cut_and_what_stands_before_it_is_not(screen: Callable[..., _Screen], columns: int) -> None:
    name, message = "虚拟机-" + "n" * 20 + ": ", "waiting: no worker has label xcode=27 " * 3
    assert with_message(name, message) == name + message
    screen(columns)
    shown = with_message(name, message)
    assert shown.startswith(name)
    assert cells(shown) <= max(columns, cells(name) + 12)
    assert with_message(name, "short") == f"{name}short"


def test_painted_list_wraps_long_names_and_says_how_many_lines_are_missing(screen: Callable[..., _Screen]) -> None:
    shown = screen(20, 5)
    repaint(["n" * 45, "last"])
    assert shown.getvalue() == "\x1b[H\x1b[J" + "\n".join(["n" * 20, "n" * 20, "n" * 5, "last"])
    shown = screen(20, 5)
    repaint(["first", "n" * 45, "last"])
    assert shown.getvalue().splitlines()[-2:] == ["n" * 20, "and 2 more lines"]
    assert len(shown.getvalue().splitlines()) == 4


# ---- formats ---------------------------------------------------------------------------------------------------------

# What shows something, with an example, and the names that -o name prints; None where what is shown has no names.
SHOWING: dict[str, tuple[str, list[str] | None]] = {
    "status": ("", None),
    "describe": ("vm vm", None),
    "context list": ("", ["local-dev"]),
    "create token": ("vm vm", None),
    "list": ("vms", ["vm"]),
    "get": ("worker worker-1", ["worker-1"]),
    "events": ("vm vm", None),
    "watch": ("vms", None),
    "capacity": ("", None),
    "history": ("", ["ended"]),
    "sessions": ("", None),
    "version": ("", None),
    "doctor": ("client", None),
}
# What prints nothing, one bare value, names, progress, what something else has printed, or settings of another program.
PLAIN = {
    *(
        "top",
        "ui",
        "login",
        "context create",
        "context default",
        "context delete",
        "create vm",
        "create service-account",
    ),
    *(
        "delete",
        "update",
        "apply",
        "set",
        "rotate",
        "pause",
        "resume",
        "logs",
        "ssh",
        "exec",
        "cp",
        "port-forward",
        "vnc",
    ),
    *(
        "ssh-config",
        "__tunnel",
        "restart",
        "stop",
        "suspend",
        "start",
        "wait",
        "ip",
        "drain",
        "accept-state",
        "completion",
        "__complete",
    ),
    *("controller", "worker", "demo", "dev", "bootstrap-token", "store copy", "check"),
}


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each parser of the command that has options, by its words."""
    for verb in VERBS:
        parser = make_parser(verb)
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not below:
            yield verb, parser
        for action in below:
            yield from ((f"{verb} {name}", each) for name, each in action.choices.items())


def test_each_verb_that_shows_something_has_formats() -> None:
    found = dict(parsers())
    assert set(found) == set(SHOWING) | PLAIN
    for words, parser in found.items():
        formats = [
            set(action.choices or ())
            for action in parser._actions
            if "-o" in action.option_strings and "--output" in action.option_strings
        ]
        names = SHOWING.get(words, ("", None))[1]
        wanted = [{"json", *([] if names is None else ["name"])}] if words in SHOWING else []
        assert [each - {"table", "text", "token"} for each in formats] == wanted, words


def test_formats_for_programs_are_json_and_names(dev: Path, api: ControllerConnection) -> None:
    for name in ("ended", "vm"):
        api.call("POST", "/vms", body={"name": name, "image": "i"})
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    api.call("DELETE", "/vms/ended")
    for words, (rest, names) in SHOWING.items():
        line = [*words.split(), *rest.split()]
        if words != "watch":
            status, out, _ = call_main(main, *line, "-o", "json", home=dev)
            assert status == 0, words
            # Events are a line each, so that they can be read as they come.
            assert [json.loads(text) for text in (out.splitlines() if words == "events" else [out])], words
        if names is not None:
            status, out, said = call_main(main, *line, "-o", "name", home=dev)
            assert (status, said) == (0, ""), words
            assert set(names) <= set(out.splitlines()), words


def test_formats_of_the_fleet_and_of_a_waiting_vm_have_all_that_is_shown(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "waits", "image": "i", "labels": {"none": "here"}})
    fleet = json.loads(call_main(main, "status", "-o", "json", home=dev)[1])
    assert fleet["workers"] == {"online": 1}
    assert (fleet["vms"], [vm["name"] for vm in fleet["waiting"]]) == ({"pending": 1}, ["waits"])
    assert fleet["tartVMs"] == {"used": 0, "offered": 2}
    told = json.loads(call_main(main, "describe", "vm", "waits", "-o", "json", home=dev)[1])
    assert (told["vm"]["name"], len(told["remedies"]), told["events"][0]["kind"]) == ("waits", 1, "lifecycle")
    told = json.loads(call_main(main, "describe", "worker", "worker-1", "-o", "json", home=dev)[1])
    assert (told["worker"]["name"], told["vms"]) == ("worker-1", [])


@pytest.mark.parametrize("words", ["vm vm/status -o name", "bootstrap-token a -o json", "vm-access-token vm -o json"])
def test_format_that_a_bare_value_cannot_have_is_refused(dev: Path, words: str) -> None:
    status, out, said = call_main(main, "get", *words.split(), home=dev)
    assert (status, out, len(said.splitlines())) == (2, "", 1)


def test_field_is_json_where_json_is_asked_for(dev: Path) -> None:
    words = ("get", "worker", "worker-1/name")
    assert call_main(main, *words, home=dev)[1] == "worker-1\n"
    assert call_main(main, *words, "-o", "json", home=dev)[1] == '"worker-1"\n'
