"""The store: durable before acknowledged, group commit, watches, undo after failed writes, power cuts, damaged files."""

from __future__ import annotations

import errno
import itertools
import random
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.disks import CrashDisk, FailingDisk, HeldDisk, Image, fails_at, no_space
from harness.stores import (
    ACCOUNT,
    SETTINGS,
    delete,
    open_store,
    problems_of,
    put,
    read,
    refused_write,
    running_store,
    wait_not_full,
)
from harness.strategies import assigned, failed, pending, running, worker
from trio.testing import MockClock

import orchard.state.changes
import orchard.store
from orchard.base.nursery import unwrap_groups
from orchard.schema import VM, ClusterSettings, ServiceAccount, VMSpec, Worker
from orchard.state.changes import Change, ChangeFeed
from orchard.storage import state_file
from orchard.storage.engine import Tables
from orchard.storage.errors import (
    BrokenError,
    NotWrittenError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from orchard.store import State, Store, check, encode_object


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the tests by a small reserve; tests/storage/test_disk_full.py has one of the usual size."""
    monkeypatch.setattr(state_file, "RESERVE_BYTES", 10_000)


# ---- changing ------------------------------------------------------------------------------------------------------


async def test_objects_of_all_kinds_are_read_after_a_restart(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as store:
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


async def test_version_of_a_vm_is_the_revision_of_its_last_change(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as store:
        put(store, worker())
        put(store, pending("a"), pending("b"))
        with store.transaction() as tx:
            stored = tx.put(store.state.vms["a"])
        assert store.state.vms["a"] is stored
        assert [store.state.vms[name].meta.version for name in "ab"] == [3, 2]
        assert store.state.json["vm"]["a"] == encode_object(stored)


def test_transaction_has_no_checkpoint(tmp_path: Path) -> None:
    store = open_store(tmp_path)

    async def main() -> None:
        with trio.testing.assert_no_checkpoints(), store.transaction() as tx:
            tx.put(pending("a"))
        assert "a" in store.state.vms

    trio.run(main)
    store.close()


async def test_exception_in_a_transaction_changes_nothing(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as store:
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


async def test_transaction_without_effect_makes_no_revision(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as store:
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


async def test_nested_transaction_is_refused_and_the_file_stays_readable(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as store:

        def nest() -> None:
            with store.transaction() as tx:
                tx.put(pending("outer"))
                put(store, pending("inner"))

        with pytest.raises(RuntimeError, match="transaction 1 awaited"):
            nest()
        await store.wait_durable()
        assert set(read(tmp_path).vms) == set(store.state.vms) == {"inner"}


async def test_on_commit_is_called_at_once_and_on_durable_after_the_sync(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
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


async def test_concurrent_writers_share_two_syncs_and_wait_for_them(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
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


async def test_transaction_of_a_task_woken_by_a_change_shares_its_sync(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store, trio.open_nursery() as nursery:
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


async def test_wait_durable_waits_for_earlier_changes_only(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
        await store.wait_durable()
        with disk.held():
            put(store, worker())
            with trio.move_on_after(0) as scope:
                await store.wait_durable()
            assert scope.cancelled_caught
        await store.wait_durable()
        assert disk.syncs == 2


async def test_cancelled_store_finishes_the_write_in_progress(tmp_path: Path) -> None:
    disk = HeldDisk()
    store = open_store(tmp_path, disk)
    async with trio.open_nursery() as nursery:
        with disk.held():
            await nursery.start(store.run)
            put(store, worker())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    store.close()
    assert set(read(tmp_path).workers) == {"w"}


async def test_store_cancelled_right_after_a_change_still_writes_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await trio.testing.wait_all_tasks_blocked()
        put(store, worker())
        nursery.cancel_scope.cancel()
    store.close()
    assert set(read(tmp_path).workers) == {"w"}


# ---- watching ------------------------------------------------------------------------------------------------------


def kinds(changes: ChangeFeed) -> list[tuple[str, int]]:
    """Return the changes that a watcher has received: their types, and the versions of the VM."""
    found: list[tuple[str, int]] = []
    while True:
        try:
            change = changes.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return found
        noun = change.new or change.old
        assert isinstance(noun, VM)
        assert change.json == encode_object(noun)
        found.append((change.type, noun.meta.version))


async def test_watcher_gets_each_change_once_in_order_when_durable(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
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


async def test_changes_carry_the_revision_of_their_transaction(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    revisions: list[list[int]] = []
    store.on_commit(lambda changes: revisions.append([change.revision for change in changes]))
    put(store, pending("a"), worker("a"))
    delete(store, store.state.vms["a"])
    assert revisions == [[1, 1], [2]]
    store.close()


async def test_slow_watcher_is_closed_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.state.changes, "WATCH_BACKLOG", 3)
    async with running_store(open_store(tmp_path)) as store:
        with store.watch("vm", "a") as slow, store.watch("vm", "a") as quick:
            put(store, pending("a"))
            for version in range(2, 9):
                put(store, store.state.vms["a"])
                await store.wait_durable()
                assert kinds(quick)[-1] == ("MODIFIED", version)
            assert kinds(slow) == [("ADDED", 1), ("MODIFIED", 2), ("MODIFIED", 3)]
            with pytest.raises(trio.EndOfChannel):
                slow.receive_nowait()


async def test_slow_watcher_is_bounded_in_bytes_and_so_are_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(encode_object(pending("a")))
    monkeypatch.setattr(orchard.state.changes, "WATCH_BYTES", 2 * size + size // 2)
    monkeypatch.setattr(orchard.state.changes, "ALL_WATCH_BYTES", 5 * size + size // 2)
    async with running_store(open_store(tmp_path)) as store:
        with store.watch("vm", "a") as slow, store.watch("vm", "a") as second, store.watch("vm", "a") as third:
            for _ in range(8):
                put(store, pending("a"))
                await store.wait_durable()
            backlogs = [len(kinds(feed)) for feed in (slow, second, third)]
            assert backlogs == [2, 2, 1]
            for feed in (slow, second, third):
                with pytest.raises(trio.EndOfChannel):
                    feed.receive_nowait()
        with store.watch("vm", "a") as again:
            put(store, pending("a"))
            await store.wait_durable()
            assert len(kinds(again)) == 1, "what the others held is free again"


async def test_watcher_that_closed_its_channel_does_not_disturb_others(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as store:
        with store.watch("vm", "a") as gone, store.watch("vm", "a") as there:
            gone.close()
            put(store, pending("a"))
            await store.wait_durable()
            assert kinds(there) == [("ADDED", 1)]


async def test_watcher_gets_no_undone_change(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FailingDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
        with store.watch("vm", "a") as changes:
            disk.fault = no_space
            put(store, pending("a"))
            await refused_write(store, StorageFullError)
            disk.fault = lambda verb, number: 0
            await wait_not_full(store)
            put(store, worker())
            put(store, pending("a"))
            await store.wait_durable()
            assert kinds(changes) == [("ADDED", 2)]


@pytest.mark.parametrize("image", ["i", ""])
async def test_json_of_a_vm_whose_state_changes_is_that_of_the_object(tmp_path: Path, image: str) -> None:
    store = open_store(tmp_path)
    put(store, VM(pending("a").meta, VMSpec(image=image, labels={"a": "b", "image": "c"}), pending("a").state))
    for message in (',"image":"z', "", '"'):
        vm = store.state.vms["a"]
        put(store, replace(vm, state=replace(vm.state, status_message=message)))
        assert problems_of(store.state) == []
    store.close()


# ---- disks that fail -----------------------------------------------------------------------------------------------


async def test_disk_without_space_refuses_and_undoes_changes_until_there_is_space(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    disk = FailingDisk(torn=True)
    async with running_store(open_store(tmp_path, disk)) as store:
        put(store, running(pending("a")), SETTINGS)
        await store.wait_durable()
        before, index = store.state.tables(), dict(store.state.vms_by_worker["w"])
        disk.fault = no_space
        full = f"cannot write {tmp_path / 'state.jsonl'}: No space left on device"
        # Accepted, since the store has not noticed that the disk is full.
        put(store, pending("b"), ClusterSettings())
        for _ in range(3):
            put(store, failed(store.state.vms["a"]))
            delete(store, store.state.vms["a"])
            error = await refused_write(store, StorageFullError)
            assert str(error) == f"{full}; nothing was changed"
            assert (store.state.tables(), store.state.revision) == (before, 1)
            assert store.state.vms_by_worker == {"w": index}
            assert problems_of(store.state) == []
            # The remaining state is durable, so reads go on.
            await store.wait_durable()
            with pytest.raises(StorageFullError, match="nothing can be added until there is space"):
                put(store, failed(store.state.vms["a"]), ACCOUNT)
            assert (store.state.tables(), store.state.revision) == (before, 1)
        disk.fault = lambda verb, number: 0
        await wait_not_full(store)
        put(store, pending("b"))
        await store.wait_durable()
        assert read(tmp_path).json == store.state.json
        assert set(store.state.vms) == {"a", "b"}


async def test_failed_write_undoes_later_transactions_as_well(tmp_path: Path) -> None:
    disk = FailingDisk()
    going_on = threading.Event()

    def slow_and_bad(verb: str, number: int) -> int:
        going_on.wait()
        return errno.EIO if verb == "write" else 0

    async with running_store(open_store(tmp_path, disk)) as store, trio.open_nursery() as writers:
        refused: list[str] = []

        async def change(vm: VM) -> None:
            put(store, vm)
            await refused_write(store, StorageUnavailableError)
            refused.append(vm.name)

        disk.fault = slow_and_bad
        try:
            for vm in (pending("a"), assigned(pending("a")), pending("b")):
                writers.start_soon(change, vm)
                await trio.testing.wait_all_tasks_blocked()
            assert (store.state.revision, refused) == (3, [])
        finally:
            going_on.set()
    assert sorted(refused) == ["a", "a", "b"]
    assert (store.state.revision, store.state.vms, problems_of(store.state)) == (0, {}, [])


async def test_failed_sync_ends_the_store(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk)

    async def live() -> None:
        async with running_store(store):
            put(store, pending("a"))
            await store.wait_durable()
            disk.fault = lambda verb, number: errno.EIO if verb == "sync" else 0
            put(store, pending("b"))
            with trio.CancelScope(shield=True):
                error = await refused_write(store, StorageUnavailableError)
            disk.fault = lambda verb, number: 0
            calls = len(disk.calls)
            assert set(store.state.vms) == {"a"}
            assert "cannot store anything any more" in str(error)
            assert str(error).endswith("; restart it")
            with pytest.raises(StorageUnavailableError, match="restart it"), store.transaction():
                raise AssertionError("the block was entered")
            # A scheduled write would be waited for without end.
            with pytest.raises(StorageUnavailableError):
                store.touch()
            with trio.CancelScope(shield=True):
                assert str(await refused_write(store, StorageUnavailableError)) == str(error)
            assert len(disk.calls) == calls

    with pytest.raises(BrokenError, match="sync"), unwrap_groups():
        await live()
    assert set(read(tmp_path).vms) in ({"a"}, {"a", "b"})


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("torn", [False, True])
async def test_each_failing_disk_call_loses_no_acknowledged_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, torn: bool, autojump_clock: MockClock
) -> None:
    """Fail each call to the disk once, in transactions and in compactions."""
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 2_000)
    monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    failures: defaultdict[str, set[str]] = defaultdict(set)
    for number in itertools.count():
        directory = tmp_path / f"{number}"
        directory.mkdir()
        disk = FailingDisk(torn=torn)
        disk.fault = fails_at(number, code)
        try:
            store = open_store(directory, disk)
        except (NotWrittenError, BrokenError, OSError):
            failures[disk.failed[0]].add("no start")
            assert read(directory).json == State().json
            continue
        transactions = Transactions(store)
        await transactions.run()
        state = read(directory)
        assert state.json == store.state.json or (transactions.uncertain and state.json == transactions.uncertain[-1])
        if not disk.failed:
            break
        failures[disk.failed[0]].add(transactions.outcome)
    assert failures == {
        # A failed compaction or filling of the reserve refuses nothing. The reserve helps only on a full disk.
        "write": {"no start", "went on"} if code == errno.ENOSPC else {"no start", "refused", "went on"},
        "sync": {"no start", "broken", "went on"},
        "replace": {"no start", "went on"},
        "sync_directory": {"no start", "broken"},
    }


@dataclass
class Transactions:
    """Transactions one after another, and what became of them."""

    store: Store
    uncertain: list[Tables] = field(default_factory=list)
    outcome: str = "went on"

    async def run(self) -> None:
        try:
            with unwrap_groups():
                async with running_store(self.store):
                    with trio.CancelScope(shield=True):
                        for step in range(8):
                            await self.step(step)
        except BrokenError:
            assert self.outcome == "broken"
        else:
            assert self.outcome != "broken"

    async def step(self, step: int) -> None:
        store, state = self.store, self.store.state
        if store.broken:
            return
        await wait_not_full(store)
        before = state.tables()
        put(store, worker("w", vms=step), running(pending(f"vm{step % 3}")), pending("other"))
        wanted = state.tables()
        try:
            await store.wait_durable()
        except StorageError:
            self.outcome = "broken" if store.broken else "refused"
            assert state.tables() == before
            self.uncertain += [wanted] if store.broken else []
        else:
            assert state.tables() == wanted
        assert problems_of(state) == []


# ---- power cuts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_power_cut_at_any_moment_keeps_acknowledged_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 3_000)
    monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    order = random.Random(seed)
    directory, after = tmp_path / "data", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    history: dict[int, Tables] = {0: State().tables()}
    # The last revision that was acknowledged.
    told = 0
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
    async with running_store(open_store(directory, disk)) as store:
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


class KilledError(Exception):
    """Ends the process at this point."""


@pytest.mark.parametrize("end", [KilledError(), OSError(errno.EIO, "an error of the disk")])
@pytest.mark.parametrize("during", ["sync", "sync_directory"])
async def test_power_cut_after_a_restart_keeps_what_the_restart_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Exception, during: str
) -> None:
    """Read data that a previous process may have left in the page cache only."""
    # In a compaction.
    if during == "sync_directory":
        monkeypatch.setattr(state_file, "COMPACT_BYTES", 0)
        monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    monkeypatch.setattr(orchard.store, "BROKEN_DELAY", 0.0)
    directory, after = tmp_path / "data", tmp_path / "after"
    directory.mkdir()
    after.mkdir()
    # What may be found: the last acknowledged state, and those that have not been acknowledged since.
    possible = [State().tables()]

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
        async with running_store(open_store(directory, disk)) as store:
            add(store, "a")
            await settle(store)
            disk.faults[during] = end
            with suppress(StorageError):
                for number in itertools.count():
                    add(store, f"b{number}")
                    await settle(store)
            await trio.sleep_forever()

    disk = CrashDisk(directory, lost_power)
    with pytest.raises(KilledError if isinstance(end, KilledError) else BrokenError), unwrap_groups():
        await be_cut_short()
    disk.faults.clear()
    async with running_store(open_store(directory, disk)) as store:
        # From now on the state may be shown to clients.
        possible[:] = [store.state.tables()]
        disk.cut_power()
        add(store, "c")
        await settle(store)
        disk.cut_power()


# ---- a long life ---------------------------------------------------------------------------------------------------


class RandomOperations:
    """Random operations on a store, and a dict with the expected objects."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.order = random.Random(seed)
        self.disk = FailingDisk(torn=True)
        self.store = open_store(directory, self.disk)
        self.held: dict[tuple[str, str], object] = {}
        self.durable = dict(self.held)
        self.reopened = 0

    async def run(self, steps: int) -> None:
        while steps > 0:
            async with running_store(self.store):
                for _ in range(self.order.randrange(1, 40)):
                    steps -= 1
                    await self.step()
                    self.check(self.held)
                await self.store.wait_durable()
                self.durable = dict(self.held)
            self.store = open_store(self.directory, self.disk)
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
            self.disk.fault = no_space
            for _ in range(self.order.randrange(1, 4)):
                self.change()
            await refused_write(self.store, StorageFullError)
            self.held = dict(self.durable)
            self.disk.fault = lambda verb, number: 0
            await wait_not_full(self.store)

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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_random_operations_and_restarts_match_a_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 20_000)
    monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    operations = RandomOperations(tmp_path, seed)
    await operations.run(200)
    operations.store.close()
    assert operations.reopened > 3
    assert operations.disk.calls.count("replace") > 2


# ---- the invariants -------------------------------------------------------------------------------------------------


def test_check_reports_wrong_json_and_index() -> None:
    state = State()
    state.revision = 1
    vm = replace(running(pending("a")), meta=replace(pending("a").meta, version=1))
    state.apply("vm", "a", vm, encode_object(vm))
    assert check(state) == []
    state.json["vm"]["a"] = b"{}"
    assert check(state) == ['the JSON of vm "a" is not that of the object']
    state.json["vm"]["a"] = encode_object(vm)
    del state.vms_by_worker["w"]
    assert check(state) == [
        'VM "a" is missing in the index of worker "w"',
        "0 VMs are indexed by worker, but 1 are assigned",
    ]
