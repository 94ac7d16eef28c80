"""The verbs status, top and describe, against a cluster."""

from __future__ import annotations

from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from harness.processes import call_main, command, environment, finished

from orchard.cli import views
from orchard.cli.connection import ControllerConnection
from orchard.cli.main import main
from orchard.decisions import waiting


def run(dev: Path, *words: str) -> list[str]:
    status, out, err = call_main(main, *words, home=dev)
    assert (status, err) == (0, "")
    return out.splitlines()


@pytest.fixture
def fleet(dev: Path, api: ControllerConnection) -> None:
    api.call("POST", "/vms", body={"name": "runs", "image": "i"})
    api.call("POST", "/vms", body={"name": "waits", "image": "i", "labels": {"none": "here"}})
    api.call("POST", "/vms", body={"name": "fails", "image": "i", "startup_script": {"script_content": "exit 7"}})
    for name, state in (("runs", "ready"), ("fails", "failed")):
        assert call_main(main, "wait", "vm", name, "--for", state, home=dev)[0] == 0


@pytest.mark.usefixtures("fleet")
def test_status_shows_the_queue_and_what_needs_attention(dev: Path) -> None:
    lines = run(dev, "status")
    assert lines[0] == "Workers: 1 (1 online)"
    assert "VMs: 3 (1 failed, 1 pending, 1 running)" in lines
    assert any(line.startswith("  waits, ") and "none=here" in line for line in lines)
    assert any('VM "fails"' in line for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("fleet")
def test_top_shows_it_again_and_again(dev: Path) -> None:
    with Popen(command("", "top"), stdout=PIPE, text=True, env=environment(dev)) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 2:
            seen += process.stdout.readline().startswith("Workers: 1")
        process.kill()


@pytest.mark.usefixtures("fleet")
def test_description_says_why_a_vm_waits_and_what_helps(dev: Path) -> None:
    waits = "\n".join(run(dev, "describe", "vm", "waits"))
    assert "none=here" in waits
    assert "What would help" in waits
    assert "created" in waits
    runs = "\n".join(run(dev, "describe", "vm", "runs"))
    assert "What would help" not in runs
    assert any("runs: running" in line for line in run(dev, "describe", "worker", "worker-1"))
    assert call_main(main, "describe", "vm", "none", home=dev)[0] == 1


def test_each_reason_why_a_vm_waits_has_a_remedy() -> None:
    lacks = [text.format("x") for text in waiting._TEXTS.values()]
    excluded = ["stopped", "offline", "disconnected", "not ready", "paused", "being drained"]
    excluded += ["on which VMs fail before they run", "with too little free disk space"]
    reasons = [f"waiting: 3 workers: 1 {part}" for part in (*lacks, *excluded, "lacks gpu (1 wanted, 0 free)")]
    reasons += [f"waiting: no worker has {noun}x" for noun in waiting._NOUNS.values() if noun]
    reasons += [
        "waiting: no worker is large enough (3 gpu wanted, 2 offered at most)",
        "waiting: no worker supports x",
        "waiting: no worker has registered yet",
    ]
    assert [reason for reason in reasons if not views.remedies_for(reason)] == []


def test_failed_vm_is_waited_for_while_it_is_to_be_restarted(
    dev: Path, api: ControllerConnection, tmp_path: Path
) -> None:
    marker = tmp_path / "second run"
    script = f"if [ -e '{marker}' ]; then exit 0; fi; touch '{marker}'; exit 7"
    words = ("create", "vm", "vm", "--restart-policy", "OnFailure", "--startup-script", script, "--wait")
    assert finished("", *words, home=dev).returncode == 0
    assert api.call("GET", "/vms/vm")["restart_count"] == 1
