"""The verbs that act on one resource or ask for one fact, against a cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness.processes import call_main, finished

from orchard import __version__
from orchard.cli.connection import ControllerConnection
from orchard.cli.main import main


def run(dev: Path, *words: str) -> list[str]:
    status, out, err = call_main(main, *words, home=dev)
    assert (status, err) == (0, "")
    return out.splitlines()


def test_a_vm_is_awaited_restarted_and_stopped(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    assert run(dev, "wait", "vm", "vm") == []
    assert run(dev, "ip", "vm", "vm") == ["127.0.0.1"]
    assert run(dev, "restart", "vm", "vm") == []
    assert run(dev, "wait", "vm", "vm", "--for", "ready") == []
    assert api.call("GET", "/vms/vm")["restart_count"] == 1
    assert run(dev, "stop", "vm", "vm") == []
    assert run(dev, "wait", "vm", "vm", "--for", "stopped") == []
    status, _, said = call_main(main, "start", "vm", "vm", home=dev)
    assert (status, "powerState" in said) == (1, True)


def test_sessions_are_listed(dev: Path) -> None:
    header, *rows = run(dev, "sessions")
    assert header.split() == ["Account", "Kind", "Target", "From", "Since"]
    assert any(row.split()[:2] == ["worker", "worker/worker-1"] for row in rows)
    assert {"worker", "worker/worker-1"} <= set(json.loads("\n".join(run(dev, "sessions", "-o", "json")))[0].values())


@pytest.mark.slow
def test_waiting_ends_with_what_cannot_come_true_and_with_its_time(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "vm", "image": "i", "labels": {"none": "here"}})
    status, _, said = call_main(main, "wait", "vm", "vm", "--timeout", "1", home=dev)
    assert (status, "none=here" in said) == (124, True)
    assert call_main(main, "wait", "vm", "other", home=dev)[0] == 1
    assert call_main(main, "wait", "vm", "vm", "--for", "rest", home=dev)[0] == 2


def test_a_worker_is_drained_and_taken_back(dev: Path, api: ControllerConnection) -> None:
    assert run(dev, "drain", "worker", "worker-1", "--wait") == []
    assert run(dev, "get", "worker", "worker-1/state") == ["drained"]
    assert run(dev, "drain", "worker", "worker-1", "--cancel") == []
    assert run(dev, "get", "worker", "worker-1/state") == ["online"]


def test_a_restored_state_is_accepted(dev: Path, api: ControllerConnection) -> None:
    before = api.call("GET", "/controller/info")["clusterId"]
    assert run(dev, "accept-state") == []
    assert api.call("GET", "/controller/info")["clusterId"] != before


def test_capacity_and_history_are_shown(dev: Path, api: ControllerConnection) -> None:
    pairs = dict(re.split(r"  +", line, maxsplit=1) for line in run(dev, "capacity") if "  " in line)
    assert int(pairs["fits"]) > 0
    found = json.loads("\n".join(run(dev, "capacity", "--labels", "none=here", "-o", "json")))
    assert found["fits"] == 0
    api.call("POST", "/vms", body={"name": "ended", "image": "i"})
    api.call("DELETE", "/vms/ended")
    assert "ended" in [line.split()[0] for line in run(dev, "history")[1:]]


def test_versions_of_both_sides_are_printed(dev: Path, tmp_path: Path) -> None:
    assert [line.split()[:3] for line in run(dev, "version")] == [
        [f"{side}:", "orchard", __version__] for side in ("client", "server")
    ]
    assert call_main(main, "version", "--client", home=tmp_path)[0] == 0


@pytest.mark.parametrize("words", [["wait", "vm", "vm"], ["stop", "vm", "vm"], ["drain", "worker", "w"], ["capacity"]])
def test_without_a_controller_each_verb_fails_in_one_line(tmp_path: Path, words: list[str]) -> None:
    done = finished("", *words, home=tmp_path, env={"ORCHARD_URL": "http://127.0.0.1:1"})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
