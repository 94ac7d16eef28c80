"""What people write on a command line, and what they are told when it is wrong."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest

from orchard import controller, daemon

MOST = 2**53 - 1
NO_ADDRESSES = [
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
def test_addresses(text: str, read: tuple[str | None, int]) -> None:
    assert daemon.listen_address(text) == read


@pytest.mark.parametrize(("text", "read"), [("0", 0), ("6120", 6120), ("65535", 65535)])
def test_ports(text: str, read: int) -> None:
    assert daemon.port(text) == read


@pytest.mark.parametrize(("text", "read"), [("1", 1.0), ("0.25", 0.25), ("1e3", 1000.0)])
def test_time_spans(text: str, read: float) -> None:
    assert daemon.seconds(text) == read


@pytest.mark.parametrize(("text", "read"), [("1", 1), ("007", 7), (str(MOST), MOST)])
def test_counts(text: str, read: int) -> None:
    assert daemon.count(text) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [("", ""), ("/", ""), ("/orchard", "/orchard"), ("/orchard/", "/orchard"), ("/a/b-c.d", "/a/b-c.d")],
)
def test_paths_in_front_of_the_api(text: str, read: str) -> None:
    assert controller.api_prefix(text) == read


def test_a_key_that_is_named_twice_is_refused() -> None:
    for reader, text in ((daemon.pairs, "a=1,b=2, a =3"), (daemon.resources, "a=1,a=1")):
        with pytest.raises(ArgumentTypeError, match='names "a" twice'):
            reader(text)


def test_pairs_have_a_key_and_a_value_that_may_hold_anything_but_a_comma() -> None:
    assert daemon.pairs("rack=1, zone = eu-1 ,empty=,equation=a=b") == {
        "rack": "1",
        "zone": "eu-1",
        "empty": "",
        "equation": "a=b",
    }


def test_resources_are_whole_amounts() -> None:
    read = daemon.resources(f"org.cirruslabs.tart-vms=2,gpus=0,bytes={MOST}")
    assert read == {"org.cirruslabs.tart-vms": 2, "gpus": 0, "bytes": MOST}


@pytest.mark.parametrize(
    ("reader", "texts", "expected"),
    [
        (
            daemon.listen_address,
            NO_ADDRESSES,
            "HOST:PORT, [IPV6]:PORT or :PORT",
        ),
        (daemon.port, ["", "65536", "-1", "http", "٣", "9" * 5000], "a whole number from 0 to 65535"),
        (daemon.seconds, ["", "0", "-1", "nan", "inf", "1e999", "5s", "1,5"], "above 0"),
        (
            daemon.count,
            ["", "0", "-1", "+1", "1.0", "1_0", "٣", str(MOST + 1), "9" * 5000],
            "a whole number from 1 on",
        ),
        (controller.api_prefix, ["orchard", "/a//b", "/a b", "/ä", "/a?b", "/%2e", "//a"], "such as /orchard"),
        (daemon.pairs, ["", "a", "=1", " =1", "a=1,", "a=1,b", "a=1,b c"], "KEY=VALUE"),
        (
            daemon.resources,
            ["a=", "a=-1", "a=1.5", "a=1g", "a= 1 1", f"a={MOST + 1}", "b=1,a=٣", "a=" + "9" * 5000],
            "WHOLE NUMBER",
        ),
    ],
)
def test_what_is_wrong_is_repeated_with_what_was_expected(
    reader: Callable[[str], object], texts: list[str], expected: str
) -> None:
    for text in texts:
        with pytest.raises(ArgumentTypeError) as refused:
            reader(text)
        assert expected in str(refused.value)
        wrong = text.rpartition(",")[2] if reader in (daemon.pairs, daemon.resources) else text
        assert wrong.replace(" ", "") in str(refused.value).replace(" ", "")


@pytest.mark.parametrize(
    ("home", "read"), [(None, Path("/people/me/.orchard")), ("", Path("/people/me/.orchard")), ("/srv", Path("/srv"))]
)
def test_where_things_are_kept(home: str | None, read: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    if home is None:
        monkeypatch.delenv("ORCHARD_HOME", raising=False)
    else:
        monkeypatch.setenv("ORCHARD_HOME", home)
    assert daemon.orchard_home() == read
