"""Contexts: which controllers the `orchard` command knows, and with which credentials; the file that holds them.

The file is `orchard.yml` in Orchard's directory, mode 0600. Other programs read it, too:

    default-context: production
    contexts:
      production:
        url: https://orchard.example.com:6120
        certificate: <base64 of the PEM>
        serviceAccountName: ci
        serviceAccountToken: ...

It is written as JSON, which every reader of YAML accepts. It is read as JSON, or as YAML of the shape above, which is
what the existing command writes. ORCHARD_URL, ORCHARD_SERVICE_ACCOUNT_NAME and ORCHARD_SERVICE_ACCOUNT_TOKEN go before
it.
"""

# No `from __future__ import annotations`: NamedTuple would compile each annotation at each start of the command.
import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from orchard.cli.failure import CommandError

CONTEXT_FILE = "orchard.yml"
_DEFAULT, _CONTEXTS = "default-context", "contexts"
_URL, _CERTIFICATE, _ACCOUNT, _TOKEN = "url", "certificate", "serviceAccountName", "serviceAccountToken"
# Bytes. A larger file is not this one.
_MAX_FILE = 4 * 1024 * 1024
# What begins the lines of a longer text in YAML, which may be broken between any two letters of base64.
_BLOCKS = frozenset({"|", "|-", "|+", ">", ">-", ">+"})


class Context(NamedTuple):
    """A controller and the credentials for it. `certificate` is the only one that is trusted, in PEM; None: the host's CAs."""

    url: str
    certificate: bytes | None = None
    account: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"Context(url={self.url!r}, account={self.account!r})"


class Contexts(NamedTuple):
    """The contents of a context file: contexts by name, and the name of the default one ("" if there is none)."""

    default: str = ""
    by_name: Mapping[str, Context] = MappingProxyType({})

    def with_context(self, name: str, context: Context) -> Self:
        """Return the contexts with one more, or with another one of that name. The first one becomes the default."""
        return self._replace(default=self.default or name, by_name={**self.by_name, name: context})

    def without(self, name: str) -> Self:
        """Return the contexts without one. Raises CommandError if there is none of that name."""
        self.find(name)
        left = {other: context for other, context in self.by_name.items() if other != name}
        return self._replace(default="" if self.default == name else self.default, by_name=left)

    def find(self, name: str) -> Context:
        """Return a context. Raises CommandError."""
        if name not in self.by_name:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise CommandError(f'context "{name}" does not exist, expected one of: {known}')
        return self.by_name[name]


def choose_context(contexts: Contexts, environ: Mapping[str, str], name: str = "") -> Context:
    """Return the context to use: the one with that name, or the default one, under what the environment says.

    The credentials of a context are not sent to another URL, and its certificate is not expected there. Raises
    CommandError.
    """
    url, account, token = (
        environ.get(f"ORCHARD_{variable}", "") for variable in ("URL", "SERVICE_ACCOUNT_NAME", "SERVICE_ACCOUNT_TOKEN")
    )
    wanted = name or contexts.default
    if wanted:
        chosen = contexts.find(wanted)
        if url and url != chosen.url:
            chosen = Context(url)
    elif url:
        chosen = Context(url)
    elif contexts.by_name:
        known = ", ".join(sorted(contexts.by_name))
        raise CommandError(f"no context is the default; choose one with: orchard context default NAME, one of: {known}")
    else:
        raise CommandError("no controller is known; add one with: orchard context create URL, or set ORCHARD_URL")
    return chosen._replace(account=account or chosen.account, token=token or chosen.token)


# ---- the file -------------------------------------------------------------------------------------------------------


