"""The site that the tests of the dashboard look at: a browser, a cluster of forty workers and ninety VMs, and tabs.

The browser ends with the file of tests: its event loop would be in the way of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from harness.browser import Visit, chromium, visiting
from orchard.blocking import open_client
from orchard.schema import Worker
from orchard.testing import BlockingCluster, start_cluster

WORKERS, VMS = 40, 90
IMAGE = "ghcr.io/cirruslabs/macos-tahoe-base:latest"
PULLED = "example.com/pull-900s"
LONG_SCRIPT = {"script_content": "echo step 1; sleep 1000"}
FAILING_SCRIPT = {"script_content": "echo no space left; exit 3"}
READER = ("reader", "r" * 32)
# Creates one of the VMs.
WRITER = ("writer", "w" * 32)
PAGES = ["fleet", "vms", "images", "history", "api", "worker/mac-02", "vm/ci-005"]

# Leads to the page of the fleet, and draws it anew.
_GO_HOME = """async () => {
  if (location.hash === "#/fleet") return frame.route();
  const changed = new Promise((resolve) => addEventListener("hashchange", resolve, { once: true }));
  location.hash = "#/fleet";
  await changed;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def fleet() -> Iterator[BlockingCluster]:
    """Forty workers with ninety VMs, of which some run scripts, some have failed, and some can never be placed."""
    workers = [Worker(name=f"mac-{n:02}", labels={"xcode": "27" if n % 3 else "26"}) for n in range(1, WORKERS + 1)]
    with start_cluster(workers=workers, auth=True) as c:
        c.client.service_accounts.create(name=READER[0], token=READER[1], roles=["compute:read"])
        for number in range(VMS):
            name, more = f"ci-{number:03}", _kind_of_vm(number)
            c.client.vms.create(name=name, image=more.pop("image", IMAGE), metadata={"job": str(number // 3)}, **more)
        c.client.service_accounts.create(name=WRITER[0], token=WRITER[1], roles=["compute:write"])
        with open_client(c.url, account=WRITER[0], token=WRITER[1]) as writer:
            writer.vms.create(name="of-another", image=IMAGE)
        yield c


def _kind_of_vm(number: int) -> dict[str, Any]:
    if number >= VMS - 3:
        return {"labels": {"xcode": "99"}}
    if number % 9 == 0:
        return {"startup_script": FAILING_SCRIPT}
    if number % 5 == 0:
        return {"startup_script": LONG_SCRIPT}
    return {"image": PULLED} if number % 11 == 3 else {}


@pytest.fixture
def visit(browser: Browser, fleet: BlockingCluster) -> Iterator[Visit]:
    with visiting(browser, fleet.url) as found:
        yield found


@pytest.fixture(scope="module")
def shared(browser: Browser, fleet: BlockingCluster) -> Iterator[Visit]:
    """Yield a visit with one tab, in which the administrator is signed in."""
    with visiting(browser, fleet.url) as found:
        found.sign_in(fleet.account, fleet.token)
        yield found


@pytest.fixture
def tab(shared: Visit) -> Iterator[Page]:
    """Yield the tab that many tests use, with the page of the fleet drawn anew. Nothing may be wrong in it."""
    (found,) = shared.context.pages
    found.evaluate(_GO_HOME)
    yield found
    assert shared.problems == []


@pytest.fixture
def everything(tab: Page, fleet: BlockingCluster) -> Page:
    """Return the tab with the page of all VMs."""
    tab.goto(f"{fleet.url}/ui/#/vms")
    expect(tab.locator(".title .count")).to_have_text(str(len(fleet.client.vms.list())))
    return tab
