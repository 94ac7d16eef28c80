"""An SSH server for tests: a password, and behind it a login shell of this host. Run as a process, for the real `ssh`.

    python sshd.py [--after SECONDS] [--password P]

prints the number of its port once it listens. Every session gets a shell of its own, in a session of its own, which is
killed with its process group when the connection ends, as the processes of a VM are when it does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
from contextlib import suppress

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
    shell = await asyncio.create_subprocess_exec(
        "/bin/bash",
        "-l",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "USER": USER},
    )
    try:
        await process.redirect(stdin=shell.stdin, stdout=shell.stdout, stderr=shell.stderr, send_eof=False)
        status = await shell.wait()
        await process.stdout.drain()
        process.exit(status if status >= 0 else 128 - status)
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
    )
    print(server.get_port(), flush=True)
    await server.wait_closed()


asyncio.run(main())
