"""Commands in VMs: `GET /vms/NAME/exec`, a WebSocket in front of SSH. Law: runs what it is asked to, and no shell here.

Needs the extra `orchard-cluster[ssh]`, like the jump host, and lives beside trio in the same way (jump.py says how).

One SSH connection into each VM is shared by all commands in it, and kept as long as it lasts: the first command opens
it over a tunnel, retrying while the guest boots. A command's channel is joined to its WebSocket by text frames of JSON,
their data in base64:

    from the client     {"type": "stdin", "data": ...}, empty data closes it
                        {"type": "resize", "terminal": {"rows": ..., "cols": ...}}
    from the controller {"type": "stdout", "data": ...}, {"type": "stderr", "data": ...}
                        and at last {"type": "exit", "exit": {"code": N}} or {"type": "error", "error": "..."}

A client that goes away ends its command.
"""

from __future__ import annotations

import base64
import binascii
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard import logs
from orchard.codec import APIError, ValidationError, dump_json, parse_json, shown
from orchard.net.tcp import splice
from orchard.nursery import first_exception, unwrap_groups
from orchard.reach import VMAccess
from orchard.schema import ENV_NAME, VM

if TYPE_CHECKING:
    import asyncssh  # noqa: TC004 -- `load` imports them for the time of running
    import trio_asyncio  # type: ignore[import-untyped]  # noqa: TC004 -- it has no types

SSH_PORT = 22
LOST = "the connection to the VM was lost"
MISSING = "exec needs the packages of the extra ssh on the controller: pip install 'orchard-cluster[ssh]'"
PAUSE = 0.5  # seconds between attempts to reach a guest that boots
LOGIN_SECONDS = 10.0  # of one attempt
KEEPALIVE = 30.0  # seconds between questions whether the guest is still there
MAX_SIZE = 10_000  # rows and columns of a terminal
READ_BYTES = 64 * 1024  # of output in a frame
TERM = "xterm-256color"
ROWS, COLS = 24, 80  # of a terminal that names none


def load() -> None:
    """Import the packages of the extra at their first use: they take a third of a second, and much memory.

    Raises APIError(503) when they are not installed.
    """
    global asyncssh, trio_asyncio
    try:
        import asyncssh
        import trio_asyncio
    except ImportError:
        raise APIError(503, MISSING) from None


@dataclass(frozen=True, slots=True)
class Command:
    """What is to run, and how. `rows` and `cols` are the terminal's, when there is one."""

    command: str
    interactive: bool = False
    tty: bool = False
    rows: int = ROWS
    cols: int = COLS
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""

    def check(self) -> None:
        """Raise APIError(400) for what no shell can run."""
        if not self.command:
            raise APIError(400, "command is missing, expected what is to run")
        for name, value in {"command": self.command, "workdir": self.workdir, **self.env}.items():
            if "\0" in value:
                raise APIError(400, f"{name} holds a NUL character")
        for name in self.env:
            if not ENV_NAME.fullmatch(name):
                raise APIError(400, f"env[{shown(name)}] is no name of a variable, expected {ENV_NAME.pattern}")

    def line(self) -> str:
        """Give the line for the user's shell in the VM: values are data there, the command is code."""
        exports = [f"export {name}={shlex.quote(value)};" for name, value in self.env.items()]
        enter = [f"cd -- {shlex.quote(self.workdir)} || exit 1;"] if self.workdir else []
        return " ".join([*exports, *enter, self.command])


class _Line:
    """The SSH connection into one VM, or why there is none."""

    def __init__(self) -> None:
        self.wait_durable = trio.Event()
        self.connection: asyncssh.SSHClientConnection | None = None
        self.error: APIError | None = None


