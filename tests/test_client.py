"""The client: what it sends, what it makes of answers, and what it says when there is none."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from trio_websocket import ConnectionClosed

from orchard import client as client_module
from orchard.client import Client, ClientError, ConnectError, ResponseError, VMFailed
from orchard.controller import ControllerSettings, run
from orchard.net import tls, transport, wsframes
from orchard.net.transport import parse_url
from orchard.testing import cluster

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


class Script:
    """A server that answers the N-th request on the M-th connection with bytes from a script, then closes or waits."""

    def __init__(self, *connections: list[bytes]) -> None:
        self._connections = list(connections)
        self.requests: list[bytes] = []
        self.opened = 0
        self.left = trio.Event()  # set when a client has gone before its script was over

    async def serve(self, stream: trio.SocketStream) -> None:
        answers = self._connections[self.opened]
        self.opened += 1
        for answer in answers:
            request = await self._request(stream)
            if request is None:
                self.left.set()
                return
            self.requests.append(request)
            await stream.send_all(answer)

    async def _request(self, stream: trio.SocketStream) -> bytes | None:
        data = b""
        while b"\r\n\r\n" not in data:
            more = await stream.receive_some(1000)
            if not more:
                return None
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        while len(body) < length:
            body += await stream.receive_some(1000)
        return head + b"\r\n\r\n" + body


@asynccontextmanager
async def scripted(*connections: list[bytes], **options: Any) -> AsyncIterator[tuple[Client, Script]]:
    script = Script(*connections)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, script.serve, 0)
        port = listeners[0].socket.getsockname()[1]
        async with Client(f"http://localhost:{port}", **options) as client:
            yield client, script
        nursery.cancel_scope.cancel()


# ---- URLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("https://c.example.com", ("https://c.example.com:6120", True, "c.example.com", 6120, "")),
        ("http://127.0.0.1:80/", ("http://127.0.0.1:80", False, "127.0.0.1", 80, "")),
        ("http://[::1]:1/a/b/", ("http://[::1]:1/a/b", False, "::1", 1, "/a/b")),
        ("https://c/v1", ("https://c:6120", True, "c", 6120, "")),
    ],
)
def test_urls(url: str, parsed: tuple[object, ...]) -> None:
    assert parse_url(url) == parsed


@pytest.mark.parametrize(
    "url", ["", "c:6120", "c.example.com", "ftp://c", "http://", "http://c:x", "http://c?a", "http://c#a", "http://a b"]
)
def test_what_is_no_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ValueError, match="expected one such as https://"):
        Client(url)


def test_no_secret_is_shown() -> None:
    assert "s3cret" not in repr(Client("http://c", account="a", token="s3cret"))
    with pytest.raises(ValueError, match="holds a user name") as refusal:
        Client("http://user:s3cret@c")
    assert "s3cret" not in str(refusal.value)


# ---- connections ---------------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again() -> None:
    async with scripted([OK, OK, OK], account="a", token="t") as (client, script):
        for _ in range(3):
            assert await client.vms.list() == []
        assert script.opened == 1
        assert b"Authorization: Basic YTp0\r\n" in script.requests[0]


async def test_one_that_was_closed_meanwhile_is_replaced() -> None:
    async with scripted([OK], [OK]) as (client, script):
        await client.vms.list()
        await trio.testing.wait_all_tasks_blocked()
        await client.vms.list()
        assert script.opened == 2


CLOSED = b""


@pytest.mark.parametrize(("method", "times"), [("GET", 2), ("PUT", 2), ("PATCH", 2), ("POST", 1), ("DELETE", 1)])
async def test_only_what_may_be_done_twice_is_sent_twice(method: str, times: int) -> None:
    async with scripted([OK, CLOSED], [OK]) as (client, script):
        await client.vms.list()
        if times == 2:
            assert (await client.request(method, "/x", json={})).body == b"[]"
        else:
            with pytest.raises(
                ConnectError, match=r"the connection to http://localhost:\d+ was lost: it was closed before an answer"
            ):
                await client.request(method, "/x", json={})
        assert len(script.requests) == 1 + times
    async with scripted([CLOSED]) as (client, script):
        with pytest.raises(ConnectError):
            await client.request(method, "/x")
        assert len(script.requests) == 1, "on a fresh connection nothing is tried again"


async def test_an_answer_that_began_is_not_asked_for_again() -> None:
    async with scripted([OK, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n["], [OK]) as (client, script):
        await client.vms.list()
        with pytest.raises(ConnectError):
            await client.vms.list()
        assert len(script.requests) == 2


async def test_a_cancelled_request_closes_its_connection() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n["
    async with scripted([half, OK], [OK]) as (client, script):
        with trio.move_on_after(0.05):
            await client.vms.list()
        await script.left.wait()
        assert await client.vms.list() == []
        assert script.opened == 2


async def test_an_answer_that_does_not_come_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """On a virtual clock: a silent server, and a host that answers nothing at all."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client("http://localhost:1", answer_seconds=5)
        connection = transport._Connection(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        client._idle.append(connection)
        with pytest.raises(ConnectError, match="did not answer within 5 seconds"):
            await client.vms.list()
        assert trio.current_time() == 5


# ---- answers -------------------------------------------------------------------------------------------------------


def answered(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answered("404 Not Found", b'{"message": "VM \\"x\\" does not exist"}'), 'VM "x" does not exist'),
        (answered("502 Bad Gateway", b"<html>\x1b[2J nginx"), "not an answer of Orchard's: '<html> "),
        (answered("500 Oops", b""), "not an answer of Orchard's"),
        (answered("403 No", b'{"message": 1}'), "1"),
        (answered("500 Deep", b"[" * 100_000), "not an answer of Orchard's"),
    ],
)
async def test_a_refusal_has_its_status_and_the_controllers_words(answer: bytes, words: str) -> None:
    async with scripted([answer]) as (client, _):
        with pytest.raises(ResponseError) as refusal:
            await client.vms.get("x")
        assert words in refusal.value.message
        assert refusal.value.status == int(answer[9:12])
        assert "\x1b" not in str(refusal.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (answered("200 OK", b"hello"), "is this an Orchard"),
        (answered("200 OK", b"{}"), "no list"),
        (answered("200 OK", b"[1]"), "no VM"),
        (answered("200 OK", b"[" * 100_000), "is this an Orchard"),
        (answered("200 OK", b'[{"name": "\\ud800"}]'), "half a surrogate pair"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP as it should"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[", "does not speak HTTP as it should"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "does not speak HTTP as it should"),
    ],
)
async def test_what_is_no_answer_of_an_orchard_is_said_to_be(answer: bytes, words: str) -> None:
    async with scripted([answer]) as (client, _):
        with pytest.raises(ClientError, match=words):
            await client.vms.list()


