"""The API's resources: VM, Worker, ServiceAccount, ClusterSettings, Event; their JSON; the rules for their fields.

Every resource is a frozen dataclass. A change makes a new object, so an object that was read from the store stays as it
was. Each field names its one writer:

* *user*: a client of the API sets it (the specification);
* *controller*: the controller sets it once, or counts it;
* *scheduler*: it belongs to one assignment of a VM to a worker;
* *worker*: the worker observed it on its host.

`status` and `status_message` have two writers: the worker reports them for the VM that is assigned to it, and the
scheduler sets them when it assigns, fails or restarts a VM. This file has the rules for a single object. transitions.py
has the rules for its changes.

Functions named `..._from_client` and `report_from_worker` read what a client sent, and raise codec.ValidationError.
Field names in JSON mix three spellings (`createdAt`, `scheduled_at`, `net-softnet`), because existing clients use them.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from orchard.cluster import Health, WorkerState, bounded
from orchard.codec import (
    InvalidError,
    MalformedError,
    attr,
    attrs_of,
    decode,
    decode_array_from_client,
    decode_from_client,
    encode,
    openapi_schema,
    shown,
    unknown_fields,
)

NAME = re.compile(r"[A-Za-z0-9:_.-]+")
# Characters. A VM's name becomes part of a file name, which has at most 255 bytes, together with a uid and a counter.
MAX_NAME = 128
# Characters. A machine_id is any text; those of existing workers have at most a hundred.
MAX_MACHINE_ID = 1024
_MAX_CAPABILITIES = 64
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Control characters could forge a line in a log or on a terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# The URL of an archive. It has no ":" after the host, because tart takes what follows a ":" in a path as an option.
ARCHIVE = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[^:]*)?")
# URL spellings that a downloader may normalise to a different URL than the one that the policy was checked against.
_AMBIGUOUS_URL = re.compile(r"%2e|%2f|%5c|[\\?#@]|//|/\.{1,2}(/|$)", re.IGNORECASE)

TART_VMS = "org.cirruslabs.tart-vms"
LOGICAL_CORES = "org.cirruslabs.logical-cores"
MEMORY_MIB = "org.cirruslabs.memory-mib"

# Seconds that an access token is valid: a day by default, thirty days at most.
_DEFAULT_TTL, _MAX_TTL = 86_400, 2_592_000

# CPUs and MiB of a VM when neither the VM nor its worker says otherwise.
DEFAULT_CPU = 4
DEFAULT_MEMORY = 8192

PullPolicy = Literal["IfNotPresent", "Always"]
OS = Literal["darwin", "linux"]
Arch = Literal["arm64", "amd64"]
Runtime = Literal["tart", "vetu"]
RestartPolicy = Literal["Never", "OnFailure"]
PowerState = Literal["running", "stopped", "suspended"]
Status = Literal["pending", "running", "failed"]
ConditionType = Literal["scheduled", "running"]
ConditionState = Literal["true", "false"]
SchedulerProfile = Literal["optimize-utilization", "distribute-load"]
Role = Literal["compute:read", "compute:write", "compute:connect", "admin:read", "admin:write"]

_Time = datetime.datetime


# ---- VM -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartupScript:
    script_content: str = attr("script_content", "The script, read by a login shell in the VM", zero="")
    env: Mapping[str, str] = attr("env", "Environment variables of the script", zero={})


@dataclass(frozen=True, slots=True)
class HostDir:
    name: str = attr("name", "Name under which the VM sees the directory", zero="")
    path: str = attr("path", "Absolute path on the worker's host, or the https:// URL of an archive", zero="")
    ro: bool = attr("ro", "Read only", zero=False)


@dataclass(frozen=True, slots=True)
class Condition:
    type: ConditionType = attr("type", "`scheduled`, set by the controller, or `running`, reported by the worker")
    state: ConditionState = attr("state", "Whether the condition holds: `true` or `false`")


@dataclass(frozen=True, slots=True)
class VMMeta:
    name: str = attr("name", "VM name", zero="", example="macos-tahoe-base")
    uid: str = attr(
        "uid", "Unique identity; a new VM under an earlier VM's name has another one", zero="", writer="controller"
    )
    created_at: _Time | None = attr("createdAt", "When the VM was created", zero=None, writer="controller")
    version: int = attr("version", "Increases with every change of the VM", zero=0, writer="controller", number=True)
    generation: int = attr(
        "generation",
        "Incremented by the controller each time a VM's specification changes; 0 for a new VM",
        zero=0,
        default=0,
        writer="controller",
        number=True,
    )
    # Of the whole VM.
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class VMSpec:
    """What the user asks for. `transitions.change` says which fields may change later."""

    image: str = attr("image", "VM image for this VM", zero="", example="ghcr.io/cirruslabs/macos-tahoe-base:latest")
    image_pull_policy: PullPolicy = attr(
        "imagePullPolicy", "VM image pull policy", zero="IfNotPresent", default="IfNotPresent"
    )
    cpu: int = attr(
        "cpu", "Number of CPUs assigned to this VM; 0: the worker's default", zero=0, default=DEFAULT_CPU, number=True
    )
    memory: int = attr(
        "memory",
        "Amount of RAM in megabytes assigned to this VM; 0: the worker's default",
        zero=0,
        default=DEFAULT_MEMORY,
        number=True,
    )
    disk_size: int = attr("diskSize", "Disk size in gigabytes; it can only grow", zero=0, number=True, example=100)
    os: OS = attr("os", "Operating system of the image", zero="darwin", default="darwin")
    arch: Arch = attr("arch", "Processor architecture that the worker must have", zero="arm64", default="arm64")
    runtime: Runtime = attr("runtime", "Hypervisor command that the worker must have", zero="tart", default="tart")
    net_softnet: bool = attr(
        "netSoftnet",
        "Whether to use Softnet network isolation: `--net-softnet` of `tart run`",
        zero=False,
        default=False,
        twin="net-softnet",
    )
    net_softnet_allow: tuple[str, ...] = attr(
        "netSoftnetAllow",
        "CIDRs to allow the traffic to when using Softnet isolation; enables `netSoftnet`",
        zero=(),
        example=["192.168.0.0/24"],
    )
    net_softnet_block: tuple[str, ...] = attr(
        "netSoftnetBlock",
        "CIDRs to block the traffic to when using Softnet isolation; enables `netSoftnet`",
        zero=(),
        example=["66.66.0.0/16"],
    )
    suspendable: bool = attr(
        "suspendable",
        "Start the VM so that it can be suspended; later generations suspend the VM instead of stopping it",
        zero=False,
        default=False,
    )
    net_bridged: str = attr(
        "net-bridged", "Host interface to bridge the VM's network to; empty: none", zero="", example="en0"
    )
    headless: bool = attr("headless", "Whether to run without graphics", zero=False, default=False)
    nested: bool = attr("nested", "Enable nested virtualization", zero=False, default=False)
    username: str = attr("username", "SSH username to use when connecting to a VM", zero="admin", default="admin")
    password: str = attr("password", "SSH password to use when connecting to a VM", zero="admin", default="admin")
    startup_script: StartupScript | None = attr(
        "startup_script",
        "Startup script to run after the VM boots and becomes accessible via SSH",
        zero=None,
        example={"script_content": "#!/bin/zsh\n\necho $GREETING\n", "env": {"GREETING": "Hello, World!"}},
    )
    restart_policy: RestartPolicy = attr(
        "restart_policy",
        'VM restart policy: "Never" to never restart or "OnFailure" to only restart when the VM fails',
        zero="Never",
        default="Never",
    )
    resources: Mapping[str, int] = attr(
        "resources",
        "Resources required by this VM on the worker",
        zero={},
        example={LOGICAL_CORES: 4, MEMORY_MIB: 8192},
    )
    labels: Mapping[str, str] = attr(
        "labels", "Labels required by this VM on the worker", zero={}, example={"model": "macstudio"}
    )
    host_dirs: tuple[HostDir, ...] = attr(
        "hostDirs",
        "Directories on the worker's host to mount to the VM, where the cluster's hostDirPolicies allow it",
        zero=(),
        example=[{"name": "src", "path": "/Users/ci/src", "ro": True}],
    )
    random_serial: bool = attr("randomSerial", "Give the VM a random serial number", zero=False)
    power_state: PowerState = attr(
        "powerState",
        "Desired power state. A stopped or suspended VM consumes no resources and can be cloned on the same worker by"
        " its tartName. Leaving `running` is possible only once",
        zero="running",
        default="running",
    )


@dataclass(frozen=True, slots=True)
class VMState:
    """Where the VM is and what its worker reports. Each restart begins with a new VMState."""

    status: Status = attr("status", "VM status", zero="pending", writer="worker", default="pending")
    status_message: str = attr("status_message", "VM status message", zero="", writer="worker")
    worker: str = attr("worker", "Worker that the VM is assigned to", zero="", writer="scheduler")
    assigned_cpu: int = attr("assignedCPU", "CPUs that the VM gets", zero=0, writer="scheduler", number=True)
    assigned_memory: int = attr("assignedMemory", "MiB that the VM gets", zero=0, writer="scheduler", number=True)
    scheduled_at: _Time | None = attr(
        "scheduled_at", "When the VM was assigned to its worker", zero=None, writer="scheduler"
    )
    started_at: _Time | None = attr("started_at", "When the VM first ran", zero=None, writer="controller")
    restarted_at: _Time | None = attr("restarted_at", "When the VM was last restarted", zero=None, writer="scheduler")
    restart_count: int = attr(
        "restart_count", "How often the VM was restarted", zero=0, writer="scheduler", number=True
    )
    image_fqn: str = attr("image_fqn", "Image with its digest", zero="", writer="worker")
    observed_generation: int = attr(
        "observedGeneration",
        "The `generation` that the worker has applied",
        zero=0,
        default=0,
        writer="worker",
        number=True,
    )
    conditions: tuple[Condition, ...] = attr("conditions", "Conditions of the VM", zero=(), writer="worker")


@dataclass(frozen=True, slots=True)
class VM:
    meta: VMMeta
    spec: VMSpec
    state: VMState

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def uid(self) -> str:
        return self.meta.uid

    @property
    def key(self) -> tuple[str, str, int]:
        """The identity of one run of the VM. A restart begins another run."""
        return self.meta.name, self.meta.uid, self.state.restart_count

    @property
    def tart_name(self) -> str:
        """Name of the VM on its worker's disk."""
        return f"orchard-{self.meta.name}-{self.meta.uid}-{self.state.restart_count}"

    def condition(self, kind: ConditionType) -> bool:
        return any(item.type == kind and item.state == "true" for item in self.state.conditions)

    @property
    def resting(self) -> bool:
        """Whether the user has stopped or suspended the VM, and the worker has reported that it does not run."""
        return self.spec.power_state != "running" and self.state.status == "running" and not self.condition("running")

    @property
    def holds_resources(self) -> bool:
        """Whether the VM counts against its worker's resources."""
        return bool(self.state.worker) and self.state.status != "failed" and not self.resting

    def to_json(self) -> dict[str, Any]:
        """Return the VM as the API shows it and as it is stored."""
        return {**self.state_to_json(), **encode(self.spec)}

    def state_to_json(self) -> dict[str, Any]:
        """Return the first part of `to_json`: everything but the specification."""
        name = self.tart_name
        return {**encode(self.meta), **encode(self.state), "localName": name, "tartName": name}


