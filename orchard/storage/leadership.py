"""Which of several controllers leads: a lease of etcd, and the key `leader` that lasts as long as the lease.

The lease decides when a controller may try to lead, and until when the present leader may answer. It does not protect
what is stored: each write compares `head` (etcd_engine.py).

Answers may leave until 0.9 times the TTL after the last good keepalive was *sent*. etcd counts from its receipt, so no
other controller leads before. `clock` must count the time in which the host sleeps.
"""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from orchard.codec import dump_json, format_time, load_json
from orchard.storage.errors import LeadershipLostError, NotWrittenError
from orchard.storage.etcd import (
    Comparison,
    EtcdClient,
    EtcdRefusedError,
    EtcdRequestError,
    EtcdUnavailableError,
    TransactionResult,
    TxnOperation,
    get,
    put,
    was_written_at,
)

DEFAULT_LEADER_TTL = 10.0  # seconds
_SHARE_OF_TTL = 0.9
# Keepalives in one TTL.
_KEEPALIVES = 4
# Interval of reading the key of another leader, and pause after a failed request. A takeover may take this much longer.
_LOOK_SECONDS = 0.2
_RETRY_SECONDS = 0.25
# Pause before a transaction whose outcome is unknown is repeated.
_TRANSACTION_RETRY_SECONDS = 0.1
# Sums of times may differ in their last digit, so a wait is longer by this: it must not end just before the lease does.
_ROUNDING_SECONDS = 0.001
# Limit for revoking the lease at a stop. If that fails, the lease runs out.
_RESIGN_SECONDS = 2.0

_logger = logging.getLogger("orchard.controller")


