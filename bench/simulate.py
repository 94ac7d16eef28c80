"""Bad days of a cluster on a virtual clock, as many as there is time for: tests/simulation.py says what happens on them.

    ./run bench simulate [--seeds N] [--from SEED] [--steps N]

Plays a day for each seed, on all processors. Prints what was broken, with the seed by which it can be played again, and
ends with 1 if anything was.
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

from simulation import STEPS, Violation, simulate


def play(steps: int, seed: int) -> str:
    """Give what was broken on a day, "" for nothing. What led to it is printed."""
    try:
        simulate(seed, steps=steps)
    except Violation as violation:
        return str(violation)
    return ""


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run bench simulate")
    parser.add_argument("--seeds", type=int, default=500, help="default %(default)s")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first of them; default %(default)s")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a day; default %(default)s")
    options = parser.parse_args(argv)
    seeds = range(options.first, options.first + options.seeds)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        broken = [text for text in pool.map(partial(play, options.steps), seeds) if text]
    print(f"{len(seeds):,} days of {options.steps} steps, {len(broken)} of them broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
