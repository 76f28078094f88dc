"""Backups: QEMU's jobs that copy views of disks, each as it was at one instant.

Nobody writes to a view, so a job is done when it has been over all of it. Not a mirror: that looks
for what the uppermost layer alone holds, where it reads a view, and leaves out what lies below
(K28). A backup flushes nothing: its target is closed before anybody calls it whole, which does.

What costs the guest least is little of the job's under way at once, for its own requests wait
behind that: 16 requests of 128 KiB are 2 MiB; of QEMU's own 64 it can be 64 MiB. They are no larger
for QEMU's sake: it allocates each one's buffer anew, and what is larger the C library has from the
kernel each time, and gives back. Measured on 256 MiB in one piece (7.2.22, 11.1.2): 35,000 to
66,000 page faults and 0.2 to 0.25 s of the processor with chunks of 256 KiB and more; with 128 KiB
some hundred, and half of that. To a server it is four of 1 MiB: what counts there is the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qmpblock.cancellation import task_group
from qmpblock.copying.crowded import check_crowded
from qmpblock.copying.frame import check_top
from qmpblock.copying.held import draw_held
from qmpblock.copying.increment import draw_increments
from qmpblock.copying.job import CopyJob, is_worth
from qmpblock.copying.resuming import find_left
from qmpblock.copying.shape import LARGEST_CLUSTER
from qmpblock.errors import JobError
from qmpblock.qemu.job import Job, Progress

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.qemu.connection import Connection

__all__ = ["Backups"]

_CHUNK, _WORKERS = 128 << 10, 16  # bytes that the job reads at once, and how many do so
_FAR_CHUNK, _FAR_WORKERS = 1 << 20, 4  # the same, to a server, or in pieces as large as need be
#: Likewise, where no zeros are to be stored beside what is none: of a view over several layers QEMU
#: does not tell what lower ones hold, and what is read at once is zeros or is not (11.1.2).
_UNIT = 64 << 10


@dataclass
class Backups:
    """The backup jobs of one copy; each target's `source` is the view that it is of.

    :ivar ids: of the jobs.
    :ivar last: how each job was last seen, by what people call the disk.
    :ivar stays: whether QEMU refuses to migrate meanwhile.
    """

    vm: Connection
    ids: Sequence[str]
    targets: Sequence[CopyTarget]
    job: CopyJob
    last: dict[str, Progress] = field(default_factory=dict)
    held: float = 0.0  # seconds of the guest's I/O
    attempts: int = 1  # at being of one instant
    stays: bool = False
    of_views: ClassVar[bool] = True  # and not of the very layers

    async def work(self) -> None:
        """Copy all that the disks held; of what is resumed, what it has not.

        Cancelling leaves jobs: whoever undoes the copy cancels them.

        :raise JobError: a job failed: its target did, or the point was given up.
        :raise StalledError: one did not move.
        :raise NBDError: what is resumed, or its point, cannot be read.
        """
        await find_left(self.vm, self.targets, self.job, held=self.stays)
        await draw_held(self.vm, self.targets, held=self.stays)
        await draw_increments(self.vm, self.targets)
        jobs = tuple(Job(self.vm.monitor, name, "backup") for name in self.ids)
        self.job.runs(jobs)
        try:
            for job, target in zip(jobs, self.targets, strict=True):
                await job.start("blockdev-backup", self.arguments(target))
            async with task_group() as group:
                for job, target in zip(jobs, self.targets, strict=True):
                    group.create_task(self._follow(job, target))
        finally:
            for job in jobs:
                job.end()
        self.job.finished()

    def arguments(self, target: CopyTarget) -> dict[str, Any]:
        """Return what QEMU is asked for."""
        how: dict[str, Any] = {"sync": self.sync(target)}
        if target.bitmap:
            how = {"sync": "bitmap", "bitmap": target.bitmap, "bitmap-mode": "never"}
        return {
            "device": target.source,
            "target": target.node,
            **how,
            "on-source-error": "report",
            "on-target-error": "enospc",
            "speed": self.job.share(),
            "compress": target.plan.shape.compress,
            "x-perf": performance(target.plan, resumed=target.resumed),
        }

    def sync(self, target: CopyTarget) -> str:
        """Return which layers it is to copy: of a view, its uppermost one is what the disk's was.

        Nothing of that is told as not allocated, so that looking for it would only take time.
        """
        return target.plan.sync

    async def _follow(self, job: Job, target: CopyTarget) -> None:
        name, finalized = target.plan.device.name, False
        unsure = not target.bitmap and self.sync(target) == "top" and self.of_views
        async for seen in job.follow(converging=self.vm.stall):
            if unsure and (seen.done or seen.status in ("pending", "concluded")):
                # It looks over the disk before it copies anything, and never again.
                unsure = False
                await check_top(self.vm, [target])
            self.last[name] = seen
            self.job.publish(name, seen)
            target.keeps = target.resumed or (target.plan.kept and is_worth(seen))
            if seen.phase == "waiting for room":
                await check_crowded(self.vm, target)
            if seen.status == "pending" and not finalized:
                finalized = True
                await job.finalize()
        error = self.last[name].error
        if error is not None:
            raise JobError(job.id, job.type, error)
        await job.dismiss()  # its verdict is known


def performance(plan: CopyPlan, *, resumed: bool) -> dict[str, Any]:
    """Return in what pieces a job is to copy, and how many at once. Pure.

    :param resumed: whether the target was there before, in clusters of whatever size.
    """
    shape = plan.shape
    if shape.reflink:  # the kernel copies, and no piece of it has a buffer
        return {"max-workers": _WORKERS, "use-copy-range": True}
    few = resumed or plan.kind == "server"
    chunk = _UNIT if shape.allocation == "like" else _FAR_CHUNK if few else _CHUNK
    return {
        "max-workers": _FAR_WORKERS if few else _WORKERS,
        "use-copy-range": False,
        # QEMU takes no smaller one than a cluster.
        "max-chunk": LARGEST_CLUSTER if resumed else max(chunk, shape.unit),
    }
