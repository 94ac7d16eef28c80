"""Servers as processes of their own, and clients that press them as hard as they can.

The clients are plain sockets in one loop, so that the servers are what is measured and not the clients.
"""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

BARE = str(Path(__file__).parent / "bare.py")
CONTROLLER = ("-m", "orchard.controller", "--listen", "127.0.0.1:0", "--insecure-no-tls")
NO_AUTH = "--insecure-no-auth"
RECEIVE_BYTES = 1024 * 1024
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)", re.IGNORECASE)
_TICK = os.sysconf("SC_CLK_TCK")  # units of time in /proc


class Server:
    """A process that listens on a loopback port."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.port = int(next(found[1] for line in process.stdout if (found := re.search(r":(\d+)$", line))))

    def memory(self) -> int:
        """Give the resident memory in KiB."""
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)]))

    def cpu(self) -> float:
        """Give the seconds of the processor that it has taken. Needs /proc."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICK

    def connect(self) -> socket.socket:
        return connect(self.port)


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@contextmanager
def running(*arguments: str, home: Path | None = None, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run Python with some arguments, in a directory of its own or in `home`, until the end of the block."""
    with tempfile.TemporaryDirectory() as own:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "ORCHARD_HOME": str(home or own), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield Server(process)
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def request(method: str, path: str, body: bytes = b"", authorization: str = "") -> bytes:
    """Give a request's bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: controller"]
    if authorization:
        lines.append(f"Authorization: {authorization}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer_length(head: bytes | bytearray) -> int:
    """Give how many bytes an answer has with its head; 0 when its head is not all there."""
    end = head.find(b"\r\n\r\n")
    if end < 0:
        return 0
    found = _LENGTH.search(head, 0, end)
    return end + 4 + (int(found[1]) if found else 0)


def body_of(server: Server, asked: bytes) -> bytes:
    """Send one request, and give the body of its answer."""
    answer = bytearray()
    with server.connect() as connection:
        connection.sendall(asked)
        while not (length := answer_length(answer)) or len(answer) < length:
            answer += connection.recv(RECEIVE_BYTES)
    return bytes(answer).partition(b"\r\n\r\n")[2]


def press(port: int, connections: int, requests: Iterator[bytes]) -> list[float]:
    """Send requests over so many connections, the next on each when the last was answered; give the seconds of each.

    Raises RuntimeError at an answer that is no 200.
    """
    waits = []
    poll = select.poll()
    open_: dict[int, tuple[socket.socket, float, bytearray]] = {}
    for sending, _ in zip(requests, range(connections), strict=False):
        connection = connect(port)
        poll.register(connection, select.POLLIN)
        open_[connection.fileno()] = (connection, time.perf_counter(), bytearray())
        connection.sendall(sending)
    while open_:
        for descriptor, _ in poll.poll():
            connection, began, answer = open_[descriptor]
            answer += connection.recv(RECEIVE_BYTES)
            length = answer_length(answer)
            if not length or len(answer) < length:
                continue
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer[:1000].decode())
            now = time.perf_counter()
            waits.append(now - began)
            following = next(requests, None)
            if following is None:
                poll.unregister(connection)
                connection.close()
                del open_[descriptor]
            else:
                open_[descriptor] = (connection, time.perf_counter(), bytearray())
                connection.sendall(following)
    return waits
