"""Long tests as rounds: tests/soak runs many of them, tests/live a few of each."""

import asyncio
import os
import random
import sys
from dataclasses import dataclass

from killing import MOMENTS, Graveyard

import qmpblock
from qmpblock.names import NBD_LOCK
from qmpblock.testing.invariant import snapshot
from qmpblock.testing.stamps import StressSpec, check_acknowledged

# Maps without end, in a process of its own that is there to be killed.
MAPPING = """
import asyncio, sys
import qmpblock
async def main():
    async with qmpblock.connect(sys.argv[1]) as vm:
        [disk] = await vm.disks()
        await disk.map()
        print("mapping", flush=True)
        while True:
            await disk.map()
asyncio.run(main())
"""


def with_guest(scenario):
    """Return start_qemu's options: a disk in an iothread is there only while a guest drives it.

    On QEMU before 10.0 qmpblock refuses one that no guest drives (docs/safety.md).
    """
    return {"guest": any(disk.attach.iothread != "none" for disk in scenario.disks)}


def rounds(default):
    """Return how many rounds to do, and the seed of their random choices."""
    seed = int(os.environ.get("QMPBLOCK_SEED") or random.SystemRandom().getrandbits(32))
    count = int(os.environ.get("QMPBLOCK_ROUNDS") or default)
    print(f"rounds: {count}, seed: {seed}")
    return count, random.Random(seed)


@dataclass
class Outcome:
    """What a run did, to be printed: `maps` by this process, `kills` of another."""

    maps: int = 0
    kills: int = 0
    writes: int = 0


async def maps_under_stress(vm, invariant, tools, chance, count, kills):
    """Map a disk `count` times while the guest stresses it; kill a controller `kills` times.

    The guest checks a part of its reads all the time and every block at the end; then the
    image of the closed VM is checked by the host.
    """
    outcome = Outcome()
    spec = StressSpec(
        offset=16 << 20,  # where the scenarios hold zeros, across the end of a short layer
        blocks=2048,
        block_size=4096,
        queue_depth=16,
        seed=chance.getrandbits(32),
        flush_every=200,
        read_percent=25,
    )
    await vm.guest.stress(spec)
    turns = ["map"] * count + ["kill"] * kills
    chance.shuffle(turns)
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        for turn in turns:
            if turn == "map":
                found = await disk.map()
                assert found.length == disk.size
                outcome.maps += 1
            else:
                await killed_in_the_middle(vm, chance)
                outcome.kills += 1
        progress = await vm.guest.progress()
        assert progress.running, progress
    objects = {item["name"] for item in await vm.execute("qom-list", path="/objects")}
    assert NBD_LOCK not in objects
    assert await vm.execute("query-block-exports") == []
    done = await vm.guest.stop_stress()
    assert (done.bad, done.errors) == (0, 0), done
    assert await vm.guest.check() > 0
    outcome.writes = done.acked
    await invariant.verify(vm)
    invariant.forget(vm)
    await vm.quit()
    raw = vm.directory / "content.raw"
    active = vm.disks[0].active
    await tools.run(
        tools.img, "convert", "-f", active.spec.format, "-O", "raw", str(active.path), str(raw)
    )
    data = raw.read_bytes()[spec.offset : spec.offset + spec.length]
    verdict = check_acknowledged(data, spec, done.acked, done.issued, background=0)
    assert verdict.ok, verdict
    await active.check(tools)
    return outcome


async def killed_in_the_middle(vm, chance):
    """Let another controller map, by the second monitor, and kill it -9 at some moment."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAPPING, vm.second_monitor_path, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert (await process.stdout.readline()).strip() == b"mapping"
        await asyncio.sleep(chance.random() * 0.1)
    finally:
        process.kill()
        await process.wait()
    assert vm.running, vm.evidence()
    await vm.execute("query-status")
    # Whoever comes next undoes it; by the same monitor, so that no descriptor is left either.
    async with qmpblock.connect(vm.second_monitor_path) as controller:
        await (await controller.disks())[0].map()


OPERATIONS = {"map": {}, "layers": {"local": False}}


def sample(share):
    """Choose points by chance: each with probability `share`."""
    _, chance = rounds(1)
    return lambda _: chance.random() < share


def slice_of_soak():
    """Choose the points of this slice: all slices of `make soak` together try every one."""
    number, slices = map(int, os.environ.get("QMPBLOCK_SLICE", "0/1").split("/"))
    return lambda point: point % slices == number


async def kill_matrix(vm, chosen, foreign=None):
    """Kill a controller at the chosen points of each operation; map after each.

    :param chosen: tells by a point's number whether it is tried.

    :return: how many points were tried, of how many.
    """
    tried = points = 0
    async with qmpblock.connect(vm.monitor_path) as controller:
        [disk] = await controller.disks()
        expected = await disk.map() if not foreign else None
    await vm.execute("query-status")
    before = await snapshot(vm.control, vm.pid, vm.image_directories())
    async with Graveyard() as graveyard:
        for operation, more in OPERATIONS.items():
            what = {"do": operation, "disk": disk.name, **more}
            died, trace = await graveyard.control(vm, what, nbd=foreign)
            assert not died
            for number in range(1, len(trace) + 1):
                for moment in MOMENTS:
                    points += 1
                    if not chosen(points):
                        continue
                    tried += 1
                    died, _ = await graveyard.control(vm, what, number, moment, nbd=foreign)
                    where = f"{moment} command {number} of {operation}"
                    assert died, where
                    assert vm.running, f"{where}: {vm.evidence()}"
                    async with qmpblock.connect(vm.monitor_path, nbd=foreign) as controller:
                        found = await (await controller.disks())[0].map()
                    assert expected is None or found == expected
                    left = await snapshot(vm.control, vm.pid, vm.image_directories()) - before
                    assert not left, f"{where}: {left}"
    print(f"kill matrix: {tried} of {points} points")
    return tried, points
