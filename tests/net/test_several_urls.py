"""Clients of several URLs, of which one serves: the transport of the client and the connection of the command."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.scripted import OK, Script, answer

from orchard.blocking import open_client
from orchard.cli import connection
from orchard.cli.connection import AnswerError, ControllerConnection
from orchard.cli.context import Context
from orchard.cli.failure import NetworkError
from orchard.client import Client, ClientError, ConnectError, ResponseError
from orchard.controller import ControllerSettings, run
from orchard.net import transport
from orchard.net.urls import parse_urls

STANDBY = (
    b"HTTP/1.1 503 Service Unavailable\r\nOrchard-Role: standby\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: 16\r\n\r\n" + b'{"message": "s"}'
)
BUSY = answer("503 Service Unavailable", b'{"message": "b"}')
CLOSED = b""
REPEATABLE = [("GET", True), ("PUT", True), ("PATCH", True), ("POST", False), ("DELETE", False)]


@contextmanager
def refusing() -> Iterator[str]:
    """Yield a URL where connections are refused."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[list[str]]:
    """Yield the URLs of servers that answer from scripts."""
    async with trio.open_nursery() as nursery:
        urls = []
        for script in scripts:
            listeners = await nursery.start(trio.serve_tcp, script.serve, 0)
            urls.append(f"http://localhost:{listeners[0].socket.getsockname()[1]}")
        yield urls
        nursery.cancel_scope.cancel()


def by_command(url: str, method: str, path: str = "/x") -> Any:
    """Send a request as the command does. Raises CommandError."""
    with ControllerConnection(Context(url)) as controller:
        return controller.call(method, path)


async def by_client(url: str, method: str, path: str = "/x") -> Any:
    """Send a request as the client does. Raises ClientError."""
    async with Client(url) as client:
        return (await client.request(method, path)).json()


async def ask(way: str, url: str, method: str) -> Any:
    if way == "client":
        return await by_client(url, method)
    return await trio.to_thread.run_sync(by_command, url, method)


ways = pytest.mark.parametrize("way", ["client", "command"])


def test_urls_are_parsed_and_have_one_scheme() -> None:
    texts = [server.text for server in parse_urls("https://a:1/v1, b,https://a:1", "/v1")]
    assert texts == ["https://a:1", "https://b:6120"]
    for text in ("https://a,http://b", "https://a,", ",", "https://a,https://b c"):
        with pytest.raises(ValueError, match="expected"):
            parse_urls(text)


@ways
async def test_next_url_is_tried_where_no_connection_can_be_opened(way: str) -> None:
    with refusing() as refused:
        async with serving(leader := Script([OK])) as (url,):
            assert await ask(way, f"{refused},http://nowhere.invalid,{url}", "POST") == []
        assert len(leader.requests) == 1


