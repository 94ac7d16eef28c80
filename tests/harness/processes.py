"""Controllers, workers and the `orchard` command as real processes, and waiting for what happens in them.

For tests that need signals, exit statuses and logs. `call_main` is the fast way to test a command line that ends at once.
"""

from __future__ import annotations

import io
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest
import trio

from harness.starts import Process, start
from orchard.etcd_nodes import find_free_port

# Between two checks of a condition, in which the observed process gets the processor.
POLL_SECONDS = 0.01
# Seconds until a test gives up on a process. No test asserts how long something takes.
GENEROUS = 300
LISTENING = re.compile(r"orchard controller [0-9.]+ is listening on (\S+)")
# Below a home, where Orchard keeps its files.
ORCHARD = ".orchard"
# Words before a command that is to be started, and not forked from a process that has imported it (see harness/starts.py).
REALLY = ("env",)
# For what needs to know its port before it listens, or listens on the same port again.
free_port = find_free_port
# Arguments of a controller that speaks plain HTTP and needs no credentials.
PLAIN = ("--insecure-no-tls", "--insecure-no-auth")


@dataclass
class Role:
    """A running process. Its standard error goes to the file `log`."""

    process: Process
    log: Path
    # Lines of its standard output, as far as they were read.
    said: list[str] = field(default_factory=list)

    def wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Read the standard output until a line matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if match := pattern.match(line):
                return match
        raise AssertionError(
            f"the process ended with {self.process.wait(GENEROUS)}: {self.said} {self.log.read_text()}"
        )

    def log_lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end of the process, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(GENEROUS)


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process whose ORCHARD_HOME is `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHARD_") and name != "PORT"}
    return {**kept, "ORCHARD_HOME": str(home), **(extra or {})}


def command(role: str, *arguments: str) -> list[str]:
    """Return the command of a role: "controller", "worker", or "" for the `orchard` command."""
    return [sys.executable, "-m", f"orchard.{role}" if role else "orchard", *arguments]


@contextmanager
def started(
    role: str,
    *arguments: str,
    home: Path,
    env: Mapping[str, str] | None = None,
    stdin: IO[str] | int = subprocess.DEVNULL,
    before: Sequence[str] = (),
) -> Iterator[Role]:
    """Run a role for the time of the block, and kill it if it still runs then. `before` are words before its command."""
    home.mkdir(exist_ok=True)
    log = home / f"{role}.log"
    with log.open("a") as stderr:
        words = [*before, *command(role, *arguments)]
        process = start(words, env=environment(home, env), stdin=stdin, stdout=subprocess.PIPE, stderr=stderr)
    try:
        yield Role(process, log)
    finally:
        process.kill()
        process.wait(GENEROUS)
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def controller(
    *arguments: str, home: Path, env: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> Iterator[tuple[Role, str]]:
    """Run a controller on a free loopback port for the time of the block, and yield it with its URL."""
    with started("controller", "--listen", "127.0.0.1:0", *arguments, home=home, env=env, before=before) as role:
        yield role, role.wait_for(LISTENING)[1]


def finished(
    role: str,
    *arguments: str,
    home: Path,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    before: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a role that ends by itself, and return its exit status and output.

    `stdin` is what its standard input has, a pipe; "" stands for /dev/null.
    """
    words = [*before, *command(role, *arguments)]
    with ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        given = stack.enter_context(_pipe_with(stdin)) if stdin else subprocess.DEVNULL
        process = start(words, env=environment(home, env), stdin=given, stdout=out, stderr=err)
        try:
            status = process.wait(GENEROUS)
        finally:
            process.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


def _pipe_with(text: str) -> IO[str]:
    """Return the end to read of a pipe that has a text of less than 64 KiB."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        file.write(text)
    return os.fdopen(reading)


def call_main(main: Callable[[Sequence[str]], int], *arguments: str, home: Path) -> tuple[int, str, str]:
    """Call the main function of a program in this process, and return its exit status, standard output and error.

    Only for command lines with which the program ends before it starts trio, since that also configures logging.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("ORCHARD_HOME", str(home))
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = int(str(ended.code))
    return status, out.getvalue(), err.getvalue()


async def eventually(holds: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait until a condition holds. Raises trio.TooSlowError after GENEROUS seconds."""
    with trio.fail_after(GENEROUS):
        while True:
            held = holds()
            if held if isinstance(held, bool) else await held:
                return
            await trio.sleep(POLL_SECONDS)


def at_last(holds: Callable[[], bool]) -> None:
    """Do the same as `eventually` in a thread that does not run trio."""
    trio.run(eventually, holds)


async def at_rest(look: Callable[[], object]) -> None:
    """Wait until the result of `look` has not changed for half a second."""
    seen: list[object] = []

    def same() -> bool:
        seen.append(look())
        return len(seen) > 50 and len(set(seen[-50:])) == 1

    await eventually(same)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open no more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def processes_in(home: Path) -> list[int]:
    """Return the processes that have a directory in their environment or as their working directory. Needs /proc."""
    found, wanted = [], os.fsencode(home)
    # Tests call this many times, and pathlib would take most of the time.
    for name in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208
        with suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as environ:  # noqa: PTH123
                told = environ.read() + os.fsencode(os.readlink(f"/proc/{name}/cwd"))  # noqa: PTH115
            if wanted in told and int(name) != os.getpid():
                found.append(int(name))
    return found