# Fields that are computed from others.
_DERIVED = frozenset({"localName", "tartName"})
_META_NAMES = frozenset(field.json for field in attrs_of(VMMeta))
_STATE_NAMES = frozenset(field.json for field in attrs_of(VMState))
_SPEC_NAMES = frozenset(name for field in attrs_of(VMSpec) for name in (field.json, field.twin) if name)
_NOT_META = _STATE_NAMES | _SPEC_NAMES | _DERIVED
_NOT_SPEC = _META_NAMES | _STATE_NAMES | _DERIVED
_CONDITION_TYPES = get_args(ConditionType)
# What a report of an old worker says, and about which run of the VM.
_OLD_REPORT = ("uid", "restart_count", "status", "status_message", "image_fqn")
_SOFTNET = frozenset({"netSoftnet", "net-softnet"})
# The values of the fields that a PUT resets when it leaves them out.
_PUT_ZEROS: Mapping[str, Any] = {
    field.name: False if field.type is bool else ()
    for field in attrs_of(VMSpec)
    if field.type is bool or field.is_list()
}


def vm_from_json(raw: Mapping[str, Any]) -> VM:
    """Return the VM of a JSON object that `VM.to_json` made. Raises ValidationError."""
    return VM(decode(VMMeta, raw, _NOT_META), decode(VMSpec, raw), decode(VMState, raw))


