"""The worker against a real controller on a loopback port: the look, what it finds on its host, what it reports."""

from __future__ import annotations

import datetime
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import trio
from harness.admission import Sender, admit_anybody
from harness.disks import no_room
from harness.inprocess import InProcessCluster
from harness.processes import eventually
from trio_websocket import WebSocketConnection

from orchard import controller, worker
from orchard.client import Client, ResponseError
from orchard.codec import dump_json
from orchard.net.request import AnyResponse, Request, Response, WebSocketUpgrade
from orchard.net.server import serve
from orchard.schema import TART_VMS, Status
from orchard.tart import TartDriver
from orchard.vm import supervisor
from orchard.vm.driver import DriverError, RunOptions
from orchard.vm.instance import SHUT_DOWN, STOPPED, Note
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import ACTIONS, LOST, Identity, RefusedError, WorkerService, pause_after


@pytest.fixture
async def cluster(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[InProcessCluster]:
    cluster = InProcessCluster(tmp_path, nursery)
    await cluster.start()
    yield cluster
    await cluster.stop()


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_table_says_for_every_pair_of_states_what_to_do() -> None:
    states = ("absent", *get_args(Status))
    assert set(ACTIONS) == set(itertools.product(states, states))
    # Whatever is here and wanted by nobody goes; whatever has failed on one side does not run on.
    assert {ACTIONS[here, "absent"] for here in states} == {"none", "remove"}
    assert {ACTIONS[here, "failed"] for here in states} == {"none", "stop"}


# ---- VMs -----------------------------------------------------------------------------------------------------------


async def test_what_a_worker_says_reaches_the_controller_at_once(cluster: InProcessCluster) -> None:
    async with cluster.working():
        with trio.fail_after(60):
            await cluster.client.vms.create(name="vm", image="any")
            async with cluster.client.vms.watch("vm") as changes:
                seen = []
                async for _, vm in changes:
                    seen.append((vm.state.status, vm.state.status_message))
                    if vm.state.status == "running":
                        break
    assert ("running", "") in seen
    assert vm.state.observed_generation == 1
    assert vm.state.image_fqn.startswith("any@sha256:")
    assert vm.condition("running")


async def test_a_changed_specification_is_followed_and_observed(cluster: InProcessCluster) -> None:
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any", suspendable=True)
        await cluster.client.vms.wait("vm")
        await cluster.client.vms.patch("vm", headless=True)
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.observed_generation == 2)
        assert vm.condition("running")
        await cluster.client.vms.patch("vm", powerState="suspended")
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.observed_generation == 3)
        assert (vm.state.status, vm.condition("running"), vm.resting) == ("running", False, True)
        assert [one.state for one in await cluster.driver().list_vms()] == ["suspended"]
        # It uses no resources any more, and another can be made of it.
        for name in ("a", "b"):
            await cluster.client.vms.create(name=name, image="any" if name == "a" else vm.tart_name)
            await cluster.client.vms.wait(name)


async def test_a_failed_vm_that_wants_it_is_started_again_elsewhere_or_here(cluster: InProcessCluster) -> None:
    async with cluster.working():
        script = {"script_content": "test -e ../../ran || { touch ../../ran; echo no; exit 1; }"}
        await cluster.client.vms.create(name="vm", image="any", restart_policy="OnFailure", startup_script=script)
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.restart_count == 1 and vm.state.status == "running")
        assert vm.tart_name.endswith("-1")
        await eventually(partial(one_left, cluster, vm.tart_name))


async def one_left(cluster: InProcessCluster, name: str) -> bool:
    return await cluster.local_vms() == [name]


