"""An HTTP/1.1 client of one service: requests, endless answers, and WebSockets, on h11 and trio.

h11 reads every answer, head and body. This file knows one field of the answers' JSON: the "message" of an error. The
methods of the API are in client.py.

`Transport` keeps a few idle connections and opens more when all are in use. It has no tasks of its own, and any number
of tasks may share it. A cancelled request closes its connection. A kept-alive connection may be closed by the server at
any time; a request that fails on one before the first byte of an answer is sent once more if that is safe (GET, PUT,
PATCH). A POST or DELETE is not repeated, and its caller has to find out whether it was carried out.

A service may have several URLs, of which one serves at a time. The URL that answered last is tried first, and each
other one when no connection to it can be opened, or when it answers that it does not serve now (`NOT_SERVING`). A
request that may be repeated is also sent to the next one when its connection was lost before an answer began. What
got no answer in time is not repeated, but the next request begins with the next URL.

Every failure is a ClientError: ConnectError if there is no connection or it was lost, ResponseError for a status of 400
or more. Error messages contain no tokens.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urlencode

import h11
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard import __version__
from orchard.base.nursery import unwrap_groups
from orchard.codec import ValidationError, parse_json
from orchard.net import tcp, tls, wsframes
from orchard.net.proxies import connector
from orchard.net.urls import (
    NOT_SERVING,
    REFUSED_PAUSE,
    SERVER_ERRORS,
    TAKEOVER_SECONDS,
    ServerURL,
    bracketed,
    join_urls,
    parse_urls,
)
from orchard.net.websocket import PING_INTERVAL, TunnelStream, describe_disconnect, open_messages

# A word in the User-Agent of clients that ignore values unknown to them. Earlier clients refuse the whole answer.
READS_NEW_VALUES = "reads-new-values"


# More idle connections than these are closed.
_MAX_IDLE = 8
# A connection that was idle for longer is not used again: a proxy closes it soon, and a POST that crosses the close is not
# repeated. 30 seconds is the shortest limit that is common.
_MAX_IDLE_SECONDS = 25.0
# Requests at the same time. Others wait for one of them to end.
_MAX_REQUESTS = 64
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_RECEIVE_BYTES = 64 * 1024
# Characters of an unexpected answer that an error message repeats.
_EXCERPT_CHARACTERS = 200
_REPEATABLE = frozenset({"GET", "PUT", "PATCH"})
# Raised when a connection ends or carries something other than HTTP.
_CONNECTION_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError)

ItemT = TypeVar("ItemT")


class ClientError(Exception):
    """A request did not succeed. str() is a sentence for the user."""


class ConnectError(ClientError):
    """There is no connection, or it was lost. The request may or may not have been carried out."""


class AnswerTooLargeError(ClientError):
    """An answer was larger than what this client takes. The request was carried out."""


class ResponseError(ClientError):
    """The server answered with an error. `status` is the HTTP status, `message` the server's own words.

    `retry_after` are the seconds after which the same request may succeed; None if the server does not say so. A status of
    500 or more that is not Orchard's is that of a proxy without a controller, which is tried again after a second.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{message} (HTTP status {status})")
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class ClientResponse:
    """A complete answer. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """Parse the body as JSON. Raises ClientError."""
        try:
            return parse_json(self.body)
        except ValidationError as error:
            hint = "is this the URL of an Orchard controller?"
            begins = f"The answer begins: {excerpt(self.body)}"
            raise ClientError(f"the answer is not JSON, {hint} {begins} ({error})") from None


class Items(Generic[ItemT]):
    """An asynchronous iterator over what `take` returns, until that is None.

    Unlike an asynchronous generator it needs no closing, so a loop over it may be left at any time.
    """

    def __init__(self, take: Callable[[], Awaitable[ItemT | None]]) -> None:
        self._take = take

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ItemT:
        item = await self._take()
        if item is None:
            raise StopAsyncIteration
        return item


# ---- connections ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Endpoint:
    """One URL of the service. `base_path` goes before the paths of its requests."""

    url: str
    host: str
    port: int
    base_path: str
    headers: Sequence[tuple[str, str]] = field(repr=False)
    connect: tcp.Connect


@dataclass(slots=True)
class _Attempts:
    """The endpoints that one request has tried: why each of them failed, and the one that is tried now."""

    failures: dict[_Endpoint, ClientError] = field(default_factory=dict)
    present: _Endpoint | None = None
    # Until this time, endpoints that refuse connections are tried again: another controller may be taking over.
    until: float = field(default_factory=lambda: trio.current_time() + TAKEOVER_SECONDS)

    def error(self) -> ClientError:
        """Return the error of the only endpoint that was tried, or a ConnectError that names each and why it failed."""
        if len(self.failures) == 1:
            return next(iter(self.failures.values()))
        reasons = [
            f"{endpoint.url}: {error}" if isinstance(error, ResponseError) else str(error)
            for endpoint, error in self.failures.items()
        ]
        return ConnectError("; ".join(reasons))


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that may be sent to any endpoint. `may_repeat`: also after it may have been carried out."""

    method: str
    target: str
    body: bytes = field(default=b"", repr=False)
    headers: Sequence[tuple[str, str]] = ()
    may_repeat: bool = True

    def head(self, endpoint: _Endpoint) -> h11.Request:
        target = endpoint.base_path + self.target
        return h11.Request(method=self.method, target=target, headers=[*endpoint.headers, *self.headers])


