"""The reading of resources that clients and workers send, and the rules for single objects. Pure functions.

Functions named `..._from_client` and `report_from_worker` take parsed JSON and raise codec.ValidationError. They
append the unknown fields to a list, as by codec.add_unknown. The resources themselves are in schema.py; transitions.py
has the rules for changes of a VM.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args
from urllib.parse import urlsplit

from orchard.codec import (
    MAX_ITEMS,
    InvalidError,
    MalformedError,
    add_unknown,
    attrs_of,
    canonical,
    decode_array_from_client,
    decode_from_client,
    shortened,
    shown,
)
from orchard.resources.bodies import IssueVMAccessTokenRequest, VMReport
from orchard.resources.cluster import Webhook, bounded, bounded_images, bounded_pull, bounded_versions
from orchard.resources.json_text import encode
from orchard.schema import (
    ARCHIVE,
    DEFAULT_TTL,
    ENV_NAME,
    LIFECYCLE,
    MAX_METADATA_BYTES,
    MAX_METADATA_VALUE,
    MAX_NAME,
    MAX_TTL,
    METADATA_KEY,
    NAME,
    NOT_SPEC,
    RUNTIMES,
    SPEC_NAMES,
    TART_VMS,
    WORKER_NAME_LABEL,
    ClusterSettings,
    Condition,
    ConditionType,
    Drain,
    Event,
    GuestScript,
    HostDir,
    ServiceAccount,
    StartupScript,
    VMSpec,
    Worker,
)

# The most characters of a machine_id, which is any text; those of existing workers have at most a hundred.
MAX_MACHINE_ID = 1024
_MAX_CAPABILITIES = 64
_ACCOUNT_LISTS = frozenset({"authorizedKeys", "roles"})
# Characters of a new token. A shorter one than LONG_TOKEN may be guessed.
_SHORTEST_TOKEN, LONG_TOKEN = 8, 16
# Limits of a webhook: characters of its secret and its URL.
_SHORTEST_SECRET, _LONGEST_SECRET = 16, 256
_MAX_URL = 2048
# Types of public keys, and the number of fields of each. The longest key is one of RSA with 16,384 bits.
_KEY_FIELDS = {
    "ssh-ed25519": 2,
    "ecdsa-sha2-nistp256": 3,
    "ecdsa-sha2-nistp384": 3,
    "ecdsa-sha2-nistp521": 3,
    "ssh-rsa": 3,
    "sk-ssh-ed25519@openssh.com": 3,
    "sk-ecdsa-sha2-nistp256@openssh.com": 4,
}
_MAX_KEY = 4096  # characters
# The most events of one request.
MAX_EVENTS = 10_000
# Characters of texts that workers report. Longer ones are cut, since a worker stumbles over a refusal.
MAX_PAYLOAD = 64 * 1024
MAX_REPORTED = 4096
# Control characters could forge a line in a log or on a terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_CONDITION_TYPES = get_args(ConditionType)
# The fields of an old worker's report, with those that name the run of the VM.
_OLD_REPORT = ("uid", "restart_count", "status", "status_message", "image_fqn")
_SOFTNET = frozenset({"netSoftnet", "net-softnet"})
# Transports of a startup script that mean the same.
_OVER_SSH = frozenset({"", "ssh"})
# The values of `runtime` of VMs that may run macOS, also of a client that leaves it out.
_MACOS_RUNTIMES = (None, "", *(name for name, traits in RUNTIMES.items() if traits.runs_macos))
_TEXTS = frozenset(field.json for field in attrs_of(VMSpec) if not field.is_closed_set())
# Fields of newer programs, which their clients send back in whole objects. Those that ask for something are unknown here.
_NEWER = frozenset({"endpoints", "hostProcesses", "netSoftnetExpose", "observedEndpoints", "usbAccessories"})
_NEWER_READ_ONLY = "observedEndpoints"
_NEWER_CONDITIONS = frozenset({"host-processes-ready", "cloning", "suspending", "stopping"})
# Fields that all objects of other programs may have.
_META = frozenset({"createdAt", "generation", "uid", "version"})
# The values of the fields that a PUT resets when it leaves them out: of the cluster settings, and of a VM.
_SETTINGS_ZEROS: Mapping[str, Any] = {"host_dir_policies": (), "scheduler_profile": "optimize-utilization"}
_PUT_ZEROS: Mapping[str, Any] = {
    field.name: False if field.type is bool else ()
    for field in attrs_of(VMSpec)
    if field.type is bool or field.is_list()
}


def vm_from_client(raw: object, unknown: list[str]) -> tuple[str, VMSpec]:
    """Return the name and the specification of a new VM. Raises ValidationError.

    Read-only fields are ignored.
    """
    raw = _with_tart_resource(_vm_fields(raw))
    spec = decode_from_client(VMSpec, raw, unknown, also=NOT_SPEC)
    name = raw.get("name")
    if not isinstance(name, str | None):
        raise MalformedError(f"name is {shown(name)}, expected a string")
    _check_name("name", name or "")
    return name or "", _complete(spec, _softnet(raw, False))


def _vm_fields(raw: object, *, patch: bool = False) -> dict[str, Any]:
    """Return a client's VM by exact field names, without fields that ask for nothing. Raises MalformedError."""
    if not isinstance(raw, dict):
        expected = "a JSON object (a merge patch)" if patch else "a JSON object"
        raise MalformedError(f"the body is {shown(raw)}, expected {expected}")
    fields = canonical(VMSpec, raw, NOT_SPEC)
    if isinstance(fields.get("startup_script"), dict):
        fields = {**fields, "startup_script": canonical(StartupScript, fields["startup_script"])}
    return {name: value for name, value in fields.items() if name not in _NEWER or (value and name != _NEWER_READ_ONLY)}


