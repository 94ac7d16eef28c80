"""The log: one line for each record, as `key=value` pairs (logfmt) or as a JSON object, with times in UTC.

A record is always one line. In logfmt, a value that is not a plain word is quoted as JSON, tracebacks included, so no
name or message can forge a line or a field. The fields of a line come from `extra=` of the logging call.

Lines go to stderr, or to a file that is rotated at 100 MB (log_file.py).

`configure` sets up the logging of a process. What is logged, and at which level, is decided by the other modules.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchard.base.log_file import LogFileHandler

if TYPE_CHECKING:
    import asyncio

# The least time between two lines about connections that cannot be accepted.
_ACCEPT_ERROR_SECONDS = 10.0  # seconds
# Errors of accepting a connection that pass when the process or the system has resources again.
_OUT_OF_RESOURCES = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
_FIRST_EXTRA = len(vars(logging.makeLogRecord({})))
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Printable ASCII without blank, quote, equals sign and backslash.
_PLAIN_WORD = re.compile(r"[!#-<>-\[\]-~]+")

LogFormat = Literal["logfmt", "json"]

_logger = logging.getLogger("orchard.daemon")
_accept_logger = logging.getLogger("orchard.accept")


def _quoted(value: object) -> str:
    """Return a value as it is written in a line: bare if it is one plain word, otherwise quoted as JSON."""
    if type(value) is int:
        return str(value)
    text = str(value)
    return text if _PLAIN_WORD.fullmatch(text) else json.dumps(text)


class _RecordFormatter(logging.Formatter):
    """What the two formats have in common: the time, and the fields of a record."""

    def __init__(self) -> None:
        super().__init__()
        # The second of the last record and its text: the next record often has the same second.
        self._second = (-1, "")

    def time_of(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{int(record.created * 1000) % 1000:03d}Z"

    def fields_of(self, record: logging.LogRecord) -> Iterator[tuple[str, object]]:
        """Yield the fields of `extra=`, which are the last ones in a record, and the traceback."""
        for key, value in itertools.islice(vars(record).items(), _FIRST_EXTRA, None):
            if key not in _STANDARD_FIELDS:
                yield key, value
        if record.exc_info:
            yield "traceback", self.formatException(record.exc_info)


class LineFormatter(_RecordFormatter):
    """Formats `time=... level=... logger=... msg="..." field=value ...`."""

    def format(self, record: logging.LogRecord) -> str:
        line = (
            f"time={self.time_of(record)} level={record.levelname.lower()} logger={record.name}"
            f" msg={_quoted(record.getMessage())}"
        )
        for key, value in self.fields_of(record):
            line += f" {key}={_quoted(value)}"
        return line


class JSONFormatter(_RecordFormatter):
    """Formats `{"time": ..., "level": ..., "logger": ..., "message": ..., field: value, ...}`, in ASCII.

    Numbers and booleans stay what they are; every other value of a field is a text.
    """

    def format(self, record: logging.LogRecord) -> str:
        shown = {
            "time": self.time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _valid_text(record.getMessage()),
        }
        fields = {_valid_text(key): _json_value(value) for key, value in self.fields_of(record)}
        # A field cannot replace one of the first four.
        return json.dumps(shown | fields | shown)


def _json_value(value: object) -> object:
    if isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _valid_text(str(value))


def _valid_text(text: str) -> str:
    """Return a text with lone surrogates as escapes: names of files may have them, and readers of JSON refuse them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def log_asyncio_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that asyncio cannot raise anywhere, such as a lack of file descriptors to accept connections with.

    Set it as the exception handler of an asyncio loop: without a handler, trio-asyncio ends the program on such errors.
    """
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
        _accept_logger.error("asyncio: %s, retrying: %s", context["message"], error.strerror)
    else:
        _logger.error("asyncio: %s", context["message"], exc_info=error)


class AcceptErrorFilter(logging.Filter):
    """Passes one record every _ACCEPT_ERROR_SECONDS, without its traceback.

    While connections cannot be accepted, trio logs ten errors a second, and asyncio a hundred.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._next:
            return False
        self._next = record.created + _ACCEPT_ERROR_SECONDS
        record.exc_info = None
        return True


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged: INFO and above; with `quiet` WARNING and above, with `debug` all of Orchard's records.

    `file` is an absolute path; None: stderr.
    """

    debug: bool = False
    quiet: bool = False
    file: Path | None = None
    format: LogFormat = "logfmt"


def configure(settings: LogSettings) -> None:
    """Set up the logging of this process. Raises OSError if the log file cannot be opened."""
    # The lines do not show a record's thread, process, task and place in the source, and finding these takes as long as
    # everything else. The Logging HOWTO documents these switches.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # From Python 3.12 on.
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr) if settings.file is None else LogFileHandler(settings.file)
    handler.setFormatter(JSONFormatter() if settings.format == "json" else LineFormatter())
    level = logging.WARNING if settings.quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("orchard").setLevel(logging.DEBUG if settings.debug else level)
    for logger in (logging.getLogger("trio.serve_listeners"), _accept_logger):
        logger.addFilter(AcceptErrorFilter())
    # These libraries log every connection at INFO. Orchard's own lines say what matters about it.
    for name in ("trio-websocket", "asyncssh"):
        logging.getLogger(name).setLevel(logging.WARNING)


def reopen_file() -> None:
    """Open the log file anew, if there is one: another program has renamed it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LogFileHandler):
            handler.reopen()
