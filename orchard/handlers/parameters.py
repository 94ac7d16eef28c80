"""The query parameters of the API: their names and schemas, and how their values are read.

A parameter is declared here once. The route table (operations.OPERATIONS) lists the declarations for the OpenAPI
document, and the functions below read a request's query by the same declarations. An empty value counts as absent.
They raise HTTPError with status 400 for a parameter that is repeated, missing although it is required, or outside what
its schema accepts.
"""

from __future__ import annotations

import base64
import datetime
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from orchard.codec import add_unknown, parse_time, shortened, shown
from orchard.decisions.goals import Goal
from orchard.net.openapi import Parameter
from orchard.net.request import HTTPError, Query
from orchard.resources.filters import PATHS, VMFilter, parse_filter
from orchard.schema import OS, Arch, Runtime
from orchard.ssh import exec as vm_exec
from orchard.state.change_log import WatchedKind

# The largest `limit`: more events than a VM can have.
_MAX_LIMIT = 1_000_000_000
# Seconds that a port forward waits by default and at most.
_DEFAULT_WAIT, _MAX_WAIT = 10, 65_535
# Characters of a text: why a worker could not do something, a name, an address.
_MAX_TEXT = 4096
_DIGITS = re.compile(r"[0-9]{1,10}")

# The texts that Go's strconv.ParseBool accepts.
_FLAGS = {
    **dict.fromkeys(("1", "t", "T", "true", "True", "TRUE"), True),
    **dict.fromkeys(("0", "f", "F", "false", "False", "FALSE"), False),
}

# The objects of a watch, by the value of `kinds`.
_KINDS: dict[str, WatchedKind] = {"vms": "vm", "workers": "worker"}

_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}


def _whole(least: int, most: int, **more: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most, **more}


