"""The tart driver: argument lists, parsed output, calls that fail, hang or are cancelled, and facts about the host."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.every_field import EVERY_FIELD
from harness.processes import GENEROUS, eventually, no_descriptors, processes_in
from harness.strategies import BEGAN, pending

from orchard import tart as tart_module
from orchard.base.nursery import unwrap_groups
from orchard.codec import MAX_UINT, attrs_of
from orchard.resources.validation import vm_from_client
from orchard.schema import VM, HostDir, VMSpec, Worker
from orchard.tart import TartDriver, find_tart
from orchard.transitions import assign, change
from orchard.vm import supervised
from orchard.vm.driver import (
    DriverError,
    Hardware,
    LocalVM,
    NoSuchVM,
    NotRunning,
    Script,
    SupervisorLost,
    operand,
)
from orchard.vm.instance_state import hardware_of
from orchard.vm.processes import OUTPUT_BYTES, is_locked
from orchard.vm.tart_cli import (
    Abilities,
    Percentage,
    parse_images,
    parse_list,
    run_arguments,
    seconds_until_listable,
    set_arguments,
    verb_error,
)

STANDIN = Path(__file__).parent.parent / "standin" / "tart"
IMAGE = "example.com/image"
Clock = trio.testing.MockClock


def tart(
    home: Path,
    *,
    vetu: bool = False,
    stop_seconds: float = 5,
    clock: Callable[[], float] = time.time,
    **env: str,
) -> TartDriver:
    """Return a driver with the stand-in, which reads the variables `env`."""
    # The stand-in is started often: by the Python at hand.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return TartDriver(
        str(STANDIN),
        home / "driver",
        vetu=vetu,
        env={"TART_HOME": str(home), "PATH": path, **env},
        stop_seconds=stop_seconds,
        clock=clock,
        own_addresses=True,
    )


def program(path: Path, text: str, **options: Any) -> TartDriver:
    """Return a driver with a shell script in the place of tart. Its version is new, and its `run` has no other flags."""
    about = 'case "$1 $2" in "--version "*) echo 2.40.0; exit ;; "run --help") exit ;; esac'
    path.write_text(f"#!/bin/sh\n{about}\n{text}\n")
    path.chmod(0o755)
    return TartDriver(str(path), path.parent / "driver", **options)


def calls(home: Path) -> list[list[str]]:
    """Return the calls of the stand-in, without those that ask what it can do."""
    lines = (home / "calls.jsonl").read_text().splitlines()
    return [words for words in map(json.loads, lines) if words not in (["--version"], ["run", "--help"])]


@pytest.fixture
def clock() -> Clock:
    """A clock that runs at the speed of the real one and can be advanced."""
    return trio.testing.MockClock(rate=1)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"headless": True}, ["--no-graphics"]),
        ({"net_softnet": True}, ["--net-softnet"]),
        (
            {"net_softnet_allow": ("10.0.0.0/8", "fd00::/8")},
            ["--net-softnet", "--net-softnet-allow", "10.0.0.0/8,fd00::/8"],
        ),
        ({"net_softnet_block": ("0.0.0.0/0",)}, ["--net-softnet", "--net-softnet-block", "0.0.0.0/0"]),
        ({"net_bridged": "en0"}, ["--net-bridged=en0"]),
        (
            {"net_softnet_allow": ("@host", "in @host:22"), "net_softnet_block": ("out 0.0.0.0/0",)},
            ["--net-softnet", "--net-softnet-allow", "@host,in @host:22", "--net-softnet-block", "out 0.0.0.0/0"],
        ),
        ({"nested": True}, ["--nested"]),
        ({"suspendable": True}, ["--suspendable"]),
        ({"host_dirs": (HostDir("src", "/a b", ro=True),)}, ["--dir=src:/a b:ro"]),
        (
            {"host_dirs": (HostDir("x", "/x"), HostDir("y", "https://h:8/a.tgz"))},
            ["--dir=x:/x", "--dir=y:https://h:8/a.tgz"],
        ),
    ],
)
def test_run_arguments(options: dict[str, Any], words: list[str]) -> None:
    assert run_arguments("vm", VMSpec(**options)) == ["run", *words, "vm"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--no-audio", "--no-clipboard", "--no-usb-accessories"]),
        ({"audio": True}, ["--no-clipboard", "--no-usb-accessories"]),
        ({"audio": True, "clipboard": True}, ["--no-usb-accessories"]),
    ],
)
def test_devices_of_the_host_are_kept_from_the_guest_by_the_flags_at_hand(
    options: dict[str, Any], words: list[str]
) -> None:
    flags = {"--no-audio", "--no-clipboard", "--no-usb-accessories", "--no-other"}
    assert run_arguments("vm", VMSpec(**options), flags) == ["run", *words, "vm"]
    assert run_arguments("vm", VMSpec(**options)) == ["run", "vm"]


APPLIED_AT_BOOT = [field.name for field in attrs_of(VMSpec) if field.change == "boot" and field.name != "power_state"]


@pytest.mark.parametrize("name", APPLIED_AT_BOOT)
def test_each_field_that_applies_at_the_next_boot_reaches_tart(name: str) -> None:
    def calls_of(vm: VM) -> tuple[list[str], list[str]]:
        return set_arguments("vm", hardware_of(vm)), run_arguments("vm", vm.spec)

    vm = assign(pending(), Worker("w"), BEGAN)
    _, other = vm_from_client({**EVERY_FIELD, "name": "vm"}, [])
    assert calls_of(change(vm, replace(vm.spec, **{name: getattr(other, name)}))) != calls_of(vm)


@pytest.mark.parametrize(
    ("version", "numbers", "safe"),
    [
        (b"2.38.1\n", (2, 38, 1), False),
        (b"2.39.0\n", (2, 39, 0), True),
        (b"tart 2.100\n", (2, 100, 0), True),
        (b"3.0.0-rc1\n", (3, 0, 0), True),
        (b"SNAPSHOT\n", (), False),
        (b"", (), False),
    ],
)
def test_version_and_flags_are_read(version: bytes, numbers: tuple[int, ...], safe: bool) -> None:
    abilities = Abilities.parse(
        version, b"  --no-audio    Disable audio, see also --nested.\n  --dir <dir:ro>\n x--y\n"
    )
    assert (abilities.version, abilities.lists_safely) == (numbers, safe)
    assert abilities.flags == {"--no-audio", "--nested", "--dir"}


def test_list_waits_for_vms_in_their_first_ten_seconds() -> None:
    assert seconds_until_listable([], 1000.0) == 0
    assert seconds_until_listable([980.0, 994.0, 992.0], 1000.0) == 4
    assert seconds_until_listable([990.0], 1000.0) == 0
    # The clock was set back.
    assert seconds_until_listable([1001.0, 5000.0], 1000.0) == 0


def test_set_arguments() -> None:
    assert set_arguments("vm", Hardware()) == []
    assert set_arguments("vm", Hardware(cpu=2, memory=1024, disk_size=60), random_mac=True, random_serial=True) == (
        ["set", "vm", "--cpu", "2", "--memory", "1024", "--disk-size", "60", "--random-mac", "--random-serial"]
    )


@pytest.mark.parametrize(
    "shared",
    [
        HostDir("a:b", "/x"),
        HostDir("a,b", "/x"),
        HostDir("a", "/x:ro"),
        HostDir("a", "/x,/y"),
        HostDir("", "/x"),
        HostDir("a", ""),
        HostDir("a", "/x\0"),
        HostDir("a", "https://h/x:y"),
    ],
)
def test_shared_directory_with_colon_or_comma_is_refused(shared: HostDir) -> None:
    with pytest.raises(DriverError, match='expected name and path without ":" and ","'):
        run_arguments("vm", VMSpec(host_dirs=(shared,)))


@pytest.mark.parametrize("text", ["", "-x", "--help", "a\0"])
def test_operand_that_looks_like_an_option_is_refused(text: str) -> None:
    with pytest.raises(DriverError, match="image is"):
        operand("image", text)
    with pytest.raises(DriverError):
        run_arguments(text, VMSpec())
    with pytest.raises(DriverError, match="network of --net-softnet-allow"):
        run_arguments("vm", VMSpec(net_softnet_allow=(text,)))


def test_network_with_a_comma_and_interface_with_nul_are_refused() -> None:
    with pytest.raises(DriverError, match="expected one network, without a comma"):
        run_arguments("vm", VMSpec(net_softnet_block=("10.0.0.0/8,0.0.0.0/0",)))
    with pytest.raises(DriverError, match="interface to bridge to"):
        run_arguments("vm", VMSpec(net_bridged="en0\0"))


# ---- output --------------------------------------------------------------------------------------------------------


def test_changed_percentages_are_reported_for_any_chunking() -> None:
    output = b"pulling x...\r\n0%\n0%\nlayer 1/2: 42% of 3 GB\r42.9%\n100%\n200%\nno percent here %\n"
    for size in range(1, len(output) + 1):
        told: list[int] = []
        percentage = Percentage(told.append)
        for start in range(0, len(output), size):
            percentage.feed(output[start : start + size])
        assert told == [0, 42, 100], size


def test_list_output_is_parsed_or_refused() -> None:
    listed = [{"Source": "local", "Name": "a", "Running": True, "State": "running", "New": 1}]
    assert parse_list(json.dumps(listed).encode()) == [LocalVM("a", "running")]
    for output in (b"", b"{}", b"[1]", b'[{"State": "stopped"}]', b"\xff", b"[" * 100_000, b'x [{"Name": "a"}]'):
        with pytest.raises(ValueError, match=r".+"):
            parse_list(output)


def test_list_is_found_beside_other_output() -> None:
    listed = json.dumps([{"Name": "a [b", "State": "stopped"}], indent=2).encode()
    for before in (b"", b"[1] note\n", b'[info] x\n[]x\n\x1b[2K["a"]\n', b"warning: \xff\n  "):
        assert parse_list(before + listed + b"\n[done]\n") == [LocalVM("a [b", "stopped")]
    assert parse_list(b"note\n[]\n") == []


@pytest.mark.parametrize("noise", [b"\n", b"[\n", b"[0,\n"])
def test_noise_is_searched_for_a_list_about_as_fast_as_text(noise: bytes) -> None:
    def seconds(output: bytes) -> float:
        began = time.thread_time()
        with pytest.raises(ValueError, match="no list"):
            parse_list((output * (1 << 16))[: 1 << 16])
        return time.thread_time() - began

    assert seconds(noise) < 50 * max(seconds(b"x\n") for _ in range(3))


def test_images_of_impossible_sizes_are_reported_with_possible_ones() -> None:
    for size, expected in ((10**30, MAX_UINT), (-1, 0), ("61", 0), (1, 10**9)):
        (image,) = parse_images(json.dumps([{"Name": "example.com/i", "Size": size}]).encode())
        assert image.size_bytes == expected


@pytest.mark.parametrize(
    ("item", "foreign", "ours"),
    [
        ({"State": "paused"}, None, "running"),
        ({"State": "paused", "Running": False}, "running", "running"),
        ({"Running": True}, "running", "running"),
        ({"Running": False}, "stopped", "stopped"),
        ({}, None, "running"),
        ({"State": None, "Running": None}, None, "running"),
        ({"State": "suspended", "Running": None}, "suspended", "suspended"),
        ({"State": ["x"]}, None, "running"),
    ],
)
def test_foreign_vm_of_unknown_state_is_left_out_and_ours_counts_as_running(
    item: dict[str, Any], foreign: Any, ours: Any
) -> None:
    other = {"Name": "other", "State": "stopped"}
    for name, state in (("their-vm", foreign), ("orchard-vm-uid-0", ours)):
        expected = [LocalVM(name, state)] if state else []
        assert parse_list(json.dumps([{"Name": name, **item}, other]).encode()) == [
            *expected,
            LocalVM("other", "stopped"),
        ]


@pytest.mark.parametrize(
    ("verb", "status", "stderr", "kind", "words"),
    [
        ("clone", 2, b'the specified VM "x" does not exist\n', NoSuchVM, 'the specified VM "x" does not exist'),
        ("stop", 2, b'VM "x" is not running\n', NotRunning, 'VM "x" is not running'),
        ("delete", 2, b"gone", NoSuchVM, "gone"),
        ("run", 1, b"note\n\nThe number of VMs exceeds the system limit\n\n", DriverError, "exceeds the system limit"),
        ("run", 1, b"\x1b[31mError: red\x07", DriverError, "red"),
        ("run", 1, b'Error: the file "/x" does not exist', DriverError, 'the file "/x" does not exist'),
        ("ip", 2, b'the specified VM "x" does not exist\n', NoSuchVM, 'the specified VM "x" does not exist'),
        ("pull", -9, b"", DriverError, "tart pull failed with exit status -9"),
    ],
)
def test_error_of_a_verb_is_what_its_stderr_complains_of(
    verb: str, status: int, stderr: bytes, kind: type[DriverError], words: str
) -> None:
    error = verb_error("tart", verb, status, stderr)
    assert type(error) is kind
    assert words in str(error)
    assert str(error).isprintable()


# ---- the program ---------------------------------------------------------------------------------------------------


def test_missing_program_is_named_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverError, match=r"no tart on PATH .*brew install cirruslabs/cli/tart.*--tart PATH"):
        find_tart(None, "tart")
    with pytest.raises(DriverError, match=r"/none is not an executable program, expected vetu; correct --tart"):
        find_tart("/none", "vetu")
    (tmp_path / "tart").write_text("#!/bin/sh\n")
    with pytest.raises(DriverError):
        find_tart(None, "tart")
    (tmp_path / "tart").chmod(0o755)
    assert find_tart(None, "tart") == find_tart(str(tmp_path / "tart"), "tart") == str(tmp_path / "tart")


async def test_deleted_program_raises_driver_error(tmp_path: Path) -> None:
    driver = TartDriver("/none/tart", tmp_path)
    with pytest.raises(DriverError, match=r"cannot run /none/tart: .*not found"):
        await driver.fqn("vm")
    for call in (driver.list_vms, partial(driver.run, "vm", VMSpec())):
        with pytest.raises(DriverError, match="cannot run /none/tart: No such file"):
            await call()


async def test_each_verb_is_one_call(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    told: list[int] = []
    await driver.pull(IMAGE, told.append)
    assert told == [0, 42, 100]
    await driver.clone(IMAGE, "vm", told.append)
    assert told == [0, 42, 100]
    assert await driver.fqn(IMAGE) == f"{IMAGE}@sha256:{'0' * 64}"
    await driver.configure("vm", Hardware())
    await driver.configure("vm", Hardware(cpu=2), random_mac=True)
    await driver.delete("vm")
    assert calls(tmp_path) == [
        ["pull", IMAGE],
        ["clone", IMAGE, "vm"],
        ["fqn", IMAGE],
        ["set", "vm", "--cpu", "2", "--random-mac"],
        ["delete", "vm"],
    ]


async def test_bridged_address_comes_from_the_agent_or_the_arp_table(tmp_path: Path, nursery: trio.Nursery) -> None:
    driver = tart(tmp_path, TART_NO_IP="1")
    await driver.clone(IMAGE, "vm", lambda _: None)
    with pytest.raises(DriverError, match="no IP address found, is your VM running"):
        await driver.ip("vm", bridged=True)
    with pytest.raises(DriverError):
        await driver.ip("vm")
    assert calls(tmp_path)[1:] == [
        ["ip", "vm", "--resolver", "agent", "--wait", "30"],
        ["ip", "vm", "--resolver", "arp"],
        ["ip", "vm", "--wait", "60"],
    ]


async def test_address_of_a_starting_vm_is_asked_for_again(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    text = f"""
    case $1 in
    run) while [ ! -e {asked}.3 ]; do sleep 0.01; done ;;
    ip)  for n in 1 2 3; do
             [ -e {asked}.$n ] || {{ touch {asked}.$n; echo "is your VM running?" >&2; exit 1; }}
         done ;;
    esac"""
    driver = program(tmp_path / "tart", text)
    with pytest.raises(DriverError, match=r"is your VM running\?"):
        await driver.ip("vm")
    assert asked.with_suffix(".1").exists()
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec())
        with pytest.raises(DriverError, match=r"is your VM running\?|expected an IP address"):
            await driver.ip("vm")
    assert asked.with_suffix(".3").exists()


async def test_suspending_a_starting_vm_is_retried(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    text = f"""
    case $1 in
    run)     while [ ! -e {asked}.3 ]; do sleep 0.01; done ;;
    suspend) for n in 1 2 3; do
                 [ -e {asked}.$n ] || {{ touch {asked}.$n; [ $n = 3 ] || exit 2; exit 0; }}
             done ;;
    esac"""
    driver = program(tmp_path / "tart", text)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec())
        await driver.suspend("vm")
    assert asked.with_suffix(".3").exists()


async def test_starting_vm_is_not_deleted(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    driver.note("vm", "noted")
    # Until the hold is released, tart says that the VM does not run.
    (tmp_path / "hold").write_text("run before")
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec())
        await eventually((tmp_path / "held").exists)
        with pytest.raises(DriverError, match=r'^VM "vm" is running$'):
            await driver.delete("vm")
        assert driver.noted("vm") == "noted"
        (tmp_path / "held").unlink()
        await driver.stop("vm")
    await driver.delete("vm")
    assert driver.noted("vm") == ""


@pytest.mark.slow
async def test_killed_start_leaves_no_vm_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A start that is killed when the supervisor has just told it that the VM's process exists.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nkill -9 $$\n')
    python.chmod(0o755)
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DriverError, match=r"^the start of the VM's supervisor ended with status -9$"):
        await driver.run("vm", VMSpec())
    assert processes_in(tmp_path) == []
    assert await driver.list_vms() == [LocalVM("vm", "stopped")]


async def test_starting_vm_ends_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    (tmp_path / "hold").write_text("run before")

    async def run_until_the_supervisor_is_killed() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(driver.run, "vm", VMSpec())
            await eventually((tmp_path / "held").exists)
            os.kill(supervised.read_record(tmp_path / "driver" / "vm.run").supervisor, signal.SIGKILL)

    with pytest.raises(DriverError, match=r"^the supervisor of the VM was killed$"), unwrap_groups():
        await run_until_the_supervisor_is_killed()
    # Killed processes take a moment to end.
    await eventually(lambda: processes_in(tmp_path) == [])


@pytest.mark.parametrize("damage", [b"", b"\xff\x00", b"[" * 100_000], ids=["empty", "binary", "long"])
async def test_vm_with_a_damaged_record_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setattr(supervised, "KILL_SECONDS", 0.0)
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    async with running(driver, "vm"):
        (tmp_path / "driver" / "vm.run").write_bytes(damage)
    assert await driver.list_vms() == [LocalVM("vm", "stopped")]


async def test_vm_with_a_record_that_others_could_have_written_is_stopped_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "KILL_SECONDS", 0.0)
    driver, record = tart(tmp_path), tmp_path / "driver" / "vm.run"
    await driver.clone(IMAGE, "vm", lambda _: None)
    with pytest.raises(SupervisorLost, match=re.escape(str(record))), unwrap_groups():
        async with running(driver, "vm"):
            record.chmod(0o666)
    assert await driver.list_vms() == [LocalVM("vm", "stopped")]


async def test_vm_with_a_damaged_record_that_tart_does_not_know_is_not_taken_for_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "KILL_SECONDS", 0.0)
    driver, record = tart(tmp_path), tmp_path / "driver" / "vm.run"
    await driver.clone(IMAGE, "vm", lambda _: None)
    async with running(driver, "vm"):
        whole = record.read_bytes()
        record.write_bytes(b"")
        with pytest.raises(DriverError, match="record names no process") as failed:
            await tart(tmp_path, TART_HOME=str(tmp_path / "other")).stop("vm")
        assert not isinstance(failed.value, NoSuchVM | NotRunning)
        record.write_bytes(whole)


async def test_suspend_waits_longer_than_for_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving takes minutes. Here the supervisor is stopped, so that it ends long after `tart suspend` has."""
    monkeypatch.setattr("orchard.vm.supervised.KILL_SECONDS", 0.0)
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec(suspendable=True))
        await driver.ip("vm")
        number = supervised.read_record(tmp_path / "driver" / "vm.run").supervisor
        os.kill(number, signal.SIGSTOP)
        suspended = trio.Event()

        async def suspend() -> None:
            await driver.suspend("vm")
            suspended.set()

        nursery.start_soon(suspend)
        await eventually(
            lambda: ["suspend", "vm"] in calls(tmp_path) and not list((tmp_path / "driver/calls-").iterdir())
        )
        await trio.testing.wait_all_tasks_blocked()
        assert not suspended.is_set()
        os.kill(number, signal.SIGCONT)
    assert suspended.is_set()
    assert await driver.list_vms() == [LocalVM("vm", "suspended")]


