"""The parsers of command-line arguments."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import pytest
from harness.processes import call_main, finished

from orchard import controller
from orchard.base import command_line
from orchard.cli import main as command
from orchard.control import settings

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
    assert command_line.parse_address(text) == read


@pytest.mark.parametrize(("text", "read"), [("0", 0), ("6120", 6120), ("65535", 65535)])
def test_parse_port(text: str, read: int) -> None:
    assert command_line.parse_port(text) == read


@pytest.mark.parametrize(("text", "read"), [("1", 1.0), ("0.25", 0.25), ("1e3", 1000.0)])
def test_parse_seconds(text: str, read: float) -> None:
    assert command_line.parse_seconds(text) == read


@pytest.mark.parametrize(("text", "read"), [("1", 1), ("007", 7), (str(MAX_AMOUNT), MAX_AMOUNT)])
def test_parse_count(text: str, read: int) -> None:
    assert command_line.parse_count(text) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [("", ""), ("/", ""), ("/orchard", "/orchard"), ("/orchard/", "/orchard"), ("/a/b-c.d", "/a/b-c.d")],
)
def test_api_prefix(text: str, read: str) -> None:
    assert settings.parse_api_prefix(text) == read


def test_duplicate_key_in_pairs_is_refused() -> None:
    for reader, text in ((command_line.parse_pairs, "a=1,b=2, a =3"), (command_line.parse_resources, "a=1,a=1")):
        with pytest.raises(ArgumentTypeError, match='names "a" twice'):
            reader(text)


def test_parse_pairs() -> None:
    assert command_line.parse_pairs("rack=1, zone = eu-1 ,empty=,equation=a=b") == {
        "rack": "1",
        "zone": "eu-1",
        "empty": "",
        "equation": "a=b",
    }


def test_parse_resources() -> None:
    read = command_line.parse_resources(f"org.cirruslabs.tart-vms=2,gpus=0,bytes={MAX_AMOUNT}")
    assert read == {"org.cirruslabs.tart-vms": 2, "gpus": 0, "bytes": MAX_AMOUNT}


@pytest.mark.parametrize(
    ("reader", "texts", "expected"),
    [
        (
            command_line.parse_address,
            INVALID_ADDRESSES,
            "HOST:PORT, [IPV6]:PORT or :PORT",
        ),
        (command_line.parse_port, ["", "65536", "-1", "http", "٣", "9" * 5000], "a whole number from 0 to 65535"),
        (command_line.parse_seconds, ["", "0", "-1", "nan", "inf", "1e999", "0s", "5 s", "1,5"], "above 0"),
        (
            command_line.parse_count,
            ["", "0", "-1", "+1", "1.0", "1_0", "٣", str(MAX_AMOUNT + 1), "9" * 5000],
            "a whole number of at least 1",
        ),
        (settings.parse_api_prefix, ["orchard", "/a//b", "/a b", "/ä", "/a?b", "/%2e", "//a"], "such as /orchard"),
        (command_line.parse_pairs, ["", "a", "=1", " =1", "a=1,", "a=1,b", "a=1,b c"], "KEY=VALUE"),
        (
            command_line.parse_resources,
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
        wrong = text.rpartition(",")[2] if reader in (command_line.parse_pairs, command_line.parse_resources) else text
        assert wrong.replace(" ", "") in str(refused.value).replace(" ", "")


@pytest.mark.parametrize(
    "words", ["url --bootstrap-token SECRET", "url --bootstrap-token-stdin SECRET", "url SECRET SECRET"]
)
def test_option_has_to_be_written_out_and_no_word_too_many_is_shown(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = command_line.CommandLine()
    parser.add_argument("url")
    parser.add_argument("--bootstrap-token-stdin", action="store_true")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words.split())
    assert "SECRET" not in capsys.readouterr().err


def test_unknown_option_is_refused_with_the_nearest_known_one_and_without_its_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = command_line.CommandLine()
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
    ("home", "read"),
    [(None, Path("/people/me/.orchard")), ("", Path("/people/me/.orchard")), ("/srv", Path("/srv/.orchard"))],
)
def test_orchard_home(home: str | None, read: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    if home is None:
        monkeypatch.delenv("ORCHARD_HOME", raising=False)
    else:
        monkeypatch.setenv("ORCHARD_HOME", home)
    assert command_line.orchard_home("controller") == read


# What a role of an earlier version has written to $ORCHARD_HOME, and the names in it that are to be moved.
OLD_DATA = {
    "controller": (["controller/state.jsonl", "controller/reserve"], ["controller"]),
    "worker": (
        ["worker.lock", "worker-mac.lock", "worker-mac.cluster", "instance-id", "tart/vm.run"],
        ["instance-id", "tart", "worker-mac.cluster", "worker-mac.lock", "worker.lock"],
    ),
    "command": (["orchard.yml"], ["orchard.yml"]),
}


def written_files(home: Path, names: Iterable[str]) -> None:
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)


@pytest.mark.parametrize("role", ["controller", "worker", "command"])
def test_data_of_an_earlier_version_is_refused_with_the_command_that_moves_it(
    role: Literal["controller", "worker", "command"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "it's here"
    monkeypatch.setenv("ORCHARD_HOME", str(old))
    written, moved = OLD_DATA[role]
    written_files(old, written)
    # A directory of the same name that is not Orchard's.
    written_files(old, ["tart/README"] if role != "worker" else ["controller/README"])
    with pytest.raises(command_line.HomeError) as refused:
        command_line.orchard_home(role)
    others = {"controller", "worker", "command"} - {role}
    assert all(command_line.orchard_home(other) == old / ".orchard" for other in others)  # type: ignore[arg-type]
    subprocess.run(str(refused.value).partition("then: ")[2], shell=True, check=True)
    home = command_line.orchard_home(role)
    assert home == old / ".orchard"
    assert home.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in home.iterdir()) == moved
    assert [(home / name).read_text() for name in written] == written


def test_data_that_is_in_both_places_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHARD_HOME", str(tmp_path))
    written_files(tmp_path, ["controller/state.jsonl", ".orchard/controller/state.jsonl"])
    assert command_line.orchard_home("controller") == tmp_path / ".orchard"


@pytest.mark.slow
def test_each_program_refuses_to_start_beside_data_of_an_earlier_version(tmp_path: Path) -> None:
    written_files(tmp_path, [name for written, _ in OLD_DATA.values() for name in written])
    refusals = [
        call_main(main, *words, home=tmp_path)
        for main, *words in (
            (controller.main, "--insecure-no-tls"),
            (command.main, "list", "vms"),
            (command.main, "check"),
        )
    ]
    ended = finished("worker", "http://127.0.0.1:1", "--tart", "/bin/true", home=tmp_path)
    for status, out, said in (*refusals, (ended.returncode, ended.stdout, ended.stderr)):
        assert (status, out, said.count("\n")) == (1, "", 1), said
        assert f"mv {tmp_path}/" in said
    assert not (tmp_path / ".orchard").exists()


@pytest.mark.parametrize(("number", "lines"), [(errno.ENOSPC, 1), (errno.EPIPE, 0)])
def test_help_that_cannot_be_printed_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, lines: int
) -> None:
    class Failing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "reason")

    monkeypatch.setattr(sys, "stdout", Failing())
    with pytest.raises(SystemExit) as ended:
        command_line.CommandLine(prog="orchard").parse_args(["--help"])
    assert (ended.value.code, len(capsys.readouterr().err.splitlines())) == (1, lines)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(("words", "status"), [("lits", 2), ("list vms --nope", 2), ("get vm a --context nope", 1)])
def test_exit_status_stays_when_the_message_cannot_be_printed(
    tmp_path: Path, words: str, status: int, unbuffered: str
) -> None:
    env = {**os.environ, "ORCHARD_HOME": str(tmp_path), "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "orchard", *words.split()], env=env, stderr=full, check=False)
    assert done.returncode == status
