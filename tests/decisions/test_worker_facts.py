"""What workers report of their hosts: shown to clients, kept in memory only, bounded, and used by the scheduler."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.inprocess import InProcessCluster
from harness.processes import eventually
from harness.served import BEGAN, Served, served

from orchard import __version__, worker
from orchard.base.files import STATE_FILE
from orchard.decisions.worker_facts import WorkerFacts
from orchard.resources.cluster import (
    IMAGE_INVENTORY,
    MAX_IMAGE_NAME,
    MAX_IMAGES,
    CachedImage,
    HealthProblem,
    Versions,
    WorkerDisk,
)
from orchard.schema import WORKER_NAME_LABEL, Worker
from orchard.vm.host import os_version
from orchard.vm.images import LIST_SECONDS, ImageCache
from orchard.vm.synthetic import SyntheticDriver
from orchard.work import heartbeat
from orchard.work.heartbeat import HostReport

GB = 10**9
DIGEST = f"sha256:{'1' * 64}"
IMAGE = {"name": "ghcr.io/org/macos:latest", "digest": DIGEST, "sizeBytes": 40 * GB, "lastUsed": "2026-01-30T12:00:00Z"}
FACTS = {
    "disk": {"totalBytes": 500 * GB, "freeBytes": 100 * GB},
    "versions": {"orchard": "1.0", "tart": "2.40.1", "os": "macOS 26.1"},
    "pulling": {"image": "ghcr.io/org/next:1", "percent": 40},
}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as api:
        yield api


class Reporter:
    """A worker that registers and sends heartbeats."""

    def __init__(self, api: Served, name: str = "w") -> None:
        self._api = api
        self.name = name
        self._second = 0

    async def register(self, *capabilities: str, **fields: object) -> Any:
        body = {"name": self.name, "machine_id": "m", "capabilities": list(capabilities), **fields}
        return await self._api.ok("POST", "/workers", body)

    async def beat(self, **fields: object) -> Any:
        self._second += 1
        seen = (BEGAN + datetime.timedelta(seconds=self._second)).isoformat()
        return await self._api.ok("PUT", f"/workers/{self.name}", {"name": self.name, "last_seen": seen, **fields})

    async def shown(self) -> Any:
        one = await self._api.ok("GET", f"/workers/{self.name}")
        assert one in await self._api.ok("GET", "/workers")
        return one


async def test_facts_of_a_heartbeat_are_shown_and_absent_versions_and_images_stay(api: Served) -> None:
    worker = Reporter(api)
    await worker.register(IMAGE_INVENTORY)
    assert not {*FACTS, "images"} & (await worker.shown()).keys()
    answer = await worker.beat(**FACTS, images=[IMAGE])
    assert answer.items() >= FACTS.items()
    # A heartbeat's answer goes to a worker, which knows its images.
    assert "images" not in answer
    assert (await worker.shown()).items() >= {**FACTS, "images": [IMAGE]}.items()
    assert "images" not in await api.ok("GET", "/workers/w?images=false")
    assert "images" not in (await api.ok("GET", "/workers?images=false"))[0]
    async with trio.open_nursery() as nursery:
        for query, shows in (("", True), ("&images=false", False)):
            lines = await api.lines(f"/watch?kinds=workers{query}", nursery)
            revision = (await api.call("GET", "/workers")).headers["x-revision"]
            assert ("images" in (await lines.receive())["object"]) == shows
            await lines.receive()
            # A change shows them as the list does, also to a watch that is resumed.
            await api.ok("PUT", "/workers/w", {"name": "w", "scheduling_paused": shows})
            changed = await lines.receive()
            assert (changed["type"], changed["object"].get("images")) == ("MODIFIED", [IMAGE] if shows else None)
            resumed = await api.lines(f"/watch?kinds=workers&since={revision}{query}", nursery)
            assert (await resumed.receive())["object"] == changed["object"]
        nursery.cancel_scope.cancel()
    assert (await api.call("GET", "/workers?images=no")).status == 400
    await worker.beat(disk=FACTS["disk"])
    shown = await worker.shown()
    assert {name: shown.get(name) for name in (*FACTS, "images")} == {**FACTS, "images": [IMAGE], "pulling": None}
    await worker.beat(images=[])
    assert (await worker.shown())["images"] == []


async def test_heartbeats_with_images_and_disk_write_nothing(api: Served, tmp_path: Path) -> None:
    worker = Reporter(api)
    await worker.register(IMAGE_INVENTORY, **FACTS, images=[IMAGE])
    await api.store.wait_durable()
    revision, content = api.state.revision, (tmp_path / STATE_FILE).read_bytes()
    assert DIGEST.encode() not in content
    for free in range(5):
        await worker.beat(**{**FACTS, "disk": {"totalBytes": 500 * GB, "freeBytes": free}}, images=[IMAGE] * free)
    await api.store.wait_durable()
    assert (api.state.revision, (tmp_path / STATE_FILE).read_bytes()) == (revision, content)
    # A change of the worker is written, without its facts.
    await api.ok("PUT", f"/workers/{worker.name}", {**await worker.shown(), "scheduling_paused": True})
    await api.store.wait_durable()
    written = (tmp_path / STATE_FILE).read_bytes()
    assert len(written) > len(content)
    assert DIGEST.encode() not in written
    assert b"2.40.1" not in written


async def test_texts_and_number_of_images_are_bounded(api: Served) -> None:
    worker = Reporter(api)
    await worker.register(IMAGE_INVENTORY)
    used = [(BEGAN - datetime.timedelta(days=number)).isoformat() for number in range(MAX_IMAGES + 10)]
    images = [{"name": f"host/image:{number:03}", "lastUsed": used[number]} for number in range(MAX_IMAGES + 10)]
    odd = [{"name": name} for name in ("", "x" * (MAX_IMAGE_NAME + 1), "host/a\n", "host/é")]
    odd.append({"name": "host/long-digest", "digest": "x" * 1000})
    versions = {"orchard": "1\n" * 1000, "tart": "\x1b[0m", "os": "x" * 1000}
    await worker.beat(images=[*odd, *images], versions=versions, pulling={"image": "x" * 1000, "percent": 1000})
    shown = await worker.shown()
    assert [image["name"] for image in shown["images"]] == [image["name"] for image in images[:MAX_IMAGES]]
    assert all(len(text) <= 128 and text.isprintable() for text in shown["versions"].values())
    assert (len(shown["pulling"]["image"]), shown["pulling"]["percent"]) == (MAX_IMAGE_NAME, 100)


@pytest.mark.parametrize("keeps", [True, False])
async def test_worker_that_reports_no_images_has_none_of_an_earlier_one(api: Served, keeps: bool) -> None:
    worker = Reporter(api)
    await worker.register(IMAGE_INVENTORY)
    await worker.beat(**FACTS, images=[IMAGE])
    await worker.register(*((IMAGE_INVENTORY,) if keeps else ()))
    shown = await worker.shown()
    assert ("images" in shown, "disk" in shown) == (keeps, keeps)
    assert ("w" in api.loop.liveness.facts.holders(str(IMAGE["name"]))) is keeps
    # An earlier version sends back what it is shown.
    await worker.beat(**{name: value for name, value in shown.items() if name != "last_seen"})
    assert ("images" in await worker.shown()) is keeps
    await api.ok("DELETE", "/workers/w")
    await api.store.wait_durable()
    assert "w" not in api.loop.liveness.facts.holders(str(IMAGE["name"]))


async def test_every_worker_has_a_label_with_its_name(api: Served) -> None:
    assert (await Reporter(api).register(labels={"a": "1"}))["labels"] == {"a": "1", WORKER_NAME_LABEL: "w"}
    own = await Reporter(api, "v").register(labels={WORKER_NAME_LABEL: "another"})
    assert own["labels"] == {WORKER_NAME_LABEL: "another"}
    refused = await api.call("POST", "/workers", {"name": "x", "labels": {str(n): "" for n in range(256)}})
    assert (refused.status, "257" in refused.message) == (412, True)


async def test_prepull_is_told_to_accounts_that_may_write(api: Served) -> None:
    assert "prepull" not in await api.ok("GET", "/controller/info")
    wanted = [{"image": "ghcr.io/org/macos:1", "labels": {"a": "1"}}, {"image": "ghcr.io/org/macos:2"}]
    await api.ok("PUT", "/cluster-settings", {"prepull": wanted})
    assert (await api.ok("GET", "/controller/info"))["prepull"] == wanted


# ---- for the scheduler ----------------------------------------------------------------------------------------------


def test_image_is_found_by_tag_by_digest_and_without_the_tag_latest() -> None:
    facts = WorkerFacts()
    images = (
        CachedImage("localhost:5000/macos:latest", DIGEST),
        CachedImage("ghcr.io/linux:1"),
        CachedImage("ghcr.io/bare@sha256:2", "sha256:2"),
    )
    facts.record_heartbeat(Worker("w", images=images))
    names = {f"localhost:5000/macos{end}" for end in (":latest", "", f"@{DIGEST}")}
    names |= {"ghcr.io/linux:1", "ghcr.io/bare@sha256:2"}
    asked = names | {"localhost", "localhost:5000/macos:1", "ghcr.io/linux", "ghcr.io/bare", "", "x"}
    assert {name for name in asked if "w" in facts.holders(name)} == names
    assert not any("v" in facts.holders(name) for name in asked)
    facts.record_heartbeat(Worker("v", images=images[:1]))
    facts.record_heartbeat(Worker("w", images=images[1:]))
    assert {worker for worker in "vw" if worker in facts.holders("localhost:5000/macos")} == {"v"}


def test_scheduler_is_told_of_other_images_and_of_each_gigabyte() -> None:
    changed: list[str] = []
    facts = WorkerFacts()
    facts.on_change(changed.append)
    assert facts.free_bytes("w") is None
    heartbeat = Worker("w", disk=WorkerDisk(500 * GB, 100 * GB), images=(CachedImage("a/b:1"),))
    for report, is_told in (
        (heartbeat, True),
        (heartbeat, False),
        (Worker("w", disk=WorkerDisk(500 * GB, 100 * GB + 1)), False),
        (Worker("w", disk=WorkerDisk(500 * GB, 99 * GB)), True),
        (Worker("w", disk=WorkerDisk(500 * GB, 99 * GB), images=(CachedImage("a/b:2"),)), True),
        (Worker("w"), True),
    ):
        changed.clear()
        facts.record_heartbeat(report)
        assert changed == ["w"] * is_told
        assert facts.free_bytes("w") == (None if report.disk is None else report.disk.free_bytes)


# ---- what the worker sends ------------------------------------------------------------------------------------------


def problems_of(shown: Worker) -> tuple[HealthProblem, ...]:
    return () if shown.health is None else shown.health.problems


async def test_worker_reports_its_host_and_pulls_what_the_cluster_wants(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "_LEAST_PAUSE", 0.02)
    monkeypatch.setattr(worker, "_PREPULL_SECONDS", 0.05)
    cluster = InProcessCluster(tmp_path, nursery)
    await cluster.start()

    async def has(holds: Callable[[Worker], bool]) -> bool:
        return holds(await cluster.client.workers.get("mac"))

    async with cluster.working(labels={"zone": "a"}):
        await eventually(partial(has, lambda shown: shown.disk is not None and shown.images == ()))
        shown = await cluster.client.workers.get("mac")
        assert shown.disk == await cluster.driver().disk()
        assert shown.versions is not None
        assert shown.versions.orchard == __version__
        assert shown.versions.os
        assert (IMAGE_INVENTORY in shown.capabilities, shown.labels[WORKER_NAME_LABEL]) == (True, "mac")
        await cluster.client.vms.create(name="vm", image="host/of-vm:1")
        await eventually(partial(has, lambda shown: [image.name for image in shown.images or ()] == ["host/of-vm:1"]))
        wanted = [
            {"image": "host/other-zone:1", "labels": {"zone": "b"}},
            {"image": "host/pull-0.5s:1", "labels": {"zone": "a", WORKER_NAME_LABEL: "mac"}},
            {"image": "host/pull-fails:1"},
        ]
        await cluster.client.cluster_settings.put({"prepull": wanted})
        await eventually(partial(has, lambda shown: shown.pulling is not None and shown.pulling.percent > 0))
        await eventually(partial(has, lambda shown: shown.pulling is None and len(shown.images or ()) == 2))
        await eventually(partial(has, lambda shown: [one.what for one in problems_of(shown)] == ["prepull"]))
        assert {image.name for image in await cluster.driver().list_images()} == {"host/of-vm:1", "host/pull-0.5s:1"}
        await cluster.client.cluster_settings.put({"prepull": []})
        await eventually(partial(has, lambda shown: not problems_of(shown)))
    await cluster.stop()


class Sender:
    """A `HostReport` whose heartbeats are all acknowledged."""

    def __init__(self, name: str, driver: SyntheticDriver) -> None:
        self.cache = ImageCache(driver, lambda kind, image, message: None, lambda: None)
        self.report = HostReport(name, driver, self.cache)
        self.report.begin_session()

    def beat(self) -> Worker:
        heartbeat = self.report.add_to(Worker("w"))
        self.report.note_sent(heartbeat)
        return heartbeat


async def test_images_are_sent_when_they_have_changed(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    driver = SyntheticDriver(tmp_path, images=["host/a:1"])
    sender = Sender("w", driver)
    assert sender.beat().images is None, "not known yet"
    nursery.start_soon(sender.report.run)
    await trio.testing.wait_all_tasks_blocked()
    first = sender.beat()
    assert first.images is not None
    assert first.versions == Versions(__version__, __version__, os_version())
    assert [image.name for image in first.images] == ["host/a:1"]
    second = sender.beat()
    assert (second.images, second.versions, second.disk) == (None, None, first.disk)
    async with sender.cache.transfer("host/b:1", lambda _: None, always=False):
        await driver.pull("host/b:1", lambda _: None)
    await trio.testing.wait_all_tasks_blocked()
    assert [image.name for image in sender.beat().images or ()] == ["host/a:1", "host/b:1"]
    # A VM was made from an image: told with the next list, and not more often.
    used = replace(driver._images["host/a:1"], last_used=BEGAN)
    driver._images["host/a:1"] = used
    sender.cache._list_due.set()
    await trio.testing.wait_all_tasks_blocked()
    assert sender.beat().images is None
    await trio.sleep(LIST_SECONDS)
    assert used in (sender.beat().images or ())


async def test_workers_send_their_images_again_at_different_times_of_a_session(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    driver = SyntheticDriver(tmp_path, images=["host/a:1"])
    senders = [Sender(f"worker-{number}", driver) for number in range(100)]
    for sender in senders:
        nursery.start_soon(sender.report.run)
    await trio.testing.wait_all_tasks_blocked()
    for sender in senders:
        assert sender.beat().images is not None
        sender.report.begin_session()
    counts = []
    for _ in range(6):
        await trio.sleep(10)
        counts.append(len([sender for sender in senders if sender.beat().images is not None]))
    assert sum(counts) == 100
    assert max(counts) < 40
