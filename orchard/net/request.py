"""Requests, answers, errors and routes: what the server and its handlers pass to each other, and how it is parsed. No I/O.

A handler gets a `Request` and what its admission returned. It returns a `Response`, a `Stream`, a `WebSocketUpgrade`, a
`TunnelUpgrade` or a `WhileConnected`, or raises `HTTPError`, from which `error_response` makes an answer. exchange.py
reads and writes them.

h11 reads every block of header lines and every chunked body. Only the request line is matched by a regular expression
here. What h11 said about a header block is remembered, because clients send the same block again and again: a request
costs 0.87 to 0.95 of the CPU that a parser written by hand takes, measured in a bare loop. The whole head as the key
would make the cache useless, since each path is another one. A refusal is never remembered.

h11 is lenient where two readers of the same bytes could disagree about what a request is or where it ends, so that one
request could be smuggled inside another one past a proxy. Those cases are refused here: before h11 by a look at the raw
bytes (control characters, bare CR and LF, folded lines), or after it by a look at what it read. The comments name the
sections of RFC 9110 and RFC 9112.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Generic, Literal, Protocol, TypeVar
from urllib.parse import unquote

import h11
from trio_websocket import WebSocketConnection

from orchard.codec import dump_json, shown
from orchard.net.websocket import TunnelStream

Version = Literal["1.0", "1.1"]

# Header blocks that are remembered, and the length of the longest one. At worst they take 15 MB: 1,024 blocks of 100
# headers each.
_BLOCKS = 1024
_BLOCK_BYTES = 2 * 1024
# Bytes of a chunked body that are not content. Each chunk of one byte costs as much CPU as one of 16 KiB.
_FRAMING_BYTES = 64 * 1024

_METHOD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# A fragment is never part of a request target, and CONNECT is only for proxies.
_ORIGIN_FORM = re.compile(rb"(?!CONNECT )(%b) (/[\x21\x22\x24-\x7e]*) HTTP/1\.([0-9])" % _METHOD)
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]*)((?:[/?][\x21\x22\x24-\x7e]*)?)")
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _METHOD)
# A bare CR or LF, a NUL.
_STRAY = re.compile(rb"\x00|(?<!\r)\n|\r(?=[^\n])")
# In header and trailer lines also other control characters than tabs, and a line that continues the one before it.
_ILLEGAL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n)|(?:\A|\n)[ \t]")
# A name or an address and a port. The brackets hold IPv6 (with a zone, RFC 6874, encoded or not) or a future version.
_HOST = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[(?:[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~%-]+)?|[vV][0-9A-Fa-f]+\.[A-Za-z0-9._~!$&'()*+,;=:-]+)\])"
    r"(?::[0-9]{0,5})?"
)
_LENGTH_LINE = re.compile(rb"^content-length:[ \t]*(.*?)[ \t]*\r$", re.IGNORECASE | re.MULTILINE)
_LENGTH = re.compile(rb"[0-9]{1,18}")
# h11 takes 20 digits and blanks after them.
_CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
# Fields whose repetition would mean one thing here and another elsewhere.
_SINGLE = frozenset(
    [
        "authorization",
        "content-length",
        "content-type",
        "host",
        "sec-websocket-key",
        "sec-websocket-version",
        "transfer-encoding",
    ]
)
# Fields that programs which read "_" as "-" (CGI and its descendants) must not see under another name, and which a
# trailer must not hold.
_FRAMING = _SINGLE | {"connection", "content-encoding", "expect", "te", "trailer", "upgrade"}
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
# The headers of an answer with status 426 (RFC 9110, section 15.5.22).
_UPGRADE = (("Upgrade", "websocket"), ("Connection", "Upgrade"))

EndpointT = TypeVar("EndpointT")


class HTTPError(Exception):
    """A request is answered with an error: a status, a message of one sentence, and further headers.

    `details` are further fields of the answer's JSON.
    """

    def __init__(
        self,
        status: int,
        message: str,
        headers: Sequence[tuple[str, str]] = (),
        *,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple(headers)
        self.details = details or {}


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


def list_members(value: str | None) -> list[str]:
    """Return the members of a comma-separated header in lower case, without the empty ones (RFC 9110, section 5.6.1)."""
    return [member for part in value.split(",") if (member := part.strip(" \t").lower())] if value else []


@dataclass(slots=True, eq=False)
class Request:
    """A request. While it is admitted its body is still empty; the server sets the body when it was read."""

    method: str
    # A path and a query.
    target: str
    # By their names in lower case. Several of one name are joined with commas, and bytes are decoded as Latin-1.
    headers: Mapping[str, str]
    # "1.0" or "1.1".
    version: str = "1.1"
    body: bytes = field(default=b"", repr=False)
    # The client's address without its port.
    peer: str = "-"
    # Still percent-encoded, so that an encoded slash does not separate segments. Router.match decodes it.
    path: str = field(init=False)
    query: Query = field(init=False)
    # The pattern of its path and the account that sent it, set by the admission; "" as long as they are unknown.
    route: str = field(default="", init=False)
    account: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.path, _, query = self.target.partition("?")
        self.query = Query(query)

    def require_websocket(self) -> None:
        """Raise HTTPError 426 or 400 unless this is a well-formed request for a WebSocket (RFC 6455, section 4.2.1)."""
        get = self.headers.get
        asks = "upgrade" in list_members(get("connection")) and "websocket" in list_members(get("upgrade"))
        if not asks or self.method != "GET" or self.version != "1.1":
            message = "this path is a WebSocket; expected GET with Connection: Upgrade, Upgrade: websocket"
            raise HTTPError(426, message, _UPGRADE)
        version, key = get("sec-websocket-version"), get("sec-websocket-key")
        if version != "13":
            message = f"Sec-WebSocket-Version is {shown(version)}, expected 13"
            raise HTTPError(426, message, (("Sec-WebSocket-Version", "13"), *_UPGRADE))
        try:
            nonce = base64.b64decode((key or "").encode("latin-1"), validate=True)
        except binascii.Error:
            nonce = b""
        if len(nonce) != 16:
            raise HTTPError(400, f"Sec-WebSocket-Key is {shown(key)}, expected 16 bytes in base64")
        if self.body:
            raise HTTPError(400, f"the request for a WebSocket has a body of {len(self.body)} bytes, expected none")


# ---- answers -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Response:
    """A complete answer.

    A large body may be a sequence of pieces with a `separator` between them; they are not joined before they are sent.
    A `routine` request, such as a heartbeat, is logged at DEBUG, as reads are.
    """

    status: int
    body: bytes | Sequence[bytes] = field(default=b"", repr=False)
    headers: Sequence[tuple[str, str]] = ()
    content_type: str = "application/json"
    separator: bytes = b""
    routine: bool = False


# A piece of a body. The parts of a tuple are sent together, and large parts are not copied.
BodyPiece = bytes | tuple[bytes, ...]


class SendPiece(Protocol):
    """Sends a body piece by piece."""

    async def __call__(self, piece: BodyPiece, /) -> None:
        """Send what `now` has left, and then a piece."""

    def now(self, piece: BodyPiece, /) -> bool:
        """Send a piece without waiting. Return False if a part of it is left, which the next call has to send."""


@dataclass(slots=True, eq=False)
class Stream:
    """An answer whose body `produce` sends in pieces, each at once (chunked; for HTTP/1.0 until the close).

    `produce` is cancelled when the client goes away. An `endless` one (a watch) is also cancelled when the server
    stops, and the body ends as if it had returned; another one may run until the grace period of the stop is over.
    """

    produce: Callable[[SendPiece], Awaitable[None]]
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
    # Seconds between pings of the server; the session may send others.
    ping_interval: float = math.inf


@dataclass(slots=True, eq=False)
class TunnelUpgrade:
    """As WebSocketUpgrade, but the session gets the payload of all messages as one stream of bytes.

    A session may raise BrokenResourceError. A ping is sent every `ping_interval` seconds. `release` is called at the end,
    also if the client went away, or was refused, before the session began.
    """

    session: Callable[[TunnelStream], Awaitable[None]]
    ping_interval: float
    # Send text messages, although they carry any bytes.
    text: bool = False
    release: Callable[[], None] = lambda: None


@dataclass(slots=True, eq=False)
class WhileConnected:
    """An answer that may take long to find: `work` returns it, and is cancelled if the client goes away.

    What the client sends meanwhile is kept for the next request. When the server stops, an `endless` one is cancelled
    at once and answered with 503; another one when the grace period of the stop is over.
    """

    work: Callable[[], Awaitable[AnyResponse]]
    endless: bool = False


AnyResponse = Response | Stream | WebSocketUpgrade | TunnelUpgrade | WhileConnected


class Admission(Protocol):
    """What admission found out about a request, as far as the server needs it; the handler gets all of it."""

    @property
    def authenticated(self) -> bool:
        """Whether the client has authenticated, so that its connection is not closed to make room for strangers."""

    @property
    def body_limit(self) -> int:
        """The largest body that the operation takes, in bytes; 0: none, and a small one is read and ignored."""


AdmittedT = TypeVar("AdmittedT", bound=Admission)


@dataclass(slots=True, eq=False)
class SlowAdmission(Generic[AdmittedT]):
    """An admission that has to wait: `work` returns it or raises HTTPError, and is cancelled if the client goes away."""

    work: Callable[[], Awaitable[AdmittedT]]


def error_response(error: HTTPError) -> Response:
    """Return the answer to a request that failed."""
    return Response(error.status, dump_json({"message": error.message, **error.details}) + b"\n", error.headers)


# ---- parsing heads -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeaderBlock:
    """The headers of a request, and what follows from them."""

    # As Request.headers.
    headers: Mapping[str, str]
    # Bytes of the body; None: it is chunked.
    length: int | None
    # Whether another request may follow on the connection.
    keep_alive: bool
    # Whether the client waits for "100 Continue" before it sends the body.
    expects_continue: bool


def find_head_end(buffer: bytearray, searched: int, limit: int) -> tuple[int, int]:
    """Return (the end of the head that the buffer begins with or -1, how many bytes need not be searched again).

    `searched` is what the previous call returned for the same buffer, or 0. Raises HTTPError: 400 for a head that can
    not become a legal one, 431 if it is longer than `limit` bytes, 414 if the request line alone is.
    """
    end = buffer.find(b"\r\n\r\n", max(0, searched - 3), limit)
    if end >= 0:
        return end + 4, 0
    # A client that does not speak HTTP may never send the end of a head.
    if _STRAY.search(buffer, max(0, searched - 1), limit):
        raise _stray_bytes()
    if len(buffer) >= limit:
        # RFC 9112, section 3: a target that is too long is answered with 414.
        long_line = buffer.find(b"\r\n", 2, limit) < 0
        raise HTTPError(414 if long_line else 431, f"the request head is longer than {limit} bytes")
    return -1, len(buffer)


def parse_head(head: bytes, header_count: int, peer: str = "-") -> tuple[Request, HeaderBlock]:
    """Return the request of a head, which goes from its first line to the empty line at its end, and its headers.

    Raises HTTPError. The end of the request is unknown then, so the connection must be closed.
    """
    line, _, block = head.partition(b"\r\n")
    match = _ORIGIN_FORM.fullmatch(line)
    authority = b""
    if match is not None:
        method, target, minor = match.groups()
    else:
        method, authority, target, minor = _parse_other_line(head, line)
    # RFC 9110, section 2.5: a later minor version is read as the latest one that is known.
    version: Version = "1.0" if minor == b"0" else "1.1"
    read_block = _read_remembered_block if len(block) <= _BLOCK_BYTES else _read_block
    fields = read_block(version, block, header_count)
    if authority:
        # RFC 9112, section 3.2.2: the target of an absolute form replaces the Host header.
        fields = replace(fields, headers={**fields.headers, "host": authority.decode("ascii")})
    request = Request(method.decode("ascii"), target.decode("ascii"), fields.headers, version, peer=peer)
    return request, fields


def _parse_other_line(head: bytes, line: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Return (method, authority, target, minor version) of a request line in absolute form. Raises HTTPError."""
    if _STRAY.search(head):
        raise _stray_bytes()
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise HTTPError(400, f"the request line is {_quoted(line)}, expected METHOD /path HTTP/1.1")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise HTTPError(505, f"the protocol is HTTP/{major.decode()}.{minor.decode()}, expected HTTP/1.1")
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if method == b"CONNECT" or absolute is None:
        raise HTTPError(400, f"the request target is {_quoted(target)}, expected a path without a fragment")
    authority, path = absolute.groups()
    # User names in a URL are refused as well: RFC 9110, section 4.2.4.
    if not _HOST.fullmatch(authority.decode("ascii")):
        raise HTTPError(400, f"the request target is {_quoted(target)}, expected a host name or an address in it")
    return method, authority, path if path.startswith(b"/") else b"/" + path, minor


