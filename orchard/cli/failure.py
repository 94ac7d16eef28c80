"""The errors that end a verb of the `orchard` command."""

from __future__ import annotations

FAILED, USAGE, OVERDUE, INTERRUPTED = 1, 2, 124, 130


class CommandError(Exception):
    """A verb has failed; `str(error)` is what is printed to stderr, on one line, and `status` the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class NetworkError(CommandError):
    """The controller cannot be reached, or the connection was lost. `is_untrusted`: the host's CAs do not trust it."""

    def __init__(self, message: str, *, is_untrusted: bool = False) -> None:
        super().__init__(message)
        self.is_untrusted = is_untrusted
