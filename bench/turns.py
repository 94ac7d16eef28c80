"""The longest steps of the controller's event loop: how long one request makes all other tasks wait.

    ./run bench turns [--vms N]

The controller runs in this process, where each step of its event loop is timed. Its clients are another process. Prints
the longest steps by kind of request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trio
from cluster import AUTHORIZATION, PER_WORKER
from load import connect, press, request
from measure import ROUNDS, Turns

from orchard import controller
from orchard.base.daemon import collect_garbage_less

# Requests of one round, and large ones; paths by kind.
COUNT, LARGE_COUNT = 50, 4
PATHS = {
    "list VMs": "/v1/vms",
    "list failed": "/v1/vms?filter=status=failed",
    # All VMs match.
    "list filtered": "/v1/vms?filter=metadata.team!=a,createdBy!=b",
    # As many conditions as a filter may have, all of which must be tested for every VM.
    "list by 64": "/v1/vms?filter=" + ",".join(f"metadata.team!={number}" for number in range(64)),
    "list a page": "/v1/vms?limit=100",
    "list workers": "/v1/workers",
    "capacity": "/v1/capacity",
    "no capacity": "/v1/capacity?labels=label=that-no-worker-has",
    "get one": "/v1/vms/vm-7",
    "create": "",
}
WATCH = "begin a watch"
# Bytes of the body.
LARGE = {"events": 256 * 1024, "most events": 4 * 1024 * 1024, "script": 256 * 1024, "longest script": 4 * 1024 * 1024}


def large_request(kind: str, number: int) -> bytes:
    """Return a request whose body has nearly the size of its kind."""
    size = LARGE[kind]
    if "events" in kind:
        lines = min(10_000, size // 128)
        event = {"kind": "log_line", "payload": "x, " * (size // lines // 3 - 25), "timestamp": 1_700_000_000}
        body, path = json.dumps([event] * lines), f"/v1/vms/vm-{number}/events"
    else:
        script = {"script_content": "echo one, two\n" * (size // 16)}
        body = json.dumps({"name": f"{kind.replace(' ', '-')}-{number}", "image": "image", "startup_script": script})
        path = "/v1/vms"
    assert len(body) <= size
    return request("POST", path, body.encode(), AUTHORIZATION)


def begin_watches(port: int) -> None:
    """Begin watches of everything one after another, and read each up to the end of its first list."""
    for _ in range(LARGE_COUNT):
        with connect(port) as connection:
            connection.sendall(request("GET", "/v1/watch", authorization=AUTHORIZATION))
            received = b""
            while b"BOOKMARK" not in received:
                received = received[-100:] + connection.recv(1024 * 1024)


def requests(kind: str, round_number: int) -> Iterator[bytes]:
    for number in itertools.count(round_number * COUNT):
        if kind in LARGE:
            yield large_request(kind, number)
        elif kind == "create":
            body = {"name": f"new-{number}", "image": "image", "labels": {"label": "that no worker has"}}
            yield request("POST", "/v1/vms", json.dumps(body).encode(), AUTHORIZATION)
        else:
            yield request("GET", PATHS[kind], authorization=AUTHORIZATION)


async def measure(home: Path, vms: int) -> None:
    settings = controller.ControllerSettings(
        data_dir=home / ".orchard" / "controller", host="127.0.0.1", port=0, tls=False, worker_offline_timeout=1e6
    )
    async with trio.open_nursery() as nursery:
        running: controller.Running = await nursery.start(controller.run, settings)
        port = running.url.rpartition(":")[2]
        # As the controller's process does when it has started.
        collect_garbage_less()
        for kind in (*PATHS, WATCH, *LARGE):
            longest, longest_cpu = [], 0.0
            for number in range(ROUNDS):
                turns = Turns()
                trio.lowlevel.add_instrument(turns)
                await trio.run_process([sys.executable, __file__, "--press", port, kind, str(number)])
                trio.lowlevel.remove_instrument(turns)
                longest.append(1000 * turns.longest)
                longest_cpu = max(longest_cpu, 1000 * turns.longest_cpu)
            longest.sort()
            print(
                f"{kind:14} longest step {statistics.median(longest):5.1f} ms ({longest[0]:.1f} to {longest[-1]:.1f}),"
                f" {longest_cpu:.1f} ms of CPU,"
                f" {vms:,} VMs"
            )
        nursery.cancel_scope.cancel()


def main() -> None:
    # The process of the clients.
    if sys.argv[1:2] == ["--press"]:
        port, kind, number = sys.argv[2:]
        if kind == WATCH:
            begin_watches(int(port))
            return
        count = LARGE_COUNT if kind in LARGE else COUNT
        press(int(port), 4, itertools.islice(requests(kind, int(number)), count))
        return
    parser = argparse.ArgumentParser(prog="./run bench turns")
    parser.add_argument("--vms", type=int, default=10_000, help="VMs in the cluster; default %(default)s")
    vms = parser.parse_args().vms
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        # Another process prepares the cluster, so that its garbage is not collected here.
        program = "import sys, pathlib, cluster; cluster.prepare(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        words = [str(home), str(vms), str(vms // PER_WORKER)]
        subprocess.run([sys.executable, "-c", program, *words], check=True, cwd=Path(__file__).parent)
        trio.run(measure, home, vms)


if __name__ == "__main__":
    main()
