"""The methods of the API's client: what they send, what they return, and what they say about invalid answers."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import typing
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import pytest
import trio
from harness.processes import GENEROUS
from harness.scripted import answer, scripted, switched, upgrading

from orchard.client import Client, ClientError, ConnectError, ResponseError, VMFailed, WatchedChange
from orchard.codec import attrs_of
from orchard.methods import lines
from orchard.methods import vms as vm_methods
from orchard.methods.fields import SettingsFields, VMFields
from orchard.net import wsframes
from orchard.schema import TART_VMS, VM, ClusterSettings, HostDir, Prepull, StartupScript, VMSpec, Worker
from orchard.testing import cluster

# ---- resources -----------------------------------------------------------------------------------------------------


def watch_line(kind: str, **state: object) -> bytes:
    vm = {"name": "vm", "uid": "u", "image": "any", "generation": 0, "createdAt": "2026-01-31T12:00:00Z", **state}
    return json.dumps({"type": kind, "object": vm}).encode() + b"\n"


def chunked(*pieces: bytes) -> bytes:
    """Return a whole answer that has these pieces as chunks."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


async def test_watch_of_a_vm_is_read_however_its_bytes_are_cut() -> None:
    line = watch_line("ADDED", status="pending")
    stream = line + watch_line("DELETED", status="pending")
    for cut in (1, 5, len(line) - 1, len(line), len(line) + 1):
        async with (
            scripted([chunked(stream[:cut], stream[cut:])]) as (client, _),
            client.vms.watch("vm") as changes,
        ):
            assert [(kind, vm.uid) async for kind, vm in changes] == [("ADDED", "u"), ("DELETED", "u")]


async def test_empty_lines_of_a_watch_are_skipped() -> None:
    lines = b"\n" + watch_line("ADDED") + b"\n\n" + watch_line("DELETED")
    async with scripted([chunked(lines)]) as (client, _), client.vms.watch("vm") as changes:
        assert [kind async for kind, _ in changes] == ["ADDED", "DELETED"]


async def test_invalid_line_of_a_watch_is_a_client_error() -> None:
    garbage = b"HTTP/1.1 200 OK\r\n\r\n{}\n"
    async with scripted([garbage]) as (client, _), client.vms.watch("vm") as changes:
        with pytest.raises(ClientError, match="a line of the watch"):
            await anext(changes)


def vm_answer(**state: object) -> bytes:
    return answer(
        "200 OK",
        json.dumps(
            {"name": "vm", "uid": "u", "image": "any", "generation": 0, "createdAt": "2026-01-31T12:00:00Z", **state}
        ).encode(),
    )


def refusal_503(message: str, header: str = "X: y") -> bytes:
    return answer(f"503 Service Unavailable\r\n{header}", json.dumps({"message": message}).encode())


async def test_wait_asks_again_until_the_condition_holds() -> None:
    later = refusal_503('VM "vm" is pending', "Retry-After: 0")
    ready = vm_answer(status="running", conditions=[{"type": "ready", "state": "true"}])
    async with scripted([vm_answer(), later, later, ready]) as (client, script):
        assert (await client.vms.wait("vm", until="ready")).condition("ready")
    asked = [request.split()[1].decode() for request in script.requests]
    assert asked == ["/v1/vms/vm", *["/v1/vms/vm?waitFor=ready&wait=20&uid=u"] * 3]


async def test_wait_that_cannot_come_true_raises_vm_failed_with_the_vm() -> None:
    failed = vm_answer(status="failed", status_message="exit code 2")
    async with scripted([vm_answer(), refusal_503("exit code 2"), failed]) as (client, _):
        with pytest.raises(VMFailed, match="exit code 2") as failure:
            await client.vms.wait("vm")
        assert failure.value.vm.state.status == "failed"
    # For another reason, as for a worker that does not report what was waited for.
    async with scripted([vm_answer(), refusal_503("not reported"), vm_answer(status="running")]) as (client, _):
        with pytest.raises(ResponseError, match="not reported") as refusal:
            await client.vms.wait("vm", until="ready")
        assert refusal.value.status == 503


