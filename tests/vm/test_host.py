"""A worker's host: where directories that VMs mount lead, its addresses, its DHCP server, its id."""

from __future__ import annotations

import ipaddress
import plistlib
import socket
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchard.client import VMFailed
from orchard.codec import MAX_UINT
from orchard.resources.cluster import WorkerDisk
from orchard.schema import HostDir, HostDirPolicy
from orchard.testing import cluster
from orchard.vm.driver import DriverError
from orchard.vm.host import check_dhcp_lease, disk_of, leads_to_host, machine_id, resolve_dirs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a directory with `allowed/src` and `secret`, and links in `allowed`."""
    for name in ("allowed/src", "allowed-too", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a:b").mkdir()
    links = {"inside": "src", "outside": "../secret", "beside": "../allowed-too", "colon": "../a:b"}
    for name, target in links.items():
        (tmp_path / "allowed" / name).symlink_to(target)
    (tmp_path / "alias").symlink_to("allowed")
    return tmp_path


def policies(tree: Path, *, ro: bool = False) -> list[HostDirPolicy]:
    return [HostDirPolicy(str(tree / "allowed"), ro), HostDirPolicy("https://archives.example", True)]


@pytest.mark.parametrize(
    ("path", "leads_to"),
    [
        ("allowed/src", "allowed/src"),
        ("allowed/inside", "allowed/src"),
        ("allowed/inside/new", "allowed/src/new"),
        ("alias/src", "allowed/src"),
    ],
)
async def test_path_is_replaced_by_where_it_leads(tree: Path, path: str, leads_to: str) -> None:
    dirs = [HostDir("d", str(tree / path)), HostDir("a", "https://archives.example/x.tar", ro=True)]
    assert await resolve_dirs(dirs, policies(tree)) == (HostDir("d", str(tree / leads_to)), dirs[1])


@pytest.mark.parametrize(
    "path", ["allowed/outside", "allowed/outside/etc", "allowed/beside", "allowed/colon", "secret", "a:b"]
)
async def test_path_that_leads_out_of_the_policies_is_refused(tree: Path, path: str) -> None:
    with pytest.raises(DriverError) as refusal:
        await resolve_dirs([HostDir("ok", str(tree / "allowed")), HostDir("d", str(tree / path))], policies(tree))
    assert "hostDirs[1].path" in str(refusal.value)


async def test_prefix_of_a_policy_may_be_a_link(tree: Path) -> None:
    alias = [HostDirPolicy(str(tree / "alias"), False)]
    assert await resolve_dirs([HostDir("d", str(tree / "alias/src"))], alias)
    with pytest.raises(DriverError):
        await resolve_dirs([HostDir("d", str(tree / "alias/outside"))], alias)


async def test_read_only_policy_allows_no_writable_mount(tree: Path) -> None:
    path = str(tree / "allowed/inside")
    assert await resolve_dirs([HostDir("d", path, ro=True)], policies(tree, ro=True))
    with pytest.raises(DriverError):
        await resolve_dirs([HostDir("d", path)], policies(tree, ro=True))


async def test_paths_stay_where_the_controller_tells_no_policies(tree: Path) -> None:
    dirs = (HostDir("d", str(tree / "allowed/outside")),)
    assert await resolve_dirs(dirs, None) == dirs
    with pytest.raises(DriverError):
        await resolve_dirs(dirs, [])


async def test_vm_whose_host_dir_leads_out_of_the_policies_fails(tree: Path) -> None:
    async with cluster(workers=1) as c:
        await c.client.cluster_settings.put({"hostDirPolicies": [{"pathPrefix": str(tree / "allowed")}]})
        for name, link in (("inside", "inside"), ("outside", "outside")):
            host_dirs = [HostDir("d", str(tree / "allowed" / link))]
            await c.client.vms.create(name=name, image="any", host_dirs=host_dirs)
        await c.client.vms.wait("inside")
        with pytest.raises(VMFailed) as failure:
            await c.client.vms.wait("outside")
        assert "hostDirs[0].path" in failure.value.vm.state.status_message


def test_addresses_of_this_host_are_known() -> None:
    own = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, suppress(OSError):
        # Sends nothing, but chooses the address that it would send from.
        sender.connect(("192.0.2.1", 9))
        own.add(sender.getsockname()[0])
    assert all(leads_to_host(ipaddress.ip_address(address)) for address in own)
    # Reserved for documentation.
    assert not leads_to_host(ipaddress.ip_address("203.0.113.9"))
    assert not leads_to_host(ipaddress.ip_address("2001:db8::1"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bootpd": {"DHCPLeaseTimeSecs": 600}}, None),
        ({"bootpd": {"DHCPLeaseTimeSecs": 3600}}, None),
        ({"bootpd": {"DHCPLeaseTimeSecs": 86400}}, "lease time of 86400 seconds, expected 3600 or less"),
        ({"bootpd": {"DHCPLeaseTimeSecs": "600"}}, "no whole number"),
        ({"bootpd": []}, "no whole number"),
        ([], "no whole number"),
    ],
)
def test_long_dhcp_lease_is_warned_about(tmp_path: Path, settings: Any, words: str | None) -> None:
    path = tmp_path / "settings.plist"
    path.write_bytes(plistlib.dumps(settings))
    warning = check_dhcp_lease(path)
    assert (warning is None) == (words is None)
    if words is not None and warning is not None:
        assert words in warning
        assert "sudo defaults write" in warning


def test_missing_or_broken_dhcp_settings_are_warned_about(tmp_path: Path) -> None:
    path = tmp_path / "settings.plist"
    assert "does not exist" in str(check_dhcp_lease(path))
    path.write_bytes(b"<plist><dict>")
    assert "cannot read" in str(check_dhcp_lease(path))


async def test_machine_id_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine-id"
    path.write_text("abc\n")
    assert await machine_id(path) == "abc"
    program = tmp_path / "ioreg"
    program.write_text('#!/bin/sh\necho \'  "IOPlatformUUID" = "00000000-1111-2222-3333-444444444444"\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert await machine_id(tmp_path / "none") == "00000000-1111-2222-3333-444444444444"
    program.unlink()
    fallback = await machine_id(tmp_path / "none")
    assert fallback.startswith("node-")
    assert await machine_id(tmp_path / "none") == fallback


async def test_disk_of_an_impossible_size_is_reported_as_the_largest_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems of a network say so. The controller would refuse each heartbeat with a larger number."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=2**64, free=2**63))
    assert await disk_of(tmp_path) == WorkerDisk(MAX_UINT, MAX_UINT)
