"""Kill a controller again and again while clients write, and check that all acknowledged changes are there afterwards.

    ./run bench crash --seconds 300           kill -9 at random moments, also during the start
    ./run bench crash --clients 16 --every 3  the same, every three seconds: 100,000 operations in some three minutes
    ./run bench crash --sweep                 kill it at each write, fsync, rename... of a short run (needs strace)
    ./run bench crash --power --seconds 300   cut off its disk, as a power cut does (needs root and loop devices)

The controller is a process, and the clients send HTTP requests. Several clients share few names, so their requests
overlap. For each name there must be an order of its requests that explains all answers, agrees with the times at which
they began and ended, and leads to what is found after the restart (linearizability). A request whose answer was lost in
the kill may have happened or not. Events are appended in batches, each batch to the log of one client. After the
restart all acknowledged events are there, once and in order, followed by nothing but a prefix of the unacknowledged
batch.

The exit status is 1 at the first contradiction, which is printed, and the data are kept. The moments of the kills
differ from run to run even with the same seed.
"""

from __future__ import annotations

import argparse
import fcntl
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

VMS = ("vm-1", "vm-2", "vm-3", "vm-4", "vm-5")
ACCOUNTS = ("account-1", "account-2", "account-3")
# Clients that share the names, and clients that append events, each to its own VM.
CLIENTS = 8
LOGGERS = 3
# Most events of one request.
BATCH = 4
# Events after which a log begins anew, because all of it is read after each kill.
LOG_EVENTS = 1000
# The least and the longest time from the start of the clients to the kill.
WORK_SECONDS = (0.02, 0.6)
# A kill during a start comes within this time, and this is the share of such kills.
START_SECONDS = 0.4
KILLS_IN_START = 0.2
# Limit of one answer or one start. Nothing takes so long unless it hangs.
PATIENCE = 60.0  # seconds
# The most requests that are printed for a name with a contradiction.
SHOWN = 30
# So small that the state file is compacted several times even in the run of --sweep.
COMPACT_BYTES = 3_000
# Requests of the run whose system calls are swept.
SCRIPT = 90
# System calls at which the run is killed. Of writes only those to the state, not those of the log and of threads.
SWEPT = ("write", "fsync", "ftruncate", "rename", "unlink")
# Size of the file system that loses power.
IMAGE_BYTES = 64 * 1024 * 1024
# The ioctl EXT4_IOC_SHUTDOWN: from then on nothing reaches the disk.
EXT4_SHUTDOWN, NO_FLUSH = 0x8004587D, 2

# A controller that compacts its state file often.
CONTROLLER = f"""
import sys
from orchard.storage import state_file
state_file.COMPACT_BYTES, state_file.COMPACT_RATIO = {COMPACT_BYTES}, 0
from orchard import controller
"""
# A controller that answers before it writes, which must be detected.
CARELESS = """
import time, orchard.store
async def at_once(store): pass
orchard.store.Store.wait_durable, append = at_once, state_file.StateFile.append
def later(*arguments): time.sleep(0.05); append(*arguments)
state_file.StateFile.append = later
"""
RUN = "\nsys.exit(controller.main(sys.argv[1:]))"


class ContradictionError(Exception):
    """The data contradict what was acknowledged; str() says both."""


# ---- what a name holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """A request for a name, from `began` to `ended` by the monotonic clock. `answer` None: there was none.

    `verb` is create, change, delete or read; `value` was sent, or for a read, received.
    """

    verb: str
    value: int | None
    answer: int | None
    began: float
    ended: float

    def __str__(self) -> str:
        return f"{self.began:.6f} to {self.ended:.6f}: {self.verb} {self.value} -> {self.answer or 'no answer'}"


def after(done: Done, held: int | None) -> tuple[bool, int | None]:
    """Return (whether a name that held this value can have given this answer, the value afterwards)."""
    there = held is not None
    if done.verb == "read":
        return held == done.value, held
    if done.verb == "create":
        return done.answer in (None, 409 if there else 200), held if there else done.value
    changed = (done.value if done.verb == "change" else None) if there else None
    return done.answer in (None, 200 if there else 404), changed


def explained(first: int | None, history: Iterable[Done], last: int | None) -> bool:
    """Return whether the requests can have happened in some order, from the first value of a name to its last."""
    requests = sorted(history, key=lambda done: done.began)
    must = sum(1 << number for number, done in enumerate(requests) if done.answer is not None)
    start = (0, first)
    seen, stack = {start}, [start]
    while stack:
        happened, held = stack.pop()
        if happened & must == must and held == last:
            return True
        # A request that began after another one ended cannot come before it.
        until = float("inf")
        for number in range((~happened & (happened + 1)).bit_length() - 1, len(requests)):
            done = requests[number]
            if done.began > until:
                break
            if happened >> number & 1:
                continue
            until = min(until, done.ended)
            possible, holds = after(done, held)
            following = (happened | 1 << number, holds)
            if possible and following not in seen:
                seen.add(following)
                stack.append(following)
    return False


# ---- the controller ------------------------------------------------------------------------------------------------


@contextmanager
def controller(data: Path, before: list[str], *, careless: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run a controller on `data`, with the words `before` its command line; kill it at the end of the block."""
    program = CONTROLLER + (CARELESS if careless else "") + RUN
    options = ["--listen", "127.0.0.1:0", "--insecure-no-tls", "--insecure-no-auth", "--data-dir", str(data)]
    with (data.parent / "controller.log").open("a") as log:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", program, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # strace and the controller are killed together.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()


