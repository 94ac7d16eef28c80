"""The user's API as a table: every path, method, parameter, field and status that must work.

The table was generated from the user's openapi.yaml, without descriptions and examples, and is kept by hand. A change
here is a change of the contract. tests/test_user_api.py compares the running API with the table, and the table with the
file where the file is at hand.

`operations_of` and `schemas_of` reduce an OpenAPI document to the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]

# The keywords of a schema that a client depends on.
KEYWORDS = ("$ref", "type", "enum", "default", "readOnly", "minimum", "maximum")
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}


@dataclass(frozen=True)
class UserOperation:
    """One method on a path.

    `answers` maps each documented status to the schemas of its body by media type, and `headers` to the names of its
    headers. `parameters` maps "query NAME" or "header NAME" to whether it is required and to its schema.
    """

    answers: Mapping[int, Mapping[str, Schema]]
    body: Schema | None = None
    body_required: bool = True
    parameters: Mapping[str, tuple[bool, Schema]] = field(default_factory=dict)
    headers: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def operations_of(document: Mapping[str, Any]) -> dict[str, UserOperation]:
    """Return the operations of an OpenAPI document in the form of OPERATIONS."""
    found = {}
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            found[f"{method.upper()} {path}"] = _operation(item[method], item.get("parameters", []), method)
    return found


def _operation(described: Mapping[str, Any], path_parameters: list[Any], method: str) -> UserOperation:
    # The user's file lists `watch` for all methods of a path, but it is about GET.
    listed = [p for p in path_parameters if p["in"] != "path" and (p["name"] != "watch" or method == "get")]
    parameters = {
        f"{p['in']} {p['name']}": (p.get("required", False), _reduced(p["schema"]))
        for p in [*listed, *described.get("parameters", [])]
    }
    request = described.get("requestBody")
    answers = {int(status): answer for status, answer in described["responses"].items()}
    return UserOperation(
        parameters=parameters,
        body=None if request is None else _bodies(request)["application/json"],
        body_required=request is None or request["required"],
        answers={status: _bodies(answer) for status, answer in answers.items()},
        headers={status: tuple(answer["headers"]) for status, answer in answers.items() if answer.get("headers")},
    )


def _bodies(described: Mapping[str, Any]) -> dict[str, Schema]:
    return {media_type: _reduced(content["schema"]) for media_type, content in described.get("content", {}).items()}


def schemas_of(document: Mapping[str, Any]) -> dict[str, Schema]:
    """Return the schemas of an OpenAPI document in the form of SCHEMAS."""
    return {name: _reduced(schema) for name, schema in document["components"]["schemas"].items()}


def _reduced(schema: Schema) -> Schema:
    reduced: dict[str, Any] = {keyword: schema[keyword] for keyword in KEYWORDS if keyword in schema}
    if "properties" in schema:
        reduced["properties"] = {name: _reduced(inner) for name, inner in schema["properties"].items()}
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            reduced[keyword] = _reduced(schema[keyword])
    if "allOf" in schema:
        reduced["allOf"] = [_reduced(part) for part in schema["allOf"]]
    return reduced


# By method and path.
OPERATIONS: dict[str, UserOperation] = {
    "GET /controller/info": UserOperation(answers={200: {"application/json": ref("ControllerInfo")}}),
    "GET /cluster-settings": UserOperation(answers={200: {"application/json": ref("ClusterSettings")}}),
    "PUT /cluster-settings": UserOperation(
        body=ref("ClusterSettings"), answers={200: {"application/json": ref("ClusterSettings")}}
    ),
    "POST /service-accounts": UserOperation(
        body=ref("ServiceAccount"), answers={200: {"application/json": ref("ServiceAccount")}, 409: {}}
    ),
    "GET /service-accounts": UserOperation(
        answers={200: {"application/json": {"type": "array", "items": ref("ServiceAccount")}}}
    ),
    "GET /service-accounts/{name}": UserOperation(answers={200: {"application/json": ref("ServiceAccount")}, 404: {}}),
    "PUT /service-accounts/{name}": UserOperation(
        body=ref("ServiceAccount"), answers={200: {"application/json": ref("ServiceAccount")}, 404: {}}
    ),
    "DELETE /service-accounts/{name}": UserOperation(answers={200: {}, 404: {}}),
    "GET /workers": UserOperation(answers={200: {"application/json": {"type": "array", "items": ref("Worker")}}}),
    "GET /workers/{name}": UserOperation(answers={200: {"application/json": ref("Worker")}, 404: {}}),
    "DELETE /workers/{name}": UserOperation(answers={200: {}, 404: {}}),
    "GET /workers/{name}/port-forward": UserOperation(
        parameters={
            "query port": (True, {"type": "integer", "minimum": 1, "maximum": 65535}),
            "query wait": (False, {"type": "integer", "default": 10, "minimum": 0, "maximum": 65535}),
            "header Connection": (True, TEXT),
            "header Upgrade": (True, TEXT),
        },
        answers={400: {}, 404: {}, 503: {}},
    ),
    "POST /vms": UserOperation(
        body={"allOf": [ref("VMMeta"), ref("VMSpec")]}, answers={200: {"application/json": ref("VM")}, 409: {}}
    ),
    "GET /vms": UserOperation(
        parameters={"query filter": (False, TEXT)},
        answers={200: {"application/json": {"type": "array", "items": ref("VM")}}},
    ),
    "GET /vms/{name}": UserOperation(
        parameters={"query watch": (False, FLAG)},
        answers={
            200: {
                "application/json": ref("VM"),
                "application/x-ndjson": {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "enum": ["ADDED", "MODIFIED", "DELETED"]},
                        "object": ref("VM"),
                    },
                },
            },
            404: {},
        },
    ),
    "PUT /vms/{name}": UserOperation(body=ref("VMSpec"), answers={200: {"application/json": ref("VM")}, 404: {}}),
    "DELETE /vms/{name}": UserOperation(answers={200: {}, 404: {}}),
    "GET /vms/{name}/events": UserOperation(
        parameters={
            "query limit": (False, {"type": "integer", "minimum": 1}),
            "query order": (False, {"type": "string", "enum": ["asc", "desc"]}),
            "query cursor": (False, TEXT),
        },
        answers={200: {"application/json": ref("Events")}, 404: {}},
        headers={200: ("X-Next-Cursor",)},
    ),
    "GET /vms/{name}/port-forward": UserOperation(
        parameters={
            "query port": (True, {"type": "integer", "minimum": 1, "maximum": 65535}),
            "query wait": (False, {"type": "integer", "default": 10, "minimum": 0, "maximum": 65535}),
            "header Connection": (True, TEXT),
            "header Upgrade": (True, TEXT),
        },
        answers={400: {}, 404: {}, 503: {}},
    ),
    "GET /vms/{name}/ip": UserOperation(
        parameters={"query wait": (False, {"type": "integer", "default": 0, "minimum": 0, "maximum": 65535})},
        answers={200: {"application/json": ref("IP")}, 404: {}, 503: {}},
    ),
    "POST /vms/{name}/access-tokens": UserOperation(
        body=ref("IssueVMAccessTokenRequest"),
        body_required=False,
        answers={200: {"application/json": ref("VMAccessToken")}, 404: {}},
    ),
}

# By name. A keyword that is absent here is not promised.
SCHEMAS: dict[str, Schema] = {
    "Worker": {
        "type": "object",
        "properties": {"name": TEXT, "resources": {"type": "object", "additionalProperties": INTEGER}},
    },
    "VM": {"type": "object", "allOf": [ref("VMMeta"), ref("VMSpec"), ref("VMState")]},
    "VMMeta": {"type": "object", "properties": {"name": TEXT, "generation": {"type": "number", "readOnly": True}}},
    "VMSpec": {
        "type": "object",
        "properties": {
            "image": TEXT,
            "imagePullPolicy": {"type": "string", "enum": ["IfNotPresent", "Always"], "default": "IfNotPresent"},
            "cpu": {"type": "number", "default": 4},
            "memory": {"type": "number", "default": 8192},
            "diskSize": NUMBER,
            "net-softnet": {"type": "boolean", "default": False},
            "netSoftnet": {"type": "boolean", "default": False},
            "netSoftnetAllow": {"type": "array", "items": TEXT},
            "netSoftnetBlock": {"type": "array", "items": TEXT},
            "suspendable": {"type": "boolean", "default": False},
            "net-bridged": TEXT,
            "headless": {"type": "boolean", "default": False},
            "nested": {"type": "boolean", "default": False},
            "username": {"type": "string", "default": "admin"},
            "password": {"type": "string", "default": "admin"},
            "startup_script": {
                "type": "object",
                "properties": {"script_content": TEXT, "env": {"type": "object", "additionalProperties": TEXT}},
            },
            "restart_policy": {"type": "string", "enum": ["Never", "OnFailure"], "default": "Never"},
            "resources": {"type": "object", "additionalProperties": INTEGER},
            "labels": {"type": "object", "additionalProperties": TEXT},
            "hostDirs": {
                "type": "array",
                "items": {"type": "object", "properties": {"name": TEXT, "path": TEXT, "ro": FLAG}},
            },
            "powerState": {"type": "string", "enum": ["running", "stopped", "suspended"], "default": "running"},
            "tartName": {"type": "string", "readOnly": True},
        },
    },
    "VMState": {
        "type": "object",
        "properties": {
            "status": {"type": "string", "enum": ["pending", "running", "failed"]},
            "status_message": TEXT,
            "worker": TEXT,
            "observedGeneration": NUMBER,
        },
    },
    "Events": {"type": "array", "items": ref("Event")},
    "IP": {"type": "object", "properties": {"ip": TEXT}},
    "IssueVMAccessTokenRequest": {"type": "object", "properties": {"ttlSeconds": INTEGER}},
    "VMAccessToken": {
        "type": "object",
        "properties": {
            "token": TEXT,
            "tokenType": TEXT,
            "expiresAt": TEXT,
            "sshUsername": TEXT,
            "vmName": TEXT,
            "vmUID": TEXT,
        },
    },
    "Event": {"type": "object", "properties": {"kind": TEXT, "payload": TEXT, "timestamp": INTEGER}},
    "ServiceAccount": {
        "type": "object",
        "properties": {"name": TEXT, "token": TEXT, "roles": {"type": "array", "items": TEXT}},
    },
    "ControllerInfo": {
        "type": "object",
        "properties": {"version": TEXT, "commit": TEXT, "capabilities": {"type": "array", "items": TEXT}},
    },
    "ClusterSettings": {
        "type": "object",
        "properties": {
            "hostDirPolicies": {
                "type": "array",
                "default": [],
                "items": {"type": "object", "properties": {"pathPrefix": TEXT, "ro": FLAG}},
            },
            "schedulerProfile": {
                "type": "string",
                "enum": ["optimize-utilization", "distribute-load"],
                "default": "optimize-utilization",
            },
        },
    },
}