@ways
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_request_is_sent_to_a_controller_that_leads_a_moment_later(
    way: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All URLs refuse connections at first, as after a planned stop. One of them listens before the second try."""
    script = Script([OK])
    with refusing() as refused, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with trio.open_nursery() as nursery:

            def listen() -> None:
                listener.listen()
                accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                nursery.start_soon(trio.serve_listeners, script.serve, [accepting])

            async def listen_meanwhile(_: float) -> None:
                listen()
                await trio.lowlevel.checkpoint()

            in_trio = partial(trio.from_thread.run_sync, trio_token=trio.lowlevel.current_trio_token())
            monkeypatch.setattr(trio, "sleep", listen_meanwhile)
            monkeypatch.setattr(time, "sleep", lambda _: in_trio(listen))
            assert await ask(way, f"{refused},{url}", method) == []
            nursery.cancel_scope.cancel()
    assert len(script.requests) == 1


@ways
async def test_error_names_each_url_that_failed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transport, connection):
        monkeypatch.setattr(module, "TAKEOVER_SECONDS", 0.0)
    with refusing() as first, refusing() as second, pytest.raises((ConnectError, NetworkError)) as failure:
        await ask(way, f"{first},{second}", "GET")
    assert first in str(failure.value)
    assert second in str(failure.value)


@ways
@pytest.mark.parametrize(("method", "repeats"), REPEATABLE)
@pytest.mark.parametrize("first", [CLOSED, STANDBY])
async def test_request_that_may_have_been_carried_out_is_sent_again_only_if_that_is_safe(
    way: str, first: bytes, method: str, repeats: bool
) -> None:
    other = Script([OK])
    async with serving(Script([first]), other) as urls:
        if repeats:
            assert await ask(way, ",".join(urls), method) == []
        else:
            with pytest.raises((ClientError, NetworkError, AnswerError)):
                await ask(way, ",".join(urls), method)
    assert len(other.requests) == repeats


@ways
async def test_other_answers_of_503_are_the_answer(way: str) -> None:
    other = Script([OK])
    async with serving(Script([BUSY]), other) as urls:
        with pytest.raises((ResponseError, AnswerError)):
            await ask(way, ",".join(urls), "GET")
    assert other.opened == 0


@ways
async def test_no_url_is_tried_twice_when_none_leads(way: str) -> None:
    scripts = Script([STANDBY]), Script([STANDBY])
    async with serving(*scripts) as urls:
        with pytest.raises((ConnectError, NetworkError)) as failure:
            await ask(way, ",".join(urls), "GET")
    assert all(url in str(failure.value) for url in urls)
    assert [len(script.requests) for script in scripts] == [1, 1]


@pytest.mark.parametrize("failure", [CLOSED, STANDBY])
async def test_last_url_that_answered_is_tried_first(failure: bytes) -> None:
    first, second = Script([failure], [OK]), Script([OK, OK], [failure])
    async with serving(first, second) as urls, Client(",".join(urls)) as client:
        for _ in range(2):
            await client.vms.list()
        assert (first.opened, second.opened) == (1, 1)
        await client.close_idle()
        await client.vms.list()
        assert (first.opened, second.opened) == (2, 2)


async def test_request_after_one_that_was_not_answered_begins_with_the_next_url(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tried = []

    async def connect(host: str, port: int) -> trio.abc.Stream:
        tried.append(host)
        ours, theirs = trio.testing.memory_stream_pair()
        theirs_of.append(theirs)
        return ours

    theirs_of: list[trio.abc.Stream] = []
    client = Client("http://a,http://b", connect=connect, answer_seconds=5)
    for _ in range(2):
        with pytest.raises(ConnectError, match="within 5 seconds"):
            await client.vms.list()
    assert tried == ["a", "b"]


async def test_url_whose_connection_takes_too_long_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async def connect(host: str, port: int) -> trio.abc.Stream:
        if host == "a":
            await trio.sleep_forever()
        raise ConnectionRefusedError

    with pytest.raises(ConnectError, match=r"a:6120.*3 seconds; .*b:6120"):
        await Client("http://a,http://b", connect=connect, connect_seconds=3).vms.list()
    assert trio.current_time() == 3


LINES = answer("200 OK", b'{"type": "BOOKMARK", "revision": "7"}\n')


async def test_watch_goes_on_at_the_controller_that_leads_now() -> None:
    first, second = Script([LINES], [STANDBY]), Script([OK])
    async with serving(first, second) as urls, Client(",".join(urls)) as client, client.watch() as changes:
        assert (await anext(changes)).type == "SYNCED"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anext, changes)
            while not second.requests:
                await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    assert b"since=7" in second.requests[0]


@pytest.mark.parametrize("way", ["tunnel", "websocket"])
async def test_websocket_is_opened_at_the_controller_that_leads(way: str) -> None:
    refused = answer("404 Not Found", b'{"message": "n"}')
    leader = Script([refused])
    async with serving(Script([STANDBY]), leader) as urls, Client(",".join(urls)) as client:
        opened = client.tunnel("/x", {}) if way == "tunnel" else client.websocket("/x")
        with pytest.raises(ResponseError) as failure:
            async with opened:
                pass
    assert (failure.value.status, len(leader.requests)) == (404, 1)


async def test_websocket_whose_answer_was_lost_is_not_opened_again() -> None:
    other = Script([OK])
    async with serving(Script([CLOSED]), other) as urls, Client(",".join(urls)) as client:
        with pytest.raises(ConnectError):
            async with client.websocket("/x"):
                pass
    assert other.opened == 0


async def test_blocking_client_takes_several_urls() -> None:
    def get(url: str) -> object:
        with open_client(url) as client:
            return client.vms.list()

    with refusing() as refused:
        async with serving(Script([OK])) as (url,):
            assert await trio.to_thread.run_sync(get, f"{refused},{url}") == []


async def test_one_certificate_is_trusted_at_all_urls(tmp_path: Path, nursery: trio.Nursery) -> None:
    """A server that shows another certificate is passed over, and sees no credentials."""
    start = partial(ControllerSettings, host="127.0.0.1", port=0)
    stranger = await nursery.start(run, start(data_dir=tmp_path / "stranger"))
    leader = await nursery.start(run, start(data_dir=tmp_path / "leader", admin_token="a-long-enough-token"))
    url = f"{stranger.url},{leader.url}"
    context = Context(url, leader.certificate, "bootstrap-admin", "a-long-enough-token")
    async with Client(url, account=context.account, token=context.token, certificate=context.certificate) as client:
        assert await client.vms.list() == []
    with ControllerConnection(context) as controller:
        assert await trio.to_thread.run_sync(partial(controller.call, "GET", "/vms")) == []
    nursery.cancel_scope.cancel()
