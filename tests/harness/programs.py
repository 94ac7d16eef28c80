"""The programs that tests run: which there are, and what happens where one is missing.

`tests/programs.txt` lists them. A test that runs one is marked `@pytest.mark.needs("rsync")`, or its fixture calls
`need("rsync")`. Where the program is missing the test is skipped, and listed at the end of the run; with
ORCHARD_REQUIRE_PROGRAMS=1 in the environment, as in `.ci/run`, it fails. A test that only Linux or only root can run is
skipped elsewhere, and the latter is listed, too.

An asynchronous test uses the marker: pytest-trio loses the reason of a skip in the body of a test.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchard.etcd_nodes import EtcdProgramError, find_etcd

REQUIRE = "ORCHARD_REQUIRE_PROGRAMS"
LISTED = Path(__file__).parent.parent / "programs.txt"
# How the reason of a skip begins.
REASON = "needs the program"
ROOT_REASON = "needs the rights of root"


@dataclass(frozen=True)
class Program:
    # Of Debian.
    package: str
    # Who can run its tests: "" for everybody, "Linux", or "root" (on Linux).
    where: str = ""


def listed() -> dict[str, Program]:
    """Return the programs that the tests run, by their names."""
    lines = (line.split() for line in LISTED.read_text().splitlines() if line and not line.startswith("#"))
    return {name: Program(*rest) for name, *rest in lines}


def find_program(name: str) -> str | None:
    """Return the path of a program, None if it is not installed. The test extra has those of etcd for some systems."""
    found = None
    if name.startswith("etcd"):
        with suppress(EtcdProgramError):
            found = shutil.which(name, path=Path(find_etcd()).parent)
    return found or shutil.which(name)


def need(*names: str) -> None:
    """Skip the test that is running unless all programs are installed; fail it where they are required."""
    known = listed()
    wanted = {name: known[name] for name in names}
    limits = {program.where for program in wanted.values()} - {""}
    if limits and sys.platform != "linux":
        pytest.skip("runs on Linux only")
    if "root" in limits and os.geteuid() != 0:
        pytest.skip(f"{ROOT_REASON}: runs {', '.join(names)}")
    missing = {name: program.package for name, program in wanted.items() if find_program(name) is None}
    if not missing:
        return
    reason = f"{REASON} {', '.join(missing)} (Debian: apt-get install {' '.join(sorted(set(missing.values())))})"
    if os.environ.get(REQUIRE):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
