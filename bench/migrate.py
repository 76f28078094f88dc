"""Live migrations with storage, against the same order by hand: how long, and how long it stands.

    python -m bench.migrate [--disks N ...] [--mib N] [--rounds N] [--folder DIR] [--json]

Each disk has N MiB of data in twice as much, and a guest that writes to it at random. All ways are
taken in turn within each round, each with a pair of QEMUs of its own, on this host. What is
compared is the best of each: a busy moment makes any of them slower, and none of them faster. For
how long the guest stood both QEMUs say, in the time stamps of their STOP and RESUME.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.migrating import BARE, BARE_MEMORY, OUR_MEMORY, OURS, Pair, Taken, pair, sources
from qmpblock.testing.images import Tools

DISKS = (1, 2, 4, 8)
PEERS = {OURS: BARE, OUR_MEMORY: BARE_MEMORY}


async def speeds(
    folder: Path, tools: Tools, number: int, mib: int, rounds: int
) -> dict[str, list[Taken]]:
    """Return what each way took, round by round."""
    taken: dict[str, list[Taken]] = {name: [] for name in (*PEERS, *PEERS.values())}
    disks = await sources(folder / "source", number, mib, tools)
    for turn in range(rounds):
        every = list(taken)
        first = turn % len(every)  # who comes first changes from round to round
        for name in every[first:] + every[:first]:
            alone = name in (OUR_MEMORY, BARE_MEMORY)
            async with pair(disks, folder, tools, shared=alone) as both:
                taken[name].append(await _one(both, name, alone=alone))
    shutil.rmtree(folder / "source")
    return taken


async def _one(both: Pair, name: str, *, alone: bool) -> Taken:
    way = both.ours if name in PEERS else both.bare
    return await both.taken(lambda: way(memory_only=alone))


def best(taken: Sequence[Taken]) -> tuple[float, float]:
    """Return the shortest time, and the shortest downtime, in seconds."""
    return min(one.seconds for one in taken), min(one.downtime for one in taken)


def show(number: int, taken: dict[str, list[Taken]]) -> None:
    """Print what came of so many disks."""
    rounds = len(taken[OURS])
    print(f"\n{number} disk{'s' * (number > 1)}, the best of {rounds} rounds in turn:")
    for name, times in taken.items():
        seconds, downtime = best(times)
        line = f"  {name:<24} {seconds * 1e3:>8.0f} ms   stands {downtime * 1e3:>6.1f} ms"
        if name in PEERS:
            theirs, stood = best(taken[PEERS[name]])
            line += f"   ratio {seconds / theirs:.2f}, stands {(downtime - stood) * 1e3:+.1f} ms"
            line += "   at most 1.1, +10" if name == OURS else ""
        print(line)
        print(f"    takes: {_parts(min(times, key=lambda one: one.seconds).phases)}")
        print(f"    stands: {_parts(min(times, key=lambda one: one.downtime).stood)}", flush=True)


def _parts(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {took * 1e3:.0f}" for name, took in parts.items())


async def all_of_it(
    folder: Path,
    tools: Tools,
    disks: Sequence[int],
    mib: int,
    rounds: int,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure, and print; return it all."""
    version = (await tools.run(tools.img, "--version")).splitlines()[0]
    told: dict[str, Any] = {"qemu": version, "mib": mib, "load": [os.getloadavg()], "disks": {}}
    if not quiet:
        print(f"\nMigrations of disks with {mib} MiB of data each:")
    for number in disks:
        taken = await speeds(folder, tools, number, mib, rounds)
        told["disks"][number] = {
            name: [one._asdict() for one in times] for name, times in taken.items()
        }
        if not quiet:
            show(number, taken)
    told["load"].append(os.getloadavg())
    return told


async def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.migrate", description=__doc__)
    parser.add_argument("--disks", type=int, nargs="*", default=DISKS)
    parser.add_argument("--mib", type=int, default=256, help="of data of each disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on whose file system the disks lie")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    tools = Tools.of()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as folder:
        told = await all_of_it(
            Path(folder), tools, given.disks, given.mib, given.rounds, quiet=given.json
        )
    if given.json:
        json.dump(told, sys.stdout, indent=1)


if __name__ == "__main__":
    asyncio.run(main())
