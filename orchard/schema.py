"""The nouns: VM, Worker, ServiceAccount, ClusterSettings, Event; their JSON; what is valid. Law: no I/O, no clock.

Every noun is a frozen dataclass: a change makes a new object, so whoever holds one holds a consistent picture. Each
field names its one writer:

* *user*: a client of the API asks for it (the specification);
* *controller*: set once or counted by the controller;
* *scheduler*: belongs to one assignment of a VM to a worker;
* *worker*: observed on the worker's host.

`status` and `status_message` are the one shared pair: the worker reports them for the assignment that it holds, the
scheduler sets them when an assignment begins, fails or is taken back. What may happen to a VM, and when, is the next
room's business (lifecycle.py); here is only what a single object may look like.

The names on the wire mix three spellings (`createdAt`, `scheduled_at`, `net-softnet`): they are the protocol's.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orchard.codec import InvalidError, MalformedError, attr, attrs_of, component, decode, encode, replace, shown

NAME = re.compile(r"[A-Za-z0-9:_.-]+")
MAX_NAME = 128  # characters; a VM's name becomes part of a file name with a limit of 255, beside a uid and a counter
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # could forge a line in a log or on a terminal
# The address of an archive: tart takes what follows a ":" in its path for an option.
ARCHIVE = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[^:]*)?")
# What whoever fetches an archive might read as another address than the one that a policy was held against.
ARCHIVE_TRICKS = re.compile(r"%2e|%2f|%5c|[\\?#@]|//|/\.{1,2}(/|$)", re.IGNORECASE)

TART_VMS = "org.cirruslabs.tart-vms"
LOGICAL_CORES = "org.cirruslabs.logical-cores"
MEMORY_MIB = "org.cirruslabs.memory-mib"

DEFAULT_TTL, MAX_TTL = 86_400, 2_592_000  # seconds that an access token is good for: a day, thirty days

DEFAULT_CPU = 4  # when neither the VM nor its worker says
DEFAULT_MEMORY = 8192  # MiB, likewise

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

Clock = datetime.datetime


# ---- VM ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartupScript:
    script_content: str = attr("script_content", "The script, read by a login shell in the VM", zero="")
    env: Mapping[str, str] = attr("env", "Environment variables of the script", zero={})


@dataclass(frozen=True, slots=True)
class HostDir:
    name: str = attr("name", "Name under which the VM sees the directory", zero="")
    path: str = attr("path", "Absolute path on the worker's host, or the https:// address of an archive", zero="")
    ro: bool = attr("ro", "Read only", zero=False)


@dataclass(frozen=True, slots=True)
class Condition:
    type: ConditionType = attr("type", "`scheduled`, which is the controller's, or `running`, the worker's")
    state: ConditionState = attr("state", "whether the condition holds: `true` or `false`")


@dataclass(frozen=True, slots=True)
class VMMeta:
    name: str = attr("name", "VM name", zero="", example="macos-tahoe-base")
    uid: str = attr("uid", "Unique identity, new for each VM even under an old name", zero="", writer="controller")
    created_at: Clock | None = attr("createdAt", "When the VM was created", zero=None, writer="controller")
    version: int = attr("version", "Rises with every change of the VM", zero=0, writer="controller", number=True)
    generation: int = attr(
        "generation",
        "Incremented by the controller each time a VM's specification changes",
        zero=0,
        writer="controller",
        number=True,
    )


@dataclass(frozen=True, slots=True)
class VMSpec:
    """What the user asks for; `lifecycle.change` says which of it may change later."""

    image: str = attr("image", "VM image for this VM", zero="", example="ghcr.io/cirruslabs/macos-tahoe-base:latest")
    image_pull_policy: PullPolicy = attr(
        "imagePullPolicy", "VM image pull policy", zero="IfNotPresent", default="IfNotPresent"
    )
    cpu: int = attr(
        "cpu",
        "Number of CPUs assigned to this VM; 0 leaves it to the worker's default",
        zero=0,
        default=DEFAULT_CPU,
        number=True,
    )
    memory: int = attr(
        "memory",
        "Amount of RAM in megabytes assigned to this VM; 0 leaves it to the worker's default",
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
        "Start the VM so that it can be suspended; later generations suspend it instead of stopping it",
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
    random_serial: bool = attr("randomSerial", "Give the VM a serial number of its own", zero=False)
    power_state: PowerState = attr(
        "powerState",
        "Desired power state. A stopped or suspended VM consumes no resources and can be cloned on the same worker by"
        " its tartName. Leaving `running` is possible only once",
        zero="running",
        default="running",
    )


@dataclass(frozen=True, slots=True)
class VMState:
    """Where the VM is and how it fares. All but the worker's fields begin anew with each assignment."""

    status: Status = attr("status", "VM status", zero="pending", writer="worker", default="pending")
    status_message: str = attr("status_message", "VM status message", zero="", writer="worker")
    worker: str = attr("worker", "Worker on which the VM was assigned to", zero="", writer="scheduler")
    assigned_cpu: int = attr("assignedCPU", "CPUs that the VM gets", zero=0, writer="scheduler", number=True)
    assigned_memory: int = attr("assignedMemory", "MiB that the VM gets", zero=0, writer="scheduler", number=True)
    scheduled_at: Clock | None = attr("scheduled_at", "When it got its worker", zero=None, writer="scheduler")
    started_at: Clock | None = attr("started_at", "When it first ran", zero=None, writer="controller")
    restarted_at: Clock | None = attr("restarted_at", "When it was last restarted", zero=None, writer="scheduler")
    restart_count: int = attr("restart_count", "How often it was restarted", zero=0, writer="scheduler", number=True)
    image_fqn: str = attr("image_fqn", "The image with its digest", zero="", writer="worker")
    observed_generation: int = attr(
        "observedGeneration",
        "Corresponds to the `Generation` value on which the worker had acted upon",
        zero=0,
        writer="worker",
        number=True,
    )
    conditions: tuple[Condition, ...] = attr("conditions", "What holds of the VM", zero=(), writer="worker")


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
        """One life of the VM: a restart begins another."""
        return self.meta.name, self.meta.uid, self.state.restart_count

    @property
    def tart_name(self) -> str:
        """The name of the VM on its worker's disk."""
        return f"orchard-{self.meta.name}-{self.meta.uid}-{self.state.restart_count}"

    def condition(self, kind: ConditionType) -> bool:
        return any(item.type == kind and item.state == "true" for item in self.state.conditions)

    @property
    def resting(self) -> bool:
        """Stopped or suspended for good, and the worker has said that it happened."""
        return self.spec.power_state != "running" and self.state.status == "running" and not self.condition("running")

    @property
    def holds_resources(self) -> bool:
        """Whether the VM counts against its worker's resources."""
        return bool(self.state.worker) and self.state.status != "failed" and not self.resting

    def to_json(self) -> dict[str, Any]:
        """The VM as the API shows it and as it is stored."""
        return {**self.fate(), **encode(self.spec)}

    def fate(self) -> dict[str, Any]:
        """All of that but the specification, which comes after it."""
        name = self.tart_name
        return {**encode(self.meta), **encode(self.state), "localName": name, "tartName": name}


