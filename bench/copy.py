"""Copies of a running disk, against the other ways to make one: how long, and what the guest feels.

    python -m bench.copy [ROW ...] [--mib N] [--rounds N] [--seconds N] [--folder DIR] [--json]

The disk has N MiB of data in twice as much: once in one piece, once scattered. All ways are taken
in turn, within each round, on one VM; a ratio is to the fastest of the others in that very round,
whichever that was. All end with the copy on stable storage. Where the machine is busy with
something else, the processor's time says more than the seconds.

On XFS, in a file of this file system's (for root, with mkfs.xfs), copies that share the disk's
blocks are measured against `cp --reflink` of its image.

The guest's latency is that of random writes of 4 KiB, few enough a second not to be the load: as
its device saw it in QEMU (histograms), and the longest as the guest itself saw it. It is taken
while nothing else runs, while we copy, and while QEMU's bare backup job does; then the same with
a target that takes 4 MiB a second, for some seconds of a copy that is given up after them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.copying import MIB, OURS, Way, disk_of, running
from bench.feeling import feelings
from bench.live import XFS_LEAST, xfs
from qmpblock.testing.images import Tools
from qmpblock.testing.qemu import QemuProcess

FORMATS = ("raw", "qcow2")
KINDS = {"piece": "in one piece", "scattered": "scattered"}
LATENCY, REFLINK = "latency", "reflink"
ROWS = (*(f"{kind}/{fmt}" for kind in KINDS for fmt in FORMATS), LATENCY, REFLINK)
_TICKS = os.sysconf("SC_CLK_TCK")  # in a second


class Taken(NamedTuple):
    """What a copy took: seconds, and those of the processor, of all processes together."""

    seconds: float
    processor: float


async def speeds(
    ways: Mapping[str, Way], vm: QemuProcess, rounds: int, size: int
) -> dict[str, list[Taken]]:
    """Return what each way took, round by round.

    :param size: of the disk, in bytes.
    """
    loop = asyncio.get_running_loop()
    taken: dict[str, list[Taken]] = {}
    for number in range(rounds):
        every = list(ways.items())
        # Who comes first changes from round to round.
        turn = number % len(every)
        for name, way in every[turn:] + every[:turn]:
            touch(size)
            os.sync()  # nobody waits for what was written before
            begin, used = loop.time(), processor(vm.pid)
            made = await way()
            seconds, used = loop.time() - begin, processor(vm.pid) - used
            one = Taken(seconds, max(used, 1 / _TICKS))  # it is counted in these
            taken.setdefault(name, []).append(one)
            made.unlink()
    return {name: taken[name] for name in ways}


def touch(size: int) -> None:
    """Have this machine hold so much memory that is free.

    Where it is a VM itself, what is not used for some seconds its host may take back; a page cache
    that has to get it again takes seconds, and it would be luck who is the one.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, size, flags=flags).close()


def processor(pid: int) -> float:
    """Return the seconds of the processor of a process, of this one, and of what it ran."""
    own = os.times()
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    theirs = (int(words[11]) + int(words[12])) / _TICKS
    return own.user + own.system + own.children_user + own.children_system + theirs


def ratios(taken: dict[str, list[Taken]], name: str) -> tuple[float, float]:
    """Return what one way took to the fastest of the peers, and to the thriftiest.

    :return: the median of the ratios of each round: a slow moment slows all.
    """
    peers = [times for peer, times in taken.items() if peer not in OURS]
    by_wall = [min(one.seconds for one in some) for some in zip(*peers, strict=True)]
    by_processor = [min(one.processor for one in some) for some in zip(*peers, strict=True)]
    mine = taken[name]
    return (
        statistics.median(a.seconds / b for a, b in zip(mine, by_wall, strict=True)),
        statistics.median(a.processor / b for a, b in zip(mine, by_processor, strict=True)),
    )