class Executor:
    """Runs commands in VMs. `run` must be running."""

    def __init__(self, vm_access: VMAccess) -> None:
        self._vm_access = vm_access
        self._lines: dict[str, _Line] = {}  # by the VM's uid
        self._wanted = trio.Event()  # that there ever was a command; before that there is no loop
        self._ready = trio.Event()
        self._loop: Any = None
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the connections, until cancelled."""
        task_status.started()
        await self._wanted.wait()
        async with trio_asyncio.open_loop() as self._loop, trio.open_nursery() as self._nursery:
            self._loop.set_exception_handler(logs.complaint)
            self._ready.set()
            await trio.sleep_forever()

    async def connect(self, vm: VM, wait: float) -> asyncssh.SSHClientConnection:
        """Give the connection into a VM, opened within `wait` seconds. Raises APIError: 503, 404."""
        load()
        self._wanted.set()
        await self._ready.wait()
        line = self._lines.get(vm.uid)
        if line is None:
            line = self._lines[vm.uid] = _Line()
            self._nursery.start_soon(self._keep, vm, line, trio.current_time() + wait, wait)
        await line.wait_durable.wait()
        if line.connection is None:
            assert line.error is not None
            raise line.error
        return line.connection

    async def serve(
        self, connection: asyncssh.SSHClientConnection, command: Command, peer: WebSocketConnection
    ) -> None:
        """Run a command, its streams joined to a WebSocket, and end it when that closes."""
        with self._asyncio():
            try:
                process = await trio_asyncio.aio_as_trio(connection.create_process)(
                    command.line(),
                    encoding=None,
                    term_type=TERM if command.tty else None,
                    term_size=(command.cols, command.rows) if command.tty else None,
                )
            except (asyncssh.Error, OSError) as error:
                await _say(peer, {"type": "error", "error": f"the command did not start: {error}"})
                return
            try:
                await self._join(process, command, peer)
            except* (asyncssh.Error, OSError) as lost:
                broken = isinstance(why := first_exception(lost), asyncssh.ProtocolError)
                await _say(peer, {"type": "error", "error": f"{LOST}: {_words(why)}" if broken else LOST})
            finally:
                process.terminate()  # closing the channel alone would leave a command running that writes nothing
                process.close()

    async def _join(
        self, process: asyncssh.SSHClientProcess[bytes], command: Command, peer: WebSocketConnection
    ) -> None:
        async with trio.open_nursery() as nursery:  # what the client sends is of interest as long as the command runs
            nursery.start_soon(_feed, process, command, peer, nursery.cancel_scope)
            async with trio.open_nursery() as output:
                output.start_soon(_forward, "stdout", process.stdout, peer)
                output.start_soon(_forward, "stderr", process.stderr, peer)
            await trio_asyncio.aio_as_trio(process.wait_closed)()
            code = process.returncode
            if code is None:
                await _say(peer, {"type": "error", "error": LOST})
            else:
                await _say(peer, {"type": "exit", "exit": {"code": code if code >= 0 else 128 - code}})
            nursery.cancel_scope.cancel()

    # -- connections

    async def _keep(self, vm: VM, line: _Line, deadline: float, wait: float) -> None:
        """Open a VM's connection, and keep it until it is lost or the VM ends."""
        try:
            with self._asyncio():
                while True:
                    try:
                        with unwrap_groups():
                            await self._hold(vm, line, max(0.0, deadline - trio.current_time()))
                        return
                    except (asyncssh.Error, OSError, trio.BrokenResourceError) as error:
                        line.error = APIError(
                            503, f'no SSH into VM "{vm.name}" within {wait:g} seconds: {_words(error)}'
                        )
                        if line.wait_durable.is_set() or trio.current_time() + PAUSE > deadline:
                            return
                    await trio.sleep(PAUSE)
        except APIError as error:
            line.error = error
        finally:
            line.error = line.error or APIError(503, f'the SSH connection into VM "{vm.name}" was lost')
            if self._lines.get(vm.uid) is line:
                del self._lines[vm.uid]
            line.wait_durable.set()

    async def _hold(self, vm: VM, line: _Line, wait: float) -> None:
        async with self._vm_access.stream(vm, SSH_PORT, wait) as stream:
            ours, theirs = socket.socketpair()
            near = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            with unwrap_groups():
                async with trio.open_nursery() as nursery:  # the bytes end with the connection
                    nursery.start_soon(_carry, near, stream)
                    line.connection = await _log_in(theirs, vm)
                    line.wait_durable.set()
                    async with _closed(line.connection):
                        await trio_asyncio.aio_as_trio(line.connection.wait_closed)()
                    nursery.cancel_scope.cancel()

    @contextmanager
    def _asyncio(self) -> Iterator[None]:
        """Let the block's task use asyncio's things."""
        token = trio_asyncio.current_loop.set(self._loop)
        try:
            yield
        finally:
            trio_asyncio.current_loop.reset(token)


