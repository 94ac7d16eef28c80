"""The alerts and the list of metrics in the documents, against the program and a scrape."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import yaml  # type: ignore[import-untyped]
from harness.certificates import Authority
from harness.disks import SmallDisk
from harness.processes import eventually
from harness.served import served
from prometheus_client.parser import text_string_to_metric_families

from orchard.base.files import TLS_CERTIFICATE_FILE, TLS_KEY_FILE
from orchard.control.figures import END_REASONS
from orchard.control.scheduling_loop import TICK_SECONDS
from orchard.handlers.metrics import METRICS
from orchard.storage.state_file import RESERVE_BYTES
from orchard.testing import Cluster, cluster
from orchard.vm.synthetic import SyntheticDriver

DOCS = Path(__file__).parent.parent / "docs"
ALERTS = DOCS / "alerts.yaml"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
# A metric in an expression, and its labels.
_SELECTOR = re.compile(r"\b((?:orchard|process)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)="([^"]*)"')

# For each alert: values of its series a minute apart by which it fires at the end, and by which it does not.
# The certificate's are seconds from 1970, when the tests of promtool begin.
CASES: dict[str, tuple[str, str, str]] = {
    "OrchardWorkerLost": ('orchard_workers{state="offline"}', "1+0x60", "0+0x50 1+0x2"),
    "OrchardQueueOld": ("orchard_oldest_waiting_vm_seconds", "601+0x60", "600+0x60"),
    "OrchardVMUnplaceable": ("orchard_vms_unplaceable", "2+0x60", "0+0x60"),
    "OrchardDiskLow": ("orchard_disk_free_bytes_min", "49e9+0x60", "51e9+0x60"),
    "OrchardVMDoesNotStart": ("orchard_oldest_starting_vm_seconds", "1801+0x60", "1800+0x60"),
    "OrchardCertificateExpires": ("orchard_certificate_expiry_timestamp_seconds", "2500000+0x60", "2700000+0x60"),
    "OrchardSchedulerLate": ("orchard_scheduler_stalled_seconds_total", "0+10x60", "0+1x60"),
    "OrchardWritesRefused": ("orchard_writes_refused", "1+0x60", "0+0x60"),
}
MORE_CASES = [
    ("OrchardDiskLow", "orchard_workers_low_disk", "1+0x60", "0+0x60"),
    ("OrchardSchedulerLate", "orchard_scheduler_round_age_seconds", "31+0x60", "6+0x60"),
]


def test_each_metric_and_no_other_is_described() -> None:
    listed = re.findall(
        r"^\| `((?:orchard|process)_\w+)` \| ([^|]*)\|", (DOCS / "metrics.md").read_text(), re.MULTILINE
    )
    assert {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in listed} == {
        metric.name: metric.labels for metric in METRICS
    }
    assert len(listed) == len(METRICS)


def test_each_result_and_reason_of_an_end_is_described() -> None:
    rows = re.findall(r"^\| `(deleted|failed)` \| ([^|]*)\|", (DOCS / "metrics.md").read_text(), re.MULTILINE)
    described = [(result, reason) for result, reasons in rows for reason in re.findall(r"`(\w+)`", reasons)]
    assert sorted(described) == sorted(END_REASONS)


async def test_each_metric_and_label_of_an_alert_is_in_a_scrape() -> None:
    async with cluster(tls=True, auth=True) as c:
        text = (await c.client.request("GET", "/metrics")).body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for rule in RULES:
        selectors = _SELECTOR.findall(rule["expr"])
        assert selectors, rule["alert"]
        for name, labels in selectors:
            wanted = dict(_MATCHER.findall(labels))
            assert any(one.name == name and wanted.items() <= one.labels.items() for one in samples), (name, labels)


@pytest.mark.needs("promtool")
def test_prometheus_accepts_the_alerts() -> None:
    subprocess.run(["promtool", "check", "rules", ALERTS], check=True, capture_output=True)


@pytest.mark.needs("promtool")
async def test_prometheus_accepts_a_scrape() -> None:
    async with cluster() as c:
        text = (await c.client.request("GET", "/metrics")).body
    done = await trio.run_process(
        ["promtool", "check", "metrics"], stdin=text, capture_stdout=True, capture_stderr=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
@pytest.mark.needs("promtool")
def test_each_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    assert CASES.keys() == {rule["alert"] for rule in RULES}
    tests = []
    for alert, series, firing, quiet in [*((alert, *case) for alert, case in CASES.items()), *MORE_CASES]:
        for values, fires in ((firing, True), (quiet, False)):
            expression = {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": "50m"}
            samples = [{"labels": "{}", "value": 1}] if fires else []
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": series, "values": values}],
                    "promql_expr_test": [{**expression, "exp_samples": samples}],
                }
            )
    run_promtool(tmp_path, *tests)


def run_promtool(home: Path, *tests: dict[str, Any]) -> None:
    file = home / "tests.yaml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- a real fleet ----------------------------------------------------------------------------------------------------

# Between two scrapes, and for how many of them what was scraped goes on.
SCRAPE_SECONDS, SCRAPES = 15, 240
Scrape = dict[str, float]


def parsed(text: str) -> Scrape:
    """Return the samples of a scrape by the series that promtool reads."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={json.dumps(value)}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def expect_alerts(home: Path, before: Scrape, now: Scrape, *alerts: str) -> None:
    """Let all that a fleet shows go on for an hour, and expect these alerts and no others at its end.

    Ages rise by the time, and counters as they did between the two scrapes. Time begins with the later one.
    """
    series = []
    for name, value in now.items():
        if name.startswith("orchard_certificate"):
            value -= time.time()
        is_age = name.startswith("orchard_oldest") and value > 0
        step = SCRAPE_SECONDS if is_age else value - before.get(name, value) if "_total{" in name else 0
        series.append({"series": name, "values": f"{value:f}+{step:f}x{SCRAPES}"})
    firing = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts]
    expression = 'count by (alertname) (ALERTS{alertstate="firing"})'
    test = {"expr": expression, "eval_time": f"{SCRAPE_SECONDS * SCRAPES}s", "exp_samples": firing}
    run_promtool(home, {"interval": f"{SCRAPE_SECONDS}s", "input_series": series, "promql_expr_test": [test]})


