"""Heads and chunked bodies are read as h11 reads them, however they arrive. What the server answers is in test_server.py."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchard.net import request
from orchard.net.request import ChunkedBody, HTTPError, find_head_end, parse_head

PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"GET /",
        b"POST /a?b HTTP/1.1\r\nHost: x\r\n",
        b"HTTP/1.1",
        b"HTTP/1.0\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"X-A: b\r\n",
        b"x-a:\t c\xe9 \r\n",
        b"X-B:\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b":",
        b"\x00",
        b"%",
        b"\xff",
    ]
)


@given(st.lists(PIECES | st.binary(max_size=20), max_size=8))
def test_accepted_head_is_read_as_h11_reads_it(pieces: list[bytes]) -> None:
    raw = b"".join(pieces) + b"\r\n\r\n"
    raw = raw[: raw.index(b"\r\n\r\n") + 4]
    # An empty line may come first. The server removes it, and h11 does not know of it.
    raw = raw.removeprefix(b"\r\n")
    refused = None
    try:
        parsed, block = parse_head(raw, 100)
    except HTTPError as error:
        refused = error
    if refused is not None:
        assert 400 <= refused.status <= 505
        return
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(raw)
    event = reader.next_event()
    assert isinstance(event, h11.Request)
    assert (parsed.method, parsed.version) == (event.method.decode(), "1.0" if event.http_version == b"1.0" else "1.1")
    assert event.target.decode().endswith(parsed.target)
    values: dict[str, list[str]] = {}
    for name, value in event.headers:
        values.setdefault(name.decode(), []).append(value.decode("latin-1"))
    assert parsed.headers == {name: ", ".join(all_) for name, all_ in values.items()}
    if block.length == 0:
        assert isinstance(reader.next_event(), h11.EndOfMessage)
    assert reader.trailing_data[0] == b""


def test_header_blocks_are_remembered_within_bounds() -> None:
    cache = request._read_remembered_block
    cache.cache_clear()
    head = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
    (first, first_block), (second, second_block) = parse_head(head % 1, 100), parse_head(head % 2, 100)
    assert first_block is second_block
    assert (first.target, second.target) == ("/1", "/2")
    # A block that is long, or refused, is not remembered.
    parse_head(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: %b\r\n\r\n" % (b"a" * 3000), 100)
    for _ in range(2):
        with pytest.raises(HTTPError):
            parse_head(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: \x01\r\n\r\n", 100)
    assert cache.cache_info().currsize == 1
    for number in range(2000):
        parse_head(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: %d\r\n\r\n" % number, 100)
    assert cache.cache_info().currsize == 1024


@given(st.lists(PIECES | st.binary(max_size=20), max_size=8), st.lists(st.integers(1, 40), max_size=30))
def test_end_of_a_head_is_found_however_it_arrives(pieces: list[bytes], cuts: list[int]) -> None:
    data, limit = b"".join(pieces), 120

    def outcome(arrivals: list[bytes]) -> int | tuple[int, str]:
        buffer, searched, end = bytearray(), 0, -1
        try:
            for arrived in arrivals:
                buffer += arrived
                end, searched = find_head_end(buffer, searched, limit)
                if end >= 0:
                    break
        except HTTPError as error:
            return error.status, error.message if error.status != 400 else ""
        return end

    positions = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
    arrivals = [data[a:b] for a, b in zip(positions, [*positions[1:], len(data)], strict=True)]
    at_once, piecewise = outcome([data]), outcome(arrivals)
    if at_once != piecewise:
        # Illegal bytes are searched only while the end of the head has not arrived.
        assert at_once == data.index(b"\r\n\r\n") + 4
        assert piecewise == (400, "")
        with pytest.raises(HTTPError):
            parse_head(data[:at_once], 100)
    elif isinstance(at_once, int) and at_once >= 0:
        assert data[:at_once].find(b"\r\n\r\n") == at_once - 4 <= limit - 4


CHUNKS = st.lists(st.tuples(st.binary(min_size=1, max_size=30), st.sampled_from([b"", b";a", b';b="c d"'])), max_size=8)
TRAILERS = st.sampled_from([b"", b"X-A: b\r\n", b"X-A:\r\nX-B: c\r\n"])
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    positions = [0]
    for cut in cuts:
        positions.append(positions[-1] + cut)
    return [piece for a, b in zip(positions, [*positions[1:], len(data)], strict=True) if (piece := data[a:b])]


@given(CHUNKS, TRAILERS, st.binary(max_size=10), st.lists(st.integers(1, 40), max_size=60))
def test_chunked_body_is_separated_from_what_follows_however_it_arrives(
    chunks: list[tuple[bytes, bytes]], trailers: bytes, following: bytes, cuts: list[int]
) -> None:
    framed = b"".join(b"%X%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk, extension in chunks)
    framed += b"0\r\n" + trailers + b"\r\n"
    body = ChunkedBody(HEAD, 1_000_000, 16_384)
    arrivals = pieces_of(framed + following, cuts)
    rest: bytes | None = None
    while rest is None:
        rest = body.feed(arrivals.pop(0))
    assert rest + b"".join(arrivals) == following
    assert body.content == b"".join(chunk for chunk, _ in chunks)
    assert body.size == len(body.content)


CHUNK_PIECES = st.sampled_from(
    [
        *(b"0", b"3", b"3\r\n", b"abc", b"abc\r\n", b"0\r\n", b"\r\n", b"\n", b"\r", b" ", b";", b";a=b", b"0\r\n\r\n"),
        *(b"X-A: b\r\n", b"Content-Length: 3\r\n", b"\x00", b"00000000000000003", b"\t"),
    ]
)


@given(st.lists(CHUNK_PIECES, max_size=12), st.lists(st.integers(1, 8), max_size=40))
def test_chunked_body_is_judged_the_same_however_it_arrives(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(pieces)

    def outcome(arrivals: list[bytes]) -> object:
        body = ChunkedBody(HEAD, 1000, 1000)
        for index, arrived in enumerate(arrivals):
            try:
                rest = body.feed(arrived)
            except HTTPError as error:
                return error.status
            if rest is not None:
                return body.content, rest + b"".join(arrivals[index + 1 :])
        return body.content

    assert outcome([data] if data else []) == outcome(pieces_of(data, cuts))


def status_of_feeding(body: ChunkedBody, piece: bytes) -> int:
    for _ in range(100):
        try:
            body.feed(piece)
        except HTTPError as error:
            return error.status
    raise AssertionError("not refused")


def test_framing_of_a_chunked_body_is_bounded() -> None:
    body = ChunkedBody(HEAD, 1_000_000, 16_384)
    assert status_of_feeding(body, b"1\r\na\r\n" * 1000) == 413
    assert body.size < 20_000
    body = ChunkedBody(HEAD, 1_000_000, 16_384)
    assert status_of_feeding(body, b"1;" + b"x" * 1000) == 431
