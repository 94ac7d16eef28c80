"""What `orchard doctor` observes on the host of a worker and of a controller. diagnosis.py judges it.

Client verbs do not import this file: it needs a Unix.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import platform
import pwd
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from orchard.base.files import CONTROLLER_LOCK_FILE, TLS_CERTIFICATE_FILE, TLS_KEY_FILE
from orchard.cli import diagnosis
from orchard.cli.diagnosis import Finding
from orchard.control.stored_data import StartError, check_kept_in_files
from orchard.net import tcp, tls
from orchard.net.urls import bracketed
from orchard.schema import Runtime
from orchard.state.fsck import describe_foreign_data, find_exposures
from orchard.tart import find_tart
from orchard.vm.driver import DriverError
from orchard.vm.host import check_dhcp_lease, measure_disk
from orchard.vm.processes import is_locked
from orchard.vm.tart_cli import LISTS_SAFELY, Abilities, parse_list

_PROGRAM_SECONDS = 20.0
_CONNECT_SECONDS = 3.0
_SSH_PORT = 22
_LEASES = Path("/var/db/dhcpd_leases")
_CONSOLE = Path("/dev/console")


# ---- a worker's host -----------------------------------------------------------------------------------------------


def examine_worker(options: argparse.Namespace) -> Iterator[Finding]:
    runtime: Runtime = options.runtime
    variable = f"{runtime.upper()}_HOME"
    home = Path(os.environ.get(variable) or Path.home() / f".{runtime}")
    path, error, version = observe_program(options.tart, runtime)
    if runtime == "vetu":
        yield diagnosis.check_vetu(error, path, version)
    else:
        yield diagnosis.check_tart(error, path, version)
        # An older tart cannot list while a VM starts: the start would fail.
        yield from _examine_macos(path if not error and version >= LISTS_SAFELY else "")
        yield diagnosis.check_pruning("TART_NO_AUTO_PRUNE" in os.environ)
    yield diagnosis.check_home(variable, str(home), problem_of_directory(home))
    disk = measure_disk(home)
    yield diagnosis.check_disk("worker", str(home), None if disk is None else disk.free_bytes)
    yield diagnosis.check_descriptors(descriptor_limit())


def _examine_macos(tart: str) -> Iterator[Finding]:
    """Yield what macOS lets VMs and connections to them do; `tart` is "" without one that can list the VMs."""
    is_macos = platform.system() == "Darwin"
    user = pwd.getpwuid(os.geteuid()).pw_name
    yield diagnosis.check_session(user, console_user() if is_macos else None, is_macos and keychain_is_open())
    macos = tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit()) if is_macos else None
    reach = reach_of_vm(tart) if is_macos and tart else "unknown"
    yield diagnosis.check_local_network(macos, os.geteuid() == 0, reach)
    yield diagnosis.check_lease_time(check_dhcp_lease() if is_macos else None, is_macos=is_macos)
    yield diagnosis.check_lease_pool(observe_leases(_LEASES, time.time()) if is_macos else None)


def observe_program(given: str | None, runtime: Runtime) -> tuple[str, str, tuple[int, ...]]:
    """Return the path of tart or vetu, why it cannot be used or "", and its version or ()."""
    try:
        path = find_tart(given, runtime)
    except DriverError as error:
        # The remedy behind it is the finding's.
        return "", str(error).partition(": install it")[0], ()
    status, output = _output_of(path, "--version")
    if status:
        return path, f"{path} --version failed with status {status}", ()
    return path, "", Abilities.parse(output, b"").version


def _output_of(*command: str) -> tuple[int, bytes]:
    """Return the status and the output of a program; -1 if it cannot be run or does not end in time."""
    try:
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROGRAM_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return -1, b""
    return done.returncode, done.stdout


def console_user(console: Path = _CONSOLE) -> str:
    """Return who is logged in at the screen; root at the log-in window."""
    try:
        return pwd.getpwuid(console.stat().st_uid).pw_name
    except (OSError, KeyError):
        return "unknown"


def keychain_is_open() -> bool:
    """Return whether the user's login keychain is unlocked."""
    return _output_of("security", "show-keychain-info", "login.keychain")[0] == 0


