"""An SSH server for tests: a password, and behind it a login shell of this host. Run as a process, for the real `ssh`.

    [SSHD_PASSWORD=P] [SSHD_SHELL=PATH] python sshd.py

prints its port number when it listens. A connection gets SFTP or the user's shell in a session of its own, for a command
if the client names one. The shell is killed with its process group when the connection ends and when the server gets SIGTERM,
like the processes of a VM that ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
from contextlib import suppress
from typing import IO

import asyncssh

USER = "admin"
# For the output that is still in the pipes of a shell that has ended.
PRINTING_SECONDS = 1.0  # seconds


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
    printing = [
        asyncio.ensure_future(send_output(shell.stdout, process.stdout)),
        asyncio.ensure_future(send_output(shell.stderr, process.stderr)),
    ]
    ended = asyncio.ensure_future(asyncio.to_thread(shell.wait))
    closed = asyncio.ensure_future(process.wait_closed())
    try:
        await asyncio.wait([ended, closed], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            # The shell's own output is in the pipes by now. Its background processes may keep them open.
            await asyncio.wait(printing, timeout=PRINTING_SECONDS)
            status = ended.result()
            process.exit(status if status >= 0 else 128 - status)
        elif shell.pid in SIGNALS.sent:
            await asyncio.wait([ended], timeout=PRINTING_SECONDS)
    finally:
        del SIGNALS.shells[process]
        for task in (feeding, *printing, closed):
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


async def send_output(source: IO[bytes], sink: asyncssh.SSHWriter[bytes]) -> None:
    """Send the shell's output to the client. (asyncssh's own redirection fails when the client is slow.)"""
    with suppress(ConnectionError, asyncssh.ConnectionLost), source:
        while data := await asyncio.to_thread(source.read, 65536):
            sink.write(data)
            await sink.drain()


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
    # Each session blocks up to four threads.
    asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(400))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.get_port(), flush=True)
    # The end of main cancels the sessions.
    await ended.wait()


asyncio.run(main())