class _Connection:
    """A stream to an endpoint, and h11's state of it."""

    def __init__(self, endpoint: _Endpoint, stream: trio.abc.Stream) -> None:
        self.endpoint = endpoint
        self.stream = stream
        # Whether a request was sent over it.
        self.is_used = False
        # Whether a byte of the present answer has arrived.
        self.is_answering = False
        self._idle_since = trio.current_time()
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)

    async def exchange(self, request: _Request) -> tuple[int, dict[str, str]]:
        """Send a request and return the status and the headers of its answer. Raises one of `_CONNECTION_ERRORS`."""
        self.is_answering = False
        body = [h11.Data(data=request.body)] if request.body else []
        events: list[h11.Event] = [request.head(self.endpoint), *body, h11.EndOfMessage()]
        await self.stream.send_all(b"".join(self._http.send(event) or b"" for event in events))
        self.is_used = True
        # Informational answers such as 100 are skipped. 101 is the last of an upgraded connection.
        while not isinstance(event := await self._next_event(), h11.Response) and event.status_code != 101:
            pass
        return event.status_code, {name.decode().lower(): value.decode("latin-1") for name, value in event.headers}

    async def receive_piece(self) -> bytes | None:
        """Return the next piece of the answer's body, None at its end. Raises one of `_CONNECTION_ERRORS`."""
        event = await self._next_event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def receive_body(self) -> bytes:
        """Return the answer's whole body. Raises AnswerTooLargeError, or one of `_CONNECTION_ERRORS`."""
        parts: list[bytes] = []
        size = 0
        while (part := await self.receive_piece()) is not None:
            parts.append(part)
            size += len(part)
            if size > _MAX_BODY_BYTES:
                raise AnswerTooLargeError(f"the answer is larger than {_MAX_BODY_BYTES} bytes")
        return b"".join(parts)

    async def _next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self.stream.receive_some(_RECEIVE_BYTES)
            if not data and not self.is_answering:
                raise trio.BrokenResourceError("it was closed before an answer came")
            self.is_answering = True
            self._http.receive_data(bytes(data))
        return event

    def early(self) -> bytes:
        """Return the bytes that were read beyond an answer of 101."""
        return bytes(self._http.trailing_data[0])

    def prepare_reuse(self) -> bool:
        """Prepare the connection for another request, and return True. Return False if it cannot be used again."""
        done = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        if not done or self._http.trailing_data[0]:
            return False
        self._http.start_next_cycle()
        self._idle_since = trio.current_time()
        return True

    def is_stale(self) -> bool:
        """Return whether an idle connection is too old, was closed by the server, or has received bytes of no answer."""
        if trio.current_time() - self._idle_since > _MAX_IDLE_SECONDS:
            return True
        connection = tcp.socket_of(self.stream)
        return connection is not None and connection.is_readable()


