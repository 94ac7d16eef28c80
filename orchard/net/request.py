"""HTTP/1.1 as data: what a request, an answer and a route are, and which requests are refused. Law: no I/O.

`read_head` judges a whole request head: whatever two HTTP readers could understand differently is refused, so that
nothing can be smuggled past a proxy in front. What is left reads in one way only, h11's (a property of the tests), and is
taken apart here: h11 itself would take a seventh of a request's time (./run bench api). Of a chunked body, `Chunked` says
how many of the bytes that came belong to it, before h11 gets them.

`Router` finds what a request is for. A handler gets a `Request` and gives a `Response`, a `Stream`, a
`WebSocketUpgrade` or a `TunnelUpgrade`, or raises HTTPError, which `refused` makes an answer of. What these say about
clients that go away and about the server's stop is kept by the server.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from trio_websocket import WebSocketConnection

from orchard.codec import dump_json, shown
from orchard.net.websocket import TunnelStream

CHUNK_DIGITS = 16  # of a chunk's size: 64 bits
FRAMING_BYTES = 64 * 1024  # of a chunked body that are no body: a million chunks of one byte cost too much time

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"
_HEAD = re.compile(rb"%b /[\x21\x22\x24-\x7e]* HTTP/1\.[01]\r\n(?:%b:%b\r\n)*\r\n" % (_TOKEN, _TOKEN, _VALUE))
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
_HEADER_LINE = re.compile(rb"%b:%b" % (_TOKEN, _VALUE))
_STRAY = re.compile(rb"\x00|(?<!\r)\n|\r(?=[^\n])")  # a NUL, an LF without CR, a CR that another byte than LF follows
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]{1,%d}\r\n" % CHUNK_DIGITS)
_CHUNK_START = re.compile(rb"[0-9A-Fa-f]{0,%d}" % CHUNK_DIGITS)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Headers whose repetition would mean one thing here and another elsewhere.
_SINGLE = frozenset(
    b"authorization content-encoding content-length content-type expect host sec-websocket-key sec-websocket-version "
    b"transfer-encoding upgrade".split()
)
# With `_` for `-` they are other headers, but not for everybody: CGI and its heirs see no difference.
_FRAMING = _SINGLE | {b"connection", b"te", b"trailer"}

_UPGRADE = (("Upgrade", "websocket"), ("Connection", "Upgrade"))  # goes with 426

# ---- what handlers get and give ------------------------------------------------------------------------------------


class HTTPError(Exception):
    """A request that is answered with an error: a status, one sentence, and headers that go with it.

    `account` is who sent the request, for the request log, when a request is not admitted although its sender is known.
    """

    def __init__(
        self, status: int, message: str, headers: Sequence[tuple[str, str]] = (), *, account: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)
        self.account = account


def percent_decoded(text: str, what: str) -> str:
    """Decode one segment of a path or one side of a query field. Raises HTTPError(400) naming `what`."""
    if "%" not in text:
        return text
    if _BAD_PERCENT.search(text):
        raise HTTPError(400, f"{what} {shown(text)} holds a % without two hexadecimal digits")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise HTTPError(400, f"{what} {shown(text)} is not UTF-8 once decoded") from None


class Query:
    """The query of a request, parsed when somebody asks. All methods raise HTTPError(400) if it can't be decoded."""

    __slots__ = ("_fields", "_raw")

    def __init__(self, raw: str) -> None:
        self._raw = raw
        self._fields: dict[str, list[str]] | None = None

    def fields(self) -> Mapping[str, Sequence[str]]:
        """Give the values of every field, in order."""
        if self._fields is None:
            found: dict[str, list[str]] = {}
            for pair in self._raw.split("&") if self._raw else ():
                name, _, value = pair.replace("+", " ").partition("=")
                if pair:
                    name = percent_decoded(name, "the query parameter")
                    found.setdefault(name, []).append(percent_decoded(value, f"the query parameter {shown(name)}:"))
            self._fields = found
        return self._fields

    def all(self, name: str) -> Sequence[str]:
        return self.fields().get(name, ())

    def one(self, name: str) -> str | None:
        """Give the value of a field, None when it is absent. Raises HTTPError(400) when it is repeated."""
        values = self.all(name)
        if len(values) > 1:
            raise HTTPError(400, f"the query parameter {shown(name)} stands {len(values)} times, expected once")
        return values[0] if values else None


class Headers:
    """The headers of a request, by name in any case. Made of lower-case names; several of a name are one with commas."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[bytes, bytes]) -> None:
        self._values = values

    def get(self, name: str) -> str | None:
        """Give a header's value (bytes as Latin-1), None when it is absent."""
        value = self._values.get(name.lower().encode())
        return None if value is None else value.decode("latin-1")