WATCH = Parameter("watch", "Stream the VM's changes as ADDED, MODIFIED and DELETED notifications", _FLAG)
FILTER = Parameter(
    "filter",
    "Only the VMs for which all conditions hold: `PATH=VALUE` or `PATH!=VALUE`, with commas between them. PATH is one of"
    f" {', '.join(PATHS)}, and the VALUE of `name` may end in `*`. `%` and `,` inside VALUE are percent-encoded once more."
    " May be repeated",
    _TEXT,
)
VM_LIMIT = Parameter("limit", "Maximum number of VMs to return, in the order of their names", _whole(1, _MAX_LIMIT))
WAIT_FOR = Parameter(
    "waitFor",
    "Wait until the VM is so, and then answer: `running`; `ready`: its startup script has succeeded; `failed`; `stopped`:"
    " it was stopped or suspended; `deleted`",
    {"type": "string", "enum": list(get_args(Goal))},
)
WAIT_VM = Parameter("wait", "Seconds to wait with `waitFor`", _whole(0, _MAX_WAIT, default=60))
CONTINUE = Parameter("continue", "Opaque token from the X-Continue response header", _TEXT)
DRY_RUN = Parameter("dryRun", "Return what would be deleted, and delete nothing", _FLAG)
WATCH_LIST = Parameter(
    "watch", "Stream the objects, then their changes, as lines of JSON: ADDED, MODIFIED, DELETED and BOOKMARK", _FLAG
)
IMAGES = Parameter(
    "images",
    "Whether to show the images on the workers' disks",
    {"type": "string", "enum": ["true", "false"]},
)
WATCH_KINDS = Parameter("kinds", "`vms`, `workers` or both with a comma between them (default)", _TEXT)
WATCH_ALL = (WATCH_KINDS, FILTER, IMAGES)
SINCE = Parameter("since", "Of a watch: only what came after this revision, as X-Revision or a line has told it", _TEXT)
SILENCE = Parameter(
    "silence", "Seconds of silence after which a BOOKMARK is sent; absent: those of the controller", _whole(1, 60)
)
EVENT_KINDS = Parameter(
    "kinds", "Show only events of these kinds, with commas between them; absent: all but `lifecycle`", _TEXT
)
FOLLOW = Parameter(
    "follow", "Stream the events, one a line with its `cursor`, and those that come, until the VM is deleted", _FLAG
)
UNTIL = Parameter(
    "until",
    "End the stream earlier: when the VM is `ready` or cannot be any more, or when it has `ended`, which is also when it was"
    " stopped or has failed and is not restarted",
    {"type": "string", "enum": ["deleted", "ready", "ended"]},
)
SINCE_TIME = Parameter(
    "since", "Only VMs that ended at this RFC 3339 time or later", {"type": "string", "format": "date-time"}
)
LIMIT_HISTORY = Parameter(
    "limit",
    "Maximum number of VMs: the first ones from `since` on, or without `since` the last ones",
    _whole(1, 10_000),
)
LIMIT = Parameter("limit", "Maximum number of events to return", _whole(1, _MAX_LIMIT))
ORDER = Parameter("order", "Sort order of events; asc (default) or desc", {"type": "string", "enum": ["asc", "desc"]})
CURSOR = Parameter("cursor", "Opaque cursor from the X-Next-Cursor response header, or of a line of `follow`", _TEXT)
UID = Parameter("uid", "Answer 404 if the VM of that name has another uid", _TEXT)
PORT_NUMBER = Parameter("port", "TCP port number to connect to", _whole(1, 65535), required=True)
WAIT_FORWARD = Parameter(
    "wait",
    "Seconds to wait for the VM to run and for its worker to connect",
    _whole(0, _MAX_WAIT, default=_DEFAULT_WAIT),
)
WAIT_ADDRESS = Parameter("wait", WAIT_FORWARD.doc, _whole(0, _MAX_WAIT, default=0))
COMMAND = Parameter("command", "Command line for the user's shell in the VM", _TEXT, required=True)
INTERACTIVE = Parameter("interactive", "Whether the command reads stdin", _FLAG)
STDIN = Parameter("stdin", "Another name of `interactive`", _FLAG)
TTY = Parameter("tty", "Whether the command gets a terminal", _FLAG)
ROWS = Parameter("rows", "Rows of the terminal", _whole(1, vm_exec.MAX_TERMINAL_SIZE))
COLS = Parameter("cols", "Columns of the terminal", _whole(1, vm_exec.MAX_TERMINAL_SIZE))
WORKDIR = Parameter("workdir", "Directory to run the command in", _TEXT)
SESSION = Parameter("session", "The session of the action that is answered", _TEXT)
ERROR_MESSAGE = Parameter("errorMessage", "Why the action failed; empty: it succeeded", _TEXT)
RESOLVED_ADDRESS = Parameter("ip", "The VM's address", _TEXT)
WORKER_NAME = Parameter("workerName", "The worker that watches", _TEXT, required=True)

QUEUE = Parameter(
    "queue",
    "`never`: create nothing if the VM would have to wait for a worker (503, or 412 if it would wait for ever)",
    {"type": "string", "enum": ["allow", "never"]},
)
_PAIRS = "; a comma and a percent sign in a name or a value are percent-encoded"
RESOURCES = Parameter("resources", f"`NAME=NUMBER,...`: resources of the VM{_PAIRS}", _TEXT)
LABELS = Parameter("labels", f"`NAME=VALUE,...`: labels that the VM requires{_PAIRS}", _TEXT)
ARCH = Parameter("arch", "Processor architecture", {"type": "string", "enum": [*get_args(Arch)]})
RUNTIME = Parameter("runtime", "Hypervisor command", {"type": "string", "enum": [*get_args(Runtime)]})
GUEST_OS = Parameter("os", "Operating system of the image", {"type": "string", "enum": [*get_args(OS)]})

FIELD_VALIDATION = Parameter(
    "fieldValidation",
    "`strict`: refuse a request with an unknown field or parameter, instead of naming it in the header Warning",
    {"type": "string", "enum": ["warn", "strict"]},
)

