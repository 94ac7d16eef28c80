"""Options that several verbs have. To declare one imports nothing that sends requests or reads contexts."""

from __future__ import annotations

import argparse

from orchard.base.command_line import CommandLine, parse_span


def add_resource_arguments(parser: argparse.ArgumentParser, *kinds: str) -> None:
    """Declare a resource of one of these kinds and its name, such as `vm NAME`."""
    parser.add_argument("kind", choices=kinds, metavar="|".join(kinds))
    parser.add_argument("name", metavar="NAME")


def add_wait_option(parser: CommandLine, *short: str) -> None:
    """Declare how long a VM that does not run yet is waited for."""
    parser.add_argument(*short, "--wait", metavar="SECONDS", type=parse_span, default=60, help="default: %(default)s")


def add_context_option(parser: CommandLine) -> None:
    parser.add_argument("--context", metavar="NAME", default="", help="controller to use; default: the default context")


def add_output_option(parser: argparse.ArgumentParser, *formats: str) -> None:
    """Declare -o with these formats, of which the first is the default."""
    parser.add_argument("-o", "--output", choices=formats, default=formats[0], help="default: %(default)s")


def add_filter_option(parser: argparse.ArgumentParser, about: str) -> None:
    """Declare --filter, whose values become a list."""
    parser.add_argument("--filter", metavar="PATH=VALUE", action="append", default=[],
        help=f"{about} such as status=running, createdBy=ci or metadata.job=7; repeatable: all must hold")  # fmt: skip
