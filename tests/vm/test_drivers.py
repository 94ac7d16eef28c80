"""What every driver promises the worker, held against each of them.

The synthetic one is itself; tart is the executable stand-in, its startup scripts go by the system's real `ssh` to a
real SSH server with a real shell behind it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.processes import GENEROUS, at_rest, eventually, processes_in

from orchard.nursery import unwrap_groups
from orchard.tart import TartDriver
from orchard.vm import supervisor
from orchard.vm.driver import LEASE_OVER, Driver, DriverError, LocalVM, NoSuchVM, NotRunning, RunOptions, ScriptFailed
from orchard.vm.supervisor import EXPIRED
from orchard.vm.synthetic import SyntheticDriver

STANDIN = Path(__file__).parent.parent / "standin"
IMAGE = "example.com/image:latest"
NAME = "orchard-vm-uid-0"


class Bench:
    """A driver and the place where its VMs are."""

    def __init__(self, driver: Driver, home: Path) -> None:
        self.driver = driver
        self.home = home

    async def made(self, name: str = NAME, source: str = IMAGE) -> str:
        await self.driver.clone(source, name, lambda _: None)
        return name

    async def states(self) -> dict[str, str]:
        return {vm.name: vm.state for vm in await self.driver.list_vms()}


def tart(home: Path, port: int = 22, **env: str) -> TartDriver:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it is called often: by the interpreter at hand
    return TartDriver(
        str(STANDIN / "tart"),
        home / "driver",
        ssh_port=port,
        env={"TART_HOME": str(home), "PATH": path, **env},
        stop_seconds=10,
    )


@pytest.fixture(params=["synthetic", "tart"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    home = tmp_path / "home"
    home.mkdir()
    if request.param == "synthetic":
        return Bench(SyntheticDriver(home), home)
    return Bench(tart(home, request.getfixturevalue("sshd")), home)


@asynccontextmanager
async def running(bench: Bench, name: str = NAME, **options: Any) -> AsyncIterator[trio.Event]:
    """Run a VM for the time of the block; the event is set when it has ended."""
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await bench.driver.run(name, RunOptions(**options), task_status=task_status)
        ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await eventually(partial(has_state, bench, name, "running"))  # started() is no promise that it has booted
        try:
            yield ended
        finally:
            if not ended.is_set():
                with trio.CancelScope(shield=True), suppress(NotRunning):
                    await bench.driver.stop(name)


async def has_state(bench: Bench, name: str, state: str) -> bool:
    return (await bench.states()).get(name) == state


async def script(bench: Bench, text: str, env: dict[str, str] | None = None) -> list[str]:
    """Run a script in the running VM, and give its lines."""
    lines: list[str] = []

    async def on_line(line: str) -> None:
        lines.append(line)

    with trio.fail_after(GENEROUS):
        await bench.driver.run_script(
            NAME, text, env=env or {}, username="admin", password="admin", bridged=False, on_line=on_line
        )
    return lines


# ---- a life --------------------------------------------------------------------------------------------------------


async def test_a_whole_life(bench: Bench) -> None:
    driver = bench.driver
    assert await driver.list_vms() == []
    await driver.pull(IMAGE, lambda _: None)
    assert (await driver.fqn(IMAGE)).startswith(f"{IMAGE}@sha256:")
    await bench.made()
    await driver.configure(NAME, cpu=2, memory=1024, disk_size=60, random_mac=True, random_serial=True)
    assert await driver.list_vms() == [LocalVM(NAME, "stopped")]
    async with running(bench, headless=True) as ended:
        assert await driver.ip(NAME) == "127.0.0.1"
        assert not ended.is_set()
        await driver.stop(NAME)
        with trio.fail_after(GENEROUS):
            await ended.wait()
    assert await bench.states() == {NAME: "stopped"}
    await driver.delete(NAME)
    assert await driver.list_vms() == []
    assert processes_in(bench.home) == []


async def test_a_suspended_vm_resumes_and_a_stop_forgets_its_state(bench: Bench) -> None:
    await bench.made()
    async with running(bench, suspendable=True) as ended:
        await bench.driver.suspend(NAME)
        with trio.fail_after(GENEROUS):
            await ended.wait()
    assert await bench.states() == {NAME: "suspended"}
    async with running(bench, suspendable=True) as ended:
        await bench.driver.suspend(NAME)
        await ended.wait()
    await bench.driver.stop(NAME)
    assert await bench.states() == {NAME: "stopped"}


async def test_a_local_vm_can_be_cloned_a_suspended_one_with_its_state(bench: Bench) -> None:
    await bench.made()
    async with running(bench, suspendable=True) as ended:
        await bench.driver.suspend(NAME)
        await ended.wait()
    await bench.made("orchard-second", NAME)
    assert await bench.states() == {NAME: "suspended", "orchard-second": "suspended"}
    assert await bench.driver.fqn(NAME) == NAME
    await bench.driver.delete(NAME)
    assert await bench.states() == {"orchard-second": "suspended"}


async def test_what_is_unknown_is_said_to_be(bench: Bench) -> None:
    driver = bench.driver
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: driver.clone("orchard-none", NAME, lambda _: None),
        lambda: driver.configure("orchard-none", cpu=2),
        lambda: driver.run("orchard-none", RunOptions()),
        lambda: driver.stop("orchard-none"),
        lambda: driver.suspend("orchard-none"),
        lambda: driver.delete("orchard-none"),
    ]
    for call in calls:
        with pytest.raises(NoSuchVM, match='the specified VM "orchard-none" does not exist'):
            await call()
    with pytest.raises(DriverError):
        await driver.ip("orchard-none")
    assert await driver.list_vms() == []


async def test_what_does_not_run_cannot_be_ended(bench: Bench) -> None:
    await bench.made()
    for verb in (bench.driver.stop, bench.driver.suspend):
        with pytest.raises(NotRunning, match=f'VM "{NAME}" is not running'):
            await verb(NAME)
    with pytest.raises(DriverError, match="no IP address found, is your VM running"):
        await bench.driver.ip(NAME)


async def test_what_runs_can_neither_run_again_nor_be_changed_nor_deleted(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        await bench.driver.ip(NAME)  # then tart knows that it runs
        for call in (
            partial(bench.driver.run, NAME, RunOptions()),
            partial(bench.driver.configure, NAME, cpu=3),
            partial(bench.driver.delete, NAME),
        ):
            with pytest.raises(DriverError):
                await call()
        assert await bench.states() == {NAME: "running"}


@pytest.mark.parametrize("name", ["", "-rf", "--help", "a\0b"])
async def test_no_name_becomes_an_option(bench: Bench, name: str) -> None:
    for call in (
        partial(bench.driver.clone, IMAGE, name, lambda _: None),
        partial(bench.driver.pull, name, lambda _: None),
        partial(bench.driver.run, name, RunOptions()),
        partial(bench.driver.delete, name),
    ):
        with pytest.raises(DriverError, match=r"name|image"):
            await call()
    assert list(bench.home.glob("**/*.json")) == []


async def test_a_disk_only_grows(bench: Bench) -> None:
    await bench.made()
    await bench.driver.configure(NAME, disk_size=90)
    with pytest.raises(DriverError):
        await bench.driver.configure(NAME, disk_size=70)


# ---- what outlives a worker ----------------------------------------------------------------------------------------


async def left_running(bench: Bench, **options: Any) -> None:
    """Run a VM, and cancel whoever stays with it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(bench.driver.run, NAME, RunOptions(**options)))
        nursery.cancel_scope.cancel()
    await eventually(partial(has_state, bench, NAME, "running"))


