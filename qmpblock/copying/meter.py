"""How far something is that is no job of QEMU's, told as a job's progress is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpblock.speed import RateMeter

if TYPE_CHECKING:
    from qmpblock.qemu.job import Progress

__all__ = ["Meter"]


class Meter:
    """Tells how far something is, with its rate and the seconds to go.

    :param phase: what it does, for people.
    :param total: bytes.
    :param tell: is told; None: nobody is.
    """

    def __init__(self, phase: str, total: int, tell: Callable[[Progress], None] | None) -> None:
        self._phase = phase
        self._total = total
        self._tell = tell
        self._rate = RateMeter()
        self.set(0)

    def set(self, done: int) -> None:
        """Say how much is done, in bytes."""
        if self._tell is None:
            return
        from qmpblock.qemu.job import Progress

        self._rate.add(time.monotonic(), done)
        rate = self._rate.rate
        eta = (self._total - done) / rate if rate > 0 else None
        self._tell(Progress("running", self._phase, done, self._total, rate, eta))
