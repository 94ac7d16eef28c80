"""The `orchard` command in forked processes (see `harness.starts`), for tables of many command lines that need one each.

They are for its exit status, its signals and its closed descriptors.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from harness.processes import GENEROUS, at_last, environment
from harness.starts import ENTRIES, ForkedProcess, fork

_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Fork:
    """A command in a process of its own. Its standard output and error go to files."""

    process: ForkedProcess
    out: Path
    err: Path

    @property
    def said(self) -> list[str]:
        """The lines of its standard error."""
        return self.err.read_text(errors="replace").splitlines()

    def wait_for(self, text: str) -> None:
        """Wait until the command has printed a text, to standard output or error."""

        def is_printed() -> bool:
            has_ended = self.process.poll() is not None
            said = self.out.read_text() + self.err.read_text()
            assert text in said or not has_ended, f"the command has ended: {said}"
            return text in said

        at_last(is_printed)

    def interrupt(self) -> int:
        """Send SIGINT to it and what it has started, as Ctrl-C does, and return the exit status."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        return self.finish()

    def finish(self) -> int:
        """Wait for the end, and return the exit status; that of a signal is negative."""
        return self.process.wait(GENEROUS)


@contextmanager
def forked(
    *words: str, home: Path, env: Mapping[str, str] | None = None, stdin: str = "", stdout: str | None = "",
    entry: str = ENTRIES["orchard"],
) -> Iterator[Fork]:  # fmt: skip
    """Run a command for the time of the block, and kill it if it still runs then.

    `stdout` is the path of its standard output; "" a file of its own, None a closed descriptor. `entry` is the function
    to run, as in `fork`.
    """
    directory = home / f"fork-{next(_numbers)}"
    directory.mkdir(parents=True)
    streams = [directory / name for name in ("stdin", "stdout", "stderr")]
    for path in streams:
        path.write_text(stdin if path.name == "stdin" else "")
    places = [streams[0], streams[1] if stdout == "" else stdout, streams[2]]
    with ExitStack() as stack:
        files = {
            target: stack.enter_context(Path(place).open("a" if target else "r"))
            for target, place in enumerate(places)
            if place is not None
        }
        descriptors = {target: file.fileno() for target, file in files.items()}
        process = fork(entry, words, env=environment(home, env), descriptors=descriptors)
    try:
        yield Fork(process, streams[1], streams[2])
    finally:
        process.kill()
        process.wait(GENEROUS)
