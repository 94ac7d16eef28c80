"""Sweeps over the points at which a task can be interrupted: an action before the N-th step of any task, for many N.

Where a try takes long, only chosen steps are tried. With ORCHARD_SWEEP_GROWTH=1 in the environment each step is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import trio

# Steps that `growing_steps` does not skip any of.
_DENSE = 6


class AtStep(trio.abc.Instrument):
    """Calls `action` before the N-th step of any task. `left` is 0 or less when it was called."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        self.left = number
        self._action = action

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self._action()


def growing_steps(growth: float) -> Iterator[int]:
    """Yield 1, 2, 3, ... and then numbers that grow by a factor; all numbers for the factor 1."""
    growth = float(os.environ.get("ORCHARD_SWEEP_GROWTH", growth))
    step = 1
    while True:
        yield step
        step = step + 1 if step < _DENSE else max(step + 1, int(step * growth))
