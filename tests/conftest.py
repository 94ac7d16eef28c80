"""Fixtures and rules of the whole suite: slow tests last, missing programs listed, no process left behind."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness.processes import processes_in
from harness.programs import REASON, ROOT_REASON, need
from harness.scratch import begin_run
from harness.ssh_server import ssh_server
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does. Derandomized, so that each run tries the same examples.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

# Fixtures of the command's tests.
pytest_plugins = ["harness.dev_site", "harness.dashboard_site"]

# For processes to be gone that were killed or told to end. Only a process that stays makes this wait so long.
DYING_SECONDS = 60.0
# What login shells read.
PROFILES = re.compile(r"\.(bash(rc|_.*)|profile|z(shrc|shenv|profile|login|logout)|login|logout|t?cshrc)")
# With the default, 700, collections take a fortieth of the CPU of the tests.
GARBAGE_THRESHOLD = 10_000


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(GARBAGE_THRESHOLD)
    handle_signals()
    if not hasattr(config, "workerinput"):
        config.add_cleanup(begin_run())
        leave_profiles()


def leave_profiles() -> None:
    """Let shells read no profile of the developer: one may take longer than a whole test, or print.

    The home directory becomes one of the same entries without the profiles. The processes of pytest-xdist inherit it.
    """
    before, after = Path.home(), Path(tempfile.mkdtemp(prefix="home-"))
    for entry in before.iterdir():
        if not PROFILES.fullmatch(entry.name):
            (after / entry.name).symlink_to(entry)
    os.environ["HOME"] = str(after)


def handle_signals() -> None:
    """Handle SIGINT also when a shell started the tests in the background, and SIGHUP when nohup did: they are ignored then.

    Programs that the tests start would inherit that, and none could be interrupted. A worker always handles SIGINT. A signal
    that is handled, if only by doing nothing, has its default in a program that is started.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests last: what fails is seen early. In every second process, those that wait begin before the fast ones.

    Else all processes would wait at the same time, and the processors would have nothing to do. The tests that wait for
    longest come first. The tests in a browser are the first slow ones of one process: its browser and its fleet are made
    again in each process that takes some of them, and processes take what comes last.
    """
    fast: list[pytest.Item] = []
    browser: list[pytest.Item] = []
    slow: list[pytest.Item] = []
    waiting: list[tuple[float, pytest.Item]] = []
    for item in items:
        marker = item.get_closest_marker("slow")
        if marker is None:
            fast.append(item)
        elif item.get_closest_marker("browser"):
            browser.append(item)
        elif marker.args:
            waiting.append((*marker.args, item))
        else:
            slow.append(item)
    longest = [item for _, item in sorted(waiting, key=lambda one: -one[0])]
    parts = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    left, items[:] = len(items), []
    # Each process of pytest-xdist begins with a part of the list (`--dist worksteal`): as many tests, one more in the last
    # parts where they do not come out even.
    for part in range(parts):
        size = left // (parts - part)
        left -= size
        waits, slows = longest[part::parts], slow[len(slow) * part // parts : len(slow) * (part + 1) // parts]
        shows = [] if part else browser
        count = max(0, size - len(shows) - len(waits) - len(slows))
        quick, fast = fast[:count], fast[count:]
        items += [*waits, *quick, *slows] if part % 2 else [*quick, *shows, *waits, *slows]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Make the collection faster: what it allocates stays until the end, and the collector would walk it many times."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        need(*marker.args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure coverage in fast tests with fixed cases only.

    Slow ones and those of hypothesis, which run the same lines a hundred times, take up to twice the time with it, and reach
    hardly a line more.
    """
    if item.get_closest_marker("slow") is None and not getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        return (yield)
    # Under pytest-xdist there are two measurements. To stop one resumes the other.
    traces = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(traces[0])
        threading.settrace(traces[1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not tested for want of a program or of the rights of root, with the number of cases of each test."""
    missed: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if reason.startswith((REASON, ROOT_REASON)):
            missed.setdefault(reason, Counter())[report.nodeid.partition("[")[0]] += 1
    if missed:
        terminalreporter.section("not tested on this machine")
    for reason, tests in sorted(missed.items()):
        terminalreporter.line(f"{reason}:")
        for test, cases in tests.items():
            terminalreporter.line(f"  {test}" + (f" ({cases} cases)" if cases > 1 else ""))


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail when a process outlives the tests. Supervisors and their VMs are made to outlive those who start them."""
    yield
    home = tmp_path_factory.getbasetemp()
    until = time.monotonic() + DYING_SECONDS
    while (left := processes_in(home)) and time.monotonic() < until:
        time.sleep(0.05)
    words = []
    for number in left:
        # It may end at this moment.
        with suppress(OSError):
            words.append(Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" "))
            os.kill(number, signal.SIGKILL)
    assert words == []


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an SSH server as it listens in a VM: admin/admin, with a shell of this host."""
    with ssh_server(HOME=str(tmp_path_factory.mktemp("home"))) as (_, port):
        yield port
