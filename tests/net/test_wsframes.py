"""WebSocket frames: the rules of RFC 6455, section 5, arbitrary bytes in arbitrary pieces, other implementations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import wsproto.frame_protocol as theirs
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import Frame as OtherFrame
from websockets.frames import Opcode
from websockets.speedups import apply_mask

from orchard.net import wsframes
from orchard.net.wsframes import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Close,
    FrameEvent,
    FrameReader,
    Ping,
    Pong,
)

KEY = bytes.fromhex("37fa213d")
# The example of section 5.7.
HELLO = bytes.fromhex("818537fa213d7f9f4d5158")
FIN = 0x80


def raw(first: int, payload: bytes = b"", *, size: bytes | None = None, masked: bool = True) -> bytes:
    """Return a frame with any first byte; `size` replaces the correct bytes of the length."""
    if size is None:
        size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2, "big")
    if not masked:
        return bytes([first]) + size + payload
    return bytes([first, size[0] | 0x80]) + size[1:] + KEY + wsframes.mask_in_python(payload, KEY)


def read_events(data: bytes, cuts: Sequence[int] = (), *, masked: bool = True) -> list[FrameEvent]:
    """Return the events of bytes that are fed in pieces, with adjacent parts of payloads joined."""
    reader = FrameReader(masked=masked)
    events: list[FrameEvent] = []
    for start, end in itertools.pairwise([0, *sorted(cuts), len(data)]):
        for event in reader.feed(data[start:end]):
            if isinstance(event, Ping | Pong | Close):
                events.append(event)
            elif events and isinstance(events[-1], bytes):
                events[-1] += bytes(event)
            else:
                events.append(bytes(event))
    assert reader.feed(b"\x00" * 20) == [] or not any(isinstance(event, Close) for event in events)
    return events


# ---- the rules -----------------------------------------------------------------------------------------------------

HI = raw(FIN | BINARY, b"hi")

ALLOWED: dict[str, tuple[bytes, list[FrameEvent]]] = {
    "the standard's example": (HELLO, [b"Hello"]),
    "binary": (HI, [b"hi"]),
    "empty": (raw(FIN | BINARY), []),
    "text": (raw(FIN | TEXT, "é€😀".encode()), ["é€😀".encode()]),
    "fragments": (raw(BINARY, b"a") + raw(CONTINUATION, b"b") + raw(FIN | CONTINUATION, b"c") + HI, [b"abchi"]),
    "a character in two fragments": (raw(TEXT, b"\xe2\x82") + raw(FIN | CONTINUATION, b"\xac"), ["€".encode()]),
    "text after binary": (raw(FIN | BINARY, b"\xff") + raw(FIN | TEXT, b"x"), [b"\xffx"]),
    "binary after text": (raw(FIN | TEXT, b"x") + raw(FIN | BINARY, b"\xff"), [b"x\xff"]),
    "empty fragments": (raw(BINARY) + raw(CONTINUATION) + raw(FIN | CONTINUATION), []),
    "control frames between fragments": (
        raw(BINARY, b"a") + raw(FIN | PING, b"p") + raw(FIN | PONG) + raw(FIN | CONTINUATION, b"b"),
        [b"a", Ping(b"p"), Pong(b""), b"b"],
    ),
    "the longest ping": (raw(FIN | PING, b"p" * 125), [Ping(b"p" * 125)]),
    "a close between fragments": (raw(BINARY, b"a") + raw(FIN | CLOSE), [b"a", Close(1005)]),
    "bytes after a close are ignored": (raw(FIN | CLOSE) + HI + b"\xff\xff", [Close(1005)]),
    "close with a reason": (raw(FIN | CLOSE, b"\x03\xe8" + "é".encode()), [Close(1000, "é")]),
    "125": (raw(FIN | BINARY, b"x" * 125), [b"x" * 125]),
    "126": (raw(FIN | BINARY, b"x" * 126), [b"x" * 126]),
    "65535": (raw(FIN | BINARY, b"x" * 65535), [b"x" * 65535]),
    "65536": (raw(FIN | BINARY, b"x" * 65536, size=b"\x7f" + (65536).to_bytes(8, "big")), [b"x" * 65536]),
    "the beginning of the longest frame": (
        raw(FIN | BINARY, b"abc", size=b"\x7f\x7f" + b"\xff" * 7),
        [b"abc"],
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_valid_frames_give_their_payload_and_events(name: str) -> None:
    data, expected = ALLOWED[name]
    assert read_events(data) == expected
    assert read_events(data, range(len(data))) == expected


FORBIDDEN: dict[str, tuple[int, str, bytes]] = {
    "first reserved bit": (1002, "reserved bit", raw(FIN | 0x40 | BINARY)),
    "second reserved bit": (1002, "reserved bit", raw(FIN | 0x20 | BINARY)),
    "third reserved bit": (1002, "reserved bit", raw(FIN | 0x10 | BINARY)),
    "reserved bit of a ping": (1002, "reserved bit", raw(FIN | 0x40 | PING)),
    "not masked": (1002, "is not masked", raw(FIN | BINARY, b"x", masked=False)),
    "ping not masked": (1002, "is not masked", raw(FIN | PING, masked=False)),
    **{
        f"opcode {code}": (1002, f"opcode {code} is reserved", raw(FIN | code))
        for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    },
    "fragmented ping": (1002, "(opcode 9) is fragmented", raw(PING)),
    "fragmented close": (1002, "(opcode 8) is fragmented", raw(CLOSE)),
    "ping of 126 bytes": (1002, "over 125 bytes", raw(FIN | PING, b"p" * 126)),
    "close of 126 bytes": (1002, "over 125 bytes", raw(FIN | CLOSE, b"\x03\xe8" + b"p" * 124)),
    "continuation of nothing": (1002, "a continuation frame without a message", raw(FIN | CONTINUATION, b"x")),
    "continuation after the end": (1002, "a continuation frame without a message", HI + raw(FIN | CONTINUATION)),
    "message in a message": (1002, "begins before the previous one", raw(BINARY) + raw(FIN | BINARY)),
    "text in a message": (1002, "begins before the previous one", raw(BINARY) + raw(TEXT)),
    "125 in 16 bits": (1002, "125 is written in 16 bits", raw(FIN | BINARY, size=b"\x7e\x00\x7d")),
    "0 in 16 bits": (1002, "0 is written in 16 bits", raw(FIN | BINARY, size=b"\x7e\x00\x00")),
    "65535 in 64 bits": (
        1002,
        "65535 is written in 64 bits",
        raw(FIN | BINARY, size=b"\x7f" + b"\0" * 6 + b"\xff\xff"),
    ),
    "64 bits": (1002, "over 63 bits", raw(FIN | BINARY, size=b"\x7f\x80" + b"\0" * 7)),
    "text of one bad byte": (1007, "not UTF-8", raw(FIN | TEXT, b"\xff")),
    "text that is cut off": (1007, "not UTF-8", raw(FIN | TEXT, b"\xe2\x82")),
    "fragments that are cut off": (1007, "not UTF-8", raw(TEXT, b"\xe2") + raw(FIN | CONTINUATION)),
    "a surrogate": (1007, "not UTF-8", raw(FIN | TEXT, b"\xed\xa0\x80")),
    "close of one byte": (1002, "1 byte", raw(FIN | CLOSE, b"\x03")),
    "reason that is not UTF-8": (1007, "reason of a close frame is not UTF-8", raw(FIN | CLOSE, b"\x03\xe8\xff")),
    "reason that is cut off": (1007, "reason of a close frame is not UTF-8", raw(FIN | CLOSE, b"\x03\xe8\xe2\x82")),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_violations_are_named_and_end_the_reading(name: str) -> None:
    code, words, data = FORBIDDEN[name]
    for cuts in ((), range(len(data))):
        *_, last = read_events(data + HI, cuts)
        assert isinstance(last, Close)
        assert (last.code, last.is_violation) == (code, True)
        assert words in last.reason


def test_frames_of_a_server_must_not_be_masked() -> None:
    assert read_events(b"\x82\x02hi", masked=False) == [b"hi"]
    (close,) = read_events(HI, masked=False)
    assert isinstance(close, Close)
    assert (close.code, close.is_violation) == (1002, True)


def test_only_close_codes_that_may_be_sent_are_accepted() -> None:
    for code in (*range(5100), *range(5100, 65536, 97), 65535):
        allowed = code in (1000, 1001, 1002, 1003, *range(1007, 1015)) or 3000 <= code <= 4999
        (close,) = read_events(raw(FIN | CLOSE, code.to_bytes(2, "big")))
        assert isinstance(close, Close)
        assert (close.code, close.is_violation) == ((code, False) if allowed else (1002, True)), code


# ---- arbitrary pieces and bytes ------------------------------------------------------------------------------------


def sent(opcode: int, payload: bytes, key: bytes | None, final: bool) -> bytes:
    data = bytearray(b"".join(wsframes.build_frame(opcode, payload, key)))
    data[0] &= 0xFF if final else 0x7F
    return bytes(data)


payloads = st.binary(max_size=200) | st.sampled_from([125, 126, 65535, 65536, 70000]).map(lambda size: b"\xa5" * size)
some_frames = st.tuples(st.sampled_from([CONTINUATION, BINARY, TEXT, PING, PONG, CLOSE]), payloads, st.booleans())


@pytest.mark.slow
@given(st.lists(some_frames, max_size=8), st.lists(st.integers(0, 500), max_size=10), st.booleans())
def test_frames_give_the_same_events_however_they_are_cut(
    what: list[tuple[int, bytes, bool]], cuts: list[int], masked: bool
) -> None:
    data = b"".join(sent(opcode, payload, KEY if masked else None, final) for opcode, payload, final in what)
    check_same_events_in_pieces(data, cuts, masked=masked)


def check_same_events_in_pieces(data: bytes, cuts: Sequence[int], *, masked: bool) -> None:
    whole = read_events(data, masked=masked)
    pieces = read_events(data, [min(cut, len(data)) for cut in cuts], masked=masked)
    if whole and isinstance(whole[-1], Close) and whole[-1].code == 1007:
        # The part of a text before its first invalid byte may have been returned already.
        assert pieces[-1].code == 1007  # type: ignore[union-attr]
        assert text(pieces).startswith(text(whole))
    else:
        assert pieces == whole


def text(events: list[FrameEvent]) -> bytes:
    return b"".join(event for event in events if isinstance(event, bytes))


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
@example(b"\x82\xff" + b"\xff" * 12, [], True)
def test_arbitrary_bytes_give_events_or_a_violation(data: bytes, cuts: list[int], masked: bool) -> None:
    for event in read_events(data, [min(cut, len(data)) for cut in cuts], masked=masked):
        if isinstance(event, Close) and not event.is_violation:
            assert event.code == 1005 or 1000 <= event.code < 5000


def test_payload_is_returned_as_it_arrives_and_without_a_copy() -> None:
    reader = FrameReader(masked=False)
    piece = b"x" * 100_000
    (part,) = reader.feed(b"\x02\x7f" + (1 << 62).to_bytes(8, "big") + piece)
    for _ in range(100):
        (part,) = reader.feed(piece)
        assert isinstance(part, memoryview), "an unmasked payload is not copied"
        assert part.obj is piece


@given(st.binary(max_size=1000), st.binary(min_size=4, max_size=4))
def test_masking_in_python_equals_masking_in_c(data: bytes, key: bytes) -> None:
    expected = bytes(byte ^ key[index % 4] for index, byte in enumerate(data))
    assert wsframes.mask_in_python(data, key) == expected
    assert wsframes.mask_in_python(memoryview(data), key) == expected
    assert apply_mask(memoryview(data), key) == expected
    assert wsframes.mask is apply_mask


# ---- other implementations -----------------------------------------------------------------------------------------


@given(st.sampled_from([BINARY, PING, PONG, TEXT]), st.binary(max_size=125) | payloads, st.booleans())
def test_other_implementations_read_our_frames(opcode: int, payload: bytes, client: bool) -> None:
    if opcode in (PING, PONG):
        payload = payload[:125]
    if opcode == TEXT:
        payload = payload.hex().encode()
    data = b"".join(wsframes.build_frame(opcode, payload, KEY if client else None))
    decoder = theirs.FrameDecoder(client=not client)
    decoder.receive_bytes(data)
    got = b""
    while (part := decoder.process_buffer()) is not None:
        assert part.opcode == opcode
        assert isinstance(part.payload, bytes | bytearray)
        got += part.payload
    assert got == payload
    assert data == OtherFrame(Opcode(opcode), payload).serialize(mask=False, extensions=[]) or client


@given(st.lists(st.tuples(st.sampled_from([BINARY, PING, PONG]), st.binary(max_size=125)), max_size=5), st.booleans())
def test_frames_of_another_implementation_are_read(what: list[tuple[int, bytes]], client: bool) -> None:
    data = b"".join(OtherFrame(Opcode(op), payload).serialize(mask=client, extensions=[]) for op, payload in what)
    meant: list[FrameEvent] = []
    for opcode, payload in what:
        if opcode != BINARY:
            meant.append(Ping(payload) if opcode == PING else Pong(payload))
        elif meant and isinstance(meant[-1], bytes):
            meant[-1] += payload
        elif payload:
            meant.append(payload)
    assert read_events(data, masked=client) == meant


@given(st.sampled_from([1000, 1001, 1011, 3000, 4999]), st.text(max_size=200))
def test_close_payload_is_read_back_with_a_long_reason_cut(code: int, reason: str) -> None:
    payload = wsframes.close_payload(code, reason)
    assert len(payload) <= 125
    (close,) = read_events(b"".join(wsframes.build_frame(CLOSE, payload, KEY)))
    assert isinstance(close, Close)
    assert close.code == code
    assert reason.startswith(close.reason)
    assert close.reason == reason or len(reason.encode()) > 123


def test_close_reason_with_a_lone_surrogate_is_sent_with_a_replacement() -> None:
    (close,) = read_events(b"".join(wsframes.build_frame(CLOSE, wsframes.close_payload(1011, "no \udc80"), KEY)))
    assert close == Close(1011, "no ?")


@pytest.mark.parametrize("code", [wsframes.NO_STATUS, wsframes.ABNORMAL])
def test_close_codes_that_must_not_be_sent_are_left_out(code: int) -> None:
    assert wsframes.close_payload(code, "x") == b""


def test_accept_value_of_the_standards_example() -> None:
    # Section 1.3.
    assert wsframes.accept_value("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


# ---- where frames end ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.lists(some_frames, max_size=8), st.lists(st.integers(0, 500), max_size=10), st.booleans())
def test_frame_splitter_finds_the_end_of_every_frame(
    what: list[tuple[int, bytes, bool]], cuts: list[int], masked: bool
) -> None:
    frames = [sent(opcode, payload, KEY if masked else None, final) for opcode, payload, final in what]
    data = b"".join(frames)
    splitter = wsframes.FrameSplitter()
    found: list[tuple[int, bytes]] = []
    frame = b""
    for start, end in itertools.pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        piece = data[start:end]
        while piece:
            size, opcode = splitter.measure(piece)
            frame += piece[:size]
            piece = piece[size:]
            if opcode is not None:
                found.append((opcode, frame))
                frame = b""
    assert found == [(opcode, frame) for (opcode, _, _), frame in zip(what, frames, strict=True)]
    assert frame == b""
