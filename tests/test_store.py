"""The store: what was told is on disk, what is on disk is what happened, and nobody hears of anything before that."""

from __future__ import annotations

import errno
import itertools
import json
import random
import sys
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import CrashDisk, FailingDisk, HeldDisk, Image, fails_at, no_room
from harness.strategies import BEGAN, assigned, failed, pending, running, worker
from trio.testing import MockClock

import orchard.store
from orchard.codec import APIError
from orchard.files import LockError, lock_directory
from orchard.nursery import unwrap_groups
from orchard.schema import VM, ClusterSettings, HostDirPolicy, ServiceAccount, VMSpec, Worker
from orchard.storage.journal import Broken, DamagedError, Disk, Journal, NotWritten
from orchard.store import Change, State, Store, Tables, check, encoded, snapshot

ACCOUNT = ServiceAccount(name="a", token="secret", roles=("compute:read",))
SETTINGS = ClusterSettings(host_dir_policies=(HostDirPolicy("/x"),))


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for a full disk is of use in test_disk_full.py; here it is only written again and again."""
    monkeypatch.setattr(orchard.store, "RESERVE_BYTES", 10_000)


def opened(directory: Path, disk: Disk | None = None) -> Store:
    return Store.open(directory, BEGAN, disk)


@asynccontextmanager
async def writing(store: Store) -> AsyncIterator[Store]:
    """A store whose changes become durable; closed afterwards."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()


def put(store: Store, *nouns: Any) -> None:
    with store.transaction() as tx:
        for noun in nouns:
            tx.put(noun)


def delete(store: Store, *nouns: VM | Worker | ServiceAccount) -> None:
    with store.transaction() as tx:
        for noun in nouns:
            tx.delete(noun)


def read(directory: Path) -> State:
    """What a new start finds."""
    store = opened(directory)
    store.close()
    assert problems_of(store.state) == []
    return store.state


def problems_of(state: State) -> list[str]:
    """What `check` finds, and what is wrong with the index by a count anew."""
    by_worker: defaultdict[str, dict[str, VM]] = defaultdict(dict)
    for vm in state.vms.values():
        if vm.state.worker:
            by_worker[vm.state.worker][vm.name] = vm
    return check(state) + ["the index differs"] * (by_worker != state.vms_by_worker)


async def has_room(store: Store) -> None:
    """Wait until something can be added again."""
    with trio.fail_after(3600):  # of a clock that jumps
        while store.full:  # noqa: ASYNC110 -- nobody is told
            await trio.sleep(orchard.store.REFILL_SECONDS / 4)


async def refusal(store: Store) -> APIError:
    with pytest.raises(APIError) as refused:
        await store.wait_durable()
    return refused.value


# ---- changing ------------------------------------------------------------------------------------------------------


