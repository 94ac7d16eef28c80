"""The bound on connections that have not authenticated."""

from __future__ import annotations

import pytest

from orchard.net.unauthenticated import Unauthenticated, source_of


def counted(*arrivals: tuple[int, str], per_source: int = 3, total: int = 5) -> tuple[Unauthenticated[int], list[int]]:
    """Count connections (a number and an address) one after another. Return the bound and what it closed."""
    closed: list[int] = []
    bound = Unauthenticated(closed.append, per_source, total)
    for connection, address in arrivals:
        bound.add(connection, address)
    return bound, closed


def test_oldest_of_a_source_with_too_many_is_closed() -> None:
    bound, closed = counted((1, "a"), (2, "b"), (3, "b"), (4, "b"), (5, "b"), (6, "b"))
    assert closed == [2, 3]
    assert len(bound) == 4


def test_source_with_the_most_makes_room_when_all_are_too_many() -> None:
    _, closed = counted((1, "a"), (2, "b"), (3, "b"), (4, "c"), (5, "d"), (6, "e"), (7, "f"), (8, "g"))
    assert closed == [2, 1, 3]


def test_removed_connections_are_not_counted_and_not_closed() -> None:
    bound, closed = counted((1, "a"), (2, "a"), (3, "a"))
    bound.remove(1)
    bound.remove(1)
    bound.add(4, "a")
    assert closed == []
    bound.add(5, "a")
    assert closed == [2]
    for connection in range(6):
        bound.remove(connection)
    assert len(bound) == 0
    assert not bound.make_room()


def test_hosts_of_one_ipv6_network_are_one_source() -> None:
    _, closed = counted(*((n, f"2001:db8::{n}") for n in range(4)), (4, "2001:db8:0:1::1"))
    assert closed == [0]


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("-", "-"),
    ],
)
def test_source_of_address(address: str, source: str) -> None:
    assert source_of(address) == source
