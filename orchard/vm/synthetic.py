"""VMs without a hypervisor, for demonstrations and tests: directories and processes behind the interface of driver.py.

`home/NAME/vm.json` describes the VM, and `home/NAME/root` is its disk. The startup script really runs, in a login shell
of this host with that directory as HOME. There is no isolation: the script is a process of the worker's user.

Any image can be pulled, and its name may say how it behaves (IMAGE_HELP), so that a client can try out what takes long
or fails. A pulled image stays in the cache, its digest is the hash of its name, and the next clone of it pulls nothing.
Images that were not used for the longest time are pruned when the disk is full. A source whose name begins with
`orchard-` is a local VM and has to exist.

The address of every VM is 127.0.0.1. A port of a VM is one on which a process of that VM listens. For programs that
play a VM's server themselves, it may also be this process, the one that started it, or a child that belongs to no VM.
`ssh_port` may lead port 22 elsewhere.

The shell of a script has a session of its own and ORCHARD_VM=home/NAME in its environment. It is killed with its
process group when the VM ends. A killed worker leaves the file `home/NAME/scripted`; then `run` and `delete` find
processes by that variable, since the process number alone could belong to another process by now.

Which VMs run, and which images are cached, is known to the driver object alone. They outlive a worker if the next one
gets the same object, and end with the process. The same holds for the lease.

Nothing is synced to the disk: a power failure may lose VMs, as on any host. Creating and deleting a VM without a script
takes about a millisecond of CPU. A thread is used only where a script may have left many files to copy or to delete.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from orchard import __version__
from orchard.base.files import make_private, write_private
from orchard.base.nursery import Wakeup
from orchard.codec import load_json
from orchard.resources.cluster import CachedImage, WorkerDisk
from orchard.schema import LOCAL_PREFIX, NAME, VMSpec
from orchard.vm import supervisor
from orchard.vm.driver import (
    LEASE_OVER,
    Driver,
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
from orchard.vm.local_processes import VM_VARIABLE, kill_leftovers, listens
from orchard.vm.processes import kill, reporting, signal_group
from orchard.vm.script import WrappedScript, converse, login_command

IMAGE_HELP = """\
Words in the name of an image say how the image behaves with synthetic VMs, for example example.com/pull-5s/boot-fails:1:
  pull-Ns     a pull takes N seconds, with progress (0.5 is a number, too)
  pull-fails  a pull fails, after these seconds
  boot-Ns     a boot takes N seconds
  boot-fails  a boot fails, after these seconds
  size-Ngb    the image takes N GB of the disk, by default 1
  no-agent    the guest agent never answers