async def scrape(c: Cluster) -> Scrape:
    return parsed((await c.client.request("GET", "/metrics")).body.decode())


@pytest.mark.needs("promtool")
async def test_no_alert_fires_on_a_healthy_fleet(tmp_path: Path) -> None:
    async with cluster(workers=2, tls=True) as c:
        await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")
        found = await scrape(c)
    expect_alerts(tmp_path, found, found)


@pytest.mark.slow(9)
@pytest.mark.needs("promtool")
async def test_each_alert_fires_on_a_fleet_that_needs_it(tmp_path: Path) -> None:
    """All but that of a full disk."""
    data = tmp_path / "controller"
    data.mkdir(mode=0o700)
    # They end tomorrow.
    for made, file in zip(Authority(tmp_path).issue("a"), (TLS_CERTIFICATE_FILE, TLS_KEY_FILE), strict=True):
        made.rename(data / file)

    def driver(name: str) -> SyntheticDriver:
        made = SyntheticDriver(tmp_path / name)
        made.used_bytes = 460 * 10**9
        return made

    async with cluster(workers=2, tls=True, directory=tmp_path, driver=driver) as c:
        await c.client.vms.create(name="starts", image="example.com/pull-900s")
        await c.client.vms.create(name="waits", image="any", labels={"xcode": "unknown"})
        await c.workers["worker-2"].stop()
        found: Scrape = {}

        async def is_sick() -> bool:
            found.update(await scrape(c))
            ages = (found["orchard_oldest_waiting_vm_seconds{}"], found["orchard_oldest_starting_vm_seconds{}"])
            offline = found['orchard_workers{state="offline"}']
            return bool(all(ages) and offline and found["orchard_vms_unplaceable{}"])

        await eventually(is_sick)
        # The whole process stands still, as if its host were overloaded, for longer than the scheduler may sleep.
        time.sleep(TICK_SECONDS + 3)  # noqa: ASYNC251
        await trio.testing.wait_all_tasks_blocked()
        later = await scrape(c)
    expect_alerts(tmp_path, found, later, *sorted(CASES.keys() - {"OrchardWritesRefused"}))


@pytest.mark.needs("promtool")
async def test_alert_of_a_full_disk_fires_on_a_controller_that_has_one(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, 2 * RESERVE_BYTES)
    async with served(tmp_path, disk=disk) as api:
        disk.room = 0
        while not api.store.full:
            await api.call("POST", "/vms", {"name": f"vm{api.state.revision}", "image": "image"})
        found = parsed((await api.call("GET", "/metrics")).body.decode())
    expect_alerts(tmp_path, found, found, "OrchardWritesRefused")
