"""The dashboard in a browser, against a cluster of forty workers and ninety VMs, and against one that is killed."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from harness.browser import PATIENCE, Visit, other_site, submit_sign_in, visiting
from harness.dashboard_site import FAILING_SCRIPT, IMAGE, LONG_SCRIPT, PAGES, PULLED, READER, WORKERS, WRITER
from harness.processes import GENEROUS, call_main, free_port, started
from playwright.sync_api import Browser, Page, Route, expect

from orchard.cli.main import main
from orchard.operations import OPERATIONS
from orchard.schema import VM, Worker
from orchard.testing import BlockingCluster, start_cluster

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LISTENING = re.compile(r".*(http://127\.0\.0\.1:[0-9]+)")
# More than a tab needs for its requests, and so many that each tab could not have a watch of its own.
TABS = 8
LINES = 200_000
# Entries of a history: more than the page reads at a time. The entries of one hour have the same end.
HISTORY, PER_HOUR = 2300, 100
# By field of the form over the VMs: a value, and what has it.
FILTERS: dict[str, tuple[str, Callable[[VM], bool]]] = {
    "name": ("CI-00", lambda vm: vm.name.startswith("ci-00")),
    "state": ("failed", lambda vm: vm.state.status == "failed"),
    "owner": (WRITER[0].upper(), lambda vm: vm.meta.created_by == WRITER[0]),
    "image": ("pull-900", lambda vm: vm.spec.image == PULLED),
    "label": ("xcode=99", lambda vm: vm.spec.labels == {"xcode": "99"}),
    "metadata": ("job=1", lambda vm: vm.spec.metadata.get("job", "").startswith("1")),
}
# By age: days of VMs that the page takes for older.
AGES = {
    "any age": [0, 0.04, 0.05, 0.9, 1.1, 6.9, 7.1],
    "over 1 hour": [0.05, 0.9, 1.1, 6.9, 7.1],
    "over 1 day": [1.1, 6.9, 7.1],
    "over 1 week": [7.1],
}
# Sets a field, as a person does.
_SET = """(field, value) => { field.value = value; field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input")); }"""

# Has the page ask for the history again, which it keeps for a while.
_FORGET_HISTORY = "endedVMs = { at: 0, list: null }"


@pytest.fixture(scope="module")
def empty() -> Iterator[str]:
    """Yield the URL of a cluster without workers and VMs, which asks for no credentials."""
    with start_cluster(workers=0) as c:
        yield c.url


def made_history(number: int, now: datetime.datetime) -> dict[str, Any]:
    """Return an entry of a history, PER_HOUR of which ended in the middle of each of the last hours."""
    hour, place = divmod(number, PER_HOUR)
    end = now - datetime.timedelta(hours=HISTORY // PER_HOUR - hour - 0.5)
    started = end - datetime.timedelta(minutes=1)
    assigned = started - datetime.timedelta(seconds=120 * (place + 1))
    created = assigned - datetime.timedelta(seconds=60 * (place + 1))
    times = {"createdAt": created, "assignedAt": assigned, "startedAt": started, "endedAt": end}
    return {
        **{name: time.isoformat() for name, time in times.items()},
        "name": f"old-{number}",
        "uid": f"old-{number}",
        "status": "failed" if place % 10 == 0 else "running",
        "image": f"image-{place % 10}",
        "worker": f"mac-{place % 10}",
        "createdBy": f"owner-{place % 10}",
    }


# ---- signing in -----------------------------------------------------------------------------------------------------


def test_sign_in_wrong_and_right(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.open()
    submit_sign_in(tab, fleet.account, "wrong")
    expect(tab.get_by_role("alert")).not_to_be_empty()
    expect(tab.get_by_role("navigation")).to_be_hidden()
    # A browser notes each refusal in its console.
    assert [problem for problem in visit.problems if "401" not in problem] == []
    visit.problems.clear()
    submit_sign_in(tab, fleet.account, fleet.token)
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


def test_page_follows_the_roles_of_its_account(visit: Visit, fleet: BlockingCluster) -> None:
    accounts, name, token = fleet.client.service_accounts, "changing", "c" * 32
    accounts.create(name=name, token=token, roles=["compute:read", "compute:write"])
    tab = visit.sign_in(name, token, "worker/mac-04")
    accounts.replace(name, roles=["compute:read"], token=token)
    tab.get_by_role("button", name="Pause").click()
    expect(tab.get_by_role("button", name="Pause")).to_have_count(0)
    assert not fleet.client.workers.get("mac-04").scheduling_paused
    # Without the role to look, the page is left, and says why.
    accounts.replace(name, roles=[], token=token)
    expect(tab.get_by_role("alert")).to_contain_text("compute:read")
    expect(tab.get_by_role("navigation")).to_be_hidden()
    accounts.replace(name, roles=["compute:read"], token=token)
    submit_sign_in(tab, name, token)
    expect(tab.locator("#connection")).to_have_text("Live")
    accounts.delete(name)
    expect(tab.get_by_label("Token")).to_be_visible()
    # A browser notes each refusal in its console.
    assert [problem for problem in visit.problems if not re.search("40[13]", problem)] == []
    visit.problems.clear()


def test_account_that_may_change_vms_has_the_buttons_for_it(tab: Page, fleet: BlockingCluster) -> None:
    tab.goto(f"{fleet.url}/ui/#/vm/ci-005")
    for name in ("Stop…", "Restart…", "Token…", "Again with a shell", "Delete…"):
        expect(tab.get_by_role("button", name=name)).to_be_visible()
    tab.goto(f"{fleet.url}/ui/#/worker/mac-03")
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


def test_dialog_is_confirmed_by_enter_and_closed_by_its_button_or_with_its_page(
    tab: Page, fleet: BlockingCluster
) -> None:
    dialog = tab.get_by_role("dialog")
    tab.goto(f"{fleet.url}/ui/#/worker/mac-06")
    tab.get_by_role("button", name="Drain…").click()
    tab.get_by_label("Deadline in minutes").fill("60")
    tab.keyboard.press("Enter")
    expect(tab.locator("main h1 + .word")).to_have_text("draining")
    fleet.client.workers.undrain("mac-06")
    tab.goto(f"{fleet.url}/ui/#/images")
    # The image is required, and is not given.
    tab.get_by_role("button", name="Pre-pull…", exact=True).click()
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_have_count(0)
    tab.get_by_role("button", name="Pre-pull…", exact=True).click()
    tab.go_back()
    expect(dialog).to_have_count(0)
    expect(tab.get_by_role("main")).to_be_focused()


def test_vm_is_started_again_without_its_script_and_deleted(tab: Page, fleet: BlockingCluster) -> None:
    fleet.client.vms.create(name="again", image=IMAGE, labels={"xcode": "99"}, startup_script=LONG_SCRIPT, metadata={"k": "v"})  # fmt: skip
    tab.goto(f"{fleet.url}/ui/#/vm/again")
    tab.get_by_role("button", name="Again with a shell").click()
    expect(tab.locator("main h1")).to_have_text("again-shell")
    copy = fleet.client.vms.get("again-shell")
    assert (copy.spec.image, copy.spec.metadata, copy.spec.startup_script) == (IMAGE, {"k": "v"}, None)
    tab.get_by_role("button", name="Token…").click()
    tab.get_by_role("button", name="Issue").click()
    expect(tab.get_by_label("token", exact=True)).to_contain_text("ey")
    tab.get_by_role("button", name="Close").click()
    tab.goto(f"{fleet.url}/ui/#/vms")
    tab.get_by_label("Name").fill("again")
    tab.get_by_label("Select all that are shown").check()
    tab.get_by_role("button", name="Delete…").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator("main tbody a")).to_have_count(0)
    assert not [vm.name for vm in fleet.client.vms.list() if vm.name.startswith("again")]


def test_buttons_of_a_vm(tab: Page, fleet: BlockingCluster) -> None:
    vms = fleet.client.vms
    vms.create(name="pressed", image=IMAGE, suspendable=True)
    vms.wait("pressed")
    uid = vms.get("pressed").uid
    tab.goto(f"{fleet.url}/ui/#/vm/pressed")

    def press(name: str) -> None:
        tab.get_by_role("main").get_by_role("button", name=f"{name}…").click()
        tab.get_by_role("dialog").get_by_role("button", name=name).click()

    state = tab.locator("main h1 + .word")
    press("Restart")
    # The API has counted the restart when the page tells of it.
    expect(tab.get_by_role("region", name="State")).to_contain_text("restarts1")
    assert vms.get("pressed").state.restart_count == 1
    expect(state).to_have_text(re.compile("running|ready"))
    press("Suspend")
    expect(state).to_have_text(re.compile("suspended"))
    assert vms.get("pressed").spec.power_state == "suspended"
    vms.create(name="halted", image=IMAGE)
    vms.wait("halted")
    tab.goto(f"{fleet.url}/ui/#/vm/halted")
    press("Stop")
    expect(state).to_have_text("stopped")
    assert vms.get("halted").spec.power_state == "stopped"
    press("Delete")
    expect(state).to_have_text("deleted")
    vms.delete("pressed")
    assert uid not in {vm.uid for vm in vms.list()}


def test_worker_is_deleted(tab: Page, fleet: BlockingCluster) -> None:
    fleet.client.workers.register({"name": "spare", "machine_id": "m"})
    tab.goto(f"{fleet.url}/ui/#/worker/spare")
    tab.get_by_role("button", name="Delete…").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator("main")).to_contain_text("There is no such worker.")
    assert "spare" not in {worker.name for worker in fleet.client.workers.list()}


def test_images_are_listed_and_pulled_in_advance(tab: Page, fleet: BlockingCluster) -> None:
    expect(tab.locator(".box header a")).to_have_count(WORKERS)
    # As tart's workers report it; those of this cluster do not.
    vm = {"name": "pulled", "uid": "p", "image": PULLED, "worker": "mac-01", "status": "pending", "status_message": "pulling image: 42 %"}  # fmt: skip
    tab.evaluate("(object) => { fleet.apply({ type: 'ADDED', kind: 'vm', object }); frame.schedule(); }", vm)
    expect(tab.locator(".box", has_text="mac-01").locator(".slot", has_text="pulled")).to_contain_text("pull 42 %")
    images = [{"name": "example.com/own", "digest": "sha256:" + "0" * 64, "sizeBytes": 42 * 10**9}]
    worker = {"name": "lister", "machine_id": "m", "capabilities": ["image-inventory"]}
    fleet.client.request("POST", "/workers", json=worker)
    seen = datetime.datetime.now(datetime.UTC).isoformat()
    fleet.client.request("PUT", "/workers/lister", json={**worker, "last_seen": seen, "images": images})
    tab.goto(f"{fleet.url}/ui/#/images")
    expect(tab.get_by_role("region", name="Being pulled").locator("li", has_text="pulled")).to_contain_text("pull 42 %")
    expect(tab.get_by_role("row", name="example.com/own")).to_contain_text(f"1 of {WORKERS + 1}42 GB")
    fleet.client.workers.delete("lister")
    tab.evaluate("fleet.apply({ type: 'DELETED', kind: 'vm', object: { name: 'pulled' } })")
    tab.get_by_role("button", name="Pre-pull…", exact=True).click()
    tab.get_by_label("Image", exact=True).fill("example.com/other")
    # Without their names, every worker would pull the image.
    tab.get_by_label("Labels of the workers").fill("xcode=99, 1")
    tab.get_by_role("dialog").get_by_role("button", name="Pre-pull").click()
    expect(tab.get_by_label("Labels of the workers")).to_be_focused()
    tab.get_by_label("Labels of the workers").fill(" xcode=99, rack=a=b ")
    tab.get_by_role("dialog").get_by_role("button", name="Pre-pull").click()
    settings = tab.get_by_role("region", name="Pre-pull")
    expect(settings).to_contain_text("example.com/other")
    (wanted,) = fleet.client.cluster_settings.get().prepull
    assert (wanted.image, wanted.labels) == ("example.com/other", {"xcode": "99", "rack": "a=b"})
    # Another administrator adds one after the page has read them.
    own, added = {"image": "example.com/other", "labels": wanted.labels}, {"image": "example.com/added", "labels": {}}
    fleet.client.request("PUT", "/cluster-settings", json={"prepull": [own, added]})
    settings.get_by_role("button", name="Remove example.com/other").click()
    expect(settings).to_contain_text("example.com/added")
    expect(settings).not_to_contain_text("example.com/other")
    assert [one.image for one in fleet.client.cluster_settings.get().prepull] == ["example.com/added"]
    fleet.client.request("PUT", "/cluster-settings", json={"prepull": []})


_ADD_VMS = """(uids) => {
  for (const uid of uids) fleet.apply({ type: "ADDED", kind: "vm", object: { name: "z", uid, image: "i", status: "running", createdAt: "2099-01-01T00:00:00Z" } });
  frame.draw();
}"""


def test_vm_that_replaces_a_selected_one_is_not_selected(tab: Page, fleet: BlockingCluster) -> None:
    tab.evaluate(_ADD_VMS, ["first"])
    tab.goto(f"{fleet.url}/ui/#/vms?name=z")
    one, every = tab.get_by_label("Select z"), tab.get_by_label("Select all that are shown")
    one.check()
    expect(every).to_be_checked()
    tab.evaluate(_ADD_VMS, ["second"])
    for box in (one, every):
        expect(box).not_to_be_checked()
    expect(tab.get_by_role("button", name="Delete…")).to_have_count(0)
    tab.evaluate("fleet.apply({ type: 'DELETED', kind: 'vm', object: { name: 'z' } })")


def test_refused_deletion_leaves_the_rest_selected(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token, "vms?name=ci-00")
    visit.context.route("**/v1/vms/*", lambda route: route.fulfill(status=507, json={"message": "the disk is full"}))
    tab.get_by_label("Select all that are shown").check()
    tab.get_by_role("button", name="Delete…").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator("#notices")).to_contain_text("the disk is full")
    expect(tab.locator("main tbody input:checked")).to_have_count(10)
    # No other VM has been tried than those that were under way. A browser notes each refusal in its console.
    assert 1 <= len(visit.problems) <= 2
    visit.problems.clear()


