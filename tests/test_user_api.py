"""The running API has all that the user's API has, and contradicts nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from harness.user_api import KEYWORDS, OPERATIONS, SCHEMAS, Schema, UserOperation, operations_of, schemas_of

from orchard.operations import describe_api

FILE = Path(__file__).parent.parent.parent / "shared" / "openapi.yaml"
with_file = pytest.mark.skipif(not FILE.exists(), reason="the user's openapi.yaml is not beside the project")

SERVED = describe_api("/v1")
SERVED_OPERATIONS, SERVED_SCHEMAS = operations_of(SERVED), schemas_of(SERVED)


def users_file() -> Mapping[str, Any]:
    document: Mapping[str, Any] = yaml.safe_load(FILE.read_text())
    return document


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_the_users_api_is_served(name: str) -> None:
    assert contradictions(OPERATIONS[name], SERVED_OPERATIONS[name]) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_of_the_users_api_is_served(name: str) -> None:
    assert differences(name, SCHEMAS[name], SERVED_SCHEMAS[name]) == []


@with_file
def test_the_table_and_the_users_file_agree() -> None:
    document = users_file()
    assert operations_of(document) == OPERATIONS
    # The file calls this array an object.
    assert schemas_of(document) == {**SCHEMAS, "Events": {**SCHEMAS["Events"], "type": "object"}}


@with_file
def test_the_running_api_has_all_that_the_users_file_has() -> None:
    document = users_file()
    for name, operation in operations_of(document).items():
        assert contradictions(operation, SERVED_OPERATIONS[name]) == [], name
    for name, schema in schemas_of(document).items():
        if name != "Events":
            assert differences(name, schema, SERVED_SCHEMAS[name]) == []


def test_a_missing_field_status_or_parameter_is_found() -> None:
    operation = SERVED_OPERATIONS["GET /vms/{name}/events"]
    without_status = UserOperation(answers={200: operation.answers[200]}, headers=operation.headers)
    found = contradictions(OPERATIONS["GET /vms/{name}/events"], without_status)
    assert found == ["status 404", "query limit", "query order", "query cursor"]
    assert differences("IP", SCHEMAS["IP"], {"type": "object", "properties": {}}) == ["IP.ip is missing"]
    assert differences("IP", SCHEMAS["IP"], {"type": "array"}) == ["IP: type", "IP.ip is missing"]


def contradictions(wanted: UserOperation, served: UserOperation) -> list[str]:
    """Name the parts of an operation that are missing or different."""
    found = [] if wanted.body is None else _different_bodies("body", {"": wanted.body}, {"": served.body})
    if wanted.body is not None and wanted.body_required != served.body_required:
        found.append("body is required")
    for status, bodies in wanted.answers.items():
        if status not in served.answers:
            found.append(f"status {status}")
        else:
            found += _different_bodies(f"status {status}", bodies, served.answers[status])
    for status, headers in wanted.headers.items():
        found += [f"header {name}" for name in headers if name not in served.headers.get(status, ())]
    for name, (required, schema) in wanted.parameters.items():
        if name not in served.parameters:
            found.append(name)
        elif served.parameters[name][0] != required:
            found.append(f"{name} is required")
        else:
            found += differences(name, schema, served.parameters[name][1])
    return found


def _different_bodies(where: str, wanted: Mapping[str, Schema], served: Mapping[str, Schema | None]) -> list[str]:
    found = []
    for media_type, schema in wanted.items():
        body = served.get(media_type)
        found += [f"{where} {media_type}"] if body is None else differences(where, schema, body)
    return found


def differences(where: str, wanted: Schema, served: Schema) -> list[str]:
    """Name the keywords and the properties of a schema that are missing or different."""
    found = [f"{where}: {word}" for word in KEYWORDS if word in wanted and served.get(word) != wanted[word]]
    for name, schema in wanted.get("properties", {}).items():
        inner = served.get("properties", {}).get(name)
        found += [f"{where}.{name} is missing"] if inner is None else differences(f"{where}.{name}", schema, inner)
    for keyword in ("items", "additionalProperties"):
        if keyword in wanted:
            found += differences(f"{where}[]", wanted[keyword], served.get(keyword, {}))
    for index, part in enumerate(wanted.get("allOf", [])):
        parts = served.get("allOf", [])
        found += differences(f"{where}&{index}", part, parts[index] if index < len(parts) else {})
    return found
