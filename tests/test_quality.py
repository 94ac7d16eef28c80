"""How the house is built: each room says what it is for, imports only from rooms below it, and catches what it can name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import orchard

PACKAGE = Path(orchard.__file__).parent
# From the ground up. A room may import from those before it, and from `orchard/__init__.py`, which holds the version.
ROOMS = (
    "codec",
    "schema",
    "scheduler",
    "lifecycle",
    "frames",
    "openapi",
    "auth",
    "presence",
    "groups",
    "logs",
    "options",
    "lock",
    "descriptors",
    "guard",
    "journal",
    "store",
    "events",
    "tls",
    "audit",
    "tcp",
    "pipe",
    "http1",
    "httpd",
    "transport",
    "client",
    "tunnel",
    "reach",
    "commands",
    "jump",
    "api",
    "controller",
    "ssh",
    "driver",
    "tart",
    "synthetic",
    "life",
    "worker",
    "testing",
    "pytest_plugin",
    "cli",
    "__main__",
)
# Those that decide, and leave it to others to do something.
PURE = ("codec", "schema", "scheduler", "lifecycle", "frames", "openapi", "auth", "presence")
MEANS = {
    *("asyncio", "fcntl", "io", "os", "pathlib", "random", "select", "shutil", "signal", "socket", "ssl"),
    *("subprocess", "tempfile", "threading", "time", "trio", "trio_websocket"),
}
# Who may import what does not come with Python. wsproto is what trio-websocket is built on.
OUTSIDE = {
    "h11": {"httpd", "transport"},
    "trio_websocket": {"http1", "httpd", "transport", "client", "tunnel", "commands", "api"},
    "wsproto": {"httpd", "transport"},
    "jwt": {"auth"},
    "websockets": {"frames"},  # of the extra orchard-cluster[fast]
    "pytest": {"pytest_plugin"},
    "asyncssh": {"jump", "commands"},  # of the extra orchard-cluster[ssh], as the next
    "trio_asyncio": {"jump", "commands"},
}
EXTRA = ("asyncssh", "trio_asyncio", "websockets")
# Where everything may be caught: each of the three logs it once and ends what it was the task of.
CAUGHT = {
    ("httpd", "Exception"),  # a connection
    ("life", "Exception"),  # the task of a VM
    ("worker", "Exception"),  # a session with the controller
    ("testing", "BaseException"),  # not caught at all: it is raised again in the thread that waits for it
}


@cache
def tree(room: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{room}.py").read_text())


def imported(room: str) -> Iterator[str]:
    """Every module that is imported anywhere in a room, by its full name."""
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}, line {node.lineno}: a relative import"
            if node.module == "orchard":
                yield from (f"orchard.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module or ""


def outside(room: str) -> set[str]:
    """The top-level names of what a room imports, Orchard itself left out."""
    return {name.partition(".")[0] for name in imported(room)} - {"orchard"}


def broad(handled: ast.expr | None) -> Iterator[str]:
    """Name what is too broad among the exceptions that a handler names."""
    if handled is None:
        yield "BaseException"
        return
    for node in ast.walk(handled):
        if isinstance(node, ast.Name) and node.id in ("Exception", "BaseException"):
            yield node.id


def test_the_rooms_are_those_that_are_there() -> None:
    assert len(set(ROOMS)) == len(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ROOMS)
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("room", ["__init__", *ROOMS])
def test_every_room_says_what_it_is_for(room: str) -> None:
    assert ast.get_docstring(tree(room))


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_from_one_above_it(room: str) -> None:
    below = {f"orchard.{name}" for name in ROOMS[: ROOMS.index(room)]}
    assert {name for name in imported(room) if name.startswith("orchard")} <= below


def test_the_package_itself_imports_nothing() -> None:
    assert list(imported("__init__")) == []


@pytest.mark.parametrize("room", ROOMS)
def test_what_does_not_come_with_python_is_imported_where_it_is_expected(room: str) -> None:
    foreign = outside(room) - sys.stdlib_module_names - {"trio"}
    assert foreign == {name for name, rooms in OUTSIDE.items() if room in rooms}


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_has_nothing_to_do_something_with(room: str) -> None:
    assert not outside(room) & MEANS
    assert not [node for node in ast.walk(tree(room)) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


def test_everything_is_caught_in_the_places_that_are_named_and_nowhere_else() -> None:
    found = []
    for room in ROOMS:
        for node in ast.walk(tree(room)):
            if isinstance(node, ast.ExceptHandler):
                found += [(room, name) for name in broad(node.type)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                found += [(room, name) for argument in node.args for name in broad(argument)]
    assert sorted(found) == sorted(CAUGHT)


def test_without_the_extra_everything_but_its_own_room_can_be_imported() -> None:
    rooms = [f"orchard.{room}" for room in ROOMS if room not in ("jump", "pytest_plugin", "__main__")]
    program = f"import sys; sys.modules.update(dict.fromkeys({EXTRA})); import {', '.join(rooms)}"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- the documentation ---------------------------------------------------------------------------------------------


def test_each_promise_names_tests_that_are_there() -> None:
    text = (PACKAGE.parent / "docs" / "promises.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, test in named:
        source = (PACKAGE.parent / file).read_text()
        assert not test or f"def {test}(" in source, f"{file} has no {test}"
