"""WebSocket frames (RFC 6455, section 5) as data: building them, and reading a byte stream out of them. Pure: no I/O.

A tunnel sends a byte stream in messages whose boundaries mean nothing. `FrameReader` therefore assembles no message: it
reads the headers and returns each part of a payload as soon as the part has arrived. Between two calls it keeps part of
a header, of a control frame or of a UTF-8 character, 125 bytes at most, so messages need no size limit. Text is
returned as its UTF-8 bytes. Where messages matter, trio-websocket reads them (websocket.py).

A breach of the protocol is returned as a `Close`, the last event. The same bytes give the same events however they are
cut into pieces.

Masking in Python is half of a tunnel's cost. The package websockets (extra `orchard-cluster[fast]`) has a C function
for it, which is used if it is installed. Random numbers (the masking keys) come from the caller.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

# Opcodes.
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
# Status codes of a close frame (section 7.4.1).
NORMAL, GOING_AWAY, PROTOCOL_ERROR, INVALID_PAYLOAD, INTERNAL_ERROR = 1000, 1001, 1002, 1007, 1011
# Another such code: the session may not go on, for example because its account was deleted.
POLICY_VIOLATION = 1008
# Codes that are never sent: a close frame without a code, and a connection that ended without a close frame.
NO_STATUS, ABNORMAL = 1005, 1006

_MAX_CONTROL_BYTES = 125
# A close frame's payload is a code of two bytes and the reason.
_MAX_REASON_BYTES = _MAX_CONTROL_BYTES - 2
# Fields of a header's first byte.
_FIN, _RSV, _OPCODE = 0x80, 0x70, 0x0F
# The mask bit of a header's second byte. The other bits are the length, or say that 16 or 64 bits of length follow.
_MASKED = 0x80
_LENGTH_16, _LENGTH_64 = 126, 127
_LENGTH_BYTES = {_LENGTH_16: 2, _LENGTH_64: 8}
# A constant of the handshake (section 4.2.2).
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# The codes below 3000 that a peer may send.
_SENDABLE = frozenset([*range(1000, 1004), *range(1007, 1015)])
_XOR = [bytes(byte ^ key for byte in range(256)) for key in range(256)]

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Ping:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    payload: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """How one side closed a WebSocket. With `is_violation` the peer broke the protocol, and `reason` names the rule."""

    code: int
    reason: str = ""
    is_violation: bool = False


# Bytes are a part of the payload of text and binary frames.
FrameEvent = Bytes | Ping | Pong | Close


def accept_value(key: str) -> str:
    """Return the value of Sec-WebSocket-Accept that answers a Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1((key + _GUID).encode("latin-1"), usedforsecurity=False).digest()).decode()


# ---- building ------------------------------------------------------------------------------------------------------


def mask_in_python(data: Bytes, key: bytes) -> bytearray:
    """Return data masked (or unmasked): XORed with the 4 bytes of `key` over and over."""
    out = bytearray(data)
    for place in range(4):
        out[place::4] = out[place::4].translate(_XOR[key[place]])
    return out


def _fastest_mask() -> Callable[[Bytes, bytes], Bytes]:
    try:
        from websockets.speedups import apply_mask
    except ImportError:
        # The package is not installed, or it has no compiled module for this machine.
        return mask_in_python
    return apply_mask


mask = _fastest_mask()


def build_frame(opcode: int, payload: Bytes, key: bytes | None = None) -> tuple[Bytes, ...]:
    """Return the parts of a whole, final frame, to be sent one after the other.

    A client passes a key, which masks the payload: 4 bytes, unpredictable, used for one frame only.
    """
    size = len(payload)
    mask_bit = 0 if key is None else _MASKED
    if size < _LENGTH_16:
        header = bytes((_FIN | opcode, mask_bit | size))
    elif size < 1 << 16:
        header = bytes((_FIN | opcode, mask_bit | _LENGTH_16)) + size.to_bytes(2, "big")
    else:
        header = bytes((_FIN | opcode, mask_bit | _LENGTH_64)) + size.to_bytes(8, "big")
    return (header, payload) if key is None else (header, key, mask(payload, key))


