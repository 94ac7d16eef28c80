"""What every driver promises the worker, held against each of them.

The synthetic one is itself; tart is the executable stand-in, its startup scripts go by the system's real `ssh` to a
real SSH server with a real shell behind it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import GENEROUS, eventually, processes_in

from orchard.synthetic import SyntheticDriver
from orchard.tart import Driver, DriverError, LocalVM, NoSuchVM, NotRunning, RunOptions, ScriptFailed, TartDriver

STANDIN = Path(__file__).parent / "standin"
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


@pytest.fixture(scope="session")
def sshd() -> Iterator[int]:
    """The port of an SSH server."""
    process = subprocess.Popen([sys.executable, STANDIN / "sshd.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.terminate()
    process.wait(GENEROUS)
    process.stdout.close()


def tart(home: Path, port: int = 22, **env: str) -> TartDriver:
    return TartDriver(
        str(STANDIN / "tart"), ssh_port=port, env={"TART_HOME": str(home), **env}, stop_seconds=10
    )  # fmt: skip


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
        yield ended
        nursery.cancel_scope.cancel()


async def at_rest(look: Callable[[], object]) -> None:
    """Return when something is the same for half a second: it does not go on by itself any more."""
    seen: list[object] = []

    def same() -> bool:
        seen.append(look())
        return len(seen) > 50 and len(set(seen[-50:])) == 1

    await eventually(same)


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
        with pytest.raises(NotRunning if verb == bench.driver.stop else DriverError, match="not"):
            await verb(NAME)
    with pytest.raises(DriverError, match="no IP address found, is your VM running"):
        await bench.driver.ip(NAME)


async def test_what_runs_can_neither_run_again_nor_be_changed_nor_deleted(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
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


async def test_a_run_that_is_cancelled_stops_the_vm(bench: Bench) -> None:
    await bench.made()
    async with running(bench):
        pass
    assert await bench.states() == {NAME: "stopped"}
    assert processes_in(bench.home) == []


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
    assert processes_in(bench.home) == []


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


async def life(bench: Bench) -> None:
    """Every verb once."""
    driver = bench.driver
    await driver.pull(IMAGE, lambda _: None)
    await bench.made()
    await driver.configure(NAME, cpu=2, random_mac=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(driver.run, NAME, RunOptions(suspendable=True)))
        await eventually(partial(has_state, bench, NAME, "running"))
        await driver.ip(NAME)
        await script(bench, "sleep 1000 & echo over")
        await driver.suspend(NAME)
    await driver.stop(NAME)
    await driver.delete(NAME)


async def broken_off(bench: Bench, step: int) -> bool:
    """Live until some step, and give whether it came to it. What is left can be deleted."""
    with trio.CancelScope() as scope:
        instrument = Cancelling(step, scope)
        trio.lowlevel.add_instrument(instrument)
        await life(bench)
    trio.lowlevel.remove_instrument(instrument)
    assert "running" not in (await bench.states()).values()
    for name in await bench.states():
        await bench.driver.delete(name)
    assert await bench.driver.list_vms() == []
    return scope.cancelled_caught


@pytest.mark.parametrize("kind", ["synthetic", "tart"])
def test_every_verb_cancelled_at_any_checkpoint_leaves_what_delete_can_remove(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    port = request.getfixturevalue("sshd") if kind == "tart" else 0
    stride = 1 if kind == "synthetic" else 4  # each of the latter's lives takes some 20 processes
    for step in itertools.count(1, stride):
        home = tmp_path / str(step)
        home.mkdir()
        bench = Bench(SyntheticDriver(home) if kind == "synthetic" else tart(home, port), home)
        if not trio.run(broken_off, bench, step, strict_exception_groups=True):
            break
        assert processes_in(bench.home) == []
        assert kind == "tart" or list(home.iterdir()) == []
    assert step > 20
