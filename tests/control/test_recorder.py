"""What is recorded of a VM's life: the lifecycle events of each change, and the line and the entry at its end."""

from __future__ import annotations

import datetime
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from harness.served import BEGAN, Served, served

from orchard import transitions
from orchard.control.recorder import Recorder, describe_change, ended_vm
from orchard.resources.bodies import VMReport
from orchard.schema import VM, Condition, VMSpec, Worker
from orchard.storage.events import EventLog
from orchard.storage.history import History

UP = (Condition("running", "true"),)
NEW = transitions.create("vm", "u", VMSpec(image="i"), BEGAN)
ASSIGNED = transitions.assign(NEW, Worker(name="w"), BEGAN)
RUNNING = transitions.report(ASSIGNED, VMReport(status="running", conditions=UP), BEGAN)
REBOOTS = VM(replace(RUNNING.meta, generation=1), RUNNING.spec, RUNNING.state)
STOPS = VM(REBOOTS.meta, replace(RUNNING.spec, power_state="stopped"), RUNNING.state)


def reported(vm: VM, **seen: object) -> VM:
    return transitions.report(vm, VMReport(**seen), BEGAN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "pull_seconds", "found"),
    [
        (None, NEW, None, ["created"]),
        (None, VM(replace(NEW.meta, created_by="ci"), NEW.spec, NEW.state), None, ["created by ci"]),
        (NEW, transitions.explain(NEW, "waiting: no worker"), None, []),
        (NEW, ASSIGNED, None, ["assigned to w"]),
        (ASSIGNED, transitions.unassign(ASSIGNED, "lost", BEGAN), None, ["unassigned from w: lost"]),
        (ASSIGNED, reported(ASSIGNED, status_message="starting"), 12.34, ["pulled in 12.3 s"]),
        (ASSIGNED, RUNNING, 1.0, ["pulled in 1.0 s", "booted"]),
        (ASSIGNED, reported(ASSIGNED, status="running"), None, ["booted"]),
        # A VM that was created stopped.
        (ASSIGNED, VM(STOPS.meta, STOPS.spec, replace(RUNNING.state, conditions=())), None, None),
        (RUNNING, reported(RUNNING, startup_exit_code=0), None, ["script ended with 0"]),
        (RUNNING, reported(RUNNING, startup_exit_code=3), None, ["script ended with 3"]),
        (RUNNING, REBOOTS, None, []),
        (REBOOTS, reported(REBOOTS, conditions=(Condition("running", "false"),)), None, []),
        (REBOOTS, reported(REBOOTS, observed_generation=1, conditions=UP), None, ["booted"]),
        (RUNNING, STOPS, None, ["stopping: powerState is stopped"]),
        (RUNNING, transitions.fail(RUNNING, "broken"), None, ["failed: broken"]),
        # The pull has failed, too.
        (ASSIGNED, transitions.fail(ASSIGNED, "no such image"), 1.0, ["failed: no such image"]),
        (
            transitions.fail(RUNNING, "broken"),
            transitions.restart(transitions.fail(RUNNING, "broken"), BEGAN),
            None,
            ["restarted, restart_count 1"],
        ),
    ],
)
def test_lifecycle_events_of_a_change(
    old: VM | None, new: VM, pull_seconds: float | None, found: list[str] | None
) -> None:
    texts = describe_change(old, new, pull_seconds)
    if found is None:
        assert "booted" not in texts
    else:
        assert texts == found


def test_reasons_are_cut() -> None:
    failed = transitions.fail(RUNNING, "x" * 100_000)
    (text,) = describe_change(RUNNING, failed, None)
    assert len(text) < 600
    assert len(ended_vm(failed, BEGAN).message) < 600


async def test_time_of_a_pull_is_counted_from_its_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = BEGAN

    def recorder(events: EventLog, history: History, clock: object) -> Recorder:
        return Recorder(events, history, lambda: now)

    monkeypatch.setattr("harness.served.Recorder", recorder)
    async with served(tmp_path) as api:
        uid = await _assigned(api)
        for seconds, message in ((100, "pulling image"), (7, "pulling image: 50 %"), (5, "starting")):
            now += datetime.timedelta(seconds=seconds)
            await api.ok("PUT", "/vms/vm/state", {"uid": uid, "status": "pending", "status_message": message})
        events = await api.ok("GET", "/vms/vm/events?kinds=lifecycle")
        assert events[-1]["payload"] == "pulled in 12.0 s"


async def _assigned(api: Served) -> str:
    await api.register("w")
    vm = await api.create("vm", metadata={"job": "7"})
    api.schedule()
    await api.store.wait_durable()
    return str(vm["uid"])


async def test_one_line_is_logged_at_the_end_of_a_vm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orchard.controller")
    async with served(tmp_path) as api:
        uid = await _assigned(api)
        caplog.clear()
        await api.ok("DELETE", "/vms/vm")
    (record,) = [record for record in caplog.records if vars(record).get("uid") == uid]
    fields = {
        name: vars(record)[name] for name in ("vm", "metadata", "worker", "image", "status", "restarts", "endedAt")
    }
    assert fields == {
        "vm": "vm",
        "metadata": '{"job":"7"}',
        "worker": "w",
        "image": "image",
        "status": "pending",
        "restarts": 0,
        "endedAt": "2026-01-31T12:00:00Z",
    }
