"""What every driver promises the worker, tested with each of them.

The synthetic driver is the product's. For tart there is the executable stand-in; its startup scripts run through the
system's `ssh` and a real SSH server with a real shell behind it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.processes import GENEROUS, at_rest, eventually, processes_in
from harness.programs import need
from harness.sweeps import AtStep, growing_steps

from orchard.base.nursery import unwrap_groups
from orchard.schema import VMSpec
from orchard.tart import TartDriver
from orchard.vm import supervised, supervisor
from orchard.vm.driver import (
    LEASE_OVER,
    Driver,
    DriverError,
    Hardware,
    LocalVM,
    NoSuchVM,
    NotRunning,
    Script,
    ScriptFailed,
)
from orchard.vm.supervisor import EXPIRED
from orchard.vm.synthetic import SyntheticDriver

STANDIN = Path(__file__).parent.parent / "standin" / "tart"
IMAGE = "example.com/image:latest"
NAME = "orchard-vm-uid-0"
# Lease times that are tried in turn, in seconds: the first is long enough unless the machine is very busy.
ATTEMPTS = (0.5, 4.0, 30.0)


class Bench:
    """A driver, and the directory with its VMs. `agent`: scripts are run by the guest agent."""

    def __init__(self, driver: Driver, home: Path, *, agent: bool = False) -> None:
        self.driver = driver
        self.home = home
        self.agent = agent

    def script(self, text: str, env: dict[str, str] | None = None, **fields: Any) -> Script:
        return Script(text, env or {}, agent=self.agent, os="linux", **fields)

    async def create(self, name: str = NAME, source: str = IMAGE) -> None:
        await self.driver.clone(source, name, lambda _: None)

    async def states(self) -> dict[str, str]:
        return {vm.name: vm.state for vm in await self.driver.list_vms()}

    async def has_state(self, name: str, state: str) -> bool:
        return (await self.states()).get(name) == state

    @asynccontextmanager
    async def running(self, name: str = NAME, **options: Any) -> AsyncIterator[trio.Event]:
        """Run a VM during the block; the event is set when the VM has ended."""
        ended = trio.Event()

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await self.driver.run(name, VMSpec(**options), task_status=task_status)
            ended.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            # started() does not mean that the VM has booted.
            await eventually(partial(self.has_state, name, "running"))
            try:
                yield ended
            finally:
                if not ended.is_set():
                    with trio.CancelScope(shield=True), suppress(NotRunning):
                        await self.driver.stop(name)

    async def run_script(self, text: str, env: dict[str, str] | None = None) -> list[str]:
        """Run a script in the running VM, and return its lines."""
        lines: list[str] = []

        async def on_line(line: str) -> None:
            lines.append(line)

        with trio.fail_after(GENEROUS):
            await self.driver.run_script(NAME, self.script(text, env), on_line)
        return lines

    def lend(self, soft: float, hard: float) -> float:
        """Set the lease to end in so many seconds; return the absolute time of its soft end."""
        now = supervisor.clock()
        self.driver.lease(now + soft, now + hard, [NAME])
        return now + soft


DRIVERS = ("synthetic", "tart")


@pytest.fixture(params=DRIVERS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return make_bench(request, tmp_path)


@pytest.fixture(params=[*DRIVERS, "tart with a guest agent"])
def script_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """A driver that can run scripts. TartDriver does so by the system's ssh, or by the guest agent."""
    if request.param == "tart":
        need("ssh")
    return make_bench(request, tmp_path)


def make_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    home = tmp_path / "home"
    home.mkdir()
    if request.param == "synthetic":
        return Bench(SyntheticDriver(home), home)
    # The stand-in is started often: by the Python at hand.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    agent = request.param != "tart"
    port = 1 if agent else request.getfixturevalue("sshd")
    env = {"TART_HOME": str(home), "PATH": path}
    driver = TartDriver(str(STANDIN), home / "driver", ssh_port=port, env=env, stop_seconds=10, own_addresses=True)
    return Bench(driver, home, agent=agent)


# ---- from creation to deletion -------------------------------------------------------------------------------------