@dataclass(frozen=True, slots=True)
class Head:
    """What a request's head says. `length` of the body is in bytes; None: it comes in chunks."""

    method: str
    target: str
    version: str  # "1.0" or "1.1"
    headers: Headers
    length: int | None


@dataclass(slots=True, eq=False)
class Request:
    """A request. While it is admitted its body is still empty; the server sets the body once it was read."""

    method: str
    target: str  # as it stands in the request line
    headers: Headers
    version: str = "1.1"
    body: bytes = b""
    peer: str = "-"  # the client's address, without the port
    path: str = field(init=False)  # still percent-encoded: an encoded slash is no slash. Router.match decodes it
    query: Query = field(init=False)

    def __post_init__(self) -> None:
        self.path, _, query = self.target.partition("?")
        self.query = Query(query)

    @property
    def keep_alive(self) -> bool:
        """Whether the client may send another request over this connection (RFC 9112, section 9.3)."""
        return self.version == "1.1" and "close" not in _tokens(self.headers.get("connection"))

    def require_websocket(self) -> None:
        """Raise HTTPError(426) or (400) unless this is a well-formed request for a WebSocket."""
        refusal = _websocket_refusal(self)
        if refusal is not None:
            raise refusal


@dataclass(slots=True, eq=False)
class Response:
    """An answer that is at hand as a whole. A large body comes in pieces, which are not joined before they are sent."""

    status: int
    body: bytes | Sequence[bytes] = b""
    headers: Sequence[tuple[str, str]] = ()
    content_type: str = "application/json"

    @property
    def pieces(self) -> Sequence[bytes]:
        return (self.body,) if isinstance(self.body, bytes) else self.body


@dataclass(slots=True, eq=False)
class Stream:
    """An answer whose body `produce` sends piece by piece, each flushed (chunked, or to HTTP/1.0 until the close).

    `produce` is cancelled when the client goes away. An `endless` one (a watch) is cancelled by the server's stop as
    well, and ended as if it had returned; one with an end of its own gets the time of grace.
    """

    produce: Callable[[Callable[[bytes], Awaitable[None]]], Awaitable[None]]
    content_type: str = "application/x-ndjson"
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    endless: bool = True


@dataclass(slots=True, eq=False)
class WebSocketUpgrade:
    """An answer that makes a WebSocket of the connection. The end of `session` closes it (code 1000, or its own).

    A request that is no well-formed one for a WebSocket is refused instead, see `Request.require_websocket`. A session
    may let ConnectionClosed out. At the server's stop the WebSocket is closed with 1001, then `session` is cancelled.
    """

    session: Callable[[WebSocketConnection], Awaitable[None]]
    max_message_size: int = 1024 * 1024  # bytes; beyond it the WebSocket closes with 1009
    message_queue_size: int = 1  # messages that wait for `session`; then the client is made to wait
    receive_buffer_size: int = 64 * 1024  # bytes of one read
    ping_interval: float = math.inf  # seconds; `session` may do more with pings by itself


@dataclass(slots=True, eq=False)
class TunnelUpgrade:
    """As WebSocketUpgrade, but `session` gets the bytes that the messages carry, of whatever sizes and types these are.

    It may let BrokenResourceError out. Pings go out every `ping_interval` seconds.
    """

    session: Callable[[TunnelStream], Awaitable[None]]
    ping_interval: float


@dataclass(slots=True, eq=False)
class WhileConnected:
    """An answer that may take long to find: `work` returns it, and is cancelled when the client goes away.

    What the client sends meanwhile is kept for the next request.
    """

    work: Callable[[], Awaitable[AnyResponse]]


AnyResponse = Response | Stream | WebSocketUpgrade | TunnelUpgrade | WhileConnected


class Admission(Protocol):
    """What admission found out about a request. The server reads the account and hands the rest to the handler."""

    @property
    def account(self) -> str:
        """Who sent the request, for the request log; "" if that is not known."""