async def test_a_deleted_vm_ends_before_another_takes_its_place(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.working(resources={TART_VMS: 1}) as mac:
        driver = mac._driver
        story: list[str] = []
        run = driver.run

        async def told_run(name: str, *args: Any, **kwargs: Any) -> None:
            story.append(f"ran {name}")
            try:
                await run(name, *args, **kwargs)
            finally:
                story.append(f"ended {name}")

        monkeypatch.setattr(driver, "run", told_run)
        await cluster.client.vms.create(name="first", image="any")
        first = await cluster.client.vms.wait("first")
        await cluster.client.vms.create(name="second", image="any")
        await cluster.wait_vm("second", lambda vm: vm.state.status_message.endswith("(1 wanted, 0 free)"))
        await cluster.client.vms.delete("first")
        second = await cluster.client.vms.wait("second")
        assert story.index(f"ran {second.tart_name}") > story.index(f"ended {first.tart_name}")


async def test_a_worker_that_was_deleted_comes_back_and_its_vm_is_gone(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        await cluster.client.workers.delete("mac")
        vm = await cluster.wait_vm("vm", lambda vm: vm.state.status == "failed")
        assert vm.state.status_message == 'worker "mac" was deleted'
        await eventually(partial(registered, cluster))


async def registered(cluster: InProcessCluster) -> bool:
    return [one.name for one in await cluster.client.workers.list()] == ["mac"]


async def has_beaten(cluster: InProcessCluster, milliseconds: int) -> None:
    """Wait for a heartbeat so much later than the last one."""
    before = (await cluster.client.workers.get("mac")).last_seen
    assert before is not None

    async def later() -> bool:
        now = (await cluster.client.workers.get("mac")).last_seen
        return now is not None and now > before + datetime.timedelta(milliseconds=milliseconds)

    await eventually(later)


async def test_heartbeats_leave_a_pause_alone(cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    async with cluster.working():
        await cluster.client.workers.pause("mac")
        await has_beaten(cluster, 40)
        assert (await cluster.client.workers.get("mac")).scheduling_paused
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.wait_vm("vm", lambda vm: vm.state.status_message == "waiting: 1 worker: 1 paused")
        await cluster.client.workers.pause("mac", paused=False)
        await cluster.client.vms.wait("vm")


class Proxy:
    """Between worker and controller; it can stop saying anything on the connections that it has, without closing them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._silenced = trio.Event()
        self.connections = 0

    def silence(self) -> None:
        self._silenced.set()
        self._silenced = trio.Event()
        self.connections = 0

    async def serve(self, near: trio.SocketStream) -> None:
        self.connections += 1
        silenced = self._silenced
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, near, far, silenced)
            nursery.start_soon(self._pump, far, near, silenced)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, silenced: trio.Event) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in source:
                if not silenced.is_set():
                    await sink.send_all(data)
            await sink.send_eof()


async def test_a_controller_that_is_gone_without_a_word_is_found_by_its_silence(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    proxy = Proxy(cluster.port)
    listeners = await nursery.start(trio.serve_tcp, proxy.serve, 0)
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with Client(url, answer_seconds=0.2) as client:
        scope = trio.CancelScope()

        async def work(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await cluster.worker(client).run(task_status=task_status)

        await nursery.start(work)
        proxy.silence()
        await eventually(lambda: proxy.connections > 0)
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
        scope.cancel()
    nursery.cancel_scope.cancel()


async def test_a_clock_that_was_set_back_does_not_stop_heartbeats(cluster: InProcessCluster) -> None:
    async with Client(cluster.client.url) as client:
        times = iter([2_000_000_000.0, 1_000_000_000.0, 1_000_000_001.0])
        mac = cluster.worker(client)
        mac._clock = lambda: next(times)
        stamps = [mac._now() for _ in range(3)]
    assert stamps == sorted(set(stamps))


async def test_a_last_seen_at_the_end_of_time_is_survived(cluster: InProcessCluster) -> None:
    await cluster.client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 1}})
    await cluster.client.workers.put("mac", {"last_seen": "9999-12-31T23:59:59.999999Z"})
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")


async def test_output_waits_for_a_controller_that_is_away(cluster: InProcessCluster) -> None:
    async with cluster.working():
        script = {"script_content": "echo before; while test ! -e ../go; do :; done; echo after"}
        await cluster.client.vms.create(name="vm", image="any", startup_script=script)
        vm = await cluster.client.vms.wait("vm")
        await eventually(partial(printed, cluster, ["before"]))
        await cluster.stop()
        (cluster.home / "vms" / "mac" / vm.tart_name / "go").touch()
        await cluster.start()
        await eventually(partial(printed, cluster, ["before", "after"]))
        assert (await cluster.client.vms.get("vm")).state.status == "running"


async def test_output_waits_for_a_controller_whose_disk_is_full(cluster: InProcessCluster) -> None:
    cluster.events_disk.fault = no_room
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any", startup_script={"script_content": "echo said"})
        await eventually(lambda: len(cluster.events_disk.failed) > 1)
        assert await printed(cluster, [])
        cluster.events_disk.fault = lambda verb, number: 0
        await eventually(partial(printed, cluster, ["said"]))


async def printed(cluster: InProcessCluster, lines: list[str]) -> bool:
    return [event.payload async for event in cluster.client.vms.events("vm")] == lines


# ---- what an earlier worker left -----------------------------------------------------------------------------------


async def test_only_what_is_ours_and_wanted_by_nobody_is_deleted_at_the_start(cluster: InProcessCluster) -> None:
    driver = cluster.driver()
    for name in ("orchard-old-uid-0", "mine", "not-orchard-x"):
        await driver.clone("image", name, lambda _: None)
    async with cluster.working():
        assert sorted(await cluster.local_vms()) == ["mine", "not-orchard-x"]


async def test_what_cannot_be_deleted_at_the_start_is_deleted_later(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "AGAIN_SECONDS", 0.01)
    driver, failures = cluster.driver(), iter(range(3))
    await driver.clone("image", "orchard-old-uid-0", lambda _: None)
    delete = driver.delete

    async def unwilling(name: str) -> None:
        for _ in failures:
            raise DriverError("not now")
        await delete(name)

    monkeypatch.setattr(driver, "delete", unwilling)
    async with cluster.working():
        await eventually(partial(nothing_left, cluster))


async def test_what_still_runs_at_the_start_keeps_its_place_until_it_has_ended(
    cluster: InProcessCluster, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "AGAIN_SECONDS", 0.01)
    driver, old = cluster.driver(), "orchard-old-uid-0"
    await driver.clone("image", old, lambda _: None)
    await nursery.start(driver.run, old, RunOptions())
    stop, clone = driver.stop, driver.clone
    places: list[bool] = []
    assigned = False
    attempts = 0

    async def unwilling(name: str) -> None:
        nonlocal attempts
        attempts += assigned
        if attempts < 10:
            raise DriverError("not now")
        await stop(name)

    async def watched(source: str, name: str, on_progress: Callable[[int], None]) -> None:
        places.append(old not in await cluster.local_vms())
        await clone(source, name, on_progress)

    monkeypatch.setattr(driver, "stop", unwilling)
    monkeypatch.setattr(driver, "clone", watched)
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.wait_vm("vm", lambda vm: bool(vm.state.worker))
        assigned = True
        await cluster.client.vms.wait("vm")
    assert places == [True]


async def test_vms_outlive_their_worker_and_the_next_one_goes_on_with_them(cluster: InProcessCluster) -> None:
    async with cluster.working(stop_vms=False, resources={TART_VMS: 4}):
        for name in ("resting", "running", "gone", "unwanted"):
            await cluster.client.vms.create(name=name, image="any")
            await cluster.client.vms.wait(name)
        await cluster.client.vms.patch("resting", powerState="stopped")
        await cluster.wait_vm("resting", lambda vm: vm.resting)
        before = {vm.name: vm for vm in await cluster.client.vms.list()}
    assert len(await cluster.local_vms()) == 4
    await cluster.driver().stop(before["gone"].tart_name)
    await cluster.client.vms.delete("unwanted")
    async with cluster.working(stop_vms=False, resources={TART_VMS: 4}):
        lost = await cluster.wait_vm("gone", lambda vm: vm.state.status == "failed")
        assert lost.state.status_message == LOST
        assert await cluster.client.vms.get("running") == before["running"]
        assert await cluster.client.vms.get("resting") == before["resting"]
        states = {vm.name: vm.state for vm in await cluster.driver().list_vms()}
        assert states == {
            before["running"].tart_name: "running",
            before["resting"].tart_name: "stopped",
            before["gone"].tart_name: "stopped",
        }
        # It is looked after as ever: its end is seen, and told.
        await cluster.driver().stop(before["running"].tart_name)
        failed = await cluster.wait_vm("running", lambda vm: vm.state.status == "failed")
        assert failed.state.status_message == SHUT_DOWN
        for name in ("resting", "running", "gone"):
            await cluster.client.vms.delete(name)
        await eventually(partial(nothing_left, cluster))


async def test_a_rest_that_came_while_there_was_no_worker_is_no_failure(cluster: InProcessCluster) -> None:
    async with cluster.working(stop_vms=False):
        await cluster.client.vms.create(name="vm", image="any")
        vm = await cluster.client.vms.wait("vm")
    await cluster.client.vms.patch("vm", powerState="stopped")
    await cluster.driver().stop(vm.tart_name)  # as a worker does that is killed before it can say so
    async with cluster.working():
        await cluster.wait_vm("vm", lambda vm: vm.resting)


async def test_what_was_started_but_not_yet_told_is_gone_on_with(cluster: InProcessCluster) -> None:
    await cluster.client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 2}})
    await cluster.client.vms.create(name="vm", image="any")
    vm = await cluster.wait_vm("vm", lambda vm: vm.state.worker == "mac")
    driver = cluster.driver()
    await driver.clone("any", vm.tart_name, lambda _: None)
    driver.note(vm.tart_name, str(Note(1, (4, 8192, 0), suspendable=False)))
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run, vm.tart_name, RunOptions())
        nursery.cancel_scope.cancel()
    async with cluster.working():
        await cluster.wait_vm(
            "vm", lambda vm: vm.state.status == "running" and vm.state.image_fqn.startswith("any@sha256:")
        )


async def test_a_worker_that_stops_its_vms_says_so(cluster: InProcessCluster) -> None:
    async with cluster.working():
        await cluster.client.vms.create(name="vm", image="any")
        await cluster.client.vms.wait("vm")
    vm = await cluster.client.vms.get("vm")
    assert (vm.state.status, vm.state.status_message) == ("failed", STOPPED)
    assert await cluster.local_vms() == []


async def test_a_failure_is_told_when_the_guest_has_ended(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = cluster.driver()
    ended = trio.Event()
    stop = driver.stop

    async def slow(name: str) -> None:
        await ended.wait()
        await stop(name)

    monkeypatch.setattr(driver, "stop", slow)
    async with cluster.working():
        script = {"script_content": "echo begun; exit 1"}
        await cluster.client.vms.create(name="vm", image="any", startup_script=script)
        await eventually(partial(printed, cluster, ["begun"]))
        await cluster.client.vms.create(name="other", image="any")
        await cluster.client.vms.wait("other")
        assert (await cluster.client.vms.get("vm")).state.status == "running"
        ended.set()
        await cluster.wait_vm("vm", lambda vm: vm.state.status == "failed")


async def test_vms_that_could_run_elsewhere_end_before_the_controller_starts_them_there(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    cluster = InProcessCluster(tmp_path, nursery, worker_offline_timeout=3.0)
    await cluster.start()
    async with cluster.working(stop_vms=False):
        for policy in ("Never", "OnFailure"):
            await cluster.client.vms.create(name=policy, image="any", restart_policy=policy)
            await cluster.client.vms.wait(policy)
        names = {vm.name: vm.tart_name for vm in await cluster.client.vms.list()}
        await cluster.stop()
        await eventually(partial(runs_alone, cluster, names["Never"]))
        await cluster.start()
        again = await cluster.wait_vm(
            "OnFailure", lambda vm: vm.state.restart_count == 1 and vm.state.status == "running"
        )
        assert again.tart_name != names["OnFailure"]
        assert (await cluster.client.vms.get("Never")).state.status == "running", (
            "nobody would have started it elsewhere"
        )
    await cluster.stop()


async def test_no_lease_is_renewed_while_a_vm_runs_that_the_controller_has_given_up(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started elsewhere as long after the worker was deleted as a lease lasts."""
    monkeypatch.setattr(worker, "HEARTBEAT_SECONDS", 0.02)
    driver, allowed = cluster.driver(), trio.Event()
    stop, lease = driver.stop, driver.lease
    renewed: list[bool] = []

    async def slow(name: str) -> None:
        await allowed.wait()
        await stop(name)

    def noted(soft: float, hard: float) -> None:
        renewed.append(allowed.is_set())
        lease(soft, hard)

    monkeypatch.setattr(driver, "stop", slow)
    async with cluster.working(stop_vms=False):
        await cluster.client.vms.create(name="vm", image="any", restart_policy="OnFailure")
        await cluster.client.vms.wait("vm")
        await cluster.client.workers.delete("mac")
        await eventually(partial(registered, cluster))
        monkeypatch.setattr(driver, "lease", noted)
        await has_beaten(cluster, 80)
        allowed.set()
        await eventually(lambda: bool(renewed))
        assert all(renewed)
        assert "running" not in {vm.state for vm in await driver.list_vms()}
        await cluster.client.vms.delete("vm")


async def test_a_lease_is_no_longer_for_a_worker_that_stands_still_while_it_renews_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        supervisor, "clock", partial(next, itertools.count(1000.0, 100.0))
    )  # between any two looks at it
    async with Client("http://127.0.0.1:1") as client:
        identity = Identity(name="mac", arch="arm64", runtime="tart", machine_id="m", resources={})
        mac = WorkerService(identity, client, TartDriver("/none", tmp_path), lease_clock=supervisor.clock)
        mac._ending = []
        mac._renew(supervisor.clock())
        until = [1000.0 + share * worker.OFFLINE_TIMEOUT for share in (worker.SOFT, worker.HARD)]
        assert list(supervisor.read_lease(tmp_path / "lease")) == pytest.approx(until)


async def runs_alone(cluster: InProcessCluster, name: str) -> bool:
    return [vm.name for vm in await cluster.driver().list_vms() if vm.state == "running"] == [name]


async def nothing_left(cluster: InProcessCluster) -> bool:
    return await cluster.local_vms() == []


async def test_what_was_half_made_is_made_again(cluster: InProcessCluster) -> None:
    await cluster.client.workers.register({"name": "mac", "machine_id": "m", "resources": {TART_VMS: 2}})
    await cluster.client.vms.create(name="vm", image="any")
    vm = await cluster.wait_vm("vm", lambda vm: vm.state.worker == "mac")
    await cluster.driver().clone("half", vm.tart_name, lambda _: None)
    async with cluster.working():
        assert (await cluster.client.vms.wait("vm")).state.restart_count == 0
        assert await cluster.local_vms() == [vm.tart_name]


# ---- coming back ---------------------------------------------------------------------------------------------------


async def test_each_session_that_breaks_is_followed_by_a_pause_of_chance_however_short_it_was(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []

    def noted(count: int, chance: float) -> float:
        failures.append(count)
        return pause_after(count, chance)

    monkeypatch.setattr(worker, "pause_after", noted)
    async with cluster.working() as mac:
        for arrivals in (1, 2, 3):
            await eventually(partial(has_arrived, mac, arrivals))
            failures.clear()
            await cluster.stop()
            await eventually(lambda: len(failures) >= 2)
            assert failures[:2] == [0, 1]
            await cluster.start()
        await eventually(partial(has_arrived, mac, 4))


def has_arrived(mac: WorkerService, times: int) -> bool:
    return mac._arrivals == times


def test_a_thousand_workers_come_back_within_two_seconds_and_never_at_once() -> None:
    order = random.Random(1)
    for away in (0.0, 0.5, 3.0, 60.0):  # seconds, from when all sessions break to the controller's return
        returns = []
        for _ in range(1000):
            at = 0.0
            for failures in itertools.count():
                at += pause_after(failures, order.random())
                if at >= away:
                    break
            returns.append(at - away)
        assert max(returns) < 2.0
        crowds = Counter(int(at * 10) for at in returns)
        assert max(crowds.values()) < 250, f"of 1,000 in a tenth of a second, after {away} seconds: {crowds}"


# ---- being let in --------------------------------------------------------------------------------------------------


async def test_a_name_that_another_machine_has_is_refused_until_it_is_free(cluster: InProcessCluster) -> None:
    await cluster.client.workers.register({"name": "mac", "machine_id": "another"})
    async with Client(cluster.client.url) as client, trio.open_nursery() as nursery:
        mac = cluster.worker(client)
        with pytest.raises(ResponseError, match="give this one another name"):
            await mac._register()
        nursery.start_soon(mac.run)
        await cluster.client.workers.delete("mac")
        await eventually(lambda: mac._settled)
        nursery.cancel_scope.cancel()


async def test_a_worker_that_was_never_let_in_gives_up(tmp_path: Path, nursery: trio.Nursery) -> None:
    settings = controller.ControllerSettings(data_dir=tmp_path / "c", host="127.0.0.1", port=0, tls=False)
    running: controller.Running = await nursery.start(partial(controller.run, settings))
    async with Client(running.url, account="nobody", token="t") as client:
        identity = Identity(name="w", arch="arm64", runtime="tart", machine_id="m", resources={})
        with pytest.raises(RefusedError, match="does not exist"):
            await WorkerService(identity, client, SyntheticDriver(tmp_path / "vms")).run()
    nursery.cancel_scope.cancel()


# ---- a controller that means harm ----------------------------------------------------------------------------------


class Impostor:
    """Lets workers in, says over their watch what it was given to say, and answers nothing that they bring for it."""

    def __init__(self, *actions: object) -> None:
        self._actions = actions
        self.brought: list[tuple[str, str | None]] = []  # path, and the error that it names

    async def handle(self, request: Request, _: Sender) -> AnyResponse:
        answers: dict[str, object] = {"/v1/workers": {"name": "mac"}, "/v1/controller/info": {}, "/v1/vms": []}
        if request.path in answers:
            return Response(200, dump_json(answers[request.path]))
        if request.path == "/v1/rpc/watch":
            return WebSocketUpgrade(self._watch)
        self.brought.append((request.path.removeprefix("/v1/rpc/"), request.query.one("errorMessage")))
        await trio.sleep_forever()
        raise AssertionError

    async def _watch(self, websocket: WebSocketConnection) -> None:
        for action in self._actions:
            await websocket.send_message(dump_json(action))
        await trio.sleep_forever()

    @asynccontextmanager
    async def working(self, cluster: InProcessCluster) -> AsyncIterator[None]:
        """Have a worker listen to it."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, self.handle, listeners, admit=admit_anybody))
            async with Client(url) as client:
                await nursery.start(cluster.worker(client).run)
                yield
                nursery.cancel_scope.cancel()


def forward(port: object, session: object = "s") -> object:
    return {"portForwardAction": {"session": session, "vmUID": "", "port": port}}


async def test_actions_that_make_no_sense_are_passed_over(
    cluster: InProcessCluster, caplog: pytest.LogCaptureFixture
) -> None:
    senseless = [forward(port) for port in (0, -1, 65536, 10**19, "22", None)]
    senseless += [forward(22, 7), {"portForwardAction": {}}, {"resolveIPAction": []}, {"a\nb": 1}, {}]
    impostor = Impostor(*senseless, {"resolveIPAction": {"session": "s", "vmUID": "none"}})
    async with impostor.working(cluster):
        await eventually(lambda: impostor.brought == [("resolve-ip", "no VM with uid none runs here")])
    passed_over = [record for record in caplog.records if record.getMessage() == "an unknown action was passed over"]
    assert len(passed_over) == len(senseless)


async def test_what_a_controller_can_have_a_worker_do_at_once_is_bounded(
    cluster: InProcessCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "MAX_TUNNELS", 2)
    monkeypatch.setattr(worker, "MAX_ERRANDS", 3)
    async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listener:
        port = listener.socket.getsockname()[1]
        impostor = Impostor(*[forward(port)] * 5)
        async with impostor.working(cluster):
            await eventually(lambda: len(impostor.brought) == 3)
            await eventually(lambda: caplog.text.count("an action was passed over") == 2)
    assert sorted(impostor.brought) == [
        ("port-forward", ""),
        ("port-forward", ""),
        ("port-forward", "2 tunnels are open already, expected less"),
    ]
