"""The source distribution contains the whole project, so that `./run test` runs from it, and the wheel the whole package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
    "screenshots",
    "wheelhouse",
    ".coverage*",
)
# Files that setuptools adds to a source distribution.
ADDED = {"PKG-INFO", "setup.cfg"}


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def build(kind: str, project: Path, directory: Path) -> Path:
    """Build a "wheel" or an "sdist" of a copy of the project in a directory, and return it."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(directory)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [made] = directory.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.mark.slow
def test_the_wheel_contains_every_file_of_the_package(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "orchard", tmp_path / "project" / "orchard", ignore=shutil.ignore_patterns(*MADE))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy.parent)
    with zipfile.ZipFile(build("wheel", copy.parent, tmp_path)) as wheel:
        packed = {name.removeprefix("orchard/") for name in wheel.namelist() if name.startswith("orchard/")}
        [metadata] = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA")]
    assert packed == files(copy)
    # pip only warns of an extra that is unknown.
    extras = re.findall(r'^Requires-Dist: ([\w-]+).*extra == "(ssh|fast)"$', metadata, re.MULTILINE)
    assert extras == [("asyncssh", "ssh"), ("trio-asyncio", "ssh"), ("websockets", "fast")]


@pytest.mark.slow
def test_the_source_distribution_contains_every_file(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT, tmp_path / "project", ignore=shutil.ignore_patterns(*MADE))
    archive = build("sdist", copy, tmp_path)
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2]: member for member in tar.getmembers() if member.isfile()}
    added = {name for name in packed if name in ADDED or ".egg-info/" in name}
    assert set(packed) - added == {name for name in files(copy) if ".egg-info/" not in name} - ADDED
    assert packed["run"].mode & 0o111
