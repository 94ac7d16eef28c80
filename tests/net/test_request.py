"""HTTP/1.1 as data: routes are found as by a search of them all, and nothing is taken that could be read in two ways.
What the server makes of refusals is tested with the server."""

from __future__ import annotations

import re

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchard.net.request import Chunked, Head, HTTPError, Query, Route, Router, head_end, read_head

# ---- router and query ----------------------------------------------------------------------------------------------

ROUTER = Router(
    [
        Route("GET", "/v1/", "root"),
        Route("GET", "/v1/vms", "list"),
        Route("POST", "/v1/vms", "create"),
        Route("GET", "/v1/vms/{name}", "get"),
        Route("DELETE", "/v1/vms/{name}", "delete"),
        Route("GET", "/v1/vms/{name}/events", "events"),
        Route("PUT", "/v1/vms/special", "special"),
        Route("PUT", "/v1/{kind}/{name}/state", "state"),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "params"),
    [
        ("GET", "/v1/", "root", {}),
        ("HEAD", "/v1/vms", "list", {}),
        ("GET", "/v1/%76ms", "list", {}),
        ("GET", "/v1/vms/a", "get", {"name": "a"}),
        ("GET", "/v1/vms/a%2Fb", "get", {"name": "a/b"}),
        ("GET", "/v1/vms/%C3%A9%25", "get", {"name": "\xe9%"}),
        ("GET", "/v1/vms/events/events", "events", {"name": "events"}),
        ("PUT", "/v1/vms/special", "special", {}),
        ("GET", "/v1/vms/special", "get", {"name": "special"}),
        ("PUT", "/v1/vms/special/state", "state", {"kind": "vms", "name": "special"}),
    ],
)
def test_routes_are_found(method: str, path: str, endpoint: str, params: dict[str, str]) -> None:
    route, found = ROUTER.match(method, path)
    assert (route.endpoint, found) == (endpoint, params)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/", 404, None),
        ("GET", "", 404, None),
        ("GET", "/v1", 404, None),
        ("GET", "//v1/vms", 404, None),
        ("GET", "/v1//vms", 404, None),
        ("GET", "/v1/vms/", 404, None),
        ("GET", "/v1/vms//events", 404, None),
        ("GET", "/v1/vms/a/events/", 404, None),
        ("GET", "/v1%2Fvms", 404, None),
        ("PATCH", "/v1/vms", 405, "GET, HEAD, POST"),
        ("PUT", "/v1/vms/a", 405, "DELETE, GET, HEAD"),
        ("POST", "/v1/vms/special", 405, "DELETE, GET, HEAD, PUT"),
        ("HEAD", "/v1/vms/a/state", 405, "PUT"),
        ("GET", "/v1/vms/%zz", 400, None),
        ("GET", "/v1/vms/%", 400, None),
        ("GET", "/v1/vms/%2", 400, None),
        ("GET", "/v1/vms/%ff", 400, None),
        ("GET", "/v1/vms/%ed%a0%80", 400, None),
    ],
)
def test_what_has_no_route(method: str, path: str, status: int, allow: str | None) -> None:
    with pytest.raises(HTTPError) as refused:
        ROUTER.match(method, path)
    assert refused.value.status == status
    assert dict(refused.value.headers).get("Allow") == allow


def test_a_route_that_hides_another_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"GET /vms/\{b\} stands beside /vms/\{a\}"):
        Router([Route("GET", "/vms/{a}", 1), Route("GET", "/vms/{b}", 2)])


PATTERNS = st.lists(st.sampled_from(["a", "b", "", "{x}", "{y}"]), min_size=1, max_size=4).map(
    lambda s: "/" + "/".join(s)
)
PATHS = st.lists(st.sampled_from(["a", "b", "", "c", "%61"]), min_size=1, max_size=4).map(lambda s: "/" + "/".join(s))


@given(
    st.lists(st.tuples(st.sampled_from(["GET", "PUT"]), PATTERNS), max_size=12), PATHS, st.sampled_from(["GET", "PUT"])
)
def test_the_router_finds_what_a_search_of_all_routes_finds(
    table: list[tuple[str, str]], path: str, method: str
) -> None:
    # Of patterns that differ in their names only the first is kept.
    unique = {
        (method, re.sub(r"\{.\}", "{}", pattern)): Route(method, pattern, pattern) for method, pattern in table[::-1]
    }
    router = Router(list(unique.values()))
    decoded = path.replace("%61", "a").split("/")[1:]

    def fits(pattern: str) -> bool:
        steps = pattern.split("/")[1:]
        pairs = zip(steps, decoded, strict=False)
        return len(steps) == len(decoded) and all(a == b or (a.startswith("{") and b) for a, b in pairs)

    def shape(route: Route) -> list[bool]:
        return [step.startswith("{") for step in route.pattern.split("/")]

    fitting = [route for route in unique.values() if fits(route.pattern)]
    possible = [route for route in fitting if route.method == method]
    if possible:
        route, params = router.match(method, path)
        # Of several, the one that has a literal segment where they first differ in that.
        assert shape(route) == min(shape(one) for one in possible)
        assert route in possible
        assert params.keys() == {step[1:-1] for step in route.pattern.split("/") if step.startswith("{")}
        assert set(params.values()) <= set(decoded)
    else:
        with pytest.raises(HTTPError) as refused:
            router.match(method, path)
        assert refused.value.status == (405 if fitting else 404)


