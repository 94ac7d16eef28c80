"""Programs on this host: run them in sessions of their own, keep a bounded part of their output, and end them.

Every program gets a session of its own, so that a Ctrl-C on the worker's terminal does not reach it and the program can
be killed together with its children. `run_program` captures output. `Calls` also records each program in a file, so
that the next worker can end what a killed worker left running.

Nothing here knows VMs, tart or ssh.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from orchard.base.files import make_private
from orchard.base.nursery import unwrap_groups
from orchard.vm.driver import DriverError

# Time from asking a program to end until it is killed. `tart stop` gives a guest as long.
STOP_SECONDS = 30.0  # seconds
# Limit of waiting for a killed process. Only a process that hangs in the kernel takes longer.
KILL_SECONDS = 5.0  # seconds
# Interval of checking a lock for which a task waits.
LOOK_SECONDS = 0.01  # seconds
# Limit of reading on after the program ended: its own children may hold the pipes open.
_DRAIN_SECONDS = 1.0  # seconds
# The capacity of a pipe on Linux and macOS.
READ_BYTES = 64 * 1024  # bytes
# The last bytes of each pipe are kept. `tart list` prints about 200 bytes a VM.
OUTPUT_BYTES = 1024 * 1024  # bytes
_MAX_SHOWN = 400  # characters
# The part of the output that is searched for an error. Apple's errors have about a thousand characters.
_COMPLAINT_BYTES = 64 * 1024  # bytes
# No pattern here begins with a repetition that can take line breaks: with blank lines, the search would take minutes.
# Colours and cursor movements, titles of windows, and other sequences of terminals.
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_ERROR = re.compile(r"\berror(?::| domain=)", re.IGNORECASE)
_ERROR_LABEL = re.compile(r"^(?:fatal )?error: ", re.IGNORECASE)
# The cause is on the same line, or a chain of causes is on indented lines.
_CAUSED_BY = re.compile(r"^[ \t]*caused by:[ \t]*(.+|(?:\n+[ \t]+.*)*)", re.IGNORECASE | re.MULTILINE)
_NUMBER_LABEL = re.compile(r"^\d+: ")
_USAGE = re.compile(r"^[ \t]*(?:usage:|overview:|see '.* --help')", re.IGNORECASE | re.MULTILINE)
_USER_INFO = re.compile(r"UserInfo=(?:0x[0-9a-f]+ )?\{")
_INNER_ERROR = re.compile(r'Code=-?\d+ "([^"]*)"')
# A shell's exit statuses when it cannot run the program.
_SHELL_FAILURES = (126, 127)
# A shell writes its process number to standard input, which is the locked file of the call, and becomes the program.
# The program keeps the file open as descriptor 3, and with it the lock.
_RECORDED = 'echo "$$" >&0; exec "$@" 3<&0 </dev/null'


# ---- text ----------------------------------------------------------------------------------------------------------


def presentable(line: str) -> str:
    """Return a program's output line for a message: short, without terminal escapes and control characters."""
    plain = _ESCAPE.sub("", line)
    return "".join(char if char.isprintable() else " " for char in plain).strip()[:_MAX_SHOWN]


def find_complaint(output: bytes) -> str:
    """Return the line of a program's stderr that names its error, presentable, or "".

    That is the last line with "error:" or an error of Apple's frameworks, without the details after it, or else the
    last line. Usage texts are ignored. The cause that a program names below its error is appended.
    """
    text = _ESCAPE.sub("", output[-_COMPLAINT_BYTES:].decode("utf-8", "replace")).replace("\r", "\n")
    text = _without_user_info(text)
    usage = _USAGE.search(text)
    if usage and text[: usage.start()].strip():
        text = text[: usage.start()]
    causes = list(_CAUSED_BY.finditer(text))
    lines = _presentable_lines(text[: causes[0].start()] if causes else text)
    line = next((line for line in reversed(lines) if _ERROR.search(line)), lines[-1] if lines else "")
    cause = _presentable_lines(causes[-1][1])[-1:] if causes else []
    words = [_ERROR_LABEL.sub("", line), *(_NUMBER_LABEL.sub("", words) for words in cause)]
    return presentable(": ".join(filter(None, words)))


def _presentable_lines(text: str) -> list[str]:
    return list(filter(None, map(presentable, text.split("\n"))))


def _without_user_info(text: str) -> str:
    """Replace the details of Apple's errors, in braces and perhaps of many lines, by the innermost error in them."""
    while begin := _USER_INFO.search(text):
        depth, end = 1, begin.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        named = [name for name in _INNER_ERROR.findall(text[begin.end() : end]) if name != "(null)"]
        text = text[: begin.start()].rstrip() + (f" ({presentable(named[-1])})" if named else "") + text[end:]
    return text


@contextmanager
def reporting(failure: str) -> Iterator[None]:
    """Raise DriverError for an OSError in the block. `failure` says what cannot be done."""
    try:
        yield
    except OSError as error:
        raise DriverError(f"{failure}: {error.strerror or error}") from error


# ---- locks ---------------------------------------------------------------------------------------------------------


def is_locked(path: Path) -> bool:
    """Return whether a live process holds the lock of a file. Raises OSError."""
    try:
        with path.open("rb") as file:
            # A shared lock, so that processes which only check do not exclude each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        # A file with a name that is too long does not exist.
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
    return False


