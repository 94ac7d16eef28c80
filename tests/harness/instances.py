"""Instances of VMs on a host of the test: what they report, what their scripts print, and the worker's end."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from harness.processes import eventually
from orchard import transitions
from orchard.resources.validation import patched_spec, vm_from_client
from orchard.schema import VM, Event, HostDirPolicy, Worker
from orchard.vm.driver import Driver, LocalState
from orchard.vm.images import ImageCache
from orchard.vm.instance import Instance, InstanceHost
from orchard.vm.synthetic import SyntheticDriver

BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
WORKER = Worker(name="w", default_cpu=3, default_memory=1024)


def uid_of(name: str) -> str:
    # With the process number, so that the processes of two test runs differ.
    return f"uid-{os.getpid()}-{name}"


def assigned_vm(name: str = "vm", **spec: object) -> VM:
    """Return a VM as the controller sends it to a worker."""
    wanted = vm_from_client({"name": name, "image": "image", **spec}, [])[1]
    return transitions.assign(transitions.create(name, uid_of(name), wanted, BEGAN), WORKER, BEGAN)


def changed(vm: VM, **patch: object) -> VM:
    """Return the next generation of a VM."""
    return transitions.change(vm, patched_spec(vm.spec, patch, []))


class Host:
    """A host with a driver, and the reports and the script output of the instances on it.

    While `hold_delivery` is an unset event, output is not accepted. `runs` is set when an instance reports that it runs, and
    `freed` when one has ended.
    """

    def __init__(self, home: Path, driver: Driver | None = None, **options: Any) -> None:
        self.home = home
        self.driver = driver or SyntheticDriver(home, **options)
        self.reports: list[dict[str, Any]] = []
        self.lines: list[str] = []
        # What has failed and not succeeded since: (kind, VM or "") -> message.
        self.troubles: dict[tuple[str, str], str] = {}
        self.policies: Sequence[HostDirPolicy] | None = None
        self.hold_delivery: trio.Event | None = None
        self.runs, self.freed = trio.Event(), trio.Event()

    def instance(self, vm: VM, *, found: LocalState | None = None, outlives: bool = True) -> Instance:
        def changed() -> None:
            self.record_report(instance)

        async def fetch_policies() -> Sequence[HostDirPolicy] | None:
            return self.policies

        host = InstanceHost(
            worker="w",
            driver=self.driver,
            changed=changed,
            freed=lambda _: self.freed.set(),
            task_ended=lambda _: None,
            send_events=self.send,
            note_trouble=self.note_trouble,
            fetch_policies=fetch_policies,
            clock=lambda: 1_700_000_000.5,
            images=ImageCache(self.driver, self.note_trouble, changed),
            outlives=outlives,
        )
        instance = Instance(vm, host, found=found)
        return instance

    def note_trouble(self, kind: str, vm: str, message: str) -> None:
        self.troubles.pop((kind, vm), None)
        if message:
            self.troubles[kind, vm] = message

    def record_report(self, instance: Instance) -> None:
        self.reports.append(instance.report())
        if instance.state.running:
            self.runs.set()

    async def send(self, vm: VM, events: Sequence[Event]) -> None:
        if self.hold_delivery is not None:
            await self.hold_delivery.wait()
        assert {(event.kind, event.timestamp) for event in events} == {("log_line", 1_700_000_000)}
        self.lines += [event.payload for event in events]

    def history(self) -> list[tuple[str, str, bool, int]]:
        """Return what was reported, without repetitions."""
        told = [
            (r["status"], r["status_message"], r["conditions"][0]["state"] == "true", r["observedGeneration"])
            for r in self.reports
        ]
        return [one for one, _ in itertools.groupby(told)]

    def vm_json(self, instance: Instance) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / instance.name / "vm.json").read_text())
        return found

    def files(self) -> list[Path]:
        return list(self.home.iterdir()) if self.home.exists() else []


@asynccontextmanager
async def tended(host: Host, vm: VM, slots_free: trio.Event | None = None) -> AsyncIterator[Instance]:
    """Create a VM at the beginning of the block and remove it at its end."""
    instance = host.instance(vm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend, slots_free, "waiting for orchard-old to end")
        yield instance
        instance.remove()


async def until(instance: Instance, holds: Callable[[Instance], bool]) -> None:
    await eventually(lambda: holds(instance))


@asynccontextmanager
async def left_by_a_worker(host: Host, vm: VM, *, outlives: bool = True) -> AsyncIterator[Instance]:
    """Create a VM at the beginning of the block; at its end the worker ends."""
    instance = host.instance(vm, outlives=outlives)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        await until(instance, lambda i: i.state.running)
        yield instance
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def adopted(host: Host, vm: VM) -> AsyncIterator[Instance]:
    """Adopt a VM at the beginning of the block and remove it at its end."""
    instance = host.instance(vm, found="running")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.tend)
        yield instance
        instance.remove()
