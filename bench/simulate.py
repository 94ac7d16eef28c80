"""Random faults in a simulated cluster, for as many seeds as there is time (tests/simulation).

    ./run bench simulate [--controllers 2] [--seeds N] [--from SEED] [--steps N] [--bug NAME]

Runs seeds on all processors. Prints each violation with its seed, which repeats the run, and exits with 1 if there was
any. Two controllers have their state in an etcd in memory. `--bug` plants a bug that the simulation must find, and
shows in how many seeds it does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "simulation"))

from fault_schedule import STEPS, ViolationError, simulate
from simulated_cluster import NO_BUG, PLANTED_BUGS, PlantedBug


def violation_of(steps: int, bug: PlantedBug, is_fleet: bool, seed: int) -> str:
    """Run a seed. Return its violation, "" for none; `simulate` prints the trace before it."""
    try:
        simulate(seed, bug=bug, steps=steps, is_fleet=is_fleet)
    except ViolationError as violation:
        return str(violation)
    return ""


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run bench simulate")
    parser.add_argument("--seeds", type=int, default=500, help="number of seeds; default %(default)s")
    parser.add_argument("--from", type=int, default=0, dest="first", help="first seed; default %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each seed; default %(default)s")
    parser.add_argument("--bug", choices=PLANTED_BUGS, help="bug to plant; default: none")
    parser.add_argument("--controllers", type=int, choices=(1, 2), default=1, help="number; default %(default)s")
    options = parser.parse_args(argv)
    seeds = range(options.first, options.first + options.seeds)
    run = partial(violation_of, options.steps, PLANTED_BUGS.get(options.bug, NO_BUG), options.controllers > 1)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        violations = [text for text in pool.map(run, seeds) if text]
    print(f"{len(seeds):,} seeds of {options.steps} steps, {len(violations)} with a violation", *violations, sep="\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
