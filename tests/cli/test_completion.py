"""Completion of words: what is proposed, and that the shells propose it."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from harness.processes import call_main, environment
from harness.starts import ENTRIES, write_forking_program
from harness.terminals import terminal

from orchard.cli.completion import find_candidates
from orchard.cli.connection import ControllerConnection
from orchard.cli.main import ROLE_VERBS, VERBS, main, make_parser


@pytest.fixture
def vms(dev: Path, api: ControllerConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHARD_HOME", str(dev))
    for name in ("alpha", "alp:ha", "beta"):
        api.call("POST", "/vms", body={"name": name, "image": "i", "labels": {"no": "worker"}})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("li", {"list"}),
        ("list ", {"vms", "workers", "service-accounts"}),
        ("get vm al", {"alpha", "alp:ha"}),
        ("get vms b", {"beta"}),
        ("get vm beta/status", {"beta/status", "beta/status_message"}),
        ("get worker ", {"worker-1"}),
        ("delete vm b", {"beta"}),
        ("logs vm --tail 3 b", {"beta"}),
        ("exec vm -it b", {"beta"}),
        ("exec vm b -- ", {":files"}),
        ("create ", {"vm", "service-account", "token"}),
        ("create vm ", set()),
        ("create token vm b", {"beta"}),
        ("create vm new --os ", {"darwin", "linux"}),
        ("create vm new --os=d", {"--os=darwin"}),
        ("create vm new --net-s", {"--net-softnet", "--net-softnet-allow", "--net-softnet-block"}),
        ("cp be", {"beta:", ":files"}),
        ("list vms --context ", {"local-dev"}),
        ("context default ", {"local-dev"}),
        ("controller ", {"run", "install", "uninstall"}),
        ("worker install --token", {"--token-file"}),
        ("controller run --insecure-no-t", {"--insecure-no-tls"}),
        ("worker run --bootstrap-token-", {"--bootstrap-token-stdin"}),
        ("nonsense ", set()),
        ("get nonsense ", set()),
        ("__", set()),
    ],
)
def test_words_that_may_stand_there_are_proposed(vms: None, line: str, expected: set[str]) -> None:
    assert {found.word for found in find_candidates(line.split(" "))} == expected


def test_each_option_of_each_verb_is_proposed() -> None:
    for name in (name for name, verb in VERBS.items() if verb.help and name not in ROLE_VERBS):
        options = {word for word in make_parser(name)._option_string_actions if word.startswith("--")}
        assert "--help" in options
        assert {found.word for found in find_candidates([name, "--"])} == options


@pytest.mark.slow
def test_nothing_is_proposed_and_nothing_printed_when_the_controller_does_not_answer(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as silent:
        for url in ("http://127.0.0.1:1", f"http://127.0.0.1:{silent.getsockname()[1]}", "nonsense://"):
            patch.setenv("ORCHARD_URL", url)
            assert call_main(main, "__complete", "fish", "get", "vm", "", home=tmp_path) == (0, "", "")


def test_nothing_is_proposed_with_a_context_file_that_is_not_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHARD_HOME", str(tmp_path))
    (tmp_path / ".orchard").mkdir()
    (tmp_path / ".orchard" / "orchard.yml").write_text("no contexts")
    for words in (["get", "vm", ""], ["list", "vms", "--context", ""]):
        assert find_candidates(words) == []


def test_names_that_a_shell_would_run_are_not_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["$(reboot)", "a;b", "-rf", "a b", "\x1b[2J", "good"]
    monkeypatch.setenv("ORCHARD_HOME", str(tmp_path))
    monkeypatch.setenv("ORCHARD_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(ControllerConnection, "call", lambda *_, **__: [{"name": name} for name in names])
    assert [found.word for found in find_candidates(["get", "vm", ""])] == ["good"]


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source <(orchard completion bash)"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit && compinit -u -D && source <(orchard completion zsh)"),
    "fish": (["fish", "--no-config", "-i"], "orchard completion fish | source"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("zsh", marks=pytest.mark.needs("zsh")),
        pytest.param("fish", marks=pytest.mark.needs("fish")),
        "bash",
    ],
)
def test_shells_complete_words_that_they_ask_for(dev: Path, vms: None, tmp_path: Path, shell: str) -> None:
    words, setting = SHELLS[shell]
    kept, keep = tmp_path / "kept", tmp_path / "keep"
    keep.write_text(f"#!/bin/sh\nprintf '%s ' \"$@\" > {kept}\necho kept $((6 * 7))\n")
    keep.chmod(0o755)
    if shell != "bash":
        # Bash has the script that the installation made.
        write_forking_program(tmp_path / "orchard", ENTRIES["orchard"])
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**environment(dev), "PATH": path, "HOME": str(tmp_path), "PS1": "> "}
    with terminal(words, env) as shown:

        def completed(typed: str) -> str:
            """Return what a command line becomes by the key Tab."""
            shown.type(f"{typed}\t\x01keep \r")
            shown.read_until("kept 42")
            return kept.read_text().strip()

        shown.type(f"{setting}\r")
        assert completed("orchard get vm be") == "orchard get vm beta"
        assert completed("orchard get vm alp:") == "orchard get vm alp:ha"
        assert completed("orchard list vms --outp") == "orchard list vms --output"
        assert completed("orchard cp be") == "orchard cp beta:"
        shown.type("export ORCHARD_URL=http://127.0.0.1:1\r")
        assert completed("orchard get vm be") == "orchard get vm be"
        assert "no answer" not in shown.said
