"""An audience sends news to watchers that wait, and leaves those that are slow, cancelled or at their end to their tasks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from orchard.state.watchers import Audience, Block, Watcher

SILENCE = 10.0


class BrokenFilterError(Exception):
    """What is to be sent cannot be told."""


@dataclass
class Client:
    """A client and the lines for it. It takes lines at once unless it is slow."""

    lines: deque[bytes | None] = field(default_factory=deque)
    got: list[bytes] = field(default_factory=list)
    may_take: trio.Event = field(default_factory=trio.Event)
    rest: bytes = b""
    error: Exception | None = None
    # Called with each line that is taken at once.
    on_line: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.may_take.set()

    def take(self) -> bytes | None:
        if self.error is not None:
            raise self.error
        if not self.lines:
            return b""
        return None if self.lines[0] is None else self.lines.popleft()

    def has_more(self) -> bool:
        return bool(self.lines)

    def filler(self) -> bytes:
        return b"filler"

    async def __call__(self, block: Block) -> None:
        await self.may_take.wait()
        await trio.lowlevel.checkpoint()
        self.got += filter(None, (self.rest, b"".join((block,) if isinstance(block, bytes) else block)))
        self.rest = b""

    def now(self, block: Block) -> bool:
        assert isinstance(block, bytes)
        assert not self.rest
        self.on_line()
        if not self.may_take.is_set():
            self.rest = block
            return False
        self.got.append(block)
        return True


class Steps(trio.abc.Instrument):
    """Counts the steps of tasks by the name of their function."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.counts[task.name.rpartition(".")[2]] += 1


class Site:
    """Watchers, each of a client, and an audience that is told what is new for all of them."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.audience = Audience()
        self.watchers: dict[Watcher, Client] = {}
        self._nursery = nursery

    async def watch(self, client: Client | None = None, scope: trio.CancelScope | None = None) -> Client:
        client = client or Client()
        watcher = Watcher(client, client, SILENCE)
        self.watchers[watcher] = client

        async def watch() -> None:
            with scope or trio.CancelScope():
                try:
                    await watcher.run()
                    client.got.append(b"end")
                except BrokenFilterError:
                    client.got.append(b"error")

        self._nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        return client

    def tell(self, line: bytes | None) -> None:
        for client in self.watchers.values():
            client.lines.append(line)
        self.audience.call(self.watchers)

    async def settle(self, line: bytes | None) -> None:
        self.tell(line)
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
async def site(nursery: trio.Nursery, mock_clock: trio.testing.MockClock) -> AsyncIterator[Site]:
    site = Site(nursery)
    nursery.start_soon(site.audience.run)
    yield site
    nursery.cancel_scope.cancel()


async def test_waiting_watchers_are_sent_news_without_a_step_of_their_tasks(
    site: Site, mock_clock: trio.testing.MockClock
) -> None:  # fmt: skip
    # By this clock no sending takes time, so that all fit into one step.
    clients = [await site.watch() for _ in range(50)]
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    for number in range(3):
        await site.settle(b"%d" % number)
    trio.lowlevel.remove_instrument(steps)
    assert [client.got for client in clients] == 50 * [[b"0", b"1", b"2"]]
    assert steps.counts["watch"] == 0
    # A step to wake up and send, and one after its turn.
    assert steps.counts["run"] == 3 * 2


async def test_news_for_many_are_sent_in_steps_of_a_millisecond(
    site: Site, mock_clock: trio.testing.MockClock
) -> None:  # fmt: skip
    steps = Steps()
    counts: list[int] = []

    def send() -> None:
        mock_clock.jump(0.0004)
        counts.append(steps.counts["run"])

    for _ in range(9):
        await site.watch(Client(on_line=send))
    trio.lowlevel.add_instrument(steps)
    await site.settle(b"line")
    trio.lowlevel.remove_instrument(steps)
    assert list(Counter(counts).values()) == [3, 3, 3]


async def test_slow_watcher_goes_on_in_its_task_and_delays_nobody(site: Site) -> None:
    slow, quick = await site.watch(), await site.watch()
    slow.may_take = trio.Event()
    site.tell(b"0")
    await site.settle(b"1")
    await site.settle(b"2")
    assert slow.got == []
    assert quick.got == [b"0", b"1", b"2"]
    slow.may_take.set()
    await trio.testing.wait_all_tasks_blocked()
    assert slow.got == quick.got
    await site.settle(b"3")
    assert slow.got == quick.got == [b"0", b"1", b"2", b"3"]


async def test_news_that_come_together_are_all_sent_in_order(site: Site) -> None:
    client = await site.watch()
    for number in range(3):
        site.tell(b"%d" % number)
    await site.settle(b"3")
    assert client.got == [b"0", b"1", b"2", b"3"]


async def test_watcher_ends_with_its_lines(site: Site) -> None:
    client, other = await site.watch(), await site.watch()
    client.lines.append(b"last")
    client.lines.append(None)
    await site.settle(b"line")
    assert client.got == [b"last", b"end"]
    assert other.got == [b"line"]


async def test_error_of_one_watcher_is_raised_in_its_task_only(site: Site) -> None:
    broken, other = await site.watch(), await site.watch()
    broken.error = BrokenFilterError()
    await site.settle(b"line")
    assert broken.got == [b"error"]
    assert other.got == [b"line"]


async def test_nothing_is_sent_to_a_watcher_that_was_cancelled(site: Site) -> None:
    scope = trio.CancelScope()
    client, other = await site.watch(scope=scope), await site.watch()
    scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    await site.settle(b"line")
    assert client.got == []
    assert other.got == [b"line"]


async def test_news_put_the_filler_off(site: Site, mock_clock: trio.testing.MockClock) -> None:
    client = await site.watch()
    for number in range(3):
        mock_clock.jump(SILENCE - 1)
        await site.settle(b"%d" % number)
    assert client.got == [b"0", b"1", b"2"]
    mock_clock.jump(SILENCE)
    await trio.testing.wait_all_tasks_blocked()
    assert client.got[3:] == [b"filler"]


async def test_filler_never_stands_within_a_line(site: Site, mock_clock: trio.testing.MockClock) -> None:
    client = await site.watch()
    # Which task has its turn first when the silence ends is random.
    for _ in range(10):
        client.got.clear()
        client.may_take = trio.Event()
        site.tell(b"line")
        mock_clock.jump(SILENCE)
        await trio.testing.wait_all_tasks_blocked()
        client.may_take.set()
        await trio.testing.wait_all_tasks_blocked()
        assert client.got in ([b"line"], [b"filler", b"line"])
