"""The files of the dashboard as they are served: addresses, headers, and what the script may not do."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
import trio.testing
from harness.served import Served, served

from orchard.codec import attrs_of
from orchard.handlers.admission import Admitted
from orchard.net.request import HTTPError, Request, Response
from orchard.operations import OPERATIONS, make_api
from orchard.schema import ServiceAccount, VMMeta, VMSpec, VMState

FILES = {
    "": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
ACCOUNTS = (ServiceAccount(name="reader", token="t" * 32, roles=("compute:read",)),)
SOURCES = resources.files("orchard") / "ui"
# Together with the icon.
MOST_BYTES = 120_000


class Page(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content_type: str
    body: bytes


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as running:
        yield running


async def get(api: Served, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Page:
    request = Request(method, path, headers or {})
    admitted = api.api.admit(request)
    assert isinstance(admitted, Admitted)
    answer = await api.api.handle(request, admitted)
    assert isinstance(answer, Response)
    return Page(
        answer.status,
        dict(answer.headers),
        answer.content_type,
        b"".join([answer.body] if isinstance(answer.body, bytes) else answer.body),
    )


async def test_each_file_is_served_with_its_type_and_a_strict_policy(api: Served) -> None:
    for file, content_type in FILES.items():
        page = await get(api, f"/ui/{file}")
        assert (page.status, page.content_type) == (200, content_type)
        policy = dict(part.split(" ", 1) for part in page.headers["Content-Security-Policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        assert policy.pop("require-trusted-types-for") == "'script'"
        assert set(policy.values()) == {"'self'", "'none'"}


async def test_a_copy_that_is_current_is_not_sent_again(api: Served) -> None:
    for file in FILES:
        tag = (await get(api, f"/ui/{file}")).headers["ETag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            page = await get(api, f"/ui/{file}", {"if-none-match": known})
            assert (page.status, page.body, page.headers["ETag"]) == (304, b"", tag)
        assert (await get(api, f"/ui/{file}", {"if-none-match": '"other"'})).status == 200
    for file in ("", "app.js", "style.css"):
        assert (await get(api, f"/ui/{file}")).headers["Cache-Control"] == "no-cache"


async def test_address_without_its_last_slash_leads_to_the_page(api: Served) -> None:
    page = await get(api, "/ui")
    assert (page.status, page.headers["Location"]) == (302, "ui/")


async def test_page_says_whether_it_has_to_ask_for_credentials(tmp_path: Path) -> None:
    for auth in (False, True):
        (tmp_path / str(auth)).mkdir()
        async with served(tmp_path / str(auth), *ACCOUNTS[:auth]) as running:
            page = await get(running, "/ui/")
            found = re.findall(rb'data-credentials="(\w+)"', page.body)
            assert found == [b"needed" if auth else b"none"]


async def test_controller_without_the_dashboard_serves_nothing_of_it(api: Served) -> None:
    assert "ui" in (await api.ok("GET", "/controller/info"))["capabilities"]
    api.api = make_api(api.api.parts, ui=False)
    assert "ui" not in (await api.ok("GET", "/controller/info"))["capabilities"]
    for file in FILES:
        with pytest.raises(HTTPError) as refused:
            api.api.admit(Request("GET", f"/ui/{file}", {}))
        assert refused.value.status == 404


async def test_page_changes_nothing(api: Served) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        with pytest.raises(HTTPError) as refused:
            api.api.admit(Request(method, "/ui/", {}))
        assert refused.value.status == 405


def test_files_are_small_and_load_nothing_from_elsewhere() -> None:
    texts = {
        file.name: file.read_text() for file in SOURCES.iterdir() if not file.name.endswith(".py") and file.is_file()
    }
    assert set(texts) == {"index.html", *(file for file in FILES if file)}
    assert sum(len(text.encode()) for text in texts.values()) < MOST_BYTES
    addresses = re.compile(r"""(?:src|href|url|import)\s*[=(]?\s*["'](?:https?:)?//""")
    for name, text in texts.items():
        assert not addresses.search(text), name


def test_script_never_makes_markup_or_code_of_text() -> None:
    script = (SOURCES / "app.js").read_text()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|\beval\b|Function\("
    assert not re.search(rf"{sinks}|setTimeout\([\"']|javascript:|localStorage|document\.cookie|WebSocket\(", script)


def test_page_has_no_markup_that_the_policy_refuses() -> None:
    page = (SOURCES / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=\"app\.js\" defer></script>)", page)


def test_script_knows_which_fields_of_a_vm_are_no_part_of_its_specification() -> None:
    """The page shows the others as the specification, and creates a VM with them."""
    known = re.search(r"const SET_BY_OTHERS = \[(.*?)\];", (SOURCES / "app.js").read_text(), re.DOTALL)
    assert known is not None
    fields = [field for part in (VMMeta, VMSpec, VMState) for field in attrs_of(part)]
    assert {field.json for field in fields if field.writer != "user"} <= set(re.findall(r'"(\w+)"', known[1]))


async def test_script_names_only_paths_that_the_api_has(api: Served) -> None:
    """A path that the page asks for and the API lacks would be seen on one of its pages only."""
    script = (SOURCES / "app.js").read_text()
    paths = {path.split("?")[0] for path in re.findall(r"""(?:ask|send)\((?:"\w+", )?["`](/[^"`$]*)""", script)}
    assert paths >= {"/controller/info", "/watch", "/history", "/openapi.json"}
    assert paths <= {operation.path for operation in OPERATIONS}


async def test_info_says_what_the_account_may_do(tmp_path: Path) -> None:
    account = ACCOUNTS[0]
    async with served(tmp_path, account) as running:
        answered = await running.call("GET", "/controller/info", account=(account.name, account.token))
        assert (answered.body["account"], answered.body["roles"]) == ("reader", ["compute:read"])


@pytest.mark.parametrize(("silence", "status"), [("1", 200), ("60", 200), ("0", 400), ("61", 400), ("x", 400)])
async def test_watch_takes_a_time_of_silence(api: Served, silence: str, status: int) -> None:
    assert (await api.call("GET", f"/watch?silence={silence}")).status == status


async def test_silent_watch_sends_a_bookmark_after_the_time_that_it_was_asked_for(
    api: Served, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        lines = await api.lines("/watch?silence=2", nursery)
        assert (await lines.receive())["type"] == "BOOKMARK"
        began = trio.current_time()
        assert (await lines.receive())["type"] == "BOOKMARK"
        assert trio.current_time() - began == pytest.approx(2, abs=0.5)
        nursery.cancel_scope.cancel()
