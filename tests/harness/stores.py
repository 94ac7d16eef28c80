"""Stores in tests: open one in a directory, change it, and read what a restart would find."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from harness.disks import UnsyncedDisk
from harness.strategies import BEGAN
from orchard.schema import VM, ClusterSettings, HostDirPolicy, ServiceAccount, Worker
from orchard.storage.errors import StorageError
from orchard.storage.file_engine import UPKEEP_SECONDS, FileEngine
from orchard.storage.journal import Disk
from orchard.storage.records import RunInThread
from orchard.store import State, Store, check

ACCOUNT = ServiceAccount(name="a", token="secret", roles=("compute:read",))
SETTINGS = ClusterSettings(host_dir_policies=(HostDirPolicy("/x"),))

ErrorT = TypeVar("ErrorT", bound=StorageError)


def open_store(
    directory: Path, disk: Disk | None = None, in_thread: RunInThread = trio.to_thread.run_sync
) -> Store:  # fmt: skip
    """Open a store on the file engine, by default on a disk without fsyncs."""
    return result_of(Store.open(FileEngine(directory, disk or UnsyncedDisk(), in_thread), BEGAN))


def result_of(loading: Coroutine[Any, Any, Store]) -> Store:
    """Return the store that `Store.open` opens, also outside of trio: the file engine loads without waiting."""
    try:
        loading.send(None)
    except StopIteration as done:
        store: Store = done.value
        return store
    raise AssertionError("the store waited for something")


@asynccontextmanager
async def running_store(store: Store) -> AsyncIterator[Store]:
    """Run a store, so that its changes become durable; close it afterwards."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()


def put(store: Store, *objects: Any) -> None:
    with store.transaction() as tx:
        for item in objects:
            tx.put(item)


def delete(store: Store, *objects: VM | Worker | ServiceAccount) -> None:
    with store.transaction() as tx:
        for item in objects:
            tx.delete(item)


def read(directory: Path) -> State:
    """Return the state that a restart would find, after checking it."""
    store = open_store(directory)
    store.close()
    assert problems_of(store.state) == []
    return store.state


def problems_of(state: State) -> list[str]:
    """Return what `check` finds, and whether the index by worker differs from one that is built anew."""
    by_worker: defaultdict[str, dict[str, VM]] = defaultdict(dict)
    for vm in state.vms.values():
        if vm.state.worker:
            by_worker[vm.state.worker][vm.name] = vm
    return check(state) + ["the index differs"] * (by_worker != state.vms_by_worker)


async def wait_not_full(store: Store) -> None:
    """Wait until the store accepts additions again. For a test with a clock that jumps."""
    with trio.fail_after(3600):
        while store.full:  # noqa: ASYNC110 -- the store has no event for it
            await trio.sleep(UPKEEP_SECONDS / 4)


async def refused_write(store: Store, kind: type[ErrorT]) -> ErrorT:
    """Wait for a write that fails; return the error that the waiting task gets."""
    with pytest.raises(kind) as refused:
        await store.wait_durable()
    assert type(refused.value) is kind
    return refused.value
