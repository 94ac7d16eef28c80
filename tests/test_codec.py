"""The codec: which JSON texts are refused, and how resources are decoded, encoded and described."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from harness.strategies import QUICK, any_vm, json_values, resources, vm_json
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.codec import (
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_UINT,
    MAX_VALUES,
    SHOWN_CHARACTERS,
    InvalidError,
    MalformedError,
    ValidationError,
    attr,
    attrs_of,
    count_values,
    decode,
    decode_array_from_client,
    decode_from_client,
    dump_json,
    format_time,
    openapi_schema,
    parse_client_json,
    parse_json,
    parse_time,
    shown,
)
from orchard.resources.bodies import ControllerInfo, Problem, VMReport, components
from orchard.resources.json_text import encode
from orchard.schema import (
    ClusterSettings,
    Condition,
    Event,
    HostDir,
    ServiceAccount,
    StartupScript,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
)

UTC = datetime.UTC
RESOURCES = [
    ClusterSettings,
    Condition,
    ControllerInfo,
    Event,
    HostDir,
    Problem,
    VMReport,
    ServiceAccount,
    StartupScript,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
]


@dataclass(frozen=True, slots=True)
class Inner:
    kind: Literal["a", "b"] = attr("kind", "a or b")
    size: int = attr("size", "at most 9", zero=0, maximum=9)


@dataclass(frozen=True, slots=True)
class Thing:
    text: str = attr("text", "A text", zero="")
    flag: bool = attr("flag", "A flag", zero=False, default=False)
    count: int = attr("count", "A number", zero=0)
    when: datetime.datetime | None = attr("when", "A time", zero=None)
    choice: Literal["red", "green"] = attr("choice", "A colour", zero="red", default="red")
    items: tuple[Inner, ...] = attr("items", "Some", zero=())
    words: tuple[str, ...] = attr("words", "Some", zero=())
    counts: Mapping[str, int] = attr("counts", "Some", zero={})
    inner: Inner | None = attr("inner", "One", zero=None)
    seen: str = attr("seen", "Not the user's", zero="", writer="worker")


@dataclass(frozen=True, slots=True)
class Few:
    words: tuple[str, ...] = attr("words", "At most three", zero=(), most=3)
    counts: Mapping[str, int] = attr("counts", "At most three", zero={}, most=3)


# ---- bytes to values ------------------------------------------------------------------------------------------------

DEEP = {
    "arrays": lambda depth: b"[" * depth + b"]" * depth,
    "arrays around a number": lambda depth: b"[" * depth + b"1" + b"]" * depth,
    "objects": lambda depth: b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1),
    "objects around a text": lambda depth: b'{"a":' * depth + b'""' + b"}" * depth,
    "mixed": lambda depth: (
        b'[{"a":' * (depth // 2) + b"[]" * (depth % 2) + b"0" * (1 - depth % 2) + b"}]" * (depth // 2)
    ),
}


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP)
def test_json_nesting_is_accepted_up_to_the_limit(make: Any) -> None:
    body = make(MAX_DEPTH)
    assert parse_json(body) == json.loads(body)
    with pytest.raises(ValidationError, match="nested deeper than 32 levels") as refusal:
        parse_json(make(MAX_DEPTH + 1))
    assert type(refusal.value) is MalformedError


@pytest.mark.parametrize("make", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_very_deep_json_is_refused(make: Any, depth: int) -> None:
    with pytest.raises(ValidationError, match="nested deeper than 32 levels") as refusal:
        parse_json(make(depth))
    assert type(refusal.value) is MalformedError


REFUSED = {
    "nothing": (b"", "not JSON"),
    "blank": (b" ", "not JSON"),
    "two values": (b"1 2", "not JSON"),
    "trailing comma": (b"[1,]", "not JSON"),
    "comment": (b"{} // no", "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "bare word": (b"true false", "not JSON"),
    "leading zero": (b"[01]", "not JSON"),
    "plus": (b"[+1]", "not JSON"),
    "raw newline in a text": (b'["a\nb"]', "not JSON"),
    "raw NUL in a text": (b'["a\0b"]', "not JSON"),
    "bad escape": (b'["\\x41"]', "not JSON"),
    "unfinished": (b'{"a": [1, 2', "not JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": (b"[Infinity]", "Infinity is not a JSON number"),
    "-Infinity": (b"-Infinity", "-Infinity is not a JSON number"),
    "1e999": (b'{"unknown": 1e999}', '"1e999" is out of range'),
    "-1e999": (b"[-1e999]", '"-1e999" is out of range'),
    "long float": (b"1" * 400 + b".0", "is out of range"),
    "huge integer": (b"[1" + b"0" * 20 + b"]", "is out of range"),
    "huge negative integer": (b"[-1" + b"0" * 20 + b"]", "is out of range"),
    "an integer that Python would not convert": (b"9" * 10_000, "is out of range"),
    "duplicate key": (b'{"name": 1, "name": 1}', 'the JSON key "name" is repeated in one object'),
    "duplicate key, deep": (b'[{"a": {"b": 1, "c": 2, "b": 3}}]', 'the JSON key "b" is repeated in one object'),
    "duplicate key, escaped": (b'{"a": 1, "\\u0061": 2}', 'the JSON key "a" is repeated in one object'),
    "lone high surrogate": (b'["\\ud800"]', "half a surrogate pair"),
    "lone low surrogate": (b'["x\\udc00"]', "half a surrogate pair"),
    "surrogates the wrong way round": (b'["\\udc00\\ud800"]', "half a surrogate pair"),
    "lone surrogate in a key": (b'{"a": [{"\\ud800": 1}]}', "half a surrogate pair"),
    "lone surrogate in UTF-8": (b'["\xed\xa0\x80"]', "not UTF-8: byte 0xed at offset 2"),
    "overlong UTF-8": (b'["\xc0\xaf"]', "not UTF-8: byte 0xc0 at offset 2"),
    "Latin-1": ('["ä"]'.encode("latin-1"), "not UTF-8: byte 0xe4 at offset 2"),
    "UTF-8 with BOM": (b"\xef\xbb\xbf{}", "not JSON"),
    "UTF-16 with BOM": ("{}".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    "UTF-16 big endian": ("{}".encode("utf-16-be"), "not JSON"),
    "UTF-16 little endian": ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
    "UTF-32": ("{}".encode("utf-32"), "not UTF-8"),
}


@pytest.mark.parametrize(("body", "words"), REFUSED.values(), ids=REFUSED)
def test_ambiguous_json_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        parse_json(body)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"null", None),
        (b" \t\r\n{} \n", {}),
        (b'"\\ud83c\\udf4e"', "🍎"),
        ('"🍎\\u0000"'.encode(), "🍎\0"),
        (b'{"a": {"a": {"a": 1}}}', {"a": {"a": {"a": 1}}}),
        (b"9007199254740991", MAX_UINT),
        (b"-9999999999999999999", -9999999999999999999),
        (b"[1e308, -0.0, 1E+2]", [1e308, 0.0, 100.0]),
    ],
)
def test_unambiguous_json_is_accepted(body: bytes, value: object) -> None:
    assert parse_json(body) == value


@QUICK
@given(json_values())
def test_dumped_json_parses_to_the_same_value(value: object) -> None:
    text = dump_json(value)
    assert b"\n" not in text
    assert parse_json(text) == value


@QUICK
@given(st.binary(max_size=60) | st.text('{}[]",:\\u0dNaIe1+-. \t\0', max_size=40).map(str.encode))
def test_arbitrary_bytes_are_parsed_or_malformed(body: bytes) -> None:
    try:
        value = parse_json(body)
    except MalformedError:
        return
    assert parse_json(dump_json(value)) == value


def test_shown_value_is_short_and_on_one_line() -> None:
    assert shown("ä\n\x1b") == '"\\u00e4\\n\\u001b"'
    assert shown({"a": [1, None]}) == '{"a": [1, null]}'
    assert len(shown(["x"] * 10_000)) == SHOWN_CHARACTERS


# ---- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-01-31T12:00:00Z", datetime.datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31t12:00:00z", datetime.datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31T12:00:00+05:30", datetime.datetime(2026, 1, 31, 6, 30, tzinfo=UTC)),
        ("2026-01-31T00:00:00-23:59", datetime.datetime(2026, 1, 31, 23, 59, tzinfo=UTC)),
        ("2026-01-31T12:00:00-00:00", datetime.datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("2026-01-31T12:00:00.5Z", datetime.datetime(2026, 1, 31, 12, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-31T12:00:00.123456789Z", datetime.datetime(2026, 1, 31, 12, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-01-31T12:00:00.000000001+01:00", datetime.datetime(2026, 1, 31, 11, tzinfo=UTC)),
        ("2016-12-31T23:59:60Z", datetime.datetime(2016, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2024-02-29T00:00:00Z", datetime.datetime(2024, 2, 29, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999999Z", datetime.datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        ("0001-01-01T00:00:01Z", datetime.datetime(1, 1, 1, 0, 0, 1, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+00:00", None),
        ("0001-01-01T00:00:00.000000000Z", None),
    ],
)
def test_rfc_3339_times_of_any_zone_are_parsed(text: str, when: datetime.datetime | None) -> None:
    assert parse_time(text, "at") == when


@pytest.mark.parametrize(
    "text",
    [
        "0000-12-31T23:59:60Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "2026-02-29T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-31T24:00:00Z",
        "2026-01-31T12:60:00Z",
        "2026-01-31T12:00:61Z",
        "2026-01-31T12:00:00+24:00",
        "2026-01-31T12:00:00+05:60",
        "2026-01-31T12:00:00.1234567890Z",
        "2026-01-31T12:00:00.Z",
        "2026-01-31T12:00:00",
        "2026-01-31 12:00:00Z",
        "2026-01-31",
        "20260131T120000Z",
        "2026-W05-6T12:00:00Z",
        "+2026-01-31T12:00:00Z",
        "2026-01-31T12:00:00Z\n",
        " 2026-01-31T12:00:00Z",
        "２０２６-01-31T12:00:00Z",
        "1769860800",
        "",
        "now",
    ],
)
def test_other_time_formats_are_refused(text: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        parse_time(text, "at")
    assert type(refusal.value) is MalformedError
    assert str(refusal.value) == f"at is {shown(text)}, expected an RFC 3339 time such as 2026-01-31T12:00:00Z"


def test_times_are_formatted_in_utc() -> None:
    east = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    assert format_time(datetime.datetime(2026, 1, 31, 12, tzinfo=east)) == "2026-01-31T06:30:00Z"
    assert format_time(datetime.datetime(7, 1, 31, 12, 0, 0, 5, tzinfo=UTC)) == "0007-01-31T12:00:00.000005Z"


@pytest.mark.slow
@QUICK
@given(json_values())
def test_count_of_values_is_that_of_the_brackets_and_commas_outside_of_strings(value: Any) -> None:
    def commas_and_brackets(node: Any) -> int:
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else None
        return 0 if inner is None else 1 + max(0, len(inner) - 1) + sum(map(commas_and_brackets, inner))

    for text in (dump_json(value), json.dumps(value).encode()):
        assert count_values(text) == 1 + commas_and_brackets(value)


@pytest.mark.parametrize("text", ['"', "\\", '\\"', '",', '[{,"\\', '""', "\\\\", '\\\\"[', "a,b"])
def test_punctuation_in_strings_is_not_counted(text: str) -> None:
    assert count_values(json.dumps([text, {text: text}, text]).encode()) == 5


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b",".join([b"1"] * (MAX_VALUES + 1)) + b"]",
        b"[" + b",".join([b"{}"] * (MAX_VALUES // 2)) + b"]",
        json.dumps({str(number): 1 for number in range(MAX_FIELDS + 1)}).encode(),
        json.dumps([{"a": {str(number): 1 for number in range(MAX_FIELDS + 1)}}]).encode(),
    ],
    ids=["numbers", "objects", "fields", "nested fields"],
)
def test_client_json_is_bounded_in_values_and_fields(body: bytes) -> None:
    with pytest.raises(MalformedError, match=r"values|fields"):
        parse_client_json(body)
    assert parse_json(body) is not None


# ---- values to resources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "the body is null, expected a JSON object"),
        ([], "the body is [], expected a JSON object"),
        ({"text": 5}, "text is 5, expected a string"),
        ({"text": ["a"]}, 'text is ["a"], expected a string'),
        ({"flag": 1}, "flag is 1, expected true or false"),
        ({"flag": "true"}, 'flag is "true", expected true or false'),
        ({"count": -1}, f"count is -1, expected a whole number from 0 to {MAX_UINT}"),
        ({"count": MAX_UINT + 1}, f"count is {MAX_UINT + 1}, expected a whole number from 0 to {MAX_UINT}"),
        ({"count": 2.0**60}, f"count is 1152921504606846976, expected a whole number from 0 to {MAX_UINT}"),
        ({"count": 1.5}, f"count is 1.5, expected a whole number from 0 to {MAX_UINT}"),
        ({"count": True}, f"count is true, expected a whole number from 0 to {MAX_UINT}"),
        ({"count": "4"}, f'count is "4", expected a whole number from 0 to {MAX_UINT}'),
        ({"when": 5}, "when is 5, expected an RFC 3339 time"),
        ({"when": "noon"}, 'when is "noon", expected an RFC 3339 time such as 2026-01-31T12:00:00Z'),
        ({"choice": 1}, "choice is 1, expected a string"),
        ({"items": {}}, "items is {}, expected a list"),
        ({"items": [{"kind": "a"}, 7]}, "items[1] is 7, expected a JSON object"),
        ({"items": [None]}, "items[0] is null, expected a JSON object"),
        ({"items": [{"kind": "a", "size": "1"}]}, 'items[0].size is "1", expected a whole number from 0 to 9'),
        ({"items": [{"size": 1}]}, "items[0].kind is missing, expected a or b"),
        ({"inner": {"kind": None}}, "inner.kind is missing, expected a or b"),
        ({"words": ["a", 1]}, "words[1] is 1, expected a string"),
        ({"counts": []}, "counts is [], expected a JSON object"),
        ({"counts": {"a b": "c"}}, f'counts["a b"] is "c", expected a whole number from 0 to {MAX_UINT}'),
        ({"text": {"x": "y" * 100}}, 'text is {"x": "' + "y" * (SHOWN_CHARACTERS - 10) + "..., expected a string"),
    ],
)
def test_wrong_type_is_refused_with_field_value_and_expectation(raw: object, message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        decode(Thing, raw)
    assert (type(refusal.value), str(refusal.value)) == (MalformedError, message)


@pytest.mark.parametrize("size", [-1, 10, 10.0, MAX_UINT + 1])
def test_number_outside_of_the_bounds_of_its_field_is_refused_with_the_given_error(size: float) -> None:
    raw = {"items": [{"kind": "a", "size": size}]}
    for refusal in (InvalidError, MalformedError):
        with pytest.raises(
            ValidationError, match=r"^items\[0\]\.size is -?\d+, expected a whole number from 0 to 9$"
        ) as error:
            decode_from_client(Thing, raw, [], refusal=refusal)
        assert type(error.value) is refusal


def test_unknown_option_is_refused_with_the_given_error() -> None:
    with pytest.raises(ValidationError) as refusal:
        decode(Thing, {"items": [{"kind": "c"}]})
    assert (type(refusal.value), str(refusal.value)) == (InvalidError, 'items[0].kind is "c", expected one of a, b')
    with pytest.raises(ValidationError) as refusal:
        decode_from_client(Thing, {"items": [{"kind": "c"}]}, [], refusal=MalformedError)
    assert type(refusal.value) is MalformedError


def test_array_elements_have_their_index_in_paths() -> None:
    unknown: list[str] = []
    things = decode_array_from_client(Thing, [{}, {"x": 1, "inner": {"kind": "a", "y": 2}}], unknown, 9)
    assert things == [Thing(), Thing(inner=Inner("a", 0))]
    assert sorted(unknown) == ["[1].inner.y", "[1].x"]
    with pytest.raises(InvalidError, match=r"^\[0\]\.inner\.size is -1"):
        decode_array_from_client(Thing, [{"inner": {"kind": "a", "size": -1}}], [], 9)
    wrongs: list[object] = [None, {}, "a"]
    for wrong in wrongs:
        with pytest.raises(MalformedError, match=r"^the body is .*, expected a JSON array"):
            decode_array_from_client(Thing, wrong, [], 9)


def test_unknown_fields_are_collected_at_every_depth() -> None:
    unknown: list[str] = []
    raw = {"items": [{"kind": "a"}, {"kind": "b", "new": {}}], "known": 1, "newer": None}
    things = Thing(items=(Inner("a", 0), Inner("b", 0)))
    assert decode_from_client(Thing, raw, unknown, also=frozenset({"known"})) == things
    assert sorted(unknown) == ["items[1].new", "newer"]
    assert decode(Thing, raw) == things


def test_names_of_a_client_are_read_in_any_case() -> None:
    raw = {"TEXT": "a", "Items": [{"Kind": "b", "SIZE": 1}], "Inner": {"KIND": "a"}, "COUNTS": {"A": 1}}
    unknown: list[str] = []
    read = decode_from_client(Thing, raw, unknown)
    assert read == Thing(text="a", items=(Inner("b", 1),), inner=Inner("a"), counts={"A": 1})
    assert unknown == []
    assert decode_from_client(Thing, {"Text": "no", "text": "yes"}, unknown).text == "yes"
    assert unknown == ["Text, did you mean text?"]
    assert decode(Thing, {"TEXT": "stored"}) == Thing()


def test_empty_text_of_a_closed_set_is_the_same_as_absent() -> None:
    green = Thing(choice="green")
    assert decode_from_client(Thing, {"choice": ""}, []) == Thing()
    assert decode_from_client(Thing, {"choice": ""}, [], base=green) == green
    with pytest.raises(MalformedError, match="kind is missing"):
        decode_from_client(Thing, {"items": [{"kind": ""}]}, [])
    with pytest.raises(InvalidError):
        decode(Thing, {"choice": ""})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("COUNT_S", "COUNT_S, did you mean counts?"),
        ("chioce", "chioce, did you mean choice?"),
        ("colour", "colour"),
        ('a"\n\\\u00e9', 'a\\"\\n\\\\\\u00e9'),
        ("\x7f\x80\u2028", "\\u007f\\u0080\\u2028"),
        ("x" * 1000, "x" * 128),
    ],
)
def test_unknown_name_is_shown_with_the_known_name_that_it_resembles(name: str, told: str) -> None:
    unknown: list[str] = []
    decode_from_client(Thing, {name: "secret"}, unknown)
    assert unknown == [told]


@pytest.mark.parametrize("raw", [{"words": ["w"] * 4}, {"counts": {"a": 1, "b": 2, "c": 3, "d": 4}}])
def test_lists_and_maps_of_a_client_are_bounded_in_number_and_stored_ones_are_not(raw: dict[str, Any]) -> None:
    (field,) = raw
    with pytest.raises(InvalidError, match=f"^{field} has 4 items, expected at most 3$"):
        decode_from_client(Few, raw, [])
    assert encode(decode(Few, raw)) == raw


def test_array_is_bounded_in_number_before_its_items_are_read() -> None:
    with pytest.raises(InvalidError, match="3 items, expected at most 2"):
        decode_array_from_client(Thing, ["wrong"] * 3, [], 2)


def test_null_is_the_same_as_absent() -> None:
    names = [field.json for field in attrs_of(Thing)]
    assert decode(Thing, dict.fromkeys(names)) == decode(Thing, {}) == Thing()
    full = Thing(text="t", flag=True, count=3, choice="green", words=("w",), inner=Inner("b", 1), counts={"a": 1})
    for raw in ({}, dict.fromkeys(names)):
        assert decode_from_client(Thing, raw, [], base=full) == full
    changed = decode_from_client(Thing, {"text": "", "words": []}, [], base=full)
    assert changed == dataclasses.replace(full, text="", words=())


def test_clients_can_only_set_user_fields() -> None:
    raw = {"text": "mine", "seen": "theirs"}
    assert decode(Thing, raw) == Thing(text="mine", seen="theirs")
    unknown: list[str] = []
    assert decode_from_client(Thing, raw, unknown) == Thing(text="mine")
    assert unknown == []
    assert decode_from_client(Thing, {"seen": 5}, []) == Thing(), "an ignored field may have any value"


def test_integral_float_is_accepted_as_integer() -> None:
    assert decode(Thing, {"count": 4.0}).count == 4
    assert type(decode(Thing, {"count": 4.0}).count) is int


# ---- resources to values --------------------------------------------------------------------------------------------


def test_zero_values_are_omitted_unless_they_have_a_default() -> None:
    assert encode(Thing()) == {"flag": False, "choice": "red"}
    assert encode(Thing(inner=Inner("a", 0), words=("",))) == {
        "flag": False,
        "choice": "red",
        "inner": {"kind": "a"},
        "words": [""],
    }


def validator_of(schema: dict[str, Any]) -> Any:
    # The import takes a tenth of the time of a collection, and each process of pytest-xdist collects all tests.
    from openapi_schema_validator import OAS30Validator

    return OAS30Validator(schema)


@pytest.mark.parametrize("cls", RESOURCES, ids=lambda cls: cls.__name__)
def test_every_resource_round_trips_through_json_that_its_schema_allows(cls: type[Any]) -> None:
    schema = openapi_schema(cls)
    validator = validator_of(schema)

    # Each example draws every field.
    @settings(QUICK, max_examples=50)
    @given(resources(cls))
    def check(value: object) -> None:
        out = encode(value)
        assert None not in out.values()
        validator.validate(out)
        assert out.keys() <= schema["properties"].keys()
        raw = parse_json(dump_json(out))
        assert decode(cls, raw) == value
        unknown: list[str] = []
        decode_from_client(cls, raw, unknown)
        assert unknown == []

    check()


@pytest.mark.parametrize("cls", RESOURCES, ids=lambda cls: cls.__name__)
def test_values_outside_the_schema_are_refused(cls: type[Any]) -> None:
    """For each field, whatever the schema refuses `decode` refuses, too."""
    validator = validator_of(openapi_schema(cls))
    base = {field.json: "true" if "state" in field.json else "running" for field in attrs_of(cls) if field.required}
    wrongs: list[object] = [5.5, -1, True, "no such choice", [5], {"a": []}]
    for field in attrs_of(cls):
        refused = [raw for wrong in wrongs if not validator.is_valid(raw := {**base, field.json: wrong})]
        assert refused
        for raw in refused:
            with pytest.raises(ValidationError) as refusal:
                decode(cls, raw)
            assert str(refusal.value).startswith(field.json)


@pytest.mark.slow
def test_components_are_valid_openapi_and_describe_a_vm() -> None:
    from openapi_spec_validator import OpenAPIV30SpecValidator

    document = {
        "openapi": "3.0.0",
        "info": {"title": "Orchard", "version": "1"},
        "paths": {},
        "components": {"schemas": components()},
    }
    OpenAPIV30SpecValidator(document).validate()
    inlined = {"components": document["components"], "$ref": "#/components/schemas/VM"}
    validator = validator_of(inlined)

    @QUICK
    @given(any_vm())
    def check(vm: Any) -> None:
        out = vm_json(vm)
        validator.validate(out)
        assert out["net-softnet"] == out["netSoftnet"]
        assert out["localName"] == out["tartName"] == vm.tart_name

    check()
    assert not validator.is_valid({"status": "asleep"})


def test_schema_has_required_read_only_deprecated_and_default() -> None:
    schema = openapi_schema(Thing)
    assert schema["properties"]["items"]["items"]["required"] == ["kind"]
    assert "required" not in schema
    assert schema["properties"]["seen"]["readOnly"] is True
    assert schema["properties"]["choice"] == {
        "type": "string",
        "enum": ["red", "green"],
        "default": "red",
        "description": "A colour",
    }
    spec = openapi_schema(VMSpec)["properties"]
    assert spec["net-softnet"]["deprecated"] is True
    assert "deprecated" not in spec["netSoftnet"]
    assert spec["memory"] == {
        "type": "number",
        "multipleOf": 1,
        "minimum": 0,
        "maximum": MAX_UINT,
        "default": 8192,
        "description": "Amount of RAM in megabytes assigned to this VM; 0: the worker's default",
    }