# The parameters of operations with several.
VMS = (FILTER, VM_LIMIT, CONTINUE, WATCH_LIST, SINCE)
ONE_VM = (WATCH, WAIT_FOR, WAIT_VM, UID)
BULK_DELETION = (replace(FILTER, required=True), DRY_RUN)
SHAPE = (RESOURCES, LABELS, ARCH, RUNTIME, GUEST_OS)
FORWARD = (PORT_NUMBER, WAIT_FORWARD)
EXEC = (COMMAND, INTERACTIVE, STDIN, TTY, ROWS, COLS, WORKDIR, WAIT_FORWARD)
PAGE = (LIMIT, ORDER, CURSOR, EVENT_KINDS, FOLLOW, UNTIL)
HISTORY = (SINCE_TIME, LIMIT_HISTORY)
ANSWER_IP = (SESSION, RESOLVED_ADDRESS, ERROR_MESSAGE)


def unknown_parameters(query: Query, known: Sequence[Parameter]) -> list[str]:
    """Return the unknown parameters of a query, as by codec.add_unknown. `env[NAME]` is known where `command` is."""
    names = [FIELD_VALIDATION.name, *[parameter.name for parameter in known]]
    unknown: list[str] = []
    for name in query.parameters():
        if name not in names and not (COMMAND in known and name.startswith("env[")):
            add_unknown(unknown, name, names)
    return unknown


def read_text(query: Query, parameter: Parameter) -> str:
    """Return a parameter's text, or its beginning if it is long; empty if it is absent and not required."""
    text = query.one(parameter.name) or ""
    if parameter.required and not text:
        raise HTTPError(400, f"{parameter.name} is missing, expected a string: {parameter.doc}")
    return shortened(text, _MAX_TEXT)


def read_flag(query: Query, parameter: Parameter) -> bool:
    """Return a parameter's truth value; False if it is absent."""
    value = query.one(parameter.name)
    if not value:
        return False
    if value not in _FLAGS:
        raise HTTPError(400, f"{parameter.name} is {shown(value)}, expected true or false")
    return _FLAGS[value]


def read_choice(query: Query, parameter: Parameter) -> str:
    """Return one of a parameter's choices; the first one if it is absent."""
    choices: list[str] = parameter.schema["enum"]
    value = query.one(parameter.name) or choices[0]
    if value not in choices:
        raise HTTPError(400, f"{parameter.name} is {shown(value)}, expected one of {', '.join(choices)}")
    return value


def shows_images(query: Query) -> bool:
    return read_choice(query, IMAGES) == "true"


def read_pairs(query: Query, parameter: Parameter) -> dict[str, str]:
    """Return the values by name of `NAME=VALUE,...`; empty if it is absent."""
    pairs: dict[str, str] = {}
    for part in filter(None, (query.one(parameter.name) or "").split(",")):
        name, equals, value = part.partition("=")
        name = urllib.parse.unquote(name)
        if not name or not equals or name in pairs:
            raise HTTPError(400, f"{parameter.name} has {shown(part)}, expected NAME=VALUE, each NAME once")
        pairs[name] = urllib.parse.unquote(value)
    return pairs


def read_number(query: Query, parameter: Parameter) -> int | None:
    """Return a parameter's number; if it is absent, its default, or None without a default."""
    value = query.one(parameter.name) or None
    if value is None and not parameter.required:
        return parameter.schema.get("default")
    least, most = parameter.schema["minimum"], parameter.schema["maximum"]
    if value is None or not _DIGITS.fullmatch(value) or not least <= int(value) <= most:
        found = "missing" if value is None else shown(value)
        raise HTTPError(400, f"{parameter.name} is {found}, expected a whole number from {least} to {most}")
    return int(value)


def read_count(query: Query, parameter: Parameter) -> int:
    """Return the number of a parameter that is required or has a default."""
    number = read_number(query, parameter)
    assert number is not None
    return number


