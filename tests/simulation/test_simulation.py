"""Random faults in a simulated cluster break no guarantee, and the simulation finds planted bugs.

`./run bench simulate` runs thousands of seeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

SEEDS = 24
# In parts, so that they are spread over processors.
PARTS = 4
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
SEARCHED = range(7, 67)

# Two controllers on an etcd in memory, in fewer steps each: the tests of one controller go on for longer.
FLEET_SEEDS, FLEET_STEPS = 50, 5

# A process of its own, because measuring coverage would triple the time. Prints a line for each seed, up to a violation.
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
from fault_schedule import STEPS, ViolationError, simulate
from simulated_cluster import NO_BUG, NO_BUG_IN_ISOLATION, PLANTED_BUGS
fleet_steps = int(sys.argv[4])
bug = {"": NO_BUG, "isolation": NO_BUG_IN_ISOLATION, **PLANTED_BUGS}[sys.argv[3]]
for seed in map(int, sys.argv[5:]):
    print("digest", simulate(seed, bug=bug, steps=fleet_steps or STEPS, is_fleet=bool(fleet_steps)), flush=True)
"""


def simulated(
    seeds: Iterable[int], bug: str = "", *, fleet_steps: int = 0, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run seeds in a process, up to the first violation. The violation is at the end of stderr, its trace in stdout.

    `fleet_steps` is the number of steps of each seed of two controllers; 0: there is one controller.
    """
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, here, here.parent, bug, str(fleet_steps), *map(str, seeds)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def digests(seeds: Iterable[int], schedule: str = "", *, fleet_steps: int = 0, **environ: str) -> list[str]:
    done = simulated(seeds, schedule, fleet_steps=fleet_steps, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_faults_break_no_guarantee(part: int) -> None:
    assert len(digests(range(part, SEEDS, PARTS))) == SEEDS / PARTS


@pytest.mark.slow
def test_seeds_that_once_found_a_bug_find_none() -> None:
    assert len(digests(ONCE_FOUND)) == len(ONCE_FOUND)


@pytest.mark.slow
def test_seeds_of_two_controllers_that_once_found_a_bug_find_none() -> None:
    assert len(digests(FLEET_ONCE_FOUND, fleet_steps=40)) == len(FLEET_ONCE_FOUND)


@pytest.mark.slow
def test_isolated_workers_break_no_guarantee() -> None:
    assert len(digests(range(5), "isolation")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_two_controllers_break_no_guarantee(part: int) -> None:
    """No VM runs twice, no acknowledged write is lost, and no answer is stale."""
    seeds = range(part, FLEET_SEEDS, PARTS)
    assert len(digests(seeds, fleet_steps=FLEET_STEPS)) == len(seeds)


@pytest.mark.slow
def test_writes_of_a_former_leader_are_found_without_the_comparison() -> None:
    """A sixth of the seeds show it, at the time of writing the first."""
    done = simulated(range(4, 44), "no-comparison", fleet_steps=40)
    assert "a former leader has written" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", VIOLATIONS)
def test_planted_bug_is_found(bug: str) -> None:
    others = []
    seeds = SEARCHED
    while seeds:
        done = simulated(seeds, bug)
        if done.returncode == 0:
            break
        violation = done.stderr.rstrip().rpartition("\n")[2]
        assert "ViolationError" in violation, done.stderr
        if VIOLATIONS[bug] in violation:
            return
        others.append(violation)
        seeds = seeds[done.stdout.count("digest ") + 1 :]
    pytest.fail(f"not found; other violations were: {others}")


@pytest.mark.slow
def test_a_seed_gives_the_same_trace_with_another_hash_seed() -> None:
    first, second = (digests([7], PYTHONHASHSEED=hash_seed) for hash_seed in ("1", "2"))
    assert first == second
