"""Stream, whoever owns the chain: a job of QEMU's by us, or a manager's own pull.

A manager that lends its monitor drops layers itself, so that it knows (`qmpblock.chains.owner`).
Its pull lets a link go before what came over it is on stable storage (K6). So what lies between
comes up first, by thin allocation, which changes no content and no name::

    allocate    what the layers that go hold, and the zeros that a short one hides (K20)
    flush       it is on stable storage
    pull        by the manager: nothing is left to copy, and the link goes
    look        QEMU and the manager have the same chain, and it is the one that was wanted

Whoever dies on the way: the content is the same, and the active image too.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.allocation.plan import below
from qmpblock.allocation.thin import allocator
from qmpblock.cancellation import undisturbed
from qmpblock.chains import jobs
from qmpblock.chains.asking import Asking
from qmpblock.chains.jobs import ChainJob, Outcome, changed
from qmpblock.chains.look import look, work_of
from qmpblock.chains.owner import is_asked, manager_names
from qmpblock.chains.plan import StreamPlan, check_unchanged, plan_stream
from qmpblock.changes.change import Change
from qmpblock.changes.finalize import flush
from qmpblock.changes.identity import identify
from qmpblock.changes.operations import ThinAllocation
from qmpblock.errors import GraphError, RequestError, printable
from qmpblock.host.imagefiles import image_files
from qmpblock.names import lock_names, new_run
from qmpblock.qemu import ownership
from qmpblock.qemu.feed import working
from qmpblock.ranges import Ranges
from qmpblock.speed import Speed

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.mapping import MappedDisk

__all__ = ["stream"]


@asynccontextmanager
async def stream(
    disk: MappedDisk, *, top: str | None = None, base: str | None = None, speed: int = 0
) -> AsyncIterator[ChainJob]:
    """Copy what the layers between `top` and `base` hold into `top`, and drop them.

    See `Disk.stream`.
    """
    plan: StreamPlan | None = None
    if is_asked(disk.vm):
        async with disk.vm.unless_gone():
            found = await look(
                disk, lambda *seen: plan_stream(seen[0], seen[1], top, base, seen[2]), lent=True
            )
        assert isinstance(found, StreamPlan)
        plan = found
    if plan is None or not plan.leaving or plan.top.depth:
        # Into another layer than the active one no manager pulls: it is refused there.
        async with jobs.stream(disk, top=top, base=base, speed=speed) as job:
            yield job
        return
    if speed < 0:
        raise RequestError(f"a speed of {speed} bytes a second is none")
    [name] = await manager_names(disk.vm, [plan.device])
    pulling = _Pulling(disk, plan, name, Speed(speed))
    job = pulling.job
    async with working(pulling.run(), job):
        yield job
    job.outcome = pulling.outcome()


class _Pulling:
    """A stream by the manager, on its way.

    :param name: what the manager calls the disk.
    """

    def __init__(self, disk: MappedDisk, plan: StreamPlan, name: str, speed: Speed) -> None:
        self.job = _PullJob(disk.vm, f"pull-{name}", "stream")
        self.job.warnings = plan.warnings
        self.job.limit = speed
        self._disk = disk
        self._plan = plan
        self._name = name
        self._asking = Asking(
            disk,
            name,
            standing="what was copied stays; the chain is as it was",
            work=work_of(disk, plan),
        )
        self._speed = speed
        self._began = time.monotonic()
        self._seconds = 0.0

    async def run(self) -> None:
        """Do all of it. Cancelled, the manager's job is given up; what was copied stays."""
        disk, plan, vm = self._disk, self._plan, self._disk.vm
        where = self._between(await disk.map())
        if where:
            async with allocator(disk) as thin:
                await thin.allocate_ranges(where, speed=self._speed, progress=self.job.show)
        record = ThinAllocation(
            run=new_run(),
            vm=await identify(vm),
            devices=(plan.device.qom_path,),
            names=(plan.device.name,),
            locks=lock_names([plan.device]),
            images=image_files(vm.monitor.peer_pid, plan.device.chain),
        )
        change = Change(vm, record, journaled=False)
        await change.begin()
        async with change.or_undo(
            lambda: (
                "what was copied stays, its content is the same; nothing of ours is left in the VM"
            )
        ):
            await flush(vm, plan.device, plan.top.node.name)
            check_unchanged(await vm.graph(), plan.device)
            layers = await self._asking.layers()
            base = "" if plan.base is None else self._asking.named(layers[plan.base.depth])
            await ownership.ask(vm.monitor, [plan.device], standing=None)
            await vm.monitor.through(lambda lender: lender.pull(self._name, base))
            try:
                await self._asking.follow(self.job, "dropping")
            except BaseException:
                await undisturbed(self._asking.give_up())
                raise
            dropped = self._asking.check_dropped(
                self._plan.leaving, "pull", "what was copied stays, its content is the same"
            )
            await undisturbed(dropped)
            await undisturbed(self._check_active())
            await undisturbed(change.end())
        self._seconds = time.monotonic() - self._began

    async def _check_active(self) -> None:
        """See that it was pulled into the layer into which it was to be: libvirt takes no name.

        :raise GraphError: somebody has put another layer on that before.
        """
        active = self._disk.chain.active
        if active.node.name != self._plan.top.node.name:
            await flush(self._disk.vm, self._disk.device, active.node.name)
            raise GraphError(
                f"somebody else has taken a snapshot of {self._name} in the last moment: libvirt "
                f"has pulled all into {printable(active.file)}",
                standing="the content of the disk is the same; "
                f"{printable(self._plan.top.file)} is not in its chain any more",
                remedy="see whether whoever took the snapshot still wants that image",
            )

    def _between(self, seen: AllocationMap) -> Ranges:
        """Return what the layers that go supply, or hide, in whole clusters of the active one."""
        base = self._plan.base
        wanted = below(seen)
        if base is not None:
            wanted = wanted & seen.where(seen.depth < base.depth)
        unit = self._plan.top.node.cluster_size or 512
        return wanted.align_out(unit, self._disk.size)

    def outcome(self) -> Outcome:
        """Return what it did."""
        return replace(changed("stream", self._disk, self._plan), seconds=self._seconds)


class _PullJob(ChainJob):
    """The job of a stream that a manager brings to its end."""

    limit: Speed

    async def set_speed(self, speed: int) -> None:
        """Limit what is left to copy to `speed` bytes a second from now on; 0 is no limit."""
        self.limit.rate = speed
