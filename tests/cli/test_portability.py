"""What the command's verbs import: little, so that they start fast, and nothing that Windows does not have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.processes import call_main, environment

from orchard.cli.connection import ControllerConnection
from orchard.cli.main import main

# Prints the modules that are loaded after a verb has run.
RUN_AND_TELL = """
import json, sys
from orchard.cli.main import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""
# Not needed by a verb that sends a request and prints the answer.
HEAVY = {
    "asyncio",
    "dataclasses",
    "h11",
    "trio",
    "orchard.client",
    "orchard.codec",
    "orchard.controller",
    "orchard.schema",
    "unittest",
}


@pytest.mark.parametrize(
    "words",
    ["version --client", "version", "list vms", "list workers", "status", "get vm vm", "create vm new --image i", "logs vm vm", "delete vm vm", "sessions"],
)  # fmt: skip
def test_verbs_that_send_a_request_import_little(dev: Path, api: ControllerConnection, words: str) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    command = [sys.executable, "-c", RUN_AND_TELL, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr)
    assert (status, HEAVY & set(modules)) == (0, set())


# Not needed by a verb that sends no request.
FOR_REQUESTS = {"email", "http.client", "ssl"}


@pytest.mark.parametrize("words", ["version --client", "context list", "ssh-config", "completion zsh", "--help"])
def test_verbs_that_send_no_request_import_less(dev: Path, words: str) -> None:
    command = [sys.executable, "-c", RUN_AND_TELL, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr)
    assert (status, (HEAVY - {"dataclasses"} | FOR_REQUESTS) & set(modules)) == (0, set())


def test_ssh_imports_little_since_it_starts_a_program_that_imports_more(dev: Path) -> None:
    command = [sys.executable, "-c", RUN_AND_TELL, "ssh", "vm", "none"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(dev), check=True)
    status, modules = json.loads(done.stderr.splitlines()[-1])
    assert (status, HEAVY & set(modules)) == (1, set())


# As on Windows: without the modules that it does not have, and without names of `os` and `signal`.
ON_WINDOWS = """
import json, os, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
del os.O_DIRECTORY, os.fchmod, os.geteuid, signal.SIGWINCH, signal.SIGHUP
from orchard.cli.main import main
statuses = {}
for line in sys.stdin.read().splitlines():
    try:
        statuses[line] = main(line.split())
    except SystemExit as ended:
        statuses[line] = ended.code
print(json.dumps(statuses), file=sys.stderr)
"""
CLIENT_VERBS = """\
context create {url} --name other
context list
context default local-dev
context delete other
create vm vm --image i --wait
list vms
get vm vm/status
describe vm vm
update vm vm --metadata a=b
logs vm vm
events vm vm
ip vm vm
exec vm vm true
cp {file} vm:
wait vm vm
status
capacity
history
sessions
ssh-config
completion zsh
version
doctor client
delete vm vm
"""


def test_client_verbs_run_without_what_windows_lacks(dev: Path, api: ControllerConnection, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    lines = CLIENT_VERBS.format(url=api.url, file=file)
    done = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS],
        input=lines,
        capture_output=True,
        text=True,
        env=environment(dev),
        check=True,
    )
    statuses = json.loads(done.stderr.splitlines()[-1])
    assert statuses == dict.fromkeys(lines.splitlines(), 0), done.stderr


def test_what_runs_vms_says_what_it_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ON_WINDOWS]
    lines = "controller run\nworker run http://h\ndemo\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment(tmp_path), check=True)
    *said, statuses = done.stderr.splitlines()
    assert list(json.loads(statuses).values()) == [1, 1, 1]
    assert len(said) == 3
    assert call_main(main, "demo", "--help", home=tmp_path)[0] == 0
