"""The alerts and the list of metrics in the documents, against the program and a scrape."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from orchard.control.figures import END_REASONS
from orchard.handlers.metrics import METRICS
from orchard.testing import cluster

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
    file = tmp_path / "tests.yaml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
