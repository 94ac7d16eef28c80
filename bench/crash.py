"""A controller is killed again and again while clients write, and all that was acknowledged has to be there afterwards.

    ./run bench crash --seconds 300           kill -9 at random moments, in work and in the start
    ./run bench crash --clients 16 --every 3  the same, every three seconds: 100,000 operations in some three minutes
    ./run bench crash --sweep                 kill it at each write, fsync, rename... of a short run (needs strace)
    ./run bench crash --power --seconds 300   cut off its disk, as a power cut does (needs root, and loop devices)

The controller is a process of its own, and the clients talk HTTP to it. Several clients share few names, so that their
requests meet. What each name's requests were answered must be explained by some order of them that agrees with the
times at which they began and ended, and what is found after the restart must be the end of such an order; a request
whose answer the kill swallowed may have happened or not. Events are appended in batches, each to the log of one
client: after the restart, all acknowledged ones are there, once and in order, and nothing else but the beginning of
the batch that was not acknowledged.

Exits with 1 at the first thing that cannot be explained, says what was found, and keeps the data. The moments of
kills differ from run to run also with the same seed.
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
CLIENTS = 8  # that share the names
LOGGERS = 3  # that append events, each to its own VM
BATCH = 4  # events at most in one request
LOG_EVENTS = 1000  # after which a log is begun anew: all of it is read after each kill
WORK_SECONDS = (0.02, 0.6)  # between the start and the kill
START_SECONDS = 0.4  # in which a kill meets a start
KILLS_IN_START = 0.2  # the share of them
PATIENCE = 60.0  # seconds for one answer or one start; nothing here takes so long unless it hangs
SHOWN = 30  # requests that are printed of a name that cannot be explained
COMPACT_BYTES = 3_000  # so that snapshots are written all the time, several in the run that is swept
SCRIPT = 90  # requests of the run whose system calls are swept
# Where the run is killed; writes only to the state, since the log and the wake-ups of threads are of no interest.
SWEPT = ("write", "fsync", "ftruncate", "rename", "unlink")
IMAGE_BYTES = 64 * 1024 * 1024  # of the file system that loses its power
EXT4_SHUTDOWN, NO_FLUSH = 0x8004587D, 2  # ioctl EXT4_IOC_SHUTDOWN: from now on nothing reaches the disk

# The controller, but for how often it writes a snapshot.
CONTROLLER = f"""
import sys
from orchard.storage import engine
engine.COMPACT_BYTES, engine.COMPACT_RATIO = {COMPACT_BYTES}, 0
from orchard import controller
"""
# One that answers before it writes: what must be found out.
CARELESS = """
import time, orchard.store
async def at_once(store): pass
orchard.store.Store.wait_durable, append = at_once, engine.FileEngine.append
def later(*arguments): time.sleep(0.05); append(*arguments)
engine.FileEngine.append = later
"""
RUN = "\nsys.exit(controller.main(sys.argv[1:]))"


class Unexplained(Exception):  # noqa: N818 -- it is what was looked for
    """What was found contradicts what was acknowledged; str() says both."""


# ---- what a name holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """A request for a name, from `began` to `ended` by the monotonic clock. `answer` None: there was none."""

    verb: str  # create, change, delete or read
    value: int | None  # that was sent, or for `read`, was found
    answer: int | None
    began: float
    ended: float

    def __str__(self) -> str:
        return f"{self.began:.6f} to {self.ended:.6f}: {self.verb} {self.value} -> {self.answer or 'no answer'}"


def after(done: Done, held: int | None) -> tuple[bool, int | None]:
    """Give (whether a request can have been answered so when the name held that, what it holds then)."""
    there = held is not None
    if done.verb == "read":
        return held == done.value, held
    if done.verb == "create":
        return done.answer in (None, 409 if there else 200), held if there else done.value
    changed = (done.value if done.verb == "change" else None) if there else None
    return done.answer in (None, 200 if there else 404), changed


def explained(first: int | None, history: Iterable[Done], last: int | None) -> bool:
    """Whether requests can have happened one after another, from what the name held first to what it holds last."""
    requests = sorted(history, key=lambda done: done.began)
    must = sum(1 << number for number, done in enumerate(requests) if done.answer is not None)
    start = (0, first)
    seen, stack = {start}, [start]
    while stack:
        happened, held = stack.pop()
        if happened & must == must and held == last:
            return True
        until = float("inf")  # one that began later than another had ended cannot be the next
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
    """Run a controller on `data`, by the words `before` its command line if any; killed at the end of the block."""
    program = CONTROLLER + (CARELESS if careless else "") + RUN
    options = ["--listen", "127.0.0.1:0", "--insecure-no-tls", "--insecure-no-auth", "--data-dir", str(data)]
    with (data.parent / "controller.log").open("a") as log:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", program, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # strace and what it traces are killed together
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
    """Wait until a controller listens; 0 when it has ended before. Raises Unexplained when it refuses to start."""
    assert process.stdout is not None
    for line in process.stdout:
        if "is listening on" in line:
            return int(line.rsplit(":", 1)[1])
    if process.wait(PATIENCE) > 0:
        raise Unexplained(f"the controller ended with {process.returncode}; see its log")
    return 0


class Line:
    """A connection to a controller."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Send a request, and give status and body. Raises OSError, HTTPException."""
        self._connection.request(method, "/v1" + path, None if body is None else json.dumps(body))
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def close(self) -> None:
        self._connection.close()


