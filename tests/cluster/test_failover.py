"""Controllers as processes on a real etcd of three nodes: kills, stops and lost answers lose nothing that was acknowledged."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from harness.cutting_proxy import CuttingProxy
from harness.memory_etcd import encoded
from harness.processes import PLAIN, Role, eventually, free_port, started

from orchard.client import Client, ClientError, ResponseError
from orchard.etcd_nodes import EtcdNodes, EtcdOptions, etcd_nodes
from orchard.net.transport import Transport
from orchard.schema import TART_VMS, VM

pytestmark = [pytest.mark.slow, pytest.mark.needs("etcd")]

# The shortest that the command line takes.
TTL = 5  # seconds
# Acknowledged ones before an attack, and again after it.
WRITES = 20
# A worker for nine VMs.
SYNTHETIC = ("--runtime", "synthetic", "--resources", f"{TART_VMS}=9")
# A line with method and target, and the body.
QUEUED = (
    "GET /v1/vms",
    'POST /v1/vms\n{"name": "queued", "image": "i"}',
    'PUT /v1/workers/mac\n{"name": "mac", "last_seen": "2026-01-31T12:00:00Z"}',
)


class Site:
    """Three etcd nodes, each behind a proxy that can lose answers, and two controllers with ports that stay theirs."""

    def __init__(
        self, home: Path, etcd: EtcdNodes, proxies: list[CuttingProxy], stack: ExitStack, options: Sequence[str]
    ) -> None:
        self.etcd = etcd
        self.proxies = proxies
        self._options = options
        self._home = home
        self._stack = stack
        self._ports = [free_port(), free_port()]
        self.roles = [self._start(0), self._start(1)]
        self.url = ",".join(f"http://127.0.0.1:{port}" for port in self._ports)

    def _start(self, number: int) -> Role:
        urls = ",".join(proxy.url for proxy in self.proxies)
        options = ["--listen", f"127.0.0.1:{self._ports[number]}", "--etcd", urls, "--leader-ttl", str(TTL)]
        home = self._home / f"controller-{number}"
        return self._stack.enter_context(started("controller", *options, *PLAIN, *self._options, home=home))

    def start_again(self, number: int) -> None:
        self.roles[number] = self._start(number)

    async def leader(self) -> int:
        """Return the number of the controller that answers, once one does."""
        found: list[int] = []

        async def answers() -> bool:
            for number, port in enumerate(self._ports):
                try:
                    async with Client(f"http://127.0.0.1:{port}", connect_seconds=1, answer_seconds=1) as client:
                        await client.check()
                except ClientError:
                    continue
                found.append(number)
                return True
            return False

        await eventually(answers)
        return found[0]

    async def connect(self, number: int) -> trio.SocketStream:
        """Return a connection to a controller that has answered a request over it."""
        stream = await trio.open_tcp_stream("127.0.0.1", self._ports[number])
        await stream.send_all(as_http("GET /v1/controller/info"))
        await receive_head(stream)
        return stream

    async def end_lease(self) -> None:
        """End the lease of the controller that leads, as etcd does when its time is over."""
        async with Transport(self.etcd.url, connect_seconds=10, answer_seconds=10) as gateway:
            answer = await gateway.request("POST", "/v3/kv/range", json={"key": encoded(b"/orchard/leader")})
            await gateway.request("POST", "/v3/lease/revoke", json={"ID": answer.json()["kvs"][0]["lease"]})


def as_http(request: str) -> bytes:
    """Return a request of which the first line is method and target, and the rest the body."""
    head, _, body = request.partition("\n")
    return f"{head} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def receive_head(stream: trio.SocketStream) -> bytes:
    """Return the answer to a request at least up to its body, or as much as came before the connection was closed."""
    answer = b""
    with suppress(trio.BrokenResourceError):
        while b"\r\n\r\n" not in answer and (piece := await stream.receive_some()):
            answer += piece
    return answer


@asynccontextmanager
async def site(
    home: Path,
    *,
    sync: bool = False,
    prepare: Callable[[str], Awaitable[Sequence[str]]] | None = None,
) -> AsyncIterator[Site]:
    """Run a site. `prepare` is called with etcd's URL before the controllers start, and returns further options of theirs."""
    async with (
        etcd_nodes(home / "etcd", 3, EtcdOptions(election_ms=1000, sync=sync)) as etcd,
        trio.open_nursery() as nursery,
    ):
        proxies = []
        for node in etcd.nodes:
            proxy = CuttingProxy(node.url)
            (listener,) = await nursery.start(partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1"))
            proxy.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
            proxies.append(proxy)
        options = await prepare(etcd.url) if prepare is not None else ()
        with ExitStack() as stack:
            yield Site(home, etcd, proxies, stack, options)
        nursery.cancel_scope.cancel()


async def kill_leader(s: Site) -> None:
    number = await s.leader()
    await trio.to_thread.run_sync(s.roles[number].stop, signal.SIGKILL)
    s.start_again(number)


async def stop_leader(s: Site) -> None:
    number = await s.leader()
    # The proxies in this thread go on meanwhile.
    assert await trio.to_thread.run_sync(s.roles[number].stop) == 0
    s.start_again(number)


async def freeze_leader(s: Site) -> None:
    """Stop the leader until another one leads. What waits in its sockets meanwhile is not carried out, and not answered."""
    number = await s.leader()
    queued = [(request, await s.connect(number)) for request in QUEUED]
    s.roles[number].process.send_signal(signal.SIGSTOP)
    for request, stream in queued:
        await stream.send_all(as_http(request))
    assert await s.leader() != number
    s.roles[number].process.send_signal(signal.SIGCONT)
    answers = [await receive_head(stream) for _, stream in queued]
    for _, stream in queued:
        await stream.aclose()
    assert all(not answer or answer.startswith(b"HTTP/1.1 503 ") for answer in answers), answers


async def kill_leader_of_etcd(s: Site) -> None:
    node = await s.etcd.leader()
    node.kill()
    await trio.sleep(2)
    node.start()


async def kill_both(s: Site) -> None:
    await kill_leader_of_etcd(s)
    await kill_leader(s)


async def lose_quorum(s: Site) -> None:
    for node in s.etcd.nodes[:2]:
        node.kill()
    await trio.sleep(TTL + 4)
    for node in s.etcd.nodes[:2]:
        node.start()


async def lose_answers(s: Site) -> None:
    for proxy in s.proxies:
        proxy.cuts = 5
    await trio.sleep(2)


Attack = Callable[[Site], Awaitable[None]]
ATTACKS: list[Attack] = [
    kill_leader, stop_leader, freeze_leader, kill_leader_of_etcd, kill_both, lose_quorum, lose_answers,
]  # fmt: skip


@pytest.mark.slow(7)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_nothing_acknowledged_is_lost_and_nothing_is_applied_twice(attack: Attack, tmp_path: Path) -> None:
    """Clients create VMs during the attack. Each acknowledged one is there with its uid, and no other VM of its name."""
    async with site(tmp_path) as s, Client(s.url, connect_seconds=2, answer_seconds=10) as client:
        await s.leader()
        acknowledged: dict[str, str] = {}
        # Of requests that were refused.
        statuses: set[int] = set()
        is_over = trio.Event()

        async def write(writer: int) -> None:
            number = 0
            while not is_over.is_set():
                name, number = f"vm-{writer}-{number}", number + 1
                try:
                    acknowledged[name] = (await client.vms.create(name=name, image="i")).uid
                except ResponseError as error:
                    statuses.add(error.status)
                except ClientError:
                    pass
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            for writer in range(3):
                nursery.start_soon(write, writer)
            await eventually(lambda: len(acknowledged) >= WRITES)
            await attack(s)
            before = len(acknowledged)
            await eventually(lambda: len(acknowledged) >= before + WRITES)
            is_over.set()
        await s.etcd.wait_ready()
        await s.leader()
        found = {vm.name: vm.uid for vm in await client.vms.list()}
        assert statuses <= {503}
        assert {name: uid for name, uid in acknowledged.items() if found.get(name) != uid} == {}


@pytest.mark.slow(5)
async def test_five_fail_overs_leave_eight_running_vms_alone(tmp_path: Path) -> None:
    def lives(vms: Sequence[VM]) -> list[tuple[str, str, int, str]]:
        return sorted((vm.uid, vm.state.status, vm.state.restart_count, vm.state.worker) for vm in vms)

    async with site(tmp_path) as s, Client(s.url, connect_seconds=2, answer_seconds=10) as client:
        await s.leader()
        with started("worker", s.url, "--name", "mac", *SYNTHETIC, home=tmp_path / "worker"):
            for number in range(8):
                await client.vms.create(name=f"vm-{number}", image="i", restart_policy="OnFailure")
            for number in range(8):
                await client.vms.wait(f"vm-{number}")
            before = lives(await client.vms.list())
            for _ in range(5):
                number = await s.leader()
                await trio.to_thread.run_sync(s.roles[number].stop, signal.SIGKILL)
                await s.end_lease()
                s.start_again(number)
                await s.leader()
                # The worker is back when it runs another one.
                await client.vms.create(name="another", image="i")
                await client.vms.wait("another")
                await client.vms.delete("another")
                assert lives(await client.vms.list()) == before
