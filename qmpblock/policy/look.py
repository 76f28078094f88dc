"""Looking at one disk for a policy: what it is like, what is to be done, whether it can be.

Changes nothing; what cannot be done is refused here, before anything is touched.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qmpblock.allocation.allocate import check_thin
from qmpblock.allocation.plan import growth_warning
from qmpblock.allocation.rawfile import raw_file
from qmpblock.allocation.room import RoomPlan, plan_room
from qmpblock.allocation.staged import SLICE, check_staged
from qmpblock.chains.plan import plan_stream
from qmpblock.chains.stranded import bring_in, check_in
from qmpblock.changes.leftovers import check_way, make_way
from qmpblock.errors import (
    UNTOUCHED,
    Error,
    NotFoundError,
    RequestError,
    UnsupportedError,
    printable,
)
from qmpblock.graph.writable import check_disk
from qmpblock.host import imagefiles
from qmpblock.host.openfiles import sees_directory
from qmpblock.host.space import HostSpace, blank_ranges
from qmpblock.managers import Verb, Work
from qmpblock.names import lock_names
from qmpblock.policy.space import Take
from qmpblock.policy.steps import Changes, Facts, Picture, plan_changes
from qmpblock.qemu import ownership
from qmpblock.ranges import Ranges

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.mapping import LayerMap
    from qmpblock.policy.file import DiskPolicy
    from qmpblock.vm import Disk

__all__ = ["DiskPlan", "look"]


@dataclass(frozen=True)
class DiskPlan:
    """What is to be done to one disk.

    :ivar name: of the disk in its VM.
    :ivar today: its layers; None where they could not be looked at.
    :ivar changes: None where it cannot be done, for the reason `error`.
    :ivar needed: bytes of host space, by what is to be done, with what it takes only for a while.
    :ivar space: of the host, from which that is taken; None where it cannot be filled.
    :ivar ahead: the room ahead of the guest, if the policy wants any.
    """

    policy: DiskPolicy
    name: str
    today: Picture | None = None
    changes: Changes | None = None
    needed: int = 0
    space: HostSpace | None = None
    ahead: RoomPlan | None = None
    warnings: tuple[str, ...] = ()
    error: Error | None = None

    @property
    def has_work(self) -> bool:
        """Whether there is something to do, as far as can be told."""
        steps = self.changes is not None and self.changes.steps
        return bool(steps) or (self.ahead is not None and self.ahead.reserve > 0)

    @property
    def takes(self) -> tuple[Take, ...]:
        """What it takes of the host's space."""
        return () if self.space is None else (Take(self.space, self.needed, self.space.path),)

    def failed(self, error: Error) -> DiskPlan:
        """Return it with the reason why it cannot be done."""
        return replace(self, error=error)


async def look(disk: Disk, wanted: DiskPolicy, *, undo: bool) -> DiskPlan:
    """Look at a disk, and plan.

    :param undo: also undo what a controller that died left; else that is an error.
    """
    async with disk.vm.unless_gone():
        return await _look(disk, wanted, undo=undo)


async def _look(disk: Disk, wanted: DiskPolicy, *, undo: bool) -> DiskPlan:
    vm = disk.vm
    await ownership.ask(vm.monitor, [disk.device])
    if undo:
        await make_way(vm, lock_names([disk.device]))
        await bring_in(disk)
    else:
        await check_way(vm, lock_names([disk.device]))
        await check_in(disk)
    layers = await disk.layers()
    active = disk.chain.active
    today = Picture(tuple(one.layer.file for one in layers), tuple(one.map for one in layers))
    base = _base(disk, wanted)
    like = await _pattern(disk, wanted, layers, base)
    reserving = await _reserving(disk, wanted)
    facts = Facts(today, active.node.cluster_size or 512, base, like=like, blank=reserving.blank)
    changes = plan_changes(wanted, facts)
    _check_able(disk, changes, reserving)
    await _ask_manager(disk, wanted, changes, reserving, base)
    warnings = await _warnings(disk, wanted, changes, reserving)
    ahead = None
    if wanted.ahead is not None:
        # What is reserved inside a raw disk is room from then on.
        coming = changes.reserve if reserving.blank is not None else 0
        ahead = await plan_room(disk, wanted.ahead.of(disk.size) or 1, coming)
    needed = changes.move + changes.reserve + (ahead.reserve if ahead else 0)
    if reserving.staged and changes.reserves:
        needed += min(changes.move + changes.reserve, SLICE)  # beside the image, for a while
    space = _host_space(disk, wanted)
    return DiskPlan(wanted, disk.name, today, changes, needed, space, ahead, warnings)


@dataclass(frozen=True)
class _Reserving:
    """How host space is reserved in the active layer, where the policy may want that.

    :ivar blank: what has none, of a disk that lies in a file as it is.
    :ivar staged: whether it is done by staged commits.
    :ivar refusal: why it cannot be; which matters only if something is to be reserved.
    """

    blank: Ranges | None = None
    staged: bool = False
    refusal: UnsupportedError | None = None


