"""An SSH server for tests: a password, and behind it a login shell of this host. A process, for the real `ssh`.

`harness/ssh_server.py` starts it, with SSHD_PASSWORD and SSHD_SHELL in its environment. It prints its port number when it
listens. A connection gets SFTP or the user's shell in a session of its own, for a command
if the client names one. The shell is killed with its process group when the connection ends and when the server gets SIGTERM,
like the processes of a VM that ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

import asyncssh
from asyncssh.packet import UInt32

USER = "admin"
# For a shell to end by the signal that a client has sent before it left, and for background processes to end.
ENDING_SECONDS = 30.0
# More than a pipe holds.
PIPE_BYTES = 2**20


class Server(asyncssh.SSHServer):
    def __init__(self, password: str) -> None:
        self._password = password

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, self._password)


async def session(process: asyncssh.SSHServerProcess[bytes]) -> None:
    path = os.environ.get("SSHD_SHELL", "/bin/bash")
    # asyncio's own subprocesses also wait for processes that inherited the pipes.
    shell = subprocess.Popen(  # noqa: ASYNC220
        [path, *(["-c", process.command] if process.command else ["-l"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "USER": USER, "SHELL": path},
    )
    assert shell.stdin is not None
    assert shell.stdout is not None
    assert shell.stderr is not None
    SIGNALS.shells[process] = shell.pid
    feeding = asyncio.ensure_future(feed(process, shell.stdin))
    ended = asyncio.ensure_future(asyncio.to_thread(shell.wait))
    outputs = [Output(shell.stdout, process.stdout, ended), Output(shell.stderr, process.stderr, ended)]
    printing: asyncio.Future[Any] = asyncio.gather(*(output.send() for output in outputs))
    complete: asyncio.Future[Any] = asyncio.gather(*(output.complete.wait() for output in outputs))
    closed: asyncio.Future[Any] = asyncio.ensure_future(process.wait_closed())
    try:
        await asyncio.wait([ended, closed], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await asyncio.wait([complete, closed], return_when=asyncio.FIRST_COMPLETED)
            status = ended.result()
            if not closed.done():
                # As OpenSSH: the channel stays open while background processes keep the pipes open.
                process.channel._send_request(b"exit-status", UInt32(status if status >= 0 else 128 - status))
            await asyncio.wait([printing, closed], timeout=ENDING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            process.close()
        elif shell.pid in SIGNALS.sent:
            await asyncio.wait([ended], timeout=ENDING_SECONDS)
    finally:
        del SIGNALS.shells[process]
        for task in (feeding, printing, complete, closed):
            task.cancel()
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


class Files(asyncssh.SFTPServer):
    def exit(self) -> None:
        """Send exit status 0 as OpenSSH does. Without it the client sees -1."""
        with suppress(OSError):
            self.channel.exit(0)


class Signals:
    """Sends the signals of clients to the shells. asyncssh would hold them until the next read."""

    def __init__(self) -> None:
        self.shells: dict[asyncssh.SSHServerProcess[bytes], int] = {}
        self.sent: set[int] = set()

    def received(self, process: asyncssh.SSHServerProcess[bytes], name: str) -> None:
        pid = self.shells.get(process)
        if pid is not None:
            self.sent.add(pid)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.Signals[f"SIG{name}"])


SIGNALS = Signals()
setattr(asyncssh.SSHServerProcess, "signal_received", lambda process, name: SIGNALS.received(process, name))  # noqa: B010


async def feed(process: asyncssh.SSHServerProcess[bytes], sink: IO[bytes]) -> None:
    """Write the bytes that the client sends to the shell."""
    with suppress(ConnectionError, asyncssh.ConnectionLost), sink:
        while True:
            try:
                while data := await process.stdin.read(65536):
                    await asyncio.to_thread(write_all, sink, data)
            except asyncssh.TerminalSizeChanged:
                continue
            return


def write_all(sink: IO[bytes], data: bytes) -> None:
    while data:
        data = data[sink.write(data) :]


class Output:
    """Sends an output of a shell to the client. (asyncssh's own redirection fails when the client is slow.)

    `complete`: what the shell itself has written is sent. Its background processes may go on writing.
    """

    def __init__(self, source: IO[bytes], sink: asyncssh.SSHWriter[bytes], ended: asyncio.Future[int]) -> None:
        os.set_blocking(source.fileno(), False)
        self.complete = asyncio.Event()
        self._source = source
        self._sink = sink
        self._ended = ended

    async def send(self) -> None:
        try:
            with suppress(ConnectionError, asyncssh.ConnectionLost), self._source:
                while True:
                    has_ended = self._ended.done()
                    data = self._source.read(PIPE_BYTES)
                    if data:
                        self._sink.write(data)
                        await self._sink.drain()
                    if data == b"":
                        return
                    if has_ended:
                        self.complete.set()
                    await self._wait_readable(() if has_ended else (self._ended,))
        finally:
            self.complete.set()

    async def _wait_readable(self, others: Iterable[asyncio.Future[Any]]) -> None:
        """Wait until there is something to read, or another future is done."""
        number, ready = self._source.fileno(), asyncio.Event()
        asyncio.get_running_loop().add_reader(number, ready.set)
        waiting: asyncio.Future[Any] = asyncio.ensure_future(ready.wait())
        try:
            await asyncio.wait([waiting, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            asyncio.get_running_loop().remove_reader(number)


async def main() -> None:
    server = await asyncssh.create_server(
        lambda: Server(os.environ.get("SSHD_PASSWORD", "admin")),
        "127.0.0.1",
        0,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=session,
        encoding=None,
        line_editor=False,
        sftp_factory=Files,
    )
    # Each session blocks up to two threads.
    asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(400))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.get_port(), flush=True)
    # The end of main cancels the sessions.
    await ended.wait()


def serve() -> None:
    asyncio.run(main())
