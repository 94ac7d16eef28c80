"""The fast reading of resources says what the codec says, of every object; the parts of a VM are written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness.strategies import QUICK, any_vm, json_values, resources
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.codec import ValidationError, attrs_of, decode
from orchard.resources import json_text
from orchard.resources.cluster import ClusterIdentity, Promise
from orchard.resources.json_text import decode_stored, encode
from orchard.schema import VM, ClusterSettings, Event, ServiceAccount, VMMeta, VMSpec, VMState, Worker, vm_from_json
from orchard.store import encode_object

# Of whole VMs, which take long to draw.
FEW = settings(QUICK, max_examples=20)
CLASSES: list[type[Any]] = [
    ClusterIdentity, ClusterSettings, Event, Promise, ServiceAccount, VMMeta, VMSpec, VMState, Worker,
]  # fmt: skip


def outcome(read: Any, cls: type[Any], raw: object, also: frozenset[str]) -> object:
    """Return what a function makes of a JSON object, or the error."""
    try:
        found = read(cls, raw, also)
    except ValidationError as error:
        return type(error), str(error)
    # The fields of newer programs are not compared.
    return found, getattr(found, "unknown", None)


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
def test_object_that_was_written_is_read_as_by_the_codec(cls: type[Any]) -> None:
    @QUICK
    @given(resources(cls))
    def check(resource: Any) -> None:
        raw = encode(resource)
        assert outcome(decode_stored, cls, raw, frozenset()) == outcome(decode, cls, raw, frozenset())

    check()


def test_vm_that_was_written_is_read_without_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "decode", None)

    @FEW
    @given(any_vm())
    def check(vm: VM) -> None:
        assert vm_from_json(json.loads(encode_object(vm))) == vm

    check()


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
def test_object_of_any_form_is_read_or_refused_as_by_the_codec(cls: type[Any]) -> None:
    names = [name for field in attrs_of(cls) for name in (field.json, field.twin) if name]

    @settings(QUICK, max_examples=50)
    @given(
        resources(cls).map(encode),
        st.dictionaries(st.sampled_from([*names, "new", "other"]), json_values(), max_size=3),
        st.sets(st.sampled_from(names)),
    )
    def check(raw: dict[str, Any], altered: dict[str, Any], missing: set[str]) -> None:
        changed = {name: value for name, value in {**raw, **altered}.items() if name not in missing}
        also = frozenset({"other"})
        assert outcome(decode_stored, cls, changed, also) == outcome(decode, cls, changed, also)

    check()


@pytest.mark.slow
@FEW
@given(any_vm(), st.dictionaries(st.text(max_size=4).map("new-{}".format), json_values(), max_size=2))
def test_vm_is_written_as_its_parts_together(vm: VM, unknown: dict[str, Any]) -> None:
    vm.meta.unknown.update(unknown)  # type: ignore[attr-defined]
    names = {"localName": vm.tart_name, "tartName": vm.tart_name}
    assert json.loads(encode_object(vm)) == {**encode(vm.meta), **encode(vm.state), **names, **encode(vm.spec)}


@pytest.mark.parametrize("raw", [None, 1, "a", [], [{}]])
def test_value_that_is_no_object_is_refused_as_by_the_codec(raw: object) -> None:
    assert outcome(decode_stored, Event, raw, frozenset()) == outcome(decode, Event, raw, frozenset())
