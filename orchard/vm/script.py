"""Scripts into a VM by the system's `ssh`. Law: processes; knows hosts and shells, nothing about VMs or drivers.

A script travels as the standard input of the user's login shell: `script_text` wraps it so that

* stderr goes where stdout goes from the first line on, so that lines of both keep their order;
* the environment is exported by quoted assignments: a value is data and is never evaluated;
* the script itself is evaluated in a subshell under `set -e` whose standard input is empty, so that a command that
  reads stdin gets end-of-file and not the rest of the script;
* a line with a random marker stands before its output, and one with marker and exit status after it.

The markers settle what ssh's own exit status cannot. Nothing before the first one came from the script (a profile may
be talkative), and the script is only sent when that marker has come back: without it the script never began, and it is
safe to try again. After the last one the script is over with that status, 255 included, whatever it left running in the
background with the output still open. `Transcript` reads this format, free of I/O. `converse` has this conversation
with any shell; the synthetic driver has it with a local one.

`run_script` tries until a guest that is still booting answers, each time with a new ssh process in a session of its
own, ended and reaped before the attempt is over. Sending and reading take turns: the shell prints nothing while it
reads the subshell, which it must have whole before it can run it. The output is read as fast as `on_line` takes it, so
a slow consumer slows the script and nothing piles up. The password reaches ssh by a helper that prints an environment
variable: it is in no argument list and in no file.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from orchard.schema import ENV_NAME

CONNECT_SECONDS = 600.0  # a macOS guest that sets itself up at its first boot takes minutes to answer
PASSWORD_SECONDS = 60.0  # the SSH server may be up before the account is; a wrong password stays wrong
ATTEMPT_SECONDS = 10  # for TCP connection and handshake: an address without a host behind it answers nothing
PAUSES = (
    0.25,
    0.5,
    1.0,
    2.0,
)  # seconds between attempts; then the last: a guest is answered soon, a slow one not pestered
ALIVE_SECONDS = 15  # ssh asks a silent server, and gives up after four such silences
KILL_SECONDS = 5.0  # for a killed process to be gone; only one that hangs in the kernel takes longer
MAX_LINE = 16 * 1024  # bytes; a longer line of output comes in pieces
MAX_COMPLAINT = 4096  # bytes of what ssh says about itself
MAX_SHOWN = 400  # characters of an output line in a message
READ_BYTES = 64 * 1024  # what a pipe holds

OnLine = Callable[[str], Awaitable[None]]


class SSHError(Exception):
    """A script could not be started, or nobody knows how it ended. str() is one line for the user."""


@dataclass(frozen=True, slots=True)
class ScriptEnd:
    """How a script ended: its exit status, and the last line that it printed which was not blank ("": none)."""

    exit_code: int
    last_line: str


# ---- what is sent, and what comes back -----------------------------------------------------------------------------


def greeting(marker: str) -> str:
    """Give what a shell is sent first (POSIX sh, bash or zsh). `marker` is a word that the script cannot guess.

    The shell itself has to survive the script, whatever its profile has set.
    """
    return f"set +e\nexec 2>&1\nprintf '%s\\n' {marker}\n"


def script_text(script: str, env: Mapping[str, str], marker: str) -> str:
    """Wrap a script for the standard input of a shell, after the `greeting`.

    Raises ValueError for a bad name in `env`, and for NUL, which no shell can hold.
    """
    exports = []
    for name, value in env.items():
        if not ENV_NAME.fullmatch(name):
            raise ValueError(
                f"startup script: {name!r} is no name of an environment variable, expected [A-Za-z_][A-Za-z0-9_]*"
            )
        if "\0" in value:
            raise ValueError(f"startup script: the environment variable {name} holds a NUL character")
        exports.append(f"export {name}={shlex.quote(value)}\n")
    if "\0" in script:
        raise ValueError("startup script: the script holds a NUL character")
    return f"(\nset -e\n{''.join(exports)}eval {shlex.quote(script)}\n) </dev/null\nprintf '%s %d\\n' {marker} $?\n"


class Transcript:
    """Reads what the shell prints: `feed` bytes as they come, and get the script's lines.

    `began` and `exit_code` say what was seen so far, `last_line` the last line that was not blank.
    """

    def __init__(self, marker: str) -> None:
        self.began = False
        self.exit_code: int | None = None
        self.last_line = ""
        self._begin = marker.encode() + b"\n"
        self._end = re.compile(rb"(.*)%b ([0-9]{1,3})" % re.escape(marker.encode()), re.DOTALL)
        self._kept = len(marker) + len(" 255\n")  # bytes at the end of an open line that may become the last marker
        self._open = b""  # a line whose end was not seen yet

    def feed(self, data: bytes) -> list[str]:
        """Take bytes in, and give the lines that they complete. What follows the last marker is dropped."""
        if self.exit_code is not None:
            return []
        data = self._open + data
        if not self.began:
            _, found, rest = data.partition(self._begin)
            if not found:
                self._open = data[-len(self._begin) :]
                return []
            self.began, data = True, rest
        pieces: list[bytes] = []
        *lines, self._open = data.split(b"\n")
        for line in lines:
            if end := self._end.fullmatch(line):
                if end[1]:  # the script did not end its last line
                    pieces += cut(end[1])
                self.exit_code, self._open = int(end[2]), b""
                break
            pieces += cut(line)
        while len(self._open) >= MAX_LINE + self._kept:
            piece = next(cut(self._open))
            pieces.append(piece)
            self._open = self._open[len(piece) :]
        return [self._line(piece) for piece in pieces]

    def rest(self) -> list[str]:
        """Give the line that the end of the output left open, if there is one."""
        rest, self._open = self._open, b""
        return [self._line(piece) for piece in cut(rest)] if self.began and rest else []

    def _line(self, piece: bytes) -> str:
        line = piece.decode("utf-8", "replace")
        self.last_line = presentable(line) or self.last_line
        return line


def cut(line: bytes) -> Iterator[bytes]:
    """Cut a line into pieces of at most MAX_LINE bytes, between the characters if it is UTF-8. An empty line is one."""
    while len(line) > MAX_LINE:
        end = next((i for i in range(MAX_LINE, MAX_LINE - 4, -1) if line[i] & 0xC0 != 0x80), MAX_LINE)
        yield line[:end]
        line = line[end:]
    yield line


def presentable(line: str) -> str:
    """Make a program's line fit for a message: not too long, and nothing in it that could act on a terminal."""
    return "".join(char if char.isprintable() else " " for char in line).strip()[:MAX_SHOWN]