async def test_wait_for_a_vm_that_is_deleted_raises_vm_failed_with_its_last_state() -> None:
    gone = answer("404 Not Found", b'{"message": "there is none"}')
    async with scripted([vm_answer(), gone]) as (client, _):
        with pytest.raises(VMFailed) as failure:
            await client.vms.wait("vm")
        assert failure.value.vm.uid == "u"
    async with scripted([vm_answer(), gone]) as (client, _):
        with pytest.raises(ResponseError) as refusal:
            await client.vms.wait("vm", uid="another")
        assert refusal.value.status == 404


OUTAGES = {
    "a cut connection": b"",
    "a controller that stops": refusal_503("the server is stopping", "Retry-After: 1"),
    "a proxy without a controller": answer("503 Service Unavailable", b"<html>"),
    "a proxy that lost the controller": answer("502 Bad Gateway", b'{"message": "bad gateway"}'),
}


@pytest.mark.parametrize("kind", OUTAGES)
async def test_wait_goes_on_over_an_outage_for_ten_minutes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted([vm_answer()], [OUTAGES[kind]], [vm_answer(status="running")]) as (client, _):
        assert (await client.vms.wait("vm")).state.status == "running"
    monkeypatch.setattr(lines, "_RESUME_SECONDS", 0.0)
    async with scripted([vm_answer()], [OUTAGES[kind]]) as (client, _):
        with pytest.raises((ConnectError, ResponseError)):
            await client.vms.wait("vm")
    # The first request says at once what is wrong.
    async with scripted([OUTAGES[kind]]) as (client, _):
        with pytest.raises((ConnectError, ResponseError)):
            await client.vms.wait("vm")


async def test_wait_ends_when_its_time_is_over() -> None:
    async with cluster(workers=0) as c:
        await c.client.vms.create(name="vm", image="any")
        with pytest.raises(ResponseError) as refusal:
            await c.client.vms.wait("vm", until="ready", seconds=0)
        assert (refusal.value.status, refusal.value.retry_after) == (503, 1)


async def test_wait_with_a_controller_that_knows_no_wait_is_a_client_error() -> None:
    async with scripted([vm_answer(status="pending"), vm_answer(status="pending")]) as (client, _):
        with pytest.raises(ClientError, match="upgrade"):
            await client.vms.wait("vm")


async def test_vm_is_waited_for_until_it_is_ready_stopped_and_deleted() -> None:
    async with cluster() as c, trio.open_nursery() as nursery:
        vms = c.client.vms
        script = StartupScript("exit $CODE", {"CODE": "0"})
        await vms.create(name="vm", image="any", startup_script=script)
        ready = await vms.wait("vm", until="ready")
        assert ready.state.startup_exit_code == 0
        await vms.patch("vm", power_state="stopped")
        assert (await vms.wait("vm", until="stopped")).resting
        nursery.start_soon(vms.delete, "vm")
        assert (await vms.wait("vm", until="deleted")).uid == ready.uid
        await vms.create(name="bad", image="any", startup_script=replace(script, env={"CODE": "3"}))
        assert (await vms.wait("bad", until="failed")).state.startup_exit_code == 3
        with pytest.raises(VMFailed):
            await vms.wait("bad", until="ready")


async def test_wait_for_a_vm_that_does_not_exist_is_a_response_error() -> None:
    async with cluster(workers=0) as c:
        with pytest.raises(ResponseError) as refusal:
            await c.client.vms.wait("none")
        assert refusal.value.status == 404


