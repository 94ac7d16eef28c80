"""Hypothesis strategies for the nouns, and small builders. Law: whatever is drawn here is valid by the rules.

`noun(cls)` draws any instance of a dataclass of `attr` fields, zero values and edges included: for what has to hold of
every object that can be written down. `snapshots` draws clusters that could have come about: for the scheduler.

The clusters are small and their values few on purpose: what goes wrong needs VMs that meet on a worker.
"""

from __future__ import annotations

import datetime
import random
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from harness.planning import Snapshot
from orchard.codec import MAX_UINT, Attr, attrs_of
from orchard.schema import TART_VMS, VM, Condition, SchedulerProfile, VMMeta, VMReport, VMSpec, VMState, Worker
from orchard.transitions import assign, create, fail, report

T = TypeVar("T")

# Without a deadline, because the machine may be busy; derandomized, so that a failure is one for everybody.
QUICK = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
THOROUGH = settings(QUICK, max_examples=1_500)

UTC = datetime.UTC
BEGAN = datetime.datetime(2026, 1, 31, 12, tzinfo=UTC)  # the day on which all tests play
NOW = 1_000_000.0  # seconds of the monotonic clock of a snapshot
OFFLINE_TIMEOUT = 180.0  # seconds; the default of the controller
ONLINE, OFFLINE = NOW - 5, NOW - 500  # a last sign of life


# ---- any noun ------------------------------------------------------------------------------------------------------


def texts() -> st.SearchStrategy[str]:
    """Every text that has a UTF-8 form."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def times() -> st.SearchStrategy[datetime.datetime]:
    """Times in UTC, but for the first instant of year 1, which means no time."""
    return st.datetimes(timezones=st.just(UTC)).filter(lambda when: when != datetime.datetime.min.replace(tzinfo=UTC))


def noun(cls: type[T], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[T]:
    """Any instance of a noun; `given` are strategies for some of its fields, by their Python name."""
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
    return noun(kind)


def any_vm() -> st.SearchStrategy[VM]:
    """Any VM that can be written down, whether or not it could have come about."""
    return st.builds(VM, noun(VMMeta), noun(VMSpec), noun(VMState))


# ---- JSON ----------------------------------------------------------------------------------------------------------


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value that every reader understands in the same way."""
    leaves = st.none() | st.booleans() | texts() | st.integers(-MAX_UINT, MAX_UINT) | st.floats(-1e9, 1e9)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(), inner, max_size=4),
        max_leaves=12,
    )


# ---- one VM --------------------------------------------------------------------------------------------------------


def spec(**changed: Any) -> VMSpec:
    """A specification as a new VM has it, with some fields changed."""
    return replace(VMSpec(image="base", resources={TART_VMS: 1}), **changed)


def born(age: float) -> datetime.datetime:
    """When a VM was created that is `age` seconds older than the others."""
    return BEGAN - datetime.timedelta(seconds=age)


def pending(name: str = "vm", age: float = 0, **changed: Any) -> VM:
    """A VM that has just been created; `age` seconds before the others."""
    return create(name, f"uid-{name}", spec(**changed), born(age))


def worker(name: str = "w", vms: int = 2, **changed: Any) -> Worker:
    """A worker with room for some VMs."""
    return replace(Worker(name=name, resources={TART_VMS: vms}, machine_id=f"machine-{name}"), **changed)


def assigned(vm: VM, to: str = "w") -> VM:
    return assign(vm, worker(to), BEGAN)


def running(vm: VM, on: str = "w") -> VM:
    """The VM on a worker that has said that it runs."""
    seen = VMReport(
        status="running", observed_generation=vm.meta.generation, conditions=(Condition("running", "true"),)
    )
    return report(assigned(vm, on), seen, BEGAN)


def resting(vm: VM, on: str = "w", power_state: Literal["stopped", "suspended"] = "stopped") -> VM:
    """The VM stopped or suspended, and its worker has said so."""
    wanted = replace(vm, spec=replace(vm.spec, power_state=power_state, suspendable=power_state == "suspended"))
    return report(running(wanted, on), VMReport(conditions=(Condition("running", "false"),)), BEGAN)


def failed(vm: VM, on: str = "w") -> VM:
    return fail(running(vm, on), "the VM broke")


# ---- clusters ------------------------------------------------------------------------------------------------------

