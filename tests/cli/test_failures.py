"""Each verb, where something is wrong: it ends with a status and one line, and never with a traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.processes import GENEROUS, call_main, command, controller, environment

from orchard.cli.main import ROLE_VERBS, VERBS, main

# A command line of each verb that asks a controller; `no` is a name that nothing has.
ASKING = {
    "status": "",
    "top": "",
    "describe": "vm no",
    "login": "{url} --bootstrap-token-stdin",
    "context": "create {url} --name new",
    "create": "vm no --image i --wait",
    "list": "vms",
    "get": "vm no",
    "delete": "vm no",
    "update": "vm no --metadata a=b",
    "apply": "-f {file}",
    "set": "cluster-settings --scheduler-profile distribute-load",
    "rotate": "token no",
    "pause": "worker no",
    "resume": "worker no",
    "logs": "vm no -f",
    "events": "vm no",
    "watch": "",
    "ssh": "vm no true",
    "exec": "vm no true",
    "cp": "no:a {file}",
    "port-forward": "vm no :22",
    "vnc": "vm no",
    "__tunnel": "no 22",
    "restart": "vm no",
    "stop": "vm no",
    "suspend": "vm no",
    "start": "vm no",
    "wait": "vm no",
    "ip": "vm no",
    "drain": "worker no",
    "capacity": "",
    "history": "",
    "sessions": "",
    "version": "",
    "ui": "",
}
# They ask no controller, or begin before one is asked.
OTHERS = {
    "ssh-config",
    "completion",
    "__complete",
    "demo",
    "dev",
    "bootstrap-token",
    "check",
    "store",
    "doctor",
    *ROLE_VERBS,
}
# They fail only when they are used.
LATE = {"port-forward", "ui"}
NAMING = {verb for verb, words in ASKING.items() if " no" in f" {words}"} - {"create", *LATE}


def test_each_verb_is_in_the_table() -> None:
    assert set(VERBS) - OTHERS == set(ASKING) & set(VERBS)


def words_of(verb: str, url: str, home: Path) -> list[str]:
    file = home / "vm.json"
    file.write_text('{"name": "no", "image": "i"}')
    return [verb, *ASKING[verb].format(url=url, file=file).split()]


def run(words: list[str], home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("", *words), stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(home, env), check=False,
        timeout=GENEROUS,
    )  # fmt: skip


# Each in a process of its own would take half a minute.
MANY = """
import json, sys
from orchard.cli.main import main
for line in sys.stdin:
    words = json.loads(line)
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    print("status", status, *words, file=sys.stderr)
"""


def run_all(verbs: list[str], url: str, home: Path, **env: str) -> dict[str, tuple[int, list[str]]]:
    """Return the status and the lines of standard error of each verb."""
    lines = "".join(json.dumps(words_of(verb, url, home)) + "\n" for verb in verbs)
    done = subprocess.run(
        [sys.executable, "-c", MANY], input=lines, capture_output=True, text=True, env=environment(home, env), check=False,
        timeout=GENEROUS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, list[str]]] = {}
    said: list[str] = []
    for line in done.stderr.splitlines():
        if line.startswith("status "):
            _, status, verb, *_ = line.split()
            found[verb], said = (int(status), said), []
        else:
            said.append(line)
    assert list(found) == verbs, done.stderr
    return found


def known(verbs: set[str]) -> list[str]:
    """Return those of these verbs that read no standard input."""
    return sorted((verbs & set(VERBS)) - {"login"})


def test_without_a_controller_each_verb_fails_with_one_line(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    for verb, (status, said) in run_all(known(set(ASKING) - LATE), url, tmp_path, ORCHARD_URL=url).items():
        # The system's ssh adds its own line, and its own status.
        assert (status, len(said)) == (1, 1), (verb, said)
        assert said[0].startswith("orchard: "), (verb, said)


def test_without_a_context_each_verb_names_the_remedy(tmp_path: Path) -> None:
    verbs = known(set(ASKING) - {"context"})
    for verb, (status, said) in run_all(verbs, "", tmp_path).items():
        assert (status, len(said)) == (1, 1), (verb, said)
        assert "orchard context create" in said[0]


def test_with_refused_credentials_or_a_wrong_name_each_verb_fails_with_one_line(tmp_path: Path) -> None:
    token = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "a-token-of-the-tests"}
    with controller("--insecure-no-tls", home=tmp_path, env=token) as (_, url):
        env = {"ORCHARD_URL": url, "ORCHARD_SERVICE_ACCOUNT_NAME": "bootstrap-admin"}
        right = {**env, "ORCHARD_SERVICE_ACCOUNT_TOKEN": "a-token-of-the-tests"}
        for verb, (status, said) in run_all(known(NAMING), url, tmp_path, **right).items():
            assert (status, len(said)) == (1, 1), (verb, said)
            assert '"no"' in said[0], (verb, said)
        wrong = {**env, "ORCHARD_SERVICE_ACCOUNT_TOKEN": "wrong"}
        for verb, (status, said) in run_all(known(set(ASKING) - LATE), url, tmp_path, **wrong).items():
            assert (status, len(said)) == (1, 1), (verb, said)


@pytest.mark.parametrize("words", ["list vms", "watch", "top", "exec vm vm -- sleep 1000", "wait vm vm --for stopped", "create vm new --image i --labels no=worker --wait"])  # fmt: skip
def test_verbs_end_by_sigint_without_a_traceback(dev: Path, words: str) -> None:
    # Wherever it is then: while it starts, or while it waits.
    with subprocess.Popen(command("", *words.split()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(dev)) as process:  # fmt: skip
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=GENEROUS)
    assert process.returncode in (130, -signal.SIGINT, 0, 1)
    assert "Traceback" not in said


def test_closed_and_full_outputs_are_no_traceback(dev: Path) -> None:
    for redirect, status in ((">&-", 0), (">/dev/full", 1)):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *command("", "list", "workers")],
            capture_output=True, text=True, env=environment(dev), check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, redirect
        assert "Exception" not in done.stderr, redirect
        assert (done.returncode, len(done.stderr.splitlines())) == (status, status), (redirect, done.stderr)


@pytest.mark.parametrize(
    ("words", "nearest"),
    [("lst vms", "list"), ("list vmz", "vm"), ("get wroker x", "worker"), ("describe wokrer x", "worker"), ("create service-acount x", "service-account"), ("list vms --outptu json", "--output"), ("list vms -o jsn", "json"), ("completion zhs", "zsh")],
)  # fmt: skip
def test_the_nearest_known_word_is_named(tmp_path: Path, words: str, nearest: str) -> None:
    status, out, said = call_main(main, *words.split(), home=tmp_path)
    assert (status, out, len(said.splitlines())) == (2, "", 1)
    assert f"did you mean {nearest}?" in said


def test_empty_name_is_refused_and_never_taken_for_all(dev: Path) -> None:
    lines = [
        [verb, *("" if word == "no" else word for word in ASKING[verb].split())] for verb in sorted(NAMING - {"cp"})
    ]
    lines += [["get", "bootstrap-token"], ["get", "vm-access-token"], ["delete", "vm"]]
    done = subprocess.run(
        [sys.executable, "-c", MANY], input="".join(json.dumps(line) + "\n" for line in lines), capture_output=True, text=True,
        env=environment(dev), check=True, timeout=GENEROUS,
    )  # fmt: skip
    said = done.stderr.splitlines()
    assert len(said) == 2 * len(lines), done.stderr
    for refusal, status in zip(said[::2], said[1::2], strict=True):
        assert refusal.startswith("orchard: "), (refusal, status)
        assert status.split()[1] in ("1", "2"), (refusal, status)
