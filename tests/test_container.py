"""The image of the controller, built with this machine's Python, because registries may be out of reach.

That is lent to the build and to the container, and is in no image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pip
import pytest
from harness.processes import GENEROUS, LISTENING, Role
from harness.programs import need
from harness.wheels import pack_needed

ROOT = Path(__file__).parent.parent
CONTEXT = ("Containerfile", ".containerignore", "pyproject.toml", "README.md", "LICENSE")
PROGRAMS = ("dash", "openssl", "mkdir", "chown")
# What the image does not need of Python's library.
LEFT_OUT = ("test", "tests", "site-packages", "dist-packages", "ensurepip", "idlelib", "lib2to3", "*tkinter*", "pydoc*", "*.a",
    "*.opt-*.pyc")  # fmt: skip
# Their shared libraries are in the images of Python, too.
EXTRAS = ("_cffi*.so", "cryptography/**/*.so")
NAME = "localhost/orchard-of-the-tests"


def make_base(root: Path) -> None:
    """Make a file system with this Python, its pip and setuptools, a shell, and the programs that Containerfile calls."""
    python = Path(str(getattr(sys, "_base_executable", sys.executable))).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    shell, *others = programs = [Path(str(shutil.which(name))).resolve() for name in PROGRAMS]
    modules = [path for path in (library / "lib-dynload").glob("*.so") if "tkinter" not in path.name]
    modules += [path for pattern in EXTRAS for path in Path(sysconfig.get_path("platlib")).glob(pattern)]
    needed = subprocess.run(["ldd", python, *programs, *modules], capture_output=True, text=True, check=False).stdout
    shared = {Path(found) for found in re.findall(r"(?:=>|^)\s+(/\S+) \(", needed, re.MULTILINE)}
    for file in {python, *programs, *shared}:
        place = root / file.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    # Compiled files come along: in the image each program would compile the modules that it imports.
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    shutil.copytree(library, root / library.relative_to("/"), ignore=left_out, dirs_exist_ok=True)
    site = Path(sysconfig.get_path("purelib"))
    # With setuptools at hand, pip makes no environment to build the project in, which takes a quarter of the build.
    for package in Path(pip.__file__).parent, *site.glob("setuptools*"), site / "_distutils_hack":
        shutil.copytree(package, root / library.relative_to("/") / package.name, ignore=left_out)
    for link, target in {"bin/sh": shell, "usr/local/bin/python3": python}.items():
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(target)
    for program in others:
        (root / "usr/local/bin" / program.name).symlink_to(program)
    for directory in ("usr/lib/ssl", "etc/ssl"):
        (root / directory).mkdir(parents=True, exist_ok=True)
        shutil.copy("/etc/ssl/openssl.cnf", root / directory)
    for path in root.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)


def buildah(*words: str | Path) -> str:
    done = subprocess.run(["buildah", *words], capture_output=True, text=True, check=False, timeout=GENEROUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def is_controller(process: Path) -> bool:
    """Return whether a process, by its directory in /proc, is the Python of the image's controller."""
    with suppress(OSError):
        has_home = b"ORCHARD_HOME=/var/lib/orchard\0" in (process / "environ").read_bytes()
        return has_home and (process / "cmdline").read_bytes().partition(b"\0")[0].endswith(b"python3")
    return False


@pytest.fixture
def container(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Build the image, and return the name of a container of it, and the words with which it gets what was lent.

    All that was made is removed.
    """
    need("buildah")
    made = ["rm"], ["rmi", "--force"]
    try:
        root = tmp_path / "root"
        root.mkdir()
        make_base(root)
        # buildah itself writes to /etc.
        places = [path.name for path in root.iterdir() if path.name != "etc"] + ["etc/ssl"]
        lent = [word for place in places for word in ("--volume", f"{root / place}:/{place}")]
        context = tmp_path / "context"
        shutil.copytree(ROOT / "orchard", context / "orchard")
        for name in CONTEXT:
            shutil.copy(ROOT / name, context / name)
        pack_needed(context / "wheelhouse")
        arguments = (
            "BASE=scratch",
            "PIP_OPTIONS=--quiet --no-compile --no-index --no-build-isolation --find-links wheelhouse",
        )
        words = [word for argument in arguments for word in ("--build-arg", argument)]
        buildah("build", "--isolation", "chroot", "--format", "docker", *lent, *words, "--tag", NAME, context)
        made[1].append(NAME)
        made[0].append(buildah("from", NAME))
        yield made[0][-1], lent
    finally:
        for words in made:
            subprocess.run(["buildah", *words], capture_output=True, check=False)


@pytest.mark.needs("buildah")
@pytest.mark.slow
def test_image_runs_a_controller_without_rights_that_is_healthy_and_ends_at_sigterm(
    container: tuple[str, list[str]], tmp_path: Path
) -> None:
    name, lent = container
    settings: dict[str, Any] = json.loads(buildah("inspect", name))["Docker"]["config"]
    assert settings["User"].split(":")[0] not in ("", "0", "root")
    assert settings["Volumes"].keys() == {"/var/lib/orchard"}
    assert settings["StopSignal"] == "SIGTERM"
    # With the user of the image.
    run = ["buildah", "run", "--isolation", "chroot", *lent, name, "--"]
    words = [*run, *settings["Entrypoint"], "--listen", "127.0.0.1:0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = Role(process, tmp_path / "log").wait_for(LISTENING)[1].rpartition(":")[2]
            kind, *check = settings["Healthcheck"]["Test"]
            assert kind == "CMD"
            here = [word.replace("6120", port) for word in check]
            assert subprocess.run([*run, *here], check=False).returncode == 0
            # No controller listens on the first port.
            broken = [word.replace("6120", "1") for word in check]
            assert subprocess.run([*run, *broken], capture_output=True, check=False).returncode != 0
            # buildah does not pass a signal on.
            [controller] = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if is_controller(entry)]
            os.kill(controller, signal.SIGTERM)
            assert process.wait(GENEROUS) == 0
        finally:
            process.kill()
