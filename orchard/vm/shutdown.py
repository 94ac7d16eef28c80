"""The shutdown script of a VM: run in a guest that is about to be ended, and abandoned at its deadline.

It fails open: the VM ends however the script ends. The outcome is one log line, and the output is dropped, since the VM
may be deleted already.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import trio

from orchard.vm.driver import Driver, DriverError, Script, ScriptFailed

_logger = logging.getLogger("orchard.vm.shutdown")


async def shut_down(driver: Driver, name: str, script: Script) -> None:
    """Run the shutdown script in a VM, until it has ended, the VM has ended, or its time is over.

    The time counts from now: a guest that does not answer is not waited for. A VM that no supervisor of this host runs
    is left alone.
    """
    outcome = "interrupted, since the worker ends or the VM has to end at once"

    async def stay_with_guest() -> None:
        nonlocal outcome
        try:
            await driver.attach(name)
            outcome = "the VM has ended"
        except DriverError as error:
            outcome = f"the VM has ended: {error}"
        nursery.cancel_scope.cancel()

    async def ignore(line: str) -> None:
        await trio.lowlevel.checkpoint()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay_with_guest)
            with trio.move_on_after(script.seconds) as limit:
                try:
                    # The time limit is the scope here: the rest of the script ends with the guest.
                    await driver.run_script(name, replace(script, seconds=math.inf), ignore)
                    outcome = "exit code 0"
                except ScriptFailed as error:
                    outcome = f"exit code {error.exit_code}"
                except DriverError as error:
                    outcome = str(error)
            if limit.cancelled_caught:
                outcome = f"given up after {script.seconds:g} seconds"
            nursery.cancel_scope.cancel()
    finally:
        _logger.info("shutdown script ended", extra={"vm": name, "outcome": outcome})
