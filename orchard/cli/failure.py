"""What ends a verb of the `orchard` command: its errors, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

FAILED, USAGE, OVERDUE, INTERRUPTED = 1, 2, 124, 130


class CommandError(Exception):
    """A verb has failed; `str(error)` is what is printed to stderr, on one line, and `status` the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class NetworkError(CommandError):
    """The controller cannot be reached, or the connection was lost.

    `is_untrusted`: the host's CAs do not trust it. `is_refused`: nothing listens there, so nothing was sent.
    """

    def __init__(self, message: str, *, is_untrusted: bool = False, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_untrusted = is_untrusted
        self.is_refused = is_refused


@contextmanager
def cleaning_up(handler: Callable[[int, FrameType | None], object] = signal.default_int_handler) -> Iterator[None]:
    """Raise KeyboardInterrupt, or call `handler`, at a Ctrl-C in the block, which has something to clean up.

    Elsewhere Ctrl-C ends the process at once (orchard.end_at_interrupt).
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_with_reader() -> None:
    """End the process as soon as the reader of standard output has gone, as `tail -f` does.

    The next line, whose write would end it, may be hours away. Only a pipe has a reader, and Windows cannot watch one.
    """
    import os
    import select
    import stat
    import sys
    import threading

    def exit_without_reader(pipe: int) -> None:
        poll = select.poll()
        # Errors are reported in any case; on a pipe that is written to, this is the end of its reader.
        poll.register(pipe, 0)
        poll.poll()
        os._exit(FAILED)

    with suppress(OSError, ValueError):
        pipe = sys.stdout.fileno()
        if hasattr(select, "poll") and stat.S_ISFIFO(os.fstat(pipe).st_mode):
            threading.Thread(target=exit_without_reader, args=(pipe,), daemon=True).start()
