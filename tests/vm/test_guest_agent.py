"""Scripts by the guest agent of a VM, with the stand-in for tart. What holds for all drivers is in test_drivers.py."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.processes import eventually, processes_in

from orchard.schema import VMSpec
from orchard.tart import TartDriver
from orchard.vm.driver import DriverError, NotRunning, Script, ScriptFailed
from orchard.vm.script import CONNECT_SECONDS, TIMED_OUT

Clock = trio.testing.MockClock
STANDIN = Path(__file__).parent.parent / "standin" / "tart"
NAME = "orchard-vm-uid-0"


@pytest.fixture
def clock() -> Clock:
    """A clock that can be advanced, and is fast: pauses between attempts take little time."""
    return trio.testing.MockClock(rate=10)


@asynccontextmanager
async def guest(home: Path, *, vetu: bool = False, **env: str) -> AsyncIterator[TartDriver]:
    """A VM that runs during the block. The stand-in reads the variables `env`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {"TART_HOME": str(home), "PATH": path, **env}
    driver = TartDriver(str(STANDIN), home / "driver", vetu=vetu, env=environ, own_addresses=True)
    await driver.clone("example.com/image", NAME, lambda _: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(driver.run, NAME, VMSpec()))
        # The stand-in has forgotten the calls of an earlier boot.
        await eventually((home / f"{NAME}.lock").exists)
        yield driver
        with suppress(NotRunning):
            await driver.stop(NAME)
    await eventually(lambda: processes_in(home) == [])


async def run(driver: TartDriver, script: Script, lines: list[str] | None = None) -> list[str]:
    """Run a script, and return its lines, which `lines` gets as they come."""
    received: list[str] = [] if lines is None else lines

    async def on_line(line: str) -> None:
        received.append(line)

    await driver.run_script(NAME, script, on_line)
    return received


def agent_calls(home: Path) -> list[str]:
    """Return the verbs of the calls of the agent."""
    calls = map(json.loads, (home / "calls.jsonl").read_text().splitlines())
    return [words[0] for words in calls if words[0] == "exec" or "agent" in words]


def by_agent(text: str, **fields: float) -> Script:
    return Script(text, agent=True, os="linux", **fields)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
async def test_script_waits_for_an_agent_that_comes_up_late_in_few_calls(tmp_path: Path) -> None:
    async with guest(tmp_path, TART_AGENT_LATE="3") as driver:
        assert await run(driver, by_agent("echo hello; pwd")) == ["hello", os.environ["HOME"]]
    assert agent_calls(tmp_path) == ["ip", "exec", "ip", "exec"]


async def test_agent_that_never_answers_fails_with_the_last_reason(tmp_path: Path, clock: Clock) -> None:
    async with guest(tmp_path, TART_AGENT_LATE="1000") as driver, trio.open_nursery() as nursery:

        async def lose_patience() -> None:
            await eventually(lambda: "exec" in agent_calls(tmp_path)[2:])
            clock.jump(CONNECT_SECONDS)

        nursery.start_soon(lose_patience)
        with pytest.raises(DriverError, match=r"no guest agent within 600 seconds: .*control socket"):
            await run(driver, by_agent("echo never"))


async def test_script_by_the_agent_needs_no_address(tmp_path: Path) -> None:
    async with guest(tmp_path, TART_NO_IP="1") as driver:
        assert await run(driver, by_agent("echo hello")) == ["hello"]


@pytest.mark.parametrize(
    ("os_", "shell"), [("linux", "bash"), pytest.param("darwin", "zsh", marks=pytest.mark.needs("zsh"))]
)
async def test_script_by_the_agent_runs_in_the_login_shell_of_the_system(tmp_path: Path, os_: str, shell: str) -> None:
    async with guest(tmp_path) as driver:
        script = Script('echo "${BASH_VERSION:+bash}${ZSH_VERSION:+zsh} $SHELL"', agent=True, os=os_)  # type: ignore[arg-type]
        assert await run(driver, script) == [f"{shell} {shutil.which(shell)}"]


async def test_script_by_the_agent_that_takes_too_long_is_killed_and_spares_the_agent(
    tmp_path: Path, clock: Clock
) -> None:
    async with guest(tmp_path, TART_AGENT_FRAGILE="1") as driver:

        async def on_line(line: str) -> None:
            clock.jump(600)

        # A number that no other test sleeps for: all processes of the machine are searched.
        text = "trap '' TERM; setsid sleep 86021 & echo begun; sleep 86021"
        with pytest.raises(ScriptFailed) as failed:
            await driver.run_script(NAME, by_agent(text, seconds=600), on_line)
        assert failed.value.exit_code == TIMED_OUT
        assert await run(driver, by_agent("echo again; ps -A -o args= | grep -c '[s]leep 86021' || true")) == [
            "again",
            "0",
        ]


async def test_cancelled_script_by_the_agent_is_killed_and_spares_the_agent(tmp_path: Path) -> None:
    async with guest(tmp_path, TART_AGENT_FRAGILE="1") as driver:
        lines: list[str] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, driver, by_agent("echo begun; sleep 1000"), lines)
            await eventually(lambda: lines == ["begun"])
            nursery.cancel_scope.cancel()
        assert await run(driver, by_agent("echo again")) == ["again"]


async def test_agent_that_loses_its_guest_fails_the_script(tmp_path: Path) -> None:
    async with guest(tmp_path) as driver, trio.open_nursery() as nursery:
        lines: list[str] = []

        async def end_guest() -> None:
            await eventually(lambda: lines == ["begun"])
            await driver.stop(NAME)

        nursery.start_soon(end_guest)
        with pytest.raises(DriverError):
            await run(driver, by_agent("echo begun; sleep 1000"), lines)


async def test_vetu_has_no_guest_agent(tmp_path: Path) -> None:
    async with guest(tmp_path, vetu=True) as driver:
        with pytest.raises(DriverError, match="vetu does not support guest agents"):
            await run(driver, by_agent("echo never"))
