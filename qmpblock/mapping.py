"""The map of a live disk: what the guest sees of each byte, and what each layer holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.cancellation import task_group
from qmpblock.errors import (
    UNTOUCHED,
    BusyError,
    CommandError,
    GraphError,
    NBDError,
    RangeError,
    RequestError,
    ToolError,
    shell_words,
)
from qmpblock.graph.model import Chain, DiskDevice, Layer
from qmpblock.graph.openings import in_part
from qmpblock.host import imagefiles, space
from qmpblock.qemu import ownership
from qmpblock.sizes import check_range

if TYPE_CHECKING:
    from qmpblock.extents.allocationmap import AllocationMap
    from qmpblock.extents.blockstatus import ExtentAllowance
    from qmpblock.nbd import Client
    from qmpblock.qemu.connection import Connection
    from qmpblock.ranges import Ranges

__all__ = [
    "LayerMap",
    "MappedDisk",
    "check_active",
    "exported",
    "exported_active",
    "other_active",
    "read_map",
]

_CONTEXTS = ("base:allocation", "qemu:allocation-depth")
_PARTS = 4  # of a range that are read at once
_SMALLEST_PART = 1 << 20  # bytes
_BATCH = 32  # layers exported at once; an NBD server takes 100 connections by default
_LOOK = 0.05  # seconds between looks at a chain that cannot be mapped now
_ATTEMPTS = 4  # maps of a chain that another controller keeps changing


@dataclass(frozen=True)
class LayerMap:
    """What one layer itself holds, whatever lies above it.

    :ivar map: depth is 0 throughout; present says whether this layer holds the range.
    :ivar source: how it was read: `nbd` (an export of the live node) or `qemu-img` (the
        frozen image on this host, which also tells preallocated zeros).
    """

    layer: Layer
    map: AllocationMap
    source: str


class MappedDisk:
    """One guest disk, as far as it can be read: `qmpblock.vm.Disk` adds what changes it.

    Its attributes say what was true when it was looked up; its methods look again.
    """

    def __init__(self, vm: Connection, device: DiskDevice) -> None:
        self.vm = vm
        self.device = device

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.device.describe()}>"

    @property
    def name(self) -> str:
        """The qdev id, else the drive id, else the QOM path."""
        return self.device.name

    @property
    def chain(self) -> Chain:
        """Filters and layers, when the disk was looked up."""
        return self.device.chain

    @property
    def size(self) -> int:
        """Virtual size in bytes, when the disk was looked up."""
        return self.chain.active.size

    async def refresh(self) -> None:
        """Look the device up again: its chain, jobs and exports.

        :raise NotFoundError: it has been unplugged.
        """
        graph = await self.vm.graph()
        self.device = graph.device(self.device.qom_path)

    async def map(
        self, offset: int = 0, length: int | None = None, *, reserved: bool = False
    ) -> AllocationMap:
        """Map what the guest sees: for every byte, which layer supplies it, and how.

        Taken from the running QEMU through one read-only export, without disturbing the
        guest. Cancelling removes the export first.

        :param offset: first byte, at any alignment.
        :param length: in bytes; by default up to the end.
        :param reserved: also mark what raw layers on this host have fallocated but not
            written (by FIEMAP).
        :raise RangeError: the range is not inside the disk; nothing was touched.
        :raise UnsupportedError: the VM waits for a migration, is being migrated or was migrated
            away (or: see `qmpblock.export.exports`).
        :raise GraphError: another controller keeps changing the chain.
        :raise Error: see `qmpblock.export.exports`.
        """
        for _ in range(_ATTEMPTS):
            await self._unveiled()
            chain = self.chain  # as last seen: if it is so no more, that is noticed at the end
            try:
                start, count = check_range(chain.active.size, offset, length)
            except RangeError:
                await self.refresh()  # it may have grown
                chain = self.chain
                start, count = check_range(chain.active.size, offset, length)
            # A foreign snapshot silently redirects an export to the overlay (F6),
            # and the map is of neither chain then.
            async with self._unless_changed(chain), exported(self, [chain.active]) as [client]:
                seen = await read_map(client, chain, start, count)
            if self.chain.shape == chain.shape:
                return self._mark_reserved(seen, chain) if reserved else seen
        raise GraphError(
            f"the chain of {self.name} changed during each of {_ATTEMPTS} maps",
            standing="nothing of ours is left in the VM",
            remedy="another controller is at work on this disk; wait for it",
        )

    async def layers(self, *, local: bool = True) -> tuple[LayerMap, ...]:
        """Map what each layer itself holds, the active one first.

        :param local: read frozen layers that are on this host with qemu-img, which tells
            preallocated zeros, rather than through exports.
        :raise Error: as `map`.
        """
        for _ in range(_ATTEMPTS):
            await self.refresh()
            await self._unveiled()
            chain, busy = self.chain, bool(self.device.jobs)
            # A job may be writing to a layer that only looks frozen.
            maps = await self._frozen_layers(chain) if local and not busy else {}
            through_qemu = [layer for layer in chain.layers if layer.depth not in maps]
            async with self._unless_changed(chain):
                for first in range(0, len(through_qemu), _BATCH):
                    batch = through_qemu[first : first + _BATCH]
                    async with exported(self, batch) as clients:
                        for layer, client in zip(batch, clients, strict=True):
                            maps[layer.depth] = await _read_layer(client, chain, layer)
            if self.chain.shape == chain.shape and (busy or not self.device.jobs):
                return tuple(
                    self._layer_reserved(maps[depth]) for depth in range(len(chain.layers))
                )
        raise GraphError(f"the chain of {self.name} changed during each of {_ATTEMPTS} maps")

    async def _unveiled(self) -> None:
        """Wait while an allocation has the active layer see the others through a view of them.

        :raise BusyError: that lasts for the stall limit.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        while self.chain.veiled:
            if clock() - began > self.vm.stall:
                raise BusyError(
                    f"the layers of {self.name} are seen through a snapshot-access node, and QEMU "
                    "does not tell which of them supplies what",
                    standing=UNTOUCHED,
                    remedy="wait for whoever put it there; if that was qmpblock, and it died: "
                    f"qmpblock recover {shell_words([self.vm.monitor.address])}",
                )
            await asyncio.sleep(_LOOK)
            await self.refresh()

    @asynccontextmanager
    async def _unless_changed(self, chain: Chain) -> AsyncIterator[None]:
        """Look at the chain again after the body; if it changed, the body's error is moot."""
        try:
            yield
        except (NBDError, CommandError, GraphError):
            await self._still_ours()
            await self.refresh()
            if self.chain.shape == chain.shape:
                raise
        else:
            await self._still_ours()
            await self.refresh()

    async def _still_ours(self) -> None:
        """See that no migration has taken the images meanwhile: what was read is the past then.

        :raise UnsupportedError: one has, or is about to.
        """
        await ownership.ask(
            self.vm.monitor, [self.device], standing="nothing of ours is left in the VM"
        )

    async def _frozen_layers(self, chain: Chain) -> dict[int, LayerMap]:
        few = asyncio.Semaphore(_PARTS)
        async with task_group() as group:
            tasks = [
                group.create_task(self._frozen_layer(layer, few)) for layer in chain.layers[1:]
            ]
        maps = [task.result() for task in tasks]
        return {one.layer.depth: one for one in maps if one is not None}

    async def _frozen_layer(self, layer: Layer, few: asyncio.Semaphore) -> LayerMap | None:
        """Map a frozen layer with qemu-img; None where QEMU itself is to be asked."""
        from qmpblock.host.imagechain import blockdev
        from qmpblock.host.qemuimg import QemuImg

        pid = self.vm.monitor.peer_pid
        path = imagefiles.local_path(pid, layer)
        if path is None or layer.node.encrypted or layer.data_file or in_part(layer):
            return None
        tool, image = QemuImg(stall=self.vm.stall), blockdev(layer.format, path)
        async with few:
            try:
                seen = await tool.map(image, [layer.format], shared=True, vm=pid)
            except (ToolError, RequestError):
                return None  # no qemu-img here, or one that cannot
        return LayerMap(layer, seen.own(), "qemu-img") if seen.stop == layer.size else None

    def _layer_reserved(self, seen: LayerMap) -> LayerMap:
        ranges = self._fallocated(seen.layer)
        if ranges is None:
            return seen
        return LayerMap(seen.layer, seen.map.with_reserved(ranges), seen.source)

    def _mark_reserved(self, seen: AllocationMap, chain: Chain) -> AllocationMap:
        for layer in chain.layers:
            ranges = self._fallocated(layer)
            if ranges is not None:
                supplied = seen.where(depth=layer.depth, present=True)
                seen = seen.with_reserved(ranges.intersection(supplied))
        return seen

    def _fallocated(self, layer: Layer) -> Ranges | None:
        if layer.format != "raw" or in_part(layer):
            return None
        pid = self.vm.monitor.peer_pid
        path = imagefiles.local_path(pid, layer)
        return None if path is None else space.reserved_ranges(path, layer.size, vm=pid)