async def test_vm_is_created_configured_run_stopped_and_deleted(bench: Bench) -> None:
    driver = bench.driver
    assert await driver.list_vms() == []
    await driver.pull(IMAGE, lambda _: None)
    assert (await driver.fqn(IMAGE)).startswith(f"{IMAGE}@sha256:")
    await bench.create()
    await driver.configure(NAME, Hardware(cpu=2, memory=1024, disk_size=60), random_mac=True, random_serial=True)
    assert await driver.list_vms() == [LocalVM(NAME, "stopped")]
    async with bench.running(headless=True) as ended:
        assert await driver.ip(NAME) == "127.0.0.1"
        assert not ended.is_set()
        await driver.stop(NAME)
        with trio.fail_after(GENEROUS):
            await ended.wait()
    assert await bench.states() == {NAME: "stopped"}
    await driver.delete(NAME)
    assert await driver.list_vms() == []
    assert processes_in(bench.home) == []


async def test_suspended_vm_resumes_and_stop_discards_its_state(bench: Bench) -> None:
    await bench.create()
    async with bench.running(suspendable=True) as ended:
        await bench.driver.suspend(NAME)
        with trio.fail_after(GENEROUS):
            await ended.wait()
    assert await bench.states() == {NAME: "suspended"}
    async with bench.running(suspendable=True) as ended:
        await bench.driver.suspend(NAME)
        await ended.wait()
    await bench.driver.stop(NAME)
    assert await bench.states() == {NAME: "stopped"}


async def test_clone_of_a_suspended_local_vm_is_suspended(bench: Bench) -> None:
    await bench.create()
    async with bench.running(suspendable=True) as ended:
        await bench.driver.suspend(NAME)
        await ended.wait()
    await bench.create("orchard-second", NAME)
    assert await bench.states() == {NAME: "suspended", "orchard-second": "suspended"}
    assert await bench.driver.fqn(NAME) == NAME
    await bench.driver.delete(NAME)
    assert await bench.states() == {"orchard-second": "suspended"}


async def test_unknown_vm_raises_no_such_vm(bench: Bench) -> None:
    driver = bench.driver
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: driver.clone("orchard-none", NAME, lambda _: None),
        lambda: driver.configure("orchard-none", Hardware(cpu=2)),
        lambda: driver.run("orchard-none", VMSpec()),
        lambda: driver.stop("orchard-none"),
        lambda: driver.suspend("orchard-none"),
        lambda: driver.delete("orchard-none"),
    ]
    for call in calls:
        with pytest.raises(NoSuchVM, match="orchard-none"):
            await call()
    with pytest.raises(DriverError):
        await driver.ip("orchard-none")
    assert await driver.list_vms() == []


async def test_stop_and_suspend_of_a_stopped_vm_raise_not_running(bench: Bench) -> None:
    await bench.create()
    for verb in (bench.driver.stop, bench.driver.suspend):
        with pytest.raises(NotRunning, match=NAME):
            await verb(NAME)
    with pytest.raises(DriverError, match="running"):
        await bench.driver.ip(NAME)


async def test_running_vm_can_not_be_run_again_configured_or_deleted(bench: Bench) -> None:
    await bench.create()
    async with bench.running():
        # tart knows that the VM runs when it has an address.
        await bench.driver.ip(NAME)
        for call in (
            partial(bench.driver.run, NAME, VMSpec()),
            partial(bench.driver.configure, NAME, Hardware(cpu=3)),
            partial(bench.driver.delete, NAME),
        ):
            with pytest.raises(DriverError):
                await call()
        assert await bench.states() == {NAME: "running"}


@pytest.mark.parametrize("name", ["", "-rf", "--help", "a\0b"])
async def test_name_that_looks_like_an_option_is_refused(bench: Bench, name: str) -> None:
    for call in (
        partial(bench.driver.clone, IMAGE, name, lambda _: None),
        partial(bench.driver.pull, name, lambda _: None),
        partial(bench.driver.run, name, VMSpec()),
        partial(bench.driver.delete, name),
    ):
        with pytest.raises(DriverError, match=r"name|image"):
            await call()
    assert list(bench.home.glob("**/*.json")) == []


async def test_disk_can_not_shrink(bench: Bench) -> None:
    await bench.create()
    await bench.driver.configure(NAME, Hardware(disk_size=90))
    with pytest.raises(DriverError):
        await bench.driver.configure(NAME, Hardware(disk_size=70))


# ---- what is reported of the host ----------------------------------------------------------------------------------


