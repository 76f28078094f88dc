"""The proof of a copy: its target, closed, against the very point that it is of.

It is taken between the end of the jobs and that of the point. The target is closed first, so that
what is read is what anybody else will find in it, and by another program, qemu-nbd; only where
QEMU alone has the key does QEMU read it, opened anew. The point is read through an export of ours.

Of a copy of the end there is no such moment: its point passes with the guest's next write, and
until then the guest waits.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from qmpblock.copying.hostspace import verify_space
from qmpblock.copying.meter import DiskMeters
from qmpblock.copying.targetfile import TargetFile
from qmpblock.copying.verify import verify
from qmpblock.copying.windows import CONTEXT
from qmpblock.errors import UNTOUCHED, Error, NBDRequestError, UnsupportedError, printable
from qmpblock.export.session import Request, check_access, exports
from qmpblock.host.closedimage import ClosedImage, closed_image
from qmpblock.host.qemunbd import QemuNbd
from qmpblock.names import storage_node
from qmpblock.sizes import human_size

if TYPE_CHECKING:
    from qmpblock.copying.backups import Backups
    from qmpblock.copying.hostspace import HostSpace
    from qmpblock.copying.job import CopyJob
    from qmpblock.copying.plan import CopyPlan, Point
    from qmpblock.copying.verify import Verification
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection

__all__ = ["check_provable", "check_served", "prove", "work"]

_PHASE = "verifying"
_UNIT = 64 << 10  # bytes; the largest in which file systems give space to raw files, as a rule


async def check_provable(
    vm: Connection, plans: Sequence[CopyPlan], at: Point, *, tries: bool = True
) -> None:
    """Refuse what could not be proven once it is copied; nothing is touched.

    :param tries: whether the VM's NBD server is started for it, and stopped: where nobody else
        starts it in the same breath.
    :raise UnsupportedError: there will be no point to prove it against, or nothing to read it by.
    :raise BusyError: somebody has the VM's NBD server, of which there is one.
    """
    if at != "start":
        raise UnsupportedError(
            "a copy of the end cannot be proven while the guest goes on: its point passes with the "
            "guest's next write, which would have to wait until all is compared",
            standing=UNTOUCHED,
            remedy="have a copy of the start proven (--at start); or stop the guest for good at "
            "that moment, and compare the closed images: qmpblock verify IMAGE TARGET",
        )
    for plan in plans:
        if plan.server is not None:
            raise UnsupportedError(
                f"a copy by NBD cannot be proven: many a server, as that of {printable(plan.file)} "
                "may be, serves one client and ends, which the copy is",
                standing=UNTOUCHED,
                remedy="copy into a file to have that proven",
            )
        if plan.block_device:  # it may be larger, and what of it is zeros it does not tell
            raise UnsupportedError(
                f"a copy on a block device ({printable(plan.file)}) is not proven",
                standing=UNTOUCHED,
                remedy="copy into a file to have that proven",
            )
    program = QemuNbd().program
    if shutil.which(program) is None and not all(_needs_key(plan) for plan in plans):
        raise UnsupportedError(
            f"there is no {program} on this host, by which the copy is to be read",
            standing=UNTOUCHED,
            remedy="install it (Debian: qemu-utils)",
        )
    await check_served(vm, plans, tries=tries)


async def check_served(vm: Connection, plans: Sequence[CopyPlan], *, tries: bool = True) -> None:
    """Refuse where disks could not be exported to us; nothing is touched.

    :param tries: as of `check_provable`.
    :raise UnsupportedError: not over this monitor, or not safely.
    :raise BusyError: somebody has the VM's NBD server, of which there is one.
    """
    for plan in plans:
        await check_access(vm.monitor, vm.nbd, plan.device)
    if not tries:
        return
    # Whether a foreign server runs QEMU does not tell, but by starting ours.
    async with exports(vm.monitor, None, [], access=vm.nbd, stall=vm.stall):
        pass


async def work(backups: Backups, *, proven: bool) -> None:
    """Copy, and have the copies proven before the point is given up, where that is wanted.

    :raise Error: as of `Backups.work` and `prove`.
    """
    await backups.work()
    if proven:
        here = [one for one in backups.targets if isinstance(one, TargetFile)]
        job = backups.job
        job.warnings += await prove(backups.vm, here, job, held=backups.stays)


async def prove(
    vm: Connection, targets: Sequence[TargetFile], job: CopyJob, *, held: bool
) -> tuple[str, ...]:
    """Compare each target with its `source`, one after another, and return what to warn of.

    The targets' jobs have ended, and QEMU closes the targets. Whoever ends the change ends what
    else is there. Cancelling stops at once.

    :param job: is told how far it is.
    :param held: whether QEMU refuses to migrate meanwhile.
    :raise Error: one is not what its disk held.
    :raise NBDError: one cannot be read; or the point cannot, which was given up.
    """
    for target in targets:
        await _remove_nodes(vm, target)
        await target.settle(vm)  # what is proven is not touched any more
    sizes = {target.plan.device.name: target.plan.size for target in targets}
    shown = DiskMeters(_PHASE, sizes, job)
    warnings: list[str] = []
    for target in targets:
        image = None
        if not _needs_key(target.plan):
            image = await closed_image(target.path, format=target.plan.format, stall=vm.stall)
        found = await _compared(vm, target, image, shown, job, held=held)
        if not found.equal:
            target.keeps = False
            raise _unequal(target.plan, found)
        warnings += await _space(target, image)
    return tuple(warnings)


def _needs_key(plan: CopyPlan) -> bool:
    """Whether the target, or what it lies on, is encrypted."""
    return any(layer.node.encrypted for layer in plan.device.chain.layers)


async def _remove_nodes(vm: Connection, target: TargetFile) -> None:
    for node in (target.node, storage_node(target.node)):
        await vm.monitor.execute("blockdev-del", {"node-name": node})


async def _compared(
    vm: Connection,
    target: TargetFile,
    image: ClosedImage | None,
    shown: DiskMeters,
    job: CopyJob,
    *,
    held: bool,
) -> Verification:
    """Compare one target with its point, byte for byte.

    :param image: the target; None where only QEMU can read it.
    """
    try:
        async with _clients(vm, target, image, held=held) as (point, reopened):
            return await verify(
                point,
                reopened if image is None else image,
                all=True,
                progress=shown.of(target.plan.device.name),
                stall=vm.stall,
                turn=job.turn,
            )
    except NBDRequestError as error:
        error.message = f"the copy cannot be compared with its point: {error.message}"
        error.remedy = (
            "where the point had to be given up, because what the guest overwrote had no room, "
            "give it more (--fleece DIRECTORY); if not, look at the storage of the disk and of "
            "the copy"
        )
        raise
    except Error as error:
        error.standing = None  # it speaks of what it was given to compare; more is touched by now
        raise


@asynccontextmanager
async def _clients(
    vm: Connection, target: TargetFile, image: ClosedImage | None, *, held: bool
) -> AsyncIterator[tuple[Client, Client]]:
    """Yield clients of the point, and of the target where that is read through QEMU, too."""
    nodes = [target.source]
    if image is None:
        await target.open(vm, read_only=True)
        nodes.append(target.node)
    requests = [Request(node, (CONTEXT,)) for node in nodes]
    device = target.plan.device
    async with exports(
        vm.monitor, device, requests, access=vm.nbd, stall=vm.stall, held=held
    ) as clients:
        yield clients[0], clients[-1]
    if image is None:
        await _remove_nodes(vm, target)


def _unequal(plan: CopyPlan, found: Verification) -> Error:
    name, target = plan.device.name, printable(plan.file)
    if found.first_difference is None:
        how = f"it is of {found.sizes[1]:,} bytes, the disk of {found.sizes[0]:,}"
    else:
        how = f"{found.differing:,} bytes differ, the first at offset {found.first_difference}"
    return Error(
        f"the copy {target} is not what {name} held: {how}; it is not kept",
        remedy="what QEMU wrote there does not read as it was, or somebody else wrote to it: find "
        "out which before relying on that storage; then copy again, perhaps to another one",
    )


async def _space(target: TargetFile, image: ClosedImage | None) -> list[str]:
    """Compare what has host space in a target with what was asked for; return what to warn of.

    :raise Error: it lacks some.
    """
    plan, shape = target.plan, target.plan.shape
    if image is None:
        if shape.allocation == "thin":
            return []
        name, asked = printable(plan.file), shape.allocation
        return [f"the copy {name} is right; whether it is allocated {asked} only its key shows"]
    like = shape.allocation if shape.allocation != "like" else target.model
    assert like is not None  # whoever made the target has set it
    unit = shape.unit if plan.format == "qcow2" else _UNIT
    # The guest wrote on while the map was read: what is copied thin and no zeros, the disk held.
    space = await verify_space(image, like, cluster=unit, written=True)
    target.keeps = target.keeps and not (space.lacking.total or space.short)
    return _warnings(plan, space)


def _warnings(plan: CopyPlan, space: HostSpace) -> list[str]:
    """Return what to say of a target that has more host space than was asked for.

    :raise Error: it has less.
    """
    name, asked = printable(plan.file), f"--allocation {plan.shape.allocation}"
    if missing := space.lacking.total + space.short:
        raise Error(
            f"the copy {name} is right, but {human_size(missing)} of it have no host space, which "
            f"{asked} wants; it is not kept",
            remedy="look whether its file system keeps what is reserved there (fallocate); or "
            "copy to another one, or without --allocation",
        )
    if space.as_asked:
        return []
    excess = human_size(space.excess.total)
    return [
        f"the copy {name} is right, but not {plan.shape.allocation}: {excess} of zeros are stored"
    ]
