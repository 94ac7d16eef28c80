"""Which new VMs of a host may begin, while VMs whose resources the scheduler has reassigned still run there.

A guest that shuts down slowly holds up the VMs that need its resources, and no others. The file performs no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import trio

Resources = Mapping[str, int]


class Slots:
    """New VMs, oldest first, each with the event that lets it begin. `offered` is what the host offers."""

    def __init__(self, offered: Resources) -> None:
        self._offered = offered
        # Local name -> what the VM needs, and its event.
        self._waiting: dict[str, tuple[Resources, trio.Event]] = {}

    def __contains__(self, name: str) -> bool:
        """Return whether a VM waits."""
        return name in self._waiting

    def why_never(self, needed: Resources) -> str:
        """Return why a VM could not begin even on an empty host, or ""."""
        offers = ((kind, amount, self._offered.get(kind, 0)) for kind, amount in needed.items())
        lacking = [f"{amount} {kind}, and it offers {offer}" for kind, amount, offer in offers if amount > offer]
        return f"its worker was restarted with less than the VM needs: {'; '.join(lacking)}" if lacking else ""

    def add(self, name: str, needed: Resources) -> trio.Event:
        """Let a VM wait. Return the event that is set when the VM may begin."""
        event = trio.Event()
        self._waiting[name] = (needed, event)
        return event

    def remove(self, name: str) -> None:
        self._waiting.pop(name, None)

    def grant(self, held: Iterable[Resources | None]) -> None:
        """Let VMs begin that fit beside what others hold; None: it is unknown how much, so none may begin.

        What a VM needs that does not fit yet is kept for it, so that VMs that need less do not keep overtaking it.
        """
        used: Counter[str] = Counter()
        for resources in held:
            if resources is None:
                return
            used.update(resources)
        for name, (needed, event) in list(self._waiting.items()):
            used.update(needed)
            if all(used[kind] <= self._offered.get(kind, 0) for kind, amount in needed.items() if amount):
                event.set()
                del self._waiting[name]
