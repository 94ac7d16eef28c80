"""The `orchard` command as people use it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
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


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on the PATH")
def test_the_demo_that_stays_prints_curl_lines_that_work(tmp_path: Path) -> None:
    with started("", "demo", "--synthetic", "--keep", home=tmp_path) as role:
        role.wait_for(re.compile("It stays until"))
        role.wait_for(re.compile(".*-X DELETE"))
        lines = [line.partition("#")[0] for line in role.said if line.startswith("  curl ")]
        assert len(lines) == 5
        answers = []
        for line in lines:
            words = shlex.split(line)
            limit = ["--max-time", "1"] if "-N" in words else []  # the watch has no end
            ran = subprocess.run(
                [*words, "-sS", "--fail-with-body", *limit],
                capture_output=True,
                text=True,
                timeout=GENEROUS,
                check=False,
            )
            assert ran.returncode in (0, 28 if limit else 0), (line, ran)
            answers.append(ran.stdout)
        assert json.loads(answers[0])[0]["name"] == "demo"
        assert json.loads(answers[1])["name"] == "second"
        assert isinstance(json.loads(answers[2]), list)
        assert json.loads(answers[3].splitlines()[0])["type"] == "ADDED"
        assert answers[4] == ""
        assert role.stop(signal.SIGINT) == 0


def test_dev_keeps_its_state(tmp_path: Path) -> None:
    arguments = ("dev", "--synthetic", "--port", "0", "--directory", str(tmp_path / "dev"), "--workers", "2")
    listening = re.compile(r"orchard .* for development: (\S+),")
    with started("", *arguments, home=tmp_path) as role:
        url = role.wait_for(listening)[1]
        body = json.dumps({"name": "vm", "image": "any", "labels": {"no": "worker"}})
        subprocess.run(["curl", "-sS", "--fail", f"{url}/v1/vms", "-d", body], check=True, capture_output=True)
        assert role.stop(signal.SIGINT) == 0
    with started("", *arguments, home=tmp_path) as role:
        url = role.wait_for(listening)[1]
        listed = subprocess.run(["curl", "-sS", "--fail", f"{url}/v1/vms"], check=True, capture_output=True)
        assert [vm["name"] for vm in json.loads(listed.stdout)] == ["vm"]
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
    assert finished("", home=tmp_path).returncode == 2
    assert finished("", "unknown", home=tmp_path).returncode == 2
    for role in ("controller", "worker"):
        shown = finished("", role, "--help", home=tmp_path)
        assert shown.returncode == 0
        assert "usage:" in shown.stdout
    with tempfile.NamedTemporaryFile() as file:
        refused = finished("", "dev", "--synthetic", "--port", "0", "--directory", file.name, home=tmp_path)
    assert refused.returncode == 1
    assert file.name in refused.stderr
    assert "Traceback" not in refused.stderr
