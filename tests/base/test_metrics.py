"""Metrics: their text, what is counted, and how a scrape finds the rest."""

from __future__ import annotations

import datetime
import math
import os
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.served import Served, at_once, served
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from orchard import controller
from orchard.base.metrics import LIFE_SECONDS, METRICS_TYPE, Histogram, Metric, text_of
from orchard.client import Client, ResponseError
from orchard.handlers.metrics import METRICS, metrics_answer
from orchard.net.transport import Transport
from orchard.schema import TART_VMS, ServiceAccount
from orchard.testing import cluster

# Sample -> its value: the name, and the labels in order.
Samples = dict[tuple[str, ...], float]
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]*", fullmatch=True)
NUMBERS = st.integers(0, 2**53) | st.floats(allow_nan=False)


def parsed(text: bytes) -> Samples:
    """Return what another program reads in a scrape. A sample that is there twice fails."""
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, *(sample.labels[name] for name in sample.labels))
            assert key not in found
            found[key] = sample.value
    return found


async def scrape(api: Served) -> Samples:
    answer = await metrics_answer(api.api)
    assert isinstance(answer.body, list)
    return parsed(b"".join(answer.body))


# ---- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(NAMES, st.text(st.characters(exclude_categories=["Cs"])), st.dictionaries(st.text(), NUMBERS, max_size=4))
def test_any_name_text_and_number_is_read_by_another_program_as_it_was(
    name: str, doc: str, values: dict[str, float]
) -> None:
    metric = Metric(f"m_{name}", "gauge", doc, (f"l_{name}",))
    text = text_of(metric.lines({(value,): number for value, number in values.items()}))
    assert parsed(text) == {(metric.name, value): number for value, number in values.items()}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_read_by_another_program(value: float) -> None:
    found = parsed(text_of(Metric("m", "gauge", "a number").lines(value)))["m",]
    assert found == value or (math.isnan(found) and math.isnan(value))


@given(st.lists(st.floats(-10, 10_000)))
def test_histogram_counts_each_value_once_in_every_bucket_that_it_fits_in(values: list[float]) -> None:
    histogram = Histogram(LIFE_SECONDS)
    for value in values:
        histogram.observe(value)
    found = parsed(text_of(Metric("h", "histogram", "times").lines(histogram)))
    kept = [max(0.0, value) for value in values]
    for bound in LIFE_SECONDS:
        assert found["h_bucket", str(bound)] == sum(value <= bound for value in kept)
    assert found["h_bucket", "+Inf"] == found["h_count",] == len(values)
    assert found["h_sum",] == pytest.approx(sum(kept))


# ---- the fleet -------------------------------------------------------------------------------------------------------


async def test_workers_are_counted_by_state_and_their_resources_once(tmp_path: Path) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        for name in ("on", "paused", "off", "drained"):
            await api.register(name, resources={TART_VMS: 2, "gpus": 1})
        await api.create("vm", resources={TART_VMS: 2}, labels={})
        api.schedule()
        where = api.state.vms["vm"].state.worker
        await api.ok("PUT", "/workers/paused", {"scheduling_paused": True})
        await api.ok("POST", "/workers/drained/drain")
        await api.ok("POST", "/rpc/goodbye?workerName=off")
        found = await scrape(api)
        states = {key[1]: value for key, value in found.items() if key[0] == "orchard_workers"}
        assert where == "drained"
        assert states == {"online": 1, "paused": 1, "offline": 1, "draining": 1, "drained": 0}
        for resource, offered, used, free in ((TART_VMS, 8, 2, 2), ("gpus", 4, 0, 1)):
            parts = {part: found[f"orchard_resource_{part}", resource] for part in ("offered", "used", "free")}
            assert parts == {"offered": offered, "used": used, "free": free}
            assert found["orchard_resource_unavailable", resource] == offered - used - free


