"""The `tart` command line, and its Linux sister `vetu`, which has fewer flags.

`TartDriver` makes each verb one call of the program. vm/tart_cli.py makes the argument lists and reads the output. How
programs are run and ended is in vm/processes.py. Every verb but `run` ends by itself, within VERB_SECONDS unless it
transfers an image. What the program at hand can do, its version and the flags of `run`, is asked for when it is first
needed and when the program has been replaced.

`tart run` stays in the foreground and *is* the VM. So a supervisor owns it; `run` and `attach` only observe the
supervisor, and the VM outlives this driver. The files about it are in `home`, see vm/supervised.py. The calls under way
of one worker are below `home` in calls-WORKER (see `processes.Calls`).
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from orchard.resources.cluster import CachedImage, WorkerDisk, bounded_images
from orchard.schema import Runtime, VMSpec
from orchard.vm import supervisor
from orchard.vm.driver import (
    LEASE_OVER,
    DriverError,
    Hardware,
    LocalVM,
    NoSuchVM,
    NotRunning,
    OnLine,
    Progress,
    Script,
    operand,
)
from orchard.vm.guest_agent import run_by_agent
from orchard.vm.host import disk_of, leads_to_host
from orchard.vm.processes import (
    KILL_SECONDS,
    STOP_SECONDS,
    Calls,
    find_complaint,
    presentable,
    reporting,
)
from orchard.vm.script import SSHServer, run_over_ssh
from orchard.vm.supervised import SupervisedVMs
from orchard.vm.tart_cli import (
    LISTS_SAFELY,
    Abilities,
    Percentage,
    missing_in_vetu,
    parse_images,
    parse_list,
    run_arguments,
    seconds_until_listable,
    set_arguments,
    verb_error,
    with_digests,
)
from orchard.vm.vm_connections import Dial

# Limit of a verb that transfers no image. The longest one writes a big VM's memory to the disk.
VERB_SECONDS = 300.0  # seconds
# A macOS guest asks for its address some seconds after its boot.
_IP_SECONDS = 60  # seconds
# Pause before a verb is repeated that fails while a VM starts.
_YOUNG_SECONDS = 0.25  # seconds
# Limit for a guest agent to answer. In an image without an agent none ever does.
_AGENT_SECONDS = 30  # seconds
# Interval of reading the host's ARP table, by a call of tart.
_ARP_SECONDS = 1.0  # seconds
# `tart list` fails as a whole when another program deletes a VM meanwhile.
_LIST_RETRIES = 5
_LIST_PAUSE = 0.5  # seconds
# Pause before a transfer is tried once more, since registries and networks fail now and then.
_TRANSFER_PAUSE = 1.0  # seconds

_INSTALL: Mapping[Runtime, str] = {
    "tart": "brew install cirruslabs/cli/tart",
    "vetu": "https://github.com/cirruslabs/vetu",
}

ListedT = TypeVar("ListedT", LocalVM, CachedImage)

_logger = logging.getLogger("orchard.vm")


def find_tart(path: str | None, runtime: Runtime) -> str:
    """Return the path of the `tart` (or `vetu`) program: `path` if given, else the one on PATH. Raises DriverError."""
    if found := shutil.which(path or runtime):
        # Absolute, since supervisors work in another directory.
        return str(Path(found).absolute())
    if path:
        raise DriverError(f"{path} is not an executable program, expected {runtime}; correct --tart")
    raise DriverError(
        f"there is no {runtime} on PATH ({os.environ.get('PATH', '')}):"
        f" install it ({_INSTALL[runtime]}), or name it with --tart PATH"
    )


# ---- the driver ----------------------------------------------------------------------------------------------------


class TartDriver:
    """VMs by the `tart` program at `path`, or by `vetu`, with scripts over SSH. Performs no I/O before the first verb.

    `home` is the driver's directory; with the directory of an earlier worker the driver knows which VMs run. `env` is
    added to the worker's environment for tart. A guest that has not shut down after `stop_seconds` is killed. `clock`
    returns seconds since 1970, as the times of files are given. `own_addresses`: VMs may have addresses of this host,
    as those of a stand-in for tart have. `dial` opens the connections to VMs.
    """

    def __init__(
        self,
        path: str,
        home: Path,
        *,
        worker: str = "",
        ssh_port: int = 22,
        vetu: bool = False,
        stop_seconds: float = STOP_SECONDS,
        env: Mapping[str, str] | None = None,
        own_addresses: bool = False,
        dial: Dial | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        home = home.absolute()
        self._supervised = SupervisedVMs(home, stop_seconds)
        self._ssh_port = ssh_port
        self._program: Runtime = "vetu" if vetu else "tart"
        self._stop_seconds = stop_seconds
        self._own_addresses = own_addresses
        self._dial = dial
        self._clock = clock
        # With CI set, tart prints its progress in plain lines.
        environ = {**os.environ, "CI": "1", **(env or {})}
        self._calls = Calls(home / f"calls-{worker}", environ)
        # Where the program keeps VMs and images.
        self._state_home = Path(environ.get(f"{self._program.upper()}_HOME") or f"~/.{self._program}").expanduser()
        # The program's abilities, with the identity of its file.
        self._known: tuple[tuple[int, ...], Abilities] | None = None
        # Held during starts and lists, where these would disturb each other.
        self._starting = trio.Lock()
        # For each VM whose `run` is under way, also between a failed restore and the cold boot: whether it was told to
        # save its state since its start.
        self._runs: dict[str, bool] = {}

    async def list_vms(self) -> list[LocalVM]:
        listed = {vm.name: vm for vm in await self._list("local", parse_list)}
        # tart does not list a VM as running that was started a moment ago, and does not list one of another TART_HOME.
        running = {name: LocalVM(name, "running") for name in self._supervised.running()}
        return list({**listed, **running}.values())

    async def list_images(self) -> list[CachedImage]:
        images = await self._list("oci", parse_images)
        fqns = {}
        for name in [image.name for image in bounded_images(images) if not image.digest]:
            # An image may be pruned meanwhile.
            with suppress(DriverError):
                fqns[name] = await self.fqn(name)
        return with_digests(images, fqns)

    async def disk(self) -> WorkerDisk | None:
        return await disk_of(self._state_home)

    async def version(self) -> str:
        return ".".join(map(str, (await self._abilities()).version))

    async def _list(self, source: str, parse: Callable[[bytes], list[ListedT]]) -> list[ListedT]:
        """Return what tart lists of a source: "local" (VMs) or "oci" (cached images). Raises DriverError."""
        abilities = await self._abilities()
        retries, deadline = _LIST_RETRIES, trio.current_time() + VERB_SECONDS
        while True:
            async with self._alone(abilities):
                if not abilities.lists_safely:
                    await self._wait_listable()
                try:
                    return parse(await self._call("list", "--source", source, "--format", "json"))
                except (DriverError, ValueError) as error:
                    if not retries or trio.current_time() >= deadline:
                        remedy = "" if abilities.lists_safely else f"; {abilities.remedy}"
                        raise DriverError(f"{self._program} list failed: {error}{remedy}") from error
            retries -= 1
            await trio.sleep(_LIST_PAUSE)

    def _alone(self, abilities: Abilities) -> AbstractAsyncContextManager[None]:
        """Keep lists and starts apart for the time of a block, where the program needs that."""
        return nullcontext() if abilities.lists_safely else self._starting

    async def _wait_listable(self) -> None:
        """Wait until no VM that this host runs is in its first seconds."""
        pause = math.inf
        while pause:
            pause = seconds_until_listable(self._supervised.start_times(), self._clock())
            await trio.sleep(pause)

    async def _abilities(self) -> Abilities:
        """Return what the program can do. Raises DriverError."""
        with reporting(f"cannot run {self._path}"):
            file = Path(self._path).stat()  # noqa: ASYNC240
        identity = (file.st_dev, file.st_ino, file.st_mtime_ns)
        if self._known is None or self._known[0] != identity:
            version = b""
            # Without a version, the program is treated with the caution that old ones need.
            with suppress(DriverError):
                version = await self._call("--version")
            abilities = Abilities.parse(version, await self._call("run", "--help"))
            if self._program == "vetu":
                # vetu counts its versions differently, and has no ASIF disks.
                abilities = replace(abilities, version=LISTS_SAFELY)
            self._known = (identity, abilities)
            if not abilities.lists_safely:
                _logger.warning(abilities.remedy)
        return self._known[1]

    async def pull(self, image: str, on_progress: Progress) -> None:
        await self._transfer(on_progress, "pull", operand("image", image))

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        if self._supervised.is_running(operand("VM name", name)):
            raise DriverError(f'VM "{name}" is running')
        await self._transfer(on_progress, "clone", operand("image", source), name)

    async def _transfer(self, on_progress: Progress, verb: str, *words: str) -> None:
        """Pull or clone, which may take hours, and try once more if that fails. Raises DriverError."""
        try:
            await self._call(verb, *words, on_progress=on_progress, seconds=math.inf)
        except NoSuchVM:
            raise
        except DriverError as error:
            _logger.warning("a transfer failed, trying once more", extra={"verb": verb, "reason": str(error)})
            await trio.sleep(_TRANSFER_PAUSE)
            if verb == "clone":
                # Half-made, or made by an earlier worker.
                with suppress(NoSuchVM):
                    await self.delete(words[-1])
            await self._call(verb, *words, on_progress=on_progress, seconds=math.inf)

    async def fqn(self, image: str) -> str:
        output = await self._call("fqn", operand("image", image))
        return output.decode("utf-8", "replace").strip()

    async def configure(
        self, name: str, hardware: Hardware, *, random_mac: bool = False, random_serial: bool = False
    ) -> None:
        if random_serial:
            self._refuse_on_vetu("random serial numbers")
        if words := set_arguments(name, hardware, random_mac=random_mac, random_serial=random_serial):
            await self._call(*words)
        else:
            await trio.lowlevel.checkpoint()

    async def run(
        self, name: str, spec: VMSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._refuse_on_vetu(missing_in_vetu(spec))
        abilities = await self._abilities()
        words = run_arguments(name, spec, abilities.flags)
        self._runs[name] = False
        try:
            await self._start(name, words, leased=spec.leased)
            task_status.started()
            try:
                await self._wait_ended(name)
            except DriverError as error:
                if not await self._has_failed_restore(name):
                    raise
                extra = {"vm": name, "reason": str(error)}
                _logger.warning("the saved state of a VM cannot be restored, booting without it", extra=extra)
                with suppress(NotRunning):
                    await self.stop(name)
                # The VM may be a clone that still has the address of its source, to resume with it.
                await self.configure(name, Hardware(), random_mac=True)
                await self._start(name, words, leased=spec.leased)
                await self._wait_ended(name)
        finally:
            self._runs.pop(name, None)

    async def _start(self, name: str, words: list[str], *, leased: bool) -> None:
        """Start the supervisor of a VM, and return when the VM's process exists. Raises DriverError."""
        start = [*self._supervised.begin(name, leased=leased), self._path, *words]
        async with self._alone(await self._abilities()):
            completed = await self._calls.run(start, label="run")
        if completed.status:
            # Another status than REFUSED: the start was killed, and it is unknown whether a VM runs.
            if completed.status != supervisor.REFUSED:
                await self._stop_unsupervised(name)
            line = find_complaint(completed.stderr)
            raise DriverError(line or f"the start of the VM's supervisor ended with status {completed.status}")

    async def _has_failed_restore(self, name: str) -> bool:
        """Return whether `tart run` has failed, and left the saved state that it was to restore."""
        record = self._supervised.record(name)
        # A status below 0 is a signal that has ended the process.
        if record.order or record.status is None or record.status <= 0 or self._runs.get(name):
            return False
        with suppress(DriverError):
            return LocalVM(name, "suspended") in await self._list("local", parse_list)
        return False

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if not self._supervised.is_running(name):
            raise NotRunning(f'VM "{name}" is not running, or was not started by a worker with this directory')
        task_status.started()
        await self._wait_ended(name)

    async def _wait_ended(self, name: str) -> None:
        """Wait until a VM's supervisor has ended. Raises DriverError unless the VM shut down or was stopped."""
        record, error = await self._supervised.wait_ended(name)
        if record.order == "lease":
            raise DriverError(LEASE_OVER)
        if record.status is None:
            await self._stop_unsupervised(name)
            raise error
        if record.status and record.order != "stop":
            raise verb_error(self._program, "run", record.status, self._supervised.log(name))

    async def _stop_unsupervised(self, name: str) -> None:
        """Stop a VM whose supervisor was killed, or whose start was, and return when it does not run any more."""
        while True:
            try:
                # tart may not know the VM as running yet.
                self._supervised.kill_unsupervised(name)
                await self.stop(name)
                return
            except (NotRunning, NoSuchVM):
                return
            except DriverError as error:
                _logger.error("cannot stop a VM without supervisor, retrying", extra={"vm": name, "reason": str(error)})
                await trio.sleep(KILL_SECONDS)

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        operand("VM name", name)
        deadline = trio.current_time() + _IP_SECONDS
        # The agent is asked once: in some versions a client that goes away early breaks the agent's socket for others.
        agent = bridged
        while True:
            asked = trio.current_time()
            try:
                return await self._look_up_ip(name, agent=agent, bridged=bridged)
            except NoSuchVM:
                raise
            except DriverError:
                # While a VM starts, tart may fail at once instead of waiting for the address.
                runs = self._supervised.is_running(name) or name in self._runs
                if trio.current_time() >= deadline or not runs:
                    raise
            agent = agent and trio.current_time() - asked < _ARP_SECONDS
            await trio.sleep(_ARP_SECONDS if bridged else _YOUNG_SECONDS)

    async def _look_up_ip(self, name: str, *, agent: bool, bridged: bool) -> str:
        if not bridged:
            return await self._tart_ip(name, "--wait", str(_IP_SECONDS))
        if agent:
            with suppress(DriverError):
                return await self._tart_ip(name, "--resolver", "agent", "--wait", str(_AGENT_SECONDS))
        # The image has no guest agent: use the host's ARP table.
        return await self._tart_ip(name, "--resolver", "arp")

    async def _tart_ip(self, name: str, *words: str) -> str:
        answer = (await self._call("ip", name, *words)).decode("utf-8", "replace").strip()
        try:
            # The zone of an address may be any text. Only a link-local address needs one, and that leads to this host.
            address = ipaddress.ip_address("" if "%" in answer else answer)
        except ValueError as error:
            raise DriverError(
                f'{self._program} ip printed "{presentable(answer)}" for {name}, expected an IP address without a zone'
            ) from error
        # A guest agent may report any address. Connections to an address of this host would end on the host.
        if not self._own_addresses and leads_to_host(address):
            raise DriverError(f"the address of {name} is {address}, expected one that only the VM has")
        return str(address)

    async def connect(self, address: str, port: int) -> trio.SocketStream:
        return await (self._dial or trio.open_tcp_stream)(address, port)

    async def find_port(self, name: str, port: int) -> int:
        # Only the guest knows what listens there.
        await trio.lowlevel.checkpoint()
        return port

    async def stop(self, name: str) -> None:
        # A VM without a supervisor is at rest, or another program has started it.
        if not await self._supervised.order_stop(operand("VM name", name)):
            try:
                await self._call("stop", name, "--timeout", f"{math.ceil(self._stop_seconds)}")
            except (NotRunning, NoSuchVM) as error:
                # Such as one of another TART_HOME.
                if self._supervised.is_running(name):
                    raise DriverError(
                        f"VM {name} runs, but its supervisor's record names no process: {error}"
                    ) from error
                raise
        await self._supervised.wait_order(name, self._stop_seconds + KILL_SECONDS)

    async def suspend(self, name: str) -> None:
        self._refuse_on_vetu("suspending")
        if name in self._runs:
            self._runs[name] = True
        deadline = trio.current_time() + _IP_SECONDS
        while True:
            try:
                await self._call("suspend", operand("VM name", name))
                break
            except NotRunning as error:
                # While a VM starts, tart does not know yet that it runs.
                if not self._supervised.is_running(name):
                    raise
                if trio.current_time() >= deadline:
                    raise DriverError(f"VM {name} runs, but cannot be suspended: {error}") from error
            await trio.sleep(_YOUNG_SECONDS)
        # Saving the memory of a big VM takes minutes.
        await self._supervised.wait_order(name, VERB_SECONDS)

    async def delete(self, name: str) -> None:
        # tart would delete a VM that is being started, and the VM might come up after its deletion.
        if self._supervised.is_running(operand("VM name", name)):
            raise DriverError(f'VM "{name}" is running')
        gone: NoSuchVM | None = None
        try:
            await self._call("delete", name)
        except NoSuchVM as error:
            # tart reports a running VM as absent, too.
            if name in [vm.name for vm in await self._list("local", parse_list)]:
                raise DriverError(f'VM "{name}" cannot be deleted; it may run without supervisor') from error
            # An earlier deletion may have been cancelled before it deleted the files.
            gone = error
        self._supervised.forget(name)
        if gone is not None:
            raise gone

    async def run_script(self, name: str, script: Script, on_line: OnLine) -> None:
        # This host may lack space for temporary files, processes or descriptors.
        with reporting(f"cannot run the {script.kind} script"):
            if script.agent:
                self._refuse_on_vetu("guest agents")
                if not self._supervised.is_running(operand("VM name", name)):
                    raise DriverError(f'VM "{name}" is not running')
                command, environ = [self._path, "exec", "-i", name], self._calls.env
                await run_by_agent(command, environ, partial(self._wait_for_agent, name), script, on_line)
                return
            host = await self.ip(name, bridged=script.bridged)
            await run_over_ssh(SSHServer(host, self._ssh_port, dial=self._dial), script, on_line)

    async def _wait_for_agent(self, name: str) -> None:
        """Wait until the guest agent answers. A guest without an address is given up after a minute, whatever its agent."""
        with suppress(DriverError):
            await self._call("ip", name, "--resolver", "agent", "--wait", str(_IP_SECONDS))

    async def recover(self) -> None:
        with reporting("cannot end the calls of an earlier worker"):
            await self._calls.end_left(self._stop_seconds)
        # Files about VMs that another program has deleted. The files are listed before the VMs, since another worker
        # in this directory writes them after it has made a VM.
        files = self._supervised.list_files()
        self._supervised.forget_others(files, {vm.name for vm in await self.list_vms()})

    def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
        self._supervised.lease(soft, hard, names)

    def note(self, name: str, text: str) -> None:
        self._supervised.note(name, text)

    def noted(self, name: str) -> str:
        return self._supervised.noted(name)

    def _refuse_on_vetu(self, features: str) -> None:
        if self._program == "vetu" and features:
            raise DriverError(f"vetu does not support {features}: such a VM needs a worker with tart")

    # -- calls

    async def _call(
        self, verb: str, *words: str, on_progress: Progress | None = None, seconds: float = VERB_SECONDS
    ) -> bytes:
        """Run a verb that ends by itself, and return its stdout. Raises DriverError, also if it takes too long."""
        on_output = Percentage(on_progress).feed if on_progress is not None else None
        with trio.move_on_after(seconds):
            completed = await self._calls.run([self._path, verb, *words], label=verb, on_output=on_output)
            if completed.status:
                raise verb_error(self._program, verb, completed.status, completed.stderr)
            return completed.stdout
        raise DriverError(f"{self._program} {verb} did not end within {seconds:g} seconds")
