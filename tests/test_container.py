"""The image of the controller, built from this machine's Python, because registries may be out of reach."""

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
from harness.processes import GENEROUS, LISTENING, Role, free_port
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
    """Make the file system of an image with this Python, its pip, a shell, and the programs that Containerfile calls."""
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
    shutil.copytree(Path(pip.__file__).parent, root / library.relative_to("/") / "pip", ignore=left_out)
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


def words_of(process: Path) -> list[str]:
    """Return the command line of a process by its directory in /proc; empty if it has ended."""
    with suppress(OSError):
        return (process / "cmdline").read_text().split("\0")
    return []


@pytest.fixture
def container(tmp_path: Path) -> Iterator[str]:
    """Build the image, and return the name of a container of it, which is removed with all that was made."""
    need("buildah")
    made = ["rm"], ["rmi", "--force"]
    try:
        root = tmp_path / "root"
        root.mkdir()
        make_base(root)
        base = buildah("from", "scratch")
        made[0].append(base)
        buildah("copy", "--quiet", base, root, "/")
        buildah("commit", "--quiet", base, f"{NAME}-base")
        made[1].append(f"{NAME}-base")
        context = tmp_path / "context"
        shutil.copytree(ROOT / "orchard", context / "orchard")
        for name in CONTEXT:
            shutil.copy(ROOT / name, context / name)
        pack_needed(context / "wheelhouse")
        arguments = (f"BASE={NAME}-base", "PIP_OPTIONS=--quiet --no-compile --no-index --find-links wheelhouse")
        words = [word for argument in arguments for word in ("--build-arg", argument)]
        buildah("build", "--isolation", "chroot", "--format", "docker", *words, "--tag", NAME, context)
        made[1].append(NAME)
        made[0].append(buildah("from", NAME))
        yield made[0][-1]
    finally:
        for words in made:
            subprocess.run(["buildah", *words], capture_output=True, check=False)


@pytest.mark.needs("buildah")
@pytest.mark.slow
def test_image_runs_a_controller_without_rights_that_is_healthy_and_ends_at_sigterm(
    container: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = json.loads(buildah("inspect", container))["Docker"]["config"]
    assert settings["User"].split(":")[0] not in ("", "0", "root")
    assert settings["Volumes"].keys() == {"/var/lib/orchard"}
    assert settings["StopSignal"] == "SIGTERM"
    port = str(free_port())
    # With the user of the image.
    run = ["buildah", "run", "--isolation", "chroot", container, "--"]
    words = [*run, *settings["Entrypoint"], "--listen", f"127.0.0.1:{port}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            Role(process, tmp_path / "log").wait_for(LISTENING)
            kind, *check = settings["Healthcheck"]["Test"]
            assert kind == "CMD"
            here = [word.replace("6120", port) for word in check]
            assert subprocess.run([*run, *here], check=False).returncode == 0
            broken = [word.replace("6120", str(free_port())) for word in check]
            assert subprocess.run([*run, *broken], capture_output=True, check=False).returncode != 0
            # buildah does not pass a signal on.
            [controller] = [
                int(entry.name)
                for entry in Path("/proc").glob("[0-9]*")
                if (told := words_of(entry)) and told[0].endswith("python3") and words[-1] in told
            ]
            os.kill(controller, signal.SIGTERM)
            assert process.wait(GENEROUS) == 0
        finally:
            process.kill()
