"""SSH into synthetic VMs, so that `exec` and the jump host can be tried without a hypervisor. Needs the extra `ssh`.

Each connection to port 22 of a synthetic VM (orchard/vm/synthetic.py) gets a port of this host's loopback address for
itself, on which one connection is accepted. A client logs in with the VM's user name and password. A command runs in a
shell of this host, in the VM's directory, on a terminal if the client asks for one, and ends with its connection and
with the VM. SFTP, which scp uses, has the files that the shell has; relative paths begin at the VM's directory.

Without the packages of the extra, nothing listens.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from orchard.base import logs
from orchard.base.nursery import unwrap_groups
from orchard.ssh.remaining_output import RemainingOutput
from orchard.vm.driver import DriverError
from orchard.vm.processes import READ_BYTES, kill, signal_group
from orchard.vm.synthetic import VM_ADDRESS, SyntheticDriver

if TYPE_CHECKING:
    import asyncssh  # noqa: TC004 -- `run` imports them
    import trio_asyncio  # type: ignore[import-untyped]  # noqa: TC004 -- it has no types

# Limit for the connection to a port that was opened for it.
_CLAIM_SECONDS = 10.0  # seconds
_LOGIN_SECONDS = 10.0  # seconds
# Time for reading on after a shell has ended, when all its own output is in the pipes.
_REST_SECONDS = 0.2  # seconds
# Time from asking a command to end until it is killed.
_END_SECONDS = 5.0  # seconds
_CANNOT_RUN = 126
# Makes standard input the controlling terminal of a new session, and becomes the command in its arguments. A function
# between fork and exec would not be safe in a process with threads.
_ON_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class SyntheticSSH:
    """The SSH server of one worker's synthetic VMs.

    `credentials` returns the user name and the password of a local VM, or None if there is no such VM.
    """

    def __init__(self, driver: SyntheticDriver, credentials: Callable[[str], tuple[str, str] | None]) -> None:
        self._driver = driver
        self._credentials = credentials
        # The packages are imported and the asyncio loop is opened for the first connection.
        self._wanted = trio.Event()
        self._ready = trio.Event()
        self._nursery: trio.Nursery
        self._key: Any = None
        self._loop: Any = None

    async def run(self) -> None:
        """Serve until cancelled. Return at once if the extra is not installed."""
        if not (find_spec("asyncssh") and find_spec("trio_asyncio")):
            return
        self._driver.ssh_port = self._open_port
        try:
            await self._wanted.wait()
            global asyncssh, trio_asyncio
            import asyncssh
            import trio_asyncio

            self._key = asyncssh.generate_private_key("ssh-ed25519")
            with unwrap_groups():
                async with trio_asyncio.open_loop() as self._loop, trio.open_nursery() as self._nursery:
                    self._loop.set_exception_handler(logs.log_asyncio_error)
                    self._ready.set()
                    await trio.sleep_forever()
        finally:
            self._driver.ssh_port = None

    async def _open_port(self, name: str) -> int:
        """Return a port of VM_ADDRESS that takes one connection into a VM."""
        self._wanted.set()
        await self._ready.wait()
        port: int = await self._nursery.start(self._serve, name)
        return port

    async def _serve(self, name: str, *, task_status: trio.TaskStatus[int]) -> None:
        """Accept one connection into a VM, and serve it until it ends."""
        # A task has the context of the one that started it.
        trio_asyncio.current_loop.set(self._loop)
        (listener,) = await trio.open_tcp_listeners(0, host=VM_ADDRESS, backlog=1)
        async with listener:
            task_status.started(listener.socket.getsockname()[1])
            stream: trio.SocketStream | None = None
            with trio.move_on_after(_CLAIM_SECONDS):
                stream = await listener.accept()
        if stream is None:
            return
        serve = partial(
            asyncssh.run_server,
            socket.socket(fileno=stream.socket.detach()),
            server_factory=self._login(name),
            server_host_keys=[self._key],
            process_factory=partial(self._session, name),
            sftp_factory=self._files(name),
            encoding=None,
            line_editor=False,
            login_timeout=_LOGIN_SECONDS,
            gss_host=None,
            agent_forwarding=False,
            x11_forwarding=False,
            compression_algs=("none",),
        )
        with suppress(asyncssh.Error, OSError):
            connection = await trio_asyncio.aio_as_trio(serve)()
            try:
                await trio_asyncio.aio_as_trio(connection.wait_closed)()
            finally:
                connection.abort()

    def _login(self, name: str) -> type[asyncssh.SSHServer]:
        """Return the server class that lets in with the credentials of a VM."""
        credentials = self._credentials

        class Login(asyncssh.SSHServer):
            def begin_auth(self, username: str) -> bool:
                return True

            def password_auth_supported(self) -> bool:
                return True

            def validate_password(self, username: str, password: str) -> bool:
                expected = credentials(name)
                if expected is None:
                    return False
                right_name = hmac.compare_digest(username.encode(), expected[0].encode())
                return hmac.compare_digest(password.encode(), expected[1].encode()) and right_name

        return Login

    # -- files

    def _files(self, name: str) -> type[asyncssh.SFTPServer]:
        """Return the server class that serves files as long as a VM runs."""
        driver = self._driver

        class Files(asyncssh.SFTPServer):
            def map_path(self, path: bytes) -> bytes:
                try:
                    directory, _ = driver.enter(name, "")
                except DriverError as error:
                    raise asyncssh.SFTPFailure(str(error)) from None
                return os.fsencode(directory / os.fsdecode(path))

            def exit(self) -> None:
                # Clients take a session without a status for one that failed.
                with suppress(OSError):
                    self.channel.exit(0)

        return Files

    # -- commands

    async def _session(self, name: str, process: asyncssh.SSHServerProcess[bytes]) -> None:
        """Run a client's command, or a login shell. For asyncio."""
        await trio_asyncio.trio_as_aio(self._run)(name, process)

    async def _run(self, name: str, process: asyncssh.SSHServerProcess[bytes]) -> None:
        username = process.get_extra_info("username")
        try:
            if process.subsystem is not None:
                raise DriverError(f"the subsystem is {process.subsystem!r}, expected sftp")
            directory, environ = self._driver.enter(name, username)
            words = [environ["SHELL"], *(["-c", process.command] if process.command else ["-l"])]
            shell, ends = await _open_shell(words, directory, environ, process)
        except (DriverError, OSError) as error:
            process.stderr.write(f"{error}\n".encode())
            process.exit(_CANNOT_RUN)
            return
        # Set by a signal of the client, after which a second one would end what handles the first.
        signalled = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wait_closed, process, nursery.cancel_scope)
                nursery.start_soon(_feed, process.stdin, shell, ends, signalled)
                await _send_output(shell, ends.outputs)
                status = await shell.wait()
                process.exit(status if status >= 0 else 128 - status)
                nursery.cancel_scope.cancel()
        finally:
            # Processes that a command left in the background run on until the VM ends.
            if shell.returncode is None:
                if not signalled.is_set():
                    # A shell on a terminal ignores SIGTERM.
                    signal_group(shell.pid, signal.SIGHUP if ends.resize else signal.SIGTERM)
                with trio.move_on_after(_END_SECONDS, shield=True):
                    await shell.wait()
                await kill(shell)

    async def _wait_closed(self, process: asyncssh.SSHServerProcess[bytes], scope: trio.CancelScope) -> None:
        """Cancel `scope` when the client has closed the session."""
        await trio_asyncio.aio_as_trio(process.wait_closed)()
        scope.cancel()