"""
VM_ADDRESS = "127.0.0.1"
_SHELL = next((path for path in ("/bin/bash", "/bin/zsh") if Path(path).exists()), "/bin/sh")
_GIGABYTE = 10**9
# How often a pull reports its progress.
_PULL_STEPS = 10
_SSH_PORT = 22


class _Guest:
    """A running VM, and the shells that were started in it.

    `lease` is the time on trio's clock at which its lease expires. `ending` is set when the VM begins to end, `ended`
    when nothing of it runs, `changed` at its end and when the lease is renewed.
    """

    def __init__(self, lease: float) -> None:
        self.lease = lease
        # Whether programs were started by `enter`, which only their environment shows.
        self.entered = False
        self.ending = trio.Event()
        self.ended = trio.Event()
        self.changed = Wakeup()
        self.shells: list[trio.Process] = []


class SyntheticDriver(Driver):
    """VMs as directories below `home`.

    A boot takes `boot_seconds` and a pull `pull_seconds`, with progress, unless the image's name says otherwise.
    `images` are in the cache from the beginning. The disk has `disk_bytes`, of which images take their sizes, and
    everything else takes `used_bytes`; both may be changed at any time.
    """

    def __init__(
        self, home: Path, *, boot_seconds: float = 0.0, pull_seconds: float = 0.0, images: Iterable[str] = ()
    ) -> None:
        # Absolute, because scripts get a path below it as HOME and have another working directory.
        self._home = home.absolute()
        self._boot_seconds = boot_seconds
        self._pull_seconds = pull_seconds
        self.disk_bytes, self.used_bytes = 500 * _GIGABYTE, 0
        # In the order of their last use.
        self._images: dict[str, CachedImage] = {}
        for image in images:
            self._use(image)
        self._guests: dict[str, _Guest] = {}
        # The expiry of the lease of VMs that will be run, on trio's clock.
        self._lease = math.inf
        # Returns the port of an SSH server for a VM; None where there is none.
        self.ssh_port: Callable[[str], Awaitable[int]] | None = None

    async def list_images(self) -> list[CachedImage]:
        await trio.lowlevel.checkpoint()
        return list(self._images.values())

    async def disk(self) -> WorkerDisk:
        await trio.lowlevel.checkpoint()
        return WorkerDisk(self.disk_bytes, max(0, self._free_bytes()))

    async def version(self) -> str:
        await trio.lowlevel.checkpoint()
        return __version__

    def _free_bytes(self) -> int:
        return self.disk_bytes - self.used_bytes - sum(image.size_bytes for image in self._images.values())

    def _use(self, image: str) -> None:
        """Record that an image is in the cache and was used now."""
        size = _number(image, "size", "gb")
        used = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        cached = CachedImage(image, _digest(image), round(_GIGABYTE * (1 if size is None else size)), used)
        self._images.pop(image, None)
        self._images[image] = cached

    async def list_vms(self) -> list[LocalVM]:
        await trio.lowlevel.checkpoint()
        if not self._home.exists():
            return []
        names = sorted(path.parent.name for path in self._home.glob("[!.]*/vm.json"))
        return [LocalVM(name, "running" if name in self._guests else self._read(name)["state"]) for name in names]

    async def pull(self, image: str, on_progress: Progress) -> None:
        operand("image", image)
        seconds = _number(image, "pull", "s")
        if seconds is None:
            seconds = 0.0 if image in self._images else self._pull_seconds
        for step in range(1, _PULL_STEPS + 1) if seconds else ():
            await trio.sleep(seconds / _PULL_STEPS)
            on_progress(100 * step // _PULL_STEPS)
        await trio.lowlevel.checkpoint()
        if _says(image, "pull-fails"):
            raise DriverError(f"{image} cannot be pulled: its name says so")
        self._use(image)
        while self._free_bytes() < 0 and len(self._images) > 1:
            del self._images[next(iter(self._images))]

    async def clone(self, source: str, name: str, on_progress: Progress) -> None:
        local = source.startswith(LOCAL_PREFIX)
        about = self._read(source) if local else {"state": "stopped"}
        if local and source in self._guests:
            raise DriverError(f'VM "{source}" is running and cannot be cloned')
        if source in self._images:
            self._use(source)
        elif not local:
            await self.pull(source, on_progress)
        directory = self._directory(name)
        if directory.exists():
            raise DriverError(f'VM "{name}" already exists')
        # The name of a VM does not begin with a dot.
        draft = self._home / f".{name}.new"
        try:
            with reporting(f'cannot make VM "{name}" in {self._home}'):
                _remove(draft)
                make_private(draft)
                if local:
                    root = self._directory(source) / "root"
                    await trio.to_thread.run_sync(partial(shutil.copytree, root, draft / "root", symlinks=True))
                else:
                    (draft / "root").mkdir()
                _write(draft, {**about, "source": source})
                draft.rename(directory)
        finally:
            _remove(draft)
        await trio.lowlevel.checkpoint_if_cancelled()

    async def fqn(self, image: str) -> str:
        await trio.lowlevel.checkpoint()
        local = image.startswith(LOCAL_PREFIX) or "@" in image
        return image if local else f"{image}@{_digest(image)}"

    async def configure(
        self, name: str, hardware: Hardware, *, random_mac: bool = False, random_serial: bool = False
    ) -> None:
        await trio.lowlevel.checkpoint()
        about = self._read(name)
        if name in self._guests or about["state"] != "stopped":
            raise DriverError(f'VM "{name}" is not stopped; stop it before changing its hardware')
        if 0 < hardware.disk_size < about.get("disk", 0):
            raise DriverError(
                f'disk size of VM "{name}" is {hardware.disk_size} GB, expected at least its present {about["disk"]} GB'
            )
        wanted = {"cpu": hardware.cpu, "memory": hardware.memory, "disk": hardware.disk_size}
        _write(self._directory(name), {**about, **{key: value for key, value in wanted.items() if value}})

    async def run(
        self, name: str, spec: VMSpec, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        about = self._read(name)
        if name in self._guests:
            raise DriverError(f'VM "{name}" is already running')
        if spec.leased and trio.current_time() >= self._lease:
            raise DriverError(supervisor.EXPIRED)
        if about["state"] != "stopped":
            _write(self._directory(name), {**about, "state": "stopped"})
        if (self._directory(name) / "scripted").exists():
            await trio.to_thread.run_sync(kill_leftovers, self._directory(name))
        guest = self._guests[name] = _Guest(self._lease if spec.leased else math.inf)
        seconds = _number(about["source"], "boot", "s")
        seconds = self._boot_seconds if seconds is None else seconds
        with trio.move_on_after(seconds if about["state"] == "stopped" else 0):
            await guest.ending.wait()
        if _says(about["source"], "boot-fails"):
            await self._end(name, guest)
            raise DriverError(f"{name} does not boot: the name of its image says so")
        task_status.started()
        await self._wait_ended(name, guest)

    async def attach(self, name: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        guest = self._running(name)
        task_status.started()
        await self._wait_ended(name, guest)

    def _running(self, name: str) -> _Guest:
        """Return the guest of a running VM. Raises NoSuchVM, NotRunning."""
        self._read(name)
        if name not in self._guests:
            raise NotRunning(f'VM "{name}" is not running')
        return self._guests[name]

    async def _wait_ended(self, name: str, guest: _Guest) -> None:
        """Wait until a guest has ended; end it when the lease expires, and raise DriverError."""
        while not guest.ended.is_set():
            with trio.move_on_at(guest.lease):
                await guest.changed.wait()
            if trio.current_time() >= guest.lease and not guest.ended.is_set():
                await self._end(name, guest)
                raise DriverError(LEASE_OVER)

    async def _end(self, name: str, guest: _Guest) -> None:
        """End a guest with everything that was started in it. Completes even when cancelled."""
        if guest.ending.is_set():
            await guest.ended.wait()
            return
        guest.ending.set()
        # First all groups, since `kill` spares the group of a shell that has ended, with what it left in the background.
        for shell in guest.shells:
            signal_group(shell.pid)
        await kill(*guest.shells)
        if guest.entered:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(kill_leftovers, self._directory(name))
        # A script may have deleted or protected this file. While the file exists, `delete` looks for processes.
        with suppress(OSError):
            (self._directory(name) / "scripted").unlink(missing_ok=True)
        del self._guests[name]
        guest.ended.set()
        guest.changed.set()

    async def ip(self, name: str, *, bridged: bool = False) -> str:
        await trio.lowlevel.checkpoint()
        self._read(name)
        if name not in self._guests:
            raise DriverError("no IP address found, is your VM running?")
        return VM_ADDRESS

    async def connect(self, address: str, port: int) -> trio.SocketStream:
        return await trio.open_tcp_stream(address, port)

    async def find_port(self, name: str, port: int) -> int:
        self._running(name)
        if port == _SSH_PORT and self.ssh_port is not None:
            return await self.ssh_port(name)
        if await trio.to_thread.run_sync(listens, self._directory(name), port):
            return port
        raise DriverError(f"cannot connect to port {port} of the VM: connection refused, nothing in it listens there")

    def enter(self, name: str, username: str) -> tuple[Path, dict[str, str]]:
        """Return working directory and environment for a program that is to run in a running VM.

        Programs with this environment are killed when the VM ends. Raises NoSuchVM, NotRunning, DriverError.
        """
        self._running(name).entered = True
        return _enter(self._directory(name), username)

    async def stop(self, name: str) -> None:
        about = self._read(name)
        if name not in self._guests and about["state"] == "suspended":
            _write(self._directory(name), {**about, "state": "stopped"})
        else:
            await self._end(name, self._running(name))
        await trio.lowlevel.checkpoint()

    async def suspend(self, name: str) -> None:
        guest = self._running(name)
        _write(self._directory(name), {**self._read(name), "state": "suspended"})
        await self._end(name, guest)
        await trio.lowlevel.checkpoint()

    async def delete(self, name: str) -> None:
        self._read(name)
        if name in self._guests:
            raise DriverError(f'VM "{name}" is running and cannot be deleted')
        directory = self._directory(name)
        if (directory / "scripted").exists():
            await trio.to_thread.run_sync(kill_leftovers, directory)
        # After the rename the VM does not exist any more, even if removing its files takes long.
        deleted = self._home / f".{name}.old"
        with reporting(f'cannot delete VM "{name}" in {self._home}'):
            # A worker was killed while it deleted a VM of that name.
            if deleted.exists():
                await trio.to_thread.run_sync(_remove, deleted)
            directory.rename(deleted)
        if _is_empty(deleted / "root"):
            _remove(deleted)
            await trio.lowlevel.checkpoint()
        else:
            # Shielded, because only the next worker's `recover` would complete it. It takes as long as the disk needs.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove, deleted)

    async def run_script(self, name: str, script: Script, on_line: OnLine) -> None:
        guest = self._running(name)
        if script.agent and _says(self._read(name)["source"], "no-agent"):
            await guest.ending.wait()
            raise DriverError(f"the VM ended before its guest agent could run the {script.kind} script")
        wrapped = WrappedScript.wrap(script)
        shell = await _start_shell(self._directory(name), script.username, wrapped.marker)
        if guest.ending.is_set():
            # The VM ended while the shell was started, so `_end` did not see it.
            await kill(shell)
        else:
            # Not reaped before the VM ends: until then its number is the number of its process group.
            guest.shells.append(shell)
        assert shell.stdio is not None
        async with shell.stdio:
            transcript = await converse(shell.stdio, wrapped, on_line)
        if transcript.exit_code is None:
            raise DriverError(f"the VM ended while its {script.kind} script ran")
        wrapped.check_end(transcript)

    async def recover(self) -> None:
        # What a killed worker was making or deleting. Processes that a script left are found by `run` and `delete`.
        if self._home.exists():
            for left in [*self._home.glob(".*.new"), *self._home.glob(".*.old")]:
                await trio.to_thread.run_sync(_remove, left)
        await trio.lowlevel.checkpoint()

    def lease(self, soft: float, hard: float, names: Collection[str]) -> None:
        now = trio.current_time()
        self._lease = now + soft - supervisor.clock()
        for guest in [self._guests[name] for name in names if name in self._guests]:
            # An expired lease is not renewed, because its guest is being ended. inf: the guest has no lease.
            if now < guest.lease < math.inf:
                guest.lease = self._lease
                guest.changed.set()

    def note(self, name: str, text: str) -> None:
        path = self._directory(name) / "note"
        with reporting(f"cannot write {path}"):
            write_private(path, text.encode(), durable=False)

    def noted(self, name: str) -> str:
        with suppress(OSError):
            return (self._directory(name) / "note").read_text()
        return ""

    # -- directories

    def _directory(self, name: str) -> Path:
        if not NAME.fullmatch(name) or name.startswith((".", "-")):
            raise DriverError(
                f'the VM name is "{name}", expected letters, digits and : _ . - without . or - at its beginning'
            )
        return self._home / name

    def _read(self, name: str) -> dict[str, Any]:
        try:
            about: dict[str, Any] = load_json((self._directory(name) / "vm.json").read_bytes())
        except FileNotFoundError:
            raise NoSuchVM(f'the specified VM "{name}" does not exist') from None
        except (OSError, ValueError) as error:
            raise DriverError(f'cannot read the file of VM "{name}" in {self._home}: {error}') from error
        return about


def _digest(image: str) -> str:
    return f"sha256:{hashlib.sha256(image.encode()).hexdigest()}"


def _number(image: str, word: str, unit: str) -> float | None:
    """Return N of the word WORD-Nunit in the name of an image."""
    found = re.search(rf"(?<![A-Za-z0-9]){word}-(\d{{1,6}}(?:\.\d{{1,6}})?){unit}(?![A-Za-z0-9])", image)
    return None if found is None else float(found[1])


def _says(image: str, word: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", image) is not None


def _write(directory: Path, about: Mapping[str, Any]) -> None:
    path = directory / "vm.json"
    with reporting(f"cannot write {path}"):
        write_private(path, f"{json.dumps(about, indent=2)}\n".encode(), durable=False)


def _is_empty(directory: Path) -> bool:
    try:
        return not any(directory.iterdir())
    except OSError:
        # A script has deleted the directory, or made it unreadable.
        return False


def _remove(directory: Path) -> None:
    """Delete a directory, even if a script has made parts of it inaccessible."""
    # From the top, so that each directory is accessible before os.walk reads it.
    for parent, names, _ in os.walk(directory):
        for path in (Path(parent) / name for name in names):
            if not path.is_symlink():
                with suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def _enter(directory: Path, username: str) -> tuple[Path, dict[str, str]]:
    """Prepare a VM for a program; return its working directory and environment. Raises DriverError."""
    root = directory / "root"
    temporary = root / "tmp"
    with reporting(f"cannot start a program in {root}"):
        (directory / "scripted").touch()
        temporary.mkdir(exist_ok=True)
    return root, {
        "HOME": str(root),
        "LOGNAME": username,
        VM_VARIABLE: str(directory),
        "PATH": os.environ.get("PATH", os.defpath),
        "SHELL": _SHELL,
        "TMPDIR": str(temporary),
        "USER": username,
    }


async def _start_shell(directory: Path, username: str, marker: str) -> trio.Process:
    root, environ = _enter(directory, username)
    pipe = subprocess.PIPE
    with reporting(f"cannot run {_SHELL} in {root}"):
        return await trio.lowlevel.open_process(
            ["/bin/sh", "-c", login_command(marker)], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=root,
            env=environ, start_new_session=True,
        )  # fmt: skip
