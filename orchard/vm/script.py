"""Startup scripts: what is sent to the shell in a VM, what its output means, and the way there by the system's `ssh`.

A script travels as the standard input of the user's login shell. `script_text` wraps it so that

* stderr goes to stdout from the first line on, so that the lines of both keep their order;
* the environment is exported by quoted assignments: a value is data and is never evaluated;
* the script is evaluated in a subshell under `set -e` with an empty standard input, so that a command that reads stdin
  gets end-of-file and not the rest of the script;
* a line with a random marker is printed before the script's output, and the marker with the exit status after it.

The markers settle what ssh's exit status leaves open. Output before the first marker is not the script's (a profile may
print). The script is sent only after the first marker has come back: without that marker the script did not begin, and
trying again is safe. After the last marker the script has ended with that status, 255 included, even if it left
processes that hold the output open. `Transcript` reads this format without I/O. `converse` sends and reads with any
shell; the synthetic driver uses it with a local one.

`run_over_ssh` tries until a guest that still boots answers. Each attempt is a new ssh process in a session of its own,
killed and reaped before the attempt is over. Sending and reading alternate: the shell prints nothing while it reads the
subshell, since it needs all of the subshell to run it. Output is read as fast as `on_line` takes it, so a slow consumer
slows the script down and no output accumulates. The password reaches ssh by a helper program that prints an environment
variable: it is in no argument list and in no file.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import secrets
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from orchard.schema import ENV_NAME
from orchard.vm.driver import DriverError, OnLine, Script, ScriptFailed
from orchard.vm.processes import KILL_SECONDS, READ_BYTES, find_complaint, kill, presentable

# A macOS guest that sets itself up at its first boot takes minutes to answer.
CONNECT_SECONDS = 600.0  # seconds
# The SSH server may be up before the account exists. After this time the password is taken for wrong.
PASSWORD_SECONDS = 60.0  # seconds
# For TCP connection and handshake of one attempt: an address without a host behind it does not answer.
_ATTEMPT_SECONDS = 10  # seconds
# Between attempts; then the last one. Short at first, because most guests answer soon.
_PAUSES = (0.25, 0.5, 1.0, 2.0)  # seconds
# ssh asks a silent server after this time, and gives up after four times without an answer.
_ALIVE_SECONDS = 15  # seconds
# A longer line of output is handed on in pieces.
MAX_LINE = 16 * 1024  # bytes
# Read of what ssh says about itself.
_COMPLAINT_BYTES = 4096  # bytes


# ---- what is sent, and what comes back -----------------------------------------------------------------------------


def greeting(marker: str) -> str:
    """Return what a shell (POSIX sh, bash or zsh) is sent first. `marker` is a word that the script cannot guess.

    `set +e` keeps the shell alive after a script that fails, whatever the user's profile has set.
    """
    return f"set +e\nexec 2>&1\nprintf '%s\\n' {marker}\n"


def script_text(script: str, env: Mapping[str, str], marker: str) -> str:
    """Return a script wrapped for the standard input of a shell, to be sent after the `greeting`.

    Raises DriverError for a name in `env` that no variable can have, and for NUL, which no shell can hold.
    """
    exports = []
    for name, value in env.items():
        if not ENV_NAME.fullmatch(name):
            raise DriverError(
                f"startup script: environment variable is named {name!r}, expected [A-Za-z_][A-Za-z0-9_]*"
            )
        if "\0" in value:
            raise DriverError(f"startup script: the environment variable {name} contains a NUL character")
        exports.append(f"export {name}={shlex.quote(value)}\n")
    if "\0" in script:
        raise DriverError("startup script: the script contains a NUL character")
    return f"(\nset -e\n{''.join(exports)}eval {shlex.quote(script)}\n) </dev/null\nprintf '%s %d\\n' {marker} $?\n"


@dataclass(frozen=True, slots=True)
class WrappedScript:
    """What a shell is sent: `greeting(marker)` and then `text`."""

    marker: str
    text: bytes


def wrap(script: Script) -> WrappedScript:
    """Wrap a script, with a new random marker. Raises DriverError for a script that no shell can hold."""
    marker = secrets.token_hex(16)
    return WrappedScript(marker, script_text(script.text, script.env, marker).encode())


class Transcript:
    """Reads the output of the shell: `feed` takes bytes as they come and returns the script's lines.

    `began` and `exit_code` tell which markers were seen; `last_line` is the last non-blank line of the script, or "".
    """

    def __init__(self, marker: str) -> None:
        self.began = False
        self.exit_code: int | None = None
        self.last_line = ""
        self._begin = marker.encode() + b"\n"
        self._end = re.compile(rb"(.*)%b ([0-9]{1,3})" % re.escape(marker.encode()), re.DOTALL)
        # Bytes at the end of an unfinished line that may be the beginning of the last marker.
        self._kept = len(marker) + len(" 255\n")
        self._open = b""

    def feed(self, data: bytes) -> list[str]:
        """Take bytes in, and return the lines that they complete. Bytes after the last marker are dropped."""
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
                # Text before the marker: the script did not end its last line.
                if end[1]:
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
        """Return the unfinished line at the end of the output, in pieces; nothing if there is none."""
        rest, self._open = self._open, b""
        return [self._line(piece) for piece in cut(rest)] if self.began and rest else []

    def _line(self, piece: bytes) -> str:
        line = piece.decode("utf-8", "replace")
        self.last_line = presentable(line) or self.last_line
        return line


def cut(line: bytes) -> Iterator[bytes]:
    """Yield pieces of at most MAX_LINE bytes, cut between characters if the line is UTF-8. An empty line is a piece."""
    while len(line) > MAX_LINE:
        end = next((i for i in range(MAX_LINE, MAX_LINE - 4, -1) if line[i] & 0xC0 != 0x80), MAX_LINE)
        yield line[:end]
        line = line[end:]
    yield line


async def converse(
    process: trio.Process, script: WrappedScript, on_line: OnLine, patience: trio.CancelScope | None = None
) -> Transcript:
    """Have the shell behind `process` run a script, and await `on_line(line)` for each line of its output.

    Returns when the script has ended or the output has. Closes the shell's standard input. `patience` is the scope of
    the caller's deadline for the shell to answer: the deadline is lifted before the script is sent. Raises what `on_line`
    raises.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    transcript = Transcript(script.marker)
    unsent = script.text
    # A broken pipe means that the shell has ended: the other pipes and its exit status tell why.
    with suppress(trio.BrokenResourceError):
        await process.stdin.send_all(greeting(script.marker).encode())
    while transcript.exit_code is None and (data := await process.stdout.receive_some(READ_BYTES)):
        lines = transcript.feed(bytes(data))
        if transcript.began and unsent:
            if patience is not None:
                patience.deadline = math.inf
            with suppress(trio.BrokenResourceError):
                await process.stdin.send_all(unsent)
            await process.stdin.aclose()
            unsent = b""
        for line in lines:
            await on_line(line)
    for line in transcript.rest():
        await on_line(line)
    return transcript