def vm_from_client(raw: object, unknown: list[str]) -> tuple[str, VMSpec]:
    """Return the name and the specification of a new VM. Raises ValidationError.

    Read-only fields are ignored. The names of unknown fields are appended to `unknown`.
    """
    if isinstance(raw, dict):
        raw = _with_tart_resource(raw)
    spec = decode_from_client(VMSpec, raw, unknown, also=_NOT_SPEC)
    assert isinstance(raw, dict)
    name = raw.get("name")
    if not isinstance(name, str | None):
        raise MalformedError(f"name is {shown(name)}, expected a string")
    _check_name("name", name or "")
    return name or "", _complete(spec, _softnet(raw, False))


def _with_tart_resource(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a new VM that asks for one of its worker's Tart VMs, if it is a macOS VM and does not say how many."""
    resources = raw.get("resources")
    is_macos = raw.get("os") in (None, "darwin") and raw.get("runtime") in (None, "tart")
    if not is_macos or not isinstance(resources, dict | None) or TART_VMS in (resources or {}):
        return raw
    return {**raw, "resources": {**(resources or {}), TART_VMS: 1}}


def replaced_spec(old: VMSpec, raw: object, unknown: list[str]) -> VMSpec:
    """Return the specification that a PUT asks for. Raises ValidationError.

    Go clients leave zero values out. So an absent boolean is false and an absent list is empty, while absent strings,
    numbers, maps and powerState are unchanged.
    """
    base = replace(old, **_PUT_ZEROS)
    spec = decode_from_client(VMSpec, raw, unknown, base=base, also=_NOT_SPEC)
    assert isinstance(raw, dict)
    return _complete(spec, _softnet(raw, old.net_softnet))


def patched_spec(old: VMSpec, patch: object, unknown: list[str]) -> VMSpec:
    """Return the specification after a JSON merge patch (RFC 7396): null sets a field to its zero value.

    Raises ValidationError.
    """
    if not isinstance(patch, dict):
        raise MalformedError(f"the body is {shown(patch)}, expected a JSON object (a merge patch)")
    target = encode(old)
    # The deprecated twin would contradict a patch that names only one of the two.
    for name in _SOFTNET:
        del target[name]
    merged = _merge(target, {name: value for name, value in patch.items() if name in _SPEC_NAMES})
    spec = decode_from_client(VMSpec, merged, unknown)
    unknown.extend(name for name in patch if name not in _SPEC_NAMES | _NOT_SPEC)
    softnet = _softnet(patch, old.net_softnet) if _SOFTNET & patch.keys() else old.net_softnet
    return _complete(spec, softnet)


def _merge(target: object, patch: object) -> Any:
    """Return a JSON value after a merge patch (the algorithm of RFC 7396, section 2)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result


def _softnet(raw: Mapping[str, Any], old: bool) -> bool:
    """Return the value of netSoftnet, which has a deprecated twin. Raises MalformedError.

    A client that changes one of the two in an object that it read, and sends the object back, sends two different
    values. The value that differs from `old` is the one that it wants.
    """
    wanted = set()
    for name in sorted(_SOFTNET):
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, bool):
            raise MalformedError(f"{name} is {shown(value)}, expected true or false")
        wanted.add(value)
    return not old if len(wanted) == 2 else True in wanted


def _complete(spec: VMSpec, softnet: bool) -> VMSpec:
    """Return the specification with the fields that follow from others. Raises InvalidError if it breaks a rule."""
    softnet = softnet or bool(spec.net_softnet_allow or spec.net_softnet_block)
    # Most specifications are complete, and copying one takes as long as reading it.
    if softnet != spec.net_softnet or not spec.username or not spec.password:
        username, password = spec.username or "admin", spec.password or "admin"
        spec = replace(spec, net_softnet=softnet, username=username, password=password)
    _check_spec(spec)
    return spec


# ---- rules ----------------------------------------------------------------------------------------------------------


def _check_name(field: str, name: str) -> None:
    """Raise InvalidError for a name that is not safe in URLs, file names and command lines."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME or name in (".", ".."):
        raise InvalidError(
            f'{field} is {shown(name)}, expected 1 to {MAX_NAME} characters of A-Z a-z 0-9 : _ . - other than "." and ".."'
        )


def _check_spec(spec: VMSpec) -> None:
    """Raise InvalidError if a specification breaks a rule that its types do not express."""
    if not spec.image:
        raise InvalidError('image is "", expected the name of a VM image')
    for field, text in (("image", spec.image), ("username", spec.username), ("net-bridged", spec.net_bridged)):
        # A command line could take such a text as an option or as two words, a log as two lines.
        if text.startswith("-") or _CONTROL.search(text) or " " in text or "," in text:
            raise InvalidError(
                f'{field} is {shown(text)}, expected no spaces, commas or control characters, and no "-" at the start'
            )
    if _CONTROL.search(spec.password):
        raise InvalidError("password has a control character, expected printable characters")
    _check_maps(spec.labels, spec.resources)
    for field, networks in (("netSoftnetAllow", spec.net_softnet_allow), ("netSoftnetBlock", spec.net_softnet_block)):
        for index, network in enumerate(networks):
            _check_network(f"{field}[{index}]", network)
    if spec.power_state == "suspended" and not spec.suspendable:
        raise InvalidError('powerState is "suspended", expected "running" or "stopped" unless suspendable is true')
    if spec.startup_script is not None:
        _check_script(spec.startup_script)
    if spec.host_dirs:
        _check_host_dirs(spec.host_dirs)


def _check_maps(labels: Mapping[str, str], resources: Mapping[str, int]) -> None:
    """Raise InvalidError for keys and values with control characters, which could forge a line in a log."""
    for field, pairs in (("labels", labels), ("resources", resources)):
        for key, value in pairs.items():
            if _CONTROL.search(f"{key}{value}"):
                raise InvalidError(f"{field}[{shown(key)}] is {shown(value)}, expected no control characters")


def _check_network(where: str, text: str) -> None:
    """Raise InvalidError for a text that is not a CIDR.

    Python's `ip_network` also accepts netmasks and IPv6 zones, which may hold commas. Both are refused.
    """
    try:
        ipaddress.ip_network(text, strict=False)
        is_cidr = re.fullmatch(r"[0-9A-Fa-f.:]+(/[0-9]+)?", text) is not None
    except ValueError:
        is_cidr = False
    if not is_cidr:
        raise InvalidError(f"{where} is {shown(text)}, expected a network such as 192.168.0.0/24")


def _check_script(script: StartupScript) -> None:
    for name, value in script.env.items():
        if not ENV_NAME.fullmatch(name):
            raise InvalidError(f"startup_script.env has the name {shown(name)}, expected {ENV_NAME.pattern}")
        if "\0" in value:
            raise InvalidError(f"startup_script.env[{shown(name)}] has a NUL character, which no shell can pass on")
    if "\0" in script.script_content:
        raise InvalidError("startup_script.script_content has a NUL character, which no shell can read")


def _check_host_dirs(host_dirs: Iterable[HostDir]) -> None:
    names: set[str] = set()
    for index, host_dir in enumerate(host_dirs):
        _check_host_dir(f"hostDirs[{index}]", host_dir)
        if host_dir.name in names:
            raise InvalidError(
                f"hostDirs[{index}].name is {shown(host_dir.name)}, expected a name that no other hostDir has"
            )
        names.add(host_dir.name)


def _check_host_dir(where: str, host_dir: HostDir) -> None:
    """Raise InvalidError for a hostDir that the hypervisor's command line could read as another directory."""
    for field, text in (("name", host_dir.name), ("path", host_dir.path)):
        if not text:
            raise InvalidError(f"{where}.{field} is missing, expected a hostDir with a name and a path")
        if _CONTROL.search(text) or "," in text:
            raise InvalidError(f"{where}.{field} is {shown(text)}, expected no commas or control characters")
    name, path = host_dir.name, host_dir.path
    if ":" in name or "/" in name or name.startswith("-") or name in (".", ".."):
        raise InvalidError(
            f'{where}.name is {shown(name)}, expected a name without ":" and "/", and no "-" at the start'
        )
    if not (ARCHIVE.fullmatch(path) or (path.startswith("/") and ":" not in path)):
        raise InvalidError(f'{where}.path is {shown(path)}, expected an absolute path without ":", or an https:// URL')


def is_allowed(policies: Iterable[HostDirPolicy], host_dir: HostDir) -> bool:
    """Return whether some policy covers a hostDir: by whole path components, and never through `..`."""
    return any(_covers(policy.path_prefix, host_dir.path) and (host_dir.ro or not policy.ro) for policy in policies)


def _covers(prefix: str, path: str) -> bool:
    scheme = "https://"
    if not path.startswith(scheme if prefix.startswith(scheme) else "/"):
        return False
    want, have = ([part for part in text.split("/") if part not in ("", ".")] for text in (prefix, path))
    if ".." in have or (path.startswith(scheme) and _AMBIGUOUS_URL.search(path, len(scheme) - 1)):
        return False
    return have[: len(want)] == want


# ---- worker, account, settings, event -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worker:
    name: str = attr("name", "Node name", zero="")
    arch: Arch = attr("arch", "Processor architecture", zero="arm64", default="arm64")
    runtime: Runtime = attr("runtime", "Hypervisor command", zero="tart", default="tart")
    resources: Mapping[str, int] = attr(
        "resources",
        "Dictionary that maps the resource name to the amount of this resource provided by the worker for running VMs",
        zero={},
    )
    labels: Mapping[str, str] = attr("labels", "Labels that VMs may require", zero={})
    default_cpu: int = attr("defaultCPU", "CPUs of a VM that asks for none", zero=0, number=True)
    default_memory: int = attr("defaultMemory", "MiB of RAM of a VM that asks for none", zero=0, number=True)
    machine_id: str = attr("machine_id", "Identity of the host", zero="")
    last_seen: _Time | None = attr("last_seen", "Time of the worker's last heartbeat, by its own clock", zero=None)
    scheduling_paused: bool = attr("scheduling_paused", "Whether no new VMs are assigned to the worker", zero=False)
    created_at: _Time | None = attr("createdAt", "When the worker first registered", zero=None, writer="controller")
    instance_id: str = attr("instance_id", "Identity of the worker's directory on its host", zero="")
    capabilities: tuple[str, ...] = attr("capabilities", "What the worker supports, such as `worker-state`", zero=())
    registered_by: str = attr(
        "registeredBy", "Service account that registered the worker; only this account may speak for it", zero="",
        writer="controller",
    )  # fmt: skip
    promised: int = attr(
        "promisedOfflineTimeoutMs", "Milliseconds of silence after which the worker was told that its VMs fail", zero=0,
        writer="controller",
    )  # fmt: skip
    # Sent by workers and not stored.
    highest_revision: int = attr(
        "highestRevision",
        "At registration: the revision that the worker saw before an older state was restored",
        zero=0,
    )
    settled: bool = attr("settled", "In a heartbeat: whether the worker's session is whole", zero=False)
    health: Health | None = attr("health", "What fails on the worker", zero=None)
    # Computed for answers.
    state: WorkerState | None = attr("state", "Whether the worker takes new VMs", zero=None, writer="controller")
    since: _Time | None = attr("since", "Since when it is in this state", zero=None, writer="controller")
    used: Mapping[str, int] = attr("used", "Resources that its VMs use", zero={}, writer="controller")
    vms: int = attr("vms", "Number of its VMs that use resources", zero=0, writer="controller")
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    name: str = attr("name", "Name", zero="")
    token: str = attr("token", "Secret token used to access the API; random if a new account names none", zero="")
    roles: tuple[Role, ...] = attr("roles", "What the account may do", zero=())
    created_at: _Time | None = attr("createdAt", "When the account was created", zero=None, writer="controller")
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class HostDirPolicy:
    path_prefix: str = attr("pathPrefix", "Directory or https:// URL below which hostDirs are allowed", zero="")
    ro: bool = attr("ro", "Whether hostDirs below it must be read only", zero=False)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    host_dir_policies: tuple[HostDirPolicy, ...] = attr(
        "hostDirPolicies",
        "If not empty, allows instantiating VMs with `hostDirs` that match the policies listed in this array",
        zero=(),
        default=[],
        example=[{"pathPrefix": "/Users/ci/src", "ro": True}],
    )
    scheduler_profile: SchedulerProfile = attr(
        "schedulerProfile",
        "`optimize-utilization`: a VM is assigned to the worker with the most VMs that has resources for it (the default);"
        " `distribute-load`: to the worker with the fewest VMs",
        zero="optimize-utilization",
        default="optimize-utilization",
    )
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class Event:
    kind: str = attr("kind", "Kind of the event: `log_line` for a line of the startup script's output", zero="")
    payload: str = attr("payload", "Payload of the event", zero="", default="")
    timestamp: int = attr("timestamp", "Unix timestamp of the event, in seconds", zero=0, default=0)


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


@dataclass(frozen=True, slots=True)
class IP:
    ip: str = attr("ip", "The resolved IP address", zero="")


@dataclass(frozen=True, slots=True)
class IssueVMAccessTokenRequest:
    ttl_seconds: int | None = attr(
        "ttlSeconds", f"Requested token lifetime in seconds: {_DEFAULT_TTL} when omitted, at most {_MAX_TTL}", zero=None
    )


@dataclass(frozen=True, slots=True)
class VMAccessToken:
    token: str = attr("token", "Signed temporary JWT token", zero="")
    token_type: str = attr("tokenType", "Token type to use in the Authorization header", zero="", example="Bearer")
    expires_at: _Time | None = attr("expiresAt", "When the token expires", zero=None)
    ssh_username: str = attr(
        "sshUsername", "Username to use when authenticating to the built-in SSH server", zero="", example="token"
    )
    vm_name: str = attr("vmName", "VM name this token was issued for", zero="")
    vm_uid: str = attr("vmUID", "Immutable VM UID this token is bound to", zero="")


@dataclass(frozen=True, slots=True)
class Problem:
    """The body of every answer with a status of 400 or more."""

    message: str = attr("message", "The refused value, and what is accepted", zero="", default="")


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


def worker_from_client(raw: object, unknown: list[str]) -> Worker:
    """Return the worker that registers itself. Raises ValidationError."""
    worker = decode_from_client(Worker, raw, unknown)
    _check_name("name", worker.name)
    if len(worker.machine_id) > MAX_MACHINE_ID:
        raise InvalidError(f"machine_id has {len(worker.machine_id)} characters, expected at most {MAX_MACHINE_ID}")
    _check_maps(worker.labels, worker.resources)
    _check_identity(worker)
    return replace(worker, health=bounded(worker.health)) if worker.health is not None else worker


def _check_identity(worker: Worker) -> None:
    if len(worker.instance_id) > MAX_NAME or _CONTROL.search(worker.instance_id):
        raise InvalidError(
            f"instance_id is {shown(worker.instance_id)}, expected at most {MAX_NAME} printable characters"
        )
    if len(worker.capabilities) > _MAX_CAPABILITIES:
        raise InvalidError(f"capabilities has {len(worker.capabilities)} texts, expected at most {_MAX_CAPABILITIES}")
    for index, capability in enumerate(worker.capabilities):
        if not NAME.fullmatch(capability) or len(capability) > MAX_NAME:
            raise InvalidError(f"capabilities[{index}] is {shown(capability)}, expected a name such as worker-state")


def account_from_client(raw: object, unknown: list[str], base: ServiceAccount | None = None) -> ServiceAccount:
    """Return the service account that an administrator asks for; absent fields are those of `base`.

    Raises ValidationError.
    """
    account = decode_from_client(ServiceAccount, raw, unknown, base=base)
    _check_name("name", account.name)
    if _CONTROL.search(account.token):
        raise InvalidError("token has a control character, expected printable characters")
    return replace(account, roles=tuple(dict.fromkeys(account.roles)))


def settings_from_client(raw: object, unknown: list[str]) -> ClusterSettings:
    """Return cluster settings; absent fields have their defaults. Raises MalformedError, also for broken rules."""
    settings = decode_from_client(ClusterSettings, raw, unknown, refusal=MalformedError)
    for index, policy in enumerate(settings.host_dir_policies):
        prefix = policy.path_prefix
        if not prefix.startswith(("/", "https://")) or ".." in prefix.split("/") or _CONTROL.search(prefix):
            where = f"hostDirPolicies[{index}].pathPrefix"
            raise MalformedError(f"{where} is {shown(prefix)}, expected an absolute path or https:// URL without ..")
    return settings


def events_from_client(raw: object, unknown: list[str]) -> list[Event]:
    """Return an array of events, in order; null is an empty one. Raises ValidationError."""
    events = [] if raw is None else decode_array_from_client(Event, raw, unknown)
    for index, event in enumerate(events):
        if not event.kind or _CONTROL.search(event.kind):
            raise InvalidError(f'[{index}].kind is {shown(event.kind)}, expected a kind of event such as "log_line"')
    return events


def ttl_from_client(raw: object, unknown: list[str]) -> int:
    """Return the requested lifetime of an access token in seconds; null asks for the default. Raises ValidationError."""
    ttl = None if raw is None else decode_from_client(IssueVMAccessTokenRequest, raw, unknown).ttl_seconds
    if ttl is None:
        return _DEFAULT_TTL
    if not 1 <= ttl <= _MAX_TTL:
        raise InvalidError(f"ttlSeconds is {ttl}, expected 1 to {_MAX_TTL}")
    return ttl


def report_from_worker(raw: object, unknown: list[str]) -> VMReport:
    """Return a worker's report. Workers send the whole VM, of which only these fields count. Raises ValidationError.

    A condition of a type that only newer workers know is named in `unknown`, like an unknown field.
    """
    if isinstance(raw, dict) and isinstance(raw.get("conditions"), list):
        known = []
        for index, item in enumerate(raw["conditions"]):
            if isinstance(item, dict) and isinstance(kind := item.get("type"), str) and kind not in _CONDITION_TYPES:
                unknown.append(f"conditions[{index}].type")
            else:
                known.append(item)
        raw = {**raw, "conditions": known}
    return decode_from_client(VMReport, raw, unknown, also=_NOT_SPEC | _SPEC_NAMES)


def report_from_old_worker(raw: object, unknown: list[str]) -> VMReport:
    """Return the report of a worker older than 0.44, which sends the whole VM. Raises ValidationError.

    Such a worker knows no conditions and no powerState: a VM that it reports as running does run.
    """
    if isinstance(raw, dict):
        raw = {name: raw[name] for name in _OLD_REPORT if name in raw}
    seen = decode_from_client(VMReport, raw, unknown)
    return replace(seen, conditions=(Condition("running", "true"),)) if seen.status == "running" else seen


def components() -> dict[str, Any]:
    """Return the schemas of all resources, as components of an OpenAPI document."""
    spec = openapi_schema(VMSpec)
    for name in sorted(_DERIVED):
        text = "Name of the VM on its worker's disk; `localName` and `tartName` are the same"
        spec["properties"][name] = {"type": "string", "readOnly": True, "description": text}
    parts = {"VMMeta": openapi_schema(VMMeta), "VMSpec": spec, "VMState": openapi_schema(VMState)}
    resources: tuple[type, ...] = (ControllerInfo, ClusterSettings, ServiceAccount, Worker, Event, VMReport, Problem)
    resources += (IP, IssueVMAccessTokenRequest, VMAccessToken)
    return {
        **parts,
        "VM": {"type": "object", "allOf": [{"$ref": f"#/components/schemas/{name}"} for name in parts]},
        **{resource.__name__: openapi_schema(resource) for resource in resources},
        "Events": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}},
    }
