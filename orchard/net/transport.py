"""The way to one controller: HTTP/1.1 and WebSockets out, on h11 and trio-websocket. Law: sockets out; of what is asked
and answered it knows the frame and not the meaning, but for the one field of a refusal.

`Transport` keeps a few connections alive and opens more when it must; it has no tasks of its own, and any number of tasks
may share it. A request that fails on a kept-alive connection before any byte of its answer came is sent once more if
doing it twice is the same as once (GET, PUT, PATCH). A POST or DELETE is not: whoever sent it has to find out what became
of it. A cancelled request closes its connection.

Everything raises ClientError: ConnectError when nobody was reached or the connection was lost, ResponseError when the
controller refused. No message holds a token.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urlencode, urlsplit

import h11
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard import __version__
from orchard.codec import ValidationError, parse_json
from orchard.net import tcp, tls, wsframes
from orchard.net.websocket import PING_INTERVAL, TunnelStream, describe_disconnect, open_messages
from orchard.nursery import first_exception, unwrap_groups

PORT = 6120  # of a URL that names none
CONNECT_SECONDS = 10.0  # for TCP and TLS together
ANSWER_SECONDS = 60.0  # for the whole answer to a request; streams have no such limit
KEPT = 8  # idle connections
AT_ONCE = 64  # requests; the others wait
MAX_BODY = 64 * 1024 * 1024  # bytes of an answer
MAX_HEAD = 64 * 1024  # bytes of an answer's head
RECEIVE_BYTES = 64 * 1024  # of one read
SWITCHING = 101  # HTTP's status of an answer that what follows is no HTTP
MAX_SHOWN = 200  # characters of an answer that is not Orchard's
REPEATABLE = frozenset({"GET", "PUT", "PATCH"})

T = TypeVar("T")
Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]


class ClientError(Exception):
    """A request did not succeed; str() is a sentence for the user."""


class ConnectError(ClientError):
    """The controller was not reached, or the connection was lost; a request may or may not have been carried out."""


class ResponseError(ClientError):
    """The controller refused: `status` is HTTP's, `message` the controller's own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (HTTP status {status})")
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class ClientResponse:
    """A whole answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Parse the body. Raises ClientError."""
        try:
            return parse_json(self.body)
        except ValidationError as error:
            why = f"the answer is no JSON, is this an Orchard? It begins: {excerpt(self.body)} ({error})"
            raise ClientError(why) from None


class Items(Generic[T]):
    """An asynchronous iterator that may be left at any time, other than a generator. `take` gives None at the end."""

    def __init__(self, take: Callable[[], Awaitable[T | None]]) -> None:
        self._take = take

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        item = await self._take()
        if item is None:
            raise StopAsyncIteration
        return item


# ---- connections ---------------------------------------------------------------------------------------------------