async def test_vms_are_counted_by_status_with_the_ages_of_those_that_wait(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        await api.register("w", resources={TART_VMS: 1})
        await api.create("starting")
        api.schedule()
        await trio.sleep(10)
        await api.create("never", labels={"no": "worker"})
        await api.create("later")
        api.schedule()
        found = await scrape(api)
        statuses = {key[1]: value for key, value in found.items() if key[0] == "orchard_vms"}
        assert statuses == {"pending": 3, "running": 0, "failed": 0}
        assert (found["orchard_vms_waiting",], found["orchard_vms_unplaceable",]) == (2, 1)
        # The clock of these tests stands still for what is stored.
        assert found["orchard_oldest_waiting_vm_seconds",] == pytest.approx(10, abs=1)
        assert found["orchard_oldest_starting_vm_seconds",] == pytest.approx(10, abs=1)
        await api.register("other", labels={"no": "worker"})
        api.schedule()
        assert (await scrape(api))["orchard_vms_unplaceable",] == 0


async def test_series_of_workers_are_there_only_on_request(tmp_path: Path) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        name = 'quoted"worker'.replace('"', "_")
        await api.register(name)
        before = await scrape(api)
        api.api.parts.figures.per_worker = True
        after = await scrape(api)
        assert {key for key in after if name in key} == {
            ("orchard_worker_state", name, "online"),
            ("orchard_worker_vms", name),
        }
        assert not [key for key in before if name in key]


async def test_resource_of_any_name_is_read_by_another_program_as_it_was(tmp_path: Path) -> None:
    names = ['quo"ted', "back\\slash", "brace}{", "é 中", 'end\\"']
    async with served(tmp_path, in_thread=at_once) as api:
        await api.register("w", resources=dict.fromkeys(names, 3))
        found = await scrape(api)
        assert {found["orchard_resource_offered", name] for name in names} == {3}


async def test_resources_of_any_number_of_names_are_bounded_series(tmp_path: Path) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        for number in range(4):
            many = {f"r{number}-{index}": 1 for index in range(200)}
            await api.register(f"w{number}", resources={TART_VMS: 2, "common": 1, **many})
        found = await scrape(api)
        names = {key[1] for key in found if key[0] == "orchard_resource_offered"}
        assert len(names) == 32
        assert {TART_VMS, "common"} <= names


# ---- lives of VMs ----------------------------------------------------------------------------------------------------


async def report(api: Served, name: str, **fields: object) -> None:
    vm = api.state.vms[name]
    await api.ok("PUT", f"/vms/{name}/state", {"uid": vm.uid, "restart_count": vm.state.restart_count, **fields})


def sums(found: Samples) -> dict[str, float]:
    phases = ("queue", "pull", "boot", "script")
    return {phase: round(found[f"orchard_vm_{phase}_seconds_sum",]) for phase in phases}


async def test_phases_of_a_vm_are_measured_apart(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        await api.create("vm", startup_script={"script_content": "true"})
        await trio.sleep(3)
        await api.register("w")
        api.schedule()
        await trio.sleep(2)
        await report(api, "vm", status="pending", status_message="pulling image: 1 %")
        await trio.sleep(20)
        await report(api, "vm", status="pending", status_message="pulling image: 90 %")
        await trio.sleep(20)
        await report(api, "vm", status="pending", status_message="cloning")
        await trio.sleep(7)
        await report(api, "vm", status="running", conditions=[{"type": "running", "state": "true"}])
        await trio.sleep(90)
        ended: dict[str, Any] = {"startupExitCode": 0, "startupEndedAt": "2026-01-31T12:00:00Z"}
        await report(api, "vm", status="running", **ended)
        await report(api, "vm", status="running", **ended)
        found = await scrape(api)
        assert sums(found) == {"queue": 3, "pull": 40, "boot": 7, "script": 90}
        assert found["orchard_vm_script_seconds_count",] == 1


async def failed_before_it_ran(api: Served) -> None:
    await report(api, "vm", status="failed", status_message="no such image")


async def failed_while_it_ran(api: Served) -> None:
    await report(api, "vm", status="running")
    await report(api, "vm", status="failed", status_message="the guest has ended")


async def script_failed(api: Served) -> None:
    await report(api, "vm", status="running")
    ended = {"startupExitCode": 3, "startupEndedAt": "2026-01-31T12:00:00Z"}
    await report(api, "vm", status="failed", status_message="exit code 3", **ended)


async def worker_was_deleted(api: Served) -> None:
    await api.ok("DELETE", "/workers/w")
    api.schedule()


async def worker_is_silent(api: Served) -> None:
    await report(api, "vm", status="running")
    api.close_watch("w")
    await trio.sleep(controller.DEFAULT_OFFLINE_TIMEOUT + 1)
    api.schedule()


async def was_deleted(api: Served) -> None:
    await report(api, "vm", status="running")
    await api.ok("DELETE", "/vms/vm")


async def failed_and_was_deleted(api: Served) -> None:
    await failed_before_it_ran(api)
    await api.ok("DELETE", "/vms/vm")


async def has_expired(api: Served) -> None:
    await api.ok("PATCH", "/vms/vm", {"ttlSeconds": 5})
    await trio.sleep(6)
    api.do_what_is_due()


async def was_drained(api: Served) -> None:
    await report(api, "vm", status="running")
    await api.ok("POST", "/workers/w/drain", {"now": True})
    api.do_what_is_due()


async def was_restarted(api: Served) -> None:
    await api.register("w", capabilities=["vm-restart"])
    await report(api, "vm", status="running")
    await api.ok("POST", "/vms/vm/restart")


async def found_no_worker(api: Served) -> None:
    await api.ok("DELETE", "/vms/vm")
    api.api.parts.figures.lives.ended.clear()
    await api.create("vm", labels={"no": "worker"}, pendingTimeoutSeconds=1)
    await trio.sleep(2)
    api.do_what_is_due()


@pytest.mark.parametrize(
    ("happens", "result", "reason"),
    [
        (failed_before_it_ran, "failed", "start"),
        (failed_while_it_ran, "failed", "guest"),
        (script_failed, "failed", "script"),
        (worker_was_deleted, "failed", "worker_lost"),
        (worker_is_silent, "failed", "worker_lost"),
        (was_deleted, "deleted", "request"),
        (failed_and_was_deleted, "failed", "start"),
        (has_expired, "deleted", "expired"),
        (was_drained, "failed", "drain"),
        (was_restarted, "failed", "restart"),
        (found_no_worker, "failed", "no_worker"),
    ],
)
async def test_each_end_of_a_vm_is_counted_once_with_its_reason(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, happens: Any, result: str, reason: str
) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        await api.register("w")
        await api.create("vm")
        api.schedule()
        await happens(api)
        await api.store.wait_durable()
        found = await scrape(api)
        ended = {key[1:]: value for key, value in found.items() if key[0] == "orchard_vms_ended_total" and value}
        assert ended == {(result, reason): 1}


# ---- requests, tunnels, the process ----------------------------------------------------------------------------------


async def test_requests_are_counted_by_route_and_status_and_unknown_paths_together() -> None:
    async with cluster(workers=0) as c:
        for number in range(3):
            for path in (f"/vms/none-{number}", f"/nothing/{number}"):
                with pytest.raises(ResponseError):
                    await c.client.request("GET", path)
        with pytest.raises(ResponseError):
            await c.client.request("PUT", "/capacity", json={})
        found = parsed((await c.client.request("GET", "/metrics")).body)
        counted = {key[1:]: value for key, value in found.items() if key[0] == "orchard_http_requests_total"}
        assert counted["GET", "/vms/{name}", "404"] == 3
        assert counted["other", "other", "404"] == 3
        assert counted["other", "other", "405"] == 1
        assert not [key for key in counted if "none" in key[1] or "nothing" in key[1]]


async def test_bytes_of_tunnels_are_counted_while_they_are_open_and_afterwards() -> None:
    async with cluster() as c:

        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            async with c.client.workers.port_forward("worker-1", port) as tunnel:
                await tunnel.send_all(b"x" * 1000)
                received = b""
                while len(received) < 1000:
                    received += await tunnel.receive_some()
                found = parsed((await c.client.request("GET", "/metrics")).body)
                assert found["orchard_tunnels",] == 1
                assert found["orchard_tunnel_bytes_total", "to_vms"] == 1000
                assert found["orchard_tunnel_bytes_total", "from_vms"] == 1000
            nursery.cancel_scope.cancel()
        while found["orchard_tunnels",]:
            found = parsed((await c.client.request("GET", "/metrics")).body)
        assert found["orchard_tunnels_opened_total",] == 1
        assert found["orchard_tunnel_bytes_total", "to_vms"] == 1000


async def test_scrape_has_every_declared_metric_and_no_other(tmp_path: Path) -> None:
    settings = controller.ControllerSettings(
        tmp_path, host="127.0.0.1", port=0, metrics=("127.0.0.1", 0), metrics_per_worker=True
    )
    async with trio.open_nursery() as nursery:
        running: controller.Running = await nursery.start(controller.run, settings)
        assert running.new_admin is not None
        admin = (running.new_admin.name, running.new_admin.token)
        async with Client(running.url, account=admin[0], token=admin[1], certificate=running.certificate) as client:
            body = {"name": "w", "resources": {TART_VMS: 2}}
            worker = (await client.request("POST", "/workers", json=body)).json()
            seen = {**worker, "last_seen": "2026-01-31T12:00:00Z", "disk": {"totalBytes": 2, "freeBytes": 1}}
            await client.request("PUT", "/workers/w", json=seen)
            answer = await client.request("GET", "/metrics")
        assert answer.headers["content-type"] == METRICS_TYPE
        families = {family.name: family.type for family in text_string_to_metric_families(answer.body.decode())}
        # The other program takes the suffix of counters off.
        assert families == {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
        found = parsed(answer.body)
        expires = datetime.datetime.fromtimestamp(found["orchard_certificate_expiry_timestamp_seconds",], datetime.UTC)
        assert expires > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365)
        await check_own_port(running.metrics_port)
        nursery.cancel_scope.cancel()


async def check_own_port(port: int) -> None:
    """Check that a port serves metrics without credentials, and nothing else."""
    async with Transport(f"http://127.0.0.1:{port}", connect_seconds=10, answer_seconds=10) as transport:
        found = parsed((await transport.request("GET", "/metrics")).body)
        assert found["orchard_workers", "offline"] == 1
        for method, path, status in (("GET", "/v1/vms", 404), ("GET", "/", 404), ("POST", "/metrics", 405)):
            with pytest.raises(ResponseError) as refused:
                await transport.request(method, path, json={})
            assert refused.value.status == status
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nOrigin: http://elsewhere.example\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 403 ")


async def test_scrape_without_a_free_file_descriptor_has_what_is_known(tmp_path: Path) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            found = await scrape(api)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert found["process_open_fds",] == found["process_max_fds",] == free
        assert set(await scrape(api)) - set(found) == {("process_resident_memory_bytes",)}


async def test_metrics_need_the_role_to_read(tmp_path: Path) -> None:
    accounts = [ServiceAccount(name="r", token="t", roles=("compute:read",)), ServiceAccount(name="n", token="t")]
    async with served(tmp_path, *accounts) as api:
        refused = await api.call("GET", "/metrics", account=("n", "t"))
        assert refused.status == 403
        assert (await api.ask("GET", "/metrics", account=("r", "t"))).status == 200


@pytest.mark.slow
async def test_other_tasks_run_while_a_large_fleet_is_looked_at(tmp_path: Path) -> None:
    async with served(tmp_path, in_thread=at_once) as api:
        for number in range(300):
            await api.register(f"w{number}")
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await scrape(api)
            nursery.cancel_scope.cancel()
        assert turns >= 2
