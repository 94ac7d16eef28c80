"""VMs outlive their worker, and never run twice: real processes, stopped, killed and frozen at bad moments.

The hypervisor is the stand-in for tart: a VM is a process with a guard, in a session of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from harness.processes import GENEROUS, LISTENING, Role, controller, eventually, free_port, processes_in, started

from orchard.client import Client
from orchard.schema import TART_VMS, VM
from orchard.vm import supervisor
from orchard.vm.instance import CUT_OFF, SHUT_DOWN, STOPPED
from orchard.worker import LOST, architecture

STANDIN = Path(__file__).parent.parent / "standin" / "tart"
SHORT, LONG = 5, 60  # seconds after which a controller calls a worker offline; a busy machine may stand still for two
NO_QUESTIONS = ("--insecure-no-tls", "--insecure-no-auth")


class Host:
    """A machine for VMs, on which workers come and go."""

    def __init__(self, home: Path, url: str, once: Path) -> None:
        self.home = home
        self.before: Sequence[str] = ()  # words before a worker's command
        self.tart_home = home / "tart-home"
        self.tart_home.mkdir(parents=True)
        self.url = url
        self.environ = {
            "TART_HOME": str(self.tart_home),
            "TART_ONCE": str(once),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it is called often: by the Python at hand
        }

    def worker(self, *arguments: str, **environ: str) -> AbstractContextManager[Role]:
        (self.home / "worker.log").unlink(missing_ok=True)  # of the one before
        words = (
            self.url,
            "--tart",
            os.path.relpath(STANDIN),
            "--name",
            self.home.name,
            "--resources",
            f"{TART_VMS}=20",
        )
        env = {**self.environ, **environ}
        return started("worker", *words, *arguments, home=self.home, env=env, before=self.before)

    async def run_by_hand(self, name: str) -> None:
        """Run a VM without a guard, as one whose parent is gone."""
        start = ["/bin/sh", "-c", '"$0" clone example.com/i "$1" && "$0" run "$1" &', str(STANDIN), name]
        subprocess.run(start, env={**os.environ, **self.environ}, stdin=subprocess.DEVNULL, check=True)  # noqa: ASYNC221
        await eventually(lambda: self.states().get(name) == "running")

    def states(self) -> dict[str, str]:
        """What tart would say of its VMs."""
        return {path.stem: state for path in (self.tart_home / "vms").glob("*.json") if (state := state_in(path))}

    def record(self, vm: VM) -> supervisor.Record:
        return supervisor.read(self.home / "tart" / f"{vm.tart_name}.run")

    def hold(self, place: str) -> None:
        """Have the next call of tart that comes to a place stand still there."""
        (self.tart_home / "hold").write_text(place)

    async def held(self) -> int:
        """Wait until it does, and give its process number."""
        path = self.tart_home / "held"
        await eventually(path.exists)
        return int(path.read_text())

    def release(self) -> None:
        (self.tart_home / "held").unlink()


def state_in(path: Path) -> str:
    """The state of a VM that tart keeps in a file ("": it has just been deleted)."""
    try:
        vm: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return ""
    return "running" if vm.get("lock") and supervisor.is_locked(Path(vm["lock"])) else vm["state"]


class Site:
    """A controller, and a host."""

    def __init__(self, home: Path, client: Client) -> None:
        self.home = home
        self.client = client
        self.once = home / "once"
        self.once.mkdir()
        (self.once / "runs").touch()
        self.host = self.another("mac")

    def another(self, name: str) -> Host:
        return Host(self.home / name, self.client.url, self.once)

    async def order(self, name: str, **spec: object) -> VM:
        return await self.client.vms.create(name=name, image="example.com/i", arch=architecture(), **spec)

    async def create(self, name: str, **spec: object) -> VM:
        """Order a VM, and wait until it has begun to run, which its worker does not tell apart from being started."""
        await self.order(name, **spec)
        vm = await self.client.vms.wait(name)
        await eventually(partial(has_run, self, name))
        return vm

    async def vm(self, name: str, holds: Callable[[VM], bool]) -> VM:
        """Follow a VM until something holds of it."""
        with trio.fail_after(GENEROUS):
            async with self.client.vms.watch(name) as changes:
                async for _, vm in changes:
                    if holds(vm):
                        return vm
        raise AssertionError("the watch ended")

    async def delete_all(self, *, but: str = "") -> None:
        """Delete the VMs, and wait until nothing is left of them."""
        vms = await self.client.vms.list()
        for vm in vms:
            if vm.name != but:
                await self.client.vms.delete(vm.name)
        kept = {vm.tart_name for vm in vms if vm.name == but}
        await eventually(lambda: self.host.states().keys() == kept)
        files = self.host.home / "tart"
        await eventually(lambda: {path.stem for path in files.iterdir() if path.suffix} == kept)

    def runs(self, name: str) -> list[str]:
        """How each life of a VM found the others when it began, on all hosts: `alone` or `twice`."""
        said = (self.once / "runs").read_text().splitlines()
        return [found for vm, found in map(str.split, said) if vm.startswith(f"orchard-{name}-")]


@asynccontextmanager
async def site(home: Path, patience: float = LONG) -> AsyncIterator[Site]:
    words = (*NO_QUESTIONS, "--worker-offline-timeout", str(patience))
    with nothing_left(home), controller(*words, home=home) as (_, url):
        async with Client(url) as client:
            yield Site(home, client)


@contextmanager
def nothing_left(home: Path) -> Iterator[None]:
    """Kill what a test has left running, which is the point of a guard."""
    try:
        yield
    finally:
        for number in processes_in(home):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def has_run(s: Site, name: str, times: int = 1) -> bool:
    return len(s.runs(name)) >= times


def has_state(host: Host, vm: VM, state: str) -> bool:
    return host.states()[vm.tart_name] == state


def has_failed(vm: VM) -> bool:
    return vm.state.status == "failed"


def state_of(number: int) -> str:
    """The letter for what a process does; Z when there is none any more."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def said(worker: Role, words: str) -> bool:
    return words in worker.log.read_text()