async def _reserving(disk: Disk, wanted: DiskPolicy) -> _Reserving:
    if wanted.allocation not in ("full", "like"):
        return _Reserving()
    try:
        raw = await raw_file(disk)
        if raw is None:
            await check_staged(disk)
            return _Reserving(staged=True)
        pid = disk.vm.monitor.peer_pid
        return _Reserving(await asyncio.to_thread(blank_ranges, *raw, disk.size, vm=pid))
    except UnsupportedError as error:
        return _Reserving(refusal=error)


def _check_able(disk: Disk, changes: Changes, reserving: _Reserving) -> None:
    """Refuse what cannot be done to this disk, or not from here.

    :raise RequestError: it cannot; nothing was touched.
    """
    if changes.steps:
        check_disk(disk.device)
    if changes.reserves and reserving.refusal is not None:
        raise reserving.refusal
    if changes.move or changes.zeros:
        check_thin(disk)


async def _ask_manager(
    disk: Disk, wanted: DiskPolicy, changes: Changes, reserving: _Reserving, base: int
) -> None:
    """See that whoever manages the VM can live with the changes of its chain.

    :raise UnsupportedError: it cannot.
    """
    layers, file = disk.chain.layers, disk.chain.active.file
    if reserving.staged and changes.reserves:
        await ownership.ask_for_change(disk.vm, Work("reserve", file), asked=True)
    if changes.leaving:
        verb: Verb = "independent" if wanted.independent else "stream"
        kept = "" if base >= len(layers) else layers[base].file
        await ownership.ask_for_change(disk.vm, Work(verb, file, base=kept), asked=True)


async def _warnings(
    disk: Disk, wanted: DiskPolicy, changes: Changes, reserving: _Reserving
) -> tuple[str, ...]:
    """Say what the changes do besides; refuse a stream that cannot be."""
    warnings: list[str] = []
    if changes.leaving:
        graph = await disk.vm.graph()
        device = graph.device(disk.device.qom_path)
        warnings += plan_stream(graph, device, None, wanted.base).warnings
    if reserving.staged and changes.reserve:
        bitmaps = disk.chain.active.node.bitmaps
        recording = [bitmap.name for bitmap in bitmaps if bitmap.recording]
        warnings += [growth_warning(name, changes.reserve) for name in recording]
    return tuple(warnings)


def _base(disk: Disk, wanted: DiskPolicy) -> int:
    """Return the depth of the uppermost layer below the active one that is to stay."""
    layers = disk.chain.layers
    if wanted.base is not None:
        depth = disk.chain.layer(wanted.base).depth
        if depth == 0:
            raise RequestError(
                f"{printable(wanted.base)} is the active layer of {disk.name}, so it cannot be "
                "its own base",
                standing=UNTOUCHED,
            )
        return depth
    return len(layers) if wanted.independent else 1


async def _pattern(
    disk: Disk, wanted: DiskPolicy, layers: tuple[LayerMap, ...], base: int
) -> Ranges | None:
    """Return where the layer that is to be imitated has host space."""
    if wanted.like is None:
        return None
    try:
        layer = disk.chain.layer(wanted.like)
    except NotFoundError as error:
        own = await _map_of_file(disk, wanted, wanted.like, error)
    else:
        nodes = [node.name for node in layer.nodes]
        if 0 < layer.depth < base and wanted.like in nodes:
            raise RequestError(
                f"the node {printable(wanted.like)} goes with its layer, and the policy could not "
                "be applied again",
                standing=UNTOUCHED,
                remedy=f"name the layer by its file: {printable(layer.file)}",
            )
        own = layers[layer.depth].map
    return (
        own.where(present=True, zero=False)
        | own.where(present=True, data=True)
        | own.where(present=True, reserved=True)
    )


async def _map_of_file(
    disk: Disk, wanted: DiskPolicy, file: str, error: NotFoundError
) -> AllocationMap:
    """Map an image that is not, or no longer, in the chain."""
    from qmpblock.host.imagechain import blockdev, format_of
    from qmpblock.host.qemuimg import QemuImg

    elsewhere = sees_directory(disk.vm.monitor.peer_pid, str((Path.cwd() / file).parent))
    if elsewhere is not None or not Path(file).is_file():
        error.remedy = "a layer that has left the chain must be a file on this host, by its path"
        raise error
    fmt = wanted.like_format or format_of(file)
    seen = await QemuImg(stall=disk.vm.stall).map(blockdev(fmt, file), [fmt], shared=True)
    return seen.own()


def _host_space(disk: Disk, wanted: DiskPolicy) -> HostSpace | None:
    active = disk.chain.active
    if active.data_file is not None:
        active = replace(active, storage=active.data_file)
    path = imagefiles.local_path(disk.vm.monitor.peer_pid, active)
    if path is not None:
        return HostSpace.of(path, wanted.keep_free)
    if wanted.keep_free is None or (
        active.storage is not None and active.storage.driver == "host_device"
    ):
        return None  # a block device has no file system that it could fill
    raise UnsupportedError(
        f"the policy keeps host space free, but {printable(active.file)} "
        f"{imagefiles.why_not_local(disk.vm.monitor.peer_pid, active)}",
        standing=UNTOUCHED,
        remedy="run qmpblock on the VM's host, by a UNIX monitor, as the VM's user or root; or "
        "leave keep_free out",
    )