async def test_pulled_images_are_listed_once_with_their_digests(bench: Bench) -> None:
    assert await bench.driver.list_images() == []
    for image in (IMAGE, "example.com/bare@sha256:" + "0" * 64):
        await bench.driver.pull(image, lambda _: None)
    await bench.create()
    images = {image.name: image for image in await bench.driver.list_images()}
    assert set(images) == {IMAGE, "example.com/bare@sha256:" + "0" * 64}
    digest = (await bench.driver.fqn(IMAGE)).partition("@")[2]
    assert (images[IMAGE].digest, digest[:7]) == (digest, "sha256:")
    assert all(image.size_bytes >= 10**9 and image.last_used is not None for image in images.values())


async def test_disk_and_version_are_known(bench: Bench) -> None:
    disk = await bench.driver.disk()
    assert disk is not None
    assert 0 < disk.free_bytes <= disk.total_bytes
    assert re.match(r"\d+\.", await bench.driver.version())


# ---- what outlives a worker ----------------------------------------------------------------------------------------


async def test_vm_outlives_the_cancelled_run_and_can_be_adopted(bench: Bench) -> None:
    await bench.create()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(bench.driver.run, NAME, VMSpec()))
        nursery.cancel_scope.cancel()
    await eventually(partial(bench.has_state, NAME, "running"))
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.driver.attach, NAME)
            nursery.cancel_scope.cancel()
        assert await bench.states() == {NAME: "running"}
    with trio.fail_after(GENEROUS):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.driver.attach, NAME)
            await bench.driver.stop(NAME)
    assert await bench.states() == {NAME: "stopped"}
    with pytest.raises(NotRunning):
        await bench.driver.attach(NAME)
    assert processes_in(bench.home) == []


async def test_expired_lease_ends_only_leased_vms(bench: Bench) -> None:
    async def run_until_the_lease_expires() -> None:
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(bench.driver.run, NAME, VMSpec(restart_policy="OnFailure")))
                bench.lend(0.1, 0.2)

    await bench.create()
    await bench.create("orchard-free")
    bench.lend(1000.0, 1001.0)
    async with bench.running("orchard-free") as ended:
        with pytest.raises(DriverError, match=LEASE_OVER), trio.fail_after(GENEROUS):
            await run_until_the_lease_expires()
        assert await bench.states() == {NAME: "stopped", "orchard-free": "running"}
        with pytest.raises(DriverError, match=EXPIRED):
            await bench.driver.run(NAME, VMSpec(restart_policy="OnFailure"))
        assert not ended.is_set()
    assert processes_in(bench.home) == []


