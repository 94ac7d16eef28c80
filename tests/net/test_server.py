"""The HTTP server: what it answers, what it refuses, and how it ends.

Most tests run twice, in the clear and over TLS (the fixture `transport`), over pairs of Unix sockets with a virtual clock.
Some use memory streams, where what is in the kernel's buffers would hide what the server does. TLS itself is tested in
test_streams.py.
"""

from __future__ import annotations

import email.utils
import json
import logging
import random
import socket
import ssl
import struct
import subprocess
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import h11
import pytest
import trio
import trio.testing
from harness.admission import Sender, admit_anybody
from harness.programs import need
from harness.strategies import QUICK
from hypothesis import example, given
from hypothesis import strategies as st
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

import orchard.net.connection
from orchard.net import tls
from orchard.net.connection import Limits, Service
from orchard.net.request import (
    AnyResponse,
    BodyPiece,
    HTTPError,
    Request,
    Response,
    SendPiece,
    Stream,
    TunnelUpgrade,
    WebSocketUpgrade,
    WhileConnected,
)
from orchard.net.server import serve
from orchard.net.streams import TLSListener, TLSStream
from orchard.net.websocket import TunnelStream
from orchard.net.wsframes import FrameReader

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY + b"\r\n\r\n"
)
Clock = trio.testing.MockClock
T = TypeVar("T")
pytestmark = pytest.mark.usefixtures("transport")
# A binary message, masked with zeros.
HELLO_FRAME = b"\x82\x85\x00\x00\x00\x00hello"
# A close with code 1000.
CLOSE_FRAME = b"\x88\x82\x00\x00\x00\x00\x03\xe8"


# ---- the client's end ----------------------------------------------------------------------------------------------


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the server's records during the block."""
        logger = logging.getLogger("orchard.net")
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)
        yield
        logger.setLevel(level)
        logger.removeHandler(self)


@dataclass(frozen=True)
class Contexts:
    server: ssl.SSLContext
    client: ssl.SSLContext


# Whether `RunningServer.connect` opens connections over TLS, and how.
TRANSPORT: ContextVar[Contexts | None] = ContextVar("TRANSPORT", default=None)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    need("openssl")
    directory: Path = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout"
    subprocess.run([*command.split(), key, "-out", certificate], check=True, capture_output=True)
    return Contexts(tls.server_context(certificate, key), ssl.create_default_context(cafile=certificate))


