"""Startup scripts: the text sent to the shell in a VM, the meaning of its output, and its transport by the system's `ssh`.

A script travels over the standard input of the user's login shell, which `login_command` starts. `script_text` wraps it
so that

* stderr goes to stdout from the first line on, so that the lines of both keep their order;
* the environment is exported by quoted assignments: a value is data and is never evaluated;
* the script is written to a file, which makes the line numbers in error messages its own;
* that file is read by the login shell, in a subshell under `set -e`, or run by the interpreter that its first line names;
* its standard input is empty, so that a command that reads stdin gets end-of-file and not the rest of the script;
* a line with a random marker is printed before the script's output, and the marker with the exit status after it.

ssh's exit status is ambiguous, so markers tell how a script went. Output before the first marker is not the script's (a
profile may print). The script is sent only after the first marker has come back: without that marker the script did not
begin, and trying again is safe. After the last marker the script has ended with that status, 255 included, even if it
left processes that hold the output open; what these print in the next second still counts as its output. A shell that
was killed cannot print the last marker: the process around it does. `Transcript` reads this format without I/O.
`converse` sends and reads with any shell; the synthetic driver uses it with a local one.

fish and csh do not understand these commands: a `/bin/sh` with their environment reads them, and fish or csh runs the
file.

A script that takes too long is killed in the guest: beside it waits a `/bin/sh` for one more line of standard input,
and then kills what the script started: its descendants, their process groups, and processes that have the script's
`ORCHARD_SCRIPT` in their environment.

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
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from orchard.schema import ENV_NAME
from orchard.vm.driver import DriverError, OnLine, Script, ScriptFailed
from orchard.vm.processes import KILL_SECONDS, OUTPUT_BYTES, READ_BYTES, find_complaint, kill, presentable, reporting
from orchard.vm.vm_connections import Dial, offered

# A macOS guest that sets itself up at its first boot takes minutes to answer.
CONNECT_SECONDS = 600.0  # seconds
# The SSH server may be up before the account exists. After this time a refused password counts as wrong.
PASSWORD_SECONDS = 60.0  # seconds
# Limit for connection and handshake of one attempt: an address without a host does not answer.
_ATTEMPT_SECONDS = 10  # seconds
# Pauses between attempts; the last one repeats. The first ones are short, because most guests answer soon.
_PAUSES = (0.25, 0.5, 1.0, 2.0)  # seconds
# ssh asks a silent server after this time, and gives up after four times without an answer.
_ALIVE_SECONDS = 15  # seconds
# A longer line of output is passed on in pieces.
MAX_LINE = 16 * 1024  # bytes
# The most that is read of ssh's own messages.
_COMPLAINT_BYTES = 4096  # bytes
# Time after a script's end in which the output of processes that it left counts, such as that of a `tee`.
_REST_SECONDS = 1.0  # seconds
# Interval at which states of a progress bar are returned.
PROGRESS_SECONDS = 1.0  # seconds
# The shells whose option -e ends them after a command that fails.
_SHELLS = frozenset(("bash", "dash", "ksh", "sh", "zsh"))
# Names that some shell takes for numbers. It evaluates their values as arithmetic expressions, which may contain
# commands.
_EVALUATED = frozenset(
    [
        "BASHPID",
        "COLUMNS",
        "FUNCNEST",
        "HISTCMD",
        "HISTSIZE",
        "KEYTIMEOUT",
        "LINENO",
        "LINES",
        "LISTMAX",
        "MAILCHECK",
        "OPTIND",
        "RANDOM",
        "SAVEHIST",
        "SECONDS",
        "SHLVL",
        "SRANDOM",
        "TMOUT",
    ]
)
_NUMBER = re.compile(r"-?[0-9]{1,18}")
# The exit code of a script that took too long, as `timeout` has it.
TIMED_OUT = 124
# Limit for killing the processes of such a script, over a connection and on a machine that may be slow.
END_SECONDS = 10.0  # seconds
# Makes _KILLER end a script.
END_ORDER = b"end\n"
ShellStream = trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream]
# $1: the login shell. $2: the process around it, whose end ends the connection. $3: the script's word. $4: its file. Each
# round finds what the last one has not killed. Nothing that the guest may lack is needed: without ps the process group is killed.
_KILLER = r"""
read -r _ || exit 0
for _ in 1 2 3 4 5 6 7 8; do
  found=$(ps -A -o pid= -o ppid= -o pgid= -o stat= | awk -v shell="$1" -v outer="$2" -v self=$$ '
    $4 !~ /^Z/ { parent[$1] = $2; group[$1] = $3 }
    END {
      spared[self] = spared[outer] = 1
      for (p in parent) if (parent[p] == self) spared[p] = 1
      for (p in parent) if (spared[parent[p]] && parent[p] != outer) spared[p] = 1
      hit[shell] = shell in parent
      do {
        more = 0
        for (p in parent)
          if (!spared[p] && !hit[p] && (hit[parent[p]] || hit[group[p]] || group[p] == outer)) more = hit[p] = 1
      } while (more)
      for (p in hit) if (hit[p]) print p
    }')
  if [ -d /proc/self ]; then
    found="$found $(grep -ls "ORCHARD_SCRIPT=$3" /proc/[0-9]*/environ | cut -d/ -f3)"
  else
    found="$found $(ps -A -E -ww -o pid= -o command= | grep "[O]RCHARD_SCRIPT=$3" | awk '{ print $1 }')"
  fi
  case $found in
  *[0-9]*)
    # Stopped at first, since a shell prints how its children have ended.
    kill -STOP $found
    kill -9 $found || sudo -n kill -9 $found
    ;;
  *)
    rm -f -- "$4"
    command -v ps && exit
    break
    ;;
  esac
