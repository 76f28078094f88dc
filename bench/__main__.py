"""`make bench`: every figure is a ratio of things measured in turn, in this one run.

python -m bench [--extents N ...] [--rounds N] [--largest N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import tracemalloc
from pathlib import Path

import qmpblock
from bench import allocate, copy, migrate, verify
from bench.live import CLUSTER, fragmented, running, served, wall
from qmpblock.testing.images import Tools

QMPBLOCK = [str(Path(sys.executable).with_name("qmpblock"))]


async def map_against_nbdinfo(folder: Path, tools: Tools, extents: int, rounds: int) -> None:
    """In-process map, whole command, and two runs of nbdinfo, in turn."""
    print(f"\nA live qcow2 of {extents:,} extents, {rounds} rounds in turn:")
    path = folder / "map.qcow2"
    fragmented(path, extents, tools)
    ours, command, theirs = [], [], []
    loop = asyncio.get_running_loop()
    async with (
        running(path, extents * CLUSTER) as vm,
        qmpblock.connect(vm.monitor_path) as controller,
    ):
        [disk] = await controller.disks()
        found = await disk.map()  # warms QEMU's metadata cache, for all alike
        assert len(found) == extents, len(found)
        for _ in range(rounds):
            begin = loop.time()
            await disk.map()
            ours.append(loop.time() - begin)
            command.append(
                await wall(*QMPBLOCK, "map", vm.second_monitor_path, disk.name, "--json")
            )
            async with served(vm, disk.chain.active.node.name) as uri:
                theirs.append(
                    await wall("nbdinfo", "--map", uri)
                    + await wall("nbdinfo", "--map=qemu:allocation-depth", uri)
                )
        tracemalloc.start()
        found = await disk.map()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    base = statistics.median(theirs)
    _line("two runs of nbdinfo --map", base, 1.0)
    _line("disk.map() in process", statistics.median(ours), _ratio(ours, theirs), "at most 0.5")
    _line("qmpblock map --json", statistics.median(command), _ratio(command, theirs), "at most 1.5")
    print(
        f"  the map itself: {found.nbytes / len(found):.1f} bytes an extent; "
        f"peak while mapping: {peak / len(found):.1f} bytes an extent (at most 40 for the map)"
    )


def _ratio(mine: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of each round: a slow moment slows both."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _line(name: str, seconds: float, ratio: float, wanted: str = "") -> None:
    print(f"  {name:<28} {seconds * 1000:>9.1f} ms   ratio {ratio:.2f}   {wanted}".rstrip())


async def growth(folder: Path, tools: Tools, largest: int, rounds: int) -> None:
    """Measure how the time of a map grows with the number of extents."""
    print("\nHow disk.map() grows:")
    loop = asyncio.get_running_loop()
    for extents in (10_000, 50_000, 200_000, 500_000, 2_000_000):
        if extents > largest:
            break
        path = folder / "growth.qcow2"
        fragmented(path, extents, tools)
        async with (
            running(path, extents * CLUSTER) as vm,
            qmpblock.connect(vm.monitor_path) as controller,
        ):
            [disk] = await controller.disks()
            await disk.map()
            times = []
            for _ in range(max(3, rounds // 2)):
                begin = loop.time()
                await disk.map()
                times.append(loop.time() - begin)
        best = min(times)
        print(
            f"  {extents:>9,} extents: {best * 1000:>9.1f} ms, {best / extents * 1e6:.2f} us each"
        )
        path.unlink()


async def start_up(folder: Path, tools: Tools, rounds: int) -> None:
    """Measure what a command costs before it does anything."""
    print("\nStart-up:")
    path = folder / "small.qcow2"
    fragmented(path, 16, tools)
    async with (
        running(path, 16 * CLUSTER) as vm,
        qmpblock.connect(vm.monitor_path) as controller,
    ):
        [disk] = await controller.disks()
        node, name = disk.chain.active.node.name, disk.name
        times: dict[str, list[float]] = {}
        for _ in range(rounds * 2):
            for label, command in (
                ("python -c pass", [sys.executable, "-c", "pass"]),
                ("qmpblock --version", [*QMPBLOCK, "--version"]),
                (
                    "qmpblock map, small disk",
                    [*QMPBLOCK, "map", vm.second_monitor_path, name, "--json"],
                ),
            ):
                times.setdefault(label, []).append(await wall(*command))
            async with served(vm, node) as uri:
                times.setdefault("nbdinfo --map", []).append(await wall("nbdinfo", "--map", uri))
    base = times["python -c pass"]
    for label, measured in times.items():
        _line(label, statistics.median(measured), _ratio(measured, base))


async def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--extents", type=int, nargs="*", default=[400_000, 1_000_000])
    parser.add_argument("--largest", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    # As installed: pip compiles a package; a checkout is compiled by its first use, unless
    # this forbids it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    tools = Tools.of()
    print(f"QEMU: {(await tools.run(tools.img, '--version')).splitlines()[0]}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for extents in given.extents:
            await map_against_nbdinfo(Path(folder), tools, extents, given.rounds)
        await growth(Path(folder), tools, given.largest, given.rounds)
        await start_up(Path(folder), tools, given.rounds)
        verify.verify(Path(folder), tools, given.rounds)
        await allocate.all_of_it(Path(folder), tools, given.rounds)
        await copy.all_of_it(Path(folder), tools, 1024, max(5, given.rounds), 8)
        await migrate.all_of_it(Path(folder), tools, migrate.DISKS, 256, given.rounds)


asyncio.run(main())
