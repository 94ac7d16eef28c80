"""Costs compared with a baseline of the same run, with generous bounds, as short forms of the benchmarks.

The tests compare the least processor time of several turns, because other work on the machine makes a turn only slower.
SPECIFICATION.md has the real limits and figures, `./run bench` measures them.
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

from cluster import AUTHORIZATION, NOW, prepare, vm_of, worker_of
from load import BARE, CONTROLLER, Server, body_of, press, request, running
from plan import BusyCluster, connected, planned, sorted_each_time

from orchard.net.websocket import TunnelStream
from orchard.state.changes import Change
from orchard.storage.file_engine import FileEngine
from orchard.store import Store

ROUNDS = 3
GET = request("GET", "/v1/vms/vm-7", authorization=AUTHORIZATION)
FOREVER = ("--worker-offline-timeout", "1000000")


def least(*runs: Callable[[], float]) -> list[float]:
    """Run functions in turns. Each returns its processor time; return the least of each function."""
    rounds = [[run() for run in runs] for _ in range(ROUNDS)]
    return [min(each) for each in zip(*rounds, strict=True)]


def server_cpu(server: Server, count: int, asked: bytes) -> Callable[[], float]:
    def run() -> float:
        before = server.cpu()
        press(server.port, 8, itertools.repeat(asked, count))
        return server.cpu() - before

    return run


def own_cpu(work: Callable[[], object]) -> Callable[[], float]:
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


@pytest.mark.slow
def test_small_request_costs_at_most_three_times_a_bare_server(small: Server, home: Path) -> None:
    (home / "answer").write_bytes(body_of(small, GET))
    with running(BARE, str(home / "answer")) as bare:
        ours, theirs = least(server_cpu(small, 1500, GET), server_cpu(bare, 1500, GET))
    assert ours < 3 * theirs


@pytest.mark.slow
def test_poll_of_a_worker_costs_the_same_in_a_large_cluster(small: Server, home: Path) -> None:
    (home / "big").mkdir()
    prepare(home / "big", 2000, 1000)
    asked = request("GET", "/v1/vms?filter=worker=worker-7", authorization=AUTHORIZATION)
    with running(*CONTROLLER, *FOREVER, home=home / "big") as big:
        in_big, in_small = least(server_cpu(big, 1000, asked), server_cpu(small, 1000, asked))
    assert in_big < 2 * in_small


@pytest.mark.slow
def test_concurrent_creations_share_fsyncs(home: Path) -> None:
    from api import COUNTED, get

    counts = home / "syncs"
    (home / "created").mkdir()
    prepare(home / "created", 0, 0)
    creates = (
        request("POST", "/v1/vms", json.dumps({"name": f"vm-{number}", "image": "i"}).encode(), AUTHORIZATION)
        for number in range(640)
    )
    with running("-c", COUNTED, str(counts), *CONTROLLER[2:], home=home / "created") as server:
        press(server.port, 1, iter([get("/v1/vms")]))
        before = int(counts.read_text() or 0)
        press(server.port, 64, creates)
        assert int(counts.read_text()) - before < 640 / 8


def test_planning_costs_less_than_sorting_all_workers_for_each_vm() -> None:
    vms = [vm_of(number) for number in range(1000)]
    workers = {worker.name: worker for worker in map(worker_of, range(500))}
    # Sorting is slow, so it gets a tenth of the VMs.
    few, liveness = vms[:100], connected(workers)
    ours, theirs = least(
        own_cpu(lambda: planned(vms, workers, liveness)), own_cpu(lambda: sorted_each_time(few, workers))
    )
    assert 5 * ours < 10 * theirs


@pytest.mark.slow
async def test_one_change_costs_the_same_in_a_large_cluster(tmp_path: Path) -> None:
    took: dict[str, list[float]] = {"big": [], "small": []}
    clusters = {}
    for name, count in (("big", 2000), ("small", 50)):
        (tmp_path / name).mkdir()
        clusters[name] = BusyCluster(await Store.open(FileEngine(tmp_path / name), NOW), count)
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


def test_tunnel_costs_at_most_six_times_a_bare_stream() -> None:
    # The tests install the package that masks frames in C.
    piece, count = b"x" * 64 * 1024, 300

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

    bare, tunnel = least(*(own_cpu(partial(trio.run, carry, tunnelled)) for tunnelled in (False, True)))
    assert tunnel < 6 * bare


def test_watch_line_is_built_once_for_all_watchers() -> None:
    change = Change("vm", "vm", None, vm_of(1), b"{}")
    assert change.line is change.line
    assert change.line == b'{"type":"ADDED","object":{}}\n'


def test_heartbeats_are_not_written_to_disk(small: Server, home: Path) -> None:
    state = home / "small" / ".orchard" / "controller" / "state.jsonl"
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