def test_sign_out_ends_what_is_under_way(visit: Visit, fleet: BlockingCluster) -> None:
    tab, held = visit.sign_in(fleet.account, fleet.token, "history"), list[Route]()
    expect(tab.locator(".plot").first).to_be_visible()
    tab.evaluate(_FORGET_HISTORY)
    for path in ("vms/*", "history?*"):
        visit.context.route(f"**/v1/{path}", lambda route: held.append(route))
    with tab.expect_request("**/v1/history?*"):
        tab.goto(f"{fleet.url}/ui/#/worker/mac-01")
    tab.goto(f"{fleet.url}/ui/#/vms?name=ci-00")
    tab.get_by_label("Select all that are shown").check()
    tab.get_by_role("button", name="Delete…").click()
    with tab.expect_request("**/v1/vms/*"):
        tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    tab.get_by_role("button", name="Sign out").click()
    for route in held:
        route.fulfill(status=200, json=[])
    submit_sign_in(tab, fleet.account, fleet.token)
    expect(tab.locator("#connection")).to_have_text("Live")
    # Nothing was deleted in the name of the next session, and nothing of the one before was kept.
    assert sum("/v1/vms/" in url for url in visit.requests) <= 2
    assert tab.evaluate("endedVMs.list") is None


# ---- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("vm/none", "There is no such VM."),
        ("worker/none", "There is no such worker."),
        ("vms", "There is no VM."),
        # Not decodable, and the name of what each object has.
        ("vm/100%", "There is no such VM."),
        ("constructor", "No worker has registered yet."),
    ],
)
def test_page_that_is_opened_first_says_what_is_not_there(
    browser: Browser, empty: str, address: str, text: str
) -> None:
    with visiting(browser, empty) as visit:
        expect(visit.open(address).locator("main")).to_contain_text(text)