def reach_of_vm(tart: str, port: int = _SSH_PORT) -> diagnosis.Reach:
    """Connect to the first VM that runs, and return whether the system lets this process."""
    _, output = _output_of(tart, "list", "--source", "local", "--format", "json")
    try:
        names = [vm.name for vm in parse_list(output) if vm.state == "running"]
    except ValueError:
        names = []
    for name in names[:1]:
        _, output = _output_of(tart, "ip", name)
        try:
            address = ipaddress.ip_address(output.decode("ascii", "replace").strip())
            socket.create_connection((str(address), port), _CONNECT_SECONDS).close()
        except OSError as error:
            return diagnosis.reach_of(error.errno)
        except ValueError:
            return "unknown"
        return "reached"
    return "unknown"


def observe_leases(path: Path, now: float) -> int:
    """Return how many DHCP addresses are lent; 0 without a file."""
    try:
        return diagnosis.count_leases(path.read_text("utf-8", "replace"), now)
    except OSError:
        return 0


def problem_of_directory(path: Path) -> str:
    """Return why a directory cannot be used, or "". One that does not exist is made when it is needed."""
    if path.is_dir():
        return "" if os.access(path, os.R_OK | os.W_OK | os.X_OK) else "cannot be written to by this user"
    if path.exists() or path.is_symlink():
        return "is not a directory, or leads to none"
    above = next(parent for parent in path.absolute().parents if parent.exists())
    return (
        "" if os.access(above, os.W_OK | os.X_OK) else f"does not exist, and {above} cannot be written to by this user"
    )


def descriptor_limit() -> float:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if hard == resource.RLIM_INFINITY else hard


# ---- a controller's host -------------------------------------------------------------------------------------------


def examine_controller(options: argparse.Namespace, directory: Path) -> Iterator[Finding]:
    problems = problems_of_data(directory)
    absence = "" if problems else absence_of_state(directory)
    yield diagnosis.check_state_directory(str(directory), problems, absence)
    yield _examine_certificate(directory, [*options.tls_name, socket.gethostname()])
    is_running = _is_running(directory)
    for host, port in filter(None, (options.listen, options.listen_ssh)):
        name = f"{bracketed(host or '')}:{port}"
        yield diagnosis.check_port(name, listen_error(host, port), is_own=is_running)
    disk = measure_disk(directory)
    yield diagnosis.check_disk("controller", str(directory), None if disk is None else disk.free_bytes)
    yield diagnosis.check_descriptors(descriptor_limit())


def problems_of_data(directory: Path) -> list[str]:
    """Return what is wrong with a data directory itself. `orchard check` reads the state in it."""
    try:
        if not directory.exists():
            problem = problem_of_directory(directory)
            return [f"{directory} {problem}; choose another with --data-dir"] if problem else []
        foreign = describe_foreign_data(directory)
        return [*([foreign] if foreign else []), *find_exposures(directory)]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]


def absence_of_state(directory: Path) -> str:
    """Return why a controller without --etcd does not begin with an empty state in a directory, or ""."""
    try:
        check_kept_in_files(directory)
    except StartError as error:
        return str(error)
    return ""


def _examine_certificate(directory: Path, wanted: Sequence[str]) -> Finding:
    certificate = directory / TLS_CERTIFICATE_FILE
    try:
        if not certificate.exists():
            return diagnosis.check_certificate([], None, "", has_openssl=shutil.which("openssl") is not None)
        context = tls.server_context(certificate, directory / TLS_KEY_FILE)
        expires, names = tls.inspect_pair(context, tls.pem_to_der(certificate.read_bytes()))
    except (tls.TLSError, OSError) as error:
        return diagnosis.check_certificate([], None, str(error))
    missing = [name for name in wanted if not tls.covers(names, name)]
    return diagnosis.check_certificate(
        missing, diagnosis.check_expiry(expires, datetime.datetime.now(datetime.UTC)), ""
    )


def _is_running(directory: Path) -> bool:
    try:
        return is_locked(directory / CONTROLLER_LOCK_FILE)
    except OSError:
        return False


def listen_error(host: str | None, port: int) -> str:
    """Return why a controller cannot listen on a TCP address, or ""."""

    async def listen() -> None:
        for listener in await tcp.open_listeners(host, port):
            await listener.aclose()

    try:
        trio.run(listen)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""
