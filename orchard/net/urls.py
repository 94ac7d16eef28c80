"""URLs of controllers, and the HTTP proxies that the environment names for them. Pure.

The variables are HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in either case; the standard library reads them. NO_PROXY may
also hold networks such as 10.0.0.0/8. Loopback addresses and `localhost` are reached without a proxy.

This file imports neither trio nor h11 nor dataclasses, since the command's verbs read URLs before anything else.
"""

# No `from __future__ import annotations`: NamedTuple would compile each annotation at each start of the command.
import base64
import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

# The controller's port, and the port of a URL that has none.
DEFAULT_PORT = 6120
# Statuses from here on say that a server, or a proxy before it, cannot answer now: a controller that is restarted, for
# example.
SERVER_ERRORS = 500
# A header of answers of 503: this URL of the service does not serve now, and another one may.
NOT_SERVING = ("Orchard-Role", "standby")
# Where a service has several URLs: how long those that refuse connections are tried again, and the pause between tries.
# After a planned stop another controller answers within half a second and the time in which it loads its VMs.
TAKEOVER_SECONDS, REFUSED_PAUSE = 2.0, 0.1
# The port of a proxy whose URL names none.
_PROXY_PORT = 80


class ServerURL(NamedTuple):
    """The parts of a server's URL. `text` is its normal form, `prefix` a path without a slash at its end, or ""."""

    text: str
    is_tls: bool
    host: str
    port: int
    prefix: str


class Proxy(NamedTuple):
    """An HTTP proxy. `authorization` is the value of Proxy-Authorization, "" for none."""

    host: str
    port: int
    authorization: str = ""

    def __repr__(self) -> str:
        return f"Proxy(host={self.host!r}, port={self.port})"

    def __str__(self) -> str:
        return f"the proxy {bracketed(self.host)}:{self.port}"


def basic_header(user: str, password: str) -> str:
    """Return the value of the header Authorization, or Proxy-Authorization, for a name and a password."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def parse_url(url: str, base_path: str = "") -> ServerURL:
    """Parse a server's URL. A `base_path` at its end is dropped. Raises ValueError that says what is accepted.

    A URL without a scheme means https.
    """
    expected = "expected a URL such as https://controller.example.com:6120"
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        raise ValueError(f'the URL is "{url}" ({error}), {expected}') from None
    # The message must not repeat a password.
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the URL contains a user name, {expected}; pass the account's name and token separately")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f'the URL is "{url}", {expected}')
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f'the URL is "{url}", {expected}, in ASCII and without blanks')
    prefix = parts.path.rstrip("/").removesuffix(base_path)
    text = f"{parts.scheme}://{bracketed(parts.hostname)}:{port}{prefix}"
    return ServerURL(text, parts.scheme == "https", parts.hostname, port, prefix)


def parse_urls(text: str, base_path: str = "") -> tuple[ServerURL, ...]:
    """Parse the URLs of one service, separated by commas, as `parse_url` does. Raises ValueError.

    All have the scheme of the first: credentials that are meant for TLS must not be sent in the clear.
    """
    servers = tuple(dict.fromkeys(parse_url(url.strip(), base_path) for url in text.split(",")))
    for server in servers:
        if server.is_tls is not servers[0].is_tls:
            raise ValueError(
                f"the URLs are {servers[0].text} and {server.text}, expected the same scheme in all, http or https"
            )
    return servers


def join_urls(servers: Iterable[ServerURL]) -> str:
    """Return URLs in their normal form, separated by commas."""
    return ",".join(server.text for server in servers)


def bracketed(host: str) -> str:
    """Return a host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def reachable_host(host: str) -> str:
    """Return the address by which this host reaches a socket that listens on `host`, as written in a URL."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return "[::1]" if address.version == 6 else "127.0.0.1"
    return bracketed(str(address))


def find_proxy(is_tls: bool, host: str, environ: Mapping[str, str]) -> Proxy | None:
    """Return the environment's proxy for a host, None if it is reached without one.

    Raises ValueError for a proxy that cannot be used.
    """
    scheme = "https" if is_tls else "http"

    def variable(name: str) -> str:
        return environ.get(name.lower()) or environ.get(name) or ""

    url = variable(f"{scheme.upper()}_PROXY").strip()
    if not url or _is_excepted(host, variable("NO_PROXY")):
        return None
    return _parse_proxy(url, f"{scheme.upper()}_PROXY")


def _is_excepted(host: str, no_proxy: str) -> bool:
    """Return whether a host is reached without a proxy: a loopback address, or one that NO_PROXY names."""
    address = _address(host)
    if host.lower().rstrip(".") == "localhost" or (address is not None and address.is_loopback):
        return True
    # Imported here, since it takes 20 ms, and few hosts have a proxy.
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    if proxy_bypass_environment(host, {"no": no_proxy}):
        return True
    return address is not None and any(address in network for network in _networks(no_proxy))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _networks(no_proxy: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    networks = []
    for entry in no_proxy.split(","):
        try:
            networks.append(ipaddress.ip_network(entry.strip(), strict=False))
        except ValueError:
            continue
    return networks


def _parse_proxy(url: str, variable: str) -> Proxy:
    expected = "expected a URL such as http://proxy.example.com:3128"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or _PROXY_PORT
    except ValueError:
        raise ValueError(f"{variable} holds no valid URL, {expected}") from None
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f'{variable} has the scheme "{parts.scheme}" or no host, {expected}')
    if parts.username is None:
        return Proxy(parts.hostname, port)
    authorization = basic_header(unquote(parts.username), unquote(parts.password or ""))
    return Proxy(parts.hostname, port, authorization)