def _read_block(version: Version, block: bytes, header_count: int) -> HeaderBlock:
    """Read the lines of a head after the first one, the empty line included. Raises HTTPError."""
    count = block.count(b"\r\n") - 1
    if count > header_count:
        raise HTTPError(431, f"the request has {count} headers, expected at most {header_count}")
    if _ILLEGAL.search(block):
        raise _stray_bytes()
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(b"GET / HTTP/%b\r\n%b" % (version.encode(), block))
    try:
        event = parser.next_event()
    except h11.RemoteProtocolError as error:
        raise _not_http(error) from None
    assert isinstance(event, h11.Request)
    found: dict[str, str] = {}
    for raw_name, raw_value in event.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        if name in found:
            if name in _SINGLE:
                raise HTTPError(400, f"the header {name} is repeated, expected it once")
            value = f"{found[name]}, {value}"
        elif "_" in name and name.replace("_", "-") in _FRAMING:
            raise HTTPError(400, f"the header {shown(name)} is refused, expected dashes instead of underscores")
        found[name] = value
    return _decide(version, block, found)


_read_remembered_block = lru_cache(_BLOCKS)(_read_block)


def _decide(version: Version, block: bytes, found: Mapping[str, str]) -> HeaderBlock:
    """Judge the headers, and decide how the body and the connection end. Raises HTTPError."""
    host = found.get("host")
    # RFC 9112, section 3.2. h11 has refused a repeated Host, and a missing one in HTTP/1.1.
    if host is not None and not _HOST.fullmatch(host):
        raise HTTPError(400, f"the header host is {shown(host)}, expected a name or an address, and a port")
    for encoding in list_members(found.get("content-encoding")):
        if encoding != "identity":
            message = f"the header content-encoding has {shown(encoding)}, expected identity"
            raise HTTPError(415, message, (("Accept-Encoding", "identity"),))
    expected = list_members(found.get("expect"))
    for expectation in expected:
        # RFC 9110, section 10.1.1.
        if expectation != "100-continue":
            raise HTTPError(417, f"the header expect has {shown(expectation)}, expected 100-continue")
    # RFC 9110, section 7.8: an Upgrade to an unknown protocol is ignored. The connection is closed after the answer, so
    # that a proxy which expects the other protocol cannot take what follows for it.
    unknown_upgrade = any(protocol != "websocket" for protocol in list_members(found.get("upgrade")))
    return HeaderBlock(
        found,
        _body_length(version, block, found),
        keep_alive=version == "1.1" and not unknown_upgrade and "close" not in list_members(found.get("connection")),
        # RFC 9110, section 10.1.1: in HTTP/1.0 it is ignored.
        expects_continue=version == "1.1" and bool(expected),
    )


