"""The programs of the documentation's sessions, which run in forked processes (see `harness.starts`)."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from orchard.__main__ import main


def orchard() -> int:
    """Run the `orchard` command. The first argument is its default port."""
    port = int(sys.argv.pop(1))
    for name, module in list(sys.modules.items()):
        if name.startswith("orchard.") and hasattr(module, "DEFAULT_PORT"):
            vars(module)["DEFAULT_PORT"] = port
    return main()


def python() -> int:
    """Do as `python3 FILE` does; other command lines are for a real one."""
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        os.execv(sys.executable, [sys.executable, *words])
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
    return 0
