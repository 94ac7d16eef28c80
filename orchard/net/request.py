"""What a handler of the HTTP server gets and returns: requests, answers and errors. No I/O and no parsing of HTTP.

A handler gets a `Request` and what its admission returned. It returns a `Response`, a `Stream`, a `WebSocketUpgrade`, a
`TunnelUpgrade` or a `WhileConnected`, or raises `HTTPError`, of which `error_response` makes an answer. The server keeps what these classes promise for clients that go
away and for its own stop.

Heads and bodies are parsed in parser.py, routes are in router.py.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import unquote

from trio_websocket import WebSocketConnection

from orchard.codec import dump_json, shown
from orchard.net.websocket import TunnelStream

_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# The headers of an answer with status 426 (RFC 9110, section 15.5.22).
_UPGRADE = (("Upgrade", "websocket"), ("Connection", "Upgrade"))


class HTTPError(Exception):
    """A request is answered with an error: a status, a message of one sentence, and further headers.

    `account` is the account that sent a request which is not admitted, if it is known. It is for the request log.
    """

    def __init__(
        self, status: int, message: str, headers: Sequence[tuple[str, str]] = (), *, account: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)
        self.account = account


# ---- requests ------------------------------------------------------------------------------------------------------


def percent_decoded(text: str, what: str) -> str:
    """Decode one segment of a path or one side of a query parameter. Raises HTTPError 400, which names `what`."""
    if "%" not in text:
        return text
    if _BAD_PERCENT.search(text):
        raise HTTPError(400, f"{what} {shown(text)} has a % without two hexadecimal digits")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise HTTPError(400, f"{what} {shown(text)} is not UTF-8 after percent-decoding") from None


class Query:
    """The query of a request. It is parsed at the first use; all methods raise HTTPError 400 if it cannot be decoded."""

    __slots__ = ("_parameters", "_raw")

    def __init__(self, raw: str) -> None:
        self._raw = raw
        self._parameters: dict[str, list[str]] | None = None

    def parameters(self) -> Mapping[str, Sequence[str]]:
        """Return all values of each parameter, in their order."""
        if self._parameters is None:
            found: dict[str, list[str]] = {}
            for pair in self._raw.split("&") if self._raw else ():
                name, _, value = pair.replace("+", " ").partition("=")
                if pair:
                    name = percent_decoded(name, "the query parameter")
                    if "%" in value:
                        value = percent_decoded(value, f"the query parameter {shown(name)}:")
                    found.setdefault(name, []).append(value)
            self._parameters = found
        return self._parameters

    def one(self, name: str) -> str | None:
        """Return the value of a parameter, None if it is absent. Raises HTTPError 400 if it is repeated."""
        values = self.parameters().get(name, ())
        if len(values) > 1:
            raise HTTPError(400, f"the query parameter {shown(name)} is given {len(values)} times, expected once")
        return values[0] if values else None


class Headers:
    """The headers of a request. Made of lower-case names; several of one name are joined with commas."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def get(self, name: str) -> str | None:
        """Return the value of a header whose name is given in any case, None if it is absent. Bytes read as Latin-1."""
        return self._values.get(name.lower())

    def names(self) -> set[str]:
        return set(self._values)

    def replaced(self, name: str, value: str) -> Headers:
        """Return headers with another value for a lower-case name."""
        return Headers({**self._values, name: value})


def list_members(value: str | None) -> list[str]:
    """Return the members of a comma-separated header in lower case, without the empty ones (RFC 9110, section 5.6.1)."""
    return [member for part in value.split(",") if (member := part.strip(" \t").lower())] if value else []


@dataclass(slots=True, eq=False)
class Request:
    """A request. While it is admitted its body is still empty; the server sets the body when it was read."""

    method: str
    # A path and a query.
    target: str
    headers: Headers
    # "1.0" or "1.1".
    version: str = "1.1"
    body: bytes = b""
    # The client's address without its port.
    peer: str = "-"
    # Still percent-encoded, so that an encoded slash does not separate segments. Router.match decodes it.
    path: str = field(init=False)
    query: Query = field(init=False)

    def __post_init__(self) -> None:
        self.path, _, query = self.target.partition("?")
        self.query = Query(query)

    def require_websocket(self) -> None:
        """Raise HTTPError 426 or 400 unless this is a well-formed request for a WebSocket."""
        refusal = _websocket_refusal(self)
        if refusal is not None:
            raise refusal


