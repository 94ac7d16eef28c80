"""The metrics of the controller: their declarations, and how a scrape finds their values.

`METRICS` declares all metrics. A scrape visits workers and VMs in steps, so that other tasks go on meanwhile; a VM that
changes between two steps may be counted as before or as after. There are no series for VMs or accounts, and for workers
only on request, so the number of series does not depend on what users do.
"""

from __future__ import annotations

import datetime
import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import trio

from orchard import __version__
from orchard.api import API
from orchard.base.metrics import METRICS_TYPE, Histogram, Metric, text_of
from orchard.base.nursery import visit_in_steps
from orchard.handlers.admission import Admitted
from orchard.net.request import AnyResponse, Request, Response
from orchard.resources.cluster import WorkerState
from orchard.schema import LOGICAL_CORES, MEMORY_MIB, TART_VMS, VM, Status, Worker

# VMs and workers that are looked at in one step of the event loop: some milliseconds.
_VMS_PER_STEP, _WORKERS_PER_STEP = 1000, 100
# Lines of series of workers that are made in one step.
_SERIES_PER_STEP = 500
# The most resources that are shown, which may have any name: those that the most workers offer.
_MAX_RESOURCES = 32
_USUAL_RESOURCES = (TART_VMS, LOGICAL_CORES, MEMORY_MIB)


METRICS = (
    Metric("orchard_build_info", "gauge", "1, with the version of the controller", ("version",)),
    Metric("orchard_leader", "gauge", "1 if this controller leads the cluster"),
    Metric("orchard_writes_refused", "gauge", "1 while nothing can be added because the disk is full"),
    Metric("orchard_workers", "gauge", "Workers by state", ("state",)),
    Metric("orchard_workers_unhealthy", "gauge", "Workers that report a problem or on which VMs fail before they run"),
    Metric("orchard_workers_low_disk", "gauge", "Workers with less free disk space than the setting minFreeDiskGB"),
    Metric("orchard_disk_free_bytes_min", "gauge", "The least free disk space among the workers that report it"),
    Metric("orchard_resource_offered", "gauge", "Resources that all registered workers offer", ("resource",)),
    Metric("orchard_resource_used", "gauge", "Resources that VMs use", ("resource",)),
    Metric("orchard_resource_free", "gauge", "Unused resources of workers in the state online", ("resource",)),
    Metric("orchard_resource_unavailable", "gauge", "Unused resources of workers in other states", ("resource",)),
    Metric("orchard_vms", "gauge", "VMs by status", ("status",)),
    Metric("orchard_vms_waiting", "gauge", "Pending VMs without a worker"),
    Metric("orchard_vms_resting", "gauge", "VMs that are stopped or suspended and use no resources"),
    Metric("orchard_vms_unplaceable", "gauge", "Waiting VMs that no registered worker could ever take"),
    Metric("orchard_oldest_waiting_vm_seconds", "gauge", "How long the oldest pending VM has waited for a worker"),
    Metric("orchard_oldest_starting_vm_seconds", "gauge", "The longest time that a VM has had a worker without running"),
    Metric("orchard_vm_queue_seconds", "histogram", "From a VM's creation or restart to its assignment to a worker"),
    Metric("orchard_vm_pull_seconds", "histogram", "Pulls of images for VMs"),
    Metric("orchard_vm_boot_seconds", "histogram", "From a VM's assignment, or the end of the pull, until it runs"),
    Metric("orchard_vm_script_seconds", "histogram", "From when a VM runs until its startup script has ended"),
    Metric("orchard_vms_ended_total", "counter", "Runs of VMs that have ended, by result and reason", ("result", "reason")),
    Metric("orchard_http_requests_total", "counter", "Answered requests", ("method", "route", "status")),
    Metric("orchard_tunnels", "gauge", "Open tunnels to VMs and workers"),
    Metric("orchard_tunnels_opened_total", "counter", "Tunnels that were opened"),
    Metric("orchard_tunnel_bytes_total", "counter", "Bytes in tunnels, from VMs and to VMs", ("direction",)),
    Metric("orchard_webhook_requests_total", "counter", "Requests of webhooks, by result", ("result",)),
    Metric("orchard_webhook_waiting", "gauge", "Notifications that wait to be sent"),
    Metric("orchard_webhooks_failing", "gauge", "Webhooks whose last request failed"),
    Metric("orchard_scheduling_seconds", "histogram", "Steps of the scheduler, each for at most 50 VMs"),
    Metric("orchard_scheduler_round_age_seconds", "gauge", "Time since the scheduler had nothing left to do; at most 5"),
    Metric("orchard_scheduler_stalled_seconds_total", "counter", "Time by which the scheduler woke up late, in total"),
    Metric("orchard_store_write_seconds", "histogram", "From the beginning of a write until it is durable (fsync)"),
    Metric("orchard_certificate_expiry_timestamp_seconds", "gauge", "When the TLS certificate expires, since 1970"),
    Metric("orchard_worker_state", "gauge", "1 for the worker's present state; --metrics-per-worker", ("worker", "state")),
    Metric("orchard_worker_vms", "gauge", "VMs that use resources; --metrics-per-worker", ("worker",)),
    Metric("orchard_worker_disk_free_bytes", "gauge", "Free disk space; --metrics-per-worker", ("worker",)),
    Metric("process_cpu_seconds_total", "counter", "User and system time of the process"),
    Metric("process_resident_memory_bytes", "gauge", "Memory that the process has in RAM"),
    Metric("process_open_fds", "gauge", "Open file descriptors"),
    Metric("process_max_fds", "gauge", "File descriptors that the process may open"),
    Metric("process_start_time_seconds", "gauge", "When the controller started, since 1970"),
)  # fmt: skip
# Values of some metrics, by their names without "orchard_". None: unknown, so the metric is left out.
Values = dict[str, float | Mapping[Any, float] | Histogram | None]

