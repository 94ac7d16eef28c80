"""The tart command line: every option, what is refused, what its output means; and what is asked of the host."""

from __future__ import annotations

import json
import plistlib
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from orchard.tart import (
    DriverError,
    LocalVM,
    NoSuchVM,
    NotRunning,
    Percentage,
    RunOptions,
    SharedDir,
    TartDriver,
    check_dhcp_lease,
    failure,
    find_tart,
    machine_id,
    operand,
    parse_list,
    run_arguments,
    set_arguments,
)

STANDIN = Path(__file__).parent / "standin" / "tart"
IMAGE = "example.com/image"


def tart(home: Path, *, vetu: bool = False, **env: str) -> TartDriver:
    return TartDriver(str(STANDIN), vetu=vetu, env={"TART_HOME": str(home), **env}, stop_seconds=5)


def calls(home: Path) -> list[list[str]]:
    return [json.loads(line) for line in (home / "calls.jsonl").read_text().splitlines()]


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"headless": True}, ["--no-graphics"]),
        ({"softnet": True}, ["--net-softnet"]),
        (
            {"softnet_allow": ("10.0.0.0/8", "fd00::/8")},
            ["--net-softnet", "--net-softnet-allow", "10.0.0.0/8,fd00::/8"],
        ),
        ({"softnet_block": ("0.0.0.0/0",)}, ["--net-softnet", "--net-softnet-block", "0.0.0.0/0"]),
        ({"bridged": "en0"}, ["--net-bridged=en0"]),
        ({"nested": True}, ["--nested"]),
        ({"suspendable": True}, ["--suspendable"]),
        ({"dirs": (SharedDir("src", "/a b", ro=True),)}, ["--dir=src:/a b:ro"]),
        (
            {"dirs": (SharedDir("x", "/x"), SharedDir("y", "https://h:8/a.tgz"))},
            ["--dir=x:/x", "--dir=y:https://h:8/a.tgz"],
        ),
    ],
)
def test_run_arguments(options: dict[str, Any], words: list[str]) -> None:
    assert run_arguments("vm", RunOptions(**options)) == ["run", *words, "vm"]


def test_set_arguments() -> None:
    assert set_arguments("vm") == []
    assert set_arguments("vm", cpu=2, memory=1024, disk_size=60, random_mac=True, random_serial=True) == (
        ["set", "vm", "--cpu", "2", "--memory", "1024", "--disk-size", "60", "--random-mac", "--random-serial"]
    )


@pytest.mark.parametrize(
    "shared",
    [
        SharedDir("a:b", "/x"),
        SharedDir("a,b", "/x"),
        SharedDir("a", "/x:ro"),
        SharedDir("a", "/x,/y"),
        SharedDir("", "/x"),
        SharedDir("a", ""),
        SharedDir("a", "/x\0"),
        SharedDir("a", "https://h/x:y"),
    ],
)
def test_a_directory_that_tart_would_read_as_another_is_refused(shared: SharedDir) -> None:
    with pytest.raises(DriverError, match='expected name and path without ":" and ","'):
        run_arguments("vm", RunOptions(dirs=(shared,)))


@pytest.mark.parametrize("text", ["", "-x", "--help", "a\0"])
def test_no_operand_becomes_an_option(text: str) -> None:
    with pytest.raises(DriverError, match="the image is"):
        operand("image", text)
    with pytest.raises(DriverError):
        run_arguments(text, RunOptions())
    with pytest.raises(DriverError):
        run_arguments("vm", RunOptions(softnet_allow=(f"{text},1.1.1.1/32",)))


# ---- output --------------------------------------------------------------------------------------------------------


def test_progress_is_told_when_it_changes_wherever_the_bytes_are_cut() -> None:
    output = b"pulling x...\r\n0%\n0%\nlayer 1/2: 42% of 3 GB\r42.9%\n100%\n200%\nno percent here %\n"
    for size in range(1, len(output) + 1):
        told: list[int] = []
        percentage = Percentage(told.append)
        for start in range(0, len(output), size):
            percentage.feed(output[start : start + size])
        assert told == [0, 42, 9, 100] or told == [0, 42, 100], (size, told)


