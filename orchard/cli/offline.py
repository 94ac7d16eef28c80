"""The verbs `bootstrap-token`, `check` and `store`, which read a controller's data directory, or etcd.

They need no running controller and change nothing in what they read. The first two do not disturb a controller.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import trio

from orchard.auth import BootstrapToken
from orchard.base.command_line import CommandLine, controller_directory
from orchard.base.files import STATE_FILE, TLS_CERTIFICATE_FILE, write_private
from orchard.cli.failure import CommandError
from orchard.control.etcd_options import add_access_options, etcd_access, etcd_prefix
from orchard.control.store_copy import CopyError, copy_store, inspect_etcd, is_etcd
from orchard.state.fsck import inspect
from orchard.storage.errors import DamagedError
from orchard.storage.etcd import EtcdAccess
from orchard.store import read_state


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `bootstrap-token`, `check` or `store`."""
    if verb == "store":
        _add_store_verbs(parser)
        return
    if verb == "check":
        parser.add_argument("data_dir", metavar="DATA_DIR", nargs="?", type=Path,
            help="data directory; default: $ORCHARD_HOME/.orchard/controller, or ~/.orchard/controller")  # fmt: skip
        add_access_options(parser)
        parser.set_defaults(run=partial(_check, parser))
        return
    parser.add_argument(
        "account", help="service account of the worker; it needs the roles compute:read and compute:write"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="data directory of the controller; default: $ORCHARD_HOME/.orchard/controller, or ~/.orchard/controller",
    )
    parser.add_argument(
        "--no-certificate",
        action="store_true",
        help="leave the certificate out (workers verify it with their system's CAs)",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write it to a file that only its owner can read, mode 0600"
    )
    parser.set_defaults(run=_print_bootstrap_token)


def _add_store_verbs(parser: CommandLine) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    what = "copy all that a controller stores from a data directory or etcd to another one, which must be empty"
    copy = verbs.add_parser("copy", help=what, description=f"{what[0].upper()}{what[1:]}. Names, uids and the revision"
        " stay. A controller that uses the data directory must be stopped; etcd is copied as it is at one moment.")  # fmt: skip
    for name in ("source", "target"):
        copy.add_argument(
            name,
            metavar=name.upper(),
            help="data directory, or URLs of etcd such as https://etcd-1:2379,https://etcd-2:2379",
        )
    add_access_options(copy, urls=False)
    copy.set_defaults(run=partial(_copy_store, copy))


def _copy_store(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    options.etcd = next(filter(is_etcd, (options.source, options.target)), None)
    access = etcd_access(parser, options, os.environ) or EtcdAccess("")
    try:
        print(trio.run(copy_store, options.source, options.target, access, etcd_prefix(options)))
    except CopyError as error:
        raise CommandError(str(error)) from None
    return 0


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    access = etcd_access(parser, options, os.environ)
    if access is None:
        return _check_data_directory(options)
    if options.data_dir is not None:
        parser.error("DATA_DIR and --etcd cannot be combined")
    try:
        print(trio.run(inspect_etcd, access, etcd_prefix(options)))
    except CopyError as error:
        raise CommandError(str(error)) from None
    return 0


def _print_bootstrap_token(options: argparse.Namespace) -> int:
    directory = controller_directory(options.data_dir)
    path = directory / STATE_FILE
    try:
        state = read_state(path)
        certificate = directory / TLS_CERTIFICATE_FILE
        pem = certificate.read_bytes() if certificate.exists() and not options.no_certificate else None
    except OSError as error:
        raise CommandError(
            f"cannot read the controller's data in {directory}: {error.strerror}; see --data-dir, or ask a"
            " controller: orchard get bootstrap-token"
        ) from None
    except DamagedError as error:
        raise CommandError(str(error)) from None
    account = state.accounts.get(options.account)
    if account is None:
        known = ", ".join(sorted(state.accounts)) or "none"
        raise CommandError(f'service account "{options.account}" does not exist in {path}, expected one of: {known}')
    token = BootstrapToken(account.name, account.token, pem)
    if options.output is None:
        print(token)
        return 0
    try:
        write_private(options.output, f"{token}\n".encode())
    except OSError as error:
        raise CommandError(f"cannot write {options.output}: {error.strerror}") from None
    return 0


def _check_data_directory(options: argparse.Namespace) -> int:
    """Print the problems of a data directory, and return the exit status: 1 if there is one."""
    directory = controller_directory(options.data_dir)
    try:
        report = inspect(directory)
    except OSError as error:
        raise CommandError(
            f"cannot read {error.filename}: {error.strerror}; name the data directory of a controller"
        ) from None
    print(*report.problems, *(f"note: {note}" for note in report.notes), f"{directory}: {report.summary()}", sep="\n")
    return 1 if report.problems else 0
