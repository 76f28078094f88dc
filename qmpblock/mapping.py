"""Disk: what a user holds of one guest disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpblock.errors import (
    BusyError,
    CommandError,
    GraphError,
    NBDError,
    RangeError,
    RequestError,
    ToolError,
)
from qmpblock.graph.model import Chain, Device, Layer
from qmpblock.graph.openings import in_part
from qmpblock.host import imagefiles
from qmpblock.qemu import ownership

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from typing import Literal

    from qmpblock.allocation.allocate import AllocationResult
    from qmpblock.allocation.room import RoomResult
    from qmpblock.allocation.thin import Allocator
    from qmpblock.chains.jobs import ChainJob
    from qmpblock.chains.snapshot import SnapshotResult
    from qmpblock.extents.allocationmap import AllocationMap, ExtentAllowance
    from qmpblock.nbd import Client
    from qmpblock.qemu.job import Progress
    from qmpblock.ranges import Ranges
    from qmpblock.speed import Speed
    from qmpblock.vm import VM

__all__ = ["Disk", "LayerMap", "check_range", "exported", "read_map"]

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


class Disk:
    """One guest disk of a `VM`. Get it from `VM.disk` or `VM.disks`.

    Its attributes say what was true when it was looked up; its methods look again.
    """

    def __init__(self, vm: VM, device: Device) -> None:
        self.vm = vm
        self.device = device

    def __repr__(self) -> str:
        return f"<Disk {self.device.describe()}>"

    @property
    def name(self) -> str:
        """The qdev id, else the drive id, else the QOM path."""
        return self.device.name

    @property
    def chain(self) -> Chain:
        """Filters and layers, when the disk was looked up."""
        assert self.device.chain is not None  # VM.disk refuses empty drives
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
                found = await read_map(client, chain, start, count)
            if self.chain.shape == chain.shape:
                return self._mark_reserved(found, chain) if reserved else found
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
            found = await self._frozen_layers(chain) if local and not busy else {}
            through_qemu = [layer for layer in chain.layers if layer.depth not in found]
            async with self._unless_changed(chain):
                for first in range(0, len(through_qemu), _BATCH):
                    batch = through_qemu[first : first + _BATCH]
                    async with exported(self, batch) as clients:
                        for layer, client in zip(batch, clients, strict=True):
                            found[layer.depth] = await _read_layer(client, chain, layer)
            if self.chain.shape == chain.shape and (busy or not self.device.jobs):
                return tuple(
                    self._layer_reserved(found[depth]) for depth in range(len(chain.layers))
                )
        raise GraphError(f"the chain of {self.name} changed during each of {_ATTEMPTS} maps")

    async def allocate(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        full: bool = False,
        independent: bool = False,
        speed: Speed | int = 0,
        progress: Callable[[Progress], None] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> AllocationResult:
        """Make a range stand in the active layer of the running disk, its content unchanged.

        What a layer below holds comes up; what no layer holds stays blank. The guest is never
        paused, no write can be lost, and the map is read at the end: what is still below is an
        error. Cancelled, what was done by then stays, since it changes no content.

        :param offset: rounded outwards to clusters, as is the end; the result says so.
        :param length: in bytes; by default up to the disk's end.
        :param full: what no layer holds, and mere zeros, get host space too: by fallocate on
            raw, LUKS and raw data files, by staged commits on qcow2 and QED, whose pivots hold
            the guest's I/O for milliseconds (`result.held`). QEMU dying in one of those needs
            `qmpblock recover IMAGE` before the image is started again.
        :param independent: afterwards nothing depends on the backing chain any more, and the
            link to it is dropped. For the whole disk only.
        :param speed: bytes a second; a `Speed` can be changed meanwhile.
        :param progress: is called with how far it is.
        :param warn: is called with each of `result.warnings` as soon as it is known: that
            dirty bitmaps will grow, and by how much, before the guest's disk is touched.
        :raise RangeError: the range is not inside the disk.
        :raise UnsupportedError: this format, or place, cannot; nothing was touched.
        :raise BusyError: another controller is at work on the disk.
        :raise GraphError: somebody changed the chain meanwhile; it says what was done.
        """
        from qmpblock.allocation.allocate import allocate
        from qmpblock.speed import Speed

        return await allocate(
            self,
            offset,
            length,
            full=full,
            independent=independent,
            speed=speed if isinstance(speed, Speed) else Speed(speed),
            progress=progress,
            warn=warn,
        )

    def allocator(self) -> AbstractAsyncContextManager[Allocator]:
        """Allocate many ranges, thin, one after another, for what one costs.

        `async with disk.allocator() as a: await a.allocate(offset, length)`: as `allocate`, but
        what each call would set up and take down is kept: the disk's lock and the export, through
        which each range's map is read as it is now, before and after. So a range takes a
        millisecond, not 25. Nothing that the guest writes meanwhile can be lost.

        Full allocation is not for this: it freezes the disk for a moment, so `allocate` does as
        many ranges in one go as it is given. While it is open, other maps of the VM wait, and
        nobody else of ours changes the disk: hold it no longer than it is used.

        A snapshot that somebody takes meanwhile is noticed within a fifth of a second, and at the
        latest when this is left; what was returned in that time may have gone to the overlay.
        Cancelled or failed, what was allocated by then stays, since it changes no content.

        :raise UnsupportedError: this format, or place, cannot; nothing was touched.
        :raise BusyError: another controller is at work on the disk, or on the VM's NBD server.
        :raise GraphError: on leaving: the active layer is another one now.
        """
        from qmpblock.allocation.thin import open_allocator

        return open_allocator(self)

    async def make_room(self, size: int, *, keep_free: int = 0) -> RoomResult:
        """Reserve host space for the next `size` bytes that the guest writes, once.

        So a host that runs full later does not fail them. Where the active layer grows at its
        end (qcow2, QED, ...) the space lies past the end of its file, and holds data and
        metadata alike; where it stores data as it is (raw, LUKS, a data file), it is the lowest
        blank ranges of the disk. By fallocate(2): the guest is not paused, no content and no
        size changes. Idempotent: what is missing of it is reserved. Cancelling leaves what is
        reserved by then.

        :param size: bytes; rounded up to 64 KiB.
        :param keep_free: bytes of the host's file system that are to stay free.
        :raise RequestError: no bytes.
        :raise UnsupportedError: this format, file system or place cannot; nothing was touched.
        :raise Error: there is no room on the host; what was reserved by then stays.
        """
        from qmpblock.allocation.room import make_room
        from qmpblock.sizes import Amount

        return await make_room(self, size, keep_free=Amount(keep_free) if keep_free else None)

    async def keep_ahead(
        self,
        size: int,
        *,
        keep_free: int = 0,
        tell: Callable[[RoomResult], None] | None = None,
    ) -> None:
        """Keep host space reserved ahead of the guest for as long as the VM lives.

        As `make_room`, again and again: up to `size` bytes, as soon as less than half of it is
        left. QEMU wakes us by its event BLOCK_WRITE_THRESHOLD (block-set-write-threshold,
        qapi/block-core.json), which is set on the storage node of the active layer and comes
        once; a look every five seconds finds what no event tells, such as another active layer
        after a snapshot or a commit, which is followed. A temporary overlay of another operation
        of ours is left alone.

        Returns when the VM has ended. Cancelling it is the way to end it before: the threshold
        and the lock are taken away first; what is reserved stays.

        :param size: bytes; rounded up to 64 KiB. What the guest writes in some seconds, at least.
        :param keep_free: bytes of the host's file system that are to stay free.
        :param tell: is called after each reservation, and when there is no room on the host
            (`error`; it is tried again) or nothing left to reserve (`full`).
        :raise RequestError: no bytes; or the disk was unplugged.
        :raise UnsupportedError: this format, file system or place cannot, or that of a layer that
            has become the active one.
        :raise BusyError: another watcher keeps this disk's room, or somebody else has set a
            write threshold on the node, which is left as it is.
        :raise DisconnectedError: the connection was lost, but QEMU lives: `recover` removes what
            is left.
        """
        from qmpblock.allocation.watch import keep_ahead
        from qmpblock.sizes import Amount

        await keep_ahead(self, size, keep_free=Amount(keep_free) if keep_free else None, tell=tell)

    async def snapshot(
        self,
        overlay: str | os.PathLike[str],
        *,
        format: str = "qcow2",  # noqa: A002 - the command's word
        backing_name: Literal["relative", "absolute"] = "relative",
    ) -> SnapshotResult:
        """Freeze the active layer; the guest's writes go to `overlay` from then on.

        As `VM.snapshot`, for one disk.
        """
        return await self.vm.snapshot({self: overlay}, format=format, backing_name=backing_name)

    def stream(
        self, *, top: str | None = None, base: str | None = None, speed: int = 0
    ) -> AbstractAsyncContextManager[ChainJob]:
        """Copy what lies between `top` and `base` into `top`; the images between are dropped.

        `async with disk.stream() as job:` starts it; leaving waits for its end. The guest
        runs on, and sees no difference. No link to an image is dropped before what came from
        it is on stable storage. Raised or cancelled inside, the job is cancelled, and the
        chain is as it was; what was copied by then stays in `top`.

        :param top: the LAYER that is written to: a node name, file name or `@N`; by default
            the active one.
        :param base: the LAYER to stop above, which stays; by default none does.
        :param speed: bytes a second; 0 is no limit. `job.set_speed` changes it.
        :raise RequestError: no such layer, wrong order, or not safely possible; nothing was
            touched.
        :raise BusyError: a job, or another controller, is at work on the disk; an InUseError:
            somebody else uses a layer that would change, or go.
        :raise JobError: QEMU's job failed; the chain is as it was.
        :raise StalledError: it did not move for the stall limit; undone.
        """
        from qmpblock.chains.jobs import stream

        return stream(self, top=top, base=base, speed=speed)

    def commit(
        self,
        *,
        top: str | None = None,
        base: str | None = None,
        speed: int = 0,
        throttle_guest: int = 0,
    ) -> AbstractAsyncContextManager[ChainJob]:
        """Copy what `top` and the layers above `base` hold into `base`; they are dropped.

        As `stream`. Where `top` is the active layer, the guest moves on to `base` at the end
        (a pivot) once `job.complete()` asked for it, which leaving the `async with` does too;
        the filters above stay. Its I/O is held for some milliseconds then. The VM is to be
        started from `base` afterwards: what was the active image is stale.

        `base` is written to: nobody else may depend on it. Given up, it keeps what it got,
        which changes nothing for this disk.

        :param top: the uppermost LAYER to commit; by default the active one.
        :param base: by default the lowest layer.
        :param throttle_guest: bytes a second to which the guest's I/O on this disk is limited
            for the time of the pivot, if it writes faster than the job copies; 0: never.
        :raise StalledError: also when an active commit does not converge: the guest writes
            faster than it copies for the stall limit.
        """
        from qmpblock.chains.jobs import commit

        return commit(self, top=top, base=base, speed=speed, throttle_guest=throttle_guest)

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
                    standing="nothing was touched",
                    remedy="wait for whoever put it there; if that was qmpblock, and it died: "
                    f"qmpblock recover {self.vm.monitor.address}",
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
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._frozen_layer(layer, few)) for layer in chain.layers[1:]
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        found = [task.result() for task in tasks]
        return {one.layer.depth: one for one in found if one is not None}

    async def _frozen_layer(self, layer: Layer, few: asyncio.Semaphore) -> LayerMap | None:
        """Map a frozen layer with qemu-img; None where QEMU itself is to be asked."""
        from qmpblock.host.qemuimg import QemuImg, blockdev

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

    def _layer_reserved(self, found: LayerMap) -> LayerMap:
        ranges = self._fallocated(found.layer)
        if ranges is None:
            return found
        return LayerMap(found.layer, found.map.with_reserved(ranges), found.source)

    def _mark_reserved(self, found: AllocationMap, chain: Chain) -> AllocationMap:
        for layer in chain.layers:
            ranges = self._fallocated(layer)
            if ranges is not None:
                supplied = found.where(depth=layer.depth, present=True)
                found = found.with_reserved(ranges.intersection(supplied))
        return found

    def _fallocated(self, layer: Layer) -> Ranges | None:
        if layer.format != "raw" or in_part(layer):
            return None
        path = imagefiles.local_path(self.vm.monitor.peer_pid, layer)
        return imagefiles.reserved_ranges(path, layer.size) if path is not None else None


@asynccontextmanager
async def exported(
    disk: Disk, layers: Sequence[Layer], *, hold_writer: bool = False, in_flight: int = 16
) -> AsyncIterator[list[Client]]:
    """Export layers of a disk, read-only, with all that a map needs; yields the clients.

    :param hold_writer: see `qmpblock.export.Request`; also `in_flight`.
    :raise GraphError: the disk was resized meanwhile.
    :raise Error: see `qmpblock.export.exports`.
    """
    from qmpblock.export.session import Request, exports

    requests = [Request(layer.node.name, _CONTEXTS, hold_writer, in_flight) for layer in layers]
    vm = disk.vm
    async with exports(vm.monitor, disk.device, requests, access=vm.nbd, stall=vm.stall) as clients:
        for layer, client in zip(layers, clients, strict=True):
            if client.size != layer.size:
                raise GraphError(
                    f"the node {layer.node.name} has {layer.size} bytes, but its export "
                    f"{client.size}",
                    remedy="the disk was resized meanwhile; try again",
                )
        yield clients


async def read_map(client: Client, chain: Chain, offset: int, length: int) -> AllocationMap:
    """Map a range through an export of the chain's active layer.

    It is right only while the chain is the one given: look again afterwards (`Chain.shape`).
    """
    return await _read_map(client, chain.level_sizes, chain.levels, offset, length)


def check_range(size: int, offset: int, length: int | None) -> tuple[int, int]:
    """Return the range asked for, its length filled in.

    :raise RangeError: it is not inside a disk of `size` bytes.
    """
    if not 0 <= offset <= size:
        raise RangeError(f"offset {offset} is not inside the disk of {size} bytes")
    if length is None:
        length = size - offset
    if length < 0 or offset + length > size:
        raise RangeError(
            f"offset {offset} and length {length} reach to {offset + length}, "
            f"but the disk has {size} bytes"
        )
    return offset, length


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
        from qmpblock.extents.allocationmap import ExtentAllowance, NBDMapBuilder

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
    try:
        async with asyncio.TaskGroup() as group:
            parts = [
                group.create_task(read(first, min(first + step, stop)))
                for first in range(start, stop, step)
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    from qmpblock.extents.allocationmap import AllocationMap

    found = [part.result() for part in parts]
    if not found:
        return AllocationMap.uniform(offset, 0, layers=levels[-1] + 1)
    return AllocationMap.concat(found).coalesce().clip(offset, length)
