"""JSON in and out of dataclasses. Law: pure functions over bytes and values; no noun of the product is known here.

The ground floor. A noun of the API is a frozen dataclass whose attributes are made by `attr`, which says what the
field is called on the wire, what it means and which values it takes. From that one description come

* `decode`: a parsed JSON value to an instance, refusing what does not fit in a sentence that names field, value and
  what was expected;
* `encode`: an instance to a JSON object, zero values left out unless the field promises a default;
* `component`: the field's and the class's OpenAPI schema.

`parse_json` is stricter than `json.loads`: it refuses everything on which two JSON readers may disagree (duplicate
keys, NaN, lone surrogates, UTF-16, absurd nesting), so that what is stored is read back the same by anybody.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

MAX_DEPTH = 32  # levels of nesting in a JSON text; the deepest object of the API has 4
MAX_UINT = 2**53 - 1  # the largest whole number that every JSON reader keeps exact (RFC 8259, section 6)
MAX_DIGITS = 20  # of a whole number, with its sign; longer ones are refused before they are converted
MAX_SHOWN = 64  # characters of a refused value that an error message repeats

_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = re.compile(
    rf"([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}})[Tt]({_HOUR}):([0-5][0-9]|60)(?:\.([0-9]{{1,9}}))?([Zz]|[+-]{_HOUR})"
)
_NO_TIME = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)  # the zero value of a Go client's time
_OPTIONAL = (types.UnionType, typing.Union)  # `X | None`, and how Python keeps `Literal[...] | None`

# What few texts hold. Only in those is each number or text looked at: a body may have millions of them, for which
# everybody else would wait.
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS}}}")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # or a whole one

_CONTAINERS = frozenset([list, dict])
_AS_THEY_ARE = frozenset([str, int, bool, dict])  # types of values that JSON knows
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

T = TypeVar("T")


class ValidationError(Exception):
    """A value that a client sent is not accepted; `str(error)` names the value and what is accepted."""


class MalformedError(ValidationError):
    """The value is missing, of the wrong type or out of range, or the text is not JSON."""


class InvalidError(ValidationError):
    """The value is well formed, but a rule excludes it."""


class APIError(Exception):
    """A refusal and the HTTP status that it answers with; raised anywhere below a handler.

    `message` is one sentence for a person; `headers` are sent with the answer.
    """

    def __init__(self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Attr:
    """What `attr` was told about one field, with its Python name and type once `attrs_of` has resolved them."""

    json: str
    doc: str
    writer: str  # who may set it: "user", "controller", "scheduler", "worker"
    default: object = None  # promised by the schema: then the field is in every answer, zero or not
    number: bool = False  # an integer that the published schema calls a number
    maximum: int = MAX_UINT
    twin: str = ""  # a deprecated second name of the same field on the wire
    example: object = None
    required: bool = False  # it has no zero value: an object without it is none
    name: str = ""
    kind: Any = None
    options: tuple[str, ...] = ()  # of a Literal

    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    def is_optional(self) -> bool:
        return typing.get_origin(self.kind) in _OPTIONAL


def attr(
    json_name: str,
    doc: str,
    *,
    zero: object = dataclasses.MISSING,
    writer: str = "user",
    default: object = None,
    number: bool = False,
    maximum: int = MAX_UINT,
    twin: str = "",
    example: object = None,
) -> Any:
    """Declare a field of a noun: `json_name` on the wire, `doc` for people, `zero` its value when absent.

    Without a `zero` the field has to be there.
    """
    required = zero is dataclasses.MISSING
    about = Attr(json_name, doc, writer, default, number, maximum, twin, example, required)
    if isinstance(zero, dict):
        return dataclasses.field(default_factory=dict, metadata={"attr": about})
    return dataclasses.field(default=zero, metadata={"attr": about})


_ATTRS: dict[type, tuple[Attr, ...]] = {}


def attrs_of(cls: type) -> tuple[Attr, ...]:
    """Give the fields of a noun (a dataclass) in the order of their declaration; resolved once per class."""
    found = _ATTRS.get(cls)
    if found is None:
        hints = typing.get_type_hints(cls)
        found = _ATTRS[cls] = tuple(
            dataclasses.replace(
                field.metadata["attr"], name=field.name, kind=hints[field.name], options=_options_of(hints[field.name])
            )
            for field in dataclasses.fields(cls)
        )
    return found


def _options_of(kind: Any) -> tuple[str, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


# ---- nouns from nouns ----------------------------------------------------------------------------------------------


def replace(noun: T, **fields: Any) -> T:
    """Give a noun with other values in some fields: `dataclasses.replace` in half of its time (./run bench api)."""
    values_of, places = _places(typing.cast("Any", type(noun)))
    values = list(values_of(noun))
    for name, value in fields.items():
        values[places[name]] = value
    return type(noun)(*values)


@functools.cache
def _places(cls: type) -> tuple[Callable[[Any], tuple[Any, ...]], dict[str, int]]:
    """Give what gets the values of all fields (at least two), and where among them each stands."""
    names = [field.name for field in dataclasses.fields(cls)]
    return operator.attrgetter(*names), {name: place for place, name in enumerate(names)}


# ---- bytes to values -----------------------------------------------------------------------------------------------


def parse_json(body: bytes) -> Any:
    """Parse a JSON text strictly. Raises MalformedError that says what is wrong with it and where."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"the body is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}") from None
    try:
        decoder = _CAREFUL_DECODER if _LONG_NUMBER.search(text) else _DECODER
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedError(f"the JSON is nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(value)
    if _HALF_PAIR.search(text):
        _check_texts(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedError(f"the JSON key {shown(key)} stands twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> None:
    raise MalformedError(f"{name} is no JSON number")


def _int(digits: str) -> int:
    # Python refuses to convert very long numbers, and nothing here is as large as that.
    if len(digits) > MAX_DIGITS:
        raise MalformedError(f"the number {shown(digits)} is out of range")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise MalformedError(f"the number {shown(digits)} is out of range")
    return value


# json.loads would make one for each text (./run bench api, creates).
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float)
_CAREFUL_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_float, parse_int=_int
)


def _check_depth(value: object) -> None:
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for node in level
            for inner in (node.values() if isinstance(node, dict) else typing.cast("list[object]", node))
            if type(inner) in _CONTAINERS
        ]
        if not level:
            return
    raise MalformedError(f"the JSON is nested deeper than {MAX_DEPTH} levels")


