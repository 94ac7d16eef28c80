"""Hypothesis strategies and builders for resources. Every object that they make is valid by the rules.

`resources(cls)` draws any instance of a dataclass with `attr` fields, zero values and bounds included. It is for
properties of every object that can be written as JSON. `snapshots` draws clusters in states that can occur. It is for
the scheduler.

The clusters are small and have few different values, because errors show only where several VMs share a worker.
"""

from __future__ import annotations

import datetime
import json
import random
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from harness.planning import Snapshot, report_facts
from orchard.codec import MAX_UINT, Attr, attrs_of
from orchard.decisions.worker_facts import WorkerFacts
from orchard.resources.bodies import VMReport
from orchard.schema import (
    TART_VMS,
    VM,
    WORKER_NAME_LABEL,
    Condition,
    GuestScript,
    SchedulerProfile,
    VMMeta,
    VMSpec,
    VMState,
    Worker,
)
from orchard.store import encode_object
from orchard.transitions import assign, create, fail, report

T = TypeVar("T")

# Without a deadline, because the machine may be busy. Derandomized, so that a failure can be repeated.
QUICK = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
THOROUGH = settings(QUICK, max_examples=1_500)

UTC = datetime.UTC
# The time in all tests.
BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=UTC)
# The monotonic clock of a snapshot.
NOW = 1_000_000.0  # seconds
# The controller's default.
OFFLINE_TIMEOUT = 180.0  # seconds
# Times of the last contact with a worker.
ONLINE, OFFLINE = NOW - 5, NOW - 500


# ---- any resource ------------------------------------------------------------------------------------------------------


def texts() -> st.SearchStrategy[str]:
    """Draw strings that can be encoded in UTF-8."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def times() -> st.SearchStrategy[datetime.datetime]:
    """Draw times in UTC, without the first instant of year 1, which means no time."""
    return st.datetimes(timezones=st.just(UTC)).filter(lambda when: when != datetime.datetime.min.replace(tzinfo=UTC))


def resources(cls: type[T], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[T]:
    """Draw instances of a resource; `given` has strategies for some of its fields, by their Python name."""
    return st.builds(cls, **{field.name: given.get(field.name, _value(field.type, field)) for field in attrs_of(cls)})


def _value(kind: Any, field: Attr) -> st.SearchStrategy[Any]:
    if kind is str:
        return texts()
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, min(9, field.maximum)) | st.sampled_from([field.maximum, field.maximum - 1])
    if kind is datetime.datetime:
        return times()
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        return st.lists(_value(inner[0], field), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(texts(), _value(inner[1], field), max_size=3)
    if origin in (types.UnionType, typing.Union):
        return st.none() | _value(inner[0], field)
    return resources(kind)


def any_vm() -> st.SearchStrategy[VM]:
    """Draw VMs that can be written as JSON, whether or not they can occur."""
    return st.builds(VM, resources(VMMeta), resources(VMSpec), resources(VMState))


# ---- JSON ----------------------------------------------------------------------------------------------------------


def vm_json(vm: VM) -> dict[str, Any]:
    """Return a VM's JSON as the API shows it and as it is stored."""
    shown: dict[str, Any] = json.loads(encode_object(vm))
    return shown


def json_values() -> st.SearchStrategy[Any]:
    """Draw JSON values that every parser reads alike."""
    leaves = st.none() | st.booleans() | texts() | st.integers(-MAX_UINT, MAX_UINT) | st.floats(-1e9, 1e9)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(), inner, max_size=4),
        max_leaves=12,
    )


# ---- one VM --------------------------------------------------------------------------------------------------------


def spec(**changed: Any) -> VMSpec:
    """Return a new VM's specification, with some fields changed."""
    return replace(VMSpec(image="base", resources={TART_VMS: 1}), **changed)


def born(age: float) -> datetime.datetime:
    """Return the creation time of a VM that is `age` seconds older than the others."""
    return BEGAN - datetime.timedelta(seconds=age)


def pending(name: str = "vm", age: float = 0, **changed: Any) -> VM:
    """Return a VM that was just created, `age` seconds before the others."""
    return create(name, f"uid-{name}", spec(**changed), born(age))


def worker(name: str = "w", vms: int = 2, **changed: Any) -> Worker:
    """Return a worker that can run `vms` VMs."""
    return replace(Worker(name=name, resources={TART_VMS: vms}, machine_id=f"machine-{name}"), **changed)


def assigned(vm: VM, to: str = "w") -> VM:
    return assign(vm, worker(to), BEGAN)


def running(vm: VM, on: str = "w") -> VM:
    """Return the VM on a worker that has reported it as running."""
    seen = VMReport(
        status="running", observed_generation=vm.meta.generation, conditions=(Condition("running", "true"),)
    )
    return report(assigned(vm, on), seen, BEGAN)


def resting(vm: VM, on: str = "w", power_state: Literal["stopped", "suspended"] = "stopped") -> VM:
    """Return the VM stopped or suspended, as its worker has reported."""
    wanted = replace(vm, spec=replace(vm.spec, power_state=power_state, suspendable=power_state == "suspended"))
    return report(running(wanted, on), VMReport(conditions=(Condition("running", "false"),)), BEGAN)


def failed(vm: VM, on: str = "w") -> VM:
    return fail(running(vm, on), "the VM broke")


# ---- clusters ------------------------------------------------------------------------------------------------------