def _body_length(version: Version, block: bytes, found: Mapping[str, str]) -> int | None:
    """Return the bytes of the body, None if it is chunked (RFC 9112, section 6.3). Raises HTTPError."""
    if "transfer-encoding" in found:
        # h11 has refused every coding but "chunked", in any case.
        if "content-length" in found:
            raise HTTPError(400, "the request has content-length and transfer-encoding, expected one of them")
        if version == "1.0":
            raise HTTPError(400, "the request has transfer-encoding, expected none in HTTP/1.0")
        return None
    if "content-length" not in found:
        return 0
    # h11 reads "1, 1" and two lines of the same value as one length, and takes 20 digits.
    values = _LENGTH_LINE.findall(block)
    if len(values) != 1 or not _LENGTH.fullmatch(values[0]):
        told = shown(b", ".join(values).decode("latin-1"))
        raise HTTPError(400, f"the header content-length is {told}, expected one number of 1 to 18 digits")
    return int(values[0])


def _stray_bytes() -> HTTPError:
    return HTTPError(400, "the request head has a control character, a bare CR or LF, or a folded header line")


def _not_http(error: h11.RemoteProtocolError) -> HTTPError:
    # h11 suggests 501 for a transfer coding that it does not know (RFC 9112, section 6.1), and 431 for long lines.
    return HTTPError(error.error_status_hint, f"the request is not HTTP/1.1: {shown(str(error))}")


