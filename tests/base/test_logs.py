"""The log format: one line for each record, whatever the record holds."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from harness.strategies import QUICK
from hypothesis import example, given
from hypothesis import strategies as st

from orchard.base import logs

PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]+)(?: |$)')


def line(message: str, **fields: object) -> str:
    record = logging.makeLogRecord({"name": "orchard.x", "levelname": "INFO", "msg": message, "created": 0.5, **fields})
    return logs.LineFormatter().format(record)


def test_line_has_time_level_logger_message_and_fields() -> None:
    assert line("VM failed", vm="vm-1", reason='it said "no"', ms=0.5) == (
        'time=1970-01-01T00:00:00.500Z level=info logger=orchard.x msg="VM failed"'
        ' vm=vm-1 reason="it said \\"no\\"" ms=0.5'
    )


# With lone surrogates, which names of files that are not UTF-8 have.
anything = st.text(st.characters(), max_size=50)


def wide(text: str) -> bytes:
    """Return the text as UTF-16, in which a pair of lone surrogates equals the character that it encodes."""
    return text.encode("utf-16", "surrogatepass")


@QUICK
@given(anything, anything)
@example("x level=error", 'a" level="error')
@example("a\nb\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", "\x00\x1b[2J\x7f\u202e\udcff")
@example("", "\\")
def test_values_cannot_forge_a_line_or_a_field(message: str, value: str) -> None:
    written = line(message, vm=value)
    assert written.isascii()
    assert written.isprintable()
    pairs = PAIR.findall(written)
    assert " ".join(f"{key}={shown}" for key, shown in pairs) == written
    read = {key: json.loads(shown) if shown.startswith('"') else shown for key, shown in pairs}
    assert list(read) == ["time", "level", "logger", "msg", "vm"]
    assert (wide(read["msg"]), wide(read["vm"])) == (wide(message), wide(value))


@QUICK
@given(anything, anything, st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), anything))
@example("a\nb", "message", "not the message")
@example("\udcff\ud83d\ude00", "\x00 \u2028", float("nan"))
def test_json_of_hostile_names_is_one_valid_line(message: str, field: str, value: object) -> None:
    record = logging.makeLogRecord({"name": "orchard.x", "levelname": "INFO", "msg": message, "created": 0.5})
    vars(record)["a" + field] = value
    written = logs.JSONFormatter().format(record)
    assert written.isascii()
    assert written.isprintable()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = json.loads(written, parse_constant=refuse)
    # As a reader in another language would: no lone surrogates.
    json.dumps(read, ensure_ascii=False).encode()
    assert list(read)[:4] == ["time", "level", "logger", "message"]
    assert len(read) == 5
    if type(value) in (int, bool) or value is None:
        assert list(read.values())[4] is value or list(read.values())[4] == value


def test_a_field_in_json_cannot_replace_the_time_or_the_level() -> None:
    record = logging.makeLogRecord({"name": "orchard.x", "levelname": "INFO", "msg": "m", "created": 0.5, "level": "x"})
    assert json.loads(logs.JSONFormatter().format(record)) == {
        "time": "1970-01-01T00:00:00.500Z",
        "level": "info",
        "logger": "orchard.x",
        "message": "m",
    }


def test_traceback_is_one_field_of_the_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        written = line("failed", exc_info=sys.exc_info())
    assert "\n" not in written
    assert "ValueError: two\\nlines" in written


@pytest.fixture
def loggers() -> Iterator[None]:
    """Restore the logging of the process after a test."""
    root = logging.getLogger()
    changed = [root, *map(logging.getLogger, ("orchard", "trio-websocket", "asyncssh"))]
    handlers, levels = list(root.handlers), [logger.level for logger in changed]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(changed, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("options", "ours", "others"),
    [({}, 20, 20), ({"debug": True}, 10, 20), ({"quiet": True}, 30, 30)],
)
@pytest.mark.usefixtures("loggers")
def test_levels_of_configure(options: dict[str, Any], ours: int, others: int) -> None:
    logs.configure(logs.LogSettings(**options))
    assert logging.getLogger("orchard.x").getEffectiveLevel() == ours
    assert logging.getLogger("other").getEffectiveLevel() == others
    assert logging.getLogger("trio-websocket").getEffectiveLevel() == 30


@pytest.mark.usefixtures("loggers")
def test_records_are_written_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(logs.LogSettings())
    logging.getLogger("orchard.x").info("logged", extra={"vm": "v m"})
    logging.getLogger("orchard.x").debug("not logged")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith('level=info logger=orchard.x msg=logged vm="v m"\n')
