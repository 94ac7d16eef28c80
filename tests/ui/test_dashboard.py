"""The dashboard in a browser, against a cluster of forty workers and ninety VMs, and against one that is killed.

The browser ends with this file: its event loop would be in the way of other tests. Screenshots are in screenshots/.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from harness.processes import GENEROUS, call_main, free_port, started
from harness.programs import need
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from orchard.cli.main import main
from orchard.schema import Worker
from orchard.testing import BlockingCluster, start_cluster

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = "/usr/bin/chromium"
SCREENSHOTS = Path(__file__).parents[2] / "screenshots"
WORKERS, VMS = 40, 90
IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
LONG_SCRIPT = {"script_content": "echo step 1; sleep 1000"}
FAILING_SCRIPT = {"script_content": "echo no space left; exit 3"}
READER = ("reader", "r" * 32)
LISTENING = re.compile(r".*(http://127\.0\.0\.1:[0-9]+)")
PAGES = ["fleet", "vms", "images", "history", "api", "worker/mac-02", "vm/ci-005"]
# More than a tab needs for its requests, and so many that each tab could not have a watch of its own.
TABS = 8
LINES = 200_000
# For what should be seen in a fraction of a second.
PATIENCE = 60_000  # milliseconds


# ---- the browser and the clusters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    need("chromium")
    expect.set_options(timeout=PATIENCE)
    # Playwright makes a loop of asyncio. Once trio-asyncio is imported, it makes loops on trio unless a policy is set.
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    try:
        with sync_playwright() as playwright:
            # The sandbox needs rights that containers lack.
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            yield browser
            browser.close()
    finally:
        asyncio.set_event_loop_policy(None)


@pytest.fixture(scope="module")
def fleet() -> Iterator[BlockingCluster]:
    """Forty workers with ninety VMs, of which some run scripts, some have failed, and some can never be placed."""
    workers = [Worker(name=f"mac-{n:02}", labels={"xcode": "27" if n % 3 else "26"}) for n in range(1, WORKERS + 1)]
    with start_cluster(workers=workers, auth=True) as c:
        c.client.service_accounts.create(name=READER[0], token=READER[1], roles=["compute:read"])
        for number in range(VMS):
            name, more = f"ci-{number:03}", _kind_of_vm(number)
            c.client.vms.create(name=name, image=more.pop("image", IMAGE), metadata={"job": str(number // 3)}, **more)
        yield c


def _kind_of_vm(number: int) -> dict[str, Any]:
    if number >= VMS - 3:
        return {"labels": {"xcode": "99"}}
    if number % 9 == 0:
        return {"startup_script": FAILING_SCRIPT}
    if number % 5 == 0:
        return {"startup_script": LONG_SCRIPT}
    return {"image": "example.com/pull-900s"} if number % 11 == 3 else {}


class Visit:
    """A browser without a past, and what was wrong in it: errors in the console, and requests to other origins."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url
        self.requests: list[str] = []
        self.problems: list[str] = []
        context.on("request", lambda request: self._note(request.url))
        context.on("console", self._note_message)
        context.on("weberror", lambda error: self.problems.append(str(error.error)))

    def _note(self, url: str) -> None:
        self.requests.append(url)
        if urlsplit(url)[:2] != urlsplit(self.url)[:2] and not url.startswith("blob:"):
            self.problems.append(f"request to {url}")

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def open(self, page: str = "fleet") -> Page:
        tab = self.context.new_page()
        tab.goto(f"{self.url}/ui/#/{page}")
        return tab

    def sign_in(self, account: str, token: str, page: str = "fleet") -> Page:
        tab = self.open(page)
        tab.get_by_label("Service account").fill(account)
        tab.get_by_label("Token").fill(token)
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.locator("#connection")).to_have_text("Live")
        return tab


