"""Routes are found by method and path; query parameters are decoded."""

from __future__ import annotations

import pytest

from orchard.net.request import HTTPError, Query, Router

ROUTER = Router(
    [
        ("GET", "/v1/", "root"),
        ("GET", "/v1/vms", "list"),
        ("POST", "/v1/vms", "create"),
        ("GET", "/v1/vms/{name}", "get"),
        ("DELETE", "/v1/vms/{name}", "delete"),
        ("GET", "/v1/vms/{name}/events", "events"),
        ("PUT", "/v1/vms/special", "special"),
        ("PUT", "/v1/vms/{name}/state", "state"),
    ]
)


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "name"),
    [
        ("GET", "/v1/", "root", ""),
        ("GET", "/v1", "root", ""),
        ("GET", "/v1/vms/", "list", ""),
        ("POST", "/v1/vms/", "create", ""),
        ("GET", "/v1/vms/a/", "get", "a"),
        ("GET", "/v1/vms/a/events/", "events", "a"),
        ("HEAD", "/v1/vms", "list", ""),
        ("GET", "/v1/%76ms", "list", ""),
        ("GET", "/v1/vms/a", "get", "a"),
        ("GET", "/v1/vms/a%2Fb", "get", "a/b"),
        ("GET", "/v1/vms/%C3%A9%25", "get", "\xe9%"),
        ("GET", "/v1/vms/events/events", "events", "events"),
        ("PUT", "/v1/vms/special", "special", ""),
        ("PUT", "/v1/vms/special/state", "state", "special"),
    ],
)
def test_routes_are_found(method: str, path: str, endpoint: str, name: str) -> None:
    assert ROUTER.match(method, path) == (endpoint, name)


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
        ("POST", "/v1/vms/special", 405, "PUT"),
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


@pytest.mark.parametrize("routes", [[("GET", "/vms/{a}", 1), ("GET", "/vms/{b}", 2)], [("GET", "/{a}/{b}", 1)]])
def test_ambiguous_routes_are_refused(routes: list[tuple[str, str, int]]) -> None:
    with pytest.raises(ValueError, match=r"GET /.*\{b\}"):
        Router(routes)


def test_literal_segment_wins_where_two_patterns_first_differ() -> None:
    late, early = ("GET", "/{x}/b", 1), ("GET", "/a/{y}", 2)
    for routes in ([late, early], [early, late]):
        assert Router(routes).match("GET", "/a/b") == (2, "b")


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
