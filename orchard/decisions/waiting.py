"""The reasons why a VM waits for a worker: for now, or until another worker registers.

A `Survey` examines all workers for one demand. If none of them could take the VM even when it is online and empty, the
reason names what none has. Else it counts each worker under the first thing that excludes it. This file performs no
I/O.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from orchard.decisions.planning import Demand, Load, has_label
from orchard.schema import Worker

# The most parts of a waiting reason. Each worker may be excluded by something else.
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


# States that exclude a worker whatever it offers, in the order in which a reason names them.
UNAVAILABLE, DRAINING, PAUSED, FAILING, LOW_DISK = range(5)
# Properties that a worker may lack even when it is online and empty, in the order of the checks. They are whole
# numbers, since the hash of an enum's member would double the time for a worker.
_ARCH, _RUNTIME, _LABEL, _CAPABILITY, _SIZE = range(10, 15)
# The words of a reason for these properties, and for workers without them.
_NOUNS = {_ARCH: "arch ", _RUNTIME: "runtime ", _LABEL: "label ", _CAPABILITY: ""}
_TEXTS: dict[int, str] = {
    _ARCH: "of another arch ({} wanted)",
    _RUNTIME: "of another runtime ({} wanted)",
    _LABEL: "without label {}",
    _CAPABILITY: "without support for {}",
}


class Survey:
    """All workers as one demand sees them, in two passes: `look_for_possible` with each, and then `add` with each.

    The second pass is for a reason that is not for ever: if `is_possible` by then.
    """

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        # Formatted once, since a search looks at thousands of workers (./run bench turns).
        self._labels = [(key, value, f"{key}={value}") for key, value in demand.labels]
        # Whether some worker would take the VM when it is online and empty.
        self.is_possible = False
        # The number of workers by the property that they lack, and by the text of the first such value.
        self._lacks: Counter[int] = Counter()
        self._lacking: Counter[str] = Counter()
        # Resource -> the most that is offered by a worker which lacks nothing but size.
        self._offered: dict[str, int] = {}
        self._total = 0
        # (position in the sentence, text) -> number of workers
        self._reasons: Counter[tuple[int, str]] = Counter()
        # Resource -> number of workers that have too little of it, the amount wanted, and the largest free amount.
        self._short: dict[str, tuple[int, int, int]] = {}

    def look_for_possible(self, worker: Worker) -> None:
        """Check what a worker would lack when it is online and empty, unless a possible worker was found before."""
        if self.is_possible:
            return
        if (found := self._find_lack(worker)) is not None:
            self._lacks[found[0]] += 1
            for text in found[1]:
                self._lacking[text] += 1
            return
        self.is_possible = True
        for resource, wanted in self._demand.resources:
            offered = worker.resources.get(resource, 0)
            self.is_possible = self.is_possible and offered >= wanted
            self._offered[resource] = max(offered, self._offered.get(resource, 0))
        self._lacks[_SIZE] += 1

    def add(self, worker: Worker, load: Load, excluded: tuple[int, str] | None) -> None:
        """Count a worker. `excluded` is what excludes it whatever it offers, and its text."""
        self._total += 1
        if excluded is not None:
            self._reasons[excluded] += 1
        elif (found := self._find_lack(worker)) is not None:
            self._reasons[found[0], found[1][0]] += 1
        else:
            for resource, wanted in self._demand.resources:
                # A worker may offer less than is used there.
                free = max(0, worker.resources.get(resource, 0) - load.used.get(resource, 0))
                if free < wanted:
                    count, _, most = self._short.get(resource, (0, 0, 0))
                    self._short[resource] = count + 1, wanted, max(most, free)
                    break

    def _find_lack(self, worker: Worker) -> tuple[int, list[str]] | None:
        """Return the first property other than size that a worker lacks, and the values that it lacks."""
        demand = self._demand
        if worker.arch != demand.arch:
            return _ARCH, [demand.arch]
        if worker.runtime != demand.runtime:
            return _RUNTIME, [demand.runtime]
        if self._labels:
            labels = [text for key, value, text in self._labels if not has_label(worker, key, value)]
            if labels:
                return _LABEL, labels
        if demand.capabilities:
            capabilities = [one for one in demand.capabilities if one not in worker.capabilities]
            if capabilities:
                return _CAPABILITY, capabilities
        return None

    def reason(self) -> WaitingReason:
        """Return why no worker can take a VM, if none of those that were added can."""
        if not self.is_possible:
            is_never = bool(self._lacks)
            return WaitingReason(self._why_never() if is_never else "no worker has registered yet", is_never=is_never)
        parts = [f"{count} {_TEXTS.get(at, '{}').format(what)}" for (at, what), count in sorted(self._reasons.items())]
        for resource, (count, wanted, free) in sorted(self._short.items()):
            verb, most = ("lacks", "") if count == 1 else ("lack", " at most")
            parts.append(f"{count} {verb} {resource} ({wanted} wanted, {free} free{most})")
        if not parts:
            return WaitingReason("other VMs come first")
        if len(parts) > _MAX_PARTS:
            parts[_MAX_PARTS:] = [f"and {len(parts) - _MAX_PARTS} other reasons"]
        return WaitingReason(f"{self._total} worker{'s' if self._total > 1 else ''}: {', '.join(parts)}")

    def _why_never(self) -> str:
        """Return the property that none of the workers has which lack the least."""
        demand, last = self._demand, max(self._lacks)
        wanted = {
            _ARCH: [demand.arch],
            _RUNTIME: [demand.runtime],
            _LABEL: [text for _, _, text in self._labels],
            _CAPABILITY: list(demand.capabilities),
        }
        having = [
            f"{_NOUNS[lack]}{text}"
            for lack, texts in wanted.items()
            if lack < last and self._lacks[lack]
            for text in texts
        ]
        who = f"no worker with {' and '.join(having)}" if having else "no worker"
        if last == _SIZE:
            return f"{who} is large enough ({self._describe_size()})"
        # Where each text lacks on some worker only, no worker has all of them.
        nowhere = [text for text in wanted[last] if self._lacking[text] == self._lacks[last]][:1]
        verb = "supports" if last == _CAPABILITY else "has"
        return f"{who} {verb} {' and '.join(f'{_NOUNS[last]}{text}' for text in nowhere or wanted[last])}"

    def _describe_size(self) -> str:
        wanted = [(name, amount, self._offered.get(name, 0)) for name, amount in self._demand.resources if amount]
        short = [f"{amount} {name} wanted, {most} offered at most" for name, amount, most in wanted if most < amount]
        if short:
            return short[0]
        return f"{' and '.join(f'{amount} {name}' for name, amount, _ in wanted)} wanted at once"