def ended_well(worker: Role) -> bool:
    """Have a worker end, and give whether it did so as it should, with nothing in its log that should not be there."""
    return worker.stop() == 0 and not said(worker, "Traceback")


# ---- the worker goes, and the VMs stay -----------------------------------------------------------------------------


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def follow(client: Client, name: str, seen: list[VM], task_status: trio.TaskStatus[None]) -> None:
    """Note whatever the controller says of a VM, until it is deleted."""
    async with client.vms.watch(name) as changes:
        task_status.started()
        async for kind, vm in changes:
            if kind == "DELETED":
                return
            seen.append(vm)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_vms_outlive_a_worker_that_is_stopped_or_killed(
    tmp_path: Path, nursery: trio.Nursery, number: signal.Signals
) -> None:
    async with site(tmp_path) as s, trio.open_nursery() as following:
        with s.host.worker() as worker:
            a, b = [await s.create(name) for name in ("a", "b")]
            seen: list[VM] = []
            await following.start(follow, s.client, "a", seen)
            assert worker.stop(number) == (0 if number == signal.SIGTERM else -number)
        processes = [s.host.record(vm).child for vm in (a, b)]
        with s.host.worker() as worker:
            # It is looked after as before: it can be reached, what is changed is followed, its end is seen and told.
            port = (await nursery.start(trio.serve_tcp, echo, 0))[0].socket.getsockname()[1]
            async with s.client.vms.port_forward("b", port, wait=GENEROUS) as tunnel:
                await tunnel.send_all(b"there")
                assert await tunnel.receive_some() == b"there"
            assert [s.host.record(vm).child for vm in (a, b)] == processes
            assert await s.client.vms.get("b") == b, "nothing has happened to it"
            await s.client.vms.patch("a", headless=True)
            now = await s.vm("a", lambda vm: vm.state.observed_generation == 2)
            assert (now.uid, now.state.restart_count) == (a.uid, 0)
            assert {vm.state.status for vm in seen} == {"running"}
            os.kill(s.host.record(b).child, signal.SIGINT)
            assert (await s.vm("b", has_failed)).state.status_message == SHUT_DOWN
            await s.delete_all()
            assert ended_well(worker)
        assert processes_in(s.host.tart_home) == []


