"""The log: one line a record, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from harness.strategies import QUICK
from hypothesis import example, given
from hypothesis import strategies as st

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


anything = st.text(st.characters(), max_size=50)  # with half surrogates, as in names of files that are not UTF-8


def wide(text: str) -> bytes:
    """Two half surrogates beside each other are the same as the character that they stand for."""
    return text.encode("utf-16", "surrogatepass")


@QUICK
@given(anything, anything)
@example("x level=error", 'a" level="error')
@example("a\nb\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", "\x00\x1b[2J\x7f\u202e\udcff")
@example("", "\\")
def test_nobody_can_forge_a_line_or_a_field(message: str, value: str) -> None:
    written = line(message, vm=value)
    assert written.isascii()
    assert written.isprintable()
    pairs = PAIR.findall(written)
    assert " ".join(f"{key}={shown}" for key, shown in pairs) == written
    read = {key: json.loads(shown) if shown.startswith('"') else shown for key, shown in pairs}
    assert list(read) == ["time", "level", "logger", "msg", "vm"]
    assert (wide(read["msg"]), wide(read["vm"])) == (wide(message), wide(value))


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        written = line("failed", exc_info=sys.exc_info())
    assert "\n" not in written
    assert "ValueError: two\\nlines" in written


@pytest.fixture
def loggers() -> Iterator[None]:
    """Leaves the process's logging as it was."""
    root = logging.getLogger()
    changed = [root, *map(logging.getLogger, ("orchard", "trio-websocket", "asyncssh"))]
    handlers, levels = list(root.handlers), [logger.level for logger in changed]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(changed, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("options", "ours", "others"),
    [({"debug": False}, 20, 20), ({"debug": True}, 10, 20), ({"debug": False, "quiet": True}, 30, 30)],
)
@pytest.mark.usefixtures("loggers")
def test_levels(options: dict[str, bool], ours: int, others: int) -> None:
    logs.configure(**options)
    assert logging.getLogger("orchard.x").getEffectiveLevel() == ours
    assert logging.getLogger("other").getEffectiveLevel() == others
    assert logging.getLogger("trio-websocket").getEffectiveLevel() == 30


@pytest.mark.usefixtures("loggers")
def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(debug=False)
    logging.getLogger("orchard.x").info("said", extra={"vm": "v m"})
    logging.getLogger("orchard.x").debug("not said")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith('level=info logger=orchard.x msg=said vm="v m"\n')


class Writes(io.StringIO):
    """Notes each write."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def write(self, text: str) -> int:
        self.texts.append(text)
        return super().write(text)


def test_what_is_logged_in_one_turn_of_the_loop_is_written_together_and_all_else_at_once() -> None:
    written = Writes()
    stream = logs.TurnStream(written)
    handler = logging.StreamHandler(stream)

    def say(text: str) -> None:
        handler.handle(logging.makeLogRecord({"msg": text}))

    async def main() -> None:
        say("first")
        say("second")
        assert written.texts == ["before\n"]
        await trio.to_thread.run_sync(say, "of a thread")
        assert written.texts[:2] == ["before\n", "first\nsecond\n"]
        await trio.testing.wait_all_tasks_blocked()
        assert written.texts[2:] == ["of a thread\n"]
        say("last")

    say("before")
    trio.run(main, instruments=[stream])
    say("after")
    assert written.texts[3:] == ["last\n", "after\n"]
