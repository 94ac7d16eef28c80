"""Watchers that are slow, cut off anywhere, and resume, while changes are undone and the controller is killed.

Each sees what became durable: every change once and in order since its last list, or is told to list again. The store
and its file are real. Only its thread is replaced, so that a run can be repeated.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing
from harness.disks import FailingDisk
from harness.stores import open_store
from harness.strategies import QUICK, pending, worker
from hypothesis import given, settings
from hypothesis import strategies as st

import orchard.state.change_log
from orchard.schema import VM, Worker
from orchard.state.change_log import ChangeLog, RevisionGoneError, Selection, Snapshot, follow, send_present
from orchard.state.changes import Change
from orchard.state.watchers import Block
from orchard.storage.errors import StorageError

EVEN = Selection(frozenset({"vm", "worker"}), "even", lambda vm: vm.spec.cpu % 2 == 0)
SELECTIONS = (Selection(frozenset({"vm", "worker"})), EVEN, Selection(frozenset({"worker"})))
SILENCE = 20.0


class Killed(BaseException):
    """The process of the controller has ended."""


class Controller:
    """A store that can be held up before its next write, fail it, and be killed before or after it."""

    def __init__(self, directory: Path) -> None:
        self.disk = FailingDisk()
        self.store = open_store(directory, self.disk, self._in_thread)
        self.moods: dict[str, int] = {}
        self.store.log.show_worker = self.show
        # The VM changes of this run: those that are durable, and those that are not yet.
        self.durable: list[tuple[str, bytes]] = []
        self.committed: list[tuple[str, bytes]] = []
        self.store.on_commit(lambda changes: self.committed.extend(_vm_lines(changes)))
        self.store.on_durable(self._follow)
        self.store.on_undo(self.committed.clear)
        self._may_write = trio.Event()
        self._may_write.set()
        self._killed = ""

    def show(self, worker: Worker, stored: bytes) -> bytes:
        return b'%b,"mood":%d}' % (stored[:-1], self.moods.get(worker.name, 0))

    def _follow(self, changes: list[Change]) -> None:
        lines = _vm_lines(changes)
        assert self.committed[: len(lines)] == lines
        del self.committed[: len(lines)]
        self.durable += lines

    async def run(self) -> None:
        with suppress(Killed):
            await self.store.run()

    async def _in_thread(self, work: Callable[..., None], *arguments: Any, limiter: trio.CapacityLimiter) -> None:
        await self._may_write.wait()
        if self._killed == "before":
            raise Killed
        work(*arguments)
        if self._killed:
            raise Killed

    def hold(self) -> None:
        if self._may_write.is_set():
            self._may_write = trio.Event()

    def release(self) -> None:
        self._may_write.set()

    def kill(self, moment: str) -> None:
        self._killed = moment
        self.release()

    def shown(self, selection: Selection) -> dict[tuple[str, str], bytes]:
        """Return what a watcher has to know once everything is durable."""
        state = self.store.state
        found = {("vm", vm.name): state.json["vm"][vm.name] for vm in state.vms.values() if selection.includes(vm)}
        workers = {("worker", w.name): self.show(w, state.json["worker"][w.name]) for w in state.workers.values()}
        return {key: text for key, text in {**found, **workers}.items() if key[0] in selection.kinds}


def _vm_lines(changes: list[Change]) -> list[tuple[str, bytes]]:
    return [(change.type, change.json) for change in changes if change.kind == "vm"]


@dataclass
class Watcher:
    """A client that watches, and resumes after the last revision that arrived in a whole line."""

    selection: Selection
    known: dict[tuple[str, str], bytes] = field(default_factory=dict)
    revision: str = ""
    # What has arrived and was not looked at.
    arrived: bytes = b""
    # What was not taken at once.
    rest: bytes = b""
    is_listing: bool = True
    # The VM lines since the last list, and how many changes of VMs came before that in this run of the controller.
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    start: int = 0
    lists: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    may_take: trio.Event = field(default_factory=trio.Event)

    def begin(self, nursery: trio.Nursery, controller: Controller) -> None:
        """Watch until `scope` is cancelled, or until the controller ends the watch."""
        self.may_take.set()
        self.rest = b""
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, controller, self.scope)

    async def _run(self, controller: Controller, scope: trio.CancelScope) -> None:
        log = controller.store.log
        with scope:
            try:
                if not self.revision:
                    raise RevisionGoneError
                self.is_listing = False
                await follow(log, log.position_of(self.revision), self.selection, SILENCE, self)
            except RevisionGoneError:
                await self._list(controller, log)

    async def _list(self, controller: Controller, log: ChangeLog) -> None:
        self.revision, self.is_listing, self.known, self.seen = "", True, {}, []
        self.lists += 1
        state = controller.store.state
        vms = list(state.vms.values()) if "vm" in self.selection.kinds else []
        workers = [[controller.show(w, state.json["worker"][w.name])] for w in state.workers.values()]
        self.start = len(controller.durable) + len(controller.committed)
        snapshot = Snapshot(
            log.last,
            vms,
            [state.json["vm"][vm.name] for vm in vms],
            workers if "worker" in self.selection.kinds else [],
        )
        try:
            await controller.store.wait_durable()
        except StorageError:
            return
        await send_present(log, snapshot, self.selection, SILENCE, self)

    async def __call__(self, block: Block) -> None:
        await self.may_take.wait()
        await trio.lowlevel.checkpoint()
        self.arrived += self.rest + (block if isinstance(block, bytes) else b"".join(block))
        self.rest = b""

    def now(self, block: Block) -> bool:
        """Take the whole block, half of it if the watcher is slow."""
        assert not self.rest
        whole = block if isinstance(block, bytes) else b"".join(block)
        taken = len(whole) // (1 if self.may_take.is_set() else 2)
        self.arrived += whole[:taken]
        self.rest = whole[taken:]
        return not self.rest

    def read(self, share: float = 1.0) -> None:
        """Look at a share of what has arrived, from its beginning; the rest is lost. Half a transaction is none."""
        lines = self.arrived[: round(len(self.arrived) * share)].split(b"\n")[:-1]
        whole: list[dict[str, Any]] = []
        for number, line in enumerate(lines):
            parsed = json.loads(line)
            whole.append({**parsed, "raw": line})
            if "revision" in parsed:
                self._apply(whole)
                whole = []
            elif self.is_listing:
                assert parsed["type"] == "ADDED", number
        if share == 1.0:
            assert not whole or self.is_listing
            self.arrived = b"".join(line["raw"] + b"\n" for line in whole)
        else:
            self.arrived = b""

    def _apply(self, lines: list[dict[str, Any]]) -> None:
        revision = lines[-1]["revision"]
        run, _, number = revision.partition(".")
        if self.revision:
            before = self.revision.partition(".")
            is_bookmark = lines[-1]["type"] == "BOOKMARK"
            assert run == before[0]
            assert int(number) > int(before[2]) or (is_bookmark and number == before[2])
        self.revision = revision
        for line in lines:
            if line["type"] == "BOOKMARK":
                self.is_listing = False
                continue
            key = (line["kind"], line["object"]["name"])
            text = line["raw"][line["raw"].index(b'"object":') + 9 :]
            tail = b',"revision":"%b"}' % revision.encode() if "revision" in line else b"}"
            text = text.removesuffix(tail)
            assert (key in self.known) == (line["type"] != "ADDED"), line
            if line["type"] == "DELETED":
                del self.known[key]
            else:
                self.known[key] = text
            if not self.is_listing and key[0] == "vm":
                self.seen.append((line["type"], text))

    def check(self, controller: Controller) -> None:
        """Check that the watcher knows what is stored, and that it has seen each change of a VM once and in order."""
        assert self.known == controller.shown(self.selection)
        if self.selection is SELECTIONS[0]:
            assert self.seen == controller.durable[self.start :]


NAMES = st.sampled_from("abc")
WATCHER = st.integers(0, len(SELECTIONS) - 1)
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(1, 4)),
    st.tuples(st.just("put"), NAMES, st.integers(1, 4)),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("many"), st.integers(1, 4)),
    st.tuples(st.just("worker"), NAMES, st.booleans()),
    st.tuples(st.just("delete worker"), NAMES),
    st.tuples(st.just("mood"), NAMES),
    st.tuples(st.sampled_from(["hold", "release", "fail", "settle"])),
    st.tuples(st.just("kill"), st.sampled_from(["before", "after"])),
    st.tuples(st.just("stall"), WATCHER),
    st.tuples(st.just("cut"), WATCHER, st.floats(0, 1)),
)


class Attack:
    """Carries out steps against a controller and its watchers."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        self.watchers = [Watcher(selection) for selection in SELECTIONS]
        self.controller = self._start()

    def _start(self) -> Controller:
        controller = Controller(self.directory)
        self.nursery.start_soon(controller.run)
        for watcher in self.watchers:
            watcher.begin(self.nursery, controller)
        return controller

    async def carry_out(self, step: tuple[Any, ...]) -> None:
        store = self.controller.store
        vms, workers = store.state.vms, store.state.workers
        match step:
            case ("put", name, cpu):
                vm = vms.get(name) or pending(name)
                self._commit(put=[VM(vm.meta, replace(vm.spec, cpu=cpu), vm.state)])
            case ("delete", name):
                self._commit(delete=[vms[name]] if name in vms else [])
            case ("many", cpu):
                self._commit(
                    put=[VM(vm.meta, replace(vm.spec, cpu=cpu), vm.state) for vm in vms.values()]
                    + [replace(w, scheduling_paused=cpu == 1) for w in workers.values()]
                )
            case ("worker", name, paused):
                self._commit(put=[replace(workers.get(name) or worker(name), scheduling_paused=paused)])
            case ("delete worker", name):
                self._commit(delete=[workers[name]] if name in workers else [])
            case ("mood", name):
                self.controller.moods[name] = self.controller.moods.get(name, 0) + 1
                store.touch_worker(name)
            case ("hold",):
                self.controller.hold()
            case ("release",):
                self.controller.release()
            case ("fail",):
                self.controller.disk.fault = self._fail_once
            case ("settle",):
                await self.settle()
            case ("kill", moment):
                await self._kill(moment)
            case ("stall", number) if self.watchers[number].may_take.is_set():
                self.watchers[number].may_take = trio.Event()
            case ("cut", number, share):
                await self._cut(self.watchers[number], share)
        await trio.testing.wait_all_tasks_blocked()

    def _commit(self, put: list[Any] | None = None, delete: list[Any] | None = None) -> None:
        with self.controller.store.transaction() as tx:
            for item in put or ():
                tx.put(item)
            for item in delete or ():
                tx.delete(item)

    def _fail_once(self, verb: str, number: int) -> int:
        if verb != "write":
            return 0
        self.controller.disk.fault = lambda verb, number: 0
        return errno.EIO

    async def _cut(self, watcher: Watcher, share: float) -> None:
        watcher.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        watcher.read(share * 0.999)
        watcher.begin(self.nursery, self.controller)

    async def _kill(self, moment: str) -> None:
        self.controller.hold()
        for watcher in self.watchers:
            watcher.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        for watcher in self.watchers:
            watcher.read(0.999)
        self.controller.kill(moment)
        # A write that has begun ends or does not; without one there is nothing that the kill could interrupt.
        await trio.testing.wait_all_tasks_blocked()
        self.controller.store.close()
        self.controller = self._start()

    async def settle(self) -> None:
        """Let everything become durable, watchers that have ended resume, and check what they know."""
        self.controller.release()
        while True:
            with suppress(StorageError):
                await self.controller.store.wait_durable()
                break
        for watcher in self.watchers:
            watcher.may_take.set()
        await trio.testing.wait_all_tasks_blocked()
        for watcher in self.watchers:
            await self._cut(watcher, 1.0)
        await trio.testing.wait_all_tasks_blocked()
        for watcher in self.watchers:
            watcher.read()
            watcher.check(self.controller)


async def attack(steps: list[tuple[Any, ...]]) -> None:
    with TemporaryDirectory() as directory:
        async with trio.open_nursery() as nursery:
            running = Attack(Path(directory), nursery)
            for step in steps:
                await running.carry_out(step)
            await running.settle()
            running.controller.store.close()
            nursery.cancel_scope.cancel()


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchard.state.change_log, "KEPT_CHANGES", 5)
    monkeypatch.setattr(orchard.state.change_log, "WATCH_BACKLOG", 2)
    monkeypatch.setattr(orchard.state.change_log, "_BLOCK_BYTES", 1500)
    monkeypatch.setattr(orchard.state.change_log, "_BLOCK_OBJECTS", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("small_log")
@settings(QUICK, max_examples=60)
@given(st.lists(STEPS, min_size=5, max_size=40))
def test_watchers_see_each_durable_change_once_in_order_or_list_again(steps: list[tuple[Any, ...]]) -> None:
    trio.run(attack, steps)
