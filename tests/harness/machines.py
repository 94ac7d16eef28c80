"""Linux machines for tests that need root, several hosts or systemd: namespaces of this host with a systemd of their own.

A machine sees this host's files, and what it writes to them is thrown away with it. Its network has the other machines of
its group, by name, and nothing else. systemd runs there without the units that set up a real host. Needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from harness.processes import eventually
from harness.programs import ROOT_REASON, need

ROOT = Path(__file__).parent.parent.parent
MACHINE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The Python of the environment of these tests.
BASE_PYTHON = Path(sys.base_prefix, "bin", Path(sys.executable).name)
_DOMAIN = "example.com"
# Its arguments: the name, the directory that the machine shares with this host, and the mounts that it sees.
_BOOT = """
set -e
name=$1 shared=$2
shift 2
mount --make-rprivate /
mount -t tmpfs machine "$shared/$name/disk"
cd "$shared/$name/disk"
for place in "$@"; do
    layer=upper/$(echo "$place" | tr / _)
    mkdir -p "$layer" "work/$layer" root
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$layer,workdir=work/$layer" "root$place"
done
mount --bind "$shared" "root$shared"
cd root
mount -t proc proc proc
# The kernel's settings are this host's, too.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
echo "$name" > etc/hostname
ip link set lo up
rm -rf etc/systemd/system/*.wants lib/systemd/system/*.wants
for unit in sysinit.target basic.target multi-user.target; do
    printf '[Unit]\\nDescription=%s of a test\\nWants=systemd-journald.service\\n' $unit > etc/systemd/system/$unit
done
# This /proc shows the numbers that processes have on this host.
sed -n 's/^PPid:\t//p' /proc/self/status > "$shared/$name/pid"
pivot_root . mnt
umount -l /mnt
exec env -i container=test PATH="$PATH" /lib/systemd/systemd --unit=multi-user.target
"""
# systemd manages a group of processes below that of this process, and nothing else. It is removed with the machine.
_START = """
set -e
groups=$1
shift
mount --make-rprivate /
mount -t cgroup2 cgroup2 "$groups"
group=$groups$(sed -n 's/^0:://p' /proc/self/cgroup)/orchard-test-$$
mkdir -p "$group"
sh -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group" \\
    unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup sh -c "$0" boot "$@" || true
find "$group" -depth -type d -exec rmdir {} +
"""


# Tries the mounts that a machine needs.
_TRY = """
mount -t tmpfs disk /mnt && mkdir /mnt/upper /mnt/work /mnt/root &&
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
"""


def need_machines() -> None:
    """Skip the test where machines cannot be made."""
    need("unshare", "nsenter", "mount", "ip", "systemctl")
    words = ["unshare", "--mount", "--uts", "--ipc", "--net", "--cgroup", "--pid", "--fork", "sh", "-c", _TRY]
    tried = subprocess.run(words, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{ROOT_REASON}: cannot make namespaces with disks of their own: {tried.stderr.strip()}")


@dataclass(frozen=True)
class Machine:
    name: str
    # The number of its systemd on this host.
    pid: int

    def inside(self, *words: str) -> list[str]:
        """Return a command that runs another one in this machine."""
        return ["nsenter", f"--target={self.pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", *words]

    def path(self, path: str | Path) -> Path:
        """Return the path by which this host reaches a file of the machine, which may be missing.

        Links on the way are followed in the machine: a write through one from here would change a file of this host.
        """
        words = self.inside("realpath", "--canonicalize-missing", "--", str(path))
        found = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.removesuffix("\n")
        return Path(f"/proc/{self.pid}/root{found}")

    def run(self, *words: str) -> None:
        done = subprocess.run(self.inside(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{self.name}: {words}: {done.stdout} {done.stderr}"

    def write_program(self, name: str, text: str) -> None:
        """Put a program on the PATH of all users."""
        program = self.path(f"/usr/local/bin/{name}")
        program.write_text(text)
        program.chmod(0o755)

    def install_orchard(self) -> None:
        """Put `orchard` on the PATH, from an environment in /opt that all users and services can read."""
        environment = self.path("/opt/orchard-cluster")
        venv.create(environment, symlinks=True)
        # Not at their own places: services have a /tmp of their own, and no homes.
        for source, target in ((ROOT, "/opt/clone"), (sysconfig.get_path("purelib"), "/opt/packages")):
            self.path(target).mkdir()
            self.run("mount", "--bind", str(source), target)
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
        (site / "orchard.pth").write_text("/opt/clone\n/opt/packages\n")
        self.write_program("orchard", '#!/bin/sh\nexec /opt/orchard-cluster/bin/python -P -m orchard "$@"\n')


@asynccontextmanager
async def machines(
    directory: Path, names: Sequence[str], others: Sequence[str] = ()
) -> AsyncIterator[dict[str, Machine]]:
    """Run machines for the time of the block. They share `directory` with this host.

    Each is known by its name and as NAME.example.com, and each name of `others` stands for all of them.
    """
    async with AsyncExitStack() as stack:
        found = {name: await stack.enter_async_context(_started(directory / name, directory, name)) for name in names}
        _connect([*found.values()])
        addresses = {name: f"10.0.0.{number}" for number, name in enumerate(found, 1)}
        known = [f"{address} {name}.{_DOMAIN} {name}" for name, address in addresses.items()]
        known += [f"{address} {name}" for name in others for address in addresses.values()]
        for machine in found.values():
            machine.path("/etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
            _let_all_users_read(machine, Path(sys.base_prefix))
            machine.write_program("python3", f'#!/bin/sh\nexec "{BASE_PYTHON}" "$@"\n')
            await eventually(partial(_has_booted, machine))
        yield found


@asynccontextmanager
async def _started(home: Path, shared: Path, name: str) -> AsyncIterator[Machine]:
    for path in ("disk", "groups"):
        (home / path).mkdir(parents=True)
    places = sorted({_mount_of(path) for path in (Path("/"), ROOT, Path(sys.prefix), Path(sys.base_prefix))})
    with (home / "log").open("w") as log:
        words = ["unshare", "--mount", "sh", "-c", _START, _BOOT, str(home / "groups"), name, str(shared), *places]
        process = await trio.lowlevel.open_process(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_ended, process)

        def has_number() -> bool:
            assert process.poll() is None, f"{name} does not start: {(home / 'log').read_text()}"
            return (home / "pid").exists() and (home / "pid").read_text().endswith("\n")

        await eventually(has_number)
        machine = Machine(name, int((home / "pid").read_text()))
        # Until it is systemd, its files are those of this host.
        await eventually(lambda: Path(f"/proc/{machine.pid}/comm").read_text() == "systemd\n")
        # Its processes end with it.
        stack.callback(os.kill, machine.pid, signal.SIGKILL)
        yield machine


async def _ended(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        await process.wait()


def _has_booted(machine: Machine) -> bool:
    words = machine.inside("systemctl", "is-active", "--quiet", "multi-user.target")
    return subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _mount_of(path: Path) -> str:
    """Return the place of the mount that a path is on."""
    path = path.resolve()
    return str(next(each for each in (path, *path.parents) if each.is_mount()))


def _connect(found: Sequence[Machine]) -> None:
    """Join machines by a bridge of the first one. Their addresses are 10.0.0.1, 10.0.0.2 and so on."""
    first, *others = found
    first.run("ip", "link", "add", "lan", "type", "bridge")
    for number, machine in enumerate(others, 2):
        port = f"lan{number}"
        # With the network of the first, and the process numbers of this host.
        link = ["ip", "link", "add", port, "type", "veth", "peer", "name", "lan", "netns", str(machine.pid)]
        subprocess.run(["nsenter", f"--target={first.pid}", "--net", *link], check=True)
        first.run("ip", "link", "set", port, "master", "lan", "up")
    for number, machine in enumerate(found, 1):
        machine.run("ip", "address", "add", f"10.0.0.{number}/24", "dev", "lan")
        machine.run("ip", "link", "set", "lan", "up")


def _let_all_users_read(machine: Machine, *paths: Path) -> None:
    """Open the directories of this host's programs, as those of a program that is installed for everybody are."""
    for path in paths:
        for parent in (path, *path.parents):
            machine.path(parent).chmod(0o755)
