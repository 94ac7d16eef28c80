"""Port forwards and addresses of VMs, through a real controller and worker, by an independent client."""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import websockets.sync.client
from harness.clients import (
    ADMIN_ENV,
    SocketHandler,
    admin_client,
    connect_websocket,
    echo,
    listening,
    make_bootstrap_token,
    read_until_closed,
    receive_exactly,
    refusal,
    running_vm,
    wait_workers,
    websocket_url,
)
from harness.processes import GENEROUS, REALLY, at_rest, controller, eventually, started

from orchard import tunnel
from orchard.client import Client, ResponseError
from orchard.net.websocket import TunnelStream
from orchard.testing import Cluster, cluster

# The servers in its VMs are those of the process that starts the worker, so it has to be this one: REALLY.
SYNTHETIC = ("--runtime", "synthetic", "--name", "mac")
# A piece of 64 KiB is this many words of 4 bytes.
PIECE_WORDS = 16384


@asynccontextmanager
async def vm_with(handler: SocketHandler = echo, **options: Any) -> AsyncIterator[tuple[Cluster, int]]:
    """Yield a cluster with a running VM "vm", and the port of a server in it."""
    async with running_vm(**options) as c, listening(handler) as port:
        yield c, port


# ---- bytes -----------------------------------------------------------------------------------------------------------


async def test_client_without_a_user_agent_gets_text_messages() -> None:
    def talk(url: str, user_agent: str | None) -> object:
        with websockets.sync.client.connect(url, user_agent_header=user_agent, compression=None) as client:
            client.send(b"hello")
            return client.recv()

    async with vm_with() as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        assert await trio.to_thread.run_sync(talk, url, None) == "hello"
        assert await trio.to_thread.run_sync(talk, url, "some client") == b"hello"


async def test_bytes_arrive_unchanged_in_binary_messages_of_any_size() -> None:
    def talk(url: str) -> None:
        with connect_websocket(url) as client:
            for size in (1, 2, 125, 126, 65535, 65536, 65537, 500_000):
                sent = hashlib.shake_128(b"%d" % size).digest(size)
                client.send(sent)
                received = bytearray()
                while len(received) < size:
                    message = client.recv()
                    assert isinstance(message, bytes), "the bytes come in binary messages"
                    received += message
                assert received == sent
            client.send("text is bytes, too")
            assert client.recv() == b"text is bytes, too"

    async with vm_with() as (c, port):
        await trio.to_thread.run_sync(talk, websocket_url(c, "/vms/vm/port-forward", port=port))


