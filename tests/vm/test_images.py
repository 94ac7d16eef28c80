"""The cache of images: pulls ahead of VMs, which give way to the VMs that need a transfer. On a virtual clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from orchard.resources.cluster import CachedImage, ImagePull
from orchard.vm.driver import DriverError, Progress
from orchard.vm.images import ImageCache
from orchard.vm.synthetic import SyntheticDriver

Clock = trio.testing.MockClock
SLOW, OTHER, CACHED = "host/pull-100s:1", "host/pull-50s:2", "host/cached:1"
# In the cache, and a pull of it takes time nevertheless.
OLD = "host/pull-30s/old:1"


class Recorder(SyntheticDriver):
    """A driver that records when pulls begin and end, and how many run at once."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, images=[CACHED, OLD])
        self.began: list[tuple[str, float]] = []
        self.running: list[str] = []
        self.lists = 0
        self.can_list = True

    async def pull(self, image: str, on_progress: Progress) -> None:
        self.began.append((image, trio.current_time()))
        self.running.append(image)
        try:
            await super().pull(image, on_progress)
        finally:
            self.running.remove(image)

    async def list_images(self) -> list[CachedImage]:
        self.lists += 1
        if not self.can_list:
            raise DriverError("cannot list")
        return await super().list_images()


class Cache:
    """A running cache, and what it has noted and told."""

    def __init__(self, driver: Recorder) -> None:
        self.driver = driver
        self.troubles: dict[str, str] = {}
        self.changes = self.created = 0
        self.images = ImageCache(driver, self._note, self._change)

    def _note(self, kind: str, image: str, message: str) -> None:
        assert kind == "prepull"
        self.troubles[image] = message

    def _change(self) -> None:
        self.changes += 1

    async def create(self, image: str, told: Callable[[int], None] = lambda _: None, *, always: bool = False) -> None:
        """Do as the task of a VM."""
        name = f"vm-{self.created}"
        self.created += 1
        async with self.images.transfer(image, told, always=always) as progress:
            if always:
                await self.driver.pull(image, progress)
            await self.driver.clone(image, name, progress)


@pytest.fixture
async def cache(tmp_path: Path, nursery: trio.Nursery) -> Cache:
    cache = Cache(Recorder(tmp_path / "home"))
    nursery.start_soon(cache.images.run)
    await trio.testing.wait_all_tasks_blocked()
    return cache


@contextmanager
def taking(seconds: float) -> Iterator[None]:
    began = trio.current_time()
    yield
    assert trio.current_time() - began == pytest.approx(seconds)


async def test_missing_images_are_pulled_one_at_a_time_with_progress(cache: Cache, autojump_clock: Clock) -> None:
    images = cache.images
    images.want([CACHED, SLOW, OTHER, SLOW])
    await trio.sleep(45)
    assert images.pull == ImagePull(SLOW, 40)
    assert cache.changes == 1
    await trio.sleep(56)
    assert images.pull == ImagePull(OTHER)
    await trio.sleep(50)
    assert [image for image, _ in cache.driver.began] == [SLOW, OTHER]
    assert {image.name for image in images.images or ()} == {CACHED, OLD, SLOW, OTHER}
    assert images.has(SLOW)
    await trio.sleep(24 * 3600)
    assert len(cache.driver.began) == 2


@pytest.mark.parametrize(("image", "always", "seconds"), [(OTHER, False, 50), (OLD, True, 30)])
async def test_vm_that_needs_a_transfer_does_not_wait_for_a_pull_ahead(
    cache: Cache, autojump_clock: Clock, image: str, always: bool, seconds: float
) -> None:
    cache.images.want([SLOW])
    await trio.sleep(45)
    with taking(seconds):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(cache.create, image, always=always))
            await trio.testing.wait_all_tasks_blocked()
            assert cache.driver.running == [image]
            await trio.sleep(25)
            assert cache.driver.running == [image], "nothing is pulled ahead while a VM is being pulled"
    await trio.sleep(101)
    assert [image for image, _ in cache.driver.began].count(SLOW) == 2
    assert cache.images.has(SLOW)


