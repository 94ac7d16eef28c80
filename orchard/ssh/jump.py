"""The SSH jump host: `ssh -J account@controller vm` into every VM. Needs the extra `orchard-cluster[ssh]`.

A client logs in with a service account's name and its token or one of its keys, or as user `token` with a VM access
token as its password. It can open direct-tcpip channels, which OpenSSH opens for `-J`, `-W` and `-L`; their host is
the name of a VM. Each channel is joined to a tunnel into that VM, and is opened after the tunnel. Shells, commands,
remote forwarding, agents and everything else are refused.

The server is asyncssh's, on trio-asyncio: its callbacks run in the controller's own thread, so the bytes of a channel
need neither locks nor queues. While other cores are idle, this carries twice as much as asyncssh in a thread of its
own, for 0.4 to 0.5 times the processor time (probably because two threads would compete for the interpreter). On one
core, or when all cores are busy, a thread would do as well: it carries 0.8 to 1.3 times as much, for as much processor
time or a quarter more. Both carry about half of what a relay without SSH carries, and a third of what OpenSSH's own
server carries (`./run bench jump`, `taskset -c 0 ./run bench jump`).

Guessing is slow: passwords count for the limit on wrong credentials that holds for the API, too (decisions/login_limit.py).
The number of tries in a connection and all of its work before it has logged in are limited, and so are the connections that
have not logged in. The credentials are checked again for each channel: an expired token or a key that was removed opens
no more of them. A connection ends with its account, and with the role.

A tunnel cannot be closed in one direction. So when a client has sent everything, its tunnel stays open while the VM
still answers, and is closed after the VM has been silent for some time.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import asyncssh
import trio
import trio_asyncio  # type: ignore[import-untyped]  # it has no types
from asyncssh.kex import get_kex_algs

from orchard import auth
from orchard.base import logs
from orchard.base.files import write_private
from orchard.base.nursery import Wakeup, sleep_pauses, unwrap_groups
from orchard.decisions.access_tokens import Access
from orchard.decisions.gate import Gate
from orchard.decisions.login_limit import TooManyFailuresError
from orchard.net.tcp import splice
from orchard.net.unauthenticated import Unauthenticated
from orchard.net.urls import basic_header
from orchard.schema import VM, Role, ServiceAccount
from orchard.sessions import AccountSessions, SessionSubject
from orchard.store import State
from orchard.tunnel import UnreachableError, VMAccess, VMGoneError

# A connection that has not logged in after this time is closed.
LOGIN_SECONDS = 20.0  # seconds
# The most passwords that one connection may try.
MAX_TRIES = 6
# The most requests of one connection for a login that may fail: passwords, keys of an agent, other methods.
MAX_LOGIN_REQUESTS = 40
# The most key exchanges of a connection that has not logged in. Each takes a millisecond.
MAX_EARLY_EXCHANGES = 2
# The most connections that have not logged in yet, of one address and in all. Then the oldest one makes room.
MAX_LOGINS_OF_SOURCE = 50
MAX_LOGINS = 100
# The most connections, including those that have not logged in. Each can have many channels.
MAX_CONNECTIONS = 1000
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

# Signatures of host keys and clients' keys. SHA-1, which asyncssh would take from RSA keys, is not among them.
SIGNATURES = (
    "ssh-ed25519",
    *(f"ecdsa-sha2-nistp{bits}" for bits in (256, 384, 521)),
    *("rsa-sha2-512", "rsa-sha2-256"),
    *("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com"),
)

# The smallest RSA key.
_RSA_BITS = 2048
# How long a tunnel waits for its channel to be opened.
_START_SECONDS = 10.0  # seconds
# How long a channel waits for its VM to run and for the worker to connect.
_WAIT_SECONDS = 10.0  # seconds
# The most that a channel buffers for its VM, in addition to the 2 MiB of the channel's window.
_AHEAD_BYTES = 256 * 1024  # bytes
_LOGGED_NAME = 64  # characters

_logger = logging.getLogger("orchard.ssh")


class ChannelRefusedError(Exception):
    """A channel cannot be opened; str() is the message for the client."""


def host_keys(paths: Sequence[Path]) -> list[asyncssh.SSHKeyPair]:
    """Return the host keys of files that the first start creates. At most one of each type. Raises OSError, ValueError."""
    keys: dict[str, Path] = {}
    pairs = []
    for path in paths:
        key = _host_key(path)
        kind = key.get_algorithm()
        if kind in keys:
            raise ValueError(
                f"{path} and {keys[kind]} are both SSH private keys of type {kind}, expected one of each type"
            )
        bits: int = getattr(key.pyca_key, "key_size", 0) if kind == "ssh-rsa" else _RSA_BITS
        if bits < _RSA_BITS:
            raise ValueError(f"{path} is an RSA key of {bits} bits, expected at least {_RSA_BITS}")
        keys[kind] = path
        for pair in asyncssh.load_keypairs([key]):
            pair.host_key_algorithms = [each for each in pair.host_key_algorithms if each.decode() in SIGNATURES]
            pairs.append(pair)
    return pairs


def _host_key(path: Path) -> asyncssh.SSHKey:
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519", comment="orchard")
        write_private(path, key.export_private_key())
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} can be read by others than its owner; run: chmod 600 {path}")
    try:
        return asyncssh.read_private_key(path)
    except asyncssh.KeyImportError as error:
        raise ValueError(f"{path} is not an SSH private key: {error}") from error


Sender = ServiceAccount | Access


class JumpHost:
    """Lets SSH clients into VMs. If `gate` is None, every client may connect to every VM."""

    def __init__(self, state: State, vm_access: VMAccess, gate: Gate | None, sessions: AccountSessions) -> None:
        self._state = state
        self._vm_access = vm_access
        self.gate = gate
        self.sessions = sessions
        self.connections: dict[_Server, asyncssh.SSHServerConnection] = {}
        self.logging_in: Unauthenticated[_Server] = Unauthenticated(
            lambda server: self.connections[server].abort(), MAX_LOGINS_OF_SOURCE, MAX_LOGINS
        )

    async def serve(
        self,
        host: str | None,
        port: int,
        keys: Sequence[asyncssh.SSHKeyPair],
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
                    server_host_keys=keys,
                    login_timeout=LOGIN_SECONDS,
                    keepalive_interval=keepalive,
                    kex_algs=KEY_EXCHANGE,
                    encryption_algs=ENCRYPTION,
                    signature_algs=SIGNATURES,
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

    async def log_in(self, address: str, username: str, password: str) -> Callable[[], Sender]:
        """Check a password when it is its turn, and return a function that checks it again.

        Raises UnauthenticatedError, ForbiddenError, TooManyFailuresError; the function raises the first two.
        """
        gate = self.gate
        assert gate is not None
        is_token = username == auth.TOKEN_USER and username not in self._state.accounts
        account = "" if is_token else username
        header = f"Bearer {password}" if is_token else basic_header(username, password)
        check = partial(self._check_header, header, account)
        if gate.recall(header, bearer=True) is not None or not gate.limit.is_limited(address, account):
            gate.limit.check_now(address, account, check)
        else:
            await sleep_pauses(gate.limit.check(address, account, check), asyncio.sleep)
        return check

    def _check_header(self, header: str, account: str) -> Sender:
        assert self.gate is not None
        sender = self.gate.identify(header, bearer=True)
        if isinstance(sender, ServiceAccount):
            # A name may contain a colon, which the header does not distinguish from the one after the name.
            if sender.name != account:
                raise auth.UnauthenticatedError("unknown service account or wrong token")
            auth.require(sender, "compute:connect")
        return sender

    def check_key(self, username: str, key: bytes) -> Sender:
        """Return the account of that name if it has the public key. Raises UnauthenticatedError, ForbiddenError."""
        account = self._state.accounts.get(username)
        if account is None or key not in map(_key_data, account.authorized_keys):
            raise auth.UnauthenticatedError("unknown service account or not one of its keys")
        auth.require(account, "compute:connect")
        return account

    def find_vm(self, name: str, who: Sender | None) -> VM:
        """Return the VM that a client names. Raises ChannelRefusedError.

        OpenSSH's clients write the names of hosts in lower case, so a name without capitals may stand for any VM whose
        name differs in the case of letters only. The bearer of an access token means the token's VM.
        """
        vms = self._state.vms
        exact = vms.get(name)
        if exact is not None and name != name.lower():
            alike = [exact]
        else:
            alike = [vm for vm in vms.values() if vm.name.lower() == name.lower()]
        if not alike:
            raise ChannelRefusedError(f'VM "{name}" does not exist')
        if isinstance(who, Access):
            alike = [vm for vm in alike if vm.uid == who.vm_uid]
            if not alike:
                raise ChannelRefusedError(f'the access token is for another VM than "{name}"')
        if len(alike) > 1:
            names = ", ".join(sorted(vm.name for vm in alike))
            raise ChannelRefusedError(
                f'"{name}" could be any of the VMs {names}, because SSH clients write names in lower case; use an'
                " access token of the VM, or give one of them another name"
            )
        return alike[0]

    async def join(
        self, channel: ChannelStream, vm: VM, port: int, account: str, opened: Callable[[Exception | None], None]
    ) -> None:
        """Relay between a channel of an account and a port of a VM until one side ends; close the channel.

        Calls `opened` when the tunnel is open, or with the error that prevented it.
        """
        try:
            async with channel:
                with unwrap_groups():
                    async with self._vm_access.open_stream(vm, port, _WAIT_SECONDS, sender=account) as stream:
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
        # The user name that was checked last, and the function that checks it again.
        self._checked: tuple[str, Callable[[], Sender]] | None = None
        # Closed when the connection ends.
        self._held = ExitStack()
        self._address = "-"
        self._tries = 0
        self._bounds = _LoginBounds(self)
        self.admitted = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        peer = conn.get_extra_info("peername")
        self._address = str(peer[0]) if peer else "-"
        # asyncssh sends as much as the client's window allows, which may be 4 GiB, whatever the socket takes.
        conn.pause_writing = self._flow.pause  # type: ignore[method-assign]
        conn.resume_writing = self._flow.resume  # type: ignore[method-assign]
        self._bounds.watch(conn)
        others = self._jump.connections
        if len(others) - len(self._jump.logging_in) >= MAX_CONNECTIONS:
            _logger.warning("too many SSH connections", extra={"peer": self._address, "connections": len(others)})
            conn.abort()
        else:
            others[self] = conn
            self._jump.logging_in.add(self, self._address)

    def connection_lost(self, exc: Exception | None) -> None:
        self._jump.connections.pop(self, None)
        self._jump.logging_in.remove(self)
        self._held.close()
        self._flow.resume()

    def disconnect(self, code: int, reason: str) -> None:
        if self._connection is not None:
            self._connection.disconnect(code, reason)

    def begin_auth(self, username: str) -> bool:
        return self._jump.gate is not None

    def auth_completed(self) -> None:
        self._jump.logging_in.remove(self)
        try:
            sender = self._identify()
        except (auth.UnauthenticatedError, auth.ForbiddenError) as error:
            self.disconnect(asyncssh.DISC_BY_APPLICATION, str(error))
            return
        self.admitted = True
        if sender is not None:
            role: Role = auth.ISSUER_ROLE if isinstance(sender, Access) else "compute:connect"
            self._hold(account_of(sender), role)
        else:
            self._hold("", None)

    def _hold(self, account: str, role: Role | None) -> None:
        """List the connection in the sessions, and end it when its account or the account's role is deleted."""
        end = partial(self.disconnect, asyncssh.DISC_BY_APPLICATION)
        subject = SessionSubject("ssh", "", self._address)
        self._held.enter_context(self._jump.sessions.hold(account, role, end, subject))

    def _identify(self) -> Sender | None:
        """Return the sender that has logged in, None without a gate.

        Raises UnauthenticatedError and ForbiddenError, also when the credentials are not valid any more.
        """
        if self._jump.gate is None:
            return None
        assert self._connection is not None
        # asyncssh says who has logged in. A client may have asked about a key of another account meanwhile.
        if self._checked is None or self._checked[0] != self._connection.get_extra_info("username"):
            raise auth.UnauthenticatedError("not logged in")
        return self._checked[1]()

    def password_auth_supported(self) -> bool:
        return True

    def kbdint_auth_supported(self) -> bool:
        # Clients would ask for the same password a second time.
        return False

    def public_key_auth_supported(self) -> bool:
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Check a key, before asyncssh checks that the client has the private one."""
        check = partial(self._jump.check_key, username, key.public_data)
        try:
            check()
        except (auth.UnauthenticatedError, auth.ForbiddenError) as error:
            _logger.debug("SSH key refused", extra={**self._about(username), "reason": str(error)})
            return False
        key.all_sig_algorithms = {each for each in key.all_sig_algorithms if each.decode() in SIGNATURES}
        self._checked = username, check
        return True

    async def validate_password(self, username: str, password: str) -> bool:
        """Check a password. asyncssh cancels this when the client sends another one meanwhile."""
        self._tries += 1
        if self._tries <= MAX_TRIES:
            try:
                self._checked = username, await self._jump.log_in(self._address, username, password)
                return True
            except TooManyFailuresError as error:
                # The limit itself logs who guesses.
                _logger.debug("SSH login refused", extra={**self._about(username), "reason": str(error)})
            except (auth.UnauthenticatedError, auth.ForbiddenError) as error:
                _logger.warning("SSH login refused", extra={**self._about(username), "reason": str(error)})
        if self._tries >= MAX_TRIES:
            self.disconnect(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many tries")
        return False

    def _about(self, username: str) -> dict[str, str]:
        return {"user": username[:_LOGGED_NAME], "peer": self._address}

    async def connection_requested(self, name: str, port: int, orig_host: str, orig_port: int) -> ChannelStream:
        """Return the channel once its tunnel is open. Raises ChannelOpenError, which tells the client why."""
        try:
            who = self._identify()
            vm = self._jump.find_vm(name, who)
            if not 0 < port < 65536:
                raise ChannelRefusedError(f"port is {port}, expected 1 to 65535")
        except (ChannelRefusedError, auth.UnauthenticatedError, auth.ForbiddenError) as error:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(error)) from None
        account = account_of(who) if who is not None else ""
        about = {"vm": vm.name, "port": port, "account": account or "-", "peer": self._address}
        _logger.info("opening SSH tunnel", extra=about)
        stream = ChannelStream(self._flow)
        outcome = asyncio.get_running_loop().create_future()

        def opened(error: Exception | None) -> None:
            if not outcome.done():
                outcome.set_result(error)

        self._channels.start_soon(partial(self._jump.join, stream, vm, port, account, opened))
        failure = await outcome
        if failure is not None:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(failure))
        return stream


class _LoginBounds:
    """Bounds what a client can make the server do before it has logged in."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._failures = 0
        self._exchanges = 0

    def watch(self, connection: asyncssh.SSHServerConnection) -> None:
        """Count the refusals and the key exchanges of a connection. asyncssh counts neither."""
        fail, exchange = connection.send_userauth_failure, connection.send_newkeys

        def send_userauth_failure(partial_success: bool) -> None:
            self._failures += 1
            if self._failures > MAX_LOGIN_REQUESTS:
                self._server.disconnect(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many tries")
            else:
                fail(partial_success)

        def send_newkeys(k: bytes, h: bytes) -> None:
            self._exchanges += 1
            if self._exchanges > MAX_EARLY_EXCHANGES and not self._server.admitted:
                self._server.disconnect(asyncssh.DISC_PROTOCOL_ERROR, "too many key exchanges")
            else:
                exchange(k, h)

        connection.send_userauth_failure = send_userauth_failure  # type: ignore[method-assign]
        connection.send_newkeys = send_newkeys  # type: ignore[method-assign]


def account_of(sender: Sender) -> str:
    """Return the name of an account, or of the account that issued an access token."""
    return sender.account if isinstance(sender, Access) else sender.name


def _key_data(line: str) -> bytes:
    """Return the key in a line of OpenSSH's format: its type, its data in base64, and a comment."""
    with suppress(ValueError, IndexError):
        return base64.b64decode(line.split()[1])
    return b""
