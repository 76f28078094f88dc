"""Known: a manager that pivots a disk itself, and QEMU, are to name the same image.

A manager hears of QEMU's pivot when that is done, and notes it then. If its daemon is killed just
between, it names the stale image for ever (K41). So the VM is paused from before the pivot until
both say the same: nothing is written between, and a VM that is started from either image has lost
nothing. Where the daemon has forgotten it, the guest goes back to the image that it names, which
holds the same.

Whoever answers our queries by the manager's monitor has no change of its own under way then: so
where QEMU shows no job of its any more, what it says is its last word.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from qmpblock.changes.filters import put_back
from qmpblock.changes.journal import Journal
from qmpblock.changes.record import PIVOTED, Record
from qmpblock.errors import DisconnectedError, Error, StalledError, UnsupportedError, printable
from qmpblock.graph.model import BlockGraph, DiskDevice
from qmpblock.names import paused_node
from qmpblock.qemu.instant import instant
from qmpblock.qemu.jobstate import ACTIVE

if TYPE_CHECKING:
    from qmpblock.qemu.connection import Connection

__all__ = ["agree", "give_up", "pivot"]

_LOOK = 0.02  # seconds between looks


async def pivot(vm: Connection, record: Record, journal: Journal | None, name: str) -> None:
    """Pause the VM, have the manager pivot and know of it, and go on.

    :param name: what it calls the disk.
    :raise Error: its daemon has forgotten it; the guest is back where it was.
    """
    async with instant(vm, paused_node(record.run)):
        try:
            await vm.monitor.through(lambda lender: lender.pivot(name))
        except DisconnectedError:
            raise
        except Error:  # or its daemon went away over it, and it has been done
            if await vm.monitor.through(lambda lender: lender.job(name)) is not None:
                raise
        if not await agree(vm, record, journal, name):
            raise Error(
                f"libvirt has forgotten its pivot of {name}: its daemon was ended in the middle",
                standing="the guest goes on in the image that libvirt names; nothing is lost",
                remedy="until the VM is started again libvirt takes this disk for busy, and "
                "changes its chain no more: virsh shutdown, virsh start",
            )


async def give_up(vm: Connection, record: Record, name: str) -> None:
    """Have the manager give up its job on a disk, and wait until QEMU has none.

    :param name: what it calls the disk.
    :raise StalledError: it goes on.
    """
    _check_lent(vm, record)
    deadline = asyncio.get_running_loop().time() + vm.stall
    while _works(record, await vm.graph()):
        if asyncio.get_running_loop().time() > deadline:
            raise StalledError(
                f"libvirt does not give up its job on {printable(name)}",
                remedy=f"virsh blockjob DOMAIN {printable(name)} --abort",
            )
        with contextlib.suppress(Error):  # it is about to end, or another one was faster
            await vm.monitor.through(lambda lender: lender.abort(name))
        await asyncio.sleep(_LOOK)


async def agree(vm: Connection, record: Record, journal: Journal | None, name: str) -> bool:
    """Wait until the manager names the image that QEMU has, or have QEMU use the one that it names.

    The VM is paused. Returns whether the guest is on the base.

    :param name: what the manager calls the disk.
    :raise StalledError: its job does not come to its end.
    """
    _check_lent(vm, record)
    clock = asyncio.get_running_loop().time
    deadline = clock() + vm.stall
    while True:
        graph = await vm.graph()
        device = _device(record, graph)
        if device is None:
            return False  # it was unplugged
        if not _works(record, graph):
            now, later = await vm.monitor.through(lambda lender: lender.files())
            said = {one.get(name, "") for one in (now, later) if one is not None}
            moved = record.took_effect(graph) is True
            here, there = (record.top, record.base), (record.top_file, record.base_file)
            if all(_same(file, there[moved]) for file in said):
                if journal is not None and moved:
                    journal.mark(**{PIVOTED: True})
                return moved
            if (
                all(_same(file, there[not moved]) for file in said)
                and here[not moved] in graph.nodes
            ):
                await put_back(vm, device, here[not moved])
                continue
        if clock() > deadline:
            raise StalledError(
                f"libvirt and QEMU do not name the same image of {printable(name)}",
                standing="the VM is paused: both images hold the same",
                remedy=f"compare virsh domblklist with qmpblock disks; virsh blockjob DOMAIN "
                f"{printable(name)} --abort",
            )
        await asyncio.sleep(_LOOK)


def _check_lent(vm: Connection, record: Record) -> None:
    """Refuse to go behind the manager's back.

    :raise UnsupportedError: this is not its monitor.
    """
    if not vm.monitor.is_lent:
        raise UnsupportedError(
            f"{record.describe()} can only be undone by the manager itself",
            standing="nothing was touched",
            remedy=f"run: qmpblock recover {printable(record.vm.monitor)}",
        )


def _device(record: Record, graph: BlockGraph) -> DiskDevice | None:
    for device in graph.disks():
        if device.qom_path in record.devices:
            return device
    return None


def _works(record: Record, graph: BlockGraph) -> bool:
    """Whether somebody's job is on the disk, or one has ended that its owner has yet to note."""
    device = _device(record, graph)
    on_it = () if device is None else device.jobs
    ended = (job for job in graph.jobs if job.status not in ACTIVE)
    return any(not job.ours for job in (*on_it, *ended))


def _same(file: str, other: str) -> bool:
    return os.path.realpath(file) == os.path.realpath(other)