# ---- tables and plots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FILTERS)
def test_vms_are_filtered(everything: Page, fleet: BlockingCluster, field: str) -> None:
    value, matches = FILTERS[field]
    wanted = {vm.name for vm in fleet.client.vms.list() if matches(vm)}
    everything.locator(f"form [name={field}]").evaluate(_SET, value)
    assert wanted
    assert set(everything.evaluate("frame.page.shown.map((vm) => vm.name)")) == wanted


def test_vms_are_filtered_by_age(everything: Page) -> None:
    now, matches = datetime.datetime.now(datetime.UTC), "(times) => times.map((createdAt) => ({ createdAt })).filter(vmFilter(new FormData(frame.page.filters))).length"  # fmt: skip
    times = [(now - datetime.timedelta(days=days)).isoformat() for days in AGES["any age"]]
    for age, older in AGES.items():
        everything.get_by_role("combobox", name="Age").select_option(label=age)
        assert everything.evaluate(matches, times) == len(older)


def test_vms_are_sorted_by_each_column(everything: Page) -> None:
    values = """(head) => frame.page.shown.map((vm) => ({ State: vmState(vm), Name: vm.name, Owner: vm.createdBy,
      Worker: vm.worker || "", Image: vm.image, Age: Date.now() - Date.parse(vm.createdAt) })[head])"""
    for head in ("State", "Name", "Owner", "Worker", "Image", "Age"):
        for order in ("ascending", "descending"):
            everything.get_by_role("button", name=head, exact=True).click()
            column = everything.get_by_role("columnheader", name=head, exact=True)
            expect(column).to_have_attribute("aria-sort", order)
            found = everything.evaluate(values, head)
            assert found == sorted(found, reverse=order == "descending"), head
            first = everything.locator("main tbody tr:not(.spacer) a[data-nav]").first
            expect(first).to_have_text(everything.evaluate("frame.page.shown[0].name"))


