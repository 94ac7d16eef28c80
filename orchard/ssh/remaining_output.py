"""A command's remaining output: what comes after the end of the command itself, within bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

# The most bytes that are read after a command has ended.
REST_BYTES = 8 * 1024 * 1024  # bytes
# The most output in one read.
_READ_BYTES = 64 * 1024  # bytes


class RemainingOutput:
    """Bounds what is read from a stream after its command has ended.

    A process in the background may hold the stream open, and may even write to it. Only the time in which nothing comes
    counts, in all at most `seconds`, so that a slow client gets all that the command itself has written.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
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
