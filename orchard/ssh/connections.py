"""The SSH connections into VMs. Needs the extra `orchard-cluster[ssh]`.

All commands in a VM share its connections. The first command opens one over a tunnel, and callers who wait for one
share each attempt, but each of them has a deadline of its own. A connection is kept until it is lost or the VM ends. A
guest that refuses one more session on a connection gets another connection (OpenSSH accepts ten sessions on each by
default), and so does one that does not answer on its connection any more. An additional connection is closed with its
last session.

asyncssh runs on trio-asyncio in the controller's own thread; jump.py says why. Its packages are imported when the first
command comes, because they take a third of a second and much memory.
"""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from orchard.base import logs
from orchard.base.nursery import first_exception, unwrap_groups
from orchard.net.tcp import splice
from orchard.schema import VM
from orchard.tunnel import LEAST_SECONDS, UnreachableError, VMAccess, VMGoneError

if TYPE_CHECKING:
    import asyncssh  # noqa: TC004 -- import_extra imports them at run time
    import trio_asyncio  # type: ignore[import-untyped]  # noqa: TC004 -- it has no types

SSH_PORT = 22
# The most connections into one VM. A guest with OpenSSH's default takes ten sessions on each.
MAX_VM_CONNECTIONS = 8
# A connection on which a guest does not open a session within this time gets no more of them.
SESSION_SECONDS = 5.0  # seconds

# Pause between attempts to reach a guest that boots.
_RETRY_SECONDS = 0.5  # seconds
# Limit of one attempt to log in: a guest may accept connections before its SSH server answers.
_LOGIN_SECONDS = 10.0  # seconds
# Interval of checking that a guest still answers.
_KEEPALIVE_SECONDS = 30.0  # seconds

# The codes with which a guest refuses a session (RFC 4254, section 5.1). OpenSSH uses 2, others 4.
_REFUSALS = (1, 2, 3, 4)

SessionT = TypeVar("SessionT")


class ExecUnavailableError(Exception):
    """This controller cannot run commands, because the packages of the extra are not installed."""


def describe_missing_extra(what: str, error: ImportError) -> str:
    """Return a message that `what` needs the extra: which package is missing, and how to install it, also offline."""
    return (
        f"{what} needs the extra ssh on the controller ({error}): pip install 'orchard-cluster[ssh]' with Python 3.11 to 3.13,"
        " without internet with --no-index --find-links and a directory that ./run wheelhouse has filled; orchard.pyz does not"
        " contain extras"
    )


def import_extra() -> None:
    """Import the packages of the extra, at the first call only. Raises ExecUnavailableError."""
    global asyncssh, trio_asyncio
    try:
        import asyncssh
        import trio_asyncio
    except ImportError as error:
        raise ExecUnavailableError(describe_missing_extra("exec", error)) from None


class _Connection:
    """An open connection into a VM. `sessions` are open on it or being opened."""

    def __init__(self, ssh: asyncssh.SSHClientConnection) -> None:
        self.ssh = ssh
        self.sessions = 0
        # Whether the guest refused a session since the last one ended, and whether it has left one unanswered.
        self.is_full = False
        self.is_silent = False


