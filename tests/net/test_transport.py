"""The HTTP client over real sockets: URLs, kept-alive connections, answers, error messages, and opening WebSockets."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal

import pytest
import trio
from harness.scripted import OK, SWITCHING, answer, scripted, switched, upgrading
from trio_websocket import ConnectionClosed

from orchard.client import Client, ClientError, ConnectError, ResponseError
from orchard.controller import ControllerSettings, run
from orchard.net import tls, transport
from orchard.net.urls import ServerURL, parse_url

# ---- URLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("https://c.example.com", ServerURL("https://c.example.com:6120", True, "c.example.com", 6120, "")),
        ("http://127.0.0.1:80/", ServerURL("http://127.0.0.1:80", False, "127.0.0.1", 80, "")),
        ("http://[::1]:1/a/b/", ServerURL("http://[::1]:1/a/b", False, "::1", 1, "/a/b")),
        ("https://c/v1", ServerURL("https://c:6120", True, "c", 6120, "")),
        ("c.example.com", ServerURL("https://c.example.com:6120", True, "c.example.com", 6120, "")),
        ("c:80/a", ServerURL("https://c:80/a", True, "c", 80, "/a")),
    ],
)
def test_url_is_parsed_and_normalised(url: str, parsed: ServerURL) -> None:
    assert parse_url(url, "/v1") == parsed


@pytest.mark.parametrize("url", ["", "ftp://c", "http://", "http://c:x", "http://c?a", "http://c#a", "http://a b"])
def test_invalid_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ValueError, match="https://controller"):
        Client(url)


def test_no_secret_is_in_the_repr_or_in_a_message() -> None:
    assert "s3cret" not in repr(Client("http://c", account="a", token="s3cret"))
    with pytest.raises(ValueError, match="user name") as refusal:
        Client("http://user:s3cret@c")
    assert "s3cret" not in str(refusal.value)


# ---- connections ---------------------------------------------------------------------------------------------------


def test_request_has_a_percent_encoded_query_and_a_json_body() -> None:
    async def answer_it() -> bytes:
        async with scripted([OK]) as (client, script):
            await client.request("POST", "/vms", query={"a": "b c&"}, json={"é": 1})
            return script.requests[0]

    head, _, body = trio.run(answer_it).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/vms?a=b+c%26 HTTP/1.1\r\n")
    assert json.loads(body) == {"é": 1}


async def test_connection_is_kept_alive() -> None:
    async with scripted([OK, OK, OK], account="a", token="t") as (client, script):
        for _ in range(3):
            assert await client.vms.list() == []
        assert script.opened == 1
        assert b"Authorization: Basic YTp0\r\n" in script.requests[0]


async def test_connection_that_the_server_closed_while_idle_is_replaced() -> None:
    async with scripted([OK], [OK]) as (client, script):
        await client.vms.list()
        await trio.testing.wait_all_tasks_blocked()
        await client.vms.list()
        assert script.opened == 2


async def test_connection_that_was_idle_for_longer_than_proxies_allow_is_not_used_again(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with scripted([OK, OK, OK], [OK]) as (client, script):
        for pause, opened in ((0, 1), (24, 1), (26, 2)):
            mock_clock.jump(pause)
            await client.vms.list()
            assert script.opened == opened


CLOSED = b""


@pytest.mark.parametrize(("method", "times"), [("GET", 2), ("PUT", 2), ("PATCH", 2), ("POST", 1), ("DELETE", 1)])
async def test_only_repeatable_requests_are_sent_again_and_only_on_a_used_connection(method: str, times: int) -> None:
    async with scripted([OK, CLOSED], [OK]) as (client, script):
        await client.vms.list()
        if times == 2:
            assert (await client.request(method, "/x", json={})).body == b"[]"
        else:
            with pytest.raises(ConnectError, match=r"http://localhost:\d+ was lost"):
                await client.request(method, "/x", json={})
        assert len(script.requests) == 1 + times
    async with scripted([CLOSED]) as (client, script):
        with pytest.raises(ConnectError):
            await client.request(method, "/x")
        assert len(script.requests) == 1


async def test_request_whose_answer_has_begun_is_not_sent_again() -> None:
    async with scripted([OK, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n["], [OK]) as (client, script):
        await client.vms.list()
        with pytest.raises(ConnectError):
            await client.vms.list()
        assert len(script.requests) == 2


async def test_cancelled_request_closes_its_connection() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n["
    async with scripted([half, OK], [OK]) as (client, script):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.vms.list)
            while not script.requests:
                await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        await script.left.wait()
        assert await client.vms.list() == []
        assert script.opened == 2


async def test_answer_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client("http://localhost:1", answer_seconds=5)
        connection = transport._Connection(
            client._endpoints[0], trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        )
        client._idle.append(connection)
        with pytest.raises(ConnectError, match="within 5 seconds"):
            await client.vms.list()
        assert trio.current_time() == 5


async def test_connecting_has_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async def connect(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError("sleep_forever has ended")

    with pytest.raises(ConnectError, match="cannot reach http://c:6120: no connection within 3 seconds"):
        await Client("http://c", connect_seconds=3, connect=connect).check()
    assert trio.current_time() == 3


async def test_aclose_in_a_cancelled_task_closes_every_connection() -> None:
    async with scripted([OK], [OK]) as (client, script):
        # Two requests at once need two connections.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.vms.list)
            nursery.start_soon(client.vms.list)
        assert script.opened == 2
        streams = [connection.stream for connection in client._idle]
        assert len(streams) == 2
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        for stream in streams:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some(1)


async def test_connections_have_tcp_keep_alive() -> None:
    async with scripted([OK]) as (client, _):
        await client.vms.list()
        stream = client._idle[0].stream
        assert isinstance(stream, trio.SocketStream)
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, interval, count = (stream.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)
        assert idle + interval * count <= 60


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        ("404 Not Found", b'{"message": "VM \\"x\\" does not exist"}', 'VM "x" does not exist'),
        ("502 Bad Gateway", b"<html>\x1b[2J nginx", "'<html> "),
        ("500 Oops", b"", "not one of Orchard's"),
        ("403 No", b'{"message": 1}', "1"),
        ("500 Deep", b"[" * 100_000, "not one of Orchard's"),
    ],
)
async def test_response_error_has_the_status_and_the_servers_message(status: str, body: bytes, words: str) -> None:
    async with scripted([answer(status, body)]) as (client, _):
        with pytest.raises(ResponseError) as refusal:
            await client.vms.get("x")
        assert words in refusal.value.message
        assert refusal.value.status == int(status[:3])
        assert "\x1b" not in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (answer("200 OK", b"hello"), "not JSON.*hello"),
        (answer("200 OK", b"{}"), "expected a list"),
        (answer("200 OK", b"[1]"), "not a valid VM"),
        (answer("200 OK", b"[" * 100_000), "not JSON"),
        (answer("200 OK", b'[{"name": "\\ud800"}]'), "half a surrogate pair"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "invalid HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[", "invalid HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "invalid HTTP answer"),
    ],
)
async def test_answer_that_cannot_be_understood_is_a_client_error(data: bytes, words: str) -> None:
    async with scripted([data]) as (client, _):
        with pytest.raises(ClientError, match=words):
            await client.vms.list()


async def test_body_of_an_answer_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_MAX_BODY_BYTES", 1000)
    async with scripted([answer("200 OK", b"x" * 1001)]) as (client, _):
        with pytest.raises(ClientError, match="larger than 1000 bytes"):
            await client.vms.list()


async def test_chunked_body_with_extensions_and_trailers_is_read() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\n[\r\n1\r\n]\r\n0\r\nX-Trailer: 1\r\n\r\n"
    async with scripted([chunked, OK]) as (client, script):
        for _ in range(2):
            assert await client.vms.list() == []
        assert script.opened == 1


async def test_informational_answers_are_skipped() -> None:
    async with scripted([b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK]) as (client, _):
        assert await client.vms.list() == []


# ---- connection errors ---------------------------------------------------------------------------------------------


@pytest.mark.needs("openssl")
async def test_connection_errors_say_what_is_wrong(tmp_path: Path, nursery: trio.Nursery) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConnectError, match=f"^cannot reach http://127.0.0.1:{port}: connection refused$"):
            await Client(f"http://127.0.0.1:{port}").check()
    with pytest.raises(ConnectError, match=r"^cannot reach http://nowhere\.invalid:6120: "):
        await Client("http://nowhere.invalid").check()
    running = await nursery.start(run, ControllerSettings(data_dir=tmp_path / "tls", host="127.0.0.1", port=0))
    plain = await nursery.start(
        run, ControllerSettings(data_dir=tmp_path / "plain", host="127.0.0.1", port=0, tls=False)
    )
    with pytest.raises(ConnectError, match="not trusted"):
        await Client(running.url).check()
    with pytest.raises(ConnectError, match="does not speak TLS"):
        await Client(plain.url.replace("http:", "https:")).check()
    with pytest.raises(ResponseError, match="HTTPS") as plain_http:
        await Client(running.url.replace("https:", "http:")).check()
    assert plain_http.value.status == 400
    async with Client(running.url, certificate=running.certificate) as client:
        with pytest.raises(ResponseError) as refusal:
            await client.check()
        assert refusal.value.status == 401
    other, _ = await tls.self_signed(tmp_path)
    with pytest.raises(ConnectError) as untrusted:
        await Client(running.url, certificate=other.read_bytes()).check()
    assert isinstance(untrusted.value.__cause__, tls.NotTrustedError)
    nursery.cancel_scope.cancel()


# ---- WebSockets ----------------------------------------------------------------------------------------------------

Way = Literal["tunnel", "websocket"]


def opened(client: Client, way: Way) -> AbstractAsyncContextManager[object]:
    return client.tunnel("/x", {}) if way == "tunnel" else client.websocket("/x")


async def test_tunnel_delivers_bytes_that_arrive_with_the_answer() -> None:
    rest = b"\x82\x05early\x88\x02\x03\xe8"
    async with upgrading(lambda accept: switched(accept, rest)) as (client, heads):
        async with client.tunnel("/vms/vm/port-forward", {"port": "22"}) as stream:
            assert await stream.receive_some() == b"early"
            assert await stream.receive_some() == b""
        assert heads[0].startswith("GET /v1/vms/vm/port-forward?port=22 HTTP/1.1\r\n")
        for line in ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Authorization: Basic"):
            assert f"\r\n{line}" in heads[0]


async def test_websocket_delivers_messages_that_arrive_with_the_answer() -> None:
    rest = b"\x82\x02{}\x81\x02[]\x88\x02\x03\xe8"
    async with upgrading(lambda accept: switched(accept, rest)) as (client, heads):
        async with client.websocket("/rpc/watch", {"workerName": "w"}) as websocket:
            assert [await websocket.get_message() for _ in range(2)] == [b"{}", "[]"]
            with pytest.raises(ConnectionClosed):
                await websocket.get_message()
        assert heads[0].startswith("GET /v1/rpc/watch?workerName=w HTTP/1.1\r\n")
        assert "\r\nAuthorization: Basic" in heads[0]


@pytest.mark.parametrize(
    ("make_answer", "error", "words"),
    [
        (lambda _: SWITCHING + b"Sec-WebSocket-Accept: x\r\n\r\n", ConnectError, "handshake"),
        (lambda _: SWITCHING + b"\r\n", ConnectError, "handshake"),
        (
            lambda a: SWITCHING + f"Sec-WebSocket-Extensions: x\r\nSec-WebSocket-Accept: {a}\r\n\r\n".encode(),
            ConnectError,
            "handshake",
        ),
        (lambda _: answer("503 x", b'{"message":"m"}'), ResponseError, "m .* 503"),
        (lambda _: OK, ResponseError, "200"),
        (lambda _: b"nonsense\r\n\r\n", ConnectError, "invalid HTTP answer"),
        (lambda _: b"HTTP/1.1 101 x\r\n" + b"X-A: b\r\n" * 10_000, ConnectError, "invalid HTTP answer"),
        (lambda _: b"HTTP/1.1 403 x\r\n\r\n" + b"x" * 10_000, ClientError, "larger than 1000 bytes"),
    ],
)
@pytest.mark.parametrize("way", ["tunnel", "websocket"])
async def test_websocket_is_not_opened_by_an_incorrect_answer(
    make_answer: Callable[[str], bytes],
    error: type[ClientError],
    words: str,
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "_MAX_BODY_BYTES", 1000)
    async with upgrading(make_answer) as (client, _):
        with pytest.raises(error, match=words):
            async with opened(client, way):
                raise AssertionError("it was opened")


@pytest.mark.parametrize("way", ["tunnel", "websocket"])
async def test_websocket_is_not_opened_by_an_incomplete_answer(way: Way) -> None:
    async with upgrading(lambda _: b"HTTP/1.1 101", answer_seconds=0.01) as (client, _):
        with pytest.raises(ConnectError, match=r"within 0\.01 seconds"):
            async with opened(client, way):
                raise AssertionError("it was opened")


async def test_tunnel_that_is_closed_irregularly_is_a_connect_error() -> None:
    async with upgrading(lambda accept: switched(accept, b"\x88\x06\x03\xe9gone")) as (client, _):
        with pytest.raises(ConnectError, match="closed with 1001: gone"):
            async with client.tunnel("/x", {}) as stream:
                await stream.receive_some()


async def test_websocket_that_is_closed_is_a_connect_error_outside_of_the_block() -> None:
    async with upgrading(lambda accept: switched(accept, b"\x88\x06\x03\xe9gone")) as (client, _):
        with pytest.raises(ConnectError, match="closed with 1001: gone"):
            async with client.websocket("/x") as websocket:
                await websocket.get_message()


@pytest.mark.parametrize("way", ["tunnel", "websocket"])
async def test_exception_of_the_block_passes_unchanged(way: Way) -> None:
    async with upgrading(switched) as (client, _):
        with pytest.raises(ZeroDivisionError):
            async with opened(client, way):
                raise ZeroDivisionError


async def test_tunnel_has_keep_alive_and_no_user_timeout() -> None:
    async with upgrading(switched) as (client, _):
        with trio.move_on_after(5) as patience:
            async with client.tunnel("/x", {}) as stream:
                assert isinstance(stream._stream, trio.SocketStream)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    assert stream._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
                assert stream._stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                # The server would not answer the close.
                patience.cancel()
                await trio.sleep_forever()