async def test_events_are_fetched_from_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_methods, "_PAGE_EVENTS", 3)
    async with cluster() as c:
        vm = await c.client.vms.create(name="vm", image="any")
        lines = [{"kind": "log_line", "payload": str(n), "timestamp": n} for n in range(10)]
        await c.client.vms.append_events("vm", lines, uid=vm.uid)
        assert [event.payload async for event in c.client.vms.events("vm")] == [str(n) for n in range(10)]
        assert [event.timestamp async for event in c.client.vms.events("vm", order="desc")] == list(range(9, -1, -1))
        async for event in c.client.vms.events("vm"):
            assert event.payload == "0"
            break
        with pytest.raises(ResponseError, match="uid"):
            await c.client.vms.append_events("vm", lines, uid="another")


async def test_name_of_a_replaced_object_is_in_the_body() -> None:
    answers = [
        answer(
            "200 OK",
            json.dumps({"name": "n", "image": "any", "uid": "u", "createdAt": "2026-01-31T12:00:00Z"}).encode(),
        )
        for _ in range(4)
    ]
    async with scripted(answers) as (client, script):
        await client.workers.pause("n")
        await client.workers.pause("n", paused=False)
        await client.service_accounts.replace("n", roles=["compute:read"])
        await client.vms.replace("n", {"image": "any"})
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in script.requests]
    assert bodies == [
        {"name": "n", "scheduling_paused": True},
        {"name": "n", "scheduling_paused": False},
        {"name": "n", "roles": ["compute:read"]},
        {"name": "n", "image": "any"},
    ]


async def test_methods_of_the_other_resources() -> None:
    async with cluster() as c:
        client = c.client
        account = await client.service_accounts.create("ci", roles=["compute:read"])
        assert [a.name for a in await client.service_accounts.list()] == ["ci"]
        assert (await client.service_accounts.replace("ci", token="0123456789abcdef")).token == "0123456789abcdef"
        assert (await client.service_accounts.get("ci")).roles == account.roles
        await client.service_accounts.delete("ci")
        assert (await client.cluster_settings.put({"schedulerProfile": "distribute-load"})) == (
            await client.cluster_settings.get()
        )
        assert "rpc-v2" in (await client.info()).capabilities
        assert (await client.workers.pause("worker-1")).scheduling_paused
        assert not (await client.workers.pause("worker-1", paused=False)).scheduling_paused
        assert [w.name for w in await client.workers.list()] == ["worker-1"]
        vm = await client.vms.create(name="vm", image="any")
        assert (await client.vms.replace("vm", {"image": "any", "headless": True})).spec.headless
        assert (await client.vms.patch("vm", {"cpu": 3}, memory=5)).spec.memory == 5
        assert [one.uid for one in await client.vms.list()] == [vm.uid]
        await client.workers.delete("worker-1")
        # A name is quoted as one segment of the path.
        with pytest.raises(ResponseError, match=r'"\.\./x"') as refusal:
            await client.vms.get("../x")
        assert refusal.value.status == 404


async def test_what_the_controller_warns_of_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster() as c:
        await c.client.vms.create({"colour": "s3cret"}, name="vm", image="any")
        for _ in range(3):
            await c.client.vms.patch("vm", {"shape": "s3cret"})
    told = [record.__dict__ for record in caplog.records if record.name == "orchard.client"]
    assert [record["request"] for record in told] == ["POST /vms", "PATCH /vms/vm"]
    assert "colour" in told[0]["warning"]
    assert "s3cret" not in caplog.text


async def test_new_vm_has_its_waiting_reason_at_once_if_the_scheduler_knows_it() -> None:
    async with cluster(workers=0) as c:
        await c.client.vms.create(name="first", image="any")
        async with c.client.vms.watch("first") as changes:
            while not (await anext(changes))[1].state.status_message:
                pass
        second = await c.client.vms.create(name="second", image="any")
        assert "no worker" in second.state.status_message


# ---- watches of workers, commands ----------------------------------------------------------------------------------


