"""The layers of the package: who may import whom, what pure modules may use, and where any exception may be caught."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import orchard

PACKAGE = Path(orchard.__file__).parent
ROOT = PACKAGE.parent

# From the top down. A module may import from its own layer and from every layer below it, but for SEPARATE.
# A name with a slash at its end is a folder. Files of one layer, like files of one folder, have no import cycles.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("people", ("__main__", "cli/", "testing", "etcd_nodes", "pytest_plugin")),
    ("roles", ("controller", "control/", "operations", "api", "handlers/", "worker", "work/")),
    ("access", ("ssh/", "sessions", "tunnel", "client", "methods/", "blocking")),
    ("decisions", ("scheduler", "transitions", "auth", "decisions/")),
    ("state", ("store", "state/")),
    ("mechanisms", ("storage/", "vm/", "tart", "net/")),
    ("resources", ("schema", "codec", "resources/")),
    ("base", ("base/",)),
)
# Parts of one layer that do not import from each other.
SEPARATE = ({"storage/"}, {"vm/", "tart"}, {"net/"})
# But that etcd is reached over the network.
CLIENT_OF_ETCD = {"storage.etcd": {"net.tcp", "net.tls", "net.transport"}}
# Modules that decide and perform no I/O. A name with a slash at its end is a folder.
PURE = (
    *("auth", "codec", "schema", "scheduler", "transitions"),
    *("decisions/", "resources/"),
    *("base.metrics", "cli.diagnosis", "handlers.admission"),
    *("net.wsframes", "net.openapi", "net.urls"),
)
IO_MODULES = {
    *("asyncio", "fcntl", "io", "os", "pathlib", "random", "select", "shutil", "signal", "socket", "ssl"),
    *("subprocess", "tempfile", "threading", "time", "trio", "trio_websocket"),
}
# The modules that may import a package which does not come with Python (trio may be imported anywhere else).
OUTSIDE = {
    "h11": {"net.proxies", "net.request", "net.transport"},
    "trio_websocket": {
        *("net.request", "net.transport", "net.exchange", "net.websocket"),
        *("client", "methods.commands", "tunnel", "sessions", "ssh.exec", "handlers.workers"),
    },
    "jwt": {"decisions.access_tokens"},
    # The extra orchard-cluster[fast].
    "websockets": {"net.wsframes"},
    "pytest": {"pytest_plugin"},
    # The extra orchard-cluster[ssh].
    "asyncssh": {"ssh.jump", "ssh.exec", "ssh.connections", "ssh.synthetic_server"},
    "trio_asyncio": {"ssh.jump", "ssh.exec", "ssh.connections", "ssh.synthetic_server"},
}
EXTRAS = ("asyncssh", "trio_asyncio", "websockets")
# The only handlers of any exception. Each of the first three logs it and ends one connection, one VM's task, one session.
BROAD_HANDLERS = {
    ("net.server", "Exception"),
    ("vm.instance", "Exception"),
    ("worker", "Exception"),
    # Raise it again in the thread, or in the task, that waits for it.
    ("blocking", "Exception"),
    ("state.watchers", "Exception"),
}

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


@cache
def imported(module: str) -> frozenset[str]:
    """Return the full names of all modules that a module imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name.removeprefix("orchard.") in MODULES]
            found.update(modules)
            if len(modules) < len(names):
                found.add(node.module or "")
    return frozenset(found)


def own(module: str) -> set[str]:
    """Return the modules of the package that a module imports, without the leading `orchard.`."""
    return {name.removeprefix("orchard.") for name in imported(module) if name.startswith("orchard.")}


def outside(module: str) -> set[str]:
    """Return the top-level names of what a module imports from outside of the package."""
    return {name.partition(".")[0] for name in imported(module)} - {"orchard"}


