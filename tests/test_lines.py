"""Endless answers in lines, which the client goes on with after each end: what it asks for, and when it gives up."""

from __future__ import annotations

import json

import pytest
from harness.scripted import answer, scripted

from orchard.client import ClientError, ConnectError, ResponseError
from orchard.methods import lines

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
GONE = answer("404 Not Found", b'{"message": "there is none"}')


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_FIRST_PAUSE", 0.0)


def chunk(*numbers: int) -> bytes:
    """Return a chunk with a line for each event; the cursor of event N is cN."""
    events = [{"kind": "log_line", "payload": str(n), "timestamp": n, "cursor": f"c{n}"} for n in numbers]
    data = b"\n" + b"".join(json.dumps(event).encode() + b"\n" for event in events)
    return b"%x\r\n%b\r\n" % (len(data), data)


def queries(requests: list[bytes]) -> list[str]:
    return [request.split()[1].decode().partition("?")[2] for request in requests]


async def test_followed_log_goes_on_after_its_last_event_until_the_vm_is_gone() -> None:
    cut_off, ended, torn = HEAD + chunk(1, 2), HEAD + chunk(3) + END, HEAD + chunk(4) + b"50\r\nhalf a line"
    async with (
        scripted([cut_off], [ended], [torn], [], [HEAD + END], [GONE]) as (client, script),
        client.vms.follow("vm", kinds=["log_line", "lifecycle"]) as events,
    ):
        assert [(event.payload, event.cursor) async for event in events] == [(str(n), f"c{n}") for n in range(1, 5)]
    follow = "follow=true&kinds=log_line%2Clifecycle"
    assert queries(script.requests) == [follow, *[f"{follow}&cursor={cursor}" for cursor in ("c2", "c3", "c4", "c4")]]


async def test_followed_log_ends_when_another_vm_has_the_name() -> None:
    other = answer("400 Bad Request", b'{"message": "cursor is of another VM"}')
    async with scripted([HEAD + chunk(1)], [other]) as (client, _), client.vms.follow("vm", cursor="c0") as events:
        assert [event.payload async for event in events] == ["1"]


async def test_log_that_is_followed_until_something_ends_with_an_answer_without_a_line() -> None:
    async with (
        scripted([HEAD + chunk(1) + END], [HEAD + END]) as (client, script),
        client.vms.follow("vm", until="ready") as events,
    ):
        assert [event.payload async for event in events] == ["1"]
    assert queries(script.requests) == ["follow=true&until=ready", "follow=true&until=ready&cursor=c1"]


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "503 Service Unavailable"])
async def test_refusal_of_the_first_request_is_a_response_error(status: str) -> None:
    async with scripted([answer(status, b'{"message": "no"}')]) as (client, _):
        with pytest.raises(ResponseError) as refusal:
            async with client.vms.follow("vm", cursor="c1"):
                raise AssertionError("it was opened")
    assert refusal.value.status == int(status[:3])


async def test_refusal_of_a_later_request_is_a_response_error() -> None:
    forbidden = answer("403 Forbidden", b'{"message": "no"}')
    async with scripted([HEAD + chunk(1)], [forbidden]) as (client, _), client.vms.follow("vm") as events:
        await anext(events)
        with pytest.raises(ResponseError, match="403"):
            await anext(events)


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable"])
async def test_server_that_cannot_answer_for_a_while_is_asked_again(status: str) -> None:
    busy = answer(status, b'{"message": "stopping"}')
    async with (
        scripted([HEAD + chunk(1)], [busy], [HEAD + chunk(2)]) as (client, script),
        client.vms.follow("vm") as events,
    ):
        assert [(await anext(events)).payload for _ in range(2)] == ["1", "2"]
    assert queries(script.requests) == ["follow=true", *["follow=true&cursor=c1"] * 2]


async def test_server_that_stays_away_is_a_connect_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_RESUME_SECONDS", 0.0)
    async with scripted([HEAD + chunk(1)], []) as (client, _), client.vms.follow("vm") as events:
        await anext(events)
        with pytest.raises(ConnectError):
            await anext(events)


@pytest.mark.parametrize("line", [b"garbage", b"[1]", b'{"kind": 1}'])
async def test_invalid_line_is_a_client_error(line: bytes) -> None:
    data = HEAD + b"%x\r\n%b\n\r\n" % (len(line) + 1, line)
    async with scripted([data]) as (client, _), client.vms.follow("vm") as events:
        with pytest.raises(ClientError):
            await anext(events)
