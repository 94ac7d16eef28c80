"""Secrets of webhooks are neither shown nor logged: keys of signatures, and what URLs hold beside the host.

A controller and the command run as processes. Settings are refused in each way, and deliveries fail in each way.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import receiver as hostile
from harness.clients import ADMIN_ENV
from harness.processes import controller, eventually, finished, free_port
from harness.receiver import Receiver

from orchard.client import Client, ResponseError

KEY, QUERY, PATH, PASSWORD = "key-of-the-signature", "token-in-the-query", "token-in-the-path", "password-in-the-url"
HIDDEN = f"/{PATH}?key={QUERY}"
URL = f"https://a.example{HIDDEN}"
Finished = subprocess.CompletedProcess[str]
# What an administrator may type wrong. Each of them is refused.
REFUSED: list[object] = [
    {"url": f"https://user:{PASSWORD}@a.example{HIDDEN}", "secret": KEY},
    {"url": f"{URL}#part", "secret": KEY},
    {"url": f"ftp://a.example{HIDDEN}", "secret": KEY},
    {"url": [URL], "secret": KEY},
    {"url": URL, "secret": [KEY]},
    {"url": URL, "secret": {"value": KEY}},
    {"url": URL, "secret": f"{KEY}\n"},
    {"url": URL, "secret": 20 * KEY},
    {"url": URL, "secrets": KEY},
    {"url": URL, "secret": KEY, "events": ["unknown"]},
    {"secret": KEY, "events": []},
    KEY,
    [KEY],
]
# What receivers answer that take nothing, among them some that repeat the request.
ANSWERS: list[Any] = [
    hostile.close_at_once,
    f"HTTP/1.1 302 Found\r\nLocation: {HIDDEN}\r\nContent-Length: 0\r\n\r\n".encode(),
    f"HTTP/1.1 500 No {QUERY}\r\nContent-Length: {len(HIDDEN)}\r\n\r\n{HIDDEN}".encode(),
    f"POST {HIDDEN} HTTP/1.1\r\n\r\n".encode(),
    f"HTTP/1.1 200 OK\r\n{HIDDEN}\0: x\r\n\r\n".encode(),
    f"HTTP/1.1 200 OK\r\nContent-Length: {QUERY}\r\n\r\n".encode(),
]
# What those may read who may not read the settings.
PATHS = ["/controller/info", "/metrics", "/vms", "/vms/vm/events", "/history", "/capacity", "/health"]
VERBS = [
    "status",
    "list vms -o json",
    "describe vm vm",
    "events vm vm",
    "history",
    "sessions",
    "capacity",
    "doctor -o json",
]
# On the controller's host, when it has ended.
HOST_VERBS = ["check data", "store copy data other"]


async def be_refused(client: Client, orchard: Callable[..., Finished], shown: dict[str, str], home: Path) -> None:
    """Try to set each invalid webhook by a request and by the command."""
    file = home / "webhooks.json"
    for wrong in REFUSED:
        with pytest.raises(ResponseError) as refused:
            await client.request("PUT", "/cluster-settings", json={"webhooks": [wrong]})
        shown[f"refusal of {wrong}"] = str(refused.value)
        for text in (json.dumps([wrong]), json.dumps(wrong), json.dumps([wrong])[:-1]):
            file.write_text(text)
            done = orchard("set", "cluster-settings", "--webhooks", str(file))
            assert done.returncode == 1
            shown[f"command with {text}"] = done.stdout + done.stderr


async def fail_to_deliver(client: Client) -> list[str]:
    """Let each receiver fail, and return what the settings say of that."""
    async with trio.open_nursery() as nursery:
        ports = [await Receiver(answer).listen(nursery) for answer in ANSWERS]
        # No server listens on it.
        ports.append(free_port())
        origins = [f"http://127.0.0.1:{port}" for port in ports]
        wanted = [{"url": f"{origin}{HIDDEN}", "events": ["vm.failed"], "secret": KEY} for origin in origins]
        await client.request("PUT", "/cluster-settings", json={"webhooks": wanted})
        await client.vms.create(name="vm", image="any", labels={"no": "worker"}, pending_timeout_seconds=1)
        found: list[str] = []

        async def have_all_failed() -> bool:
            found[:] = [one.status for one in (await client.cluster_settings.get()).webhooks]
            return all(found)

        await eventually(have_all_failed)
        nursery.cancel_scope.cancel()
    assert all(status.startswith("failing: ") for status in found)
    return found


@pytest.mark.slow
async def test_secrets_of_webhooks_are_neither_shown_nor_logged(tmp_path: Path) -> None:
    shown: dict[str, str] = {}
    account, token = "bootstrap-admin", ADMIN_ENV["ORCHARD_BOOTSTRAP_ADMIN_TOKEN"]
    arguments = ("--insecure-no-tls", "--allow-local-webhooks", "--debug", "--data-dir", str(tmp_path / "data"))
    with controller(*arguments, home=tmp_path, env=ADMIN_ENV) as (role, url):
        env = {"ORCHARD_URL": url, "ORCHARD_SERVICE_ACCOUNT_NAME": account, "ORCHARD_SERVICE_ACCOUNT_TOKEN": token}
        orchard = partial(finished, "", home=tmp_path, env=env)
        async with Client(url, account=account, token=token) as client:
            await be_refused(client, orchard, shown, tmp_path)
            shown["status"] = "\n".join(await fail_to_deliver(client))
            for path in PATHS:
                shown[path] = (await client.request("GET", path)).body.decode()
        for verb in VERBS:
            done = orchard(*verb.split())
            shown[verb] = done.stdout + done.stderr
            assert shown[verb]
        # Its administrator reads the URLs there.
        settings = orchard("get", "cluster-settings", "-o", "json").stdout
        assert (QUERY in settings, KEY in settings) == (True, False)
        role.stop()
    for verb in HOST_VERBS:
        done = orchard(*(str(tmp_path / word) if word in ("data", "other") else word for word in verb.split()))
        assert done.returncode == 0, done.stderr
        shown[verb] = done.stdout + done.stderr
    shown["log"] = role.log.read_text()
    assert shown["log"].count("level=warning logger=orchard.webhooks ") == len(ANSWERS) + 1
    assert {
        where: text for where, text in shown.items() if any(one in text for one in (KEY, QUERY, PATH, PASSWORD))
    } == {}
