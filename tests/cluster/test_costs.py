"""What the benchmarks measure, in small: costs that are bounded by a generous ratio to something measured beside them.

It is the processor's time that is compared, not the clock's, in turns, and the least of each: other work on the machine
makes things slower, and never faster. SPECIFICATION.md has the real limits, `./run bench` what really is.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))

from cluster import AUTHORIZATION, prepare, vm_of, worker_of
from load import BARE, CONTROLLER, Server, body_of, press, request, running
from plan import Busy, planned, sorted_each_time

from orchard.net.websocket import TunnelStream
from orchard.store import Change

ROUNDS = 3
GET = request("GET", "/v1/vms/vm-7", authorization=AUTHORIZATION)
FOREVER = ("--worker-offline-timeout", "1000000")


def least(*runs: Callable[[], float]) -> list[float]:
    """Run functions in turns that give what they took of the processor, and give the least of each."""
    rounds = [[run() for run in runs] for _ in range(ROUNDS)]
    return [min(each) for each in zip(*rounds, strict=True)]


def of_server(server: Server, count: int, asked: bytes) -> Callable[[], float]:
    def run() -> float:
        before = server.cpu()
        press(server.port, 8, itertools.repeat(asked, count))
        return server.cpu() - before

    return run


def of_this(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        before = time.process_time()
        work()
        return time.process_time() - before

    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("costs")


@pytest.fixture(scope="module")
def small(home: Path) -> Iterator[Server]:
    (home / "small").mkdir()
    prepare(home / "small", 50, 25)
    with running(*CONTROLLER, *FOREVER, home=home / "small") as server:
        yield server


def test_an_answer_costs_little_more_than_a_bare_servers(small: Server, home: Path) -> None:
    (home / "answer").write_bytes(body_of(small, GET))
    with running(BARE, str(home / "answer")) as bare:
        ours, theirs = least(of_server(small, 2000, GET), of_server(bare, 2000, GET))
    assert ours < 3 * theirs


def test_a_workers_poll_costs_the_same_in_a_big_cluster(small: Server, home: Path) -> None:
    (home / "big").mkdir()
    prepare(home / "big", 5000, 2500)
    asked = request("GET", "/v1/vms?filter=worker=worker-7", authorization=AUTHORIZATION)
    with running(*CONTROLLER, *FOREVER, home=home / "big") as big:
        in_big, in_small = least(of_server(big, 1500, asked), of_server(small, 1500, asked))
    assert in_big < 2 * in_small


def test_creates_share_their_syncs(home: Path) -> None:
    from api import COUNTED, get

    counts = home / "syncs"
    (home / "created").mkdir()
    prepare(home / "created", 0, 0)
    creates = (
        request("POST", "/v1/vms", json.dumps({"name": f"vm-{number}", "image": "i"}).encode(), AUTHORIZATION)
        for number in range(1280)
    )
    with running("-c", COUNTED, str(counts), *CONTROLLER[2:], home=home / "created") as server:
        press(server.port, 1, iter([get("/v1/vms")]))
        before = int(counts.read_text() or 0)
        press(server.port, 64, creates)
        assert int(counts.read_text()) - before < 1280 / 8


def test_planning_beats_sorting_all_workers_for_each_vm() -> None:
    vms = [vm_of(number) for number in range(1000)]
    workers = {worker.name: worker for worker in map(worker_of, range(500))}
    ours, theirs = least(of_this(lambda: planned(vms, workers)), of_this(lambda: sorted_each_time(vms, workers)))
    assert 5 * ours < theirs


async def test_a_change_costs_the_same_in_a_big_cluster(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "small").mkdir()
    took: dict[str, list[float]] = {"big": [], "small": []}
    clusters = {"big": Busy(tmp_path / "big", 2000), "small": Busy(tmp_path / "small", 50)}
    async with trio.open_nursery() as nursery:
        for busy in clusters.values():
            nursery.start_soon(busy.store.run)
            await busy.store.wait_durable()
        for _ in range(ROUNDS):
            for name, busy in clusters.items():
                before = time.process_time()
                await busy.change()
                took[name].append(time.process_time() - before)
                await busy.store.wait_durable()
        nursery.cancel_scope.cancel()
    for busy in clusters.values():
        busy.store.close()
    assert min(took["big"]) < 3 * min(took["small"])


def test_a_tunnel_costs_little_more_than_its_bytes() -> None:
    piece, count = b"x" * 64 * 1024, 300  # masked in C, by the package that the tests need

    async def carry(tunnelled: bool) -> None:
        near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
        async with near, far, trio.open_nursery() as nursery:
            source: trio.abc.Stream = near
            sink: trio.abc.Stream = far
            if tunnelled:
                source, sink = client, server = TunnelStream(near, client=True), TunnelStream(far, client=False)
                nursery.start_soon(client.run)
                nursery.start_soon(server.run)

            async def send() -> None:
                for _ in range(count):
                    await source.send_all(piece)

            nursery.start_soon(send)
            left = count * len(piece)
            while left:
                left -= len(await sink.receive_some(len(piece)))
            nursery.cancel_scope.cancel()

    bare, tunnel = least(*(of_this(partial(trio.run, carry, tunnelled)) for tunnelled in (False, True)))
    assert tunnel < 6 * bare


def test_a_line_of_a_watch_is_made_once_for_all() -> None:
    change = Change("vm", "vm", None, vm_of(1), b"{}")
    assert change.line is change.line
    assert change.line == b'{"type":"ADDED","object":{}}\n'


def test_heartbeats_do_not_reach_the_disk(small: Server, home: Path) -> None:
    state = home / "small" / "controller" / "state.jsonl"
    before = state.stat()
    beats = (
        request(
            "PUT",
            "/v1/workers/worker-3",
            json.dumps({"name": "worker-3", "last_seen": f"2030-01-01T00:00:{second:02d}Z"}).encode(),
            AUTHORIZATION,
        )
        for second in range(60)
    )
    press(small.port, 1, beats)
    assert (state.stat().st_size, state.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
