"""Routes are found as by a search of all of them; query parameters are decoded."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchard.net.request import HTTPError, Query, Route, Router

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
        ("GET", "/v1", "root", {}),
        ("GET", "/v1/vms/", "list", {}),
        ("POST", "/v1/vms/", "create", {}),
        ("GET", "/v1/vms/a/", "get", {"name": "a"}),
        ("GET", "/v1/vms/a/events/", "events", {"name": "a"}),
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
        ("GET", "//v1/vms", 404, None),
        ("GET", "/v1//vms", 404, None),
        ("GET", "/v1/vms//", 404, None),
        ("GET", "/v1/vms//events", 404, None),
        ("POST", "/v1/vms/a/", 405, "DELETE, GET, HEAD"),
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
def test_paths_and_methods_without_a_route_are_refused(method: str, path: str, status: int, allow: str | None) -> None:
    with pytest.raises(HTTPError) as refused:
        ROUTER.match(method, path)
    assert refused.value.status == status
    assert dict(refused.value.headers).get("Allow") == allow


def test_two_routes_of_one_method_and_pattern_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GET /vms/\{b\} hides /vms/\{a\}"):
        Router([Route("GET", "/vms/{a}", 1), Route("GET", "/vms/{b}", 2)])


def test_literal_segment_wins_where_two_patterns_first_differ() -> None:
    late, early = Route("GET", "/{x}/b", 1), Route("GET", "/a/{y}", 2)
    for routes in ([late, early], [early, late]):
        assert Router(routes).match("GET", "/a/b") == (early, {"y": "b"})


def steps_of(path: str) -> list[str]:
    """Return the segments of a path, without the empty one that a slash at its end makes."""
    steps = path.split("/")[1:]
    return steps[:-1] if steps[-1] == "" else steps


PATTERNS = st.lists(st.sampled_from(["a", "b", "", "{x}", "{y}"]), min_size=1, max_size=4).map(
    lambda s: "/" + "/".join(s)
)
PATHS = st.lists(st.sampled_from(["a", "b", "", "c", "%61"]), min_size=1, max_size=4).map(lambda s: "/" + "/".join(s))


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from(["GET", "PUT"]), PATTERNS), max_size=12), PATHS, st.sampled_from(["GET", "PUT"])
)
def test_router_finds_what_a_search_of_all_routes_finds(table: list[tuple[str, str]], path: str, method: str) -> None:
    # Of patterns that differ only in the names in braces the first one is kept.
    unique = {
        (method, *(re.sub(r"\{.\}", "{}", step) for step in steps_of(pattern))): Route(method, pattern, pattern)
        for method, pattern in table[::-1]
    }
    router = Router(list(unique.values()))
    decoded = steps_of(path.replace("%61", "a"))

    def fits(pattern: str) -> bool:
        steps = steps_of(pattern)
        pairs = zip(steps, decoded, strict=False)
        return len(steps) == len(decoded) and all(a == b or (a.startswith("{") and b) for a, b in pairs)

    def shape(route: Route) -> list[bool]:
        return [step.startswith("{") for step in steps_of(route.pattern)]

    fitting = [route for route in unique.values() if fits(route.pattern)]
    possible = [route for route in fitting if route.method == method]
    if possible:
        route, params = router.match(method, path)
        # Of several routes the one with a literal segment where they first differ.
        assert shape(route) == min(shape(one) for one in possible)
        assert route in possible
        assert params.keys() == {step[1:-1] for step in route.pattern.split("/") if step.startswith("{")}
        assert set(params.values()) <= set(decoded)
    else:
        with pytest.raises(HTTPError) as refused:
            router.match(method, path)
        assert refused.value.status == (405 if fitting else 404)


def test_query_parameters_are_decoded_in_order() -> None:
    query = Query("a=1&b=x+y%2B&a=2&c&&%64=%C3%A9=")
    assert (query.one("b"), query.one("c"), query.one("d"), query.one("e")) == ("x y+", "", "\xe9=", None)
    assert query.parameters()["a"] == ["1", "2"]
    assert "e" not in query.parameters()
    with pytest.raises(HTTPError, match='"a" is given 2 times') as refused:
        query.one("a")
    assert refused.value.status == 400
    assert Query("").one("a") is None


@pytest.mark.parametrize("raw", ["a=%", "a=%4", "a=%zz", "a=%ff", "%ff=1", "b=1&a=%C3"])
def test_query_that_cannot_be_decoded_is_refused(raw: str) -> None:
    for name in ("a", "b", "c"):
        with pytest.raises(HTTPError) as refused:
            Query(raw).one(name)
        assert refused.value.status == 400
