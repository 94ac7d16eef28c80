"""How a process of Orchard starts and stops.

`run_main` is the common part of every `main`: log configuration, limit of open files, one line on stderr and an exit
status for an error that was expected. `run_until_signal` handles SIGTERM, SIGINT and SIGHUP, and SIGUSR1, on which the
log file is opened anew. command_line.py reads the options; those of the log are here.

What a role does between its start and its stop is in its own module.
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import get_args

import trio

from orchard.base import logs
from orchard.base.command_line import CommandLine, discard_output
from orchard.base.nursery import unwrap_groups

# Enough for thousands of workers, watchers and tunnels. The default limit is 256 on macOS.
_OPEN_FILES_WANTED = 65_536
# macOS refuses more than this where it reports the hard limit as "unlimited".
_OPEN_FILES_FALLBACK = 10_240
# Interval of returning free memory to the system, which takes a millisecond when there is little.
_RETURN_SECONDS = 10.0

# Python's gc.set_threshold: allocations before a collection, then collections of each generation before the next one's.
_GC_THRESHOLDS = (10_000, 20, 25)

_logger = logging.getLogger("orchard.daemon")


# ---- start and stop ------------------------------------------------------------------------------------------------


def run_main(
    name: str,
    work: Callable[[], Awaitable[None]],
    failures: Mapping[type[Exception], int],
    log: logs.LogSettings,
) -> int:
    """Run `work` under trio until it returns, and return the exit status of the process.

    `failures` maps the errors that `work` may raise to exit statuses: such an error is printed to stderr as one line
    that begins with `name`. Any other exception propagates. A log file gets both, too.
    """
    try:
        logs.configure(log)
    except OSError as error:
        reason = f"cannot open the log file {log.file}: {error.strerror}; choose one that this user may write to with --log-file"
        print(f"{name}: {reason}", file=sys.stderr)
        return 1
    # By default SIGUSR1 would end a process that does not handle it yet.
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    if log.file is not None:
        sys.excepthook = _log_uncaught
    raise_open_files_limit()
    try:
        with unwrap_groups():
            trio.run(work, strict_exception_groups=True)
    except tuple(failures) as error:
        if log.file is not None:
            _logger.error("ended: %s", error)
        print(f"{name}: {error}", file=sys.stderr)
        return next(status for kind, status in failures.items() if isinstance(error, kind))
    finally:
        _flush_output()
    return 0


def _flush_output() -> None:
    """Write what is buffered, and drop what cannot be written: Python would end the process with status 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        # A stream is None if it was closed when Python started.
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                discard_output(stream)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _logger.error("ended by an unexpected error", exc_info=(kind, error, trace))
    sys.__excepthook__(kind, error, trace)


def add_log_options(parser: CommandLine) -> None:
    """Declare the options that say what a role logs, and where."""
    add = parser.add_argument
    add("--log-file", metavar="FILE", type=Path,
        help="file of the log, rotated at 100 MB to FILE.1, opened anew on SIGUSR1; default: standard error")  # fmt: skip
    add("--log-format", choices=get_args(logs.LogFormat), default="logfmt",
        help="key=value pairs or one JSON object a line; default: %(default)s")  # fmt: skip
    add("--debug", action="store_true", help="log more")


def log_settings(options: argparse.Namespace) -> logs.LogSettings:
    """Return the log settings in the options that `add_log_options` declared."""
    file = None if options.log_file is None else options.log_file.absolute()
    return logs.LogSettings(options.debug, file=file, format=options.log_format)


@contextmanager
def printing() -> Iterator[None]:
    """Log a warning when the block cannot print: the terminal or the reader of a pipe is gone, or the disk is full.

    Everything printed to standard output afterwards is dropped.
    """
    try:
        yield
    except OSError as error:
        _logger.warning("cannot print to standard output: %s", error.strerror)
        discard_output(sys.stdout)


async def run_until_signal(work: Callable[[], Awaitable[None]], *, stop: trio.Event | None = None) -> None:
    """Run `work` until it returns, or until SIGTERM, SIGINT or SIGHUP (the terminal was closed, without nohup).

    Without `stop`, the first signal cancels `work`. With `stop`, the first signal sets it, so that `work` can end by
    itself, and a second signal cancels `work`.
    """
    stopping = {signal.SIGTERM, signal.SIGINT}
    # Under nohup the process ignores SIGHUP.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stopping.add(signal.SIGHUP)
    with trio.open_signal_receiver(*stopping, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as nursery:

            async def handle_signals() -> None:
                async for number in signals:
                    if number == signal.SIGUSR1:
                        logs.reopen_file()
                        continue
                    _logger.info("stopping", extra={"signal": signal.Signals(number).name})
                    if stop is None or stop.is_set():
                        nursery.cancel_scope.cancel()
                    else:
                        stop.set()

            nursery.start_soon(handle_signals)
            nursery.start_soon(return_memory)
            await work()
            nursery.cancel_scope.cancel()


async def return_memory() -> None:
    """Return free memory to the system periodically, until cancelled. Only glibc needs this.

    glibc itself returns only memory that is free at the end of its heap. After a burst of connections or large bodies
    a small allocation there keeps tens of free megabytes (`./run bench strangers`).
    """
    # Imported here, because it takes milliseconds.
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await trio.sleep(_RETURN_SECONDS)
        # A thread, since returning hundreds of megabytes takes tens of milliseconds.
        await trio.to_thread.run_sync(trim, 0)


def raise_open_files_limit() -> None:
    """Raise this process's limit of open files as far as the system allows, up to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (_OPEN_FILES_WANTED, _OPEN_FILES_FALLBACK):
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < limit:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return


def collect_garbage_less() -> None:
    """Run Python's collector of reference cycles less often.

    A collection stops the process, and nearly all objects of a controller live long. With ten thousand VMs a full
    collection takes 50 milliseconds, so collections leave out what exists now. While a thousand watchers are sent a
    change, collections would take a fifth of the time (./run bench watch). Only the controller's own process does
    this; an embedding one decides itself.
    """
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
