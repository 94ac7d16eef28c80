"""Commands in VMs: `GET /vms/NAME/exec`, a WebSocket in front of SSH. Needs the extra `orchard-cluster[ssh]`.

Every command runs in the guest, by the shell of the VM's user. asyncssh runs on trio-asyncio in the controller's own
thread; jump.py says why. Its packages are imported when the first command comes, because they take a third of a second
and much memory.

All commands in a VM share one SSH connection, which is kept until it is lost or the VM ends. The first command opens it
over a tunnel, with retries while the guest boots. The channel of a command is joined to its WebSocket by text frames of
JSON, whose data is in base64:

    from the client     {"type": "stdin", "data": ...}; empty data closes stdin
                        {"type": "resize", "terminal": {"rows": ..., "cols": ...}}
    from the controller {"type": "stdout", "data": ...}, {"type": "stderr", "data": ...},
                        and as the last one {"type": "exit", "exit": {"code": N}} or {"type": "error", "error": "..."}

When a client goes away, its command is terminated.
"""

from __future__ import annotations

import base64
import binascii
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard import logs
from orchard.codec import MalformedError, ValidationError, dump_json, parse_json, shown
from orchard.net.tcp import splice
from orchard.nursery import first_exception, unwrap_groups
from orchard.schema import ENV_NAME, VM
from orchard.tunnel import UnreachableError, VMAccess, VMGoneError

if TYPE_CHECKING:
    import asyncssh  # noqa: TC004 -- import_extra imports them at run time
    import trio_asyncio  # type: ignore[import-untyped]  # noqa: TC004 -- it has no types

SSH_PORT = 22
# The most rows that a terminal may have, and the most columns.
MAX_TERMINAL_SIZE = 10_000
# The size of a terminal if the client does not say it.
DEFAULT_ROWS, DEFAULT_COLS = 24, 80

_TERMINAL = "xterm-256color"
# Between two attempts to reach a guest that boots.
_RETRY_SECONDS = 0.5  # seconds
# Bounds one attempt to log in: a guest may accept connections before its SSH server answers.
_LOGIN_SECONDS = 10.0  # seconds
# Between two checks that a guest still answers.
_KEEPALIVE_SECONDS = 30.0  # seconds
# The most output in one frame.
_OUTPUT_BYTES = 64 * 1024  # bytes
_LOST = "the connection to the VM was lost"


class ExecUnavailableError(Exception):
    """This controller cannot run commands, because the packages of the extra are not installed."""


def import_extra() -> None:
    """Import the packages of the extra, at the first call only. Raises ExecUnavailableError."""
    global asyncssh, trio_asyncio
    try:
        import asyncssh
        import trio_asyncio
    except ImportError:
        raise ExecUnavailableError(
            "exec needs the packages of the extra ssh on the controller: pip install 'orchard-cluster[ssh]'"
        ) from None


@dataclass(frozen=True, slots=True)
class Command:
    """A command and how it is run. `rows` and `cols` are the size of its terminal, if `tty` asks for one."""

    command: str
    interactive: bool = False
    tty: bool = False
    rows: int = DEFAULT_ROWS
    cols: int = DEFAULT_COLS
    env: Mapping[str, str] = field(default_factory=dict)
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


class _SharedConnection:
    """The SSH connection into one VM. Once `decided`, there is either a connection or the error that prevented it."""

    def __init__(self) -> None:
        self.decided = trio.Event()
        self.connection: asyncssh.SSHClientConnection | None = None
        self.error: UnreachableError | VMGoneError | None = None