_DERIVED = frozenset({"localName", "tartName"})
_META_NAMES = frozenset(field.json for field in attrs_of(VMMeta))
_STATE_NAMES = frozenset(field.json for field in attrs_of(VMState))
_SPEC_NAMES = frozenset(name for field in attrs_of(VMSpec) for name in (field.json, field.twin) if name)
_CONDITION_TYPES = get_args(ConditionType)
_SOFTNET = frozenset({"netSoftnet", "net-softnet"})
_NOT_SPEC = _META_NAMES | _STATE_NAMES | _DERIVED


def vm_from_json(raw: Mapping[str, Any]) -> VM:
    """Read a VM as `to_json` wrote it. Raises MalformedError when it is none."""
    raw = dict(raw)
    spec = decode(VMSpec, raw)
    return VM(decode(VMMeta, raw), spec, decode(VMState, raw))


def name_of(raw: object) -> str:
    """Read the name that a client's object gives itself; empty when it gives none. Raises MalformedError."""
    meta = decode(VMMeta, raw, by=frozenset({"user"}))
    return meta.name


def new_spec(raw: object, unknown: list[str]) -> VMSpec:
    """Read the specification of a new VM from a client's object and complete it.

    Read-only fields are passed over, unknown ones named in `unknown`. Raises ValidationError.
    """
    spec = decode(VMSpec, raw, also=_NOT_SPEC, unknown=unknown)
    assert isinstance(raw, dict)
    resources = spec.resources
    if spec.os == "darwin" and spec.runtime == "tart" and TART_VMS not in resources:
        resources = {**resources, TART_VMS: 1}
    return _complete(spec, _softnet(raw, False), resources)