def test_what_tart_lists() -> None:
    listed = [{"Source": "local", "Name": "a", "Running": True, "State": "running", "New": 1}]
    assert parse_list(json.dumps(listed).encode()) == [LocalVM("a", "running")]
    for output in (b"", b"{}", b"[1]", b'[{"Name": "a"}]', b'[{"Name": "a", "State": "odd"}]', b"\xff"):
        with pytest.raises(ValueError, match=r".+"):
            parse_list(output)


@pytest.mark.parametrize(
    ("verb", "status", "stderr", "kind", "words"),
    [
        ("clone", 2, b'the specified VM "x" does not exist\n', NoSuchVM, 'the specified VM "x" does not exist'),
        ("stop", 2, b'VM "x" is not running\n', NotRunning, 'VM "x" is not running'),
        ("delete", 2, b"gone", NoSuchVM, "gone"),
        ("run", 1, b"note\n\nThe number of VMs exceeds the system limit\n\n", DriverError, "exceeds the system limit"),
        ("run", 1, b"\x1b[31mred\x07", DriverError, "[31mred"),
        ("pull", -9, b"", DriverError, "tart pull failed with exit status -9"),
    ],
)
def test_the_last_line_of_what_it_says_is_the_error(
    verb: str, status: int, stderr: bytes, kind: type[DriverError], words: str
) -> None:
    error = failure("tart", verb, status, stderr)
    assert type(error) is kind
    assert words in str(error)
    assert str(error).isprintable()


# ---- the program ---------------------------------------------------------------------------------------------------


def test_a_missing_program_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverError, match=r"no tart on PATH .*brew install cirruslabs/cli/tart.*--tart PATH"):
        find_tart(None, "tart")
    with pytest.raises(DriverError, match=r"/none is no program that can be run, expected vetu; correct --tart"):
        find_tart("/none", "vetu")
    (tmp_path / "tart").write_text("#!/bin/sh\n")
    with pytest.raises(DriverError):
        find_tart(None, "tart")
    (tmp_path / "tart").chmod(0o755)
    assert find_tart(None, "tart") == find_tart(str(tmp_path / "tart"), "tart") == str(tmp_path / "tart")


async def test_a_program_that_is_gone_is_an_error_of_the_driver(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="cannot run /none/tart: No such file"):
        await TartDriver("/none/tart").list_vms()


async def test_each_verb_is_one_call(tmp_path: Path) -> None:
    driver = tart(tmp_path)
    told: list[int] = []
    await driver.pull(IMAGE, told.append)
    assert told == [0, 42, 100]
    await driver.clone(IMAGE, "vm", told.append)
    assert told == [0, 42, 100], "what is in the cache is not pulled again"
    assert await driver.fqn(IMAGE) == f"{IMAGE}@sha256:{'0' * 64}"
    await driver.configure("vm")
    await driver.configure("vm", cpu=2, random_mac=True)
    await driver.delete("vm")
    assert calls(tmp_path) == [
        ["pull", IMAGE],
        ["clone", IMAGE, "vm"],
        ["fqn", IMAGE],
        ["set", "vm", "--cpu", "2", "--random-mac"],
        ["delete", "vm"],
    ]


async def test_an_address_on_a_bridge_is_asked_of_the_agent_and_then_of_the_neighbours(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    driver = tart(tmp_path, TART_NO_IP="1")
    await driver.clone(IMAGE, "vm", lambda _: None)
    with pytest.raises(DriverError, match="no IP address found, is your VM running"):
        await driver.ip("vm", bridged=True)
    with pytest.raises(DriverError):
        await driver.ip("vm")
    assert calls(tmp_path)[1:] == [
        ["ip", "vm", "--resolver", "agent", "--wait", "5"],
        ["ip", "vm", "--resolver", "arp"],
        ["ip", "vm", "--wait", "60"],
    ]


async def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_RUN_EXIT="The number of VMs exceeds the system limit")
    await driver.clone(IMAGE, "vm", lambda _: None)
    with pytest.raises(DriverError, match=r"^The number of VMs exceeds the system limit$"):
        await driver.run("vm", RunOptions())


