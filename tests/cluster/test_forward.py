"""Into a VM: tunnels, addresses and access tokens, through a real controller and worker, by an independent client."""

from __future__ import annotations

import base64
import datetime
import hashlib
import itertools
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
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
from harness.processes import at_rest, controller, eventually, finished, started

from orchard import auth, tunnel
from orchard.client import Client, ResponseError
from orchard.net.websocket import TunnelStream
from orchard.testing import Cluster, cluster


@asynccontextmanager
async def vm_with(handler: SocketHandler = echo, **options: Any) -> AsyncIterator[tuple[Cluster, int]]:
    """A cluster with a VM "vm" that runs, and something that listens in it."""
    async with running_vm(**options) as c, listening(handler) as port:
        yield c, port


# ---- bytes ---------------------------------------------------------------------------------------------------------


async def test_bytes_arrive_as_they_were_sent_in_messages_of_any_size() -> None:
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


async def test_a_message_may_have_any_size_and_goes_on_before_it_is_complete() -> None:
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


async def test_two_hundred_tunnels_at_once_over_one_worker() -> None:
    async def one(c: Cluster, port: int, number: int) -> None:
        async with c.client.vms.port_forward("vm", port, wait=60) as stream:
            sent = hashlib.shake_128(b"%d" % number).digest(300_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, sent)
                assert await receive_exactly(stream, len(sent)) == sent

    async with vm_with() as (c, port), trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(one, c, port, number)


async def test_a_reader_that_stops_stops_the_sender_and_nothing_is_lost() -> None:
    sent = 0

    async def pour(stream: trio.SocketStream) -> None:
        nonlocal sent
        for number in range(1000):
            await stream.send_all(struct.pack(">I", number) * 16384)  # 64 KiB
            sent += 1

    async with vm_with(pour) as (c, port), c.client.vms.port_forward("vm", port) as stream:
        await at_rest(lambda: sent)
        assert 0 < sent < 500, "what is not read is not taken either"
        for number in range(1000):
            assert await receive_exactly(stream, 65536) == struct.pack(">I", number) * 16384
        assert await stream.receive_some() == b""


# ---- ends ----------------------------------------------------------------------------------------------------------


async def test_an_end_in_the_vm_reaches_the_client_after_all_bytes() -> None:
    async def say_and_go(stream: trio.SocketStream) -> None:
        await stream.send_all(b"x" * 1_000_000)

    def talk(url: str) -> tuple[int, int, str]:
        with connect_websocket(url) as client:
            return read_until_closed(client)

    async with vm_with(say_and_go) as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        assert await trio.to_thread.run_sync(talk, url) == (1_000_000, 1000, "")


async def test_an_end_of_the_client_reaches_the_vm_after_all_bytes() -> None:
    got = bytearray()
    ended = trio.Event()

    async def listen(stream: trio.SocketStream) -> None:
        async for data in stream:
            got.extend(data)
        ended.set()

    async with vm_with(listen) as (c, port):
        async with c.client.vms.port_forward("vm", port) as stream:
            await stream.send_all(b"x" * 1_000_000)
        with trio.fail_after(60):
            await ended.wait()
    assert len(got) == 1_000_000


async def test_a_client_that_vanishes_is_an_end_for_the_vm() -> None:
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
        with trio.fail_after(60):
            await ended.wait()


async def closed_with(url: str, then: Callable[[], Any]) -> tuple[int, str]:
    """Open a tunnel, let something happen, and give the close code and reason that the client sees."""
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


async def test_a_reset_in_the_vm_is_told_from_an_end() -> None:
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


async def test_a_deleted_vm_ends_its_tunnels_and_says_so() -> None:
    async with vm_with() as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        assert await closed_with(url, partial(c.client.vms.delete, "vm")) == (1001, 'VM "vm" was deleted')


async def test_a_worker_that_reconnects_ends_what_went_through_it() -> None:
    async with vm_with() as (c, port), trio.open_nursery() as nursery:
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        watch = c.client.rpc_watch("worker-1")

        async def reconnect() -> None:
            nursery.start_soon(hold, watch)

        assert await closed_with(url, reconnect) == (1001, 'worker "worker-1" has reconnected')
        nursery.cancel_scope.cancel()


async def hold(manager: AbstractAsyncContextManager[object]) -> None:
    async with manager:
        await trio.sleep_forever()


