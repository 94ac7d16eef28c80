"""The cached images of a worker's host: their list, and pulls ahead of the VMs that will need them.

`ImageCache` lists the images now and then, and after each transfer. It pulls the images that the cluster wants on this
host (`prepull` in the cluster settings), one at a time and only while no VM of this worker is being pulled or cloned. A
VM that needs a transfer does not wait: the pull under way is cancelled, and begins again later. A VM that needs the
very image that is being pulled waits for that pull and shows its progress, since a pull of its own would begin anew.

An image that is in the cache is not pulled again, so a tag that was moved stays as it is. Nothing is deleted here. The
hypervisor prunes its cache by itself, so an image may vanish: it is pulled again after a pause that grows, because a
disk that is too small for all of them would keep the host pulling for ever.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from orchard.base.nursery import Wakeup, growing_pause
from orchard.resources.cluster import CachedImage, ImagePull, bounded_images
from orchard.schema import LOCAL_PREFIX
from orchard.vm.driver import Driver, DriverError, NoteTrouble, Progress

# Interval of listing without a transfer: other programs use the same cache.
LIST_SECONDS = 600.0  # seconds
# The first and the longest pause between two pulls of one image.
_PULL_AGAIN_SECONDS, _LAST_PULL_SECONDS = 300.0, 6 * 3600.0  # seconds

_logger = logging.getLogger("orchard.vm")


class ImageCache:
    """The cached images of one host, and the pulls ahead of VMs.

    `images` are those that were listed last, None before the first list. `pull` is the pull ahead that is under way.
    `changed` is called when a pull ahead begins or ends. `note_trouble` is called with "prepull", an image, and why it
    cannot be pulled, "" when it could.
    """

    def __init__(self, driver: Driver, note_trouble: NoteTrouble, changed: Callable[[], None]) -> None:
        self.images: tuple[CachedImage, ...] | None = None
        # The names under which VMs may ask for the images.
        self._names: frozenset[str] = frozenset()
        self.pull: ImagePull | None = None
        self._driver = driver
        self._note_trouble = note_trouble
        self._changed = changed
        self._wanted: tuple[str, ...] = ()
        # Image -> number of pulls, and when the next one may begin.
        self._pulls: dict[str, tuple[int, float]] = {}
        # VMs that are being pulled or cloned.
        self._transfers = 0
        # The progress functions of the VMs that wait for the pull under way.
        self._followers: list[Progress] = []
        self._scope = trio.CancelScope()
        self._pulled = trio.Event()
        self._list_due, self._news = Wakeup(), Wakeup()

    def want(self, images: Iterable[str]) -> None:
        """Replace the images that are to be pulled ahead, in this order."""
        wanted = tuple(dict.fromkeys(images))
        for image in set(self._wanted).difference(wanted):
            self._pulls.pop(image, None)
            self._note_trouble("prepull", image, "")
            if self.pull is not None and self.pull.image == image:
                self._give_way()
        self._wanted = wanted
        self._news.set()

    def has(self, image: str) -> bool:
        """Return whether an image was in the cache when it was listed last."""
        return image in self._names

    async def run(self) -> None:
        """List and pull images until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_listed)
            nursery.start_soon(self._keep_pulling)

    @asynccontextmanager
    async def transfer(self, image: str, on_progress: Progress, *, always: bool) -> AsyncIterator[Progress]:
        """Pull nothing ahead while the block pulls or clones an image for a VM. Yields the function for its progress.

        Waits first if that very image is being pulled. `always`: the image is pulled even if it is in the cache.
        """
        is_cached = image.startswith(LOCAL_PREFIX) or (not always and self.has(image))
        self._transfers += 1
        try:
            # Only an image has a slash in its name. Without one it may be a local VM.
            if self.pull is not None and self.pull.image == image:
                await self._follow(on_progress)
            elif "/" in image and not is_cached:
                self._give_way()

            def progress(percent: int) -> None:
                # The VM transfers after all, for example an image that was pruned since the last list.
                self._give_way()
                on_progress(percent)

            yield progress
        finally:
            self._transfers -= 1
            if not is_cached:
                self._list_due.set()
            self._news.set()

    async def _follow(self, on_progress: Progress) -> None:
        """Wait until the pull under way has ended."""
        self._followers.append(on_progress)
        try:
            await self._pulled.wait()
        finally:
            self._followers.remove(on_progress)

    def _give_way(self) -> None:
        """Cancel the pull under way, unless a VM waits for it."""
        if self.pull is not None and not self._followers:
            self._scope.cancel()

    async def _keep_listed(self) -> None:
        while True:
            try:
                self.images = bounded_images(await self._driver.list_images())
                self._names = frozenset(name for image in self.images for name in image.names())
            except DriverError as error:
                _logger.warning("cannot list the images on this host", extra={"reason": str(error)})
            self._news.set()
            with trio.move_on_after(LIST_SECONDS):
                await self._list_due.wait()

    async def _keep_pulling(self) -> None:
        while True:
            image, at = self._next_pull()
            if image and not self._transfers and trio.current_time() >= at:
                await self._pull(image)
            else:
                with trio.move_on_at(math.inf if self._transfers else at):
                    await self._news.wait()

    def _next_pull(self) -> tuple[str, float]:
        """Return the image to pull next, and when. Nothing is pulled before the images were listed once."""
        missing = [image for image in self._wanted if not self.has(image)] if self.images is not None else []
        times = {image: self._pulls.get(image, (0, -math.inf))[1] for image in missing}
        return min(times.items(), key=lambda item: max(item[1], trio.current_time()), default=("", math.inf))

    async def _pull(self, image: str) -> None:
        self.pull, self._pulled = ImagePull(image), trio.Event()
        self._changed()
        failure = ""
        try:
            with trio.CancelScope() as self._scope:
                try:
                    await self._driver.pull(image, self._show)
                except DriverError as error:
                    failure = str(error)
        finally:
            self.pull = None
            self._pulled.set()
            self._changed()
        if not self._scope.cancelled_caught:
            count = self._pulls.get(image, (0, 0.0))[0] + 1
            pause = growing_pause(count, _PULL_AGAIN_SECONDS, _LAST_PULL_SECONDS)
            self._pulls[image] = (count, trio.current_time() + pause)
            self._note_trouble("prepull", image, failure)
            self._list_due.set()

    def _show(self, percent: int) -> None:
        if self.pull is not None:
            self.pull = ImagePull(self.pull.image, percent)
        for follower in self._followers:
            follower(percent)
