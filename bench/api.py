"""The cost of requests over TLS and in the clear, beside a bare trio + h11 server that sends the same bytes.

    ./run bench api [--rounds N] [--only PART] [--against DIRECTORY]

All servers are processes of their own and are measured in turns. Shown are the rate and the server's CPU time of: one
VM; 1,000 different VMs; a list of 1,000 VMs; the polls of 5,000 workers; a worker's poll in a big cluster; durable
creations by many clients at once, and by one alone, which is compared with one append and sync of the disk. Beside the
list is the cost of its encryption in a loop without a server.

With --against, the controller of another checkout, which has a `.venv` of its own, is measured in the same turns. The
ratio of CPU times is the one to look at then: rates are as noisy as the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import trio
from cluster import AUTHORIZATION
from load import BARE, CONTROLLER, CONTROLLER_TLS, Server, body_of, client_context, press, press_over, request, running
from measure import ROUNDS, Variant, compare

from orchard.net import tls

# Connections at once.
CLIENTS, WRITERS, LISTERS = 32, 64, 4
# Requests of one round.
GETS, CREATES, LISTS, ALONE = 8_000, 3_000, 200, 200
# VMs, and workers that poll.
SMALL, MIDDLE, BIG = 100, 1_000, 10_000
POLLERS = 5_000
# The size of a TLS record.
RECORD_BYTES = 16 * 1024
FOREVER = ("--worker-offline-timeout", "1000000")
PARTS = ("gets", "lists", "polls", "creates")
# Counts how often data was forced to the disk, in a file.
COUNTED = """
import os, sys
from orchard import controller
from orchard.storage import journal
count, sync = 0, journal.Disk.sync
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
def counted(*arguments):
    global count
    count += 1
    sync(*arguments)
    os.pwrite(file, b"%d" % count, 0)
journal.Disk.sync = counted
controller.main(sys.argv[2:])
"""
PREPARE = "import sys, pathlib, cluster; cluster.prepare(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"


class Checkout:
    """A copy of the project: the interpreter that has it installed, and its benchmarks."""

    def __init__(self, name: str, python: str, bench: Path) -> None:
        self.name = name
        self.python = python
        self._bench = bench

    def prepare(self, home: Path, vms: int, workers: int) -> None:
        """Write a cluster in this checkout's file format."""
        command = [self.python, "-c", PREPARE, str(home), str(vms), str(workers)]
        subprocess.run(command, cwd=self._bench, check=True)


