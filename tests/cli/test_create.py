"""The verb create, against a cluster with a worker whose VMs run their scripts on this host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.clients import connected_worker
from harness.processes import call_main, command, environment, finished
from harness.terminals import terminal

from orchard.cli.connection import ControllerConnection
from orchard.cli.main import main
from orchard.cli.output import format_progress


def test_options_become_the_specification(dev: Path, api: ControllerConnection, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo $A\n")
    words = [
        "--image",
        "i",
        "--cpu",
        "2",
        "--memory",
        "1024",
        "--os",
        "linux",
        "--headless=false",
        "--nested",
        "--resources",
        "gpu=1",
        "--labels",
        "a=b,c=d",
        "--preferred-labels",
        "e=f",
        "--restart-policy",
        "OnFailure",
        "--ttl",
        "1h30m",
        "--pending-timeout",
        "90",
        "--priority",
        "5",
        "--metadata",
        "k=v",
        "--env",
        "A=b=c",
        "--startup-timeout",
        "10m",
        "--startup-on-failure",
        "keep",
        "--shutdown-script",
        "sync",
        "--shutdown-timeout",
        "1m",
    ]
    assert call_main(main, "create", "vm", "vm", *words, "--startup-script", f"@{script}", home=dev) == (0, "", "")
    vm = api.call("GET", "/vms/vm")
    wanted = {
        "image": "i",
        "cpu": 2,
        "memory": 1024,
        "os": "linux",
        "nested": True,
        "resources": {"gpu": 1},
        "labels": {"a": "b", "c": "d"},
        "preferredLabels": {"e": "f"},
        "restart_policy": "OnFailure",
        "ttlSeconds": 5400,
        "pendingTimeoutSeconds": 90,
        "priority": 5,
        "metadata": {"k": "v"},
        "startup_script": {"script_content": "echo $A\n", "env": {"A": "b=c"}},
        "startupTimeoutSeconds": 600,
        "startupOnFailure": "keep",
        "shutdown_script": {"script_content": "sync"},
        "shutdownTimeoutSeconds": 60,
    }
    assert {name: vm.get(name) for name in wanted} == wanted
    assert vm["headless"] is False


@pytest.mark.parametrize(
    "words",
    [
        ("vm", "vm", "--ttl", "soon"),
        ("vm", "vm", "--env", "A"),
        ("vm", "vm", "--env", "A=b"),
        ("vm", "vm", "--startup-script", "@/does/not/exist"),
        ("vm", "vm", "--host-dirs", "src"),
        ("vm", "vm", "--timeout", "5"),
        ("vm", "vm", "--headless=maybe"),
        ("vm",),
        ("machine", "vm"),
    ],
)
def test_unusable_options_create_nothing(dev: Path, api: ControllerConnection, words: tuple[str, ...]) -> None:
    status, out, err = call_main(main, "create", *words, home=dev)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert api.call("GET", "/vms") == []


@pytest.mark.parametrize(
    ("script", "status", "lines"),
    [("echo one; echo two", 0, ["one", "two"]), ("echo one; exit 7", 7, ["one"]), ("exit 0", 0, [])],
)
def test_wait_and_follow_print_the_script_and_end_with_its_status(
    dev: Path, api: ControllerConnection, script: str, status: int, lines: list[str]
) -> None:
    done = finished("", "create", "vm", "vm", "--startup-script", script, "--follow", home=dev)
    assert (done.returncode, done.stdout.splitlines()) == (status, lines), done.stderr
    assert "Traceback" not in done.stderr


def test_vm_that_is_kept_after_its_script_failed_ends_the_wait(dev: Path, api: ControllerConnection) -> None:
    words = ("--startup-script", "exit 7", "--startup-on-failure", "keep", "--wait", "--timeout", "1m")
    assert finished("", "create", "vm", "vm", *words, home=dev).returncode == 7
    assert api.call("GET", "/vms/vm")["status"] == "running"


def test_waiting_without_a_script_ends_when_the_vm_is_ready(dev: Path, api: ControllerConnection) -> None:
    assert finished("", "create", "vm", "vm", "--wait", home=dev).returncode == 0
    assert api.call("GET", "/vms/vm")["status"] == "running"


@pytest.mark.slow
def test_waiting_has_an_end(dev: Path, api: ControllerConnection) -> None:
    done = finished("", "create", "vm", "vm", "--labels", "none=here", "--wait", "--timeout", "1", home=dev)
    assert done.returncode == 124
    assert "none=here" in done.stderr, "why it waits is shown"
    assert api.call("GET", "/vms/vm")["status"] == "pending", "the VM is left"


def test_queue_never_creates_nothing_that_would_wait(dev: Path, api: ControllerConnection) -> None:
    status, _, said = call_main(main, "create", "vm", "vm", "--labels", "none=here", "--queue", "never", home=dev)
    assert (status, "none=here" in said) == (1, True)
    assert api.call("GET", "/vms") == []


def test_token_of_a_new_service_account_is_printed(dev: Path, api: ControllerConnection) -> None:
    status, out, _ = call_main(
        main,
        "create",
        "service-account",
        "ci",
        "--roles",
        "compute:read,compute:write",
        "--roles",
        "admin:read",
        home=dev,
    )
    account = api.call("GET", "/service-accounts/ci")
    assert (status, out.strip()) == (0, account["token"])
    assert account["roles"] == ["compute:read", "compute:write", "admin:read"]
    own = ("create", "service-account", "own", "--roles", "compute:read", "--token", "a-token-of-one's-own")
    assert call_main(main, *own, home=dev) == (0, "", "")
    status, out, said = call_main(main, "create", "service-account", "idle", home=dev)
    assert (status, len(out.splitlines()), len(said.splitlines()), "--roles" in said) == (0, 1, 1, True)


def test_access_token_of_a_vm_is_printed(dev: Path, api: ControllerConnection) -> None:
    call_main(main, "create", "vm", "vm", home=dev)
    status, out, _ = call_main(main, "create", "token", "vm", "vm", "--ttl", "1h", "-o", "json", home=dev)
    issued = json.loads(out)
    assert (status, issued["vmName"]) == (0, "vm")
    status, out, _ = call_main(main, "create", "token", "vm", "vm", home=dev)
    assert (status, len(out.split())) == (0, 1)


def test_pulls_have_a_progress_bar_on_a_terminal_and_lines_elsewhere(dev: Path, api: ControllerConnection) -> None:
    words = command("", "create", "vm", "vm", "--image", "i", "--labels", "is=fake", "--wait")
    try:
        with (
            connected_worker(api.url, "fake", labels={"is": "fake"}),
            terminal(words, environment(dev), columns=80) as shown,
        ):
            shown.read_until("pending")
            vm = api.call("GET", "/vms/vm")
            report = {"uid": vm["uid"], "status": "pending"}
            for percent, bar in ((0, r"\[\.+\] 0 %"), (50, r"\[(#+)(\.+)\] 50 %"), (100, r"\[#+\] 100 %")):
                message = f"pulling image: {percent} %"
                api.call("PUT", "/vms/vm/state", body={**report, "status_message": message})
                shown.read_until(f"pulling image {bar}")
            api.call("PUT", "/vms/vm/state", body={**report, "status_message": "x" * 200})
            assert len(shown.read_until("(x+)…")[1]) < 80
            api.call("PUT", "/vms/vm/state", body={**report, "status": "running"})
            assert shown.finish() == 0
        api.call("DELETE", "/vms/vm")
    finally:
        api.call("DELETE", "/workers/fake")


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_progress_never_takes_more_than_a_line(columns: int) -> None:
    for text in ("pending: pulling image: 7 %", "pulling image: 100 %", "y" * 300, "", "世" * 100):
        assert len(format_progress(text, columns)) < columns
