"""What people write on a command line: addresses, time spans, lists of pairs. Law: pure, but for the environment.

Each reader is a `type=` for argparse: it raises ArgumentTypeError that repeats the text and says what was expected.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from orchard.schema import NAME

MAX_RESOURCE = 2**53 - 1


def orchard_home() -> Path:
    """Where Orchard keeps its things: $ORCHARD_HOME, or ~/.orchard."""
    return Path(os.environ.get("ORCHARD_HOME") or Path.home() / ".orchard")


def listen_address(text: str) -> tuple[str | None, int]:
    """Read HOST:PORT, [IPV6]:PORT or :PORT, which is every address (None)."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit() and int(port) <= 65535) or (":" in host and host[0] != "["):
        raise argparse.ArgumentTypeError(f'"{text}" is no address, expected HOST:PORT, [IPV6]:PORT or :PORT')
    return host.strip("[]") or None, int(port)


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
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MAX_RESOURCE):
        raise argparse.ArgumentTypeError(f'"{text}" is no count, expected a whole number from 1 on')
    return int(text)


def api_prefix(text: str) -> str:
    """Read what is put before /v1, without a slash at its end; "/" is nothing."""
    prefix = text.rstrip("/")
    if prefix and (prefix[0] != "/" or not all(map(NAME.fullmatch, prefix[1:].split("/")))):
        raise argparse.ArgumentTypeError(f'"{text}" is no path, expected one such as /orchard')
    return prefix


def pairs(text: str) -> dict[str, str]:
    """Read KEY=VALUE,KEY=VALUE."""
    found = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise argparse.ArgumentTypeError(f'"{part}" is no pair, expected KEY=VALUE[,KEY=VALUE...]')
        found[key.strip()] = value.strip()
    return found


def resources(text: str) -> dict[str, int]:
    """Read NAME=AMOUNT,NAME=AMOUNT with whole amounts."""
    found = {}
    for name, amount in pairs(text).items():
        if not (amount.isascii() and amount.isdigit() and int(amount) <= MAX_RESOURCE):
            raise argparse.ArgumentTypeError(f'"{name}={amount}" is no resource, expected NAME=WHOLE NUMBER')
        found[name] = int(amount)
    return found
