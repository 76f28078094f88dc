"""Looking at disks that are to be copied: what goes where, or why it must not; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qmpblock.chains.headers import by_qemu_img
from qmpblock.chains.heldio import check_held_io
from qmpblock.chains.owner import is_asked
from qmpblock.chains.settings import lost_by_snapshot
from qmpblock.changes.leftovers import check_way, make_way
from qmpblock.copying.alone import check_alone
from qmpblock.copying.devicetarget import check_unused, is_block_device
from qmpblock.copying.frozen import check_frozen
from qmpblock.copying.managed import check_asked
from qmpblock.copying.options import CopyOptions
from qmpblock.copying.plan import CopyPlan, plan_copy
from qmpblock.copying.resuming import check_target
from qmpblock.copying.targetname import check_file, check_host
from qmpblock.copying.targets import place_of
from qmpblock.errors import UNTOUCHED, RequestError, UnsupportedError, printable
from qmpblock.graph.backingname import name_of_frozen
from qmpblock.host.openfiles import OpenFiles
from qmpblock.host.processes import command_line
from qmpblock.managers import Verb, Work
from qmpblock.names import lock_names
from qmpblock.qemu import ownership
from qmpblock.qemu.iothread import iothread_of
from qmpblock.qemu.threshold import is_watched

if TYPE_CHECKING:
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["backing_name", "freezes_layers", "look"]

DiskT = TypeVar("DiskT", bound="MappedDisk")


async def look(
    vm: Connection,
    targets: Mapping[DiskT, str | os.PathLike[str]],
    options: CopyOptions,
    *,
    undo: bool = True,
    restarts: bool = False,
) -> list[CopyPlan]:
    """Say what goes where, or refuse; only what a dead controller left is undone.

    :param undo: whether it is; else that is an error, too.
    :param restarts: whether the targets' files that a copy left unfinished go.
    :raise Error: it cannot be done; nothing was touched.
    """
    at, force = options.point, options.force
    devices = [disk.device for disk in targets]
    pivot, freezes = at == "pivot", freezes_layers(vm, options)
    await ownership.ask(vm.monitor, devices)
    await (make_way if undo else check_way)(vm, lock_names(devices))
    graph = await vm.graph()
    plans: list[CopyPlan] = []
    for disk, file in targets.items():
        disk.device = graph.device(disk.device.qom_path)
        place = place_of(file)
        block = isinstance(place, str) and is_block_device(place)
        plan = plan_copy(
            disk.device,
            place,
            options.format,
            options.layers,
            pivot=pivot,
            block_device=block,
            start=at == "start",
            shape=options.shape,
        )
        _check_zeros(vm, plan, options)
        await check_alone(vm.monitor, plan.device)
        if options.resume:
            check_target(plan)
        for other in plans:
            if _is_one_place(other.file, plan.file):
                raise RequestError(f"{printable(plan.file)} is named for two disks")
            if other.device.qom_path == plan.device.qom_path:
                raise RequestError(f"{plan.device.name} is named twice")
        if block:
            await check_unused(vm.monitor.peer_pid, plan.file)
        elif plan.server is None:
            check_host(vm.monitor.address, "copy", [disk.name, str(file)])
            check_file(
                *(vm.monitor.peer_pid, plan.file),
                force=force,
                keeps_name=pivot,
                resume=options.resume,
                restarts=restarts,
            )
        backing_name(vm, plan)  # or refuse
        if plan.format != "raw":
            await by_qemu_img(vm, plan.secret, local=True)  # or refuse
        if at != "start":
            await check_held_io(
                vm.monitor, plan.device, remedy="copy it by qemu-img when the VM is off"
            )
        if pivot:
            await _check_filters(vm, plan)
            if is_asked(vm):
                await check_asked(vm, plan, options)
            plan = await _with_losses(vm, plan)
        if freezes:
            plan = replace(plan, opened=await check_frozen(vm, plan, graph))
        plans.append(plan)
    if options.resume and vm.monitor.by_turns:
        raise UnsupportedError(
            f"a copy is not resumed by {vm.monitor.address}, which others have in between: the "
            "VM stands while what is left is copied",
            standing=UNTOUCHED,
            remedy="copy it anew, or give the VM a second monitor",
        )
    verb: Verb = "move" if pivot else "freeze" if freezes else "copy"
    work = Work(verb, plans[0].device.chain.active.file)
    await ownership.ask_for_change(vm, work, graph, asked=pivot)
    return plans


def freezes_layers(vm: Connection, options: CopyOptions) -> bool:
    """Whether a copy is of frozen layers, and not of views: no view lets blocks be shared."""
    return options.point == "start" and (vm.capabilities.jobs_misread_views or options.reflink)


def _check_zeros(vm: Connection, plan: CopyPlan, options: CopyOptions) -> None:
    """Refuse a full copy where the space for zeros would be given back, or not be made at all."""
    if options.allocation != "full" or options.point == "start":
        return
    moves = options.point == "pivot" and plan.format != "raw"
    if moves and vm.capabilities.mirrors_give_zeros_back:
        raise UnsupportedError(
            "no guest can go over to a qcow2 copy that has host space for all: the mirror of QEMU "
            f"{vm.capabilities} gives back what it writes zeros to, whatever the image's discard "
            "is (F27)",
            standing=UNTOUCHED,
            remedy="let it go over to a thin copy, then have all of that allocated: qmpblock "
            "allocate ADDRESS DISK --full; or go over to a raw one; or use QEMU 10.0 or newer",
        )
    if plan.kind == "server" and vm.capabilities.mirrors_leave_out_zeros:
        raise UnsupportedError(
            f"a copy of the end writes no zeros where {printable(plan.file)} reads as zeros "
            f"already (QEMU {vm.capabilities}): whether these have host space there, nobody says",
            standing=UNTOUCHED,
            remedy="copy the start (--at start), which writes all; or leave --allocation full out",
        )


def _is_one_place(one: str, other: str) -> bool:
    """Whether two names are of one target: by the same words, or through a linked directory."""
    if one == other:
        return True
    here, there = Path(one), Path(other)
    try:
        return here.name == there.name and here.parent.samefile(there.parent)
    except OSError:
        return False  # an NBD server's, or no directory: which is said elsewhere


async def _with_losses(vm: Connection, plan: CopyPlan) -> CopyPlan:
    """Say what the disk will not have any more, where the guest goes over."""
    command, watched = command_line(vm.monitor.peer_pid), await is_watched(vm, plan.device)
    lost = lost_by_snapshot(command, plan.device, watched=watched)
    return replace(plan, warnings=(*plan.warnings, *lost))


async def _check_filters(vm: Connection, plan: CopyPlan) -> None:
    """Refuse to have a copy take the image's place below a filter where that hangs QEMU (K27)."""
    filters = plan.device.chain.filters
    if not filters or not vm.capabilities.moves_below_filters_hang_iothreads:
        return
    threads = await vm.monitor.execute("query-iothreads")
    if await iothread_of(vm.monitor, plan.device, threads) is not None:
        raise UnsupportedError(
            f"{plan.device.name} runs in an iothread and has a filter ({filters[0].driver}) above "
            f"its image, and QEMU {vm.capabilities} hangs for good when another image takes its "
            "place there",
            standing=UNTOUCHED,
            remedy="copy without going over to the copy; or use QEMU 10.0 or newer",
        )


def backing_name(vm: Connection, plan: CopyPlan) -> str | None:
    """Return what a target records of the layer that it lies on.

    :raise UnsupportedError: there is no name that leads back to it.
    """
    if plan.backing is None:
        return None
    nodes = (plan.backing.node, *plan.backing.nodes)
    places = OpenFiles(vm.monitor.peer_pid).places(nodes)
    return name_of_frozen(plan.backing, places, None, relative=False)