def _quoted(value: bytes) -> str:
    return shown(value.decode("latin-1"))


# ---- parsing bodies --------------------------------------------------------------------------------------------------


class ChunkedBody:
    """A chunked body, read by h11. Chunk extensions and trailers are ignored within bounds (RFC 9112, section 7.1).

    h11 is lenient about the lines around the chunks. Its events say how many bytes of content it has read, and it reads
    a line up to the first CRLF, so the events locate each line in the bytes that it was given. The lines are checked
    there, and nothing of the chunks' sizes is computed here.
    """

    def __init__(self, head: bytes, body_limit: int, line_limit: int) -> None:
        """`head` is the request's, with nothing before it. Limits are in bytes: of the content, and of one line."""
        self._parts: list[bytes] = []
        # Bytes of content so far.
        self.size = 0
        self._body_limit = body_limit
        # h11 refuses a line, or all trailers together, that are longer.
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=line_limit)
        self._parser.receive_data(head)
        request = self._parser.next_event()
        assert isinstance(request, h11.Request)
        # What h11 was given, from the end of the last content that it has read.
        self._unchecked = bytearray()
        # Whether a part of a chunk's content is still to come.
        self._in_chunk = False
        # What precedes the next line: the CRLF after a chunk.
        self._separator = 0  # bytes
        self._framing = 0  # bytes

    @property
    def content(self) -> bytes:
        return b"".join(self._parts)

    def feed(self, data: bytes) -> bytes | None:
        """Read more of the body. Return None if it goes on, else what follows it.

        Raises HTTPError: 400 for illegal framing, 413 for too much content or framing, 431 for long lines.
        """
        self._parser.receive_data(data)
        self._unchecked += data
        at = 0
        try:
            while (event := self._parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.EndOfMessage):
                    following = self._parser.trailing_data[0]
                    self._check_end(at, len(self._unchecked) - len(following), event)
                    return following
                if isinstance(event, h11.Data):
                    at = self._take(event, at)
        except h11.RemoteProtocolError as error:
            raise _not_http(error) from None
        del self._unchecked[:at]
        return None

    def _take(self, event: h11.Data, at: int) -> int:
        """Keep content, after a look at the line before it, which begins at `at`. Return where the content ends."""
        # Not `event.chunk_start`, which h11 leaves out if the line arrives without content.
        if not self._in_chunk:
            at = self._check_line(at)
        self._parts.append(event.data)
        self.size += len(event.data)
        if self.size > self._body_limit:
            raise body_too_large(self._body_limit)
        self._in_chunk = not event.chunk_end
        if event.chunk_end:
            self._separator = 2
        return at + len(event.data)

    def _check_line(self, at: int) -> int:
        """Check the line with the size of a chunk, and return where it ends. Raises HTTPError."""
        begin = at + self._separator
        end = self._unchecked.index(b"\r\n", begin) + 2
        if not _CHUNK_LINE.fullmatch(self._unchecked, begin, end):
            line = _quoted(bytes(self._unchecked[begin : end - 2]))
            raise HTTPError(400, f"the line before a chunk is {line}, expected 1 to 16 hexadecimal digits")
        self._separator = 0
        self._framing += end - at
        if self._framing > _FRAMING_BYTES:
            raise HTTPError(413, f"the framing of the body is longer than {_FRAMING_BYTES} bytes, send larger chunks")
        return end

    def _check_end(self, at: int, end: int, event: h11.EndOfMessage) -> None:
        """Check the line of the last chunk and the trailers, which end at `end`. Raises HTTPError."""
        trailers = bytes(self._unchecked[self._check_line(at) : end])
        if _ILLEGAL.search(trailers) or not (b"\r\n" + trailers).endswith(b"\r\n\r\n"):
            raise HTTPError(400, "the trailers have a control character, a bare CR or LF, or a folded line")
        for name, _ in event.headers:
            if name.decode("ascii").replace("_", "-") in _FRAMING:
                raise HTTPError(400, f"the trailers have {_quoted(name)}, which belongs in the head")