class _Attempt:
    """An attempt to open a connection. `done` is set at its end; `error` is why it failed, None if it succeeded."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class _Guest:
    """The connections into one VM, and the attempt to open another one, if there is one."""

    def __init__(self) -> None:
        self.connections: list[_Connection] = []
        self.attempt: _Attempt | None = None

    def find_room(self) -> _Connection | None:
        return next((one for one in self.connections if not (one.is_full or one.is_silent)), None)


class GuestConnections:
    """The connections into all VMs. `run` must be running."""

    def __init__(self, vm_access: VMAccess) -> None:
        self._vm_access = vm_access
        # By the uids of the VMs.
        self._guests: dict[str, _Guest] = {}
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

    async def connect(self, vm: VM, wait: float) -> _Connection:
        """Return a connection that may take another session. It is opened within `wait` seconds if there is none.

        At least one attempt is made. Raises UnreachableError, VMGoneError, ExecUnavailableError.
        """
        import_extra()
        self._wanted.set()
        await self._ready.wait()
        begun = trio.current_time()
        deadline = begun + wait
        while True:
            await self._vm_access.wait_running(vm, max(0.0, deadline - trio.current_time()))
            guest = self._guests.setdefault(vm.uid, _Guest())
            if connection := guest.find_room():
                return connection
            attempt = guest.attempt or self._begin_attempt(vm, guest)
            with trio.move_on_at(max(deadline, begun + LEAST_SECONDS)):
                await attempt.done.wait()
            if isinstance(attempt.error, VMGoneError):
                raise attempt.error
            if connection := guest.find_room():
                return connection
            if trio.current_time() + _RETRY_SECONDS > deadline:
                reason = f": {why(attempt.error)}" if attempt.error is not None else ""
                raise UnreachableError(f'no SSH into VM "{vm.name}" within {wait:g} seconds{reason}')
            await trio.sleep(_RETRY_SECONDS)

    @asynccontextmanager
    async def open_session(
        self, vm: VM, wait: float, start: Callable[[asyncssh.SSHClientConnection], Awaitable[SessionT]]
    ) -> AsyncIterator[SessionT]:
        """Yield what `start` returns, an asyncio function that opens a session on a connection.

        While the guest refuses the session, or the connection turns out to be lost, another connection is tried, within
        `wait` seconds. Raises what `connect` raises, and asyncssh.Error or OSError if no connection takes the session.
        """
        deadline = trio.current_time() + wait
        for tries in itertools.count():
            if tries > 1:
                await trio.sleep(_RETRY_SECONDS)
            connection = await self.connect(vm, max(0.0, deadline - trio.current_time()))
            connection.sessions += 1
            session: SessionT | None = None
            try:
                with self._in_loop():
                    session = await self._start(connection, start, deadline)
                    if session is not None:
                        yield session
                        return
            finally:
                connection.sessions -= 1
                if session is not None:
                    connection.is_full = False
                if not connection.sessions and (connection.is_silent or self._has_others(vm, connection)):
                    connection.ssh.abort()

    async def _start(
        self,
        connection: _Connection,
        start: Callable[[asyncssh.SSHClientConnection], Awaitable[SessionT]],
        deadline: float,
    ) -> SessionT | None:
        """Open a session on a connection. Return None if another connection may take it. Raises asyncssh.Error, OSError."""
        try:
            with trio.move_on_after(SESSION_SECONDS):
                session: SessionT = await trio_asyncio.aio_as_trio(start)(connection.ssh)
                return session
            connection.is_silent = True
        except (asyncssh.Error, OSError) as error:
            if connection.ssh.is_closed():
                connection.is_silent = True
            # A guest that refuses the only session on a connection would refuse it on another one, too.
            elif isinstance(error, asyncssh.ChannelOpenError) and error.code in _REFUSALS and connection.sessions > 1:
                connection.is_full = True
            else:
                raise
            if trio.current_time() > deadline:
                raise
        return None

    def _has_others(self, vm: VM, connection: _Connection) -> bool:
        guest = self._guests.get(vm.uid)
        return guest is not None and any(one is not connection for one in guest.connections)

    # -- opening

    def _begin_attempt(self, vm: VM, guest: _Guest) -> _Attempt:
        """Start a task that opens another connection. Raises UnreachableError if there are too many."""
        if len(guest.connections) >= MAX_VM_CONNECTIONS:
            raise UnreachableError(
                f'VM "{vm.name}" takes no more SSH sessions on {MAX_VM_CONNECTIONS} connections, which is the limit;'
                " wait for a command to end"
            )
        guest.attempt = _Attempt()
        self._nursery.start_soon(self._keep, vm, guest, guest.attempt)
        return guest.attempt

    async def _keep(self, vm: VM, guest: _Guest, attempt: _Attempt) -> None:
        """Open a connection, and keep it until it is lost or the VM ends."""
        try:
            with self._in_loop():
                await self._hold(vm, guest, attempt)
        except (asyncssh.Error, OSError, trio.BrokenResourceError, UnreachableError, VMGoneError) as error:
            attempt.error = error
        finally:
            self._end_attempt(guest, attempt)
            if not guest.connections and guest.attempt is None and self._guests.get(vm.uid) is guest:
                del self._guests[vm.uid]

    async def _hold(self, vm: VM, guest: _Guest, attempt: _Attempt) -> None:
        """Make one attempt to open a connection, and return when it is closed. Raises what the attempt raises."""
        async with self._vm_access.open_stream(vm, SSH_PORT, 0) as stream:
            ours, theirs = socket.socketpair()
            local = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            with unwrap_groups():
                # The bytes are carried as long as the connection lasts.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_carry, local, stream)
                    connection = _Connection(await _log_in(theirs, vm))
                    guest.connections.append(connection)
                    self._end_attempt(guest, attempt)
                    try:
                        await trio_asyncio.aio_as_trio(connection.ssh.wait_closed)()
                    finally:
                        guest.connections.remove(connection)
                        connection.ssh.abort()
                    nursery.cancel_scope.cancel()

    def _end_attempt(self, guest: _Guest, attempt: _Attempt) -> None:
        if guest.attempt is attempt:
            guest.attempt = None
        attempt.done.set()

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
    connection.connection_lost(asyncssh.ProtocolError(f"the VM does not speak SSH: {why(error)}"))


async def _carry(local: trio.abc.Stream, tunnel: trio.abc.Stream) -> None:
    """Copy bytes both ways until one side ends, then close `local`: asyncssh ends on that, not on a cancellation."""
    async with local:
        await splice(local, tunnel)


def why(error: BaseException) -> str:
    """Return the reason that an error of asyncssh or of the network names."""
    cause = first_exception(error)
    return str(cause) or type(cause).__name__
