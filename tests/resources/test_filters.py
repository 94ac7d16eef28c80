"""Filters of VMs: which texts are read, and which VMs match."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from harness.strategies import QUICK, pending, running, spec, texts, vm_json
from hypothesis import given
from hypothesis import strategies as st

from orchard.codec import MalformedError
from orchard.handlers.parameters import read_filter
from orchard.net.request import Query
from orchard.resources.filters import MAX_CONDITIONS, FieldCondition, VMFilter, parse_filter
from orchard.schema import VM, VMMeta, VMState


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("worker=w", [("worker", "", "w", False)]),
        ("status!=failed", [("status", "", "failed", True)]),
        ("name=ci-*", [("name", "", "ci-*", False)]),
        ("image=ghcr.io/a:b", [("image", "", "ghcr.io/a:b", False)]),
        ("createdBy=", [("createdBy", "", "", False)]),
        ("metadata.team=a=b", [("metadata", "team", "a=b", False)]),
        ("metadata.a.b/c=x%2Cy%25%2c", [("metadata", "a.b/c", "x,y%,", False)]),
        ("label.a%2C%3D%21%25!=v", [("label", "a,=!%", "v", True)]),
        ("label.a!!=v", [("label", "a!", "v", True)]),
        ("worker=w,worker=w,status=running", [("worker", "", "w", False), ("status", "", "running", False)]),
        ("label.k=%E2%82%AC+ ", [("label", "k", "€+ ", False)]),
    ],
)
def test_conditions_of_a_filter(text: str, conditions: list[tuple[str, str, str, bool]]) -> None:
    parsed = parse_filter([text])
    assert list(parsed.conditions) == [FieldCondition(*each) for each in conditions]
    assert parse_filter([str(parsed)]).conditions == parsed.conditions


@pytest.mark.parametrize(
    "text",
    [
        *("a", "a=b", "=b", "worker", "worker!w", "worker.x=w", "status.a=running", "metadata=x", "label=x"),
        *("Worker=w", "metadata.=x", "metadata.a b=x", "metadata.a%2Cb=x", f"metadata.{'k' * 129}=x"),
        *("worker=", "worker=a b", "worker!=", "status=", "status=Running", "status!=runing"),
        *("name=", "name=*a", "name=a**", "name!=*a", "name=a b"),
        *("image=%", "image=%4", "image=%zz", "image=a%2", "image=%FF", "worker=w,", ",worker=w", "worker=w,,worker=x"),
        ",".join(f"image=i{number}" for number in range(MAX_CONDITIONS + 1)),
    ],
)
def test_filter_that_could_be_a_slip_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_filter([text])


@QUICK
@given(
    st.lists(
        st.sampled_from([*"a.=!,%*", "%2C", "%25", "%FF", "name", "label.", "metadata.", "status=failed"]) | texts()
    )
)
def test_any_text_is_refused_or_read_as_what_it_is_written_as(parts: list[str]) -> None:
    try:
        parsed = parse_filter(["".join(parts)])
    except MalformedError:
        return
    assert parse_filter([str(parsed)]).conditions == parsed.conditions


@pytest.mark.parametrize(
    ("texts", "worker"),
    [
        (["worker=w"], "w"),
        (["worker=w", "worker=w"], "w"),
        (["worker!=w"], None),
        (["worker=w,worker=x"], None),
        (["worker=w", "status=running"], None),
        (["name=w"], None),
        ([""], None),
        ([], None),
    ],
)
def test_filter_by_one_worker_alone_names_it(texts: list[str], worker: str | None) -> None:
    assert parse_filter(texts).only_worker == worker


# ---- which VMs match -----------------------------------------------------------------------------------------------

# Few different values, so that VMs share them, and all characters that mean something in a filter.
VALUES = (
    st.sampled_from(["", "a", "b", "a,b", "a=b", "%", "%2C", "50%,", "!=", "+ &", "\u00e4\U0001f600", "*", "a*"])
    | texts()
)
LABEL_KEYS = st.sampled_from(["", "a", "a.b", "a=", "!", "a!", "%2C", ",", "a b", "\u00e4"])
METADATA_KEYS = st.sampled_from(["a", "a.b", "_/-.9", "k" * 128])
NAMES = st.sampled_from(["a", "ab", "abc", "b", "ab.c:d", "a-", "A"])


@st.composite
def vms(draw: st.DrawFn) -> VM:
    meta = VMMeta(draw(NAMES), "uid", created_by=draw(VALUES))
    labels, metadata = (draw(st.dictionaries(keys, VALUES, max_size=3)) for keys in (LABEL_KEYS, METADATA_KEYS))
    state = VMState(
        status=draw(st.sampled_from(["pending", "running", "failed"])), worker=draw(st.sampled_from(["", "w", "x"]))
    )
    return VM(meta, spec(image=draw(st.sampled_from(["base", "other"])), labels=labels, metadata=metadata), state)


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, str, str, bool]:
    path = draw(st.sampled_from(["worker", "status", "image", "name", "createdBy", "metadata", "label"]))
    keys = {"metadata": METADATA_KEYS, "label": LABEL_KEYS}
    values: dict[str, Any] = {
        "worker": st.sampled_from(["w", "x", "y"]),
        "status": st.sampled_from(["pending", "running", "failed"]),
        "name": NAMES | st.sampled_from(["a*", "ab*", "*", "z*"]),
    }
    return path, draw(keys.get(path, st.just(""))), draw(values.get(path, VALUES)), draw(st.booleans())


def value_of(vm: VM, path: str, key: str) -> str | None:
    """Return a value from a VM's JSON, None if it is absent there."""
    shown = vm_json(vm)
    if path in ("metadata", "label"):
        found = shown.get({"metadata": "metadata", "label": "labels"}[path], {}).get(key)
    else:
        found = shown.get(path, "" if path in ("createdBy", "worker") else None)
    assert found is None or isinstance(found, str)
    return found


