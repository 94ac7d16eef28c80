"""The limit on wrong credentials, on a virtual clock."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import trio
import trio.testing

from orchard.auth import UnauthenticatedError
from orchard.base.nursery import sleep_pauses
from orchard.decisions import login_limit
from orchard.decisions.login_limit import MAX_FAILED, MAX_FAILURES, LoginLimit, TooManyFailuresError


class Guesses:
    """Sends credentials and notes when they are checked and answered."""

    def __init__(self) -> None:
        self.limit = LoginLimit(trio.current_time)
        self.checked: list[float] = []

    def check(self, right: bool) -> str:
        self.checked.append(trio.current_time())
        if not right:
            raise UnauthenticatedError("no")
        return "in"

    async def send(self, address: str, account: str, *, right: bool = False) -> tuple[str, float]:
        """Return the outcome and the seconds until it was known."""
        begun = trio.current_time()
        check = partial(self.check, right)
        try:
            if self.limit.is_limited(address, account):
                outcome = await sleep_pauses(self.limit.check(address, account, check))
            else:
                outcome = self.limit.check_now(address, account, check)
        except UnauthenticatedError:
            outcome = "wrong"
        except TooManyFailuresError:
            outcome = "too many"
        return outcome, trio.current_time() - begun

    async def fail(self, address: str, account: str, times: int = MAX_FAILURES) -> None:
        for _ in range(times):
            await self.send(address, account)


async def test_eleventh_wrong_credentials_of_a_minute_are_answered_after_a_second(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    guesses = Guesses()
    for _ in range(MAX_FAILURES):
        assert await guesses.send("a", "ci") == ("wrong", 0.0)
    for _ in range(3):
        assert await guesses.send("a", "ci") == ("too many", 1.0)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "many failed logins"),
        ("WARNING", "many failed logins"),
    ], "one for the source and one for the account"
    await trio.sleep(60)
    assert await guesses.send("a", "ci") == ("wrong", 0.0)


@pytest.mark.parametrize("varied", ["address", "account", "neither"])
async def test_credentials_are_not_checked_faster_than_once_a_second(
    varied: str, autojump_clock: trio.testing.MockClock
) -> None:
    guesses = Guesses()
    addresses = [f"a{number}" if varied == "address" else "a" for number in range(12)]
    accounts = [f"c{number}" if varied == "account" else "c" for number in range(12)]
    for address, account in zip(addresses, accounts, strict=True):
        await guesses.send(address, account)
    guesses.checked.clear()
    begun = trio.current_time()
    outcomes: list[tuple[str, float]] = []

    async def guess(address: str, account: str) -> None:
        while trio.current_time() < begun + 20:
            outcomes.append(await guesses.send(address, account))

    async with trio.open_nursery() as nursery:
        for address, account in zip(addresses, accounts, strict=True):
            nursery.start_soon(guess, address, account)
    assert len(guesses.checked) > 15
    assert min(later - earlier for earlier, later in pairwise(guesses.checked)) >= 1.0 - 1e-9
    assert {outcome for outcome, _ in outcomes} == {"too many"}
    assert min(seconds for _, seconds in outcomes) >= 1.0


async def test_right_credentials_from_elsewhere_do_not_wait(autojump_clock: trio.testing.MockClock) -> None:
    guesses = Guesses()
    await guesses.fail("attacker", "ci")
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(guesses.send, "attacker", "ci")
        await trio.testing.wait_all_tasks_blocked()
        assert await guesses.send("elsewhere", "ci", right=True) == ("in", 0.0)
        assert await guesses.send("attacker", "another", right=True) == ("in", 0.0), "another account behind one NAT"
        assert await guesses.send("attacker", "ci", right=True) == ("in", 3.0), "its turn"


async def test_credentials_that_wait_are_bounded(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    guesses = Guesses()
    await guesses.fail("a", "ci")
    guesses.checked.clear()
    outcomes: list[tuple[str, float]] = []

    async def guess(address: str, account: str) -> None:
        outcomes.append(await guesses.send(address, account))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(guess, "a", "ci")
        await trio.testing.wait_all_tasks_blocked()
        assert guesses.limit._waiting.total() == login_limit.MAX_WAITING_OF_SOURCE
        assert len(outcomes) == 1000 - login_limit.MAX_WAITING_OF_SOURCE
    assert len(guesses.checked) <= 11
    assert max(seconds for _, seconds in outcomes) <= 11.0
    assert not guesses.limit._waiting
    monkeypatch.setattr(login_limit, "MAX_WAITING", 0)
    assert await guesses.send("a", "ci") == ("too many", 0.0)
    assert await guesses.send("elsewhere", "ci", right=True) == ("in", 0.0)


async def test_limit_remembers_the_latest_sources_and_accounts(autojump_clock: trio.testing.MockClock) -> None:
    guesses = Guesses()
    await guesses.fail("first", "first")
    for number in range(MAX_FAILED - 1):
        guesses.limit.record(f"host-{number}", f"account-{number}")
    assert guesses.limit.is_limited("first", "first")
    guesses.limit.record("another", "another")
    assert not guesses.limit.is_limited("first", "first")
    assert len(guesses.limit._sources) == len(guesses.limit._accounts) == MAX_FAILED


async def test_lines_in_the_log_are_bounded(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    guesses = Guesses()
    for number in range(100):
        await guesses.fail(f"host-{number}", f"account-{number}")
    assert len(caplog.records) == login_limit._MAX_LOGGED


async def test_bearer_tokens_are_limited_by_source_only(autojump_clock: trio.testing.MockClock) -> None:
    guesses = Guesses()
    await guesses.fail("a", "")
    assert await guesses.send("a", "") == ("too many", 1.0)
    assert await guesses.send("b", "") == ("wrong", 0.0)
