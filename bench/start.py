"""Measure how long a controller takes from its start until it listens.

    ./run bench start [--rounds N]

It starts with an empty directory, and from a state file of 100,000 lines: a journal as long as it gets before compaction.
The first write of a controller compacts it, so each start gets the long file again. The comparison is a bare trio + h11
server, which shows the share of Python and the packages.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio
from cluster import NOW, PER_WORKER, fill
from load import BARE, CONTROLLER, NO_AUTH, running
from measure import ROUNDS, Variant, compare

from orchard.base.files import STATE_FILE
from orchard.storage import state_file
from orchard.storage.file_engine import FileEngine
from orchard.storage.journal import Disk
from orchard.store import Store

LINES, VMS = 100_000, 10_000
FOREVER = ("--worker-offline-timeout", "1000000")


class UnsyncedDisk(Disk):
    """A disk without fsyncs: the data of a benchmark need not survive a crash."""

    def sync(self, fd: int) -> None:
        pass


async def run_inline(work: Callable[..., Any], *arguments: Any, limiter: object = None) -> Any:
    await trio.lowlevel.checkpoint()
    return work(*arguments)


def prepare_journal(home: Path) -> None:
    """Write a state file of LINES lines, without compaction."""
    directory = home / ".orchard" / "controller"
    directory.mkdir(mode=0o700, parents=True)
    state_file.COMPACT_BYTES = 10**12

    async def write() -> None:
        opened = await Store.open(FileEngine(directory, UnsyncedDisk(), run_inline), NOW)
        async with trio.open_nursery() as nursery:
            await nursery.start(opened.run)
            fill(opened, VMS, VMS // PER_WORKER)
            for number in range(LINES):
                vm = opened.state.vms[f"vm-{number % VMS}"]
                with opened.transaction() as tx:
                    tx.put(replace(vm, state=replace(vm.state, status_message=f"pulling the image: {number} %")))
                # Each transaction becomes a line of its own.
                await opened.wait_durable()
            nursery.cancel_scope.cancel()
        opened.close()

    trio.run(write)


def cpu_of_children() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench start")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    options = parser.parse_args()
    with ExitStack() as stack:
        empty, full = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        prepare_journal(full)

        state = full / ".orchard" / "controller" / STATE_FILE
        # Compaction replaces the file and does not write to it.
        saved = state.rename(full / "saved")

        def start_long() -> None:
            state.unlink(missing_ok=True)
            state.hardlink_to(saved)
            start(full)

        def start(home: Path) -> None:
            with running(*CONTROLLER, NO_AUTH, *FOREVER, home=home):
                pass

        def start_bare() -> None:
            with running(BARE):
                pass

        variants = (
            Variant(f"start from {LINES:,} lines, and stop", start_long, 1, cpu_of_children),
            Variant("start with nothing, and stop", lambda: start(empty), 1, cpu_of_children),
            Variant("bare server", start_bare, 1, cpu_of_children),
        )
        compare(*variants, count=options.rounds)
        for variant in variants:
            print(f"{variant.name}: {1 / variant.rate:.2f} s")


if __name__ == "__main__":
    main()
