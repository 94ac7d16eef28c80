"""The `tart` command line. Law: processes; the only room that knows tart.

`TartDriver` makes each verb one call of `tart` (or of `vetu`, its Linux sister, which has fewer flags). Pure functions
make the argument list and read the output; `_execute` is the one place where a process lives. It gives the process a
session of its own, so that a Ctrl-C on the worker's terminal does not hit it, reads both of its pipes from start to
end but keeps only their tails, and asks it to end with SIGINT before it kills its group. All verbs but `run` end by
themselves, within VERB_SECONDS unless they transfer an image.

`tart run` stays in the foreground and *is* the VM, so a guard (supervisor.py) has it, and neither this driver nor its end
touch it: `run` and `attach` only look on. What outlives a worker is in files below `home`:

    NAME.run, NAME.log   what NAME's guard writes
    NAME.note            what the worker wants to remember of NAME
    lease                until when VMs may run that could be started elsewhere
    calls/               a file for each call under way, locked as long as that lives, with the number of its process
                         group: `recover` ends those that a killed worker has left

Here too is what a worker asks of its Mac once, at start-up: the machine's id and the leases of the DHCP server.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import logging
import math
import os
import plistlib
import re
import secrets
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.parsers.expat import ExpatError

import trio

from orchard.schema import ARCHIVE, Runtime
from orchard.vm import script as ssh_script
from orchard.vm import supervisor
from orchard.vm.driver import (
    LEASE_OVER,
    DriverError,
    LocalVM,
    NoSuchVM,
    NotRunning,
    Progress,
    RunOptions,
    ScriptFailed,
    SharedDir,
    operand,
)

VERB_SECONDS = 300.0  # for a verb that transfers no image; the longest writes a big VM's memory to the disk
STOP_SECONDS = 30.0  # between asking a guest to shut down and pulling the plug, as for `tart stop`
IP_SECONDS = 60  # a macOS guest asks for its address some seconds after its boot
AGENT_SECONDS = 5  # for a guest agent to answer; images without one never do
DRAIN_SECONDS = 1.0  # for the end of the output once the process ended: its own child may hold the pipe open
OUTPUT_BYTES = 1024 * 1024  # kept of each pipe; `tart list` says some 200 bytes a VM
ABSENT = 2  # exit status of tart when there is no such VM, or it does not run
MACHINE_ID_SECONDS = 10.0  # for ioreg
READ_BYTES = 64 * 1024  # what a pipe holds
MAX_PROGRESS = 4096  # bytes of an unfinished line in which a percentage is looked for
WATCH_SECONDS = 0.25  # between two looks whether a VM runs; each is an open and a flock
LOOK_SECONDS = 0.01  # the same, where somebody waits for it
KILL_SECONDS = 5.0  # for a killed process to be gone
NOT_FOUND, CANNOT_RUN = 127, 126  # exit status of a shell that was to run something
KINDS = ("run", "log", "note", "new")  # of files about a VM
CALLS, LEASE = "calls", "lease"
MAX_LEASE = 3600  # seconds for which macOS may lend an address before it runs out of them

INSTALL: Mapping[Runtime, str] = {
    "tart": "brew install cirruslabs/cli/tart",
    "vetu": "https://github.com/cirruslabs/vetu",
}
DHCP_PLIST = Path("/Library/Preferences/SystemConfiguration/com.apple.InternetSharing.default.plist")
MACHINE_ID = Path("/etc/machine-id")
# A shell writes its number where the next worker can read it, and becomes the program, which keeps the lock's descriptor.
_KNOWN = 'echo "$$" >&0; exec "$@" 3<&0 </dev/null'
# The guard as a program, by the Python at hand and without the user's site-packages; out of a zip archive, too.
_GUARD = (
    "-ISc",
    "import sys; sys.path.insert(0, sys.argv[1]); from orchard.vm import supervisor; sys.exit(supervisor.main(sys.argv[2:]))",
    str(Path(__file__).parent.parent),
)
_PERCENT = re.compile(rb"(\d{1,3})(?:\.\d+)?%")
_PLATFORM_UUID = re.compile(rb'"IOPlatformUUID" = "([0-9A-Fa-f-]{36})"')

_logger = logging.getLogger("orchard.tart")

# ---- arguments and answers -----------------------------------------------------------------------------------------


def find_tart(path: str | None, runtime: Runtime) -> str:
    """Give the path of the `tart` (or `vetu`) program: `path` if given, else the one on PATH. Raises DriverError."""
    if found := shutil.which(path or runtime):
        return str(Path(found).absolute())  # guards work in another directory
    if path:
        raise DriverError(f"{path} is no program that can be run, expected {runtime}; correct --tart")
    raise DriverError(
        f"there is no {runtime} on PATH ({os.environ.get('PATH', '')}):"
        f" install it ({INSTALL[runtime]}), or say where it is with --tart PATH"
    )


def set_arguments(
    name: str,
    *,
    cpu: int = 0,
    memory: int = 0,
    disk_size: int = 0,
    random_mac: bool = False,
    random_serial: bool = False,
) -> list[str]:
    """Give the arguments of `tart set`, or none at all when there is nothing to set."""
    numbers = (("--cpu", cpu), ("--memory", memory), ("--disk-size", disk_size))
    words = [word for flag, number in numbers if number for word in (flag, str(number))]
    words += ["--random-mac"] * random_mac + ["--random-serial"] * random_serial
    return ["set", operand("VM name", name), *words] if words else []


def run_arguments(name: str, options: RunOptions) -> list[str]:
    """Give the arguments of `tart run`. Raises DriverError for what they cannot express."""
    words = ["run"]
    words += ["--no-graphics"] * options.headless
    words += ["--net-softnet"] * bool(options.softnet or options.softnet_allow or options.softnet_block)
    for flag, networks in (
        ("--net-softnet-allow", options.softnet_allow),
        ("--net-softnet-block", options.softnet_block),
    ):
        if networks:
            words += [flag, ",".join(_network(flag, network) for network in networks)]
    if options.bridged:
        words.append(f"--net-bridged={operand('interface to bridge to', options.bridged)}")
    words += ["--nested"] * options.nested
    words += ["--suspendable"] * options.suspendable
    words += [_dir_flag(shared) for shared in options.dirs]
    return [*words, operand("VM name", name)]


def _network(flag: str, network: str) -> str:
    if "," in network:
        raise DriverError(f'{flag} is given "{network}", expected one network, without a comma')
    return operand(f"network of {flag}", network)


def _dir_flag(shared: SharedDir) -> str:
    expressible = ARCHIVE.fullmatch(shared.path) or (shared.path and ":" not in shared.path)
    if not shared.name or ":" in shared.name or not expressible or re.search("[,\0]", shared.name + shared.path):
        raise DriverError(
            f'cannot share the directory "{shared.path}" as "{shared.name}": expected name and path without ":" and ","'
        )
    return f"--dir={shared.name}:{shared.path}" + ":ro" * shared.ro


def missing_in_vetu(options: RunOptions) -> str:
    """Give what of the options vetu does not have, in words ("": nothing)."""
    wanted = {
        "Softnet": options.softnet or options.softnet_allow or options.softnet_block,
        "suspending": options.suspendable,
        "shared directories": options.dirs,
    }
    return ", ".join(what for what, asked in wanted.items() if asked)


def parse_list(output: bytes) -> list[LocalVM]:
    """Read what `tart list --source local --format json` prints. Raises ValueError."""
    listed = json.loads(output)
    if not isinstance(listed, list):
        raise ValueError("not a list")
    vms = []
    for item in listed:
        match item:
            case {"Name": str(name), "State": "running" | "suspended" | "stopped" as state}:
                vms.append(LocalVM(name, state))
            case _:
                raise ValueError(f"not a VM: {ssh_script.presentable(repr(item))}")
    return vms


class Percentage:
    """Finds `N%` in the output of a transfer, and reports each number that differs from the one before."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._last = -1
        self._open = b""

    def feed(self, data: bytes) -> None:
        *lines, rest = re.split(rb"[\r\n]", self._open + data)
        self._open = rest[-MAX_PROGRESS:]
        for line in lines:
            for number in _PERCENT.findall(line):
                percent = min(int(number), 100)
                if percent != self._last:
                    self._last = percent
                    self._report(percent)


