"""A worker's heartbeats: `last_seen`, the leases that they renew, and the health and facts of the host that they carry.

Each heartbeat that the controller answers renews the leases of VMs that the controller would start elsewhere after this
worker goes offline. A lease is counted from the sending of the heartbeat and is shorter than the controller's offline
timeout, which begins at the receipt. So such a VM has ended here before it is started elsewhere, whatever fails in
between. Only VMs that the controller wants here have their leases renewed.

The driver enforces the leases.

The facts of the host are collected by tasks of their own (`HostReport.run`), since no heartbeat may wait for a program.
Images are sent when they have changed, and again in each session, at a time that differs from worker to worker: a
restarted controller would otherwise get the images of a thousand workers at once.
"""

from __future__ import annotations

import datetime
import logging
import math
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from orchard import __version__
from orchard.base.nursery import Wakeup
from orchard.client import Client
from orchard.resources.cluster import (
    IMAGE_INVENTORY,
    CachedImage,
    Health,
    HealthProblem,
    Versions,
    WorkerDisk,
    bounded,
    bounded_versions,
)
from orchard.resources.json_text import encode
from orchard.schema import Worker
from orchard.vm.driver import Driver, DriverError, Trouble
from orchard.vm.host import os_version
from orchard.vm.images import LIST_SECONDS, ImageCache

# The longest time between two heartbeats. It is shorter if the controller's offline timeout is shorter than usual.
_HEARTBEAT_SECONDS = 15.0
# The least pause before a heartbeat with something new to report.
_LEAST_PAUSE = 1.0  # seconds
# The controller's offline timeout if it does not tell its own, in seconds.
_DEFAULT_OFFLINE_TIMEOUT = 180.0
# So many heartbeats in a row may be lost before leased VMs are shut down.
_HEARTBEATS_PER_LEASE = 8
# Shares of the offline timeout after which leased VMs are told to shut down, and killed.
_SOFT_SHARE, _HARD_SHARE = 0.75, 0.95
# Interval of checking the disk and the version of the hypervisor command.
_HOST_SECONDS = 15.0
# The images are sent again within this time after the beginning of a session.
_SPREAD_SECONDS = 60.0
# Operations that may not be tried again, so their failures are forgotten after a while.
_PASSING: frozenset[Trouble] = frozenset({"pull", "clone", "start", "supervisor", "hostDirs"})
_PASSING_SECONDS = 600.0

_logger = logging.getLogger("orchard.worker")


