"""Tasks and cancelling: work that is not left half done, and failures of which none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

from qmpblock.errors import printable

__all__ = ["task_group", "undisturbed"]

_T = TypeVar("_T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Run tasks as `asyncio.TaskGroup` does, and raise the first failure itself, in no group.

    Whoever called can catch it by its class then. What else failed, be it while the others were
    cancelled for it, stands in the notes of the first. Cancelling it cancels all tasks and waits
    for them; a failure of theirs is raised even so: it says what was not undone.
    """
    failures: list[BaseException] = []
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failed:
        failures += _single(failed)
    for other in failures[1:]:
        failures[0].add_note(f"besides, {type(other).__name__}: {printable(other)}")
    if failures:
        raise failures[0]  # out of the handler: its own cause and context stay


def _single(failed: BaseException) -> Iterator[BaseException]:
    """Return the failures of a group, and of the groups in it, in the order in which they came."""
    if isinstance(failed, BaseExceptionGroup):
        for one in failed.exceptions:
            yield from _single(one)
    else:
        yield failed


async def undisturbed(work: Awaitable[_T]) -> _T:
    """Finish `work` even when cancelled meanwhile, then be cancelled.

    A failure of the work is raised all the same: it says what was not finished.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