async def test_a_worker_that_is_killed_in_a_transfer_ends_it(tmp_path: Path) -> None:
    async def pour(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"x" * 65536)

    with (
        controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path) as (_, url),
        started("worker", url, "--runtime", "synthetic", "--name", "mac", home=tmp_path) as worker,
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
            with trio.fail_after(60):
                told = await trio.to_thread.run_sync(talk, websocket_url(c, "/vms/vm/port-forward", port=port))
    assert told[0] > 0
    assert told[1:] == (1011, "the connection to the worker was lost")


async def test_a_failed_vm_ends_its_tunnels_and_says_why() -> None:
    async with vm_with() as (c, port):
        url = websocket_url(c, "/vms/vm/port-forward", port=port)
        report = {"status": "failed", "status_message": "no more"}
        ended = await closed_with(url, partial(c.client.vms.report, "vm", report))
        assert ended == (1001, 'VM "vm" has failed: no more')


@pytest.mark.parametrize(
    ("role", "expected"),
    [("worker", (1011, "the connection to the worker was lost")), ("controller", (1001, "controller is stopping"))],
)
async def test_tunnels_end_with_the_process_that_they_go_through(
    tmp_path: Path, role: str, expected: tuple[int, str]
) -> None:
    arguments = ("--insecure-no-tls", "--insecure-no-auth")
    with (
        controller(*arguments, home=tmp_path) as (control, url),
        started("worker", url, "--runtime", "synthetic", "--name", "mac", home=tmp_path) as worker,
    ):
        c = Cluster(url, Client(url))
        async with c.client, listening(echo) as port:
            await wait_workers(c.client, 1)
            await c.client.vms.create(name="vm", image="any")
            await c.client.vms.wait("vm")
            end = partial(trio.to_thread.run_sync, worker.process.kill if role == "worker" else control.stop)
            assert await closed_with(websocket_url(c, "/vms/vm/port-forward", port=port), end) == expected


async def test_a_tunnel_that_nobody_takes_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
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
        with trio.fail_after(60):
            await ended.wait()


async def forgetful(*_: object) -> None:
    await trio.lowlevel.checkpoint()


# ---- refusals are plain answers ------------------------------------------------------------------------------------


async def test_what_cannot_be_reached_is_refused_before_the_upgrade() -> None:
    async with vm_with() as (c, port):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            nobody = unused.getsockname()[1]
            status, message = await refusal(c, "/vms/vm/port-forward", port=nobody)
        assert status == 503
        assert message == f'worker "worker-1": cannot connect to port {nobody} of the VM: connection refused'
        forward = "/vms/vm/port-forward"
        for number, shown in ((0, '"0"'), (65536, '"65536"'), ("ssh", '"ssh"'), ("", '""')):
            status, message = await refusal(c, forward, port=number)
            assert (status, shown in message, "1 to 65535" in message) == (400, True, True), message
        assert (await refusal(c, forward))[0] == 400
        assert (await refusal(c, forward, port=port, wait=-1))[0] == 400
        assert await refusal(c, "/vms/none/port-forward", port=port) == (404, 'VM "none" does not exist')
        assert (await refusal(c, "/workers/none/port-forward", port=port))[0] == 404
        await c.client.vms.create(name="big", image="any", resources={"gpu": 1})
        status, message = await refusal(c, "/vms/big/port-forward", port=port, wait=0)
        assert status == 503
        assert message.startswith('VM "big" is pending after 0 seconds: waiting: 1 worker: 1 lacks gpu')
        await c.client.vms.report("big", {"status": "failed", "status_message": "broken"})
        assert await refusal(c, "/vms/big/port-forward", port=port, wait=60) == (503, 'VM "big" has failed: broken')
        with pytest.raises(ResponseError, match="426"):
            await c.client.request("GET", "/vms/vm/port-forward", query={"port": str(port)})


async def test_a_client_can_wait_for_a_vm_that_does_not_run_yet() -> None:
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


async def test_a_worker_host_can_be_reached_too() -> None:
    async with cluster() as c, listening(echo) as port, c.client.workers.port_forward("worker-1", port) as stream:
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"


async def test_addresses() -> None:
    async with vm_with() as (c, _):
        assert await c.client.vms.ip("vm") == "127.0.0.1"
        await c.client.vms.patch("vm", powerState="stopped")
        async with c.client.vms.watch("vm") as changes:
            async for _, vm in changes:
                if vm.resting:
                    break
        with pytest.raises(ResponseError, match='VM "vm" is stopped') as refused:
            await c.client.vms.ip("vm", wait=60)
        assert refused.value.status == 503
        with pytest.raises(ResponseError, match="does not exist"):
            await c.client.vms.ip("none")


