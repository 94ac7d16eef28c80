"""What the worker knows of virtual machines: a dozen verbs, and what they raise. Law: no I/O; nothing happens here.

Each driver has a room of its own: tart.py for `tart` and `vetu`, synthetic.py for VMs without a hypervisor. Errors have
texts that are fit for a status message. Every verb can be cancelled at any time: what it started is ended and reaped
before the cancellation goes on. Only VMs run on: they outlive their worker, and the next one can `attach` to them.
Nothing but their own end, `stop`, `suspend` and a lease that runs out ends them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import trio

LEASE_OVER = "ended by its host, which was cut off from the controller for so long that the VM might run elsewhere"

LocalState = Literal["running", "suspended", "stopped"]
Progress = Callable[[int], None]


class DriverError(Exception):
    """A verb failed. str() is the one line that a user wants to see in the VM's status message."""


class NoSuchVM(DriverError):  # noqa: N818 -- it states what is the case
    """There is no local VM of that name."""


class NotRunning(DriverError):  # noqa: N818 -- likewise
    """The VM is neither running nor suspended."""


class ScriptFailed(DriverError):  # noqa: N818 -- likewise
    """The startup script ended with another exit status than 0. `last_line` may be ""."""

    def __init__(self, exit_code: int, last_line: str) -> None:
        self.exit_code = exit_code
        self.last_line = last_line
        said = f": {last_line}" if last_line else ""
        super().__init__(f"startup script failed with exit code {exit_code}{said}")


@dataclass(frozen=True, slots=True)
class LocalVM:
    name: str
    state: LocalState


@dataclass(frozen=True, slots=True)
class SharedDir:
    """A directory of the host, or an https:// archive, that the VM sees under `name`."""

    name: str
    path: str
    ro: bool = False


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What holds for one run of a VM. `bridged` names an interface of the host ("": none)."""

    headless: bool = False
    softnet: bool = False
    softnet_allow: tuple[str, ...] = ()
    softnet_block: tuple[str, ...] = ()
    bridged: str = ""
    nested: bool = False
    suspendable: bool = False
    dirs: tuple[SharedDir, ...] = ()
    leased: bool = False  # it is to end when the lease does


class Driver(Protocol):
    """Virtual machines on this host. Every verb raises DriverError, and NoSuchVM where it is given an unknown name."""

    async def list_vms(self) -> list[LocalVM]:
        """Give all local VMs, whoever made them."""

    async def pull(self, image: str, on_progress: Progress) -> None:
        """Bring the newest version of an image to this host. `on_progress` gets a percentage whenever it changed."""

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        """Make the local VM `name` from an image, which is pulled if it must be, or from a local VM."""

    async def fqn(self, image: str) -> str:
        """Give a pulled image with its digest; a local name as it is."""

    async def configure(
        self,
        name: str,
        *,
        cpu: int = 0,
        memory: int = 0,
        disk_size: int = 0,
        random_mac: bool = False,
        random_serial: bool = False,
    ) -> None:
        """Change a stopped VM: `memory` in MiB, `disk_size` in GB, which can only grow. 0 and False leave it as it is."""

    async def run(
        self, name: str, options: RunOptions, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run a VM until it has shut down or was stopped or suspended; a suspended one resumes.

        For `nursery.start`: started when the process is there. Cancelled, it leaves the VM running; else nothing of it
        runs any more.
        """

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stay with a VM that runs already, as `run` would have. Raises what `run` raises, and NotRunning for one that
        was not started by this driver, whether or not it runs.
        """

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        """Give the address of a running VM, which it may take a minute to get."""

    async def stop(self, name: str) -> None:
        """Shut a VM down and wait for it; a suspended one loses its saved state. Raises NotRunning."""

    async def suspend(self, name: str) -> None:
        """Save the state of a running VM, and end it. Raises NotRunning."""

    async def delete(self, name: str) -> None:
        """Delete a VM that is not running, with its disk."""

    async def run_script(
        self,
        name: str,
        script: str,
        *,
        env: Mapping[str, str],
        username: str,
        password: str,
        bridged: bool,
        on_line: Callable[[str], Awaitable[None]],
    ) -> None:
        """Run a script in a running VM, and return when it ended with 0. Each line of its output is awaited as
        `on_line(line)`. Raises ScriptFailed; another DriverError when it did not begin or was cut off; and what
        `on_line` raises.
        """

    async def recover(self) -> None:
        """End what a killed worker has left under way on this host, other than VMs."""

    def lease(self, soft: float, hard: float) -> None:
        """Let leased VMs run on until `soft`, when they shut down, and `hard`, when they are killed.

        Whatever becomes of the worker, they end then, unless the lease was renewed. Both are times of guard.clock, not
        seconds from now: a worker may stand still before it comes to write them down.
        """

    def note(self, name: str, text: str) -> None:
        """Keep a line with a local VM, for the next worker to read; it is gone when the VM is deleted."""

    def noted(self, name: str) -> str:
        """Give the line that was kept with a local VM ("": none)."""


def operand(what: str, text: str) -> str:
    """Give a name or an image back if the command line cannot take it for anything else. Raises DriverError."""
    if not text or text.startswith("-") or "\0" in text:
        raise DriverError(f'the {what} is "{text}", expected one that is not empty and has no "-" in front')
    return text
