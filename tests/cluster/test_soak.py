"""A short run of the soak benchmark: random use leaves no process, file, task or descriptor behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness.processes import GENEROUS

SOAK = Path(__file__).parent.parent.parent / "bench" / "soak.py"


@pytest.mark.slow
@pytest.mark.needs("ps")
def test_random_use_leaves_nothing_behind() -> None:
    soak = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", SOAK, "--seconds", "0", "--actions", "100"],
        capture_output=True,
        text=True,
        timeout=GENEROUS,
        check=False,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert soak.stderr == ""