def replaced_spec(old: VMSpec, raw: object, unknown: list[str]) -> VMSpec:
    """Read a PUT as Go clients mean it, who leave zero values out.

    An absent boolean is false and an absent list empty; absent texts, numbers, maps and powerState are unchanged.
    Raises ValidationError.
    """
    zeros: dict[str, Any] = {
        field.name: False if field.kind is bool else ()
        for field in attrs_of(VMSpec)
        if field.kind is bool or field.is_list()
    }
    spec = decode(VMSpec, raw, base=replace(old, **zeros), also=_NOT_SPEC, unknown=unknown)
    assert isinstance(raw, dict)
    return _complete(spec, _softnet(raw, old.net_softnet), spec.resources)


def patched_spec(old: VMSpec, patch: object, unknown: list[str]) -> VMSpec:
    """Read a JSON merge patch (RFC 7396): only what it names changes, and null brings back the zero value.

    Raises ValidationError.
    """
    if not isinstance(patch, dict):
        raise MalformedError(f"the body is {shown(patch)}, expected a JSON object (a merge patch)")
    target = encode(old)
    for name in _SOFTNET:  # the twins would contradict a patch that names only one of them
        del target[name]
    merged = _merge(target, {name: value for name, value in patch.items() if name in _SPEC_NAMES})
    spec = decode(VMSpec, merged, unknown=unknown)
    unknown.extend(name for name in patch if name not in _SPEC_NAMES | _NOT_SPEC)
    softnet = _softnet(patch, old.net_softnet) if _SOFTNET & patch.keys() else old.net_softnet
    return _complete(spec, softnet, spec.resources)


def _merge(target: object, patch: object) -> Any:
    """Apply an RFC 7396 merge patch to a JSON value (the algorithm of its section 2)."""
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
    """Settle netSoftnet and its deprecated twin: each sets the other.

    A client that sends a whole object back with one of them changed contradicts itself: the changed one was meant.
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


def _complete(spec: VMSpec, softnet: bool, resources: Mapping[str, int]) -> VMSpec:
    """Add what one field of a specification says about another, and check the result."""
    spec = replace(
        spec,
        net_softnet=softnet or bool(spec.net_softnet_allow or spec.net_softnet_block),
        resources=resources,
        username=spec.username or "admin",
        password=spec.password or "admin",
    )
    check_spec(spec)
    return spec


def check_spec(spec: VMSpec) -> None:
    """Hold a specification against the rules that the types don't say. Raises InvalidError."""
    if not spec.image:
        raise InvalidError('image is "", expected the name of a VM image')
    _check_word("image", spec.image)
    _check_word("username", spec.username)
    _check_word("net-bridged", spec.net_bridged)
    if CONTROL.search(spec.password):
        raise InvalidError("password holds a control character, expected printable ones")
    _check_map("labels", spec.labels)
    _check_map("resources", spec.resources)
    for field, networks in (("netSoftnetAllow", spec.net_softnet_allow), ("netSoftnetBlock", spec.net_softnet_block)):
        for index, network in enumerate(networks):
            _check_network(f"{field}[{index}]", network)
    if spec.power_state == "suspended" and not spec.suspendable:
        raise InvalidError('powerState is "suspended", which needs suspendable to be true')
    if spec.startup_script is not None:
        for name, value in spec.startup_script.env.items():
            if not ENV_NAME.fullmatch(name):
                raise InvalidError(f"startup_script.env has the name {shown(name)}, expected {ENV_NAME.pattern}")
            if "\0" in value:
                raise InvalidError(
                    f"startup_script.env[{shown(name)}] holds a NUL character, which no shell can pass on"
                )
        if "\0" in spec.startup_script.script_content:
            raise InvalidError("startup_script.script_content holds a NUL character, which no shell can read")
    names: set[str] = set()
    for index, host_dir in enumerate(spec.host_dirs):
        check_host_dir(f"hostDirs[{index}]", host_dir)
        if host_dir.name in names:
            raise InvalidError(f"hostDirs[{index}].name is {shown(host_dir.name)}, which another hostDir already has")
        names.add(host_dir.name)


