"""`orchard ui`: the address of the dashboard."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from urllib.request import urlopen

import pytest
from harness.processes import call_main

from orchard.cli.main import main


def test_address_is_printed_and_opened_and_leads_to_the_page(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    status, printed, _ = call_main(main, "ui", "--no-open", home=dev)
    assert (status, opened) == (0, [])
    assert call_main(main, "ui", home=dev)[:2] == (0, printed)
    assert opened == [printed.strip()]
    with urlopen(opened[0]) as answer:
        assert answer.headers["Content-Type"].startswith("text/html")
