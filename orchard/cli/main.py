"""The `orchard` command: its command line, and which function runs each verb.

orchard demo                   run a controller, a worker and a VM on this machine, step by step
orchard dev                    run a controller and workers to develop against
orchard bootstrap-token NAME   print a bootstrap token for a worker
orchard check [DATA_DIR]       report what is wrong in a controller's data directory
orchard controller ...         the same as python -m orchard.controller
orchard worker ...             the same as python -m orchard.worker

The verbs themselves are in cli/demo.py, cli/offline.py and the modules of the roles.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from orchard import __version__, controller, worker
from orchard.cli import demo, offline
from orchard.daemon import CommandLine, parse_count, parse_port, suggest
from orchard.net.transport import DEFAULT_PORT

_DEMO_IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
_DEV_DIRECTORY = Path(".dev-data")
# These verbs have command lines of their own.
_ROLES: Mapping[str, Callable[[Sequence[str]], int]] = {"controller": controller.main, "worker": worker.main}


def _make_parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """Return the parser of the command line, and the verbs."""
    parser = CommandLine(prog="orchard", description="An orchestrator for Tart virtual machines.")
    parser.add_argument("--version", action="version", version=f"orchard {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo_parser = verbs.add_parser("demo", help="run a controller, a worker and a VM on this machine, step by step")
    demo_parser.add_argument("--keep", action="store_true", help="keep it running, and print curl commands to try")
    demo_parser.add_argument("--image", default=_DEMO_IMAGE, help="image of the VM; default: %(default)s")

    dev_parser = verbs.add_parser(
        "dev", help="run a controller and workers to develop against: on loopback, without TLS and credentials"
    )
    dev_parser.add_argument(
        "--port", type=parse_port, default=DEFAULT_PORT, help="TCP port; default: %(default)s; 0: any free port"
    )
    dev_parser.add_argument("--workers", type=parse_count, default=1, help="number of workers; default: %(default)s")
    dev_parser.add_argument(
        "--directory", type=Path, default=_DEV_DIRECTORY, help="directory for state and VMs; default: %(default)s"
    )
    for verb in (demo_parser, dev_parser):
        verb.add_argument("--synthetic", action="store_true", help="use VMs without a hypervisor even if tart is there")
        verb.add_argument("--debug", action="store_true", help="log to standard error")
        verb.set_defaults(run=demo.run_verb)

    token_parser = verbs.add_parser("bootstrap-token", help="print a bootstrap token for a worker")
    token_parser.add_argument(
        "account", help="service account of the worker; it needs the roles compute:read and compute:write"
    )
    token_parser.add_argument(
        "--data-dir", type=Path, help="data directory of the controller; default: $ORCHARD_HOME/controller"
    )
    token_parser.add_argument(
        "--no-certificate",
        action="store_true",
        help="leave the certificate out (workers verify it with their system's CAs)",
    )
    token_parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write it to a file that only its owner can read, mode 0600"
    )
    token_parser.set_defaults(run=offline.print_bootstrap_token)

    check_parser = verbs.add_parser(
        "check", help="report what is wrong in a controller's data directory, without changing it"
    )
    check_parser.add_argument("data_dir", metavar="DATA_DIR", nargs="?", type=Path,
        help="data directory; default: $ORCHARD_HOME/controller")  # fmt: skip
    check_parser.set_defaults(run=offline.check_data_directory)

    for role in _ROLES:
        verbs.add_parser(role, help=f"run a {role}; see orchard {role} --help", add_help=False)
    return parser, verbs.choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _ROLES:
        return _ROLES[words[0]](words[1:])
    parser, verbs = _make_parser()
    if words and not words[0].startswith("-") and words[0] not in verbs:
        parser.error(f"unknown verb {words[0]}{suggest(words[0], verbs)}, expected one of {', '.join(verbs)}")
    options = parser.parse_args(words)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of standard output is gone. What is still buffered must not fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
