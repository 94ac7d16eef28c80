"""Starts of the product's processes: forked from one that has imported it, which costs a tenth of a real start.

To a test and to the system, a forked process is as a started one: it has a session, an environment, a command line in
/proc, descriptors, signals and an exit status of its own. Its parent is `fork_server.py` and not the tests.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO

from harness.fork_server import NUMBER, receive

TESTS = Path(__file__).parent.parent
# What `python -m MODULE` runs.
ENTRIES = {
    "orchard": "orchard.__main__:main",
    "orchard.controller": "orchard.controller:main",
    "orchard.worker": "orchard.worker:main",
}
# Variables that a Python reads as it starts, or its loader.
_EARLY = ("PYTHON", "LD_", "MALLOC_", "LC_", "LANG")
_EARLY_HERE = {name: value for name, value in os.environ.items() if name.startswith(_EARLY)}
# More than the environments and the command lines of tests have: /proc shows those of a process in these places.
_ENVIRONMENT_BYTES, _COMMAND_BYTES = 32_000, 16_000
# Starts that wait for the server.
_BACKLOG = 1000


class ForkedProcess:
    """A forked process, with the methods of subprocess.Popen that tests use. `stdout` is our end of a pipe, or None."""

    def __init__(self, connection: socket.socket, words: Sequence[str]) -> None:
        self.args = words
        self.stdout: IO[str] | None = None
        self.pid: int = NUMBER.unpack(receive(connection, NUMBER.size))[0]
        self._connection = connection
        weakref.finalize(self, connection.close)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Return the exit status, that of a signal as a negative number; None while it runs."""
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status. Raises TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def _status(self, timeout: float | None) -> int | None:
        ended = select.poll()
        ended.register(self._connection, select.POLLIN)
        if not ended.poll(None if timeout is None else timeout * 1000):
            return None
        # It stays there for the next call, which may be that of another thread.
        data = self._connection.recv(NUMBER.size, socket.MSG_PEEK)
        assert data, "the fork server has ended"
        status: int = NUMBER.unpack(data)[0]
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# A process of the product, forked or started.
Process = subprocess.Popen[str] | ForkedProcess


def start(
    words: Sequence[str], *, env: Mapping[str, str], stdin: IO[str] | int, stdout: IO[str] | int, stderr: IO[str]
) -> Process:
    """Start a command: fork it if it is a role of the product, run by this Python as this one was started.

    `stdin` may be DEVNULL, and `stdout` PIPE.
    """
    early = {name: value for name, value in env.items() if name.startswith(_EARLY)}
    is_ours = len(words) > 2 and list(words[:2]) == [sys.executable, "-m"] and words[2] in ENTRIES
    if not is_ours or early != _EARLY_HERE:
        return subprocess.Popen(words, stdin=stdin, stdout=stdout, stderr=stderr, text=True, env=env)
    with ExitStack() as stack:
        ours: IO[str] | None = None
        if stdout == subprocess.PIPE:
            reading, writing = os.pipe()
            ours, stdout = os.fdopen(reading), stack.enter_context(os.fdopen(writing, "w"))
        if stdin == subprocess.DEVNULL:
            stdin = stack.enter_context(Path(os.devnull).open())
        assert not isinstance(stdin, int)
        assert not isinstance(stdout, int)
        descriptors = {0: stdin.fileno(), 1: stdout.fileno(), 2: stderr.fileno()}
        process = fork(ENTRIES[words[2]], words[3:], env=env, descriptors=descriptors, shown=words)
    process.stdout = ours
    return process


def fork(
    entry: str,
    words: Sequence[str],
    *,
    env: Mapping[str, str],
    descriptors: Mapping[int, int],
    shown: Sequence[str] | None = None,
) -> ForkedProcess:
    """Run a function without arguments, "module:function", in a process of its own.

    `words` follow the name of the module in its sys.argv, and `shown` is its command line in /proc. `descriptors` are
    its standard input, output and error; one that is missing is closed.
    """
    module = entry.partition(":")[0]
    request = {
        "entry": entry,
        "argv": [module, *words],
        "words": shown or [module, *words],
        "env": dict(env),
        "directory": str(Path.cwd()),
        "targets": list(descriptors),
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server_address())
    data = json.dumps(request).encode()
    socket.send_fds(connection, [NUMBER.pack(len(data))], list(descriptors.values()))
    connection.sendall(data)
    return ForkedProcess(connection, words)


@cache
def server_address() -> str:
    """Start the fork server of these tests, which ends with them, and return the path of its socket."""
    directory = tempfile.mkdtemp(prefix="forks-")
    path = f"{directory}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(_BACKLOG)
        listener.set_inheritable(True)
        paths = (TESTS, TESTS.parent)
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.fork_server", str(listener.fileno()), " " * _COMMAND_BYTES],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**_EARLY_HERE, "PYTHONPATH": os.pathsep.join(map(str, paths)), "SPACE": " " * _ENVIRONMENT_BYTES},
            cwd=TESTS,
            start_new_session=True,
        )

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        # The run may have removed it.
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(end)
    return path


# A program that has one of the fork server run in its place, with its own words, environment, directory and descriptors.
_PROGRAM = """#!{python} -IS
import _socket, os, signal, struct, sys
from json import dumps
connection = _socket.socket(_socket.AF_UNIX)
connection.connect({address!r})
module = {entry!r}.partition(":")[0]
argv = [sys.argv[0], *{words!r}, *sys.argv[1:]]
request = dict(
    entry={entry!r}, argv=argv, words=[{python!r}, *argv], env=dict(os.environ), directory=os.getcwd(), targets=[0, 1, 2]
)
data = dumps(request).encode()
descriptors = struct.pack("3i", 0, 1, 2)
connection.sendmsg([struct.pack("!i", len(data))], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
connection.sendall(data)
number = struct.unpack("!i", connection.recv(4, _socket.MSG_WAITALL))[0]
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(each) is not signal.SIG_IGN:
        signal.signal(each, lambda each, frame: os.kill(number, each))
for each in (0, 1, 2):
    os.close(each)
status = struct.unpack("!i", connection.recv(4, _socket.MSG_WAITALL))[0]
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def write_forking_program(path: Path, entry: str, *words: str) -> None:
    """Write a program for shells, which runs `entry` in a forked process; `words` come before its own arguments.

    It passes on its standard streams, SIGINT, SIGTERM and SIGHUP, and ends as the forked process does. Job control and
    terminals do not reach that.
    """
    path.write_text(_PROGRAM.format(python=sys.executable, address=server_address(), entry=entry, words=list(words)))
    path.chmod(0o755)
