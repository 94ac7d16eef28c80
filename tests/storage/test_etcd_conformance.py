"""The etcd in memory of the tests against a real one: the same requests, and the same answers.

Fields that name the cluster and its size, and numbers of leases, are not compared.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.cutting_proxy import cutting_proxy
from harness.memory_etcd import MemoryEtcd
from harness.processes import GENEROUS, eventually
from harness.programs import need

from orchard.etcd_nodes import EtcdOptions, etcd_nodes

pytestmark = pytest.mark.slow

Request = tuple[str, dict[str, Any]]
# Not the same in two clusters.
_OWN = frozenset({"cluster_id", "member_id", "raft_term", "error"})


def b(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def put(key: str, value: str = "v", **more: Any) -> dict[str, Any]:
    return {"key": b(key), "value": b(value), **more}


def compare(key: str, target: str, number: int, result: str = "EQUAL") -> dict[str, Any]:
    field = {"MOD": "mod_revision", "CREATE": "create_revision", "VERSION": "version"}[target]
    return {"key": b(key), "target": target, "result": result, field: str(number)}


def puts(count: int) -> list[dict[str, Any]]:
    return [{"request_put": put(f"k{number}")} for number in range(count)]


PREFIX = {"key": b("a/"), "range_end": b("a0")}
THREE: list[Request] = [("/v3/kv/put", put(f"a/{letter}", letter)) for letter in "xyz"]
SCRIPTS: dict[str, list[Request]] = {
    "put, range and delete": [
        *THREE,
        ("/v3/kv/put", put("a/x", "again", prev_kv=True)),
        ("/v3/kv/range", {"key": b("a/x")}),
        ("/v3/kv/range", {"key": b("nothing")}),
        ("/v3/kv/range", PREFIX),
        ("/v3/kv/range", {**PREFIX, "limit": "2"}),
        ("/v3/kv/range", {**PREFIX, "keys_only": True}),
        ("/v3/kv/range", {**PREFIX, "count_only": True}),
        ("/v3/kv/range", {**PREFIX, "revision": "3"}),
        ("/v3/kv/range", {**PREFIX, "revision": "999"}),
        ("/v3/kv/range", {**PREFIX, "min_mod_revision": "4"}),
        ("/v3/kv/range", {**PREFIX, "min_mod_revision": "4", "limit": "1"}),
        ("/v3/kv/range", {**PREFIX, "min_mod_revision": "999"}),
        ("/v3/kv/range", {"key": b("a/"), "range_end": b(b"\0")}),
        ("/v3/kv/deleterange", {"key": b("nothing")}),
        ("/v3/kv/deleterange", {"key": b("a/x"), "prev_kv": True}),
        ("/v3/kv/put", put("a/x", "")),
        ("/v3/kv/range", PREFIX),
        ("/v3/kv/deleterange", PREFIX),
        ("/v3/kv/range", PREFIX),
    ],
    "transactions": [
        ("/v3/kv/txn", {"compare": [compare("h", "CREATE", 0)], "success": [{"request_put": put("h", "1")}]}),
        ("/v3/kv/txn", {"compare": [compare("h", "CREATE", 0)], "success": [{"request_put": put("h", "2")}]}),
        (
            "/v3/kv/txn",
            {
                "compare": [compare("h", "MOD", 2)],
                "success": [
                    {"request_put": put("h", "3")},
                    {"request_delete_range": {"key": b("nothing")}},
                    {"request_range": {"key": b("h")}},
                ],
                "failure": [{"request_range": {"key": b("h")}}],
            },
        ),
        (
            "/v3/kv/txn",
            {"compare": [compare("h", "MOD", 2)], "failure": [{"request_range": {"key": b("h")}}]},
        ),
        ("/v3/kv/txn", {"compare": [compare("h", "VERSION", 1, "GREATER")], "success": puts(2)}),
        ("/v3/kv/txn", {"compare": [compare("none", "MOD", 1, "LESS"), compare("h", "MOD", 9, "NOT_EQUAL")]}),
        (
            "/v3/kv/txn",
            {"compare": [{"key": b("h"), "target": "VALUE", "result": "EQUAL", "value": b("3")}], "success": puts(1)},
        ),
        ("/v3/kv/txn", {"compare": [{"key": b("none"), "target": "VALUE", "value": b("")}], "success": puts(1)}),
        ("/v3/kv/txn", {"success": [{"request_delete_range": {"key": b("k"), "range_end": b("l")}}]}),
    ],
    "bounds": [
        ("/v3/kv/txn", {"success": puts(128)}),
        ("/v3/kv/txn", {"success": puts(129)}),
        ("/v3/kv/txn", {"success": [{"request_put": put("k")}, {"request_put": put("k")}]}),
        ("/v3/kv/put", put("k", "x" * 1_600_000)),
        ("/v3/kv/put", put("k", "x" * 2_200_000)),
        ("/v3/kv/range", {"key": b("k")}),
    ],
    "compaction": [
        *THREE,
        ("/v3/kv/deleterange", {"key": b("a/x")}),
        ("/v3/kv/compaction", {"revision": "4"}),
        ("/v3/kv/range", {**PREFIX, "revision": "4"}),
        ("/v3/kv/range", {**PREFIX, "revision": "3"}),
        ("/v3/kv/range", PREFIX),
        ("/v3/kv/compaction", {"revision": "4"}),
        ("/v3/kv/compaction", {"revision": "999"}),
        ("/v3/kv/compaction", {"revision": "5"}),
        ("/v3/kv/range", PREFIX),
    ],
    "leases": [
        ("/v3/lease/grant", {"TTL": "60", "ID": "7"}),
        ("/v3/lease/grant", {"TTL": "5", "ID": "8"}),
        ("/v3/lease/grant", {"TTL": "60", "ID": "7"}),
        ("/v3/lease/keepalive", {"ID": "7"}),
        ("/v3/lease/keepalive", {"ID": "99"}),
        ("/v3/kv/put", put("a/x", "v", lease="7")),
        ("/v3/kv/put", put("a/y", "v", lease="99")),
        ("/v3/kv/range", PREFIX),
        ("/v3/lease/revoke", {"ID": "7"}),
        ("/v3/lease/revoke", {"ID": "7"}),
        ("/v3/lease/keepalive", {"ID": "7"}),
        ("/v3/kv/range", PREFIX),
    ],
    "other paths": [("/v3/nothing", {}), ("/v3/auth/authenticate", {"name": "u", "password": "p"})],
}


@asynccontextmanager
async def memory_etcd(etcd: MemoryEtcd) -> AsyncIterator[str]:
    """Serve an etcd in memory on a loopback port, and yield its URL."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(etcd.serve, [listener])
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def both(directory: Path) -> AsyncIterator[tuple[str, str]]:
    need("etcd")
    async with etcd_nodes(directory) as real, memory_etcd(MemoryEtcd()) as memory:
        yield memory, real.url


