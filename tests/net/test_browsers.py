"""Which requests of browsers are refused: every case of Origin, Sec-Fetch-Site, Content-Type and Host."""

from __future__ import annotations

import pytest

from orchard.net.browsers import BrowserRules, normal_name, normal_origin, without_challenge
from orchard.net.request import HTTPError, Request

OWN = {"host": "controller:6120", "origin": "https://controller:6120"}
BODY = {"content-length": "2"}
JSON = {"content-type": "application/json"}
# The headers of a request, and whether a controller with authentication accepts them.
CASES: dict[str, tuple[dict[str, str], bool]] = {
    "no browser": ({"host": "anything"}, True),
    "no browser, with a form": ({"host": "h", "content-type": "application/x-www-form-urlencoded", **BODY}, True),
    "HTTP/1.0 without Host": ({}, True),
    "own origin": (OWN, True),
    "own origin behind a proxy that ends TLS": ({**OWN, "origin": "http://controller:6120"}, True),
    "own origin of a WebSocket library": ({**OWN, "origin": "wss://controller:6120"}, True),
    "own origin in other case": ({**OWN, "origin": "HTTPS://Controller:6120"}, True),
    "own origin at the default port": ({"host": "controller", "origin": "https://controller"}, True),
    "default port in Host": ({"host": "controller:443", "origin": "https://controller"}, True),
    "default port in Origin": ({"host": "controller", "origin": "http://controller:80"}, True),
    "own origin in IPv6": ({"host": "[::1]:6120", "origin": "http://[::1]:6120"}, True),
    "dot at the end of a name": ({"host": "controller.:6120", "origin": "http://controller:6120"}, True),
    "allowed origin": ({"host": "inside:6120", "origin": "https://orchard.example.com"}, True),
    "allowed origin with its port": ({"host": "inside:6120", "origin": "https://orchard.example.com:443"}, True),
    "allowed origin with another scheme": ({"host": "inside:6120", "origin": "http://orchard.example.com"}, False),
    "allowed origin from another site": (
        {"host": "inside", "origin": "https://orchard.example.com", "sec-fetch-site": "cross-site"},
        False,
    ),
    "other origin": ({**OWN, "origin": "https://evil.example"}, False),
    "other port": ({**OWN, "origin": "https://controller:3000"}, False),
    "other default port": ({"host": "controller:443", "origin": "http://controller"}, False),
    "subdomain": ({**OWN, "origin": "https://a.controller:6120"}, False),
    "longer name": ({**OWN, "origin": "https://controller:6120.evil.example"}, False),
    "user name": ({**OWN, "origin": "https://controller:6120@evil.example"}, False),
    "path": ({**OWN, "origin": "https://controller:6120/"}, False),
    "null": ({**OWN, "origin": "null"}, False),
    "empty": ({**OWN, "origin": ""}, False),
    "two origins": ({**OWN, "origin": "https://controller:6120, https://controller:6120"}, False),
    "port out of range": ({**OWN, "origin": "https://controller:99999"}, False),
    "other scheme": ({**OWN, "origin": "chrome-extension://controller:6120"}, False),
    "origin without Host": ({"origin": "https://controller:6120"}, False),
    "same origin": ({"host": "controller:6120", "sec-fetch-site": "same-origin"}, True),
    "typed URL": ({"host": "controller:6120", "sec-fetch-site": "none"}, True),
    "same site": ({"host": "controller:6120", "sec-fetch-site": "same-site"}, False),
    "cross site": ({"host": "controller:6120", "sec-fetch-site": "cross-site"}, False),
    "own origin that says cross site": ({**OWN, "sec-fetch-site": "cross-site"}, False),
    "unknown site": ({"host": "controller:6120", "sec-fetch-site": ""}, False),
    "JSON": ({**OWN, **BODY, **JSON}, True),
    "JSON in UTF-8": ({**OWN, **BODY, "content-type": "Application/JSON; charset=utf-8"}, True),
    "chunked JSON": ({**OWN, **JSON, "transfer-encoding": "chunked"}, True),
    "no body": ({**OWN, "content-length": "0"}, True),
    "text": ({**OWN, **BODY, "content-type": "text/plain"}, False),
    "text that names JSON": ({**OWN, **BODY, "content-type": "text/plain; application/json"}, False),
    "form": ({**OWN, **BODY, "content-type": "application/x-www-form-urlencoded"}, False),
    "file": ({**OWN, **BODY, "content-type": "multipart/form-data; boundary=x"}, False),
    "no type": ({**OWN, **BODY}, False),
    "chunked text": ({**OWN, "transfer-encoding": "chunked", "content-type": "text/plain"}, False),
    "text without Origin": ({"host": "controller:6120", "sec-fetch-site": "same-origin", **BODY}, False),
}
# Values of Host, and whether a controller without authentication accepts them.
HOSTS = {
    "localhost:6120": True,
    "LOCALHOST": True,
    "localhost.:6120": True,
    "vm.localhost:6120": True,
    "127.0.0.1:6120": True,
    "127.0.0.1": True,
    "127.1:6120": True,
    "0x7f000001": True,
    "10.0.0.7:6120": True,
    "[::1]:6120": True,
    "[fe80::1%25en0]": True,
    "Lab.Example.com:6120": True,
    "lab.example.com.": True,
    "evil.example": False,
    "localhost.evil.example:6120": False,
    "evillocalhost": False,
    "127.0.0.1.evil.example": False,
    "1.2.3.4x": False,
    "a.lab.example.com": False,
}


