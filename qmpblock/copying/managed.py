"""A copy to which the guest goes over, by the manager that lends the monitor: then it knows of it.

What it does not see to is done around it::

    targets     made as any other's; the manager has QEMU open them
    copy        by jobs of the manager's, until each has caught up with the guest
    pause       the VM: from here on old images and copies hold the same
    pivot       by the manager, one disk after the other
    agree       it names the copies, now and at the next start, as QEMU does (K41)
    resume

Its jobs are background mirrors, which end where a target fails: no target is in the guest's way
(F41). Whoever dies on the way: the VM, started from what the manager names, has lost nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpblock.cancellation import task_group, undisturbed
from qmpblock.chains.asking import Asking
from qmpblock.chains.owner import manager_names
from qmpblock.changes.change import Change
from qmpblock.changes.copies import ManagersMove
from qmpblock.changes.finalize import keep_exports_away, until_unused
from qmpblock.changes.identity import identify
from qmpblock.changes.known import NEAR, pivot
from qmpblock.changes.record import ASKED
from qmpblock.copying.catchup import HOLD
from qmpblock.copying.job import CopyJob
from qmpblock.copying.storing import store
from qmpblock.copying.targetfile import TargetFile
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    GraphError,
    JobError,
    StalledError,
    UnsupportedError,
    printable,
)
from qmpblock.host.imagefiles import images_of
from qmpblock.host.openfiles import OpenFiles
from qmpblock.managers import Work
from qmpblock.names import lock_names, paused_node
from qmpblock.qemu.job import Job, Progress
from qmpblock.speed import RateMeter

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.options import CopyOptions
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.graph.model import DiskDevice
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["Moving", "check_asked", "record_of"]

_LEAST = 1 << 20  # bytes that may be left when the guest is paused, however slow the target is
_TELLS = 0.1  # seconds in which QEMU has said by what a job failed that is gone


async def check_asked(vm: Connection, plan: CopyPlan, options: CopyOptions) -> None:
    """Refuse what the manager is not asked for; nothing was touched.

    :raise UnsupportedError: it is that, or it knows the disk by no file.
    """
    [name] = await manager_names(vm, [plan.device])
    await _files_of(vm, [name])
    by_itself = f"virsh blockcopy DOMAIN {name} --xml TARGET.xml --transient-job --wait --pivot"
    chain = plan.device.chain
    what = ""
    if options.resume:
        what, remedy = "copies anew each time, and goes on from nothing", "leave --resume out"
    elif plan.secret is not None:
        what = "would have to be told the key of the copy of an encrypted disk"
        remedy = by_itself
    elif chain.filters:
        driver = chain.filters[0].driver
        what = f"is not asked to have a copy take an image's place below a filter ({driver})"
        remedy = by_itself
    elif plan.format != "raw" and plan.shape.allocation == "full":
        what = (
            "copies zeros so that they take no host space, and once the guest is there nobody "
            "else writes to a qcow2 copy"
        )
        remedy = "go over to a raw one; or leave --allocation full out"
    elif plan.shape.allocation == "like" and chain.active.node.detect_zeroes != "off":
        what = (
            "opens the copy with detect-zeroes, as the disk has it: what was written as zeros "
            "would have no host space there"
        )
        remedy = "leave --allocation like out"
    if what:
        raise UnsupportedError(f"libvirt {what}", standing=UNTOUCHED, remedy=remedy)


async def _files_of(vm: Connection, names: Sequence[str]) -> list[str]:
    """Return the files that the manager takes for the images of these disks.

    :raise UnsupportedError: it knows one by no file, or by another one at the next start.
    """
    now, later = await vm.monitor.through(lambda lender: lender.files())
    for name in names:
        if not now.get(name):
            raise UnsupportedError(
                f"libvirt names no file for the image of {printable(name)}",
                standing=UNTOUCHED,
                remedy="virsh blockcopy, which knows disks of other types than files",
            )
        if later is not None and later.get(name, now[name]) != now[name]:
            raise UnsupportedError(
                f"libvirt takes {printable(now[name])} for the image of {printable(name)}, but "
                f"{printable(later[name]) or 'none'} at the next start, and would not change that",
                standing=UNTOUCHED,
                remedy="have it name the same: virsh edit DOMAIN",
            )
    return [now[name] for name in names]


async def record_of(vm: Connection, run: str, files: Sequence[CopyTarget]) -> ManagersMove:
    """Return what the locks and the journal are to say."""
    devices = [file.plan.device for file in files]
    names = await manager_names(vm, devices)
    return ManagersMove(
        run=run,
        vm=await identify(vm),
        devices=tuple(device.qom_path for device in devices),
        names=tuple(device.name for device in devices),
        locks=lock_names(devices),
        nodes=(paused_node(run),),
        files=tuple(file.plan.file for file in files),
        images=images_of(vm.monitor.peer_pid, [device.chain for device in devices]),
        managed_as=tuple(names),
        sources=tuple(device.chain.active.node.name for device in devices),
        source_files=tuple(await _files_of(vm, names)),
    )


class Moving:
    """Disks that their manager copies, and has the guest go over to the copies.

    :ivar held: seconds for which the VM was paused.
    :ivar attempts: at bringing the disks to one instant.
    :ivar last: the progress of each disk, by what people call it.
    :ivar over: the disks that went over where not all did.
    """

    def __init__(
        self,
        change: Change[ManagersMove],
        disks: Sequence[MappedDisk],
        files: Sequence[CopyTarget],
        job: CopyJob,
    ) -> None:
        self._change = change
        self._vm = change.vm
        self._files = files
        self._job = job
        self._jobs = tuple(
            _ManagersJob(disk, name, job)
            for disk, name in zip(disks, change.record.managed_as, strict=True)
        )
        self.held = 0.0
        self.attempts = 0
        self.over: list[str] = []

    @property
    def last(self) -> Mapping[str, Progress]:
        """The progress of each disk, by what people call it."""
        return self._job.disks

    async def work(self) -> None:
        """Copy, wait until the end is wanted, and have the guest go over.

        Cancelling leaves jobs: whoever undoes the copy has them given up.

        :raise JobError: a job failed: its target did, or the guest's image.
        :raise StalledError: one did not move, or does not catch up with the guest.
        :raise Error: the manager did not do it.
        """
        self._job.runs(self._jobs)
        try:
            for one, file in zip(self._jobs, self._files, strict=True):
                await one.begin(file, self._job.share())
            await self._check_sources()
            await self._catch_up()
            await self._go_over()
        finally:
            for one in self._jobs:
                one.end()
        self._job.finished()

    async def _catch_up(self) -> None:
        """Have all copied but for what the guest, once paused, does not wait for long."""
        async with task_group() as group:
            for one in self._jobs:
                group.create_task(one.catch_up())
            group.create_task(self._ask())
        while not all([await one.manager.is_near() for one in self._jobs]):
            for one in self._jobs:
                await one.catch_up()

    async def _check_sources(self) -> None:
        """See that the jobs copy what was planned: now that they run nobody puts layers on it.

        What lies below a copy of the top alone would lack a layer that came meanwhile.

        :raise GraphError: somebody has put another layer on a disk before.
        """
        graph = await self._vm.graph()
        for file in self._files:
            before = file.plan.device
            now = graph.device(before.qom_path)
            if _layers(now) != _layers(before):
                raise GraphError(
                    f"the chain of {printable(before.name)} has just been changed by somebody else",
                    remedy="look at it, then copy again: qmpblock disks ADDRESS",
                )

    async def _ask(self) -> None:
        await self._job.completion.wait()
        for one in self._jobs:
            one.completion_asked = True

    async def _go_over(self) -> None:
        vm, record, journal = self._vm, self._change.record, self._change.journal
        self.attempts += 1
        await self._job.hurry()
        for one in self._jobs:
            await one.set_speed(0)  # the guest waits for it
        await self._store()
        async with AsyncExitStack() as alone:
            await keep_exports_away(vm, record.sources, alone)
            await until_unused(vm, record)
            self._check_targets()
            assert journal is not None  # begin() wrote it
            journal.mark(**{ASKED: True})
            began = time.monotonic()
            try:
                await undisturbed(pivot(vm, record, journal, *record.managed_as))
            except BaseException:
                with contextlib.suppress(Error):  # whoever undoes it says what is
                    await undisturbed(self._note_over())
                raise
            finally:
                self.held = time.monotonic() - began

    async def _store(self) -> None:
        """Have the copies on stable storage but for what the guest, once paused, waits for.

        :raise Error: that would be long.
        """
        for last in (False, True):
            for file in self._files:
                assert isinstance(file, TargetFile)  # a copy with a pivot makes files
                took = await store(file, self._vm.stall)
                if last and took > HOLD:
                    raise Error(
                        f"the guest would have to be paused for more than {HOLD:g} s: "
                        f"{printable(file.path)} takes in its last bytes too slowly",
                        remedy="let the guest write less, or copy to faster storage",
                    )

    def _check_targets(self) -> None:
        """See that QEMU has open what was made here, and that its name leads there.

        :raise Error: somebody has put another file there, or moved it.
        """
        files = OpenFiles(self._vm.monitor.peer_pid)
        for file in self._files:
            assert isinstance(file, TargetFile)
            file.check_place()
            if files.blind is None and file.made not in files.ids():
                raise GraphError(
                    f"libvirt has QEMU copy to another {printable(file.path)} than was made",
                    remedy="somebody has replaced it; copy again, to where nobody does",
                )

    async def _note_over(self) -> None:
        graph = await self._vm.graph()
        record = self._change.record
        self.over = [
            name
            for name, known in zip(record.names, record.managed_as, strict=True)
            if record.passage(known).is_over(graph)
        ]


def _layers(device: DiskDevice) -> list[str]:
    return [layer.node.name for layer in device.chain.layers]


class _ManagersJob(Job):
    """A job of the manager's that copies a disk.

    :ivar manager: by which it is followed and steered.
    """

    def __init__(self, disk: MappedDisk, name: str, job: CopyJob) -> None:
        # What libvirt calls its job, so that it can be paused.
        super().__init__(disk.vm.monitor, f"copy-{name}-{disk.chain.active.node.name}", "mirror")
        work = Work("move", disk.chain.active.file)
        self.manager = Asking(disk, name, standing="the guest is where it was", work=work)
        self._disk = disk
        self._copy = job
        self._meter = RateMeter()

    async def begin(self, file: CopyTarget, speed: int) -> None:
        """Have the manager begin.

        :param speed: bytes a second; 0 is no limit.
        """
        plan, name = file.plan, self.manager.name
        top = plan.backing is not None
        await self._monitor.through(
            lambda lender: lender.copy(name, plan.file, plan.format, top=top, speed=speed)
        )

    async def catch_up(self) -> None:
        """Wait until it has, and the end is wanted.

        :raise JobError: it failed; in QEMU's words, if there are any.
        :raise Error: it does not.
        """
        try:
            await self.manager.catch_up(self)
        except StalledError:
            raise
        except Error:
            if (words := await self._said()) is not None:
                raise JobError(self.id, self.type, words) from None
            raise

    async def _said(self) -> str | None:
        """Return by what it failed, if QEMU has said so."""
        with contextlib.suppress(Error):  # no event is no news
            while self._verdict is None:
                self._take(await self._events.get(_TELLS))
        return self._verdict

    def show(self, seen: Progress) -> None:
        """Say how far it is; what is left when the guest is paused is to take no more than HOLD."""
        self._meter.add(time.monotonic(), seen.done)
        rate = self._meter.rate
        self.manager.near = min(NEAR, max(_LEAST, int(rate * HOLD / 2)))
        eta = seen.remaining / rate if rate and seen.status == "running" else None
        seen = replace(seen, rate=rate, eta=eta)
        super().show(seen)
        self._copy.publish(self._disk.name, seen)

    async def set_speed(self, speed: int) -> None:
        """Limit it to `speed` bytes a second from now on; 0 is no limit. Not where it is over."""
        try:
            await self.manager.limit(speed)
        except Error:
            name = self.manager.name
            if await self._monitor.through(lambda lender: lender.job(name)) is not None:
                raise