def body_too_large(limit: int) -> HTTPError:
    return HTTPError(413, f"the body is larger than {limit} bytes")


# ---- routes ----------------------------------------------------------------------------------------------------------


def _segments(path: str) -> list[str]:
    """Return the segments of a path. One slash at its end does not count."""
    return path.removesuffix("/").split("/")[1:]


class Router(Generic[EndpointT]):
    """Endpoints by method and path. A pattern may have one name in braces, which any one segment matches that is not empty.

    A pattern without a name goes before those with one, and of two with a name the one whose name comes later.
    """

    def __init__(self, routes: Iterable[tuple[str, str, EndpointT]]) -> None:
        """A route is a method, a pattern that begins with a slash, and an endpoint.

        Raises ValueError for a second route of a method and a path, and for a pattern with two names.
        """
        # By the segments of the pattern, where None is the name, and by method.
        self._endpoints: dict[tuple[str | None, ...], dict[str, EndpointT]] = {}
        for method, pattern, endpoint in routes:
            segments = tuple(None if segment.startswith("{") else segment for segment in _segments(pattern))
            endpoints = self._endpoints.setdefault(segments, {})
            if method in endpoints or segments.count(None) > 1:
                raise ValueError(f"{method} {pattern} is repeated or has two names, expected each route once")
            endpoints[method] = endpoint
        # Where patterns have their names, the last place first.
        self._places = sorted({segments.index(None) for segments in self._endpoints if None in segments}, reverse=True)

    def match(self, method: str, path: str) -> tuple[EndpointT, str]:
        """Return the endpoint of a percent-encoded path, and the decoded name in it, "" if it has none.

        HEAD is served by GET. Raises HTTPError: 400 for a path that cannot be decoded, 404 for an unknown one, 405 with
        Allow for a known one with another method.
        """
        endpoints, name = self._find([percent_decoded(segment, "the path segment") for segment in _segments(path)])
        served = "GET" if method == "HEAD" else method
        if served in endpoints:
            return endpoints[served], name
        if not endpoints:
            raise HTTPError(404, f"unknown path {shown(path)}")
        allow = ", ".join(sorted({*endpoints, "HEAD"} if "GET" in endpoints else endpoints))
        raise HTTPError(405, f"the method is {shown(method)}, expected {allow} for {shown(path)}", (("Allow", allow),))

    def _find(self, segments: list[str]) -> tuple[Mapping[str, EndpointT], str]:
        """Return the endpoints of a path by method, none if it is unknown, and the name in it."""
        if found := self._endpoints.get(tuple(segments)):
            return found, ""
        for place in self._places:
            if place < len(segments) and (name := segments[place]):
                found = self._endpoints.get((*segments[:place], None, *segments[place + 1 :]))
                if found is not None:
                    return found, name
        return {}, ""
