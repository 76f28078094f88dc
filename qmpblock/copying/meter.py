"""How far something is that is no job of QEMU's, told as a job's progress is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.speed import RateMeter

if TYPE_CHECKING:
    from qmpblock.copying.job import CopyJob
    from qmpblock.qemu.job import Progress

__all__ = ["DiskMeters", "Meter"]


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


class DiskMeters:
    """Tells how far several disks of a copy are: each, and all together.

    :param sizes: in bytes, by what people call the disks.
    """

    def __init__(self, phase: str, sizes: Mapping[str, int], job: CopyJob) -> None:
        self._phase = phase
        self._job = job
        self._done = dict.fromkeys(sizes, 0)
        self._whole = Meter(phase, sum(sizes.values()), job.show)

    def of(self, name: str) -> Callable[[Progress], None]:
        """Return what is told how far one disk is."""

        def tell(seen: Progress) -> None:
            self._done[name] = seen.done
            self._job.publish(name, replace(seen, phase=self._phase))
            self._whole.set(sum(self._done.values()))

        return tell
