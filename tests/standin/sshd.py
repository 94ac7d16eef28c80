"""An SSH server for tests: a password, and behind it a login shell of this host. Run as a process, for the real `ssh`.

    python sshd.py [--password P] [--port N]

prints the number of its port once it listens. Every connection gets a shell in a session of its own, which is killed
with its process group when the connection ends, or the server by SIGTERM, as the processes of a VM are when it does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
from contextlib import suppress
from typing import Any

import asyncssh

USER = "admin"


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
    shell = subprocess.Popen(  # noqa: ASYNC220 -- asyncio's own waits for whoever inherited its pipes, too
        ["/bin/bash", "-l"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "USER": USER},
    )
    try:
        await process.redirect(stdin=shell.stdin, stdout=shell.stdout, stderr=shell.stderr)
        exited = asyncio.ensure_future(asyncio.to_thread(shell.wait))
        closed = asyncio.ensure_future(process.wait_closed())
        await asyncio.wait({exited, closed}, return_when=asyncio.FIRST_COMPLETED)
        if exited.done():
            process.exit(exited.result() if exited.result() >= 0 else 128 - exited.result())
            await closed
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--password", default="admin")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    server = await asyncssh.create_server(
        lambda: Server(options.password),
        "127.0.0.1",
        options.port,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=session,
        encoding=None,
        line_editor=False,
        sftp_factory=True,
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.get_port(), flush=True)
    await ended.wait()  # then the sessions are cancelled


asyncio.run(main())
