"""Filters of VMs by their fields: the texts of the query parameter `filter`, read, and the VMs that match. Pure.

A text is `PATH=VALUE` or `PATH!=VALUE`, or several of these with commas between them. All of them must hold. PATH is
one of PATHS. A comma and a percent sign inside a condition are percent-encoded, and so are `=` and `!` inside KEY. This
comes on top of the encoding of the query.

A field that a VM does not have equals no VALUE, not even an empty one, so `PATH!=VALUE` matches that VM.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple, get_args

from orchard.codec import MalformedError, shown
from orchard.schema import METADATA_KEY, NAME, VM, Status

PATHS = ("worker", "status", "image", "name", "createdBy", "metadata.KEY", "label.KEY")
# The most conditions of one filter. Each is tested for each VM.
MAX_CONDITIONS = 64
_CONDITION = re.compile(r"(\w+)(?:\.([^=]*?))?(!?)=(.*)", re.DOTALL)
_PERCENT_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")

_FIELDS: dict[str, Callable[[VM], str]] = {
    "worker": attrgetter("state.worker"),
    "status": attrgetter("state.status"),
    "image": attrgetter("spec.image"),
    "name": attrgetter("meta.name"),
    "createdBy": attrgetter("meta.created_by"),
}
_MAPS: dict[str, Callable[[VM], Mapping[str, str]]] = {
    "metadata": attrgetter("spec.metadata"),
    "label": attrgetter("spec.labels"),
}
# The patterns of the values of some paths, and their descriptions.
_VALUES: dict[str, tuple[re.Pattern[str], str]] = {
    "status": (re.compile("|".join(get_args(Status))), f"one of {', '.join(get_args(Status))}"),
    "worker": (NAME, "the name of a worker"),
    "name": (re.compile(rf"{NAME.pattern}\*?|\*"), "the name of a VM, or the beginning of one and *"),
}


class FieldCondition(NamedTuple):
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

    def __init__(self, conditions: Iterable[FieldCondition]) -> None:
        # Each once, in their order.
        self.conditions = tuple(dict.fromkeys(conditions))

    def __bool__(self) -> bool:
        """Return whether there is a condition."""
        return bool(self.conditions)

    def __str__(self) -> str:
        return ",".join(map(str, self.conditions))

    @property
    def only_worker(self) -> str | None:
        """The worker's name, if the filter is no more than `worker=NAME`."""
        if len(self.conditions) == 1:
            condition = self.conditions[0]
            if condition.path == "worker" and not condition.is_negated:
                return condition.value
        return None

    @cached_property
    def _tests(self) -> list[Callable[[VM], bool]]:
        # Computed late, because the polls of workers, which are most filters, need no test.
        return [_test_of(condition) for condition in self.conditions]

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
    found = _CONDITION.fullmatch(text)
    if found is None or found[1] not in (_FIELDS if found[2] is None else _MAPS):
        raise MalformedError(
            f"filter is {shown(text)}, expected PATH=VALUE or PATH!=VALUE with a PATH of {', '.join(PATHS)}"
        )
    condition = FieldCondition(found[1], _decoded(found[2] or ""), _decoded(found[4]), bool(found[3]))
    # A key or a value that no VM can have would match every VM with `!=`.
    if condition.path in _VALUES:
        pattern, expected = _VALUES[condition.path]
        if not pattern.fullmatch(condition.value):
            raise MalformedError(f"filter has {condition.path} {shown(condition.value)}, expected {expected}")
    if condition.path == "metadata" and not METADATA_KEY.fullmatch(condition.key):
        raise MalformedError(f"filter has the metadata key {shown(condition.key)}, expected {METADATA_KEY.pattern}")
    return condition


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
    key, read = condition.key, _FIELDS.get(condition.path)
    if read is None:
        pairs = _MAPS[condition.path]
        return lambda vm: (pairs(vm).get(key) == value) is wanted
    if condition.path == "name" and value.endswith("*"):
        prefix = value[:-1]
        return lambda vm: vm.meta.name.startswith(prefix) is wanted
    return lambda vm: (read(vm) == value) is wanted
