"""Wake-ups, and the exceptions that come out of nurseries."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from orchard.base.nursery import Wakeup, first_exception, sole_exception, unwrap_groups


async def test_wakeup_wakes_the_waiting_task_once_per_set(autojump_clock: trio.testing.MockClock) -> None:
    wakeup = Wakeup()
    woken: list[float] = []

    async def look() -> None:
        while True:
            await wakeup.wait()
            woken.append(trio.current_time())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        for _ in range(3):
            await trio.sleep(1)
            wakeup.set()
            wakeup.set()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert woken == [start + 1, start + 2, start + 3]


async def test_wakeup_set_before_the_wait_is_remembered_once(autojump_clock: trio.testing.MockClock) -> None:
    wakeup = Wakeup()
    wakeup.set()
    with trio.fail_after(1):
        await wakeup.wait()
    with pytest.raises(trio.TooSlowError), trio.fail_after(1):
        await wakeup.wait()


async def test_wakeup_set_while_the_woken_task_reads_the_state_wakes_it_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wakeup = Wakeup()
    state, seen = 0, []

    async def look() -> None:
        while True:
            await wakeup.wait()
            read = state
            # Other tasks run between reading the state and acting on it.
            await trio.sleep(1)
            seen.append(read)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        state = 1
        wakeup.set()
        await trio.sleep(0.5)
        state = 2
        wakeup.set()
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert seen == [1, 2]


async def test_wakeup_wakes_all_waiting_tasks_and_keeps_a_set_that_comes_between_them(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wakeup = Wakeup()
    woken: list[str] = []

    async def look(name: str, again: bool) -> None:
        await wakeup.wait()
        woken.append(name)
        if again:
            wakeup.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look, "a", True)
        nursery.start_soon(look, "b", True)
        await trio.testing.wait_all_tasks_blocked()
        wakeup.set()
    assert sorted(woken) == ["a", "b"]
    with trio.fail_after(1):
        await wakeup.wait()


async def test_wakeup_is_a_checkpoint_and_can_be_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    wakeup = Wakeup()
    with trio.move_on_after(1) as scope:
        await wakeup.wait()
    assert scope.cancelled_caught
    wakeup.set()
    with trio.testing.assert_checkpoints():
        await wakeup.wait()


def test_first_exception_of_nested_groups() -> None:
    error = ValueError("inner")
    assert first_exception(ExceptionGroup("", [ExceptionGroup("", [error]), KeyError()])) is error
    assert first_exception(error) is error


async def test_sole_exception_ignores_cancellations_and_keeps_groups_of_several_types() -> None:
    async def fail(error: Exception) -> None:
        raise error

    async def run(*errors: Exception) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            for error in errors:
                nursery.start_soon(fail, error)

    async def raised(*errors: Exception) -> BaseExceptionGroup[BaseException]:
        with pytest.raises(BaseExceptionGroup) as caught:
            await run(*errors)
        return caught.value

    assert str(sole_exception(await raised(ValueError("one")))) == "one"
    assert isinstance(sole_exception(await raised(ValueError("one"), ValueError("two"))), ValueError)
    assert isinstance(sole_exception(await raised(ValueError("one"), KeyError("two"))), ExceptionGroup)


async def test_unwrap_groups_raises_the_exception_itself() -> None:
    with pytest.raises(ValueError, match="bare"), unwrap_groups():
        async with trio.open_nursery():
            raise ValueError("bare")
