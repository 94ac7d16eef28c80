"""The verb `create`: a VM, a service account, or an access token for a VM."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from orchard.base.command_line import (
    CommandLine,
    parse_duration,
    parse_words,
)
from orchard.cli.connection import path_of
from orchard.cli.failure import USAGE, CommandError
from orchard.cli.options import add_context_option, add_output_option, add_resource_arguments
from orchard.cli.output import print_json
from orchard.cli.session import open_connection, require_capability
from orchard.cli.vm_options import add_create_options, given_fields
from orchard.cli.waiting import Waiting

_KINDS = ("vm", "service-account", "token")


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare `create vm`, `create service-account` and `create token`."""
    kinds = parser.add_subparsers(metavar="|".join(_KINDS), required=True)
    vm = kinds.add_parser("vm", help="create a VM")
    _add_vm_options(vm)
    account = kinds.add_parser(
        "service-account", help="create a service account, and print its token if it is a new one"
    )
    account.add_argument("name", metavar="NAME")
    account.add_argument("--roles", metavar="ROLE", action="append", default=[], help="repeatable, or comma-separated")
    account.add_argument("--token", default="", help="its token; default: a random one, which is printed")
    account.set_defaults(run=_create_account)
    token = kinds.add_parser("token", help="issue an access token for one VM, and print it")
    add_resource_arguments(token, "vm")
    token.add_argument("--ttl", metavar="D", type=parse_duration, help="for how long, for example 8h; default: 24h")
    add_output_option(token, "token", "json")
    token.set_defaults(run=_create_token)
    for each in (vm, account, token):
        add_context_option(each)


def _add_vm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    add_create_options(parser, "its specification")
    add_create_options(parser, "its life").add_argument("--queue", choices=("wait", "never"), default="wait",
        help="never: do not create it unless a worker can take it now; default: %(default)s")  # fmt: skip
    scripts = add_create_options(parser, "its scripts")
    scripts.add_argument(
        "--startup-script", metavar="TEXT|@FILE", type=parse_script, help="runs when the VM has booted"
    )
    scripts.add_argument(
        "--env", metavar="K=V", action="append", default=[], help="variable of the startup script; repeatable"
    )
    scripts.add_argument(
        "--transport", choices=("ssh", "tart-guest-agent"), help="how the startup script gets into the VM"
    )
    scripts.add_argument("--shutdown-script", metavar="TEXT|@FILE", type=parse_script, help="runs before the VM ends")
    waiting = parser.add_argument_group("waiting")
    waiting.add_argument("--wait", action="store_true",
        help="wait until it is ready; the exit status is that of its startup script")  # fmt: skip
    waiting.add_argument("--follow", action="store_true", help="print the output of its startup script; implies --wait")
    waiting.add_argument("--timeout", metavar="D", type=parse_duration, help="give up waiting, with exit status 124")
    parser.set_defaults(run=_create_vm)


def parse_script(text: str) -> str:
    """Return a script, which is in a file if the text begins with @."""
    if not text.startswith("@"):
        return text
    try:
        return sys.stdin.read() if text == "@-" else Path(text[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {reason}") from None


def specification(options: argparse.Namespace) -> dict[str, Any]:
    """Return the VM that the options describe, as JSON. Raises CommandError."""
    env = {}
    for pair in options.env:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise CommandError(f'--env is "{pair}", expected NAME=VALUE', USAGE)
        env[name] = value
    if (env or options.transport) and not options.startup_script:
        raise CommandError("--env and --transport need a --startup-script", USAGE)
    vm = {"name": options.name, **given_fields(options)}
    if options.startup_script:
        startup = {"script_content": options.startup_script, "env": env, "transport": options.transport}
        vm["startup_script"] = {name: value for name, value in startup.items() if value}
    if options.shutdown_script:
        vm["shutdown_script"] = {"script_content": options.shutdown_script}
    return vm


def _create_vm(options: argparse.Namespace) -> int:
    wanted = specification(options)
    if options.timeout is not None and not (options.wait or options.follow):
        raise CommandError("--timeout needs --wait or --follow", USAGE)
    # Without strict validation, a controller that does not know a field would ignore what the user asks for.
    query = {"fieldValidation": "strict", **({"queue": "never"} if options.queue == "never" else {})}
    with open_connection(options) as controller:
        if options.follow:
            require_capability(controller, "events-follow", "--follow")
        vm = controller.fetch("POST", "/vms", query=query, body=wanted)
        if not (options.wait or options.follow):
            return 0
        return Waiting(controller, vm, options.timeout).until_ready(follow=options.follow)


def _create_account(options: argparse.Namespace) -> int:
    roles = [role for text in options.roles for role in parse_words(text)]
    with open_connection(options) as controller:
        body = {"name": options.name, "roles": roles, **({"token": options.token} if options.token else {})}
        account = controller.fetch("POST", "/service-accounts", body=body)
    if not options.token:
        print(account["token"])
    if not roles:
        message = (
            f'service account "{options.name}" has no roles, so it may do nothing; delete it and create it with --roles'
        )
        print(f"orchard: {message}", file=sys.stderr)
    return 0


def _create_token(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        body = {"ttlSeconds": options.ttl} if options.ttl is not None else {}
        issued = controller.fetch("POST", path_of("vms", options.name, "access-tokens"), body=body)
    if options.output == "json":
        print_json(issued)
    else:
        print(issued["token"])
    return 0
