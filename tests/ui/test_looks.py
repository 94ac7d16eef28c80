"""How the dashboard looks and is used: themes, widths, what moves, the keyboard, and a large fleet.

Screenshots are in screenshots/. With ORCHARD_UPDATE_PICTURES=1 those that the documents show are taken again.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from harness.browser import Visit, visiting
from harness.dashboard_site import PAGES, WORKERS
from playwright.sync_api import Browser, Page, expect

from orchard.testing import BlockingCluster

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "screenshots"
# Their names say which they are. As WebP they have a third of the bytes.
PICTURES = {file.stem: file for file in (ROOT / "docs" / "images").glob("*.webp")}


def take_picture(tab: Page, name: str) -> None:
    tab.screenshot(path=SCREENSHOTS / f"{name}.png")
    if name in PICTURES and os.environ.get("ORCHARD_UPDATE_PICTURES"):
        options = {"format": "webp", "quality": 75}
        taken = tab.context.new_cdp_session(tab).send("Page.captureScreenshot", options)
        PICTURES[name].write_bytes(base64.b64decode(taken["data"]))


# Draws changes of the fleet at once.
_APPLY = "(lines) => { for (const line of lines) fleet.apply(line); frame.draw(); }"


# ---- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_both_themes(browser: Browser, fleet: BlockingCluster, scheme: Literal["light", "dark"]) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    with visiting(browser, fleet.url, scheme=scheme) as visit:
        tab = visit.sign_in(fleet.account, fleet.token)
        names = tab.locator(".box header a")
        expect(names).to_have_count(WORKERS)
        # All of each name is there.
        assert names.evaluate_all("all => all.every((one) => one.offsetWidth && one.scrollWidth <= one.offsetWidth)")
        expect(tab.locator(".tiles")).to_contain_text(f"/ {WORKERS}")
        for page in PAGES:
            tab.goto(f"{visit.url}/ui/#/{page}")
            expect(tab.locator("main h1")).not_to_be_empty()
            expect(tab.locator("main")).not_to_contain_text("Loading…")
            take_picture(tab, f"{page.partition('/')[0]}-{scheme}")
        tab.set_viewport_size({"width": 390, "height": 844})
        long = {"name": "n" * 128, "labels": {"k" * 63: "v" * 63}, "resources": {}}
        tab.goto(f"{visit.url}/ui/#/fleet")
        for kind in ("ADDED", "DELETED"):
            tab.evaluate(_APPLY, [{"type": kind, "kind": "worker", "object": long}])
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
        for page in PAGES:
            tab.goto(f"{visit.url}/ui/#/{page}")
            expect(tab.locator("main h1")).not_to_be_empty()
            expect(tab.locator("main")).not_to_contain_text("Loading…")
            assert tab.evaluate("document.documentElement.scrollWidth") == 390, page
            take_picture(tab, f"{page.partition('/')[0]}-{scheme}-390")


def test_fleet_shows_what_needs_a_human_and_why_vms_wait(tab: Page, fleet: BlockingCluster) -> None:
    need, queue = tab.get_by_role("region", name="Needs attention"), tab.get_by_role("region", name="Queue")
    # One line for the three that wait for the same label.
    expect(need.locator("li a")).to_have_text("3 VMs")
    expect(queue.locator("li")).to_have_count(3)
    expect(queue).to_contain_text("xcode=99")
    expect(tab.get_by_role("region", name="Failures of the last hour")).to_contain_text("exit code 3")
    tab.get_by_label("Group by").select_option(label="xcode")
    expect(tab.locator(".group h3")).to_have_text(["xcode=26", "xcode=27"])
    tab.get_by_label("Group by").select_option(label="nothing")


# Lines of a watch, in an order other than that of the problems.
_SICK = """() => {
  const minute = 60_000, now = Date.now(), ago = (minutes) => new Date(now - minutes * minute).toISOString(), sick = new Fleet();
  const add = (kind, object) => sick.apply({ type: "ADDED", kind, object });
  add("worker", { name: "low", state: "online", disk: { totalBytes: 500e9, freeBytes: 19e9 } });
  add("worker", { name: "ill", state: "online", health: { problems: [{ what: "clone", message: "no space" }] } });
  add("worker", { name: "idle-gone", state: "offline" });
  add("worker", { name: "gone", state: "offline" });
  add("worker", { name: "well", state: "online", disk: { totalBytes: 500e9, freeBytes: 400e9 } });
  add("vm", { name: "lost", uid: "1", status: "running", worker: "gone" });
  add("vm", { name: "old", uid: "2", status: "pending", status_message: "waiting: all slots are used", createdAt: ago(11) });
  add("vm", { name: "new", uid: "3", status: "pending", status_message: "waiting: all slots are used", createdAt: ago(9) });
  add("vm", { name: "stuck", uid: "4", status: "pending", worker: "well", scheduled_at: ago(31), createdAt: ago(40) });
  add("vm", { name: "starts", uid: "5", status: "pending", worker: "well", scheduled_at: ago(29), createdAt: ago(40) });
  add("vm", { name: "again", uid: "6", status: "pending", restart_count: 3, worker: "well", scheduled_at: ago(1), createdAt: ago(30) });
  add("vm", { name: "never", uid: "7", status: "pending", status_message: "waiting: no worker has label a=b", createdAt: ago(1) });
  return sick.problems(now).map((one) => one.key);
}"""


def test_what_needs_a_human_is_found_worst_first(everything: Page) -> None:
    found = ["w gone", "v again", "v never", "h ill clone", "v stuck", "w idle-gone", "d low", "queue"]
    assert everything.evaluate(_SICK) == found


# Returns the contrast of each colour of a terminal with the background of the log, by the formula of WCAG 2.
_CONTRASTS = """() => {
  const light = (colour) => colour.match(/\\d+/g).map((one) => one / 255).map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, index) => sum + one * [0.2126, 0.7152, 0.0722][index], 0);
  const log = document.querySelector(".logbox"), back = light(getComputedStyle(log).backgroundColor);
  return Array.from({ length: 8 }, (_, index) => {
    const text = log.appendChild(h("span", { class: `f${index}` }, "text")), front = light(getComputedStyle(text).color);
    text.remove();
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_a_log_can_be_read(tab: Page, fleet: BlockingCluster, scheme: Literal["light", "dark"]) -> None:
    tab.goto(f"{fleet.url}/ui/#/vm/ci-005")
    tab.emulate_media(color_scheme=scheme)
    assert min(tab.evaluate(_CONTRASTS)) >= 4.5
    tab.emulate_media(color_scheme="light")


# ---- what moves -----------------------------------------------------------------------------------------------------

# The sum of all layout shifts, by the measure of the browser, below which the web calls a page good. It is for one page there.
MOST_SHIFT = 0.1
# Sums up what moves in the sight of a person who has not pressed or clicked anything.
_WATCH_SHIFTS = """() => {
  window.shifted = { sum: 0, what: [] };
  window.takeShifts = (entries) => entries.filter((one) => !one.hadRecentInput).forEach(({ value, sources }) => {
    shifted.sum += value;
    shifted.what.push([location.hash, doing, value, ...sources.map(({ node }) => node?.textContent.slice(0, 40))]);
  });
  window.doing = "loading";
  window.shiftObserver = new PerformanceObserver((list) => takeShifts(list.getEntries()));
  shiftObserver.observe({ type: "layout-shift", buffered: true });
}"""
_SHIFTS = "() => { takeShifts(shiftObserver.takeRecords()); return shifted; }"
# What happens in a fleet, each line drawn and painted before the next one: VMs come, start, fail and go, a worker is silent
# and ill, the connection is lost and returns.
_EVENTS = """async () => {
  const now = new Date().toISOString(), mac = fleet.workers.get("mac-40");
  const vm = (name, more) => ["vm", { name, uid: name, image: "i", startup_script: {}, status: "pending", createdAt: now, ...more }];
  const at = { worker: "mac-40", scheduled_at: now }, ill = { problems: [{ what: "clone", message: "no space is left on the device", since: now }] };
  const steps = {
    come: [1, 2, 3].map((n) => vm(`new-${n}`, { status_message: "waiting: all slots are used" })),
    assigned: [vm("new-1", { ...at, status_message: "pulling image: 42 %" })],
    cloning: [vm("new-1", { ...at, status_message: "cloning image" })],
    running: [vm("new-1", { ...at, status: "running", started_at: now, image_fqn: `i@sha256:${"0".repeat(64)}`, assignedCPU: 4, assignedMemory: 8192 })],
    failed: [vm("new-1", { ...at, status: "failed", started_at: now, status_message: "startup script failed with exit code 3", startupExitCode: 3 })],
    silent: [["worker", { ...mac, state: "offline", since: now }]],
    ill: [["worker", { ...mac, health: ill }]],
    lost: () => stream.notice(false),
    back: () => stream.notice(true),
    well: [["worker", mac]],
    gone: [1, 2, 3].map((n) => vm(`new-${n}`)),
  };
  for (const [name, step] of Object.entries(steps)) {
    window.doing = name;
    if (Array.isArray(step)) for (const [kind, object] of step) fleet.apply({ type: name === "gone" ? "DELETED" : "MODIFIED", kind, object });
    else step();
    frame.schedule();
    for (let frames = 0; frames < 2; frames++) await new Promise(requestAnimationFrame);
  }
  window.doing = "opening the next page";
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_jumps(browser: Browser, fleet: BlockingCluster, width: int) -> None:
    with visiting(browser, fleet.url, width=width) as visit:
        tab = visit.sign_in(fleet.account, fleet.token)
        # The VMs of the events are not known to the controller.
        visit.context.route("**/v1/vms/new-1/events?*", lambda route: route.fulfill(body=""))
        tab.evaluate(_WATCH_SHIFTS)
        for page in (*PAGES, "vm/new-1", "worker/mac-40"):
            tab.evaluate("page => { location.hash = `#/${page}`; }", page)
            expect(tab.locator("main h1")).not_to_be_empty()
            expect(tab.locator("main")).not_to_contain_text("Loading…")
            if page == "vms":
                # The newest VM comes first. The rows stay where they are below the pointer, or once they are scrolled.
                tab.locator("main tbody a").first.hover()
            if page == "vm/ci-005":
                lines = [{"kind": "log_line", "payload": f"{width} {n}", "timestamp": 1} for n in range(100)]
                fleet.client.vms.append_events("ci-005", lines)
                expect(tab.get_by_role("log")).to_contain_text(f"{width} 99")
            tab.evaluate(_EVENTS)
        found = tab.evaluate(_SHIFTS)
        print(f"{width} pixels wide: {found['sum']:.3f}")
        assert found["sum"] < MOST_SHIFT, found["what"]


# ---- keyboard -------------------------------------------------------------------------------------------------------

_UNNAMED = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex='0']")]
  .filter((one) => one.checkVisibility())
  .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || [...(one.labels || [])].some((label) => label.textContent.trim())))
  .map((one) => one.outerHTML)"""
# Numbers each control that is seen, and takes the number off when it gets the focus. A control in a closed <details> is not
# seen. Notes where the focus goes, and whether it can be seen there. Returns how many controls there are.
_NUMBER = """() => {
  byId("skip").focus();
  window.steps = [];
  const region = (one) => one.closest("header, .box, section, form, .title, tr");
  document.addEventListener("focusin", window.onStep ||= ({ target }) => {
    delete target.dataset.number;
    const { outlineStyle, outlineWidth } = getComputedStyle(target), before = steps.at(-1)?.target ?? target;
    // At once, since a row may move later.
    const [here, there] = [target, before].map((one) => one.getBoundingClientRect());
    const goesBack = region(before) === region(target) && target !== before && here.top < there.bottom - 4 && here.left <= there.left;
    steps.push({ target, isWrong: outlineStyle === "none" || parseFloat(outlineWidth) < 2 || goesBack });
  });
  const all = document.querySelectorAll("header a, header button, main a[href], main button, main input, main select, main summary, main [tabindex='0']");
  return [...all].filter((one) => one.checkVisibility()).map((one, index) => { one.dataset.number = index; }).length;
}"""
_LEFT = "[...document.querySelectorAll('[data-number]')].map((one) => one.outerHTML)"
# Steps to a control of the same part of the page that is neither below the one before nor right of it, or that is not seen.
_WRONG_STEPS = "steps.filter(({ isWrong }) => isWrong).map(({ target }) => target.outerHTML)"


@pytest.mark.parametrize(
    ("width", "pages"),
    [
        (1280, ["fleet", "vms?name=ci-00", "images", "history", "api", "worker/mac-02", "vm/ci-005"]),
        (390, ["fleet", "vm/ci-005"]),
    ],
)
def test_every_control_has_a_name_and_is_reached_by_keyboard_in_reading_order(
    browser: Browser, fleet: BlockingCluster, width: int, pages: list[str]
) -> None:
    with visiting(browser, fleet.url, width=width) as visit:
        tab = visit.sign_in(fleet.account, fleet.token)
        for page in pages:
            tab.goto(f"{fleet.url}/ui/#/{page}")
            expect(tab.locator("main h1")).not_to_be_empty()
            expect(tab.locator("main")).not_to_contain_text("Loading…")
            if page == "fleet":
                tab.get_by_label("Search workers and VMs").fill("mac-0")
            assert tab.evaluate(_UNNAMED) == [], page
            count = tab.evaluate(_NUMBER)
            assert count
            for step in range(count + 20):
                # What can be scrolled by keys is one more step, if it holds no control.
                if step >= count and tab.evaluate(_LEFT) == []:
                    break
                tab.keyboard.press("Tab")
            # A row that was drawn anew meanwhile has lost its number.
            assert tab.evaluate(_LEFT) == [], page
            assert tab.evaluate(_WRONG_STEPS) == [], page


def test_keys_lead_to_a_vm(tab: Page, fleet: BlockingCluster) -> None:
    expect(tab.locator(".box header a")).to_have_count(WORKERS)
    tab.keyboard.press("?")
    expect(tab.get_by_role("dialog")).to_be_visible()
    tab.keyboard.press("Escape")
    # Until the browser has closed the dialog, keys are the dialog's.
    expect(tab.get_by_role("dialog")).to_be_hidden()
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
    # From another control of a row, the next link is that of the row.
    tab.goto(f"{fleet.url}/ui/#/vms?name=ci-00")
    rows = tab.locator("main tbody tr:not(.spacer)")
    for key, row in (("j", 1), ("k", 0)):
        rows.nth(1).get_by_role("checkbox").focus()
        tab.keyboard.press(key)
        expect(rows.nth(row).locator("[data-nav]")).to_be_focused()


def focus_of(tab: Page) -> str:
    """Return the name of the control that has the focus."""
    return str(tab.evaluate("nameOf(document.activeElement) || document.activeElement.tagName"))


def test_focus_stays_near_when_its_control_goes(tab: Page, fleet: BlockingCluster) -> None:
    expect(tab.locator(".box header a")).to_have_count(WORKERS)
    # Neither VM is known to the controller.
    lines: list[dict[str, Any]] = [{"type": "ADDED", "kind": "vm", "object": {"name": f"z-{n}", "uid": f"z-{n}", "image": "i", "worker": "mac-01", "status": "running", "createdAt": f"2099-01-01T00:00:0{n}Z"}} for n in (1, 2)]  # fmt: skip
    gone = [{**line, "type": "DELETED"} for line in lines]
    tab.evaluate(_APPLY, lines)
    slot = tab.locator(".box", has=tab.get_by_role("link", name="mac-01")).get_by_role("link", name="z-1")
    slot.focus()
    tab.evaluate(_APPLY, gone[:1])
    assert tab.evaluate("document.activeElement.closest('.box').box.name") == "mac-01"
    # A row of the table, and the button in it; a row that moves; the last row.
    tab.evaluate(_APPLY, lines)
    tab.goto(f"{fleet.url}/ui/#/vms?name=z-")
    tab.get_by_label("Select z-2").focus()
    tab.evaluate(_APPLY, [{**lines[1], "type": "MODIFIED", "object": {**lines[1]["object"], "createdAt": "2098-01-01T00:00:00Z"}}])  # fmt: skip
    assert focus_of(tab) == "Select z-2"
    tab.evaluate(_APPLY, gone[1:])
    assert "z-1" in tab.evaluate("document.activeElement.closest('tr').textContent")
    tab.evaluate(_APPLY, gone[:1])
    assert focus_of(tab) != "BODY"
    # A link among facts that are drawn anew.
    tab.goto(f"{fleet.url}/ui/#/vm/ci-005")
    link = tab.get_by_role("region", name="State").get_by_role("link")
    name = link.inner_text()
    link.focus()
    tab.evaluate("frame.page.draw()")
    assert focus_of(tab) == name
    tab.goto(f"{fleet.url}/ui/#/images")
    tab.get_by_role("button", name="Pre-pull", exact=False).last.focus()
    before = focus_of(tab)
    tab.evaluate("frame.page.load()")
    assert focus_of(tab) == before


def test_focus_follows_what_a_person_does(tab: Page, fleet: BlockingCluster) -> None:
    tab.goto(f"{fleet.url}/ui/#/worker/mac-05")
    tab.get_by_role("button", name="Pause").press("Enter")
    expect(tab.get_by_role("button", name="Resume")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Pause")).to_be_focused()
    for draw in ("", "frame.page.drawn = ''; frame.page.draw()"):
        tab.get_by_role("button", name="Delete…").press("Enter")
        expect(tab.get_by_role("dialog").get_by_role("button", name="Cancel")).to_be_focused()
        # What opened the dialog may be drawn anew.
        tab.evaluate(draw)
        tab.keyboard.press("Escape")
        expect(tab.get_by_role("dialog")).to_be_hidden()
        expect(tab.get_by_role("button", name="Delete…")).to_be_focused()
    tab.get_by_role("navigation").get_by_role("link", name="VMs").press("Enter")
    expect(tab.get_by_role("main")).to_be_focused()
    expect(tab.get_by_role("main", name="VMs")).to_be_visible()
    tab.keyboard.press("/")
    tab.keyboard.type("ci-005")
    tab.keyboard.press("Escape")
    expect(tab.get_by_role("main")).to_be_focused()


# ---- screen reader --------------------------------------------------------------------------------------------------

# Counts what a screen reader says by itself.
_COUNT_SAID = """() => {
  window.said = [];
  const spoken = document.querySelectorAll("[aria-live]:not([aria-live=off]), [role=status], [role=alert]");
  for (const one of spoken) new MutationObserver(() => said.push(one.textContent)).observe(one, { childList: true, subtree: true, characterData: true });
}"""


def test_page_has_landmarks_and_says_only_what_is_news(tab: Page, fleet: BlockingCluster) -> None:
    for role in ("banner", "navigation", "main"):
        expect(tab.get_by_role(role)).to_have_count(1)
    assert tab.locator("time").first.get_attribute("title")
    tab.evaluate(_COUNT_SAID)
    for page in ("fleet", "vms", "vm/ci-005"):
        tab.goto(f"{fleet.url}/ui/#/{page}")
        expect(tab.locator("main")).not_to_contain_text("Loading…")
        vm = {"name": "quiet", "uid": page, "image": "i", "status": "failed", "createdAt": "2099-01-01T00:00:00Z"}
        tab.evaluate(_APPLY, [{"type": kind, "kind": "vm", "object": vm} for kind in ("ADDED", "DELETED")])
        tab.evaluate("tickTimes()")
    assert tab.evaluate("said") == []
    tab.evaluate(
        "async () => { stream.notice(false); stream.notice(false); await nextTask(); stream.notice(true); await nextTask(); }"
    )
    assert len(tab.evaluate("said")) == 2


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


# Scrolls down, so that the browser paints what is seen in between.
_SCROLL = """async () => {
  const place = document.querySelector(".scroll.tall") || document.documentElement;
  for (let step = 0; step < 20; step++) {
    place.scrollTop += 3000;
    for (let frames = 0; frames < 4; frames++) await new Promise(requestAnimationFrame);
  }
}"""


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
    tab.evaluate(_SCROLL)
    devtools.send("HeapProfiler.collectGarbage")
    after = figures()
    print(f"{page}: heap {after['JSHeapUsedSize'] / 1e6:.0f} MB, {after['Nodes']:.0f} nodes, "
          f"longest frame {max(times):.0f} ms, one change {times[-1]:.0f} ms")  # fmt: skip
    assert after["JSHeapUsedSize"] < 100e6
    # Of workers that were scrolled away, the browser keeps no rows.
    assert after["Nodes"] < 20_000
    assert max(times) < 250