@asynccontextmanager
async def exported(
    disk: MappedDisk,
    layers: Sequence[Layer],
    *,
    hold_writer: bool = False,
    in_flight: int = 16,
    held: bool = False,
) -> AsyncIterator[list[Client]]:
    """Export layers of a disk, read-only, with all that a map needs; yields the clients.

    :param hold_writer: see `qmpblock.export.Request`; also `in_flight`.
    :param held: see `qmpblock.export.exports`.
    :raise GraphError: the disk was resized meanwhile.
    :raise Error: see `qmpblock.export.exports`.
    """
    from qmpblock.export.session import Request, exports

    requests = [Request(layer.node.name, _CONTEXTS, hold_writer, in_flight) for layer in layers]
    vm = disk.vm
    async with exports(
        vm.monitor, disk.device, requests, access=vm.nbd, stall=vm.stall, held=held
    ) as clients:
        for layer, client in zip(layers, clients, strict=True):
            if client.size != layer.size:
                raise GraphError(
                    f"the node {layer.node.name} has {layer.size} bytes, but its export "
                    f"{client.size}",
                    remedy="the disk was resized meanwhile; try again",
                )
        yield clients


@asynccontextmanager
async def exported_active(
    disk: MappedDisk, *, in_flight: int = 16, held: bool = False
) -> AsyncIterator[Client]:
    """Export the active layer likewise, to have QEMU copy up into it (NBD_CMD_CACHE).

    Into an image that a snapshot made meanwhile has frozen, QEMU would abort (K43); of one that
    comes once the export is there, that follows it (F6). So it is looked at then.

    :raise GraphError: the active layer is another one than when the disk was last seen.
    :raise Error: as `exported`.
    """
    active = disk.chain.active
    async with exported(
        disk, [active], hold_writer=active.data_file is not None, in_flight=in_flight, held=held
    ) as [client]:
        await disk.refresh()
        check_active(disk, active)
        yield client


