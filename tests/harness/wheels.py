"""Wheels of the packages that are installed here, for installations without a network."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROJECT = "orchard-cluster"


def pack_needed(directory: Path) -> None:
    """Make a directory with wheels of all that the project needs with its extras, and to be built."""
    directory.mkdir()
    for name in needed(PROJECT, "setuptools") - {PROJECT}:
        pack(name, directory)


def pack_project(directory: Path) -> None:
    """Make a wheel of the project in a directory."""
    with tempfile.TemporaryDirectory() as copy:
        # A build leaves files in its directory.
        shutil.copytree(ROOT / "orchard", Path(copy, "orchard"), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        program = f"from setuptools import build_meta; build_meta.build_wheel({str(directory)!r})"
        subprocess.run([sys.executable, "-c", program], cwd=copy, stdout=subprocess.DEVNULL, check=True)


def needed(*names: str) -> set[str]:
    """Return some packages and the installed ones that they need, for the project with those of its extras."""
    found: set[str] = set()
    left = [*names]
    while left:
        name = left.pop()
        if name in found or not is_installed(name):
            continue
        found.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            other, _, marker = requirement.partition(";")
            if "extra" not in marker or (name == PROJECT and re.search("ssh|fast", marker)):
                left.append(re.split(r"[\s<>=!~\[(]", other.strip(), maxsplit=1)[0].lower())
    return found


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pack(name: str, directory: Path) -> None:
    """Make a wheel of an installed package, without its tests and without the requirements of its extras.

    pip takes most of its time to compile the files, which the callers switch off, and to parse the requirements.
    """
    installed = importlib.metadata.distribution(name)
    tag = re.findall("^Tag: (.*)$", installed.read_text("WHEEL") or "", re.MULTILINE)[-1]
    # The one at hand may be for this glibc only.
    tag = re.sub("manylinux_[0-9]+_[0-9]+", "manylinux_2_17", tag)
    known = re.sub("[-.]+", "_", installed.metadata["Name"])
    with zipfile.ZipFile(directory / f"{known}-{installed.version}-{tag}.whl", "w") as wheel:
        for file in installed.files or ():
            if {"..", "__pycache__", "tests", "_tests"} & set(file.parts):
                continue
            if file.name == "METADATA":
                wheel.writestr(str(file), re.sub("(?m)^Requires-Dist:.*extra ==.*\n", "", file.read_text()))
            else:
                wheel.write(str(file.locate()), str(file))