class Executor:
    """Runs commands in VMs and owns the SSH connections into them. `run` must be running."""

    def __init__(self, vm_access: VMAccess) -> None:
        self._vm_access = vm_access
        # By the uids of the VMs.
        self._shared: dict[str, _SharedConnection] = {}
        # The asyncio loop is opened for the first command, so a controller that runs no command does not need the extra.
        self._wanted = trio.Event()
        self._ready = trio.Event()
        self._loop: Any = None
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Keep the connections until cancelled."""
        await self._wanted.wait()
        async with trio_asyncio.open_loop() as self._loop, trio.open_nursery() as self._nursery:
            self._loop.set_exception_handler(logs.log_asyncio_error)
            self._ready.set()
            await trio.sleep_forever()

    async def connect(self, vm: VM, wait: float) -> asyncssh.SSHClientConnection:
        """Return the connection into a VM, which is opened within `wait` seconds if there is none.

        Raises UnreachableError, VMGoneError, ExecUnavailableError. The connection stays the executor's.
        """
        import_extra()
        self._wanted.set()
        await self._ready.wait()
        shared = self._shared.get(vm.uid)
        if shared is None:
            shared = self._shared[vm.uid] = _SharedConnection()
            self._nursery.start_soon(self._keep, vm, shared, wait)
        await shared.decided.wait()
        if shared.connection is None:
            assert shared.error is not None
            raise shared.error
        return shared.connection

    async def serve(
        self, connection: asyncssh.SSHClientConnection, command: Command, websocket: WebSocketConnection
    ) -> None:
        """Run a command whose streams are joined to a WebSocket; terminate it when the WebSocket closes."""
        with self._in_loop():
            try:
                process = await trio_asyncio.aio_as_trio(connection.create_process)(
                    command.line(),
                    encoding=None,
                    term_type=_TERMINAL if command.tty else None,
                    term_size=(command.cols, command.rows) if command.tty else None,
                )
            except (asyncssh.Error, OSError) as error:
                await _send_frame(websocket, {"type": "error", "error": f"the command did not start: {error}"})
                return
            try:
                await _Bridge(process, command, websocket).run()
            except* (asyncssh.Error, OSError) as group:
                lost = first_exception(group)
                reason = f"{_LOST}: {_reason(lost)}" if isinstance(lost, asyncssh.ProtocolError) else _LOST
                await _send_frame(websocket, {"type": "error", "error": reason})
            finally:
                # Closing the channel alone would leave a command running that writes nothing.
                process.terminate()
                process.close()

    # -- connections

    async def _keep(self, vm: VM, shared: _SharedConnection, wait: float) -> None:
        """Open a VM's connection within `wait` seconds, and keep it until it is lost or the VM ends."""
        deadline = trio.current_time() + wait
        try:
            with self._in_loop():
                while True:
                    try:
                        await self._hold(vm, shared, max(0.0, deadline - trio.current_time()))
                        return
                    except (asyncssh.Error, OSError, trio.BrokenResourceError) as error:
                        shared.error = UnreachableError(
                            f'no SSH into VM "{vm.name}" within {wait:g} seconds: {_reason(error)}'
                        )
                        if shared.decided.is_set() or trio.current_time() + _RETRY_SECONDS > deadline:
                            return
                    await trio.sleep(_RETRY_SECONDS)
        except (UnreachableError, VMGoneError) as error:
            shared.error = error
        finally:
            shared.error = shared.error or UnreachableError(f'the SSH connection into VM "{vm.name}" was lost')
            if self._shared.get(vm.uid) is shared:
                del self._shared[vm.uid]
            shared.decided.set()

    async def _hold(self, vm: VM, shared: _SharedConnection, wait: float) -> None:
        """Make one attempt to open the connection, and return when it is closed. Raises what the attempt raises."""
        async with self._vm_access.open_stream(vm, SSH_PORT, wait) as stream:
            ours, theirs = socket.socketpair()
            local = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            with unwrap_groups():
                # The bytes are carried as long as the connection lasts.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_carry, local, stream)
                    shared.connection = await _log_in(theirs, vm)
                    shared.decided.set()
                    try:
                        await trio_asyncio.aio_as_trio(shared.connection.wait_closed)()
                    finally:
                        shared.connection.abort()
                    nursery.cancel_scope.cancel()

    @contextmanager
    def _in_loop(self) -> Iterator[None]:
        """Let the task call asyncio code in the block."""
        token = trio_asyncio.current_loop.set(self._loop)
        try:
            yield
        finally:
            trio_asyncio.current_loop.reset(token)


