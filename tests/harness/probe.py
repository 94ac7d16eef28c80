"""A program that prints what it sees of itself, for the comparison of forked and started processes."""

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path


def main() -> int:
    """Print what this process sees, then end as the first argument says: by an exit status, or "raise" or "signal"."""
    streams = {"in": sys.stdin, "out": sys.stdout, "err": sys.stderr}
    files = Path("/proc/self/fd")
    seen = {
        "argv": sys.argv[1:],
        "environment": dict(os.environ),
        "shown environment": sorted((files.parent / "environ").read_text().strip("\0").split("\0")),
        "directory": str(Path.cwd()),
        "umask": os.umask(0),
        # Without that of this list.
        "descriptors": [int(path.name) for path in files.iterdir() if path.exists()],
        "handlers": {number.name: str(signal.getsignal(number)) for number in signal.Signals},
        "streams": {
            name: (stream.encoding, stream.errors, stream.line_buffering, stream.fileno()) if stream else None
            for name, stream in streams.items()
        },
        "threads": threading.active_count(),
        "collects": gc.isenabled(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }
    print(json.dumps(seen), flush=sys.argv[1] == "signal")
    if sys.argv[1] == "raise":
        raise ValueError(seen["directory"])
    if sys.argv[1] == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(sys.argv[1])


if __name__ == "__main__":
    from orchard import end_at_interrupt

    end_at_interrupt()
    sys.exit(main())
