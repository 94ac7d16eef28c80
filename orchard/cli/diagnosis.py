"""The checks of `orchard doctor`: from what was observed on a host to ok, warning or failure, with the remedy. Pure.

Each function judges one thing, from facts that doctor.py and host_checks.py observe. Facts of macOS are None on other
systems, and the check says then that it does not apply.
"""

from __future__ import annotations

import datetime
import errno
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

FindingStatus = Literal["ok", "warning", "failure", "skipped"]
# What the connection to a VM showed. "unknown": no VM runs.
Reach = Literal["reached", "denied", "unknown"]

# The first version whose `tart list` is safe while VMs run (docs/doctor.md).
_TART_WANTED = (2, 39, 0)
# Connections to VMs need a permission from this version of macOS on.
_PERMISSION_SINCE = (15,)
# An image of macOS with Xcode has 60 to 100 GB.
_WORKER_DISK = (20, 100)  # GB
_CONTROLLER_DISK = (1, 5)  # GB
_GB = 1_000_000_000
_CLOCK_WARNING = 5.0  # seconds
_CLOCK_FAILURE = 60.0  # seconds
_EXPIRY_WARNING = datetime.timedelta(days=30)
# A controller keeps a connection for each worker and watch, a worker one for each tunnel.
_DESCRIPTORS = (1_024, 10_240)
# Addresses of macOS's network for VMs, 192.168.64.0/24, less the network's, the host's and the broadcast one.
_POOL = 253
_POOL_WARNING = 200
_LEASE_END = re.compile(r"\blease=0x([0-9a-fA-F]{1,16})\b")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. `remedy` says what to do about a warning or a failure; it is empty otherwise."""

    check: str
    status: FindingStatus
    message: str
    remedy: str = ""


def _skipped(check: str) -> Finding:
    return Finding(check, "skipped", "does not apply: this host does not run macOS")


# ---- a worker's host -----------------------------------------------------------------------------------------------


def check_vetu(error: str, path: str, version: tuple[int, ...]) -> Finding:
    """`error` says why no vetu can be used. `version` is () when `vetu --version` does not show one."""
    if error:
        remedy = "install it from https://github.com/cirruslabs/vetu, or name the program with --tart PATH"
        return Finding("vetu", "failure", error, remedy)
    return Finding("vetu", "ok", f"version {'.'.join(map(str, version)) or 'unknown'} at {path}")


def check_tart(error: str, path: str, version: tuple[int, ...]) -> Finding:
    """`error` says why no tart can be used. `version` is () when `tart --version` does not show one."""
    wanted = ".".join(map(str, _TART_WANTED))
    if error:
        return Finding(
            "tart", "failure", error, "brew install cirruslabs/cli/tart, or name the program with --tart PATH"
        )
    found = ".".join(map(str, version)) or "unknown"
    if version < _TART_WANTED:
        message = f"the version of {path} is {found}, expected {wanted} or newer"
        return Finding("tart", "warning", message, "brew upgrade cirruslabs/cli/tart")
    return Finding("tart", "ok", f"version {found} at {path}")


def check_session(user: str, console_user: str | None, keychain_is_open: bool) -> Finding:
    """`console_user` is logged in at the screen. tart needs that, or an unlocked keychain of the user."""
    if console_user is None:
        return _skipped("session")
    if user == console_user:
        return Finding("session", "ok", f"{user} is logged in at the screen")
    if keychain_is_open:
        return Finding("session", "ok", f"the login keychain of {user} is unlocked")
    return Finding(
        "session",
        "failure",
        f"{user} is not logged in at the screen ({console_user} is), and the login keychain is locked, so VMs cannot start",
        f"log in as {user} automatically (System Settings, Users & Groups), or: security unlock-keychain login.keychain",
    )


def reach_of(number: int | None) -> Reach:
    """Return what the error of a connection to a running VM shows; `number` is its errno.

    macOS answers "no route to host" for an address that the process may not connect to.
    """
    if number == errno.ECONNREFUSED:
        return "reached"
    return "denied" if number == errno.EHOSTUNREACH else "unknown"


def check_local_network(macos: tuple[int, ...] | None, is_root: bool, reach: Reach) -> Finding:
    """Whether this host's processes may connect to VMs. `macos` is its version."""
    name = "local network"
    if macos is None:
        return _skipped(name)
    if macos < _PERMISSION_SINCE:
        return Finding(name, "ok", "this version of macOS needs no permission for it")
    if reach == "reached":
        return Finding(name, "ok", "a VM on this host was reached")
    remedy = (
        "allow it in System Settings, Privacy & Security, Local Network, or run the worker as root with --user NAME;"
        " startup scripts by the guest agent need no connection"
    )
    if reach == "denied":
        return Finding(name, "failure", "macOS does not let this user connect to the VMs on this host", remedy)
    if is_root:
        return Finding(name, "ok", "root needs no permission for it")
    return Finding(
        name, "warning", "macOS may ask for a permission at the first connection to a VM; no VM runs now", remedy
    )


