"""The verb `context`: which controllers the command knows, and with which credentials."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NamedTuple

from orchard.base.command_line import CommandLine
from orchard.cli.connection import AnswerError, ControllerConnection, fetch_certificate, parsed_urls
from orchard.cli.context import Context, Contexts, read_contexts, write_contexts
from orchard.cli.failure import CommandError, NetworkError
from orchard.cli.options import add_output_option
from orchard.cli.output import print_items, print_table
from orchard.cli.session import context_path
from orchard.net.urls import join_urls

_DEFAULT_NAME = "default"


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare `context create`, `list`, `default` and `delete`."""
    parts = parser.add_subparsers(metavar="create|list|default|delete", required=True)
    create = parts.add_parser("create", help="add a controller")
    create.add_argument(
        "url",
        metavar="ADDRESS",
        help="the controller's URL, or those of several separated by commas; without a scheme https, without a port 6120",
    )
    create.add_argument("--name", default=_DEFAULT_NAME, help="name of the context; default: %(default)s")
    create.add_argument(
        "--bootstrap-token", metavar="T", help="credentials and certificate in one; - reads standard input"
    )
    create.add_argument("--service-account-name", metavar="NAME", default="")
    create.add_argument("--service-account-token", metavar="T", default="", help="or $ORCHARD_SERVICE_ACCOUNT_TOKEN")
    create.add_argument(
        "--fingerprint", metavar="SHA256", help="trust the certificate with this fingerprint without asking"
    )
    create.add_argument(
        "--no-pki", action="store_true", help="do not ask this host's CAs whether they trust the controller"
    )
    create.add_argument("--force", action="store_true", help="replace a context of that name")
    create.set_defaults(run=_create)
    listing = parts.add_parser("list", help="list the contexts")
    add_output_option(listing, "table", "json", "name")
    listing.set_defaults(run=_list)
    default = parts.add_parser("default", help="use a context by default")
    default.add_argument("name", metavar="NAME")
    default.set_defaults(run=_make_default)
    delete = parts.add_parser("delete", help="forget a context")
    delete.add_argument("name", metavar="NAME")
    delete.set_defaults(run=_delete)


def _create(options: argparse.Namespace) -> int:
    path = context_path()
    contexts = read_contexts(path)
    if options.name in contexts.by_name and not options.force:
        raise CommandError(f'context "{options.name}" exists already; --force replaces it')
    token = options.service_account_token or os.environ.get("ORCHARD_SERVICE_ACCOUNT_TOKEN", "")
    text = options.bootstrap_token or ""
    trust = TrustAnchor(sys.stdin.readline() if text == "-" else text, options.fingerprint, options.no_pki)
    url = join_urls(parsed_urls(options.url))
    context = trusted_context(Context(url, None, options.service_account_name, token), trust)
    check_credentials(context)
    write_contexts(path, contexts.with_context(options.name, context))
    return 0


def check_credentials(context: Context) -> None:
    """Raise CommandError unless the controller accepts the credentials of a context."""
    with ControllerConnection(context) as controller:
        try:
            controller.call("GET", "/")
        except AnswerError as error:
            if error.status_code == 401 and not context.account:
                hint = "; name the account with --service-account-name and its token with --service-account-token"
                raise CommandError(f"{error}{hint}") from None
            raise


class TrustAnchor(NamedTuple):
    """What makes a controller's certificate trusted: a bootstrap token, a fingerprint, this host's CAs, or the user."""

    bootstrap_token: str = ""
    fingerprint: str | None = None
    no_pki: bool = False

    def __repr__(self) -> str:
        return f"TrustAnchor(fingerprint={self.fingerprint!r}, no_pki={self.no_pki})"


def trusted_context(context: Context, trust: TrustAnchor) -> Context:
    """Return a context with a certificate that is trusted, and with the credentials of the bootstrap token, if any.

    Raises CommandError.
    """
    if trust.bootstrap_token:
        context = _from_bootstrap_token(context.url, trust.bootstrap_token)
    if not parsed_urls(context.url)[0].is_tls:
        return context._replace(certificate=None)
    if context.certificate is None and (trust.no_pki or trust.fingerprint or not _is_trusted(context)):
        context = context._replace(certificate=_accepted_certificate(context.url, trust.fingerprint))
    elif context.certificate is not None and trust.fingerprint:
        _require_fingerprint(context.url, context.certificate, trust.fingerprint)
    return context


def _from_bootstrap_token(url: str, text: str) -> Context:
    from orchard.auth import BootstrapToken

    try:
        token = BootstrapToken.parse(text)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return Context(url, token.certificate, token.account, token.token)


def _is_trusted(context: Context) -> bool:
    """Return whether this host's CAs trust the controller. Raises CommandError if it cannot be reached."""
    try:
        with ControllerConnection(context._replace(account="", token="")) as controller:
            controller.call("GET", "/")
    except AnswerError:
        return True
    except NetworkError as error:
        if error.is_untrusted:
            return False
        raise
    return True


def _accepted_certificate(url: str, wanted: str | None) -> bytes:
    """Return the certificate that a controller shows, if it has the wanted fingerprint or the user accepts it."""
    from orchard.net.tls import fingerprint

    pem = fetch_certificate(url)
    if wanted is not None:
        _require_fingerprint(url, pem, wanted)
        return pem
    shown = fingerprint(pem)
    if not sys.stdin.isatty():
        raise CommandError(
            f"the certificate of {url} is not known; if its SHA-256 fingerprint is right, add: --fingerprint {shown}"
        )
    print(f"The certificate of {url} is not known. Its SHA-256 fingerprint is\n{shown}", file=sys.stderr)
    print("Compare it with the one that the controller printed at its first start. Is it the same? [y/N] ", end="",
          file=sys.stderr, flush=True)  # fmt: skip
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("the certificate was not accepted; nothing was changed")
    return pem


def _require_fingerprint(url: str, pem: bytes, wanted: str) -> None:
    """Raise CommandError unless a controller's certificate has the wanted fingerprint."""
    from orchard.net.tls import fingerprint

    shown = fingerprint(pem)
    if _digits(wanted) != _digits(shown):
        raise CommandError(f"the certificate of {url} has the SHA-256 fingerprint {shown}, expected {wanted}")


def _digits(fingerprint: str) -> str:
    return fingerprint.replace(":", "").upper()


def _list(options: argparse.Namespace) -> int:
    contexts = read_contexts(context_path())
    items = [
        {"name": name, "url": each.url, "serviceAccountName": each.account, "default": name == contexts.default}
        for name, each in sorted(contexts.by_name.items())
    ]
    if options.output == "table":
        rows = [(str(item["name"]), str(item["url"]), "*" if item["default"] else "") for item in items]
        print_table(("Name", "URL", "Default"), rows)
    else:
        print_items(items, options.output)
    return 0


def _make_default(options: argparse.Namespace) -> int:
    contexts = read_contexts(context_path())
    contexts.find(options.name)
    write_contexts(context_path(), Contexts(options.name, contexts.by_name))
    return 0


def _delete(options: argparse.Namespace) -> int:
    write_contexts(context_path(), read_contexts(context_path()).without(options.name))
    return 0
