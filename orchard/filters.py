"""Filters of VMs by their fields: the texts of the query parameter `filter`, read, and the VMs that match. Pure.

A text is `PATH=VALUE` or `PATH!=VALUE`, or several of these with commas between them. All of them must hold. PATH is one
of PATHS. A comma and a percent sign inside a condition are percent-encoded, and so are `=` and `!` inside KEY. This comes
on top of the encoding of the query.

A field that a VM does not have equals no VALUE, not even an empty one, so `PATH!=VALUE` matches that VM.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import get_args

from orchard.codec import MalformedError, shown
from orchard.schema import METADATA_KEY, NAME, VM, Status

PATHS = ("worker", "status", "image", "name", "createdBy", "metadata.KEY", "label.KEY")
# Conditions of one filter. Each is tested for each VM.
MAX_CONDITIONS = 64
_PERCENT_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")

_FIELDS: dict[str, Callable[[VM], str]] = {
    "worker": attrgetter("state.worker"),
    "status": attrgetter("state.status"),
    "image": attrgetter("spec.image"),
    "name": attrgetter("meta.name"),
    "createdBy": attrgetter("meta.created_by"),
}
_MAPS: dict[str, str] = {"metadata": "spec.metadata", "label": "spec.labels"}
_STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class FieldCondition:
    """One condition. `key` is that of `metadata.KEY` and `label.KEY`, and "" with every other path."""

    path: str
    key: str
    value: str
    is_negated: bool = False

    def __str__(self) -> str:
        path = f"{self.path}.{_encoded(self.key, '%,=!')}" if self.path in _MAPS else self.path
        return f"{path}{'!=' if self.is_negated else '='}{_encoded(self.value, '%,')}"


class VMFilter:
    """Conditions that must all hold; without one, every VM matches."""

    __slots__ = ("_tests", "conditions")

    def __init__(self, conditions: Iterable[FieldCondition]) -> None:
        # Each once, in their order.
        self.conditions = tuple(dict.fromkeys(conditions))
        self._tests = [_test_of(condition) for condition in self.conditions]

    def __bool__(self) -> bool:
        """Return whether there is a condition."""
        return bool(self.conditions)

    def __str__(self) -> str:
        return ",".join(map(str, self.conditions))

    @property
    def only_worker(self) -> str | None:
        """The worker's name, if the filter is no more than `worker=NAME`."""
        match self.conditions:
            case (FieldCondition("worker", _, name, False),):
                return name
        return None

    def matches(self, vm: VM) -> bool:
        return all(test(vm) for test in self._tests)

    def select(self, vms: Sequence[VM]) -> Sequence[VM]:
        """Return those of the VMs that match, in their order."""
        for test in self._tests:
            vms = [vm for vm in vms if test(vm)]
        return vms


def parse_filter(texts: Iterable[str]) -> VMFilter:
    """Return the filter of some texts, all of which must hold. An empty text has no condition. Raises MalformedError."""
    conditions = [_condition(part) for text in texts if text for part in text.split(",")]
    if len(conditions) > MAX_CONDITIONS:
        raise MalformedError(f"filter has {len(conditions)} conditions, expected at most {MAX_CONDITIONS}")
    return VMFilter(conditions)


def _condition(text: str) -> FieldCondition:
    path, equals, value = text.partition("=")
    is_negated = path.endswith("!")
    path, dot, key = path.removesuffix("!").partition(".")
    if not equals or path not in (_MAPS if dot else _FIELDS):
        raise MalformedError(
            f"filter is {shown(text)}, expected PATH=VALUE or PATH!=VALUE with a PATH of {', '.join(PATHS)}"
        )
    condition = FieldCondition(path, _decoded(key), _decoded(value), is_negated)
    _check_condition(condition)
    return condition


def _check_condition(condition: FieldCondition) -> None:
    """Raise MalformedError for a key or a value that no VM can have, which with `!=` would match every VM."""
    path, key, value = condition.path, condition.key, condition.value
    expected = ""
    if path == "status" and value not in _STATUSES:
        expected = f"one of {', '.join(_STATUSES)}"
    elif path == "worker" and not NAME.fullmatch(value):
        expected = "the name of a worker"
    elif path == "name" and value != "*" and not NAME.fullmatch(value.removesuffix("*")):
        expected = "the name of a VM, or the beginning of one and *"
    elif path == "metadata" and not METADATA_KEY.fullmatch(key):
        raise MalformedError(f"filter has the metadata key {shown(key)}, expected {METADATA_KEY.pattern}")
    if expected:
        raise MalformedError(f"filter has {path} {shown(value)}, expected {expected}")


def _decoded(text: str) -> str:
    if "%" not in text:
        return text
    if text.count("%") != len(_PERCENT_ENCODED.findall(text)):
        raise MalformedError(f"filter has {shown(text)}, expected %25 for a percent sign, and %2C for a comma")
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise MalformedError(f"filter has {shown(text)}, which is not UTF-8 after percent-decoding") from None


def _encoded(text: str, characters: str) -> str:
    for character in characters:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _test_of(condition: FieldCondition) -> Callable[[VM], bool]:
    """Return a function that tests a VM. It is called for each VM of a cluster, so it does no more than it must."""
    value, wanted = condition.value, not condition.is_negated
    if condition.path in _MAPS:
        return partial(_has_pair, attrgetter(_MAPS[condition.path]), condition.key, value, wanted)
    read = _FIELDS[condition.path]
    if condition.path == "name" and value.endswith("*"):
        prefix = value[:-1]
        return lambda vm: vm.meta.name.startswith(prefix) is wanted
    return lambda vm: (read(vm) == value) is wanted


def _has_pair(pairs: Callable[[VM], dict[str, str]], key: str, value: str, wanted: bool, vm: VM) -> bool:
    return (pairs(vm).get(key) == value) is wanted