@pytest.mark.slow
async def test_large_message_is_forwarded_before_it_is_complete() -> None:
    size = 40_000_000
    got = hashlib.sha256()

    async def listen(stream: trio.SocketStream) -> None:
        left = size
        async for data in stream:
            got.update(data)
            left -= len(data)
            if left == size - 100_000:
                await stream.send_all(b"half-time")
            elif not left:
                await stream.send_all(b"complete")

    def talk(url: str) -> None:
        data = b"0123456789abcdef" * (size // 16)
        with connect_websocket(url) as client:

            def fragments() -> Iterator[bytes]:
                yield data[:100_000]
                assert client.recv(timeout=60) == b"half-time"
                yield data[100_000:]

            client.send(fragments())
            assert client.recv(timeout=60) == b"complete"

    async with vm_with(listen) as (c, port):
        await trio.to_thread.run_sync(talk, websocket_url(c, "/vms/vm/port-forward", port=port))
    assert got.hexdigest() == hashlib.sha256(b"0123456789abcdef" * (size // 16)).hexdigest()


@pytest.mark.slow
async def test_two_hundred_concurrent_tunnels_over_one_worker() -> None:
    async def one(c: Cluster, port: int, number: int) -> None:
        async with c.client.vms.port_forward("vm", port, wait=60) as stream:
            sent = hashlib.shake_128(b"%d" % number).digest(100_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, sent)
                assert await receive_exactly(stream, len(sent)) == sent

    async with vm_with() as (c, port), trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(one, c, port, number)


@pytest.mark.slow
async def test_paused_reader_stops_the_sender_and_loses_no_bytes() -> None:
    sent = 0

    async def pour(stream: trio.SocketStream) -> None:
        nonlocal sent
        for number in range(1000):
            await stream.send_all(struct.pack(">I", number) * PIECE_WORDS)
            sent += 1

    async with vm_with(pour) as (c, port), c.client.vms.port_forward("vm", port) as stream:
        await at_rest(lambda: sent)
        assert 0 < sent < 500, "the sender must stop while the reader is paused"
        for number in range(1000):
            assert await receive_exactly(stream, 4 * PIECE_WORDS) == struct.pack(">I", number) * PIECE_WORDS
        assert await stream.receive_some() == b""


# ---- closes ----------------------------------------------------------------------------------------------------------


async def test_end_of_stream_in_the_vm_closes_the_tunnel_after_all_bytes() -> None:
    async def say_and_go(stream: trio.SocketStream) -> None:
        await stream.send_all(b"x" * 1_000_000)

    def talk(url: str) -> tuple[int, int, str]:
        with connect_websocket(url) as client:
            return read_until_closed(client)

    async with vm_with(say_and_go) as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        assert await trio.to_thread.run_sync(talk, url) == (1_000_000, 1000, "")


async def test_close_by_the_client_ends_the_stream_in_the_vm_after_all_bytes() -> None:
    got = bytearray()
    ended = trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        async for data in stream:
            got.extend(data)
        ended.set()

    async with vm_with(listen) as (c, port):
        async with c.client.vms.port_forward("vm", port) as stream:
            await stream.send_all(b"x" * 1_000_000)
        with trio.fail_after(GENEROUS):
            await ended.wait()
    assert len(got) == 1_000_000


async def test_reset_by_the_client_ends_the_stream_in_the_vm() -> None:
    ended = trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass
        ended.set()

    async with vm_with(listen) as (c, port), c.client.vms.port_forward("vm", port) as stream:
        transport = stream._stream
        assert isinstance(transport, trio.SocketStream)
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(transport)
        with trio.fail_after(GENEROUS):
            await ended.wait()


async def closed_with(url: str, then: Callable[[], Any]) -> tuple[int, str]:
    """Open a tunnel, call `then`, and return the close code and the reason that the client receives."""
    opened = trio.Event()
    token = trio.lowlevel.current_trio_token()
    result: list[tuple[int, str]] = []

    def talk() -> None:
        with connect_websocket(url) as client:
            client.send(b"hello")
            assert client.recv() == b"hello"
            token.run_sync_soon(opened.set)
            result.append(read_until_closed(client)[1:])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, talk)
        await opened.wait()
        await then()
    return result[0]


async def test_reset_in_the_vm_closes_the_tunnel_with_an_error_code() -> None:
    resets: list[trio.Event] = []

    async def echo_until_reset(stream: trio.SocketStream) -> None:
        resets.append(trio.Event())
        await stream.send_all(await stream.receive_some())
        await resets[-1].wait()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def reset() -> None:
        resets[0].set()

    async with vm_with(echo_until_reset) as (c, port):
        code, reason = await closed_with(websocket_url(c, "/vms/vm/port-forward", port=port), reset)
    assert code == 1011
    assert "reset" in reason


async def test_deleting_a_vm_closes_its_tunnels_with_the_reason() -> None:
    async with vm_with() as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        code, reason = await closed_with(url, partial(c.client.vms.delete, "vm"))
        assert (code, '"vm"' in reason) == (1001, True), reason


async def test_reconnect_of_a_worker_closes_its_tunnels(monkeypatch: pytest.MonkeyPatch) -> None:
    # The watch that is open counts as dead.
    monkeypatch.setattr("orchard.tunnel.PONG_SECONDS", 0.0)
    async with vm_with() as (c, port), trio.open_nursery() as nursery:
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        watch = c.client.rpc_watch("worker-1")

        async def reconnect() -> None:
            nursery.start_soon(hold, watch)

        code, reason = await closed_with(url, reconnect)
        assert (code, '"worker-1"' in reason) == (1001, True), reason
        nursery.cancel_scope.cancel()


async def hold(manager: AbstractAsyncContextManager[object]) -> None:
    async with manager:
        await trio.sleep_forever()


@pytest.mark.slow
async def test_killed_worker_closes_a_tunnel_during_a_transfer(tmp_path: Path) -> None:
    async def pour(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)

    with (
        controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path) as (_, url),
        started("worker", url, *SYNTHETIC, home=tmp_path, before=REALLY) as worker,
    ):

        def talk(forward: str) -> tuple[int, int, str]:
            with connect_websocket(forward) as client:
                first = len(client.recv())
                worker.process.kill()
                size, code, reason = read_until_closed(client)
                return first + size, code, reason

        c = Cluster(url, Client(url))
        async with c.client, listening(pour) as port:
            await wait_workers(c.client, 1)
            await c.client.vms.create(name="vm", image="any")
            await c.client.vms.wait("vm")
            with trio.fail_after(GENEROUS):
                told = await trio.to_thread.run_sync(talk, websocket_url(c, "/vms/vm/port-forward", port=port))
    size, code, reason = told
    assert size > 0
    assert (code, "worker" in reason) == (1011, True), reason


async def test_failure_of_a_vm_closes_its_tunnels_with_the_reason() -> None:
    async with vm_with() as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        report = {"status": "failed", "status_message": "no more"}
        code, reason = await closed_with(url, partial(c.client.vms.report, "vm", report))
        assert (code, '"vm"' in reason, "no more" in reason) == (1001, True, True), reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "expected"),
    [("worker", 1011), ("controller", 1001)],
)
async def test_end_of_the_worker_or_controller_process_closes_tunnels(tmp_path: Path, role: str, expected: int) -> None:
    arguments = ("--insecure-no-tls", "--insecure-no-auth")
    with (
        controller(*arguments, home=tmp_path) as (control, url),
        started("worker", url, *SYNTHETIC, home=tmp_path, before=REALLY) as worker,
    ):
        c = Cluster(url, Client(url))
        async with c.client, listening(echo) as port:
            await wait_workers(c.client, 1)
            await c.client.vms.create(name="vm", image="any")
            await c.client.vms.wait("vm")
            end = partial(trio.to_thread.run_sync, worker.process.kill if role == "worker" else control.stop)
            code, reason = await closed_with(websocket_url(c, "/vms/vm/port-forward", port=port), end)
            assert (code, role in reason) == (expected, True), reason