def printable(text: str) -> str:
    """Escape what could end a line of the log, or hide in it."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def refused(error: HTTPError) -> Response:
    return Response(error.status, dump_json({"message": error.message}), error.headers)


def _tokens(value: str | None) -> list[str]:
    """Give the words of a header that holds a list of them."""
    return [token.strip().lower() for token in value.split(",")] if value else []


def _websocket_refusal(request: Request) -> HTTPError | None:
    get = request.headers.get
    asks = (
        "upgrade" in _tokens(get("connection"))
        and (get("upgrade") or "").lower() == "websocket"
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


# ---- the router ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """`pattern` is a path from its first slash on; a segment in braces takes any one segment that is not empty."""

    method: str
    pattern: str
    endpoint: Any


class _Node:
    __slots__ = ("below", "param", "routes")

    def __init__(self) -> None:
        self.below: dict[str, _Node] = {}
        self.param: _Node | None = None
        self.routes: dict[str, tuple[Route, tuple[tuple[int, str], ...]]] = {}


class Router:
    """Finds the route of a request, in a time that depends on its path and not on the number of routes."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Raises ValueError if two routes have the same method and the same pattern, but for its names."""
        self._root = _Node()
        for route in routes:
            node = self._root
            names: list[tuple[int, str]] = []
            for index, segment in enumerate(route.pattern.split("/")[1:]):
                if segment.startswith("{"):
                    names.append((index, segment[1:-1]))
                    node.param = node = node.param or _Node()
                else:
                    node = node.below.setdefault(segment, _Node())
            if route.method in node.routes:
                raise ValueError(f"{route.method} {route.pattern} stands beside {node.routes[route.method][0].pattern}")
            node.routes[route.method] = (route, tuple(names))

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """Give the route of a percent-encoded path and what its segments in braces stand for, decoded.

        Literal segments go before those in braces. HEAD is served by GET. Raises HTTPError: 400 for a path that can't
        be decoded, 404 for an unknown one, 405 with Allow for a known one with another method.
        """
        segments = [percent_decoded(segment, "the path segment") for segment in path.split("/")[1:]]
        nodes = [self._root]
        for segment in segments:
            below = [node.below[segment] for node in nodes if segment in node.below]
            if segment:
                below += [node.param for node in nodes if node.param is not None]
            nodes = below
        allowed: set[str] = set()
        for node in nodes:
            found = node.routes.get(method) or (node.routes.get("GET") if method == "HEAD" else None)
            if found is not None:
                route, names = found
                return route, {name: segments[index] for index, name in names}
            allowed.update(node.routes)
        if not allowed:
            raise HTTPError(404, f"there is no {shown(path)}")
        if "GET" in allowed:
            allowed.add("HEAD")
        allow = ", ".join(sorted(allowed))
        raise HTTPError(405, f"{shown(path)} does not take {shown(method)}, expected {allow}", (("Allow", allow),))


# ---- what a request may look like ----------------------------------------------------------------------------------


def head_end(buffer: bytearray, looked: int, limit: int) -> tuple[int, int]:
    """Give (where the head that the buffer starts with ends or -1, how far there is no need to look again).

    `looked` is what the call before gave of the same buffer, or 0. Raises HTTPError: 400 for a head that can't become
    a legal one, 431 for one that is larger than `limit` bytes.
    """
    end = buffer.find(b"\r\n\r\n", max(0, looked - 3), limit)
    if end >= 0:
        return end + 4, 0
    # An illegal head may never end.
    if _STRAY.search(buffer, max(0, looked - 1), limit):
        raise _illegal(bytes(buffer[:limit]))
    if len(buffer) >= limit:
        raise HTTPError(431, f"the request head is larger than {limit} bytes")
    return -1, len(buffer)


def read_head(head: bytes, header_count: int) -> Head:
    """Judge and read a request head, its last empty line included.

    Raises HTTPError, after which nobody knows where the request ends: the connection must be closed.
    """
    if not _HEAD.fullmatch(head):
        raise _illegal(head)
    request_line, *lines = head[:-4].split(b"\r\n")
    if len(lines) > header_count:
        raise HTTPError(431, f"the request has {len(lines)} headers, expected at most {header_count}")
    found: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if name in found:
            if name in _SINGLE:
                raise HTTPError(400, f"the header {name.decode()} stands twice")
            value = b"%b, %b" % (found[name], value)
        elif b"_" in name and name.replace(b"_", b"-") in _FRAMING:
            raise HTTPError(400, f"the header {name.decode()} is refused: others may take it for the one with dashes")
        found[name] = value
    method, target, protocol = request_line.decode("ascii").split(" ")
    length = _framing(request_line, found)
    return Head(method, target, protocol.removeprefix("HTTP/"), Headers(found), length)


