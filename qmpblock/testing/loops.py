"""In which event loop a thing of the harness lives, and what is said where it is asked in another.

A connection belongs to the loop in which it was made. Asked from another one it is never
heard of again: no error, no answer. So it is told at once, with what to set.
"""

from __future__ import annotations

import asyncio

from qmpblock.errors import RequestError

__all__ = ["SAME_LOOP", "WrongLoopError", "check_loop", "running_loop"]

SAME_LOOP = (
    'give both the same loop: @pytest.mark.asyncio(loop_scope="module") for the test and '
    'loop_scope="module" for the fixture, or the ini options asyncio_default_test_loop_scope and '
    "asyncio_default_fixture_loop_scope; a test without asyncio takes the fixture "
    "start_blocking_qemu"
)


class WrongLoopError(RequestError):
    """A VM is asked in another event loop than the one in which it was started, or in none."""


def check_loop(home: asyncio.AbstractEventLoop | None, what: str) -> None:
    """Refuse to go on in another event loop than `home`.

    :param home: where `what` was started; None: nowhere yet.
    :raise WrongLoopError: another one runs here.
    """
    if home is None:
        return
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return  # nothing is asked: what needs no loop may be read anywhere
    if running is not home:
        state = "that has been closed" if home.is_closed() else "that does not run now"
        raise WrongLoopError(
            f"{what} was started in another event loop, {state}: it would never answer here",
            remedy=SAME_LOOP,
        )


def running_loop(what: str) -> asyncio.AbstractEventLoop:
    """Return the event loop that runs here.

    :raise WrongLoopError: none does: there is no asyncio, or it is trio's.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise WrongLoopError(
            f"{what} needs asyncio's event loop, and none runs here (trio has another)",
            remedy="run the test with pytest-asyncio, or take the fixture start_blocking_qemu",
        ) from None