@contextmanager
def visiting(
    browser: Browser, url: str, *, width: int = 1280, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Visit]:
    """Yield a visit without a past. At its end nothing may have been wrong."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    visit = Visit(context, url)
    try:
        yield visit
        assert visit.problems == []
    finally:
        context.close()


@pytest.fixture
def visit(browser: Browser, fleet: BlockingCluster) -> Iterator[Visit]:
    with visiting(browser, fleet.url) as found:
        yield found


# ---- signing in -----------------------------------------------------------------------------------------------------


def test_sign_in_wrong_and_right(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.open()
    tab.get_by_label("Service account").fill(fleet.account)
    tab.get_by_label("Token").fill("wrong")
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("alert")).not_to_be_empty()
    expect(tab.get_by_role("navigation")).to_be_hidden()
    # A browser notes each refusal in its console.
    assert [problem for problem in visit.problems if "401" not in problem] == []
    visit.problems.clear()
    tab.get_by_label("Token").fill(fleet.token)
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.locator("#connection")).to_have_text("Live")
    assert fleet.token not in json.dumps(visit.context.cookies()) + "".join(visit.requests)
    # A page that is loaded again is still signed in, and one that was signed out is not.
    tab.reload()
    expect(tab.locator("#connection")).to_have_text("Live")
    tab.get_by_role("button", name="Sign out").click()
    tab.reload()
    expect(tab.get_by_label("Token")).to_be_visible()


def test_account_that_may_read_only_sees_no_button_that_changes_anything(visit: Visit) -> None:
    tab = visit.sign_in(*READER)
    for page in PAGES:
        tab.goto(f"{visit.url}/ui/#/{page}")
        expect(tab.locator("main h1")).not_to_be_empty()
        expect(tab.locator("main input[type=checkbox]")).to_have_count(0)
        names = set(tab.locator("main button:not(th button)").filter(visible=True).all_inner_texts())
        # What is left shows, copies or downloads.
        assert names <= {"Copy", "Follow", "Download", "JSON"}, page


def test_account_that_may_change_vms_has_the_buttons_for_it(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token, "vm/ci-005")
    for name in ("Stop…", "Restart…", "Token…", "Again with a shell", "Delete…"):
        expect(tab.get_by_role("button", name=name)).to_be_visible()
    tab.goto(f"{visit.url}/ui/#/worker/mac-03")
    tab.get_by_role("button", name="Pause").click()
    expect(tab.get_by_role("button", name="Resume")).to_be_visible()
    assert fleet.client.workers.get("mac-03").scheduling_paused
    tab.get_by_role("button", name="Resume").click()
    expect(tab.get_by_role("button", name="Pause")).to_be_visible()
    tab.get_by_role("button", name="Drain…").click()
    tab.get_by_label("Deadline in minutes").fill("60")
    tab.get_by_role("button", name="Drain", exact=True).click()
    expect(tab.locator("main h1 + .word")).to_have_text("draining")
    fleet.client.workers.undrain("mac-03")
    expect(tab.locator("main h1 + .word")).to_have_text("online")


def test_vm_is_started_again_without_its_script_and_deleted(visit: Visit, fleet: BlockingCluster) -> None:
    fleet.client.vms.create(name="again", image=IMAGE, labels={"xcode": "99"}, startup_script=LONG_SCRIPT, metadata={"k": "v"})  # fmt: skip
    tab = visit.sign_in(fleet.account, fleet.token, "vm/again")
    tab.get_by_role("button", name="Again with a shell").click()
    expect(tab.locator("main h1")).to_have_text("again-shell")
    copy = fleet.client.vms.get("again-shell")
    assert (copy.spec.image, copy.spec.metadata, copy.spec.startup_script) == (IMAGE, {"k": "v"}, None)
    tab.get_by_role("button", name="Token…").click()
    tab.get_by_role("button", name="Issue").click()
    expect(tab.get_by_label("token", exact=True)).to_contain_text("ey")
    tab.get_by_role("button", name="Close").click()
    tab.goto(f"{visit.url}/ui/#/vms")
    tab.get_by_label("Name").fill("again")
    tab.get_by_label("Select all that are shown").check()
    tab.get_by_role("button", name="Delete…").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator("main tbody a")).to_have_count(0)
    assert not [vm.name for vm in fleet.client.vms.list() if vm.name.startswith("again")]


# ---- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_both_themes(browser: Browser, fleet: BlockingCluster, scheme: Literal["light", "dark"]) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    with visiting(browser, fleet.url, scheme=scheme) as visit:
        tab = visit.sign_in(fleet.account, fleet.token)
        names = tab.locator(".box header a")
        expect(names).to_have_count(WORKERS)
        for name in names.all():
            box = name.bounding_box()
            assert box is not None
            # All of the name is there.
            assert name.evaluate("element => element.scrollWidth <= element.clientWidth")
        expect(tab.locator(".tiles")).to_contain_text(f"/ {WORKERS}")
        for page in PAGES:
            tab.goto(f"{visit.url}/ui/#/{page}")
            expect(tab.locator("main h1")).not_to_be_empty()
            expect(tab.locator("main")).not_to_contain_text("Loading…")
            tab.screenshot(path=SCREENSHOTS / f"{page.partition('/')[0]}-{scheme}.png")
        tab.set_viewport_size({"width": 390, "height": 844})
        for page in PAGES:
            tab.goto(f"{visit.url}/ui/#/{page}")
            expect(tab.locator("main h1")).not_to_be_empty()
            expect(tab.locator("main")).not_to_contain_text("Loading…")
            assert tab.evaluate("document.documentElement.scrollWidth") == 390, page
            tab.screenshot(path=SCREENSHOTS / f"{page.partition('/')[0]}-{scheme}-390.png")


def test_fleet_shows_what_needs_a_human_and_why_vms_wait(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token)
    need, queue = tab.get_by_role("region", name="Needs attention"), tab.get_by_role("region", name="Queue")
    expect(need.locator("li")).to_have_count(3)
    expect(queue.locator("li")).to_have_count(3)
    expect(queue).to_contain_text("xcode=99")
    expect(tab.get_by_role("region", name="Failures of the last hour")).to_contain_text("exit code 3")
    tab.get_by_label("Group by").select_option(label="xcode")
    expect(tab.locator(".group h3")).to_have_text(["xcode=26", "xcode=27"])


# ---- keyboard -------------------------------------------------------------------------------------------------------

_UNNAMED = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex='0']")]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || [...(one.labels || [])].some((label) => label.textContent.trim())))
  .map((one) => one.outerHTML)"""
