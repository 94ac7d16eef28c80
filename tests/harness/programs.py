"""The programs that tests run: which there are, and what happens where one is missing.

`tests/programs.txt` lists them. A test that runs one is marked `@pytest.mark.needs("rsync")`, or its fixture calls
`need("rsync")`. Where the program is missing the test is skipped, and listed at the end of the run; with
ORCHARD_REQUIRE_PROGRAMS=1 in the environment, as in `.ci/run`, it fails.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

REQUIRE = "ORCHARD_REQUIRE_PROGRAMS"
LISTED = Path(__file__).parent.parent / "programs.txt"
REASON = "needs the program"


def packages() -> dict[str, str]:
    """Return the Debian package of each program that the tests run."""
    lines = (line.split() for line in LISTED.read_text().splitlines() if line and not line.startswith("#"))
    return {program: package for program, package in lines}  # noqa: C416 -- checks that there are two words a line


def need(*programs: str) -> None:
    """Skip the test that is running unless all `programs` are installed; fail it where they are required."""
    known = packages()
    missing = {program: known[program] for program in programs if shutil.which(program) is None}
    if not missing:
        return
    reason = f"{REASON} {', '.join(missing)} (Debian: apt-get install {' '.join(sorted(set(missing.values())))})"
    if os.environ.get(REQUIRE):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
