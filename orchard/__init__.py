"""Orchard: an orchestrator for Tart virtual machines on a cluster of Macs.

This file imports no other module of the package, so that importing one never imports the others.

The two daemons are `python -m orchard.controller` and `python -m orchard.worker`, and `python -m orchard` is the
command for people. `orchard.client` has the API as methods, and `orchard.testing` runs a whole cluster inside a test
suite.
"""

import signal
import sys

__version__ = "0.1.0"


def end_at_interrupt() -> None:
    """Let Ctrl-C end this process without a traceback while the program does not handle it: as it starts and exits."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# `python -m orchard...` begins with this import. When the module itself runs, its path has replaced "-m".
if sys.argv[:1] == ["-m"]:
    end_at_interrupt()
