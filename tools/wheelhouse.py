"""Fill a directory with wheels of the project and of all that it needs, for hosts without internet.

    ./run wheelhouse [DIRECTORY] [--platform P] [--python V]      default: wheelhouse, all platforms, all versions

`pip install --no-index --find-links DIRECTORY 'orchard-cluster[ssh,fast]'` installs from it, and so does `./run` in a clone
that has it as `wheelhouse`. setuptools is in it for clones. What is in the directory already is not loaded again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "orchard-cluster"
EXTRAS = "ssh,fast"
# From a name to pip's tags. pip takes wheels for older versions of macOS, too, but not those for an older glibc.
PLATFORMS = {
    "macos-arm64": ("macosx_13_0_arm64",),
    "linux-x86_64": ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64"),
    "linux-arm64": ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64"),
}
PYTHONS = ("3.11", "3.12", "3.13")


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


def build_project(directory: Path) -> Path:
    """Build the project's own wheel in a directory, in place of an older one, and return it."""
    for old in directory.glob("orchard_cluster-*.whl"):
        old.unlink()
    # A build leaves files in its directory, which the next one would take into its wheel.
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT / "orchard", Path(copy, "orchard"), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        pip("wheel", "--no-deps", "--wheel-dir", str(directory), copy)
    [wheel] = directory.glob("orchard_cluster-*.whl")
    return wheel


def download(directory: Path, wheel: Path, platform: str, python: str) -> None:
    """Download the wheels that a platform and a version of Python need."""
    tags = [word for tag in PLATFORMS[platform] for word in ("--platform", tag)]
    pip(
        *("download", "--dest", str(directory), "--only-binary", ":all:"),
        *("--implementation", "cp", "--python-version", python, *tags),
        *(f"{PROJECT}[{EXTRAS}] @ {wheel.as_uri()}", "setuptools>=77"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fill a directory with wheels of the project and of all that it needs."
    )
    parser.add_argument("directory", nargs="?", type=Path, default=Path("wheelhouse"))
    parser.add_argument("--platform", choices=PLATFORMS, action="append", help="repeatable; default: all")
    parser.add_argument("--python", choices=PYTHONS, action="append", help="repeatable; default: all")
    options = parser.parse_args()
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        wheel = build_project(directory)
        for platform in options.platform or PLATFORMS:
            for python in options.python or PYTHONS:
                print(f"wheelhouse: {platform}, Python {python}", file=sys.stderr)
                download(directory, wheel, platform, python)
    except subprocess.CalledProcessError as error:
        print("wheelhouse: pip failed; its messages above say why", file=sys.stderr)
        return error.returncode
    wheels = list(directory.glob("*.whl"))
    print(f"{directory}: {len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) // 1_000_000} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
