"""The verb `version`, which asks no controller with --client, and imports nothing for that."""

from __future__ import annotations

import argparse

from orchard import __version__
from orchard.base.command_line import CommandLine
from orchard.cli.options import add_context_option, add_output_option


def add_verb(_verb: str, parser: CommandLine) -> None:
    """Declare the options of `version`."""
    parser.add_argument("--client", action="store_true", help="ask no controller")
    add_output_option(parser, "text", "json")
    add_context_option(parser)
    parser.set_defaults(run=_print_version)


def _print_version(options: argparse.Namespace) -> int:
    versions = {"client": __version__}
    if options.output == "text":
        print(f"client: orchard {__version__}")
    if not options.client:
        from orchard.cli.session import open_connection

        with open_connection(options) as controller:
            info = controller.fetch("GET", "/controller/info")
            versions |= {"server": info.get("version", ""), "url": controller.url}
        if options.output == "text":
            print(f"server: orchard {versions['server']} at {versions['url']}")
    if options.output == "json":
        from orchard.cli.output import print_json

        print_json(versions)
    return 0