async def test_everything_is_found_again(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as store:
        put(store, pending("a"), assigned(pending("b")), worker("w"), ACCOUNT, SETTINGS)
        put(store, running(pending("c")))
        delete(store, store.state.vms["a"])
        await store.wait_durable()
        state = read(tmp_path)
        assert state.json == store.state.json
        assert (state.revision, set(state.vms), set(state.workers)) == (3, {"b", "c"}, {"w"})
        assert (state.vms, state.workers) == (store.state.vms, store.state.workers)
        assert (state.accounts, state.settings) == ({"a": ACCOUNT}, SETTINGS)
        assert set(state.vms_by_worker["w"]) == {"b", "c"}


async def test_a_vm_has_the_revision_of_its_last_change(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as store:
        put(store, worker())
        put(store, pending("a"), pending("b"))
        with store.transaction() as tx:
            stored = tx.put(store.state.vms["a"])
        assert store.state.vms["a"] is stored
        assert [store.state.vms[name].meta.version for name in "ab"] == [3, 2]
        assert store.state.json["vm"]["a"] == encoded(stored)


def test_a_transaction_waits_for_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)

    async def main() -> None:
        with trio.testing.assert_no_checkpoints(), store.transaction() as tx:
            tx.put(pending("a"))
        assert "a" in store.state.vms

    trio.run(main)
    store.close()


async def test_an_exception_changes_nothing(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as store:
        put(store, pending("a"))
        before = store.state.tables()

        def give_up() -> None:
            with store.transaction() as tx:
                tx.put(pending("b"))
                tx.delete(store.state.vms["a"])
                raise KeyError("b")

        with pytest.raises(KeyError):
            give_up()
        with pytest.raises(UnicodeEncodeError):
            put(store, pending("b"), pending("c", image="\ud800"))
        assert store.state.tables() == before
        assert (store.state.revision, list(store.state.vms)) == (1, ["a"])
        put(store, pending("d"))
        await store.wait_durable()
        assert set(read(tmp_path).vms) == {"a", "d"}


async def test_what_comes_to_nothing_is_no_change(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as store:
        told: list[list[Change]] = []
        store.on_commit(told.append)
        with store.transaction():
            pass
        with store.transaction() as tx:
            tx.put(pending("a"))
            tx.delete(pending("a"))
            tx.delete(worker("never there"))
        await store.wait_durable()
        assert (store.state.revision, told, read(tmp_path).revision) == (0, [], 0)


async def test_one_transaction_in_another_is_refused_before_it_spoils_the_file(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as store:

        def nest() -> None:
            with store.transaction() as tx:
                tx.put(pending("outer"))
                put(store, pending("inner"))

        with pytest.raises(RuntimeError, match="transaction 1 waited"):
            nest()
        await store.wait_durable()
        assert set(read(tmp_path).vms) == set(store.state.vms) == {"inner"}


async def test_who_listens_hears_at_once_and_again_when_it_is_durable(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store:
        committed: list[str] = []
        durable: list[str] = []
        store.on_commit(lambda changes: committed.extend(f"{c.type} {c.kind} {c.name}" for c in changes))
        store.on_durable(lambda changes: durable.extend(f"{c.type} {c.kind} {c.name}" for c in changes))
        expected = ["ADDED vm a", "ADDED worker w", "MODIFIED vm a", "ADDED settings cluster", "DELETED vm a"]
        with disk.held():
            put(store, pending("a"), worker())
            put(store, assigned(store.state.vms["a"]), SETTINGS)
            delete(store, store.state.vms["a"])
            await trio.testing.wait_all_tasks_blocked()
            assert (committed, durable) == (expected, [])
        await store.wait_durable()
        assert durable == expected


# ---- group commit --------------------------------------------------------------------------------------------------


async def test_many_writers_share_two_syncs_and_none_goes_on_before_them(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store:
        disk.syncs = 0
        syncs_at: list[int] = []

        async def write(number: int) -> None:
            put(store, pending(f"vm{number}"))
            await store.wait_durable()
            syncs_at.append(disk.syncs)

        async with trio.open_nursery() as writers:
            with disk.held():
                for number in range(50):
                    writers.start_soon(write, number)
                    await trio.testing.wait_all_tasks_blocked()
                assert syncs_at == []
        assert sorted(syncs_at) == [1] + 49 * [2]
        assert len(read(tmp_path).vms) == 50


async def test_who_is_woken_by_a_change_still_gets_into_its_sync(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store, trio.open_nursery() as nursery:
        woken = trio.Event()
        store.on_commit(lambda changes: woken.set())

        async def answer() -> None:
            await woken.wait()
            put(store, pending("answer"))

        nursery.start_soon(answer)
        await trio.testing.wait_all_tasks_blocked()
        disk.syncs = 0
        put(store, pending("question"))
        await store.wait_durable()
        assert disk.syncs == 1
        assert read(tmp_path).vms.keys() == {"question", "answer"}


async def test_a_reader_waits_for_what_it_has_seen_and_for_nothing_else(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store:
        await store.wait_durable()
        with disk.held():
            put(store, worker())
            with trio.move_on_after(0) as scope:
                await store.wait_durable()
            assert scope.cancelled_caught
        await store.wait_durable()
        assert disk.syncs == 2


async def test_a_stop_waits_for_the_write_at_work(tmp_path: Path) -> None:
    disk = HeldDisk()
    store = opened(tmp_path, disk)
    async with trio.open_nursery() as nursery:
        with disk.held():
            await nursery.start(store.run)
            put(store, worker())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    store.close()
    assert set(read(tmp_path).workers) == {"w"}


async def test_a_stop_loses_nothing_that_it_was_woken_for(tmp_path: Path) -> None:
    store = opened(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await trio.testing.wait_all_tasks_blocked()
        put(store, worker())
        nursery.cancel_scope.cancel()
    store.close()
    assert set(read(tmp_path).workers) == {"w"}


# ---- watching ------------------------------------------------------------------------------------------------------


def kinds(changes: trio.MemoryReceiveChannel[Change]) -> list[tuple[str, int]]:
    """What a watcher finds now: the kinds of changes, and the versions of the VM."""
    found: list[tuple[str, int]] = []
    while True:
        try:
            change = changes.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return found
        noun = change.new or change.old
        assert isinstance(noun, VM)
        assert change.json == encoded(noun)
        found.append((change.type, noun.meta.version))


async def test_a_watcher_sees_each_change_once_in_order_when_it_is_durable(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store:
        with store.watch("vm", "a") as changes:
            with disk.held():
                put(store, pending("a"), pending("b"))
                await trio.testing.wait_all_tasks_blocked()
                put(store, worker("a"))
                put(store, assigned(store.state.vms["a"]))
                delete(store, store.state.vms["a"])
                put(store, pending("a"))
                await trio.testing.wait_all_tasks_blocked()
                assert kinds(changes) == []
            await store.wait_durable()
            assert kinds(changes) == [("ADDED", 1), ("MODIFIED", 3), ("DELETED", 3), ("ADDED", 5)]
        put(store, store.state.vms["a"])
        await store.wait_durable()


async def test_a_slow_watcher_is_cut_off_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.store, "WATCH_BACKLOG", 3)
    async with writing(opened(tmp_path)) as store:
        with store.watch("vm", "a") as slow, store.watch("vm", "a") as quick:
            put(store, pending("a"))
            for version in range(2, 9):
                put(store, store.state.vms["a"])
                await store.wait_durable()
                assert kinds(quick)[-1] == ("MODIFIED", version)
            assert kinds(slow) == [("ADDED", 1), ("MODIFIED", 2), ("MODIFIED", 3)]
            with pytest.raises(trio.EndOfChannel):
                slow.receive_nowait()


async def test_a_watcher_that_closed_its_end_is_in_nobodys_way(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as store:
        with store.watch("vm", "a") as gone, store.watch("vm", "a") as there:
            gone.close()
            put(store, pending("a"))
            await store.wait_durable()
            assert kinds(there) == [("ADDED", 1)]


async def test_a_watcher_does_not_hear_of_what_was_undone(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FailingDisk()
    async with writing(opened(tmp_path, disk)) as store:
        with store.watch("vm", "a") as changes:
            disk.fault = no_room
            put(store, pending("a"))
            await refusal(store)
            disk.fault = lambda verb, number: 0
            await has_room(store)
            put(store, worker())
            put(store, pending("a"))
            await store.wait_durable()
            assert kinds(changes) == [("ADDED", 2)]


@pytest.mark.parametrize("image", ["i", ""])
async def test_what_is_kept_of_the_json_of_a_vm_is_its_specification(tmp_path: Path, image: str) -> None:
    store = opened(tmp_path)
    put(store, VM(pending("a").meta, VMSpec(image=image, labels={"a": "b", "image": "c"}), pending("a").state))
    for message in (',"image":"z', "", '"'):
        vm = store.state.vms["a"]
        put(store, replace(vm, state=replace(vm.state, status_message=message)))
        assert problems_of(store.state) == []
    store.close()


# ---- disks that fail -----------------------------------------------------------------------------------------------


async def test_a_disk_without_any_room_refuses_undoes_and_comes_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FailingDisk(torn=True)
    async with writing(opened(tmp_path, disk)) as store:
        put(store, running(pending("a")), SETTINGS)
        await store.wait_durable()
        before, index = store.state.tables(), dict(store.state.vms_by_worker["w"])
        disk.fault = no_room
        full = f"cannot write {tmp_path / 'state.jsonl'}: No space left on device"
        put(store, pending("b"), ClusterSettings())  # nobody knows yet
        for _ in range(3):
            put(store, failed(store.state.vms["a"]))
            delete(store, store.state.vms["a"])
            error = await refusal(store)
            assert (error.status, error.message) == (507, f"{full}; nothing was changed")
            assert (store.state.tables(), store.state.revision) == (before, 1)
            assert store.state.vms_by_worker == {"w": index}
            assert problems_of(store.state) == []
            await store.wait_durable()  # what is left is durable: reads go on
            with pytest.raises(APIError, match="nothing can be added until there is room") as refused:
                put(store, failed(store.state.vms["a"]), ACCOUNT)
            assert refused.value.status == 507
            assert (store.state.tables(), store.state.revision) == (before, 1)
        disk.fault = lambda verb, number: 0
        await has_room(store)
        put(store, pending("b"))
        await store.wait_durable()
        assert read(tmp_path).json == store.state.json
        assert set(store.state.vms) == {"a", "b"}


async def test_what_was_built_on_a_write_that_fails_falls_with_it(tmp_path: Path) -> None:
    disk = FailingDisk()
    going_on = threading.Event()

    def slow_and_bad(verb: str, number: int) -> int:
        going_on.wait()
        return errno.EIO if verb == "write" else 0

    async with writing(opened(tmp_path, disk)) as store, trio.open_nursery() as writers:
        statuses: list[int] = []

        async def change(vm: VM) -> None:
            put(store, vm)
            statuses.append((await refusal(store)).status)

        disk.fault = slow_and_bad
        try:
            for vm in (pending("a"), assigned(pending("a")), pending("b")):
                writers.start_soon(change, vm)
                await trio.testing.wait_all_tasks_blocked()
            assert (store.state.revision, statuses) == (3, [])
        finally:
            going_on.set()
    assert statuses == [503, 503, 503]
    assert (store.state.revision, store.state.vms, problems_of(store.state)) == (0, {}, [])


async def test_a_failed_sync_ends_the_store(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FailingDisk()
    store = opened(tmp_path, disk)

    async def live() -> None:
        async with writing(store):
            put(store, pending("a"))
            await store.wait_durable()
            disk.fault = lambda verb, number: errno.EIO if verb == "sync" else 0
            put(store, pending("b"))
            with trio.CancelScope(shield=True):
                error = await refusal(store)
            disk.fault = lambda verb, number: 0
            calls = len(disk.calls)
            assert (error.status, set(store.state.vms)) == (503, {"a"})
            assert "cannot store anything any more" in error.message
            assert error.message.endswith("; restart it")
            with pytest.raises(APIError, match="restart it"), store.transaction():
                raise AssertionError("the block was entered")
            with trio.CancelScope(shield=True):
                assert (await refusal(store)).message == error.message
            assert len(disk.calls) == calls

    with pytest.raises(Broken, match="sync"), unwrap_groups():
        await live()
    assert set(read(tmp_path).vms) in ({"a"}, {"a", "b"})


class NearlyFullDisk(Disk):
    """Has room for little at a time."""

    most = sys.maxsize  # bytes

    def write(self, fd: int, data: memoryview) -> int:
        if len(data) > self.most:
            raise OSError(errno.ENOSPC, "no room")
        return super().write(fd, data)


async def test_where_a_snapshot_finds_no_room_no_line_is_written_in_its_place(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async def at_once(work: Callable[..., Any], *arguments: Any) -> Any:  # the clock would not wait for a thread
        await trio.lowlevel.checkpoint()
        return work(*arguments)

    disk = NearlyFullDisk()
    async with writing(Store.open(tmp_path, BEGAN, disk, in_thread=at_once)) as store:
        for _ in range(5):  # so that a snapshot would be smaller
            put(store, pending("a"))
            await store.wait_durable()
        disk.most = 300
        put(store, failed(store.state.vms["a"]))
        await refusal(store)  # though all of the reserve was given to it
        size = (tmp_path / "state.jsonl").stat().st_size
        await trio.sleep(3 * orchard.store.REFILL_SECONDS)
        assert (tmp_path / "state.jsonl").stat().st_size == size
        disk.most = sys.maxsize
        await has_room(store)
        put(store, pending("b"))
        await store.wait_durable()
    assert read(tmp_path).json == store.state.json


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("torn", [False, True])
async def test_whatever_call_fails_what_was_told_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, torn: bool, autojump_clock: MockClock
) -> None:
    """Transactions and compactions, and each call to the disk in them fails once."""
    monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 2_000)
    monkeypatch.setattr(orchard.store, "COMPACT_RATIO", 0)
    failures: defaultdict[str, set[str]] = defaultdict(set)
    for number in itertools.count():
        directory = tmp_path / f"{number}"
        directory.mkdir()
        disk = FailingDisk(torn=torn)
        disk.fault = fails_at(number, code)
        try:
            store = opened(directory, disk)
        except (NotWritten, Broken, OSError):
            failures[disk.failed[0]].add("no start")
            assert read(directory).json == State().json
            continue
        story = Story(store)
        await story.tell()
        state = read(directory)
        assert state.json == store.state.json or (story.uncertain and state.json == story.uncertain[-1])
        if not disk.failed:
            break
        failures[disk.failed[0]].add(story.outcome)
    assert failures == {
        # In a compaction and in filling the reserve nobody notices; and the reserve is for disks that are full.
        "write": {"no start", "went on"} if code == errno.ENOSPC else {"no start", "refused", "went on"},
        "sync": {"no start", "broken", "went on"},
        "replace": {"no start", "went on"},
        "sync_directory": {"no start", "broken"},
    }


@dataclass
class Story:
    """Some transactions one after another, whatever becomes of each."""

    store: Store
    uncertain: list[Tables] = field(default_factory=list)
    outcome: str = "went on"

    async def tell(self) -> None:
        try:
            with unwrap_groups():
                async with writing(self.store):
                    with trio.CancelScope(shield=True):
                        for step in range(8):
                            await self.step(step)
        except Broken:
            assert self.outcome == "broken"
        else:
            assert self.outcome != "broken"

    async def step(self, step: int) -> None:
        store, state = self.store, self.store.state
        if store.broken:
            return
        await has_room(store)
        before = state.tables()
        put(store, worker("w", vms=step), running(pending(f"vm{step % 3}")), pending("other"))
        wanted = state.tables()
        try:
            await store.wait_durable()
        except APIError:
            self.outcome = "broken" if store.broken else "refused"
            assert state.tables() == before
            self.uncertain += [wanted] if store.broken else []
        else:
            assert state.tables() == wanted
        assert problems_of(state) == []


# ---- compaction ----------------------------------------------------------------------------------------------------


async def test_the_file_stays_in_proportion_to_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 5_000)
    path = tmp_path / "state.jsonl"
    sizes = []
    for start in range(6):
        async with writing(opened(tmp_path)) as store:
            for number in range(20):
                put(store, worker("w", vms=100 * start + number))
                await store.wait_durable()
                sizes.append(path.stat().st_size)
    assert max(sizes) < 6_000, "restarts put compaction off"
    compactions = sum(before > after for before, after in itertools.pairwise(sizes))
    assert 2 < compactions < 10, "too rare to bound the file, or so frequent that they cost more than the writes"
    assert read(tmp_path).workers["w"].resources == worker("w", vms=519).resources


async def test_a_snapshot_holds_nothing_that_came_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 0)
    monkeypatch.setattr(orchard.store, "COMPACT_RATIO", 0)
    going_on = threading.Event()
    taken: list[list[bytes]] = []

    def slow(*arguments: Any) -> list[bytes]:
        going_on.wait()
        taken.append(snapshot(*arguments))
        return taken[-1]

    async with writing(opened(tmp_path)) as store:
        monkeypatch.setattr(orchard.store, "snapshot", slow)
        put(store, worker("a"))
        try:
            await trio.testing.wait_all_tasks_blocked()
            put(store, worker("b"))
            delete(store, worker("a"))
        finally:
            going_on.set()
        await store.wait_durable()
    header, *objects = (json.loads(line) for line in taken[0])
    assert (header["revision"], [one["name"] for one in objects]) == (1, ["a"])
    assert set(read(tmp_path).workers) == {"b"}


async def test_compaction_that_fails_is_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 1_000)
    disk = FailingDisk()
    async with writing(opened(tmp_path, disk)) as store:
        disk.calls.clear()
        disk.fault = lambda verb, number: errno.EIO if verb == "replace" else 0
        for number in range(60):
            put(store, worker("w", vms=number))
            await store.wait_durable()
        tries = disk.calls.count("replace")
        assert 2 <= tries <= (tmp_path / "state.jsonl").stat().st_size / 1_000
        disk.fault = lambda verb, number: 0
        while disk.calls.count("replace") == tries:
            put(store, worker("w"))
            await store.wait_durable()
        assert (tmp_path / "state.jsonl").stat().st_size < 1_000
        assert read(tmp_path).json == store.state.json


# ---- power cuts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_after_a_power_cut_at_any_moment_all_that_was_told_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 3_000)
    monkeypatch.setattr(orchard.store, "COMPACT_RATIO", 0)
    order = random.Random(seed)
    directory, after = tmp_path / "data", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    history: dict[int, Tables] = {0: State().tables()}
    told = 0  # the last revision that anybody was told of
    seen: set[tuple[int, int]] = set()

    def lost_power(image: Image) -> None:
        for path in after.iterdir():
            path.unlink()
        for name, content in image.items():
            (after / name).write_bytes(content)
        state = read(after)
        seen.add((told, state.revision))
        assert state.revision >= told
        assert state.json == history[state.revision]

    disk = CrashDisk(directory, lost_power)
    async with writing(opened(directory, disk)) as store:
        for step in range(40):
            name = f"vm{order.randrange(3)}"
            known = store.state.vms.get(name)
            if known is None:
                put(store, pending(name), worker(f"w{step % 4}"))
            elif order.random() < 0.3:
                delete(store, known)
            else:
                put(store, running(known), ACCOUNT)
            history[store.state.revision] = store.state.tables()
            if order.random() < 0.5:
                await store.wait_durable()
                told = store.state.revision
    assert any(found > told for told, found in seen)
    assert disk.renamings > 2


class Killed(Exception):  # noqa: N818 -- it states what is the case
    """The process ends here, and does nothing more."""


@pytest.mark.parametrize("end", [Killed(), OSError(errno.EIO, "an error of the disk")])
@pytest.mark.parametrize("during", ["sync", "sync_directory"])
async def test_what_a_new_start_finds_a_power_cut_does_not_take_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Exception, during: str
) -> None:
    """Whatever ended the process before: what it wrote may be in the system's memory alone."""
    if during == "sync_directory":  # of a compaction
        monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 0)
        monkeypatch.setattr(orchard.store, "COMPACT_RATIO", 0)
    monkeypatch.setattr(orchard.store, "LAST_WORDS", 0.0)
    directory, after = tmp_path / "data", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    possible = [State().tables()]  # what may be found: what was told at last, and what has not been told since

    def lost_power(image: Image) -> None:
        for name, content in image.items():
            (after / name).write_bytes(content)
        assert read(after).json in possible

    def add(store: Store, name: str) -> None:
        put(store, pending(name))
        possible.append(store.state.tables())

    async def settle(store: Store) -> None:
        await store.wait_durable()
        possible[:-1] = []

    async def be_cut_short() -> None:
        async with writing(opened(directory, disk)) as store:
            add(store, "a")
            await settle(store)
            disk.faults[during] = end
            with suppress(APIError):
                for number in itertools.count():
                    add(store, f"b{number}")
                    await settle(store)
            await trio.sleep_forever()

    disk = CrashDisk(directory, lost_power)
    with pytest.raises(Killed if isinstance(end, Killed) else Broken), unwrap_groups():
        await be_cut_short()
    disk.faults.clear()
    async with writing(opened(directory, disk)) as store:
        possible[:] = [store.state.tables()]  # from now on anybody may be told
        disk.cut_power()
        add(store, "c")
        await settle(store)
        disk.cut_power()


# ---- a long life ---------------------------------------------------------------------------------------------------


class Life:
    """Random operations on a store, and beside them what it should hold: a dict."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.order = random.Random(seed)
        self.disk = FailingDisk(torn=True)
        self.store = opened(directory, self.disk)
        self.held: dict[tuple[str, str], object] = {}
        self.durable = dict(self.held)
        self.reopened = 0

    async def live(self, steps: int) -> None:
        while steps > 0:
            async with writing(self.store):
                for _ in range(self.order.randrange(1, 40)):
                    steps -= 1
                    await self.step()
                    self.check(self.held)
                await self.store.wait_durable()
                self.durable = dict(self.held)
            self.store = opened(self.directory, self.disk)
            self.reopened += 1
            self.check(self.durable)

    def check(self, expected: dict[tuple[str, str], object]) -> None:
        state = self.store.state
        assert problems_of(state) == []
        found: dict[tuple[str, str], object] = {("vm", name): vm for name, vm in state.vms.items()}
        found |= {("worker", name): one for name, one in state.workers.items()}
        found |= {("account", name): one for name, one in state.accounts.items()}
        if state.settings != ClusterSettings():
            found["settings", ""] = state.settings
        assert found == expected

    async def step(self) -> None:
        chance = self.order.random()
        if chance < 0.7:
            self.change()
        elif chance < 0.8:
            with pytest.raises(KeyError):
                self.give_up()
        elif chance < 0.95:
            await self.store.wait_durable()
            self.durable = dict(self.held)
        else:
            await self.store.wait_durable()
            self.durable = dict(self.held)
            self.disk.fault = no_room
            for _ in range(self.order.randrange(1, 4)):
                self.change()
            assert (await refusal(self.store)).status == 507
            self.held = dict(self.durable)
            self.disk.fault = lambda verb, number: 0
            await has_room(self.store)

    def give_up(self) -> None:
        with self.store.transaction() as tx:
            tx.put(pending("never"))
            raise KeyError

    def change(self) -> None:
        with self.store.transaction() as tx:
            for _ in range(self.order.randrange(1, 4)):
                name = f"x{self.order.randrange(5)}"
                kind = self.order.choice(["vm", "vm", "vm", "worker", "account", "settings"])
                known = self.held.get((kind, name))
                if known is not None and self.order.random() < 0.4:
                    assert isinstance(known, VM | Worker | ServiceAccount)
                    tx.delete(known)
                    del self.held[kind, name]
                elif kind == "vm":
                    vm = known if isinstance(known, VM) else pending(name)
                    changed = self.order.choice([assigned, running, failed])(vm, self.order.choice(["w", "v"]))
                    self.held["vm", name] = tx.put(changed)
                elif kind == "worker":
                    self.held["worker", name] = tx.put(worker(name, vms=self.order.randrange(9)))
                elif kind == "account":
                    self.held["account", name] = tx.put(replace(ACCOUNT, name=name, token=f"{self.order.random()}"))
                else:
                    self.held["settings", ""] = tx.put(SETTINGS)


@pytest.mark.parametrize("seed", range(6))
async def test_a_long_life_is_that_of_a_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(orchard.store, "COMPACT_BYTES", 20_000)
    monkeypatch.setattr(orchard.store, "COMPACT_RATIO", 0)
    life = Life(tmp_path, seed)
    await life.live(200)
    life.store.close()
    assert life.reopened > 3
    assert life.disk.calls.count("replace") > 2


# ---- the file ------------------------------------------------------------------------------------------------------


async def test_a_person_can_read_the_file_and_others_cannot(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with lock_directory(directory, "lock"):
        async with writing(opened(directory)) as store:
            put(store, ACCOUNT, worker())
            await store.wait_durable()
            put(store, pending("a"))
            await store.wait_durable()
            delete(store, worker())
            await store.wait_durable()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "state.jsonl").stat().st_mode & 0o777 == 0o600
    header, *lines = [json.loads(line) for line in (directory / "state.jsonl").read_text().splitlines()]
    assert (header["format"], header["version"], header["revision"], header["objects"]) == ("orchard-state", 1, 0, 0)
    assert header["written"] == "2026-01-31T12:00:00Z"
    assert [line["revision"] for line in lines] == [1, 2, 3]
    assert lines[1]["changes"] == [{"put": "vm", "name": "a", "object": json.loads(encoded(store.state.vms["a"]))}]
    assert lines[2]["changes"] == [{"delete": "worker", "name": "w"}]


async def test_of_what_changed_while_the_disk_was_busy_only_the_last_is_written(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store:
        put(store, pending("there"), pending("gone"), worker())
        await store.wait_durable()
        with disk.held():
            put(store, ACCOUNT)
            await trio.testing.wait_all_tasks_blocked()
            put(store, pending("new"), pending("short"), pending("again"))
            for name in ("short", "again", "gone", "there"):
                delete(store, store.state.vms[name])
            put(store, pending("again"))
            put(store, assigned(store.state.vms["new"]), pending("there"))
            delete(store, store.state.vms["again"])
        await store.wait_durable()
        line = json.loads((tmp_path / "state.jsonl").read_text().splitlines()[-1])
        assert line["revision"] == store.state.revision == 10
        vms = store.state.vms
        assert sorted(line["changes"], key=itemgetter("name")) == [
            {"delete": "vm", "name": "gone"},
            *({"put": "vm", "name": name, "object": json.loads(encoded(vms[name]))} for name in ("new", "there")),
        ]
        assert read(tmp_path).json == store.state.json


async def test_a_copy_made_at_any_moment_is_a_backup(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with writing(opened(tmp_path, disk)) as store:
        put(store, worker())
        await store.wait_durable()
        told = store.state.tables()
        with disk.held():
            put(store, pending("a"))
            await trio.testing.wait_all_tasks_blocked()
            copy = tmp_path / "copy"
            copy.mkdir()
            (copy / "state.jsonl").write_bytes((tmp_path / "state.jsonl").read_bytes())
            assert read(copy).json in (told, store.state.tables())


async def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        lock_directory(tmp_path, "lock"),
        pytest.raises(LockError, match=r"in use by another process \(\d+\)"),
        lock_directory(tmp_path, "lock"),
    ):
        raise AssertionError("there are two")


async def test_two_that_write_the_same_file_are_found_out(tmp_path: Path) -> None:
    async with writing(opened(tmp_path)) as one, writing(opened(tmp_path)) as other:
        for store in (one, other):
            put(store, pending("a"))
            await store.wait_durable()
    with pytest.raises(DamagedError, match="does not fit the line and the one before it"):
        read(tmp_path)


def written(directory: Path, *lines: dict[str, Any], **header: Any) -> Path:
    """A file whose lines are whole, whatever they say."""
    path = directory / "state.jsonl"
    plain: dict[str, Any] = json.loads(snapshot({}, 0, BEGAN)[0])
    journal = Journal(path, Disk())
    journal.create([json.dumps(line).encode() for line in [{**plain, **header}, *lines]])
    journal.close()
    return path


VM_A = json.loads(encoded(replace(pending("a"), meta=replace(pending("a").meta, version=1))))
PUT_A = {"put": "vm", "name": "a", "object": VM_A}


@pytest.mark.parametrize(
    ("lines", "header", "told"),
    [
        ([], {"version": 2}, "version 2 is newer than the version 1 that this program knows at byte 0; start the Orchard that wrote it"),
        ([], {"format": "orchard-events"}, "no orchard-state file"),
        ([], {"objects": 1}, "ends in the middle of its snapshot"),
        ([{"revision": 2, "changes": []}], {}, "revision 2 follows revision 0"),
        ([{"revision": 0, "changes": []}], {}, "revision 0 follows revision 0"),
        ([{"after": 1, "revision": 3, "changes": []}], {}, "revision 2 follows revision 0"),
        ([{"after": 0, "revision": 0, "changes": []}], {}, "revision 0 follows revision 0"),
        ([{"after": "0", "revision": 1, "changes": []}], {}, "not understood"),
        ([{"revision": 1, "changes": []}, {"revision": 1, "changes": []}], {}, "revision 1 follows revision 1"),
        ([{"after": 0, "revision": 2, "changes": []}, {"revision": 2, "changes": []}], {}, "revision 2 follows revision 2"),
        ([{"revision": 1, "changes": [{"delete": "vm", "name": "b"}]}], {}, "not understood"),
        ([{"revision": 1, "changes": [{"put": "cat", "name": "b", "object": {}}]}], {}, "not understood"),
        ([{"revision": 1, "changes": [{"put": "vm", "name": "b", "object": {"cpu": "x"}}]}], {}, "cpu"),
        ([{"revision": 1}], {}, "not understood"),
        ([{"changes": []}], {}, "not understood"),
        ([{"revision": 1, "changes": [{**PUT_A, "name": "b"}]}], {}, 'VM "b" says that its name is "a"'),
        ([PUT_A], {"objects": 1}, 'VM "a" has version 1 in a state of revision 0'),
        ([PUT_A, {**PUT_A, "name": "b"}], {"objects": 2, "revision": 1}, 'has the uid "uid-a" of VM "a"'),
        ([{**PUT_A, "object": {**VM_A, "worker": "w"}}], {"objects": 1, "revision": 1}, "against its condition scheduled"),
        ([{"put": "account", "name": "a", "object": {"name": "a"}}], {"objects": 1}, "has no token"),
        ([{"put": "worker", "name": "a", "object": {"name": "b"}}], {"objects": 1}, 'worker "a" says that its name is "b"'),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(
    tmp_path: Path, lines: list[dict[str, Any]], header: dict[str, Any], told: str
) -> None:
    path = written(tmp_path, *lines, **header)
    before = path.read_bytes()
    with pytest.raises(DamagedError) as damaged:
        read(tmp_path)
    assert str(damaged.value).startswith(f"{path}: ")
    assert told in str(damaged.value)
    assert path.read_bytes() == before


def test_the_same_file_that_makes_sense_is_taken(tmp_path: Path) -> None:
    written(
        tmp_path,
        PUT_A,
        {"revision": 8, "changes": []},
        {"after": 8, "revision": 11, "changes": []},
        objects=1,
        revision=7,
    )
    state = read(tmp_path)
    assert (state.revision, list(state.vms)) == (11, ["a"])


def test_check_sees_what_is_wrong_in_memory() -> None:
    state = State()
    state.revision = 1
    vm = replace(running(pending("a")), meta=replace(pending("a").meta, version=1))
    state.apply("vm", "a", vm, encoded(vm))
    assert check(state) == []
    state.json["vm"]["a"] = b"{}"
    assert check(state) == ['the JSON kept of vm "a" is not that of the object']
    state.json["vm"]["a"] = encoded(vm)
    del state.vms_by_worker["w"]
    assert check(state) == [
        'VM "a" is missing in the index of worker "w"',
        "0 VMs are indexed by worker, and 1 have one",
    ]


@pytest.mark.parametrize("cut", [0, 1, 50])
def test_a_snapshot_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path, PUT_A, objects=1, revision=1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedError, match=r"ends in the middle of its snapshot at byte 0; restore"):
        read(tmp_path)