def test_plots_show_the_history(shared: Visit, tab: Page, fleet: BlockingCluster) -> None:
    """Of more VMs than are read at a time, of which many ended at the same time."""
    now = datetime.datetime.now(datetime.UTC)
    ended = [made_history(number, now) for number in range(HISTORY)]

    def answer(route: Route) -> None:
        query = parse_qs(urlsplit(route.request.url).query)
        since, limit = datetime.datetime.fromisoformat(query["since"][0]), int(query["limit"][0])
        route.fulfill(json=[vm for vm in ended if datetime.datetime.fromisoformat(vm["endedAt"]) >= since][:limit])

    shared.context.route("**/v1/history?*", answer)
    tab.evaluate(_FORGET_HISTORY)
    tab.goto(f"{fleet.url}/ui/#/history")
    titles = "elements => elements.map((one) => one.textContent)"
    hours = range(len(ended) // PER_HOUR)
    panel = tab.get_by_role("region", name="VMs an hour")
    expect(panel.locator(".bars")).to_have_count(len(hours))
    assert panel.locator(".bars title").evaluate_all(titles) == [str(PER_HOUR)] * len(hours)
    assert panel.locator(".bad title").evaluate_all(titles) == [str(PER_HOUR // 10)] * len(hours)
    for name, seconds in (("Time in the queue", 60), ("Time to boot", 120)):
        panel = tab.get_by_role("region", name=name)
        # Of each hour, the times are 1 to 100 times so many seconds.
        for share, line in ((0.5, "a"), (0.9, "b")):
            minutes = (int(share * PER_HOUR) + 1) * seconds // 60
            text = f"{minutes} m" if minutes < 60 else f"{minutes // 60} h {minutes % 60} m"
            assert panel.locator(f"circle.{line} title").evaluate_all(titles) == [text] * len(hours)
    for name, value in (("image", "image-0"), ("worker", "mac-0"), ("owner", "owner-0")):
        cells = tab.get_by_role("region", name=f"Failures by {name}").locator("tbody td")
        assert cells.all_inner_texts()[:3] == [value, str(HISTORY // 10), "100 %"]
    # The last fifty of a worker are those of five hours. Of all hours, place N took 120 * (N + 1) seconds to boot.
    tab.goto(f"{fleet.url}/ui/#/worker/mac-1")
    rows = tab.get_by_role("table", name="Compared with the fleet").locator("tbody tr")
    expect(rows).to_have_text(["failed0 %10 %", "time to boot1 h 34 m1 h 41 m", "time it ran1 m1 m"])
    names = tab.get_by_role("region", name="Last fifty VMs").locator("li .clip").all_inner_texts()
    assert names == [one["name"] for one in reversed(ended) if one["worker"] == "mac-1"][:50]
    shared.context.unroute("**/v1/history?*")


def test_history_shows_the_numbers_of_the_api(tab: Page, fleet: BlockingCluster) -> None:
    vms, names = fleet.client.vms, {"past-0", "past-1", "past-2"}
    for name in names:
        more: dict[str, Any] = {"startup_script": FAILING_SCRIPT} if name == "past-0" else {}
        vms.create(name=name, image="example.com/past", **more)
        vms.wait(name, until="failed" if name == "past-0" else "ready")
        vms.delete(name)
    # The history has them within a second.
    has_all = "async (names) => { const found = (await ask('/history')).map((vm) => vm.name); return names.every((name) => found.includes(name)); }"
    tab.wait_for_function(has_all, arg=sorted(names), timeout=PATIENCE)
    ended = fleet.client.history()
    tab.evaluate(_FORGET_HISTORY)
    tab.goto(f"{fleet.url}/ui/#/history")
    bars = tab.get_by_role("region", name="VMs an hour").locator(".bars title")
    expect(bars).not_to_have_count(0)
    assert sum(map(int, bars.all_text_contents())) == len(ended)
    for name, key in (("image", "image"), ("worker", "worker"), ("owner", "created_by")):
        failed = Counter(getattr(one, key) for one in ended if one.status == "failed")
        every = Counter(getattr(one, key) for one in ended)
        rows = tab.get_by_role("region", name=f"Failures by {name}").locator("tbody tr").all_inner_texts()
        wanted = {f"{value}\t{count}\t{100 * count / every[value]:.0f} %" for value, count in failed.items()}
        assert {row.rstrip() for row in rows} == wanted


# Lines of the API page that are refused: no action waits for the answer of a worker, and no worker has the VM.
REFUSED = {"POST /rpc/resolve-ip": "404", "PUT /vms/{name}/state": "404"}
# Operations on VMs that a worker has.
RUNNING = ("/ip", "/restart")


@pytest.mark.needs("curl")
def test_each_line_of_the_api_page_does_what_it_says(browser: Browser) -> None:
    """Users replace what is in capitals. Each line gets objects of its own."""
    with start_cluster([Worker(labels={"runs": "True"})], auth=True) as c, visiting(browser, c.url) as visit:
        tab = visit.sign_in(c.account, c.token, "api")
        expect(tab.locator("details.op").first).to_be_visible()
        lines = tab.locator("details.op .copy code").evaluate_all("all => all.map((one) => [one.getAttribute('aria-label'), one.textContent])")  # fmt: skip
        assert {operation for operation, _ in lines} == {
            f"{one.method} {one.path}" for one in OPERATIONS if not one.websocket
        }
        names = {operation: f"line-{number}" for number, (operation, _) in enumerate(lines)}
        for operation, name in names.items():
            c.client.vms.create(name=name, image=IMAGE, labels={"runs": str(operation.endswith(RUNNING))})
            c.client.workers.register({"name": name, "machine_id": name})
            c.client.service_accounts.create(name=name, token="t" * 32, roles=[])
        for operation, name in names.items():
            if operation.endswith(RUNNING):
                c.client.vms.wait(name)
        found = {}
        for operation, line in lines:
            name = names[operation]
            whole = re.sub("(?<=/)NAME|WORKERNAME", name, line).replace("=FILTER", f"=name={name}")
            assert not re.search("[A-Z]{4}", whole.partition("'http")[2].partition("'")[0]), whole
            if " -N " in whole:
                # It goes on until it is interrupted.
                with subprocess.Popen(["sh", "-c", f"exec {whole} --silent"], env={**os.environ, "TOKEN": c.token}, stdout=subprocess.PIPE) as follower:  # fmt: skip
                    assert follower.stdout is not None
                    found[operation] = "200" if json.loads(follower.stdout.readline())["type"] == "ADDED" else ""
                    follower.kill()
                continue
            words = f"{whole} --silent --show-error --output /dev/null --write-out '%{{http_code}}'"
            done = subprocess.run(["sh", "-c", words], env={**os.environ, "TOKEN": c.token}, capture_output=True, text=True, timeout=GENEROUS)  # fmt: skip
            found[operation] = done.stdout + done.stderr
        assert found == {operation: REFUSED.get(operation, "200") for operation, _ in lines}
        # What the lines have changed, as examples of all.
        vms = {vm.name for vm in c.client.vms.list()}
        assert "build-1" in vms
        assert not vms & {names["DELETE /vms"], names["DELETE /vms/{name}"]}
        assert c.client.cluster_settings.get().min_free_disk_gb == 50


# ---- what is live ---------------------------------------------------------------------------------------------------

# Notes when a text is first on the page, by the clock that the test has, too.
_NOTE_WHEN_SEEN = """(text) => new MutationObserver((_, observer) => {
  if (!document.body.textContent.includes(text)) return;
  document.documentElement.dataset.seen = Date.now();
  observer.disconnect();
}).observe(document.body, { childList: true, subtree: true, characterData: true })"""


def test_vm_that_is_created_appears_by_the_one_stream(shared: Visit, tab: Page, fleet: BlockingCluster) -> None:
    expect(tab.locator(".box header a")).to_have_count(WORKERS)
    tab.evaluate(_NOTE_WHEN_SEEN, "just-created")
    # What the page asks for when it is opened has been answered once this is.
    tab.evaluate("frame.page.load()")
    assert sum("/v1/watch?kinds=vms,workers" in url for url in shared.requests) == 1
    before = len(shared.requests)
    fleet.client.vms.create(name="just-created", image=IMAGE, labels={"xcode": "99"})
    answered = time.time()
    try:
        expect(tab.locator("html")).to_have_attribute("data-seen", re.compile("."))
        assert shared.requests[before:] == []
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


def test_ages_are_right_where_the_clock_of_the_browser_is_wrong(visit: Visit, fleet: BlockingCluster) -> None:
    """Else all would be late, and nothing would have failed within the last hour."""
    visit.context.clock.install(time=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=3))
    tab = visit.sign_in(fleet.account, fleet.token)
    failures = tab.get_by_role("region", name="Failures of the last hour")
    expect(failures.get_by_text("exit code 3").first).to_be_visible()
    age = tab.evaluate("serverTime() - Date.parse(fleet.vms.get('ci-005').createdAt)")
    assert 0 <= age + 2000 < 3_600_000
    expect(tab.get_by_role("region", name="Needs attention")).not_to_contain_text("waiting for long")


def test_lost_connection_is_said_within_5_s_and_comes_back_also_after_a_kill(browser: Browser, tmp_path: Path) -> None:
    """`orchard dev` needs no sign-in. The seconds are those of the page's clock, which the test advances."""
    words = ("--synthetic", "--port", str(free_port()), "--directory", str(tmp_path / "dev"))
    context = browser.new_context()
    with started("", "dev", *words, home=tmp_path) as role:
        context.clock.install()
        tab = Visit(context, role.wait_for(LISTENING)[1]).open()
        connection, body = tab.locator("#connection"), tab.locator("body")
        expect(connection).to_have_text("Live")
        # A controller that is frozen, like a network that drops everything, ends no connection.
        role.process.send_signal(signal.SIGSTOP)
        tab.clock.run_for(5000)
        assert "lost" in (connection.get_attribute("class") or "").split()
        assert "stale" in (body.get_attribute("class") or "").split()
        role.process.send_signal(signal.SIGCONT)
        expect(connection).to_have_text("Live")
        create = ("create", "vm", "kept", "--image", "example.com/pull-900s")
        assert call_main(main, *create, home=tmp_path)[0] == 0
        expect(tab.locator("main")).to_contain_text("kept")
        role.process.kill()
        role.process.wait(GENEROUS)
        expect(connection).to_have_class(re.compile("lost"))
        expect(body).to_have_class(re.compile("stale"))
    with started("", "dev", *words, home=tmp_path) as role:
        role.wait_for(LISTENING)
        expect(connection).to_have_text("Live")
        expect(body).not_to_have_class(re.compile("stale"))
        assert call_main(main, "delete", "vm", "kept", home=tmp_path)[0] == 0
        expect(tab.locator("main")).not_to_contain_text("kept")
        context.close()
        role.stop()


def test_connection_that_does_not_come_about_is_said(visit: Visit, fleet: BlockingCluster) -> None:
    visit.context.route("**/v1/watch?*", lambda route: route.abort())
    tab = visit.open()
    submit_sign_in(tab, fleet.account, fleet.token)
    expect(tab.locator("#connection")).to_have_class(re.compile("lost"))
    visit.context.unroute("**/v1/watch?*")
    expect(tab.locator("#connection")).to_have_text("Live")
    # A browser notes each request without an answer in its console.
    visit.problems.clear()


_LOSE_AND_REGAIN = "() => { stream.notice(false); stream.notice(true); }"


@pytest.mark.parametrize(
    ("page", "path", "content"),
    [
        ("history", "history?*", ".plot"),
        ("api", "openapi.json", "details.op"),
        ("images", "watch?kinds=workers&*", "table[aria-label=Images]"),
        ("worker/mac-01", "history?*", "table[aria-label='Compared with the fleet']"),
        ("worker/mac-01", "workers/*", "table[aria-label=Images]"),
    ],
)
def test_page_says_why_it_is_empty_and_reads_again_after_a_lost_connection(
    visit: Visit, fleet: BlockingCluster, page: str, path: str, content: str
) -> None:
    visit.context.route(f"**/v1/{path}", lambda route: route.fulfill(status=503, json={"message": "not now"}))
    tab = visit.sign_in(fleet.account, fleet.token, page)
    expect(tab.locator("main")).to_contain_text("not now")
    visit.context.unroute(f"**/v1/{path}")
    tab.evaluate(_LOSE_AND_REGAIN)
    expect(tab.locator("main").locator(content).first).to_be_visible()
    expect(tab.locator("main")).not_to_contain_text("not now")
    visit.problems.clear()


def test_log_goes_on_after_a_lost_connection(visit: Visit, fleet: BlockingCluster) -> None:
    """A network that drops everything ends no connection."""
    held: list[Route] = []
    visit.context.route("**/v1/vms/ci-005/events?*", lambda route: route.continue_() if held else held.append(route))
    tab = visit.sign_in(fleet.account, fleet.token)
    with tab.expect_request("**/v1/vms/ci-005/events?*"):
        tab.goto(f"{fleet.url}/ui/#/vm/ci-005")
    tab.evaluate(_LOSE_AND_REGAIN)
    expect(tab.get_by_role("log")).to_contain_text("step 1")


def test_tab_without_locks_follows_the_cluster_while_it_is_seen(visit: Visit, fleet: BlockingCluster) -> None:
    """As on a page from plain HTTP. A browser has few connections, which hidden tabs would take."""
    visit.context.add_init_script("Object.defineProperty(Navigator.prototype, 'locks', { value: undefined })")
    tab = visit.sign_in(fleet.account, fleet.token)
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { configurable: true, value: hidden }); document.dispatchEvent(new Event('visibilitychange')); }"  # fmt: skip
    with tab.expect_event("requestfailed", lambda request: "/v1/watch?" in request.url):
        tab.evaluate(hide, True)
    fleet.client.vms.create(name="unseen", image=IMAGE, labels={"xcode": "99"})
    try:
        tab.evaluate(hide, False)
        expect(tab.get_by_role("region", name="Queue")).to_contain_text("unseen")
        expect(tab.locator("#connection")).to_have_text("Live")
    finally:
        fleet.client.vms.delete("unseen")
    assert sum("/v1/watch" in url for url in visit.requests) == 2


def test_images_are_read_once_at_a_time(visit: Visit, fleet: BlockingCluster) -> None:
    """Those of a thousand workers are tens of megabytes, which may take longer than the time until they are read again."""
    visit.context.clock.install()
    held: list[Route] = []
    visit.context.route("**/v1/watch?kinds=workers&*", lambda route: held.append(route))
    with visit.context.expect_event("request", lambda request: "kinds=workers&" in request.url):
        tab = visit.sign_in(fleet.account, fleet.token, "images")
    tab.clock.run_for(65_000)
    assert len(held) == 1


# ---- what VMs print -------------------------------------------------------------------------------------------------

MARKUP = """<img src=x onerror="document.title='pwned'"><script>document.title='pwned'</script><h1>pwned</h1>"""


def test_what_a_script_prints_is_text(tab: Page, fleet: BlockingCluster) -> None:
    lines = f"cat <<'EOF'\n{MARKUP}\n\x1b[31mred\x1b[0m \x1b]0;title\x07plain\nEOF\nexit 1"
    fleet.client.vms.create(
        name="printer", image=IMAGE, startup_script={"script_content": lines}, metadata={"m": MARKUP}
    )
    fleet.client.vms.wait("printer", until="failed")
    try:
        tab.goto(f"{fleet.url}/ui/#/vm/printer")
        log = tab.get_by_role("log")
        expect(log).to_contain_text(MARKUP)
        expect(log).to_contain_text("red plain")
        expect(log.locator(".f1")).to_have_text("red")
        expect(tab.locator("main")).to_contain_text("m=<img")
        expect(tab.locator("main img, main script")).to_have_count(0)
        expect(tab.locator("main h1")).to_have_text("printer")
        tab.goto(f"{fleet.url}/ui/#/vms?name=printer")
        expect(tab.locator("main table")).to_contain_text("<img")
        assert tab.title() == "VMs · Orchard"
    finally:
        fleet.client.vms.delete("printer")


def test_log_of_200_000_lines(tab: Page, fleet: BlockingCluster) -> None:
    fleet.client.vms.create(name="talker", image=IMAGE, labels={"xcode": "99"})
    try:
        for start in range(0, LINES, 10_000):
            numbers = range(start, start + 10_000)
            events = [{"kind": "log_line", "payload": f"line {number}", "timestamp": 1} for number in numbers]
            fleet.client.vms.append_events("talker", events)
        tab.goto(f"{fleet.url}/ui/#/vm/talker")
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


def test_log_of_a_vm_that_is_created_after_its_page_was_opened(tab: Page, fleet: BlockingCluster) -> None:
    tab.goto(f"{fleet.url}/ui/#/vm/late")
    expect(tab.locator("main")).to_contain_text("There is no such VM.")
    fleet.client.vms.create(name="late", image=IMAGE, startup_script=LONG_SCRIPT)
    try:
        expect(tab.get_by_role("log")).to_contain_text("step 1")
    finally:
        fleet.client.vms.delete("late")


def test_log_begins_anew_where_the_controller_does_not_know_its_place(visit: Visit, fleet: BlockingCluster) -> None:
    tab = visit.sign_in(fleet.account, fleet.token, "vm/ci-010")
    line = tab.get_by_role("log").locator(".rows div", has_text="step 1")
    expect(line).to_have_count(1)
    tab.evaluate("() => { window.before = frame.page.log; before.cursor = '00000000-9'; before.restart(); }")
    tab.wait_for_function("() => frame.page.log !== before && frame.page.log.lines.length", timeout=PATIENCE)
    expect(line).to_have_count(1)
    # A browser notes the refusal in its console.
    visit.problems.clear()


def test_log_of_long_lines_keeps_the_latest(tab: Page, fleet: BlockingCluster) -> None:
    tab.goto(f"{fleet.url}/ui/#/vm/ci-005")
    add = "(payload) => frame.page.log.add(Array.from({ length: 5000 }, () => ({ kind: 'log_line', payload, timestamp: 1 })))"
    tab.evaluate(add, "x" * 16384)
    kept, counted = tab.evaluate(
        "[frame.page.log.lines.reduce((sum, line) => sum + line.payload.length, 0), frame.page.log.characters]"
    )
    assert 0.9 * 60e6 < kept == counted <= 60e6


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain", "plain"),
        ("10 %\r50 %\r100 %\r", "100 %"),
        ("\r\r", ""),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x1b[2Kend", "red end"),
        # A line that a hostile VM prints may not take the browser's time.
        ("\r" * 2**20 + "x", "x"),
    ],
)
def test_line_is_shown_as_by_a_terminal(tab: Page, line: str, shown: str) -> None:
    both = "(line) => [plainText(line), terminalParts(line).map(([text]) => text).join('')]"
    assert tab.evaluate(both, line) == [shown, shown]


# ---- pages of other origins -----------------------------------------------------------------------------------------


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
