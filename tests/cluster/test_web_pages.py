"""Requests that a web page can make its visitor's browser send, over real sockets, to every route.

The page is on another origin, on a sibling port, in a sandbox, or has rebound its name to the controller's address.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import trio
from harness.clients import connect_http
from harness.processes import call_main

from orchard import controller
from orchard.operations import OPERATIONS
from orchard.testing import Cluster, cluster

VM = json.dumps({"name": "vm", "image": "any", "startup_script": {"script_content": "touch pwned"}})
# What a page can add to a request without asking: no other Content-Type and no other header.
FOREIGN = {
    "another site": {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
    "sandboxed page": {"Origin": "null"},
    "sibling port": {"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-site"},
    "an image, without Origin": {"Sec-Fetch-Site": "cross-site"},
}
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def ask(
    c: Cluster, method: str, path: str, headers: dict[str, str], body: str | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Send a request with the credentials of the cluster; return status, parsed body and headers."""

    def send() -> tuple[int, Any, dict[str, str]]:
        credentials = base64.b64encode(f"{c.account}:{c.token}".encode()).decode()
        authorization = {"Authorization": f"Basic {credentials}"} if c.account else {}
        connection = connect_http(c.url)
        try:
            connection.request(method, f"/v1{path}", body, {**authorization, **headers})
            answer = connection.getresponse()
            text = b"" if answer.status == 101 else answer.read()
            is_json = answer.getheader("Content-Type") == "application/json"
            return answer.status, json.loads(text) if text and is_json else None, dict(answer.getheaders())
        finally:
            connection.close()

    return await trio.to_thread.run_sync(send)


async def vm_names(c: Cluster) -> list[str]:
    return [vm.name for vm in await c.client.vms.list()]


@pytest.mark.parametrize("auth", [False, True], ids=["no credentials", "with credentials"])
async def test_pages_of_other_origins_do_nothing(auth: bool) -> None:
    async with cluster(workers=0, auth=auth) as c:
        assert (await ask(c, "POST", "/workers", {}, '{"name": "worker-1"}'))[0] == 200
        for headers in FOREIGN.values():
            for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
                status, _, _ = await ask(c, "POST", "/vms", {**headers, "Content-Type": content_type}, VM)
                assert status == 403
            status, _, _ = await ask(c, "GET", "/rpc/watch?workerName=worker-1", {**headers, **UPGRADE})
            assert status == 403
        # A form of the controller's own origin does not exist either.
        own = {"Origin": c.url, "Sec-Fetch-Site": "same-origin"}
        assert (await ask(c, "POST", "/vms", {**own, "Content-Type": "text/plain"}, VM))[0] == 403
        assert await vm_names(c) == []
        # A preflight of any other request is refused, too.
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}
        status, _, answered = await ask(c, "OPTIONS", "/vms/vm", preflight)
        assert status == 403
        assert not any(name.lower().startswith("access-control-") for name in answered)
        # The controller's own page, and a WebSocket library that sends the origin of its target.
        assert (await ask(c, "POST", "/vms", {**own, "Content-Type": "application/json"}, VM))[0] == 200
        assert (await ask(c, "GET", "/rpc/watch?workerName=worker-1", {"Origin": c.url, **UPGRADE}))[0] == 101


async def test_rebound_names_reach_nothing_where_nobody_authenticates() -> None:
    async with cluster(workers=0) as c:
        for name in ("evil.example:6120", "evil.example"):
            assert (await ask(c, "GET", "/vms", {"Host": name}))[0] == 403
            rebound = {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}
            status, _, _ = await ask(c, "POST", "/vms", {**rebound, "Content-Type": "application/json"}, VM)
            assert status == 403
            assert (await ask(c, "GET", "/rpc/watch?workerName=w", {**rebound, **UPGRADE}))[0] == 403
        assert await vm_names(c) == []
        for name in ("localhost", "127.0.0.1:1", "[::1]:6120"):
            assert (await ask(c, "GET", "/vms", {"Host": name}))[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("auth", [False, True], ids=["no credentials", "with credentials"])
async def test_every_route_refuses_pages_of_other_origins(auth: bool) -> None:
    async with cluster(workers=0, auth=auth) as c:
        for operation in OPERATIONS:
            # The revision is gone, so the watch of everything does not last.
            path = operation.path.replace("{name}", "nothing") + ("?since=0" if operation.path == "/watch" else "")
            for headers in FOREIGN.values():
                status, _, _ = await ask(c, operation.method, path, headers)
                assert status == 403, (operation.method, path)
            status, _, _ = await ask(c, operation.method, path, {})
            assert status != 403, (operation.method, path)


async def test_browser_is_not_asked_for_credentials() -> None:
    async with cluster(workers=0, auth=True) as c:
        stranger = Cluster(c.url, c.client)
        _, _, headers = await ask(stranger, "GET", "/vms", {})
        assert "WWW-Authenticate" in headers
        status, _, headers = await ask(stranger, "GET", "/vms", {"Sec-Fetch-Site": "same-origin"})
        assert status == 401
        assert "WWW-Authenticate" not in headers


@pytest.mark.parametrize("option", ["--allow-origin", "--allow-host"])
def test_invalid_options_are_refused(option: str, tmp_path: Any) -> None:
    status, _, stderr = call_main(controller.main, option, "a/b", home=tmp_path)
    assert status == 2
    assert '"a/b"' in stderr
