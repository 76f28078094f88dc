"""Allocation of a running disk, against QEMU's own ways to the same end."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import qmpblock
from bench.live import wall
from qmpblock.testing.images import Tools, build
from qmpblock.testing.qemu import QemuProcess
from qmpblock.testing.scenario import parse_scenario
from qmpblock.vm import Disk

MIB = 1 << 20
RANGE = 64 << 10  # bytes of a small range


@asynccontextmanager
async def disks_of(folder: Path, tools: Tools, text: str) -> AsyncIterator[list[Disk]]:
    """Run a VM whose disks are made anew."""
    built = await build(
        parse_scenario(f"about: To allocate.\n{text}", "bench"), folder / "i", tools
    )
    async with (
        QemuProcess.of(built, guest=True) as vm,
        qmpblock.connect(vm.monitor_path) as controller,
    ):
        yield await controller.disks()
    subprocess.run(["rm", "-r", str(folder / "i")], check=True)


@asynccontextmanager
async def disk_of(folder: Path, tools: Tools, images: str) -> AsyncIterator[Disk]:
    """Run a VM whose disk consists of `images`, made anew."""
    async with disks_of(folder, tools, f"images: [{images}]\n") as [disk]:
        yield disk


_TWINS = """\
disks:
- {{name: one, images: [{{file: base, size: {size}, content: [write 0 {size} 0xaa]}}, {{}}]}}
- {{name: other, images: [{{size: {size}, backing: base}}]}}
"""


async def thin_against_stream(folder: Path, tools: Tools, size: int, rounds: int) -> None:
    """Bring two disks over one full base up: one by CACHE, the other by a stream job.

    Who comes first in a VM takes up to twice as long as who comes second, or half as long: so
    two rounds with the order swapped make one ratio, their geometric mean.
    """
    rounds += rounds % 2
    print(f"\nThin allocation of {size // MIB} MiB, all of it backed, {rounds} rounds in turn:")
    loop = asyncio.get_running_loop()
    seconds: dict[str, list[float]] = {"disk.allocate()": [], "block-stream": []}
    for number in range(rounds):
        async with disks_of(folder, tools, _TWINS.format(size=size)) as disks:
            # Who comes first, and on which disk, changes from round to round.
            labels = list(seconds)[:: 1 if number % 2 else -1]
            for label, disk in zip(labels, disks[:: 1 if number % 4 < 2 else -1], strict=True):
                os.sync()  # nobody waits for what was written before
                begin = loop.time()
                if label == "block-stream":
                    await _stream(disk)
                else:
                    result = await disk.allocate()
                    assert result.allocated == size, result
                seconds[label].append(loop.time() - begin)
    ours, theirs = seconds.values()
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratios = [statistics.geometric_mean(two) for two in zip(each[::2], each[1::2], strict=True)]
    print(f"  block-stream                 {statistics.median(theirs):>9.2f} s")
    print(f"  disk.allocate()              {statistics.median(ours):>9.2f} s   (at most 1.1)")
    print(f"  ratio                        {spread(ratios)}")


def spread(ratios: list[float]) -> str:
    """Return the median of some ratios and where the middle half and all of them lie."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (
        f"{median:.2f} (half of them {low:.2f} to {high:.2f}, all {min(ratios):.2f} to "
        f"{max(ratios):.2f})"
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
    base = times["dd conv=fsync"]
    for label, measured in times.items():
        ratios = [a / b for a, b in zip(measured, base, strict=True)]
        print(f"  {label:<28} {statistics.median(measured):>9.2f} s   ratio {spread(ratios)}")
    print(f"  (at most 1.3 of dd); the guest's I/O was held for {held * 1000:.1f} ms at the most")


_BACKED = """\
images:
- {{file: base, size: {size}, content: [write {part} {part} 0xaa, write {last} {part} 0xaa]}}
- {{}}
"""


async def size_of_the_disk(folder: Path, tools: Tools, rounds: int) -> None:
    """Do the same to 4 MiB of a small disk and of large ones, in turn."""
    part = 4 * MIB
    sizes = {"16 GiB": 16 << 30, "2 TiB": 2 << 40, "16 TiB": 16 << 40}
    times: dict[str, dict[str, list[float]]] = {}
    loop = asyncio.get_running_loop()
    for _ in range(rounds):
        for label, size in sizes.items():
            text = _BACKED.format(size=size, part=part, last=size - part)
            async with disks_of(folder, tools, text) as [disk]:
                for what, work in (
                    ("map of 4 MiB", lambda d, size: d.map(size - part, part)),
                    ("thin, 4 MiB at the end", lambda d, size: d.allocate(size - part, part)),
                    ("full, 4 MiB near the start", lambda d, _: d.allocate(0, part, full=True)),
                    (
                        "full, 4 MiB near the end",
                        lambda d, size: d.allocate(size - 2 * part, part, full=True),
                    ),
                    ("map of all of it", lambda d, _: d.map()),
                ):
                    begin = loop.time()
                    await work(disk, size)
                    times.setdefault(what, {}).setdefault(label, []).append(loop.time() - begin)
    print(f"\n4 MiB of sparse qcow2 disks of {', '.join(sizes)}, {rounds} rounds in turn:")
    for what, found in times.items():
        base = found["16 GiB"]
        print(f"  {what:<28} {statistics.median(base) * 1000:>7.0f} ms", end="")
        for label in ("2 TiB", "16 TiB"):
            ratios = [a / b for a, b in zip(found[label], base, strict=True)]
            print(f"   {label}: ratio {spread(ratios)}", end="")
        print()


async def small_ranges(folder: Path, tools: Tools, size: int, count: int) -> None:
    """Allocate small ranges at random, one after another; count the commands of each."""
    images = f"{{size: {size}, content: [write 0 {size} 0xaa]}}, {{}}"
    places = random.Random(1).sample(range(0, size, RANGE), 11 * count)
    loop = asyncio.get_running_loop()
    print("\nSmall ranges (64 KiB at random, one after another):")
    async with disk_of(folder, tools, images) as disk:
        commands, real = 0, disk.vm.monitor._execute

        async def execute(*arguments: Any) -> Any:
            nonlocal commands
            commands += 1
            return await real(*arguments)

        disk.vm.monitor._execute = execute  # type: ignore[method-assign]

        def said(what: str, many: int, seconds: float) -> None:
            print(f"  {what:<28} {many / seconds:>6.0f} a second, {commands / many:.1f} QMP each")

        begin = loop.time()
        for place in places[:count]:
            await disk.allocate(place, RANGE)
        said("disk.allocate()", count, loop.time() - begin)
        commands, begin = 0, loop.time()
        async with disk.allocator() as allocator:
            for place in places[count:]:
                await allocator.allocate(place, RANGE)
        said("disk.allocator()", 10 * count, loop.time() - begin)


async def all_of_it(folder: Path, tools: Tools, rounds: int) -> None:
    """Measure all of the above."""
    await thin_against_stream(folder, tools, 1024 * MIB, max(9, rounds))
    await full_against_writing(folder, tools, 512 * MIB, max(3, rounds // 2))
    await size_of_the_disk(folder, tools, max(3, rounds // 2))
    await small_ranges(folder, tools, 256 * MIB, 200)
