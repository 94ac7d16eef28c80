"""`orchard.testing` and the pytest fixture, as another project's test suite uses them."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import ssl
import tempfile
import threading
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from harness.processes import GENEROUS, eventually

from orchard.blocking import open_client
from orchard.client import ConnectError, ResponseError, VMFailed, WatchedChange
from orchard.controller import StartError
from orchard.schema import VM, Event, StartupScript, Worker
from orchard.testing import CLUSTER_LOG, BlockingCluster, cluster, start_cluster

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def traces() -> tuple[int, list[str], list[str]]:
    """Return what a cluster could leave behind: open files, directories, and threads, except those that trio keeps."""
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if "trio" not in thread.name.lower()]
    return len(os.listdir("/dev/fd")), os.listdir(tempfile.gettempdir()), threads  # noqa: PTH208


async def test_vm_runs_its_script_and_leaves_nothing_when_deleted(tmp_path: Path) -> None:
    async with cluster(workers=1, directory=tmp_path) as c:
        script = {"script_content": 'echo "$A"\necho error >&2\n', "env": {"A": "it's `$HOME`"}}
        await c.client.vms.create(name="vm", image="any", startup_script=script)
        vm = await c.client.vms.wait("vm")
        assert vm.state.worker == "worker-1"
        events: list[Event] = []

        async def has_printed() -> bool:
            events[:] = [event async for event in c.client.vms.events("vm")]
            return len(events) == 2

        await eventually(has_printed)
        assert [(event.kind, event.payload) for event in events] == [
            ("log_line", "it's `$HOME`"),
            ("log_line", "error"),
        ]
        directories = list((tmp_path / "vms" / "worker-1").glob("orchard-vm-*"))
        assert len(directories) == 1
        async with c.client.vms.watch("vm") as changes:
            await c.client.vms.delete("vm")
            assert [kind async for kind, _ in until_deleted(changes)] == ["DELETED"]
        await c.client.vms.create(name="other", image="any", resources={"org.cirruslabs.tart-vms": 2})
        assert (await c.client.vms.wait("other")).state.worker == "worker-1", "the slot is free again"
    assert not list((tmp_path / "vms").glob("*/*"))


async def until_deleted(changes: Any) -> Any:
    async for kind, vm in changes:
        if kind == "DELETED":
            yield kind, vm
            return


def test_methods_of_a_blocking_cluster() -> None:
    before = traces()
    with start_cluster(workers=2) as c:
        assert [worker.name for worker in c.client.workers.list()] == ["worker-1", "worker-2"]
        c.client.vms.create(name="good", image="any")
        assert c.client.vms.wait("good").state.status == "running"
        c.client.vms.create(name="bad", image="any", startup_script={"script_content": "echo last words; exit 3"})
        with c.client.vms.watch("bad") as changes:
            failed = next(vm for _, vm in changes if vm.state.status == "failed")
        assert failed.state.status_message == "startup script failed with exit code 3: last words"
        assert [event.payload for event in c.client.vms.events("bad")] == ["last words"]
        with pytest.raises(VMFailed, match="exit code 3: last words"):
            c.client.vms.wait("bad")
        with pytest.raises(ResponseError, match='VM "none" does not exist') as refusal:
            c.client.vms.get("none")
        assert refusal.value.status == 404
        with urllib.request.urlopen(f"{c.url}/v1/vms") as answer:
            assert [vm["name"] for vm in json.load(answer)] == ["bad", "good"]
    assert traces() == before


@pytest.mark.parametrize("method", ["watch", "port_forward", "exec"])
def test_blocking_context_manager_raises_the_error_of_the_client(method: str) -> None:
    arguments = {"watch": (), "port_forward": (1,), "exec": ("true",)}[method]
    with start_cluster(workers=0) as c:
        with pytest.raises(ResponseError) as refusal, getattr(c.client.vms, method)("none", *arguments):
            raise AssertionError("it was entered")
        assert refusal.value.status == 404
        c.client.vms.create(name="vm", image="any")
        with pytest.raises(ZeroDivisionError), c.client.vms.watch("vm"):
            raise ZeroDivisionError
        assert [vm.name for vm in c.client.vms.list()] == ["vm"]


def test_command_and_stream_of_a_blocking_client_block() -> None:
    with start_cluster() as c, socket.create_server(("127.0.0.1", 0)) as listener:
        c.client.vms.create(name="vm", image="any")
        c.client.vms.wait("vm")
        with c.client.vms.exec("vm", "cat; exit 3", interactive=True) as command:
            command.send(b"said")
            command.send_eof()
            assert list(command) == [("stdout", b"said")]
            assert command.exit_code == 3
        with c.client.vms.port_forward("vm", listener.getsockname()[1]) as stream, listener.accept()[0] as peer:
            stream.send_all(b"to the VM")
            assert peer.recv(100) == b"to the VM"
            peer.sendall(b"from the VM")
            assert stream.receive_some() == b"from the VM"
        # What the client makes of an error of the block.
        with pytest.raises(ConnectError), c.client.vms.port_forward("vm", listener.getsockname()[1]):
            raise trio.BrokenResourceError


# ---- workers that fail -----------------------------------------------------------------------------------------------


def test_worker_that_was_stopped_takes_no_vms_and_keeps_its_own() -> None:
    with start_cluster(vms_per_worker=3) as c, socket.create_server(("127.0.0.1", 0)) as listener:
        c.client.vms.create(name="old", image="any")
        old = c.client.vms.wait("old")
        c.workers["worker-1"].stop()
        assert c.client.workers.get("worker-1").state == "offline", "it has said goodbye"
        c.client.vms.create(name="new", image="any")
        c.workers["worker-1"].come_back()
        assert c.client.workers.get("worker-1").state == "online"
        assert c.client.vms.wait("new").state.worker == "worker-1"
        assert c.client.vms.get("old") == old, "it was adopted"
        with c.client.vms.port_forward("old", listener.getsockname()[1]):
            listener.accept()[0].close()
        c.workers["worker-1"].stop()
        c.workers["worker-1"].stop()


def test_worker_that_was_killed_says_nothing_and_can_come_back() -> None:
    with start_cluster() as c:
        c.client.vms.create(name="vm", image="any")
        running = c.client.vms.wait("vm")
        c.workers["worker-1"].kill()
        c.workers["worker-1"].kill()
        c.workers["worker-1"].come_back()
        assert c.client.workers.get("worker-1").state == "online"
        assert c.client.vms.get("vm").state.status == "running"
        assert c.client.vms.get("vm").uid == running.uid


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kill", "cut_off"])
async def test_vm_of_a_worker_that_is_away_ends_before_it_is_started_elsewhere(way: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    # The first run holds the pipe open. There may be others before it that end early, when this process gets no processor.
    script = StartupScript(f"if mkdir {tmp_path}/first; then exec 3> {pipe}; echo begun >&3; fi; sleep 1000")
    with trio.fail_after(GENEROUS):
        async with cluster(workers=2, worker_offline_timeout=1.5) as c:
            await c.client.vms.create(name="vm", image="any", startup_script=script, restart_policy="OnFailure")
            while not has_data(reader):
                await trio.lowlevel.wait_readable(reader)
            first = (await c.client.vms.get("vm")).state.worker
            await getattr(c.workers[first], way)()
            async with c.client.watch(kinds=["vms"]) as changes:
                again = await running_elsewhere(changes, first)
            assert again.state.restart_count >= 1
            assert os.read(reader, 1) == b"", "no process has it open"
            os.close(reader)


async def running_elsewhere(changes: AsyncIterator[WatchedChange], worker: str) -> VM:
    async for change in changes:
        vm = change.object
        if isinstance(vm, VM) and vm.state.worker != worker and vm.state.status == "running":
            return vm
    raise AssertionError("the watch ended")


def has_data(reader: int) -> bool:
    try:
        return bool(os.read(reader, 100))
    except BlockingIOError:
        return False


def test_worker_that_was_cut_off_for_a_moment_goes_on() -> None:
    with start_cluster() as c:
        c.client.vms.create(name="vm", image="any")
        c.client.vms.wait("vm")
        c.workers["worker-1"].cut_off()
        # Nothing tells the controller.
        assert c.client.workers.get("worker-1").state == "online"
        c.client.vms.create(name="second", image="any")
        assert c.client.vms.get("second").state.status == "pending"
        c.workers["worker-1"].come_back()
        assert c.client.vms.wait("second").state.worker == "worker-1"
        assert c.client.vms.ip("vm") == "127.0.0.1"


def test_cluster_ends_with_workers_that_are_away() -> None:
    before = traces()
    with start_cluster(workers=3) as c:
        for number in range(1, 7):
            c.client.vms.create(name=f"vm-{number}", image="any", startup_script={"script_content": "sleep 1000"})
            c.client.vms.wait(f"vm-{number}")
        c.workers["worker-1"].kill()
        c.workers["worker-2"].stop()
        c.workers["worker-3"].cut_off()
    assert traces() == before


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_are_pulled_slowly_and_fail_as_their_names_say() -> None:
    with start_cluster() as c:
        c.client.vms.create(name="slow", image="example.com/pull-0.2s")
        with c.client.vms.watch("slow") as changes:
            messages = []
            for _, vm in changes:
                messages.append(vm.state.status_message)
                if vm.state.status == "running":
                    break
        assert {message for message in messages if "%" in message}, messages
        c.client.vms.create(name="broken", image="example.com/pull-fails")
        with pytest.raises(VMFailed):
            c.client.vms.wait("broken")


# ---- descriptions of workers, TLS ------------------------------------------------------------------------------------


def test_each_worker_has_the_labels_resources_and_architecture_of_its_description() -> None:
    described = [
        Worker(labels={"xcode": "27"}),
        Worker(name="intel", arch="amd64", resources={"org.cirruslabs.tart-vms": 1}),
    ]
    with start_cluster(workers=described) as c:
        assert list(c.workers) == ["worker-1", "intel"]
        assert c.client.workers.get("worker-1").resources["org.cirruslabs.tart-vms"] == 2
        assert c.client.workers.get("intel").resources["org.cirruslabs.tart-vms"] == 1
        c.client.vms.create(name="new", image="any", labels={"xcode": "27"})
        c.client.vms.create(name="old", image="any", arch="amd64")
        assert c.client.vms.wait("new").state.worker == "worker-1"
        assert c.client.vms.wait("old").state.worker == "intel"


def test_cluster_with_tls_is_reached_by_its_certificate_file() -> None:
    with start_cluster(tls=True, auth=True) as c:
        c.client.check()
        assert c.url.startswith("https://")
        assert c.certificate is not None
        trusted = ssl.create_default_context(cafile=str(c.certificate))
        request = urllib.request.Request(f"{c.url}/v1/")
        request.add_header("Authorization", "Basic " + b64encode(f"{c.account}:{c.token}".encode()).decode())
        with urllib.request.urlopen(request, context=trusted) as answer:
            assert answer.status == 200
        pem = c.certificate.read_bytes()
        with open_client(c.url, account=c.account, token=c.token, certificate=pem) as client:
            client.vms.create(name="vm", image="any")
            assert client.vms.wait("vm").state.worker == "worker-1"


# ---- what a cluster does to its program ------------------------------------------------------------------------------


def test_cluster_does_not_use_the_global_random_generator() -> None:
    # As a test suite does that needs the same numbers every time.
    random.seed(1)
    expected = random.getstate()
    with start_cluster() as c:
        c.client.vms.create(name="vm", image="any", startup_script={"script_content": "echo said"})
        c.client.vms.wait("vm")
        with c.client.vms.watch("vm"):
            c.client.vms.delete("vm")
    assert random.getstate() == expected


def test_error_in_the_block_propagates_and_ends_the_cluster() -> None:
    before = traces()
    with pytest.raises(ZeroDivisionError), start_cluster():
        raise ZeroDivisionError
    assert traces() == before


def test_cluster_that_cannot_start_raises_start_error(tmp_path: Path) -> None:
    (tmp_path / "controller").write_text("not a directory")
    with pytest.raises(StartError, match="controller"), start_cluster(directory=tmp_path):
        raise AssertionError("it started")


def test_auth_refuses_requests_without_credentials() -> None:
    with start_cluster(auth=True) as c:
        assert c.account == "bootstrap-admin"
        c.client.check()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{c.url}/v1/")
        assert c.token not in repr(c)


def test_fixture_is_a_cluster_of_two_workers(orchard_cluster: BlockingCluster) -> None:
    assert len(orchard_cluster.client.workers.list()) == 2


@pytest.mark.orchard(workers=3, vms_per_worker=1)
def test_marker_passes_arguments_to_the_fixture(orchard_cluster: BlockingCluster) -> None:
    workers = orchard_cluster.client.workers.list()
    assert [worker.resources["org.cirruslabs.tart-vms"] for worker in workers] == [1, 1, 1]


def test_records_go_where_they_went_without_the_clusters_log(caplog: pytest.LogCaptureFixture) -> None:
    before = CLUSTER_LOG.count
    with start_cluster() as c:
        c.client.vms.create({"colour": "red"}, name="vm", image="any")
        assert any("registered" in line and "worker=worker-1" in line for line in CLUSTER_LOG.since(before))
        with caplog.at_level(logging.INFO, logger="orchard.worker"):
            c.workers["worker-1"].stop()
            c.workers["worker-1"].come_back()
        names = [(record.name, record.levelname) for record in caplog.records]
    assert ("orchard.client", "WARNING") in names
    assert ("orchard.worker", "INFO") in names
    assert [level for name, level in names if name != "orchard.worker"] == ["WARNING"]


@pytest.mark.slow
def test_report_of_a_failed_test_has_the_log_of_its_cluster(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import pytest\n"
        "@pytest.fixture(scope='session')\n"
        "def orchard_session_options():\n    return {'workers': 1, 'tls': True}\n"
    )
    pytester.makepyfile(
        "def test_first(orchard_session_cluster):\n"
        "    orchard_session_cluster.client.vms.create({'odd': 'field'}, name='first', image='any')\n"
        "def test_second(orchard_session_cluster):\n"
        "    orchard_session_cluster.workers['worker-1'].stop()\n"
        "    orchard_session_cluster.workers['worker-1'].come_back()\n"
        "    assert [vm.name for vm in orchard_session_cluster.client.vms.list()] == []\n"
    )
    result = run_plugin(pytester)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Orchard cluster log, call*", "*registered*worker=worker-1*"])
    result.stdout.no_fnmatch_line("*odd*")


@pytest.mark.slow
def test_plugin_is_found_by_a_test_suite_that_only_installs_orchard(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(orchard_cluster):\n    orchard_cluster.client.check()\n")
    run_plugin(pytester).assert_outcomes(passed=1)


def run_plugin(pytester: pytest.Pytester) -> pytest.RunResult:
    # Without plugins that take seconds to import.
    unused = [word for name in ("schemathesis", "hypothesispytest") for word in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", *unused)


@pytest.mark.slow(6)
@pytest.mark.needs("etcd")
async def test_controllers_fail_and_another_one_leads(tmp_path: Path) -> None:
    """A VM runs on through a kill, an orderly stop and a cut from etcd; clients and the worker find the next leader."""
    async with cluster(workers=1, controllers=2, auth=True, directory=tmp_path) as c:
        first, second = c.controllers.values()
        assert [each.leads for each in (first, second)] == [True, False]
        await c.client.vms.create(name="vm", image="any")
        created = await c.client.vms.wait("vm")
        await first.kill()
        await second.wait_leads()
        assert (await c.client.vms.get("vm")).uid == created.uid
        await first.come_back()
        await second.stop()
        await first.wait_leads()
        await second.come_back()
        await first.cut_off()
        await second.wait_leads()
        assert [each.leads for each in (first, second)] == [False, True]
        await first.come_back()
        await c.client.vms.create(name="other", image="any")
        await c.client.vms.wait("other")
        vm = await c.client.vms.get("vm")
        assert (vm.uid, vm.state.status, vm.state.restart_count) == (created.uid, "running", 0)


@pytest.mark.slow
@pytest.mark.needs("etcd")
def test_controllers_fail_in_a_synchronous_test() -> None:
    with start_cluster(workers=0, controllers=2) as c:
        first, second = c.controllers.values()
        assert f"{first.url},{second.url}" == c.url
        first.stop()
        second.wait_leads()
        assert (first.leads, second.leads) == (False, True)
        assert c.client.vms.list() == []


async def test_several_controllers_need_etcd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(StartError, match="etcd"):
        async with cluster(controllers=3):
            pass