def failure(program: str, verb: str, status: int, complaint: bytes) -> DriverError:
    """Make the error for a call that ended with another status than 0, out of the last line of its stderr."""
    line = ssh_script.last_line(complaint) or f"{program} {verb} failed with exit status {status}"
    if "does not exist" in line or (status == ABSENT and verb in ("clone", "delete")):
        return NoSuchVM(line)
    if status == ABSENT and verb in ("stop", "suspend"):
        return NotRunning(line)
    return DriverError(line)


# ---- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended, and the last OUTPUT_BYTES of its output."""

    status: int
    stdout: bytes
    stderr: bytes


async def _execute(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    on_output: Callable[[bytes], None] = lambda _: None,
) -> Ended:
    """Run a program to its end. Cancelled: SIGINT, after STOP_SECONDS SIGKILL to its group, and it is reaped.

    `on_output` sees the bytes of both pipes as they come. Raises DriverError when it cannot be started.
    """
    pipe = subprocess.PIPE
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=stdin, stdout=pipe, stderr=pipe, env=env, start_new_session=True
        )
    except OSError as error:
        raise DriverError(f"cannot run {command[0]}: {error.strerror}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = bytearray(), bytearray()
    # Both pipes are read until the process has ended, cancelled or not: what is told to end may have something to say,
    # and would die of a pipe that nobody reads before it has put its things in order.
    reading = trio.CancelScope(shield=True)

    async def read_both(streams: Sequence[tuple[trio.abc.ReceiveStream, bytearray]]) -> None:
        with reading:
            async with trio.open_nursery() as readers:
                for stream, tail in streams:
                    readers.start_soon(_read, stream, tail, on_output)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_both, [(process.stdout, stdout), (process.stderr, stderr)])
        try:
            await process.wait()
        finally:
            await _end(process)
            reading.deadline = trio.current_time() + DRAIN_SECONDS
    assert process.returncode is not None
    return Ended(process.returncode, bytes(stdout), bytes(stderr))