class Benchmark:
    """Servers, which run for the time of `stack`."""

    def __init__(self, stack: ExitStack, rounds: int, against: Path | None) -> None:
        self.rounds = rounds
        self._stack = stack
        self._numbers = itertools.count()
        self._checkouts = [Checkout("", sys.executable, Path(__file__).parent)]
        if against is not None:
            self._checkouts.append(Checkout(f"{against.name}: ", str(against / ".venv/bin/python"), against / "bench"))

    def _home(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory()))

    def _controllers(self, vms: int, workers: int) -> dict[str, Server]:
        """Start a controller of each checkout over TLS and in the clear. Return them by names for the table."""
        found = {}
        for checkout in self._checkouts:
            for how, arguments in (("TLS", CONTROLLER_TLS), ("in the clear", CONTROLLER)):
                home = self._home()
                checkout.prepare(home, vms, workers)
                server = running(*arguments, *FOREVER, home=home, python=checkout.python)
                found[f"{checkout.name}%s, {how}"] = self._stack.enter_context(server)
        return found

    def _bare(self, like: Server, asked: bytes) -> Server:
        """Start a bare server, in the clear, that sends the same body as a controller."""
        file = self._home() / "answer"
        file.write_bytes(body_of(like, asked))
        return self._stack.enter_context(running(BARE, str(file)))

    def _compare(
        self,
        what: str,
        servers: dict[str, Server],
        count: int,
        connections: int,
        requests: Callable[[], Iterator[bytes]],
        *others: Variant,
    ) -> None:
        """Measure the same requests to several servers, and `others`, in turns. The last server is the baseline."""

        def variant(name: str, server: Server) -> Variant:
            # Handshakes are not part of a request's cost.
            opened = [self._stack.enter_context(server.connect()) for _ in range(connections)]

            def run() -> None:
                press_over(opened, itertools.islice(requests(), count))

            return Variant(name.replace("%s", what), run, count, server.cpu)

        *controllers, base = itertools.starmap(variant, servers.items())
        compare(*controllers, *others, base, count=self.rounds)

    def gets(self) -> None:
        small, middle = self._controllers(SMALL, SMALL // 2), self._controllers(MIDDLE, MIDDLE // 2)
        asked = get("/v1/vms/vm-7")
        bare = self._bare(next(iter(small.values())), asked)
        self._compare("GET one VM", {**small, "bare server": bare}, GETS, CLIENTS, partial(itertools.repeat, asked))
        different = [get(f"/v1/vms/vm-{number}") for number in range(MIDDLE)]
        servers = {**middle, "bare server": bare}
        self._compare("GET of 1,000 VMs", servers, GETS, CLIENTS, partial(itertools.cycle, different))

    def lists(self) -> None:
        middle = self._controllers(MIDDLE, MIDDLE // 2)
        asked = get("/v1/vms")
        bare = self._bare(next(iter(middle.values())), asked)
        servers = {**middle, "the same bytes, bare": bare}
        encrypt = encrypter(self._home(), body_of(bare, asked))
        encryption = Variant("encryption of the same bytes, bare", partial(encrypt, LISTS), LISTS)
        self._compare(f"list of {MIDDLE:,} VMs", servers, LISTS, LISTERS, partial(itertools.repeat, asked), encryption)

    def polls(self) -> None:
        big, small = self._controllers(BIG, POLLERS), self._controllers(SMALL, SMALL // 2)
        polls = [get(f"/v1/vms?filter=worker=worker-{number}") for number in range(POLLERS)]
        self._compare(f"polls of {POLLERS:,} workers", big, GETS, CLIENTS, partial(itertools.cycle, polls))
        servers = {f"{name} {BIG:,} VMs": server for name, server in big.items()}
        servers |= {f"{name} {SMALL:,} VMs": server for name, server in small.items()}
        self._compare("poll", servers, GETS, CLIENTS, partial(itertools.repeat, polls[7]))

    def creates(self) -> None:
        servers = self._controllers(0, 0)
        bare = self._bare(next(iter(self._controllers(SMALL, SMALL // 2).values())), get("/v1/vms/vm-7"))
        self._compare("durable creates", {**servers, "bare server": bare}, CREATES, WRITERS, self._creating)
        home = self._home()
        self._checkouts[0].prepare(home, 0, 0)
        counts = home / "syncs"
        server = self._stack.enter_context(running("-c", COUNTED, str(counts), *CONTROLLER[2:], home=home))
        before = int(counts.read_text() or 0)
        press(server.port, WRITERS, itertools.islice(self._creating(), CREATES))
        print(f"{'':44}{CREATES / (int(counts.read_text()) - before):.1f} creations to a sync")
        self._alone(server, home)

    def _alone(self, server: Server, home: Path) -> None:
        """Compare one creation at a time with one append and sync at a time."""
        alone, appended = list[float](), list[float]()
        # About what a creation writes.
        line = next(self._creating()) * 2
        with (home / "appended").open("ab", buffering=0) as file:
            for _ in range(self.rounds + 1):
                alone.append(statistics.median(press(server.port, 1, itertools.islice(self._creating(), ALONE))))
                waits = []
                for _ in range(ALONE):
                    began = time.perf_counter()
                    file.write(line)
                    os.fdatasync(file.fileno())
                    waits.append(time.perf_counter() - began)
                appended.append(statistics.median(waits))
        over = sorted(1000 * (create - append) for create, append in zip(alone[1:], appended[1:], strict=True))
        print(
            f"one durable creation alone: {1000 * statistics.median(alone):.2f} ms, {statistics.median(over):.2f} ms"
            f" ({over[0]:.2f} to {over[-1]:.2f}) over append and sync"
        )

    def _creating(self) -> Iterator[bytes]:
        while True:
            body = {"name": f"new-{next(self._numbers)}", "image": "ghcr.io/cirruslabs/macos-sequoia-base:latest"}
            yield request("POST", "/v1/vms", json.dumps(body).encode(), AUTHORIZATION)


def get(path: str) -> bytes:
    """Return a GET request of the account that `cluster.fill` creates."""
    return request("GET", path, authorization=AUTHORIZATION)


def encrypter(directory: Path, body: bytes) -> Callable[[int], None]:
    """Return a function that encrypts a body so many times in memory, in records of 16 KiB, as a server of TLS does."""
    context = tls.server_context(*trio.run(tls.self_signed, directory))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    client = client_context().wrap_bio(outgoing, incoming)
    for _ in range(4):
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()

    def encrypt(count: int) -> None:
        view = memoryview(body)
        for _ in range(count):
            for start in range(0, len(view), RECORD_BYTES):
                server.write(view[start : start + RECORD_BYTES])
                outgoing.read()

    return encrypt


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench api")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--only", choices=PARTS, help="default: everything")
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="also measure the checkout in DIRECTORY")
    options = parser.parse_args()
    for name in PARTS:
        if options.only in (None, name):
            with ExitStack() as stack:
                getattr(Benchmark(stack, options.rounds, options.against), name)()


if __name__ == "__main__":
    main()
