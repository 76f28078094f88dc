"""Looks: the jobs of a VM, looked at for all who follow one of them.

Each follower looks whenever an event wakes it, and what wakes one, a drain of the whole VM say,
wakes all. QEMU answers for all jobs at once: who asks while another's look is under way shares the
next one with all who do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from qmpblock.qemu.monitor import Monitor

__all__ = ["Looks"]

_REST = 0.01  # seconds


class Looks:
    """Those of one VM. `closely`; `rest_while`, where looks have to wait."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._turn = asyncio.Lock()
        self._begun = 0
        self._ended = 0  # the last one that has brought an answer
        self._jobs: dict[str, dict[str, Any]] = {}
        self._rests: Callable[[], bool] = lambda: False

    def rest_while(self, rests: Callable[[], bool]) -> None:
        """Have looks wait while that is so."""
        self._rests = rests

    async def _rested(self) -> None:
        while True:
            if not self._rests():
                return
            await asyncio.sleep(_REST)

    async def closely(self, name: str) -> dict[str, Any] | None:
        """Return QEMU's records of a job, of no earlier moment than this; None if it is gone.

        Of both query-jobs and query-block-jobs, where it is in either. Cancelling is harmless.

        :raise Error: as of `Monitor.execute`.
        """
        await self._rested()
        before = self._begun
        async with self._turn:
            if self._ended <= before:  # none that began since
                self._begun += 1
                jobs, blocks = await self._monitor.read("query-jobs", "query-block-jobs")
                of_blocks = {one["device"]: one for one in blocks}
                # len and offset are current-progress and total-progress, a moment later.
                self._jobs = {one["id"]: {**of_blocks.get(one["id"], {}), **one} for one in jobs}
                self._ended = self._begun
        return self._jobs.get(name)