# ---- sessions ------------------------------------------------------------------------------------------------------


async def test_a_session_is_answered_once_and_by_its_own_worker() -> None:
    async with cluster(workers=0, auth=True) as c:
        for name in ("worker", "other"):
            await c.client.service_accounts.create(name, roles=["compute:read", "compute:write"], token="t")
        own, other = (Client(c.url, account=name, token="t") for name in ("worker", "other"))
        async with own, other:
            await own.workers.register({"name": "w", "resources": {"org.cirruslabs.tart-vms": 1}})
            async with own.rpc_watch("w") as actions:
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


# ---- access tokens -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def token_vm() -> AsyncIterator[tuple[Cluster, int, str]]:
    async with vm_with(auth=True) as (c, port):
        yield c, port, (await c.client.vms.issue_access_token("vm")).token


async def test_an_access_token_lets_into_its_vm_and_nowhere_else() -> None:
    async with token_vm() as (c, port, token), Client(c.url, access_token=token) as bearer:
        issued = await c.client.vms.issue_access_token("vm", ttl=60)
        vm = await c.client.vms.get("vm")
        assert (issued.token_type, issued.ssh_username, issued.vm_name, issued.vm_uid) == (
            *("Bearer", "token", "vm"),
            vm.uid,
        )
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims.keys() == {
            *("iss", "sub", "aud", "iat", "nbf", "exp", "jti", "vm_uid", "vm_name", "scopes", "ports")
        }
        assert (claims["iss"], claims["aud"], claims["sub"]) == (auth.ISSUER, [auth.AUDIENCE], "bootstrap-admin")
        assert claims["exp"] - claims["iat"] == 86_400
        assert await bearer.vms.ip("vm") == "127.0.0.1"
        async with bearer.vms.port_forward("vm", port) as stream:
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
        for call in (bearer.check, bearer.vms.list, partial(bearer.vms.get, "vm"), partial(bearer.vms.delete, "vm")):
            with pytest.raises(ResponseError) as refused:
                await call()
            assert refused.value.status == 401
        await c.client.vms.create(name="other", image="any")
        with pytest.raises(ResponseError) as refused:
            await bearer.vms.ip("other", wait=60)
        assert refused.value.status == 403
        with pytest.raises(ResponseError) as refused:
            await bearer.vms.ip("none")
        assert refused.value.status == 404
        await c.client.vms.delete("vm")
        await c.client.vms.create(name="vm", image="any")
        with pytest.raises(ResponseError) as refused:
            await bearer.vms.ip("vm", wait=60)
        assert refused.value.status == 403, "under the same name it is another VM"


KEY = b"k" * 32
NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
ABOUT = auth.Access("vm", "uid", "account")


def forged(key: bytes = KEY, algorithm: str = "HS256", header: dict[str, Any] | None = None, **claims: object) -> str:
    """A token with some of its claims replaced (None: left out)."""
    good = auth.issue_access_token(KEY, ABOUT, NOW, NOW + HOUR, "id")
    told = {**jwt.decode(good, options={"verify_signature": False}), **claims}
    told = {name: value for name, value in told.items() if value is not None}
    return jwt.encode(told, key, algorithm=algorithm, headers=header)


def unsigned(**header: object) -> str:
    parts = [{"typ": "JWT", **header}, jwt.decode(forged(), options={"verify_signature": False})]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, ""])


ATTACKS: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "no token": lambda: "a.b.c",
    "alg none": lambda: unsigned(alg="none"),
    "alg None": lambda: unsigned(alg="None"),
    "alg HS384": lambda: forged(algorithm="HS384"),
    "another key": lambda: forged(key=b"x" * 32),
    "short key": lambda: forged(key=b"\0"),
    "tampered": lambda: ".".join([*forged().split(".")[:2], forged(vm_uid="x").split(".")[2]]),
    "signature cut off": lambda: forged()[:-1],
    "another audience": lambda: forged(aud=["orchard"]),
    "no audience": lambda: forged(aud=None),
    "another issuer": lambda: forged(iss="x"),
    "expired": lambda: forged(exp=int(NOW.timestamp())),
    "never expires": lambda: forged(exp=None),
    "expiry as text": lambda: forged(exp=str(int(NOW.timestamp()) + 3600)),
    "expiry not finite": lambda: forged(exp=float("inf")),
    "from the future": lambda: forged(nbf=int(NOW.timestamp()) + 1),
    "start as text": lambda: forged(nbf="0"),
    "uid is no text": lambda: forged(vm_uid=["uid"]),
    "no uid": lambda: forged(vm_uid=None),
    "no subject": lambda: forged(sub=None),
    "a megabyte": lambda: forged(x="x" * 1_000_000),
    "unknown critical header": lambda: forged(header={"crit": ["x"], "x": 1}),
    "detached": lambda: "..",
    "key of its own": lambda: forged(key=b"y" * 32, header={"jwk": {"kty": "oct", "k": "eXl5"}, "kid": "../../key"}),
}


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_other_token_is_accepted(attack: str) -> None:
    token = ATTACKS[attack]()
    with pytest.raises(auth.UnauthenticatedError) as refused:
        auth.read_access_token(KEY, token, NOW)
    assert not token or token not in str(refused.value)