async def test_an_answer_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_BODY", 1000)
    async with scripted([answered("200 OK", b"x" * 1001)]) as (client, _):
        with pytest.raises(ClientError, match="larger than 1000 bytes"):
            await client.vms.list()


async def test_informational_answers_are_passed_over() -> None:
    async with scripted([b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK]) as (client, _):
        assert await client.vms.list() == []


# ---- no connection -------------------------------------------------------------------------------------------------


async def test_why_there_is_no_connection_is_said_in_plain_words(tmp_path: Path, nursery: trio.Nursery) -> None:
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
    with pytest.raises(ConnectError, match="is not trusted"):
        await Client(running.url).check()
    with pytest.raises(ConnectError, match="does not speak TLS; is it http://"):
        await Client(plain.url.replace("http:", "https:")).check()
    with pytest.raises(ConnectError, match=r"lost|HTTP as it should"):
        await Client(running.url.replace("https:", "http:")).check()
    async with Client(running.url, certificate=running.certificate) as client:
        with pytest.raises(ResponseError, match="HTTP status 401"):
            await client.check()
    other, _ = await tls.self_signed(tmp_path)
    with pytest.raises(ConnectError, match="another one than the one to trust"):
        await Client(running.url, certificate=other.read_bytes()).check()
    nursery.cancel_scope.cancel()


# ---- watches and events --------------------------------------------------------------------------------------------


async def test_a_watch_is_read_however_its_bytes_arrive() -> None:
    async with cluster() as c:
        vm = await c.client.vms.create(name="vm", image="any")
        raw = (await c.client.request("GET", "/vms/vm")).body
    line = b'{"type":"ADDED","object":' + raw + b"}\n"
    stream = line + line.replace(b"ADDED", b"DELETED")
    for cut in (1, 5, len(line) - 1, len(line), len(line) + 1):
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (stream[:cut], stream[cut:])) + b"0\r\n\r\n"
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces
        async with scripted([answer]) as (client, _), client.vms.watch("vm") as changes:
            seen = [(kind, vm.uid) async for kind, vm in changes]
        assert seen == [("ADDED", vm.uid), ("DELETED", vm.uid)]