class _Connection:
    """A stream to the controller, and HTTP's state on it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.fresh = True  # nothing was sent over it yet
        self.answering = False  # whether a byte of the present answer came
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)

    async def send(self, request: h11.Request, body: bytes) -> tuple[int, dict[str, str]]:
        """Send a request, and give its answer's status and headers."""
        self.answering = False
        events: list[h11.Event] = [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        await self.stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
        self.fresh = False
        while not isinstance(event := await self._next(), h11.Response) and event.status_code != SWITCHING:
            pass  # 100 Continue and its like
        return event.status_code, {name.decode().lower(): value.decode("latin-1") for name, value in event.headers}

    async def piece(self) -> bytes | None:
        """Give the next piece of the answer's body, None at its end."""
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def body(self) -> bytes:
        """Give the answer's whole body. Raises ClientError when it is too large."""
        parts: list[bytes] = []
        size = 0
        while (part := await self.piece()) is not None:
            parts.append(part)
            size += len(part)
            if size > MAX_BODY:
                raise ClientError(f"the answer is larger than {MAX_BODY} bytes")
        return b"".join(parts)

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self.stream.receive_some(RECEIVE_BYTES)
            if not data and not self.answering:
                raise trio.BrokenResourceError("it was closed before an answer came")
            self.answering = True
            self._http.receive_data(bytes(data))
        return event

    def early(self) -> bytes:
        """Give what came beyond the answer that has switched to another protocol."""
        return bytes(self._http.trailing_data[0])

    def reusable(self) -> bool:
        """Make ready for another request, if both sides go on."""
        if (
            self._http.our_state is not h11.DONE
            or self._http.their_state is not h11.DONE
            or self._http.trailing_data[0]
        ):
            return False
        self._http.start_next_cycle()
        return True

    def stale(self) -> bool:
        """Whether the server has closed it meanwhile, or sent what nobody asked for."""
        transport = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
        # A connection at rest has nothing to read but its end.
        return isinstance(transport, trio.SocketStream) and transport.socket.is_readable()


@dataclass(frozen=True, slots=True)
class _Switched:
    """The stream of a connection that has become a WebSocket, and what of it came with the answer."""

    stream: trio.abc.Stream
    early: bytes


# ---- the transport -------------------------------------------------------------------------------------------------


class Transport:
    """The way to the controller at `url`, e.g. "https://controller:6120" or "http://127.0.0.1:6120/prefix".

    `account` and `token` are a service account's; `access_token` in their place lets into one VM. `certificate`, in PEM,
    is then the only one that is trusted, else the host's CAs are. `connect` opens the connections, and raises OSError;
    default: over TCP. Use it as an asynchronous context manager, or call `aclose`. Raises ValueError for a URL or a
    certificate that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        account: str = "",
        token: str = "",
        access_token: str = "",
        certificate: bytes | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
        connect: Connect | None = None,
    ) -> None:
        self.url, self._secure, self._host, self._port, self._prefix = parse_url(url)
        try:
            self._trust = tls.Trust(certificate) if self._secure else None
        except tls.TLSError as error:
            raise ValueError(f"the certificate to trust: {error}") from error
        authority = f"[{self._host}]" if ":" in self._host else self._host
        self._headers = [("Host", f"{authority}:{self._port}"), ("User-Agent", f"orchard/{__version__}")]
        if account:
            basic = base64.b64encode(f"{account}:{token}".encode()).decode()
            self._headers.append(("Authorization", f"Basic {basic}"))
        elif access_token:
            self._headers.append(("Authorization", f"Bearer {access_token}"))
        self._connect_seconds = connect_seconds
        self._answer_seconds = answer_seconds
        self._connect = connect or tcp.connect
        self._idle: list[_Connection] = []
        self._slots = trio.CapacityLimiter(AT_ONCE)
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections; those at work close when they are done."""
        self._closed = True
        await self.start_afresh()

    async def start_afresh(self) -> None:
        """Close the idle connections, and open others when they are needed: the way that they took may be broken."""
        with trio.CancelScope(
            shield=True
        ):  # it waits for nobody; a cancellation would leave all but the first one open
            while self._idle:
                await trio.aclose_forcefully(self._idle.pop().stream)
        await trio.lowlevel.checkpoint()

    # -- requests

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        json: object = ...,
        body: bytes = b"",
    ) -> ClientResponse:
        """Send a request to a path below /v1, and give its answer. `json` is sent as JSON in place of `body`.

        Raises ResponseError for a status of 400 or more.
        """
        request, body = self._request(method, path, query, json, body)
        async with self._slots:
            with self._in_time(self._answer_seconds, "it did not answer within {:g} seconds"):
                answer = await self._exchange(request, body, may_repeat=method in REPEATABLE)
        if answer.status >= 400:
            raise _refusal(answer)
        return answer

    async def _exchange(self, request: h11.Request, body: bytes, *, may_repeat: bool) -> ClientResponse:
        while True:
            connection = await self._connection()
            reused = not connection.fresh
            whole = False
            try:
                status, headers = await connection.send(request, body)
                content = await connection.body()
                whole = True
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
                if reused and may_repeat and not connection.answering:
                    continue  # the server closed it while it was idle
                raise self._lost(error) from error
            finally:
                await self._put_back(connection, reusable=whole)
            return ClientResponse(status, headers, content)

    @asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:  # fmt: skip
        """GET an answer that may have no end: an iterator of its pieces. Raises ResponseError for a refusal."""
        request, _ = self._request("GET", path, query, ..., b"")
        connection = await self._open()
        try:
            with self._in_time(self._answer_seconds, "it did not answer within {:g} seconds"):
                try:
                    status, headers = await connection.send(request, b"")
                    if status >= 400:
                        raise _refusal(ClientResponse(status, headers, await connection.body()))
                except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
                    raise self._lost(error) from error
            yield Items(partial(self._piece, connection))
        finally:
            await trio.aclose_forcefully(connection.stream)

    async def _piece(self, connection: _Connection) -> bytes | None:
        try:
            return await connection.piece()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
            raise self._lost(error) from error

    @asynccontextmanager
    async def websocket(
        self, path: str, query: Mapping[str, str] | None = None, *, max_message_size: int = 1024 * 1024
    ) -> AsyncIterator[WebSocketConnection]:
        """Open a WebSocket, closed at the end of the block. Raises ResponseError for a refusal.

        What the block raises comes out as it is, but for ConnectionClosed, which becomes ConnectError.
        """
        async with self._switched(path, query) as opened:
            try:
                async with open_messages(
                    opened.stream,
                    client=True,
                    early=opened.early,
                    message_queue_size=1,
                    max_message_size=max_message_size,
                    receive_buffer_size=RECEIVE_BYTES,
                ) as websocket:
                    yield websocket
            except ConnectionClosed as error:
                raise ConnectError(f"{self.url} closed the WebSocket ({describe_disconnect(error)})") from None

    @asynccontextmanager
    async def tunnel(
        self, path: str, query: Mapping[str, str], ping_interval: float = PING_INTERVAL
    ) -> AsyncIterator[TunnelStream]:
        """Open a WebSocket whose binary messages are a stream of bytes, closed at the end of the block.

        Raises ResponseError for a refusal. A BrokenResourceError that the block lets out becomes ConnectError.
        """
        async with self._switched(path, query) as opened:
            tcp.disable_user_timeout(opened.stream)
            stream = TunnelStream(opened.stream, client=True, early=opened.early, ping_interval=ping_interval)
            with unwrap_groups():
                async with trio.open_nursery() as nursery:  # what keeps the stream going ends with the block
                    nursery.start_soon(stream.run)
                    yield stream
                    await stream.aclose()
                    nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _switched(self, path: str, query: Mapping[str, str] | None) -> AsyncIterator[_Switched]:
        """Have a connection become a WebSocket, closed at the end of the block. Raises ResponseError for a refusal.

        A BrokenResourceError that the block lets out becomes ConnectError.
        """
        key = base64.b64encode(os.urandom(16)).decode()
        asks = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
        asks += [("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", key)]
        request = h11.Request(method="GET", target=self._target(path, query), headers=[*self._headers, *asks])
        connection = await self._open()
        try:
            with self._in_time(self._answer_seconds, "it did not answer within {:g} seconds"):
                status, headers = await connection.send(request, b"")
                if status != SWITCHING:
                    raise _refusal(ClientResponse(status, headers, await connection.body()))
            if (
                headers.get("sec-websocket-accept") != wsframes.accept_value(key)
                or "sec-websocket-extensions" in headers
            ):
                raise ConnectError(f"{self.url} does not open a WebSocket as it should")
            yield _Switched(connection.stream, connection.early())
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError) as error:
            raise self._lost(error) from error
        finally:
            await trio.aclose_forcefully(connection.stream)

    # -- connections

    def _request(
        self, method: str, path: str, query: Mapping[str, str] | None, value: object, body: bytes
    ) -> tuple[h11.Request, bytes]:
        if value is not ...:
            body = json.dumps(value, ensure_ascii=False).encode()
        headers = list(self._headers)
        if body or method in ("POST", "PUT", "PATCH"):
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        return h11.Request(method=method, target=self._target(path, query), headers=headers), body

    def _target(self, path: str, query: Mapping[str, str] | None) -> str:
        return f"{self._prefix}/v1{path}" + (f"?{urlencode(query)}" if query else "")

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale():
                return connection
            await trio.aclose_forcefully(connection.stream)
        return await self._open()

    async def _put_back(self, connection: _Connection, *, reusable: bool) -> None:
        if reusable and connection.reusable() and not self._closed and len(self._idle) < KEPT:
            self._idle.append(connection)
        else:
            await trio.aclose_forcefully(connection.stream)

    async def _open(self) -> _Connection:
        """Open a connection. Raises ConnectError."""
        with self._in_time(self._connect_seconds, "no connection within {:g} seconds"):
            try:
                stream = await self._connect(self._host, self._port)
                if self._trust is not None:
                    stream = await self._secured(self._trust, stream)
            except tls.TLSError as error:
                raise ConnectError(f"cannot reach {self.url}: {error}") from error
            except (OSError, trio.BrokenResourceError) as error:
                raise ConnectError(f"cannot reach {self.url}: {in_words(error)}") from error
        return _Connection(stream)

    async def _secured(self, trust: tls.Trust, stream: trio.abc.Stream) -> trio.abc.Stream:
        secured: trio.abc.Stream | None = None
        try:
            secured = await trust.secure(stream, self._host)
            return secured
        finally:
            if secured is None:
                await trio.aclose_forcefully(stream)

    def _in_time(self, seconds: float, complaint: str) -> _InTime:
        return _InTime(seconds, f"{self.url}: {complaint.format(seconds)}")

    def _lost(self, error: Exception) -> ConnectError:
        if isinstance(error, h11.RemoteProtocolError):
            return ConnectError(f"{self.url} does not speak HTTP as it should: {error}")
        return ConnectError(f"the connection to {self.url} was lost: {in_words(error)}")


