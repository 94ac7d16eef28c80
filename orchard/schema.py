"""The API's resources: VM, Worker, ServiceAccount, ClusterSettings, Event; and their JSON.

Every resource is a frozen dataclass. A change makes a new object, so an object that was read from the store stays as it
was. Each field names its one writer:

* *user*: a client of the API sets it (the specification);
* *controller*: the controller sets it once, or counts it;
* *scheduler*: it belongs to one assignment of a VM to a worker;
* *worker*: the worker observed it on its host.

`status` and `status_message` have two writers: the worker reports them for the VM that is assigned to it, and the
scheduler sets them when it assigns, fails or restarts a VM. resources/validation.py has the rules for what clients send,
transitions.py those for the changes of a VM.

Other bodies of requests and answers are in resources/bodies.py.

Field names in JSON mix three spellings (`createdAt`, `scheduled_at`, `net-softnet`), because existing clients use them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple

from orchard.codec import MAX_ITEMS, attr, attrs_of, unknown_fields
from orchard.resources.cluster import (
    MAX_WEBHOOKS,
    CachedImage,
    Health,
    ImagePull,
    Versions,
    Webhook,
    WorkerDisk,
    WorkerState,
)
from orchard.resources.json_text import decode_stored, members

NAME = re.compile(r"[A-Za-z0-9:_.-]+")
# The beginning of a VM's status_message while its image is being pulled.
PULLING = "pulling image"
# The prefix of the names of VMs on a worker's disk that Orchard manages.
LOCAL_PREFIX = "orchard-"
# Characters. A VM's name becomes part of a file name, which has at most 255 bytes, together with a uid and a counter.
MAX_NAME = 128
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
METADATA_KEY = re.compile(r"[A-Za-z0-9._/-]{1,128}")
# The URL of an archive. It has no ":" after the host, because tart takes what follows a ":" in a path as an option.
ARCHIVE = re.compile(r"https://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[^:]*)?")
# URL spellings that a downloader may normalise to a different URL than the one that the policy was checked against.
_AMBIGUOUS_URL = re.compile(r"%2e|%2f|%5c|[\\?#@]|//|/\.{1,2}(/|$)", re.IGNORECASE)

TART_VMS = "org.cirruslabs.tart-vms"
LOGICAL_CORES = "org.cirruslabs.logical-cores"
MEMORY_MIB = "org.cirruslabs.memory-mib"
# The label with a worker's name, which VMs may ask for.
WORKER_NAME_LABEL = "org.cirruslabs.orchard.worker-name"

# Largest values of the fields of a VM: seconds, and pairs of metadata, their characters and all their bytes.
MAX_VM_TTL = 31_536_000
MAX_PENDING_TIMEOUT = 604_800
MAX_STARTUP_TIMEOUT = 86_400
SHUTDOWN_TIMEOUT, MAX_SHUTDOWN_TIMEOUT = 30, 600
MAX_PRIORITY = 1_000
MAX_METADATA = 64
MAX_METADATA_VALUE, MAX_METADATA_BYTES = 1024, 16 * 1024
# Images that a cluster's workers are to pull in advance.
MAX_PREPULL = 50

# Seconds that an access token is valid: a day by default, thirty days at most.
DEFAULT_TTL, MAX_TTL = 86_400, 2_592_000

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
ConditionType = Literal["scheduled", "running", "ready"]
ConditionState = Literal["true", "false"]
SchedulerProfile = Literal["optimize-utilization", "distribute-load"]
StartupOnFailure = Literal["", "fail", "keep"]
EndRequest = Literal["", "restart", "drain"]
ScriptTransport = Literal["", "ssh", "tart-guest-agent"]
Role = Literal["compute:read", "compute:write", "compute:connect", "admin:read", "admin:write"]


class RuntimeTraits(NamedTuple):
    """What the VMs of a runtime can be. `runs_macos`: a host offers as many of them as Apple's licence allows."""

    runs_macos: bool
    has_guest_agent: bool