done
kill -9 -- "-$2"
"""
_IDENTITIES = frozenset(("EGID", "EUID", "GID", "UID", "USERNAME"))


# ---- what is sent, and what comes back -----------------------------------------------------------------------------


def new_marker() -> str:
    """Return a word that no script can guess."""
    return secrets.token_hex(16)


def login_command(marker: str, shell: str = "") -> str:
    """Return the command for `/bin/sh -c` that starts the login shell $SHELL, and prints how that shell has ended.

    `shell` names the login shell where no login has set SHELL and the working directory. The command contains no single
    quote, backslash or exclamation mark, so that each shell can pass it on in single quotes.
    """
    login = f"cd; export SHELL=$(command -v {shell} || echo /bin/sh); " if shell else ""
    return login + (
        's="${SHELL:-/bin/sh}"; case "$s" in *fish) ORCHARD_SHELL="$s" "$s" -l -c "exec /bin/sh";;'
        f' *csh) ORCHARD_SHELL="$s" "$s" -c "exec /bin/sh";; *) "$s" -l;; esac; echo {marker} $?'
    )


def greeting(marker: str) -> str:
    """Return what the shell is sent first.

    `set +e` keeps the shell alive after a script that fails, whatever the user's profile has set.
    """
    return f"set +e\nexec 2>&1\nprintf '%s\\n' {marker}\n"


def script_text(script: Script, marker: str) -> str:
    """Return a script wrapped for the standard input of the shell, to be sent after the `greeting`.

    Raises DriverError for a name in its environment that no variable can have, and for NUL, which no shell can hold.
    """
    # Undo an editor's byte order mark and line ends.
    text = script.text.removeprefix("\ufeff").replace("\r\n", "\n")
    if "\0" in text:
        raise DriverError(f"{script.kind} script: the script contains a NUL character")
    if text and not text.endswith("\n"):
        text += "\n"
    exports = "".join(_export(script.kind, name, value) for name, value in script.env.items())
    # Not the marker: the word is in the environment, and with the marker the script could print its own end.
    word = new_marker()
    # In braces, so that the shell has read all of it before the script begins: what comes then is for _KILLER.
    return f"""\
{{
_orchard_file=$(command mktemp "${{TMPDIR:-/tmp}}/{script.kind}-script.XXXXXX") || exit
command cat >|"$_orchard_file" <<'{marker}'
{text}{marker}
_orchard_shell=${{ORCHARD_SHELL-}}
unset ORCHARD_SHELL
exec 3<&0
/bin/sh -c {shlex.quote(_KILLER)} orchard $$ $PPID {word} "$_orchard_file" <&3 >/dev/null 2>&1 &
(
ORCHARD_SCRIPT={word}; export ORCHARD_SCRIPT
{exports}{_run_line(script.kind, text)}
) </dev/null 3<&-
_orchard_status=$?
command rm -f "$_orchard_file"
printf '%s %d\\n' {marker} $_orchard_status
exec true
}}
"""


def _export(kind: str, name: str, value: str) -> str:
    """Return lines that export a variable, or print that it is ignored."""
    if not ENV_NAME.fullmatch(name):
        raise DriverError(f"{kind} script: environment variable is named {name!r}, expected [A-Za-z_][A-Za-z0-9_]*")
    if "\0" in value:
        raise DriverError(f"{kind} script: the environment variable {name} contains a NUL character")
    ignored = f"echo 'environment variable {name} is ignored: "
    if name in _EVALUATED and not _NUMBER.fullmatch(value):
        return f"{ignored}shells take it for a number, and evaluate other values'\n"
    # As root, zsh would change the user. Elsewhere a shell may refuse the name, which ends some shells.
    condition = '[ -z "${ZSH_VERSION-}" ] && ' if name in _IDENTITIES else ""
    assignment = f'export {name}="$_orchard_value"'
    return (
        f"_orchard_value={shlex.quote(value)}\n"
        f"{condition}({assignment}) >/dev/null 2>&1 && {assignment} || {ignored}this shell refuses it'\n"
    )


def _run_line(kind: str, text: str) -> str:
    """Return the command that runs the script in its file."""
    words = interpreter(text)
    if not words:
        # fish has nothing like -e.
        return (
            'case "$_orchard_shell" in "") set -e; . "$_orchard_file";; *csh) "$_orchard_shell" -e "$_orchard_file";;'
            ' *) "$_orchard_shell" "$_orchard_file";; esac'
        )
    missing = f"{kind} script: there is no interpreter {words[0]}"
    return (
        f"command -v {shlex.quote(words[0])} >/dev/null || {{ echo {shlex.quote(missing)}; exit 127; }}\n"
        f'{shlex.join(words)} "$_orchard_file"'
    )


def interpreter(text: str) -> list[str]:
    """Return the words of a script's `#!` line, with -e for a shell; nothing if there is none."""
    words = text.partition("\n")[0].removeprefix("#!").split() if text.startswith("#!") else []
    program = 0
    if words and Path(words[0]).name == "env":
        program = next((i for i, word in enumerate(words) if i and word[0] != "-" and "=" not in word), 0)
    if words and Path(words[program]).name in _SHELLS:
        # After the long options, which bash wants first, and before what ends the options.
        ends = (i for i in range(program + 1, len(words)) if words[i] in ("-", "--"))
        words.insert(next(ends, len(words)), "-e")
    return words