def test_every_changed_byte_of_a_token_is_found() -> None:
    good = auth.issue_access_token(KEY, ABOUT, NOW, NOW + HOUR, "id")
    assert auth.read_access_token(KEY, good, NOW) == ABOUT
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    accepted = []
    for index, char in itertools.product(range(len(good)), "A_."):
        changed = good[:index] + char + good[index + 1 :]
        try:
            auth.read_access_token(KEY, changed, NOW)
        except auth.UnauthenticatedError:
            continue
        accepted.append((index, changed))
    # The last character of a signature of 32 bytes has two bits that mean nothing.
    same = [good[:-1] + alphabet[alphabet.index(good[-1]) & ~3 | bits] for bits in range(4)]
    assert all(changed in (good, *same) for _, changed in accepted)


async def test_a_token_in_the_query_is_none() -> None:
    async with token_vm() as (c, _, token):
        for name in ("token", "access_token", "authorization"):
            async with Client(c.url) as stranger:
                with pytest.raises(ResponseError) as refused:
                    await stranger.request("GET", "/vms/vm/ip", query={name: token})
            assert refused.value.status == 401


@pytest.mark.parametrize(
    ("ttl", "status"), [(1, 200), (2_592_000, 200), (0, 412), (2_592_001, 412), (-1, 400), ("1", 400)]
)
async def test_lifetimes(ttl: object, status: int) -> None:
    async with cluster(workers=0) as c:
        await c.client.vms.create(name="vm", image="any")
        request = partial(c.client.request, "POST", "/vms/vm/access-tokens", json={"ttlSeconds": ttl})
        if status == 200:
            await request()
        else:
            with pytest.raises(ResponseError, match="ttlSeconds") as refused:
                await request()
            assert refused.value.status == status
        assert (await c.client.request("POST", "/vms/vm/access-tokens")).status == 200, "no body is needed"


def test_the_key_outlives_restarts_and_is_nobody_elses(tmp_path: Path) -> None:
    with controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path):
        pass
    path = tmp_path / "controller" / "access-token.key"
    key = path.read_bytes()
    assert (len(key), path.stat().st_mode & 0o777) == (32, 0o600)
    with controller("--insecure-no-tls", "--insecure-no-auth", home=tmp_path):
        assert path.read_bytes() == key
    for spoil, words in ((lambda: path.chmod(0o640), "chmod 600"), (lambda: path.write_bytes(b"short"), "5 bytes")):
        path.chmod(0o600)
        spoil()
        refused = finished("controller", "--listen", "127.0.0.1:0", "--insecure-no-tls", home=tmp_path)
        assert refused.returncode == 1
        assert words in refused.stderr


async def test_a_tunnel_over_tls_between_processes(tmp_path: Path) -> None:
    with controller(home=tmp_path, env=ADMIN_ENV) as (_, url):
        async with admin_client(url, tmp_path) as client, listening(echo) as port:
            token = await make_bootstrap_token(client, tmp_path)
            arguments = (url, "--runtime", "synthetic", "--bootstrap-token", token)
            with started("worker", *arguments, home=tmp_path):
                await wait_workers(client, 1)
                await client.vms.create(name="vm", image="any")
                async with client.vms.port_forward("vm", port, wait=60) as stream:
                    assert isinstance(stream, TunnelStream)
                    async with trio.open_nursery() as nursery:  # who does not read what is echoed stops the echo
                        nursery.start_soon(stream.send_all, b"x" * 5_000_000)
                        assert await receive_exactly(stream, 5_000_000) == b"x" * 5_000_000