@dataclass(frozen=True, slots=True)
class _Ends:
    """This process's ends of a shell's streams: for its input, and for each output with the client's writer.

    `resize` takes rows and columns; None without a terminal.
    """

    stdin: trio.abc.SendStream
    outputs: Sequence[tuple[trio.abc.ReceiveStream, asyncssh.SSHWriter[bytes]]]
    resize: Callable[[int, int], None] | None = None


async def _open_shell(
    words: Sequence[str], directory: Path, environ: Mapping[str, str], process: asyncssh.SSHServerProcess[bytes]
) -> tuple[trio.Process, _Ends]:
    """Start a command in a session of its own, on a terminal if the client asked for one. Raises OSError."""
    terminal = process.get_terminal_type()
    if terminal is None:
        pipe = subprocess.PIPE
        shell = await trio.lowlevel.open_process(
            words, stdin=pipe, stdout=pipe, stderr=pipe, cwd=directory, env=environ, start_new_session=True
        )
        assert shell.stdin is not None
        assert shell.stdout is not None
        assert shell.stderr is not None
        return shell, _Ends(shell.stdin, [(shell.stdout, process.stdout), (shell.stderr, process.stderr)])
    ours, theirs = pty.openpty()
    columns, rows, _, _ = process.get_terminal_size()
    _resize(ours, rows, columns)
    try:
        shell = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", "-c", _ON_TERMINAL, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env={**environ, "TERM": terminal},
            start_new_session=True,
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    # Each task closes the descriptor that it uses; the terminal is resized by the task that writes.
    keys = os.dup(ours)
    outputs = [(trio.lowlevel.FdStream(ours), process.stdout)]
    return shell, _Ends(trio.lowlevel.FdStream(keys), outputs, partial(_resize, keys))


def _resize(descriptor: int, rows: int, columns: int) -> None:
    """Set the size of a terminal, which signals its programs. Does nothing to a closed terminal."""
    size = struct.pack("HHHH", *(max(0, min(number, 0xFFFF)) for number in (rows, columns)), 0, 0)
    with suppress(OSError):
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, size)


async def _feed(source: asyncssh.SSHReader[bytes], shell: trio.Process, ends: _Ends, signalled: trio.Event) -> None:
    """Send a client's input to a shell, its signals, and the size of its terminal."""
    read = trio_asyncio.aio_as_trio(source.read)
    async with ends.stdin:
        while True:
            try:
                data = await read(READ_BYTES)
                if not data:
                    return
                await ends.stdin.send_all(data)
            except asyncssh.SignalReceived as received:
                with suppress(KeyError):
                    signal_group(shell.pid, signal.Signals[f"SIG{received.signal}"])
                    signalled.set()
            except asyncssh.TerminalSizeChanged as changed:
                if ends.resize is not None:
                    ends.resize(changed.height, changed.width)
            except asyncssh.BreakReceived:
                continue
            except (trio.BrokenResourceError, asyncssh.Error, OSError):
                return


async def _send_output(
    shell: trio.Process, outputs: Sequence[tuple[trio.abc.ReceiveStream, asyncssh.SSHWriter[bytes]]]
) -> None:
    """Send a shell's output to the client until the shell has ended, and what is left then."""
    rests = [RemainingOutput(_REST_SECONDS) for _ in outputs]
    async with trio.open_nursery() as readers:
        for (source, sink), remaining in zip(outputs, rests, strict=True):
            readers.start_soon(_copy, source, sink, remaining)
        await shell.wait()
        for remaining in rests:
            remaining.begin()


async def _copy(source: trio.abc.ReceiveStream, sink: asyncssh.SSHWriter[bytes], remaining: RemainingOutput) -> None:
    drain = trio_asyncio.aio_as_trio(sink.drain)
    async with source:
        # The end of a terminal is an error to read.
        with suppress(asyncssh.Error, OSError, trio.BrokenResourceError):
            while data := await remaining.read(source.receive_some):
                sink.write(bytes(data))
                await drain()
