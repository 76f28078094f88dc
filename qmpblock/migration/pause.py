"""Pause: on request, a guest that outruns its migration stands until that has come to its end.

What stands writes nothing: disks and memory come to their end in one pass, of which can be said
before how long it takes. All else is as without it, the way back included; and QEMU pauses it, as
`stop` does, so that a node of ours says that it was we (`qmpblock.qemu.instant`): whoever finds the
migration without its controller has the guest go on, and nobody has one that somebody else stopped.

Post-copy, which has the guest run at the destination instead, has no way back (K39).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.cancellation import task_group, undisturbed
from qmpblock.errors import StalledError
from qmpblock.migration import wayback
from qmpblock.migration.predict import HAND_OVER
from qmpblock.migration.states import Phase
from qmpblock.names import paused_node
from qmpblock.qemu.instant import pause

if TYPE_CHECKING:
    from qmpblock.migration.job import MigrationJob
    from qmpblock.migration.means import MigrationMeans
    from qmpblock.qemu.connection import Connection

__all__ = ["Pause"]

_LOOK = 0.1  # seconds


class Pause:
    """One migration's: `at_the_deadline`; `end`, where the guest stays.

    :ivar stands: whether the guest may stand because of it.
    """

    def __init__(self, vm: Connection, run: str, means: MigrationMeans, job: MigrationJob) -> None:
        self.stands = False
        self._vm = vm
        self._run = run
        self._after = means.pause_after
        self._longest = means.longest_pause
        self._notice = means.pause_notice()
        self._job = job
        self._too_long = 0.0
        self._size = 0  # bytes of memory
        self._left = -1  # of it, at the last look; `_pass`: at the start of this pass
        self._pass = 0

    @asynccontextmanager
    async def at_the_deadline(self, hurry: Callable[[], None]) -> AsyncIterator[None]:
        """Have the guest paused where the body has not ended by then.

        :param hurry: is called before: nothing may wait for a destination any more that is silent.
        :raise StalledError: it has stood for as long as it may.
        """
        if not self._after:
            yield
            return
        self._job.say(self._notice)
        try:
            async with task_group() as group:
                watching = group.create_task(self._watch(hurry))
                yield
                watching.cancel()
        except StalledError as error:
            if self._too_long and not self.stands:
                error.remedy = (
                    f"{error.remedy}; or let it be paused for as long as it takes "
                    f"(--longest-pause {self._too_long:.0f})"
                )
            raise

    async def _watch(self, hurry: Callable[[], None]) -> None:
        takes = await self._until_it_may()
        with self._vm.monitor.subscribe("RESUME") as resumed:
            hurry()
            self._job.say(
                f"the guest is paused until the migration has come to its end, which after "
                f"{self._after:g} s it has not: that takes about {takes:.1f} s, and after "
                f"{self._longest:g} s it goes on at the source"
            )
            if not await undisturbed(self._begin()):
                return  # it is being handed over, or somebody else has stopped it
            with contextlib.suppress(StalledError):
                await resumed.get(self._longest)
                self._job.say("somebody has continued the guest: it is not paused again")
                await undisturbed(self._forget())
                return
        seen = self._job.progress
        left = "" if seen is None else f"; {seen.remaining} bytes are left"
        raise StalledError(
            f"the guest was paused for {self._longest:g} s, and the migration has not come to its "
            f"end{left}",
            remedy="see why so little is sent; or let it be paused for longer (--longest-pause)",
        )

    async def _until_it_may(self) -> float:
        """Wait for the deadline, and until it may stand for all that is left; return how long."""
        now = asyncio.get_running_loop().time
        deadline = now() + self._after
        while True:
            takes = await self._takes()
            if takes is not None and now() >= deadline:
                if takes <= self._longest:
                    return takes
                self._decline(takes)
            await asyncio.sleep(_LOOK)

    def _decline(self, takes: float) -> None:
        if not self._too_long:
            self._job.say(
                f"the guest is not paused yet: what is left would take about {takes:.1f} s, and it "
                f"may be for {self._longest:g} s"
            )
        self._too_long = takes

    async def _takes(self) -> float | None:
        """Return how many seconds what is left takes if no more is written; None: unknown."""
        seen = self._job.progress
        if seen is None or not seen.rate:
            return None
        if seen.status == Phase.MIRRORING.value:
            return (seen.remaining + await self._memory()) / seen.rate + HAND_OVER
        # What is written during a pass QEMU counts at its end: as much may be left as at its start.
        if seen.remaining > self._left:
            self._pass = seen.remaining
        self._left = seen.remaining
        return self._pass / seen.rate + HAND_OVER

    async def _memory(self) -> int:
        if not self._size:
            said = await self._vm.monitor.execute("query-memory-size-summary")
            self._size = said["base-memory"] + said.get("plugged-memory", 0)
        return self._size

    async def _begin(self) -> bool:
        self.stands = True  # from here on it may
        self.stands = await pause(self._vm, paused_node(self._run))
        if self.stands and (await self._vm.monitor.execute("query-status"))["status"] != "paused":
            await self._forget()  # it stopped itself before
        return self.stands

    async def end(self) -> None:
        """Have the guest go on at the source, if it stands for this. Idempotent.

        :raise StalledError: it does not.
        """
        if self.stands:
            await wayback.cont(self._vm)
            await self._forget()

    async def _forget(self) -> None:
        await wayback.unmark_pause(self._vm, self._run)
        self.stands = False
