"""The verbs that show, delete, pause and resume resources, and how each kind is shown; listing.py lists them.

Existing programs parse what `list` and `get` print: the first column of `list` is the name, the last column of `list
workers` is `true` or `false`, and `get KIND NAME/FIELD` prints the bare value of a field.
"""

# No `from __future__ import annotations`: NamedTuple would compile each annotation at each start of the command.
import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from orchard.base.command_line import CommandLine, parse_span, suggest
from orchard.cli.connection import ControllerConnection, path_of
from orchard.cli.failure import OVERDUE, USAGE, CommandError
from orchard.cli.options import add_context_option, add_filter_option, add_output_option
from orchard.cli.output import format_age, format_json_value, print_json, print_pairs
from orchard.cli.session import chosen_context, open_connection, require_capability

# Between two looks at a worker whose VMs are waited for.
_POLL_SECONDS = 1.0


class ResourceKind(NamedTuple):
    """A kind of resource: its name on the command line, its path in the API, and how it is shown.

    `columns` are those of `list`, `pairs` those of `get`. `cut` is the column that a narrow terminal shortens.
    """

    name: str
    path: str
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
    pairs: Mapping[str, Callable[[Mapping[str, Any]], str]]
    cut: str = ""

    def describe(self, item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield what `get` shows of a resource: titles and values."""
        yield from ((title, show(item)) for title, show in self.pairs.items())
        if self is _VM:
            # Imported here, since the other verbs of this file need no options.
            from orchard.cli.vm_options import OPTION_FIELDS

            for field in ("powerState", *OPTION_FIELDS):
                if field not in _TITLED:
                    yield field, format_json_value(item.get(field))


def _text(field: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda item: format_json_value(item.get(field))


def _flag(field: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda item: format_json_value(bool(item.get(field)))


def _age(field: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda item: format_age(item.get(field))


def _restarts(vm: Mapping[str, Any]) -> str:
    count = vm.get("restart_count", 0)
    return f"{vm.get('restart_policy')} ({count} restart{'' if count == 1 else 's'})"


def _used(worker: Mapping[str, Any]) -> str:
    # Existing programs take "org.cirruslabs.tart-vms: N", wherever it is, for what the worker offers.
    used = worker.get("used") or {}
    return ", ".join(f"{number} {name.removeprefix('org.cirruslabs.')}" for name, number in sorted(used.items()))


def _dirs(vm: Mapping[str, Any]) -> str:
    dirs = vm.get("hostDirs") or ()
    return ", ".join(f"{one.get('name')}:{one.get('path')}{':ro' if one.get('ro') else ''}" for one in dirs)


# The fields of a specification that are shown with titles, or never. All others are shown by their names in JSON.
_TITLED = frozenset(
    {
        *("image", "imagePullPolicy", "cpu", "memory", "diskSize", "headless", "nested", "hostDirs", "randomSerial"),
        *("netSoftnet", "netSoftnetAllow", "netSoftnetBlock", "net-bridged", "restart_policy", "resources", "labels"),
        *("metadata", "password"),
    }
)
_VM = ResourceKind(
    "vm",
    "vms",
    {
        "Name": _text("name"),
        "Created": _age("createdAt"),
        "Image": _text("image"),
        "Status": _text("status"),
        "Restart policy": _restarts,
        "Assigned worker": _text("worker"),
    },
    {
        "Name": _text("name"),
        "Created": _age("createdAt"),
        "Created by": _text("createdBy"),
        "Expires": lambda vm: format_age(vm["expiresAt"]) if vm.get("expiresAt") else "",
        "Image": _text("image"),
        "Image pull policy": _text("imagePullPolicy"),
        "CPU": lambda vm: format_json_value(vm.get("assignedCPU") or vm.get("cpu")),
        "Memory": lambda vm: format_json_value(vm.get("assignedMemory") or vm.get("memory")),
        "Disk size": _text("diskSize"),
        "Softnet enabled": _flag("netSoftnet"),
        "Softnet allowed CIDRs": _text("netSoftnetAllow"),
        "Softnet blocked CIDRs": _text("netSoftnetBlock"),
        "Bridged networking interface": _text("net-bridged"),
        "Headless mode": _flag("headless"),
        "Nested virtualization": _flag("nested"),
        "Status": _text("status"),
        "Status message": _text("status_message"),
        "Startup script's exit code": _text("startupExitCode"),
        "Assigned worker": _text("worker"),
        "Restart policy": _text("restart_policy"),
        "Restarted": _age("restarted_at"),
        "Restart count": lambda vm: format_json_value(vm.get("restart_count", 0)),
        "Resources": _text("resources"),
        "Labels": _text("labels"),
        "Metadata": _text("metadata"),
        "Random serial": _flag("randomSerial"),
        "Host directories": _dirs,
    },
    cut="Image",
)
_WORKER = ResourceKind(
    "worker",
    "workers",
    {
        "Name": _text("name"),
        "Last seen": _age("last_seen"),
        "State": _text("state"),
        "VMs": lambda worker: format_json_value(worker.get("vms", 0)),
        "Scheduling paused": _flag("scheduling_paused"),
    },
    {
        "Name": _text("name"),
        "Created": _age("createdAt"),
        "Last seen": _age("last_seen"),
        "State": _text("state"),
        "Scheduling paused": _flag("scheduling_paused"),
        "Architecture": _text("arch"),
        "Runtime": _text("runtime"),
        "Resources": _text("resources"),
        "Used": _used,
        "VMs": lambda worker: format_json_value(worker.get("vms", 0)),
        "Labels": _text("labels"),
        "Machine ID": lambda worker: str(worker.get("machine_id") or "").strip(),
        "Versions": _text("versions"),
        "Problems": lambda worker: "; ".join(
            f"{one.get('what')}: {one.get('message')}" for one in (worker.get("health") or {}).get("problems") or ()
        ),
    },
)
_ACCOUNT = ResourceKind(
    "service-account",
    "service-accounts",
    {"Name": _text("name"), "Roles": _text("roles")},
    {"Name": _text("name"), "Created": _age("createdAt"), "Roles": _text("roles"), "Token": _text("token")},
)
_SETTINGS = ResourceKind("cluster-settings", "cluster-settings", {}, {})
RESOURCE_KINDS: Mapping[str, ResourceKind] = {kind.name: kind for kind in (_VM, _WORKER, _ACCOUNT, _SETTINGS)}
_PLURALS = {"vms": "vm", "workers": "worker", "service-accounts": "service-account"}


def add_verb(verb: str, parser: CommandLine) -> None:
    """Declare the options of `get`, `delete`, `pause` or `resume`."""
    expected = {
        "get": ("vm", "worker", "service-account", "cluster-settings", *_TOKENS),
        "delete": ("vm", "worker", "service-account"),
    }.get(verb, ("worker",))
    parser.add_argument("kind", metavar="KIND", help=f"one of {', '.join(expected)}")
    parser.completions["kind"] = expected
    if verb == "get":
        parser.add_argument(
            "name",
            metavar="NAME[/FIELD]",
            nargs="?",
            default="",
            help="with FIELD, a name in its JSON: only that field's value",
        )
    else:
        parser.add_argument("name", metavar="NAME", nargs="?" if verb == "delete" else None)
    if verb == "delete":
        add_filter_option(parser, "delete all VMs that match,")
        parser.add_argument("--dry-run", action="store_true", help="print what would be deleted, and delete nothing")
    if verb == "pause":
        parser.add_argument("--wait", metavar="SECONDS", type=parse_span,
            help="wait so long for its VMs to end; exit status 124: some have not ended")  # fmt: skip
    if verb == "get":
        add_output_option(parser, "table", "json", "name")
    add_context_option(parser)
    parser.set_defaults(run={"get": _get, "delete": _delete}.get(verb, _pause), verb=verb)


def find_kind(word: str, allowed: tuple[ResourceKind, ...]) -> ResourceKind:
    """Return the kind with this name, singular or plural. Raises CommandError."""
    kind = RESOURCE_KINDS.get(_PLURALS.get(word, word))
    if kind not in allowed:
        names = [kind.name for kind in allowed]
        raise CommandError(f"the kind is {word}{suggest(word, names)}, expected one of {', '.join(names)}", USAGE)
    return kind


def _get(options: argparse.Namespace) -> int:
    if options.output != "table" and (options.kind in _TOKENS or (options.output == "name" and "/" in options.name)):
        raise CommandError(f"-o {options.output} is for whole resources; a field's value is printed as it is", USAGE)
    if options.kind in _TOKENS:
        if not options.name:
            raise CommandError(f"the name is missing: orchard get {options.kind} NAME", USAGE)
        return _TOKENS[options.kind](options)
    kind = find_kind(options.kind, tuple(RESOURCE_KINDS.values()))
    name, slash, field = options.name.partition("/")
    if not name and kind is not _SETTINGS:
        raise CommandError(f"the name of the {kind.name} is missing", USAGE)
    with open_connection(options) as controller:
        item = controller.fetch("GET", path_of(kind.path, name) if name else path_of(kind.path))
    if slash:
        item = find_field(kind, item, field)
    if options.output == "json":
        print_json(item)
    elif slash:
        print(_bare(item))
    elif options.output == "name":
        print(item.get("name", kind.name))
    else:
        print_pairs(
            kind.describe(item) if kind.pairs else ((key, format_json_value(value)) for key, value in item.items())
        )
    return 0


def _print_bootstrap_token(options: argparse.Namespace) -> int:
    """Print a worker's credentials, with the certificate of the context."""
    from orchard.auth import BootstrapToken

    with open_connection(options) as controller:
        account = controller.fetch("GET", path_of("service-accounts", options.name))
    if not account.get("token"):
        raise CommandError("the controller shows tokens only to accounts that have the role admin:write")
    print(BootstrapToken(account["name"], account["token"], chosen_context(options).certificate))
    return 0


def _print_access_token(options: argparse.Namespace) -> int:
    with open_connection(options) as controller:
        print(controller.fetch("POST", path_of("vms", options.name, "access-tokens"), body={})["token"])
    return 0


_TOKENS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "bootstrap-token": _print_bootstrap_token,
    "vm-access-token": _print_access_token,
}


