"""The table of routes: finds what a request's method and path are for. No I/O.

A route is a method, a pattern and whatever the application wants to find. Patterns are kept as a tree of segments, so
the time of a search depends on the path and not on the number of routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchard.codec import shown
from orchard.net.request import HTTPError, percent_decoded


@dataclass(frozen=True, slots=True)
class Route:
    """`pattern` is a path with its first slash. A segment in braces matches any one segment that is not empty."""

    method: str
    pattern: str
    endpoint: Any


class _Node:
    __slots__ = ("below", "param", "routes")

    def __init__(self) -> None:
        self.below: dict[str, _Node] = {}
        self.param: _Node | None = None
        # By method: the route, and the index and name of each segment in braces.
        self.routes: dict[str, tuple[Route, tuple[tuple[int, str], ...]]] = {}


class Router:
    """Routes by method and path."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Raises ValueError if two routes have one method, and patterns that differ in names in braces only."""
        self._root = _Node()
        for route in routes:
            node = self._root
            names: list[tuple[int, str]] = []
            for index, segment in enumerate(route.pattern.split("/")[1:]):
                if segment.startswith("{"):
                    names.append((index, segment[1:-1]))
                    node.param = node = node.param or _Node()
                else:
                    node = node.below.setdefault(segment, _Node())
            if route.method in node.routes:
                raise ValueError(f"{route.method} {route.pattern} hides {node.routes[route.method][0].pattern}")
            node.routes[route.method] = (route, tuple(names))

    def match(self, method: str, path: str) -> tuple[Route, dict[str, str]]:
        """Return the route of a percent-encoded path, and the decoded values of its segments in braces by their names.

        Literal segments go before those in braces. HEAD is served by GET. Raises HTTPError: 400 for a path that cannot
        be decoded, 404 for an unknown one, 405 with Allow for a known one with another method.
        """
        segments = [percent_decoded(segment, "the path segment") for segment in path.split("/")[1:]]
        nodes = [self._root]
        for segment in segments:
            below = [node.below[segment] for node in nodes if segment in node.below]
            if segment:
                below += [node.param for node in nodes if node.param is not None]
            nodes = below
        allowed: set[str] = set()
        for node in nodes:
            found = node.routes.get(method) or (node.routes.get("GET") if method == "HEAD" else None)
            if found is not None:
                route, names = found
                return route, {name: segments[index] for index, name in names}
            allowed.update(node.routes)
        if not allowed:
            raise HTTPError(404, f"unknown path {shown(path)}")
        if "GET" in allowed:
            allowed.add("HEAD")
        allow = ", ".join(sorted(allowed))
        raise HTTPError(405, f"the method is {shown(method)}, expected {allow} for {shown(path)}", (("Allow", allow),))