_BY_NAME = {metric.name.removeprefix("orchard_"): metric for metric in METRICS}


async def get_metrics(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return await metrics_answer(api)


async def metrics_answer(api: API) -> Response:
    """Return the answer to a scrape."""
    workers, vms = await _survey_workers(api), _VMs()
    await visit_in_steps(api.state.vms, _VMS_PER_STEP, vms.add)
    parts = [text_of(_lines({**_worker_values(workers), **_vm_values(vms)}))]
    for name, samples in (workers.series or {}).items():
        parts += await _series_parts(_BY_NAME[name], samples)
    await trio.lowlevel.checkpoint()
    rest = {**_controller_values(api, vms), **_life_values(api), **_work_values(api), **_process_values(api)}
    parts.append(text_of(_lines(rest)))
    return Response(200, parts, content_type=METRICS_TYPE)


def _lines(values: Values) -> list[str]:
    return [line for name, value in values.items() if value is not None for line in _BY_NAME[name].lines(value)]


# ---- the fleet -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class FleetSurvey:
    """The totals of all workers. `series` has the series of each worker by metric, or is None."""

    states: Counter[WorkerState] = field(default_factory=lambda: Counter(dict.fromkeys(get_args(WorkerState), 0)))
    unhealthy: int = 0
    low_disk: int = 0
    least_free: int | None = None
    offered: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    free: Counter[str] = field(default_factory=Counter)
    unavailable: Counter[str] = field(default_factory=Counter)
    # Resource -> number of workers.
    named: Counter[str] = field(default_factory=Counter)
    series: dict[str, dict[tuple[str, ...], float]] | None = None

    def add(self, api: API, worker: Worker) -> None:
        """Add a worker."""
        name, states, scheduling = worker.name, api.parts.worker_states, api.parts.scheduling
        state = states.observe(worker)[0]
        load = scheduling.planner.placement.load_of(name)
        free = api.parts.liveness.facts.free_bytes(name)
        self.states[state] += 1
        self.unhealthy += not states.health(name).ok
        if free is not None:
            self.low_disk += free < 10**9 * api.state.settings.min_free_disk_gb
            self.least_free = free if self.least_free is None else min(self.least_free, free)
        self.add_resources(worker.resources, load.used, self.free if state == "online" else self.unavailable)
        if self.series is not None:
            self.series["worker_state"][name, state] = 1
            self.series["worker_vms"][(name,)] = load.count
            if free is not None:
                self.series["worker_disk_free_bytes"][(name,)] = free

    def add_resources(self, offered: Mapping[str, int], used: Mapping[str, int], rest: Counter[str]) -> None:
        """Add what a worker offers, what VMs use there, which may be more, and to `rest` what they do not use."""
        for name in {**offered, **used}:
            amount, in_use = offered.get(name, 0), used.get(name, 0)
            self.named[name] += 1
            self.offered[name] += amount
            self.used[name] += in_use
            rest[name] += max(0, amount - in_use)


async def _survey_workers(api: API) -> FleetSurvey:
    found = FleetSurvey()
    if api.parts.figures.per_worker:
        found.series = {"worker_state": {}, "worker_vms": {}, "worker_disk_free_bytes": {}}
    await visit_in_steps(api.state.workers, _WORKERS_PER_STEP, lambda worker: found.add(api, worker))
    return found


def _worker_values(found: FleetSurvey) -> Values:
    usual = [name for name in _USUAL_RESOURCES if name in found.named]
    others = [name for name, _ in found.named.most_common() if name not in usual]
    shown = [*usual, *others][:_MAX_RESOURCES]
    parts = {"offered": found.offered, "used": found.used, "free": found.free, "unavailable": found.unavailable}
    return {
        "workers": {(state,): number for state, number in found.states.items()},
        "workers_unhealthy": found.unhealthy,
        "workers_low_disk": found.low_disk,
        "disk_free_bytes_min": found.least_free,
        **{f"resource_{part}": {(name,): amounts[name] for name in shown} for part, amounts in parts.items()},
    }


async def _series_parts(metric: Metric, samples: Mapping[tuple[str, ...], float]) -> list[bytes]:
    """Return the text of a metric in parts, each of which is made in a step of its own."""
    parts, keys = [text_of(metric.head())], [*samples]
    for start in range(0, len(keys), _SERIES_PER_STEP):
        await trio.lowlevel.checkpoint()
        parts.append(text_of(metric.sample_line(key, samples[key]) for key in keys[start : start + _SERIES_PER_STEP]))
    return parts


@dataclass(slots=True)
class _VMs:
    """The totals of all VMs: their numbers, and since when the oldest ones wait for a worker or for their start."""

    statuses: Counter[Status] = field(default_factory=lambda: Counter(dict.fromkeys(get_args(Status), 0)))
    waiting: int = 0
    resting: int = 0
    waiting_since: datetime.datetime | None = None
    starting_since: datetime.datetime | None = None

    def add(self, vm: VM) -> None:
        state = vm.state
        self.statuses[state.status] += 1
        if state.status == "running":
            self.resting += vm.spec.power_state != "running" and vm.resting
        elif state.status == "pending" and state.worker:
            self.starting_since = _earlier(self.starting_since, state.scheduled_at)
        elif state.status == "pending":
            self.waiting += 1
            self.waiting_since = _earlier(self.waiting_since, state.restarted_at or vm.meta.created_at)


def _earlier(one: datetime.datetime | None, other: datetime.datetime | None) -> datetime.datetime | None:
    return min(one, other) if one is not None and other is not None else one or other


def _vm_values(found: _VMs) -> Values:
    statuses = {(status,): number for status, number in found.statuses.items()}
    return {"vms": statuses, "vms_waiting": found.waiting, "vms_resting": found.resting}


# ---- the controller --------------------------------------------------------------------------------------------------


def _controller_values(api: API, vms: _VMs) -> Values:
    store, expires, now = api.store, api.parts.figures.certificate_expires(), api.parts.deadline_clock()

    def age(since: datetime.datetime | None) -> float:
        return 0.0 if since is None else max(0.0, (now - since).total_seconds())

    return {
        "build_info": {(__version__,): 1},
        "leader": int(store.leads()),
        "writes_refused": int(bool(store.full)),
        "vms_unplaceable": api.parts.scheduling.planner.placement.waiting_for_ever(),
        "oldest_waiting_vm_seconds": age(vms.waiting_since),
        "oldest_starting_vm_seconds": age(vms.starting_since),
        "certificate_expiry_timestamp_seconds": None if expires is None else expires.timestamp(),
    }


def _life_values(api: API) -> Values:
    lives = api.parts.figures.lives
    return {
        "vm_queue_seconds": lives.queue,
        "vm_pull_seconds": lives.pull,
        "vm_boot_seconds": lives.boot,
        "vm_script_seconds": lives.script,
        "vms_ended_total": lives.ended,
    }


def _work_values(api: API) -> Values:
    scheduling, webhooks = api.parts.scheduling.figures, api.parts.webhooks
    count, tunnels = api.parts.rendezvous.totals()
    return {
        "http_requests_total": api.parts.figures.requests,
        "tunnels": count,
        "tunnels_opened_total": tunnels.opened,
        "tunnel_bytes_total": {("from_vms",): tunnels.from_vms, ("to_vms",): tunnels.to_vms},
        "webhook_requests_total": {(result,): number for result, number in webhooks.results.items()},
        "webhook_waiting": webhooks.waiting(),
        "webhooks_failing": webhooks.failing(),
        "scheduling_seconds": scheduling.steps,
        "scheduler_round_age_seconds": trio.current_time() - scheduling.looked_at,
        "scheduler_stalled_seconds_total": scheduling.stalled,
        "store_write_seconds": api.store.write_seconds,
    }


def _process_values(api: API) -> Values:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "process_cpu_seconds_total": usage.ru_utime + usage.ru_stime,
        "process_resident_memory_bytes": _resident_bytes(),
        "process_open_fds": _open_descriptors(most),
        "process_max_fds": most,
        "process_start_time_seconds": api.parts.figures.started,
    }


def _resident_bytes() -> int | None:
    """Return the memory of the process; None elsewhere than on Linux, and where no file can be opened."""
    if sys.platform != "linux":
        return None
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def _open_descriptors(most: int) -> int:
    """Return how many descriptors are open. One more is needed to list them, so without a free one it is `most`."""
    try:
        return sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:
        return most
