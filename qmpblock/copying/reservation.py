"""The host space that targets are to have besides what is copied: what it is, whether there is any.

A full one has all of it before anything is copied, and no zero that is copied takes any away. One
that is like its disk is copied thin, for of a point in time QEMU does not tell zeros that somebody
wrote from those that nobody did; then it gets what the disk has and it has not.

What the disk has is looked up when the copy begins: what the guest writes while a copy of the end
is made is copied as it is. In the active layer, while it is qcow2, QEMU does not tell zeros that
have host space from those that have none, which count as these.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.copying.hostspace import space_of
from qmpblock.copying.targetfile import TargetFile
from qmpblock.errors import UNTOUCHED, Error, UnsupportedError, printable
from qmpblock.extents.allocationmap import AllocationMap
from qmpblock.host.imagefiles import local_path
from qmpblock.host.space import HostSpace
from qmpblock.host.tryout import clones, direct_unit, reserves
from qmpblock.names import partial_file

if TYPE_CHECKING:
    from qmpblock.copying.copytarget import CopyTarget
    from qmpblock.copying.plan import CopyPlan
    from qmpblock.mapping import MappedDisk

__all__ = ["prepare", "room_for"]

_SHARING = ("raw", "qcow2")  # formats of which QEMU has the kernel copy ranges


async def prepare(disks: Iterable[MappedDisk], targets: Iterable[CopyTarget]) -> None:
    """Look whether targets can be as they are asked for, and note what that takes.

    :raise UnsupportedError: a file system cannot, or has not the room; nothing was touched.
    :raise Error: a disk's map cannot be read; nothing was touched.
    """
    wanted: dict[str, int] = {}
    for disk, target in zip(disks, targets, strict=True):
        if not isinstance(target, TargetFile):
            continue
        if target.plan.shape.allocation == "like":
            target.model = await _model_of(disk, target.plan)
            _check_zeros(target)
        await asyncio.to_thread(_check_file_system, target)
        if target.plan.shape.reflink:
            await asyncio.to_thread(_check_shares, disk, target)
        partial = Path(partial_file(target.plan.file))
        there = partial.stat().st_blocks * 512 if target.resumed else 0
        wanted[target.plan.file] = max(0, room_for(target.plan, target.model) - there)
    await asyncio.to_thread(_check_room, wanted)


def room_for(plan: CopyPlan, model: AllocationMap | None) -> int:
    """Return how many bytes of its file system a copy reserves. Pure.

    :param model: of the disk, where the copy is to be like it.
    """
    if plan.shape.allocation == "full":
        taken = plan.size
    elif model is not None:
        taken = space_of(model).align_out(plan.shape.unit, plan.size).total
    else:
        return 0
    return plan.shape.room(plan.format, taken)


async def _model_of(disk: MappedDisk, plan: CopyPlan) -> AllocationMap:
    """Return the map of what is copied of a disk, with what is reserved."""
    layers = await disk.layers()
    return AllocationMap.stack([one.map for one in layers[: len(plan.layers)]])


def _check_zeros(target: TargetFile) -> None:
    """Refuse a qcow2 copy with zeros that have host space, where the guest goes over to it."""
    assert target.model is not None  # it is what is looked at
    zeros = target.model.where(reserved=True).total
    if zeros and target.keeps_name and target.plan.format != "raw":
        raise UnsupportedError(
            f"{target.plan.device.name} has host space for {zeros} bytes of zeros, and no guest "
            "can go over to a qcow2 copy that has, too: QEMU's mirror has zeros take none, and "
            "once the guest is there nobody else writes to it",
            standing=UNTOUCHED,
            remedy="go over to a raw one, or leave --allocation like out: then have what is needed "
            "allocated (qmpblock allocate ADDRESS DISK --full)",
        )


def _check_file_system(target: TargetFile) -> None:
    shape, size, folder = target.plan.shape, target.plan.size, posixpath.dirname(target.plan.file)
    where = f"the file system of {printable(target.plan.file)}"
    try:
        if shape.allocation != "thin" and not reserves(target.directory.fd):
            raise UnsupportedError(
                f"{where} reserves no space (fallocate), as --allocation {shape.allocation} needs",
                standing=UNTOUCHED,
                remedy="copy to another one, or leave --allocation out",
            )
        unit = direct_unit(target.directory.fd) if shape.direct else 1
    except OSError as error:
        raise Error(
            f"cannot make files in {printable(folder)}: {error.strerror}", standing=UNTOUCHED
        ) from None
    if unit is None:
        raise UnsupportedError(
            f"{where} takes no writes past the page cache (O_DIRECT)",
            standing=UNTOUCHED,
            remedy="leave --direct out, or copy to another one",
        )
    if target.plan.format == "raw" and size % unit:
        raise UnsupportedError(
            f"{where} takes writes past the page cache in units of {unit} bytes, of which the "
            f"disk's {size} bytes are no multiple",
            standing=UNTOUCHED,
            remedy="leave --direct out, or make the copy qcow2",
        )


def _check_shares(disk: MappedDisk, target: TargetFile) -> None:
    """Refuse to share blocks where QEMU, or the file system, would copy them after all."""
    name, folder = printable(target.plan.file), target.directory.fd
    for layer in target.plan.layers:
        path = local_path(disk.vm.monitor.peer_pid, layer)
        plain = layer.format in _SHARING and layer.data_file is None and not layer.node.encrypted
        if path is None or not plain or Path(path).stat().st_dev != os.fstat(folder).st_dev:
            raise UnsupportedError(
                f"{name} cannot share blocks with {layer.describe()} (--reflink): that has to be "
                "a plain raw or qcow2 image on the same file system",
                standing=UNTOUCHED,
                remedy="copy beside it, or leave --reflink out",
            )
    try:
        can = clones(folder)
    except OSError as error:
        raise Error(
            f"cannot make files beside {name}: {error.strerror}", standing=UNTOUCHED
        ) from None
    if not can:
        raise UnsupportedError(
            f"on the file system of {name} no two files share blocks (--reflink)",
            standing=UNTOUCHED,
            remedy="leave --reflink out; XFS (made with reflink=1) and btrfs can",
        )


def _check_room(wanted: Mapping[str, int]) -> None:
    """Refuse where file systems have not the room for all that is to be reserved there."""
    spaces: dict[int, HostSpace] = {}
    files: dict[int, list[str]] = {}
    for file, _ in filter(lambda one: one[1], wanted.items()):
        try:
            space = HostSpace.of(posixpath.dirname(file))
        except OSError as error:
            raise Error(
                f"cannot look at {printable(posixpath.dirname(file))}: {error.strerror}",
                standing=UNTOUCHED,
            ) from None
        spaces[space.device] = space
        files.setdefault(space.device, []).append(file)
    for device, space in spaces.items():
        taken = sum(wanted[file] for file in files[device])
        if not space.leaves(taken):
            names = ", ".join(map(printable, files[device]))
            raise UnsupportedError(
                f"{taken} bytes are to be reserved for {names}, and {space.free} are free there",
                standing=UNTOUCHED,
                remedy="make room, copy elsewhere, or leave --allocation out",
            )