def _check_word(field: str, text: str) -> None:
    """Refuse what a command line could take for an option or for two words, or a log for a new line."""
    if text.startswith("-") or CONTROL.search(text) or " " in text or "," in text:
        raise InvalidError(
            f'{field} is {shown(text)}, expected a text without blanks and commas that does not begin with "-"'
        )


def _check_map(field: str, pairs: Mapping[str, object]) -> None:
    """Refuse labels and resources that could not stand in a message of one line."""
    for key, value in pairs.items():
        if CONTROL.search(f"{key}{value}"):
            raise InvalidError(f"{field}[{shown(key)}] is {shown(value)}, expected no control characters")


def _check_network(where: str, text: str) -> None:
    """Refuse what is no CIDR, among it some that Python takes for networks: masks, and zones, which may hold commas."""
    try:
        ipaddress.ip_network(text, strict=False)
        good = re.fullmatch(r"[0-9A-Fa-f.:]+(/[0-9]+)?", text) is not None
    except ValueError:
        good = False
    if not good:
        raise InvalidError(f"{where} is {shown(text)}, expected a network such as 192.168.0.0/24")


def check_host_dir(where: str, host_dir: HostDir) -> None:
    """Refuse a hostDir that could mean another directory than it says. Raises InvalidError."""
    for field, text in (("name", host_dir.name), ("path", host_dir.path)):
        if not text:
            raise InvalidError(f"{where}.{field} is missing: a hostDir needs a name and a path")
        if CONTROL.search(text) or "," in text:
            raise InvalidError(f"{where}.{field} is {shown(text)}, expected no commas or control characters")
    name, path = host_dir.name, host_dir.path
    if ":" in name or "/" in name or name.startswith("-") or name in (".", ".."):
        raise InvalidError(f'{where}.name is {shown(name)}, expected a name without ":" and "/" and no "-" in front')
    if not (ARCHIVE.fullmatch(path) or (path.startswith("/") and ":" not in path)):
        raise InvalidError(
            f'{where}.path is {shown(path)}, expected an absolute path without ":" or an https:// address'
        )


def allows(policies: Iterable[HostDirPolicy], host_dir: HostDir) -> bool:
    """Say whether some policy covers a hostDir: by whole path components, never through `..`."""
    return any(_covers(policy.path_prefix, host_dir.path) and (host_dir.ro or not policy.ro) for policy in policies)


def _covers(prefix: str, path: str) -> bool:
    scheme = "https://"
    if not path.startswith(scheme if prefix.startswith(scheme) else "/"):
        return False
    want, have = ([part for part in text.split("/") if part not in ("", ".")] for text in (prefix, path))
    if ".." in have or (path.startswith(scheme) and ARCHIVE_TRICKS.search(path, len(scheme) - 1)):
        return False
    return have[: len(want)] == want


