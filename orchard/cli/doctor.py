"""The verb `doctor`: what on this host keeps a worker, a controller or a client from working.

Here are the command line and the way to the controller; host_checks.py observes hosts, and diagnosis.py judges what was
observed. The verb changes nothing; it binds the controller's ports for a moment, and calls `tart` and on macOS
`security`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from orchard.auth import BootstrapToken
from orchard.base.command_line import CommandLine, controller_directory, orchard_home, parse_address
from orchard.base.files import ACCESS_KEY_FILE, STATE_FILE, WORKERS_LOCK_FILE
from orchard.cli import diagnosis
from orchard.cli.connection import AnswerError, ControllerConnection, fetch_certificate, parsed_urls
from orchard.cli.context import Context, read_contexts
from orchard.cli.diagnosis import Finding
from orchard.cli.failure import FAILED, USAGE, CommandError
from orchard.cli.https import network_errors, open_http
from orchard.cli.options import add_context_option, add_output_option
from orchard.cli.output import print_json, printable
from orchard.cli.session import chosen_context, context_path
from orchard.net import tls
from orchard.net.urls import DEFAULT_PORT, find_proxy

_ROLES = ("worker", "controller", "client")
# For an answer of the controller.
_ANSWER_SECONDS = 10.0
_TOKEN_BYTES = 64 * 1024  # bytes


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
    add_output_option(parser, "text", "json")
    add_context_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    roles = [options.role] if options.role else _roles_here(options)
    findings = [(role, finding) for role in roles for finding in _examine(role, options)]
    if options.output == "json":
        print_json([{"role": role, **asdict(finding)} for role, finding in findings])
    else:
        _print(findings)
    return FAILED if any(finding.status == "failure" for _, finding in findings) else 0


def _examine(role: str, options: argparse.Namespace) -> Iterator[Finding]:
    if role == "client":
        yield from examine_way(Context(options.url) if options.url else chosen_context(options))
        return
    # It needs a Unix.
    from orchard.cli import host_checks

    if role == "controller":
        yield from host_checks.examine_controller(options, controller_directory(options.data_dir))
        return
    yield from host_checks.examine_worker(options)
    if options.url or options.token_file or read_contexts(context_path()).by_name:
        yield from examine_way(_worker_context(options))


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
    directory = controller_directory(options.data_dir)
    found = {
        "worker": (orchard_home("worker") / WORKERS_LOCK_FILE).exists(),
        # A controller with its state in etcd has the key alone.
        "controller": any((directory / name).exists() for name in (STATE_FILE, ACCESS_KEY_FILE)),
        "client": bool(read_contexts(context_path()).by_name or os.environ.get("ORCHARD_URL") or options.url),
    }
    roles = [role for role in _ROLES if found[role]]
    if not roles:
        raise CommandError(f"nothing of Orchard is on this host yet; name what it shall be: {', '.join(_ROLES)}", USAGE)
    return roles


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
            seen.fields = _describe_certificate(url, seen.pem)
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


def _describe_certificate(url: str, pem: bytes) -> Mapping[str, Any]:
    """Return the fields of a server's certificate, as SSLSocket.getpeercert does. Raises NetworkError, SSLError."""
    context = tls.inspecting_context(ssl.PEM_cert_to_DER_cert(pem.decode()))
    with network_errors(url), closing(open_http(parsed_urls(url)[0], pem, _ANSWER_SECONDS, context)) as connection:
        connection.connect()
        sock: Any = connection.sock
        shown: Mapping[str, Any] = sock.getpeercert()
        return shown


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
