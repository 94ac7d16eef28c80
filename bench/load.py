"""Servers in processes of their own, and a client that sends them requests as fast as they answer, in the clear or over TLS.

The client is a loop over blocking sockets, so that it costs less than the servers that are measured.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

BARE = str(Path(__file__).parent / "bare.py")
# A controller over TLS, with a certificate that it makes itself, and one in the clear.
CONTROLLER_TLS = ("-m", "orchard.controller", "--listen", "127.0.0.1:0")
CONTROLLER = (*CONTROLLER_TLS, "--insecure-no-tls")
NO_AUTH = "--insecure-no-auth"
RECEIVE_BYTES = 1024 * 1024
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)


class Server:
    """A process that listens on a loopback port, which it prints. `tls` says whether it expects TLS there."""

    def __init__(self, process: subprocess.Popen[str], *, tls: bool = False) -> None:
        self.process = process
        self.tls = tls
        assert process.stdout is not None
        self.port = int(next(found[1] for line in process.stdout if (found := re.search(r":(\d+)$", line))))

    def memory(self) -> int:
        """Return the resident memory in KiB."""
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)]))

    def cpu(self) -> float:
        """Return the seconds of CPU time that its threads have taken. Needs Linux."""
        # Unlike /proc/PID/stat this is not counted in ticks of 10 ms.
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

    def connect(self) -> socket.socket:
        return connect(self.port, tls=self.tls)


def client_context() -> ssl.SSLContext:
    """Return a TLS context that trusts any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


_CONTEXT = client_context()


def connect(port: int, *, tls: bool = False) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _CONTEXT.wrap_socket(connection) if tls else connection


@contextmanager
def running(
    *arguments: str, home: Path | None = None, env: Mapping[str, str] | None = None, python: str = sys.executable
) -> Iterator[Server]:
    """Run Python with arguments, in a directory of its own or in `home`, until the end of the block."""
    with tempfile.TemporaryDirectory() as own:
        process = subprocess.Popen(
            [python, *arguments],
            # Python looks for modules in the current directory first, which may be another checkout.
            cwd=home or own,
            env={**os.environ, "ORCHARD_HOME": str(home or own), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield Server(
                process, tls=arguments[: len(CONTROLLER_TLS)] == CONTROLLER_TLS and CONTROLLER[-1] not in arguments
            )
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def request(method: str, path: str, body: bytes = b"", authorization: str = "") -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: controller"]
    if authorization:
        lines.append(f"Authorization: {authorization}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer_length(head: bytes | bytearray) -> int:
    """Return how many bytes an answer has together with its head; 0 if the head is incomplete."""
    end = head.find(b"\r\n\r\n")
    if end < 0:
        return 0
    found = _LENGTH.search(head, 0, end)
    return end + 4 + (int(found[1]) if found else 0)


def body_of(server: Server, asked: bytes) -> bytes:
    """Send one request, and return the body of its answer."""
    answer = bytearray()
    with server.connect() as connection:
        connection.sendall(asked)
        while not (length := answer_length(answer)) or len(answer) < length:
            answer += connection.recv(RECEIVE_BYTES)
    return bytes(answer).partition(b"\r\n\r\n")[2]


def press(port: int, connections: int, requests: Iterator[bytes], *, tls: bool = False) -> list[float]:
    """Send requests over a number of connections, each when the one before was answered. Return the seconds of each.

    Raises RuntimeError for an answer with another status than 200.
    """
    opened = [connect(port, tls=tls) for _ in range(connections)]
    try:
        return press_over(opened, requests)
    finally:
        for connection in opened:
            connection.close()


def press_over(connections: Sequence[socket.socket], requests: Iterator[bytes]) -> list[float]:
    """As `press`, over connections that are open already and stay open."""
    waits = []
    poll = select.poll()
    open_: dict[int, tuple[socket.socket, float, bytearray]] = {}
    for sending, connection in zip(requests, connections, strict=False):
        poll.register(connection, select.POLLIN)
        open_[connection.fileno()] = (connection, time.perf_counter(), bytearray())
        connection.sendall(sending)
    while open_:
        for descriptor, _ in poll.poll():
            connection, began, answer = open_[descriptor]
            # One TLS record of at most 16 KiB; what follows it is still in the kernel's buffer.
            answer += connection.recv(RECEIVE_BYTES)
            length = answer_length(answer)
            if not length or len(answer) < length:
                continue
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(answer[:1000].decode())
            waits.append(time.perf_counter() - began)
            following = next(requests, None)
            if following is None:
                poll.unregister(connection)
                del open_[descriptor]
            else:
                open_[descriptor] = (connection, time.perf_counter(), bytearray())
                connection.sendall(following)
    return waits