class Transcript:
    """Reads the output of the shell: `feed` takes bytes as they come and returns the script's lines.

    A carriage return ends a state of a progress bar, of which at most one a second is returned as a line. `began` and
    `exit_code` tell which markers were seen; `last_line` is the last non-blank line of the script, or "".
    """

    def __init__(self, marker: str) -> None:
        self.began = False
        self.exit_code: int | None = None
        # Set by `converse`.
        self.timed_out = False
        self.last_line = ""
        self._begin = marker.encode() + b"\n"
        self._end = re.compile(rb"(.*)%b ([0-9]{1,3})" % re.escape(marker.encode()), re.DOTALL)
        # So many bytes at the end of an unfinished line may be the beginning of the last marker.
        self._kept = len(marker) + len(" 255\n")
        # The unfinished line, as far as it was not returned.
        self._open = b""
        # When a state of a progress bar was returned, and whether `_open` begins with that state.
        self._progress_at = -math.inf
        self._shown = False

    def feed(self, data: bytes, now: float) -> list[str]:
        """Take bytes in at some time in seconds, and return the lines that they complete."""
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
                # A second marker comes from the process around the shell.
                self.exit_code = int(end[2]) if self.exit_code is None else self.exit_code
            # Text before the marker: the script did not end its last line.
            if not end or end[1]:
                pieces += self._last_state(end[1] if end else line)
            self._shown = False
        pieces += self._progress(now)
        while len(self._open) >= MAX_LINE + self._kept:
            piece = next(cut(self._open))
            pieces.append(piece)
            self._open = self._open[len(piece) :]
        return [self._line(piece) for piece in pieces]

    def _last_state(self, line: bytes) -> list[bytes]:
        """Return the last state that a complete line shows, in pieces, unless it was returned before."""
        states = [state for state in line.split(b"\r") if state]
        if self._shown and len(states) <= 1:
            return []
        return list(cut(states[-1] if states else b""))

    def _progress(self, now: float) -> list[bytes]:
        """Reduce the unfinished line to the states that matter, and return one if it is time for that."""
        *states, tail = self._open.split(b"\r")
        states = [state for state in states if state]
        if not states:
            self._open = tail
            return []
        is_new = not self._shown or len(states) > 1
        due = is_new and now - self._progress_at >= PROGRESS_SECONDS
        if due:
            self._progress_at = now
        self._shown = due or not is_new
        # A state that was returned matters only as long as its line may end there.
        self._open = tail if self._shown and tail else states[-1] + b"\r" + tail
        self._shown = self._shown and not tail
        return list(cut(states[-1])) if due else []

    def rest(self) -> list[str]:
        """Return the unfinished line at the end of the output, in pieces; nothing if there is none."""
        rest, self._open = self._open, b""
        return [self._line(piece) for piece in self._last_state(rest)] if self.began and rest else []

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


