"""What the `orchard` command prints: tables, pairs, JSON, relative times; and what a terminal can show."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import datetime

_SPANS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
_HOME_AND_CLEAR = "\x1b[H\x1b[J"
# Such as "pulling image: 42 %".
_PERCENTAGE = re.compile(r"(.*?):? ([0-9]{1,3}) ?%")
_BAR_WIDTH = 40
# Of a column or message that may be cut: a narrower one says nothing.
_LEAST_WIDTH = 12
# Between columns, and before a further line of a row.
_GAP, _INDENT = "  ", "    "


def is_fancy(stream: TextIO) -> bool:
    """Return whether escape sequences may be written to a stream: only to a terminal, unless the user refuses them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_size() -> os.terminal_size:
    """Return the columns and lines of the terminal, or those that the environment names."""
    # Its import of three compressions would delay verbs that print one line.
    import shutil

    return shutil.get_terminal_size()


def printable(text: str) -> str:
    """Return a text on one line without control characters, which could move the cursor or change its colours."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def print_line(text: str) -> None:
    """Print a line of a VM's output: as it is into a pipe or a file, without control characters on a terminal."""
    print(printable(text.expandtabs()) if sys.stdout.isatty() else text, flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, cut: str = "") -> None:
    """Print rows in aligned columns, which fit a terminal. Only the column `cut` is ever shortened for that."""
    for line in format_table(header, rows, cut=cut):
        print(line)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, cut: str = "") -> Iterator[str]:
    """Yield the lines that `print_table` prints: on a terminal that is too narrow, several lines for each row."""
    table = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(_width(row[column]) for row in table) for column in range(len(header))]
    lines = [list(range(len(header)))]
    if sys.stdout.isatty():
        lines = _fit_columns(widths, list(header).index(cut) if cut else None, terminal_size().columns)
    for row in table:
        for number, columns in enumerate(lines):
            cells = _GAP.join(_padded(row[column], widths[column]) for column in columns).rstrip()
            if cells or not number:
                yield _INDENT * bool(number) + cells


def _fit_columns(widths: list[int], cut: int | None, room: int) -> list[list[int]]:
    """Return the columns of each line of a row, so that the lines fit into `room` cells.

    The width of the column `cut` becomes what its line leaves to it. Another column that alone is wider than `room`
    stays so.
    """
    wanted = 0 if cut is None else widths[cut]
    if cut is not None:
        widths[cut] = min(wanted, _LEAST_WIDTH)
    lines: list[list[int]] = [[]]
    left = room
    for column, width in enumerate(widths):
        if lines[-1] and width > left:
            lines.append([])
            left = room - len(_INDENT)
        lines[-1].append(column)
        left -= width + len(_GAP)
    if cut is not None:
        line = next(line for line in lines if cut in line)
        taken = sum(widths[column] + len(_GAP) for column in line) - len(_GAP) + len(_INDENT) * (line is not lines[0])
        widths[cut] = min(wanted, widths[cut] + max(0, room - taken))
    return lines


def with_message(text: str, message: str) -> str:
    """Return a text and the message behind it, which is cut so that both fit a terminal; the text never is."""
    line = printable(f"{text}{message}")
    if not sys.stdout.isatty():
        return line
    return _padded(line, min(_width(line), max(_width(printable(text)) + _LEAST_WIDTH, terminal_size().columns)))


def format_progress(text: str, columns: int) -> str:
    """Return a text for the last line of a terminal, cut to its width; with a bar if it ends with a percentage."""
    match = _PERCENTAGE.fullmatch(text)
    width = min(_BAR_WIDTH, columns - _width(text) - 4)
    if match is None or width < _LEAST_WIDTH:
        return _padded(text, min(_width(text), columns - 1))
    done = width * min(100, int(match[2])) // 100
    return f"{match[1]} [{'#' * done}{'.' * (width - done)}] {match[2]} %"


def repaint(lines: Iterable[str]) -> None:
    """Show lines in place of all that a terminal shows, as far as they fit, and how many more there are."""
    size = terminal_size()
    shown = [part for line in lines for part in _folded(line, size.columns)]
    # The last line of the terminal is left to what follows: it would scroll the others.
    room = size.lines - 1
    if len(shown) > room:
        shown[room - 1 :] = [f"and {len(shown) - room + 1} more lines"]
    print(_HOME_AND_CLEAR + "\n".join(shown), end="", flush=True)


def _folded(line: str, columns: int) -> Iterator[str]:
    """Yield the parts of a line that a terminal shows one below the other."""
    part, used = "", 0
    for char in line:
        width = _width(char)
        if used + width > columns:
            yield part
            part, used = "", 0
        part += char
        used += width
    yield part


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print a name and a value on each line, aligned."""
    shown = list(pairs)
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:{width}}  {printable(value)}".rstrip())


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_items(items: Sequence[Mapping[str, Any]], output: str) -> None:
    """Print objects as `-o json` or `-o name` has them."""
    if output == "json":
        print_json(items)
    else:
        print(*(item["name"] for item in items), sep="\n", end="\n" if items else "")


def print_compact_json(value: object) -> None:
    """Print JSON on one line, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def format_clock(seconds: float) -> str:
    """Return a Unix time as the local time of the day, for example 14:03:59."""
    import datetime

    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%H:%M:%S")


def format_age(text: str | None, now: datetime.datetime | None = None) -> str:
    """Return an RFC 3339 time as "3 seconds ago"; "never" for none."""
    import datetime

    if not text:
        return "never"
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    seconds = ((now or datetime.datetime.now(datetime.UTC)) - when).total_seconds()
    span = format_span(abs(seconds))
    if span == "0 seconds":
        return "now"
    return f"{span} ago" if seconds > 0 else f"in {span}"


def format_span(seconds: float) -> str:
    """Return a time span in its largest unit: "3 hours"."""
    name, size = next((unit for unit in _SPANS if seconds >= unit[1]), _SPANS[-1])
    number = int(seconds // size)
    return f"{number} {name}{'' if number == 1 else 's'}"


def format_json_value(value: object) -> str:
    """Return a value of JSON as one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return ""
    if isinstance(value, dict):
        # As existing programs parse it.
        return ", ".join(f"{key}: {format_json_value(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list):
        return ("; " if any(isinstance(item, dict) for item in value) else ", ").join(map(format_json_value, value))
    return str(value)


def _width(text: str) -> int:
    """Return the cells that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def _padded(text: str, width: int) -> str:
    if _width(text) > width:
        while _width(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - _width(text))
