"""The SSH jump host: `ssh -J account@controller vm` into every VM. Law: sockets in; only roads into VMs, no shell here.

Needs the extra `orchard-cluster[ssh]`. The server is asyncssh's, on trio-asyncio: its callbacks run in the same thread
as everything else, so a channel's bytes are handed over without a lock or a queue. With idle cores beside it, it carries
twice as much as asyncssh in a thread of its own, for 0.4 to 0.5 times the processor time (probably because two threads
would fight for the interpreter). When all cores are busy, or there is one, a thread does as well (it carries 0.8 to 1.3 times as
much, for as much time or a quarter more). In both cases it is about half of a bare relay without SSH, and a third of
OpenSSH's own server (`./run bench jump`, `taskset -c 0 ./run bench jump`).

A client logs in with a service account's name and token, or as `token` with a VM access token. All that it may open
are direct-tcpip channels, whose host is the name of a VM: what OpenSSH does for `-J`, `-W` and `-L`. Each is joined to
a tunnel into that VM, which is open before the channel is. A shell, a command, remote forwarding, agents and
everything else is refused.

Guessing is slow: every refused login of an address makes its next one wait longer before it is looked at, so that
hanging up early or sending many at once gains nothing, and a connection has few tries. Who logged in is looked up again
for each channel: an account that is gone, or a token that has expired, opens no more of them.

A tunnel can't be closed in one direction. So the end of what a client sends does not end the tunnel while the VM still
answers; when the VM has been silent for some time, it does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import trio
import trio_asyncio  # type: ignore[import-untyped]  # it has no types
from asyncssh.kex import get_kex_algs

from orchard import auth, logs
from orchard.codec import APIError
from orchard.files import write_private
from orchard.net.tcp import splice
from orchard.nursery import unwrap_groups
from orchard.reach import VMAccess
from orchard.schema import VM, ServiceAccount
from orchard.store import State

LOGIN_SECONDS = 20.0  # from the first byte to the last of a login; a silent connection is closed then
MAX_TRIES = 6  # passwords on a connection
MAX_LOGINS = 100  # connections that have not logged in yet: strangers can't take all descriptors
MAX_CONNECTIONS = 1000  # at once, with those; each may have many channels
DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before a login is looked at, by how many failed from its address
MAX_SOURCES = 10_000  # addresses whose failures are remembered; the oldest is forgotten
START_SECONDS = 10.0  # between a tunnel that is open and the channel that it is for
WAIT = 10  # seconds for a VM to run and its worker to connect
LINGER_SECONDS = 10.0  # of silence of a VM after its client has sent all; a request may take as long to be answered
RECEIVE_BYTES = 256 * 1024  # that a channel may be ahead of its VM, beside the 2 MiB of its window
# What the client likes best of these is used. Dropbear guesses that ours begins with curve25519.
KEY_EXCHANGE = (
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    # What recent clients ask for first, and warn without; not every installation has it.
    *({"mlkem768x25519-sha256"} & {name.decode() for name in get_kex_algs()}),
)
# AES alone, which every client has: OpenSSH's would choose ChaCha20, which takes 1.1 to 1.3 times the processor time.
ENCRYPTION: tuple[str, ...] = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr", "aes128-ctr")

_logger = logging.getLogger("orchard.vm.script")


def host_key(path: Path) -> asyncssh.SSHKey:
    """Read the host key, made at the first start. Raises OSError, ValueError."""
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519", comment="orchard")
        write_private(path, key.export_private_key())
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others than its owner; chmod 600 it")
    try:
        return asyncssh.read_private_key(path)
    except asyncssh.KeyImportError as error:
        raise ValueError(f"{path} is no SSH private key: {error}") from error


class Failures:
    """How many logins of each source (auth.source_of) were refused since one was accepted."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, int] = OrderedDict()

    def delay(self, source: str) -> float:
        """Give for how many seconds the next login of an address has to wait."""
        return DELAYS[min(self._counts.get(auth.source_of(source), 0), len(DELAYS) - 1)]

    def refused(self, source: str) -> None:
        source = auth.source_of(source)
        self._counts[source] = self._counts.pop(source, 0) + 1
        if len(self._counts) > MAX_SOURCES:
            self._counts.popitem(last=False)

    def accepted(self, source: str) -> None:
        self._counts.pop(auth.source_of(source), None)


