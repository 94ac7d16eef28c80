"""Admission of every request, for tests of a server that checks no credentials."""

from __future__ import annotations

from dataclasses import dataclass

from orchard.net.request import Request


@dataclass(frozen=True)
class Sender:
    """An admitted sender; `body_limit` is in bytes."""

    authenticated: bool = True
    body_limit: int = 4 * 1024 * 1024


def admit_anybody(request: Request) -> Sender:
    return Sender()