async def test_a_vm_runs_on_when_nobody_stays_with_it_and_can_be_attached_to(bench: Bench) -> None:
    await bench.made()
    await left_running(bench)
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


def lend(bench: Bench, soft: float, hard: float) -> None:
    """Give a lease for so many seconds from now."""
    now = supervisor.clock()
    bench.driver.lease(now + soft, now + hard)


async def run_until_the_lease_ends(bench: Bench) -> None:
    with unwrap_groups():
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(bench.driver.run, NAME, RunOptions(leased=True)))
            lend(bench, 0.3, 0.4)


async def test_a_lease_that_runs_out_ends_those_vms_that_have_one(bench: Bench) -> None:
    await bench.made()
    await bench.made("orchard-free")
    lend(bench, 1000.0, 1001.0)
    async with running(bench, "orchard-free") as ended:
        with pytest.raises(DriverError, match=LEASE_OVER), trio.fail_after(GENEROUS):
            await run_until_the_lease_ends(bench)
        assert await bench.states() == {NAME: "stopped", "orchard-free": "running"}
        with pytest.raises(DriverError, match=EXPIRED):
            await bench.driver.run(NAME, RunOptions(leased=True))
        assert not ended.is_set()
    assert processes_in(bench.home) == []


async def test_a_lease_that_is_renewed_does_not_end(bench: Bench) -> None:
    await bench.made()
    lend(bench, 1000.0, 1000.0)
    async with running(bench, leased=True) as ended:
        lend(bench, 0.5, 0.5)
        lend(bench, 1000.0, 1000.0)
        began = supervisor.clock()
        await eventually(lambda: supervisor.clock() > began + 0.6)
        assert not ended.is_set()


