"""The harness for code without asyncio: the same objects, whose calls block.

One event loop, in a thread of its own that lives as long as the process, does the work. (The
thread must: the kernel kills a QEMU whose starter thread has ended.) What a VM has is wrapped
when it is asked for, so that everything of qmpblock.testing.md is there: `vm.execute(...)`,
`vm.guest.stress(spec)`, `with vm.guest.bounds(0) as bounds:`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

__all__ = ["Blocking", "run"]

T = TypeVar("T")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="the harness's loop", daemon=True).start()
    return loop


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` in the harness's loop, and wait for it.

    Ctrl-C cancels it, and waits until it has ended; a second one does not wait.
    """
    loop = _loop()
    tasks: list[asyncio.Task[T]] = []
    ended: Future[asyncio.Task[T]] = Future()

    def begin() -> None:
        tasks.append(loop.create_task(work))
        tasks[0].add_done_callback(ended.set_result)

    loop.call_soon_threadsafe(begin)
    try:
        task = ended.result()
    except BaseException:
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())  # after `begin`, whenever that is
        ended.result()
        raise
    return task.result()


class Blocking:
    """Something of the harness, each of whose coroutines is a plain call that blocks.

    What it has of the same kind (`vm.guest`, `vm.io`, `vm.control`) is wrapped, too; all else is
    given as it is. Setting an attribute is not meant.
    """

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __repr__(self) -> str:
        return f"<blocking {self._wrapped!r}>"

    def __dir__(self) -> list[str]:
        return dir(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        return _given(getattr(self._wrapped, name))


def _given(value: Any) -> Any:
    if inspect.iscoroutinefunction(value):
        return _blocking_call(value)
    if inspect.ismethod(value) and hasattr(inspect.unwrap(value.__func__), "__code__"):
        if inspect.isasyncgenfunction(inspect.unwrap(value.__func__)):
            return _blocking_context(value)
        return value
    return Blocking(value) if _has_coroutines(type(value)) else value


def _has_coroutines(kind: type) -> bool:
    return kind.__module__.startswith("qmpblock.") and any(
        inspect.iscoroutinefunction(getattr(kind, name, None)) for name in dir(kind)
    )


def _blocking_call(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return _given(run(function(*arguments, **options)))

    return call


def _blocking_context(
    function: Callable[..., AbstractAsyncContextManager[Any]],
) -> Callable[..., Any]:
    @functools.wraps(function)
    @contextmanager
    def context(*arguments: Any, **options: Any) -> Iterator[Any]:
        async def enter() -> tuple[AbstractAsyncContextManager[Any], Any]:
            made = function(*arguments, **options)
            return made, await made.__aenter__()

        made, value = run(enter())
        try:
            yield value
        except BaseException as error:
            if not run(_leave(made, error)):
                raise
        else:
            run(_leave(made, None))

    return context


async def _leave(made: AbstractAsyncContextManager[Any], error: BaseException | None) -> bool:
    kind = None if error is None else type(error)
    trace = None if error is None else error.__traceback__
    return bool(await made.__aexit__(kind, error, trace))