def port_of(process: subprocess.Popen[str]) -> int:
    """Return the port of a controller when it listens; 0 when it was killed before.

    Raises ContradictionError when it refuses to start.
    """
    assert process.stdout is not None
    for line in process.stdout:
        if "is listening on" in line:
            return int(line.rsplit(":", 1)[1])
    if process.wait(PATIENCE) > 0:
        raise ContradictionError(f"the controller ended with {process.returncode}; see its log")
    return 0


class Connection:
    """An HTTP connection to a controller."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Send a request; return the status and the body. Raises OSError, HTTPException."""
        self._connection.request(method, "/v1" + path, None if body is None else json.dumps(body))
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        self._connection.close()


# ---- its clients ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Log:
    """The events of one client's VM: those that were acknowledged, and those that were sent and not acknowledged."""

    name: str
    kept: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)


class Trial:
    """The data directory of a controller, and the requests and answers of the clients that changed it."""

    def __init__(self, data: Path, chance: random.Random, *, careless: bool = False) -> None:
        self.data = data
        self.careless = careless
        self.chance = chance
        self.held: dict[str, int | None] = dict.fromkeys((*VMS, *ACCOUNTS))
        self.histories: dict[str, list[Done]] = {name: [] for name in self.held}
        self.logs = [Log(f"log-{number}") for number in range(LOGGERS)]
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.clients = CLIENTS
        # Set while the power is off. Answers that come then do not count (see PowerCuts).
        self.dark = threading.Event()
        self._values = itertools.count(1)

    def work(self, port: int, begin: threading.Event) -> list[threading.Thread]:
        """Start the clients; each sends requests until it gets no answer."""
        randoms = [random.Random(self.chance.random()) for _ in range(self.clients)]
        threads = [threading.Thread(target=self._share, args=(Connection(port), one, begin)) for one in randoms]
        threads += [threading.Thread(target=self._append, args=(Connection(port), log, begin)) for log in self.logs]
        for thread in threads:
            thread.start()
        return threads

    def _share(self, connection: Connection, chance: random.Random, begin: threading.Event) -> None:
        begin.wait()
        names = tuple(self.held)
        while self.act(
            connection, chance.choice(names), chance.choice(("create", "change", "change", "delete", "read"))
        ):
            pass
        connection.close()

    def act(self, connection: Connection, name: str, verb: str) -> bool:
        """Send one request for a name; return False when there was no answer."""
        value = next(self._values) if verb in ("create", "change") else None
        method, path, body = request_for(name, verb, value)
        began = time.monotonic()
        try:
            status, answer = connection.ask(method, path, body)
        except (OSError, http.client.HTTPException):
            status = 503
        ended = time.monotonic()
        if self.dark.is_set():
            status = 503
        if status not in (200, 404, 409, 503):
            self.problems.append(f"{method} {path}: {status} {answer!r}")
            status = 503
        # It is not known whether the request happened.
        if status == 503:
            if verb != "read":
                self.histories[name].append(Done(verb, value, None, began, float("inf")))
            return False
        if verb == "read":
            value, status = value_of(answer) if status == 200 else None, 200
        self.histories[name].append(Done(verb, value, status, began, ended))
        self.counts["reads" if verb == "read" else "writes"] += 1
        return True

    def _append(self, connection: Connection, log: Log, begin: threading.Event) -> None:
        begin.wait()
        while self.append(connection, log):
            pass
        connection.close()

    def append(self, connection: Connection, log: Log) -> bool:
        """Append some events; return False when there was no answer."""
        first = len(log.kept)
        log.open = list(range(first, first + 1 + first % BATCH))
        events = [{"kind": "log_line", "payload": f"{number}", "timestamp": number} for number in log.open]
        try:
            status, answer = connection.ask("POST", f"/vms/{log.name}/events", events)
        except (OSError, http.client.HTTPException):
            return False
        if self.dark.is_set():
            return False
        if status != 200:
            self.problems += [f"events of {log.name}: {status} {answer!r}"] if status != 503 else []
            return False
        log.kept += log.open
        log.open = []
        self.counts["events"] += len(events)
        return True

    # -- after the restart

    def compare(self, port: int) -> None:
        """Compare what a controller holds with what was acknowledged. Raises ContradictionError."""
        if self.problems:
            raise ContradictionError("; ".join(self.problems))
        connection = Connection(port)
        for name, history in self.histories.items():
            status, answer = connection.ask("GET", path_of(name))
            found = value_of(answer) if status == 200 else None
            if not explained(self.held[name], history, found):
                told = "\n  ".join(map(str, history[-SHOWN:]))
                raise ContradictionError(f"{name} held {self.held[name]}, now holds {found}, and meanwhile:\n  {told}")
            self.held[name] = found
            history.clear()
        for log in self.logs:
            self._compare_log(connection, log)
        connection.close()

    def _compare_log(self, connection: Connection, log: Log) -> None:
        status, answer = connection.ask("GET", f"/vms/{log.name}/events")
        if status == 404 and not log.kept:
            connection.ask("POST", "/vms", {"name": log.name, "image": "any"})
            return
        found = [event["timestamp"] for event in json.loads(answer)] if status == 200 else []
        if found not in [log.kept + log.open[:count] for count in range(len(log.open) + 1)]:
            raise ContradictionError(f"{log.name} holds {found}, and {log.kept} were acknowledged, {log.open} were not")
        log.kept, log.open = found, []
        if len(found) > LOG_EVENTS:
            connection.ask("DELETE", f"/vms/{log.name}")
            connection.ask("POST", "/vms", {"name": log.name, "image": "any"})
            log.kept = []