async def test_actions_arrive_over_a_workers_watch_and_a_second_one_is_refused() -> None:
    async with cluster(workers=0) as c:
        await c.client.workers.register({"name": "w", "machine_id": "m", "resources": {"org.cirruslabs.tart-vms": 1}})
        async with c.client.rpc_watch("w") as first:
            assert await anext(first) == {"syncVMsAction": {}}
            await c.client.vms.list(worker="w")
            await c.client.vms.create(name="vm", image="any")
            assert await anext(first) == {"syncVMsAction": {}}
            with pytest.raises(ResponseError) as refused:
                await watch_twice(c.client)
            assert refused.value.status == 409
            with pytest.raises(ResponseError) as refused:
                await c.client.workers.register({"name": "w", "machine_id": "m"})
            assert refused.value.status == 409
            await c.client.vms.delete("vm")
            assert await anext(first) == {"syncVMsAction": {}}


async def test_refused_websocket_is_a_response_error() -> None:
    async with cluster(workers=0) as c:
        with pytest.raises(ResponseError, match='"none"') as refusal:
            async with c.client.rpc_watch("none"):
                raise AssertionError("it was opened")
        assert refusal.value.status == 404


async def test_workers_watch_that_the_controller_ends_is_a_connect_error() -> None:
    async with cluster(workers=0, auth=True) as c:
        account = await c.client.service_accounts.create("w", roles=["compute:write"])
        async with Client(c.url, account="w", token=account.token) as own:
            await own.workers.register({"name": "w"})
            with pytest.raises(ConnectError, match="closed the WebSocket"):
                await watch_until_deleted(c.client, own)


async def watch_until_deleted(admin: Client, own: Client) -> None:
    async with own.rpc_watch("w") as actions:
        await admin.service_accounts.delete("w")
        async for _ in actions:
            pass


async def watch_twice(client: Client) -> None:
    async with client.rpc_watch("w"):
        raise AssertionError("it was opened")


@pytest.mark.parametrize(
    "message", [b"[" * 30_000, b"[1]", b"\xff", b'{"\\ud800": 1}', b'{"a": 1, "a": 2}', b'{"a": NaN}']
)
async def test_invalid_action_or_frame_of_a_command_is_a_client_error(message: bytes) -> None:
    frame = b"".join(wsframes.build_frame(wsframes.BINARY, message))
    async with upgrading(lambda accept: switched(accept, frame)) as (client, _):
        with pytest.raises(ClientError, match="an action"):
            async with client.rpc_watch("w") as actions:
                await anext(actions)
        with pytest.raises(ClientError, match="of a command"):
            async with client.vms.exec("vm", "true") as command:
                await anext(command)


@pytest.mark.parametrize(
    "frame", ['{"type": "stdout", "data": "x"}', '{"type": "stdout", "data": 1}', '{"type": "exit", "exit": {}}']
)
async def test_incomplete_frame_of_a_command_is_a_client_error(frame: str) -> None:
    data = b"".join(wsframes.build_frame(wsframes.TEXT, frame.encode()))
    async with upgrading(lambda accept: switched(accept, data)) as (client, _):
        with pytest.raises(ClientError, match="of a command"):
            async with client.vms.exec("vm", "true") as command:
                await anext(command)


# ---- the cluster ----------------------------------------------------------------------------------------------------


async def test_capacity_for_a_shape() -> None:
    described = [Worker(labels={"a,b": "c=d%"}, resources={"x,y": 7, TART_VMS: 2}), Worker(arch="amd64")]
    async with cluster(workers=described) as c:
        capacity = await c.client.capacity(resources={"x,y": 3}, labels={"a,b": "c=d%"})
        assert (capacity.fits, capacity.free["x,y"], capacity.workers.online) == (2, 7, 2)
        assert (await c.client.capacity(arch="amd64")).fits == 2
        none = await c.client.capacity(labels={"a": "b"})
        assert (none.fits, bool(none.reason)) == (0, True)