def boot_time() -> float:
    """Return the seconds since the host was started, including those in which it slept."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    # CLOCK_BOOTTIME counts the time in which the host sleeps. macOS has CLOCK_MONOTONIC for that.
    return time.clock_gettime(time.CLOCK_MONOTONIC if clock is None else clock)


@dataclass(frozen=True, slots=True)
class CampaignSettings:
    """A controller that campaigns. `url` is shown by standbys; `new_id` returns another text at each call."""

    url: str
    ttl: float
    clock: Callable[[], float]
    now: Callable[[], datetime.datetime]
    new_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Leader:
    """The controller that leads, as the key `leader` has it. `since` is a time in RFC 3339."""

    by: str
    url: str
    since: str


class Leadership:
    """The lease of one controller. `campaign` returns when it leads; then `run` must be running."""

    def __init__(self, client: EtcdClient, prefix: str, settings: CampaignSettings) -> None:
        self.key = f"{prefix}/leader"
        # The id of this controller in its last campaign.
        self.by = ""
        # The revision of etcd at which the key was written by this controller.
        self.revision = 0
        # The other controller that was last seen to lead.
        self.other: Leader | None = None
        self._client = client
        self._settings = settings
        self._lease = ""
        # When this controller stops leading without another keepalive, by the clock of the settings.
        self._until = -math.inf
        # Why this controller does not lead any more, "" while it campaigns and leads.
        self.lost = ""

    # -- the gate

    def leads(self) -> bool:
        """Return whether an answer that is based on the state in memory may leave now."""
        return not self.lost and self._until > self._settings.clock()

    def patience(self) -> float:
        """Return for how many seconds a request may take: after them `leads` is false without another keepalive."""
        return max(0.0, self._until - self._settings.clock() + _ROUNDING_SECONDS)

    def lose(self, reason: str) -> LeadershipLostError:
        """Stop leading at once. Return the error that says so."""
        self.lost = self.lost or reason
        return LeadershipLostError(self.lost)

    # -- campaign

    async def campaign(self, *, is_patient: bool = False) -> None:
        """Wait until this controller leads. Raises EtcdRefusedError when etcd does not let it in.

        Raises EtcdUnavailableError when the first request fails, unless it `is_patient`; later ones are repeated.
        """
        self.lost, self._until, self.other = "", -math.inf, None
        leader = None if is_patient else await self._read_leader()
        failing = False
        while True:
            try:
                if leader is not None:
                    self._see(leader)
                elif await self._try():
                    self.other = None
                    return
                await trio.sleep(_LOOK_SECONDS)
                leader = await self._read_leader()
                failing = False
            except EtcdRequestError as error:
                if isinstance(error, EtcdRefusedError) and error.denied:
                    raise
                if not failing:
                    _logger.warning("cannot campaign, trying again: %s", error)
                failing = True
                await trio.sleep(_RETRY_SECONDS)

    async def _read_leader(self) -> Leader | None:
        found = await self._client.get(self.key)
        return None if found is None else _parse_leader(found.value)

    def _see(self, leader: Leader) -> None:
        if leader != self.other:
            _logger.info("standby, %s leads since %s", leader.url, leader.since)
        self.other = leader

    async def _try(self) -> bool:
        """Take a lease and try to become the leader with it."""
        settings = self._settings
        sent = settings.clock()
        granted = await self._client.call("/v3/lease/grant", {"TTL": str(math.ceil(settings.ttl))})
        self._lease, self.by = str(granted["ID"]), settings.new_id()
        text = {"by": self.by, "url": settings.url, "since": format_time(settings.now())}
        value = dump_json(text)
        is_won = False
        try:
            result = await self._client.transact(
                [was_written_at(self.key, 0)], [put(self.key, value, self._lease)], [get(self.key)]
            )
            found = result["found"][0] if result["found"] else []
            # An earlier try of this transaction may have succeeded, although its answer was lost.
            if result["succeeded"]:
                is_won, self.revision = True, result["revision"]
            elif found and _parse_leader(found[0].value).by == self.by:
                is_won, self.revision = True, found[0].mod_revision
        finally:
            if not is_won:
                await self.resign()
        if is_won:
            self._until = sent + _SHARE_OF_TTL * float(granted["TTL"])
        return is_won

    # -- the lease

    async def run(self) -> None:
        """Renew the lease until cancelled. Raises LeadershipLostError."""
        pause = self._settings.ttl / _KEEPALIVES
        problem = "the controller was stopped, or its host slept"
        while True:
            with trio.move_on_after(self.patience()):
                await trio.sleep(pause)
                sent = self._settings.clock()
                try:
                    answer = await self._client.call("/v3/lease/keepalive", {"ID": self._lease})
                except EtcdRequestError as error:
                    problem, pause = str(error), _RETRY_SECONDS
                else:
                    self._renew(sent, answer)
                    pause = self._settings.ttl / _KEEPALIVES
                    problem = "the controller was stopped, or its host slept"
            if not self.leads():
                raise self.lose(f"the lease was not renewed in time: {problem}")

    def _renew(self, sent: float, answer: dict[str, Any]) -> None:
        result = answer.get("result", {})
        # A lease that has run out has no TTL.
        if not int(result.get("TTL", 0)):
            raise self.lose("the lease has run out")
        if not self.lost:
            self._until = max(self._until, sent + _SHARE_OF_TTL * float(result["TTL"]))

    async def write(self, operations: Sequence[TxnOperation]) -> None:
        """Carry out operations that may be repeated, all or nothing, if no other controller has led since.

        A cancellation waits for it. Raises NotWrittenError; LeadershipLostError.
        """
        await self._write([], operations, [])

    async def write_once(self, key: str, revision: int, operations: Sequence[TxnOperation]) -> int:
        """Carry out operations that write `key`, if `key` was last written at `revision`.

        Only this controller writes the key. Return the new revision. Raises as `write`.
        """
        return await self._write([was_written_at(key, revision)], operations, [get(key)])

    async def _write(
        self, comparisons: Sequence[Comparison], operations: Sequence[TxnOperation], reads: Sequence[TxnOperation]
    ) -> int:
        """Carry out operations. Return their revision, or that of the key in `reads`, which an earlier try has written."""
        result = await self.transact(
            [was_written_at(self.key, self.revision), *comparisons], operations, [get(self.key), *reads]
        )
        if result["succeeded"]:
            return result["revision"]
        leader, *found = result["found"]
        if not leader or leader[0].mod_revision != self.revision or not found or not found[0]:
            raise self.lose("another controller leads")
        return found[0][0].mod_revision

    async def transact(
        self, comparisons: Sequence[Comparison], success: Sequence[TxnOperation], failure: Sequence[TxnOperation]
    ) -> TransactionResult:
        """Carry out a transaction that may be repeated, and repeat it until its outcome is known.

        A cancellation waits for it. Raises NotWrittenError when it was certainly not carried out, LeadershipLostError
        when that is unknown.
        """
        problem = ""
        while self.leads():
            # Shielded: a transaction that etcd carries out must not be reported as undone.
            with trio.move_on_after(self.patience(), shield=True) as patience:
                try:
                    return await self._client.transact(comparisons, success, failure)
                except EtcdUnavailableError as error:
                    problem = str(error)
                    await trio.sleep(_TRANSACTION_RETRY_SECONDS)
                except EtcdRefusedError as error:
                    if problem:
                        # An earlier try may have been carried out, or may be yet.
                        raise self.lose(f"it is not known what etcd holds: {error}") from error
                    raise NotWrittenError(str(error), no_space=error.no_space) from error
            if patience.cancelled_caught:
                problem = problem or "etcd did not answer in time"
        raise self.lose(f"the lease is over; {problem or 'it was not renewed'}")

    async def resign(self) -> None:
        """Revoke the lease, so that another controller leads at once. Nothing may send answers any more."""
        self._until = -math.inf
        if not self._lease:
            return
        with trio.move_on_after(_RESIGN_SECONDS) as patience:
            patience.shield = True
            try:
                await self._client.call("/v3/lease/revoke", {"ID": self._lease})
            except EtcdRequestError as error:
                _logger.info("the lease runs out by itself: %s", error)
        self._lease = ""


def _parse_leader(value: bytes) -> Leader:
    try:
        read = load_json(value)
        return Leader(str(read["by"]), str(read.get("url", "")), str(read.get("since", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Leader("", "an unknown program", "")
