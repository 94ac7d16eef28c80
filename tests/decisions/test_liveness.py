"""Liveness depends on the controller's monotonic clock alone, whatever the clocks of the workers say."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest

from orchard.codec import format_time
from orchard.decisions.liveness import Liveness

TIMEOUT = 180.0
HERE, ELSEWHERE = ("workers", "10.0.0.1"), ("workers", "10.0.0.2")
SEEN = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
SECOND = datetime.timedelta(seconds=1)
TEN_YEARS = datetime.timedelta(days=3653)


class Clocked:
    """A liveness with its clock, and the times at which it reported that a worker may have changed."""

    def __init__(self, *known: str) -> None:
        self.now = 1000.0
        self.returns: list[float] = []
        promises = dict.fromkeys(known, 0.0)
        self.liveness = Liveness(lambda: self.now, TIMEOUT, lambda _: self.returns.append(self.now), promises, {})


def test_heartbeat_needs_a_later_last_seen() -> None:
    clocked = Clocked()
    assert clocked.liveness.record_heartbeat("w", HERE, SEEN)
    for last_seen in (SEEN, SEEN - SECOND):
        clocked.now += 1
        assert not clocked.liveness.record_heartbeat("w", HERE, last_seen)
        assert clocked.liveness.last_contact == {"w": 1000}
    assert clocked.liveness.record_heartbeat("w", HERE, SEEN + datetime.timedelta(microseconds=1))
    assert clocked.liveness.last_contact == {"w": 1002}


def test_last_seen_is_returned_as_the_worker_sent_it() -> None:
    clocked = Clocked("w")
    assert clocked.liveness.last_seen_json("w") is None
    clocked.liveness.record_heartbeat("w", HERE, SEEN + SECOND)
    clocked.liveness.record_heartbeat("w", HERE, SEEN)
    assert clocked.liveness.last_seen_json("w") == format_time(SEEN + SECOND).encode()


def test_worker_clock_jump_of_ten_years_changes_no_liveness() -> None:
    clocked = Clocked()
    clocked.liveness.record_worker("w", HERE)
    clocked.liveness.record_heartbeat("w", HERE, SEEN)
    clocked.now += 100
    assert clocked.liveness.record_heartbeat("w", HERE, SEEN + TEN_YEARS)
    assert clocked.liveness.last_contact == {"w": 1100}
    clocked.now += 100
    assert not clocked.liveness.record_heartbeat("w", HERE, SEEN), "last_seen is earlier than before"
    clocked.liveness.record_poll("w", HERE)
    assert clocked.liveness.last_contact == {"w": 1200}, "a poll still counts"
    clocked.now += TIMEOUT
    assert clocked.liveness.record_heartbeat("w", HERE, SEEN + TEN_YEARS + SECOND)
    assert clocked.returns == [1000, 1200 + TIMEOUT], "it was silent for the whole time-out"


@pytest.mark.parametrize("source", [ELSEWHERE, ("people", HERE[1])])
def test_poll_counts_only_from_the_source_of_the_worker(source: tuple[str, str]) -> None:
    clocked = Clocked("w")
    clocked.now += 1
    clocked.liveness.record_poll("w", HERE)
    assert clocked.liveness.last_contact == {"w": 1000}, "its source is not known yet"
    clocked.liveness.record_heartbeat("w", HERE, SEEN)
    clocked.now += 1
    clocked.liveness.record_poll("w", source)
    assert clocked.liveness.last_contact == {"w": 1001}
    clocked.liveness.record_poll("w", HERE)
    assert clocked.liveness.last_contact == {"w": 1002}
    clocked.liveness.record_worker("w", source)
    clocked.now += 1
    clocked.liveness.record_poll("w", HERE)
    assert clocked.liveness.last_contact == {"w": 1002}, "the source has changed"


def test_update_without_a_later_last_seen_does_not_change_the_source() -> None:
    clocked = Clocked()
    clocked.liveness.record_heartbeat("w", HERE, SEEN)
    clocked.liveness.record_heartbeat("w", ELSEWHERE, SEEN)
    clocked.now += 1
    clocked.liveness.record_poll("w", ELSEWHERE)
    assert clocked.liveness.last_contact == {"w": 1000}


def test_return_is_reported_once_when_an_offline_worker_makes_contact() -> None:
    clocked = Clocked("known")
    clocked.now += TIMEOUT - 1
    clocked.liveness.record_worker("known", HERE)
    assert clocked.returns == [], "it has the whole time-out after a start"
    clocked.liveness.record_worker("new", HERE)
    assert clocked.returns == [clocked.now], "an unknown worker was offline"
    contacts: tuple[Callable[[], object], ...] = (
        lambda: clocked.liveness.record_pong("known"),
        lambda: clocked.liveness.record_poll("known", HERE),
        lambda: clocked.liveness.record_worker("known", HERE),
        lambda: clocked.liveness.record_heartbeat("known", HERE, SEEN + clocked.now * SECOND),
    )
    for make_contact in contacts:
        clocked.returns.clear()
        clocked.now += TIMEOUT - 1
        make_contact()
        assert clocked.returns == []
        clocked.now += TIMEOUT
        make_contact()
        make_contact()
        assert clocked.returns == [clocked.now]


def test_stall_of_the_controller_does_not_count_as_silence() -> None:
    clocked = Clocked("silent", "w", "recent")
    clocked.now += 100
    clocked.liveness.record_worker("w", HERE)
    clocked.now += 100
    clocked.liveness.record_worker("recent", HERE)
    clocked.liveness.extend_for_stall(0.5)
    assert clocked.liveness.last_contact == {"silent": 1000, "w": 1101, "recent": 1200}
    # When the next stall begins, "w" has 81 seconds left.
    clocked.now += TIMEOUT
    clocked.liveness.extend_for_stall(TIMEOUT)
    assert clocked.liveness.last_contact == {"silent": 1000, "w": 1380, "recent": 1380}
    clocked.returns.clear()
    clocked.liveness.record_worker("w", HERE)
    clocked.liveness.record_worker("silent", HERE)
    assert clocked.returns == [1380], "it was offline before the stall"


def test_deleted_worker_is_forgotten_and_has_to_register_again() -> None:
    clocked = Clocked()
    clocked.liveness.record_heartbeat("w", HERE, SEEN)
    clocked.liveness.record_heartbeat("another", HERE, SEEN)
    clocked.liveness.record_deletion("w")
    clocked.liveness.record_deletion("never registered")
    assert clocked.liveness.last_contact == {"another": 1000}
    assert clocked.liveness.last_seen_json("w") is None
    clocked.returns.clear()
    clocked.liveness.record_poll("w", HERE)
    # Its watch may still be open.
    clocked.liveness.record_pong("w")
    assert (clocked.liveness.last_contact, clocked.returns) == ({"another": 1000}, [])
    assert clocked.liveness.record_heartbeat("w", HERE, SEEN - SECOND), "a new worker may have an earlier clock"
    assert clocked.returns == [1000]


def test_vm_that_a_worker_has_to_end_ends_a_timeout_after_its_second_poll() -> None:
    clocked = Clocked("w")
    liveness = clocked.liveness
    liveness.record_worker("w", HERE)
    liveness.record_end_request("w", "u")
    for _ in range(3):
        clocked.now += 20
        liveness.record_worker("w", HERE)
        assert liveness.ended_at_latest("w", "u") == clocked.now + TIMEOUT, "a heartbeat may renew its lease"
    liveness.record_poll("w", ELSEWHERE)
    liveness.record_poll("w", HERE)
    liveness.record_poll("w", ELSEWHERE)
    clocked.now += 20
    liveness.record_worker("w", HERE)
    assert liveness.ended_at_latest("w", "u") == clocked.now + TIMEOUT, "the answer may be under way"
    liveness.record_poll("w", HERE)
    told = clocked.now
    clocked.now += 20
    liveness.record_poll("w", HERE)
    assert liveness.ended_at_latest("w", "u") == told + TIMEOUT
    liveness.forget_end_request("w", "u")
    assert liveness.ended_at_latest("w", "u") == clocked.now + TIMEOUT


def test_forgotten_end_request_of_several_leaves_the_others() -> None:
    clocked = Clocked("w")
    clocked.liveness.record_worker("w", HERE)
    for uid in "ab":
        clocked.liveness.record_end_request("w", uid)
    clocked.liveness.forget_end_request("w", "a")
    for _ in range(2):
        clocked.liveness.record_poll("w", HERE)
    clocked.now += 1
    clocked.liveness.record_worker("w", HERE)
    assert clocked.liveness.ended_at_latest("w", "b") == clocked.now - 1 + TIMEOUT
    clocked.liveness.forget_end_request("w", "b")
    clocked.liveness.forget_end_request("w", "b")
