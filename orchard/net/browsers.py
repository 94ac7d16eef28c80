"""Which requests of browsers are answered. No I/O.

A browser sends requests on behalf of any page that its user visits. A page of another origin cannot read the answers,
but a POST with a body of text/plain, a form or a WebSocket needs no permission, and after DNS rebinding the page's own
name leads to this server, so that it can read answers, too. `BrowserRules.check` refuses such requests before anything
else looks at them, with and without credentials. There is no CORS.

Browsers alone set the headers that the check reads, and a page cannot change them. Other clients send neither Origin
nor Sec-Fetch-Site, so they pass. (A WebSocket library may send the origin of its target, which passes, too.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from orchard.codec import shown
from orchard.net.request import HTTPError, Request

_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_ORIGIN = re.compile(r"(https?|wss?)://(\[[0-9a-f:.]+\]|[^\s/?#@\[\]:,]+)(?::([0-9]{1,5}))?")
_HOST = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(?::([0-9]*))?")
# An IP address: in brackets, or with a number as its last part. Browsers tell addresses from names in the same way
# (WHATWG URL, section 3.5). DNS is not asked for these, so it cannot lead them elsewhere.
_ADDRESS = re.compile(r"\[.*|(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")


class BrowserRules:
    """Which origins are accepted and, where no credentials are asked for, which values of Host.

    `origins` are accepted beside a request's own: a proxy may rewrite Host. `hosts` are names that Host may have beside
    localhost and IP addresses; None: any name, because every request needs credentials. `pages` are the paths of public
    documents, which links of other sites may lead to.
    """

    def __init__(
        self, origins: Iterable[str] = (), hosts: Iterable[str] | None = None, pages: Iterable[str] = ()
    ) -> None:
        """Raises ValueError for an origin or a name that a browser cannot send."""
        self._origins = {normal_origin(origin) for origin in origins}
        self._hosts = None if hosts is None else {normal_name(name) for name in hosts}
        self._pages = frozenset(pages)

    def check(self, request: Request) -> None:
        """Raise HTTPError 403 for a request that a page of another origin may have caused."""
        get = request.headers.get
        host = get("host")
        # Every browser sends Host.
        if self._hosts is not None and host is not None and not self._is_known(host):
            raise _refused(f"the header Host is {shown(host)}, expected localhost, an IP address or a name given to the"
                           " controller by --allow-host, since it asks for no credentials")  # fmt: skip
        if not _is_from_browser(request):
            return
        origin, site = get("origin"), get("sec-fetch-site")
        if origin is not None and not self._is_own(origin, host or ""):
            raise _refused(f"the header Origin is {shown(origin)}, expected the origin of this controller"
                           f" ({shown(host)}), or one given to it by --allow-origin")  # fmt: skip
        if site not in (None, "same-origin", "none") and not self._is_followed_link(request):
            raise _refused(f"the header Sec-Fetch-Site is {shown(site)}, expected same-origin or none")
        has_body = get("transfer-encoding") is not None or get("content-length") not in (None, "0")
        content_type = get("content-type") or ""
        if has_body and content_type.partition(";")[0].strip().lower() != "application/json":
            raise _refused(f"the header Content-Type is {shown(content_type)}, expected application/json")

    def _is_known(self, host: str) -> bool:
        """Whether a value of Host cannot have got here by DNS rebinding, which takes a name of the attacker's."""
        assert self._hosts is not None
        name, _ = _split(host)
        return (
            name == "localhost" or name.endswith(".localhost") or name in self._hosts or bool(_ADDRESS.fullmatch(name))
        )

    def _is_followed_link(self, request: Request) -> bool:
        """Whether a person has followed a link to a page, whose answer the page with the link cannot read."""
        get = request.headers.get
        opens = (get("sec-fetch-mode"), get("sec-fetch-dest")) == ("navigate", "document")
        return opens and request.method == "GET" and request.path in self._pages and get("origin") is None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether an origin is accepted. Schemes are not compared, because a proxy may end TLS."""
        try:
            own = normal_origin(origin)
        except ValueError:
            return False
        scheme, _, authority = own.partition("://")
        return own in self._origins or _split(authority, scheme) == _split(host, scheme)


def without_challenge(request: Request, error: HTTPError) -> HTTPError:
    """Return the error for a request that is not admitted, without WWW-Authenticate if a browser sent the request.

    The browser would ask its user for credentials, keep them, and add them to requests of other pages.
    """
    if error.status != 401 or not _is_from_browser(request):
        return error
    headers = [(name, value) for name, value in error.headers if name != "WWW-Authenticate"]
    return HTTPError(error.status, error.message, headers)


def normal_origin(text: str) -> str:
    """Return an origin in lower case and without a default port. Raises ValueError if it is not a web origin."""
    match = _ORIGIN.fullmatch(text.lower())
    if match is None or int(match[3] or 0) > 65535:
        raise ValueError(f'the origin is "{text}", expected one such as https://orchard.example.com')
    scheme, name, port = match.groups()
    return f"{scheme}://{name}" + (f":{int(port)}" if port and int(port) != _DEFAULT_PORTS[scheme] else "")


def normal_name(text: str) -> str:
    """Return a host's name in lower case. Raises ValueError if it is something else."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise ValueError(f'the name is "{text}", expected a host name without a port, such as orchard.example.com')
    return text.lower().removesuffix(".")


def _split(host: str, scheme: str = "http") -> tuple[str, int]:
    """Return the name, in lower case and without a dot at its end, and the port of a value of Host."""
    match = _HOST.fullmatch(host.lower())
    if match is None:
        return "", 0
    return match[1].removesuffix("."), int(match[2] or _DEFAULT_PORTS[scheme])


def _is_from_browser(request: Request) -> bool:
    get = request.headers.get
    return get("origin") is not None or get("sec-fetch-site") is not None


def _refused(why: str) -> HTTPError:
    return HTTPError(403, why)
