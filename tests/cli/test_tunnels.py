"""The verbs that lead into a VM, with the system's ssh, against a cluster whose VMs have SSH."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.processes import ORCHARD, call_main, environment, finished, started

from orchard.cli.connection import ControllerConnection
from orchard.cli.context import read_contexts, write_contexts
from orchard.cli.main import main

FORWARDING = re.compile(r"forwarding 127\.0\.0\.1:([0-9]+) -> vm:22\.\.\.")


@pytest.fixture
def vm(dev: Path, api: ControllerConnection) -> str:
    api.call("POST", "/vms", body={"name": "vm", "image": "i"})
    assert call_main(main, "wait", "vm", "vm", home=dev)[0] == 0
    return "vm"


def run(dev: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return finished("", *words, home=dev, stdin=stdin)


@pytest.mark.slow
@pytest.mark.needs("ssh")
def test_ssh_ends_with_the_status_of_its_command(dev: Path, vm: str) -> None:
    done = run(dev, "ssh", "vm", vm, "bash -s", stdin="echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    done = run(dev, "ssh", "vm", vm, "-u", "admin", "--", "printf", "%s", "-x")
    assert (done.returncode, done.stdout) == (0, "-x")
    assert run(dev, "ssh", "vm", vm, "-p", "wrong", "true").returncode == 255
    assert run(dev, "ssh", "vm", "none", "true").returncode == 1


@pytest.fixture
def settings(dev: Path, vm: str, tmp_path: Path) -> Iterator[Path]:
    """The printed settings for the system's SSH, whose programs share one connection to a VM, as Ansible has it."""
    file, known = tmp_path / "config", dev / ORCHARD / "orchard.yml"
    contexts = read_contexts(known)
    # ssh gives "%" in a command a meaning.
    write_contexts(known, contexts.with_context("100%", contexts.find(contexts.default)))
    # The path of a socket must be short.
    with tempfile.TemporaryDirectory() as short:
        shared = f"\n  ControlMaster auto\n  ControlPersist 60\n  ControlPath {short}/%C"
        file.write_text(finished("", "ssh-config", "--context", "100%", home=dev).stdout.rstrip() + shared)
        yield file
        subprocess.run(["ssh", "-F", file, "-O", "exit", f"{vm}.orchard"], capture_output=True, check=False)
    write_contexts(known, contexts)


@pytest.mark.needs("ssh", "scp", "sftp", "rsync")
def test_programs_reach_a_vm_by_the_printed_settings(dev: Path, vm: str, settings: Path, tmp_path: Path) -> None:
    askpass = tmp_path / "askpass"
    askpass.write_text("#!/bin/sh\necho admin\n")
    askpass.chmod(0o700)
    env = {**environment(dev), "SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force"}
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_text("data")
    (tmp_path / "batch").write_text("cd made\nrename file file-2\nls\n")
    lines = (
        (f"ssh -F {settings} {vm}.orchard echo there", "there\n"),
        (f"scp -q -r -F {settings} directory {vm}.orchard:made", ""),
        (f"sftp -q -F {settings} -o BatchMode=no -b batch {vm}.orchard", "file-2"),
        (f"scp -q -O -F {settings} {vm}.orchard:made/file-2 back", ""),
        (f"rsync -a -e 'ssh -F {settings}' {vm}.orchard:made/ synchronized", ""),
    )
    for line, printed in lines:
        # A file, since the process that keeps the connection would keep a pipe open.
        with (tmp_path / "said").open("w+") as said:
            done = subprocess.run(
                ["sh", "-c", line],
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=env,
                check=False,
            )
            said.seek(0)
            text = said.read()
        assert (done.returncode, printed in text) == (0, True), (line, text)
    assert [(tmp_path / name).read_text() for name in ("back", "synchronized/file-2")] == ["data", "data"]


def test_port_is_forwarded(dev: Path, vm: str) -> None:
    with started("", "port-forward", "vm", vm, ":22", home=dev) as role:
        port = int(role.wait_for(FORWARDING)[1])
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                assert connection.recv(4) == b"SSH-"
        assert role.stop(signal.SIGINT) == -signal.SIGINT


@pytest.mark.parametrize("words", ["port-forward vm none 22", "port-forward worker none 22", "vnc vm none"])
def test_nothing_listens_for_what_does_not_exist(dev: Path, words: str) -> None:
    done = run(dev, *words.split())
    assert (done.returncode, done.stdout, '"none"' in done.stderr) == (1, "", True)


@pytest.mark.parametrize(
    "words", [("vm", "vm", "0"), ("vm", "vm", "a:1"), ("vm", "vm", "1:70000"), ("host", "vm", "1")]
)
def test_unusable_ports_are_refused(dev: Path, words: tuple[str, ...]) -> None:
    assert call_main(main, "port-forward", *words, home=dev)[0] == 2


def test_exec_passes_input_output_and_status(dev: Path, vm: str) -> None:
    done = run(dev, "exec", "vm", vm, "-i", "-e", "A=b c", "--", "sh", "-c", "cat; echo $A >&2; exit 4", stdin="in")
    assert (done.returncode, done.stdout, done.stderr) == (4, "in", "b c\n")
    done = run(dev, "exec", "vm", vm, "echo $((1 + 1)); pwd", "--workdir", "/")
    assert (done.returncode, done.stdout) == (0, "2\n/\n")
    assert run(dev, "exec", "vm", vm).returncode == 2
    assert run(dev, "exec", "vm", vm, "-t", "true").returncode == 2
    assert run(dev, "exec", "vm", "none", "true").returncode == 1


@pytest.mark.slow
def test_files_are_copied_both_ways(dev: Path, vm: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a file").write_text("text")
    assert run(dev, "cp", str(source), f"{vm}:").returncode == 0
    assert run(dev, "cp", str(source), f"{vm}:renamed").returncode == 0
    assert run(dev, "cp", str(source / "inner" / "a file"), f"{vm}:source/b").returncode == 0
    assert sorted(run(dev, "exec", "vm", vm, "find source renamed -type f").stdout.splitlines()) == [
        "renamed/inner/a file",
        "source/b",
        "source/inner/a file",
    ]
    assert run(dev, "cp", f"{vm}:renamed", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back" / "inner" / "a file").read_text() == "text"
    assert run(dev, "cp", f"{vm}:source/b", str(tmp_path)).returncode == 0
    assert (tmp_path / "b").read_text() == "text"
    for words in (("none", f"{vm}:"), (f"{vm}:none", str(tmp_path)), ("a", "b"), (f"{vm}:a", f"{vm}:b")):
        done = run(dev, "cp", *words)
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "back", "source"]
