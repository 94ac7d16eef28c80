"""`./run wheelhouse`: what it asks pip for, and installations from such a directory without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path

import pip
import pytest
from harness.isolation import without_network
from harness.wheels import pack_needed

from orchard import __version__

# The project, and what its extras need.
INSTALLED = ["orchard-cluster", "asyncssh", "trio-asyncio", "websockets"]
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


def environment_with_pip(directory: Path) -> Path:
    """Make an environment with this one's pip, which is sooner there than one that is installed; return its Python."""
    venv.create(directory, symlinks=True)
    site = sysconfig.get_path("purelib", "venv", {"base": str(directory)})
    Path(site, "pip").symlink_to(Path(pip.__file__).parent)
    (directory / "bin" / "pip").touch(0o755)
    return directory / "bin" / "python"


@pytest.mark.needs("ip")
@pytest.mark.slow(17)
def test_project_and_clone_are_installed_from_a_wheelhouse_without_network(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    pack_needed(source)
    here_python = f"{sys.version_info.major}.{sys.version_info.minor}"
    # What is built here is built with this environment's setuptools; the clone's is built with that of the wheelhouse.
    here = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(source),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    with without_network():
        options = ("--platform", f"linux-{os.uname().machine.replace('aarch64', 'arm64')}", "--python", here_python)
        done = collect(wheels, *options, **here)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(source)
        # For pip, "0" switches it off. What runs is compiled then, and not all that is installed.
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_NO_COMPILE": "0"}
        clone = tmp_path / "a clone"
        shutil.copytree(ROOT / "orchard", clone / "orchard", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("run", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, clone / name)
        wheels = wheels.rename(clone / "wheelhouse")
        python = environment_with_pip(clone / ".venv")
        words = ("--quiet", "--no-index", "--find-links", wheels, "orchard-cluster[ssh,fast]")
        subprocess.run([python, "-m", "pip", "install", *words], env=env, check=True)
        program = f"from importlib.metadata import version; print(*map(version, {INSTALLED}))"
        said = subprocess.run([python, "-I", "-c", program], env=env, check=True, capture_output=True, text=True).stdout
        assert said.split() == [__version__, *map(version, INSTALLED[1:])]

        # The project itself is installed anew, from the clone, and built with what is in the wheelhouse.
        done = subprocess.run(
            [clone / "run", "demo", "--synthetic"],
            env={**env, "PYTHON": sys.executable}, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Hello from" in done.stdout