def _websocket_refusal(request: Request) -> HTTPError | None:
    """Return why a request is not a well-formed one for a WebSocket (RFC 6455, section 4.2.1), None if it is."""
    get = request.headers.get
    asks = (
        "upgrade" in list_members(get("connection"))
        and "websocket" in list_members(get("upgrade"))
        and request.version == "1.1"
    )
    if not asks or request.method != "GET":
        message = "this path is a WebSocket; expected GET with Connection: Upgrade, Upgrade: websocket"
        return HTTPError(426, message, _UPGRADE)
    version, key = get("sec-websocket-version"), get("sec-websocket-key")
    if version != "13":
        message = f"Sec-WebSocket-Version is {shown(version)}, expected 13"
        return HTTPError(426, message, (("Sec-WebSocket-Version", "13"), *_UPGRADE))
    try:
        nonce = base64.b64decode((key or "").encode("latin-1"), validate=True)
    except binascii.Error:
        nonce = b""
    if len(nonce) != 16:
        return HTTPError(400, f"Sec-WebSocket-Key is {shown(key)}, expected 16 bytes in base64")
    if request.body:
        return HTTPError(400, f"the request for a WebSocket has a body of {len(request.body)} bytes, expected none")
    return None


# ---- answers -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Response:
    """A complete answer. A large body may be a sequence of pieces, which are not joined before they are sent."""

    status: int
    body: bytes | Sequence[bytes] = b""
    headers: Sequence[tuple[str, str]] = ()
    content_type: str = "application/json"

    @property
    def pieces(self) -> Sequence[bytes]:
        return (self.body,) if isinstance(self.body, bytes) else self.body


@dataclass(slots=True, eq=False)
class Stream:
    """An answer whose body `produce` sends in pieces, each at once (chunked; for HTTP/1.0 until the close).

    `produce` is cancelled when the client goes away. An `endless` one (a watch) is also cancelled when the server stops,
    and the body ends as if it had returned; another one may run until the grace period of the stop is over.
    """

    produce: Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]]
    content_type: str = "application/x-ndjson"
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    endless: bool = True


@dataclass(slots=True, eq=False)
class WebSocketUpgrade:
    """An answer that makes the connection a WebSocket, which is closed when `session` returns (with 1000, or its code).

    The server refuses the request instead if it is not a well-formed one for a WebSocket, see
    `Request.require_websocket`. A session may raise ConnectionClosed. When the server stops, the WebSocket is closed
    with 1001 and then the session is cancelled.
    """

    session: Callable[[WebSocketConnection], Awaitable[None]]
    # Bytes; a larger message closes the WebSocket with 1009.
    max_message_size: int = 1024 * 1024
    # Messages that wait for the session; the client has to wait while there are so many.
    message_queue_size: int = 1
    # Bytes of one read.
    receive_buffer_size: int = 64 * 1024
    # Seconds between pings of the server; the session may send others.
    ping_interval: float = math.inf


@dataclass(slots=True, eq=False)
class TunnelUpgrade:
    """As WebSocketUpgrade, but the session gets the payload of all messages as one stream of bytes.

    A session may raise BrokenResourceError. A ping is sent every `ping_interval` seconds.
    """

    session: Callable[[TunnelStream], Awaitable[None]]
    ping_interval: float


@dataclass(slots=True, eq=False)
class WhileConnected:
    """An answer that may take long to find: `work` returns it, and is cancelled if the client goes away.

    What the client sends meanwhile is kept for the next request.
    """

    work: Callable[[], Awaitable[AnyResponse]]


AnyResponse = Response | Stream | WebSocketUpgrade | TunnelUpgrade | WhileConnected


class Admission(Protocol):
    """What admission found out about a request. The server reads the account and hands the rest to the handler."""

    @property
    def account(self) -> str:
        """The account that sent the request, for the request log; "" if it is not known."""


def error_response(error: HTTPError) -> Response:
    """Return the answer to a request that failed."""
    return Response(error.status, dump_json({"message": error.message}), error.headers)
