"""The verb `ui`: prints the address of the controller's dashboard, and opens it in the browser."""

from __future__ import annotations

import argparse
import webbrowser

from orchard.base.command_line import CommandLine
from orchard.cli.options import add_context_option
from orchard.cli.session import open_connection, require_capability


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `ui`."""
    parser.add_argument("--no-open", action="store_true", help="print the address only")
    add_context_option(parser)
    parser.set_defaults(run=_open_dashboard)


def _open_dashboard(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        require_capability(controller, "ui", "a dashboard, or it was started with --no-ui")
        address = f"{controller.url}/ui/"
    print(address, flush=True)
    if not options.no_open:
        webbrowser.open(address)
    return 0
