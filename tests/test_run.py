"""The script `run` where programs are missing, and the declarations of programs in the tests."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.programs import REASON, REQUIRE, ROOT_REASON, listed, need

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SYSTEM = ("basename", "cat", "cp", "dirname", "find", "grep", "mkdir", "rm", "sed", "sh")
# Stands for each tool of the environment, and prints how it was called.
TOOL = '#!/bin/sh\necho "$(basename "$0") $*"\n'
# Stands for Python. It makes environments that consist of itself, and its pip does what $PIP says.
PYTHON = """#!/bin/sh
[ "$1" = -c ] || echo "$(basename "$0") $*"
case "$2 ${PIP:-}" in
"venv "*)
    rm -rf "$4"
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
    cp "$0" "$4/bin/pip"
    ;;
"pip interrupted")
    kill -INT $PPID
    ;;
"pip fails") exit 1 ;;
esac
"""
APT_GET = '#!/bin/sh\necho "apt-get $*"\n[ "$1" = update ] || exit "${APT_STATUS:-0}"\n'


# ---- run -----------------------------------------------------------------------------------------------------------


class Machine:
    """A copy of `run` with an environment already made, on a machine that has the programs of `add` only."""

    def __init__(self, home: Path, user: int, system: str) -> None:
        self.project = home / "a project"
        self.programs = home / "bin"
        (self.project / "tests").mkdir(parents=True)
        (self.project / ".venv" / "bin").mkdir(parents=True)
        self.programs.mkdir()
        for name in ("run", "tests/programs.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project / name)
        for name in ("", "[test]"):
            (self.project / ".venv" / f"installed{name}").write_text(f"{self.project}\n")
        for name in ("python", "pip"):
            write_program(self.project / ".venv" / "bin" / name, TOOL)
        for name in SYSTEM:
            found = shutil.which(name)
            assert found is not None
            (self.programs / name).symlink_to(found)
        self.add("id", f"#!/bin/sh\necho {user}\n")
        self.add("uname", f"#!/bin/sh\necho {system}\n")

    def add(self, name: str, text: str = TOOL) -> None:
        write_program(self.programs / name, text)

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        # By a relative path, from another directory.
        return subprocess.run(
            ["/bin/sh", f"{self.project.name}/run", *words],
            cwd=self.project.parent,
            env={"PATH": str(self.programs), **env},
            capture_output=True,
            text=True,
            check=False,
        )


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def missing_packages(where: set[str]) -> list[str]:
    """Return the Debian packages of all programs whose tests can run there, in the order of the list."""
    return list(dict.fromkeys(program.package for program in listed().values() if program.where in where))


def test_missing_programs_are_installed_on_debian_as_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=0, system="Linux")
    machine.add("apt-get", APT_GET)
    done = machine.run("test")
    assert done.returncode == 0, done.stderr
    assert (
        f"apt-get install -y -qq --no-install-recommends {' '.join(missing_packages({'', 'Linux', 'root'}))}\n"
        in done.stderr
    )
    assert done.stdout.splitlines()[-1].startswith("python -m pytest ")
    for program in listed():
        machine.add(program)
    assert "apt-get" not in machine.run("test").stderr


@pytest.mark.parametrize(("system", "where"), [("Linux", {"", "Linux"}), ("Darwin", {""})])
def test_command_to_install_missing_programs_is_printed_for_other_users(
    tmp_path: Path, system: str, where: set[str]
) -> None:
    machine = Machine(tmp_path, user=1000, system=system)
    machine.add("apt-get", APT_GET)
    machine.add("rsync")
    done = machine.run("test", "-q")
    packages = [package for package in missing_packages(where) if package != "rsync"]
    assert done.returncode == 0, done.stderr
    assert f"sudo apt-get install {' '.join(packages)}\n" in done.stderr
    assert done.stdout.splitlines()[-1].endswith(" -q")


@pytest.mark.parametrize("apt_get", [False, True], ids=["absent", "failing"])
def test_tests_run_without_programs_that_cannot_be_installed(tmp_path: Path, apt_get: bool) -> None:
    machine = Machine(tmp_path, user=0, system="Linux")
    if apt_get:
        machine.add("apt-get", APT_GET)
    done = machine.run("test", APT_STATUS="100")
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("python -m pytest ")


@pytest.mark.parametrize("words", [(), ("--help",), ("",), ("part",), ("none",)])
def test_benchmarks_are_listed_where_none_is_named(words: tuple[str, ...], tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=1000, system="Linux")
    bench = machine.project / "bench"
    bench.mkdir()
    (bench / "some.py").write_text('"""What it measures.\n\n    ./run bench some [--fast]\n"""\n')
    (bench / "part.py").write_text('"""A part of some."""\n')
    done = machine.run("bench", *words)
    assert (done.returncode, [line.split() for line in done.stdout.splitlines()]) == (
        2,
        [["some", "What", "it", "measures."]],
    )
    assert machine.run("bench", "some", "--fast").stdout == "python bench/some.py --fast\n"


# ---- run: the environment ------------------------------------------------------------------------------------------


def new_clone(home: Path) -> Machine:
    """Return a machine with Python and a copy of `run` that was never used."""
    machine = Machine(home, user=1000, system="Linux")
    machine.add("python3", PYTHON)
    shutil.rmtree(machine.project / ".venv")
    return machine


def check_made_anew(done: subprocess.CompletedProcess[str], machine: Machine) -> None:
    """Check that a run of `demo` succeeded in an environment that it made anew."""
    assert (done.returncode, done.stdout) == (0, "python -P -m orchard demo\n"), done.stderr
    assert not (machine.project / ".venv" / "old").exists()
    again = machine.run("demo")
    assert (again.returncode, again.stderr) == (0, ""), "the second run installs again"


@pytest.mark.parametrize(("pip", "status"), [("interrupted", 130), ("fails", 1)])
def test_environment_whose_installation_did_not_succeed_is_made_anew(tmp_path: Path, pip: str, status: int) -> None:
    machine = new_clone(tmp_path)
    refused = machine.run("demo", PIP=pip)
    assert (refused.returncode, refused.stdout) == (status, ""), refused.stderr
    assert ("PIP_FIND_LINKS" in refused.stderr) == (status == 1)
    (machine.project / ".venv" / "old").touch()
    check_made_anew(machine.run("demo"), machine)


def test_environment_whose_making_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    machine = new_clone(tmp_path)
    (machine.project / ".venv" / "bin").mkdir(parents=True)
    (machine.project / ".venv" / "old").touch()
    write_program(machine.project / ".venv" / "bin" / "python", PYTHON)
    check_made_anew(machine.run("demo"), machine)


@pytest.mark.parametrize(
    ("present", "verb", "installs"),
    [
        ("[test]", "demo", False),
        ("", "demo", False),
        ("", "bench", True),
        ("none", "demo", True),
        ("old", "demo", True),
    ],
)
def test_environment_is_installed_once_and_that_of_tests_serves_all(
    present: str, verb: str, installs: bool, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, user=1000, system="Linux")
    for name in ("", "[test]"):
        stamp = machine.project / ".venv" / f"installed{name}"
        if present == "old":
            # Older than pyproject.toml.
            os.utime(stamp, (0, 0))
        elif name != present:
            stamp.unlink()
    # pip prints to standard error.
    assert ("python -m pip install" in machine.run(verb).stderr) is installs


@pytest.mark.parametrize("verb", ["demo", "orchard", "python"])
def test_commands_run_in_the_directory_of_their_caller(tmp_path: Path, verb: str) -> None:
    machine = Machine(tmp_path, user=1000, system="Linux")
    write_program(machine.project / ".venv" / "bin" / "python", '#!/bin/sh\necho "$PWD"\n')
    assert machine.run(verb).stdout == f"{tmp_path}\n"


def test_run_without_a_verb_prints_its_usage(tmp_path: Path) -> None:
    done = Machine(tmp_path, user=1000, system="Linux").run()
    assert done.returncode == 2
    assert "./run test" in done.stdout


def test_run_without_a_suitable_python_says_how_to_name_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=1000, system="Linux")
    shutil.rmtree(machine.project / ".venv")
    for env in ({}, {"PYTHON": "/none/python3"}):
        done = machine.run("demo", **env)
        assert (done.returncode, done.stdout) == (1, "")
        assert "PYTHON=" in done.stderr
        assert not (machine.project / ".venv").exists()


# ---- declarations --------------------------------------------------------------------------------------------------


def test_missing_program_skips_its_test_or_fails_it_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(REQUIRE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=f"{REASON} ssh, scp .*apt-get install openssh-client\\)"):
        need("ssh", "scp")
    monkeypatch.setenv(REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match=f"{REASON} ssh "):
        need("ssh")
    for name in ("ssh", "scp"):
        write_program(tmp_path / name, TOOL)
    need("ssh", "scp")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the tests for root do not run")
def test_tests_for_root_are_skipped_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv(REQUIRE, "1")
    with pytest.raises(pytest.skip.Exception, match=f"{ROOT_REASON}: runs ip, nsenter"):
        need("ip", "nsenter")


def declared(nodes: list[ast.AST]) -> set[str]:
    """Return the programs that calls of `need` and marks `needs` name in a file."""
    return {
        constant.value
        for call in nodes
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("need", "pytest.mark.needs")
        for constant in ast.walk(call)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }


def commands(nodes: list[ast.AST]) -> set[str]:
    """Return the first words of lists and of calls of methods `run` and `call`, which are programs or something else."""
    words = [node.elts for node in nodes if isinstance(node, ast.List)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    words += [call.args for call in calls if call.func.attr in ("run", "call")]  # type: ignore[attr-defined]
    firsts = [several[0] for several in words if several]
    return {first.value for first in firsts if isinstance(first, ast.Constant) and isinstance(first.value, str)}


@pytest.mark.slow
def test_every_program_that_tests_run_is_declared_and_listed() -> None:
    texts = {path: path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__)}
    named = re.compile(f'"(?:{"|".join(map(re.escape, listed()))})"')
    found: set[str] = set()
    for path, text in texts.items():
        # Others name no program, and take longest to parse.
        if not named.search(text) and "need" not in text:
            continue
        nodes = list(ast.walk(ast.parse(text)))
        declarations = declared(nodes)
        found |= declarations
        assert declarations <= set(listed()), path
        run = commands(nodes) & set(listed())
        if path.name in ("test_tart.py", "test_guest_agent.py"):
            # A verb of tart, too.
            run -= {"ip"}
        assert run <= declarations, f"{path} runs {run}: mark these tests with pytest.mark.needs"
    assert found == set(listed())
