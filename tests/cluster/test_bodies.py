"""How large a body each operation takes, generated from the route table, over real sockets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
import trio

from orchard.handlers.admission import APIOperation
from orchard.operations import OPERATIONS
from orchard.testing import Cluster, cluster

SMALL, LARGE, IGNORED = 256 * 1024, 4 * 1024 * 1024, 4 * 1024
# Everything about one VM, whose scripts may be long, and its events. Other operations with a body take SMALL.
TAKE_LARGE = {
    ("POST", "/vms"),
    ("PUT", "/vms/{name}"),
    ("PATCH", "/vms/{name}"),
    ("PUT", "/vms/{name}/state"),
    ("POST", "/vms/{name}/events"),
}


async def status_of(c: Cluster, operation: APIOperation, framing: str, body: bytes = b"") -> int:
    """Send one request over a connection of its own, and return the status of its answer."""
    parts = urlsplit(c.url)
    assert parts.hostname is not None
    assert parts.port is not None
    path = operation.path.replace("{name}", "absent")
    head = f"{operation.method} /v1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{framing}\r\n\r\n"
    async with await trio.open_tcp_stream(parts.hostname, parts.port) as stream:
        await stream.send_all(head.encode() + body)
        answer = b""
        while b"\r\n" not in answer:
            answer += await stream.receive_some()
    found = re.match(rb"HTTP/1.1 ([0-9]{3}) ", answer)
    assert found is not None, answer
    return int(found[1])


def limit_of(operation: APIOperation) -> int:
    if (operation.method, operation.path) in TAKE_LARGE:
        return LARGE
    return SMALL if operation.body is not None else IGNORED


async def test_each_operation_refuses_larger_bodies_than_it_needs() -> None:
    async with cluster(workers=0) as c:
        for operation in OPERATIONS:
            limit = limit_of(operation)
            assert await status_of(c, operation, f"Content-Length: {limit + 1}") == 413, operation
            # The server asks for what it takes before it reads it, and decides about the rest later.
            asked = await status_of(c, operation, f"Expect: 100-continue\r\nContent-Length: {limit}")
            assert asked == 100, operation


@pytest.mark.parametrize("body", [b"", b"{}", b"null"])
async def test_small_body_changes_nothing_for_operations_that_take_none(body: bytes) -> None:
    async with cluster(workers=0) as c:
        for operation in OPERATIONS:
            if operation.body is None:
                without = await status_of(c, operation, "Accept: */*")
                assert await status_of(c, operation, f"Content-Length: {len(body)}", body) == without, operation
                chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
                assert await status_of(c, operation, "Transfer-Encoding: chunked", chunks) == without, operation


async def test_public_operation_does_not_read_a_large_body() -> None:
    async with cluster(workers=0, auth=True) as c:
        for operation in OPERATIONS:
            refused = 413 if operation.role == "public" else 401
            assert await status_of(c, operation, f"Content-Length: {LARGE}") == refused, operation
            chunked = await status_of(c, operation, "Transfer-Encoding: chunked", b"%x\r\n" % LARGE + b"a" * 65536)
            assert chunked == refused, operation


async def test_client_that_sends_a_whole_large_body_reads_its_refusal() -> None:
    async with cluster(workers=0, auth=True) as c:
        for operation in OPERATIONS:
            if operation.method == "POST":
                body = bytes(LARGE + LARGE // 2)
                status = await status_of(c, operation, f"Content-Length: {len(body)}", body)
                assert status == (413 if operation.role == "public" else 401), operation