async def test_a_watch_of_garbage_says_so() -> None:
    garbage = b"HTTP/1.1 200 OK\r\n\r\n{}\n"
    async with scripted([garbage]) as (client, _), client.vms.watch("vm") as changes:
        with pytest.raises(ClientError, match="a line of the watch is no change"):
            await anext(changes)


async def test_waiting_ends_when_the_vm_fails_or_is_deleted() -> None:
    async with cluster() as c:
        await c.client.vms.create(name="vm", image="any", startup_script={"script_content": "echo no; exit 2"})
        await c.client.vms.wait("vm", "failed")
        with pytest.raises(VMFailed, match='VM "vm" failed: startup script failed with exit code 2: no'):
            await c.client.vms.wait("vm")
        with pytest.raises(ResponseError, match='"none" does not exist'):
            await c.client.vms.wait("none")
        await c.client.vms.create(name="big", image="any", resources={"gpu": 1})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raises, c.client.vms.wait, "big", VMFailed, "was deleted")
            await trio.testing.wait_all_tasks_blocked(0.05)
            await c.client.vms.delete("big")


async def raises(call: Callable[[str], Awaitable[object]], name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        await call(name)


async def test_events_come_from_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PAGE", 3)
    async with cluster() as c:
        vm = await c.client.vms.create(name="vm", image="any")
        lines = [{"kind": "log_line", "payload": str(n), "timestamp": n} for n in range(10)]
        await c.client.vms.append_events("vm", lines, uid=vm.uid)
        assert [event.payload async for event in c.client.vms.events("vm")] == [str(n) for n in range(10)]
        assert [event.timestamp async for event in c.client.vms.events("vm", order="desc")] == list(range(9, -1, -1))
        async for event in c.client.vms.events("vm"):
            assert event.payload == "0"
            break
        with pytest.raises(ResponseError, match="uid"):
            await c.client.vms.append_events("vm", lines, uid="another")


async def test_the_other_resources() -> None:
    async with cluster() as c:
        client = c.client
        account = await client.service_accounts.create("ci", roles=["compute:read"])
        assert [a.name for a in await client.service_accounts.list()] == ["ci"]
        assert (await client.service_accounts.replace("ci", token="t")).token == "t"
        assert (await client.service_accounts.get("ci")).roles == account.roles
        await client.service_accounts.delete("ci")
        assert (await client.cluster_settings.put({"schedulerProfile": "distribute-load"})) == (
            await client.cluster_settings.get()
        )
        assert (await client.info()).capabilities == ("rpc-v2", "vm-state-endpoint")
        assert (await client.workers.pause("worker-1")).scheduling_paused
        assert not (await client.workers.pause("worker-1", paused=False)).scheduling_paused
        assert [w.name for w in await client.workers.list()] == ["worker-1"]
        vm = await client.vms.create(name="vm", image="any")
        assert (await client.vms.replace("vm", {"image": "any", "headless": True})).spec.headless
        assert (await client.vms.patch("vm", {"cpu": 3}, memory=5)).spec.memory == 5
        assert [one.uid for one in await client.vms.list()] == [vm.uid]
        await client.workers.delete("worker-1")
        with pytest.raises(ResponseError, match=r'VM "\.\./x" does not exist'):
            await client.vms.get("../x")


async def test_a_new_vm_says_at_once_why_it_waits_where_that_is_known() -> None:
    async with cluster(workers=0) as c:
        await c.client.vms.create(name="first", image="any")
        async with c.client.vms.watch("first") as changes:
            while not (await anext(changes))[1].state.status_message:
                pass
        second = await c.client.vms.create(name="second", image="any")
        assert second.state.status_message == "waiting: no worker has registered yet"


# ---- WebSockets ----------------------------------------------------------------------------------------------------


async def test_actions_come_over_the_watch_until_another_takes_its_place() -> None:
    async with cluster(workers=0) as c:
        await c.client.workers.register({"name": "w", "machine_id": "m", "resources": {"org.cirruslabs.tart-vms": 1}})
        async with c.client.rpc_watch("w") as first:
            assert await anext(first) == {"syncVMsAction": {}}
            await c.client.vms.create(name="vm", image="any")
            assert await anext(first) == {"syncVMsAction": {}}
            async with c.client.rpc_watch("w") as second:
                assert await anext(second) == {"syncVMsAction": {}}
                with pytest.raises(ConnectionClosed):
                    await anext(first)


async def test_a_refused_websocket_has_the_controllers_words() -> None:
    async with cluster(workers=0) as c:
        with pytest.raises(ResponseError, match='worker "none" does not exist') as refusal:
            async with c.client.rpc_watch("none"):
                raise AssertionError("it was opened")
        assert refusal.value.status == 404


async def test_a_watch_that_is_cut_off_is_a_lost_connection() -> None:
    async with cluster(workers=0) as c:
        await c.client.workers.register({"name": "w"})
        with pytest.raises(ConnectError, match="closed the WebSocket"):
            await watch_twice(c.client)


async def watch_twice(client: Client) -> None:
    async with client.rpc_watch("w") as actions, client.rpc_watch("w"):
        async for _ in actions:
            pass


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    async with cluster(workers=0) as c:
        await c.client.workers.register({"name": "w"})
        with pytest.raises(ZeroDivisionError):
            async with c.client.rpc_watch("w"):
                raise ZeroDivisionError


def test_what_is_sent_is_json() -> None:
    request, body = Client("http://c/p")._request("POST", "/vms", {"a": "b c&"}, {"é": 1}, b"")
    assert request.target == b"/p/v1/vms?a=b+c%26"
    assert json.loads(body) == {"é": 1}


async def test_a_ping_that_crosses_our_close_is_no_error() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some(1000)
        key = next(
            line[18:].strip() for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key")
        )
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        await stream.send_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        assert (await stream.receive_some(1000))[:1] == b"\x88"
        await stream.send_all(b"\x89\x00")
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(b"\x89\x00\x88\x02\x03\xe8")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        url = f"http://localhost:{listeners[0].socket.getsockname()[1]}"
        async with Client(url) as client, client.websocket("/x"):
            pass
        nursery.cancel_scope.cancel()


async def test_a_client_that_is_closed_by_a_cancelled_task_closes_every_connection() -> None:
    async with scripted([OK], [OK]) as (client, script):
        async with trio.open_nursery() as nursery:  # two at once, over a connection each
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


async def test_the_system_looks_after_connections_that_say_nothing() -> None:
    async with scripted([OK]) as (client, _):
        await client.vms.list()
        stream = client._idle[0].stream
        assert isinstance(stream, trio.SocketStream)
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = ("TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, each, count = (stream.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names)
        assert idle + each * count <= 60


# ---- tunnels -------------------------------------------------------------------------------------------------------

SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


@asynccontextmanager
async def tunnelled(answer: Callable[[str], bytes]) -> AsyncIterator[tuple[Client, list[str]]]:
    """A client of a server that answers by what it makes of Sec-WebSocket-Accept, and then says nothing more."""
    heads: list[str] = []

    async def serve(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(1000)
        heads.append(head.decode())
        (key,) = (line[19:] for line in head.decode().split("\r\n") if line.startswith("Sec-WebSocket-Key: "))
        await stream.send_all(answer(wsframes.accept_value(key)))
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some(1000):
                pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        url = f"http://localhost:{listeners[0].socket.getsockname()[1]}"
        async with Client(url, account="a", token="t") as client:
            yield client, heads
        nursery.cancel_scope.cancel()


async def test_a_tunnel_loses_nothing_that_comes_with_the_answer() -> None:
    def answer(accept: str) -> bytes:
        return SWITCHING + f"sec-websocket-accept: {accept}\r\n\r\n".encode() + b"\x82\x05early\x88\x02\x03\xe8"

    async with tunnelled(answer) as (client, heads):
        async with client.tunnel("/vms/vm/port-forward", {"port": "22"}) as stream:
            assert await stream.receive_some() == b"early"
            assert await stream.receive_some() == b""
        assert heads[0].startswith("GET /v1/vms/vm/port-forward?port=22 HTTP/1.1\r\n")
        for line in ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Authorization: Basic"):
            assert f"\r\n{line}" in heads[0]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda _: SWITCHING + b"Sec-WebSocket-Accept: x\r\n\r\n", ConnectError, "as it should"),
        (lambda _: SWITCHING + b"\r\n", ConnectError, "as it should"),
        (
            lambda a: SWITCHING + f"Sec-WebSocket-Extensions: x\r\nSec-WebSocket-Accept: {a}\r\n\r\n".encode(),
            ConnectError,
            "as it should",
        ),
        (lambda _: b"HTTP/1.1 503 x\r\nContent-Length: 15\r\n\r\n" + b'{"message":"m"}', ResponseError, "m .* 503"),
        (lambda _: OK, ResponseError, "not an answer of Orchard's"),
        (lambda _: b"nonsense\r\n\r\n", ConnectError, "does not speak HTTP"),
        (lambda _: b"HTTP/1.1 101 x\r\n" + b"X-A: b\r\n" * 10_000, ConnectError, "does not speak HTTP"),
        (lambda _: b"HTTP/1.1 403 x\r\n\r\n" + b"x" * 10_000, ClientError, "larger than 1000 bytes"),
    ],
)
@pytest.mark.parametrize("way", ["tunnel", "websocket"])
async def test_a_websocket_that_is_not_opened_as_it_should_be(
    answer: Callable[[str], bytes],
    error: type[ClientError],
    words: str,
    way: Literal["tunnel", "websocket"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "MAX_BODY", 1000)
    async with tunnelled(answer) as (client, _):
        opened: AbstractAsyncContextManager[object] = (
            client.tunnel("/x", {}) if way == "tunnel" else client.websocket("/x")
        )
        with pytest.raises(error, match=words):
            async with opened:
                raise AssertionError("it was opened")


@pytest.mark.parametrize("way", ["tunnel", "websocket"])
async def test_an_answer_that_does_not_come_to_its_end_opens_no_websocket(way: Literal["tunnel", "websocket"]) -> None:
    async with tunnelled(lambda _: b"HTTP/1.1 101") as (client, _):
        client._answer_seconds = 0.01
        with pytest.raises(ConnectError, match="did not answer within"):
            async with client.tunnel("/x", {}) if way == "tunnel" else client.websocket("/x"):
                raise AssertionError("it was opened")


async def test_messages_that_come_with_the_answer_are_not_lost() -> None:
    def answer(accept: str) -> bytes:
        return SWITCHING + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode() + b"\x82\x02{}\x81\x02[]\x88\x02\x03\xe8"

    async with tunnelled(answer) as (client, heads):
        async with client.websocket("/rpc/watch", {"workerName": "w"}) as websocket:
            assert [await websocket.get_message() for _ in range(2)] == [b"{}", "[]"]
            with pytest.raises(ConnectionClosed):
                await websocket.get_message()
        assert heads[0].startswith("GET /v1/rpc/watch?workerName=w HTTP/1.1\r\n")
        assert "\r\nAuthorization: Basic" in heads[0]


@pytest.mark.parametrize(
    "message", [b"[" * 30_000, b"[1]", b"\xff", b'{"\\ud800": 1}', b'{"a": 1, "a": 2}', b'{"a": NaN}']
)
async def test_what_is_no_action_and_no_frame_of_a_command_is_said_to_be(message: bytes) -> None:
    def answer(accept: str) -> bytes:
        message_frame = b"".join(wsframes.build_frame(wsframes.BINARY, message))
        return SWITCHING + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode() + message_frame

    async with tunnelled(answer) as (client, _):
        with pytest.raises(ClientError, match="sent no action over the watch"):
            async with client.rpc_watch("w") as actions:
                await anext(actions)
        with pytest.raises(ClientError, match="a frame of the command is not understood"):
            async with client.vms.exec("vm", "true") as command:
                await anext(command)


@pytest.mark.parametrize(
    "frame", ['{"type": "stdout", "data": "x"}', '{"type": "stdout", "data": 1}', '{"type": "exit", "exit": {}}']
)
async def test_a_frame_of_a_command_that_says_nothing_is_said_to_be(frame: str) -> None:
    def answer(accept: str) -> bytes:
        message_frame = b"".join(wsframes.build_frame(wsframes.TEXT, frame.encode()))
        return SWITCHING + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode() + message_frame

    async with tunnelled(answer) as (client, _):
        with pytest.raises(ClientError, match="a frame of the command is not understood"):
            async with client.vms.exec("vm", "true") as command:
                await anext(command)


async def test_a_tunnel_that_breaks_is_a_lost_connection() -> None:
    def answer(accept: str) -> bytes:
        return SWITCHING + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode() + b"\x88\x06\x03\xe9gone"

    async with tunnelled(answer) as (client, _):
        with pytest.raises(ConnectError, match="closed with 1001: gone"):
            async with client.tunnel("/x", {}) as stream:
                await stream.receive_some()


async def test_the_system_does_not_cut_off_a_tunnel_whose_other_end_reads_slowly() -> None:
    def answer(accept: str) -> bytes:
        return SWITCHING + f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()

    async with tunnelled(answer) as (client, _):
        with trio.move_on_after(5) as patience:
            async with client.tunnel("/x", {}) as stream:
                assert isinstance(stream._stream, trio.SocketStream)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    assert stream._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
                assert stream._stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                patience.cancel()
                await trio.sleep_forever()
