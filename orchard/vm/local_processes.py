"""The processes of a synthetic VM, found among all of this host by their environment, and the ports on which they listen.

Linux shows both in /proc. Elsewhere `ps` and `lsof` tell them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from orchard.vm.processes import KILL_SECONDS

# Interval of listing processes until the killed ones have ended.
_LEFTOVER_POLL_SECONDS = 0.01
# Limit for the beginning of a program, which takes microseconds on an idle core.
_EXECUTING_SECONDS = 0.1
_EXECUTING_POLL_SECONDS = 0.001
# The variable in the environment of a VM's programs that holds the directory of their VM.
VM_VARIABLE = "ORCHARD_VM"


class _Process(NamedTuple):
    """A process of this host. `words` is its environment, each word between two `separator`."""

    parent: int
    words: str
    separator: str

    def has(self, beginning: str) -> bool:
        return f"{self.separator}{beginning}" in self.words

    def is_of(self, directory: Path) -> bool:
        """Return whether the process belongs to the VM of a directory."""
        return self.has(f"{VM_VARIABLE}={directory}{self.separator}")


def kill_leftovers(directory: Path) -> None:
    """Kill the processes of a VM that no task waits for, and wait until they have ended.

    A process may start another one while the list of processes is read. So the list is read again until it is empty.
    """
    until = time.monotonic() + KILL_SECONDS
    while (found := list(_processes_of(directory))) and time.monotonic() < until:
        for number in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(_LEFTOVER_POLL_SECONDS)


def _processes_of(directory: Path) -> Iterator[int]:
    """Yield the numbers of the processes that have ORCHARD_VM=`directory` in their environment."""
    return (number for number, process in _processes() if process.is_of(directory))


def _processes() -> Iterator[tuple[int, _Process]]:
    """Yield number, parent and environment of the processes of this user."""
    if _has_proc():
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                words = _read_environment(path)
                parent = int((path / "stat").read_text(errors="replace").rpartition(") ")[2].split()[1])
                yield int(path.name), _Process(parent, f"\0{words}\0", "\0")
        return
    yield from _processes_in(_output("/bin/ps", "-axEww", "-o", "pid=,ppid=,command="))


def _read_environment(process: Path) -> str:
    """Return the environment of a process of this user. Raises OSError.

    While a process begins to execute a program, the kernel shows neither its arguments nor its environment.
    `Popen` returns before that time is over, so this function waits for its end.
    """
    until = time.monotonic() + _EXECUTING_SECONDS
    while not (words := (process / "environ").read_text(errors="surrogateescape")):
        # Threads of the kernel, and processes that have ended, have no program.
        is_executing = not (process / "cmdline").read_bytes() and (process / "exe").exists()
        if not is_executing or time.monotonic() > until:
            # The environment came just before the arguments were read, or there is none.
            return (process / "environ").read_text(errors="surrogateescape")
        time.sleep(_EXECUTING_POLL_SECONDS)
    return words


def _processes_in(lines: Iterable[str]) -> Iterator[tuple[int, _Process]]:
    """Yield the processes in lines of `ps`. One may have no command, or one with line breaks."""
    for line in lines:
        with suppress(ValueError):
            own, parents, words = line.split(None, 2)
            yield int(own), _Process(int(parents), f" {words} ", " ")


def _has_proc() -> bool:
    return Path("/proc/self/environ").exists()


def _output(*command: str) -> list[str]:
    """Run a program of the system, and return the lines of its output."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", check=False)  # noqa: S603
    return done.stdout.splitlines()


def listens(directory: Path, port: int) -> bool:
    """Return whether the VM of a directory, or a program that plays its server, listens on a TCP port.

    Takes milliseconds.
    """
    sockets = _listening_sockets(port)
    # Not if the parent is init: it may listen for other programs, such as the host's sshd. This process comes second,
    # since it may have thousands of connections open.
    if (os.getppid() != 1 and _holds(os.getppid(), sockets)) or _holds(os.getpid(), sockets):
        return True
    processes = dict(_processes())
    return any(
        _holds(number, sockets)
        for number, process in processes.items()
        if process.is_of(directory) or (not process.has(f"{VM_VARIABLE}=") and _is_child(number, processes))
    )


def _is_child(number: int, processes: Mapping[int, _Process]) -> bool:
    """Return whether a process was started by this one, or by a process that was."""
    for _ in range(len(processes)):
        if number not in processes:
            return False
        number = processes[number].parent
        if number == os.getpid():
            return True
    return False


def _listening_sockets(port: int) -> set[str]:
    """Return the listening TCP sockets of a port as `_holds` compares them: by inode, or without /proc by process."""
    if not _has_proc():
        return set(_output("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-t"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # A thousand connections take milliseconds, so only the listening sockets are read, which the kernel lists first
        # (Documentation/networking/proc_net_tcp.rst).
        with suppress(OSError), Path(table).open() as rows:
            next(rows, None)
            # number, local address and port, remote ones, state (0A: listening), five more, inode
            for words in takewhile(lambda words: words[3] == "0A", map(str.split, rows)):
                if int(words[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{words[9]}]")
    return found


def _holds(number: int, sockets: set[str]) -> bool:
    """Return whether a process has one of the sockets open."""
    if not _has_proc():
        return str(number) in sockets
    with suppress(OSError), os.scandir(f"/proc/{number}/fd") as descriptors:
        for descriptor in descriptors:
            with suppress(OSError):
                # A process may have thousands of them.
                if os.readlink(descriptor.path) in sockets:  # noqa: PTH115
                    return True
    return False
