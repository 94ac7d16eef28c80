"""The verb `login`: from a URL and credentials to the context that is used by default. Secrets are never in the options."""

from __future__ import annotations

import argparse
import os
import sys

from orchard.base.command_line import CommandLine
from orchard.cli.connection import parsed_urls
from orchard.cli.context import Context, Contexts, read_contexts, write_contexts
from orchard.cli.contexts import TrustAnchor, check_credentials, trusted_context
from orchard.cli.failure import USAGE, CommandError, cleaning_up
from orchard.cli.session import context_path
from orchard.net.urls import join_urls

_VARIABLE = "ORCHARD_SERVICE_ACCOUNT_TOKEN"


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `login`."""
    add = parser.add_argument
    add("url", metavar="URL", help="the controller's URL; without a scheme https, without a port 6120")
    add("--bootstrap-token-stdin", action="store_true",
        help="read a bootstrap token, which has credentials and certificate, from standard input")  # fmt: skip
    add("--fingerprint", metavar="SHA256", help="trust the certificate with this fingerprint")
    add("--service-account-name", metavar="NAME", default="", help="default: asked for on a terminal")
    add("--service-account-token-stdin", action="store_true",
        help=f"read the token from standard input; default: ${_VARIABLE}, or asked for on a terminal")  # fmt: skip
    add("--name", default="", help="name of the context; default: that of this URL, otherwise the host")
    parser.set_defaults(run=_log_in)


def _log_in(options: argparse.Namespace) -> int:
    """Store the context of a controller with credentials that it accepts, and use that context by default."""
    servers = parsed_urls(options.url)
    url = join_urls(servers)
    if options.bootstrap_token_stdin and options.service_account_token_stdin:
        raise CommandError("--service-account-token-stdin and --bootstrap-token-stdin cannot be combined", USAGE)
    text = _first_line("--bootstrap-token-stdin") if options.bootstrap_token_stdin else ""
    # The certificate first: the user then knows whom the credentials are sent to.
    context = trusted_context(Context(url), TrustAnchor(text, options.fingerprint))
    if not text:
        account = options.service_account_name or _ask("Service account")
        context = context._replace(account=account, token=_token(options))
    check_credentials(context)
    contexts = read_contexts(context_path())
    known = [name for name, each in sorted(contexts.by_name.items()) if each.url == url]
    name = options.name or (known[0] if known else servers[0].host)
    write_contexts(context_path(), Contexts(name, {**contexts.by_name, name: context}))
    print(f"logged in to {url}; the context {name} is the default", file=sys.stderr)
    return 0


def _token(options: argparse.Namespace) -> str:
    if options.service_account_token_stdin:
        return _first_line("--service-account-token-stdin")
    return os.environ.get(_VARIABLE, "") or _ask("Token", hidden=True)


def _first_line(option: str) -> str:
    line = sys.stdin.readline().strip()
    if not line:
        raise CommandError(f"{option}: standard input is empty")
    return line


def _ask(what: str, *, hidden: bool = False) -> str:
    """Return what the user types at a terminal. Raises CommandError without one, or for nothing."""
    if not sys.stdin.isatty():
        options = "--service-account-name and --service-account-token-stdin, or --bootstrap-token-stdin"
        raise CommandError(f"the credentials are missing, expected {options}", USAGE)
    import getpass

    if hidden:
        with cleaning_up():
            typed = getpass.getpass(f"{what}: ", sys.stderr).strip()
    else:
        print(f"{what}: ", end="", file=sys.stderr, flush=True)
        typed = sys.stdin.readline().strip()
    if not typed:
        raise CommandError(f"{what.lower()}: nothing was typed, and nothing was changed")
    return typed
