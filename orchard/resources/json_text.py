"""A fast conversion of resources to the JSON that is stored and shown, and back. Each start and each change uses it.

The codec (codec.py) reads any JSON, and decides what is valid and what an error says. This file reads only JSON in the
form that this product writes, and `decode_stored` passes any other to the codec. Zero values are not written, unless
their field promises a default; of an optional field, None is the zero value.

For each class, a function that reads its fields and one that writes them are composed as source text, a few lines for
each field, and compiled once: a loop over the declarations takes twice as long (./run bench start).
"""

from __future__ import annotations

import datetime
import functools
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from json.encoder import encode_basestring
from typing import Any, Literal

from orchard.codec import (
    OPTIONAL,
    MalformedError,
    ResourceT,
    ValidationError,
    attrs_of,
    decode,
    dump_json,
    format_time,
    json_names,
    keeps_unknown,
    parse_time,
)


class _UnusualError(MalformedError):
    """A value is not as this product writes it."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def decode_stored(cls: type[ResourceT], raw: Any, also: frozenset[str] = frozenset()) -> ResourceT:
    """Do what `codec.decode` does. `also` are names of fields that belong to others. Raises ValidationError."""
    try:
        found: ResourceT = _reader(typing.cast("Any", cls), also)(raw)
    except ValidationError:
        return decode(cls, raw, also)
    return found


@functools.cache
def _reader(cls: Any, also: frozenset[str]) -> Callable[[Any], Any]:
    """Return the function that makes an instance of a JSON object. It raises ValidationError."""
    names: dict[str, Any] = {"cls": cls, "known": json_names(cls) | also, "UnusualError": _UnusualError}
    lines = [
        "def read(raw):",
        " if type(raw) is not dict or not known.issuperset(raw): raise UnusualError",
        " get = raw.get",
    ]
    zeros = {field.name: field for field in fields(cls)}
    for number, attr in enumerate(attrs_of(cls)):
        value, names[f"zero{number}"] = f"value{number}", zeros[attr.name].default
        if attr.required:
            absent = "raise UnusualError"
        elif zeros[attr.name].default is MISSING:
            absent = f"{value} = {{}}"
        else:
            absent = f"{value} = zero{number}"
        lines += [f" {value} = get({attr.json!r})", f" if {value} is None: {absent}"]
        plain = str if attr.options else attr.type if attr.type in (str, bool, int) else None
        if plain is None:
            names[f"read{number}"] = _reader_of(attr.type, attr.maximum)
            lines.append(f" else: {value} = read{number}({value})")
        else:
            names[f"options{number}"] = attr.options
            wrong = [f"type({value}) is not {plain.__name__}"]
            wrong += [f"not 0 <= {value} <= {attr.maximum}"] if plain is int else []
            wrong += [f"{value} not in options{number}"] if attr.options else []
            lines.append(f" elif {' or '.join(wrong)}: raise UnusualError")
    arguments = ", ".join(f"{attr.name}=value{number}" for number, attr in enumerate(attrs_of(cls)))
    return _compiled([*lines, f" return cls({arguments})"], names, "read")


def _reader_of(hint: Any, maximum: int) -> Callable[[Any], Any]:
    """Return the function that reads a value of a type. It raises ValidationError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is datetime.datetime:
        return lambda value: parse_time(_expect(str, value), "")
    if origin in OPTIONAL:
        return _reader_of(arguments[0], maximum)
    if origin is tuple:
        read = _reader_of(arguments[0], maximum)
        return lambda value: tuple([read(item) for item in _expect(list, value)])
    if origin is Mapping:
        read = _reader_of(arguments[1], maximum)
        return lambda value: {key: read(item) for key, item in _expect(dict, value).items()}
    if hint in (str, bool, int) or origin is Literal:
        return functools.partial(_read_plain, str if origin is Literal else hint, arguments, maximum)
    return _reader(hint, frozenset())


def _read_plain(kind: Any, options: tuple[str, ...], maximum: int, value: Any) -> Any:
    if type(value) is not kind or (kind is int and not 0 <= value <= maximum) or (options and value not in options):
        raise _UnusualError
    return value


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise _UnusualError
    return value


# ---- writing ---------------------------------------------------------------------------------------------------------


def dump_resource(resource: Any) -> bytes:
    """Return a resource as JSON."""
    return object_of(members(resource)).encode()


def encode(resource: Any) -> dict[str, Any]:
    """Return a resource as a parsed JSON object."""
    found: dict[str, Any] = json.loads(dump_resource(resource))
    return found


def members(resource: Any) -> list[str]:
    """Return the members of a resource's JSON object, each a name with its value."""
    return _writer(typing.cast("Any", type(resource)))(resource)


def object_of(parts: list[str]) -> str:
    """Return the JSON object that has these members."""
    return "{" + ",".join(parts) + "}"


@functools.cache
def _writer(cls: type) -> Callable[[Any], list[str]]:
    """Return the function that does what `members` does for a class."""
    names: dict[str, Any] = {"other_members": _other_members}
    lines = ["def write(resource):", " out = []"]
    for number, attr in enumerate(attrs_of(cls)):
        names[f"write{number}"] = _writer_of(attr.type)
        lines.append(f" value = resource.{attr.name}")
        if attr.default is None:
            lines.append(f" if value{' is not None' if attr.is_optional() else ''}:")
            indent = "  "
        else:
            indent = " "
        text = f"write{number}(value)"
        if attr.twin:
            lines.append(f"{indent}text = {text}")
            text = "text"
        beginnings = [f"{encode_basestring(name)}:" for name in (attr.json, attr.twin) if name]
        lines += [f"{indent}out.append({beginning!r} + {text})" for beginning in beginnings]
    if keeps_unknown(cls):
        lines.append(" if resource.unknown: out += other_members(resource.unknown)")
    return _compiled([*lines, " return out"], names, "write")


def _writer_of(hint: Any) -> Callable[[Any], str]:
    """Return the function that writes a value of a type as JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is str or origin is Literal:
        return encode_basestring
    if hint is bool:
        return lambda value: "true" if value else "false"
    if hint is int:
        return repr
    if hint is datetime.datetime:
        return lambda value: f'"{format_time(value)}"'
    if origin in OPTIONAL:
        return _writer_of(arguments[0])
    if origin is tuple:
        write = _writer_of(arguments[0])
        return lambda value: "[" + ",".join([write(item) for item in value]) + "]"
    if origin is Mapping:
        write = _writer_of(arguments[1])
        return lambda value: object_of([f"{encode_basestring(key)}:{write(item)}" for key, item in value.items()])
    return lambda value: object_of(members(value))


def _other_members(unknown: Mapping[str, Any]) -> list[str]:
    return [f"{encode_basestring(name)}:{dump_json(value).decode()}" for name, value in unknown.items()]


def _compiled(lines: list[str], names: dict[str, Any], name: str) -> Callable[..., Any]:
    """Return the function of that name that the lines define. They have no text but names of declared fields."""
    exec("\n".join(lines), names)  # noqa: S102
    function: Callable[..., Any] = names[name]
    return function