def find_field(kind: ResourceKind, item: Any, path: str) -> Any:
    """Return the value at a path such as `labels/xcode` in a resource; None if it is absent.

    Existing programs ask for names in other spellings: case, "_" and "-" do not count where no exact name is there.
    Raises CommandError for a field that the kind does not have.
    """
    value = item
    for index, key in enumerate(path.split("/")):
        if isinstance(value, dict):
            spelled = {_letters(name): name for name in value}
            found = key if key in value else spelled.get(_letters(key))
            # Empty fields are left out of answers.
            if found is None and index == 0 and _letters(key) not in map(_letters, known := field_names(kind)):
                raise CommandError(f"a {kind.name} has no field {key}{suggest(key, known)}", USAGE)
            value = value.get(found) if found is not None else None
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            value = None
    return value


def field_names(kind: ResourceKind) -> set[str]:
    # Imported here, since it takes as long as the rest of a verb, and most fields that are asked for are there.
    from orchard import schema
    from orchard.codec import attrs_of

    classes: Mapping[str, tuple[type, ...]] = {
        "vm": (schema.VMMeta, schema.VMSpec, schema.VMState),
        "worker": (schema.Worker,),
        "service-account": (schema.ServiceAccount,),
        "cluster-settings": (schema.ClusterSettings,),
    }
    return {field.json for cls in classes[kind.name] for field in attrs_of(cls)}


