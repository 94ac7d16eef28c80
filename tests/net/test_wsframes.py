"""The framing of WebSockets: each rule of RFC 6455, section 5, any pieces, any bytes, and two other implementations."""

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
from orchard.net.wsframes import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Close, Event, Frames, Ping, Pong

KEY = bytes.fromhex("37fa213d")
HELLO = bytes.fromhex("818537fa213d7f9f4d5158")  # the example of section 5.7
FIN = 0x80


def raw(first: int, payload: bytes = b"", *, size: bytes | None = None, masked: bool = True) -> bytes:
    """A frame with any first byte; `size` is what stands for its length in place of the right bytes."""
    if size is None:
        size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2, "big")
    if not masked:
        return bytes([first]) + size + payload
    return bytes([first, size[0] | 0x80]) + size[1:] + KEY + wsframes.masked_by_translation(payload, KEY)


def understood(data: bytes, cuts: Sequence[int] = (), *, masked: bool = True) -> list[Event]:
    """What a stream of bytes that comes in pieces means, neighbouring parts of payloads put together."""
    reader = Frames(masked=masked)
    events: list[Event] = []
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

ALLOWED: dict[str, tuple[bytes, list[Event]]] = {
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
    "nothing counts after a close": (raw(FIN | CLOSE) + HI + b"\xff\xff", [Close(1005)]),
    "close with a reason": (raw(FIN | CLOSE, b"\x03\xe8" + "é".encode()), [Close(1000, "é")]),
    "125": (raw(FIN | BINARY, b"x" * 125), [b"x" * 125]),
    "126": (raw(FIN | BINARY, b"x" * 126), [b"x" * 126]),
    "65535": (raw(FIN | BINARY, b"x" * 65535), [b"x" * 65535]),
    "65536": (raw(FIN | BINARY, b"x" * 65536, size=b"\x7f" + (65536).to_bytes(8, "big")), [b"x" * 65536]),
    "the longest of all, as far as it comes": (
        raw(FIN | BINARY, b"abc", size=b"\x7f\x7f" + b"\xff" * 7),
        [b"abc"],
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_is_understood(name: str) -> None:
    data, expected = ALLOWED[name]
    assert understood(data) == expected
    assert understood(data, range(len(data))) == expected


FORBIDDEN: dict[str, tuple[int, str, bytes]] = {
    "first reserved bit": (1002, "reserved bit", raw(FIN | 0x40 | BINARY)),
    "second reserved bit": (1002, "reserved bit", raw(FIN | 0x20 | BINARY)),
    "third reserved bit": (1002, "reserved bit", raw(FIN | 0x10 | BINARY)),
    "reserved bit of a ping": (1002, "reserved bit", raw(FIN | 0x40 | PING)),
    "not masked": (1002, "a frame of a client is not masked", raw(FIN | BINARY, b"x", masked=False)),
    "ping not masked": (1002, "a frame of a client is not masked", raw(FIN | PING, masked=False)),
    **{
        f"opcode {code}": (1002, f"the opcode is {code}, which is reserved", raw(FIN | code))
        for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    },
    "fragmented ping": (1002, "opcode 9, is fragmented", raw(PING)),
    "fragmented close": (1002, "opcode 8, is fragmented", raw(CLOSE)),
    "ping of 126 bytes": (1002, "over 125 bytes", raw(FIN | PING, b"p" * 126)),
    "close of 126 bytes": (1002, "over 125 bytes", raw(FIN | CLOSE, b"\x03\xe8" + b"p" * 124)),
    "continuation of nothing": (1002, "a continuation of no message", raw(FIN | CONTINUATION, b"x")),
    "continuation after the end": (1002, "a continuation of no message", HI + raw(FIN | CONTINUATION)),
    "message in a message": (1002, "begins before the end", raw(BINARY) + raw(FIN | BINARY)),
    "text in a message": (1002, "begins before the end", raw(BINARY) + raw(TEXT)),
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
    "reason that is not UTF-8": (1007, "reason of a close is not UTF-8", raw(FIN | CLOSE, b"\x03\xe8\xff")),
    "reason that is cut off": (1007, "reason of a close is not UTF-8", raw(FIN | CLOSE, b"\x03\xe8\xe2\x82")),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_is_named_and_the_end(name: str) -> None:
    code, words, data = FORBIDDEN[name]
    for cuts in ((), range(len(data))):
        *_, last = understood(data + HI, cuts)
        assert isinstance(last, Close)
        assert (last.code, last.violation) == (code, True)
        assert words in last.reason


def test_what_a_server_sends_is_not_masked() -> None:
    assert understood(b"\x82\x02hi", masked=False) == [b"hi"]
    reason = "a frame of the server is masked"
    assert understood(HI, masked=False) == [Close(1002, reason, violation=True)]


def test_codes_of_a_close() -> None:
    for code in range(65536):
        allowed = code in (1000, 1001, 1002, 1003, *range(1007, 1015)) or 3000 <= code <= 4999
        (close,) = understood(raw(FIN | CLOSE, code.to_bytes(2, "big")))
        assert isinstance(close, Close)
        assert (close.code, close.violation) == ((code, False) if allowed else (1002, True)), code


# ---- any pieces, any bytes -----------------------------------------------------------------------------------------


def sent(opcode: int, payload: bytes, key: bytes | None, final: bool) -> bytes:
    data = bytearray(b"".join(wsframes.frame(opcode, payload, key)))
    data[0] &= 0xFF if final else 0x7F
    return bytes(data)


payloads = st.binary(max_size=200) | st.sampled_from([125, 126, 65535, 65536, 70000]).map(lambda size: b"\xa5" * size)
some_frames = st.tuples(st.sampled_from([CONTINUATION, BINARY, TEXT, PING, PONG, CLOSE]), payloads, st.booleans())


@given(st.lists(some_frames, max_size=8), st.lists(st.integers(0, 500), max_size=10), st.booleans())
def test_the_same_bytes_mean_the_same_in_any_pieces(
    what: list[tuple[int, bytes, bool]], cuts: list[int], masked: bool
) -> None:
    data = b"".join(sent(opcode, payload, KEY if masked else None, final) for opcode, payload, final in what)
    means_the_same_in_pieces(data, cuts, masked=masked)


def means_the_same_in_pieces(data: bytes, cuts: Sequence[int], *, masked: bool) -> None:
    whole = understood(data, masked=masked)
    pieces = understood(data, [min(cut, len(data)) for cut in cuts], masked=masked)
    if whole and isinstance(whole[-1], Close) and whole[-1].code == 1007:
        # Of a text that turns out to be none, what came before may have gone on.
        assert pieces[-1].code == 1007  # type: ignore[union-attr]
        assert text(pieces).startswith(text(whole))
    else:
        assert pieces == whole


def text(events: list[Event]) -> bytes:
    return b"".join(event for event in events if isinstance(event, bytes))


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
@example(b"\x82\xff" + b"\xff" * 12, [], True)
def test_any_bytes_are_understood_or_a_violation(data: bytes, cuts: list[int], masked: bool) -> None:
    for event in understood(data, [min(cut, len(data)) for cut in cuts], masked=masked):
        if isinstance(event, Close) and not event.violation:
            assert event.code == 1005 or 1000 <= event.code < 5000


def test_what_is_kept_between_two_pieces_is_small() -> None:
    reader = Frames(masked=False)
    piece = b"x" * 100_000
    (part,) = reader.feed(b"\x02\x7f" + (1 << 62).to_bytes(8, "big") + piece)
    for _ in range(100):
        (part,) = reader.feed(piece)
        assert isinstance(part, memoryview), "not even a copy is made of what is not masked"
        assert part.obj is piece


@given(st.binary(max_size=1000), st.binary(min_size=4, max_size=4))
def test_masking_in_python_and_in_c_is_the_same(data: bytes, key: bytes) -> None:
    expected = bytes(byte ^ key[index % 4] for index, byte in enumerate(data))
    assert wsframes.masked_by_translation(data, key) == expected
    assert wsframes.masked_by_translation(memoryview(data), key) == expected
    assert apply_mask(memoryview(data), key) == expected
    assert wsframes.masked is apply_mask


# ---- others --------------------------------------------------------------------------------------------------------


@given(st.sampled_from([BINARY, PING, PONG, TEXT]), st.binary(max_size=125) | payloads, st.booleans())
def test_others_understand_what_is_sent(opcode: int, payload: bytes, client: bool) -> None:
    if opcode in (PING, PONG):
        payload = payload[:125]
    if opcode == TEXT:
        payload = payload.hex().encode()
    data = b"".join(wsframes.frame(opcode, payload, KEY if client else None))
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
def test_what_others_send_is_understood(what: list[tuple[int, bytes]], client: bool) -> None:
    data = b"".join(OtherFrame(Opcode(op), payload).serialize(mask=client, extensions=[]) for op, payload in what)
    meant: list[Event] = []
    for opcode, payload in what:
        if opcode != BINARY:
            meant.append(Ping(payload) if opcode == PING else Pong(payload))
        elif meant and isinstance(meant[-1], bytes):
            meant[-1] += payload
        elif payload:
            meant.append(payload)
    assert understood(data, masked=client) == meant


@given(st.sampled_from([1000, 1001, 1011, 3000, 4999]), st.text(max_size=200))
def test_a_close_is_sent_so_that_it_can_be_read(code: int, reason: str) -> None:
    payload = wsframes.close_payload(code, reason)
    assert len(payload) <= 125
    (close,) = understood(b"".join(wsframes.frame(CLOSE, payload, KEY)))
    assert isinstance(close, Close)
    assert close.code == code
    assert reason.startswith(close.reason)
    assert close.reason == reason or len(reason.encode()) > 123


def test_a_reason_that_is_no_unicode_is_sent_all_the_same() -> None:
    (close,) = understood(b"".join(wsframes.frame(CLOSE, wsframes.close_payload(1011, "no \udc80"), KEY)))
    assert close == Close(1011, "no ?")


@pytest.mark.parametrize("code", [wsframes.UNSAID, wsframes.LOST])
def test_a_code_that_nobody_may_send_is_left_out(code: int) -> None:
    assert wsframes.close_payload(code, "x") == b""


def test_the_handshake_proves_that_the_key_was_read() -> None:
    assert wsframes.accept("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # the example of section 1.3
