"""Scripts by a VM's guest agent: a shell in the guest behind `tart exec -i`, without address, password or SSH server.

The shell's input and output are the same as over SSH (script.py). In some versions of tart the agent is unreachable
until the VM restarts after a client went away early, and perhaps after many clients while the guest boots. So each
attempt first waits for the agent in one long call, the pauses between attempts grow, and a call that is no longer
needed is asked to end before it is killed.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import trio

from orchard.schema import OS
from orchard.vm.driver import DriverError, OnLine, Script
from orchard.vm.processes import READ_BYTES, kill
from orchard.vm.script import (
    CONNECT_SECONDS,
    END_ORDER,
    END_SECONDS,
    WrappedScript,
    attempt,
    login_command,
    open_pipes,
)

# Pauses between attempts; the last one repeats.
_PAUSES = (2.0, 5.0, 10.0, 20.0, 30.0)  # seconds
_LOGIN_SHELLS: Mapping[OS, str] = {"darwin": "zsh", "linux": "bash"}


async def run_by_agent(
    command: Sequence[str],
    environ: Mapping[str, str],
    wait_for_agent: Callable[[], Awaitable[None]],
    script: Script,
    on_line: OnLine,
) -> None:
    """Run a script in the login shell of the guest, and return when it has ended with exit status 0.

    `command` and its environment run a command in the guest. `wait_for_agent` waits for the agent, for a bounded time.
    Tries until the agent answers, at most CONNECT_SECONDS. Raises ScriptFailed for another exit status, another
    DriverError when the script did not begin or the connection was lost, and what `on_line` raises.
    """
    wrapped = WrappedScript.wrap(script)
    shell = [*command, "/bin/sh", "-c", login_command(wrapped.marker, _LOGIN_SHELLS[script.os])]
    complaint = "no answer"
    with trio.move_on_after(CONNECT_SECONDS) as patience:
        for pause in itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1])):
            await wait_for_agent()
            process = await open_pipes(shell, environ)
            if not (complaint := await attempt(process, wrapped, on_line, patience, "the guest agent", end=_end)):
                return
            await trio.sleep(pause)
    raise DriverError(
        f"cannot run the {script.kind} script: no guest agent within {CONNECT_SECONDS:g} seconds: {complaint}"
    )


async def _end(process: trio.Process) -> None:
    """End a call of the agent, and reap it: kill its script in the guest, or else the call. Completes when cancelled."""
    assert process.stdio is not None
    with trio.move_on_after(END_SECONDS, shield=True):
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            await process.stdio.send_all(END_ORDER)
            while await process.stdio.receive_some(READ_BYTES):
                pass
        await process.wait()
    await kill(process)
