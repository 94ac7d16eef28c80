"""The `orchard` command as people use it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from itertools import pairwise
from pathlib import Path

from processes import GENEROUS, controller, finished, started

from orchard import __version__
from orchard.auth import BootstrapToken

STEP = re.compile(r" +[0-9]+\.[0-9]{3} s  (.*)\n")


def test_the_demo_shows_each_step_and_leaves_nothing(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = finished("", "demo", "--synthetic", home=tmp_path, env={"TMPDIR": str(temporary)})
    assert (done.returncode, done.stderr) == (0, "")
    steps = STEP.findall(done.stdout)
    for begins in (
        "a controller listens on http://127.0.0.1:",
        "POST /v1/vms: the VM",
        'the VM is running on "worker-1"',
        "its script says: Hello from ",
        "its script says: What's in a variable arrives as it is: \"$HOME\" `uname` 'and quotes'.",
        "DELETE /v1/vms/demo",
        "worker and controller have ended",
    ):
        assert any(step.startswith(begins) for step in steps), (begins, steps)
    assert list(temporary.iterdir()) == []


def curl(line: str) -> str:
    """Run a line as it was printed, and give what it prints; without curl, do what it says.

    With -N the answer has no end: only its first line is given.
    """
    words = shlex.split(line, comments=True)
    if shutil.which("curl") is None:
        options = dict(pairwise(words))
        url = next(word for word in words if word.startswith("http://"))
        body = options["-d"].encode() if "-d" in options else None
        with urllib.request.urlopen(urllib.request.Request(url, body, method=options.get("-X"))) as answer:
            return str((answer.readline() if "-N" in words else answer.read()).decode())
    with subprocess.Popen([*words, "-sS", "--fail-with-body"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if "-N" in words:
            first = process.stdout.readline()
            process.kill()
            return first
        said = process.stdout.read()
        assert process.wait(GENEROUS) == 0, (line, said)
        return said


def test_the_demo_that_stays_prints_curl_lines_that_work(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with started("", "demo", "--synthetic", "--keep", home=tmp_path, env={"TMPDIR": str(temporary)}) as role:
        role.wait_for(re.compile("It stays until"))
        role.wait_for(re.compile(".*-X DELETE"))
        lines = [line for line in role.said if line.startswith("  curl ")]
        listed, created, events, watched, deleted = map(curl, lines)
        assert [vm["name"] for vm in json.loads(listed)] == ["demo"]
        assert json.loads(created)["name"] == "second"
        assert isinstance(json.loads(events), list)
        change = json.loads(watched)
        assert (change["type"], change["object"]["name"]) == ("ADDED", "second")
        assert deleted == ""
        assert [vm["name"] for vm in json.loads(curl(lines[0]))] == ["demo"]
        assert list(temporary.iterdir()) != []
        assert role.stop(signal.SIGINT) == 0
    assert list(temporary.iterdir()) == []
    assert role.log.read_text() == ""


def test_a_demo_that_nobody_reads_on_ends_without_a_traceback(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with started("", "demo", "--synthetic", home=tmp_path, env={"TMPDIR": str(temporary)}) as role:
        assert role.process.stdout is not None
        role.process.stdout.close()
        assert role.process.wait(GENEROUS) == 1
    assert (role.log.read_text(), list(temporary.iterdir())) == ("", [])


def test_dev_keeps_its_state(tmp_path: Path) -> None:
    arguments = ("dev", "--synthetic", "--port", "0", "--directory", str(tmp_path / "dev"), "--workers", "2")
    listening = re.compile(r"orchard .* for development: (\S+),")
    with started("", *arguments, home=tmp_path) as role:
        url = role.wait_for(listening)[1]
        body = json.dumps({"name": "vm", "image": "any", "labels": {"no": "worker"}})
        created = json.loads(curl(f"curl {url}/v1/vms -d '{body}'"))
        workers = json.loads(curl(f"curl {url}/v1/workers"))
        assert [worker["name"] for worker in workers] == ["worker-1", "worker-2"]
        assert role.stop(signal.SIGINT) == 0
    with started("", *arguments, home=tmp_path) as role:
        url = role.wait_for(listening)[1]
        (kept,) = json.loads(curl(f"curl {url}/v1/vms"))
        assert (kept["name"], kept["uid"]) == ("vm", created["uid"])
        assert role.stop() == 0


def test_a_bootstrap_token_is_made_of_the_data_of_a_running_controller(tmp_path: Path) -> None:
    env = {"ORCHARD_BOOTSTRAP_ADMIN_TOKEN": "t"}
    with controller(home=tmp_path, env=env):
        made = finished("", "bootstrap-token", "bootstrap-admin", home=tmp_path)
        certificate = (tmp_path / "controller" / "controller.crt").read_bytes()
        assert BootstrapToken.parse(made.stdout) == BootstrapToken("bootstrap-admin", "t", certificate)
        made = finished("", "bootstrap-token", "bootstrap-admin", "--no-certificate", home=tmp_path)
        assert BootstrapToken.parse(made.stdout) == BootstrapToken("bootstrap-admin", "t")
        refused = finished("", "bootstrap-token", "nobody", home=tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert '"nobody"' in refused.stderr
        assert "bootstrap-admin" in refused.stderr
    state = tmp_path / "controller" / "state.jsonl"
    state.write_bytes(state.read_bytes().replace(b"bootstrap", b"bootstrab", 1))
    for home, words in ((tmp_path, "checksum"), (tmp_path / "none", "--data-dir")):
        refused = finished(
            "", "bootstrap-token", "bootstrap-admin", "--data-dir", str(home / "controller"), home=tmp_path
        )
        assert refused.returncode == 1
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr


def test_what_cannot_be_is_said_without_a_traceback(tmp_path: Path) -> None:
    assert finished("", "--version", home=tmp_path).stdout == f"orchard {__version__}\n"
    unsaid = finished("", home=tmp_path)
    assert (unsaid.returncode, unsaid.stdout) == (2, "")
    assert "usage: orchard" in unsaid.stderr
    assert "VERB" in unsaid.stderr
    assert finished("", "unknown", home=tmp_path).returncode == 2
    refused = finished("", "dev", "--port", "65536", home=tmp_path)
    assert refused.returncode == 2
    assert '"65536" is no port' in refused.stderr
    for role in ("controller", "worker"):
        shown = finished("", role, "--help", home=tmp_path)
        assert shown.returncode == 0
        assert "usage:" in shown.stdout
    with tempfile.NamedTemporaryFile() as file:
        refused = finished("", "dev", "--synthetic", "--port", "0", "--directory", file.name, home=tmp_path)
    assert refused.returncode == 1
    assert file.name in refused.stderr
    assert "Traceback" not in refused.stderr
