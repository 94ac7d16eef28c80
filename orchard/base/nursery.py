"""Small tools for trio tasks: a wake-up that re-arms itself, pauses, steps, and the exception that matters in a group.

`Wakeup` replaces the pattern of one `trio.Event` that is made anew after each wait. `growing_pause` is the pause
between attempts. The functions for exceptions find the one that matters in a group, since a nursery wraps even a
single exception in a group.

This module knows no resource and no role of the product.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TypeVar

import trio

StartedT = TypeVar("StartedT")
VisitedT = TypeVar("VisitedT")
SleptT = TypeVar("SleptT")


class Wakeup:
    """A signal to a task that something may have changed, so that the task looks at the state again.

    `set()` before `wait()` is remembered, and several `set()` before one `wait()` wake it once. `wait()` re-arms before
    it returns, so a change that comes while the woken task reads the state wakes it again: no change is missed.

    One task waits, as a rule. Of several, all that wait at the time of a `set()` wake; a task that is busy then does
    not. So tasks that each must see every change need a wake-up each.
    """

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake the tasks that wait, or else the first that waits next."""
        self._event.set()

    async def wait(self) -> None:
        """Block until `set()` was called since the last `wait()` returned. Always a checkpoint."""
        event = self._event
        await event.wait()
        # Another task that waited for the same event may have re-armed it already.
        if self._event is event:
            self._event = trio.Event()


class Started(trio.TaskStatus[StartedT]):
    """A `task_status` for a task that may end before it has started: holds the value, once `is_set`."""

    def __init__(self) -> None:
        self.is_set = trio.Event()

    def started(self, value: StartedT | None = None) -> None:
        assert value is not None
        self.value = value
        self.is_set.set()


async def visit_in_steps(
    table: Mapping[str, VisitedT], size: int, visit: Callable[[VisitedT], object]
) -> None:  # fmt: skip
    """Call `visit` with each value of a table that may change meanwhile, `size` values in one step of the event loop."""
    names = [*table]
    for start in range(0, len(names), size):
        for name in names[start : start + size]:
            if (one := table.get(name)) is not None:
                visit(one)
        await trio.lowlevel.checkpoint()


async def sleep_pauses(
    pauses: Generator[float, None, SleptT], sleep: Callable[[float], Awaitable[object]] = trio.sleep
) -> SleptT:
    """Sleep for each number of seconds that a generator yields. Return what it returns, raise what it raises."""
    with closing(pauses):
        while True:
            try:
                seconds = next(pauses)
            except StopIteration as end:
                result: SleptT = end.value
                return result
            await sleep(seconds)


def growing_pause(failures: int, first: float, last: float) -> float:
    """Return the seconds to pause after `failures` in a row: `first` after one, then doubled, at most `last`."""
    return float(min(last, first * 2 ** min(failures - 1, 30)))


def first_exception(error: BaseException) -> BaseException:
    """Return the first exception in a group that is not a group itself; any other exception as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def sole_exception(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception in a group, or the first if all are of one type; otherwise the group.

    Cancellations in the group are ignored, unless there is nothing else.
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
    """Raise the exception of a nursery in the block without its group, as if there had been no nursery.

    A group of exceptions of several types stays a group (see `sole_exception`).
    """
    try:
        yield
    except BaseExceptionGroup as group:
        raise sole_exception(group) from None