def check_lease_time(complaint: str | None, *, is_macos: bool) -> Finding:
    """`complaint` is what vm/host.py says of the DHCP server's settings, with its remedy behind a colon."""
    name = "DHCP lease time"
    if not is_macos:
        return _skipped(name)
    if complaint is None:
        return Finding(name, "ok", "addresses of VMs are lent for an hour at most")
    message, _, remedy = complaint.partition(": VMs may run out of addresses; for leases of ten minutes: ")
    return Finding(name, "warning", f"{message}; VMs may run out of addresses", f"for ten minutes: {remedy}")


def count_leases(leases: str, now: float) -> int:
    """Return how many addresses are lent, from the text of macOS's file of leases. `now` is in seconds since 1970."""
    return sum(int(end, 16) > now for end in _LEASE_END.findall(leases))


def check_lease_pool(lent: int | None) -> Finding:
    """`lent` is the number of addresses that macOS has lent to VMs."""
    name = "DHCP addresses"
    if lent is None:
        return _skipped(name)
    message = f"{lent} of {_POOL} addresses for VMs are lent"
    remedy = "shorten the lease time, then: sudo rm /var/db/dhcpd_leases, while no VM runs"
    if lent >= _POOL:
        return Finding(name, "failure", message, remedy)
    return Finding(name, "warning", message, remedy) if lent > _POOL_WARNING else Finding(name, "ok", message)


def check_pruning(is_off: bool) -> Finding:
    """Whether tart removes cached images by itself. `is_off`: TART_NO_AUTO_PRUNE is set."""
    if not is_off:
        return Finding("tart prune", "ok", "tart removes cached images by itself when it needs space")
    return Finding(
        "tart prune",
        "warning",
        "TART_NO_AUTO_PRUNE is set, so tart keeps every image that it has pulled, until the disk is full",
        "unset it, or run regularly: tart prune --older-than 7",
    )


def check_home(variable: str, path: str, problem: str) -> Finding:
    """`problem` says why the directory of tart or vetu, which `variable` names, cannot be used, "" if it can."""
    if not problem:
        return Finding(variable, "ok", path)
    remedy = f"set {variable} to a directory that this user may write to"
    return Finding(variable, "failure", f"{path} {problem}", remedy)


# ---- any host ------------------------------------------------------------------------------------------------------


def check_disk(role: Literal["worker", "controller"], place: str, free: int | None) -> Finding:
    """`free` is in bytes, None if unknown."""
    least, wanted = _WORKER_DISK if role == "worker" else _CONTROLLER_DISK
    remedy = (
        "tart prune --older-than 7, or delete VMs" if role == "worker" else "free space, or move the data directory"
    )
    if free is None:
        return Finding("disk", "failure", f"cannot read how much space is free at {place}", "mount its file system")
    message = f"{free / _GB:.1f} GB are free at {place}"
    if free < wanted * _GB:
        status: FindingStatus = "failure" if free < least * _GB else "warning"
        return Finding("disk", status, f"{message}, expected {wanted} GB or more", remedy)
    return Finding("disk", "ok", message)


def check_descriptors(limit: float) -> Finding:
    """`limit` is the hard limit of open files, up to which controller and worker raise their own."""
    least, wanted = _DESCRIPTORS
    shown = "unlimited" if limit == float("inf") else f"{limit:.0f}"
    if limit >= wanted:
        return Finding("descriptors", "ok", f"the limit of open files is {shown}")
    message = f"the limit of open files is {shown}, expected {wanted} or more"
    remedy = "raise it: SoftResourceLimits and HardResourceLimits of launchd, LimitNOFILE of systemd, ulimit -H -n"
    return Finding("descriptors", "failure" if limit < least else "warning", message, remedy)


# ---- the way to the controller -------------------------------------------------------------------------------------


def check_dns(host: str, addresses: Sequence[str], error: str, proxy: str) -> Finding:
    """`error` is why the name has no address. `proxy` resolves the name if there is one."""
    if proxy:
        return Finding("DNS", "ok", f"{host} is reached through {proxy}, which looks it up")
    if error:
        remedy = "correct the URL, or the DNS of this host (/etc/resolv.conf, scutil --dns), or add it to /etc/hosts"
        return Finding("DNS", "failure", f"{host} has no address: {error}", remedy)
    if list(addresses) == [host]:
        return Finding("DNS", "ok", f"{host} is an address")
    return Finding("DNS", "ok", f"{host} is {', '.join(addresses)}")


