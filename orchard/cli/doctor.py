"""The verb `doctor`: what on this host keeps a worker, a controller or a client from working.

Here are the observations and the command line. diagnosis.py judges what was observed. The verb changes nothing; it binds
the controller's ports for a moment, and calls `tart` and on macOS `security`.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import ipaddress
import os
import platform
import pwd
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from orchard.auth import BootstrapToken
from orchard.cli import diagnosis
from orchard.cli.connection import (
    AnswerError,
    ControllerConnection,
    describe_certificate,
    fetch_certificate,
    parsed_urls,
)
from orchard.cli.context import Context, read_contexts
from orchard.cli.diagnosis import Finding
from orchard.cli.failure import FAILED, USAGE, CommandError
from orchard.cli.output import print_json, printable
from orchard.cli.session import add_context_option, chosen_context, context_path
from orchard.command_line import CommandLine, orchard_home, parse_address
from orchard.files import CONTROLLER_LOCK_FILE, STATE_FILE, TLS_CERTIFICATE_FILE, TLS_KEY_FILE, WORKERS_LOCK_FILE
from orchard.fsck import describe_foreign_data, find_exposures
from orchard.net import tls
from orchard.net.urls import DEFAULT_PORT, bracketed, find_proxy
from orchard.schema import Runtime
from orchard.tart import find_tart
from orchard.vm.driver import DriverError
from orchard.vm.host import check_dhcp_lease, measure_disk
from orchard.vm.processes import is_locked
from orchard.vm.tart_cli import Abilities, parse_list

_ROLES = ("worker", "controller", "client")
# For a program, and for an answer of the controller.
_PROGRAM_SECONDS = 20.0
_ANSWER_SECONDS = 10.0
_CONNECT_SECONDS = 3.0
_TOKEN_BYTES = 64 * 1024  # bytes
_SSH_PORT = 22
_LEASES = Path("/var/db/dhcpd_leases")
_CONSOLE = Path("/dev/console")


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `doctor`."""
    add = parser.add_argument
    add("role", nargs="?", choices=_ROLES, help="what this host is; default: each of them that has data on this host")
    add("--url", metavar="URL", default="", help="the controller; default: that of the context")
    add(
        "--token-file",
        metavar="FILE",
        type=Path,
        help="bootstrap token of the worker, to check its account and certificate",
    )
    add("--runtime", choices=("tart", "vetu"), default="tart", help="hypervisor of the worker; default: %(default)s")
    add("--tart", metavar="PATH", help="path of the tart (or vetu) program; default: found on PATH")
    add(
        "--data-dir",
        metavar="DIR",
        type=Path,
        help="data directory of the controller; default: as controller run has it",
    )
    add("--listen", metavar="HOST:PORT", type=parse_address, default=f":{DEFAULT_PORT}",
        help="address of the controller; default: %(default)s")  # fmt: skip
    add("--listen-ssh", metavar="HOST:PORT", type=parse_address, help="address of the controller's SSH server")
    add(
        "--tls-name",
        metavar="NAME",
        action="append",
        default=[],
        help="name that the certificate has to have; repeatable",
    )
    add("-o", "--output", choices=("text", "json"), default="text", help="default: %(default)s")
    add_context_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    examine: dict[str, Callable[[argparse.Namespace], Iterator[Finding]]] = {
        "worker": examine_worker,
        "controller": examine_controller,
        "client": examine_client,
    }
    roles = [options.role] if options.role else _roles_here(options)
    findings = [(role, finding) for role in roles for finding in examine[role](options)]
    if options.output == "json":
        print_json([{"role": role, **asdict(finding)} for role, finding in findings])
    else:
        _print(findings)
    return FAILED if any(finding.status == "failure" for _, finding in findings) else 0


def _print(findings: Sequence[tuple[str, Finding]]) -> None:
    width = max((len(finding.check) for _, finding in findings), default=0)
    last = ""
    for role, finding in findings:
        if role != last:
            print(f"{role}:")
            last = role
        print(f"  {finding.status:7}  {finding.check:{width}}  {printable(finding.message)}")
        if finding.remedy:
            print(f"  {'':7}  {'':{width}}  remedy: {printable(finding.remedy)}")


def _roles_here(options: argparse.Namespace) -> list[str]:
    """Return the roles that have data on this host. Raises CommandError if there is none."""
    found = {
        "worker": (orchard_home("worker") / WORKERS_LOCK_FILE).exists(),
        "controller": (_data_directory(options) / STATE_FILE).exists(),
        "client": bool(read_contexts(context_path()).by_name or os.environ.get("ORCHARD_URL") or options.url),
    }
    roles = [role for role in _ROLES if found[role]]
    if not roles:
        raise CommandError(f"nothing of Orchard is on this host yet; name what it shall be: {', '.join(_ROLES)}", USAGE)
    return roles


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
        yield from _examine_macos("" if error else path)
        yield diagnosis.check_pruning("TART_NO_AUTO_PRUNE" in os.environ)
    yield diagnosis.check_home(variable, str(home), problem_of_directory(home))
    disk = measure_disk(home)
    yield diagnosis.check_disk("worker", str(home), None if disk is None else disk.free_bytes)
    yield diagnosis.check_descriptors(descriptor_limit())
    if options.url or options.token_file or read_contexts(context_path()).by_name:
        yield from examine_way(_worker_context(options))


def _examine_macos(tart: str) -> Iterator[Finding]:
    """Yield what macOS lets VMs and connections to them do; `tart` is "" without a usable one."""
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


