"""Answers that are lines of JSON and may be endless: reading them, and resuming with another request after an end."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Literal, Self

import trio

from orchard.base.nursery import growing_pause
from orchard.methods.common import parse_object
from orchard.net.transport import ClientError, ConnectError, ResponseError, Transport
from orchard.net.urls import SERVER_ERRORS

# The longest line, which holds a whole VM.
_MAX_LINE_BYTES = 64 * 1024 * 1024
# The first and the longest pause between attempts to reconnect, and the time for all attempts.
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 5.0  # seconds
_RESUME_SECONDS = 600.0

AfterRefusal = Literal["raise", "end", "again"]


class JSONLines:
    """Reads lines of JSON out of the pieces of an answer's body. Empty lines only keep the connection open."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._lines: deque[bytes] = deque()
        # The beginning of a line whose end has not arrived.
        self._incomplete = b""

    async def take(self) -> Mapping[str, Any] | None:
        """Return the object of the next line, None at the end of the body. Raises ClientError."""
        while not self._lines:
            piece = await anext(self._pieces, None)
            if piece is None:
                return None
            *lines, self._incomplete = (self._incomplete + piece).split(b"\n")
            self._lines.extend(filter(None, lines))
            if len(self._incomplete) > _MAX_LINE_BYTES:
                raise ClientError(f"a line of the answer is longer than {_MAX_LINE_BYTES} bytes")
        return parse_object(self._lines.popleft(), "a line of the answer")


class Absence:
    """The time during which a server does not answer, for example because it is restarted; and the pauses between requests."""

    def __init__(self) -> None:
        self._until = math.inf
        self._pauses = 0

    def bear(self, error: ClientError) -> None:
        """Note that a request has failed. Raises its error if the first failure was ten minutes ago."""
        self._until = min(self._until, trio.current_time() + _RESUME_SECONDS)
        if trio.current_time() >= self._until:
            raise error

    async def pause(self, most: float = math.inf) -> None:
        """Wait before the next request, each time longer, but at most `most` seconds."""
        self._pauses += 1
        await trio.sleep(min(most, growing_pause(self._pauses, _FIRST_PAUSE, _LAST_PAUSE)))


class ResumingLines:
    """The lines of an endless answer. When it ends or its connection is lost, another request resumes after the last line.

    `make_query` returns the query parameters of the next request. `refuse` decides what follows when a request after
    the first one is refused. `may_end`: an answer that ends without a line is the end of the lines, too. Use it as an
    asynchronous context manager, which raises what the first request raises.
    """

    def __init__(
        self,
        transport: Transport,
        path: str,
        make_query: Callable[[], Mapping[str, str]],
        refuse: Callable[[ResponseError], AfterRefusal],
        *,
        may_end: bool = False,
    ) -> None:
        self._transport = transport
        self._path = path
        self._make_query = make_query
        self._refuse = refuse
        self._may_end = may_end
        # Holds the open connection.
        self._stack = AsyncExitStack()
        self._lines: JSONLines | None = None
        # Whether the present answer had a line.
        self._has_line = False

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def take(self) -> Mapping[str, Any] | None:
        """Return the object of the next line, None at the end. Raises ClientError.

        Raises ConnectError if the server cannot be reached for ten minutes.
        """
        # A new absence: the lines may have come for long before.
        absence = Absence()
        while True:
            try:
                line = await self._take()
            except (ConnectError, ResponseError) as error:
                after: AfterRefusal | Literal["lost"] = "lost"
                if isinstance(error, ResponseError) and error.status < SERVER_ERRORS:
                    after = self._refuse(error)
                if after == "raise":
                    raise
                if after == "end":
                    return None
                if after == "lost":
                    absence.bear(error)
            else:
                if line is not None:
                    self._has_line = True
                    return line
                if self._may_end and not self._has_line:
                    return None
            self._lines = None
            await self._stack.aclose()
            await absence.pause()

    async def _take(self) -> Mapping[str, Any] | None:
        if self._lines is None:
            await self._open()
        assert self._lines is not None
        return await self._lines.take()

    async def _open(self) -> None:
        pieces = await self._stack.enter_async_context(self._transport.stream(self._path, self._make_query()))
        self._lines = JSONLines(pieces)
        self._has_line = False
