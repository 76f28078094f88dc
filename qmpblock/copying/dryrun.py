"""A copy that is not made: everything is looked at as for one, and what would be done is said.

What would be refused is refused, by the same code. The VM is asked, and its disks are mapped, which
takes an export for a moment, as `MappedDisk.map` does; nothing else is put into it, and on the host
nothing is made.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar, Unpack

from qmpblock.chains.heldio import must_pause
from qmpblock.chains.home import home_file, open_home
from qmpblock.chains.owner import is_asked
from qmpblock.copying.fleecing import Fleece, planned
from qmpblock.copying.frozen import room_wanted
from qmpblock.copying.look import backing_name, freezes_layers, look
from qmpblock.copying.options import CopyOptions, CopyWords
from qmpblock.copying.planned import (
    Amounts,
    PlannedCopy,
    PlannedDisk,
    Room,
    Way,
    amounts,
    amounts_since,
    felt,
    lacking,
    seconds,
    way_of,
    why,
)
from qmpblock.copying.proof import check_provable, check_served
from qmpblock.copying.reservation import prepare, room_for
from qmpblock.copying.targetfile import TargetFile
from qmpblock.copying.targets import check_servers, target_of
from qmpblock.copying.wire import credentials_in
from qmpblock.errors import (
    BusyError,
    NBDError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.host.space import HostSpace
from qmpblock.names import new_run, target_node

if TYPE_CHECKING:
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.mapping import MappedDisk
    from qmpblock.qemu.connection import Connection

__all__ = ["dry_run"]

DiskT = TypeVar("DiskT", bound="MappedDisk")


async def dry_run(
    vm: Connection,
    targets: Mapping[DiskT, str | os.PathLike[str]],
    *,
    restarts: bool = False,
    written: Mapping[DiskT, int] | None = None,
    **words: Unpack[CopyWords],
) -> PlannedCopy:
    """Say how disks would be copied. See `VM.plan_copy`.

    :param restarts: whether the targets' files that a copy left unfinished go first.
    :param written: of those of which the copy would be an increment: bytes that it holds at most.
    """
    options = CopyOptions(**words)
    if not targets:
        raise RequestError("a copy of no disk is none")
    async with vm.unless_gone():
        plans = await look(vm, targets, options, undo=False, restarts=restarts)
    reserved = await _check_targets(vm, list(targets), plans, options)
    if options.verify:
        await check_provable(vm, plans, options.point, tries=False)
    elif options.resume:
        await check_served(vm, plans, tries=False)
    way = way_of(options.point, misread=freezes_layers(vm, options))
    kept = await _kept(vm, list(targets), plans, way, options)
    since = [(written or {}).get(disk) for disk in targets]
    moved, warnings = await _moved(list(targets), plans, options, way, reserved, since)
    disks = tuple(
        PlannedDisk(
            plan.device.name,
            plan.device.chain.active.file,
            plan.file,
            plan.format,
            plan.size,
            None if one is None else one.read,
            None if one is None else one.write,
            _room(plan, one),
            room,
            plan.server is not None,
        )
        for plan, one, room in zip(plans, moved, kept, strict=True)
    )
    rooms = [
        (HostSpace.of(one.room.path).device, one.room) for one in disks if one.room is not None
    ]
    paced = [one.paced for one in moved if one is not None]
    managed, pauses = _is_managed(vm, options), await _pauses(vm, plans, way, options)
    return PlannedCopy(
        options.point,
        way,
        why(way, vm.capabilities, reflink=options.reflink, managed=managed),
        tuple(felt(options, way, plans, pauses=pauses, managed=managed)),
        disks,
        options.speed,
        seconds(paced, options.speed) if len(paced) == len(plans) else None,
        options.verify,
        (*(text for plan in plans for text in plan.warnings), *warnings, *lacking(rooms)),
    )


async def _check_targets(
    vm: Connection, disks: Sequence[MappedDisk], plans: Sequence[CopyPlan], options: CopyOptions
) -> list[int]:
    """Refuse what could not be had as a target, by having all for a moment.

    :return: of each, the bytes that it reserves.
    :raise Error: it could not.
    """
    credentials = None if options.tls_creds is None else credentials_in(options.tls_creds)
    check_servers(vm, plans, credentials)
    run, pivots = new_run(), options.point == "pivot"
    with ExitStack() as stack:
        files = []
        for number, plan in enumerate(plans):
            node, name = target_node(run, number), backing_name(vm, plan)
            how = {"force": options.force, "pivots": pivots, "resume": options.resume}
            target = target_of(vm, plan, node, number, name, credentials, **how)
            files.append(stack.enter_context(target))
        await prepare(disks, files)
        return [
            room_for(file.plan, file.model) if isinstance(file, TargetFile) else 0 for file in files
        ]


async def _kept(
    vm: Connection,
    disks: Sequence[MappedDisk],
    plans: Sequence[CopyPlan],
    way: Way,
    options: CopyOptions,
) -> list[Room | None]:
    """Say where goes what the guest writes, or overwrites, meanwhile.

    :raise Error: it can go nowhere.
    """
    if way == "views":
        fleece = Fleece(options.fleece, options.fleece_limit)
        async with planned(vm, disks, fleece, looked=True) as fleecing:
            return [_room_in(posixpath.dirname(one.kept), one.limit) for one in fleecing.items]
    if way == "mirrors":
        return [None] * len(plans)
    rooms: list[Room | None] = []
    for plan in plans:
        active = plan.device.chain.active
        home = await home_file(vm, active)
        (await open_home(vm, active, home)).close()
        rooms.append(_room_in(posixpath.dirname(home), room_wanted([(plan.size, 0)])))
    return rooms


async def _moved(
    disks: Sequence[MappedDisk],
    plans: Sequence[CopyPlan],
    options: CopyOptions,
    way: Way,
    reserved: Sequence[int],
    since: Sequence[int | None],
) -> tuple[list[Amounts | None], list[str]]:
    """Say how much is to be moved, by each disk's map; and of which there is none.

    :param since: bytes that were written, of those of which an increment is made, without a map.
    :raise Error: a copy that is to be proven needs what the map needs, and that cannot be had.
    """
    moved: list[Amounts | None] = []
    warnings = []
    for disk, plan, least, written in zip(disks, plans, reserved, since, strict=True):
        if written is not None:
            moved.append(amounts_since(plan, written))
            if not options.verify:
                continue
        try:
            seen = await disk.map()
        except (BusyError, NBDError, UnsupportedError) as error:
            if options.verify:
                raise
            moved.append(None)
            warnings.append(
                f"how much {disk.name} holds cannot be told beforehand: {printable(error.message)}"
            )
            continue
        if written is None:
            moved.append(amounts(plan, options, way, seen, least))
    return moved, warnings


def _room(plan: CopyPlan, moved: Amounts | None) -> Room | None:
    if moved is None or plan.server is not None or plan.block_device:
        return None
    return _room_in(posixpath.dirname(plan.file), moved.taken)


def _room_in(directory: str, needed: int) -> Room:
    return Room(directory, needed, HostSpace.of(directory).free)


def _is_managed(vm: Connection, options: CopyOptions) -> bool:
    """Whether the manager copies, and has the guest go over."""
    return options.point == "pivot" and is_asked(vm)


async def _pauses(
    vm: Connection, plans: Sequence[CopyPlan], way: Way, options: CopyOptions
) -> bool:
    """Whether the VM has to be paused at the end for QEMU's sake (K26)."""
    if way == "views" or options.point == "end" or _is_managed(vm, options):
        return False
    for plan in plans:
        onto = plan.format if options.point == "pivot" else plan.device.chain.active.format
        if await must_pause(vm, plan.device, onto):
            return True
    return False
