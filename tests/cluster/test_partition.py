"""A worker's host that is cut off: nothing arrives any more, and nobody is told. Real processes.

Once in network namespaces, where a link is taken down; that needs root. Once through a proxy that lets nothing pass,
which anybody may do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
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

from orchard.client import Client, ConnectError

PING = "2"  # seconds
# This process and the controller; by this process's number, because others may be testing at the same time.
NEAR, FAR = (f"10.213.{os.getpid() % 250}.{end}" for end in (1, 2))
HUB, HOSTS = "10.214.0.1", ("10.214.0.2", "10.214.0.3")  # the controller, and the workers
IMPATIENT = (*PLAIN, "--worker-offline-timeout", str(SHORT_OFFLINE_TIMEOUT), "--ping-interval", PING)


class Cable(Protocol):
    """The way between the controller and the host that is cut off."""

    def cut(self) -> None: ...

    def mend(self) -> None: ...


Connected = tuple[ProcessCluster, Host, Cable]  # the host of the site is the one that can be cut off


# ---- network namespaces --------------------------------------------------------------------------------------------


def ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {words}: {done.stderr}"


def why_no_namespaces() -> str:
    """Say why there can't be network namespaces here ("": there can)."""
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "there is no ip, or no nsenter"
    name = f"orchard-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return tried.stderr.strip()


class Namespaces:
    """One for the controller, with a bridge in it, and one for each of two workers; no other traffic gets there."""

    def __init__(self) -> None:
        self.hub, *self.hosts = (f"orchard-{os.getpid()}-{name}" for name in ("hub", "a", "b"))
        self.near = f"orch{os.getpid()}"  # 15 characters at most

    def make(self) -> None:
        for name in (self.hub, *self.hosts):
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"link add {self.near} type veth peer name near netns {self.hub}")
        ip(f"addr add {NEAR}/30 dev {self.near}")
        ip(f"link set {self.near} up")
        ip(f"-n {self.hub} addr add {FAR}/30 dev near")
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
        # With a namespace go the links that it has an end of, but later: the next test would find this one still there.
        subprocess.run(["ip", "link", "delete", self.near], capture_output=True, check=False)
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
    if reason := why_no_namespaces():
        pytest.skip(f"no network namespaces: {reason}")
    with (
        killing_leftovers(home),
        namespaces() as network,
        started("controller", "--listen", ":0", *IMPATIENT, home=home, before=network.inside(network.hub)) as control,
    ):
        port = re.findall(r":(\d+)", control.wait_for(LISTENING)[1])[-1]
        async with Client(f"http://{FAR}:{port}") as client:
            c = ProcessCluster(home, client)
            other = c.add_host("other")
            for host, name in zip((c.host, other), network.hosts, strict=True):
                host.url = f"http://{HUB}:{port}"
                host.before = network.inside(name)
            yield c, other, network


# ---- a proxy -------------------------------------------------------------------------------------------------------


class Proxy:
    """Passes on what it gets, but for the time that it is cut; then it keeps it, as TCP does what is not confirmed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = trio.Event()
        self._whole.set()

    def cut(self) -> None:
        self._whole = trio.Event()

    def mend(self) -> None:
        self._whole.set()

    async def serve(self, near: trio.SocketStream) -> None:
        await self._whole.wait()
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, near, far)
            nursery.start_soon(self._pump, far, near)

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


# ---- the partition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connected", [in_namespaces, behind_a_proxy])
async def test_a_vm_never_runs_on_both_sides_of_a_partition(
    tmp_path: Path, connected: Callable[[Path], AbstractAsyncContextManager[Connected]]
) -> None:
    async with connected(tmp_path) as (c, other, cable):
        with c.host.worker("--labels", "mac=1") as worker, other.worker("--labels", "other=1") as stays:
            again = await c.create_running("again", labels={"mac": "1"}, restart_policy="OnFailure")
            never = await c.create_running("never", labels={"mac": "1"})
            elsewhere = await c.create_running("elsewhere", labels={"other": "1"}, restart_policy="OnFailure")
            cable.cut()
            assert (await c.wait_vm("never", has_failed)).state.status_message.startswith('worker "mac" is offline')
            assert c.host.states() == {again.tart_name: "stopped", never.tart_name: "running"}
            cable.mend()
            # Back again, it has left nothing of what had failed, and begins anew what is still to run.
            now = await c.wait_vm("again", is_restarted)
            await eventually(partial(c.has_started, "again", 2))
            assert c.starts("again") == ["alone", "alone"]
            await eventually(lambda: c.host.states() == {now.tart_name: "running", never.tart_name: "stopped"})
            assert await c.client.vms.get("elsewhere") == elsewhere
            assert ends_well(worker)
            assert ends_well(stays)


@pytest.mark.parametrize("connected", [in_namespaces, behind_a_proxy])
async def test_a_vm_is_started_elsewhere_when_it_has_ended_on_the_host_that_is_cut_off(
    tmp_path: Path, connected: Callable[[Path], AbstractAsyncContextManager[Connected]]
) -> None:
    async with connected(tmp_path) as (c, other, cable):
        with c.host.worker() as worker:
            first = await c.create_running("vm", restart_policy="OnFailure")
            with other.worker() as stays:
                await eventually(partial(registered, c, 2))
                cable.cut()
                second = await c.wait_vm("vm", is_restarted)
                assert second.state.worker == "other"
                await eventually(partial(c.has_started, "vm", 2))
                assert c.starts("vm") == ["alone", "alone"]
                assert c.host.states() == {first.tart_name: "stopped"}
                cable.mend()
                await eventually(lambda: c.host.states() == {})
                assert await c.client.vms.get("vm") == second
                # It is as good as before, as short interruptions leave it.
                await c.create_running("here")
                cable.cut()
                cable.mend()
                await c.client.vms.delete("here")
                await eventually(lambda: c.host.states().keys() | other.states().keys() == {second.tart_name})
                assert ends_well(stays)
            assert ends_well(worker)


# ---- tunnels -------------------------------------------------------------------------------------------------------

# Each connection begins with a letter: what is to be done. It tells that this has arrived, and that it has come to its end.
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
    """Run it with words before its command: its port, and how to wait for its next line."""
    with subprocess.Popen([*before, sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().split()[1]), process.stdout.readline
        finally:
            process.kill()


async def test_both_ends_of_a_tunnel_that_is_cut_off_find_out_though_data_is_under_way(tmp_path: Path) -> None:
    """Data under way waits for its reader however slow he is, but not for one that is gone."""
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

            ways = "pds"  # it pours, drinks, or is silent
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