RUNTIMES: Mapping[Runtime, RuntimeTraits] = {
    "tart": RuntimeTraits(runs_macos=True, has_guest_agent=True),
    "vetu": RuntimeTraits(runs_macos=False, has_guest_agent=False),
}

# Who sets each condition of a VM.
CONDITION_WRITERS: Mapping[ConditionType, Literal["controller", "worker"]] = {
    "scheduled": "controller",
    "running": "worker",
    "ready": "worker",
}

_Time = datetime.datetime


# ---- VM -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuestScript:
    script_content: str = attr("script_content", "The script, read by a login shell in the VM", zero="", secret=True)
    env: Mapping[str, str] = attr("env", "Environment variables of the script", zero={}, secret=True)


@dataclass(frozen=True, slots=True)
class StartupScript(GuestScript):
    transport: ScriptTransport = attr(
        "transport",
        "How the script gets into the VM: over SSH (the default), or by the guest agent of a Tart VM",
        zero="",
    )


@dataclass(frozen=True, slots=True)
class HostDir:
    name: str = attr("name", "Name under which the VM sees the directory", zero="")
    path: str = attr("path", "Absolute path on the worker's host, or the https:// URL of an archive", zero="")
    ro: bool = attr("ro", "Read only", zero=False)


@dataclass(frozen=True, slots=True)
class Condition:
    type: ConditionType = attr(
        "type", "`scheduled`, set by the controller; `running` or `ready`, reported by the worker"
    )
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
    created_by: str = attr("createdBy", "Service account that created the VM", zero="", writer="controller")
    expires_at: _Time | None = attr("expiresAt", "When the VM is deleted (ttlSeconds)", zero=None, writer="controller")
    # Unknown fields of the whole VM.
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class VMSpec:
    """What the user asks for. A field's `change` says what becomes of another value after the VM was created."""

    image: str = attr("image", "VM image for this VM", zero="", example="ghcr.io/cirruslabs/macos-tahoe-base:latest")
    image_pull_policy: PullPolicy = attr(
        "imagePullPolicy", "VM image pull policy", zero="IfNotPresent", default="IfNotPresent"
    )
    cpu: int = attr(
        "cpu",
        "Number of CPUs assigned to this VM; 0: the worker's default",
        zero=0,
        default=DEFAULT_CPU,
        number=True,
        change="boot",
    )
    memory: int = attr(
        "memory",
        "Amount of RAM in megabytes assigned to this VM; 0: the worker's default",
        zero=0,
        default=DEFAULT_MEMORY,
        number=True,
        change="boot",
    )
    disk_size: int = attr(
        "diskSize", "Disk size in gigabytes; it can only grow", zero=0, number=True, example=100, change="boot"
    )
    os: OS = attr("os", "Operating system of the image", zero="darwin", default="darwin")
    arch: Arch = attr("arch", "Processor architecture that the worker must have", zero="arm64", default="arm64")
    runtime: Runtime = attr("runtime", "Hypervisor command that the worker must have", zero="tart", default="tart")
    net_softnet: bool = attr(
        "netSoftnet",
        "Whether to use Softnet network isolation: `--net-softnet` of `tart run`",
        zero=False,
        default=False,
        twin="net-softnet",
        change="boot",
    )
    net_softnet_allow: tuple[str, ...] = attr(
        "netSoftnetAllow",
        "CIDRs or `@host`, with `in ` or `out ` before them for one direction, to allow the traffic to when using Softnet"
        " isolation; enables `netSoftnet`",
        zero=(),
        example=["192.168.0.0/24"],
        change="boot",
    )
    net_softnet_block: tuple[str, ...] = attr(
        "netSoftnetBlock",
        "CIDRs or `@host`, with `in ` or `out ` before them for one direction, to block the traffic to when using Softnet"
        " isolation; enables `netSoftnet`",
        zero=(),
        example=["66.66.0.0/16"],
        change="boot",
    )
    suspendable: bool = attr(
        "suspendable",
        "Start the VM so that it can be suspended; later generations suspend the VM instead of stopping it",
        zero=False,
        default=False,
        change="boot",
    )
    net_bridged: str = attr(
        "net-bridged",
        "Host interface to bridge the VM's network to; empty: none",
        zero="",
        example="en0",
        change="boot",
    )
    headless: bool = attr("headless", "Whether to run without graphics", zero=False, default=False, change="boot")
    nested: bool = attr("nested", "Enable nested virtualization", zero=False, default=False, change="boot")
    username: str = attr("username", "SSH username to use when connecting to a VM", zero="admin", default="admin")
    password: str = attr(
        "password", "SSH password to use when connecting to a VM", zero="admin", default="admin", secret=True
    )
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
        # The resource of a macOS VM is added to those that a client asks for.
        most=MAX_ITEMS + 1,
        example={LOGICAL_CORES: 4, MEMORY_MIB: 8192},
    )
    labels: Mapping[str, str] = attr(
        "labels", "Labels required by this VM on the worker", zero={}, example={"model": "macstudio"}
    )
    host_dirs: tuple[HostDir, ...] = attr(
        "hostDirs",
        "Directories on the worker's host to mount to the VM, where the cluster's hostDirPolicies allow it",
        zero=(),
        most=64,
        example=[{"name": "src", "path": "/Users/ci/src", "ro": True}],
        change="boot",
    )
    random_serial: bool = attr("randomSerial", "Give the VM a random serial number", zero=False)
    audio: bool = attr("audio", "Share the host's sound with the VM; fixed at creation", zero=False)
    clipboard: bool = attr("clipboard", "Share the host's clipboard with the VM; fixed at creation", zero=False)
    power_state: PowerState = attr(
        "powerState",
        "Desired power state. A stopped or suspended VM consumes no resources and can be cloned on the same worker by"
        " its tartName. Leaving `running` is possible only once",
        zero="running",
        default="running",
        change="boot",
    )
    startup_timeout_seconds: int = attr(
        "startupTimeoutSeconds",
        "Seconds that the startup script may take; 0: no limit",
        zero=0,
        maximum=MAX_STARTUP_TIMEOUT,
    )
    startup_on_failure: StartupOnFailure = attr(
        "startupOnFailure",
        "What a startup script that fails does to the VM: `fail` it (the default), or `keep` it running and not ready",
        zero="",
    )
    shutdown_script: GuestScript | None = attr(
        "shutdown_script",
        "Script that runs before a running VM is ended; whatever becomes of it, the VM ends",
        zero=None,
        example={"script_content": "sync\n"},
    )
    shutdown_timeout_seconds: int = attr(
        "shutdownTimeoutSeconds",
        f"Seconds that the shutdown script may take; 0: {SHUTDOWN_TIMEOUT}",
        zero=0,
        maximum=MAX_SHUTDOWN_TIMEOUT,
        change="at once",
    )
    ttl_seconds: int = attr(
        "ttlSeconds",
        "Seconds from its creation after which the VM is deleted; 0: never. A change counts from now",
        zero=0,
        maximum=MAX_VM_TTL,
        change="at once",
    )
    pending_timeout_seconds: int = attr(
        "pendingTimeoutSeconds",
        "Seconds without a worker after which the VM fails; 0: never",
        zero=0,
        maximum=MAX_PENDING_TIMEOUT,
        change="at once",
    )
    metadata: Mapping[str, str] = attr(
        "metadata", "The client's own facts about the VM; nothing here looks at them", zero={}, most=MAX_METADATA,
        example={"pipeline": "1234"}, change="at once",
    )  # fmt: skip
    priority: int = attr(
        "priority",
        "Place in the queue: VMs of higher priority come first",
        zero=0,
        maximum=MAX_PRIORITY,
        change="at once",
    )
    preferred_labels: Mapping[str, str] = attr(
        "preferredLabels",
        "Among the workers that can take the VM, those with more of these labels come first",
        zero={},
        change="at once",
    )

    @property
    def leased(self) -> bool:
        """Whether the VM ends when its worker loses the controller, which starts such a VM elsewhere."""
        return self.restart_policy == "OnFailure"


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
    startup_exit_code: int | None = attr(
        "startupExitCode", "Exit code of the startup script, once it has ended; 124: it took too long", zero=None,
        writer="worker",
    )  # fmt: skip
    startup_ended_at: _Time | None = attr("startupEndedAt", "When the startup script ended", zero=None, writer="worker")
    waiting_since: _Time | None = attr(
        "waitingSince", "Since when a VM with pendingTimeoutSeconds has no worker", zero=None, writer="scheduler"
    )
    end_request: EndRequest = attr(
        "endRequest", "Why the worker was told to end the VM: for a `restart`, or a `drain` of the worker", zero="",
        writer="controller",
    )  # fmt: skip
    ended_at: _Time | None = attr(
        "endedAt",
        "When the worker reported that the VM has failed and does not run any more",
        zero=None,
        writer="worker",
    )


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
        return f"{LOCAL_PREFIX}{self.meta.name}-{self.meta.uid}-{self.state.restart_count}"

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

    def state_members(self) -> list[str]:
        """Return the first members of the VM's JSON: all but those of the specification."""
        name = encode_basestring(self.tart_name)
        return [*members(self.meta), *members(self.state), f'"localName":{name}', f'"tartName":{name}']


