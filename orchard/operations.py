"""The table of the REST API's operations: method, path, handler, role, documentation.

`make_api` serves them. The OpenAPI document is made from the same rows, so it describes what is served.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from orchard import __version__
from orchard.api import API, ControllerParts
from orchard.codec import dump_json
from orchard.handlers import admin, capacity, connections, events, metrics, parameters, vms, watch, workers
from orchard.handlers.admission import APIOperation
from orchard.handlers.page import PAGES
from orchard.net.openapi import Operation, SecurityScheme, array_of, build_document, ref
from orchard.resources import bodies

# The largest body of events and of a VM, whose scripts may be long. Other bodies are far below the default limit.
_LARGE_BODY = 4 * 1024 * 1024  # bytes

_NEXT = {"X-Next-Cursor": "Opaque cursor for the next page of events, if any"}
_REVISION = {
    "X-Stored-Revision": "Rises with each stored change of the cluster",
    "X-Revision": "The `since` of a watch that goes on from this list",
}
_NEW_VM = {"allOf": [ref("VMMeta"), ref("VMSpec")]}
_ANY = {"type": "object"}
_IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
_CHANGES = ("ADDED", "MODIFIED", "DELETED")
# A line of the watch of one VM.
_VM_LINE = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": [*_CHANGES]}, "object": ref("VM")},
}

# A line of the events that are followed.
_EVENT_LINE = {"allOf": [ref("Event"), {"type": "object", "properties": {"cursor": {"type": "string"}}}]}


def _line_of(*kinds: str) -> dict[str, Any]:
    """Return the schema of a line of a watch of all objects of some kinds."""
    properties = {
        "type": {"type": "string", "enum": [*_CHANGES, "BOOKMARK"]},
        "kind": {"type": "string", "enum": [kind.lower() for kind in kinds]},
        "object": {"oneOf": [ref(kind) for kind in kinds]},
        "revision": {"type": "string"},
    }
    return {"type": "object", "properties": properties}


_VM_TOKEN = SecurityScheme(
    "vmAccessToken", "an access token for the VM", {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
)

# fmt: off
OPERATIONS: tuple[APIOperation, ...] = (
    Operation("GET", "/", admin.hello, None, "Check that this is an Orchard controller and that the credentials are valid"),
    Operation("GET", "/openapi.json", admin.describe, "public", "Retrieve this OpenAPI document", answer=_ANY),
    Operation("GET", "/health", admin.health, "public", "Check that this controller leads, and whether it takes changes",
              answer=ref("ControllerHealth"), problems=(503,)),
    Operation("GET", "/metrics", metrics.get_metrics, "compute:read",
              "Retrieve the metrics of controller and fleet in the text format of Prometheus", text=True),
    Operation("GET", "/controller/info", admin.info, None, "Retrieve controller's information",
              answer=ref("ControllerInfo")),
    Operation("POST", "/controller/accept-state", admin.accept_state, "admin:write",
              "Accept a state that was restored from an older copy, and give it a new clusterId",
              answer=ref("ControllerInfo")),
    Operation("GET", "/controller/sessions", admin.list_sessions, "admin:read",
              "List who is connected: watches, tunnels, commands and workers, the oldest first",
              answer=array_of("OpenSession")),
    Operation("GET", "/cluster-settings", admin.get_settings, "admin:read", "Retrieve cluster settings",
              answer=ref("ClusterSettings")),
    Operation("PUT", "/cluster-settings", admin.put_settings, "admin:write", "Update cluster settings",
              body=ref("ClusterSettings"), answer=ref("ClusterSettings"), example={"minFreeDiskGB": 50}),
    Operation("POST", "/service-accounts", admin.create_account, "admin:write", "Create a Service Account",
              body=ref("ServiceAccount"), answer=ref("ServiceAccount"), problems=(409,),
              example={"name": "viewer", "roles": ["compute:read"]}),
    Operation("GET", "/service-accounts", admin.list_accounts, "admin:read", "List Service Accounts",
              answer=array_of("ServiceAccount"), answer_headers=_REVISION),
    Operation("GET", "/service-accounts/{name}", admin.get_account, "admin:read", "Retrieve a Service Account",
              answer=ref("ServiceAccount"), problems=(404,)),
    Operation("PUT", "/service-accounts/{name}", admin.replace_account, "admin:write", "Update a Service Account",
              body=ref("ServiceAccount"), answer=ref("ServiceAccount"), problems=(404,),
              example={"roles": ["compute:read", "compute:write"]}),
    Operation("PATCH", "/service-accounts/{name}", admin.patch_account, "admin:write",
              "Change the fields that a JSON merge patch (RFC 7396) names",
              body=_ANY, answer=ref("ServiceAccount"), problems=(404,), example={"roles": ["compute:read"]}),
    Operation("DELETE", "/service-accounts/{name}", admin.delete_account, "admin:write", "Delete a Service Account",
              problems=(404,)),
    Operation("POST", "/workers", workers.register_worker, "compute:write", "Register a Worker, or update its registration",
              body=ref("Worker"), answer=ref("Worker"), problems=(409,),
              example={"name": "mac-1", "machine_id": "8B5C3A1E"}),
    Operation("GET", "/workers", workers.list_workers, "compute:read", "List Workers", answer=array_of("Worker"),
              problems=(410,), query=(parameters.WATCH_LIST, parameters.SINCE, parameters.IMAGES),
              answer_headers=_REVISION, ndjson=_line_of("Worker")),
    Operation("GET", "/workers/{name}", workers.get_worker, "compute:read", "Retrieve a Worker",
              answer=ref("Worker"), problems=(404,), query=(parameters.IMAGES,)),
    Operation("PUT", "/workers/{name}", workers.put_worker, "compute:write",
              "Send a heartbeat, which has a later last_seen, or else set scheduling_paused",
              body=ref("Worker"), answer=ref("Worker"), problems=(404,), example={"scheduling_paused": True}),
    Operation("DELETE", "/workers/{name}", workers.delete_worker, "compute:write", "Delete a Worker; its VMs fail",
              problems=(404,)),
    Operation("GET", "/capacity", capacity.get_capacity, "compute:read",
              "Count the VMs of one shape that could start now; nothing is reserved",
              answer=ref("Capacity"), query=parameters.SHAPE),
    Operation("POST", "/workers/{name}/drain", workers.drain_worker, "compute:write",
              "Assign no new VMs to a Worker, and end those that are there at a deadline, if one is given",
              body=ref("Drain"), body_required=False, answer=ref("Worker"), problems=(404,),
              example={"deadlineSeconds": 3600}),
    Operation("DELETE", "/workers/{name}/drain", workers.cancel_drain, "compute:write",
              "Cancel a drain and resume the scheduling", problems=(404,)),
    Operation("POST", "/vms", vms.create_vm, "compute:write", "Create a VM",
              body=_NEW_VM, body_limit=_LARGE_BODY, answer=ref("VM"), problems=(409, 503), query=(parameters.QUEUE,),
              example={"name": "build-1", "image": _IMAGE}),
    Operation("GET", "/vms", vms.list_vms, "compute:read", "List VMs", answer=array_of("VM"), query=parameters.VMS,
              problems=(410,), answer_headers={**_REVISION, "X-Continue": "Token for the next page, if any"},
              ndjson=_line_of("VM")),
    Operation("DELETE", "/vms", vms.delete_vms, "compute:write", "Delete the VMs that match a filter",
              answer=ref("BulkDeletion"), query=parameters.BULK_DELETION),
    Operation("GET", "/watch", watch.watch, "compute:read",
              "Watch all VMs and workers: ADDED for each, BOOKMARK, then their changes",
              problems=(410,), query=(*parameters.WATCH_ALL, parameters.SINCE, parameters.SILENCE),
              ndjson=_line_of("VM", "Worker")),
    Operation("GET", "/vms/{name}", vms.get_vm, "compute:read", "Retrieve a VM",
              answer=ref("VM"), problems=(404, 503), query=parameters.ONE_VM, ndjson=_VM_LINE,
              waits_with=parameters.WAIT_FOR),
    Operation("PUT", "/vms/{name}", vms.replace_vm, "compute:write", "Update a VM",
              body=ref("VMSpec"), body_limit=_LARGE_BODY, answer=ref("VM"), problems=(404,),
              example={"powerState": "stopped"}),
    Operation("PATCH", "/vms/{name}", vms.patch_vm, "compute:write",
              "Change the fields that a JSON merge patch (RFC 7396) names",
              body=_ANY, body_limit=_LARGE_BODY, answer=ref("VM"), problems=(404,),
              example={"metadata": {"pipeline": "42"}}),
    Operation("DELETE", "/vms/{name}", vms.delete_vm, "compute:write", "Delete a VM", problems=(404,)),
    Operation("POST", "/vms/{name}/restart", vms.restart_vm, "compute:write",
              "End a VM, after its shutdown script, and start it anew from its image", answer=ref("VM"),
              problems=(404, 412)),
    Operation("PUT", "/vms/{name}/state", vms.report_vm, "compute:write", "Report what a worker observed of its VM",
              body=ref("VMReport"), body_limit=_LARGE_BODY, answer=ref("VM"), problems=(404,),
              example={"status": "pending", "status_message": "pulling image: 42 %"}),
    Operation("GET", "/vms/{name}/events", events.list_events, "compute:read", "Retrieve events for a given VM",
              answer=ref("Events"), problems=(404,), query=parameters.PAGE, answer_headers=_NEXT,
              ndjson=_EVENT_LINE),
    Operation("GET", "/history", events.list_history, "compute:read", "List the VMs that have ended, the earliest first",
              answer=array_of("EndedVM"), query=parameters.HISTORY),
    Operation("POST", "/vms/{name}/events", events.append_events, "compute:write", "Append events to those of a VM",
              body=ref("Events"), body_limit=_LARGE_BODY, problems=(404,), query=(parameters.UID,),
              example=[{"kind": "log_line", "payload": "a line", "timestamp": 1767225600}]),
    Operation("GET", "/vms/{name}/port-forward", connections.forward_vm, "compute:connect",
              "Port-forward to a VM using WebSocket protocol: binary messages carry the bytes",
              problems=(404, 503), query=parameters.FORWARD, websocket=True, bearer=_VM_TOKEN, waits=True),
    Operation("GET", "/vms/{name}/ip", connections.resolve_ip, "compute:connect", "Resolve the VM's IP address on the worker",
              answer=ref("IP"), problems=(404, 503), query=(parameters.WAIT_ADDRESS,), bearer=_VM_TOKEN, waits=True),
    Operation("GET", "/vms/{name}/exec", connections.execute, "compute:connect",
              "Run a command in a VM over SSH: JSON in text frames, data in base64. `env[NAME]=value` sets variables",
              problems=(404, 503), query=parameters.EXEC, websocket=True, bearer=_VM_TOKEN, waits=True),
    Operation("POST", "/vms/{name}/access-tokens", connections.issue_token, "compute:write",
              "Issue a temporary VM access token", body=ref("IssueVMAccessTokenRequest"), body_required=False,
              answer=ref("VMAccessToken"), problems=(404,), example={"ttlSeconds": 3600}),
    Operation("GET", "/workers/{name}/port-forward", connections.forward_worker, "admin:write",
              "Port-forward to a worker using WebSocket protocol: binary messages carry the bytes",
              problems=(404, 503), query=parameters.FORWARD, websocket=True, waits=True),
    Operation("GET", "/rpc/port-forward", workers.answer_forward, "compute:write",
              "Open the worker's end of the tunnel that a portForwardAction asked for",
              problems=(404,), query=(parameters.SESSION, parameters.ERROR_MESSAGE), websocket=True),
    Operation("POST", "/rpc/resolve-ip", workers.answer_ip, "compute:write", "Answer a resolveIPAction",
              problems=(404,), query=parameters.ANSWER_IP),
    Operation("POST", "/rpc/goodbye", workers.say_goodbye, "compute:write", "Say that a worker stops: it gets no new VMs",
              problems=(404,), query=(parameters.WORKER_NAME,)),
    Operation("GET", "/rpc/watch", workers.watch_rpc, "compute:write",
              "Receive actions for a worker over a WebSocket: one JSON object per binary message",
              problems=(404,), query=(parameters.WORKER_NAME,), websocket=True),
)
# fmt: on


def describe_api(prefix: str) -> dict[str, Any]:
    """Return the OpenAPI document of OPERATIONS, served below `prefix`, for example "/v1"."""
    info = {"title": "Orchard", "description": "Orchard orchestration API", "version": __version__}
    with_validation = [
        replace(operation, query=(*operation.query, parameters.FIELD_VALIDATION))
        if operation.query or operation.body is not None
        else operation
        for operation in OPERATIONS
    ]
    return build_document(with_validation, prefix=prefix, info=info, schemas=bodies.components())


def make_api(parts: ControllerParts, *, ui: bool = True) -> API:
    """Return the API of a controller with these parts. `ui`: whether it serves the dashboard, too."""
    return API(parts, OPERATIONS, _document(f"{parts.prefix}/v1"), PAGES if ui else ())


@lru_cache(maxsize=8)
def _document(prefix: str) -> bytes:
    """Return the OpenAPI document as JSON. Programs that run several controllers, one after the other, make it once."""
    return dump_json(describe_api(prefix))
