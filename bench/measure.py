"""Measuring for the benchmarks: variants in turns, medians and ranges, and the ratio to a baseline of the same run.

Machines are shared and noisy, so absolute times are only a guide. What counts is the ratio of two variants that were
measured in turns.
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
    """Something to measure: a function, the number of operations in a call, and the processor time that counts."""

    name: str
    run: Callable[[], Awaitable[object] | object]
    operations: int
    cpu: Callable[[], float] = time.process_time
    # The time of each round.
    seconds: list[float] = field(default_factory=list)
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
        """Operations per second in the median round."""
        return self.operations / statistics.median(self.seconds)


async def turns(*variants: Variant, count: int = ROUNDS) -> None:
    """Measure variants in turns, and print the results."""
    for number in range(count + 1):
        for variant in variants:
            await variant.measure()
            # The first round fills caches, imports modules and opens connections.
            if number == 0:
                variant.seconds.clear()
                variant.cpu_seconds.clear()
    show(*variants)


def compare(*variants: Variant, count: int = ROUNDS) -> None:
    """Measure functions without an event loop in turns, and print the results."""
    measuring = turns(*variants, count=count)
    with suppress(StopIteration):
        # Measuring waits for nothing, so one step runs it to its end.
        measuring.send(None)


def show(*variants: Variant) -> None:
    """Print a table. The ratio compares the rates of each round with those of the last variant, the baseline."""
    base = variants[-1]
    print(f"{'':44}{'a second':>11}{'range':>20}{'CPU us':>10}{'ratio':>8}{'range':>17}")
    for variant in variants:
        rates = sorted(variant.operations / seconds for seconds in variant.seconds)
        cpu = 1e6 * statistics.median(variant.cpu_seconds) / variant.operations
        span = f"{rates[0]:,.0f} to {rates[-1]:,.0f}"
        scale = variant.operations / base.operations
        ratios = sorted(scale * theirs / own for own, theirs in zip(variant.seconds, base.seconds, strict=True))
        between = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(
            f"{variant.name:44}{variant.rate:11,.0f}{span:>20}{cpu:10.1f}{statistics.median(ratios):8.2f}{between:>17}"
        )


class Turns(trio.abc.Instrument):
    """Measures the longest step of any task, in seconds, and the longest in CPU seconds of the event loop's thread."""

    def __init__(self) -> None:
        self.longest = self.longest_cpu = 0.0
        # The step that adds this instrument to the loop began earlier, at an unknown time.
        self._began = self._began_cpu = math.inf

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began, self._began_cpu = time.perf_counter(), time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.perf_counter() - self._began)
        self.longest_cpu = max(self.longest_cpu, time.thread_time() - self._began_cpu)