def holds(vm: VM, path: str, key: str, value: str, negated: bool) -> bool:
    has = value_of(vm, path, key)
    if path == "name" and value.endswith("*"):
        return (has or "").startswith(value[:-1]) != negated
    return (has == value) != negated


def as_text(path: str, key: str, value: str, negated: bool) -> str:
    """Return a condition as a client writes it, which percent-encodes much more than it has to."""
    dot = "." if path in ("metadata", "label") else ""
    star = "*" if path == "name" and value.endswith("*") else ""
    return f"{path}{dot}{quote(key)}{'!' * negated}={quote(value.removesuffix(star), safe='')}{star}"


@pytest.mark.slow
@QUICK
@given(st.lists(vms(), max_size=6), st.lists(conditions(), min_size=1, max_size=3), st.data())
def test_filter_matches_exactly_the_vms_that_have_the_values(
    present: list[VM], wanted: list[tuple[str, str, str, bool]], data: st.DataObject
) -> None:
    expected = [vm for vm in present if all(holds(vm, *condition) for condition in wanted)]
    minimal = str(VMFilter(FieldCondition(*condition) for condition in wanted))
    full = ",".join(as_text(*condition) for condition in wanted)
    repeated = [as_text(*condition) for condition in wanted]
    for texts_ in ([minimal], [full], repeated):
        query = "&".join(f"filter={data.draw(st.sampled_from([quote, quote_plus]))(text)}" for text in texts_)
        parsed = read_filter(Query(query))
        assert list(parsed.select(present)) == expected
        assert [vm for vm in present if parsed.matches(vm)] == expected


def test_name_may_end_in_a_star() -> None:
    vm = pending("ci-1")
    for text, matches in {"ci-*": True, "ci-1*": True, "*": True, "i-1*": False, "ci-2*": False, "ci-": False}.items():
        assert parse_filter([f"name={text}"]).matches(vm) is matches, text
        assert parse_filter([f"name!={text}"]).matches(vm) is not matches, text


def test_absent_key_equals_no_value() -> None:
    vm = running(replace(VM(VMMeta("vm", "uid"), spec(metadata={"empty": ""}), VMState())))
    for text, matches in {
        "metadata.empty=": True,
        "metadata.empty!=": False,
        "metadata.absent=": False,
        "metadata.absent!=": True,
        "metadata.absent!=x": True,
        "label.absent=": False,
    }.items():
        assert parse_filter([text]).matches(vm) is matches, text