def last_line(output: bytes) -> str:
    """Give the last line of a program's output that is not blank, presentable; "" when there is none."""
    lines = map(presentable, reversed(output.decode("utf-8", "replace").splitlines()))
    return next(filter(None, lines), "")


def ssh_command(program: str, host: str, port: int, username: str) -> list[str]:
    """Give the argument list: password only, nothing remembered about the host, nobody's configuration."""
    options = {
        "ConnectTimeout": ATTEMPT_SECONDS,
        "LogLevel": "ERROR",
        "NumberOfPasswordPrompts": 1,
        "PreferredAuthentications": "password,keyboard-interactive",
        "PubkeyAuthentication": "no",
        "ServerAliveCountMax": 4,
        "ServerAliveInterval": ALIVE_SECONDS,
        "StrictHostKeyChecking": "no",  # each VM makes its own key, and addresses are used again
        "UserKnownHostsFile": "/dev/null",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [program, "-F", "/dev/null", "-T", *flags, "-l", username, "-p", str(port), "--", host]


# ---- processes -----------------------------------------------------------------------------------------------------


async def run_script(
    host: str,
    port: int,
    *,
    username: str,
    password: str,
    script: str,
    env: Mapping[str, str],
    on_line: OnLine,
    connect_seconds: float = CONNECT_SECONDS,
    password_seconds: float = PASSWORD_SECONDS,
    program: str = "ssh",
) -> ScriptEnd:
    """Run a script in the login shell of `username` on `host`, and give how it ended.

    Each line of its output is awaited as `on_line(line)`. Tries until SSH answers, at most `connect_seconds`, and
    until the password is taken, at most `password_seconds`. Raises SSHError when the script did not begin or the
    connection was lost, ValueError for what `script_text` refuses, and what `on_line` raises.
    """
    marker = secrets.token_hex(16)
    text = script_text(script, env, marker).encode()
    where = f"{username}@{host}:{port}"
    if re.search(r"[\0\r\n]", username + password):
        raise SSHError(f"cannot run the startup script on {host}:{port}: username or password hold a line break or NUL")
    command = ssh_command(program, host, port, username)
    complaint = "no answer"
    refused_at: float | None = None
    with (
        tempfile.TemporaryDirectory(prefix="orchard-ssh-") as directory,
        trio.move_on_after(connect_seconds) as patience,
    ):
        environ = _environ(Path(directory), password)
        for pause in _pauses():
            transcript, complaint = await _attempt(command, environ, marker, text, on_line, patience)
            if transcript.exit_code is not None:
                return ScriptEnd(transcript.exit_code, transcript.last_line)
            if transcript.began:
                raise SSHError(f"lost {where} while the startup script ran: {complaint}")
            if "Permission denied" in complaint:
                refused_at = trio.current_time() if refused_at is None else refused_at
                if trio.current_time() - refused_at >= password_seconds:
                    raise SSHError(f"cannot run the startup script: {where} refuses the password: {complaint}")
            await trio.sleep(pause)
    raise SSHError(f"cannot run the startup script: no SSH at {where} within {connect_seconds:g} seconds: {complaint}")


async def _attempt(
    command: list[str],
    environ: Mapping[str, str],
    marker: str,
    text: bytes,
    on_line: OnLine,
    patience: trio.CancelScope,
) -> tuple[Transcript, str]:
    """Let one ssh process try, and reap it. Give the transcript and what ssh says about itself. Raises SSHError."""
    pipe = subprocess.PIPE
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environ, start_new_session=True
        )
    except OSError as error:
        raise SSHError(f"cannot run {command[0]}, the OpenSSH client, on this machine: {error.strerror}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    async with process.stdin, process.stdout, process.stderr:
        try:
            transcript = await converse(process.stdin, process.stdout, marker, text, on_line, patience)
            complaint = b""
            if transcript.exit_code is None:
                with trio.move_on_after(KILL_SECONDS):  # for ssh to say why it ends, and to end
                    while len(complaint) < MAX_COMPLAINT and (data := await process.stderr.receive_some(MAX_COMPLAINT)):
                        complaint += data
                    await process.wait()
        finally:
            await kill_group(process)
    return transcript, last_line(complaint) or f"ssh ended with exit status {process.returncode}"


async def converse(
    stdin: trio.abc.SendStream,
    stdout: trio.abc.ReceiveStream,
    marker: str,
    text: bytes,
    on_line: OnLine,
    patience: trio.CancelScope,
) -> Transcript:
    """Have a shell run a wrapped script, and hand its lines on, until it ends or the output does. Closes `stdin`.

    The deadline of `patience` is taken away when the shell answers, before the script is sent.
    """
    transcript = Transcript(marker)
    unsent = text
    with suppress(trio.BrokenResourceError):  # nobody reads it; why, the other pipes tell
        await stdin.send_all(greeting(marker).encode())
    while transcript.exit_code is None and (data := await stdout.receive_some(READ_BYTES)):
        lines = transcript.feed(bytes(data))
        if transcript.began and unsent:
            patience.deadline = math.inf
            with suppress(trio.BrokenResourceError):
                await stdin.send_all(unsent)
            await stdin.aclose()
            unsent = b""
        for line in lines:
            await on_line(line)
    for line in transcript.rest():
        await on_line(line)
    return transcript


async def kill_group(process: trio.Process) -> None:
    """Kill a process that leads a process group, with the group, and reap it; whether or not cancelled."""
    if process.returncode is None:  # it is not reaped yet, so the number is still its own
        with suppress(ProcessLookupError, PermissionError):  # only the dead are left in it (macOS: not permitted)
            os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(KILL_SECONDS, shield=True):
        await process.wait()


def _environ(directory: Path, password: str) -> dict[str, str]:
    """Give ssh's environment, with a helper in `directory` that prints the password out of that environment."""
    helper = directory / "askpass"
    helper.write_text("#!/bin/sh\nprintf '%s\\n' \"$ORCHARD_SSH_PASSWORD\"\n")
    helper.chmod(0o700)
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    wanted = {
        "LC_ALL": "C",
        "ORCHARD_SSH_PASSWORD": password,
        "SSH_ASKPASS": str(helper),
        "SSH_ASKPASS_REQUIRE": "force",
    }
    return kept | wanted


def _pauses() -> Iterator[float]:
    yield from PAUSES
    while True:
        yield PAUSES[-1]
