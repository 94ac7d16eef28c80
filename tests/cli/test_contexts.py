"""The verb `context`, against a controller with TLS: whom it trusts, and what it stores."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from harness.processes import GENEROUS, ORCHARD, call_main, command, controller, environment, finished
from harness.terminals import terminal

from orchard.auth import BootstrapToken
from orchard.base.files import TLS_CERTIFICATE_FILE
from orchard.cli.connection import ControllerConnection
from orchard.cli.context import Context, Contexts, read_contexts, write_contexts
from orchard.cli.main import main
from orchard.net.tls import fingerprint, self_signed

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
    # None is the default now.
    status, _, said = call_main(main, "list", "vms", home=tmp_path)
    assert (status, "orchard context default" in said, said.strip().endswith(": b")) == (1, True, True)
    assert call_main(main, "context", "delete", "a", home=tmp_path)[0] == 1
    assert call_main(main, "context", "default", "a", home=tmp_path)[0] == 1


# ---- login -----------------------------------------------------------------------------------------------------------


def log_in(home: Path, *words: str, stdin: str) -> subprocess.CompletedProcess[str]:
    return finished("", "login", *words, home=home, stdin=stdin)


def test_login_by_a_bootstrap_token_makes_the_default_context(site: Site, tmp_path: Path) -> None:
    write_contexts(tmp_path / ORCHARD / "orchard.yml", Contexts("other", {"other": Context("https://other:6120")}))
    token = str(BootstrapToken("bootstrap-admin", TOKEN, site.certificate))
    done = log_in(tmp_path, site.url, "--bootstrap-token-stdin", stdin=f"{token}\n")
    assert (done.returncode, done.stdout) == (0, "")
    found = contexts(tmp_path)
    assert (found.default, found.find(found.default)) == ("127.0.0.1", site.context)
    assert found.find("other").url == "https://other:6120"
    # Of the same controller, the same context.
    shown = ("--fingerprint", fingerprint(site.certificate), "--service-account-name", "bootstrap-admin")
    done = log_in(tmp_path, site.url, *shown, "--service-account-token-stdin", stdin=f"{TOKEN}\n")
    assert (done.returncode, contexts(tmp_path)) == (0, found)
    assert log_in(tmp_path, site.url, "--bootstrap-token-stdin", "--name", "mine", stdin=token).returncode == 0
    assert contexts(tmp_path).default == "mine"


def test_login_by_a_bootstrap_token_without_a_certificate_needs_the_fingerprint(site: Site, tmp_path: Path) -> None:
    token = str(BootstrapToken("bootstrap-admin", TOKEN))
    assert log_in(tmp_path, site.url, "--bootstrap-token-stdin", stdin=token).returncode == 1
    shown = ("--fingerprint", fingerprint(site.certificate))
    assert log_in(tmp_path, site.url, "--bootstrap-token-stdin", *shown, stdin=token).returncode == 0
    assert contexts(tmp_path).find("127.0.0.1") == site.context


@pytest.mark.slow
def test_login_that_fails_stores_nothing_and_sends_no_credentials_to_a_stranger(site: Site, tmp_path: Path) -> None:
    known, account = ("--fingerprint", fingerprint(site.certificate)), ("--service-account-name", "bootstrap-admin")
    by_stdin = "--service-account-token-stdin"
    complete = BootstrapToken("bootstrap-admin", TOKEN, site.certificate)
    for words, stdin, status in (
        ((*known, *account, by_stdin), "wrong\n", 1),
        ((*known, *account, by_stdin), "", 1),
        ((*known, *account), "", 2),
        ((*account, by_stdin), TOKEN, 1),
        (("--fingerprint", "00:11", *account, by_stdin), TOKEN, 1),
        (("--bootstrap-token-stdin",), "nonsense", 1),
        (("--bootstrap-token-stdin", by_stdin), "x\ny\n", 2),
        (("--bootstrap-token-stdin", "--fingerprint", "00:11"), str(BootstrapToken("bootstrap-admin", TOKEN)), 1),
        (("--bootstrap-token-stdin", "--fingerprint", "00:11"), str(complete), 1),
    ):
        done = log_in(tmp_path, site.url, *words, stdin=stdin)
        assert (done.returncode, done.stdout) == (status, ""), words
        assert "Traceback" not in done.stderr
    assert contexts(tmp_path) == Contexts()


def test_login_asks_for_what_is_missing_and_hides_the_token(site: Site, tmp_path: Path) -> None:
    with terminal(command("", "login", site.url), environment(tmp_path)) as shown:
        shown.read_until(re.escape(fingerprint(site.certificate)))
        shown.read_until(r"\[y/N\] ")
        shown.type("y\n")
        shown.read_until("Service account: ")
        shown.type("bootstrap-admin\n")
        shown.read_until("Token: ")
        shown.type(f"{TOKEN}\n")
        assert shown.finish() == 0
        assert TOKEN not in shown.said
    assert contexts(tmp_path).find("127.0.0.1") == site.context


def test_login_that_is_interrupted_leaves_the_terminal_as_it_was(site: Site, tmp_path: Path) -> None:
    words = ("login", site.url, "--fingerprint", fingerprint(site.certificate), "--service-account-name", "a")
    with terminal(command("", *words), environment(tmp_path)) as shown:
        shown.read_until("Token: ")
        assert not shown.echoes
        shown.type("\x03")
        assert shown.finish() in (130, -signal.SIGINT)
        assert shown.echoes


@pytest.mark.parametrize("is_known", [True, False])
def test_port_is_not_opened_if_the_certificate_is_wrong(site: Site, tmp_path: Path, *, is_known: bool) -> None:
    other, _ = trio.run(self_signed, tmp_path, [])
    wrong = site.context._replace(certificate=other.read_bytes() if is_known else None)
    write_contexts(tmp_path / ORCHARD / "orchard.yml", Contexts("c", {"c": wrong}))
    with ControllerConnection(site.context) as api:
        api.call("POST", "/vms", body={"name": "vm", "image": "i"})
        done = finished("", "port-forward", "vm", "vm", ":22", home=tmp_path)
        api.call("DELETE", "/vms/vm")
    assert (done.returncode, done.stdout, "certificate" in done.stderr) == (1, "", True)