async def test_a_worker_that_is_told_to_takes_its_vms_with_it(tmp_path: Path) -> None:
    async with site(tmp_path) as s:
        with s.host.worker("--stop-vms-on-exit", TART_TOGETHER="3") as worker:
            for name in ("a", "b", "c"):
                await s.create(name)
            assert ended_well(worker)
        for vm in await s.client.vms.list():
            assert (vm.state.status, vm.state.status_message) == ("failed", STOPPED)
        assert (s.host.tart_home / "ended").read_text().split() == ["ended"] * 3, "side by side: nobody was killed"
        assert s.host.states() == {}
        assert processes_in(s.host.tart_home) == []


async def test_a_script_that_was_cut_off_by_the_end_of_its_worker_fails_the_vm(tmp_path: Path, sshd: int) -> None:
    async with site(tmp_path) as s:
        ssh = tmp_path / "bin" / "ssh"  # the real one, but for the port
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -p {sshd} "$@"\n')
        ssh.chmod(0o755)
        s.host.environ["PATH"] = f"{ssh.parent}:{s.host.environ['PATH']}"
        with s.host.worker() as worker:
            done = await s.create("done", startup_script={"script_content": "echo done"})
            begun = await s.create("begun", startup_script={"script_content": "echo begun; sleep 1000"})
            for vm in (done, begun):
                await eventually(partial(has_printed, s.client, vm))
            await eventually(lambda: '"done"' in (s.host.home / "tart" / f"{done.tart_name}.note").read_text())
            worker.stop(signal.SIGKILL)
        with s.host.worker() as worker:
            assert (await s.vm("begun", has_failed)).state.status_message == CUT_OFF
            assert s.host.states() == {done.tart_name: "running", begun.tart_name: "stopped"}
            await s.client.vms.patch("done", headless=True)
            await s.vm("done", lambda vm: vm.state.observed_generation == 2)
            assert ended_well(worker)
        assert await has_printed(s.client, done), "once"


async def has_printed(client: Client, vm: VM) -> bool:
    """Whether a VM's script has printed the VM's name, and nothing else."""
    return [event.payload async for event in client.vms.events(vm.name)] == [vm.name]


# ---- killed in the middle of things --------------------------------------------------------------------------------


