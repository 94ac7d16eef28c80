"""The options of a controller on etcd: what is accepted, and what contradicts what."""

from __future__ import annotations

import argparse

import pytest

from orchard.control.etcd_options import add_leader_options, etcd_settings, parse_etcd_prefix
from orchard.control.stored_data import EtcdSettings

URL = "https://etcd-1:2379,https://etcd-2:2379"


def parse(*words: str, **environ: str) -> EtcdSettings | None:
    parser = argparse.ArgumentParser()
    add_leader_options(parser)
    return etcd_settings(parser, parser.parse_args(words), environ)


def test_state_is_in_files_unless_etcd_is_given() -> None:
    assert parse() is None
    assert parse("--store", "file") is None
    settings = parse("--etcd", URL)
    assert settings is not None
    assert (settings.access.urls, settings.prefix, settings.leader_ttl) == (URL, "/orchard", 10.0)
    assert settings == parse("--store", "etcd", "--etcd", URL)


def test_password_comes_from_the_environment_and_is_not_shown() -> None:
    settings = parse("--etcd", URL, "--etcd-user", "orchard", ORCHARD_ETCD_PASSWORD="hidden")
    assert settings is not None
    assert (settings.access.user, settings.access.password) == ("orchard", "hidden")
    assert "hidden" not in repr(settings)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--store", "etcd"], "--etcd"),
        (["--store", "file", "--etcd", URL], "--store file"),
        (["--etcd-user", "a"], "--etcd-user"),
        (["--etcd-ca", "ca.pem"], "--etcd-ca"),
        (["--etcd-prefix", "/a"], "--etcd-prefix"),
        (["--leader-ttl", "5", "--store", "file"], "--leader-ttl"),
        (["--etcd-max-mib", "5"], "--etcd-max-mib"),
        (["--etcd-events-kib", "500"], "--etcd-events-kib"),
        (["--etcd", ""], "empty"),
        (["--store", "file", "--etcd", ""], "empty"),
        (["--etcd", URL, "--etcd-cert", "a"], "--etcd-key"),
        (["--etcd", URL, "--etcd-user", "a"], "ORCHARD_ETCD_PASSWORD"),
        (["--etcd", URL, "--leader-ttl", "4"], "5 to 60"),
        (["--etcd", URL, "--leader-ttl", "61"], "5 to 60"),
        (["--etcd", URL, "--etcd-events-kib", "2000"], "64 to 1024"),
        (["--etcd", URL, "--etcd-max-mib", "0"], "from 1"),
        (["--etcd", URL, "--etcd-prefix", "orchard"], "/orchard"),
    ],
)
def test_contradiction_is_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_prefix_has_no_slash_at_its_end() -> None:
    assert parse_etcd_prefix("/a/b/") == "/a/b"
