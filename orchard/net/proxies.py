"""HTTP proxies that the environment names: which one leads to a server, and the connection through it.

The variables are HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in either case; the standard library reads them. NO_PROXY may also
hold networks such as 10.0.0.0/8. Loopback addresses and `localhost` are reached without a proxy.

Every connection goes through CONNECT (RFC 9110, section 9.3.6), in the clear or with TLS inside, because WebSockets need
it. No message contains a proxy's user name or password.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote, urlsplit

import h11
import trio

from orchard.net import tcp

_DEFAULT_PORT = 80
# Of a proxy's answer to CONNECT.
_MAX_HEAD_BYTES = 16 * 1024
_RECEIVE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of Proxy-Authorization, "" for none."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {bracketed(self.host)}:{self.port}"


def connector(is_tls: bool, host: str, environ: Mapping[str, str]) -> tcp.Connect:
    """Return what connects to a server: `tcp.connect`, or a function that goes through the environment's proxy.

    Raises ValueError for a proxy that cannot be used.
    """
    proxy = _find_proxy("https" if is_tls else "http", host, environ)
    return tcp.connect if proxy is None else partial(_connect_through, proxy)


def bracketed(host: str) -> str:
    """Return a host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _find_proxy(scheme: str, host: str, environ: Mapping[str, str]) -> Proxy | None:
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
        port = parts.port or _DEFAULT_PORT
    except ValueError:
        raise ValueError(f"{variable} holds no valid URL, {expected}") from None
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f'{variable} has the scheme "{parts.scheme}" or no host, {expected}')
    if parts.username is None:
        return Proxy(parts.hostname, port)
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(parts.hostname, port, f"Basic {base64.b64encode(pair.encode()).decode()}")


async def _connect_through(proxy: Proxy, host: str, port: int) -> trio.abc.Stream:
    """Connect as `tcp.connect` does, through a proxy. Raises OSError, which names the proxy."""
    try:
        stream = await tcp.connect(proxy.host, proxy.port)
    except OSError as error:
        raise OSError(f"no connection to {proxy}: {tcp.describe_network_error(error)}") from None
    is_open = False
    try:
        await _ask_for_tunnel(stream, proxy, f"{bracketed(host)}:{port}")
        is_open = True
    finally:
        if not is_open:
            await trio.aclose_forcefully(stream)
    return stream


async def _ask_for_tunnel(stream: trio.abc.Stream, proxy: Proxy, target: str) -> None:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    headers = [("Host", target)]
    if proxy.authorization:
        headers.append(("Proxy-Authorization", proxy.authorization))
    request = h11.Request(method="CONNECT", target=target, headers=headers)
    try:
        await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
        while not isinstance(event := http.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(_RECEIVE_BYTES)))
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        raise OSError(f"{proxy} gave no valid answer to CONNECT {target}") from None
    if not 200 <= event.status_code < 300:
        reason = bytes(event.reason).decode("latin-1")
        raise OSError(f"{proxy} refused CONNECT {target}: {event.status_code} {reason}".rstrip())
    if http.trailing_data[0]:
        raise OSError(f"{proxy} sent bytes before the server's: is it an HTTP proxy?")
