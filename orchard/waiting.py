"""Why a VM waits for a worker: for now, or for as long as no other worker registers.

A `Survey` examines all workers for one demand and counts each under the first thing that excludes it. If none of them
could take the VM even when it is online and empty, the reason names what none has. This file performs no I/O.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from orchard.planning import Demand, Load, has_label
from orchard.schema import Worker

# Of a waiting reason. Each worker may fail at something of its own.
_MAX_PARTS = 12


@dataclass(frozen=True, slots=True)
class WaitingReason:
    """Why a VM waits. `is_never`: no registered worker could ever take it."""

    text: str
    is_never: bool = False

    def __str__(self) -> str:
        return f"waiting: {self.text}"

    def after(self, count: int) -> WaitingReason:
        """Return the reason of a VM that `count` VMs of higher priority precede."""
        if not count or self.is_never:
            return self
        verb = "VM of higher priority waits" if count == 1 else "VMs of higher priority wait"
        return WaitingReason(f"{self.text}; {count} {verb}")


class Exclusion(IntEnum):
    """What excludes a worker whatever it offers, in the order in which a reason names them."""

    UNAVAILABLE = 0
    DRAINING = 1
    PAUSED = 2
    FAILING = 3
    DISK = 4


class _Lack(IntEnum):
    """What a worker would lack even when it is online and empty, in the order in which it is looked at."""

    ARCH = 10
    RUNTIME = 11
    LABEL = 12
    CAPABILITY = 13
    SIZE = 14


class Survey:
    """All workers as one demand sees them."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._total = 0
        # (position in the sentence, reason) -> number of workers
        self._reasons: Counter[tuple[int, str]] = Counter()
        # (resource, wanted) -> number of workers, and the largest free amount on one of them
        self._short: dict[tuple[str, int], tuple[int, int]] = {}
        # Workers that would take the VM when they are online and empty.
        self._possible = 0
        # Of the others: what lacks on how many, and the same for each text.
        self._lacks: Counter[_Lack] = Counter()
        self._lacking: Counter[str] = Counter()
        # Resource -> the most that a worker offers which lacks nothing but size.
        self._offered: dict[str, int] = {}

    def add(self, worker: Worker, load: Load, excluded: tuple[int, str] | None) -> None:
        """Examine one more worker. `excluded` is what excludes it whatever it offers, and its text."""
        self._total += 1
        lack = self._find_lack(worker)
        if excluded is not None:
            self._reasons[excluded] += 1
        elif lack is not None and lack[0] is not _Lack.SIZE:
            self._reasons[lack] += 1
        else:
            for resource, wanted in self._demand.resources:
                free = max(0, worker.resources.get(resource, 0) - load.used.get(resource, 0))
                if free < wanted:
                    count, most = self._short.get((resource, wanted), (0, 0))
                    self._short[resource, wanted] = count + 1, max(most, free)
                    break

    def _find_lack(self, worker: Worker) -> tuple[_Lack, str] | None:
        """Return the first thing that a worker would lack when it is online and empty, and the text for it."""
        demand = self._demand
        lack: tuple[_Lack, str] | None = None
        if worker.arch != demand.arch:
            lack = _Lack.ARCH, f"of another arch ({demand.arch} wanted)"
        elif worker.runtime != demand.runtime:
            lack = _Lack.RUNTIME, f"of another runtime ({demand.runtime} wanted)"
        elif missing := [f"label {key}={value}" for key, value in demand.labels if not has_label(worker, key, value)]:
            self._lacking.update(missing)
            lack = _Lack.LABEL, f"without {missing[0]}"
        elif missing := [one for one in demand.capabilities if one not in worker.capabilities]:
            self._lacking.update(missing)
            lack = _Lack.CAPABILITY, f"without support for {missing[0]}"
        else:
            is_too_small = False
            for resource, wanted in demand.resources:
                offered = worker.resources.get(resource, 0)
                is_too_small = is_too_small or offered < wanted
                if offered > self._offered.get(resource, 0):
                    self._offered[resource] = offered
            if not is_too_small:
                self._possible += 1
                return None
            lack = _Lack.SIZE, ""
        self._lacks[lack[0]] += 1
        return lack

    def reason(self) -> WaitingReason:
        """Return why no worker can take a VM, if none of those that were added can."""
        if not self._total:
            return WaitingReason("no worker has registered yet")
        if not self._possible:
            return WaitingReason(self._why_never(), is_never=True)
        parts = [f"{count} {reason}" for (_, reason), count in sorted(self._reasons.items())]
        for (resource, wanted), (count, free) in sorted(self._short.items()):
            verb, most = ("lacks", "") if count == 1 else ("lack", " at most")
            parts.append(f"{count} {verb} {resource} ({wanted} wanted, {free} free{most})")
        if not parts:
            return WaitingReason("other VMs come first")
        if len(parts) > _MAX_PARTS:
            parts[_MAX_PARTS:] = [f"and {len(parts) - _MAX_PARTS} other reasons"]
        return WaitingReason(f"{self._total} worker{'s' if self._total > 1 else ''}: {', '.join(parts)}")

    def _why_never(self) -> str:
        """Return what none of the workers has that lack the least."""
        demand, last = self._demand, max(self._lacks)
        wanted = {
            _Lack.ARCH: [f"arch {demand.arch}"],
            _Lack.RUNTIME: [f"runtime {demand.runtime}"],
            _Lack.LABEL: [f"label {key}={value}" for key, value in demand.labels],
            _Lack.CAPABILITY: list(demand.capabilities),
        }
        having = [text for lack, texts in wanted.items() if lack < last and self._lacks[lack] for text in texts]
        who = f"no worker with {_enumerate(having)}" if having else "no worker"
        if last is _Lack.SIZE:
            return f"{who} is large enough ({self._describe_size()})"
        # Where each text lacks on some worker only, no worker has all of them.
        nowhere = [text for text in wanted[last] if self._lacking[text] == self._lacks[last]][:1]
        verb = "supports" if last is _Lack.CAPABILITY else "has"
        return f"{who} {verb} {_enumerate(nowhere or wanted[last])}"

    def _describe_size(self) -> str:
        wanted = [(name, amount, self._offered.get(name, 0)) for name, amount in self._demand.resources if amount]
        short = [f"{amount} {name} wanted, {most} offered at most" for name, amount, most in wanted if most < amount]
        if short:
            return short[0]
        return f"{_enumerate([f'{amount} {name}' for name, amount, _ in wanted])} wanted at once"


def _enumerate(texts: list[str]) -> str:
    return " and ".join(texts)
