"""The dashboard in a browser with 1,000 workers and 10,000 VMs: its memory, and the longest task of its main thread.

    ./run bench page [--workers N] [--vms N]

Shown first is the time from the API's answer to the creation of a VM until the VM is on the page of the fleet.

Each page is opened in turn, in one tab, which a real controller serves. All workers are offline and each of them needs
attention, so the lists are the longest ones. The history is full, and each worker has as many images as it may report.
A frame cannot be shorter than the longest task. Shown is also the memory of the tab's process: the proportional set
size, in which memory that several processes share counts in parts. It needs chromium, and its processes in /proc.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from cluster import prepare, vm_of
from load import CONTROLLER, NO_AUTH, Server, body_of, request, running
from playwright.sync_api import Browser, Page, expect, sync_playwright

from orchard.schema import TART_VMS, EndedVM
from orchard.storage.history import MAX_ENDED, History, history_file

CHROMIUM = "/usr/bin/chromium"
CATEGORIES = ["disabled-by-default-devtools.timeline"]
MB, GB = 1_000_000, 10**9
# Images of each worker: as many as it may report.
IMAGES = 200
CHANGES = 30
# VMs of which each is created and then looked for on the page.
SEEN = 20
# Resolves to the time when a text is first on the page, by the clock that Python has, too.
_WHEN_SEEN = """(text) => {
  window.seen = new Promise((resolve) => new MutationObserver((_, observer) => {
    if (!document.querySelector("main").textContent.includes(text)) return;
    observer.disconnect();
    resolve(Date.now());
  }).observe(document.querySelector("main"), { childList: true, subtree: true }));
}"""


class Tab:
    """A tab whose main thread is traced, or else its memory measured: a trace takes memory, too."""

    def __init__(self, browser: Browser, *, traced: bool) -> None:
        self._browser = browser
        self.page: Page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self._devtools = browser.new_browser_cdp_session()
        self.is_traced = traced

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Print the longest task of the block, or the memory after it."""
        if self.is_traced:
            self._browser.start_tracing(page=self.page, categories=CATEGORIES)
        yield
        # Later consequences of the block, such as a layout, are a part of it.
        self.page.wait_for_timeout(500)
        if self.is_traced:
            wall, cpu = longest_task(json.loads(self._browser.stop_tracing()))
            print(f"{name:24}longest task {wall:4.0f} ms ({cpu:4.0f} ms of CPU)", flush=True)
        else:
            print(f"{name:24}{self.memory() / MB:4.0f} MB", flush=True)

    def memory(self) -> int:
        """Return the proportional set size of the tab's process in bytes."""
        processes = self._devtools.send("SystemInfo.getProcessInfo")["processInfo"]
        return max(proportional_size(one["id"]) for one in processes if one["type"] == "renderer")


def proportional_size(pid: int) -> int:
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def longest_task(trace: dict[str, Any]) -> tuple[float, float]:
    """Return the milliseconds, and the milliseconds of CPU, of the longest tasks of any tab's main thread."""
    events = trace["traceEvents"]
    names = [one for one in events if one["name"] == "thread_name"]
    mains = {(one["pid"], one["tid"]) for one in names if one["args"]["name"] == "CrRendererMain"}
    tasks = [one for one in events if one["name"] == "RunTask" and (one["pid"], one["tid"]) in mains]
    # Playwright looks for a text in a task that runs tasks of the page in between. That task is not a frame.
    tasks.sort(key=lambda one: (one["pid"], one["tid"], one["ts"]))
    following = [*tasks[1:], {"pid": 0, "ts": 0}]
    tasks = [
        one for one, after in zip(tasks, following, strict=True)
        if after["pid"] != one["pid"] or after["ts"] >= one["ts"] + one.get("dur", 0)
    ]  # fmt: skip
    return max(one.get("dur", 0) for one in tasks) / 1000, max(one.get("tdur", 0) for one in tasks) / 1000


async def write_history(home: Path, workers: int) -> None:
    """Fill the history of the data directory with VMs of the last day, of which some failed."""
    history = History(history_file(home / ".orchard" / "controller"))
    history.open()
    now, second = datetime.datetime.now(datetime.UTC), datetime.timedelta(seconds=1)
    for number in range(MAX_ENDED):
        began, image = now - 8 * (MAX_ENDED - number) * second, vm_of(0).spec.image
        history.add(
            EndedVM(
                name=f"old-{number}", uid=f"old-{number}", ended_at=began + 700 * second, created_by="ci", image=image,
                metadata={"pipeline": f"{number // 3}"}, worker=f"worker-{number % workers}", created_at=began,
                assigned_at=began + 20 * second, started_at=began + 60 * second,
                status="running" if number % 20 else "failed", message="" if number % 20 else "exit code 1",
            )
        )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(history.run)
        await history.flush()
        nursery.cancel_scope.cancel()


