"""How many functions and files a reader goes through to follow a request, by tracing.

    ./run bench journeys

Three journeys are traced in a cluster in this process: each call of a function in `orchard/`, in all threads, in order.
*functions* is the number of different functions, *calls* the number of calls, and *changes of file* how often a call is
in another file than the call before it. The clients are plain sockets, and `orchard/testing.py` is left out, so only the
product is counted. Each journey is made once before it is traced, so that nothing is counted that happens only the
first time.

Tasks that go on while a journey ends, such as the log line about a VM that runs, are counted if they come first. So on a
busy machine the numbers differ by a few from run to run.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any
from urllib.parse import urlsplit

import trio
import trio.testing

import orchard
from orchard.testing import cluster

PACKAGE = str(Path(orchard.__file__).parent) + "/"
# The cluster cuts connections by its own streams, which no deployed process has.
HARNESS = PACKAGE + "testing.py"
SECONDS = 30.0
POLL_SECONDS = 0.002
SETTLE_SECONDS = 0.05


class Trace:
    """The calls of a journey, in order."""

    def __init__(self) -> None:
        self._codes: list[CodeType] = []

    def add(self, code: CodeType) -> None:
        is_counted = code.co_filename.startswith(PACKAGE) and code.co_filename != HARNESS
        if is_counted and not code.co_name.startswith("<"):
            self._codes.append(code)

    def summary(self) -> tuple[int, int, int]:
        """Return the numbers of different functions, of calls, and of changes of file."""
        files = [code.co_filename for code in self._codes]
        changes = sum(1 for before, after in itertools.pairwise(files) if before != after)
        return len(set(self._codes)), len(self._codes), changes

    def listing(self) -> str:
        """Return one line a run of calls in one file: the file and the names of the functions."""
        lines: list[list[str]] = []
        last = ""
        for code in self._codes:
            file = code.co_filename.removeprefix(PACKAGE)
            if file != last:
                lines.append([f"{file:24}"])
                last = file
            lines[-1].append(code.co_name)
        return "\n".join(" ".join(line) for line in lines)


class Profile:
    """A profile function for all threads, which adds the calls to a trace while there is one.

    Trio uses a thread again for some seconds, and a thread can get a profile function only at its start.
    """

    trace: Trace | None = None

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if self.trace is not None and event == "call":
            self.trace.add(frame.f_code)


profile = Profile()


class Wire:
    """An HTTP client that is no more than a socket. Its calls block."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=SECONDS)
        self._file = self._socket.makefile("rb")

    def create(self, **vm: Any) -> None:
        content = json.dumps({"image": "any", **vm}).encode()
        head = f"POST /v1/vms HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        self._socket.sendall(head.encode() + content)
        self._read_head()

    def first_forwarded_byte(self, vm: str, port: int) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        head = f"GET /v1/vms/{vm}/port-forward?port={port} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
        head += f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        self._socket.sendall(head.encode())
        self._read_head()
        # A frame's first two bytes are its header.
        self._file.read(3)

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _read_head(self) -> None:
        status = self._file.readline()
        while self._file.readline() not in (b"\r\n", b""):
            pass
        if status.split()[1:2] not in ([b"200"], [b"101"]):
            raise RuntimeError(f"the controller answered {status!r}")


def wait_for_file(path: Path) -> None:
    until = time.monotonic() + SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise RuntimeError(f"{path} was not made within {SECONDS:g} seconds")
        time.sleep(POLL_SECONDS)


async def second_time(journey: Callable[[str], Awaitable[None]]) -> Trace:
    """Make a journey twice, for the VMs `first` and `second`, and return the trace of the second one."""
    await journey("first")
    # The end of the first journey, such as the close of its tunnel, is not part of the second one.
    await trio.testing.wait_all_tasks_blocked(SETTLE_SECONDS)
    profile.trace = trace = Trace()
    await journey("second")
    profile.trace = None
    return trace


async def create_durably() -> Trace:
    async with cluster(workers=0) as c:

        async def journey(name: str) -> None:
            wire = Wire(c.url)
            await trio.to_thread.run_sync(partial(wire.create, name=name))
            wire.close()

        return await second_time(journey)


async def create_until_script_ran() -> Trace:
    with TemporaryDirectory() as directory:
        async with cluster(workers=1) as c:

            async def journey(name: str) -> None:
                mark = Path(directory) / name
                wire = Wire(c.url)
                script = {"script_content": f"touch {mark}"}
                await trio.to_thread.run_sync(partial(wire.create, name=name, startup_script=script))
                await trio.to_thread.run_sync(wait_for_file, mark)
                wire.close()

            return await second_time(journey)


async def forward_until_first_byte() -> Trace:
    async with cluster(workers=1) as c, trio.open_nursery() as nursery:

        async def greet(stream: trio.SocketStream) -> None:
            await stream.send_all(b"hello")
            # The journey ends with the first byte. A close by this end would be traced as well.
            await trio.sleep_forever()

        listeners = await nursery.start(trio.serve_tcp, greet, 0)
        port = listeners[0].socket.getsockname()[1]
        await c.client.vms.create(name="vm", image="any")
        await c.client.vms.wait("vm")

        async def journey(_: str) -> None:
            wire = Wire(c.url)
            await trio.to_thread.run_sync(wire.first_forwarded_byte, "vm", port)
            wire.close()

        trace = await second_time(journey)
        nursery.cancel_scope.cancel()
    return trace


JOURNEYS = {
    "POST /vms until its durable answer": create_durably,
    "create until the script ran": create_until_script_ran,
    "port forward until its first byte": forward_until_first_byte,
}


def main() -> None:
    print(f"{'journey':36} functions  calls  changes of file")
    threading.setprofile(profile)
    sys.setprofile(profile)
    traces = {name: trio.run(journey, strict_exception_groups=True) for name, journey in JOURNEYS.items()}
    for name, trace in traces.items():
        functions, calls, changes = trace.summary()
        print(f"{name:36} {functions:9}  {calls:5}  {changes:15}")
    if "--list" in sys.argv[1:]:
        for name, trace in traces.items():
            print(f"\n{name}\n{trace.listing()}")


if __name__ == "__main__":
    main()
