"""The controller and the worker as real processes of their own, for tests that need signals, exit codes and the log."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import trio

POLL_SECONDS = 0.01  # between two looks; what is looked at gets the processor meanwhile
GENEROUS = 60  # seconds until a test gives up on a process; nothing is asserted about time
LISTENING = re.compile(r"orchard controller [0-9.]+ is listening on (\S+)")
# Arguments of a controller that speaks plain HTTP and lets everybody do everything.
PLAIN = ("--insecure-no-tls", "--insecure-no-auth")


@dataclass
class Role:
    """A running process; what it says on stderr goes to the file `log`."""

    process: subprocess.Popen[str]
    log: Path
    said: list[str] = field(default_factory=list)  # lines of its stdout, as far as they were read

    def wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Read its stdout until a line matches."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if match := pattern.match(line):
                return match
        raise AssertionError(f"it ended with {self.process.wait(GENEROUS)}: {self.said} {self.log.read_text()}")

    def log_lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and give the exit status."""
        self.process.send_signal(number)
        return self.process.wait(GENEROUS)


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give the environment of a process that keeps its things in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ORCHARD_") and name != "PORT"}
    return {**kept, "ORCHARD_HOME": str(home), **(extra or {})}


def command(role: str, *arguments: str) -> list[str]:
    """Give the command line of a role; "" is the `orchard` command."""
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
    """Run a role for the time of the block; kill it if it still runs then. `before` are words before its command."""
    home.mkdir(exist_ok=True)
    log = home / f"{role}.log"
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [*before, *command(role, *arguments)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(home, env),
        )
    try:
        yield Role(process, log)
    finally:
        process.kill()
        process.wait(GENEROUS)
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def controller(*arguments: str, home: Path, env: Mapping[str, str] | None = None) -> Iterator[tuple[Role, str]]:
    """Run a controller on a free loopback port, and give its URL, too."""
    with started("controller", "--listen", "127.0.0.1:0", *arguments, home=home, env=env) as role:
        yield role, role.wait_for(LISTENING)[1]


def finished(
    role: str, *arguments: str, home: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a role that is to end by itself."""
    return subprocess.run(
        command(role, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(home, env),
        timeout=GENEROUS,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def eventually(holds: Callable[[], Awaitable[bool] | bool]) -> None:
    """Look again and again until something holds; give up after GENEROUS seconds."""
    with trio.fail_after(GENEROUS):
        while True:
            held = holds()
            if held if isinstance(held, bool) else await held:
                return
            await trio.sleep(POLL_SECONDS)


def at_last(holds: Callable[[], bool]) -> None:
    """As `eventually`, where no trio runs."""
    trio.run(eventually, holds)


async def at_rest(look: Callable[[], object]) -> None:
    """Return when something is the same for half a second: it does not go on by itself any more."""
    seen: list[object] = []

    def same() -> bool:
        seen.append(look())
        return len(seen) > 50 and len(set(seen[-50:])) == 1

    await eventually(same)


def processes_in(home: Path) -> list[int]:
    """Find the processes that have a directory in their environment, or stand in it. Needs /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (entry / "environ").read_bytes() + os.fsencode((entry / "cwd").readlink())
            if os.fsencode(home) in told and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found