def _letters(name: str) -> str:
    return re.sub(r"[_-]", "", name).lower()


def _bare(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _delete(options: argparse.Namespace) -> int:
    kind = find_kind(options.kind, (_VM, _WORKER, _ACCOUNT))
    if options.filter and not options.name and kind is _VM:
        return _delete_matching(options)
    if options.filter or options.dry_run or not options.name:
        raise CommandError("expected a NAME, or --filter for VMs; --dry-run needs --filter", USAGE)
    with open_connection(options) as controller:
        controller.call("DELETE", path_of(kind.path, options.name))
    return 0


def _delete_matching(options: argparse.Namespace) -> int:
    """Delete the VMs that match all filters, and print their names."""
    query = [*(("filter", text) for text in options.filter), *([("dryRun", "true")] if options.dry_run else [])]
    with open_connection(options) as controller:
        require_capability(controller, "vm-metadata", "--filter")
        for name in controller.fetch("DELETE", "/vms", query=query)["deleted"]:
            print(name)
    return 0


def _pause(options: argparse.Namespace) -> int:
    find_kind(options.kind, (_WORKER,))
    with open_connection(options) as controller:
        set_paused(controller, options.name, options.verb == "pause")
        if getattr(options, "wait", None):
            _wait_empty(controller, options.name, options.wait)
    return 0


def _wait_empty(controller: ControllerConnection, worker: str, seconds: int) -> None:
    """Wait until no VM uses a worker. Raises CommandError when some do after `seconds`."""
    deadline = time.monotonic() + seconds
    while number := _count_vms(controller, worker):
        if time.monotonic() >= deadline:
            raise CommandError(f'worker "{worker}" is paused and still has {number} VMs after {seconds} s', OVERDUE)
        time.sleep(_POLL_SECONDS)


def _count_vms(controller: ControllerConnection, worker: str) -> int:
    """Return how many VMs use the resources of a worker. A failed VM does not, and stays in the list until it is deleted."""
    found = controller.fetch("GET", path_of("workers", worker))
    # A controller without the capability `worker-state` does not count them.
    if "state" in found:
        return int(found.get("vms", 0))
    listed = controller.fetch_list("/vms", query={"filter": f"worker={worker}"})
    return sum(vm.get("status") != "failed" for vm in listed)


def set_paused(controller: ControllerConnection, worker: str, paused: bool) -> None:
    """Stop or resume assigning new VMs to a worker."""
    path = path_of("workers", worker)
    controller.call("PUT", path, body={**controller.fetch("GET", path), "scheduling_paused": paused})
