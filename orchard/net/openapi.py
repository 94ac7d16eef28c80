"""Operations of an HTTP API, and the OpenAPI document that describes them. Pure: no I/O.

An `Operation` is one row of a route table. It holds what is needed to serve a request (method, path, handler, role) and
what is needed to describe it. The server and the document both read that row, so the document describes what is served.

Resources and roles are defined elsewhere: schemas are passed in as an argument, and a role is a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_OPENAPI_VERSION = "3.0.3"
# The description of each status, the same for all operations that declare it.
PROBLEMS: Mapping[int, str] = {
    400: "The JSON, a type or a query parameter is wrong",
    401: "No credentials, or wrong ones",
    403: "The account lacks the role",
    404: "There is no resource with the given name",
    409: "The name is already taken",
    410: "What came after the revision is not known any more; list again",
    412: "The request breaks a rule; the message names it",
    413: "The body is too large",
    426: "The request does not ask for the WebSocket protocol",
    429: "Too many wrong credentials came from this address or for this account; known ones are accepted at any time",
    503: "The change cannot be stored now, or the host that must carry out the request is not reachable",
    507: "The disk is full",
}
_PARAMETER = re.compile(r"\{(\w+)\}")

Schema = Mapping[str, Any]
RoleT = TypeVar("RoleT", bound=str)


@dataclass(frozen=True, slots=True)
class SecurityScheme:
    """A kind of credentials that an operation accepts in place of an account's.

    `doc` completes the sentence "Or ..." in the operation's description. `definition` is the scheme as OpenAPI has it.
    """

    name: str
    doc: str
    definition: Schema


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the query or a header, with `doc` as its description."""

    name: str
    doc: str
    schema: Schema
    required: bool = False


_HANDSHAKE_HEADERS = tuple(
    Parameter(name, "WebSocket protocol required header", {"type": "string"}, required=True)
    for name in ("Connection", "Upgrade")
)


@dataclass(frozen=True, slots=True)
class Operation(Generic[RoleT]):
    """A method on a path: what serves it, and how it is described.

    `path` is below the API's prefix, for example "/vms/{name}". `role` is what the account needs; None admits every
    valid account, and "public" admits requests without credentials. `bearer` is a scheme that is accepted in place of
    an account.

    `body` and `answer` are the schemas of the request's and of the answer's JSON, or None. `example` is a body.
    `body_limit` is the largest body in bytes, if there is a `body`. `problems` are the statuses that do not follow from
    role, body, query or method. `answer_headers` maps names to descriptions. `ndjson` is the schema of a line, if the operation can answer
    with lines of JSON. With `text` it answers with plain text, and with `websocket` 101. An operation that `waits` may
    take long, and is cancelled when the client goes away. One that waits only with a parameter (`waits_with`) is also
    cancelled when the server stops.
    """

    method: str
    path: str
    handler: Callable[..., Any]
    role: RoleT | None
    summary: str
    body: Schema | None = None
    answer: Schema | None = None
    problems: tuple[int, ...] = ()
    query: tuple[Parameter, ...] = ()
    answer_headers: Mapping[str, str] | None = None
    ndjson: Schema | None = None
    text: bool = False
    websocket: bool = False
    waits: bool = False
    waits_with: Parameter | None = None
    bearer: SecurityScheme | None = None
    body_required: bool = True
    example: Any = None
    body_limit: int = 256 * 1024


def ref(name: str) -> Schema:
    """Return a reference to the schema of that name among the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def array_of(name: str) -> Schema:
    """Return the schema of an array of objects of the schema of that name."""
    return {"type": "array", "items": ref(name)}


def build_document(
    operations: Iterable[Operation[RoleT]], *, prefix: str, info: Mapping[str, str], schemas: Mapping[str, Schema]
) -> dict[str, Any]:
    """Return the OpenAPI document of operations that are served below `prefix`, for example "/v1".

    `info` holds the API's title, description and version. `schemas` has all schemas that `ref` was called for, and
    "Problem", which is that of every answer with a status of 400 or more.
    """
    paths: dict[str, dict[str, Any]] = {}
    schemes: dict[str, Schema] = {"basic": {"type": "http", "scheme": "basic"}}
    for operation in operations:
        item = paths.setdefault(operation.path, {})
        if not item and (names := _PARAMETER.findall(operation.path)):
            item["parameters"] = [
                {"in": "path", "name": name, "required": True, "schema": {"type": "string"}} for name in names
            ]
        item[operation.method.lower()] = describe_operation(operation)
        if operation.bearer is not None:
            schemes[operation.bearer.name] = operation.bearer.definition
    return {
        "openapi": _OPENAPI_VERSION,
        "info": dict(info),
        "servers": [{"url": prefix}],
        "security": [{"basic": []}],
        "paths": paths,
        "components": {"securitySchemes": schemes, "schemas": dict(schemas)},
    }


def describe_operation(operation: Operation[RoleT]) -> dict[str, Any]:
    """Return the OpenAPI operation object of one operation."""
    described: dict[str, Any] = {"summary": operation.summary, "tags": [operation.path.split("/")[1] or "controller"]}
    if operation.role == "public":
        described["security"] = []
    elif operation.role is not None:
        described["description"] = f"Needs the role `{operation.role}`."
        if operation.bearer is not None:
            described["description"] += f" Or {operation.bearer.doc}."
            described["security"] = [{"basic": []}, {operation.bearer.name: []}]
    parameters = [_parameter("query", parameter) for parameter in operation.query]
    if operation.websocket:
        parameters += [_parameter("header", parameter) for parameter in _HANDSHAKE_HEADERS]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        media = {"schema": operation.body} | ({} if operation.example is None else {"example": operation.example})
        described["requestBody"] = {"required": operation.body_required, "content": {"application/json": media}}
    described["responses"] = {
        **_success(operation),
        **{str(status): _problem(status) for status in sorted(_problem_statuses(operation))},
    }
    return described


def _parameter(place: str, parameter: Parameter) -> dict[str, Any]:
    return {
        "in": place,
        "name": parameter.name,
        "description": parameter.doc,
        "required": parameter.required,
        "schema": parameter.schema,
    }


def _problem_statuses(operation: Operation[RoleT]) -> set[int]:
    """Return the statuses of 400 or more that an operation may answer with."""
    statuses = set(operation.problems)
    if operation.role != "public":
        statuses |= {401, 429, 503}
        if operation.role is not None:
            statuses.add(403)
    if operation.body is not None:
        statuses |= {400, 412, 413}
    if operation.method != "GET":
        statuses.add(507)
    if operation.query or "{" in operation.path:
        statuses.add(400)
    if operation.websocket:
        statuses |= {400, 426}
    return statuses


def _success(operation: Operation[RoleT]) -> dict[str, Any]:
    if operation.websocket:
        return {"101": {"description": "Switching to the WebSocket protocol"}}
    answer: dict[str, Any] = {"description": "OK"}
    schemas = {"application/json": operation.answer, "application/x-ndjson": operation.ndjson}
    if operation.text:
        schemas["text/plain"] = {"type": "string"}
    if content := {kind: {"schema": schema} for kind, schema in schemas.items() if schema is not None}:
        answer["content"] = content
    headers = dict(operation.answer_headers or {})
    if operation.body is not None:
        headers["Warning"] = "Names what is unknown in the request and was ignored"
    if headers:
        answer["headers"] = {name: {"description": doc, "schema": {"type": "string"}} for name, doc in headers.items()}
    return {"200": answer}


def _problem(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": ref("Problem")}}
    return {"description": PROBLEMS[status], "content": content}