def register(server: Server, worker: int, slots: int) -> None:
    """Register a worker that is in the data directory, and report its images."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    images = [
        {"name": f"ghcr.io/org/image-{n}:latest", "digest": f"sha256:{n:064x}", "sizeBytes": 40 * GB, "lastUsed": now}
        for n in range(IMAGES)
    ]
    name = f"worker-{worker}"
    identity = {"name": name, "machine_id": "m", "resources": {TART_VMS: slots}}
    capabilities = ["worker-state", "image-inventory"]
    body_of(server, request("POST", "/v1/workers", json.dumps({**identity, "capabilities": capabilities}).encode()))
    facts = {"disk": {"totalBytes": 500 * GB, "freeBytes": 100 * GB}, "images": images, "health": {"ok": True}}
    body = {"name": name, "machine_id": "m", "last_seen": now, "settled": True, **facts}
    body_of(server, request("PUT", f"/v1/workers/{name}", json.dumps(body).encode()))


def change(server: Server) -> None:
    """Create VMs and delete them, one by one."""
    for number in range(CHANGES):
        vm = {"name": f"new-{number}", "image": "image", "labels": {"rack": "none"}}
        body_of(server, request("POST", "/v1/vms", json.dumps(vm).encode()))
    for number in range(CHANGES):
        body_of(server, request("DELETE", f"/v1/vms/new-{number}"))


def print_times_until_seen(page: Page, server: Server) -> None:
    times = []
    for number in range(SEEN):
        # The first of the queue, which shows some of many.
        vm = {"name": f"seen-{number}", "image": "image", "labels": {"rack": "none"}, "priority": 100 + number}
        page.evaluate(_WHEN_SEEN, vm["name"])
        body_of(server, request("POST", "/v1/vms", json.dumps(vm).encode()))
        answered = 1000 * time.time()
        times.append(page.evaluate("seen") - answered)
    for number in range(SEEN):
        body_of(server, request("DELETE", f"/v1/vms/seen-{number}"))
    print(
        f"{'A new VM is seen':24}median {statistics.median(times):4.0f} ms, worst of {SEEN} {max(times):4.0f} ms",
        flush=True,
    )


def measure(tab: Tab, server: Server, options: argparse.Namespace) -> None:
    page, url = tab.page, f"http://127.0.0.1:{server.port}/ui/"
    with tab.measured("Fleet, loading"):
        page.goto(url)
        expect(page.locator(".tiles")).to_contain_text(re.compile(f"/ {options.workers:,} *workers"), timeout=60_000)
    if not tab.is_traced:
        print_times_until_seen(page, server)
    with tab.measured("Fleet, changes"):
        change(server)
    with tab.measured("Fleet, scrolling"):
        for _ in range(20):
            page.mouse.wheel(0, 3000)
            page.wait_for_timeout(50)
    with tab.measured("Fleet, searching"):
        page.get_by_label("Search workers and VMs").press_sequentially("vm-99", delay=50)
    with tab.measured("VMs"):
        page.goto(f"{url}#/vms")
        expect(page.locator("main tbody a").first).to_be_visible()
    with tab.measured("VMs, changes"):
        change(server)
    for head in ("State", "Name", "Image", "Age"):
        with tab.measured(f"VMs, by {head}"):
            page.get_by_role("button", name=head, exact=True).click()
    with tab.measured("VMs, filtering"):
        page.get_by_label("Metadata k=v").press_sequentially("pipe", delay=50)
    with tab.measured("A worker"):
        page.goto(f"{url}#/worker/worker-7")
        expect(page.get_by_role("table", name="Images")).to_be_visible()
    with tab.measured("Images"):
        page.goto(f"{url}#/images")
        expect(page.get_by_role("table", name="Images")).to_be_visible()
    with tab.measured("History"):
        page.goto(f"{url}#/history")
        expect(page.locator(".plot").first).to_be_visible()
    with tab.measured("Fleet, again"):
        page.goto(f"{url}#/fleet")
        expect(page.locator(".box").first).to_be_visible()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--vms", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        prepare(home, options.vms, options.workers)
        trio.run(write_history, home, options.workers)
        arguments = (*CONTROLLER, NO_AUTH, "--worker-offline-timeout", "1000000", "--allow-host", "controller")
        with running(*arguments, home=home) as server, sync_playwright() as playwright:
            for worker in range(options.workers):
                register(server, worker, options.vms // options.workers)
            for traced in (True, False):
                # The sandbox needs rights that containers lack.
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                measure(Tab(browser, traced=traced), server, options)
                browser.close()


if __name__ == "__main__":
    main()