def path_of(name: str) -> str:
    return f"/vms/{name}" if name in VMS else f"/service-accounts/{name}"


def request_for(name: str, verb: str, value: int | None) -> tuple[str, str, object]:
    """Return the method, path and body of a request for a name."""
    path = path_of(name)
    collection = path.rsplit("/", 1)[0]
    token = f"token-of-{value}"
    if verb == "create":
        body = {"image": "any", "memory": value} if name in VMS else {"token": token, "roles": ["compute:read"]}
        return "POST", collection, {"name": name, **body}
    if verb == "change":
        return ("PATCH", path, {"memory": value}) if name in VMS else ("PUT", path, {"token": token})
    return "DELETE" if verb == "delete" else "GET", path, None


def value_of(answer: bytes) -> int:
    found = json.loads(answer)
    return int(found["memory"] if "memory" in found else found["token"].removeprefix("token-of-"))


# ---- kills at random moments ---------------------------------------------------------------------------------------


def kill(
    trial: Trial,
    go_on: Callable[[int], bool],
    cut_off: Callable[[subprocess.Popen[str]], None],
    work_seconds: tuple[float, float],
) -> int:
    """Let clients write and kill their controller, while `go_on(number of kills)` is true; return the number."""
    kills = 0
    while go_on(kills):
        trial.dark.clear()
        with controller(trial.data, [], careless=trial.careless) as process:
            if trial.chance.random() < KILLS_IN_START:
                time.sleep(trial.chance.uniform(0, START_SECONDS))
                cut_off(process)
                kills += 1
                continue
            port = port_of(process)
            trial.compare(port)
            begin = threading.Event()
            threads = trial.work(port, begin)
            begin.set()
            time.sleep(trial.chance.uniform(*work_seconds))
            cut_off(process)
            kills += 1
            for thread in threads:
                thread.join()
        if kills % 100 == 0:
            print(f"{kills} kills, {dict(trial.counts)}", flush=True)
    with controller(trial.data, [], careless=trial.careless) as process:
        trial.compare(port_of(process))
    return kills


# ---- power cuts ----------------------------------------------------------------------------------------------------


