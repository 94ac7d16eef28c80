"""The OpenAPI document: how operations are described, and that a running controller answers as its document says."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from harness.strategies import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard import __version__
from orchard.net.openapi import Operation, Parameter, SecurityScheme, build_document, describe_operation, ref
from orchard.operations import OPERATIONS, describe_api
from orchard.testing import BlockingCluster, start_cluster

# Endless answers have tests of their own.
ENDLESS = ("/rpc/watch", "/watch")


@pytest.fixture(scope="module")
def live() -> Iterator[BlockingCluster]:
    with start_cluster(workers=1) as running:
        # Generated requests are likely to use this name.
        running.client.vms.create(name="0", image="any")
        running.client.service_accounts.create("0")
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), [(op.method, op.path) for op in OPERATIONS if op.path not in ENDLESS])
def test_requests_that_fit_the_document_are_answered_as_it_says(method: str, path: str, live: BlockingCluster) -> None:
    # To import it takes a second, which the collection of tests would take in each process.
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    described = schemathesis.openapi.from_dict(describe_api("/v1"))[path][method]
    strategies = [described.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    promised = [
        not_a_server_error,
        checks.response_schema_conformance,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
    ]

    @settings(QUICK, max_examples=10)
    @given(st.one_of(strategies))
    def is_answered_as_described(case: schemathesis.Case[Any]) -> None:
        # The watch of a VM is an answer without an end, and has tests of its own.
        if case.query and str(case.query.get("watch", "")).lower() not in ("", "false"):
            case.query = {**case.query, "watch": "false"}
        # A wait for what never comes ends with 503.
        if case.query and case.query.get("waitFor"):
            case.query = {**case.query, "waitFor": ""}
        case.call_and_validate(base_url=f"{live.url}/v1", checks=promised)

    is_answered_as_described()


def test_the_served_document_has_the_paths_of_the_route_table(live: BlockingCluster) -> None:
    with urllib.request.urlopen(f"{live.url}/v1/openapi.json") as answer:
        assert json.load(answer)["paths"].keys() == {op.path for op in OPERATIONS}


@pytest.mark.slow
def test_the_document_is_valid_openapi_below_any_prefix() -> None:
    from openapi_spec_validator import validate

    made = describe_api("/orchard/v1")
    validate(made)
    assert (made["servers"], made["info"]["version"]) == ([{"url": "/orchard/v1"}], __version__)


def test_every_operation_is_in_the_document_once() -> None:
    paths = describe_api("/v1")["paths"]
    described = [(path, method.upper()) for path, item in paths.items() for method in item if method != "parameters"]
    assert sorted(described) == sorted((op.path, op.method) for op in OPERATIONS)


def test_every_schema_that_the_document_refers_to_is_in_it() -> None:
    made = describe_api("/v1")
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(made)))
    assert used == made["components"]["schemas"].keys()


def test_roles_and_security_are_described() -> None:
    public = describe_operation(Operation("GET", "/a", print, "public", "Do"))
    assert (public["security"], list(public["responses"])) == ([], ["200"])
    authenticated = describe_operation(Operation("GET", "/a", print, None, "Do"))
    assert list(authenticated["responses"]) == ["200", "401", "429", "503"]
    assert "security" not in authenticated, "the security of the whole document applies"
    scheme = SecurityScheme("key", "a key", {"type": "http", "scheme": "bearer"})
    operation = Operation("GET", "/a", print, "cook", "Do", bearer=scheme)
    bearer = describe_operation(operation)
    assert bearer["description"] == "Needs the role `cook`. Or a key."
    assert bearer["security"] == [{"basic": []}, {"key": []}]
    components = build_document([operation], prefix="", info={}, schemas={"Problem": {}})["components"]
    assert components["securitySchemes"].keys() == {"basic", "key"}
    assert components["schemas"] == {"Problem": {}}


def test_query_body_answer_and_headers_are_described() -> None:
    query = (Parameter("uid", "Whose", {"type": "string"}, required=True),)
    headers = {"X-Next": "What follows"}
    operation: Operation[str] = Operation(
        "GET", "/a", print, None, "Do", answer=ref("VM"), query=query, answer_headers=headers, ndjson=ref("Event")
    )
    described = describe_operation(operation)
    assert described["parameters"] == [
        {"in": "query", "name": "uid", "description": "Whose", "required": True, "schema": {"type": "string"}}
    ]
    answer = described["responses"]["200"]
    assert answer["headers"].keys() == {"X-Next"}
    assert answer["content"]["application/json"] == {"schema": {"$ref": "#/components/schemas/VM"}}
    assert answer["content"]["application/x-ndjson"] == {"schema": ref("Event")}
    assert "400" in described["responses"]
    optional = describe_operation(Operation("POST", "/a", print, None, "Do", body={}, body_required=False))
    assert optional["requestBody"] == {"required": False, "content": {"application/json": {"schema": {}}}}
    assert optional["responses"]["200"]["headers"].keys() == {"Warning"}


def test_websocket_operation_is_described() -> None:
    described = describe_operation(Operation("GET", "/a", print, None, "Do", websocket=True))
    assert {(header["in"], header["name"], header["required"]) for header in described["parameters"]} == {
        ("header", "Connection", True),
        ("header", "Upgrade", True),
    }
    assert described["responses"].keys() == {"101", "400", "401", "426", "429", "503"}


def test_statuses_and_path_parameters_are_described() -> None:
    operation = Operation("POST", "/a/{name}", print, "compute:write", "Do", body={"type": "object"}, problems=(409,))
    described = describe_operation(operation)
    assert described["description"] == "Needs the role `compute:write`."
    assert described["responses"].keys() == {"200", "400", "401", "403", "409", "412", "413", "429", "503", "507"}
    path = build_document([operation], prefix="/v1", info={}, schemas={})["paths"]["/a/{name}"]
    assert path["parameters"] == [{"in": "path", "name": "name", "required": True, "schema": {"type": "string"}}]
