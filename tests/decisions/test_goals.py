"""Requests that wait for a VM: what holds, what never will, and what becomes of a wait whatever happens to the VM."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
import trio.testing
from harness.disks import FailingDisk, HeldDisk, UnsyncedDisk
from harness.inprocess import InProcessCluster
from harness.processes import GENEROUS
from harness.served import Answered, Served, served
from harness.strategies import BEGAN, QUICK, assigned, failed, pending, resting, running, worker
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard.client import Client, ResponseError
from orchard.decisions.goals import Goal, is_reached, why_never
from orchard.resources.bodies import VMReport
from orchard.resources.cluster import VM_READY
from orchard.schema import VM, Condition
from orchard.testing import cluster
from orchard.transitions import report, restart

GOALS: tuple[Goal, ...] = get_args(Goal)
OURS = worker(capabilities=(VM_READY,))


def ready(vm: VM) -> VM:
    seen = VMReport(conditions=(Condition("running", "true"), Condition("ready", "true")), startup_exit_code=0)
    return report(running(vm), seen, BEGAN)


def script_failed(vm: VM, code: int | None = 3) -> VM:
    seen = VMReport(conditions=(Condition("ready", "false"),), startup_exit_code=code, startup_ended_at=BEGAN)
    return report(running(vm), seen, BEGAN)


def stopping(vm: VM) -> VM:
    return replace(running(vm), spec=replace(vm.spec, power_state="stopped"))


def rebooting(vm: VM) -> VM:
    """Return a running VM that its worker has stopped to apply a generation."""
    runs = running(vm)
    changed = replace(runs, meta=replace(runs.meta, generation=1))
    return report(changed, VMReport(conditions=(Condition("running", "false"),)), BEGAN)


ALWAYS = {"restart_policy": "OnFailure"}
KEPT = pending(startup_on_failure="keep")
# By name: the VM, the goals that hold, those that never will.
STATES: dict[str, tuple[VM, str, str]] = {
    "pending": (pending(), "", ""),
    "assigned": (assigned(pending()), "", ""),
    "running": (running(pending()), "running", ""),
    "reported by status alone": (report(assigned(pending()), VMReport(status="running"), BEGAN), "running", ""),
    "rebooting": (rebooting(pending()), "", ""),
    "ready": (ready(pending()), "running ready", ""),
    "script failed": (script_failed(KEPT), "running", "ready"),
    "script did not begin": (script_failed(KEPT, None), "running", "ready"),
    "script failed and the VM will": (script_failed(pending()), "running", ""),
    "failed": (failed(pending()), "failed", "running ready stopped"),
    "failed and to be restarted": (failed(pending(restart_policy="OnFailure")), "failed", ""),
    "restarted": (restart(failed(pending(restart_policy="OnFailure")), BEGAN), "", ""),
    "stopping": (stopping(pending()), "running", ""),
    "stopped": (resting(pending()), "stopped", "running ready"),
    "suspended": (resting(pending(), power_state="suspended"), "stopped", "running ready"),
    "stopped before it ran": (pending(power_state="stopped"), "", "running ready"),
}


@pytest.mark.parametrize("name", STATES)
def test_what_holds_and_what_never_will(name: str) -> None:
    vm, reached, never = STATES[name]
    assert [goal for goal in GOALS if is_reached(vm, goal)] == [goal for goal in GOALS if goal in reached.split()]
    found = [goal for goal in GOALS if not is_reached(vm, goal) and why_never(vm, goal, OURS)]
    assert found == [goal for goal in GOALS if goal in never.split()]


@pytest.mark.parametrize("name", ["assigned", "running", "rebooting", "stopping"])
def test_ready_never_holds_on_a_worker_that_does_not_report_it(name: str) -> None:
    vm = STATES[name][0]
    assert VM_READY in why_never(vm, "ready", worker())
    # A worker that is not registered any more tells nothing about the next one.
    assert why_never(vm, "ready", None) == ""


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, disk=UnsyncedDisk()) as serving:
        yield serving


async def assign_vm(api: Served, name: str = "vm", **fields: Any) -> Any:
    """Create a VM, and have it assigned."""
    await api.register("w", capabilities=["worker-state", VM_READY])
    await api.ok("PUT", "/workers/w", {"last_seen": "2026-01-31T12:00:01Z", "settled": True})
    await api.create(name, **fields)
    api.schedule()
    assert api.state.vms[name].state.worker == "w"
    return await api.ok("GET", f"/vms/{name}")


async def tell(api: Served, *, name: str = "vm", **seen: object) -> None:
    conditions = [{"type": kind, "state": seen.pop(kind)} for kind in ("running", "ready") if kind in seen]
    run = api.state.vms[name].state.restart_count
    await api.ok("PUT", f"/vms/{name}/state", {"restart_count": run, "conditions": conditions, **seen})


async def test_wait_ends_when_it_holds(api: Served) -> None:
    await assign_vm(api)
    answers: list[tuple[Goal, Answered]] = []

    async def wait(goal: Goal) -> None:
        answers.append((goal, await api.call("GET", f"/vms/vm?waitFor={goal}")))

    ends: list[tuple[dict[str, str], Goal]] = [
        ({"status": "running", "running": "true"}, "running"),
        ({"ready": "true"}, "ready"),
        ({"running": "false"}, "stopped"),
        ({"status": "failed", "status_message": "broken"}, "failed"),
    ]
    async with trio.open_nursery() as nursery:
        for goal in GOALS:
            nursery.start_soon(wait, goal)
        await trio.testing.wait_all_tasks_blocked()
        for number, (seen, goal) in enumerate(ends, 1):
            if goal == "stopped":
                await api.ok("PATCH", "/vms/vm", {"powerState": "stopped"})
                await trio.testing.wait_all_tasks_blocked()
                assert len(answers) == 2
            await tell(api, **seen)
            await trio.testing.wait_all_tasks_blocked()
            last = await api.ok("GET", "/vms/vm")
            assert (len(answers), answers[-1][0], answers[-1][1].body) == (number, goal, last)
        await api.ok("DELETE", "/vms/vm")
    assert (answers[-1][0], answers[-1][1].body) == ("deleted", last)
    assert [answered.status for _, answered in answers] == [200] * 5


async def test_wait_that_is_not_over_in_time_says_why_the_vm_waits(
    api: Served, autojump_clock: trio.testing.MockClock
) -> None:
    await api.create("vm")
    api.schedule()
    reason = api.state.vms["vm"].state.status_message
    for query, seconds in (("", 60), ("&wait=5", 5), ("&wait=0", 0), ("&wait=65535", 65_535)):
        began = trio.current_time()
        late = await api.call("GET", f"/vms/vm?waitFor=running{query}")
        assert trio.current_time() - began == seconds
        assert (late.status, late.headers["retry-after"]) == (503, "1")
        assert reason in late.message


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("waitFor=gone", 400),
        ("waitFor=running&wait=-1", 400),
        ("waitFor=running&wait=65536", 400),
        ("waitFor=running&waitFor=ready", 400),
        ("waitFor=running&watch=true", 400),
        ("waitFor=running&uid=another", 404),
        ("waitFor=deleted&uid=another", 404),
        ("uid=another", 404),
        ("waitFor=", 200),
        ("waitFor=&wait=5", 200),
    ],
)
async def test_parameters_of_a_wait(api: Served, query: str, status: int) -> None:
    await api.create("vm")
    assert (await api.call("GET", f"/vms/vm?{query}")).status == status


@pytest.mark.parametrize("goal", GOALS)
async def test_wait_for_a_vm_that_does_not_exist_is_not_found(api: Served, goal: Goal) -> None:
    assert (await api.call("GET", f"/vms/vm?waitFor={goal}")).status == 404


async def test_wait_is_answered_with_what_is_durable(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A write that fails takes back what a wait has seen in memory. The wait goes on."""
    disk = FailingDisk()
    async with served(tmp_path, disk=disk) as api:
        await assign_vm(api)
        before = disk.calls.count("write")
        disk.fault = lambda verb, _: errno.EIO if verb == "write" and disk.calls.count("write") == before else 0
        answers: dict[str, Answered] = {}

        async def call(name: str, method: str, target: str, body: object = ...) -> None:
            answers[name] = await api.call(method, target, body)

        report_body = {"status": "running", "conditions": [{"type": "running", "state": "true"}]}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, "report", "PUT", "/vms/vm/state", report_body)
            while api.state.vms["vm"].state.status != "running":
                await trio.lowlevel.checkpoint()
            nursery.start_soon(call, "wait", "GET", "/vms/vm?waitFor=running&wait=5")
        assert answers["report"].status == 503
        assert (answers["wait"].status, answers["wait"].headers["retry-after"]) == (503, "1")
        await call("report", "PUT", "/vms/vm/state", report_body)
        await call("wait", "GET", "/vms/vm?waitFor=running&wait=5")
        assert [answers[name].status for name in ("report", "wait")] == [200, 200]


