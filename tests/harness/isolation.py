"""A network that has nothing but loopback, for the thread of a test and the processes that it starts."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from harness.programs import need

# CLONE_NEWNET of Linux: a name space of networks.
_NETWORK = 0x40000000


@contextmanager
def without_network() -> Iterator[None]:
    """Leave this thread and the processes that it starts only loopback. Needs root, and the program `ip`."""
    need("ip")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    assert libc.unshare(_NETWORK) == 0, os.strerror(ctypes.get_errno())
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield
    finally:
        assert libc.setns(before, _NETWORK) == 0, os.strerror(ctypes.get_errno())
        os.close(before)
