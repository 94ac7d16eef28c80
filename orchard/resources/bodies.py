"""Bodies of requests and answers beside the resources, and the schemas of all bodies for OpenAPI. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Literal

from orchard.codec import attr, openapi_schema
from orchard.resources.cluster import Capacity, ControllerHealth
from orchard.schema import (
    DEFAULT_TTL,
    DERIVED_NAMES,
    MAX_TTL,
    ClusterSettings,
    Condition,
    Drain,
    EndedVM,
    Event,
    HostDirPolicy,
    Prepull,
    Role,
    ServiceAccount,
    Status,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
)

SessionKind = Literal["watch", "events", "port-forward", "exec", "ssh", "worker"]


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A connection to the controller that lasts: who is connected, and with what."""

    kind: SessionKind = attr("kind", "What it is; `worker` is the watch of a worker for itself")
    since: datetime.datetime = attr("since", "When it began")
    account: str = attr("account", "Service account that opened it, also by an access token", zero="")
    target: str = attr("target", "What it is connected with, such as vm/NAME; absent for all", zero="")
    peer: str = attr("peer", "The client's address, or that of the proxy before it", zero="")


@dataclass(frozen=True, slots=True)
class ControllerInfo:
    version: str = attr("version", "Version number", zero="")
    commit: str = attr("commit", "Commit hash", zero="", default="")
    capabilities: tuple[str, ...] = attr("capabilities", "Supported capabilities", zero=(), default=[])
    worker_offline_timeout: int = attr(
        "workerOfflineTimeoutMs", "Milliseconds of silence after which a worker's VMs fail", zero=0
    )
    cluster_id: str = attr("clusterId", "Identity of the state; a new one after `accept-state`", zero="")
    host_dir_policies: tuple[HostDirPolicy, ...] = attr(
        "hostDirPolicies", "The cluster's hostDirPolicies, shown to accounts that have compute:write", zero=()
    )
    prepull: tuple[Prepull, ...] = attr(
        "prepull", "The cluster's prepull, shown to accounts that have compute:write", zero=()
    )
    account: str = attr("account", "The account that asks; absent where no credentials are asked for", zero="")
    roles: tuple[Role, ...] = attr("roles", "What the account that asks may do", zero=())


@dataclass(frozen=True, slots=True)
class IP:
    ip: str = attr("ip", "The resolved IP address", zero="")


@dataclass(frozen=True, slots=True)
class IssueVMAccessTokenRequest:
    ttl_seconds: int | None = attr(
        "ttlSeconds", f"Requested token lifetime in seconds: {DEFAULT_TTL} when omitted, at most {MAX_TTL}", zero=None
    )


@dataclass(frozen=True, slots=True)
class VMAccessToken:
    token: str = attr("token", "Signed temporary JWT token", zero="", secret=True)
    token_type: str = attr("tokenType", "Token type to use in the Authorization header", zero="", example="Bearer")
    expires_at: datetime.datetime | None = attr("expiresAt", "When the token expires", zero=None)
    ssh_username: str = attr(
        "sshUsername", "Username to use when authenticating to the built-in SSH server", zero="", example="token"
    )
    vm_name: str = attr("vmName", "VM name this token was issued for", zero="")
    vm_uid: str = attr("vmUID", "Immutable VM UID this token is bound to", zero="")


@dataclass(frozen=True, slots=True)
class Problem:
    """The body of every answer with a status of 400 or more."""

    message: str = attr("message", "The refused value, and what is accepted", zero="", default="")
    deleted: tuple[str, ...] = attr(
        "deleted", "Names of the VMs that a bulk deletion had deleted before it failed", zero=()
    )


@dataclass(frozen=True, slots=True)
class BulkDeletion:
    deleted: tuple[str, ...] = attr("deleted", "Names of the VMs that were deleted", zero=(), default=[])


@dataclass(frozen=True, slots=True)
class VMReport:
    """A worker's report about one run of a VM (`PUT /vms/{name}/state`). None, or an empty string: not reported."""

    uid: str = attr("uid", "The VM's uid; a report about another uid is refused", zero="")
    restart_count: int | None = attr(
        "restart_count",
        "The VM's restart_count; a report about another restart_count is refused",
        zero=None,
        number=True,
    )
    status: Status | None = attr("status", "VM status", zero=None)
    status_message: str | None = attr("status_message", "VM status message", zero=None)
    image_fqn: str = attr("image_fqn", "Image with its digest", zero="")
    observed_generation: int = attr(
        "observedGeneration", "The generation that the worker has applied", zero=0, number=True
    )
    conditions: tuple[Condition, ...] | None = attr("conditions", "Conditions of the VM", zero=None)
    startup_exit_code: int | None = attr("startupExitCode", "Exit code of the startup script", zero=None)
    startup_ended_at: datetime.datetime | None = attr("startupEndedAt", "When the startup script ended", zero=None)


def components() -> dict[str, Any]:
    """Return the schemas of all resources, as components of an OpenAPI document."""
    spec = openapi_schema(VMSpec)
    for name in sorted(DERIVED_NAMES):
        text = "Name of the VM on its worker's disk; `localName` and `tartName` are the same"
        spec["properties"][name] = {"type": "string", "readOnly": True, "description": text}
    parts = {"VMMeta": openapi_schema(VMMeta), "VMSpec": spec, "VMState": openapi_schema(VMState)}
    resources: tuple[type, ...] = (
        ControllerInfo,
        ClusterSettings,
        ServiceAccount,
        Worker,
        Drain,
        Event,
        VMReport,
        Problem,
    )
    resources += (
        ControllerHealth,
        EndedVM,
        IP,
        IssueVMAccessTokenRequest,
        VMAccessToken,
        BulkDeletion,
        Capacity,
        OpenSession,
    )
    return {
        **parts,
        "VM": {"type": "object", "allOf": [{"$ref": f"#/components/schemas/{name}"} for name in parts]},
        **{resource.__name__: openapi_schema(resource) for resource in resources},
        "Events": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}},
    }
