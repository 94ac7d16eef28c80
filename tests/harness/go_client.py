"""What a Go client sends back of what it has read: its own fields, without zero values."""

from __future__ import annotations

from typing import Any

# The fields that existing Go clients know. Their structures drop all others.
GO_FIELDS = frozenset(
    {
        *("name", "image", "imagePullPolicy", "cpu", "memory", "diskSize", "os", "arch", "runtime", "net-softnet"),
        *("netSoftnet", "netSoftnetAllow", "netSoftnetBlock", "net-bridged", "headless", "nested", "suspendable"),
        *("username", "password", "startup_script", "restart_policy", "resources", "labels", "hostDirs"),
        *("randomSerial", "powerState", "status", "status_message", "worker", "generation", "observedGeneration"),
        *("uid", "createdAt", "version", "conditions", "restart_count", "tartName", "image_fqn", "scheduled_at"),
    }
)
_GO_SCRIPT_FIELDS = frozenset({"script_content", "env"})
GO_SETTINGS = frozenset({"hostDirPolicies", "schedulerProfile"})


def without_zeros(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object as a Go client sends it: without fields of a zero value."""
    return {key: inner for key, inner in value.items() if inner not in (False, 0, "", [], {}, None)}


def go_vm(body: dict[str, Any]) -> dict[str, Any]:
    """Return a VM as a Go client sends it back, which has read it into its own structures."""
    known = {name: value for name, value in body.items() if name in GO_FIELDS}
    if script := known.get("startup_script"):
        known["startup_script"] = {name: value for name, value in script.items() if name in _GO_SCRIPT_FIELDS}
    return without_zeros(known)