# ---- any sequence of events ------------------------------------------------------------------------------------------

ACTIONS = ("run", "ready", "script failed", "fail", "restart", "stop", "stopped", "delete", "create", "other")


async def act(api: Served, action: str, policy: str) -> None:
    """Do something to the VM, if it can be done now."""
    vm = api.state.vms.get("vm")
    if vm is None:
        if action == "create":
            await api.create("vm", restart_policy=policy)
            api.schedule()
        return
    if action in ("create", "other"):
        await api.call("PATCH", "/vms/vm", {"metadata": {"version": str(vm.meta.version)}})
    elif action == "delete":
        await api.ok("DELETE", "/vms/vm")
    elif action == "restart":
        if vm.state.status == "failed" and vm.spec.restart_policy == "OnFailure":
            with api.store.transaction() as tx:
                tx.put(restart(vm, BEGAN))
            await api.store.wait_durable()
            api.schedule()
    elif action == "stop":
        await api.call("PATCH", "/vms/vm", {"powerState": "stopped"})
    elif vm.state.worker:
        reports: dict[str, dict[str, Any]] = {
            "run": {"status": "running", "running": "true"},
            "ready": {"ready": "true", "startupExitCode": 0},
            "script failed": {"ready": "false", "startupExitCode": 1},
            "fail": {"status": "failed", "status_message": "broken"},
            "stopped": {"running": "false"},
        }
        await tell(api, **reports[action])