@pytest.mark.parametrize("verb", ["pull", "clone", "fqn", "set", "delete", "list"])
async def test_a_verb_that_fails_says_why(tmp_path: Path, verb: str) -> None:
    await tart(tmp_path).clone(IMAGE, "vm", lambda _: None)
    driver = tart(tmp_path, TART_FAIL=verb)
    doing = {
        "pull": lambda: driver.pull(IMAGE, lambda _: None),
        "clone": lambda: driver.clone(IMAGE, "vm2", lambda _: None),
        "fqn": lambda: driver.fqn(IMAGE),
        "set": lambda: driver.configure("vm", cpu=2),
        "delete": lambda: driver.delete("vm"),
        "list": driver.list_vms,
    }
    with pytest.raises(DriverError, match=f"^{verb} was told to fail$"):
        await doing[verb]()


async def test_a_verb_that_hangs_is_ended_when_it_is_cancelled(tmp_path: Path) -> None:
    driver = tart(tmp_path, TART_BLOCK="list")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.list_vms)
        while not (tmp_path / "calls.jsonl").exists():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_what_vetu_does_not_have_is_said_to_be_missing(tmp_path: Path) -> None:
    driver = tart(tmp_path, vetu=True)
    await driver.clone(IMAGE, "vm", lambda _: None)
    for options, words in (
        (RunOptions(softnet=True), "Softnet"),
        (RunOptions(softnet_block=("0.0.0.0/0",)), "Softnet"),
        (RunOptions(suspendable=True), "suspending"),
        (RunOptions(dirs=(SharedDir("a", "/a"),)), "shared directories"),
    ):
        with pytest.raises(DriverError, match=f"vetu has no {words}: such a VM needs a worker with tart"):
            await driver.run("vm", options)
    with pytest.raises(DriverError, match="vetu has no random serial numbers"):
        await driver.configure("vm", random_serial=True)
    with pytest.raises(DriverError, match="vetu has no suspending"):
        await driver.suspend("vm")
    assert [call[0] for call in calls(tmp_path)] == ["clone"]


# ---- the host ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bootpd": {"DHCPLeaseTimeSecs": 600}}, None),
        ({"bootpd": {"DHCPLeaseTimeSecs": 3600}}, None),
        ({"bootpd": {"DHCPLeaseTimeSecs": 86400}}, "lease time of 86400 seconds, expected 3600 or less"),
        ({"bootpd": {"DHCPLeaseTimeSecs": "600"}}, "no whole number"),
        ({"bootpd": []}, "no whole number"),
        ([], "no whole number"),
    ],
)
def test_long_leases_are_warned_of(tmp_path: Path, settings: Any, words: str | None) -> None:
    path = tmp_path / "settings.plist"
    path.write_bytes(plistlib.dumps(settings))
    warning = check_dhcp_lease(path)
    assert (warning is None) == (words is None)
    if words is not None and warning is not None:
        assert words in warning
        assert "sudo defaults write" in warning


def test_missing_and_broken_settings_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "settings.plist"
    assert "does not exist" in str(check_dhcp_lease(path))
    path.write_bytes(b"<plist><dict>")
    assert "cannot read" in str(check_dhcp_lease(path))


async def test_a_machine_has_an_identity_that_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine-id"
    path.write_text("abc\n")
    assert await machine_id(path) == "abc"
    program = tmp_path / "ioreg"
    program.write_text('#!/bin/sh\necho \'  "IOPlatformUUID" = "00000000-1111-2222-3333-444444444444"\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert await machine_id(tmp_path / "none") == "00000000-1111-2222-3333-444444444444"
    program.unlink()
    fallback = await machine_id(tmp_path / "none")
    assert fallback.startswith("node-")
    assert await machine_id(tmp_path / "none") == fallback