async def test_recover_ends_a_call_that_has_not_written_its_number_yet(tmp_path: Path) -> None:
    """The time limit counts from the signal, which is sent as soon as the number is known."""
    driver = tart(tmp_path, stop_seconds=1000)
    (tmp_path / "driver" / "calls-").mkdir(parents=True)
    path, fifo = tmp_path / "driver" / "calls-" / "pull-1", tmp_path / "fifo"
    os.mkfifo(fifo)
    with path.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        words = ["/bin/sh", "-c", f'read line < {fifo}; echo "$$" >&0; exec sleep 1000']
        left = subprocess.Popen(words, stdin=file, cwd=tmp_path, start_new_session=True)  # noqa: ASYNC220
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.recover)
        await trio.testing.wait_all_tasks_blocked()
        assert path.read_bytes() == b""
        fifo.write_text("go on\n")
        with trio.fail_after(GENEROUS):
            assert await trio.to_thread.run_sync(left.wait, abandon_on_cancel=True) == -signal.SIGINT
    assert not path.exists()


async def test_cancelled_deletion_is_completed_by_the_next(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    driver.note("vm", "noted")
    (tmp_path / "hold").write_text("delete after")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.delete, "vm")
        await eventually((tmp_path / "held").exists)
        nursery.cancel_scope.cancel()
    assert driver.noted("vm") == "noted"
    with pytest.raises(NoSuchVM):
        await driver.delete("vm")
    assert driver.noted("vm") == ""


