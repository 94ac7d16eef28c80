"""What people write on a command line: addresses, time spans, lists of pairs. Law: pure, but for the environment.

Each reader is a `type=` for argparse: it raises ArgumentTypeError that repeats the text and says what was expected.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

MAX_RESOURCE = 2**53 - 1  # JSON numbers are exact up to there
_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):([0-9]{1,5})")
_WHOLE = re.compile(r"[0-9]{1,16}")  # as many digits as MAX_RESOURCE has; int() takes its time for thousands


def orchard_home() -> Path:
    """Where Orchard keeps its things: $ORCHARD_HOME, or ~/.orchard."""
    return Path(os.environ.get("ORCHARD_HOME") or Path.home() / ".orchard")


def listen_address(text: str) -> tuple[str | None, int]:
    """Read HOST:PORT, [IPV6]:PORT or :PORT, which is every address (None)."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[3]) > 65535:
        raise argparse.ArgumentTypeError(f'"{text}" is no address, expected HOST:PORT, [IPV6]:PORT or :PORT')
    return match[1] or match[2] or None, int(match[3])


def port(text: str) -> int:
    """Read a TCP port to listen on; 0 is any."""
    if not _WHOLE.fullmatch(text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f'"{text}" is no port, expected a whole number from 0 to 65535')
    return int(text)


def seconds(text: str) -> float:
    """Read a time span in seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of seconds, expected one above 0')
    return value


def count(text: str) -> int:
    """Read a whole number from 1 on."""
    if not _WHOLE.fullmatch(text) or not 0 < int(text) <= MAX_RESOURCE:
        raise argparse.ArgumentTypeError(f'"{text}" is no count, expected a whole number from 1 on')
    return int(text)


def pairs(text: str) -> dict[str, str]:
    """Read KEY=VALUE,KEY=VALUE."""
    found = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise argparse.ArgumentTypeError(f'"{part}" is no pair, expected KEY=VALUE[,KEY=VALUE...]')
        if key.strip() in found:
            raise argparse.ArgumentTypeError(f'"{text}" names "{key.strip()}" twice, expected each key once')
        found[key.strip()] = value.strip()
    return found


def resources(text: str) -> dict[str, int]:
    """Read NAME=AMOUNT,NAME=AMOUNT with whole amounts."""
    found = {}
    for name, amount in pairs(text).items():
        if not _WHOLE.fullmatch(amount) or int(amount) > MAX_RESOURCE:
            raise argparse.ArgumentTypeError(f'"{name}={amount}" is no resource, expected NAME=WHOLE NUMBER')
        found[name] = int(amount)
    return found


# ---- open files

DESCRIPTORS_WANTED = 65_536  # for thousands of workers, watchers and tunnels; the default limit is 256 on macOS
DESCRIPTORS_AT_LEAST = 10_240  # what macOS allows when it says "unlimited"


def raise_descriptor_limit() -> None:
    """Allow this process as many open files as it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (DESCRIPTORS_WANTED, DESCRIPTORS_AT_LEAST):
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < limit:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                return