def expected(history: list[VM | None], uid: str, goal: Goal) -> tuple[int, int | None]:
    """Return the status, and the version of the VM in the answer, of a wait that saw these states."""
    last: VM | None = None
    for vm in history:
        if vm is None or vm.uid != uid:
            assert last is not None
            return (200, last.meta.version) if goal == "deleted" else (404, None)
        if is_reached(vm, goal):
            return 200, vm.meta.version
        if why_never(vm, goal, OURS):
            return 503, None
        last = vm
    return 503, None


# A state that holds for a moment, and one that could be taken for the end.
@pytest.mark.slow
@example(["run", "fail"], 0, "running", "Never", True)
@example(["run", "fail", "restart"], 0, "failed", "OnFailure", True)
@example(["delete", "create", "run"], 0, "running", "Never", True)
@settings(QUICK, max_examples=50)
@given(
    st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=12),
    st.integers(0, 6),
    st.sampled_from(GOALS),
    st.sampled_from(["Never", "OnFailure"]),
    st.booleans(),
)
def test_wait_sees_the_first_state_that_decides(
    actions: list[str], start: int, goal: Goal, policy: str, together: bool
) -> None:
    """`together`: all that happens becomes durable at once, after the first write."""

    # Time passes only once all that happens is durable.
    clock = trio.testing.MockClock()

    async def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            disk = HeldDisk()
            async with served(Path(directory), disk=disk) as api:
                await assign_vm(api, restart_policy=policy)
                for action in actions[:start]:
                    await act(api, action, policy)
                vm = api.state.vms.get("vm")
                history: list[VM | None] = [vm]
                api.store.on_durable(lambda changes: history.extend(c.new for c in changes if c.kind == "vm"))  # type: ignore[misc]
                answers: list[Answered] = []

                async def wait() -> None:
                    answers.append(await api.call("GET", f"/vms/vm?waitFor={goal}&wait=3"))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    await trio.testing.wait_all_tasks_blocked()
                    async with trio.open_nursery() as acting:
                        with disk.held() if together else nullcontext():
                            for action in actions[start:]:
                                acting.start_soon(act, api, action, policy)
                                await trio.testing.wait_all_tasks_blocked()
                    await trio.testing.wait_all_tasks_blocked()
                    clock.jump(3)
                if vm is None:
                    assert answers[0].status == 404
                    return
                status, version = expected(history, vm.uid, goal)
                assert answers[0].status == status, (answers[0], history)
                assert status != 200 or answers[0].body["version"] == version

    trio.run(run, clock=clock)