def part(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    folder, dot, _ = module.partition(".")
    return f"{folder}/" if dot else module


def layer(module: str) -> int:
    return next(index for index, (_, parts) in enumerate(LAYERS) if part(module) in parts)


def broad(handled: ast.expr | None) -> Iterator[str]:
    """Yield the names among handled exceptions that match any exception."""
    if handled is None:
        yield "BaseException"
        return
    for node in ast.walk(handled):
        if isinstance(node, ast.Name) and node.id in ("Exception", "BaseException"):
            yield node.id


def test_every_module_belongs_to_exactly_one_layer() -> None:
    declared = [part for _, parts in LAYERS for part in parts]
    assert len(declared) == len(set(declared))
    assert {part(module) for module in MODULES} == set(declared)


def test_every_module_has_a_docstring() -> None:
    assert [module for module in MODULES if not ast.get_docstring(tree(module))] == []


def test_imports_go_downwards() -> None:
    assert [(module, name) for module in MODULES for name in own(module) if layer(name) < layer(module)] == []


def test_storage_vm_and_net_are_independent() -> None:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        mine = next((parts for parts in SEPARATE if part(module) in parts), None)
        foreign = set().union(*SEPARATE) - mine if mine else set()
        if names := {name for name in own(module) if part(name) in foreign}:
            found[module] = names
    assert found == CLIENT_OF_ETCD


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for name in own(module):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=lambda file: file.parent.name)
def test_a_package_file_imports_nothing(file: Path) -> None:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    # The package's own file handles Ctrl-C while the rest is imported.
    allowed = ["import signal", "import sys"] if file.parent == PACKAGE else []
    assert [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)] == allowed


def test_packages_from_outside_are_imported_where_declared() -> None:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        for name in outside(module) - sys.stdlib_module_names - {"trio"}:
            found.setdefault(name, set()).add(module)
    assert found == OUTSIDE


@pytest.mark.parametrize("module", [module for module in MODULES if module in PURE or part(module) in PURE])
def test_a_pure_module_performs_no_io(module: str) -> None:
    assert not outside(module) & IO_MODULES
    assert not [node for node in ast.walk(tree(module)) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


def public_names(module: str) -> Iterator[str]:
    """Yield the names without underscore that a module defines at its top level."""
    for node in tree(module).body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (part.id for each in targets for part in ast.walk(each) if isinstance(part, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def test_a_public_name_is_defined_in_one_file() -> None:
    """One name, one thing. `main` is the entry point of each program, `add_verb` that of each file with verbs of the
    command, and TYPE_CHECKING no name of ours.
    """
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for name in set(public_names(module)):
            if not name.startswith("_") and name not in ("main", "add_verb", "TYPE_CHECKING"):
                homes.setdefault(name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_any_exception_is_caught_only_where_declared() -> None:
    found = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ExceptHandler):
                found += [(module, name) for name in broad(node.type)]
            elif isinstance(node, ast.Call) and "suppress" in (
                getattr(node.func, "id", ""),
                getattr(node.func, "attr", ""),
            ):
                found += [(module, name) for argument in node.args for name in broad(argument)]
    assert sorted(found) == sorted(BROAD_HANDLERS)


@pytest.mark.slow
def test_everything_but_the_jump_host_imports_without_extras() -> None:
    modules = [f"orchard.{name}" for name in MODULES if name not in ("ssh.jump", "pytest_plugin", "__main__")]
    program = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_the_controller_imports_pyjwt() -> None:
    """Its import takes a tenth of a worker's start."""
    program = "import sys; sys.modules['jwt'] = None; import orchard.worker, orchard.client, orchard.cli.resources"
    subprocess.run([sys.executable, "-c", program], check=True)


SECRETS = {"access_key", "body", "command", "env", "password", "script_content", "secret", "token"}


def test_secrets_are_in_no_repr() -> None:
    found = []
    for module in MODULES:
        if module == "__main__":
            continue
        for kind in vars(importlib.import_module(f"orchard.{module}")).values():
            if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == f"orchard.{module}":
                found += [
                    f"{kind.__name__}.{field.name}"
                    for field in dataclasses.fields(kind)
                    if field.repr and field.name in SECRETS
                ]
    # That is the schema of a body.
    assert found == ["Operation.body"]


# ---- the documentation ---------------------------------------------------------------------------------------------


def test_every_test_named_in_the_promises_exists() -> None:
    text = (ROOT / "docs" / "promises.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, test in named:
        source = (ROOT / file).read_text()
        assert not test or f"def {test}(" in source, f"{file} has no {test}"
