"""A worker's host is cut off from the controller: nothing arrives, and no connection is closed. Real processes.

Each test runs in network namespaces, where a link is taken down and which needs root, and through a proxy that stops
passing bytes on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

import pytest
import trio
from harness.hosts import (
    SHORT_OFFLINE_TIMEOUT,
    Host,
    ProcessCluster,
    ends_well,
    has_failed,
    is_restarted,
    killing_leftovers,
)
from harness.processes import GENEROUS, LISTENING, PLAIN, controller, eventually, started
from harness.programs import ROOT_REASON, need

from orchard.client import Client, ConnectError

# Processes are started and time-outs of seconds waited for.
pytestmark = pytest.mark.slow

PING_INTERVAL = "2"  # seconds
# Addresses of this process and the controller: one of the 32,768 networks of four addresses in 198.18.0.0/15, which is for
# tests (RFC 2544). Its number is that of the process, since tests may run in parallel.
NETWORK = IPv4Address("198.18.0.0") + 4 * (os.getpid() % 0x8000)
TEST_ADDRESS, CONTROLLER_ADDRESS = NETWORK + 1, NETWORK + 2
# Addresses of the controller and the workers inside of the namespaces.
HUB, HOSTS = "10.214.0.1", ("10.214.0.2", "10.214.0.3")
IMPATIENT = (*PLAIN, "--worker-offline-timeout", str(SHORT_OFFLINE_TIMEOUT), "--ping-interval", PING_INTERVAL)


class Cable(Protocol):
    """The link between the controller and the host that is cut off."""

    def cut(self) -> None: ...

    def mend(self) -> None: ...


# The cluster, whose host can be cut off; another host; and the link of the first.
Connected = tuple[ProcessCluster, Host, Cable]


# ---- network namespaces ---------------------------------------------------------------------------------------------


def ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {words}: {done.stderr}"


@pytest.fixture
def can_make_namespaces() -> None:
    """Skip the test where network namespaces cannot be made."""
    need("ip", "nsenter")
    name = f"orchard-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{ROOT_REASON}: cannot make network namespaces: {tried.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", name], check=True)


class Namespaces:
    """One namespace for the controller, with a bridge in it, and one for each of two workers."""

    def __init__(self) -> None:
        self.hub, *self.hosts = (f"orchard-{os.getpid()}-{name}" for name in ("hub", "a", "b"))
        # The name of a link has at most 15 characters.
        self.link = f"orch{os.getpid()}"

    def make(self) -> None:
        for name in (self.hub, *self.hosts):
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"link add {self.link} type veth peer name near netns {self.hub}")
        ip(f"addr add {TEST_ADDRESS}/30 dev {self.link}")
        ip(f"link set {self.link} up")
        ip(f"-n {self.hub} addr add {CONTROLLER_ADDRESS}/30 dev near")
        ip(f"-n {self.hub} link set near up")
        ip(f"-n {self.hub} link add bridge type bridge")
        ip(f"-n {self.hub} addr add {HUB}/24 dev bridge")
        ip(f"-n {self.hub} link set bridge up")
        for number, (name, address) in enumerate(zip(self.hosts, HOSTS, strict=True)):
            ip(f"-n {self.hub} link add port{number} type veth peer name eth0 netns {name}")
            ip(f"-n {self.hub} link set port{number} master bridge up")
            ip(f"-n {name} addr add {address}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")

    def remove(self) -> None:
        # The kernel removes a namespace's links some time after the namespace: the next test could still find this one.
        subprocess.run(["ip", "link", "delete", self.link], capture_output=True, check=False)
        for name in (self.hub, *self.hosts):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    @staticmethod
    def inside(name: str) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{name}")

    def cut(self) -> None:
        ip(f"-n {self.hub} link set port0 down")

    def mend(self) -> None:
        ip(f"-n {self.hub} link set port0 up")


@contextmanager
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        made.make()
        yield made
    finally:
        made.remove()


@asynccontextmanager
async def in_namespaces(home: Path) -> AsyncIterator[Connected]:
    with (
        killing_leftovers(home),
        namespaces() as network,
        started("controller", "--listen", ":0", *IMPATIENT, home=home, before=network.inside(network.hub)) as control,
    ):
        port = re.findall(r":(\d+)", control.wait_for(LISTENING)[1])[-1]
        async with Client(f"http://{CONTROLLER_ADDRESS}:{port}") as client:
            c = ProcessCluster(home, client)
            other = c.add_host("other")
            for host, name in zip((c.host, other), network.hosts, strict=True):
                host.url = f"http://{HUB}:{port}"
                host.before = network.inside(name)
            yield c, other, network


# ---- a proxy --------------------------------------------------------------------------------------------------------


class Proxy:
    """A TCP proxy. While it is cut, it keeps what it received, as TCP keeps unacknowledged data."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = trio.Event()
        self._whole.set()

    def cut(self) -> None:
        self._whole = trio.Event()

    def mend(self) -> None:
        self._whole.set()

    async def serve(self, client: trio.SocketStream) -> None:
        await self._whole.wait()
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, client, server)
            nursery.start_soon(self._pump, server, client)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            async for data in source:
                await self._whole.wait()
                await sink.send_all(data)
            await self._whole.wait()
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.aclose_forcefully(source)
            await trio.aclose_forcefully(sink)


