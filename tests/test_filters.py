"""Filters of VMs: which texts are read, and which VMs match."""

from __future__ import annotations

import pytest

from orchard.codec import MalformedError
from orchard.filters import MAX_CONDITIONS, FieldCondition, parse_filter


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("worker=w", [("worker", "", "w", False)]),
        ("status!=failed", [("status", "", "failed", True)]),
        ("name=ci-*", [("name", "", "ci-*", False)]),
        ("image=ghcr.io/a:b", [("image", "", "ghcr.io/a:b", False)]),
        ("createdBy=", [("createdBy", "", "", False)]),
        ("metadata.team=a=b", [("metadata", "team", "a=b", False)]),
        ("metadata.a.b/c=x%2Cy%25%2c", [("metadata", "a.b/c", "x,y%,", False)]),
        ("label.a%2C%3D%21%25!=v", [("label", "a,=!%", "v", True)]),
        ("label.a!!=v", [("label", "a!", "v", True)]),
        ("worker=w,worker=w,status=running", [("worker", "", "w", False), ("status", "", "running", False)]),
        ("label.k=%E2%82%AC+ ", [("label", "k", "€+ ", False)]),
    ],
)
def test_conditions_of_a_filter(text: str, conditions: list[tuple[str, str, str, bool]]) -> None:
    parsed = parse_filter([text])
    assert list(parsed.conditions) == [FieldCondition(*each) for each in conditions]
    assert parse_filter([str(parsed)]).conditions == parsed.conditions


@pytest.mark.parametrize(
    "text",
    [
        *("a", "a=b", "=b", "worker", "worker!w", "worker.x=w", "status.a=running", "metadata=x", "label=x"),
        *("Worker=w", "metadata.=x", "metadata.a b=x", "metadata.a%2Cb=x", f"metadata.{'k' * 129}=x"),
        *("worker=", "worker=a b", "worker!=", "status=", "status=Running", "status!=runing"),
        *("name=", "name=*a", "name=a**", "name!=*a", "name=a b"),
        *("image=%", "image=%4", "image=%zz", "image=a%2", "image=%FF", "worker=w,", ",worker=w", "worker=w,,worker=x"),
        ",".join(f"image=i{number}" for number in range(MAX_CONDITIONS + 1)),
    ],
)
def test_filter_that_could_be_a_slip_is_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_filter([text])


@pytest.mark.parametrize(
    ("texts", "worker"),
    [
        (["worker=w"], "w"),
        (["worker=w", "worker=w"], "w"),
        (["worker!=w"], None),
        (["worker=w,worker=x"], None),
        (["worker=w", "status=running"], None),
        (["name=w"], None),
        ([""], None),
        ([], None),
    ],
)
def test_filter_by_one_worker_alone_names_it(texts: list[str], worker: str | None) -> None:
    assert parse_filter(texts).only_worker == worker
