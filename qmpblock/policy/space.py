"""The host's free space, of which several disks and copies take their parts.

What something will take is known before, and given to it in its order; while it is under way, the
file systems are looked at, and it is given up where less is free than must stay so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from qmpblock.cancellation import undisturbed
from qmpblock.errors import UNTOUCHED, Error, printable
from qmpblock.host.space import HostSpace

__all__ = ["Book", "Take", "check_takes", "share_space", "unless_short"]

_LOOK = 0.5  # seconds between looks at the free space of the host
_T = TypeVar("_T")


@dataclass(frozen=True)
class Take:
    """What will be taken of one file system.

    :ivar needed: bytes, in all.
    :ivar file: the one that takes them.
    """

    space: HostSpace
    needed: int
    file: str


class Taker(Protocol):
    """What takes host space, or does not, where it cannot be done or there is nothing to do."""

    @property
    def takes(self) -> tuple[Take, ...]:
        """Of which file systems how much."""

    @property
    def has_work(self) -> bool:
        """Whether there is something to do."""

    @property
    def error(self) -> Error | None:
        """Why it cannot be done."""

    def failed(self, error: Error) -> Self:
        """Return it with the reason why it cannot be done."""


_TakerT = TypeVar("_TakerT", bound=Taker)


def check_takes(takes: Sequence[Take], promised: Mapping[int, int]) -> None:
    """Refuse what would leave less than must stay free.

    :param promised: bytes that others will still take, by the file system's number.
    :raise Error: it would.
    """
    needed: dict[int, int] = {}
    for one in takes:
        device = one.space.device
        needed[device] = needed.get(device, 0) + one.needed
        taken = promised.get(device, 0)
        if not one.space.leaves(taken + needed[device]):
            raise Error(
                f"the file system of {printable(one.space.path)} has {one.space.free} bytes free, "
                f"of which {taken} are promised to other disks; this one needs {needed[device]}, "
                f"and the policy keeps {one.space.keep} free",
                standing=UNTOUCHED,
                remedy="make room, or keep less free",
            )


def share_space(plans: Sequence[_TakerT]) -> tuple[_TakerT, ...]:
    """Give the free space of each file system to what takes it, in order. Pure.

    Those for which not enough is left get an error.
    """
    promised: dict[int, int] = {}
    shared = []
    for one in plans:
        if one.error is None and one.has_work:
            try:
                check_takes(one.takes, promised)
            except Error as error:
                shared.append(one.failed(error))
                continue
            for take in one.takes:
                device = take.space.device
                promised[device] = promised.get(device, 0) + take.needed
        shared.append(one)
    return tuple(shared)


class Book:
    """What all that is under way will still take of the host's space."""

    def __init__(self) -> None:
        self._taking: dict[object, list[tuple[Take, int]]] = {}

    def begin(self, what: object, takes: Sequence[Take]) -> None:
        """Note what something takes from now on.

        :raise Error: that is too much.
        """
        check_takes(takes, self._promised())
        self._taking[what] = [(one, _used(one.file)) for one in takes]

    def end(self, what: object) -> None:
        """Note that it has ended, if it had begun."""
        self._taking.pop(what, None)

    def _promised(self) -> dict[int, int]:
        promised: dict[int, int] = {}
        for takes in self._taking.values():
            for one, before in takes:
                left = max(0, one.needed - (_used(one.file) - before))
                promised[one.space.device] = promised.get(one.space.device, 0) + left
        return promised


def _used(path: str) -> int:
    try:
        return Path(path).stat().st_blocks * 512
    except OSError:
        return 0  # unplugged and gone, or not made yet


async def unless_short(
    work: Coroutine[Any, Any, _T],
    spaces: Sequence[HostSpace],
    *,
    standing: str,
    remedy: str,
    give_back: Callable[[], None] | None = None,
) -> _T:
    """Do the work, and give it up when the host has less free than must stay so.

    :param standing: what stands where it was given up; `remedy`: what to do then.
    :param give_back: is called then, for what it left.
    :raise Error: it was.
    """
    task = asyncio.ensure_future(work)
    short: HostSpace | None = None
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            short = next((one for one in spaces if one.keep and not one.now().leaves(0)), None)
            if short is not None:
                break
    finally:
        if not task.done():
            task.cancel()
            await undisturbed(asyncio.wait({task}))
    if short is not None and task.cancelled():
        if give_back is not None:
            await asyncio.to_thread(give_back)
        raise Error(
            f"the file system of {printable(short.path)} has less than {short.keep} bytes free, "
            "which the policy keeps so",
            standing=f"it was given up; {standing}",
            remedy=remedy,
        )
    return task.result()