async def test_file_that_cannot_be_deleted_raises_driver_error(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    (tmp_path / "driver" / "vm.lease").mkdir()
    with pytest.raises(DriverError, match=r"cannot delete .*vm\.lease"):
        await driver.delete("vm")
    with pytest.raises(DriverError, match=r"cannot delete .*vm\.lease"):
        await driver.recover()


@pytest.mark.usefixtures("no_pauses")
async def test_verbs_without_a_free_descriptor_raise_driver_error(tmp_path: Path) -> None:
    async def on_line(line: str) -> None:
        raise AssertionError(line)

    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    verbs: Sequence[Callable[[], Awaitable[object]]] = [
        driver.list_vms,
        driver.list_images,
        driver.recover,
        lambda: driver.pull(IMAGE, lambda _: None),
        lambda: driver.clone(IMAGE, "vm2", lambda _: None),
        lambda: driver.configure("vm", Hardware(cpu=2)),
        # The address of a running VM would be asked for again.
        lambda: driver.ip("none"),
        lambda: driver.run_script("none", Script("true"), on_line),
        lambda: driver.stop("vm"),
        lambda: driver.suspend("vm"),
        lambda: driver.delete("vm"),
        lambda: driver.run("vm", VMSpec()),
        lambda: driver.attach("vm"),
        lambda: driver.run_script("vm", Script("true", agent=True), on_line),
    ]
    async with running(driver, "vm"):
        for verb in verbs:
            with no_descriptors(), pytest.raises(DriverError, match="Too many open files"):
                await verb()


async def test_script_without_temporary_files_raises_driver_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def on_line(line: str) -> None:
        raise AssertionError(line)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(DriverError, match=r"cannot run the startup script: No such file"):
        await program(tmp_path / "tart", "echo 203.0.113.9").run_script("vm", Script("true"), on_line)


async def test_failed_run_raises_the_message_of_tart(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_RUN_EXIT="The number of VMs exceeds the system limit")
    await driver.clone(IMAGE, "vm", lambda _: None)
    with pytest.raises(DriverError, match=r"^The number of VMs exceeds the system limit$"):
        await driver.run("vm", VMSpec())


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchard.tart._LIST_PAUSE", 0.0)
    monkeypatch.setattr("orchard.tart._TRANSFER_PAUSE", 0.0)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("verb", ["pull", "clone", "fqn", "set", "delete", "list"])
async def test_failed_verb_raises_the_message_of_tart(tmp_path: Path, verb: str) -> None:
    await tart(tmp_path).clone(IMAGE, "vm", lambda _: None)
    driver = tart(tmp_path, TART_FAIL=verb)
    doing = {
        "pull": lambda: driver.pull(IMAGE, lambda _: None),
        "clone": lambda: driver.clone(IMAGE, "vm2", lambda _: None),
        "fqn": lambda: driver.fqn(IMAGE),
        "set": lambda: driver.configure("vm", Hardware(cpu=2)),
        "delete": lambda: driver.delete("vm"),
        "list": driver.list_vms,
    }
    with pytest.raises(DriverError, match=f"{verb} was told to fail$"):
        await doing[verb]()


@pytest.mark.usefixtures("no_pauses")
async def test_failed_list_is_tried_five_more_times(tmp_path: Path) -> None:
    assert await tart(tmp_path, TART_FAIL="list", TART_FAIL_TIMES="5").list_vms() == []
    assert calls(tmp_path) == [["list", "--source", "local", "--format", "json"]] * 6
    with pytest.raises(DriverError, match="list was told to fail"):
        await tart(tmp_path / "other", TART_FAIL="list", TART_FAIL_TIMES="6").list_vms()


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("refuses", ["", "1"])
async def test_transfer_that_fails_is_tried_once_more(tmp_path: Path, refuses: str) -> None:
    for verb in ("pull", "clone"):
        home = tmp_path / verb
        driver = tart(home, TART_FAIL=verb, TART_FAIL_TIMES="1", TART_CLONE_REFUSES=refuses)
        await driver.pull(IMAGE, lambda _: None)
        await driver.clone(IMAGE, "vm", lambda _: None)
        assert [words[0] for words in calls(home)].count(verb) == 2
        # Not the half-made VM of the first try.
        assert json.loads((home / "vms" / "vm.json").read_text())["source"] == IMAGE


@pytest.mark.usefixtures("no_pauses")
async def test_clone_replaces_no_running_vm(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    async with running(driver, "vm"):
        with pytest.raises(DriverError, match=r'^VM "vm" is running$'):
            await driver.clone(IMAGE, "vm", lambda _: None)
    driver = tart(tmp_path, TART_CLONE_REFUSES="1")
    async with running_without_supervisor(tmp_path, "vm"):
        with pytest.raises(DriverError, match="cannot be deleted"):
            await driver.clone(IMAGE, "vm", lambda _: None)
        assert LocalVM("vm", "running") in await driver.list_vms()


@asynccontextmanager
async def running(driver: TartDriver, name: str, **options: Any) -> AsyncIterator[None]:
    """Run a VM for the time of the block, and stop it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, name, VMSpec(**options))
        await driver.ip(name)
        yield
        await driver.stop(name)


@asynccontextmanager
async def running_without_supervisor(home: Path, name: str) -> AsyncIterator[None]:
    """Run a VM for the time of the block as a person would, in a terminal."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "TART_HOME": str(home), "PATH": path}
    command = [str(STANDIN), "run", name]
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:  # noqa: ASYNC220
        await eventually(lambda: process.pid in running_in(home))
        try:
            yield
        finally:
            process.terminate()


def running_in(home: Path) -> list[int]:
    """Return the process numbers of the stand-in's VMs that run."""
    vms = [json.loads(path.read_text()) for path in (home / "vms").glob("*.json")]
    return [vm["pid"] for vm in vms if vm.get("lock") and is_locked(Path(vm["lock"]))]


async def test_vm_that_runs_without_supervisor_is_not_reported_gone(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    driver.note("vm", "noted")
    async with running_without_supervisor(tmp_path, "vm"):
        with pytest.raises(DriverError, match='VM "vm" cannot be deleted') as failed:
            await driver.delete("vm")
        assert not isinstance(failed.value, NoSuchVM)
        assert driver.noted("vm") == "noted"
        await driver.stop("vm")
    await driver.delete("vm")
    with pytest.raises(NoSuchVM):
        await driver.delete("vm")


@pytest.mark.slow
async def test_failed_restore_is_followed_by_one_cold_boot(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec(suspendable=True))
        await driver.ip("vm")
        await driver.suspend("vm")
    broken = tart(tmp_path, TART_RESTORE_FAILS="1")
    async with running(broken, "vm", suspendable=True):
        about = json.loads((tmp_path / "vms" / "vm.json").read_text())
        assert (about["resumed"], about["mac"].startswith("random")) == (False, True)
    assert await broken.list_vms() == [LocalVM("vm", "stopped")]
    assert [words[0] for words in calls(tmp_path)].count("run") == 3


async def test_failed_restore_fails_the_run_when_the_cold_boot_fails_too(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    change_vm(tmp_path, "vm", state="suspended")
    broken = tart(tmp_path, TART_RESTORE_FAILS="1", TART_RUN_EXIT="Error: no cold boot either")
    with pytest.raises(DriverError, match=r"^no cold boot either$"):
        await broken.run("vm", VMSpec(suspendable=True))
    assert await broken.list_vms() == [LocalVM("vm", "stopped")]


def change_vm(home: Path, name: str, **fields: object) -> None:
    """Change what the stand-in knows of a VM."""
    path = home / "vms" / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
async def test_files_of_the_driver_are_private_under_any_umask(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)
    driver.note("vm", "noted")
    async with running(driver, "vm"):
        paths = [tmp_path / "driver", *(tmp_path / "driver").rglob("*")]
        assert {path.name for path in paths} >= {"driver", "calls-", "vm.run", "vm.log", "vm.note"}
        assert [path for path in paths if path.stat().st_mode & 0o077] == []


@pytest.mark.slow
async def test_devices_are_kept_from_guests_as_far_as_this_tart_can(tmp_path: Path) -> None:
    for flags in ("--no-audio", "--no-audio --no-clipboard --no-usb-accessories"):
        home = tmp_path / str(len(flags))
        driver = tart(home, TART_FLAGS=flags)
        await driver.clone(IMAGE, "vm", lambda _: None)
        async with running(driver, "vm"):
            assert ["run", *flags.split(), "vm"] in calls(home)
        async with running(driver, "vm", audio=True, clipboard=True):
            assert json.loads((home / "vms" / "vm.json").read_text())["flags"] == flags.split()[2:]


async def test_replaced_program_is_asked_anew(tmp_path: Path) -> None:
    path = tmp_path / "tart"
    driver = program(path, f'echo "$*" >> {tmp_path}/verbs; echo "[]"')
    about = path.read_text().replace("echo 2.40.0", f"echo asked >> {tmp_path}/asked; echo 2.40.0")
    for text in (about, about + "# upgraded\n"):
        path.unlink()
        path.write_text(text)
        path.chmod(0o755)
        for _ in range(2):
            assert await driver.list_vms() == []
    assert (tmp_path / "asked").read_text().split() == ["asked"] * 2


@pytest.mark.usefixtures("no_pauses")
async def test_old_tart_lists_no_vms_while_one_is_young(
    tmp_path: Path, clock: Clock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.time()
    driver = tart(tmp_path, TART_VERSION="2.38.0", clock=lambda: now)
    image, listed = "example.com/macos-asif", trio.Event()
    await driver.clone(image, "vm", lambda _: None)
    driver.note("vm", "noted")
    os.utime(tmp_path / "driver" / "vm.note", (0, 0))

    async def list_vms() -> None:
        with pytest.raises(DriverError, match=r"in use; the version of tart is 2.38.0, expected 2.39.0"):
            await driver.list_vms()
        listed.set()

    async with trio.open_nursery() as running:
        await running.start(driver.run, "vm", VMSpec())
        await driver.ip("vm")
        now = (tmp_path / "driver" / "vm.note").stat().st_mtime + 9
        nursery.start_soon(list_vms)
        await trio.testing.wait_all_tasks_blocked()
        # None was made, and none is under way.
        assert "list" not in [words[0] for words in calls(tmp_path)]
        assert list((tmp_path / "driver").glob("calls*/*")) == []
        change_vm(tmp_path, "vm", began=0)
        now += 1
        clock.jump(1.0)
        await listed.wait()
        # The start was not disturbed.
        await driver.stop("vm")
    assert "expected 2.39.0" in caplog.text
    assert await driver.list_vms() == [LocalVM("vm", "stopped")]


async def test_lists_of_foreign_vms_and_noise_are_read(tmp_path: Path) -> None:
    foreign = [{"Name": "theirs", "State": "paused"}, {"Name": "base", "Source": "local"}]
    driver = tart(tmp_path, TART_NOISE="1", TART_FOREIGN=json.dumps(foreign))
    await driver.clone(IMAGE, "vm", lambda _: None)
    assert await driver.list_vms() == [LocalVM("vm", "stopped")]


async def test_cancelled_verb_ends_its_program(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_BLOCK="list")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.list_vms)
        await eventually(lambda: (tmp_path / "calls.jsonl").exists() and bool(calls(tmp_path)))
        assert len(processes_in(tmp_path)) == 1
        nursery.cancel_scope.cancel()
    assert processes_in(tmp_path) == []


async def jump_when(clock: trio.testing.MockClock, holds: Callable[[], bool], seconds: float) -> None:
    await eventually(holds)
    clock.jump(seconds)


async def test_verb_is_ended_after_its_time_limit(tmp_path: Path, nursery: trio.Nursery, clock: Clock) -> None:
    driver = tart(tmp_path, TART_BLOCK="fqn")
    nursery.start_soon(jump_when, clock, (tmp_path / "calls.jsonl").exists, tart_module.VERB_SECONDS)
    with pytest.raises(DriverError, match="tart fqn did not end within 300 seconds"):
        await driver.fqn(IMAGE)
    assert processes_in(tmp_path) == []


async def test_transfer_has_no_time_limit(tmp_path: Path, nursery: trio.Nursery, clock: Clock) -> None:
    begun, told = tmp_path / "begun", list[int]()
    driver = program(tmp_path / "tart", f"touch {begun}; while [ ! -e {begun}.more ]; do sleep 0.01; done; echo 7%")

    async def wait_long() -> None:
        await jump_when(clock, begun.exists, 86_400)
        begun.with_suffix(".more").touch()

    nursery.start_soon(wait_long)
    await driver.pull(IMAGE, told.append)
    assert told == [7]


async def test_environment_input_and_session_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    monkeypatch.setenv("KEPT", "yes")
    driver = program(
        tmp_path / "tart", 'cat; echo "$CI $KEPT $MORE $(cut -d" " -f5,6 /proc/$$/stat) $$"', env={"MORE": "x"}
    )
    words = (await driver.fqn(IMAGE)).split()
    # `cat` has printed nothing: standard input is empty.
    assert words[:3] == ["1", "yes", "x"]
    # Process group and session are its own, so no terminal sends it signals.
    assert words[3] == words[4] == words[5]


async def test_only_the_end_of_long_output_is_kept(tmp_path: Path) -> None:
    text = "yes 0123456789 | head -c 3000000; echo the end; yes no | head -c 3000000 >&2; echo so it is >&2; exit $1"
    driver = program(tmp_path / "tart", text.replace("$1", "0"))
    output = await driver.fqn(IMAGE)
    assert OUTPUT_BYTES - 100 < len(output) <= OUTPUT_BYTES
    assert output.endswith("the end")
    with pytest.raises(DriverError, match=r"^so it is$"):
        await program(tmp_path / "tart", text.replace("$1", "1")).fqn(IMAGE)


async def test_call_returns_while_a_child_of_the_program_holds_the_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.vm.processes._DRAIN_SECONDS", 0.1)
    driver = program(tmp_path / "tart", "sleep 1000 & echo $!")
    number = int(await driver.fqn(IMAGE))
    os.kill(number, signal.SIGKILL)


async def test_guest_that_does_not_shut_down_is_killed(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_STUBBORN="1", stop_seconds=0)
    await driver.clone(IMAGE, "vm", lambda _: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec())
        await eventually(partial(answers, driver))
        await driver.stop("vm")
    assert await driver.list_vms() == [LocalVM("vm", "stopped")]
    assert processes_in(tmp_path) == []


async def answers(driver: TartDriver) -> bool:
    with suppress(DriverError):
        await driver.ip("vm")
        return True
    return False


async def test_guest_killed_from_outside_fails_the_run(tmp_path: Path, nursery: trio.Nursery) -> None:
    driver = tart(tmp_path)
    await driver.clone(IMAGE, "vm", lambda _: None)

    async def kill() -> None:
        await eventually(partial(answers, driver))
        os.kill(supervised.read_record(tmp_path / "driver" / "vm.run").child, signal.SIGKILL)

    nursery.start_soon(kill)
    with pytest.raises(DriverError, match="tart run failed with exit status -9"):
        await driver.run("vm", VMSpec())


async def test_run_beyond_the_system_limit_fails(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_LIMIT="1")
    for name in ("vm", "second"):
        await driver.clone(IMAGE, name, lambda _: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", VMSpec())
        await eventually(partial(answers, driver))
        with pytest.raises(DriverError, match=r"^The number of VMs exceeds the system limit$"):
            await driver.run("second", VMSpec())
        await driver.stop("vm")


async def test_flags_reach_the_program_unchanged(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_FLAGS="")
    await driver.clone(IMAGE, "vm", lambda _: None)
    options = VMSpec(
        headless=True, net_bridged="Wi-Fi: en0", nested=True, host_dirs=(HostDir("a b", "/x 'y' $z", ro=True),)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, "vm", options)
        await eventually(partial(answers, driver))
        await driver.stop("vm")
    assert ["run", "--no-graphics", "--net-bridged=Wi-Fi: en0", "--nested", "--dir=a b:/x 'y' $z:ro", "vm"] in (
        calls(tmp_path)
    )


@pytest.mark.parametrize(
    "said",
    ["", "no address", "10.0.0.1 10.0.0.2", "-oProxyCommand=x", "fd00::1%en0", "fd00::1%\u00e9", f"fd00::1%{'x' * 99}"],
)
async def test_invalid_address_from_tart_is_refused(tmp_path: Path, said: str) -> None:
    with pytest.raises(DriverError, match=re.escape(f'tart ip printed "{said}" for vm, expected an IP address')):
        await program(tmp_path / "tart", f"echo '{said}'").ip("vm")
    assert await program(tmp_path / "tart", "echo fd00::1").ip("vm") == "fd00::1"


@pytest.mark.parametrize(
    "said",
    ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "169.254.1.1", "fe80::1", "224.0.0.1"],
)
async def test_address_that_leads_to_the_host_is_refused(tmp_path: Path, said: str) -> None:
    """A guest agent answers what it likes; tunnels to this address would reach the services of the host."""
    with pytest.raises(DriverError, match="the address of vm is "):
        await program(tmp_path / "tart", f"echo {said}").ip("vm")
    assert await program(tmp_path / "tart", f"echo {said}", own_addresses=True).ip("vm")


async def test_listed_vms_of_other_programs_may_have_any_name(tmp_path: Path) -> None:
    # The longest names that a directory can have.
    names = ["-rf", "é x", "x" * 255]
    listed = json.dumps([{"Name": name, "State": "stopped"} for name in names])
    found = await program(tmp_path / "tart", f"echo '{listed}'").list_vms()
    assert found == [LocalVM(name, "stopped") for name in names]


@pytest.mark.usefixtures("no_pauses")
async def test_unreadable_list_raises_driver_error(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"tart list failed: .*nonsense"):
        await program(tmp_path / "tart", "echo nonsense").list_vms()


async def test_script_with_an_invalid_variable_is_refused_before_ssh(tmp_path: Path) -> None:
    async def on_line(line: str) -> None:
        raise AssertionError(line)

    with pytest.raises(DriverError, match="named 'a-b', expected"):
        await program(tmp_path / "tart", "echo 203.0.113.9").run_script("vm", Script("echo", {"a-b": "x"}), on_line)


async def test_features_missing_in_vetu_are_refused_by_name(tmp_path: Path) -> None:
    driver = tart(tmp_path, vetu=True)
    await driver.clone(IMAGE, "vm", lambda _: None)
    for options, words in (
        (VMSpec(net_softnet=True), "Softnet"),
        (VMSpec(net_softnet_block=("0.0.0.0/0",)), "Softnet"),
        (VMSpec(suspendable=True), "suspending"),
        (VMSpec(host_dirs=(HostDir("a", "/a"),)), "shared directories"),
    ):
        with pytest.raises(DriverError, match=f"vetu does not support {words}: such a VM needs a worker with tart"):
            await driver.run("vm", options)
    with pytest.raises(DriverError, match="vetu does not support random serial numbers"):
        await driver.configure("vm", Hardware(), random_serial=True)
    with pytest.raises(DriverError, match="vetu does not support suspending"):
        await driver.suspend("vm")
    assert [call[0] for call in calls(tmp_path)] == ["clone"]
