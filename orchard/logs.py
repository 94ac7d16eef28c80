"""The log: one line on stderr for each record, as `key=value` pairs. Law: formats and writes; decides nothing.

Whatever a record holds stays on its line: a value with anything but plain characters in it is quoted as JSON, a
traceback included, so that nobody can forge a line by a clever name. Fields come from `extra=` of the logging call.
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

COMPLAINT_SECONDS = 10.0  # between two lines about connections that cannot be accepted
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but blank, quote, equals sign and backslash

NO_ROOM = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])  # to accept a connection

_logger = logging.getLogger("orchard.logs")
no_room = logging.getLogger("orchard.logs.no_room")


def plain(value: object) -> str:
    """Give a value as it stands in a line: bare if it is one plain word, else quoted."""
    if type(value) is int:
        return str(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class LineFormatter(logging.Formatter):
    """Formats `time=... level=... logger=... msg="..." field=value ...`, times in UTC."""

    def __init__(self) -> None:
        super().__init__()
        self._second = (-1, "")  # of most records the time is that of the one before, up to here

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        words = [
            f"time={self._second[1]}.{int(record.created * 1000) % 1000:03d}Z",
            f"level={record.levelname.lower()} logger={record.name} msg={plain(record.getMessage())}",
        ]
        words += [f"{key}={plain(value)}" for key, value in vars(record).items() if key not in _STANDARD]
        if record.exc_info:
            words.append(f"traceback={plain(self.formatException(record.exc_info))}")
        return " ".join(words)


def log_asyncio_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what asyncio can tell to nobody else, such as that there are no descriptors left to accept with.

    An exception handler for a loop (asyncio's set_exception_handler): without one, any such thing would end the program.
    """
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        no_room.error("asyncio: %s, retrying: %s", context["message"], error.strerror)
    else:
        _logger.error("asyncio: %s", context["message"], exc_info=error)


class TurnStream(trio.abc.Instrument):
    """A text stream that writes what comes in one turn of a trio loop together, when the loop waits; else at once.

    To be an instrument of the loop. Each write lets other threads go first, and so takes a tenth of a small request where
    there is one for each (./run bench api).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._texts: deque[str] = deque()  # of other threads, too
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


class NoDescriptors(logging.Filter):
    """Of complaints that no connection can be accepted, lets one line pass, and no traceback.

    trio has ten of them a second, asyncio a hundred.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._next:
            return False
        self._next = record.created + COMPLAINT_SECONDS
        record.exc_info = None
        return True


def configure(*, debug: bool, quiet: bool = False) -> TurnStream:
    """Send what the process logs to stderr: from INFO on; with `debug` all of Orchard's own; `quiet`: warnings only.

    Gives what a loop may have as an instrument, that it writes less often.
    """
    # Nobody asked for a record's thread, process, task or place in the source; to find them out takes as long as the rest.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    if hasattr(logging, "logAsyncioTasks"):  # Python 3.12 on
        logging.logAsyncioTasks = False
    logging._srcfile = None  # what the Logging HOWTO names for that
    stream = TurnStream(sys.stderr)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("orchard").setLevel(logging.DEBUG if debug else level)
    for logger in (logging.getLogger("trio.serve_listeners"), no_room):
        logger.addFilter(NoDescriptors())
    # They say goodbye to each connection at INFO; what matters of it is in our own lines.
    for name in ("trio-websocket", "asyncssh"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return stream
