"""Metrics and their text format, in which Prometheus reads them (text/plain; version=0.0.4). Pure.

Counters are plain numbers and `collections.Counter`s in the modules that count, so counting costs almost nothing. A
`Histogram` counts values by buckets. A `Metric` declares one metric and formats its lines.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

# The media type of what `text_of` returns.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds of buckets in seconds: for the controller's own work, and for the phases of a VM's life.
WORK_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LIFE_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)

MetricKind = Literal["counter", "gauge", "histogram"]


class Histogram:
    """Counts values by buckets with these upper bounds, which are in order. The last bucket has none."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value. A negative one, of a clock that was set back, counts as 0."""
        value = max(0.0, value)
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metric(NamedTuple):
    """One metric: its name, its kind, what it means, and the names of its labels."""

    name: str
    kind: MetricKind
    doc: str
    labels: tuple[str, ...] = ()

    def lines(self, value: float | Mapping[Any, float] | Histogram) -> list[str]:
        """Return the metric's lines for a number, for numbers by tuples of label values, or for a histogram."""
        if isinstance(value, Histogram):
            return self._histogram_lines(value)
        samples = value if isinstance(value, Mapping) else {(): value}
        return [*self.head(), *(self.sample_line(key, samples[key]) for key in samples)]

    def sample_line(self, key: tuple[str, ...], value: float) -> str:
        """Return the line of one value of a counter or a gauge. `key` has the values of the labels."""
        return f"{self._labelled(self.name, zip(self.labels, key, strict=True))} {_number(value)}"

    def _histogram_lines(self, histogram: Histogram) -> list[str]:
        found = self.head()
        for bound, count in zip((*histogram.bounds, math.inf), accumulate(histogram.counts), strict=True):
            found.append(f"{self._labelled(f'{self.name}_bucket', [('le', _number(bound))])} {count}")
        return [*found, f"{self.name}_sum {_number(histogram.sum)}", f"{self.name}_count {sum(histogram.counts)}"]

    def head(self) -> list[str]:
        """Return the lines HELP and TYPE, which precede the values."""
        doc = self.doc.replace("\\", r"\\").replace("\n", r"\n")
        return [f"# HELP {self.name} {doc}", f"# TYPE {self.name} {self.kind}"]

    @staticmethod
    def _labelled(name: str, pairs: Iterable[tuple[str, object]]) -> str:
        inner = ",".join(f'{label}="{_escaped(str(value))}"' for label, value in pairs)
        return f"{name}{{{inner}}}" if inner else name


def text_of(lines: Iterable[str]) -> bytes:
    """Return lines as the body of a scrape, or as a part of it."""
    return "".join(f"{line}\n" for line in lines).encode()


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
    return repr(value)
