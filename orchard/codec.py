"""JSON texts to dataclasses and back. Pure functions; the classes themselves are in schema.py and resources/.

A resource of the API is a frozen dataclass whose fields are declared with `attr`, which holds a field's name in JSON,
its documentation and its bounds. These functions read that declaration:

* `decode` and `decode_from_client` make an instance from a parsed JSON object, or raise a ValidationError whose message
  names the field, the value and what is accepted;
* `openapi_schema` makes the class's OpenAPI schema;
* `dump_resource` of resources/json_text.py makes the JSON text of an instance.

`parse_json` is stricter than `json.loads`. It refuses every text that two JSON parsers may read differently (duplicate
keys, NaN, lone surrogates, UTF-16, very deep nesting), so every other program reads stored data as this one does.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

# Levels of nesting in a JSON text. The deepest object of the API has 4.
MAX_DEPTH = 32
# Unknown names that are described. The others are only counted, since the comparison with known names costs more than
# reading a field.
_MAX_DESCRIBED = 8
# Characters of an unknown name that are shown.
_MAX_PATH = 128
# Values of a client's JSON text, and fields of one of its objects: more than the largest legal body has. Reading takes
# time by the value, and a small body may have millions.
MAX_VALUES = 100_000
MAX_FIELDS = 1024
# Items of a list or a map in a client's object, unless its field says otherwise. Reading them delays all other
# requests.
MAX_ITEMS = 256
# The largest whole number that every JSON parser keeps exact (RFC 8259, section 6).
MAX_UINT = 2**53 - 1
# Characters of a refused value that an error message repeats.
SHOWN_CHARACTERS = 64
# Digits of a whole number, with its sign. Longer ones are refused before they are converted.
_MAX_DIGITS = 20

_HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = re.compile(
    rf"([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}[Tt]{_HOUR}:)([0-5][0-9]|60)((?:\.[0-9]{{1,9}})?(?:[Zz]|[+-]{_HOUR}))"
)
# The zero value of a Go client's time.
_NO_TIME = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)
# The origins of the type `X | None`; Python keeps `Literal[...] | None` as a typing.Union.
OPTIONAL = (types.UnionType, typing.Union)

# Cheap pre-checks. A body may have millions of numbers and strings, and all other requests wait while it is parsed, so
# the expensive per-value checks run only on texts that match.
_ALL_DIGITS_0 = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * _MAX_DIGITS
# The beginnings of escapes of surrogates, also of complete pairs.
_SURROGATES = (b"\\ud", b"\\uD")
# Bytes of a text that do not matter for counting its values.
_NOT_COUNTED = bytes(set(range(256)) - set(b'",[{'))
# Strings with one of these bytes that a client's text may have. A text with more is refused as having too many values.
_MAX_SPLIT = 200_000

_CONTAINERS = frozenset([list, dict])
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)

ResourceT = TypeVar("ResourceT")


class ValidationError(Exception):
    """A value that a client sent is not accepted; `str(error)` names the value and what is accepted."""


class MalformedError(ValidationError):
    """The value is missing, of the wrong type or out of range, or the text is not JSON."""


class InvalidError(ValidationError):
    """The value is well formed, but a rule excludes it."""


# ---- declarations ---------------------------------------------------------------------------------------------------


# What a client's new value of a field that has another one does: it is refused, applies at the VM's next boot, or at once.
ChangeEffect = Literal["refused", "boot", "at once"]


@dataclass(frozen=True, slots=True)
class Attr:
    """The declaration of one field: the arguments of `attr`, then what `attrs_of` found in the class.

    `options` are the strings of a Literal, and empty for every other type.
    """

    json: str
    doc: str
    writer: str
    default: object = None
    number: bool = False
    maximum: int = MAX_UINT
    most: int = MAX_ITEMS
    twin: str = ""
    example: object = None
    change: ChangeEffect = "refused"
    required: bool = False
    is_secret: bool = False
    name: str = ""
    type: Any = None
    options: tuple[str, ...] = ()

    def is_list(self) -> bool:
        return typing.get_origin(self.type) is tuple

    def is_closed_set(self) -> bool:
        """Whether the value is one of a few texts, or absent."""
        inner = typing.get_args(self.type)[0] if self.is_optional() else self.type
        return typing.get_origin(inner) is Literal

    def is_optional(self) -> bool:
        return typing.get_origin(self.type) in OPTIONAL


def attr(
    json_name: str,
    doc: str,
    *,
    zero: object = dataclasses.MISSING,
    writer: str = "user",
    default: object = None,
    number: bool = False,
    maximum: int = MAX_UINT,
    most: int = MAX_ITEMS,
    twin: str = "",
    example: object = None,
    change: ChangeEffect = "refused",
    secret: bool = False,
) -> Any:
    """Declare a field of a resource: its name in JSON and its documentation.

    `zero` is the field's value when it is absent; a field without a zero is required. `writer` is who sets the field:
    "user", "controller", "scheduler" or "worker". A field with a `default` is in every answer, zero or not. `number`
    has the published schema call an integer a number. `most` bounds a client's list or map in number. `twin` is a
    deprecated second name of the field in JSON. A whole number above a given `maximum` breaks a rule. `change` says what
    becomes of a change of a VM's specification. The value of a `secret` field is neither in the repr() nor in errors.
    """
    required = zero is dataclasses.MISSING
    about = Attr(json_name, doc, writer, default, number, maximum, most, twin, example, change, required, secret)
    if isinstance(zero, dict):
        return dataclasses.field(default_factory=dict, repr=not secret, metadata={"attr": about})
    return dataclasses.field(default=zero, repr=not secret, metadata={"attr": about})


def unknown_fields() -> Any:
    """Declare the field `unknown` of a stored resource: JSON values by name, as a newer version may have stored them.

    They are stored again with each change. Clients cannot set them.
    """
    return dataclasses.field(default_factory=dict, compare=False, repr=False)


_ATTRS: dict[type, tuple[Attr, ...]] = {}


def attrs_of(cls: type) -> tuple[Attr, ...]:
    """Return the declarations of a resource's fields, in order. They are resolved once per class."""
    found = _ATTRS.get(cls)
    if found is None:
        found = _ATTRS[cls] = tuple(_resolved_attrs(cls))
    return found