# ---- what ends a wait -----------------------------------------------------------------------------------------------


async def test_wait_whose_client_has_gone_leaves_nothing_behind(api: Served) -> None:
    await api.create("vm")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(api.call, "GET", "/vms/vm?waitFor=running")
        await trio.testing.wait_all_tasks_blocked()
        assert api.store._watchers != {}
        nursery.cancel_scope.cancel()
    assert api.store._watchers == {}


class Waits:
    """Requests that wait over real sockets, and the status of each that has ended."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.statuses: dict[str, int] = {}
        self._nursery = nursery
        self._ended: dict[str, trio.Event] = {}

    async def begin(self, name: str, client: Client, query: str) -> None:
        """Begin a wait, and return when it waits at the controller."""
        self._ended[name] = trio.Event()
        self._nursery.start_soon(self._run, name, client, query)
        await trio.testing.wait_all_tasks_blocked(0.01)
        # The wait is there by the time that a request on a new connection is answered.
        await client.vms.get("vm")

    async def _run(self, name: str, client: Client, query: str) -> None:
        try:
            self.statuses[name] = (await client.request("GET", f"/vms/vm?{query}")).status
        except ResponseError as error:
            self.statuses[name] = error.status
        self._ended[name].set()

    async def end(self, name: str) -> int:
        with trio.fail_after(GENEROUS):
            await self._ended[name].wait()
        return self.statuses[name]


async def test_waits_end_with_the_role_of_their_account_and_with_their_vm(nursery: trio.Nursery) -> None:
    waits = Waits(nursery)
    async with cluster(workers=0, auth=True) as c:
        await c.client.vms.create(name="vm", image="any")
        guest = await c.client.service_accounts.create("guest", roles=["compute:read"])
        async with Client(c.url, account="guest", token=guest.token) as client:
            await waits.begin("guest", client, "waitFor=running&wait=3600")
            await waits.begin("admin", c.client, "waitFor=running&wait=3600")
            await waits.begin("deletion", c.client, "waitFor=deleted&wait=3600")
            await c.client.service_accounts.replace("guest", roles=[])
            assert await waits.end("guest") == 403
            assert waits.statuses == {"guest": 403}
        await c.client.vms.delete("vm")
        await c.client.vms.create(name="vm", image="any")
        assert (await waits.end("admin"), await waits.end("deletion")) == (404, 200)


async def test_wait_is_sent_again_after_a_restart_of_the_controller(tmp_path: Path, nursery: trio.Nursery) -> None:
    waits = Waits(nursery)
    c = InProcessCluster(tmp_path, nursery)
    await c.start()
    uid = (await c.client.vms.create(name="vm", image="any")).uid
    query = f"waitFor=running&wait=3600&uid={uid}"
    async with Client(c.client.url) as client:
        await waits.begin("before", client, query)
        await c.stop()
        assert await waits.end("before") == 503
        await c.start()
        await waits.begin("after", client, query)
        async with c.working():
            assert await waits.end("after") == 200
    await c.stop()
