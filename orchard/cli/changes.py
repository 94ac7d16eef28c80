"""The verbs that change what is there: update, apply, set, rotate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchard.base.command_line import (
    CommandLine,
    parse_number,
    parse_span,
    parse_words,
)
from orchard.cli.connection import AnswerError, ControllerConnection, path_of
from orchard.cli.context import Contexts, read_contexts, write_contexts
from orchard.cli.failure import USAGE, CommandError, NetworkError
from orchard.cli.options import add_context_option, add_resource_arguments
from orchard.cli.session import chosen_context, context_path, open_connection
from orchard.cli.vm_options import add_update_options

# Bytes of a file of VMs.
_MAX_FILE = 64 * 1024 * 1024


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `update`, `apply`, `set` or `rotate`."""
    {"update": _declare_update, "apply": _declare_apply, "set": _declare_set, "rotate": _declare_rotate}[verb](parser)
    add_context_option(parser)


# ---- update ----------------------------------------------------------------------------------------------------------


def _declare_update(parser: CommandLine) -> None:
    add_resource_arguments(parser, "vm")
    add_update_options(parser)
    parser.set_defaults(run=_update)


def _update(options: argparse.Namespace) -> int:
    patch = {name: value for name, value in vars(options).items() if name not in _OWN_OPTIONS}
    if not patch:
        raise CommandError("nothing to change was given; see orchard update --help", USAGE)
    with open_connection(options) as controller:
        controller.call("PATCH", path_of("vms", options.name), query=_STRICT, body=patch)
    return 0


_OWN_OPTIONS = frozenset({"kind", "name", "run", "context"})
# A controller that does not know a field would ignore it otherwise.
_STRICT = {"fieldValidation": "strict"}


# ---- apply -----------------------------------------------------------------------------------------------------------


def _declare_apply(parser: CommandLine) -> None:
    parser.add_argument(
        "-f", "--file", required=True, help="JSON of a VM, or of a list of them; - reads standard input"
    )
    parser.set_defaults(run=_apply)


def _apply(options: argparse.Namespace) -> int:
    wanted = list(_read_vms(options.file))
    with open_connection(options) as controller:
        for vm in wanted:
            print(f"vm/{vm['name']} {_apply_one(controller, vm)}", flush=True)
    return 0


def _read_json(name: str) -> Any:
    """Return the JSON in a file, or for "-" in standard input. Raises CommandError."""
    try:
        with sys.stdin.buffer if name == "-" else Path(name).open("rb") as file:
            return json.loads(file.read(_MAX_FILE + 1))
    except OSError as error:
        raise CommandError(f"cannot read {name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{name} is not JSON: {error}") from None


def _read_vms(name: str) -> Iterable[dict[str, Any]]:
    """Yield the VMs of a file. Raises CommandError before the first one if one of them cannot be."""
    value = _read_json(name)
    vms = value if isinstance(value, list) else [value]
    for index, vm in enumerate(vms):
        if not isinstance(vm, dict) or not isinstance(vm.get("name"), str) or not vm["name"]:
            raise CommandError(f"VM {index + 1} in {name} is not a JSON object with a name")
    return vms


def _apply_one(controller: ControllerConnection, vm: Mapping[str, Any]) -> str:
    """Create a VM, or change the one of that name, and return what was done."""
    path = path_of("vms", vm["name"])
    try:
        before = controller.fetch("GET", path)
    except AnswerError as error:
        if error.status_code != 404:
            raise
        controller.call("POST", "/vms", query=_STRICT, body=vm)
        return "created"
    after = controller.fetch("PATCH", path, query=_STRICT, body=vm)
    return "changed" if is_changed(vm, before, after) else "unchanged"


