"""The ways to copy a disk of a running VM that are measured against each other.

All leave the same: a closed file that holds the whole disk, on stable storage (`fsync`). The peers'
files are made, and flushed, within their time, as ours are.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import qmpblock
from bench.live import running as on_disk
from bench.live import served, wall
from qmpblock.testing.images import Tools
from qmpblock.testing.qemu import QemuProcess
from qmpblock.vm import Disk

MIB = 1 << 20
CLUSTER = 64 << 10
QMPBLOCK = [sys.executable, "-m", "qmpblock"]
OURS = ("copy --at start", "copy --at end", "copy --reflink", "the command")

Way = Callable[[], Awaitable[Path]]
"""Makes a copy, and returns where it is."""


def disk_of(path: Path, mib: int, tools: Tools, *, scattered: bool, fmt: str = "qcow2") -> None:
    """Make an image with `mib` MiB of data in twice as much.

    :param scattered: every other cluster has data, and where one lies in the file is left to
        chance; else all is in one piece.
    """
    size, data = 2 * mib * MIB, mib * MIB
    create = [tools.img, "create", "-q", "-f", fmt, str(path), str(size)]
    subprocess.run(create, check=True)
    places = list(range(0, data, MIB))
    length = MIB
    if scattered:
        places, length = list(range(0, size, 2 * CLUSTER)), CLUSTER
        random.Random(1).shuffle(places)
    script = "".join(f"write -q -P {1 + n % 255} {at} {length}\n" for n, at in enumerate(places))
    subprocess.run(
        [tools.io, "-t", "unsafe", "-f", fmt, str(path)],
        input=script + "quit\n",
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )


@dataclass
class Ways:
    """Copies one disk in every way.

    :ivar disk: of the VM, by our controller.
    :ivar target: the file; there is none before, and whoever measures removes it.
    """

    vm: QemuProcess
    disk: Disk
    tools: Tools
    target: Path

    def all(self, fmt: str) -> dict[str, Way]:
        """Return them by what they are called, for a format."""
        return self._made(
            {
                OURS[0]: lambda: self.ours("start", fmt),
                OURS[1]: lambda: self.ours("end", fmt),
                OURS[3]: lambda: self.command(fmt),
                "nbdcopy": lambda: self.nbdcopy(fmt),
                "qemu-img convert -W": lambda: self.convert(fmt),
                "blockdev-backup": lambda: self.job("blockdev-backup", fmt),
                "blockdev-mirror": lambda: self.job("blockdev-mirror", fmt),
            }
        )

    def sharing(self, fmt: str) -> dict[str, Way]:
        """Return those to share the blocks of the disk's image, which is of that format."""
        return self._made(
            {
                OURS[2]: lambda: self.ours("start", fmt, reflink=True),
                "cp --reflink": self.clone,
            }
        )

    def _made(self, ways: dict[str, Callable[[], Awaitable[None]]]) -> dict[str, Way]:
        async def make(way: Callable[[], Awaitable[None]]) -> Path:
            await way()
            return self.target

        return {name: partial(make, way) for name, way in ways.items()}

    async def ours(self, at: Any, fmt: str, *, reflink: bool = False) -> None:
        """By the library."""
        async with self.disk.copy(self.target, at=at, format=fmt, reflink=reflink):
            pass

    async def clone(self) -> None:
        """By cp of the image as it lies there: of no moment, were the guest to write meanwhile."""
        await wall("cp", "--reflink=always", self.disk.chain.active.file, str(self.target))
        self._sync()

    async def command(self, fmt: str) -> None:
        """By the command, its start included."""
        words = [self.disk.name, str(self.target), "--format", fmt, "--json"]
        await wall(*QMPBLOCK, "copy", self.vm.second_monitor_path, *words, quiet=True)

    async def nbdcopy(self, fmt: str) -> None:
        """From an export of the disk, flushed."""
        to = [str(self.target)]
        if fmt != "raw":
            await self._create(fmt)
            to = ["[", "qemu-nbd", "-f", fmt, str(self.target), "]"]
        async with served(self.vm, self.disk.chain.active.node.name) as uri:
            await wall("nbdcopy", "--flush", uri, "--", *to)
        self._sync()

    async def convert(self, fmt: str) -> None:
        """From an export of the disk, by sixteen coroutines, out of order."""
        async with served(self.vm, self.disk.chain.active.node.name) as uri:
            words = ["-W", "-m", "16", "-f", "raw", "-O", fmt, uri, str(self.target)]
            await wall(self.tools.img, "convert", *words)
        self._sync()

    async def job(self, command: str, fmt: str) -> None:
        """By QEMU's job alone, with QEMU's settings."""
        await self._create(fmt)
        file = {"driver": "file", "filename": str(self.target)}
        async with opened(self.vm, file, fmt) as node:
            await run_job(self.vm, command, self.disk.chain.active.node.name, node)
        self._sync()

    async def _create(self, fmt: str) -> None:
        create = [self.tools.img, "create", "-q", "-f", fmt, str(self.target)]
        await wall(*create, str(self.disk.size))

    def _sync(self) -> None:
        with self.target.open("r+b") as file:
            os.fsync(file.fileno())


@asynccontextmanager
async def opened(vm: QemuProcess, file: dict[str, Any], fmt: str) -> AsyncIterator[str]:
    """Have QEMU open a target, with its defaults; closing it flushes it.

    :param file: of the node that is reached by it, without its name.
    """
    await vm.execute("blockdev-add", **{**file, "node-name": "bench-file"})
    await vm.execute("blockdev-add", driver=fmt, file="bench-file", **{"node-name": "bench"})
    try:
        yield "bench"
    finally:
        for node in ("bench", "bench-file"):
            await vm.execute("blockdev-del", **{"node-name": node})


async def run_job(vm: QemuProcess, command: str, source: str, target: str) -> None:
    """Run a full copy by a job; a mirror ends softly as soon as it is ready.

    Cancelled, the job is given up, and gone when this ends.
    """
    names = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_READY", "BLOCK_JOB_CANCELLED")
    with vm.control.subscribe(*names) as events:
        words = {"job-id": "bench", "device": source, "target": target, "sync": "full"}
        await vm.execute(command, **words)
        try:
            while True:
                event = await events.get(3600)
                if event["event"] != "BLOCK_JOB_READY":
                    assert "error" not in event["data"], event
                    return
                await vm.execute("block-job-cancel", device="bench")
        except asyncio.CancelledError:
            await vm.execute("block-job-cancel", device="bench", force=True)
            while await vm.execute("query-jobs"):
                await asyncio.sleep(0.01)
            raise


@asynccontextmanager
async def running(path: Path, mib: int, tools: Tools, fmt: str = "qcow2") -> AsyncIterator[Ways]:
    """Run a tiny guest on the disk, and hold a controller of it."""
    async with (
        on_disk(path, 2 * mib * MIB, fmt) as vm,
        qmpblock.connect(vm.monitor_path) as controller,
    ):
        [disk] = await controller.disks()
        yield Ways(vm, disk, tools, path.with_name("target"))
