"""The settings of a controller, and the command line that sets them. etcd_options.py has the options about etcd."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchard import __version__
from orchard.base.command_line import (
    CommandLine,
    add_ignored_options,
    controller_directory,
    parse_address,
    parse_seconds,
)
from orchard.base.daemon import add_log_options, log_settings
from orchard.base.logs import LogSettings
from orchard.control.etcd_options import add_leader_options, etcd_settings
from orchard.control.stored_data import DEFAULT_OFFLINE_TIMEOUT, EtcdSettings
from orchard.net import tls
from orchard.net.browsers import normal_name, normal_origin
from orchard.net.connection import Limits
from orchard.net.urls import DEFAULT_PORT
from orchard.net.websocket import PING_INTERVAL
from orchard.schema import NAME

DEFAULT_IDLE_TIMEOUT = Limits().first_byte_seconds
# From an option of existing service files to its value, if it has one, and why it has no effect.
_IGNORED_OPTIONS = {
    "--insecure-allow-host-dirs": ("", "the hostDirPolicies of the cluster settings decide what a VM may mount"),
    "--experimental-disable-db-compression": ("", "the state is stored as JSON lines"),
    "--no-experimental-rpc-v2": ("", "workers are always served by RPC v2"),
    "--listen-pprof": ("ADDRESS", "this is not a Go program; see --debug"),
    "--exec-session-retention-ttl": ("D", "a command ends with its connection"),
    "--exec-ssh-connection-keepalive-interval": ("D", "WebSockets are pinged; see --ping-interval"),
}


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """The settings of a controller. Times are in seconds. `host` None means all addresses, port 0 any free port."""

    data_dir: Path
    host: str | None = None
    port: int = DEFAULT_PORT
    prefix: str = ""
    # PEM files. Without them a self-signed certificate is made and kept in the data directory.
    certificate: Path | None = None
    key: Path | None = None
    # Names beside the host's own for the self-signed certificate that the first start makes.
    tls_names: Sequence[str] = ()
    tls: bool = True
    auth: bool = True
    # Whether the dashboard is served.
    ui: bool = True
    # Beside the controller's own: origins of pages that browsers may send requests from, and names by which the
    # controller may be addressed without authentication.
    allowed_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    # Host and port of the SSH jump host; None: it is not served.
    ssh: tuple[str | None, int] | None = None
    # At most one file of each key type. Without any, an Ed25519 key is made at the first start and kept in the data
    # directory.
    ssh_host_keys: tuple[Path, ...] = ()
    ssh_auth: bool = True
    # The token of bootstrap-admin, which is created or updated with it.
    admin_token: str = field(default="", repr=False)
    worker_offline_timeout: float = DEFAULT_OFFLINE_TIMEOUT
    ping_interval: float = PING_INTERVAL
    # The limit between two requests of a connection.
    idle_timeout: float = DEFAULT_IDLE_TIMEOUT
    # Host and port on which metrics are served in the clear and without credentials; None: they are not.
    metrics: tuple[str | None, int] | None = None
    metrics_per_worker: bool = False
    # Host and port on which health checks are answered in the clear, also while another controller leads; None: on none.
    health: tuple[str | None, int] | None = None
    # The etcd that holds the state. None: the state is in files of the data directory.
    etcd: EtcdSettings | None = None
    # Whether webhooks may go to this host's loopback addresses and to link-local addresses.
    allow_local_webhooks: bool = False


def parse_api_prefix(text: str) -> str:
    """Parse the path before /v1, without a slash at its end. "/" means none."""
    prefix = text.rstrip("/")
    if prefix and (prefix[0] != "/" or not all(map(NAME.fullmatch, prefix[1:].split("/")))):
        raise argparse.ArgumentTypeError(f'prefix is "{text}", expected a path such as /orchard')
    return prefix


def _parse_with(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Return a `type=` function for argparse that repeats the message of a ValueError."""

    def parse_option(text: str) -> str:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_option


def controller_parser() -> CommandLine:
    """Return the parser of a controller's command line."""
    parser = CommandLine(
        prog="orchard controller run",
        description="Run an Orchard controller: the REST API, the scheduler and the state of a cluster of Tart VMs.",
        epilog="ORCHARD_BOOTSTRAP_ADMIN_TOKEN sets the token of the service account bootstrap-admin. Without it, the first"
        " start creates this account with a random token and shows the token once.",
    )
    add = parser.add_argument
    port = os.environ.get("PORT") or str(DEFAULT_PORT)
    add("-l", "--listen", metavar="HOST:PORT", type=parse_address, default=f":{port}",
        help=f"address to serve on; default :{DEFAULT_PORT} on all addresses, the port from $PORT")  # fmt: skip
    add(
        "--data-dir",
        metavar="DIR",
        type=Path,
        help="directory of the state; default $ORCHARD_HOME/.orchard/controller, or ~/.orchard/controller",
    )
    add("--api-prefix", metavar="P", type=parse_api_prefix, default="", help="path before /v1, such as /orchard")
    add("--controller-cert", metavar="FILE", type=Path,
        help="TLS certificate (chain) in PEM, read again when it changes; default: self-signed")  # fmt: skip
    add("--tls-name", metavar="NAME", type=_parse_with(tls.check_name), action="append", default=[],
        help="host name or IP address that the self-signed certificate is for, beside those of this host; repeatable;"
        " a certificate that exists is kept, with a warning if it lacks the name")  # fmt: skip
    add("--controller-key", metavar="FILE", type=Path, help="private key of the certificate in PEM")
    add_leader_options(parser)
    add("--listen-ssh", metavar="HOST:PORT", type=parse_address, help="address to serve SSH into VMs on; default: none")
    add(
        "--ssh-host-key",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="private key of the SSH server, for example an ECDSA or RSA one; repeatable, one of each type; default: an"
        " Ed25519 key that the first start makes",
    )
    add("--insecure-ssh-no-client-auth", action="store_true", help="serve SSH without authentication")
    add("--insecure-no-tls", action="store_true", help="serve plain HTTP")
    add("--insecure-no-auth", action="store_true", help="serve the API without authentication: anyone may do anything")
    add("--no-ui", action="store_true", help="do not serve the dashboard at /ui/")
    _add_browser_options(parser)
    _add_time_options(parser)
    add_log_options(parser)
    _add_monitoring_options(parser)
    add_ignored_options(parser, {option: value for option, (value, _) in _IGNORED_OPTIONS.items()})
    add("--version", action="version", version=f"orchard {__version__}")
    return parser


