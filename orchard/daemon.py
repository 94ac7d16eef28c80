"""How a process of Orchard starts and stops, and how its command line is read.

`run_main` is the common part of every `main`: log configuration, limit of open files, one line on stderr and an exit
status for an error that was expected. `run_until_signal` handles SIGTERM, SIGINT and SIGHUP. `CommandLine` is an
argparse.ArgumentParser, and the `parse_*` functions are `type=` functions for it: they raise ArgumentTypeError with the
text and what was expected; argparse then exits with status 2.

What a role does between its start and its stop is in its own module.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from orchard import logs
from orchard.nursery import unwrap_groups

# JSON numbers are exact up to here.
_MAX_AMOUNT = 2**53 - 1
_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):([0-9]{1,5})")
# As many digits as _MAX_AMOUNT has: int() takes long for texts of thousands of digits.
_WHOLE_NUMBER = re.compile(r"[0-9]{1,16}")
# Enough for thousands of workers, watchers and tunnels. The default limit is 256 on macOS.
_OPEN_FILES_WANTED = 65_536
# macOS refuses more than this where it reports the hard limit as "unlimited".
_OPEN_FILES_FALLBACK = 10_240
# Between two times that free memory is returned to the system, at a cost of a millisecond when there is little.
_RETURN_SECONDS = 10.0

_logger = logging.getLogger("orchard.daemon")


def orchard_home() -> Path:
    """Return the directory for everything that Orchard stores: $ORCHARD_HOME, or ~/.orchard."""
    return Path(os.environ.get("ORCHARD_HOME") or Path.home() / ".orchard")


# ---- start and stop ------------------------------------------------------------------------------------------------


def run_main(
    name: str,
    work: Callable[[], Awaitable[None]],
    failures: Mapping[type[Exception], int],
    *,
    debug: bool = False,
    quiet: bool = False,
) -> int:
    """Run `work` under trio until it returns, and return the exit status of the process.

    `failures` maps the errors that `work` may raise to exit statuses: such an error is printed to stderr as one line
    that begins with `name`. Any other exception propagates. For `debug` and `quiet` see `logs.configure`.
    """
    logs.configure(debug=debug, quiet=quiet)
    raise_open_files_limit()
    try:
        with unwrap_groups():
            trio.run(work, strict_exception_groups=True)
    except tuple(failures) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return next(status for kind, status in failures.items() if isinstance(error, kind))
    return 0


async def run_until_signal(work: Callable[[], Awaitable[None]], *, stop: trio.Event | None = None) -> None:
    """Run `work` until it returns, or until SIGTERM, SIGINT or SIGHUP (the terminal was closed, without nohup).

    Without `stop`, the first signal cancels `work`. With `stop`, the first signal sets it, so that `work` can end by
    itself, and a second signal cancels `work`.
    """
    stopping = {signal.SIGTERM, signal.SIGINT}
    # nohup ignores it.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stopping.add(signal.SIGHUP)
    with trio.open_signal_receiver(*stopping) as signals:
        async with trio.open_nursery() as nursery:

            async def handle_signals() -> None:
                async for number in signals:
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
    """Return free memory to the system periodically, until cancelled. Only glibc keeps it otherwise.

    glibc returns by itself what is free at the end of its heap. After a burst of connections or of large bodies
    something small always remains behind tens of megabytes that are free (`./run bench strangers`).
    """
    # For a module that takes milliseconds to import.
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


# ---- the command line ----------------------------------------------------------------------------------------------


class CommandLine(argparse.ArgumentParser):
    """An argument parser that refuses an unknown option with the name of the nearest known one.

    It never shows more of an unknown argument than the name of the option: the rest may be a secret.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            name, _, _ = word.partition("=")
            if name.startswith("-"):
                self.error(f"unknown option {name}{suggest(name, self._option_string_actions)}")
        return options, unknown


def suggest(word: str, known: Iterable[str]) -> str:
    """Return a question for the nearest known word, to be put behind a message. Empty if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def parse_address(text: str) -> tuple[str | None, int]:
    """Parse HOST:PORT, [IPV6]:PORT or :PORT. The host is None for :PORT, which means all addresses."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f'address is "{text}", expected HOST:PORT, [IPV6]:PORT or :PORT')
    return match[1] or match[2] or None, int(match[3])


def parse_port(text: str) -> int:
    """Parse a TCP port to listen on. 0 means any free port."""
    if not _WHOLE_NUMBER.fullmatch(text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f'port is "{text}", expected a whole number from 0 to 65535')
    return int(text)


def parse_seconds(text: str) -> float:
    """Parse a time span in seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'time span is "{text}", expected a number of seconds above 0')
    return value


def parse_count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not _WHOLE_NUMBER.fullmatch(text) or not 0 < int(text) <= _MAX_AMOUNT:
        raise argparse.ArgumentTypeError(f'number is "{text}", expected a whole number of at least 1')
    return int(text)


def parse_pairs(text: str) -> dict[str, str]:
    """Parse KEY=VALUE,KEY=VALUE, each key at most once. Blanks around keys and values are dropped."""
    found = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise argparse.ArgumentTypeError(f'pair is "{part}", expected KEY=VALUE[,KEY=VALUE...]')
        if key.strip() in found:
            raise argparse.ArgumentTypeError(f'"{text}" names "{key.strip()}" twice, expected each key once')
        found[key.strip()] = value.strip()
    return found


def parse_resources(text: str) -> dict[str, int]:
    """Parse NAME=AMOUNT,NAME=AMOUNT with whole amounts."""
    found = {}
    for name, amount in parse_pairs(text).items():
        if not _WHOLE_NUMBER.fullmatch(amount) or int(amount) > _MAX_AMOUNT:
            raise argparse.ArgumentTypeError(f'resource is "{name}={amount}", expected NAME=WHOLE NUMBER')
        found[name] = int(amount)
    return found
