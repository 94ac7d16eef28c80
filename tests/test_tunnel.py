"""The rendezvous over memory streams, on a virtual clock: watches, requests to workers, relays, and silent peers."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from harness.peers import Ends, pair
from trio.testing import wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream

from orchard import tunnel
from orchard.net import websocket
from orchard.net.wsframes import BINARY, CLOSE, PONG, Close
from orchard.resources.cluster import MAX_PENDING_OF_VM
from orchard.tunnel import (
    CLAIM_SECONDS,
    LEAST_SECONDS,
    PONG_SECONDS,
    PendingRequest,
    Rendezvous,
    UnknownSessionError,
    UnreachableError,
    WorkerEnd,
    close_to_relay,
)


@asynccontextmanager
async def watch_pair() -> AsyncIterator[
    tuple[WebSocketConnection, WebSocketConnection, trio.testing.MemorySendStream]
]:  # fmt: skip
    """Yield both ends of a watch, the controller's and the worker's, and the stream that the worker's end writes to.

    Pings keep the virtual clock going, so a wait that never ends fails after a virtual hour.
    """
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            ends: list[WebSocketConnection] = []

            async def accept() -> None:
                ends.append(await (await wrap_server_stream(nursery, ours)).accept())

            nursery.start_soon(accept)
            # trio-websocket declares sockets and TLS, and uses what any stream has.
            worker = await wrap_client_stream(nursery, theirs, "h", "/")  # type: ignore[arg-type]
            await wait_all_tasks_blocked()
            yield ends[0], worker, theirs.send_stream
            nursery.cancel_scope.cancel()


async def serve(
    rendezvous: Rendezvous, worker: str, websocket: WebSocketConnection, pongs: list[float], cancels: bool = False
) -> None:
    try:
        await rendezvous.serve(worker, "account", lambda: pongs.append(trio.current_time()), websocket, cancels=cancels)
    except* ConnectionClosed:
        pass


async def next_action(worker: WebSocketConnection) -> Any:
    message = await worker.get_message()
    assert isinstance(message, bytes), "actions are binary messages"
    return json.loads(message)


class Asked:
    """A request that its own task sends. `answer` is the answer, or the UnreachableError that was raised."""

    def __init__(self, nursery: trio.Nursery, ask: Callable[[], Awaitable[object]]) -> None:
        self.answer: object = None
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        nursery.start_soon(self._run, ask)

    async def _run(self, ask: Callable[[], Awaitable[object]]) -> None:
        with self.scope:
            try:
                self.answer = await ask()
            except UnreachableError as error:
                self.answer = error
        self.done.set()


def ask_address(nursery: trio.Nursery, rendezvous: Rendezvous, vm_uid: str = "uid", worker: str = "w") -> Asked:
    return Asked(nursery, lambda: rendezvous.ask_address(worker, vm_uid, 3000))


# ---- watches -------------------------------------------------------------------------------------------------------


async def test_sync_action_is_queued_once(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        assert await next_action(worker) == {"syncVMsAction": {}}
        for _ in range(100):
            rendezvous.sync("w")
            rendezvous.sync("another")
        assert await next_action(worker) == {"syncVMsAction": {}}
        with trio.move_on_after(5) as patience:
            await worker.get_message()
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_each_pong_is_reported_and_pings_draw_no_shared_random_numbers(autojump_clock: Any) -> None:
    rendezvous = Rendezvous(ping_interval=10)
    pongs: list[float] = []
    before = random.getstate()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, pongs)
        await worker.get_message()
        await trio.sleep(35)
        assert pongs == [0, 10, 20, 30]
        assert random.getstate() == before, "the common random numbers are the embedding program's"
        nursery.cancel_scope.cancel()


async def test_watch_without_pongs_ends_within_two_intervals(autojump_clock: Any) -> None:
    rendezvous = Rendezvous(ping_interval=10)
    async with watch_pair() as (ours, worker, answers):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, rendezvous, "w", ours, [])
            await worker.get_message()
            await trio.sleep(1)
            answers.send_all_hook = trio.sleep_forever
            await wait_all_tasks_blocked()
        assert not rendezvous._watches
        assert trio.current_time() <= 21


async def test_newest_watch_of_a_worker_replaces_the_older_one(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (first, first_worker, _), watch_pair() as (second, second_worker, _):
        async with trio.open_nursery() as nursery:
            replaced = trio.Event()

            async def serve_first() -> None:
                await serve(rendezvous, "w", first, [])
                replaced.set()

            nursery.start_soon(serve_first)
            await first_worker.get_message()
            nursery.start_soon(serve, rendezvous, "w", second, [])
            await replaced.wait()
            await second_worker.get_message()
            rendezvous.sync("w")
            assert await next_action(second_worker) == {"syncVMsAction": {}}
            await second_worker.aclose()
        assert rendezvous._watches == {}


async def test_watch_that_answers_a_ping_is_connected_and_another_one_ends(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    assert not await rendezvous.is_connected("w")
    async with watch_pair() as (ours, worker, stream), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        await worker.get_message()
        assert await rendezvous.is_connected("w")
        # From now on nothing of the worker arrives.
        stream.send_all_hook = trio.sleep_forever
        began = trio.current_time()
        assert not await rendezvous.is_connected("w")
        assert trio.current_time() == began + PONG_SECONDS
        await wait_all_tasks_blocked()
        assert not rendezvous.has_watch("w")


async def test_messages_of_a_worker_on_its_watch_are_ignored_until_it_closes(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        await worker.get_message()
        for message in ("text", b"\xff", b"", "{}"):
            await worker.send_message(message)
        rendezvous.sync("w")
        assert await next_action(worker) == {"syncVMsAction": {}}
        await worker.aclose(4000, "enough")
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks
        assert rendezvous._watches == {}


# ---- requests to workers -------------------------------------------------------------------------------------------


async def test_request_is_answered_once_and_by_the_account_it_was_sent_to(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        await worker.get_message()
        asked = Asked(nursery, lambda: rendezvous.ask_port("w", "uid", 22, 3000))
        action = await next_action(worker)
        session = action["portForwardAction"]["session"]
        assert action == {"portForwardAction": {"session": session, "vmUID": "uid", "port": 22}}
        with pytest.raises(UnknownSessionError):
            rendezvous.answer_port(session, "another account")
        with pytest.raises(UnknownSessionError):
            rendezvous.answer_address(session, "account")
        rendezvous.answer_port(session, "account").fail("no such port")
        await asked.done.wait()
        assert isinstance(asked.answer, UnreachableError)
        assert str(asked.answer) == 'worker "w": no such port'
        with pytest.raises(UnknownSessionError):
            rendezvous.answer_port(session, "account")

        asked = ask_address(nursery, rendezvous)
        session = (await next_action(worker))["resolveIPAction"]["session"]
        asked.scope.cancel()
        await asked.done.wait()
        with pytest.raises(UnknownSessionError):
            rendezvous.answer_address(session, "account")
        assert not rendezvous._ports
        assert not rendezvous._addresses
        nursery.cancel_scope.cancel()


async def test_request_that_was_cancelled_is_not_sent(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        sent = trio.Event()
        worker_takes = ours.send_message

        async def hold(message: Any) -> None:
            await sent.wait()
            await worker_takes(message)

        # The first action keeps the watch busy, so the requests stay in its queue.
        ours.send_message = hold  # type: ignore[method-assign]
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        await wait_all_tasks_blocked()
        for _ in range(3):
            asked = ask_address(nursery, rendezvous)
            await wait_all_tasks_blocked()
            asked.scope.cancel()
            await asked.done.wait()
        ask_address(nursery, rendezvous, "another")
        await wait_all_tasks_blocked()
        sent.set()
        assert await next_action(worker) == {"syncVMsAction": {}}
        assert (await next_action(worker))["resolveIPAction"]["vmUID"] == "another"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cancels", [False, True])
async def test_worker_is_told_that_nobody_waits_for_a_request_if_it_understands(
    autojump_clock: Any, cancels: bool
) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [], cancels)
        assert await next_action(worker) == {"syncVMsAction": {}}
        first = ask_address(nursery, rendezvous)
        session = (await next_action(worker))["resolveIPAction"]["session"]
        second = ask_address(nursery, rendezvous)
        await wait_all_tasks_blocked()
        for asker in (first, second):
            asker.scope.cancel()
            await asker.done.wait()
        rendezvous.sync("w")
        told = [await next_action(worker) for _ in range(2 if cancels else 1)]
        cancelled: list[dict[str, Any]] = [{"cancelRequestAction": {"session": session}}] if cancels else []
        assert told == [*cancelled, {"syncVMsAction": {}}]
        nursery.cancel_scope.cancel()


async def test_request_sent_over_a_dead_watch_is_sent_again_over_the_next(autojump_clock: Any) -> None:
    """A worker that was killed and restarted answers the requests that were made meanwhile."""
    rendezvous = Rendezvous()
    async with (
        watch_pair() as (first, first_worker, _),
        watch_pair() as (second, second_worker, _),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, rendezvous, "w", first, [])
        await first_worker.get_message()
        asked, answered = ask_address(nursery, rendezvous), ask_address(nursery, rendezvous, "other")
        sessions = {}
        for _ in range(2):
            action = (await next_action(first_worker))["resolveIPAction"]
            sessions[action["vmUID"]] = action["session"]
        rendezvous.answer_address(sessions["other"], "account").resolve("127.0.0.1")
        await answered.done.wait()
        await first_worker.aclose()
        await wait_all_tasks_blocked()
        nursery.start_soon(rendezvous.serve, "w", "another account", lambda: None, second)
        actions = [await next_action(second_worker) for _ in range(2)]
        assert actions == [{"syncVMsAction": {}}, {"resolveIPAction": {"session": sessions["uid"], "vmUID": "uid"}}]
        with pytest.raises(UnknownSessionError):
            rendezvous.answer_address(sessions["uid"], "account")
        rendezvous.answer_address(sessions["uid"], "another account").resolve("127.0.0.2")
        await asked.done.wait()
        assert asked.answer == "127.0.0.2"
        nursery.cancel_scope.cancel()


async def test_number_of_pending_requests_is_bounded(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "MAX_PENDING", 2)
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, _worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        await wait_all_tasks_blocked()
        first, _second = ask_address(nursery, rendezvous, "1"), ask_address(nursery, rendezvous, "2")
        await wait_all_tasks_blocked()
        with pytest.raises(UnreachableError, match="2 requests"):
            await rendezvous.ask_port("w", "3", 22, 3000)
        first.scope.cancel()
        await first.done.wait()
        fourth = ask_address(nursery, rendezvous, "4")
        await wait_all_tasks_blocked()
        assert not fourth.done.is_set()
        assert len(rendezvous._addresses) == 2
        nursery.cancel_scope.cancel()


async def test_holders_of_one_vms_tokens_cannot_keep_others_from_asking(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "MAX_PENDING_OF_VM", 5)
    monkeypatch.setattr(tunnel, "MAX_PENDING_OF_SENDER", 3)
    monkeypatch.setattr(tunnel, "MAX_ASKED_OF_VM", 2)
    rendezvous = Rendezvous()

    def ask(vm_uid: str, sender: str) -> Asked:
        return Asked(nursery, lambda: rendezvous.ask_port("w", vm_uid, 22, 3000, sender=sender))

    async with watch_pair() as (ours, _worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        asked = []
        for sender in ("token 1", "token 1", "token 1", "token 1", "token 2", "token 2", "token 2"):
            asked.append(ask("vm", sender))
            await wait_all_tasks_blocked()
        refused = [isinstance(one.answer, UnreachableError) for one in asked]
        assert refused == [False, False, False, True, False, False, True], "three of a sender, five for a VM"
        assert len(rendezvous._ports) == 2, "its worker works on two at a time"
        other = ask("another VM", "account")
        await wait_all_tasks_blocked()
        assert [request.vm_uid for request in rendezvous._ports.values()] == ["vm", "vm", "another VM"]
        first = next(iter(rendezvous._ports))
        rendezvous.answer_port(first, "account").fail("no such port")
        await asked[0].done.wait()
        await wait_all_tasks_blocked()
        assert len(rendezvous._ports) == 3, "the next one has its turn"
        assert not other.done.is_set()
        nursery.cancel_scope.cancel()
    assert not rendezvous._waiting
    assert not rendezvous._turns


async def test_worker_that_does_not_answer_cannot_keep_others_from_the_hosts_of_other_workers(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "MAX_ASKED_OF_VM", 2)
    rendezvous = Rendezvous()

    def ask(worker: str) -> Asked:
        return Asked(nursery, lambda: rendezvous.ask_port(worker, "", 22, 3000))

    async with watch_pair() as (sick, _, _), watch_pair() as (well, _, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "sick", sick, [])
        nursery.start_soon(serve, rendezvous, "well", well, [])
        for worker in ("sick", "sick", "sick", "well"):
            ask(worker)
            await wait_all_tasks_blocked()
        assert [request.worker for request in rendezvous._ports.values()] == ["sick", "sick", "well"]
        nursery.cancel_scope.cancel()
    assert not rendezvous._turns


async def test_one_request_for_an_address_serves_all_that_ask(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        await wait_all_tasks_blocked()
        first = ask_address(nursery, rendezvous)
        await wait_all_tasks_blocked()
        asked = [ask_address(nursery, rendezvous) for _ in range(400)]
        await wait_all_tasks_blocked()
        assert len(rendezvous._addresses) == 1
        # The one that sent the request goes away.
        first.scope.cancel()
        await first.done.wait()
        (session,) = rendezvous._addresses
        rendezvous.answer_address(session, "account").resolve("10.1.2.3")
        for one in asked[:256]:
            await one.done.wait()
        answers = [one.answer for one in asked]
        assert answers.count("10.1.2.3") == MAX_PENDING_OF_VM - 1, "the first one counts, too"
        assert await next_action(worker) == {"syncVMsAction": {}}
        assert "resolveIPAction" in await next_action(worker)
        nursery.cancel_scope.cancel()


async def test_request_waits_until_its_worker_connects(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with watch_pair() as (ours, worker, _), watch_pair() as (others, other, _), trio.open_nursery() as nursery:
        asked = ask_address(nursery, rendezvous, worker="w")
        ask_address(nursery, rendezvous, worker="another")
        nursery.start_soon(serve, rendezvous, "another", others, [])
        assert await next_action(other) == {"syncVMsAction": {}}
        assert "resolveIPAction" in await next_action(other)
        assert not asked.done.is_set()
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        assert await next_action(worker) == {"syncVMsAction": {}}
        assert "resolveIPAction" in await next_action(worker)
        nursery.cancel_scope.cancel()


async def test_worker_has_a_minimum_time_to_answer_a_request(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    with pytest.raises(UnreachableError, match='worker "w" did not connect'):
        await rendezvous.ask_address("w", "uid", trio.current_time())
    assert trio.current_time() == LEAST_SECONDS
    async with watch_pair() as (ours, _worker, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, rendezvous, "w", ours, [])
        with pytest.raises(UnreachableError, match='worker "w" did not answer'):
            await rendezvous.ask_address("w", "uid", trio.current_time() + 3 * LEAST_SECONDS)
        assert trio.current_time() == 4 * LEAST_SECONDS
        nursery.cancel_scope.cancel()


# ---- relays --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def relay(rendezvous: Rendezvous, *, narrow: bool = False) -> AsyncIterator[tuple[Ends, Ends, trio.Event]]:
    """Relay between the WebSockets of a client and a worker. Yield both, and an event that is set when the relay ends."""
    interval = rendezvous.ping_interval
    async with (
        pair(ping_interval=interval, narrow=narrow) as client,
        pair(ping_interval=interval, narrow=narrow) as worker,
        trio.open_nursery() as nursery,
    ):
        request = PendingRequest[WorkerEnd]("w", "portForwardAction", "uid")
        ended, returned = trio.Event(), trio.Event()

        async def serve_worker() -> None:
            await rendezvous.lend(request, worker.end)
            returned.set()

        async def serve_client() -> None:
            await (await request.wait_answered()).relay(client.end)
            with trio.fail_after(1):
                await returned.wait()
            assert not rendezvous._ends
            ended.set()

        nursery.start_soon(serve_worker)
        nursery.start_soon(serve_client)
        await wait_all_tasks_blocked()
        yield client, worker, ended
        nursery.cancel_scope.cancel()


async def test_silent_tunnel_with_a_dead_end_is_closed_within_two_ping_intervals(autojump_clock: Any) -> None:
    async with relay(Rendezvous(ping_interval=10)) as (client, worker, ended), trio.open_nursery() as nursery:

        async def live() -> None:
            while not any(isinstance(event, Close) for event in await client.peer.events()):
                await client.peer.send(PONG)
            told.set()

        told = trio.Event()
        nursery.start_soon(live)
        await worker.peer.send(BINARY, b"x")
        await told.wait()
        assert 10 < trio.current_time() <= 20
        await client.peer.send(CLOSE)
        await ended.wait()
        assert client.end.closed == Close(1011, "the worker does not answer to pings")


async def test_close_of_one_side_is_relayed_after_all_bytes(autojump_clock: Any) -> None:
    async with relay(Rendezvous()) as (client, worker, ended):
        await client.peer.send(BINARY, b"last words")
        await client.peer.send(CLOSE, b"\x0f\xa0enough")
        assert await worker.peer.events() == [b"last words"]
        assert await worker.peer.events() == [Close(4000, "the client closed it: enough")]
        await worker.peer.send(CLOSE)
        await ended.wait()
        assert await client.peer.rest() == [Close(4000, "enough")]
        assert trio.current_time() == 0


async def test_busy_tunnel_that_is_ended_tells_both_sides_the_reason(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with relay(rendezvous, narrow=True) as (client, worker, ended), trio.open_nursery() as nursery:
        nursery.start_soon(worker.peer.send, BINARY, b"x" * 10_000_000)
        await wait_all_tasks_blocked()
        rendezvous.end_tunnels("uid", "the VM is gone")
        rendezvous.end_tunnels("uid", "a second reason")
        await wait_all_tasks_blocked()
        *parts, close = await client.peer.rest()
        assert parts
        assert close == Close(1001, "the VM is gone")
        assert await worker.peer.rest() == [close]
        await client.peer.send(CLOSE)
        await worker.peer.stream.aclose()
        await ended.wait()
        nursery.cancel_scope.cancel()


async def test_memory_of_a_tunnel_whose_client_does_not_read_is_bounded(autojump_clock: Any) -> None:
    async with relay(Rendezvous(), narrow=True) as (_, worker, _):
        sent = 0

        async def pour() -> None:
            nonlocal sent
            while True:
                await worker.peer.send(BINARY, b"x" * 10_000)
                sent += 10_000

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            await trio.sleep(1000)
            assert 0 < sent <= 3 * (websocket._READ_AHEAD_BYTES + websocket._RECEIVE_BYTES)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("early", [b"", b"greeting"])
async def test_workers_end_that_is_not_used_is_closed_after_a_time(autojump_clock: Any, early: bytes) -> None:
    rendezvous = Rendezvous()
    async with pair() as worker:
        if early:
            await worker.peer.send(BINARY, early)
        await worker.peer.send(CLOSE)
        request = PendingRequest[WorkerEnd]("w", "portForwardAction", "uid")
        await rendezvous.lend(request, worker.end)
        assert trio.current_time() == CLAIM_SECONDS
        with (await request.wait_answered()).borrow() as stream:
            assert await stream.receive_some() == early


@pytest.mark.parametrize("moment", ["before the worker's end", "with it"])
async def test_workers_end_is_closed_at_once_when_its_client_has_gone(autojump_clock: Any, moment: str) -> None:
    rendezvous = Rendezvous()
    async with pair() as worker:
        request = PendingRequest[WorkerEnd]("w", "portForwardAction", "uid")
        async with trio.open_nursery() as client:
            client.start_soon(request.wait_answered)
            await wait_all_tasks_blocked()
            client.cancel_scope.cancel()
            if moment == "with it":
                # The client's task has not run yet.
                await rendezvous.lend(request, worker.end)
        await rendezvous.lend(request, worker.end)
        assert trio.current_time() == 0
        assert not rendezvous._ends


async def test_borrowed_end_is_kept_until_its_block_ends_and_cancelled_when_the_vm_ends(autojump_clock: Any) -> None:
    rendezvous = Rendezvous()
    async with pair() as worker, trio.open_nursery() as nursery:
        request = PendingRequest[WorkerEnd]("w", "portForwardAction", "uid")
        returned: list[float] = []

        async def lend() -> None:
            await rendezvous.lend(request, worker.end)
            returned.append(trio.current_time())

        nursery.start_soon(lend)
        end = await request.wait_answered()

        async def use() -> None:
            with end.borrow():
                await trio.sleep(10 * CLAIM_SECONDS)
                assert returned == []
                rendezvous.end_tunnels("another", "another VM is gone")
                await trio.sleep(1)
                rendezvous.end_tunnels("uid", "the VM is gone")
                await trio.sleep_forever()

        with pytest.raises(UnreachableError, match="the VM is gone"):
            await use()
        await wait_all_tasks_blocked()
        assert returned == [10 * CLAIM_SECONDS + 1]


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        (None, (1011, "the connection to the client was lost")),
        (Close(1006), (1011, "the connection to the client was lost")),
        (Close(1006, "does not answer to pings"), (1011, "the client does not answer to pings")),
        (
            Close(1002, "a reserved bit is set", is_violation=True),
            (1011, "the client broke the protocol: a reserved bit is set"),
        ),
        # Browsers send this when the page gave no code.
        (Close(1005), (1000, "")),
        (Close(1000, "bye"), (1000, "")),
        (Close(1001), (1001, "the client closed it")),
        (Close(4000, "enough"), (4000, "the client closed it: enough")),
    ],
)
def test_close_code_and_reason_that_the_other_side_is_told(closed: Close | None, expected: tuple[int, str]) -> None:
    assert close_to_relay(closed, "the client") == expected
