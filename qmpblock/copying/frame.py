"""What copies of all kinds have in common: before their jobs begin, and when these have ended.

What stands then is said here, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmpblock.chains.plan import check_unchanged
from qmpblock.changes.change import Change
from qmpblock.changes.copies import Copy, ManagersMove, Move
from qmpblock.changes.operations import PointInTime
from qmpblock.changes.record import WORTH
from qmpblock.changes.settle import settle
from qmpblock.changes.step import Choice
from qmpblock.copying.job import CopyJob
from qmpblock.copying.resuming import give_up
from qmpblock.copying.wiretarget import bounded
from qmpblock.errors import Error, GraphError, printable
from qmpblock.graph.places import FileId
from qmpblock.mapping import other_active

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.graph.model import DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = [
    "check_actives",
    "check_top",
    "done",
    "finish",
    "finish_all",
    "names_of",
    "note_made",
    "remove_marked",
    "unchanged",
    "undone",
    "whole",
]


def note_made(change: Change[Copy | ManagersMove], file: CopyTarget, made: FileId) -> None:
    """Have the journal, where there is one, say which file is ours, and whether it is kept."""
    if change.journal is not None:
        if file.resumed:
            change.journal.add(**{"file": file.path, WORTH: True})
        change.journal.add(made=file.path, dev=made.device, ino=made.inode)


async def unchanged(vm: Connection, files: Sequence[CopyTarget]) -> None:
    """Look again, now that no controller of ours can change the disks."""
    graph = await vm.graph()
    for file in files:
        check_unchanged(graph, file.plan.device)


async def check_actives(vm: Connection, devices: Sequence[DiskDevice]) -> None:
    """See that disks that are still there have the active layers that they had.

    :raise GraphError: one has another.
    """
    graph = await vm.graph()
    active = {one.qom_path: one.chain.active.node.name for one in graph.disks()}
    for device in devices:
        meant = device.chain.active.node.name
        if active.get(device.qom_path, meant) != meant:
            raise other_active(device.name)


async def check_top(vm: Connection, files: Sequence[CopyTarget]) -> None:
    """See that jobs which copy the uppermost layer alone have begun with the one that was meant.

    QEMU takes for it whichever is it when the job begins (K46), below filters: of an overlay that
    somebody put there by then the copy would hold nothing else.

    :raise GraphError: another one is the active layer.
    """
    await check_actives(vm, [file.plan.device for file in files])


async def finish(
    change: Change[Copy | ManagersMove | PointInTime], files: Sequence[CopyTarget], job: CopyJob
) -> None:
    """Remove what the jobs left, give the targets their names, and end.

    What the guest did not go over to QEMU closes, which flushes it.
    """
    for file in files:
        await file.flush(change.vm)
    with bounded(files):
        graph = await settle(change.vm, change.record, change.journal, Choice.UNDO)
    if isinstance(change.record, Move | ManagersMove) and change.record.took_effect(graph) is False:
        raise GraphError(
            "QEMU reports success, but the guest is not on the copies",
            remedy="somebody else changed it at the same time; look at it: qmpblock disks ADDRESS",
        )
    await finish_all(change.vm, files, job)
    await change.end()


async def finish_all(vm: Connection, files: Sequence[CopyTarget], job: CopyJob) -> None:
    """Have all targets whole, on stable storage, under their names."""
    for file in files:
        await file.finish(vm)
    job.whole = True


async def remove_marked(change: Change[Copy], files: Sequence[CopyTarget], job: CopyJob) -> None:
    """Leave of targets that are not whole what `give_up` does: QEMU closes them first."""
    if isinstance(change.record, Move):
        # Its journal tells which are ours, which are kept, and whether the guest is there.
        for file in files:
            if change.journal is not None and not file.keeps and file.path in change.journal.kept():
                with contextlib.suppress(Error):
                    change.journal.add(**{"file": file.path, WORTH: False})
        return
    with contextlib.suppress(Error):  # whoever undoes it says why
        await settle(change.vm, change.record, change.journal, Choice.UNDO)
    await give_up(files, job)


def undone(files: Sequence[CopyTarget], job: CopyJob, over: Sequence[str] = ()) -> str:
    """Say what stands once a copy was undone.

    :param over: disks that had gone over to their copies.
    """
    if over:
        return (
            f"gone over to their copies: {', '.join(over)}, and no other disk; look: qmpblock "
            "disks ADDRESS"
        )
    if job.whole:
        return f"{whole(files)}; nothing of ours is left in the VM"
    names = names_of(files)
    stays = any(file.plan.server or file.plan.block_device for file in files)
    return (
        f"there is no copy {names}"
        + (", whatever was written there" if stays else "")
        + "; the guest is where it was; nothing of ours is left in the VM"
    )


def done(files: Sequence[CopyTarget]) -> str:
    """Say what stands where the guest had gone over when a copy was undone."""
    return (
        f"the guest had gone over to {names_of(files)} already; nothing of ours is left in the VM"
    )


def whole(files: Sequence[CopyTarget]) -> str:
    """Say that copies are whole."""
    return f"whole, and on stable storage: {names_of(files)}"


def names_of(files: Sequence[CopyTarget]) -> str:
    """Return the names of targets, for people."""
    return ", ".join(printable(file.plan.file) for file in files)
