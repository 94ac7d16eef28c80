"""Running and ending programs: captured output, cancellation, and calls that a killed worker left."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import trio
from harness.processes import eventually, processes_in

from orchard.vm.driver import DriverError
from orchard.vm.processes import (
    OUTPUT_BYTES,
    Calls,
    find_complaint,
    is_locked,
    kill,
    presentable,
    run_program,
    wait_unlocked,
)


def shell(home: Path, text: str) -> list[str]:
    """Return the command of a shell that `processes_in(home)` finds."""
    return ["/bin/sh", "-c", f"cd {home}; {text}"]


def test_output_in_a_message_is_one_short_printable_line() -> None:
    assert presentable("\x1b[31mred\x1b[0m\x07\tx\r\u2028\u202e") == "red  x"
    assert presentable("x" * 1000) == "x" * 400


APPLE = 'Error Domain=VZErrorDomain Code=1 "The virtual machine failed to start."'


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ("one\ntwo\r\n \t\n\0\n", "two"),
        (" \n\n", ""),
        ("", ""),
        ("pulling manifest...\npulling disk (61.4 GB compressed)...\n0%\nError: The request timed out.\n",
         "The request timed out."),
        ('failed to open lock file file:///vms/x/config.json: No such file or directory',
         "failed to open lock file file:///vms/x/config.json: No such file or directory"),
        # Swift's argument parser
        ("Error: Unknown option '--no-usb'\nUsage: tart run [<options>] <name>\n  See 'tart run --help' for more information.\n",
         "Unknown option '--no-usb'"),
        ("Error: Missing expected argument '<name>'\n\nOVERVIEW: Run a VM\n\nUSAGE: tart run <name>\n\nARGUMENTS:\n  <name>\n",
         "Missing expected argument '<name>'"),
        # Apple's frameworks, on one line, on several, nested, cut off
        (f"{APPLE} UserInfo={{NSLocalizedFailure=Internal Virtualization error., NSLocalizedFailureReason=The virtual "
         "machine failed to start.}\n", APPLE),
        (f"{APPLE} UserInfo={{\n    NSLocalizedFailure=\"Internal\";\n    Reason = {{\n}}\n}}\n", APPLE),
        (f"restoring VM state from a snapshot...\n{APPLE} UserInfo={{NSLocalizedFailure=Internal", APPLE),
        ('Error Domain=VZErrorDomain Code=2 "Failed to lock auxiliary storage." UserInfo={NSLocalizedFailure=Invalid, '
         'NSUnderlyingError=0x600000d5bde0 {Error Domain=NSPOSIXErrorDomain Code=35 "Resource temporarily unavailable"\n}}\n',
         'Error Domain=VZErrorDomain Code=2 "Failed to lock auxiliary storage." (Resource temporarily unavailable)'),
        ('Error Domain=NSURLErrorDomain Code=-1001 "The request timed out." UserInfo=0x7b70f6e0 {NSUnderlyingError=0x6 '
         '{Error Domain=kCFErrorDomainCFNetwork Code=-1001 "(null)" UserInfo={_kCFStreamErrorCodeKey=-2102}}}\n',
         'Error Domain=NSURLErrorDomain Code=-1001 "The request timed out."'),
        (f"guest has stopped the virtual machine due to error: {APPLE} UserInfo={{a=b}}\nCancellationError()\n",
         f"guest has stopped the virtual machine due to error: {APPLE}"),
        # the last of several, and the cause of one
        ('Error: cancelled\nAttempting to re-try...\nError: AuthFailed(why: "status 400", details: "Bad Request")\n',
         'AuthFailed(why: "status 400", details: "Bad Request")'),
        ("Error: cannot start softnet\n\nCaused by:\n    0: cannot open vmnet\n    1: Operation not permitted (os error 1)\n",
         "cannot start softnet: Operation not permitted (os error 1)"),
        ("Error: cannot start softnet\nCaused by: Operation not permitted\nnote: run with sudo\n",
         "cannot start softnet: Operation not permitted"),
        ("tart/Fetcher.swift:15: Fatal error: Unexpectedly found nil\nzsh: trace trap\n",
         "tart/Fetcher.swift:15: Fatal error: Unexpectedly found nil"),
        # terminals: colours, a title, a progress bar
        ("\x1b]0;tart\x07\x1b[2K\x1b[1G\x1b[31;1mError:\x1b[0m it\u2028broke\x1b(B\r\n", "it broke"),
        ("10%\r20%\rno space left\r", "no space left"),
    ],
)  # fmt: skip
def test_line_that_names_the_error_is_found(output: str, shown: str) -> None:
    assert find_complaint(output.encode()) == shown
    assert find_complaint(b"x" * 100_000 + b"\n" + output.encode()) == (shown or "x" * 400)


def test_usage_text_alone_is_shown() -> None:
    assert find_complaint(b"usage: ssh [-46AaCfGg]\n") == "usage: ssh [-46AaCfGg]"


@pytest.mark.parametrize("noise", [b"\n", b" ", b" \n", b"\n \n "])
def test_noise_is_searched_about_as_fast_as_text(noise: bytes) -> None:
    def seconds(output: bytes) -> float:
        began = time.thread_time()
        find_complaint((output * (1 << 16))[: 1 << 16])
        return time.thread_time() - began

    assert seconds(noise) < 50 * max(seconds(b"x\n") for _ in range(3))


async def test_status_and_the_end_of_both_outputs_are_returned(tmp_path: Path) -> None:
    received = bytearray()
    text = "yes 0123456789 | head -c 3000000; echo the end; echo error >&2; exit 3"
    completed = await run_program(shell(tmp_path, text), on_output=received.extend)
    assert completed.status == 3
    assert len(completed.stdout) == OUTPUT_BYTES
    assert completed.stdout.endswith(b"the end\n")
    assert completed.stderr == b"error\n"
    assert len(received) == 3_000_000 + len("the end\nerror\n")


async def test_missing_program_raises_file_not_found() -> None:
    with pytest.raises(FileNotFoundError):
        await run_program(["/none/program"])


async def run_until_it_prints(home: Path, text: str) -> bytearray:
    """Run a shell, cancel it when it has printed something, and return all output."""
    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_program, shell(home, text), on_output=received.extend))
        await eventually(lambda: bool(received))
        nursery.cancel_scope.cancel()
    return received


# A daemon that a shell without job control has started in the background: tells whether its programs ignore SIGINT.
STARTED_IN_THE_BACKGROUND = """
import signal, sys, trio
from orchard.base.daemon import run_until_signal
from orchard.vm.processes import run_program

