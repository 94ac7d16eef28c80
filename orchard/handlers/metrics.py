"""The metrics of the controller: which there are, and how a scrape finds them.

`METRICS` declares them all. A scrape looks at workers and VMs in steps, so that other tasks go on meanwhile; a VM that
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
from typing import get_args

import trio

from orchard import __version__
from orchard.admission import Admitted
from orchard.api import API
from orchard.cluster import WorkerState
from orchard.metrics import METRICS_TYPE, Metric, text_of
from orchard.net.request import AnyResponse, Request, Response
from orchard.nursery import visit_in_steps
from orchard.schema import LOGICAL_CORES, MEMORY_MIB, TART_VMS, VM, Status, Worker

# VMs and workers that are looked at in one step of the event loop: some milliseconds.
_VMS_PER_STEP, _WORKERS_PER_STEP = 1000, 100
# Lines of series of workers that are made in one step.
_SERIES_PER_STEP = 500
# Workers may offer resources of any name. Of more names than these, those of most workers are shown.
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
    Metric("orchard_resource_offered", "gauge", "What all registered workers offer", ("resource",)),
    Metric("orchard_resource_used", "gauge", "What VMs use of it", ("resource",)),
    Metric("orchard_resource_free", "gauge", "What workers in the state online have free", ("resource",)),
    Metric("orchard_resource_unavailable", "gauge", "What is unused on workers in other states", ("resource",)),
    Metric("orchard_vms", "gauge", "VMs by status", ("status",)),
    Metric("orchard_vms_waiting", "gauge", "Pending VMs without a worker"),
    Metric("orchard_vms_resting", "gauge", "VMs that are stopped or suspended and use no resources"),
    Metric("orchard_vms_unplaceable", "gauge", "Waiting VMs that no registered worker could ever take"),
    Metric("orchard_oldest_waiting_vm_seconds", "gauge", "How long the oldest pending VM has waited for a worker"),
    Metric("orchard_oldest_starting_vm_seconds", "gauge", "How long a VM has had a worker and does not run, at most"),
    Metric("orchard_vm_queue_seconds", "histogram", "From a VM's creation or restart to its assignment to a worker"),
    Metric("orchard_vm_pull_seconds", "histogram", "Pulls of images for VMs"),
    Metric("orchard_vm_boot_seconds", "histogram", "From a VM's assignment, or the end of the pull, until it runs"),
    Metric("orchard_vm_script_seconds", "histogram", "From then until the startup script has ended"),
    Metric("orchard_vms_ended_total", "counter", "Runs of VMs that have ended, by result and reason", ("result", "reason")),
    Metric("orchard_http_requests_total", "counter", "Answered requests", ("method", "route", "status")),
    Metric("orchard_tunnels", "gauge", "Open tunnels to VMs and workers"),
    Metric("orchard_tunnels_opened_total", "counter", "Tunnels that were opened"),
    Metric("orchard_tunnel_bytes_total", "counter", "Bytes in tunnels, from VMs and to VMs", ("direction",)),
    Metric("orchard_webhook_requests_total", "counter", "Requests of webhooks, by result", ("result",)),
    Metric("orchard_webhook_waiting", "gauge", "What webhooks have not taken yet"),
    Metric("orchard_webhooks_failing", "gauge", "Webhooks that did not take what they were sent last"),
    Metric("orchard_scheduling_seconds", "histogram", "Steps of the scheduler, each for at most 50 VMs"),
    Metric("orchard_scheduler_round_age_seconds", "gauge", "Since the scheduler did all that was due; at most 5 by design"),
    Metric("orchard_scheduler_stalled_seconds_total", "counter", "How late the scheduler woke up, in all"),
    Metric("orchard_store_write_seconds", "histogram", "From the begin of a write until it is durable (fsync)"),
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
_BY_NAME = {metric.name.removeprefix("orchard_"): metric for metric in METRICS}


async def get_metrics(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return await metrics_answer(api)


async def metrics_answer(api: API) -> Response:
    """Return the answer to a scrape."""
    workers = await _survey_workers(api)
    vms = await _survey_vms(api)
    parts = [text_of([*_worker_lines(workers), *_vm_lines(vms)])]
    for name, samples in (workers.series or {}).items():
        parts += await _series_parts(_BY_NAME[name], samples)
    await trio.lowlevel.checkpoint()
    parts.append(text_of([*_controller_lines(api, vms), *_life_lines(api), *_work_lines(api), *_process_lines(api)]))
    return Response(200, parts, content_type=METRICS_TYPE)


# ---- the fleet -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class FleetSurvey:
    """What was found of the workers. `series` is None, or has the series of each worker by metric."""

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


def _worker_lines(found: FleetSurvey) -> list[str]:
    lines = _BY_NAME["workers"].lines({(state,): number for state, number in found.states.items()})
    lines += _BY_NAME["workers_unhealthy"].line(found.unhealthy)
    lines += _BY_NAME["workers_low_disk"].line(found.low_disk)
    if found.least_free is not None:
        lines += _BY_NAME["disk_free_bytes_min"].line(found.least_free)
    usual = [name for name in _USUAL_RESOURCES if name in found.named]
    others = [name for name, _ in found.named.most_common() if name not in usual]
    shown = [*usual, *others][:_MAX_RESOURCES]
    for part in ("offered", "used", "free", "unavailable"):
        amounts = getattr(found, part)
        lines += _BY_NAME[f"resource_{part}"].lines({(name,): amounts[name] for name in shown})
    return lines


async def _series_parts(metric: Metric, samples: Mapping[tuple[str, ...], float]) -> list[bytes]:
    """Return the text of a metric in parts, each of which is made in a step of its own."""
    parts, keys = [text_of(metric.head())], [*samples]
    for start in range(0, len(keys), _SERIES_PER_STEP):
        await trio.lowlevel.checkpoint()
        parts.append(text_of(metric.sample_line(key, samples[key]) for key in keys[start : start + _SERIES_PER_STEP]))
    return parts


@dataclass(slots=True)
class _VMs:
    """What was found of the VMs: their numbers, and since when the oldest ones wait for a worker or for their start."""

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


async def _survey_vms(api: API) -> _VMs:
    found = _VMs()
    await visit_in_steps(api.state.vms, _VMS_PER_STEP, found.add)
    return found


def _vm_lines(found: _VMs) -> list[str]:
    lines = _BY_NAME["vms"].lines({(status,): number for status, number in found.statuses.items()})
    lines += _BY_NAME["vms_waiting"].line(found.waiting)
    return lines + _BY_NAME["vms_resting"].line(found.resting)


# ---- the controller --------------------------------------------------------------------------------------------------


def _controller_lines(api: API, vms: _VMs) -> list[str]:
    store, figures, scheduling = api.store, api.parts.figures, api.parts.scheduling
    now = api.parts.deadline_clock()
    lines = _BY_NAME["build_info"].lines({(__version__,): 1})
    lines += _BY_NAME["leader"].line(int(store.leads()))
    lines += _BY_NAME["writes_refused"].line(int(bool(store.full)))
    lines += _BY_NAME["vms_unplaceable"].line(scheduling.planner.placement.waiting_for_ever())
    for name, since in (("waiting", vms.waiting_since), ("starting", vms.starting_since)):
        age = 0.0 if since is None else max(0.0, (now - since).total_seconds())
        lines += _BY_NAME[f"oldest_{name}_vm_seconds"].line(age)
    if (expires := figures.certificate_expires()) is not None:
        lines += _BY_NAME["certificate_expiry_timestamp_seconds"].line(expires.timestamp())
    return lines


def _life_lines(api: API) -> list[str]:
    lives = api.parts.figures.lives
    lines = _BY_NAME["vm_queue_seconds"].histogram_lines(lives.queue)
    lines += _BY_NAME["vm_pull_seconds"].histogram_lines(lives.pull)
    lines += _BY_NAME["vm_boot_seconds"].histogram_lines(lives.boot)
    lines += _BY_NAME["vm_script_seconds"].histogram_lines(lives.script)
    return lines + _BY_NAME["vms_ended_total"].lines(lives.ended)


def _work_lines(api: API) -> list[str]:
    scheduling = api.parts.scheduling.figures
    lines = _BY_NAME["http_requests_total"].lines(api.parts.figures.requests)
    count, tunnels = api.parts.rendezvous.totals()
    lines += _BY_NAME["tunnels"].line(count)
    lines += _BY_NAME["tunnels_opened_total"].line(tunnels.opened)
    directions = {("from_vms",): tunnels.from_vms, ("to_vms",): tunnels.to_vms}
    lines += _BY_NAME["tunnel_bytes_total"].lines(directions)
    webhooks = api.parts.webhooks
    lines += _BY_NAME["webhook_requests_total"].lines({(result,): n for result, n in webhooks.results.items()})
    lines += _BY_NAME["webhook_waiting"].line(webhooks.waiting())
    lines += _BY_NAME["webhooks_failing"].line(webhooks.failing())
    lines += _BY_NAME["scheduling_seconds"].histogram_lines(scheduling.steps)
    lines += _BY_NAME["scheduler_round_age_seconds"].line(trio.current_time() - scheduling.looked_at)
    lines += _BY_NAME["scheduler_stalled_seconds_total"].line(scheduling.stalled)
    return lines + _BY_NAME["store_write_seconds"].histogram_lines(api.store.write_seconds)


def _process_lines(api: API) -> list[str]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    lines = _BY_NAME["process_cpu_seconds_total"].line(usage.ru_utime + usage.ru_stime)
    if (memory := _resident_bytes()) is not None:
        lines += _BY_NAME["process_resident_memory_bytes"].line(memory)
    lines += _BY_NAME["process_open_fds"].line(_open_descriptors(most))
    lines += _BY_NAME["process_max_fds"].line(most)
    return lines + _BY_NAME["process_start_time_seconds"].line(api.parts.figures.started)


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
