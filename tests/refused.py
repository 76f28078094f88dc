"""What QEMU refuses: the error, and which of the names of `qmpblock.qemu.refusals` fit it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import Any

import pytest

from qmpblock.errors import CommandError
from qmpblock.qemu import refusals

#: Every predicate there, by its name.
PREDICATES = {
    name: getattr(refusals, name)
    for name in refusals.__all__
    if not inspect.iscoroutinefunction(getattr(refusals, name))
}


def fitting(error: CommandError) -> set[str]:
    """Return the names that fit."""
    return {name for name, fits in PREDICATES.items() if fits(error)}


async def refused(command: Awaitable[Any]) -> CommandError:
    """Await a command that QEMU refuses."""
    with pytest.raises(CommandError) as caught:
        await command
    return caught.value