async def _read(pipe: trio.abc.ReceiveStream, tail: bytearray, on_output: Callable[[bytes], None]) -> None:
    async with pipe:
        while data := await pipe.receive_some(READ_BYTES):
            on_output(bytes(data))
            tail += data
            del tail[:-OUTPUT_BYTES]


async def _end(process: trio.Process) -> None:
    """Have a process end and reap it, if it did not yet; whether or not cancelled."""
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        with trio.move_on_after(STOP_SECONDS, shield=True):
            await process.wait()
    if process.returncode is None:
        await ssh_script.kill_group(process)


class TartDriver:
    """VMs by the `tart` program at `path`, or by `vetu`, with scripts over SSH. Makes no I/O until asked.

    `home` is this driver's directory: one that another worker has written to tells it which VMs run. `env` adds to the
    worker's environment, which tart gets. `stop_seconds`: how long a guest may take to shut down.
    """

    def __init__(
        self,
        path: str,
        home: Path,
        *,
        ssh_port: int = 22,
        vetu: bool = False,
        stop_seconds: float = STOP_SECONDS,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._home = home.absolute()
        self._ssh_port = ssh_port
        self._vetu = vetu
        self._program = "vetu" if vetu else "tart"
        self._stop_seconds = stop_seconds
        self._env = dict(env or {})
        self._look = trio.Event()  # that a VM may have ended

    async def list_vms(self) -> list[LocalVM]:
        output = await self._call("list", "--source", "local", "--format", "json")
        try:
            found = parse_list(output)
        except ValueError as error:
            raise DriverError(f"cannot read what {self._program} list prints: {error}") from error
        # One that was started a moment ago runs, even if tart does not say so yet.
        return [LocalVM(vm.name, "running") if self._guarded(vm.name) else vm for vm in found]

    async def pull(self, image: str, on_progress: Progress) -> None:
        await self._transfer(on_progress, "pull", operand("image", image))

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        await self._transfer(on_progress, "clone", operand("image", source), operand("VM name", name))

    async def fqn(self, image: str) -> str:
        output = await self._call("fqn", operand("image", image))
        return output.decode("utf-8", "replace").strip()

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
        if random_serial:
            self._refuse("random serial numbers")
        words = set_arguments(
            name, cpu=cpu, memory=memory, disk_size=disk_size, random_mac=random_mac, random_serial=random_serial
        )
        if words:
            await self._call(*words)
        else:
            await trio.lowlevel.checkpoint()

    async def run(
        self, name: str, options: RunOptions, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._refuse(missing_in_vetu(options))
        command = [self._path, *run_arguments(name, options)]
        lease = str(self._home / LEASE) if options.leased else ""
        files = [str(self._file(name, "run")), str(self._file(name, "log")), lease]
        start = [sys.executable, *_GUARD, *files, f"{self._stop_seconds:g}", *command]
        ended = await self._execute(start, what="run")
        if ended.status:
            if ended.status != supervisor.REFUSED:  # it was killed, and nobody knows how far it had come
                await self._end_for_certain(name)
            raise DriverError(ssh_script.last_line(ended.stderr) or f"the guard of the VM ended with {ended.status}")
        task_status.started()
        await self._until_ended(name)

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if not self._guarded(name):
            raise NotRunning(f'VM "{name}" is not running, or was not started by a worker with this directory')
        task_status.started()
        await self._until_ended(name)

    async def _until_ended(self, name: str) -> None:
        """Wait until a VM's guard is gone. Raises DriverError when the VM did not simply shut down or was stopped."""
        while (end := self._end_of(name)) is None:
            with trio.move_on_after(WATCH_SECONDS):
                await self._look.wait()
        if end.order == "lease":
            raise DriverError(LEASE_OVER)
        if end.status is None:
            await self._end_for_certain(name)
            raise DriverError("the process that watched over the VM was killed")
        if end.status and end.order != "stop":
            raise failure(self._program, "run", end.status, self._said(name))

    def _end_of(self, name: str) -> supervisor.Record | None:
        """Give what a VM's guard has left; None as long as it lives, or nobody can tell (for want of a descriptor)."""
        with suppress(DriverError):
            if not self._guarded(name):
                return self._record(name)
        return None

    async def _end_for_certain(self, name: str) -> None:
        """Return when a VM does not run any more whose guard was killed, or whoever started that."""
        while True:
            try:
                if not self._guarded(name):
                    _kill_orphan(self._record(name))  # tart may not know of it yet
                await self.stop(name)
                return
            except (NotRunning, NoSuchVM):
                return
            except DriverError as error:
                _logger.error("a VM without a guard could not be stopped", extra={"vm": name, "reason": str(error)})
                await trio.sleep(KILL_SECONDS)

    def _said(self, name: str) -> bytes:
        with suppress(OSError):
            return self._file(name, "log").read_bytes()
        return b""

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        operand("VM name", name)
        deadline = trio.current_time() + IP_SECONDS
        while True:
            try:
                return await self._found_ip(name, bridged=bridged)
            except NoSuchVM:
                raise
            except DriverError:
                # tart may say at once, and not only when it has waited, that a VM has none that is just being started.
                if trio.current_time() >= deadline or not self._guarded(name):
                    raise
            await trio.sleep(WATCH_SECONDS)

    async def _found_ip(self, name: str, *, bridged: bool) -> str:
        if not bridged:
            return await self._ip(name, "--wait", str(IP_SECONDS))
        try:
            return await self._ip(name, "--resolver", "agent", "--wait", str(AGENT_SECONDS))
        except NoSuchVM:
            raise
        except DriverError:  # the image has no agent: ask the host's own table of neighbours
            return await self._ip(name, "--resolver", "arp")

    async def _ip(self, name: str, *words: str) -> str:
        answer = (await self._call("ip", name, *words)).decode("utf-8", "replace").strip()
        try:
            return str(ipaddress.ip_address(answer))
        except ValueError as error:
            said = ssh_script.presentable(answer)
            raise DriverError(f'{self._program} ip answers "{said}" for {name}, expected an address') from error

    async def stop(self, name: str) -> None:
        operand("VM name", name)
        if not self._guarded(name):  # it rests, or somebody else has started it
            await self._call("stop", name, "--timeout", f"{math.ceil(self._stop_seconds)}")
            return
        with trio.move_on_after(KILL_SECONDS):
            while not self._signal_guard(name, signal.SIGTERM):  # noqa: ASYNC110 -- it writes its number down soon
                await trio.sleep(LOOK_SECONDS)
        await self._gone(name, self._stop_seconds + KILL_SECONDS)

    async def suspend(self, name: str) -> None:
        self._refuse("suspending")
        deadline = trio.current_time() + IP_SECONDS
        while True:
            try:
                await self._call("suspend", operand("VM name", name))
                break
            except NotRunning as error:
                if not self._guarded(name):
                    raise
                if trio.current_time() >= deadline:
                    raise DriverError(f"it runs and cannot be suspended: {error}") from error
            await trio.sleep(WATCH_SECONDS)  # it is just being started, and tart does not know it yet
        await self._gone(name, VERB_SECONDS)  # as long as the state may take to be saved

    async def _gone(self, name: str, seconds: float) -> None:
        """Wait until a VM that was told to end has, and let others see it at once. Raises DriverError."""
        if not await _unlocked(self._file(name, "run"), seconds):
            self._signal_guard(name, signal.SIGKILL)
            raise DriverError(f"VM {name} did not end within {seconds:g} seconds, and was killed")
        self._look.set()
        self._look = trio.Event()

    async def delete(self, name: str) -> None:
        # To tart, one that is just being started does not run, and it may come back after its deletion.
        if self._guarded(operand("VM name", name)):
            raise DriverError(f'VM "{name}" is running')
        gone: NoSuchVM | None = None
        try:
            await self._call("delete", name)
        except NoSuchVM as error:  # an earlier call may have been cut off before it cleared up here
            gone = error
        for kind in KINDS:
            self._file(name, kind).unlink(missing_ok=True)
        if gone is not None:
            raise gone

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
        host = await self.ip(name, bridged=bridged)
        try:
            end = await ssh_script.run_script(
                host,
                self._ssh_port,
                username=username,
                password=password,
                script=script,
                env=env,
                on_line=on_line,
            )
        except (ssh_script.SSHError, ValueError) as error:
            raise DriverError(str(error)) from error
        if end.exit_code:
            raise ScriptFailed(end.exit_code, end.last_line)

    async def recover(self) -> None:
        calls = [path for path in self._directory(CALLS).iterdir() if path.is_file()]
        for number, patience in ((signal.SIGINT, self._stop_seconds), (signal.SIGKILL, KILL_SECONDS)):
            await _end_calls(calls, number, patience)
        for path in calls:
            path.unlink(missing_ok=True)
        names = {vm.name for vm in await self.list_vms()}
        for path in self._home.iterdir():  # of VMs that somebody else has deleted
            if path.suffix[1:] in KINDS and path.stem not in names and not self._guarded(path.stem):
                path.unlink(missing_ok=True)

    def lease(self, soft: float, hard: float) -> None:
        try:
            supervisor.write_lease(self._directory() / LEASE, soft, hard)
        except OSError as error:
            raise DriverError(f"cannot write {self._home / LEASE}: {error.strerror}") from error

    def note(self, name: str, text: str) -> None:
        path = self._file(name, "note")
        draft = path.with_suffix(".new")
        try:
            draft.write_text(text)
            draft.rename(path)
        except OSError as error:
            raise DriverError(f"cannot write {path}: {error.strerror}") from error

    def noted(self, name: str) -> str:
        with suppress(OSError):
            return self._file(name, "note").read_text()
        return ""

    def _refuse(self, what: str) -> None:
        if self._vetu and what:
            raise DriverError(f"vetu has no {what}: such a VM needs a worker with tart")

    # -- files

    def _directory(self, *parts: str) -> Path:
        path = self._home.joinpath(*parts)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DriverError(f"cannot make the directory {path}: {error.strerror}") from error
        return path

    def _file(self, name: str, kind: str) -> Path:
        if re.search("[/\0]", name):
            raise DriverError(f'the VM name is "{name}", expected one without a slash')
        return self._directory() / f"{name}.{kind}"

    def _guarded(self, name: str) -> bool:
        path = self._file(name, "run")
        try:
            return supervisor.is_locked(path)
        except OSError as error:
            raise DriverError(f"cannot read {path}: {error.strerror}") from error

    def _record(self, name: str) -> supervisor.Record:
        path = self._file(name, "run")
        try:
            return supervisor.read(path)
        except OSError as error:
            raise DriverError(f"cannot read {path}: {error.strerror}") from error

    def _signal_guard(self, name: str, number: signal.Signals) -> bool:
        """Send a signal to a VM's guard (SIGKILL to the VM, too); False when its number is not known yet."""
        record = self._record(name)
        if not self._guarded(name):
            return True
        if not record.guard:
            return False
        with suppress(ProcessLookupError):  # it lives, so its number is still its own
            os.kill(record.guard, number)
            if number == signal.SIGKILL:
                os.killpg(record.child, number)
        return True

    # -- processes

    def _environ(self) -> dict[str, str]:
        return {**os.environ, "CI": "1", **self._env}  # CI: progress in plain lines

    async def _execute(
        self, command: Sequence[str], *, what: str, on_output: Callable[[bytes], None] = lambda _: None
    ) -> Ended:
        """Run a program to its end, and let the next worker know of it until then. Raises DriverError."""
        path = self._directory(CALLS) / f"{what}-{secrets.token_hex(8)}"
        try:
            with path.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = await _execute(
                    ["/bin/sh", "-c", _KNOWN, command[0], *command],
                    stdin=file.fileno(),
                    env=self._environ(),
                    on_output=on_output,
                )
        except OSError as error:
            raise DriverError(f"cannot write {path}: {error.strerror}") from error
        finally:
            path.unlink(missing_ok=True)
        if ended.status in (CANNOT_RUN, NOT_FOUND):
            raise DriverError(f"cannot run {command[0]}: {ssh_script.last_line(ended.stderr)}")
        return ended

    async def _call(self, verb: str, *words: str) -> bytes:
        """Run a verb that ends soon, and give its stdout. Raises DriverError."""
        with trio.move_on_after(VERB_SECONDS):
            ended = await self._execute([self._path, verb, *words], what=verb)
            if ended.status:
                raise failure(self._program, verb, ended.status, ended.stderr)
            return ended.stdout
        raise DriverError(f"{self._program} {verb} did not end within {VERB_SECONDS:g} seconds")

    async def _transfer(self, on_progress: Progress, verb: str, *words: str) -> None:
        """Run a verb that may take hours: it is for the caller to lose patience. Raises DriverError."""
        percentage = Percentage(on_progress)
        ended = await self._execute([self._path, verb, *words], what=verb, on_output=percentage.feed)
        if ended.status:
            raise failure(self._program, verb, ended.status, ended.stderr)


async def _unlocked(path: Path, seconds: float) -> bool:
    """Wait until no process has a file locked; False when that takes too long."""
    with trio.move_on_after(seconds):
        while supervisor.is_locked(path):  # noqa: ASYNC110 -- nobody tells when a lock ends
            await trio.sleep(LOOK_SECONDS)
        return True
    return False


async def _end_calls(calls: Sequence[Path], number: signal.Signals, seconds: float) -> None:
    """Send a signal to each call under way, as soon as it says who it is, and wait for its end."""
    told: set[Path] = set()
    with trio.move_on_after(seconds):
        while alive := [path for path in calls if supervisor.is_locked(path)]:
            told.update(path for path in alive if path not in told and _signal_group(path, number))
            await trio.sleep(LOOK_SECONDS)


def _signal_group(path: Path, number: signal.Signals) -> bool:
    """Send a signal to the process group whose number is in a file; False when that was not written yet."""
    try:
        os.killpg(int(path.read_bytes()), number)
    except ValueError:
        return False
    except OSError:
        pass  # it has just ended
    return True


def _kill_orphan(record: supervisor.Record) -> None:
    """Kill the VM of a guard that was killed. By its session, its number is told from one that was given away again."""
    with suppress(ProcessLookupError, PermissionError):  # only the dead are left in it (macOS: not permitted)
        if record.child and os.getsid(record.child) == record.guard:
            os.killpg(record.child, signal.SIGKILL)


# ---- the host ------------------------------------------------------------------------------------------------------


def check_dhcp_lease(path: Path = DHCP_PLIST) -> str | None:
    """Say what is wrong with the time for which macOS lends addresses to VMs, or None when nothing is. Reads a file."""
    remedy = (
        f"VMs may run out of addresses; for leases of ten minutes:"
        f" sudo defaults write {path} bootpd -dict DHCPLeaseTimeSecs -int 600"
    )
    try:
        with path.open("rb") as file:
            settings = plistlib.load(file)
    except FileNotFoundError:
        return f"{path} does not exist, so macOS lends each address for a day: {remedy}"
    except (OSError, ValueError, ExpatError) as error:
        return f"cannot read the DHCP lease time from {path} ({error}): {remedy}"
    bootpd = settings.get("bootpd") if isinstance(settings, dict) else None
    seconds = bootpd.get("DHCPLeaseTimeSecs") if isinstance(bootpd, dict) else None
    if type(seconds) is not int:
        return f"{path} has no whole number bootpd.DHCPLeaseTimeSecs, so macOS lends each address for a day: {remedy}"
    if seconds > MAX_LEASE:
        return f"{path} has a DHCP lease time of {seconds} seconds, expected {MAX_LEASE} or less: {remedy}"
    return None


async def machine_id(path: Path = MACHINE_ID) -> str:
    """Give an identity of this machine that lasts: the one of systemd, of the Mac, or of a network card."""
    try:
        if text := path.read_text("ascii", "replace").strip():  # noqa: ASYNC240 -- a local file of one line
            return text
    except OSError:
        pass  # a Mac has none
    with trio.move_on_after(MACHINE_ID_SECONDS):
        try:
            ended = await _execute(["ioreg", "-rd1", "-c", "IOPlatformExpertDevice"])
        except DriverError:
            pass  # no Mac either
        else:
            if found := _PLATFORM_UUID.search(ended.stdout):
                return found[1].decode()
    return f"node-{await trio.to_thread.run_sync(uuid.getnode):012x}"