class _InTime:
    """A deadline for a block, which raises ConnectError when it passes."""

    def __init__(self, seconds: float, complaint: str) -> None:
        self._seconds = seconds
        self._complaint = complaint
        self._scope = trio.CancelScope()

    def __enter__(self) -> None:
        self._scope.deadline = trio.current_time() + self._seconds
        self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        swallowed = bool(self._scope.__exit__(kind, error, traceback))
        if self._scope.cancelled_caught:
            raise ConnectError(self._complaint)
        return swallowed


def parse_url(url: str) -> tuple[str, bool, str, int, str]:
    """Give (normal form, whether it is TLS, host, port, prefix). Raises ValueError that says what was expected."""
    expected = "expected one such as https://controller.example.com:6120"
    try:
        parts = urlsplit(url)
        port = parts.port or PORT
    except ValueError as error:
        raise ValueError(f'the controller\'s URL is "{url}" ({error}), {expected}') from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the controller's URL holds a user name, {expected}, and the account apart from it")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f'the controller\'s URL is "{url}", {expected}')
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f'the controller\'s URL is "{url}", {expected}, in ASCII and without blanks')
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    authority = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{authority}:{port}{prefix}", parts.scheme == "https", parts.hostname, port, prefix


def in_words(error: BaseException) -> str:
    """Say in plain words why there is no connection; trio's own words hold lists of attempts."""
    cause = first_exception(error.__cause__) if error.__cause__ is not None else error
    if isinstance(cause, ssl.SSLError):
        return str(cause.reason or "TLS failed").replace("_", " ").lower()
    if isinstance(cause, socket.gaierror):
        return str(cause.strerror).lower()
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno).lower()
    return str(cause) or "the other end closed it"


def excerpt(body: bytes) -> str:
    """Quote the beginning of what came in place of what was expected."""
    text = body[: 4 * MAX_SHOWN].decode("utf-8", "replace")
    return repr("".join(char if char.isprintable() else " " for char in text)[:MAX_SHOWN])


def _refusal(answer: ClientResponse) -> ResponseError:
    try:
        message = parse_json(answer.body)["message"]
    except (ValidationError, TypeError, KeyError):
        message = f"not an answer of Orchard's: {excerpt(answer.body)}"
    return ResponseError(answer.status, str(message))