async def _log_in(sock: socket.socket, vm: VM) -> asyncssh.SSHClientConnection:
    """Log in to a VM over a socket, which belongs to the connection then. Raises asyncssh.Error, OSError."""

    class GuardedClient(asyncssh.SSHClient):
        def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
            conn.internal_error = partial(_end_broken, conn)  # type: ignore[method-assign]

    connect = partial(
        asyncssh.connect,
        vm.name,
        client_factory=GuardedClient,
        sock=sock,
        username=vm.spec.username,
        password=vm.spec.password,
        # Each VM makes a key of its own.
        known_hosts=None,
        config=None,
        client_keys=None,
        agent_path=None,
        login_timeout=_LOGIN_SECONDS,
        keepalive_interval=_KEEPALIVE_SECONDS,
    )
    connection: asyncssh.SSHClientConnection | None = None
    try:
        connection = await trio_asyncio.aio_as_trio(connect)()
        return connection
    finally:
        if connection is None:
            sock.close()


def _end_broken(connection: asyncssh.SSHClientConnection, info: Any = None, error_logger: Any = None) -> None:
    """Close a connection whose guest sent data that made asyncssh fail, as after a protocol error.

    asyncssh itself would raise the exception, of any type, in each task that waits for the connection or reads from it.
    """
    _, error, _ = info or sys.exc_info()
    assert error is not None
    connection.connection_lost(asyncssh.ProtocolError(f"the VM does not speak SSH: {_reason(error)}"))


async def _carry(local: trio.abc.Stream, tunnel: trio.abc.Stream) -> None:
    """Copy bytes both ways until one side ends, then close `local`: asyncssh ends on that, not on a cancellation."""
    async with local:
        await splice(local, tunnel)


def _reason(error: BaseException) -> str:
    cause = first_exception(error)
    return str(cause) or type(cause).__name__


# ---- frames --------------------------------------------------------------------------------------------------------


async def _send_frame(websocket: WebSocketConnection, frame: Mapping[str, Any]) -> None:
    with suppress(ConnectionClosed):
        await websocket.send_message(dump_json(frame).decode())


class _Bridge:
    """Joins the streams of a running command to its WebSocket."""

    def __init__(self, process: Any, command: Command, websocket: WebSocketConnection) -> None:
        self._process = process
        self._command = command
        self._websocket = websocket

    async def run(self) -> None:
        """Return when the command has ended, or the client has gone or sent a frame that is not understood.

        Raises asyncssh.Error and OSError, in groups, when the connection to the VM is lost.
        """
        # The client's frames are read as long as the command runs.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive_frames, nursery.cancel_scope)
            async with trio.open_nursery() as output:
                output.start_soon(self._send_output, "stdout", self._process.stdout)
                output.start_soon(self._send_output, "stderr", self._process.stderr)
            await trio_asyncio.aio_as_trio(self._process.wait_closed)()
            code = self._process.returncode
            if code is None:
                await _send_frame(self._websocket, {"type": "error", "error": _LOST})
            else:
                # For a command that a signal has ended, asyncssh returns the negative number of the signal.
                code = code if code >= 0 else 128 - code
                await _send_frame(self._websocket, {"type": "exit", "exit": {"code": code}})
            nursery.cancel_scope.cancel()

    async def _send_output(self, kind: str, source: Any) -> None:
        read = trio_asyncio.aio_as_trio(source.read)
        while data := await read(_OUTPUT_BYTES):
            await _send_frame(self._websocket, {"type": kind, "data": base64.b64encode(data).decode()})

    async def _receive_frames(self, scope: trio.CancelScope) -> None:
        """Carry out the client's frames; cancel `scope` when it goes away or sends one that is not understood."""
        if not self._command.interactive:
            self._process.stdin.write_eof()
        try:
            while True:
                message = await self._websocket.get_message()
                await self._carry_out(parse_json(message.encode() if isinstance(message, str) else message))
        except ConnectionClosed:
            pass
        except ValidationError as error:
            await _send_frame(self._websocket, {"type": "error", "error": str(error)})
        scope.cancel()

    async def _carry_out(self, frame: Any) -> None:
        """Carry out one frame. Raises MalformedError."""
        match frame:
            case {"type": "stdin", "data": str(text)}:
                await self._write_stdin(text)
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
        # A command that has closed its stdin can still run and print.
        with suppress(OSError):
            if data:
                self._process.stdin.write(data)
                await trio_asyncio.aio_as_trio(self._process.stdin.drain)()
            else:
                self._process.stdin.write_eof()
