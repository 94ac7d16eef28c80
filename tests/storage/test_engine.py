"""The file engine: the format of the state file, compaction, backups, and damaged or foreign contents."""

from __future__ import annotations

import datetime
import errno
import itertools
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import FailingDisk, HeldDisk, SmallDisk, UnsyncedDisk, no_space
from harness.stores import ACCOUNT, delete, open_store, put, read, refused_write, running_store, wait_not_full
from harness.strategies import BEGAN, QUICK, assigned, failed, pending, worker
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from orchard.base.files import RESERVE_FILE, STATE_FILE
from orchard.base.nursery import unwrap_groups
from orchard.codec import dump_json
from orchard.storage import file_engine, state_file
from orchard.storage.engine import Batch
from orchard.storage.errors import BrokenError, DamagedError, NotWrittenError, StorageFullError, StorageUnavailableError
from orchard.storage.journal import Disk, Journal
from orchard.storage.state_file import STATE_VERSION, StateFile, snapshot_lines
from orchard.store import encode_object


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the tests by a small reserve; test_disk_full.py has one of the usual size."""
    monkeypatch.setattr(state_file, "RESERVE_BYTES", 10_000)


# ---- the engine alone ----------------------------------------------------------------------------------------------


def begun(directory: Path, disk: Disk | None = None) -> StateFile:
    """Return an engine that has created a state file, or taken over one without objects."""
    file = StateFile(directory, disk or UnsyncedDisk())
    assert file.load().objects == {}
    file.begin({}, BEGAN)
    return file


def batch(revision: int, *names: str, size: int = 2) -> Batch:
    """Return a batch of one transaction that puts objects of `size` bytes."""
    made = Batch(revision - 1, revision)
    for name in names:
        made.record(("vm", name), b'{"x":"%b"}' % (b"x" * (size - 8)) if size > 8 else b"{}", is_new=True)
    return made


def objects_in(directory: Path) -> tuple[int, set[tuple[str, str]]]:
    contents = StateFile(directory, UnsyncedDisk()).load()
    return contents.revision, set(contents.objects)


def test_load_changes_nothing_and_begin_cuts_off_an_unfinished_line(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.append(batch(1, "a"))
    first.close()
    path = tmp_path / STATE_FILE
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"sum":"')
    second = StateFile(tmp_path, UnsyncedDisk())
    contents = second.load()
    assert (contents.revision, set(contents.objects), contents.lines) == (1, {("vm", "a")}, 2)
    assert path.read_bytes() == complete + b'{"sum":"'
    second.begin({"vm": {"a": b"{}"}}, BEGAN)
    assert path.read_bytes() == complete
    second.append(batch(2, "b"))
    second.close()
    assert objects_in(tmp_path) == (2, {("vm", "a"), ("vm", "b")})


def test_object_created_and_deleted_in_one_batch_leaves_no_record(tmp_path: Path) -> None:
    file = begun(tmp_path)
    made = batch(1, "a", "b")
    made.record(("vm", "a"), None)
    file.append(made)
    made = Batch(1, 2)
    made.record(("vm", "b"), None)
    made.record(("vm", "b"), b"{}", is_new=True)
    made.record(("vm", "b"), None)
    assert made.records == {("vm", "b"): None}
    file.append(made)
    file.close()
    assert objects_in(tmp_path) == (2, set())


TEXTS = st.sampled_from(['"', '},{"put":"vm","name":"a","object":{', '"}]}', "\\", "\u00e4\n", "x", "y", "\u00e4"])


def objects_of(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["put", "delete", "name", "object", "changes"]), inner, max_size=2)


VALUES = st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=2) | objects_of(inner), max_leaves=4)


@settings(QUICK, max_examples=50)
@given(
    st.lists(st.dictionaries(TEXTS, st.none() | objects_of(VALUES), min_size=1, max_size=3), max_size=6), st.booleans()
)
def test_what_was_written_is_read(written: list[dict[str, dict[str, Any] | None]], timed: bool) -> None:
    with TemporaryDirectory() as directory:
        file, known = begun(Path(directory)), {}
        for revision, changes in enumerate(written, 1):
            made = Batch(revision - 1, revision, time=BEGAN if timed else None)
            for name, item in changes.items():
                if item is not None:
                    known[name] = item
                elif known.pop(name, None) is None:
                    continue
                made.record(("vm", name), None if item is None else dump_json(item))
            file.append(made)
        file.close()
        contents = StateFile(Path(directory), UnsyncedDisk()).load()
    assert contents.revision == len(written)
    assert {name: item for (_, name), (_, item) in contents.objects.items()} == known


def test_object_that_is_not_json_is_refused_with_its_place_unless_it_is_outdated(tmp_path: Path) -> None:
    begun(tmp_path).close()
    journal = Journal(tmp_path / STATE_FILE, UnsyncedDisk())
    list(journal.read())
    journal.open_for_append()
    line = b'{"after":%d,"revision":%d,"changes":[{"put":"vm","name":"a","object":{%b}}]}'
    places = [journal.size]
    for revision, text in enumerate((b'"x":', b'"x":1'), 1):
        journal.append([line % (revision - 1, revision, text)])
        places.append(journal.size)
    assert StateFile(tmp_path, UnsyncedDisk()).load().objects["vm", "a"] == (places[1], {"x": 1})
    journal.append([line % (2, 3, b'"x":')])
    journal.close()
    with pytest.raises(DamagedError) as damaged:
        StateFile(tmp_path, UnsyncedDisk()).load()
    assert f"byte {places[2]}" in str(damaged.value)


@pytest.mark.parametrize("compacts", [False, True])
def test_wall_time_of_the_last_write_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compacts: bool
) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 0 if compacts else 10_000)
    monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    file = begun(tmp_path)
    assert StateFile(tmp_path, UnsyncedDisk()).load().time == BEGAN
    later = BEGAN + datetime.timedelta(hours=1)
    for revision, time in ((1, later), (2, later), (3, None)):
        made = batch(revision, "a")
        made.time = time
        file.append(made)
    file.close()
    assert StateFile(tmp_path, UnsyncedDisk()).load().time == later


def test_compaction_in_place_of_the_reserve_fills_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 2_000)
    monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    disk = SmallDisk(tmp_path, 100_000)
    file = begun(tmp_path, disk)
    path, revision = tmp_path / STATE_FILE, 0
    while path.stat().st_size <= 2_000:
        revision += 1
        file.append(batch(revision, "a", size=200))
    # The snapshot does not fit beside the old file, unless the reserve makes space for it.
    disk.room -= disk.free()
    file.append(batch(revision + 1, "a", size=200))
    assert path.stat().st_size < 1_000
    assert (tmp_path / "reserve").stat().st_size == 10_000
    assert file.full == ""
    file.close()
    assert objects_in(tmp_path) == (revision + 1, {("vm", "a")})


def test_missing_state_file_beside_a_reserve_is_reported(tmp_path: Path) -> None:
    begun(tmp_path).close()
    (tmp_path / STATE_FILE).unlink()
    with pytest.raises(DamagedError, match="the file is missing in a directory that a controller has used"):
        StateFile(tmp_path, UnsyncedDisk()).load()


# ---- compaction ----------------------------------------------------------------------------------------------------


async def test_compaction_bounds_the_file_by_the_size_of_its_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 5_000)
    path = tmp_path / "state.jsonl"
    sizes = []
    for start in range(6):
        async with running_store(open_store(tmp_path)) as store:
            for number in range(20):
                put(store, worker("w", vms=100 * start + number))
                await store.wait_durable()
                sizes.append(path.stat().st_size)
    assert max(sizes) < 6_000, "restarts put compaction off"
    compactions = sum(before > after for before, after in itertools.pairwise(sizes))
    assert 2 < compactions < 10, "too rare to bound the file, or so frequent that they cost more than the writes"
    assert read(tmp_path).workers["w"].resources == worker("w", vms=519).resources


async def test_snapshot_excludes_later_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 0)
    monkeypatch.setattr(state_file, "COMPACT_RATIO", 0)
    going_on = threading.Event()
    taken: list[list[bytes]] = []

    def slow(*arguments: Any) -> list[bytes]:
        going_on.wait()
        taken.append(snapshot_lines(*arguments))
        return taken[-1]

    async with running_store(open_store(tmp_path)) as store:
        monkeypatch.setattr(state_file, "snapshot_lines", slow)
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


async def test_failed_compaction_is_postponed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "COMPACT_BYTES", 1_000)
    disk = FailingDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
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


async def test_upkeep_of_a_full_disk_waits_for_the_append_under_way(tmp_path: Path) -> None:
    disk, reserve = HeldDisk(), tmp_path / RESERVE_FILE
    engine = file_engine.FileEngine(tmp_path, disk)
    await engine.load()
    await engine.begin({}, BEGAN)
    reserve.unlink()
    async with trio.open_nursery() as nursery:
        with disk.held():
            nursery.start_soon(engine.append, batch(1, "a"))
            await trio.testing.wait_all_tasks_blocked()
            engine.full = "no space"
            nursery.start_soon(engine.run)
            await trio.testing.wait_all_tasks_blocked()
            assert not reserve.exists()
        # The append has found space, so only the upkeep that waited for it fills the reserve.
        while not reserve.exists():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    engine.close()


async def run_inline(work: Callable[..., Any], *arguments: Any, limiter: object = None) -> Any:
    """Run work without a thread. The mock clock would jump while a thread works."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


