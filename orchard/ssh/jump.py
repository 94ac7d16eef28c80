"""The SSH jump host: `ssh -J account@controller vm` into every VM. Needs the extra `orchard-cluster[ssh]`.

A client logs in with a service account's name and token, or as user `token` with a VM access token as its password. It
can open direct-tcpip channels, which OpenSSH opens for `-J`, `-W` and `-L`; their host is the name of a VM. Each channel
is joined to a tunnel into that VM, and is opened after the tunnel. Shells, commands, remote forwarding, agents and
everything else are refused.

The server is asyncssh's, on trio-asyncio: its callbacks run in the controller's own thread, so the bytes of a channel
need neither locks nor queues. While other cores are idle, this carries twice as much as asyncssh in a thread of its own,
for 0.4 to 0.5 times the processor time (probably because two threads would compete for the interpreter). On one core, or
when all cores are busy, a thread would do as well: it carries 0.8 to 1.3 times as much, for as much processor time or a
quarter more. Both carry about half of what a relay without SSH carries, and a third of what OpenSSH's own server carries
(`./run bench jump`, `taskset -c 0 ./run bench jump`).

Guessing is slow: after each refused login from an address, the next one from there waits longer before it is checked, so
hanging up early or logging in many times at once gains nothing. The number of tries in a connection is limited. The
credentials are checked again for each channel: a deleted account or an expired token opens no more of them.

A tunnel cannot be closed in one direction. So when a client has sent everything, its tunnel stays open while the VM
still answers, and is closed after the VM has been silent for some time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh
import trio
import trio_asyncio  # type: ignore[import-untyped]  # it has no types
from asyncssh.kex import get_kex_algs

from orchard import auth, logs
from orchard.files import write_private
from orchard.net.tcp import splice
from orchard.net.unauthenticated import source_of
from orchard.nursery import Wakeup, unwrap_groups
from orchard.schema import VM, ServiceAccount
from orchard.store import State
from orchard.tunnel import UnreachableError, VMAccess, VMGoneError

# A connection that has not logged in after this time is closed.
LOGIN_SECONDS = 20.0  # seconds
# The most passwords that one connection may try.
MAX_TRIES = 6
# The most connections that have not logged in yet, so that strangers cannot use up the file descriptors.
MAX_LOGINS = 100
# The most connections, including those that have not logged in. Each can have many channels.
MAX_CONNECTIONS = 1000
# How long the check of a login waits, by the number of refused logins from its address.
DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds
# How long a VM may be silent after its client has sent everything: an answer may take as long.
LINGER_SECONDS = 10.0  # seconds
# asyncssh uses the first algorithm of the client's list that is in ours. Dropbear guesses that ours begins with
# curve25519. Recent clients ask for mlkem768 first and warn without it, but not every installation has it.
KEY_EXCHANGE = (
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    *({"mlkem768x25519-sha256"} & {name.decode() for name in get_kex_algs()}),
)
# Only AES, which every client has. OpenSSH's clients would choose ChaCha20, which takes 1.1 to 1.3 times the processor
# time.
ENCRYPTION: tuple[str, ...] = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr", "aes128-ctr")

# How long a tunnel waits for its channel to be opened.
_START_SECONDS = 10.0  # seconds
# How long a channel waits for its VM to run and for the worker to connect.
_WAIT_SECONDS = 10.0  # seconds
# The most that a channel buffers for its VM, in addition to the 2 MiB of the channel's window.
_AHEAD_BYTES = 256 * 1024  # bytes
_LOGGED_NAME = 64  # characters

_logger = logging.getLogger("orchard.ssh")


class ChannelRefusedError(Exception):
    """A channel cannot be opened; `str(error)` is what the client is told."""


def host_key(path: Path) -> asyncssh.SSHKey:
    """Return the host key, which the first start creates. Raises OSError, ValueError."""
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519", comment="orchard")
        write_private(path, key.export_private_key())
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others than its owner; run: chmod 600 {path}")
    try:
        return asyncssh.read_private_key(path)
    except asyncssh.KeyImportError as error:
        raise ValueError(f"{path} is not an SSH private key: {error}") from error


class LoginDelays:
    """How long logins wait, by the number of refused logins of each source (`source_of`) since an accepted one.

    At most auth.MAX_FAILED_SOURCES sources are remembered; the one that failed least recently is forgotten first.
    """

    def __init__(self) -> None:
        self._refused: OrderedDict[str, int] = OrderedDict()

    def delay(self, address: str) -> float:
        """Return the seconds that the next login from an address has to wait."""
        return DELAYS[min(self._refused.get(source_of(address), 0), len(DELAYS) - 1)]

    def note_refused(self, address: str) -> None:
        source = source_of(address)
        self._refused[source] = self._refused.pop(source, 0) + 1
        if len(self._refused) > auth.MAX_FAILED_SOURCES:
            self._refused.popitem(last=False)

    def note_accepted(self, address: str) -> None:
        self._refused.pop(source_of(address), None)


class JumpHost:
    """Lets SSH clients into VMs. If `gate` is None, every client may connect to every VM."""

    def __init__(
        self,
        state: State,
        vm_access: VMAccess,
        gate: auth.Gate | None,
        access_key: bytes,
        clock: Callable[[], Any],
    ) -> None:
        """`access_key` verifies VM access tokens; `clock` returns the time in UTC, for their expiry."""
        self._state = state
        self._vm_access = vm_access
        self._access_key = access_key
        self._clock = clock
        self.gate = gate
        self.delays = LoginDelays()
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
        """Serve until cancelled; call `started` with the port. `keepalive` is in seconds. Raises OSError."""
        with unwrap_groups():
            # The tasks of the channels end with the server.
            async with trio_asyncio.open_loop() as loop, trio.open_nursery() as channels:
                loop.set_exception_handler(logs.log_asyncio_error)
                acceptor = await trio_asyncio.aio_as_trio(asyncssh.listen)(
                    host or None,
                    port,
                    server_factory=lambda: _Server(self, channels),
                    server_host_keys=[key],
                    login_timeout=LOGIN_SECONDS,
                    keepalive_interval=keepalive,
                    kex_algs=KEY_EXCHANGE,
                    encryption_algs=ENCRYPTION,
                    # asyncssh would take a packet that unpacks to a gigabyte.
                    compression_algs=("none",),
                    # No Kerberos, where that is installed, and so no name lookup at the start.
                    gss_host=None,
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
                        connection.disconnect(asyncssh.DISC_BY_APPLICATION, "the controller is stopping")

    def login(self, username: str, password: str) -> ServiceAccount | auth.Access:
        """Return who logs in with these credentials. Raises UnauthenticatedError, ForbiddenError."""
        if username == auth.TOKEN_USER and username not in self._state.accounts:
            return auth.read_access_token(self._access_key, password, self._clock())
        assert self.gate is not None
        account = self.gate.check(username, password)
        auth.require(account, "compute:connect")
        return account

    def find_vm(self, name: str, who: ServiceAccount | auth.Access | None) -> VM:
        """Return the VM that a client means. Raises ChannelRefusedError.

        SSH clients write the names of hosts in lower case, so a name may differ from the VM's in the case of letters.
        """
        vms = self._state.vms
        found = vms.get(name)
        if found is None:
            alike = [vm for vm in vms.values() if vm.name.lower() == name.lower()]
            if not alike:
                raise ChannelRefusedError(f'VM "{name}" does not exist')
            if len(alike) > 1:
                names = ", ".join(sorted(vm.name for vm in alike))
                raise ChannelRefusedError(
                    f'"{name}" could be any of the VMs {names}; SSH clients write names in lower case'
                )
            found = alike[0]
        if isinstance(who, auth.Access) and who.vm_uid != found.uid:
            raise ChannelRefusedError(f'the access token is for another VM than "{found.name}"')
        return found

    async def join(self, channel: ChannelStream, vm: VM, port: int, opened: Callable[[Exception | None], None]) -> None:
        """Relay between a channel and a port of a VM until one side ends; close the channel.

        Calls `opened` when the tunnel is open, or with the error that prevented it.
        """
        try:
            async with channel:
                with unwrap_groups():
                    async with self._vm_access.open_stream(vm, port, _WAIT_SECONDS) as stream:
                        opened(None)
                        # The client may have gone meanwhile.
                        with trio.move_on_after(_START_SECONDS):
                            await channel.started.wait()
                        if channel.started.is_set():
                            await splice(channel, stream)
        except (UnreachableError, VMGoneError) as error:
            opened(error)
            _logger.info("SSH tunnel ended", extra={"vm": vm.name, "port": port, "reason": str(error)})


class FlowControl:
    """Blocks `wait_resumed` between `pause` and `resume`."""

    def __init__(self) -> None:
        self._is_paused = False
        self._resumed = Wakeup()

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._resumed.set()

    async def wait_resumed(self) -> None:
        while self._is_paused:
            await self._resumed.wait()


class ChannelStream(trio.abc.Stream, asyncssh.SSHTCPSession[bytes]):
    """A channel of asyncssh's as a trio stream. asyncssh calls it back in the thread that reads from it."""

    def __init__(self, connection_flow: FlowControl) -> None:
        """`connection_flow` is paused while the connection's socket takes no more."""
        self.started = trio.Event()
        self.channel: asyncssh.SSHTCPChannel[bytes] | None = None
        # Paused while the client takes no more on this channel.
        self._flow = FlowControl()
        self._connection_flow = connection_flow
        self._buffer = bytearray()
        self._readable = Wakeup()
        # Whether the client has sent its end of file.
        self._at_eof = False
        # Set when the channel is closed. `_error` is the reason, if the connection was lost.
        self._gone = trio.Event()
        self._error: Exception | None = None
        # The number of writes, by which a silent VM is noticed.
        self._writes = 0

    # -- asyncssh's callbacks

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self.channel = chan

    def session_started(self) -> None:
        self.started.set()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        self._buffer += data
        self._readable.set()
        if len(self._buffer) > _AHEAD_BYTES and self.channel is not None:
            self.channel.pause_reading()

    def eof_received(self) -> bool:
        self._at_eof = True
        self._readable.set()
        # The other direction stays open.
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._error = exc
        self._gone.set()
        self.started.set()
        self._readable.set()
        self._flow.resume()

    def pause_writing(self) -> None:
        self._flow.pause()

    def resume_writing(self) -> None:
        self._flow.resume()

    # -- as a stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while not self._buffer:
            if self._at_eof:
                await self._wait_silence()
            if self._error is not None:
                raise trio.BrokenResourceError("the SSH connection was lost") from self._error
            if self._at_eof or self._gone.is_set():
                return b""
            await self._readable.wait()
        data = bytes(self._buffer[:max_bytes])
        del self._buffer[:max_bytes]
        if self.channel is not None and not self._gone.is_set():
            self.channel.resume_reading()
        await trio.lowlevel.checkpoint()
        return data

    async def _wait_silence(self) -> None:
        """Wait until the channel is closed, or nothing was sent on it for LINGER_SECONDS."""
        before = -1
        while before != self._writes and not self._gone.is_set():
            before = self._writes
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
        self._writes += 1
        await self._flow.wait_resumed()
        await self._connection_flow.wait_resumed()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self.channel is not None:
            with suppress(OSError):
                self.channel.close()
        await trio.lowlevel.checkpoint()