class JumpHost:
    """Lets SSH clients into VMs. `gate` None asks nobody who they are."""

    def __init__(
        self,
        state: State,
        vm_access: VMAccess,
        gate: auth.Gate | None,
        access_key: bytes,
        clock: Callable[[], Any],
    ) -> None:
        """`clock` gives the time, in UTC, for access tokens."""
        self._state = state
        self._vm_access = vm_access
        self._gate = gate
        self._access_key = access_key
        self._clock = clock
        self.failures = Failures()
        self.connections: dict[_Server, asyncssh.SSHServerConnection] = {}

    async def serve(
        self,
        host: str | None,
        port: int,
        key: asyncssh.SSHKey,
        keepalive: float,
        *,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled; `started(port)` when it listens. Raises OSError when it can't."""
        with unwrap_groups():
            async with trio_asyncio.open_loop() as loop, trio.open_nursery() as channels:  # end with the server
                loop.set_exception_handler(logs.complaint)
                acceptor = await trio_asyncio.aio_as_trio(asyncssh.listen)(
                    host or None,
                    port,
                    server_factory=lambda: _Server(self, channels),
                    server_host_keys=[key],
                    login_timeout=LOGIN_SECONDS,
                    keepalive_interval=keepalive,
                    kex_algs=KEY_EXCHANGE,
                    encryption_algs=ENCRYPTION,
                    compression_algs=("none",),  # a packet that unpacks to a gigabyte would be taken
                    gss_host=None,  # neither Kerberos, where that is installed, nor a name server asked at the start
                    allow_pty=False,
                    agent_forwarding=False,
                    x11_forwarding=False,
                    server_version="Orchard",
                )
                try:
                    task_status.started(acceptor.get_port())
                    await trio.sleep_forever()
                finally:
                    acceptor.close()
                    for connection in list(self.connections.values()):
                        connection.disconnect(asyncssh.DISC_BY_APPLICATION, "the controller stops")

    # -- who, and where to

    def login(self, username: str, password: str) -> ServiceAccount | auth.Access:
        """Return who logs in with these credentials. Raises UnauthenticatedError, ForbiddenError."""
        if username == auth.TOKEN_USER and username not in self._state.accounts:
            return auth.read_access_token(self._access_key, password, self._clock())
        assert self._gate is not None
        account = self._gate.check(username, password)
        auth.require(account, "compute:connect")
        return account

    def vm_named(self, name: str, who: ServiceAccount | auth.Access | None) -> VM:
        """Find the VM that a client means; clients write the names of hosts in lower case. Raises APIError."""
        vms = self._state.vms
        found = vms.get(name)
        if found is None:
            alike = [vm for vm in vms.values() if vm.name.lower() == name.lower()]
            if not alike:
                raise APIError(404, f'VM "{name}" does not exist')
            if len(alike) > 1:
                names = ", ".join(sorted(vm.name for vm in alike))
                raise APIError(409, f'"{name}" could be any of the VMs {names}; SSH clients write names in lower case')
            found = alike[0]
        if isinstance(who, auth.Access) and who.vm_uid != found.uid:
            raise APIError(403, f'the access token is for another VM than "{found.name}"')
        return found

    async def join(self, channel: ChannelStream, vm: VM, port: int, opened: Callable[[Exception | None], None]) -> None:
        """Connect a channel to a port of a VM, call `opened`, and relay until one of them ends."""
        try:
            async with channel:
                with unwrap_groups():
                    async with self._vm_access.stream(vm, port, WAIT) as stream:
                        opened(None)
                        with trio.move_on_after(START_SECONDS):  # the client may have gone meanwhile
                            await channel.started.wait()
                        if channel.started.is_set():
                            await splice(channel, stream)
        except APIError as error:
            opened(error)
            _logger.info("a tunnel ended", extra={"vm": vm.name, "port": port, "reason": error.message})


class Valve:
    """Holds senders back while it is shut."""

    def __init__(self) -> None:
        self._opening: trio.Event | None = None  # while it is shut

    def shut(self) -> None:
        self._opening = self._opening or trio.Event()

    def open(self) -> None:
        if self._opening is not None:
            self._opening.set()
            self._opening = None

    async def passed(self) -> None:
        while self._opening is not None:
            await self._opening.wait()


class ChannelStream(trio.abc.Stream):
    """A channel of asyncssh's as a trio stream. The callbacks of `_Channel` feed it, in the same thread."""

    def __init__(self, line: Valve) -> None:
        """`line` is shut while the connection's socket takes no more."""
        self.started = trio.Event()
        self.channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self.window = Valve()  # shut while the client takes no more on this channel
        self._line = line
        self._buffer = bytearray()
        self._readable = trio.Event()
        self._finished = False  # the client sends no more
        self._gone = trio.Event()  # the channel is closed
        self._broken: Exception | None = None
        self._sent = 0  # times that something was sent

    # -- from asyncssh

    def fed(self, data: bytes) -> None:
        self._buffer += data
        self._readable.set()
        if len(self._buffer) > RECEIVE_BYTES and self.channel is not None:
            self.channel.pause_reading()

    def finished(self) -> None:
        self._finished = True
        self._readable.set()

    def lost(self, error: Exception | None) -> None:
        self._broken = error
        self._gone.set()
        self._readable.set()
        self.window.open()

    # -- as a stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._buffer:
            if self._finished:
                await self._silence()
            if self._broken is not None:
                raise trio.BrokenResourceError("the SSH connection was lost") from self._broken
            if self._finished or self._gone.is_set():
                return b""
            self._readable = trio.Event()
            await self._readable.wait()
        data = bytes(self._buffer[:max_bytes])
        del self._buffer[:max_bytes]
        if self.channel is not None and not self._gone.is_set():
            self.channel.resume_reading()
        await trio.lowlevel.checkpoint()
        return data

    async def _silence(self) -> None:
        """Wait until the channel is closed, or nothing is sent on it any more."""
        before = -1
        while before != self._sent and not self._gone.is_set():
            before = self._sent
            with trio.move_on_after(LINGER_SECONDS):
                await self._gone.wait()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.channel is None or self.channel.is_closing():
            raise trio.BrokenResourceError("the SSH channel is closed")
        try:
            self.channel.write(bytes(data))
        except OSError as error:
            raise trio.BrokenResourceError("the SSH channel is closed") from error
        self._sent += 1
        await self.window.passed()
        await self._line.passed()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self.channel is not None:
            with suppress(OSError):
                self.channel.close()
        await trio.lowlevel.checkpoint()


# ---- asyncssh's callbacks ------------------------------------------------------------------------------------------


class _Server(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, jump: JumpHost, channels: trio.Nursery) -> None:
        self._jump = jump
        self._channels = channels
        self._connection: asyncssh.SSHServerConnection | None = None
        self._line = Valve()
        self._credentials: tuple[str, str] | None = None  # with which it has logged in
        self._source = "-"
        self._tries = 0
        self.admitted = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        peer = conn.get_extra_info("peername")
        self._source = str(peer[0]) if peer else "-"
        # asyncssh sends as much as the client's window allows, which may be 4 GiB, whatever the socket takes.
        conn.pause_writing = self._line.shut  # type: ignore[method-assign]
        conn.resume_writing = self._line.open  # type: ignore[method-assign]
        others = self._jump.connections
        if len(others) >= MAX_CONNECTIONS or sum(not other.admitted for other in others) >= MAX_LOGINS:
            _logger.warning(
                "there are too many SSH connections", extra={"peer": self._source, "connections": len(others)}
            )
            conn.abort()
        else:
            others[self] = conn

    def connection_lost(self, exc: Exception | None) -> None:
        self._jump.connections.pop(self, None)
        self._line.open()

    def begin_auth(self, username: str) -> bool:
        return self._jump._gate is not None

    def auth_completed(self) -> None:
        self.admitted = True

    def password_auth_supported(self) -> bool:
        return True

    def kbdint_auth_supported(self) -> bool:
        return False  # it would be the same password once more

    async def validate_password(self, username: str, password: str) -> bool:
        """Look at a password; asyncssh cancels this when the client sends another one meanwhile."""
        jump = self._jump
        self._tries += 1
        if self._tries <= MAX_TRIES:
            await asyncio.sleep(jump.failures.delay(self._source))
            try:
                jump.login(username, password)
            except (auth.UnauthenticatedError, auth.ForbiddenError) as error:
                jump.failures.refused(self._source)
                shown = username[:64]
                _logger.warning(
                    "a login was refused", extra={"user": shown, "peer": self._source, "reason": str(error)}
                )
            else:
                jump.failures.accepted(self._source)
                self._credentials = username, password
                return True
        if self._tries >= MAX_TRIES and self._connection is not None:
            self._connection.disconnect(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many tries")
        return False

    def _who(self) -> ServiceAccount | auth.Access | None:
        """Find who has logged in, None if nobody is asked. Raises APIError when they may not any more."""
        if self._jump._gate is None:
            return None
        if self._credentials is None:
            raise auth.UnauthenticatedError("nobody has logged in")
        return self._jump.login(*self._credentials)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Awaitable[_Channel]:
        return self._open(dest_host, dest_port)

    async def _open(self, name: str, port: int) -> _Channel:
        """Give the channel's session once its tunnel is open; a refusal tells the client why."""
        stream = ChannelStream(self._line)
        opened = asyncio.get_running_loop().create_future()

        def tell(error: Exception | None) -> None:
            if not opened.done():
                opened.set_result(error)

        try:
            who = self._who()
            vm = self._jump.vm_named(name, who)
            if not 0 < port < 65536:
                raise APIError(400, f"port is {port}, expected 1 to 65535")
        except (APIError, auth.UnauthenticatedError, auth.ForbiddenError) as error:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(error)) from None
        account = who.account if isinstance(who, auth.Access) else who.name if who else "-"
        _logger.info(
            "a tunnel is opened", extra={"vm": vm.name, "port": port, "account": account, "peer": self._source}
        )
        self._channels.start_soon(partial(self._jump.join, stream, vm, port, tell))
        failure = await opened
        if failure is not None:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(failure))
        return _Channel(stream)


class _Channel(asyncssh.SSHTCPSession[bytes]):
    """One channel: what asyncssh says goes to its stream."""

    def __init__(self, stream: ChannelStream) -> None:
        self._stream = stream

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self._stream.channel = chan

    def session_started(self) -> None:
        self._stream.started.set()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._stream.fed(data)

    def eof_received(self) -> bool:
        self._stream.finished()
        return True  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self._stream.started.set()
        self._stream.lost(exc)

    def pause_writing(self) -> None:
        self._stream.window.shut()

    def resume_writing(self) -> None:
        self._stream.window.open()
