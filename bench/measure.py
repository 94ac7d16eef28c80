"""How the benchmarks measure: variants in turns, medians and ranges, and the ratio to a bare baseline of the same run.

Machines are shared and noisy, so an absolute time is only for reading; what counts is the ratio of two things that were
measured one after the other, again and again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

ROUNDS = 5


@dataclass
class Series:
    """What one variant took, round by round: seconds, and seconds of the processor, of so many operations each."""

    name: str
    operations: int
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, seconds: float, cpu: float) -> None:
        self.seconds.append(seconds)
        self.cpu.append(cpu)

    @property
    def rate(self) -> float:
        """Operations a second, in the median round."""
        return self.operations / statistics.median(self.seconds)


def rounds(variants: Mapping[str, tuple[int, Callable[[], object]]], count: int = ROUNDS) -> list[Series]:
    """Run functions in turns; each comes with the number of operations that a call of it is."""
    series = [Series(name, operations) for name, (operations, _) in variants.items()]
    for _ in range(count):
        for one, (_, run) in zip(series, variants.values(), strict=True):
            began, cpu = time.perf_counter(), time.process_time()
            run()
            one.add(time.perf_counter() - began, time.process_time() - cpu)
    return series


async def async_rounds(
    variants: Mapping[str, tuple[int, Callable[[], Awaitable[object]]]], cpu: Callable[[], float], count: int = ROUNDS
) -> list[Series]:
    """As `rounds`, with asynchronous functions. `cpu` gives the seconds of the processor that count."""
    series = [Series(name, operations) for name, (operations, _) in variants.items()]
    for _ in range(count):
        for one, (_, run) in zip(series, variants.values(), strict=True):
            began, before = time.perf_counter(), cpu()
            await run()
            one.add(time.perf_counter() - began, cpu() - before)
    return series


def show(series: list[Series]) -> None:
    """Print a table; the ratio is that of rates, to the last variant, which is the baseline."""
    print(f"{'':36}{'a second':>12}{'range':>24}{'CPU s/1,000':>14}{'ratio':>8}")
    for one in series:
        rates = sorted(one.operations / seconds for seconds in one.seconds)
        cpu = 1000 * statistics.median(one.cpu) / one.operations
        span = f"{rates[0]:,.0f} to {rates[-1]:,.0f}"
        print(f"{one.name:36}{one.rate:12,.0f}{span:>24}{cpu:14.4f}{one.rate / series[-1].rate:8.2f}")