# Numbers each control that is seen. A control of the disclosure of a closed <details> is not.
_NUMBER = """() => [...document.querySelectorAll("header a, header button, main a[href], main button, main input, main select, main summary, main [tabindex='0']")]
  .filter((one) => one.checkVisibility()).map((one, index) => { one.dataset.number = index; return index; })"""


@pytest.mark.parametrize("page", ["vms?name=ci-00", "images", "history", "api", "worker/mac-02", "vm/ci-005"])
def test_every_control_has_a_name_and_is_reached_by_keyboard(visit: Visit, fleet: BlockingCluster, page: str) -> None:
    tab = visit.sign_in(fleet.account, fleet.token, page)
    expect(tab.locator("main")).not_to_contain_text("Loading…")
    assert tab.evaluate(_UNNAMED) == []
    left = set(tab.evaluate(_NUMBER))
    assert left
    for _ in range(2 * len(left) + 20):
        tab.keyboard.press("Tab")
        left.discard(tab.evaluate("Number(document.activeElement.dataset.number ?? -1)"))
        if not left:
            break
    # A row that was drawn anew meanwhile has lost its number.
    missed = [number for number in left if tab.locator(f"[data-number='{number}']").count()]
    assert [tab.locator(f"[data-number='{number}']").evaluate("one => one.outerHTML") for number in missed] == []


def test_keys_lead_to_a_vm(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token)
    expect(tab.locator(".box header a")).to_have_count(WORKERS)
    tab.keyboard.press("?")
    expect(tab.get_by_role("dialog")).to_be_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("/")
    tab.keyboard.type("ci-005")
    expect(tab.locator(".box header a")).to_have_count(1)
    tab.keyboard.press("Escape")
    link = tab.locator(".box .slot a", has_text="ci-005")
    for _ in range(WORKERS):
        tab.keyboard.press("j")
        if link.evaluate("element => element === document.activeElement"):
            break
    tab.keyboard.press("j")
    tab.keyboard.press("k")
    expect(link).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("main h1")).to_have_text("ci-005")


