"""The verbs `controller` and `worker`, which run the roles. Their options are those of `python -m orchard.controller`."""

from __future__ import annotations

from collections.abc import Sequence


def run_role(verb: str, words: Sequence[str]) -> int:
    """Run a controller or a worker with these options until it is stopped, and return the exit status."""
    # The existing command has it.
    if words[:1] == ["run"]:
        words = words[1:]
    if verb == "controller":
        from orchard.controller import main as run
    else:
        from orchard.worker import main as run
    return run(words)