async def test_unused_workers_end_of_a_tunnel_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "CLAIM_SECONDS", 0.05)
    ended = trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass
        ended.set()

    monkeypatch.setattr(tunnel.WorkerEnd, "relay", forgetful)
    async with vm_with(listen) as (c, port):
        async with c.client.vms.port_forward("vm", port):
            pass
        with trio.fail_after(GENEROUS):
            await ended.wait()


async def forgetful(*_: object) -> None:
    await trio.lowlevel.checkpoint()


# ---- refusals before the upgrade -------------------------------------------------------------------------------------


async def test_unreachable_ports_and_vms_are_refused_before_the_upgrade() -> None:
    async with vm_with() as (c, port):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            closed = unused.getsockname()[1]
            status, message = await refusal(c, "/vms/vm/port-forward", port=closed)
        assert status == 503
        assert '"worker-1"' in message
        assert f"port {closed} " in message
        assert "connection refused" in message
        forward = "/vms/vm/port-forward"
        for number, shown in ((0, '"0"'), (65536, '"65536"'), ("ssh", '"ssh"'), ("", "missing")):
            status, message = await refusal(c, forward, port=number)
            assert (status, shown in message, "1 to 65535" in message) == (400, True, True), message
        assert (await refusal(c, forward))[0] == 400
        assert (await refusal(c, forward, port=port, wait=-1))[0] == 400
        status, message = await refusal(c, "/vms/none/port-forward", port=port)
        assert (status, '"none"' in message) == (404, True), message
        assert (await refusal(c, "/workers/none/port-forward", port=port))[0] == 404
        await c.client.vms.create(name="big", image="any", resources={"gpu": 1})
        status, message = await refusal(c, "/vms/big/port-forward", port=port, wait=0)
        assert status == 503
        assert '"big"' in message
        assert "gpu" in message, "the message says what the VM waits for"
        with pytest.raises(ResponseError) as refused:
            await c.client.request("GET", "/vms/vm/port-forward", query={"port": str(port)})
        assert refused.value.status == 426
        await c.client.vms.report("vm", {"status": "failed", "status_message": "broken"})
        status, message = await refusal(c, forward, port=port, wait=60)
        assert (status, '"vm"' in message, "broken" in message) == (503, True, True), message


