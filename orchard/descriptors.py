"""How many files and sockets this process may have open. Law: changes that, and nothing else."""

from __future__ import annotations

import resource
from contextlib import suppress

WANTED = 65_536  # for thousands of workers, watchers and tunnels; the default limit is 256 on macOS
WANTED_AT_LEAST = 10_240  # what macOS allows when it says "unlimited"


def raise_limit() -> None:
    """Allow this process as many open files as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (WANTED, WANTED_AT_LEAST):
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < limit:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return
