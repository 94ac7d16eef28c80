"""What every engine promises of events and the history: what was acknowledged is there after a restart, in its order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from harness.engines import SITES, Logs, Site, Sited, make_sited
from harness.strategies import BEGAN

from orchard.schema import EndedVM, Event
from orchard.storage.errors import StorageError, StorageFullError, StorageUnavailableError
from orchard.storage.event_pages import EventKinds
from orchard.storage.events import EventLog

A, B, C = (f"{letter * 8}-0000-4000-8000-000000000000" for letter in "abc")


@pytest.fixture(params=SITES)
def sited(request: pytest.FixtureRequest, tmp_path: Path) -> Sited:
    return make_sited(request.param, tmp_path)


def lines(*numbers: int, size: int = 0) -> list[Event]:
    return [Event("log_line", f"{number:06}{'x' * size}", number) for number in numbers]


async def page(
    log: EventLog, uid: str, limit: int | None = None, order: Literal["asc", "desc"] = "asc", cursor: str | None = None
) -> tuple[list[str], str | None]:
    """Return the payloads of a page without what fills them up, and the cursor of the next page."""
    found, following = await log.page(uid, limit, order, cursor, EventKinds(lifecycle=True))
    if not isinstance(found, bytes):
        pieces: list[bytes] = []

        async def send(piece: bytes) -> None:
            await trio.lowlevel.checkpoint()
            pieces.append(piece)

        await found(send)
        found = b"".join(pieces)
    return [event["payload"].rstrip("x") for event in json.loads(found)], following


async def all_of(log: EventLog, uid: str) -> list[str]:
    return (await page(log, uid))[0]


def payloads(count: int) -> list[str]:
    return [f"{number:06}" for number in range(count)]


def test_events_are_in_their_order_after_restarts_and_pages_go_on(sited: Sited) -> None:
    async def work(site: Site) -> None:
        expected = payloads(60)
        cursor: str | None = None
        paged: list[str] = []
        for start in range(0, 60, 20):
            async with site.opened_logs(A, B) as (events, _):
                # Larger than what is read at once, and than what etcd takes at once.
                await events.append(A, lines(*range(start, start + 8), size=12_000))
                for number in range(start + 8, start + 20):
                    await events.append(A, lines(number))
                    await events.append(B, lines(number))
                some, cursor = await page(events, A, 15, "asc", cursor)
                paged += some
        async with site.opened_logs(A, B) as (events, _):
            assert await all_of(events, A) == expected
            assert len(await all_of(events, B)) == 36
            assert (await page(events, A, order="desc"))[0] == expected[::-1]
            while cursor is not None:
                some, cursor = await page(events, A, 7, "asc", cursor)
                paged += some
            assert paged == expected

    sited.run(work)


def test_lifecycle_events_stay_between_the_events_that_they_came_between(sited: Sited) -> None:
    async def work(site: Site) -> None:
        for number in range(0, 6, 2):
            async with site.opened_logs(A) as (events, _):
                await events.append(A, lines(number))
                events.record(A, f"state {number}", number)
                await events.flush()
                await events.append(A, lines(number + 1))
                await events.flush()
        async with site.opened_logs(A) as (events, _):
            # Each restart writes nothing anew.
            texts = await all_of(events, A)
        expected = [[f"{number:06}", f"state {number}", f"{number + 1:06}"] for number in range(0, 6, 2)]
        assert texts == [text for part in expected for text in part]

    sited.run(work)


def test_events_of_a_vm_that_is_gone_are_gone(sited: Sited) -> None:
    """Whether the controller dropped them, or ended before it did."""

    async def work(site: Site) -> None:
        async with site.opened_logs(A, B) as (events, _):
            for uid in (A, B):
                await events.append(uid, lines(0))
            events.drop(A)
            await events.append(B, lines(1))
        async with site.opened_logs(B) as (events, _):
            assert await all_of(events, B) == ["000000", "000001"]
            assert await all_of(events, A) == []
        async with site.opened_logs(C) as (events, _):
            await events.append(C, lines(0))
        async with site.opened_logs(A, B) as (events, _):
            # No VM gets the uid of another one. Here it shows that nothing is left.
            for uid in (A, B):
                await events.append(uid, lines(5))
                assert await all_of(events, uid) == ["000005"]

    sited.run(work)


def test_refused_events_are_not_stored_and_later_ones_are(sited: Sited) -> None:
    async def work(site: Site) -> None:
        async with site.opened_logs(A) as (events, _):
            await events.append(A, lines(0))
            await site.fill()
            with pytest.raises(StorageFullError):
                await events.append(A, lines(1, size=200_000))
            assert await all_of(events, A) == ["000000"]
            await site.free()
            with trio.fail_after(300):
                while True:
                    try:
                        await events.append(A, lines(2))
                        break
                    except StorageError:
                        await trio.sleep(0.1)
        async with site.opened_logs(A) as (events, _):
            assert await all_of(events, A) == ["000000", "000002"]

    sited.run(work)


def test_events_are_not_acknowledged_when_it_is_not_known_whether_they_are_stored(sited: Sited) -> None:
    async def work(site: Site) -> None:
        async with site.opened_logs(A) as (events, _):
            await events.append(A, lines(0))
            site.lose_writes()
            for number in (1, 2):
                with pytest.raises(StorageUnavailableError):
                    await events.append(A, lines(number))
        async with site.opened_logs(A) as (events, _):
            found = await all_of(events, A)
            await events.append(A, lines(3))
            assert await all_of(events, A) == [*found, "000003"]
        assert found in (["000000"], ["000000", "000001"])

    sited.run(work)


def ended(number: int) -> EndedVM:
    return EndedVM(name=f"vm-{number}", uid=f"uid-{number}", ended_at=BEGAN)


def names(logs: Logs) -> list[Any]:
    return [json.loads(text)["name"] for text in logs.history.select(None, None)]


def test_history_is_in_its_order_after_restarts(sited: Sited) -> None:
    async def work(site: Site) -> None:
        for start in range(0, 30, 10):
            async with site.opened_logs() as logs:
                assert names(logs) == [f"vm-{number}" for number in range(start)]
                for number in range(start, start + 10):
                    logs.history.add(ended(number))
                    if number % 3 == 0:
                        await logs.history.flush()
                await logs.history.flush()
        async with site.opened_logs() as logs:
            assert names(logs) == [f"vm-{number}" for number in range(30)]

    sited.run(work)