NAMES = [f"w{number}" for number in range(5)]
RESOURCES = [TART_VMS, "gpu"]
SHAPES = 400  # how many VMs and workers of random shape are in the pools: to take one of them is cheap


def _labels(order: random.Random) -> dict[str, str]:
    return {key: order.choice("ab") for key in order.sample(["zone", "model"], order.choice([0, 0, 0, 0, 1, 2]))}


def _resources(order: random.Random, most: int, counts: list[int]) -> dict[str, int]:
    return {name: order.randint(0, most) for name in order.sample(RESOURCES, order.choice(counts))}


def _hosts(order: random.Random) -> dict[str, Any]:
    return {
        "arch": order.choice(["arm64"] * 7 + ["amd64"]),
        "runtime": order.choice(["tart"] * 7 + ["vetu"]),
        "labels": _labels(order),
    }


def _worker_shape(order: random.Random) -> Worker:
    return Worker(
        resources=_resources(order, 4, [0, 1, 2, 2]), scheduling_paused=order.random() < 0.15, **_hosts(order)
    )


def _vm_shape(order: random.Random) -> VM:
    """A VM in any state that it could come into, on one of the workers NAMES, one that was deleted, or none."""
    policy = order.choice(["Never", "OnFailure"])
    vm = pending(resources=_resources(order, 3, [0, 1, 1, 2]), restart_policy=policy, **_hosts(order))
    history = order.choice([None] * 5 + [assigned, running, resting, failed])
    return history(vm, order.choice([*NAMES, "deleted"])) if history else vm


_ORDER = random.Random(0)
_WORKER_SHAPES = [_worker_shape(_ORDER) for _ in range(SHAPES)]
_VM_SHAPES = [_vm_shape(_ORDER) for _ in range(SHAPES)]
_SEEN = [NOW, ONLINE, ONLINE, ONLINE, NOW - 179.5, NOW - OFFLINE_TIMEOUT, OFFLINE, None]
_RESTARTED = [None, None, NOW, NOW - 1, NOW - 14.5, NOW - 15, NOW - 60]
_PROFILES: list[SchedulerProfile] = ["optimize-utilization", "distribute-load"]


def cluster_of(workers: int, vms: int, seed: int) -> Snapshot:
    """A cluster at NOW: workers that may have shrunk below what is used on them, and VMs in every state.

    In most clusters many VMs are alike, so that some of them get a place while others of their kind wait.
    """
    order = random.Random(f"{workers} {vms} {seed}")
    names = order.sample(NAMES, workers)
    seen = {name: at for name in names if (at := order.choice(_SEEN)) is not None}
    kinds = order.sample(_VM_SHAPES, order.choice([1, 2, 3, SHAPES]))
    told = []
    restarted = {}
    for number in range(vms):
        shape = order.choice(kinds)
        meta = replace(shape.meta, name=f"vm{number}", uid=f"uid{number}", created_at=born(order.randrange(4)))
        told.append(replace(shape, meta=meta))
        if (at := order.choice(_RESTARTED)) is not None:
            restarted[f"uid{number}"] = at
    pool = {name: replace(order.choice(_WORKER_SHAPES), name=name) for name in names}
    return Snapshot(told, pool, seen, restarted, order.choice(_PROFILES), OFFLINE_TIMEOUT)


def snapshots() -> st.SearchStrategy[Snapshot]:
    """Clusters of all sizes. Only a size and a seed are drawn: a thousand clusters take a second, and still shrink."""
    return st.builds(cluster_of, st.integers(0, len(NAMES)), st.integers(0, 12), st.integers(0, 2**32))


def shuffled(snapshot: Snapshot, seed: int) -> Snapshot:
    """The same cluster, told in another order."""
    order = random.Random(seed)

    def mixed(pairs: Mapping[str, Any]) -> dict[str, Any]:
        items = list(pairs.items())
        order.shuffle(items)
        return dict(items)

    told = [
        replace(vm, spec=replace(vm.spec, resources=mixed(vm.spec.resources), labels=mixed(vm.spec.labels)))
        for vm in snapshot.vms
    ]
    order.shuffle(told)
    cluster = mixed(snapshot.workers)
    cluster = {name: replace(w, resources=mixed(w.resources), labels=mixed(w.labels)) for name, w in cluster.items()}
    return replace(snapshot, vms=told, workers=cluster, last_contact=mixed(snapshot.last_contact))