# ---- its clients ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Log:
    """The events of one client's VM."""

    name: str
    kept: list[int] = field(default_factory=list)  # acknowledged
    open: list[int] = field(default_factory=list)  # sent, and not acknowledged


class Site:
    """A controller's directory, and what was said to those who wrote into it."""

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
        self.dark = threading.Event()  # that the power is cut off: an answer that comes now is none (see PowerCuts)
        self._values = itertools.count(1)

    def work(self, port: int, begin: threading.Event) -> list[threading.Thread]:
        """Start the clients; each goes on until it gets no answer."""
        randoms = [random.Random(self.chance.random()) for _ in range(self.clients)]
        threads = [threading.Thread(target=self._share, args=(Line(port), one, begin)) for one in randoms]
        threads += [threading.Thread(target=self._append, args=(Line(port), log, begin)) for log in self.logs]
        for thread in threads:
            thread.start()
        return threads

    def _share(self, line: Line, chance: random.Random, begin: threading.Event) -> None:
        begin.wait()
        names = tuple(self.held)
        while self.act(line, chance.choice(names), chance.choice(("create", "change", "change", "delete", "read"))):
            pass
        line.close()

    def act(self, line: Line, name: str, verb: str) -> bool:
        """Do one thing with a name; False when there was no answer."""
        value = next(self._values) if verb in ("create", "change") else None
        method, path, body = request_for(name, verb, value)
        began = time.monotonic()
        try:
            status, answer = line.ask(method, path, body)
        except (OSError, http.client.HTTPException):
            status = 503
        ended = time.monotonic()
        if self.dark.is_set():
            status = 503
        if status not in (200, 404, 409, 503):
            self.problems.append(f"{method} {path}: {status} {answer!r}")
            status = 503
        if status == 503:  # nobody knows
            if verb != "read":
                self.histories[name].append(Done(verb, value, None, began, float("inf")))
            return False
        if verb == "read":
            value, status = value_of(answer) if status == 200 else None, 200
        self.histories[name].append(Done(verb, value, status, began, ended))
        self.counts["reads" if verb == "read" else "writes"] += 1
        return True

    def _append(self, line: Line, log: Log, begin: threading.Event) -> None:
        begin.wait()
        while self.append(line, log):
            pass
        line.close()

    def append(self, line: Line, log: Log) -> bool:
        """Append some events; False when there was no answer."""
        first = len(log.kept)
        log.open = list(range(first, first + 1 + first % BATCH))
        events = [{"kind": "log_line", "payload": f"{number}", "timestamp": number} for number in log.open]
        try:
            status, answer = line.ask("POST", f"/vms/{log.name}/events", events)
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
        """Compare what a controller holds with what was acknowledged, and go on from there. Raises Unexplained."""
        if self.problems:
            raise Unexplained("; ".join(self.problems))
        line = Line(port)
        for name, history in self.histories.items():
            status, answer = line.ask("GET", path_of(name))
            found = value_of(answer) if status == 200 else None
            if not explained(self.held[name], history, found):
                told = "\n  ".join(map(str, history[-SHOWN:]))
                raise Unexplained(f"{name} held {self.held[name]}, now holds {found}, and meanwhile:\n  {told}")
            self.held[name] = found
            history.clear()
        for log in self.logs:
            self._compare_log(line, log)
        line.close()

    def _compare_log(self, line: Line, log: Log) -> None:
        status, answer = line.ask("GET", f"/vms/{log.name}/events")
        if status == 404 and not log.kept:
            line.ask("POST", "/vms", {"name": log.name, "image": "any"})
            return
        found = [event["timestamp"] for event in json.loads(answer)] if status == 200 else []
        if found not in [log.kept + log.open[:count] for count in range(len(log.open) + 1)]:
            raise Unexplained(f"{log.name} holds {found}, and {log.kept} were acknowledged, {log.open} were not")
        log.kept, log.open = found, []
        if len(found) > LOG_EVENTS:
            line.ask("DELETE", f"/vms/{log.name}")
            line.ask("POST", "/vms", {"name": log.name, "image": "any"})
            log.kept = []


