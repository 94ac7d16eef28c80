"""How long a controller's loop is held up by one task, while everybody else waits.

    ./run bench turns [--vms N]

The controller runs in this process, where each step of its loop is timed; those who ask it are another process. Prints
the longest steps by what was asked for.
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
from load import press, request
from measure import ROUNDS, Turns

from orchard import controller

COUNT = 50  # requests of a round


def requests(what: str, number: int) -> Iterator[bytes]:
    for each in itertools.count(number * COUNT):
        if what == "create":
            body = {"name": f"new-{each}", "image": "image", "labels": {"nobody": "has this"}}
            yield request("POST", "/v1/vms", json.dumps(body).encode(), AUTHORIZATION)
        else:
            yield request("GET", PATHS[what], authorization=AUTHORIZATION)


PATHS = {"list VMs": "/v1/vms", "list workers": "/v1/workers", "get one": "/v1/vms/vm-7", "create": ""}


async def measure(home: Path, vms: int) -> None:
    settings = controller.ControllerSettings(
        data_dir=home / "controller", host="127.0.0.1", port=0, tls=False, worker_offline_timeout=1e6
    )
    async with trio.open_nursery() as nursery:
        running: controller.Running = await nursery.start(controller.run, settings)
        port = running.url.rpartition(":")[2]
        for what in PATHS:
            longest = []
            for number in range(ROUNDS):
                turns = Turns()
                trio.lowlevel.add_instrument(turns)
                await trio.run_process([sys.executable, __file__, "--press", port, what, str(number)])
                trio.lowlevel.remove_instrument(turns)
                longest.append(1000 * turns.longest)
            longest.sort()
            print(
                f"{what:14} longest step {statistics.median(longest):5.1f} ms ({longest[0]:.1f} to {longest[-1]:.1f}),"
                f" {vms:,} VMs"
            )
        nursery.cancel_scope.cancel()


def main() -> None:
    if sys.argv[1:2] == ["--press"]:
        port, what, number = sys.argv[2:]
        press(int(port), 4, itertools.islice(requests(what, int(number)), COUNT))
        return
    parser = argparse.ArgumentParser(prog="./run bench turns")
    parser.add_argument("--vms", type=int, default=10_000, help="default %(default)s")
    vms = parser.parse_args().vms
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        # Prepared by another process, whose garbage is none of this one's.
        program = "import sys, pathlib, cluster; cluster.prepare(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        words = [str(home), str(vms), str(vms // PER_WORKER)]
        subprocess.run([sys.executable, "-c", program, *words], check=True, cwd=Path(__file__).parent)
        controller.collect_garbage_less()
        trio.run(measure, home, vms)


if __name__ == "__main__":
    main()
