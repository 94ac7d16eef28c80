"""Each field of a VM's specification and each cluster setting as clients send it, with another value than its default."""

from __future__ import annotations

from typing import Any

EVERY_FIELD: dict[str, Any] = {
    "image": "ghcr.io/cirruslabs/macos-tahoe-base:latest",
    "imagePullPolicy": "Always",
    "cpu": 8,
    "memory": 16384,
    "diskSize": 100,
    "os": "linux",
    "arch": "amd64",
    "runtime": "vetu",
    "netSoftnet": True,
    "netSoftnetAllow": ["192.168.0.0/24", "10.0.0.1", "fd00::/8", "@host", "in 10.0.0.0/8", "out @host"],
    "netSoftnetBlock": ["0.0.0.0/0"],
    "net-bridged": "en0",
    "headless": True,
    "nested": True,
    "suspendable": True,
    "username": "ci",
    "password": "p@ss, word -- $x",
    "startup_script": {"script_content": "echo $A\n", "env": {"A": "b; rm -rf /", "_x1": "\n"}, "transport": "ssh"},
    "restart_policy": "OnFailure",
    "resources": {"org.cirruslabs.logical-cores": 4},
    "labels": {"model": "macstudio"},
    "hostDirs": [{"name": "src", "path": "/Users/ci/src", "ro": True}, {"name": "out", "path": "/tmp/ä b"}],
    "randomSerial": True,
    "audio": True,
    "clipboard": True,
    "powerState": "suspended",
    "startupTimeoutSeconds": 600,
    "startupOnFailure": "keep",
    "shutdown_script": {"script_content": "sync\n", "env": {"A": "b"}},
    "shutdownTimeoutSeconds": 60,
    "ttlSeconds": 3600,
    "pendingTimeoutSeconds": 60,
    "metadata": {"pipeline": "1234"},
    "priority": 10,
    "preferredLabels": {"model": "macstudio"},
}

EVERY_SETTING: dict[str, Any] = {
    "hostDirPolicies": [{"pathPrefix": "/a", "ro": True}],
    "schedulerProfile": "distribute-load",
    "defaultTTLSeconds": 3600,
    "maxTTLSeconds": 7200,
    "minFreeDiskGB": 20,
    "workerPruneSeconds": 86_400,
    "prepull": [{"image": "base", "labels": {"model": "mini"}}, {"image": "ghcr.io/a/b:c"}],
    "webhooks": [{"url": "https://a.example/", "events": ["vm.failed"], "secret": "sixteen letters."}],
}
