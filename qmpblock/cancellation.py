"""Tasks and cancelling: work that is not left half done, and failures of which none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TypeVar

from qmpblock.errors import printable

__all__ = ["end_is_wanted", "task_group", "undisturbed"]

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


class _Undisturbed:
    """One that is under way, in the one that it is a part of.

    :ivar wanted: whether somebody waits for its end, since it was cancelled.
    """

    def __init__(self, around: _Undisturbed | None, *, wanted: bool) -> None:
        self.around = around
        self.wanted = wanted


_around: ContextVar[_Undisturbed | None] = ContextVar("_around", default=None)


def end_is_wanted() -> bool:
    """Whether this is undisturbed work whose caller was cancelled, before or meanwhile.

    It is finished all the same; but it no longer waits for what may never come (room on a disk,
    somebody who resumes a job).
    """
    one = _around.get()
    while one is not None:
        if one.wanted:
            return True
        one = one.around
    return False


async def undisturbed(work: Awaitable[_T]) -> _T:
    """Finish `work` even when cancelled meanwhile, then be cancelled.

    A failure of the work is raised all the same: it says what was not finished.

    There is no limit here: broken off, it would be left half done. The work has one of its own:

    - Commands to QEMU are a number that is known before, and each ends within the stall limit.
    - A job that is to end has to move within that, and not without end (`Job.wait_concluded`).
    - A job that brings the guest home has to come nearer to its end within that (`Job.follow`);
      while it is paused, or waits for room, only where `end_is_wanted`.
    - What is left of a change is done in a number of rounds (`changes.settle`), and a lock is had
      after a number of dead holders, or not at all (`qemu.lock`).
    - Programs have to print something within the stall limit (`host.qemuimg`).
    - Tasks that were cancelled before finish what is undisturbed in them, which is of these.

    What is left then is the kernel: an fsync to storage that hangs ends when that does.
    """
    caller = asyncio.current_task()
    this = _Undisturbed(_around.get(), wanted=caller is not None and caller.cancelling() > 0)
    token = _around.set(this)
    try:
        task = asyncio.ensure_future(work)  # it has this context
    finally:
        _around.reset(token)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
            this.wanted = True
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
