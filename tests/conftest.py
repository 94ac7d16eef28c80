"""Fixtures that several files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import GENEROUS

SSHD = Path(__file__).parent / "standin" / "sshd.py"


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
