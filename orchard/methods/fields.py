"""The fields of resources as keyword arguments, for type checkers, and their names in JSON.

One rule holds for all: a keyword is the name of the attribute of the dataclass in schema.py that the method returns,
and its value is what that attribute holds. So `ttlSeconds` is `ttl_seconds`, and `net-bridged` is `net_bridged`. A
script may also be its JSON. A JSON object that a method takes in place of keywords has names as on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypedDict

from orchard.codec import attrs_of
from orchard.resources.cluster import Webhook
from orchard.resources.json_text import encode
from orchard.schema import (
    OS,
    Arch,
    GuestScript,
    HostDir,
    HostDirPolicy,
    PowerState,
    Prepull,
    PullPolicy,
    RestartPolicy,
    Runtime,
    SchedulerProfile,
    StartupOnFailure,
    StartupScript,
)


class VMFields(TypedDict, total=False):
    """The fields of a VMSpec."""

    image: str
    image_pull_policy: PullPolicy
    cpu: int
    memory: int
    disk_size: int
    os: OS
    arch: Arch
    runtime: Runtime
    net_softnet: bool
    net_softnet_allow: Sequence[str]
    net_softnet_block: Sequence[str]
    suspendable: bool
    net_bridged: str
    headless: bool
    nested: bool
    username: str
    password: str
    startup_script: StartupScript | Mapping[str, object]
    restart_policy: RestartPolicy
    resources: Mapping[str, int]
    labels: Mapping[str, str]
    host_dirs: Sequence[HostDir]
    random_serial: bool
    audio: bool
    clipboard: bool
    power_state: PowerState
    startup_timeout_seconds: int
    startup_on_failure: StartupOnFailure
    shutdown_script: GuestScript | Mapping[str, object]
    shutdown_timeout_seconds: int
    ttl_seconds: int
    pending_timeout_seconds: int
    metadata: Mapping[str, str]
    priority: int
    preferred_labels: Mapping[str, str]


class NewVMFields(VMFields, total=False):
    """The fields of a VMSpec, and the name of the VM."""

    name: str


class SettingsFields(TypedDict, total=False):
    """The fields of ClusterSettings."""

    host_dir_policies: Sequence[HostDirPolicy]
    scheduler_profile: SchedulerProfile
    default_ttl_seconds: int
    max_ttl_seconds: int
    min_free_disk_gb: int
    worker_prune_seconds: int
    prepull: Sequence[Prepull]
    webhooks: Sequence[Webhook]


def fields_to_json(kind: type, fields: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments as JSON of a dataclass of schema.py. Raises TypeError for a name that it does not have."""
    names = _json_names(kind)
    for name in fields:
        if name not in names:
            raise TypeError(f'there is no field "{name}", expected a field of {kind.__name__}: {", ".join(names)}')
    return {names[name]: _to_json(value) for name, value in fields.items()}


@cache
def _json_names(kind: type) -> dict[str, str]:
    return {field.name: field.json for field in attrs_of(kind)}


def _to_json(value: object) -> object:
    if isinstance(value, str | int | Mapping) or value is None:
        return value
    return [_to_json(item) for item in value] if isinstance(value, Sequence) else encode(value)
