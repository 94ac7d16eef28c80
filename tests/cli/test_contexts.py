"""The verb `context`, against a controller with TLS: whom it trusts, and what it stores."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.processes import GENEROUS, ORCHARD, call_main, command, controller, environment

from orchard.auth import BootstrapToken
from orchard.cli.context import Context, Contexts, read_contexts
from orchard.cli.main import main
from orchard.files import TLS_CERTIFICATE_FILE
from orchard.net.tls import fingerprint

TOKEN = "an-admin-token-of-the-tests"
ACCOUNT = ("--service-account-name", "bootstrap-admin", "--service-account-token", TOKEN)


@dataclass
class Site:
    url: str
    certificate: bytes

    @property
    def context(self) -> Context:
        return Context(self.url, self.certificate, "bootstrap-admin", TOKEN)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("site")
    data = home / ORCHARD / "controller"
    with controller("--data-dir", str(data), home=home, env={"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": TOKEN}) as (_, url):
        yield Site(url, (data / TLS_CERTIFICATE_FILE).read_bytes())


def contexts(home: Path) -> Contexts:
    return read_contexts(home / ORCHARD / "orchard.yml")


def test_fingerprint_decides_where_nobody_can_be_asked(site: Site, tmp_path: Path) -> None:
    shown = fingerprint(site.certificate)
    status, _, said = call_main(main, "context", "create", site.url, *ACCOUNT, home=tmp_path)
    assert (status, shown in said) == (1, True)
    wrong = shown[:-2] + ("00" if shown[-2:] != "00" else "11")
    assert call_main(main, "context", "create", site.url, *ACCOUNT, "--fingerprint", wrong, home=tmp_path)[0] == 1
    assert contexts(tmp_path) == Contexts()
    for spelling in (shown, shown.replace(":", "").lower()):
        arguments = ("context", "create", site.url, *ACCOUNT, "--fingerprint", spelling, "--force")
        assert call_main(main, *arguments, home=tmp_path) == (0, "", "")
        assert contexts(tmp_path) == Contexts("default", {"default": site.context})


def test_bootstrap_token_brings_its_certificate(site: Site, tmp_path: Path) -> None:
    token = str(BootstrapToken("bootstrap-admin", TOKEN, site.certificate))
    create = ("context", "create", site.url.removeprefix("https://"), "--name", "site", "--bootstrap-token", token)
    assert call_main(main, *create, home=tmp_path) == (0, "", "")
    assert contexts(tmp_path).by_name == {"site": site.context}
    status, _, said = call_main(main, *create, home=tmp_path)
    assert (status, "--force" in said) == (1, True)


@pytest.mark.parametrize(("answer", "status"), [(b"y\n", 0), (b"n\n", 1), (b"\n", 1), (b"\x04", 1)])
def test_user_is_asked_for_an_unknown_certificate(site: Site, tmp_path: Path, answer: bytes, status: int) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("", "context", "create", site.url, *ACCOUNT),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
    )
    os.close(theirs)
    with process:
        assert process.stderr is not None
        asked = b""
        while b"[y/N]" not in asked:
            asked += os.read(process.stderr.fileno(), 4096)
        assert fingerprint(site.certificate).encode() in asked
        os.write(ours, answer)
        assert process.wait(GENEROUS) == status
    os.close(ours)
    assert contexts(tmp_path).by_name == ({"default": site.context} if status == 0 else {})


def test_credentials_that_the_controller_refuses_are_not_stored(site: Site, tmp_path: Path) -> None:
    shown = ("--fingerprint", fingerprint(site.certificate))
    status, _, said = call_main(main, "context", "create", site.url, *shown, home=tmp_path)
    assert (status, "--service-account-name" in said) == (1, True)
    wrong = ("--service-account-name", "bootstrap-admin", "--service-account-token", "wrong")
    assert call_main(main, "context", "create", site.url, *shown, *wrong, home=tmp_path)[0] == 1
    assert call_main(main, "context", "create", "ftp://h", home=tmp_path)[0] == 1
    assert contexts(tmp_path) == Contexts()


def test_contexts_are_listed_chosen_and_deleted(site: Site, tmp_path: Path) -> None:
    for name in ("b", "a"):
        create = (
            "context",
            "create",
            site.url,
            "--name",
            name,
            *ACCOUNT,
            "--fingerprint",
            fingerprint(site.certificate),
        )
        assert call_main(main, *create, home=tmp_path)[0] == 0

    def listed() -> list[list[str]]:
        return [
            re.split(r"  +", line) for line in call_main(main, "context", "list", home=tmp_path)[1].splitlines()[1:]
        ]

    assert listed() == [["a", site.url], ["b", site.url, "*"]]
    assert call_main(main, "context", "default", "a", home=tmp_path)[0] == 0
    assert listed() == [["a", site.url, "*"], ["b", site.url]]
    assert call_main(main, "context", "delete", "a", home=tmp_path)[0] == 0
    assert listed() == [["b", site.url]]
    assert call_main(main, "context", "delete", "a", home=tmp_path)[0] == 1
    assert call_main(main, "context", "default", "a", home=tmp_path)[0] == 1