class PowerCuts:
    """A file system in a file, which after a power cut holds only what was on the disk.

    At the moment of the cut Linux sometimes reports success for an fsync of data that it discards (in one of sixty cuts
    of a bare program that appends and syncs). So only answers from before the cut count; `dark` is set at the cut.
    """

    def __init__(self, home: Path, dark: threading.Event) -> None:
        self._dark = dark
        self.image, self.point = home / "image", home / "mounted"
        self.point.mkdir()
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.point], check=True)

    def cut(self, process: subprocess.Popen[str]) -> None:
        """Cut the power, and restore it when the controller has ended."""
        descriptor = os.open(self.point, os.O_RDONLY)
        self._dark.set()
        fcntl.ioctl(descriptor, EXT4_SHUTDOWN, struct.pack("I", NO_FLUSH))
        os.close(descriptor)
        # The controller ends with its next write. Without one, it is killed.
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        process.wait(PATIENCE)
        self.close()
        self.mount()

    def close(self) -> None:
        subprocess.run(["umount", self.point], check=True)


# ---- kills at each system call -------------------------------------------------------------------------------------


def script(trial: Trial, port: int, requests: int) -> bool:
    """Send a fixed sequence of requests; return False when there was no answer."""
    connection = Connection(port)
    chance = random.Random(1)
    for number in range(requests):
        if number % 6 == 5:
            answered = trial.append(connection, trial.logs[0])
        else:
            answered = trial.act(
                connection, chance.choice(tuple(trial.held)), chance.choice(("create", "change", "delete"))
            )
        if not answered:
            return False
    connection.close()
    return True


def sweep(home: Path, calls: Iterable[str], requests: int) -> int:
    """Kill a run at each of some system calls; return the number of kills. Raises ContradictionError."""
    points = 0
    for call in calls:
        for number in itertools.count(1):
            trial = Trial(home / f"{call}-{number}" / "data", random.Random(1))
            trial.data.parent.mkdir()
            if not killed_at(trial, call, number, requests):
                print(f"{call}: {number - 1} kills", flush=True)
                break
            points += 1
            with controller(trial.data, []) as process:
                trial.compare(port_of(process))
            shutil.rmtree(trial.data.parent)
    return points


def killed_at(trial: Trial, call: str, number: int, requests: int) -> bool:
    """Kill a run at the `number`-th system call of a kind; return False when there is none."""
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    trace += ["-e", f"inject={call}:signal=KILL:when={number}"]
    if call == "write":
        for name in ("state.jsonl", "state.jsonl.new", "reserve"):
            trace += ["-P", str(trial.data / name)]
    with controller(trial.data, trace) as process:
        port = port_of(process)
        if not port:
            return True
        try:
            trial.compare(port)
        except (OSError, http.client.HTTPException):
            # It was killed while `compare` created the VMs that have events.
            return True
        return not script(trial, port, requests)


# ---- the command line ----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench crash")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="how long to go on; default: %(default)s")
    add("--kills", type=int, help="stop after so many kills, instead of after a time")
    add("--clients", type=int, default=CLIENTS, help="clients that share the names; default: %(default)s")
    add("--every", type=float, help="seconds of work before each kill; default: random, under one")
    add("--requests", type=int, default=SCRIPT, help="requests of the run of --sweep; default: %(default)s")
    add("--seed", type=int, default=random.randrange(2**32), help="default: a random one")
    add(
        "--sweep",
        nargs="*",
        choices=SWEPT,
        metavar="CALL",
        help=f"kill at each of these system calls: {' '.join(SWEPT)}",
    )
    add("--power", action="store_true", help="cut off the disk instead")
    add(
        "--careless", action="store_true", help="run a controller that answers before it writes, which must be detected"
    )
    options = parser.parse_args()
    if options.sweep is not None and shutil.which("strace") is None:
        parser.error("--sweep needs strace: apt-get install strace")
    home = Path(tempfile.mkdtemp(prefix="orchard-crash-"))
    until = time.monotonic() + options.seconds
    power = None
    try:
        if options.sweep is not None:
            print(f"{sweep(home, options.sweep or SWEPT, options.requests)} kills, nothing was lost")
        else:
            dark = threading.Event()
            power = PowerCuts(home, dark) if options.power else None
            where = power.point if power is not None else home
            trial = Trial(where / "data", random.Random(options.seed), careless=options.careless)
            trial.clients, trial.dark = options.clients, dark
            work_seconds = (options.every, options.every) if options.every else WORK_SECONDS
            goal = options.kills
            go_on = (lambda kills: kills < goal) if goal is not None else (lambda kills: time.monotonic() < until)
            kills = kill(trial, go_on, power.cut if power is not None else subprocess.Popen.kill, work_seconds)
            counts = ", ".join(f"{count} {what}" for what, count in sorted(trial.counts.items()))
            print(f"{kills} kills, {counts}; nothing was lost; seed {options.seed}")
    except ContradictionError as error:
        print(f"{error}\nseed {options.seed}; the data are in {home}", file=sys.stderr)
        return 1
    if power is not None:
        power.close()
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
