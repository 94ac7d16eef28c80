"""Start and stop of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from harness.clients import call
from harness.processes import GENEROUS, PLAIN, command, environment, free_port
from harness.terminals import terminal

from orchard.base import daemon, logs

# ---- start and stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_the_first_signal_cancels_the_work(number: signal.Signals) -> None:
    async def work() -> None:
        signal.raise_signal(number)
        await trio.sleep_forever()

    # The tests may run under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        await daemon.run_until_signal(work)
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_work_under_nohup_goes_on_when_the_terminal_is_closed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    reached = False

    async def work() -> None:
        nonlocal reached
        signal.raise_signal(signal.SIGHUP)
        await trio.testing.wait_all_tasks_blocked()
        reached = True

    try:
        await daemon.run_until_signal(work)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert reached


async def test_with_a_stop_event_the_first_signal_sets_it_and_the_second_cancels() -> None:
    stop = trio.Event()
    ended = trio.Event()

    async def work() -> None:
        signal.raise_signal(signal.SIGINT)
        await stop.wait()
        ended.set()
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep_forever()

    await daemon.run_until_signal(work, stop=stop)
    assert ended.is_set()


async def test_run_until_signal_returns_when_the_work_does() -> None:
    done = trio.Event()

    async def work() -> None:
        done.set()

    await daemon.run_until_signal(work)
    assert done.is_set()


@pytest.mark.slow
@pytest.mark.parametrize(("role", "way"), [("controller", "Ctrl-C"), ("controller", "hang-up"), ("worker", "hang-up")])
def test_role_on_a_terminal_ends_in_order(tmp_path: Path, role: str, way: str) -> None:
    words = {
        "controller": ("--listen", "127.0.0.1:0", *PLAIN),
        "worker": ("http://127.0.0.1:1", "--runtime", "synthetic"),
    }
    with terminal(command(role, *words[role]), environment(tmp_path)) as running:
        running.read_until("listening on|cannot reach")
        if way == "Ctrl-C":
            running.type("\x03")
            assert running.finish() == 0
            assert "Traceback" not in running.said
        else:
            running.hang_up()
            assert running.process.wait(GENEROUS) == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a full disk", "a pipe without a reader"])
def test_controller_works_on_when_nothing_can_be_printed(tmp_path: Path, place: str) -> None:
    port = free_port()
    out = os.open("/dev/full", os.O_WRONLY)
    if place != "a full disk":
        reader, out = os.pipe()
        os.close(reader)
    process = subprocess.Popen(
        command("controller", "--listen", f"127.0.0.1:{port}", *PLAIN),
        env=environment(tmp_path),
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(out)
    assert process.stderr is not None
    with process, process.stderr:
        assert "cannot print" in process.stderr.readline()
        assert call(f"http://127.0.0.1:{port}", "GET", "/v1/vms")[0] == 200
        process.terminate()
        assert process.wait(GENEROUS) == 0


def test_an_expected_error_becomes_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "configure", lambda _: None)

    async def fail(error: Exception) -> None:
        async with trio.open_nursery():
            raise error

    async def succeed() -> None:
        await trio.lowlevel.checkpoint()

    failures: dict[type[Exception], int] = {FileNotFoundError: 2, OSError: 1}
    for error, status in ((FileNotFoundError("not here"), 2), (PermissionError("not allowed"), 1)):
        assert daemon.run_main("program", partial(fail, error), failures, logs.LogSettings()) == status
        assert capsys.readouterr() == ("", f"program: {error}\n")
    with pytest.raises(KeyError):
        daemon.run_main("program", partial(fail, KeyError()), failures, logs.LogSettings())
    assert daemon.run_main("program", succeed, failures, logs.LogSettings()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps what is free")
async def test_memory_of_a_burst_is_returned_although_something_remains_behind_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    burst = [bytearray(10_000) for _ in range(3_000)]
    kept = burst[::100]
    before = resident()
    burst.clear()
    with trio.move_on_after(15):
        await daemon.return_memory()
    assert resident() < before - 20_000_000
    assert len(kept) == 30
