"""Feed: the progress of some work, for whoever iterates over it.

Nobody is waited for: who looks late sees where the work is by then, and not where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from qmpblock.cancellation import undisturbed

__all__ = ["Feed", "working"]

T = TypeVar("T")


class Feed(Generic[T]):
    """Work that shows its progress. Async iteration yields it until the work has ended.

    :ivar progress: as shown last; None at first.
    """

    def __init__(self) -> None:
        self.progress: T | None = None
        self.over = False
        self._changed = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[T]:
        seen: T | None = None
        while True:
            changed = self.changed()
            if self.progress is not None and self.progress is not seen:
                seen = self.progress
                yield seen
            elif self.over:
                return
            else:
                await changed.wait()

    def changed(self) -> asyncio.Event:
        """Return what is set as soon as anything is another than now."""
        return self._changed

    def show(self, seen: T) -> None:
        """Say how far it is."""
        self.progress = seen
        self.wake()

    def end(self) -> None:
        """Have iterations end. Idempotent."""
        self.over = True
        self.wake()

    def wake(self) -> None:
        """Have whoever waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()


@asynccontextmanager
async def working(what: Coroutine[Any, Any, None], job: Feed[Any]) -> AsyncIterator[None]:
    """Have work done while the body runs, and wait for its end; or break it off. Ends its feed."""
    work = asyncio.ensure_future(what)
    work.add_done_callback(lambda _: job.end())
    try:
        yield
        await work
    finally:
        work.cancel()
        await undisturbed(asyncio.wait({work}))