@dataclass(frozen=True, slots=True)
class WrappedScript:
    """A script, and its text as it is sent."""

    script: Script
    marker: str
    text: str = field(repr=False)

    @classmethod
    def wrap(cls, script: Script) -> WrappedScript:
        """Raises DriverError for a script that cannot be sent."""
        marker = new_marker()
        return cls(script, marker, script_text(script, marker))

    def check_end(self, transcript: Transcript) -> None:
        """Raise ScriptFailed unless the script has ended with exit status 0."""
        if transcript.exit_code:
            limit = self.script.seconds if transcript.timed_out else None
            raise ScriptFailed(transcript.exit_code, transcript.last_line, kind=self.script.kind, limit=limit)


async def converse(
    shell: ShellStream, script: WrappedScript, on_line: OnLine, patience: trio.CancelScope | None = None
) -> Transcript:
    """Make a shell run a script, and await `on_line(line)` for each line of its output.

    Returns when the output has ended, or a second after the script has. Closes the shell's standard input. A script
    that takes too long is killed; its exit code is TIMED_OUT. `patience` is the scope of the caller's deadline for the
    shell to answer: the deadline is lifted before the script is sent. Raises what `on_line` raises.
    """
    talk = _Talk(shell, script, on_line)
    # A broken pipe means that the shell has ended: the other pipes and its exit status tell why.
    with suppress(trio.BrokenResourceError):
        await shell.send_all(greeting(script.marker).encode())
    with trio.CancelScope() as limit:
        await talk.listen(limit, patience)
    if limit.cancelled_caught:
        with trio.move_on_after(END_SECONDS), suppress(trio.BrokenResourceError):
            await shell.send_all(END_ORDER)
            await talk.listen()
        talk.transcript.exit_code, talk.transcript.timed_out = TIMED_OUT, True
    await shell.send_stream.aclose()
    return talk.transcript


class _Talk:
    """Sends a script when the shell has answered, and passes on the lines of its output."""

    def __init__(self, shell: ShellStream, script: WrappedScript, on_line: OnLine) -> None:
        self.transcript = Transcript(script.marker)
        self._shell = shell
        self._seconds = script.script.seconds
        self._unsent = script.text.encode()
        self._on_line = on_line
        self._lines: deque[str] = deque()

    async def listen(self, limit: trio.CancelScope | None = None, patience: trio.CancelScope | None = None) -> None:
        """Read until the output has ended. May be cancelled and called again. `limit` gets the script's deadline."""
        transcript = self.transcript
        # Bounds of time and bytes for more output once the script has ended.
        seconds, size = _REST_SECONDS, OUTPUT_BYTES
        await self._hand_on()
        while size > 0:
            data, asked = b"", trio.current_time()
            with trio.move_on_after(seconds if transcript.exit_code is not None else math.inf):
                data = bytes(await self._shell.receive_some(READ_BYTES))
            if not data:
                break
            if transcript.exit_code is not None:
                seconds, size = seconds - (trio.current_time() - asked), size - len(data)
            self._lines += transcript.feed(data, trio.current_time())
            if limit is not None and transcript.exit_code is not None:
                limit.deadline = math.inf
            if transcript.began and self._unsent:
                if patience is not None:
                    patience.deadline = math.inf
                if limit is not None:
                    limit.deadline = trio.current_time() + self._seconds
                await self._send()
            await self._hand_on()
        self._lines += transcript.rest()
        await self._hand_on()

    async def _send(self) -> None:
        text, self._unsent = self._unsent, b""
        with suppress(trio.BrokenResourceError):
            await self._shell.send_all(text)

    async def _hand_on(self) -> None:
        while self._lines:
            await self._on_line(self._lines[0])
            self._lines.popleft()


