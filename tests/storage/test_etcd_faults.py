"""The etcd engine while answers are lost and leaders overlap: what was acknowledged is stored once, and one engine writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.engines import PREFIX, MemoryEtcdSite, RealEtcdSite
from harness.memory_etcd import MemoryEtcd, encoded
from harness.scripted import answer
from harness.strategies import BEGAN

from orchard import store
from orchard.codec import dump_json
from orchard.net import transport
from orchard.schema import ServiceAccount
from orchard.storage import etcd_engine
from orchard.storage.engine import Batch, BatchLimits, Contents, Engine
from orchard.storage.errors import BrokenError
from orchard.storage.etcd import EtcdAccess, EtcdClient, EtcdRefusedError, EtcdRequestError, EtcdUnavailableError
from orchard.storage.etcd_engine import EtcdEngine


def batch(revision: int, *names: str) -> Batch:
    made = Batch(revision - 1, revision)
    for name in names:
        made.record(("vm", name), dump_json({"revision": revision}))
    return made


async def loaded(engine: Engine) -> dict[str, int]:
    """Return the revision that wrote each VM."""
    contents = await engine.load()
    return {name: value["revision"] for (_, name), (_, value) in contents.objects.items()}


@pytest.mark.slow
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


async def test_engine_of_an_earlier_campaign_never_leads_again(autojump_clock: trio.testing.MockClock) -> None:
    """The same controller leads again. Its earlier state is not that of now."""
    site = MemoryEtcdSite()
    async with site.running(), site.leading() as (client, leadership):
        former = EtcdEngine(client, PREFIX, leadership)
        await former.load()
        assert former.leads()
        await leadership.resign()
        await leadership.campaign()
        present = EtcdEngine(client, PREFIX, leadership)
        await present.load()
        assert present.leads()
        assert not former.leads()


def objects_in(etcd: MemoryEtcd) -> dict[str, int]:
    """Return the revision that wrote each VM, as its key has it. No part of a batch must be left."""
    begin = f"{PREFIX}/vm/".encode()
    found = {key: value.value for key, value in etcd.values.items()}
    assert not [key for key in found if b"/transaction/" in key]
    return {
        key.removeprefix(begin).decode(): json.loads(raw)["revision"]
        for key, raw in found.items()
        if key.startswith(begin)
    }


async def write_until(last_write: int, large: Batch, site: MemoryEtcdSite) -> bool:
    """Write a batch with a controller that ends after one of its writes. Return whether the batch was acknowledged."""
    writes = 0

    async def stop(path: str) -> None:
        nonlocal writes
        await trio.lowlevel.checkpoint()
        writes += path == "/v3/kv/txn"
        if writes > last_write:
            raise trio.BrokenResourceError

    async with site.opened() as engine:
        await engine.load()
        await engine.begin({}, BEGAN)
        site.etcd.after = stop
        try:
            await engine.append(large)
        except BrokenError:
            return False
        finally:
            site.etcd.after = None
    return True


@pytest.mark.slow
async def test_batch_of_several_parts_is_written_whole_or_not_at_all(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller ends after each write of a batch that etcd does not take at once, and another one takes over."""
    monkeypatch.setattr(etcd_engine, "_LIMITS", BatchLimits(4, 1_000))
    first, large = (
        batch(1, *(f"vm-{number}" for number in range(6))),
        batch(2, *(f"vm-{number}" for number in range(3, 10))),
    )
    large.record(("vm", "vm-5"), None)
    before = {f"vm-{number}": 1 for number in range(6)}
    after = {f"vm-{number}": 1 + (number > 2) for number in range(10) if number != 5}
    outcomes = []
    for last_write in range(7):
        site = MemoryEtcdSite()
        async with site.running():
            assert await write_until(99, first, site)
            is_acknowledged = await write_until(last_write, large, site)
            async with site.opened() as engine:
                found = await loaded(engine)
                await engine.begin({}, BEGAN)
                # It deletes what is left of a batch that was not decided.
                await engine.append(batch(3, "vm-9") if found == after else large)
            async with site.opened() as engine:
                assert (
                    await loaded(engine)
                    == objects_in(site.etcd)
                    == {**after, **({"vm-9": 3} if found == after else {})}
                )
        outcomes.append((found == after, is_acknowledged))
        assert found in (before, after)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {(False, False), (True, False), (True, True)}


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


