"""Start and stop of a process, and the parsers of command-line arguments."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from orchard import controller, daemon, logs

MAX_AMOUNT = 2**53 - 1
INVALID_ADDRESSES = [
    *("", "6120", "host", "host:", "host:http", "host:65536", "host:-1", "host:+1", "host:٣", ":" + "9" * 5000),
    *("::1:22", "::1", "[]:22", "[:22", "[::1:22", "::1]:22", "[::1]", "[::1]22", "[::1]x:22", "[[::1]]:22"),
]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (":6120", (None, 6120)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("mac-1.local:65535", ("mac-1.local", 65535)),
        ("[::1]:22", ("::1", 22)),
        ("[fe80::1%en0]:22", ("fe80::1%en0", 22)),
        ("[::]:22", ("::", 22)),
    ],
)
def test_parse_address(text: str, read: tuple[str | None, int]) -> None:
    assert daemon.parse_address(text) == read


@pytest.mark.parametrize(("text", "read"), [("0", 0), ("6120", 6120), ("65535", 65535)])
def test_parse_port(text: str, read: int) -> None:
    assert daemon.parse_port(text) == read


@pytest.mark.parametrize(("text", "read"), [("1", 1.0), ("0.25", 0.25), ("1e3", 1000.0)])
def test_parse_seconds(text: str, read: float) -> None:
    assert daemon.parse_seconds(text) == read


@pytest.mark.parametrize(("text", "read"), [("1", 1), ("007", 7), (str(MAX_AMOUNT), MAX_AMOUNT)])
def test_parse_count(text: str, read: int) -> None:
    assert daemon.parse_count(text) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [("", ""), ("/", ""), ("/orchard", "/orchard"), ("/orchard/", "/orchard"), ("/a/b-c.d", "/a/b-c.d")],
)
def test_api_prefix(text: str, read: str) -> None:
    assert controller.parse_api_prefix(text) == read


def test_duplicate_key_in_pairs_is_refused() -> None:
    for reader, text in ((daemon.parse_pairs, "a=1,b=2, a =3"), (daemon.parse_resources, "a=1,a=1")):
        with pytest.raises(ArgumentTypeError, match='names "a" twice'):
            reader(text)


def test_parse_pairs() -> None:
    assert daemon.parse_pairs("rack=1, zone = eu-1 ,empty=,equation=a=b") == {
        "rack": "1",
        "zone": "eu-1",
        "empty": "",
        "equation": "a=b",
    }


def test_parse_resources() -> None:
    read = daemon.parse_resources(f"org.cirruslabs.tart-vms=2,gpus=0,bytes={MAX_AMOUNT}")
    assert read == {"org.cirruslabs.tart-vms": 2, "gpus": 0, "bytes": MAX_AMOUNT}


@pytest.mark.parametrize(
    ("reader", "texts", "expected"),
    [
        (
            daemon.parse_address,
            INVALID_ADDRESSES,
            "HOST:PORT, [IPV6]:PORT or :PORT",
        ),
        (daemon.parse_port, ["", "65536", "-1", "http", "٣", "9" * 5000], "a whole number from 0 to 65535"),
        (daemon.parse_seconds, ["", "0", "-1", "nan", "inf", "1e999", "5s", "1,5"], "above 0"),
        (
            daemon.parse_count,
            ["", "0", "-1", "+1", "1.0", "1_0", "٣", str(MAX_AMOUNT + 1), "9" * 5000],
            "a whole number of at least 1",
        ),
        (controller.parse_api_prefix, ["orchard", "/a//b", "/a b", "/ä", "/a?b", "/%2e", "//a"], "such as /orchard"),
        (daemon.parse_pairs, ["", "a", "=1", " =1", "a=1,", "a=1,b", "a=1,b c"], "KEY=VALUE"),
        (
            daemon.parse_resources,
            ["a=", "a=-1", "a=1.5", "a=1g", "a= 1 1", f"a={MAX_AMOUNT + 1}", "b=1,a=٣", "a=" + "9" * 5000],
            "WHOLE NUMBER",
        ),
    ],
)
def test_invalid_argument_error_names_the_value_and_what_is_accepted(
    reader: Callable[[str], object], texts: list[str], expected: str
) -> None:
    for text in texts:
        with pytest.raises(ArgumentTypeError) as refused:
            reader(text)
        assert expected in str(refused.value)
        wrong = text.rpartition(",")[2] if reader in (daemon.parse_pairs, daemon.parse_resources) else text
        assert wrong.replace(" ", "") in str(refused.value).replace(" ", "")


def test_unknown_option_is_refused_with_the_nearest_known_one_and_without_its_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = daemon.CommandLine()
    parser.add_argument("--bootstrap-token")
    parser.add_argument("url", nargs="?")
    for arguments in (["--bootstrap-tokn=SECRET"], ["http://a", "--bootstrap-tokn", "SECRET"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(arguments)
        said = capsys.readouterr().err.splitlines()[-1]
        assert "--bootstrap-tokn," in said
        assert "--bootstrap-token?" in said
        assert "SECRET" not in said
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--zzz"])
    assert "?" not in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("home", "read"), [(None, Path("/people/me/.orchard")), ("", Path("/people/me/.orchard")), ("/srv", Path("/srv"))]
)
def test_orchard_home(home: str | None, read: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    if home is None:
        monkeypatch.delenv("ORCHARD_HOME", raising=False)
    else:
        monkeypatch.setenv("ORCHARD_HOME", home)
    assert daemon.orchard_home() == read


# ---- start and stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_the_first_signal_cancels_the_work(number: signal.Signals) -> None:
    async def work() -> None:
        signal.raise_signal(number)
        await trio.sleep_forever()

    await daemon.run_until_signal(work)


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


def test_an_expected_error_becomes_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "configure", lambda **_: None)

    async def fail(error: Exception) -> None:
        async with trio.open_nursery():
            raise error

    async def succeed() -> None:
        await trio.lowlevel.checkpoint()

    failures: dict[type[Exception], int] = {FileNotFoundError: 2, OSError: 1}
    for error, status in ((FileNotFoundError("not here"), 2), (PermissionError("not allowed"), 1)):
        assert daemon.run_main("program", partial(fail, error), failures) == status
        assert capsys.readouterr() == ("", f"program: {error}\n")
    with pytest.raises(KeyError):
        daemon.run_main("program", partial(fail, KeyError()), failures)
    assert daemon.run_main("program", succeed, failures) == 0


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
