"""A process that has imported the product and forks a new process for each request. `harness.starts` starts it and asks it.

It listens on the socket of descriptor `sys.argv[1]`, and ends with everything that it has forked when its standard input
ends. A connection is for one process: it carries the request with the new process's descriptors, and back come its number
and, at its end, its status. A process whose connection is closed is killed.

A request is an object in JSON: `entry` ("module:function"), `words` (as /proc is to show them; sys.argv begins at
`argv`), `env`, `directory`, `targets` (the numbers of the descriptors that come with it).
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import pkgutil
import selectors
import signal
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchard import end_at_interrupt

# Of a length, a process number or an exit status.
NUMBER = struct.Struct("!i")
# The modules of the `ssh` extra are imported by few, and take as long as all others.
_MODULES = ("orchard.controller", "orchard.worker", "orchard.testing", "orchard.cli.main")


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError("the connection was closed within a message")
        data += more
    return data


class ForkServer:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._waking = wake
        # The connection of each process.
        self._connections: dict[int, socket.socket] = {}

    def serve(self) -> dict[str, Any] | None:
        """Fork processes until standard input ends: None. In each of them, return its request."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        for readable in (self._listener, self._wake, 0):
            self._selector.register(readable, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == 0:
                    for number in self._connections:
                        os.kill(number, signal.SIGKILL)
                    return None
                if key.fileobj is self._listener:
                    request = self._fork(self._listener.accept()[0])
                    if request is not None:
                        return request
                elif key.fileobj is self._wake:
                    self._wake.recv(1000)
                    self._reap()
                # Otherwise the process has ended in this round, and its number may be that of another one.
                elif self._connections.get(key.data) is key.fileobj:
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self, connection: socket.socket) -> dict[str, Any] | None:
        """Fork a process for a request. Return the request in the new process, else None."""
        try:
            length, descriptors, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
            request: dict[str, Any] = json.loads(receive(connection, *NUMBER.unpack(length)))
        except (OSError, struct.error):
            connection.close()
            return None
        # Here, where it is for all processes that follow.
        importlib.import_module(request["entry"].partition(":")[0])
        number = os.fork()
        if number == 0:
            connection.close()
            self._leave()
            _become(request, descriptors)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        self._connections[number] = connection
        self._selector.register(connection, selectors.EVENT_READ, number)
        with suppress(OSError):
            connection.sendall(NUMBER.pack(number))
        return None

    def _reap(self) -> None:
        while self._connections:
            number, status = os.waitpid(-1, os.WNOHANG)
            if number == 0:
                return
            connection = self._connections.pop(number)
            with suppress(KeyError):
                self._selector.unregister(connection)
            with suppress(OSError):
                connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
            connection.close()

    def _leave(self) -> None:
        """Close in a new process what belongs to the server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for each in (self._listener, self._wake, self._waking, *self._connections.values()):
            each.close()


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Make of this process what a started one would be."""
    os.setsid()
    for target in range(3):
        if target in request["targets"]:
            os.dup2(descriptors[request["targets"].index(target)], target)
        else:
            os.close(target)
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    tempfile.tempdir = None
    sys.argv = request["argv"]
    sys.stdin, sys.stdout, sys.stderr = (_open(number, request["targets"]) for number in range(3))
    _show(request["words"], request["env"])


def _open(number: int, targets: list[int]) -> Any:
    """Return what Python opens at its start for a standard stream."""
    if number not in targets:
        return None
    # The server was started with the variables that decide about these.
    before = (sys.__stdin__, sys.__stdout__, sys.__stderr__)[number]
    assert before is not None
    is_unbuffered = number > 0 and bool(os.environ.get("PYTHONUNBUFFERED"))
    stream = open(number, "wb" if number else "rb", 0 if is_unbuffered else -1, closefd=False)  # noqa: SIM115
    is_by_line = not is_unbuffered and (number == 2 or stream.isatty())
    return io.TextIOWrapper(
        stream, before.encoding, before.errors, line_buffering=is_by_line, write_through=is_unbuffered
    )


def _show(words: list[str], env: dict[str, str]) -> None:
    """Have /proc show the command and the environment of this process, and not those of the server."""
    if sys.platform != "linux":
        return
    import ctypes

    # The last fields: where both begin and end in memory.
    *_, words_at, words_end, env_at, env_end, _ = Path("/proc/self/stat").read_text().split()
    texts = b"\0".join(map(os.fsencode, words)), b"\0".join(os.fsencode(f"{name}={env[name]}") for name in env)
    for text, begin, end in zip(texts, map(int, (words_at, env_at)), map(int, (words_end, env_end)), strict=True):
        size = end - begin
        ctypes.memmove(begin, text[: size - 1].ljust(size, b"\0"), size)


def _preload() -> None:
    for name in _MODULES:
        importlib.import_module(name)
    for module in pkgutil.iter_modules(importlib.import_module("orchard.cli").__path__, "orchard.cli."):
        importlib.import_module(module.name)
    # What is in use is not looked at, and so not copied, by the collections of the processes.
    gc.collect()
    gc.freeze()


def main() -> None:
    _preload()
    request = ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()
    if request is not None:
        # `python -m orchard...` and its script begin with this.
        end_at_interrupt()
        module, _, function = request["entry"].partition(":")
        sys.exit(getattr(importlib.import_module(module), function)())


if __name__ == "__main__":
    main()
