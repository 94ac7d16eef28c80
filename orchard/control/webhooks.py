"""Webhooks: signed POST requests that tell other systems what needs attention (docs/webhooks.md).

A notification comes from a durable change (a VM has failed), from a look at a worker whose state or disk has changed, or
from the survey of all workers and waiting VMs every SURVEY_SECONDS. A look waits until all that it may see is durable.
Each URL has a bounded queue and one task, which sends one request at a time and repeats it until the receiver has taken
it. Nothing is stored: notifications that wait are lost with the process.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import logging
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import trio

from orchard.base.nursery import Wakeup, visit_in_steps
from orchard.codec import dump_json, format_time, shortened
from orchard.control.scheduling_loop import SchedulingLoop
from orchard.net import tcp
from orchard.net.outside import connect_outside
from orchard.net.transport import ClientError, Transport
from orchard.net.urls import bracketed
from orchard.resources.cluster import Webhook, WebhookEvent
from orchard.schema import VM, Worker
from orchard.state.changes import Change
from orchard.storage.errors import StorageError
from orchard.store import Store

# The most notifications that wait for one URL. Beyond it the oldest is dropped. A receiver that is down costs about a
# megabyte, and at most 20 if all VMs have as much metadata as they may.
MAX_WAITING_EVENTS = 1_000
# Pauses between attempts double from the first to the last. A notification that was not taken for so long is dropped.
_FIRST_PAUSE, LAST_WEBHOOK_PAUSE, GIVE_UP_SECONDS = 1.0, 60.0, 3600.0
# Limits for the connection, and for the head of the answer.
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 10.0
# Interval of looking at all workers and VMs. A condition that lasts for less than HOLD_SECONDS, such as the absence of
# a worker that is restarted, is not notified.
SURVEY_SECONDS, HOLD_SECONDS = 15.0, 30.0
# A queue is old when a VM has waited for so long.
OLD_QUEUE_SECONDS = 600.0
# Free disk space below the cluster's minFreeDiskGB, or else LOW_DISK_GB, is low until it exceeds _ENOUGH times that.
LOW_DISK_GB, _ENOUGH = 10, 1.1
_BYTES_PER_GB = 10**9
# Objects that are looked at in one step of the event loop.
_PER_STEP = 200
# Characters of a message.
_MAX_MESSAGE = 512
# The least interval of log lines about one URL.
_LOG_SECONDS = 60.0

_logger = logging.getLogger("orchard.webhooks")


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """Return the value of the header Orchard-Signature: HMAC-SHA256 over the timestamp, a full stop and the body."""
    digest = hmac.new(secret.encode(), b"%d.%b" % (timestamp, body), hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Notification:
    """An event, the time when it was queued (by trio's clock), and the body of its request."""

    event: WebhookEvent
    id: str
    queued_at: float
    body: bytes = field(repr=False)


class WebhookSender:
    """Sends the notifications of one webhook, the earliest first. `connect` opens connections, `clock` is the wall clock."""

    def __init__(
        self, webhook: Webhook, results: Counter[str], connect: tcp.Connect, clock: Callable[[], datetime.datetime]
    ) -> None:
        self.webhook = webhook
        self.waiting: deque[Notification] = deque()
        # Why the last attempt failed, "" if it did not. None: there was none.
        self.problem: str | None = None
        self.scope = trio.CancelScope()
        parts = urlsplit(webhook.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        # Messages show only this part of the URL, because the rest may be a secret.
        self._origin = f"{parts.scheme}://{bracketed(parts.hostname or '')}:{port}"
        self._transport: Transport | None = None
        self._results = results
        self._connect = connect
        self._clock = clock
        self._arrived = Wakeup()
        self._logged_at = -_LOG_SECONDS

    def put(self, notification: Notification) -> None:
        """Queue a notification. The oldest one is dropped if there are too many."""
        if len(self.waiting) >= MAX_WAITING_EVENTS:
            self.waiting.popleft()
            self._results["dropped"] += 1
        self.waiting.append(notification)
        self._arrived.set()

    async def run(self) -> None:
        """Send until cancelled."""
        with self.scope:
            while True:
                while not self.waiting:
                    await self._arrived.wait()
                await self._deliver(self.waiting[0])

    async def _deliver(self, first: Notification) -> None:
        """Send one notification until it is taken, too old, or dropped."""
        pause = _FIRST_PAUSE
        while self.waiting and self.waiting[0] is first:
            if trio.current_time() - first.queued_at > GIVE_UP_SECONDS:
                self._end(first, "dropped")
                return
            self.problem = await self._attempt(first)
            if not self.problem:
                self._end(first, "delivered")
                return
            self._results["failed"] += 1
            self._log()
            await trio.sleep(pause)
            pause = min(LAST_WEBHOOK_PAUSE, 2 * pause)

    def _end(self, notification: Notification, result: str) -> None:
        # The notification may have been dropped while it was being sent.
        if self.waiting and self.waiting[0] is notification:
            self.waiting.popleft()
            self._results[result] += 1

    async def _attempt(self, notification: Notification) -> str:
        """Send a notification once. Return why it was not taken, or ""."""
        now = int(self._clock().timestamp())
        headers = [
            ("Orchard-Event", notification.event),
            ("Orchard-Delivery", notification.id),
            ("Orchard-Timestamp", str(now)),
            ("Orchard-Signature", signature(self.webhook.secret, now, notification.body)),
        ]
        parts = urlsplit(self.webhook.url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            # After a failure the CAs are read again.
            if self._transport is None:
                self._transport = Transport(
                    self._origin,
                    connect_seconds=_CONNECT_SECONDS,
                    answer_seconds=_ANSWER_SECONDS,
                    connect=self._connect,
                )
            status = await self._transport.post(target, notification.body, headers)
        except (ClientError, ValueError) as error:
            self._transport = None
            return str(error)
        return "" if 200 <= status < 300 else f"{self._origin} answered {status}, expected 200 to 299"

    def _log(self) -> None:
        if trio.current_time() - self._logged_at >= _LOG_SECONDS:
            self._logged_at = trio.current_time()
            fields = {"webhook": self._origin, "reason": self.problem, "waiting": len(self.waiting)}
            _logger.warning("webhook request failed, retrying", extra=fields)


class Webhooks:
    """The webhooks of a cluster, as its settings have them. `run` must be running.

    `failure_of` returns why a VM has failed, in one word. `connect` opens connections. `clock` is the wall clock by
    which times are stored.
    """

    def __init__(
        self,
        store: Store,
        loop: SchedulingLoop,
        failure_of: Callable[[VM, VM], str],
        clock: Callable[[], datetime.datetime],
        connect: tcp.Connect = connect_outside,
    ) -> None:
        # Requests by result: "delivered", "failed" (and repeated), "dropped".
        self.results: Counter[str] = Counter(dict.fromkeys(("delivered", "failed", "dropped"), 0))
        self._store = store
        self._loop = loop
        self._failure_of = failure_of
        self._clock = clock
        self._connect = connect
        self._senders: dict[str, WebhookSender] = {}
        # Conditions that were notified and have not ended: event, and name of a worker, uid of a VM, or "".
        self._told: set[tuple[WebhookEvent, str]] = set()
        # Worker -> the time when it was first found offline, by trio's clock.
        self._absent: dict[str, float] = {}
        # Workers that have changed since the last look, and when the next look at all is due.
        self._changed_workers: set[str] = set()
        self._survey_at = 0.0
        self._changed = Wakeup()
        store.on_durable(self._follow)
        loop.states.on_change(self._note_worker)
        loop.liveness.facts.on_change(self._note_worker)

    def status(self, url: str) -> str:
        """Return the outcome of the last request to a URL as a sentence; "" if there was none."""
        sender = self._senders.get(url)
        if sender is None or sender.problem is None:
            return ""
        return f"failing: {sender.problem}; {len(sender.waiting)} waiting" if sender.problem else "ok"

    def failing(self) -> int:
        """Return how many webhooks did not take their last request."""
        return sum(1 for sender in self._senders.values() if sender.problem)

    def waiting(self) -> int:
        """Return how many notifications wait, for all URLs together."""
        return sum(len(sender.waiting) for sender in self._senders.values())

    async def run(self) -> None:
        """Send notifications until cancelled."""
        # The senders, and the looks at the cluster, end together.
        async with trio.open_nursery() as nursery:
            due = 0.0
            while True:
                self._use_settings(nursery)
                with trio.move_on_at(due if self._senders else float("inf")):
                    await self._changed.wait()
                due = await self._look()

    def _use_settings(self, nursery: trio.Nursery) -> None:
        """Start and end senders so that there is one for each webhook."""
        wanted = {webhook.url: webhook for webhook in self._store.state.settings.webhooks}
        for url in self._senders.keys() - wanted.keys():
            self._senders.pop(url).scope.cancel()
        for url, webhook in wanted.items():
            if url in self._senders:
                self._senders[url].webhook = webhook
            else:
                sender = self._senders[url] = WebhookSender(webhook, self.results, self._connect, self._clock)
                nursery.start_soon(sender.run)

    # -- what is told

    def _follow(self, changes: list[Change]) -> None:
        for change in changes:
            old, new = change.old, change.new
            if change.kind == "settings":
                self._changed.set()
            elif self._senders and isinstance(old, VM) and isinstance(new, VM) and _has_failed(old, new):
                reason = self._failure_of(old, new)
                self._tell("vm.failed", f'VM "{new.name}" has failed', vm=_described(new) | {"reason": reason})

    def _tell(self, event: WebhookEvent, message: str, **details: Mapping[str, Any]) -> None:
        """Queue a notification for each webhook that wants it."""
        senders = [one for one in self._senders.values() if event in (one.webhook.events or (event,))]
        if not senders:
            return
        key = str(uuid.uuid4())
        time, cluster = format_time(self._clock()), self._store.state.cluster.id
        body = dump_json({"id": key, "event": event, "time": time, "clusterId": cluster, "message": message, **details})
        notification = Notification(event, key, trio.current_time(), body)
        for sender in senders:
            sender.put(notification)

    def _tell_once(self, event: WebhookEvent, name: str, holds: bool) -> bool:
        """Note whether a condition holds. Return whether to notify it: it holds, and was not notified since it began."""
        key = (event, name)
        is_new = holds and key not in self._told
        if holds:
            self._told.add(key)
        else:
            self._told.discard(key)
        return is_new

    # -- the look at workers and VMs

    def _note_worker(self, name: str) -> None:
        if self._senders:
            self._changed_workers.add(name)
            self._changed.set()

    async def _look(self) -> float:
        """Notify conditions that have begun or ended since the last look. Return when the next look is due."""
        if not self._senders:
            return 0.0
        now = trio.current_time()
        names = self._changed_workers | {name for name, due in self._held().items() if due <= now}
        self._changed_workers = set()
        try:
            # A look must not see changes that may be undone.
            await self._store.wait_durable()
        except StorageError:
            self._survey_at = now + SURVEY_SECONDS
            return self._survey_at
        if now >= self._survey_at:
            self._survey_at = now + SURVEY_SECONDS
            await self._survey()
        else:
            workers = self._store.state.workers
            await visit_in_steps(
                {name: workers[name] for name in names & workers.keys()}, _PER_STEP, self._look_at_worker
            )
        return min([self._survey_at, *self._held().values()])

    def _held(self) -> dict[str, float]:
        """Return the offline workers that were not notified yet, each with the time at which that is due."""
        return {
            name: since + HOLD_SECONDS
            for name, since in self._absent.items()
            if ("worker.offline", name) not in self._told and name in self._store.state.workers
        }

    async def _survey(self) -> None:
        state = self._store.state
        await visit_in_steps(state.workers, _PER_STEP, self._look_at_worker)
        waiting: list[VM] = []

        def look_at_vm(vm: VM) -> None:
            if vm.state.status == "pending" and not vm.state.worker:
                waiting.append(vm)
                self._look_at_waiting(vm)

        await visit_in_steps(state.vms, _PER_STEP, look_at_vm)
        self._look_at_queue(min(waiting, key=_waited_since, default=None), len(waiting))
        self._forget_ended({vm.uid for vm in waiting})

    def _look_at_worker(self, worker: Worker) -> None:
        name, now = worker.name, trio.current_time()
        state, since = self._loop.states.observe(worker)
        details = {"name": name, "state": state, "since": format_time(since)}
        if state != "offline":
            self._absent.pop(name, None)
            if ("worker.offline", name) in self._told:
                self._told.discard(("worker.offline", name))
                self._tell("worker.online", f'worker "{name}" is back', worker=details)
        elif now >= self._absent.setdefault(name, now) + HOLD_SECONDS and self._tell_once(
            "worker.offline", name, holds=True
        ):
            reason = self._loop.liveness.why_unavailable(name)
            self._tell("worker.offline", f'worker "{name}" is offline: {reason}', worker=details | {"reason": reason})
        free = self._loop.liveness.facts.free_bytes(name)
        if free is None:
            return
        least = _BYTES_PER_GB * (self._store.state.settings.min_free_disk_gb or LOW_DISK_GB)
        is_low = free < (least * _ENOUGH if ("disk.low", name) in self._told else least)
        if self._tell_once("disk.low", name, is_low):
            message = f'worker "{name}" has {free / _BYTES_PER_GB:.1f} GB of free disk space'
            self._tell("disk.low", message, worker=details | {"freeBytes": free, "leastFreeBytes": least})

    def _look_at_waiting(self, vm: VM) -> None:
        waited = (self._clock() - _waited_since(vm)).total_seconds()
        is_unplaceable = waited >= HOLD_SECONDS and self._loop.planner.placement.waits_for_ever(vm)
        if self._tell_once("vm.unplaceable", vm.uid, is_unplaceable):
            self._tell("vm.unplaceable", f'no worker could ever take VM "{vm.name}"', vm=_described(vm))

    def _look_at_queue(self, oldest: VM | None, waiting: int) -> None:
        seconds = 0.0 if oldest is None else (self._clock() - _waited_since(oldest)).total_seconds()
        if self._tell_once("queue.old", "", seconds > OLD_QUEUE_SECONDS) and oldest is not None:
            queue = {"waiting": waiting, "oldestSeconds": int(seconds), "oldest": _described(oldest)}
            self._tell("queue.old", f'VM "{oldest.name}" has waited {seconds / 60:.0f} minutes', queue=queue)

    def _forget_ended(self, waiting: set[str]) -> None:
        """Forget the conditions of workers that are gone, and of VMs that are not `waiting` (their uids)."""
        workers = self._store.state.workers.keys()
        self._absent = {name: at for name, at in self._absent.items() if name in workers}
        known = {"vm.unplaceable": waiting, "queue.old": {""}, "worker.offline": workers, "disk.low": workers}
        self._told = {(event, name) for event, name in self._told if name in known[event]}


def _has_failed(old: VM, new: VM) -> bool:
    """Return whether a VM has failed with a change. One that was restarted or drained has not failed by itself."""
    return new.state.status == "failed" != old.state.status and not new.state.end_request


def _waited_since(vm: VM) -> datetime.datetime:
    return vm.state.restarted_at or vm.meta.created_at or datetime.datetime.min.replace(tzinfo=datetime.UTC)


def _described(vm: VM) -> dict[str, Any]:
    """Return the part of a VM that notifications show, without the environment of scripts and without passwords."""
    fields = {
        "name": vm.name,
        "uid": vm.uid,
        "image": vm.spec.image,
        "worker": vm.state.worker,
        "createdBy": vm.meta.created_by,
        "metadata": vm.spec.metadata,
        "restarts": vm.state.restart_count,
        "statusMessage": shortened(vm.state.status_message, _MAX_MESSAGE),
    }
    return {name: value for name, value in fields.items() if value not in ("", {})}
