"""A worker's heartbeats: `last_seen`, the lease that they renew, and the pauses between attempts to connect.

Each heartbeat that the controller answers renews the lease: the driver is told until when those VMs may run that the
controller would start elsewhere after this worker goes offline. That time is counted from the sending of the heartbeat
and is shorter than the controller's offline timeout, which begins at its receipt. So such a VM has ended here before it
is started elsewhere, whatever fails in between.

The requests themselves are sent by worker.py, and the driver enforces the lease.
"""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable, Sequence

import trio

from orchard.vm.driver import Driver, DriverError

# The longest time between two heartbeats. It is shorter if the controller's offline timeout is shorter than usual.
_HEARTBEAT_SECONDS = 15.0
# The controller's offline timeout if it does not tell its own, in seconds.
_DEFAULT_OFFLINE_TIMEOUT = 180.0
# So many heartbeats in a row may be lost before leased VMs are shut down.
_HEARTBEATS_PER_LEASE = 8
# Shares of the offline timeout after which leased VMs are told to shut down, and killed.
_SOFT_SHARE, _HARD_SHARE = 0.75, 0.95
# Pauses between attempts double from the first to the last: a worker is back within two seconds of the controller.
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 1.5  # seconds
# The random share of a pause, so that a thousand workers do not return at once.
_JITTER = 0.5

_logger = logging.getLogger("orchard.worker")


class LastSeenClock:
    """The times that a worker sends as `last_seen`.

    The controller takes only a later `last_seen` for a heartbeat. So each time is later than all times before it and
    than all that the controller is known to have, even when the host's clock is set back.
    """

    _STEP = datetime.timedelta(microseconds=1)
    _END = datetime.datetime.max.replace(tzinfo=datetime.UTC)

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` returns seconds since 1970."""
        self._clock = clock
        self._last = datetime.datetime.min.replace(tzinfo=datetime.UTC)

    def observe(self, last_seen: datetime.datetime | None) -> None:
        """Note the `last_seen` that the controller has stored, which any client may have written."""
        self._last = max(self._last, last_seen or self._last)

    def now(self) -> datetime.datetime:
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        # There is no time later than the end of the calendar.
        self._last = max(now, min(self._last, self._END - self._STEP) + self._STEP)
        return self._last


class Lease:
    """How long leased VMs may run on this host without contact with the controller.

    A VM is leased if the controller would start it elsewhere after this worker goes offline. The driver enforces the
    lease, even when the worker is stopped or dead.

    While a VM still runs here that the controller has reassigned, the lease is not renewed: the controller counts on
    the end of the lease as it was when it gave the VM up.
    """

    def __init__(self, driver: Driver, clock: Callable[[], float]) -> None:
        """`clock` returns seconds on the driver's clock for leases (`supervisor.clock`)."""
        self.now = clock
        # The controller's, in seconds.
        self._offline_timeout = _DEFAULT_OFFLINE_TIMEOUT
        self._driver = driver
        # When the last heartbeat was sent that the controller answered.
        self._answered = -math.inf
        # The ends of VMs that the controller has given up. None: not known since the registration.
        self._given_up: Sequence[trio.Event] | None = None

    @property
    def heartbeat_seconds(self) -> float:
        """The interval of heartbeats with which the lease survives the loss of some of them."""
        return min(_HEARTBEAT_SECONDS, _SOFT_SHARE * self._offline_timeout / _HEARTBEATS_PER_LEASE)

    def begin_session(self, offline_timeout: float, sent: float) -> None:
        """Note the controller's offline timeout (in seconds; 0: it did not tell) and when the registration was sent.

        Until `set_given_up` is called, the lease is not renewed.
        """
        self._offline_timeout = offline_timeout or _DEFAULT_OFFLINE_TIMEOUT
        self._given_up = None
        self.renew(sent)

    def set_given_up(self, ends: Sequence[trio.Event]) -> None:
        """Renew the lease only when all these events are set: each is the end of a VM that the controller has given up."""
        self._given_up = ends

    def renew(self, sent: float = -math.inf) -> None:
        """Renew the lease by a heartbeat that was sent at the time `sent` and is now answered, or by an earlier one."""
        self._answered = max(sent, self._answered)
        if self._given_up is None or not all(ended.is_set() for ended in self._given_up):
            return
        soft, hard = (self._answered + share * self._offline_timeout for share in (_SOFT_SHARE, _HARD_SHARE))
        try:
            self._driver.lease(soft, hard)
        except DriverError as error:
            _logger.error("cannot renew the lease of VMs", extra={"reason": str(error)})


def backoff_seconds(failures: int, chance: float) -> float:
    """Return the seconds to pause before the next attempt, after so many failures in a row; `chance` is from 0 to 1.

    0 failures: a session has ended that had succeeded, maybe at the same moment as those of a thousand other workers.
    """
    if failures == 0:
        return _LAST_PAUSE * chance
    return float(min(_LAST_PAUSE, _FIRST_PAUSE * 2 ** min(failures, 10)) * (1 - _JITTER * chance))