def _resolved_attrs(cls: type) -> Iterator[Attr]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "attr" not in field.metadata:
            continue
        hint = hints[field.name]
        options = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        about: Attr = field.metadata["attr"]
        is_secret = about.is_secret or _may_hold_secret(hint)
        yield dataclasses.replace(about, name=field.name, type=hint, options=options, is_secret=is_secret)


def _may_hold_secret(hint: Any) -> bool:
    """Return whether values of a type, or items of a list or a map, have a secret field."""
    if dataclasses.is_dataclass(hint):
        return any(field.is_secret for field in attrs_of(typing.cast("type", hint)))
    return any(map(_may_hold_secret, typing.get_args(hint)))


# ---- bytes to values ------------------------------------------------------------------------------------------------


def parse_client_json(body: bytes) -> Any:
    """Do as `parse_json`, with bounds on the values and on the fields of an object, which are checked before and after.

    The largest legal body takes some ten milliseconds, no part of which holds Python's lock for as long.
    """
    values = count_values(body)
    if values > MAX_VALUES:
        raise MalformedError(f"the JSON has more than {MAX_VALUES} values")
    return parse_json(body, MAX_FIELDS)


def count_values(body: bytes) -> int:
    """Return an upper bound of the number of values in a JSON text, without parsing it: its commas and opening brackets.

    Those in strings are not counted, unless there are very many.
    """
    text = body
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Adjacent quotes are an empty string by now, or the end of one and the beginning of the next.
    text = text.translate(None, _NOT_COUNTED).replace(b'""', b"")
    if 0 < text.count(b'"') <= _MAX_SPLIT:
        text = b"".join(text.split(b'"')[::2])
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def parse_json(body: bytes, most_fields: float = math.inf) -> Any:
    """Return the value of a JSON text. Raises MalformedError that says what is wrong and where.

    `most_fields` bounds the fields of each object.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{body[error.start]:02x} at offset {error.start}"
        raise MalformedError(f"the body is not UTF-8: {found}") from None
    try:
        decoder = _LONG_NUMBER_DECODER if _LONG_NUMBER in body.translate(_ALL_DIGITS_0) else _DECODER
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedError(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedError(f"the JSON is nested deeper than {MAX_DEPTH} levels") from None
    _check_containers(value, most_fields)
    if any(escape in body for escape in _SURROGATES):
        _check_strings(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise MalformedError(f"the JSON key {shown(key)} is repeated in one object, expected each key once")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> None:
    raise MalformedError(f"{name} is not a JSON number")


def _int(digits: str) -> int:
    # Python raises ValueError for very long numbers, and no field is as large as that.
    if len(digits) > _MAX_DIGITS:
        raise MalformedError(f"the number {shown(digits)} is out of range, expected at most {_MAX_DIGITS} characters")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise MalformedError(f"the number {shown(digits)} is out of range, expected a 64-bit floating-point number")
    return value


# json.loads would make a decoder for each text (./run bench api, creates).
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float)
_LONG_NUMBER_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float, parse_int=_int
)


def _check_containers(value: object, most_fields: float) -> None:
    """Raise MalformedError if a value is nested too deep, or if an object in it has too many fields."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for node in level:
            if isinstance(node, dict):
                if len(node) > most_fields:
                    raise MalformedError(
                        f"an object of the JSON has {len(node)} fields, expected at most {most_fields}"
                    )
                inner += node.values()
            else:
                inner += typing.cast("list[object]", node)
        level = [node for node in inner if type(node) in _CONTAINERS]
        if not level:
            return
    raise MalformedError(f"the JSON is nested deeper than {MAX_DEPTH} levels")


