"""The verb `create`: a VM, a service account, or an access token for a VM."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from orchard.base.command_line import (
    CommandLine,
    parse_boolean,
    parse_duration,
    parse_number,
    parse_pairs,
    parse_resources,
    parse_span,
    parse_words,
)
from orchard.cli.connection import path_of
from orchard.cli.failure import USAGE, CommandError
from orchard.cli.options import add_context_option, add_output_option
from orchard.cli.output import print_json
from orchard.cli.session import open_connection, require_capability
from orchard.cli.waiting import Waiting

_IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
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
    token.add_argument("kind", choices=("vm",))
    token.add_argument("name", metavar="NAME")
    token.add_argument("--ttl", metavar="D", type=parse_duration, help="for how long, for example 8h; default: 24h")
    add_output_option(token, "token", "json")
    token.set_defaults(run=_create_token)
    for each in (vm, account, token):
        add_context_option(each)


def _add_vm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    _add_specification(parser)
    lifetime = parser.add_argument_group("its life")
    lifetime.add_argument("--ttl", metavar="D", type=parse_span, help="delete it after this time, for example 2h")
    lifetime.add_argument("--pending-timeout", metavar="D", type=parse_span, help="fail it if no worker takes it")
    lifetime.add_argument("--queue", choices=("wait", "never"), default="wait",
        help="never: do not create it unless a worker can take it now; default: %(default)s")  # fmt: skip
    lifetime.add_argument("--priority", metavar="N", type=parse_number, help="place in the queue: the highest first")
    lifetime.add_argument("--restart-policy", choices=("Never", "OnFailure"))
    lifetime.add_argument("--metadata", metavar="K=V,..", type=parse_pairs, default={}, help="your own facts about it")
    scripts = parser.add_argument_group("its scripts")
    scripts.add_argument(
        "--startup-script", metavar="TEXT|@FILE", type=parse_script, help="runs when the VM has booted"
    )
    scripts.add_argument(
        "--env", metavar="K=V", action="append", default=[], help="variable of the startup script; repeatable"
    )
    scripts.add_argument("--startup-timeout", metavar="D", type=parse_span)
    scripts.add_argument("--startup-on-failure", choices=("fail", "keep"))
    scripts.add_argument(
        "--transport", choices=("ssh", "tart-guest-agent"), help="how the startup script gets into the VM"
    )
    scripts.add_argument("--shutdown-script", metavar="TEXT|@FILE", type=parse_script, help="runs before the VM ends")
    scripts.add_argument("--shutdown-timeout", metavar="D", type=parse_span)
    waiting = parser.add_argument_group("waiting")
    waiting.add_argument("--wait", action="store_true",
        help="wait until it is ready; the exit status is that of its startup script")  # fmt: skip
    waiting.add_argument("--follow", action="store_true", help="print the output of its startup script; implies --wait")
    waiting.add_argument("--timeout", metavar="D", type=parse_duration, help="give up waiting, with exit status 124")
    parser.set_defaults(run=_create_vm)


def _add_specification(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("its specification").add_argument
    add("--image", default=_IMAGE, help="default: %(default)s")
    add("--image-pull-policy", choices=("IfNotPresent", "Always"))
    add("--cpu", metavar="N", type=parse_number, default=4, help="0: the worker's default; default: %(default)s")
    add(
        "--memory", metavar="MIB", type=parse_number, default=8192, help="0: the worker's default; default: %(default)s"
    )
    add("--disk-size", metavar="GB", type=parse_number)
    add("--os", choices=("darwin", "linux"))
    add("--arch", choices=("arm64", "amd64"))
    add("--runtime", choices=("tart", "vetu"))
    for option, about in (
        ("headless", "run without graphics"),
        ("nested", "allow virtual machines in it"),
        ("suspendable", "start it so that it can be suspended"),
        ("random-serial", "give it a random serial number"),
        ("net-softnet", "isolate its network"),
        ("audio", "share the host's sound"),
        ("clipboard", "share the host's clipboard"),
    ):
        shown = f"{about}; default: %(default)s"
        add(
            f"--{option}",
            type=parse_boolean,
            nargs="?",
            const=True,
            default=option == "headless",
            metavar="BOOL",
            help=shown,
        )
    add("--net-softnet-allow", metavar="CIDR,..", type=parse_words, default=[])
    add("--net-softnet-block", metavar="CIDR,..", type=parse_words, default=[])
    add("--net-bridged", metavar="INTERFACE")
    add("--username")
    add("--password")
    add("--resources", metavar="K=N,..", type=parse_resources, default={}, help="what it needs of its worker")
    add("--labels", metavar="K=V,..", type=parse_pairs, default={}, help="labels that its worker must have")
    add("--preferred-labels", metavar="K=V,..", type=parse_pairs, default={}, help="labels that its worker should have")
    add("--host-dirs", metavar="NAME:PATH[:ro],..", type=parse_host_dirs, default=[])


def parse_script(text: str) -> str:
    """Return a script, which is in a file if the text begins with @."""
    if not text.startswith("@"):
        return text
    try:
        return sys.stdin.read() if text == "@-" else Path(text[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"cannot read {text[1:]}: {reason}") from None


def parse_host_dirs(text: str) -> list[dict[str, Any]]:
    """Return the host directories of a text such as `src:/Users/ci/src:ro,out:/Users/ci/out`, as `tart run --dir` has them."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([^:]+):(https://[^:]+(?::\d+[^:]*)?|[^:]+)(:ro)?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f'the directory is "{part}", expected NAME:PATH or NAME:PATH:ro')
        found.append({"name": match[1], "path": match[2], **({"ro": True} if match[3] else {})})
    return found


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
    startup = {"script_content": options.startup_script, "env": env, "transport": options.transport}
    shutdown = {"script_content": options.shutdown_script}
    fields = {
        "name": options.name,
        "image": options.image,
        "imagePullPolicy": options.image_pull_policy,
        "cpu": options.cpu,
        "memory": options.memory,
        "diskSize": options.disk_size,
        "os": options.os,
        "arch": options.arch,
        "runtime": options.runtime,
        "headless": options.headless,
        "nested": options.nested,
        "suspendable": options.suspendable,
        "randomSerial": options.random_serial,
        "netSoftnet": options.net_softnet,
        "netSoftnetAllow": options.net_softnet_allow,
        "netSoftnetBlock": options.net_softnet_block,
        "net-bridged": options.net_bridged,
        "audio": options.audio,
        "clipboard": options.clipboard,
        "username": options.username,
        "password": options.password,
        "resources": options.resources,
        "labels": options.labels,
        "preferredLabels": options.preferred_labels,
        "hostDirs": options.host_dirs,
        "restart_policy": options.restart_policy,
        "startup_script": {name: value for name, value in startup.items() if value} if options.startup_script else None,
        "shutdown_script": shutdown if options.shutdown_script else None,
        "ttlSeconds": options.ttl,
        "pendingTimeoutSeconds": options.pending_timeout,
        "startupTimeoutSeconds": options.startup_timeout,
        "startupOnFailure": options.startup_on_failure,
        "shutdownTimeoutSeconds": options.shutdown_timeout,
        "priority": options.priority,
        "metadata": options.metadata,
    }
    # What is left out has its default.
    return {name: value for name, value in fields.items() if value not in (None, False, [], {})}


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
