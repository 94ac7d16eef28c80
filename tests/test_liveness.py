"""Who is alive: by the controller's monotonic clock alone, whatever the clocks of the workers say."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest

from orchard.codec import format_time
from orchard.liveness import Liveness

TIMEOUT = 180.0
HERE, ELSEWHERE = ("workers", "10.0.0.1"), ("workers", "10.0.0.2")
SEEN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
SECOND = datetime.timedelta(seconds=1)
DECADE = datetime.timedelta(days=3653)


class Site:
    """A liveness, its clock, and when it told of workers that returned."""

    def __init__(self, *known: str) -> None:
        self.now = 1000.0
        self.returns: list[float] = []
        self.liveness = Liveness(lambda: self.now, TIMEOUT, lambda worker: self.returns.append(self.now), known)


def test_a_later_last_seen_is_a_heartbeat_and_any_other_is_none() -> None:
    site = Site()
    assert site.liveness.record_heartbeat("w", HERE, SEEN)
    for last_seen in (SEEN, SEEN - SECOND):
        site.now += 1
        assert not site.liveness.record_heartbeat("w", HERE, last_seen)
        assert site.liveness.last_contact == {"w": 1000}
    assert site.liveness.record_heartbeat("w", HERE, SEEN + datetime.timedelta(microseconds=1))
    assert site.liveness.last_contact == {"w": 1002}


def test_last_seen_is_shown_as_the_worker_said_it() -> None:
    site = Site("w")
    assert site.liveness.last_seen_json("w") is None
    site.liveness.record_heartbeat("w", HERE, SEEN + SECOND)
    site.liveness.record_heartbeat("w", HERE, SEEN)
    assert site.liveness.last_seen_json("w") == format_time(SEEN + SECOND).encode()


def test_a_clock_that_jumps_by_ten_years_makes_nobody_look_dead_or_alive() -> None:
    site = Site()
    site.liveness.record_worker("w", HERE)
    site.liveness.record_heartbeat("w", HERE, SEEN)
    site.now += 100
    assert site.liveness.record_heartbeat("w", HERE, SEEN + DECADE)
    assert site.liveness.last_contact == {"w": 1100}
    site.now += 100
    assert not site.liveness.record_heartbeat("w", HERE, SEEN), "back in the present, it is no heartbeat"
    site.liveness.record_poll("w", HERE)
    assert site.liveness.last_contact == {"w": 1200}, "but what it polls is a sign of life"
    site.now += TIMEOUT
    assert site.liveness.record_heartbeat("w", HERE, SEEN + DECADE + SECOND)
    assert site.returns == [1000, 1200 + TIMEOUT], "it was away for the whole time-out, whatever its clock says"


@pytest.mark.parametrize("source", [ELSEWHERE, ("people", HERE[1])])
def test_a_poll_counts_only_from_where_the_worker_is(source: tuple[str, str]) -> None:
    site = Site("w")
    site.now += 1
    site.liveness.record_poll("w", HERE)
    assert site.liveness.last_contact == {"w": 1000}, "it has not said yet where it is"
    site.liveness.record_heartbeat("w", HERE, SEEN)
    site.now += 1
    site.liveness.record_poll("w", source)
    assert site.liveness.last_contact == {"w": 1001}
    site.liveness.record_poll("w", HERE)
    assert site.liveness.last_contact == {"w": 1002}
    site.liveness.record_worker("w", source)
    site.now += 1
    site.liveness.record_poll("w", HERE)
    assert site.liveness.last_contact == {"w": 1002}, "it has moved"


def test_a_heartbeat_that_is_none_does_not_move_the_worker() -> None:
    site = Site()
    site.liveness.record_heartbeat("w", HERE, SEEN)
    site.liveness.record_heartbeat("w", ELSEWHERE, SEEN)
    site.now += 1
    site.liveness.record_poll("w", ELSEWHERE)
    assert site.liveness.last_contact == {"w": 1000}


def test_returned_is_called_exactly_when_an_offline_worker_gives_a_sign_of_life() -> None:
    site = Site("known")
    site.now += TIMEOUT - 1
    site.liveness.record_worker("known", HERE)
    assert site.returns == [], "it has the whole time-out after a start"
    site.liveness.record_worker("new", HERE)
    assert site.returns == [site.now], "a new one was offline before"
    signs: tuple[Callable[[], object], ...] = (
        lambda: site.liveness.record_pong("known"),
        lambda: site.liveness.record_poll("known", HERE),
        lambda: site.liveness.record_worker("known", HERE),
        lambda: site.liveness.record_heartbeat("known", HERE, SEEN + site.now * SECOND),
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
    site.liveness.record_worker("w", HERE)
    site.now += 100
    site.liveness.record_worker("lately", HERE)
    site.liveness.extend_for_stall(0.5)
    assert site.liveness.last_contact == {"silent": 1000, "w": 1101, "lately": 1200}
    site.now += TIMEOUT  # of which it was to look 99 seconds before "w" was silent
    site.liveness.extend_for_stall(TIMEOUT)
    assert site.liveness.last_contact == {"silent": 1000, "w": 1380, "lately": 1380}
    site.returns.clear()
    site.liveness.record_worker("w", HERE)
    site.liveness.record_worker("silent", HERE)
    assert site.returns == [1380], "it was offline"


def test_of_a_forgotten_worker_nothing_is_left() -> None:
    site = Site()
    site.liveness.record_heartbeat("w", HERE, SEEN)
    site.liveness.record_heartbeat("another", HERE, SEEN)
    site.liveness.record_deletion("w")
    site.liveness.record_deletion("never heard of")
    assert site.liveness.last_contact == {"another": 1000}
    assert site.liveness.last_seen_json("w") is None
    site.returns.clear()
    site.liveness.record_poll("w", HERE)
    site.liveness.record_pong("w")  # a pong on a watch that is still open
    assert (site.liveness.last_contact, site.returns) == ({"another": 1000}, [])
    assert site.liveness.record_heartbeat("w", HERE, SEEN - SECOND), "a new worker of that name begins anew"
    assert site.returns == [1000]
