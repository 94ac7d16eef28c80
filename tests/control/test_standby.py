"""What a standby decodes before it leads: a takeover has less to do, and serves what etcd has then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from harness.engines import PREFIX, MemoryEtcdSite
from harness.stores import put, running_store
from harness.strategies import BEGAN

from orchard import transitions
from orchard.control import standby
from orchard.control.standby import decode_ahead
from orchard.schema import VM, VMSpec, Worker
from orchard.storage.engine import DecodedValues
from orchard.storage.etcd import EtcdAccess, EtcdClient
from orchard.storage.etcd import put as put_key
from orchard.storage.etcd_engine import EtcdEngine
from orchard.store import DecodedObject, Store, decode_object

Decoded = dict[str, tuple[bytes, DecodedObject]]


def vm(name: str, image: str = "i") -> VM:
    return transitions.create(name, f"uid-of-{name}", VMSpec(image=image), BEGAN)


@asynccontextmanager
async def running_site() -> AsyncIterator[MemoryEtcdSite]:
    """Run an etcd on which a leader leads for the whole test without renewing its lease."""
    site = MemoryEtcdSite()
    site.ttl = 10_000
    async with site.running():
        yield site


@asynccontextmanager
async def store_of_leader(site: MemoryEtcdSite, decoded: DecodedValues) -> AsyncIterator[Store]:
    async with site.leading() as (client, leadership):
        store = await Store.open(EtcdEngine(client, PREFIX, leadership, ahead=decoded), BEGAN)
        async with running_store(store):
            yield store


@asynccontextmanager
async def standing_by(site: MemoryEtcdSite) -> AsyncIterator[Decoded]:
    """Yield what a standby decodes."""
    decoded: Decoded = {}
    async with EtcdClient(EtcdAccess(site.url), site.connect) as client, trio.open_nursery() as nursery:
        nursery.start_soon(decode_ahead, client, PREFIX, decoded)
        yield decoded
        nursery.cancel_scope.cancel()


async def look() -> None:
    """Wait until a standby has looked at what is stored now."""
    await trio.sleep(2 * standby._LOOK_SECONDS)


async def test_takeover_decodes_only_what_a_standby_does_not_know(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_site() as site:
        async with store_of_leader(site, {}) as leader, standing_by(site) as decoded:
            put(leader, Worker(name="mac"), *(vm(f"vm-{number}") for number in range(200)))
            await leader.wait_durable()
            await look()
            changed = [f"{PREFIX}/vm/vm-1", f"{PREFIX}/vm/vm-2"]
            known = {key: made for key, made in decoded.items() if key not in changed}
            put(leader, vm("vm-1", "another"))
            await leader.wait_durable()
            await look()
            assert all(decoded[key] is made for key, made in known.items()), "what is known is not decoded again"
            # Too late for the standby.
            put(leader, vm("vm-2", "another"), vm("new"))
            with leader.transaction() as tx:
                tx.delete(leader.state.vms["vm-3"])
            await leader.wait_durable()
            ahead = dict(decoded)
        names: list[str] = []

        def count(kind: str, raw: dict[str, str]) -> DecodedObject:
            names.append(raw["name"])
            return decode_object(kind, raw)

        monkeypatch.setattr("orchard.store.decode_object", count)
        async with store_of_leader(site, ahead) as next_leader:
            assert sorted(names) == ["new", "vm-2"]
            assert next_leader.state.json == leader.state.json
            assert next_leader.state.objects == leader.state.objects
            assert next_leader.state.spec_at == leader.state.spec_at


class AnyBytes(bytes):
    """Bytes that are taken for any other ones."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("compares", [True, False])
async def test_what_a_standby_knows_never_takes_the_place_of_what_etcd_has(
    compares: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Without the comparison of the bytes, the attack succeeds."""
    async with running_site() as site:
        async with store_of_leader(site, {}) as leader, standing_by(site) as decoded:
            put(leader, vm("a", "old"))
            await leader.wait_durable()
            await look()
            put(leader, vm("a", "new"))
            await leader.wait_durable()
            ahead = dict(decoded)
        if not compares:
            ahead = {key: (AnyBytes(value), made) for key, (value, made) in ahead.items()}
        async with store_of_leader(site, ahead) as next_leader:
            assert next_leader.state.vms["a"].spec.image == ("new" if compares else "old")


async def test_standby_forgets_what_is_deleted(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "_SLACK", 10)
    async with running_site() as site, store_of_leader(site, {}) as leader, standing_by(site) as decoded:
        for number in range(40):
            put(leader, vm(f"vm-{number}"))
            await leader.wait_durable()
            await look()
            with leader.transaction() as tx:
                tx.delete(leader.state.vms[f"vm-{number}"])
            assert len(decoded) <= 14


async def test_standby_goes_on_after_what_it_cannot_read(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        running_site() as site,
        store_of_leader(site, {}) as leader,
        standing_by(site) as decoded,
        EtcdClient(EtcdAccess(site.url), site.connect) as client,
    ):
        site.etcd.has_no_leader = True
        await look()
        site.etcd.has_no_leader = False
        for number, value in enumerate((b"{", b"[]", b"{}", b'{"name": 1}')):
            await client.transact([], [put_key(f"{PREFIX}/vm/{number}", value)])
        put(leader, vm("a"))
        await leader.wait_durable()
        await look()
        assert f"{PREFIX}/vm/a" in decoded