def compared(value: Any) -> Any:
    """Return an answer without what is not the same in two clusters."""
    if isinstance(value, dict):
        return {name: compared(item) for name, item in value.items() if name not in _OWN}
    if isinstance(value, str):
        # A message names the size of the request.
        return re.sub(r"\d+ vs", "0 vs", value)
    return [compared(item) for item in value] if isinstance(value, list) else value


async def ask(url: str, path: str, body: object, token: str = "") -> tuple[int, Any]:
    """Return the status of an answer, and what it has in common with those of other clusters."""

    def run() -> tuple[int, Any]:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=GENEROUS)
        connection.request("POST", path, json.dumps(body), {"Authorization": token} if token else {})
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        return answer.status, json.loads(raw) if raw.startswith(b"{") else {}

    return await trio.to_thread.run_sync(run)


@pytest.mark.parametrize("name", SCRIPTS)
async def test_requests_are_answered_as_by_a_real_etcd(name: str, tmp_path: Path) -> None:
    async with both(tmp_path) as (memory, real):
        for path, body in SCRIPTS[name]:
            expected = await ask(real, path, body)
            assert (path, *map(compared, await ask(memory, path, body))) == (path, *map(compared, expected))


async def watched(url: str, start_revision: int, lines: int) -> list[Any]:
    """Return the first lines of a watch of a/."""
    request = {"create_request": {**PREFIX, "start_revision": str(start_revision)}}
    async with await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2])) as stream:
        raw = json.dumps(request).encode()
        await stream.send_all(b"POST /v3/watch HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
        data = b""
        while (data.partition(b"\r\n\r\n")[2].count(b"\n")) < lines:
            piece = await stream.receive_some()
            assert piece, data
            data += piece
    return [json.loads(line) for line in data.partition(b"\r\n\r\n")[2].split(b"\n")[:lines]]


async def test_watch_has_the_lines_of_a_real_etcd(tmp_path: Path) -> None:
    """The events of one transaction are in one line, and a watch of what was compacted ends."""
    both_puts = [{"request_put": put("a/p")}, {"request_delete_range": {"key": b("a/x")}}, {"request_put": put("b")}]
    script = [*THREE, ("/v3/kv/txn", {"success": both_puts}), ("/v3/kv/put", put("a/q"))]
    async with both(tmp_path) as (memory, real):
        found = {}
        for url in (memory, real):
            for path, body in script:
                await ask(url, path, body)
            found[url] = [compared(line) for line in await watched(url, 5, 2)]
            await ask(url, "/v3/kv/compaction", {"revision": "5"})
            found[url] += [compared(line) for line in await watched(url, 2, 2)]
        # A real one puts the events that it catches up with in one line or in several.
        assert found[memory] == found[real]


async def test_key_of_a_lease_that_ends_is_deleted(tmp_path: Path) -> None:
    async with both(tmp_path) as (memory, real):
        found = {}
        for url in (memory, real):
            await ask(url, "/v3/lease/grant", {"TTL": "2", "ID": "7"})
            await ask(url, "/v3/kv/put", put("a/x", lease="7"))
            found[url] = [compared(line) for line in await watched(url, 2, 2)]
        assert found[memory] == found[real]
        deletion = (await watched(real, 3, 2))[1]["result"]["events"]
        assert [each["type"] for each in deletion] == ["DELETE"]
        assert compared((await watched(memory, 3, 2))[1]["result"]["events"]) == compared(deletion)


async def test_users_are_asked_for_credentials(tmp_path: Path) -> None:
    etcd = MemoryEtcd()
    need("etcd")
    async with etcd_nodes(tmp_path) as real, memory_etcd(etcd) as memory:
        for name, password in (("root", "r"), ("orchard", "secret")):
            await ask(real.url, "/v3/auth/user/add", {"name": name, "password": password})
        await ask(real.url, "/v3/auth/role/add", {"name": "root"})
        await ask(real.url, "/v3/auth/user/grant", {"user": "root", "role": "root"})
        await ask(real.url, "/v3/auth/role/add", {"name": "orchard"})
        everything = {"permType": "READWRITE", "key": b("a/"), "range_end": b("a0")}
        await ask(real.url, "/v3/auth/role/grant", {"name": "orchard", "perm": everything})
        await ask(real.url, "/v3/auth/user/grant", {"user": "orchard", "role": "orchard"})
        assert (await ask(real.url, "/v3/auth/enable", {}))[0] == 200
        etcd.users.passwords = {"root": "r", "orchard": "secret"}
        for path, body in (
            ("/v3/auth/authenticate", {"name": "orchard", "password": "wrong"}),
            ("/v3/kv/range", PREFIX),
            ("/v3/kv/put", put("a/x")),
        ):
            assert compared(await ask(memory, path, body)) == compared(await ask(real.url, path, body))
            wrong = [await ask(url, path, body, "wrong") for url in (memory, real.url)]
            assert compared(wrong[0]) == compared(wrong[1])
        for url in (memory, real.url):
            _, answer = await ask(url, "/v3/auth/authenticate", {"name": "orchard", "password": "secret"})
            assert (await ask(url, "/v3/kv/put", put("a/x"), answer["token"]))[0] == 200


async def test_full_etcd_refuses_additions_and_leases_and_takes_deletions(tmp_path: Path) -> None:
    etcd = MemoryEtcd()
    need("etcd")
    async with etcd_nodes(tmp_path, options=EtcdOptions(quota_bytes=2_000_000)) as real, memory_etcd(etcd) as memory:
        while (await ask(real.url, "/v3/kv/put", put("a/large", "x" * 300_000)))[0] == 200:
            await ask(memory, "/v3/kv/put", put("a/large", "x" * 300_000))
        etcd.is_full = True
        for path, body in (
            ("/v3/kv/put", put("a/x")),
            ("/v3/kv/txn", {"success": [{"request_put": put("a/x")}]}),
            ("/v3/lease/grant", {"TTL": "60"}),
            ("/v3/kv/deleterange", {"key": b("a/large")}),
        ):
            expected = await ask(real.url, path, body)
            assert (path, *map(compared, await ask(memory, path, body))) == (path, *map(compared, expected))
        errors = [(await ask(url, "/v3/maintenance/status", {}))[1]["errors"] for url in (memory, real.url)]
        assert all("NOSPACE" in told[0] for told in errors)


@pytest.mark.slow(7)
async def test_etcd_without_a_leader_does_not_answer(tmp_path: Path) -> None:
    """A status without the field leader is what one of three nodes says; requests wait there, or get 503."""
    etcd = MemoryEtcd()
    etcd.has_no_leader = True
    need("etcd")
    async with etcd_nodes(tmp_path, 3) as real, memory_etcd(etcd) as memory:
        for node in real.nodes[1:]:
            node.kill()
        left = real.nodes[0].url
        await eventually(lambda: has_no_leader(left))
        assert await has_no_leader(memory)
        assert (await ask(memory, "/v3/kv/range", PREFIX))[0] == 503
        assert (await ask(left, "/v3/kv/range", PREFIX))[0] == 503


@pytest.mark.needs("etcd")
async def test_proxy_cuts_off_the_answer_to_a_transaction_that_was_carried_out(tmp_path: Path) -> None:
    async with etcd_nodes(tmp_path) as real, cutting_proxy(real.url) as proxy:
        proxy.cuts = 1
        with pytest.raises(ConnectionError):
            await ask(proxy.url, "/v3/kv/txn", {"success": puts(1)})
        assert (await ask(proxy.url, "/v3/kv/range", {"key": b("k0")}))[1]["count"] == "1"
        assert proxy.done == 1


async def has_no_leader(url: str) -> bool:
    return "leader" not in (await ask(url, "/v3/maintenance/status", {}))[1]
