"""`./run wheelhouse`: what it asks pip for. The page docs/offline.md installs from such a directory without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "wheelhouse.py"
# Stands for pip: notes how it was called, and makes what `pip wheel` would.
PIP = """
import pathlib, sys
words = sys.argv[1:]
with open({calls!r}, "a") as file:
    print(*words, file=file)
if {status!r}:
    sys.exit({status!r})
if "wheel" in words:
    (pathlib.Path(words[words.index("--wheel-dir") + 1]) / "orchard_cluster-1-py3-none-any.whl").touch()
"""


def collect(directory: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(directory.parent), **environ}
    return subprocess.run(
        [sys.executable, TOOL, directory, *options], env=env, capture_output=True, text=True, check=False
    )


def stand_for_pip(directory: Path, status: int) -> Path:
    """Make a pip that ends with a status, and return the file with its calls."""
    calls = directory / "calls"
    (directory / "pip").mkdir()
    (directory / "pip" / "__main__.py").write_text(PIP.format(calls=str(calls), status=status))
    (directory / "pip" / "__init__.py").touch()
    return calls


@pytest.mark.slow
def test_wheels_of_each_platform_and_each_python_are_collected(tmp_path: Path) -> None:
    calls = stand_for_pip(tmp_path, 0)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "orchard_cluster-0-py3-none-any.whl").touch()
    done = collect(tmp_path / "wheels", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    downloads = [line for line in calls.read_text().splitlines() if " download " in line]
    asked = {
        (platform, python)
        for line in downloads
        for python in re.findall("--python-version (\\S+)", line)
        for platform in re.findall("--platform (?:macosx|manylinux)[0-9_]*_(\\S+)", line)
    }
    pythons = ("3.11", "3.12", "3.13")
    assert asked == {(platform, python) for platform in ("arm64", "x86_64", "aarch64") for python in pythons}
    for line in downloads:
        assert "--only-binary :all:" in line
        assert "orchard-cluster[ssh,fast] @ file://" in line
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == ["orchard_cluster-1-py3-none-any.whl"]


def test_failure_of_pip_is_the_failure_of_the_command(tmp_path: Path) -> None:
    stand_for_pip(tmp_path, 3)
    done = collect(tmp_path / "wheels", PYTHONPATH=str(tmp_path))
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