@asynccontextmanager
async def behind_a_proxy(home: Path) -> AsyncIterator[Connected]:
    with killing_leftovers(home), controller(*IMPATIENT, home=home) as (_, url):
        async with Client(url) as client, trio.open_nursery() as nursery:
            proxy = Proxy(int(url.rpartition(":")[2]))
            (listener,) = await nursery.start(
                partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1", handler_nursery=nursery)
            )
            c = ProcessCluster(home, client)
            c.host.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
            yield c, c.add_host("other"), proxy
            nursery.cancel_scope.cancel()


async def registered(c: ProcessCluster, count: int) -> bool:
    return len(await c.client.workers.list()) == count


# ---- the partition --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[in_namespaces, behind_a_proxy])
def connected(request: pytest.FixtureRequest) -> Callable[[Path], AbstractAsyncContextManager[Connected]]:
    if request.param is in_namespaces:
        request.getfixturevalue("can_make_namespaces")
    connect: Callable[[Path], AbstractAsyncContextManager[Connected]] = request.param
    return connect


@pytest.mark.slow(8)
async def test_vm_never_runs_on_both_sides_of_a_partition(
    tmp_path: Path, connected: Callable[[Path], AbstractAsyncContextManager[Connected]]
) -> None:
    async with connected(tmp_path) as (c, other, cable):
        with c.host.worker("--labels", "mac=1") as worker, other.worker("--labels", "other=1") as other_worker:
            again = await c.create_running("again", labels={"mac": "1"}, restart_policy="OnFailure")
            never = await c.create_running("never", labels={"mac": "1"})
            elsewhere = await c.create_running("elsewhere", labels={"other": "1"}, restart_policy="OnFailure")
            cable.cut()
            assert (await c.wait_vm("never", has_failed)).state.status_message.startswith('worker "mac" is offline')
            assert c.host.states() == {again.tart_name: "stopped", never.tart_name: "running"}
            cable.mend()
            # When the link is back, the worker ends the VM that has failed, and starts the other one again.
            now = await c.wait_vm("again", is_restarted)
            await eventually(partial(c.has_started, "again", 2))
            assert c.always_alone("again")
            await eventually(lambda: c.host.states() == {now.tart_name: "running", never.tart_name: "stopped"})
            assert await c.client.vms.get("elsewhere") == elsewhere
            assert ends_well(worker)
            assert ends_well(other_worker)