class NearlyFullDisk(Disk):
    """A disk that takes at most `most` bytes at a time."""

    most = sys.maxsize

    def write(self, fd: int, data: memoryview) -> int:
        if len(data) > self.most:
            raise OSError(errno.ENOSPC, "no room")
        return super().write(fd, data)


async def test_failed_compaction_on_a_full_disk_writes_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = NearlyFullDisk()
    async with running_store(open_store(tmp_path, disk, run_inline)) as store:
        # After these changes a snapshot would be smaller than the file.
        for _ in range(5):
            put(store, pending("a"))
            await store.wait_durable()
        disk.most = 300
        put(store, failed(store.state.vms["a"]))
        # It fails although all of the reserve was released for it.
        await refused_write(store, StorageFullError)
        size = (tmp_path / "state.jsonl").stat().st_size
        await trio.sleep(3 * file_engine.UPKEEP_SECONDS)
        assert (tmp_path / "state.jsonl").stat().st_size == size
        disk.most = sys.maxsize
        await wait_not_full(store)
        put(store, pending("b"))
        await store.wait_durable()
    assert read(tmp_path).json == store.state.json


async def test_uncertain_compaction_on_a_full_disk_ends_the_store(tmp_path: Path, autojump_clock: MockClock) -> None:
    disk = FailingDisk()
    store = open_store(tmp_path, disk, run_inline)

    async def fill_and_compact() -> None:
        async with running_store(store):
            # After these changes a snapshot is smaller than the file.
            for _ in range(5):
                put(store, pending("a"))
                await store.wait_durable()
            disk.fault = no_space
            put(store, failed(store.state.vms["a"]))
            await refused_write(store, StorageFullError)
            # The reserve cannot be filled, and the compaction that follows fails when the directory is synced.
            codes = iter([errno.ENOSPC])
            disk.fault = lambda verb, number: {"write": next(codes, 0), "sync_directory": errno.EIO}.get(verb, 0)
            await trio.sleep_forever()

    with pytest.raises(BrokenError, match="renaming"), unwrap_groups():
        await fill_and_compact()
    assert store.broken.endswith("restart it")
    with pytest.raises(StorageUnavailableError), store.transaction():
        raise AssertionError("the block was entered")
    assert set(read(tmp_path).vms) == {"a"}


