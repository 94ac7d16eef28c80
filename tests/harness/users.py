"""Another user of this host, for tests that run as root: a program of theirs, and a directory that is theirs.

The Python of the tests may lie where only root can read it, as pytest's temporary directories do.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from harness.programs import ROOT_REASON

OTHER = "nobody"
_ROOT = Path(__file__).parent.parent.parent
_PYTHONS = (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")


@cache
def python_of_other() -> tuple[str, Mapping[str, str]]:
    """Return a Python that the other user can run, and an environment in which it finds Orchard. Skip without one."""
    if sys.platform != "linux":
        pytest.skip("runs on Linux only")
    if os.geteuid() != 0:
        pytest.skip(f"{ROOT_REASON}: becomes another user")
    env = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), sysconfig.get_path("purelib")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    probe = f"import sys, trio, orchard.client; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    user = pwd.getpwnam(OTHER)
    for python in _PYTHONS:
        try:
            done = subprocess.run(
                [python, "-c", probe], env=env, cwd="/", user=user.pw_uid, group=user.pw_gid, capture_output=True
            )
        except OSError:
            continue
        if done.returncode == 0:
            return python, env
    pytest.skip(f"{ROOT_REASON}, and a Python {sys.version_info[0]}.{sys.version_info[1]} that {OTHER} can run")


@contextmanager
def home_of_other() -> Iterator[Path]:
    """Yield a directory of the other user, and remove it after the block."""
    home = Path(tempfile.mkdtemp(prefix="home-"))
    try:
        shutil.chown(home, OTHER)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
