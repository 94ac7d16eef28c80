"""Events, records and secrets in etcd: what a controller that takes over finds, bounds, and writes that fail."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.memory_etcd import MemoryEtcd, encoded, running_memory_etcd
from harness.strategies import BEGAN

from orchard.codec import dump_json
from orchard.schema import Event
from orchard.storage import etcd_records, event_file
from orchard.storage.errors import BrokenError, DamagedError, StorageFullError
from orchard.storage.etcd import EtcdAccess, EtcdClient, EtcdRefusedError, EtcdUnavailableError, put
from orchard.storage.etcd_records import EtcdEventStorage, EtcdRecords, share_files
from orchard.storage.event_pages import EventsDeletedError
from orchard.storage.event_storage import EventLimitError
from orchard.storage.events import EventLog
from orchard.storage.leadership import CampaignSettings, Leadership

A, B = "aaaaaaaa-0000-4000-8000-000000000000", "bbbbbbbb-0000-4000-8000-000000000000"
PREFIX = "/orchard"
PREFIXES = f"{PREFIX}/".encode()


@dataclass
class Leading:
    """A controller that leads, and what it stores with."""

    client: EtcdClient
    leadership: Leadership

    async def events(self, max_kib: int = 1024) -> EtcdEventStorage:
        storage = EtcdEventStorage(self.client, PREFIX, self.leadership, max_kib)
        await storage.load()
        return storage

    async def records(self) -> tuple[EtcdRecords, list[int]]:
        records = EtcdRecords(self.client, PREFIX, self.leadership, "history")
        await records.load()
        return records, [record["n"] for _, record in records.inspect()]


@asynccontextmanager
async def leading(etcd: MemoryEtcd) -> AsyncIterator[Leading]:
    async with running_memory_etcd(etcd) as listener, EtcdClient(EtcdAccess("http://etcd"), listener.connect) as client:
        settings = CampaignSettings("http://c", 2, trio.current_time, lambda: BEGAN, lambda: uuid.uuid4().hex)
        leadership = Leadership(client, PREFIX, settings)
        await leadership.campaign()
        yield Leading(client, leadership)
        await leadership.resign()


def log_lines(*payloads: str) -> list[Event]:
    return [Event("log_line", payload, 1) for payload in payloads]


async def append(storage: EtcdEventStorage, uid: str, *payloads: str) -> None:
    result = await storage.write({uid: log_lines(*payloads)}, [])
    for error in result.errors.values():
        raise error


async def payloads_of(storage: EtcdEventStorage, uid: str) -> list[str]:
    """Return the payloads of all events of a VM, read block by block."""
    stored = storage.get(uid)
    assert stored is not None
    texts: list[bytes] = []
    for block in stored.blocks(0, stored.count):
        found = await stored.read(block)
        assert len(found) == len(block)
        texts += found
    return [dump_payload(text) for text in texts]


def dump_payload(text: bytes) -> str:
    begin = text.index(b'"payload":"') + len(b'"payload":"')
    return text[begin : text.index(b'"', begin)].decode()


# ---- events ----------------------------------------------------------------------------------------------------------


async def test_events_are_found_by_the_next_leader(autojump_clock: trio.testing.MockClock) -> None:
    etcd = MemoryEtcd()
    async with leading(etcd) as first:
        storage = await first.events()
        for number in range(20):
            await append(storage, A, f"a{number}", f"b{number}")
        await append(storage, B, "other")
        expected = await payloads_of(storage, A)
        assert expected == [text for number in range(20) for text in (f"a{number}", f"b{number}")]
    async with leading(etcd) as second:
        storage = await second.events()
        storage.open({A})
        assert storage.get(B) is None
        await append(storage, A, "last")
        assert await payloads_of(storage, A) == [*expected, "last"]
        # The events of a VM that is gone are dropped with the next write.
        assert not [key for key in etcd.values if B.encode() in key]


async def test_part_of_the_events_of_a_deleted_vm_stops_no_start(autojump_clock: trio.testing.MockClock) -> None:
    """An append whose answer was lost is sent again. The first try may arrive after the VM was deleted."""
    etcd = MemoryEtcd()
    async with leading(etcd) as first:
        storage = await first.events()
        await append(storage, A, "first")
        await append(storage, A, "last")
        _, late = [(key, value) for key, value in etcd.values.items() if A.encode() in key]
        storage.forget(A)
        await storage.write({}, [A])
        etcd.answer("/v3/kv/put", {"key": encoded(late[0]), "value": encoded(late[1].value)})
    async with leading(etcd) as second:
        storage = await second.events()
        storage.open({B})
        assert storage.get(A) is None
        await append(storage, B, "other")
        assert not [key for key in etcd.values if A.encode() in key]


async def test_any_part_of_the_events_is_read(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_file, "BLOCK_BYTES", 200)
    async with leading(MemoryEtcd()) as leader:
        storage = await leader.events()
        for start in range(0, 9, 3):
            await append(storage, A, *(f"p{number:02}" for number in range(start, start + 3)))
        await append(storage, A, "x" * 450)
        stored = storage.get(A)
        assert stored is not None
        for begin in range(9):
            for end in range(begin + 1, 10):
                blocks = stored.blocks(begin, end)
                assert [number for block in blocks for number in block] == [*range(begin, end)]
                texts = [text for block in blocks for text in await stored.read(block)]
                assert list(map(dump_payload, texts)) == [f"p{number:02}" for number in range(begin, end)]
                assert all(stored.size_of(block) <= 200 or len(block) == 1 for block in blocks)
        parts = [await stored.read_part(9, at) for at in range(0, 800, 200)]
        assert dump_payload(b"".join(parts)) == "x" * 450
        assert parts[-1] == b""


async def test_vm_has_a_bounded_size_and_number_of_events(autojump_clock: trio.testing.MockClock) -> None:
    etcd = MemoryEtcd()
    async with leading(etcd) as leader:
        storage = await leader.events(max_kib=64)
        for uid, text in ((A, "x" * 5_000), (B, "x")):
            with suppress(EventLimitError):
                for _ in range(300):
                    await append(storage, uid, text)
            with pytest.raises(EventLimitError):
                await append(storage, uid, text)
        assert sum(len(value.value) for key, value in etcd.values.items() if A.encode() in key) > 50_000
        assert 100 < len([key for key in etcd.values if B.encode() in key]) <= 64 * 4


async def test_events_of_one_append_are_stored_together(autojump_clock: trio.testing.MockClock) -> None:
    """Events of just over half a chunk make the most chunks. etcd becomes full with the first transaction."""
    etcd = MemoryEtcd()
    payloads = ["x" * 35_000] * 28

    async def fill(path: str) -> None:
        await trio.lowlevel.checkpoint()
        etcd.is_full = True

    async with leading(etcd) as leader:
        storage = await leader.events()
        etcd.after = fill
        await append(storage, A, *payloads)
        etcd.after = None
        assert await payloads_of(storage, A) == payloads


async def test_events_are_refused_by_a_full_etcd_and_dropped_when_it_has_space(
    autojump_clock: trio.testing.MockClock,
) -> None:
    etcd = MemoryEtcd()
    async with leading(etcd) as leader:
        storage = await leader.events()
        await append(storage, A, "before")
        etcd.is_full = True
        with pytest.raises(StorageFullError):
            await append(storage, A, "refused")
        assert await payloads_of(storage, A) == ["before"]
        stored = storage.forget(A)
        result = await storage.write({}, [A])
        assert (result.broken, result.errors) == (None, {})
        etcd.is_full = False
        await append(storage, B, "after")
        assert not [key for key in etcd.values if A.encode() in key]
        assert stored is not None
        with pytest.raises(EventsDeletedError):
            await stored.read(range(1))


async def test_events_that_a_killed_leader_has_left_are_dropped_by_the_next_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    etcd = MemoryEtcd()
    async with leading(etcd) as first:
        await append(await first.events(), A, "left")
    async with leading(etcd) as second, trio.open_nursery() as nursery:
        log = EventLog(await second.events(), (await second.records())[0])
        log.open(set())
        nursery.start_soon(log.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not [key for key in etcd.values if A.encode() in key]
        nursery.cancel_scope.cancel()


async def test_former_leader_stores_no_events(autojump_clock: trio.testing.MockClock) -> None:
    etcd = MemoryEtcd()
    async with leading(etcd) as former:
        storage = await former.events()
        for lease in list(etcd.leases):
            etcd.answer("/v3/lease/revoke", {"ID": str(lease)})
        result = await storage.write({A: log_lines("stale")}, [])
        assert isinstance(result.broken, BrokenError)
        assert not former.leadership.leads()
        assert set(result.errors) == {A}
        assert not [key for key in etcd.values if A.encode() in key]


# ---- records ---------------------------------------------------------------------------------------------------------


def numbers(first: int, last: int) -> list[bytes]:
    return [dump_json({"n": number}) for number in range(first, last)]


async def add(records: EtcdRecords, live: list[int], first: int, last: int, keep: int = 20) -> None:
    """Append records, of which the last `keep` are to be kept."""
    await records.append(numbers(first, last), len(live), lambda: [dump_json({"n": number}) for number in live])
    live += range(first, last)
    del live[:-keep]


async def test_records_are_bounded_and_found_by_the_next_leader(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_records, "_SLACK", 10)
    etcd = MemoryEtcd()
    live: list[int] = []
    for start in range(0, 100, 50):
        async with leading(etcd) as leader:
            records, found = await leader.records()
            assert found[-20:] == live
            for first in range(start, start + 50, 5):
                await add(records, live, first, first + 5)
                assert records.count <= 2 * 20 + 10 + 5
    stored = [key for key in etcd.values if b"/history/" in key]
    assert len(stored) <= 12
    async with leading(etcd) as leader:
        assert (await leader.records())[1][-20:] == [*range(80, 100)]


@pytest.mark.slow
async def test_records_that_were_being_replaced_by_a_killed_leader_are_all_there_once(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader ends at each of its writes in turn, before and after etcd has carried it out."""
    monkeypatch.setattr(etcd_records, "_SLACK", 2)
    monkeypatch.setattr(etcd_records, "MAX_TRANSACTION_BYTES", 60)
    for applied in (False, True):
        for last_write in range(2, 30, 3):
            etcd, acknowledged = MemoryEtcd(), 0
            live: list[int] = []
            async with leading(etcd) as leader:
                records, _ = await leader.records()
                writes = 0

                async def stop(path: str, last_write: int = last_write) -> None:
                    nonlocal writes
                    writes += path == "/v3/kv/txn"
                    if writes >= last_write:
                        raise trio.BrokenResourceError

                etcd.after, etcd.before = (stop, None) if applied else (None, stop)
                try:
                    while acknowledged < 36:
                        await add(records, live, acknowledged, acknowledged + 3, keep=6)
                        acknowledged += 3
                except BrokenError:
                    pass
                etcd.before = etcd.after = None
            async with leading(etcd) as next_leader:
                _, found = await next_leader.records()
            assert found == [*range(found[0], found[-1] + 1)] if found else not acknowledged
            assert not found or found[-1] + 1 in (acknowledged, acknowledged + 3)


