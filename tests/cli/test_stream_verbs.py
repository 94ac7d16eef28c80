"""The verbs logs, events and watch, against a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from harness.processes import call_main, command, environment, finished

from orchard.cli.connection import ControllerConnection
from orchard.cli.main import main

SCRIPT = {"name": "vm", "image": "i", "startup_script": {"script_content": "echo one\nprintf '\\033[31mtwo\\n'"}}


def run(dev: Path, *words: str) -> list[str]:
    status, out, err = call_main(main, *words, home=dev)
    assert (status, err) == (0, "")
    return out.splitlines()


@pytest.fixture
def ended(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body=SCRIPT)
    assert run(dev, "wait", "vm", "vm") == []


@pytest.mark.usefixtures("ended")
def test_log_is_printed_as_it_is_where_no_terminal_is(dev: Path) -> None:
    lines = ["one", "\033[31mtwo"]
    assert run(dev, "logs", "vm", "vm") == lines
    assert run(dev, "logs", "vm", "vm", "--since", "1h") == lines
    assert run(dev, "logs", "vm", "vm", "--tail", "1") == lines[1:]
    assert run(dev, "logs", "vm", "vm", "--tail", "5") == lines[::-1]
    assert call_main(main, "logs", "vm", "none", home=dev)[0] == 1


@pytest.mark.usefixtures("ended")
def test_events_have_the_life_of_the_vm_among_its_output(dev: Path) -> None:
    lines = [line.split(" ", 1)[1] for line in run(dev, "events", "vm", "vm")]
    assert lines[0].startswith("- created")
    assert "| one" in lines
    kinds = [json.loads(line)["kind"] for line in run(dev, "events", "vm", "vm", "-o", "json")]
    assert kinds.count("log_line") == 2


@pytest.mark.usefixtures("ended")
def test_followed_log_ends_with_the_vm(dev: Path, api: ControllerConnection) -> None:
    with Popen(command("", "logs", "vm", "vm", "-f"), stdout=PIPE, text=True, env=environment(dev)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        api.call("DELETE", "/vms/vm")
        assert process.stdout.read() == "\033[31mtwo\n"
    assert process.returncode == 0


def test_watch_prints_each_change(dev: Path, api: ControllerConnection) -> None:
    words = ("watch", "vms", "--filter", "metadata.job=7", "-o", "json")
    with Popen(command("", *words), stdout=PIPE, text=True, env=environment(dev)) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["type"] == "BOOKMARK"
        for name, metadata in (("other", {}), ("vm", {"job": "7"})):
            api.call("POST", "/vms", body={"name": name, "image": "i", "metadata": metadata})
        change = json.loads(process.stdout.readline())
        assert (change["type"], change["object"]["name"]) == ("ADDED", "vm")
        process.kill()


def test_unknown_filter_is_refused(dev: Path, api: ControllerConnection) -> None:
    done = finished("", "watch", "--filter", "colour=red", home=dev)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