def status_of(rules: BrowserRules, headers: dict[str, str]) -> int:
    try:
        rules.check(Request("POST", "/", headers))
    except HTTPError as error:
        return error.status
    return 200


@pytest.mark.parametrize("case", CASES)
def test_requests_of_browsers(case: str) -> None:
    headers, accepted = CASES[case]
    assert status_of(BrowserRules(["https://Orchard.example.com"]), headers) == (200 if accepted else 403)


# A request for a page, and whether a link of another site may cause it.
LINK = {"host": "h", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
LINKS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "followed": ("GET", "/ui/", LINK, True),
    "followed, to a place on the page": ("GET", "/ui/?x", LINK, True),
    "followed, to the API": ("GET", "/v1/vms", LINK, False),
    "followed, to a file of the page": ("GET", "/ui/app.js", LINK, False),
    "in a frame": ("GET", "/ui/", {**LINK, "sec-fetch-dest": "iframe"}, False),
    "read by a script": ("GET", "/ui/", {**LINK, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "empty"}, False),
    "a form": ("POST", "/ui/", LINK, False),
    "with an origin": ("GET", "/ui/", {**LINK, "origin": "https://evil.example"}, False),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_of_other_sites(case: str) -> None:
    method, target, headers, accepted = LINKS[case]
    rules = BrowserRules(pages=["/ui/"])
    if accepted:
        rules.check(Request(method, target, headers))
    else:
        with pytest.raises(HTTPError) as refused:
            rules.check(Request(method, target, headers))
        assert refused.value.status == 403


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_of_a_controller_without_authentication(host: str) -> None:
    assert status_of(BrowserRules(hosts=["lab.example.com"]), {"host": host}) == (200 if HOSTS[host] else 403)
    assert status_of(BrowserRules(), {"host": host}) == 200


def test_refusal_of_credentials_asks_no_browser_for_them() -> None:
    error = HTTPError(401, "who?", [("WWW-Authenticate", "Basic"), ("Retry-After", "1")])
    for headers, expected in (
        ({"host": "h"}, ["WWW-Authenticate", "Retry-After"]),
        ({"host": "h", "sec-fetch-site": "same-origin"}, ["Retry-After"]),
        ({"host": "h", "origin": "http://h"}, ["Retry-After"]),
    ):
        refused = without_challenge(Request("GET", "/", headers), error)
        assert [name for name, _ in refused.headers] == expected


@pytest.mark.parametrize(
    "text", ["", "null", "orchard.example.com", "https://a/", "https://a b", "ftp://a", "https://a:x"]
)
def test_invalid_origins_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="https://"):
        normal_origin(text)


@pytest.mark.parametrize("text", ["", "a:1", "https://a", "a b", "é"])
def test_invalid_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        normal_name(text)