def check_active(disk: MappedDisk, active: Layer) -> None:
    """See that a layer is the active one of a disk, as that was last seen.

    :raise GraphError: another one is.
    """
    if disk.chain.active.node.name != active.node.name:
        raise other_active(disk.name)


def other_active(disk: str) -> GraphError:
    """Say that the active layer is not the one that was meant."""
    return GraphError(
        f"the active layer of {disk} is another one now: somebody took a snapshot",
        remedy="look at it, then try again: qmpblock disks ADDRESS",
    )


async def read_map(client: Client, chain: Chain, offset: int, length: int) -> AllocationMap:
    """Map a range through an export of the chain's active layer.

    It is right only while the chain is the one given: look again afterwards (`Chain.shape`).
    """
    return await _read_map(client, chain.level_sizes, chain.levels, offset, length)


async def _read_layer(client: Client, chain: Chain, layer: Layer) -> LayerMap:
    """Read what one layer itself holds, through an export of its node."""
    first = chain.levels.index(layer.depth)
    levels = [level - layer.depth for level in chain.levels[first:]]
    seen = await _read_map(client, chain.level_sizes[first:], levels, 0, layer.size)
    return LayerMap(layer, seen.own(), "nbd")


async def _read_map(
    client: Client, sizes: Sequence[int], levels: Sequence[int], offset: int, length: int
) -> AllocationMap:
    """Read both contexts of a range in lock-step.

    The range is read in a few parts at once, so that QEMU looks up the next reply while we
    take in the last: on a fragmented disk that halves the time.
    """
    # Requests start and end on the server's block size; the extra is clipped off again.
    block = client.block_size.minimum
    start = offset - offset % block
    stop = min(-(-(offset + length) // block) * block, client.size)

    allowances: list[ExtentAllowance] = []  # one, of all parts, once NumPy is here

    async def read(first: int, last: int) -> AllocationMap:
        # Asked before NumPy is imported, so that QEMU looks it up meanwhile.
        length = min(last - first, client.max_status_length)
        status = await client.block_status(first, length)
        from qmpblock.extents.blockstatus import ExtentAllowance, NBDMapBuilder

        allowances[:] = allowances or [ExtentAllowance()]
        builder = NBDMapBuilder(sizes, first, last - first, levels=levels, allowance=allowances[0])
        while True:
            builder.feed(*(status[context] for context in _CONTEXTS))
            if not builder.remaining:
                return builder.finish()
            status = await client.block_status(
                builder.next_offset, min(builder.remaining, client.max_status_length)
            )

    step = max(_SMALLEST_PART, -(-(stop - start) // _PARTS))
    step += -step % block
    async with task_group() as group:
        parts = [
            group.create_task(read(first, min(first + step, stop)))
            for first in range(start, stop, step)
        ]
    from qmpblock.extents.allocationmap import AllocationMap

    maps = [part.result() for part in parts]
    if not maps:
        return AllocationMap.uniform(offset, 0, layers=levels[-1] + 1)
    return AllocationMap.concat(maps).coalesce().clip(offset, length)