def close_payload(code: int, reason: str) -> bytes:
    """Return the payload of a close frame: empty for NO_STATUS and ABNORMAL, which cannot be sent.

    A reason over 123 bytes of UTF-8 is cut between two characters.
    """
    if code in (NO_STATUS, ABNORMAL):
        return b""
    text = reason.encode("utf-8", "replace")[:_MAX_REASON_BYTES].decode("utf-8", "ignore")
    return code.to_bytes(2, "big") + text.encode()


# ---- reading -------------------------------------------------------------------------------------------------------


class _ViolationError(Exception):
    """The peer broke the protocol. `close` holds the code and the reason to close with."""

    def __init__(self, reason: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.close = Close(code, reason, is_violation=True)


class FrameReader:
    """Reads one direction of a WebSocket. `masked` says whether its frames must be masked: those of a client must."""

    def __init__(self, *, masked: bool) -> None:
        self._masked = masked
        # The bytes of the header that have arrived.
        self._header = bytearray()
        # The frame whose payload arrives. The opcode of a continuation is that of its message.
        self._opcode = 0
        self._final = False
        self._left = 0
        self._key = b""
        # The payload of a control frame, as far as it has arrived.
        self._control = bytearray()
        # The opcode of the message that is not complete; CONTINUATION if there is none.
        self._message = CONTINUATION
        # Validates the text message that is not complete.
        self._text: codecs.IncrementalDecoder | None = None
        self._done = False

    def feed(self, data: Bytes) -> list[FrameEvent]:
        """Return the events of the bytes that arrived. After a Close there are no more.

        Parts of a payload may be views of `data`.
        """
        events: list[FrameEvent] = []
        view = memoryview(data)
        try:
            while len(view) and not self._done:
                view = self._read_payload(view, events) if self._left else self._read_header(view, events)
        except _ViolationError as violation:
            self._end(violation.close, events)
        return events

    def _end(self, close: Close, events: list[FrameEvent]) -> None:
        self._done = True
        events.append(close)

    def _read_header(self, view: memoryview, events: list[FrameEvent]) -> memoryview:
        used, is_complete = _extend_header(self._header, view)
        if is_complete:
            self._begin_frame(self._header)
            self._header.clear()
            if not self._left:
                self._end_frame(events)
        return view[used:]

    def _begin_frame(self, header: bytearray) -> None:
        opcode, self._final = header[0] & _OPCODE, bool(header[0] & _FIN)
        self._check_header(header, opcode)
        self._key = bytes(header[-4:]) if self._masked else b""
        self._left = _payload_size(header)
        _check_length(header, self._left)
        if opcode == TEXT:
            self._text = codecs.getincrementaldecoder("utf-8")()
        if opcode == CONTINUATION:
            opcode = self._message
        elif opcode < CLOSE:
            self._message = opcode
        self._opcode = opcode

    def _check_header(self, header: bytearray, opcode: int) -> None:
        if header[0] & _RSV:
            raise _ViolationError("a reserved bit is set, but no extension was negotiated")
        if bool(header[1] & _MASKED) != self._masked:
            rule = "not masked, and a client's must be" if self._masked else "masked, and a server's must not be"
            raise _ViolationError(f"a frame is {rule}")
        if opcode in (CLOSE, PING, PONG):
            if not self._final:
                raise _ViolationError(f"a control frame (opcode {opcode}) is fragmented")
            if header[1] & ~_MASKED > _MAX_CONTROL_BYTES:
                raise _ViolationError(
                    f"a control frame (opcode {opcode}) has over {_MAX_CONTROL_BYTES} bytes of payload"
                )
        elif opcode in (TEXT, BINARY):
            if self._message:
                raise _ViolationError("a message begins before the previous one has ended")
        elif opcode != CONTINUATION:
            raise _ViolationError(f"opcode {opcode} is reserved")
        elif not self._message:
            raise _ViolationError("a continuation frame without a message to continue")

    def _read_payload(self, view: memoryview, events: list[FrameEvent]) -> memoryview:
        part: Bytes = view[: self._left]
        size = len(part)
        if self._masked:
            part = mask(part, self._key)
            if turn := size % 4:
                self._key = self._key[turn:] + self._key[:turn]
        self._left -= size
        if self._opcode >= CLOSE:
            self._control += part
        else:
            self._validate_text(part)
            events.append(part)
        if not self._left:
            self._end_frame(events)
        return view[size:]

    def _validate_text(self, part: Bytes, final: bool = False) -> None:
        if self._text is not None:
            try:
                self._text.decode(bytes(part), final)
            except UnicodeDecodeError as error:
                raise _ViolationError(f"a text message is not UTF-8: {error.reason}", INVALID_PAYLOAD) from None

    def _end_frame(self, events: list[FrameEvent]) -> None:
        if self._opcode < CLOSE:
            if self._final:
                self._validate_text(b"", final=True)
                self._message, self._text = CONTINUATION, None
            return
        payload = bytes(self._control)
        self._control.clear()
        if self._opcode == CLOSE:
            self._end(_read_close(payload), events)
        else:
            events.append(Ping(payload) if self._opcode == PING else Pong(payload))


class FrameSplitter:
    """Finds where the frames of one direction of a WebSocket end, without checking or unmasking them."""

    def __init__(self) -> None:
        self._header = bytearray()
        # Bytes of the payload that have not arrived; None until the header is complete.
        self._left: int | None = None

    def measure(self, data: Bytes) -> tuple[int, int | None]:
        """Return how many bytes at the front of `data` belong to the present frame, and its opcode if it ends there.

        The opcode of a frame that does not end in `data` is None. Pass the bytes that follow to the next call.
        """
        used = 0
        if self._left is None:
            used, is_complete = _extend_header(self._header, data)
            if not is_complete:
                return used, None
            self._left = _payload_size(self._header)
        taken = min(self._left, len(data) - used)
        self._left -= taken
        if self._left:
            return used + taken, None
        opcode = self._header[0] & _OPCODE
        self._header.clear()
        self._left = None
        return used + taken, opcode


def _extend_header(header: bytearray, data: Bytes) -> tuple[int, bool]:
    """Append the bytes of `data` that belong to the header. Return their number, and whether the header is complete."""
    used = 0
    while missing := _header_size(header) - len(header):
        if used == len(data):
            return used, False
        part = data[used : used + missing]
        header += part
        used += len(part)
    return used, True


def _header_size(header: bytearray) -> int:
    """Return the size of a header, as far as the beginning of it tells."""
    if len(header) < 2:
        return 2
    return 2 + _LENGTH_BYTES.get(header[1] & ~_MASKED, 0) + (4 if header[1] & _MASKED else 0)


def _payload_size(header: bytearray) -> int:
    """Return the size of the payload that a complete header announces."""
    short = header[1] & ~_MASKED
    return int.from_bytes(header[2 : 2 + _LENGTH_BYTES[short]], "big") if short in _LENGTH_BYTES else short


def _check_length(header: bytearray, length: int) -> None:
    """Raise unless the length has its shortest form, and at most the 63 bits that the standard allows.

    Two readers could understand a length in a longer form differently.
    """
    short = header[1] & ~_MASKED
    if length >> 63:
        raise _ViolationError("the length of a frame is over 63 bits")
    if (short == _LENGTH_16 and length < _LENGTH_16) or (short == _LENGTH_64 and length < 1 << 16):
        raise _ViolationError(f"the length {length} is written in {8 * _LENGTH_BYTES[short]} bits, expected fewer")


def _read_close(payload: bytes) -> Close:
    if not payload:
        return Close(NO_STATUS)
    if len(payload) == 1:
        raise _ViolationError("the payload of a close frame is 1 byte, expected none or at least 2")
    code = int.from_bytes(payload[:2], "big")
    if code not in _SENDABLE and not 3000 <= code < 5000:
        raise _ViolationError(f"the code of a close frame is {code}, which must not be sent")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError as error:
        raise _ViolationError(f"the reason of a close frame is not UTF-8: {error.reason}", INVALID_PAYLOAD) from None