async def work():
    asked = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    print((await run_program([sys.executable, "-S", "-c", asked])).stdout.decode())

signal.signal(signal.SIGINT, signal.SIG_IGN)
trio.run(run_until_signal, work)
"""


def test_programs_of_a_daemon_that_was_started_with_sigint_ignored_can_be_interrupted() -> None:
    words = [sys.executable, "-c", STARTED_IN_THE_BACKGROUND]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.split() == ["False"]


async def test_cancelled_program_is_interrupted_and_its_last_output_is_read(tmp_path: Path) -> None:
    text = "trap 'echo bye; exit 0' INT; echo up; while :; do sleep 0.01; done"
    assert await run_until_it_prints(tmp_path, text) == b"up\nbye\n"
    assert processes_in(tmp_path) == []


async def test_program_that_ignores_the_interrupt_is_killed_with_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.vm.processes.STOP_SECONDS", 0.0)
    assert await run_until_it_prints(tmp_path, "trap '' INT; sleep 1000 & echo up; wait") == b"up\n"
    await eventually(lambda: processes_in(tmp_path) == [])


async def test_kill_leaves_no_child_and_reaps(tmp_path: Path) -> None:
    process = await trio.lowlevel.open_process(shell(tmp_path, "sleep 1000 & touch up; wait"), start_new_session=True)
    await eventually((tmp_path / "up").exists)
    with trio.CancelScope() as scope:
        scope.cancel()
        await kill(process)
    assert process.returncode == -signal.SIGKILL
    await eventually(lambda: processes_in(tmp_path) == [])


async def test_lock_of_another_process_is_seen_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with path.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = subprocess.Popen(["/bin/sleep", "1000"], stdin=file)  # noqa: ASYNC220
    assert is_locked(path)
    assert not await wait_unlocked(path, 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_unlocked, path, 1000.0)
        holder.kill()
        await trio.to_thread.run_sync(holder.wait)
    assert not is_locked(path)


async def test_call_has_a_locked_file_with_its_number_while_it_runs(tmp_path: Path) -> None:
    calls, found = Calls(tmp_path, os.environ), list[tuple[bytes, bool, int]]()

    def look(printed: bytes) -> None:
        (path,) = tmp_path.glob("verb-*")
        found.append((path.read_bytes(), is_locked(path), int(printed)))

    completed = await calls.run(["/bin/sh", "-c", "echo $$"], label="verb", on_output=look)
    number = int(completed.stdout)
    assert found == [(b"%d\n" % number, True, number)]
    assert list(tmp_path.glob("*")) == []
    with pytest.raises(DriverError, match=r"cannot run /none/program: .*not found"):
        await calls.run(["/none/program"], label="verb")


async def test_call_returns_although_its_file_cannot_be_deleted(tmp_path: Path) -> None:
    replaced = 'for file in "$1"/*; do rm "$file"; mkdir "$file"; done; echo done'
    completed = await Calls(tmp_path, os.environ).run(["/bin/sh", "-c", replaced, "sh", str(tmp_path)], label="verb")
    assert (completed.status, completed.stdout) == (0, b"done\n")


def test_name_that_is_too_long_for_a_file_is_not_locked(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("before", "seconds", "number"), [(":", 1000.0, signal.SIGINT), ("trap '' INT", 0.0, signal.SIGKILL)]
)
async def test_end_left_interrupts_or_kills_the_call_of_a_killed_worker(
    tmp_path: Path, before: str, seconds: float, number: signal.Signals
) -> None:
    directory = tmp_path / "calls"
    directory.mkdir()
    path = directory / "pull-1"
    with path.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        words = ["/bin/sh", "-c", f'{before}; echo "$$" >&0; exec sleep 1000']
        left = subprocess.Popen(words, stdin=file, start_new_session=True)  # noqa: ASYNC220
    # A file without a lock belongs to a call that has ended. Its number may be that of another process by now.
    (directory / "pull-2").write_text(f"{os.getpid()}\n")
    await eventually(lambda: path.read_bytes() != b"")
    await Calls(directory, os.environ).end_left(seconds)
    assert await trio.to_thread.run_sync(left.wait) == -number
    assert list(directory.iterdir()) == []


async def test_end_left_does_not_end_calls_of_the_same_worker(tmp_path: Path) -> None:
    calls, fifo, begun = Calls(tmp_path / "calls", os.environ), tmp_path / "fifo", trio.Event()
    os.mkfifo(fifo)

    async def run() -> None:
        words = ["/bin/sh", "-c", f"echo begun; read line <{fifo}; echo $line"]
        completed = await calls.run(words, label="list", on_output=lambda _: begun.set())
        assert (completed.status, completed.stdout) == (0, b"begun\nended\n")

    async with trio.open_nursery() as running:
        running.start_soon(run)
        await begun.wait()
        await calls.end_left(0.0)
        await trio.to_thread.run_sync(fifo.write_text, "ended\n")