# ---- secrets ---------------------------------------------------------------------------------------------------------


async def test_controllers_share_the_secrets_of_the_first(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    etcd = MemoryEtcd()
    for number, name in enumerate(("first", "second")):
        directory = tmp_path / name
        directory.mkdir()
        for file in ("cert", "key"):
            (directory / file).write_text(f"{file} {number}")
        access = EtcdAccess("http://etcd")
        async with running_memory_etcd(etcd) as listener, EtcdClient(access, listener.connect) as client:
            await share_files(client, PREFIX, "tls", [directory / "cert", directory / "key"])
        assert [(directory / file).read_text() for file in ("cert", "key")] == ["cert 0", "key 0"]
    assert (tmp_path / "second" / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("value", [b"[]", b"{}", b"no JSON", b'{"key": 1}', b'{"key": "%%"}'])
async def test_secret_that_is_not_understood_is_damage(
    value: bytes, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    (tmp_path / "key").write_bytes(b"mine")
    etcd = MemoryEtcd()
    async with running_memory_etcd(etcd) as listener, EtcdClient(EtcdAccess("http://etcd"), listener.connect) as client:
        await client.transact([], [put(f"{PREFIX}/secret/ssh", value)])
        with pytest.raises(DamagedError):
            await share_files(client, PREFIX, "ssh", [tmp_path / "key"])
    assert (tmp_path / "key").read_bytes() == b"mine"


# ---- the client ------------------------------------------------------------------------------------------------------


async def test_client_renews_a_token_that_has_expired(autojump_clock: trio.testing.MockClock) -> None:
    etcd = MemoryEtcd()
    etcd.users.passwords = {"orchard": "secret"}
    async with running_memory_etcd(etcd) as listener:
        async with EtcdClient(EtcdAccess("http://etcd", user="orchard", password="secret"), listener.connect) as client:
            assert await client.get("/x") is None
            etcd.users.tokens.clear()
            assert await client.get("/x") is None
        async with EtcdClient(EtcdAccess("http://etcd", user="orchard", password="wrong"), listener.connect) as client:
            with pytest.raises(EtcdRefusedError) as refused:
                await client.get("/x")
            assert refused.value.denied
            assert "secret" not in repr(client._access)


async def test_error_names_each_endpoint_that_failed(autojump_clock: trio.testing.MockClock) -> None:
    async def refuse(host: str, port: int) -> trio.abc.Stream:
        raise ConnectionRefusedError(f"{host} refuses")

    async with EtcdClient(EtcdAccess("http://one,http://two:99"), refuse) as client:
        with pytest.raises(EtcdUnavailableError, match=r"one:2379.*two:99"):
            await client.get("/x")


@pytest.mark.parametrize("url", ["etcd:2379", "ftp://etcd", "http://etcd:port", ""])
def test_url_that_is_not_one_of_etcd_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        EtcdClient(EtcdAccess(url))
