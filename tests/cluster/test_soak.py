"""A short round of the soak: whatever was done, nothing of it stays behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.processes import GENEROUS

SOAK = Path(__file__).parent.parent.parent / "bench" / "soak.py"


def test_nothing_stays_behind() -> None:
    soak = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", SOAK, "--seconds", "0"],
        capture_output=True,
        text=True,
        timeout=GENEROUS,
        check=False,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert soak.stderr == ""
