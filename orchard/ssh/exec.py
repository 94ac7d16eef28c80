"""Commands in VMs: `GET /vms/NAME/exec`, a WebSocket in front of SSH. Needs the extra `orchard-cluster[ssh]`.

Every command runs in the guest, by the shell of the VM's user, in a session of an SSH connection (connections.py). The
session is joined to the command's WebSocket by text frames of JSON, whose data is in base64:

    from the client     {"type": "stdin", "data": ...}; empty or no data closes stdin
                        {"type": "resize", "terminal": {"rows": ..., "cols": ...}}
    from the controller {"type": "stdout", "data": ...}, {"type": "stderr", "data": ...},
                        and as the last one {"type": "exit", "exit": {"code": N}} or {"type": "error", "error": "..."},
                        each with "watermark": N, which counts the frames from 1

The exit frame follows the end of the command. A process that the command left in the background may keep the output
open, so what comes after the end of the command is waited for within bounds.

When a client goes away, its command is terminated.
"""

from __future__ import annotations

import base64
import binascii
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.base.nursery import first_exception
from orchard.codec import MalformedError, ValidationError, dump_json, shown
from orchard.methods.common import parse_message
from orchard.schema import ENV_NAME, VM
from orchard.ssh.connections import GuestConnections, why
from orchard.ssh.remaining_output import RemainingOutput
from orchard.tunnel import UnreachableError, VMAccess, VMGoneError

if TYPE_CHECKING:
    import asyncssh

# The most rows that a terminal may have, and the most columns.
MAX_TERMINAL_SIZE = 10_000
# The size of a terminal if the client does not say it.
DEFAULT_ROWS, DEFAULT_COLS = 24, 80
# The most commands in one VM, each of which costs its guest a process, and the most of one sender among them, so that one
# sender does not keep all others out.
MAX_VM_COMMANDS = 64
MAX_SENDER_COMMANDS = 32

# How long output is waited for in all after a command has ended.
REST_SECONDS = 2.0  # seconds

_TERMINAL = "xterm-256color"
_LOST = "the connection to the VM was lost"


@dataclass(frozen=True, slots=True)
class Command:
    """A command and how it is run. `rows` and `cols` are the size of its terminal, if `tty` asks for one."""

    command: str = field(repr=False)
    interactive: bool = False
    tty: bool = False
    rows: int = DEFAULT_ROWS
    cols: int = DEFAULT_COLS
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    workdir: str = ""

    def check(self) -> None:
        """Raise MalformedError for a command that a shell cannot run."""
        if not self.command:
            raise MalformedError("command is missing, expected a command line")
        for name, value in {"command": self.command, "workdir": self.workdir, **self.env}.items():
            if "\0" in value:
                raise MalformedError(f"{name} contains a NUL character")
        for name in self.env:
            if not ENV_NAME.fullmatch(name):
                raise MalformedError(f"env[{shown(name)}]: expected the name of a variable, {ENV_NAME.pattern}")

    def line(self) -> str:
        """Return the line for the user's shell in the VM. The command is code there; all other values are quoted."""
        exports = [f"export {name}={shlex.quote(value)};" for name, value in self.env.items()]
        enter = [f"cd -- {shlex.quote(self.workdir)} || exit 1;"] if self.workdir else []
        return " ".join([*exports, *enter, self.command])

    async def start(self, connection: asyncssh.SSHClientConnection) -> Any:
        """Start the command in a session of a connection. For asyncio.

        Return its process, whose `ended` is set when the command has ended, or the session if its end was not seen.
        Raises asyncssh.Error, OSError.
        """

        import asyncssh

        class Process(asyncssh.SSHClientProcess[bytes]):
            def __init__(self) -> None:
                super().__init__()
                self.ended = trio.Event()

            def exit_status_received(self, status: int) -> None:
                self.ended.set()

            def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
                self.ended.set()

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                self.ended.set()

        _, process = await connection.create_session(
            Process,
            self.line(),
            encoding=None,
            term_type=_TERMINAL if self.tty else None,
            term_size=(self.cols, self.rows) if self.tty else None,
        )
        return process


class TooManyCommandsError(Exception):
    """So many commands run in a VM that another one is refused."""


class Executor:
    """Runs commands in VMs. `run` must be running."""

    def __init__(self, vm_access: VMAccess) -> None:
        self._connections = GuestConnections(vm_access)
        self.run = self._connections.run
        # Commands that run or wait for their VM, by the VM's uid and the sender.
        self._commands: Counter[tuple[str, str]] = Counter()

    async def connect(self, vm: VM, sender: str, wait: float) -> None:
        """Return when there is a connection into a VM, which is opened within `wait` seconds if there is none.

        Raises TooManyCommandsError, UnreachableError, VMGoneError, ExecUnavailableError.
        """
        with self._counted(vm, sender):
            await self._connections.connect(vm, wait)

    async def serve(self, vm: VM, command: Command, sender: str, wait: float, websocket: WebSocketConnection) -> None:
        """Run a command, and join its streams to a WebSocket. The command is terminated when the WebSocket closes."""
        import asyncssh

        frames = _Frames(websocket)
        try:
            with self._counted(vm, sender):
                async with self._connections.open_session(vm, wait, command.start) as process:
                    await self._join(process, command, frames)
        except (TooManyCommandsError, UnreachableError, VMGoneError) as error:
            await frames.send("error", error=str(error))
        except (asyncssh.Error, OSError) as error:
            await frames.send("error", error=f"the command did not start: {why(error)}")

    async def _join(self, process: Any, command: Command, frames: _Frames) -> None:
        """Join a process to a WebSocket until one of them ends."""
        import asyncssh

        try:
            await _Bridge(process, command, frames).run()
        except* (asyncssh.Error, OSError) as group:
            lost = first_exception(group)
            reason = f"{_LOST}: {why(lost)}" if isinstance(lost, asyncssh.ProtocolError) else _LOST
            await frames.send("error", error=reason)
        finally:
            # Closing the channel alone would leave a command running that writes nothing.
            if process.returncode is None:
                process.terminate()
            process.close()

    @contextmanager
    def _counted(self, vm: VM, sender: str) -> Iterator[None]:
        """Count a command for the block. Raises TooManyCommandsError."""
        for limit, count in (
            (MAX_VM_COMMANDS, sum(number for (uid, _), number in self._commands.items() if uid == vm.uid)),
            (MAX_SENDER_COMMANDS, self._commands[vm.uid, sender]),
        ):
            if count >= limit:
                raise TooManyCommandsError(
                    f'{count} commands run in VM "{vm.name}", at most {limit} may; wait for one to end'
                )
        self._commands[vm.uid, sender] += 1
        try:
            yield
        finally:
            self._commands[vm.uid, sender] -= 1
            if not self._commands[vm.uid, sender]:
                del self._commands[vm.uid, sender]


