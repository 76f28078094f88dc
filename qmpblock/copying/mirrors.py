"""Mirrors: QEMU's jobs that copy running disks, brought to one instant.

Each disk has a background mirror, which is never in the guest's way: it copies what is there, then
again what the guest wrote meanwhile, and is `ready` once it has caught up. Then, and only when the
end is wanted, all are asked to end::

    running -> ready            catches up with the guest, for as long as it takes
            -> pending          its target is flushed, and holds what the disk holds; QEMU holds the
                                guest's I/O from here on (K5)
    all are pending:            the instant, of all disks. Finalized, each at once
    one is not, within a bound: all are cancelled, which gives the guest back; and it is done again

What goes on from what is there is brought up to date first (`qmpblock.copying.catchup`); its mirror
copies nothing but what the guest writes from then on.

A mirror flushes its target before it is pending, so that whatever dies then, the target is whole
(measured: 8 of 8 kills of QEMU, 7.2.22 and 11.1.2).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import task_group, undisturbed
from qmpblock.chains.look import unless_changed
from qmpblock.copying.catchup import ATTEMPTS, HOLD, CatchUp
from qmpblock.copying.crowded import check_crowded
from qmpblock.copying.frame import check_actives, check_top
from qmpblock.copying.job import CopyJob, is_worth
from qmpblock.errors import Error, JobError
from qmpblock.names import copy_job
from qmpblock.qemu.job import Job, Progress

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.qemu.connection import Connection

__all__ = ["Mirrors"]

_BUFFER = 1 << 20  # bytes that are under way at once, where the guest's latency is held
_LOOK = 0.005  # seconds between looks at jobs that are to be pending
_TO_CATCH_UP = "let the guest write less, raise --speed, or copy the start (--at start)"
_TO_CATCH_UP_PACED = (
    "let the guest write less, have its requests take longer (--latency), raise --speed, or copy "
    "the start (--at start)"
)
#: States of a job that was ready and is to be pending.
_ENDING = frozenset({"ready", "standby", "running", "paused", "waiting", "pending"})


@dataclass
class Mirrors:
    """The mirrors of one copy.

    :ivar run: in whose names they are.
    :ivar pivot: whether the guest goes over to the targets.
    :ivar mark: where the guest goes over: is awaited at the instant, before anything is final,
        with `over=True`; with False where nothing became final after all.
    :ivar quiet: keeps away what must not meet that instant; yields whether the VM is paused for it.
    :ivar held: seconds for which the guest's I/O was held at most.
    :ivar note: is awaited with a target once it is known whether another copy could go on from it.
    :ivar migrates_not: whether QEMU refuses to migrate meanwhile.
    :ivar over: the disks that went over to their targets.
    :ivar attempts: how often the disks were brought, or nearly brought, to one instant.
    """

    vm: Connection
    run: str
    targets: Sequence[CopyTarget]
    job: CopyJob
    pivot: bool
    mark: Callable[..., Awaitable[None]]
    quiet: Callable[[], AbstractAsyncContextManager[bool]]
    note: Callable[[CopyTarget], Awaitable[None]]
    held: float = 0.0
    attempts: int = 0
    migrates_not: bool = False
    over: list[str] = field(default_factory=list)
    last: dict[str, Progress] = field(default_factory=dict)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)  # all jobs have been
    _given_back: set[str] = field(default_factory=set)  # ids of jobs

    async def work(self) -> None:
        """Copy, wait until the end is wanted, and bring all disks to one instant.

        Cancelling leaves jobs: whoever undoes the copy cancels them.

        :raise JobError: a job failed: its target did, or the guest's image.
        :raise StalledError: one did not move, or does not catch up with the guest.
        :raise Error: the disks could not be brought to one instant.
        """
        while not await self._attempt():
            if self.attempts >= ATTEMPTS:
                raise Error(
                    f"the disks could not be brought to one instant within {HOLD:g} s, in "
                    f"{self.attempts} attempts: some target takes in its last bytes too slowly. "
                    "The guest was given back each time",
                    remedy="let the guest write less, or copy to faster storage; or copy one disk "
                    "at a time",
                )

    async def _attempt(self) -> bool:
        jobs = tuple(
            Job(self.vm.monitor, copy_job(self.run, number), "mirror")
            for number, _ in enumerate(self.targets)
        )
        for job in jobs:
            job.to_catch_up = _TO_CATCH_UP if self.job.pacer is None else _TO_CATCH_UP_PACED
        self.job.runs(jobs)
        self._given_back.clear()
        self._ready.clear()
        self.last.clear()
        try:
            await self._start(jobs)
            async with task_group() as group:
                for job, target in zip(jobs, self.targets, strict=True):
                    group.create_task(self._follow(job, target))
                meeting = group.create_task(self._meet(jobs))
            return meeting.result()
        finally:
            for job in jobs:
                job.end()

    async def _start(self, jobs: Sequence[Job]) -> None:
        every = list(zip(jobs, self.targets, strict=True))

        async def start(*, resumed: bool) -> None:
            for job, target in every:
                if target.resumed is resumed:
                    async with unless_changed(self.vm, [target.plan.device]):
                        await job.start("blockdev-mirror", self._arguments(job, target))

        left = [target for target in self.targets if target.resumed]
        if left:
            coming = CatchUp(self.vm, self.run, left, self.job, self.migrates_not)
            await coming.hand_over(partial(start, resumed=True))
            self.held = max(self.held, coming.held)
        await start(resumed=False)
        tops = [one for one in self.targets if not one.resumed and one.plan.sync_of_disk == "top"]
        if tops:
            await check_top(self.vm, tops)

    def _arguments(self, job: Job, target: CopyTarget) -> dict[str, Any]:
        chain = target.plan.device.chain
        arguments: dict[str, Any] = {
            "device": chain.root.name,
            "target": target.node,
            "sync": "none" if target.resumed else target.plan.sync_of_disk,
            "copy-mode": "background",
            "on-source-error": job.on_error("report"),
            "on-target-error": job.on_error("enospc"),
            "speed": self.job.share(),
        }
        if self.job.pacer is not None:
            arguments["buf-size"] = _BUFFER
        if chain.filters and self.pivot:  # they stay where they are: above whatever is active
            arguments["replaces"] = chain.active.node.name
        return arguments

    async def _follow(self, job: Job, target: CopyTarget) -> None:
        """Follow a job to its end.

        :raise JobError: it failed; not where it was cancelled to give the guest back.
        """
        name = target.plan.device.name
        async for seen in job.follow(converging=self.vm.stall):
            self.job.publish(name, seen)
            self.last[name] = seen
            target.keeps = target.resumed or is_worth(seen)
            await self.note(target)
            if seen.phase == "waiting for room":
                await check_crowded(self.vm, target)
            if seen.status in ("waiting", "pending") and not job.completion_asked:
                await undisturbed(job.cancel())  # somebody else asked it to end: the guest is held
            if all(one.ready for one in self.last.values()) and len(self.last) == len(self.targets):
                self._ready.set()
        error = self.last[name].error
        if error is not None and name in self.over:
            await undisturbed(self._stayed(name))
        if error is not None and job.id not in self._given_back:
            if self.pivot:  # a filter that stays above lies on another layer than the one to go
                await check_actives(self.vm, [target.plan.device])
            raise JobError(job.id, job.type, error)
        await job.dismiss()  # its verdict is known

    async def _stayed(self, name: str) -> None:
        """Take it back that a disk went over: its job was finalized, and failed in that."""
        self.over.remove(name)
        if not self.over:
            await self.mark(over=False)

    async def _meet(self, jobs: Sequence[Job]) -> bool:
        """Bring ready jobs to one instant, once that is wanted; False where it took too long."""
        await self._ready.wait()
        await self.job.completion.wait()
        self.attempts += 1
        await self.job.hurry()
        async with self.quiet() as stands:
            began, over = time.monotonic() if stands else None, False
            try:
                for job in jobs:
                    job.completion_asked = True
                    await self._ask(job)
                while (states := await self._states(jobs)) != ["pending"] * len(jobs):
                    now = time.monotonic()
                    if began is None and "pending" in states:
                        began = now
                    failed = not _ENDING.issuperset(states)
                    if failed or (began is not None and now - began > HOLD):
                        return False
                    await asyncio.sleep(_LOOK)
                began = time.monotonic() if began is None else began
                await undisturbed(self._finalize(jobs))
                over = True
            finally:
                if not over:
                    await undisturbed(self._give_back(jobs))
                if began is not None:
                    self.held = max(self.held, time.monotonic() - began)
        self.job.finished()
        return True

    async def _finalize(self, jobs: Sequence[Job]) -> None:
        await self.mark(over=True)
        try:
            for job, target in zip(jobs, self.targets, strict=True):
                await job.finalize()
                if self.pivot:
                    self.over.append(target.plan.device.name)
        except BaseException:
            if not self.over:
                await self.mark(over=False)  # somebody cancelled it
            raise

    async def _ask(self, job: Job) -> None:
        """Have a ready job end: with the guest where it is, or over there."""
        if self.pivot:
            await job.complete_now()
        else:
            # A soft one: of a ready mirror it is no failure, but its end.
            await self.vm.monitor.execute("block-job-cancel", {"device": job.id, "force": False})

    async def _give_back(self, jobs: Sequence[Job]) -> None:
        """Let go of the guest, wherever it is held, and give up what was to end."""
        for job, state in zip(jobs, await self._states(jobs), strict=True):
            if state in _ENDING:
                self._given_back.add(job.id)
                await job.cancel()

    async def _states(self, jobs: Sequence[Job]) -> list[str]:
        """Return where each job is, by one question: the guest may be held meanwhile."""
        known = {one["id"]: one["status"] for one in await self.vm.monitor.execute("query-jobs")}
        return [str(known.get(job.id, "null")) for job in jobs]
