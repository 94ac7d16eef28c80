"""The options of `create vm` and `update vm` that are fields of a VM, in one table."""

# No `from __future__ import annotations`: NamedTuple would compile each annotation at each start of the command.
import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from orchard.base.command_line import (
    parse_boolean,
    parse_number,
    parse_pairs,
    parse_resources,
    parse_span,
    parse_words,
)

# What an option's value must be for the field to be removed.
_NONE = "none"


class VMOption:
    """An option whose value is a field of a VM, by its name in JSON. `settings` are arguments of `add_argument`.

    `change` is that of the field in schema.py, which is not imported: a verb would take longer.
    """

    def __init__(self, flag: str, field: str, settings: Mapping[str, Any], change: str = "refused") -> None:
        self.flag = flag
        self.field = field
        self.settings = settings
        self.change = change


def _parse_host_dirs(text: str) -> list[dict[str, Any]]:
    """Return the host directories of a text such as `src:/Users/ci/src:ro,out:/Users/ci/out`, as `tart run --dir` has them."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([^:]+):(https://[^:]+(?::\d+[^:]*)?|[^:]+)(:ro)?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f'the directory is "{part}", expected NAME:PATH or NAME:PATH:ro')
        found.append({"name": match[1], "path": match[2], **({"ro": True} if match[3] else {})})
    return found


def _flag(about: str, *, default: bool = False) -> dict[str, Any]:
    shown = f"{about}; default: %(default)s"
    return {"metavar": "BOOL", "type": parse_boolean, "nargs": "?", "const": True, "default": default, "help": shown}


def _size(metavar: str, default: int) -> dict[str, Any]:
    shown = "0: the worker's default; default: %(default)s"
    return {"metavar": metavar, "type": parse_number, "default": default, "help": shown}


_SPAN = {"metavar": "D", "type": parse_span}
_PAIRS = {"metavar": "K=V,..", "type": parse_pairs}
_NETWORKS = {"metavar": "CIDR,..", "type": parse_words}
_IMAGE = {"default": "ghcr.io/cirruslabs/macos-tahoe-base:latest", "help": "default: %(default)s"}

# fmt: off
# By the groups of `create vm --help`.
VM_OPTIONS: Mapping[str, tuple[VMOption, ...]] = {
    "its specification": (
        VMOption("--image", "image", _IMAGE),
        VMOption("--image-pull-policy", "imagePullPolicy", {"choices": ("IfNotPresent", "Always")}),
        VMOption("--cpu", "cpu", _size("N", 4), "boot"),
        VMOption("--memory", "memory", _size("MIB", 8192), "boot"),
        VMOption("--disk-size", "diskSize",
                 {"metavar": "GB", "type": parse_number, "help": "it can only grow"}, "boot"),
        VMOption("--os", "os", {"choices": ("darwin", "linux")}),
        VMOption("--arch", "arch", {"choices": ("arm64", "amd64")}),
        VMOption("--runtime", "runtime", {"choices": ("tart", "vetu")}),
        VMOption("--headless", "headless", _flag("run without graphics", default=True), "boot"),
        VMOption("--nested", "nested", _flag("allow virtual machines in it"), "boot"),
        VMOption("--suspendable", "suspendable", _flag("start it so that it can be suspended"), "boot"),
        VMOption("--random-serial", "randomSerial", _flag("give it a random serial number")),
        VMOption("--net-softnet", "netSoftnet", _flag("isolate its network"), "boot"),
        VMOption("--audio", "audio", _flag("share the host's sound")),
        VMOption("--clipboard", "clipboard", _flag("share the host's clipboard")),
        VMOption("--net-softnet-allow", "netSoftnetAllow", _NETWORKS, "boot"),
        VMOption("--net-softnet-block", "netSoftnetBlock", _NETWORKS, "boot"),
        VMOption("--net-bridged", "net-bridged", {"metavar": "INTERFACE"}, "boot"),
        VMOption("--username", "username", {}),
        VMOption("--password", "password", {}),
        VMOption("--resources", "resources",
                 {"metavar": "K=N,..", "type": parse_resources, "help": "what it needs of its worker"}),
        VMOption("--labels", "labels", {**_PAIRS, "help": "labels that its worker must have"}),
        VMOption("--preferred-labels", "preferredLabels",
                 {**_PAIRS, "help": "labels that its worker should have"}, "at once"),
        VMOption("--host-dirs", "hostDirs", {"metavar": "NAME:PATH[:ro],..", "type": _parse_host_dirs}, "boot"),
    ),
    "its life": (
        VMOption("--ttl", "ttlSeconds", {**_SPAN, "help": "delete it after this time, for example 2h"}, "at once"),
        VMOption("--pending-timeout", "pendingTimeoutSeconds",
                 {**_SPAN, "help": "fail it if no worker takes it"}, "at once"),
        VMOption("--priority", "priority",
                 {"metavar": "N", "type": parse_number, "help": "place in the queue: the highest first"}, "at once"),
        VMOption("--restart-policy", "restart_policy", {"choices": ("Never", "OnFailure")}),
        VMOption("--metadata", "metadata", {**_PAIRS, "help": "your own facts about it"}, "at once"),
    ),
    "its scripts": (
        VMOption("--startup-timeout", "startupTimeoutSeconds", _SPAN),
        VMOption("--startup-on-failure", "startupOnFailure", {"choices": ("fail", "keep")}),
        VMOption("--shutdown-timeout", "shutdownTimeoutSeconds", _SPAN, "at once"),
    ),
}
# fmt: on
_ALL = tuple(option for group in VM_OPTIONS.values() for option in group)
OPTION_FIELDS = tuple(option.field for option in _ALL)


def add_create_options(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Declare the options of a group of VM_OPTIONS, and return the group."""
    group = parser.add_argument_group(title)
    for option in VM_OPTIONS[title]:
        group.add_argument(option.flag, dest=option.field, **option.settings)
    return group


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a new VM that the options name, as JSON. What is left out has its default."""
    values = {option.field: getattr(options, option.field) for option in _ALL}
    return {field: value for field, value in values.items() if value not in (None, False, [], {})}


def add_update_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of all fields that can be changed. Those that are not given are not in the parsed options."""
    for change, title in (
        ("at once", "what applies at once; none removes it, and K= removes K"),
        ("boot", "what applies at the next boot, which is made"),
    ):
        group = parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
        for option in _ALL:
            if option.change == change:
                parse = option.settings.get("type", str)
                parse = parse if change == "boot" else _parse_changes if parse is parse_pairs else _or_none(parse)
                about, metavar = option.settings.get("help", "").partition("; default")[0], option.settings["metavar"]
                group.add_argument(option.flag, dest=option.field, metavar=metavar, type=parse, help=about)


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that returns None for "none", and otherwise what `parse` does."""
    return lambda text: None if text == _NONE else parse(text)


def _parse_changes(text: str) -> dict[str, str | None]:
    return {key: value or None for key, value in parse_pairs(text).items()}