class Workers:
    """One worker after the other on a host, each killed in the middle of something."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self._host = host
        self._stack = stack
        self.last = stack.enter_context(host.worker())

    async def next(self) -> None:
        """Kill the worker, start another, and wait until it has settled."""
        self.last.stop(signal.SIGKILL)
        self.last = self._stack.enter_context(self._host.worker())
        await eventually(lambda: said(self.last, "registered with the controller"))

    async def killed_at(self, place: str, order: Callable[[], Awaitable[object]]) -> None:
        """Have the worker come to a place, and make way for the next there, who is to end the call if it is no VM."""
        self._host.hold(place)
        await order()
        number = await self._host.held()
        await self.next()
        assert place.startswith("run") or state_of(number) == "Z", f"{place} goes on"
        self._host.release()


@asynccontextmanager
async def workers_to_kill(home: Path) -> AsyncIterator[tuple[Site, Workers]]:
    """Give a site and its workers. At the end, a VM has run through it all, and is all that is there."""
    async with site(home) as s:
        with ExitStack() as stack:
            workers = Workers(s.host, stack)
            witness = await s.create("witness")
            process = s.host.record(witness).child
            yield s, workers
            await s.delete_all(but="witness")
            assert s.host.states() == {witness.tart_name: "running"}
            assert await s.client.vms.get("witness") == witness
            assert s.host.record(witness).child == process
            await s.delete_all()
            assert ended_well(workers.last)
            assert processes_in(s.host.tart_home) == []


MAKING = ["pull before", "pull after", "clone before", "clone after", "fqn before", "set before", "set after"]


async def test_what_a_killed_worker_was_in_the_middle_of_is_ended_and_done_again(tmp_path: Path) -> None:
    async with workers_to_kill(tmp_path) as (s, workers):
        for number, place in enumerate([*MAKING, "run before"]):
            name = f"vm-{number}"
            await workers.killed_at(place, partial(s.order, name, imagePullPolicy="Always"))
            vm = await s.client.vms.wait(name)
            assert vm.state.restart_count == 0
            await eventually(partial(has_state, s.host, vm, "running"))
        for kind in ("note", "run", "log"):  # while its guard is started
            vm = await s.order(kind)
            await eventually((s.host.home / "tart" / f"{vm.tart_name}.{kind}").exists)
            await workers.next()
            assert (await s.client.vms.wait(kind)).state.restart_count == 0
            await eventually(partial(has_run, s, kind))
            assert s.runs(kind) == ["alone"]
        for name, place in (("note", "delete before"), ("run", "delete after")):
            await workers.killed_at(place, partial(s.client.vms.delete, name))


# Where the worker is killed, what the user wanted, and what comes of it: it is done, or the VM is lost.
CHANGES: list[tuple[str, dict[str, object], str]] = [
    ("suspend before", {"headless": True}, "running"),
    ("suspend after", {"headless": True}, LOST),
    ("run before", {"headless": True}, "running"),
    ("run ending", {"cpu": 3}, "running"),
    ("set before", {"cpu": 3}, LOST),
    ("set after", {"cpu": 3}, LOST),
    ("suspend before", {"powerState": "suspended"}, "suspended"),
    ("suspend after", {"powerState": "suspended"}, "suspended"),
    ("run ending", {"powerState": "stopped"}, "stopped"),
]


async def test_a_change_that_a_killed_worker_was_in_the_middle_of_is_made_or_the_vm_has_failed(tmp_path: Path) -> None:
    async with workers_to_kill(tmp_path) as (s, workers):
        for number in range(len(CHANGES)):
            await s.order(f"vm-{number}", suspendable=True)
        for number, (place, patch, outcome) in enumerate(CHANGES):
            name = f"vm-{number}"
            before = await s.client.vms.wait(name)
            await workers.killed_at(place, partial(s.client.vms.patch, name, patch))
            if outcome == LOST:
                assert (await s.vm(name, has_failed)).state.status_message == LOST
                assert s.host.states()[before.tart_name] != "running"
            else:
                now = await s.vm(name, lambda vm: vm.state.observed_generation == 2)
                assert (now.state.status, now.state.restart_count) == ("running", 0)
                assert now.condition("running") is (outcome == "running")
                await eventually(partial(has_state, s.host, now, outcome))


async def test_a_session_that_is_lost_while_the_worker_settles_has_settled_nothing(tmp_path: Path) -> None:
    listen = ("--listen", f"127.0.0.1:{(port := free_port())}", "--worker-offline-timeout", "10", *NO_QUESTIONS)
    with nothing_left(tmp_path):
        async with Client(f"http://127.0.0.1:{port}") as client:
            s = Site(tmp_path, client)
            with started("controller", *listen, home=tmp_path) as control:
                control.wait_for(LISTENING)
                with s.host.worker() as worker:
                    vm = await s.create("vm")
                    worker.stop(signal.SIGKILL)
                await s.host.run_by_hand("orchard-left")
                s.host.hold("stop before")
                with s.host.worker() as worker:
                    held = await s.host.held()
                    control.stop(signal.SIGKILL)
                    await eventually(lambda: state_of(held) == "Z")
                    s.host.release()
                    with started("controller", *listen, home=tmp_path) as again:
                        again.wait_for(LISTENING)
                        await eventually(lambda: s.host.states() == {vm.tart_name: "running"})
                        await s.client.vms.patch("vm", headless=True)
                        now = await s.vm("vm", lambda vm: vm.state.observed_generation == 2)
                        assert (now.uid, now.state.status, now.state.restart_count) == (vm.uid, "running", 0)
                        assert ended_well(worker)
                        await eventually(lambda: s.host.states() == {vm.tart_name: "running"})


# ---- cut off -------------------------------------------------------------------------------------------------------


async def frozen(worker: Role) -> None:
    """Have a worker stand still."""
    worker.process.send_signal(signal.SIGSTOP)
    await eventually(lambda: state_of(worker.process.pid) == "T")


def is_restarted(vm: VM) -> bool:
    return vm.state.restart_count == 1 and vm.state.status == "running"


async def test_a_vm_ends_before_it_is_started_elsewhere_though_its_worker_stands_still(tmp_path: Path) -> None:
    """Or has died; and one whose lease is taken away shows that it would be seen if it ran twice."""
    async with site(tmp_path, SHORT) as s:
        names = ("frozen", "killed", "unleashed")
        hosts = {name: s.another(name) for name in names}
        with (
            hosts["frozen"].worker("--labels", "frozen=1") as stands_still,
            hosts["killed"].worker("--labels", "killed=1", TART_STUBBORN="1") as dies,
            hosts["unleashed"].worker("--labels", "unleashed=1") as knows_no_lease,
        ):
            never = await s.create("never", labels={"frozen": "1"})
            for name in names:
                await s.create(name, labels={name: "1"}, restart_policy="OnFailure")
            await frozen(knows_no_lease)
            supervisor.write_lease(hosts["unleashed"].home / "tart" / "lease", *supervisor.NEVER)
            dies.stop(signal.SIGKILL)
            await frozen(stands_still)
            with s.host.worker("--labels", "frozen=1,killed=1,unleashed=1"):
                now = {name: await s.vm(name, is_restarted) for name in names}
                assert {vm.state.worker for vm in now.values()} == {"mac"}
                for name in names:
                    await eventually(partial(has_run, s, name, 2))
                assert [s.runs(name)[1] for name in names] == ["alone", "alone", "twice"]
                await s.vm("never", has_failed)
                assert hosts["frozen"].states()[never.tart_name] == "running", "nobody starts it elsewhere"
                stands_still.process.send_signal(signal.SIGCONT)
                # Back again, the worker removes what is not its own any more, and does as it is told.
                await eventually(lambda: hosts["frozen"].states() == {never.tart_name: "stopped"})
                assert await s.client.vms.get("frozen") == now["frozen"]
                assert ended_well(stands_still)


async def test_while_the_controller_is_away_only_that_ends_which_it_would_start_elsewhere(tmp_path: Path) -> None:
    listen = ("--listen", f"127.0.0.1:{(port := free_port())}", "--worker-offline-timeout", str(SHORT), *NO_QUESTIONS)
    with nothing_left(tmp_path):
        async with Client(f"http://127.0.0.1:{port}") as client:
            s = Site(tmp_path, client)
            with started("controller", *listen, home=tmp_path) as control, s.host.worker() as worker:
                control.wait_for(LISTENING)
                never, again = await s.create("never"), await s.create("again", restart_policy="OnFailure")
                control.stop(signal.SIGKILL)
                await eventually(
                    lambda: s.host.states() == {never.tart_name: "running", again.tart_name: "stopped"}
                )  # fmt: skip
                with started("controller", *listen, home=tmp_path) as control:
                    control.wait_for(LISTENING)
                    await s.vm("again", is_restarted)
                    await eventually(partial(has_run, s, "again", 2))
                    assert s.runs("again") == ["alone", "alone"]
                    now = await s.client.vms.get("never")
                    assert (now.uid, now.state.status, now.state.restart_count) == (never.uid, "running", 0)
                    assert s.runs("never") == ["alone"]
                    assert ended_well(worker)


# ---- without a guard -----------------------------------------------------------------------------------------------


async def test_a_vm_whose_guard_is_killed_ends(tmp_path: Path) -> None:
    async with site(tmp_path) as s:
        with s.host.worker() as worker:
            vm = await s.create("vm")
            os.kill(s.host.record(vm).guard, signal.SIGKILL)
            failed = await s.vm("vm", has_failed)
            assert failed.state.status_message == "the process that watched over the VM was killed"
            assert s.host.states() == {vm.tart_name: "stopped"}
            assert ended_well(worker)


async def test_a_vm_without_a_guard_is_none_to_go_on_with(tmp_path: Path) -> None:
    async with site(tmp_path) as s:
        with s.host.worker() as worker:
            vm = await s.create("vm")
            worker.stop(signal.SIGKILL)
        os.kill(s.host.record(vm).guard, signal.SIGKILL)
        await s.host.run_by_hand("orchard-left")  # as by a worker that knew no guards, of a VM that is gone meanwhile
        await s.host.run_by_hand("somebody-elses")
        assert s.host.states() == dict.fromkeys([vm.tart_name, "orchard-left", "somebody-elses"], "running")
        with s.host.worker() as worker:
            failed = await s.vm("vm", has_failed)
            assert "was not started by a worker with this directory" in failed.state.status_message
            assert s.host.states() == {vm.tart_name: "stopped", "somebody-elses": "running"}
            await s.client.vms.delete("vm")
            await eventually(lambda: s.host.states() == {"somebody-elses": "running"})
            assert ended_well(worker)