def path_of(name: str) -> str:
    return f"/vms/{name}" if name in VMS else f"/service-accounts/{name}"


def request_for(name: str, verb: str, value: int | None) -> tuple[str, str, object]:
    """Give method, path and body of a request that has a name hold a value."""
    path = path_of(name)
    collection = path.rsplit("/", 1)[0]
    if verb == "create":
        body = {"image": "any", "memory": value} if name in VMS else {"token": f"{value}", "roles": ["compute:read"]}
        return "POST", collection, {"name": name, **body}
    if verb == "change":
        return ("PATCH", path, {"memory": value}) if name in VMS else ("PUT", path, {"token": f"{value}"})
    return "DELETE" if verb == "delete" else "GET", path, None


def value_of(answer: bytes) -> int:
    found = json.loads(answer)
    return int(found["memory"] if "memory" in found else found["token"])


# ---- kills at random moments ---------------------------------------------------------------------------------------


def kill(
    site: Site,
    go_on: Callable[[int], bool],
    cut_off: Callable[[subprocess.Popen[str]], None],
    work_seconds: tuple[float, float],
) -> int:
    """Let clients write and kill their controller, for as long as `go_on` says so by the number of kills."""
    kills = 0
    while go_on(kills):
        site.dark.clear()
        with controller(site.data, [], careless=site.careless) as process:
            if site.chance.random() < KILLS_IN_START:
                time.sleep(site.chance.uniform(0, START_SECONDS))
                cut_off(process)
                kills += 1
                continue
            port = port_of(process)
            site.compare(port)
            begin = threading.Event()
            threads = site.work(port, begin)
            begin.set()
            time.sleep(site.chance.uniform(*work_seconds))
            cut_off(process)
            kills += 1
            for thread in threads:
                thread.join()
        if kills % 100 == 0:
            print(f"{kills} kills, {dict(site.counts)}", flush=True)
    with controller(site.data, [], careless=site.careless) as process:
        site.compare(port_of(process))
    return kills


# ---- power cuts ----------------------------------------------------------------------------------------------------


