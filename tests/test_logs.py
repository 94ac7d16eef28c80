"""The log: one line a record, whatever is in it."""

from __future__ import annotations

import logging
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import QUICK

from orchard import logs

PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |$)')


def line(message: str, **fields: object) -> str:
    record = logging.makeLogRecord({"name": "orchard.x", "levelname": "INFO", "msg": message, "created": 0.5, **fields})
    return logs.LineFormatter().format(record)


def test_a_line_is_pairs() -> None:
    assert line("a VM failed", vm="vm-1", reason='it said "no"', ms=0.5) == (
        'time=1970-01-01T00:00:00.500Z level=info logger=orchard.x msg="a VM failed"'
        ' vm=vm-1 reason="it said \\"no\\"" ms=0.5'
    )


@QUICK
@given(st.text(), st.text())
def test_nobody_can_forge_a_line_or_a_field(message: str, value: str) -> None:
    written = line(message.replace("%", ""), vm=value)
    assert written.isascii()
    assert written.isprintable()
    pairs = PAIR.findall(written)
    assert [key for key, _ in pairs] == ["time", "level", "logger", "msg", "vm"]
    assert "".join(f"{key}={shown} " for key, shown in pairs).rstrip() == written


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        written = line("failed", exc_info=sys.exc_info())
    assert "\n" not in written
    assert "ValueError: two\\nlines" in written


@pytest.mark.parametrize(
    ("options", "ours", "others"),
    [({"debug": False}, 20, 20), ({"debug": True}, 10, 20), ({"debug": False, "quiet": True}, 30, 30)],
)
def test_levels(options: dict[str, bool], ours: int, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        logs.configure(**options)
        assert logging.getLogger("orchard.x").getEffectiveLevel() == ours
        assert logging.getLogger("other").getEffectiveLevel() == others
    finally:
        root.handlers[:], root.level = before, level
        logging.getLogger("orchard").setLevel(logging.NOTSET)