@pytest.mark.slow(8)
async def test_vm_is_started_elsewhere_only_after_it_ended_on_the_host_that_is_cut_off(
    tmp_path: Path, connected: Callable[[Path], AbstractAsyncContextManager[Connected]]
) -> None:
    async with connected(tmp_path) as (c, other, cable):
        with c.host.worker() as worker:
            first = await c.create_running("vm", restart_policy="OnFailure")
            with other.worker() as other_worker:
                await eventually(partial(registered, c, 2))
                cable.cut()
                second = await c.wait_vm("vm", is_restarted)
                assert second.state.worker == "other"
                await eventually(partial(c.has_started, "vm", 2))
                assert c.always_alone("vm")
                assert c.host.states() == {first.tart_name: "stopped"}
                cable.mend()
                await eventually(lambda: c.host.states() == {})
                assert await c.client.vms.get("vm") == second
                # The worker works as before, also after a short interruption.
                await c.create_running("here")
                cable.cut()
                cable.mend()
                await c.client.vms.delete("here")
                await eventually(lambda: c.host.states().keys() | other.states().keys() == {second.tart_name})
                assert ends_well(other_worker)
            assert ends_well(worker)


@pytest.mark.slow(5)
async def test_vm_with_a_stopped_supervisor_ends_on_a_host_that_is_cut_off(tmp_path: Path) -> None:
    async with behind_a_proxy(tmp_path) as (c, other, cable):
        with c.host.worker():
            first = await c.create_running("vm", restart_policy="OnFailure")
            with other.worker():
                await eventually(partial(registered, c, 2))
                cable.cut()
                os.kill(c.host.record(first).supervisor, signal.SIGSTOP)
                assert (await c.wait_vm("vm", is_restarted)).state.worker == "other"
                await eventually(partial(c.has_started, "vm", 2))
                assert c.always_alone("vm")


# ---- tunnels --------------------------------------------------------------------------------------------------------

# The first byte of each connection says what the server does: send without end (p), or only receive. The server prints
# a line when that byte has arrived, and another when the connection has ended.
SERVE = """
import socket, threading


def serve(connection):
    does = connection.recv(1)
    print("begun", does.decode(), flush=True)
    try:
        while does == b"p":
            connection.sendall(b"x" * 10000)
        while connection.recv(10000):
            pass
    except OSError:
        pass
    print("ended", does.decode(), flush=True)

listener = socket.create_server(("127.0.0.1", 0))
print("port", listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


@contextmanager
def serving(*before: str) -> Iterator[tuple[int, Callable[[], str]]]:
    """Run SERVE with words before its command. Yield its port, and a blocking function that returns its next line."""
    with subprocess.Popen([*before, sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[1]), process.stdout.readline
        finally:
            process.kill()


@pytest.mark.usefixtures("can_make_namespaces")
async def test_both_ends_of_a_tunnel_notice_a_cut_while_data_is_in_flight(tmp_path: Path) -> None:
    """A tunnel waits for a slow reader without limit, but not for one that is unreachable."""
    async with in_namespaces(tmp_path) as (c, _, cable):
        assert isinstance(cable, Namespaces)
        with c.host.worker(), serving(*cable.inside(cable.hosts[0])) as (port, line):
            await eventually(partial(registered, c, 1))
            reasons: dict[str, str] = {}

            async def use(does: str) -> None:
                try:
                    async with c.client.workers.port_forward(c.host.home.name, port, wait=GENEROUS) as stream:
                        await stream.send_all(does.encode())
                        async with trio.open_nursery() as nursery:
                            if does == "d":
                                nursery.start_soon(pour, stream)
                            async for _ in stream:
                                pass
                except* ConnectError as errors:
                    (reasons[does],) = (str(error) for error in errors.exceptions)

            async def pour(stream: trio.abc.Stream) -> None:
                while True:
                    await stream.send_all(b"x" * 10000)

            async def next_line() -> str:
                return await trio.to_thread.run_sync(line, abandon_on_cancel=True)

            # The server pours data, the client pours data ("drain"), or both are silent.
            ways = "pds"
            with trio.fail_after(GENEROUS):
                async with trio.open_nursery() as nursery:
                    for does in ways:
                        nursery.start_soon(use, does)
                        assert await next_line() == f"begun {does}\n"
                    cable.cut()
                ended = {await next_line() for _ in ways}
            assert set(reasons) == set(ways)
            assert all("the worker does not answer to pings" in reason for reason in reasons.values()), reasons
            assert ended == {f"ended {does}\n" for does in ways}