def read_goal(query: Query) -> Goal | None:
    """Return the state of a VM that a request waits for, None without `waitFor`."""
    if not query.one(WAIT_FOR.name):
        return None
    if read_flag(query, WATCH):
        raise HTTPError(400, "watch and waitFor are both given, expected one of them")
    return cast("Goal", read_choice(query, WAIT_FOR))


def read_names(query: Query, parameter: Parameter) -> list[str]:
    """Return the names in a parameter's text, between commas; none if it is absent."""
    text = read_text(query, parameter)
    names = text.split(",") if text else []
    if not all(names):
        raise HTTPError(400, f"{parameter.name} is {shown(text)}, expected names with commas between them")
    return names


def read_time(query: Query, parameter: Parameter) -> datetime.datetime | None:
    """Return a parameter's time; None if it is absent. Raises MalformedError."""
    text = query.one(parameter.name)
    return parse_time(text, parameter.name) if text else None


def read_filter(query: Query) -> VMFilter:
    """Return the filter of all `filter` parameters. Raises MalformedError."""
    return parse_filter(query.parameters().get(FILTER.name, ()))


def read_kinds(query: Query) -> frozenset[WatchedKind]:
    """Return the kinds of objects that `kinds` names; all if it is absent."""
    text = query.one(WATCH_KINDS.name) or ",".join(_KINDS)
    if unknown := [name for name in text.split(",") if name not in _KINDS]:
        raise HTTPError(400, f"kinds has {shown(unknown[0])}, expected {' or '.join(_KINDS)}, or both with a comma")
    return frozenset(_KINDS[name] for name in text.split(","))


def read_bulk_filter(query: Query) -> VMFilter:
    """Return the filter of a bulk deletion. A text that may have lost its value is refused. Raises MalformedError, too."""
    texts = query.parameters().get(FILTER.name, ())
    wanted = parse_filter(texts)
    if not wanted or "" in texts:
        raise HTTPError(400, "filter is missing or empty, expected a filter of the VMs to delete, such as name=ci-*")
    for condition in wanted.conditions:
        if not condition.value or (condition.path, condition.value) == ("name", "*"):
            raise HTTPError(400, f"filter has {shown(str(condition))}, expected a value that not every VM may have")
    return wanted


def continue_token(name: str) -> str:
    """Return the token with which the next page begins after the VM of that name."""
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def read_continue(query: Query) -> str:
    """Return the name of the VM that the page begins after; "" at the first page."""
    token = query.one(CONTINUE.name)
    if not token:
        return ""
    try:
        name = base64.b64decode(f"{token}===", altchars=b"-_").decode()
    except ValueError:
        name = ""
    if continue_token(name) != token:
        raise HTTPError(400, f"continue is {shown(token)}, expected the value of X-Continue of the page before")
    return name


def read_command(query: Query) -> vm_exec.Command:
    """Return the command of an exec request; `env[NAME]` parameters are its environment. Raises MalformedError, too."""
    env = {
        name.removeprefix("env[").removesuffix("]"): query.one(name) or ""
        for name in query.parameters()
        if name.startswith("env[") and name.endswith("]")
    }
    line, session = query.one(COMMAND.name) or "", query.one(SESSION.name)
    if session and not line:
        # Other controllers let a client come back to its command.
        raise HTTPError(404, f"session {shown(session)} does not exist: a command ends with its connection")
    command = vm_exec.Command(
        command=line,
        interactive=read_flag(query, INTERACTIVE) or read_flag(query, STDIN),
        tty=read_flag(query, TTY),
        rows=read_number(query, ROWS) or vm_exec.DEFAULT_ROWS,
        cols=read_number(query, COLS) or vm_exec.DEFAULT_COLS,
        env=env,
        workdir=query.one(WORKDIR.name) or "",
    )
    command.check()
    return command