def _add_browser_options(parser: CommandLine) -> None:
    add = parser.add_argument
    add("--allow-origin", metavar="URL", type=_parse_with(normal_origin), action="append", default=[],
        help="origin of web pages that may send requests, beside the controller's own, such as https://orchard.example.com"
        " where a proxy rewrites the header Host; repeatable")  # fmt: skip
    add("--allow-host", metavar="NAME", type=_parse_with(normal_name), action="append", default=[],
        help="with --insecure-no-auth: host name by which clients may address this controller, beside localhost and IP"
        " addresses; repeatable")  # fmt: skip


def _add_time_options(parser: CommandLine) -> None:
    add = parser.add_argument
    add("--worker-offline-timeout", metavar="S", type=parse_seconds, default=DEFAULT_OFFLINE_TIMEOUT,
        help="seconds without contact after which a worker is offline and its VMs fail; default %(default)g")  # fmt: skip
    add("--ping-interval", "--experimental-ping-interval", metavar="S", type=parse_seconds, default=PING_INTERVAL,
        help="seconds between two pings on each WebSocket, and of silence before an empty line in a watch; less than the"
        " idle limit of any proxy; default %(default)g")  # fmt: skip
    add("--idle-timeout", metavar="S", type=parse_seconds, default=DEFAULT_IDLE_TIMEOUT,
        help="seconds after which a connection without requests is closed; more than a proxy keeps idle connections to the"
        " controller; default %(default)g")  # fmt: skip


def _add_monitoring_options(parser: CommandLine) -> None:
    add = parser.add_argument
    add("--metrics-listen", metavar="HOST:PORT", type=parse_address,
        help="address to serve /metrics on, over plain HTTP and without credentials; default: none, only /v1/metrics with"
        " them")  # fmt: skip
    add("--listen-health", metavar="HOST:PORT", type=parse_address,
        help="address to answer health checks on, over plain HTTP, also while another controller leads; default: none")  # fmt: skip
    add("--allow-local-webhooks", action="store_true",
        help="let webhooks send to loopback and link-local addresses, such as other services of this host")  # fmt: skip
    add("--metrics-per-worker", action="store_true", help="metrics of each worker, beside those of the whole cluster")


def parse_settings(argv: Sequence[str] | None) -> tuple[ControllerSettings, LogSettings]:
    """Return the settings from command line and environment, and what to log.

    Exits with status 2 if they are invalid. Raises HomeError.
    """
    parser = controller_parser()
    options = parser.parse_args(argv)
    if (options.controller_cert is None) != (options.controller_key is None):
        parser.error("--controller-cert and --controller-key must be given together")
    if options.insecure_no_tls and options.controller_cert is not None:
        parser.error("--insecure-no-tls and --controller-cert cannot be combined")
    for option in dict.fromkeys(options.ignored or ()):
        print(f"orchard controller: {option} has no effect: {_IGNORED_OPTIONS[option][1]}", file=sys.stderr)
    host, port = options.listen
    settings = ControllerSettings(
        data_dir=controller_directory(options.data_dir),
        host=host,
        port=port,
        prefix=options.api_prefix,
        certificate=options.controller_cert,
        key=options.controller_key,
        tls_names=options.tls_name,
        tls=not options.insecure_no_tls,
        auth=not options.insecure_no_auth,
        ui=not options.no_ui,
        allowed_origins=options.allow_origin,
        allowed_hosts=options.allow_host,
        ssh=options.listen_ssh,
        ssh_host_keys=tuple(options.ssh_host_key),
        ssh_auth=not options.insecure_ssh_no_client_auth,
        admin_token=os.environ.get("ORCHARD_BOOTSTRAP_ADMIN_TOKEN", ""),
        worker_offline_timeout=options.worker_offline_timeout,
        ping_interval=options.ping_interval,
        idle_timeout=options.idle_timeout,
        metrics=options.metrics_listen,
        metrics_per_worker=options.metrics_per_worker,
        health=options.listen_health,
        allow_local_webhooks=options.allow_local_webhooks,
        etcd=etcd_settings(parser, options, os.environ),
    )
    return settings, log_settings(options)
