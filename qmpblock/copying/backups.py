"""Backups: QEMU's jobs that copy views of disks, each as it was at one instant.

Nobody writes to a view, so a job is done when it has been over all of it. Not a mirror: that looks
for what the uppermost layer alone holds, where it reads a view, and leaves out what lies below
(K28). A backup flushes nothing: its target is closed before anybody calls it whole, which does.

What costs the guest least is few requests of the job's at once, each a large one: measured, four
workers with chunks of 1 MiB are faster than QEMU's 64 with 64 KiB, and the guest's own requests
wait behind four at the most. One alone waits for the machine between any two chunks, where that is
busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import task_group
from qmpblock.copying.held import draw_held
from qmpblock.copying.job import CopyJob, is_worth
from qmpblock.copying.resuming import find_left
from qmpblock.errors import JobError
from qmpblock.qemu.job import Job, Progress

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.qemu.connection import Connection

__all__ = ["Backups"]

_CHUNK = 1 << 20  # bytes that the job reads at once
_WORKERS = 4  # that do so
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

    async def work(self) -> None:
        """Copy all that the disks held; of what is resumed, what it has not.

        Cancelling leaves jobs: whoever undoes the copy cancels them.

        :raise JobError: a job failed: its target did, or the point was given up.
        :raise StalledError: one did not move.
        :raise NBDError: what is resumed, or its point, cannot be read.
        """
        await find_left(self.vm, self.targets, self.job, held=self.stays)
        await draw_held(self.vm, self.targets, held=self.stays)
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
        shape = target.plan.shape
        return {
            "device": target.source,
            "target": target.node,
            **how,
            "on-source-error": "report",
            "on-target-error": "enospc",
            "speed": self.job.share(),
            "compress": shape.compress,
            "x-perf": {
                "max-workers": _WORKERS,
                "use-copy-range": shape.reflink,
                "max-chunk": max(_UNIT if shape.allocation == "like" else _CHUNK, shape.unit),
            },
        }

    def sync(self, target: CopyTarget) -> str:
        """Return which layers it is to copy: of a view, its uppermost one is what the disk's was.

        Nothing of that is told as not allocated, so that looking for it would only take time.
        """
        return target.plan.sync

    async def _follow(self, job: Job, target: CopyTarget) -> None:
        name, finalized = target.plan.device.name, False
        async for seen in job.follow(converging=self.vm.stall):
            self.last[name] = seen
            self.job.publish(name, seen)
            target.keeps = target.resumed or is_worth(seen)
            if seen.status == "pending" and not finalized:
                finalized = True
                await job.finalize()
        error = self.last[name].error
        if error is not None:
            raise JobError(job.id, job.type, error)
        await job.dismiss()  # its verdict is known
