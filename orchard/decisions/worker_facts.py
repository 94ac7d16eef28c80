"""Facts about hosts in the workers' heartbeats: disk, versions, cached images, and the pull ahead of VMs.

All of it is in memory only, so that heartbeats of any size cost the disk nothing, and begins empty at a start of the
controller. A worker sends its versions and images when they have changed; a heartbeat without them leaves them as they
are. They are kept over a new session of a worker that reports images, and forgotten when another one takes its name.

Images are kept as the JSON that answers show, and by name as sets of workers: a thousand workers with the same two
hundred images take some 30 MiB. This file performs no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from orchard.resources.cluster import IMAGE_INVENTORY, ImagePull, WorkerDisk
from orchard.resources.json_text import dump_resource
from orchard.schema import Worker

# The scheduler looks again when the free space in these units has changed.
_SPACE = 10**9  # bytes


@dataclass(slots=True)
class _Facts:
    """The facts of one worker. `names` are those under which VMs may ask for its images; the bytes are JSON members."""

    disk: WorkerDisk | None = None
    pulling: ImagePull | None = None
    versions: bytes = b""
    images: bytes = b""
    names: frozenset[str] = frozenset()

    def members(self, *, images: bool) -> bytes:
        disk = b"" if self.disk is None else b'"disk":%b' % dump_resource(self.disk)
        pulling = b"" if self.pulling is None else b'"pulling":%b' % dump_resource(self.pulling)
        return b",".join(filter(None, (disk, self.versions, pulling, self.images if images else b"")))


class WorkerFacts:
    """The facts of all workers."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[str], object]] = []
        self._facts: dict[str, _Facts] = {}
        # Name of an image -> that string, which all workers share, and the workers that have the image.
        self._holders: dict[str, tuple[str, set[str]]] = {}

    def on_change(self, tell: Callable[[str], object]) -> None:
        """Register `tell`, which is called with the name of a worker that may suit other VMs than before."""
        self._listeners.append(tell)

    def record_registration(self, worker: Worker) -> None:
        """Record that a worker's session begins."""
        if IMAGE_INVENTORY not in worker.capabilities:
            self.forget(worker.name)

    def record_heartbeat(self, worker: Worker) -> None:
        """Record what a heartbeat carries."""
        facts = self._facts.setdefault(worker.name, _Facts())
        changed = _units(facts.disk) != _units(worker.disk)
        facts.disk, facts.pulling = worker.disk, worker.pulling
        if worker.versions is not None:
            facts.versions = b'"versions":%b' % dump_resource(worker.versions)
        if worker.images is not None:
            facts.images = b'"images":[%b]' % b",".join(map(dump_resource, worker.images))
            names = frozenset(name for image in worker.images for name in image.names())
            changed = changed or names != facts.names
            self._hold(worker.name, facts, names)
        for tell in self._listeners if changed else ():
            tell(worker.name)

    def forget(self, worker: str) -> None:
        """Forget a worker."""
        facts = self._facts.pop(worker, None)
        if facts is not None:
            self._hold(worker, facts, frozenset())

    def free_bytes(self, worker: str) -> int | None:
        """Return the free space of the disk with a worker's VMs; None if the worker reports none."""
        facts = self._facts.get(worker)
        return None if facts is None or facts.disk is None else facts.disk.free_bytes

    def holders(self, image: str) -> Collection[str]:
        """Return the workers whose hosts had an image in their caches when they listed it last."""
        held = self._holders.get(image)
        return held[1] if held is not None else ()

    def images(self, worker: str) -> bytes:
        """Return a worker's images as a member of a JSON object; nothing if it has reported none."""
        facts = self._facts.get(worker)
        return b"" if facts is None else facts.images

    def members(self, worker: str, *, images: bool = True) -> bytes:
        """Return a worker's facts as members of a JSON object, without braces."""
        facts = self._facts.get(worker)
        return b"" if facts is None else facts.members(images=images)

    def _hold(self, worker: str, facts: _Facts, names: frozenset[str]) -> None:
        for name in facts.names - names:
            _, workers = self._holders[name]
            workers.discard(worker)
            if not workers:
                del self._holders[name]
        for name in names - facts.names:
            self._holders.setdefault(name, (name, set()))[1].add(worker)
        facts.names = frozenset(self._holders[name][0] for name in names)


def _units(disk: WorkerDisk | None) -> int | None:
    return None if disk is None else disk.free_bytes // _SPACE