def check_reach(url: str, error: str) -> Finding:
    """`error` is why the controller did not answer."""
    if error:
        remedy = "start the controller; let firewalls and proxies (HTTPS_PROXY, NO_PROXY) pass its port"
        return Finding("controller", "failure", error, remedy)
    return Finding("controller", "ok", f"{url} answers")


def check_trust(host: str, names: AbstractSet[str], *, is_pinned: bool, is_covered: bool, error: str) -> Finding:
    """Whether the controller's certificate is trusted.

    `is_pinned`: it is compared with the known one, and names do not matter. `error` is why it is not trusted.
    """
    if error:
        remedy = (
            "on a worker: pass a new bootstrap token with --token-file; on a client: orchard context create --force;"
            " or install the CA of the certificate on this host"
        )
        if not is_pinned and not is_covered:
            listed = ", ".join(sorted(names)) or "none"
            return Finding("TLS name", "failure", f"the certificate is for {listed}, and not for {host}", remedy)
        return Finding("TLS name", "failure", error, remedy)
    if is_pinned:
        return Finding("TLS name", "ok", "the certificate is the known one")
    return Finding("TLS name", "ok", f"this host's CAs trust the certificate for {host}")


def check_expiry(expires: datetime.datetime, now: datetime.datetime) -> Finding:
    remedy = "renew the certificate on the controller; for a self-signed one see docs/security.md"
    until = expires.date().isoformat()
    if expires <= now:
        return Finding("TLS expiry", "failure", f"the certificate expired on {until}", remedy)
    if expires - now < _EXPIRY_WARNING:
        return Finding("TLS expiry", "warning", f"the certificate expires on {until}", remedy)
    return Finding("TLS expiry", "ok", f"the certificate is valid until {until}")


def check_clock(ahead: float) -> Finding:
    """`ahead` is by how many seconds this host's clock is ahead of the controller's."""
    way = "ahead of" if ahead > 0 else "behind"
    message = f"the clock is {abs(ahead):.0f} s {way} the controller's"
    if abs(ahead) < _CLOCK_WARNING:
        return Finding("clock", "ok", "the clock agrees with the controller's")
    remedy = "set both by NTP: sudo sntp -sS time.apple.com, or timedatectl set-ntp true"
    return Finding("clock", "failure" if abs(ahead) >= _CLOCK_FAILURE else "warning", message, remedy)


def check_account(account: str, refusal: str) -> Finding:
    """`refusal` is what the controller says to the credentials."""
    if refusal:
        remedy = "create the account on the controller, or a new token with: orchard rotate token ACCOUNT"
        return Finding("account", "failure", f"{account or 'no account'}: {refusal}", remedy)
    return Finding(
        "account", "ok", f"the controller accepts {account}" if account else "the controller needs no account"
    )


# ---- a controller's host -------------------------------------------------------------------------------------------


def check_port(name: str, error: str, *, is_own: bool) -> Finding:
    """`error` is why the address `name` cannot be listened on; `is_own`: because this directory's controller does."""
    if not error:
        return Finding("port", "ok", f"{name} is free")
    if is_own:
        return Finding("port", "ok", f"{name} is in use while the controller of this data directory runs")
    remedy = "stop the program that uses it (lsof -i), or choose another with --listen; below 1024 a port needs root"
    return Finding("port", "failure", f"cannot listen on {name}: {error}", remedy)


def check_state_directory(path: str, problems: Sequence[str], absence: str = "") -> Finding:
    """`problems` are those of state/fsck.py, each with its remedy. `absence` says that the state is elsewhere or lost."""
    if problems:
        return Finding("data directory", "failure", "; ".join(problems), f"see also: orchard check {path}")
    if absence:
        return Finding("data directory", "warning", absence, "see also: orchard check --etcd URL")
    return Finding("data directory", "ok", path)


def check_certificate(
    missing: Sequence[str], expiry: Finding | None, error: str, *, has_openssl: bool = True
) -> Finding:
    """`missing` are names that the controller's certificate lacks; `expiry` is None if there is none yet.

    `error` says why certificate and key cannot be used.
    """
    if error:
        damaged = "restore certificate and key from a backup, or remove both: the next start makes others"
        remedy = f"correct that; if a file is damaged or missing, {damaged}"
        return Finding("certificate", "failure", error, remedy)
    if expiry is None and not has_openssl:
        message = "the first start needs the program openssl, to make a certificate"
        return Finding(
            "certificate", "failure", message, "install openssl, or pass --controller-cert and --controller-key"
        )
    if expiry is None:
        return Finding("certificate", "ok", "the first start makes a self-signed certificate")
    if missing and expiry.status == "ok":
        message = f"the certificate is not for {', '.join(missing)}"
        remedy = "clients that do not pin it refuse it: make another one with --tls-name (docs/security.md)"
        return Finding("certificate", "warning", message, remedy)
    return Finding("certificate", expiry.status, expiry.message, expiry.remedy)