class LastSeenClock:
    """The times that a worker sends as `last_seen`.

    The controller takes only a later `last_seen` for a heartbeat. So each time is later than all times before it and
    than all that the controller is known to have, even when the host's clock is set back.
    """

    _STEP = datetime.timedelta(microseconds=1)
    _END = datetime.datetime.max.replace(tzinfo=datetime.UTC)

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns seconds since 1970."""
        self._clock = clock
        self._last = datetime.datetime.min.replace(tzinfo=datetime.UTC)

    def observe(self, last_seen: datetime.datetime | None) -> None:
        """Note the `last_seen` that the controller has stored, which any client may have written."""
        self._last = max(self._last, last_seen or self._last)

    def now(self) -> datetime.datetime:
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        # A datetime cannot be later than the end of the calendar.
        self._last = max(now, min(self._last, self._END - self._STEP) + self._STEP)
        return self._last


class Lease:
    """How long leased VMs may run on this host without contact with the controller.

    A VM is leased if the controller would start it elsewhere after this worker goes offline. The driver enforces the
    leases, even when the worker is stopped or dead.

    The lease of a VM that the controller has given up is not renewed: the controller counts on the end of the lease as
    it was when it gave the VM up.
    """

    def __init__(self, driver: Driver, clock: Callable[[], float]) -> None:
        """`clock` returns seconds on the driver's clock for leases (`supervisor.clock`)."""
        self.now = clock
        # The controller's offline timeout, in seconds.
        self._offline_timeout = _DEFAULT_OFFLINE_TIMEOUT
        self._driver = driver
        # When the last heartbeat was sent that the controller answered.
        self._answered = -math.inf
        # Local names of the VMs that the controller wants here. None: not known since the registration.
        self._wanted: Collection[str] | None = None

    @property
    def heartbeat_seconds(self) -> float:
        """The interval of heartbeats with which leases survive the loss of some of them."""
        return min(_HEARTBEAT_SECONDS, _SOFT_SHARE * self._offline_timeout / _HEARTBEATS_PER_LEASE)

    def begin_session(self, offline_timeout: float, sent: float) -> None:
        """Note the controller's offline timeout (in seconds; 0: it did not tell) and when the registration was sent.

        Until `set_wanted` is called, no lease is renewed.
        """
        self._offline_timeout = offline_timeout or _DEFAULT_OFFLINE_TIMEOUT
        self._wanted = None
        self.renew(sent)

    def set_wanted(self, names: Collection[str]) -> None:
        """Renew the leases of these VMs only, now if it was unknown before which ones are wanted."""
        is_news = self._wanted is None
        self._wanted = names
        if is_news:
            self.renew()

    def renew(self, sent: float = -math.inf) -> None:
        """Renew leases by a heartbeat that was sent at the time `sent` and is now answered, or by an earlier one."""
        self._answered = max(sent, self._answered)
        if self._wanted is None:
            return
        soft, hard = (self._answered + share * self._offline_timeout for share in (_SOFT_SHARE, _HARD_SHARE))
        try:
            self._driver.lease(soft, hard, self._wanted)
        except DriverError as error:
            _logger.error("cannot renew the lease of VMs", extra={"reason": str(error)})


class HealthLog:
    """The failures of this worker, as its heartbeats report them to the controller.

    `changed` is called when there is something new to report. A problem ends when the failed operation succeeds. Some
    end by themselves after a while, because the same operation may not be tried again.
    """

    def __init__(self, clock: Callable[[], float], changed: Callable[[], None]) -> None:
        """`clock` returns seconds since 1970."""
        self._clock = clock
        self._changed = changed
        # (kind, VM or "") -> (since when, the last time, what)
        self._problems: dict[tuple[Trouble, str], tuple[float, float, str]] = {}

    def note(self, kind: Trouble, vm: str = "", message: str = "") -> None:
        """Note that something failed with this message, or succeeded (""). `vm` is the local name of a VM, or ""."""
        before, now = self._problems.get((kind, vm)), self._clock()
        if message:
            self._problems[kind, vm] = (now if before is None else before[0], now, message)
        else:
            self._problems.pop((kind, vm), None)
        if (before is None) is bool(message):
            self._changed()

    def current(self) -> Health:
        """Return the health to report. The oldest problems come first."""
        now = self._clock()
        for key, (_, last, _) in list(self._problems.items()):
            if not key[1] and key[0] in _PASSING and now >= last + _PASSING_SECONDS:
                del self._problems[key]
        problems = (
            HealthProblem(kind, datetime.datetime.fromtimestamp(since, datetime.UTC), f"{vm}: {text}" if vm else text)
            for (kind, vm), (since, _, text) in self._problems.items()
        )
        return bounded(Health(problems=tuple(problems)))


