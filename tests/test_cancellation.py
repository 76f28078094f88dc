"""Work that is finished although its caller is cancelled; failures of several tasks."""

import asyncio

import pytest

from qmpblock.cancellation import end_is_wanted, task_group, undisturbed


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


async def test_what_is_undisturbed_knows_when_its_end_is_wanted():
    seen = []

    began = asyncio.Event()

    async def inner():
        seen.append(end_is_wanted())
        began.set()
        async with asyncio.timeout(30):
            while not end_is_wanted():
                await asyncio.sleep(0)
        seen.append(end_is_wanted())

    async def undo():
        seen.append(end_is_wanted())

    async def outer():
        try:
            await undisturbed(undisturbed(inner()))
        finally:
            await undisturbed(undo())  # whose caller was cancelled before

    task = asyncio.create_task(outer())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == [False, True, True]
    await undisturbed(undo())
    assert seen[3] is end_is_wanted() is False


async def fail(error, after=0.0):
    await asyncio.sleep(after)
    raise error


async def together(*works):
    async with task_group() as group:
        for work in works:
            group.create_task(work)


async def fail_to_end(error):
    """Fail when cancelled, as what cannot be undone does."""
    try:
        await asyncio.sleep(60)
    finally:
        raise error


async def test_the_first_failure_of_a_group_is_raised_with_what_it_has():
    cause, first = OSError("why"), KeyError("first")
    first.__cause__ = cause
    with pytest.raises(KeyError) as caught:
        await together(fail_to_end(ValueError("not undone\x1b")), fail(first, 0.01))
    assert caught.value is first
    assert first.__cause__ is cause
    assert first.__context__ is None
    assert first.__notes__ == ["besides, ValueError: not undone\\x1b"]


async def test_groups_in_groups_are_taken_apart():
    group = ExceptionGroup("one", [KeyError("inner"), ExceptionGroup("two", [OSError()])])
    with pytest.raises(KeyError, match="inner") as caught:
        await together(fail(group))
    assert caught.value.__notes__ == ["besides, OSError: "]


async def test_a_failure_of_the_body_ends_the_tasks():
    tasks = []

    async def body():
        async with task_group() as group:
            tasks.append(group.create_task(asyncio.sleep(60)))
            await fail(KeyError("body"))

    with pytest.raises(KeyError, match="body"):
        await body()
    assert tasks[0].cancelled()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_group_ends_its_tasks_and_says_what_was_not_undone(fails):
    work = fail_to_end(KeyError("not undone")) if fails else asyncio.sleep(60)
    calling = asyncio.create_task(together(work))
    await asyncio.sleep(0.01)
    calling.cancel()
    with pytest.raises(KeyError if fails else asyncio.CancelledError):
        await calling
    assert asyncio.all_tasks() == {asyncio.current_task()}
