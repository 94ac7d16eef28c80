"""The end of a VM on this host: its shutdown script, its stop and its deletion.

The shutdown script is abandoned at its deadline, and fails open: the VM ends however the script ends. The outcome is one
log line, and the output is dropped, since the VM may be deleted already. A stop and a deletion are retried until they
succeed, however long that takes.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import trio

from orchard.base.nursery import growing_pause
from orchard.vm.driver import Driver, DriverError, NoSuchVM, NoteTrouble, NotRunning, Script, ScriptFailed, Trouble

# The first and the longest pause between attempts to stop or delete a VM.
RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 300.0  # seconds

_logger = logging.getLogger("orchard.vm")


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


async def stop_with_retries(driver: Driver, name: str, note_trouble: NoteTrouble, failure: str) -> None:
    """Stop a VM, and return when nothing of it runs. `failure` is the log line of an attempt that fails."""

    async def stop() -> None:
        with suppress(NotRunning, NoSuchVM):
            await driver.stop(name)

    await _retry("stop", name, note_trouble, failure, stop)


async def delete_with_retries(driver: Driver, name: str, note_trouble: NoteTrouble, failure: str) -> None:
    """Delete a VM, and return when it is gone. `failure` is the log line of an attempt that fails."""

    async def delete() -> None:
        with suppress(NoSuchVM):
            try:
                await driver.delete(name)
            except NoSuchVM:
                raise
            except DriverError:
                # It may run although it should not.
                with suppress(NotRunning):
                    await driver.stop(name)
                await driver.delete(name)

    await _retry("delete", name, note_trouble, failure, delete)


async def _retry(
    step: Trouble, name: str, note_trouble: NoteTrouble, failure: str, attempt: Callable[[], Awaitable[None]]
) -> None:
    for failures in itertools.count(1):
        try:
            await attempt()
            break
        except DriverError as error:
            _logger.error(failure, extra={"vm": name, "reason": str(error)})
            note_trouble(step, name, str(error))
            await trio.sleep(growing_pause(failures, RETRY_SECONDS, LAST_RETRY_SECONDS))
    note_trouble(step, name, "")
