"""How lines are sent to watchers: to each by a task of its own, and to all that are up to date by a single task.

Most watchers have seen everything and wait. Waking each one's task costs more than sending the change. So an `Audience`
sends the change in their place, to some watchers in each step of the event loop, as long as their sockets take it at
once. A watcher's task goes on when its socket is full, when there is more to send, or at the end.

The lines come from a `Lines`: the changes of one object (changes.py) or of all objects (change_log.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import trio

from orchard.base.nursery import Wakeup

# After this time of sending, other tasks get their turn. To send a line of 1 KB takes about 20 microseconds.
_STEP_SECONDS = 0.001

# Lines. A tuple has parts that are too large to be copied for each watcher.
Block = bytes | tuple[bytes, ...]


class SendBlock(Protocol):
    """Sends lines to one watcher."""

    async def __call__(self, block: Block, /) -> None:
        """Send what `now` has left, and then a block."""

    def now(self, block: Block, /) -> bool:
        """Send a block without waiting. Return False if a part of it is left, which the next call has to send."""


class Lines(Protocol):
    """What one watcher is to be sent."""

    def take(self) -> Block | None:
        """Return the next lines: empty if there are none, None at the end of the watch."""

    def has_more(self) -> bool:
        """Return whether `take` should be called again at once."""

    def filler(self) -> Block:
        """Return what is sent after a silence."""


class Watcher:
    """Sends lines to one watcher while `run` is running. After each `silence` seconds without a line it sends a filler."""

    __slots__ = ("_error", "_has_rest", "_is_waiting", "_lines", "_send", "_silence", "_until", "_wakeup")

    def __init__(self, lines: Lines, send: SendBlock, silence: float) -> None:
        self._lines = lines
        self._send = send
        self._silence = silence
        self._until = trio.current_time() + silence
        self._wakeup = Wakeup()
        # Whether the task has nothing to do, so that `advance` may send in its place.
        self._is_waiting = False
        # Whether `now` has left something.
        self._has_rest = False
        # The exception that `advance` has met, to be raised by `run`.
        self._error: Exception | None = None

    async def run(self) -> None:
        """Send lines until they end. Cancelling it may cut a line off. Raises what `send` raises."""
        while self._send_next():
            if self._has_rest:
                # The socket is full, so the task sends the rest.
                await self._finish(b"")
            elif self._lines.has_more():
                await trio.lowlevel.checkpoint()
            else:
                await self._wait()

    def advance(self) -> None:
        """Send the next lines if the task waits for them. Wake the task if there is more to do."""
        if not self._is_waiting:
            return
        try:
            if self._send_next() and not self._has_rest and not self._lines.has_more():
                return
        except Exception as error:  # noqa: BLE001 -- `run` raises it
            # The error must end this watch only.
            self._error = error
        self._is_waiting = False
        self._wakeup.set()

    def _send_next(self) -> bool:
        """Send the next lines, or begin to. Return False if there will be none."""
        block = self._lines.take()
        if block:
            self._has_rest = not self._send.now(block)
            self._until = trio.current_time() + self._silence
        return block is not None

    async def _finish(self, block: Block) -> None:
        """Send what is left, and a block after it."""
        await self._send(block)
        self._has_rest = False
        self._until = trio.current_time() + self._silence

    async def _wait(self) -> None:
        """Wait until there is something to do, and do it unless there are new lines."""
        self._is_waiting = True
        try:
            # `advance` moves the end of the silence. A new scope for each line would cost as much as the line itself,
            # so the scope may end too early.
            with trio.move_on_at(self._until) as silence:
                await self._wakeup.wait()
        finally:
            self._is_waiting = False
        if self._error is not None:
            raise self._error
        if self._has_rest:
            await self._finish(b"")
        elif silence.cancelled_caught and trio.current_time() >= self._until:
            await self._finish(self._lines.filler())


class Audience:
    """Sends new lines to the watchers that wait for them, while `run` is running."""

    def __init__(self) -> None:
        # The watchers for whom there may be new lines, each once.
        self._called: dict[Watcher, None] = {}
        self._wakeup = Wakeup()

    def call(self, watchers: Iterable[Watcher]) -> None:
        """Schedule sending new lines to these watchers."""
        self._called.update(dict.fromkeys(watchers))
        self._wakeup.set()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._wakeup.wait()
            while self._called:
                self._advance_some()
                await trio.lowlevel.checkpoint()

    def _advance_some(self) -> None:
        until = trio.current_time() + _STEP_SECONDS
        for watcher in list(self._called):
            del self._called[watcher]
            watcher.advance()
            if trio.current_time() >= until:
                return