def _check_strings(value: object) -> None:
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, str):
            try:
                node.encode()
            except UnicodeEncodeError as error:
                # The rest may be a secret.
                half = shown(error.object[error.start : error.end])
                raise MalformedError(f"a JSON string holds {half}, half a surrogate pair") from None
        elif isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += node
            nodes += node.values()


def shortened(text: str, most: int) -> str:
    """Return a text, or its beginning with "..." if it has more than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(value: object) -> str:
    """Return a refused value as an error message shows it: JSON in ASCII, at most SHOWN_CHARACTERS long."""
    return shortened(json.dumps(value), SHOWN_CHARACTERS)


# ---- values to resources --------------------------------------------------------------------------------------------


# The types of parsed JSON values, as errors name them.
_TYPE_NAMES: Mapping[type, str] = {
    bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


class _Position(NamedTuple):
    """A place in the body, and how its value is read.

    `unknown` collects the names of unknown fields in a client's object; it is None for an object that this product
    wrote. `refusal` is the error for a string that is not one of the options, and for a whole number outside of the
    bounds that its field declares. `maximum` bounds a number, and `most` a list or a map in number. A value that may
    hold a secret is not shown.
    """

    path: str = ""
    unknown: list[str] | None = None
    refusal: type[ValidationError] = InvalidError
    maximum: int = MAX_UINT
    most: int = MAX_ITEMS
    is_secret: bool = False

    def below(self, step: str) -> _Position:
        return self._replace(path=self.path + step)

    def shown(self, value: object) -> str:
        return _TYPE_NAMES[type(value)] if self.is_secret else shown(value)

    def check_number(self, items: Sized) -> None:
        """Raise InvalidError if a client has sent too many items. What was stored is read in any number."""
        if self.unknown is not None and len(items) > self.most:
            raise self.refusal(f"{self.path} has {len(items)} items, expected at most {self.most}")


def decode(cls: type[ResourceT], raw: object, also: frozenset[str] = frozenset()) -> ResourceT:
    """Make an instance of `cls` from a parsed JSON object that this product wrote.

    An absent or null field gets its zero value. Unknown fields are kept if `cls` declares `unknown_fields`, except for
    those named in `also`.

    Raises MalformedError for a value that is missing, of the wrong type or out of range, and InvalidError for a string
    that is not one of the options and for a number outside of the bounds that its field declares.
    """
    return _decode_object(cls, raw, None, _Position(), also)


def decode_from_client(
    cls: type[ResourceT],
    raw: object,
    unknown: list[str],
    *,
    base: ResourceT | None = None,
    also: frozenset[str] = frozenset(),
    refusal: type[ValidationError] = InvalidError,
) -> ResourceT:
    """Make an instance of `cls` from a parsed JSON object that a client sent.

    Only fields whose writer is the user are taken; the others are ignored, like the fields named in `also`. Unknown
    fields are appended to `unknown`, as by `add_unknown`. An absent or null field gets its value from `base`, or its
    zero value; so does one of a closed set whose value is "". Names are read in any case, as by `canonical`.

    Raises as `decode` does, with `refusal` in place of InvalidError.
    """
    return _decode_object(cls, raw, base, _Position("", unknown, refusal), also)


def decode_array_from_client(cls: type[ResourceT], raw: object, unknown: list[str], most: int) -> list[ResourceT]:
    """Make instances of `cls` from a JSON array of at most `most` items. Raises as `decode_from_client` does."""
    if not isinstance(raw, list):
        raise MalformedError(f"the body is {shown(raw)}, expected a JSON array")
    _Position("the array", unknown, most=most).check_number(raw)
    return [_decode_object(cls, item, None, _Position(f"[{index}]", unknown)) for index, item in enumerate(raw)]


def _decode_object(
    cls: type[ResourceT],
    raw: object,
    base: ResourceT | None,
    position: _Position,
    also: frozenset[str] = frozenset(),
) -> ResourceT:
    if not isinstance(raw, dict):
        raise MalformedError(f"{position.path or 'the body'} is {position.shown(raw)}, expected a JSON object")
    taken: dict[str, Any] = {}
    prefix = f"{position.path}." if position.path else ""
    unknown = position.unknown
    if unknown is not None:
        raw = canonical(cls, raw, also)
    for field in attrs_of(cls):
        value = raw.get(field.json)
        if unknown is not None and value == "" and field.is_closed_set():
            value = None
        if value is None or (unknown is not None and field.writer != "user"):
            if field.required and base is None:
                raise MalformedError(f"{prefix}{field.json} is missing, expected {field.doc}")
            continue
        # Most values need no conversion, and a start decodes a million of them (./run bench start).
        kind = field.type
        if type(value) is kind:
            plain = kind is not int or 0 <= value <= field.maximum
        else:
            plain = type(value) is str and value in field.options
        if plain:
            taken[field.name] = value
        else:
            inner = _Position(
                prefix + field.json, unknown, position.refusal, field.maximum, field.most, field.is_secret
            )
            taken[field.name] = _decode_value(kind, value, inner)
    known = json_names(typing.cast("Any", cls))
    if unknown is not None:
        for key in raw:
            if key not in known and key not in also:
                add_unknown(unknown, prefix + key, known)
    elif keeps_unknown(typing.cast("Any", cls)) and (new := raw.keys() - known - also):
        taken["unknown"] = {key: raw[key] for key in sorted(new)}
    if base is not None:
        return typing.cast("ResourceT", dataclasses.replace(typing.cast("Any", base), **taken))
    return cls(**taken)


def canonical(cls: type, raw: dict[str, Any], also: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return a client's object with the names of fields in the case in which `cls` and `also` have them.

    Go clients and servers read names in any case. A name that is there in the right case goes before all others.
    """
    known = json_names(cls)
    strange = [key for key in raw if key not in known and key not in also]
    if not strange:
        return raw
    folded = {name.lower(): name for name in (*also, *known)}
    result = dict(raw)
    for key in strange:
        name = folded.get(key.lower())
        if name is not None and name not in raw:
            result[name] = result.pop(key)
    return result