def show_speeds(what: str, taken: dict[str, list[Taken]]) -> None:
    """Print one table."""
    print(f"\n{what}, {len(next(iter(taken.values())))} rounds in turn:")
    best = min(one.seconds for name, times in taken.items() if name not in OURS for one in times)
    for name, times in taken.items():
        by_wall, by_processor = ratios(taken, name)
        seconds = [one.seconds for one in times]
        used = statistics.median(one.processor for one in times)
        print(
            f"  {name:<20} {statistics.median(seconds):>7.2f} s (best {min(seconds):>6.2f})   "
            f"ratio {by_wall:>5.2f} (best {min(seconds) / best:>5.2f})   "
            f"processor {used:>6.2f} s   ratio {by_processor:>5.2f}"
            + ("   at most 1.1" if name in OURS[:3] else ""),
            flush=True,
        )


def show_feelings(felt: dict[str, dict[str, float]]) -> None:
    """Print what the guest felt."""
    print("\nThe guest's writes, ms (median, 99 %, longest), and errors:")
    for name, one in felt.items():
        print(
            f"  {name:<34} {one['median']:>8.2f} {one['p99']:>9.2f} {one['longest']:>9.1f}"
            f"   of {one['writes']:.0f} writes; the guest's own longest "
            f"{one['guest_longest']:.1f}, errors {one['errors']:.0f}"
        )


async def all_of_it(
    folder: Path,
    tools: Tools,
    mib: int,
    rounds: int,
    seconds: float,
    rows: Collection[str] = ROWS,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure, and print; return it all.

    :param rows: what is measured, of ROWS.
    """
    version = (await tools.run(tools.img, "--version")).splitlines()[0]
    told: dict[str, Any] = {"qemu": version, "mib": mib, "load": [os.getloadavg()], "seconds": {}}

    def speeds_are(kind: str, fmt: str, taken: dict[str, list[Taken]]) -> None:
        told["seconds"].setdefault(kind, {})[fmt] = taken
        if not quiet:
            show_speeds(f"{mib} MiB of data in {2 * mib} MiB, {kind}, to {fmt}", taken)

    path = folder / "source.qcow2"
    for word, kind in KINDS.items():
        formats = [fmt for fmt in FORMATS if f"{word}/{fmt}" in rows]
        feels = word == "piece" and LATENCY in rows
        if not formats and not feels:
            continue
        disk_of(path, mib, tools, scattered=word == "scattered")
        async with running(path, mib, tools) as ways:
            for fmt in formats:
                speeds_are(kind, fmt, await speeds(ways.all(fmt), ways.vm, rounds, ways.disk.size))
            if feels:
                told["latency"] = await feelings(ways, seconds)
                if not quiet:
                    show_feelings(told["latency"])
        path.unlink()
    if REFLINK in rows:
        await _sharing(folder, tools, mib, rounds, speeds_are)
    told["load"].append(os.getloadavg())
    if not quiet:
        loads = " and ".join(f"{load[0]:.1f}" for load in told["load"])
        print(f"\nThe machine's load before and after: {loads}.")
    return told


async def _sharing(
    folder: Path,
    tools: Tools,
    mib: int,
    rounds: int,
    speeds_are: Callable[[str, str, dict[str, list[Taken]]], None],
) -> None:
    """Measure copies that share blocks, where an XFS can be had."""
    with xfs(folder, 4 * mib * MIB + XFS_LEAST) as place:
        if place is None:
            print("no XFS could be had (for root, with mkfs.xfs): no reflinks", file=sys.stderr)
            return
        for fmt in FORMATS:
            path = place / f"source.{fmt}"
            disk_of(path, mib, tools, scattered=False, fmt=fmt)
            async with running(path, mib, tools, fmt) as ways:
                speeds_are(
                    "reflink", fmt, await speeds(ways.sharing(fmt), ways.vm, rounds, ways.disk.size)
                )
            path.unlink()


async def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.copy", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; else all")
    parser.add_argument("--mib", type=int, default=1024, help="of data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of a copy to a slow target")
    parser.add_argument("--folder", type=Path, help="on whose file system disk and copies lie")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.rows).difference(ROWS):
        parser.error(f"{', '.join(sorted(unknown))}: the rows are {', '.join(ROWS)}")
    tools = Tools.of()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as folder:
        words = given.mib, given.rounds, given.seconds, given.rows or ROWS
        told = await all_of_it(Path(folder), tools, *words, quiet=given.json)
    if given.json:
        json.dump(told, sys.stdout, indent=1)


if __name__ == "__main__":
    asyncio.run(main())
