"""The rendezvous over memory streams, on a virtual clock: watches, pings, and what happens when a side stops answering."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream, wrap_server_stream

from orchard import tunnel
from orchard.codec import APIError
from orchard.net.wsframes import Close
from orchard.tunnel import Rendezvous, ending


@asynccontextmanager
async def joined() -> AsyncIterator[tuple[WebSocketConnection, WebSocketConnection, trio.testing.MemorySendStream]]:
    """Two ends of a WebSocket: the controller's, the peer's, and the stream by which the peer's answers come.

    What is waited for in vain fails after a virtual hour: pings would go on forever.
    """
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:
            ends: list[WebSocketConnection] = []

            async def accept() -> None:
                ends.append(await (await wrap_server_stream(nursery, ours)).accept())

            nursery.start_soon(accept)
            peer = await wrap_client_stream(nursery, theirs, "h", "/")  # type: ignore[arg-type]  # any stream does
            await trio.testing.wait_all_tasks_blocked()
            yield ends[0], peer, theirs.send_stream
            nursery.cancel_scope.cancel()


async def serve(board: Rendezvous, worker: str, websocket: WebSocketConnection, pongs: list[float]) -> None:
    try:
        await board.serve(worker, "account", websocket, lambda: pongs.append(trio.current_time()))
    except* ConnectionClosed:
        pass


async def test_a_worker_is_told_once_to_look_however_often_it_is_asked(autojump_clock: Any) -> None:
    board = Rendezvous()
    async with joined() as (ours, peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, board, "w", ours, [])
        assert json.loads(await peer.get_message()) == {"syncVMsAction": {}}
        for _ in range(100):
            board.sync("w")
            board.sync("another")
        message = await peer.get_message()
        assert isinstance(message, bytes), "actions are binary messages"
        assert json.loads(message) == {"syncVMsAction": {}}
        with trio.move_on_after(5) as patience:
            await peer.get_message()
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_a_pong_is_a_sign_of_life(autojump_clock: Any) -> None:
    board = Rendezvous(ping_interval=10)
    pongs: list[float] = []
    chance = random.getstate()
    async with joined() as (ours, peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, board, "w", ours, pongs)
        await peer.get_message()
        await trio.sleep(35)
        assert pongs == [0, 10, 20, 30]
        assert random.getstate() == chance, "it is the embedding program's"
        nursery.cancel_scope.cancel()


async def test_a_peer_that_does_not_answer_is_given_up_within_two_intervals(autojump_clock: Any) -> None:
    board = Rendezvous(ping_interval=10)
    async with joined() as (ours, peer, answers):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, board, "w", ours, [])
            await peer.get_message()
            await trio.sleep(1)
            answers.send_all_hook = trio.sleep_forever
            await trio.testing.wait_all_tasks_blocked()
            while board._watches:  # noqa: ASYNC110 -- on a virtual clock
                await trio.sleep(1)
        assert trio.current_time() <= 21


async def test_the_newest_watch_of_a_name_is_the_one_that_counts(autojump_clock: Any) -> None:
    board = Rendezvous()
    async with joined() as (first, first_peer, _), joined() as (second, second_peer, _):
        async with trio.open_nursery() as nursery:
            replaced = trio.Event()

            async def serve_first() -> None:
                await serve(board, "w", first, [])
                replaced.set()

            nursery.start_soon(serve_first)
            await first_peer.get_message()
            nursery.start_soon(serve, board, "w", second, [])
            await replaced.wait()
            await second_peer.get_message()
            board.sync("w")
            assert json.loads(await second_peer.get_message()) == {"syncVMsAction": {}}
            await second_peer.aclose()
        assert board._watches == {}


async def test_a_question_is_answered_once_by_whom_it_was_put_to(autojump_clock: Any) -> None:
    board = Rendezvous()
    with pytest.raises(APIError, match='worker "w" is not connected'), board.ask("w", "resolveIPAction", "uid"):
        raise AssertionError("nobody could be asked")
    async with joined() as (ours, peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, board, "w", ours, [])
        await peer.get_message()
        with board.ask("w", "portForwardAction", "uid", 22) as session:
            action = json.loads(await peer.get_message())
            assert action == {"portForwardAction": {"session": session.id, "vmUID": "uid", "port": 22}}
            with pytest.raises(APIError, match="does not exist"):
                board.answered(session.id, "another account")
            board.answered(session.id, "account").fail("no such port")
            with pytest.raises(APIError, match='worker "w": no such port') as refused:
                await session.wait()
            assert refused.value.status == 503
            with pytest.raises(APIError) as refused:
                board.answered(session.id, "account")
            assert refused.value.status == 404
        with board.ask("w", "resolveIPAction", "uid") as session:
            pass
        with pytest.raises(APIError, match="does not exist"):
            board.answered(session.id, "account")
        assert board._sessions == {}
        nursery.cancel_scope.cancel()


async def test_a_question_that_nobody_waits_for_any_more_is_not_put(autojump_clock: Any) -> None:
    board = Rendezvous()
    async with joined() as (ours, peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, board, "w", ours, [])
        await board.connected("w")
        await peer.get_message()
        for _ in range(3):
            with board.ask("w", "resolveIPAction", "uid"):
                pass
        with board.ask("w", "resolveIPAction", "another"):
            assert json.loads(await peer.get_message())["resolveIPAction"]["vmUID"] == "another"
        nursery.cancel_scope.cancel()


async def test_a_question_that_was_put_to_a_watch_which_was_dead_is_put_to_the_next(autojump_clock: Any) -> None:
    """So a worker that was killed and started again answers what was asked meanwhile."""
    board = Rendezvous()
    async with (
        joined() as (first, first_peer, _),
        joined() as (second, second_peer, _),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, board, "w", first, [])
        await first_peer.get_message()
        with board.ask("w", "resolveIPAction", "uid") as session, board.ask("w", "resolveIPAction", "other") as other:
            board.answered(other.id, "account").resolve("127.0.0.1")
            for _ in range(2):
                await first_peer.get_message()  # and nothing comes of it
            await first_peer.aclose()
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(board.serve, "w", "another account", second, lambda: None)
            actions = [json.loads(await second_peer.get_message()) for _ in range(2)]
            assert actions == [{"syncVMsAction": {}}, {"resolveIPAction": {"session": session.id, "vmUID": "uid"}}]
            with pytest.raises(APIError, match="does not exist"):
                board.answered(session.id, "account")
            board.answered(session.id, "another account").resolve("127.0.0.2")
            assert await session.wait() == "127.0.0.2"
        nursery.cancel_scope.cancel()


async def test_there_is_an_end_to_questions(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "MAX_SESSIONS", 2)
    board = Rendezvous()
    async with joined() as (ours, _peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, board, "w", ours, [])
        await board.connected("w")
        with board.ask("w", "resolveIPAction", "1"), board.ask("w", "resolveIPAction", "2"):
            with pytest.raises(APIError, match="2 requests wait") as refused, board.ask("w", "resolveIPAction", "3"):
                raise AssertionError("one too many")
            assert refused.value.status == 503
        with board.ask("w", "resolveIPAction", "4"):
            pass
        nursery.cancel_scope.cancel()


async def test_whoever_waits_for_a_worker_goes_on_when_that_one_has_come(autojump_clock: Any) -> None:
    board = Rendezvous()
    came: list[str] = []

    async def wait_for(worker: str) -> None:
        await board.connected(worker)
        came.append(worker)

    async with joined() as (ours, _peer, _), joined() as (others, _, _), trio.open_nursery() as nursery:
        nursery.start_soon(wait_for, "w")
        nursery.start_soon(wait_for, "another")
        nursery.start_soon(serve, board, "another", others, [])
        await trio.testing.wait_all_tasks_blocked()
        assert came == ["another"]
        nursery.start_soon(serve, board, "w", ours, [])
        await trio.testing.wait_all_tasks_blocked()
        assert came == ["another", "w"]
        nursery.cancel_scope.cancel()


async def test_what_a_worker_says_on_its_watch_is_passed_over_until_it_closes(autojump_clock: Any) -> None:
    board = Rendezvous()
    async with joined() as (ours, peer, _), trio.open_nursery() as nursery:
        nursery.start_soon(serve, board, "w", ours, [])
        await peer.get_message()
        for message in ("text", b"\xff", b"", "{}"):
            await peer.send_message(message)
        board.sync("w")
        assert json.loads(await peer.get_message()) == {"syncVMsAction": {}}
        await peer.aclose(4000, "enough")
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
        assert board._watches == {}


@pytest.mark.parametrize(
    ("closed", "told"),
    [
        (None, (1011, "the connection to the client was lost")),
        (Close(1006), (1011, "the connection to the client was lost")),
        (Close(1006, "does not answer to pings"), (1011, "the client does not answer to pings")),
        (
            Close(1002, "a reserved bit is set", is_violation=True),
            (1011, "the client broke the protocol: a reserved bit is set"),
        ),
        (Close(1005), (1000, "")),  # as browsers close that are not given a code
        (Close(1000, "bye"), (1000, "")),
        (Close(1001), (1001, "the client closed it")),
        (Close(4000, "enough"), (4000, "the client closed it: enough")),
    ],
)
def test_how_one_side_learns_that_the_other_has_closed(closed: Close | None, told: tuple[int, str]) -> None:
    assert ending(closed, "the client") == told
