"""The costs of the jump host: one SSH channel to a local TCP port, by asyncssh in trio, in a thread, and by OpenSSH.

    ./run bench jump [--megabytes N] [--rounds N] [--cipher NAME]

Each server is a process of its own. In turns, each carries the same bytes from the system's `ssh -W` to a sink in this
process. `trio-asyncio` is orchard/ssh/jump.py itself, with TCP connections in place of its tunnels. The bare relay, the
baseline, has no SSH; its client is a process that only sends. An operation is a megabyte, measured from the first byte
that arrives to the last; the processor time is that of the server alone.

The comparison of trio-asyncio with the thread depends on the load of the machine: measure on an idle machine, and on a
busy one or with everything on one core (`taskset -c 0 ./run bench jump`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Self, cast

import trio
from measure import Variant, show

try:
    import asyncssh

    from orchard.base.nursery import unwrap_groups
    from orchard.control.stored_data import utc_now
    from orchard.sessions import AccountSessions
    from orchard.ssh import jump
except ImportError:
    raise SystemExit("this benchmark needs the extra ssh: .venv/bin/pip install -e '.[ssh]'") from None

PIECE = 64 * 1024  # bytes
# The first choice of OpenSSH's clients.
CHACHA = "chacha20-poly1305@openssh.com"
# Pieces that the thread may be ahead of trio.
PENDING = 16
# The size of what the sink sends back when it has received everything.
READY = 1  # bytes
SEND = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).sendfile(sys.stdin.buffer)"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
# Held while a child runs, because its processor time is unknown until it ends.
BUSY = threading.Lock()
SSHD_CONFIG = """
HostKey {home}/key
AuthorizedKeysFile {home}/key.pub
StrictModes no
PermitRootLogin yes
PidFile none
"""


# ---- the servers, each run as a process that prints its port ---------------------------------------------------------


async def in_trio(key: Path, _: int) -> None:
    """The product's jump host, with a TCP connection in place of its tunnel."""

    @contextlib.asynccontextmanager
    async def open_stream(vm: object, port: int, wait: float, sender: str) -> AsyncIterator[trio.SocketStream]:
        async with await trio.open_tcp_stream("127.0.0.1", port) as sink:
            yield sink

    state = cast("Any", SimpleNamespace(vms={"vm": SimpleNamespace(name="vm")}, accounts={}))
    # The product does not offer it; this shows what it would cost.
    jump.ENCRYPTION += (CHACHA,)
    host = jump.JumpHost(
        state, cast("Any", SimpleNamespace(open_stream=open_stream)), None, AccountSessions({}, utc_now)
    )
    async with trio.open_nursery() as nursery:
        print(await nursery.start(host.serve, "127.0.0.1", 0, jump.host_keys([key]), 30.0), flush=True)


async def in_a_thread(key: Path, _: int) -> None:
    """asyncssh with an asyncio loop in a thread; a semaphore bounds the pieces that are handed over to trio."""
    token = trio.lowlevel.current_trio_token()

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

        def connection_requested(self, host: str, port: int, *_: object) -> Callable[..., Awaitable[None]]:
            return partial(carry, port)

    async def carry(port: int, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
        loop = asyncio.get_running_loop()
        slots = asyncio.Semaphore(PENDING)
        ended = asyncio.Event()
        pieces, source = trio.open_memory_channel[bytes](PENDING)

        async def send() -> None:
            async with await trio.open_tcp_stream("127.0.0.1", port) as sink:
                async for piece in source:
                    await sink.send_all(piece)
                    loop.call_soon_threadsafe(slots.release)
                await sink.receive_some(READY)
            loop.call_soon_threadsafe(ended.set)

        token.run_sync_soon(nursery.start_soon, send)
        while data := await reader.read(PIECE):
            await slots.acquire()
            token.run_sync_soon(pieces.send_nowait, data)
        token.run_sync_soon(pieces.close)
        await ended.wait()
        writer.close()

    async def serve() -> None:
        host_key = asyncssh.read_private_key(key)
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_factory=Server, server_host_keys=[host_key], encoding=None, gss_host=None
        )
        print(server.get_port(), flush=True)
        await asyncio.Event().wait()

    async with trio.open_nursery() as nursery:
        await trio.to_thread.run_sync(asyncio.run, serve())


async def bare(_: Path, port: int) -> None:
    async def relay(client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as sink:
            async for data in client:
                await sink.send_all(data)
            await sink.send_eof()
            await sink.receive_some(READY)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, relay, 0)
        print(listeners[0].socket.getsockname()[1], flush=True)


