"""Copies that a policy wants: are they there, what is missing, and how it is made.

A copy is there where its file bears the target's name, for no copy of ours bears that before it is
whole (`qmpblock.copying.targetfile`), and is an image of the format and the size that it would
have. So one that is there is left alone, however old it is; what is missing is copied, once. What
a copy left that was broken off is gone on from, or goes where that cannot be.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from qmpblock.changes.leftovers import make_way
from qmpblock.copying.devicetarget import is_block_device
from qmpblock.copying.dryrun import dry_run
from qmpblock.copying.plan import plan_copy
from qmpblock.copying.targetname import absolute, drop_unfinished
from qmpblock.errors import UNTOUCHED, Error, RequestError, printable
from qmpblock.graph.places import FileId
from qmpblock.host.closedimage import closed_image
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.space import HostSpace, end_of
from qmpblock.names import lock_names, partial_file
from qmpblock.policy.space import Take, unless_short

if TYPE_CHECKING:
    from qmpblock.copying.job import CopyResult
    from qmpblock.copying.options import CopyWords
    from qmpblock.copying.planned import PlannedCopy
    from qmpblock.policy.copyentry import CopyPolicy
    from qmpblock.qemu.job import Progress
    from qmpblock.vm import VM, Disk

__all__ = ["CopiesPlan", "CopiesResult", "look_at_copies", "make_copies"]


@dataclass(frozen=True)
class CopiesPlan:
    """What is to be done for one entry of copies.

    :ivar name: of the disks in their VM.
    :ivar there: the files of the copies, where all are there.
    :ivar planned: how they would be made; None where they are there, or `error` says why not.
    :ivar takes: what they take of the host's space.
    """

    policy: CopyPolicy
    name: str
    there: tuple[str, ...] = ()
    planned: PlannedCopy | None = None
    takes: tuple[Take, ...] = ()
    warnings: tuple[str, ...] = ()
    error: Error | None = None

    @property
    def has_work(self) -> bool:
        """Whether there is something to do."""
        return self.planned is not None

    def failed(self, error: Error) -> CopiesPlan:
        """Return it with the reason why it cannot be done."""
        return replace(self, error=error)


@dataclass(frozen=True)
class CopiesResult:
    """What was done for one entry of copies.

    :ivar state: `done`, `nothing` (to do), or `failed`.
    :ivar made: what was made; None where nothing was.
    """

    policy: CopyPolicy
    name: str
    state: Literal["done", "nothing", "failed"]
    made: CopyResult | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    error: Error | None = None


async def look_at_copies(vm: VM, wanted: CopyPolicy, *, undo: bool) -> CopiesPlan:
    """Look whether copies are there, and plan those that are not.

    :param undo: also undo what a controller that died left; else that is an error.
    :raise Error: they cannot be made; nothing was touched.
    """
    disks = {await vm.disk(name): absolute(file) for name, file in wanted.targets}
    if len(disks) < len(wanted.targets):
        raise RequestError(f"a disk is named twice: {wanted.place}", standing=UNTOUCHED)
    name = ", ".join(disk.name for disk in disks)
    there = [file for disk, file in disks.items() if await _is_there(disk, file, wanted)]
    if len(there) == len(disks):
        return CopiesPlan(wanted, name, tuple(there))
    if there and not wanted.options.force:
        raise RequestError(
            f"{printable(there[0])} is there, and not all that are to be of its instant",
            standing=UNTOUCHED,
            remedy="remove it, or name other targets; `force: yes` replaces it, once all are whole",
        )
    if undo:
        await make_way(vm, lock_names([disk.device for disk in disks]))
    words = _words(wanted, disks.values())
    planned = await dry_run(vm, disks, restarts=not words["resume"], **words)
    keep = wanted.keep_free
    takes = tuple(
        Take(HostSpace.of(room.path, keep), room.needed, partial_file(one.target))
        for one in planned.disks
        if (room := one.room) is not None
    )
    return CopiesPlan(wanted, name, (), planned, takes, planned.warnings)


def _words(wanted: CopyPolicy, files: Iterable[str]) -> CopyWords:
    """Return the options as keywords.

    What another copy has left is gone on from: only where it has, for that takes more. Of the end
    the VM is paused for it, which the plan says.
    """
    words = cast("CopyWords", dict(vars(wanted.options)))
    left = any(os.path.lexists(partial_file(file)) for file in files)
    asked = wanted.options
    made_anew = asked.compress or asked.cluster_size is not None  # what is there is as it was made
    words["resume"] = left and not made_anew
    return words


async def _is_there(disk: Disk, file: str, wanted: CopyPolicy) -> bool:
    """Whether a whole copy of a disk bears a name.

    :raise RequestError: something bears it that is none, and must not go.
    """
    try:
        status = await asyncio.to_thread(Path(file).stat)
    except OSError:
        return False
    if is_block_device(file):
        raise RequestError(
            f"{printable(file)} is a block device, of which nothing tells that a copy there is "
            "whole; a policy asks for files",
            standing=UNTOUCHED,
            remedy="name a file, or copy there yourself: qmpblock copy",
        )
    if FileId.of(status) in OpenFiles(disk.vm.monitor.peer_pid).ids():
        raise RequestError(
            f"{printable(file)} is open in the VM itself: an image of it is no copy of {disk.name}",
            standing=UNTOUCHED,
            remedy="name another target",
        )
    options = wanted.options
    plan = plan_copy(disk.device, file, options.format, options.layers, pivot=False)
    size = None
    if stat.S_ISREG(status.st_mode):
        size = await _size_of(file, plan.format, disk.vm.stall)
    if size == plan.size:
        return True
    if options.force and stat.S_ISREG(status.st_mode):
        return False
    held = f"no {plan.format} image" if size is None else f"an image of {size} bytes"
    raise RequestError(
        f"{printable(file)} is {held}, so it is no copy of {disk.name}, which has {plan.size}",
        standing=UNTOUCHED,
        remedy="remove it, or name another target; `force: yes` replaces it once the copy is whole",
    )


async def _size_of(file: str, fmt: str, stall: float) -> int | None:
    """Return the size of the disk that an image holds; None where it is no such image."""
    if fmt == "raw":
        return end_of(file)
    try:
        return (await closed_image(file, format=fmt, stall=stall)).size
    except Error:
        return None


async def make_copies(
    vm: VM, plan: CopiesPlan, progress: Callable[[Progress], None]
) -> CopiesResult:
    """Make what was planned.

    :param progress: is called with how far all are.
    :raise Error: as of `VM.copy`, or the host has too little free.
    """

    def give_back() -> None:
        for _, file in plan.policy.targets:
            drop_unfinished(absolute(file))

    return await unless_short(
        _made(vm, plan, progress),
        [one.space for one in plan.takes],
        standing="there is no copy, and nothing of ours is left in the VM",
        remedy="make room, then apply it again",
        give_back=give_back,
    )


async def _made(vm: VM, plan: CopiesPlan, progress: Callable[[Progress], None]) -> CopiesResult:
    wanted = plan.policy
    disks = {await vm.disk(name): absolute(file) for name, file in wanted.targets}
    words = _words(wanted, disks.values())
    if not words["resume"]:
        for file in disks.values():
            await asyncio.to_thread(drop_unfinished, file)
    async with vm.copy(disks, **words) as job:
        async for seen in job:
            progress(seen)
            if seen.ready:
                job.completion.set()
    assert job.result is not None  # leaving without an error sets it
    return CopiesResult(wanted, plan.name, "done", job.result, warnings=job.result.warnings)
