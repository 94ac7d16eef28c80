"""A command's remaining output: what comes after the end of the command itself, within bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

# Bounds on the output after a command has ended: the total time of waiting, and the bytes that are sent.
REST_SECONDS = 2.0  # seconds
REST_BYTES = 8 * 1024 * 1024  # bytes
# The most output in one read.
_READ_BYTES = 64 * 1024  # bytes


class RemainingOutput:
    """Bounds what is read from a stream after its command has ended.

    A process in the background may hold the stream open, and may even write to it. Only the time in which nothing comes
    counts, so that a slow client gets all that the command itself has written.
    """

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds` is REST_SECONDS unless it is given."""
        self._seconds = REST_SECONDS if seconds is None else seconds
        self._bytes = REST_BYTES
        self._has_begun = False
        self._scope = trio.CancelScope()

    def begin(self) -> None:
        """Bound the reading from now on."""
        self._has_begun = True
        self._scope.deadline = trio.current_time() + self._seconds

    async def read(self, read: Callable[[int], Awaitable[bytes | bytearray]]) -> bytes | bytearray:
        """Return the next bytes, b"" at the end and beyond the bounds."""
        self._scope = trio.CancelScope()
        if self._has_begun:
            self._scope.deadline = trio.current_time() + self._seconds
        data: bytes | bytearray = b""
        with self._scope:
            data = await read(_READ_BYTES)
        if self._has_begun:
            self._seconds = min(self._seconds, self._scope.deadline - trio.current_time())
            self._bytes -= len(data)
        return data if self._bytes > 0 else b""
