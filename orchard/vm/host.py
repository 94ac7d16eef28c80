"""The host of a worker: its id, addresses, system, disk, DHCP server, and where directories that VMs mount lead.

The controller checks the text of a path in `hostDirs`. Only the host knows its symbolic links. `resolve_dirs` follows
them, for the policies' prefixes as well (`/tmp` is a link on macOS), and the VM mounts the resolved path. So a link
that is changed afterwards has no effect. A directory on the resolved path that is replaced by a link between this check
and tart's use of it is not noticed: docs/threats.md says so.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import plistlib
import re
import shutil
import socket
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.parsers.expat import ExpatError

import trio

from orchard.codec import MAX_UINT, shown
from orchard.resources.cluster import WorkerDisk
from orchard.schema import HostDir, HostDirPolicy, is_allowed
from orchard.vm.driver import DriverError
from orchard.vm.processes import run_program

_MACHINE_ID_SECONDS = 10.0  # seconds
# With longer leases macOS runs out of addresses.
_MAX_DHCP_LEASE = 3600  # seconds
_DHCP_PLIST = Path("/Library/Preferences/SystemConfiguration/com.apple.InternetSharing.default.plist")
_MACHINE_ID = Path("/etc/machine-id")
_PLATFORM_UUID = re.compile(rb'"IOPlatformUUID" = "([0-9A-Fa-f-]{36})"')
# The characters at which tart's --dir option splits its value.
_SEPARATORS = ":,"


def leads_to_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether connections to an address may end on this host. Asks the system for the host's own addresses."""
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
        return True
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def check_dhcp_lease(path: Path = _DHCP_PLIST) -> str | None:
    """Return a warning if macOS lends DHCP addresses to VMs for too long, else None. Reads a file."""
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
    if seconds > _MAX_DHCP_LEASE:
        return f"{path} has a DHCP lease time of {seconds} seconds, expected {_MAX_DHCP_LEASE} or less: {remedy}"
    return None


def os_version() -> str:
    """Return the name and the version of this host's system, for example "macOS 26.1"."""
    if version := platform.mac_ver()[0]:
        return f"macOS {version}"
    return f"{platform.system()} {platform.release()}"


async def disk_of(path: Path) -> WorkerDisk | None:
    """Return the size and the free space of the file system that holds a path, which need not exist yet.

    None if that is unknown.
    """
    # The path may lead to a file server that does not answer.
    return await trio.to_thread.run_sync(measure_disk, path, abandon_on_cancel=True)


def measure_disk(path: Path) -> WorkerDisk | None:
    """Do what `disk_of` does, in a thread that may wait."""
    for place in (path, *path.absolute().parents):
        try:
            usage = shutil.disk_usage(place)
        except FileNotFoundError:
            continue
        except OSError:
            break
        # A network file system may report sizes that exceed the API's numbers.
        return WorkerDisk(min(usage.total, MAX_UINT), min(usage.free, MAX_UINT))
    return None


async def machine_id(path: Path = _MACHINE_ID) -> str:
    """Return a permanent id of this machine: from systemd, else from macOS, else from a network card."""
    try:
        if text := path.read_text("ascii", "replace").strip():  # noqa: ASYNC240
            return text
    except OSError:
        # macOS has no such file.
        pass
    with trio.move_on_after(_MACHINE_ID_SECONDS):
        try:
            completed = await run_program(["ioreg", "-rd1", "-c", "IOPlatformExpertDevice"])
        except OSError:
            # The host is not a Mac.
            pass
        else:
            if found := _PLATFORM_UUID.search(completed.stdout):
                return found[1].decode()
    return f"node-{await trio.to_thread.run_sync(uuid.getnode):012x}"


async def resolve_dirs(dirs: Sequence[HostDir], policies: Sequence[HostDirPolicy] | None) -> tuple[HostDir, ...]:
    """Return the directories with the paths to which they lead on this host. Archives (https://) stay as they are.

    `policies` are the cluster's. With None (an older controller does not send them) the paths are mounted as they are.
    Raises DriverError for a path that leads to where no policy allows it.
    """
    if policies is None or not dirs:
        return tuple(dirs)
    # Links may lead to a file server that does not answer.
    return await trio.to_thread.run_sync(_resolve, dirs, policies, abandon_on_cancel=True)


def _resolve(dirs: Sequence[HostDir], policies: Sequence[HostDirPolicy]) -> tuple[HostDir, ...]:
    real = [
        replace(policy, path_prefix=os.path.realpath(policy.path_prefix))
        for policy in policies
        if policy.path_prefix.startswith("/")
    ]
    return tuple(_resolve_one(index, dir_, real) for index, dir_ in enumerate(dirs))


def _resolve_one(index: int, dir_: HostDir, policies: Sequence[HostDirPolicy]) -> HostDir:
    if not dir_.path.startswith("/"):
        return dir_
    path = os.path.realpath(dir_.path)
    wanted = f"hostDirs[{index}].path: {shown(dir_.path)} leads to {shown(path)} on this host"
    if any(separator in path for separator in _SEPARATORS):
        raise DriverError(f'{wanted}, expected a path without ":" and ","')
    resolved = replace(dir_, path=path)
    if not is_allowed(policies, resolved):
        access = "read only" if dir_.ro else "writable"
        raise DriverError(f"{wanted}, where no hostDirPolicy allows it {access}; see the cluster settings")
    return resolved
