"""Serves the dashboard: the files of orchard/ui/, and a redirect to them.

They are public and hold nothing of the cluster. The page's script sends the credentials with each of its requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from importlib import resources

from orchard.api import API
from orchard.handlers.admission import Admitted, APIOperation
from orchard.net.openapi import Operation
from orchard.net.request import AnyResponse, Request, Response

# Allow only what the page needs. So no script in a VM's name or output could run, even if the page took it for markup.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{what}-src 'self'" for what in ("script", "style", "img", "connect")),
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = (
    ("Content-Security-Policy", _POLICY),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_ICON = "icon.svg"
# A browser asks each time whether its copy is current, so the page is always that of its controller. It looks at the icon
# with every page that it shows.
_CURRENT, _KEPT = ("Cache-Control", "no-cache"), ("Cache-Control", "max-age=86400")
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    _ICON: "image/svg+xml",
}


# The page's attribute when the API asks for credentials, and its value when it asks for none. Otherwise the page would
# have to try a request without credentials, whose refusal would be an error in the browser's console.
_CREDENTIALS = (b'data-credentials="needed"', b'data-credentials="none"')


@cache
def _read(file: str, is_open: bool) -> tuple[bytes, str]:
    """Return a file and its ETag. `is_open`: the API asks for no credentials."""
    content = resources.files("orchard").joinpath("ui", file).read_bytes()
    if is_open:
        content = content.replace(*_CREDENTIALS)
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _send_file(file: str, api: API, request: Request, admitted: Admitted) -> AnyResponse:
    content, tag = _read(file, api.parts.gate is None)
    headers = (*_HEADERS, _KEPT if file == _ICON else _CURRENT, ("ETag", tag))
    # A proxy that compresses makes the ETag a weak one.
    known = [one.strip().removeprefix("W/") for one in (request.headers.get("if-none-match") or "").split(",")]
    if tag in known:
        return Response(304, headers=headers)
    return Response(200, (content,), headers, _TYPES[file])


def _send_page(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    # The addresses of script and style sheet are relative to the page's.
    if not request.path.endswith("/"):
        return Response(302, headers=(("Location", "ui/"),))
    return _send_file("index.html", api, request, admitted)


def _page(path: str, handler: Callable[[API, Request, Admitted], AnyResponse]) -> APIOperation:
    return Operation("GET", path, handler, "public", "")


# Their paths follow the API's prefix, without /v1.
PAGES: tuple[APIOperation, ...] = (
    _page("/ui/", _send_page),
    *(_page(f"/ui/{file}", partial(_send_file, file)) for file in _TYPES if file != "index.html"),
)
