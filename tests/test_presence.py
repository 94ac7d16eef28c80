"""Who is alive: by the controller's monotonic clock alone, whatever the clocks of the workers say."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest

from orchard.codec import format_time
from orchard.presence import Presence

TIMEOUT = 180.0
HERE, ELSEWHERE = ("workers", "10.0.0.1"), ("workers", "10.0.0.2")
SEEN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
SECOND = datetime.timedelta(seconds=1)
DECADE = datetime.timedelta(days=3653)


class Site:
    """A presence, its clock, and when it told of workers that returned."""

    def __init__(self, *known: str) -> None:
        self.now = 1000.0
        self.returns: list[float] = []
        self.presence = Presence(lambda: self.now, TIMEOUT, lambda worker: self.returns.append(self.now), known)


def test_a_later_last_seen_is_a_heartbeat_and_any_other_is_none() -> None:
    site = Site()
    assert site.presence.heartbeat("w", HERE, SEEN)
    for last_seen in (SEEN, SEEN - SECOND):
        site.now += 1
        assert not site.presence.heartbeat("w", HERE, last_seen)
        assert site.presence.seen == {"w": 1000}
    assert site.presence.heartbeat("w", HERE, SEEN + datetime.timedelta(microseconds=1))
    assert site.presence.seen == {"w": 1002}


def test_last_seen_is_shown_as_the_worker_said_it() -> None:
    site = Site("w")
    assert site.presence.last_seen("w") is None
    site.presence.heartbeat("w", HERE, SEEN + SECOND)
    site.presence.heartbeat("w", HERE, SEEN)
    assert site.presence.last_seen("w") == format_time(SEEN + SECOND).encode()


def test_a_clock_that_jumps_by_ten_years_makes_nobody_look_dead_or_alive() -> None:
    site = Site()
    site.presence.arrived("w", HERE)
    site.presence.heartbeat("w", HERE, SEEN)
    site.now += 100
    assert site.presence.heartbeat("w", HERE, SEEN + DECADE)
    assert site.presence.seen == {"w": 1100}
    site.now += 100
    assert not site.presence.heartbeat("w", HERE, SEEN), "back in the present, it is no heartbeat"
    site.presence.polled("w", HERE)
    assert site.presence.seen == {"w": 1200}, "but what it polls is a sign of life"
    site.now += TIMEOUT
    assert site.presence.heartbeat("w", HERE, SEEN + DECADE + SECOND)
    assert site.returns == [1000, 1200 + TIMEOUT], "it was away for the whole time-out, whatever its clock says"


@pytest.mark.parametrize("source", [ELSEWHERE, ("people", HERE[1])])
def test_a_poll_counts_only_from_where_the_worker_is(source: tuple[str, str]) -> None:
    site = Site("w")
    site.now += 1
    site.presence.polled("w", HERE)
    assert site.presence.seen == {"w": 1000}, "it has not said yet where it is"
    site.presence.heartbeat("w", HERE, SEEN)
    site.now += 1
    site.presence.polled("w", source)
    assert site.presence.seen == {"w": 1001}
    site.presence.polled("w", HERE)
    assert site.presence.seen == {"w": 1002}
    site.presence.arrived("w", source)
    site.now += 1
    site.presence.polled("w", HERE)
    assert site.presence.seen == {"w": 1002}, "it has moved"


def test_a_heartbeat_that_is_none_does_not_move_the_worker() -> None:
    site = Site()
    site.presence.heartbeat("w", HERE, SEEN)
    site.presence.heartbeat("w", ELSEWHERE, SEEN)
    site.now += 1
    site.presence.polled("w", ELSEWHERE)
    assert site.presence.seen == {"w": 1000}


def test_returned_is_called_exactly_when_an_offline_worker_gives_a_sign_of_life() -> None:
    site = Site("known")
    site.now += TIMEOUT - 1
    site.presence.arrived("known", HERE)
    assert site.returns == [], "it has the whole time-out after a start"
    site.presence.arrived("new", HERE)
    assert site.returns == [site.now], "a new one was offline before"
    signs: tuple[Callable[[], object], ...] = (
        lambda: site.presence.alive("known"),
        lambda: site.presence.polled("known", HERE),
        lambda: site.presence.arrived("known", HERE),
        lambda: site.presence.heartbeat("known", HERE, SEEN + site.now * SECOND),
    )
    for give_sign in signs:
        site.returns.clear()
        site.now += TIMEOUT - 1
        give_sign()
        assert site.returns == []
        site.now += TIMEOUT
        give_sign()
        give_sign()
        assert site.returns == [site.now]


def test_nobody_is_silent_for_what_was_not_heard() -> None:
    site = Site("silent", "w", "lately")
    site.now += 100
    site.presence.arrived("w", HERE)
    site.now += 100
    site.presence.arrived("lately", HERE)
    site.presence.deaf(0.5)
    assert site.presence.seen == {"silent": 1000, "w": 1101, "lately": 1200}
    site.now += TIMEOUT  # of which it was to look 99 seconds before "w" was silent
    site.presence.deaf(TIMEOUT)
    assert site.presence.seen == {"silent": 1000, "w": 1380, "lately": 1380}
    site.returns.clear()
    site.presence.arrived("w", HERE)
    site.presence.arrived("silent", HERE)
    assert site.returns == [1380], "it was offline"


def test_of_a_forgotten_worker_nothing_is_left() -> None:
    site = Site()
    site.presence.heartbeat("w", HERE, SEEN)
    site.presence.heartbeat("another", HERE, SEEN)
    site.presence.forget("w")
    site.presence.forget("never heard of")
    assert site.presence.seen == {"another": 1000}
    assert site.presence.last_seen("w") is None
    site.returns.clear()
    site.presence.polled("w", HERE)
    site.presence.alive("w")  # a pong on a watch that is still open
    assert (site.presence.seen, site.returns) == ({"another": 1000}, [])
    assert site.presence.heartbeat("w", HERE, SEEN - SECOND), "a new worker of that name begins anew"
    assert site.returns == [1000]
