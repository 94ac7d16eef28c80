"""What every engine promises to the store: all of a batch or nothing, and everything that was acknowledged after a restart."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.engines import SITES, Site, Sited, make_sited
from harness.strategies import BEGAN

from orchard.base.files import RESERVE_FILE, SECRET_FILES
from orchard.codec import dump_json
from orchard.storage.engine import Batch, Contents, Engine, Key
from orchard.storage.errors import BrokenError, NotWrittenError

Objects = dict[Key, Any]


@pytest.fixture(params=SITES)
def sited(request: pytest.FixtureRequest, tmp_path: Path) -> Sited:
    return make_sited(request.param, tmp_path)


class Model:
    """What an engine must hold: applied batches only."""

    def __init__(self) -> None:
        self.revision = 0
        self.objects: Objects = {}
        self.time: datetime.datetime | None = None

    def batch(self, *puts: str, deletes: str = "", size: int = 2, **more: Any) -> Batch:
        """Return the next batch, which puts VMs and deletes others, named by one letter each."""
        made = Batch(self.revision, self.revision + 1, time=BEGAN + datetime.timedelta(seconds=self.revision), **more)
        for name in puts:
            made.record(
                ("vm", name), dump_json({"n": self.revision, "x": "x" * size}), is_new=("vm", name) not in self.objects
            )
        for name in deletes:
            made.record(("vm", name), None)
        return made

    def apply(self, batch: Batch) -> None:
        self.revision, self.time = batch.revision, batch.time
        for key, json in batch.records.items():
            if json is None:
                self.objects.pop(key, None)
            else:
                self.objects[key] = json

    async def append(self, engine: Engine, *puts: str, **options: Any) -> None:
        made = self.batch(*puts, **options)
        await engine.append(made)
        self.apply(made)

    def tables(self) -> dict[str, dict[str, bytes]]:
        tables: dict[str, dict[str, bytes]] = {}
        for (kind, name), json in self.objects.items():
            tables.setdefault(kind, {})[name] = json
        return tables

    def check(self, contents: Contents) -> None:
        found = {key: dump_json(value) for key, (_, value) in contents.objects.items()}
        assert (contents.revision, found) == (self.revision, self.objects)

    @asynccontextmanager
    async def begun(self, site: Site) -> AsyncIterator[Engine]:
        """Yield an engine that has loaded what this model holds."""
        async with site.opened() as engine:
            contents = await engine.load()
            self.check(contents)
            if self.time is not None:
                assert contents.time == self.time
            await engine.begin(self.tables(), BEGAN)
            yield engine


def test_everything_that_was_appended_is_there_after_restarts(sited: Sited) -> None:
    async def work(site: Site) -> None:
        model = Model()
        for _ in range(3):
            async with model.begun(site) as engine:
                assert engine.leads()
                await model.append(engine, "a", "b")
                await model.append(engine, "b", "c", deletes="a")
                await model.append(engine, deletes="bc")
                await model.append(engine, "d", "ü/x:y")
        async with model.begun(site):
            pass

    sited.run(work)


def test_object_that_was_created_and_deleted_in_one_batch_leaves_nothing(sited: Sited) -> None:
    async def work(site: Site) -> None:
        model = Model()
        async with model.begun(site) as engine:
            made = model.batch("a", "b")
            made.record(("vm", "a"), None)
            await engine.append(made)
            model.apply(made)
            # Of another object nothing is left, so the batch has no record.
            made = model.batch("c")
            made.record(("vm", "c"), None)
            await engine.append(made)
            model.apply(made)
        async with model.begun(site):
            pass

    sited.run(work)


def test_thousands_of_objects_in_batches_of_the_largest_size_are_loaded(sited: Sited) -> None:
    async def work(site: Site) -> None:
        model = Model()
        async with model.begun(site) as engine:
            most = int(min(engine.limits.records, 100))
            for number in range(12):
                await model.append(engine, *(f"vm-{number}-{each}" for each in range(most)))
            size = int(min(engine.limits.bytes, 1_000_000)) - 1_000
            await model.append(engine, "large", size=size)
        async with model.begun(site):
            pass

    sited.run(work)


def test_refused_batch_changes_nothing_and_the_next_one_works(sited: Sited) -> None:
    async def work(site: Site) -> None:
        model = Model()
        async with model.begun(site) as engine:
            await model.append(engine, "a")
            await site.fill()
            with pytest.raises(NotWrittenError) as refusal:
                await engine.append(model.batch("b", deletes="a", size=900_000, adds=True))
            assert refusal.value.no_space
            assert engine.full
            assert engine.takes_deletions == site.takes_deletions
            await site.free()
            with trio.fail_after(300):
                while True:
                    try:
                        await model.append(engine, "c")
                        break
                    except NotWrittenError:
                        await trio.sleep(0.1)
        async with model.begun(site) as engine:
            assert not engine.full

    sited.run(work)


def test_engine_ends_when_it_is_not_known_what_is_stored(sited: Sited) -> None:
    async def work(site: Site) -> None:
        model = Model()
        async with model.begun(site) as engine:
            await model.append(engine, "a")
            site.lose_writes()
            lost = model.batch("b", deletes="a")
            for made in (lost, model.batch("c")):
                with pytest.raises(BrokenError):
                    await engine.append(made)
        async with site.opened() as engine:
            contents = await engine.load()
            if contents.revision == lost.revision:
                model.apply(lost)
            model.check(contents)

    sited.run(work)


def test_files_of_an_engine_are_private_and_known_as_secrets(sited: Sited, tmp_path: Path) -> None:
    async def work(site: Site) -> None:
        # The files of etcd itself.
        before = set(tmp_path.iterdir())
        async with Model().begun(site) as engine:
            await Model().append(engine, "a")
            found = set(tmp_path.iterdir()) - before
            assert [path.name for path in found if path.stat().st_mode & 0o077] == []
            assert {path.name for path in found} <= {*SECRET_FILES, RESERVE_FILE}

    sited.run(work)