def _with_tart_resource(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a new VM that asks for at least one of its worker's Tart VMs, if it is a macOS VM."""
    resources = raw.get("resources")
    is_macos = raw.get("os") in (None, "", "darwin") and raw.get("runtime") in _MACOS_RUNTIMES
    if not is_macos or not isinstance(resources, dict | None) or (resources or {}).get(TART_VMS, 0) != 0:
        return raw
    others = (resources or {}).keys() - {TART_VMS}
    if len(others) > MAX_ITEMS:
        raise InvalidError(f"resources has {len(others)} items, expected at most {MAX_ITEMS} besides {TART_VMS}")
    return {**raw, "resources": {**(resources or {}), TART_VMS: 1}}


def replaced_spec(old: VMSpec, raw: object, unknown: list[str]) -> VMSpec:
    """Return the specification that a PUT asks for. Raises ValidationError.

    Go clients leave zero values out. So an absent boolean is false and an absent list is empty, while absent strings,
    numbers, maps and powerState are unchanged, and so is an absent transport of the startup script. `audio` and
    `clipboard`, which they do not know, are always unchanged.
    """
    raw = _vm_fields(raw)
    base = replace(old, **_PUT_ZEROS)
    spec = decode_from_client(VMSpec, raw, unknown, base=base, also=NOT_SPEC)
    if (spec.audio, spec.clipboard) != (old.audio, old.clipboard):
        spec = replace(spec, audio=old.audio, clipboard=old.clipboard)
    spec = _with_transport(spec, old.startup_script, unnamed_is_old=True)
    return _complete(spec, _softnet(raw, old.net_softnet))


def _with_transport(spec: VMSpec, old: StartupScript | None, *, unnamed_is_old: bool) -> VMSpec:
    """Return a VM whose script has the old one's transport if it means the same, or if none is named and that may be so."""
    new = spec.startup_script
    if new is None or old is None or new.transport == old.transport:
        return spec
    if {new.transport, old.transport} <= _OVER_SSH or (unnamed_is_old and not new.transport):
        return replace(spec, startup_script=replace(new, transport=old.transport))
    return spec


def patched_spec(old: VMSpec, patch: object, unknown: list[str]) -> VMSpec:
    """Return the specification after a JSON merge patch (RFC 7396): null sets a field to its zero value.

    Raises ValidationError.
    """
    patch = _vm_fields(patch, patch=True)
    target = encode(old)
    # The deprecated twin would contradict a patch that names only one of the two.
    for name in _SOFTNET:
        del target[name]
    # An empty text of a closed set counts as absent.
    wanted = {name: value for name, value in patch.items() if name not in NOT_SPEC and (value != "" or name in _TEXTS)}
    spec = decode_from_client(VMSpec, _merge(target, wanted), unknown, also=NOT_SPEC)
    spec = _with_transport(spec, old.startup_script, unnamed_is_old=False)
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
    _check_image("image", spec.image)
    for field, text in (("username", spec.username), ("net-bridged", spec.net_bridged)):
        _check_word(field, text)
    if _CONTROL.search(spec.password):
        raise InvalidError("password has a control character, expected printable characters")
    _check_maps({"labels": spec.labels, "resources": spec.resources, "preferredLabels": spec.preferred_labels})
    if spec.metadata:
        _check_metadata(spec.metadata)
    for field, networks in (("netSoftnetAllow", spec.net_softnet_allow), ("netSoftnetBlock", spec.net_softnet_block)):
        for index, network in enumerate(networks):
            _check_network(f"{field}[{index}]", network)
    if spec.power_state == "suspended" and not spec.suspendable:
        raise InvalidError('powerState is "suspended", expected "running" or "stopped" unless suspendable is true')
    for field, script in (("startup_script", spec.startup_script), ("shutdown_script", spec.shutdown_script)):
        if script is not None:
            _check_script(field, script)
    needs_agent = spec.startup_script is not None and spec.startup_script.transport not in _OVER_SSH
    if needs_agent and not RUNTIMES[spec.runtime].has_guest_agent:
        raise InvalidError(
            f'startup_script.transport is "tart-guest-agent", expected "ssh" with the runtime {spec.runtime}'
        )
    if spec.host_dirs:
        _check_host_dirs(spec.host_dirs)


def _check_image(field: str, image: str) -> None:
    if not image:
        raise InvalidError(f'{field} is "", expected the name of a VM image')
    _check_word(field, image)


def _check_word(field: str, text: str) -> None:
    """Raise InvalidError for a text that a command line could take as an option or as two words, or a log as two lines."""
    if text.startswith("-") or _CONTROL.search(text) or " " in text or "," in text:
        raise InvalidError(
            f'{field} is {shown(text)}, expected no spaces, commas or control characters, and no "-" at the start'
        )


def _check_maps(maps: Mapping[str, Mapping[str, object]]) -> None:
    """Raise InvalidError for keys and values with control characters, which could forge a line in a log."""
    for field, pairs in maps.items():
        for key, value in pairs.items():
            if _CONTROL.search(f"{key}{value}"):
                raise InvalidError(f"{field}[{shown(key)}] is {shown(value)}, expected no control characters")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    _check_maps({"metadata": metadata})
    for key, value in metadata.items():
        if not METADATA_KEY.fullmatch(key):
            raise InvalidError(f"metadata has the key {shown(key)}, expected {METADATA_KEY.pattern}")
        if len(value) > MAX_METADATA_VALUE:
            raise InvalidError(
                f"metadata[{shown(key)}] has {len(value)} characters, expected at most {MAX_METADATA_VALUE}"
            )
    size = sum(len(key) + len(value.encode()) for key, value in metadata.items())
    if size > MAX_METADATA_BYTES:
        raise InvalidError(f"metadata has {size} bytes of keys and values, expected at most {MAX_METADATA_BYTES}")


def _check_network(where: str, text: str) -> None:
    """Raise InvalidError for a text that is not a target of softnet: a CIDR or "@host", for both directions or for one.

    Python's `ip_network` also accepts netmasks and IPv6 zones, which may hold commas. Both are refused.
    """
    direction, _, rest = text.partition(" ")
    target = rest if direction in ("in", "out") else text
    try:
        ipaddress.ip_network(target, strict=False)
        is_target = re.fullmatch(r"[0-9A-Fa-f.:]+(/[0-9]+)?", target) is not None
    except ValueError:
        is_target = target == "@host"
    if not is_target:
        raise InvalidError(
            f'{where} is {shown(text)}, expected a network such as 192.168.0.0/24, or @host; for one direction with "in "'
            ' or "out " before it'
        )


def _check_script(field: str, script: GuestScript) -> None:
    for name, value in script.env.items():
        if not ENV_NAME.fullmatch(name):
            raise InvalidError(f"{field}.env has the name {shown(name)}, expected {ENV_NAME.pattern}")
        if "\0" in value:
            raise InvalidError(f"{field}.env[{shown(name)}] has a NUL character, which no shell can pass on")
    if "\0" in script.script_content:
        raise InvalidError(f"{field}.script_content has a NUL character, which no shell can read")


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


def worker_from_client(raw: object, unknown: list[str]) -> Worker:
    """Return the worker that registers itself. Raises ValidationError."""
    worker = decode_from_client(Worker, raw, unknown, also=_META)
    _check_name("name", worker.name)
    if len(worker.machine_id) > MAX_MACHINE_ID:
        raise InvalidError(f"machine_id has {len(worker.machine_id)} characters, expected at most {MAX_MACHINE_ID}")
    _check_maps({"labels": worker.labels, "resources": worker.resources})
    _check_identity(worker)
    return replace(
        worker,
        health=bounded(worker.health) if worker.health is not None else None,
        versions=bounded_versions(worker.versions) if worker.versions is not None else None,
        images=bounded_images(worker.images) if worker.images is not None else None,
        pulling=bounded_pull(worker.pulling) if worker.pulling is not None else None,
    )


def labels_of(worker: Worker) -> Mapping[str, str]:
    """Return a worker's labels with the one that has its name. Raises InvalidError if these are too many."""
    labels = {WORKER_NAME_LABEL: worker.name, **worker.labels}
    if len(labels) > MAX_ITEMS:
        raise InvalidError(
            f"labels has {len(labels)} items, expected at most {MAX_ITEMS} together with {WORKER_NAME_LABEL}"
        )
    return labels


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


def drain_from_client(raw: object, unknown: list[str]) -> Drain:
    """Return the drain of a worker that is asked for; null asks for one without a deadline. Raises ValidationError."""
    drain = Drain() if raw is None else decode_from_client(Drain, raw, unknown)
    if drain.now and drain.deadline_seconds:
        raise InvalidError(f"now is true and deadlineSeconds is {drain.deadline_seconds}, expected one of them")
    return drain


def account_from_client(raw: object, unknown: list[str], base: ServiceAccount | None = None) -> ServiceAccount:
    """Return the service account that an administrator asks for; absent fields are those of `base`.

    Raises ValidationError.
    """
    account = decode_from_client(ServiceAccount, raw, unknown, base=base, also=_META)
    _check_name("name", account.name)
    if account.token and (base is None or account.token != base.token) and len(account.token) < _SHORTEST_TOKEN:
        raise InvalidError(f"token has {len(account.token)} characters, expected at least {_SHORTEST_TOKEN}")
    for index, key in enumerate(account.authorized_keys):
        _check_key(f"authorizedKeys[{index}]", key)
    if _CONTROL.search(account.token):
        raise InvalidError("token has a control character, expected printable characters")
    return replace(account, roles=tuple(dict.fromkeys(account.roles)))


def patched_account(raw: object, unknown: list[str], base: ServiceAccount) -> ServiceAccount:
    """Return the service account after a JSON merge patch: null clears a list. Raises ValidationError."""
    if isinstance(raw, dict):
        raw = canonical(ServiceAccount, raw)
        raw = {name: [] if value is None and name in _ACCOUNT_LISTS else value for name, value in raw.items()}
    return account_from_client(raw, unknown, base)


def _check_key(where: str, text: str) -> None:
    """Raise InvalidError for a text that is not a public key in OpenSSH's format: a type, base64, and a comment."""
    kind, _, rest = text.partition(" ")
    try:
        blob = base64.b64decode(rest.partition(" ")[0], validate=True)
    except ValueError:
        blob = b""
    # The blob is a sequence of strings, each after its length. The first one repeats the type.
    fields, at = [], 0
    while len(blob) >= at + 4:
        end = at + 4 + int.from_bytes(blob[at : at + 4])
        fields.append(blob[at + 4 : end])
        at = end
    is_key = (
        kind in _KEY_FIELDS and at == len(blob) and [kind.encode(), _KEY_FIELDS[kind]] == [*fields[:1], len(fields)]
    )
    if not is_key or len(text) > _MAX_KEY or _CONTROL.search(text):
        raise InvalidError(
            f"{where} is {shown(text)}, expected one line with a public key, as in a file that ssh-keygen writes:"
            f" {', '.join(_KEY_FIELDS)}"
        )


def replaced_settings(old: ClusterSettings, raw: object, unknown: list[str]) -> ClusterSettings:
    """Return the cluster settings that a PUT asks for. Raises MalformedError, also for broken rules.

    Existing clients leave out zero values, and fields that they do not know. So absent hostDirPolicies and an absent
    schedulerProfile have their defaults, and all other absent fields are unchanged.
    """
    base = replace(old, **_SETTINGS_ZEROS)
    settings = decode_from_client(ClusterSettings, raw, unknown, base=base, refusal=MalformedError, also=_META)
    for index, policy in enumerate(settings.host_dir_policies):
        prefix = policy.path_prefix
        if not prefix.startswith(("/", "https://")) or ".." in prefix.split("/") or _CONTROL.search(prefix):
            where = f"hostDirPolicies[{index}].pathPrefix"
            raise MalformedError(f"{where} is {shown(prefix)}, expected an absolute path or https:// URL without ..")
    default, most = settings.default_ttl_seconds, settings.max_ttl_seconds
    if default > most > 0:
        raise MalformedError(f"maxTTLSeconds is {most}, expected at least the defaultTTLSeconds of {default}, or 0")
    try:
        for index, prepull in enumerate(settings.prepull):
            _check_image(f"prepull[{index}].image", prepull.image)
            _check_maps({f"prepull[{index}].labels": prepull.labels})
    except InvalidError as error:
        raise MalformedError(str(error)) from None
    return replace(settings, webhooks=tuple(_checked_webhooks(settings.webhooks, old.webhooks)))


def _checked_webhooks(webhooks: Iterable[Webhook], old: Iterable[Webhook]) -> Iterator[Webhook]:
    """Yield webhooks with their secrets, which are those of the same URLs where none is given. Raises MalformedError."""
    secrets = {webhook.url: webhook.secret for webhook in old}
    urls: set[str] = set()
    for index, webhook in enumerate(webhooks):
        where, url = f"webhooks[{index}]", webhook.url
        if not _is_webhook_url(url):
            # The message does not show the URL, which may hold a password.
            raise MalformedError(
                f"{where}.url is not an http:// or https:// URL with a host, without user name and fragment, in at most"
                f" {_MAX_URL} printable ASCII characters"
            )
        if url in urls:
            raise MalformedError(f"{where}.url is that of another webhook, expected one webhook for each URL")
        urls.add(url)
        secret = webhook.secret or secrets.get(url, "")
        if not _SHORTEST_SECRET <= len(secret) <= _LONGEST_SECRET or _CONTROL.search(secret):
            raise MalformedError(
                f"{where}.secret has {len(secret)} characters, expected {_SHORTEST_SECRET} to {_LONGEST_SECRET} printable"
                " ones"
            )
        yield replace(webhook, secret=secret, status="", events=tuple(dict.fromkeys(webhook.events)))


def _is_webhook_url(url: str) -> bool:
    if not url.isascii() or not url.isprintable() or " " in url or len(url) > _MAX_URL:
        return False
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    is_plain = parts.username is None and parts.password is None and not parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and is_plain


def events_from_client(raw: object, unknown: list[str]) -> list[Event]:
    """Return an array of events, in order; null is an empty one. Long payloads are cut. Raises ValidationError."""
    events = [] if raw is None else decode_array_from_client(Event, raw, unknown, MAX_EVENTS)
    for index, event in enumerate(events):
        if not event.kind or len(event.kind) > MAX_NAME or _CONTROL.search(event.kind):
            raise InvalidError(f'[{index}].kind is {shown(event.kind)}, expected a kind of event such as "log_line"')
        if event.kind == LIFECYCLE:
            raise InvalidError(
                f'[{index}].kind is "{LIFECYCLE}", expected another: only the controller writes these events'
            )
        if len(event.payload) > MAX_PAYLOAD:
            events[index] = replace(event, payload=shortened(event.payload, MAX_PAYLOAD))
    return events


def ttl_from_client(raw: object, unknown: list[str]) -> int:
    """Return the requested lifetime of an access token in seconds; null asks for the default. Raises ValidationError."""
    ttl = None if raw is None else decode_from_client(IssueVMAccessTokenRequest, raw, unknown).ttl_seconds
    if ttl is None:
        return DEFAULT_TTL
    if not 1 <= ttl <= MAX_TTL:
        raise InvalidError(f"ttlSeconds is {ttl}, expected 1 to {MAX_TTL}")
    return ttl


def report_from_worker(raw: object, unknown: list[str]) -> VMReport:
    """Return a worker's report. Workers send the whole VM, of which only these fields count. Raises ValidationError.

    A condition of a type that is unknown here is named in `unknown`, like an unknown field.
    """
    if isinstance(raw, dict):
        raw = canonical(VMReport, _vm_fields(raw))
        if isinstance(raw.get("conditions"), list):
            raw = {**raw, "conditions": list(_known_conditions(raw["conditions"], unknown))}
    return _bounded(decode_from_client(VMReport, raw, unknown, also=NOT_SPEC | SPEC_NAMES))


def _known_conditions(conditions: list[object], unknown: list[str]) -> Iterator[object]:
    for index, item in enumerate(conditions[:MAX_ITEMS]):
        kind = canonical(Condition, item).get("type") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind in _CONDITION_TYPES:
            yield item
        elif kind not in _NEWER_CONDITIONS:
            add_unknown(unknown, f"conditions[{index}].type", ())


def _bounded(seen: VMReport) -> VMReport:
    """Return a report whose texts are not longer than they may be."""
    values = {field.name: getattr(seen, field.name) for field in attrs_of(VMReport)}
    texts: dict[str, Any] = {
        name: shortened(value, MAX_REPORTED) for name, value in values.items() if isinstance(value, str)
    }
    return replace(seen, **texts)


def report_from_old_worker(raw: object, unknown: list[str]) -> VMReport:
    """Return the report of a worker older than 0.44, which sends the whole VM. Raises ValidationError.

    Such a worker knows no conditions and no powerState: a VM that it reports as running does run.
    """
    if isinstance(raw, dict):
        raw = canonical(VMReport, raw)
        raw = {name: raw[name] for name in _OLD_REPORT if name in raw}
    seen = _bounded(decode_from_client(VMReport, raw, unknown))
    return replace(seen, conditions=(Condition("running", "true"),)) if seen.status == "running" else seen
