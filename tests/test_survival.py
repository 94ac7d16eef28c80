"""VMs outlive their worker, and never run twice: real processes, stopped, killed and frozen at bad moments.

The hypervisor is the stand-in for tart: a VM is a process with a guard, in a session of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
from processes import GENEROUS, Role, controller, eventually, processes_in, started

from orchard import guard
from orchard.client import Client
from orchard.life import SHUT_DOWN, STOPPED
from orchard.schema import VM
from orchard.worker import architecture

STANDIN = Path(__file__).parent / "standin" / "tart"
PATIENCE = 2.0  # seconds after which the controller calls a worker offline, where that is to happen


class Site:
    """A controller, and a host on which workers come and go."""

    def __init__(self, home: Path, url: str, client: Client) -> None:
        self.home = home
        self.tart_home = home / "tart-home"
        self.url = url
        self.client = client
        self.environ = {
            "TART_HOME": str(self.tart_home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it is called often: by the Python at hand
        }

    def worker(self, *arguments: str, **environ: str) -> AbstractContextManager[Role]:
        words = (self.url, "--tart", str(STANDIN), "--name", "mac", *arguments)
        return started("worker", *words, home=self.home, env={**self.environ, **environ})

    def states(self) -> dict[str, str]:
        """What tart says of its VMs."""
        listed = subprocess.run(
            [STANDIN, "list"], env={**os.environ, **self.environ}, capture_output=True, text=True, check=True
        )
        return {vm["Name"]: vm["State"] for vm in json.loads(listed.stdout)}

    async def create(self, name: str, policy: str = "Never") -> VM:
        await self.client.vms.create(name=name, image="example.com/i", restart_policy=policy, arch=architecture())
        return await self.client.vms.wait(name)

    async def vm(self, name: str, holds: Callable[[VM], bool]) -> VM:
        """Follow a VM until something holds of it."""
        with trio.fail_after(GENEROUS):
            async with self.client.vms.watch(name) as changes:
                async for _, vm in changes:
                    if holds(vm):
                        return vm
        raise AssertionError("the watch ended")


@asynccontextmanager
async def site(home: Path, patience: float = 1000.0) -> AsyncIterator[Site]:
    words = ("--insecure-no-tls", "--insecure-no-auth", "--worker-offline-timeout", str(patience))
    with nothing_left(home), controller(*words, home=home) as (_, url):
        async with Client(url) as client:
            yield Site(home, url, client)


@contextmanager
def nothing_left(home: Path) -> Iterator[None]:
    """Kill what a test has left running, which is the point of a guard."""
    try:
        yield
    finally:
        for number in processes_in(home):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def has_failed(vm: VM) -> bool:
    return vm.state.status == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_vms_outlive_a_worker_that_is_stopped_or_killed(tmp_path: Path, number: signal.Signals) -> None:
    async with site(tmp_path) as s:
        with s.worker() as worker:
            vms = [await s.create(name) for name in ("a", "b")]
            worker.stop(number)
        await eventually(lambda: set(s.states().values()) == {"running"})  # the process was there, it may be booting
        with s.worker() as worker:
            # It is looked after as before: what is changed is followed, its end is seen, and told.
            await s.client.vms.patch("a", headless=True)
            a = await s.vm("a", lambda vm: vm.state.observed_generation == 2)
            assert (a.uid, a.state.restart_count, a.state.status) == (vms[0].uid, 0, "running")
            assert await s.client.vms.get("b") == vms[1], "nothing has happened to it"
            os.kill(guard.read(tmp_path / "tart" / f"{vms[1].tart_name}.run").child, signal.SIGINT)
            b = await s.vm("b", has_failed)
            assert b.state.status_message == SHUT_DOWN
            for name in ("a", "b"):
                await s.client.vms.delete(name)
            await eventually(lambda: s.states() == {})
            assert worker.stop() == 0
        assert processes_in(s.tart_home) == []


@pytest.mark.parametrize("verb", ["clone", "fqn", "set", "pull"])
async def test_what_a_killed_worker_was_in_the_middle_of_is_ended_and_done_again(tmp_path: Path, verb: str) -> None:
    async with site(tmp_path) as s:
        with s.worker(TART_BLOCK=verb) as worker:
            await s.client.vms.create(
                name="vm", image="example.com/i", imagePullPolicy="Always", arch=architecture()
            )  # fmt: skip
            calls = s.tart_home / "calls.jsonl"
            await eventually(lambda: calls.exists() and f'["{verb}"' in calls.read_text())
            worker.stop(signal.SIGKILL)
        (hanging,) = processes_in(s.tart_home)
        with s.worker() as worker:
            vm = await s.client.vms.wait("vm")
            assert vm.state.restart_count == 0
            assert hanging not in processes_in(s.tart_home)
            assert s.states() == {vm.tart_name: "running"}
            await s.client.vms.delete("vm")
            await eventually(lambda: s.states() == {})
            assert worker.stop() == 0


async def test_a_worker_that_is_told_to_takes_its_vms_with_it(tmp_path: Path) -> None:
    async with site(tmp_path) as s:
        with s.worker("--stop-vms-on-exit") as worker:
            for name in ("a", "b"):
                await s.create(name)
            assert worker.stop() == 0
        for vm in await s.client.vms.list():
            assert (vm.state.status, vm.state.status_message) == ("failed", STOPPED)
        assert s.states() == {}
        assert processes_in(s.tart_home) == []


async def until_started_again(s: Site, vm: VM) -> None:
    """Wait until the controller starts a VM anew; where it was, nothing of it may run by then."""
    await s.vm(vm.name, lambda now: now.state.restart_count == 1)
    assert s.states()[vm.tart_name] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_vm_ends_before_it_is_started_elsewhere_though_its_worker_stands_still(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with site(tmp_path, PATIENCE) as s:
        with s.worker() as worker:
            never, again = await s.create("never"), await s.create("again", "OnFailure")
            worker.process.send_signal(number)
            await until_started_again(s, again)
            assert s.states()[never.tart_name] == "running", "nobody starts it elsewhere"
            await s.vm("never", has_failed)
            worker.process.send_signal(signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired) if number == signal.SIGSTOP else s.worker():
                # Back again, it removes what is not its own any more, and gets what it can have.
                vm = await s.vm("again", lambda vm: vm.state.status == "running")
                assert vm.state.restart_count == 1
                assert s.states()[never.tart_name] == "stopped"
                await eventually(lambda: again.tart_name not in s.states())


async def test_without_the_lease_it_would_run_twice(tmp_path: Path) -> None:
    """That the test above can fail: with a lease that never ends, what it looks at is seen."""
    async with site(tmp_path, PATIENCE) as s:
        with s.worker() as worker:
            vm = await s.create("vm", "OnFailure")
            worker.process.send_signal(signal.SIGSTOP)
            guard.write_lease(tmp_path / "tart" / "lease", guard.clock() + 1e6, guard.clock() + 1e6)
            with pytest.raises(AssertionError):
                await until_started_again(s, vm)


async def test_a_vm_whose_guard_is_killed_ends(tmp_path: Path) -> None:
    async with site(tmp_path) as s:
        with s.worker() as worker:
            vm = await s.create("vm")
            os.kill(guard.read(tmp_path / "tart" / f"{vm.tart_name}.run").guard, signal.SIGKILL)
            failed = await s.vm("vm", has_failed)
            assert failed.state.status_message == "the process that watched over the VM was killed"
            assert s.states() == {vm.tart_name: "stopped"}
            assert worker.stop() == 0


async def test_a_vm_without_a_guard_is_none_to_go_on_with(tmp_path: Path) -> None:
    async with site(tmp_path) as s:
        with s.worker() as worker:
            vm = await s.create("vm")
            worker.stop(signal.SIGKILL)
        os.kill(guard.read(tmp_path / "tart" / f"{vm.tart_name}.run").guard, signal.SIGKILL)
        await eventually(lambda: s.states() == {vm.tart_name: "running"})
        with s.worker() as worker:
            await s.vm("vm", has_failed)
            assert s.states() == {vm.tart_name: "stopped"}
            assert worker.stop() == 0