# ---- the transport -------------------------------------------------------------------------------------------------


class Transport:
    """A client of the service at `url`, for example "https://controller:6120" or "http://127.0.0.1:6120/prefix".

    `url` may be several URLs, separated by commas. All paths are below the URL and `base_path`, for example "/v1".
    `authorization` is the value of that header, "" for none. `certificate` is a certificate in PEM, the only one that
    is then trusted; without it, the host's CAs are, or what `trust` says. `connect_seconds` bounds TCP and TLS
    together, for each URL, `answer_seconds` a whole answer, or the head of an endless one. `connect` opens a connection
    to a host and port, and raises OSError; by default it is TCP with keep-alive, through the proxy that the environment
    names (proxies.py).

    Use it as an asynchronous context manager, or call `aclose`. Raises ValueError for an invalid URL, certificate or
    proxy.
    """

    def __init__(
        self,
        url: str,
        *,
        base_path: str = "",
        authorization: str = "",
        certificate: bytes | None = None,
        trust: tls.Trust | None = None,
        connect_seconds: float,
        answer_seconds: float,
        connect: tcp.Connect | None = None,
    ) -> None:
        servers = parse_urls(url, base_path)
        # The URLs in their normal form.
        self.url = join_urls(servers)
        try:
            self._trust = (trust or tls.Trust(certificate)) if servers[0].is_tls else None
        except tls.TLSError as error:
            raise ValueError(f"the certificate to trust: {error}") from error
        headers = [("User-Agent", f"orchard/{__version__} ({READS_NEW_VALUES})")]
        if authorization:
            headers.append(("Authorization", authorization))
        # The first one is tried first.
        self._endpoints = [_endpoint(server, base_path, headers, connect) for server in servers]
        self._connect_seconds = connect_seconds
        self._answer_seconds = answer_seconds
        self._idle: list[_Connection] = []
        self._requests = trio.CapacityLimiter(_MAX_REQUESTS)
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the idle connections. Connections in use are closed when their requests end."""
        self._closed = True
        await self.close_idle()

    async def close_idle(self) -> None:
        """Close the idle connections, so that the next requests open others. The network path may have changed."""
        # Closing forcefully waits for nothing. A cancellation would leave all but the first connection open.
        with trio.CancelScope(shield=True):
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
        headers: Sequence[tuple[str, str]] = (),
    ) -> ClientResponse:
        """Send a request, and return its answer. `json` is sent as the body, unless it is `...`.

        Raises ConnectError, ResponseError for a status of 400 or more, and AnswerTooLargeError beyond 64 MiB.
        """
        request = _make_request(method, path, query, json, headers)
        async with self._requests:
            with self._attempts() as attempts:
                answer = await self._exchange(request, attempts)
        if answer.status >= 400:
            raise _response_error(answer)
        return answer

    async def post(self, path: str, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> int:
        """POST JSON over a connection of its own, and return the status of the answer, whose body is not read.

        For receivers that are not trusted: nothing that they send beyond the head matters. Raises ConnectError.
        """
        about = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        request = _Request("POST", path, body, [*about, *headers], may_repeat=False)
        with self._attempts() as attempts:
            connection = await self._open(attempts)
            try:
                with self._translated_errors(connection):
                    status, _ = await connection.exchange(request)
            finally:
                await trio.aclose_forcefully(connection.stream)
        return status

    async def _exchange(self, request: _Request, attempts: _Attempts) -> ClientResponse:
        while True:
            connection = await self._take_connection(attempts)
            was_used = connection.is_used
            is_complete = False
            try:
                status, headers = await connection.exchange(request)
                answer = ClientResponse(status, headers, await connection.receive_body())
                is_complete = True
            except _CONNECTION_ERRORS as error:
                may_repeat = request.may_repeat and not connection.is_answering
                # If the server closed the connection while it was idle, send the request over another one.
                if not (was_used and may_repeat):
                    self._note_lost(connection, attempts, error, may_repeat=may_repeat)
            finally:
                await self._put_back(connection, is_complete=is_complete)
            if is_complete and not (self._is_not_serving(answer, connection, attempts) and request.may_repeat):
                return answer

    async def _begin(self, request: _Request, attempts: _Attempts) -> tuple[_Connection, ClientResponse]:
        """Send a request over a connection of its own, which the caller closes.

        Return the connection and the answer, whose body was read only if its status is 400 or more.
        """
        while True:
            connection = await self._open(attempts)
            is_begun = False
            try:
                status, headers = await connection.exchange(request)
                body = await connection.receive_body() if status >= 400 else b""
                answer = ClientResponse(status, headers, body)
                is_begun = not self._is_not_serving(answer, connection, attempts)
            except _CONNECTION_ERRORS as error:
                may_repeat = request.may_repeat and not connection.is_answering
                self._note_lost(connection, attempts, error, may_repeat=may_repeat)
            finally:
                if not is_begun:
                    await trio.aclose_forcefully(connection.stream)
            if is_begun:
                return connection, answer

    @asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:  # fmt: skip
        """GET an answer that may be endless, over a connection of its own, for the time of the block.

        Yields an iterator over the pieces of the body, which raises ConnectError when the connection is lost. Raises
        ConnectError and ResponseError.
        """
        with self._attempts() as attempts:
            connection, answer = await self._begin(_make_request("GET", path, query, ...), attempts)
        try:
            if answer.status >= 400:
                raise _response_error(answer)
            yield Items(partial(self._receive_piece, connection))
        finally:
            await trio.aclose_forcefully(connection.stream)

    async def _receive_piece(self, connection: _Connection) -> bytes | None:
        with self._translated_errors(connection):
            return await connection.receive_piece()

    # -- WebSockets

    @asynccontextmanager
    async def websocket(
        self, path: str, query: Mapping[str, str] | None = None, *, max_message_size: int = 1024 * 1024
    ) -> AsyncIterator[WebSocketConnection]:
        """Open a WebSocket for messages, which is closed at the end of the block.

        A message over `max_message_size` bytes closes it. Raises ConnectError, and ResponseError if the server refuses.
        Exceptions of the block pass unchanged, except that ConnectionClosed becomes ConnectError.
        """
        async with self._upgraded(path, query) as (connection, early):
            try:
                async with open_messages(
                    connection.stream,
                    client=True,
                    early=early,
                    message_queue_size=1,
                    max_message_size=max_message_size,
                    receive_buffer_size=_RECEIVE_BYTES,
                ) as websocket:
                    yield websocket
            except ConnectionClosed as error:
                url = connection.endpoint.url
                raise ConnectError(f"{url} closed the WebSocket ({describe_disconnect(error)})") from None

    @asynccontextmanager
    async def tunnel(
        self, path: str, query: Mapping[str, str], ping_interval: float = PING_INTERVAL
    ) -> AsyncIterator[TunnelStream]:
        """Open a WebSocket for a stream of bytes, which is closed at the end of the block.

        Raises ConnectError, and ResponseError if the server refuses. A BrokenResourceError of the block becomes
        ConnectError.
        """
        async with self._upgraded(path, query) as (connection, early):
            stream = connection.stream
            # The pings of TunnelStream tell a dead peer from a slow reader.
            tcp.disable_user_timeout(stream)
            tunnel = TunnelStream(stream, client=True, early=early, ping_interval=ping_interval)
            with unwrap_groups():
                # The tasks of the stream end with the block.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(tunnel.run)
                    yield tunnel
                    await tunnel.aclose()
                    nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _upgraded(self, path: str, query: Mapping[str, str] | None) -> AsyncIterator[tuple[_Connection, bytes]]:
        """Make a connection a WebSocket, and close it at the end of the block.

        Yields the connection, and the bytes that were read from it beyond the answer.

        Raises ConnectError, and ResponseError if the server refuses. A BrokenResourceError of the block becomes
        ConnectError.
        """
        key = base64.b64encode(os.urandom(16)).decode()
        headers = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
        headers += [("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", key)]
        # A command may have been started by a request whose answer was lost.
        request = _Request("GET", _target(path, query), headers=headers, may_repeat=False)
        with self._attempts() as attempts:
            connection, answer = await self._begin(request, attempts)
        try:
            with self._translated_errors(connection):
                if answer.status != 101:
                    raise _response_error(answer)
                accept = answer.headers.get("sec-websocket-accept")
                if accept != wsframes.accept_value(key) or "sec-websocket-extensions" in answer.headers:
                    raise ConnectError(f"{connection.endpoint.url} answered the WebSocket handshake incorrectly")
                yield connection, connection.early()
        finally:
            await trio.aclose_forcefully(connection.stream)

    # -- connections

    async def _take_connection(self, attempts: _Attempts) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.endpoint is self._endpoints[0] and not connection.is_stale():
                attempts.present = connection.endpoint
                return connection
            await trio.aclose_forcefully(connection.stream)
        return await self._open(attempts)

    async def _put_back(self, connection: _Connection, *, is_complete: bool) -> None:
        """Keep a connection whose answer is complete, if there is room, or close it."""
        if is_complete and connection.prepare_reuse() and not self._closed and len(self._idle) < _MAX_IDLE:
            self._idle.append(connection)
        else:
            await trio.aclose_forcefully(connection.stream)

    async def _open(self, attempts: _Attempts) -> _Connection:
        """Open a connection to the first endpoint that accepts one and has not failed. Raises ClientError."""
        while True:
            for endpoint in list(self._endpoints):
                if endpoint in attempts.failures:
                    continue
                attempts.present = endpoint
                try:
                    connection = await self._open_to(endpoint)
                except ConnectError as error:
                    attempts.failures[endpoint] = error
                    self._move_on(endpoint)
                else:
                    self._prefer(endpoint)
                    return connection
            refusing = [endpoint for endpoint, error in attempts.failures.items() if _is_refusal(error)]
            if len(self._endpoints) == 1 or not refusing or trio.current_time() > attempts.until:
                raise attempts.error()
            # A refused connection carried no request. Another controller may be about to lead.
            await trio.sleep(REFUSED_PAUSE)
            for endpoint in refusing:
                del attempts.failures[endpoint]

    async def _open_to(self, endpoint: _Endpoint) -> _Connection:
        """Open a connection to an endpoint. Raises ConnectError."""
        with trio.move_on_after(self._connect_seconds):
            try:
                stream = await endpoint.connect(endpoint.host, endpoint.port)
                if self._trust is not None:
                    stream = await self._secure(self._trust, stream, endpoint.host)
                return _Connection(endpoint, stream)
            except tls.TLSError as error:
                raise ConnectError(f"cannot reach {endpoint.url}: {error}") from error
            except (OSError, trio.BrokenResourceError) as error:
                raise ConnectError(f"cannot reach {endpoint.url}: {tcp.describe_network_error(error)}") from error
        raise ConnectError(f"cannot reach {endpoint.url}: no connection within {self._connect_seconds:g} seconds")

    async def _secure(self, trust: tls.Trust, stream: trio.abc.Stream, host: str) -> trio.abc.Stream:
        """Do the TLS handshake. The stream is closed if that fails."""
        secured: trio.abc.Stream | None = None
        try:
            secured = await trust.secure(stream, host)
            return secured
        finally:
            if secured is None:
                await trio.aclose_forcefully(stream)

    def _prefer(self, endpoint: _Endpoint) -> None:
        """Try an endpoint first, and the others in their order after it."""
        at = self._endpoints.index(endpoint)
        self._endpoints = self._endpoints[at:] + self._endpoints[:at]

    def _move_on(self, endpoint: _Endpoint) -> None:
        """Try the endpoint after this one first, unless another request has changed the order already."""
        if self._endpoints[0] is endpoint:
            self._endpoints = [*self._endpoints[1:], endpoint]

    # -- errors

    @contextmanager
    def _attempts(self) -> Iterator[_Attempts]:
        """Bound the block by `answer_seconds`. Raises ConnectError then, and the next request begins with another URL."""
        attempts = _Attempts()
        with trio.move_on_after(self._answer_seconds) as scope:
            yield attempts
        if scope.cancelled_caught and attempts.present is not None:
            self._move_on(attempts.present)
            raise ConnectError(f"{attempts.present.url} did not answer within {self._answer_seconds:g} seconds")

    def _note_lost(self, connection: _Connection, attempts: _Attempts, error: Exception, *, may_repeat: bool) -> None:
        """Note that a connection was lost. Raises ConnectError unless the request may be repeated."""
        lost = attempts.failures[connection.endpoint] = _lost(connection, error)
        if not may_repeat:
            raise lost from error

    def _is_not_serving(self, answer: ClientResponse, connection: _Connection, attempts: _Attempts) -> bool:
        """Return whether an answer says that another endpoint may serve the request, and note that."""
        name, value = NOT_SERVING
        if answer.status != 503 or answer.headers.get(name.lower()) != value:
            return False
        attempts.failures[connection.endpoint] = _response_error(answer)
        self._move_on(connection.endpoint)
        return True

    @contextmanager
    def _translated_errors(self, connection: _Connection) -> Iterator[None]:
        """Raise ConnectError for one of `_CONNECTION_ERRORS` in the block."""
        try:
            yield
        except _CONNECTION_ERRORS as error:
            raise _lost(connection, error) from error


def _is_refusal(error: ClientError) -> bool:
    """Return whether nothing listens at an endpoint, at none of its addresses."""
    cause = error.__cause__
    # trio has the error of each address below that of the host.
    reasons = getattr(cause.__cause__, "exceptions", [cause.__cause__ or cause]) if cause is not None else []
    return bool(reasons) and all(isinstance(reason, ConnectionRefusedError) for reason in reasons)


def _endpoint(
    server: ServerURL, base_path: str, headers: Sequence[tuple[str, str]], connect: tcp.Connect | None
) -> _Endpoint:
    return _Endpoint(
        server.text,
        server.host,
        server.port,
        server.prefix + base_path,
        [("Host", f"{bracketed(server.host)}:{server.port}"), *headers],
        connect or connector(server.is_tls, server.host, os.environ),
    )


def _make_request(
    method: str,
    path: str,
    query: Mapping[str, str] | None,
    value: object,
    headers: Sequence[tuple[str, str]] = (),
) -> _Request:
    body = b"" if value is ... else json.dumps(value, ensure_ascii=False).encode()
    if body or method in ("POST", "PUT", "PATCH"):
        headers = [*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    return _Request(method, _target(path, query), body, headers, method in _REPEATABLE)


def _target(path: str, query: Mapping[str, str] | None) -> str:
    return path + (f"?{urlencode(query)}" if query else "")


def _lost(connection: _Connection, error: Exception) -> ConnectError:
    url = connection.endpoint.url
    if isinstance(error, h11.RemoteProtocolError):
        # Without the line that h11 adds to some of them: servers repeat requests, which may hold secrets.
        return ConnectError(f"{url} sent an invalid HTTP answer: {str(error).partition(': bytearray(')[0]}")
    return ConnectError(f"the connection to {url} was lost: {tcp.describe_network_error(error)}")


def excerpt(content: bytes | str) -> str:
    """Return the beginning of an unexpected answer in quotes, without control characters."""
    text = content if isinstance(content, str) else content[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "replace")
    return repr("".join(char if char.isprintable() else " " for char in text[:_EXCERPT_CHARACTERS]))


def _response_error(answer: ClientResponse) -> ResponseError:
    seconds = answer.headers.get("retry-after", "")
    try:
        message = parse_json(answer.body)["message"]
    except (ValidationError, TypeError, KeyError):
        message = f"the error is not one of Orchard's, its body begins: {excerpt(answer.body)}"
        seconds = "1" if answer.status >= SERVER_ERRORS else seconds
    # A proxy may send a date, which is ignored.
    return ResponseError(answer.status, str(message), float(seconds) if seconds.isdecimal() else None)