async def test_sessions_are_listed_while_they_last() -> None:
    begun = datetime.datetime.now(datetime.UTC)
    async with cluster(auth=True) as c:
        await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")
        (worker,) = await c.client.sessions()
        assert (worker.kind, worker.target, worker.account) == ("worker", "worker/worker-1", c.account)
        async with (
            c.client.watch() as changes,
            c.client.vms.watch("vm") as vm_changes,
            c.client.vms.follow("vm", kinds=["lifecycle"]) as events,
            c.client.vms.port_forward("vm", 22) as tunnel,
            c.client.vms.exec("vm", "echo ready; cat", interactive=True) as command,
        ):
            # A session is listed when its client has got something.
            for each in (changes, vm_changes, events, command):
                await anext(each)
            await tunnel.receive_some(4)
            listed = (await c.client.sessions())[1:]
            assert sorted((each.kind, each.target) for each in listed) == [
                ("events", "vm/vm"),
                ("exec", "vm/vm"),
                ("port-forward", "vm/vm"),
                ("watch", ""),
                ("watch", "vm/vm"),
            ]
            assert {(each.account, each.peer) for each in listed} == {(c.account, "127.0.0.1")}
            assert all(begun <= each.since for each in listed)
        with trio.fail_after(GENEROUS):
            while await c.client.sessions() != [worker]:
                await trio.lowlevel.checkpoint()


async def test_history_has_the_vms_that_have_ended() -> None:
    async with cluster(workers=0) as c:
        before = datetime.datetime.now(datetime.UTC)
        for name in ("a", "b"):
            await c.client.vms.create(name=name, image="any", metadata={"n": name})
            await c.client.vms.delete(name)
        assert [ended.name for ended in await c.client.history(limit=1)] == ["b"]
        first, second = await c.client.history(since=before)
        assert (first.name, first.metadata, first.status) == ("a", {"n": "a"}, "pending")
        assert await c.client.history(since=second.ended_at + datetime.timedelta(seconds=1)) == []


# ---- filters, pages, scripts ----------------------------------------------------------------------------------------


async def test_filter_selects_what_is_listed_and_deleted() -> None:
    async with cluster(workers=0) as c:
        vms = c.client.vms
        for name, branch in (("a", "main, 100 %"), ("b", "x=y!"), ("c", "x=y!")):
            await vms.create(name=name, image="any", metadata={"ci/branch": branch, "ci.run": "1"})
        assert [vm.name for vm in await vms.list(filter={"metadata.ci/branch": "main, 100 %"})] == ["a"]
        assert [vm.name for vm in await vms.list(filter={"metadata.ci/branch!": "main, 100 %"})] == ["b", "c"]
        assert [vm.name for vm in await vms.list(filter={"metadata.ci.run": "1", "name": "c*"})] == ["c"]
        assert await vms.list(filter={"status": "running"}) == []
        assert await vms.list(worker="none", filter={"status": "pending"}) == []
        first, after = await vms.list_page(2, filter={"status": "pending"})
        last, end = await vms.list_page(2, filter={"status": "pending"}, after=after)
        assert [[vm.name for vm in page] for page in (first, last)] == [["a", "b"], ["c"]]
        assert end is None
        assert await vms.delete_matching({"metadata.ci/branch": "x=y!"}, dry_run=True) == ["b", "c"]
        assert len(await vms.list()) == 3
        assert await vms.delete_matching({"metadata.ci/branch": "x=y!"}) == ["b", "c"]
        assert [vm.name for vm in await vms.list()] == ["a"]
        for refused in ({}, {"owner": "x"}, {"createdBy": ""}):
            with pytest.raises(ResponseError) as refusal:
                await vms.delete_matching(refused)
            assert refusal.value.status == 400


async def test_restart_and_drain() -> None:
    async with cluster(workers=2) as c:
        first = await c.client.vms.create(name="vm", image="any", restart_policy="OnFailure")
        worker = (await c.client.vms.wait("vm")).state.worker
        await c.client.vms.restart("vm")
        async with c.client.watch(kinds=["vms"]) as changes:
            restarted = await running_again(changes, 1)
        assert restarted.uid == first.uid
        drained = await c.client.workers.drain(worker, deadline_seconds=3600)
        assert drained.scheduling_paused
        assert drained.state in ("draining", "drained")
        await c.client.workers.undrain(worker)
        assert (await c.client.workers.get(worker)).state == "online"
        await c.client.workers.drain(restarted.state.worker, now=True)
        async with c.client.watch(kinds=["vms"]) as changes:
            assert (await running_again(changes, 2)).state.worker != restarted.state.worker


