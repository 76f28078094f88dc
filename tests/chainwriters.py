"""Who writes to a disk while something is done to its chain, and what must be there after."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmpblock.testing.guest import StressSpec
from qmpblock.testing.images import BuiltDisk
from qmpblock.testing.stamps import check_acknowledged

STAMPED = ("virtio-blk", "virtio-scsi")  # what the tiny guest drives
_AREAS = (1 << 20, 256 << 10, 64 << 10)  # bytes that a writer may use, the most first
_LOOK = 64 << 20  # bytes at a disk's end where such an area is looked for
_BLOCK = 4096


@dataclass(frozen=True)
class Area:
    """A part of a disk that holds one byte throughout, and that a writer may use."""

    offset: int
    length: int
    byte: int


def quiet_area(path: Path) -> Area:
    """Find an area in a disk's raw content, as near to its end as can be."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for length in _AREAS:
            for offset in range((size - length) // length * length, max(-1, size - _LOOK), -length):
                data = os.pread(file.fileno(), length, offset)
                if data.count(data[0]) == length:
                    return Area(offset, length, data[0])
    raise AssertionError(f"no part of {path} is uniform, so that no guest can be checked there")


class StampWriter:
    """The tiny guest's stress run, where it drives the disk."""

    def __init__(self, vm: Any, disk: BuiltDisk, area: Area, number: int) -> None:
        self._guest = vm.guest
        self._area = area
        self._done: Any = None
        self.stopped = False
        self.spec = StressSpec(
            disk=number,
            offset=area.offset,
            blocks=area.length // _BLOCK,
            block_size=_BLOCK,
            queue_depth=8,
            seed=len(disk.spec.name) + number,
            flush_every=50,
            rate=4000,
            read_percent=25,
        )

    async def start(self) -> None:
        await self._guest.stress(self.spec)

    async def written(self) -> int:
        return (await self._guest.progress(self.spec.disk)).acked

    async def stop(self) -> None:
        """End it, and have the guest read back all it wrote."""
        self.stopped = True
        self._done = await self._guest.stop_stress(self.spec.disk)
        assert (self._done.bad, self._done.errors) == (0, 0), self._done
        assert self._done.acked > 0
        assert await self._guest.check(self.spec.disk) > 0

    def check(self, data: bytes) -> None:
        """Check what the area holds in the closed image."""
        verdict = check_acknowledged(
            data, self.spec, self._done.acked, self._done.issued, background=self._area.byte
        )
        assert verdict.ok, verdict


class DeviceWriter:
    """Writes through the device's backend in QEMU, for devices that the guest does not drive."""

    def __init__(self, vm: Any, disk: BuiltDisk, area: Area) -> None:
        self._vm = vm
        self._disk = disk
        self._area = area
        self._held: dict[int, int] = {}
        self._count = 0
        self.stopped = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        blocks = self._area.length // _BLOCK
        while not self.stopped:
            # Another order of blocks than patterns, so that each block gets every pattern.
            block, pattern = self._count * 7 % min(blocks, 32), self._count % 255 + 1
            offset = self._area.offset + block * _BLOCK
            # Never a plain `write`: it holds the main loop, and waits for ever while a pivot
            # holds the guest's I/O (K5).
            await self._vm.qemu_io(self._disk, f"aio_write -P {pattern} {offset} {_BLOCK}")
            self._held[block] = pattern
            self._count += 1

    async def written(self) -> int:
        return self._count

    async def stop(self) -> None:
        self.stopped = True
        assert self._task is not None  # start() made it
        await self._task
        assert self._count > 0
        for block, pattern in self._held.items():
            offset = self._area.offset + block * _BLOCK
            await self._vm.qemu_io(self._disk, f"read -P {pattern} {offset} {_BLOCK}")

    def check(self, data: bytes) -> None:
        for start in range(0, len(data), _BLOCK):
            wanted = self._held.get(start // _BLOCK, self._area.byte)
            assert data[start : start + _BLOCK] == bytes([wanted]) * _BLOCK, f"block at {start}"