# ---- the file ------------------------------------------------------------------------------------------------------


async def test_state_file_is_readable_json_with_mode_0600(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    async with running_store(open_store(directory)) as store:
        put(store, ACCOUNT, worker())
        await store.wait_durable()
        put(store, pending("a"))
        await store.wait_durable()
        delete(store, worker())
        await store.wait_durable()
    assert (directory / "state.jsonl").stat().st_mode & 0o777 == 0o600
    header, *lines = [json.loads(line) for line in (directory / "state.jsonl").read_text().splitlines()]
    assert (header["format"], header["version"], header["revision"], header["objects"]) == (
        "orchard-state",
        STATE_VERSION,
        0,
        0,
    )
    assert header["written"] == "2026-01-31T12:00:00Z"
    assert [line["revision"] for line in lines] == [1, 2, 3]
    assert lines[1]["changes"] == [
        {"put": "vm", "name": "a", "object": json.loads(encode_object(store.state.vms["a"]))}
    ]
    assert lines[2]["changes"] == [{"delete": "worker", "name": "w"}]


async def test_batch_writes_only_the_last_change_of_each_object(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
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
            *({"put": "vm", "name": name, "object": json.loads(encode_object(vms[name]))} for name in ("new", "there")),
        ]
        assert read(tmp_path).json == store.state.json


async def test_copy_made_during_a_write_is_a_valid_backup(tmp_path: Path) -> None:
    disk = HeldDisk()
    async with running_store(open_store(tmp_path, disk)) as store:
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


async def test_two_stores_writing_one_file_are_detected(tmp_path: Path) -> None:
    async with running_store(open_store(tmp_path)) as one, running_store(open_store(tmp_path)) as other:
        for store in (one, other):
            put(store, pending("a"))
            await store.wait_durable()
    with pytest.raises(DamagedError, match="does not fit the line and the one before it"):
        read(tmp_path)


def written(directory: Path, *lines: dict[str, Any], **header: Any) -> Path:
    """Write a file whose lines have valid checksums."""
    path = directory / "state.jsonl"
    plain: dict[str, Any] = json.loads(snapshot_lines({}, 0, BEGAN)[0])
    journal = Journal(path, Disk())
    journal.create([json.dumps(line).encode() for line in [{**plain, **header}, *lines]])
    journal.close()
    return path


VM_A = json.loads(encode_object(replace(pending("a"), meta=replace(pending("a").meta, version=1))))
PUT_A = {"put": "vm", "name": "a", "object": VM_A}


async def test_file_of_an_older_version_is_replaced_before_anything_is_added(tmp_path: Path) -> None:
    vm = {**VM_A, "generation": 1, "observedGeneration": 1}
    path = written(tmp_path, {**PUT_A, "object": vm}, version=1, revision=7, objects=1)
    async with running_store(open_store(tmp_path)) as store:
        header, *_ = [json.loads(line) for line in path.read_text().splitlines()]
        assert (header["version"], header["revision"], header["objects"]) == (STATE_VERSION, 7, 1)
        assert (store.state.vms["a"].meta.generation, store.state.vms["a"].state.observed_generation) == (1, 1)
        put(store, pending("b"))
        await store.wait_durable()
    assert set(read(tmp_path).vms) == {"a", "b"}


def test_file_of_an_older_version_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path, PUT_A, version=1, revision=7, objects=1)
    before = path.read_bytes()
    disk = FailingDisk()
    disk.fault = lambda verb, number: errno.EROFS if verb == "replace" else 0
    with pytest.raises(NotWrittenError):
        open_store(tmp_path, disk)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "header", "told"),
    [
        ([], {"version": 5}, "version 5 is newer than the version 4 that this program knows at byte 0; start the Orchard that wrote it"),
        ([], {"format": "orchard-events"}, 'the format is not "orchard-state"'),
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
        ([{"revision": 1, "changes": [{**PUT_A, "name": "b"}]}], {}, 'VM "b" has the name "a"'),
        ([PUT_A], {"objects": 1}, 'VM "a" has version 1 in a state of revision 0'),
        ([PUT_A, {**PUT_A, "name": "b"}], {"objects": 2, "revision": 1}, 'has the uid "uid-a" of VM "a"'),
        ([{**PUT_A, "object": {**VM_A, "worker": "w"}}], {"objects": 1, "revision": 1}, "contradicts its condition scheduled"),
        ([{"put": "account", "name": "a", "object": {"name": "a"}}], {"objects": 1}, "has no token"),
        ([{"put": "worker", "name": "a", "object": {"name": "b"}}], {"objects": 1}, 'worker "a" has the name "b"'),
    ],
)  # fmt: skip
def test_state_file_with_invalid_contents_is_refused(
    tmp_path: Path, lines: list[dict[str, Any]], header: dict[str, Any], told: str
) -> None:
    path = written(tmp_path, *lines, **header)
    before = path.read_bytes()
    with pytest.raises(DamagedError) as damaged:
        read(tmp_path)
    assert str(damaged.value).startswith(f"{path}: ")
    assert told in str(damaged.value)
    assert path.read_bytes() == before


def test_state_file_with_batches_of_several_revisions_is_read(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("cut", [0, 1, 50])
def test_truncated_snapshot_is_refused(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path, PUT_A, objects=1, revision=1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedError, match=r"ends in the middle of its snapshot at byte 0; restore"):
        read(tmp_path)