def add_unknown(unknown: list[str], path: str, known: Iterable[str]) -> None:
    """Append an unknown name, bounded and in printable ASCII, and which of the `known` names it resembles, if any."""
    text = json.dumps(path[:_MAX_PATH])[1:-1].replace("\x7f", "\\u007f")
    if len(unknown) < _MAX_DESCRIBED:
        names = {_letters(name): name for name in sorted(known)}
        near = difflib.get_close_matches(_letters(path[:_MAX_PATH].rpartition(".")[2]), names, n=1, cutoff=0.75)
        text += f", did you mean {names[near[0]]}?" if near else ""
    unknown.append(text)


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


@functools.cache
def json_names(cls: type) -> frozenset[str]:
    return frozenset(name for field in attrs_of(cls) for name in (field.json, field.twin) if name)


@functools.cache
def keeps_unknown(cls: type) -> bool:
    return any(field.name == "unknown" for field in dataclasses.fields(cls))


@functools.cache
def _origin_and_arguments(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(hint), typing.get_args(hint)


def _decode_value(hint: Any, value: object, at: _Position) -> Any:
    """Make a value of the type `hint`. Raises as `decode` does."""
    if hint is str:
        return _expect(str, value, at, "a string")
    if hint is bool:
        return _expect(bool, value, at, "true or false")
    if hint is int:
        return _decode_int(value, at)
    if hint is datetime.datetime:
        return parse_time(_expect(str, value, at, "an RFC 3339 time"), at.path)
    origin, arguments = _origin_and_arguments(hint)
    if origin is Literal:
        text = _expect(str, value, at, "a string")
        if text not in arguments:
            options = [option for option in arguments if option]
            near = difflib.get_close_matches(text, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise at.refusal(f"{at.path} is {shown(text)}, expected one of {', '.join(options)}{hint}")
        return text
    if origin is tuple:
        items = _expect(list, value, at, "a list")
        at.check_number(items)
        return tuple(_decode_value(arguments[0], item, at.below(f"[{index}]")) for index, item in enumerate(items))
    if origin is Mapping:
        pairs = _expect(dict, value, at, "a JSON object")
        at.check_number(pairs)
        # A position for each value would cost more than the value, and only an error message needs it.
        kind = arguments[1]
        is_plain = all(type(item) is kind for item in pairs.values())
        if is_plain and (kind is str or all(0 <= item <= at.maximum for item in pairs.values())):
            return dict(pairs)
        return {key: _decode_value(kind, item, at.below(f"[{shown(key)}]")) for key, item in pairs.items()}
    if origin in OPTIONAL:
        return _decode_value(arguments[0], value, at)
    return _decode_object(hint, value, None, at)


def _expect(kind: type[ResourceT], value: object, at: _Position, expected: str) -> ResourceT:
    if not isinstance(value, kind):
        raise MalformedError(f"{at.path} is {at.shown(value)}, expected {expected}")
    return value


def _decode_int(value: object, at: _Position) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= at.maximum:
        breaks_rule = type(value) is int and at.maximum != MAX_UINT
        raise (at.refusal if breaks_rule else MalformedError)(
            f"{at.path} is {shown(value)}, expected a whole number from 0 to {at.maximum}"
        )
    return value


def parse_time(text: str, where: str) -> datetime.datetime | None:
    """Return the time of an RFC 3339 text of any zone, in UTC; None for a Go client's zero time.

    Nanoseconds are accepted and cut to microseconds. Raises MalformedError naming `where`.
    """
    match = _TIME.fullmatch(text)
    if match is not None:
        # A leap second becomes the second before it.
        known = text if match[2] != "60" else f"{match[1]}59{match[3]}"
        try:
            local = datetime.datetime.fromisoformat(known.upper())
            when = local if local.tzinfo is datetime.UTC else local.astimezone(datetime.UTC)
            return None if when == _NO_TIME else when
        except (ValueError, OverflowError):
            pass
    raise MalformedError(f"{where} is {shown(text)}, expected an RFC 3339 time such as 2026-01-31T12:00:00Z")


# ---- values to texts ------------------------------------------------------------------------------------------------


def format_time(when: datetime.datetime) -> str:
    """Return a time as RFC 3339 in UTC."""
    utc = when if when.tzinfo is datetime.UTC else when.astimezone(datetime.UTC)
    return utc.isoformat()[:-6] + "Z"


def dump_json(value: object) -> bytes:
    """Return a JSON text on one line, in UTF-8."""
    return _ENCODER.encode(value).encode()


def load_json(text: bytes) -> Any:
    """Return the value of a JSON text in UTF-8 that no client has sent. Raises ValueError."""
    try:
        # json.loads of bytes would detect the encoding of each.
        return json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


# ---- resources to OpenAPI -------------------------------------------------------------------------------------------


def openapi_schema(cls: type) -> dict[str, Any]:
    """Return the OpenAPI 3.0 schema of a resource; resources inside it are written out in place."""
    properties: dict[str, Any] = {}
    for field in attrs_of(cls):
        schema = _value_schema(field.type, field)
        schema["description"] = field.doc
        if field.default is not None:
            schema["default"] = field.default
        if field.example is not None:
            schema["example"] = field.example
        if field.writer != "user":
            schema["readOnly"] = True
        properties[field.json] = schema
        if field.twin:
            twin = {"description": f"Please use `{field.json}` instead", "deprecated": True}
            properties[field.twin] = {**schema, **twin}
    schema = {"type": "object", "properties": properties}
    required = [field.json for field in attrs_of(cls) if field.required]
    return {**schema, "required": required} if required else schema


def _value_schema(hint: Any, field: Attr) -> dict[str, Any]:
    if hint is str:
        return {"type": "string"}
    if hint is bool:
        return {"type": "boolean"}
    if hint is int:
        kind = {"type": "number", "multipleOf": 1} if field.number else {"type": "integer"}
        return {**kind, "minimum": 0, "maximum": field.maximum}
    if hint is datetime.datetime:
        return {"type": "string", "format": "date-time"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _value_schema(arguments[0], field)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _value_schema(arguments[1], field)}
    if origin in OPTIONAL:
        return _value_schema(arguments[0], field)
    return openapi_schema(hint)