async def test_refusal_is_uncertain_after_a_write_that_was_waited_for_in_vain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """etcd carries out a write and does not answer while the lease is renewed, then it is full and refuses the next try."""
    site = MemoryEtcdSite()

    async def hang_once(path: str) -> None:
        await trio.lowlevel.checkpoint()
        if path == "/v3/kv/txn":
            site.etcd.after, site.etcd.is_full = None, True
            await trio.sleep_forever()

    async with site.running():
        async with site.opened() as engine:
            await engine.load()
            await engine.begin({}, BEGAN)
            site.etcd.after = hang_once
            with pytest.raises(BrokenError):
                await engine.append(batch(1, "a"))
        site.etcd.is_full = False
        async with site.opened() as engine:
            assert await loaded(engine) == {"a": 1}


@pytest.mark.slow
async def test_state_is_loaded_whose_pages_would_be_too_large(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small objects come before large ones, of which a page of the same length is more than a client takes."""
    monkeypatch.setattr(transport, "_MAX_BODY_BYTES", 100_000)
    site = MemoryEtcdSite()
    async with site.running():
        async with site.opened() as engine:
            await engine.load()
            await engine.begin({}, BEGAN)
            for number in range(150):
                made = Batch(number, number + 1)
                made.record(("vm", f"{number:03}"), dump_json({"x": "x" * (20_000 if number >= 100 else 10)}))
                await engine.append(made)
        async with site.opened() as engine:
            assert len((await engine.load()).objects) == 150


async def check_raises(kind: type[EtcdRequestError], status: str, body: bytes, user: str = "") -> None:
    """Check the error of a client of an endpoint that answers each connection with a status and a body."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(answer(status, body))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with EtcdClient(EtcdAccess(url, user=user, password=user)) as client:
            with pytest.raises(kind):
                await client.transact([], [])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("body", [b"[]", b"{}", b"<html>", b'{"header": 1}'])
@pytest.mark.parametrize("user", ["", "u"])
async def test_endpoint_that_does_not_answer_as_etcd_is_unavailable(body: bytes, user: str) -> None:
    await check_raises(EtcdUnavailableError, "200 OK", body, user)


@pytest.mark.parametrize(("status", "is_refusal"), [(400, True), (404, True), (408, False), (499, False), (503, False)])
async def test_request_that_etcd_cancelled_is_not_known_to_be_refused(status: int, is_refusal: bool) -> None:
    """An etcd that stops answers 408 or 499 also when it has carried a write out."""
    kind = EtcdRefusedError if is_refusal else EtcdUnavailableError
    await check_raises(kind, f"{status} Reason", b'{"code": 1, "message": "the client connection is closing"}')


async def test_other_tasks_run_while_a_large_state_is_taken_over(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the lease would not be renewed while a controller decodes tens of thousands of VMs."""
    monkeypatch.setattr(store, "_BUILT_AT_ONCE", 1)
    site, turns, seen = MemoryEtcdSite(), 0, []

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with site.running(), trio.open_nursery() as nursery:
        async with site.opened() as engine:
            await engine.load()
            made = Batch(0, 1)
            for name in "abcde":
                account = ServiceAccount(name=name, token="t")
                made.record(("account", name), store.encode_object(account), is_new=True)
            await engine.append(made)
        nursery.start_soon(count_turns)
        async with site.opened() as engine:
            load, begin = engine.load, engine.begin

            async def loaded_then() -> Contents:
                contents = await load()
                seen.append(turns)
                return contents

            async def begun(*arguments: Any) -> None:
                seen.append(turns)
                await begin(*arguments)

            monkeypatch.setattr(engine, "load", loaded_then)
            monkeypatch.setattr(engine, "begin", begun)
            await store.Store.open(engine, BEGAN)
        nursery.cancel_scope.cancel()
    # In five steps. Which task of a turn runs first is random.
    assert seen[1] - seen[0] >= 3