class PowerCuts:
    """A file system in a file, of which nothing is left after a cut but what the disk had.

    In the moment of the cut Linux itself is wrong at times: an fsync of what it is throwing away succeeds (one in sixty
    cuts of a bare program that appends and syncs). So what counts is what was answered before; `dark` is set then.
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
        """Cut the power off, and let it come back when the controller has ended."""
        descriptor = os.open(self.point, os.O_RDONLY)
        self._dark.set()
        fcntl.ioctl(descriptor, EXT4_SHUTDOWN, struct.pack("I", NO_FLUSH))
        os.close(descriptor)
        # It ends by itself with its next write; without one it does not know.
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        process.wait(PATIENCE)
        self.close()
        self.mount()

    def close(self) -> None:
        subprocess.run(["umount", self.point], check=True)


# ---- kills at each system call -------------------------------------------------------------------------------------


def script(site: Site, port: int, requests: int) -> bool:
    """Write so many times, always the same; False when there was no answer."""
    line = Line(port)
    chance = random.Random(1)
    for number in range(requests):
        if number % 6 == 5:
            answered = site.append(line, site.logs[0])
        else:
            answered = site.act(line, chance.choice(tuple(site.held)), chance.choice(("create", "change", "delete")))
        if not answered:
            return False
    line.close()
    return True


def sweep(home: Path, calls: Iterable[str], requests: int) -> int:
    """Kill a run at each of some system calls. Raises Unexplained."""
    points = 0
    for call in calls:
        for number in itertools.count(1):
            site = Site(home / f"{call}-{number}" / "data", random.Random(1))
            site.data.parent.mkdir()
            if not killed_at(site, call, number, requests):
                print(f"{call}: {number - 1} kills", flush=True)
                break
            points += 1
            with controller(site.data, []) as process:
                site.compare(port_of(process))
            shutil.rmtree(site.data.parent)
    return points


def killed_at(site: Site, call: str, number: int, requests: int) -> bool:
    """Have the `number`-th system call of a kind kill the run; False when there is none."""
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    trace += ["-e", f"inject={call}:signal=KILL:when={number}"]
    if call == "write":
        for name in ("state.jsonl", "state.jsonl.new", "reserve"):
            trace += ["-P", str(site.data / name)]
    with controller(site.data, trace) as process:
        port = port_of(process)
        if not port:
            return True
        try:
            site.compare(port)
        except (OSError, http.client.HTTPException):  # it writes, too: the VMs that have events
            return True
        return not script(site, port, requests)


# ---- the command line ----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench crash")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="to go on for; default: %(default)s")
    add("--kills", type=int, help="to stop after, whatever the time")
    add("--clients", type=int, default=CLIENTS, help="that share the names; default: %(default)s")
    add("--every", type=float, help="seconds of work before each kill; default: a fraction, at random")
    add("--requests", type=int, default=SCRIPT, help="of the run that is swept; default: %(default)s")
    add("--seed", type=int, default=random.randrange(2**32), help="default: a random one")
    add("--sweep", nargs="*", choices=SWEPT, metavar="CALL", help=f"kill at each of these: {' '.join(SWEPT)}")
    add("--power", action="store_true", help="cut off the disk instead")
    add("--careless", action="store_true", help="a controller that answers too early, which must be found out")
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
            site = Site(where / "data", random.Random(options.seed), careless=options.careless)
            site.clients, site.dark = options.clients, dark
            work_seconds = (options.every, options.every) if options.every else WORK_SECONDS
            goal = options.kills
            go_on = (lambda kills: kills < goal) if goal is not None else (lambda kills: time.monotonic() < until)
            kills = kill(site, go_on, power.cut if power is not None else subprocess.Popen.kill, work_seconds)
            counts = ", ".join(f"{count} {what}" for what, count in sorted(site.counts.items()))
            print(f"{kills} kills, {counts}; nothing was lost; seed {options.seed}")
    except Unexplained as error:
        print(f"{error}\nseed {options.seed}; the data are in {home}", file=sys.stderr)
        return 1
    if power is not None:
        power.close()
    shutil.rmtree(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