def test_query() -> None:
    query = Query("a=1&b=x+y%2B&a=2&c&&%64=%C3%A9=")
    assert (query.one("b"), query.one("c"), query.one("d"), query.one("e")) == ("x y+", "", "\xe9=", None)
    assert (list(query.all("a")), list(query.all("e"))) == (["1", "2"], [])
    with pytest.raises(HTTPError, match='"a" stands 2 times') as refused:
        query.one("a")
    assert refused.value.status == 400
    assert Query("").one("a") is None


@pytest.mark.parametrize("raw", ["a=%", "a=%4", "a=%zz", "a=%ff", "%ff=1", "b=1&a=%C3"])
def test_a_query_that_cannot_be_decoded_is_refused(raw: str) -> None:
    for name in ("a", "b", "c"):
        with pytest.raises(HTTPError) as refused:
            Query(raw).one(name)
        assert refused.value.status == 400


# ---- heads and bodies ----------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"GET /",
        b"POST /a?b HTTP/1.1\r\nHost: x\r\n",
        b"HTTP/1.1",
        b"HTTP/1.0\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"X-A: b\r\n",
        b"x-a:\t c\xe9 \r\n",
        b"X-B:\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b":",
        b"\x00",
        b"%",
        b"\xff",
    ]
)


@given(st.lists(PIECES | st.binary(max_size=20), max_size=8))
def test_a_head_is_taken_only_if_h11_takes_it_too_and_read_as_h11_reads_it(pieces: list[bytes]) -> None:
    head = b"".join(pieces).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    read: Head | HTTPError
    try:
        read = read_head(head, 100)
    except HTTPError as error:
        read = error
    if isinstance(read, HTTPError):
        assert 400 <= read.status <= 505
        return
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(head)
    event = parser.next_event()
    assert isinstance(event, h11.Request)
    assert (read.method, read.target, read.version) == (
        event.method.decode(),
        event.target.decode(),
        event.http_version.decode(),
    )
    values: dict[str, list[str]] = {}
    for name, value in event.headers:
        values.setdefault(name.decode(), []).append(value.decode("latin-1"))
    assert {name: read.headers.get(name) for name in values} == {name: ", ".join(all_) for name, all_ in values.items()}
    assert read.headers._values.keys() == {name.encode() for name in values}
    if read.length == 0:
        assert isinstance(parser.next_event(), h11.EndOfMessage)
    assert parser.trailing_data[0] == b""


@given(st.lists(PIECES | st.binary(max_size=20), max_size=8), st.lists(st.integers(1, 40), max_size=30))
def test_a_head_ends_at_the_same_place_however_it_arrives(pieces: list[bytes], cuts: list[int]) -> None:
    data, limit = b"".join(pieces), 120

    def outcome(arrivals: list[bytes]) -> int | tuple[int, str]:
        buffer, looked, end = bytearray(), 0, -1
        try:
            for arrived in arrivals:
                buffer += arrived
                end, looked = head_end(buffer, looked, limit)
                if end >= 0:
                    break
        except HTTPError as error:
            return error.status, error.message if error.status == 431 else ""
        return end

    positions = [sum(cuts[:n]) for n in range(len(cuts) + 1)]
    arrivals = [data[a:b] for a, b in zip(positions, [*positions[1:], len(data)], strict=True)]
    at_once, piecewise = outcome([data]), outcome(arrivals)
    if at_once != piecewise:
        # What is illegal behind the end of a head is not looked at, and before it only until the end is there.
        assert at_once == data.index(b"\r\n\r\n") + 4
        assert piecewise == (400, "")
        with pytest.raises(HTTPError):
            read_head(data[:at_once], 100)
    elif isinstance(at_once, int) and at_once >= 0:
        assert data[:at_once].find(b"\r\n\r\n") == at_once - 4 <= limit - 4


CHUNKS = st.lists(st.binary(min_size=1, max_size=30), max_size=8)


@given(CHUNKS, st.binary(max_size=10), st.lists(st.integers(1, 40), max_size=60))
def test_chunks_are_separated_from_what_follows_however_they_arrive(
    chunks: list[bytes], following: bytes, cuts: list[int]
) -> None:
    framed = b"".join(b"%X\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    source, buffer, taken = framed + following, bytearray(), b""
    body = Chunked(1_000_000)
    for cut in [*cuts, len(source)]:
        buffer += source[:cut]
        source = source[cut:]
        ready = body.advance(buffer)
        taken += buffer[:ready]
        del buffer[:ready]
    assert taken == framed
    assert bytes(buffer) == following
