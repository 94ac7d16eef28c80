"""The limit on wrong credentials, for the API and the SSH jump host together. Pure: the clock is an argument.

Wrong credentials are counted by source (`source_of` the client's address) and by the account that they name. After ten
within a minute, a source or an account is *limited*: its credentials are checked once a second, and wrong ones are
answered a second after they came. So guessing ends at one token a second, whatever the number of connections.

Correct credentials must get through nevertheless. The caller recognises those that were accepted lately and does not
limit them. Others are checked at once if either their source or their account has had no failure within the minute. So
a stranger's guesses do not delay a client elsewhere, and a misconfigured client does not delay other accounts behind
the same NAT. All other credentials wait for their turn.

Waiting credentials are bounded by the time until their turn, by source, and in all. Beyond that, credentials are
refused unchecked.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from orchard.auth import UnauthenticatedError
from orchard.codec import shown
from orchard.net.unauthenticated import source_of
from orchard.schema import MAX_NAME

# So many wrong credentials within _FAILURE_SECONDS limit a source or an account.
MAX_FAILURES = 10
# The most sources that are remembered, and the most accounts, at some hundred bytes each. Those that failed least
# recently are forgotten first.
MAX_FAILED = 4096
# Interval of checks for a limited source or account, and delay of the answer to wrong credentials.
CHECK_SECONDS = 1.0  # seconds
# The most credentials of one source that wait for their turn or their answer, and of all sources. Each holds a request
# and a task beside its connection's own, so these are as many as the HTTP server's connections of strangers.
MAX_WAITING_OF_SOURCE = 512
MAX_WAITING = 1024

_FAILURE_SECONDS = 60.0  # seconds
# The longest wait for a turn.
_TURN_SECONDS = 10.0  # seconds
# The most lines in the log within _FAILURE_SECONDS.
_MAX_LOGGED = 30

_logger = logging.getLogger("orchard.auth")

OutcomeT = TypeVar("OutcomeT")


class TooManyFailuresError(Exception):
    """Credentials of a limited source or account were wrong or not checked; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _Failures:
    """The last failures of a source or an account, and when its next credentials may be checked."""

    __slots__ = ("next_check", "times")

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=MAX_FAILURES)
        self.next_check = 0.0

    def has_failed(self, now: float) -> bool:
        return bool(self.times) and now < self.times[-1] + _FAILURE_SECONDS

    def limited_for(self, now: float) -> float:
        """Return for how many seconds it is limited, 0 if it is not."""
        return max(0.0, self.times[0] + _FAILURE_SECONDS - now) if len(self.times) == MAX_FAILURES else 0.0


class LoginLimit:
    """Counts wrong credentials and slows down those that follow. `clock` returns monotonic seconds.

    The account "" stands for credentials that name none; it is never limited.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # In the order of their last failures.
        self._sources: OrderedDict[str, _Failures] = OrderedDict()
        self._accounts: OrderedDict[str, _Failures] = OrderedDict()
        # Credentials that wait, by source.
        self._waiting: Counter[str] = Counter()
        self._logged: deque[float] = deque(maxlen=_MAX_LOGGED)

    def is_limited(self, address: str, account: str) -> bool:
        """Return whether credentials from an address for an account have to be checked by `check`."""
        # Nearly always, no source has failed lately.
        if not self._sources:
            return False
        return any(each.limited_for(self._clock()) for each in self._find(source_of(address), account))

    def check_now(self, address: str, account: str, check: Callable[[], OutcomeT]) -> OutcomeT:
        """Return what `check` returns for credentials that are not limited. Raises UnauthenticatedError."""
        try:
            return check()
        except UnauthenticatedError:
            self.record(address, account)
            raise

    def record(self, address: str, account: str) -> None:
        """Count wrong credentials."""
        now = self._clock()
        for table, key in ((self._sources, source_of(address)), (self._accounts, account[:MAX_NAME])):
            if not key:
                continue
            failures = table.setdefault(key, _Failures())
            was_limited = failures.limited_for(now)
            failures.times.append(now)
            table.move_to_end(key)
            if len(table) > MAX_FAILED:
                table.popitem(last=False)
            if failures.limited_for(now) and not was_limited:
                self._log(now, source_of(address), account)

    def check(self, address: str, account: str, check: Callable[[], OutcomeT]) -> Generator[float, None, OutcomeT]:
        """Return what `check` returns, when it is the turn of these credentials. Yields the seconds to wait.

        Raises TooManyFailuresError if `check` raises UnauthenticatedError, or if too much waits to check them.
        """
        source, begun = source_of(address), self._clock()
        of_source, of_account = self._find(source, account)
        has_room = self._waiting[source] < MAX_WAITING_OF_SOURCE and self._waiting.total() < MAX_WAITING
        if not has_room and of_source.has_failed(begun):
            raise self._too_many(source, account)
        wait = 0.0
        if of_source.has_failed(begun) and (of_account.has_failed(begun) or not account):
            wait = _take_turn([each for each in (of_source, of_account) if each.limited_for(begun)], begun)
        with self._counted(source):
            try:
                if wait <= _TURN_SECONDS:
                    yield wait
                    return check()
            except UnauthenticatedError:
                self.record(address, account)
            if has_room:
                yield max(0.0, begun + CHECK_SECONDS - self._clock())
        raise self._too_many(source, account)

    def _find(self, source: str, account: str) -> tuple[_Failures, _Failures]:
        return self._sources.get(source) or _Failures(), self._accounts.get(account[:MAX_NAME]) or _Failures()

    @contextmanager
    def _counted(self, source: str) -> Iterator[None]:
        self._waiting[source] += 1
        try:
            yield
        finally:
            self._waiting[source] -= 1
            if not self._waiting[source]:
                del self._waiting[source]

    def _too_many(self, source: str, account: str) -> TooManyFailuresError:
        now = self._clock()
        of_source, of_account = (each.limited_for(now) for each in self._find(source, account))
        whose = f"came from {source}" if of_source else f"named the service account {shown(account)}"
        return TooManyFailuresError(
            f"{MAX_FAILURES} wrong credentials {whose} within a minute; others are checked once a second",
            retry_after=max(1, math.ceil(max(of_source, of_account))),
        )

    def _log(self, now: float, source: str, account: str) -> None:
        """Log that a source or an account is limited from now on, unless the log has many such lines already."""
        if len(self._logged) < _MAX_LOGGED or now >= self._logged[0] + _FAILURE_SECONDS:
            self._logged.append(now)
            _logger.warning("many failed logins", extra={"source": source, "account": account[:MAX_NAME] or "-"})


def _take_turn(limited: list[_Failures], now: float) -> float:
    """Return the seconds until the next turn of all these, and take that turn if it is near enough."""
    turn = max([now, *(each.next_check for each in limited)])
    if turn <= now + _TURN_SECONDS:
        for each in limited:
            each.next_check = turn + CHECK_SECONDS
    return turn - now