class HostReport:
    """The facts of the host as heartbeats carry them. `images` is the host's cache."""

    def __init__(self, worker: str, driver: Driver, images: ImageCache) -> None:
        self._driver = driver
        self._images = images
        self._spread = _SPREAD_SECONDS * zlib.crc32(worker.encode()) / 2**32
        self._disk: WorkerDisk | None = None
        self._versions = bounded_versions(Versions(__version__, "", os_version()))
        # The versions that the controller has acknowledged in this session.
        self._sent_versions: Versions | None = None
        # The images that the controller has acknowledged, when they were sent, and when it may have forgotten them.
        self._sent: tuple[CachedImage, ...] | None = None
        self._sent_at = -math.inf
        self._send_again_at = math.inf

    async def run(self) -> None:
        """Collect the facts until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._images.run)
            while True:
                with suppress(DriverError):
                    self._disk = await self._driver.disk()
                    self._versions = bounded_versions(replace(self._versions, tart=await self._driver.version()))
                await trio.sleep(_HOST_SECONDS)

    def begin_session(self) -> None:
        """Send versions and images again, since it is unknown whether the controller was restarted."""
        self._sent_versions = None
        self._send_again_at = trio.current_time() + self._spread

    def add_to(self, heartbeat: Worker) -> Worker:
        """Return a heartbeat with the facts of the host, and with the images if they are due."""
        images = self._images.images
        return replace(
            heartbeat,
            disk=self._disk,
            versions=self._versions if self._versions != self._sent_versions else None,
            pulling=self._images.pull,
            images=images if images is not None and self._is_due(images) else None,
        )

    def _is_due(self, images: tuple[CachedImage, ...]) -> bool:
        now = trio.current_time()
        if images == self._sent or now < self._sent_at + LIST_SECONDS:
            # A new time of an image's last use alone is not reported.
            return now >= self._send_again_at or _contents(images) != _contents(self._sent)
        return True

    def note_sent(self, heartbeat: Worker) -> None:
        """Note that the controller has acknowledged a heartbeat."""
        self._sent_versions = heartbeat.versions or self._sent_versions
        if heartbeat.images is not None:
            self._sent, self._sent_at, self._send_again_at = heartbeat.images, trio.current_time(), math.inf


def _contents(images: Sequence[CachedImage] | None) -> list[CachedImage] | None:
    return None if images is None else [replace(image, last_used=None) for image in images]


class Heartbeats:
    """Sends the heartbeats of one worker. `health` and `images` are what they carry.

    Call `settle` once the session is whole: only then the controller assigns VMs to this worker.
    """

    def __init__(self, worker: str, client: Client, driver: Driver, lease: Lease, clock: Callable[[], float]) -> None:
        """`clock` returns seconds since 1970."""
        self.last_seen = LastSeenClock(clock)
        self._due = Wakeup()
        self.health = HealthLog(clock, self._due.set)
        self.images = ImageCache(driver, self.health.note, self._due.set)
        self.host = HostReport(worker, driver, self.images)
        self._worker = worker
        self._client = client
        self._lease = lease
        self._is_settled = False
        # Whether the controller takes the facts of the host.
        self._takes_facts = False

    def begin_session(self, stored: datetime.datetime | None, capabilities: Collection[str]) -> None:
        """Begin again with a session that is not whole yet.

        `stored` is the `last_seen` that the controller has, and `capabilities` are the controller's.
        """
        self._is_settled = False
        self._takes_facts = IMAGE_INVENTORY in capabilities
        self.host.begin_session()
        self.last_seen.observe(stored)

    def settle(self) -> None:
        self._is_settled = True
        self._due.set()

    async def run(self) -> None:
        """Send heartbeats, and one at once when there is something new to report. Raises ClientError."""
        while True:
            with trio.move_on_after(self._lease.heartbeat_seconds):
                await self._due.wait()
            await self._send()
            # A problem that comes and goes must not flood the controller.
            await trio.sleep(min(_LEAST_PAUSE, self._lease.heartbeat_seconds))

    async def _send(self) -> None:
        # The heartbeat repeats what the controller has stored. If the network delivers it twice, the second one has no
        # later `last_seen` and counts as an update, which must not undo a pause of the scheduling.
        stored = await self._client.workers.get(self._worker, images=not self._takes_facts)
        self.last_seen.observe(stored.last_seen)
        last_seen = self.last_seen.now()
        heartbeat = replace(stored, last_seen=last_seen, settled=self._is_settled, health=self.health.current())
        # A controller of an earlier version would warn of each of these fields.
        heartbeat = self.host.add_to(heartbeat) if self._takes_facts else heartbeat
        sent = self._lease.now()
        answer = await self._client.workers.put(self._worker, encode(heartbeat))
        self.host.note_sent(heartbeat)
        # Otherwise another client has written a later time, and this request did not count as a heartbeat.
        if answer.last_seen == last_seen:
            self._lease.renew(sent)
