"""What requests cost, against a bare trio + h11 server that answers the same bytes.

    ./run bench api [--rounds N]

Controllers with 100, 1,000 and 10,000 VMs are processes of their own, and so are the bare servers. Prints the rates of
getting one VM, of listing 1,000, of a worker's poll in a big and in a small cluster, and of durable creates by many
clients at once and by one alone, which is compared with what the disk takes by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from cluster import AUTHORIZATION, prepare
from load import BARE, CONTROLLER, Server, body_of, press, request, running
from measure import ROUNDS, Variant, compare

CLIENTS, WRITERS, LISTERS = 32, 64, 4  # connections at once
GETS, CREATES, LISTS, ALONE = 8_000, 3_000, 200, 200  # requests of a round
SMALL, MIDDLE, BIG = 100, 1_000, 10_000  # VMs
FOREVER = ("--worker-offline-timeout", "1000000")
# Counts the times that data was forced to the disk, in a file, by one call of the system each: more would be measured.
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


class Benchmark:
    """Servers by what they are, for the time of `stack`."""

    def __init__(self, stack: ExitStack, rounds: int) -> None:
        self.rounds = rounds
        self._stack = stack
        self._numbers = itertools.count()
        self.small, self.middle, self.big = map(self._controller, (SMALL, MIDDLE, BIG))

    def _home(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory()))

    def _controller(self, vms: int) -> Server:
        home = self._home()
        prepare(home, vms, vms // 2)
        return self._stack.enter_context(running(*CONTROLLER, *FOREVER, home=home))

    def _bare(self, like: Server, asked: bytes) -> Server:
        """Start a bare server that gives the same answer as a controller."""
        file = self._home() / "answer"
        file.write_bytes(body_of(like, asked))
        return self._stack.enter_context(running(BARE, str(file)))

    def _variant(self, name: str, server: Server, connections: int, count: int, requests: Iterator[bytes]) -> Variant:
        return Variant(
            name, lambda: press(server.port, connections, itertools.islice(requests, count)), count, server.cpu
        )

    def gets(self) -> None:
        asked = get("/v1/vms/vm-7")
        bare = self._bare(self.small, asked)
        compare(
            self._variant("GET one VM", self.small, CLIENTS, GETS, itertools.repeat(asked)),
            self._variant("GET one VM of 10,000", self.big, CLIENTS, GETS, itertools.repeat(asked)),
            self._variant("bare server", bare, CLIENTS, GETS, itertools.repeat(asked)),
            count=self.rounds,
        )

    def lists(self) -> None:
        asked = get("/v1/vms")
        bare = self._bare(self.middle, asked)
        compare(
            self._variant(f"list of {MIDDLE:,} VMs", self.middle, LISTERS, LISTS, itertools.repeat(asked)),
            self._variant("the same bytes, bare", bare, LISTERS, LISTS, itertools.repeat(asked)),
            count=self.rounds,
        )

    def polls(self) -> None:
        asked = get("/v1/vms?filter=worker=worker-7")
        compare(
            self._variant(f"a worker's poll, {BIG:,} VMs", self.big, CLIENTS, GETS, itertools.repeat(asked)),
            self._variant(f"a worker's poll, {SMALL:,} VMs", self.small, CLIENTS, GETS, itertools.repeat(asked)),
            count=self.rounds,
        )

    def creates(self) -> None:
        home = self._home()
        prepare(home, 0, 0)
        counts = home / "syncs"
        server = self._stack.enter_context(running("-c", COUNTED, str(counts), *CONTROLLER[2:], home=home))
        bare = self._bare(self.small, get("/v1/vms/vm-7"))
        before = int(counts.read_text() or 0)
        compare(
            self._variant("durable creates", server, WRITERS, CREATES, self._creating()),
            self._variant("bare server", bare, WRITERS, CREATES, self._creating()),
            count=self.rounds,
        )
        synced = int(counts.read_text()) - before
        print(f"{'':44}{CREATES * (self.rounds + 1) / synced:.1f} creates to a sync")
        self._alone(server, home)

    def _alone(self, server: Server, home: Path) -> None:
        """Compare one create at a time with one append and sync at a time."""
        alone, appended = list[float](), list[float]()
        line = next(self._creating()) * 2  # about what a create writes
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
            f"one durable create alone: {1000 * statistics.median(alone):.2f} ms, {statistics.median(over):.2f} ms"
            f" ({over[0]:.2f} to {over[-1]:.2f}) over append and sync"
        )

    def _creating(self) -> Iterator[bytes]:
        while True:
            body = {"name": f"new-{next(self._numbers)}", "image": "ghcr.io/cirruslabs/macos-sequoia-base:latest"}
            yield request("POST", "/v1/vms", json.dumps(body).encode(), AUTHORIZATION)


def get(path: str) -> bytes:
    return request("GET", path, authorization=AUTHORIZATION)


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench api")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default %(default)s")
    parser.add_argument("--only", choices=("gets", "lists", "polls", "creates"), help="default: everything")
    options = parser.parse_args()
    with ExitStack() as stack:
        benchmark = Benchmark(stack, options.rounds)
        for name in ("gets", "lists", "polls", "creates"):
            if options.only in (None, name):
                getattr(benchmark, name)()


if __name__ == "__main__":
    main()