def test_page_has_landmarks_and_says_changes_to_a_screen_reader(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token)
    for role in ("banner", "navigation", "main"):
        expect(tab.get_by_role(role)).to_have_count(1)
    expect(tab.locator("#connection")).to_have_attribute("aria-live", "polite")
    time_shown = tab.locator("time").first
    assert time_shown.get_attribute("title")


# ---- what is live ---------------------------------------------------------------------------------------------------

# Notes when a text is first on the page, by the clock that the test has, too.
_NOTE_WHEN_SEEN = """(text) => new MutationObserver((_, observer) => {
  if (!document.body.textContent.includes(text)) return;
  document.documentElement.dataset.seen = Date.now();
  observer.disconnect();
}).observe(document.body, { childList: true, subtree: true, characterData: true })"""


def test_vm_that_is_created_appears_by_the_one_stream(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token)
    expect(tab.locator(".box header a")).to_have_count(WORKERS)
    tab.evaluate(_NOTE_WHEN_SEEN, "just-created")
    assert sum("/v1/watch" in url for url in visit.requests) == 1
    before = len(visit.requests)
    fleet.client.vms.create(name="just-created", image=IMAGE, labels={"xcode": "99"})
    answered = time.time()
    try:
        expect(tab.locator("html")).to_have_attribute("data-seen", re.compile("."))
        assert visit.requests[before:] == []
        seen = int(tab.locator("html").get_attribute("data-seen") or 0) / 1000
        print(f"seen {1000 * (seen - answered):.0f} ms after the answer")
    finally:
        fleet.client.vms.delete("just-created")


def test_eight_tabs_share_one_stream_and_one_sign_in(visit: Visit, fleet: BlockingCluster) -> None:
    first = visit.sign_in(fleet.account, fleet.token)
    tabs = [first, *(visit.open() for _ in range(TABS - 1))]
    for tab in tabs:
        expect(tab.locator("#connection")).to_have_text("Live")
        expect(tab.locator(".box header a")).to_have_count(WORKERS)
    assert sum("/v1/watch" in url for url in visit.requests) == 1
    fleet.client.vms.create(name="for-all", image=IMAGE, labels={"xcode": "99"})
    try:
        for tab in tabs:
            expect(tab.get_by_role("region", name="Queue")).to_contain_text("for-all")
        # The tab that has the stream is closed: another one goes on, and misses nothing.
        first.close()
    finally:
        fleet.client.vms.delete("for-all")
    for tab in tabs[1:]:
        expect(tab.get_by_role("region", name="Queue")).not_to_contain_text("for-all")
        expect(tab.locator("#connection")).to_have_text("Live")
    assert sum("/v1/watch" in url for url in visit.requests) == 2


def test_page_comes_back_after_the_controller_was_killed(browser: Browser, tmp_path: Path) -> None:
    """`orchard dev` needs no sign-in."""
    words = ("--synthetic", "--port", str(free_port()), "--directory", str(tmp_path / "dev"))
    context = browser.new_context()
    with started("", "dev", *words, home=tmp_path) as role:
        url = role.wait_for(LISTENING)[1]
        tab = Visit(context, url).open()
        expect(tab.locator("#connection")).to_have_text("Live")
        create = ("create", "vm", "kept", "--image", "example.com/pull-900s")
        assert call_main(main, *create, home=tmp_path)[0] == 0
        expect(tab.locator("main")).to_contain_text("kept")
        role.process.kill()
        role.process.wait(GENEROUS)
        expect(tab.locator("#connection")).to_have_class(re.compile("lost"))
        expect(tab.locator("body")).to_have_class(re.compile("stale"))
    with started("", "dev", *words, home=tmp_path) as role:
        role.wait_for(LISTENING)
        expect(tab.locator("#connection")).to_have_text("Live")
        expect(tab.locator("body")).not_to_have_class(re.compile("stale"))
        assert call_main(main, "delete", "vm", "kept", home=tmp_path)[0] == 0
        expect(tab.locator("main")).not_to_contain_text("kept")
        context.close()
        role.stop()