async def running_again(changes: AsyncIterator[WatchedChange], restarts: int) -> VM:
    async for change in changes:
        vm = change.object
        if isinstance(vm, VM) and vm.state.restart_count == restarts and vm.state.status == "running":
            return vm
    raise AssertionError("the watch ended")


async def test_run_returns_exit_code_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster() as c:
        await c.client.vms.create(name="vm", image="any")
        script = f"#{'x' * 100_000}\nprintf 'out '\ncat\necho \"$A\"\necho err >&2\nexit 3\n"
        result = await c.client.vms.run("vm", script, env={"A": "it's"})
        assert (result.exit_code, result.stdout, result.stderr) == (3, "out it's\n", "err\n")
        assert sorted(result.output.split()) == ["err", "it's", "out"]
        assert (await c.client.vms.run("vm", "pwd", workdir="/")).output == "/\n"
        monkeypatch.setattr(vm_methods, "_MAX_OUTPUT_BYTES", 5)
        with pytest.raises(ClientError, match="5 bytes"):
            await c.client.vms.run("vm", "echo 123456")


# ---- names of fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fields"), [(VMSpec, VMFields), (ClusterSettings, SettingsFields)])
def test_keywords_are_the_attributes_of_the_dataclass(kind: type, fields: type) -> None:
    hints = typing.get_type_hints(fields)
    assert list(hints) == [field.name for field in attrs_of(kind)]
    for field in attrs_of(kind):
        hint, of = hints[field.name], typing.get_args(field.type)
        if typing.get_origin(field.type) is tuple:
            assert hint == Sequence[of[0]], field.name  # type: ignore[valid-type]
        elif type(None) in of:
            assert hint == of[0] | Mapping[str, object], field.name
        else:
            assert hint == field.type, field.name


async def test_keywords_are_sent_with_their_names_on_the_wire() -> None:
    body = b'{"name": "vm", "image": "any", "uid": "u", "createdAt": "2026-01-31T12:00:00Z"}'
    async with scripted([answer("200 OK", body) for _ in range(3)]) as (client, script):
        await client.vms.create(
            {"netSoftnet": True, "cpu": 1},
            name="vm",
            cpu=2,
            net_bridged="en0",
            ttl_seconds=60,
            host_dirs=[HostDir("src", "/src", ro=True)],
            startup_script=StartupScript("true"),
            queue="never",
            strict=True,
        )
        await client.vms.patch("vm", {"metadata": None}, pending_timeout_seconds=0)
        await client.cluster_settings.put({"maxTTLSeconds": 60}, prepull=[Prepull("any")])
        with pytest.raises(TypeError, match="ttlSeconds"):
            await client.vms.create(name="vm", ttlSeconds=1)  # type: ignore[call-arg]
    assert "POST /v1/vms?queue=never&fieldValidation=strict " in script.requests[0].decode()
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in script.requests]
    assert bodies == [
        {
            "netSoftnet": True,
            "cpu": 2,
            "name": "vm",
            "net-bridged": "en0",
            "ttlSeconds": 60,
            "hostDirs": [{"name": "src", "path": "/src", "ro": True}],
            "startup_script": {"script_content": "true"},
        },
        {"metadata": None, "pendingTimeoutSeconds": 0},
        {"maxTTLSeconds": 60, "prepull": [{"image": "any"}]},
    ]


# ---- imports -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_client_imports_nothing_of_the_controller_and_the_worker() -> None:
    program = "import sys, orchard.client; print(*(name for name in sys.modules if name.startswith('orchard.')))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    parts = {name.split(".")[1] for name in loaded}
    assert parts == {"base", "client", "codec", "methods", "net", "resources", "schema"}
    assert "orchard.net.server" not in loaded