def _worker_context(options: argparse.Namespace) -> Context:
    """Return where a worker connects to, and how. Raises CommandError."""
    if options.token_file is None:
        return Context(options.url) if options.url else chosen_context(options)
    try:
        with options.token_file.open() as file:
            token = BootstrapToken.parse(file.read(_TOKEN_BYTES))
    except OSError as error:
        raise CommandError(f"cannot read {options.token_file}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"{options.token_file}: {error}") from None
    url = options.url or chosen_context(options).url
    return Context(url, token.certificate, token.account, token.token)


# ---- the way to the controller -------------------------------------------------------------------------------------


def examine_client(options: argparse.Namespace) -> Iterator[Finding]:
    yield from examine_way(Context(options.url) if options.url else chosen_context(options))


def examine_way(context: Context) -> Iterator[Finding]:
    """Yield what is found on the way to each controller of a context, as far as one gets. Raises CommandError."""
    for server in parsed_urls(context.url):
        try:
            proxy = find_proxy(server.is_tls, server.host, os.environ)
        except ValueError as error:
            raise CommandError(str(error)) from None
        addresses, error_text = ([], "") if proxy else addresses_of(server.host)
        yield (found := diagnosis.check_dns(server.host, addresses, error_text, str(proxy) if proxy else ""))
        if found.status != "failure":
            one = Context(server.text, context.certificate, context.account, context.token)
            yield from _examine_server(one, server.host, is_tls=server.is_tls)


def addresses_of(host: str) -> tuple[list[str], str]:
    """Return the addresses of a host, and why there are none or ""."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return [], str(getattr(error, "strerror", None) or error).lower()
    return list(dict.fromkeys(str(address[0]) for *_, address in found)), ""


@dataclass(slots=True)
class _Seen:
    """What an unverified connection has shown: certificate, and by how many seconds this host's clock is ahead."""

    pem: bytes = b""
    fields: Mapping[str, Any] | None = None
    ahead: float | None = None


def _examine_server(context: Context, host: str, *, is_tls: bool) -> Iterator[Finding]:
    seen, error = _look(context.url, is_tls=is_tls)
    yield diagnosis.check_reach(context.url, error)
    if error:
        return
    is_trusted = True
    if seen.fields is not None:
        expires, names = tls.expiry_and_names(seen.fields)
        error = _trust_error(context)
        is_trusted = not error
        is_pinned = context.certificate is not None
        yield diagnosis.check_trust(host, names, is_pinned=is_pinned, is_covered=tls.covers(names, host), error=error)
        yield diagnosis.check_expiry(expires, datetime.datetime.now(datetime.UTC))
    if seen.ahead is not None:
        yield diagnosis.check_clock(seen.ahead)
    # Credentials are for a controller that is trusted.
    if is_trusted:
        yield diagnosis.check_account(context.account, _refusal(context))


def _look(url: str, *, is_tls: bool) -> tuple[_Seen, str]:
    """Return what the controller shows to a client that trusts it blindly and has no credentials, and why it does not."""
    seen = _Seen()
    try:
        if is_tls:
            seen.pem = fetch_certificate(url)
            seen.fields = describe_certificate(url, seen.pem)
        with ControllerConnection(Context(url, b"" if is_tls else None), seconds=_ANSWER_SECONDS) as controller:
            # The head of a refusal has the date, too.
            with suppress(AnswerError):
                controller.call("GET", "/controller/info")
            seen.ahead = _seconds_ahead(controller.headers.get("Date", ""), time.time())
    except CommandError as error:
        return seen, str(error)
    except ssl.SSLError as error:
        return seen, f"the certificate of {url} cannot be read: {error}"
    return seen, ""


def _seconds_ahead(date: str, now: float) -> float | None:
    """Return how far `now` is ahead of the date of an answer, which has no fractions of a second; None without one."""
    try:
        then = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None
    return max(0.0, now - then - 1) if now > then else now - then


def _trust_error(context: Context) -> str:
    try:
        with ControllerConnection(context, seconds=_ANSWER_SECONDS) as controller, closing(controller.open_socket()):
            return ""
    except CommandError as error:
        return str(error)


def _refusal(context: Context) -> str:
    try:
        with ControllerConnection(context, seconds=_ANSWER_SECONDS) as controller:
            controller.call("GET", "/controller/info")
    except CommandError as error:
        return str(error)
    return ""


# ---- a controller's host -------------------------------------------------------------------------------------------


def _data_directory(options: argparse.Namespace) -> Path:
    directory: Path = options.data_dir or orchard_home("controller") / "controller"
    return directory


def examine_controller(options: argparse.Namespace) -> Iterator[Finding]:
    directory = _data_directory(options)
    yield diagnosis.check_state_directory(str(directory), problems_of_data(directory))
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


def _examine_certificate(directory: Path, wanted: Sequence[str]) -> Finding:
    certificate = directory / TLS_CERTIFICATE_FILE
    try:
        if not certificate.exists():
            missing_program = (
                "" if shutil.which("openssl") else "the first start needs the program openssl, to make a certificate"
            )
            return diagnosis.check_certificate([], None, missing_program)
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
    """Return why a TCP address cannot be listened on, or ""."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with suppress(_UnsupportedFamilyError), _probe(family, kind, protocol) as probe:
                probe.bind(address)
                probe.listen()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


class _UnsupportedFamilyError(Exception):
    """This system has no addresses of that kind, as one without IPv6."""


def _probe(family: int, kind: int, protocol: int) -> socket.socket:
    """Return a socket as a controller listens on. Raises OSError, _UnsupportedFamilyError."""
    try:
        probe = socket.socket(family, kind, protocol)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise _UnsupportedFamilyError from error
        raise
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return probe
