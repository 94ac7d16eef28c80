"""The etcd engine while answers are lost and leaders overlap: what was acknowledged is stored once, and one engine writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.engines import PREFIX, MemoryEtcdSite, RealEtcdSite
from harness.memory_etcd import encoded
from harness.strategies import BEGAN

from orchard.codec import dump_json
from orchard.storage import etcd_engine
from orchard.storage.engine import Batch, Engine
from orchard.storage.errors import BrokenError


def batch(revision: int, name: str) -> Batch:
    made = Batch(revision - 1, revision)
    made.record(("vm", name), dump_json({"revision": revision}), is_new=True)
    return made


async def loaded(engine: Engine) -> dict[str, int]:
    """Return the revision that wrote each VM."""
    contents = await engine.load()
    return {name: value["revision"] for (_, name), (_, value) in contents.objects.items()}


async def test_answer_lost_after_the_write_is_recognised(autojump_clock: trio.testing.MockClock) -> None:
    """A connection is cut off before or after etcd carried out what was asked, for any request and any number in a row."""
    site, chance = MemoryEtcdSite(), random.Random(1)

    async def cut(path: str) -> None:
        await trio.lowlevel.checkpoint()
        if chance.random() < 0.3:
            raise trio.BrokenResourceError

    async with site.running():
        async with site.opened() as engine:
            await engine.load()
            await engine.begin({}, BEGAN)
            site.etcd.before = site.etcd.after = cut
            for revision in range(1, 101):
                await engine.append(batch(revision, f"vm-{revision}"))
            site.etcd.before = site.etcd.after = None
        async with site.opened() as engine:
            assert await loaded(engine) == {f"vm-{revision}": revision for revision in range(1, 101)}
        versions = {key: value.version for key, value in site.etcd.values.items() if b"/vm/" in key}
        assert set(versions.values()) == {1}, "a write was carried out twice"


@pytest.mark.parametrize("compares", [True, False])
async def test_former_leader_cannot_write(
    compares: bool, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is over for etcd and not for its holder: only the comparison of `head` protects the state.

    Without the comparison, the attack succeeds.
    """
    site = MemoryEtcdSite()
    async with site.running(), site.opened() as former:
        await former.load()
        await former.append(batch(1, "a"))
        for lease in list(site.etcd.leases):
            site.etcd.answer("/v3/lease/revoke", {"ID": str(lease)})
        async with site.opened() as present:
            assert await loaded(present) == {"a": 1}
            if not compares:
                holds = {"key": encoded(f"{PREFIX}/head".encode()), "target": "VERSION", "result": "GREATER"}
                monkeypatch.setattr(etcd_engine, "was_written_at", lambda key, revision: holds)
                await former.append(batch(2, "stale"))
            else:
                with pytest.raises(BrokenError):
                    await former.append(batch(2, "stale"))
                assert not former.leads()
                await present.append(batch(2, "b"))
        assert (f"{PREFIX}/vm/stale".encode() in site.etcd.values) is not compares


@pytest.mark.slow
@pytest.mark.needs("etcd")
async def test_answer_of_a_real_etcd_that_is_lost_is_recognised(tmp_path: Path) -> None:
    site = RealEtcdSite(tmp_path)
    async with site.running():
        async with site.opened() as engine:
            await engine.load()
            for revision in range(1, 16):
                site.lose_answers(1 + revision % 3)
                await engine.append(batch(revision, f"vm-{revision}"))
        async with site.opened() as engine:
            assert await loaded(engine) == {f"vm-{revision}": revision for revision in range(1, 16)}
