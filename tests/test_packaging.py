"""The source distribution: it contains the whole project, so that `./run test` runs from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Directories that tools make in a checkout; .gitignore lists them, too.
MADE = (
    ".git",
    ".venv",
    ".dev-data",
    ".hypothesis",
    "*_cache",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    "wheelhouse",
    ".coverage*",
)
# Files that setuptools adds to a source distribution.
ADDED = {"PKG-INFO", "setup.cfg"}


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_the_source_distribution_contains_every_file(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT, tmp_path / "project", ignore=shutil.ignore_patterns(*MADE))
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2]: member for member in tar.getmembers() if member.isfile()}
    added = {name for name in packed if name in ADDED or ".egg-info/" in name}
    assert set(packed) - added == {name for name in files(copy) if ".egg-info/" not in name} - ADDED
    assert packed["run"].mode & 0o111