def read_contexts(path: Path) -> Contexts:
    """Return the contexts of a file; none if it does not exist. Raises CommandError."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except FileNotFoundError:
        return Contexts()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    try:
        if len(raw) > _MAX_FILE:
            raise ValueError(f"it has more than {_MAX_FILE} bytes")
        text = raw.decode()
        value = json.loads(text) if text.lstrip().startswith("{") else _parse_yaml(text)
        return _contexts(value)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not understood: {error}; move it away, and create its contexts anew") from None


def write_contexts(path: Path, contexts: Contexts) -> None:
    """Replace a file durably. Its directory is made if needed. Raises CommandError."""
    # base/files.py needs a Unix.
    from orchard.base.files import write_private

    value: dict[str, Any] = {_CONTEXTS: {name: _to_json(context) for name, context in contexts.by_name.items()}}
    if contexts.default:
        value = {_DEFAULT: contexts.default, **value}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, f"{json.dumps(value, indent=2)}\n".encode())
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def _to_json(context: Context) -> dict[str, str]:
    value = {_URL: context.url}
    if context.certificate is not None:
        value[_CERTIFICATE] = base64.b64encode(context.certificate).decode()
    if context.account:
        value[_ACCOUNT] = context.account
    if context.token:
        value[_TOKEN] = context.token
    return value


def _contexts(value: object) -> Contexts:
    """Return the contexts of a parsed file. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("it holds no contexts")
    default, contexts = value.get(_DEFAULT) or "", value.get(_CONTEXTS) or {}
    if not isinstance(default, str) or not isinstance(contexts, dict):
        raise ValueError(f"expected the texts {_DEFAULT} and {_CONTEXTS}")
    by_name = {name: _context(name, fields) for name, fields in contexts.items()}
    return Contexts(default if default in by_name else "", by_name)


def _context(name: str, fields: object) -> Context:
    if not isinstance(fields, dict) or not all(isinstance(fields.get(key) or "", str) for key in (_URL, *_OPTIONAL)):
        raise ValueError(f'context "{name}" is not a map of texts')
    if not fields.get(_URL):
        raise ValueError(f'context "{name}" has no {_URL}')
    encoded = "".join((fields.get(_CERTIFICATE) or "").split())
    try:
        certificate = base64.b64decode(encoded, validate=True) if encoded else None
    except ValueError:
        raise ValueError(f'the {_CERTIFICATE} of context "{name}" is not base64') from None
    return Context(fields[_URL], certificate, fields.get(_ACCOUNT) or "", fields.get(_TOKEN) or "")


_OPTIONAL = (_CERTIFICATE, _ACCOUNT, _TOKEN)


# ---- YAML of this shape ----------------------------------------------------------------------------------------------


def _parse_yaml(text: str) -> dict[str, Any]:
    """Return the maps and texts of a YAML file that has nothing else. Raises ValueError."""
    lines = [
        (number, len(line) - len(line.lstrip(" ")), line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#") and line.strip() != "---"
    ]
    value, rest = _parse_map(lines, 0)
    if rest:
        raise ValueError(f"line {rest[0][0]} is indented unexpectedly")
    return value


_Lines = list[tuple[int, int, str]]


def _parse_map(lines: _Lines, indent: int) -> tuple[dict[str, Any], _Lines]:
    """Return the map whose keys are indented by `indent`, and the lines after it."""
    value: dict[str, Any] = {}
    while lines and lines[0][1] == indent:
        number, _, line = lines[0]
        key, text = _split_pair(number, line)
        lines = lines[1:]
        below = list(_below(lines, indent))
        if text in _BLOCKS or (below and not text and ":" not in below[0][2]):
            value[key] = "".join(line for _, _, line in below)
            lines = lines[len(below) :]
        elif below and not text:
            value[key], rest = _parse_map(below, below[0][1])
            if rest:
                raise ValueError(f"line {rest[0][0]} is indented unexpectedly")
            lines = lines[len(below) :]
        else:
            value[key] = {} if text == "{}" else text
    return value, lines


def _below(lines: _Lines, indent: int) -> Iterator[tuple[int, int, str]]:
    for line in lines:
        if line[1] <= indent:
            return
        yield line


def _split_pair(number: int, line: str) -> tuple[str, str]:
    """Return the key and the text of a line such as `url: https://...`."""
    if line[:1] in ('"', "'"):
        end = line.find(line[0], 1)
        key, colon, text = line[: end + 1], line[end + 1 : end + 2], line[end + 2 :]
    else:
        key, colon, text = line.partition(":")
    if colon != ":" or (text and not text.startswith(" ")):
        raise ValueError(f'line {number} is not of the form "key: value"')
    return _unquoted(number, key), _unquoted(number, text.strip().removeprefix("!!binary").strip())


def _unquoted(number: int, text: str) -> str:
    if text[:1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            raise ValueError(f"line {number} has a text in quotes that is not understood") from None
    if text[:1] == "'":
        return text[1:-1].replace("''", "'")
    return "" if text in ("~", "null") else text
