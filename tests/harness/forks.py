"""The `orchard` command in processes that are forked from one that has imported it: a tenth of the cost of a start.

For tables of many command lines that need a process each: for its exit status, its signals, its closed descriptors.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path

from harness.processes import GENEROUS, at_last, environment

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pytest", "orchard.cli.main", "orchard.cli.trial", "orchard.cli.commands", "orchard.cli.doctor"]
)
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Fork:
    """A command in a process of its own. Its standard output and error go to files."""

    process: BaseProcess
    out: Path
    err: Path

    @property
    def said(self) -> list[str]:
        """The lines of its standard error."""
        return self.err.read_text(errors="replace").splitlines()

    def wait_for(self, text: str) -> None:
        """Wait until the command has printed a text, to standard output or error."""

        def is_printed() -> bool:
            has_ended = not self.process.is_alive()
            said = self.out.read_text() + self.err.read_text()
            assert text in said or not has_ended, f"the command has ended: {said}"
            return text in said

        at_last(is_printed)

    def interrupt(self) -> int:
        """Send SIGINT to it and what it has started, as Ctrl-C does, and return the exit status."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        return self.finish()

    def finish(self) -> int:
        """Wait for the end, and return the exit status; that of a signal is negative."""
        self.process.join(GENEROUS)
        assert self.process.exitcode is not None, self.said
        return self.process.exitcode


def run_command(words: list[str]) -> None:
    """Run the `orchard` command as its script does, in a forked process."""
    from orchard.__main__ import main

    sys.argv = ["orchard", *words]
    status = main()
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.exit(status)


@contextmanager
def forked(
    *words: str, home: Path, env: Mapping[str, str] | None = None, stdin: str = "", stdout: str | None = "",
    run: Callable[[list[str]], None] = run_command,
) -> Iterator[Fork]:  # fmt: skip
    """Run a command for the time of the block, and kill it if it still runs then.

    `stdout` is the path of its standard output; "" a file of its own, None a closed descriptor.
    """
    directory = home / f"fork-{next(_numbers)}"
    directory.mkdir(parents=True)
    streams = [directory / name for name in ("stdin", "stdout", "stderr")]
    for path in streams:
        path.write_text(stdin if path.name == "stdin" else "")
    process = _FORKS.Process(
        target=_begin, args=(run, list(words), environment(home, env), list(map(str, streams)), stdout)
    )
    process.start()
    try:
        yield Fork(process, streams[1], streams[2])
    finally:
        process.kill()
        process.join(GENEROUS)
        process.close()


def _begin(
    run: Callable[[list[str]], None], words: list[str], env: dict[str, str], streams: list[str], stdout: str | None
) -> None:
    """Make of a forked process what a new one would be, and run the command."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate([streams[0], stdout or streams[1], streams[2]]):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND if descriptor else os.O_RDONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    if stdout is None:
        os.close(1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = None if stdout is None else open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    run(words)
