"""Ports beside the API, over plain HTTP and without credentials: metrics, and health checks.

The port of metrics is open while the controller leads. The port of health checks is open for as long as the process
runs, so that a load balancer can tell a standby from a leader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from orchard.api import API
from orchard.handlers.admin import health_answer
from orchard.handlers.metrics import metrics_answer
from orchard.net.browsers import BrowserRules
from orchard.net.connection import Limits, Service
from orchard.net.request import AnyResponse, HTTPError, Request, Response
from orchard.net.server import serve
from orchard.resources.cluster import ControllerHealth
from orchard.resources.json_text import dump_resource
from orchard.store import Store

# Few scrapers and load balancers connect.
_LIMITS = Limits(connections=64, unauthenticated=64, unauthenticated_of_source=64)

_METRICS_PATH = "/metrics"

Listeners = Sequence[trio.SocketListener]


async def serve_metrics(listeners: Listeners, api: API, allowed_origins: Sequence[str], nursery: trio.Nursery) -> int:
    """Serve metrics in a nursery. Return the port."""

    browsers = BrowserRules(allowed_origins)

    async def answer(request: Request, admitted: object) -> AnyResponse:
        return await metrics_answer(api)

    def admit(request: Request) -> _Anonymous:
        browsers.check(request)
        return _admit_scrape(request)

    # The server ends with the background tasks, because its requests change nothing.
    await nursery.start(partial(serve, Service(answer, admit), listeners, limits=_LIMITS))
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def serve_health(
    listeners: Listeners, find_store: Callable[[], Store | None], find_leader: Callable[[], str], nursery: trio.Nursery
) -> None:
    """Answer health checks in a nursery: 200 while this controller leads, else 503 with the URL of the leader.

    `find_store` returns the store that is served from, None while the controller stands by. `find_leader` returns the
    URL of the other controller that was last seen to lead, or "".
    """

    async def answer(request: Request, admitted: object) -> AnyResponse:
        await trio.lowlevel.checkpoint()
        store = find_store()
        if store is not None and store.leads():
            return health_answer(store)
        return Response(503, dump_resource(ControllerHealth("standby", leader=find_leader())))

    await nursery.start(partial(serve, Service(answer, _admit), listeners, limits=_LIMITS))


@dataclass(frozen=True, slots=True)
class _Anonymous:
    """A scraper or a load balancer, as an Admission of net/request.py."""

    authenticated: bool = False
    body_limit: int = 0


def _admit_scrape(request: Request) -> _Anonymous:
    """Admit a request for metrics. Raises HTTPError."""
    if request.path != _METRICS_PATH:
        raise HTTPError(404, f"unknown path {request.path!r}, expected {_METRICS_PATH}")
    return _admit(request)


def _admit(request: Request) -> _Anonymous:
    """Admit a request to a port that changes nothing. Raises HTTPError."""
    if request.method not in ("GET", "HEAD"):
        raise HTTPError(405, f"the method is {request.method}, expected GET", (("Allow", "GET, HEAD"),))
    return _Anonymous()
