"""The API's description of itself: operations, and the OpenAPI document made of them. Law: pure.

An `Operation` is one line of the controller's route table. It says what is needed to serve a request (method, path,
handler, role) and what is needed to describe it; both come from here, so that the document cannot say something else
than the server does. The nouns' schemas come from schema.py in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchard.schema import Role, components

OPENAPI_VERSION = "3.0.3"
# What each status means wherever an operation declares it.
PROBLEMS: Mapping[int, str] = {
    400: "The JSON, a type or a query parameter is wrong",
    401: "No credentials, or wrong ones",
    403: "The service account lacks the role",
    404: "There is no resource with the given name",
    409: "The name is already taken",
    412: "A rule refuses it; the message says which",
    426: "The request does not ask for the WebSocket protocol",
    429: "Too many wrong credentials came from this address; the right ones are let in at any time",
    503: "It could not be stored, or the far end could not be reached",
    507: "The disk is full",
}
_PARAMETER = re.compile(r"\{(\w+)\}")

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the query."""

    name: str
    doc: str
    schema: Schema
    required: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """What a method does on a path. `role` None: any valid account may; "public": anybody."""

    method: str
    path: str  # below the API's prefix, e.g. "/vms/{name}"
    handler: Callable[..., Any]
    role: Role | Literal["public"] | None
    summary: str
    body: Schema | None = None
    answer: Schema | None = None  # of status 200; None: its body is empty
    problems: tuple[int, ...] = ()  # beside those that every operation with a role, a body or a query may have
    query: tuple[Parameter, ...] = ()
    answer_headers: Mapping[str, str] | None = None  # name -> description
    ndjson: bool = False  # with `?watch=true` the answer is a stream of such objects
    websocket: bool = False  # it answers 101
    vm_token: bool = False  # an access token for the VM in the path does as well as an account
    body_required: bool = True


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array_of(name: str) -> Schema:
    return {"type": "array", "items": ref(name)}


def document(operations: Iterable[Operation], *, prefix: str, version: str) -> dict[str, Any]:
    """Make the OpenAPI document of the operations, which are served below `prefix` (e.g. "/v1")."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        item = paths.setdefault(operation.path, {})
        if not item and (names := _PARAMETER.findall(operation.path)):
            item["parameters"] = [
                {"in": "path", "name": name, "required": True, "schema": {"type": "string"}} for name in names
            ]
        item[operation.method.lower()] = describe(operation)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "Orchard", "description": "Orchard orchestration API", "version": version},
        "servers": [{"url": prefix}],
        "security": [{"basic": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic"},
                "vmAccessToken": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
            },
            "schemas": components(),
        },
    }


def describe(operation: Operation) -> dict[str, Any]:
    """Describe one operation as an OpenAPI operation object."""
    described: dict[str, Any] = {"summary": operation.summary, "tags": [operation.path.split("/")[1] or "controller"]}
    if operation.role == "public":
        described["security"] = []
    elif operation.role is not None:
        described["description"] = f"Needs the role `{operation.role}`."
        if operation.vm_token:
            described["description"] += " Or an access token for the VM."
            described["security"] = [{"basic": []}, {"vmAccessToken": []}]
    if parameters := [_parameter(parameter) for parameter in operation.query]:
        described["parameters"] = parameters
    if operation.websocket:
        described["parameters"] = [*parameters, *(_handshake_header(name) for name in ("Connection", "Upgrade"))]
    if operation.body is not None:
        content = {"application/json": {"schema": operation.body}}
        described["requestBody"] = {"required": operation.body_required, "content": content}
    described["responses"] = {
        **_success(operation),
        **{str(status): _problem(status) for status in sorted(_refusals(operation))},
    }
    return described


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "in": "query",
        "name": parameter.name,
        "description": parameter.doc,
        "required": parameter.required,
        "schema": parameter.schema,
    }


def _handshake_header(name: str) -> dict[str, Any]:
    doc = "WebSocket protocol required header"
    return {"in": "header", "name": name, "description": doc, "required": True, "schema": {"type": "string"}}


def _refusals(operation: Operation) -> set[int]:
    statuses = set(operation.problems)
    if operation.role != "public":
        statuses |= {401, 429, 503}
        if operation.role is not None:
            statuses.add(403)
    if operation.body is not None:
        statuses |= {400, 412}
    if operation.method != "GET":
        statuses.add(507)
    if operation.query or "{" in operation.path:
        statuses.add(400)
    if operation.websocket:
        statuses |= {400, 426}
    return statuses


def _success(operation: Operation) -> dict[str, Any]:
    if operation.websocket:
        return {"101": {"description": "Switching to the WebSocket protocol"}}
    answer: dict[str, Any] = {"description": "OK"}
    if operation.answer is not None:
        answer["content"] = {"application/json": {"schema": operation.answer}}
    if operation.ndjson:
        properties = {"type": {"type": "string", "enum": ["ADDED", "MODIFIED", "DELETED"]}, "object": operation.answer}
        answer["content"]["application/x-ndjson"] = {"schema": {"type": "object", "properties": properties}}
    headers = dict(operation.answer_headers or {})
    if operation.body is not None:
        headers["Warning"] = "Names the fields of the body that were not known, and ignored"
    if headers:
        answer["headers"] = {name: {"description": doc, "schema": {"type": "string"}} for name, doc in headers.items()}
    return {"200": answer}


def _problem(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": ref("Problem")}}
    return {"description": PROBLEMS[status], "content": content}