def openssh(key: Path, _: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, BUSY:
                number = connection.fileno()
                subprocess.run([SSHD, "-i", "-f", sshd_config(key)], stdin=number, stdout=number, check=False)


def sshd_config(key: Path) -> Path:
    config = key.with_name("sshd_config")
    config.write_text(SSHD_CONFIG.format(home=key.parent))
    return config


SERVERS: dict[str, Callable[[Path, int], None]] = {
    "trio-asyncio": lambda key, port: trio.run(in_trio, key, port),
    "a thread": lambda key, port: trio.run(in_a_thread, key, port),
    "OpenSSH's sshd": openssh,
    "bare relay": lambda key, port: trio.run(bare, key, port),
}


def tell_cpu() -> None:
    """Answer each line of stdin with the processor time so far, in seconds, that of ended children included."""
    for _ in sys.stdin:
        with BUSY:
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(time.process_time() + children.ru_utime + children.ru_stime, flush=True)


def serve(name: str, key: Path, port: int) -> None:
    logging.disable()
    threading.Thread(target=tell_cpu, daemon=True).start()
    SERVERS[name](key, port)


# ---- measuring -------------------------------------------------------------------------------------------------------


class Server:
    """A process that runs one of SERVERS until the block ends."""

    def __init__(self, name: str, key: Path, port: int) -> None:
        words = [sys.executable, __file__, "--serve", name, str(key), str(port)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        line = self._stdout.readline()
        if not line:
            raise SystemExit(f"the server {name} did not start")
        self.port = int(line)

    def cpu(self) -> float:
        print(file=self._stdin, flush=True)
        return float(self._stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def client(name: str, server: int, sink: int, key: Path, cipher: str) -> list[str]:
    """Return the command that sends its stdin through a server to the sink."""
    if name == "bare relay":
        return [sys.executable, "-c", SEND, str(server)]
    host = "127.0.0.1" if name == "OpenSSH's sshd" else "vm"
    options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "LogLevel=ERROR")
    words = [word for option in options for word in ("-o", option)]
    where = ["-p", str(server), "-W", f"{host}:{sink}", f"{getpass.getuser()}@127.0.0.1"]
    return ["ssh", "-F", "none", "-i", str(key), "-c", cipher, *words, *where]


async def transfer(command: list[str], source: IO[bytes], size: int, listener: trio.SocketListener) -> float:
    """Have a client send a file; return the seconds from the first byte at the sink to the last."""
    source.seek(0)
    left = size
    with unwrap_groups():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.run_process, command, stdin=source))
            async with await listener.accept() as stream:
                left -= len(await stream.receive_some(PIECE))
                began = trio.current_time()
                while left > 0:
                    data = await stream.receive_some(1024 * 1024)
                    if not data:
                        raise SystemExit(f"{left} bytes did not arrive from: {' '.join(command)}")
                    left -= len(data)
                took = trio.current_time() - began
    return took


@contextlib.contextmanager
def prepared(size: int) -> Iterator[tuple[Path, IO[bytes]]]:
    """Yield a key, which is the hosts' and the client's, and the file that is sent."""
    with tempfile.TemporaryDirectory() as home, Path(home, "source").open("w+b") as source:
        made = asyncssh.generate_private_key("ssh-ed25519")
        key = Path(home, "key")
        key.touch(mode=0o600)
        made.write_private_key(key)
        made.write_public_key(key.with_name("key.pub"))
        source.truncate(size)
        yield key, source


def why_no_sshd(key: Path) -> str:
    """Return why OpenSSH's server cannot run here, "" if it can."""
    if not os.access(SSHD, os.X_OK):
        return f"there is no {SSHD}"
    checked = subprocess.run([SSHD, "-t", "-f", sshd_config(key)], capture_output=True, text=True, check=False)
    return "" if checked.returncode == 0 else checked.stderr.strip()


async def main(options: argparse.Namespace) -> None:
    size = options.megabytes * 1_000_000
    with prepared(size) as (key, source), contextlib.ExitStack() as stack:
        missing = why_no_sshd(key)
        if missing:
            print(f"without OpenSSH's sshd: {missing}")
        names = [name for name in SERVERS if not (missing and name == "OpenSSH's sshd")]
        series = [Variant(name, lambda: None, options.megabytes) for name in names]
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        sink: int = listener.socket.getsockname()[1]
        servers = [stack.enter_context(Server(name, key, sink)) for name in names]
        for number in range(options.rounds + 1):
            for one, server in zip(series, servers, strict=True):
                command = client(one.name, server.port, sink, key, options.cipher)
                before = server.cpu()
                seconds = await transfer(command, source, size, listener)
                # The first round warms up.
                if number > 0:
                    one.add(seconds, server.cpu() - before)
    print(f"{options.rounds} rounds of {options.megabytes} MB, {options.cipher}; an operation is a megabyte")
    show(*series)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(prog="bench/jump.py", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=200, help="size of one transfer; default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--cipher", default=jump.ENCRYPTION[0], help="default %(default)s")
    trio.run(main, parser.parse_args())