def is_changed(fields: Iterable[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether one of the fields of a VM changed. Its version also changes with the reports of its worker."""
    return any(before.get(field) != after.get(field) for field in fields)


# ---- set -------------------------------------------------------------------------------------------------------------


def _declare_set(parser: CommandLine) -> None:
    parser.add_argument("kind", choices=("cluster-settings",), metavar="cluster-settings")
    add = parser.add_argument_group(
        "settings; those that are not given stay", argument_default=argparse.SUPPRESS
    ).add_argument
    add(
        "--host-dir-policies",
        dest="hostDirPolicies",
        metavar="PREFIX[:ro],..",
        type=_parse_policies,
        help='"" allows none',
    )
    add("--scheduler-profile", dest="schedulerProfile", choices=("optimize-utilization", "distribute-load"))
    add("--default-ttl", dest="defaultTTLSeconds", metavar="D", type=parse_span, help="of VMs that name none; 0: none")
    add("--max-ttl", dest="maxTTLSeconds", metavar="D", type=parse_span, help="0: no maximum")
    add(
        "--min-free-disk",
        dest="minFreeDiskGB",
        metavar="GB",
        type=parse_number,
        help="that a worker needs for new VMs; 0: none",
    )
    add("--worker-prune", dest="workerPruneSeconds", metavar="D", type=parse_span,
        help="delete workers without VMs that were offline for this long; 0: never")  # fmt: skip
    add("--prepull", metavar="IMAGE,..", type=_parse_images, help='images that all workers pull in advance; "": none')
    add("--webhooks", metavar="FILE",
        help='file with a JSON array of webhooks, "-" for standard input; "[]": none. A webhook without a secret keeps the'
        " one that its URL has")  # fmt: skip
    parser.set_defaults(run=_set_settings)


def _parse_policies(text: str) -> list[dict[str, Any]]:
    policies: list[dict[str, Any]] = []
    for word in parse_words(text):
        prefix = word.removesuffix(":ro")
        policies.append({"pathPrefix": prefix, **({"ro": True} if prefix != word else {})})
    return policies


def _parse_images(text: str) -> list[dict[str, str]]:
    return [{"image": word} for word in parse_words(text)]


def _read_webhooks(name: str) -> list[dict[str, Any]]:
    """Return the webhooks in a file, or in the text "[]". A secret on a command line would be seen by others."""
    value = [] if name == "[]" else _read_json(name)
    if not isinstance(value, list):
        raise CommandError(f"{name} does not hold a JSON array of webhooks")
    return value


def _set_settings(options: argparse.Namespace) -> int:
    changes = {name: value for name, value in vars(options).items() if name not in _OWN_OPTIONS}
    if not changes:
        raise CommandError("no setting was given; see orchard set --help", USAGE)
    if "webhooks" in changes:
        changes["webhooks"] = _read_webhooks(changes["webhooks"])
    with open_connection(options) as controller:
        before = controller.fetch("GET", "/cluster-settings")
        controller.call("PUT", "/cluster-settings", query=_STRICT, body={**before, **changes})
    return 0


# ---- rotate ----------------------------------------------------------------------------------------------------------


def _declare_rotate(parser: CommandLine) -> None:
    parser.add_argument("kind", choices=("token",), metavar="token")
    parser.add_argument("name", metavar="ACCOUNT")
    parser.set_defaults(run=_rotate)


def _rotate(options: argparse.Namespace) -> int:
    """Replace the token of a service account, and print it. Contexts that hold the old one take the new one over."""
    from orchard.auth import random_token

    token = random_token()
    used = chosen_context(options)
    try:
        with open_connection(options) as controller:
            controller.call("PATCH", path_of("service-accounts", options.name), body={"token": token})
    except NetworkError as error:
        # The controller may have the new one already, which is lost otherwise.
        print(token)
        raise CommandError(f"{error}; the printed token may be in use already, or else the old one") from None
    print(token)
    contexts = read_contexts(context_path())
    changed = {
        name: context._replace(token=token) if (context.url, context.account) == (used.url, options.name) else context
        for name, context in contexts.by_name.items()
    }
    if changed != contexts.by_name:
        write_contexts(context_path(), Contexts(contexts.default, changed))
    return 0
