"""A controller and hosts of real processes, whose workers run the stand-in for tart.

For tests in which workers are stopped, killed and frozen while their VMs go on: a VM of the stand-in is a process with
a supervisor, in a session of its own. Slower than `harness.inprocess`, so only for what needs signals and real
processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Unpack

import trio

from harness.clients import wait_vm
from harness.processes import GENEROUS, ORCHARD, PLAIN, Role, controller, eventually, processes_in, started
from orchard.client import Client
from orchard.methods.fields import NewVMFields, VMFields
from orchard.schema import TART_VMS, VM
from orchard.vm import supervised
from orchard.vm.processes import is_locked
from orchard.worker import host_architecture

STANDIN = Path(__file__).parent.parent / "standin" / "tart"
# Seconds after which a controller calls a worker offline. A busy machine may stop a process for two seconds.
SHORT_OFFLINE_TIMEOUT, LONG_OFFLINE_TIMEOUT = 5, 60


class Host:
    """A machine for VMs, on which one worker after the other runs."""

    def __init__(self, home: Path, url: str, starts: Path) -> None:
        """`url` is the controller's; `starts` the directory in which the stand-in notes the start of each VM."""
        self.home = home
        self.url = url
        # Words before a worker's command.
        self.before: Sequence[str] = ()
        self.tart_home = home / "tart-home"
        self.tart_home.mkdir(parents=True)
        self.environ = {
            "TART_HOME": str(self.tart_home),
            "TART_ONCE": str(starts),
            # The stand-in is called often: with the Python that runs the tests.
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def worker(self, *arguments: str, **environ: str) -> AbstractContextManager[Role]:
        """Run a worker on this host for the time of the block, with a log of its own."""
        (self.home / "worker.log").unlink(missing_ok=True)
        tart = ("--tart", os.path.relpath(STANDIN), "--resources", f"{TART_VMS}=20")
        words = (self.url, *tart, "--allow-own-addresses", "--name", self.home.name, *arguments)
        return started("worker", *words, home=self.home, env={**self.environ, **environ}, before=self.before)

    async def run_without_supervisor(self, name: str) -> None:
        """Run a VM without a supervisor, as a process whose parent has ended."""
        start = ["/bin/sh", "-c", '"$0" clone example.com/i "$1" && "$0" run "$1" &', str(STANDIN), name]
        subprocess.run(start, env={**os.environ, **self.environ}, stdin=subprocess.DEVNULL, check=True)  # noqa: ASYNC221
        await eventually(lambda: self.states().get(name) == "running")

    def states(self) -> dict[str, str]:
        """Return the states of all VMs on this host, by their local names, as tart would list them."""
        return {path.stem: state for path in (self.tart_home / "vms").glob("*.json") if (state := _state_in(path))}

    def record(self, vm: VM) -> supervised.Record:
        found = supervised.read_record(self.home / ORCHARD / "tart" / f"{vm.tart_name}.run")
        # A signal to process 0 would go to the tests themselves.
        assert found.supervisor > 0, f"the supervisor of {vm.tart_name} is not recorded"
        return found

    def hold(self, place: str) -> None:
        """Stop the next call of tart that comes to a place ("clone before") there."""
        (self.tart_home / "hold").write_text(place)

    async def wait_held(self) -> int:
        """Wait until a call is stopped at the place of `hold`, and return its process number."""
        path = self.tart_home / "held"
        await eventually(path.exists)
        return int(path.read_text())

    def release(self) -> None:
        (self.tart_home / "held").unlink()


def _state_in(path: Path) -> str:
    """Return the state of a VM that tart keeps in a file; "" if the file has just been deleted."""
    try:
        vm: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return ""
    return "running" if vm.get("lock") and is_locked(Path(vm["lock"])) else vm["state"]


class ProcessCluster:
    """A client of a controller, and hosts in one directory. The first host is "mac"."""

    def __init__(self, home: Path, client: Client) -> None:
        self.home = home
        self.client = client
        self._starts = home / "once"
        self._starts.mkdir()
        (self._starts / "runs").touch()
        self.host = self.add_host("mac")

    def add_host(self, name: str) -> Host:
        return Host(self.home / name, self.client.url, self._starts)

    async def create(self, name: str, **spec: Unpack[VMFields]) -> VM:
        fields: NewVMFields = {"name": name, "image": "example.com/i", "arch": host_architecture(), **spec}
        return await self.client.vms.create(**fields)

    async def create_running(self, name: str, **spec: Unpack[VMFields]) -> VM:
        """Create a VM, and wait until it runs and the stand-in has noted that; without a script, until it is ready."""
        await self.create(name, **spec)
        with trio.fail_after(GENEROUS):
            vm = await self.client.vms.wait(name, until="running" if spec.get("startup_script") else "ready")
        await eventually(partial(self.has_started, name))
        return vm

    async def wait_vm(self, name: str, holds: Callable[[VM], bool]) -> VM:
        """Follow a VM until a condition holds, and return it."""
        return await wait_vm(self.client, name, holds)

    async def delete_all(self, *, but: str = "") -> None:
        """Delete all VMs but one, and wait until nothing of them is left on the first host."""
        vms = await self.client.vms.list()
        for vm in vms:
            if vm.name != but:
                await self.client.vms.delete(vm.name)
        kept = {vm.tart_name for vm in vms if vm.name == but}
        await eventually(lambda: self.host.states().keys() == kept)
        files = self.host.home / ORCHARD / "tart"
        await eventually(lambda: {path.stem for path in files.iterdir() if path.suffix} == kept)

    def starts(self, name: str) -> list[str]:
        """Return a word for each start of a VM on any host: "twice" if another instance of the VM ran then, else "alone"."""
        noted = (self._starts / "runs").read_text().splitlines()
        return [found for vm, found in map(str.split, noted) if vm.startswith(f"orchard-{name}-")]

    def always_alone(self, name: str) -> bool:
        """Return whether no start of a VM found another instance of it running."""
        return set(self.starts(name)) == {"alone"}

    def has_started(self, name: str, times: int = 1) -> bool:
        return len(self.starts(name)) >= times


@asynccontextmanager
async def process_cluster(home: Path, offline_timeout: float = LONG_OFFLINE_TIMEOUT) -> AsyncIterator[ProcessCluster]:
    """Run a controller without TLS and credentials for the time of the block. At its end, all processes are killed."""
    words = (*PLAIN, "--worker-offline-timeout", str(offline_timeout))
    with killing_leftovers(home), controller(*words, home=home) as (_, url):
        async with Client(url) as client:
            yield ProcessCluster(home, client)


@contextmanager
def killing_leftovers(home: Path) -> Iterator[None]:
    """Kill the processes that still run in `home` at the end of the block, as supervisors and their VMs are made to."""
    try:
        yield
    finally:
        for number in processes_in(home):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def has_state(host: Host, vm: VM, state: str) -> bool:
    return host.states()[vm.tart_name] == state


def has_failed(vm: VM) -> bool:
    return vm.state.status == "failed"


def is_restarted(vm: VM) -> bool:
    """Return whether a VM is ready again, possibly more than once: a lease also ends when the machine stalls."""
    return vm.state.restart_count >= 1 and vm.condition("ready")


def process_state(number: int) -> str:
    """Return the kernel's letter for the state of a process; Z when it has ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


async def freeze(worker: Role) -> None:
    """Stop a worker with SIGSTOP, and wait until it is stopped."""
    worker.process.send_signal(signal.SIGSTOP)
    await eventually(lambda: process_state(worker.process.pid) == "T")


def has_logged(worker: Role, words: str) -> bool:
    return words in worker.log.read_text()


def ends_well(worker: Role) -> bool:
    """Stop a worker, and return whether it ended with status 0 and logged no traceback."""
    return worker.stop() == 0 and not has_logged(worker, "Traceback")
