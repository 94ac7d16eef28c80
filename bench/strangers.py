"""Clients that open connections and hold them, over TLS: the controller's memory, and how long new clients wait.

    ./run bench strangers [--connections N] [--only ATTACK] [--against DIRECTORY]

The attacks: connections that send nothing (`silent`); a request head without its end on each (`heads`); 250 bodies of
4 MiB without their end, to a path that needs no credentials (`bodies`) and with credentials (`uploads`); 20 answers
with 64 MiB of events that are not read (`answers`).

Each attack has a controller of its own. Shown are its memory before the attack, during it and 10 seconds after it, and the
time that a new client takes for a handshake and one request, before the attack and during it. With --against, the
controller of another checkout, which has a `.venv` of its own, is attacked as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen

from api import Checkout
from cluster import AUTHORIZATION
from load import CONTROLLER_TLS, Server, body_of, connect, request, running

BODY_BYTES = 4 * 1024 * 1024
# By attack: the bytes that are sent on each connection, and the number of connections; 0: that of the option.
HEAD = b"GET /v1/ HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 15_000
UPLOAD = f"POST /v1/vms HTTP/1.1\r\nHost: x\r\nAuthorization: {AUTHORIZATION}\r\nContent-Length: {BODY_BYTES}\r\n\r\n"
ATTACKS = {
    "silent": (b"", 0),
    "heads": (HEAD, 0),
    "bodies": (b"GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n400000\r\n", 250),
    "uploads": (UPLOAD.encode(), 250),
    "answers": (request("GET", "/v1/vms/vm-7/events", authorization=AUTHORIZATION), 20),
}
LOG_BYTES, EVENTS, EVENT_BYTES = 64 * 1024 * 1024, 3_900, 1_000
NEW_CLIENTS = 200
AFTER_SECONDS = 10.0
# Far more than a client should ever wait.
PATIENCE_SECONDS = 120.0
ASKED = request("GET", "/v1/vms/vm-7", authorization=AUTHORIZATION)


def hold(port: int, attack: str, count: int) -> None:
    """Attack until stdin ends, in a process of its own, because descriptors are limited per process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    sent, _ = ATTACKS[attack]
    held = []
    for _ in range(count):
        # The controller closes connections to make room.
        with suppress(OSError):
            held.append(connect(port, tls=attack != "silent"))
            held[-1].sendall(sent)
            if attack in ("bodies", "uploads"):
                held[-1].settimeout(1.0)
                held[-1].sendall(b"a" * (BODY_BYTES - 1))
    print("open", flush=True)
    sys.stdin.read()


@contextmanager
def attacked(server: Server, attack: str, count: int) -> Iterator[None]:
    # The process ends with its stdin.
    with Popen(
        [sys.executable, __file__, "--hold", str(server.port), attack, str(count)], stdin=PIPE, stdout=PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield


def fill_log(server: Server) -> None:
    """Append events to one VM's until they are as long as the controller lets them be."""
    events = [{"kind": "log_line", "timestamp": 1, "payload": "a" * EVENT_BYTES} for _ in range(EVENTS)]
    asked = request("POST", "/v1/vms/vm-7/events", json.dumps(events).encode(), AUTHORIZATION)
    for _ in range(LOG_BYTES // (EVENTS * EVENT_BYTES)):
        body_of(server, asked)


def waits(server: Server) -> list[float]:
    """Return the milliseconds that each of some new clients took for its handshake and its request."""
    found = []
    for _ in range(NEW_CLIENTS):
        began = time.perf_counter()
        with suppress(OSError), server.connect() as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.sendall(ASKED)
            connection.recv(4096)
        found.append(1000 * (time.perf_counter() - began))
        if sum(found) > 1000 * PATIENCE_SECONDS:
            break
    return found


def measure(checkout: Checkout, attack: str, count: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        checkout.prepare(home, 10, 5)
        with running(*CONTROLLER_TLS, home=home, python=checkout.python) as server:
            if attack == "answers":
                fill_log(server)
            alone, before = waits(server), server.memory()
            with attacked(server, attack, count):
                during, beside = server.memory(), waits(server)
                during = max(during, server.memory())
            time.sleep(AFTER_SECONDS)
            after = server.memory()
    print(
        f"{checkout.name}{attack}, {count:,} over TLS: {before / 1024:.0f} MiB before, {during / 1024:.0f} MiB during,"
        f" {after / 1024:.0f} MiB after; new clients {told(alone)} before, {told(beside)} during"
    )


def told(found: list[float]) -> str:
    return f"p50 {statistics.median(found):.1f} ms, p99 {statistics.quantiles(found, n=100)[98]:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench strangers")
    parser.add_argument("--connections", type=int, default=16_000, help="of `silent` and `heads`; default: %(default)s")
    parser.add_argument("--only", choices=ATTACKS, help="default: everything")
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="also attack the checkout in DIRECTORY")
    options = parser.parse_args()
    checkouts = [Checkout("", sys.executable, Path(__file__).parent)]
    if options.against is not None:
        python, bench = str(options.against / ".venv/bin/python"), options.against / "bench"
        checkouts.append(Checkout(f"{options.against.name}: ", python, bench))
    for attack, (_, count) in ATTACKS.items():
        if options.only in (None, attack):
            for checkout in checkouts:
                measure(checkout, attack, count or options.connections)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--hold"]:
        hold(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
