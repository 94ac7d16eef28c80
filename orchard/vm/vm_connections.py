"""Connections from a worker to its VMs: directly, or by the process that connector.py describes.

`ssh` connects by itself. To have it use a connection of the worker's, `offered` listens on a Unix socket in a private
directory, and ssh's ProxyCommand fetches a connected socket there.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from orchard.base.nursery import first_exception, unwrap_groups
from orchard.vm.connector import REQUEST_BYTES, is_permitted
from orchard.vm.driver import DriverError

# Opens a TCP connection to an address and a port. Raises OSError.
Dial = Callable[[str, int], Awaitable[trio.SocketStream]]

# Arguments for this Python, without the user's environment and site-packages.
_CONNECTOR = ("-ISc", "import runpy, sys; sys.path.insert(0, sys.argv[1]);"
    " runpy.run_module('orchard.vm.connector', run_name='__main__')", str(Path(__file__).parent.parent.parent))  # fmt: skip
_END_SECONDS = 5.0
# Limit for a connection that ssh waits for. After it ssh is started again.
_FETCH_SECONDS = 10.0
_ANSWER_BYTES = 256
# ssh takes the connected socket from this program's standard output, which is a socket, too (ProxyUseFdpass).
_FETCH = """\
import socket, sys
with socket.socket(socket.AF_UNIX) as source, socket.socket(fileno=1) as ssh:
    source.connect(sys.argv[1])
    text, found, _, _ = socket.recv_fds(source, 256, 1)
    if not found:
        sys.exit(text.decode() or "the worker opened no connection")
    socket.send_fds(ssh, [b"0"], found)
"""


class ConnectorProcess:
    """The process that opens connections to VMs as root. It is started at once, before the worker becomes another user.

    `close` ends it. Addresses that it does not connect to are connected to by this process.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, *_CONNECTOR],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={},
                # A signal of the terminal ends the worker first, which closes its end.
                start_new_session=True,
            )
        self._control.setblocking(False)

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        """Open a TCP connection to a VM. The caller closes it. Raises OSError."""
        if not is_permitted(host, port):
            return await trio.open_tcp_stream(host, port)
        mine, theirs = socket.socketpair()
        with mine:
            with theirs:
                request = f"{host} {port}".encode("ascii").ljust(REQUEST_BYTES)
                # Fits into the empty buffer of the socket as a whole; a full buffer is an OSError.
                socket.send_fds(self._control, [request], [theirs.fileno()])
            mine.setblocking(False)
            await trio.lowlevel.wait_readable(mine)
            answer, found, _, _ = socket.recv_fds(mine, _ANSWER_BYTES, 1)
        if not found:
            number = int(answer or errno.EPIPE)
            raise OSError(number, os.strerror(number))
        # For programs that this process starts.
        os.set_inheritable(found[0], False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=found[0])))

    async def wait_ended(self) -> None:
        """Wait until the process has ended, and raise DriverError: without it no VM can be reached."""
        await trio.lowlevel.wait_readable(self._control)
        raise DriverError("the process that connects to VMs as root has ended; start the worker again")

    def close(self) -> None:
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)


@asynccontextmanager
async def offered(dial: Dial, host: str, port: int, directory: Path) -> AsyncIterator[list[str]]:
    """Yield options of ssh with which it uses connections that `dial` opens to an address.

    `directory` is private; a socket is made in it.
    """
    path = directory / "connection"
    listener = trio.socket.socket(socket.AF_UNIX)
    with listener:
        await listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-ISc", _FETCH, str(path)]
        # ssh replaces what follows a percent sign.
        words = " ".join(map(shlex.quote, command)).replace("%", "%%")
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_offer, listener, partial(dial, host, port), nursery)
                yield ["-o", f"ProxyCommand={words}", "-o", "ProxyUseFdpass=yes"]
                nursery.cancel_scope.cancel()


async def _offer(
    listener: trio.socket.SocketType, dial: Callable[[], Awaitable[trio.SocketStream]], nursery: trio.Nursery
) -> None:
    """Answer each program that fetches a connection, until cancelled."""
    while True:
        client, _ = await listener.accept()
        nursery.start_soon(_answer_fetch, client, dial)


async def _answer_fetch(client: trio.socket.SocketType, dial: Callable[[], Awaitable[trio.SocketStream]]) -> None:
    """Send a connected socket, or why there is none."""
    reason = ""
    # The program is gone if ssh was killed.
    with client, suppress(BrokenPipeError, ConnectionResetError):
        try:
            with trio.fail_after(_FETCH_SECONDS):
                stream = await dial()
        except trio.TooSlowError:
            reason = "Connection timed out"
        except OSError as error:
            # trio's own text lists every attempt.
            cause = first_exception(error.__cause__ or error)
            reason = getattr(cause, "strerror", None) or str(cause)
        else:
            async with stream:
                # ssh expects a blocking socket, like one that it has connected itself.
                os.set_blocking(stream.socket.fileno(), True)
                with socket.socket(fileno=os.dup(client.fileno())) as plain:
                    socket.send_fds(plain, [b"0"], [stream.socket.fileno()])
        if reason:
            await client.send(reason.encode()[:_ANSWER_BYTES])