# ---- connections --------------------------------------------------------------------------------------------------


class _Server(asyncssh.SSHServer):
    """One connection: asyncssh's callbacks for its login and its channels."""

    def __init__(self, jump: JumpHost, channels: trio.Nursery) -> None:
        self._jump = jump
        self._channels = channels
        self._connection: asyncssh.SSHServerConnection | None = None
        self._flow = FlowControl()
        # The user name and password that were accepted.
        self._credentials: tuple[str, str] | None = None
        self._address = "-"
        self._tries = 0
        self.admitted = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        peer = conn.get_extra_info("peername")
        self._address = str(peer[0]) if peer else "-"
        # asyncssh sends as much as the client's window allows, which may be 4 GiB, whatever the socket takes.
        conn.pause_writing = self._flow.pause  # type: ignore[method-assign]
        conn.resume_writing = self._flow.resume  # type: ignore[method-assign]
        others = self._jump.connections
        if len(others) >= MAX_CONNECTIONS or sum(not other.admitted for other in others) >= MAX_LOGINS:
            _logger.warning("too many SSH connections", extra={"peer": self._address, "connections": len(others)})
            conn.abort()
        else:
            others[self] = conn

    def connection_lost(self, exc: Exception | None) -> None:
        self._jump.connections.pop(self, None)
        self._flow.resume()

    def begin_auth(self, username: str) -> bool:
        return self._jump.gate is not None

    def auth_completed(self) -> None:
        self.admitted = True

    def password_auth_supported(self) -> bool:
        return True

    def kbdint_auth_supported(self) -> bool:
        # Clients would ask for the same password a second time.
        return False

    async def validate_password(self, username: str, password: str) -> bool:
        """Check a password. asyncssh cancels this when the client sends another one meanwhile."""
        jump = self._jump
        self._tries += 1
        if self._tries <= MAX_TRIES:
            await asyncio.sleep(jump.delays.delay(self._address))
            try:
                jump.login(username, password)
            except (auth.UnauthenticatedError, auth.ForbiddenError) as error:
                jump.delays.note_refused(self._address)
                _logger.warning(
                    "SSH login refused",
                    extra={"user": username[:_LOGGED_NAME], "peer": self._address, "reason": str(error)},
                )
            else:
                jump.delays.note_accepted(self._address)
                self._credentials = username, password
                return True
        if self._tries >= MAX_TRIES and self._connection is not None:
            self._connection.disconnect(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many tries")
        return False

    def _identify(self) -> ServiceAccount | auth.Access | None:
        """Return who has logged in, None without a gate.

        Raises UnauthenticatedError and ForbiddenError, also when the credentials are not valid any more.
        """
        if self._jump.gate is None:
            return None
        if self._credentials is None:
            raise auth.UnauthenticatedError("not logged in")
        return self._jump.login(*self._credentials)

    async def connection_requested(self, name: str, port: int, orig_host: str, orig_port: int) -> ChannelStream:
        """Return the channel once its tunnel is open. Raises ChannelOpenError, which tells the client why."""
        try:
            who = self._identify()
            vm = self._jump.find_vm(name, who)
            if not 0 < port < 65536:
                raise ChannelRefusedError(f"port is {port}, expected 1 to 65535")
        except (ChannelRefusedError, auth.UnauthenticatedError, auth.ForbiddenError) as error:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(error)) from None
        account = who.account if isinstance(who, auth.Access) else who.name if who else "-"
        _logger.info(
            "opening SSH tunnel", extra={"vm": vm.name, "port": port, "account": account, "peer": self._address}
        )
        stream = ChannelStream(self._flow)
        outcome = asyncio.get_running_loop().create_future()

        def opened(error: Exception | None) -> None:
            if not outcome.done():
                outcome.set_result(error)

        self._channels.start_soon(partial(self._jump.join, stream, vm, port, opened))
        failure = await outcome
        if failure is not None:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(failure))
        return stream
