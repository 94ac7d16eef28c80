"""The interface between the worker and the program that runs VMs on its host: verbs, their values, their errors.

Two drivers implement `Driver`: orchard/tart.py for `tart` and `vetu`, synthetic.py for VMs without a hypervisor. This
module performs no I/O.

Every verb can be cancelled at any time. A program that the verb started is ended and reaped before the cancellation
goes on. Running VMs are the exception: they outlive the worker that started them, and the next worker adopts them with
`attach`. A running VM ends only by itself, by `stop`, by `suspend`, when its lease expires, or when nothing supervises
it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import trio

from orchard.resources.cluster import CachedImage, WorkerDisk
from orchard.schema import OS, VMSpec

LEASE_OVER = "ended by its host, which was cut off from the controller for so long that the VM might run elsewhere"

LocalState = Literal["running", "suspended", "stopped"]
ScriptKind = Literal["startup", "shutdown"]
# The operations whose failures a worker reports in its heartbeats.
Trouble = Literal[
    "list", "pull", "prepull", "clone", "start", "stop", "delete", "supervisor", "unknown-vms", "hostDirs"
]
# Called with an operation, a local name or "", and why the operation has failed, "" if it has succeeded.
NoteTrouble = Callable[[Trouble, str, str], None]
# Called with a percentage from 0 to 100 whenever it has changed.
Progress = Callable[[int], None]
OnLine = Callable[[str], Awaitable[None]]


class DriverError(Exception):
    """A verb failed. str() is one line, fit for the VM's status message."""


class NoSuchVM(DriverError):  # noqa: N818
    """There is no local VM of that name."""


class NotRunning(DriverError):  # noqa: N818
    """The VM is neither running nor suspended."""


class SupervisorLost(DriverError):  # noqa: N818
    """The supervisor of a VM was killed or does not answer, and the VM has been ended."""


class ScriptFailed(DriverError):  # noqa: N818
    """A script ended with an exit status other than 0. `last_line` is its last non-blank line or "".

    `limit`: the script was killed because it took longer than so many seconds.
    """

    def __init__(
        self, exit_code: int, last_line: str, *, kind: ScriptKind = "startup", limit: float | None = None
    ) -> None:
        self.exit_code = exit_code
        self.last_line = last_line
        end = f"failed with exit code {exit_code}"
        if limit is not None:
            end = f"did not end within {limit:g} seconds and was killed (exit code {exit_code})"
        super().__init__(f"{kind} script {end}" + (f": {last_line}" if last_line else ""))


@dataclass(frozen=True, slots=True)
class LocalVM:
    name: str
    state: LocalState


@dataclass(frozen=True, slots=True)
class Hardware:
    """What can be changed while a VM is stopped: `memory` in MiB, `disk_size` in GB. 0 leaves a value unchanged."""

    cpu: int = 0
    memory: int = 0
    disk_size: int = 0


@dataclass(frozen=True, slots=True)
class Script:
    """A script, and the way into the VM to run it.

    `bridged`: the VM is on a bridged network (see `Driver.ip`). `agent`: the VM's guest agent runs the script, in the
    login shell of the operating system `os`, and not the SSH server. A script that has not ended `seconds` after it
    could begin is killed.
    """

    text: str = field(repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    username: str = "admin"
    password: str = field(default="admin", repr=False)
    bridged: bool = False
    agent: bool = False
    os: OS = "darwin"
    seconds: float = math.inf
    kind: ScriptKind = "startup"


class Driver(Protocol):
    """The VMs on this host. Every verb raises DriverError, and NoSuchVM when it is given an unknown name."""

    async def list_vms(self) -> list[LocalVM]:
        """Return all local VMs, including those that other programs made."""

    async def list_images(self) -> list[CachedImage]:
        """Return the images in this host's cache, each once: by its tag, or by its digest if it has no tag."""

    async def disk(self) -> WorkerDisk | None:
        """Return the size and the free space of the disk with the VMs, None if that is unknown."""

    async def version(self) -> str:
        """Return the version of the program that runs VMs, such as 2.39.0, or ""."""

    async def pull(self, image: str, on_progress: Progress) -> None:
        """Bring the newest version of an image to this host."""

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        """Make the local VM `name` from a local VM, or from an image, which is pulled unless it is on this host."""

    async def fqn(self, image: str) -> str:
        """Return the name of a pulled image with its digest. Return the name of a local VM unchanged."""

    async def configure(
        self, name: str, hardware: Hardware, *, random_mac: bool = False, random_serial: bool = False
    ) -> None:
        """Change a stopped VM, and give it a new MAC address or serial number. A disk can only grow."""

    async def run(
        self, name: str, spec: VMSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run a VM as `spec` says until it has shut down or was stopped or suspended. A suspended VM resumes.

        A `leased` VM ends when its lease expires.

        For `nursery.start`: started when the VM's process exists. When cancelled, it leaves the VM running. In all
        other cases nothing of the VM runs when it returns or raises.
        """

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Adopt a VM that an earlier worker left running: return when it ends, as `run` would have.

        For `nursery.start`. Raises what `run` raises. Raises NotRunning for a VM that this driver did not start, even
        if that VM runs.
        """

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        """Return the IP address of a running VM. May take a minute. `bridged`: the VM is on a bridged network."""

    async def find_port(self, name: str, port: int) -> int:
        """Return the port at the address of a running VM that leads to a port of this VM.

        Raises DriverError if the driver knows that nothing in the VM listens there.
        """

    async def connect(self, address: str, port: int) -> trio.SocketStream:
        """Open a TCP connection to a VM. The caller closes it. Raises OSError."""

    async def stop(self, name: str) -> None:
        """Shut down a VM and wait until it has ended. A suspended VM loses its saved state. Raises NotRunning."""

    async def suspend(self, name: str) -> None:
        """Save the state of a running VM, and wait until it has ended. Raises NotRunning."""

    async def delete(self, name: str) -> None:
        """Delete a VM that is not running, with its disk and its note."""

    async def run_script(self, name: str, script: Script, on_line: OnLine) -> None:
        """Run a script in a running VM, and return when it has ended with exit status 0.

        Awaits `on_line(line)` for each line of output, in order. Raises ScriptFailed for another exit status and for a
        script that took too long, which is killed with what it started; another DriverError if the script did not start
        or its end was not seen; and what `on_line` raises.
        """

    async def recover(self) -> None:
        """Clean up at the worker's start: end the calls, other than running VMs, that a killed worker left behind."""

    def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
        """Renew leases: `leased` VMs may run until then, and are ended even without a worker.

        Applies to the VMs called `names` whose leases have not expired, and to those that are run from now on. Every
        other VM keeps the lease that it has.

        Both times are absolute, in seconds of `supervisor.clock()`, so that a delay of the worker does not extend them.
        At `soft` a VM is asked to shut down, at `hard` it is killed. A VM whose supervisor does not end it then is
        killed by `run` and `attach`, as is one whose supervisor shows no sign of life.
        """

    def note(self, name: str, text: str) -> None:
        """Store a line of text with a local VM, for the next worker to read. `delete` deletes it."""

    def noted(self, name: str) -> str:
        """Return the text that `note` stored with a local VM, or ""."""


def operand(kind: str, text: str) -> str:
    """Return a name or an image unchanged if no command line can mistake it for an option. Raises DriverError.

    `kind` says in the message what `text` is.
    """
    if not text or text.startswith("-") or "\0" in text:
        raise DriverError(
            f'{kind} is "{text}", expected a text that is not empty, has no NUL and does not begin with "-"'
        )
    return text
