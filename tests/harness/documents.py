"""The blocks of the documentation, and the sessions that run them. tests/README.md has the convention.

`blocks` reads a page, `Session` is a shell that runs its commands, `mask` removes what differs from run to run, and
`check_syntax` looks at commands that this machine cannot run.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import trio

from harness.machines import MACHINE_PATH, Machine
from harness.processes import ORCHARD, call_main, eventually, free_port
from harness.starts import write_forking_program
from orchard import client, schema
from orchard.base.command_line import CommandLine
from orchard.cli import main as command
from orchard.cli.context import CONTEXT_FILE, Context, Contexts, write_contexts
from orchard.client import Client
from orchard.testing import Cluster

ROOT = Path(__file__).parent.parent.parent
SHELL = {"sh", "console"}
# Why a block is not run: it needs macOS or the internet, or it runs the tests.
ELSEWHERE = {"macos", "internet", "itself"}
BACKGROUND = "background"
# Ports in the pages. A session has free ones in their place.
PORTS = ("6120", "2222", "8000", "8080")
# The controller's host in the pages, and what stands for it.
HOST, HERE = "controller.example.com", "localhost"
# For one block, on a busy machine.
BLOCK_SECONDS = 120
# For the end of what a session has started.
END_SECONDS = 10
# What ends the output of a command.
END = "=-=-="

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# What differs from run to run, and what is compared in its place.
_MASKS = [
    (re.compile(pattern), mask)
    for pattern, mask in (
        (r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", "UID"),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:[\d.]+(?:Z|[+-]\d\d:\d\d)?", "TIME"),
        (r"\b(?:[0-9A-F]{2}:){19,}[0-9A-F]{2}\b", "FINGERPRINT"),
        (r"\b\d\d:\d\d:\d\d\b", "TIME"),
        (r"\bnow\b|\b(?:in )?\d+ (?:second|minute|hour|day)s?(?: ago)?\b", "AGO"),
        (r"\b\d+(?:\.\d+)? ?m?s\b", "SECONDS"),
        (r"\borchard-bootstrap-token-v0\.[\w.-]+", "TOKEN"),
        (r"\b[\w-]{31,}(?:\.[\w-]+)*", "TOKEN"),
        (r"(?<![\d.])\d+\.\d+\.\d+(?![\d.])", "VERSION"),
        # Columns are as wide as what they hold.
        (r"(?<=\S) {2,}", "  "),
        (r"(?m) +$", ""),
    )
]


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the word behind it, its text, and where it is."""

    page: Path
    line: int
    language: str
    word: str
    text: str
    # Machines of the page that run the block, by their names; () stands for the first.
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_file(self) -> bool:
        return "." in self.word or "/" in self.word

    @property
    def is_run(self) -> bool:
        return self.language in {*SHELL, "python"} and self.word not in ELSEWHERE and not self.is_file

    def commands(self) -> list[tuple[str, str]]:
        """Return each command of a `console` block, and the output that is shown below it."""
        found: list[tuple[str, str]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif not found:
                raise AssertionError(f"{self}: a console block begins with a command: $ COMMAND")
            elif line.startswith("> ") and not found[-1][1]:
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
            else:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
        return found

    def script(self) -> str:
        """Return the commands of a shell block."""
        return "\n".join(words for words, _ in self.commands()) if self.language == "console" else self.text


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in their order."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        language, *words = found[2].split() or [""]
        hosts = tuple(word[1:] for word in words if word.startswith("@"))
        word = " ".join(word for word in words if not word.startswith("@"))
        yield Block(page, text.count("\n", 0, found.start()) + 1, language, word, textwrap.dedent(found[3]), hosts)


def mask(text: str) -> str:
    for pattern, name in _MASKS:
        text = pattern.sub(name, text)
    return text


def matches(shown: str, actual: str, *, begins: bool = False) -> bool:
    """Return whether output is what a page shows: "..." is any text, on a line of its own any number of lines.

    begins: more may follow.
    """
    pattern = "".join(
        "(?:.*\n)*?" if line.strip() == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n"
        for line in mask(shown).splitlines()
    )
    return bool(re.fullmatch(pattern + ("(?s:.*)" if begins else ""), mask(actual)))


class Session:
    """A shell that runs the blocks of one page in their order, with `orchard` and `curl` on its PATH."""

    def __init__(self, home: Path, places: dict[str, str], process: trio.Process) -> None:
        """`places` has what stands for the ports and the host in a page."""
        self._home = home
        self._places = places
        self._process = process
        self._started = 0
        # Output of the command that was started last.
        self._shown = ""

    async def run(self, block: Block, url: str) -> None:
        """Run a block, and raise AssertionError if something is not as the page says."""
        self._shown = ""
        with trio.move_on_after(BLOCK_SECONDS) as scope:
            await self._run(block, url)
        assert not scope.cancelled_caught, f"{block}: is not over after {BLOCK_SECONDS} s: {self._shown}"

    async def _run(self, block: Block, url: str) -> None:
        if block.is_file:
            path = self._home / block.word
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._replace_places(block.text))
        elif block.language == "python":
            await self._run_python(block, url)
        elif block.word == BACKGROUND:
            for words, shown in block.commands():
                await self._start(block, words, shown)
        elif block.language == "console":
            for words, shown in block.commands():
                status, output = await self.execute(words)
                expected = f"{block}: $ {words}\n{shown}"
                assert matches(shown, output), f"{expected}--- but was:\n{output}"
                # A command whose end is not shown may not fail.
                is_shown = shown.splitlines()[-1:] not in ([], ["..."])
                assert status == 0 or is_shown, f"{expected}--- ended with {status}:\n{output}"
        else:
            status, output = await self.execute(block.text, strict=True)
            assert status == 0, f"{block}: ended with {status}: {output}"

    async def execute(self, words: str, *, strict: bool = False) -> tuple[int, str]:
        """Run commands in the shell, and return exit status and output. strict: end the shell at the first that fails."""
        script = self._home.parent / "block.sh"
        script.write_text(self._replace_places(words))
        flag = "set -e; " if strict else ""
        assert self._process.stdin is not None
        line = f'{flag}. "{script}" < /dev/null; printf "\\n{END} $?\\n"; set +e\n'
        await self._process.stdin.send_all(line.encode())
        output = await self._read_output()
        text, _, status = output.rpartition(f"\n{END} ")
        return (int(status), self._restore(text)) if status.strip().isdigit() else (1, self._restore(output))

    async def _read_output(self) -> str:
        assert self._process.stdout is not None
        output = b""
        while not re.search(rf"\n{END} \d+\n$".encode(), output):
            data = await self._process.stdout.receive_some()
            output += data
            if not data:
                break
        return output.decode()

    async def _start(self, block: Block, words: str, shown: str) -> None:
        """Start a command that goes on, and wait for the output that is shown."""
        self._started += 1
        log = self._home.parent / f"background-{self._started}"
        log.touch()
        # A process group of its own, so that the end of the session reaches what it starts.
        await self.execute(f'set -m\n{{ {words}\n}} > "{log}" 2>&1 &\nset +m')

        async def is_shown() -> bool:
            output = self._shown = self._restore(log.read_text())
            is_running = (await self.execute("kill -0 $!"))[0] == 0
            assert is_running or matches(shown, output, begins=True), f"{block}: $ {words}\nended:\n{output}"
            return matches(shown, output, begins=True)

        await eventually(is_shown)

    async def _run_python(self, block: Block, url: str) -> None:
        """Run a program in the shell; statements with `await` in this process, with a client that is connected."""
        code = compile(
            self._replace_places(block.text),
            str(block),
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        if not code.co_flags & inspect.CO_COROUTINE:
            program = self._home.parent / "program.py"
            program.write_text(self._replace_places(block.text))
            status, output = await self.execute(f'python3 "{program}"')
            assert status == 0, f"{block}: ended with {status}: {output}"
            return
        async with Client(url) as connected:
            await _evaluate(code, {**vars(schema), **vars(client), "client": connected})

    def _replace_places(self, text: str) -> str:
        for shown, actual in self._places.items():
            text = re.sub(rf"\b{re.escape(shown)}\b", actual, text)
        return text

    def _restore(self, text: str) -> str:
        for shown, actual in self._places.items():
            text = re.sub(rf"\b{actual}\b", shown, text)
        return text.replace(str(self._home), "~")


async def _evaluate(code: CodeType, names: dict[str, Any]) -> None:
    waiting = eval(code, names)
    await waiting


@asynccontextmanager
async def session(directory: Path, found: Cluster | None = None) -> AsyncIterator[Session]:
    """Run a shell for the time of the block, in a home of its own, in which `orchard` uses a cluster.

    Without one, a free port stands for 6120.
    """
    home, programs = directory / "home", directory / "bin"
    home.mkdir(exist_ok=True)
    places = {shown: str(free_port()) for shown in PORTS} | {HOST: HERE}
    if found is not None:
        places["6120"] = found.url.rpartition(":")[2]
        if found.ssh_port:
            places["2222"] = str(found.ssh_port)
        certificate = found.certificate.read_bytes() if found.certificate else None
        context = Context(found.url, certificate, found.account, found.token)
        (home / ORCHARD).mkdir(mode=0o700)
        # As `orchard controller run` and `orchard dev` do.
        name = "bootstrap-context" if found.account else "local-dev"
        write_contexts(home / ORCHARD / CONTEXT_FILE, Contexts(name, {name: context}))
    _write_programs(programs, places["6120"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHARD") and name != "PORT"}
    async with _shell(home, [], {**kept, "PATH": f"{programs}:{os.environ['PATH']}"}) as process:
        yield Session(home, places, process)


@asynccontextmanager
async def session_in(machine: Machine, directory: Path, common: Path) -> AsyncIterator[Session]:
    """Run a shell of root in a machine for the time of the block, with a home of its own below `directory`.

    It begins in `common`, as those of other machines do, so that a file of one needs no copy on the other.
    """
    home = directory / "home"
    home.mkdir()
    async with _shell(home, machine.inside(), {"PATH": MACHINE_PATH}) as process:
        shell = Session(home, {}, process)
        await shell.execute(f"cd {common}")
        yield shell


@asynccontextmanager
async def _shell(home: Path, before: Sequence[str], env: Mapping[str, str]) -> AsyncIterator[trio.Process]:
    """Run a shell for the time of the block; `before` are words before its command."""
    (home / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
    process = await trio.lowlevel.open_process(
        [*before, "bash", "--noprofile", "--norc"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=home,
        env={**env, "HOME": str(home), "NO_COLOR": "1"},
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdout:
        try:
            async with process.stdin:
                await process.stdin.send_all(b"trap 'for job in $(jobs -p); do kill -- -$job; done; wait' EXIT\n")
                yield process
        finally:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(END_SECONDS):
                    await process.wait()
                if process.returncode is None:
                    # It waits for a command.
                    os.killpg(process.pid, signal.SIGTERM)
                await process.wait()


def _write_programs(directory: Path, port: str) -> None:
    """Make `orchard`, whose default port is `port`, and the programs of this Python."""
    directory.mkdir()
    write_forking_program(directory / "orchard", "harness.documented:orchard", port)
    write_forking_program(directory / "python3", "harness.documented:python")
    pytest_program = directory / "pytest"
    # Plugins that take a second to load, as in pyproject.toml.
    left_out = "-p no:schemathesis -p no:anyio"
    pytest_program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pytest {left_out} "$@"\n')
    pytest_program.chmod(0o755)


# ---- commands that cannot be run here --------------------------------------------------------------------------------


class _ParsedError(Exception):
    """A command line was parsed."""


def check_syntax(block: Block, home: Path) -> None:
    """Raise AssertionError unless the shell can read a block, and the `orchard` command has the verbs and options in it."""
    script = block.script()
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block}: {done.stderr}"
    for words in orchard_commands(script):
        assert (said := parsing_error(words, home)) == "", f"{block}: orchard {shlex.join(words)}: {said}"


def orchard_commands(script: str) -> Iterator[list[str]]:
    """Yield the arguments of each `orchard` command of a script."""
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    command_words: list[str] = []
    for token in [*lexer, "\n"]:
        if not set(token) <= set("();<>|&\n"):
            command_words.append(token)
            continue
        for at, word in enumerate(command_words):
            if word == "orchard" or word.endswith(("/orchard", "orchard.pyz")):
                yield command_words[at + 1 :]
                break
        # What follows is the name of a file.
        command_words = ["<"] if set(token) & set("<>") else []


def parsing_error(words: Sequence[str], home: Path) -> str:
    """Return what is wrong with a command line, "" if its verb and its options exist."""

    def parsed(parse: Any) -> Any:
        def parse_and_end(self: CommandLine, *args: Any, **kwargs: Any) -> None:
            parse(self, *args, **kwargs)
            raise _ParsedError

        return parse_and_end

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(CommandLine, name, parsed(getattr(CommandLine, name)))
        try:
            status, _, said = call_main(command.main, *words, home=home)
        except _ParsedError:
            return ""
    return said if status else ""