@pytest.mark.parametrize("bench", ["tart"], indirect=True)
async def test_vm_that_is_killed_at_the_end_of_its_lease_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its supervisor has recorded that before it was killed itself."""
    kill = supervised._kill

    def kill_and_record(record: supervised.Record) -> None:
        kill(record)
        path = next(bench.home.rglob(f"{NAME}.run"))
        while supervised.read_record(path).status is None:
            time.sleep(0.01)

    async def run_until_overdue() -> None:
        with unwrap_groups():
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(bench.driver.run, NAME, VMSpec(restart_policy="OnFailure")))
                monkeypatch.setattr(supervised.SupervisedVMs, "_is_overdue", lambda self, name: True)

    monkeypatch.setattr(supervised, "_kill", kill_and_record)
    await bench.create()
    bench.lend(1000.0, 1001.0)
    with pytest.raises(DriverError, match=LEASE_OVER), trio.fail_after(GENEROUS):
        await run_until_overdue()


async def test_renewed_lease_does_not_expire(bench: Bench) -> None:
    async def renewed_in_time(seconds: float) -> bool:
        bench.lend(1000.0, 1000.0)
        async with bench.running(restart_policy="OnFailure") as ended:
            until = bench.lend(seconds, seconds)
            bench.lend(1000.0, 1000.0)
            if supervisor.clock() >= until:
                return False
            await eventually(lambda: supervisor.clock() > until + 0.1)
            assert not ended.is_set()
        return True

    await bench.create()
    for seconds in ATTEMPTS:
        # On a busy machine the lease may expire before it is renewed, which ends the VM.
        with suppress(DriverError), unwrap_groups():
            if await renewed_in_time(seconds):
                return
    raise AssertionError(f"renewing a lease took longer than {ATTEMPTS[-1]:g} seconds")


async def test_note_is_kept_until_its_vm_is_deleted(bench: Bench) -> None:
    await bench.create()
    assert bench.driver.noted(NAME) == ""
    for text in ("one", "two"):
        bench.driver.note(NAME, text)
        assert bench.driver.noted(NAME) == text
    await bench.driver.configure(NAME, Hardware(cpu=3))
    async with bench.running():
        assert bench.driver.noted(NAME) == "two"
    await bench.create("orchard-clone", NAME)
    assert bench.driver.noted("orchard-clone") == ""
    await bench.driver.delete(NAME)
    await bench.create()
    assert bench.driver.noted(NAME) == ""


# ---- scripts -------------------------------------------------------------------------------------------------------

NASTY = {
    "QUOTES": 'it\'s "quoted"',
    "DOLLAR": "$HOME ${PATH} $(touch hacked) \\$x",
    "BACKTICKS": "`touch hacked`",
    "NEWLINES": "first\nsecond\n\nfourth\n",
    "EMPTY": "",
    "UNICODE": "é 😀 \u2028",
    "CONTROL": "\t\x1b[0m\x7f",
    "GLOB": "* ? [a] ~ ; & | < > !",
}


async def test_environment_values_are_not_evaluated(script_bench: Bench) -> None:
    await script_bench.create()
    text = "".join(f"printf '%s' \"${name}\" | od -An -v -tx1 | tr -d ' \\n'; echo\n" for name in NASTY)
    async with script_bench.running():
        lines = await script_bench.run_script(text + "ls hacked 2>/dev/null || echo safe\n", NASTY)
    assert [bytes.fromhex(line).decode() for line in lines[:-1]] == list(NASTY.values())
    assert lines[-1] == "safe"


@pytest.mark.slow
async def test_failed_script_reports_its_exit_code_and_last_line(script_bench: Bench) -> None:
    await script_bench.create()
    async with script_bench.running():
        for text, code, last_line in (
            ("echo the end >&2; exit 3; echo never", 3, "the end"),
            ("echo before\nfalse\necho never", 1, "before"),
            ("exit 255", 255, ""),
        ):
            with pytest.raises(ScriptFailed, match=f"startup script failed with exit code {code}") as failure:
                await script_bench.run_script(text)
            assert (failure.value.exit_code, failure.value.last_line) == (code, last_line)
        assert await script_bench.run_script("echo again") == ["again"]


async def test_script_has_an_empty_standard_input(script_bench: Bench) -> None:
    await script_bench.create()
    async with script_bench.running():
        text = "cat; read line || echo end of file\nssh -V 2>&1 | wc -l >/dev/null\necho last"
        assert await script_bench.run_script(text) == ["end of file", "last"]


async def test_ten_thousand_lines_arrive_in_order(script_bench: Bench) -> None:
    await script_bench.create()
    async with script_bench.running():
        lines = await script_bench.run_script("seq 10000; printf 'no newline'")
    assert lines == [*map(str, range(1, 10_001)), "no newline"]


async def test_stdout_and_stderr_keep_their_order_and_invalid_utf8_is_replaced(script_bench: Bench) -> None:
    await script_bench.create()
    async with script_bench.running():
        lines = await script_bench.run_script(r"echo 1; echo 2 >&2; echo 3; echo 4 >&2; printf 'a\377b\n\n'")
    assert lines == ["1", "2", "3", "4", "a\ufffdb", ""]


@pytest.mark.slow
async def test_slow_consumer_slows_the_script(script_bench: Bench, tmp_path: Path) -> None:
    await script_bench.create()
    # More bytes than all buffers on the way hold.
    count, length = 400, 15_000
    reached = tmp_path / "reached"
    lines = 0

    async def on_line(line: str) -> None:
        nonlocal lines
        lines += 1
        if lines == 1:
            await eventually(reached.exists)
            await at_rest(reached.read_text)
            assert int(reached.read_text() or 0) < count

    async with script_bench.running():
        text = f"for i in $(seq {count}); do printf '%0{length}d\\n' $i; echo $i > {reached}; done"
        await script_bench.driver.run_script(NAME, script_bench.script(text), on_line)
    assert lines == count


async def test_cancelled_script_leaves_no_process_after_its_vm_has_ended(script_bench: Bench) -> None:
    await script_bench.create()
    async with script_bench.running():
        begun = trio.Event()

        async def on_line(line: str) -> None:
            begun.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                script_bench.driver.run_script, NAME, script_bench.script("echo begun; sleep 1000"), on_line
            )
            await begun.wait()
            nursery.cancel_scope.cancel()
    await eventually(lambda: processes_in(script_bench.home) == [])


async def test_script_that_takes_too_long_is_killed_and_ends_with_124(script_bench: Bench) -> None:
    await script_bench.create()
    lines: list[str] = []

    async def on_line(line: str) -> None:
        lines.append(line)

    async with script_bench.running():
        limited = script_bench.script("echo begun; sleep 1000; echo never", seconds=0.1)
        with pytest.raises(ScriptFailed) as failure, trio.fail_after(GENEROUS):
            await script_bench.driver.run_script(NAME, limited, on_line)
        assert failure.value.exit_code == 124
        assert "never" not in lines


async def test_script_in_a_stopped_vm_is_refused(script_bench: Bench) -> None:
    await script_bench.create()
    with pytest.raises(DriverError, match="running"):
        await script_bench.run_script("echo never")


# ---- cancelled at any checkpoint -----------------------------------------------------------------------------------


async def run_and_stop(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.driver.run, NAME, VMSpec(suspendable=True))
        await eventually(partial(bench.has_state, NAME, "running"))
        await bench.driver.stop(NAME)


# By name: the state that the VM needs before, and the call that is cancelled.
VERBS: dict[str, tuple[str, Callable[[Bench], Awaitable[object]]]] = {
    "pull": ("absent", lambda bench: bench.driver.pull(IMAGE, lambda _: None)),
    "clone": ("absent", lambda bench: bench.create()),
    "clone locally": ("stopped", lambda bench: bench.create("orchard-second", NAME)),
    "list images": ("absent", lambda bench: bench.driver.list_images()),
    "disk": ("absent", lambda bench: bench.driver.disk()),
    "fqn": ("absent", lambda bench: bench.driver.fqn(IMAGE)),
    "configure": ("stopped", lambda bench: bench.driver.configure(NAME, Hardware(cpu=2), random_mac=True)),
    "list": ("stopped", lambda bench: bench.driver.list_vms()),
    "delete": ("stopped", lambda bench: bench.driver.delete(NAME)),
    "run": ("stopped", run_and_stop),
    "ip": ("running", lambda bench: bench.driver.ip(NAME)),
    "stop": ("running", lambda bench: bench.driver.stop(NAME)),
    "suspend": ("running", lambda bench: bench.driver.suspend(NAME)),
    "script": ("running", lambda bench: bench.run_script("sleep 1000 & echo over")),
}


async def call_until_step(bench: Bench, step: int, call: Callable[[Bench], Awaitable[object]]) -> bool:
    """Make a call that is cancelled at some step; return whether it came to that."""
    with trio.CancelScope() as scope:
        instrument = AtStep(step, scope.cancel)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call(bench)
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


async def sweep(bench: Bench, verb: str, growth: float) -> None:
    """Cancel a verb at steps that grow by a factor, until it completes; delete what it has left each time."""
    before, call = VERBS[verb]
    for step in growing_steps(growth):
        if before != "absent":
            await bench.create()
        if before == "running":
            async with bench.running(suspendable=True):
                cancelled = await call_until_step(bench, step, call)
        else:
            cancelled = await call_until_step(bench, step, call)
        for name, state in (await bench.states()).items():
            if state == "running":
                with suppress(NotRunning):
                    await bench.driver.stop(name)
            await bench.driver.delete(name)
        await eventually(lambda: processes_in(bench.home) == [])
        if not cancelled:
            break
    assert step > 1
    assert await bench.states() == {}
    if isinstance(bench.driver, SyntheticDriver):
        assert list(bench.home.iterdir()) == []


@pytest.mark.parametrize("bench", ["synthetic"], indirect=True)
@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.slow(5) if verb == "script" else ()) for verb in VERBS]
)
async def test_verb_cancelled_at_any_step_leaves_what_delete_can_remove(bench: Bench, verb: str) -> None:
    await sweep(bench, verb, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["tart"], indirect=True)
@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=pytest.mark.needs("ssh") if verb == "script" else ()) for verb in VERBS]
)
async def test_cancelled_call_of_tart_leaves_what_delete_can_remove(bench: Bench, verb: str) -> None:
    # Each try starts the stand-in several times, so not all of some 100 steps are tried.
    await sweep(bench, verb, 2.0)