def _framing(request_line: bytes, found: Mapping[bytes, bytes]) -> int | None:
    recent = request_line.endswith(b"1.1")
    if request_line.startswith(b"CONNECT "):
        raise HTTPError(400, "CONNECT is for proxies, and this is none")
    host = found.get(b"host")
    if host is None:
        if recent:
            raise HTTPError(400, "the header host is missing")
    elif not _HOST.fullmatch(host):
        raise HTTPError(400, f"the header host is {_quoted(host)}, expected a name or an address, and a port")
    upgrade = found.get(b"upgrade", b"websocket")
    if upgrade.lower() != b"websocket":
        # It might be ignored, but a proxy that lets it through could believe in a tunnel then.
        raise HTTPError(400, f"the header upgrade is {_quoted(upgrade)}, expected websocket or none")
    coding, length = found.get(b"transfer-encoding"), found.get(b"content-length", b"0")
    if coding is not None:
        if b"content-length" in found:
            raise HTTPError(400, "the request has content-length and transfer-encoding, expected one of them")
        if not recent:
            raise HTTPError(400, "the request has transfer-encoding and is HTTP/1.0, which has none")
        if coding.lower() != b"chunked":
            raise HTTPError(400, f"the header transfer-encoding is {_quoted(coding)}, expected chunked")
    if not _LENGTH.fullmatch(length):
        raise HTTPError(400, f"the header content-length is {_quoted(length)}, expected 1 to 18 digits")
    expected = found.get(b"expect", b"100-continue")
    if expected.lower() != b"100-continue":
        raise HTTPError(417, f"the header expect is {_quoted(expected)}, expected 100-continue")
    encoding = found.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        message = f"the header content-encoding is {_quoted(encoding)}, expected identity"
        raise HTTPError(415, message, (("Accept-Encoding", "identity"),))
    return int(length) if coding is None else None


def _illegal(head: bytes) -> HTTPError:
    """Say why a head is not even a head."""
    if _STRAY.search(head):
        return HTTPError(400, "the request head holds a NUL, or a CR or LF that is no line end")
    line, *headers = head.split(b"\r\n")[:-2]
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        return HTTPError(400, f"the request line is {_quoted(line)}, expected METHOD /path HTTP/1.1")
    _, target, major, minor = match.groups()
    if major != b"1" or minor not in b"01":
        return HTTPError(505, f"the protocol is HTTP/{major.decode()}.{minor.decode()}, expected HTTP/1.1")
    if not target.startswith(b"/") or b"#" in target:
        return HTTPError(400, f"the request target is {_quoted(target)}, expected a path, and no fragment")
    for header in headers:
        if not _HEADER_LINE.fullmatch(header):
            return HTTPError(
                400, f"the header line {_quoted(header)} is not a name, a colon, and text on the same line"
            )
    return HTTPError(400, "the request head is not HTTP/1.1")


def _quoted(value: bytes) -> str:
    return shown(value.decode("latin-1"))


class Chunked:
    """A chunked body, its framing in the one form that nobody reads differently: no extensions, blanks, or trailers."""

    def __init__(self, body_bytes: int) -> None:
        self._limit = body_bytes
        self._size = 0  # of all chunks
        self._framing = 0  # bytes
        self._left = 0  # bytes of the present chunk
        self._footer = False  # whether its CRLF is still to come
        self._last = False  # whether it is the last one

    def advance(self, buffer: bytearray) -> int:
        """Give how many bytes at the front of the buffer are the body's; remove them before the next call.

        Raises HTTPError: 400 for other framing, 413 for too much.
        """
        at = 0
        while True:
            if self._left:
                step = min(len(buffer) - at, self._left)
                self._left -= step
                at += step
                if self._left:
                    return at
            if self._footer:
                if len(buffer) - at < 2:
                    return at
                if buffer[at : at + 2] != b"\r\n":
                    raise HTTPError(400, "a chunk is not followed by CRLF; trailers are not taken")
                at += 2
                self._footer = False
            if self._last:
                return at
            step = self._size_line(buffer[at : at + CHUNK_DIGITS + 2])
            if not step:
                return at
            at += step

    def _size_line(self, start: bytearray) -> int:
        """Take a chunk's first line, if it is there, and give its length in bytes."""
        match = _CHUNK_LINE.match(start)
        if match is None:
            if not _CHUNK_START.fullmatch(start.removesuffix(b"\r")) or start == b"\r":
                raise HTTPError(400, f"a chunk size is not 1 to {CHUNK_DIGITS} hexadecimal digits alone on a line")
            return 0
        self._left = int(match[0], 16)
        self._last = self._left == 0
        self._footer = True
        self._size += self._left
        self._framing += match.end() + 2
        if self._size > self._limit:
            raise too_large(self._limit)
        if self._framing > FRAMING_BYTES:
            raise HTTPError(
                413, f"the chunks of the body are so small that there are {FRAMING_BYTES} bytes around them"
            )
        return match.end()


def too_large(limit: int) -> HTTPError:
    return HTTPError(413, f"the body is larger than {limit} bytes")
