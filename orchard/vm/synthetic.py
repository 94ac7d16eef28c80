"""VMs without a hypervisor: the verbs of tart.py on directories and processes. Law: files below `home`, and processes.

`home/NAME/vm.json` says what the VM is, `home/NAME/root` is its disk: the startup script really runs there, in a login
shell of this host, with that directory as HOME. There is no isolation whatever: the script is a process of this user.
127.0.0.1 is every VM's address. Any image can be pulled; a source whose name begins with `orchard-` is a local VM, and
has to exist.

What the script starts is in a session of its own and gets ORCHARD_VM=home/NAME in its environment. It is killed with
its process group when the VM ends. If the worker was killed itself, the file `scripted` is left, and `run` and `delete` look
for processes by that variable: a process number alone could be somebody else's by then.

A VM that runs is known to this object alone: it outlives a worker that is given the same driver again, and lives no longer
than the process. So does the keeping of its lease.

Nothing is synced to the disk: a power failure may cost VMs, as it does for any host. A life without a script takes
about a millisecond of the processor; a thread is only worth it where a script has left files to copy or to remove.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from orchard.schema import NAME
from orchard.vm import script as ssh_script
from orchard.vm import supervisor
from orchard.vm.driver import (
    LEASE_OVER,
    Driver,
    DriverError,
    LocalVM,
    NoSuchVM,
    NotRunning,
    Progress,
    RunOptions,
    ScriptFailed,
    operand,
)

LOCAL = "orchard-"  # how the names of local VMs begin
ADDRESS = "127.0.0.1"
SHELL = next((path for path in ("/bin/bash", "/bin/zsh") if Path(path).exists()), "/bin/sh")  # as login shell
STEPS = 10  # of a pull's progress
KILL_SECONDS = 5.0  # for killed processes to be gone
# Between two lists of processes, in which those that were killed end.
_LEFTOVER_POLL_SECONDS = 0.01
VARIABLE = "ORCHARD_VM"


class _Guest:
    """A VM that runs, and the shells that were started in it."""

    def __init__(self, *, leased: bool) -> None:
        self.leased = leased
        self.order = trio.Event()  # to end
        self.ended = trio.Event()
        self.look = trio.Event()  # that it has ended, or has another lease
        self.shells: list[trio.Process] = []

    def tell(self) -> None:
        self.look.set()
        self.look = trio.Event()


class SyntheticDriver(Driver):
    """VMs as directories below `home`. A boot takes `boot_seconds`, a pull `pull_seconds`, with progress."""

    def __init__(self, home: Path, *, boot_seconds: float = 0.0, pull_seconds: float = 0.0) -> None:
        self._home = home.absolute()  # scripts get it as HOME, from another working directory
        self._boot_seconds = boot_seconds
        self._pull_seconds = pull_seconds
        self._guests: dict[str, _Guest] = {}
        self._lease = math.inf  # until when leased VMs may run, in trio's time

    async def list_vms(self) -> list[LocalVM]:
        await trio.lowlevel.checkpoint()
        if not self._home.exists():
            return []
        names = sorted(path.parent.name for path in self._home.glob("[!.]*/vm.json"))
        return [
            LocalVM(name, "running" if name in self._guests else self._read(name)["state"]) for name in names
        ]  # fmt: skip

    async def pull(self, image: str, on_progress: Progress) -> None:
        operand("image", image)
        for step in range(1, STEPS + 1) if self._pull_seconds else ():
            await trio.sleep(self._pull_seconds / STEPS)
            on_progress(100 * step // STEPS)
        await trio.lowlevel.checkpoint()

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        local = source.startswith(LOCAL)
        about = self._read(source) if local else {"state": "stopped"}
        if local and source in self._guests:
            raise DriverError(f'VM "{source}" is running and cannot be cloned')
        if not local:
            await self.pull(source, on_progress)
        directory = self._directory(name)
        if directory.exists():
            raise DriverError(f'VM "{name}" already exists')
        draft = self._home / f".{name}.new"  # no VM's name begins with a dot
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            if local:
                await trio.to_thread.run_sync(
                    shutil.copytree, self._directory(source) / "root", draft / "root", True
                )  # fmt: skip
            else:
                (draft / "root").mkdir()
            _write(draft, {**about, "source": source})
            draft.rename(directory)
        except OSError as error:
            raise DriverError(f'cannot make VM "{name}" in {self._home}: {error.strerror or error}') from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def fqn(self, image: str) -> str:
        await trio.lowlevel.checkpoint()
        local = image.startswith(LOCAL) or "@" in image
        return image if local else f"{image}@sha256:{hashlib.sha256(image.encode()).hexdigest()}"

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
        await trio.lowlevel.checkpoint()
        about = self._read(name)
        if name in self._guests or about["state"] != "stopped":
            raise DriverError(f'VM "{name}" is not stopped, and can only be changed then')
        if disk_size and disk_size < about.get("disk", 0):
            raise DriverError(f'the disk of VM "{name}" has {about["disk"]} GB and cannot shrink to {disk_size}')
        wanted = {"cpu": cpu, "memory": memory, "disk": disk_size}
        _write(self._directory(name), {**about, **{key: value for key, value in wanted.items() if value}})

    async def run(
        self, name: str, options: RunOptions, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        about = self._read(name)
        if name in self._guests:
            raise DriverError(f'VM "{name}" is already running')
        if options.leased and trio.current_time() >= self._lease:
            raise DriverError(supervisor.EXPIRED)
        if about["state"] != "stopped":
            _write(self._directory(name), {**about, "state": "stopped"})
        if (self._directory(name) / "scripted").exists():
            await trio.to_thread.run_sync(_kill_leftovers, self._directory(name))
        guest = self._guests[name] = _Guest(leased=options.leased)
        with trio.move_on_after(self._boot_seconds if about["state"] == "stopped" else 0):
            await guest.order.wait()
        task_status.started()
        await self._until_ended(name, guest)

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._read(name)
        guest = self._guests.get(name)
        if guest is None:
            raise NotRunning(f'VM "{name}" is not running')
        task_status.started()
        await self._until_ended(name, guest)

    async def _until_ended(self, name: str, guest: _Guest) -> None:
        """Wait until a guest has ended, and end it when its lease does."""
        while not guest.ended.is_set():
            with trio.move_on_at(self._lease if guest.leased else math.inf):
                await guest.look.wait()
            if guest.leased and trio.current_time() >= self._lease and not guest.ended.is_set():
                await self._end(name, guest)
                raise DriverError(LEASE_OVER)

    async def _end(self, name: str, guest: _Guest) -> None:
        """End a guest with all that was started in it; whether or not cancelled."""
        if guest.order.is_set():
            await guest.ended.wait()
            return
        guest.order.set()
        await _kill(guest.shells)
        with suppress(OSError):  # a script may have done anything to it; `delete` looks closer then
            (self._directory(name) / "scripted").unlink(missing_ok=True)
        del self._guests[name]
        guest.ended.set()
        guest.tell()

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        await trio.lowlevel.checkpoint()
        self._read(name)
        if name not in self._guests:
            raise DriverError("no IP address found, is your VM running?")
        return ADDRESS

    async def stop(self, name: str) -> None:
        about = self._read(name)
        if guest := self._guests.get(name):
            await self._end(name, guest)
        elif about["state"] == "suspended":
            _write(self._directory(name), {**about, "state": "stopped"})
        else:
            raise NotRunning(f'VM "{name}" is not running')
        await trio.lowlevel.checkpoint()

    async def suspend(self, name: str) -> None:
        about = self._read(name)
        guest = self._guests.get(name)
        if guest is None:
            raise NotRunning(f'VM "{name}" is not running')
        _write(self._directory(name), {**about, "state": "suspended"})
        await self._end(name, guest)
        await trio.lowlevel.checkpoint()

    async def delete(self, name: str) -> None:
        self._read(name)
        if name in self._guests:
            raise DriverError(f'VM "{name}" is running and cannot be deleted')
        directory = self._directory(name)
        if (directory / "scripted").exists():
            await trio.to_thread.run_sync(_kill_leftovers, directory)
        # From here on there is no such VM, even if what is left of it takes long to remove.
        grave = self._home / f".{name}.old"
        try:
            if grave.exists():  # a worker was killed while it removed a VM of that name
                await trio.to_thread.run_sync(_remove, grave)
            directory.rename(grave)
        except OSError as error:
            raise DriverError(f'cannot delete VM "{name}" in {self._home}: {error.strerror}') from error
        if _is_empty(grave / "root"):
            _remove(grave)
            await trio.lowlevel.checkpoint()
        else:
            with trio.CancelScope(shield=True):  # it takes as long as a disk does, and nobody would come back to it
                await trio.to_thread.run_sync(_remove, grave)

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
        self._read(name)
        guest = self._guests.get(name)
        if guest is None:
            raise NotRunning(f'VM "{name}" is not running')
        directory = self._directory(name)
        marker = secrets.token_hex(16)
        try:
            text = ssh_script.script_text(script, env, marker).encode()
        except ValueError as error:
            raise DriverError(str(error)) from error
        shell = await _start_shell(directory, username)
        if guest.order.is_set():  # it has not waited for this one
            await _kill([shell])
        else:
            guest.shells.append(shell)  # reaped when the VM ends: until then its number is its process group's
        assert shell.stdin is not None
        assert shell.stdout is not None
        async with shell.stdin, shell.stdout:
            transcript = await ssh_script.converse(shell.stdin, shell.stdout, marker, text, on_line, trio.CancelScope())
        if transcript.exit_code is None:
            raise DriverError("the VM ended while its startup script ran")
        if transcript.exit_code != 0:
            raise ScriptFailed(transcript.exit_code, transcript.last_line)

    async def recover(self) -> None:
        # What a script left is found by `run` and `delete`; here is what a killed worker was just making or removing.
        if self._home.exists():
            for left in [*self._home.glob(".*.new"), *self._home.glob(".*.old")]:
                await trio.to_thread.run_sync(_remove, left)
        await trio.lowlevel.checkpoint()

    def lease(self, soft: float, hard: float) -> None:
        now = trio.current_time()
        self._lease = now + soft - supervisor.clock()
        for guest in self._guests.values():
            guest.tell()

    def note(self, name: str, text: str) -> None:
        path = self._directory(name) / "note"
        try:
            path.write_text(text)
        except OSError as error:
            raise DriverError(f"cannot write {path}: {error.strerror}") from error

    def noted(self, name: str) -> str:
        try:
            return (self._directory(name) / "note").read_text()
        except OSError:
            return ""

    # -- directories

    def _directory(self, name: str) -> Path:
        if not NAME.fullmatch(name) or name.startswith((".", "-")):
            raise DriverError(f'the VM name is "{name}", expected letters, digits and : _ . - without . or - in front')
        return self._home / name

    def _read(self, name: str) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads((self._directory(name) / "vm.json").read_text())
        except FileNotFoundError:
            raise NoSuchVM(f'the specified VM "{name}" does not exist') from None
        except (OSError, ValueError) as error:
            raise DriverError(f'cannot read the file of VM "{name}" in {self._home}: {error}') from error
        return about


def _write(directory: Path, about: Mapping[str, Any]) -> None:
    draft = directory / "vm.json.new"
    try:
        draft.write_text(json.dumps(about, indent=2) + "\n")
        draft.rename(directory / "vm.json")
    except OSError as error:
        raise DriverError(f"cannot write {directory / 'vm.json'}: {error.strerror}") from error


def _is_empty(directory: Path) -> bool:
    try:
        return not any(directory.iterdir())
    except OSError:
        return False  # a script has removed it, or taken itself the right to read it


def _remove(directory: Path) -> None:
    """Remove a directory, even if a script has taken itself the right to."""
    for parent, names, _ in os.walk(directory):  # from the top: each is opened before it is looked into
        for path in (Path(parent) / name for name in names):
            if not path.is_symlink():
                with suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


# ---- processes -----------------------------------------------------------------------------------------------------


async def _start_shell(directory: Path, username: str) -> trio.Process:
    root = directory / "root"
    temporary = root / "tmp"
    environ = {
        "HOME": str(root),
        "LOGNAME": username,
        VARIABLE: str(directory),
        "PATH": os.environ.get("PATH", os.defpath),
        "SHELL": SHELL,
        "TMPDIR": str(temporary),
        "USER": username,
    }
    pipe = subprocess.PIPE
    try:
        (directory / "scripted").touch()
        temporary.mkdir(exist_ok=True)
        return await trio.lowlevel.open_process(
            [SHELL, "-l"], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=root, env=environ,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise DriverError(f"cannot run {SHELL} in {root}: {error.strerror}") from error


async def _kill(shells: list[trio.Process]) -> None:
    """Kill shells with their process groups, and reap them; whether or not cancelled."""
    for shell in shells:
        with suppress(ProcessLookupError, PermissionError):  # only the dead are left in it (macOS: not permitted)
            os.killpg(shell.pid, signal.SIGKILL)
    with trio.move_on_after(KILL_SECONDS, shield=True):
        for shell in shells:
            await shell.wait()


def _kill_leftovers(directory: Path) -> None:
    """Kill the processes of a VM that a killed worker has left, and wait until they have ended.

    A process may start another one while the list of processes is read. So the list is read again until it is empty.
    """
    until = time.monotonic() + KILL_SECONDS
    while (found := list(_processes_of(directory))) and time.monotonic() < until:
        for number in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(_LEFTOVER_POLL_SECONDS)


def _processes_of(directory: Path) -> Iterator[int]:
    """Find processes by the variable in their environment."""
    wanted = f"{VARIABLE}={directory}"
    proc = Path("/proc")
    if (proc / "self" / "environ").exists():
        for path in proc.glob("[0-9]*/environ"):
            with suppress(OSError):
                if wanted.encode() in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)
        return
    listed = subprocess.run(
        ["/bin/ps", "-axEww", "-o", "pid=,command="], capture_output=True, text=True, errors="replace", check=False
    )  # fmt: skip
    for line in listed.stdout.splitlines():
        number, _, words = line.strip().partition(" ")
        if f" {wanted} " in f" {words} ":
            yield int(number)
