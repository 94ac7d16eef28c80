"""The options about etcd: where it is, and how controllers use it. The password is in ORCHARD_ETCD_PASSWORD."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from orchard.control.stored_data import DEFAULT_ETCD_PREFIX, EtcdSettings
from orchard.storage.etcd import EtcdAccess
from orchard.storage.etcd_engine import DEFAULT_MAX_MIB
from orchard.storage.etcd_records import DEFAULT_EVENTS_KIB
from orchard.storage.leadership import DEFAULT_LEADER_TTL

_PASSWORD = "ORCHARD_ETCD_PASSWORD"  # noqa: S105 -- the name of the variable
# A shorter lease would be lost in a short stall. With a longer one a fail-over takes too long.
_LEAST_TTL, _MOST_TTL = 5, 60
# A single append of a worker has up to some hundred KiB.
_LEAST_EVENTS_KIB = 64
# Options that have no meaning for a state in files.
_ETCD_ONLY = (
    *("etcd_prefix", "etcd_ca", "etcd_cert", "etcd_key", "etcd_user"),
    *("leader_ttl", "etcd_max_mib", "etcd_events_kib"),
)


def parse_etcd_prefix(text: str) -> str:
    """Parse the prefix of all keys, without a slash at its end."""
    prefix = text.rstrip("/")
    if not prefix.startswith("/") or not prefix.isascii() or not prefix.isprintable() or " " in prefix:
        raise argparse.ArgumentTypeError(f'prefix is "{text}", expected a path such as {DEFAULT_ETCD_PREFIX}')
    return prefix


def _parse_ttl(text: str) -> float:
    if not text.isdecimal() or not _LEAST_TTL <= int(text) <= _MOST_TTL:
        raise argparse.ArgumentTypeError(f"the time is {text}, expected {_LEAST_TTL} to {_MOST_TTL} seconds")
    return float(text)


def _parse_events_kib(text: str) -> int:
    if not text.isdecimal() or not _LEAST_EVENTS_KIB <= int(text) <= DEFAULT_EVENTS_KIB:
        raise argparse.ArgumentTypeError(
            f"the size is {text}, expected {_LEAST_EVENTS_KIB} to {DEFAULT_EVENTS_KIB} KiB"
        )
    return int(text)


def _parse_mib(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"the size is {text}, expected a number of MiB from 1")
    return int(text)


def add_access_options(parser: argparse.ArgumentParser, *, urls: bool = True) -> None:
    """Add the options for the access to etcd. Without `urls`, --etcd is left out."""
    add = parser.add_argument
    if urls:
        add("--etcd", metavar="URL[,URL...]",
            help="client URLs of the etcd that holds the state, such as https://etcd-1.example.com:2379")  # fmt: skip
    add("--etcd-prefix", metavar="PATH", type=parse_etcd_prefix,
        help=f"path of the keys, another one for each cluster; default {DEFAULT_ETCD_PREFIX}")  # fmt: skip
    add(
        "--etcd-ca", metavar="FILE", type=Path, help="CA certificates in PEM that etcd's certificates are verified with"
    )
    add("--etcd-cert", metavar="FILE", type=Path, help="client certificate in PEM, for an etcd that asks for one")
    add("--etcd-key", metavar="FILE", type=Path, help="private key of --etcd-cert in PEM")
    add(
        "--etcd-user",
        metavar="NAME",
        default="",
        help=f"user name at etcd; the password is in the variable {_PASSWORD}",
    )


def add_leader_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a controller that uses etcd."""
    add = parser.add_argument
    add("--store", choices=("file", "etcd"), default=None,
        help="where the state is: in files of the data directory (the default), or in etcd, where controllers stand by"
        " for each other")  # fmt: skip
    add_access_options(parser)
    add("--leader-ttl", metavar="S", type=_parse_ttl,
        help="seconds after which a controller that has failed is replaced by another one; default 10")  # fmt: skip
    add("--etcd-max-mib", metavar="N", type=_parse_mib,
        help="size of etcd's database above which additions are refused; at most 70 %% of its quota; default"
        f" {DEFAULT_MAX_MIB}")  # fmt: skip
    add("--etcd-events-kib", metavar="N", type=_parse_events_kib,
        help=f"the most that is stored of one VM's events; default {DEFAULT_EVENTS_KIB}")  # fmt: skip


def etcd_access(
    parser: argparse.ArgumentParser, options: argparse.Namespace, environ: Mapping[str, str]
) -> EtcdAccess | None:
    """Return how etcd is reached, None without --etcd. Exits with status 2 if the options contradict each other."""
    if options.etcd is None:
        for name in _ETCD_ONLY:
            if getattr(options, name, None):
                parser.error(f"--{name.replace('_', '-')} has no effect without --etcd")
        return None
    # Empty, for example from an unset variable: the state must not be read from files then.
    if not options.etcd:
        parser.error("--etcd is empty, expected the URLs of etcd")
    if (options.etcd_cert is None) != (options.etcd_key is None):
        parser.error("--etcd-cert and --etcd-key must be given together")
    password = environ.get(_PASSWORD, "")
    if bool(options.etcd_user) != bool(password):
        parser.error(f"--etcd-user and {_PASSWORD} must be given together")
    return EtcdAccess(options.etcd, options.etcd_ca, options.etcd_cert, options.etcd_key, options.etcd_user, password)


def etcd_prefix(options: argparse.Namespace) -> str:
    """Return the prefix of all keys."""
    prefix: str = options.etcd_prefix or DEFAULT_ETCD_PREFIX
    return prefix


def etcd_settings(
    parser: argparse.ArgumentParser, options: argparse.Namespace, environ: Mapping[str, str]
) -> EtcdSettings | None:
    """Return the settings of a controller on etcd, None with embedded files. Exits with status 2 if they are invalid."""
    access = etcd_access(parser, options, environ)
    if options.store == "etcd" and access is None:
        parser.error("--store etcd needs --etcd with the URLs of etcd")
    if options.store == "file" and access is not None:
        parser.error("--store file and --etcd cannot be combined")
    if access is None:
        return None
    return EtcdSettings(
        access,
        etcd_prefix(options),
        options.leader_ttl or DEFAULT_LEADER_TTL,
        options.etcd_max_mib or DEFAULT_MAX_MIB,
        options.etcd_events_kib or DEFAULT_EVENTS_KIB,
    )