async def test_vm_from_a_cached_image_does_not_interrupt_a_pull_ahead(cache: Cache, autojump_clock: Clock) -> None:
    cache.images.want([SLOW])
    await trio.sleep(45)
    with taking(0):
        await cache.create(CACHED)
    await trio.sleep(56)
    assert cache.images.has(SLOW)
    assert [image for image, _ in cache.driver.began] == [SLOW]


async def test_vm_whose_cached_image_was_pruned_interrupts_the_pull_ahead(cache: Cache, autojump_clock: Clock) -> None:
    cache.driver._images.pop(CACHED)
    cache.driver._pull_seconds = 10.0
    cache.images.want([SLOW])
    await trio.sleep(45)
    with taking(10):
        await cache.create(CACHED)
    assert cache.driver.running == []


async def test_vm_waits_for_the_pull_ahead_of_its_own_image_and_shows_its_progress(
    cache: Cache, autojump_clock: Clock
) -> None:
    told: list[int] = []
    cache.images.want([SLOW])
    await trio.sleep(45)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.create, SLOW, told.append)
        await trio.testing.wait_all_tasks_blocked()
        # Another VM does not take the first one's pull away.
        with taking(50):
            await cache.create(OTHER)
        assert trio.current_time() == 95
    assert trio.current_time() == 100
    assert told == [50, 60, 70, 80, 90, 100]
    assert [image for image, _ in cache.driver.began].count(SLOW) == 1


async def test_vm_pulls_its_image_itself_when_the_pull_ahead_fails(cache: Cache, autojump_clock: Clock) -> None:
    failing = "host/pull-100s/pull-fails:1"
    cache.images.want([failing])
    await trio.sleep(45)
    with pytest.raises(DriverError), taking(155):
        await cache.create(failing)


async def test_failed_pull_is_noted_and_tried_again_after_growing_pauses(cache: Cache, autojump_clock: Clock) -> None:
    failing = "host/pull-fails:1"
    cache.images.want([failing, OTHER])
    await trio.sleep(60)
    assert failing in cache.troubles[failing]
    assert cache.images.has(OTHER), "a failure holds no other image up"
    await trio.sleep(24 * 3600)
    times = [at for image, at in cache.driver.began if image == failing]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(300)
    assert pauses[-1] == pytest.approx(6 * 3600)
    cache.images.want([])
    assert cache.troubles[failing] == ""
    assert OTHER not in cache.troubles or cache.troubles[OTHER] == ""


async def test_images_that_do_not_fit_on_the_disk_together_are_not_pulled_for_ever(
    cache: Cache, autojump_clock: Clock
) -> None:
    cache.driver.disk_bytes = 3 * 10**9
    images = [f"host/size-2gb/pull-60s:{number}" for number in range(3)]
    cache.images.want(images)
    await trio.sleep(24 * 3600)
    for image in images:
        assert len([name for name, _ in cache.driver.began if name == image]) < 12


async def test_image_that_is_no_longer_wanted_is_not_pulled_on(cache: Cache, autojump_clock: Clock) -> None:
    cache.images.want([SLOW])
    await trio.sleep(45)
    cache.images.want([OTHER])
    await trio.sleep(1)
    assert cache.driver.running == [OTHER]


async def test_nothing_is_pulled_before_the_images_are_listed(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    cache = Cache(Recorder(tmp_path / "home"))
    cache.driver.can_list = False
    nursery.start_soon(cache.images.run)
    cache.images.want([CACHED])
    await trio.sleep(500)
    assert (cache.images.images, cache.driver.began) == (None, [])
    cache.driver.can_list = True
    await trio.sleep(500)
    assert cache.images.has(CACHED)
    assert cache.driver.began == []


async def test_images_are_listed_after_transfers_and_now_and_then(cache: Cache, autojump_clock: Clock) -> None:
    assert cache.driver.lists == 1
    await cache.create(CACHED)
    await trio.sleep(1)
    assert cache.driver.lists == 1
    await cache.create(OTHER)
    await trio.sleep(1)
    assert cache.driver.lists == 2
    assert cache.images.has(OTHER)
    await trio.sleep(601)
    assert cache.driver.lists == 3
