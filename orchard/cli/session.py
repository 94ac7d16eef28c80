"""From the options of a verb to the controller that it talks to."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from orchard.cli.connection import ControllerConnection
from orchard.cli.context import CONTEXT_FILE, Context, choose_context, read_contexts
from orchard.command_line import CommandLine, orchard_home


def add_context_option(parser: CommandLine) -> None:
    parser.add_argument("--context", metavar="NAME", default="", help="controller to use; default: the default context")


def context_path() -> Path:
    return orchard_home() / CONTEXT_FILE


def chosen_context(options: argparse.Namespace) -> Context:
    """Return the context that the options and the environment name. Raises CommandError."""
    return choose_context(read_contexts(context_path()), os.environ, options.context)


def open_connection(options: argparse.Namespace) -> ControllerConnection:
    """Return a connection to the controller that the options and the environment name. The caller closes it.

    Raises CommandError.
    """
    return ControllerConnection(chosen_context(options))