def _check_texts(value: object) -> None:
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, str):
            _check_text(node)
        elif isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += node
            nodes += node.values()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedError(f"the JSON text {shown(text)} holds half a surrogate pair") from None


def shown(value: object) -> str:
    """A refused value as an error message shows it: JSON, ASCII, not long."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


# ---- values to nouns -----------------------------------------------------------------------------------------------


def decode(
    cls: type[T],
    raw: object,
    *,
    base: T | None = None,
    where: str = "",
    also: frozenset[str] = frozenset(),
    unknown: list[str] | None = None,
    by: frozenset[str] | None = None,
    refusal: type[ValidationError] = InvalidError,
) -> T:
    """Make an instance of the noun `cls` from a parsed JSON object.

    An absent or null field takes its value from `base`, without one its zero value. Names in `also` are known and
    passed over; other unknown names are appended to `unknown`. Only fields whose writer is in `by` are taken, the
    rest are passed over like those in `also` (None: all are taken). `where` is the path that messages begin with.

    Raises MalformedError for a value that is missing, of the wrong type or out of range, and `refusal` for a value
    that is not one of the options.
    """
    if not isinstance(raw, dict):
        raise MalformedError(f"{where or 'the body'} is {shown(raw)}, expected a JSON object")
    taken: dict[str, Any] = {}
    prefix = f"{where}." if where else ""
    for field in attrs_of(cls):
        value = raw.get(field.json)
        if value is not None and (by is None or field.writer in by):
            # Most values are just what is asked for; at a start there are a million of them (./run bench start).
            if type(value) is field.kind:
                simple = field.kind is not int or 0 <= value <= field.maximum
            else:
                simple = type(value) is str and value in field.options
            if simple:
                taken[field.name] = value
                continue
            inner = Inner(prefix + field.json, unknown, refusal, field.maximum)
            taken[field.name] = _decode_value(field.kind, value, inner)
        elif field.required and base is None:
            raise MalformedError(f"{prefix}{field.json} is missing, expected {field.doc}")
    if unknown is not None:
        known = _names(typing.cast("Any", cls))
        unknown.extend(prefix + key for key in raw if key not in known and key not in also)
    if base is not None:
        return replace(base, **taken)
    return cls(**taken)


@functools.cache
def _names(cls: type) -> frozenset[str]:
    return frozenset(name for field in attrs_of(cls) for name in (field.json, field.twin) if name)


@dataclass(frozen=True, slots=True)
class Inner:
    """Where in the body a value stands, and how its refusal is to be answered."""

    where: str
    unknown: list[str] | None
    refusal: type[ValidationError]
    maximum: int

    def at(self, step: str) -> Inner:
        return Inner(self.where + step, self.unknown, self.refusal, self.maximum)


def _decode_value(kind: Any, value: object, at: Inner) -> Any:
    if kind is str:
        return _typed(str, value, at, "a text")
    if kind is bool:
        return _typed(bool, value, at, "true or false")
    if kind is int:
        return _decode_int(value, at)
    origin = typing.get_origin(kind)
    if origin is Literal:
        text = _typed(str, value, at, "a text")
        options = typing.get_args(kind)
        if text not in options:
            raise at.refusal(f"{at.where} is {shown(text)}, expected one of {', '.join(options)}")
        return text
    if origin is tuple:
        items = _typed(list, value, at, "a list")
        item_kind = typing.get_args(kind)[0]
        return tuple(_decode_value(item_kind, item, at.at(f"[{index}]")) for index, item in enumerate(items))
    if origin is Mapping:
        value_kind = typing.get_args(kind)[1]
        pairs = _typed(dict, value, at, "a JSON object")
        return {key: _decode_value(value_kind, item, at.at(f"[{shown(key)}]")) for key, item in pairs.items()}
    if origin in _OPTIONAL:
        return _decode_value(typing.get_args(kind)[0], value, at)
    if kind is datetime.datetime:
        return parse_time(_typed(str, value, at, "an RFC 3339 time"), at.where)
    return decode(kind, value, where=at.where, unknown=at.unknown, refusal=at.refusal)


def _typed(kind: type[T], value: object, at: Inner, expected: str) -> T:
    if not isinstance(value, kind):
        raise MalformedError(f"{at.where} is {shown(value)}, expected {expected}")
    return value


def _decode_int(value: object, at: Inner) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= at.maximum:
        raise MalformedError(f"{at.where} is {shown(value)}, expected a whole number from 0 to {at.maximum}")
    return value


def parse_time(text: str, where: str) -> datetime.datetime | None:
    """Read an RFC 3339 time of any zone and up to nanoseconds (cut to microseconds); a Go client's zero time is None.

    Raises MalformedError naming `where`.
    """
    match = _TIME.fullmatch(text)
    if match is not None:
        day, minute, second, fraction, zone = match.groups()
        second = "59" if second == "60" else second  # a leap second
        micros = (fraction or "0").ljust(6, "0")[:6]
        try:
            local = datetime.datetime.fromisoformat(f"{day}T{minute}:{second}.{micros}{zone.upper()}")
            when = local.astimezone(datetime.UTC)
            return None if when == _NO_TIME else when
        except (ValueError, OverflowError):
            pass
    raise MalformedError(f"{where} is {shown(text)}, expected an RFC 3339 time such as 2026-01-31T12:00:00Z")


# ---- nouns to values -----------------------------------------------------------------------------------------------


def encode(noun: Any) -> dict[str, Any]:
    """Give a noun as a JSON object.

    Zero values are left out unless their field promises a default; of an optional field, None is the zero value.
    """
    shape, values_of = _shape(typing.cast("Any", type(noun)))
    out: dict[str, Any] = {}
    for (name, twin, keeps_zero, is_optional), value in zip(shape, values_of(noun), strict=True):
        if not value and not keeps_zero and (value is None or not is_optional):
            continue
        if type(value) not in _AS_THEY_ARE:
            value = _encode_value(value)
        out[name] = value
        if twin:
            out[twin] = value
    return out


@functools.cache
def _shape(cls: type) -> tuple[list[tuple[str, str, bool, bool]], Callable[[Any], tuple[Any, ...]]]:
    """Give what `encode` asks of each field, and what gets their values: every change is encoded (./run bench api)."""
    attrs = attrs_of(cls)
    values_of = operator.attrgetter(*[field.name for field in attrs])
    asked = [(field.json, field.twin, field.default is not None, field.is_optional()) for field in attrs]
    return asked, values_of if len(attrs) > 1 else lambda noun: (values_of(noun),)


def _encode_value(value: Any) -> Any:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is tuple:
        return [_encode_value(item) for item in value]
    if kind is datetime.datetime:
        return format_time(value)
    return encode(value)


def format_time(when: datetime.datetime) -> str:
    """Write a time as RFC 3339 in UTC."""
    utc = when if when.tzinfo is datetime.UTC else when.astimezone(datetime.UTC)
    return utc.isoformat()[:-6] + "Z"


def dump_json(value: object) -> bytes:
    """Write a JSON text on one line, in UTF-8."""
    return _ENCODER.encode(value).encode()


# ---- nouns to OpenAPI ----------------------------------------------------------------------------------------------


def component(cls: type) -> dict[str, Any]:
    """Describe a noun as an OpenAPI 3.0 schema; nested nouns are written out in place."""
    properties: dict[str, Any] = {}
    for field in attrs_of(cls):
        schema = _value_schema(field.kind, field)
        schema["description"] = field.doc
        if field.default is not None:
            schema["default"] = field.default
        if field.example is not None:
            schema["example"] = field.example
        if field.writer != "user":
            schema["readOnly"] = True
        properties[field.json] = schema
        if field.twin:
            properties[field.twin] = {
                **schema,
                "description": f"Please use `{field.json}` instead",
                "deprecated": True,
            }
    schema = {"type": "object", "properties": properties}
    required = [field.json for field in attrs_of(cls) if field.required]
    return {**schema, "required": required} if required else schema


def _value_schema(kind: Any, field: Attr) -> dict[str, Any]:
    if kind is str:
        return {"type": "string"}
    if kind is bool:
        return {"type": "boolean"}
    if kind is int:
        if field.number:
            return {"type": "number", "multipleOf": 1, "minimum": 0, "maximum": field.maximum}
        return {"type": "integer", "minimum": 0, "maximum": field.maximum}
    origin = typing.get_origin(kind)
    if origin is Literal:
        return {"type": "string", "enum": list(typing.get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _value_schema(typing.get_args(kind)[0], field)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _value_schema(typing.get_args(kind)[1], field)}
    if origin in _OPTIONAL:
        return _value_schema(typing.get_args(kind)[0], field)
    if kind is datetime.datetime:
        return {"type": "string", "format": "date-time"}
    return component(kind)
