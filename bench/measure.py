"""How the benchmarks measure: variants in turns, medians and ranges, and the ratio to a bare baseline of the same run.

Machines are shared and noisy, so an absolute time is only for reading; what counts is the ratio of two things that were
measured one after the other, again and again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

ROUNDS = 5


@dataclass
class Variant:
    """Something to measure: what to call, how many operations a call is, and whose processor time counts."""

    name: str
    run: Callable[[], Awaitable[object] | object]
    operations: int
    cpu: Callable[[], float] = time.process_time
    seconds: list[float] = field(default_factory=list)  # of each round
    cpu_seconds: list[float] = field(default_factory=list)

    async def measure(self) -> None:
        cpu, began = self.cpu(), time.perf_counter()
        result = self.run()
        if isinstance(result, Awaitable):
            await result
        self.add(time.perf_counter() - began, self.cpu() - cpu)

    def add(self, seconds: float, cpu: float) -> None:
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu)

    @property
    def rate(self) -> float:
        """Operations a second, in the median round."""
        return self.operations / statistics.median(self.seconds)


async def turns(*variants: Variant, count: int = ROUNDS) -> None:
    """Measure variants in turns, and show them."""
    for number in range(count + 1):
        for variant in variants:
            await variant.measure()
            if number == 0:  # unmeasured: caches, imports, connections
                variant.seconds.clear()
                variant.cpu_seconds.clear()
    show(*variants)


def compare(*variants: Variant, count: int = ROUNDS) -> None:
    """Measure functions in turns that need no loop, or have one of their own, and show them."""
    measuring = turns(*variants, count=count)
    with suppress(StopIteration):
        measuring.send(None)  # it never waits


def show(*variants: Variant) -> None:
    """Print a table. The ratio is that of rates, round by round, to the last variant, which is the baseline."""
    base = variants[-1]
    print(f"{'':44}{'a second':>11}{'range':>20}{'CPU s/1,000':>13}{'ratio':>8}{'range':>17}")
    for variant in variants:
        rates = sorted(variant.operations / seconds for seconds in variant.seconds)
        cpu = 1000 * statistics.fmean(variant.cpu_seconds) / variant.operations  # systems count it in ticks of 10 ms
        span = f"{rates[0]:,.0f} to {rates[-1]:,.0f}"
        scale = variant.operations / base.operations
        ratios = sorted(scale * theirs / own for own, theirs in zip(variant.seconds, base.seconds, strict=True))
        between = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(
            f"{variant.name:44}{variant.rate:11,.0f}{span:>20}{cpu:13.4f}{statistics.median(ratios):8.2f}{between:>17}"
        )


class Turns(trio.abc.Instrument):
    """How long each task ran until others got their turn, in seconds."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._began = math.inf  # of the task that adds this to the loop, the beginning is not known

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.perf_counter() - self._began)