# ---- frames --------------------------------------------------------------------------------------------------------


class _Frames:
    """Sends the frames of a command, which it counts."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self.websocket = websocket
        self._watermark = 0

    async def send(self, kind: str, **content: Any) -> None:
        """Send a frame, unless the client has gone."""
        self._watermark += 1
        with suppress(ConnectionClosed):
            frame = {"type": kind, **content, "watermark": self._watermark}
            await self.websocket.send_message(dump_json(frame).decode())


class _Bridge:
    """Joins the streams of a running command to its WebSocket."""

    def __init__(self, process: Any, command: Command, frames: _Frames) -> None:
        self._process = process
        self._command = command
        self._frames = frames
        # The bounds on the reading from each of the command's two streams.
        self._readers: list[RemainingOutput] = []

    async def run(self) -> None:
        """Return when the command has ended, or the client has gone or sent a frame that is not understood.

        Raises asyncssh.Error and OSError, in groups, when the connection to the VM is lost.
        """
        # The client's frames are read as long as the command runs.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive_frames, nursery.cancel_scope)
            nursery.start_soon(self._notice_end)
            async with trio.open_nursery() as output:
                output.start_soon(self._send_output, "stdout", self._process.stdout)
                output.start_soon(self._send_output, "stderr", self._process.stderr)
            # After the end of its output, a command may go on.
            await self._process.ended.wait()
            code = self._process.returncode
            if code is None:
                await self._frames.send("error", error=_LOST)
            else:
                # For a command that a signal has ended, asyncssh returns the negative number of the signal.
                await self._frames.send("exit", exit={"code": code if code >= 0 else 128 - code})
            nursery.cancel_scope.cancel()

    async def _notice_end(self) -> None:
        await self._process.ended.wait()
        for remaining in self._readers:
            remaining.begin()

    async def _send_output(self, kind: str, source: Any) -> None:
        """Send what the command writes to one of its streams, until its end or the bounds of `RemainingOutput`."""
        import trio_asyncio  # type: ignore[import-untyped]  # it has no types

        read = trio_asyncio.aio_as_trio(source.read)
        remaining = RemainingOutput(REST_SECONDS)
        self._readers.append(remaining)
        while data := await remaining.read(read):
            await self._frames.send(kind, data=base64.b64encode(data).decode())

    # -- the client's frames

    async def _receive_frames(self, scope: trio.CancelScope) -> None:
        """Carry out the client's frames; cancel `scope` when it goes away or sends one that is not understood."""
        if not self._command.interactive:
            self._process.stdin.write_eof()
        try:
            while True:
                await self._carry_out(parse_message(await self._frames.websocket.get_message()))
        except ConnectionClosed:
            pass
        except ValidationError as error:
            await self._frames.send("error", error=str(error))
        scope.cancel()

    async def _carry_out(self, frame: Any) -> None:
        """Carry out one frame. Raises MalformedError."""
        match _in_lower_case(frame):
            case {"type": "stdin", "data": str(text)}:
                await self._write_stdin(text)
            case {"type": "stdin", **rest} if rest.get("data") is None:
                await self._write_stdin("")
            case {"type": "resize", "terminal": {"rows": int(rows), "cols": int(cols)}}:
                if not (0 < rows <= MAX_TERMINAL_SIZE and 0 < cols <= MAX_TERMINAL_SIZE):
                    raise MalformedError(f"the terminal is {rows} x {cols}, expected 1 to {MAX_TERMINAL_SIZE} each")
                if self._command.tty:
                    self._process.change_terminal_size(cols, rows)
            case _:
                raise MalformedError(f"the frame is {shown(frame)}, expected one of type stdin or resize")

    async def _write_stdin(self, text: str) -> None:
        """Write a frame's data to the command's stdin; close it for empty data. Raises MalformedError."""
        if not self._command.interactive:
            raise MalformedError("the command is not interactive and takes no stdin")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise MalformedError(f"the data of a stdin frame is {shown(text)}, expected base64") from None
        import trio_asyncio

        # A command that has closed its stdin can still run and print.
        with suppress(OSError):
            if data:
                self._process.stdin.write(data)
                await trio_asyncio.aio_as_trio(self._process.stdin.drain)()
            else:
                self._process.stdin.write_eof()


def _in_lower_case(value: Any, levels: int = 2) -> Any:
    """Return a frame with the names of its upper levels in lower case.

    A name that is in lower case already goes before all others, as in the API's bodies.
    """
    if not isinstance(value, dict) or not levels:
        return value
    names = sorted(value, key=str.islower)
    return {name.lower(): _in_lower_case(value[name], levels - 1) for name in names}
