"""Work that is finished although its caller is cancelled."""

import asyncio

import pytest

from qmpblock.cancellation import undisturbed


async def test_work_is_finished_although_cancelled():
    done = []

    async def work():
        await asyncio.sleep(0.05)
        done.append(True)

    task = asyncio.create_task(undisturbed(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()  # and however often
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


async def test_results_and_failures_come_through():
    async def value():
        return 5

    async def fail():
        await asyncio.sleep(0)
        raise KeyError("x")

    assert await undisturbed(value()) == 5
    with pytest.raises(KeyError):
        await undisturbed(fail())


async def test_a_failure_is_not_hidden_by_being_cancelled():
    async def fail():
        await asyncio.sleep(0.05)
        raise KeyError("what was not undone")

    task = asyncio.create_task(undisturbed(fail()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(KeyError):
        await task