def test_connection_that_says_nothing_is_lost(browser: Browser, tmp_path: Path) -> None:
    """A controller that is frozen, like a network that drops everything, ends no connection."""
    words = ("--synthetic", "--port", "0", "--directory", str(tmp_path / "dev"))
    context = browser.new_context()
    with started("", "dev", *words, home=tmp_path) as role:
        tab = Visit(context, role.wait_for(LISTENING)[1]).open()
        expect(tab.locator("#connection")).to_have_text("Live")
        role.process.send_signal(signal.SIGSTOP)
        expect(tab.locator("#connection")).to_have_class(re.compile("lost"))
        role.process.send_signal(signal.SIGCONT)
        expect(tab.locator("#connection")).to_have_text("Live")
        context.close()
        role.stop()


# ---- what VMs print -------------------------------------------------------------------------------------------------

MARKUP = """<img src=x onerror="document.title='pwned'"><script>document.title='pwned'</script><h1>pwned</h1>"""


def test_what_a_script_prints_is_text(visit: Visit, fleet: BlockingCluster) -> None:
    lines = f"cat <<'EOF'\n{MARKUP}\n\x1b[31mred\x1b[0m \x1b]0;title\x07plain\nEOF\nexit 1"
    fleet.client.vms.create(
        name="printer", image=IMAGE, startup_script={"script_content": lines}, metadata={"m": MARKUP}
    )
    fleet.client.vms.wait("printer", until="failed")
    try:
        tab = visit.sign_in(fleet.account, fleet.token, "vm/printer")
        log = tab.get_by_role("log")
        expect(log).to_contain_text(MARKUP)
        expect(log).to_contain_text("red plain")
        expect(log.locator(".f1")).to_have_text("red")
        expect(tab.locator("main")).to_contain_text("m=<img")
        expect(tab.locator("main img, main script")).to_have_count(0)
        expect(tab.locator("main h1")).to_have_text("printer")
        tab.goto(f"{visit.url}/ui/#/vms?name=printer")
        expect(tab.locator("main tbody")).to_contain_text("<img")
        assert tab.title() == "VMs · Orchard"
    finally:
        fleet.client.vms.delete("printer")


def test_log_of_200_000_lines(visit: Visit, fleet: BlockingCluster) -> None:
    fleet.client.vms.create(name="talker", image=IMAGE, labels={"xcode": "99"})
    try:
        for start in range(0, LINES, 10_000):
            numbers = range(start, start + 10_000)
            events = [{"kind": "log_line", "payload": f"line {number}", "timestamp": 1} for number in numbers]
            fleet.client.vms.append_events("talker", events)
        tab = visit.sign_in(fleet.account, fleet.token, "vm/talker")
        log = tab.get_by_role("log")
        expect(log).to_contain_text(f"line {LINES - 1}")
        assert tab.locator(".logbox .rows div").count() < 200
        # Only the last ones are kept.
        more = [{"kind": "log_line", "payload": f"more {number}", "timestamp": 1} for number in range(100)]
        fleet.client.vms.append_events("talker", more)
        expect(log).to_contain_text("more 99")
        assert tab.evaluate("frame.page.log.lines.length") <= LINES
        tab.get_by_label("Search the log").fill("more 42")
        expect(tab.locator(".logbox .rows div")).to_have_count(1)
        with tab.expect_download() as download:
            tab.get_by_role("button", name="Download").click()
        text = download.value.path().read_text()
        assert text.endswith("more 98\nmore 99\n")
    finally:
        fleet.client.vms.delete("talker")


# ---- size -----------------------------------------------------------------------------------------------------------

