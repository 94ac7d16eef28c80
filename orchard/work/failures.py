"""Failures of a worker's requests to the controller: the log lines about them, and the pauses before the next attempt."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from orchard.client import ClientError, ConnectError, ResponseError
from orchard.net.tls import NotTrustedError

# Pauses between attempts double from the first to the last: a worker is back within two seconds of the controller.
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.5  # seconds
# The random share of a pause, so that a thousand workers do not return at once.
_JITTER = 0.5
# The longest pause after a failure that only an operator can mend.
_LAST_PERMANENT_PAUSE = 20.0  # seconds
# A bootstrap token carries the login of an account and the certificate of its controller.
LOGIN_REMEDY = "start the worker with a new bootstrap token of this controller: orchard bootstrap-token ACCOUNT"
# The least interval of log lines about the same failure.
_LOG_SECONDS = 60.0

_logger = logging.getLogger("orchard.worker")


class FailureLog:
    """Logs failures of a worker's session with the controller.

    The first failure and each new reason are logged at once, the same reason again at most once a minute. A permanent
    failure is logged only once.
    """

    def __init__(self, worker: str, clock: Callable[[], float]) -> None:
        """`clock` returns seconds of a clock that is never set."""
        self._worker = worker
        self._clock = clock
        self._reason = ""
        self._logged_at = -math.inf

    def clear(self) -> None:
        self._reason = ""

    def note(self, error: ClientError) -> None:
        reason, now = str(error), self._clock()
        if reason == self._reason and (is_permanent(error) or now < self._logged_at + _LOG_SECONDS):
            return
        self._reason, self._logged_at = reason, now
        lost = isinstance(error, ConnectError)
        message = "cannot reach the controller, retrying" if lost else "the session failed, retrying"
        is_outdated = _is_not_trusted(error) or (isinstance(error, ResponseError) and error.status == 401)
        remedy = {"remedy": LOGIN_REMEDY} if is_outdated else {}
        _logger.warning(message, extra={"worker": self._worker, "reason": reason, **remedy})


def is_permanent(error: Exception) -> bool:
    """Return whether an error stays until an operator changes something.

    The credentials are refused, the name belongs to another worker, or the certificate is not the expected one.
    """
    if isinstance(error, ResponseError):
        return error.status in (401, 403, 409)
    return _is_not_trusted(error)


def _is_not_trusted(error: Exception) -> bool:
    return isinstance(error.__cause__, NotTrustedError)


def backoff_seconds(failures: int, chance: float, *, permanent: bool = False) -> float:
    """Return the seconds to pause before the next attempt, after so many failures in a row; `chance` is from 0 to 1.

    0 failures: a session has ended that had succeeded, maybe at the same moment as those of a thousand other workers.
    `permanent`: only an operator can mend the failure, so the pauses may grow longer.
    """
    last = _LAST_PERMANENT_PAUSE if permanent else _LAST_PAUSE
    if failures == 0:
        return _LAST_PAUSE * chance
    return float(min(last, _FIRST_PAUSE * 2 ** min(failures, 10)) * (1 - _JITTER * chance))
