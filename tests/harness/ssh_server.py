"""SSH servers as they listen in VMs, each a process of `standin/sshd.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.processes import GENEROUS
from harness.starts import ForkedProcess, fork


@contextmanager
def ssh_server(**env: str) -> Iterator[tuple[ForkedProcess, int]]:
    """Run an SSH server, and return its process and its port."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as output, os.fdopen(writing, "w") as stdout, Path(os.devnull).open() as stdin:
        descriptors = {0: stdin.fileno(), 1: stdout.fileno(), 2: 2}
        process = fork("standin.sshd:serve", [], env={**os.environ, **env}, descriptors=descriptors)
        stdout.close()
        try:
            yield process, int(output.readline())
        finally:
            process.terminate()
            process.wait(GENEROUS)
