"""TLS as the server speaks it: the handshake, odd clients, both directions at once, the close, and bounded buffers.

Real clients (openssl, curl, http.client) connect over TCP; everything else happens over pairs of Unix sockets. How requests
are answered over TLS is in test_server.py.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.admission import Sender, admit_anybody
from harness.programs import need

from orchard.net import tls
from orchard.net.connection import Service
from orchard.net.request import AnyResponse, Request, Response
from orchard.net.server import serve
from orchard.net.streams import PlainStream, TLSListener, TLSStream
from orchard.net.tcp import socket_of

Clock = trio.testing.MockClock
BIG = bytes(range(256)) * 8000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost and its key."""
    need("openssl")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout"
    subprocess.run([*command.split(), key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def server_context(files: tuple[Path, Path]) -> ssl.SSLContext:
    return tls.server_context(*files)


@pytest.fixture(scope="module")
def client_context(files: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=files[0])


def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    return ours, theirs


@asynccontextmanager
async def closing_pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    ours, theirs = socket_pair()
    async with ours, theirs:
        yield ours, theirs


@asynccontextmanager
async def connected(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> AsyncIterator[tuple[trio.SSLStream[trio.SocketStream], TLSStream]]:
    """Both ends of a connection after the handshake: trio's client and our server."""
    ours, theirs = socket_pair()
    client = trio.SSLStream(ours, client_context, server_hostname="localhost", https_compatible=False)
    server = TLSStream(theirs, server_context)
    async with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            assert await server.wait_hello()
            await server.do_handshake()
        yield client, server


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = await stream.receive_some(65536)
        assert data, "the stream ended"
        received += data
    return bytes(received)


async def test_both_directions_carry_much_at_once(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, BIG)
        nursery.start_soon(server.send_all, BIG)
        got: list[bytes] = []

        async def receive(stream: trio.abc.ReceiveStream) -> None:
            got.append(await receive_exactly(stream, len(BIG)))

        nursery.start_soon(receive, client)
        nursery.start_soon(receive, server)
    assert got == [BIG, BIG]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_each_version_is_closed_with_close_notify(
    files: tuple[Path, Path], server_context: ssl.SSLContext, version: ssl.TLSVersion
) -> None:
    context = ssl.create_default_context(cafile=files[0])
    context.minimum_version = context.maximum_version = version
    async with connected(server_context, context) as (client, server):
        await server.send_all(b"last")
        await server.aclose()
        assert await client.receive_some(10) == b"last"
        # Without close_notify this strict client would raise BrokenResourceError.
        assert await client.receive_some(10) == b""


async def test_end_after_close_notify_and_without_it(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    for polite in (True, False):
        async with connected(server_context, client_context) as (client, server):
            # A close with unread data would be a reset: there are session tickets.
            await server.send_all(b"x")
            assert await client.receive_some(10) == b"x"
            await client.send_all(b"last")
            await (client.aclose() if polite else client.transport_stream.aclose())
            assert server.receive_now() == b"last"
            for _ in range(2):
                assert await server.receive_some(10) == b""
                assert server.receive_now() == b""


async def test_half_close_lets_the_client_go_on_sending(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (client, server):
        await server.send_all(b"last")
        await server.send_eof()
        assert await client.receive_some(10) == b"last"
        assert await client.receive_some(10) == b""
        await client.transport_stream.send_all(b"x" * 1000)
        assert await server.discard_some() == 1000


async def test_one_task_may_receive_and_one_may_send(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (_, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.receive_some)
        nursery.start_soon(server.send_all, b"x" * 10_000_000)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await server.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await server.send_all(b"x")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_receiving", [False, True])
@pytest.mark.parametrize("over_tls", [False, True])
async def test_send_without_waiting_leaves_the_rest_to_the_next_send(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, over_tls: bool, is_receiving: bool
) -> None:
    async with (
        connected(server_context, client_context) as (secured, over),
        closing_pair() as (clear, ours),
        trio.open_nursery() as nursery,
    ):
        client: trio.abc.Stream = secured if over_tls else clear
        server = over if over_tls else PlainStream(ours)
        if is_receiving:
            nursery.start_soon(server.receive_some)
            await trio.testing.wait_all_tasks_blocked()
        assert server.send_now(b"first")
        assert await receive_exactly(client, 5) == b"first"
        # The socket takes a part of it.
        for end in (over.transport_stream, ours):
            assert isinstance(end, trio.SocketStream)
            end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        assert not server.send_now(b"a" * 16_000)
        nursery.start_soon(server.send_all, b"")
        assert await receive_exactly(client, 16_000) == b"a" * 16_000
        await trio.testing.wait_all_tasks_blocked()
        assert not server.send_now(b"b" * 5_000_000)
        nursery.start_soon(server.send_all, b"end")
        assert await receive_exactly(client, 5_000_003) == b"b" * 5_000_000 + b"end"
        nursery.cancel_scope.cancel()


async def test_send_without_waiting_to_a_closed_socket_fails(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (client, server):
        await client.transport_stream.aclose()
        for sender in (server, PlainStream(server.transport_stream)):
            with pytest.raises(trio.BrokenResourceError):
                sender.send_now(b"x")


async def test_cancelled_receive_loses_nothing(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    async with connected(server_context, client_context) as (client, server):
        for number in range(50):
            with trio.CancelScope() as scope:
                scope.cancel()
                await server.receive_some()
            await client.send_all(b"%02d" % number)
        assert await receive_exactly(server, 100) == b"".join(b"%02d" % number for number in range(50))


async def test_cancelled_send_leaves_the_records_whole(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"a" * 5_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"end")
            received = bytearray()
            while not received.endswith(b"end"):
                received += await client.receive_some(65536)
        assert set(received[:-3]) == {ord("a")}
        assert len(received) < 5_000_000


async def test_ciphertext_for_a_slow_reader_is_bounded(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (_, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.send_all, b"x" * 50_000_000)
        await trio.testing.wait_all_tasks_blocked()
        assert len(server._unsent) < 257 * 1024
        assert server._outgoing is not None
        assert server._outgoing.pending == 0
        nursery.cancel_scope.cancel()


async def test_broken_record_is_answered_with_an_alert(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with connected(server_context, client_context) as (client, server):
        await client.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + b"x" * 32)
        with pytest.raises(trio.BrokenResourceError, match="TLS failed"):
            await server.receive_some()
        await server.aclose()
        with pytest.raises(trio.BrokenResourceError) as broken:
            await client.receive_some()
        assert isinstance(broken.value.__cause__, ssl.SSLError)
        assert "ALERT" in str(broken.value.__cause__.reason)


async def test_openssl_state_is_created_with_the_first_whole_record(server_context: ssl.SSLContext) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    for part in (b"", hello[:1], hello[:4], hello[:5], hello[:-1]):
        ours, theirs = socket_pair()
        async with ours, theirs, trio.open_nursery() as nursery:
            server = TLSStream(theirs, server_context)
            if part:
                await ours.send_all(part)
            nursery.start_soon(server.wait_hello)
            await trio.testing.wait_all_tasks_blocked()
            assert server._tls is None
            assert len(nursery.child_tasks) == 1
            await ours.send_all(hello[len(part) :])


async def test_client_that_closes_before_its_hello(server_context: ssl.SSLContext) -> None:
    for part in (b"", b"\x16\x03\x01\x02"):
        ours, theirs = socket_pair()
        async with theirs:
            if part:
                await ours.send_all(part)
            await ours.aclose()
            assert not await TLSStream(theirs, server_context).wait_hello()


@pytest.mark.parametrize(
    "data",
    [
        *(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000),
        *(b"\x16\x03\x01\x00\x05hello", b"\x80\x2e\x01\x00\x02" + b"\x00" * 50),
    ],
)
async def test_bytes_that_are_not_a_hello_fail_the_handshake(server_context: ssl.SSLContext, data: bytes) -> None:
    ours, theirs = socket_pair()
    server = TLSStream(theirs, server_context)
    async with ours, theirs, trio.open_nursery() as nursery:

        async def send() -> None:
            with suppress(trio.BrokenResourceError):
                await ours.send_all(data)

        nursery.start_soon(send)
        assert await server.wait_hello()
        with pytest.raises(trio.BrokenResourceError, match="handshake failed"):
            await server.do_handshake()
        nursery.cancel_scope.cancel()


async def test_kernel_state_is_found_below_tls(server_context: ssl.SSLContext) -> None:
    ours, theirs = socket_pair()
    async with ours, theirs:
        assert socket_of(TLSStream(theirs, server_context)) is theirs.socket


# ---- real clients --------------------------------------------------------------------------------------------------


async def answer(request: Request, sender: Sender) -> AnyResponse:
    if request.path == "/big":
        return Response(200, BIG)
    return Response(200, request.body or b"hello", content_type="text/plain")


@asynccontextmanager
async def served(context: ssl.SSLContext) -> AsyncIterator[int]:
    """Serve over TLS on a TCP port, which is returned."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, Service(answer, admit_anybody), [TLSListener(listener, context)]))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def run_program(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [str(word) for word in words], stdin=stdin, capture_stdout=True, capture_stderr=True, check=False
    )  # fmt: skip


async def test_http_client_of_the_standard_library(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    def talk(port: int) -> None:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=client_context)
        for _ in range(3):
            connection.request("POST", "/", BIG)
            assert connection.getresponse().read() == BIG
            connection.request("POST", "/", iter([BIG[:1000], BIG[1000:100_000]]), encode_chunked=True)
            assert connection.getresponse().read() == BIG[:100_000]
            connection.request("GET", "/big")
            assert connection.getresponse().read() == BIG
        connection.close()

    async with served(server_context) as port:
        await trio.to_thread.run_sync(talk, port)


@pytest.mark.needs("curl")
@pytest.mark.parametrize("options", [(), ("--http2",), ("--http1.0",), ("--tlsv1.2", "--tls-max", "1.2")])
async def test_curl(files: tuple[Path, Path], server_context: ssl.SSLContext, options: tuple[str, ...]) -> None:
    async with served(server_context) as port:
        url = f"https://localhost:{port}"
        command = ("curl", "-sS", "--max-time", "60", "--cacert", files[0], *options)
        done = await run_program(*command, url, "--data-binary", "@-", "-H", "Expect: 100-continue", stdin=BIG)
        assert (done.returncode, done.stdout) == (0, BIG), done.stderr
        more = () if "--http1.0" in options else ("-H", "Transfer-Encoding: chunked", "-d", "x")
        done = await run_program(*command, f"{url}/big", *more, f"{url}/big")
        assert (done.returncode, done.stdout) == (0, BIG * 2), done.stderr


@asynccontextmanager
async def openssl_client(port: int, *options: str) -> AsyncIterator[Callable[[bytes, bytes], Awaitable[None]]]:
    """Run openssl's client. Yield a function that sends it a line and waits for a text in its output."""
    command = ["openssl", "s_client", "-crlf", "-connect", f"127.0.0.1:{port}", *options]
    output = bytearray()
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        )

        async def say(line: bytes, expected: bytes) -> None:
            await process.stdin.send_all(line)
            with trio.fail_after(60):
                while expected not in output:
                    received = await process.stdout.receive_some()
                    assert received, bytes(output)
                    output.extend(received)
            output.clear()

        await say(b"", b"Verify return code")
        yield say
        nursery.cancel_scope.cancel()


@pytest.mark.needs("openssl")
async def test_key_update_is_answered(server_context: ssl.SSLContext) -> None:
    async with served(server_context) as port, openssl_client(port, "-tls1_3") as say:
        for _ in range(3):
            # openssl's command for new keys, which asks the server for new ones as well.
            await say(b"K\n", b"KEYUPDATE")
            await say(b"GET / HTTP/1.1\nHost: x\n\n", b"hello")


@pytest.mark.needs("openssl")
async def test_renegotiation_is_refused(server_context: ssl.SSLContext) -> None:
    async with served(server_context) as port, openssl_client(port, "-tls1_2") as say:
        await say(b"GET / HTTP/1.1\nHost: x\n\n", b"hello")
        # openssl's command for a new handshake.
        await say(b"R\n", b"no renegotiation")
