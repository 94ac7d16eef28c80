"""Random faults in a simulated cluster break no guarantee, and the simulation finds planted bugs.

`./run bench simulate` runs thousands of seeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from fault_schedule import ViolationError, simulate
from simulated_cluster import NO_BUG, NO_BUG_IN_ISOLATION, PLANTED_BUGS, PlantedBug

SEEDS = 12
# In parts, so that they are spread over processors.
PARTS = 3
# Each of these seeds found a bug once: a deleted worker that came back renewed the lease of VMs that it had to end; a VM
# of an earlier worker could not be removed, or ended, at once; a restarted controller did not know what it had deleted.
ONCE_FOUND = (1053, 1133, 1144, 1149, 2098, 2189)

# Of two controllers: a worker did not report the end of a VM that had ended before the worker was restarted.
FLEET_ONCE_FOUND = (28,)

# Planted bug -> words of the violation.
VIOLATIONS = {
    "no-lease": "runs already on",
    "long-lease": "runs already on",
    "stopped-early": "more than its capacity",
    "over-offered": "more than its capacity",
    "forgetful-disk": "",
    "early-expiry": "is lost",
    "silent-time-out": "without a reason",
    "leaked-slots": "the metrics have",
}
# The rarest bug, stopped-early, shows in about one seed of six, so 60 seeds miss it once in 50,000 times. Which seeds show a
# bug changes with the product's timing; at the time of writing the first one shows each.
SEARCHED = range(206, 266)

# Two controllers on an etcd in memory, in fewer steps each: the tests of one controller go on for longer.
FLEET_SEEDS, FLEET_STEPS = 9, 20

# Prints the digest of a seed's trace.
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
from fault_schedule import simulate
print(simulate(int(sys.argv[3])))
"""


def run_fleet(seed: int, steps: int, bug: PlantedBug = NO_BUG) -> None:
    simulate(seed, bug=bug, steps=steps, is_fleet=True)


def assert_found(words: str, run: Callable[[int], object], seeds: Iterable[int]) -> None:
    """Run seeds until one shows a violation with these words."""
    others = []
    for seed in seeds:
        try:
            run(seed)
        except ViolationError as error:
            if words in str(error):
                return
            others.append(str(error))
    pytest.fail(f"not found; other violations were: {others}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_faults_break_no_guarantee(part: int) -> None:
    for seed in range(part, SEEDS, PARTS):
        simulate(seed)


@pytest.mark.slow
def test_seeds_that_once_found_a_bug_find_none() -> None:
    for seed in ONCE_FOUND:
        simulate(seed)


@pytest.mark.slow
def test_seeds_of_two_controllers_that_once_found_a_bug_find_none() -> None:
    for seed in FLEET_ONCE_FOUND:
        run_fleet(seed, steps=40)


@pytest.mark.slow
def test_isolated_workers_break_no_guarantee() -> None:
    for seed in range(5):
        simulate(seed, bug=NO_BUG_IN_ISOLATION)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_two_controllers_break_no_guarantee(part: int) -> None:
    """No VM runs twice, no acknowledged write is lost, and no answer is stale."""
    for seed in range(part, FLEET_SEEDS, PARTS):
        run_fleet(seed, steps=FLEET_STEPS)


@pytest.mark.slow
def test_writes_of_a_former_leader_are_found_without_the_comparison() -> None:
    """A sixth of the seeds show it, at the time of writing the first."""
    assert_found(
        "a former leader has written", partial(run_fleet, steps=40, bug=PLANTED_BUGS["no-comparison"]), range(4, 44)
    )


@pytest.mark.slow
@pytest.mark.parametrize("bug", VIOLATIONS)
def test_planted_bug_is_found(bug: str) -> None:
    assert_found(VIOLATIONS[bug], partial(simulate, bug=PLANTED_BUGS[bug]), SEARCHED)


@pytest.mark.slow
def test_a_seed_gives_the_same_trace_with_another_hash_seed() -> None:
    here = Path(__file__).parent
    # The seed of this process is random.
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM, here, here.parent, "7"],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == simulate(7)