NAMES = [f"w{number}" for number in range(5)]
RESOURCES = [TART_VMS, "gpu"]
IMAGES = ["base", "xcode", "rare"]
# VMs and workers of random shape in the pools. Choosing one of them is cheaper than making one.
SHAPES = 400


def _labels(order: random.Random) -> dict[str, str]:
    return {key: order.choice("ab") for key in order.sample(["zone", "model"], order.choice([0, 0, 0, 0, 1, 2]))}


def _resources(order: random.Random, most: int, counts: list[int]) -> dict[str, int]:
    return {name: order.randint(0, most) for name in order.sample(RESOURCES, order.choice(counts))}


def _wishes(order: random.Random) -> dict[str, Any]:
    """Return what decides on the place of a VM in the queue, and which of the workers that fit it prefers."""
    script = order.choice([None] * 5 + [GuestScript("sync")])
    return {
        "priority": order.choice([0, 0, 0, 1, 5]),
        "preferred_labels": order.choice([{}, {}, _labels(order), {WORKER_NAME_LABEL: order.choice(NAMES)}]),
        "image": order.choice(IMAGES),
        "shutdown_script": script,
    }


def _hosts(order: random.Random) -> dict[str, Any]:
    return {
        "arch": order.choice(["arm64"] * 7 + ["amd64"]),
        "runtime": order.choice(["tart"] * 7 + ["vetu"]),
        "labels": order.choice([_labels(order)] * 9 + [{WORKER_NAME_LABEL: order.choice(NAMES)}]),
    }


def _worker_shape(order: random.Random) -> Worker:
    return Worker(
        resources=_resources(order, 4, [0, 1, 2, 2]),
        scheduling_paused=order.random() < 0.15,
        capabilities=order.choice([(), ("shutdown-script",)]),
        **_hosts(order),
    )


def _vm_shape(order: random.Random) -> VM:
    """Return a VM in any state that can occur: on one of the workers NAMES, on a deleted one, or on none."""
    policy = order.choice(["Never", "OnFailure"])
    resources = _resources(order, 3, [0, 1, 1, 2])
    vm = pending(resources=resources, restart_policy=policy, **_hosts(order), **_wishes(order))
    history = order.choice([None] * 5 + [assigned, running, resting, failed])
    return history(vm, order.choice([*NAMES, "deleted"])) if history else vm


_ORDER = random.Random(0)
_WORKER_SHAPES = [_worker_shape(_ORDER) for _ in range(SHAPES)]
_VM_SHAPES = [_vm_shape(_ORDER) for _ in range(SHAPES)]
_SEEN = [NOW, ONLINE, ONLINE, ONLINE, NOW - 179.5, NOW - OFFLINE_TIMEOUT, OFFLINE, None]
_RESTARTED = [None, None, NOW, NOW - 1, NOW - 14.5, NOW - 15, NOW - 60]
_PROFILES: list[SchedulerProfile] = ["optimize-utilization", "distribute-load"]


def shape_of(number: int) -> VM:
    """Return one of the VMs of random shape."""
    return _VM_SHAPES[number]


def cluster_of(workers: int, vms: int, seed: int) -> Snapshot:
    """Return a cluster at NOW: workers that may have shrunk below what is used on them, and VMs in every state.

    In most clusters many VMs are alike, so that some are assigned while others of their kind wait.
    """
    order = random.Random(f"{workers} {vms} {seed}")
    names = order.sample(NAMES, workers)
    seen = {name: at for name in names if (at := order.choice(_SEEN)) is not None}
    kinds = order.sample(_VM_SHAPES, order.choice([1, 2, 3, SHAPES]))
    made = []
    restarted = {}
    for number in range(vms):
        shape = order.choice(kinds)
        meta = replace(shape.meta, name=f"vm{number}", uid=f"uid{number}", created_at=born(order.randrange(4)))
        made.append(replace(shape, meta=meta))
        if (at := order.choice(_RESTARTED)) is not None:
            restarted[f"uid{number}"] = at
    pool = {name: replace(order.choice(_WORKER_SHAPES), name=name) for name in names}
    facts = WorkerFacts()
    for name in names:
        report_facts(facts, name, order.sample(IMAGES, order.randint(0, 2)), full=order.random() < 0.1)
    return Snapshot(made, pool, seen, restarted, order.choice(_PROFILES), OFFLINE_TIMEOUT, facts=facts)


def snapshots() -> st.SearchStrategy[Snapshot]:
    """Draw clusters of all sizes. Only a size and a seed are drawn, so a thousand clusters take a second, and shrink."""
    return st.builds(cluster_of, st.integers(0, len(NAMES)), st.integers(0, 12), st.integers(0, 2**32))


def shuffled(snapshot: Snapshot, seed: int) -> Snapshot:
    """Return the same cluster with everything in another order."""
    order = random.Random(seed)

    def mixed(pairs: Mapping[str, Any]) -> dict[str, Any]:
        items = list(pairs.items())
        order.shuffle(items)
        return dict(items)

    vms = [
        replace(vm, spec=replace(vm.spec, resources=mixed(vm.spec.resources), labels=mixed(vm.spec.labels)))
        for vm in snapshot.vms
    ]
    order.shuffle(vms)
    cluster = mixed(snapshot.workers)
    cluster = {name: replace(w, resources=mixed(w.resources), labels=mixed(w.labels)) for name, w in cluster.items()}
    return replace(snapshot, vms=vms, workers=cluster, last_contact=mixed(snapshot.last_contact))