@pytest.fixture(params=["plain", "tls"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test over plain sockets and over TLS."""
    token = TRANSPORT.set(request.getfixturevalue("contexts") if request.param == "tls" else None)
    yield request.param
    TRANSPORT.reset(token)


def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ends = socket.socketpair()
    for end in ends:
        # Small, so that the bounds of the server show.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in ends)
    return ours, theirs


class TLSClient(trio.abc.HalfCloseableStream):
    """A client's end of TLS. Unlike trio's it can receive after a send has failed.

    `send_eof` ends the connection without close_notify, as many clients do.
    """

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext) -> None:
        self._stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    async def _call(self, call: Callable[[], T]) -> T:
        while True:
            try:
                result = call()
            except ssl.SSLWantReadError:
                await self._flush()
                if received := await self._stream.receive_some():
                    self._incoming.write(received)
                else:
                    self._incoming.write_eof()
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._stream.send_all(data)

    async def do_handshake(self) -> None:
        await self._call(self._tls.do_handshake)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            return await self._call(lambda: self._tls.read(max_bytes or 65536))
        except ssl.SSLEOFError:
            return b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self.do_handshake()
        except ssl.SSLEOFError as error:
            raise trio.BrokenResourceError from error
        for start in range(0, len(data), 16384):
            self._tls.write(data[start : start + 16384])
        await self._flush()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](100)

    def offer(self, stream: trio.abc.Stream) -> None:
        self._send.send_nowait(stream)

    def connect(self, pair: Sequence[trio.abc.Stream]) -> trio.abc.Stream:
        self.offer(pair[1])
        return pair[0]

    async def accept(self) -> trio.abc.Stream:
        return await self._receive.receive()

    async def aclose(self) -> None:
        self._receive.close()
        await trio.lowlevel.checkpoint()


class Counted(trio.abc.Stream):
    """Counts the bytes that the server has read."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.received = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        self.received += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class RunningServer:
    """A running server, its log and its connections."""

    def __init__(self) -> None:
        self.listener = MemoryListener()
        self.stop = trio.Event()
        self.records = Records()
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        self.contexts = TRANSPORT.get()
        self.sockets: list[trio.socket.SocketType] = []

    def connect(self) -> trio.abc.HalfCloseableStream:
        """Return a client's end of a connection, in the clear or over TLS as `transport` says.

        It is a pair of Unix sockets, so that the server reads and writes as it does in production, and bytes arrive as
        soon as they are sent. (They would not over TCP, and the virtual clock would run on.)
        """
        ours, theirs = socket_pair()
        self.sockets += [ours.socket, theirs.socket]
        if self.contexts is None:
            self.listener.offer(theirs)
            return ours
        self.listener.offer(TLSStream(theirs, self.contexts.server))
        return TLSClient(ours, self.contexts.client)

    async def open(self) -> trio.abc.HalfCloseableStream:
        """Return a client's end of a connection on which a request can be sent at once."""
        stream = self.connect()
        if isinstance(stream, TLSClient):
            await stream.do_handshake()
        await trio.testing.wait_all_tasks_blocked()
        return stream

    def connect_counted(self) -> tuple[trio.abc.Stream, Counted]:
        ours, theirs = trio.testing.memory_stream_pair()
        counted = Counted(theirs)
        return self.listener.connect((ours, counted)), counted

    @property
    def failures(self) -> list[logging.LogRecord]:
        return [record for record in self.records.records if record.levelno > logging.INFO]

    @property
    def requests(self) -> list[str]:
        """The request log: method, path, status, duration, account and peer."""
        logged = [vars(record) for record in self.records.records if record.msg == "request"]
        names = ("method", "path", "status", "duration_ms", "account", "peer")
        return [" ".join(str(fields[name]) for name in names) for fields in logged]


Handler = Callable[[Request], Awaitable[AnyResponse]]


@asynccontextmanager
async def serving(
    handler: Handler,
    *,
    admit: Callable[[Request], Sender] = admit_anybody,
    listeners: Sequence[trio.abc.Listener[Any]] = (),
    failures: int = 0,
    refuse_all: Callable[[], HTTPError | None] = lambda: None,
    **options: Any,
) -> AsyncIterator[RunningServer]:
    served = RunningServer()

    async def handle(request: Request, sender: Sender) -> AnyResponse:
        return await handler(request)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with served.scope:
            await serve(
                Service(handle, admit, refuse_all),
                [served.listener, *listeners],
                stop=served.stop,
                task_status=task_status,
                **options,
            )
        served.ended.set()

    with served.records.kept():
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            try:
                yield served
            finally:
                for end in served.sockets:
                    end.close()
            nursery.cancel_scope.cancel()
    assert len(served.failures) == failures, [record.getMessage() for record in served.failures]


@dataclass(frozen=True)
class Got:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        message = json.loads(self.body)["message"]
        assert isinstance(message, str)
        return message


class Client:
    """Reads answers from a stream with h11, one after another."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.buffer = b""
        self.eof = False
        self.informational: list[int] = []

    async def answer(self, method: str = "GET") -> Got | None:
        """Return the next answer, None if the connection ends before. Raises h11.RemoteProtocolError if it is cut off."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        if self.buffer:
            parser.receive_data(self.buffer)
        head: h11.Response | None = None
        body = b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await self.stream.receive_some()
                if not data and head is None and not parser.trailing_data[0]:
                    self.eof = True
                    return None
                parser.receive_data(bytes(data))
            elif isinstance(event, h11.InformationalResponse):
                self.informational.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                assert head is not None
                self.buffer = parser.trailing_data[0]
                return Got(head.status_code, {k.decode(): v.decode() for k, v in head.headers}, body)

    async def rest(self) -> bytes:
        """Return everything up to the end of the connection."""
        while data := await self.stream.receive_some():
            self.buffer += data
        return self.buffer

    async def sure(self, method: str = "GET") -> Got:
        got = await self.answer(method)
        assert got is not None, "the connection was closed without an answer"
        return got


async def is_closed(stream: trio.abc.Stream) -> bool:
    """Return whether the server closes a connection without an answer."""
    try:
        return await Client(stream).answer() is None
    except trio.BrokenResourceError:
        # It was closed before the client began its TLS handshake.
        return True


async def flood(stream: trio.abc.SendStream, piece: bytes, limit: int = 100_000_000) -> int:
    """Send a piece again and again until the server closes. Return how many bytes it took."""
    sent = 0
    while sent < limit:
        try:
            await stream.send_all(piece)
        except trio.BrokenResourceError:
            break
        sent += len(piece)
        await trio.testing.wait_all_tasks_blocked()
    return sent


async def echo(request: Request) -> AnyResponse:
    """Answer with what arrived."""
    told = {"method": request.method, "target": request.target, "body": request.body.decode("latin-1")}
    return Response(200, json.dumps(told).encode())


async def ask(data: bytes, handler: Handler = echo, **options: Any) -> tuple[list[Got], bool]:
    """Send bytes at once, then nothing. Return the answers, and whether the server closed the connection."""
    async with serving(handler, **options) as served:
        return await talk(served, [data])


async def talk(served: RunningServer, pieces: Sequence[bytes]) -> tuple[list[Got], bool]:
    stream = served.connect()
    client = Client(stream)
    for piece in pieces:
        try:
            await stream.send_all(piece)
        except trio.BrokenResourceError:
            break
        await trio.testing.wait_all_tasks_blocked()
    answers = []
    # The deadline is virtual: longer than head and body may take, shorter than a connection may be idle.
    with trio.move_on_after(60):
        while (answer := await client.answer()) is not None:
            answers.append(answer)
    return answers, client.eof


# ---- plain requests ------------------------------------------------------------------------------------------------


async def test_answer_has_date_server_and_length_headers(autojump_clock: Clock) -> None:
    before = int(time.time())
    answers, closed = await ask(GET)
    assert [answer.status for answer in answers] == [200]
    assert not closed
    date = email.utils.parsedate_to_datetime(answers[0].headers["date"])
    assert before <= date.timestamp() <= time.time()
    assert answers[0].headers == {
        "date": email.utils.format_datetime(date, usegmt=True),
        "server": "orchard",
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "content-length": str(len(answers[0].body)),
        "content-type": "application/json",
    }


async def test_pipelined_requests_are_answered_in_order(autojump_clock: Clock) -> None:
    posts = b"".join(
        b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (n, n, b"z" * n) for n in range(5)
    )
    chunked = (
        b"PUT /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0A\r\n0123456789\r\n0\r\n\r\n"
    )
    answers, closed = await ask(posts + chunked + GET)
    told = [json.loads(answer.body) for answer in answers]
    assert [(one["target"], one["body"]) for one in told] == [
        *((f"/{n}", "z" * n) for n in range(5)),
        ("/c", "abc0123456789"),
        ("/", ""),
    ]
    assert not closed


async def test_proxies_are_told_not_to_buffer_a_stream(autojump_clock: Clock) -> None:
    async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
        await send(b"a")

    async def handler(request: Request) -> AnyResponse:
        return Stream(produce) if request.path == "/stream" else Response(200, b"a")

    async with serving(handler) as served:
        stream = served.connect()
        client = Client(stream)
        for path, expected in ((b"/stream", "no"), (b"/", None)):
            await stream.send_all(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            assert (await client.sure("GET")).headers.get("x-accel-buffering") == expected


async def test_head_has_the_headers_of_get_and_no_body(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        if request.path == "/error":
            raise HTTPError(404, "nothing")
        return Response(200, b"12345")

    async with serving(handler) as served:
        stream = served.connect()
        client = Client(stream)
        for path, status, length in ((b"/", 200, 5), (b"/error", 404, 22), (b"/", 200, 5)):
            await stream.send_all(b"HEAD %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            got = await client.sure("HEAD")
            assert (got.status, got.headers["content-length"], got.body) == (status, str(length), b"")


@pytest.mark.parametrize("connection", [b"", b"Connection: keep-alive\r\n"])
async def test_http_1_0_is_answered_and_closed(autojump_clock: Clock, connection: bytes) -> None:
    answers, closed = await ask(b"GET /old HTTP/1.0\r\n" + connection + b"\r\n")
    assert json.loads(answers[0].body)["target"] == "/old"
    assert answers[0].headers["connection"] == "close"
    assert closed


async def test_connection_close_ends_the_connection(autojump_clock: Clock) -> None:
    answers, closed = await ask(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + GET)
    assert len(answers) == 1
    assert answers[0].headers["connection"] == "close"
    assert closed


async def test_empty_answer_has_no_content_type(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        return Response(204 if request.path == "/none" else 200, headers=[("X-Next-Cursor", "c")])

    answers, closed = await ask(GET + GET.replace(b"/ ", b"/none "), handler)
    assert not closed
    assert [answer.headers.get("content-length") for answer in answers] == ["0", None]
    assert [answer.headers.get("content-type") for answer in answers] == [None, None]
    assert answers[0].headers["x-next-cursor"] == "c"


async def test_error_raised_by_the_handler_keeps_the_connection(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        if request.path == "/grouped":
            async with trio.open_nursery():
                raise HTTPError(409, "the name is taken")
        raise HTTPError(401, "who are you?", (("WWW-Authenticate", 'Basic realm="orchard"'),))

    answers, closed = await ask(GET + GET.replace(b"/ ", b"/grouped "), handler)
    assert [(answer.status, answer.message) for answer in answers] == [
        (401, "who are you?"),
        (409, "the name is taken"),
    ]
    assert answers[0].headers["www-authenticate"] == 'Basic realm="orchard"'
    assert not closed


async def test_unexpected_exception_is_answered_with_500_and_logged_once(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        raise KeyError("secret")

    async with serving(handler, failures=1) as served:
        answers, closed = await talk(served, [GET])
        assert [(answer.status, answer.body) for answer in answers] == [(500, b'{"message":"internal error"}\n')]
        assert answers[0].headers["connection"] == "close"
        assert closed
        assert served.failures[0].exc_info is not None
        assert served.requests == ["GET / 500 0.0 - -"]


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 5001])
async def test_answer_in_pieces_arrives_whole(autojump_clock: Clock, count: int) -> None:
    pieces = [b"%d," % number * 50 for number in range(count)]

    async def handler(request: Request) -> AnyResponse:
        return Response(200, pieces)

    answers, closed = await ask(GET + GET, handler)
    assert [(answer.status, answer.body) for answer in answers] == [(200, b"".join(pieces))] * 2
    assert not closed


@asynccontextmanager
async def over_a_socket(handler: Handler, **options: Any) -> AsyncIterator[tuple[RunningServer, trio.SocketStream]]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with (
        serving(handler, listeners=listeners, **options) as served,
        await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1]) as stream,
    ):
        yield served, stream


async def test_socket_of_a_reader_that_takes_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP: small writes there have no cancel scope, and a slow reader's socket is closed by another task."""
    monkeypatch.setattr(orchard.net.connection, "_LOOK_SECONDS", 0.01)
    ended = trio.Event()

    async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            while True:
                await send(b"x" * 100_000)
        finally:
            ended.set()

    async def handler(request: Request) -> AnyResponse:
        return Stream(produce)

    async with over_a_socket(handler, limits=Limits(send_seconds=0.05)) as (_, stream):
        await stream.send_all(GET)
        with trio.fail_after(60):
            await ended.wait()


async def test_pipelined_requests_leave_other_tasks_their_turns() -> None:
    """Over TCP: what has arrived there is read without waiting."""
    turns, answered_in = 0, list[int]()

    async def handler(request: Request) -> AnyResponse:
        answered_in.append(turns)
        return Response(200)

    async with over_a_socket(handler) as (_, stream), trio.open_nursery() as nursery:

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        nursery.start_soon(other)
        await stream.send_all(GET * 100)
        await stream.send_eof()
        async for _ in stream:
            pass
        nursery.cancel_scope.cancel()
    assert len(answered_in) == 100
    assert max(Counter(answered_in).values()) <= 2, "the order within a round of the loop is random"


async def test_answer_larger_than_the_socket_buffer_arrives_whole() -> None:
    answer = bytes(range(256)) * 40_000

    async def handler(request: Request) -> AnyResponse:
        return Response(200, answer)

    async with over_a_socket(handler) as (_, stream):
        await stream.send_all(GET * 2)
        got = bytearray()
        while len(got) < 2 * len(answer) or not got.endswith(answer):
            got += await stream.receive_some(10_000)
        assert got.count(answer) == 2


async def test_client_reset_before_its_answer_is_not_an_error() -> None:
    gone = trio.Event()

    async def handler(request: Request) -> AnyResponse:
        await gone.wait()
        return Response(200)

    async with over_a_socket(handler) as (served, stream):
        await stream.send_all(GET * 2)
        await trio.testing.wait_all_tasks_blocked()
        # With this option, closing the socket resets the connection.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        gone.set()
        served.stop.set()
        await served.ended.wait()


@pytest.mark.parametrize("headers", [[("X-Bad", "a\r\nB: c")], [("X-Bad", "\u20ac")], [("Content-Length", "1")]])
async def test_illegal_answer_header_is_answered_with_500(
    autojump_clock: Clock, headers: list[tuple[str, str]]
) -> None:
    async def handler(request: Request) -> AnyResponse:
        return Response(200, headers=headers)

    answers, closed = await ask(GET, handler, failures=1)
    assert [answer.status for answer in answers] == [500]
    assert closed


async def test_headers_and_query_reach_the_handler(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        assert request.headers.get("x-twice") == "a, b\xe9"
        assert request.headers.get("absent") is None
        assert (request.path, request.query.one("q"), request.peer) == ("/a%2Fb", "1 2/\xe9", "-")
        return Response(200)

    head = b"GET /a%2Fb?q=1+2%2F%C3%A9 HTTP/1.1\r\nHost: [::1]:80\r\nX-Twice:a\r\nx-twice: \t b\xe9 \r\n\r\n"
    assert [answer.status for answer in (await ask(head, handler))[0]] == [200]


async def test_request_log_leaves_out_the_query(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        await trio.sleep(0.25)
        return Response(404)

    def admit(request: Request) -> Sender:
        request.account = "eve"
        return Sender()

    async with serving(handler, admit=admit) as served:
        await talk(served, [GET.replace(b"/ ", b"/v1/vms%0a?token=secret ") + b"BAD\r\n\r\n"])
    assert served.requests == ["GET /v1/vms%0a 404 250.0 eve -", "- - 400 0.0 - -"]
    assert vars(served.records.records[0])["duration_ms"] == 250.0
    assert "secret" not in repr([vars(record) for record in served.records.records])


# ---- 100-continue, admission ---------------------------------------------------------------------------------------

EXPECTING = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: %d\r\n\r\n"


async def test_100_continue_is_sent_before_the_body_is_read(autojump_clock: Clock) -> None:
    async with serving(echo) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(EXPECTING % 3)
        assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(b"abc" + GET)
        assert json.loads((await client.sure()).body)["body"] == "abc"
        assert (await client.sure()).status == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (EXPECTING % 0, 200),
        (EXPECTING % 3 + b"abc", 200),
        (EXPECTING % 1025, 413),
        (EXPECTING.replace(b"POST /", b"POST /refused") % 3, 401),
        ((EXPECTING % 0).replace(b"1.1", b"1.0"), 200),
    ],
)
async def test_100_continue_is_not_sent_if_the_body_is_here_or_refused(
    autojump_clock: Clock, request_bytes: bytes, status: int
) -> None:
    def admit(request: Request) -> Sender:
        if request.path == "/refused":
            raise HTTPError(401, "who are you?")
        return Sender(body_limit=1024)

    async with serving(echo, admit=admit) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(request_bytes)
        assert (await client.sure()).status == status
        assert client.informational == []


async def test_refused_admission_closes_only_if_a_body_is_unread(autojump_clock: Clock) -> None:
    def admit(request: Request) -> Sender:
        assert request.body == b""
        request.account = "somebody"
        raise HTTPError(403, "you may not")

    async with serving(echo, admit=admit) as served:
        answers, closed = await talk(served, [GET + GET])
        assert [answer.status for answer in answers] == [403, 403]
        assert not closed
        answers, closed = await talk(served, [EXPECTING % 3])
        assert [(answer.status, answer.headers["connection"]) for answer in answers] == [(403, "close")]
        assert closed
        assert served.requests[0] == "GET / 403 0.0 somebody -"


# ---- requests that are refused and accepted ------------------------------------------------------------------------


def post(*headers: bytes, body: bytes = b"", version: bytes = b"1.1", target: bytes = b"/") -> bytes:
    lines = [b"POST " + target + b" HTTP/" + version, b"Host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


CHUNKED = b"Transfer-Encoding: chunked"
# Each entry: the status of the answer, the request, and a word that its message has. What two parsers could read
# differently is refused although RFC 9110 and RFC 9112 leave it open.
REFUSED: dict[str, tuple[int, bytes, str]] = {
    # RFC 9112, section 6.3, rule 3, and section 6.1: the framing is ambiguous.
    "length and coding": (400, post(b"Content-Length: 3", CHUNKED, body=b"0\r\n\r\n"), "content-length"),
    "coding and length": (400, post(CHUNKED, b"Content-Length: 3", body=b"0\r\n\r\n"), "content-length"),
    "coding in 1.0": (400, post(CHUNKED, body=b"0\r\n\r\n", version=b"1.0"), "HTTP/1.0"),
    # RFC 9112, section 6.3, rule 5: an invalid length. A list of equal lengths may be refused.
    "length as a list": (400, post(b"Content-Length: 1, 1", body=b"a"), "1, 1"),
    "length twice": (400, post(b"Content-Length: 1", b"Content-Length: 1", body=b"a"), "content-length"),
    "two lengths": (400, post(b"Content-Length: 1", b"Content-Length: 2", body=b"a"), "Content-Length"),
    "length signed": (400, post(b"Content-Length: +1", body=b"a"), "Content-Length"),
    "length negative": (400, post(b"Content-Length: -1", body=b"a"), "Content-Length"),
    "length hexadecimal": (400, post(b"Content-Length: 0x1", body=b"a"), "Content-Length"),
    "length empty": (400, post(b"Content-Length:", body=b"a"), "Content-Length"),
    "length of 20 digits": (400, post(b"Content-Length: 18446744073709551617", body=b"a"), "18446744073709551617"),
    "length of 19 zeros": (400, post(b"Content-Length: 0000000000000000001", body=b"a"), "0000000000000000001"),
    "length in other digits": (400, post(b"Content-Length: \xd9\xa1", body=b"a"), "Content-Length"),
    "length with a blank": (400, post(b"Content-Length: 1 1", body=b"a"), "Content-Length"),
    "length with an empty member": (400, post(b"Content-Length: 1,", body=b"a"), "Content-Length"),
    "length underscored": (400, post(b"Content_Length: 1", body=b"a"), "content_length"),
    "coding underscored": (400, post(b"Transfer_Encoding: chunked"), "transfer_encoding"),
    # RFC 9112, section 6.1: an unknown coding is answered with 501.
    "another coding": (501, post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), "chunked"),
    "coding after chunked": (501, post(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"), "chunked"),
    "coding with a parameter": (501, post(b"Transfer-Encoding: chunked;a=b", body=b"0\r\n\r\n"), "chunked"),
    "identity coding": (501, post(b"Transfer-Encoding: identity"), "chunked"),
    "xchunked": (501, post(b"Transfer-Encoding: xchunked"), "chunked"),
    "coding twice": (501, post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"), "Transfer-Encoding"),
    "chunked twice": (501, post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), "chunked"),
    "vertical tab before the coding": (400, post(b"Transfer-Encoding: \x0bchunked"), "control character"),
    # RFC 9112, section 5.1: no blank before the colon. Section 5.2: folded lines may be refused.
    "blank before the colon": (400, post(b"Content-Length : 1", body=b"a"), "header line"),
    "folded header": (400, post(b"X-A: b", b" c: d"), "folded"),
    "folded with a tab": (400, post(b"X-A: b", b"\tc"), "folded"),
    # RFC 9112, section 2.2: blanks between the first line and the headers.
    "folded first header": (400, b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", "folded"),
    "no colon": (400, post(b"X-A"), "header line"),
    "no name": (400, post(b": a"), "header line"),
    # RFC 9112, section 2.2: a bare LF may be read as a line end, and a bare CR must not.
    "bare LF": (400, b"GET / HTTP/1.1\nHost: x\n\n", "bare CR or LF"),
    "bare LF in a header": (400, post(b"X-A: b\nContent-Length: 3"), "bare CR or LF"),
    "bare LF before the end": (400, post(b"X-A: b\n"), "bare CR or LF"),
    "bare CR": (400, post(b"X-A: b\rContent-Length: 3"), "bare CR or LF"),
    "CR CR LF": (400, post(b"X-A: b\r"), "bare CR or LF"),
    # RFC 9110, section 5.5: control characters.
    "NUL": (400, post(b"X-A: b\x00c"), "control character"),
    "another control character": (400, post(b"X-A: b\x01c"), "control character"),
    "DEL": (400, post(b"X-A: b\x7fc"), "control character"),
    "NUL in the target": (400, post(target=b"/\x00"), "control character"),
    # RFC 9112, section 2.3, and RFC 9110, section 15.6.6.
    "HTTP/2.0": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2.0"),
    "HTTP/2.1": (505, post(version=b"2.1"), "HTTP/2.1"),
    "HTTP/0.9": (400, b"GET /\r\n\r\n", "request line"),
    "HTTP/1.10": (400, post(version=b"1.10"), "request line"),
    "HTTP/01.1": (400, post(version=b"01.1"), "request line"),
    "small http": (400, b"GET / http/1.1\r\nHost: x\r\n\r\n", "request line"),
    # RFC 9112, section 3: a request line that is not exact may be refused.
    "two blanks": (400, b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", "request line"),
    "blank in the target": (400, post(target=b"/a b"), "request line"),
    "two empty lines first": (400, b"\r\n\r\n" + GET, "request line"),
    "blank before the method": (400, b" " + GET, "request line"),
    # RFC 9112, section 3.2: forms of the target that are for proxies.
    "authority form": (400, b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n", "x:80"),
    "asterisk form": (400, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "target"),
    "CONNECT": (400, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", "target"),
    "CONNECT with a path": (400, b"CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n", "target"),
    "CONNECT with a URL": (400, b"CONNECT http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", "target"),
    "absolute form of another scheme": (400, post(target=b"ftp://x/"), "ftp://x/"),
    "absolute form without a host": (400, post(target=b"http:///"), "http:///"),
    # RFC 9110, section 4.2.4.
    "absolute form with a user": (400, post(target=b"http://a@x/"), "a@x"),
    "absolute form without Host": (400, b"GET http://x/ HTTP/1.1\r\n\r\n", "Host"),
    "fragment": (400, post(target=b"/a#b"), "fragment"),
    "fragment in absolute form": (400, post(target=b"http://x/a#b"), "fragment"),
    "target not ASCII": (400, post(target=b"/\xc3\xa9"), "request line"),
    # RFC 9112, section 3.2: Host is missing, repeated or invalid.
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n", "Host"),
    "no host in HTTP/1.2": (400, b"GET / HTTP/1.2\r\n\r\n", "Host"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", "Host"),
    "two hosts in 1.0": (400, b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", "Host"),
    "host with a path": (400, b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", "x/y"),
    "host with a user": (400, b"GET / HTTP/1.1\r\nHost: a@x\r\n\r\n", "a@x"),
    "host empty": (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n", "host"),
    "host with an open bracket": (400, b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", "host"),
    "credentials twice": (400, post(b"Authorization: a", b"authorization: b"), "authorization"),
    "key twice": (400, post(b"Sec-WebSocket-Key: a", b"Sec-WebSocket-Key: a"), "sec-websocket-key"),
    # RFC 9110, section 10.1.1.
    "unknown expect": (417, post(b"Expect: 200-ok"), "200-ok"),
    "known and unknown expect": (417, post(b"Expect: 100-continue, 200-ok"), "200-ok"),
    # RFC 9110, section 8.4.
    "gzip": (415, post(b"Content-Encoding: gzip", b"Content-Length: 3", body=b"abc"), "gzip"),
    "TLS": (400, bytes.fromhex("16030100c0010000bc0303") + b"\x00" * 200, "control character"),
    # RFC 9112, section 7.1.
    "blank after a chunk size": (400, post(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"), "3 "),
    "blank before a chunk size": (400, post(CHUNKED, body=b" 3\r\nabc\r\n0\r\n\r\n"), " 3"),
    "blank before an extension": (400, post(CHUNKED, body=b"3 ;a\r\nabc\r\n0\r\n\r\n"), "3 ;a"),
    "chunk size of 17 digits": (400, post(CHUNKED, body=b"00000000000000003\r\nabc\r\n0\r\n\r\n"), "digits"),
    "chunk size of 20 digits": (400, post(CHUNKED, body=b"fffffffffffffffffff3\r\nabc\r\n0\r\n\r\n"), "digits"),
    "chunk size of no digit": (400, post(CHUNKED, body=b"\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "chunk size 0x3": (400, post(CHUNKED, body=b"0x3\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "chunk size signed": (400, post(CHUNKED, body=b"+3\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "last chunk size of 17 digits": (400, post(CHUNKED, body=b"00000000000000000\r\n\r\n"), "digits"),
    "LF after a chunk size": (400, post(CHUNKED, body=b"3\nabc\r\n0\r\n\r\n"), "chunk"),
    "CR in a chunk size": (400, post(CHUNKED, body=b"3\r3\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "CR in a chunk extension": (400, post(CHUNKED, body=b"3;a\rb\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "LF in a chunk extension": (400, post(CHUNKED, body=b"3;a\nb\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "NUL in a chunk extension": (400, post(CHUNKED, body=b"3;\x00\r\nabc\r\n0\r\n\r\n"), "chunk"),
    "LF after a chunk": (400, post(CHUNKED, body=b"3\r\nabc\n0\r\n\r\n"), "chunk"),
    "chunk too long": (400, post(CHUNKED, body=b"3\r\nabcd\r\n0\r\n\r\n"), "chunk"),
    # RFC 9112, section 7.1.2, and RFC 9110, section 6.5.1: fields that a trailer must not have.
    "LF for the last line": (400, post(CHUNKED, body=b"0\r\n\nX"), "bare CR or LF"),
    "LF after a trailer": (400, post(CHUNKED, body=b"0\r\nX-A: b\n\r\n"), "bare CR or LF"),
    "LF after the last trailer": (400, post(CHUNKED, body=b"0\r\nX-A: b\r\n\n"), "bare CR or LF"),
    "folded trailer": (400, post(CHUNKED, body=b"0\r\nX-A: b\r\n c\r\n\r\n"), "folded"),
    "length in a trailer": (400, post(CHUNKED, body=b"0\r\nContent-Length: 3\r\n\r\n"), "content-length"),
    "coding in a trailer": (400, post(CHUNKED, body=b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), "transfer-encoding"),
    "credentials in a trailer": (400, post(CHUNKED, body=b"0\r\nAuthorization: a\r\n\r\n"), "authorization"),
    "underscores in a trailer": (400, post(CHUNKED, body=b"0\r\nContent_Length: 3\r\n\r\n"), "content_length"),
    "trailer without a colon": (400, post(CHUNKED, body=b"0\r\nX-A\r\n\r\n"), "header line"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_ambiguous_request_is_refused_and_the_connection_closed(autojump_clock: Clock, name: str) -> None:
    status, data, told = REFUSED[name]
    answers, closed = await ask(data + GET)
    assert [answer.status for answer in answers] == [status]
    assert told in answers[0].message
    assert answers[0].headers["connection"] == "close"
    assert closed
    assert trio.current_time() < 10, "refused by a deadline"


@pytest.mark.parametrize("pieces", [[b"GET / HTTP/1.1\r", b"X"], [b"GET / HTTP/1.1", b"\n"], [b"GET /\x00"]])
async def test_illegal_head_is_refused_before_its_end(autojump_clock: Clock, pieces: list[bytes]) -> None:
    async with serving(echo) as served:
        answers, closed = await talk(served, pieces)
        assert [answer.status for answer in answers] == [400]
        assert closed
        assert trio.current_time() < 10


# Each entry: the request, and the target and body that the handler gets.
ACCEPTED: dict[str, tuple[bytes, str, str]] = {
    "get": (GET, "/", ""),
    "post": (post(b"Content-Length: 11", body=b"hello world"), "/", "hello world"),
    "other upgrade refused by the handler": (UPGRADE, "/ws", ""),
    "obs-text and tabs": (
        b'GET /~a?b{c}|d"e HTTP/1.1\r\nHost:\tx:80\t\r\nX-A:  \xff\t\x80 \r\nX-Empty:\r\n\r\n',
        '/~a?b{c}|d"e',
        "",
    ),
    "405 characters of method": (b"A" * 405 + GET[3:], "/", ""),
    # RFC 9112, section 2.2: an empty line before the request line is ignored.
    "empty line first": (b"\r\n" + GET, "/", ""),
    "empty line before a chunked body": (b"\r\n" + post(CHUNKED, body=b"1\r\na\r\n0\r\n\r\n"), "/", "a"),
    # RFC 9110, section 2.5: a later minor version is read as 1.1.
    "HTTP/1.2": (post(b"Content-Length: 1", body=b"a", version=b"1.2"), "/", "a"),
    "HTTP/1.9, chunked": (post(CHUNKED, body=b"1\r\na\r\n0\r\n\r\n", version=b"1.9"), "/", "a"),
    # RFC 9112, section 3.2.2: the absolute form must be accepted.
    "absolute form": (post(target=b"http://other:80/a?b"), "/a?b", ""),
    "absolute form of https in capitals": (post(target=b"HTTPS://x/a"), "/a", ""),
    "absolute form without a path": (post(target=b"http://x"), "/", ""),
    "absolute form with a query only": (post(target=b"http://x?a=b"), "/?a=b", ""),
    "absolute form with IPv6": (post(target=b"http://[::1]:80/"), "/", ""),
    "absolute form and chunks": (post(CHUNKED, body=b"1\r\na\r\n0\r\n\r\n", target=b"http://x/a"), "/a", "a"),
    # RFC 9112, section 3.2, and RFC 3986, section 3.2.2; RFC 6874: zones.
    "Host with IPv6": (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", "/", ""),
    "Host with IPv4 in IPv6": (b"GET / HTTP/1.1\r\nHost: [::ffff:10.0.0.1]\r\n\r\n", "/", ""),
    "Host with an encoded zone": (b"GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]:80\r\n\r\n", "/", ""),
    "Host with a zone": (b"GET / HTTP/1.1\r\nHost: [fe80::1%eth0]\r\n\r\n", "/", ""),
    "Host with a future address": (b"GET / HTTP/1.1\r\nHost: [v7.a:b]\r\n\r\n", "/", ""),
    "Host with an empty port": (b"GET / HTTP/1.1\r\nHost: x:\r\n\r\n", "/", ""),
    # RFC 9110, section 5.6.1.2: empty members of lists are ignored.
    "lists with empty members": (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: , keep-alive,, TE\r\nExpect: ,100-continue,\r\n\r\n",
        "/",
        "",
    ),
    # RFC 9112, section 5: optional blanks around a value.
    "blanks around the length": (post(b"Content-Length:  \t1\t ", body=b"a"), "/", "a"),
    "blanks around the coding": (post(b"Transfer-Encoding:\t chunked \t", body=b"0\r\n\r\n"), "/", ""),
    "no blank before a value": (post(b"Content-Length:1", body=b"a"), "/", "a"),
    # RFC 9112, section 7: names of codings in any case.
    "Chunked": (post(b"TRANSFER-encoding: cHunKed", body=b"1\r\na\r\n0\r\n\r\n"), "/", "a"),
    # RFC 9112, section 6.3: any method may have a body.
    "chunked get": (b"GET / HTTP/1.1\r\nHost: x\r\n" + CHUNKED + b"\r\n\r\n2\r\nab\r\n0\r\n\r\n", "/", "ab"),
    # RFC 9110, section 10.1.1: expectations in any case, and again; the body is here already.
    "Expect in capitals": (post(b"Expect: 100-CONTINUE", b"Content-Length: 1", body=b"a"), "/", "a"),
    "Expect twice": (
        post(b"Expect: 100-continue", b"Expect: 100-continue", b"Content-Length: 1", body=b"a"),
        "/",
        "a",
    ),
    # RFC 9110, section 8.4.1.
    "identity": (post(b"Content-Encoding: Identity", b"Content-Length: 1", body=b"a"), "/", "a"),
    # RFC 9112, section 7.1.
    "chunks": (post(CHUNKED, body=b"3\r\nabc\r\n00F\r\n0123456789abcde\r\n000\r\n\r\n"), "/", "abc0123456789abcde"),
    "chunk size in capitals": (post(CHUNKED, body=b"0A\r\n0123456789\r\n0\r\n\r\n"), "/", "0123456789"),
    "chunk size of 16 digits": (post(CHUNKED, body=b"0000000000000003\r\nabc\r\n0\r\n\r\n"), "/", "abc"),
    # RFC 9112, section 7.1.1: unknown extensions must be ignored.
    "chunk extensions": (
        post(CHUNKED, body=b'3;a=b;c\r\nabc\r\n1; x = "y;\t\xe9"\r\nd\r\n0;last\r\n\r\n'),
        "/",
        "abcd",
    ),
    "long chunk extension": (post(CHUNKED, body=b"3;" + b"a" * 9000 + b"\r\nabc\r\n0\r\n\r\n"), "/", "abc"),
    # RFC 9112, section 7.1.2: trailers may be discarded.
    "trailers": (post(CHUNKED, body=b"1\r\na\r\n0\r\nX-A: b\r\nX-Checksum:c\r\n\r\n"), "/", "a"),
}


@pytest.mark.parametrize("name", ACCEPTED)
async def test_conforming_request_is_accepted(autojump_clock: Clock, name: str) -> None:
    data, target, body = ACCEPTED[name]
    answers, closed = await ask(data + GET)
    assert [answer.status for answer in answers] == [200, 200]
    told = json.loads(answers[0].body)
    assert (told["target"], told["body"]) == (target, body)
    assert not closed


UPGRADES = {
    # RFC 9110, section 7.8: an Upgrade may be ignored. Java's HTTP client and `curl --http2` send the first one.
    "h2c": (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
    "h2c without the connection option": (b"Upgrade: h2c",),
    "a list": (b"Connection: Upgrade", b"Upgrade: TLS/1.0, h2c"),
    "two headers": (b"Connection: Upgrade", b"Upgrade: TLS/1.0", b"Upgrade: websocket"),
}


@pytest.mark.parametrize("name", UPGRADES)
@pytest.mark.parametrize("framing", [b"Content-Length: 3\r\n\r\nabc", CHUNKED + b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n"])
async def test_unknown_upgrade_is_ignored_and_the_connection_closed(
    autojump_clock: Clock, name: str, framing: bytes
) -> None:
    answers, closed = await ask(post(*UPGRADES[name])[:-2] + framing + GET)
    assert [answer.status for answer in answers] == [200]
    assert json.loads(answers[0].body)["body"] == "abc"
    assert answers[0].headers["connection"] == "close"
    assert closed


async def test_absolute_form_replaces_host(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        return Response(200, (request.headers.get("host") or "").encode())

    answers, _ = await ask(post(target=b"http://other:80/") + post() + post(target=b"http://other/"), handler)
    assert [answer.body for answer in answers] == [b"other:80", b"x", b"other"]


async def test_refused_header_block_is_refused_every_time(autojump_clock: Clock) -> None:
    async with serving(echo) as served:
        for _ in range(3):
            for name in ("length as a list", "no host", "unknown expect", "NUL"):
                answers, closed = await talk(served, [REFUSED[name][1]])
                assert [answer.status for answer in answers] == [REFUSED[name][0]]
                assert closed


async def test_same_header_lines_with_another_version_are_judged_again(autojump_clock: Clock) -> None:
    async with serving(echo) as served:
        for version, status in ((b"1.1", 200), (b"1.0", 400), (b"1.1", 200)):
            data = post(CHUNKED, body=b"0\r\n\r\n", version=version)
            answers, _ = await talk(served, [data])
            assert [answer.status for answer in answers] == [status]


async def test_request_line_beyond_the_limit_is_answered_with_414(autojump_clock: Clock) -> None:
    answers, closed = await ask(b"GET /" + b"a" * 20_000)
    assert [answer.status for answer in answers] == [414]
    assert closed


async def test_empty_line_between_requests_leaves_the_connection_idle(autojump_clock: Clock) -> None:
    async with serving(echo) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(GET + b"\r\n")
        assert (await client.sure()).status == 200
        await trio.sleep(50)
        await stream.send_all(GET + b"\r\n" + GET)
        assert [(await client.sure()).status for _ in range(2)] == [200, 200]
        assert await client.rest() == b""
        assert trio.current_time() == pytest.approx(50 + 100)


def readings(outcome: tuple[list[Got], bool]) -> list[object]:
    answers, closed = outcome
    return [closed, *((answer.status, answer.status == 200 and answer.body) for answer in answers)]


@pytest.mark.slow
async def test_requests_read_byte_by_byte_are_read_the_same(autojump_clock: Clock) -> None:
    requests = {name: data + GET for name, (data, _, _) in ACCEPTED.items() if len(data) < 500}
    requests |= {name: data + GET for name, (_, data, _) in REFUSED.items() if len(data) < 500}
    async with serving(echo) as served:
        for name, data in requests.items():
            at_once = await talk(served, [data])
            piecewise = await talk(served, [data[n : n + 1] for n in range(len(data))])
            # h11's messages quote what had arrived.
            assert readings(at_once) == readings(piecewise), name
            assert at_once[0], name
            if name in ACCEPTED:
                assert {answer.status for answer in at_once[0]} == {200}, name


@pytest.mark.parametrize("cut", range(1, 12))
async def test_chunked_body_in_two_parts_is_read_the_same(autojump_clock: Clock, cut: int) -> None:
    data = post(CHUNKED, body=b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n") + GET
    start = len(data) - len(GET) - cut
    async with serving(echo) as served:
        answers, _ = await talk(served, [data[:start], data[start:]])
    assert [json.loads(answer.body)["body"] for answer in answers] == ["hello!", ""]


# ---- limits --------------------------------------------------------------------------------------------------------


async def test_head_up_to_the_limit_is_accepted(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(header_bytes=200)) as served:
        for over in (0, 1):
            head = post(b"X-A: " + b"a" * (200 - len(post(b"X-A: ")) + over))
            assert len(head) == 200 + over
            answers, closed = await talk(served, [head])
            assert [answer.status for answer in answers] == [431 if over else 200]
            assert closed == bool(over)


async def test_endless_head_is_refused_at_the_limit(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(linger_bytes=1000)) as served:
        stream = served.connect()
        assert await flood(stream, b"X-A: 0123456789\r\n" * 100) < 20_000
        assert (await Client(stream).sure()).status == 431


async def test_too_many_headers_are_refused(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(header_count=5)) as served:
        for more, status in ((4, 200), (5, 431)):
            answers, _ = await talk(served, [post(*[b"A: b"] * more)])
            assert [answer.status for answer in answers] == [status]


async def test_body_up_to_the_limit_is_accepted(autojump_clock: Clock) -> None:
    async with serving(echo, admit=lambda _: Sender(body_limit=1000)) as served:
        for size, status in ((1000, 200), (1001, 413)):
            body = b"a" * size
            for data in (
                post(b"Content-Length: %d" % size, body=body),
                post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)),
                post(CHUNKED, body=b"3e7\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:999], size - 999, body[999:])),
            ):
                answers, closed = await talk(served, [data])
                assert [answer.status for answer in answers] == [status]
                assert closed == (status == 413)


@pytest.mark.slow
async def test_endless_request_is_refused_within_limit_and_memory(autojump_clock: Clock) -> None:
    limit = 1024 * 1024
    bombs = {
        "sized": (post(b"Content-Length: 1000000000"), b"a" * 8192, 64 * 1024),
        "chunked": (post(CHUNKED), b"1FFE\r\n" + b"a" * 8190 + b"\r\n", limit + 64 * 1024),
        "one byte a chunk": (post(CHUNKED), b"1\r\na\r\n" * 1000, 128 * 1024),
        "trailers": (post(CHUNKED, body=b"0\r\n"), b"X-A: b\r\n" * 1000, 64 * 1024),
        "headers": (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n" * 1000, 64 * 1024),
    }
    admit, limits = lambda _: Sender(body_limit=limit), Limits(linger_bytes=16 * 1024)
    async with serving(echo, admit=admit, limits=limits) as served:
        for name, (start, piece, expected) in bombs.items():
            stream = served.connect()
            tracemalloc.start()
            await stream.send_all(start)
            sent = await flood(stream, piece)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert (await Client(stream).sure()).status in (400, 413, 431), name
            assert sent <= expected, name
            assert peak <= 2 * limit, name


async def test_longest_idle_connection_is_closed_for_a_new_one(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(connections=3)) as served:
        clients = [Client(await served.open()) for _ in range(3)]
        await clients[0].stream.send_all(GET)
        assert (await clients[0].sure()).status == 200
        await trio.testing.wait_all_tasks_blocked()
        newcomer = served.connect()
        await newcomer.send_all(GET)
        assert (await Client(newcomer).sure()).status == 200
        assert await clients[1].answer() is None
        await clients[0].stream.send_all(GET)
        assert (await clients[0].sure()).status == 200


async def test_each_new_connection_closes_another_idle_one(autojump_clock: Clock) -> None:
    others = [MemoryListener() for _ in range(5)]
    async with serving(echo, listeners=others, limits=Limits(connections=5)) as served:
        idle = [Client(await served.open()) for _ in range(5)]
        newcomers = [Client(listener.connect(trio.testing.memory_stream_pair())) for listener in others]
        assert [await client.answer() for client in idle] == [None] * 5
        for client in newcomers:
            await client.stream.send_all(GET)
            assert (await client.sure()).status == 200


async def test_connection_is_refused_if_all_others_are_busy(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        await trio.sleep(5)
        return Response(200)

    async with serving(handler, limits=Limits(connections=1), failures=1) as served:
        busy = served.connect()
        await busy.send_all(GET)
        await trio.testing.wait_all_tasks_blocked()
        assert await is_closed(served.connect())
        assert (await Client(busy).sure()).status == 200


# ---- clients that hold what others need ----------------------------------------------------------------------------


def admit_public(request: Request) -> Sender:
    """Let anybody ask, as for a public path, except with credentials."""
    return Sender(authenticated=request.headers.get("authorization") is not None)


LOGIN = GET[:-2] + b"Authorization: x\r\n\r\n"
# What a client may send and then be silent.
SILENCES = {
    "nothing": b"",
    "half a head": GET[:-10],
    "half a body": post(b"Content-Length: 5", body=b"abc"),
    "half a chunk": post(CHUNKED, body=b"5\r\nabc"),
    "a public request": GET,
    "a request whose answer it does not read": GET.replace(b"/ ", b"/large "),
}


async def large_or_echo(request: Request) -> AnyResponse:
    return Response(200, b"a" * 500_000) if request.path == "/large" else await echo(request)


@pytest.mark.parametrize("silence", SILENCES)
async def test_oldest_connection_without_credentials_makes_room(autojump_clock: Clock, silence: str) -> None:
    async with serving(large_or_echo, admit=admit_public, limits=Limits(unauthenticated_of_source=3)) as served:
        members, strangers = [], []
        for _ in range(4):
            members.append(Client(await served.open()))
            await members[-1].stream.send_all(LOGIN)
            assert (await members[-1].sure()).status == 200
        for _ in range(10):
            strangers.append(await served.open())
            await strangers[-1].send_all(SILENCES[silence])
            await trio.testing.wait_all_tasks_blocked()
            newcomer = Client(await served.open())
            await newcomer.stream.send_all(LOGIN)
            assert (await newcomer.sure()).status == 200
        # The debug log has the connections that broke. One of three made room for each newcomer.
        assert (
            sum(record.levelno == logging.DEBUG and record.msg != "request" for record in served.records.records) == 8
        )
        for member in members:
            await member.stream.send_all(GET)
            assert (await member.sure()).status == 200
        assert trio.current_time() == 0


async def test_connections_without_credentials_are_bounded_in_all(autojump_clock: Clock) -> None:
    async with serving(echo, admit=admit_public, limits=Limits(unauthenticated=3)) as served:
        clients = [Client(await served.open()) for _ in range(5)]
        assert [await is_closed(client.stream) for client in clients[:2]] == [True, True]
        for client in clients[2:]:
            await client.stream.send_all(GET)
            assert (await client.sure()).status == 200


@pytest.mark.parametrize("size", [0, 2, 4096, 4097])
@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"POST"])
async def test_body_that_the_operation_does_not_take_is_ignored_if_it_is_small(
    autojump_clock: Clock, method: bytes, size: int
) -> None:
    body = b"a" * size
    async with serving(echo, admit=lambda _: Sender(body_limit=0)) as served:
        for data in (
            post(b"Content-Length: %d" % size, body=body),
            post(b"Expect: 100-continue", b"Content-Length: %d" % size, body=body),
            post(CHUNKED, body=(b"%x\r\n%b\r\n" % (size, body) if body else b"") + b"0\r\n\r\n"),
        ):
            answers, closed = await talk(served, [data.replace(b"POST", method) + GET])
            if size > 4096:
                assert [answer.status for answer in answers] == [413]
                assert closed
            else:
                assert [json.loads(answer.body)["body"] for answer in answers] == ["", ""]
                assert not closed


async def test_oldest_head_makes_room_when_all_unfinished_heads_are_too_large(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(held_bytes=16 * 10_000)) as served:
        halves = [Client(await served.open()) for _ in range(5)]
        for half in halves:
            await half.stream.send_all(GET[:-2] + b"X-A: " + b"a" * 3_000)
            await trio.testing.wait_all_tasks_blocked()
        assert [await half.answer() for half in halves[:2]] == [None, None]
        for half in halves[2:]:
            await half.stream.send_all(b"\r\n\r\n")
            assert (await half.sure()).status == 200
        assert trio.current_time() == 0


async def test_oldest_body_makes_room_when_all_bodies_together_are_too_large(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(held_bytes=100_000)) as served:
        halves = [Client(await served.open()) for _ in range(5)]
        for half in halves:
            await half.stream.send_all(post(b"Content-Length: 40000", body=b"a" * 30_000))
            await trio.testing.wait_all_tasks_blocked()
        assert [await half.answer() for half in halves[:2]] == [None, None]
        for half in halves[2:]:
            await half.stream.send_all(b"a" * 10_000)
            assert (await half.sure()).status == 200
        assert trio.current_time() == 0


async def test_unread_large_answers_make_room_for_another(autojump_clock: Clock) -> None:
    async with serving(large_or_echo, limits=Limits(held_bytes=0)) as served:
        for _ in range(3):
            await (await served.open()).send_all(GET.replace(b"/ ", b"/large "))
            await trio.testing.wait_all_tasks_blocked()
        reader, small = Client(await served.open()), Client(await served.open())
        await reader.stream.send_all(GET.replace(b"/ ", b"/large "))
        await small.stream.send_all(GET)
        assert (await small.sure()).status == 200
        assert trio.current_time() == 0
        assert len((await reader.sure()).body) == 500_000
        assert trio.current_time() < 10


async def test_unread_answers_of_any_size_hold_little_memory(autojump_clock: Clock) -> None:
    """The pieces of answers belong to the state and are not copied before their turn, whatever their sizes."""
    pieces = [b"a" * 4_000_000, *[b"b" * 10] * 1_000, b"c" * 300_000]

    async def handler(request: Request) -> AnyResponse:
        async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
            for piece in pieces:
                await send(piece)

        return Stream(produce) if request.path == "/stream" else Response(200, pieces)

    async with serving(handler, limits=Limits(held_bytes=2_000_000)) as served:
        clients = [Client(await served.open()) for _ in range(40)]
        tracemalloc.start()
        for number, client in enumerate(clients):
            await client.stream.send_all(GET.replace(b"/ ", b"/stream ") if number % 2 else GET)
        await trio.testing.wait_all_tasks_blocked()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000


# ---- deadlines -----------------------------------------------------------------------------------------------------


async def test_idle_connection_is_closed_without_an_answer(autojump_clock: Clock) -> None:
    async with serving(echo) as served:
        for data in (b"", GET):
            stream = served.connect()
            client = Client(stream)
            await stream.send_all(data)
            if data:
                assert (await client.sure()).status == 200
            before = trio.current_time()
            assert await client.rest() == b""
            assert trio.current_time() - before == pytest.approx(100)


@pytest.mark.parametrize("data", [b"G", GET[:-1], GET + b"G"])
async def test_slow_head_is_answered_with_408(autojump_clock: Clock, data: bytes) -> None:
    async with serving(echo) as served:
        stream = await served.open()
        client = Client(stream)
        await trio.sleep(70)
        for n in range(len(data)):
            await stream.send_all(data[n : n + 1])
        if data.startswith(GET):
            assert (await client.sure()).status == 200
        before = trio.current_time()
        got = await client.sure()
        assert (got.status, got.headers["connection"]) == (408, "close")
        assert trio.current_time() - before == pytest.approx(10)
        assert await client.answer() is None


async def test_head_at_a_byte_per_second_is_answered_with_408(autojump_clock: Clock) -> None:
    async with serving(echo) as served:
        stream = served.connect()
        for n in range(len(GET)):
            try:
                await stream.send_all(GET[n : n + 1])
            except trio.BrokenResourceError:
                break
            await trio.sleep(1)
        assert (await Client(stream).sure()).status == 408


@pytest.mark.parametrize(
    "data", [post(b"Content-Length: 5", body=b"abcd"), post(CHUNKED, body=b"1\r\na"), post(CHUNKED)]
)
async def test_slow_body_is_answered_with_408(autojump_clock: Clock, data: bytes) -> None:
    async with serving(echo) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(data)
        got = await client.sure()
        assert (got.status, got.headers["connection"]) == (408, "close")
        assert trio.current_time() == pytest.approx(30, abs=0.01)
        assert await client.answer() is None


@pytest.mark.parametrize(("rate", "status"), [(3000, 408), (5000, 200)])
async def test_large_body_gets_time_by_its_size(autojump_clock: Clock, rate: int, status: int) -> None:
    async with serving(echo) as served:
        stream = served.connect()
        await stream.send_all(post(b"Content-Length: 1000000"))
        for _ in range(1_000_000 // rate + 1):
            try:
                await stream.send_all(b"a" * rate)
            except trio.BrokenResourceError:
                break
            await trio.sleep(1)
        assert (await Client(stream).sure()).status == status


@pytest.mark.parametrize("size", [10, 1_000_000])
async def test_memory_stream_of_a_reader_that_takes_nothing_is_closed(autojump_clock: Clock, size: int) -> None:
    async def handler(request: Request) -> AnyResponse:
        return Response(200, b"a" * size)

    async with serving(handler) as served:
        stream = served.listener.connect(trio.testing.lockstep_stream_pair())
        await stream.send_all(GET)
        await trio.sleep(40)
        assert served.requests == ["GET / 200 30000.0 - -"]
        assert len(await Client(stream).rest()) < 300_000


async def test_slow_reader_of_a_large_answer_is_not_closed(autojump_clock: Clock) -> None:
    async def handler(request: Request) -> AnyResponse:
        return Response(200, b"a" * 1_000_000)

    async with serving(handler) as served:
        stream = served.listener.connect(trio.testing.lockstep_stream_pair())
        await stream.send_all(GET)
        got = 0
        while got < 1_000_000:
            await trio.sleep(1)
            got += len(await stream.receive_some(12_500))
        assert trio.current_time() > 75


async def test_unread_body_is_discarded_within_bounds(autojump_clock: Clock) -> None:
    async with serving(echo, limits=Limits(linger_bytes=256 * 1024)) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(post(b"Content-Length: 5000000"))
        assert (await client.sure()).status == 413
        # The server has ended its sending half already.
        assert await client.answer() is None
        assert 200_000 < await flood(stream, b"a" * 10_000) < 400_000
        assert trio.current_time() < 1


# ---- clients that go away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"GET", GET, GET + b"G", post(b"Content-Length: 5", body=b"abc"), post(CHUNKED)])
@pytest.mark.parametrize("half", [True, False])
async def test_disconnected_client_is_not_an_error(autojump_clock: Clock, data: bytes, half: bool) -> None:
    async with serving(echo) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(data)
        if half:
            await stream.send_eof()
            # A client that has only ended its sending half gets its answer.
            assert [got.status for got in [await client.answer()] if got] == ([200] if data.startswith(GET) else [])
            assert await client.answer() is None
        else:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() < 1


async def test_while_connected_work_is_cancelled_by_a_disconnect(autojump_clock: Clock) -> None:
    ended: list[str] = []

    async def wait() -> AnyResponse:
        try:
            await trio.sleep(1000)
        except trio.Cancelled:
            ended.append("cancelled")
            raise
        return Response(200)

    async def handler(request: Request) -> AnyResponse:
        return WhileConnected(wait)

    async with serving(handler) as served:
        stream = served.connect()
        await stream.send_all(GET)
        await trio.sleep(5)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["cancelled"]
        assert served.requests == ["GET / 499 5000.0 - -"]


async def test_requests_sent_during_while_connected_work_are_answered(autojump_clock: Clock) -> None:
    async def work() -> AnyResponse:
        await trio.sleep(5)
        return Response(200, b"worked")

    async def refuse() -> AnyResponse:
        await trio.sleep(5)
        raise HTTPError(503, "it failed")

    async def handler(request: Request) -> AnyResponse:
        return WhileConnected(refuse if request.path == "/refuse" else work)

    async with serving(handler) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(GET)
        await trio.sleep(1)
        await stream.send_all(GET.replace(b"/ ", b"/refuse ") + GET)
        assert [(await client.sure()).status for _ in range(3)] == [200, 503, 200]
        assert trio.current_time() == pytest.approx(15)


# ---- streams -------------------------------------------------------------------------------------------------------


def counting(pieces: int, **options: Any) -> Handler:
    async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
        await send(b"")
        for n in range(pieces):
            await send(b"%d\n" % n)
            await trio.sleep(1)

    async def handler(request: Request) -> AnyResponse:
        return Stream(produce, **options) if request.path == "/" else Response(200)

    return handler


async def test_each_piece_of_a_stream_is_flushed(autojump_clock: Clock) -> None:
    async with serving(counting(3)) as served:
        stream = served.connect()
        await stream.send_all(GET)
        head = await until(stream, b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in head
        assert b"Content-Type: application/x-ndjson" in head
        for n in range(3):
            assert await until(stream, b"\n\r\n") == b"2\r\n%d\n\r\n" % n
            assert trio.current_time() == pytest.approx(n)
        assert await stream.receive_some() == b"0\r\n\r\n"
        await stream.send_all(GET.replace(b"/ ", b"/after "))
        assert (await Client(stream).sure()).status == 200


async def test_stream_for_http_1_0_ends_with_the_connection(autojump_clock: Clock) -> None:
    async with serving(counting(3)) as served:
        stream = served.connect()
        await stream.send_all(GET.replace(b"1.1", b"1.0"))
        head, _, body = (await Client(stream).rest()).partition(b"\r\n\r\n")
        assert body == b"0\n1\n2\n"
        assert b"chunked" not in head


async def test_head_request_for_a_stream_does_not_run_it(autojump_clock: Clock) -> None:
    async with serving(counting(3)) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(GET.replace(b"GET", b"HEAD") + GET.replace(b"/ ", b"/after "))
        assert (await client.sure("HEAD")).body == b""
        assert (await client.sure()).status == 200
        assert trio.current_time() == 0


@pytest.mark.parametrize("half", [True, False])
async def test_producer_is_cancelled_when_the_client_goes_away(autojump_clock: Clock, half: bool) -> None:
    async with serving(counting(1000)) as served:
        stream = served.connect()
        await stream.send_all(GET)
        await trio.sleep(3.5)
        await (stream.send_eof() if half else stream.aclose())
        await trio.testing.wait_all_tasks_blocked()
        assert served.requests == ["GET / 200 3500.0 - -"]


async def test_pipelining_into_a_stream_is_bounded(autojump_clock: Clock) -> None:
    async with serving(counting(1000)) as served:
        stream, counted = served.connect_counted()
        await stream.send_all(GET + b"a" * 1_000_000)
        await trio.sleep(500)
        assert counted.received < 64 * 1024
        # The stream goes on.
        assert served.requests == []


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_pieces_sent_without_waiting_arrive_whole_and_in_order(version: str) -> None:
    pieces: list[BodyPiece] = []
    for number in range(100):
        pieces += (b"%06d" % number * 1000, b"", (b"%06d" % number * 5000, b"", b"."))
    left = 0

    async def produce(send: SendPiece) -> None:
        nonlocal left
        for piece in pieces:
            if not send.now(piece):
                left += 1
                await send(b"")

    async def handler(request: Request) -> AnyResponse:
        return Stream(produce)

    async with serving(handler) as served:
        stream = await served.open()
        await stream.send_all(
            GET.replace(b"1.1", version.encode()).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        await trio.testing.wait_all_tasks_blocked()
        got = await Client(stream).sure()
    assert got.body == b"".join(piece if isinstance(piece, bytes) else b"".join(piece) for piece in pieces)
    # Also of the small ones, since the client was slow.
    assert left > len(pieces) * 2 / 3


@pytest.mark.parametrize("error", [HTTPError(410, "too slow"), KeyError("bug")])
async def test_failed_stream_has_no_last_chunk(autojump_clock: Clock, error: Exception) -> None:
    async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
        await send(b"a")
        raise error

    async def handler(request: Request) -> AnyResponse:
        return Stream(produce)

    async with serving(handler, failures=int(isinstance(error, KeyError))) as served:
        stream = served.connect()
        await stream.send_all(GET)
        assert (await Client(stream).rest()).endswith(b"\r\n\r\n1\r\na\r\n")


async def test_stream_to_a_reader_that_takes_nothing_is_closed(autojump_clock: Clock) -> None:
    async with serving(counting(1000)) as served:
        stream = served.listener.connect(trio.testing.lockstep_stream_pair())
        await stream.send_all(GET)
        await stream.receive_some(1)
        await trio.sleep(40)
        assert served.requests == ["GET / 200 30000.0 - -"]


# ---- WebSockets ----------------------------------------------------------------------------------------------------


async def repeat(websocket: WebSocketConnection) -> None:
    while True:
        await websocket.send_message(await websocket.get_message())


def upgrading(session: Callable[[WebSocketConnection], Awaitable[None]] = repeat, **options: Any) -> Handler:
    async def handler(request: Request) -> AnyResponse:
        if request.path == "/refused":
            raise HTTPError(503, "the VM failed")
        return WebSocketUpgrade(session, **options) if request.path == "/ws" else await echo(request)

    return handler


async def until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    """Receive byte by byte up to `end`, and return that."""
    data = b""
    while not data.endswith(end):
        byte = await stream.receive_some(1)
        assert byte, f"the connection ended after {data!r}"
        data += byte
    return data


async def opened(served: RunningServer, early: bytes = b"") -> trio.abc.HalfCloseableStream:
    stream = served.connect()
    await stream.send_all(UPGRADE + early)
    head = await until(stream, b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n" in head.lower()
    return stream


def closing(code: int, reason: bytes = b"") -> bytes:
    """A server's close frame."""
    return bytes([0x88, 2 + len(reason)]) + code.to_bytes(2, "big") + reason


async def pass_back(stream: TunnelStream) -> None:
    async for data in stream:
        await stream.send_all(data)


def tunnelling(session: Callable[[TunnelStream], Awaitable[None]] = pass_back) -> Handler:
    async def handler(request: Request) -> AnyResponse:
        return TunnelUpgrade(session, 30.0)

    return handler


UPGRADING = [pytest.param(upgrading(), id="messages"), pytest.param(tunnelling(), id="bytes")]


@pytest.mark.parametrize("end", ["regular", "refused", "client gone"])
async def test_tunnel_is_released_at_its_end_and_when_it_does_not_begin(autojump_clock: Clock, end: str) -> None:
    released, begun = trio.Event(), False

    async def session(stream: TunnelStream) -> None:
        nonlocal begun
        begun = True
        assert not released.is_set()

    async def handler(request: Request) -> AnyResponse:
        if end == "client gone":
            await client.aclose()
        return TunnelUpgrade(session, 30.0, release=released.set)

    refusal = HTTPError(503, "another controller leads") if end == "refused" else None
    async with serving(handler, refuse_all=lambda: refusal) as served:
        client = served.connect()
        await client.send_all(UPGRADE)
        with trio.fail_after(60):
            await released.wait()
        assert begun == (end == "regular")


@pytest.mark.slow
@pytest.mark.parametrize("handler", UPGRADING)
async def test_frame_sent_with_the_handshake_is_not_lost(autojump_clock: Clock, handler: Handler) -> None:
    data = UPGRADE + HELLO_FRAME
    async with serving(handler) as served:
        for cut in range(len(data)):
            stream = served.connect()
            if cut:
                await stream.send_all(data[:cut])
                await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(data[cut:])
            head = await until(stream, b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n" in head.lower()
            reader, got = FrameReader(masked=False), b""
            while got != b"hello":
                for event in reader.feed(await stream.receive_some(1)):
                    assert isinstance(event, memoryview)
                    got += event
                assert b"hello".startswith(got)
            await stream.send_all(CLOSE_FRAME)
            assert await Client(stream).rest() == closing(1000)
        assert served.requests == ["GET /ws 101 0.0 - -"] * len(data)


async def test_upgrade_may_follow_other_requests(autojump_clock: Clock) -> None:
    async with serving(upgrading()) as served:
        stream = served.connect()
        client = Client(stream)
        await stream.send_all(GET + UPGRADE.replace(b"/ws", b"/refused") + UPGRADE.replace(b"/ws", b"/") + UPGRADE)
        assert [(await client.sure()).status for _ in range(3)] == [200, 503, 200]
        await stream.send_all(HELLO_FRAME)
        await until(stream, b"\x82\x05hello")


MALFORMED = {
    "no upgrade": (426, GET.replace(b"/ ", b"/ws ")),
    "no option upgrade": (426, UPGRADE.replace(b"Connection: Upgrade\r\n", b"")),
    "post": (426, UPGRADE.replace(b"GET", b"POST")),
    "1.0": (426, UPGRADE.replace(b"1.1", b"1.0")),
    "version 8": (426, UPGRADE.replace(b"Version: 13", b"Version: 8")),
    "no version": (426, UPGRADE.replace(b"Sec-WebSocket-Version: 13\r\n", b"")),
    "no key": (400, UPGRADE.replace(b"Sec-WebSocket-Key: " + KEY + b"\r\n", b"")),
    "short key": (400, UPGRADE.replace(KEY, KEY[4:])),
    "rubbish key": (400, UPGRADE.replace(KEY, b"\xff" * 24)),
    "with a body": (400, UPGRADE[:-2] + b"Content-Length: 3\r\n\r\nabc"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("handler", UPGRADING)
async def test_malformed_websocket_request_is_refused(autojump_clock: Clock, name: str, handler: Handler) -> None:
    status, data = MALFORMED[name]
    answers, _ = await ask(data, handler)
    assert [answer.status for answer in answers] == [status]
    if status == 426:
        assert answers[0].headers["upgrade"] == "websocket"
    assert answers[0].headers.get("sec-websocket-version") == ("13" if "version" in name else None)


async def test_handler_can_require_a_websocket_before_it_waits(autojump_clock: Clock) -> None:
    waited = []

    async def work() -> AnyResponse:
        await trio.sleep(5)
        waited.append(trio.current_time())
        return WebSocketUpgrade(repeat)

    async def handler(request: Request) -> AnyResponse:
        request.require_websocket()
        return WhileConnected(work)

    async with serving(handler) as served:
        stream = await opened(served, HELLO_FRAME)
        assert await until(stream, b"hello") == b"\x82\x05hello"
        assert [answer.status for answer in (await talk(served, [GET]))[0]] == [426]
    assert len(waited) == 1


VIOLATIONS = {
    "not masked": (1002, b"\x82\x05hello"),
    "reserved bit": (1002, b"\xc2" + HELLO_FRAME[1:]),
    "unknown opcode": (1002, b"\x83" + HELLO_FRAME[1:]),
    "length beyond 2^63": (1002, b"\x82\xff" + b"\xff" * 8 + b"\x00" * 4),
    "fragmented ping": (1002, b"\x09\x80\x00\x00\x00\x00"),
    "long ping": (1002, b"\x89\xfe\x00\x80\x00\x00\x00\x00" + b"a" * 128),
    "bad close code": (1002, b"\x88\x82\x00\x00\x00\x00\x03\xed"),
    "half a close code": (1002, b"\x88\x81\x00\x00\x00\x00\x03"),
    "continuation of nothing": (1002, b"\x80" + HELLO_FRAME[1:]),
    "not UTF-8": (1007, b"\x81\x81\x00\x00\x00\x00\xff"),
    "too large": (1009, b"\x82\xfe\x04\x00\x00\x00\x00\x00" + b"a" * 1024),
    "too large in fragments": (
        1009,
        b"\x02\xfe\x01\x00\x00\x00\x00\x00" + b"a" * 256 + b"\x00\xfe\x01\x00\x00\x00\x00\x00" + b"a" * 256,
    ),
}


@pytest.mark.parametrize(
    ("handler", "name"),
    [
        *((upgrading(max_message_size=500), name) for name in VIOLATIONS),
        *((tunnelling(), name) for name, (code, _) in VIOLATIONS.items() if code != 1009),
    ],
)
@pytest.mark.parametrize("flooding", [False, True])
async def test_protocol_violation_closes_the_websocket_with_its_code(
    autojump_clock: Clock, handler: Handler, name: str, flooding: bool
) -> None:
    code, data = VIOLATIONS[name]
    async with serving(handler) as served:
        stream = await opened(served, data)
        if flooding:
            assert await flood(stream, HELLO_FRAME * 1000) < 1_000_000
        frames = await Client(stream).rest()
        assert frames[:1] == b"\x88"
        assert int.from_bytes(frames[2:4], "big") == code
        assert len(frames) == 2 + frames[1]
        assert trio.current_time() <= 1


async def test_protocol_violation_is_reported_while_the_session_is_busy(autojump_clock: Clock) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        await trio.sleep(100)

    async with serving(upgrading(session)) as served:
        stream = await opened(served, b"\x82\x05hello")
        assert await stream.receive_some() == closing(1002)
        assert trio.current_time() == 0


async def test_protocol_violation_during_a_message_of_the_server(autojump_clock: Clock) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        while True:
            await websocket.send_message(b"x" * 10)

    async with serving(upgrading(session)) as served:
        stream = served.listener.connect(trio.testing.lockstep_stream_pair())
        await stream.send_all(UPGRADE)
        await until(stream, b"\r\n\r\n\x82\x0axxx")
        await stream.send_all(b"\x82\x05hello")
        await trio.testing.wait_all_tasks_blocked()
        assert await Client(stream).rest() == b"x" * 7 + closing(1002)


async def test_ping_after_the_servers_close_frame_is_not_an_error(autojump_clock: Clock) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        await websocket.get_message()

    async with serving(upgrading(session)) as served:
        stream = await opened(served, HELLO_FRAME)
        assert await stream.receive_some() == closing(1000)
        await stream.send_all(b"\x89\x80\x00\x00\x00\x00")
        assert await Client(stream).rest() == b""


async def test_websocket_close_does_not_wait_for_ever(
    autojump_clock: Clock,
) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        await trio.sleep(3)

    async with serving(upgrading(session)) as served:
        stream = await opened(served)
        assert await Client(stream).rest() == closing(1000)
        assert trio.current_time() == pytest.approx(8)


async def test_session_can_choose_the_close_code(autojump_clock: Clock) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        await websocket.aclose(4000, "replaced")

    async with serving(upgrading(session)) as served:
        stream = await opened(served, CLOSE_FRAME)
        assert (await Client(stream).rest())[:4] in (closing(1000), closing(4000)[:1] + b"\x0a\x0f\xa0")


async def test_session_may_raise_connection_closed(autojump_clock: Clock) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(repeat, websocket)
            raise ConnectionClosed(None)

    async with serving(upgrading(session)) as served:
        stream = await opened(served)
        assert await stream.receive_some() == closing(1000)


@pytest.mark.parametrize("upgraded", [upgrading, tunnelling])
async def test_unexpected_exception_in_a_session_is_logged_once(
    autojump_clock: Clock, upgraded: Callable[[Any], Handler]
) -> None:
    async def session(_: object) -> None:
        raise KeyError("bug")

    async with serving(upgraded(session), failures=1) as served:
        stream = await opened(served)
        assert await Client(stream).rest() == b""
        assert served.requests == ["GET /ws 101 0.0 - -"]


@pytest.mark.parametrize("early", [b"", HELLO_FRAME, b"\x82"])
async def test_disconnect_ends_the_websocket_session(autojump_clock: Clock, early: bytes) -> None:
    ended = []

    async def session(websocket: WebSocketConnection) -> None:
        try:
            await repeat(websocket)
        except ConnectionClosed as closed:
            ended.append(closed.reason and closed.reason.code)
            raise

    async with serving(upgrading(session)) as served:
        stream = await opened(served, early)
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [1006]
        assert served.requests == ["GET /ws 101 0.0 - -"]


async def test_messages_ahead_of_a_busy_session_are_bounded(
    autojump_clock: Clock,
) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        await trio.sleep(1000)

    async with serving(upgrading(session)) as served:
        stream, counted = served.connect_counted()
        await stream.send_all(UPGRADE)
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(HELLO_FRAME * 100_000)
        await trio.sleep(500)
        # Of 1.1 MB: two reads.
        assert counted.received <= 2 * 64 * 1024


async def test_pings_are_sent_and_a_missing_pong_is_tolerated(autojump_clock: Clock) -> None:
    async def session(websocket: WebSocketConnection) -> None:
        await trio.sleep(1000)

    async with serving(upgrading(session, ping_interval=30.0)) as served:
        stream = await opened(served)
        chance = random.getstate()
        for number in range(1, 4):
            ping = await stream.receive_some()
            assert ping[:2] == b"\x89\x04"
            assert trio.current_time() == 30 * number
            if number < 3:
                await stream.send_all(b"\x8a\x84\0\0\0\0" + ping[2:])
        assert random.getstate() == chance, "`random` belongs to the embedding program"
        assert await stream.receive_some() == closing(1000)
        assert trio.current_time() == 1000


# ---- tunnels -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_random_bytes_in_a_tunnel_end_in_a_close(autojump_clock: Clock) -> None:
    chance = random.Random(1)
    async with serving(tunnelling()) as served:
        for _ in range(300):
            stream = await opened(served, chance.randbytes(chance.randrange(200)))
            await stream.send_eof()
            await Client(stream).rest()
        assert len(served.requests) == 300


async def test_disconnect_ends_the_tunnel_session(autojump_clock: Clock) -> None:
    ended = []

    async def session(stream: TunnelStream) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await pass_back(stream)
        assert stream.closed is not None
        ended.append(stream.closed.code)
        raise trio.BrokenResourceError

    async with serving(tunnelling(session)) as served:
        stream = await opened(served, HELLO_FRAME)
        await until(stream, b"hello")
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [1006]
        assert served.requests == ["GET /ws 101 0.0 - -"]


@asynccontextmanager
async def client_websocket(
    stream: trio.SocketStream | trio.SSLStream[trio.SocketStream], path: str
) -> AsyncIterator[WebSocketConnection]:
    """A client of trio-websocket that closes its stream, which the package does not do after the server's close."""
    async with stream, trio.open_nursery() as nursery:
        websocket = await wrap_client_stream(nursery, stream, "localhost", path)
        yield websocket
        await websocket.aclose()
        nursery.cancel_scope.cancel()


async def test_trio_websocket_client_over_tcp() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with serving(upgrading(), listeners=listeners) as served:
        async with client_websocket(await trio.open_tcp_stream("127.0.0.1", port), "/ws?a=b") as websocket:
            for message in (b"", b"x" * 300_000, "text"):
                await websocket.send_message(message)
                assert await websocket.get_message() == message
            await websocket.ping()
        assert websocket.closed is not None
        assert websocket.closed.code == 1000
        async with client_websocket(await trio.open_tcp_stream("127.0.0.1", port), "/ws") as websocket:
            served.stop.set()
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.get_message()
            assert closed.value.reason is not None
            assert (closed.value.reason.code, closed.value.reason.reason) == (1001, "controller is stopping")
        await served.ended.wait()
        assert [line.endswith("127.0.0.1") for line in served.requests] == [True] * 2


# ---- stopping ------------------------------------------------------------------------------------------------------


async def slow(request: Request) -> AnyResponse:
    async def produce(send: Callable[[bytes], Awaitable[None]]) -> None:
        await send(b"first")
        await trio.sleep(5)
        await send(b"last")

    if request.path == "/stream":
        return Stream(produce, endless=request.query.one("endless") == "1")
    await trio.sleep(float(request.query.one("s") or 0))
    return Response(200)


async def test_stop_closes_idle_connections_at_once(autojump_clock: Clock) -> None:
    async with serving(slow) as served:
        fresh, used = Client(served.connect()), Client(served.connect())
        await used.stream.send_all(GET)
        assert (await used.sure()).status == 200
        await trio.testing.wait_all_tasks_blocked()
        served.stop.set()
        assert await fresh.rest() == await used.rest() == b""
        await served.ended.wait()
        assert trio.current_time() == 0
        with pytest.raises(trio.BrokenResourceError):
            served.connect()


@pytest.mark.parametrize(("seconds", "status", "end"), [(5, 200, 5), (10.5, None, 11)])
async def test_stop_gives_requests_a_grace_period(
    autojump_clock: Clock, seconds: float, status: int | None, end: float
) -> None:
    async with serving(slow) as served:
        client = Client(served.connect())
        await client.stream.send_all(GET.replace(b"/ ", b"/?s=%g " % (seconds + 1)) + GET)
        await trio.sleep(1)
        served.stop.set()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            served.connect()
        got = await client.answer()
        assert (got.status, got.headers["connection"]) == (200, "close") if got and status else got is None
        assert await client.answer() is None
        await served.ended.wait()
        assert trio.current_time() == pytest.approx(end + (status == 200))
        assert [line.split()[2] for line in served.requests] == [str(status or 499)]


async def test_stop_lets_a_request_in_transfer_complete(autojump_clock: Clock) -> None:
    data = post(b"Content-Length: 5", body=b"hello")
    async with serving(echo) as served:
        client = Client(served.connect())
        await client.stream.send_all(data[:10])
        await trio.testing.wait_all_tasks_blocked()
        served.stop.set()
        await trio.sleep(3)
        await client.stream.send_all(data[10:-2])
        await trio.sleep(3)
        await client.stream.send_all(data[-2:])
        got = await client.sure()
        assert (got.status, got.headers["connection"]) == (200, "close")
        await served.ended.wait()
        assert trio.current_time() == 6


@pytest.mark.parametrize(("endless", "body", "end"), [(1, b"first", 1), (0, b"firstlast", 5)])
async def test_stop_ends_endless_streams_with_a_last_chunk(
    autojump_clock: Clock, endless: int, body: bytes, end: float
) -> None:
    async with serving(slow) as served:
        client = Client(served.connect())
        await client.stream.send_all(GET.replace(b"/ ", b"/stream?endless=%d " % endless))
        await trio.sleep(1)
        served.stop.set()
        assert (await client.sure()).body == body
        assert await client.answer() is None
        await served.ended.wait()
        assert trio.current_time() == pytest.approx(end)


async def test_stop_cuts_off_a_stream_to_a_slow_reader(autojump_clock: Clock) -> None:
    async with serving(slow) as served:
        stream = served.listener.connect(trio.testing.lockstep_stream_pair())
        await stream.send_all(GET.replace(b"/ ", b"/stream?endless=1 "))
        # The server is in the middle of sending the head.
        await trio.testing.wait_all_tasks_blocked()
        served.stop.set()
        await served.ended.wait()
        assert trio.current_time() == 0
        assert b"0\r\n\r\n" not in await Client(stream).rest()


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("upgraded", [upgrading, tunnelling])
async def test_stop_closes_websockets_with_1001(
    autojump_clock: Clock, answers: bool, upgraded: Callable[[Any], Handler]
) -> None:
    cancelled = trio.Event()

    async def session(_: object) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.set()
            raise

    async with serving(upgraded(session)) as served:
        stream = await opened(served)
        served.stop.set()
        assert await stream.receive_some() == closing(1001, b"controller is stopping")
        if answers:
            await stream.send_all(CLOSE_FRAME)
            await stream.send_eof()
        assert await Client(stream).rest() == b""
        await served.ended.wait()
        assert cancelled.is_set()
        assert trio.current_time() == pytest.approx(0 if answers else 6)


async def test_cancelling_the_server_ends_everything_at_once(autojump_clock: Clock) -> None:
    async with serving(slow) as served:
        clients = [Client(await served.open()) for _ in range(4)]
        for client, target in zip(clients, (b"/?s=100", b"/stream?endless=1", b"/stream"), strict=False):
            await client.stream.send_all(GET.replace(b"/ ", target + b" "))
        await trio.testing.wait_all_tasks_blocked()
        served.scope.cancel()
        await served.ended.wait()
        for client in clients:
            await client.rest()
        assert trio.current_time() == 0


# ---- TLS -----------------------------------------------------------------------------------------------------------


async def test_requests_and_websocket_over_tls_and_tcp(contexts: Contexts) -> None:
    plain = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listeners = [TLSListener(one, contexts.server) for one in plain]
    port = plain[0].socket.getsockname()[1]
    async with serving(upgrading(), listeners=listeners) as served:
        connect = partial(
            trio.open_ssl_over_tcp_stream, "localhost", port, ssl_context=contexts.client, https_compatible=True
        )
        stream = await connect()
        client = Client(stream)
        await stream.send_all(GET + post(b"Content-Length: 5", body=b"hello"))
        assert [(await client.sure()).status for _ in range(2)] == [200, 200]
        await stream.aclose()
        async with client_websocket(await connect(), "/ws") as websocket:
            await websocket.send_message(b"x" * 100_000)
            assert await websocket.get_message() == b"x" * 100_000
        served.stop.set()
        await served.ended.wait()
        assert served.requests[0].endswith("127.0.0.1")


async def test_oldest_incomplete_tls_handshake_is_closed_for_a_new_one(
    autojump_clock: Clock, contexts: Contexts
) -> None:
    async with serving(echo, limits=Limits(unauthenticated=3)) as served:
        served.contexts = contexts
        pairs = [socket_pair() for _ in range(5)]
        clients = [TLSClient(ours, contexts.client) for ours, _ in pairs]
        served.sockets += [end.socket for pair in pairs for end in pair]
        established = Client(await served.open())
        await established.stream.send_all(GET)
        assert (await established.sure()).status == 200
        for _, theirs in pairs:
            served.listener.offer(TLSStream(theirs, contexts.server))
            await trio.testing.wait_all_tasks_blocked()
        # The first two were closed, and one that has authenticated was not.
        assert [await is_closed(client) for client in clients[:2]] == [True, True]
        for client in (established, *map(Client, clients[2:])):
            await client.stream.send_all(GET)
            assert (await client.sure()).status == 200
        assert trio.current_time() == 0


async def test_tls_handshake_has_a_deadline_and_ends_at_stop(autojump_clock: Clock, contexts: Contexts) -> None:
    memory = MemoryListener()
    listener = TLSListener(memory, contexts.server)
    async with serving(echo, listeners=[listener]) as served:
        silent = memory.connect(trio.testing.memory_stream_pair())
        plain = memory.connect(trio.testing.memory_stream_pair())
        gone = memory.connect(trio.testing.memory_stream_pair())
        await plain.send_all(b"\x00" * 20)
        await gone.aclose()
        alert = await Client(plain).rest()
        assert not alert.startswith(b"HTTP")
        assert trio.current_time() == 0
        assert await silent.receive_some() == b""
        assert trio.current_time() == pytest.approx(10)
        late = memory.connect(trio.testing.memory_stream_pair())
        await trio.testing.wait_all_tasks_blocked()
        served.stop.set()
        assert await late.receive_some() == b""
        await served.ended.wait()
        assert trio.current_time() == pytest.approx(10)


@pytest.mark.parametrize("data", [GET, b"HEAD / HTTP/1.1\r\n", b"S"])
async def test_plain_http_on_the_tls_port_is_answered_with_400(contexts: Contexts, data: bytes) -> None:
    plain = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listeners = [TLSListener(one, contexts.server) for one in plain]
    async with serving(echo, listeners=listeners) as served:
        stream = await trio.open_tcp_stream("127.0.0.1", plain[0].socket.getsockname()[1])
        await stream.send_all(data)
        client = Client(stream)
        got = await client.sure()
        assert (got.status, got.headers["connection"]) == (400, "close")
        assert "https://" in got.message
        assert await client.answer() is None
        await stream.aclose()
        served.stop.set()
        await served.ended.wait()
        assert served.requests == ["- - 400 0.0 - 127.0.0.1"]


async def test_tls_is_closed_with_close_notify(autojump_clock: Clock, contexts: Contexts) -> None:
    memory = MemoryListener()
    listener = TLSListener(memory, contexts.server)
    async with serving(echo, listeners=[listener]):
        raw = memory.connect(trio.testing.memory_stream_pair())
        # A strict client: an end without close_notify would be a BrokenResourceError.
        stream = trio.SSLStream(raw, contexts.client, server_hostname="localhost", https_compatible=False)
        await stream.send_all(GET)
        assert (await Client(stream).rest()).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_tls_keeps_bytes_that_arrive_during_a_stream(autojump_clock: Clock, contexts: Contexts) -> None:
    memory = MemoryListener()
    async with serving(counting(5), listeners=[TLSListener(memory, contexts.server)]):
        raw = memory.connect(trio.testing.memory_stream_pair())
        client = Client(trio.SSLStream(raw, contexts.client, server_hostname="localhost"))
        await client.stream.send_all(GET)
        data = GET.replace(b"/ ", b"/after ")
        await trio.sleep(2)
        await client.stream.send_all(data[:9])
        await trio.sleep(5)
        await client.stream.send_all(data[9:])
        assert [(await client.sure()).body for _ in range(2)] == [b"0\n1\n2\n3\n4\n", b""]


async def test_tls_over_memory_streams_cut_off_after_the_answer(autojump_clock: Clock, contexts: Contexts) -> None:
    memory = MemoryListener()
    listener = TLSListener(memory, contexts.server)
    async with serving(counting(5), listeners=[listener]) as served:
        for data, status in ((GET, 200), (post(b"Content-Length: 1, 1"), 400), (GET + b"\x00", 200)):
            raw = memory.connect(trio.testing.memory_stream_pair())
            stream = trio.SSLStream(raw, contexts.client, server_hostname="localhost", https_compatible=True)
            client = Client(stream)
            await stream.send_all(data)
            assert (await client.sure()).status == status
            await raw.aclose()
        await trio.sleep(20)
        assert [line.split()[2] for line in served.requests] == ["200", "400", "200", "400"]


# ---- random bytes --------------------------------------------------------------------------------------------------

FRAGMENTS = (
    [
        GET,
        GET[:-2],
        UPGRADE,
        UPGRADE.replace(b"/ws", b"/tunnel"),
        UPGRADE[:-2],
        HELLO_FRAME,
        CLOSE_FRAME,
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b":",
        b"\x00",
        b"0\r\n\r\n",
    ]
    + [b"POST /stream HTTP/1.1\r\nHost: x\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"3\r\nabc\r\n", b"HTTP/1.1"]
    + [
        b"Content-Length: 3\r\n\r\n",
        b"Expect: 100-continue\r\n",
        b"abc",
        b"%",
        b"GET /",
        b"\x89\x80abcd",
        b"\x16\x03\x01",
    ]
    + [frame for _, frame in VIOLATIONS.values() if len(frame) < 200]
)
WORDS = st.sampled_from(FRAGMENTS)


def send_anything(pieces: Sequence[bytes]) -> None:
    """Send bytes to a server, and check that it answers or closes without an unexpected exception."""

    async def handler(request: Request) -> AnyResponse:
        if request.path == "/stream":
            return await counting(3)(replace(request, target="/"))
        return await (tunnelling() if request.path == "/tunnel" else upgrading())(request)

    async def main() -> None:
        async with serving(handler) as served:
            stream = served.connect()
            for piece in pieces:
                try:
                    await stream.send_all(piece)
                except trio.BrokenResourceError:
                    break
                await trio.testing.wait_all_tasks_blocked()
            client = Client(stream)
            with trio.move_on_after(1000) as patience:
                await client.rest()
            # Only a WebSocket may outlast all deadlines.
            assert not patience.cancelled_caught or b"HTTP/1.1 101 " in client.buffer
            served.stop.set()
            await client.rest()
            assert client.buffer == b"" or client.buffer.startswith(b"HTTP/1.1 ")
            await served.ended.wait()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@QUICK
@given(st.lists(WORDS | st.binary(max_size=20), max_size=12), st.booleans())
@example([UPGRADE, CLOSE_FRAME, b"\x89\x80abcd"], False)
@example([UPGRADE, b"\x88\x80abcd", HELLO_FRAME], True)
@pytest.mark.slow
def test_random_bytes_end_in_an_answer_or_a_close(pieces: list[bytes], at_once: bool) -> None:
    send_anything([b"".join(pieces)] if at_once else pieces)