# ---- ssh -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SSHServer:
    """Where the SSH server of a VM is."""

    host: str
    port: int = 22
    # Opens the connection that ssh uses; None: ssh opens it.
    dial: Dial | None = None


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

    Tries until SSH answers, at most CONNECT_SECONDS, and until the password is accepted, at most PASSWORD_SECONDS.
    Raises ScriptFailed for another exit status, another DriverError when the script did not begin or the connection was
    lost, and what `on_line` raises.
    """
    wrapped = WrappedScript.wrap(script)
    login = f"{script.username}@{server.host}:{server.port}"
    if re.search(r"[\0\r\n]", script.username + script.password):
        raise DriverError(
            f"cannot run the {script.kind} script on {server.host}:{server.port}: username or password contains a line break or NUL,"
            " expected one line of text"
        )
    complaint = "no answer"
    refused_at = math.inf
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchard-ssh-")))
        patience = stack.enter_context(trio.move_on_after(CONNECT_SECONDS))
        via: list[str] = []
        if server.dial is not None:
            via = await stack.enter_async_context(offered(server.dial, server.host, server.port, directory))
        environ = _environ(directory, script.password)
        ssh, *words = ssh_command(program, server.host, server.port, script.username)
        command = [ssh, *via, *words, f"exec /bin/sh -c '{login_command(wrapped.marker)}'"]
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            with reporting(f"cannot run {program}, the OpenSSH client, on this machine"):
                process = await open_pipes(command, environ)
            if not (complaint := await attempt(process, wrapped, on_line, patience, login)):
                return
            if "Permission denied" in complaint:
                refused_at = min(refused_at, trio.current_time())
                if trio.current_time() - refused_at >= PASSWORD_SECONDS:
                    raise DriverError(f"cannot run the {script.kind} script: {login} refuses the password: {complaint}")
            await trio.sleep(pause)
    raise DriverError(
        f"cannot run the {script.kind} script: no SSH at {login} within {CONNECT_SECONDS:g} seconds: {complaint}"
    )


async def open_pipes(command: Sequence[str], environ: Mapping[str, str]) -> trio.Process:
    """Start a program in a session of its own, with pipes to it. Raises OSError."""
    pipe = subprocess.PIPE
    return await trio.lowlevel.open_process(
        list(command), stdin=pipe, stdout=pipe, stderr=pipe, env=environ, start_new_session=True
    )


async def attempt(
    process: trio.Process,
    script: WrappedScript,
    on_line: OnLine,
    patience: trio.CancelScope,
    way: str,
    *,
    end: Callable[[trio.Process], Awaitable[None]] = kill,
) -> str:
    """Run a script by a process that leads to a shell in the guest, and reap the process by `end`.

    Return "" if the script has ended with exit status 0, and why it has not begun otherwise. Raises ScriptFailed, and
    another DriverError, which names the `way` into the guest, if the script's end was not seen.
    """
    assert process.stdio is not None
    assert process.stderr is not None
    said = b""
    async with process.stdio, process.stderr:
        try:
            transcript = await converse(process.stdio, script, on_line, patience)
            if transcript.exit_code is None:
                # Time for ssh to say why it ends, and to end.
                with trio.move_on_after(KILL_SECONDS):
                    while len(said) < _COMPLAINT_BYTES and (data := await process.stderr.receive_some()):
                        said += data
                    await process.wait()
        finally:
            await end(process)
    if transcript.exit_code is not None:
        script.check_end(transcript)
        return ""
    complaint = find_complaint(said) or f"the connection ended with exit status {process.returncode}"
    if transcript.began:
        raise DriverError(f"lost {way} while the {script.script.kind} script ran: {complaint}")
    return complaint


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
