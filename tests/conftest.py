"""Fixtures that several files share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.processes import GENEROUS, processes_in

DYING_SECONDS = 5.0  # for what was killed to be gone
SSHD = Path(__file__).parent / "standin" / "sshd.py"


@pytest.fixture(scope="session", autouse=True)
def nothing_runs_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """See to it that no process outlives the tests: guards and their VMs are made to outlive those who start them."""
    yield
    home = tmp_path_factory.getbasetemp()
    until = time.monotonic() + DYING_SECONDS
    while (left := processes_in(home)) and time.monotonic() < until:
        time.sleep(0.05)
    words = [Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ") for number in left]
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert words == []


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an SSH server, as it listens in a VM: admin/admin, and a shell of this host."""
    # With a home of its own: what a developer's profile does in a login shell would be in these tests otherwise.
    home = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}
    process = subprocess.Popen([sys.executable, SSHD], stdout=subprocess.PIPE, text=True, env=home)
    assert process.stdout is not None
    yield int(process.stdout.readline())
    process.terminate()
    process.wait(GENEROUS)
    process.stdout.close()