async def _log_in(sock: socket.socket, vm: VM) -> asyncssh.SSHClientConnection:
    """Speak SSH over a socket, which is then the connection's. Raises asyncssh.Error, OSError."""

    class Guarded(asyncssh.SSHClient):
        def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
            conn.internal_error = partial(_broken, conn)  # type: ignore[method-assign]

    connect = partial(
        asyncssh.connect,
        vm.name,
        client_factory=Guarded,
        sock=sock,
        username=vm.spec.username,
        password=vm.spec.password,
        known_hosts=None,  # each VM makes its own key
        config=None,
        client_keys=None,
        agent_path=None,
        login_timeout=LOGIN_SECONDS,
        keepalive_interval=KEEPALIVE,
    )
    connection: asyncssh.SSHClientConnection | None = None
    try:
        connection = await trio_asyncio.aio_as_trio(connect)()
        return connection
    finally:
        if connection is None:
            sock.close()


def _broken(connection: asyncssh.SSHClientConnection, info: Any = None, error_logger: Any = None) -> None:
    """Take what a guest sends that asyncssh stumbles over for a broken protocol, and close the connection.

    asyncssh would hand on whatever exception that was, to those who wait for the connection or read from it.
    """
    _, error, _ = info or sys.exc_info()
    assert error is not None
    connection.connection_lost(asyncssh.ProtocolError(f"what it sends is no SSH: {_words(error)}"))


@asynccontextmanager
async def _closed(connection: asyncssh.SSHClientConnection) -> AsyncIterator[None]:
    try:
        yield
    finally:
        connection.abort()


async def _carry(near: trio.abc.Stream, far: trio.abc.Stream) -> None:
    """Copy bytes both ways until one side ends. `near` is closed then, which asyncssh heeds more than a cancellation."""
    async with near:
        await splice(near, far)


def _words(error: BaseException) -> str:
    cause = first_exception(error)
    return str(cause) or type(cause).__name__


# ---- frames --------------------------------------------------------------------------------------------------------


async def _say(peer: WebSocketConnection, frame: Mapping[str, Any]) -> None:
    with suppress(ConnectionClosed):
        await peer.send_message(dump_json(frame).decode())


async def _forward(kind: str, source: Any, peer: WebSocketConnection) -> None:
    """Send what a command prints."""
    read = trio_asyncio.aio_as_trio(source.read)
    while data := await read(READ_BYTES):
        await _say(peer, {"type": kind, "data": base64.b64encode(data).decode()})


async def _feed(process: Any, command: Command, peer: WebSocketConnection, scope: trio.CancelScope) -> None:
    """Do what the client's frames say; cancel `scope` when it goes away, or says what is not understood."""
    if not command.interactive:
        process.stdin.write_eof()
    while True:
        try:
            message = await peer.get_message()
        except ConnectionClosed:
            break
        try:
            await _act(process, command, parse_json(message.encode() if isinstance(message, str) else message))
        except (APIError, ValidationError) as error:
            await _say(peer, {"type": "error", "error": str(error)})
            break
    scope.cancel()


async def _act(process: Any, command: Command, frame: Any) -> None:
    """Do what one frame says. Raises APIError for one that says nothing."""
    match frame:
        case {"type": "stdin", "data": str(text)}:
            if not command.interactive:
                raise APIError(400, "the command is not interactive and takes no stdin")
            try:
                data = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise APIError(400, f"the data of a stdin frame is {shown(text)}, expected base64") from None
            with suppress(OSError):  # it does not read any more
                if data:
                    process.stdin.write(data)
                    await trio_asyncio.aio_as_trio(process.stdin.drain)()
                else:
                    process.stdin.write_eof()
        case {"type": "resize", "terminal": {"rows": int(rows), "cols": int(cols)}}:
            if not (0 < rows <= MAX_SIZE and 0 < cols <= MAX_SIZE):
                raise APIError(400, f"the terminal is {rows} x {cols}, expected 1 to {MAX_SIZE} each")
            if command.tty:
                process.change_terminal_size(cols, rows)
        case _:
            raise APIError(400, f"a frame is {shown(frame)}, expected one of type stdin or resize")
