"""Commit, whoever owns the chain: a job of QEMU's by us, or a manager's own.

A manager that lends its monitor drops layers itself, so that it knows (`qmpblock.chains.owner`).
What its own commit does not see to is done around it::

    middle layers       copy       into the base, by a job of ours that never ends: at its end
                        flush      what it wrote is on stable storage (K6), and it is given up
                        commit     by the manager: it writes the same once more; the link goes

    the active layer    commit     by the manager, until it has caught up
                        pause      the VM: from here on both images hold the same
                        pivot      by the manager
                        agree      it names the base, now and at the next start, as QEMU does (K41)
                        resume

Whoever dies on the way: the VM, started from what the manager names, has lost nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qmpblock.cancellation import undisturbed
from qmpblock.chains import jobs
from qmpblock.chains.asking import Asking
from qmpblock.chains.jobs import ChainJob, Outcome, changed, make_explicit
from qmpblock.chains.look import look, record_of_commit, with_settings, work_of
from qmpblock.chains.owner import is_asked, manager_names
from qmpblock.chains.plan import CommitPlan, check_unchanged, plan_commit
from qmpblock.changes.backingproof import check_record
from qmpblock.changes.change import Change
from qmpblock.changes.finalize import drive, keep_exports_away, until_unused
from qmpblock.changes.known import pivot
from qmpblock.changes.operations import ActiveCommit, Commit, ManagersCommit, ManagersPivot
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.errors import (
    UNTOUCHED,
    JobError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.names import commit_job, new_run, paused_node
from qmpblock.qemu import ownership
from qmpblock.qemu.feed import working

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk

__all__ = ["commit"]


@asynccontextmanager
async def commit(
    disk: MappedDisk,
    *,
    top: str | None = None,
    base: str | None = None,
    speed: int = 0,
    throttle_guest: int = 0,
) -> AsyncIterator[ChainJob]:
    """Copy what `top` and the layers above `base` hold into `base`, and drop them.

    See `Disk.commit`.
    """
    plan: CommitPlan | None = None
    if is_asked(disk.vm):
        async with disk.vm.unless_gone():
            found = await look(
                disk, lambda *seen: plan_commit(seen[0], seen[1], top, base, seen[2]), lent=True
            )
        assert isinstance(found, CommitPlan)
        plan = found
    if plan is None or not plan.leaving:
        async with jobs.commit(
            disk, top=top, base=base, speed=speed, throttle_guest=throttle_guest
        ) as job:
            yield job
        return
    if speed < 0:
        raise RequestError(f"a speed of {speed} bytes a second is none")
    _check(plan, throttle_guest)
    [name] = await manager_names(disk.vm, [plan.device])
    committing = (_Pivoting if plan.pivots else _Merging)(disk, plan, name, speed)
    await committing.prepare()
    job = committing.job
    async with working(committing.run(), job):
        yield job
        job.complete()
    job.outcome = committing.outcome()


def _check(plan: CommitPlan, throttle_guest: int) -> None:
    """Refuse what libvirt is not asked for.

    :raise UnsupportedError: it is that; nothing was touched.
    """
    if throttle_guest:
        raise UnsupportedError(
            "the limits of a disk of libvirt's are libvirt's",
            standing=UNTOUCHED,
            remedy="none is needed, as the VM is paused for the pivot; else virsh blkdeviotune",
        )
    for bitmap in plan.bitmaps:
        raise UnsupportedError(
            f"the dirty bitmap {printable(bitmap.name)} would have to go on in "
            f"{plan.base.describe()}, and libvirt has its own way with those",
            standing=UNTOUCHED,
            remedy="virsh blockcommit, which merges them; or delete it (virsh checkpoint-delete)",
        )


class _Committing:
    """A commit by the manager, on its way.

    :ivar job: by which it is shown.
    """

    job: ChainJob

    def __init__(self, disk: MappedDisk, plan: CommitPlan, name: str, speed: int) -> None:
        self._disk = disk
        self._vm = disk.vm
        self._plan = plan
        self._name = name
        self._speed = speed
        self._run = new_run()
        work = work_of(disk, plan)
        self._asking = Asking(disk, name, standing="the chain is as it was", work=work)
        self._layers: tuple[str, ...] = ()  # what the manager calls them
        self._files: tuple[str, ...] = ()
        self._began = time.monotonic()
        self._seconds = 0.0
        self._explicit = 0

    async def prepare(self) -> None:
        """Make the record, and refuse what the manager has no name for; nothing is touched."""
        layers = await self._asking.layers()
        self._layers = tuple(self._asking.named(layer) for layer in layers)
        self._files = tuple(file for file, _ in layers)

    async def run(self) -> None:
        """Do all of it. Cancelled, it is undone."""
        raise NotImplementedError

    async def _unchanged(self, change: Change[Any]) -> None:
        """Look again, now that no controller of ours can change the disk."""
        graph = await self._vm.graph()
        check_unchanged(graph, self._plan.device)
        check_record(change.record, graph, self._vm.monitor.peer_pid)

    async def _dropped(self) -> None:
        """See that the chain is what it should be, for QEMU and for the manager.

        :raise GraphError: it is not.
        """
        await self._asking.check_dropped(
            self._plan.leaving, "commit", "the content of the disk is the same"
        )

    def outcome(self) -> Outcome:
        """Return what it did."""
        return replace(
            changed("commit", self._disk, self._plan),
            made_explicit=self._explicit,
            pivoted=self._plan.pivots,
            seconds=self._seconds,
        )


class _Merging(_Committing):
    """Of layers below the active one."""

    def __init__(self, disk: MappedDisk, plan: CommitPlan, name: str, speed: int) -> None:
        super().__init__(disk, plan, name, speed)
        self.job = self._copying = _CopyJob(disk.vm, commit_job(self._run), "commit")
        self.job.warnings = plan.warnings

    async def prepare(self) -> None:
        await super().prepare()
        said = await record_of_commit(self._disk, self._plan, self._run)
        assert isinstance(said, Commit)
        # Whose nodes go is the manager's to close.
        self._record = said.to(ManagersCommit, leaving=())

    async def run(self) -> None:
        vm, plan, name = self._vm, self._plan, self._name
        change = Change(vm, self._record)
        await change.begin()
        async with change.or_undo(lambda: "the chain is as it was; nothing of ours is left"):
            await self._unchanged(change)
            if plan.hidden:
                self._explicit = await make_explicit(self._disk, plan.hidden)
            await ownership.ask(vm.monitor, [plan.device], standing=None)
            await self._copy(change)
            top, base = self._layers[plan.top.depth], self._layers[plan.base.depth]
            await self._asking.layers()
            await ownership.ask(vm.monitor, [plan.device], standing=None)
            await vm.monitor.through(lambda lender: lender.commit(name, base, top, active=False))
            try:
                await self._asking.follow(self.job, "dropping")
            except BaseException:
                await undisturbed(self._asking.give_up())
                raise
            await undisturbed(self._dropped())
            await undisturbed(settle(vm, self._record, change.journal, Choice.CONTINUE))
            await undisturbed(change.end())
        self._seconds = time.monotonic() - self._began

    async def _copy(self, change: Change[ManagersCommit]) -> None:
        """Have all that goes be in the base, on stable storage, and the chain as it is.

        :raise JobError: QEMU could not.
        """
        plan, job = self._plan, self._copying
        await job.start(
            "block-commit",
            {
                "device": plan.device.chain.root.name,
                "top-node": plan.top.node.name,
                "base-node": plan.base.node.name,
                "speed": self._speed,
                "on-error": job.on_error("enospc"),
            },
        )
        try:
            await drive(self._vm, self._record, change.journal, job, plan.device, held=change.held)
        except JobError:
            if not job.whole:
                raise
            await job.dismiss()


class _CopyJob(ChainJob):
    """A job that copies, and is given up where it would drop layers.

    :ivar whole: whether it came as far.
    """

    whole = False

    async def finalize(self) -> None:
        """Give it up: `drive` has flushed what it wrote."""
        await self.cancel()
        self.whole = True


class _Pivoting(_Committing):
    """Of the active layer: the guest moves on to the base."""

    def __init__(self, disk: MappedDisk, plan: CommitPlan, name: str, speed: int) -> None:
        super().__init__(disk, plan, name, speed)
        # What libvirt calls its job, so that it can be paused.
        self.job = _ManagersJob(disk.vm, f"commit-{name}-{plan.top.node.name}", "commit")
        self.job.manager = self._asking

    async def prepare(self) -> None:
        await super().prepare()
        said = await record_of_commit(self._disk, self._plan, self._run)
        assert isinstance(said, ActiveCommit)
        self._plan, said = await with_settings(self._vm, self._plan, said)
        self.job.warnings = self._plan.warnings
        top, base = self._files[self._plan.top.depth], self._files[self._plan.base.depth]
        if not top or not base:
            raise UnsupportedError(
                f"libvirt names no file for an image of {self._name}",
                standing=UNTOUCHED,
                remedy="virsh blockcommit, which knows disks of other types than files",
            )
        self._record = said.to(
            ManagersPivot,
            job="",
            leaving=(),
            nodes=(paused_node(self._run),),
            known_as=self._name,
            top_file=top,
            base_file=base,
        )

    async def run(self) -> None:
        vm, plan = self._vm, self._plan
        change = Change(vm, self._record)
        await change.begin()
        async with change.or_undo(
            lambda: "the chain is as it was; nothing of ours is left",
            done=lambda: "it was done all the same: the guest had moved on already",
        ):
            await self._unchanged(change)
            await ownership.ask(vm.monitor, [plan.device], standing=None)
            await self._catch_up()
            async with AsyncExitStack() as alone:
                await keep_exports_away(vm, (plan.top.node.name,), alone)
                await until_unused(vm, self._record)
                await undisturbed(self._pivot(change))
            await undisturbed(settle(vm, self._record, change.journal, Choice.CONTINUE))
            await undisturbed(self._dropped())
            await undisturbed(change.end())
        self._seconds = time.monotonic() - self._began

    async def _catch_up(self) -> None:
        """Have the manager's job copy until it is asked to pivot, and the guest is near.

        :raise StalledError: the guest writes faster than it copies.
        """
        name, plan = self._name, self._plan
        top, base = self._layers[plan.top.depth], self._layers[plan.base.depth]
        await self._vm.monitor.through(lambda lender: lender.commit(name, base, top, active=True))
        if self._speed:
            await self.job.set_speed(self._speed)
        await self._asking.catch_up(self.job)

    async def _pivot(self, change: Change[ManagersPivot]) -> None:
        if self._speed:
            await self.job.set_speed(0)  # the guest waits for it
        await pivot(self._vm, self._record, change.journal, self._name)


class _ManagersJob(ChainJob):
    """The job of a commit that a manager brings to its end."""

    manager: Asking

    async def set_speed(self, speed: int) -> None:
        """Limit it to `speed` bytes a second from now on; 0 is no limit."""
        await self.manager.limit(speed)
