"""A real browser: chromium by Playwright, visits to one site, and pages of another one."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from harness.programs import need

CHROMIUM = "/usr/bin/chromium"
OPTIONS = [
    # The sandbox needs rights that containers lack.
    "--no-sandbox",
    # Each window makes pages for what drops down from its address bar, which take 0.8 s of CPU. Chromium takes the last list
    # of such features, so those that Playwright switches off are on.
    "--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup",
]
# The page takes its connection for lost after so many seconds of silence. A machine on which other tests run may be that
# slow, so visits wait longer.
SCRIPT = Path(__file__).parents[2] / "orchard" / "ui" / "app.js"
LOST, LOST_LATER = "LOST = 4.5", "LOST = 600"
# For what should be seen in a fraction of a second. Only a page that hangs makes a test wait so long.
PATIENCE = 300_000  # milliseconds


@contextmanager
def chromium() -> Iterator[Browser]:
    need("chromium")
    expect.set_options(timeout=PATIENCE)
    # Playwright makes a loop of asyncio. Once trio-asyncio is imported, it makes loops on trio unless a policy is set.
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
            yield browser
            browser.close()
    finally:
        asyncio.set_event_loop_policy(None)


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
        tab.goto(f"{self.url}/ui/#/{page}", wait_until="commit")
        return tab

    def sign_in(self, account: str, token: str, page: str = "fleet") -> Page:
        tab = self.open(page)
        submit_sign_in(tab, account, token)
        expect(tab.locator("#connection")).to_have_text("Live")
        return tab


def submit_sign_in(tab: Page, account: str, token: str) -> None:
    tab.get_by_label("Service account").fill(account)
    tab.get_by_label("Token").fill(token)
    tab.get_by_role("button", name="Sign in").click()


@contextmanager
def visiting(
    browser: Browser, url: str, *, width: int = 1280, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Visit]:
    """Yield a visit without a past. At its end nothing may have been wrong."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    visit = Visit(context, url)
    script = SCRIPT.read_text()
    assert LOST in script
    context.route(
        "**/ui/app.js", lambda route: route.fulfill(response=route.fetch(), body=script.replace(LOST, LOST_LATER))
    )
    try:
        yield visit
        assert visit.problems == []
    finally:
        context.close()


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
