"""The table of options against the fields of a VM in schema.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from harness.every_field import EVERY_FIELD

from orchard.cli.resources import RESOURCE_KINDS
from orchard.cli.vm_options import VM_OPTIONS
from orchard.codec import attrs_of
from orchard.schema import VMSpec

OPTIONS = {option.field: option for group in VM_OPTIONS.values() for option in group}
# Of the verbs stop, suspend and start, and of scripts, which have several options.
OTHERWISE = {"powerState", "startup_script", "shutdown_script"}


def test_each_field_has_an_option_that_changes_as_the_field_does() -> None:
    fields = {field.json: field.change for field in attrs_of(VMSpec) if field.json not in OTHERWISE}
    assert {name: option.change for name, option in OPTIONS.items()} == fields


def test_each_choice_is_one_of_the_api() -> None:
    for field in attrs_of(VMSpec):
        if field.is_closed_set() and field.json not in OTHERWISE:
            # An empty text means that the option is not given.
            choices = tuple(text for text in get_args(field.type) if text)
            assert OPTIONS[field.json].settings["choices"] == choices, field.json


def test_get_shows_each_field_but_the_password() -> None:
    def shown(vm: Mapping[str, object]) -> list[tuple[str, str]]:
        return list(RESOURCE_KINDS["vm"].describe(vm))

    hidden = [field for field in (*OPTIONS, "powerState") if shown({field: EVERY_FIELD[field]}) == shown({})]
    assert hidden == ["password"]
