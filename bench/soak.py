"""Find leaks of descriptors, tasks, threads, processes, files and memory by random use, for hours if wanted.

    ./run bench soak [--seconds S] [--actions N] [--seed N]

A controller and workers with synthetic VMs run in this process, on real sockets. VMs are created, changed, deleted,
watched, and reached through tunnels that end in every way. Workers are restarted with and without their VMs. Other
clients open connections and send nothing or garbage. After each round all VMs are deleted and everything is counted.

A count is a leak if it is higher in every round of the second half than in any of the first. Objects that the
controller remembers up to a bound do not count. Memory is judged after many rounds only: allocators take more of it in
steps, which look like a leak in a few rounds.

It prints the counts, and exits with status 1 if something was left. A seed gives the same actions, but not the same
timing.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path

import trio

from orchard import controller
from orchard.base.files import LIFECYCLE_FILE
from orchard.client import Client, ClientError
from orchard.net.request import HeaderBlock
from orchard.schema import TART_VMS, Event, Worker
from orchard.state.change_log import ChangeLog
from orchard.vm.synthetic import SyntheticDriver
from orchard.worker import WorkerService

# Actions of a round.
ACTIONS = 300
# Actions in progress at the same time.
AT_ONCE = 8
WORKERS = 4
# Names of VMs, which are used again and again.
VMS = 12
# Limit of waiting until all counts are stable.
QUIET_SECONDS = 300.0
# So many counts in a row, a tenth of a second apart, must be equal.
EQUAL_COUNTS = 20
# So many more objects of one class are a leak. A leak of each VM, tunnel or session leaves more, even in two short
# rounds.
LEAKED_OBJECTS = 4
# The last headers of requests and the last batch of events, each up to a bound.
REMEMBERED = (HeaderBlock, Event)
# Fewer rounds say nothing about memory.
MEMORY_ROUNDS = 10
# Memory may grow by this share after the first half of the rounds.
MEMORY_SHARE = 0.05
SCRIPTS = ("echo hello", "seq 200; exit 3", "sleep 1000", "sleep 1000 & echo over", "")


@dataclass(frozen=True)
class Count:
    """The numbers of things that exist while nothing happens."""

    descriptors: int
    tasks: int
    threads: int
    processes: int
    files: int
    memory: int  # KiB
    objects: Counter[str]


# Fields of Count that may not grow at all.
COUNTED = ("descriptors", "tasks", "threads", "processes", "files")


class SoakCluster:
    """A controller, hosts, and workers that can be restarted on their hosts."""

    def __init__(self, home: Path, chance: random.Random) -> None:
        self.home = home
        self.chance = chance
        self.done: Counter[str] = Counter()
        self.hosts = {f"worker-{n}": SyntheticDriver(home / "vms" / f"worker-{n}") for n in range(WORKERS)}
        self.client: Client
        self.echo_port = 0
        self._inside: trio.Nursery
        self._scopes: dict[str, trio.CancelScope] = {}
        self._clients: dict[str, Client] = {}
        self._ended: dict[str, trio.Event] = {}
        self._restarting: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        settings = controller.ControllerSettings(
            data_dir=self.home / "controller", host="127.0.0.1", port=0, tls=False, auth=False
        )
        stop = trio.Event()
        for name in self.hosts:
            (self.home / "vms" / name).mkdir(parents=True)
        async with trio.open_nursery() as outside:
            run = partial(controller.run, settings, stop=stop, grace=1.0)
            self.url = (await outside.start(run)).url
            async with trio.open_nursery() as self._inside, Client(self.url) as self.client:
                listeners = await self._inside.start(trio.serve_tcp, echo, 0)
                self.echo_port = listeners[0].socket.getsockname()[1]
                for name in self.hosts:
                    await self.start_worker(name)
                yield
                self._inside.cancel_scope.cancel()
            stop.set()

    async def start_worker(self, name: str, *, stop_vms: bool = False) -> None:
        description = Worker(name=name, machine_id=name, resources={TART_VMS: 4})
        scope = self._scopes[name] = trio.CancelScope()
        ended = self._ended[name] = trio.Event()

        async def work(task_status: trio.TaskStatus[None]) -> None:
            try:
                with scope:
                    async with Client(self.url) as client:
                        self._clients[name] = client
                        worker = WorkerService(description, client, self.hosts[name], stop_vms_on_exit=stop_vms)
                        await worker.run(task_status=task_status)
            finally:
                ended.set()

        await self._inside.start(work)

    # -- actions of users and other clients

    async def act(self) -> None:
        """Do something at random. Refused requests are ignored."""
        actions: list[Callable[[], Awaitable[object]]] = [
            *[self.create] * 6, *[self.delete] * 5, *[self.tunnel] * 6, self.change, self.watch, self.events,
            self.address, self.restart_worker, self.connect_only, self.abandon,
        ]  # fmt: skip
        action = self.chance.choice(actions)
        self.done[getattr(action, "__name__", "?")] += 1
        with suppress(ClientError, OSError, trio.BrokenResourceError, trio.TooSlowError):
            await action()

    def vm(self) -> str:
        return f"vm-{self.chance.randrange(VMS)}"

    async def create(self) -> None:
        await self.client.vms.create(
            name=self.vm(),
            image="image",
            suspendable=True,
            restart_policy=self.chance.choice(["Never", "OnFailure"]),
            startup_script={"script_content": self.chance.choice(SCRIPTS)},
        )

    async def delete(self) -> None:
        await self.client.vms.delete(self.vm())

    async def change(self) -> None:
        await self.client.vms.patch(self.vm(), power_state=self.chance.choice(["running", "stopped", "suspended"]))

    async def watch(self) -> None:
        with trio.move_on_after(self.chance.random()):
            async with self.client.vms.watch(self.vm()) as changes:
                async for _ in changes:
                    pass

    async def events(self) -> None:
        async for _ in self.client.vms.events(self.vm()):
            pass

    async def address(self) -> None:
        await self.client.vms.ip(self.vm(), wait=1)

    async def tunnel(self) -> None:
        port = self.echo_port if self.chance.random() < 0.9 else 1
        with trio.move_on_after(5 * self.chance.random()):
            async with self.client.vms.port_forward(self.vm(), port, wait=1) as stream:
                for _ in range(self.chance.randrange(4)):
                    data = self.chance.randbytes(self.chance.choice([1, 1000, 200_000]))
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(stream.send_all, data)
                        left = len(data)
                        while left and (piece := await stream.receive_some(65536)):
                            left -= len(piece)

    async def restart_worker(self) -> None:
        name = self.chance.choice(list(self.hosts))
        if name not in self._restarting:
            self._restarting.add(name)
            await self.start_again(name, stop_vms=self.chance.random() < 0.3)
            self._restarting.remove(name)

    async def start_again(self, name: str, *, stop_vms: bool = False) -> None:
        self._scopes[name].cancel()
        await self._ended[name].wait()
        await self.start_worker(name, stop_vms=stop_vms)

    async def connect_only(self) -> None:
        """Open a connection, and send nothing, garbage or half of a request."""
        sent = self.chance.choice(
            [b"", b"GET /v1/vms HT", b"nonsense\r\n\r\n", b"POST /v1/vms HTTP/1.1\r\nHost: x\r\n"]
        )
        stream = await trio.open_tcp_stream("127.0.0.1", int(self.url.rpartition(":")[2]))
        async with stream:
            await stream.send_all(sent)
            with trio.move_on_after(self.chance.random()):
                await stream.receive_some(1000)

    async def abandon(self) -> None:
        """Send a request that takes long, and close the connection."""
        with trio.move_on_after(0.1 * self.chance.random()):
            async with self.client.vms.port_forward("unknown", 22, wait=60):
                pass

    # -- at rest

    def files(self) -> list[Path]:
        """Return all files but the one of lifecycle events, which is made when the first event is written, some time later."""
        return sorted(path for path in self.home.rglob("*") if path.name != LIFECYCLE_FILE)

    async def rest(self) -> Count:
        """Delete all VMs, wait until they are gone, restart the workers, and count what exists."""
        with trio.fail_after(QUIET_SECONDS):
            for vm in await self.client.vms.list():
                with suppress(ClientError):
                    await self.client.vms.delete(vm.name)
            while any([await host.list_vms() for host in self.hosts.values()]) or processes():  # noqa: ASYNC110
                await trio.sleep(0.05)
            # All connections are new, as at the beginning.
            for name in self.hosts:
                await self.start_again(name)
            # The worker's end of a tunnel whose client went away before it was joined is kept for some seconds.
            while await self.open_tunnels():  # noqa: ASYNC110
                await trio.sleep(0.05)
            counts = [self.count()]
            while len(counts) < EQUAL_COUNTS or len(set(counts[-EQUAL_COUNTS:])) > 1:
                await self.keep_one_connection_each()
                await trio.sleep(0.1)
                counts.append(self.count())
        objects = live_objects()
        memory = int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))  # noqa: ASYNC221
        return Count(*counts[-1], memory, objects)

    async def open_tunnels(self) -> int:
        metrics = (await self.client.request("GET", "/metrics")).body.decode()
        return int(next(line.split()[1] for line in metrics.splitlines() if line.startswith("orchard_tunnels ")))

    async def keep_one_connection_each(self) -> None:
        """A client keeps as many idle connections as it had requests at the same time, which is chance."""
        for client in (self.client, *self._clients.values()):
            await client.close_idle()
            await client.info()

    def count(self) -> tuple[int, int, int, int, int]:
        return (
            len(os.listdir("/dev/fd")),  # noqa: PTH208
            tasks(trio.lowlevel.current_root_task()),
            # trio keeps idle threads.
            sum(not thread.name.startswith("Trio") for thread in threading.enumerate()),
            processes(),
            len(self.files()),
        )


async def echo(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


def tasks(task: trio.lowlevel.Task | None) -> int:
    """Count a task and all tasks in its nurseries."""
    if task is None:
        return 0
    return 1 + sum(tasks(child) for nursery in task.child_nurseries for child in nursery.child_tasks)


def processes() -> int:
    """Count the children of this process, without the `ps` that lists them."""
    listed = subprocess.check_output(["ps", "-A", "-o", "ppid=,comm="], text=True)
    pairs = (line.split(None, 1) for line in listed.splitlines())
    return sum(1 for parent, name in pairs if int(parent) == os.getpid() and name.strip() != "ps")


def live_objects() -> Counter[str]:
    """Count the objects of each class of the product, without what is remembered up to a bound."""
    gc.collect()
    found = gc.get_objects()
    remembered: set[int] = set()
    following: list[object] = [log for log in found if isinstance(log, ChangeLog)]
    while following:
        inner = [one for one in gc.get_referents(*following) if is_data(one) and id(one) not in remembered]
        remembered.update(map(id, inner))
        following = inner
    return Counter(
        f"{type(one).__module__}.{type(one).__qualname__}"
        for one in found
        if is_ours(one) and id(one) not in remembered and not isinstance(one, REMEMBERED)
    )


def is_ours(one: object) -> bool:
    # Classes without a module of their own have a descriptor in its place.
    return str(type(one).__module__).startswith("orchard.")


def is_data(one: object) -> bool:
    """Return whether an object of the change log can be followed without leaving what the log alone holds."""
    return isinstance(one, (list, tuple, dict, deque)) or (is_dataclass(one) and is_ours(one))


async def run_round(c: SoakCluster, actions: int) -> None:
    limit = trio.CapacityLimiter(AT_ONCE)

    async def one() -> None:
        async with limit:
            await c.act()

    async with trio.open_nursery() as nursery:
        for _ in range(actions):
            nursery.start_soon(one)


def grown(counts: list[Count]) -> dict[str, tuple[int, int]]:
    """Return the counts that are higher in all later rounds than in all earlier ones, with the most and the least of them."""
    early, late = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    left = {}
    for what in COUNTED:
        most, least = max(getattr(count, what) for count in early), min(getattr(count, what) for count in late)
        if least > most:
            left[what] = (most, least)
    for kind in late[-1].objects:
        most, least = max(count.objects[kind] for count in early), min(count.objects[kind] for count in late)
        if least >= most + LEAKED_OBJECTS:
            left[f"objects of {kind}"] = (most, least)
    most, last = int(max(count.memory for count in early) * (1 + MEMORY_SHARE)), late[-1].memory
    if len(counts) >= MEMORY_ROUNDS and last > most:
        left["memory"] = (most, last)
    return left


async def soak(seconds: float, actions: int, seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="orchard-soak-") as home:
        c = SoakCluster(Path(home), random.Random(seed))
        async with c.running():
            counts: list[Count] = []
            until = trio.current_time() + seconds
            while trio.current_time() < until or len(counts) < 3:
                await run_round(c, actions)
                counts.append(await c.rest())
                if len(counts) == 1:
                    print("round", *COUNTED, "memory", "objects", sep="\t")
                now = counts[-1]
                numbers = [getattr(now, what) for what in COUNTED]
                print(len(counts), *numbers, now.memory, now.objects.total(), sep="\t", flush=True)
        left = grown(counts)
        if "files" in left:
            print("files:", *map(str, c.files()), sep="\n  ")
    print(f"{sum(c.done.values())} actions, seed {seed}:", dict(c.done))
    for what, (before, after) in left.items():
        print(f"left behind: {what} grew from {before} to {after}")
    return 1 if left else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench soak")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to run; default: %(default)s")
    parser.add_argument("--actions", type=int, default=ACTIONS, help="in a round; default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="default: a random one")
    options = parser.parse_args()
    return trio.run(soak, options.seconds, options.actions, options.seed)


if __name__ == "__main__":
    # Warnings also tell of a machine that is busy, such as of a scheduler that was late.
    logging.getLogger("orchard").setLevel(logging.ERROR)
    sys.exit(main())