# ---- worker, account, settings, event ------------------------------------------------------------------------------


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
    labels: Mapping[str, str] = attr("labels", "Labels that VMs may ask for", zero={})
    default_cpu: int = attr("defaultCPU", "CPUs of a VM that names none", zero=0, number=True)
    default_memory: int = attr("defaultMemory", "MiB of a VM that names none", zero=0, number=True)
    machine_id: str = attr("machine_id", "Identity of the host", zero="")
    last_seen: Clock | None = attr("last_seen", "The worker's last sign of life", zero=None)
    scheduling_paused: bool = attr("scheduling_paused", "Whether it gets no new VMs", zero=False)
    created_at: Clock | None = attr("createdAt", "When the worker first registered", zero=None, writer="controller")


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    name: str = attr("name", "Name", zero="")
    token: str = attr("token", "Secret token used to access the API; a random one when none is given", zero="")
    roles: tuple[Role, ...] = attr("roles", "What the account may do", zero=())
    created_at: Clock | None = attr("createdAt", "When the account was created", zero=None, writer="controller")


@dataclass(frozen=True, slots=True)
class HostDirPolicy:
    path_prefix: str = attr("pathPrefix", "Directory (or https:// address) below which hostDirs are allowed", zero="")
    ro: bool = attr("ro", "Whether they must be read only", zero=False)


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
        "`optimize-utilization`: a VM goes to the busiest worker that can fit it (the default);"
        " `distribute-load`: to the least occupied one",
        zero="optimize-utilization",
        default="optimize-utilization",
    )


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


@dataclass(frozen=True, slots=True)
class IP:
    ip: str = attr("ip", "The resolved IP address", zero="")


@dataclass(frozen=True, slots=True)
class IssueVMAccessTokenRequest:
    ttl_seconds: int | None = attr(
        "ttlSeconds",
        f"Requested token lifetime in seconds: {DEFAULT_TTL} when omitted, at most {MAX_TTL}",
        zero=None,
    )


@dataclass(frozen=True, slots=True)
class VMAccessToken:
    token: str = attr("token", "Signed temporary JWT token", zero="")
    token_type: str = attr("tokenType", "Token type to use in the Authorization header", zero="", example="Bearer")
    expires_at: Clock | None = attr("expiresAt", "When the token expires", zero=None)
    ssh_username: str = attr(
        "sshUsername", "Username to use when authenticating to the built-in SSH server", zero="", example="token"
    )
    vm_name: str = attr("vmName", "VM name this token was issued for", zero="")
    vm_uid: str = attr("vmUID", "Immutable VM UID this token is bound to", zero="")


@dataclass(frozen=True, slots=True)
class Problem:
    """The body of every answer that is an error."""

    message: str = attr("message", "What was refused, and what would be accepted", zero="", default="")


@dataclass(frozen=True, slots=True)
class VMReport:
    """What a worker says of a VM (`PUT /vms/{name}/state`): the life that it means, and what it sees of it.

    None and the empty uid are what the worker left out.
    """

    uid: str = attr("uid", "The VM's uid; a report about another one is refused", zero="")
    restart_count: int | None = attr("restart_count", "The VM's restart_count, likewise", zero=None, number=True)
    status: Status | None = attr("status", "VM status", zero=None)
    status_message: str | None = attr("status_message", "VM status message", zero=None)
    image_fqn: str = attr("image_fqn", "The image with its digest", zero="")
    observed_generation: int = attr("observedGeneration", "The generation acted upon", zero=0, number=True)
    conditions: tuple[Condition, ...] | None = attr("conditions", "What holds of the VM", zero=None)