# Fields that are computed from others.
DERIVED_NAMES = frozenset({"localName", "tartName"})
_META_NAMES = frozenset(field.json for field in attrs_of(VMMeta))
_STATE_NAMES = frozenset(field.json for field in attrs_of(VMState))
SPEC_NAMES = frozenset(name for field in attrs_of(VMSpec) for name in (field.json, field.twin) if name)
_NOT_META = _STATE_NAMES | SPEC_NAMES | DERIVED_NAMES
NOT_SPEC = _META_NAMES | _STATE_NAMES | DERIVED_NAMES
_NOT_STATE = _META_NAMES | SPEC_NAMES | DERIVED_NAMES


def vm_from_json(raw: Mapping[str, Any]) -> VM:
    """Return the VM of a JSON object that `store.encode_object` made. Raises ValidationError."""
    return VM(
        decode_stored(VMMeta, raw, _NOT_META),
        decode_stored(VMSpec, raw, NOT_SPEC),
        decode_stored(VMState, raw, _NOT_STATE),
    )


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
class Drain:
    deadline_seconds: int = attr(
        "deadlineSeconds", "Seconds after which the worker's VMs are ended; 0: never", zero=0, maximum=MAX_VM_TTL
    )
    now: bool = attr("now", "Whether the worker's VMs are ended at once", zero=False)
    deadline: _Time | None = attr("deadline", "When the worker's VMs are ended", zero=None, writer="controller")


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
    drain: Drain | None = attr("drain", "The drain that is under way or done", zero=None, writer="controller")
    offline_since: _Time | None = attr(
        "offlineSince", "Since when the worker is offline, if the cluster has workerPruneSeconds", zero=None,
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
    disk: WorkerDisk | None = attr("disk", "The disk that holds the worker's VMs", zero=None)
    versions: Versions | None = attr(
        "versions", "Versions of the programs on the host; absent in a heartbeat: unchanged", zero=None
    )
    images: tuple[CachedImage, ...] | None = attr(
        "images", "Images on the worker's disk, at most 200; absent in a heartbeat: unchanged", zero=None
    )
    pulling: ImagePull | None = attr(
        "pulling", "The image of `prepull` that the worker is pulling; absent: none", zero=None
    )
    # Computed for answers.
    state: WorkerState | None = attr("state", "Whether the worker takes new VMs", zero=None, writer="controller")
    since: _Time | None = attr("since", "Since when it is in this state", zero=None, writer="controller")
    used: Mapping[str, int] = attr("used", "Resources that its VMs use", zero={}, writer="controller")
    vms: int = attr("vms", "Number of its VMs that use resources", zero=0, writer="controller")
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    name: str = attr("name", "Name", zero="")
    token: str = attr(
        "token", "Secret token used to access the API; random if a new account names none", zero="", secret=True
    )
    roles: tuple[Role, ...] = attr("roles", "What the account may do", zero=(), most=16)
    created_at: _Time | None = attr("createdAt", "When the account was created", zero=None, writer="controller")
    authorized_keys: tuple[str, ...] = attr(
        "authorizedKeys", "Public keys, in OpenSSH's format, that let in at the SSH server in place of the token", zero=(),
        most=16,
    )  # fmt: skip
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class HostDirPolicy:
    path_prefix: str = attr("pathPrefix", "Directory or https:// URL below which hostDirs are allowed", zero="")
    ro: bool = attr("ro", "Whether hostDirs below it must be read only", zero=False)


@dataclass(frozen=True, slots=True)
class Prepull:
    image: str = attr("image", "Image that matching workers pull in advance", zero="")
    labels: Mapping[str, str] = attr("labels", "Labels that a worker must have; none: every worker", zero={})


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
    default_ttl_seconds: int = attr(
        "defaultTTLSeconds", "`ttlSeconds` of a VM that names none; 0: none", zero=0,
        maximum=MAX_VM_TTL,
    )  # fmt: skip
    max_ttl_seconds: int = attr(
        "maxTTLSeconds", "The largest `ttlSeconds` of a VM; 0: no maximum", zero=0, maximum=MAX_VM_TTL
    )
    min_free_disk_gb: int = attr(
        "minFreeDiskGB", "Gigabytes that a worker's disk must have free to take new VMs; 0: none", zero=0
    )
    worker_prune_seconds: int = attr(
        "workerPruneSeconds", "Seconds after which an offline worker without VMs is deleted; 0: never", zero=0
    )
    prepull: tuple[Prepull, ...] = attr(
        "prepull", "Images that workers pull in advance", zero=(), most=MAX_PREPULL, example=[{"image": "macos:latest"}]
    )
    webhooks: tuple[Webhook, ...] = attr(
        "webhooks", "Who is told what needs attention", zero=(), most=MAX_WEBHOOKS,
        example=[{"url": "https://example.com/orchard", "events": ["vm.failed"], "secret": "at least 16 characters"}],
    )  # fmt: skip
    unknown: Mapping[str, Any] = unknown_fields()


# The kind of the events that only the controller writes.
LIFECYCLE = "lifecycle"


@dataclass(frozen=True, slots=True)
class Event:
    kind: str = attr(
        "kind",
        "Kind of the event: `log_line` for a line of the startup script's output, `lifecycle` for what the controller did",
        zero="",
    )
    payload: str = attr("payload", "Payload of the event", zero="", default="", secret=True)
    timestamp: int = attr("timestamp", "Unix timestamp of the event, in seconds", zero=0, default=0)


@dataclass(frozen=True, slots=True)
class EndedVM:
    """An entry of the history: a deleted VM and how it ended."""

    name: str = attr("name", "VM name")
    uid: str = attr("uid", "The VM's identity")
    ended_at: _Time = attr("endedAt", "When the VM was deleted")
    created_by: str = attr("createdBy", "Service account that created the VM", zero="")
    metadata: Mapping[str, str] = attr("metadata", "The VM's metadata", zero={})
    worker: str = attr("worker", "Worker that the VM was last assigned to", zero="")
    image: str = attr("image", "VM image", zero="")
    created_at: _Time | None = attr("createdAt", "When the VM was created", zero=None)
    assigned_at: _Time | None = attr("assignedAt", "When the VM was last assigned to a worker", zero=None)
    started_at: _Time | None = attr("startedAt", "When the VM first ran", zero=None)
    status: Status = attr("status", "The VM's last status", zero="pending", default="pending")
    message: str = attr("message", "The VM's last status message", zero="")
    restarts: int = attr("restarts", "How often the VM was restarted", zero=0, default=0)
