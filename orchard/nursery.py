"""What comes out of a nursery: exception groups, and the one exception in them that matters. Law: pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


def first_exception(error: BaseException) -> BaseException:
    """Give the first exception of a group that is no group itself; any other exception as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def sole_exception(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Give the exception that a nursery wrapped, or the first of several of one type; else the group.

    Cancellations beside it do not count.
    """
    _, own = group.split(trio.Cancelled)
    found = list(_leaves(group if own is None else own))
    return found[0] if len({type(error) for error in found}) == 1 else group


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


@contextmanager
def unwrap_groups() -> Iterator[None]:
    """Let the exception out that a nursery in the block wrapped, as if there had been no nursery."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise sole_exception(group) from None
