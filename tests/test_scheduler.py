"""The scheduler: safety on random clusters, against a reference that is slow and plain, and the words of its reasons.

Each important property is a function that says what is wrong with a plan. Beside the test that it finds nothing stands
one that it finds plans which were damaged on purpose.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness.planning import Snapshot, plan
from harness.strategies import (
    BEGAN,
    NAMES,
    NOW,
    OFFLINE,
    OFFLINE_TIMEOUT,
    ONLINE,
    QUICK,
    RESOURCES,
    THOROUGH,
    failed,
    pending,
    resting,
    running,
    shuffled,
    snapshots,
    spec,
    worker,
)
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import orchard
from orchard.scheduler import REASON_SECONDS, RESTART_PAUSE_SECONDS, Plan, Planner
from orchard.schema import TART_VMS, VM, Condition, VMReport, Worker
from orchard.transitions import assign, change, create, fail, report, restart, wait

LATER = BEGAN + datetime.timedelta(minutes=5)


def cluster(vms: list[VM], workers: list[Worker], **changed: object) -> Snapshot:
    """A picture in which every worker is online and nothing was restarted, unless it says otherwise."""
    seen = dict.fromkeys([w.name for w in workers], ONLINE)
    picture = Snapshot(vms, {w.name: w for w in workers}, seen, {}, "optimize-utilization", OFFLINE_TIMEOUT)
    return replace(picture, **changed)  # type: ignore[arg-type]


def carry_out(snapshot: Snapshot, decided: Plan, now: float) -> Snapshot:
    """Do what a plan says, as the controller does in one transaction."""
    vms = []
    restarted = dict(snapshot.restarted_at)
    for vm in snapshot.vms:
        new = vm
        if vm.name in decided.fail:
            new = fail(vm, decided.fail[vm.name])
        elif vm.name in decided.restart:
            new = restart(vm, LATER)
            restarted[vm.uid] = now
        elif vm.name in decided.assign:
            new = assign(vm, snapshot.workers[decided.assign[vm.name]], LATER)
        elif vm.name in decided.waiting:
            new = wait(vm, decided.waiting[vm.name])
        vms.append(new)
    return replace(snapshot, vms=vms, restarted_at=restarted)


def settled(snapshot: Snapshot, now: float) -> Snapshot:
    """Plan and carry out until nothing changes, and never give too much on the way."""
    for _ in range(4):  # fail, restart, place, and find that nothing is left to do
        decided = plan(snapshot, now)
        assert overcommits(snapshot, decided) == []
        after = carry_out(snapshot, decided, now)
        if after == snapshot:
            return after
        snapshot = after
    raise AssertionError("the plans have no end")


def used(snapshot: Snapshot) -> Counter[tuple[str, str]]:
    """What is used of each resource on each worker, counted anew from the VMs."""
    total: Counter[tuple[str, str]] = Counter()
    for vm in snapshot.vms:
        if vm.holds_resources:
            for resource, amount in vm.spec.resources.items():
                total[vm.state.worker, resource] += amount
    return total


# ---- the properties ------------------------------------------------------------------------------------------------


def overcommits(before: Snapshot, decided: Plan) -> list[str]:
    """Where a worker gets more than it offers, or still more of what it has too much of already."""
    now_used, then_used = used(before), used(carry_out(before, decided, NOW))
    return [
        f"{name} gives {amount} of {resource}"
        for (name, resource), amount in then_used.items()
        if amount
        > max(
            before.workers[name].resources.get(resource, 0) if name in before.workers else 0, now_used[name, resource]
        )
    ]


def misplaced(before: Snapshot, decided: Plan) -> list[str]:
    """Which VMs were put on a worker that is not as they ask for, or were not free to be put anywhere."""
    vms = {vm.name: vm for vm in before.vms}
    problems = []
    for name, chosen in decided.assign.items():
        vm, on = vms[name], before.workers[chosen]
        problems += [
            f"{name}: {what}"
            for what, wrong in {
                "is not pending": vm.state.status != "pending" or bool(vm.state.worker),
                "is on an offline worker": NOW - before.last_contact.get(chosen, -math.inf) >= OFFLINE_TIMEOUT,
                "is on a paused worker": on.scheduling_paused,
                "has another arch": vm.spec.arch != on.arch,
                "has another runtime": vm.spec.runtime != on.runtime,
                "misses a label": not vm.spec.labels.items() <= on.labels.items(),
            }.items()
            if wrong
        ]
    return problems


def forgotten(before: Snapshot, decided: Plan) -> list[str]:
    """Which VMs have no decision that should have one, or two, or one too many."""
    problems = []
    decisions = Counter([*decided.fail, *decided.restart, *decided.assign, *decided.waiting])
    for vm in before.vms:
        free = vm.state.status == "pending" and not vm.state.worker
        if free != (vm.name in decided.assign or vm.name in decided.waiting):
            problems.append(f"{vm.name} is {vm.state.status}")
        if decisions.pop(vm.name, 0) > 1:
            problems.append(f"{vm.name} is decided twice")
    return problems + [f"{name} is no VM" for name in decisions]


def why(vm: VM, on: Worker, online: bool, taken: Counter[tuple[str, str]]) -> tuple[str, int]:
    """The first thing that keeps a VM from a worker, and for a resource how much of it is free."""
    if not online:
        return "offline", 0
    if on.scheduling_paused:
        return "paused", 0
    if on.arch != vm.spec.arch:
        return f"of another arch ({vm.spec.arch} wanted)", 0
    if on.runtime != vm.spec.runtime:
        return f"of another runtime ({vm.spec.runtime} wanted)", 0
    for label, value in sorted(vm.spec.labels.items()):
        if on.labels.get(label) != value:
            return f"without label {label}={value}", 0
    for resource, wanted in sorted(vm.spec.resources.items()):
        free = max(0, on.resources.get(resource, 0) - taken[on.name, resource])
        if free < wanted:
            return f"{resource} ({wanted} wanted", free
    return "", 0


REASON = re.compile(r"(\d+) (?:lacks? (?P<short>\S+ \(\d+ wanted), (?P<free>\d+) free(?: at most)?\)|(?P<other>.+))")


def lies(before: Snapshot, decided: Plan) -> list[str]:
    """Which reasons are not true of the cluster as it is when the plan was carried out."""
    after = carry_out(before, decided, NOW)
    taken = used(after)
    problems = []
    for vm in after.vms:
        reason = decided.waiting.get(vm.name)
        if reason is None:
            continue
        if not before.workers:
            expected = "waiting: no worker has registered yet"
            problems += [reason] * (reason != expected)
            continue
        truth: Counter[str] = Counter()
        most_free: dict[str, int] = {}
        for name, on in before.workers.items():
            text, free = why(vm, on, NOW - before.last_contact.get(name, -math.inf) < OFFLINE_TIMEOUT, taken)
            truth[text] += 1
            most_free[text] = max(free, most_free.get(text, 0))
        _, head, parts = reason.split(": ", 2)
        said: Counter[str] = Counter()
        for part in re.split(r", (?=\d+ (?!free))", parts):
            match = REASON.fullmatch(part)
            if match is None:
                problems.append(f"{part!r} is no reason")
                continue
            text = match["short"] or match["other"]
            said[text] += int(match[1])
            if match["short"] and int(match["free"]) != most_free.get(text):
                problems.append(f"{part!r}: {most_free.get(text)} are free")
        total = len(before.workers)
        if said != truth or said.total() != total or head != f"{total} worker{'s' * (total > 1)}":
            problems.append(f"{reason!r} of {dict(truth)}")
    return problems


def expected_places(before: Snapshot) -> dict[str, str]:
    """The reference: oldest first, each on the best of all workers that could take it, counted anew each time."""
    fullest_first = before.profile == "optimize-utilization"
    for vm in sorted(before.vms, key=lambda vm: (vm.meta.created_at or BEGAN, vm.name)):
        if vm.state.status != "pending" or vm.state.worker:
            continue
        taken = used(before)
        # A VM whose worker is gone or silent fails in the same plan; no place depends on it.
        counts = Counter(other.state.worker for other in before.vms if other.holds_resources)
        fitting = [
            on
            for name, on in before.workers.items()
            if why(vm, on, NOW - before.last_contact.get(name, -math.inf) < OFFLINE_TIMEOUT, taken) == ("", 0)
        ]
        if fitting:
            sign = -1 if fullest_first else 1
            best = min(fitting, key=lambda on: (sign * counts[on.name], on.name))
            vms = [assign(other, best, LATER) if other is vm else other for other in before.vms]
            before = replace(before, vms=vms)
    return {vm.name: vm.state.worker for vm in before.vms if vm.state.scheduled_at == LATER}


def out_of_place(before: Snapshot, decided: Plan) -> list[str]:
    """Which VMs are not where the order and the profile say."""
    expected = expected_places(before)
    names = sorted(expected.keys() | decided.assign.keys())
    return [name for name in names if expected.get(name) != decided.assign.get(name)]


def jumped_the_queue(before: Snapshot, decided: Plan) -> list[str]:
    """Which VMs wait although a younger one that asks for the same got a place."""
    vms = {vm.name: vm for vm in before.vms}

    def demand(vm: VM) -> tuple[object, ...]:
        return vm.spec.arch, vm.spec.runtime, vm.spec.labels, vm.spec.resources

    def age(vm: VM) -> tuple[datetime.datetime, str]:
        return vm.meta.created_at or BEGAN, vm.name

    return [
        f"{waits} before {placed}"
        for waits in decided.waiting
        for placed in decided.assign
        if demand(vms[waits]) == demand(vms[placed]) and age(vms[waits]) < age(vms[placed])
    ]


Property = Callable[[Snapshot, Plan], list[str]]
PROPERTIES: list[Property] = [overcommits, misplaced, forgotten, lies, out_of_place, jumped_the_queue]


@THOROUGH
@given(snapshots())
def test_no_plan_is_wrong(snapshot: Snapshot) -> None:
    decided = plan(snapshot, NOW)
    assert {wrong.__name__: found for wrong in PROPERTIES if (found := wrong(snapshot, decided))} == {}


# ---- damage that the properties must see ---------------------------------------------------------------------------


def take_one_more(snapshot: Snapshot, decided: Plan) -> Plan:
    """One of those that wait gets the first worker."""
    name = min(decided.waiting)
    rest = {other: reason for other, reason in decided.waiting.items() if other != name}
    return replace(decided, assign={**decided.assign, name: min(snapshot.workers)}, waiting=rest)


def move_one(snapshot: Snapshot, decided: Plan) -> Plan:
    """One of those that got a worker gets another one."""
    name = min(decided.assign)
    other = min(other for other in snapshot.workers if other != decided.assign[name])
    return replace(decided, assign={**decided.assign, name: other})


def forget_one(snapshot: Snapshot, decided: Plan) -> Plan:
    """One of those that wait is not told why."""
    return replace(
        decided, waiting={name: why for name, why in decided.waiting.items() if name != min(decided.waiting)}
    )


def miscount(snapshot: Snapshot, decided: Plan) -> Plan:
    """A reason counts one worker twice."""
    name = min(decided.waiting)
    number = re.compile(r"(?<=: )\d+(?= (?!workers?:))")
    reason = number.sub(lambda match: str(int(match[0]) + 1), decided.waiting[name], count=1)
    if reason == decided.waiting[name]:
        raise ValueError("nothing to miscount")
    return replace(decided, waiting={**decided.waiting, name: reason})


def free_too_much(snapshot: Snapshot, decided: Plan) -> Plan:
    """A reason tells of more that is free than there is."""
    name = next(name for name, reason in decided.waiting.items() if " free" in reason)
    reason = re.sub(r"(\d+) free", lambda match: f"{int(match[1]) + 1} free", decided.waiting[name])
    return replace(decided, waiting={**decided.waiting, name: reason})


def swap(snapshot: Snapshot, decided: Plan) -> Plan:
    """One that waits and one that got a worker change their parts."""
    placed, waits = max(decided.assign), min(decided.waiting)
    assigned = {waits if name == placed else name: on for name, on in decided.assign.items()}
    waiting = {placed if name == waits else name: reason for name, reason in decided.waiting.items()}
    return replace(decided, assign=assigned, waiting=waiting)


def revive(snapshot: Snapshot, decided: Plan) -> Plan:
    """A failed VM is restarted and placed at once."""
    return replace(decided, assign={**decided.assign, min(decided.restart): min(snapshot.workers)})


DAMAGE: list[tuple[Property, Callable[[Snapshot, Plan], Plan]]] = [
    (overcommits, take_one_more),
    (overcommits, move_one),
    (misplaced, take_one_more),
    (misplaced, move_one),
    (misplaced, revive),
    (forgotten, forget_one),
    (forgotten, revive),
    (lies, miscount),
    (lies, free_too_much),
    (lies, swap),
    (out_of_place, move_one),
    (out_of_place, swap),
    (jumped_the_queue, swap),
]


@pytest.mark.parametrize(
    ("wrong", "damage"), DAMAGE, ids=[f"{wrong.__name__}, {how.__name__}" for wrong, how in DAMAGE]
)
def test_a_damaged_plan_is_seen(wrong: Property, damage: Callable[[Snapshot, Plan], Plan]) -> None:
    def caught(snapshot: Snapshot) -> bool:
        decided = plan(snapshot, NOW)
        try:
            damaged = damage(snapshot, decided)
        except (ValueError, StopIteration):
            return False  # there is nothing in it to damage
        return bool(wrong(snapshot, damaged))

    find(snapshots(), caught, settings=settings(QUICK, max_examples=1_000, phases=[Phase.generate]))


# ---- plans one after another ---------------------------------------------------------------------------------------


@THOROUGH
@given(snapshots())
def test_plans_come_to_an_end_and_the_next_one_is_empty(snapshot: Snapshot) -> None:
    after = settled(snapshot, NOW)
    last = plan(after, NOW)
    assert (last.fail, last.restart, last.assign) == ({}, [], {})
    assert carry_out(after, last, NOW) == after
    assert plan(after, NOW) == last


def test_two_plans_of_one_picture_would_give_too_much() -> None:
    """Why a plan is applied to no other picture than its own: the property sees it."""
    one = cluster([pending("a")], [worker(vms=1)])
    two = cluster([running(pending("a")), pending("b")], [worker(vms=1)])
    stale = plan(replace(one, vms=[pending("b")]), NOW)
    assert overcommits(one, plan(one, NOW)) == []
    assert overcommits(two, stale) == [f"w gives 2 of {TART_VMS}"]


@QUICK
@given(snapshots())
def test_time_alone_changes_nothing_before_next_at_and_something_then(snapshot: Snapshot) -> None:
    after = settled(snapshot, NOW)
    due = plan(after, NOW).next_at
    if due is None:
        for later in (NOW + 1, NOW + 200, NOW + 1e6):
            assert carry_out(after, plan(after, later), later) == after
        return
    assert due > NOW
    just_before = math.nextafter(due, 0)
    assert carry_out(after, plan(after, just_before), just_before) == after
    assert plan(after, just_before).next_at == due
    assert carry_out(after, plan(after, due), due) != after


# ---- a planner that is kept -------------------------------------------------------------------------------------------


class Kept:
    """A planner that is told of each change, and the picture that it should be."""

    def __init__(self) -> None:
        self.now = NOW
        self.vms: dict[str, VM] = {}
        self.workers: dict[str, Worker] = {}
        self.about = replace(cluster([], []), last_contact={}, restarted_at={}, last_contact_of_deleted={})
        self.planner = Planner(self.about.inputs())

    def become(self, picture: Snapshot, keeps: Callable[[], bool] = lambda: False) -> None:
        """Turn into another cluster but for what it `keeps`, one change after the other.

        What was seen of a worker, and when a VM was restarted, only gets later.
        """
        seen, restarted = self.about.last_contact, self.about.restarted_at
        assert isinstance(seen, dict)
        assert isinstance(restarted, dict)
        for uid, at in picture.restarted_at.items():
            restarted[uid] = max(at, restarted.get(uid, at))
        for name in sorted(self.workers.keys() - picture.workers.keys()):
            if keeps():
                continue
            del self.workers[name]
            seen.pop(name, None)
            self.planner.drop_worker(name)
        for name, new in picture.workers.items():
            if name not in self.workers or not keeps():
                self.workers[name] = new
                self.planner.put_worker(new)
            at = picture.last_contact.get(name, -math.inf) + self.now - NOW
            if at > seen.get(name, -math.inf):
                seen[name] = at
                self.planner.worker_returned(name)
        for name in sorted(self.vms.keys() - {vm.name for vm in picture.vms}):
            if not keeps():
                del self.vms[name]
                self.planner.drop_vm(name)
        for vm in picture.vms:
            if vm.name not in self.vms or not keeps():
                self.vms[vm.name] = vm
                self.planner.put_vm(vm)
        self.about = replace(self.about, profile=picture.profile)

    def picture(self) -> Snapshot:
        return replace(self.about, vms=list(self.vms.values()), workers=dict(self.workers))

    def untell(self) -> None:
        """Forget what plans have told that nobody carried out, as putting a VM anew does."""
        for vm in self.vms.values():
            self.planner.put_vm(vm)

    def settle(self, most: int = sys.maxsize) -> None:
        """Plan and carry out until there is nothing more to do, for so many VMs at a time."""
        for _ in range(4 + 4 * len(self.vms)):
            before = self.picture()
            decided = self.planner.plan(self.now, before.profile, most)
            told = [*decided.fail, *decided.restart, *decided.assign, *decided.waiting]
            assert len(told) == most - decided.capacity
            assert overcommits(before, decided) == []
            after = carry_out(before, decided, self.now)
            if after == before and decided.capacity:
                return
            restarted = self.about.restarted_at
            assert isinstance(restarted, dict)
            restarted.update(after.restarted_at)
            for old, new in zip(before.vms, after.vms, strict=True):
                if new is not old:
                    self.vms[new.name] = new
                    self.planner.put_vm(new)
        raise AssertionError("the plans have no end")


@QUICK
@given(st.lists(snapshots(), min_size=1, max_size=6), st.integers(0, 2**32))
def test_a_book_that_was_kept_says_what_one_written_anew_does(pictures: list[Snapshot], seed: int) -> None:
    kept, order = Kept(), random.Random(seed)
    for picture in pictures:
        kept.now += order.choice([REASON_SECONDS, 20, 200])
        kept.become(picture, lambda: order.random() < 0.7)
        twice = [kept.planner.plan(kept.now, picture.profile) for _ in range(2)]
        assert replace(twice[0], waiting={}, next_at=None) == replace(twice[1], waiting={}, next_at=None)
        kept.untell()
        expected = settled(kept.picture(), kept.now)
        kept.settle()
        kept.now += REASON_SECONDS  # reasons may have come too fast for it
        expected = settled(expected, kept.now)
        kept.settle()
        assert {vm.name: vm for vm in kept.picture().vms} == {vm.name: vm for vm in expected.vms}


@QUICK
@given(st.lists(snapshots(), min_size=1, max_size=6), st.integers(0, 2**32), st.integers(1, 4))
def test_plans_for_a_few_vms_at_a_time_end_where_nothing_is_left_to_do(
    pictures: list[Snapshot], seed: int, most: int
) -> None:
    kept, order = Kept(), random.Random(seed)
    for picture in pictures:
        kept.now += order.choice([REASON_SECONDS, 20, 200])
        kept.become(picture, lambda: order.random() < 0.7)
        kept.settle(most)
        kept.now += REASON_SECONDS
        kept.settle(most)
        assert settled(kept.picture(), kept.now) == kept.picture()


def test_reasons_are_told_at_once_and_then_at_most_every_second() -> None:
    kept = Kept()
    kept.become(cluster([pending("a")], [worker(vms=0)]))
    assert kept.planner.plan(NOW, "optimize-utilization").waiting.keys() == {"a"}
    kept.planner.put_vm(pending("b"))
    kept.planner.put_worker(worker("x", vms=0))
    kept.planner.worker_returned("x")
    decided = kept.planner.plan(NOW, "optimize-utilization")
    assert decided.waiting == {"b": f"waiting: 1 worker: 1 lacks {TART_VMS} (1 wanted, 0 free)"}
    assert decided.next_at == NOW + REASON_SECONDS
    later = kept.planner.plan(NOW + REASON_SECONDS, "optimize-utilization")
    assert later.waiting.keys() == {"a", "b"}
    assert later.waiting["a"].startswith("waiting: 2 workers: ")


@QUICK
@given(st.lists(snapshots(), min_size=1, max_size=6), st.integers(0, 2**32))
def test_what_a_new_vm_is_told_at_once_is_what_a_plan_would_tell_it(pictures: list[Snapshot], seed: int) -> None:
    kept, order = Kept(), random.Random(seed)
    for picture in pictures:
        kept.now += order.choice([REASON_SECONDS, 20, 200])
        kept.become(picture, lambda: order.random() < 0.7)
        if order.random() < 0.7:
            kept.settle()
        for old in kept.picture().vms:
            if reason := kept.planner.waiting_reason(old.spec):
                new = create("new", "uid-new", old.spec, BEGAN, reason)
                kept.vms["new"] = new
                kept.planner.put_vm(new)
                kept.settle()
                assert kept.vms.pop("new").state.status_message == reason
                kept.planner.drop_vm("new")


def test_a_new_vm_is_told_at_once_what_others_wait_for() -> None:
    kept = Kept()
    kept.become(cluster([pending("a")], [worker(vms=0)]))
    assert kept.planner.waiting_reason(spec()) == ""
    kept.settle()
    assert kept.planner.waiting_reason(spec()) == f"waiting: 1 worker: 1 lacks {TART_VMS} (1 wanted, 0 free)"
    assert kept.planner.waiting_reason(spec(labels={"x": "y"})) == "", "nobody like it waits"
    kept.planner.worker_returned("w")
    assert kept.planner.waiting_reason(spec()) == "", "it may be there again"
    kept.settle()
    kept.planner.put_worker(worker())
    assert kept.planner.waiting_reason(spec()) == ""


# ---- determinism ---------------------------------------------------------------------------------------------------


@QUICK
@given(snapshots(), st.integers(0, 99))
def test_the_order_of_telling_changes_nothing(snapshot: Snapshot, seed: int) -> None:
    assert plan(shuffled(snapshot, seed), NOW) == plan(snapshot, NOW)


def decisions() -> str:
    """What is decided on some clusters, in the order in which it would be carried out."""
    order = random.Random(1)
    told = []
    for _ in range(20):
        workers = [
            worker(f"w{number}", vms=order.randrange(4), labels={"zone": order.choice("ab")}, arch=order.choice(ARCHS))
            for number in range(6)
        ]
        vms = [
            pending(
                f"vm{number}", age=order.randrange(3), labels={"zone": order.choice("ab")}, arch=order.choice(ARCHS)
            )
            for number in range(20)
        ]
        vms += [failed(pending(f"failed{number}", restart_policy="OnFailure")) for number in range(3)]
        vms += [running(pending(f"lost{number}"), on=f"gone{number}") for number in range(3)]
        decided = plan(cluster(vms, workers), NOW)
        told.append(
            [list(decided.fail.items()), decided.restart, list(decided.assign.items()), [*decided.waiting.items()]]
        )
    return json.dumps(told)


ARCHS = ["arm64", "arm64", "amd64"]


def test_the_seed_of_hashes_changes_nothing() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(orchard.__file__).parent.parent)])
    script = "import test_scheduler; print(test_scheduler.decisions(), hash('orchard'))"
    told = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.rsplit(" ", 1)
        for seed in ("1", "2")
    ]
    assert told[0][1] != told[1][1]
    assert told[0][0] == told[1][0] == decisions()


# ---- the life of a cluster -----------------------------------------------------------------------------------------


class Cluster(RuleBasedStateMachine):
    """A controller in small: whatever happens, the plans are carried out at once, as it does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.vms: dict[str, VM] = {}
        self.picture = cluster([], [])
        self.restarts: dict[str, list[float]] = {}

    def happen(self, **changed: object) -> None:
        """Let something happen, and schedule until nothing is left to do."""
        before = used(self.picture)
        self.picture = replace(self.picture, vms=list(self.vms.values()), **changed)  # type: ignore[arg-type]
        assert used(self.picture) <= before  # plans alone take
        for _ in range(4):
            already = used(self.picture)
            decided = plan(self.picture, self.now)
            for name in decided.restart:
                self.restarts.setdefault(name, []).append(self.now)
            self.picture = carry_out(self.picture, decided, self.now)
            for name, on in self.picture.workers.items():
                for resource in RESOURCES:
                    offered = on.resources.get(resource, 0)
                    assert used(self.picture)[name, resource] <= max(offered, already[name, resource])
        assert carry_out(self.picture, plan(self.picture, self.now), self.now) == self.picture
        self.vms = {vm.name: vm for vm in self.picture.vms}

    def pick(self, number: int) -> VM | None:
        names = sorted(self.vms)
        return self.vms[names[number % len(names)]] if names else None

    def put(self, vm: VM) -> None:
        self.vms[vm.name] = vm
        self.happen()

    @rule(
        number=st.integers(0, 9),
        wanted=st.dictionaries(st.sampled_from(RESOURCES), st.integers(0, 2)),
        policy=st.sampled_from(["Never", "OnFailure"]),
        power=st.sampled_from(["running", "running", "running", "stopped"]),
    )
    def create_vm(self, number: int, wanted: dict[str, int], policy: str, power: str) -> None:
        name = f"vm{number}"
        if name not in self.vms:
            self.put(pending(name, resources=wanted, restart_policy=policy, power_state=power))

    @rule(number=st.integers(0, 9))
    def delete_vm(self, number: int) -> None:
        vm = self.pick(number)
        if vm is not None:
            del self.vms[vm.name]
            self.happen()

    @rule(name=st.sampled_from(NAMES), offered=st.dictionaries(st.sampled_from(RESOURCES), st.integers(0, 3)))
    def register_worker(self, name: str, offered: dict[str, int]) -> None:
        workers = {**self.picture.workers, name: Worker(name=name, resources=offered)}
        self.happen(workers=workers, last_contact={**self.picture.last_contact, name: self.now})

    @rule(name=st.sampled_from(NAMES), paused=st.booleans())
    def pause_worker(self, name: str, paused: bool) -> None:
        if name in self.picture.workers:
            on = replace(self.picture.workers[name], scheduling_paused=paused)
            self.happen(workers={**self.picture.workers, name: on})

    @rule(name=st.sampled_from(NAMES))
    def delete_worker(self, name: str) -> None:
        self.happen(workers={other: on for other, on in self.picture.workers.items() if other != name})

    @rule(name=st.sampled_from(NAMES))
    def hear_worker(self, name: str) -> None:
        self.happen(last_contact={**self.picture.last_contact, name: self.now})

    @rule(seconds=st.sampled_from([1.0, 5.0, 14.0, 15.0, 100.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        self.happen()

    @rule(
        number=st.integers(0, 9),
        status=st.sampled_from([None, "pending", "running", "running", "failed"]),
        runs=st.sampled_from([None, "true", "false"]),
    )
    def report_vm(self, number: int, status: str | None, runs: str | None) -> None:
        vm = self.pick(number)
        if vm is not None and vm.state.worker:
            conditions = None if runs is None else (Condition("running", runs),)  # type: ignore[arg-type]
            self.put(report(vm, VMReport(status=status, conditions=conditions), LATER))  # type: ignore[arg-type]

    @rule(number=st.integers(0, 9))
    def stop_vm(self, number: int) -> None:
        vm = self.pick(number)
        if vm is not None and vm.state.status != "failed":
            self.put(change(vm, replace(vm.spec, power_state="stopped")))

    @invariant()
    def no_vm_restarts_twice_in_15_seconds(self) -> None:
        for times in self.restarts.values():
            assert all(later - earlier >= RESTART_PAUSE_SECONDS for earlier, later in itertools.pairwise(times))

    @invariant()
    def every_pending_vm_is_told_why(self) -> None:
        for vm in self.vms.values():
            if vm.state.status == "pending" and not vm.state.worker:
                assert vm.state.status_message.startswith("waiting: ")


def test_a_cluster_lives_without_giving_too_much() -> None:
    run_state_machine_as_test(Cluster, settings=settings(QUICK, max_examples=40, stateful_step_count=30))


# ---- where to ------------------------------------------------------------------------------------------------------


def full_and_empty(**changed: object) -> Snapshot:
    """Workers with 0 to 2 VMs out of 3, two of each, and one that is full."""
    vms = [
        running(pending(f"{name}-{number}"), on=name)
        for name, count in {"a1": 1, "b1": 1, "a2": 2, "b2": 2, "full": 3}.items()
        for number in range(count)
    ]
    workers = [worker(name, vms=3) for name in ("full", "b2", "a2", "b1", "a1", "b0", "a0")]
    return cluster([*vms, *(pending(f"new{number}") for number in range(9))], workers, **changed)


def test_optimize_utilization_fills_one_worker_after_another() -> None:
    decided = plan(full_and_empty(profile="optimize-utilization"), NOW)
    assert list(decided.assign.values()) == ["a2", "b2", "a1", "a1", "b1", "b1", "a0", "a0", "a0"]
    assert list(decided.assign) == [f"new{number}" for number in range(9)]


def test_distribute_load_evens_out() -> None:
    decided = plan(full_and_empty(profile="distribute-load"), NOW)
    assert list(decided.assign.values()) == ["a0", "b0", "a0", "a1", "b0", "b1", "a0", "a1", "a2"]


def test_a_resting_vm_and_a_failed_one_are_no_load() -> None:
    vms = [resting(pending("r"), on="a"), failed(pending("f"), on="a"), running(pending("x"), on="b"), pending("new")]
    workers = [worker("a"), worker("b")]
    assert plan(cluster(vms, workers, profile="distribute-load"), NOW).assign == {"new": "a"}
    assert plan(cluster(vms, workers, profile="optimize-utilization"), NOW).assign == {"new": "b"}
    assert plan(cluster(vms, [worker("a", vms=1)], last_contact={"a": ONLINE}), NOW).assign == {"new": "a"}


def test_the_oldest_goes_first_whatever_its_name() -> None:
    vms = [pending("a", age=1), pending("b", age=3), pending("c", age=2), pending("d", age=3)]
    assert list(plan(cluster(vms, [worker(vms=3)]), NOW).assign) == ["b", "d", "c"]


def test_the_age_is_the_time_and_not_its_spelling() -> None:
    east = datetime.timezone(datetime.timedelta(hours=5))
    old = pending("old")
    old = replace(old, meta=replace(old.meta, created_at=(BEGAN - datetime.timedelta(seconds=1)).astimezone(east)))
    assert plan(cluster([pending("new"), old], [worker(vms=1)]), NOW).assign == {"old": "w"}


def test_a_big_vm_does_not_hold_up_small_ones_and_gets_a_worker_that_empties() -> None:
    big = pending("big", age=60, resources={TART_VMS: 2})
    busy = cluster([running(pending("first")), big, pending("small")], [worker()])
    decided = plan(busy, NOW)
    assert decided.assign == {"small": "w"}
    assert decided.waiting == {"big": f"waiting: 1 worker: 1 lacks {TART_VMS} (2 wanted, 0 free)"}
    assert plan(cluster([big, pending("small")], [worker()]), NOW).assign == {"big": "w"}


def test_a_worker_that_shrank_gets_nothing_more_of_what_it_has_too_much_of() -> None:
    vms = [running(pending(f"vm{number}")) for number in range(3)]
    vms += [pending("new"), pending("other", resources={"gpu": 1}), pending("nothing", resources={TART_VMS: 0})]
    decided = plan(cluster(vms, [worker(resources={TART_VMS: 1, "gpu": 1})]), NOW)
    assert decided.assign == {"nothing": "w", "other": "w"}
    assert decided.waiting == {"new": f"waiting: 1 worker: 1 lacks {TART_VMS} (1 wanted, 0 free)"}
    assert decided.fail == {}


# ---- why not -------------------------------------------------------------------------------------------------------


def test_the_reason_counts_every_worker_once() -> None:
    workers = [worker("c", vms=0), worker("b", scheduling_paused=True, vms=0), worker("a", scheduling_paused=True)]
    picture = cluster([pending()], workers, last_contact={"a": OFFLINE, "b": ONLINE, "c": ONLINE})
    reason = "waiting: 3 workers: 1 offline, 1 paused, 1 lacks org.cirruslabs.tart-vms (1 wanted, 0 free)"
    assert plan(picture, NOW).waiting == {"vm": reason}


@pytest.mark.parametrize(
    ("workers", "wanted", "reason"),
    [
        ([], {}, "no worker has registered yet"),
        ([worker(scheduling_paused=True)], {}, "1 worker: 1 paused"),
        ([worker(arch="amd64"), worker("x", runtime="vetu")], {}, "2 workers: 1 of another arch (arm64 wanted), 1 of another runtime (tart wanted)"),
        ([worker(), worker("x", labels={"a": "c"})], {"labels": {"a": "b", "z": ""}}, "2 workers: 2 without label a=b"),
        ([worker(labels={"a": "b"})], {"labels": {"a": "b", "z": ""}}, "1 worker: 1 without label z="),
        ([worker(vms=1), worker("x", vms=2), worker("y", vms=0)], {"resources": {TART_VMS: 3}}, f"3 workers: 3 lack {TART_VMS} (3 wanted, 2 free at most)"),
        ([worker()], {"resources": {"gpu": 1, TART_VMS: 5}}, "1 worker: 1 lacks gpu (1 wanted, 0 free)"),
        ([worker(), worker("x", resources={"gpu": 1})], {"resources": {"gpu": 1, TART_VMS: 1}}, f"2 workers: 1 lacks gpu (1 wanted, 0 free), 1 lacks {TART_VMS} (1 wanted, 0 free)"),
    ],
)  # fmt: skip
def test_the_words_of_a_reason(workers: list[Worker], wanted: dict[str, Any], reason: str) -> None:
    assert plan(cluster([pending(**wanted)], workers), NOW).waiting == {"vm": f"waiting: {reason}"}


# ---- fail and restart ----------------------------------------------------------------------------------------------


def test_the_vms_of_a_worker_that_is_gone_or_silent_fail_with_a_reason() -> None:
    vms = [
        running(pending("a"), on="gone"),
        resting(pending("b"), on="silent"),
        assign(pending("c"), worker("new"), LATER),
    ]
    picture = cluster(vms, [worker("silent"), worker("new")], last_contact={"silent": NOW - OFFLINE_TIMEOUT})
    assert plan(picture, NOW).fail == {
        "a": 'worker "gone" was deleted',
        "b": 'worker "silent" is offline: no contact for 180 seconds',
        "c": 'worker "new" is offline: no contact for 180 seconds',
    }
    assert plan(replace(picture, last_contact={"silent": ONLINE, "new": ONLINE}), NOW).fail == {
        "a": 'worker "gone" was deleted'
    }


def test_a_vm_restarts_at_most_once_in_15_seconds() -> None:
    picture = cluster([failed(pending(restart_policy="OnFailure"))], [worker()], offline_timeout=1e6)
    restarts = []
    for tenth in range(1_000):  # a hundred seconds, in which it breaks as soon as it is placed
        now = NOW + tenth / 10
        decided = plan(picture, now)
        restarts += [now - NOW] * len(decided.restart)
        picture = carry_out(picture, decided, now)
        if decided.assign:
            picture = replace(picture, vms=[fail(vm, "broke at once") for vm in picture.vms])
    assert restarts == [0, 15, 30, 45, 60, 75, 90]


@pytest.mark.parametrize(
    ("policy", "vm", "restarts"),
    [
        ("OnFailure", failed, True),
        ("Never", failed, False),
        ("OnFailure", running, False),
        ("OnFailure", lambda vm: fail(resting(vm), "gone"), False),
        ("OnFailure", lambda vm: fail(vm, "never had a worker"), True),
    ],
)
def test_who_restarts(policy: str, vm: Callable[[VM], VM], restarts: bool) -> None:
    decided = plan(cluster([vm(pending(restart_policy=policy))], [worker()]), NOW)
    assert decided.restart == (["vm"] if restarts else [])


def test_what_had_failed_when_the_controller_started_may_still_run_as_long_as_a_lease_lasts() -> None:
    picture = cluster(
        [failed(pending(restart_policy="OnFailure"))],
        [worker()],
        started_at=NOW - 10,
        failed_before_start=frozenset({"uid-vm"}),
    )
    assert plan(picture, NOW).restart == []
    assert plan(picture, NOW).next_at == NOW - 10 + OFFLINE_TIMEOUT
    later = replace(picture, last_contact={"w": NOW + 200})
    assert plan(later, NOW - 10 + OFFLINE_TIMEOUT).restart == ["vm"]
    assert plan(replace(picture, failed_before_start=frozenset()), NOW).restart == ["vm"]


def test_a_restarted_vm_leaves_its_worker_in_the_next_plan() -> None:
    lost = cluster([running(pending(restart_policy="OnFailure"), on="gone")], [worker()])
    after = settled(lost, NOW)
    [vm] = after.vms
    assert (vm.state.status, vm.state.worker, vm.state.restart_count) == ("pending", "w", 1)


# ---- when again ----------------------------------------------------------------------------------------------------


def test_next_at_is_none_when_time_alone_changes_nothing() -> None:
    assert plan(cluster([], []), NOW).next_at is None
    assert plan(cluster([], [worker()]), NOW).next_at is None
    assert plan(cluster([failed(pending())], [worker()]), NOW).next_at is None


def test_next_at_is_the_first_of_what_comes() -> None:
    restless = failed(pending("r", restart_policy="OnFailure"))
    picture = cluster([restless, running(pending("x"))], [worker()], restarted_at={"uid-r": NOW - 4})
    assert plan(picture, NOW).next_at == NOW + 11
    assert plan(replace(picture, last_contact={"w": NOW - 175}), NOW).next_at == NOW + 5


def test_who_waits_is_told_when_a_worker_falls_silent() -> None:
    picture = cluster([pending()], [worker("full", vms=0)])
    assert plan(picture, NOW).next_at == ONLINE + OFFLINE_TIMEOUT
    assert plan(picture, ONLINE + OFFLINE_TIMEOUT).waiting == {"vm": "waiting: 1 worker: 1 offline"}
    assert plan(picture, ONLINE + OFFLINE_TIMEOUT).next_at is None