async def wait_unlocked(path: Path, seconds: float) -> bool:
    """Wait until no process holds the lock of a file. Return False if that takes longer than `seconds`."""
    with trio.move_on_after(seconds):
        while is_locked(path):  # noqa: ASYNC110
            await trio.sleep(LOOK_SECONDS)
        return True
    return False


# ---- ending --------------------------------------------------------------------------------------------------------


def signal_group(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process group. Does nothing if the group is gone.

    The caller makes sure that the leader is not reaped: until then no other process can have its number.
    """
    # macOS says "not permitted" when only zombies are left in the group.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


async def kill(*processes: trio.Process) -> None:
    """Kill processes that lead a process group, with their groups, and reap them. Completes even when cancelled."""
    for process in processes:
        if process.returncode is None:
            signal_group(process.pid)
    with trio.move_on_after(KILL_SECONDS, shield=True):
        for process in processes:
            await process.wait()


async def _interrupt(process: trio.Process) -> None:
    """Ask a process to end with SIGINT; kill its group if it has not ended after STOP_SECONDS.

    A program inherits that SIGINT is ignored, but not a handler: run_until_signal has one, also where a shell has
    the daemon ignore it.
    """
    process.send_signal(signal.SIGINT)
    await trio.sleep(STOP_SECONDS)
    await kill(process)


# ---- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended, and the last OUTPUT_BYTES of its output."""

    status: int
    stdout: bytes
    stderr: bytes


async def run_program(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    on_output: Callable[[bytes], None] | None = None,
) -> Completed:
    """Run a program until it ends. `on_output` gets the bytes of both its pipes as they come.

    When cancelled, it sends SIGINT to the program and after STOP_SECONDS SIGKILL to its group, and reaps it. Raises
    OSError when the program cannot be started.
    """
    stdout, stderr = bytearray(), bytearray()
    # Reading goes on after a cancellation: a program that is asked to end may write first, and would block or fail.
    reading = trio.CancelScope(shield=True)
    pipe = subprocess.PIPE
    start = partial(
        trio.run_process, command, stdin=stdin, stdout=pipe, stderr=pipe, env=env, check=False,
        deliver_cancel=_interrupt, start_new_session=True,
    )  # fmt: skip
    with unwrap_groups():
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            assert process.stderr is not None
            with reading:
                async with trio.open_nursery() as readers:
                    readers.start_soon(_read, process.stdout, stdout, on_output)
                    readers.start_soon(_read, process.stderr, stderr, on_output)
                    # Ends also when cancelled, since run_process ends the program then.
                    await process.wait()
                    reading.deadline = trio.current_time() + _DRAIN_SECONDS
    assert process.returncode is not None
    return Completed(process.returncode, bytes(stdout), bytes(stderr))


async def _read(pipe: trio.abc.ReceiveStream, tail: bytearray, on_output: Callable[[bytes], None] | None) -> None:
    async with pipe:
        while data := await pipe.receive_some(READ_BYTES):
            if on_output is not None:
                on_output(bytes(data))
            tail += data
            del tail[:-OUTPUT_BYTES]


# ---- calls that the next worker can find -----------------------------------------------------------------------------


class Calls:
    """Runs programs, each with a file in `directory` that is locked while the program lives and holds its number.

    The file is deleted when the program has ended. A file that is left belongs to a program that a killed worker
    started. `env` is the environment of the programs.
    """

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self._directory = directory
        self.env = env
        # The files of programs that run.
        self._running: set[Path] = set()

    async def run(
        self, command: Sequence[str], *, label: str, on_output: Callable[[bytes], None] | None = None
    ) -> Completed:
        """Run a program as `run_program` does. `label` begins the file's name. Raises DriverError."""
        path = self._directory / f"{label}-{secrets.token_hex(8)}"
        wrapped = ["/bin/sh", "-c", _RECORDED, command[0], *command]
        self._running.add(path)
        try:
            with reporting(f"cannot write {path}"):
                make_private(self._directory)
                with path.open("xb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    completed = await run_program(wrapped, stdin=file.fileno(), env=self.env, on_output=on_output)
        finally:
            self._running.discard(path)
            # A file of a program that has ended does no harm if it cannot be deleted.
            with suppress(OSError):
                path.unlink()
        if completed.status in _SHELL_FAILURES:
            raise DriverError(f"cannot run {command[0]}: {find_complaint(completed.stderr)}")
        return completed

    async def end_left(self, seconds: float) -> None:
        """End the programs that a killed worker left: with SIGINT, and after `seconds` with SIGKILL. Raises OSError."""
        left = [path for path in self._directory.glob("*") if path.is_file() and path not in self._running]
        await _signal_until_ended(left, signal.SIGINT, seconds)
        await _signal_until_ended(left, signal.SIGKILL, KILL_SECONDS)
        for path in left:
            path.unlink(missing_ok=True)


async def _signal_until_ended(calls: Sequence[Path], number: signal.Signals, seconds: float) -> None:
    """Signal each program once, as soon as its file holds its number, and wait up to `seconds` for all to end."""
    signalled: set[Path] = set()
    with trio.move_on_after(seconds):
        while alive := [path for path in calls if is_locked(path)]:
            for path in alive:
                # Empty until the shell has written the number.
                if path not in signalled and (pid := path.read_bytes().strip()):
                    signal_group(int(pid), number)
                    signalled.add(path)
            await trio.sleep(LOOK_SECONDS)