# Makes the lines of a watch of a large fleet, in blocks, and returns how many blocks there are.
_MAKE_LINES = """([workers, vms]) => {
  const now = new Date().toISOString(), each = vms / workers;
  window.blocks = [[]];
  for (let w = 0; w < workers; w++) {
    const name = `mac-${w}`, resources = { "org.cirruslabs.tart-vms": each };
    const lines = [{ type: "ADDED", kind: "worker", object: { name, resources, labels: { rack: `${w % 10}` }, state: "online", used: resources } }];
    for (let v = 0; v < each; v++) {
      const vm = { name: `vm-${w}-${v}`, uid: `${w} ${v}`, image: "ghcr.io/x/macos:latest", status: "running", worker: name, createdAt: now, started_at: now,
        createdBy: "ci", metadata: { job: `${w}` }, labels: { xcode: "27" }, conditions: [{ type: "running", state: "true" }] };
      lines.push({ type: "ADDED", kind: "vm", object: vm });
    }
    if (blocks.at(-1).length > 400) blocks.push([]);
    blocks.at(-1).push(...lines);
  }
  // At last one change, as it comes every day.
  blocks.push([{ ...blocks[0][1], type: "MODIFIED" }]);
  return blocks.length;
}"""
# One frame: takes lines, draws, and lays the page out.
_TAKE_LINES = "(index) => { for (const line of blocks[index]) fleet.apply(line); frame.draw(); document.body.getBoundingClientRect(); }"


@pytest.mark.parametrize("page", ["fleet", "vms"])
def test_page_of_a_large_fleet_is_small_and_fast(visit: Visit, fleet: BlockingCluster, page: str) -> None:
    """1,000 workers and 10,000 VMs. The time is that of the processor, which depends little on what else runs."""
    tab = visit.sign_in(fleet.account, fleet.token, page)
    devtools = visit.context.new_cdp_session(tab)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def figures() -> dict[str, float]:
        return {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}

    times: list[float] = []
    for index in range(tab.evaluate(_MAKE_LINES, [1000, 10_000])):
        before = figures()["TaskDuration"]
        tab.evaluate(_TAKE_LINES, index)
        times.append(1000 * (figures()["TaskDuration"] - before))
    expect(tab.locator(".count").first if page == "vms" else tab.locator(".tiles")).to_contain_text(
        re.compile("10[,0-9]*")
    )
    devtools.send("HeapProfiler.collectGarbage")
    after = figures()
    print(f"{page}: heap {after['JSHeapUsedSize'] / 1e6:.0f} MB, {after['Nodes']:.0f} nodes, "
          f"longest frame {max(times):.0f} ms, one change {times[-1]:.0f} ms")  # fmt: skip
    assert after["JSHeapUsedSize"] < 100e6
    assert after["Nodes"] < 60_000
    assert max(times) < 250


# ---- pages of other origins -----------------------------------------------------------------------------------------


@contextmanager
def other_site(body: str) -> Iterator[str]:
    """Serve a page on another port, and yield its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_page_of_another_origin_reads_and_changes_nothing(browser: Browser) -> None:
    with start_cluster(workers=0) as c:
        vm = json.dumps({"name": "pwned", "image": "any"})
        body = f"""<script>
          const options = {{ method: "POST", mode: "no-cors", body: {json.dumps(vm)} }};
          Promise.allSettled([fetch("{c.url}/v1/vms", {{ mode: "no-cors" }}), fetch("{c.url}/v1/vms", options), fetch("{c.url}/ui/")]).then(() => document.title = "done");
        </script><iframe src="{c.url}/ui/"></iframe>"""
        context = browser.new_context()
        with other_site(body) as url:
            tab = context.new_page()
            statuses: list[tuple[str, str, int]] = []
            tab.on("response", lambda one: statuses.append((one.request.method, urlsplit(one.url).path, one.status)))
            tab.goto(url)
            expect(tab).to_have_title("done")
            asked = [one for one in statuses if one[1] in ("/v1/vms", "/ui/")]
            assert {status for _, _, status in asked} == {403}
            assert {("GET", "/v1/vms", 403), ("POST", "/v1/vms", 403), ("GET", "/ui/", 403)} <= set(asked)
            # A person may follow a link to the dashboard.
            tab.goto(url)
            tab.evaluate("url => { location.href = url; }", f"{c.url}/ui/")
            expect(tab.locator("#connection")).to_have_text("Live")
        context.close()
        assert c.client.vms.list() == []
