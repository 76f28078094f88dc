"""The dirty bitmaps of a backup in the VM: what is written from it on, and what vouches for that.

Each disk has these of each backup, on its active layer's node, which stay there until the next one:

- one that records, from before the backup's instant on. It is never cleared: the next backup has
  one of its own, and what this has from between the two is copied as it is then;
- one of the last of the disk's granules alone, which records nothing. A disk that is made smaller
  loses it, and what its bitmaps say of the rest, for good (F43);
- where the image holds these two, one that it does not hold, which records nothing. It ends when
  QEMU closes the image, and goes along where the VM migrates: while it is there nobody but QEMU
  can have had the disk lie on something else (`qmpblock.backups.lower`).

Where the image can, it holds the first two (qcow2), so that they outlive QEMU; else they live in
QEMU alone. So they do where QEMU does not find the image by its name any more (K42), and where the
image has a data file of its own: what is put there while the VM is off, an older one say, no bitmap
would tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qmpblock.chains.storedbitmaps import may_hold_bitmaps
from qmpblock.copying.comparing import GRAIN
from qmpblock.copying.drawn import draw_node
from qmpblock.errors import CommandError, printable
from qmpblock.names import end_bitmap, is_backup_bitmap, left_bitmap, open_bitmap, target_node
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.graph.model import BlockGraph, DiskDevice
    from qmpblock.qemu.connection import Connection

__all__ = [
    "drawing_nodes",
    "goes_back_by_half",
    "make_bitmaps",
    "others_there",
    "survived",
    "vouched",
]

_STORING = ("qcow2",)  # formats whose images can hold dirty bitmaps


def drawing_nodes(run: str, disks: int) -> tuple[str, ...]:
    """Return the nodes on which a run draws, one for each disk."""
    return tuple(left_bitmap(target_node(run, number)) for number in range(disks))


async def make_bitmaps(
    vm: Connection, devices: Sequence[DiskDevice], names: Sequence[str], run: str
) -> list[bool]:
    """Have what the guest writes to disks be noted from now on; return whether the images hold it.

    Failed or cancelled, what was added is for whoever asked.

    :param names: of their bitmaps; `run`: by which the nodes are called on which one is drawn.
    :raise Error: QEMU refused, or its NBD server is needed and cannot be had.
    """
    nodes, stored = drawing_nodes(run, len(devices)), []
    for device, name, drawing in zip(devices, names, nodes, strict=True):
        active, size = device.chain.active, device.chain.active.size
        if not size:
            stored.append(False)  # no bit to set: each backup of it is full
            continue
        # Where QEMU could not open it anew, it could not be written to after a freeze (K42).
        can = active.format in _STORING and active.node.child("data-file") is None
        holds = can and await may_hold_bitmaps(vm.monitor, active, drawing)
        last = Ranges([((size - 1) // GRAIN * GRAIN, size)])
        await draw_node(vm, drawing, size, last)
        node, end = active.node.name, end_bitmap(name)
        keeps = await _add(vm, node, end, stores=holds, disabled=True)
        await vm.monitor.execute(
            "block-dirty-bitmap-merge",
            {"node": node, "target": end, "bitmaps": [{"node": drawing, "name": drawing}]},
        )
        await vm.monitor.execute("blockdev-del", {"node-name": drawing})
        keeps = await _add(vm, node, name, stores=keeps) and keeps
        if keeps:
            await _add(vm, node, open_bitmap(name), stores=False, disabled=True)
        stored.append(keeps)
    return stored


async def _add(
    vm: Connection, node: str, name: str, *, stores: bool, disabled: bool = False
) -> bool:
    """Add a dirty bitmap, which the image holds where it can; return whether it does."""
    options = {"node": node, "name": name, "granularity": GRAIN, "disabled": disabled}
    if stores:
        try:
            await vm.monitor.execute("block-dirty-bitmap-add", {**options, "persistent": True})
        except CommandError:
            pass  # of an older version, or for reading only: what else is wrong is said next
        else:
            return True
    await vm.monitor.execute("block-dirty-bitmap-add", options)
    return False


def goes_back_by_half(graph: BlockGraph, devices: Sequence[DiskDevice]) -> str | None:
    """Say which disks `loadvm` would put back, and then fail at those with bitmaps (K44). Pure.

    Those that have the same internal snapshot, and no dirty bitmap. None: there are none.

    :param devices: of a backup.
    """
    backed_up = {device.qom_path: device for device in devices}
    tags = {tag for device in devices for tag in device.chain.active.node.snapshots}
    bare, common = [], set()
    for device in graph.disks():
        node = device.chain.active.node
        if device.qom_path not in backed_up and not node.bitmaps and tags & {*node.snapshots}:
            bare.append(printable(device.name))
            common |= tags & {*node.snapshots}
    if not bare:
        return None
    others = ", ".join(printable(device.name) for device in devices)
    return (
        f"the internal snapshots {', '.join(map(printable, sorted(common)))} cannot be gone back "
        f"to any more: loadvm would put {', '.join(bare)} back, then fail at the dirty bitmaps of "
        f"{others}, and leave the guest between the two. Back all of them up, or go back when "
        "the VM is off, and without bitmaps"
    )


def survived(graph: BlockGraph, device: DiskDevice, name: str) -> bool:
    """Whether the bitmap of a backup is where the guest writes to a disk, as the backup ends.

    Somebody may have changed the chain meanwhile.
    """
    for now in graph.devices:
        if now.qom_path == device.qom_path and now.chain is not None:
            return any(one.name == name and one.recording for one in now.chain.active.node.bitmaps)
    return False


def vouched(graph: BlockGraph, device: DiskDevice, name: str) -> bool:
    """Whether what vouches for a bitmap still does, once all was taken from it.

    Somebody may have made the disk smaller, and as large again, since it was looked at: no bit
    that went comes back. Where the node is gone by now, it was there when all was taken.

    :param device: as it was looked at.
    """
    node = graph.nodes.get(device.chain.active.node.name)
    return node is None or any(one.name == end_bitmap(name) and one.count for one in node.bitmaps)


def others_there(
    devices: Iterable[DiskDevice], backups: str, names: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Return the bitmaps of all other backups into a directory that disks have, as (node, name).

    :param backups: the id of the directory; `names`: of those that are to stay.
    """
    stay = {*names, *map(end_bitmap, names), *map(open_bitmap, names)}
    return tuple(
        (layer.node.name, one.name)
        for device in devices
        for layer in device.chain.layers[:1]
        for one in layer.node.bitmaps
        if is_backup_bitmap(one.name, backups) and one.name not in stay
    )