async def test_a_note_stays_with_its_vm(bench: Bench) -> None:
    await bench.made()
    assert bench.driver.noted(NAME) == ""
    for text in ("one", "two"):
        bench.driver.note(NAME, text)
        assert bench.driver.noted(NAME) == text
    await bench.driver.configure(NAME, cpu=3)
    async with running(bench):
        assert bench.driver.noted(NAME) == "two"
    await bench.made("orchard-clone", NAME)
    assert bench.driver.noted("orchard-clone") == ""
    await bench.driver.delete(NAME)
    await bench.made()
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


async def test_values_in_the_environment_are_data(bench: Bench) -> None:
    await bench.made()
    text = "".join(f"printf '%s' \"${name}\" | od -An -v -tx1 | tr -d ' \\n'; echo\n" for name in NASTY)
    async with running(bench):
        lines = await script(bench, text + "ls hacked 2>/dev/null || echo safe\n", NASTY)
    assert [bytes.fromhex(line).decode() for line in lines[:-1]] == list(NASTY.values())
    assert lines[-1] == "safe"


async def test_a_script_that_fails_says_its_code_and_its_last_line(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        with pytest.raises(ScriptFailed, match="startup script failed with exit code 3: the end") as failure:
            await script(bench, "echo the end >&2; exit 3; echo never")
        assert failure.value.exit_code == 3
        with pytest.raises(ScriptFailed, match="exit code 1: before"):
            await script(bench, "echo before\nfalse\necho never")
        with pytest.raises(ScriptFailed, match="exit code 255"):
            await script(bench, "exit 255")
        assert await script(bench, "echo again") == ["again"]


async def test_a_command_that_reads_stdin_gets_its_end(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        lines = await script(bench, "cat; read line || echo end of file\nssh -V 2>&1 | wc -l >/dev/null\necho last")
    assert lines == ["end of file", "last"]


async def test_ten_thousand_lines_come_in_order(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        lines = await script(bench, "seq 10000; printf 'no newline'")
    assert lines == [*map(str, range(1, 10_001)), "no newline"]


async def test_both_outputs_keep_their_order_and_bad_utf8_is_replaced(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        lines = await script(bench, r"echo 1; echo 2 >&2; echo 3; echo 4 >&2; printf 'a\377b\n\n'")
    assert lines == ["1", "2", "3", "4", "a\ufffdb", ""]


async def test_a_slow_reader_slows_the_script(bench: Bench, tmp_path: Path) -> None:
    await bench.made()
    reached = tmp_path / "reached"
    lines = 0

    async def on_line(line: str) -> None:
        nonlocal lines
        lines += 1
        if lines == 1:
            await eventually(lambda: reached.exists())
            await at_rest(reached.read_text)
            assert int(reached.read_text() or 0) < 3000

    async with running(bench):
        await bench.driver.run_script(
            NAME,
            f"for i in $(seq 3000); do printf '%02000d\\n' $i; echo $i > {reached}; done",
            env={},
            username="admin",
            password="admin",
            bridged=False,
            on_line=on_line,
        )
    assert lines == 3000


async def test_a_script_that_is_cancelled_is_over(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        begun = trio.Event()

        async def on_line(line: str) -> None:
            begun.set()

        async with trio.open_nursery() as nursery:
            run = partial(
                bench.driver.run_script, NAME, "echo begun; sleep 1000", env={}, username="admin", password="admin"
            )  # fmt: skip
            nursery.start_soon(partial(run, bridged=False, on_line=on_line))
            await begun.wait()
            nursery.cancel_scope.cancel()
    await eventually(lambda: processes_in(bench.home) == [])


async def test_a_script_needs_a_vm_that_runs(bench: Bench) -> None:
    await bench.made()
    with pytest.raises(DriverError, match="running"):
        await script(bench, "echo never")


# ---- cancelled at every checkpoint ---------------------------------------------------------------------------------


class Cancelling(trio.abc.Instrument):
    """Cancels a scope before the N-th step of any task."""

    def __init__(self, number: int, scope: trio.CancelScope) -> None:
        self.left = number
        self._scope = scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self._scope.cancel()


async def run_and_stop(bench: Bench) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.driver.run, NAME, RunOptions(suspendable=True))
        await eventually(partial(has_state, bench, NAME, "running"))
        await bench.driver.stop(NAME)


# By name: what the VM has to be, and what is broken off.
VERBS: dict[str, tuple[str, Callable[[Bench], Awaitable[object]]]] = {
    "pull": ("absent", lambda bench: bench.driver.pull(IMAGE, lambda _: None)),
    "clone": ("absent", lambda bench: bench.made()),
    "clone locally": ("stopped", lambda bench: bench.made("orchard-second", NAME)),
    "fqn": ("absent", lambda bench: bench.driver.fqn(IMAGE)),
    "configure": ("stopped", lambda bench: bench.driver.configure(NAME, cpu=2, random_mac=True)),
    "list": ("stopped", lambda bench: bench.driver.list_vms()),
    "delete": ("stopped", lambda bench: bench.driver.delete(NAME)),
    "run": ("stopped", run_and_stop),
    "ip": ("running", lambda bench: bench.driver.ip(NAME)),
    "stop": ("running", lambda bench: bench.driver.stop(NAME)),
    "suspend": ("running", lambda bench: bench.driver.suspend(NAME)),
    "script": ("running", lambda bench: script(bench, "sleep 1000 & echo over")),
}


async def broken_off(bench: Bench, step: int, call: Callable[[Bench], Awaitable[object]]) -> bool:
    """Make a call until some step, and give whether it came to that."""
    with trio.CancelScope() as scope:
        instrument = Cancelling(step, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call(bench)
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_cancelled_at_any_checkpoint_leaves_what_delete_can_remove(bench: Bench, verb: str) -> None:
    before, call = VERBS[verb]
    for step in itertools.count(1):
        if before != "absent":
            await bench.made()
        if before == "running":
            async with running(bench, suspendable=True):
                cancelled = await broken_off(bench, step, call)
        else:
            cancelled = await broken_off(bench, step, call)
        for name, state in (await bench.states()).items():
            if state == "running":  # it was broken off in starting it
                with suppress(NotRunning):  # or in ending it
                    await bench.driver.stop(name)
            await bench.driver.delete(name)
        await eventually(lambda: processes_in(bench.home) == [])
        if not cancelled:
            break
    assert step > 1
    assert await bench.states() == {}
    if isinstance(bench.driver, SyntheticDriver):
        assert list(bench.home.iterdir()) == []


# ---- VMs without a hypervisor --------------------------------------------------------------------------------------


@pytest.fixture
def synthetic(tmp_path: Path) -> Bench:
    return Bench(SyntheticDriver(tmp_path), tmp_path)


@pytest.mark.parametrize("verb", ["stop", "suspend"])
async def test_what_a_script_left_in_the_background_ends_with_its_vm(synthetic: Bench, verb: str) -> None:
    await synthetic.made()
    async with running(synthetic) as ended:
        await script(synthetic, "(sleep 1000 & sleep 1000) & echo begun")
        assert processes_in(synthetic.home) != []
        await getattr(synthetic.driver, verb)(NAME)
        await ended.wait()
    await eventually(lambda: processes_in(synthetic.home) == [])


KILLED = """
import sys, trio
from functools import partial
from pathlib import Path
from orchard.vm import supervisor
from orchard.nursery import unwrap_groups
from orchard.vm.supervisor import EXPIRED
from orchard.vm.synthetic import SyntheticDriver
from orchard.vm.driver import RunOptions

async def main(home, name):
    driver = SyntheticDriver(Path(home))
    await driver.clone("image", name, lambda _: None)

    async def on_line(line):
        print(line, flush=True)

    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, name, RunOptions())
        await driver.run_script(
            name, "sleep 1000 & echo begun; sleep 1000", env={}, username="", password="", bridged=False, on_line=on_line
        )

trio.run(main, *sys.argv[1:])
"""


async def test_what_a_killed_worker_left_is_removed_by_the_next(synthetic: Bench) -> None:
    worker = subprocess.Popen(  # noqa: ASYNC220 -- it only has to be started
        [sys.executable, "-c", KILLED, synthetic.home, NAME], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert await trio.to_thread.run_sync(worker.stdout.readline) == "begun\n"
    worker.kill()
    worker.wait(GENEROUS)
    worker.stdout.close()
    assert processes_in(synthetic.home) != []
    assert await synthetic.states() == {NAME: "stopped"}
    await synthetic.made("orchard-other")
    await synthetic.driver.delete("orchard-other")
    assert processes_in(synthetic.home) != [], "another VM's are none of its business"
    await synthetic.driver.delete(NAME)
    await eventually(lambda: processes_in(synthetic.home) == [])
    assert list(synthetic.home.iterdir()) == []


@pytest.mark.parametrize("last", ["mkdir -p a/b; chmod 0 a/b; chmod 0 a; chmod 0 .", "rm -rf ~", "touch ~/../more"])
async def test_whatever_a_script_does_to_its_disk_the_vm_can_be_deleted(synthetic: Bench, last: str) -> None:
    await synthetic.made()
    async with running(synthetic):
        await script(synthetic, last)
    await synthetic.driver.delete(NAME)
    assert list(synthetic.home.iterdir()) == []


async def test_a_clone_has_a_disk_of_its_own(synthetic: Bench) -> None:
    await synthetic.made("orchard-first")
    await synthetic.driver.clone("orchard-first", NAME, lambda _: None)
    async with running(synthetic):
        await script(synthetic, "echo mine > file; ln -s /none link")
    await synthetic.made("orchard-second", NAME)
    await synthetic.driver.delete(NAME)
    assert list((synthetic.home / "orchard-first" / "root").iterdir()) == []
    assert (synthetic.home / "orchard-second" / "root" / "file").read_text() == "mine\n"
    assert (synthetic.home / "orchard-second" / "root" / "link").is_symlink()


async def test_a_clone_that_fails_leaves_nothing(synthetic: Bench) -> None:
    await synthetic.made()
    async with running(synthetic):
        await script(synthetic, "mkfifo pipe")
    with pytest.raises(DriverError, match=r'cannot make VM "orchard-second" in .*pipe'):
        await synthetic.made("orchard-second", NAME)
    assert [path.name for path in synthetic.home.iterdir()] == [NAME]


async def test_the_remains_of_an_interrupted_removal_are_in_nobodys_way(synthetic: Bench) -> None:
    for left in (f".{NAME}.old", f".{NAME}.new"):
        (synthetic.home / left / "root" / "tmp").mkdir(parents=True)
        (synthetic.home / left / "vm.json").write_text("{}")
    assert await synthetic.states() == {}
    await synthetic.made()
    await synthetic.driver.delete(NAME)
    assert list(synthetic.home.iterdir()) == []


async def test_a_disk_that_cannot_be_written_is_an_error_of_the_driver(synthetic: Bench) -> None:
    (synthetic.home / "file").touch()
    driver = SyntheticDriver(synthetic.home / "file")
    with pytest.raises(DriverError, match=f'cannot make VM "{NAME}" in .*/file: Not a directory'):
        await driver.clone(IMAGE, NAME, lambda _: None)
    await synthetic.made()
    (synthetic.home / NAME / "vm.json.new").mkdir()
    with pytest.raises(DriverError, match=r"cannot write .*/vm\.json: Is a directory"):
        await synthetic.driver.configure(NAME, cpu=2)
    (synthetic.home / NAME / "vm.json").write_text("torn {")
    with pytest.raises(DriverError, match="cannot read the file of VM"):
        await synthetic.driver.run(NAME, RunOptions())


async def test_pulls_and_boots_can_take_their_time(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    driver = SyntheticDriver(tmp_path, boot_seconds=30, pull_seconds=60)
    began = trio.current_time()
    told: list[int] = []
    await driver.clone(IMAGE, NAME, told.append)
    assert told == list(range(10, 101, 10))
    assert trio.current_time() - began == pytest.approx(60)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, NAME, RunOptions())
        assert trio.current_time() - began == pytest.approx(90)
        await driver.stop(NAME)


async def test_a_boot_can_be_stopped(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    driver = SyntheticDriver(tmp_path, boot_seconds=30)
    await driver.clone(IMAGE, NAME, lambda _: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.run, NAME, RunOptions())
        await trio.testing.wait_all_tasks_blocked()
        await driver.stop(NAME)
    assert trio.current_time() == pytest.approx(0)
    assert await driver.list_vms() == [LocalVM(NAME, "stopped")]