def check_name(what: str, name: str) -> None:
    """Refuse a name that could not stand in a URL, a file name or a command line. Raises InvalidError."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME or name in (".", ".."):
        raise InvalidError(
            f"{what} is {shown(name)}, expected 1 to {MAX_NAME} characters of A-Z a-z 0-9 : _ . - other than dots"
        )


def worker_from_client(raw: object, unknown: list[str]) -> Worker:
    """Read a worker as it registers itself. Raises ValidationError."""
    worker = decode(Worker, raw, by=frozenset({"user"}), unknown=unknown)
    check_name("name", worker.name)
    if CONTROL.search(worker.machine_id):
        raise InvalidError(f"machine_id is {shown(worker.machine_id)}, expected no control characters")
    _check_map("labels", worker.labels)
    _check_map("resources", worker.resources)
    return worker


def account_from_client(raw: object, unknown: list[str], base: ServiceAccount | None = None) -> ServiceAccount:
    """Read a service account as an administrator wants it; the fields left out are `base`'s. Raises ValidationError."""
    account = decode(ServiceAccount, raw, base=base, by=frozenset({"user"}), unknown=unknown)
    check_name("name", account.name)
    if CONTROL.search(account.token):
        raise InvalidError("token holds a control character, expected printable ones")
    roles = tuple(dict.fromkeys(account.roles))
    return replace(account, roles=roles)


def settings_from_client(raw: object, unknown: list[str]) -> ClusterSettings:
    """Read cluster settings; what is left out has its default. Raises MalformedError."""
    settings = decode(ClusterSettings, raw, unknown=unknown, refusal=MalformedError)
    for index, policy in enumerate(settings.host_dir_policies):
        prefix = policy.path_prefix
        fits = prefix.startswith(("/", "https://")) and ".." not in prefix.split("/") and not CONTROL.search(prefix)
        if not fits:
            raise MalformedError(
                f"hostDirPolicies[{index}].pathPrefix is {shown(prefix)},"
                " expected an absolute path or https:// address without ..",
            )
    return settings


def events_from_client(raw: object, unknown: list[str]) -> list[Event]:
    """Read an array of events, in order; null is an empty one. Raises ValidationError."""
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise MalformedError(f"the body is {shown(raw)}, expected a JSON array of events")
    events = []
    for index, item in enumerate(raw):
        event = decode(Event, item, where=f"[{index}]", unknown=unknown)
        if not event.kind or CONTROL.search(event.kind):
            raise InvalidError(f'[{index}].kind is {shown(event.kind)}, expected a kind of event such as "log_line"')
        events.append(event)
    return events


def ttl_from_client(raw: object, unknown: list[str]) -> int:
    """Read for how many seconds an access token is wanted; null is no wish. Raises ValidationError."""
    wanted = IssueVMAccessTokenRequest() if raw is None else decode(IssueVMAccessTokenRequest, raw, unknown=unknown)
    ttl = DEFAULT_TTL if wanted.ttl_seconds is None else wanted.ttl_seconds
    if not 1 <= ttl <= MAX_TTL:
        raise InvalidError(f"ttlSeconds is {ttl}, expected 1 to {MAX_TTL}")
    return ttl


def report_from_worker(raw: object, unknown: list[str]) -> VMReport:
    """Read a worker's report; workers send the whole VM, of which only these fields are theirs. Raises ValidationError.

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
    return decode(VMReport, raw, also=_META_NAMES | _SPEC_NAMES | _STATE_NAMES | _DERIVED, unknown=unknown)


def components() -> dict[str, Any]:
    """Describe all nouns as OpenAPI components."""
    meta, spec, state = component(VMMeta), component(VMSpec), component(VMState)
    for name in sorted(_DERIVED):
        text = "Name of the VM on its worker's disk; `localName` and `tartName` are the same"
        spec["properties"][name] = {"type": "string", "readOnly": True, "description": text}
    nouns: tuple[type, ...] = (ControllerInfo, ClusterSettings, ServiceAccount, Worker, Event, VMReport, Problem)
    nouns += (IP, IssueVMAccessTokenRequest, VMAccessToken)
    return {
        "VMMeta": meta,
        "VMSpec": spec,
        "VMState": state,
        "VM": {
            "type": "object",
            "allOf": [{"$ref": f"#/components/schemas/{n}"} for n in ("VMMeta", "VMSpec", "VMState")],
        },
        **{noun.__name__: component(noun) for noun in nouns},
        "Events": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}},
    }