# ---- ssh -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SSHServer:
    """Where the SSH server of a VM is, and how long to wait for it and for its account, in seconds."""

    host: str
    port: int = 22
    connect_seconds: float = CONNECT_SECONDS
    password_seconds: float = PASSWORD_SECONDS


def ssh_command(program: str, host: str, port: int, username: str) -> list[str]:
    """Return the argument list of ssh: password only, no known hosts, and no configuration files."""
    options = {
        "ConnectTimeout": _ATTEMPT_SECONDS,
        "LogLevel": "ERROR",
        "NumberOfPasswordPrompts": 1,
        "PreferredAuthentications": "password,keyboard-interactive",
        "PubkeyAuthentication": "no",
        "ServerAliveCountMax": 4,
        "ServerAliveInterval": _ALIVE_SECONDS,
        # Each VM makes its own host key, and addresses are used again.
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [program, "-F", "/dev/null", "-T", *flags, "-l", username, "-p", str(port), "--", host]


async def run_over_ssh(server: SSHServer, script: Script, on_line: OnLine, *, program: str = "ssh") -> None:
    """Run a script in the login shell of `script.username`, and return when it has ended with exit status 0.

    Tries until SSH answers, at most `server.connect_seconds`, and until the password is accepted, at most
    `server.password_seconds`. Raises ScriptFailed for another exit status, another DriverError when the script did not
    begin or the connection was lost, and what `on_line` raises.
    """
    wrapped = wrap(script)
    address = f"{server.host}:{server.port}"
    if re.search(r"[\0\r\n]", script.username + script.password):
        raise DriverError(
            f"cannot run the startup script on {address}: username or password contains a line break or NUL,"
            " expected one line of text"
        )
    complaint = "no answer"
    refused_at = math.inf
    with (
        tempfile.TemporaryDirectory(prefix="orchard-ssh-") as directory,
        trio.move_on_after(server.connect_seconds) as patience,
    ):
        environ = _environ(Path(directory), script.password)
        command = ssh_command(program, server.host, server.port, script.username)
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            transcript, complaint = await _attempt(command, environ, wrapped, on_line, patience)
            if transcript.exit_code:
                raise ScriptFailed(transcript.exit_code, transcript.last_line)
            if transcript.exit_code == 0:
                return
            if transcript.began:
                raise DriverError(f"lost {script.username}@{address} while the startup script ran: {complaint}")
            if "Permission denied" in complaint:
                refused_at = min(refused_at, trio.current_time())
                if trio.current_time() - refused_at >= server.password_seconds:
                    raise DriverError(
                        f"cannot run the startup script: {script.username}@{address} refuses the password: {complaint}"
                    )
            await trio.sleep(pause)
    raise DriverError(
        f"cannot run the startup script: no SSH at {script.username}@{address}"
        f" within {server.connect_seconds:g} seconds: {complaint}"
    )


async def _attempt(
    command: list[str], environ: Mapping[str, str], script: WrappedScript, on_line: OnLine, patience: trio.CancelScope
) -> tuple[Transcript, str]:
    """Let one ssh process try, and reap it. Return the transcript and what ssh says about itself. Raises DriverError."""
    pipe = subprocess.PIPE
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=environ, start_new_session=True
        )
    except OSError as error:
        raise DriverError(f"cannot run {command[0]}, the OpenSSH client, on this machine: {error.strerror}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    async with process.stdin, process.stdout, process.stderr:
        try:
            transcript = await converse(process, script, on_line, patience)
            complaint = b""
            if transcript.exit_code is None:
                # Time for ssh to say why it ends, and to end.
                with trio.move_on_after(KILL_SECONDS):
                    while len(complaint) < _COMPLAINT_BYTES and (data := await process.stderr.receive_some()):
                        complaint += data
                    await process.wait()
        finally:
            await kill(process)
    return transcript, find_complaint(complaint) or f"ssh ended with exit status {process.returncode}"


def _environ(directory: Path, password: str) -> dict[str, str]:
    """Return ssh's environment; write a helper into `directory` that prints the password from that environment."""
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
