"""From the options of a verb to the controller that it talks to."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orchard.base.command_line import HomeError, orchard_home
from orchard.cli.connection import ANSWER_SECONDS, ControllerConnection
from orchard.cli.context import CONTEXT_FILE, Context, choose_context, read_contexts, write_contexts
from orchard.cli.failure import CommandError

if TYPE_CHECKING:
    from orchard.controller import ControllerSettings, Running

# Of a controller that this user has started.
_BOOTSTRAP_CONTEXT = "bootstrap-context"


def context_path() -> Path:
    return orchard_home("command") / CONTEXT_FILE


def remember_context(name: str, context: Context) -> None:
    """Store a context, which becomes the default if there is none. A file that cannot be changed is a line on stderr."""
    try:
        contexts = read_contexts(context_path())
        if contexts.by_name.get(name) != context:
            write_contexts(context_path(), contexts.with_context(name, context))
    except (CommandError, HomeError) as error:
        print(f"orchard: the context {name} is not stored: {error}", file=sys.stderr)


def remember_controller(settings: ControllerSettings, running: Running) -> None:
    """Store the context of a controller that was started, if the start knows the credentials of its administrator."""
    import ssl

    from orchard.auth import BOOTSTRAP_ADMIN
    from orchard.net.tls import pem_to_der

    if running.new_admin is not None:
        account, token = running.new_admin.name, running.new_admin.token
    elif settings.admin_token:
        account, token = BOOTSTRAP_ADMIN, settings.admin_token
    elif settings.auth:
        return
    else:
        account = token = ""
    certificate = running.certificate
    if settings.certificate is not None:
        # It is for another name than the address of this host.
        certificate = ssl.DER_cert_to_PEM_cert(pem_to_der(settings.certificate.read_bytes())).encode()
    remember_context(_BOOTSTRAP_CONTEXT, Context(running.url, certificate, account, token))


def chosen_context(options: argparse.Namespace) -> Context:
    """Return the context that the options and the environment name. Raises CommandError."""
    return choose_context(read_contexts(context_path()), os.environ, options.context)


def require_capability(controller: ControllerConnection, capability: str, what: str) -> None:
    """Raise CommandError unless the controller has a capability, which `what` needs."""
    if capability not in controller.fetch("GET", "/controller/info").get("capabilities", ()):
        raise CommandError(f"this controller is too old for {what}: it lacks the capability {capability}")


def open_connection(options: argparse.Namespace, *, seconds: float = ANSWER_SECONDS) -> ControllerConnection:
    """Return a connection to the controller that the options and the environment name. The caller closes it.

    `seconds` bounds the wait for an answer.
    Raises CommandError.
    """
    return ControllerConnection(chosen_context(options), seconds=seconds)
