"""The scheduling loop and the reactions to durable changes, over the API: what they log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from harness.served import served

from orchard.auth import ROLES
from orchard.controller import DEFAULT_OFFLINE_TIMEOUT
from orchard.schema import ServiceAccount


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """Return message and named fields of each record of the controller's log, and clear it."""
    names = ("vm", "worker", "reason", "restarts", "seconds")
    records = [record for record in caplog.records if record.name == "orchard.controller"]
    caplog.clear()
    return [
        (record.getMessage(), {name: vars(record)[name] for name in names if name in vars(record)})
        for record in records
    ]


async def test_life_of_a_vm_and_its_worker_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served(tmp_path) as api:

        async def changed() -> list[tuple[str, dict[str, Any]]]:
            api.schedule()
            await api.store.wait_durable()
            return logged(caplog)

        await api.register("w")
        assert await changed() == [("worker registered", {"worker": "w"})]
        uid = (await api.create("vm", restart_policy="OnFailure"))["uid"]
        assert await changed() == [("VM created", {"vm": "vm"}), ("VM assigned", {"vm": "vm", "worker": "w"})]
        await api.ok("PUT", "/vms/vm/state", {"uid": uid, "status": "running"})
        (running,) = await changed()
        assert running == ("VM running", {"vm": "vm", "worker": "w", "seconds": running[1]["seconds"]})
        assert running[1]["seconds"] >= 0
        await api.ok("PUT", "/vms/vm/state", {"uid": uid, "status": "failed", "status_message": "broken"})
        assert await changed() == [
            ("VM failed", {"vm": "vm", "worker": "w", "reason": "broken"}),
            ("VM restarted", {"vm": "vm", "restarts": 1}),
            ("VM assigned", {"vm": "vm", "worker": "w"}),
        ]
        await api.ok("DELETE", "/vms/vm")
        await api.ok("DELETE", "/workers/w")
        ended = ("VM ended", {"vm": "vm", "worker": "w", "restarts": 1})
        assert await changed() == [ended, ("worker deleted", {"worker": "w"})]


async def test_worker_that_goes_offline_and_returns_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    caplog.set_level(logging.INFO)
    async with served(tmp_path) as api, trio.open_nursery() as nursery:
        await api.register("w")
        nursery.start_soon(api.loop.run)
        await trio.sleep(2 * DEFAULT_OFFLINE_TIMEOUT)
        assert logged(caplog) == [
            ("worker registered", {"worker": "w"}),
            ("worker offline", {"worker": "w", "reason": "offline"}),
        ]
        for second in (1, 2):
            await api.ok("PUT", "/workers/w", {"name": "w", "last_seen": f"2026-01-31T12:00:0{second}Z"})
        assert logged(caplog) == [("worker returned", {"worker": "w"})]
        nursery.cancel_scope.cancel()


async def test_vms_created_in_one_group_commit_are_logged_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with served(tmp_path) as api:
        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c"):
                nursery.start_soon(api.create, name)
        created = [fields["vm"] for message, fields in logged(caplog) if message == "VM created"]
        assert sorted(",".join(created).split(",")) == ["a", "b", "c"]
        assert len(created) == 1


async def test_log_names_the_account_that_created_a_vm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served(tmp_path, ServiceAccount("ci", token="t" * 16, roles=ROLES)) as api:
        for method, path, body in (("POST", "/vms", {"name": "vm", "image": "i"}), ("DELETE", "/vms/vm", None)):
            assert (await api.call(method, path, body, account=("ci", "t" * 16))).status == 200
    lines = {record.getMessage(): vars(record) for record in caplog.records}
    assert {text: lines[text]["createdBy"] for text in ("VM created", "VM ended")} == {
        "VM created": "ci",
        "VM ended": "ci",
    }
