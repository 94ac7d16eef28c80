"""Programs on a terminal of their own, as a user has one: keys, window size, job control, hang-up."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from harness.processes import GENEROUS

# What `shell` writes when it reads keys again. It is written before a program that the shell starts has the keys.
PROMPT = "ready> "
_READ_BYTES = 4096


class Terminal:
    """Our end of the terminal of a running program. `said` is what was read and not yet waited for."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        self._descriptor = descriptor
        self.process = process
        self.said = ""

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        _set_size(self._descriptor, rows, columns)

    @property
    def is_in_foreground(self) -> bool:
        """Whether keys such as Ctrl-C go to the program that was started, and not to one that it has started."""
        return os.tcgetpgrp(self._descriptor) == self.process.pid

    @property
    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self._descriptor)[3] & termios.ECHO)

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read until a regular expression matches what was written, and forget that up to its end."""
        while (match := re.search(pattern, self.said)) is None:
            if not self._read():
                raise AssertionError(f"{pattern!r} was never written, but {self.said!r}")
        self.said = self.said[match.end() :]
        return match

    def finish(self) -> int:
        """Read until the program ends, and return its exit status."""
        while self._read():
            pass
        return self.process.wait(GENEROUS)

    def hang_up(self) -> None:
        """Close the terminal, as an emulator does whose window is closed."""
        os.close(self._descriptor)
        self._descriptor = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._descriptor >= 0:
            self.hang_up()

    def _read(self) -> bool:
        readable, _, _ = select.select([self._descriptor], [], [], GENEROUS)
        assert readable, f"nothing more was written after {self.said!r}"
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except OSError:
            # EIO: the program has closed the other end.
            return False
        self.said += data.decode(errors="replace")
        return bool(data)


def _set_size(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _take_terminal() -> None:
    """Make standard input the controlling terminal, which sends signals for keys and for a new size."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal(words: Sequence[str], env: Mapping[str, str], *, rows: int = 40, columns: int = 100) -> Iterator[Terminal]:
    """Run a program on a terminal of its own for the time of the block."""
    ours, theirs = pty.openpty()
    _set_size(theirs, rows, columns)
    kept = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm", **kept}, start_new_session=True,
        preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    running = Terminal(ours, process)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def shell(env: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a shell with job control on a terminal, which waits for a command when the block begins."""
    with terminal(["bash", "--norc", "--noprofile", "-i"], {**env, "PS1": PROMPT}) as shown:
        shown.read_until(PROMPT)
        yield shown