async def test_port_forward_and_ip_wait_until_the_vm_runs() -> None:
    async with cluster(workers=1) as c, listening(echo) as port:
        await c.client.workers.pause("worker-1")
        await c.client.vms.create(name="vm", image="any")

        async def talk() -> None:
            async with c.client.vms.port_forward("vm", port, wait=60) as stream:
                await stream.send_all(b"hello")
                assert await receive_exactly(stream, 5) == b"hello"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk)
            nursery.start_soon(ip_of, c, "127.0.0.1")
            await c.client.workers.pause("worker-1", paused=False)


async def ip_of(c: Cluster, expected: str) -> None:
    assert await c.client.vms.ip("vm", wait=60) == expected


async def test_port_forward_to_a_workers_host() -> None:
    async with cluster() as c, listening(echo) as port, c.client.workers.port_forward("worker-1", port) as stream:
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"


async def test_ip_of_running_stopped_and_unknown_vms() -> None:
    async with vm_with() as (c, _):
        assert await c.client.vms.ip("vm") == "127.0.0.1"
        await c.client.vms.patch("vm", power_state="stopped")
        async with c.client.vms.watch("vm") as changes:
            async for _, vm in changes:
                if vm.resting:
                    break
        with pytest.raises(ResponseError, match="stopped") as refused:
            await c.client.vms.ip("vm", wait=60)
        assert refused.value.status == 503
        with pytest.raises(ResponseError) as refused:
            await c.client.vms.ip("none")
        assert refused.value.status == 404


# ---- sessions ------------------------------------------------------------------------------------------------------


async def test_rpc_session_is_answered_once_and_by_its_own_worker() -> None:
    async with cluster(workers=0, auth=True) as c:
        for name in ("worker", "other"):
            await c.client.service_accounts.create(name, roles=["compute:read", "compute:write"], token="long-enough")
        own, other = (Client(c.url, account=name, token="long-enough") for name in ("worker", "other"))
        async with own, other:
            await own.workers.register({"name": "w", "resources": {"org.cirruslabs.tart-vms": 1}})
            async with own.rpc_watch("w") as actions:
                await own.vms.list(worker="w")
                vm = await c.client.vms.create(name="vm", image="any")
                await eventually(partial(assigned, c, "vm"))
                await own.vms.report("vm", {"uid": vm.uid, "status": "running"})
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ip_of, c, "10.1.2.3")
                    action: dict[str, Any] = {"syncVMsAction": {}}
                    while "resolveIPAction" not in action:
                        action = await anext(actions)
                    about: dict[str, str] = action["resolveIPAction"]
                    assert about["vmUID"] == vm.uid
                    assert len(about["session"]) >= 32
                    answer = {"session": about["session"], "ip": "10.1.2.3", "errorMessage": ""}
                    for client, query in ((other, answer), (own, {**answer, "session": "guess"})):
                        with pytest.raises(ResponseError) as refused:
                            await client.request("POST", "/rpc/resolve-ip", query=query)
                        assert refused.value.status == 404
                    await own.request("POST", "/rpc/resolve-ip", query=answer)
                with pytest.raises(ResponseError) as refused:
                    await own.request("POST", "/rpc/resolve-ip", query=answer)
                assert refused.value.status == 404


async def assigned(c: Cluster, name: str) -> bool:
    return bool((await c.client.vms.get(name)).state.worker)


# ---- TLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("openssl")
async def test_tunnel_over_tls_between_processes(tmp_path: Path) -> None:
    with controller(home=tmp_path, env=ADMIN_ENV) as (_, url):
        async with admin_client(url, tmp_path) as client, listening(echo) as port:
            token = await make_bootstrap_token(client, tmp_path)
            arguments = (url, *SYNTHETIC, "--bootstrap-token", token)
            with started("worker", *arguments, home=tmp_path, before=REALLY):
                await wait_workers(client, 1)
                await client.vms.create(name="vm", image="any")
                async with client.vms.port_forward("vm", port, wait=60) as stream:
                    assert isinstance(stream, TunnelStream)
                    # The echo must be read while more is sent: an unread one stops the sender.
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(stream.send_all, b"x" * 5_000_000)
                        assert await receive_exactly(stream, 5_000_000) == b"x" * 5_000_000
