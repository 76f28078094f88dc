"""Allocation of a running disk, against QEMU's own ways to the same end."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import qmpblock
from bench.live import wall
from qmpblock.disk import Disk
from qmpblock.testing.images import Tools, build
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario

MIB = 1 << 20
RANGE = 64 << 10  # bytes of a small range


@asynccontextmanager
async def disk_of(folder: Path, tools: Tools, images: str) -> AsyncIterator[Disk]:
    """Run a VM whose disk consists of `images`, made anew."""
    text = f"about: A disk to allocate.\nimages: [{images}]\n"
    built = await build(parse_scenario(text, "bench"), folder / "images", tools)
    async with (
        QemuProcess.of(built, guest=True) as vm,
        qmpblock.connect(vm.monitor_path) as controller,
    ):
        yield (await controller.disks())[0]
    subprocess.run(["rm", "-r", str(folder / "images")], check=True)


async def thin_against_stream(folder: Path, tools: Tools, size: int, rounds: int) -> None:
    """Bring a fully backed disk up: by CACHE, and by a stream job."""
    print(f"\nThin allocation of {size // MIB} MiB, all of it backed, {rounds} rounds in turn:")
    images = f"{{size: {size}, content: [write 0 {size} 0xaa]}}, {{}}"
    loop = asyncio.get_running_loop()
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        async with disk_of(folder, tools, images) as disk:
            begin = loop.time()
            result = await disk.allocate()
            ours.append(loop.time() - begin)
            assert result.allocated == size, result
        async with disk_of(folder, tools, images) as disk:
            begin = loop.time()
            await _stream(disk)
            theirs.append(loop.time() - begin)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"  block-stream                 {statistics.median(theirs):>9.2f} s")
    print(
        f"  disk.allocate()              {statistics.median(ours):>9.2f} s   ratio {ratio:.2f}   "
        "at most 1.1"
    )


async def _stream(disk: Disk) -> None:
    """Run QEMU's stream job by itself: no flush, no journal, no map."""
    monitor = disk.vm.monitor
    with monitor.subscribe("BLOCK_JOB_COMPLETED") as completed:
        await monitor.execute(
            "block-stream", {"job-id": "bench", "device": disk.chain.active.node.name}
        )
        while True:
            event = await completed.get(600)
            if event["data"]["device"] == "bench":
                assert "error" not in event["data"], event
                return


async def full_against_writing(folder: Path, tools: Tools, size: int, rounds: int) -> None:
    """Give an empty qcow2 its space: on the live disk, and by writing zeros to a new file."""
    print(f"\nFull allocation of an empty qcow2 of {size // MIB} MiB, {rounds} rounds in turn:")
    times: dict[str, list[float]] = {}
    held = 0.0
    loop = asyncio.get_running_loop()
    zeros, target = folder / "zeros.raw", folder / "target"
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={zeros}", "bs=1M", f"count={size // MIB}", "status=none"],
        check=True,
    )
    convert = [tools.img, "convert", "-f", "raw", "-O", "qcow2", "-S", "0", str(zeros), str(target)]
    dd = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={size // MIB}", "conv=fsync"]
    for _ in range(rounds):
        async with disk_of(folder, tools, f"{{size: {size}}}") as disk:
            begin = loop.time()
            result = await disk.allocate(full=True)
            times.setdefault("disk.allocate(full=True)", []).append(loop.time() - begin)
            assert result.reserved == size, result
            held = max(held, result.held)
        for label, command in (("qemu-img convert -S 0", convert), ("dd conv=fsync", dd)):
            times.setdefault(label, []).append(await wall(*command))
            target.unlink()
    zeros.unlink()
    base = times["qemu-img convert -S 0"]
    for label, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, base, strict=True))
        print(f"  {label:<28} {statistics.median(measured):>9.2f} s   ratio {ratio:.2f}")
    print(
        "  the bound: the zeros are written twice, to the temporary image and to the disk, and "
        f"flushed;\n  the guest's I/O was held for {held * 1000:.1f} ms at the most"
    )


async def small_ranges(folder: Path, tools: Tools, size: int, count: int) -> None:
    """Allocate small ranges at random, one call each."""
    images = f"{{size: {size}, content: [write 0 {size} 0xaa]}}, {{}}"
    chance = random.Random(1)
    places = chance.sample(range(0, size, RANGE), count)
    loop = asyncio.get_running_loop()
    async with disk_of(folder, tools, images) as disk:
        begin = loop.time()
        for place in places:
            await disk.allocate(place, RANGE)
        seconds = loop.time() - begin
    print(f"\nSmall ranges (64 KiB at random, one call each): {count / seconds:.0f} a second")


async def all_of_it(folder: Path, tools: Tools, rounds: int) -> None:
    """Measure all of the above."""
    rounds = max(3, rounds // 2)
    await thin_against_stream(folder, tools, 1024 * MIB, rounds)
    await full_against_writing(folder, tools, 512 * MIB, rounds)
    await small_ranges(folder, tools, 256 * MIB, 200)
