"""The log format: one line on stderr for each record, as `key=value` pairs (logfmt), with times in UTC.

A record is always one line. A value that is not a plain word is quoted as JSON, tracebacks included, so no name or
message can forge a line or a field. The fields of a line come from `extra=` of the logging call.

`configure` sets up the logging of a process. What is logged, and at which level, is decided by the other modules.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

import trio

if TYPE_CHECKING:
    import asyncio

# Between two lines about connections that cannot be accepted.
_ACCEPT_ERROR_SECONDS = 10.0  # seconds
# Errors of accepting a connection that pass when the process or the system has resources again.
_OUT_OF_RESOURCES = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Printable ASCII without blank, quote, equals sign and backslash.
_PLAIN_WORD = re.compile(r"[!#-<>-\[\]-~]+")

_logger = logging.getLogger("orchard.logs")
_accept_logger = logging.getLogger("orchard.logs.accept")


def format_value(value: object) -> str:
    """Return a value as it is written in a line: bare if it is one plain word, otherwise quoted as JSON."""
    if type(value) is int:
        return str(value)
    text = str(value)
    return text if _PLAIN_WORD.fullmatch(text) else json.dumps(text)


class LineFormatter(logging.Formatter):
    """Formats `time=... level=... logger=... msg="..." field=value ...`."""

    def __init__(self) -> None:
        super().__init__()
        # The last second and its text: most records have the second of the record before.
        self._second = (-1, "")

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        pairs = [
            f"time={self._second[1]}.{int(record.created * 1000) % 1000:03d}Z",
            f"level={record.levelname.lower()} logger={record.name} msg={format_value(record.getMessage())}",
        ]
        pairs += [f"{key}={format_value(value)}" for key, value in vars(record).items() if key not in _STANDARD_FIELDS]
        if record.exc_info:
            pairs.append(f"traceback={format_value(self.formatException(record.exc_info))}")
        return " ".join(pairs)


def log_asyncio_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that asyncio cannot raise anywhere, such as a lack of file descriptors to accept connections with.

    Set it as the exception handler of an asyncio loop: without a handler, trio-asyncio ends the program on such errors.
    """
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
        _accept_logger.error("asyncio: %s, retrying: %s", context["message"], error.strerror)
    else:
        _logger.error("asyncio: %s", context["message"], exc_info=error)


class TurnStream(trio.abc.Instrument):
    """A text stream that writes together what is written to it in one turn of a trio loop, when the loop waits.

    Add it to the loop as an instrument; while no loop runs, each flush writes at once. A write lets other threads run
    first, and one write for each small request takes a tenth of the request's time (./run bench api).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # Other threads write as well; the operations of a deque are atomic.
        self._texts: deque[str] = deque()
        self._in_turn = False

    def write(self, text: str) -> None:
        self._texts.append(text)

    def flush(self) -> None:
        if not self._in_turn:
            self._write_out()

    def _write_out(self) -> None:
        if texts := [self._texts.popleft() for _ in range(len(self._texts))]:
            self._stream.write("".join(texts))
            self._stream.flush()

    def before_run(self) -> None:
        self._in_turn = True

    def before_io_wait(self, timeout: float) -> None:
        self._in_turn = False
        self._write_out()

    def after_io_wait(self, timeout: float) -> None:
        self._in_turn = True

    def after_run(self) -> None:
        self.before_io_wait(0)


class AcceptErrorFilter(logging.Filter):
    """Lets one line pass in _ACCEPT_ERROR_SECONDS, without a traceback.

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


def configure(*, debug: bool, quiet: bool = False) -> TurnStream:
    """Log to stderr from INFO on; `debug`: all of Orchard's records; `quiet`: from WARNING on.

    Returns the stream, which a trio loop can have as an instrument, so that it writes less often.
    """
    # The lines do not show a record's thread, process, task and place in the source. Finding these takes as long as
    # everything else. The Logging HOWTO names these switches.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # From Python 3.12 on.
    if hasattr(logging, "logAsyncioTasks"):
        logging.logAsyncioTasks = False
    logging._srcfile = None
    stream = TurnStream(sys.stderr)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("orchard").setLevel(logging.DEBUG if debug else level)
    for logger in (logging.getLogger("trio.serve_listeners"), _accept_logger):
        logger.addFilter(AcceptErrorFilter())
    # These log every connection at INFO. Orchard's own lines have what matters of it.
    for name in ("trio-websocket", "asyncssh"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return stream
